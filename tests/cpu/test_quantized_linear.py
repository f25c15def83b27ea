"""nvfp4::quantize_input and nvfp4::linear_of_quantized: together nvfp4::linear; contracts, fakes, torch.compile."""

import re
from collections.abc import Iterator
from typing import Any

import numerics
import pytest
import torch
import torch._dynamo.testing

from cutedsl.ops import registry
from cutedsl.ops.linear import linear
from cutedsl.ops.quantized_linear import linear_of_quantized, quantize_input
from cutedsl.runners.linear import LinearRunner, QuantizedRow
from cutedsl.runners.shared_expert import SharedExpertRunner

N, K = 24, 64
OPS = {"quantize_input": quantize_input, "linear_of_quantized": linear_of_quantized}


@pytest.fixture(autouse=True)
def _empty_registry() -> Iterator[None]:
    registry.clear()
    torch._dynamo.reset()
    yield
    registry.clear()


def make_runner(input_scale: tuple[float, float] = (0.01, 0.01), **more: Any) -> LinearRunner:
    w = numerics.random_packed(N, K)
    return LinearRunner("a.linear", *w[:2], torch.tensor([0.1, 0.2]), torch.tensor(input_scale), [8, 16], **more)


def block_scales(runner: LinearRunner, m: int) -> torch.Tensor:
    return torch.zeros(runner.quantized_row.sf_shape(m), dtype=torch.uint8)


def make_inputs(op: str, runner: LinearRunner, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, sf = numerics.random_x(m, K), block_scales(runner, m)
    return (x, sf) if op == "quantize_input" else (runner.quantize(x, sf), sf)


@pytest.mark.parametrize("m", [0, 1, 5, 130])
def test_two_halves_are_the_linear(m: int) -> None:
    runner, x = make_runner(), numerics.random_x(m, K)
    sf = block_scales(runner, m)
    a = quantize_input(x, sf, runner.runner_id)
    assert torch.equal(linear_of_quantized(a, sf, runner.runner_id), linear(x, runner.runner_id))


def test_another_linear_takes_what_one_has_quantized() -> None:
    first, second = make_runner(), make_runner()
    second.matrix = second.matrix._replace(alpha=2 * second.matrix.alpha)
    x, sf = numerics.random_x(3, K), block_scales(first, 3)
    a = quantize_input(x, sf, first.runner_id)
    assert torch.equal(linear_of_quantized(a, sf, second.runner_id), linear(x, second.runner_id))


def test_rows_of_each_backend() -> None:
    assert make_runner().quantized_row == QuantizedRow(torch.bfloat16, K, 0)
    assert make_runner(backend="sm90").quantized_row == QuantizedRow(torch.bfloat16, K, 0)
    row = make_runner(backend="sm100").quantized_row
    assert row == QuantizedRow(torch.uint8, K // 2, K // 16)
    assert [row.sf_shape(m) for m in (0, 1, 128, 129)] == [(0, 4), (128, 4), (128, 4), (256, 4)]
    assert QuantizedRow(torch.bfloat16, K, 0).sf_shape(129) == (0, 0)


@pytest.mark.parametrize("backend", ["reference", "sm90", "sm100"])
def test_fakes_have_the_shapes_of_the_backend(backend: str) -> None:
    runner = make_runner(backend=backend)
    inputs = make_inputs("quantize_input", runner, 5)
    with torch._subclasses.FakeTensorMode() as mode:
        x, sf = map(mode.from_tensor, inputs)
        a = quantize_input(x, sf, runner.runner_id)
        y = linear_of_quantized(a, sf, runner.runner_id)
    assert (a.shape, a.dtype) == ((5, runner.quantized_row.columns), runner.quantized_row.dtype)
    assert (y.shape, y.dtype) == ((5, N), torch.bfloat16)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, m: int) -> None:
    runner = make_runner()
    torch.library.opcheck(getattr(torch.ops.nvfp4, op).default, (*make_inputs(op, runner, m), runner.runner_id))


def test_what_is_mutated() -> None:
    written = {
        op: [a.name for a in getattr(torch.ops.nvfp4, op).default._schema.arguments if a.alias_info is not None]
        for op in OPS
    }
    assert written == {"quantize_input": ["sf"], "linear_of_quantized": []}


def test_fullgraph_with_any_batch() -> None:
    runner = make_runner()

    def layer(x: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
        return linear_of_quantized(quantize_input(x * 2, sf, runner.runner_id), sf, runner.runner_id)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for m in (5, 7, 12):
        x, sf = numerics.random_x(m, K), block_scales(runner, m)
        assert torch.equal(compiled(x, sf), layer(x, sf))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("op", "position", "change", "error", "match"),
    [
        (op, *case)
        for op, label in (("quantize_input", "x"), ("linear_of_quantized", "a"))
        for case in (
            (0, lambda t: t.float(), TypeError, rf"{label} is torch\.float32, expected torch\.bfloat16"),
            (0, lambda t: t[:, :-16], ValueError, rf"{label} has shape"),
            (0, lambda t: t.t().contiguous().t(), ValueError, rf"{label} has strides"),
            (1, lambda t: t.view(torch.float8_e4m3fn), TypeError, r"sf is torch\.float8_e4m3fn"),
            (1, lambda t: t.new_empty(128, 4), ValueError, r"sf has shape \(128, 4\), expected \(0, 0\)"),
        )
    ],
)
def test_contract(op: str, position: int, change: Any, error: type[Exception], match: str) -> None:
    runner = make_runner()
    inputs = list(make_inputs(op, runner, 4))
    inputs[position] = change(inputs[position])
    with pytest.raises(error, match=rf"nvfp4::{op} \(a\.linear\): {match}"):
        OPS[op](*inputs, runner.runner_id)


@pytest.mark.parametrize("more", [{"activations": "bf16"}, {"input_scale": (0.01, 0.02)}], ids=["bf16", "two scales"])
@pytest.mark.parametrize("op", OPS)
def test_a_runner_that_does_not_quantize_once(op: str, more: dict[str, Any]) -> None:
    inputs, runner = make_inputs(op, make_runner(), 2), make_runner(**more)
    assert runner.quantized_row is None
    match = re.escape(
        f"nvfp4::{op} (a.linear): its input is not quantized, or not once for all columns; call nvfp4::linear"
    )
    with pytest.raises(ValueError, match=match):
        OPS[op](*inputs, runner.runner_id)


@pytest.mark.parametrize("op", OPS)
def test_unknown_and_foreign_ids(op: str) -> None:
    inputs = make_inputs(op, make_runner(), 2)
    with pytest.raises(LookupError, match=r"no runner has id 0"):
        OPS[op](*inputs, 0)
    up, down, ones = numerics.random_packed(64, K), numerics.random_packed(K, 32), torch.ones(2)
    other = SharedExpertRunner("a.shared", *up[:2], ones, ones, *down[:2], ones[0], ones[0], 10.0)
    with pytest.raises(TypeError, match=r"\(a\.shared\) is of kind 'shared_expert'"):
        OPS[op](*inputs, other.runner_id)
