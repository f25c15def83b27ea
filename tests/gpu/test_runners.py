"""The runners on a GPU, through the custom ops, against the reference on the same GPU: sizes of tests/sim and of the models.

Outputs and workspaces lie between canaries and are full of NaN before; sums that a GEMM's CTAs leave each other are gone
behind it. Graphs replay bit for bit what an eager call gives; a call allocates its output alone and never waits for the GPU.
"""

from collections.abc import Callable
from typing import Any

import gpu_kit
import pytest
import torch
from gpu_kit import (
    assert_near,
    assert_quiet,
    assert_replays,
    assert_rounded,
    assert_same,
    guarded,
    input_scales,
    own,
    random_weight,
    random_x,
    uniform,
)

import cutedsl.ops
from cutedsl import compile as compiler
from cutedsl.reference.linear import linear_fp32
from cutedsl.reference.shared_expert import expert_fp32
from cutedsl.routing import local_expert_ids
from cutedsl.runners.linear import LinearRunner
from cutedsl.runners.moe import MoeRunner
from cutedsl.runners.shared_expert import SharedExpertRunner
from cutedsl.runners.wo_a import WoARunner

OPS = torch.ops.nvfp4
assert cutedsl.ops
pytestmark = pytest.mark.parametrize("activations", gpu_kit.modes())
Arguments = dict[str, Any]
Inputs = tuple[torch.Tensor, ...]


def built(kind: Callable[..., Any], arguments: Arguments, activations: str) -> Any:
    """A runner of the GPU's backend, with tensors of its own."""
    return kind("layer", **own(arguments), backend=gpu_kit.backend(), activations=activations)


# ---- linear ---------------------------------------------------------------------------------------------------------


def linear_arguments(shards: list[int], k: int, scales: list[int]) -> Arguments:
    """A linear whose shard i has the scales[i]-th of different input scales."""
    packed = random_weight(k + sum(shards), sum(shards), k)
    return {
        "weight": packed.weight,
        "weight_scale": packed.weight_scale,
        "weight_scale_2": packed.weight_scale_2 * uniform(1, len(shards)),
        "input_scale": input_scales(2, 9)[scales],
        "shard_sizes": shards,
    }


# Tokens, shards, K, their input scales.
LINEARS = [
    (1, [192, 64], 256, [0, 0]),
    (7, [72], 288, [0]),
    (64, [128, 256], 512, [0, 0]),
    (129, [128, 136], 320, [0, 0]),
    (7, [128, 64, 8], 256, [0, 1, 0]),
    (129, [64, 128], 256, [0, 1]),
    (820, [136], 288, [0]),
]
# One rank's, of V4-Pro and V4-Flash.
MODEL_LINEARS = [
    (1, [1536, 512], 7168, [0, 0]),
    (8, [65536], 1536, [0]),
    (33, [7168], 16384, [0]),
    (300, [1024, 1024], 7168, [0, 1]),
    (64, [64], 7168, [0]),
    (1, [1024, 512], 4096, [0, 0]),
    (16, [32768], 1024, [0]),
    (2048, [4096], 8192, [0]),
    (8192, [2048], 7168, [0]),
    # What reads a layer's input, as one: wq_a, wkv; a compressor's two; weights_proj; the indexer's compressor.
    (1, [1536, 512, 1024, 1024, 64, 256, 256], 7168, [0] * 7),
    (64, [1536, 512, 1024, 1024, 64, 256, 256], 7168, [0] * 7),
    (2048, [1536, 512, 512, 512], 7168, [0] * 4),
]


@pytest.mark.parametrize(("tokens", "shards", "k", "scales"), LINEARS + MODEL_LINEARS)
def test_linear(activations: str, tokens: int, shards: list[int], k: int, scales: list[int]) -> None:
    arguments = linear_arguments(shards, k, scales)
    x = random_x(tokens, tokens, k)
    exact = linear_fp32(x, LinearRunner("reference", **arguments, activations=activations).matrix)
    runner = built(LinearRunner, arguments, activations)
    y = guarded(OPS.linear, x, runner.runner_id)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((tokens, sum(shards)), torch.bfloat16, True)
    assert_rounded(y, exact, k)
    assert_same("the same call again", OPS.linear(x, runner.runner_id), y)


def test_linear_of_strided_rows(activations: str) -> None:
    runner = built(LinearRunner, linear_arguments([64], 256, [0]), activations)
    wide = random_x(1, 5, 400)
    # The second begins at 2 bytes, where a load of 16 cannot.
    for x in (wide[:, 16:272], wide[:, 1:257], wide[:1, 1:257]):
        assert_same("a copy of x", OPS.linear(x, runner.runner_id), OPS.linear(x.clone(), runner.runner_id))


# ---- shared expert --------------------------------------------------------------------------------------------------


def shared_arguments(hidden: int, intermediate: int, limit: float | None) -> Arguments:
    gate_up, down = random_weight(1, 2 * intermediate, hidden), random_weight(2, hidden, intermediate)
    return {
        "gate_up_weight": gate_up.weight,
        "gate_up_weight_scale": gate_up.weight_scale,
        # The sums are about sqrt(hidden): gates and ups become about 2.
        "gate_up_weight_scale_2": gate_up.weight_scale_2 * uniform(3, 2) * 5 / hidden**0.5,
        "gate_up_input_scale": input_scales(4, 1).repeat(2),
        "down_weight": down.weight,
        "down_weight_scale": down.weight_scale,
        "down_weight_scale_2": down.weight_scale_2,
        "down_input_scale": input_scales(5, 1),
        "swiglu_limit": limit,
    }


SHARED = [
    (1, 256, 128, 1.5),
    (7, 288, 192, 1.5),
    (64, 512, 160, None),
    (129, 256, 192, 1.5),
    (1, 7168, 3072, 1.5),
    (64, 7168, 3072, None),
    (1000, 4096, 2048, 1.5),
]


@pytest.mark.parametrize(("tokens", "hidden", "intermediate", "limit"), SHARED)
def test_shared_expert(activations: str, tokens: int, hidden: int, intermediate: int, limit: float | None) -> None:
    arguments = shared_arguments(hidden, intermediate, limit)
    reference = SharedExpertRunner("reference", **arguments, activations=activations)
    x = random_x(tokens, tokens, hidden)
    exact = expert_fp32(x, reference.gate_up, reference.down, limit)
    if limit is not None:
        unclamped = expert_fp32(x, reference.gate_up, reference.down, None)
        assert (exact - unclamped).norm() > 0.1 * exact.norm(), "the limit does nothing here"
    runner = built(SharedExpertRunner, arguments, activations)
    y = guarded(OPS.shared_expert, x, runner.runner_id)
    assert_near(y, exact, torch.zeros_like(exact), requantized=tokens * intermediate)
    assert_same("the same call again", OPS.shared_expert(x, runner.runner_id), y)


# ---- routed experts -------------------------------------------------------------------------------------------------


def moe_arguments(experts: int, hidden: int, intermediate: int, limit: float | None) -> Arguments:
    w13 = random_weight(1, experts, 2 * intermediate, hidden)
    w2 = random_weight(2, experts, hidden, intermediate)
    return {
        "w13_weight": w13.weight,
        "w13_weight_scale": w13.weight_scale,
        "w13_weight_scale_2": w13.weight_scale_2 * uniform(3, experts, 2) * 5 / hidden**0.5,
        "w13_input_scale": input_scales(4, experts, 1).repeat(1, 2),
        "w2_weight": w2.weight,
        "w2_weight_scale": w2.weight_scale,
        "w2_weight_scale_2": w2.weight_scale_2 * uniform(5, experts),
        "w2_input_scale": input_scales(6, experts),
        "swiglu_limit": limit,
    }


def choices(tokens: int, top_k: int, num_global: int, empty: tuple[int, ...] = ()) -> Inputs:
    """Weights and ids: distinct experts, some of them of nobody, some tokens without any."""
    random = gpu_kit.generator(tokens * 7 + top_k)
    order = torch.rand(tokens, num_global, generator=random, device=gpu_kit.device())
    order[:, list(empty)] = 2.0
    ids = order.argsort(1)[:, :top_k].contiguous()
    if tokens > 1:
        ids[torch.rand(ids.shape, generator=random, device=gpu_kit.device()) < 0.05] = -1
        ids[tokens // 2] = -1
    return uniform(tokens, tokens, top_k) * 2, ids


def moe_terms(reference: MoeRunner, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Inputs:
    """(tokens, hidden) FP64: the sum of all terms, and of their magnitudes."""
    total, size = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for _ in range(2))
    local = local_expert_ids(ids, reference.expert_map)
    for e in local[local >= 0].unique().tolist():
        token, choice = (local == e).nonzero(as_tuple=True)
        terms = expert_fp32(x[token], *reference.experts[e], reference.swiglu_limit).double()
        terms *= weights[token, choice, None]
        total.index_add_(0, token, terms)
        size.index_add_(0, token, terms.abs())
    return total, size


# Tokens, top_k, experts here, experts of all ranks or None, hidden, I, limit, type of ids.
MOES = [
    (1, 6, 8, None, 256, 128, 1.5, torch.int32),
    (7, 2, 4, 8, 288, 192, 1.5, torch.int64),
    (64, 6, 5, 12, 256, 128, None, torch.int32),
    (129, 2, 4, None, 512, 128, 1.5, torch.int32),
    (820, 6, 48, 96, 256, 96, 1.5, torch.int64),
    # V4-Pro on one of 8 ranks, and whole V4-Flash.
    (1, 6, 48, 384, 7168, 3072, 1.5, torch.int32),
    (300, 6, 48, 384, 7168, 3072, None, torch.int32),
    (16, 6, 256, None, 4096, 2048, 1.5, torch.int32),
    (2048, 6, 256, None, 4096, 2048, 1.5, torch.int32),
]


@pytest.mark.parametrize(("tokens", "top_k", "experts", "num_global", "hidden", "intermediate", "limit", "dtype"), MOES)
def test_moe(
    activations: str,
    tokens: int,
    top_k: int,
    experts: int,
    num_global: int | None,
    hidden: int,
    intermediate: int,
    limit: float | None,
    dtype: torch.dtype,
) -> None:
    expert_map = None
    if num_global is not None:
        # Experts of this rank, backwards, among those of others.
        expert_map = torch.full((num_global,), -1, device=gpu_kit.device())
        expert_map[1 : 2 * experts : 2] = torch.arange(experts, device=gpu_kit.device()).flip(0)
    arguments = moe_arguments(experts, hidden, intermediate, limit) | {"expert_map": expert_map}
    reference = MoeRunner("reference", **arguments, activations=activations)
    weights, ids = choices(tokens, top_k, num_global or experts, (1,) if top_k < (num_global or experts) else ())
    x = random_x(tokens, tokens, hidden)
    exact, size = moe_terms(reference, x, weights, ids)
    runner = built(MoeRunner, arguments, activations)
    y = guarded(OPS.moe, x, weights, ids.to(dtype), runner.runner_id)
    here = local_expert_ids(ids, expert_map) >= 0
    assert_near(y, exact, size, requantized=int(here.sum()) * intermediate)
    nothing = ~here.any(dim=1)
    assert tokens == 1 or nothing.any()
    assert y[nothing].eq(0).all(), "a token without experts got something"
    assert_same("the same call again", OPS.moe(x, weights, ids.to(dtype), runner.runner_id), y)


def test_moe_with_no_choice_here_and_strided_tables(activations: str) -> None:
    arguments = moe_arguments(4, 256, 128, None)
    reference = MoeRunner("reference", **arguments, activations=activations)
    runner = built(MoeRunner, arguments, activations)
    x = random_x(3, 5, 256)
    weights, ids = choices(5, 4, 4)
    weights, ids = weights[:, :2], ids.int()[:, :2]
    exact, size = moe_terms(reference, x, weights, ids)
    assert_near(OPS.moe(x, weights, ids, runner.runner_id), exact, size, requantized=10 * 128)
    for nobody in (-1, 4):
        assert OPS.moe(x, weights, torch.full_like(ids, nobody), runner.runner_id).eq(0).all()


# ---- wo_a -----------------------------------------------------------------------------------------------------------


def wo_a_arguments(groups: int, heads: int, rank: int, head_dim: int, rope_dim: int) -> Arguments:
    packed = random_weight(groups + heads + rank, groups * rank, heads // groups * head_dim)
    scales = {"weight_scale_2": packed.weight_scale_2, "input_scale": input_scales(1, 1)}
    sizes = {"num_groups": groups, "head_dim": head_dim, "rope_dim": rope_dim}
    return {"weight": packed.weight, "weight_scale": packed.weight_scale} | scales | sizes


def wo_a_inputs(tokens: int, heads: int, head_dim: int, rope_dim: int) -> Inputs:
    random = gpu_kit.generator(tokens)
    angles = torch.rand(50, rope_dim // 2, generator=random, device=gpu_kit.device()) * 6.2832
    positions = torch.randint(0, 50, (tokens,), generator=random, device=gpu_kit.device())
    return random_x(tokens, tokens, heads, head_dim), positions, torch.cat((angles.cos(), angles.sin()), dim=1)


# Tokens, groups, heads, R, head_dim, rope_dim; the last two are V4-Pro whole and on one of 8 ranks.
WO_AS = [
    (1, 2, 4, 128, 128, 64),
    (7, 3, 6, 72, 64, 16),
    (64, 2, 4, 64, 128, 64),
    (129, 2, 2, 128, 256, 64),
    (130, 16, 128, 1024, 512, 64),
    (8, 2, 16, 1024, 512, 64),
]


@pytest.mark.parametrize(("tokens", "groups", "heads", "rank", "head_dim", "rope_dim"), WO_AS)
def test_wo_a(activations: str, tokens: int, groups: int, heads: int, rank: int, head_dim: int, rope_dim: int) -> None:
    arguments = wo_a_arguments(groups, heads, rank, head_dim, rope_dim)
    inputs = wo_a_inputs(tokens, heads, head_dim, rope_dim)
    reference = WoARunner("reference", **arguments, activations=activations)
    expected = OPS.wo_a(*inputs, reference.runner_id)
    runner = built(WoARunner, arguments, activations)
    y = guarded(OPS.wo_a, *inputs, runner.runner_id)
    assert y.is_contiguous()
    # The reference is rounded too: the two differ by one ulp where FP32 sums differ.
    assert_rounded(y, expected, heads // groups * head_dim)
    assert (y != expected).double().mean() <= 0.02
    assert_same("the same call again", OPS.wo_a(*inputs, runner.runner_id), y)


# ---- calls ----------------------------------------------------------------------------------------------------------

# By kind of runner: its arguments, and inputs of so many tokens from a seed.
KINDS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments], Callable[[int, int], Inputs]]] = {
    "linear": (
        LinearRunner,
        lambda: linear_arguments([128, 64, 8], 256, [0, 1, 0]),
        lambda tokens, seed: (random_x(seed, tokens, 256),),
    ),
    "shared_expert": (
        SharedExpertRunner,
        lambda: shared_arguments(256, 128, 1.5),
        lambda tokens, seed: (random_x(seed, tokens, 256),),
    ),
    "moe": (
        MoeRunner,
        lambda: moe_arguments(16, 256, 128, 1.5),
        lambda tokens, seed: (random_x(seed, tokens, 256), *(t.roll(seed, 0) for t in choices(tokens, 6, 16))),
    ),
    "wo_a": (
        WoARunner,
        lambda: wo_a_arguments(2, 4, 64, 64, 16),
        lambda tokens, seed: tuple(t.roll(seed, 0) for t in wo_a_inputs(tokens, 4, 64, 16)),
    ),
}


@pytest.mark.parametrize("tokens", [1, 7, 64, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_what_a_call_gives(activations: str, kind: str, tokens: int) -> None:
    make, arguments, inputs = KINDS[kind]
    runner = built(make, arguments(), activations)
    # The largest batch first, as an engine does: workspaces must not grow during a capture.
    runner(*inputs(256, 0))
    assert_replays(lambda *args: getattr(OPS, kind)(*args, runner.runner_id), inputs(tokens, 1), inputs(tokens, 2))


@pytest.mark.parametrize("tokens", [1, 7, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_allocates_its_output_alone_and_never_waits(activations: str, kind: str, tokens: int) -> None:
    make, arguments, inputs = KINDS[kind]
    runner = built(make, arguments(), activations)
    assert_quiet(lambda *args: getattr(OPS, kind)(*args, runner.runner_id), *inputs(tokens, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_calls_close_together_give_what_launches_one_at_a_time_give(
    monkeypatch: pytest.MonkeyPatch, activations: str, kind: str
) -> None:
    # On Hopper a kernel may begin before the ones before it have ended, and all calls use the same buffers.
    make, arguments, inputs = KINDS[kind]
    runner, op = built(make, arguments(), activations), getattr(OPS, kind)
    given = [inputs(tokens, seed) for seed, tokens in enumerate((1, 200, 2, 64, 1, 1, 7, 129) * 4)]
    runner(*inputs(256, 0))
    compiled = compiler.compiled

    def one_at_a_time(*arguments: Any) -> Callable[..., None]:
        def launch(*launched: Any) -> None:
            compiled(*arguments)(*launched)
            torch.cuda.synchronize()

        return launch

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compiled", one_at_a_time)
        expected = [op(*args, runner.runner_id) for args in given]
    # While the GPU waits the launches queue up.
    torch.cuda._sleep(50_000_000)
    for y, wanted in zip([op(*args, runner.runner_id) for args in given], expected, strict=True):
        assert_same("calls close together", y, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [op(*args, runner.runner_id) for args in given]
    for _ in range(20):
        for y in outputs:
            y.fill_(float("nan"))
        graph.replay()
        for y, wanted in zip(outputs, expected, strict=True):
            assert_same("a replay of calls close together", y, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(activations: str, kind: str) -> None:
    make, arguments, inputs = KINDS[kind]
    runner = built(make, arguments(), activations)
    y = getattr(OPS, kind)(
        *(t[:0] if i < 3 and t.shape[0] == 2 else t for i, t in enumerate(inputs(2, 0))), runner.runner_id
    )
    assert (y.shape[0], y.dtype) == (0, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tokens_does_not_matter(activations: str, kind: str) -> None:
    make, arguments, inputs = KINDS[kind]
    runner = built(make, arguments(), activations)
    given = inputs(12, 3)
    order = torch.randperm(12, generator=gpu_kit.generator(4), device=gpu_kit.device())
    mixed = tuple(t[order] if len(t) == 12 else t for t in given)
    op = getattr(OPS, kind)
    assert_same("tokens in another order", op(*mixed, runner.runner_id), op(*given, runner.runner_id)[order])
