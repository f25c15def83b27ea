"""Data and expert parallelism: what our experts do between ranks, and what they refuse before a worker is started."""

import re
from types import SimpleNamespace
from typing import Any

import numerics
import pytest
import torch
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm_nvfp4 import moe as overlay
from vllm_nvfp4 import verification

from cutedsl.ops import registry
from cutedsl.runners.moe import MoeRunner

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 8, 3
TOKENS = (5, 2)  # of each data-parallel rank


@pytest.fixture(autouse=True)
def _empty_registry():
    yield
    registry.clear()


def runner(experts: range) -> MoeRunner:
    """The runner of a rank that holds some of the experts; scales that are powers of two make sums of parts exact."""
    w13 = numerics.random_packed(EXPERTS, 2 * INTERMEDIATE, HIDDEN, seed=1)
    w2 = numerics.random_packed(EXPERTS, HIDDEN, INTERMEDIATE, seed=2)
    own = slice(experts.start, experts.stop)
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[own] = torch.arange(len(experts), dtype=torch.int32)
    e = len(experts)
    scales = (torch.full((e, 2), 2.0**-4), torch.full((e, 2), 2.0**-6))
    down_scales = (torch.full((e,), 2.0**-4), torch.full((e,), 2.0**-6))
    return MoeRunner(
        "layers.0.ffn.experts",
        w13.weight[own].contiguous(), w13.weight_scale[own].contiguous(), *scales,
        w2.weight[own].contiguous(), w2.weight_scale[own].contiguous(), *down_scales,
        swiglu_limit=10.0, expert_map=None if e == EXPERTS else expert_map,
    )  # fmt: skip


class Group:
    """The expert-parallel group of one rank, in a world where the other ranks' tensors are known."""

    def __init__(self, rank: int, inputs: list[tuple[torch.Tensor, ...]], outputs: list[torch.Tensor]) -> None:
        self.rank, self.inputs, self.outputs = rank, inputs, outputs
        self.flags: list[bool] = []

    def dispatch(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, is_sharded: bool) -> Any:
        assert all(torch.equal(a, b) for a, b in zip((x, weights, ids), self.inputs[self.rank], strict=True))
        self.flags.append(is_sharded)
        return tuple(torch.cat(parts) for parts in zip(*self.inputs, strict=True))

    def combine(self, partial: torch.Tensor, is_sharded: bool) -> torch.Tensor:
        self.flags.append(is_sharded)
        self.outputs.append(partial)
        return partial


def method(dp_size: int, is_sharded: bool) -> overlay.ModelOptNvFp4RunnerMoEMethod:
    """Our method as a rank of so many has it; construction needs a whole engine."""
    made = object.__new__(overlay.ModelOptNvFp4RunnerMoEMethod)
    made.moe = SimpleNamespace(dp_size=dp_size, is_sequence_parallel=is_sharded)
    made.moe_kernel = None
    return made


def tokens() -> list[tuple[torch.Tensor, ...]]:
    """x, weights and ids of each rank's tokens."""
    generator = torch.Generator().manual_seed(3)
    inputs = []
    for count in TOKENS:
        ids = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K].to(torch.int32)
        x = torch.randn(count, HIDDEN, generator=generator).to(torch.bfloat16)
        inputs.append((x, torch.rand(count, TOP_K, generator=generator), ids))
    return inputs


@pytest.mark.parametrize("is_sharded", [False, True])
def test_ranks_compute_their_experts_for_all_tokens(monkeypatch: pytest.MonkeyPatch, is_sharded: bool) -> None:
    inputs, partial = tokens(), list[torch.Tensor]()
    whole = SimpleNamespace(nvfp4_runner=runner(range(EXPERTS)))
    alone = method(dp_size=1, is_sharded=False)
    want = torch.cat([alone.apply(whole, *of_rank, None, None) for of_rank in inputs]).float()
    for rank in range(2):
        group = Group(rank, inputs, partial)
        monkeypatch.setattr(overlay, "get_ep_group", lambda group=group: group)
        layer = SimpleNamespace(nvfp4_runner=runner(range(4 * rank, 4 * rank + 4)))
        # One data-parallel rank with sequence parallelism exchanges tokens too.
        method(dp_size=1 if is_sharded else 2, is_sharded=is_sharded).apply(layer, *inputs[rank], None, None)
        assert group.flags == [is_sharded, is_sharded]
    got = partial[0].float() + partial[1].float()
    # Each rank's part is rounded to BF16 before the sum over ranks.
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-8 * float(want.abs().max()))
    assert not torch.allclose(partial[0].float(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))


def test_one_rank_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(overlay, "get_ep_group")
    layer, (of_rank, _) = SimpleNamespace(nvfp4_runner=runner(range(EXPERTS))), tokens()
    assert method(dp_size=1, is_sharded=False).apply(layer, *of_rank, None, None).shape == of_rank[0].shape


@pytest.mark.parametrize(("dp_size", "is_sharded"), [(2, False), (1, True)])
def test_vllm_leaves_the_exchange_to_us(dp_size: int, is_sharded: bool) -> None:
    # Its own would come before the router, which then has this rank's token ids for all ranks' tokens.
    made = method(dp_size, is_sharded)
    vllm = SimpleNamespace(moe_config=made.moe, _quant_method=made)
    assert MoERunner.do_naive_dispatch_combine.fget(vllm) is False
    stock = SimpleNamespace(moe_config=made.moe, _quant_method=SimpleNamespace(supports_internal_mk=False))
    assert MoERunner.do_naive_dispatch_combine.fget(stock) is True
    # And it still sums over tensor-parallel ranks itself.
    assert MoERunner._fused_output_is_reduced.fget(vllm) is False


ORDINARY = {
    "data_parallel_size": 1,
    "use_ubatching": False,
    "all2all_backend": "allgather_reducescatter",
    "prefill_context_parallel_size": 1,
    "enable_eplb": False,
    "enable_elastic_ep": False,
}


@pytest.mark.parametrize(
    "given", [{}, {"data_parallel_size": 8}, {"all2all_backend": "deepep_low_latency"}], ids=lambda g: str(g)
)
def test_what_works_is_let_through(given: dict[str, Any]) -> None:
    verification.check_features(SimpleNamespace(**ORDINARY | given))


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"use_ubatching": True}, "--enable-dbo / --ubatch-size: two micro-batches"),
        (
            {"data_parallel_size": 2, "all2all_backend": "deepep_low_latency"},
            "--all2all-backend deepep_low_latency: our experts exchange tokens by allgather_reducescatter only",
        ),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size: hash routing"),
        ({"enable_eplb": True}, "--enable-eplb: prepared experts cannot move"),
        ({"enable_elastic_ep": True}, "--enable-elastic-ep: prepared experts cannot move"),
    ],
)
def test_what_we_lack_is_refused_by_its_flag(given: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=re.escape(flag)) as error:
        verification.check_features(SimpleNamespace(**ORDINARY | given))
    assert str(error.value).endswith("leave it out, or set NVFP4_PROVIDER=stock")
