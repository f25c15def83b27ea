"""The linear runner against a float64 oracle: scales per shard above all."""

import numerics
import numpy as np
import pytest
import torch

from cutedsl.ops import registry
from cutedsl.ops.linear import linear
from cutedsl.reference.linear import unscaled_mm
from cutedsl.runners.linear import LinearRunner


@pytest.fixture(autouse=True)
def _empty_registry():
    yield
    registry.clear()


def make(shards: list[int], k: int, weight_scale_2: list[float], input_scale: list[float], **more: str) -> tuple:
    packed = numerics.random_packed(sum(shards), k, seed=k)
    runner = LinearRunner(
        "layers.3.attn.wq_a", packed.weight, packed.weight_scale, torch.tensor(weight_scale_2),
        torch.tensor(input_scale), shards, **more,
    )  # fmt: skip
    return runner, packed


def oracle(x, packed, shards, weight_scale_2, input_scale) -> np.ndarray:
    columns, start = [], 0
    for rows, w2, s in zip(shards, weight_scale_2, input_scale, strict=True):
        columns.append(numerics.linear(numerics.to_numpy(x), packed.values[start : start + rows], s, w2))
        start += rows
    return np.concatenate(columns, axis=1)


# Rows, K: V4-Flash q_a with kv; Flash q_b at TP8; Pro o_b at TP16; affine-a; ragged N.
CASES = [
    ([1024, 512], 4096, [2.1e-4, 5.5e-4], [0.011, 0.011]),
    ([4096], 1024, [1.3e-4], [0.02]),
    ([7168], 1024, [9e-5], [0.004]),
    ([128, 512], 256, [3e-4, 4e-5], [0.01, 0.04]),
    ([5, 1, 33], 48, [1e-3, 2e-3, 5e-4], [0.02, 0.005, 0.02]),
    ([1], 16, [0.1], [1.0]),
]


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("shards", "k", "weight_scale_2", "input_scale"), CASES)
def test_linear_equals_oracle(tokens, shards, k, weight_scale_2, input_scale) -> None:
    runner, packed = make(shards, k, weight_scale_2, input_scale)
    x = numerics.random_x(tokens, k)
    y = linear(x, runner.runner_id)
    assert y.dtype == torch.bfloat16
    expected = oracle(x, packed, shards, weight_scale_2, input_scale)
    numerics.assert_close(y, expected, numerics.BF16_TOLERANCE, numerics.BF16_TOLERANCE)
    numerics.assert_rounded_once(y, expected)


def test_each_shard_uses_its_own_scales() -> None:
    """A runner that merges either scale by max() misses the tolerance by orders of magnitude."""
    shards, w2, s = [64, 32], [1e-3, 4e-3], [0.01, 0.05]
    runner, packed = make(shards, 128, w2, s)
    x = numerics.random_x(6, 128)
    y = linear(x, runner.runner_id)
    for merged in (oracle(x, packed, shards, [max(w2)] * 2, s), oracle(x, packed, shards, w2, [max(s)] * 2)):
        assert min(numerics.errors(y, merged)) > 20 * numerics.BF16_TOLERANCE
    numerics.assert_close(y, oracle(x, packed, shards, w2, s), numerics.BF16_TOLERANCE, numerics.BF16_TOLERANCE)


def test_activation_is_quantized_once_per_distinct_scale(monkeypatch) -> None:
    from cutedsl.reference import linear as reference

    calls = []
    original = reference.unscaled_activation
    monkeypatch.setattr(reference, "unscaled_activation", lambda x, s: calls.append(s.item()) or original(x, s))
    x = numerics.random_x(2, 64)
    for input_scale, expected in (([0.5] * 4, [0.5]), ([0.5, 0.25, 0.25, 0.5], [0.5, 0.25])):
        calls.clear()
        runner, packed = make([8, 16, 3, 5], 64, [1.0, 2.0, 3.0, 4.0], input_scale)
        y = linear(x, runner.runner_id)
        assert calls == expected
        exact = oracle(x, packed, [8, 16, 3, 5], [1.0, 2.0, 3.0, 4.0], input_scale)
        numerics.assert_close(y, exact, numerics.BF16_TOLERANCE, numerics.BF16_TOLERANCE)


def test_shards_with_one_scale_meet_in_one_span() -> None:
    runner, _ = make([8, 16, 3, 5], 64, [1.0, 2.0, 3.0, 4.0], [0.5, 0.5, 0.25, 0.5])
    assert [(g.input_scale.item(), g.row_spans) for g in runner.matrix.scale_groups] == [
        (0.5, ((0, 24), (27, 32))),
        (0.25, ((24, 27),)),
    ]


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("shards", "k", "weight_scale_2", "input_scale"), CASES)
def test_bf16_activations_are_multiplied_as_they_are(tokens, shards, k, weight_scale_2, input_scale) -> None:
    runner, packed = make(shards, k, weight_scale_2, input_scale, activations="bf16")
    assert runner.activations == "bf16"
    x = numerics.random_x(tokens, k)
    scale = np.repeat(np.float32(weight_scale_2).astype(np.float64), shards)
    expected = x.double().numpy() @ packed.values.T * scale
    y = linear(x, runner.runner_id)
    numerics.assert_close(y, expected, numerics.BF16_TOLERANCE, numerics.BF16_TOLERANCE)
    numerics.assert_rounded_once(y, expected)
    # To quantize x is another function, and its tensor scale has no say here.
    assert numerics.errors(y, oracle(x, packed, shards, weight_scale_2, input_scale))[0] > 5 * numerics.BF16_TOLERANCE
    other, _ = make(shards, k, weight_scale_2, [100 * scale for scale in input_scale], activations="bf16")
    assert torch.equal(linear(x, other.runner_id), y)


def test_activations_are_quantized_unless_asked() -> None:
    runner, _ = make([8, 24], 64, [1.0, 2.0], [0.5, 0.25])
    named, _ = make([8, 24], 64, [1.0, 2.0], [0.5, 0.25], activations="nvfp4")
    assert runner.activations == "nvfp4"
    x = numerics.random_x(3, 64)
    assert torch.equal(linear(x, runner.runner_id), linear(x, named.runner_id))


def test_no_rows() -> None:
    runner, _ = make([8, 24], 64, [1.0, 2.0], [0.5, 0.25])
    assert linear(torch.empty(0, 64, dtype=torch.bfloat16), runner.runner_id).shape == (0, 32)


def test_rows_may_be_strided() -> None:
    runner, _ = make([32], 64, [1.0], [0.5])
    wide = numerics.random_x(5, 160)
    assert torch.equal(linear(wide[:, 32:96], runner.runner_id), linear(wide[:, 32:96].contiguous(), runner.runner_id))


def test_nan_in_a_row_is_loud_in_that_row_only() -> None:
    runner, _ = make([32], 64, [1.0], [0.5])
    x = numerics.random_x(3, 64)
    x[1, 7] = float("nan")
    assert linear(x, runner.runner_id).isnan().all(dim=1).tolist() == [False, True, False]


def test_tiles_do_not_change_the_result(monkeypatch) -> None:
    from cutedsl.reference import linear as reference

    packed = numerics.random_packed(37, 64)
    a = numerics.random_x(3, 64)
    whole = unscaled_mm(a, packed.weight, packed.weight_scale)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 64 * 5)
    tiled = unscaled_mm(a, packed.weight, packed.weight_scale)
    torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


def test_sums_are_fp32_and_not_bf16() -> None:
    """4096 equal products: sums in bf16 stall at 256 times a term."""
    weight = torch.full((16, 2048), 0x22, dtype=torch.uint8)
    scale = torch.ones(16, 256).to(torch.float8_e4m3fn)
    runner = LinearRunner("sum", weight, scale, torch.ones(1), torch.full((1,), 1 / 6), [16])
    x = torch.ones(2, 4096, dtype=torch.bfloat16)
    assert linear(x, runner.runner_id).eq(4096).all()


def test_runner_holds_the_given_tensors() -> None:
    packed = numerics.random_packed(32, 64)
    w2, s = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])
    runner = LinearRunner("layer", packed.weight, packed.weight_scale, w2, s, [8, 24])
    held = (runner.weight, runner.weight_scale, runner.weight_scale_2, runner.input_scale)
    for mine, given in zip(held, (packed.weight, packed.weight_scale, w2, s), strict=True):
        assert mine.data_ptr() == given.data_ptr()
    assert runner.matrix.weight.data_ptr() == packed.weight.data_ptr()
    assert runner.matrix.weight_scale.data_ptr() == packed.weight_scale.data_ptr()


def test_runner_takes_parameters() -> None:
    packed = numerics.random_packed(32, 64)
    x = numerics.random_x(2, 64)
    scale = torch.full((1,), 0.5)
    plain = LinearRunner("plain", packed.weight, packed.weight_scale, scale, scale, [32])
    wrapped = [torch.nn.Parameter(t, requires_grad=False) for t in (packed.weight, packed.weight_scale, scale, scale)]
    assert torch.equal(linear(x, LinearRunner("wrapped", *wrapped, [32]).runner_id), linear(x, plain.runner_id))


def test_scalar_scales_stand_for_one_shard() -> None:
    packed = numerics.random_packed(32, 64)
    runner = LinearRunner("layer", *packed[:2], torch.tensor(1.0), torch.tensor(0.5), [32])
    assert runner.weight_scale_2.shape == runner.input_scale.shape == (1,)


BAD = float("nan"), float("inf"), 0.0, -1.0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": lambda t: t.view(torch.int8)}, TypeError, r"weight is torch\.int8"),
        ({"weight_scale": lambda t: t.view(torch.uint8)}, TypeError, r"weight_scale is torch\.uint8"),
        ({"weight": lambda t: t[:31]}, ValueError, r"weight has shape \(31, 32\)"),
        ({"weight": lambda t: t[None]}, ValueError, "weight has shape"),
        ({"weight": lambda t: t[:, :28].contiguous()}, ValueError, "K = 56 on this rank, expected a multiple of 16"),
        ({"weight_scale": lambda t: t[:, :3]}, ValueError, "weight_scale has shape"),
        ({"weight": lambda t: t.t().contiguous().t()}, ValueError, "must be contiguous"),
        ({"weight_scale": lambda t: t.to("meta")}, ValueError, "its weight_scale on meta"),
        ({"weight_scale": lambda t: torch.full_like(t.float(), torch.nan).to(t.dtype)}, ValueError, "NaN or negative"),
        ({"weight_scale": lambda t: (-t.float() - 1).to(t.dtype)}, ValueError, "NaN or negative"),
        ({"weight_scale_2": lambda t: t.double()}, TypeError, r"weight_scale_2 is torch\.float64"),
        ({"weight_scale_2": lambda t: t[:1]}, ValueError, "weight_scale_2 has shape"),
        ({"input_scale": lambda t: t.bfloat16()}, TypeError, r"input_scale is torch\.bfloat16"),
        ({"input_scale": lambda t: t[0]}, ValueError, r"input_scale has shape \(\)"),
        ({"input_scale": lambda t: t.to("meta")}, ValueError, "input_scale is on meta"),
        ({"shard_sizes": lambda _: [8, 25]}, ValueError, "weight has shape"),
        ({"shard_sizes": lambda _: [32, 0]}, ValueError, "one positive row count"),
        ({"shard_sizes": lambda _: []}, ValueError, "one positive row count"),
        ({"backend": lambda _: "sm999"}, ValueError, "unknown backend 'sm999'; known: .*reference"),
        ({"activations": lambda _: "fp8"}, ValueError, "unknown activations 'fp8'; known: nvfp4, bf16"),
    ]
    + [({s: lambda t, b=b: torch.stack((t[0], torch.tensor(b)))}, ValueError, f"{s} has 1 of 2 values")
       for s in ("weight_scale_2", "input_scale") for b in BAD],
)  # fmt: skip
def test_runner_raises_with_its_name(change, error, match) -> None:
    packed = numerics.random_packed(32, 64)
    arguments = {
        "weight": packed.weight,
        "weight_scale": packed.weight_scale,
        "weight_scale_2": torch.tensor([1.0, 2.0]),
        "input_scale": torch.tensor([0.5, 0.25]),
        "shard_sizes": [8, 24],
        "backend": "reference",
        "activations": "nvfp4",
    }
    LinearRunner("layers.7.attn.wq_b", **arguments)
    for key, function in change.items():
        arguments[key] = function(arguments[key])
    with pytest.raises(error, match=rf"layers\.7\.attn\.wq_b: .*{match}"):
        LinearRunner("layers.7.attn.wq_b", **arguments)
