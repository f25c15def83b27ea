"""What kernels for Blackwell share: the machine's limits, and block scales on their way to tensor memory (TMEM).

The hard part is that one array of scales has three layouts. In global memory it is a matrix of 512-byte scale tiles (128
rows by 4 scales, see `cutedsl.layout`). TMA moves whole tiles and so sees 256 elements of 16 bits, as a box has at most
256 elements in a dimension. For tcgen05.cp and the MMA the same bytes are scales of rows and steps of K, where 16
elements share a scale through a stride of 0.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import torch
from cutlass import cute
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import cpasync, tcgen05

from cutedsl.formats import NVFP4
from cutedsl.layout import TILE_BYTES, TILE_COLUMNS, TILE_ROWS

# A tensor's first byte and the bytes of a row are multiples of this. Source: CUDA driver API, cuTensorMapEncodeTiled.
TMA_BYTES = 16
# The 128-byte swizzle repeats after 8 rows; a buffer starts where a period does.
SWIZZLE_BYTES = 1024
WARP = 32
LOG2_E = 1.4426950408889634
# K of one MMA of FP4, and elements of K in a scale tile.
MMA_K = 64
SF_TILE_K = TILE_COLUMNS * NVFP4.block_size
_SF_TILE_ELEMENTS = TILE_BYTES // 2


@dataclass(frozen=True)
class Arch:
    """What a kernel must know of a GPU.

    Attributes:
        name: as the compiler spells it.
        num_sms: a grid of a persistent kernel is never larger.
        smem_bytes: shared memory that one CTA may have.
        tmem_columns: of one SM.
    """

    name: str
    num_sms: int
    smem_bytes: int
    tmem_columns: int


# Source: CUDA C++ Programming Guide, "Compute Capabilities" (227 KiB); PTX ISA, "Tensor Memory" (512 columns); NVIDIA's
# B200 data sheet (148 SMs).
ARCHS = {"sm_100a": Arch(name="sm_100a", num_sms=148, smem_bytes=227 * 1024, tmem_columns=512)}


def tmem_sf_columns(rows: int, k: int) -> int:
    """TMEM columns of block scales: 4 scales of each of 32 rows make one; lanes 32 .. 127 hold copies.

    Args:
        rows: of A or B in a tile, a multiple of 128.
        k: of a tile, a multiple of 64.

    Source: PTX ISA, tcgen05.mma, "Scale factor layout", 4X.
    """
    return rows // WARP * (k // SF_TILE_K)


def num_sms(device: torch.device) -> int:
    """Returns the SMs of a GPU; those of the full part for tensors that are on none."""
    if device.type != "cuda":
        return ARCHS["sm_100a"].num_sms
    return torch.cuda.get_device_properties(device).multi_processor_count


def packed_codes(packed: cute.Tensor, rows: Any, k: Any) -> cute.Tensor:
    """Returns (rows, k) FP4 of (rows, k/2) bytes in global memory."""
    pointer = cute.recast_ptr(packed.iterator, dtype=cutlass.Float4E2M1FN)
    k = cute.assume(k, TMA_BYTES * NVFP4.codes_per_byte)
    return cute.make_tensor(pointer, cute.make_layout((rows, k), stride=(k, 1)))


def expert_codes(packed: cute.Tensor) -> cute.Tensor:
    """Returns (n, k, experts) FP4 of (experts, n, k/2) bytes in global memory."""
    num_experts, n, k_bytes = packed.shape
    k = cute.assume(k_bytes * NVFP4.codes_per_byte, TMA_BYTES * NVFP4.codes_per_byte)
    layout = cute.make_layout((n, k, num_experts), stride=(k, 1, cutlass.Int64(n) * k))
    return cute.make_tensor(cute.recast_ptr(packed.iterator, dtype=cutlass.Float4E2M1FN), layout)


def global_sf_tiles(scales: cute.Tensor, rows: Any, k: Any) -> cute.Tensor:
    """Returns (element of a scale tile, tiles along k, tiles along rows) of swizzled scales."""
    tiles_k, tiles_rows = cute.ceil_div(k, SF_TILE_K), cute.ceil_div(rows, TILE_ROWS)
    stride = (1, _SF_TILE_ELEMENTS, tiles_k * _SF_TILE_ELEMENTS)
    layout = cute.make_layout((_SF_TILE_ELEMENTS, tiles_k, tiles_rows), stride=stride)
    return cute.make_tensor(cute.recast_ptr(scales.iterator, dtype=cutlass.Int16), layout)


def expert_sf_tiles(scales: cute.Tensor, n: Any, k: Any) -> cute.Tensor:
    """Returns (element of a scale tile, tiles along k, tiles along n, experts) of each expert's swizzled scales."""
    tiles = global_sf_tiles(scales, n, k)
    elements, tiles_k, tiles_n = tiles.shape
    stride = cutlass.Int64(elements * tiles_k) * tiles_n
    layout = cute.make_layout((*tiles.shape, scales.shape[0]), stride=(*tiles.stride, stride))
    return cute.make_tensor(tiles.iterator, layout)


def sf_box(rows: int, k: int) -> tuple[int, int, int]:
    """Returns the part of global_sf_tiles that a tile of rows x k needs."""
    return (_SF_TILE_ELEMENTS, k // SF_TILE_K, rows // TILE_ROWS)


def shared_sf_tiles(s_sf: cute.Tensor, rows: int, k: int, num_stages: int) -> cute.Tensor:
    """Returns (box, stage) of scales in shared memory: compact, tiles along k next to each other."""
    pointer = cute.recast_ptr(s_sf.iterator, dtype=cutlass.Int16)
    return cute.make_tensor(pointer, cute.make_layout((*sf_box(rows, k), num_stages)))


def tma_partition(tma: cute.CopyAtom, s_tensor: cute.Tensor, g_tensor: cute.Tensor) -> tuple[Any, Any]:
    """Returns (box, stage) in shared and (box, tiles ...) in global memory; a box is the first three modes."""
    return cpasync.tma_partition(
        tma, 0, cute.make_layout(1), cute.group_modes(s_tensor, 0, 3), cute.group_modes(g_tensor, 0, 3)
    )


def sf_to_tmem(
    s_sf: cute.Tensor, t_sf: cute.Tensor, cta_group: tcgen05.CtaGroup = tcgen05.CtaGroup.ONE
) -> tuple[Any, Any, Any]:
    """Returns the copy of scales to TMEM, its source (..., stage) and its destination.

    A tcgen05.cp moves 32 rows of 16 bytes into each of the four quarters of the lanes. Of a pair of CTAs each copies its
    own shared memory to its own TMEM, all by one instruction of the first.
    """
    atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(cta_group), cutlass.Float8E4M3FN)
    # One scale stands for 16 elements with stride 0; it is copied once.
    s_compact, t_compact = cute.filter_zeros(s_sf), cute.filter_zeros(t_sf)
    tiled_copy = tcgen05.make_s2t_copy(atom, t_compact)
    thr_copy = tiled_copy.get_slice(0)
    source = tcgen05.get_s2t_smem_desc_tensor(tiled_copy, thr_copy.partition_S(s_compact))
    return tiled_copy, source, thr_copy.partition_D(t_compact)


@cute.jit
def swiglu(gate: cutlass.Float32, up: cutlass.Float32, limit: cutlass.Float32) -> cutlass.Float32:
    """h = silu(min(gate, limit)) * clamp(up, -limit, limit), as cutedsl.reference.swiglu.

    Args:
        gate, up: FP32.
        limit: positive; infinity for no clamp.

    Numerics: FP32; NaN stays NaN, infinite arguments give what the reference gives. silu(g) is g * rcp(1 + ex2(-g log2 e))
    with the hardware's approximations: relative error below 2^-21 + |min(g, 0)| * 2^-23, to which the argument of ex2
    adds the second term. Where the exact silu is below 2^-118 in magnitude (g < -86) it may be 0.
    Source: PTX ISA, "ex2" (2^-22), "rcp" (1 ulp), "min" and "max" (.NaN).
    """
    gate = cute.arch.fmin(gate, limit, nan=True)
    up = cute.arch.fmin(cute.arch.fmax(up, -limit, nan=True), limit, nan=True)
    sigmoid = cute.arch.rcp_approx(1.0 + cute.math.exp2(gate * -LOG2_E, fastmath=True))
    return gate * sigmoid * up


def before_thread_sync() -> None:
    """Orders this thread's tcgen05 instructions before a barrier that follows. Source: PTX ISA, tcgen05.fence."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)


def after_thread_sync() -> None:
    """Orders this thread's tcgen05 instructions after a barrier it has passed. Source: PTX ISA, tcgen05.fence."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)
