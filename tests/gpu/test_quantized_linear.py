"""A linear in its two halves, quantize_input and linear_of_quantized: only with quantized activations."""

import pytest
import torch
from gpu_kit import assert_same, random_x
from test_runners import OPS, assert_replays, built, linear_arguments

from cutedsl.runners.linear import LinearRunner


@pytest.mark.parametrize("tokens", [1, 7, 64, 200])
def test_two_halves_are_the_linear(tokens: int) -> None:
    runner = built(LinearRunner, linear_arguments([8192], 1536, [0]), "nvfp4")
    sf = torch.zeros(runner.quantized_row.sf_shape(tokens), dtype=torch.uint8, device="cuda")

    def halves(x: torch.Tensor) -> torch.Tensor:
        return OPS.linear_of_quantized(OPS.quantize_input(x, sf, runner.runner_id), sf, runner.runner_id)

    x = random_x(tokens, tokens, 1536)
    assert_same("one call", halves(x), OPS.linear(x, runner.runner_id))
    assert_replays(halves, (x,), (random_x(tokens + 1, tokens, 1536),))
