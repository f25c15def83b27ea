"""Register values of a warp: an `int` where all lanes agree, else an array of 32 lanes.

Convention, relied on everywhere:

* b8, b16, b32: `int` in [0, 2**width) or `ndarray (32,) uint32` with values below 2**width.
* b64: `int` or `ndarray (32,) uint64`. b128: a tuple (low, high) of two b64 values.
* predicate: always an `int`, one bit a lane (lane 0 is bit 0).
* Never a NumPy scalar: `value.__class__ is int` tells uniform from divergent, and Python integers do not overflow.

A uniform value costs a tenth of a vector operation, and most of what producer and MMA warps compute is uniform.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

LANES = 32
FULL = 0xFFFFFFFF
M8, M16, M32, M64 = 0xFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
# int | U32 | U64: which of them is only known at run time, and NumPy's stubs cannot follow arithmetic on such a union.
Value = Any
LANE_IDS = np.arange(LANES, dtype=np.uint32)
LANE_BITS = np.uint32(1) << LANE_IDS


def lanes32(value: Value) -> U32:
    """The value as 32 lanes of uint32 (a fresh array for an int; else the array itself: do not write to it)."""
    return np.full(LANES, value, np.uint32) if value.__class__ is int else value


def lanes64(value: Value) -> U64:
    """The value as 32 lanes of uint64; widens uint32 arrays."""
    if value.__class__ is int:
        return np.full(LANES, value, np.uint64)
    return value.astype(np.uint64) if value.dtype != np.uint64 else value


def signed64(value: Value, width: int) -> npt.NDArray[np.int64]:
    """The value's lanes, read as two's complement of `width` bits."""
    wide = lanes64(value).astype(np.int64)
    if width == 64:
        return wide
    shift = np.int64(64 - width)
    return (wide << shift) >> shift


@lru_cache(4096)
def bools(mask: int) -> npt.NDArray[np.bool_]:
    """A lane mask as 32 booleans; shared, so that it cannot be written to."""
    flags = (LANE_BITS & np.uint32(mask)) != 0
    flags.flags.writeable = False
    return flags


_DIGITS = bytes([48] + [49] * 255)


def mask_of(flags: npt.NDArray[np.bool_]) -> int:
    """32 booleans as a lane mask."""
    # Their bytes, last one first, are the binary digits: eight times faster than packbits for 32 of them.
    return int(flags.tobytes()[::-1].translate(_DIGITS), 2)


def lanes_of(mask: int) -> Iterator[int]:
    """The numbers of the lanes in a mask, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def first_lane(mask: int) -> int:
    """The lowest lane of a non-empty mask."""
    return (mask & -mask).bit_length() - 1


def lane(value: Value, index: int) -> int:
    """One lane of a value, as int."""
    return value if value.__class__ is int else int(value[index])


def uniform(value: Value, mask: int) -> int | None:
    """The value that all lanes of `mask` share, or None if they differ."""
    if value.__class__ is int:
        return value
    if mask == FULL:
        first = value[0]
        return int(first) if (value == first).all() else None
    picked = value[bools(mask)]
    return int(picked[0]) if (picked == picked[0]).all() else None


def compress(value: Value) -> Value:
    """An int if all lanes agree, else the array: for results that are often uniform (shfl, shared loads)."""
    if value.__class__ is int:
        return value
    first = value[0]
    return int(first) if (value == first).all() else value


def merge(old: Value, new: Value, mask: int) -> Value:
    """`new` in the lanes of `mask`, `old` elsewhere; a register never written before takes `new` in every lane.

    For registers of up to 32 bits; merge64 and merge128 are for the wider ones.
    """
    if old is None or mask == FULL:
        return new
    if old.__class__ is int and new.__class__ is int and old == new:
        return old
    return np.where(bools(mask), np.asarray(new, np.uint32), np.asarray(old, np.uint32))


def merge64(old: Value, new: Value, mask: int) -> Value:
    """merge for b64: the lanes are uint64 even if what they hold is short."""
    if old is None or mask == FULL:
        return new
    if old.__class__ is int and new.__class__ is int and old == new:
        return old
    return np.where(bools(mask), np.asarray(new, np.uint64), np.asarray(old, np.uint64))


def merge128(old: Value, new: Value, mask: int) -> Value:
    """merge for b128: both halves."""
    if old is None or mask == FULL:
        return new
    return tuple(merge64(o, n, mask) for o, n in zip(old, new, strict=True))
