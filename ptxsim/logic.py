"""Logic, shifts, bit fields and byte permutations.

Source: PTX ISA, "Logic and Shift Instructions", and from "Integer Arithmetic Instructions" those that treat numbers as bits.
"""

from collections.abc import Callable

import numpy as np

from ptxsim.findings import Unsupported
from ptxsim.lanes import as_int, by_lanes, flags_of, int_type, narrow, ones, per_lane, same_form, signed_int
from ptxsim.ptx import Instruction, Pair
from ptxsim.registry import Pure, Reader, Source, decoder
from ptxsim.templates import flat, function_of, guarded, helper, literal, pure, register, sources
from ptxsim.values import FULL, M32, Value, lanes64, signed64


@decoder("and", "or", "xor")
def decode_logic(ins: Instruction) -> Pure:
    """`and`, `or`, `xor` on bits and predicates."""
    r = Reader(ins)
    name = r.one_of("pred", "b16", "b32", "b64")
    r.end(3)
    width = 1 if name == "pred" else int(name[1:])
    symbol = {"and": "&", "or": "|", "xor": "^"}[ins.parts[0]]
    return pure(f"{{0}} {symbol} {{1}}", (register(ins),), sources(ins, 1, width, width))


@decoder("not", "cnot")
def decode_not(ins: Instruction) -> Pure:
    """`not` (bits and predicates) and `cnot` (1 if zero, else 0)."""
    r = Reader(ins)
    cnot = ins.parts[0] == "cnot"
    name = r.one_of(*(() if cnot else ("pred",)), "b16", "b32", "b64")
    r.end(2)
    width = 1 if name == "pred" else int(name[1:])
    srcs = sources(ins, 1, width)
    if cnot:
        slow = f"({{0}} == 0).astype(np.uint{max(width, 32)})"
        return pure(guarded("1 if {0} == 0 else 0", slow, srcs), (register(ins),), srcs)
    return pure(f"{{0}} ^ {FULL if width == 1 else ones(width)}", (register(ins),), srcs)


@helper
def shift_lanes(value: Value, amount: Value, width: int, left: bool, signed: bool) -> Value:
    """Shifts of lanes by any 32-bit amount: large ones shift everything out."""
    if signed and not left:
        count = np.minimum(amount, 63).astype(np.int64) if amount.__class__ is not int else np.int64(min(amount, 63))
        return narrow(signed64(value, width) >> count, width)
    lanes = lanes64(value)
    count = lanes64(amount) if amount.__class__ is not int else np.uint64(amount)
    # NumPy shifts by 64 and more give 0.
    return narrow(lanes << count if left else lanes >> count, width)


@decoder("shl", "shr")
def decode_shift(ins: Instruction) -> Pure:
    """`shl` and `shr`; amounts above the width count as the width."""
    left = ins.parts[0] == "shl"
    r = Reader(ins)
    signed, width = int_type(r, "b" if left else "bus")
    r.end(3)
    srcs = sources(ins, 1, width, 32)
    dst, amount = (register(ins),), literal(ins.operands[2], 32)
    slow = f"shift_lanes({{0}}, {{1}}, {width}, {left}, {signed})"
    if amount is not None:
        srcs = srcs[:1]
        if signed:
            amount = min(amount, width - 1)
            slow = f"({{0}}.view(np.int{width}) >> {amount}).view(np.uint{width})" if width >= 32 else slow
            slow = slow.replace("{1}", str(amount))
            return pure(guarded(f"{as_int('{0}', width)} >> {amount} & {ones(width)}", slow, srcs), dst, srcs)
        if amount >= width:
            return pure("0", dst, ())
        return pure(f"({{0}} << {amount}) & {ones(width)}" if left else f"{{0}} >> {amount}", dst, srcs)
    if left:
        fast = f"({{0}} << {{1}}) & {ones(width)} if {{1}} < {width} else 0"
    elif signed:
        fast = f"{as_int('{0}', width)} >> {{1}} & {ones(width)}"
    else:
        fast = "{0} >> {1}"
    return pure(guarded(fast, slow, srcs), dst, srcs)


@decoder("shf")
def decode_shf(ins: Instruction) -> Pure:
    """`shf`: the high (left) or low (right) half of a 64-bit shift."""
    r = Reader(ins)
    left = r.one_of("l", "r") == "l"
    wrap = r.one_of("clamp", "wrap") == "wrap"
    r.one_of("b32")
    r.end(4)
    count = "({2} & 31)" if wrap else "min({2}, 32)"
    wide = "({1} << 32 | {0})"
    fast = f"({wide} << {count}) >> 32 & {M32}" if left else f"{wide} >> {count} & {M32}"
    srcs = sources(ins, 1, 32, 32, 32)
    return pure(guarded(fast, f"funnel({{0}}, {{1}}, {{2}}, {left}, {wrap})", srcs), (register(ins),), srcs)


@helper
def funnel(low: Value, high: Value, amount: Value, left: bool, wrap: bool) -> Value:
    """Funnel shift of lanes."""
    count = lanes64(amount) & np.uint64(31) if wrap else np.minimum(lanes64(amount), np.uint64(32))
    both = lanes64(high) << np.uint64(32) | lanes64(low)
    return narrow((both << count) >> np.uint64(32) if left else both >> count, 32)


def lut_expression(lut: int) -> str:
    """The Boolean function of three bits with the given truth table, as exclusive-or of products (Reed-Muller form).

    Source: PTX ISA, lop3: bit (a << 2 | b << 1 | c) of the table is the result.
    """
    form = [lut >> i & 1 for i in range(8)]
    for step in (1, 2, 4):
        for i in range(8):
            if i & step:
                form[i] ^= form[i ^ step]
    names = {4: "{0}", 2: "{1}", 1: "{2}"}
    terms = []
    for i in range(8):
        if form[i]:
            product = " & ".join(name for bit, name in names.items() if i & bit)
            terms.append(f"({product})" if product else str(M32))
    return " ^ ".join(terms) or "0"


@decoder("lop3")
def decode_lop3(ins: Instruction) -> Pure:
    """`lop3`, with or without a predicate result."""
    r = Reader(ins)
    combine = r.one_of("or", "and", default="") if r.peek() != "b32" else ""
    r.one_of("b32")
    r.end(6 if combine else 5)
    lut = literal(ins.operands[4], 8)
    if lut is None:
        raise Unsupported(f"{r.where}: the truth table must be a literal")
    expression = lut_expression(lut)
    used = sources(ins, 1, 32, 32, 32)
    if not combine:
        return pure(expression, (register(ins),), used)
    q = Source(ins.operands[5], 1)
    value = function_of(expression, 3)

    def fn(a: Value, b: Value, c: Value, q: int) -> tuple[Value, int]:
        result = value(a, b, c)
        flags = flags_of(result != 0)
        return result, flags | q if combine == "or" else flags & q

    if not isinstance(ins.operands[0], Pair):
        raise Unsupported(f"{r.where}: expected d|p")
    return Pure(fn, flat(ins.operands[0]), (*used, q))


_PRMT_MODES: dict[str, Callable[[int], int]] = {
    "f4e": lambda s: s << 0 | s + 1 << 4 | s + 2 << 8 | s + 3 << 12,
    "b4e": lambda s: s << 0 | (s - 1 & 7) << 4 | (s - 2 & 7) << 8 | (s - 3 & 7) << 12,
    "rc8": lambda s: s * 0x1111,
    "ecl": lambda s: sum(max(s, i) << 4 * i for i in range(4)),
    "ecr": lambda s: sum(min(s, i) << 4 * i for i in range(4)),
    "rc16": lambda s: 0x3232 if s & 1 else 0x1010,
}


def _prmt_expression(selector: int) -> str | None:
    """Shifts and masks for a constant selector without sign replication; None with it."""
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    if any(nibble & 8 for nibble in nibbles):
        return None
    terms, i = [], 0
    while i < 4:
        source, first, length = nibbles[i] >> 2, nibbles[i] & 3, 1
        while i + length < 4 and nibbles[i + length] == nibbles[i] + length and first + length < 4:
            length += 1
        shift, mask = 8 * (first - i), ones(8 * length) << 8 * i
        moved = (
            f"{{{source}}}"
            if shift == 0
            else f"({{{source}}} >> {shift})"
            if shift > 0
            else f"({{{source}}} << {-shift})"
        )
        terms.append(f"({moved} & {mask})")
        i += length
    return " | ".join(terms)


def _permute(a: Value, b: Value, selector: Value) -> Value:
    one = a.__class__ is int and b.__class__ is int and selector.__class__ is int
    both = lanes64(b) << np.uint64(32) | lanes64(a)
    chosen, out = lanes64(selector), np.zeros(32, np.uint64)
    for i in range(4):
        nibble = chosen >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return int(out[0]) if one else out.astype(np.uint32)


@decoder("prmt")
def decode_prmt(ins: Instruction) -> Pure:
    """`prmt`: picks four bytes out of eight."""
    r = Reader(ins)
    r.one_of("b32")
    mode = r.one_of(*_PRMT_MODES, default="")
    r.end(4)
    dst, srcs = (register(ins),), sources(ins, 1, 32, 32, 32)
    selector = literal(ins.operands[3], 32)
    if mode:
        table = np.array([_PRMT_MODES[mode](s) & 0xFFFF & 0x7777 for s in range(4)] if mode != "" else [], np.uint32)

        def by_mode(a: Value, b: Value, c: Value) -> Value:
            picked = table[c & 3]
            return _permute(a, b, int(picked) if c.__class__ is int else picked)

        return Pure(by_mode, dst, srcs)
    if selector is not None:
        expression = _prmt_expression(selector)
        if expression is not None:
            return pure(expression, dst, srcs[:2])
    return Pure(_permute, dst, srcs)


@helper
def bit_field(value: Value, start: Value, length: Value, width: int, signed: bool) -> Value:
    """`bfe` on lanes."""
    if width == 64:
        # Beyond the documented range of 0..255 an H200 takes positions and lengths as large ones.
        first, count = np.minimum(lanes64(start), np.uint64(255)), np.minimum(lanes64(length), np.uint64(255))
    else:
        first, count = lanes64(start) & np.uint64(255), lanes64(length) & np.uint64(255)
    lanes = lanes64(value)
    field = lanes >> first & ((np.uint64(1) << count) - np.uint64(1))
    if signed:
        last = np.minimum(first + count - np.uint64(1), np.uint64(width - 1))
        sign = lanes >> last & np.uint64(1)
        # Bits past the value's end, and past the field's, take the sign.
        taken = np.minimum(count, np.where(first < width, np.uint64(width) - first, np.uint64(0)))
        high = ~((np.uint64(1) << taken) - np.uint64(1))
        field = np.where(sign.astype(bool), field & ~high | high, field & ~high)
        field = np.where(count == 0, np.uint64(0), field)
    return narrow(field, width)


@decoder("bfe")
def decode_bfe(ins: Instruction) -> Pure:
    """`bfe`: extracts a bit field."""
    r = Reader(ins)
    signed, width = int_type(r, "us", (32, 64))
    r.end(4)
    srcs = sources(ins, 1, width, 32, 32)
    slow = f"bit_field({{0}}, {{1}}, {{2}}, {width}, {signed})"
    if signed:
        return Pure(lambda a, b, c: same_form(bit_field(a, b, c, width, True), a, b, c), (register(ins),), srcs)
    first, count = ("min({1}, 255)", "min({2}, 255)") if width == 64 else ("({1} & 255)", "({2} & 255)")
    fast = f"{{0}} >> {first} & (1 << {count}) - 1"
    return pure(guarded(fast, slow, srcs), (register(ins),), srcs)


def _insert(a: Value, b: Value, c: Value, d: Value, width: int) -> Value:
    first, count = lanes64(c) & np.uint64(255), lanes64(d) & np.uint64(255)
    mask = ((np.uint64(1) << count) - np.uint64(1)) << first
    result = narrow(lanes64(b) & ~mask | lanes64(a) << first & mask, width)
    return same_form(result, a, b, c, d)


@decoder("bfi")
def decode_bfi(ins: Instruction) -> Pure:
    """`bfi`: inserts the low bits of a into b."""
    r = Reader(ins)
    _, width = int_type(r, "b", (32, 64))
    r.end(5)
    return Pure(lambda a, b, c, d: _insert(a, b, c, d, width), (register(ins),), sources(ins, 1, width, width, 32, 32))


def bit_length(lanes: np.ndarray) -> np.ndarray:
    """Position of the highest set bit plus one, of uint64 lanes; 0 for 0."""
    high, low = lanes >> np.uint64(32), lanes & np.uint64(M32)
    upper = np.frexp(high.astype(np.float64))[1].astype(np.int64)
    lower = np.frexp(low.astype(np.float64))[1].astype(np.int64)
    return np.where(high > 0, upper + 32, lower)


@decoder("bfind")
def decode_bfind(ins: Instruction) -> Pure:
    """`bfind`: position of the highest bit that is not a sign; all ones if there is none."""
    r = Reader(ins)
    shift = r.take("shiftamt")
    signed, width = int_type(r, "us", (32, 64))
    r.end(2)

    def compute(a: np.ndarray) -> np.ndarray:
        magnitude = np.where(a < 0, ~a, a).astype(np.uint64) if signed else a
        position = bit_length(magnitude) - 1
        return np.where(position < 0, -1, width - 1 - position) if shift else position

    return Pure(by_lanes(compute, width, signed, 32), (register(ins),), sources(ins, 1, width))


def _reverse(value: int, width: int) -> int:
    return int(f"{value:0{width}b}"[::-1], 2)


@decoder("brev", "clz", "popc")
def decode_bits(ins: Instruction) -> Pure:
    """`brev`, `clz`, `popc`."""
    r = Reader(ins)
    _, width = int_type(r, "b", (32, 64))
    r.end(2)
    dst, srcs = (register(ins),), sources(ins, 1, width)
    if ins.parts[0] == "brev":
        return Pure(per_lane(lambda a: _reverse(a, width), width), dst, srcs)
    if ins.parts[0] == "popc":
        return pure(guarded("({0}).bit_count()", "np.bitwise_count({0}).astype(np.uint32)", srcs), dst, srcs)
    slow = by_lanes(lambda a: width - bit_length(a), width, False, 32)
    return Pure(lambda a: width - a.bit_length() if a.__class__ is int else slow(a), dst, srcs)


def _find_nth(mask: int, base: int, offset: int) -> int:
    """PTX ISA, `fns`: the n-th set bit from `base`, upwards (offset > 0) or downwards (offset < 0)."""
    offset = signed_int(offset, 32)
    if offset == 0:
        return base if base < 32 and mask >> base & 1 else M32
    step, left, position = (1, offset, base) if offset > 0 else (-1, -offset, base)
    while 0 <= position < 32:
        left -= mask >> position & 1
        if left == 0:
            return position
        position += step
    return M32


@decoder("fns")
def decode_fns(ins: Instruction) -> Pure:
    """`fns`: finds the n-th set bit."""
    r = Reader(ins)
    r.one_of("b32")
    r.end(4)
    return Pure(per_lane(_find_nth, 32), (register(ins),), sources(ins, 1, 32, 32, 32))


@decoder("szext")
def decode_szext(ins: Instruction) -> Pure:
    """`szext`: sign- or zero-extends from a given bit position."""
    r = Reader(ins)
    wrap = r.one_of("wrap", "clamp") == "wrap"
    signed, _ = int_type(r, "us", (32,))
    r.end(3)

    def one(a: int, b: int) -> int:
        count = b & 31 if wrap else min(b, 32)
        if count == 0:
            return 0
        low = a & ones(count)
        return signed_int(low, count) & M32 if signed else low

    return Pure(per_lane(one, 32), (register(ins),), sources(ins, 1, 32, 32))


@decoder("bmsk")
def decode_bmsk(ins: Instruction) -> Pure:
    """`bmsk`: a mask of b bits from bit a."""
    r = Reader(ins)
    wrap = r.one_of("wrap", "clamp") == "wrap"
    r.one_of("b32")
    r.end(3)

    def one(a: int, b: int) -> int:
        start, count = (a & 31, b & 31) if wrap else (a, min(b, 32))
        return ones(count) << start & M32 if start < 32 else 0

    return Pure(per_lane(one, 32), (register(ins),), sources(ins, 1, 32, 32))


@decoder("dp4a", "dp2a")
def decode_dot(ins: Instruction) -> Pure:
    """`dp4a`, `dp2a`: sums of products of bytes, of halves with bytes."""
    r = Reader(ins)
    four = ins.parts[0] == "dp4a"
    half = 0 if four else 2 * (r.one_of("lo", "hi") == "hi")
    a_signed, b_signed = r.one_of("u32", "s32") == "s32", r.one_of("u32", "s32") == "s32"
    r.end(4)
    count, a_bits = (4, 8) if four else (2, 16)

    def element(value: int, bits: int, i: int, signed: bool) -> int:
        part = value >> bits * i & ones(bits)
        return signed_int(part, bits) if signed else part

    def one(a: int, b: int, c: int) -> int:
        total = c
        for i in range(count):
            total += element(a, a_bits, i, a_signed) * element(b, 8, i + half, b_signed)
        return total & M32

    return Pure(per_lane(one, 32), (register(ins),), sources(ins, 1, 32, 32, 32))
