"""Floating-point arithmetic with fractions: the reference for the simulator's, sharing no code with it."""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """Exponent and mantissa bits, the NaN that results are, and whether the largest exponent means infinity."""

    exponent: int
    mantissa: int
    nan: int
    infinity: bool = True
    largest: int | None = None

    @property
    def bits(self):
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self):
        return (1 << self.exponent - 1) - 1

    @property
    def top(self):
        """Code of the largest finite number."""
        return ((1 << self.exponent) - 1 << self.mantissa) - 1 if self.largest is None else self.largest


F16 = Format(5, 10, 0x7FFF)
BF16 = Format(8, 7, 0x7FFF)
F32 = Format(8, 23, 0x7FFFFFFF)
F64 = Format(11, 52, 0xFFF8 << 48)
E4M3 = Format(4, 3, 0x7F, False, 0x7E)
E5M2 = Format(5, 2, 0x7F)
E2M1 = Format(2, 1, 0x7, False, 0x7)
E2M3 = Format(2, 3, 0x1F, False, 0x1F)
E3M2 = Format(3, 2, 0x1F, False, 0x1F)
BY_NAME = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}

NAN = "nan"


@dataclass(frozen=True)
class Number:
    """A finite fraction with a sign (for zeros), an infinity, or NaN."""

    sign: int
    size: Fraction | str

    @property
    def finite(self):
        return isinstance(self.size, Fraction)

    @property
    def nan(self):
        return self.size == NAN

    @property
    def value(self):
        return -self.size if self.sign else self.size


INF = "inf"
QUIET = Number(0, NAN)


def decode(bits, f):
    sign, magnitude = bits >> f.bits - 1, bits & (1 << f.bits - 1) - 1
    if magnitude > f.top:
        return Number(sign, INF) if f.infinity and magnitude == f.top + 1 else QUIET
    exponent, fraction = magnitude >> f.mantissa, magnitude & (1 << f.mantissa) - 1
    whole = fraction + (1 << f.mantissa if exponent else 0)
    return Number(sign, Fraction(whole) * Fraction(2) ** (max(exponent, 1) - f.bias - f.mantissa))


def round_size(size, f, mode, sign):
    """Code of a positive fraction, rounded; may exceed f.top."""
    code = round_quantum(size, f)
    low, rest = code
    if rest == 0 or mode == "rz" or (mode == "rm" and not sign) or (mode == "rp" and sign):
        return low
    if mode in ("rm", "rp"):
        return low + 1
    if mode == "rna":
        return low + (rest >= Fraction(1, 2))
    return low + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low & 1))


def round_quantum(size, f):
    """(code rounded down, remaining part of a step)."""
    if size == 0:
        return 0, Fraction(0)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    exponent = max(exponent, 1 - f.bias)
    steps = size / Fraction(2) ** (exponent - f.mantissa)
    whole = math.floor(steps)
    return (exponent + f.bias - 1 << f.mantissa) + whole, steps - whole


def encode(number, f, mode="rn", satfinite=False):
    if number.nan:
        return f.nan
    if number.size == INF:
        code = f.top + 1 if f.infinity and not satfinite else f.top
    else:
        code = round_size(number.size, f, mode, number.sign)
        if code > f.top:
            down = mode == "rz" or (mode == "rm" and not number.sign) or (mode == "rp" and number.sign)
            code = f.top if down or satfinite or not f.infinity else f.top + 1
    return code | number.sign << f.bits - 1


def negate(a):
    return a if a.nan else Number(1 - a.sign, a.size)


def from_fraction(value, sign_of_zero):
    return Number(sign_of_zero, Fraction(0)) if value == 0 else Number(int(value < 0), abs(value))


def add(a, b, mode="rn"):
    if a.nan or b.nan:
        return QUIET
    if a.size == INF or b.size == INF:
        if a.size == b.size and a.sign != b.sign:
            return QUIET
        return a if a.size == INF else b
    return from_fraction(a.value + b.value, a.sign if a.sign == b.sign else int(mode == "rm"))


def multiply(a, b):
    sign = a.sign ^ b.sign
    if a.nan or b.nan:
        return QUIET
    if a.size == INF or b.size == INF:
        return QUIET if 0 in (a.size, b.size) else Number(sign, INF)
    return Number(sign, a.size * b.size)


def divide(a, b):
    sign = a.sign ^ b.sign
    if a.nan or b.nan or (a.size == INF and b.size == INF) or (a.size == 0 and b.size == 0):
        return QUIET
    if a.size == INF or b.size == 0:
        return Number(sign, INF)
    return Number(sign, Fraction(0) if b.size == INF else a.size / b.size)


def root(a):
    """Square root as a fraction good for rounding to 53 bits and fewer: exact, or with an odd tail far below."""
    if a.nan or (a.sign and a.size != 0):
        return QUIET
    if a.size in (INF, 0):
        return a
    scale = 2 * (300 + max(0, a.size.denominator.bit_length()))
    shifted = a.size * (1 << scale)
    whole = math.isqrt(math.floor(shifted))
    if whole * whole == shifted:
        return Number(0, Fraction(whole, 1 << scale // 2))
    return Number(0, Fraction(2 * whole + 1, 1 << scale // 2 + 1))


def fma(a, b, c, mode="rn"):
    return add(multiply(a, b), c, mode)


def flush(bits, f):
    exponent_mask = (1 << f.exponent) - 1 << f.mantissa
    return bits if bits & exponent_mask else bits & 1 << f.bits - 1
