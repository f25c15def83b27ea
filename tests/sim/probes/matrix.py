"""Probes of ldmatrix, stmatrix and wgmma.

The operands are shared memory full of small random integers: whatever the layout rules make of them, the sums are exact, so
the accumulators show which bytes the hardware multiplied with which.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .kit import Case, bf16_bits, copy_in, dump_shared, fill_shared, kernel, random_bytes, random_u32, sentinel


def ldmatrix_cases() -> Iterator[Case]:
    """Lane l gives the address of row (l * 5) % 32, so rows are not in order."""
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            names = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
            stores = "\n".join(f"st.global.b32 [%d1+{128 * i}], %r{10 + i};" for i in range(count))
            body = f"""
            {copy_in("%ptr1", 1024, 32)}
            mul.lo.u32 %r0, %tix, 5;
            and.b32 %r0, %r0, 31;
            mad.lo.u32 %r0, %r0, 16, %smem;
            ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names}, [%r0+256];
            shl.b32 %r1, %tix, 2;
            cvt.u64.u32 %d1, %r1;
            add.u64 %d1, %d1, %ptr0;
            {stores}
            """
            yield Case(
                name=f"ldmatrix/x{count}{trans.replace('.', '_')}",
                ptx=kernel(body, pointers=2),
                buffers={"out": sentinel(128 * count), "source": np.arange(512, dtype=np.uint16)},
                outputs=("out",),
                shared_bytes=1024,
            )
            loads = "\n".join(f"ld.global.b32 %r{10 + i}, [%d1+{128 * i}];" for i in range(count))
            body = f"""
            {fill_shared(1024, 32)}
            shl.b32 %r1, %tix, 2;
            cvt.u64.u32 %d1, %r1;
            add.u64 %d1, %d1, %ptr1;
            {loads}
            mul.lo.u32 %r0, %tix, 5;
            and.b32 %r0, %r0, 31;
            mad.lo.u32 %r0, %r0, 16, %smem;
            stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r0+256], {names};
            {dump_shared("%ptr0", 1024, 32)}
            """
            yield Case(
                name=f"stmatrix/x{count}{trans.replace('.', '_')}",
                ptx=kernel(body, pointers=2),
                buffers={"out": sentinel(1024), "source": np.arange(64 * count, dtype=np.uint16)},
                outputs=("out",),
                shared_bytes=1024,
            )


LAYOUT = {"none": 0, "128": 1, "64": 2, "32": 3}
K_OF = {"bf16": 16, "f16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}
SHARED = 48 * 1024
B_START = 12 * 1024


@dataclass(frozen=True)
class Operand:
    """A shared memory operand: start (bytes from the base), leading and stride byte offsets, swizzle, MN-major?"""

    start: int
    leading: int
    stride: int
    swizzle: str
    transposed: bool = False
    base_offset: int = 0

    def high_bits(self) -> int:
        """Return the descriptor without its address."""
        word = (self.leading >> 4) << 16 | (self.stride >> 4) << 32
        return word | self.base_offset << 49 | LAYOUT[self.swizzle] << 62


def small_integers(dtype: str, seed: int, num_bytes: int) -> np.ndarray[Any, Any]:
    """Return operand bytes: integers from -3 to 3 (0 to 7 if unsigned), all exact in each type."""
    size = {"bf16": 2, "f16": 2, "tf32": 4}.get(dtype, 1)
    picks = random_u32(seed, num_bytes // size) % np.uint32(7)
    values = picks.astype(np.int32) - 3
    if dtype == "bf16":
        return bf16_bits(values).view(np.uint8).copy()
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint8).copy()
    if dtype == "tf32":
        return values.astype(np.float32).view(np.uint8).copy()
    if dtype == "s8":
        return values.astype(np.int8).view(np.uint8).copy()
    if dtype == "u8":
        return picks.astype(np.uint8)
    table = {"e4m3": [0xC4, 0xC0, 0xB8, 0, 0x38, 0x40, 0x44], "e5m2": [0xC2, 0xC0, 0xBC, 0, 0x3C, 0x40, 0x42]}[dtype]
    return np.array(table, dtype=np.uint8)[picks]


def wgmma(
    name: str,
    dtype: str,
    n: int,
    a: Operand | None,
    b: Operand,
    *,
    b_dtype: str = "",
    accumulator: str = "f32",
    scale_d: int = 1,
    scale_a: int = 1,
    scale_b: int = 1,
    steps: tuple[int, ...] = (0,),
    raw: np.ndarray[Any, Any] | None = None,
    compared: bool = True,
    note: str = "",
) -> Case:
    """Run one wgmma per step; a step is the number of bytes by which both start addresses advance.

    `a` None takes A from registers. The accumulator starts as small integers. With `raw` the operands are these bytes.
    """
    registers = n // 2 if accumulator != "f16" else n // 4
    acc = "{" + ", ".join(f"%acc{i}" for i in range(registers)) + "}"
    a_registers = "{%r60, %r61, %r62, %r63}"
    b_dtype = b_dtype or dtype
    k = K_OF[dtype]
    parts = []
    for i, step in enumerate(steps):
        # d10/d11: descriptors
        parts.append(f"add.u32 %r1, %smem, {b.start + step};\n{descriptor('%d11', '%r1', b)}")
        if a:
            parts.append(f"add.u32 %r2, %smem, {a.start + step};\n{descriptor('%d10', '%r2', a)}")
        source = "%d10" if a else a_registers
        integer = accumulator == "s32"
        scales = "" if integer else f", {scale_a}, {scale_b}"
        majors = ""
        if dtype in ("bf16", "f16"):
            majors = (f", {int(a.transposed)}" if a else "") + f", {int(b.transposed)}"
        opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{accumulator}.{dtype}.{b_dtype}"
        enable = f"setp.ne.b32 %p1, {scale_d if i == 0 else 1}, 0;"
        parts.append(f"{enable}\n{opcode} {acc}, {source}, %d11, %p1{scales}{majors};")
    size = registers * 4
    one = "0x3f800000" if accumulator == "f32" else "1" if accumulator == "s32" else "0x3c003c00"
    init = "\n".join(f"mov.b32 %acc{i}, {one};" if i % 3 else f"mov.b32 %acc{i}, 0;" for i in range(registers))
    fill = "\n".join(f"st.global.b32 [%d1+{4 * i}], %acc{i};" for i in range(registers))
    load_a = ""
    if a is None:
        load_a = """
        mul.wide.u32 %d1, %tix, 16;
        add.u64 %d1, %d1, %ptr1;
        ld.global.v4.b32 {%r60, %r61, %r62, %r63}, [%d1];
        """
    body = f"""
    {copy_in("%ptr1", SHARED, 128)}
    {load_a}
    {init}
    wgmma.fence.sync.aligned;
    {chr(10).join(parts)}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %d1, %tix, {size};
    add.u64 %d1, %d1, %ptr0;
    {fill}
    """
    if raw is None:
        half = small_integers(dtype, 401, B_START), small_integers(b_dtype, 402, SHARED - B_START)
        raw = np.concatenate(half)
    return Case(
        name=f"wgmma/{name}",
        ptx=kernel(body, pointers=2, threads=128, registers=f"\t.reg .b32 %acc<{registers}>;"),
        buffers={"out": sentinel(128 * size), "source": raw},
        outputs=("out",),
        block=128,
        shared_bytes=SHARED,
        is_async=True,
        compared=compared,
        note=note,
    )


def descriptor(register: str, address: str, operand: Operand) -> str:
    return f"""
    shr.u32 {address}, {address}, 4;
    and.b32 {address}, {address}, 0x3fff;
    cvt.u64.u32 {register}, {address};
    or.b64 {register}, {register}, 0x{operand.high_bits():x};
    """


def k_major(start: int, swizzle: str) -> Operand:
    """Rows of one swizzle span, 8-row groups densely packed; without swizzle 8x16-byte core matrices."""
    if swizzle == "none":
        return Operand(start, leading=128, stride=256, swizzle=swizzle)
    return Operand(start, leading=16, stride=8 * int(swizzle), swizzle=swizzle)


def wgmma_cases() -> Iterator[Case]:
    dtypes = ("bf16", "f16", "tf32", "e4m3", "e5m2")
    for dtype in dtypes:
        for swizzle in LAYOUT:
            a, b = k_major(0, swizzle), k_major(B_START, swizzle)
            yield wgmma(f"{dtype}_n16_swizzle{swizzle}", dtype, 16, a, b)
    for swizzle in ("32", "64", "128"):
        a, b = k_major(0, swizzle), k_major(B_START, swizzle)
        steps = tuple(range(0, int(swizzle), 32))
        yield wgmma(f"bf16_n16_swizzle{swizzle}_k_steps", "bf16", 16, a, b, steps=steps)
    for n in (8, 24, 64, 256):
        yield wgmma(f"bf16_n{n}_swizzle128", "bf16", n, k_major(0, "128"), k_major(B_START, "128"))
    yield wgmma("e4m3_n64_swizzle64", "e4m3", 64, k_major(0, "64"), k_major(B_START, "64"))
    yield wgmma("tf32_n8_swizzle32", "tf32", 8, k_major(0, "32"), k_major(B_START, "32"))
    # A tile that starts at a multiple of 128 bytes that is no multiple of the swizzle pattern.
    for swizzle in ("128", "64", "32"):
        a, b = k_major(384, swizzle), k_major(B_START + 640, swizzle)
        yield wgmma(f"bf16_n16_swizzle{swizzle}_start384", "bf16", 16, a, b)
    for base_offset in (1, 3):
        a = Operand(384, 16, 1024, "128", base_offset=base_offset)
        yield wgmma(
            f"bf16_n16_swizzle128_start384_base{base_offset}",
            "bf16",
            16,
            a,
            k_major(B_START, "128"),
            compared=False,
            note="non-zero base offset: refused by the simulator, never emitted by CuTe DSL",
        )
    # Core matrices further apart; without swizzle the leading offset counts.
    yield wgmma(
        "bf16_n16_swizzlenone_wide",
        "bf16",
        16,
        Operand(0, leading=1040, stride=144, swizzle="none"),
        Operand(B_START, leading=528, stride=2064, swizzle="none"),
    )
    yield wgmma(
        "bf16_n16_swizzle128_wide_stride",
        "bf16",
        16,
        Operand(0, leading=0, stride=1152, swizzle="128"),
        Operand(B_START, leading=1024, stride=2048, swizzle="128"),
    )
    yield from mn_major_cases()
    yield from modifier_cases()


def mn_major_cases() -> Iterator[Case]:
    for dtype in ("bf16", "f16"):
        for swizzle in LAYOUT:
            a = Operand(0, leading=2048, stride=1024, swizzle=swizzle, transposed=True)
            b = Operand(B_START, leading=4096, stride=1024, swizzle=swizzle, transposed=True)
            for name, left, right in (
                ("mn_mn", a, b),
                ("k_mn", k_major(0, swizzle), b),
                ("mn_k", a, k_major(B_START, swizzle)),
            ):
                if dtype == "bf16" or name == "mn_mn":
                    yield wgmma(f"{dtype}_n64_{name}_swizzle{swizzle}", dtype, 64, left, right)
    a = Operand(0, leading=2048, stride=1024, swizzle="128", transposed=True)
    b = Operand(B_START, leading=2048, stride=1024, swizzle="128", transposed=True)
    yield wgmma("bf16_n128_mn_mn_swizzle128_k_steps", "bf16", 128, a, b, steps=(0, 2048))
    yield wgmma("bf16_n8_mn_swizzle32", "bf16", 8, a, Operand(B_START, 512, 256, "32", transposed=True))


def modifier_cases() -> Iterator[Case]:
    a, b = k_major(0, "128"), k_major(B_START, "128")
    yield wgmma("scale_d_0", "bf16", 16, a, b, scale_d=0)
    yield wgmma("negate_a", "bf16", 16, a, b, scale_a=-1)
    yield wgmma("negate_b", "f16", 16, a, b, scale_b=-1)
    yield wgmma("negate_both_e4m3", "e4m3", 16, a, b, scale_a=-1, scale_b=-1)
    yield wgmma("f16_accumulator", "f16", 16, a, b, accumulator="f16")
    yield wgmma("f16_accumulator_e4m3", "e4m3", 16, a, b, accumulator="f16")
    yield wgmma("mixed_e4m3_e5m2", "e4m3", 16, a, b, b_dtype="e5m2")
    yield wgmma("s8", "s8", 16, a, b, accumulator="s32")
    yield wgmma("u8_s8", "u8", 16, a, b, b_dtype="s8", accumulator="s32")
    for dtype in ("bf16", "f16", "tf32", "e4m3"):
        yield wgmma(f"register_a_{dtype}", dtype, 16, None, b)
    yield wgmma("register_a_mn_b", "bf16", 64, None, Operand(B_START, 4096, 1024, "128", transposed=True))
    # Not exact: how sums are aligned, rounded and truncated. Recorded to learn from; the simulator sums in its own order.
    note = "inexact sums: the order and width of the hardware's accumulation are not specified"
    normal = bf16_bits_of_random(411)
    yield wgmma("inexact_bf16", "bf16", 16, a, b, raw=normal, compared=False, note=note)
    bytes_e4m3 = random_bytes(412, SHARED)
    bytes_e4m3[(bytes_e4m3 & 0x7F) == 0x7F] = 0x3A
    yield wgmma("inexact_e4m3", "e4m3", 16, a, b, raw=bytes_e4m3, compared=False, note=note)
    tf32 = np.ldexp(1.0 + (random_u32(413, SHARED // 4) % 4096) / 4096.0, 0).astype(np.float32).view(np.uint8)
    yield wgmma("inexact_tf32_rounding", "tf32", 8, a, b, raw=tf32.copy(), compared=False, note=note)


def bf16_bits_of_random(seed: int) -> np.ndarray[Any, Any]:
    """Return bfloat16 bytes with exponents near 1."""
    words = random_u32(seed, SHARED // 2)
    return ((words & 0x80FF) | (0x3E80 + ((words >> 16) & 3) * 0x80)).astype(np.uint16).view(np.uint8).copy()


def wgmma_group_cases() -> Iterator[Case]:
    """Two groups in flight on separate accumulators; wait_group 1 makes the first one readable."""
    a, b = k_major(0, "128"), k_major(B_START, "128")
    registers = 8
    accs = ["{" + ", ".join(f"%acc{8 * g + i}" for i in range(registers)) + "}" for g in range(2)]
    zero = "\n".join(f"mov.b32 %acc{i}, 0;" for i in range(16))
    parts = []
    for g in range(2):
        parts.append(
            f"""
            add.u32 %r1, %smem, {b.start + 32 * g};
            {descriptor("%d11", "%r1", b)}
            add.u32 %r2, %smem, {a.start + 32 * g};
            {descriptor("%d10", "%r2", a)}
            wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {accs[g]}, %d10, %d11, %p1, 1, 1, 0, 0;
            wgmma.commit_group.sync.aligned;
            """
        )
    stores = ["\n".join(f"st.global.b32 [%d1+{4 * (8 * g + i)}], %acc{8 * g + i};" for i in range(8)) for g in range(2)]
    body = f"""
    {copy_in("%ptr1", SHARED, 128)}
    mul.wide.u32 %d1, %tix, 64;
    add.u64 %d1, %d1, %ptr0;
    {zero}
    mov.pred %p1, 0;
    wgmma.fence.sync.aligned;
    {"".join(parts)}
    wgmma.wait_group.sync.aligned 1;
    {stores[0]}
    wgmma.wait_group.sync.aligned 0;
    {stores[1]}
    """
    source = np.concatenate([small_integers("bf16", 401, B_START), small_integers("bf16", 402, SHARED - B_START)])
    yield Case(
        name="wgmma/two_groups",
        ptx=kernel(body, pointers=2, threads=128, registers="\t.reg .b32 %acc<16>;"),
        buffers={"out": sentinel(128 * 64), "source": source},
        outputs=("out",),
        block=128,
        shared_bytes=SHARED,
        is_async=True,
    )


def cases() -> Iterator[Case]:
    yield from ldmatrix_cases()
    yield from wgmma_cases()
    yield from wgmma_group_cases()
