"""Conversions against fractions."""

import itertools
import math
import random
from fractions import Fraction

import exact
import numpy as np
import pytest
from handlers import check, decoded, numbers
from test_floats import columns, random_bits, special

from ptxsim.convert import SMALL, half_values
from ptxsim.findings import Unsupported

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
REG = {8: "%b", 16: "%rs", 32: "%r", 64: "%rd"}
INTS = [(kind, width) for kind in "us" for width in (8, 16, 32, 64)]
SMALL_FORMATS = {"e4m3": exact.E4M3, "e5m2": exact.E5M2, "e2m1": exact.E2M1, "e2m3": exact.E2M3, "e3m2": exact.E3M2}


def signed(value, width):
    return value - (1 << width) if value >> (width - 1) else value


def limits(kind, width):
    return (-(1 << width - 1), (1 << width - 1) - 1) if kind == "s" else (0, (1 << width) - 1)


def read(value, kind, width):
    value &= (1 << width) - 1
    return signed(value, width) if kind == "s" else value


@pytest.mark.parametrize("source", INTS)
@pytest.mark.parametrize("target", INTS)
def test_int_to_int(source, target):
    """Registers may be wider than the types: sources are cut, results extended."""
    (a_kind, a_width), (d_kind, d_width) = source, target
    for a_reg, d_reg in {(max(a_width, 16), max(d_width, 16)), (a_width, 64), (32, max(d_width, 32))}:
        if a_reg < a_width:
            continue
        column = numbers(a_reg, 32)

        def plain(a, d_reg=d_reg):
            value = read(read(a, a_kind, a_width), d_kind, d_width)
            return value & (1 << d_reg) - 1

        def saturated(a, d_reg=d_reg):
            low, high = limits(d_kind, d_width)
            return min(max(read(a, a_kind, a_width), low), high) & (1 << d_reg) - 1

        types = f"{d_kind}{d_width}.{a_kind}{a_width} {REG[d_reg]}0, {REG[a_reg]}1"
        check(f"cvt.{types}", plain, column, ints=8)
        check(f"cvt.sat.{types}", saturated, column, ints=8)


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("kind", ["u", "s"])
def test_int_to_float(name, kind):
    f = exact.BY_NAME[name]
    for width in (8, 16, 32, 64):
        source = max(width, 16)
        column = numbers(source, 64)
        # Numbers on and near the middle between two results.
        column[-24:] = [
            (1 << source - 1 | 1 << max(source - 2 - f.mantissa, 0)) + d & (1 << source) - 1 for d in range(-12, 12)
        ]
        for mode in ("rn", "rz", "rm", "rp"):

            def one(a, width=width, mode=mode):
                return exact.encode(exact.from_fraction(Fraction(read(a, kind, width)), 0), f, mode)

            check(f"cvt.{mode}.{name}.{kind}{width} {REG[f.bits]}0, {REG[source]}1", one, column, ints=8)


ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("mode", list(ROUND))
def test_float_to_int(name, mode):
    f = exact.BY_NAME[name]
    (column,) = columns(f, 1, 64)
    source = random.Random(name)
    while len(column) < 128:
        # Near the middle between two integers, and near the ends of the types.
        value = Fraction(source.choice((0, 1, 2, 127, 128, 255, 2**15, 2**31, 2**32, 2**63, 2**64))) + Fraction(
            source.randrange(-4, 5), 2
        )
        column.append(exact.encode(exact.from_fraction(value * source.choice((1, -1)), 0), f))
    for kind, width in INTS:
        low, high = limits(kind, width)
        register = max(width, 16)

        def one(bits, kind=kind, width=width, low=low, high=high, register=register, ftz=False):
            x = exact.decode(exact.flush(bits, f) if ftz else bits, f)
            if x.nan:
                value = 1 << width - 1 if name == "f64" or width == 64 else 0
                return signed(value, width) & (1 << register) - 1 if kind == "s" else value
            value = (low if x.sign else high) if x.size == exact.INF else ROUND[mode](x.value)
            return min(max(value, low), high) & (1 << register) - 1

        check(f"cvt.{mode}.{kind}{width}.{name} {REG[register]}0, {REG[f.bits]}1", one, column, ints=8)
        if name == "f32":
            check(
                f"cvt.{mode}.ftz.{kind}{width}.f32 {REG[register]}0, %r1",
                lambda a, one=one: one(a, ftz=True),
                column,
                ints=4,
            )


@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("target", ["f16", "bf16", "f32", "f64"])
def test_float_to_float(source, target):
    a, d = exact.BY_NAME[source], exact.BY_NAME[target]
    (column,) = columns(a, 1, 160)
    picked = random.Random(source + target)
    for _ in range(64):
        # On or next to the middle between two results, also subnormal ones.
        code = picked.choice((picked.getrandbits(d.bits - 1), picked.getrandbits(d.mantissa), d.top))
        low, high = (exact.decode(min(c, d.top), d).size for c in (code, code + 1))
        bits = exact.encode(exact.from_fraction((low + high) / 2, 0), a)
        column.append(max(bits + picked.randrange(-1, 2), 0) | picked.getrandbits(1) << a.bits - 1)
    wide = d.mantissa >= a.mantissa and d.exponent >= a.exponent
    head = f"{target}.{source} {REG[d.bits]}0, {REG[a.bits]}1"
    if wide:

        def exactly(bits):
            x = exact.decode(bits, a)
            if (source, target) == ("bf16", "f32"):
                return bits << 16
            if x.nan and target == "f64":
                payload = bits & (1 << a.mantissa) - 1
                return bits >> a.bits - 1 << 63 | 0x7FF8 << 48 | payload << 52 - a.mantissa
            return exact.encode(x, d)

        check(f"cvt.{head}", exactly, column)
    else:
        for mode in ("rn", "rz", "rm", "rp"):

            def narrow(bits, mode=mode):
                x = exact.decode(bits, a)
                if x.nan and source == "f64":
                    return bits >> 63 << d.bits - 1 | (1 << d.exponent) - 1 << d.mantissa | 1 << d.mantissa - 1
                return exact.encode(x, d, mode)

            check(f"cvt.{mode}.{head}", narrow, column)
    if source == target:
        for mode, fn in ROUND.items():

            def whole(bits, fn=fn):
                x = exact.decode(bits, a)
                if x.nan and source == "f64":
                    return bits | 1 << 51
                return exact.encode(exact.from_fraction(Fraction(fn(x.value)), x.sign) if x.finite else x, a)

            check(f"cvt.{mode}.{head}", whole, column)


def test_float_to_float_modifiers():
    (column,) = columns(exact.F32, 1, 128)

    def sat(bits):
        x = exact.decode(bits, exact.F32)
        if x.nan or x.sign:
            return 0
        return min(bits, 0x3F800000)

    check("cvt.sat.f32.f32 %r0, %r1", sat, column)
    check(
        "cvt.ftz.f32.f32 %r0, %r1",
        lambda b: exact.encode(exact.decode(exact.flush(b, exact.F32), exact.F32), exact.F32),
        column,
    )
    for name, f in (("f16", exact.F16), ("bf16", exact.BF16)):
        for mode in ("rn", "rz"):

            def narrow(bits, f=f, mode=mode, relu=False, satfinite=False):
                x = exact.decode(bits, exact.F32)
                out = exact.encode(x, f, mode, satfinite)
                return 0 if relu and x.sign and not x.nan else out

            for relu in (False, True):
                for fin in (False, True):
                    text = f"cvt.{mode}{'.relu' if relu else ''}{'.satfinite' if fin else ''}.{name}"

                    def one(b, n=narrow, r=relu, s=fin):
                        return n(b, relu=r, satfinite=s)

                    check(f"{text}.f32 %rs0, %r1", one, column, ints=8)
                    check(
                        f"{text}x2.f32 %r0, %r1, %r2",
                        lambda a, b, one=one: one(a) << 16 | one(b),
                        column,
                        column[9:] + column[:9],
                        ints=8,
                    )


@pytest.mark.parametrize("mode", ["rn", "rz", "rna"])
def test_tf32(mode):
    (column,) = columns(exact.F32, 1, 128)
    column[:32] = [0x3F800000 + (i << 9) for i in range(32)]
    tf32 = exact.Format(8, 10, 0x3FFFF)

    def one(bits, satfinite=False):
        x = exact.decode(bits, exact.F32)
        if not x.nan:
            return exact.encode(x, tf32, mode, satfinite) << 13
        if mode != "rna":
            return 0x7FFFE000
        # Seen on an H200: NaNs are cut short, or one step below that.
        return (bits & ~0x1FFF) - (0x2000 if satfinite else 0)

    check(f"cvt.{mode}.tf32.f32 %r0, %r1", one, column)
    check(f"cvt.{mode}.satfinite.tf32.f32 %r0, %r1", lambda b: one(b, True), column)


def small_inputs(f, source_format):
    """Every number of a small format, the middles between them, and their neighbours; specials; random ones."""
    out = special(source_format)
    values = [exact.decode(code, f).size for code in range(f.top + 1)]
    middles = [(x + y) / 2 for x, y in itertools.pairwise(values)]
    source = random.Random(str(f))
    top = values[-1]
    for value in (*values, *middles, top * 2, top * Fraction(17, 16), top + (top - values[-2]) / 2):
        bits = exact.encode(exact.from_fraction(value, 0), source_format, "rz")
        for near in (-1, 0, 1):
            out.append(max(bits + near, 0) | source.getrandbits(1) << source_format.bits - 1)
    out += [random_bits(source_format, source) for _ in range(32)]
    return out + out[: -len(out) % 32]


@pytest.mark.parametrize("name", list(SMALL_FORMATS))
def test_to_small_formats(name):
    f = SMALL_FORMATS[name]
    slot = 4 if name == "e2m1" else 8
    target = "%b" if slot == 4 else "%rs"

    def one(bits, source, relu=False):
        x = exact.decode(bits, source)
        if relu and x.sign and not x.nan:
            return 0
        return exact.encode(x, f, "rn", satfinite=True)

    column = small_inputs(f, exact.F32)
    other = column[5:] + column[:5]
    for relu in (False, True):
        head = f"cvt.rn.satfinite{'.relu' if relu else ''}.{name}x2"

        def pair(a, b, relu=relu):
            return one(a, exact.F32, relu) << slot | one(b, exact.F32, relu)

        check(f"{head}.f32 {target}0, %r1, %r2", pair, column, other, ints=16)
        for half, source in (("f16", exact.F16), ("bf16", exact.BF16)):
            packed = small_inputs(f, source)
            packed = [x << 16 | y for x, y in zip(packed, packed[3:] + packed[:3], strict=True)]

            def halves(a, source=source, relu=relu):
                return one(a >> 16, source, relu) << slot | one(a & 0xFFFF, source, relu)

            check(f"{head}.{half}x2 {target}0, %r1", halves, packed, ints=8)


def test_known_codes():
    """Spelled-out cases, so that the reference cannot share a mistake with the simulator."""
    e2m1 = decoded("cvt.rn.satfinite.e2m1x2.f32 %b0, %r1, %r2").fn

    def f32(value):
        return int(np.float32(value).view(np.uint32))

    # The first source goes to the high nibble; ties go to the even code: 2.5 -> 2, 3.5 -> 4, 5 -> 4, 0.25 -> 0, 0.75 -> 1.
    assert e2m1(f32(1.0), f32(-6.0)) == 0x2F
    assert [e2m1(0, f32(v)) for v in (2.5, 3.5, 5.0, 0.25, 0.75, 1.25, 1.75, 100.0, 5.01)] == [
        4,
        6,
        6,
        0,
        2,
        2,
        4,
        7,
        7,
    ]
    assert e2m1(f32(math.nan), f32(-math.inf)) == 0x7F
    e4m3 = decoded("cvt.rn.satfinite.e4m3x2.f32 %rs0, %r1, %r2").fn
    assert e4m3(f32(448.0), f32(1.0)) == 0x7E38
    assert e4m3(f32(1e9), f32(-math.inf)) == 0x7EFE
    assert e4m3(f32(math.nan), f32(2.0**-9)) == 0x7F01
    assert e4m3(f32(2.0**-10), f32(1.5 * 2.0**-9)) == 0x0002
    back = decoded("cvt.rn.f16x2.e2m1x2 %r0, %b1").fn
    assert back(0xF2) == 0xC6003C00  # high nibble -6, low nibble 1
    assert decoded("cvt.rn.f16x2.e4m3x2 %r0, %rs1").fn(0x7E38) == 0x5F003C00
    assert decoded("cvt.rn.f16x2.e4m3x2 %r0, %rs1").fn(0x7FFF) == 0x7FFF7FFF
    assert decoded("cvt.rn.f16x2.e5m2x2 %r0, %rs1").fn(0x7CFC) == 0x7C00FC00
    assert decoded("cvt.rn.bf16x2.f32 %r0, %r1, %r2").fn(f32(1.0), f32(2.0)) == 0x3F804000
    assert decoded("cvt.rn.f16x2.f32 %r0, %r1, %r2").fn(f32(1.0), f32(2.0)) == 0x3C004000
    assert decoded("cvt.rzi.s32.f32 %r0, %r1").fn(f32(-1.9)) == 0xFFFFFFFF
    assert decoded("cvt.rni.s32.f32 %r0, %r1").fn(f32(2.5)) == 2


@pytest.mark.parametrize("name", list(SMALL_FORMATS))
def test_from_small_formats(name):
    f = SMALL_FORMATS[name]
    slot = 4 if name == "e2m1" else 8
    source = "%b" if slot == 4 else "%rs"
    codes = 1 << f.bits
    column = [high << slot | low for high in range(codes) for low in (high, (high * 7 + 3) % codes)]

    def half(code, relu):
        x = exact.decode(code, f)
        return 0 if relu and x.sign and not x.nan else exact.encode(x, exact.F16)

    for relu in (False, True):
        check(
            f"cvt.rn{'.relu' if relu else ''}.f16x2.{name}x2 %r0, {source}1",
            lambda a, relu=relu: half(a >> slot, relu) << 16 | half(a & (1 << slot) - 1, relu),
            column,
        )
    values = half_values(name)
    assert len(values) == 1 << SMALL[name].slot


def scale(bits, up, satfinite, f):
    x = exact.decode(bits, f)
    if x.nan:
        return 255
    if x.size == exact.INF:
        return 254 if satfinite else 255
    if x.size == 0:
        return 0
    exponent = math.floor(math.log2(x.size.numerator) - math.log2(x.size.denominator))
    while Fraction(2) ** exponent > x.size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= x.size:
        exponent += 1
    exponent += up and Fraction(2) ** exponent != x.size
    return min(max(exponent + 127, 0), 254 if satfinite else 255)


def test_scales():
    (a,) = columns(exact.F32, 1, 96)
    b = a[5:] + a[:5]
    for mode in ("rz", "rp"):
        for fin in ("", ".satfinite"):

            def one(bits, f=exact.F32, mode=mode, fin=fin):
                return scale(bits, mode == "rp", bool(fin), f)

            check(f"cvt.{mode}{fin}.ue8m0x2.f32 %rs0, %r1, %r2", lambda x, y, one=one: one(x) << 8 | one(y), a, b)
            check(
                f"cvt.{mode}{fin}.ue8m0x2.bf16x2 %rs0, %r1",
                lambda x, one=one: one(x >> 16, exact.BF16) << 8 | one(x & 0xFFFF, exact.BF16),
                a,
            )
    column = [(255 - code) << 8 | code for code in range(256)]

    def number(code):
        return 0x7FFF if code == 255 else exact.encode(exact.from_fraction(Fraction(2) ** (code - 127), 0), exact.BF16)

    check("cvt.rn.bf16x2.ue8m0x2 %r0, %rs1", lambda x: number(x >> 8) << 16 | number(x & 255), column)


def test_pack():
    a, b, c = (numbers(32, 64, seed) for seed in range(3))
    for kind, width in (("u", 16), ("s", 16), ("u", 8), ("s", 8), ("u", 4), ("s", 4), ("u", 2), ("s", 2)):
        low, high = limits(kind, width)

        def clamp(x, low=low, high=high, width=width):
            return min(max(signed(x, 32), low), high) & (1 << width) - 1

        if width == 16:
            check(f"cvt.pack.sat.{kind}16.s32 %r0, %r1, %r2", lambda x, y, f=clamp: f(x) << 16 | f(y), a, b)
        else:
            check(
                f"cvt.pack.sat.{kind}{width}.s32.b32 %r0, %r1, %r2, %r3",
                lambda x, y, z, f=clamp, w=width: f(x) << w | f(y) | z << 2 * w & 0xFFFFFFFF,
                a, b, c,
            )  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        "cvt.f32.s32 %r0, %r1",
        "cvt.s32.f32 %r0, %r1",
        "cvt.rn.s32.f32 %r0, %r1",
        "cvt.rni.f32.s32 %r0, %r1",
        "cvt.f16.f32 %rs0, %r1",
        "cvt.rn.f32.f16 %r0, %rs1",
        "cvt.rn.e4m3x2.f32 %rs0, %r1, %r2",
        "cvt.rs.f16x2.f32 %r0, %r1, %r2, %r3",
        "cvt.rs.satfinite.e2m1x4.f32 %rs0, {%r1, %r2, %r3, %r4}, %r5",
        "cvt.rn.ue8m0x2.f32 %rs0, %r1, %r2",
        "cvt.rn.relu.s32.s16 %r0, %rs1",
        "cvt.rn.satfinite.e2m1x2.f32 %b0, %r1",
    ],
)
def test_unknown_forms_are_refused(bad):
    with pytest.raises(Unsupported):
        decoded(bad)
