"""The routed experts' runner against a float64 oracle, token by token and choice by choice."""

import numerics
import numpy as np
import pytest
import torch

from cutedsl.ops import registry
from cutedsl.ops.moe import moe
from cutedsl.runners.moe import MoeRunner

# As in test_shared_expert: fp32 against float64 in SwiGLU flips about one code in 1e5.
TOLERANCE, ROW_TOLERANCE = numerics.BF16_MEAN_TOLERANCE + 1e-3, 2e-2


@pytest.fixture(autouse=True)
def _empty_registry():
    yield
    registry.clear()


class Case:
    """Experts of random weights, every one with four scales of its own."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int, limit: float | None = 10.0) -> None:
        generator = torch.Generator().manual_seed(num_experts)
        self.limit, self.intermediate, self.num_experts = limit, intermediate, num_experts
        self.w13 = numerics.random_packed(num_experts, 2 * intermediate, hidden, seed=1)
        self.w2 = numerics.random_packed(num_experts, hidden, intermediate, seed=2)
        spread = lambda *shape: torch.exp(torch.randn(shape, generator=generator))  # noqa: E731
        self.w13_input_scale = 0.02 * spread(num_experts, 2)
        self.w13_weight_scale_2 = spread(num_experts, 2) / hidden**0.5
        self.w2_input_scale = 0.02 * spread(num_experts)
        self.w2_weight_scale_2 = 1e-3 * spread(num_experts)

    def arguments(self) -> dict:
        return {
            "w13_weight": self.w13.weight,
            "w13_weight_scale": self.w13.weight_scale,
            "w13_weight_scale_2": self.w13_weight_scale_2,
            "w13_input_scale": self.w13_input_scale,
            "w2_weight": self.w2.weight,
            "w2_weight_scale": self.w2.weight_scale,
            "w2_weight_scale_2": self.w2_weight_scale_2,
            "w2_input_scale": self.w2_input_scale,
            "swiglu_limit": self.limit,
        }

    def runner(self, **more) -> MoeRunner:
        return MoeRunner("layers.4.ffn.experts", **self.arguments(), **more)

    def expert(self, x: np.ndarray, expert: int) -> np.ndarray:
        i = self.intermediate
        gate, up = (
            numerics.linear(
                x, rows, self.w13_input_scale[expert, half].item(), self.w13_weight_scale_2[expert, half].item()
            )
            for half, rows in enumerate((self.w13.values[expert, :i], self.w13.values[expert, i:]))
        )
        h = numerics.swiglu(gate, up, self.limit).astype(np.float32)
        scales = self.w2_input_scale[expert].item(), self.w2_weight_scale_2[expert].item()
        return numerics.linear(h, self.w2.values[expert], *scales)

    def oracle(self, x: torch.Tensor, weights: torch.Tensor, local_ids: torch.Tensor) -> np.ndarray:
        rows = numerics.to_numpy(x)
        out = np.zeros(rows.shape)
        for token in range(rows.shape[0]):
            for weight, expert in zip(weights[token].tolist(), local_ids[token].tolist(), strict=True):
                if expert >= 0:
                    out[token] += weight * self.expert(rows[token : token + 1], expert)[0]
        return out


def route(tokens: int, top_k: int, num_experts: int, dtype=torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and distinct ids per token."""
    generator = torch.Generator().manual_seed(tokens * 7 + top_k)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)])
    return torch.rand(tokens, top_k, generator=generator) * 2.5, ids.to(dtype)


# V4-Flash at TP8 (with few experts), V4-Pro at TP16, affine-a.
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden", "intermediate", "tokens"),
    [(4, 3, 4096, 256, 3), (2, 2, 7168, 192, 1), (32, 6, 256, 64, 9), (5, 1, 32, 16, 7)],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_moe_equals_oracle(num_experts, top_k, hidden, intermediate, tokens, dtype) -> None:
    case = Case(num_experts, hidden, intermediate)
    x = numerics.random_x(tokens, hidden, spread=0.3)
    weights, ids = route(tokens, top_k, num_experts, dtype)
    y = moe(x, weights, ids, case.runner().runner_id)
    assert y.dtype == torch.bfloat16
    numerics.assert_close(y, case.oracle(x, weights, ids), TOLERANCE, ROW_TOLERANCE)


@pytest.mark.parametrize("field", ["w13_input_scale", "w13_weight_scale_2", "w2_input_scale", "w2_weight_scale_2"])
def test_every_expert_uses_its_own_scales(field: str) -> None:
    case = Case(6, 64, 32)
    x = numerics.random_x(8, 64)
    weights, ids = route(8, 3, 6)
    y = moe(x, weights, ids, case.runner().runner_id)
    numerics.assert_close(y, case.oracle(x, weights, ids), TOLERANCE, ROW_TOLERANCE)
    own = getattr(case, field)
    for merged in (own.max(0, keepdim=True).values.expand_as(own), own.flip(0)):
        setattr(case, field, merged)
        assert numerics.errors(y, case.oracle(x, weights, ids))[0] > 0.05


def test_first_half_of_w13_is_the_gate() -> None:
    case = Case(3, 64, 32)
    x, (weights, ids) = numerics.random_x(4, 64), route(4, 2, 3)
    y = moe(x, weights, ids, case.runner().runner_id)
    swapped = case.w13.values.reshape(3, 2, 32, 64)[:, ::-1].reshape(3, 64, 64)
    case.w13 = case.w13._replace(values=swapped)
    case.w13_input_scale = case.w13_input_scale.flip(1)
    case.w13_weight_scale_2 = case.w13_weight_scale_2.flip(1)
    assert numerics.errors(y, case.oracle(x, weights, ids))[0] > 0.05


def test_no_limit() -> None:
    case = Case(3, 64, 32, limit=None)
    x, (weights, ids) = numerics.random_x(4, 64) * 8, route(4, 2, 3)
    y = moe(x, weights, ids, case.runner().runner_id)
    numerics.assert_close(y, case.oracle(x, weights, ids), TOLERANCE, ROW_TOLERANCE)
    case.limit = 10.0
    assert numerics.errors(y, case.oracle(x, weights, ids))[0] > 0.05


def test_minus_one_is_left_out() -> None:
    case = Case(4, 64, 32)
    x, (weights, ids) = numerics.random_x(5, 64), route(5, 3, 4)
    ids[0, 1] = ids[2] = -1
    y = moe(x, weights, ids, case.runner().runner_id)
    assert y[2].eq(0).all()
    keep = [0, 1, 3, 4]
    numerics.assert_close(y[keep], case.oracle(x, weights, ids)[keep], TOLERANCE, ROW_TOLERANCE)


def test_one_expert_for_all_and_a_repeated_choice() -> None:
    case = Case(4, 64, 32)
    x = numerics.random_x(5, 64)
    weights, ids = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)), torch.full((5, 2), 3)
    y = moe(x, weights, ids, case.runner().runner_id)
    numerics.assert_close(y, case.oracle(x, weights, ids), TOLERANCE, ROW_TOLERANCE)


def test_ranks_add_up_to_the_whole() -> None:
    """Two ranks with interleaved experts; -1 must not wrap round to the last entry of the map."""
    case = Case(8, 64, 32)
    x, (weights, ids) = numerics.random_x(6, 64), route(6, 3, 8)
    ids[1, 0] = -1
    total = torch.zeros(6, 64, dtype=torch.float64)
    for rank in range(2):
        mine = slice(rank, None, 2)
        expert_map = torch.full((8,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(4, dtype=torch.int32)
        arguments = {
            key: value[mine].contiguous() if isinstance(value, torch.Tensor) else value
            for key, value in case.arguments().items()
        }
        runner = MoeRunner("rank", **arguments, expert_map=expert_map)
        part = moe(x, weights, ids, runner.runner_id)
        local = torch.where((ids >= 0) & (ids % 2 == rank), ids, -1)
        numerics.assert_close(part, case.oracle(x, weights, local), TOLERANCE, ROW_TOLERANCE)
        total += part.double()
    whole = case.oracle(x, weights, ids)
    # Each rank's part is rounded on its own, and the parts may cancel: twice the tolerance.
    numerics.assert_close(total, whole, 2 * TOLERANCE, 2 * ROW_TOLERANCE)


def test_bf16_activations() -> None:
    """Experts as the shared expert's, weighted and summed in fp32; input scales play no part."""
    case = Case(6, 64, 32)
    x, (weights, ids) = numerics.random_x(8, 64, spread=0.3), route(8, 3, 6)
    ids[2, 1] = -1
    y = moe(x, weights, ids, case.runner(activations="bf16").runner_id)
    expected = np.zeros(x.shape)
    rows = x.double().numpy()
    for token in range(8):
        for weight, e in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            if e >= 0:
                gate_up = (rows[token] @ case.w13.values[e].T).reshape(2, 32)
                gate_up *= case.w13_weight_scale_2[e, :, None].numpy()
                h = torch.from_numpy(numerics.swiglu(*gate_up, case.limit)).to(torch.bfloat16).double().numpy()
                expected[token] += weight * (h @ case.w2.values[e].T) * case.w2_weight_scale_2[e].item()
    numerics.assert_close(y, expected, numerics.BF16_MEAN_TOLERANCE + 1e-4, 6e-3)
    assert numerics.errors(y, case.oracle(x, weights, ids))[0] > 0.02
    case.w13_input_scale, case.w2_input_scale = case.w13_input_scale * 3, case.w2_input_scale * 5
    assert torch.equal(moe(x, weights, ids, case.runner(activations="bf16").runner_id), y)


def test_no_tokens() -> None:
    runner = Case(4, 64, 32).runner()
    empty = torch.empty(0, 6)
    assert moe(torch.empty(0, 64, dtype=torch.bfloat16), empty, empty.int(), runner.runner_id).shape == (0, 64)


def test_only_experts_with_tokens_are_decoded(monkeypatch) -> None:
    from cutedsl.reference import moe as reference

    calls = []
    original = reference.expert_fp32
    monkeypatch.setattr(reference, "expert_fp32", lambda x, *rest: calls.append(x.shape[0]) or original(x, *rest))
    ids = torch.tensor([[5, 2], [5, -1]])
    moe(numerics.random_x(2, 64), torch.ones(2, 2), ids, Case(8, 64, 32).runner().runner_id)
    assert calls == [1, 2]


def test_weights_and_sums_are_fp32() -> None:
    """Weights that cancel to 2^-12 of a term: rounding terms to bf16 before the sum would leave nothing right."""
    case = Case(1, 64, 32)
    x = numerics.random_x(3, 64)
    weights = torch.tensor([[1.0 + 2.0**-12, -1.0]]).repeat(3, 1)
    ids = torch.zeros(3, 2, dtype=torch.int64)
    y = moe(x, weights, ids, case.runner().runner_id)
    one = case.oracle(x, torch.ones(3, 1), ids[:, :1])
    # The difference of two fp32 products keeps 24 - 12 bits, 2^-12 of it, and is rounded once more to bf16.
    numerics.assert_close(y, one * 2.0**-12, 5e-3, ROW_TOLERANCE)


def test_expert_outputs_are_not_rounded_before_the_sum(monkeypatch) -> None:
    """1 + 2^-12 - 1 is 2^-12, and 0 if the terms are bfloat16."""
    from cutedsl.reference import moe as reference

    case = Case(2, 64, 32)
    runner = case.runner()
    outputs = {runner.experts[0][0].weight.data_ptr(): 1 + 2.0**-12, runner.experts[1][0].weight.data_ptr(): 1.0}
    monkeypatch.setattr(
        reference,
        "expert_fp32",
        lambda x, up, *_: torch.full(x.shape, outputs[up.weight.data_ptr()], dtype=torch.float32),
    )
    weights, ids = torch.tensor([[1.0, -1.0]]), torch.tensor([[0, 1]])
    assert moe(numerics.random_x(1, 64), weights, ids, runner.runner_id).eq(2.0**-12).all()


@pytest.mark.parametrize("expert_map", [None, torch.tensor([0, 1, -1, 2, 3, -1], dtype=torch.int32)])
def test_an_id_out_of_range_raises(expert_map) -> None:
    runner = Case(4, 64, 32).runner(expert_map=expert_map)
    ids = torch.tensor([[0, runner.num_global_experts]])
    with pytest.raises(ValueError, match=r"layers\.4\.ffn\.experts: the largest expert id"):
        moe(numerics.random_x(1, 64), torch.ones(1, 2), ids, runner.runner_id)


def test_reference_raises_on_an_id_out_of_range() -> None:
    from cutedsl.reference.moe import moe as reference_moe

    runner = Case(4, 64, 32).runner()
    with pytest.raises(ValueError, match="the largest expert id is 4 but there are 4 experts"):
        reference_moe(numerics.random_x(1, 64), torch.ones(1, 1), torch.tensor([[4]]), runner.experts, None)


def test_runner_holds_the_given_tensors() -> None:
    case = Case(4, 64, 32)
    runner = case.runner()
    assert runner.w13_weight is case.w13.weight
    assert runner.w13_weight_scale is case.w13.weight_scale
    assert runner.w2_weight is case.w2.weight
    assert runner.w2_weight_scale is case.w2.weight_scale
    for expert, (gate_up, down) in enumerate(runner.experts):
        assert gate_up.weight.data_ptr() == case.w13.weight[expert].data_ptr()
        assert gate_up.weight_scale.data_ptr() == case.w13.weight_scale[expert].data_ptr()
        assert down.weight.data_ptr() == case.w2.weight[expert].data_ptr()
        assert down.weight_scale.data_ptr() == case.w2.weight_scale[expert].data_ptr()


def spoil(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[-1] = float("nan")
    return t


@pytest.mark.parametrize(
    ("key", "function", "error", "match"),
    [
        ("w13_weight", lambda t: t[0], ValueError, r"expected \(experts, 2I, H/2\)"),
        ("w13_weight", lambda t: t[:, :63], ValueError, r"expected \(experts, 2I, H/2\)"),
        ("w13_weight", lambda t: t.to(torch.int32), TypeError, r"w13 weight is torch\.int32"),
        ("w13_weight_scale", lambda t: t[:, :, :1], ValueError, "w13 weight_scale has shape"),
        ("w13_weight_scale_2", lambda t: t[:, 0], ValueError, "w13 weight_scale_2 has shape"),
        ("w13_weight_scale_2", spoil, ValueError, "w13 weight_scale_2 has 1 of 8 values"),
        ("w13_input_scale", spoil, ValueError, "w13 input_scale has 1 of 8 values"),
        ("w2_weight", lambda t: t[:3], ValueError, "w2 weight has shape"),
        ("w2_weight", lambda t: t[:, :, :12].contiguous(), ValueError, "w2 has K = 24 on this rank"),
        ("w2_weight_scale", lambda t: t.view(torch.uint8), TypeError, r"w2 weight_scale is torch\.uint8"),
        ("w2_weight_scale_2", spoil, ValueError, "w2 weight_scale_2 has 1 of 4 values"),
        ("w2_input_scale", lambda t: t * 0, ValueError, "w2 input_scale has 4 of 4 values"),
        ("swiglu_limit", lambda _: -1.0, ValueError, "swiglu_limit is -1"),
        ("apply_router_weight_on_input", lambda _: True, ValueError, "apply_router_weight_on_input"),
        ("expert_map", lambda _: torch.zeros(4), TypeError, r"expert_map is torch\.float32"),
        ("expert_map", lambda _: torch.zeros(2, 2, dtype=torch.int64), ValueError, "expert_map has shape"),
        ("expert_map", lambda _: torch.tensor([0, 1, 2, 4]), ValueError, "expert_map names the local experts"),
        ("expert_map", lambda _: torch.tensor([0, 1, 2, -1]), ValueError, "expert_map names the local experts"),
        ("expert_map", lambda _: torch.tensor([0, 1, 2, -2, 3]), ValueError, "expert_map names the local experts"),
        ("backend", lambda _: "triton", ValueError, "unknown backend 'triton'"),
        ("activations", lambda _: "BF16", ValueError, "unknown activations 'BF16'; known: nvfp4, bf16"),
    ],
)
def test_runner_raises_with_its_name(key, function, error, match) -> None:
    arguments = {
        **Case(4, 64, 32).arguments(),
        "apply_router_weight_on_input": False,
        "backend": "reference",
        "activations": "nvfp4",
    }
    arguments[key] = function(arguments.get(key))
    with pytest.raises(error, match=f"the layer: .*{match}"):
        MoeRunner("the layer", **arguments)


def test_runner_refuses_a_w2_of_another_width() -> None:
    arguments, other = Case(4, 64, 32).arguments(), Case(4, 64, 48).arguments()
    arguments.update({key: other[key] for key in ("w2_weight", "w2_weight_scale")})
    with pytest.raises(ValueError, match="the layer: w2 has K = 48, expected 32"):
        MoeRunner("the layer", **arguments)
