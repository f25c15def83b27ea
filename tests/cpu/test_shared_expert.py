"""SwiGLU and the shared expert's runner against a float64 oracle."""

import numerics
import numpy as np
import pytest
import torch

from cutedsl.ops import registry
from cutedsl.ops.shared_expert import shared_expert
from cutedsl.reference.shared_expert import expert_fp32
from cutedsl.reference.swiglu import swiglu
from cutedsl.runners.shared_expert import SharedExpertRunner

# The oracle's SwiGLU is float64, the runner's fp32: they differ by 1e-7 and put a value that lies on a rounding bound
# of the second quantizer on different sides, about once in 1e5 values. One such flip moves one of I values by a step,
# up to 2 % of a short row; the global metric hardly sees it and is left at the rounding to bfloat16 plus 1e-3. Every
# mistake tested for is above 5 %.
TOLERANCE, ROW_TOLERANCE = numerics.BF16_MEAN_TOLERANCE + 1e-3, 2e-2


@pytest.fixture(autouse=True)
def _empty_registry():
    yield
    registry.clear()


class Case:
    """An expert of random weights with scales that keep SwiGLU's input at about `level`."""

    def __init__(self, hidden: int, intermediate: int, limit: float | None, level: float = 1.0) -> None:
        self.limit = limit
        self.gate_up = numerics.random_packed(2 * intermediate, hidden, seed=hidden)
        self.down = numerics.random_packed(hidden, intermediate, seed=intermediate + 1)
        self.input_scale = [0.01, 0.03]
        unit = level / (2.5 * hidden**0.5)
        self.weight_scale_2 = [unit, 2.5 * unit]
        self.down_input_scale = (limit or 10 * level) ** 2 / 2688
        self.down_weight_scale_2 = 1e-3

    def arguments(self) -> dict:
        return {
            "gate_up_weight": self.gate_up.weight,
            "gate_up_weight_scale": self.gate_up.weight_scale,
            "gate_up_weight_scale_2": torch.tensor(self.weight_scale_2),
            "gate_up_input_scale": torch.tensor(self.input_scale),
            "down_weight": self.down.weight,
            "down_weight_scale": self.down.weight_scale,
            "down_weight_scale_2": torch.tensor(self.down_weight_scale_2),
            "down_input_scale": torch.tensor(self.down_input_scale),
            "swiglu_limit": self.limit,
        }

    def runner(self, **more: str) -> SharedExpertRunner:
        return SharedExpertRunner("layers.2.ffn.shared_experts", **self.arguments(), **more)

    def oracle(self, x: torch.Tensor, activation=numerics.swiglu, round_middle=lambda h: h) -> np.ndarray:
        half = self.gate_up.values.shape[0] // 2
        gate, up = (
            numerics.linear(numerics.to_numpy(x), w, s, w2)
            for w, s, w2 in zip(
                (self.gate_up.values[:half], self.gate_up.values[half:]),
                self.input_scale,
                self.weight_scale_2,
                strict=True,
            )
        )
        h = round_middle(activation(gate, up, self.limit).astype(np.float32))
        return numerics.linear(h, self.down.values, self.down_input_scale, self.down_weight_scale_2)


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 10.0, 0.5])
def test_swiglu_equals_oracle(limit: float | None) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 8
    expected = numerics.swiglu(*np.split(x.double().numpy(), 2, axis=1), limit)
    result = swiglu(x, limit)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=3e-6, atol=1e-7)


def test_gate_is_clamped_before_silu_and_from_above_only() -> None:
    """silu(12) is 12, so clamping afterwards gives 10; before, silu(10) = 9.9995. A gate of -20 is not clamped."""
    result = swiglu(torch.tensor([[12.0, 1.2, -20.0, 1.0, 1.0, 1.0]]), 1.0)
    assert result[0, 0].item() == pytest.approx(1 / (1 + np.exp(-1.0)), rel=1e-6)
    assert result[0, 1].item() == pytest.approx(1 / (1 + np.exp(-1.0)), rel=1e-6)
    assert result[0, 2].item() == pytest.approx(-20 / (1 + np.exp(20.0)), rel=1e-6)


def test_up_is_clamped_on_both_sides() -> None:
    result = swiglu(torch.tensor([[5.0, 5.0, 5.0, 30.0, -30.0, 2.0]]), 10.0)
    silu = 5 / (1 + np.exp(-5.0))
    np.testing.assert_allclose(result[0].numpy(), [10 * silu, -10 * silu, 2 * silu], rtol=1e-6)


def test_no_limit_clamps_nothing() -> None:
    assert swiglu(torch.tensor([[50.0, -60.0]]), None).item() == -3000.0


def test_swiglu_raises() -> None:
    with pytest.raises(TypeError, match=r"expected torch\.float32"):
        swiglu(torch.zeros(1, 4, dtype=torch.bfloat16), None)
    with pytest.raises(ValueError, match="even last size"):
        swiglu(torch.zeros(1, 5), None)


# --- the expert ------------------------------------------------------------------------------------------------------


# Hidden, intermediate: V4-Flash at TP8, V4-Pro at TP16, affine-a.
@pytest.mark.parametrize(("hidden", "intermediate"), [(4096, 256), (7168, 192), (256, 64), (16, 16)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_expert_equals_oracle(hidden: int, intermediate: int, tokens: int) -> None:
    case = Case(hidden, intermediate, 10.0, level=4.0)
    x = numerics.random_x(tokens, hidden, spread=0.3)
    y = shared_expert(x, case.runner().runner_id)
    assert y.dtype == torch.bfloat16
    numerics.assert_close(y, case.oracle(x), TOLERANCE, ROW_TOLERANCE)


def test_no_limit() -> None:
    case = Case(256, 64, None, level=20.0)
    x = numerics.random_x(4, 256)
    y = shared_expert(x, case.runner().runner_id)
    numerics.assert_close(y, case.oracle(x), TOLERANCE, ROW_TOLERANCE)
    case.limit = 10.0
    assert numerics.errors(y, case.oracle(x))[0] > 0.05


def test_clamp_after_silu_would_be_seen() -> None:
    def clamped_after(gate, up, limit):
        return np.minimum(gate / (1 + np.exp(-gate)), limit) * np.clip(up, -limit, limit)

    case = Case(256, 64, 1.0, level=5.0)
    x = numerics.random_x(8, 256)
    y = shared_expert(x, case.runner().runner_id)
    numerics.assert_close(y, case.oracle(x), TOLERANCE, ROW_TOLERANCE)
    assert numerics.errors(y, case.oracle(x, clamped_after))[0] > 0.05


def test_middle_is_not_rounded_to_bf16() -> None:
    """Rounding the middle to bf16 flips about one code in a hundred, which the tolerance of the match would show."""

    def to_bf16(h):
        return torch.from_numpy(h).to(torch.bfloat16).float().numpy()

    case = Case(256, 2048, 10.0, level=4.0)
    x = numerics.random_x(8, 256, spread=0.3)
    y = shared_expert(x, case.runner().runner_id)
    numerics.assert_close(y, case.oracle(x), TOLERANCE, ROW_TOLERANCE)
    assert numerics.errors(y, case.oracle(x, round_middle=to_bf16))[0] > 2 * TOLERANCE


def test_gate_and_up_keep_their_own_scales() -> None:
    case = Case(256, 64, 10.0, level=4.0)
    x = numerics.random_x(4, 256)
    y = shared_expert(x, case.runner().runner_id)
    numerics.assert_close(y, case.oracle(x), TOLERANCE, ROW_TOLERANCE)
    for field in ("input_scale", "weight_scale_2"):
        own = getattr(case, field)
        setattr(case, field, [max(own)] * 2)
        assert numerics.errors(y, case.oracle(x))[0] > 0.05
        setattr(case, field, own[::-1])
        assert numerics.errors(y, case.oracle(x))[0] > 0.05
        setattr(case, field, own)


@pytest.mark.parametrize(("hidden", "intermediate"), [(4096, 256), (256, 64), (16, 16)])
@pytest.mark.parametrize("limit", [2.0, None])
def test_bf16_activations_are_rounded_once_in_the_middle(hidden: int, intermediate: int, limit: float | None) -> None:
    def oracle(round_middle) -> np.ndarray:
        rows = case.gate_up.values.shape[0] // 2
        gate, up = (
            x.double().numpy() @ w.T * np.float64(np.float32(w2))
            for w, w2 in zip((case.gate_up.values[:rows], case.gate_up.values[rows:]), case.weight_scale_2, strict=True)
        )
        h = round_middle(numerics.swiglu(gate, up, limit))
        return h @ case.down.values.T * np.float64(np.float32(case.down_weight_scale_2))

    case = Case(hidden, intermediate, limit, level=4.0)
    x = numerics.random_x(5, hidden, spread=0.3)
    runner = case.runner(activations="bf16")
    y = expert_fp32(x, runner.gate_up, runner.down, limit)
    once = oracle(lambda h: torch.from_numpy(h).to(torch.bfloat16).double().numpy())
    # fp32 against float64 moves a value of h across a rounding bound once in some thousand: 2^-8 of one of many terms.
    numerics.assert_close(y, once, 1e-4, 1e-3 if intermediate > 16 else 4e-3)
    assert numerics.errors(y, oracle(lambda h: h))[0] > 5e-4, "the middle is not rounded"
    assert torch.equal(shared_expert(x, runner.runner_id), y.to(torch.bfloat16))


def test_bf16_activations_have_no_input_scales() -> None:
    case, other = Case(256, 64, 10.0), Case(256, 64, 10.0)
    other.input_scale, other.down_input_scale = [7.0, 9.0], 11.0
    x = numerics.random_x(4, 256)
    y, same = (shared_expert(x, c.runner(activations="bf16").runner_id) for c in (case, other))
    assert torch.equal(y, same)


def test_no_rows() -> None:
    x = torch.empty(0, 256, dtype=torch.bfloat16)
    assert shared_expert(x, Case(256, 64, 10.0).runner().runner_id).shape == (0, 256)


def test_runner_holds_the_given_tensors() -> None:
    case = Case(256, 64, 10.0)
    runner = case.runner()
    assert runner.gate_up.weight.data_ptr() == case.gate_up.weight.data_ptr()
    assert runner.gate_up.weight_scale.data_ptr() == case.gate_up.weight_scale.data_ptr()
    assert runner.down.weight.data_ptr() == case.down.weight.data_ptr()
    assert runner.down.weight_scale.data_ptr() == case.down.weight_scale.data_ptr()


@pytest.mark.parametrize(
    ("key", "function", "error", "match"),
    [
        ("gate_up_weight", lambda t: t[:127], ValueError, "even number"),
        ("gate_up_weight", lambda t: t.to(torch.int32), TypeError, r"gate_up weight is torch\.int32"),
        ("gate_up_weight_scale", lambda t: t[:, :8], ValueError, "gate_up weight_scale has shape"),
        ("gate_up_weight_scale_2", lambda t: t[:1], ValueError, "gate_up weight_scale_2 has shape"),
        ("gate_up_weight_scale_2", lambda t: t * torch.nan, ValueError, "gate_up weight_scale_2 has 2 of 2"),
        ("gate_up_input_scale", lambda t: t * 0, ValueError, "gate_up input_scale has 2 of 2"),
        ("down_weight", lambda t: t[:, :28].contiguous(), ValueError, "down has K = 56 on this rank"),
        ("down_weight", lambda t: t[:240], ValueError, "down weight has shape"),
        ("down_weight_scale", lambda t: t.float(), TypeError, r"down weight_scale is torch\.float32"),
        ("down_weight_scale_2", lambda t: t / 0, ValueError, "down weight_scale_2 has 1 of 1"),
        ("down_input_scale", lambda t: -t, ValueError, "down input_scale has 1 of 1"),
        ("swiglu_limit", lambda _: 0.0, ValueError, "swiglu_limit is 0"),
        ("swiglu_limit", lambda _: float("nan"), ValueError, "swiglu_limit is nan"),
        ("backend", lambda _: "cuda", ValueError, "unknown backend 'cuda'"),
        ("activations", lambda _: "int8", ValueError, "unknown activations 'int8'"),
    ],
)
def test_runner_raises_with_its_name(key, function, error, match) -> None:
    arguments = {**Case(256, 64, 10.0).arguments(), "backend": "reference", "activations": "nvfp4"}
    arguments[key] = function(arguments[key])
    with pytest.raises(error, match=f"the layer: .*{match}"):
        SharedExpertRunner("the layer", **arguments)


def test_runner_refuses_a_down_of_another_width() -> None:
    arguments = Case(256, 64, 10.0).arguments()
    other = Case(256, 128, 10.0).arguments()
    arguments.update({key: other[key] for key in ("down_weight", "down_weight_scale")})
    with pytest.raises(ValueError, match="the layer: down has K = 128, expected 64"):
        SharedExpertRunner("the layer", **arguments)
