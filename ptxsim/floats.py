"""Floating-point instructions on f16, bf16, f32, f64 and their packed pairs.

Every result is the exact one rounded once. Sums and fused products go through float64 with rounding to odd (a sticky last
bit), after which one more rounding to a much shorter format is exact. Callers run under `np.errstate(all="ignore")`.

Source: PTX ISA, sections "Floating-Point Instructions", "Half Precision ...", "Mixed Precision ...". NaN results are
0x7fffffff (f32) and 0x7fff (f16, bf16), also those of `neg` and `abs`; f64 passes an operand's NaN on, made quiet. Not pinned
by silicon: the last bits of the `.approx` functions (here the float64 result rounded once; hardware is within a few units),
and which of two NaNs f64 sums and products pass on (the first one here).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from ptxsim.findings import Unsupported
from ptxsim.ptx import Instruction
from ptxsim.registry import Pure, Reader, Source, decoder
from ptxsim.templates import NAMES, pure, register, sources
from ptxsim.values import FULL, Value, mask_of

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
MODES = ("rn", "rz", "rm", "rp")


@dataclass(frozen=True)
class FloatType:
    """A register type: one or two elements of a format.

    Attributes:
        name: as in opcodes.
        bits: of the register.
        element: bits of an element.
        count: elements.
        mantissa: stored mantissa bits.
        nan: the NaN that instructions produce.
    """

    name: str
    bits: int
    element: int
    count: int
    mantissa: int
    nan: int

    @property
    def sign(self) -> int:
        """The sign bit of an element."""
        return 1 << (self.element - 1)

    @property
    def inf(self) -> int:
        """Positive infinity; also the exponent's mask."""
        return self.sign - (1 << self.mantissa)

    @property
    def every(self) -> int:
        """Factor that repeats an element's mask over the register."""
        return 1 if self.count == 1 else 1 | 1 << self.element

    @property
    def dtype(self) -> Any:
        """Type of the arrays that hold an element's bits."""
        return {16: np.uint16, 32: np.uint32, 64: np.uint64}[self.element]


TYPES = {
    t.name: t
    for t in (
        FloatType("f16", 16, 16, 1, 10, 0x7FFF),
        FloatType("bf16", 16, 16, 1, 7, 0x7FFF),
        FloatType("f32", 32, 32, 1, 23, 0x7FFFFFFF),
        FloatType("f64", 64, 64, 1, 52, 0xFFF8 << 48),
        FloatType("f16x2", 32, 16, 2, 10, 0x7FFF),
        FloatType("bf16x2", 32, 16, 2, 7, 0x7FFF),
        FloatType("f32x2", 64, 32, 2, 23, 0x7FFFFFFF),
    )
}
F32, F16, BF16, DOUBLE = TYPES["f32"], TYPES["f16"], TYPES["bf16"], TYPES["f64"]


# ------------------------------------------------------------------------------------------------- registers <-> elements


def elements(value: Value, t: FloatType) -> Array:
    """The bits of the elements: shape (n,), or (n, 2) for packed types; n is 1 for an int, else 32."""
    lanes: Any = value
    if value.__class__ is int:
        lanes = np.array((value,), np.uint64 if t.bits == 64 else np.uint32)
    if t.count == 2:
        return lanes.view(t.dtype).reshape(-1, 2)
    return lanes.astype(np.uint16) if t.bits == 16 else lanes


def registers(bits: Array, t: FloatType) -> Value:
    """Elements' bits as a register value: an int if there is one lane."""
    if t.count == 2:
        bits = np.ascontiguousarray(bits).view(np.uint64 if t.bits == 64 else np.uint32)[:, 0]
    elif t.bits == 16:
        bits = bits.astype(np.uint32)
    return bits if len(bits) == 32 else int(bits[0])


def numbers(bits: Array, t: FloatType) -> Array:
    """Elements' bits as floats: float16, float32 (also for bf16) or float64."""
    if t.element == 16:
        return bits.view(np.float16) if t.mantissa == 10 else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float32 if t.element == 32 else np.float64)


def flush(bits: Array, t: FloatType) -> Array:
    """Subnormal elements as zeros of their sign."""
    small = bits & t.dtype(t.inf) == 0
    return np.where(small, bits & t.dtype(t.sign), bits) if b"\1" in small.tobytes() else bits


def load(value: Value, t: FloatType, ftz: bool = False) -> Array:
    """A register value's elements as float64."""
    bits = elements(value, t)
    return numbers(flush(bits, t) if ftz else bits, t).astype(np.float64)


def store(x: F64, t: FloatType, mode: str = "rn", ftz: bool = False, clamp: str = "") -> Value:
    """Exact (or odd-rounded) float64 results as a register value.

    Args:
        x: the results.
        t: the register's type.
        mode: rounding.
        ftz: results below the normal range become zeros.
        clamp: "sat" for [0, 1] with NaN as 0, "relu" for no negative numbers.
    """
    bits = encode(x, t, mode)
    return registers(finish(bits, t, ftz, clamp), t)


def finish(bits: Array, t: FloatType, ftz: bool, clamp: str) -> Array:
    """Flushes and clamps the bits of results."""
    kind = t.dtype
    if ftz:
        bits = flush(bits, t)
    if clamp:
        nan = (bits & kind(t.sign - 1)) > kind(t.inf)
        negative = (bits & kind(t.sign) != 0) & ~nan
        bits = np.where(negative, kind(0), bits)
        if clamp == "sat":
            one = kind((1 << (t.element - 2)) - (1 << t.mantissa))
            bits = np.where(nan, kind(0), np.minimum(bits, one))
    return bits


# ---------------------------------------------------------------------------------------------------------------- rounding


def odd_sum(p: F64, c: F64) -> F64:
    """p + c in float64, rounded to odd: inexact results have their last bit set, so that a later rounding sees the rest."""
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    bits = s.view(np.int64)
    inexact = ((error > 0) | (error < 0)) & (bits & 1 == 0)
    return np.where(inexact, bits + np.where((error > 0) == (s > 0), 1, -1), bits).view(np.float64)


def odd32(x: F64) -> Array:
    """float64 as the bits of a float32, rounded to odd."""
    near = x.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32)
    inexact = (back != x) & (x == x)
    toward = np.where(inexact & (np.abs(back) > np.abs(x)), bits - np.uint32(1), bits)
    return np.where(inexact, toward | np.uint32(1), toward)


def round_bits(bits: Array, drop: int, mode: str) -> Array:
    """float32 bits rounded to a format with `drop` fewer mantissa bits, still in place; NaNs need care by the caller."""
    one = np.uint32(1)
    if mode == "rn":
        bits = bits + (np.uint32((1 << drop - 1) - 1) + (bits >> np.uint32(drop) & one))
    elif mode == "rna":
        bits = bits + np.uint32(1 << drop - 1)
    elif mode in ("rp", "rm"):
        away = (bits >> np.uint32(31)) == (0 if mode == "rp" else 1)
        bits = np.where(away, bits + np.uint32((1 << drop) - 1), bits)
    return bits & ~np.uint32((1 << drop) - 1)


def directed(near: Array, x: F64, mode: str) -> Array:
    """Corrects results rounded to nearest to another mode; x is odd-rounded or exact."""
    if mode == "rn":
        return near
    kind = near.dtype.type
    back = near.astype(np.float64)
    up, down = np.nextafter(near, kind(np.inf)), np.nextafter(near, kind(-np.inf))
    if mode == "rp":
        return np.where(back < x, up, near)
    if mode == "rm":
        return np.where(back > x, down, near)
    return np.where((back > x) & (x > 0), down, np.where((back < x) & (x < 0), up, near))


def encode(x: F64, t: FloatType, mode: str = "rn") -> Array:
    """float64 as the bits of a format, rounded once; every NaN is the type's own."""
    nan = x != x
    if t.element == 64:
        return np.where(nan, np.uint64(t.nan), x.view(np.uint64)) if nan.any() else x.view(np.uint64)
    if t.element == 16 and t.mantissa == 7:
        bits = (round_bits(odd32(x), 16, mode) >> np.uint32(16)).astype(np.uint16)
    else:
        kind = np.float32 if t.element == 32 else np.float16
        # A directed correction loses the sign of a zero that it steps to.
        near = np.copysign(directed(x.astype(kind), x, mode), x.astype(kind)) if mode != "rn" else x.astype(kind)
        bits = near.view(t.dtype)
    return np.where(nan, t.dtype(t.nan), bits) if b"\1" in nan.tobytes() else bits


QUIET = np.uint64(1 << 51)


def propagated(bits: Array, *operands: F64) -> Array:
    """f64 results with the NaNs that operands pass on, the first NaN operand first."""
    nan = numbers(bits, DOUBLE) != numbers(bits, DOUBLE)
    if b"\1" not in nan.tobytes():
        return bits
    for operand in reversed(operands):
        bits = np.where(nan & (operand != operand), operand.view(np.uint64) | QUIET, bits)
    return bits


# ------------------------------------------------------------------------------------------------------------ f32, the fast


def _f32(value: Value) -> Array:
    return (np.array((value,), np.uint32) if value.__class__ is int else value).view(np.float32)


def _f32x2(value: Value) -> Array:
    wide = np.array((value,), np.uint64) if value.__class__ is int else value
    return wide.view(np.float32).reshape(-1, 2)


def _out32(result: Array) -> Value:
    bits = result.view(np.uint32)
    nan = result != result
    if b"\1" in nan.tobytes():
        bits = np.where(nan, np.uint32(0x7FFFFFFF), bits)
    return bits if len(bits) == 32 else int(bits[0])


def _out32x2(result: Array) -> Value:
    nan = result != result
    if b"\1" in nan.tobytes():
        result = np.where(nan, np.uint32(0x7FFFFFFF), result.view(np.uint32))
    bits = result.view(np.uint64)[:, 0]
    return bits if len(bits) == 32 else int(bits[0])


def fused(a: Array, b: Array, c: Array) -> F64:
    """a * b + c of float32 or shorter numbers, in float64, right for one rounding to float32."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    # A second rounding goes wrong only where the first one landed on the middle between two float32: last 28 bits zero.
    if b"\1" in (total.view(np.int64) & 0x0FFFFFFF == 0).tobytes():
        return odd_sum(product, addend)
    return total


def _bf16(value: Value) -> Array:
    bits = np.array((value,), np.uint32) if value.__class__ is int else value
    return (bits << _SIXTEEN).view(np.float32)


_SIXTEEN = np.uint32(16)
_FAST: dict[tuple[str, str], Callable[..., Value]] = {
    ("add", "f32"): lambda a, b: _out32(_f32(a) + _f32(b)),
    ("sub", "f32"): lambda a, b: _out32(_f32(a) - _f32(b)),
    ("mul", "f32"): lambda a, b: _out32(_f32(a) * _f32(b)),
    ("div", "f32"): lambda a, b: _out32(_f32(a) / _f32(b)),
    ("fma", "f32"): lambda a, b, c: _out32(fused(_f32(a), _f32(b), _f32(c)).astype(np.float32)),
    ("add", "f32x2"): lambda a, b: _out32x2(_f32x2(a) + _f32x2(b)),
    ("sub", "f32x2"): lambda a, b: _out32x2(_f32x2(a) - _f32x2(b)),
    ("mul", "f32x2"): lambda a, b: _out32x2(_f32x2(a) * _f32x2(b)),
    ("fma", "f32x2"): lambda a, b, c: _out32x2(fused(_f32x2(a), _f32x2(b), _f32x2(c)).astype(np.float32)),
}


# --------------------------------------------------------------------------------------------------- exact, all the others


def _exact_f64(op: str, mode: str) -> Callable[..., float]:
    """One float64 operation, correctly rounded in any mode."""
    plain: dict[str, Callable[..., Any]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
        "div": lambda a, b: float(np.float64(a) / np.float64(b)),
    }
    exact = plain[op]

    def one(*args: float) -> float:
        if not all(map(math.isfinite, args)):
            if op == "fma" and all(map(math.isfinite, args[:2])):
                return args[2]
            return exact(*args)
        if op == "div" and args[1] == 0.0:
            return exact(*args)
        total = exact(*map(Fraction, args)) if op != "div" else Fraction(args[0]) / Fraction(args[1])
        if total == 0:
            return _signed_zero(op, mode, args)
        return round_fraction(total, mode)

    return one


def _signed_zero(op: str, mode: str, args: tuple[float, ...]) -> float:
    """The zero that an exact zero result is."""
    sign = math.copysign(1.0, args[0])
    if op in ("mul", "div", "fma"):
        sign *= math.copysign(1.0, args[1])
    if op in ("mul", "div"):
        return math.copysign(0.0, sign)
    other = math.copysign(1.0, args[-1]) * (-1.0 if op == "sub" else 1.0)
    if sign == other and (op != "fma" or args[2] == 0.0):
        return math.copysign(0.0, sign)
    return -0.0 if mode == "rm" else 0.0


def round_fraction(total: Fraction, mode: str) -> float:
    """A fraction as float64 in any rounding mode."""
    try:
        near = float(total)
    except OverflowError:
        near = math.inf if total > 0 else -math.inf
    if mode == "rn" or (math.isfinite(near) and Fraction(near) == total):
        return near
    above = near == math.inf or (near != -math.inf and Fraction(near) > total)
    if above and (mode == "rm" or (mode == "rz" and total > 0)):
        return math.nextafter(near, -math.inf)
    if not above and (mode == "rp" or (mode == "rz" and total < 0)):
        return math.nextafter(near, math.inf)
    return near


def _lane_by_lane(one: Callable[..., float]) -> Callable[..., F64]:
    def compute(*columns: F64) -> F64:
        shaped = np.broadcast_arrays(*columns)
        return np.array([one(*map(float, row)) for row in zip(*shaped, strict=True)], np.float64)

    return compute


def _compute(op: str, mode: str) -> Callable[..., F64]:
    """An operation on float64 copies of f32 or shorter numbers: exact or odd-rounded results."""

    def total(p: F64, c: F64) -> F64:
        result = odd_sum(p, c)
        if mode == "rm":
            # x - x is -0 when rounding down, unless both are +0.
            result = np.where((result == 0) & (np.signbit(p) | np.signbit(c)), -0.0, result)
        return result

    table: dict[str, Callable[..., F64]] = {
        "add": total,
        "sub": lambda a, b: total(a, -b),
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: total(a * b, c),
        # Quotients and roots of 24-bit numbers cannot lie nearer to a 25-bit number than float64 resolves, unless on it.
        "div": lambda a, b: a / b,
    }
    return table[op]


def _function(
    op: str, ins_types: tuple[FloatType, ...], t: FloatType, mode: str, ftz: bool, clamp: str
) -> Callable[..., Value]:
    if t is DOUBLE:
        native = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
        compute = native[op] if mode == "rn" and op in native else _lane_by_lane(_exact_f64(op, mode))
    else:
        if mode == "rn" and not ftz and not clamp and (op, t.name) in _FAST and all(s is t for s in ins_types):
            return _FAST[op, t.name]
        compute = _compute(op, mode)

    if mode == "rn" and not clamp and op == "fma" and t is F32 and ins_types == (BF16, BF16, F32):
        return lambda a, b, c: _out32(fused(_bf16(a), _bf16(b), _f32(c)).astype(np.float32))

    def fn(*srcs: Value) -> Value:
        return store(compute(*(load(v, s, ftz) for v, s in zip(srcs, ins_types, strict=True))), t, mode, ftz, clamp)

    def double(*srcs: Value) -> Value:
        operands = [load(v, t) for v in srcs]
        bits = encode(compute(*operands), t)
        # An H200's DFMA prefers the NaN of b to that of c, and that of c to that of a.
        order = (1, 2, 0) if op == "fma" else (0, 1)
        return registers(propagated(bits, *(operands[i] for i in order)), t)

    return double if t is DOUBLE else fn


@decoder("fma")
def decode_arithmetic(ins: Instruction) -> Pure:
    """`add`, `sub`, `mul`, `fma`, `mad`, `div` on floating-point types."""
    op = {"mad": "fma"}.get(ins.parts[0], ins.parts[0])
    r = Reader(ins)
    if op == "div" and r.peek() in ("approx", "full"):
        return _approximate_division(ins, r)
    mode = r.one_of(*MODES, default="rn")
    ftz = r.take("ftz")
    clamp = "sat" if r.take("sat") else "relu" if op == "fma" and r.take("relu") else ""
    t = TYPES[r.one_of(*TYPES)]
    half = r.one_of("f16", "bf16", default="") if t is F32 and op in ("add", "sub", "fma") else ""
    count = 3 if op == "fma" else 2
    r.end(count + 1)
    legal = {
        "f32": op != "div" or mode is not None,
        "f64": not ftz and not clamp,
        "f32x2": op != "div" and not clamp,
        "f16": op != "div" and mode == "rn",
        "f16x2": op != "div" and mode == "rn",
        "bf16": op != "div" and mode == "rn" and not ftz and clamp != "sat",
        "bf16x2": op != "div" and mode == "rn" and not ftz and clamp != "sat",
    }
    if not legal[t.name] or (clamp == "relu" and t is F32) or (half and ftz):
        raise Unsupported(f"{r.where}: this combination of modifiers is not known")
    kinds = [t] * count
    if half:
        kinds[: count - 1] = [TYPES[half]] * (count - 1)
    fn = _function(op, tuple(kinds), t, mode, ftz, clamp)
    return Pure(fn, (register(ins),), sources(ins, 1, *(kind.bits for kind in kinds)))


def _approximate_division(ins: Instruction, r: Reader) -> Pure:
    """`div.approx` (0 for divisors above 2^126, as a * (1/b) gives) and `div.full`."""
    full = r.one_of("approx", "full") == "full"
    ftz = r.take("ftz")
    r.one_of("f32")
    r.end(3)

    def fn(a: Value, b: Value) -> Value:
        x, y = load(a, F32, ftz), load(b, F32, ftz)
        quotient = x / y if full else np.where(np.abs(y) > 2.0**126, x * np.copysign(0.0, y), x / y)
        return store(quotient, F32, "rn", ftz)

    return Pure(fn, (register(ins),), sources(ins, 1, 32, 32))


# --------------------------------------------------------------------------------------------------------------- functions

_FUNCTIONS: dict[str, Callable[[F64], F64]] = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@decoder("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def decode_function(ins: Instruction) -> Pure:
    """Functions of one number."""
    op = ins.parts[0]
    r = Reader(ins)
    exact = op in ("rcp", "sqrt")
    mode = r.one_of("approx", *(MODES if exact else ()))
    ftz = r.take("ftz")
    halves = ("f16", "f16x2", "bf16", "bf16x2") if op in ("ex2", "tanh") else ()
    t = TYPES[r.one_of("f32", *(("f64",) if exact or op == "rsqrt" else ()), *halves)]
    r.end(2)
    bad_ftz = ftz and (
        op == "tanh" or t.name.startswith("f16") or (t is DOUBLE and not (mode == "approx" and op != "sqrt"))
    )
    if (
        bad_ftz
        or (t.name.startswith("bf16") and op == "ex2" and not ftz)
        or (t is DOUBLE and op == "sqrt" and mode == "approx")
    ):
        raise Unsupported(f"{r.where}: this combination of modifiers is not known")
    rounding = "rn" if mode == "approx" else mode
    compute = _FUNCTIONS[op]
    if t is DOUBLE and mode in ("rz", "rm", "rp"):
        compute = _lane_by_lane(_directed_function(op, mode))

    def fn(a: Value) -> Value:
        x = load(a, t, ftz)
        if t is DOUBLE:
            return registers(finish(propagated(encode(compute(x), t), x), t, ftz, ""), t)
        return store(compute(x), t, rounding, ftz)

    return Pure(fn, (register(ins),), sources(ins, 1, t.bits))


def _directed_function(op: str, mode: str) -> Callable[[float], float]:
    divide = _exact_f64("div", mode)

    def one(x: float) -> float:
        if op == "rcp":
            return divide(1.0, x)
        near = float(np.sqrt(np.float64(x)))
        if not math.isfinite(near) or Fraction(near) ** 2 == Fraction(x):
            return near
        above = Fraction(near) ** 2 > Fraction(x)
        if above and mode in ("rz", "rm"):
            return math.nextafter(near, 0.0)
        return math.nextafter(near, math.inf) if not above and mode == "rp" else near

    return one


@decoder("copysign")
def decode_copysign(ins: Instruction) -> Pure:
    """`copysign`: the sign of a on the value of b."""
    r = Reader(ins)
    t = TYPES[r.one_of("f32", "f64")]
    r.end(3)
    return pure(f"{{0}} & {t.sign} | {{1}} & {t.sign - 1}", (register(ins),), sources(ins, 1, t.bits, t.bits))


def decode_sign(ins: Instruction) -> Pure:
    """`neg` and `abs` on floating-point types; NaNs come out as from any arithmetic (so did an H200)."""
    r = Reader(ins)
    ftz = r.take("ftz")
    t = TYPES[r.one_of(*(name for name in TYPES if name != "f32x2"))]
    r.end(2)
    if ftz and t.name not in ("f32", "f16", "f16x2"):
        raise Unsupported(f"{r.where}: .ftz does not go with .{t.name}")
    sign = t.dtype(t.sign)
    negate = ins.parts[0] == "neg"

    def fn(a: Value) -> Value:
        bits = elements(a, t)
        x = numbers(bits, t)
        nan = x != x
        if ftz:
            bits = flush(bits, t)
        result = bits ^ sign if negate else bits & ~sign
        if b"\1" in nan.tobytes():
            result = np.where(nan, bits | QUIET if t is DOUBLE else t.dtype(t.nan), result)
        return registers(result, t)

    return Pure(fn, (register(ins),), sources(ins, 1, t.bits))


# ------------------------------------------------------------------------------------------------------------- min and max


def larger(a: Array, b: Array, t: FloatType, largest: bool, nan: bool) -> Array:
    """Bits of the larger (or smaller) elements; -0 is below +0; one NaN loses, or wins with `nan`."""
    x, y = numbers(a, t), numbers(b, t)
    x_nan, y_nan = x != x, y != y
    # Not fmin and fmax: what they make of signalling NaNs depends on the host.
    bits = np.where((x > y if largest else x < y) | y_nan, a, b)
    bits = np.where(x == y, a & b if largest else a | b, bits)
    lost = x_nan | y_nan if nan else x_nan & y_nan
    if b"\1" not in lost.tobytes():
        return bits
    return np.where(lost, a | QUIET if t.element == 64 else t.dtype(t.nan), bits)


def _quick_extreme(largest: bool, nan: bool) -> Callable[..., Value]:
    """f32 alone: NumPy's result where it has neither NaNs nor zeros, which need care."""
    pick = np.maximum if largest else np.minimum

    def fn(*srcs: Value) -> Value:
        picked = pick(_f32(srcs[0]), _f32(srcs[1]))
        if len(srcs) == 3:
            picked = pick(picked, _f32(srcs[2]))
        if b"\0" in (np.abs(picked) > _ZERO).tobytes():
            bits = larger(elements(srcs[0], F32), elements(srcs[1], F32), F32, largest, nan)
            if len(srcs) == 3:
                bits = larger(bits, elements(srcs[2], F32), F32, largest, nan)
            return registers(bits, F32)
        return registers(picked.view(np.uint32), F32)

    return fn


_ZERO = np.float32(0)


def decode_extreme(ins: Instruction) -> Pure:
    """`min` and `max` on floating-point types, with two or three inputs."""
    largest = ins.parts[0] == "max"
    r = Reader(ins)
    ftz, nan = r.take("ftz"), r.take("NaN")
    xorsign = r.take("xorsign")
    absolute = r.take("abs")
    t = TYPES[r.one_of(*(name for name in TYPES if name != "f32x2"))]
    count = len(ins.operands) - 1
    r.end()
    three = count == 3
    if (
        count not in (2, 3)
        or (three and (t is not F32 or xorsign))
        or (not three and absolute != xorsign)
        or (t is DOUBLE and (ftz or nan or xorsign))
        or (ftz and t.name.startswith("bf16"))
    ):
        raise Unsupported(f"{r.where}: this combination of modifiers and operands is not known")
    if t is F32 and not (ftz or absolute):
        return Pure(_quick_extreme(largest, nan), (register(ins),), sources(ins, 1, *([32] * count)))
    kind, magnitude = t.dtype, t.dtype(t.sign - 1)

    def fn(*srcs: Value) -> Value:
        bits = [elements(v, t) for v in srcs]
        if ftz:
            bits = [flush(item, t) for item in bits]
        plain = [item & magnitude for item in bits] if absolute else bits
        result = plain[0]
        for other in plain[1:]:
            result = larger(result, other, t, largest, nan)
        if xorsign:
            signed = result | (bits[0] ^ bits[1]) & kind(t.sign)
            result = np.where(result > kind(t.inf), result, signed)
        return registers(result, t)

    return Pure(fn, (register(ins),), sources(ins, 1, *([t.bits] * count)))


# ---------------------------------------------------------------------------------------------------------------- compare

_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: (x < y) | (x > y),
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "neu": lambda x, y: x != y,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: (x == x) & (y == y),
    "nan": lambda x, y: (x != x) | (y != y),
}


def comparison(r: Reader, cmp: str, name: str, ftz: bool) -> str:
    """An expression for a comparison of `{0}` with `{1}`: bool for ints, array else (shape (n, 2) for packed types)."""
    t = TYPES.get(name)
    if t is None or cmp not in _ORDERED or name == "f32x2" or (ftz and name not in ("f32", "f16", "f16x2")):
        raise Unsupported(f"{r.where}: comparison .{cmp} of .{name} is not known here")
    test = _ORDERED[cmp]

    def compare(a: Value, b: Value) -> Any:
        x, y = elements(a, t), elements(b, t)
        if ftz:
            x, y = flush(x, t), flush(y, t)
        flags = test(numbers(x, t), numbers(y, t))
        return flags if len(flags) == 32 or t.count == 2 else bool(flags[0])

    function = f"float_{cmp}_{name}{'_ftz' if ftz else ''}"
    NAMES.setdefault(function, compare)
    return f"{function}({{0}}, {{1}})"


def decode_testp(ins: Instruction) -> Pure:
    """`testp`: the class of a number; zeros count as normal."""
    r = Reader(ins)
    which = r.one_of("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    t = TYPES[r.one_of("f32", "f64")]
    r.end(2)

    def fn(a: Value) -> int:
        magnitude = elements(a, t) & t.dtype(t.sign - 1)
        inf, least = t.dtype(t.inf), t.dtype(1 << t.mantissa)
        flags = {
            "finite": magnitude < inf,
            "infinite": magnitude == inf,
            "number": magnitude <= inf,
            "notanumber": magnitude > inf,
            "normal": (magnitude < inf) & ((magnitude >= least) | (magnitude == 0)),
            "subnormal": (magnitude < least) & (magnitude != 0),
        }[which]
        return mask_of(flags) if len(flags) == 32 else FULL if flags[0] else 0

    return Pure(fn, (register(ins),), (Source(ins.operands[1], t.bits),))
