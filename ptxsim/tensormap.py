"""The 128-byte tensor map that a TMA instruction takes: decoded, encoded, checked, and its swizzles.

The hard part is that the layout is not documented. It was read off the driver: `cuTensorMapEncodeTiled` of CUDA 13.0 on
an H200 gave every field that Hopper has, and CuTe DSL, which packs maps itself, gave those that only Blackwell has (the
packed 4-bit types, the wider swizzle atoms, version 2). Only the first 64 bytes count: the driver's other half repeats
box size and alignment, and CuTe DSL leaves it uninitialised.

| bytes | field |
|---|---|
| 0-7 | global address, below 2^57 |
| 8-11 | mode word, below |
| 12-27 | strides of dimensions 1-4 in units of 16 bytes, low 32 bits each |
| 28-31 | their bits 32-35, 4 bits each; bits 16-31 are 0 |
| 32-51 | dimensions, less 1, 32 bits each |
| 52-54 | element strides, less 1, 3 bits each |
| 55-59 | box, less 1, 8 bits each |
| 60-63 | 0 |

Mode word: bits 0-3 version, 4-6 rank - 1, 7-10 type, 11-12 interleave, 13-14 swizzle, 15 NaN fill, 16 tf32, 17-18 L2
promotion, 19-20 swizzle atom, 21 a hint that the tensor has 128 KiB or more.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeVar

import numpy as np

MAP_BYTES = 128
# The second half of a map is not read by the hardware model here and is garbage in maps that CuTe DSL packs.
MEANINGFUL_BYTES = 64
MAX_RANK = 5

_Address = TypeVar("_Address", int, np.ndarray)


class TensorMapError(ValueError):
    """A tensor map that this module does not know how to read, write or walk."""


class Swizzle(IntEnum):
    """How 16-byte chunks are permuted in shared memory; the values are those of CUtensorMapSwizzle."""

    NONE = 0
    B32 = 1
    B64 = 2
    B128 = 3
    B128_ATOM_32B = 4
    B128_ATOM_32B_FLIP_8B = 5
    B128_ATOM_64B = 6

    @property
    def span(self) -> int:
        """Bytes of the row within which chunks move; 0 without a swizzle."""
        return (0, 32, 64, 128, 128, 128, 128)[self]


class Interleave(IntEnum):
    """CUtensorMapInterleave."""

    NONE = 0
    B16 = 1
    B32 = 2


class OobFill(IntEnum):
    """What a load writes for elements outside the tensor; CUtensorMapFloatOOBfill."""

    ZERO = 0
    NAN = 1


class ElementType(NamedTuple):
    """An element type of a map.

    Attributes:
        code: bits 7-10 of the word at byte 8.
        tf32: bit 16 of that word.
        bits: size of an element in global memory.
        shared_bits: size of an element in shared memory, padding of packed types spread over the elements.
        is_float: NaN fill is allowed.
    """

    code: int
    tf32: int
    bits: int
    shared_bits: int
    is_float: bool


ELEMENT_TYPES = {
    "u8": ElementType(0, 0, 8, 8, False),
    "u16": ElementType(1, 0, 16, 16, False),
    "u32": ElementType(2, 0, 32, 32, False),
    "s32": ElementType(3, 0, 32, 32, False),
    "u64": ElementType(4, 0, 64, 64, False),
    "s64": ElementType(5, 0, 64, 64, False),
    "f16": ElementType(6, 0, 16, 16, True),
    "f32": ElementType(7, 0, 32, 32, True),
    "f32_ftz": ElementType(8, 0, 32, 32, True),
    "f64": ElementType(9, 0, 64, 64, True),
    "bf16": ElementType(10, 0, 16, 16, True),
    "tf32": ElementType(7, 1, 32, 32, True),
    "tf32_ftz": ElementType(8, 1, 32, 32, True),
    # 16 four-bit values in 8 bytes, in both memories (CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B).
    "b4x16": ElementType(11, 0, 4, 4, False),
    # 16 four-bit values in 8 bytes of global and 16 of shared memory (16U4_ALIGN16B).
    "b4x16_p64": ElementType(12, 0, 4, 8, False),
    # 16 six-bit values in 12 bytes of global and 16 of shared memory (16U6_ALIGN16B).
    "b6x16_p32": ElementType(13, 0, 6, 8, False),
}
_TYPE_OF_CODE = {(element.code, element.tf32): name for name, element in ELEMENT_TYPES.items()}


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map. Dimension 0 is the innermost one.

    Attributes:
        global_address: first byte of the tensor.
        dtype: a key of ELEMENT_TYPES.
        dims: sizes in elements, 1 to 5 of them.
        strides_bytes: strides of dimensions 1 and up; dimension 0 is contiguous.
        box: elements of a copy along each dimension.
        element_strides: steps along each dimension; that of dimension 0 is ignored by the hardware without interleave.
        swizzle: permutation in shared memory.
        interleave: interleaved layout.
        oob_fill: value of elements outside the tensor.
        l2_promotion: 0 none, 1 64 bytes, 2 128 bytes, 3 256 bytes; no effect on results.
        version: 0 in maps of Hopper's driver, 2 in those CuTe DSL packs for Blackwell.
        large_hint: bit 21; no effect on results.
    """

    global_address: int
    dtype: str
    dims: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: Swizzle = Swizzle.NONE
    interleave: Interleave = Interleave.NONE
    oob_fill: OobFill = OobFill.ZERO
    l2_promotion: int = 0
    version: int = 0
    large_hint: bool = False

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)

    @property
    def element(self) -> ElementType:
        """The element type's description."""
        return ELEMENT_TYPES[self.dtype]

    @property
    def element_bits(self) -> int:
        """Size of an element in global memory, in bits."""
        return self.element.bits

    @property
    def box_counts(self) -> tuple[int, ...]:
        """Elements actually copied along each dimension: ceil(box / element stride)."""
        outer = zip(self.box[1:], self.element_strides[1:], strict=True)
        return (self.box[0], *(-(-box // step) for box, step in outer))

    @property
    def row_bytes(self) -> int:
        """Bytes of one innermost row of the box in shared memory."""
        return self.box[0] * self.element.shared_bits // 8

    @property
    def box_bytes(self) -> int:
        """Bytes of a whole box in shared memory, which is what complete_tx counts, in bounds or not."""
        rows = 1
        for count in self.box_counts[1:]:
            rows *= count
        return rows * self.row_bytes


def _field(word: int, first: int, count: int) -> int:
    return word >> first & (1 << count) - 1


def decode(data: bytes) -> TensorMap:
    """Read a tensor map.

    Args:
        data: 64 or 128 bytes; from byte 64 on they are not looked at.

    Returns:
        The fields.

    Raises:
        TensorMapError: a bit or code of unknown meaning is set.
    """
    if len(data) not in (MEANINGFUL_BYTES, MAP_BYTES):
        raise TensorMapError(f"a tensor map has {MAP_BYTES} bytes, got {len(data)}")
    address, word = struct.unpack_from("<QI", data, 0)
    rank = _field(word, 4, 3) + 1
    if rank > MAX_RANK:
        raise TensorMapError(f"rank {rank} in the tensor map, at most {MAX_RANK} is possible; not a tensor map?")
    if address >> 57:
        raise TensorMapError(f"global address {address:#x} in the tensor map is above 2^57; not a tensor map?")
    swizzle, dtype = _decode_modes(word)
    low = struct.unpack_from("<4I", data, 12)
    (high,) = struct.unpack_from("<I", data, 28)
    dims = struct.unpack_from("<5I", data, 32)
    steps = int.from_bytes(data[52:55], "little")
    box = data[55:60]
    unused = [low[i] or _field(high, 4 * i, 4) for i in range(rank - 1, 4)]
    unused += [dims[i] or _field(steps, 3 * i, 3) or box[i] for i in range(rank, MAX_RANK)]
    unused += [high >> 16, steps >> 15, int.from_bytes(data[60:64], "little")]
    if any(unused):
        raise TensorMapError(f"bits of dimensions above rank {rank}, or reserved bits, are set: {data[:64].hex()}")
    return TensorMap(
        global_address=address,
        dtype=dtype,
        dims=tuple(d + 1 for d in dims[:rank]),
        strides_bytes=tuple((low[i] | _field(high, 4 * i, 4) << 32) << 4 for i in range(rank - 1)),
        box=tuple(b + 1 for b in box[:rank]),
        element_strides=tuple(_field(steps, 3 * i, 3) + 1 for i in range(rank)),
        swizzle=swizzle,
        interleave=Interleave(_field(word, 11, 2)),
        oob_fill=OobFill(_field(word, 15, 1)),
        l2_promotion=_field(word, 17, 2),
        version=_field(word, 0, 4),
        large_hint=bool(_field(word, 21, 1)),
    )


# (bits 13-14, bits 19-20) of the word at byte 8.
_SWIZZLE_BITS = {
    Swizzle.NONE: (0, 0),
    Swizzle.B32: (1, 0),
    Swizzle.B64: (2, 0),
    Swizzle.B128: (3, 0),
    Swizzle.B128_ATOM_32B: (3, 1),
    # What (3, 2) stands for was not seen; B128_ATOM_32B_FLIP_8B has no known encoding.
    Swizzle.B128_ATOM_64B: (3, 3),
}
_SWIZZLE_OF_BITS = {bits: swizzle for swizzle, bits in _SWIZZLE_BITS.items()}
_VERSIONS = (0, 2)


def _decode_modes(word: int) -> tuple[Swizzle, str]:
    version, code, tf32 = _field(word, 0, 4), _field(word, 7, 4), _field(word, 16, 1)
    if version not in _VERSIONS:
        raise TensorMapError(f"tensor map version {version}, known are {_VERSIONS}; not a tensor map?")
    if (code, tf32) not in _TYPE_OF_CODE:
        raise TensorMapError(f"element type code {code} (tf32 bit {tf32}) of the tensor map is unknown")
    swizzle = _SWIZZLE_OF_BITS.get((_field(word, 13, 2), _field(word, 19, 2)))
    if swizzle is None:
        raise TensorMapError(f"swizzle {_field(word, 13, 2)} with atom {_field(word, 19, 2)} is unknown")
    if _field(word, 11, 2) not in Interleave._value2member_map_:
        raise TensorMapError(f"interleave {_field(word, 11, 2)} of the tensor map is unknown")
    if word >> 22:
        raise TensorMapError(f"reserved bits of the tensor map's mode word are set: {word:#010x}")
    return swizzle, _TYPE_OF_CODE[code, tf32]


def encode(tensor_map: TensorMap) -> bytes:
    """Write a tensor map: the inverse of `decode`. The second half is zero.

    Args:
        tensor_map: fields, which must fit their bits; `check` says whether the driver would take them.

    Returns:
        128 bytes.

    Raises:
        TensorMapError: a field does not fit.
    """
    m = tensor_map
    _require_fits(m)
    high, steps = 0, 0
    for i, stride in enumerate(m.strides_bytes):
        high |= stride >> 36 << 4 * i
    for i, step in enumerate(m.element_strides):
        steps |= step - 1 << 3 * i
    swizzle, atom = _SWIZZLE_BITS[m.swizzle]
    word = m.version | m.rank - 1 << 4 | m.element.code << 7 | m.interleave << 11 | swizzle << 13 | m.oob_fill << 15
    word |= m.element.tf32 << 16 | m.l2_promotion << 17 | atom << 19 | int(m.large_hint) << 21
    low = [stride >> 4 & 0xFFFFFFFF for stride in m.strides_bytes] + [0] * (5 - m.rank)
    dims = [d - 1 for d in m.dims] + [0] * (5 - m.rank)
    data = struct.pack("<QI4II5I", m.global_address, word, *low, high, *dims)
    data += steps.to_bytes(3, "little") + bytes(b - 1 for b in m.box)
    return data.ljust(MAP_BYTES, b"\0")


def _require_fits(m: TensorMap) -> None:
    lengths = (len(m.dims), len(m.strides_bytes) + 1, len(m.box), len(m.element_strides))
    if len(set(lengths)) != 1 or not 1 <= m.rank <= MAX_RANK:
        raise TensorMapError(
            f"dims, strides_bytes + 1, box, element_strides have lengths {lengths}; want 1-5, all equal"
        )
    if m.dtype not in ELEMENT_TYPES:
        raise TensorMapError(f"dtype {m.dtype!r} is unknown; known are {', '.join(ELEMENT_TYPES)}")
    if m.swizzle not in _SWIZZLE_BITS:
        raise TensorMapError(f"no encoding is known for swizzle {m.swizzle.name}")
    if m.version not in _VERSIONS or not 0 <= m.l2_promotion <= 3 or not 0 <= m.global_address < 1 << 57:
        raise TensorMapError(f"version, l2_promotion or global_address out of range: {m}")
    in_range = (
        all(1 <= d <= 1 << 32 for d in m.dims)
        and all(1 <= b <= 256 for b in m.box)
        and all(1 <= s <= 8 for s in m.element_strides)
        and all(0 <= s < 1 << 40 and s % 16 == 0 for s in m.strides_bytes)
    )
    if not in_range:
        raise TensorMapError(f"want dims 1..2^32, box 1..256, element strides 1..8, strides 16*n < 2^40; got {m}")


def meaningful_bytes(data: bytes) -> bytes:
    """The bytes that define a map, for hashing and comparing: those after them may be garbage."""
    return bytes(data[:MEANINGFUL_BYTES])


_PADDED = ("b4x16_p64", "b6x16_p32")
_BLACKWELL_SWIZZLES = (Swizzle.B128_ATOM_32B, Swizzle.B128_ATOM_32B_FLIP_8B, Swizzle.B128_ATOM_64B)
_PADDED_SWIZZLES = {
    "b4x16_p64": (Swizzle.NONE, Swizzle.B128, Swizzle.B128_ATOM_32B),
    "b6x16_p32": (Swizzle.NONE, Swizzle.B128, Swizzle.B128_ATOM_32B, Swizzle.B128_ATOM_64B),
}


def check(tensor_map: TensorMap, arch: str = "sm_100a") -> list[str]:
    """Find what `cuTensorMapEncodeTiled` would refuse. CuTe DSL packs maps without these checks.

    Source: CUDA driver API 13.0, cuTensorMapEncodeTiled. Two rules there are not enforced by the driver (seen on an
    H200): that strides cover the dimension before, which is not checked here, and that interleave 32B needs swizzle
    32B, which is.

    Args:
        tensor_map: the map.
        arch: target; maps with Blackwell's types and swizzles are refused below sm_100 (seen on an H200).

    Returns:
        One message per violation.
    """
    m = tensor_map
    checks = (_check_global(m), _check_box(m), _check_layout(m), _check_arch(m, arch))
    return [message for messages in checks for message in messages]


def _check_global(m: TensorMap) -> list[str]:
    messages = []
    unit = 32 if m.interleave == Interleave.B32 or m.dtype in _PADDED else 16
    if m.global_address % unit:
        messages.append(f"global address {m.global_address:#x} is not a multiple of {unit}")
    if not 0 <= m.global_address < 1 << 57:
        messages.append(f"global address {m.global_address:#x} is not below 2^57")
    for i, dim in enumerate(m.dims):
        if not 1 <= dim <= 1 << 32:
            messages.append(f"dimension {i} has {dim} elements, want 1..2^32")
    inner = {"b4x16": 2, "b4x16_p64": 128, "b6x16_p32": 128}.get(m.dtype, 1)
    if m.dims[0] % inner:
        messages.append(f"dimension 0 has {m.dims[0]} elements, {m.dtype} wants a multiple of {inner}")
    for i, stride in enumerate(m.strides_bytes, 1):
        if stride % unit or not 0 <= stride < 1 << 40:
            messages.append(f"stride of dimension {i} is {stride} bytes, want a multiple of {unit} below 2^40")
    return messages


def _check_box(m: TensorMap) -> list[str]:
    messages = []
    for i, (box, step) in enumerate(zip(m.box, m.element_strides, strict=True)):
        if not 1 <= box <= 256:
            messages.append(f"box has {box} elements along dimension {i}, want 1..256")
        if not 1 <= step <= 8:
            messages.append(f"element stride of dimension {i} is {step}, want 1..8")
    if m.dtype in _PADDED and m.box[0] != 128:
        messages.append(f"box has {m.box[0]} elements along dimension 0, {m.dtype} wants 128")
    row_bits = m.box[0] * m.element.shared_bits
    if m.interleave == Interleave.NONE:
        if row_bits % 128:
            messages.append(f"box has {row_bits / 8:g} bytes along dimension 0, want a multiple of 16")
        if m.swizzle.span and row_bits > 8 * m.swizzle.span:
            messages.append(
                f"box has {row_bits / 8:g} bytes along dimension 0, swizzle {m.swizzle.name} allows {m.swizzle.span}"
            )
    return messages


def _check_layout(m: TensorMap) -> list[str]:
    messages = []
    if not 1 <= m.rank <= MAX_RANK:
        messages.append(f"rank {m.rank}, want 1..{MAX_RANK}")
    if m.interleave != Interleave.NONE and m.rank < 3:
        messages.append(f"rank {m.rank} with an interleaved layout, want at least 3")
    if m.interleave == Interleave.B32 and m.swizzle != Swizzle.B32:
        messages.append(f"interleave 32B with swizzle {m.swizzle.name}, want swizzle B32")
    if m.dtype == "b6x16_p32" and m.interleave != Interleave.NONE:
        messages.append("b6x16_p32 with an interleaved layout")
    if m.swizzle not in _PADDED_SWIZZLES.get(m.dtype, tuple(Swizzle)):
        messages.append(f"{m.dtype} with swizzle {m.swizzle.name}")
    if m.oob_fill == OobFill.NAN and not m.element.is_float:
        messages.append(f"NaN fill with type {m.dtype}, want a floating-point type")
    return messages


def _check_arch(m: TensorMap, arch: str) -> list[str]:
    number = int("".join(c for c in arch if c.isdigit()) or 0)
    if number >= 100:
        return []
    messages = []
    if m.dtype in ("b4x16", *_PADDED):
        messages.append(f"type {m.dtype} needs sm_100, the target is {arch}")
    if m.swizzle in _BLACKWELL_SWIZZLES:
        messages.append(f"swizzle {m.swizzle.name} needs sm_100, the target is {arch}")
    return messages


# Address bits that are XORed: (mask of the bits changed, distance to the bits they are XORed with).
_SWIZZLE_XOR = {
    Swizzle.B32: (0x10, 3),
    Swizzle.B64: (0x30, 3),
    Swizzle.B128: (0x70, 3),
    Swizzle.B128_ATOM_32B: (0x60, 2),
    Swizzle.B128_ATOM_64B: (0x40, 1),
}


def swizzle_offset(address: _Address, swizzle: Swizzle) -> _Address:
    """Where the byte of an unswizzled shared-memory address lies. Its own inverse.

    The bits are those of the absolute address in the CTA's shared window, not of an offset into the box: a box that
    starts inside a pattern continues it. The patterns repeat every 256, 512, 1024, 512 and 256 bytes.

    Source: PTX ISA, tensor swizzling modes. B32, B64 and B128 were seen on an H200.

    Args:
        address: address, or an integer array of addresses.
        swizzle: the mode.

    Returns:
        The address, of the same type.

    Raises:
        TensorMapError: B128_ATOM_32B_FLIP_8B, whose pattern is not modelled.
    """
    if swizzle == Swizzle.NONE:
        return address
    if swizzle not in _SWIZZLE_XOR:
        raise TensorMapError(f"swizzle {swizzle.name} is not modelled")
    mask, distance = _SWIZZLE_XOR[swizzle]
    return address ^ (address >> distance & mask)
