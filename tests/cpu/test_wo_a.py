"""Inverse rotary embedding and the grouped linear after attention, against loops in float64."""

import math

import numerics
import numpy as np
import pytest
import torch

from cutedsl.ops import registry
from cutedsl.ops.wo_a import wo_a
from cutedsl.reference.wo_a import inverse_rope
from cutedsl.runners.wo_a import WoARunner

# The oracle rotates in float64, the runner in fp32: about one value in 1e4 is rounded to the other bfloat16 neighbour,
# and a few of those to another code. A flip moves one of thousands of values in a row by a step.
TOLERANCE, ROW_TOLERANCE = numerics.BF16_MEAN_TOLERANCE + 1e-3, 1e-2


@pytest.fixture(autouse=True)
def _empty_registry():
    yield
    registry.clear()


def make_cache(max_pos: int, rope_dim: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(max_pos).double(), 10000.0 ** (-torch.arange(0, rope_dim, 2).double() / rope_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def rotate_back(o: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor, rope_dim: int) -> np.ndarray:
    """float64 loop over pairs: multiplication by the conjugate of cos + i sin."""
    out = o.double().numpy().copy()
    first = out.shape[-1] - rope_dim
    for pair in range(rope_dim // 2):
        turn = cache[positions, pair].double().numpy() - 1j * cache[positions, rope_dim // 2 + pair].double().numpy()
        at = first + 2 * pair
        turned = (out[..., at] + 1j * out[..., at + 1]) * turn[:, None]
        out[..., at], out[..., at + 1] = turned.real, turned.imag
    return out


class Case:
    """A grouped linear of random weights."""

    def __init__(self, groups: int, heads: int, head_dim: int, rope_dim: int, rank: int) -> None:
        self.groups, self.heads, self.head_dim, self.rope_dim, self.rank = groups, heads, head_dim, rope_dim, rank
        self.d_in = heads // groups * head_dim
        self.packed = numerics.random_packed(groups * rank, self.d_in, seed=groups)
        self.weight_scale_2, self.input_scale = 3e-4, 0.012

    def arguments(self) -> dict:
        return {
            "weight": self.packed.weight,
            "weight_scale": self.packed.weight_scale,
            "weight_scale_2": torch.tensor(self.weight_scale_2),
            "input_scale": torch.tensor(self.input_scale),
            "num_groups": self.groups,
            "head_dim": self.head_dim,
            "rope_dim": self.rope_dim,
        }

    def runner(self, **more: str) -> WoARunner:
        return WoARunner("layers.1.attn.wo_a", **self.arguments(), **more)

    def inputs(self, tokens: int, max_pos: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(tokens)
        o = numerics.random_x(tokens, self.heads * self.head_dim, spread=0.3).view(tokens, self.heads, self.head_dim)
        positions = torch.randint(0, max_pos, (tokens,), generator=generator)
        return o, positions, make_cache(max_pos, self.rope_dim)

    def oracle(self, o: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor) -> np.ndarray:
        restored = torch.from_numpy(rotate_back(o, positions, cache, self.rope_dim)).to(torch.bfloat16)
        columns = []
        for group in range(self.groups):
            heads = self.heads // self.groups
            x = numerics.to_numpy(restored[:, group * heads : (group + 1) * heads].flatten(1))
            rows = self.packed.values[group * self.rank : (group + 1) * self.rank]
            columns.append(numerics.linear(x, rows, self.input_scale, self.weight_scale_2))
        return np.concatenate(columns, axis=1)


# --- inverse rotary embedding ----------------------------------------------------------------------------------------


def test_inverse_rope_equals_oracle() -> None:
    o, positions, cache = Case(2, 4, 512, 64, 16).inputs(6)
    result = inverse_rope(o, positions, cache, 64)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result[..., :448], o[..., :448])
    expected = rotate_back(o, positions, cache, 64)
    # One rounding to bfloat16, of a sum that may cancel: relative to the length of the pair.
    pairs = np.abs(expected).reshape(6, 4, 256, 2).max(axis=-1, keepdims=True)
    difference = np.abs(result.double().numpy() - expected).reshape(6, 4, 256, 2)
    assert (difference <= pairs * (2.0**-8 + 1e-6) + 1e-30).all()


def test_inverse_rope_by_hand() -> None:
    """A quarter turn: (a, b) -> (b, -a) for neighbours; only the last rope_dim elements move."""
    cache = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, math.sqrt(0.5), 1.0, math.sqrt(0.5)]])
    o = torch.tensor([[[9.0, 8.0, 1.0, 2.0, 4.0, 4.0]]] * 2, dtype=torch.bfloat16)
    result = inverse_rope(o, torch.tensor([0, 1]), cache, 4)
    assert torch.equal(result[0], o[0])
    assert result[1, 0].tolist() == [9.0, 8.0, 2.0, -1.0, pytest.approx(32**0.5, rel=2.0**-8), 0.0]


def test_inverse_rope_undoes_a_rotation() -> None:
    o, positions, cache = Case(2, 4, 128, 64, 16).inputs(5)
    conjugate = cache.clone()
    conjugate[:, 32:] *= -1
    rotated = inverse_rope(o, positions, conjugate, 64)
    assert (rotated - o).abs().max() > 0.5
    torch.testing.assert_close(inverse_rope(rotated, positions, cache, 64), o, rtol=0.02, atol=0.06)


def test_a_whole_head_may_rotate() -> None:
    o, positions, cache = Case(1, 2, 32, 32, 16).inputs(3)
    assert inverse_rope(o, positions, cache, 32).shape == o.shape


def test_position_beyond_the_table_raises() -> None:
    case = Case(1, 2, 32, 16, 16)
    o, positions, cache = case.inputs(3)
    with pytest.raises(IndexError):
        wo_a(o, positions + 300, cache, case.runner().runner_id)


# --- the operator ----------------------------------------------------------------------------------------------------


# V4-Flash at TP8 (one group of eight heads, rank 1024), V4-Pro's group, affine-a, a small one with odd counts.
@pytest.mark.parametrize(
    ("groups", "heads", "head_dim", "rope_dim", "rank"),
    [(1, 8, 512, 64, 1024), (2, 16, 512, 64, 256), (2, 8, 512, 64, 128), (3, 3, 48, 16, 5)],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_wo_a_equals_oracle(groups, heads, head_dim, rope_dim, rank, tokens) -> None:
    case = Case(groups, heads, head_dim, rope_dim, rank)
    inputs = case.inputs(tokens)
    y = wo_a(*inputs, case.runner().runner_id)
    assert y.dtype == torch.bfloat16
    numerics.assert_close(y, case.oracle(*inputs), TOLERANCE, ROW_TOLERANCE)


@pytest.mark.parametrize(("groups", "heads", "head_dim", "rope_dim", "rank"), [(2, 8, 512, 64, 128), (3, 3, 48, 16, 5)])
def test_bf16_activations_are_rotated_and_multiplied(groups, heads, head_dim, rope_dim, rank) -> None:
    case = Case(groups, heads, head_dim, rope_dim, rank)
    o, positions, cache = case.inputs(5)
    y = wo_a(o, positions, cache, case.runner(activations="bf16").runner_id)
    rotated = torch.from_numpy(rotate_back(o, positions, cache, rope_dim)).to(torch.bfloat16).double().numpy()
    by_group = rotated.reshape(5, groups, case.d_in)
    weights = case.packed.values.reshape(groups, rank, case.d_in)
    expected = np.einsum("tgd,grd->tgr", by_group, weights).reshape(5, -1) * np.float64(np.float32(case.weight_scale_2))
    numerics.assert_close(y, expected, numerics.BF16_MEAN_TOLERANCE + 2e-4, 5e-3)
    assert numerics.errors(y, case.oracle(o, positions, cache))[0] > 0.02
    case.input_scale = 9.0
    assert torch.equal(wo_a(o, positions, cache, case.runner(activations="bf16").runner_id), y)


def test_a_group_sees_its_own_heads_and_rows_only() -> None:
    case = Case(4, 8, 64, 16, 8)
    o, positions, cache = case.inputs(3)
    runner_id = case.runner().runner_id
    before = wo_a(o, positions, cache, runner_id)
    changed = o.clone()
    changed[:, 4:6] = 1.0
    same = wo_a(changed, positions, cache, runner_id).eq(before).view(3, 4, 8)
    assert same[:, [0, 1, 3]].all()
    assert not same[:, 2].all(dim=1).any()


def test_no_tokens() -> None:
    case = Case(2, 4, 64, 16, 8)
    assert wo_a(*case.inputs(0), case.runner().runner_id).shape == (0, 16)


def test_heads_may_be_a_slice_of_padded_heads() -> None:
    case = Case(2, 4, 64, 16, 8)
    o, positions, cache = case.inputs(3)
    padded = torch.full((3, 7, 64), float("nan"), dtype=torch.bfloat16)
    padded[:, :4] = o
    runner_id = case.runner().runner_id
    assert torch.equal(wo_a(padded[:, :4], positions, cache, runner_id), wo_a(o, positions, cache, runner_id))


def test_runner_holds_the_given_tensors_and_knows_its_heads() -> None:
    case = Case(2, 8, 64, 16, 8)
    runner = case.runner()
    assert runner.matrix.weight.data_ptr() == case.packed.weight.data_ptr()
    assert runner.matrix.weight_scale.data_ptr() == case.packed.weight_scale.data_ptr()
    assert (runner.num_heads, runner.out_features) == (8, 16)


@pytest.mark.parametrize(
    ("key", "function", "error", "match"),
    [
        ("weight", lambda t: t.to(torch.int16), TypeError, r"wo_a weight is torch\.int16"),
        ("weight", lambda t: t[:, :60].contiguous(), ValueError, "K = 120 on this rank"),
        ("weight_scale", lambda t: t[:5], ValueError, "weight_scale has shape"),
        ("weight_scale_2", lambda t: t * torch.nan, ValueError, "weight_scale_2 has 1 of 1"),
        ("weight_scale_2", lambda t: t.repeat(2), ValueError, "weight_scale_2 has shape"),
        ("input_scale", lambda t: t * 0, ValueError, "input_scale has 1 of 1"),
        ("num_groups", lambda _: 3, ValueError, "16 rows do not divide into num_groups = 3"),
        ("num_groups", lambda _: 0, ValueError, "num_groups = 0"),
        ("head_dim", lambda _: 96, ValueError, "not a whole number of heads of head_dim = 96"),
        ("rope_dim", lambda _: 15, ValueError, "rope_dim is 15"),
        ("rope_dim", lambda _: 128, ValueError, "rope_dim is 128"),
        ("rope_dim", lambda _: 0, ValueError, "rope_dim is 0"),
        ("backend", lambda _: "none", ValueError, "unknown backend 'none'"),
        ("activations", lambda _: None, ValueError, "unknown activations None"),
    ],
)
def test_runner_raises_with_its_name(key, function, error, match) -> None:
    arguments = {**Case(2, 4, 64, 16, 8).arguments(), "backend": "reference", "activations": "nvfp4"}
    arguments[key] = function(arguments[key])
    with pytest.raises(error, match=f"the layer: .*{match}"):
        WoARunner("the layer", **arguments)
