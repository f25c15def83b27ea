"""nvfp4::linear - contract, custom op and fake implementation.

The hard part is where to check. A compiled graph never runs the Python function that called the op, so the contract is
checked in the op's body and in its fake implementation: eagerly, while tracing, and from any caller of torch.ops alike.
"""

from typing import Any

import torch

from cutedsl.ops import registry


def _checked_runner(x: torch.Tensor, runner_id: int) -> Any:
    runner = registry.get(runner_id, "linear")
    registry.check_tensor(
        f"nvfp4::linear ({runner.name})", "x", x, (torch.bfloat16,), (None, runner.in_features), runner.device
    )
    return runner


@torch.library.custom_op("nvfp4::linear", mutates_args=())
def _op(x: torch.Tensor, runner_id: int) -> torch.Tensor:
    return _checked_runner(x, runner_id)(x)


@_op.register_fake
def _fake(x: torch.Tensor, runner_id: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], _checked_runner(x, runner_id).out_features)


def linear(x: torch.Tensor, runner_id: int) -> torch.Tensor:
    """y = bf16(alpha * (Q(x) @ W^T)).

    Args:
        x: (M, K) bfloat16, last dimension contiguous - M may be 0.
        runner_id: of a LinearRunner of N x K.

    Returns:
        (M, N) bfloat16, contiguous.

    Raises:
        LookupError: no runner has the id.
        TypeError: the runner is of another kind, or x is not bfloat16.
        ValueError: x has another shape, device, or strides.

    Numerics: that of the runner's backend; the definition is reference.linear. Graph-safe if the backend is.
    """
    return torch.ops.nvfp4.linear(x, runner_id)
