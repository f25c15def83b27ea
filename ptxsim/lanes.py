"""Integer lanes: helpers that the decoders of integer instructions share."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim.registry import Reader
from ptxsim.templates import helper
from ptxsim.values import FULL, Value, lanes64, mask_of, signed64

INT_TYPES = {f"{kind}{width}": (kind, width) for kind in "bus" for width in (8, 16, 32, 64)}


def int_type(r: Reader, kinds: str = "bus", widths: tuple[int, ...] = (16, 32, 64)) -> tuple[bool, int]:
    """Reads an integer type: (signed, width)."""
    names = [f"{kind}{width}" for kind in kinds for width in widths]
    kind, width = INT_TYPES[r.one_of(*names)]
    return kind == "s", width


def ones(width: int) -> int:
    """The mask of the low `width` bits."""
    return (1 << width) - 1


def as_int(expression: str, width: int) -> str:
    """An int's bits read as two's complement, as Python expression."""
    sign = 1 << (width - 1)
    return f"(({expression} ^ {sign}) - {sign})"


def dtype_of(width: int) -> Any:
    """The type of the arrays that hold registers of `width` bits."""
    return np.uint64 if width == 64 else np.uint32


def narrow(lanes: np.ndarray, width: int) -> Value:
    """Lanes of any integer type, cut to `width` bits in their register's representation."""
    if width == 64:
        return lanes.astype(np.uint64)
    return (lanes & np.array(ones(width)).astype(lanes.dtype)).astype(np.uint32)


@helper
def wide_lanes(value: Value, width: int, signed: bool) -> np.ndarray:
    """Lanes as int64 (signed) or uint64."""
    return signed64(value, width) if signed else lanes64(value)


def wide_factor(value: Value, width: int, signed: bool) -> Any:
    """The same, but an int as a scalar of that type."""
    if value.__class__ is int:
        return np.int64(signed_int(value, width)) if signed else np.uint64(value)
    return wide_lanes(value, width, signed)


@helper
def low_half(value: Value) -> Value:
    """The low 32 bits of b64 lanes."""
    return value.astype(np.uint32)


@helper
def high_half(value: Value) -> Value:
    """The high 32 bits of b64 lanes."""
    return (value >> 32).astype(np.uint32)


@helper
def widen(value: Value) -> Value:
    """uint32 lanes as uint64."""
    return value.astype(np.uint64)


def in_register_form(lanes: np.ndarray, width: int) -> Value:
    """64-bit lanes cut to a register of `width` bits; an int if there is only one lane."""
    cut = narrow(lanes, width)
    return cut if len(cut) == 32 else int(cut[0])


def same_form(result: Value, *srcs: Value) -> Value:
    """An int if every source was one: then all lanes agree."""
    return int(result[0]) if all(src.__class__ is int for src in srcs) else result


def by_lanes(compute: Callable[..., np.ndarray], width: int, signed: bool, result: int) -> Callable[..., Value]:
    """A function on int64/uint64 lanes (width bits read as signed or not) as one on register values."""

    def fn(*srcs: Value) -> Value:
        if all(src.__class__ is int for src in srcs):
            one = [
                np.array([signed_int(src, width) if signed else src], np.int64 if signed else np.uint64) for src in srcs
            ]
            return int(narrow(compute(*one), result)[0])
        return narrow(compute(*(wide_lanes(src, width, signed) for src in srcs)), result)

    return fn


def signed_int(value: Any, width: int) -> int:
    """An int's bits read as two's complement."""
    sign = 1 << (width - 1)
    return (value ^ sign) - sign


@helper
def narrowed(lanes: np.ndarray, width: int) -> Value:
    """64-bit lanes cut to a register of `width` bits."""
    return narrow(lanes, width)


def per_lane(one: Callable[..., int], result: int) -> Callable[..., Value]:
    """A function on Python integers, applied to each lane: for rare instructions."""

    def fn(*srcs: Value) -> Value:
        if all(src.__class__ is int for src in srcs):
            return one(*srcs)
        columns = [lanes64(src) for src in srcs]
        return np.array([one(*(int(v) for v in row)) for row in zip(*columns, strict=True)], dtype_of(result))

    return fn


@helper
def flags_of(condition: Any) -> int:
    """A bool or an array of bools as a lane mask."""
    if condition.__class__ is bool:
        return FULL if condition else 0
    return mask_of(condition)
