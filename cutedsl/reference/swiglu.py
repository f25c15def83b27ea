"""DeepSeek-V4's clamped SwiGLU, in one place for the shared expert and the routed ones.

The hard part is the order: the gate is clamped from above *before* SiLU. Clamping silu(gate) instead agrees on small
values and is wrong on exactly the outliers that the limit is for.
"""

import torch


def swiglu(gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """h = silu(min(gate, limit)) * clamp(up, -limit, limit).

    Args:
        gate_up: (M, 2I) fp32 - gate in the first half, up in the second.
        limit: positive, or None for no clamp.

    Returns:
        (M, I) fp32 - not rounded to BF16: what follows quantizes it.

    Raises:
        TypeError: gate_up is not fp32.
        ValueError: 2I is odd.

    Numerics: fp32 throughout; NaN stays NaN. Graph-safe apart from its allocations.
    """
    if gate_up.dtype != torch.float32:
        raise TypeError(f"swiglu: gate_up is {gate_up.dtype}, expected torch.float32; do not round between the GEMMs")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up has shape {tuple(gate_up.shape)}, expected an even last size (gate | up)")
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up
