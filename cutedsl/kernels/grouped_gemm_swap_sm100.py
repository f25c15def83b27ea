"""Grouped NVFP4 GEMM on Blackwell for few rows a group: weights on M of the MMA, tokens on N, with what follows fused.

    bf16:          D = bf16(alpha * (X W_e^T))
    swiglu:        D = bf16(h), h = silu(min(gate, limit)) * clamp(up, -limit, limit) of gate and up rows of W_e
    swiglu_nvfp4:  D = quantize_activation(h, h_scale[e]), codes and swizzled block scales, from h in FP32

Of 128 rows on M a group of 3 tokens would waste 125. N of a block-scaled MMA may be any multiple of 8 up to 256, so the
operands change places: a tile is 128 weight rows by tile_n = 8 .. 64 tokens, and its accumulator is a tile of D^T. The
mainloop is that of `linear_sm100`. Hard are the three things that the exchange brings with it:

Tiles. How many there are, and whose, only the device knows. Each CTA counts them when it starts: a warp sums
ceil(count / tile_n) over the experts into shared memory, sTile[e] = token tiles of all experts before e. Tiles are
numbered expert by expert, in an expert weight tile by weight tile, with its token tiles next to each other, so that a
weight tile comes from DRAM once, however many tokens there are. Every warp walks the same list, tile, tile + gridDim.x,
..., and finds a tile's expert by a binary search in sTile. Experts without tokens have no tiles and are never found.

Scales of tokens. tcgen05.mma reads the scales of token n in lane n % 32, column n / 32 of TMEM, from the lane 0 and the
column that it is given. A token tile begins anywhere in the 128 rows of a scale tile, in steps of 8. Where it is in the 32
rows of a lane, TMA corrects: to it a scale tile is 4 groups of 8 lanes of 16 bytes, and a box that begins at group g puts
that group into lane 0; what then lies outside is zeros. Which 32 rows it is in selects the column, as in `linear_sm100`.

Epilogue. A lane of TMEM is a weight row, so a thread's sums are one column of D for tile_n tokens, while D's rows, a gate
and its up, and a block of the second quantizer lie across threads. The sums, times alpha, go through shared memory in
FP32: for each token 128 floats, in 4 groups of 32 (the rows of one warp) of 36 words each, 144 words a token. Writing, the
lanes of a warp store neighbours: no two in one bank. Reading, a thread takes a unit of a token in loads of 16 bytes, which
the hardware serves for 8 threads at a time: units of a whole group start 36 = 4 (mod 32) words after one another and those
of the next token 144 = 16 (mod 32), units of 8 floats 8 words apart, so that 8 threads hit 8 different quarters of the
banks. Without the padding, all units of groups would begin in bank 0.

Gate and up: the weights' rows come interleaved, 16 gate rows, 16 up rows, ...; a group is one block of 16 h, which is one
block of the second quantizer.

Padding: rows of X behind a group's last are computed as columns of their own and not stored; of D and its scales exactly
the groups' rows are written. k and n are ragged as in `linear_sm100`.

Names: W the weights (the MMA's A), X the tokens (its B); otherwise as in `linear_sm100`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import torch
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream
from cutlass.utils import blackwell_helpers, blockscaled_layout

from cutedsl import compile as compiler
from cutedsl.formats import NVFP4
from cutedsl.kernels import blackwell, quantize_block
from cutedsl.kernels.blackwell import ARCHS, MMA_K, SF_TILE_K, SWIZZLE_BYTES, TMA_BYTES, WARP, Arch
from cutedsl.kernels.token_tiles import MAX_EXPERTS, count_tiles
from cutedsl.layout import TILE_BYTES, TILE_COLUMNS, TILE_ROWS, padded_shape
from cutedsl.ops import registry

# What follows the sums.
BF16, SWIGLU, SWIGLU_NVFP4 = "bf16", "swiglu", "swiglu_nvfp4"
EPILOGUES = (BF16, SWIGLU, SWIGLU_NVFP4)

# Weight rows and step of K of a tile.
TILE_W = 128
TILE_K = 256
# Tokens of a tile. Source: PTX ISA, tcgen05.mma, "Matrix shape": cta_group::1 with M 128 takes N = 8, 16, ... 256.
TILES_N = (8, 16, 32, 64)

# Gate rows, then as many up rows.
INTERLEAVE = NVFP4.block_size
# Columns of D that a thread of the bf16 epilogue stores: 16 bytes.
BF16_UNIT = 8
# Words in shared memory of the 32 weight rows of a warp, and of a token.
GROUP_WORDS = WARP + 4
TOKEN_WORDS = TILE_W // WARP * GROUP_WORDS

# A scale tile as TMA loads it for tokens: lanes in groups of 8, of 64 elements of 16 bits each.
SF_GROUP_LANES = 8
SF_GROUPS = WARP // SF_GROUP_LANES
SF_GROUP_ELEMENTS = TILE_BYTES // SF_GROUPS // 2

EPILOGUE_WARPS = 4
MMA_WARP = 4
LOAD_WARP = 5
THREADS = 6 * WARP
EPILOGUE_THREADS = EPILOGUE_WARPS * WARP

K_MULTIPLE = TMA_BYTES * NVFP4.codes_per_byte
N_MULTIPLE = {BF16: BF16_UNIT, SWIGLU: 2 * INTERLEAVE, SWIGLU_NVFP4: 2 * INTERLEAVE}


@dataclass(frozen=True)
class Shape:
    """Sizes of a grouped GEMM.

    Attributes:
        tokens: of the largest group, as far as the host can tell; a guess costs speed only.
        n: weight rows of an expert.
        k: columns.
    """

    tokens: int
    n: int
    k: int


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of rows and experts, n and k.

    Attributes:
        epilogue: one of EPILOGUES.
        tile_n: tokens of a tile; its weight rows are TILE_W, its step of K is TILE_K.
        num_ab_stages: tiles of W and X, with their scales, between load and MMA.
        num_acc_stages: accumulators; with 2 the next tile is computed while one is stored.
        arch: a key of ARCHS.
    """

    epilogue: str
    tile_n: int
    num_ab_stages: int
    num_acc_stages: int = 2
    arch: str = "sm_100a"

    @property
    def acc_columns(self) -> int:
        """TMEM columns of all accumulators: one FP32 column for each token."""
        return self.tile_n * self.num_acc_stages

    @property
    def sf_columns(self) -> int:
        """TMEM columns of the scales of W, and of those of X: both of 128 rows."""
        return blackwell.tmem_sf_columns(TILE_ROWS, TILE_K)

    @property
    def tmem_columns(self) -> int:
        """TMEM columns to allocate: a power of two, at least 32."""
        used = self.acc_columns + 2 * self.sf_columns
        return max(32, 1 << (used - 1).bit_length())

    @property
    def ab_stage_bytes(self) -> int:
        """What the loads of one stage write, and its barrier expects."""
        codes = (TILE_W + self.tile_n) * TILE_K // NVFP4.codes_per_byte
        return codes + 2 * TILE_ROWS * TILE_K // NVFP4.block_size

    @property
    def units_of_token(self) -> int:
        """What a token's sums of a tile are split into for the threads that store them."""
        return TILE_W // (BF16_UNIT if self.epilogue == BF16 else 2 * INTERLEAVE)

    @property
    def smem_bytes(self) -> int:
        """Upper bound of a CTA's shared memory: stages, sums, tiles of experts, 1 KiB for barriers and alignment."""
        sums = 4 * self.tile_n * TOKEN_WORDS
        return self.num_ab_stages * self.ab_stage_bytes + sums + 4 * MAX_EXPERTS + 1024

    def validate(self) -> "Config":
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled, or could not run on the architecture.
        """
        if self.arch not in ARCHS:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(ARCHS)}")
        if self.epilogue not in EPILOGUES:
            raise ValueError(f"Config: epilogue is {self.epilogue!r}, expected one of {EPILOGUES}")
        if self.tile_n not in TILES_N:
            raise ValueError(f"Config: tile_n is {self.tile_n}, expected one of {TILES_N}")
        if self.num_ab_stages < 2 or self.num_acc_stages < 1:
            raise ValueError(f"Config: {self} has too few stages, expected at least 2 of w and x, 1 accumulator")
        arch = ARCHS[self.arch]
        if self.smem_bytes > arch.smem_bytes:
            raise ValueError(
                f"Config: {self} needs {self.smem_bytes} bytes of shared memory, {self.arch} has {arch.smem_bytes}; "
                "take fewer stages"
            )
        if self.tmem_columns > arch.tmem_columns:
            raise ValueError(
                f"Config: {self} needs {self.tmem_columns} TMEM columns, {self.arch} has {arch.tmem_columns}; "
                "take fewer accumulators"
            )
        return self


def choose_config(shape: Shape, epilogue: str, arch: str = "sm_100a") -> Config:
    """The narrowest tile that holds all tokens of a group, with as many stages as fit.

    Args:
        shape: sizes; only its tokens matter: n and k are the same work in every tile.
        epilogue: one of EPILOGUES.
        arch: a key of ARCHS.

    Returns:
        One of four configurations for each epilogue. Larger groups than its tile_n take several tiles.

    Raises:
        ValueError: arch or epilogue is unknown.

    The choice follows from counting bytes: weights dominate, so that a wider tile than needed costs little, and a
    narrower one passes the weights through the SMs again. It has not been measured on a B200.
    """
    if arch not in ARCHS:
        raise ValueError(f"choose_config: arch is {arch!r}, expected one of {sorted(ARCHS)}")
    for tile_n in TILES_N:
        if shape.tokens <= tile_n:
            return largest_config(epilogue, tile_n, ARCHS[arch])
    return largest_config(epilogue, max(TILES_N), ARCHS[arch])


def largest_config(epilogue: str, tile_n: int, arch: Arch) -> Config:
    """The configuration of that tile with as many stages as fit the architecture."""
    without_stages = Config(epilogue, tile_n, 0, arch=arch.name)
    num_ab_stages = (arch.smem_bytes - without_stages.smem_bytes) // without_stages.ab_stage_bytes
    return Config(epilogue, tile_n, num_ab_stages, arch=arch.name).validate()


class _Smem(NamedTuple):
    """Shared memory of a CTA. The last mode of an s-tensor is its stage, except those of sSums and sTile."""

    ab_barriers: Any
    acc_barriers: Any
    tmem_address: Any
    sW: Any
    sX: Any
    sSFW: Any
    sSFX: Any
    # (TILE_W, tile_n): sums of a tile times alpha, padded as the module says.
    sSums: Any
    # (MAX_EXPERTS + 1,): token tiles of all experts before each one; of all experts behind the last.
    sTile: Any


class _Tiles(NamedTuple):
    """A CTA's tiles first, first + step, ... below end; where they are is found in sTile."""

    first: Any
    end: Any
    step: Any
    num_w: Any
    num_k: Any
    num_k_blocks: Any
    sTile: Any


class _Tile(NamedTuple):
    """An expert's weight rows TILE_W * w_tile ... by its tokens first_token ... first_token + tile_n - 1."""

    expert: Any
    w_tile: Any
    first_token: Any


class _Out(NamedTuple):
    """Where results go and what they are multiplied with; None where the epilogue has no use for it."""

    # (rows, columns) of bf16, or (rows, blocks) of codes; (rows, blocks) of scales
    mD: Any
    mSFD: Any
    mAlpha: Any
    mHScale: Any
    limit: Any
    mCount: Any
    mPaddedOffset: Any
    n: Any


class GroupedGemmSwapSm100:
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.validate()
        self.mma_tiler = (TILE_W, config.tile_n, TILE_K)
        self.epilogue_barrier = pipeline.NamedBarrier(barrier_id=1, num_threads=EPILOGUE_THREADS)

    @cute.jit
    def __call__(
        self,
        mX_packed: cute.Tensor,
        mW_packed: cute.Tensor,
        mSFX_bytes: cute.Tensor,
        mSFW_bytes: cute.Tensor,
        mAlpha: cute.Tensor,
        mCount: cute.Tensor,
        mPaddedOffset: cute.Tensor,
        mD_bytes: cute.Tensor,
        mSFD_bytes: cute.Tensor | None,
        mHScale: cute.Tensor | None,
        limit: cutlass.Float32,
        max_active_clusters: cutlass.Int32,
        stream: Any,
    ) -> None:
        """Makes the tensor maps, on the host, and launches min(tiles, max_active_clusters) CTAs.

        Args:
            mX_packed: (P, k/2) uint8.
            mW_packed: (E, n, k/2) uint8.
            mSFX_bytes, mSFW_bytes: e4m3, whole scale tiles for rows of X and of each expert's W.
            mAlpha: (E, blocks of weight rows) fp32.
            mCount: (E,) int32.
            mPaddedOffset: (E + 1,) int32.
            mD_bytes: (P, n) bf16, (P, n/2) bf16 or (P, n/4) uint8, by the epilogue.
            mSFD_bytes: e4m3, whole scale tiles for rows of D; swiglu_nvfp4 only.
            mHScale: (E,) fp32; swiglu_nvfp4 only.
            limit: of SwiGLU, infinity for none.
            max_active_clusters: the most CTAs to launch, at least 1.
            stream: to launch on.
        """
        config = self.config
        num_rows, k = mX_packed.shape[0], mX_packed.shape[1] * NVFP4.codes_per_byte
        n = mW_packed.shape[1]
        mW, mX = blackwell.expert_codes(mW_packed), blackwell.packed_codes(mX_packed, num_rows, k)
        mSFW, mSFX = blackwell.expert_sf_tiles(mSFW_bytes, n, k), self._sf_groups(mSFX_bytes, num_rows, k)
        tiled_mma = self._tiled_mma()
        w_stage, x_stage = (cute.select(layout, mode=[0, 1, 2]) for layout in self._ab_smem_layouts(tiled_mma))
        sfw_box, sfx_box = blackwell.sf_box(TILE_W, TILE_K), self._sfx_box()
        one_cta = (1, 1, 1, 1)
        load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        tma_w, mW = cute.nvgpu.make_tiled_tma_atom_A(load, mW, w_stage, self.mma_tiler, tiled_mma, one_cta)
        tma_x, mX = cute.nvgpu.make_tiled_tma_atom_B(load, mX, x_stage, self.mma_tiler, tiled_mma, one_cta)
        tma_sfw, mSFW = cpasync.make_tiled_tma_atom(load, mSFW, cute.make_layout(sfw_box), sfw_box)
        tma_sfx, mSFX = cpasync.make_tiled_tma_atom(load, mSFX, cute.make_layout(sfx_box), sfx_box)

        # As many as there could be: only the device knows how many there are.
        num_tiles = cute.ceil_div(num_rows, config.tile_n) * cute.ceil_div(n, TILE_W)
        grid = (cutlass.min(num_tiles, max_active_clusters), 1, 1)
        mD, mSFD = self._results(mD_bytes, mSFD_bytes)
        out = _Out(mD, mSFD, mAlpha, mHScale, limit, mCount, mPaddedOffset, n)
        atoms = (tma_w, tma_x, tma_sfw, tma_sfx)
        self.kernel(tiled_mma, atoms, (mW, mX, mSFW, mSFX), out).launch(grid=grid, block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, tiled_mma: cute.TiledMma, atoms: Any, tensors: Any, out: _Out) -> None:
        """Sets up barriers, TMEM and the list of tiles, then every warp takes its role."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == LOAD_WARP:
            for tma in atoms:
                cpasync.prefetch_descriptor(tma)
        smem = self._allocate_smem(tiled_mma)
        ab_producer, ab_consumer = self._ab_pipeline(smem)
        acc_producer, acc_consumer = self._acc_pipeline(smem)
        if warp == 0:
            cute.arch.alloc_tmem(self.config.tmem_columns, smem.tmem_address)
            cute.arch.relinquish_tmem_alloc_permit()
        if warp == MMA_WARP:
            count_tiles(out.mCount, smem.sTile, self.config.tile_n)
        # Behind this barrier all mbarriers are initialised; the TMEM address and the tiles are in shared memory.
        cute.arch.mbarrier_init_fence()
        blackwell.before_thread_sync()
        cute.arch.sync_threads()
        blackwell.after_thread_sync()
        tmem = cute.arch.retrieve_tmem_ptr(cutlass.Float32, 16, smem.tmem_address)
        tiles = self._tiles(tensors[1], out.n, smem.sTile)

        if warp == LOAD_WARP:
            self._load(tiled_mma, atoms, tensors, out.mPaddedOffset, smem, tiles, ab_producer)
        elif warp == MMA_WARP:
            self._mma(tiled_mma, smem, tmem, tiles, ab_consumer, acc_producer)
        else:
            self._epilogue(tiled_mma, out, smem, tmem, tiles, acc_consumer)
            # All four warps met after reading the last accumulator, so nobody uses TMEM any more.
            if warp == 0:
                blackwell.after_thread_sync()
                cute.arch.dealloc_tmem(tmem, self.config.tmem_columns)

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

    @cute.jit
    def _load(
        self,
        tiled_mma: Any,
        atoms: Any,
        tensors: Any,
        mPaddedOffset: cute.Tensor,
        smem: _Smem,
        tiles: _Tiles,
        ab_producer: Any,
    ) -> None:
        """Load warp: for each step of K one stage of the expert's W, X and their scales."""
        config = self.config
        tma_w, tma_x, tma_sfw, tma_sfx = atoms
        mW, mX, mSFW, mSFX = tensors
        thr_mma = tiled_mma.get_slice(0)
        # (TILE_W, TILE_K, w tiles, k tiles, experts), (tile_n, TILE_K, token tiles, k tiles)
        gW = cute.local_tile(mW, (TILE_W, TILE_K), (None, None, None))
        gX = cute.local_tile(mX, (config.tile_n, TILE_K), (None, None))
        # (scale tile, along k, along rows, k tiles, w tiles, experts)
        gSFW = cute.local_tile(mSFW, blackwell.sf_box(TILE_W, TILE_K), (0, None, None, None))
        sSFW = blackwell.shared_sf_tiles(smem.sSFW, TILE_W, TILE_K, config.num_ab_stages)
        pointer = cute.recast_ptr(smem.sSFX.iterator, dtype=cutlass.Int16)
        sSFX = cute.make_tensor(pointer, cute.make_layout((*self._sfx_box(), config.num_ab_stages)))
        tAsW, tAgW = blackwell.tma_partition(tma_w, smem.sW, thr_mma.partition_A(gW))
        tBsX, tBgX = blackwell.tma_partition(tma_x, smem.sX, thr_mma.partition_B(gX))
        tAsSFW, tAgSFW = blackwell.tma_partition(tma_sfw, sSFW, gSFW)

        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            at = self._find(tiles, tile)
            row = mPaddedOffset[at.expert] + at.first_token
            # The tile's first token goes to lane 0: (lanes, groups, along k, along rows, k tiles)
            group = row % WARP // SF_GROUP_LANES
            gSFX = cute.local_tile(
                cute.domain_offset((0, group, 0, 0), mSFX), self._sfx_box(), (0, 0, None, row // TILE_ROWS)
            )
            tBsSFX, tBgSFX = cpasync.tma_partition(
                tma_sfx, 0, cute.make_layout(1), cute.group_modes(sSFX, 0, 4), cute.group_modes(gSFX, 0, 4)
            )
            for k_tile in cutlass.range(tiles.num_k, unroll=1):
                stage = ab_producer.acquire_and_advance()
                to, bar = stage.index, stage.barrier
                cute.copy(tma_w, tAgW[None, at.w_tile, k_tile, at.expert], tAsW[None, to], tma_bar_ptr=bar)
                cute.copy(tma_x, tBgX[None, row // config.tile_n, k_tile], tBsX[None, to], tma_bar_ptr=bar)
                cute.copy(tma_sfw, tAgSFW[None, k_tile, at.w_tile, at.expert], tAsSFW[None, to], tma_bar_ptr=bar)
                cute.copy(tma_sfx, tBgSFX[None, k_tile], tBsSFX[None, to], tma_bar_ptr=bar)
        # Shared memory must outlive the MMA's arrivals on its barriers.
        ab_producer.tail()

    @cute.jit
    def _mma(self, tiled_mma: Any, smem: _Smem, tmem: Any, tiles: _Tiles, ab_consumer: Any, acc_producer: Any) -> None:
        """MMA warp: for each stage the scales to TMEM, then MMAs of 64 along K."""
        # (MMA, 1, K blocks, stage)
        tCrW = tiled_mma.make_fragment_A(smem.sW)
        tCrX = tiled_mma.make_fragment_B(smem.sX)
        # (MMA, 1, 1, stage)
        tCtAcc = self._accumulators(tiled_mma, tmem)
        # (MMA, 1, K blocks)
        tCtSFW, tCtSFX = self._tmem_scales(tiled_mma, smem, tmem)
        copy_sfw, tCsSFW, tCtSFW_copy = blackwell.sf_to_tmem(smem.sSFW, tCtSFW)
        copy_sfx, tCsSFX, tCtSFX_copy = blackwell.sf_to_tmem(smem.sSFX, tCtSFX)

        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            at = self._find(tiles, tile)
            # Groups begin with a scale tile: each 32 rows in it have a column, of 4 scales, of their own.
            shift = at.first_token % TILE_ROWS // WARP * TILE_COLUMNS
            tCtSFX_tile = cute.make_tensor(tCtSFX.iterator + shift, tCtSFX.layout)
            acc = acc_producer.acquire_and_advance()
            tCtAcc_tile = tCtAcc[None, None, None, acc.index]
            for k_tile in cutlass.range(tiles.num_k, unroll=1):
                stage = ab_consumer.wait_and_advance()
                blackwell.after_thread_sync()
                # tcgen05.cp and tcgen05.mma run in the order of issue: one place in TMEM serves every stage.
                cute.copy(copy_sfw, tCsSFW[None, None, None, None, stage.index], tCtSFW_copy)
                cute.copy(copy_sfx, tCsSFX[None, None, None, None, stage.index], tCtSFX_copy)
                k_blocks = (None, None, None, stage.index)
                w, x = [tCrW[k_blocks], tCtSFW], [tCrX[k_blocks], tCtSFX_tile]
                self._mma_step(tCtAcc_tile, w, x, k_tile, tiles.num_k_blocks)
                stage.release()
            acc.commit()

    @cute.jit
    def _mma_step(self, tCtAcc: Any, w: Any, x: Any, k_tile: Any, num_k_blocks: Any) -> None:
        """Adds a stage's product to the accumulator, but for blocks of MMA_K columns wholly behind k, which are zeros.

        Args:
            w, x: codes and scales, (MMA, 1, K blocks) each.
            k_tile: the step of K; the first one overwrites what the accumulator holds.
            num_k_blocks: of all steps.
        """
        # One of its own: a flag that is set in a branch cannot reach the one that the caller goes on with.
        tiled_mma = self._tiled_mma()
        num_left = num_k_blocks - k_tile * (TILE_K // MMA_K)
        if num_left >= TILE_K // MMA_K:
            tiled_mma.set(tcgen05.Field.ACCUMULATE, k_tile != 0)
            cute.gemm(tiled_mma, tCtAcc, w, x, tCtAcc)
        else:
            for k_block in cutlass.range(num_left, unroll=1):
                tiled_mma.set(tcgen05.Field.ACCUMULATE, k_tile + k_block != 0)
                at = (None, None, k_block)
                cute.gemm(tiled_mma, tCtAcc, [part[at] for part in w], [part[at] for part in x], tCtAcc)

    @cute.jit
    def _epilogue(self, tiled_mma: Any, out: _Out, smem: _Smem, tmem: Any, tiles: _Tiles, acc_consumer: Any) -> None:
        """Epilogue warps: a weight row a thread from TMEM, times alpha, to shared memory; then units of tokens to D."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        # (TILE_W, tile_n, stage)
        tAcc = self._accumulators(tiled_mma, tmem)[(None, None), 0, 0, None]
        load_atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(config.tile_n)), cutlass.Float32)
        tmem_load = tcgen05.make_tmem_copy(load_atom, tAcc[None, None, 0])
        thr_load = tmem_load.get_slice(thread)
        # A thread has one weight row: (tile_n, 1, 1, stage)
        tTR_tAcc = thr_load.partition_S(tAcc)
        tTR_sSums = thr_load.partition_D(smem.sSums)
        tTR_rAcc = cute.make_rmem_tensor(tTR_sSums.shape, cutlass.Float32)

        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            at = self._find(tiles, tile)
            alpha = self._alpha(out, at, thread)
            acc = acc_consumer.wait_and_advance()
            blackwell.after_thread_sync()
            cute.copy(tmem_load, tTR_tAcc[None, None, None, acc.index], tTR_rAcc)
            cute.arch.fence_view_async_tmem_load()
            # The accumulator is in registers; the MMA may have its columns back.
            blackwell.before_thread_sync()
            acc.release()
            # Behind this barrier the last tile's sums have been read.
            self.epilogue_barrier.arrive_and_wait()
            tTR_rAcc.store(tTR_rAcc.load() * alpha)
            cute.autovec_copy(tTR_rAcc, tTR_sSums)
            self.epilogue_barrier.arrive_and_wait()
            self._finish(out, smem.sSums, at, thread)

    @cute.jit
    def _alpha(self, out: _Out, at: _Tile, thread: Any) -> cutlass.Float32:
        """Returns alpha of the thread's weight row, 0 beyond n."""
        w_row = at.w_tile * TILE_W + thread
        alpha = cutlass.Float32(0.0)
        if w_row < out.n:
            if cutlass.const_expr(self.config.epilogue == BF16):
                alpha = out.mAlpha[at.expert, w_row // (out.n // cute.size(out.mAlpha, mode=[1]))]
            else:
                alpha = out.mAlpha[at.expert, w_row // INTERLEAVE % 2]
        return alpha

    @cute.jit
    def _finish(self, out: _Out, sSums: cute.Tensor, at: _Tile, thread: Any) -> None:
        """Stores a tile in units of one token: neighbouring threads have neighbouring columns of D."""
        config = self.config
        first_row = out.mPaddedOffset[at.expert] + at.first_token
        num_tokens = out.mCount[at.expert] - at.first_token
        units_of_token = config.units_of_token
        for start in cutlass.range_constexpr(0, config.tile_n * units_of_token, EPILOGUE_THREADS):
            token, unit = (start + thread) // units_of_token, (start + thread) % units_of_token
            # With 8 or 16 tokens there are fewer units of groups than threads, but then also token >= tile_n.
            if token < cutlass.min(num_tokens, config.tile_n):
                column = at.w_tile * units_of_token + unit
                if cutlass.const_expr(config.epilogue == BF16):
                    self._store_columns(out, sSums, first_row, token, unit, column)
                else:
                    self._store_block(out, sSums, first_row, token, unit, column, at.expert)

    @cute.jit
    def _store_columns(self, out: _Out, sSums: cute.Tensor, first_row: Any, token: Any, unit: Any, column: Any) -> None:
        """Stores 8 columns of a token in BF16."""
        layout = cute.make_layout(
            (BF16_UNIT, (WARP // BF16_UNIT, TILE_W // WARP), self.config.tile_n),
            stride=(1, (BF16_UNIT, GROUP_WORDS), TOKEN_WORDS),
        )
        if column * BF16_UNIT < out.n:
            rSums = cute.make_rmem_tensor(BF16_UNIT, cutlass.Float32)
            cute.autovec_copy(cute.make_tensor(sSums.iterator, layout)[None, unit, token], rSums)
            rD = cute.make_rmem_tensor(BF16_UNIT, cutlass.BFloat16)
            rD.store(rSums.load().to(cutlass.BFloat16))
            gD = cute.local_tile(out.mD, (1, BF16_UNIT), (first_row + token, column))
            cute.autovec_copy(rD, gD[0, None])

    @cute.jit
    def _store_block(
        self, out: _Out, sSums: cute.Tensor, first_row: Any, token: Any, group: Any, block: Any, expert: Any
    ) -> None:
        """Stores one block of 16 h of a token, in BF16 or quantized."""
        layout = cute.make_layout((WARP, TILE_W // WARP, self.config.tile_n), stride=(1, GROUP_WORDS, TOKEN_WORDS))
        num_blocks = out.n // (2 * INTERLEAVE)
        row = first_row + token
        if block < num_blocks:
            rSums = cute.make_rmem_tensor(2 * INTERLEAVE, cutlass.Float32)
            cute.autovec_copy(cute.make_tensor(sSums.iterator, layout)[None, group, token], rSums)
            rH = cute.make_rmem_tensor(INTERLEAVE, cutlass.Float32)
            for i in cutlass.range_constexpr(INTERLEAVE):
                rH[i] = blackwell.swiglu(rSums[i], rSums[INTERLEAVE + i], out.limit)
            if cutlass.const_expr(self.config.epilogue == SWIGLU):
                rD = cute.make_rmem_tensor(INTERLEAVE, cutlass.BFloat16)
                rD.store(rH.load().to(cutlass.BFloat16))
                cute.autovec_copy(rD, cute.local_tile(out.mD, (1, INTERLEAVE), (row, block))[0, None])
            else:
                quantize_block.store_block(out.mD, out.mSFD, row, block, rH, out.mHScale[expert])
        elif cutlass.const_expr(self.config.epilogue == SWIGLU_NVFP4):
            # A tile has 4 blocks, as a scale tile: what is behind the last block is the scale tile's padding.
            out.mSFD[row, block] = quantize_block.zero_scale()

    def _tiles(self, mX: cute.Tensor, n: Any, sTile: cute.Tensor) -> _Tiles:
        num_w = cute.ceil_div(n, TILE_W)
        return _Tiles(
            first=cute.arch.block_idx()[0],
            end=sTile[MAX_EXPERTS] * num_w,
            step=cute.arch.grid_dim()[0],
            num_w=num_w,
            num_k=cute.ceil_div(cute.size(mX, mode=[1]), TILE_K),
            num_k_blocks=cute.ceil_div(cute.size(mX, mode=[1]), MMA_K),
            sTile=sTile,
        )

    def _results(self, mD: cute.Tensor, mSFD: cute.Tensor | None) -> tuple[Any, Any]:
        """Returns D and its scales as the epilogue indexes them."""
        if self.config.epilogue == SWIGLU_NVFP4:
            codes = quantize_block.block_codes(mD)
            return codes, quantize_block.swizzled_scales(mSFD, codes.shape[1])
        rows, columns = mD.shape
        # 64 bits, as rows of many experts can be more than 2^31 bytes; units are stored whole.
        layout = cute.make_layout((rows, columns), stride=(cute.assume(cutlass.Int64(columns), BF16_UNIT), 1))
        return cute.make_tensor(mD.iterator, layout), None

    def _sf_groups(self, scales: cute.Tensor, rows: Any, k: Any) -> cute.Tensor:
        """Returns (element of 8 lanes, groups of 8 lanes, tiles along k, tiles along rows) of swizzled scales."""
        tiles = blackwell.global_sf_tiles(scales, rows, k)
        _, tiles_k, tiles_rows = tiles.shape
        _, stride_k, stride_rows = tiles.stride
        layout = cute.make_layout(
            (SF_GROUP_ELEMENTS, SF_GROUPS, tiles_k, tiles_rows), stride=(1, SF_GROUP_ELEMENTS, stride_k, stride_rows)
        )
        return cute.make_tensor(tiles.iterator, layout)

    def _sfx_box(self) -> tuple[int, int, int, int]:
        """Returns the part of _sf_groups that a tile needs: one scale tile for each 64 of K."""
        return (SF_GROUP_ELEMENTS, SF_GROUPS, TILE_K // SF_TILE_K, 1)

    def _tiled_mma(self) -> cute.TiledMma:
        shape = (TILE_W, self.config.tile_n, MMA_K)
        op = tcgen05.MmaMXF4NVF4Op(cutlass.Float8E4M3FN, shape, tcgen05.CtaGroup.ONE, tcgen05.OperandSource.SMEM)
        return cute.make_tiled_mma(op)

    def _ab_smem_layouts(self, tiled_mma: cute.TiledMma) -> tuple[Any, Any]:
        """Returns layouts of W and X, (MMA, 1, K blocks, stage), in the 128-byte swizzle."""
        stages = self.config.num_ab_stages
        return (
            blackwell_helpers.make_smem_layout_a(tiled_mma, self.mma_tiler, cutlass.Float4E2M1FN, stages),
            blackwell_helpers.make_smem_layout_b(tiled_mma, self.mma_tiler, cutlass.Float4E2M1FN, stages),
        )

    def _sf_smem_layouts(self, tiled_mma: cute.TiledMma) -> tuple[Any, Any]:
        """Returns layouts of scales, (MMA, 1, K blocks, stage): whole scale tiles, those along k next to each other."""
        stages = self.config.num_ab_stages
        return (
            blockscaled_layout.make_smem_layout_sfa(tiled_mma, self.mma_tiler, NVFP4.block_size, stages),
            blockscaled_layout.make_smem_layout_sfb(tiled_mma, self.mma_tiler, NVFP4.block_size, stages),
        )

    def _allocate_smem(self, tiled_mma: cute.TiledMma) -> _Smem:
        config = self.config
        smem = memory.SmemAllocator()
        w_layout, x_layout = self._ab_smem_layouts(tiled_mma)
        sfw_layout, sfx_layout = self._sf_smem_layouts(tiled_mma)
        sums_shape, sums_stride = ((WARP, TILE_W // WARP), config.tile_n), ((1, GROUP_WORDS), TOKEN_WORDS)
        # Swizzled buffers first: they want the largest alignment.
        return _Smem(
            sW=smem.allocate_tensor(cutlass.Float4E2M1FN, w_layout.outer, SWIZZLE_BYTES, w_layout.inner),
            sX=smem.allocate_tensor(cutlass.Float4E2M1FN, x_layout.outer, SWIZZLE_BYTES, x_layout.inner),
            sSFW=smem.allocate_tensor(cutlass.Float8E4M3FN, sfw_layout, 128),
            sSFX=smem.allocate_tensor(cutlass.Float8E4M3FN, sfx_layout, 128),
            sSums=smem.allocate_tensor(cutlass.Float32, cute.make_layout(sums_shape, stride=sums_stride), 128),
            sTile=smem.allocate_tensor(cutlass.Int32, cute.make_layout(MAX_EXPERTS + 1), 16),
            ab_barriers=smem.allocate_array(cutlass.Int64, 2 * config.num_ab_stages),
            acc_barriers=smem.allocate_array(cutlass.Int64, 2 * config.num_acc_stages),
            tmem_address=smem.allocate(cutlass.Int32),
        )

    def _ab_pipeline(self, smem: _Smem) -> tuple[Any, Any]:
        """Returns producer and consumer of stages: the bytes of the loads fill one, one MMA commit frees it."""
        return pipeline.PipelineTmaUmma.create(
            barrier_storage=smem.ab_barriers,
            num_stages=self.config.num_ab_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            tx_count=self.config.ab_stage_bytes,
            defer_sync=True,
        ).make_participants()

    def _acc_pipeline(self, smem: _Smem) -> tuple[Any, Any]:
        """Returns producer and consumer of accumulators: one MMA commit fills one, all epilogue threads free it."""
        return pipeline.PipelineUmmaAsync.create(
            barrier_storage=smem.acc_barriers,
            num_stages=self.config.num_acc_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, EPILOGUE_THREADS),
            defer_sync=True,
        ).make_participants()

    def _accumulators(self, tiled_mma: cute.TiledMma, tmem: cute.Pointer) -> Any:
        """Returns (MMA, 1, 1, stage): the first acc_columns of TMEM."""
        shape = tiled_mma.partition_shape_C(self.mma_tiler[:2])
        fragment = tiled_mma.make_fragment_C(cute.append(shape, self.config.num_acc_stages))
        return cute.make_tensor(tmem, fragment.layout)

    def _tmem_scales(self, tiled_mma: Any, smem: _Smem, tmem: cute.Pointer) -> tuple[Any, Any]:
        """Returns the scales of one stage, (MMA, 1, K blocks): the TMEM columns behind the accumulators."""
        stage = (None, None, None, 0)
        sfw_layout = blockscaled_layout.make_tmem_layout_sfa(
            tiled_mma, self.mma_tiler, NVFP4.block_size, cute.slice_(smem.sSFW.layout, stage)
        )
        sfx_layout = blockscaled_layout.make_tmem_layout_sfb(
            tiled_mma, self.mma_tiler, NVFP4.block_size, cute.slice_(smem.sSFX.layout, stage)
        )
        tmem_sfw = tmem + self.config.acc_columns
        tmem_sfx = tmem_sfw + self.config.sf_columns
        return (
            cute.make_tensor(cute.recast_ptr(tmem_sfw, dtype=cutlass.Float8E4M3FN), sfw_layout),
            cute.make_tensor(cute.recast_ptr(tmem_sfx, dtype=cutlass.Float8E4M3FN), sfx_layout),
        )


def grouped_gemm_swap(
    mX: torch.Tensor,
    mW: torch.Tensor,
    mSFX: torch.Tensor,
    mSFW: torch.Tensor,
    alpha: torch.Tensor,
    count: torch.Tensor,
    padded_offset: torch.Tensor,
    mD: torch.Tensor,
    mSFD: torch.Tensor | None = None,
    h_scale: torch.Tensor | None = None,
    limit: float | None = None,
    *,
    epilogue: str,
    tokens: int,
    max_active_clusters: int | None = None,
) -> None:
    """For each expert e and its rows r: mD[r] = finish(alpha[e] * (e2m1(mX[r]) * mSFX[r]) (e2m1(mW[e]) * mSFW[e])^T).

    Args:
        mX: (P, k/2) uint8 - codes of tokens, those of expert e in rows padded_offset[e] .. + count[e] - 1; P may be 0.
        mW: (E, n, k/2) uint8 - codes of weights; for SwiGLU 16 gate rows, 16 up rows, 16 gate rows, ...
        mSFX: (P up to 128, k/16 up to 4) e4m3 - swizzled block scales; padded columns of tokens finite, rows of no token
            anything.
        mSFW: (E, n up to 128, k/16 up to 4) e4m3 - each expert's swizzled block scales; padded columns finite.
        alpha: bf16: (E, blocks) fp32 - factor of each n/blocks weight rows; SwiGLU: (E, 2) fp32 - of gate and of up.
        count: (E,) int32 - tokens of each expert, 0 or more.
        padded_offset: (E + 1,) int32 - first row of each expert, a multiple of 128. The end of the last is not used.
        mD: bf16: (P, n) bf16; swiglu: (P, n/2) bf16; swiglu_nvfp4: (P, n/4) uint8 codes. Rows of tokens are written
            completely, others not at all.
        mSFD: (P up to 128, n/32 up to 4) e4m3 - swizzled block scales of D, zeros behind n/32; swiglu_nvfp4 only.
        h_scale: (E,) fp32 - input_scale of what follows, positive; swiglu_nvfp4 only.
        limit: of SwiGLU, positive; None for no clamp, and for bf16.
        epilogue: one of EPILOGUES.
        tokens: of the largest group, a guess: it chooses the kernel; any gives the same result.
        max_active_clusters: the most CTAs to launch; None: one for each SM.

    Raises:
        TypeError: a tensor is of another type, or is given or missing against the epilogue.
        ValueError: a shape, stride, device or address is not as above, k no multiple of 32, n no multiple of 8 (SwiGLU:
            32) or of blocks, E not in 1 .. 512, or a number is out of range.

    A linear of few rows is one expert: P = count[0], padded_offset = 0, alpha of one block or of n.
    Layout: all contiguous, matrices 16-byte aligned; scales in 128x4 tiles, see `cutedsl.layout`.
    Numerics: products and sums FP32 in the tensor core, alpha in FP32, then one rounding to nearest even to BF16, or
    SwiGLU as `blackwell.swiglu` and one rounding to BF16 or `quantize_block`. A row's result does not depend on the others.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream, nothing is
    allocated and nothing read back. Not verified on hardware; nor, there, that scales of tokens may begin at an odd column
    of TMEM, which happens only if an expert has more than 32 tokens and `tokens` said at most 32.
    """
    check(
        mX, mW, mSFX, mSFW, alpha, count, padded_offset, mD, mSFD, h_scale, limit,
        epilogue=epilogue, tokens=tokens, max_active_clusters=max_active_clusters,
    )  # fmt: skip
    if mX.shape[0] == 0:
        return
    config = choose_config(Shape(tokens, mW.shape[1], mW.shape[2] * NVFP4.codes_per_byte), epilogue)
    if max_active_clusters is None:
        max_active_clusters = blackwell.num_sms(mX.device)
    limit = math.inf if limit is None else limit
    compiled(config)(mX, mW, mSFX, mSFW, alpha, count, padded_offset, mD, mSFD, h_scale, limit, max_active_clusters)


def check(
    mX: torch.Tensor,
    mW: torch.Tensor,
    mSFX: torch.Tensor,
    mSFW: torch.Tensor,
    alpha: torch.Tensor,
    count: torch.Tensor,
    padded_offset: torch.Tensor,
    mD: torch.Tensor,
    mSFD: torch.Tensor | None = None,
    h_scale: torch.Tensor | None = None,
    limit: float | None = None,
    *,
    epilogue: str,
    tokens: int,
    max_active_clusters: int | None = None,
) -> None:
    """Raises what grouped_gemm_swap raises; reads no device memory."""
    _check_numbers(epilogue, limit, tokens, max_active_clusters)
    device = mX.device
    _check("mX", mX, torch.uint8, (None, None), device)
    _check("mW", mW, torch.uint8, (None, None, mX.shape[1]), device)
    rows = mX.shape[0]
    num_experts, n, k = mW.shape[0], mW.shape[1], mW.shape[2] * NVFP4.codes_per_byte
    _check_sizes(epilogue, num_experts, n, k)
    columns = k // NVFP4.block_size
    _check("mSFX", mSFX, NVFP4.scale_dtype, padded_shape(rows, columns), device)
    _check("mSFW", mSFW, NVFP4.scale_dtype, (num_experts, *padded_shape(n, columns)), device)
    _check("alpha", alpha, torch.float32, (num_experts, None if epilogue == BF16 else 2), device, 4)
    if alpha.shape[1] < 1 or n % alpha.shape[1]:
        raise ValueError(
            f"grouped_gemm_swap_sm100: alpha has {alpha.shape[1]} blocks, expected a divisor of n, which is {n}"
        )
    _check("count", count, torch.int32, (num_experts,), device, 4)
    _check("padded_offset", padded_offset, torch.int32, (num_experts + 1,), device, 4)
    if epilogue != SWIGLU_NVFP4:
        _check("mD", mD, torch.bfloat16, (rows, n if epilogue == BF16 else n // 2), device)
        if mSFD is not None or h_scale is not None:
            raise TypeError(f"grouped_gemm_swap_sm100: {epilogue} has no mSFD and no h_scale; pass None")
        return
    if mSFD is None or h_scale is None:
        raise TypeError(f"grouped_gemm_swap_sm100: {epilogue} needs mSFD and h_scale; pass both")
    _check("mD", mD, torch.uint8, (rows, n // 4), device)
    _check("mSFD", mSFD, NVFP4.scale_dtype, padded_shape(rows, n // (2 * INTERLEAVE)), device)
    _check("h_scale", h_scale, torch.float32, (num_experts,), device, 4)


def _check_numbers(epilogue: str, limit: float | None, tokens: int, max_active_clusters: int | None) -> None:
    if epilogue not in EPILOGUES:
        raise ValueError(f"grouped_gemm_swap_sm100: epilogue is {epilogue!r}, expected one of {EPILOGUES}")
    if limit is not None and (epilogue == BF16 or not limit > 0):
        raise ValueError(
            f"grouped_gemm_swap_sm100: limit is {limit} with {epilogue}, expected a positive number with SwiGLU, or None"
        )
    if tokens < 1:
        raise ValueError(f"grouped_gemm_swap_sm100: tokens is {tokens}, expected at least 1")
    if max_active_clusters is not None and max_active_clusters < 1:
        raise ValueError(
            f"grouped_gemm_swap_sm100: max_active_clusters is {max_active_clusters}, expected at least 1, or None"
        )


def _check_sizes(epilogue: str, num_experts: int, n: int, k: int) -> None:
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"grouped_gemm_swap_sm100: mW has {num_experts} experts, expected 1 .. {MAX_EXPERTS}")
    if k < K_MULTIPLE or k % K_MULTIPLE:
        raise ValueError(
            f"grouped_gemm_swap_sm100: k is {k}, expected a positive multiple of {K_MULTIPLE}: TMA loads rows of 16 "
            "bytes; pad K"
        )
    multiple = N_MULTIPLE[epilogue]
    if n < multiple or n % multiple:
        raise ValueError(
            f"grouped_gemm_swap_sm100: n is {n} with {epilogue}, expected a positive multiple of {multiple}; pad N"
        )


def _check(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    device: torch.device,
    align: int = TMA_BYTES,
) -> None:
    registry.check_tensor("grouped_gemm_swap_sm100", name, tensor, (dtype,), shape, device)
    if not tensor.is_contiguous():
        raise ValueError(
            f"grouped_gemm_swap_sm100: {name} has strides {tensor.stride()}, expected contiguous rows; copy it"
        )
    if tensor.data_ptr() % align:
        raise ValueError(
            f"grouped_gemm_swap_sm100: {name} starts at {tensor.data_ptr():#x}, expected a multiple of {align} bytes; "
            "a slice of a larger tensor may need a copy"
        )


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes what GroupedGemmSwapSm100.__call__ does, unchecked, without the stream.

    Args:
        config: which kernel; where its epilogue has no use for an argument it is None.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(GroupedGemmSwapSm100, config, lambda: _stand_ins(config), config.arch, line_info)


def _stand_ins(config: Config) -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: its arguments with symbolic sizes."""
    experts, n = cute.sym_int(), cute.sym_int(divisibility=N_MULTIPLE[config.epilogue])
    rows, padded_rows = cute.sym_int(), cute.sym_int(divisibility=TILE_ROWS)
    k_bytes, padded_k = cute.sym_int(divisibility=TMA_BYTES), cute.sym_int(divisibility=TILE_COLUMNS)
    quantized = config.epilogue == SWIGLU_NVFP4
    d_type = cutlass.Uint8 if quantized else cutlass.BFloat16

    def matrix(dtype: Any, *shape: Any, align: int = TMA_BYTES) -> Any:
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

    return (
        matrix(cutlass.Uint8, rows, k_bytes),
        matrix(cutlass.Uint8, experts, n, k_bytes),
        matrix(cutlass.Float8E4M3FN, padded_rows, padded_k),
        matrix(cutlass.Float8E4M3FN, experts, cute.sym_int(divisibility=TILE_ROWS), padded_k),
        matrix(cutlass.Float32, experts, cute.sym_int(), align=4),
        matrix(cutlass.Int32, experts, align=4),
        matrix(cutlass.Int32, cute.sym_int(), align=4),
        matrix(d_type, rows, cute.sym_int(divisibility=8)),
        matrix(cutlass.Float8E4M3FN, padded_rows, cute.sym_int(divisibility=TILE_COLUMNS)) if quantized else None,
        matrix(cutlass.Float32, experts, align=4) if quantized else None,
        cutlass.Float32(1.0),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
