"""Boxes of tensors: which global bytes a tensor copy touches, and where they lie in shared memory.

The hard part is speed: a kernel copies thousands of boxes, so an interior box is one strided NumPy copy and one
permutation of 16-byte chunks that is computed once. A box is held unswizzled, outermost dimension first, as the
`row_bytes`-wide rows that the copy engine moves; the swizzle applies to absolute shared-memory addresses (see
`tensormap.swizzle_offset`).

Pinned on an H200: both fills, the rounding of tf32, whole 16-byte chunks at the ends of stored and reduced rows, rows
narrower than the swizzle (they lie as far apart as the swizzle is wide; only their own bytes are written, and counted). Not
pinned: the padding bytes of the padded packed types.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ptxsim.findings import Unsupported
from ptxsim.tensormap import Interleave, OobFill, Swizzle, TensorMap, swizzle_offset

Bytes = npt.NDArray[np.uint8]

# A tensor map's address has so many bits: CuTe DSL puts no more there of a pointer that it moves below 0.
ADDRESS_MASK = (1 << 57) - 1
# A dtype of 16 bytes: chunks are moved, never looked at.
CHUNK = np.dtype(np.complex128)
_NAN = np.array([0xF7, 0x7F], np.uint8)  # every 16 bits of the NaN fill, of whatever type (seen on an H200)


class Clip(NamedTuple):
    """The part of a box that lies inside the tensor.

    Attributes:
        first: global address of its first byte.
        end: address behind its last byte.
        shape: outermost dimension first, bytes of a row last.
        strides: in bytes, to the same order.
        slices: where that part lies in the box, or None if it is the whole box.
    """

    first: int
    end: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    slices: tuple[slice, ...] | None


class Box:
    """The geometry of a tensor map's copies.

    Attributes:
        map: the tensor map.
        num_bytes: bytes of a box in shared memory.
        counted_bytes: what barriers count: the same, but for types that are padded on the way, without the padding
            (FlashInfer's MXFP8 x MXFP4 kernel relies on it).
        rows: shape of the box without its innermost dimension, outermost first.
        row_bytes: bytes of an innermost row in global memory.
    """

    def __init__(self, tensor_map: TensorMap, rows: int | None = None) -> None:
        """Prepares copies.

        Args:
            tensor_map: the map.
            rows: take single rows of a rank-2 tensor, that many (gather4 and scatter4 have 4).
        """
        m = self.map = tensor_map
        if m.interleave != Interleave.NONE:
            raise Unsupported(f"tensor map with interleaved layout {m.interleave.name}: not modelled")
        counts = m.box_counts if rows is None else (m.box[0], rows)
        self._counts = (m.box[0], *counts[1:]) if rows is None else (m.box[0], 1)
        self.rows = tuple(counts[:0:-1])
        self._bits = m.element_bits
        self.row_bytes = m.box[0] * self._bits // 8
        self._shared_row = m.row_bytes
        self.num_bytes = self._shared_row
        self.counted_bytes = self.row_bytes
        for count in self.rows:
            self.num_bytes *= count
            self.counted_bytes *= count
        self._steps = m.element_strides
        self._swizzle = m.swizzle
        self._rounds = m.dtype in ("tf32", "tf32_ftz")

    def clip(self, coordinates: list[int], store: bool = False) -> Clip | None:
        """The part of the box at these coordinates that lies inside the tensor; None if there is none.

        Args:
            coordinates: of the box's first element, innermost first, signed.
            store: for a copy to global memory, which moves whole 16-byte chunks: a tensor row that ends within one is
                written up to the chunk's end (seen on an H200).
        """
        m, bits = self.map, self._bits
        low, high = -coordinates[0], m.dims[0] - coordinates[0]
        width = self._counts[0]
        low, high = (low if low > 0 else 0), (high if high < width else width)
        if low >= high:
            return None
        whole = low == 0 and high == width
        first = m.global_address + (coordinates[0] + low) * bits // 8
        begin, stop = low * bits // 8, high * bits // 8
        if store and stop & 15:
            stop = min(self.row_bytes, stop + 15 & ~15)
            whole = begin == 0 and stop == self.row_bytes
        row = stop - begin
        shape, strides, slices = [row], [1], [slice(begin, stop)]
        end = first + row
        for i in range(1, len(coordinates)):
            at, step, count, stride = coordinates[i], self._steps[i], self._counts[i], m.strides_bytes[i - 1]
            low = -(at // step) if at < 0 else 0
            high = -((at - m.dims[i]) // step)
            if high > count:
                high = count
            if low >= high:
                return None
            whole = whole and low == 0 and high == count
            first += (at + low * step) * stride
            end += (at + (high - 1) * step) * stride
            shape.append(high - low)
            strides.append(step * stride)
            slices.append(slice(low, high))
        # A map may begin before address 0 of which only what is behind it is used: QuACK's ragged tensors, on low addresses.
        beyond = first & ~ADDRESS_MASK
        first, end = first - beyond, end - beyond
        return Clip(first, end, tuple(shape[::-1]), tuple(strides[::-1]), None if whole else tuple(slices[::-1]))

    def aligned(self, coordinates: list[int]) -> bool:
        """True if the first coordinate is one that the hardware takes: at a multiple of 16 bytes (seen on an H200).

        Padded types need a multiple of 128 elements (PTX ISA).
        """
        unit = 128 if self._bits != self.map.element.shared_bits else 1
        return coordinates[0] * self._bits % 128 == 0 and coordinates[0] % unit == 0

    def gather(self, clip: Clip | None, data: Bytes, start: int) -> Bytes:
        """The box as it goes to shared memory, unswizzled.

        Args:
            clip: the part inside the tensor.
            data: the buffer that holds it.
            start: index of `clip.first` in the buffer.
        """
        if clip is None:
            box = self._filled()
        else:
            inside = np.ndarray(clip.shape, np.uint8, data, start, clip.strides)
            if self._rounds:
                inside = _to_tf32(inside)
            if clip.slices is None:
                box = np.ascontiguousarray(inside)
            else:
                box = self._filled()
                box[clip.slices] = inside
        return self._padded(box) if self._shared_row != self.row_bytes else box.reshape(-1)

    def scatter(self, clip: Clip, box: Bytes, data: Bytes, start: int) -> None:
        """Writes the part of an unswizzled box that is inside the tensor."""
        np.ndarray(clip.shape, np.uint8, data, start, clip.strides)[...] = self.inside(clip, box)

    def inside(self, clip: Clip, box: Bytes) -> Bytes:
        """The part of an unswizzled box that is inside the tensor, in the clip's shape."""
        if self._shared_row != self.row_bytes:
            box = box.reshape(-1, 16)[:, : self._bits * 2].reshape(-1)
        shaped = box.reshape(*self.rows, self.row_bytes)
        return shaped if clip.slices is None else shaped[clip.slices]

    def view(self, clip: Clip, parallel: npt.NDArray[Any], start: int) -> npt.NDArray[Any]:
        """The inside part of an array that has one item for each byte of the buffer (valid flags, writers)."""
        size = parallel.itemsize
        return np.ndarray(clip.shape, parallel.dtype, parallel, start * size, tuple(s * size for s in clip.strides))

    def chunks(self, offset: int) -> npt.NDArray[np.int64] | None:
        """The 16-byte chunks of shared memory that a box at `offset` covers; None if they are all from there on, in a row.

        Swizzled rows lie as far apart as the swizzle is wide.
        """
        if self._swizzle is Swizzle.NONE or self._shared_row == self._swizzle.span:
            return None
        return self._places(offset)[0].astype(np.int64) + offset // 16

    def put(self, shared: Bytes, offset: int, data: Bytes) -> None:
        """Writes an unswizzled box to shared memory at an offset that is a multiple of 128."""
        if self._swizzle is Swizzle.NONE:
            shared[offset : offset + self.num_bytes] = data
            return
        places, chunks = self._places(offset)
        shared[offset : offset + 16 * chunks].view(CHUNK)[places] = data.view(CHUNK)

    def get(self, shared: Bytes, offset: int) -> Bytes:
        """Reads an unswizzled box from shared memory: a copy."""
        if self._swizzle is Swizzle.NONE:
            return shared[offset : offset + self.num_bytes].copy()
        places, chunks = self._places(offset)
        return shared[offset : offset + 16 * chunks].view(CHUNK)[places].view(np.uint8)

    def _places(self, offset: int) -> tuple[npt.NDArray[np.intp], int]:
        return _places(self._swizzle, offset & 1023, self.num_bytes // self._shared_row, self._shared_row)

    def _filled(self) -> Bytes:
        shape = (*self.rows, self.row_bytes)
        if self.map.oob_fill == OobFill.ZERO:
            return np.zeros(shape, np.uint8)
        return np.tile(_NAN, (*self.rows, self.row_bytes // 2))

    def _padded(self, box: Bytes) -> Bytes:
        """16 elements to 16 bytes: the packed values first, then padding."""
        units = box.reshape(-1, self._bits * 2)
        out = np.zeros((len(units), 16), np.uint8)
        out[:, : units.shape[1]] = units
        return out.reshape(-1)


def indices(clip: Clip, start: int) -> npt.NDArray[np.int64]:
    """The index of every byte of the inside part in its buffer, flat."""
    out = np.full(1, start, np.int64)
    for count, stride in zip(clip.shape, clip.strides, strict=True):
        out = (out[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
    return out


def _to_tf32(box: Bytes) -> Bytes:
    """Loads of tf32 round to 10 bits of mantissa and make every NaN 0x7fffe000; subnormals stay (seen on an H200).

    Ties go to even. Stores, and both directions of f32_ftz, leave the bits alone.
    """
    bits = np.ascontiguousarray(box).view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FFFE000), rounded).view(np.uint8)


@lru_cache(maxsize=512)
def _places(swizzle: Swizzle, phase: int, rows: int, row: int) -> tuple[npt.NDArray[np.intp], int]:
    """Where each 16-byte chunk of a box lies, counted from the box's start, and how many chunks the box spans."""
    pitch = max(row, swizzle.span)
    at = phase + np.add.outer(pitch * np.arange(rows, dtype=np.int64), np.arange(0, row, 16, dtype=np.int64)).reshape(
        -1
    )
    moved = ((swizzle_offset(at, swizzle) - phase) // 16).astype(np.intp)
    moved.flags.writeable = False
    return moved, max(int(moved.max()) + 1, rows * pitch // 16)
