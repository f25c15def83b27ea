"""`cvt`: conversions between integers and floating-point formats, down to four bits.

Source: PTX ISA, "Data Movement and Conversion Instructions: cvt, cvt.pack"; element formats: OCP Microscaling Formats (MX)
Specification 1.0. Packed results hold the first source in the upper half. Not pinned by silicon: `.ue8m0x2` of a negative
number (its magnitude is converted here) and what bf16 makes of an f64 NaN. Stochastic rounding (.rs) is refused.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ptxsim.findings import Unsupported
from ptxsim.floats import (
    BF16,
    DOUBLE,
    F16,
    F32,
    F64,
    TYPES,
    Array,
    FloatType,
    directed,
    elements,
    encode,
    finish,
    flush,
    load,
    numbers,
    registers,
    round_bits,
    round_fraction,
)
from ptxsim.lanes import in_register_form, per_lane
from ptxsim.ptx import Instruction
from ptxsim.registry import Pure, Reader, decoder
from ptxsim.templates import guarded, pure, register, sources
from ptxsim.values import M32, Value, lanes64, signed64

_INTS = {f"{kind}{width}": (kind == "s", width) for kind in "us" for width in (8, 16, 32, 64)}
_SCALARS = ("f16", "bf16", "f32", "f64")
_TO_INTEGRAL: dict[str, Callable[[F64], F64]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_ONE, _SIXTEEN, _HALF = np.uint32(1), np.uint32(16), np.uint32(0x7FFF)
_UPPER, _LOWER = np.uint32(0xFFFF0000), np.uint32(0xFFFF)


@dataclass(frozen=True)
class Modifiers:
    """What stands between `cvt` and the types."""

    rounding: str
    ftz: bool
    sat: bool
    relu: bool
    satfinite: bool


@dataclass(frozen=True)
class Small:
    """A format of at most eight bits.

    Attributes:
        bits: of a number.
        slot: bits that it takes in a register.
        mantissa, bias: of the format.
        top: code of the largest finite number.
        nan: code that a NaN becomes (the largest number where the format has no NaN).
    """

    bits: int
    slot: int
    mantissa: int
    bias: int
    top: int
    nan: int

    def value(self, code: int) -> float:
        """The number that a code without sign stands for, if it is finite."""
        exponent, fraction = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        scale = 2.0 ** (max(exponent, 1) - self.bias - self.mantissa)
        return (fraction + (1 << self.mantissa if exponent else 0)) * scale


SMALL = {
    "e4m3": Small(8, 8, 3, 7, 0x7E, 0x7F),
    "e5m2": Small(8, 8, 2, 15, 0x7B, 0x7F),
    "e2m1": Small(4, 4, 1, 1, 0x7, 0x7),
    "e2m3": Small(6, 8, 3, 1, 0x1F, 0x1F),
    "e3m2": Small(6, 8, 2, 3, 0x1F, 0x1F),
}


def _boundaries(small: Small) -> Array:
    """For each pair of neighbours the largest number that still rounds to the lower one (ties go to even codes)."""
    middles = [(small.value(code) + small.value(code + 1)) / 2 for code in range(small.top)]
    return np.array([m if code % 2 == 0 else np.nextafter(m, 0.0) for code, m in enumerate(middles)], np.float64)


_BOUNDARIES = {name: _boundaries(small) for name, small in SMALL.items()}


def to_small(x: F64, name: str, relu: bool) -> Array:
    """Numbers rounded to nearest even and saturated to a small format, as codes (uint32)."""
    small = SMALL[name]
    codes = np.searchsorted(_BOUNDARIES[name], np.abs(x)).astype(np.uint32)
    negative = np.signbit(x)
    codes = np.where(negative, np.uint32(0) if relu else codes | np.uint32(1 << (small.bits - 1)), codes)
    nan = x != x
    return np.where(nan, np.uint32(small.nan), codes) if b"\1" in nan.tobytes() else codes


@functools.cache
def _code_table(name: str, atype: str, relu: bool) -> Array:
    """Codes for all f16 or bf16 numbers; for "f32" those of its upper halves, twice: exact, and with something below.

    Neighbours' middles have few bits: a number's upper half, and whether the lower one is zero, decide what it rounds to.
    """
    if atype == "f32":
        halves = np.arange(1 << 17, dtype=np.uint32)
        x = (halves >> _ONE << _SIXTEEN | halves & _ONE).view(np.float32).astype(np.float64)
    else:
        x = numbers(np.arange(1 << 16, dtype=np.uint16), TYPES[atype]).astype(np.float64)
    with np.errstate(all="ignore"):
        return to_small(x, name, relu)


def _codes_of_f32(value: Value, name: str, relu: bool) -> Array:
    bits = np.array((value,), np.uint32) if value.__class__ is int else value
    index = (bits >> _SIXTEEN << _ONE) + (bits & _LOWER != 0)
    return _code_table(name, "f32", relu)[index]


def _half_table(name: str) -> Array:
    """float16 bits of every code."""
    small = SMALL[name]
    sign, out = 1 << (small.bits - 1), []
    for code in range(1 << small.slot):
        magnitude = code & (sign - 1)
        if magnitude > small.top:
            # Behind e5m2's largest number comes infinity, then its NaNs; e4m3 has one NaN.
            bits = 0x7C00 if name == "e5m2" and magnitude == small.top + 1 else 0x7FFF
        else:
            bits = int(np.float16(small.value(magnitude)).view(np.uint16))
        out.append(bits | 0x8000 if code & sign and bits != 0x7FFF else bits)
    return np.array(out, np.uint16)


_HALF_TABLES = {name: _half_table(name) for name in SMALL}


def half_values(name: str) -> F64:
    """The number behind every code of a small format (all of them are exact as float16)."""
    return _HALF_TABLES[name].view(np.float16).astype(np.float64)


# --------------------------------------------------------------------------------------------------------------- integers


def _int_to_int(ins: Instruction, r: Reader, m: Modifiers, dtype: str, atype: str) -> Pure:
    (d_signed, d_width), (a_signed, a_width) = _INTS[dtype], _INTS[atype]
    dst = register(ins)
    srcs = sources(ins, 1, max(a_width, getattr(ins.operands[1], "width", a_width)))
    held, result = srcs[0].width, dst.width
    if m.rounding or m.ftz or m.relu or m.satfinite:
        raise Unsupported(f"{r.where}: integer conversions take no modifier but .sat")
    if m.sat:
        low, high = (-(1 << (d_width - 1)), (1 << (d_width - 1)) - 1) if d_signed else (0, (1 << d_width) - 1)

        def one(a: int) -> int:
            a &= (1 << a_width) - 1
            a = (a ^ 1 << (a_width - 1)) - (1 << (a_width - 1)) if a_signed else a
            return min(max(a, low), high) & ((1 << result) - 1)

        return Pure(per_lane(one, result), (dst,), srcs)
    kept = min(a_width, d_width)
    signed = d_signed if d_width <= a_width else a_signed
    reach = result if d_signed or not signed else d_width
    value = "{0}" if held == kept else f"{{0}} & {(1 << kept) - 1}"
    if signed and reach > kept:
        sign = 1 << (kept - 1)
        value = (
            f"(({value} ^ {sign}) - {sign}) & {(1 << reach) - 1}"
            if held == kept
            else (f"((({value}) ^ {sign}) - {sign}) & {(1 << reach) - 1}")
        )
    if held <= 32 and result == 64:
        return pure(guarded(value, value.replace("{0}", "widen({0})"), srcs), (dst,), srcs)
    if held == 64 and result <= 32:
        return pure(guarded(value, value.replace("{0}", "low_half({0})"), srcs), (dst,), srcs)
    return pure(value, (dst,), srcs)


def _int_lanes(value: Value, signed: bool, width: int) -> Array:
    if value.__class__ is int:
        masked = value & (1 << width) - 1
        if signed:
            return np.array([(masked ^ 1 << (width - 1)) - (1 << (width - 1))], np.int64)
        return np.array([masked], np.uint64)
    if signed:
        return signed64(value, width)
    return lanes64(value) & np.uint64((1 << width) - 1)


def _odd_double(lanes: Array) -> F64:
    """int64 or uint64 lanes as float64, rounded to odd."""
    near = lanes.astype(np.float64)
    if (np.abs(near) <= 2.0**53).all():
        return near
    negative = lanes < 0
    magnitude = np.where(negative, -lanes.astype(np.int64), lanes.astype(np.int64)).astype(np.uint64)
    magnitude = np.where(negative, magnitude, lanes.astype(np.uint64))
    low = magnitude & np.uint64(0x7FF)
    large = magnitude >= np.uint64(1 << 53)
    sticky = np.where(large, magnitude - low | np.where(low != 0, np.uint64(0x800), np.uint64(0)), magnitude)
    return np.where(negative, -sticky.astype(np.float64), sticky.astype(np.float64))


def _int_to_float(ins: Instruction, r: Reader, m: Modifiers, dtype: str, atype: str) -> Pure:
    t = TYPES[dtype]
    signed, width = _INTS[atype]
    if m.rounding not in ("rn", "rz", "rm", "rp"):
        raise Unsupported(f"{r.where}: expected a rounding of .rn, .rz, .rm, .rp")
    if m.relu or m.satfinite or (m.ftz and t is not F32):
        raise Unsupported(f"{r.where}: this combination of modifiers is not known")
    srcs = sources(ins, 1, max(width, getattr(ins.operands[1], "width", width)))

    if t is F32 and m.rounding == "rn" and width == 32 == srcs[0].width and not m.sat:
        kind = np.int32 if signed else np.uint32

        def quick(a: Value) -> Value:
            lanes = np.array((a,), np.uint32) if a.__class__ is int else a
            return _to_register(lanes.view(kind).astype(np.float32).view(np.uint32))

        return Pure(quick, (register(ins),), srcs)

    def fn(a: Value) -> Value:
        lanes = _int_lanes(a, signed, width)
        if t is DOUBLE:
            exact = [round_fraction(Fraction(int(v)), m.rounding) for v in lanes] if m.rounding != "rn" else lanes
            bits = np.asarray(exact).astype(np.float64).view(np.uint64)
        else:
            bits = encode(_odd_double(lanes), t, m.rounding)
        return registers(finish(bits, t, False, "sat" if m.sat else ""), t)

    return Pure(fn, (register(ins),), srcs)


def _float_to_int(ins: Instruction, r: Reader, m: Modifiers, dtype: str, atype: str) -> Pure:
    t = TYPES[atype]
    signed, width = _INTS[dtype]
    if m.rounding not in _TO_INTEGRAL:
        raise Unsupported(f"{r.where}: expected a rounding of .rni, .rzi, .rmi, .rpi")
    if m.relu or m.satfinite or (m.ftz and t is not F32):
        raise Unsupported(f"{r.where}: this combination of modifiers is not known")
    dst = register(ins)
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)
    integral = _TO_INTEGRAL[m.rounding]
    # PTX ISA, cvt: NaN gives 0, but the top bit alone where f64 or a 64-bit integer takes part.
    not_a_number = (low if signed else 1 << (width - 1)) if t is DOUBLE or width == 64 else 0
    kind = np.int64 if signed else np.uint64

    def fn(a: Value) -> Value:
        x = integral(load(a, t, m.ftz))
        nan = x != x
        x = np.where(nan, 0.0, x)
        # float(high) of 64-bit types rounds up to a power of two: what reaches it is out of range.
        over, under = x >= float(high), x <= float(low)
        whole = np.where(over | under, 0.0, x).astype(kind)
        whole = np.where(over, kind(high), np.where(under, kind(low), whole))
        if b"\1" in nan.tobytes():
            whole = np.where(nan, kind(not_a_number), whole)
        return in_register_form(whole, dst.width)

    return Pure(fn, (dst,), sources(ins, 1, t.bits))


# ----------------------------------------------------------------------------------------------------------------- floats


def _narrow_bits(value: Value, name: str, m: Modifiers) -> Array:
    """f32 register values as bits of f16, bf16 or tf32 (uint32), by rn, rz, rna."""
    bits = elements(value, F32)
    if m.ftz:
        bits = flush(bits, F32)
    nan = bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
    if name == "f16":
        x = bits.view(np.float32)
        near = x.astype(np.float16)
        if m.rounding != "rn":
            near = np.copysign(directed(near, x.astype(np.float64), m.rounding), near)
        out, inf, sign, nan_bits = near.view(np.uint16).astype(np.uint32), 0x7C00, 0x8000, 0x7FFF
    elif name == "bf16":
        out, inf, sign, nan_bits = round_bits(bits, 16, m.rounding) >> np.uint32(16), 0x7F80, 0x8000, 0x7FFF
    else:
        # An H200 cuts NaNs short with .rna (some become infinities), and steps down from them with .satfinite.
        out = np.where(nan, round_bits(bits, 13, "rz"), round_bits(bits, 13, m.rounding))
        if m.rounding == "rna":
            special = out & np.uint32(0x7F800000) == np.uint32(0x7F800000)
            return np.where(special, out - np.uint32(1 << 13), out) if m.satfinite else out
        inf, sign, nan_bits = 0x7F800000, 0x80000000, 0x7FFFE000
    if m.satfinite:
        largest = inf - (1 << 13 if name == "tf32" else 1)
        out = np.where(out & np.uint32(sign - 1) == np.uint32(inf), out & np.uint32(sign) | np.uint32(largest), out)
    if m.relu:
        out = np.where(out & np.uint32(sign) != 0, np.uint32(0), out)
    return np.where(nan, np.uint32(nan_bits), out) if b"\1" in nan.tobytes() else out


def _bf16_upper(value: Value) -> Array:
    """f32 rounded to bf16, in the upper half; the lower half is rubbish."""
    bits = np.array((value,), np.uint32) if value.__class__ is int else value
    x = bits.view(np.float32)
    nan = x != x
    rounded = bits + ((bits >> _SIXTEEN & _ONE) + _HALF)
    return np.where(nan, np.uint32(0x7FFF0000), rounded) if b"\1" in nan.tobytes() else rounded


def _quick_bf16x2(a: Value, b: Value) -> Value:
    return _to_register(_bf16_upper(a) & _UPPER | _bf16_upper(b) >> _SIXTEEN)


def _quick_f16x2(a: Value, b: Value) -> Value:
    high, low = (np.array((v,), np.uint32) if v.__class__ is int else v for v in (a, b))
    halves = np.empty((max(len(high), len(low)), 2), np.float16)
    halves[:, 0] = low.view(np.float32)
    halves[:, 1] = high.view(np.float32)
    nan = halves != halves
    if b"\1" in nan.tobytes():
        return _to_register(np.where(nan, np.uint16(0x7FFF), halves.view(np.uint16)).view(np.uint32)[:, 0])
    return _to_register(halves.view(np.uint32)[:, 0])


def _to_register(bits: Array) -> Value:
    return bits if len(bits) == 32 else int(bits[0])


def _from_f32(ins: Instruction, r: Reader, m: Modifiers, name: str, packed: bool) -> Pure:
    """f32 to f16, bf16, tf32, f16x2, bf16x2."""
    legal = (
        ("rn", "rz", "rna")
        if name == "tf32"
        else ("rn", "rz")
        if packed or m.relu or m.satfinite
        else ("rn", "rz", "rm", "rp")
    )
    if m.rounding not in legal or m.sat or (m.rounding == "rna" and m.relu) or (m.ftz and (name == "tf32" or packed)):
        raise Unsupported(f"{r.where}: this combination of modifiers is not known")
    r.end(3 if packed else 2)
    if packed:
        if m.rounding == "rn" and not m.relu and not m.satfinite:
            return Pure(_quick_bf16x2 if name == "bf16" else _quick_f16x2, (register(ins),), sources(ins, 1, 32, 32))

        def fn(a: Value, b: Value) -> Value:
            return _to_register(_narrow_bits(a, name, m) << np.uint32(16) | _narrow_bits(b, name, m))

        return Pure(fn, (register(ins),), sources(ins, 1, 32, 32))
    return Pure(lambda a: _to_register(_narrow_bits(a, name, m)), (register(ins),), sources(ins, 1, 32))


def _float_to_float(ins: Instruction, r: Reader, m: Modifiers, dtype: str, atype: str) -> Pure:
    t, source = TYPES[dtype], TYPES[atype]
    dst, srcs = (register(ins),), sources(ins, 1, source.bits)
    if (m.ftz and F32 not in (t, source)) or m.relu or m.satfinite:
        raise Unsupported(f"{r.where}: this combination of modifiers is not known")
    clamp = "sat" if m.sat else ""
    integral = _TO_INTEGRAL.get(m.rounding)
    widening = t is source or t is DOUBLE or (t is F32 and source is not DOUBLE)
    if integral and t is not source:
        raise Unsupported(f"{r.where}: .{m.rounding} needs equal types")
    if m.rounding == "rna" or (not widening and not m.rounding) or (widening and t is not source and m.rounding):
        raise Unsupported(f"{r.where}: rounding {m.rounding!r} does not fit this conversion")
    if source is BF16 and t is F32 and not m.ftz and not m.sat:
        return pure("{0} << 16", dst, srcs)
    if source is F16 and t is F32 and not m.ftz and not m.sat:
        singles = _single_table()
        return Pure(lambda a: int(singles[a]) if a.__class__ is int else singles[a], dst, srcs)

    def fn(a: Value) -> Value:
        x = load(a, source, m.ftz and source is F32)
        bits = encode(np.copysign(integral(x), x) if integral else x, t, "rn" if integral else m.rounding or "rn")
        if DOUBLE in (t, source):
            bits = _double_nans(bits, elements(a, source), t, source)
        return registers(finish(bits, t, m.ftz and t is F32, clamp), t)

    return Pure(fn, dst, srcs)


def _double_nans(bits: Array, given: Array, t: FloatType, source: FloatType) -> Array:
    """Results with NaNs as an H200 converts them: f64 keeps sign and payload, f64 sources keep the sign."""
    nan = (given & source.dtype(source.sign - 1)) > source.dtype(source.inf)
    if b"\1" not in nan.tobytes():
        return bits
    sign = (given >> source.dtype(source.element - 1)).astype(t.dtype) << t.dtype(t.element - 1)
    quiet = t.dtype(t.inf | 1 << t.mantissa - 1)
    if t is DOUBLE:
        payload = (given & source.dtype((1 << source.mantissa) - 1)).astype(np.uint64)
        return np.where(nan, sign | quiet | payload << np.uint64(52 - source.mantissa), bits)
    return np.where(nan, sign | quiet, bits)


@functools.cache
def _single_table() -> Array:
    """f32 bits of every f16."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return encode(load(np.arange(1 << 16, dtype=np.uint32), F16), F32)


# ----------------------------------------------------------------------------------------------------------- small formats


def _halves_of(ins: Instruction, r: Reader, m: Modifiers, atype: str) -> tuple[Callable[..., F64], tuple[int, ...]]:
    """How to read two numbers, shape (n, 2) with the lower one first, and the widths of the sources."""
    if atype == "f32":
        r.end(3)

        def both(a: Value, b: Value) -> F64:
            return np.stack(np.broadcast_arrays(load(b, F32), load(a, F32)), axis=1)

        return both, (32, 32)
    r.end(2)
    return lambda a: load(a, TYPES[atype]), (32,)


def _to_small_pair(ins: Instruction, r: Reader, m: Modifiers, name: str, atype: str) -> Pure:
    if m.rounding != "rn" or not m.satfinite or m.ftz or m.sat or atype not in ("f32", "f16x2", "bf16x2"):
        raise Unsupported(f"{r.where}: expected cvt.rn.satfinite{{.relu}} from f32, f16x2 or bf16x2")
    slot = np.uint32(SMALL[name].slot)
    if atype == "f32":
        r.end(3)

        def fn(a: Value, b: Value) -> Value:
            return _to_register(_codes_of_f32(a, name, m.relu) << slot | _codes_of_f32(b, name, m.relu))

        return Pure(fn, (register(ins),), sources(ins, 1, 32, 32))
    r.end(2)

    def from_pair(a: Value) -> Value:
        codes = _code_table(name, atype, m.relu)[elements(a, TYPES[atype])]
        return _to_register(codes[:, 1] << slot | codes[:, 0])

    return Pure(from_pair, (register(ins),), sources(ins, 1, 32))


def _from_small_pair(ins: Instruction, r: Reader, m: Modifiers, name: str) -> Pure:
    if m.rounding != "rn" or m.satfinite or m.ftz or m.sat:
        raise Unsupported(f"{r.where}: expected cvt.rn{{.relu}}")
    r.end(2)
    table, slot = _HALF_TABLES[name], SMALL[name].slot
    mask = (1 << slot) - 1
    if m.relu:
        table = np.where((table & np.uint16(0x8000)) != 0, np.uint16(0), table)
    codes = np.arange(1 << 2 * slot)
    pairs = table[codes & mask].astype(np.uint32) | table[codes >> slot].astype(np.uint32) << np.uint32(16)

    def fn(a: Value) -> Value:
        return int(pairs[a]) if a.__class__ is int else pairs[a]

    return Pure(fn, (register(ins),), sources(ins, 1, 2 * slot))


def to_scale(x: F64, up: bool, satfinite: bool) -> Array:
    """Magnitudes as powers of two (ue8m0 codes, uint32), rounded down or up."""
    fraction, exponent = np.frexp(np.abs(x))
    codes = exponent.astype(np.int64) - 1 + 127 + ((fraction > 0.5) if up else 0)
    codes = np.where(x == 0, 0, np.where(np.isinf(x), 255, codes))
    codes = np.clip(codes, 0, 254 if satfinite else 255)
    return np.where(x != x, 255, codes).astype(np.uint32)


def _scales(ins: Instruction, r: Reader, m: Modifiers, dtype: str, atype: str) -> Pure:
    """`.ue8m0x2` from f32 or bf16x2, and to bf16x2."""
    if m.ftz or m.sat or m.relu:
        raise Unsupported(f"{r.where}: this combination of modifiers is not known")
    if atype == "ue8m0x2":
        if dtype != "bf16x2" or m.rounding != "rn" or m.satfinite:
            raise Unsupported(f"{r.where}: expected cvt.rn.bf16x2.ue8m0x2")
        r.end(2)
        table = np.array([0x40, *(code << 7 for code in range(1, 255)), 0x7FFF], np.uint32)

        def widen(a: Value) -> Value:
            if a.__class__ is int:
                return int(table[a & 255]) | int(table[a >> 8 & 255]) << 16
            return table[a & 255] | table[a >> 8 & 255] << np.uint32(16)

        return Pure(widen, (register(ins),), sources(ins, 1, 16))
    if m.rounding not in ("rz", "rp") or atype not in ("f32", "bf16x2"):
        raise Unsupported(f"{r.where}: expected cvt.rz or cvt.rp from f32 or bf16x2")
    read, widths = _halves_of(ins, r, m, atype)

    def fn(*srcs: Value) -> Value:
        codes = to_scale(read(*srcs), m.rounding == "rp", m.satfinite)
        return _to_register(codes[:, 1] << np.uint32(8) | codes[:, 0])

    return Pure(fn, (register(ins),), sources(ins, 1, *widths))


# --------------------------------------------------------------------------------------------------------------- decoders


def _modifiers(r: Reader) -> Modifiers:
    rounding = r.one_of("rni", "rzi", "rmi", "rpi", "rna", "rn", "rz", "rm", "rp", default="")
    ftz, sat = r.take("ftz"), r.take("sat")
    # Both orders of .relu and .satfinite are in use.
    relu = r.take("relu")
    satfinite = r.take("satfinite")
    relu = r.take("relu") or relu
    return Modifiers(rounding, ftz, sat, relu, satfinite)


@decoder("cvt")
def decode_cvt(ins: Instruction) -> Pure:
    """`cvt`, all but its stochastic forms."""
    r = Reader(ins)
    m = _modifiers(r)
    dtype, atype = r.pop(), r.pop()
    if dtype in SMALL_PAIRS:
        return _to_small_pair(ins, r, m, SMALL_PAIRS[dtype], atype)
    if atype in SMALL_PAIRS and dtype == "f16x2":
        return _from_small_pair(ins, r, m, SMALL_PAIRS[atype])
    if "ue8m0x2" in (dtype, atype):
        return _scales(ins, r, m, dtype, atype)
    if atype == "f32" and (dtype in ("f16x2", "bf16x2", "tf32") or (dtype in ("f16", "bf16") and not m.sat)):
        packed = dtype.endswith("x2")
        return _from_f32(ins, r, m, dtype.removesuffix("x2"), packed)
    r.end(2)
    if dtype in _INTS and atype in _INTS:
        return _int_to_int(ins, r, m, dtype, atype)
    if dtype in _SCALARS and atype in _INTS:
        return _int_to_float(ins, r, m, dtype, atype)
    if dtype in _INTS and atype in _SCALARS:
        return _float_to_int(ins, r, m, dtype, atype)
    if dtype in _SCALARS and atype in _SCALARS:
        return _float_to_float(ins, r, m, dtype, atype)
    raise Unsupported(f"{r.where}: conversion from .{atype} to .{dtype} is not known")


SMALL_PAIRS = {f"{name}x2": name for name in SMALL}


@decoder("cvt.pack")
def decode_pack(ins: Instruction) -> Pure:
    """`cvt.pack`: two saturated integers, and for narrow ones the low bits of a third operand above them."""
    r = Reader(ins, skip=2)
    if not r.take("sat"):
        raise Unsupported(f"{r.where}: cvt.pack needs .sat")
    name = r.one_of("u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2")
    r.one_of("s32")
    width = int(name[1:])
    if width < 16:
        r.one_of("b32")
    r.end(3 if width == 16 else 4)
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if name[0] == "s" else (0, (1 << width) - 1)
    mask = (1 << width) - 1

    def clamped(a: int) -> int:
        return min(max((a ^ 0x80000000) - 0x80000000, low), high) & mask

    def one(a: int, b: int, c: int = 0) -> int:
        return (clamped(a) << width | clamped(b) | c << 2 * width) & M32

    return Pure(per_lane(one, 32), (register(ins),), sources(ins, 1, *([32] * (2 if width == 16 else 3))))
