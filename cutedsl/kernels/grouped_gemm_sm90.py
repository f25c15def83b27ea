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
bring sign and magnitude to bits 15 and 8:6 of each half; the places in the word are such that as few as can be are needed.
That is a BF16 number: the code times 2^-126, subnormal where the code is. When decoding, the slots in which a warp may issue
an instruction are what there is least of.

Scales. A block scale s is stored as its 8 upper bits of BF16 without the exponent's three leading ones, that is as
s * 2^118: a mask, or a rotation and a mask, make the BF16 numbers of two, and the multiplication takes either for both of
its halves. The product, code * s * 2^-8, is normal or 0, and exact. The factor 2^8 that is left goes into alpha.

Tiles are numbered, found and walked as in `grouped_gemm_swap_sm100`, by persistent CTAs: one warp loads, 2 or 4 warpgroups
decode, multiply and store. While a warpgroup decodes a lot of weights, the tensor cores work on the lot before, so that they
idle only where decoding takes longer. Two lots take registers: where sums are many, lots are small. ptxas lets MMAs overlap
with what follows only if a basic block has one lot of them at most, and if it finds the registers; otherwise it waits for
each MMA by itself and tells nobody (tests/sim/test_machine_code_sm90.py looks).

Widths. MMAs of a group's tile with few tokens have fewer columns (`widths`), and maybe half of the tokens are loaded. All
warps of a tile, and both CTAs of a cluster, have the same tokens, so that a branch around the MMAs of a lot chooses. Their
sums are the first registers of each block's, their tokens the first of a stage's. So a tile may be wider than most experts
need, and an expert with more tokens than a tile is cut into equal ones, up to the step of widths. With even shares there is
one width, as sums of whole tiles are exchanged.

Even shares. With few tokens there are few tiles, and a last round of them would leave most SMs idle. Then (`even`) tiles are
laid end to end, and every CTA gets as many steps of K of that row as any other, wherever that cuts a tile. Who has the
first steps of a tile finishes it: it waits for the sums of those that have the others, which come through global memory,
and adds them in their order: no atomics, the same result each time. It waits only for CTAs of lower index, which have been
started before it, so that even a GPU with room for one CTA at a time gets through. Few sums say themselves that they are
there, by not being +0, for which -0 is left: a flag needs a fence, and a fence waits for all loads under way. Many sums
have a flag all the same, as they would have to be looked at one by one and set back to +0. Sums and flags are touched behind
the wait for earlier launches alone: the one before used the same, and no later one takes an SM from CTAs not yet started.

Overlap. This kernel begins before the ones before it have ended: see `hopper`. Where its groups' sizes are constant
(`constant_rows`), as many stages of weights as there are begin to load before it waits for those.

Clusters. With many tokens the loads of X are what is too much for L2. Then (`cluster_w`) two CTAs take neighbouring weight
tiles of the same tokens, and each loads half of the tokens for both.

Shared tiles. Where the tiles of few rows and few tokens are a half of the SMs, or a quarter, sums need not go through global
memory: the CTAs of a cluster (`cluster_k`) take a part of a tile's steps of K each, and leave their sums in each other's
shared memory, in stages that nobody reads any more. Each finishes its part of the tokens, so that the exchange and what
follows are divided too: it adds what it has got in the order of the CTAs. Each waits for all others; that is safe, as the
hardware starts the CTAs of a cluster together or not at all, and clusters do not wait for each other. There is one for every
tile, and none has a second, whose loads would be where sums are left. The stores carry their bytes to the mbarrier that the
receiver waits at: no fence, which would wait for all loads under way.

One group. A linear's tokens are all rows of X, which the host knows (`one_group`): no CTA counts tiles of experts or looks up
where their rows begin, which are two loads, one after the other, before the first of X. Its tokens may be many: tiles are
walked in bands of BAND_TOKENS, all weights for one band and then for the next, so that the tiles under way at a time are
about square and what they read stays in L2.

Results. While results are stored, tensor cores idle. So in BF16, `stmatrix` turns the sums of two tokens into neighbouring
columns in shared memory, and with two buffers there a unit of tokens has one barrier, which says that the unit is written
and that the next one's buffer is free. Where a CTA goes on to further tiles (`copies`), units leave by copies (TMA): the warp
that begins them waits, before it comes to the barrier, for the copy that has read the next buffer; there are as many buffers
as fit beside the stages. A copy writes all of its box. Of a single group the tensor map ends where the group does; otherwise
D may have others' results behind a tile's last token, or behind an expert's last column, and a unit with these is stored by
threads.

Padding: rows of X behind a group's last are computed as columns of their own and not stored; of D exactly the groups'
rows are written. Columns of X behind k are zeros from TMA, as are weights there from `prepare_sm90`.

Names: W the weights (the MMA's A), X the tokens (its B).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cutlass
import torch
from cutlass import cute, memory, tensor_utils
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor
from cutlass.utils import hopper_helpers

from cutedsl import compile as compiler
from cutedsl.formats import NVFP4
from cutedsl.kernels import blackwell, hopper, round_block
from cutedsl.kernels.hopper import ARCHS, SWIZZLE_BYTES, TMA_BYTES, WARP, WARPGROUP
from cutedsl.kernels.token_tiles import MAX_EXPERTS, count_tiles
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
STEPS_OF_LOAD = LOAD_K // MMA_K
MAX_TILE_N = 256
# Columns of sums of a warpgroup: 160 registers a thread.
MAX_SUMS = 320
# Columns of MMAs: the fewest and the step. Fewer would save nothing, as decoding takes about as long as MMAs of 32.
MIN_WIDTH, WIDTH_STEP = 32, 16
# Tokens of a tile: of a linear with few tokens and with many, and of several groups at most.
MAX_SMALL_TILE_N, LARGE_TILE_N, MAX_GROUPED_TILE_N = 64, 128, 160
# More tokens than these keep the GPU busy until its clock falls: steps take longer then.
MANY_TOKENS = 2048
# Tokens of a band, or as many whole tiles as fit: 132 tiles of 256 x 128 then read about as many bytes of X as of weights.
BAND_TOKENS = 1024
# CTAs of a cluster: what every Hopper GPU has room for. Source: CUDA C++ Programming Guide, "Thread Block Clusters".
MAX_CLUSTER_K = 8
# Tokens of a tile for which four warpgroups are at least as fast as two. Source: docs/bench/sm90.md.
MAX_MANY_CONSUMERS_TILE_N = 64
# Of those of groups with two, the fewest: as MMAs have fewer columns where tokens are fewer, 80 are no faster.
MIN_WIDE_TILE_N = 96
# With even shares, steps of K that a CTA has at least: fewer are not worth the exchange of sums.
MIN_STEPS = 4
# A tile then has at most as many shares as a warpgroup has threads to wait for them.
MAX_K = WARPGROUP * MIN_STEPS * TILE_K
# Where nobody has left a sum: the bits of +0. What is left for a sum that is +0: the bits of -0.
NOTHING, LEFT_ZERO = 0, -(1 << 31)
# Sums that a thread loads at a time, and how many it has of a tile before it waits for a flag instead.
MAX_LOADS, MIN_FLAGGED_SUMS = 64, 32

TILES_W = (128, 256)
# Warpgroups that decode and multiply, and their registers and those of who loads: with few tokens sums are few, and more
# warps hide latency. Together they are those that a CTA starts with: 64 K by its threads, down to a multiple of 8.
# Source: 384 x 168 = 2 x 128 x 232 + 128 x 40; 640 x 96 = 4 x 128 x 112 + 128 x 32.
CONSUMER_REGISTERS = {2: 232, 4: 112}
LOAD_REGISTERS = {2: 40, 4: 32}

# Tokens whose results pass through shared memory at a time. In BF16 there are more buffers than one, at most so many.
UNIT_TOKENS = {BF16: 32, SWIGLU: 32, SWIGLU_NVFP4: 32}
MAX_BUFFERS = 8
# What a token takes there: the 64 columns of a block in BF16, one period of the swizzle; or its 32 h in FP32, and 4 words so
# that tokens start in different banks.
TOKEN_BYTES, TOKEN_WORDS = 128, 32 + 4
# Columns of D that a thread stores: 16 bytes of BF16, or one block of h.
BF16_UNIT = 8
H_UNIT = NVFP4.block_size
H_OF_BLOCK = BLOCK_ROWS // 2

K_MULTIPLE = TMA_BYTES // 2
N_MULTIPLE = {BF16: BF16_UNIT, SWIGLU: 2 * H_UNIT, SWIGLU_NVFP4: 2 * H_UNIT}

# What is left of a decoded weight's scale: see the module's text.
DECODED_SCALE = 256.0
# Sign and magnitude of two codes where BF16 numbers have them; all but their lowest bits, and these.
_CODE_MASK = 0x81C081C0 - (1 << 32)
_UPPER_MASK = 0x81808180 - (1 << 32)
_LOWEST_MASK = 0x00400040


MAX_CONSUMERS = max(CONSUMER_REGISTERS)
# Of an SM, int32 that are zeros between launches: flags, and sums of a tile that has none. With two warpgroups, a thread of
# which has fewer than MIN_FLAGGED_SUMS, those are fewer than so many.
_ZEROS_OF_SM = MAX_CONSUMERS + 2 * WARPGROUP * MIN_FLAGGED_SUMS


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of rows and experts, n and k.

    Attributes:
        epilogue: one of EPILOGUES.
        tile_w: weight rows of a tile, one of TILES_W.
        tile_n: tokens of a tile, a multiple of 8.
        num_stages: steps of K between load and MMA.
        num_consumers: warpgroups that decode and multiply, each its share of tile_w.
        cluster_w: CTAs of a cluster with neighbouring weight tiles of the same tokens, which each loads a part of for all.
        even: every CTA has the same number of steps of K; not in a cluster.
        one_group: all rows of X are of one group: there is no list of tiles, and nothing to look up before the first load.
        cluster_k: CTAs of a cluster which share a tile's steps of K, and its tokens to finish; not with cluster_w.
        arch: a key of ARCHS.
    """

    epilogue: str
    tile_w: int
    tile_n: int
    num_stages: int
    num_consumers: int = 2
    cluster_w: int = 1
    even: bool = False
    cluster_k: int = 1
    one_group: bool = False
    arch: str = "sm_90a"

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.cluster_w * self.cluster_k

    @property
    def blocks(self) -> int:
        """Blocks of weight rows of a tile."""
        return self.tile_w // BLOCK_ROWS

    @property
    def blocks_of_warpgroup(self) -> int:
        """Of them, those that one warpgroup computes."""
        return self.blocks // self.num_consumers

    @property
    def lot_steps(self) -> int:
        """Steps of MMA_K whose weights are decoded at a time; with many sums there are registers for few, twice."""
        return STEPS_OF_LOAD if self.tile_n <= LARGE_TILE_N else 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of MMAs; a tile takes the first that its tokens fit. Only groups have tiles of very different sizes."""
        if self.even or self.one_group or self.tile_n <= MIN_WIDTH:
            return (self.tile_n,)
        return tuple(range(MIN_WIDTH, self.tile_n + 1, WIDTH_STEP))

    @property
    def consumer_threads(self) -> int:
        """Threads that decode, multiply and store."""
        return self.num_consumers * WARPGROUP

    @property
    def load_warp(self) -> int:
        """The warp that loads: the first behind the consumers."""
        return self.consumer_threads // WARP

    @property
    def store_n(self) -> int:
        """Tokens of a tile that a CTA finishes; the last ones of a cluster may have fewer, or none."""
        return -(-self.tile_n // (8 * self.cluster_k)) * 8

    @property
    def unit_tokens(self) -> int:
        """Tokens that pass through shared memory at a time."""
        return math.gcd(self.store_n, self.tile_n, UNIT_TOKENS[self.epilogue])

    @property
    def unit_bytes(self) -> int:
        """What they take there."""
        return self.unit_tokens * (TOKEN_BYTES if self.epilogue == BF16 else 4 * TOKEN_WORDS)

    @property
    def num_buffers(self) -> int:
        """Units that a warpgroup has in shared memory: what fits beside the stages, and no more than a tile has."""
        if self.epilogue != BF16:
            return 1
        units = self.blocks_of_warpgroup * self.store_n // self.unit_tokens
        more_bytes = ARCHS[self.arch].smem_bytes - self.num_stages * self.stage_bytes - self.fixed_bytes
        return min(units, MAX_BUFFERS, 1 + max(more_bytes, 0) // (self.num_consumers * self.unit_bytes))

    @property
    def copies(self) -> bool:
        """Results leave by copies: other than stores they are begun at once, but take longer if nothing follows."""
        return self.epilogue == BF16 and self.cluster_k == 1 and self.num_buffers > 1

    @property
    def sums_of_thread(self) -> int:
        """FP32 sums that a consumer thread has of a tile."""
        return self.tile_w * self.tile_n // self.consumer_threads

    @property
    def flagged(self) -> bool:
        """Sums that are left for others have a flag."""
        return self.even and self.sums_of_thread >= MIN_FLAGGED_SUMS

    @property
    def load_tokens(self) -> int:
        """Tokens that are loaded at a time: all, or where widths differ, half of them, if a cluster can share these."""
        half = self.tile_n // 2
        return half if len(self.widths) > 1 and half % (8 * self.cluster_w) == 0 else self.tile_n

    @property
    def weight_bytes(self) -> int:
        """What the loads of one stage write, without tokens."""
        return self.blocks * (BLOCK_BYTES + BLOCK_SF_BYTES)

    @property
    def stage_bytes(self) -> int:
        """What a stage takes."""
        return self.weight_bytes + 2 * self.tile_n * TILE_K

    @property
    def cluster_sums_bytes(self) -> int:
        """What the CTAs of a cluster leave in one's stages."""
        return 4 * self.tile_w * self.store_n * self.cluster_k

    @property
    def fixed_bytes(self) -> int:
        """Shared memory beside the stages, with one buffer: results on their way out, tiles of experts, barriers."""
        return self.num_consumers * self.unit_bytes + 4 * (MAX_EXPERTS + 4) + 2048

    @property
    def smem_bytes(self) -> int:
        """Upper bound of a CTA's shared memory."""
        more_bytes = self.num_consumers * (self.num_buffers - 1) * self.unit_bytes
        return self.num_stages * self.stage_bytes + self.fixed_bytes + more_bytes

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
        if self.num_consumers not in CONSUMER_REGISTERS or self.blocks < self.num_consumers:
            raise ValueError(
                f"Config: num_consumers is {self.num_consumers} with tile_w {self.tile_w}, expected one of "
                f"{sorted(CONSUMER_REGISTERS)}, each with a block of {BLOCK_ROWS} rows"
            )
        if self.cluster_w not in (1, 2) or (self.even and self.cluster_w > 1):
            raise ValueError(f"Config: cluster_w is {self.cluster_w} and even {self.even}, expected 1, or 2 and False")
        if self.cluster_k not in range(1, MAX_CLUSTER_K + 1) or (
            self.cluster_k > 1 and (self.even or self.cluster_w > 1)
        ):
            raise ValueError(
                f"Config: cluster_k is {self.cluster_k} with cluster_w {self.cluster_w} and even {self.even}, expected 1 .. "
                f"{MAX_CLUSTER_K}, and 1 with either"
            )
        largest = 128 * LARGE_TILE_N if self.flagged else 2 * WARPGROUP * MIN_FLAGGED_SUMS
        if self.even and self.tile_w * self.tile_n > largest:
            raise ValueError(f"Config: {self} has even shares, expected a tile of at most {largest} sums")
        # 24 is no tile: CuTe DSL 4.8.0 dies compiling it.
        if self.tile_n not in (8, *range(16, MAX_TILE_N + 1, 16)) or self.tile_n % (8 * self.cluster_w):
            raise ValueError(
                f"Config: tile_n is {self.tile_n} with cluster_w {self.cluster_w}, expected 8 (without a cluster) or a "
                f"multiple of 16 to {MAX_TILE_N}"
            )
        if self.blocks_of_warpgroup * self.tile_n > MAX_SUMS:
            raise ValueError(f"Config: {self} has more sums than registers; take a smaller tile_n or tile_w")
        if self.num_stages < 2:
            raise ValueError(f"Config: num_stages is {self.num_stages}, expected at least 2")
        largest = self.num_stages * max(2 * self.tile_n * TILE_K, self.blocks * BLOCK_BYTES)
        if self.cluster_k > 1 and self.cluster_sums_bytes > largest:
            raise ValueError(
                f"Config: {self} leaves {self.cluster_sums_bytes} bytes of sums in stages that have {largest}; take more "
                "stages, or a smaller tile or cluster_k"
            )
        arch = ARCHS[self.arch]
        if self.smem_bytes > arch.smem_bytes:
            raise ValueError(
                f"Config: {self} needs {self.smem_bytes} bytes of shared memory, {self.arch} has {arch.smem_bytes}; "
                "take fewer stages"
            )
        return self


@dataclass(frozen=True)
class Shape:
    """Sizes of a grouped GEMM.

    Attributes:
        tokens: of the largest group, as far as the host can tell; a guess costs speed only.
        n: weight rows of a group.
        k: columns.
        num_groups: experts; 1 for a linear, whose tokens are all rows of X.
        num_hit: of them, those that have tokens, as far as the host can tell, likewise; None: all.
    """

    tokens: int
    n: int
    k: int
    num_groups: int = 1
    num_hit: int | None = None


# Every launch asks.
@functools.lru_cache(maxsize=4096)
def choose_config(shape: Shape, epilogue: str, arch: str = "sm_90a") -> Config:
    """The tile for so many tokens, and how the work is shared.

    Args:
        shape: sizes.
        epilogue: one of EPILOGUES.
        arch: a key of ARCHS.

    Returns:
        One of `all_configs`. Any computes any shape.

    Raises:
        ValueError: arch or epilogue is unknown.

    Source: measured on one H200, docs/bench/sm90.md.
    """
    if arch not in ARCHS:
        raise ValueError(f"choose_config: arch is {arch!r}, expected one of {sorted(ARCHS)}")
    if shape.num_groups > 1:
        return _grouped_config(
            epilogue, _grouped_tile(shape.tokens), _has_even_shares(shape, ARCHS[arch].num_sms), arch
        )
    # A tile of few steps is not shared by many.
    splits = [
        split
        for split in _splits(shape.tokens)
        if split.cluster_k == 1 or shape.k >= MIN_STEPS * split.cluster_k * TILE_K
    ]
    return _linear_config(epilogue, min(splits, key=lambda split: _time_us(shape, split, ARCHS[arch].num_sms)), arch)


def all_configs(epilogue: str, arch: str = "sm_90a") -> tuple[Config, ...]:
    """Every configuration that `choose_config` returns for an epilogue.

    Raises:
        ValueError: arch or epilogue is unknown.
    """
    tiles = {_grouped_tile(tokens) for tokens in range(1, MAX_GROUPED_TILE_N + 1)}
    found = [_grouped_config(epilogue, tile_n, even, arch) for tile_n in sorted(tiles) for even in (False, True)]
    for tokens in (8, 16, 32, MAX_SMALL_TILE_N, MANY_TOKENS, MANY_TOKENS + 1):
        found += [_linear_config(epilogue, split, arch) for split in _splits(tokens)]
    return tuple(dict.fromkeys(found))


class _Split(NamedTuple):
    """How a linear's work is shared by CTAs, and what that costs: fields of a Config, and microseconds.

    Attributes:
        step_us: of a step of K of a tile.
        round_us: of what comes in each round of tiles besides: the first loads, the exchange of sums, the results.
        fixed_us: of what comes once; with even shares, of each tile behind a CTA's first.
        share_us: with even shares, of each share that a tile has.
    """

    tile_w: int
    tile_n: int
    step_us: float
    round_us: float
    fixed_us: float = 0.0
    share_us: float = 0.0
    even: bool = False
    cluster_k: int = 1


@functools.cache
def _splits(tokens: int) -> tuple[_Split, ...]:
    """The splits for so many tokens.

    Source: one H200, ten linears of V4-Pro and V4-Flash at 1 to 512 tokens: scripts/bench/linear_configs.py --fit
    docs/bench/linear_configs.jsonl; but by hand for tiles of 256 rows to 64 tokens, which two shapes have, and where 64
    tokens have too few rows. At 16 tokens as at 8.
    """
    tile_n = 1 << max(3, (tokens - 1).bit_length())
    if tokens <= 16:
        return (
            _Split(256, tile_n, 0.60, 4.1),
            _Split(128, tile_n, 0.553, 2.4, share_us=0.03, even=True),
            _Split(128, tile_n, 0.389, 1.97, cluster_k=2),
            _Split(128, tile_n, 0.455, 1.89, cluster_k=4),
            _Split(128, tile_n, 0.438, 1.88, 0.74, cluster_k=8),
            _Split(256, tile_n, 0.65, 2.9, cluster_k=4),
        )
    if tokens <= 32:
        return (
            _Split(256, tile_n, 0.66, 4.8),
            _Split(128, tile_n, 0.536, 3.87, share_us=0.24, even=True),
            _Split(128, tile_n, 0.413, 2.74, cluster_k=2),
            _Split(128, tile_n, 0.481, 2.53, cluster_k=4),
            _Split(128, tile_n, 0.504, 2.42, 0.69, cluster_k=8),
            _Split(256, tile_n, 0.70, 3.7, cluster_k=4),
        )
    if tokens <= MAX_SMALL_TILE_N:
        return (
            _Split(256, tile_n, 0.75, 6.3),
            _Split(128, tile_n, 0.65, 4.9, share_us=0.24, even=True),
            _Split(128, tile_n, 0.47, 4.4, cluster_k=2),
            _Split(128, tile_n, 0.50, 4.6, cluster_k=4),
            _Split(128, tile_n, 0.50, 4.4, cluster_k=8),
            _Split(256, tile_n, 0.88, 5.5, cluster_k=4),
        )
    if tokens <= MANY_TOKENS:
        return (
            _Split(256, LARGE_TILE_N, 1.132, 3.83, 1.22),
            _Split(256, 96, 1.008, 2.67, 0.23),
            _Split(128, 256, 1.230, 3.22, 1.55),
            _Split(128, 192, 0.889, 2.96),
            _Split(128, LARGE_TILE_N, 0.632, 1.99, 0.83),
            _Split(128, 96, 0.564, 1.15, 1.48),
            _Split(128, 64, 0.494, 1.00, 1.90),
            _Split(128, LARGE_TILE_N, 0.710, 6.21, 1.30, 0.62, even=True),
            _Split(128, LARGE_TILE_N, 0.670, 5.18, 0.27, cluster_k=2),
            _Split(128, LARGE_TILE_N, 0.659, 5.28, 0.62, cluster_k=4),
            _Split(128, 96, 0.563, 4.28, 1.13, cluster_k=2),
            _Split(128, 64, 0.473, 3.68, 0.70, cluster_k=2),
            _Split(128, 64, 0.512, 3.41, 0.93, cluster_k=4),
        )
    return (
        _Split(256, 160, 1.687, 2.08),
        _Split(256, LARGE_TILE_N, 1.319, 1.74),
        _Split(128, 256, 1.413, 0.24),
        _Split(128, 192, 0.969, 1.35),
        _Split(128, LARGE_TILE_N, 0.720, 1.28),
    )


def _time_us(shape: Shape, split: _Split, num_sms: int) -> float:
    """Returns about how long a linear takes."""
    num_k = -(-shape.k // TILE_K)
    num_tiles = -(-shape.n // split.tile_w) * -(-max(shape.tokens, 1) // split.tile_n)
    if split.even:
        num_shares = min(num_sms, max(num_tiles * num_k // MIN_STEPS, 1))
        tiles, shares = max(num_tiles / num_shares, 1.0), max(num_shares / num_tiles, 1.0)
        exchange_us = split.round_us + (tiles - 1) * split.fixed_us + shares * split.share_us
        return num_tiles * num_k / num_shares * split.step_us + exchange_us
    # SMs of a part of the GPU that are no whole cluster have nothing to do: so few clusters of 4 and 8 ran at a time.
    clusters = num_sms // split.cluster_k if split.cluster_k <= 2 else (num_sms - 12) // split.cluster_k
    rounds = -(-num_tiles // clusters)
    return rounds * (-(-num_k // split.cluster_k) * split.step_us + split.round_us) + split.fixed_us


def _has_even_shares(shape: Shape, num_sms: int) -> bool:
    """Whether a last round of tiles would leave so many SMs idle that even shares are faster; of several groups."""
    # Source: as above, experts at 1 to 32 tokens.
    step_us, slower, exchange_us = 0.6, 1.06, 8.0
    num_groups = shape.num_groups if shape.num_hit is None else shape.num_hit
    num_tiles, tile_us = num_groups * -(-shape.n // 256), -(-shape.k // TILE_K) * step_us
    rounds = -(-num_tiles // num_sms)
    return rounds * tile_us > slower * num_tiles / num_sms * tile_us + exchange_us


def _consumers(tile_w: int, tile_n: int) -> int:
    """With few tokens, sums are few, and more warps hide latency better."""
    return MAX_CONSUMERS if tile_w == 256 and tile_n <= MAX_MANY_CONSUMERS_TILE_N else 2


def _linear_config(epilogue: str, split: _Split, arch: str) -> Config:
    return largest_config(
        epilogue, split.tile_w, split.tile_n, _consumers(split.tile_w, split.tile_n), even=split.even,
        cluster_k=split.cluster_k, one_group=True, arch=arch,
    )  # fmt: skip


def _round_tile(tokens: int) -> int:
    return 8 if tokens <= 8 else -(-tokens // 16) * 16


def _grouped_tile(tokens: int) -> int:
    """The tile for groups of which the largest has so many tokens."""
    if tokens <= MAX_GROUPED_TILE_N:
        return _round_tile(tokens) if tokens <= MAX_MANY_CONSUMERS_TILE_N else max(_round_tile(tokens), MIN_WIDE_TILE_N)
    # As many tiles as most groups need, see workspace.large_group; each holds its part of the largest one.
    num_tiles = -(-(tokens - 2 * math.isqrt(tokens)) // MAX_GROUPED_TILE_N)
    return min(_round_tile(-(-tokens // num_tiles)), MAX_GROUPED_TILE_N)


def _grouped_config(epilogue: str, tile_n: int, even: bool, arch: str) -> Config:
    """For several groups: weights are most of the work, so that tiles are wide."""
    # Many tokens are worth sharing.
    cluster_w = 2 if tile_n > LARGE_TILE_N else 1
    even = even and tile_n == 8
    return largest_config(epilogue, 256, tile_n, _consumers(256, tile_n), cluster_w=cluster_w, even=even, arch=arch)


def largest_config(
    epilogue: str, tile_w: int, tile_n: int, num_consumers: int = 2, cluster_w: int = 1, even: bool = False,
    cluster_k: int = 1, one_group: bool = False, arch: str = "sm_90a",
) -> Config:  # fmt: skip
    """The configuration of that tile with as many stages as fit the architecture."""
    without_stages = Config(epilogue, tile_w, tile_n, 0, num_consumers, cluster_w, even, cluster_k, one_group, arch)
    num_stages = (ARCHS[arch].smem_bytes - without_stages.fixed_bytes) // without_stages.stage_bytes
    return replace(without_stages, num_stages=num_stages).validate()


class _Smem(NamedTuple):
    """Shared memory of a CTA. The last mode of sW, sSFW and sX is the stage."""

    # (word, blocks, stage) of Int32; see prepare_sm90
    sW: Any
    sSFW: Any
    # (tile_n, TILE_K, stage) of BF16 in the 128-byte swizzle
    sX: Any
    # (unit_tokens, 64, buffer, warpgroup) of BF16 in the 128-byte swizzle; SwiGLU: (words of a token, unit_tokens, warpgroup)
    # of Float32
    sOut: Any
    # (4 sums, consumer thread, blocks of a warpgroup, store_n / 8, CTA that left them) of Float32, in place of stages
    sSums: Any
    # (MAX_EXPERTS + 1,): token tiles of all experts before each one; of all experts behind the last. None with one_group.
    sTile: Any
    # One barrier a stage: loads have arrived; all consumer warps, of all CTAs that were loaded for, are done.
    full: Any
    empty: Any
    # With cluster_k: no CTA of the cluster reads its stages any more; all that they leave in sSums has arrived.
    done: Any
    left: Any


class _Tiles(NamedTuple):
    """A CTA's tiles first, first + step, ... below end; where they are is found in sTile."""

    first: Any
    end: Any
    step: Any
    # Weight tiles of an expert, those of a cluster counted once.
    num_w: Any
    # Steps of K of a tile.
    num_k: Any
    # Token tiles of each expert are found in the former; with one_group, from rows of X, and that is None.
    sTile: Any
    num_rows: Any
    # Of this CTA in its cluster: which weight tile is its, which part of the steps of K.
    rank: Any
    rank_k: Any
    # With even shares: this CTA's, its first step and the one behind its last, of all tiles end to end. The first
    # num_longer shares have one step more than share_steps.
    share: Any
    share_steps: Any
    num_longer: Any
    first_step: Any
    end_step: Any


class _Tile(NamedTuple):
    """An expert's weight rows tile_w * w_tile ... by num_tokens of its tokens from first_token on."""

    expert: Any
    w_tile: Any
    first_token: Any
    num_tokens: Any


class _Place(NamedTuple):
    """What a consumer must know of a tile to store it, loaded before the sums are there."""

    expert: Any
    # First block of the tile's weight rows.
    block: Any
    # Tokens that there are for this CTA to store, and the row of the first in D.
    num_tokens: Any
    row: Any
    # For each block of the warpgroup and h: what rows g + 8 h of the thread are multiplied with.
    alphas: Any


class _Exchange(NamedTuple):
    """Where CTAs with even shares leave sums for others; None without, flags None if not flagged."""

    # (4 sums, thread, sums of a thread / 4, warpgroup, share)
    mSums: Any
    # (warpgroup, share); 1 while sums are there that nobody has read
    mFlag: Any


class _Out(NamedTuple):
    """Where results go and what they are multiplied with; None where the epilogue has no use for it."""

    # With copies: how a unit is copied to D, and D for that: of a single group its rows and columns alone.
    tma_d: Any
    mD: Any
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
        mCount: cute.Tensor | None,
        mPaddedOffset: cute.Tensor | None,
        mD: cute.Tensor,
        mHScale: cute.Tensor | None,
        mSums: cute.Tensor | None,
        mFlag: cute.Tensor | None,
        limit: cutlass.Float32,
        n: cutlass.Int32,
        group_rows: cutlass.Int32,
        group_columns: cutlass.Int32,
        constant_rows: cutlass.Int32,
        max_active_clusters: cutlass.Int32,
        stream: Any,
    ) -> None:
        """Makes tensor maps, on the host, and launches min(tiles, max_active_clusters) clusters, or all (cluster_k).

        Args:
            mX: (P, k) bf16.
            mW_bytes: (E, Np, Kp/2) uint8, prepared.
            mSFW_bytes: (E, Np, Kp/16) uint8, prepared.
            mAlpha: (E, blocks of weight rows) fp32.
            mCount: (E,) int32; not with one_group.
            mPaddedOffset: (E + 1,) int32; not with one_group.
            mD: (rows, columns) bf16, rows maybe further apart than they are long.
            mHScale: (E,) fp32; swiglu_nvfp4 only.
            mSums: (at least max_active_clusters, tile_w * tile_n) int32; even only. NOTHING before and after if not flagged.
            mFlag: (as many, num_consumers) int32, zeros before and after; flagged only.
            limit: of SwiGLU, infinity for none.
            n: weight rows of an expert, without padding.
            group_rows, group_columns: what each expert's rows and columns of D begin at.
            constant_rows: 1: mCount and mPaddedOffset may be read before earlier kernels have ended; 0: they may not.
            max_active_clusters: the most clusters to launch, at least 1; of no use with cluster_k.
            stream: to launch on.
        """
        config = self.config
        num_rows = mX.shape[0]
        # A box of one unit of tokens in a stage.
        x_stage = self._x_smem_layout()
        x_stage = cute.make_composed_layout(
            x_stage.inner, 0, cute.slice_(self._x_units(x_stage.outer), (None, None, 0, 0))
        )
        load = cpasync.CopyBulkTensorTileG2SOp()
        if cutlass.const_expr(config.cluster_w > 1):
            load = cpasync.CopyBulkTensorTileG2SMulticastOp()
        tma_x, mX = cpasync.make_tiled_tma_atom(
            load, mX, x_stage, (config.load_tokens, TILE_K), num_multicast=config.cluster_w
        )
        # As many as there could be: only the device knows how many there are.
        num_tiles = (num_rows + mW_bytes.shape[0] * (config.tile_n - 1)) // config.tile_n
        num_tiles = num_tiles * cute.ceil_div(n, config.tile_w * config.cluster_w)
        if cutlass.const_expr(config.even):
            num_tiles = max_active_clusters
        clusters = cutlass.min(num_tiles, max_active_clusters)
        if cutlass.const_expr(config.cluster_k > 1):
            clusters = num_tiles
        tma_d = boxes = None
        if cutlass.const_expr(config.copies):
            boxes = mD
            if cutlass.const_expr(config.one_group):
                # What a box has beyond these is not written.
                boxes = cute.make_tensor(mD.iterator, cute.make_layout((num_rows, n), stride=mD.stride))
            tma_d, boxes = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileS2GOp(),
                boxes,
                cute.select(self._out_smem_layout(), mode=[0, 1]),
                (config.unit_tokens, BLOCK_ROWS),
            )
        out = _Out(
            tma_d, boxes, mD.iterator, cutlass.Int64(mD.stride[0]), group_rows, group_columns, mAlpha, mHScale, limit,
            mCount, mPaddedOffset, n,
        )  # fmt: skip
        weights = (self._blocks(mW_bytes, BLOCK_BYTES), self._blocks(mSFW_bytes, BLOCK_SF_BYTES))
        self.kernel(tma_x, mX, weights, out, self._exchange(mSums, mFlag), constant_rows).launch(
            grid=(clusters * config.cluster, 1, 1),
            block=(config.consumer_threads + WARPGROUP, 1, 1),
            cluster=(config.cluster, 1, 1),
            # Without it ptxas does not know with how many registers a thread starts, and ignores setmaxregister.
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=hopper.USE_PDL,
        )

    @cute.kernel
    def kernel(
        self,
        tma_x: Any,
        mX: cute.Tensor,
        weights: Any,
        out: _Out,
        exchange: _Exchange,
        constant_rows: cutlass.Int32,
    ) -> None:
        """Sets up barriers and the list of tiles, then every warp takes its role."""
        hopper.launch_dependents()
        config = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == config.load_warp:
            cpasync.prefetch_descriptor(tma_x)
            if cutlass.const_expr(config.copies):
                cpasync.prefetch_descriptor(out.tma_d)
        smem = self._allocate_smem()
        if warp == 0:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(config.num_stages):
                    cute.arch.mbarrier_init(smem.full + stage, 1)
                    cute.arch.mbarrier_init(smem.empty + stage, config.load_warp * config.cluster_w)
                if cutlass.const_expr(config.cluster_k > 1):
                    cute.arch.mbarrier_init(smem.done, config.load_warp * config.cluster_k)
                    cute.arch.mbarrier_init(smem.left, 1)
        if cutlass.const_expr(not config.one_group):
            if constant_rows == 0:
                hopper.wait_for_prerequisites()
            if warp == config.load_warp:
                count_tiles(out.mCount, smem.sTile, config.tile_n)
        # Behind this barrier all mbarriers are initialised, and the tiles are in shared memory.
        cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(config.cluster_k > 1):
            # Waited for where others' mbarriers are used first.
            cute.arch.cluster_arrive_relaxed()
        self._sync()
        tiles = self._tiles(weights[0], out.n, smem.sTile, mX.shape[0])

        if warp >= config.load_warp:
            cute.arch.setmaxregister_decrease(LOAD_REGISTERS[config.num_consumers])
            if warp == config.load_warp:
                num_early = cutlass.Int32(0)
                if constant_rows != 0:
                    num_early = self._load_early(weights, out, smem, tiles)
                hopper.wait_for_prerequisites()
                self._load(tma_x, mX, weights, out, smem, tiles, num_early)
        else:
            hopper.wait_for_prerequisites()
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS[config.num_consumers])
            self._consume(smem, tiles, out, exchange)
        # Others may still write to a CTA's shared memory, or read it.
        if cutlass.const_expr(config.cluster_w > 1):
            self._sync()

    @cute.jit
    def _sync(self) -> None:
        """A barrier of all threads of the cluster."""
        if cutlass.const_expr(self.config.cluster_w > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def _load_early(self, weights: Any, out: _Out, smem: _Smem, tiles: _Tiles) -> Any:
        """Load warp: begins to load weights of the first stages, while earlier kernels run; returns how many."""
        num_early = cutlass.Int32(0)
        if tiles.first < tiles.end:
            at = self._find(tiles, tiles.first, out.mCount)
            first_k, end_k = self._steps(tiles, tiles.first)
            num_early = cutlass.min(end_k - first_k, self.config.num_stages)
            for step in cutlass.range(num_early, unroll=1):
                self._load_weights(weights, at, first_k + step, smem, step)
        return num_early

    @cute.jit
    def _num_units(self, at: _Tile) -> Any:
        """Returns how many units of tokens are loaded for a tile: of one with few tokens not all."""
        config = self.config
        num_units = cutlass.Int32(config.tile_n // config.load_tokens)
        if cutlass.const_expr(len(config.widths) > 1):
            width = cute.ceil_div(cutlass.max(at.num_tokens, config.widths[0]), WIDTH_STEP) * WIDTH_STEP
            num_units = cute.ceil_div(width, config.load_tokens)
        return num_units

    @cute.jit
    def _load_weights(self, weights: Any, at: _Tile, k_tile: Any, smem: _Smem, index: Any) -> None:
        """Begins to load a stage's blocks of weights and scales; its barrier expects the tokens too."""
        config = self.config
        mW, mSFW = weights
        num_row_blocks = cute.size(mW, mode=[2])
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), cutlass.Int32)
        full = smem.full + index
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(
                full, config.weight_bytes + self._num_units(at) * (2 * config.load_tokens * TILE_K)
            )
            for block in cutlass.range_constexpr(config.blocks):
                # A tile behind the last block loads that again; nobody stores what comes of it.
                row_block = cutlass.min(at.w_tile * config.blocks + block, num_row_blocks - 1)
                cute.copy(bulk, mW[None, k_tile, row_block, at.expert], smem.sW[None, block, index], mbar_ptr=full)
                cute.copy(bulk, mSFW[None, k_tile, row_block, at.expert], smem.sSFW[None, block, index], mbar_ptr=full)

    @cute.jit
    def _load(
        self,
        tma_x: Any,
        mX: cute.Tensor,
        weights: Any,
        out: _Out,
        smem: _Smem,
        tiles: _Tiles,
        num_early: Any,
    ) -> None:
        """Load warp: for each step of K the tokens and, but for the first num_early, the weights and their scales."""
        config = self.config
        everybody = cutlass.Int16((1 << config.cluster_w) - 1)
        index, phase = cutlass.Int32(0), cutlass.Int32(1)
        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            at = self._find(tiles, tile, out.mCount)
            row = at.first_token
            if cutlass.const_expr(not config.one_group):
                row += out.mPaddedOffset[at.expert]
            # (tokens of a unit, TILE_K, units, k tiles)
            gX = cute.local_tile(cute.domain_offset((row, 0), mX), (config.load_tokens, TILE_K), (None, None))
            num_units = self._num_units(at)
            # Of a cluster that shares tokens, each CTA loads its part for all.
            tXsX, tXgX = cpasync.tma_partition(
                tma_x,
                tiles.rank,
                cute.make_layout(config.cluster_w),
                cute.group_modes(cute.make_tensor(smem.sX.iterator, self._x_units(smem.sX.layout)), 0, 2),
                cute.group_modes(gX, 0, 2),
            )
            first_k, end_k = self._steps(tiles, tile)
            for k_tile in cutlass.range(first_k, end_k, unroll=1):
                cute.arch.mbarrier_wait(smem.empty + index, phase)
                if num_early > 0:
                    num_early -= 1
                else:
                    self._load_weights(weights, at, k_tile, smem, index)
                full = smem.full + index
                for unit in cutlass.range(num_units, unroll=1):
                    cute.copy(
                        tma_x, tXgX[None, unit, k_tile], tXsX[None, unit, index], tma_bar_ptr=full, mcast_mask=everybody
                    )
                index += 1
                if index == config.num_stages:
                    index = cutlass.Int32(0)
                    phase = phase ^ 1

    @cute.jit
    def _consume(self, smem: _Smem, tiles: _Tiles, out: _Out, exchange: _Exchange) -> None:
        """Warpgroups: each decodes its blocks of rows, multiplies them with the tokens of the tile, and stores."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        group, thread = cute.arch.make_warp_uniform(thread // WARPGROUP), thread % WARPGROUP
        # (column pair, row g or g + 8, 8 tokens, blocks)
        sums = cute.make_rmem_tensor((2, 2, config.tile_n // 8, config.blocks_of_warpgroup), cutlass.Float32)
        stage, buffer = (cutlass.Int32(0), cutlass.Int32(0)), cutlass.Int32(0)
        for tile in cutlass.range(tiles.first, tiles.end, tiles.step, unroll=1):
            at = self._find(tiles, tile, out.mCount)
            place = self._place(at, tiles, group, thread, out)
            num_tokens = cute.arch.make_warp_uniform(at.num_tokens)
            sums.fill(0.0)
            first_k, end_k = self._steps(tiles, tile)
            stage = self._multiply(num_tokens, sums, smem, stage, end_k - first_k, group, thread)
            if cutlass.const_expr(config.even):
                if first_k > 0:
                    mine = exchange.mSums[None, thread, None, group, tiles.share]
                    if cutlass.const_expr(config.flagged):
                        self._leave_flagged(sums, mine, exchange.mFlag, tiles.share, group, thread)
                    else:
                        self._leave(sums, mine)
                else:
                    if end_k < tiles.num_k:
                        last = self._share_of(tiles, (tile + 1) * tiles.num_k - 1)
                        theirs = exchange.mSums[None, thread, None, group, None]
                        if cutlass.const_expr(config.flagged):
                            self._wait(exchange.mFlag, tiles.share + 1, last, group, thread)
                        self._add(sums, theirs, tiles.share + 1, last)
                    buffer = self._store(sums, smem, place, group, thread, out, buffer)
            else:
                if cutlass.const_expr(config.cluster_k > 1):
                    of_cluster = self._add_in_cluster(sums, smem, tiles.rank_k, group * WARPGROUP + thread)
                    buffer = self._store(of_cluster, smem, place, group, thread, out, buffer)
                else:
                    buffer = self._store(sums, smem, place, group, thread, out, buffer)
        if cutlass.const_expr(config.copies):
            # Shared memory must outlive the copies that read it. Nobody waits until they have written D: the grid ends no
            # earlier, and later kernels wait for that, and for all that it wrote to be seen; see `hopper`.
            self._wait_for_copies(0, self._copies_units(thread))

    @cute.jit
    def _multiply(
        self, num_tokens: Any, sums: cute.Tensor, smem: _Smem, stage: Any, num_steps: Any, group: Any, thread: Any
    ) -> Any:
        """Warpgroup: adds so many steps' products with a tile's tokens to the sums.

        Args:
            num_tokens: of the tile; all threads have the same.
            sums: (2, 2, tile_n / 8, blocks).
            smem: see _Smem.
            stage: of the first step, and its barrier's phase.
            num_steps: of K, at least 1.
            group, thread: who this is.

        Returns:
            What stage is for the next tile.
        """
        config = self.config
        rows, lot_steps = config.blocks_of_warpgroup * BLOCK_ROWS, config.lot_steps
        shape_a = self._tiled_mma(config.tile_n).partition_shape_A((rows, lot_steps * MMA_K))
        # Two, so that one may be written while tensor cores read the other.
        tCrA = [cute.make_rmem_tensor(shape_a, cutlass.BFloat16) for _ in range(2)]
        scale_bits = hopper.in_register(hopper.SCALE_BITS)
        index, phase = stage
        last = cutlass.Int32(-1)
        for _ in cutlass.range(num_steps, unroll=1):
            cute.arch.mbarrier_wait(smem.full + index, phase)
            # A loop, as ptxas lets MMAs overlap only where at most one lot of them is in a basic block: see _release.
            for first in cutlass.range(0, TILE_K // MMA_K, 2 * lot_steps, unroll=1):
                for lot in cutlass.range_constexpr(2):
                    step, word = first + lot * lot_steps, lot * lot_steps % STEPS_OF_LOAD
                    self._decode(smem, index, step // STEPS_OF_LOAD, word, group, thread, scale_bits, tCrA[lot])
                    self._mma(config.widths, num_tokens, sums, smem, index, step, tCrA[lot])
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(lot == 0):
                        # What was in flight were, at the first lot, the last MMAs of the stage before.
                        self._release(smem, last)
                        last = cutlass.Int32(-1)
            last = index
            index += 1
            if index == config.num_stages:
                index = cutlass.Int32(0)
                phase = phase ^ 1
        warpgroup.wait_group(0)
        self._release(smem, last)
        return index, phase

    @cute.jit
    def _mma(
        self, widths: tuple[int, ...], num_tokens: Any, sums: cute.Tensor, smem: _Smem, index: Any, step: Any,
        tCrA: cute.Tensor,
    ) -> None:  # fmt: skip
        """Warpgroup: begins the MMAs of a lot with the first of the widths that so many tokens fit."""
        if cutlass.const_expr(len(widths) == 1):
            self._mma_of_width(widths[0], sums, smem, index, step, tCrA)
        else:
            middle = len(widths) // 2
            if num_tokens <= widths[middle - 1]:
                self._mma(widths[:middle], num_tokens, sums, smem, index, step, tCrA)
            else:
                self._mma(widths[middle:], num_tokens, sums, smem, index, step, tCrA)

    @cute.jit
    def _mma_of_width(
        self, width: int, sums: cute.Tensor, smem: _Smem, index: Any, step: Any, tCrA: cute.Tensor
    ) -> None:
        """Warpgroup: begins the MMAs of a lot, steps of MMA_K from a stage's step on, with its first width tokens."""
        config = self.config
        tiled_mma = self._tiled_mma(width)
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        # Of each 8 tokens, and of each block of sums, the first ones.
        x = smem.sX.layout
        x = cute.make_tensor(smem.sX.iterator, cute.make_layout(((8, width // 8), *x.shape[1:]), stride=x.stride))
        tCrB = tiled_mma.make_fragment_B(tiled_mma.get_slice(0).partition_B(x))
        shape = ((2, 2, width // 8), config.blocks_of_warpgroup, 1)
        acc = cute.make_tensor(sums.iterator, cute.make_layout(shape, stride=((1, 2, 4), config.tile_n // 2, 0)))
        warpgroup.fence()
        for i in cutlass.range_constexpr(config.lot_steps):
            cute.gemm(tiled_mma, acc, tCrA[None, None, i], tCrB[None, None, step + i, index], acc)
        warpgroup.commit_group()

    @cute.jit
    def _release(self, smem: _Smem, index: Any) -> None:
        """This warp has no more to do with a stage: tells whoever loads into it; nothing if index is -1."""
        if index >= 0:
            with cute.arch.elect_one():
                if cutlass.const_expr(self.config.cluster_w == 1):
                    cute.arch.mbarrier_arrive(smem.empty + index)
                else:
                    for cta in cutlass.range_constexpr(self.config.cluster_w):
                        cute.arch.mbarrier_arrive(smem.empty + index, cta)

    @cute.jit
    def _place(self, at: _Tile, tiles: _Tiles, group: Any, thread: Any, out: _Out) -> _Place:
        """Loads what storing a tile needs, so that nothing waits for it later."""
        config = self.config
        block = at.w_tile * config.blocks + group * config.blocks_of_warpgroup
        w_row = block * BLOCK_ROWS + thread // WARP * 16 + thread % WARP // 4
        alphas = [
            [self._alpha(out, at.expert, w_row + b * BLOCK_ROWS + 8 * h) for h in range(2)]
            for b in range(config.blocks_of_warpgroup)
        ]
        # Of a tile that several share, from this CTA's first token on; there may be none.
        first = tiles.rank_k * config.store_n
        row = at.first_token + first
        if cutlass.const_expr(not config.one_group):
            row += out.mPaddedOffset[at.expert] - at.expert * out.group_rows
        return _Place(at.expert, block, cutlass.min(at.num_tokens - first, config.store_n), row, alphas)

    @cute.jit
    def _leave(self, sums: cute.Tensor, mSums: cute.Tensor) -> None:
        """Leaves a thread's sums of the last steps of a tile, as (4, sums / 4), to the CTA with its first."""
        num_quads = self.config.sums_of_thread // 4
        rBits = cute.make_tensor(cute.recast_ptr(sums.iterator, dtype=cutlass.Int32), (4, num_quads))
        for quad in cutlass.range_constexpr(num_quads):
            bits = [rBits[i, quad] for i in range(4)]
            bits = [cutlass.select_(one == NOTHING, cutlass.Int32(LEFT_ZERO), one) for one in bits]
            hopper.store_relaxed(mSums[None, quad].iterator, bits)

    @cute.jit
    def _add(self, sums: cute.Tensor, mSums: cute.Tensor, first: Any, last: Any) -> None:
        """Adds what others have left of a thread's sums, (4, sums / 4, share), in the order of shares first .. last."""
        num_quads = self.config.sums_of_thread // 4
        at_once = max(1, min(8, MAX_LOADS // self.config.sums_of_thread))
        quads = cute.make_tensor(sums.iterator, cute.make_layout((4, num_quads)))
        rBits = cute.make_rmem_tensor((4, num_quads, at_once), cutlass.Int32)
        rSums = cute.recast_tensor(rBits, cutlass.Float32)
        for start in cutlass.range(first, last + 1, at_once, unroll=1):
            missing = cutlass.Boolean(True)
            while missing:
                for i in cutlass.range_constexpr(at_once):
                    share = cutlass.min(start + i, last)
                    for quad in cutlass.range_constexpr(num_quads):
                        found = hopper.load_relaxed(mSums[None, quad, share].iterator)
                        for j in cutlass.range_constexpr(4):
                            rBits[j, quad, i] = found[j]
                missing = cutlass.Boolean(False)
                if cutlass.const_expr(not self.config.flagged):
                    for i in cutlass.range_constexpr(cute.size(rBits)):
                        missing = missing | (rBits[i] == NOTHING)
            for i in cutlass.range_constexpr(at_once):
                if start + i <= last:
                    quads.store(quads.load() + rSums[None, None, i].load())
                    if cutlass.const_expr(not self.config.flagged):
                        for quad in cutlass.range_constexpr(num_quads):
                            hopper.store_relaxed(mSums[None, quad, start + i].iterator, [cutlass.Int32(NOTHING)] * 4)

    @cute.jit
    def _leave_flagged(
        self, sums: cute.Tensor, mSums: cute.Tensor, mFlag: cute.Tensor, share: Any, group: Any, thread: Any
    ) -> None:
        """Warpgroup: leaves its sums of the last steps of a tile to the CTA with its first, then a flag."""
        quads = cute.make_tensor(sums.iterator, cute.make_layout((4, self.config.sums_of_thread // 4)))
        cute.autovec_copy(cute.recast_tensor(quads, cutlass.Int32), mSums)
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)
        # The release covers what the other threads have stored before the barrier.
        if thread == 0:
            flag = mFlag.iterator + mFlag.layout((group, share))
            cute.arch.store(flag, cutlass.Int32(1), sem="release", scope="gpu")

    @cute.jit
    def _wait(self, mFlag: cute.Tensor, first: Any, last: Any, group: Any, thread: Any) -> None:
        """Warpgroup: waits for the flags of shares first .. last, which are fewer than threads, as none is of few steps."""
        if first + thread <= last:
            flag = mFlag.iterator + mFlag.layout((group, first + thread))
            there = cute.arch.load(flag, cutlass.Int32, sem="acquire", scope="gpu")
            while there == 0:
                there = cute.arch.load(flag, cutlass.Int32, sem="acquire", scope="gpu")
            # Nobody else reads it in this launch, and the next one finds it as this one did.
            cute.arch.store(flag, cutlass.Int32(0))
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)

    @cute.jit
    def _add_in_cluster(self, sums: cute.Tensor, smem: _Smem, rank_k: Any, thread: Any) -> cute.Tensor:
        """Leaves each CTA of the cluster its tokens' sums; returns this one's of all, added in the order of the CTAs."""
        config = self.config
        chunks, of_slice = config.tile_n // 8, config.store_n // 8
        quads = cute.make_tensor(sums.iterator, cute.make_layout((4, chunks, config.blocks_of_warpgroup)))
        if thread == 0:
            num_chunks = cutlass.min(cutlass.max(chunks - rank_k * of_slice, 0), of_slice)
            cute.arch.mbarrier_arrive_and_expect_tx(
                smem.left, num_chunks * (config.cluster_k * 8 * config.tile_w * cutlass.Float32.width // 8)
            )
        # All CTAs have set up their mbarriers.
        cute.arch.cluster_wait()
        with cute.arch.elect_one():
            for peer in cutlass.range_constexpr(config.cluster_k):
                cute.arch.mbarrier_arrive(smem.done, peer)
        cute.arch.mbarrier_wait(smem.done, 0)
        for peer in cutlass.range_constexpr(-(-chunks // of_slice)):
            theirs = hopper.peer_address(smem.sSums[None, thread, 0, 0, rank_k].iterator, peer)
            left = hopper.peer_address(smem.left, peer)
            for chunk in cutlass.range_constexpr(peer * of_slice, min(peer * of_slice + of_slice, chunks)):
                for b in cutlass.range_constexpr(config.blocks_of_warpgroup):
                    place = 4 * smem.sSums.layout((0, 0, b, chunk - peer * of_slice, 0))
                    hopper.store_peer(theirs + place, [quads[i, chunk, b] for i in range(4)], left)
        cute.arch.mbarrier_wait(smem.left, 0)
        rSums = cute.make_rmem_tensor((4, of_slice, config.blocks_of_warpgroup), cutlass.Float32)
        rOthers = cute.make_rmem_tensor(4, cutlass.Float32)
        rSums.fill(0.0)
        for b in cutlass.range_constexpr(config.blocks_of_warpgroup):
            for chunk in cutlass.range_constexpr(of_slice):
                for peer in cutlass.range_constexpr(config.cluster_k):
                    cute.autovec_copy(smem.sSums[None, thread, b, chunk, peer], rOthers)
                    for i in cutlass.range_constexpr(4):
                        rSums[i, chunk, b] += rOthers[i]
        return cute.make_tensor(rSums.iterator, cute.make_layout((2, 2, of_slice, config.blocks_of_warpgroup)))

    @cute.jit
    def _decode(
        self,
        smem: _Smem,
        index: Any,
        half: Any,
        first: int,
        group: Any,
        thread: Any,
        scale_bits: Any,
        tCrA: cute.Tensor,
    ) -> None:
        """Writes a warpgroup's weights of a lot, from a first step of half a stage on, times their block scales."""
        config = self.config
        # ((1, 2, 2), blocks, k blocks): pairs of neighbouring columns
        rA = cute.recast_tensor(tCrA, cutlass.Int32)
        steps = config.lot_steps
        for b in cutlass.range_constexpr(config.blocks_of_warpgroup):
            block = group * config.blocks_of_warpgroup + b
            rW = cute.make_rmem_tensor(steps, cutlass.Int32)
            # (words, words / steps, thread, half)
            sW = cute.make_tensor(
                smem.sW[None, block, index].iterator,
                cute.make_layout((steps, STEPS_OF_LOAD // steps, WARPGROUP, TILE_K // LOAD_K)),
            )
            cute.autovec_copy(sW[None, first // steps, thread, half], rW)
            # (4 scales along k, half, row g or g + 8, g of all warps)
            rSF = cute.make_rmem_tensor((1, 2), cutlass.Int32)
            sSF = cute.make_tensor(
                smem.sSFW[None, block, index].iterator, cute.make_layout((1, TILE_K // LOAD_K, 2, WARPGROUP // 4))
            )
            for h in cutlass.range_constexpr(2):
                rSF[0, h] = sSF[0, half, h, thread // 4]
            # Of rows g and g + 8: BF16 numbers of steps 0 and 2, and of 1 and 3.
            scales = [hopper.scale_pairs(rSF[0, h], scale_bits) for h in range(2)]
            for i in cutlass.range_constexpr(steps):
                word, step = rW[i], first + i
                pairs = (
                    (word << 6) & _CODE_MASK,
                    (word << 2) & _CODE_MASK,
                    hopper.rotate_right(word, 4) & _CODE_MASK,
                    (word & _UPPER_MASK) | ((word >> 8) & _LOWEST_MASK),
                )
                for p in cutlass.range_constexpr(4):
                    scale = scales[p % 2][step % 2]
                    rA[(0, p % 2, p // 2), b, i] = hopper.mul_bf16x2_half(pairs[p], scale, step // 2)

    @cute.jit
    def _store(
        self, sums: cute.Tensor, smem: _Smem, place: _Place, group: Any, thread: Any, out: _Out, buffer: Any
    ) -> Any:
        """Warpgroup: its blocks of sums, times alpha, a unit of tokens after the other, to D.

        Args:
            sums: (2, 2, store_n / 8, blocks).
            smem: see _Smem.
            place: of the tile.
            group, thread: who this is.
            out: where to.
            buffer: of the first unit.

        Returns:
            What buffer is for the next tile.
        """
        config = self.config
        copies_units = self._copies_units(thread) if config.copies else None
        for b in cutlass.range_constexpr(config.blocks_of_warpgroup):
            for unit in cutlass.range_constexpr(config.store_n // config.unit_tokens):
                if unit * config.unit_tokens < place.num_tokens:
                    if cutlass.const_expr(config.epilogue == BF16):
                        sOut = smem.sOut[None, None, buffer, group]
                        self._store_sums(sums, sOut, b, unit, place, group, thread, copies_units, out)
                        buffer = cutlass.select_(buffer == config.num_buffers - 1, cutlass.Int32(0), buffer + 1)
                    else:
                        sOut = smem.sOut[None, None, group]
                        # Behind this barrier the last unit has been read.
                        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)
                        self._put(sums, sOut, b, unit, thread, place, out)
                        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)
                        self._take(sOut, place, b, unit, thread, out)
        return buffer

    @cute.jit
    def _store_sums(
        self,
        sums: cute.Tensor,
        sOut: cute.Tensor,
        b: int,
        unit: int,
        place: _Place,
        group: Any,
        thread: Any,
        copies_units: Any,
        out: _Out,
    ) -> None:
        """Warpgroup: a unit of sums by way of its buffer, (unit_tokens, 64), to D: a box by a copy, a part by threads."""
        config = self.config
        if cutlass.const_expr(config.num_buffers == 1):
            # Behind this barrier the last unit has been read. With two buffers, the barrier of the unit between says so.
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)
        self._put_sums(sums, sOut, b, unit, thread, place)
        if cutlass.const_expr(config.copies):
            cute.arch.fence_view_async_shared()
            # Then all copies but those of the last num_buffers - 2 units have read theirs: the next unit's buffer is free
            # behind the barrier. Threads had read it before they came to the last unit's.
            self._wait_for_copies(config.num_buffers - 2, copies_units)
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)
        token, column = unit * config.unit_tokens, (place.block + b) * BLOCK_ROWS
        if cutlass.const_expr(config.copies and config.one_group):
            self._copy_box(sOut, place, token, column, copies_units, out)
        elif cutlass.const_expr(config.copies):
            # Behind a tile's last token, and behind an expert's last column, D may have others' results.
            is_box = (token + config.unit_tokens <= place.num_tokens) & (column + BLOCK_ROWS <= out.n)
            if is_box:
                self._copy_box(sOut, place, token, column, copies_units, out)
            else:
                self._take_sums(sOut, place, token, column, thread, out)
        else:
            self._take_sums(sOut, place, token, column, thread, out)
        if cutlass.const_expr(config.copies):
            self._commit_copy(copies_units)

    @cute.jit
    def _put_sums(self, sums: cute.Tensor, sOut: cute.Tensor, b: int, unit: int, thread: Any, place: _Place) -> None:
        """Writes a warp's 16 columns of a unit to shared memory: a matrix is rows g, or g + 8, of 8 tokens, transposed."""
        chunks = self.config.unit_tokens // 8
        at_once = min(chunks, 2)
        # The thread's row of its matrix: 8 columns of a token, which the swizzle moves, so that 8 rows are in all banks.
        lane = thread % WARP
        token, part = lane // 16 % at_once * 8 + lane % 8, thread // WARP * 2 + lane // 8 % 2
        address = sOut.iterator.toint() + token * TOKEN_BYTES + (part ^ lane % 8) * (BF16_UNIT * 2)
        for first in cutlass.range_constexpr(0, chunks, at_once):
            rSums = cute.make_rmem_tensor((2, 2, at_once), cutlass.Float32)
            for chunk in cutlass.range_constexpr(at_once):
                for h in cutlass.range_constexpr(2):
                    for i in cutlass.range_constexpr(2):
                        rSums[i, h, chunk] = sums[i, h, unit * chunks + first + chunk, b] * place.alphas[b][h]
            rD = cute.make_rmem_tensor(rSums.shape, cutlass.BFloat16)
            rD.store(rSums.load().to(cutlass.BFloat16))
            pairs = cute.recast_tensor(rD, cutlass.Int32)
            hopper.store_transposed(address + first * (8 * TOKEN_BYTES), [pairs[i] for i in range(2 * at_once)])

    @cute.jit
    def _copy_box(
        self, sOut: cute.Tensor, place: _Place, token: Any, column: Any, copies_units: Any, out: _Out
    ) -> None:
        """The warp that copies: begins to copy a unit, to D from a token of the tile and a column on."""
        box = (self.config.unit_tokens, BLOCK_ROWS)
        corner = (cutlass.Int32(place.row + token), cutlass.Int32(place.expert * out.group_columns + column))
        if copies_units:
            gD = cute.local_tile(cute.domain_offset(corner, out.mD), box, (0, 0))
            tDsD, tDgD = cpasync.tma_partition(
                out.tma_d, 0, cute.make_layout(1), cute.group_modes(sOut, 0, 2), cute.group_modes(gD, 0, 2)
            )
            cute.copy(out.tma_d, tDsD, tDgD)

    @cute.jit
    def _commit_copy(self, copies_units: Any) -> None:
        """The warp that copies: a unit is done; one without a copy too, as units are counted."""
        if copies_units:
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def _wait_for_copies(self, num_last: int, copies_units: Any) -> None:
        """The warp that copies: waits until shared memory has been read by all copies but those of so many last units."""
        if copies_units:
            cute.arch.cp_async_bulk_wait_group(num_last, read=True)

    @cute.jit
    def _copies_units(self, thread: Any) -> Any:
        """Returns whether this is the warp of its warpgroup that copies: the first."""
        return cute.arch.make_warp_uniform(thread // WARP) == 0

    @cute.jit
    def _take_sums(self, sOut: cute.Tensor, place: _Place, first: Any, column: Any, thread: Any, out: _Out) -> None:
        """Stores what there is of a unit, to D from a token of the tile and a column on."""
        parts = BLOCK_ROWS // BF16_UNIT
        for start in cutlass.range_constexpr(0, self.config.unit_tokens * parts, WARPGROUP):
            token, part = (start + thread) // parts, (start + thread) % parts
            is_there = (first + token < place.num_tokens) & (column + part * BF16_UNIT < out.n)
            if (token < self.config.unit_tokens) & is_there:
                rD = cute.make_rmem_tensor(BF16_UNIT, cutlass.BFloat16)
                cute.autovec_copy(cute.coalesce(cute.local_tile(sOut, (1, BF16_UNIT), (token, part))), rD)
                self._write(rD, place, first + token, column + part * BF16_UNIT, out)

    @cute.jit
    def _write(self, rD: cute.Tensor, place: _Place, token: Any, column: Any, out: _Out) -> None:
        """Stores neighbouring columns of a token of the tile."""
        offset = (place.row + token) * out.row_stride + place.expert * out.group_columns + column
        gD = cute.make_tensor(out.pointer + cute.assume(offset, BF16_UNIT), cute.make_layout(cute.size(rD)))
        cute.autovec_copy(rD, gD)

    @cute.jit
    def _put(
        self, sums: cute.Tensor, sOut: cute.Tensor, b: int, unit: int, thread: Any, place: _Place, out: _Out
    ) -> None:
        """Writes the h that a thread's sums of a unit make to shared memory, token by token."""
        config = self.config
        column, t = thread // WARP * 8 + thread % WARP // 4, thread % 4
        for j in cutlass.range_constexpr(config.unit_tokens // 8):
            chunk = unit * (config.unit_tokens // 8) + j
            for i in cutlass.range_constexpr(2):
                low = sums[i, 0, chunk, b] * place.alphas[b][0]
                high = sums[i, 1, chunk, b] * place.alphas[b][1]
                sOut[column, 8 * j + 2 * t + i] = blackwell.swiglu(low, high, out.limit)

    @cute.jit
    def _take(self, sOut: cute.Tensor, place: _Place, b: int, unit: int, thread: Any, out: _Out) -> None:
        """Stores a unit of h: neighbouring threads have neighbouring columns of D."""
        config = self.config
        parts = H_OF_BLOCK // H_UNIT
        for start in cutlass.range_constexpr(0, config.unit_tokens * parts, WARPGROUP):
            token, part = (start + thread) // parts, (start + thread) % parts
            tile_token = unit * config.unit_tokens + token
            column = (place.block + b) * H_OF_BLOCK + part * H_UNIT
            if (token < config.unit_tokens) & (tile_token < place.num_tokens) & (column < out.n // 2):
                layout = cute.make_layout((H_UNIT, parts, config.unit_tokens), stride=(1, H_UNIT, TOKEN_WORDS))
                rH = cute.make_rmem_tensor(H_UNIT, cutlass.Float32)
                cute.autovec_copy(cute.make_tensor(sOut.iterator, layout)[None, part, token], rH)
                rD = cute.make_rmem_tensor(H_UNIT, cutlass.BFloat16)
                if cutlass.const_expr(config.epilogue == SWIGLU):
                    rD.store(rH.load().to(cutlass.BFloat16))
                else:
                    rD.store(self._round(rH, out.mHScale[place.expert]).load())
                self._write(rD, place, tile_token, column, out)

    @cute.jit
    def _round(self, rH: cute.Tensor, h_scale: cutlass.Float32) -> cute.Tensor:
        """Returns a block of h rounded to NVFP4, as BF16 numbers."""
        amax = cute.math.absf(rH[0])
        for i in cutlass.range_constexpr(1, H_UNIT):
            amax = cute.arch.fmax(amax, cute.math.absf(rH[i]), nan=True)
        block_sf, _ = round_block.block_scale(amax, h_scale)
        return round_block.unscaled(round_block.nearest_e2m1(rH, amax, block_sf, h_scale), block_sf)

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
    def _find(self, tiles: _Tiles, tile: Any, mCount: Any) -> _Tile:
        """Returns where a tile is: its expert is the last one with no more than that many tiles before it."""
        expert, before = cutlass.Int32(0), cutlass.Int32(0)
        if cutlass.const_expr(self.config.one_group):
            num_token_tiles = cute.ceil_div(tiles.num_rows, self.config.tile_n)
        else:
            for bit in (256, 128, 64, 32, 16, 8, 4, 2, 1):
                if tiles.sTile[expert + bit] * tiles.num_w <= tile:
                    expert += bit
            before = tiles.sTile[expert]
            num_token_tiles = tiles.sTile[expert + 1] - before
        in_expert = tile - before * tiles.num_w
        before_band, in_band = cutlass.Int32(0), num_token_tiles
        if cutlass.const_expr(self.config.one_group):
            of_band = BAND_TOKENS // self.config.tile_n
            before_band = in_expert // (of_band * tiles.num_w) * of_band
            in_expert -= before_band * tiles.num_w
            in_band = cutlass.min(num_token_tiles - before_band, of_band)
        w_tile = in_expert // in_band * self.config.cluster_w + tiles.rank
        tile_tokens, count = cutlass.Int32(self.config.tile_n), tiles.num_rows
        if cutlass.const_expr(not self.config.one_group):
            count = mCount[expert]
        if cutlass.const_expr(len(self.config.widths) > 1):
            tile_tokens = cute.ceil_div(cute.ceil_div(count, num_token_tiles), WIDTH_STEP) * WIDTH_STEP
        first_token = (before_band + in_expert % in_band) * tile_tokens
        return _Tile(expert, w_tile, first_token, cutlass.min(count - first_token, tile_tokens))

    @cute.jit
    def _tiles(self, mW: cute.Tensor, n: Any, sTile: Any, num_rows: Any) -> _Tiles:
        config = self.config
        num_w = cute.ceil_div(n, config.tile_w * config.cluster_w)
        num_k = cute.size(mW, mode=[1])
        num_token_tiles = cute.ceil_div(num_rows, config.tile_n) if config.one_group else sTile[MAX_EXPERTS]
        num_tiles = num_token_tiles * num_w
        cta, num_ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        num_steps = num_tiles * num_k
        num_shares = cutlass.min(num_ctas, cutlass.max(num_steps // MIN_STEPS, 1))
        tiles = _Tiles(
            first=cta // config.cluster,
            end=num_tiles,
            step=num_ctas // config.cluster,
            num_w=num_w,
            num_k=num_k,
            sTile=sTile,
            num_rows=num_rows,
            rank=cta % config.cluster_w,
            rank_k=cta % config.cluster_k,
            # In descending order: see the module's text. A CTA may have none: its tiles end at once.
            share=num_shares - 1 - cta,
            share_steps=num_steps // num_shares,
            num_longer=num_steps % num_shares,
            first_step=cutlass.Int32(0),
            end_step=cutlass.Int32(0),
        )
        if cutlass.const_expr(config.even):
            first_step, end_step = self._first_step(tiles, tiles.share), self._first_step(tiles, tiles.share + 1)
            first = cutlass.max(first_step, 0) // num_k
            end = cutlass.select_((tiles.share >= 0) & (end_step > first_step), cute.ceil_div(end_step, num_k), first)
            tiles = tiles._replace(first=first, end=end, step=1, first_step=first_step, end_step=end_step)
        return tiles

    @cute.jit
    def _first_step(self, tiles: _Tiles, share: Any) -> Any:
        """Returns the first step of a share; behind the last share, how many steps there are."""
        return share * tiles.share_steps + cutlass.min(share, tiles.num_longer)

    @cute.jit
    def _share_of(self, tiles: _Tiles, step: Any) -> Any:
        """Returns the share that a step is in."""
        longer_steps = tiles.num_longer * (tiles.share_steps + 1)
        return cutlass.select_(
            step < longer_steps,
            step // (tiles.share_steps + 1),
            tiles.num_longer + (step - longer_steps) // cutlass.max(tiles.share_steps, 1),
        )

    @cute.jit
    def _steps(self, tiles: _Tiles, tile: Any) -> tuple[Any, Any]:
        """Returns the first step of K that this CTA has of a tile, and the one behind the last."""
        if cutlass.const_expr(self.config.even):
            before = tile * tiles.num_k
            return cutlass.max(tiles.first_step - before, 0), cutlass.min(tiles.end_step - before, tiles.num_k)
        if cutlass.const_expr(self.config.cluster_k > 1):
            return tuple((tiles.rank_k + i) * tiles.num_k // self.config.cluster_k for i in range(2))
        return cutlass.Int32(0), tiles.num_k

    def _exchange(self, mSums: cute.Tensor | None, mFlag: cute.Tensor | None) -> _Exchange:
        """Returns sums and flags as consumers index them."""
        config = self.config
        sums = flags = None
        if mSums is not None:
            shape = (4, WARPGROUP, config.sums_of_thread // 4, config.num_consumers, mSums.shape[0])
            sums = cute.make_tensor(mSums.iterator, cute.make_layout(shape))
        if mFlag is not None:
            flags = cute.make_tensor(mFlag.iterator, cute.make_layout((config.num_consumers, mFlag.shape[0])))
        return _Exchange(sums, flags)

    def _blocks(self, prepared: cute.Tensor, block_bytes: int) -> cute.Tensor:
        """Returns (word, blocks along k, blocks along n, experts) of prepared weights or scales."""
        num_experts, rows, columns = prepared.shape
        words = block_bytes // 4
        num_k, num_n = columns // (block_bytes // BLOCK_ROWS), rows // BLOCK_ROWS
        stride = (1, words, num_k * words, cutlass.Int64(num_k * words) * num_n)
        pointer = cute.recast_ptr(prepared.iterator, dtype=cutlass.Int32)
        return cute.make_tensor(pointer, cute.make_layout((words, num_k, num_n, num_experts), stride=stride))

    def _tiled_mma(self, width: int) -> cute.TiledMma:
        op = warpgroup.MmaF16BF16Op(
            cutlass.BFloat16,
            cutlass.Float32,
            (BLOCK_ROWS, width, MMA_K),
            warpgroup.OperandSource.RMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        return cute.make_tiled_mma(op)

    def _x_smem_layout(self) -> Any:
        """Returns (tile_n, TILE_K, stage) in the 128-byte swizzle."""
        config = self.config
        return hopper_helpers.make_smem_layout_b(
            tensor_utils.LayoutEnum.ROW_MAJOR, (BLOCK_ROWS, config.tile_n, TILE_K), cutlass.BFloat16, config.num_stages
        )

    def _x_units(self, layout: Any) -> Any:
        """Returns (tokens of a unit, TILE_K, units, stage) of (tile_n, TILE_K, stage)."""
        tokens = self.config.load_tokens
        (_, columns, (_, stages)), ((row, octet), column_stride, (_, stage)) = layout.shape, layout.stride
        return cute.make_layout(
            ((8, tokens // 8), columns, self.config.tile_n // tokens, stages),
            stride=((row, octet), column_stride, tokens * row, stage),
        )

    def _out_smem_layout(self) -> Any:
        """Returns (unit_tokens, 64, buffer, warpgroup) of BF16 in the 128-byte swizzle."""
        config = self.config
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, cutlass.BFloat16)
        shape = (config.unit_tokens, BLOCK_ROWS, config.num_buffers, config.num_consumers)
        return cute.tile_to_shape(atom, shape, order=(0, 1, 2, 3))

    def _allocate_smem(self) -> _Smem:
        config = self.config
        smem = memory.SmemAllocator()
        x_layout = self._x_smem_layout()
        # Swizzled buffers first: they want the largest alignment.
        sX = smem.allocate_tensor(cutlass.BFloat16, x_layout.outer, SWIZZLE_BYTES, x_layout.inner)
        blocks = (config.blocks, config.num_stages)
        sW = smem.allocate_tensor(cutlass.Int32, cute.make_layout((BLOCK_BYTES // 4, *blocks)), 128)
        # Sums take the place of the larger part of the stages.
        stages = sX if 2 * config.tile_n * TILE_K > config.blocks * BLOCK_BYTES else sW
        shape = (4, config.consumer_threads, config.blocks_of_warpgroup, config.store_n // 8, config.cluster_k)
        sSFW = smem.allocate_tensor(cutlass.Int32, cute.make_layout((BLOCK_SF_BYTES // 4, *blocks)), 128)
        if config.epilogue == BF16:
            # All before is whole periods of the swizzle.
            out_layout = self._out_smem_layout()
            sOut = smem.allocate_tensor(cutlass.BFloat16, out_layout.outer, SWIZZLE_BYTES, out_layout.inner)
        else:
            out_layout = cute.make_layout((TOKEN_WORDS, config.unit_tokens, config.num_consumers))
            sOut = smem.allocate_tensor(cutlass.Float32, out_layout, 128)
        return _Smem(
            sW=sW,
            sSFW=sSFW,
            sX=sX,
            sOut=sOut,
            sSums=cute.make_tensor(cute.recast_ptr(stages.iterator, dtype=cutlass.Float32), cute.make_layout(shape)),
            sTile=None
            if config.one_group
            else smem.allocate_tensor(cutlass.Int32, cute.make_layout(MAX_EXPERTS + 1), 16),
            full=smem.allocate_array(cutlass.Int64, config.num_stages),
            empty=smem.allocate_array(cutlass.Int64, config.num_stages),
            done=smem.allocate_array(cutlass.Int64, 1),
            left=smem.allocate_array(cutlass.Int64, 1),
        )


def grouped_gemm(
    mX: torch.Tensor,
    mW: torch.Tensor,
    mSFW: torch.Tensor,
    alpha: torch.Tensor,
    count: torch.Tensor | None,
    padded_offset: torch.Tensor | None,
    mD: torch.Tensor,
    h_scale: torch.Tensor | None = None,
    limit: float | None = None,
    *,
    epilogue: str,
    tokens: int,
    sums: torch.Tensor,
    n: int | None = None,
    d_group_rows: int = 0,
    d_group_columns: int = 0,
    constant_rows: bool = False,
    num_hit: int | None = None,
    max_active_clusters: int | None = None,
) -> None:
    """For each expert e and its rows r: mD[r] = finish(alpha[e] * mX[r] (e2m1(mW[e]) * mSFW[e])^T).

    Args:
        mX: (P, k) bf16 - tokens, those of expert e in rows padded_offset[e] .. + count[e] - 1; P may be 0.
        mW: (E, n up to 64, (k up to 128)/2) uint8 - codes of weights from `prepare_sm90`.
        mSFW: (E, n up to 64, (k up to 128)/16) uint8 - their block scales, likewise.
        alpha: bf16: (E, blocks) fp32 - factor of each n/blocks weight rows; SwiGLU: (E, 2) fp32 - of gate and of up.
        count: (E,) int32 - tokens of each expert, 0 or more; None, of one expert, if its tokens are all rows: that is faster.
        padded_offset: (E + 1,) int32 - first row of each expert, the end of the last is not used; None as count.
        mD: (rows, columns) bf16, 16-byte aligned rows, maybe further apart than they are long. Row r of expert e of the
            result, of n or n/2 columns, is row r - e * d_group_rows from column e * d_group_columns on; nothing else is
            written.
        h_scale: (E,) fp32 - input_scale of what follows, positive; swiglu_nvfp4 only.
        limit: of SwiGLU, positive; None for no clamp, and for bf16.
        epilogue: one of EPILOGUES.
        tokens: of the largest group, a guess: it chooses the kernel; any gives the same result up to the order of sums.
        sums: `sums_elements` int32, zeros at first - where CTAs leave sums for each other, and nobody else writes.
            Launches that may run at the same time need one each.
        n: weight rows without padding; None: as many as mW has.
        d_group_rows, d_group_columns: see mD.
        constant_rows: count and padded_offset are as constant as the weights, which had been written when the launch before
            this one began, or the stream was synchronised: weights are then loaded while earlier kernels still run.
        num_hit: experts with tokens, a guess, which chooses the kernel too; None: all.
        max_active_clusters: the most clusters to launch; None: one for each SM, or pair of SMs. Where clusters share tiles,
            there is one for each tile in any case.

    Raises:
        TypeError: a tensor is of another type, or is given or missing against the epilogue.
        ValueError: a shape, stride, device or address is not as above, k no multiple of 8 up to MAX_K, n no multiple of 8
            (SwiGLU: 32) or of blocks, E not in 1 .. 512, or a number is out of range.

    Numerics: products exact, sums FP32 in the tensor core, alpha in FP32, then one rounding to nearest even to BF16, or
    SwiGLU as `blackwell.swiglu` and one rounding to BF16 or to codes and scales as `round_block`. With even shares the order
    of sums depends on how many tokens all experts have, not on anything that varies from run to run.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream, nothing is
    allocated and nothing read back.
    """
    rows = mW.shape[1] if n is None else n
    check(
        mX, mW, mSFW, alpha, count, padded_offset, mD, h_scale, limit,
        epilogue=epilogue, tokens=tokens, sums=sums, n=rows, d_group_rows=d_group_rows,
        d_group_columns=d_group_columns, max_active_clusters=max_active_clusters,
    )  # fmt: skip
    if mX.shape[0] == 0 or mD.shape[0] == 0:
        return
    # One expert with a count is as several.
    num_groups = 1 if count is None else max(mW.shape[0], 2)
    config = choose_config(Shape(max(tokens, 1), rows, mX.shape[1], num_groups, num_hit), epilogue)
    if max_active_clusters is None:
        max_active_clusters = hopper.num_sms(mX.device) // config.cluster_w
    partial = flags = None
    if config.even:
        num_shares = min(max_active_clusters, hopper.num_sms(mX.device))
        partial, flags = _exchange(config, sums, num_shares)
        max_active_clusters = num_shares
    limit = math.inf if limit is None else limit
    compiled(config)(
        mX, mW, mSFW, alpha, count, padded_offset, mD, h_scale, partial, flags, limit, rows, d_group_rows, d_group_columns,
        int(constant_rows or count is None), max_active_clusters,
    )  # fmt: skip


def sums_elements(device: torch.device) -> int:
    """How many int32 `sums` of grouped_gemm has: sums without flags and flags, then sums with flags, for each SM."""
    return hopper.num_sms(device) * (_ZEROS_OF_SM + 128 * LARGE_TILE_N)


def zeros(sums: torch.Tensor) -> torch.Tensor:
    """Returns the part of `sums` that is zeros before and after every launch; the rest is anything."""
    return sums[: sums.numel() // (_ZEROS_OF_SM + 128 * LARGE_TILE_N) * _ZEROS_OF_SM]


def _exchange(config: Config, sums: torch.Tensor, num_shares: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns mSums and mFlag of so many shares; nothing that one configuration leaves is where another wants zeros."""
    elements, zero = config.tile_w * config.tile_n, zeros(sums)
    num_flags = len(zero) // _ZEROS_OF_SM * MAX_CONSUMERS
    if not config.flagged:
        return zero[num_flags:][: num_shares * elements].view(num_shares, elements), None
    flags = zero[: num_shares * config.num_consumers].view(num_shares, config.num_consumers)
    return sums[len(zero) :][: num_shares * elements].view(num_shares, elements), flags


def check(
    mX: torch.Tensor,
    mW: torch.Tensor,
    mSFW: torch.Tensor,
    alpha: torch.Tensor,
    count: torch.Tensor | None,
    padded_offset: torch.Tensor | None,
    mD: torch.Tensor,
    h_scale: torch.Tensor | None = None,
    limit: float | None = None,
    *,
    epilogue: str,
    tokens: int,
    sums: torch.Tensor,
    n: int,
    d_group_rows: int = 0,
    d_group_columns: int = 0,
    max_active_clusters: int | None = None,
) -> None:
    """Raises what grouped_gemm raises; reads no device memory."""
    _check_numbers(epilogue, limit, tokens, max_active_clusters)
    if min(d_group_rows, d_group_columns) < 0 or d_group_columns % BF16_UNIT:
        raise ValueError(
            f"grouped_gemm_sm90: d_group_rows and d_group_columns are {d_group_rows} and {d_group_columns}, expected 0 or "
            f"more, the latter a multiple of {BF16_UNIT}"
        )
    device = mX.device
    _check("mX", mX, torch.bfloat16, (None, None), device)
    k = mX.shape[1]
    _check("mW", mW, torch.uint8, (None, None, None), device)
    num_experts, padded_n, padded_k = mW.shape[0], mW.shape[1], mW.shape[2] * NVFP4.codes_per_byte
    _check_sizes(epilogue, num_experts, n, k)
    if (padded_n, padded_k) != (-(-n // BLOCK_ROWS) * BLOCK_ROWS, -(-k // BLOCK_K) * BLOCK_K):
        raise ValueError(
            f"grouped_gemm_sm90: mW is prepared for {padded_n} rows and {padded_k} columns, expected {n} and {k}, up to "
            f"multiples of {BLOCK_ROWS} and {BLOCK_K}; prepare it with cutedsl.prepare_sm90"
        )
    _check("mSFW", mSFW, torch.uint8, (num_experts, padded_n, padded_k // NVFP4.block_size), device)
    _check("alpha", alpha, torch.float32, (num_experts, None if epilogue == BF16 else 2), device, 4)
    if alpha.shape[1] < 1 or n % alpha.shape[1]:
        raise ValueError(f"grouped_gemm_sm90: alpha has {alpha.shape[1]} blocks, expected a divisor of n, which is {n}")
    if (count is None) != (padded_offset is None) or (count is None and num_experts > 1):
        given = [name for name, one in (("count", count), ("padded_offset", padded_offset)) if one is not None]
        raise TypeError(
            f"grouped_gemm_sm90: of count and padded_offset, {given or 'none'} are given for {num_experts} experts, expected "
            "both, or none for one expert"
        )
    if count is not None and padded_offset is not None:
        _check("count", count, torch.int32, (num_experts,), device, 4)
        _check("padded_offset", padded_offset, torch.int32, (num_experts + 1,), device, 4)
    _check("sums", sums, torch.int32, (None,), device)
    if sums.numel() != sums_elements(device):
        raise ValueError(
            f"grouped_gemm_sm90: sums has {sums.numel()} elements, expected {sums_elements(device)} (sums_elements)"
        )
    columns = (num_experts - 1) * d_group_columns + (n if epilogue == BF16 else n // 2)
    registry.check_tensor("grouped_gemm_sm90", "mD", mD, (torch.bfloat16,), (None, columns), device)
    if mD.shape[0] and (mD.stride(1) != 1 or mD.stride(0) % BF16_UNIT or mD.data_ptr() % TMA_BYTES):
        raise ValueError(
            f"grouped_gemm_sm90: mD has strides {mD.stride()} and starts at {mD.data_ptr():#x}, expected neighbouring "
            f"columns, rows apart by a multiple of {BF16_UNIT}, and a multiple of {TMA_BYTES} bytes"
        )
    if (h_scale is None) == (epilogue == SWIGLU_NVFP4):
        raise TypeError(
            f"grouped_gemm_sm90: h_scale is for {SWIGLU_NVFP4}, and only for it; the epilogue is {epilogue}"
        )
    if h_scale is not None:
        _check("h_scale", h_scale, torch.float32, (num_experts,), device, 4)


def _check_numbers(epilogue: str, limit: float | None, tokens: int, max_active_clusters: int | None) -> None:
    if epilogue not in EPILOGUES:
        raise ValueError(f"grouped_gemm_sm90: epilogue is {epilogue!r}, expected one of {EPILOGUES}")
    if limit is not None and (epilogue == BF16 or not limit > 0):
        raise ValueError(
            f"grouped_gemm_sm90: limit is {limit} with {epilogue}, expected a positive number with SwiGLU, or None"
        )
    if tokens < 0:
        raise ValueError(f"grouped_gemm_sm90: tokens is {tokens}, expected 0 or more")
    if max_active_clusters is not None and max_active_clusters < 1:
        raise ValueError(
            f"grouped_gemm_sm90: max_active_clusters is {max_active_clusters}, expected at least 1, or None"
        )


def _check_sizes(epilogue: str, num_experts: int, n: int, k: int) -> None:
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"grouped_gemm_sm90: mW has {num_experts} experts, expected 1 .. {MAX_EXPERTS}")
    if k not in range(K_MULTIPLE, MAX_K + 1, K_MULTIPLE):
        raise ValueError(
            f"grouped_gemm_sm90: k is {k}, expected a positive multiple of {K_MULTIPLE} up to {MAX_K}: TMA loads rows of 16 "
            "bytes; pad K, or split it"
        )
    multiple = N_MULTIPLE[epilogue]
    if n < multiple or n % multiple:
        raise ValueError(
            f"grouped_gemm_sm90: n is {n} with {epilogue}, expected a positive multiple of {multiple}; pad N"
        )


def _check(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    device: torch.device,
    align: int = TMA_BYTES,
) -> None:
    registry.check_tensor("grouped_gemm_sm90", name, tensor, (dtype,), shape, device)
    if not tensor.is_contiguous():
        raise ValueError(f"grouped_gemm_sm90: {name} has strides {tensor.stride()}, expected contiguous rows; copy it")
    if tensor.data_ptr() % align:
        raise ValueError(
            f"grouped_gemm_sm90: {name} starts at {tensor.data_ptr():#x}, expected a multiple of {align} bytes; "
            "a slice of a larger tensor may need a copy"
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
        None if config.one_group else matrix(cutlass.Int32, experts, align=4),
        None if config.one_group else matrix(cutlass.Int32, cute.sym_int(), align=4),
        make_fake_tensor(
            cutlass.BFloat16,
            (cute.sym_int(), cute.sym_int(divisibility=BF16_UNIT)),
            stride=(cute.sym_int64(divisibility=BF16_UNIT), 1),
            assumed_align=TMA_BYTES,
        ),
        matrix(cutlass.Float32, experts, align=4) if config.epilogue == SWIGLU_NVFP4 else None,
        matrix(cutlass.Int32, cute.sym_int(), config.tile_w * config.tile_n) if config.even else None,
        matrix(cutlass.Int32, cute.sym_int(), config.num_consumers, align=4) if config.flagged else None,
        cutlass.Float32(1.0),
        cutlass.Int32(1),
        cutlass.Int32(0),
        cutlass.Int32(0),
        cutlass.Int32(0),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
