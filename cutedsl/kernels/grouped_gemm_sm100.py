"""Grouped NVFP4 GEMM on Blackwell: group e's rows of A times expert e's weights, with what follows fused.

    bf16:          D = bf16(alpha * (A B_e^T))
    swiglu:        D = bf16(h), h = silu(min(gate, limit)) * clamp(up, -limit, limit) of gate and up rows of B_e
    swiglu_nvfp4:  D = quantize_activation(h, h_scale[e]), codes and swizzled block scales, from h in FP32

The mainloop is that of `linear_sm100`: codes through shared memory, scales through tensor memory (TMEM), sums in TMEM.
The hard part here is that how many tiles there are, and whose, only the device knows. A group starts at a padded row that
is a multiple of 128, so that a tile of 128 rows has one expert, tile_expert[tile]; padded_offset[E] is where the last
group ends. Every warp reads both and walks the same list: n runs fastest, so that CTAs of one moment share
rows of A, and tiles of a group follow each other while its weights may still be in L2. Sizes of groups never reach the host.

With two CTAs to a tile (cta_group 2) a pair of 128-row tiles shares one MMA of 256 rows: each CTA loads its own rows of A,
half the rows of B, and all of B's scales. Pairs are fixed, tiles 2i and 2i + 1; where they belong to different experts,
the pair makes two passes, one for each, and in a pass only the CTA whose tile it is stores.

    load warp --ab full--> MMA warp --acc full--> epilogue warps --shared memory--> TMA store
        ^------ab empty------'          ^-----------acc empty-----------'

Gate and up of one h must meet in one thread. A thread of the epilogue holds a row of D, so the weights' rows come
interleaved, 16 gate rows, 16 up rows, ...: 32 sums in a row are one block of 16 h, which is also one block of the second
quantizer.

Padding: rows of a group's last tile beyond its count are computed from whatever A holds there, and stored: that part of D
belongs to the same group. No other row is touched; tiles behind padded_offset[E] are neither computed nor written. k and
n are ragged as in `linear_sm100`.

Names: as in `linear_sm100`; gB and gSFB have one mode more, the expert. In memory a row of D may be codes, two a byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import torch
from cutlass import cute, memory, pipeline
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import blackwell_helpers, blockscaled_layout

from cutedsl import compile as compiler
from cutedsl.formats import NVFP4
from cutedsl.kernels import blackwell, quantize_block
from cutedsl.kernels.blackwell import ARCHS, MMA_K, SWIZZLE_BYTES, TMA_BYTES, WARP, Arch
from cutedsl.layout import TILE_COLUMNS, TILE_ROWS, padded_shape
from cutedsl.ops import registry

# What follows the sums.
BF16, SWIGLU, SWIGLU_NVFP4 = "bf16", "swiglu", "swiglu_nvfp4"
EPILOGUES = (BF16, SWIGLU, SWIGLU_NVFP4)

# Rows of a CTA's tile, and the unit of a group's padding.
TILE_M = 128
TILE_K = 256
# By the number of CTAs that share a tile.
TILES_N = {1: (64, 128, 256), 2: (128, 256)}
# Average row tiles of a group from which on pairs of CTAs share tiles.
LONG_GROUP = 8
# Columns of sums that the epilogue moves at a time: two blocks of 16 h each.
EPILOGUE_N = 64
# Gate rows, then as many up rows.
INTERLEAVE = NVFP4.block_size
# Blocks of h that EPILOGUE_N sums become.
STEP_BLOCKS = EPILOGUE_N // (2 * INTERLEAVE)
# Bytes of a row in a buffer of D: what the swizzle permutes.
SPAN_BYTES = 128

EPILOGUE_WARPS = 4
MMA_WARP = 4
LOAD_WARP = 5
THREADS = 6 * WARP
EPILOGUE_THREADS = EPILOGUE_WARPS * WARP

K_MULTIPLE = TMA_BYTES * NVFP4.codes_per_byte
# D's rows are multiples of 16 bytes: BF16 of n, BF16 of n/2 with whole blocks, codes of n/2.
N_MULTIPLE = {BF16: 8, SWIGLU: 2 * INTERLEAVE, SWIGLU_NVFP4: 2 * K_MULTIPLE}


@dataclass(frozen=True)
class Shape:
    """Sizes of a grouped GEMM: rows of A with padding, weight rows of an expert, k, experts."""

    num_rows: int
    n: int
    k: int
    num_experts: int


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of rows and experts, n and k.

    Attributes:
        epilogue: one of EPILOGUES.
        tile_n: weight rows of a tile; its rows of A are TILE_M for each CTA, its step of K is TILE_K.
        num_ab_stages: tiles of A and B, with their scales, between load and MMA.
        num_acc_stages: accumulators; with 2 the next tile is computed while one is stored.
        num_d_stages: buffers of outputs on their way to global memory.
        cta_group: CTAs that share a tile, 1 or 2.
        arch: a key of ARCHS.
    """

    epilogue: str
    tile_n: int
    num_ab_stages: int
    num_acc_stages: int
    num_d_stages: int = 2
    cta_group: int = 1
    arch: str = "sm_100a"

    @property
    def tile_n_sf(self) -> int:
        """Rows of B whose scales a CTA loads: scales come in tiles of 128 rows."""
        return max(self.tile_n, TILE_ROWS)

    @property
    def acc_columns(self) -> int:
        """TMEM columns of all accumulators: one FP32 column for each row of B."""
        return self.tile_n * self.num_acc_stages

    @property
    def sfa_columns(self) -> int:
        """TMEM columns of A's scales."""
        return blackwell.tmem_sf_columns(TILE_M, TILE_K)

    @property
    def sfb_columns(self) -> int:
        """TMEM columns of B's scales."""
        return blackwell.tmem_sf_columns(self.tile_n_sf, TILE_K)

    @property
    def tmem_columns(self) -> int:
        """TMEM columns to allocate: a power of two, at least 32."""
        used = self.acc_columns + self.sfa_columns + self.sfb_columns
        return max(32, 1 << (used - 1).bit_length())

    @property
    def ab_stage_bytes(self) -> int:
        """What the loads of one stage write into one CTA."""
        codes = (TILE_M + self.tile_n // self.cta_group) * TILE_K // NVFP4.codes_per_byte
        return codes + (TILE_M + self.tile_n_sf) * TILE_K // NVFP4.block_size

    @property
    def d_columns(self) -> int:
        """Columns of D in a buffer, in elements of D: at most 128 bytes, one span of the swizzle."""
        of_tile = {BF16: self.tile_n, SWIGLU: self.tile_n // 2, SWIGLU_NVFP4: self.tile_n // 4}[self.epilogue]
        return min(of_tile, 8 * SPAN_BYTES // self.d_type.width)

    @property
    def d_step(self) -> int:
        """Columns of D, in elements of D, that EPILOGUE_N sums become."""
        return {BF16: EPILOGUE_N, SWIGLU: EPILOGUE_N // 2, SWIGLU_NVFP4: EPILOGUE_N // 4}[self.epilogue]

    @property
    def d_type(self) -> Any:
        """Element of D: BF16, or a byte of two codes."""
        return cutlass.Uint8 if self.epilogue == SWIGLU_NVFP4 else cutlass.BFloat16

    @property
    def smem_bytes(self) -> int:
        """Upper bound of a CTA's shared memory: stages, D, alpha, and 1 KiB for barriers and alignment."""
        d_bytes = self.num_d_stages * TILE_M * self.d_columns * self.d_type.width // 8
        return self.num_ab_stages * self.ab_stage_bytes + d_bytes + 4 * self.tile_n + 1024

    def validate(self) -> "Config":
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled, or could not run on the architecture.
        """
        if self.arch not in ARCHS:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(ARCHS)}")
        if self.epilogue not in EPILOGUES:
            raise ValueError(f"Config: epilogue is {self.epilogue!r}, expected one of {EPILOGUES}")
        if self.cta_group not in TILES_N:
            raise ValueError(f"Config: cta_group is {self.cta_group}, expected one of {tuple(TILES_N)}")
        if self.tile_n not in TILES_N[self.cta_group]:
            raise ValueError(
                f"Config: tile_n is {self.tile_n}, expected one of {TILES_N[self.cta_group]} for "
                f"cta_group {self.cta_group}"
            )
        if self.num_ab_stages < 2 or self.num_acc_stages < 1 or self.num_d_stages < 1:
            raise ValueError(f"Config: {self} has too few stages, expected at least 2 of a and b, 1 of the others")
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
    """The largest tile that still gives every SM work, with as many stages as fit.

    Args:
        shape: sizes; how rows spread over experts is not known on the host, so that padding counts as work.
        epilogue: one of EPILOGUES.
        arch: a key of ARCHS.

    Returns:
        One of four configurations for bf16, of three for the others.

    Raises:
        ValueError: arch or epilogue is unknown.

    The choice follows from counting tiles; it has not been measured on a B200.
    """
    if arch not in ARCHS:
        raise ValueError(f"choose_config: arch is {arch!r}, expected one of {sorted(ARCHS)}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"choose_config: epilogue is {epilogue!r}, expected one of {EPILOGUES}")
    tiles_m = -(-shape.num_rows // TILE_M)
    # What follows SwiGLU's sums takes long; it should overlap with the next tile, for which 256 columns leave no room.
    candidates = ((2, 256), (1, 256), (1, 128)) if epilogue == BF16 else ((2, 128), (1, 128))
    for cta_group, tile_n in candidates:
        # A pair whose row tiles have two experts works twice: pairs pay where groups are long.
        too_short = cta_group == 2 and tiles_m < LONG_GROUP * shape.num_experts
        if not too_short and tiles_m * -(-shape.n // tile_n) >= ARCHS[arch].num_sms:
            return largest_config(epilogue, tile_n, cta_group, ARCHS[arch])
    return largest_config(epilogue, 64, 1, ARCHS[arch])


def largest_config(epilogue: str, tile_n: int, cta_group: int, arch: Arch) -> Config:
    """The configuration of that tile with as many stages as fit the architecture."""
    # Two accumulators of 256 columns would leave no TMEM for scales.
    num_acc_stages = 1 if tile_n == 256 else 2
    without_stages = Config(epilogue, tile_n, 0, num_acc_stages, cta_group=cta_group, arch=arch.name)
    num_ab_stages = (arch.smem_bytes - without_stages.smem_bytes) // without_stages.ab_stage_bytes
    return Config(epilogue, tile_n, num_ab_stages, num_acc_stages, cta_group=cta_group, arch=arch.name).validate()


class _Smem(NamedTuple):
    """Shared memory of a CTA. The last mode of an s-tensor is its stage, except alpha's."""

    ab_barriers: Any
    acc_barriers: Any
    tmem_address: Any
    sA: Any
    sB: Any
    sD: Any
    sSFA: Any
    sSFB: Any
    sAlpha: Any


class _Tiles(NamedTuple):
    """A cluster's tiles first, first + step, ... below end, of cta_group row tiles by tile_n; n runs fastest.

    rank is the CTA's in its cluster; mTileExpert has the expert of each of num_row_tiles.
    """

    first: Any
    end: Any
    step: Any
    num_n: Any
    num_k: Any
    num_k_blocks: Any
    rank: Any
    num_row_tiles: Any
    mTileExpert: Any


class _Scaling(NamedTuple):
    """What the epilogue multiplies with, and where block scales of D go; None where an epilogue has no such thing.

    n is the weight rows of an expert, num_blocks the blocks of a row of h.
    """

    mAlpha: Any
    mHScale: Any
    limit: Any
    mSFD: Any
    n: Any
    num_blocks: Any


class _Factors(NamedTuple):
    """A tile's part of _Scaling, of its expert."""

    alpha_gate: Any
    alpha_up: Any
    limit: Any
    h_scale: Any


class GroupedGemmSm100:
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.validate()
        self.mma_tiler = (TILE_M * config.cta_group, config.tile_n, TILE_K)
        self.cta_group = tcgen05.CtaGroup.TWO if config.cta_group == 2 else tcgen05.CtaGroup.ONE
        self.epilogue_barrier = pipeline.NamedBarrier(barrier_id=1, num_threads=EPILOGUE_THREADS)

    @cute.jit
    def __call__(
        self,
        mA_packed: cute.Tensor,
        mB_packed: cute.Tensor,
        mSFA_bytes: cute.Tensor,
        mSFB_bytes: cute.Tensor,
        mAlpha: cute.Tensor,
        mTileExpert: cute.Tensor,
        mPaddedOffset: cute.Tensor,
        mD: cute.Tensor,
        mSFD_bytes: cute.Tensor | None,
        mHScale: cute.Tensor | None,
        limit: cutlass.Float32,
        max_active_clusters: cutlass.Int32,
        stream: Any,
    ) -> None:
        """Makes the tensor maps, on the host, and launches min(tiles, max_active_clusters) clusters.

        Args:
            mA_packed: (P, k/2) uint8.
            mB_packed: (E, n, k/2) uint8.
            mSFA_bytes, mSFB_bytes: e4m3, whole scale tiles for rows of A and of each expert's B.
            mAlpha: (E, row blocks) fp32.
            mTileExpert: (P/128,) int32.
            mPaddedOffset: (E + 1,) int32.
            mD: (P, n) bf16, (P, n/2) bf16 or (P, n/4) uint8, by the epilogue.
            mSFD_bytes: e4m3, whole scale tiles for rows of D; swiglu_nvfp4 only.
            mHScale: (E,) fp32; swiglu_nvfp4 only.
            limit: of SwiGLU, infinity for none.
            max_active_clusters: the most clusters to launch, at least 1.
            stream: to launch on.
        """
        config = self.config
        num_rows, k = mA_packed.shape[0], mA_packed.shape[1] * NVFP4.codes_per_byte
        n = mB_packed.shape[1]
        mA = blackwell.packed_codes(mA_packed, num_rows, k)
        mB = blackwell.expert_codes(mB_packed)
        mSFA = blackwell.global_sf_tiles(mSFA_bytes, num_rows, k)
        mSFB = blackwell.expert_sf_tiles(mSFB_bytes, n, k)
        tiled_mma = self._tiled_mma()
        a_stage, b_stage = (cute.select(layout, mode=[0, 1, 2]) for layout in self._ab_smem_layouts(tiled_mma))
        d_stage = cute.select(self._d_smem_layout(), mode=[0, 1])
        sfa_box, sfb_box = blackwell.sf_box(TILE_M, TILE_K), blackwell.sf_box(config.tile_n_sf, TILE_K)
        cluster = (config.cta_group, 1, 1, 1)
        load, store = cpasync.CopyBulkTensorTileG2SOp(self.cta_group), cpasync.CopyBulkTensorTileS2GOp()
        tma_a, mA = cute.nvgpu.make_tiled_tma_atom_A(load, mA, a_stage, self.mma_tiler, tiled_mma, cluster)
        tma_b, mB = cute.nvgpu.make_tiled_tma_atom_B(load, mB, b_stage, self.mma_tiler, tiled_mma, cluster)
        tma_sfa, mSFA = cpasync.make_tiled_tma_atom(load, mSFA, cute.make_layout(sfa_box), sfa_box)
        tma_sfb, mSFB = cpasync.make_tiled_tma_atom(load, mSFB, cute.make_layout(sfb_box), sfb_box)
        tma_d, mD_tma = cpasync.make_tiled_tma_atom(store, mD, d_stage, (TILE_M, config.d_columns))

        # As many as there could be: only the device knows how many there are.
        num_tiles = cute.ceil_div(num_rows, self.mma_tiler[0]) * cute.ceil_div(n, config.tile_n)
        grid = (cutlass.min(num_tiles, max_active_clusters) * config.cta_group, 1, 1)
        atoms, tensors = (tma_a, tma_b, tma_sfa, tma_sfb), (mA, mB, mSFA, mSFB)
        num_blocks = n // (2 * INTERLEAVE)
        mSFD = None
        if cutlass.const_expr(config.epilogue == SWIGLU_NVFP4):
            mSFD = quantize_block.swizzled_scales(mSFD_bytes, num_blocks)
        scaling = _Scaling(mAlpha, mHScale, limit, mSFD, n, num_blocks)
        self.kernel(tiled_mma, atoms, tensors, tma_d, mD_tma, scaling, mTileExpert, mPaddedOffset).launch(
            grid=grid, block=(THREADS, 1, 1), cluster=(config.cta_group, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        tiled_mma: cute.TiledMma,
        atoms: Any,
        tensors: Any,
        tma_d: cute.CopyAtom,
        mD: cute.Tensor,
        scaling: _Scaling,
        mTileExpert: cute.Tensor,
        mPaddedOffset: cute.Tensor,
    ) -> None:
        """Sets up barriers and TMEM, then every warp takes its role."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == LOAD_WARP:
            for tma in (*atoms, tma_d):
                cpasync.prefetch_descriptor(tma)
        smem = self._allocate_smem(tiled_mma)
        ab_producer, ab_consumer = self._ab_pipeline(smem)
        acc_producer, acc_consumer = self._acc_pipeline(smem)
        if warp == 0:
            cute.arch.alloc_tmem(self.config.tmem_columns, smem.tmem_address, is_two_cta=self.config.cta_group == 2)
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=self.config.cta_group == 2)
        # Behind this barrier all mbarriers are initialised and the TMEM address is in shared memory.
        cute.arch.mbarrier_init_fence()
        blackwell.before_thread_sync()
        self._sync_all()
        blackwell.after_thread_sync()
        tmem = cute.arch.retrieve_tmem_ptr(cutlass.Float32, 16, smem.tmem_address)
        tiles = self._tiles(tensors[0], scaling, mTileExpert, mPaddedOffset)

        if warp == LOAD_WARP:
            self._load(tiled_mma, atoms, tensors, smem, tiles, ab_producer)
        elif warp == MMA_WARP:
            if tiles.rank == 0:
                self._mma(tiled_mma, smem, tmem, tiles, ab_consumer, acc_producer)
        else:
            self._epilogue(tiled_mma, tma_d, mD, scaling, smem, tmem, tiles, acc_consumer)
        # Now nobody uses TMEM any more, nor another CTA's barriers.
        blackwell.before_thread_sync()
        self._sync_all()
        if warp == 0:
            blackwell.after_thread_sync()
            cute.arch.dealloc_tmem(tmem, self.config.tmem_columns, is_two_cta=self.config.cta_group == 2)

    @cute.jit
    def _load(self, tiled_mma: Any, atoms: Any, tensors: Any, smem: _Smem, tiles: _Tiles, ab_producer: Any) -> None:
        """Load warp: for each step of K one stage of A, the expert's B and their scales."""
        config = self.config
        tma_a, tma_b, tma_sfa, tma_sfb = atoms
        mA, mB, mSFA, mSFB = tensors
        thr_mma = tiled_mma.get_slice(tiles.rank)
        # (rows, TILE_K, row tiles, k tiles), (tile_n, TILE_K, n tiles, k tiles, experts)
        gA = cute.local_tile(mA, (self.mma_tiler[0], TILE_K), (None, None))
        gB = cute.local_tile(mB, (config.tile_n, TILE_K), (None, None, None))
        # (scale tile, along k, along rows, k tiles, row tiles); B's with experts
        gSFA = cute.local_tile(mSFA, blackwell.sf_box(TILE_M, TILE_K), (0, None, None))
        gSFB = cute.local_tile(mSFB, blackwell.sf_box(config.tile_n_sf, TILE_K), (0, None, None, None))
        sSFA = blackwell.shared_sf_tiles(smem.sSFA, TILE_M, TILE_K, config.num_ab_stages)
        sSFB = blackwell.shared_sf_tiles(smem.sSFB, config.tile_n_sf, TILE_K, config.num_ab_stages)
        tAsA, tAgA = blackwell.tma_partition(tma_a, smem.sA, thr_mma.partition_A(gA))
        tBsB, tBgB = blackwell.tma_partition(tma_b, smem.sB, thr_mma.partition_B(gB))
        tAsSFA, tAgSFA = blackwell.tma_partition(tma_sfa, sSFA, gSFA)
        tBsSFB, tBgSFB = blackwell.tma_partition(tma_sfb, sSFB, gSFB)

        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            m_tile, n_tile = tile // tiles.num_n, tile % tiles.num_n
            row_tile = m_tile * config.cta_group + tiles.rank
            # Two 64-wide tiles share a scale tile; each loads all of it.
            sf_tile = n_tile // (config.tile_n_sf // config.tile_n)
            for pair_pass in cutlass.range(self._num_passes(tiles, m_tile), unroll=1):
                expert = tiles.mTileExpert[m_tile * config.cta_group + pair_pass]
                for k_tile in cutlass.range(tiles.num_k, unroll=1):
                    stage = ab_producer.acquire_and_advance()
                    at, bar = stage.index, stage.barrier
                    cute.copy(tma_a, tAgA[None, m_tile, k_tile], tAsA[None, at], tma_bar_ptr=bar)
                    cute.copy(tma_b, tBgB[None, n_tile, k_tile, expert], tBsB[None, at], tma_bar_ptr=bar)
                    cute.copy(tma_sfa, tAgSFA[None, k_tile, row_tile], tAsSFA[None, at], tma_bar_ptr=bar)
                    cute.copy(tma_sfb, tBgSFB[None, k_tile, sf_tile, expert], tBsSFB[None, at], tma_bar_ptr=bar)
        # Shared memory must outlive the MMA's arrivals on its barriers.
        ab_producer.tail()

    @cute.jit
    def _mma(self, tiled_mma: Any, smem: _Smem, tmem: Any, tiles: _Tiles, ab_consumer: Any, acc_producer: Any) -> None:
        """MMA warp: for each stage the scales to TMEM, then MMAs of 64 along K."""
        config = self.config
        # (MMA, 1, K blocks, stage)
        tCrA = tiled_mma.make_fragment_A(smem.sA)
        tCrB = tiled_mma.make_fragment_B(smem.sB)
        # (MMA, 1, 1, stage)
        tCtAcc = self._accumulators(tiled_mma, tmem)
        # (MMA, 1, K blocks)
        tCtSFA, tCtSFB = self._tmem_scales(tiled_mma, smem, tmem)
        copy_sfa, tCsSFA, tCtSFA_copy = blackwell.sf_to_tmem(smem.sSFA, tCtSFA, self.cta_group)
        copy_sfb, tCsSFB, tCtSFB_copy = blackwell.sf_to_tmem(smem.sSFB, tCtSFB, self.cta_group)

        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            # A 64-wide tile may be the second half of its scale tile, which begins two columns of 4 scales further on.
            half = tile % tiles.num_n % (config.tile_n_sf // config.tile_n)
            shift = half * (config.tile_n // WARP * TILE_COLUMNS)
            tCtSFB_tile = cute.make_tensor(tCtSFB.iterator + shift, tCtSFB.layout)
            for _ in cutlass.range(self._num_passes(tiles, tile // tiles.num_n), unroll=1):
                acc = acc_producer.acquire_and_advance()
                tCtAcc_tile = tCtAcc[None, None, None, acc.index]
                for k_tile in cutlass.range(tiles.num_k, unroll=1):
                    stage = ab_consumer.wait_and_advance()
                    blackwell.after_thread_sync()
                    # tcgen05.cp and tcgen05.mma run in the order of issue: one place in TMEM serves every stage.
                    cute.copy(copy_sfa, tCsSFA[None, None, None, None, stage.index], tCtSFA_copy)
                    cute.copy(copy_sfb, tCsSFB[None, None, None, None, stage.index], tCtSFB_copy)
                    k_blocks = (None, None, None, stage.index)
                    a, b = [tCrA[k_blocks], tCtSFA], [tCrB[k_blocks], tCtSFB_tile]
                    self._mma_step(tCtAcc_tile, a, b, k_tile, tiles.num_k_blocks)
                    stage.release()
                acc.commit()

    @cute.jit
    def _mma_step(self, tCtAcc: Any, a: Any, b: Any, k_tile: Any, num_k_blocks: Any) -> None:
        """Adds a stage's product to the accumulator, but for blocks of MMA_K columns wholly behind k, which are zeros.

        Args:
            a, b: codes and scales, (MMA, 1, K blocks) each.
            k_tile: the step of K; the first one overwrites what the accumulator holds.
            num_k_blocks: of all steps.
        """
        # One of its own: a flag that is set in a branch cannot reach the one that the caller goes on with.
        tiled_mma = self._tiled_mma()
        num_left = num_k_blocks - k_tile * (TILE_K // MMA_K)
        if num_left >= TILE_K // MMA_K:
            tiled_mma.set(tcgen05.Field.ACCUMULATE, k_tile != 0)
            cute.gemm(tiled_mma, tCtAcc, a, b, tCtAcc)
        else:
            for k_block in cutlass.range(num_left, unroll=1):
                tiled_mma.set(tcgen05.Field.ACCUMULATE, k_tile + k_block != 0)
                at = (None, None, k_block)
                cute.gemm(tiled_mma, tCtAcc, [part[at] for part in a], [part[at] for part in b], tCtAcc)

    @cute.jit
    def _epilogue(
        self,
        tiled_mma: Any,
        tma_d: Any,
        mD: cute.Tensor,
        scaling: _Scaling,
        smem: _Smem,
        tmem: Any,
        tiles: _Tiles,
        acc_consumer: Any,
    ) -> None:
        """Epilogue warps: 64 sums of a row at a time from TMEM, what follows them, to shared memory, to D."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        num_steps, steps_per_store = config.tile_n // EPILOGUE_N, config.d_columns // config.d_step
        # (TILE_M, EPILOGUE_N, steps, stage)
        tAcc = cute.flat_divide(self._accumulators(tiled_mma, tmem)[(None, None), 0, 0, None], (TILE_M, EPILOGUE_N))[
            None, None, 0, None, None
        ]
        load_atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(EPILOGUE_N)), cutlass.Float32)
        tmem_load = tcgen05.make_tmem_copy(load_atom, tAcc[None, None, 0, 0])
        # A thread has one row: (EPILOGUE_N, 1, 1, steps, stage)
        thr_load = tmem_load.get_slice(thread)
        tTR_tAcc = thr_load.partition_S(tAcc)
        tTR_step = thr_load.partition_D(cute.make_identity_tensor((TILE_M, EPILOGUE_N)))
        rAcc = cute.make_rmem_tensor(tTR_step.shape, cutlass.Float32)
        rH = cute.make_rmem_tensor((1, EPILOGUE_N // 2, 1), cutlass.Float32)
        rD = cute.make_rmem_tensor((1, config.d_step, 1), config.d_type)
        # (TILE_M, d_columns, row tiles, columns of all tiles)
        gD = cute.local_tile(mD, (TILE_M, config.d_columns), (None, None))
        tDsD, tDgD = cpasync.tma_partition(
            tma_d, 0, cute.make_layout(1), cute.group_modes(smem.sD, 0, 2), cute.group_modes(gD, 0, 2)
        )

        buffer = cutlass.Int32(0)
        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            m_tile, n_tile = tile // tiles.num_n, tile % tiles.num_n
            row_tile = m_tile * config.cta_group + tiles.rank
            for pair_pass in cutlass.range(self._num_passes(tiles, m_tile), unroll=1):
                expert = tiles.mTileExpert[m_tile * config.cta_group + pair_pass]
                is_mine = self._is_mine(tiles, m_tile, expert)
                factors = self._factors(scaling, smem.sAlpha, expert, n_tile, thread)
                acc = acc_consumer.wait_and_advance()
                blackwell.after_thread_sync()
                for store in cutlass.range(num_steps // steps_per_store, unroll=1):
                    # Behind this barrier alpha is complete, and the buffer's last store has read it.
                    if warp == 0:
                        cute.arch.cp_async_bulk_wait_group(config.num_d_stages - 1, read=True)
                    self.epilogue_barrier.arrive_and_wait()
                    for part in cutlass.range(steps_per_store, unroll=1):
                        step = store * steps_per_store + part
                        cute.copy(tmem_load, tTR_tAcc[None, None, None, step, acc.index], rAcc)
                        cute.arch.fence_view_async_tmem_load()
                        if step == num_steps - 1:
                            # The accumulator is in registers; the MMA may have its columns back.
                            blackwell.before_thread_sync()
                            acc.release()
                        if cutlass.const_expr(config.epilogue == BF16):
                            self._scale(rAcc, rD, smem.sAlpha, step)
                        else:
                            self._swiglu(rAcc, rH, factors)
                        if cutlass.const_expr(config.epilogue == SWIGLU):
                            rD.store(rH.load().to(cutlass.BFloat16))
                        elif cutlass.const_expr(config.epilogue == SWIGLU_NVFP4):
                            row, block = row_tile * TILE_M + thread, (n_tile * num_steps + step) * STEP_BLOCKS
                            self._quantize(rH, rD, factors, scaling, row, block, is_mine)
                        cute.autovec_copy(rD, cute.local_tile(smem.sD, rD.shape, (thread, part, buffer)))
                    cute.arch.fence_view_async_shared()
                    self.epilogue_barrier.arrive_and_wait()
                    if warp == 0:
                        if is_mine:
                            column = n_tile * (num_steps // steps_per_store) + store
                            cute.copy(tma_d, tDsD[None, buffer], tDgD[None, row_tile, column])
                        cute.arch.cp_async_bulk_commit_group()
                    buffer = (buffer + 1) % config.num_d_stages
        # Shared memory must outlive the stores that read it.
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _factors(self, scaling: _Scaling, sAlpha: cute.Tensor, expert: Any, n_tile: Any, thread: Any) -> _Factors:
        """Fetches what a tile's sums are multiplied with; the next epilogue barrier makes sAlpha visible."""
        factors = _Factors(None, None, None, None)
        if cutlass.const_expr(self.config.epilogue == BF16):
            # Zeros beyond n.
            for start in cutlass.range_constexpr(0, self.config.tile_n, EPILOGUE_THREADS):
                column = start + thread
                if column < self.config.tile_n:
                    n = n_tile * self.config.tile_n + column
                    value = cutlass.Float32(0.0)
                    if n < scaling.n:
                        value = scaling.mAlpha[expert, n // (scaling.n // cute.size(scaling.mAlpha, mode=[1]))]
                    sAlpha[column] = value
        else:
            h_scale = scaling.mHScale[expert] if cutlass.const_expr(self.config.epilogue == SWIGLU_NVFP4) else None
            factors = _Factors(scaling.mAlpha[expert, 0], scaling.mAlpha[expert, 1], scaling.limit, h_scale)
        return factors

    @cute.jit
    def _scale(self, rAcc: cute.Tensor, rD: cute.Tensor, sAlpha: cute.Tensor, step: Any) -> None:
        """64 sums of a row, times alpha, to BF16."""
        rAlpha = cute.make_rmem_tensor(EPILOGUE_N, cutlass.Float32)
        cute.autovec_copy(cute.local_tile(sAlpha, (EPILOGUE_N,), (step,)), rAlpha)
        scaled = rAcc.load().reshape((EPILOGUE_N,)) * rAlpha.load()
        rD.store(scaled.to(cutlass.BFloat16).reshape(rD.shape))

    @cute.jit
    def _swiglu(self, rAcc: cute.Tensor, rH: cute.Tensor, factors: _Factors) -> None:
        """64 sums of a row, blocks of gate and up in turn, to 32 h."""
        for i in cutlass.range_constexpr(EPILOGUE_N // 2):
            at = i // INTERLEAVE * 2 * INTERLEAVE + i % INTERLEAVE
            gate, up = rAcc[at] * factors.alpha_gate, rAcc[at + INTERLEAVE] * factors.alpha_up
            rH[i] = blackwell.swiglu(gate, up, factors.limit)

    @cute.jit
    def _quantize(
        self, rH: cute.Tensor, rD: cute.Tensor, factors: _Factors, scaling: _Scaling, row: Any, block: Any, is_mine: Any
    ) -> None:
        """Blocks block, block + 1 of a row of h to codes in registers, and their scales to global memory."""
        rCodes = cute.recast_tensor(rD, cutlass.Uint64)
        for i in cutlass.range_constexpr(STEP_BLOCKS):
            values = [rH[i * INTERLEAVE + j] for j in range(INTERLEAVE)]
            codes, scale = quantize_block.quantize_block(values, factors.h_scale)
            rCodes[i] = codes
            if is_mine & (block + i < scaling.num_blocks):
                scaling.mSFD[row, block + i] = scale
        # A row has an even number of blocks: behind the last are 0 or 2 scales of its scale tile.
        if is_mine & (block + STEP_BLOCKS == scaling.num_blocks) & (scaling.num_blocks % TILE_COLUMNS != 0):
            for i in cutlass.range_constexpr(STEP_BLOCKS):
                scaling.mSFD[row, scaling.num_blocks + i] = quantize_block.zero_scale()

    @cute.jit
    def _num_passes(self, tiles: _Tiles, m_tile: Any) -> Any:
        """Returns 2 if the two row tiles of m_tile have different experts, else 1."""
        passes = cutlass.Int32(1)
        if cutlass.const_expr(self.config.cta_group == 2):
            second = 2 * m_tile + 1
            # Nested: the expert is read only if there is a tile.
            if second < tiles.num_row_tiles:  # noqa: SIM102
                if tiles.mTileExpert[second] != tiles.mTileExpert[second - 1]:
                    passes = cutlass.Int32(2)
        return passes

    @cute.jit
    def _is_mine(self, tiles: _Tiles, m_tile: Any, expert: Any) -> Any:
        """Returns whether this CTA's row tile is the expert's."""
        is_mine = cutlass.Boolean(True)
        if cutlass.const_expr(self.config.cta_group == 2):
            row_tile = 2 * m_tile + tiles.rank
            is_mine = cutlass.Boolean(False)
            if row_tile < tiles.num_row_tiles:
                is_mine = tiles.mTileExpert[row_tile] == expert
        return is_mine

    def _tiles(
        self, mA: cute.Tensor, scaling: _Scaling, mTileExpert: cute.Tensor, mPaddedOffset: cute.Tensor
    ) -> _Tiles:
        config = self.config
        num_row_tiles = mPaddedOffset[cute.size(mPaddedOffset) - 1] // TILE_M
        num_n = cute.ceil_div(scaling.n, config.tile_n)
        return _Tiles(
            first=cute.arch.block_idx()[0] // config.cta_group,
            end=cute.ceil_div(num_row_tiles, config.cta_group) * num_n,
            step=cute.arch.grid_dim()[0] // config.cta_group,
            num_n=num_n,
            num_k=cute.ceil_div(cute.size(mA, mode=[1]), TILE_K),
            num_k_blocks=cute.ceil_div(cute.size(mA, mode=[1]), MMA_K),
            rank=cute.arch.block_idx()[0] % config.cta_group,
            num_row_tiles=num_row_tiles,
            mTileExpert=mTileExpert,
        )

    def _sync_all(self) -> None:
        """Waits for all threads of the cluster."""
        if self.config.cta_group == 2:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def _tiled_mma(self) -> cute.TiledMma:
        shape = (self.mma_tiler[0], self.config.tile_n, MMA_K)
        op = tcgen05.MmaMXF4NVF4Op(cutlass.Float8E4M3FN, shape, self.cta_group, tcgen05.OperandSource.SMEM)
        return cute.make_tiled_mma(op)

    def _ab_smem_layouts(self, tiled_mma: cute.TiledMma) -> tuple[Any, Any]:
        """Returns layouts of A and B, (MMA, 1, K blocks, stage), in the 128-byte swizzle."""
        stages = self.config.num_ab_stages
        return (
            blackwell_helpers.make_smem_layout_a(tiled_mma, self.mma_tiler, cutlass.Float4E2M1FN, stages),
            blackwell_helpers.make_smem_layout_b(tiled_mma, self.mma_tiler, cutlass.Float4E2M1FN, stages),
        )

    def _sf_smem_layouts(self, tiled_mma: cute.TiledMma) -> tuple[Any, Any]:
        """Returns layouts of scales, (MMA, 1, K blocks, stage): the bytes of blackwell.shared_sf_tiles."""
        stages = self.config.num_ab_stages
        return (
            blockscaled_layout.make_smem_layout_sfa(tiled_mma, self.mma_tiler, NVFP4.block_size, stages),
            blockscaled_layout.make_smem_layout_sfb(tiled_mma, self.mma_tiler, NVFP4.block_size, stages),
        )

    def _d_smem_layout(self) -> Any:
        """Returns (TILE_M, d_columns, stage), swizzled over a row's bytes."""
        config = self.config
        return blackwell_helpers.make_smem_layout_epi(
            config.d_type, LayoutEnum.ROW_MAJOR, (TILE_M, config.d_columns), config.num_d_stages
        )

    def _allocate_smem(self, tiled_mma: cute.TiledMma) -> _Smem:
        smem = memory.SmemAllocator()
        a_layout, b_layout = self._ab_smem_layouts(tiled_mma)
        sfa_layout, sfb_layout = self._sf_smem_layouts(tiled_mma)
        d_layout = self._d_smem_layout()
        # Swizzled buffers first: they want the largest alignment.
        return _Smem(
            sA=smem.allocate_tensor(cutlass.Float4E2M1FN, a_layout.outer, SWIZZLE_BYTES, a_layout.inner),
            sB=smem.allocate_tensor(cutlass.Float4E2M1FN, b_layout.outer, SWIZZLE_BYTES, b_layout.inner),
            sD=smem.allocate_tensor(self.config.d_type, d_layout.outer, SWIZZLE_BYTES, d_layout.inner),
            sSFA=smem.allocate_tensor(cutlass.Float8E4M3FN, sfa_layout, 128),
            sSFB=smem.allocate_tensor(cutlass.Float8E4M3FN, sfb_layout, 128),
            sAlpha=smem.allocate_tensor(cutlass.Float32, cute.make_layout(self.config.tile_n), 128),
            ab_barriers=smem.allocate_array(cutlass.Int64, 2 * self.config.num_ab_stages),
            acc_barriers=smem.allocate_array(cutlass.Int64, 2 * self.config.num_acc_stages),
            tmem_address=smem.allocate(cutlass.Int32),
        )

    def _cluster_layout(self) -> Any:
        """Returns the CTAs of a cluster: of one MMA, along m, n, k."""
        return cute.make_layout((self.config.cta_group, 1, 1, 1))

    def _ab_pipeline(self, smem: _Smem) -> tuple[Any, Any]:
        """Returns producer and consumer of stages: the bytes of all CTAs' loads fill one, one MMA commit frees it."""
        return pipeline.PipelineTmaUmma.create(
            barrier_storage=smem.ab_barriers,
            num_stages=self.config.num_ab_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            tx_count=self.config.ab_stage_bytes * self.config.cta_group,
            cta_layout_vmnk=self._cluster_layout(),
            defer_sync=True,
        ).make_participants()

    def _acc_pipeline(self, smem: _Smem) -> tuple[Any, Any]:
        """Returns producer and consumer of accumulators: one MMA commit fills one, all CTAs' epilogues free it."""
        consumers = EPILOGUE_THREADS * self.config.cta_group
        return pipeline.PipelineUmmaAsync.create(
            barrier_storage=smem.acc_barriers,
            num_stages=self.config.num_acc_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, consumers),
            cta_layout_vmnk=self._cluster_layout(),
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
        sfa_layout = blockscaled_layout.make_tmem_layout_sfa(
            tiled_mma, self.mma_tiler, NVFP4.block_size, cute.slice_(smem.sSFA.layout, stage)
        )
        sfb_layout = blockscaled_layout.make_tmem_layout_sfb(
            tiled_mma, self.mma_tiler, NVFP4.block_size, cute.slice_(smem.sSFB.layout, stage)
        )
        tmem_sfa = tmem + self.config.acc_columns
        tmem_sfb = tmem_sfa + self.config.sfa_columns
        return (
            cute.make_tensor(cute.recast_ptr(tmem_sfa, dtype=cutlass.Float8E4M3FN), sfa_layout),
            cute.make_tensor(cute.recast_ptr(tmem_sfb, dtype=cutlass.Float8E4M3FN), sfb_layout),
        )


def grouped_gemm(
    mA: torch.Tensor,
    mB: torch.Tensor,
    mSFA: torch.Tensor,
    mSFB: torch.Tensor,
    alpha: torch.Tensor,
    tile_expert: torch.Tensor,
    padded_offset: torch.Tensor,
    mD: torch.Tensor,
    *,
    epilogue: str = BF16,
    mSFD: torch.Tensor | None = None,
    h_scale: torch.Tensor | None = None,
    limit: float | None = None,
    max_active_clusters: int | None = None,
) -> None:
    """y = (e2m1(mA) * mSFA) (e2m1(mB[e]) * mSFB[e])^T for the rows of each expert e, then the epilogue.

    bf16: mD = bf16(alpha * y). swiglu: mD = bf16(h), h = silu(min(gate, limit)) * clamp(up, -limit, limit) of
    gate, up = alpha * y. swiglu_nvfp4: mD, mSFD = quantize_activation(h, h_scale[e]).

    Args:
        mA: (P, k/2) uint8 - codes of the activation, rows at padded places; P a multiple of 128, may be 0.
        mB: (E, n, k/2) uint8 - codes of the weights; for SwiGLU, 16 gate rows, 16 up rows, and so on.
        mSFA: (P, k/16 up to 4) e4m3 - swizzled block scales; padded columns finite, padded rows anything.
        mSFB: (E, n up to 128, k/16 up to 4) e4m3 - likewise, in the order of mB's rows.
        alpha: (E,) or (E, R) fp32 - of each expert, or of each n/R rows of it in turn, R a divisor of n; for SwiGLU (E, 2),
            of gate and up.
        tile_expert: (P/128,) int32 - expert of each 128 rows; read up to padded_offset[E].
        padded_offset: (E + 1,) int32 - where groups start, multiples of 128; only the last, where they end, is read.
        mD: (P, n) bf16, (P, n/2) bf16, or (P, n/4) uint8 codes, by the epilogue - rows up to padded_offset[E] are written,
            rows of padding among them with what mA's padding gives, the others are left alone.
        epilogue: one of EPILOGUES.
        mSFD: (P, n/32 up to 4) e4m3 - swizzled block scales of mD, zeros in padded columns; swiglu_nvfp4 only.
        h_scale: (E,) fp32 - tensor scale of h, the input_scale of the GEMM that follows; swiglu_nvfp4 only.
        limit: of SwiGLU, positive; None for no clamp.
        max_active_clusters: the most CTAs (or pairs of CTAs) to launch; None: one for each SM.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape, stride, device or address is not as above; k no multiple of 32; n no multiple of 8, 32 or 64
            (bf16, swiglu, swiglu_nvfp4); an argument that the epilogue lacks or has no use for; max_active_clusters less
            than 1. Values on the device are not checked.

    Layout: all contiguous, first bytes 16-byte aligned; scales in 128x4 tiles, see `cutedsl.layout`.
    Numerics: products and sums FP32 in the tensor core, alpha, SwiGLU (see `blackwell.swiglu`) and h in FP32; bf16 rounded
        once, to nearest even. Codes and scales are bit for bit those of quantize_activation(h). Independent of other rows.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream.
    """
    check(
        mA, mB, mSFA, mSFB, alpha, tile_expert, padded_offset, mD,
        epilogue=epilogue, mSFD=mSFD, h_scale=h_scale, limit=limit, max_active_clusters=max_active_clusters,
    )  # fmt: skip
    num_experts, n, k_bytes = mB.shape
    if mA.shape[0] == 0:
        return
    config = choose_config(Shape(mA.shape[0], n, k_bytes * NVFP4.codes_per_byte, num_experts), epilogue)
    if max_active_clusters is None:
        max_active_clusters = max(1, blackwell.num_sms(mA.device) // config.cta_group)
    limit = float("inf") if limit is None else limit
    compiled(config)(
        mA, mB, mSFA, mSFB, alpha.view(num_experts, -1), tile_expert, padded_offset, mD, mSFD, h_scale, limit,
        max_active_clusters,
    )  # fmt: skip


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes what GroupedGemmSm100.__call__ does, unchecked, without the stream.

    Args:
        config: which kernel; where its epilogue has no use for an argument it is None.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(GroupedGemmSm100, config, lambda: _stand_ins(config), config.arch, line_info)


def check(
    mA: torch.Tensor,
    mB: torch.Tensor,
    mSFA: torch.Tensor,
    mSFB: torch.Tensor,
    alpha: torch.Tensor,
    tile_expert: torch.Tensor,
    padded_offset: torch.Tensor,
    mD: torch.Tensor,
    *,
    epilogue: str = BF16,
    mSFD: torch.Tensor | None = None,
    h_scale: torch.Tensor | None = None,
    limit: float | None = None,
    max_active_clusters: int | None = None,
) -> None:
    """Raises what grouped_gemm raises; reads no device memory."""
    if epilogue not in EPILOGUES:
        raise ValueError(f"grouped_gemm_sm100: epilogue is {epilogue!r}, expected one of {EPILOGUES}")
    _check("mA", mA, torch.uint8, (None, None), mA)
    _check("mB", mB, torch.uint8, (None, None, mA.shape[1]), mA)
    num_rows, (num_experts, n, k_bytes) = mA.shape[0], mB.shape
    k = k_bytes * NVFP4.codes_per_byte
    if num_experts < 1 or num_rows % TILE_M:
        raise ValueError(
            f"grouped_gemm_sm100: mA has {num_rows} rows and mB {num_experts} experts, expected a multiple of {TILE_M} "
            "and at least 1; groups start at padded rows"
        )
    if k < K_MULTIPLE or k % K_MULTIPLE:
        raise ValueError(
            f"grouped_gemm_sm100: k is {k}, expected a positive multiple of {K_MULTIPLE}: TMA loads rows of 16 bytes; "
            "pad K"
        )
    if n < N_MULTIPLE[epilogue] or n % N_MULTIPLE[epilogue]:
        raise ValueError(
            f"grouped_gemm_sm100: n is {n}, expected a positive multiple of {N_MULTIPLE[epilogue]} for {epilogue}: TMA "
            "stores rows of 16 bytes; pad N"
        )
    _check("mSFA", mSFA, NVFP4.scale_dtype, padded_shape(num_rows, k // NVFP4.block_size), mA)
    _check("mSFB", mSFB, NVFP4.scale_dtype, (num_experts, *padded_shape(n, k // NVFP4.block_size)), mA)
    _check_alpha(alpha, num_experts, n, epilogue, mA)
    _check("tile_expert", tile_expert, torch.int32, (num_rows // TILE_M,), mA)
    _check("padded_offset", padded_offset, torch.int32, (num_experts + 1,), mA)
    d_columns = {BF16: n, SWIGLU: n // 2, SWIGLU_NVFP4: n // 4}[epilogue]
    _check("mD", mD, torch.uint8 if epilogue == SWIGLU_NVFP4 else torch.bfloat16, (num_rows, d_columns), mA)
    if (mSFD is None or h_scale is None) if epilogue == SWIGLU_NVFP4 else (mSFD is not None or h_scale is not None):
        raise ValueError(
            f"grouped_gemm_sm100: mSFD is {'not ' if mSFD is None else ''}given and h_scale is "
            f"{'not ' if h_scale is None else ''}given, but {SWIGLU_NVFP4} alone needs both; epilogue is {epilogue!r}"
        )
    if mSFD is not None and h_scale is not None:
        _check("mSFD", mSFD, NVFP4.scale_dtype, padded_shape(num_rows, n // (2 * NVFP4.block_size)), mA)
        _check("h_scale", h_scale, torch.float32, (num_experts,), mA)
    if limit is not None and (epilogue == BF16 or not limit > 0):
        raise ValueError(
            f"grouped_gemm_sm100: limit is {limit} for {epilogue}, expected a positive number for SwiGLU, or None"
        )
    if max_active_clusters is not None and max_active_clusters < 1:
        raise ValueError(
            f"grouped_gemm_sm100: max_active_clusters is {max_active_clusters}, expected at least 1, or None"
        )


def _check_alpha(alpha: torch.Tensor, num_experts: int, n: int, epilogue: str, mA: torch.Tensor) -> None:
    if epilogue != BF16:
        _check("alpha", alpha, torch.float32, (num_experts, 2), mA)
        return
    _check("alpha", alpha, torch.float32, (num_experts, None)[: max(1, min(alpha.ndim, 2))], mA)
    if alpha.ndim == 2 and (alpha.shape[1] < 1 or n % alpha.shape[1]):
        raise ValueError(
            f"grouped_gemm_sm100: alpha has {alpha.shape[1]} row blocks, expected a divisor of n, {n}; repeat its values"
        )


def _check(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], mA: torch.Tensor
) -> None:
    registry.check_tensor("grouped_gemm_sm100", name, tensor, (dtype,), shape, mA.device)
    if not tensor.is_contiguous():
        raise ValueError(f"grouped_gemm_sm100: {name} has strides {tensor.stride()}, expected contiguous rows; copy it")
    if tensor.data_ptr() % TMA_BYTES:
        raise ValueError(
            f"grouped_gemm_sm100: {name} starts at {tensor.data_ptr():#x}, expected a multiple of {TMA_BYTES} bytes; "
            "a slice of a larger tensor may need a copy"
        )


def _stand_ins(config: Config) -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: its arguments with symbolic sizes."""
    experts, n = cute.sym_int(), cute.sym_int(divisibility=N_MULTIPLE[config.epilogue])
    rows, padded_n = cute.sym_int(divisibility=TILE_ROWS), cute.sym_int(divisibility=TILE_ROWS)
    k_bytes, padded_k = cute.sym_int(divisibility=TMA_BYTES), cute.sym_int(divisibility=TILE_COLUMNS)
    d_columns = cute.sym_int(divisibility=TMA_BYTES * 8 // config.d_type.width)
    quantized = config.epilogue == SWIGLU_NVFP4

    def matrix(dtype: Any, *shape: Any, align: int = TMA_BYTES) -> Any:
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

    return (
        matrix(cutlass.Uint8, rows, k_bytes),
        matrix(cutlass.Uint8, experts, n, k_bytes),
        matrix(cutlass.Float8E4M3FN, rows, padded_k),
        matrix(cutlass.Float8E4M3FN, experts, padded_n, padded_k),
        matrix(cutlass.Float32, experts, cute.sym_int(), align=4),
        matrix(cutlass.Int32, cute.sym_int(), align=4),
        matrix(cutlass.Int32, cute.sym_int(), align=4),
        matrix(config.d_type, rows, d_columns),
        matrix(cutlass.Float8E4M3FN, rows, cute.sym_int(divisibility=TILE_COLUMNS)) if quantized else None,
        matrix(cutlass.Float32, experts, align=4) if quantized else None,
        cutlass.Float32(1.0),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
