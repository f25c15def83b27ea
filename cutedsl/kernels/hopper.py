"""What kernels for Hopper share: the machine's limits, the list of tiles, and steps of decoding NVFP4.

The hard part is that decoding a weight must take about two instructions: see `grouped_gemm_sm90` for the layouts that
allow it.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import torch
from cutlass import cute

# A tensor's first byte and the bytes of a row are multiples of this. Source: CUDA driver API, cuTensorMapEncodeTiled.
TMA_BYTES = 16
# The 128-byte swizzle repeats after 8 rows; a buffer starts where a period does.
SWIZZLE_BYTES = 1024
WARP = 32
WARPGROUP = 128
MAX_EXPERTS = 512
LOG2_E = 1.4426950408889634
# A stored scale in its place of a BF16 number, and the exponent's leading ones.
_SCALE_MASK, _SCALE_BITS = 0x0FF00FF0, 0x70007000


@dataclass(frozen=True)
class Arch:
    """What a kernel must know of a GPU.

    Attributes:
        name: as the compiler spells it.
        num_sms: a grid of a persistent kernel is never larger.
        smem_bytes: shared memory that one CTA may have.
    """

    name: str
    num_sms: int
    smem_bytes: int


# Source: CUDA C++ Programming Guide, "Compute Capabilities" (227 KiB); NVIDIA's H200 data sheet (132 SMs).
ARCHS = {"sm_90a": Arch(name="sm_90a", num_sms=132, smem_bytes=227 * 1024)}


def num_sms(device: torch.device) -> int:
    """Returns the SMs of a GPU; those of an H200 for tensors that are on none."""
    if device.type != "cuda":
        return ARCHS["sm_90a"].num_sms
    return torch.cuda.get_device_properties(device).multi_processor_count


def mul_bf16x2_half(a: Any, b: Any, half: int) -> Any:
    """a * b of two BF16 by one, each rounded to nearest even, subnormal arguments taken as they are.

    Args:
        a: 32 bits, two BF16.
        b: 32 bits, two BF16.
        half: 0 or 1 - which of b both of a are multiplied with; selecting it costs no instruction.

    Returns:
        Int32.

    Source: PTX ISA, "Half Precision Floating Point Instructions: mul": bf16x2 supports subnormal numbers.
    """
    chosen = ("lo", "hi")[half]
    code = (
        "{ .reg .b16 lo, hi; .reg .b32 both; mov.b32 {lo, hi}, {$r1}; "
        + f"mov.b32 both, {{{chosen}, {chosen}}}; "
        + "mul.rn.bf16x2 {$w0}, {$r0}, both; }"
    )
    return cute.arch.inline_ptx(code, write_only_types=[cutlass.Int32], read_only_args=[a, b])


def scale_pairs(word: Any) -> tuple[Any, Any]:
    """The BF16 numbers s * 2^118 of the four stored block scales in a word; see `prepare_sm90`.

    Args:
        word: Int32 - stored scales in bytes 0 .. 3.

    Returns:
        Int32 of scales 0 and 2, and of 1 and 3, the first in the low half.
    """
    return ((word << 4) & _SCALE_MASK) | _SCALE_BITS, ((word >> 4) & _SCALE_MASK) | _SCALE_BITS


def store_relaxed(pointer: cute.Pointer, values: list[Any]) -> None:
    """Stores four Int32 where other CTAs poll them: each of the four by itself, in no order.

    Args:
        pointer: in global memory, 16-byte aligned.
        values: four Int32.
    """
    cute.arch.inline_ptx(
        "st.relaxed.gpu.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[cutlass.Int64(pointer.toint()), *values],
    )


def load_relaxed(pointer: cute.Pointer) -> Any:
    """Loads four Int32 that other CTAs may be storing: each of the four by itself, in no order.

    Args:
        pointer: in global memory, 16-byte aligned.

    Returns:
        Four Int32.
    """
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[cutlass.Int32] * 4,
        read_only_args=[cutlass.Int64(pointer.toint())],
    )


@cute.jit
def count_tiles(mCount: cute.Tensor, sTile: cute.Tensor, tile_n: cutlass.Constexpr[int]) -> None:
    """One warp: sTile[e] = token tiles of all experts before e; a lane has MAX_EXPERTS / 32 neighbours.

    Args:
        mCount: (E,) int32, E at most MAX_EXPERTS.
        sTile: (MAX_EXPERTS + 1,) int32 in shared memory.
        tile_n: tokens of a tile.
    """
    experts_per_lane, num_experts = MAX_EXPERTS // WARP, cute.size(mCount)
    lane = cute.arch.lane_idx()
    rTiles = cute.make_rmem_tensor(experts_per_lane, cutlass.Int32)
    total = cutlass.Int32(0)
    for i in cutlass.range_constexpr(experts_per_lane):
        expert = lane * experts_per_lane + i
        # All lanes load, so that no load waits for another.
        token_tiles = cute.ceil_div(mCount[cutlass.min(expert, num_experts - 1)], tile_n)
        rTiles[i] = cutlass.select_(expert < num_experts, token_tiles, cutlass.Int32(0))
    for i in cutlass.range_constexpr(experts_per_lane):
        total += rTiles[i]
    # Sum over this lane and those below it.
    through = total
    for distance in (1, 2, 4, 8, 16):
        lower = cute.arch.shuffle_sync_up(through, distance)
        if lane >= distance:
            through += lower
    before = through - total
    for i in cutlass.range_constexpr(experts_per_lane):
        sTile[lane * experts_per_lane + i] = before
        before += rTiles[i]
    if lane == WARP - 1:
        sTile[MAX_EXPERTS] = before


@cute.jit
def swiglu(gate: cutlass.Float32, up: cutlass.Float32, limit: cutlass.Float32) -> cutlass.Float32:
    """h = silu(min(gate, limit)) * clamp(up, -limit, limit), as cutedsl.reference.swiglu.

    Args:
        gate, up: FP32.
        limit: positive; infinity for no clamp.

    Numerics: as `blackwell.swiglu`.
    """
    gate = cute.arch.fmin(gate, limit, nan=True)
    up = cute.arch.fmin(cute.arch.fmax(up, -limit, nan=True), limit, nan=True)
    sigmoid = cute.arch.rcp_approx(1.0 + cute.math.exp2(gate * -LOG2_E, fastmath=True))
    return gate * sigmoid * up
