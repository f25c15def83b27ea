"""nvfp4::quantize_input, nvfp4::linear_of_quantized - the two halves of nvfp4::linear, contract and fake implementations.

For linears that read one input and cannot be one matrix: the input is quantized once, by the runner of any of them. The hard
part is rows of padding: tensor cores read block scales in tiles of 128 rows, and what is behind the last row must be
numbers. A tensor of zeros would be one more launch in front of every GEMM, so that the caller keeps one for all calls.
"""

from typing import Any

import torch

from cutedsl.formats import NVFP4
from cutedsl.ops import registry


def _checked_runner(op: str, label: str, x: torch.Tensor, sf: torch.Tensor, runner_id: int, of_input: bool) -> Any:
    runner = registry.get(runner_id, "linear")
    name = f"nvfp4::{op} ({runner.name})"
    row = runner.quantized_row
    if row is None:
        raise ValueError(f"{name}: its input is not quantized, or not once for all columns; call nvfp4::linear")
    dtype, columns = (torch.bfloat16, runner.in_features) if of_input else (row.dtype, row.columns)
    registry.check_tensor(name, label, x, (dtype,), (None, columns), runner.device)
    registry.check_tensor(name, "sf", sf, (torch.uint8,), row.sf_shape(x.shape[0]), runner.device)
    return runner


@torch.library.custom_op("nvfp4::quantize_input", mutates_args=("sf",))
def _quantize(x: torch.Tensor, sf: torch.Tensor, runner_id: int) -> torch.Tensor:
    return _checked_runner("quantize_input", "x", x, sf, runner_id, of_input=True).quantize(
        x, sf.view(NVFP4.scale_dtype)
    )


@_quantize.register_fake
def _fake_quantize(x: torch.Tensor, sf: torch.Tensor, runner_id: int) -> torch.Tensor:
    row = _checked_runner("quantize_input", "x", x, sf, runner_id, of_input=True).quantized_row
    return x.new_empty(x.shape[0], row.columns, dtype=row.dtype)


@torch.library.custom_op("nvfp4::linear_of_quantized", mutates_args=())
def _linear(a: torch.Tensor, sf: torch.Tensor, runner_id: int) -> torch.Tensor:
    runner = _checked_runner("linear_of_quantized", "a", a, sf, runner_id, of_input=False)
    return runner.multiply(a, sf.view(NVFP4.scale_dtype))


@_linear.register_fake
def _fake_linear(a: torch.Tensor, sf: torch.Tensor, runner_id: int) -> torch.Tensor:
    runner = _checked_runner("linear_of_quantized", "a", a, sf, runner_id, of_input=False)
    return a.new_empty(a.shape[0], runner.out_features, dtype=torch.bfloat16)


def quantize_input(x: torch.Tensor, sf: torch.Tensor, runner_id: int) -> torch.Tensor:
    """a = Q(x), as runners with this one's backend, K and input_scale multiply it.

    Args:
        x: (M, K) bfloat16, last dimension contiguous - M may be 0.
        sf: (rows, columns) uint8, contiguous - of the runner's `quantized_row.sf_shape(M)`; e4m3 block scales are written to
            it, rows of padding keep what they held, which must be numbers.
        runner_id: of a LinearRunner whose `quantized_row` is not None.

    Returns:
        (M, quantized_row.columns) of quantized_row.dtype, contiguous.

    Raises:
        LookupError: no runner has the id.
        TypeError: the runner is of another kind, or a tensor of another type.
        ValueError: a tensor has another shape, device, or strides; the runner does not quantize its input once.

    Numerics: that of the runner's backend, bit for bit as in its linear. Graph-safe if the backend is.
    """
    return torch.ops.nvfp4.quantize_input(x, sf, runner_id)


def linear_of_quantized(a: torch.Tensor, sf: torch.Tensor, runner_id: int) -> torch.Tensor:
    """y = bf16(alpha * (a @ W^T)): with `quantize_input` before it, nvfp4::linear.

    Args:
        a: (M, quantized_row.columns) of quantized_row.dtype, contiguous - from quantize_input.
        sf: (rows, columns) uint8, contiguous - likewise.
        runner_id: of a LinearRunner with the backend, K and input_scale of the one that has quantized.

    Returns:
        (M, N) bfloat16, contiguous.

    Raises:
        LookupError, TypeError, ValueError: as quantize_input. That input scales are equal is the caller's to check.

    Numerics: that of the runner's backend, as its linear. Graph-safe if the backend is.
    """
    return torch.ops.nvfp4.linear_of_quantized(a, sf, runner_id)
