"""Grouped NVFP4 GEMM on Hopper: weights decoded to BF16 in registers on their way to WGMMA, with what follows fused.

    bf16:          D = bf16(alpha * (X W_e^T))
    swiglu:        D = bf16(h), h = silu(min(gate, limit)) * clamp(up, -limit, limit) of gate and up rows of W_e
    swiglu_nvfp4:  D = the BF16 numbers e2m1 * e4m3 of quantize_activation(h, h_scale[e]), from h in FP32

Hopper multiplies BF16, and a code times its block scale is exactly a BF16 number: so the product is the one that FP4
hardware computes. Operands are swapped as in `grouped_gemm_swap_sm100`: weights are the MMA's M, which WGMMA takes from
registers, and tokens its N, from shared memory. A decoded weight thus never leaves the thread that decoded it, and it is
used for all tokens of the tile. Hard is to decode in few instructions, as many weights meet few tokens when decoding:

Layout. `cutedsl.prepare_sm90` puts the codes of 64 rows by 128 columns into 4096 neighbouring bytes, in which a thread's
share for 64 columns is 16 neighbouring bytes: one load, no bank conflicts, and from DRAM whole blocks by bulk copies,
without tensor maps. A word has the 8 codes that a thread holds of 64 x 16: for the pairs of neighbouring columns
p = 0 .. 3 (row g, row g + 8, and both again 8 columns on) two codes each, the left one in the low half. Shifts and masks
bring sign and magnitude to bits 15 and 8:6 of each half; the places in the word are such that few are needed, and most go
to the left, as those are multiplications, for which there is room: logic is what limits decoding. That is a BF16 number:
the code times 2^-126, subnormal where the code is.

Scales. A block scale s is stored as its 8 upper bits of BF16 without the exponent's three leading ones, that is as
s * 2^118: a shift and a mask make the BF16 numbers of two, and the multiplication takes either for both of its halves. The
product, code * s * 2^-8, is normal or 0, and exact. The factor 2^8 that is left goes into alpha.

Tiles are numbered, found and walked as in `grouped_gemm_swap_sm100`, by persistent CTAs: one warp loads, two warpgroups
decode, multiply and store. While one decodes, the other one's products keep the tensor cores busy.

Split K. A linear of few tokens may have fewer tiles than there are SMs. Then the CTAs of a cluster share a tile: each has
its part of K, and sums meet in the order of ranks through distributed shared memory: no atomics, same result each time.

Padding: rows of X behind a group's last are computed as columns of their own and not stored; of D exactly the groups'
rows are written. Columns of X behind k are zeros from TMA, as are weights there from `prepare_sm90`.

Names: W the weights (the MMA's A), X the tokens (its B).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cutlass
import torch
from cutlass import cute, memory, utils
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor
from cutlass.utils import hopper_helpers

from cutedsl import compile as compiler
from cutedsl.formats import NVFP4
from cutedsl.kernels import hopper
from cutedsl.kernels.hopper import ARCHS, SWIZZLE_BYTES, TMA_BYTES, WARP, WARPGROUP
from cutedsl.ops import registry

# What follows the sums.
BF16, SWIGLU, SWIGLU_NVFP4 = "bf16", "swiglu", "swiglu_nvfp4"
EPILOGUES = (BF16, SWIGLU, SWIGLU_NVFP4)

# A block of prepared weights. Source: cutedsl.prepare_sm90.
BLOCK_ROWS, BLOCK_K = 64, 128
BLOCK_BYTES = BLOCK_ROWS * BLOCK_K // 2
BLOCK_SF_BYTES = BLOCK_ROWS * BLOCK_K // NVFP4.block_size
# One block along K is a stage; WGMMA takes 16 columns at a time, a load of codes covers 64.
TILE_K = BLOCK_K
MMA_K = 16
LOAD_K = 64
MAX_EXPERTS = 512
MAX_TILE_N = 256
# Columns of sums of a warpgroup: 160 registers a thread.
MAX_SUMS = 320
MAX_SPLIT_K = 8

TILES_W = (128, 256)
# Warpgroups that decode and multiply, and their registers: with few tokens sums are few, and more warps hide latency.
# Source: 64 K registers an SM; 2 x 128 x 232 + 128 x 40 fit, as do 4 x 128 x 104 + 128 x 40.
CONSUMER_REGISTERS = {2: 232, 4: 104}
LOAD_REGISTERS = 40

# Tokens whose results pass through shared memory at a time, and what they take there: for each token the 64 columns of a
# block in BF16, or its 32 h in FP32, and 4 words so that tokens start in different banks.
UNIT_TOKENS = 32
TOKEN_WORDS = 32 + 4
# Columns of D that a thread stores: 16 bytes of BF16, or one block of h.
BF16_UNIT = 8
H_UNIT = NVFP4.block_size
H_OF_BLOCK = BLOCK_ROWS // 2

K_MULTIPLE = TMA_BYTES // 2
N_MULTIPLE = {BF16: BF16_UNIT, SWIGLU: 2 * H_UNIT, SWIGLU_NVFP4: 2 * H_UNIT}

# What is left of a decoded weight's scale: see the module's text.
DECODED_SCALE = 256.0
_CODE_MASK = 0x81C081C0 - (1 << 32)
_SIGN_MASK = 0x80008000 - (1 << 32)
_MAGNITUDE_MASK = 0x01C001C0


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of rows and experts, n and k.

    Attributes:
        epilogue: one of EPILOGUES.
        tile_w: weight rows of a tile, one of TILES_W.
        tile_n: tokens of a tile, a multiple of 8.
        num_stages: steps of K between load and MMA.
        num_consumers: warpgroups that decode and multiply, each its share of tile_w.
        overlap: weights are decoded while the tensor cores work on those before.
        split_k: CTAs of a cluster that share a tile along K.
        arch: a key of ARCHS.
    """

    epilogue: str
    tile_w: int
    tile_n: int
    num_stages: int
    num_consumers: int = 2
    overlap: bool = True
    split_k: int = 1
    arch: str = "sm_90a"

    @property
    def blocks(self) -> int:
        """Blocks of weight rows of a tile."""
        return self.tile_w // BLOCK_ROWS

    @property
    def blocks_of_warpgroup(self) -> int:
        """Of them, those that one warpgroup computes."""
        return self.blocks // self.num_consumers

    @property
    def consumer_threads(self) -> int:
        """Threads that decode, multiply and store."""
        return self.num_consumers * WARPGROUP

    @property
    def load_warp(self) -> int:
        """The warp that loads: the first behind the consumers."""
        return self.consumer_threads // WARP

    @property
    def unit_tokens(self) -> int:
        """Tokens that pass through shared memory at a time; with split_k, tokens that one CTA adds up at a time."""
        return min(self.tile_n, UNIT_TOKENS) if self.split_k == 1 else 8

    @property
    def stage_bytes(self) -> int:
        """What the loads of one stage write, and its barrier expects."""
        return self.blocks * (BLOCK_BYTES + BLOCK_SF_BYTES) + 2 * self.tile_n * TILE_K

    @property
    def fixed_bytes(self) -> int:
        """Shared memory beside the stages: results on their way out, sums of a split, tiles of experts, barriers."""
        out = 4 * self.num_consumers * self.unit_tokens * TOKEN_WORDS
        partial = 4 * self.tile_w * self.tile_n if self.split_k > 1 else 0
        return out + partial + 4 * (MAX_EXPERTS + 4) + 2048

    @property
    def smem_bytes(self) -> int:
        """Upper bound of a CTA's shared memory."""
        return self.num_stages * self.stage_bytes + self.fixed_bytes

    def validate(self) -> "Config":
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled, or could not run on the architecture.
        """
        if self.arch not in ARCHS:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(ARCHS)}")
        if self.epilogue not in EPILOGUES:
            raise ValueError(f"Config: epilogue is {self.epilogue!r}, expected one of {EPILOGUES}")
        if self.tile_w not in TILES_W:
            raise ValueError(f"Config: tile_w is {self.tile_w}, expected one of {TILES_W}")
        if self.tile_n not in range(8, MAX_TILE_N + 1, 8) or self.tile_n % self.unit_tokens:
            raise ValueError(
                f"Config: tile_n is {self.tile_n}, expected 8, 16, 24 or a multiple of {UNIT_TOKENS} to {MAX_TILE_N}"
            )
        if self.blocks_of_warpgroup * self.tile_n > MAX_SUMS:
            raise ValueError(f"Config: {self} has more sums than registers; take a smaller tile_n or tile_w")
        if self.num_stages < 2:
            raise ValueError(f"Config: num_stages is {self.num_stages}, expected at least 2")
        if self.split_k not in (1, 2, 4, MAX_SPLIT_K):
            raise ValueError(f"Config: split_k is {self.split_k}, expected 1, 2, 4 or {MAX_SPLIT_K}")
        arch = ARCHS[self.arch]
        if self.smem_bytes > arch.smem_bytes:
            raise ValueError(
                f"Config: {self} needs {self.smem_bytes} bytes of shared memory, {self.arch} has {arch.smem_bytes}; "
                "take fewer stages"
            )
        return self


def largest_config(
    epilogue: str, tile_w: int, tile_n: int, num_consumers: int = 2, overlap: bool = True, split_k: int = 1,
    arch: str = "sm_90a",
) -> Config:  # fmt: skip
    """The configuration of that tile with as many stages as fit the architecture."""
    without_stages = Config(epilogue, tile_w, tile_n, 0, num_consumers, overlap, split_k, arch)
    num_stages = (ARCHS[arch].smem_bytes - without_stages.fixed_bytes) // without_stages.stage_bytes
    return replace(without_stages, num_stages=num_stages).validate()


class _Smem(NamedTuple):
    """Shared memory of a CTA. The last mode of sW, sSFW and sX is the stage."""

    # (word, blocks, stage) of Int32; see prepare_sm90
    sW: Any
    sSFW: Any
    # (tile_n, TILE_K, stage) of BF16 in the 128-byte swizzle
    sX: Any
    # (words of a token, unit_tokens, warpgroup) of Float32
    sOut: Any
    # (WARPGROUP, sums of a thread, warpgroup) of Float32; with split_k only
    sPartial: Any
    # (MAX_EXPERTS + 1,): token tiles of all experts before each one; of all experts behind the last.
    sTile: Any
    # One barrier a stage: loads have arrived; all consumer warps are done.
    full: Any
    empty: Any


class _Tiles(NamedTuple):
    """A cluster's tiles first, first + step, ... below end; where they are is found in sTile."""

    first: Any
    end: Any
    step: Any
    num_w: Any
    sTile: Any
    # Steps of K of this CTA: first_k .. end_k - 1
    first_k: Any
    end_k: Any


class _Tile(NamedTuple):
    """An expert's weight rows tile_w * w_tile ... by its tokens first_token ... first_token + tile_n - 1."""

    expert: Any
    w_tile: Any
    first_token: Any


class _Out(NamedTuple):
    """Where results go and what they are multiplied with; None where the epilogue has no use for it."""

    # Address of D, its row stride, and what an expert's rows and columns begin at: see grouped_gemm.
    pointer: Any
    row_stride: Any
    group_rows: Any
    group_columns: Any
    mAlpha: Any
    mHScale: Any
    limit: Any
    mCount: Any
    mPaddedOffset: Any
    n: Any


class GroupedGemmSm90:
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.validate()

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mW_bytes: cute.Tensor,
        mSFW_bytes: cute.Tensor,
        mAlpha: cute.Tensor,
        mCount: cute.Tensor,
        mPaddedOffset: cute.Tensor,
        mD: cute.Tensor,
        mHScale: cute.Tensor | None,
        limit: cutlass.Float32,
        n: cutlass.Int32,
        group_rows: cutlass.Int32,
        group_columns: cutlass.Int32,
        max_active_clusters: cutlass.Int32,
        stream: Any,
    ) -> None:
        """Makes the tensor map of X, on the host, and launches min(tiles, max_active_clusters) clusters.

        Args:
            mX: (P, k) bf16.
            mW_bytes: (E, Np, Kp/2) uint8, prepared.
            mSFW_bytes: (E, Np, Kp/16) uint8, prepared.
            mAlpha: (E, blocks of weight rows) fp32.
            mCount: (E,) int32.
            mPaddedOffset: (E + 1,) int32.
            mD: (rows, columns) bf16, rows maybe further apart than they are long.
            mHScale: (E,) fp32; swiglu_nvfp4 only.
            limit: of SwiGLU, infinity for none.
            n: weight rows of an expert, without padding.
            group_rows, group_columns: what each expert's rows and columns of D begin at.
            max_active_clusters: the most clusters to launch, at least 1.
            stream: to launch on.
        """
        config = self.config
        num_rows = mX.shape[0]
        tiled_mma = self._tiled_mma()
        x_stage = cute.slice_(self._x_smem_layout(), (None, None, 0))
        load = cpasync.CopyBulkTensorTileG2SOp()
        tma_x, mX = cpasync.make_tiled_tma_atom(load, mX, x_stage, (config.tile_n, TILE_K))
        # As many as there could be: only the device knows how many there are.
        num_tiles = cute.ceil_div(num_rows, config.tile_n) * cute.ceil_div(n, config.tile_w)
        num_tiles = num_tiles + cute.size(mCount) * cute.ceil_div(n, config.tile_w)
        clusters = cutlass.min(num_tiles, max_active_clusters)
        out = _Out(
            mD.iterator, cutlass.Int64(mD.stride[0]), group_rows, group_columns, mAlpha, mHScale, limit, mCount,
            mPaddedOffset, n,
        )  # fmt: skip
        weights = (self._blocks(mW_bytes, BLOCK_BYTES), self._blocks(mSFW_bytes, BLOCK_SF_BYTES))
        self.kernel(tiled_mma, tma_x, mX, weights, out).launch(
            grid=(clusters * config.split_k, 1, 1),
            block=(config.consumer_threads + WARPGROUP, 1, 1),
            cluster=(config.split_k, 1, 1),
            smem=None,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tiled_mma: cute.TiledMma, tma_x: Any, mX: cute.Tensor, weights: Any, out: _Out) -> None:
        """Sets up barriers and the list of tiles, then every warp takes its role."""
        config = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == config.load_warp:
            cpasync.prefetch_descriptor(tma_x)
        smem = self._allocate_smem()
        if warp == 0:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(config.num_stages):
                    cute.arch.mbarrier_init(smem.full + stage, 1)
                    cute.arch.mbarrier_init(smem.empty + stage, config.load_warp)
        if warp == config.load_warp:
            hopper.count_tiles(out.mCount, smem.sTile, config.tile_n)
        # Behind this barrier all mbarriers are initialised, and the tiles are in shared memory.
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        tiles = self._tiles(weights[0], out.n, smem.sTile)

        if warp >= config.load_warp:
            cute.arch.setmaxregister_decrease(LOAD_REGISTERS)
            if warp == config.load_warp:
                self._load(tma_x, mX, weights, out.mPaddedOffset, smem, tiles)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS[config.num_consumers])
            self._consume(tiled_mma, smem, tiles, out)

    @cute.jit
    def _load(
        self, tma_x: Any, mX: cute.Tensor, weights: Any, mPaddedOffset: cute.Tensor, smem: _Smem, tiles: _Tiles
    ) -> None:
        """Load warp: for each step of K the blocks of weights, their scales and the tokens."""
        config = self.config
        mW, mSFW = weights
        num_row_blocks = cute.size(mW, mode=[2])
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), cutlass.Int32)
        index, phase = cutlass.Int32(0), cutlass.Int32(1)
        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            at = self._find(tiles, tile)
            row = mPaddedOffset[at.expert] + at.first_token
            # (tile_n, TILE_K, k tiles)
            gX = cute.local_tile(cute.domain_offset((row, 0), mX), (config.tile_n, TILE_K), (0, None))
            tXsX, tXgX = cpasync.tma_partition(
                tma_x, 0, cute.make_layout(1), cute.group_modes(smem.sX, 0, 2), cute.group_modes(gX, 0, 2)
            )
            for k_tile in cutlass.range(tiles.first_k, tiles.end_k, unroll=1):
                cute.arch.mbarrier_wait(smem.empty + index, phase)
                full = smem.full + index
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full, config.stage_bytes)
                    for block in cutlass.range_constexpr(config.blocks):
                        # A tile behind the last block loads that again; nobody stores what comes of it.
                        row_block = cutlass.min(at.w_tile * config.blocks + block, num_row_blocks - 1)
                        cute.copy(
                            bulk, mW[None, k_tile, row_block, at.expert], smem.sW[None, block, index], mbar_ptr=full
                        )
                        cute.copy(
                            bulk, mSFW[None, k_tile, row_block, at.expert], smem.sSFW[None, block, index], mbar_ptr=full
                        )
                cute.copy(tma_x, tXgX[None, k_tile], tXsX[None, index], tma_bar_ptr=full)
                index += 1
                if index == config.num_stages:
                    index = cutlass.Int32(0)
                    phase = phase ^ 1

    @cute.jit
    def _consume(self, tiled_mma: cute.TiledMma, smem: _Smem, tiles: _Tiles, out: _Out) -> None:
        """Two warpgroups: each decodes its blocks of rows, multiplies them with all tokens of the tile, and stores."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        group, thread = cute.arch.make_warp_uniform(thread // WARPGROUP), thread % WARPGROUP
        rows = config.blocks_of_warpgroup * BLOCK_ROWS
        tCrB = tiled_mma.make_fragment_B(tiled_mma.get_slice(0).partition_B(smem.sX))
        acc = cute.make_rmem_tensor(tiled_mma.partition_shape_C((rows, config.tile_n)), cutlass.Float32)
        shape_a = tiled_mma.partition_shape_A((rows, LOAD_K))
        # One for each half of a stage, so that one may be written while tensor cores read the other.
        tCrA = [cute.make_rmem_tensor(shape_a, cutlass.BFloat16) for _ in range(2 if config.overlap else 1)]
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        in_flight = 1 if config.overlap else 0
        index, phase = cutlass.Int32(0), cutlass.Int32(0)
        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            at = self._find(tiles, tile)
            acc.fill(0.0)
            last = cutlass.Int32(-1)
            for _ in cutlass.range(tiles.first_k, tiles.end_k, unroll=1):
                cute.arch.mbarrier_wait(smem.full + index, phase)
                for half in cutlass.range_constexpr(TILE_K // LOAD_K):
                    tCrA_half = tCrA[half % len(tCrA)]
                    self._decode(smem, index, half, group, thread, tCrA_half)
                    warpgroup.fence()
                    k_blocks = LOAD_K // MMA_K
                    for i in cutlass.range_constexpr(k_blocks):
                        tCrB_i = tCrB[None, None, half * k_blocks + i, index]
                        cute.gemm(tiled_mma, acc, tCrA_half[None, None, i], tCrB_i, acc)
                    warpgroup.commit_group()
                    warpgroup.wait_group(in_flight)
                    if cutlass.const_expr(config.overlap and half == 0):
                        # What was in flight were the last MMAs of the stage before.
                        self._release(smem, last)
                last = index
                if cutlass.const_expr(not config.overlap):
                    self._release(smem, last)
                index += 1
                if index == config.num_stages:
                    index = cutlass.Int32(0)
                    phase = phase ^ 1
            if cutlass.const_expr(config.overlap):
                warpgroup.wait_group(0)
                self._release(smem, last)
            # (column pair, row g or g + 8, 8 tokens, blocks)
            sums = cute.make_layout((2, 2, config.tile_n // 8, config.blocks_of_warpgroup))
            self._store(cute.make_tensor(acc.iterator, sums), smem, at, group, thread, out)

    @cute.jit
    def _release(self, smem: _Smem, index: Any) -> None:
        """One arrival of this warp: it has no more to do with a stage; none if index is -1."""
        if index >= 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(smem.empty + index)

    @cute.jit
    def _decode(self, smem: _Smem, index: Any, half: int, group: Any, thread: Any, tCrA: cute.Tensor) -> None:
        """Writes a warpgroup's weights of 64 columns of a stage, times their block scales, to the fragment."""
        config = self.config
        # ((1, 2, 2), blocks, k blocks): pairs of neighbouring columns
        rA = cute.recast_tensor(tCrA, cutlass.Int32)
        steps = LOAD_K // MMA_K
        for b in cutlass.range_constexpr(config.blocks_of_warpgroup):
            block = group * config.blocks_of_warpgroup + b
            rW = cute.make_rmem_tensor(4, cutlass.Int32)
            # (4 words, thread, half)
            sW = cute.make_tensor(
                smem.sW[None, block, index].iterator, cute.make_layout((4, WARPGROUP, TILE_K // LOAD_K))
            )
            cute.autovec_copy(sW[None, thread, half], rW)
            # (4 scales along k, half, row g or g + 8, g of all warps)
            rSF = cute.make_rmem_tensor((1, 2), cutlass.Int32)
            sSF = cute.make_tensor(
                smem.sSFW[None, block, index].iterator, cute.make_layout((1, TILE_K // LOAD_K, 2, WARPGROUP // 4))
            )
            for h in cutlass.range_constexpr(2):
                rSF[0, h] = sSF[0, half, h, thread // 4]
            # Of rows g and g + 8: BF16 numbers of steps 0 and 2, and of 1 and 3.
            scales = [hopper.scale_pairs(rSF[0, h]) for h in range(2)]
            for i in cutlass.range_constexpr(steps):
                word = rW[i]
                pairs = (
                    word & _CODE_MASK,
                    (word << 3) & _CODE_MASK,
                    ((word >> 3) & _MAGNITUDE_MASK) | ((word << 1) & _SIGN_MASK),
                    ((word << 6) & _MAGNITUDE_MASK) | ((word << 2) & _SIGN_MASK),
                )
                for p in cutlass.range_constexpr(4):
                    scale = scales[p % 2][i % 2]
                    rA[(0, p % 2, p // 2), b, i] = hopper.mul_bf16x2_half(pairs[p], scale, i // 2)

    @cute.jit
    def _store(self, acc: cute.Tensor, smem: _Smem, at: _Tile, group: Any, thread: Any, out: _Out) -> None:
        """Warpgroup: its blocks of sums, times alpha, a unit of tokens after the other, to D."""
        config = self.config
        g = thread % WARP // 4
        num_tokens = cutlass.min(out.mCount[at.expert] - at.first_token, config.tile_n)
        for b in cutlass.range_constexpr(config.blocks_of_warpgroup):
            block = at.w_tile * config.blocks + group * config.blocks_of_warpgroup + b
            w_row = block * BLOCK_ROWS + thread // WARP * 16 + g
            alphas = [self._alpha(out, at.expert, w_row + 8 * h) for h in range(2)]
            for unit in cutlass.range_constexpr(config.tile_n // config.unit_tokens):
                if unit * config.unit_tokens < num_tokens:
                    # Behind this barrier the last unit has been read.
                    cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)
                    self._put(acc, smem.sOut[None, None, group], b, unit, thread, alphas, out)
                    cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)
                    self._take(smem.sOut[None, None, group], at, block, unit, num_tokens, thread, out)

    @cute.jit
    def _put(self, acc: cute.Tensor, sOut: cute.Tensor, b: int, unit: int, thread: Any, alphas: Any, out: _Out) -> None:
        """Writes a thread's sums of a unit, or the h they make, to shared memory, token by token."""
        config = self.config
        g, t = thread % WARP // 4, thread % 4
        if cutlass.const_expr(config.epilogue == BF16):
            # (64 columns and padding, token) in BF16
            pointer = cute.recast_ptr(sOut.iterator, dtype=cutlass.BFloat16)
            sOut = cute.make_tensor(pointer, cute.make_layout((2 * TOKEN_WORDS, config.unit_tokens)))
        column = thread // WARP * (8 if config.epilogue != BF16 else 16) + g
        for j in cutlass.range_constexpr(config.unit_tokens // 8):
            chunk = unit * (config.unit_tokens // 8) + j
            for i in cutlass.range_constexpr(2):
                token = 8 * j + 2 * t + i
                low = acc[i, 0, chunk, b] * alphas[0]
                high = acc[i, 1, chunk, b] * alphas[1]
                if cutlass.const_expr(config.epilogue == BF16):
                    sOut[column, token] = low.to(cutlass.BFloat16)
                    sOut[column + 8, token] = high.to(cutlass.BFloat16)
                else:
                    sOut[column, token] = hopper.swiglu(low, high, out.limit)

    @cute.jit
    def _take(
        self, sOut: cute.Tensor, at: _Tile, block: Any, unit: int, num_tokens: Any, thread: Any, out: _Out
    ) -> None:
        """Stores a unit: neighbouring threads have neighbouring columns of D."""
        config = self.config
        columns_of_unit = BF16_UNIT if config.epilogue == BF16 else H_UNIT
        of_block = BLOCK_ROWS if config.epilogue == BF16 else H_OF_BLOCK
        units_of_token = of_block // columns_of_unit
        num_columns = out.n if config.epilogue == BF16 else out.n // 2
        words = TOKEN_WORDS
        for start in cutlass.range_constexpr(0, config.unit_tokens * units_of_token, WARPGROUP):
            token, part = (start + thread) // units_of_token, (start + thread) % units_of_token
            tile_token = unit * config.unit_tokens + token
            column = block * of_block + part * columns_of_unit
            if (token < config.unit_tokens) & (tile_token < num_tokens) & (column < num_columns):
                rD = cute.make_rmem_tensor(columns_of_unit, cutlass.BFloat16)
                if cutlass.const_expr(config.epilogue == BF16):
                    pointer = cute.recast_ptr(sOut.iterator, dtype=cutlass.BFloat16)
                    layout = cute.make_layout(
                        (BF16_UNIT, BLOCK_ROWS // BF16_UNIT, config.unit_tokens), stride=(1, BF16_UNIT, 2 * words)
                    )
                    cute.autovec_copy(cute.make_tensor(pointer, layout)[None, part, token], rD)
                else:
                    layout = cute.make_layout(
                        (H_UNIT, H_OF_BLOCK // H_UNIT, config.unit_tokens), stride=(1, H_UNIT, words)
                    )
                    rH = cute.make_rmem_tensor(H_UNIT, cutlass.Float32)
                    cute.autovec_copy(cute.make_tensor(sOut.iterator, layout)[None, part, token], rH)
                    rD.store(rH.load().to(cutlass.BFloat16))
                row = out.mPaddedOffset[at.expert] + at.first_token + tile_token - at.expert * out.group_rows
                offset = row * out.row_stride + at.expert * out.group_columns + column
                gD = cute.make_tensor(out.pointer + cute.assume(offset, BF16_UNIT), cute.make_layout(columns_of_unit))
                cute.autovec_copy(rD, gD)

    @cute.jit
    def _alpha(self, out: _Out, expert: Any, w_row: Any) -> cutlass.Float32:
        """Returns what a weight row's sums are multiplied with, 0 beyond n."""
        alpha = cutlass.Float32(0.0)
        if w_row < out.n:
            if cutlass.const_expr(self.config.epilogue == BF16):
                alpha = out.mAlpha[expert, w_row // (out.n // cute.size(out.mAlpha, mode=[1]))]
            else:
                alpha = out.mAlpha[expert, w_row // 8 % 2]
        return alpha * DECODED_SCALE

    @cute.jit
    def _find(self, tiles: _Tiles, tile: Any) -> _Tile:
        """Returns where a tile is: its expert is the last one with no more than that many tiles before it."""
        expert = cutlass.Int32(0)
        for bit in (256, 128, 64, 32, 16, 8, 4, 2, 1):
            if tiles.sTile[expert + bit] * tiles.num_w <= tile:
                expert += bit
        before = tiles.sTile[expert]
        num_token_tiles = tiles.sTile[expert + 1] - before
        in_expert = tile - before * tiles.num_w
        return _Tile(expert, in_expert // num_token_tiles, in_expert % num_token_tiles * self.config.tile_n)

    def _tiles(self, mW: cute.Tensor, n: Any, sTile: cute.Tensor) -> _Tiles:
        split_k = self.config.split_k
        num_w = cute.ceil_div(n, self.config.tile_w)
        num_k = cute.size(mW, mode=[1])
        cta = cute.arch.block_idx()[0]
        rank = cta % split_k
        return _Tiles(
            first=cta // split_k,
            end=sTile[MAX_EXPERTS] * num_w,
            step=cute.arch.grid_dim()[0] // split_k,
            num_w=num_w,
            sTile=sTile,
            first_k=rank * num_k // split_k,
            end_k=(rank + 1) * num_k // split_k,
        )

    def _blocks(self, prepared: cute.Tensor, block_bytes: int) -> cute.Tensor:
        """Returns (word, blocks along k, blocks along n, experts) of prepared weights or scales."""
        num_experts, rows, columns = prepared.shape
        words = block_bytes // 4
        num_k, num_n = columns // (block_bytes // BLOCK_ROWS), rows // BLOCK_ROWS
        stride = (1, words, num_k * words, cutlass.Int64(num_k * words) * num_n)
        pointer = cute.recast_ptr(prepared.iterator, dtype=cutlass.Int32)
        return cute.make_tensor(pointer, cute.make_layout((words, num_k, num_n, num_experts), stride=stride))

    def _tiled_mma(self) -> cute.TiledMma:
        op = warpgroup.MmaF16BF16Op(
            cutlass.BFloat16,
            cutlass.Float32,
            (BLOCK_ROWS, self.config.tile_n, MMA_K),
            warpgroup.OperandSource.RMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        return cute.make_tiled_mma(op)

    def _x_smem_layout(self) -> Any:
        """Returns (tile_n, TILE_K, stage) in the 128-byte swizzle."""
        config = self.config
        return hopper_helpers.make_smem_layout_b(
            utils.LayoutEnum.ROW_MAJOR, (BLOCK_ROWS, config.tile_n, TILE_K), cutlass.BFloat16, config.num_stages
        )

    def _allocate_smem(self) -> _Smem:
        config = self.config
        smem = memory.SmemAllocator()
        x_layout = self._x_smem_layout()
        # Swizzled buffers first: they want the largest alignment.
        sX = smem.allocate_tensor(cutlass.BFloat16, x_layout.outer, SWIZZLE_BYTES, x_layout.inner)
        blocks = (config.blocks, config.num_stages)
        partial = None
        if cutlass.const_expr(config.split_k > 1):
            sums = config.blocks_of_warpgroup * BLOCK_ROWS * config.tile_n // WARPGROUP
            layout = cute.make_layout((WARPGROUP, sums, config.num_consumers))
            partial = smem.allocate_tensor(cutlass.Float32, layout, 128)
        return _Smem(
            sW=smem.allocate_tensor(cutlass.Int32, cute.make_layout((BLOCK_BYTES // 4, *blocks)), 128),
            sSFW=smem.allocate_tensor(cutlass.Int32, cute.make_layout((BLOCK_SF_BYTES // 4, *blocks)), 128),
            sX=sX,
            sOut=smem.allocate_tensor(
                cutlass.Float32, cute.make_layout((TOKEN_WORDS, config.unit_tokens, config.num_consumers)), 128
            ),
            sPartial=partial,
            sTile=smem.allocate_tensor(cutlass.Int32, cute.make_layout(MAX_EXPERTS + 1), 16),
            full=smem.allocate_array(cutlass.Int64, config.num_stages),
            empty=smem.allocate_array(cutlass.Int64, config.num_stages),
        )


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes what GroupedGemmSm90.__call__ does, unchecked, without the stream.

    Args:
        config: which kernel; where its epilogue has no use for an argument it is None.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(GroupedGemmSm90, config, lambda: _stand_ins(config), config.arch, line_info)


def _stand_ins(config: Config) -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: its arguments with symbolic sizes."""
    experts, rows = cute.sym_int(), cute.sym_int(divisibility=BLOCK_ROWS)

    def matrix(dtype: Any, *shape: Any, align: int = TMA_BYTES) -> Any:
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

    return (
        matrix(cutlass.BFloat16, cute.sym_int(), cute.sym_int(divisibility=K_MULTIPLE)),
        matrix(cutlass.Uint8, experts, rows, cute.sym_int(divisibility=BLOCK_K // 2)),
        matrix(cutlass.Uint8, experts, rows, cute.sym_int(divisibility=BLOCK_K // NVFP4.block_size)),
        matrix(cutlass.Float32, experts, cute.sym_int(), align=4),
        matrix(cutlass.Int32, experts, align=4),
        matrix(cutlass.Int32, cute.sym_int(), align=4),
        make_fake_tensor(
            cutlass.BFloat16,
            (cute.sym_int(), cute.sym_int(divisibility=BF16_UNIT)),
            stride=(cute.sym_int64(divisibility=BF16_UNIT), 1),
            assumed_align=TMA_BYTES,
        ),
        matrix(cutlass.Float32, experts, align=4) if config.epilogue == SWIGLU_NVFP4 else None,
        cutlass.Float32(1.0),
        cutlass.Int32(1),
        cutlass.Int32(0),
        cutlass.Int32(0),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
