"""NVFP4 shared expert: down(swiglu(gate_up(x))), with nothing rounded to BF16 before it is quantized.

The hard part is that the second quantizer sees the FP32 result of the activation, as in a fused kernel: rounding to
BF16 first moves values across code boundaries and is a different function. Where activations are not quantized, that result
is rounded to BF16 once, as the operand of the second GEMM.
"""

import torch

from cutedsl.reference.linear import PackedMatrix, linear_fp32
from cutedsl.reference.swiglu import swiglu


def expert_fp32(x: torch.Tensor, gate_up: PackedMatrix, down: PackedMatrix, limit: float | None) -> torch.Tensor:
    """y = down(swiglu(gate_up(x))), not yet rounded.

    Args:
        x: (M, H) bfloat16.
        gate_up: 2I x H, gate rows first.
        down: H x I.
        limit: of swiglu.

    Returns:
        (M, H) fp32.

    Numerics: each linear as linear_fp32, which quantizes or rounds its own input; SwiGLU in fp32. Graph-safe apart from
    its allocations.
    """
    return linear_fp32(swiglu(linear_fp32(x, gate_up), limit), down)


def shared_expert(x: torch.Tensor, gate_up: PackedMatrix, down: PackedMatrix, limit: float | None) -> torch.Tensor:
    """y = bf16(down(swiglu(gate_up(x)))).

    Args:
        x: (M, H) bfloat16.
        gate_up: 2I x H, gate rows first.
        down: H x I.
        limit: of swiglu.

    Returns:
        (M, H) bfloat16.

    Numerics: as expert_fp32, then one rounding to nearest even. Graph-safe apart from its allocations.
    """
    return expert_fp32(x, gate_up, down, limit).to(torch.bfloat16)
