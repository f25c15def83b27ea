"""Input of wo_a on Blackwell: the rotary embedding of the attention output undone, then NVFP4 quantization by group.

The hard part is that the result is that of two steps with a rounding between them: `cutedsl.reference.wo_a.inverse_rope`
gives BF16, and `quantize_activation` takes that. A rotation is two products and a sum, each rounded to FP32; a compiler is
free to fuse a product and a sum of ordinary operators, so the packed instructions with an explicit rounding are used, which
stay as they are. Then a number goes to BF16 and back before it is quantized.

Row t of group g goes to row g * (T up to 128) + t of codes and scales, as every group's scales are whole tiles. A thread
takes a block of 16 elements, all of one head; those in the last rope_dim of a head are rotated back. Threads walk a
grid-stride loop over the blocks of a group, and the second dimension of the grid is the group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from cutedsl import compile as compiler
from cutedsl.formats import NVFP4
from cutedsl.kernels import quantize_block, quantize_sm100
from cutedsl.kernels.blackwell import ARCHS, TMA_BYTES
from cutedsl.kernels.quantize_sm100 import NARROW_LOAD, THREADS, WIDE_LOAD
from cutedsl.kernels.rounding import rounded_product
from cutedsl.layout import TILE_COLUMNS, TILE_ROWS, padded_shape
from cutedsl.ops import registry

# A head is whole scale tiles of 4 blocks, so that no row has padding.
HEAD_MULTIPLE = NVFP4.block_size * TILE_COLUMNS
_PAIRS = NVFP4.block_size // 2
_OP = "inverse_rope_quantize_sm100"


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of tokens, heads and groups.

    Attributes:
        head_dim: elements of a head.
        rope_dim: rotated elements at the end of each head.
        load_bytes: of one load of o, WIDE_LOAD or NARROW_LOAD.
        arch: a key of ARCHS.
    """

    head_dim: int = 512
    rope_dim: int = 64
    load_bytes: int = WIDE_LOAD
    arch: str = "sm_100a"

    @property
    def head_blocks(self) -> int:
        """Blocks of a head."""
        return self.head_dim // NVFP4.block_size

    @property
    def first_rotated(self) -> int:
        """Of a head's blocks the first that is rotated."""
        return (self.head_dim - self.rope_dim) // NVFP4.block_size

    def validate(self) -> "Config":
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled.
        """
        if self.arch not in ARCHS:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(ARCHS)}")
        if self.load_bytes not in (WIDE_LOAD, NARROW_LOAD):
            raise ValueError(f"Config: load_bytes is {self.load_bytes}, expected {WIDE_LOAD} or {NARROW_LOAD}")
        if self.head_dim < HEAD_MULTIPLE or self.head_dim % HEAD_MULTIPLE:
            raise ValueError(f"Config: head_dim is {self.head_dim}, expected a positive multiple of {HEAD_MULTIPLE}")
        if not 0 < self.rope_dim <= self.head_dim or self.rope_dim % NVFP4.block_size:
            raise ValueError(
                f"Config: rope_dim is {self.rope_dim}, expected a positive multiple of {NVFP4.block_size}, at most "
                f"{self.head_dim}"
            )
        return self


def choose_config(o: torch.Tensor, rope_dim: int, arch: str = "sm_100a") -> Config:
    """The widest load that o's address and strides allow.

    Args:
        o: (T, num_heads, head_dim) bf16.
        rope_dim: rotated elements at the end of each head.
        arch: a key of ARCHS.

    Returns:
        For a model's head_dim and rope_dim one of two configurations.

    Raises:
        ValueError: arch is unknown, or the kernel cannot serve head_dim and rope_dim.
    """
    return Config(o.shape[-1], rope_dim, quantize_sm100.load_bytes(o), arch).validate()


class InverseRopeQuantizeSm100:
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.validate()

    @cute.jit
    def __call__(
        self,
        mO: cute.Tensor,
        mPositions: cute.Tensor,
        mCosSin: cute.Tensor,
        mTensorScale: cute.Tensor,
        mCodes_packed: cute.Tensor,
        mSF_bytes: cute.Tensor,
        max_ctas: cutlass.Int32,
        stream: Any,
    ) -> None:
        """Launches at most max_ctas CTAs for each group.

        Args:
            mO: (T, H, head_dim) bf16.
            mPositions: (T,) int64.
            mCosSin: (max_pos, rope_dim) fp32.
            mTensorScale: (1,) fp32.
            mCodes_packed: (G * T up to 128, D/2) uint8, D = H / G * head_dim.
            mSF_bytes: (G * T up to 128, D/16) e4m3.
            max_ctas: at least 1.
            stream: to launch on.
        """
        num_tokens = cute.size(mO, mode=[0])
        mCodes = quantize_block.block_codes(mCodes_packed)
        num_blocks = cute.size(mCodes, mode=[1])
        mSF = quantize_block.swizzled_scales(mSF_bytes, num_blocks)
        num_groups = cute.size(mCodes, mode=[0]) // cute.round_up(num_tokens, TILE_ROWS)
        num_ctas = cutlass.min(cute.ceil_div(num_tokens * num_blocks, THREADS), max_ctas)
        blocks = cute.fast_divmod_create_divisor_v2(num_blocks)
        self.kernel(mO, mPositions, mCosSin, mTensorScale, mCodes, mSF, blocks).launch(
            grid=(num_ctas, num_groups, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mO: cute.Tensor,
        mPositions: cute.Tensor,
        mCosSin: cute.Tensor,
        mTensorScale: cute.Tensor,
        mCodes: cute.Tensor,
        mSF: cute.Tensor,
        blocks: cute.FastDivmodDivisorV2,
    ) -> None:
        """Walks the blocks of a group."""
        thread, _, _ = cute.arch.thread_idx()
        cta, group, _ = cute.arch.block_idx()
        step = cute.arch.grid_dim()[0] * THREADS
        num_tokens = cute.size(mO, mode=[0])
        first_row = group * cute.round_up(num_tokens, TILE_ROWS)
        # Heads of a group lie side by side, and so do their blocks.
        first_block = group * blocks.divisor
        tensor_scale = mTensorScale[0]
        for index in cutlass.range(cta * THREADS + thread, num_tokens * blocks.divisor, step, unroll=1):
            token, block = divmod(index, blocks)
            head = (first_block + block) // self.config.head_blocks
            head_block = (first_block + block) % self.config.head_blocks
            values = quantize_sm100.load_block(mO, (token, head, head_block))
            if head_block >= self.config.first_rotated:
                mAngles = mCosSin[mPositions[token], None]
                self._rotate_back(values, mAngles, head_block - self.config.first_rotated)
            quantize_block.store_block(mCodes, mSF, first_row + token, block, values, tensor_scale)

    @cute.jit
    def _rotate_back(self, values: cute.Tensor, mAngles: cute.Tensor, block: Any) -> None:
        """(a, b) -> (a cos + b sin, b cos - a sin), rounded to BF16, for the pairs of a block.

        Args:
            values: 16 FP32, replaced.
            mAngles: (rope_dim,) fp32 - cosines, then sines, of this token.
            block: of the rotated blocks of a head.
        """
        num_cosines = self.config.rope_dim // NVFP4.block_size
        # Half a block's angles at a time: with all 16 in registers ptxas spills where o is loaded by elements.
        cos = cute.make_rmem_tensor(_PAIRS // 2, cutlass.Float32)
        sin = cute.make_rmem_tensor(_PAIRS // 2, cutlass.Float32)
        for half in cutlass.range_constexpr(2):
            cute.autovec_copy(cute.local_tile(mAngles, (_PAIRS // 2,), (2 * block + half,)), cos)
            cute.autovec_copy(cute.local_tile(mAngles, (_PAIRS // 2,), (2 * (num_cosines + block) + half,)), sin)
            for i in cutlass.range_constexpr(_PAIRS // 2):
                at = half * _PAIRS + 2 * i
                a, b = values[at], values[at + 1]
                by_cos = rounded_product(a, cos[i]), rounded_product(b, cos[i])
                # b cos - a sin is b cos + a (-sin), to the last bit.
                by_sin = rounded_product(b, sin[i]), rounded_product(a, -sin[i])
                values[at], values[at + 1] = cute.arch.add_packed_f32x2(by_cos, by_sin, rnd="rn")
        values.store(values.load().to(cutlass.BFloat16).to(cutlass.Float32))


def inverse_rope_quantize(
    o: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    tensor_scale: torch.Tensor,
    num_groups: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """codes, scales of group g = quantize_activation(inverse_rope(o)[:, heads of g].flatten(1), tensor_scale).

    Args:
        o: (T, num_heads, head_dim) bf16 - head_dim a multiple of 64; tokens and heads may be strided; T may be 0.
        positions: (T,) int64 - below max_pos; values on the device are not checked.
        cos_sin_cache: (max_pos, rope_dim) fp32 - cosines of the rope_dim / 2 angles, then their sines; rope_dim a multiple
            of 16, at most head_dim.
        tensor_scale: (1,) fp32 - positive and finite (checked where runners are made).
        num_groups: G, divides num_heads.
        codes: (G * T up to 128, D/2) uint8, D = num_heads / G * head_dim - group g at rows g * (T up to 128) and on.
        scales: (G * T up to 128, D/16) e4m3 - likewise, in 128x4 tiles.
        max_ctas: the most CTAs to launch for each group; None: CTAS_PER_SM for each SM.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape, stride, device or address is not as above, num_groups does not divide num_heads, there are more
            than 2^30 blocks, or max_ctas is less than 1.

    Layout: cos_sin_cache and outputs contiguous, their first bytes 16-byte aligned; scales see `cutedsl.layout`. Rows of
    padding keep what they held.
    Numerics: bit-identical to `cutedsl.reference.wo_a.inverse_rope`, then `quantize_activation`.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream.
    """
    check(o, positions, cos_sin_cache, tensor_scale, num_groups, codes, scales, max_ctas)
    if o.shape[0] == 0:
        return
    launch = compiled(choose_config(o, cos_sin_cache.shape[1]))
    num_ctas = quantize_sm100.most_ctas(o.device, max_ctas)
    launch(o, positions, cos_sin_cache, tensor_scale, codes, scales, num_ctas)


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes inverse_rope_quantize's tensors, unchecked and T > 0, and the most CTAs.

    Args:
        config: which kernel.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(InverseRopeQuantizeSm100, config, lambda: _stand_ins(config), config.arch, line_info)


def check(
    o: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    tensor_scale: torch.Tensor,
    num_groups: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """Raises what inverse_rope_quantize raises; reads no device memory."""
    registry.check_tensor(_OP, "o", o, (torch.bfloat16,), (None, None, None), o.device)
    num_tokens, num_heads, head_dim = o.shape
    registry.check_tensor(_OP, "positions", positions, (torch.int64,), (num_tokens,), o.device)
    registry.check_tensor(_OP, "cos_sin_cache", cos_sin_cache, (torch.float32,), (None, None), o.device)
    registry.check_tensor(_OP, "tensor_scale", tensor_scale, (torch.float32,), (1,), o.device)
    rope_dim = cos_sin_cache.shape[1]
    if head_dim < HEAD_MULTIPLE or head_dim % HEAD_MULTIPLE:
        raise ValueError(f"{_OP}: head_dim is {head_dim}, expected a positive multiple of {HEAD_MULTIPLE}")
    if not 0 < rope_dim <= head_dim or rope_dim % NVFP4.block_size:
        raise ValueError(
            f"{_OP}: cos_sin_cache has shape {tuple(cos_sin_cache.shape)}, expected rows of a positive multiple of "
            f"{NVFP4.block_size}, at most head_dim = {head_dim}"
        )
    if not cos_sin_cache.is_contiguous() or cos_sin_cache.data_ptr() % TMA_BYTES:
        raise ValueError(
            f"{_OP}: cos_sin_cache has strides {cos_sin_cache.stride()} and starts at {cos_sin_cache.data_ptr():#x}, "
            f"expected contiguous rows from a multiple of {TMA_BYTES} bytes on; copy it once"
        )
    if num_groups < 1 or num_heads < 1 or num_heads % num_groups:
        raise ValueError(f"{_OP}: num_groups is {num_groups}, expected a divisor of {num_heads} heads")
    rows, d_in = num_groups * padded_shape(num_tokens, 0)[0], num_heads // num_groups * head_dim
    quantize_sm100.check_outputs(_OP, codes, scales, rows, d_in, o.device)
    quantize_sm100.check_launch(_OP, rows, d_in, max_ctas)


def _stand_ins(config: Config) -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: symbolic sizes."""
    num_tokens = cute.sym_int()
    angles = (cute.sym_int(), config.rope_dim)
    return (
        quantize_sm100.source_stand_in((num_tokens, cute.sym_int()), config.head_dim, config.load_bytes),
        make_fake_compact_tensor(cutlass.Int64, (num_tokens,), assumed_align=8),
        make_fake_compact_tensor(cutlass.Float32, angles, stride_order=(1, 0), assumed_align=TMA_BYTES),
        make_fake_compact_tensor(cutlass.Float32, (1,), assumed_align=4),
        *quantize_sm100.output_stand_ins(),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
