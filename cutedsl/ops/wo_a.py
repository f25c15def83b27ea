"""nvfp4::wo_a - contract, custom op and fake implementation.

The hard part is three tensors whose sizes hang together: heads with the runner, positions with tokens, and the width of
the cosine table with the runner's rope_dim.
"""

from typing import Any

import torch

from cutedsl.ops import registry


def _checked_runner(o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, runner_id: int) -> Any:
    runner = registry.get(runner_id, "wo_a")
    op = f"nvfp4::wo_a ({runner.name})"
    heads = (None, runner.num_heads, runner.head_dim)
    registry.check_tensor(op, "o", o, (torch.bfloat16,), heads, runner.device)
    registry.check_tensor(op, "positions", positions, (torch.int64,), (o.shape[0],), runner.device)
    registry.check_tensor(op, "cos_sin_cache", cos_sin_cache, (torch.float32,), (None, runner.rope_dim), runner.device)
    return runner


@torch.library.custom_op("nvfp4::wo_a", mutates_args=())
def _op(o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, runner_id: int) -> torch.Tensor:
    return _checked_runner(o, positions, cos_sin_cache, runner_id)(o, positions, cos_sin_cache)


@_op.register_fake
def _fake(o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, runner_id: int) -> torch.Tensor:
    return o.new_empty(o.shape[0], _checked_runner(o, positions, cos_sin_cache, runner_id).out_features)


def wo_a(o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, runner_id: int) -> torch.Tensor:
    """y[t, g] = bf16(alpha * (Q(inverse_rope(o)[t, g]) @ W[g]^T)).

    Args:
        o: (T, num_heads, head_dim) bfloat16, last dimension contiguous - attention output; T may be 0.
        positions: (T,) int64 - 0 .. max_pos - 1.
        cos_sin_cache: (max_pos, rope_dim) fp32 - cosines, then sines.
        runner_id: of a WoARunner.

    Returns:
        (T, num_groups * o_lora_rank) bfloat16, contiguous, group-major.

    Raises:
        LookupError: no runner has the id.
        TypeError: the runner is of another kind, or a tensor has another type.
        ValueError: a tensor has another shape, device, or strides.
        IndexError: (reference backend on CPU) a position is not below max_pos.

    Numerics: that of the runner's backend; the definition is reference.wo_a. Graph-safe if the backend is. A negative
    position is not detected: it counts from the end of the table.
    """
    return torch.ops.nvfp4.wo_a(o, positions, cos_sin_cache, runner_id)
