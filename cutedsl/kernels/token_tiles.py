"""The list of token tiles that a grouped GEMM with operands swapped walks, for Blackwell and Hopper.

Only the device knows how many tokens each expert has, so that each CTA counts the tiles when it starts.
"""

import cutlass
from cutlass import cute

WARP = 32
MAX_EXPERTS = 512


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
