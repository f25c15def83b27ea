"""Weights as checkpoints have them to weights as the sm100 kernels want them, once, when a layer is loaded, in place.

The hard part is memory. A layer's experts fill a good part of a GPU, so that nothing may exist twice: rows and scales are
permuted where they are, through copies of `gate_up.CHUNK_BYTES` at a time. Permuting in place also means that a tensor is
prepared exactly once; who needs it as it was must copy it before.

Two permutations are made:
  - block scales go to the 128x4 layout (`cutedsl.layout`). It pads, so that a matrix whose rows are no multiple of 128, or
    whose K is no multiple of 64, does not fit where it was: `needs_padding` says so, and such a matrix (a stack of them as
    a whole) gets a new tensor; whoever holds the old one should drop it. Of DeepSeek-V4's matrices, at any tensor-parallel
    size up to 16, only the indexer's weights_proj (64 rows) needs that, if it is not fused with a neighbour.
  - gate and up rows are interleaved, 16 gate rows, 16 up rows, ..., as a block of 16 h needs both in one place.

alpha, the product of an activation's and a weight's tensor scale, is formed here too: one FP32 product, as the reference
makes it.
"""

from typing import NamedTuple

import torch

from cutedsl.formats import NVFP4
from cutedsl.gate_up import CHUNK_BYTES, move_gate_up
from cutedsl.layout import TILE_ROWS, padded_shape, swizzle_block_scale, unswizzle_block_scale
from cutedsl.reference.linear import PackedMatrix

# Gate rows, then as many up rows: a block of the quantizer that follows.
INTERLEAVE = NVFP4.block_size


class Operand(NamedTuple):
    """Weights of one GEMM, or of one for each expert.

    Attributes:
        weight: (E, N, K/2) uint8 - packed codes.
        weight_scale: (E, N up to 128, K/16 up to 4) e4m3 - swizzled block scales.
        alpha: (E, R) fp32 - what to multiply each N/R rows of sums with.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    alpha: torch.Tensor


class LinearGroup(NamedTuple):
    """Output columns of a linear that share one quantization of the activation.

    Attributes:
        input_scale: (1,) fp32 - tensor scale of the activation.
        spans: (first column, operand) of each run of columns; E is 1, R is N.
    """

    input_scale: torch.Tensor
    spans: tuple[tuple[int, Operand], ...]


def needs_padding(num_rows: int, k: int) -> bool:
    """Whether the swizzled scales of a matrix are larger than the scales, so that they need a tensor of their own.

    Args:
        num_rows: N.
        k: K, a multiple of 16.

    Returns:
        False exactly if N is a multiple of 128 and K one of 64.
    """
    columns = k // NVFP4.block_size
    return padded_shape(num_rows, columns) != (num_rows, columns)


def interleave_gate_up(rows: torch.Tensor) -> None:
    """rows[32 b + r] = gate row 16 b + r, rows[32 b + 16 + r] = up row 16 b + r, for r = 0 .. 15; in place.

    Args:
        rows: (..., 2I, columns) contiguous, of any type - I gate rows, then I up rows; I a multiple of 16.

    Raises:
        ValueError: rows is neither a matrix nor a stack of them, not contiguous, or I no multiple of 16.

    Memory: as gate_up.move_gate_up. Numerics: elements are moved.
    """
    _move_gate_up(rows, inverse=False)


def deinterleave_gate_up(rows: torch.Tensor) -> None:
    """The inverse of interleave_gate_up, in place; takes and raises the same."""
    _move_gate_up(rows, inverse=True)


def swizzle(weight_scale: torch.Tensor) -> torch.Tensor:
    """Block scales in the 128x4 layout, in place where they fit (`needs_padding`).

    Args:
        weight_scale: (..., N, K/16) e4m3, contiguous - row-major; replaced if they fit, else left as they are.

    Returns:
        (..., N up to 128, K/16 up to 4) e4m3: weight_scale itself, or a new tensor.

    Raises:
        ValueError: weight_scale is not contiguous.

    Memory: beside the result twice CHUNK_BYTES, or 128 rows, if that is more. Numerics: bytes are moved, padding is 0.
    """
    _check_contiguous("swizzle", weight_scale)
    *stack, num_rows, num_columns = weight_scale.shape
    out = weight_scale
    if needs_padding(num_rows, num_columns * NVFP4.block_size):
        out = weight_scale.new_empty((*stack, *padded_shape(num_rows, num_columns)))
    # Blocks of rows follow one another in the layout too.
    rows = max(1, CHUNK_BYTES // (out.shape[-1] * TILE_ROWS)) * TILE_ROWS
    for source, target in zip(_matrices(weight_scale), _matrices(out), strict=True):
        for part, place in zip(source.split(rows), target.split(rows), strict=True):
            place.copy_(swizzle_block_scale(part))
    return out


def unswizzle(swizzled: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """The inverse of swizzle, in place where nothing was padded.

    Args:
        swizzled: (..., num_rows up to 128, num_columns up to 4) e4m3, contiguous.
        num_rows: N.
        num_columns: K/16.

    Returns:
        (..., N, K/16) e4m3: swizzled itself, or a new tensor.

    Raises:
        ValueError: the shape is not that of such scales, or swizzled is not contiguous.

    Memory, numerics: as swizzle.
    """
    _check_contiguous("unswizzle", swizzled)
    out = swizzled
    if needs_padding(num_rows, num_columns * NVFP4.block_size):
        out = swizzled.new_empty((*swizzled.shape[:-2], num_rows, num_columns))
    for source, target in zip(_matrices(swizzled), _matrices(out), strict=True):
        target.copy_(unswizzle_block_scale(source, num_rows, num_columns))
    return out


def prepare_linear(matrix: PackedMatrix) -> tuple[LinearGroup, ...]:
    """A linear's scales swizzled, run of columns by run of columns; its codes stay as they are.

    Args:
        matrix: checked; weight_scale is replaced where a run of rows with the same input_scale fits (`needs_padding`).

    Returns:
        One LinearGroup for each distinct input_scale.

    Memory: as swizzle, of the largest run. Reads nothing back.
    """
    return tuple(
        LinearGroup(
            group.input_scale.view(1),
            tuple(
                (
                    start,
                    Operand(
                        matrix.weight[start:end].unsqueeze(0),
                        swizzle(matrix.weight_scale[start:end].unsqueeze(0)),
                        matrix.alpha[start:end].unsqueeze(0),
                    ),
                )
                for start, end in group.row_spans
            ),
        )
        for group in matrix.scale_groups
    )


def prepare_experts(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    input_scale: torch.Tensor,
) -> Operand:
    """A stack of matrices for a grouped GEMM: scales swizzled; of gate and up matrices rows interleaved too. In place.

    Args:
        weight: (E, N, K/2) uint8, contiguous - replaced if it is of gates and ups.
        weight_scale: (E, N, K/16) e4m3, contiguous - replaced where it fits (`needs_padding`).
        weight_scale_2: (E,) fp32 - tensor scale of each matrix; (E, 2), of the gate and of the up rows, says that
            matrices are N/2 gate rows, then N/2 up rows.
        input_scale: fp32 - likewise.

    Returns:
        Operand with alpha of weight_scale_2's shape, (E, 1) for (E,).

    Raises:
        ValueError: a tensor is not contiguous, or N/2, of gates and ups, no multiple of 16.

    Memory: as swizzle, and the result's scales where padding is needed.
    Numerics: alpha is one FP32 product. Reads nothing back.
    """
    if weight_scale_2.ndim == 2:
        interleave_gate_up(weight)
        interleave_gate_up(weight_scale)
    alpha = (input_scale * weight_scale_2).view(weight.shape[0], -1)
    return Operand(weight, swizzle(weight_scale), alpha)


def restore_experts(operand: Operand, k: int, gate_up: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of prepare_experts, in place where that was: the operand must not be used any more.

    Args:
        operand: from prepare_experts.
        k: K.
        gate_up: rows are interleaved.

    Returns:
        weight (E, N, K/2) and weight_scale (E, N, K/16), as they were.
    """
    weight_scale = unswizzle(operand.weight_scale, operand.weight.shape[1], k // NVFP4.block_size)
    if gate_up:
        deinterleave_gate_up(operand.weight)
        deinterleave_gate_up(weight_scale)
    return operand.weight, weight_scale


def _move_gate_up(rows: torch.Tensor, inverse: bool) -> None:
    function = "deinterleave_gate_up" if inverse else "interleave_gate_up"
    _check_contiguous(function, rows)
    if rows.shape[-2] % (2 * INTERLEAVE):
        raise ValueError(
            f"{function}: rows have shape {tuple(rows.shape)}, expected as many gate as up rows, a multiple of {INTERLEAVE} "
            "each; use a tensor-parallel size that does not cut a block"
        )
    move_gate_up(rows, INTERLEAVE, inverse)


def _matrices(stack: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrices of a stack, as views of bytes if an element is one byte: not every device copies every 8-bit type."""
    if stack.element_size() == 1:
        stack = stack.view(torch.uint8)
    return stack.view(-1, *stack.shape[-2:]).unbind(0)


def _check_contiguous(function: str, rows: torch.Tensor) -> None:
    if rows.ndim < 2 or not rows.is_contiguous():
        raise ValueError(
            f"{function}: rows have shape {tuple(rows.shape)} and strides {rows.stride()}, expected a matrix or a stack of "
            "them, contiguous: rows are moved in place"
        )
