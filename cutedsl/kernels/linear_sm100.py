"""NVFP4 linear on Blackwell: D = bf16(alpha * (A B^T)), both operands packed FP4 with a scale per 16 elements of K.

The hard part is that a tensor core takes its operands from two memories at once. Codes come from shared memory, where
TMA put them in the 128-byte swizzle; block scales come from tensor memory (TMEM), into which tcgen05.cp copies them from
shared memory; sums stay in TMEM. So a tile passes through many hands, and each hand-over has a barrier of its own:

    load warp --ab full--> MMA warp: tcgen05.cp, tcgen05.mma --acc full--> epilogue warps --shared memory--> TMA store
        ^------ab empty-------'            ^-----------acc empty----------------'

A CTA is 6 warps: 4 for the epilogue (a warp can read only the 32 TMEM lanes of its rank modulo 4), 1 for the MMA, 1 for
loads. It is persistent: it takes output tiles blockIdx.x, blockIdx.x + gridDim.x, ..., and all warps walk the same list.

Ragged sizes need no code of their own, because TMA fills what lies outside a tensor with zeros and drops such stores:
  - rows beyond m or n multiply to rows and columns of D that are never stored, whatever their scales are;
  - columns beyond k are codes 0, and the MMA skips blocks of 64 that have no others. In the last block with columns of k
    the scales of the others must be finite, as 0 * NaN is NaN (only if k is no multiple of 64): `cutedsl.layout` writes
    zeros there.
k is a multiple of 32 and n of 8, because TMA wants rows of 16 bytes: 32 codes of A and B, 8 BF16 of D.

Names: mA, gA, sA the whole matrix, its tiles, their copies in shared memory; tCrA, tCtAcc what the MMA sees (shared
memory descriptors, TMEM); tTR what an epilogue thread sees (TMEM to registers); _sf block scales.
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
from cutedsl.kernels import blackwell
from cutedsl.kernels.blackwell import ARCHS, MMA_K, SWIZZLE_BYTES, TMA_BYTES, WARP, Arch
from cutedsl.layout import TILE_COLUMNS, TILE_ROWS, padded_shape
from cutedsl.ops import registry

TILE_M = 128
TILE_K = 256
TILES_N = (64, 128, 256)
# Columns of D that the epilogue moves at a time: 128 bytes of BF16, one span of the swizzle.
EPILOGUE_N = 64

EPILOGUE_WARPS = 4
MMA_WARP = 4
LOAD_WARP = 5
THREADS = 6 * WARP
EPILOGUE_THREADS = EPILOGUE_WARPS * WARP

K_MULTIPLE = TMA_BYTES * NVFP4.codes_per_byte
N_MULTIPLE = TMA_BYTES // 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a linear: (m, k) times (n, k) transposed."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every m, n and k.

    Attributes:
        tile_n: columns of an output tile; its rows and steps of K are TILE_M and TILE_K.
        num_ab_stages: tiles of A and B, with their scales, between load and MMA.
        num_acc_stages: accumulators; with 2 the next tile is computed while one is stored.
        num_d_stages: buffers of 128 x 64 outputs on their way to global memory.
        arch: a key of ARCHS.
    """

    tile_n: int
    num_ab_stages: int
    num_acc_stages: int
    num_d_stages: int = 2
    arch: str = "sm_100a"

    @property
    def tile_n_sf(self) -> int:
        """Rows of B whose scales a tile loads: scales come in tiles of 128 rows."""
        return max(self.tile_n, TILE_ROWS)

    @property
    def acc_columns(self) -> int:
        """TMEM columns of all accumulators: one FP32 column for each column of D."""
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
        """What the loads of one stage write, and its barrier expects."""
        codes = (TILE_M + self.tile_n) * TILE_K // NVFP4.codes_per_byte
        return codes + (TILE_M + self.tile_n_sf) * TILE_K // NVFP4.block_size

    @property
    def smem_bytes(self) -> int:
        """Upper bound of a CTA's shared memory: stages, D, alpha, and 1 KiB for barriers and alignment."""
        d_bytes = self.num_d_stages * TILE_M * EPILOGUE_N * 2
        return self.num_ab_stages * self.ab_stage_bytes + d_bytes + 4 * self.tile_n + 1024

    def validate(self) -> "Config":
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled, or could not run on the architecture.
        """
        if self.arch not in ARCHS:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(ARCHS)}")
        if self.tile_n not in TILES_N:
            raise ValueError(f"Config: tile_n is {self.tile_n}, expected one of {TILES_N}")
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


def choose_config(shape: Shape, arch: str = "sm_100a") -> Config:
    """The widest tile that still gives every SM work, with as many stages as fit.

    Args:
        shape: sizes of the linear.
        arch: a key of ARCHS.

    Returns:
        One of three configurations: no m ever needs a fourth kernel.

    Raises:
        ValueError: arch is unknown.

    The choice follows from counting tiles; it has not been measured on a B200.
    """
    if arch not in ARCHS:
        raise ValueError(f"choose_config: arch is {arch!r}, expected one of {sorted(ARCHS)}")
    tiles_m = -(-shape.m // TILE_M)
    for tile_n in sorted(TILES_N, reverse=True):
        if tiles_m * -(-shape.n // tile_n) >= ARCHS[arch].num_sms:
            return largest_config(tile_n, ARCHS[arch])
    return largest_config(min(TILES_N), ARCHS[arch])


def largest_config(tile_n: int, arch: Arch) -> Config:
    """The configuration of that tile with as many stages as fit the architecture."""
    # Two accumulators of 256 columns would leave no TMEM for scales.
    num_acc_stages = 1 if tile_n == 256 else 2
    without_stages = Config(tile_n, 0, num_acc_stages, arch=arch.name)
    num_ab_stages = (arch.smem_bytes - without_stages.smem_bytes) // without_stages.ab_stage_bytes
    return Config(tile_n, num_ab_stages, num_acc_stages, arch=arch.name).validate()


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
    """A CTA's output tiles first, first + step, ... below end; m runs fastest, so that CTAs of one moment share weights."""

    first: Any
    end: Any
    step: Any
    num_m: Any
    num_k: Any
    num_k_blocks: Any


class LinearSm100:
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.validate()
        self.mma_tiler = (TILE_M, config.tile_n, TILE_K)
        self.epilogue_barrier = pipeline.NamedBarrier(barrier_id=1, num_threads=EPILOGUE_THREADS)

    @cute.jit
    def __call__(
        self,
        mA_packed: cute.Tensor,
        mB_packed: cute.Tensor,
        mSFA_bytes: cute.Tensor,
        mSFB_bytes: cute.Tensor,
        mAlpha: cute.Tensor,
        mD: cute.Tensor,
        max_active_clusters: cutlass.Int32,
        stream: Any,
    ) -> None:
        """Makes the tensor maps, on the host, and launches min(tiles, max_active_clusters) CTAs.

        Args:
            mA_packed: (m, k/2) uint8.
            mB_packed: (n, k/2) uint8.
            mSFA_bytes, mSFB_bytes: e4m3, whole scale tiles for rows of A and B.
            mAlpha: (n,) fp32.
            mD: (m, n) bf16.
            max_active_clusters: the most CTAs to launch, at least 1.
            stream: to launch on.
        """
        m, n, k = mD.shape[0], mD.shape[1], mA_packed.shape[1] * NVFP4.codes_per_byte
        mA, mB = blackwell.packed_codes(mA_packed, m, k), blackwell.packed_codes(mB_packed, n, k)
        mSFA, mSFB = blackwell.global_sf_tiles(mSFA_bytes, m, k), blackwell.global_sf_tiles(mSFB_bytes, n, k)
        tiled_mma = self._tiled_mma()
        a_stage, b_stage = (cute.select(layout, mode=[0, 1, 2]) for layout in self._ab_smem_layouts(tiled_mma))
        d_stage = cute.select(self._d_smem_layout(), mode=[0, 1])
        sfa_box, sfb_box = blackwell.sf_box(TILE_M, TILE_K), blackwell.sf_box(self.config.tile_n_sf, TILE_K)
        one_cta = (1, 1, 1, 1)
        load, store = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE), cpasync.CopyBulkTensorTileS2GOp()
        tma_a, mA = cute.nvgpu.make_tiled_tma_atom_A(load, mA, a_stage, self.mma_tiler, tiled_mma, one_cta)
        tma_b, mB = cute.nvgpu.make_tiled_tma_atom_B(load, mB, b_stage, self.mma_tiler, tiled_mma, one_cta)
        tma_sfa, mSFA = cpasync.make_tiled_tma_atom(load, mSFA, cute.make_layout(sfa_box), sfa_box)
        tma_sfb, mSFB = cpasync.make_tiled_tma_atom(load, mSFB, cute.make_layout(sfb_box), sfb_box)
        tma_d, mD = cpasync.make_tiled_tma_atom(store, mD, d_stage, (TILE_M, EPILOGUE_N))

        num_tiles = cute.ceil_div(m, TILE_M) * cute.ceil_div(n, self.config.tile_n)
        grid = (cutlass.min(num_tiles, max_active_clusters), 1, 1)
        self.kernel(tiled_mma, tma_a, mA, tma_b, mB, tma_sfa, mSFA, tma_sfb, mSFB, tma_d, mD, mAlpha).launch(
            grid=grid, block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        tiled_mma: cute.TiledMma,
        tma_a: cute.CopyAtom,
        mA: cute.Tensor,
        tma_b: cute.CopyAtom,
        mB: cute.Tensor,
        tma_sfa: cute.CopyAtom,
        mSFA: cute.Tensor,
        tma_sfb: cute.CopyAtom,
        mSFB: cute.Tensor,
        tma_d: cute.CopyAtom,
        mD: cute.Tensor,
        mAlpha: cute.Tensor,
    ) -> None:
        """Sets up barriers and TMEM, then every warp takes its role."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == LOAD_WARP:
            for tma in (tma_a, tma_b, tma_sfa, tma_sfb, tma_d):
                cpasync.prefetch_descriptor(tma)
        smem = self._allocate_smem(tiled_mma)
        ab_producer, ab_consumer = self._ab_pipeline(smem)
        acc_producer, acc_consumer = self._acc_pipeline(smem)
        if warp == 0:
            cute.arch.alloc_tmem(self.config.tmem_columns, smem.tmem_address)
            cute.arch.relinquish_tmem_alloc_permit()
        # Behind this barrier all mbarriers are initialised and the TMEM address is in shared memory.
        cute.arch.mbarrier_init_fence()
        blackwell.before_thread_sync()
        cute.arch.sync_threads()
        blackwell.after_thread_sync()
        tmem = cute.arch.retrieve_tmem_ptr(cutlass.Float32, 16, smem.tmem_address)
        tiles = self._tiles(mA, mD)

        if warp == LOAD_WARP:
            self._load(tiled_mma, (tma_a, tma_b, tma_sfa, tma_sfb), (mA, mB, mSFA, mSFB), smem, tiles, ab_producer)
        elif warp == MMA_WARP:
            self._mma(tiled_mma, smem, tmem, tiles, ab_consumer, acc_producer)
        else:
            self._epilogue(tiled_mma, tma_d, mD, mAlpha, smem, tmem, tiles, acc_consumer)
            # All four warps met after reading the last accumulator, so nobody uses TMEM any more.
            if warp == 0:
                blackwell.after_thread_sync()
                cute.arch.dealloc_tmem(tmem, self.config.tmem_columns)

    @cute.jit
    def _load(self, tiled_mma: Any, atoms: Any, tensors: Any, smem: _Smem, tiles: _Tiles, ab_producer: Any) -> None:
        """Load warp: for each step of K one stage of A, B and their scales."""
        config = self.config
        tma_a, tma_b, tma_sfa, tma_sfb = atoms
        mA, mB, mSFA, mSFB = tensors
        thr_mma = tiled_mma.get_slice(0)
        # (TILE_M, TILE_K, m tiles, k tiles); B likewise
        gA = cute.local_tile(mA, (TILE_M, TILE_K), (None, None))
        gB = cute.local_tile(mB, (config.tile_n, TILE_K), (None, None))
        # (scale tile, along k, along rows, k tiles, row tiles)
        gSFA = cute.local_tile(mSFA, blackwell.sf_box(TILE_M, TILE_K), (0, None, None))
        gSFB = cute.local_tile(mSFB, blackwell.sf_box(config.tile_n_sf, TILE_K), (0, None, None))
        sSFA = blackwell.shared_sf_tiles(smem.sSFA, TILE_M, TILE_K, config.num_ab_stages)
        sSFB = blackwell.shared_sf_tiles(smem.sSFB, config.tile_n_sf, TILE_K, config.num_ab_stages)
        tAsA, tAgA = blackwell.tma_partition(tma_a, smem.sA, thr_mma.partition_A(gA))
        tBsB, tBgB = blackwell.tma_partition(tma_b, smem.sB, thr_mma.partition_B(gB))
        tAsSFA, tAgSFA = blackwell.tma_partition(tma_sfa, sSFA, gSFA)
        tBsSFB, tBgSFB = blackwell.tma_partition(tma_sfb, sSFB, gSFB)

        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            m_tile, n_tile = tile % tiles.num_m, tile // tiles.num_m
            # Two 64-wide tiles share a scale tile; each loads all of it.
            sf_tile = n_tile // (config.tile_n_sf // config.tile_n)
            for k_tile in cutlass.range(tiles.num_k, unroll=1):
                stage = ab_producer.acquire_and_advance()
                cute.copy(tma_a, tAgA[None, m_tile, k_tile], tAsA[None, stage.index], tma_bar_ptr=stage.barrier)
                cute.copy(tma_b, tBgB[None, n_tile, k_tile], tBsB[None, stage.index], tma_bar_ptr=stage.barrier)
                cute.copy(tma_sfa, tAgSFA[None, k_tile, m_tile], tAsSFA[None, stage.index], tma_bar_ptr=stage.barrier)
                cute.copy(tma_sfb, tBgSFB[None, k_tile, sf_tile], tBsSFB[None, stage.index], tma_bar_ptr=stage.barrier)
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
        copy_sfa, tCsSFA, tCtSFA_copy = blackwell.sf_to_tmem(smem.sSFA, tCtSFA)
        copy_sfb, tCsSFB, tCtSFB_copy = blackwell.sf_to_tmem(smem.sSFB, tCtSFB)

        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            # A 64-wide tile may be the second half of its scale tile, which begins two columns of 4 scales further on.
            half = tile // tiles.num_m % (config.tile_n_sf // config.tile_n)
            shift = half * (config.tile_n // WARP * TILE_COLUMNS)
            tCtSFB_tile = cute.make_tensor(tCtSFB.iterator + shift, tCtSFB.layout)
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
        mAlpha: cute.Tensor,
        smem: _Smem,
        tmem: Any,
        tiles: _Tiles,
        acc_consumer: Any,
    ) -> None:
        """Epilogue warps: 64 columns at a time from TMEM, times alpha, to BF16, to shared memory, to D."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        num_columns = config.tile_n // EPILOGUE_N
        # (TILE_M, EPILOGUE_N, 1, columns, stage)
        tAcc = cute.flat_divide(self._accumulators(tiled_mma, tmem)[(None, None), 0, 0, None], (TILE_M, EPILOGUE_N))
        load_atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(EPILOGUE_N)), cutlass.Float32)
        tmem_load = tcgen05.make_tmem_copy(load_atom, tAcc[None, None, 0, 0, 0])
        thr_load = tmem_load.get_slice(thread)
        # All rows see the same alpha: (TILE_M, EPILOGUE_N, columns)
        rows = cute.make_layout((TILE_M, EPILOGUE_N, num_columns), stride=(0, 1, EPILOGUE_N))
        # A thread has one row: (EPILOGUE_N, 1, 1, ...)
        tTR_tAcc = thr_load.partition_S(tAcc)
        tTR_sD = thr_load.partition_D(smem.sD)
        tTR_sAlpha = thr_load.partition_D(cute.make_tensor(smem.sAlpha.iterator, rows))
        tTR_rAcc = cute.make_rmem_tensor(tTR_sD[None, None, None, 0].shape, cutlass.Float32)
        tTR_rAlpha = cute.make_rmem_tensor_like(tTR_rAcc)
        tTR_rD = cute.make_rmem_tensor_like(tTR_rAcc, cutlass.BFloat16)
        # (TILE_M, EPILOGUE_N, m tiles, columns of all tiles)
        gD = cute.local_tile(mD, (TILE_M, EPILOGUE_N), (None, None))
        tDsD, tDgD = cpasync.tma_partition(
            tma_d, 0, cute.make_layout(1), cute.group_modes(smem.sD, 0, 2), cute.group_modes(gD, 0, 2)
        )

        buffer = cutlass.Int32(0)
        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            m_tile, n_tile = tile % tiles.num_m, tile // tiles.num_m
            self._stage_alpha(mAlpha, smem.sAlpha, n_tile, thread)
            acc = acc_consumer.wait_and_advance()
            blackwell.after_thread_sync()
            for column in cutlass.range_constexpr(num_columns):
                cute.copy(tmem_load, tTR_tAcc[None, None, None, 0, column, acc.index], tTR_rAcc)
                cute.arch.fence_view_async_tmem_load()
                if cutlass.const_expr(column == num_columns - 1):
                    # The accumulator is in registers; the MMA may have its columns back.
                    blackwell.before_thread_sync()
                    acc.release()
                # Behind this barrier alpha is complete, and the buffer's last store has read it.
                if warp == 0:
                    cute.arch.cp_async_bulk_wait_group(config.num_d_stages - 1, read=True)
                self.epilogue_barrier.arrive_and_wait()
                cute.autovec_copy(tTR_sAlpha[None, None, None, column], tTR_rAlpha)
                tTR_rD.store((tTR_rAcc.load() * tTR_rAlpha.load()).to(cutlass.BFloat16))
                cute.autovec_copy(tTR_rD, tTR_sD[None, None, None, buffer])
                cute.arch.fence_view_async_shared()
                self.epilogue_barrier.arrive_and_wait()
                if warp == 0:
                    cute.copy(tma_d, tDsD[None, buffer], tDgD[None, m_tile, n_tile * num_columns + column])
                    cute.arch.cp_async_bulk_commit_group()
                buffer = (buffer + 1) % config.num_d_stages
        # Shared memory must outlive the stores that read it.
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _stage_alpha(self, mAlpha: cute.Tensor, sAlpha: cute.Tensor, n_tile: Any, thread: Any) -> None:
        """Copies a tile's alpha to shared memory, zeros beyond n. The next epilogue barrier makes it visible."""
        for start in cutlass.range_constexpr(0, self.config.tile_n, EPILOGUE_THREADS):
            column = start + thread
            if column < self.config.tile_n:
                n = n_tile * self.config.tile_n + column
                value = cutlass.Float32(0.0)
                if n < cute.size(mAlpha):
                    value = mAlpha[n]
                sAlpha[column] = value

    def _tiles(self, mA: cute.Tensor, mD: cute.Tensor) -> _Tiles:
        num_m = cute.ceil_div(cute.size(mD, mode=[0]), TILE_M)
        num_n = cute.ceil_div(cute.size(mD, mode=[1]), self.config.tile_n)
        k = cute.size(mA, mode=[1])
        return _Tiles(
            first=cute.arch.block_idx()[0],
            end=num_m * num_n,
            step=cute.arch.grid_dim()[0],
            num_m=num_m,
            num_k=cute.ceil_div(k, TILE_K),
            num_k_blocks=cute.ceil_div(k, MMA_K),
        )

    def _tiled_mma(self) -> cute.TiledMma:
        op = tcgen05.MmaMXF4NVF4Op(
            cutlass.Float8E4M3FN, (TILE_M, self.config.tile_n, MMA_K), tcgen05.CtaGroup.ONE, tcgen05.OperandSource.SMEM
        )
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
        """Returns (TILE_M, EPILOGUE_N, stage), rows of 128 bytes in the 128-byte swizzle."""
        return blackwell_helpers.make_smem_layout_epi(
            cutlass.BFloat16, LayoutEnum.ROW_MAJOR, (TILE_M, EPILOGUE_N), self.config.num_d_stages
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
            sD=smem.allocate_tensor(cutlass.BFloat16, d_layout.outer, SWIZZLE_BYTES, d_layout.inner),
            sSFA=smem.allocate_tensor(cutlass.Float8E4M3FN, sfa_layout, 128),
            sSFB=smem.allocate_tensor(cutlass.Float8E4M3FN, sfb_layout, 128),
            sAlpha=smem.allocate_tensor(cutlass.Float32, cute.make_layout(self.config.tile_n), 128),
            ab_barriers=smem.allocate_array(cutlass.Int64, 2 * self.config.num_ab_stages),
            acc_barriers=smem.allocate_array(cutlass.Int64, 2 * self.config.num_acc_stages),
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


def linear(
    mA: torch.Tensor,
    mB: torch.Tensor,
    mSFA: torch.Tensor,
    mSFB: torch.Tensor,
    alpha: torch.Tensor,
    mD: torch.Tensor,
    max_active_clusters: int | None = None,
) -> None:
    """mD = bf16(alpha * (e2m1(mA) * mSFA) (e2m1(mB) * mSFB)^T).

    Args:
        mA: (m, k/2) uint8 - codes of the activation; m may be 0.
        mB: (n, k/2) uint8 - codes of the weight.
        mSFA: (m up to 128, k/16 up to 4) e4m3 - swizzled block scales; padded columns finite, padded rows anything.
        mSFB: (n up to 128, k/16 up to 4) e4m3 - likewise.
        alpha: (n,) fp32 - input_scale * weight_scale_2 of each column.
        mD: (m, n) bf16 - written completely.
        max_active_clusters: the most CTAs to launch; None: one for each SM.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape, stride, device or address is not as above, k no multiple of 32, n no multiple of 8, or
            max_active_clusters less than 1.

    Layout: all contiguous, first bytes 16-byte aligned; scales in 128x4 tiles, see `cutedsl.layout`.
    Numerics: products and sums FP32 in the tensor core, then alpha in FP32, then one rounding to nearest even.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream.
    """
    check(mA, mB, mSFA, mSFB, alpha, mD, max_active_clusters)
    shape = Shape(mA.shape[0], mB.shape[0], mB.shape[1] * NVFP4.codes_per_byte)
    if shape.m == 0:
        return
    config = choose_config(shape)
    if max_active_clusters is None:
        max_active_clusters = blackwell.num_sms(mA.device)
    compiled(config)(mA, mB, mSFA, mSFB, alpha, mD, max_active_clusters)


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes linear's tensors, unchecked and m > 0, and max_active_clusters as an int.

    Args:
        config: which kernel.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(LinearSm100, config, _stand_ins, config.arch, line_info)


def check(
    mA: torch.Tensor,
    mB: torch.Tensor,
    mSFA: torch.Tensor,
    mSFB: torch.Tensor,
    alpha: torch.Tensor,
    mD: torch.Tensor,
    max_active_clusters: int | None = None,
) -> None:
    """Raises what linear raises; reads no device memory."""
    _check("mA", mA, torch.uint8, (None, None), mA)
    _check("mB", mB, torch.uint8, (None, mA.shape[1]), mA)
    m, n, k = mA.shape[0], mB.shape[0], mB.shape[1] * NVFP4.codes_per_byte
    if k < K_MULTIPLE or k % K_MULTIPLE:
        raise ValueError(
            f"linear_sm100: k is {k}, expected a positive multiple of {K_MULTIPLE}: TMA loads rows of 16 bytes; pad K"
        )
    if n < N_MULTIPLE or n % N_MULTIPLE:
        raise ValueError(
            f"linear_sm100: n is {n}, expected a positive multiple of {N_MULTIPLE}: TMA stores rows of 16 bytes; pad N"
        )
    columns = k // NVFP4.block_size
    _check("mSFA", mSFA, NVFP4.scale_dtype, padded_shape(m, columns), mA)
    _check("mSFB", mSFB, NVFP4.scale_dtype, padded_shape(n, columns), mA)
    _check("alpha", alpha, torch.float32, (n,), mA)
    _check("mD", mD, torch.bfloat16, (m, n), mA)
    if max_active_clusters is not None and max_active_clusters < 1:
        raise ValueError(f"linear_sm100: max_active_clusters is {max_active_clusters}, expected at least 1, or None")


def _check(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], mA: torch.Tensor
) -> None:
    registry.check_tensor("linear_sm100", name, tensor, (dtype,), shape, mA.device)
    if not tensor.is_contiguous():
        raise ValueError(f"linear_sm100: {name} has strides {tensor.stride()}, expected contiguous rows; copy it")
    if tensor.data_ptr() % TMA_BYTES:
        raise ValueError(
            f"linear_sm100: {name} starts at {tensor.data_ptr():#x}, expected a multiple of {TMA_BYTES} bytes; "
            "a slice of a larger tensor may need a copy"
        )


def _stand_ins() -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: linear's arguments with symbolic sizes."""
    m, n, k_bytes = cute.sym_int(), cute.sym_int(divisibility=N_MULTIPLE), cute.sym_int(divisibility=TMA_BYTES)
    padded_m, padded_n = cute.sym_int(divisibility=TILE_ROWS), cute.sym_int(divisibility=TILE_ROWS)
    padded_k = cute.sym_int(divisibility=TILE_COLUMNS)

    def matrix(dtype: Any, *shape: Any) -> Any:
        order = tuple(reversed(range(len(shape))))
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=TMA_BYTES)

    return (
        matrix(cutlass.Uint8, m, k_bytes),
        matrix(cutlass.Uint8, n, k_bytes),
        matrix(cutlass.Float8E4M3FN, padded_m, padded_k),
        matrix(cutlass.Float8E4M3FN, padded_n, padded_k),
        matrix(cutlass.Float32, n),
        matrix(cutlass.BFloat16, m, n),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
