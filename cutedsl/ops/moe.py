"""nvfp4::moe - contract, custom op and fake implementation.

The hard part is what cannot be checked here: the values of the ids are on the device, and reading them would stall it.
The reference backend checks them; a kernel must bound its own addresses.
"""

from typing import Any

import torch

from cutedsl.ops import registry


def _checked_runner(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, runner_id: int) -> Any:
    runner = registry.get(runner_id, "moe")
    op = f"nvfp4::moe ({runner.name})"
    registry.check_tensor(op, "x", x, (torch.bfloat16,), (None, runner.in_features), runner.device)
    registry.check_tensor(op, "topk_weights", topk_weights, (torch.float32,), (x.shape[0], None), runner.device)
    registry.check_tensor(op, "topk_ids", topk_ids, (torch.int32, torch.int64), topk_weights.shape, runner.device)
    return runner


@torch.library.custom_op("nvfp4::moe", mutates_args=())
def _op(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, runner_id: int) -> torch.Tensor:
    return _checked_runner(x, topk_weights, topk_ids, runner_id)(x, topk_weights, topk_ids)


@_op.register_fake
def _fake(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, runner_id: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], _checked_runner(x, topk_weights, topk_ids, runner_id).out_features)


def moe(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, runner_id: int) -> torch.Tensor:
    """y[t] = bf16(sum over j of topk_weights[t, j] * expert[topk_ids[t, j]](x[t])).

    Args:
        x: (T, H) bfloat16, last dimension contiguous - T may be 0.
        topk_weights: (T, top_k) fp32.
        topk_ids: (T, top_k) int32 or int64 - ids the runner's expert_map takes, or -1 for none.
        runner_id: of a MoeRunner of hidden size H.

    Returns:
        (T, H) bfloat16, contiguous - this rank's part of the sum.

    Raises:
        LookupError: no runner has the id.
        TypeError: the runner is of another kind, or a tensor has another type.
        ValueError: a tensor has another shape, device, or strides; (reference backend) an id is out of range.

    Numerics: that of the runner's backend; the definition is reference.moe. Graph-safe if the backend is; reference
    is not.
    """
    return torch.ops.nvfp4.moe(x, topk_weights, topk_ids, runner_id)
