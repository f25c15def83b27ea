"""Probes of integer and bit instructions, comparisons and integer conversions: one kernel per instruction."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .kit import Case, kernel, random_u32, random_u64, sentinel, words

LANES = 128
WIDTH = {"h": 2, "r": 4, "d": 8, "b": 1, "p": 4}

SPECIAL_INTEGERS = {
    8: (0, 1, 0x7F, 0x80, 0xFF, 0x55, 0x10, 0xFE),
    16: (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x80, 0xFF, 0x100),
    32: (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x8000, 0x12345678, 0xFFFF0000),
    64: (0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**32, 2**31, 0xFFFFFFFF00000000),
}
DTYPE = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def integers(bits: int, seed: int, position: int, n: int = LANES) -> np.ndarray[Any, Any]:
    """Return operand number `position`: special values against each other, then random ones of mixed magnitude."""
    special = SPECIAL_INTEGERS[bits]
    words = random_u64(seed * 10 + position, n)
    shift = (random_u64(seed * 10 + position + 5, n) % np.uint64(bits)).astype(np.uint64)
    data = np.where(np.arange(n) % 2 == 0, words, (words >> np.uint64(64 - bits)) >> shift)
    data = data & np.uint64(2**bits - 1)
    for i in range(min(n, 64)):
        data[i] = special[i % 8] if position == 0 else special[i // 8 if position == 1 else (i * 3 + i // 8) % 8]
    return data.astype(DTYPE[bits])


def amounts(seed: int, n: int = LANES, limit: int = 70) -> np.ndarray[Any, Any]:
    """Return shift amounts, in and out of range."""
    data = random_u32(seed, n) % np.uint32(limit)
    data[-4:] = (0xFFFFFFFF, 0x80000000, 256, 1000)
    return data


def operation(
    group: str,
    opcode: str,
    text: str,
    kinds: str,
    out: str,
    data: Sequence[np.ndarray[Any, Any]],
    *,
    name: str = "",
    rtol: float = 0.0,
    atol: float = 0.0,
    float_type: str = "f32",
) -> Case:
    """Apply `text` to each lane's operands. A, B, C, E stand for the operands, D for the result, P for a predicate."""
    n = len(data[0])
    registers = {"h": "%h", "r": "%r", "d": "%d", "b": "%h"}
    lines = []
    for i, kind in enumerate(kinds):
        register = f"{registers[kind]}{10 + i}"
        lines.append(f"mul.wide.u32 %d1, %tix, {WIDTH[kind]};\nadd.u64 %d1, %d1, %ptr{i + 1};")
        lines.append(f"ld.global.{'u8' if kind == 'b' else f'b{8 * WIDTH[kind]}'} {register}, [%d1];")
        text = text.replace("$" + "ABCE"[i], register)
    result = f"{registers.get(out, '%r')}20"
    text = text.replace("$D", result).replace("$P", "%p1").replace("$Q", "%p2")
    lines.append(text)
    if out == "p":
        lines.append("selp.b32 %r20, 1, 0, %p1;")
    lines.append(f"mul.wide.u32 %d1, %tix, {WIDTH[out]};\nadd.u64 %d1, %d1, %ptr0;")
    lines.append(f"st.global.{'b8' if out == 'b' else f'b{8 * WIDTH[out]}'} [%d1], {result};")
    buffers = {"out": sentinel(n * WIDTH[out])}
    for letter, array in zip("abce", data, strict=False):
        buffers[letter] = array
    assert all(len(array) == n for array in data), opcode
    return Case(
        name=f"{group}/{name or opcode}",
        ptx=kernel("\n".join(lines), pointers=1 + len(kinds), threads=n, shared=False),
        buffers=buffers,
        outputs=("out",),
        block=n,
        rtol=rtol,
        atol=atol,
        float_type=float_type,
    )


def register_kind(bits: int) -> str:
    return {16: "h", 32: "r", 64: "d"}[bits]


def bits_of(opcode: str) -> int:
    """Return the width that the opcode's last type suffix names."""
    digits = "".join(c for c in opcode.split(".")[-1] if c.isdigit())
    return int(digits)


BINARY = words(
    "add.s16 add.u16 add.s32 add.u32 add.s64 add.u64 add.sat.s32 sub.s16 sub.s32 sub.u32 sub.s64 sub.u64 sub.sat.s32 "
    "mul.lo.s16 mul.lo.u16 mul.lo.s32 mul.lo.u32 mul.lo.s64 mul.lo.u64 "
    "mul.hi.s16 mul.hi.u16 mul.hi.s32 mul.hi.u32 mul.hi.s64 mul.hi.u64 mul24.lo.u32 mul24.hi.s32 "
    "min.s16 min.u16 min.s32 min.u32 min.s64 min.u64 max.s16 max.u16 max.s32 max.u32 max.s64 max.u64 "
    "and.b16 and.b32 and.b64 or.b16 or.b32 or.b64 xor.b16 xor.b32 xor.b64 "
    "min.u16x2 max.s16x2 add.u16x2 add.s16x2 min.relu.s32 max.relu.s32"
)
UNARY = words(
    "not.b16 not.b32 not.b64 neg.s16 neg.s32 neg.s64 abs.s16 abs.s32 abs.s64 brev.b32 brev.b64 cnot.b16 cnot.b32 cnot.b64"
)
TO_U32 = words(
    "clz.b32 clz.b64 popc.b32 popc.b64 bfind.u32 bfind.s32 bfind.u64 bfind.s64 "
    "bfind.shiftamt.u32 bfind.shiftamt.s32 bfind.shiftamt.u64"
)
DIVISIONS = words("div.s16 div.u16 div.s32 div.u32 div.s64 div.u64 rem.s16 rem.u16 rem.s32 rem.u32 rem.s64 rem.u64")
SHIFTS = words("shl.b16 shl.b32 shl.b64 shr.b32 shr.u16 shr.u32 shr.u64 shr.s16 shr.s32 shr.s64")


def arithmetic_cases() -> Iterator[Case]:
    for i, opcode in enumerate(BINARY):
        bits = 32 if "x2" in opcode else bits_of(opcode)
        kind = register_kind(bits)
        data = [integers(bits, i, 0), integers(bits, i, 1)]
        yield operation("int", opcode, f"{opcode} $D, $A, $B;", kind * 2, kind, data)
    for i, opcode in enumerate(UNARY):
        kind = register_kind(bits_of(opcode))
        yield operation("int", opcode, f"{opcode} $D, $A;", kind, kind, [integers(bits_of(opcode), 100 + i, 0)])
    for i, opcode in enumerate(TO_U32):
        kind = register_kind(bits_of(opcode))
        yield operation("int", opcode, f"{opcode} $D, $A;", kind, "r", [integers(bits_of(opcode), 130 + i, 0)])
    for i, opcode in enumerate(SHIFTS):
        kind = register_kind(bits_of(opcode))
        data = [integers(bits_of(opcode), 160 + i, 0), amounts(180 + i)]
        yield operation("int", opcode, f"{opcode} $D, $A, $B;", kind + "r", kind, data)
    for i, opcode in enumerate(DIVISIONS):
        bits = bits_of(opcode)
        kind = register_kind(bits)
        left, right = integers(bits, 200 + i, 0), integers(bits, 200 + i, 1)
        right[right == 0] = 3  # division by zero is unspecified
        right[right == 2**bits - 1] = 2**bits - 5  # and so is the overflow of the smallest number by -1
        yield operation("int", opcode, f"{opcode} $D, $A, $B;", kind * 2, kind, [left, right])
    for i, opcode in enumerate(words("mul.wide.s16 mul.wide.u16 mul.wide.s32 mul.wide.u32")):
        bits = bits_of(opcode)
        data = [integers(bits, 220 + i, 0), integers(bits, 220 + i, 1)]
        yield operation("int", opcode, f"{opcode} $D, $A, $B;", register_kind(bits) * 2, register_kind(2 * bits), data)
    for i, opcode in enumerate(words("mad.wide.s16 mad.wide.u16 mad.wide.s32 mad.wide.u32")):
        bits = bits_of(opcode)
        wide = register_kind(2 * bits)
        data = [integers(bits, 230 + i, 0), integers(bits, 230 + i, 1), integers(2 * bits, 230 + i, 2)]
        yield operation("int", opcode, f"{opcode} $D, $A, $B, $C;", register_kind(bits) * 2 + wide, wide, data)
    ternary = "mad.lo.s16 mad.lo.s32 mad.lo.u32 mad.lo.s64 mad.lo.u64 mad.hi.s32 mad.hi.u32 mad.hi.u64 mad.hi.sat.s32 "
    ternary += "mad24.lo.u32 sad.s16 sad.u16 sad.s32 sad.u32 sad.s64 sad.u64"
    for i, opcode in enumerate(words(ternary)):
        bits = bits_of(opcode)
        data = [integers(bits, 240 + i, position) for position in range(3)]
        kind = register_kind(bits)
        yield operation("int", opcode, f"{opcode} $D, $A, $B, $C;", kind * 3, kind, data)
    yield from carry_cases()


def carry_cases() -> Iterator[Case]:
    data = [integers(32, 260, position) for position in range(3)]
    chains = {
        "add.cc_addc": "add.cc.u32 %r50, $A, $B;\naddc.u32 $D, $C, 0;",
        "add.cc_addc.cc": "add.cc.u32 %r50, $A, $B;\naddc.cc.u32 %r51, $A, $C;\naddc.u32 $D, %r51, %r50;",
        "sub.cc_subc": "sub.cc.u32 %r50, $A, $B;\nsubc.u32 $D, $C, 0;",
        "mad.lo.cc_madc.hi": "mad.lo.cc.u32 %r50, $A, $B, $C;\nmadc.hi.u32 $D, $A, $B, 0;",
    }
    for name, text in chains.items():
        yield operation("int", name, text, "rrr", "r", data)


def bit_field_cases() -> Iterator[Case]:
    for i, opcode in enumerate(words("bfe.u32 bfe.s32 bfe.u64 bfe.s64")):
        bits = bits_of(opcode)
        kind = register_kind(bits)
        data = [integers(bits, 270 + i, 0), amounts(280 + i), amounts(290 + i)]
        yield operation("bits", opcode, f"{opcode} $D, $A, $B, $C;", kind + "rr", kind, data)
    for i, opcode in enumerate(words("bfi.b32 bfi.b64")):
        bits = bits_of(opcode)
        kind = register_kind(bits)
        data = [integers(bits, 300 + i, 0), integers(bits, 300 + i, 1), amounts(310 + i), amounts(320 + i)]
        yield operation("bits", opcode, f"{opcode} $D, $A, $B, $C, $E;", kind * 2 + "rr", kind, data)
    for opcode in ("bmsk.clamp.b32", "bmsk.wrap.b32", "szext.clamp.s32", "szext.wrap.u32"):
        data = [amounts(325), amounts(326)] if "bmsk" in opcode else [integers(32, 327, 0), amounts(326)]
        yield operation("bits", opcode, f"{opcode} $D, $A, $B;", "rr", "r", data)
    for opcode in ("shf.l.clamp.b32", "shf.l.wrap.b32", "shf.r.clamp.b32", "shf.r.wrap.b32"):
        data = [integers(32, 330, 0), integers(32, 330, 1), amounts(331)]
        yield operation("bits", opcode, f"{opcode} $D, $A, $B, $C;", "rrr", "r", data)
    data = [integers(32, 340, position) for position in range(3)]
    for table in (0x00, 0x80, 0x96, 0xB8, 0xCA, 0xE8, 0xF8, 0xFE, 0x1E, 0x4B):
        yield operation("bits", f"lop3.b32_{table:02x}", f"lop3.b32 $D, $A, $B, $C, 0x{table:02x};", "rrr", "r", data)
    text = "lop3.or.b32 $D|$P, $A, $B, $C, 0x80, !$Q;"
    yield operation("bits", "lop3.or.b32", "setp.ne.u32 $Q, $A, $A;\n" + text.replace("!$Q", "$Q"), "rrr", "p", data)
    data = [integers(32, 341, 0), integers(32, 341, 1), integers(32, 341, 2)]
    for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"):
        yield operation("bits", f"prmt.b32{mode}", f"prmt.b32{mode} $D, $A, $B, $C;", "rrr", "r", data)
    for selector in (0x5410, 0x7632, 0x0123, 0x3340, 0x4440, 0xBA98, 0x8888, 0xFEDC):
        text = f"prmt.b32 $D, $A, $B, 0x{selector:04x};"
        yield operation("bits", f"prmt.b32_{selector:04x}", text, "rr", "r", data[:2])
    for types in ("u32.u32", "s32.s32", "u32.s32", "s32.u32"):
        yield operation("bits", f"dp4a.{types}", f"dp4a.{types} $D, $A, $B, $C;", "rrr", "r", data)
        yield operation("bits", f"dp2a.lo.{types}", f"dp2a.lo.{types} $D, $A, $B, $C;", "rrr", "r", data)
    text = "and.b32 %r50, $B, 31;\nbfe.s32 %r51, $C, 3, 4;\nfns.b32 $D, $A, %r50, %r51;"
    yield operation("bits", "fns.b32", text, "rrr", "r", data)
    moves = {
        "mov_pack_16": ("mov.b32 {%h50, %h51}, $A;\nmov.b32 $D, {%h51, %h50};", "r", "r", 32),
        "mov_pack_32": ("mov.b64 {%r50, %r51}, $A;\nmov.b64 $D, {%r51, %r50};", "d", "d", 64),
        "mov_pack_4x16": ("mov.b64 {%h50, %h51, %h52, %h53}, $A;\nmov.b64 $D, {%h52, %h53, %h50, %h51};", "d", "d", 64),
        "mov_sink": ("mov.b64 {%r50, _}, $A;\nmov.b64 {_, %r51}, $A;\nsub.u32 $D, %r51, %r50;", "d", "r", 64),
        "mov_pack_8": (
            ".reg .b8 %b<4>;\nmov.b32 {%b0, %b1, %b2, %b3}, $A;\nmov.b32 $D, {%b3, %b1, %b2, %b0};",
            "r",
            "r",
            32,
        ),
    }
    for name, (text, kinds, out, bits) in moves.items():
        yield operation("bits", name, text, kinds, out, [integers(bits, 350, 0)])


COMPARISONS = words("eq ne lt le gt ge")


def comparison_cases() -> Iterator[Case]:
    i = 0
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64", "b16", "b32", "b64"):
        for comparison in COMPARISONS if kind[0] != "b" else ("eq", "ne"):
            bits = int(kind[1:])
            data = [integers(bits, 360, 0), integers(bits, 360, 1)]
            opcode = f"setp.{comparison}.{kind}"
            yield operation("compare", opcode, f"{opcode} $P, $A, $B;", register_kind(bits) * 2, "p", data)
            i += 1
    for comparison in ("lo", "ls", "hi", "hs"):
        data = [integers(32, 361, 0), integers(32, 361, 1)]
        yield operation("compare", f"setp.{comparison}.u32", f"setp.{comparison}.u32 $P, $A, $B;", "rr", "p", data)
    data = [integers(32, 362, position) for position in range(3)]
    for combine in ("and", "or", "xor"):
        text = f"setp.ne.s32 %p3, $C, 0;\nsetp.lt.{combine}.s32 $P|$Q, $A, $B, %p3;\n"
        text += "selp.b32 %r50, 1, 0, $P;\nselp.b32 %r51, 2, 0, $Q;\nor.b32 $D, %r50, %r51;"
        yield operation("compare", f"setp.lt.{combine}.s32", text, "rrr", "r", data)
        text = f"setp.ne.s32 %p3, $C, 0;\nsetp.gt.{combine}.u32 $P, $A, $B, !%p3;"
        yield operation("compare", f"setp.gt.{combine}.u32_not", text, "rrr", "p", data)
    for kind in ("b16", "b32", "b64", "s32", "u64", "f32"):
        bits = int(kind[1:])
        letter = register_kind(bits)
        text = f"setp.lt.u32 %p3, $C, 0x80000000;\nselp.{kind} $D, $A, $B, %p3;"
        values = [integers(bits, 363, 0), integers(bits, 363, 1), integers(32, 364, 2)]
        yield operation("compare", f"selp.{kind}", text, letter * 2 + "r", letter, values)
    yield operation("compare", "slct.s32.s32", "slct.s32.s32 $D, $A, $B, $C;", "rrr", "r", data)
    yield operation("compare", "set.lt.u32.s32", "set.lt.u32.s32 $D, $A, $B;", "rr", "r", data[:2])
    predicates = {
        "and.pred": "and.pred $P, %p3, %p4;",
        "or.pred": "or.pred $P, %p3, %p4;",
        "xor.pred": "xor.pred $P, %p3, %p4;",
        "not.pred": "not.pred $P, %p3;",
        "mov.pred": "mov.pred $P, %p4;",
        "predicated": "mov.pred $P, 0;\n@%p3 mov.pred $P, %p4;\n@!%p3 setp.lt.u32 $P, $A, 1000;",
    }
    for name, text in predicates.items():
        text = "setp.lt.s32 %p3, $A, 0;\nsetp.lt.u32 %p4, $B, 0x8000;\n" + text
        yield operation("compare", name, text, "rr", "p", data[:2])


INT_TYPES = words("u8 s8 u16 s16 u32 s32 u64 s64")


def conversion_cases() -> Iterator[Case]:
    """cvt between all integer types, plain and saturating. 8-bit values live in 16-bit registers."""
    for source in INT_TYPES:
        for target in INT_TYPES:
            if source == target:
                continue
            source_bits, target_bits = int(source[1:]), int(target[1:])
            data = [integers(max(source_bits, 16), 370, 0)]
            kind, out = register_kind(max(source_bits, 16)), register_kind(max(target_bits, 16))
            signed = source[0] == "s"
            fits = target_bits > source_bits and not (signed and target[0] == "u")  # then .sat is not allowed
            for saturate in ("",) if fits else ("", ".sat"):
                opcode = f"cvt{saturate}.{target}.{source}"
                yield operation("cvt_int", opcode, f"{opcode} $D, $A;", kind, out, data)
    for source in ("u8", "s8"):
        opcode = f"cvt.{source[0]}32.{source}"
        yield operation("cvt_int", f"{opcode}_of_r32", f"{opcode} $D, $A;", "r", "r", [integers(32, 371, 0)])
    data = [integers(32, 372, position) for position in range(3)]
    for target in ("s16", "u16"):
        opcode = f"cvt.pack.sat.{target}.s32"
        yield operation("cvt_int", opcode, f"{opcode} $D, $A, $B;", "rr", "r", data[:2])
    for target in ("s8", "u8", "s4", "u4", "s2", "u2"):
        opcode = f"cvt.pack.sat.{target}.s32.b32"
        yield operation("cvt_int", opcode, f"{opcode} $D, $A, $B, $C;", "rrr", "r", data)


def cases() -> Iterator[Case]:
    yield from arithmetic_cases()
    yield from bit_field_cases()
    yield from comparison_cases()
    yield from conversion_cases()
