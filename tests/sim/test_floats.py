"""Floating-point instructions against fractions."""

import itertools
import math
import random

import exact
import numpy as np
import pytest
from handlers import check, decoded

from ptxsim.findings import Unsupported
from ptxsim.floats import odd_sum

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
REG = {16: "%rs", 32: "%r", 64: "%rd"}
ARITHMETIC = {
    "add": (2, lambda a, b, mode: exact.add(a, b, mode)),
    "sub": (2, lambda a, b, mode: exact.add(a, exact.negate(b), mode)),
    "mul": (2, lambda a, b, mode: exact.multiply(a, b)),
    "div": (2, lambda a, b, mode: exact.divide(a, b)),
    "fma": (3, exact.fma),
}


def special(f):
    """Zeros, ones, subnormals, ends of ranges, infinities, NaNs."""
    one, least = f.bias << f.mantissa, 1 << f.mantissa
    inf = (1 << f.exponent) - 1 << f.mantissa
    some = [
        0,
        1,
        2,
        least - 1,
        least,
        least + 1,
        one,
        one + 1,
        one - 1,
        2 * one,
        inf - 1,
        inf,
        inf + 1,
        f.nan,
        one + least,
    ]
    return [bits | sign for bits in some for sign in (0, 1 << f.bits - 1)]


def random_bits(f, source, near=None):
    """A random number; exponents are near those of `near` half of the time, so that sums round."""
    if near is None or source.random() < 0.4:
        return source.getrandbits(f.bits)
    exponent = (near >> f.mantissa & (1 << f.exponent) - 1) + source.randrange(-f.mantissa - 2, f.mantissa + 3)
    exponent = min(max(exponent, 0), (1 << f.exponent) - 1)
    fraction = source.choice(
        (0, 1, (1 << f.mantissa) - 1, source.getrandbits(f.mantissa), 1 << source.randrange(f.mantissa))
    )
    return source.getrandbits(1) << f.bits - 1 | exponent << f.mantissa | fraction


def columns(f, arity, count=192, seed=0):
    source = random.Random(f"{f} {arity} {seed}")
    rows = list(itertools.product(special(f), repeat=arity)) if arity < 3 else []
    source.shuffle(rows)
    rows = rows[: count // 2]
    while len(rows) < count:
        first = source.choice(special(f)) if source.random() < 0.2 else random_bits(f, source)
        row = [first]
        while len(row) < arity:
            row.append(source.choice(special(f)) if source.random() < 0.2 else random_bits(f, source, first))
        if arity == 3 and source.random() < 0.6:
            # An addend of the product's size, or far below it.
            p = exact.multiply(exact.decode(row[0], f), exact.decode(row[1], f))
            if p.finite:
                row[2] = random_bits(f, source, exact.encode(p, f))
        rows.append(tuple(row))
    return [list(column) for column in zip(*rows, strict=True)]


def reference(fn, f, mode="rn", ftz=False, clamp=""):
    def one(*bits):
        if ftz:
            bits = [exact.flush(b, f) for b in bits]
        out = exact.encode(fn(*(exact.decode(b, f) for b in bits), mode), f, mode)
        out = exact.flush(out, f) if ftz else out
        return clamped(out, f, clamp)

    return one


def clamped(bits, f, clamp):
    nan = bits == f.nan
    negative = bits >> f.bits - 1 and not nan
    if clamp == "relu" and negative:
        return 0
    if clamp == "sat":
        one = f.bias << f.mantissa
        return 0 if nan or negative else min(bits, one)
    return bits


def packed(one, width):
    """The reference of a packed instruction from that of its halves."""
    mask = (1 << width) - 1

    def both(*wide):
        return one(*(w & mask for w in wide)) | one(*(w >> width for w in wide)) << width

    return both


def run(op, name, arity, one, seed=0, count=192, ints=16):
    f = exact.BY_NAME[name.removesuffix("x2")]
    cols = columns(f, arity, count, seed)
    width = f.bits
    if name.endswith("x2"):
        # Every number meets another one in the other half.
        cols = [[a | b << width for a, b in zip(c, c[7:] + c[:7], strict=True)] for c in cols]
        one, width = packed(one, width), 2 * width
    regs = ", ".join(f"{REG[width]}{i}" for i in range(arity + 1))
    check(f"{op}.{name} {regs}", one, *cols, ints=ints)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f16x2", "bf16x2", "f32x2"])
def test_round_to_nearest(op, name):
    arity, fn = ARITHMETIC[op]
    f = exact.BY_NAME[name.removesuffix("x2")]
    run(op if op != "fma" else "fma.rn", name, arity, reference(fn, f))
    if op != "fma":
        run(f"{op}.rn", name, arity, reference(fn, f), seed=1, count=64)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "div"])
@pytest.mark.parametrize("mode", ["rz", "rm", "rp", "rn"])
def test_directed_f32(op, mode):
    arity, fn = ARITHMETIC[op]
    run(f"{op}.{mode}", "f32", arity, reference(fn, exact.F32, mode))
    run(f"{op}.{mode}.ftz", "f32", arity, reference(fn, exact.F32, mode, ftz=True), count=128)
    if op != "div":
        run(f"{op}.{mode}.ftz", "f32x2", arity, reference(fn, exact.F32, mode, ftz=True), count=64)
        run(f"{op}.{mode}.sat", "f32", arity, reference(fn, exact.F32, mode, clamp="sat"), count=96)


def test_clamps_of_halves():
    for name in ("f16", "f16x2"):
        run("fma.rn.sat", name, 3, reference(exact.fma, exact.F16, clamp="sat"), count=96)
        run("fma.rn.ftz.relu", name, 3, reference(exact.fma, exact.F16, ftz=True, clamp="relu"), count=96)
        run("add.ftz.sat", name, 2, reference(ARITHMETIC["add"][1], exact.F16, ftz=True, clamp="sat"), count=96)
    for name in ("bf16", "bf16x2"):
        run("fma.rn.relu", name, 3, reference(exact.fma, exact.BF16, clamp="relu"), count=96)


def passing_nans(one, order=(0,)):
    """f64 passes on the NaN of its operands, first those first in `order`, made quiet; a NaN of its own is negative."""

    def wrapped(*bits):
        for i in order:
            if exact.decode(bits[i], exact.F64).nan:
                return bits[i] | 1 << 51
        return one(*bits)

    return wrapped


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "div"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_f64(op, mode):
    arity, fn = ARITHMETIC[op]
    order = (1, 2, 0) if op == "fma" else (0, 1)
    run(f"{op}.{mode}", "f64", arity, passing_nans(reference(fn, exact.F64, mode), order), count=96, ints=8)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_reciprocal_and_root(mode):
    for name, wrap in (("f32", lambda one: one), ("f64", passing_nans)):
        f = exact.BY_NAME[name]
        one = exact.decode(f.bias << f.mantissa, f)
        run(f"rcp.{mode}", name, 1, wrap(reference(lambda a, m, one=one: exact.divide(one, a), f, mode)), count=64)
        run(f"sqrt.{mode}", name, 1, wrap(reference(lambda a, m: exact.root(a), f, mode)), count=64)
    run(
        f"rcp.{mode}.ftz",
        "f32",
        1,
        reference(lambda a, m: exact.divide(exact.decode(0x3F800000, exact.F32), a), exact.F32, mode, True),
    )


def test_fma_cases_that_double_rounding_gets_wrong():
    """Sums whose float64 value lies on the middle between two float32 numbers, with a tail below it."""
    source = random.Random(5)
    rows = []
    for _ in range(64):
        # (1 + 2**-23) (1 - 2**-23) = 1 - 2**-46: half a unit of c, but for a tail that float64 drops.
        exponent = source.randrange(100, 150)
        sign = source.getrandbits(1) << 31
        rows.append((0x3F800001, sign | exponent - 25 << 23 | 0x7FFFFE, exponent << 23 | source.getrandbits(23) | 1))
        # Subnormal results, where the middle lies higher up in float64.
        rows.append((0x3F800001, sign | 127 - 24 << 23 | 0x7FFFFE, 1))
        rows.append((64 << 23 | source.getrandbits(23), source.randrange(1, 40) << 23 | 1, source.getrandbits(24)))
        # Cancellation: what remains is the product's rounding error.
        x, y = (127 << 23 | source.getrandbits(23) for _ in range(2))
        product = exact.multiply(exact.decode(x, exact.F32), exact.decode(y, exact.F32))
        rows.append((x, y, exact.encode(exact.negate(product), exact.F32)))
    wrong = 0
    for row in rows:
        total = exact.fma(*(exact.decode(bits, exact.F32) for bits in row))
        twice = exact.encode(exact.decode(exact.encode(total, exact.F64), exact.F64), exact.F32)
        wrong += twice != exact.encode(total, exact.F32)
    assert wrong >= 64
    columns = [list(column) for column in zip(*rows, strict=True)]
    for mode in ("rn", "rz", "rm", "rp"):
        check(f"fma.{mode}.f32 %r0, %r1, %r2, %r3", reference(exact.fma, exact.F32, mode), *columns)


def test_odd_sum_keeps_the_tail():
    """1 + 2**-24 + 2**-80 rounds up; through float64 alone it would round to even, down."""
    one, half, tail = (np.full(32, 2.0**-power) for power in (0, 24, 80))
    total = odd_sum(one + half, tail)
    assert (total.astype(np.float32) == np.float32(1 + 2**-23)).all()
    assert ((one + half + tail).astype(np.float32) == 1).all()
    assert (odd_sum(one + half, -tail).astype(np.float32) == 1).all()


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_mixed_precision(name, mode):
    f = exact.BY_NAME[name]
    source = random.Random(name + mode)
    a, b = columns(f, 2, 96)
    c = [
        source.choice(special(exact.F32)) if i % 3 == 0 else random_bits(exact.F32, source, 127 << 23)
        for i in range(96)
    ]

    def fused_reference(x, y, z):
        return exact.encode(
            exact.fma(exact.decode(x, f), exact.decode(y, f), exact.decode(z, exact.F32), mode), exact.F32, mode
        )

    check(f"fma.{mode}.f32.{name} %r0, %rs1, %rs2, %r3", fused_reference, a, b, c)
    for op, sign in (("add", lambda z: z), ("sub", exact.negate)):

        def sum_reference(x, z, sign=sign):
            return exact.encode(exact.add(exact.decode(x, f), sign(exact.decode(z, exact.F32)), mode), exact.F32, mode)

        check(f"{op}.{mode}.f32.{name} %r0, %rs1, %r2", sum_reference, a, c)


def extreme_reference(f, largest, nan=False, ftz=False, absolute=False, xorsign=False):
    def one(*bits):
        if ftz:
            bits = [exact.flush(b, f) for b in bits]
        sign_bit = 1 << f.bits - 1
        sign = (bits[0] ^ bits[1]) & sign_bit
        items = [exact.decode(b & ~sign_bit if absolute else b, f) for b in bits]
        if any(x.nan for x in items) and (nan or all(x.nan for x in items)):
            return bits[0] | 1 << 51 if f is exact.F64 else f.nan

        def key(x):
            size = math.inf if x.size == exact.INF else x.size
            return (-size if x.sign else size, -x.sign)

        best = (max if largest else min)((x for x in items if not x.nan), key=key)
        out = exact.encode(best, f)
        return out | sign if xorsign else out

    return one


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64", "f16x2", "bf16x2"])
def test_min_max(name):
    f = exact.BY_NAME[name.removesuffix("x2")]
    for op, largest in (("min", False), ("max", True)):
        run(op, name, 2, extreme_reference(f, largest))
        if name == "f64":
            continue
        run(f"{op}.NaN", name, 2, extreme_reference(f, largest, nan=True))
        run(f"{op}.xorsign.abs", name, 2, extreme_reference(f, largest, absolute=True, xorsign=True))
        if name in ("f32", "f16"):
            run(f"{op}.ftz.NaN", name, 2, extreme_reference(f, largest, nan=True, ftz=True))
        if name == "f32":
            run(op, name, 3, extreme_reference(f, largest))
            run(f"{op}.NaN", name, 3, extreme_reference(f, largest, nan=True))
            run(f"{op}.ftz.NaN.abs", name, 3, extreme_reference(f, largest, nan=True, ftz=True, absolute=True))


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64", "f16x2", "bf16x2"])
def test_neg_abs(name):
    f = exact.BY_NAME[name.removesuffix("x2")]
    sign = 1 << f.bits - 1

    def one(change, ftz):
        def fn(a):
            if exact.decode(a, f).nan:
                return a | 1 << 51 if f is exact.F64 else f.nan
            return change(exact.flush(a, f) if ftz else a)

        return fn

    for ftz in (False, True) if name in ("f32", "f16", "f16x2") else (False,):
        run("neg.ftz" if ftz else "neg", name, 1, one(lambda a: a ^ sign, ftz), count=64)
        run("abs.ftz" if ftz else "abs", name, 1, one(lambda a: a & ~sign, ftz), count=64)


COMPARE = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


def compare_reference(f, name, ftz=False):
    def one(*bits):
        if ftz:
            bits = [exact.flush(b, f) for b in bits]
        x, y = (exact.decode(b, f) for b in bits)
        unordered = x.nan or y.nan
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        if unordered:
            return name.endswith("u")
        sizes = [(-1) ** z.sign * (math.inf if z.size == exact.INF else z.size) for z in (x, y)]
        return COMPARE[name.removesuffix("u")](*sizes)

    return one


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
def test_setp(name):
    f = exact.BY_NAME[name]
    reg = REG[f.bits]
    a, b = columns(f, 2, 128)
    for cmp in (*COMPARE, *(c + "u" for c in COMPARE), "num", "nan"):
        check(f"setp.{cmp}.{name} %p0, {reg}1, {reg}2", compare_reference(f, cmp), a, b)
    if name == "f32":
        check("setp.lt.ftz.f32 %p0, %r1, %r2", compare_reference(f, "lt", True), a, b)
        check("setp.eq.f32 %p0, %r1, 0f7F800000", lambda x, y: x == y, a)
        check("set.ltu.u32.f32 %r0, %r1, %r2", lambda x, y: 0xFFFFFFFF * compare_reference(f, "ltu")(x, y), a, b)


@pytest.mark.parametrize("name", ["f16x2", "bf16x2"])
def test_packed_setp(name):
    f = exact.BY_NAME[name.removesuffix("x2")]
    a, b = ([x | y << 16 for x, y in zip(c, c[5:] + c[:5], strict=True)] for c in columns(f, 2, 64))
    one = compare_reference(f, "lt")
    check(
        f"setp.lt.{name} %p0|%p1, %r1, %r2",
        lambda x, y: (one(x & 0xFFFF, y & 0xFFFF), one(x >> 16, y >> 16)),
        a,
        b,
    )


def test_testp_and_copysign():
    for name in ("f32", "f64"):
        f = exact.BY_NAME[name]
        reg = REG[f.bits]
        a, b = columns(f, 2, 96)

        def of_class(which, f=f):
            def one(bits):
                x = exact.decode(bits, f)
                subnormal = x.finite and x.size != 0 and exact.flush(bits, f) != bits
                return {
                    "finite": x.finite,
                    "infinite": x.size == exact.INF,
                    "number": not x.nan,
                    "notanumber": x.nan,
                    "normal": x.finite and not subnormal,
                    "subnormal": subnormal,
                }[which]

            return one

        for which in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
            check(f"testp.{which}.{name} %p0, {reg}1", of_class(which), a)
        sign = 1 << f.bits - 1
        check(f"copysign.{name} {reg}0, {reg}1, {reg}2", lambda x, y, s=sign: x & s | y & ~s, a, b)


FUNCTIONS = {
    "ex2": lambda x: 2.0**x,
    "lg2": math.log2,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "sqrt": math.sqrt,
}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_approximate_functions(op):
    """Within one unit of the host's libm for moderate arguments."""
    source = random.Random(op)
    x = np.array([source.uniform(0.01, 20) for _ in range(32)], np.float32)
    want = np.array([FUNCTIONS[op](float(v)) for v in x], np.float32)
    for op_text in {f"{op}.approx.ftz", f"{op}.approx"} - {"tanh.approx.ftz"}:
        got = decoded(f"{op_text}.f32 %r0, %r1").fn(x.view(np.uint32)).view(np.float32)
        assert np.abs(got.view(np.int32).astype(np.int64) - want.view(np.int32)).max() <= 1


def test_approximate_function_specials():
    def bits(op, value):
        return decoded(f"{op}.f32 %r0, %r1").fn(value)

    inf, nan, minus_inf = 0x7F800000, 0x7FFFFFFF, 0xFF800000
    assert bits("ex2.approx.ftz", minus_inf) == 0
    assert bits("ex2.approx.ftz", inf) == inf
    assert bits("ex2.approx.ftz", 0xC2FE0000) == 0  # 2**-127 is subnormal
    assert bits("ex2.approx", 0xC2FE0000) == 0x00400000
    assert bits("ex2.approx.ftz", 0x80000001) == 0x3F800000
    assert bits("lg2.approx.ftz", 1) == minus_inf
    assert bits("lg2.approx", 1) == 0xC3150000  # -149
    assert bits("lg2.approx", 0xBF800000) == nan
    assert bits("rcp.approx.ftz", 0) == inf
    assert bits("rcp.approx.ftz", 0x80000000) == minus_inf
    assert bits("rcp.approx.ftz", 0x7F000000) == 0  # 2**-127
    assert bits("rsqrt.approx.ftz", 0x80000000) == minus_inf
    assert bits("rsqrt.approx.ftz", inf) == 0
    assert bits("sqrt.approx.f32"[:-4], 0xBF800000) == nan
    assert bits("sin.approx", inf) == nan
    assert bits("tanh.approx", inf) == 0x3F800000
    assert decoded("div.approx.f32 %r0, %r1, %r2").fn(0x3F800000, 0x7F000000) == 0
    assert decoded("div.full.f32 %r0, %r1, %r2").fn(0x3F800000, 0x7F000000) == 0x00400000
    assert decoded("div.full.ftz.f32 %r0, %r1, %r2").fn(0x40C00000, 0x40000000) == 0x40400000
    assert decoded("ex2.approx.f16x2 %r0, %r1").fn(0x40003C00) == 0x44004000
    assert decoded("tanh.approx.bf16 %rs0, %rs1").fn(0x7F80) == 0x3F80


@pytest.mark.parametrize(
    "bad",
    [
        "add.rna.f32 %r0, %r1, %r2",
        "add.rz.f16 %rs0, %rs1, %rs2",
        "add.sat.f64 %rd0, %rd1, %rd2",
        "add.ftz.bf16 %rs0, %rs1, %rs2",
        "fma.rn.relu.f32 %r0, %r1, %r2, %r3",
        "fma.rn.oob.f16 %rs0, %rs1, %rs2, %rs3",
        "div.rn.f16 %rs0, %rs1, %rs2",
        "max.NaN.f64 %rd0, %rd1, %rd2",
        "max.f16 %rs0, %rs1, %rs2, %rs3",
        "ex2.rn.f32 %r0, %r1",
        "sin.approx.f16 %rs0, %rs1",
        "setp.lt.ftz.f64 %p0, %rd1, %rd2",
        "neg.ftz.bf16 %rs0, %rs1",
        "sqrt.approx.f64 %rd0, %rd1",
    ],
)
def test_unknown_forms_are_refused(bad):
    with pytest.raises(Unsupported):
        decoded(bad)
