"""Element-wise reductions that memory performs: bulk reductions and red.async.

Source: PTX ISA, cp.reduce.async.bulk (f32 additions flush subnormals, f16 and bf16 keep them; inc and dec wrap at the
source).
All types and operations give the bits that an H200 gives, NaNs included: of a number and a NaN, min and max take the number.
"""

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

ELEMENT_BYTES = {
    "u32": 4,
    "s32": 4,
    "b32": 4,
    "u64": 8,
    "s64": 8,
    "b64": 8,
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
}
_NUMPY = {
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
}


def reduce(operation: str, dtype: str, old: Bytes, new: Bytes) -> Bytes:
    """`old` combined with `new`, element by element.

    Args:
        operation: add, min, max, inc, dec, and, or, xor.
        dtype: a key of ELEMENT_BYTES; the last axis holds whole elements.
        old: what memory holds, contiguous.
        new: the source, contiguous, of the same shape.

    Returns:
        The bytes to store, of the same shape.
    """
    out: np.ndarray
    if dtype in ("f16", "bf16"):
        out = _reduce_half(operation, dtype, old, new)
    elif dtype == "f32":
        out = _add_f32(old.view(np.float32), new.view(np.float32))
    else:
        kind = _NUMPY[dtype]
        out = _reduce_plain(operation, old.view(kind), new.view(kind))
    return np.ascontiguousarray(out).view(np.uint8)


def _reduce_plain(operation: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        if operation == "add":
            return old + new
        if operation == "min":
            return np.minimum(old, new)
        if operation == "max":
            return np.maximum(old, new)
        if operation == "inc":
            return np.where(old >= new, 0, old + 1).astype(old.dtype)
        if operation == "dec":
            return np.where((old == 0) | (old > new), new, old - 1).astype(old.dtype)
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[operation](old, new)


def _flush(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    bits = values.view(np.uint32)
    return np.where(bits & 0x7F800000 == 0, bits & 0x80000000, bits).astype(np.uint32).view(np.float32)


def _add_f32(old: npt.NDArray[np.float32], new: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with np.errstate(all="ignore"):
        out = _flush(_flush(old) + _flush(new))
    return np.where(np.isnan(out), np.uint32(0x7FFFFFFF).view(np.float32), out)


def _widen(values: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "f16":
        return values.view(np.float16).astype(np.float32)
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _narrow(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint16]:
    if dtype == "f16":
        with np.errstate(all="ignore"):
            bits = values.astype(np.float16).view(np.uint16)
    else:
        wide = values.view(np.uint32)
        bits = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def _reduce_half(operation: str, dtype: str, old: Bytes, new: Bytes) -> npt.NDArray[np.uint16]:
    """A binary32 sum of two half-precision numbers, rounded again, is the correctly rounded sum."""
    a, b = _widen(old, dtype), _widen(new, dtype)
    if operation == "add":
        with np.errstate(all="ignore"):
            return _narrow(a + b, dtype)
    # -0 is less than +0, and a number wins over a NaN.
    less = (a < b) | ((a == b) & np.signbit(a))
    first = less if operation == "min" else ~less
    pick = np.where(np.isnan(b), True, np.where(np.isnan(a), False, first))
    out = np.where(pick, old.view(np.uint16), new.view(np.uint16))
    return np.where(np.isnan(a) & np.isnan(b), np.uint16(0x7FFF), out)
