"""Probes of floating-point instructions and conversions: one kernel per instruction."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .alu import integers, operation
from .kit import Case, random_u32, random_u64, words

LANES = 256

# Zeros, ones, infinities, NaNs (one signalling), subnormals, the smallest normal number, the largest, a half, 2^23 + 1.
SPECIAL_WORDS = {
    "f32": "0 80000000 3f800000 bf800000 7f800000 ff800000 7fc00000 7f800001 ffc12345 1 807fffff 800000 7f7fffff ff7fffff "
    "3f000000 4b000001",
    "f16": "0 8000 3c00 bc00 7c00 fc00 7e00 7c01 fe12 1 83ff 400 7bff fbff 3800 6401",
    "bf16": "0 8000 3f80 bf80 7f80 ff80 7fc0 7f81 ffc1 1 807f 80 7f7f ff7f 3f00 4301",
    "f64": "0 8000000000000000 3ff0000000000000 bff0000000000000 7ff0000000000000 fff0000000000000 7ff8000000000000 "
    "7ff0000000000001 fff8000012340000 1 800fffffffffffff 10000000000000 7fefffffffffffff 380ffffff0000000 "
    "3690000000000000 47effffff0000000",
}
SPECIAL = {dtype: [int(word, 16) for word in words(text)] for dtype, text in SPECIAL_WORDS.items()}
DTYPE = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}


def floats(dtype: str, seed: int, position: int, n: int = LANES) -> np.ndarray[Any, Any]:
    """Return operand bits: special values against each other in the first 64 lanes, ordinary ones, then raw bits."""
    words = random_u64(seed * 16 + position, n)
    special = SPECIAL[dtype]
    signs = (words >> np.uint64(63)).astype(np.float64) * -2 + 1
    mantissa = 1.0 + (words & np.uint64((1 << 40) - 1)).astype(np.float64) / 2.0**40
    ordinary = signs * np.ldexp(mantissa, ((words >> np.uint64(48)) % np.uint64(9)).astype(np.int32) - 4)
    if dtype == "f64":
        bits = ordinary.view(np.uint64).copy()
    elif dtype == "f16":
        bits = ordinary.astype(np.float16).view(np.uint16).astype(np.uint64)
    else:
        bits = ordinary.astype(np.float32).view(np.uint32).astype(np.uint64) >> np.uint64(16 if dtype == "bf16" else 0)
    tail = n * 5 // 8
    bits[tail:] = words[tail:] >> np.uint64(64 - 8 * np.dtype(DTYPE[dtype]).itemsize)
    for i in range(min(64, n)):
        # operand 0 walks through the list; the others are shifted against it
        bits[i] = special[i % 16] if position == 0 else special[(i // 16 * (3 + position) + i * position) % 16]
    return bits.astype(DTYPE[dtype])


def pairs(dtype: str, seed: int, position: int, n: int = LANES) -> np.ndarray[Any, Any]:
    """Return packed pairs; the high half is another special-value walk."""
    low = floats(dtype, seed, position, n).astype(np.uint32)
    high = np.roll(floats(dtype, seed + 1, position, n).astype(np.uint32), 5 * position)
    return low | high << np.uint32(16)


LETTER = {"f16": "h", "bf16": "h", "f32": "r", "f64": "d"}


def elementwise(group: str, opcode: str, dtype: str, operands: int, seed: int, **options: Any) -> Case:
    """Return a probe of `opcode D, A, B, C` on one type; packed types use pairs."""
    if dtype.endswith("x2"):
        data = [pairs(dtype[:-2], seed, i) for i in range(operands)]
        letter = "r"
    else:
        data = [floats(dtype, seed, i) for i in range(operands)]
        letter = LETTER[dtype]
    text = f"{opcode} $D, {', '.join('$' + letter for letter in 'ABC'[:operands])};"
    return operation(group, opcode, text, letter * operands, letter, data, **options)


F32_BINARY = words(
    "add.f32 add.ftz.f32 add.rn.f32 add.rn.ftz.f32 add.rz.f32 add.rm.f32 add.rp.f32 add.sat.f32 add.rn.ftz.sat.f32 "
    "sub.f32 sub.ftz.f32 sub.rn.f32 sub.rz.f32 sub.sat.f32 "
    "mul.f32 mul.ftz.f32 mul.rn.f32 mul.rn.ftz.f32 mul.rz.f32 mul.rm.f32 mul.rp.f32 mul.sat.f32 mul.ftz.sat.f32 "
    "min.f32 min.ftz.f32 min.NaN.f32 min.ftz.NaN.f32 min.xorsign.abs.f32 "
    "max.f32 max.ftz.f32 max.NaN.f32 max.ftz.NaN.f32 max.NaN.xorsign.abs.f32 "
    "copysign.f32 div.rn.f32 div.rn.ftz.f32 div.rz.f32"
)
F32_UNARY = words(
    "neg.f32 neg.ftz.f32 abs.f32 abs.ftz.f32 rcp.rn.f32 rcp.rn.ftz.f32 rcp.rz.f32 sqrt.rn.f32 sqrt.rn.ftz.f32"
)
F32_TERNARY = words(
    "fma.rn.f32 fma.rn.ftz.f32 fma.rz.f32 fma.rm.f32 fma.rp.f32 fma.rn.sat.f32 fma.rn.ftz.sat.f32 mad.rn.f32"
)
F64 = ("add.rn.f64 add.f64 sub.f64 mul.rn.f64 min.f64 max.f64 div.rn.f64", "fma.rn.f64", "neg.f64 abs.f64")


def arithmetic_cases() -> Iterator[Case]:
    for i, opcode in enumerate(F32_BINARY):
        yield elementwise("f32", opcode, "f32", 2, 700 + i)
    for i, opcode in enumerate(F32_UNARY):
        yield elementwise("f32", opcode, "f32", 1, 740 + i)
    for i, opcode in enumerate(F32_TERNARY):
        yield elementwise("f32", opcode, "f32", 3, 750 + i)
    for count, opcodes in zip((2, 3, 1), F64, strict=True):
        for i, opcode in enumerate(words(opcodes)):
            yield elementwise("f64", opcode, "f64", count, 760 + i)
    for dtype in ("f16", "bf16", "f16x2", "bf16x2"):
        yield from half_cases(dtype)


def half_cases(dtype: str) -> Iterator[Case]:
    half = dtype.startswith("f16")
    group = dtype
    binary = [f"{name}.rn.{dtype}" for name in ("add", "sub", "mul")]
    binary += [f"{name}.{dtype}" for name in ("min", "max", "min.NaN", "max.NaN", "min.xorsign.abs")]
    if half:
        binary += [f"add.{dtype}", f"add.ftz.{dtype}", f"mul.rn.ftz.{dtype}", f"add.rn.sat.{dtype}", f"mul.sat.{dtype}"]
        binary += [f"max.ftz.{dtype}", f"min.ftz.NaN.{dtype}"]
    ternary = [f"fma.rn.{dtype}", f"fma.rn.relu.{dtype}"]
    if half:
        ternary += [f"fma.rn.ftz.{dtype}", f"fma.rn.sat.{dtype}"]
    unary = [f"neg.{dtype}", f"abs.{dtype}"]
    for i, opcode in enumerate(binary):
        yield elementwise(group, opcode, dtype, 2, 800 + 2 * i)
    for i, opcode in enumerate(ternary):
        yield elementwise(group, opcode, dtype, 3, 840 + 2 * i)
    for i, opcode in enumerate(unary):
        yield elementwise(group, opcode, dtype, 1, 850 + 2 * i)


COMPARISONS = words("eq ne lt le gt ge equ neu ltu leu gtu geu num nan")


def comparison_cases() -> Iterator[Case]:
    for dtype in ("f32", "f16", "bf16", "f64"):
        for comparison in COMPARISONS if dtype == "f32" else ("lt", "geu", "nan", "eq"):
            data = [floats(dtype, 860, 0), floats(dtype, 860, 1)]
            data[1][64:128] = data[0][64:128]
            opcode = f"setp.{comparison}.{dtype}"
            yield operation("compare", opcode, f"{opcode} $P, $A, $B;", LETTER[dtype] * 2, "p", data)
    data = [floats("f32", 861, 0), floats("f32", 861, 1)]
    for comparison in ("lt", "neu"):
        opcode = f"setp.{comparison}.ftz.f32"
        yield operation("compare", opcode, f"{opcode} $P, $A, $B;", "rr", "p", data)
    for dtype in ("f16x2", "bf16x2"):
        values = [pairs(dtype[:-2], 862, 0), pairs(dtype[:-2], 862, 1)]
        text = f"setp.gt.{dtype} $P|$Q, $A, $B;\nselp.b32 %r50, 1, 0, $P;\nselp.b32 %r51, 2, 0, $Q;\n"
        text += "or.b32 $D, %r50, %r51;"
        yield operation("compare", f"setp.gt.{dtype}", text, "rr", "r", values)
    for test in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
        yield operation("compare", f"testp.{test}.f32", f"testp.{test}.f32 $P, $A;", "r", "p", data[:1])


def narrow_values(seed: int, dtype: str = "f32") -> np.ndarray[Any, Any]:
    """Return floats for 8-bit conversions: specials, values around the ranges and ties of e4m3 and e5m2, random ones."""
    ties = [448.0, 449.0, 463.9, 464.0, 480.0, 57344.0, 61439.0, 61440.0, 65536.0]  # about the largest numbers
    ties += [0.0, 2.0**-9, 2.0**-10, 2.0**-11, 1.5 * 2.0**-10, 2.0**-16, 2.0**-17, 1.5 * 2.0**-17]  # and the smallest
    ties += [1.0625, 1.1875, 17.0, 19.0, 0.0146484375, 0.015625, 1.125, 1.375, 6.0, 5.0, 0.25]
    values = np.array(ties + [-tie for tie in ties], dtype=np.float64)
    words = random_u64(seed, LANES - 16 - len(values))
    spread = np.ldexp(
        1.0 + (words & np.uint64((1 << 20) - 1)).astype(np.float64) / 2.0**20,
        ((words >> np.uint64(24)) % np.uint64(30)).astype(np.int32) - 19,
    )
    spread *= (words >> np.uint64(63)).astype(np.float64) * -2 + 1
    with np.errstate(over="ignore"):
        everything = np.concatenate([values, spread])
        if dtype == "f32":
            bits: np.ndarray[Any, Any] = everything.astype(np.float32).view(np.uint32)
        else:
            bits = everything.astype(np.float16).view(np.uint16)
    return np.concatenate([np.array(SPECIAL[dtype], dtype=bits.dtype), bits])


def narrow_conversion_cases() -> Iterator[Case]:
    """Conversions to and from 8-bit floats, packed two at a time."""
    wide = [narrow_values(870), np.roll(narrow_values(871), 7)]
    halves = narrow_values(872, "f16").astype(np.uint32) | np.roll(narrow_values(873, "f16").astype(np.uint32), 9) << 16
    every = np.arange(256, dtype=np.uint16)
    codes = every | np.roll(every, 85) << np.uint16(8)
    for target in ("e4m3x2", "e5m2x2"):
        for relu in ("", ".relu"):
            opcode = f"cvt.rn.satfinite{relu}.{target}.f32"
            yield operation("cvt_narrow", opcode, f"{opcode} $D, $A, $B;", "rr", "h", wide)
            opcode = f"cvt.rn.satfinite{relu}.{target}.f16x2"
            yield operation("cvt_narrow", opcode, f"{opcode} $D, $A;", "r", "h", [halves])
            opcode = f"cvt.rn{relu}.f16x2.{target}"
            yield operation("cvt_narrow", opcode, f"{opcode} $D, $A;", "h", "r", [codes])


def float_conversion_cases() -> Iterator[Case]:
    single = [floats("f32", 880, 0), floats("f32", 880, 1)]
    ties = (random_u32(881, 64) & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # half-way between two bfloat16
    single[0][-64:] = ties
    subnormal_halves = np.ldexp(1.0 + random_u32(882, 32) / 2.0**33, -(random_u32(883, 32) % 13).astype(int) - 13)
    single[0][100:132] = subnormal_halves.astype(np.float32).view(np.uint32)
    to_half = words(
        "cvt.rn.f16.f32 cvt.rz.f16.f32 cvt.rn.ftz.f16.f32 cvt.rn.sat.f16.f32 cvt.rn.relu.f16.f32 cvt.rz.relu.f16.f32 "
        "cvt.rn.bf16.f32 cvt.rz.bf16.f32 cvt.rn.relu.bf16.f32 cvt.rn.satfinite.f16.f32 cvt.rn.satfinite.bf16.f32"
    )
    for opcode in to_half:
        yield operation("cvt_float", opcode, f"{opcode} $D, $A;", "r", "h", single[:1])
    to_pair = words(
        "cvt.rn.f16x2.f32 cvt.rz.f16x2.f32 cvt.rn.relu.f16x2.f32 cvt.rn.bf16x2.f32 cvt.rz.bf16x2.f32 "
        "cvt.rn.relu.bf16x2.f32 cvt.rz.relu.bf16x2.f32 cvt.rn.satfinite.f16x2.f32 cvt.rn.satfinite.bf16x2.f32"
    )
    for opcode in to_pair:
        yield operation("cvt_float", opcode, f"{opcode} $D, $A, $B;", "rr", "r", single)
    for mode in ("rna", "rn", "rz", "rn.relu", "rna.satfinite"):
        opcode = f"cvt.{mode}.tf32.f32"
        yield operation("cvt_float", opcode, f"{opcode} $D, $A;", "r", "r", single[:1])
    for mode in ("rni", "rzi", "rmi", "rpi", "sat", "rni.ftz", "ftz", "ftz.sat"):
        opcode = f"cvt.{mode}.f32.f32"
        yield operation("cvt_float", opcode, f"{opcode} $D, $A;", "r", "r", single[:1])
    half, brain = floats("f16", 884, 0), floats("bf16", 885, 0)
    for opcode, data, out in (
        ("cvt.f32.f16", half, "r"),
        ("cvt.ftz.f32.f16", half, "r"),
        ("cvt.sat.f32.f16", half, "r"),
        ("cvt.f32.bf16", brain, "r"),
        ("cvt.rni.f16.f16", half, "h"),
        ("cvt.rn.bf16.f16", half, "h"),
        ("cvt.rn.f16.bf16", brain, "h"),
        ("cvt.f64.f16", half, "d"),
    ):
        yield operation("cvt_float", opcode, f"{opcode} $D, $A;", "h", out, [data])
    yield operation("cvt_float", "cvt.f64.f32", "cvt.f64.f32 $D, $A;", "r", "d", single[:1])
    double = floats("f64", 886, 0)
    for mode in ("rn", "rz", "rm", "rp", "rn.sat", "rn.ftz"):
        yield operation("cvt_float", f"cvt.{mode}.f32.f64", f"cvt.{mode}.f32.f64 $D, $A;", "d", "r", [double])
    yield operation("cvt_float", "cvt.rn.f16.f64", "cvt.rn.f16.f64 $D, $A;", "d", "h", [double])


def wide_range(seed: int) -> np.ndarray[Any, Any]:
    """Return f32 bits around integers, halves and the limits of the integer types."""
    data = floats("f32", seed, 0)
    limits = [2.0**e for e in (7, 8, 15, 16, 31, 32, 63, 64)]
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 1e10, -1e10, 1e20, -1e20]
    values += limits + [-v for v in limits] + [float(np.nextafter(np.float32(v), np.float32(0))) for v in limits]
    data[64 : 64 + len(values)] = np.array(values, dtype=np.float32).view(np.uint32)
    spread = random_u64(seed, 64)
    signs = (spread >> np.uint64(63)).astype(np.float64) * -2 + 1
    exponents = (spread >> np.uint64(32)).astype(np.int64) % 40
    spread_values = signs * np.ldexp(1.0 + (spread % np.uint64(2**23)) / 2.0**23, exponents)
    data[-64:] = spread_values.astype(np.float32).view(np.uint32)
    return data


def integer_conversion_cases() -> Iterator[Case]:
    data = wide_range(890)
    for target in ("s32", "u32", "s64", "u64", "s16", "u16", "s8", "u8"):
        out = {"8": "h", "16": "h", "32": "r", "64": "d"}[target[1:]]
        for mode in ("rni", "rzi", "rmi", "rpi"):
            opcode = f"cvt.{mode}.{target}.f32"
            yield operation("cvt_to_int", opcode, f"{opcode} $D, $A;", "r", out, [data])
    for opcode in ("cvt.rni.ftz.s32.f32", "cvt.rpi.ftz.u32.f32", "cvt.rzi.sat.s32.f32"):
        yield operation("cvt_to_int", opcode, f"{opcode} $D, $A;", "r", "r", [data])
    for target, out in (("s32", "r"), ("u32", "r"), ("s16", "h"), ("u16", "h"), ("u64", "d")):
        opcode = f"cvt.rni.{target}.f16"
        yield operation("cvt_to_int", opcode, f"{opcode} $D, $A;", "h", out, [floats("f16", 891, 0)])
    yield operation("cvt_to_int", "cvt.rzi.s32.f64", "cvt.rzi.s32.f64 $D, $A;", "d", "r", [floats("f64", 892, 0)])
    yield operation("cvt_to_int", "cvt.rzi.s32.bf16", "cvt.rzi.s32.bf16 $D, $A;", "h", "r", [floats("bf16", 893, 0)])
    for source in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        bits = int(source[1:])
        letter = {8: "h", 16: "h", 32: "r", 64: "d"}[bits]
        values = integers(max(bits, 16), 894, 0, LANES)
        for mode in ("rn", "rz", "rm", "rp") if bits >= 32 else ("rn",):
            opcode = f"cvt.{mode}.f32.{source}"
            yield operation("cvt_from_int", opcode, f"{opcode} $D, $A;", letter, "r", [values])
    for opcode, letter, out, bits in (
        ("cvt.rn.f16.s32", "r", "h", 32),
        ("cvt.rn.f16.u32", "r", "h", 32),
        ("cvt.rn.f16.s16", "h", "h", 16),
        ("cvt.rz.f16.u16", "h", "h", 16),
        ("cvt.rn.bf16.s32", "r", "h", 32),
        ("cvt.rn.bf16.u16", "h", "h", 16),
        ("cvt.rn.f64.s32", "r", "d", 32),
        ("cvt.rn.f64.u64", "d", "d", 64),
        ("cvt.rn.sat.f32.s32", "r", "r", 32),
    ):
        yield operation("cvt_from_int", opcode, f"{opcode} $D, $A;", letter, out, [integers(bits, 895, 0, LANES)])


# Relative and absolute errors that the PTX ISA states for the approximate instructions (9.7.3); the simulator rounds the
# exact result, so the difference may be that error plus half a unit in the last place.
APPROXIMATE = {
    "rcp.approx.f32": (2.0**-23 + 2.0**-24, 0.0),
    "rcp.approx.ftz.f32": (2.0**-23 + 2.0**-24, 0.0),
    "sqrt.approx.f32": (2.0**-22, 0.0),
    "sqrt.approx.ftz.f32": (2.0**-22, 0.0),
    "rsqrt.approx.f32": (2.0**-22, 0.0),
    "rsqrt.approx.ftz.f32": (2.0**-22, 0.0),
    "ex2.approx.f32": (2.0**-21, 2.0**-149),
    "ex2.approx.ftz.f32": (2.0**-21, 0.0),
    "lg2.approx.f32": (2.0**-22 + 2.0**-24, 2.0**-21.8),
    "lg2.approx.ftz.f32": (2.0**-22 + 2.0**-24, 2.0**-21.8),
    "tanh.approx.f32": (2.0**-10.9, 0.0),
    "sin.approx.f32": (0.0, 2.0**-20),
    "cos.approx.f32": (0.0, 2.0**-20),
}
ANGLES = ("sin.approx.f32", "cos.approx.f32")


def approximate_cases() -> Iterator[Case]:
    for i, (opcode, (rtol, atol)) in enumerate(APPROXIMATE.items()):
        data = floats("f32", 900 + i, 0)
        if opcode in ANGLES:
            angles = (random_u32(920 + i, LANES).astype(np.float64) / 2.0**32 - 0.5) * 2 * np.pi
            data = angles.astype(np.float32).view(np.uint32)
        elif "ex2" in opcode:
            spread = (random_u32(920 + i, 96).astype(np.float64) / 2.0**32 - 0.5) * 300
            data[-96:] = spread.astype(np.float32).view(np.uint32)
        elif "lg2" in opcode:
            data[-96:] = random_u32(920 + i, 96) >> np.uint32(1)
            near_one = 1.0 + (random_u32(940 + i, 32).astype(np.float64) / 2.0**32 - 0.5) / 8
            data[-32:] = near_one.astype(np.float32).view(np.uint32)
        else:
            data[-96:] = random_u32(920 + i, 96) >> np.uint32(1)
        yield operation("approx", opcode, f"{opcode} $D, $A;", "r", "r", [data], rtol=rtol, atol=atol)
    for opcode in ("div.approx.f32", "div.approx.ftz.f32", "div.full.f32"):
        # "2 ulp for a divisor in [2^-126, 2^126]": the divisors stay there
        left, right = floats("f32", 950, 0), floats("f32", 950, 1)
        magnitude = right & np.uint32(0x7FFFFFFF)
        right[(magnitude < 0x00800000) | (magnitude > 0x7E800000)] = 0x40490FDB
        error = 2.0**-22 + 2.0**-24
        yield operation("approx", opcode, f"{opcode} $D, $A, $B;", "rr", "r", [left, right], rtol=error)
    halves = pairs("f16", 960, 0)
    brains = pairs("bf16", 961, 0)
    # The errors that the ISA states, and one step of the smallest f16 numbers.
    for opcode, values, letter, rtol, atol in (
        ("ex2.approx.f16x2", halves, "r", 2.0**-9.9, 2.0**-24),
        ("tanh.approx.f16x2", halves, "r", 0.0, 2.0**-10.987),
        ("ex2.approx.ftz.bf16x2", brains, "r", 2.0**-7, 0.0),
        ("tanh.approx.bf16x2", brains, "r", 0.0, 2.0**-8),
        ("ex2.approx.f16", floats("f16", 962, 0), "h", 2.0**-9.9, 2.0**-24),
        ("ex2.approx.ftz.bf16", floats("bf16", 963, 0), "h", 2.0**-7, 0.0),
    ):
        text, kind = f"{opcode} $D, $A;", "bf16" if "bf16" in opcode else "f16"
        yield operation("approx", opcode, text, letter, letter, [values], rtol=rtol, atol=atol, float_type=kind)


def cases() -> Iterator[Case]:
    yield from arithmetic_cases()
    yield from comparison_cases()
    yield from narrow_conversion_cases()
    yield from float_conversion_cases()
    yield from integer_conversion_cases()
    yield from approximate_cases()
