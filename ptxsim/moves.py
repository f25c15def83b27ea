"""`mov`: copies, vectors, predicates, addresses.

Source: PTX ISA, "Data Movement and Conversion Instructions: mov".
"""

from typing import Any

import numpy as np

from ptxsim.findings import Unsupported
from ptxsim.lanes import INT_TYPES, ones
from ptxsim.ptx import Imm, Instruction, Operand, Reg, Vector
from ptxsim.registry import Pure, Reader, Source, decoder
from ptxsim.templates import guarded, helper, pure, register, wanted
from ptxsim.values import FULL, M32, Value, lanes64


@helper
def pack_halves(low: Value, high: Value) -> Value:
    """Two b32 values as one b64."""
    out = np.empty((32, 2), np.uint32)
    out[:, 0] = low
    out[:, 1] = high
    return out.view(np.uint64).reshape(32)


@helper
def pack_wide(width: int, *items: Value) -> Value:
    """Items of `width` bits as one b64, the first one lowest."""
    out = lanes64(items[0])
    for i, item in enumerate(items[1:], 1):
        out = out | lanes64(item) << np.uint64(i * width)
    return out


def _pack(ins: Instruction, width: int, dst: Reg, items: tuple[Operand, ...]) -> Pure:
    each = width // len(items)
    srcs = tuple(Source(item, each) for item in items)
    if width == 128:
        if len(items) == 2:
            return pure("({0}, {1})", (dst,), srcs)
        if len(items) == 4:
            return Pure(_pack128, (dst,), srcs)
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: a b128 has two or four items")
    joined = " | ".join(f"{{{i}}} << {i * each}" if i else "{0}" for i in range(len(items)))
    if width == 64:
        names = ", ".join(f"{{{i}}}" for i in range(len(items)))
        slow = f"pack_halves({names})" if each == 32 else f"pack_wide({each}, {names})"
        return pure(guarded(joined, slow, srcs), (dst,), srcs)
    return pure(joined, (dst,), srcs)


def _pack128(a: Value, b: Value, c: Value, d: Value) -> tuple[Value, Value]:
    def pair(low: Value, high: Value) -> Value:
        if low.__class__ is int and high.__class__ is int:
            return low | high << 32
        return pack_halves(low, high)

    return pair(a, b), pair(c, d)


def _piece(value: Any, width: int, each: int, number: int) -> Value:
    if width == 128:
        per = 64 // each
        value, number, width = value[number // per], number % per, 64
    if each == 64:
        return value
    if value.__class__ is int:
        return value >> number * each & ones(each)
    return (value >> number * each & ones(each)).astype(np.uint32)


@helper
def halves(value: Value) -> tuple[Value, Value]:
    """A b64 value as (low, high) b32."""
    if value.__class__ is int:
        return value & M32, value >> 32
    pair = value.view(np.uint32).reshape(32, 2)
    return pair[:, 0].copy(), pair[:, 1].copy()


def _unpack(width: int, items: tuple[Operand, ...], src: Operand) -> Pure:
    each = width // len(items)
    kept = [(i, item) for i, item in enumerate(items) if item in wanted(Vector(items))]
    dsts, srcs = tuple(item for _, item in kept), (Source(src, width),)
    numbers = [i for i, _ in kept]
    if len(kept) == 1:
        number = numbers[0]
        if width == 64 and each == 32:
            fast, slow = ("{0} & 4294967295", "low_half({0})") if number == 0 else ("{0} >> 32", "high_half({0})")
            return pure(guarded(fast, slow, srcs), dsts, srcs)
        if width <= 32:
            return pure(f"{{0}} >> {number * each} & {ones(each)}", dsts, srcs)
        return Pure(lambda value: _piece(value, width, each, number), dsts, srcs)
    if width == 64 and len(kept) == 2 == len(items):
        return Pure(halves, dsts, srcs)
    return Pure(lambda value: tuple(_piece(value, width, each, number) for number in numbers), dsts, srcs)


@decoder("mov")
def decode_mov(ins: Instruction) -> Pure:
    """`mov`: copies, packs, unpacks; predicates; addresses of variables."""
    r = Reader(ins)
    kind = r.pop()
    r.end(2)
    dst, src = ins.operands
    if kind == "pred":
        if isinstance(src, Imm):
            return pure(str(FULL if src.integer() else 0), (register(ins),), ())
        return pure("{0}", (register(ins),), (Source(src, 1),))
    if kind not in INT_TYPES and kind not in ("f32", "f64", "b128", "f16", "bf16", "f16x2", "bf16x2"):
        raise Unsupported(f"{r.where}: type .{kind} is not known here")
    width = 128 if kind == "b128" else 32 if kind.endswith("x2") else int(kind.lstrip("bfus"))
    if isinstance(src, Vector) and isinstance(dst, Reg):
        return _pack(ins, width, dst, src.items)
    if isinstance(dst, Vector) and not isinstance(src, Vector):
        return _unpack(width, dst.items, src)
    return pure("{0}", (register(ins),), (Source(src, width),))
