"""wo_a in NVFP4 without calibration: the activation bound bounds, and quantizing in slices is quantizing in one go."""

import math
import re

import pytest
import torch
from vllm_nvfp4 import platform, selection, wo_a
from vllm_nvfp4.checkpoint import CheckpointError
from vllm_nvfp4.inventory import Format
from vllm_nvfp4.wo_a import FP8_CACHE_MARGIN, ModelOptNvFp4WoAMethod, input_scale_bound

from cutedsl.formats import NVFP4
from cutedsl.quantize import quantize_activation, quantize_weight

PREFIX = "model.layers.1.attn.wo_a"
HEAD_DIM, ROPE_DIM = 512, 64


def largest_possible(bound: float) -> float:
    """The element at which an activation scale saturates."""
    return bound * NVFP4.tensor_scale_divisor


def normalised_rows(weight: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """RMS-normalised rows times the norm's weight, in float64: Gaussian ones, and ones nearly all in one place."""
    x = torch.randn(rows, weight.numel(), generator=generator, dtype=torch.float64)
    spike = torch.randint(0, weight.numel(), (rows,), generator=generator)
    spike[0] = int(weight.abs().argmax())
    height = torch.logspace(0, 8, rows, dtype=torch.float64).flip(0)
    x[torch.arange(rows), spike] *= height
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()


def test_the_formula() -> None:
    one, two = torch.ones(HEAD_DIM), torch.full((HEAD_DIM,), -3.0).bfloat16()
    assert input_scale_bound([one], HEAD_DIM) == pytest.approx(math.sqrt(512) * 1.0625 / 2688, rel=1e-12)
    assert input_scale_bound([one, two], HEAD_DIM) == pytest.approx(3 * input_scale_bound([one], HEAD_DIM))
    assert input_scale_bound([two, one], HEAD_DIM) == input_scale_bound([one, two], HEAD_DIM)


@pytest.mark.parametrize("seed", range(4))
def test_no_attention_output_exceeds_the_bound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(HEAD_DIM, generator=generator) * 2, torch.rand(HEAD_DIM, generator=generator)]
    # Without the margin for the FP8 cache: the bound must hold for exact rows by itself.
    limit = largest_possible(input_scale_bound(weights, HEAD_DIM)) / FP8_CACHE_MARGIN
    rows = torch.cat([normalised_rows(weight, 200, generator) for weight in weights])
    assert float(rows.abs().max()) <= limit
    # It is a bound and no wild guess: a row with everything at the largest weight comes close.
    assert float(rows.abs().max()) > 0.95 * limit
    rope = rows[:, -ROPE_DIM:].reshape(len(rows), -1, 2)
    angle = torch.rand(len(rows), ROPE_DIM // 2, generator=generator, dtype=torch.float64) * 2 * math.pi
    first = rope[..., 0] * angle.cos() - rope[..., 1] * angle.sin()
    second = rope[..., 0] * angle.sin() + rope[..., 1] * angle.cos()
    rotated = torch.cat([rows[:, :-ROPE_DIM], torch.stack((first, second), -1).flatten(1)], dim=1)
    assert float(rotated.abs().max()) <= limit
    # Attention with a sink: weights of a softmax that sum to less than one.
    mixture = torch.softmax(torch.randn(50, len(rows) + 1, generator=generator, dtype=torch.float64) * 8, dim=1)[:, 1:]
    for values in (rows, rotated):
        assert float((mixture @ values).abs().max()) <= limit


def test_a_rotation_can_put_a_pairs_whole_length_into_one_element() -> None:
    """The case that a bound on single elements would miss: sqrt(2) from rotation, still within sqrt(head_dim)."""
    weight = torch.ones(HEAD_DIM)
    row = torch.zeros(HEAD_DIM, dtype=torch.float64)
    row[-2:] = math.sqrt(HEAD_DIM / 2)
    assert float(row.square().mean()) == pytest.approx(1.0)
    rotated = math.hypot(float(row[-1]), float(row[-2]))
    limit = largest_possible(input_scale_bound([weight], HEAD_DIM)) / FP8_CACHE_MARGIN
    assert rotated == pytest.approx(limit, rel=1e-6)


def test_the_margin_covers_the_fp8_cache() -> None:
    exponents = torch.arange(-6, 9, dtype=torch.float32)
    values = (torch.linspace(1, 2, 4097)[:-1] * torch.exp2(exponents)[:, None]).flatten()
    values = values[values <= 448]
    rounded = values.to(torch.float8_e4m3fn).float()
    assert float((rounded / values).max()) <= FP8_CACHE_MARGIN
    assert float((rounded / values).max()) > 1 + (FP8_CACHE_MARGIN - 1) * 0.9


def test_quantizing_at_the_bound_does_not_saturate() -> None:
    weight = torch.linspace(-2, 1.5, HEAD_DIM)
    bound = input_scale_bound([weight], HEAD_DIM)
    rows = normalised_rows(weight, 64, torch.Generator().manual_seed(5)).float()
    _, block_sf = quantize_activation(rows, torch.tensor(bound))
    amax = rows.unflatten(-1, (-1, 16)).abs().amax(-1)
    assert bool((amax / (6 * bound) <= 448).all())
    assert 400 <= float(block_sf.float().max()) <= 448


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_weight_that_is_no_number_shows_in_the_bound(place: int, value: float) -> None:
    weights = [torch.ones(HEAD_DIM), torch.ones(HEAD_DIM)]
    weights[place][7] = value
    assert not math.isfinite(input_scale_bound(weights, HEAD_DIM))


def layer_of(weight: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> ModelOptNvFp4WoAMethod:
    monkeypatch.setattr(selection, "_choices", {})
    return ModelOptNvFp4WoAMethod(None, PREFIX, Format.HIGH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(2048, 512), (1024, 64), (1025, 32), (1, 16), (3000, 48)])
def test_in_slices_as_in_one_go(method: ModelOptNvFp4WoAMethod, dtype: torch.dtype, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n + k)
    # Rows of very different sizes, so that the largest element decides the tensor scale of slices that lack it.
    weight = (torch.randn(n, k, generator=generator) * torch.logspace(-3, 0, n)[:, None]).to(dtype)
    layer = layer_of(weight.clone())
    method.process_weights_after_loading(layer)
    wanted = quantize_weight(weight)
    assert layer.weight.equal(wanted.weight)
    assert layer.weight_scale.view(torch.uint8).equal(wanted.weight_scale.view(torch.uint8))
    assert layer.weight_scale.dtype == torch.float8_e4m3fn
    assert layer.weight_scale_2.reshape(()).view(torch.int32).equal(wanted.weight_scale_2.view(torch.int32))
    assert layer.weight_scale_2.shape == (1,)
    assert layer.input_scale is None
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_element_may_be_negative_and_in_the_last_row(method: ModelOptNvFp4WoAMethod, sign: int) -> None:
    weight = torch.full((wo_a.ROWS_AT_ONCE + 1, 16), 0.25).bfloat16()
    weight[-1, -1] = sign * 7.0
    layer = layer_of(weight.clone())
    method.process_weights_after_loading(layer)
    assert float(layer.weight_scale_2) == float(torch.tensor(7.0) / 2688)
    assert layer.weight.equal(quantize_weight(weight).weight)


def test_a_weight_of_zeros(method: ModelOptNvFp4WoAMethod) -> None:
    weight = torch.zeros(32, 32).bfloat16()
    layer = layer_of(weight.clone())
    method.process_weights_after_loading(layer)
    wanted = quantize_weight(weight)
    assert float(layer.weight_scale_2) == float(wanted.weight_scale_2) > 0
    assert layer.weight.equal(wanted.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number(method: ModelOptNvFp4WoAMethod, value: float) -> None:
    weight = torch.ones(32, 32)
    weight[31, 5] = value
    with pytest.raises(CheckpointError, match=re.escape(f"{PREFIX}.weight cannot be quantized") + ".*export it again"):
        method.process_weights_after_loading(layer_of(weight))


def test_no_copy_as_large_as_the_matrix_is_made(method: ModelOptNvFp4WoAMethod) -> None:
    """Peak of what torch allocates, beside the matrix and its result; the working copy is that of a slice."""
    layer = layer_of(torch.ones(16 * wo_a.ROWS_AT_ONCE, 64).bfloat16())
    matrix_bytes = layer.weight.nbytes
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        method.process_weights_after_loading(layer)
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    assert peak > 0
    # 0.31 of it is the result; a slice takes a few fp32 and integer copies of a sixteenth.
    assert peak < 2 * matrix_bytes


def test_scales_of_a_stored_nvfp4_weight_are_checked(method: ModelOptNvFp4WoAMethod) -> None:
    method.stored = Format.NVFP4
    layer = layer_of(torch.zeros(4, 8, dtype=torch.uint8))
    layer.weight_scale = torch.ones(4, 1).to(torch.float8_e4m3fn)
    layer.weight_scale_2, layer.input_scale = torch.ones(1), torch.tensor([float("nan")])
    with pytest.raises(CheckpointError, match=re.escape(f"{PREFIX}.input_scale[0] is nan")):
        method.process_weights_after_loading(layer)
    layer.input_scale = torch.ones(1)
    method.process_weights_after_loading(layer)
    assert layer.weight.equal(torch.zeros(4, 8, dtype=torch.uint8))


def test_fp8_cannot_be_quantized_again() -> None:
    message = f"{PREFIX} is FP8 block 128x128 in the checkpoint; NVFP4_WO_A=1 can quantize BF16 only: unset it"
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelOptNvFp4WoAMethod(None, PREFIX, Format.FP8_BLOCK)


def test_without_a_backend_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_choice", lambda: (None, "cutedsl has no kernels for a toaster yet"))
    with pytest.raises(ValueError, match="needs a cutedsl kernel, and cutedsl has no kernels for a toaster yet; unset"):
        ModelOptNvFp4WoAMethod(None, PREFIX, Format.HIGH)


def test_it_is_never_called_as_a_linear(method: ModelOptNvFp4WoAMethod) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"{PREFIX}: wo_a is computed by the attention's _o_proj")):
        method.apply(torch.nn.Module(), torch.zeros(1, 16))
