"""Integer arithmetic; importing this module also registers moves, logic and comparisons.

Source: PTX ISA, "Integer Arithmetic Instructions", "Extended-Precision Integer Arithmetic Instructions". Not pinned by
silicon: the results of a division by zero (all ones; the remainder is the dividend).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim import compare, floats, logic, moves
from ptxsim.findings import Unsupported
from ptxsim.lanes import (
    INT_TYPES,
    as_int,
    by_lanes,
    dtype_of,
    int_type,
    narrow,
    ones,
    same_form,
    signed_int,
    wide_factor,
    wide_lanes,
)
from ptxsim.ptx import Instruction
from ptxsim.registry import Effect, Pure, Reader, Source, decoder
from ptxsim.templates import guarded, helper, pure, register, sources
from ptxsim.values import FULL, M32, M64, Value, bools, lanes32, lanes64, mask_of, signed64

__all__ = ["compare", "decode_add", "logic", "moves"]


def is_float(ins: Instruction) -> bool:
    """True if an arithmetic opcode works on floating-point types."""
    return any(part in floats.TYPES for part in ins.parts[1:])


_CARRY = "carry flag"


def _carry_in(w: Any) -> int:
    return w.state.get(_CARRY, 0)


def _carry_out(w: Any, mask: int, flags: Any) -> None:
    bits = mask_of(flags) if flags.__class__ is not bool else FULL if flags else 0
    w.state[_CARRY] = w.state.get(_CARRY, 0) & ~mask | bits & mask


def _carried(
    w: Any, mask: int, first: np.ndarray, second: np.ndarray, width: int, subtract: bool, use: bool, keep: bool
) -> Value:
    """first +- second +- carry, lanes of object type: Python's own integers never overflow."""
    carry = bools(_carry_in(w)).astype(object) * 1 if use else 0
    total = first - second - carry if subtract else first + second + carry
    wrapped = np.array([int(t) & ones(width) for t in total], dtype_of(width))
    if keep:
        _carry_out(w, mask, np.array([not 0 <= int(t) <= ones(width) for t in total]))
    return wrapped


def _objects(value: Value) -> np.ndarray:
    return lanes64(value).astype(object)


def _extended(ins: Instruction, subtract: bool) -> Effect:
    """add.cc, addc, sub.cc, subc: the carry flag is one mask of the warp."""
    r = Reader(ins)
    keep = r.take("cc")
    _, width = int_type(r, widths=(32, 64))
    r.end(3)
    use = ins.parts[0].endswith("c")

    def run(w: Any, mask: int, a: Value, b: Value) -> Value:
        return _carried(w, mask, _objects(a), _objects(b), width, subtract, use, keep)

    return Effect(run, (register(ins),), sources(ins, 1, width, width))


def _mad_extended(ins: Instruction) -> Effect:
    r = Reader(ins)
    high = r.one_of("lo", "hi") == "hi"
    keep = r.take("cc")
    signed, width = int_type(r, widths=(32, 64))
    r.end(4)
    use = ins.parts[0] == "madc"

    def run(w: Any, mask: int, a: Value, b: Value, c: Value) -> Value:
        x, y = (wide_lanes(v, width, signed).astype(object) for v in (a, b))
        product = np.array([(int(p) >> width if high else int(p)) & ones(width) for p in x * y], object)
        return _carried(w, mask, product, _objects(c), width, False, use, keep)

    return Effect(run, (register(ins),), sources(ins, 1, width, width, width))


decoder("addc")(lambda ins: _extended(ins, False))


decoder("subc")(lambda ins: _extended(ins, True))


decoder("madc")(_mad_extended)


@decoder("add", "sub")
def decode_add(ins: Instruction) -> Pure | Effect:
    """`add` and `sub`."""
    if is_float(ins):
        return floats.decode_arithmetic(ins)
    subtract = ins.parts[0] == "sub"
    if ins.parts[1] == "cc":
        return _extended(ins, subtract)
    r = Reader(ins)
    sat = r.take("sat")
    name = r.pop()
    r.end(3)
    symbol = "-" if subtract else "+"
    if name in ("s16x2", "u16x2") and not subtract and not sat:
        srcs = sources(ins, 1, 32, 32)
        low = "({0} & 65535) + ({1} & 65535) & 65535"
        return pure(f"({low}) | (({{0}} & 4294901760) + ({{1}} & 4294901760) & 4294901760)", (register(ins),), srcs)
    if name not in INT_TYPES or INT_TYPES[name][1] < 16 or name[0] == "b":
        raise Unsupported(f"{r.where}: type .{name} is not known here")
    width = INT_TYPES[name][1]
    srcs = sources(ins, 1, width, width)
    if sat:
        if name != "s32":
            raise Unsupported(f"{r.where}: .sat is for .s32 alone")
        return Pure(lambda a, b: _saturated(a, b, subtract), (register(ins),), srcs)
    return pure(f"({{0}} {symbol} {{1}}) & {ones(width)}", (register(ins),), srcs)


def _saturated(a: Value, b: Value, subtract: bool) -> Value:
    x, y = signed64(a, 32), signed64(b, 32)
    total = np.clip(x - y if subtract else x + y, -(1 << 31), (1 << 31) - 1)
    return same_form(narrow(total, 32), a, b)


@helper
def mul_hi64(a: Value, b: Value, signed: bool) -> Value:
    """High 64 bits of 64-bit products, lane by lane."""
    x, y = wide_lanes(a, 64, signed), wide_lanes(b, 64, signed)
    return np.array([int(p) * int(q) >> 64 & M64 for p, q in zip(x, y, strict=True)], np.uint64)


@helper
def product_lanes(a: Value, b: Value, width: int, signed: bool) -> np.ndarray:
    """Full products of up to 32-bit lanes, in 64 bits."""
    return wide_factor(a, width, signed) * wide_factor(b, width, signed)


def _product(r: Reader, part: str, signed: bool, width: int, srcs: tuple[Source, ...]) -> tuple[str, str, int]:
    """Expressions for ints and for arrays of a product's wanted part, and the part's width; ints are not yet masked."""
    a, b = (as_int("{0}", width), as_int("{1}", width)) if signed else ("{0}", "{1}")
    if part == "wide":
        if width == 64:
            raise Unsupported(f"{r.where}: .wide is for 16 and 32 bits")
        return f"{a} * {b}", f"narrowed(product_lanes({{0}}, {{1}}, {width}, {signed}), {2 * width})", 2 * width
    if width == 64:
        return f"{a} * {b} >> 64", f"mul_hi64({{0}}, {{1}}, {signed})", 64
    return (
        f"{a} * {b} >> {width}",
        f"narrowed(product_lanes({{0}}, {{1}}, {width}, {signed}) >> {width}, {width})",
        width,
    )


@decoder("mul", "mad")
def decode_mul(ins: Instruction) -> Pure | Effect:
    """`mul` and `mad` in their .lo, .hi and .wide forms."""
    if is_float(ins):
        return floats.decode_arithmetic(ins)
    mad = ins.parts[0] == "mad"
    if mad and "cc" in ins.parts:
        return _mad_extended(ins)
    r = Reader(ins)
    part = r.one_of("lo", "hi", "wide")
    sat = r.take("sat")
    signed, width = int_type(r, "us")
    r.end(4 if mad else 3)
    wide = 2 * width if part == "wide" else width
    srcs = sources(ins, 1, width, width, *([wide] if mad else []))
    if sat:
        if not (mad and part == "hi" and signed and width == 32):
            raise Unsupported(f"{r.where}: .sat is for mad.hi.s32 alone")

        def saturated(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            return np.clip((a * b >> 32) + c, -(1 << 31), (1 << 31) - 1)

        return Pure(by_lanes(saturated, 32, True, 32), (register(ins),), srcs)
    if part == "lo":
        # The product of two ints is cut before it meets an array.
        expression = f"({{0}} * {{1}} & {ones(width)}) + {{2}}" if mad else "{0} * {1}"
        return pure(f"({expression}) & {ones(width)}", (register(ins),), srcs)
    fast, slow, result = _product(r, part, signed, width, srcs)
    if mad:
        fast, slow = f"({fast}) + {{2}}", f"{slow} + {{2}}"
        slow = f"({slow}) & {ones(result)}"
    if mad or signed:
        fast = f"({fast}) & {ones(result)}"
    return pure(guarded(fast, slow, srcs), (register(ins),), srcs)


@decoder("mul24", "mad24")
def decode_mul24(ins: Instruction) -> Pure:
    """`mul24` and `mad24`: products of 24-bit numbers."""
    mad = ins.parts[0] == "mad24"
    r = Reader(ins)
    high = r.one_of("lo", "hi") == "hi"
    sat = r.take("sat")
    signed, _ = int_type(r, "us", (32,))
    r.end(4 if mad else 3)
    if sat and not (mad and high and signed):
        raise Unsupported(f"{r.where}: .sat is for mad24.hi.s32 alone")

    def compute(a: np.ndarray, b: np.ndarray, c: Any = 0) -> np.ndarray:
        kind = a.dtype.type
        forty = kind(40)
        total = ((a << forty) >> forty) * ((b << forty) >> forty)
        total = (total >> kind(16) if high else total & kind(M32)) + c
        return np.clip(total, -(1 << 31), (1 << 31) - 1) if sat else total

    return Pure(by_lanes(compute, 32, signed, 32), (register(ins),), sources(ins, 1, *([32] * (3 if mad else 2))))


@decoder("sad")
def decode_sad(ins: Instruction) -> Pure:
    """`sad`: c + |a - b|."""
    r = Reader(ins)
    signed, width = int_type(r, "us")
    r.end(4)

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return c + np.where(a < b, b - a, a - b)

    return Pure(by_lanes(compute, width, signed, width), (register(ins),), sources(ins, 1, width, width, width))


def _divide(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    """Quotient or remainder, truncated towards zero; by zero: all ones, or the dividend."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype == np.uint64:
        quotient = a // safe
    else:
        negative = (a < 0) != (safe < 0)
        # Magnitudes as uint64: that of the most negative number is right there, too.
        magnitude = np.abs(a).astype(np.uint64) // np.abs(safe).astype(np.uint64)
        quotient = np.where(negative, -magnitude.astype(np.int64), magnitude.astype(np.int64))
    if remainder:
        return np.where(zero, a, a - quotient * safe)
    return np.where(zero, ~a.dtype.type(0), quotient)


@helper
def int_quotient(a: int, b: int, width: int, signed: bool, remainder: bool) -> int:
    """One quotient or remainder."""
    if signed:
        a, b = signed_int(a, width), signed_int(b, width)
    if b == 0:
        return (a if remainder else -1) & ones(width)
    quotient = abs(a) // abs(b)
    if (a < 0) != (b < 0):
        quotient = -quotient
    return (a - quotient * b if remainder else quotient) & ones(width)


@decoder("div", "rem")
def decode_div(ins: Instruction) -> Pure | Effect:
    """`div` and `rem`."""
    if is_float(ins):
        return floats.decode_arithmetic(ins)
    r = Reader(ins)
    signed, width = int_type(r, "us")
    r.end(3)
    remainder = ins.parts[0] == "rem"
    slow = by_lanes(lambda a, b: _divide(a, b, remainder), width, signed, width)

    def fn(a: Value, b: Value) -> Value:
        if a.__class__ is int and b.__class__ is int:
            return int_quotient(a, b, width, signed, remainder)
        return slow(a, b)

    return Pure(fn, (register(ins),), sources(ins, 1, width, width))


@decoder("neg", "abs")
def decode_neg(ins: Instruction) -> Pure:
    """`neg` and `abs`."""
    if is_float(ins):
        return floats.decode_sign(ins)
    r = Reader(ins)
    _, width = int_type(r, "s")
    r.end(2)
    srcs = sources(ins, 1, width)
    if ins.parts[0] == "neg":
        return pure(f"(0 - {{0}}) & {ones(width)}", (register(ins),), srcs)
    fast = f"{{0}} if {{0}} < {1 << (width - 1)} else {1 << width} - {{0}}"
    slow = f"np.where({{0}} < {1 << (width - 1)}, {{0}}, (0 - {{0}}) & {ones(width)})"
    return pure(guarded(f"({fast})", slow, srcs), (register(ins),), srcs)


@helper
def extreme(a: Value, b: Value, width: int, signed: bool, largest: bool) -> Value:
    """min or max of lanes."""
    pick = np.maximum if largest else np.minimum
    if signed:
        sign = 1 << (width - 1)
        return pick(a ^ sign, b ^ sign) ^ sign
    return pick(a, b)


@decoder("min", "max")
def decode_min(ins: Instruction) -> Pure:
    """`min` and `max`."""
    if is_float(ins):
        return floats.decode_extreme(ins)
    r = Reader(ins)
    relu = r.take("relu")
    name = r.pop()
    relu = r.take("relu") or relu
    r.end(3)
    largest = ins.parts[0] == "max"
    if name in ("s16x2", "u16x2"):
        if relu and name[0] == "u":
            raise Unsupported(f"{r.where}: .relu is for signed types")
        return Pure(_packed_extreme(name[0] == "s", largest, relu), (register(ins),), sources(ins, 1, 32, 32))
    if name not in INT_TYPES or INT_TYPES[name][1] < 16 or name[0] == "b" or (relu and name != "s32"):
        raise Unsupported(f"{r.where}: type .{name} is not known here")
    signed, width = name[0] == "s", INT_TYPES[name][1]
    srcs = sources(ins, 1, width, width)
    sign = f" ^ {1 << (width - 1)}" if signed else ""
    fast = f"({{0}} if ({{0}}{sign}) {'>' if largest else '<'} ({{1}}{sign}) else {{1}})"
    slow = f"extreme({{0}}, {{1}}, {width}, {signed}, {largest})"
    if relu:
        slow = f"extreme(extreme({{0}}, {{1}}, 32, True, {largest}), 0, 32, True, True)"
        fast = f"max({as_int(fast, 32)}, 0)"
    return pure(guarded(fast, slow, srcs), (register(ins),), srcs)


def _packed_extreme(signed: bool, largest: bool, relu: bool) -> Callable[[Value, Value], Value]:
    kind = np.int16 if signed else np.uint16

    def fn(a: Value, b: Value) -> Value:
        pick = np.maximum if largest else np.minimum
        result = pick(lanes32(a).view(kind), lanes32(b).view(kind))
        if relu:
            result = np.maximum(result, kind(0))
        return same_form(result.view(np.uint32), a, b)

    return fn
