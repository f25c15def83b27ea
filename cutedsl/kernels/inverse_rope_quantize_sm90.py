"""Input of wo_a on Hopper: the rotary embedding of the attention output undone, then rounded to NVFP4 by group, or not.

    bf16    e2m1 * block scale of what the rotation gives, exact in BF16: what a GEMM without FP4 multiplies
    copy    what the rotation gives, rounded to BF16 once

The hard part is that the result is that of two steps with a rounding between them: `cutedsl.reference.wo_a.inverse_rope`
gives BF16, and `unscaled_activation` takes that. A rotation is two products and a sum, each rounded to FP32: see
`cutedsl.kernels.rounding` for how they stay apart.

Row t of group g goes to row g * (T up to 128) + t. A thread has a part of 8 elements, all of one head, as in
`quantize_sm90`; those in the last rope_dim of a head are rotated back. Threads walk a grid-stride loop over the parts of a
group, and the second dimension of the grid is the group.
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
from cutedsl.kernels import hopper, quantize_sm90, quantize_sm100
from cutedsl.kernels.hopper import ARCHS, TMA_BYTES
from cutedsl.kernels.quantize_sm90 import BF16, COPY, THREADS
from cutedsl.kernels.quantize_sm100 import NARROW_LOAD, WIDE_LOAD
from cutedsl.kernels.round_block import PART
from cutedsl.kernels.rounding import rounded_product
from cutedsl.layout import TILE_COLUMNS, TILE_ROWS, padded_shape
from cutedsl.ops import registry

OUTPUTS = (BF16, COPY)
# That of `inverse_rope_quantize_sm100`, so that both serve the same models.
HEAD_MULTIPLE = NVFP4.block_size * TILE_COLUMNS
_PAIRS = PART // 2
_OP = "inverse_rope_quantize_sm90"


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of tokens, heads and groups.

    Attributes:
        output: BF16 or COPY.
        head_dim: elements of a head.
        rope_dim: rotated elements at the end of each head.
        load_bytes: of one load of o, WIDE_LOAD or NARROW_LOAD.
        arch: a key of ARCHS.
    """

    output: str
    head_dim: int = 512
    rope_dim: int = 64
    load_bytes: int = WIDE_LOAD
    arch: str = "sm_90a"

    @property
    def head_parts(self) -> int:
        """Parts of a head."""
        return self.head_dim // PART

    @property
    def first_rotated(self) -> int:
        """Of a head's parts the first that is rotated."""
        return (self.head_dim - self.rope_dim) // PART

    def validate(self) -> "Config":
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled.
        """
        if self.arch not in ARCHS:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(ARCHS)}")
        if self.output not in OUTPUTS:
            raise ValueError(f"Config: output is {self.output!r}, expected one of {OUTPUTS}")
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


def choose_config(o: torch.Tensor, rope_dim: int, output: str, arch: str = "sm_90a") -> Config:
    """The widest load that o's address and strides allow.

    Args:
        o: (T, num_heads, head_dim) bf16.
        rope_dim: rotated elements at the end of each head.
        output: BF16 or COPY.
        arch: a key of ARCHS.

    Returns:
        For a model's head_dim and rope_dim, and each output, one of two configurations.

    Raises:
        ValueError: output or arch is unknown, or the kernel cannot serve head_dim and rope_dim.
    """
    return Config(output, o.shape[-1], rope_dim, quantize_sm100.load_bytes(o), arch).validate()


class InverseRopeQuantizeSm90:
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
        mTensorScale: Any,
        mY: cute.Tensor,
        max_ctas: cutlass.Int32,
        stream: Any,
    ) -> None:
        """Launches at most max_ctas CTAs for each group.

        Args:
            mO: (T, H, head_dim) bf16.
            mPositions: (T,) int64.
            mCosSin: (max_pos, rope_dim) fp32.
            mTensorScale: (1,) fp32; None for COPY.
            mY: (G * T up to 128, D) bf16, D = H / G * head_dim.
            max_ctas: at least 1.
            stream: to launch on.
        """
        num_tokens = cute.size(mO, mode=[0])
        num_parts = cute.size(mY, mode=[1]) // PART
        num_groups = cute.size(mY, mode=[0]) // cute.round_up(num_tokens, TILE_ROWS)
        num_ctas = cutlass.min(cute.ceil_div(num_tokens * num_parts, THREADS), max_ctas)
        parts = cute.fast_divmod_create_divisor_v2(num_parts)
        self.kernel(mO, mPositions, mCosSin, mTensorScale, mY, parts).launch(
            grid=(num_ctas, num_groups, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=hopper.USE_PDL
        )

    @cute.kernel
    def kernel(
        self,
        mO: cute.Tensor,
        mPositions: cute.Tensor,
        mCosSin: cute.Tensor,
        mTensorScale: Any,
        mY: cute.Tensor,
        parts: cute.FastDivmodDivisorV2,
    ) -> None:
        """Walks the parts of a group; both parts of a block are in one pair of lanes, in the same step."""
        hopper.launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        cta, group, _ = cute.arch.block_idx()
        step = cute.arch.grid_dim()[0] * THREADS
        num_tokens = cute.size(mO, mode=[0])
        first_row = group * cute.round_up(num_tokens, TILE_ROWS)
        # Heads of a group lie side by side, and so do their parts.
        first_part = group * parts.divisor
        hopper.wait_for_prerequisites()
        tensor_scale = None
        if cutlass.const_expr(self.config.output != COPY):
            tensor_scale = mTensorScale[0]
        for index in cutlass.range(cta * THREADS + thread, num_tokens * parts.divisor, step, unroll=1):
            token, part = divmod(index, parts)
            head = (first_part + part) // self.config.head_parts
            head_part = (first_part + part) % self.config.head_parts
            numbers = quantize_sm90.load_part(mO, (token, head, head_part))
            if head_part >= self.config.first_rotated:
                mAngles = mCosSin[mPositions[token], None]
                self._rotate_back(numbers, mAngles, head_part - self.config.first_rotated)
            quantize_sm90.store_part(self.config.output, mY, None, first_row + token, part, numbers, tensor_scale)

    @cute.jit
    def _rotate_back(self, numbers: cute.Tensor, mAngles: cute.Tensor, part: Any) -> None:
        """(a, b) -> (a cos + b sin, b cos - a sin), rounded to BF16, for the pairs of a part.

        Args:
            numbers: 8 BF16, replaced.
            mAngles: (rope_dim,) fp32 - cosines, then sines, of this token.
            part: of the rotated parts of a head.
        """
        num_cosines = self.config.rope_dim // PART
        cos = cute.make_rmem_tensor(_PAIRS, cutlass.Float32)
        sin = cute.make_rmem_tensor(_PAIRS, cutlass.Float32)
        cute.autovec_copy(cute.local_tile(mAngles, (_PAIRS,), (part,)), cos)
        cute.autovec_copy(cute.local_tile(mAngles, (_PAIRS,), (num_cosines + part,)), sin)
        values = cute.make_rmem_tensor(PART, cutlass.Float32)
        values.store(numbers.load().to(cutlass.Float32))
        for i in cutlass.range_constexpr(_PAIRS):
            a, b = values[2 * i], values[2 * i + 1]
            values[2 * i] = rounded_product(a, cos[i]) + rounded_product(b, sin[i])
            values[2 * i + 1] = rounded_product(b, cos[i]) - rounded_product(a, sin[i])
        numbers.store(values.load().to(cutlass.BFloat16))


def inverse_rope(
    o: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    num_groups: int,
    y: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """y of group g = unscaled_activation(inverse_rope(o)[:, heads of g].flatten(1), tensor_scale), or without that.

    Args:
        o: (T, num_heads, head_dim) bf16 - head_dim a multiple of 64; tokens and heads may be strided; T may be 0.
        positions: (T,) int64 - below max_pos; values on the device are not checked.
        cos_sin_cache: (max_pos, rope_dim) fp32 - cosines of the rope_dim / 2 angles, then their sines; rope_dim a multiple
            of 16, at most head_dim.
        tensor_scale: (1,) fp32 - positive and finite (checked where runners are made); None: nothing is rounded to NVFP4.
        num_groups: G, divides num_heads.
        y: (G * T up to 128, D) bf16, D = num_heads / G * head_dim - group g at rows g * (T up to 128) and on.
        max_ctas: the most CTAs to launch for each group; None: `quantize_sm90.CTAS_PER_SM` for each SM.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape, stride, device or address is not as above, num_groups does not divide num_heads, there are more
            than 2^29 blocks, or max_ctas is less than 1.

    Layout: cos_sin_cache and y contiguous, their first bytes 16-byte aligned. Rows of padding keep what they held.
    Numerics: bit-identical to `cutedsl.reference.wo_a.inverse_rope`, then `unscaled_activation`; a NaN's bits are any NaN's.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream. Not verified on
    hardware.
    """
    check(o, positions, cos_sin_cache, tensor_scale, num_groups, y, max_ctas)
    if o.shape[0] == 0:
        return
    launch = compiled(choose_config(o, cos_sin_cache.shape[1], COPY if tensor_scale is None else BF16))
    launch(o, positions, cos_sin_cache, tensor_scale, y, quantize_sm90.most_ctas(o.device, max_ctas))


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes o, positions, cos_sin_cache, tensor_scale, y, unchecked and T > 0, and the most CTAs.

    Args:
        config: which kernel.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(InverseRopeQuantizeSm90, config, lambda: _stand_ins(config), config.arch, line_info)


def check(
    o: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    num_groups: int,
    y: torch.Tensor,
    max_ctas: int | None = None,
) -> None:
    """Raises what inverse_rope raises; reads no device memory."""
    registry.check_tensor(_OP, "o", o, (torch.bfloat16,), (None, None, None), o.device)
    num_tokens, num_heads, head_dim = o.shape
    registry.check_tensor(_OP, "positions", positions, (torch.int64,), (num_tokens,), o.device)
    registry.check_tensor(_OP, "cos_sin_cache", cos_sin_cache, (torch.float32,), (None, None), o.device)
    if tensor_scale is not None:
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
    quantize_sm90.check_y(_OP, y, rows, d_in, o.device)
    quantize_sm90.check_launch(_OP, rows, d_in, max_ctas)


def _stand_ins(config: Config) -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: symbolic sizes."""
    num_tokens = cute.sym_int()
    angles = (cute.sym_int(), config.rope_dim)
    return (
        quantize_sm100.source_stand_in((num_tokens, cute.sym_int()), config.head_dim, config.load_bytes),
        make_fake_compact_tensor(cutlass.Int64, (num_tokens,), assumed_align=8),
        make_fake_compact_tensor(cutlass.Float32, angles, stride_order=(1, 0), assumed_align=TMA_BYTES),
        None if config.output == COPY else make_fake_compact_tensor(cutlass.Float32, (1,), assumed_align=4),
        quantize_sm90.y_stand_in(cute.sym_int(divisibility=HEAD_MULTIPLE)),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
