"""NVFP4 wo_a: undo the rotary embedding of the attention output, then one small matrix per group of heads.

The hard part is layout: heads of a group lie side by side in (T, G, D), each group meets only its own rows of the
weight, and the result is group-major in columns, ready for wo_b. The rotation is GPT-J's (neighbours form a pair), and
it is undone because the attention output is a sum of rows rotated by their own positions.
"""

import torch

from cutedsl.quantize import unscaled_activation
from cutedsl.reference.linear import PackedMatrix, unscaled_mm


def inverse_rope(o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """(a, b) -> (a cos + b sin, b cos - a sin) for neighbours (a, b) in the last rope_dim elements of each head.

    Args:
        o: (T, num_heads, head_dim) bfloat16.
        positions: (T,) int64 - below max_pos.
        cos_sin_cache: (max_pos, rope_dim) fp32 - cosines of the rope_dim / 2 angles, then their sines.
        rope_dim: even, at most head_dim.

    Returns:
        (T, num_heads, head_dim) bfloat16.

    Raises:
        IndexError: (on CPU) a position is not below max_pos.

    Numerics: fp32 without fused multiply-add, then one rounding to BF16; elements before the last rope_dim are copied.
    Graph-safe apart from its allocations.
    """
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    rotated = o[..., -rope_dim:].float()
    a, b = rotated[..., 0::2], rotated[..., 1::2]
    restored = torch.stack((a * cos + b * sin, b * cos - a * sin), dim=-1).flatten(-2)
    return torch.cat((o[..., :-rope_dim], restored.to(torch.bfloat16)), dim=-1)


def wo_a(
    o: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    matrix: PackedMatrix,
    num_groups: int,
    rope_dim: int,
) -> torch.Tensor:
    """y[t, g] = bf16(alpha * (Q(inverse_rope(o)[t, g]) @ W[g]^T)); without Q if the matrix has no scale group.

    Args:
        o: (T, num_heads, head_dim) bfloat16.
        positions: (T,) int64.
        cos_sin_cache: (max_pos, rope_dim) fp32.
        matrix: G * R x D - rows of group g at g * R; one scale group or none, D = num_heads * head_dim / G.
        num_groups: G.
        rope_dim: rotated elements at the end of each head.

    Returns:
        (T, G * R) bfloat16, group-major.

    Numerics: the rotated input is rounded to BF16 and then, if there is one, quantized with the input_scale; then as linear.
    Graph-safe apart from its allocations.
    """
    a = inverse_rope(o, positions, cos_sin_cache, rope_dim).flatten(1)
    if matrix.scale_groups:
        # A block of 16 never straddles two groups: D is a multiple of 16.
        a = unscaled_activation(a, matrix.scale_groups[0].input_scale)
    rows, d_in = matrix.weight.shape[0] // num_groups, a.shape[1] // num_groups
    out = torch.empty(o.shape[0], matrix.weight.shape[0], dtype=torch.float32, device=o.device)
    for group in range(num_groups):
        span = slice(group * rows, (group + 1) * rows)
        a_group = a[:, group * d_in : (group + 1) * d_in]
        out[:, span] = unscaled_mm(a_group, matrix.weight[span], matrix.weight_scale[span])
    return out.mul_(matrix.alpha).to(torch.bfloat16)
