"""The steps in front of graph capture: every class of size and of sampling, counted, run where they should be, harmless."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving import run_engine
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import warmup as upstream
from vllm_nvfp4 import warmup_steps as steps
from vllm_nvfp4.status import Status

SMS = {"H200": 132, "B200": 148}


class Beats:
    """Stands in for the heartbeat file."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, ...]] = []

    def update(self, *state: Any) -> None:
        self.found.append(state)


def worker(tokens: int = 8192, max_len: int = 100_000, **changed: Any) -> Any:
    """vLLM's worker, as far as we rely on it."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens, max_num_seqs=100),
        model_config=SimpleNamespace(
            max_model_len=max_len,
            max_logprobs=20,
            hf_config=SimpleNamespace(index_topk=1024),
            get_vocab_size=lambda: 129_280,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        kernel_config=SimpleNamespace(enable_jit_warmup=True),
    )
    runner = Runner()
    found = SimpleNamespace(
        vllm_config=config, model_runner=runner, use_v2_model_runner=True, device=torch.device("cpu"),
        execute_model=None, sample_tokens=None,
    )  # fmt: skip
    vars(found).update(changed)
    return found


class Runner:
    """vLLM's runner, as far as we rely on it."""

    decode_query_len = 1
    attn_groups: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.captured = 0

    def capture_model(self, *, profile_only: bool = False) -> int:
        self.captured += 1
        return 7


# ---- sizes


@pytest.mark.parametrize("sms", SMS.values(), ids=SMS)
@pytest.mark.parametrize(("limit", "shards"), [(8192, 1), (8192, 8), (16384, 2), (512, 1), (100, 4), (3, 1)])
def test_every_split_of_the_gemm_is_met(limit: int, sms: int, shards: int) -> None:
    sizes = steps.prefill_sizes(limit, sms, shards)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == limit
    assert sizes[-1] >= 3
    assert len(sizes) <= 50
    for share in (1, shards):

        def parts(tokens: int, share: int = share) -> int:
            """What mhc/tilelang_kernels.py:compute_num_split has for a rank's tokens, where K does not limit it."""
            local = -(-tokens // share)
            return max(1, sms // -(-local // 64))

        assert {parts(tokens) for tokens in range(1, limit + 1)} == {parts(tokens) for tokens in sizes}


def test_every_width_of_log_probabilities_is_met() -> None:
    def kernel(count: int) -> tuple[int, bool, bool]:
        """What Triton compiles for: the power of two, and numbers that it knows to be 1 or divisible by 16."""
        columns = 1 + count
        return 1 << (columns - 1).bit_length(), columns == 1, columns % 16 == 0

    warm = {kernel(count) for count in (*steps.LOGPROBS, 5)}
    assert {kernel(count) for count in range(21)} == warm


# ---- the run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is run, instead of running it."""
    found: list[Any] = []
    monkeypatch.setattr(steps, "_num_sms", lambda _: 4)
    monkeypatch.setattr(steps, "_prefill", lambda _, tokens: bool(found.append(tokens)) or tokens > 64)
    monkeypatch.setattr(steps, "_sample", lambda _, way: found.append(way))
    monkeypatch.setattr(steps, "_schedules", lambda _: [("builder", 32), ("builder", 64)])
    monkeypatch.setattr(steps, "_schedule", lambda _, *schedule: found.append(schedule))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    return found


def test_all_is_run_and_counted(calls: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    beats = Beats()
    with caplog.at_level(logging.INFO, "vllm.nvfp4"):
        steps.run(worker(), beats)
    assert calls == [8192, 192, 128, 64, *steps.WAYS.values(), ("builder", 32), ("builder", 64)]
    assert beats.found == [("warming steps", done, len(calls), "steps") for done in range(len(calls) + 1)]
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith(
        f"NVFP4 warm-up: steps of [8192, 192, 128] tokens, {len(steps.WAYS)} ways to sample, 2 sch"
    )
    assert said[1].startswith("NVFP4 warm-up: steps of [64] tokens were not run")


@pytest.mark.parametrize(
    ("tokens", "max_len", "is_warned"),
    [(4100, 100_000, True), (4101, 100_000, False), (2048, 4100, True), (4099, 4099, False)],
)
def test_a_step_too_short_for_the_indexer_is_said(
    calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tokens: int,
    max_len: int,
    is_warned: bool,
) -> None:
    """Its prefill has one token less than the step, and 1025 entries of 4 tokens are the first that 1024 are chosen from;
    who serves none so long needs none."""
    monkeypatch.setattr(steps, "_prefill", lambda *_: True)
    steps.run(worker(tokens, max_len), Beats())
    assert [record.getMessage().startswith("NVFP4 warm-up: no step") for record in caplog.records] == [True] * is_warned


def test_the_model_limits_a_step_and_the_servers_limit_the_ways(calls: list[Any]) -> None:
    small = worker(8192, max_len=200)
    small.vllm_config.model_config.max_logprobs = 2
    steps.run(small, Beats())
    assert calls[0] == 200
    assert [way["logprobs"] for way in calls if isinstance(way, dict) and "logprobs" in way] == [0, 1, 2]
    calls.clear()
    # vLLM's own function takes 0, 1, 2 and so on for token ids.
    small.vllm_config.model_config.get_vocab_size = lambda: 150
    small.vllm_config.model_config.max_logprobs = -1
    steps.run(small, Beats())
    assert calls[0] == 150
    assert len([way for way in calls if isinstance(way, dict)]) == len(steps.WAYS)


def test_a_way_is_asked_for_through_vllms_own_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    before = SamplingParams.for_sampler_warmup()

    def warmup_kernels(*arguments: Any) -> None:
        asked.append((arguments, SamplingParams.for_sampler_warmup()))
        raise RuntimeError("no kernel")

    monkeypatch.setattr(upstream, "warmup_kernels", warmup_kernels)
    found = worker()
    with pytest.raises(RuntimeError, match="no kernel"):
        steps._sample(found, {"top_k": 20, "seed": 1})
    ((arguments, params),) = asked
    assert arguments == (found.model_runner, None, None)
    assert (params.top_k, params.seed, params.top_p) == (20, 1, 1.0)
    assert repr(SamplingParams.for_sampler_warmup()) == repr(before), "as before, whatever happened"


# ---- when


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU, as far as the question is whether there is one; what was run."""
    ran: list[Any] = []
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    monkeypatch.setattr(steps, "run", lambda worker, _: ran.append(worker.model_runner.captured))
    monkeypatch.delenv("NVFP4_WARMUP", raising=False)
    return ran


def captured(found: Any) -> None:
    """As vLLM's worker does it, twice: the wrapping is undone."""
    with steps.before_capture(found, Status("")):
        assert found.model_runner.capture_model() == 7
    assert "capture_model" not in vars(found.model_runner)
    assert found.model_runner.capture_model(profile_only=True) == 7


@pytest.mark.parametrize("mode", ["", "steps", "sweep"])
def test_steps_come_once_and_before_the_first_graph(
    on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    if mode:
        monkeypatch.setenv("NVFP4_WARMUP", mode)
    captured(worker())
    assert on_cuda == [0]


def test_no_steps_where_they_are_not_wanted(
    on_cuda: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captured(worker(use_v2_model_runner=False))
    eager = worker()
    eager.vllm_config.kernel_config.enable_jit_warmup = False
    captured(eager)
    assert [record.getMessage()[:26] for record in caplog.records] == ["NVFP4 warm-up: no steps, a"] * 2
    monkeypatch.setenv("NVFP4_WARMUP", "off")
    captured(worker())
    monkeypatch.delenv("NVFP4_WARMUP")
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: False)
    captured(worker())
    assert on_cuda == []
    assert len(caplog.records) == 2, "an answer that was asked for is no news"


def test_a_misspelled_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFP4_WARMUP", "sweeps")
    with pytest.raises(ValueError, match="NVFP4_WARMUP='sweeps': expected one of off, steps, sweep"):
        captured(worker())


# ---- schedules


def test_hopper_has_a_schedule_for_every_32_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils import deep_gemm
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerMetadataBuilder

    builder = object.__new__(DeepseekV32IndexerMetadataBuilder)
    builder.kv_cache_spec, builder.num_sms = SimpleNamespace(num_states=64), 132
    groups = [SimpleNamespace(metadata_builders=[object()]), SimpleNamespace(metadata_builders=[builder])]
    found = worker()
    found.model_runner.attn_groups = [groups, groups]
    is_hopper, has_deep_gemm = False, True
    monkeypatch.setattr(
        type(current_platform), "is_device_capability", lambda _, asked, *__: is_hopper and asked == (9, 0)
    )
    monkeypatch.setattr(deep_gemm, "has_deep_gemm", lambda: has_deep_gemm)
    assert list(steps._schedules(found)) == []
    is_hopper, has_deep_gemm = True, False
    assert list(steps._schedules(found)) == []
    has_deep_gemm = True
    assert list(steps._schedules(found)) == [(builder, rows) for rows in (32, 64, 96, 128)], "for up to 100 users"
    found.model_runner.decode_query_len = 3
    assert len(list(steps._schedules(found))) == 10, "each draft may be a row"
    found.vllm_config.scheduler_config.max_num_batched_tokens = 70
    assert len(list(steps._schedules(found))) == 3, "no step has more rows than tokens"
    asked: list[Any] = []
    monkeypatch.setattr(deep_gemm, "get_paged_mqa_logits_metadata", lambda *arguments: asked.append(arguments))
    steps._schedule(found, builder, 64)
    ((lengths, page, sms),) = asked
    assert (lengths.shape, lengths.dtype, page, sms) == ((64, 1), torch.int32, 64, 132)


# ---- the real engine


@pytest.mark.engine
def test_an_engine_answers_as_without_them(affine: Path, tmp_path: Path) -> None:
    """On a CPU they compile nothing; that vLLM's scheduler interface takes them, and that nothing is left behind, shows."""
    rows = json.loads((affine / "reference.json").read_text())[:3]
    prompts = [row["prompt_token_ids"] for row in rows]
    out = run_engine(tmp_path, affine, prompts, steps=True)
    assert [answer["tokens"] for answer in out["answers"]] == [row["greedy"] for row in rows]
    assert "NVFP4 warm-up: steps of [" in out["log"]
    assert f"{len(steps.WAYS)} ways to sample, 0 schedules" in out["log"]
