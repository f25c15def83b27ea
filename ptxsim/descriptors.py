"""Descriptors of tensor-core instructions: shared-memory matrix descriptors and tcgen05 instruction descriptors.

A matrix descriptor says where an operand tile lies in shared memory; all its layouts are made of 16-byte chunks, so a decoded
operand is a table of chunk numbers. Swizzles permute address bits of the *absolute* shared-memory address.

Sources: PTX ISA 9.x, "tcgen05 Shared memory descriptor" and "tcgen05 Instruction descriptor" (tables 40 to 44), "wgmma Matrix
Descriptor Format"; the canonical layouts in NVIDIA CUTLASS, include/cute/arch/mma_sm100_desc.hpp and
include/cute/atom/mma_traits_sm90_gmma.hpp (comments above make_umma_desc and make_gmma_desc).
Pinned on an H200: wgmma with every swizzle, K-major and MN-major. Not pinned by silicon: for tcgen05, MN-major layouts
without swizzle and swizzles other than 128 bytes.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ptxsim.findings import Unsupported

Chunks = npt.NDArray[np.int64]
CHUNK = 16
# Swizzle name -> (chunks in one row of the atom, first address bit changed, number of bits); bits come from bit 7 upwards.
SWIZZLES = {"none": (1, 4, 0), "32": (2, 4, 1), "64": (4, 4, 2), "128": (8, 4, 3), "128/32": (8, 5, 2)}
_SM100_SWIZZLE = {0: "none", 1: "128/32", 2: "128", 4: "64", 6: "32"}
_SM90_SWIZZLE = {0: "none", 1: "128", 2: "64", 3: "32"}


@dataclass(frozen=True, slots=True)
class MatrixDescriptor:
    """A decoded matrix descriptor; all numbers in bytes.

    Attributes:
        start: address within the CTA's shared window.
        leading: leading dimension byte offset.
        stride: stride dimension byte offset.
        swizzle: a key of SWIZZLES.
    """

    start: int
    leading: int
    stride: int
    swizzle: str


@lru_cache(maxsize=8192)
def decode_matrix(value: int, arch: str) -> MatrixDescriptor:
    """Decodes a 64-bit matrix descriptor.

    Args:
        value: the register.
        arch: "sm100" (tcgen05) or "sm90" (wgmma).

    Raises:
        Unsupported: a reserved bit is set, or a mode that is not modelled (matrix base offset, absolute leading dimension).
    """
    known = (0x3FFF) | (0x3FFF << 16) | (0x3FFF << 32)
    if arch == "sm100":
        known |= 0b111 << 46 | 0b111 << 49 | 1 << 52 | 0b111 << 61
    else:
        known |= 0b111 << 49 | 0b11 << 62
    if value & ~known:
        raise Unsupported(f"matrix descriptor {value:#018x}: reserved bits {value & ~known:#x} are set")
    if value >> 49 & 7:
        raise Unsupported(f"matrix descriptor {value:#018x}: matrix base offset {value >> 49 & 7} is not modelled")
    if arch == "sm100":
        if value >> 46 & 7 != 1:
            raise Unsupported(f"matrix descriptor {value:#018x}: bits 46-48 are {value >> 46 & 7:#05b}, expected 0b001")
        if value >> 52 & 1:
            raise Unsupported(f"matrix descriptor {value:#018x}: an absolute leading dimension address is not modelled")
        swizzle = _SM100_SWIZZLE.get(value >> 61)
        if swizzle is None:
            raise Unsupported(f"matrix descriptor {value:#018x}: swizzle mode {value >> 61} does not exist")
    else:
        swizzle = _SM90_SWIZZLE[value >> 62]
    return MatrixDescriptor((value & 0x3FFF) << 4, (value >> 16 & 0x3FFF) << 4, (value >> 32 & 0x3FFF) << 4, swizzle)


def swizzled(address: Chunks, swizzle: str) -> Chunks:
    """Permutes absolute byte addresses."""
    _, bit, count = SWIZZLES[swizzle]
    if count == 0:
        return address
    return address ^ ((address >> 7 & ((1 << count) - 1)) << bit)


@lru_cache(maxsize=8192)
def k_major_chunks(value: int, arch: str, rows: int, chunks: int) -> Chunks:
    """Chunk numbers (byte address / 16) of a K-major operand: (rows, chunks along K).

    Raises:
        Unsupported: see decode_matrix; also the 32-byte atomicity swizzle, which K-major operands do not have.
    """
    desc = decode_matrix(value, arch)
    if desc.swizzle == "128/32":
        raise Unsupported(f"matrix descriptor {value:#018x}: 128-byte swizzle with 32-byte atoms on a K-major operand")
    width = SWIZZLES[desc.swizzle][0]
    r = np.arange(rows, dtype=np.int64)[:, None]
    c = np.arange(chunks, dtype=np.int64)[None, :]
    step = desc.leading if width == 1 else CHUNK
    address = desc.start + r // 8 * desc.stride + r % 8 * (width * CHUNK) + c * step
    return _finished(swizzled(address, desc.swizzle))


@lru_cache(maxsize=8192)
def mn_major_chunks(value: int, arch: str, chunks: int, depth: int) -> Chunks:
    """Chunk numbers of an MN-major ("transposed") operand: (depth along K, chunks along M or N).

    Raises:
        Unsupported: see decode_matrix.
    """
    desc = decode_matrix(value, arch)
    width = SWIZZLES[desc.swizzle][0]
    height = 4 if desc.swizzle == "128/32" else 8
    k = np.arange(depth, dtype=np.int64)[:, None]
    i = np.arange(chunks, dtype=np.int64)[None, :]
    if width == 1:
        address = desc.start + i * desc.stride + k % 8 * CHUNK + k // 8 * desc.leading
    else:
        within = i % width * CHUNK + k % height * (width * CHUNK)
        address = desc.start + within + i // width * desc.leading + k // height * desc.stride
    return _finished(swizzled(address, desc.swizzle))


def _finished(address: Chunks) -> Chunks:
    out = address // CHUNK
    out.setflags(write=False)
    return out


@dataclass(frozen=True, slots=True)
class InstructionDescriptor:
    """A decoded tcgen05 instruction descriptor.

    Attributes:
        m, n, k: shape of the whole instruction (both CTAs of a pair).
        a, b: keys of mma_formats.FORMATS.
        d: "f32", "f16" or "s32".
        a_mn_major, b_mn_major: "transpose" bits.
        a_negative, b_negative: "negate" bits.
        saturate: integer saturation.
        scale: "ue4m3", "ue8m0" or "" without block scaling.
        a_scale_id, b_scale_id: byte of the 32-bit scale cell where a row's scale factors start.
    """

    m: int
    n: int
    k: int
    a: str
    b: str
    d: str
    a_mn_major: bool = False
    b_mn_major: bool = False
    a_negative: bool = False
    b_negative: bool = False
    saturate: bool = False
    scale: str = ""
    a_scale_id: int = 0
    b_scale_id: int = 0


_F8F6F4 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
_PLAIN: dict[str, tuple[dict[int, str], int, dict[int, str]]] = {
    "f16": ({0: "f16", 1: "bf16"}, 16, {0: "f16", 1: "f32"}),
    "tf32": ({2: "tf32"}, 8, {1: "f32"}),
    "f8f6f4": (_F8F6F4, 32, {0: "f16", 1: "f32"}),
    "i8": ({0: "u8", 1: "s8"}, 32, {2: "s32"}),
}
BLOCK_SCALED = ("mxf8f6f4", "mxf4", "mxf4nvf4")


class _Bits:
    """Reads fields of a descriptor and remembers which bits nobody read."""

    def __init__(self, value: int) -> None:
        self.value, self.rest = value, value

    def take(self, low: int, count: int) -> int:
        self.rest &= ~(((1 << count) - 1) << low)
        return self.value >> low & ((1 << count) - 1)


@lru_cache(maxsize=1024)
def decode_instruction(value: int, kind: str, pair: bool) -> InstructionDescriptor:
    """Decodes a 32-bit instruction descriptor.

    Args:
        value: the register.
        kind: what follows `.kind::`.
        pair: `.cta_group::2`.

    Raises:
        Unsupported: a reserved bit is set, a format or shape does not exist, sparsity, K = 96 (sm_103).
    """
    bits = _Bits(value)
    desc = _block_scaled(bits, kind) if kind in BLOCK_SCALED else _plain(bits, kind)
    if bits.rest:
        raise Unsupported(f"instruction descriptor {value:#010x} of kind::{kind}: bits {bits.rest:#x} are not known")
    _check_shape(desc, kind, pair, value)
    return desc


def _named(table: dict[int, str], code: int, what: str, kind: str) -> str:
    if code not in table:
        raise Unsupported(f"instruction descriptor of kind::{kind}: {what} format {code} does not exist")
    return table[code]


def _plain(bits: _Bits, kind: str) -> InstructionDescriptor:
    formats, k, results = _PLAIN[kind]
    integer = kind == "i8"
    return InstructionDescriptor(
        m=bits.take(24, 5) << 4,
        n=bits.take(17, 6) << 3,
        k=k,
        a=_named(formats, bits.take(7, 3), "A", kind),
        b=_named(formats, bits.take(10, 3), "B", kind),
        d=_named(results, bits.take(4, 2), "D", kind),
        a_mn_major=bool(bits.take(15, 1)),
        b_mn_major=bool(bits.take(16, 1)),
        a_negative=not integer and bool(bits.take(13, 1)),
        b_negative=not integer and bool(bits.take(14, 1)),
        saturate=integer and bool(bits.take(3, 1)),
    )


def _block_scaled(bits: _Bits, kind: str) -> InstructionDescriptor:
    four = kind != "mxf8f6f4"
    formats = {1: "e2m1x2"} if four else _F8F6F4
    scale = "ue8m0" if bits.take(23, 1) else "ue4m3"
    if scale == "ue4m3" and kind != "mxf4nvf4":
        raise Unsupported(
            f"instruction descriptor {bits.value:#010x}: kind::{kind} has UE8M0 scales only, but bit 23 is 0"
        )
    return InstructionDescriptor(
        m=bits.take(27, 2) << 7,
        n=bits.take(17, 6) << 3,
        k=64 if four else 32,
        a=_named(formats, bits.take(7, 3), "A", kind),
        b=_named(formats, bits.take(10, 2 if four else 3), "B", kind),
        d="f32",
        a_mn_major=not four and bool(bits.take(15, 1)),
        b_mn_major=not four and bool(bits.take(16, 1)),
        a_negative=bool(bits.take(13, 1)),
        b_negative=bool(bits.take(14, 1)),
        scale=scale,
        a_scale_id=bits.take(29, 2),
        b_scale_id=bits.take(4, 2),
    )


def _check_shape(desc: InstructionDescriptor, kind: str, pair: bool, value: int) -> None:
    """PTX ISA, table 39 (shapes); sub-byte operands cannot be transposed (table 52)."""
    ms = (128, 256) if pair else (128,) if kind in BLOCK_SCALED else (64, 128)
    step = 16 if pair else 8
    if kind == "i8":
        step = 32 if pair else 16 if desc.n > 32 else 8
    if desc.m not in ms or desc.n % step or not step <= desc.n <= 256:
        group = 2 if pair else 1
        raise Unsupported(
            f"instruction descriptor {value:#010x}: no {desc.m}x{desc.n} for kind::{kind}, cta_group::{group} "
            f"(M is one of {ms}, N a multiple of {step} up to 256)"
        )
    for name, transposed in ((desc.a, desc.a_mn_major), (desc.b, desc.b_mn_major)):
        if transposed and name in ("e2m1", "e2m3", "e3m2"):
            raise Unsupported(f"instruction descriptor {value:#010x}: a transposed operand of format {name}")
