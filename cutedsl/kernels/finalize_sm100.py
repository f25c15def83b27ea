"""Last step of the routed experts on Blackwell: each token gathers its experts' rows, weighted, and is rounded once.

    out[t] = bf16(sum over j of topk_weights[t, j] * y[choice_row[t, j]] + shared[t])

The hard part is to give the same bits whatever the batch: a sum per token in the order of its choices, instead of atomic
adds by rows in the order in which experts finish. The rows are where `route_sm100` put them, so that a token reads
exactly its own, and a choice without an expert on this rank is skipped, not multiplied by 0: nobody wrote its row.

A product and the sum after it must be rounded apart, and that takes more than not writing a fused multiply-add. PTX lets
the assembler fuse `mul` and `add` that do not name their rounding, as CuTe DSL's do not. The assembler (ptxas 12.9, seen in
its sm_100a code) fuses the packed `mul.rn.f32x2` and `add.rn.f32x2` too, though they name it; `mul.rn.f32` it leaves alone.

A CTA has 8 columns a thread of one token. All rows are asked for before the first is used, so that loads can overlap.
`finalize_sm90` is this kernel too, with scalar sums.

Names: mY, gY, rY the whole tensor, a row of it, a thread's registers; vector 8 neighbouring columns.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from cutedsl import compile as compiler
from cutedsl.kernels.blackwell import ARCHS, WARP
from cutedsl.kernels.rounding import rounded_product
from cutedsl.ops import registry

# Columns of a thread: 16 bytes of BF16.
VECTOR = 8
VECTOR_BYTES = 16
MAX_TOP_K = 16
MAX_THREADS = 1024
# CTAs along x, one for each token. Source: CUDA C++ Programming Guide, "Compute Capabilities".
MAX_TOKENS = 2**31 - 1

_Y_TYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Config:
    """One compiled kernel; it serves every number of tokens and of columns.

    Attributes:
        top_k: choices of a token.
        y_fp32: y is FP32, not BF16.
        shared: a shared expert's output is added.
        num_threads: of a CTA; its tile is 8 times as many columns.
        arch: one of archs.
        archs: those that the kernel is for.
        packed: there is an instruction for two sums.
    """

    archs: ClassVar[Collection[str]] = ARCHS
    packed: ClassVar[bool] = True

    top_k: int
    y_fp32: bool = False
    shared: bool = False
    num_threads: int = 128
    arch: str = "sm_100a"

    def validate(self) -> Self:
        """Returns itself.

        Raises:
            ValueError: the kernel could not be compiled, or could not run on the architecture.
        """
        if self.arch not in self.archs:
            raise ValueError(f"Config: arch is {self.arch!r}, expected one of {sorted(self.archs)}")
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"Config: top_k is {self.top_k}, expected 1 .. {MAX_TOP_K}")
        if self.num_threads % WARP or not WARP <= self.num_threads <= MAX_THREADS:
            raise ValueError(
                f"Config: num_threads is {self.num_threads}, expected a multiple of {WARP} up to {MAX_THREADS}"
            )
        return self


def choose_config(top_k: int, y_fp32: bool, shared: bool, arch: str = "sm_100a") -> Config:
    """128 threads, 1024 columns: a row of 7168 columns is 7 CTAs, so that a single token has some SMs at work.

    Args:
        top_k: choices of a token.
        y_fp32: y is FP32, not BF16.
        shared: a shared expert's output is added.
        arch: a key of ARCHS.

    Returns:
        The one configuration of a model.

    Raises:
        ValueError: a value is outside its range.

    The choice has not been measured on a B200.
    """
    return Config(top_k, y_fp32, shared, arch=arch).validate()


class FinalizeSm100:
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.validate()

    @property
    def use_pdl(self) -> bool:
        """Launches overlap: see `hopper`, of which alone this is made use of."""
        return False

    @cute.jit
    def __call__(
        self,
        mY: cute.Tensor,
        mChoiceRow: cute.Tensor,
        mTopkWeights: cute.Tensor,
        mShared: cute.Tensor | None,
        mOut: cute.Tensor,
        stream: Any,
    ) -> None:
        """Launches (T, column tiles) CTAs.

        Args:
            mY: (P, H) bf16 or fp32.
            mChoiceRow: (T * top_k,) int32.
            mTopkWeights: (T, top_k) fp32.
            mShared: (T, H) bf16, or None.
            mOut: (T, H) bf16.
            stream: to launch on.
        """
        num_tokens, num_columns = mOut.shape
        grid = (num_tokens, cute.ceil_div(num_columns, VECTOR * self.config.num_threads), 1)
        self.kernel(mY, mChoiceRow, mTopkWeights, mShared, mOut).launch(
            grid=grid, block=(self.config.num_threads, 1, 1), stream=stream, use_pdl=self.use_pdl
        )

    @cute.kernel
    def kernel(
        self,
        mY: cute.Tensor,
        mChoiceRow: cute.Tensor,
        mTopkWeights: cute.Tensor,
        mShared: cute.Tensor | None,
        mOut: cute.Tensor,
    ) -> None:
        """Gather, sum, round: each thread its vector of columns."""
        if cutlass.const_expr(self.use_pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        thread, _, _ = cute.arch.thread_idx()
        token, tile, _ = cute.arch.block_idx()
        vector = tile * self.config.num_threads + thread
        if vector * VECTOR < mOut.shape[1]:
            choices = range(self.config.top_k)
            rows = [mChoiceRow[token * self.config.top_k + choice] for choice in choices]
            weights = [mTopkWeights[token, choice] for choice in choices]
            rY = self._gather(mY, rows, vector)
            rAcc = self._sum(rY, rows, weights)
            if cutlass.const_expr(self.config.shared):
                rShared = cute.make_rmem_tensor((VECTOR,), cutlass.BFloat16)
                cute.autovec_copy(_vector(mShared, token, vector), rShared)
                self._add(rAcc, rShared, None)
            rOut = cute.make_rmem_tensor((VECTOR,), cutlass.BFloat16)
            rOut.store(rAcc.load().to(cutlass.BFloat16))
            cute.autovec_copy(rOut, _vector(mOut, token, vector))

    @cute.jit
    def _gather(self, mY: cute.Tensor, rows: Any, vector: Any) -> cute.Tensor:
        """Returns (VECTOR, top_k): the thread's columns of each choice's row; of no row, anything."""
        rY = cute.make_rmem_tensor((VECTOR, self.config.top_k), mY.element_type)
        for choice in cutlass.range_constexpr(self.config.top_k):
            if rows[choice] >= 0:
                cute.autovec_copy(_vector(mY, rows[choice], vector), rY[None, choice])
        return rY

    @cute.jit
    def _sum(self, rY: cute.Tensor, rows: Any, weights: Any) -> cute.Tensor:
        """Returns (VECTOR,) FP32: the choices in order; a product is rounded before it is added."""
        rAcc = cute.make_rmem_tensor((VECTOR,), cutlass.Float32)
        rAcc.fill(0.0)
        for choice in cutlass.range_constexpr(self.config.top_k):
            if rows[choice] >= 0:
                self._add(rAcc, rY[None, choice], weights[choice])
        return rAcc

    def _add(self, rAcc: cute.Tensor, rTerm: cute.Tensor, weight: Any) -> None:
        """Adds a vector, times weight if there is one, to the sum."""
        for i in range(0, VECTOR, 2):
            term = tuple(rTerm[j].to(cutlass.Float32) for j in (i, i + 1))
            if weight is not None:
                term = tuple(rounded_product(factor, weight) for factor in term)
            if self.config.packed:
                rAcc[i], rAcc[i + 1] = cute.arch.add_packed_f32x2((rAcc[i], rAcc[i + 1]), term, rnd="rn")
            else:
                rAcc[i], rAcc[i + 1] = rAcc[i] + term[0], rAcc[i + 1] + term[1]


def _vector(tensor: cute.Tensor, row: Any, vector: Any) -> cute.Tensor:
    """Returns (VECTOR,) columns of a row of a matrix in global memory."""
    return cute.local_tile(tensor, (1, VECTOR), (row, vector))[0, None]


def finalize(
    mY: torch.Tensor,
    choice_row: torch.Tensor,
    topk_weights: torch.Tensor,
    shared: torch.Tensor | None,
    mOut: torch.Tensor,
) -> None:
    """mOut[t] = bf16(sum over j of topk_weights[t, j] * mY[choice_row[t, j]] + shared[t]).

    Args:
        mY: (P, H) bf16 or fp32 - expert outputs at padded rows; rows that no choice names may hold anything.
        choice_row: (T * top_k,) int32 - row of choice (t, j) at t * top_k + j, as route_sm100 gives it: -1 is skipped, no
            other value is outside 0 .. P - 1. Values are not checked, as that would read them back.
        topk_weights: (T, top_k) fp32.
        shared: (T, H) bf16 - the shared expert's output, or None.
        mOut: (T, H) bf16 - written completely; T may be 0.

    Raises:
        TypeError: a tensor is of another type.
        ValueError: a shape, stride, device or address is not as above, H no multiple of 8, or top_k not in 1 .. 16.

    Layout: all contiguous; first bytes of mY, shared and mOut 16-byte aligned. mOut may be shared itself.
    Numerics: bit-identical to `cutedsl.routing.reduce_slots`: from 0, for j = 0, 1, ... the product in FP32, rounded, then
    the sum in FP32; no fused multiply-add, no flush to zero. Then shared is added in FP32, last, and the sum is rounded
    to nearest even once. Deterministic and independent of other tokens; zero for a token without expert and shared.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream. Not verified on
    hardware.
    """
    check(mY, choice_row, topk_weights, shared, mOut)
    if mOut.shape[0] == 0:
        return
    config = choose_config(topk_weights.shape[1], mY.dtype == torch.float32, shared is not None)
    compiled(config)(mY, choice_row, topk_weights, shared, mOut)


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes finalize's tensors, unchecked and T > 0.

    Args:
        config: which kernel.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(FinalizeSm100, config, lambda: stand_ins(config), config.arch, line_info)


def check(
    mY: torch.Tensor,
    choice_row: torch.Tensor,
    topk_weights: torch.Tensor,
    shared: torch.Tensor | None,
    mOut: torch.Tensor,
) -> None:
    """Raises what finalize raises; reads no device memory."""
    _check("mOut", mOut, (torch.bfloat16,), (None, None), mOut)
    num_tokens, num_columns = mOut.shape
    if num_columns < VECTOR or num_columns % VECTOR:
        raise ValueError(
            f"finalize: H is {num_columns}, expected a positive multiple of {VECTOR}: a thread has 16 bytes; pad H"
        )
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"finalize: {num_tokens} tokens, expected at most {MAX_TOKENS}; split the batch")
    _check("topk_weights", topk_weights, (torch.float32,), (num_tokens, None), mOut)
    top_k = topk_weights.shape[1]
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"finalize: top_k is {top_k}, expected 1 .. {MAX_TOP_K}")
    _check("choice_row", choice_row, (torch.int32,), (num_tokens * top_k,), mOut)
    _check("mY", mY, _Y_TYPES, (None, num_columns), mOut)
    if shared is not None:
        _check("shared", shared, (torch.bfloat16,), (num_tokens, num_columns), mOut)
    for name, tensor in (("mY", mY), ("shared", shared), ("mOut", mOut)):
        if tensor is not None and tensor.data_ptr() % VECTOR_BYTES:
            raise ValueError(
                f"finalize: {name} starts at {tensor.data_ptr():#x}, expected a multiple of {VECTOR_BYTES} bytes; "
                "a slice of a larger tensor may need a copy"
            )


def _check(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...], out: torch.Tensor
) -> None:
    registry.check_tensor("finalize", name, tensor, dtypes, shape, out.device)
    if not tensor.is_contiguous():
        raise ValueError(f"finalize: {name} has strides {tensor.stride()}, expected contiguous rows; copy it")


def stand_ins(config: Config) -> tuple[Any, ...]:
    """Returns what the kernel is compiled with: finalize's arguments with symbolic sizes."""
    num_tokens, num_columns = cute.sym_int(), cute.sym_int(divisibility=VECTOR)

    def matrix(dtype: Any, rows: Any) -> Any:
        return make_fake_compact_tensor(dtype, (rows, num_columns), stride_order=(1, 0), assumed_align=VECTOR_BYTES)

    return (
        matrix(cutlass.Float32 if config.y_fp32 else cutlass.BFloat16, cute.sym_int()),
        make_fake_compact_tensor(cutlass.Int32, (cute.sym_int(),)),
        make_fake_compact_tensor(cutlass.Float32, (num_tokens, config.top_k), stride_order=(1, 0)),
        matrix(cutlass.BFloat16, num_tokens) if config.shared else None,
        matrix(cutlass.BFloat16, num_tokens),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
