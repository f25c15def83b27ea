"""nvfp4::shared_expert - contract, custom op and fake implementation.

The hard part is the same as in ops.linear: the contract is checked in the op and in its fake, never only in Python code
that a compiled graph skips.
"""

from typing import Any

import torch

from cutedsl.ops import registry


def _checked_runner(x: torch.Tensor, runner_id: int) -> Any:
    runner = registry.get(runner_id, "shared_expert")
    registry.check_tensor(
        f"nvfp4::shared_expert ({runner.name})", "x", x, (torch.bfloat16,), (None, runner.in_features), runner.device
    )
    return runner


@torch.library.custom_op("nvfp4::shared_expert", mutates_args=())
def _op(x: torch.Tensor, runner_id: int) -> torch.Tensor:
    return _checked_runner(x, runner_id)(x)


@_op.register_fake
def _fake(x: torch.Tensor, runner_id: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], _checked_runner(x, runner_id).out_features)


def shared_expert(x: torch.Tensor, runner_id: int) -> torch.Tensor:
    """y = bf16(down(swiglu(gate_up(x)))).

    Args:
        x: (M, H) bfloat16, last dimension contiguous - M may be 0.
        runner_id: of a SharedExpertRunner of hidden size H.

    Returns:
        (M, H) bfloat16, contiguous.

    Raises:
        LookupError: no runner has the id.
        TypeError: the runner is of another kind, or x is not bfloat16.
        ValueError: x has another shape, device, or strides.

    Numerics: that of the runner's backend; the definition is reference.shared_expert. Graph-safe if the backend is.
    """
    return torch.ops.nvfp4.shared_expert(x, runner_id)
