"""NVFP4 linear: y = bf16(alpha * (Q(x) @ W^T)), weights packed until the moment they are multiplied.

The hard part is the tensor scales. Shards fused into one matrix (q_a and kv, gate and up) keep their own
weight_scale_2 and their own input_scale: alpha is therefore a vector over output columns, and the activation is
quantized once for each distinct input_scale, because a code depends on it.
"""

from typing import NamedTuple

import torch

from cutedsl.quantize import unscaled, unscaled_activation

# Weight elements decoded at a time: a tile stays in cache (3x faster on a CPU than whole matrices; one core, 4096 x
# 4096, 2026-11-20) and a large matrix never exists in fp32.
TILE_ELEMENTS = 1 << 20


class ScaleGroup(NamedTuple):
    """Output rows of a matrix that share an activation scale.

    Attributes:
        input_scale: () fp32 - tensor scale of the activation.
        row_spans: (start, end) of each run of weight rows.
    """

    input_scale: torch.Tensor
    row_spans: tuple[tuple[int, int], ...]


class PackedMatrix(NamedTuple):
    """A weight with everything its GEMM needs.

    Attributes:
        weight: (N, K/2) uint8 - packed codes.
        weight_scale: (N, K/16) e4m3 - block scales.
        alpha: (N,) fp32 - input_scale * weight_scale_2 of each row's shard; weight_scale_2 if there are no groups.
        scale_groups: the rows by distinct input_scale; together they cover 0 .. N - 1 once. Empty: activations are BF16
            and not quantized, whatever the input scales.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    alpha: torch.Tensor
    scale_groups: tuple[ScaleGroup, ...]


def unscaled_mm(a: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """y = a @ (e2m1 * weight_scale)^T.

    Args:
        a: (M, K) bfloat16 - codes times block scales of the activation, or the activation itself.
        weight: (N, K/2) uint8 - packed codes.
        weight_scale: (N, K/16) e4m3 - block scales.

    Returns:
        (M, N) fp32.

    Numerics: products exact, sums fp32; the order of summation is the BLAS library's. Operands are BF16 numbers, so
    settings that let fp32 matmuls round their operands (TF32, BF16) change nothing. Graph-safe apart from allocations.
    """
    num_rows = weight.shape[0]
    out = torch.empty(a.shape[0], num_rows, dtype=torch.float32, device=a.device)
    if a.shape[0] == 0:
        return out
    a_fp32 = a.float()
    tile_rows = max(1, TILE_ELEMENTS // a.shape[1])
    for start in range(0, num_rows, tile_rows):
        end = min(start + tile_rows, num_rows)
        tile = unscaled(weight[start:end], weight_scale[start:end], torch.float32)
        out[:, start:end] = torch.mm(a_fp32, tile.t())
    return out


def linear_fp32(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """y = alpha * (Q(x) @ W^T), not yet rounded; alpha * (bf16(x) @ W^T) if the matrix has no scale groups.

    Args:
        x: (M, K) bfloat16 or fp32.
        matrix: N x K.

    Returns:
        (M, N) fp32.

    Numerics: x quantized with each shard's own input_scale, or rounded to BF16 once; alpha in fp32. Graph-safe apart from
    its allocations.
    """
    if not matrix.scale_groups:
        return unscaled_mm(x.to(torch.bfloat16), matrix.weight, matrix.weight_scale).mul_(matrix.alpha)
    out = torch.empty(x.shape[0], matrix.weight.shape[0], dtype=torch.float32, device=x.device)
    for group in matrix.scale_groups:
        a = unscaled_activation(x, group.input_scale)
        for start, end in group.row_spans:
            out[:, start:end] = unscaled_mm(a, matrix.weight[start:end], matrix.weight_scale[start:end])
    return out.mul_(matrix.alpha)


def linear_of_unscaled(a: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """y = bf16(alpha * (a @ W^T)): linear without Q.

    Args:
        a: (M, K) bfloat16 - codes times block scales of the activation.
        matrix: N x K, of one scale group.

    Returns:
        (M, N) bfloat16.

    Numerics: as linear, bit for bit.
    """
    return unscaled_mm(a, matrix.weight, matrix.weight_scale).mul_(matrix.alpha).to(torch.bfloat16)


def linear(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """y = bf16(alpha * (Q(x) @ W^T)); bf16(alpha * (x @ W^T)) if the matrix has no scale groups.

    Args:
        x: (M, K) bfloat16.
        matrix: N x K.

    Returns:
        (M, N) bfloat16.

    Numerics: as linear_fp32, then one rounding to nearest even. Graph-safe apart from its allocations.
    """
    return linear_fp32(x, matrix).to(torch.bfloat16)
