"""Integer, logic, move and compare instructions against Python's own integers."""

import itertools
import random

import numpy as np
import pytest
from handlers import FakeWarp, check, decoded, effect, from_value, numbers, pairs, to_value

from ptxsim.findings import Unsupported
from ptxsim.logic import lut_expression

REG = {8: "%b", 16: "%rs", 32: "%r", 64: "%rd", 1: "%p"}
FULL = 0xFFFFFFFF


def mask(width):
    return (1 << width) - 1


def signed(value, width):
    return value - (1 << width) if value >> (width - 1) else value


def read(value, kind, width):
    return signed(value, width) if kind == "s" else value


def text(op, *widths, literals=()):
    """Operands are registers of the given widths; a negative number n stands for literal n's place."""
    names = []
    for i, width in enumerate(widths):
        names.append(literals[-width - 1] if width < 0 else f"{REG[width]}{i}")
    return f"{op} {', '.join(names)}"


TYPES = [(kind, width) for kind in "us" for width in (16, 32, 64)]


@pytest.mark.parametrize(("kind", "width"), TYPES)
def test_add_sub_mul_lo(kind, width):
    for op, fn in (("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("mul.lo", lambda a, b: a * b)):
        check(
            text(f"{op}.{kind}{width}", width, width, width),
            lambda a, b, fn=fn: fn(a, b) & mask(width),
            *pairs(width, width),
        )
    check(
        text(f"mad.lo.{kind}{width}", *[width] * 4),
        lambda a, b, c: a * b + c & mask(width),
        *pairs(width, width, width),
    )


@pytest.mark.parametrize(("kind", "width"), TYPES)
def test_mul_hi_and_wide(kind, width):
    def hi(a, b):
        return read(a, kind, width) * read(b, kind, width) >> width & mask(width)

    check(text(f"mul.hi.{kind}{width}", width, width, width), hi, *pairs(width, width))
    check(
        text(f"mad.hi.{kind}{width}", *[width] * 4),
        lambda a, b, c: hi(a, b) + c & mask(width),
        *pairs(width, width, width),
    )
    if width < 64:
        wide = 2 * width
        check(
            text(f"mul.wide.{kind}{width}", wide, width, width),
            lambda a, b: read(a, kind, width) * read(b, kind, width) & mask(wide),
            *pairs(width, width),
        )
        check(
            text(f"mad.wide.{kind}{width}", wide, width, width, wide),
            lambda a, b, c: read(a, kind, width) * read(b, kind, width) + c & mask(wide),
            *pairs(width, width, wide),
        )


def test_literals():
    (a,) = pairs(32)
    check("add.s32 %r0, %r1, -5", lambda a, b: a - 5 & FULL, a)
    check("sub.s32 %r0, 0, %r1", lambda a, b: -b & FULL, a)
    check("mul.wide.s32 %rd0, %r1, -3", lambda a, b: signed(a, 32) * -3 & mask(64), a)
    check("mul.hi.u32 %r0, %r1, 0xAAAAAAAB", lambda a, b: a * 0xAAAAAAAB >> 32, a)
    check("setp.lt.s32 %p0, %r1, -1", lambda a, b: signed(a, 32) < -1, a)
    check("min.s32 %r0, %r1, -7", lambda a, b: min(signed(a, 32), -7) & FULL, a)
    check("and.b64 %rd0, %rd1, -16", lambda a, b: a & ~15 & mask(64), *pairs(64))
    check("selp.b32 %r0, -1, 0, %p1", lambda a, b, p: a if p else b, *pairs(1))
    check("selp.b64 %rd0, %rd1, -1, %p1", lambda a, b, p: a if p else b, *pairs(64, 1))


def test_saturating_and_packed():
    a, b = pairs(32, 32)

    def clamp(value):
        return min(max(value, -(1 << 31)), (1 << 31) - 1) & FULL

    check("add.sat.s32 %r0, %r1, %r2", lambda a, b: clamp(signed(a, 32) + signed(b, 32)), a, b)
    check("sub.sat.s32 %r0, %r1, %r2", lambda a, b: clamp(signed(a, 32) - signed(b, 32)), a, b)
    check(
        "mad.hi.sat.s32 %r0, %r1, %r2, %r3",
        lambda a, b, c: clamp((signed(a, 32) * signed(b, 32) >> 32) + signed(c, 32)),
        *pairs(32, 32, 32),
    )

    def halves(fn, kind):
        def one(a, b):
            low = fn(read(a & 0xFFFF, kind, 16), read(b & 0xFFFF, kind, 16)) & 0xFFFF
            return fn(read(a >> 16, kind, 16), read(b >> 16, kind, 16)) & 0xFFFF | 0, low

        return lambda a, b: one(a, b)[0] << 16 | one(a, b)[1]

    for kind in "us":
        check(f"add.{kind}16x2 %r0, %r1, %r2", halves(lambda x, y: x + y, kind), a, b)
        check(f"min.{kind}16x2 %r0, %r1, %r2", halves(min, kind), a, b)
        check(f"max.{kind}16x2 %r0, %r1, %r2", halves(max, kind), a, b)
    check("min.relu.s16x2 %r0, %r1, %r2", halves(lambda x, y: max(min(x, y), 0), "s"), a, b)
    check("max.relu.s32 %r0, %r1, %r2", lambda a, b: max(signed(a, 32), signed(b, 32), 0), a, b)
    check("min.relu.s32 %r0, %r1, %r2", lambda a, b: max(min(signed(a, 32), signed(b, 32)), 0), a, b)


@pytest.mark.parametrize(("kind", "width"), TYPES)
def test_div_rem_min_max_sad(kind, width):
    def quotient(a, b):
        a, b = read(a, kind, width), read(b, kind, width)
        if b == 0:
            return mask(width)
        magnitude = abs(a) // abs(b)
        return (magnitude if (a < 0) == (b < 0) else -magnitude) & mask(width)

    def remainder(a, b):
        if b == 0:
            return a
        return a - quotient(a, b) * b & mask(width)

    three = pairs(width, width, width)
    check(text(f"div.{kind}{width}", width, width, width), quotient, *three[:2])
    check(text(f"rem.{kind}{width}", width, width, width), remainder, *three[:2])
    for name, pick in (("min", min), ("max", max)):
        check(
            text(f"{name}.{kind}{width}", width, width, width),
            lambda a, b, pick=pick: pick(read(a, kind, width), read(b, kind, width)) & mask(width),
            *three[:2],
        )
    check(
        text(f"sad.{kind}{width}", *[width] * 4),
        lambda a, b, c: abs(read(a, kind, width) - read(b, kind, width)) + c & mask(width),
        *three,
    )


@pytest.mark.parametrize("width", [16, 32, 64])
def test_unary(width):
    (a,) = pairs(width)
    check(text(f"neg.s{width}", width, width), lambda a: -a & mask(width), a)
    check(text(f"abs.s{width}", width, width), lambda a: abs(signed(a, width)) & mask(width), a)
    check(text(f"not.b{width}", width, width), lambda a: ~a & mask(width), a)
    check(text(f"cnot.b{width}", width, width), lambda a: int(a == 0), a)


@pytest.mark.parametrize("width", [1, 16, 32, 64])
def test_logic(width):
    kind = "pred" if width == 1 else f"b{width}"
    a, b = pairs(width, width)
    for op, fn in (("and", lambda x, y: x & y), ("or", lambda x, y: x | y), ("xor", lambda x, y: x ^ y)):
        check(text(f"{op}.{kind}", width, width, width), fn, a, b)
    check(text(f"not.{kind}", width, width), lambda a: ~a & mask(width), a)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts(width):
    a = numbers(width)
    amounts = [random.Random(1).choice((0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 1 << 16, FULL)) for _ in a]
    amounts[:15] = [0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 1 << 16, FULL]

    def left(a, n):
        return a << n & mask(width) if n < width else 0

    def right(kind):
        return lambda a, n: read(a, kind, width) >> min(n, width) & mask(width)

    check(text(f"shl.b{width}", width, width, 32), left, a, amounts)
    for kind in "usb":
        check(text(f"shr.{kind}{width}", width, width, 32), right(kind), a, amounts)
    for n in (0, 1, 7, 15, 16, 31, 32, 63, 64, 200):
        for kind in "us":
            shift_literal(f"shr.{kind}{width}", width, n, right(kind), a)
        shift_literal(f"shl.b{width}", width, n, left, a)


def shift_literal(op, width, n, reference, column):
    """Constant amounts are folded into the template: the handler has one source, or none where nothing is left."""
    item = decoded(f"{op} {REG[width]}0, {REG[width]}1, {n}")
    if not item.srcs:
        assert item.fn() == 0
        assert all(reference(a, n) == 0 for a in column)
    else:
        check(f"{op} {REG[width]}0, {REG[width]}1, {n}", lambda a: reference(a, n), column)


def test_funnel_shift():
    a, b, c = pairs(32, 32, 32)
    c = [n if i % 2 else n % 70 for i, n in enumerate(c)]

    def left(a, b, n):
        return ((b << 32 | a) << n >> 32) & FULL

    def right(a, b, n):
        return (b << 32 | a) >> n & FULL

    check("shf.l.wrap.b32 %r0, %r1, %r2, %r3", lambda a, b, c: left(a, b, c & 31), a, b, c)
    check("shf.r.wrap.b32 %r0, %r1, %r2, %r3", lambda a, b, c: right(a, b, c & 31), a, b, c)
    check("shf.l.clamp.b32 %r0, %r1, %r2, %r3", lambda a, b, c: left(a, b, min(c, 32)), a, b, c)
    check("shf.r.clamp.b32 %r0, %r1, %r2, %r3", lambda a, b, c: right(a, b, min(c, 32)), a, b, c)


def lop(a, b, c, lut):
    out = 0
    for i in range(32):
        out |= (lut >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
    return out


def test_lop3():
    a, b, c = pairs(32, 32, 32, count=33)
    for lut in (0x00, 0xFF, 0x96, 0xE8, 0xCA, 0xF8, 0x01, 0x80, 0x6A, 0x3C):
        check(f"lop3.b32 %r0, %r1, %r2, %r3, {lut:#x}", lambda a, b, c, lut=lut: lop(a, b, c, lut), a, b, c, ints=8)
    for lut in range(256):
        got = eval(lut_expression(lut).format(0xF0, 0xCC, 0xAA)) & 0xFF
        assert got == lut
    q = numbers(1, 33)
    check(
        "lop3.or.b32 %r0|%p0, %r1, %r2, %r3, 0xc0, %p1",
        lambda a, b, c, q: (a & b, (a & b != 0) or q),
        a, b, c, q,
    )  # fmt: skip
    check(
        "lop3.and.b32 %r0|%p0, %r1, %r2, %r3, 0xc0, !%p1",
        lambda a, b, c, q: (a & b, (a & b != 0) and q),
        a, b, c, q,
    )  # fmt: skip


def permute(a, b, c):
    source = b << 32 | a
    out = 0
    for i in range(4):
        nibble = c >> 4 * i & 15
        byte = source >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        out |= byte << 8 * i
    return out


def test_prmt():
    a, b, c = pairs(32, 32, 32)
    check("prmt.b32 %r0, %r1, %r2, %r3", permute, a, b, c)
    for selector in (0x5410, 0x7632, 0x3210, 0x0123, 0x7770, 0x3340, 0x6543, 0x4567, 0x0000, 0x1032, 0x2107):
        check(f"prmt.b32 %r0, %r1, %r2, {selector:#x}U", lambda a, b, s=selector: permute(a, b, s), a, b)
    check("prmt.b32 %r0, %r1, %r2, 0x9180", permute, a, b)
    check("prmt.b32 %r0, %r1, 0, 0x7771U", lambda a, b: permute(a, b, 0x7771), a)
    # Selected bytes of each mode, lowest first: PTX ISA, prmt, table of modes.
    tables = {
        "f4e": [0x3210, 0x4321, 0x5432, 0x6543],
        "b4e": [0x5670, 0x6701, 0x7012, 0x0123],
        "rc8": [0x0000, 0x1111, 0x2222, 0x3333],
        "ecl": [0x3210, 0x3211, 0x3222, 0x3333],
        "ecr": [0x0000, 0x1110, 0x2210, 0x3210],
        "rc16": [0x1010, 0x3232, 0x1010, 0x3232],
    }
    for mode, table in tables.items():
        check(f"prmt.b32.{mode} %r0, %r1, %r2, %r3", lambda a, b, c, t=table: permute(a, b, t[c & 3]), a, b, c)


@pytest.mark.parametrize(("kind", "width"), [("u", 32), ("s", 32), ("u", 64), ("s", 64)])
def test_bit_fields(kind, width):
    def extract(a, b, c):
        # Documented for 0 to 255; what lies above is as an H200 does it.
        start, length = (min(b, 255), min(c, 255)) if width == 64 else (b & 255, c & 255)
        msb = width - 1
        sign = a >> min(start + length - 1, msb) & 1 if kind == "s" and length else 0
        return sum((a >> start + i & 1 if i < length and start + i <= msb else sign) << i for i in range(width))

    def insert(a, b, c, d):
        start, length = c & 255, d & 255
        for i in range(length):
            if start + i < width:
                b = b & ~(1 << start + i) | (a >> i & 1) << start + i
        return b

    a, b, c, d = pairs(width, width, 32, 32)
    c = [n % 80 if i % 3 else n for i, n in enumerate(c)]
    d = [n % 40 if i % 3 else n for i, n in enumerate(d)]
    check(text(f"bfe.{kind}{width}", width, width, 32, 32), extract, a, c, d)
    if kind == "u":
        check(text(f"bfi.b{width}", width, width, width, 32, 32), insert, a, b, c, d)
        check(text(f"brev.b{width}", width, width), lambda a: int(f"{a:0{width}b}"[::-1], 2), a)
        check(text(f"clz.b{width}", 32, width), lambda a: width - a.bit_length(), a)
        check(text(f"popc.b{width}", 32, width), lambda a: bin(a).count("1"), a)

    def find(a):
        magnitude = ~a & mask(width) if kind == "s" and a >> (width - 1) else a
        return magnitude.bit_length() - 1 & FULL

    check(text(f"bfind.{kind}{width}", 32, width), find, a)
    check(
        text(f"bfind.shiftamt.{kind}{width}", 32, width),
        lambda a: FULL if find(a) == FULL else width - 1 - find(a),
        a,
    )


def test_rare_integer():
    a, b, c = pairs(32, 32, 32)
    small = [n % 40 for n in b]

    def extended(kind, wrap):
        def one(a, n):
            n = n & 31 if wrap else n
            low = a & mask(min(n, 32))
            if n == 0:
                return 0
            return signed(low, n) & FULL if kind == "s" and n < 32 else low

        return one

    for kind, mode in itertools.product("us", ("wrap", "clamp")):
        check(f"szext.{mode}.{kind}32 %r0, %r1, %r2", extended(kind, mode == "wrap"), a, small)
    check("bmsk.clamp.b32 %r0, %r1, %r2", lambda a, n: mask(min(n, 32)) << a & FULL if a < 32 else 0, small, b)
    check("bmsk.wrap.b32 %r0, %r1, %r2", lambda a, n: mask(n & 31) << (a & 31) & FULL, a, small)

    def dot(count, bits, offset, ka, kb):
        def one(a, b, c):
            for i in range(count):
                x = read(a >> bits * i & mask(bits), ka, bits)
                c += x * read(b >> 8 * (i + offset) & 255, kb, 8)
            return c & FULL

        return one

    for ka, kb in itertools.product("us", "us"):
        check(f"dp4a.{ka}32.{kb}32 %r0, %r1, %r2, %r3", dot(4, 8, 0, ka, kb), a, b, c)
        check(f"dp2a.lo.{ka}32.{kb}32 %r0, %r1, %r2, %r3", dot(2, 16, 0, ka, kb), a, b, c)
        check(f"dp2a.hi.{ka}32.{kb}32 %r0, %r1, %r2, %r3", dot(2, 16, 2, ka, kb), a, b, c)

    def product24(kind, high):
        def one(a, b, c=0):
            p = read(a & mask(24), kind, 24) * read(b & mask(24), kind, 24)
            return (p >> 16 if high else p) + c & FULL

        return one

    for kind in "us":
        check(f"mul24.lo.{kind}32 %r0, %r1, %r2", product24(kind, False), a, b)
        check(f"mul24.hi.{kind}32 %r0, %r1, %r2", product24(kind, True), a, b)
        check(f"mad24.lo.{kind}32 %r0, %r1, %r2, %r3", product24(kind, False), a, b, c)
    # The examples of the PTX ISA.
    fns = decoded("fns.b32 %r0, %r1, %r2, %r3").fn
    assert [fns(0xAAAAAAAA, base, n & FULL) for base, n in ((3, 1), (3, -1), (2, 1), (2, -1))] == [3, 3, 3, 1]
    assert fns(0xAAAAAAAA, 3, 0) == 3
    assert fns(0xAAAAAAAA, 2, 0) == FULL
    assert fns(0x1, 1, 1) == FULL


COMPARE = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


@pytest.mark.parametrize("width", [16, 32, 64])
def test_setp(width):
    a, b = pairs(width, width)
    b[::3] = a[::3]
    for kind, (name, fn) in itertools.product("us", COMPARE.items()):
        check(
            text(f"setp.{name}.{kind}{width}", 1, width, width),
            lambda x, y, fn=fn, kind=kind: fn(read(x, kind, width), read(y, kind, width)),
            a,
            b,
        )
    for name, same in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
        check(text(f"setp.{name}.u{width}", 1, width, width), COMPARE[same], a, b)
    for name in ("eq", "ne"):
        check(text(f"setp.{name}.b{width}", 1, width, width), COMPARE[name], a, b)


def test_setp_combined():
    a, b = pairs(32, 32)
    c = numbers(1)
    for name, fn in (
        ("and", lambda x, y: x and y),
        ("or", lambda x, y: x or y),
        ("xor", lambda x, y: bool(x) != bool(y)),
    ):
        check(
            f"setp.lt.{name}.s32 %p0, %r1, %r2, %p3",
            lambda x, y, c, fn=fn: fn(signed(x, 32) < signed(y, 32), c),
            a,
            b,
            c,
        )
        check(
            f"setp.lt.{name}.u32 %p0|%p1, %r1, %r2, %p3",
            lambda x, y, c, fn=fn: (bool(fn(x < y, c)), bool(fn(not x < y, c))),
            a, b, c,
        )  # fmt: skip
    check("setp.eq.s32 %p0|%p1, %r1, %r2", lambda x, y: (x == y, x != y), a, b)
    check("set.lt.u32.s32 %r0, %r1, %r2", lambda x, y: FULL if signed(x, 32) < signed(y, 32) else 0, a, b)
    check("set.gt.f32.u32 %r0, %r1, %r2", lambda x, y: 0x3F800000 if x > y else 0, a, b)
    check("set.gt.and.u32.u32 %r0, %r1, %r2, %p1", lambda x, y, p: FULL if x > y and p else 0, a, b, c)


def test_select():
    p = numbers(1)
    for width in (16, 32, 64):
        a, b = pairs(width, width)
        check(text(f"selp.b{width}", width, width, width, 1), lambda x, y, q: x if q else y, a, b, p)
    a, b, c = pairs(32, 32, 32)
    check("slct.b32.s32 %r0, %r1, %r2, %r3", lambda x, y, z: x if signed(z, 32) >= 0 else y, a, b, c)
    c[:8] = [0x80000000, 0x80000001, 0x7FC00000, 0x7F800000, 0xFF800000, 0x807FFFFF, 0x3F800000, 0xBF800000]

    def chosen(ftz):
        def one(x, y, z):
            number = float(np.uint32(z).view(np.float32))
            if ftz and abs(number) < 2.0**-126:
                number = 0.0
            return x if number >= 0 else y

        return one

    check("slct.b32.f32 %r0, %r1, %r2, %r3", chosen(False), a, b, c)
    check("slct.ftz.b32.f32 %r0, %r1, %r2, %r3", chosen(True), a, b, c)
    check("slct.b64.s32 %rd0, %rd1, %rd2, %r3", lambda x, y, z: x if signed(z, 32) >= 0 else y, *pairs(64, 64), c)


def test_mov():
    for kind, width in (("b16", 16), ("u32", 32), ("f32", 32), ("b64", 64), ("pred", 1)):
        check(text(f"mov.{kind}", width, width), lambda a: a, *pairs(width))
    check("mov.b32 %r0, {%rs0, %rs1}", lambda a, b: a | b << 16, *pairs(16, 16))
    check("mov.b16 %rs0, {%b0, %b1}", lambda a, b: a | b << 8, *pairs(8, 8))
    check("mov.b64 %rd0, {%r0, %r1}", lambda a, b: a | b << 32, *pairs(32, 32))
    check("mov.b64 %rd0, {%r0, 5}", lambda a, b: a | b << 32, *pairs(32))

    def packed(width):
        return lambda *items: sum(item << width * i for i, item in enumerate(items))

    check("mov.b32 %r0, {%b0, %b1, %b2, %b3}", packed(8), *pairs(8, 8, 8, 8))
    check("mov.b64 %rd0, {%rs0, %rs1, %rs2, %rs3}", packed(16), *pairs(16, 16, 16, 16))
    check("mov.b128 %q0, {%rd0, %rd1}", packed(64), *pairs(64, 64))
    check("mov.b128 %q0, {%r0, %r1, %r2, %r3}", packed(32), *pairs(32, 32, 32, 32))
    check("mov.b64 {%r0, %r1}, %rd0", lambda a: (a & FULL, a >> 32), *pairs(64))
    check("mov.b64 {_, %r1}, %rd0", lambda a: a >> 32, *pairs(64))
    check("mov.b64 {%r0, _}, %rd0", lambda a: a & FULL, *pairs(64))
    check("mov.b32 {%rs0, %rs1}, %r0", lambda a: (a & 0xFFFF, a >> 16), *pairs(32))
    check("mov.b32 {%b0, _, %b1, _}, %r0", lambda a: (a & 255, a >> 16 & 255), *pairs(32))
    check("mov.b32 {_, %b0, _, _}, %r0", lambda a: a >> 8 & 255, *pairs(32))
    check("mov.b64 {%rs0, %rs1, %rs2, %rs3}, %rd0", lambda a: tuple(a >> 16 * i & 0xFFFF for i in range(4)), *pairs(64))
    check("mov.b64 {_, _, %rs2, _}, %rd0", lambda a: a >> 32 & 0xFFFF, *pairs(64))
    low, high = pairs(64, 64, count=32)
    for low_form, high_form in ((low, high), (low[0], high), (low[0], high[0])):
        value = (to_value(low_form, 64), to_value(high_form, 64))
        first, second = decoded("mov.b128 {%rd0, %rd1}, %q0").fn(value)
        assert from_value(first, 64) == ([low_form] * 32 if isinstance(low_form, int) else low_form)
        assert from_value(second, 64) == ([high_form] * 32 if isinstance(high_form, int) else high_form)
    assert decoded("mov.pred %p0, -1").fn() == FULL
    assert decoded("mov.pred %p0, 0").fn() == 0


def test_carry():
    """A 128-bit sum and difference out of 32-bit words, by parts of a warp."""
    rng = random.Random(0)
    a = [rng.getrandbits(128) if i % 4 else (1 << 128) - 1 for i in range(32)]
    b = [rng.getrandbits(128) if i % 5 else 1 for i in range(32)]
    for first, middle, last, fn in (
        ("add.cc.u32", "addc.cc.u32", "addc.u32", lambda x, y: x + y),
        ("sub.cc.u32", "subc.cc.u32", "subc.u32", lambda x, y: x - y),
    ):
        w = FakeWarp()
        total = [0] * 32
        for i, op in enumerate((first, middle, middle, last)):
            item = effect(f"{op} %r0, %r1, %r2")
            columns = [to_value([x >> 32 * i & FULL for x in column], 32) for column in (a, b)]
            parts = [item.run(w, lanes, *columns) for lanes in (0x0000FFFF, 0xFFFF0000)]
            for lane in range(32):
                total[lane] |= from_value(parts[lane // 16], 32)[lane] << 32 * i
        assert total == [fn(x, y) & mask(128) for x, y in zip(a, b, strict=True)]
    w = FakeWarp()
    low, high = effect("mad.lo.cc.u32 %r0, %r1, %r2, %r3"), effect("madc.hi.u32 %r0, %r1, %r2, %r3")
    x, y, z = ([n & FULL for n in numbers(32, 32, seed)] for seed in range(3))
    args = [to_value(column, 32) for column in (x, y)]
    lows = from_value(low.run(w, FULL, *args, to_value(z, 32)), 32)
    highs = from_value(high.run(w, FULL, *args, 0), 32)
    assert [p | q << 32 for p, q in zip(lows, highs, strict=True)] == [
        p * q + r for p, q, r in zip(x, y, z, strict=True)
    ]


@pytest.mark.parametrize(
    "bad",
    [
        "add.b32 %r0, %r1, %r2",
        "add.sat.u32 %r0, %r1, %r2",
        "mul.s32 %r0, %r1, %r2",
        "mul.wide.s64 %rd0, %rd1, %rd2",
        "and.u32 %r0, %r1, %r2",
        "shl.u32 %r0, %r1, %r2",
        "setp.lt.b32 %p0, %r1, %r2",
        "setp.hs.s32 %p0, %r1, %r2",
        "setp.lt.ftz.s32 %p0, %r1, %r2",
        "setp.foo.s32 %p0, %r1, %r2",
        "lop3.b32 %r0, %r1, %r2, %r3, %r4",
        "prmt.b32.xyz %r0, %r1, %r2, %r3",
        "min.relu.u32 %r0, %r1, %r2",
        "mov.b99 %r0, %r1",
        "mov.v2.b32 %r0, %r1",
        "neg.u32 %r0, %r1",
        "add.s32 %r0, %r1",
    ],
)
def test_unknown_forms_are_refused(bad):
    with pytest.raises(Unsupported):
        decoded(bad)
