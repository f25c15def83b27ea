"""scripts/make_random_checkpoint.py at small sizes, and scripts/gpu_engine.py: its parts, and a rehearsal of it on a CPU."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gpu_engine
import make_random_checkpoint as random_checkpoint
import make_tiny_checkpoint as tiny
import pytest
import torch
from gpu_engine import Request
from make_random_checkpoint import RandomSpec, make_random_checkpoint
from safetensors import safe_open
from vllm_nvfp4.doctor.examine import Options, examine

from cutedsl.quantize import dequantize

ROOT = Path(__file__).resolve().parents[2]
SMALL = RandomSpec(
    layers=3, experts=8, hidden=256, intermediate=64, heads=8, q_lora=128, o_groups=2, o_lora=128, index_heads=8,
    index_topk=512, vocab=512, shards=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random") / "small"
    make_random_checkpoint(out, SMALL, "cpu")
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def weight(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return dequantize(*(tensors[f"{module}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2")))


# ---- the checkpoint -------------------------------------------------------------------------------------------------


def test_defaults_have_the_layers_of_v4_pro() -> None:
    pro = json.loads((ROOT / "tests" / "data" / "configs" / "deepseek-v4-pro.json").read_text())
    spec = RandomSpec()
    config = tiny.model_config(spec.tiny) | random_checkpoint.PRO_CONFIG
    names = (
        "hidden_size", "moe_intermediate_size", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank",
        "index_n_heads", "index_head_dim", "index_topk", "num_experts_per_tok", "n_shared_experts", "hc_mult", "swiglu_limit",
        "routed_scaling_factor", "qk_rope_head_dim", "sliding_window",
    )  # fmt: skip
    assert {name: config[name] for name in names} == {name: pro[name] for name in names}
    for num_layers in (1, 2, 4, 7):
        assert list(random_checkpoint.ratios(num_layers)) == pro["compress_ratios"][:num_layers]
    size = tiny.num_bytes(random_checkpoint.plan(spec.tiny), spec.tiny)
    assert 10e9 < size < 12e9


def test_doctor_finds_nothing_wrong(small: Path) -> None:
    report = examine(str(small), Options(deep=True))
    assert report.exit_code == 0
    assert {finding.code for finding in report.findings} == {"IGNORE_OMITS", "IGNORE_UNMATCHED"}
    assert report.num_tensors == len(tensors_of(small))


def test_formats_are_those_of_a_model_trained_in_bf16(small: Path) -> None:
    tensors = tensors_of(small)
    assert tensors["model.layers.0.attn.wo_a.weight"].dtype == torch.bfloat16
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.ffn.gate.bias"].dtype == torch.float32
    assert tensors["model.layers.2.attn.indexer.weights_proj.weight"].dtype == torch.uint8
    assert json.loads((small / "config.json").read_text())["dtype"] == "bfloat16"
    assert {len(file.name) for file in small.glob("*.safetensors")} == {len("model-00001-of-00003.safetensors")}


def test_weights_are_of_order_one(small: Path) -> None:
    """Outputs have the size of inputs: every row of a linear has about unit length."""
    tensors, checked = tensors_of(small), 0
    for name in tensors:
        if not name.endswith(".weight_scale"):
            continue
        w = weight(tensors, name.removesuffix(".weight_scale"))
        assert 0.8 < float(w.norm(dim=1).pow(2).mean()) < 1.25, name
        checked += 1
    assert checked > 3 * (8 + 1) * 3


def test_experts_are_bases_in_another_order(small: Path) -> None:
    tensors = tensors_of(small)
    w1, w3 = ([weight(tensors, f"model.layers.1.ffn.experts.{e}.{w}") for e in range(8)] for w in ("w1", "w3"))
    scales = [tensors[f"model.layers.1.ffn.experts.{e}.w1.weight_scale_2"] for e in range(8)]
    assert len({float(scale) for scale in scales}) == 8
    for e in range(8):
        assert tensors[f"model.layers.1.ffn.experts.{e}.w3.weight_scale_2"] == scales[e]
        for other in range(e):
            assert not torch.equal(w1[e] / scales[e], w1[other] / scales[other])
        assert not torch.equal(w1[e], w3[e])
    # Up to order and sign there are few matrices.
    sorted_rows = {
        tuple((w / s).abs().sum(1).sort().values.tolist()) for w, s in zip(w1 + w3, scales + scales, strict=True)
    }
    assert 1 < len(sorted_rows) <= random_checkpoint.NUM_BASES


def test_same_seed_same_bytes_however_it_is_sharded(small: Path, tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path / "again", SMALL, "cpu")
    assert digests(tmp_path / "again") == digests(small)
    make_random_checkpoint(tmp_path / "one", dataclasses.replace(SMALL, shards=1), "cpu")
    one, three = tensors_of(tmp_path / "one"), tensors_of(small)
    assert one.keys() == three.keys()
    assert all(
        torch.equal(one[name].view(torch.uint8), three[name].view(torch.uint8)) for name in one if one[name].ndim
    )
    make_random_checkpoint(tmp_path / "other", dataclasses.replace(SMALL, seed=1), "cpu")
    assert digests(tmp_path / "other")["model-00001-of-00003.safetensors"] not in digests(small).values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layers": 0}, "layers is 0"), ({"hidden": 250}, "multiples of 16"), ({"o_groups": 3}, "divisor of heads")],
)
def test_bad_sizes_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_random_checkpoint(tmp_path / "x", dataclasses.replace(SMALL, **changes), "cpu")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(random_checkpoint.os, "pwrite", full)
    arguments = [str(tmp_path / "x"), "--device", "cpu"]
    arguments += [f"--{f.name.replace('_', '-')}={getattr(SMALL, f.name)}" for f in dataclasses.fields(SMALL)]
    assert random_checkpoint.main(arguments) == 1
    assert not list(tmp_path.iterdir())


def test_a_short_write_is_continued(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(random_checkpoint.os, "pwrite", lambda fd, data, at: write(fd, data[:5000], at))
    make_random_checkpoint(tmp_path / "x", SMALL, "cpu")
    assert digests(tmp_path / "x") == digests(small)


# ---- gpu_engine.py --------------------------------------------------------------------------------------------------


class Engine:
    """Answers like vLLM's LLMEngine: a token a request and step, cumulative."""

    def __init__(self, cut: str = "") -> None:
        self.running: dict[str, SimpleNamespace] = {}
        self.most, self.cut = 0, cut

    def add_request(self, name: str, prompt: dict, params: object) -> None:
        self.running[name] = SimpleNamespace(params=params, tokens=[], first=prompt["prompt_token_ids"][0])
        self.most = max(self.most, len(self.running))

    def step(self) -> list[SimpleNamespace]:
        outputs = []
        for name, r in list(self.running.items()):
            r.tokens.append(r.first)
            done = len(r.tokens) == (1 if name == self.cut else r.params.max_tokens)
            rows = [{t: SimpleNamespace(logprob=-1.0)} for t in r.tokens] if r.params.logprobs else None
            answer = SimpleNamespace(token_ids=list(r.tokens), logprobs=rows)
            outputs.append(SimpleNamespace(request_id=name, outputs=[answer], finished=done))
            if done:
                del self.running[name]
        return outputs


def test_requests_are_drawn_as_told() -> None:
    a, b = (gpu_engine.mixed(4096, 1500, 200, seed) for seed in (0, 1))
    assert [r.prompt for r in a] == [r.prompt for r in gpu_engine.mixed(4096, 1500, 200, 0)] != [r.prompt for r in b]
    lengths = [len(r.prompt) for r in a]
    assert (min(lengths) < 50, max(lengths) <= 1500, max(lengths) > 1400) == (True, True, True)
    assert {r.max_tokens for r in a} == set(range(8, 33))
    assert [len(r.prompt) for r in gpu_engine.eight(4096, 1500, 0)] == [1, 8, 45, 135, 300, 600, 1050, 1500]
    assert all(gpu_engine.FIRST_TOKEN_ID <= t < 600 for r in gpu_engine.eight(600, 99, 0) for t in r.prompt)


def test_serve_keeps_so_many_at_once() -> None:
    engine, requests = Engine(), gpu_engine.mixed(600, 20, 30, 0)
    done = gpu_engine.serve(engine, requests, 7, "x")
    assert (len(done), engine.most) == (30, 7)
    assert all(r.tokens == [r.prompt[0]] * r.max_tokens and r.added_s <= r.first_s < r.last_s for r in done)
    assert not any(r.chosen for r in done)


def test_serve_begins_nothing_behind_its_limit() -> None:
    assert gpu_engine.serve(Engine(), gpu_engine.mixed(600, 20, 30, 0), 7, "x", limit_s=0.0) == []


def test_serve_refuses_a_short_answer() -> None:
    with pytest.raises(RuntimeError, match=r"requests \[2\] did not get"):
        gpu_engine.serve(Engine(cut="x-2"), gpu_engine.eight(600, 20, 0), 8, "x")


def test_times() -> None:
    requests = [Request([1], 3, False, 1.0, 1.0 + i / 100, 1.0 + i / 100 + 0.02, [1, 1, 1]) for i in range(1, 101)]
    found = gpu_engine.times(requests, 2.0)
    assert (found["ttft_ms_p50"], found["ttft_ms_p99"]) == (pytest.approx(500), pytest.approx(990))
    assert (found["tpot_ms_p50"], found["tpot_ms_p99"]) == (pytest.approx(10), pytest.approx(10))
    assert found["output_tokens"] == 300
    one = gpu_engine.times([Request([1], 1, False, 1.0, 2.0, 2.0, [1])], 1.0)
    assert (one["ttft_ms_p50"], one["tpot_ms_p50"]) == (1000.0, None)


def answer(tokens: list[int], chosen: list[float]) -> Request:
    best = [{token: value, 7: -3.0} | {token: value} for token, value in zip(tokens, chosen, strict=True)]
    return Request([1, 2], len(tokens), True, tokens=tokens, best=best)


def test_compare_looks_no_further_than_the_first_difference() -> None:
    one = [answer([1, 2, 3, 4], [-1.0, -1.0, -1.0, -1.0]), answer([5, 6], [-2.0, -2.0])]
    other = [answer([1, 2, 9, 8], [-1.0, -1.25, -7.0, -7.0]), answer([5, 6], [-2.0, -2.5])]
    found = gpu_engine.compare(one, other)
    assert (found["different_tokens"], found["different_requests"], found["first_difference"]) == (2, 1, 2)
    assert (found["tokens"], found["largest_logprob_distance"]) == (6, 0.5)
    assert [row["logprob"] for row in found["each"]] == [0.25, 0.5]
    assert gpu_engine.compare(one, one)["first_difference"] is None


def test_compare_knows_near_ties() -> None:
    """7 is among the best of every token, at -3; 8 is not."""
    found = gpu_engine.compare([answer([1, 7], [-1.0, -3.0])], [answer([1, 2], [-1.0, -2.75])])
    assert (found["largest_gap"], found["different_tokens"]) == (math.inf, 1)  # 2 was not among the first's
    one = Request([1], 1, True, tokens=[4], best=[{4: -1.0, 5: -1.125}])
    other = Request([1], 1, True, tokens=[5], best=[{5: -1.0, 4: -1.25}])
    assert gpu_engine.compare([one], [other])["largest_gap"] == 0.25
    assert gpu_engine.compare([one], [one])["largest_gap"] == 0.0


def test_alone_and_together_may_differ_in_near_ties_only(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.answers["before"] = [Request([1], 1, True, tokens=[4], best=[{4: -1.0, 5: -1.0 - gpu_engine.NEAR_TIE / 2}])]
    for other, good in (-1.0 - gpu_engine.NEAR_TIE / 2, True), (-1.0 - gpu_engine.NEAR_TIE, False):
        run.answers["together"] = [Request([1], 1, True, tokens=[5], best=[{5: -1.0, 4: other}])]
        run.compare("alone_together", "before", "together")
        assert run.found["checks"]["alone equals together, but for near ties"] is good


def test_answers_are_compared_with_those_of_an_earlier_run(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.answers["before"] = [answer([3, 4], [-1.0, -2.0])]
    run.against()
    run.args.out.write_text(json.dumps(run.found))
    other = new_run(tmp_path)
    other.args.against = run.args.out
    other.answers["before"] = [answer([3, 4], [-1.0, -2.5])]
    other.against()
    assert other.found["against"]["largest_logprob_distance"] == 0.5
    other.answers["before"] = [Request([9], 1, True, tokens=[4], best=[{4: -1.0}])]
    with pytest.raises(ValueError, match="other requests"):
        other.against()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_compare_does_not_lose_a_number_that_is_none(bad: float) -> None:
    found = gpu_engine.compare([answer([1, 2], [-1.0, -1.0])], [answer([1, 2], [bad, -1.0])])
    assert found["largest_logprob_distance"] == math.inf


def new_run(tmp_path: Path) -> gpu_engine.Run:
    return gpu_engine.Run(gpu_engine.options(["--model", "m", "--out", str(tmp_path / "out.json"), "--cpu-rehearsal"]))


def test_a_part_that_fails_is_recorded(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run.part("one", lambda: {}["no such key"]) is None
    assert run.part("two", lambda: 7) == 7
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["failed"] == {"one": "KeyError: 'no such key'"}
    assert set(written["part_seconds"]) == {"one", "two"}
    assert "FAILED one: KeyError: 'no such key'" in gpu_engine.table(written)


def test_a_phase_that_is_missing_or_cut_short_is_not_ok(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    phase = {"requests": 8, "asked": 8, "compiled": {"others": 0}}
    for phases, good in (
        (dict.fromkeys(gpu_engine.PHASES, phase), True),
        (dict.fromkeys(gpu_engine.PHASES[1:], phase), False),
        (dict.fromkeys(gpu_engine.PHASES, phase) | {"mixed": phase | {"requests": 7}}, False),
    ):
        run.found["phases"] = phases
        run.monitor()
        assert run.found["checks"] == {"every request answered": good, "nothing compiled while serving": True}
    run.found["phases"]["after"] = phase | {"compiled": {"others": 0, "ours_loaded": 1}}
    run.monitor()
    assert not run.found["checks"]["nothing compiled while serving"]


def test_an_engine_that_does_not_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: gpu_engine.Run) -> None:
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(gpu_engine.Run, "start", broken)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "NVFP4_STRICT", "VLLM_CPU_KVCACHE_SPACE", "NVFP4_STATUS_FILE"):
        monkeypatch.setenv(name, "1")
    out = tmp_path / "deeper" / "out.json"
    assert gpu_engine.main(["--model", "m", "--out", str(out), "--cpu-rehearsal"]) == 1
    assert json.loads(out.read_text())["failed"] == {"start": "RuntimeError: no such GPU"}


def test_events_of_vllms_monitor_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm.utils import jit_monitor

    passed: list[str] = []
    monkeypatch.setattr(jit_monitor, "_handle_jit_event", lambda **event: passed.append(event["fn_name"]))
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path))
    counting = gpu_engine.Compilations()
    counting.watch()
    before = counting.now()
    jit_monitor._log_cutedsl_jit_compile("some_kernel")
    (tmp_path / "cache" / "kernel.gemm.abc").mkdir(parents=True)
    after = counting.now()
    assert {kind: after[kind] - before[kind] for kind in after} == {
        "ours_compiled": 0, "ours_loaded": 0, "deep_gemm": 1, "others": 1,
    }  # fmt: skip
    assert passed == ["some_kernel"]
    assert dict(counting.events) == {"CuTeDSL JIT compilation: some_kernel": 1}


def test_phases_of_the_start(tmp_path: Path) -> None:
    from vllm_nvfp4.status import Status

    phases = gpu_engine.Phases(str(tmp_path / "status"))
    phases.start()
    status = Status(str(tmp_path / "status"))
    started = gpu_engine.process_started_s()
    for phase in ("loading", "warming up"):
        status.update(phase)
        wait_for(lambda phase=phase: phase in phases.begun.values())
    status.update("warmed up", 1, 1)
    wait_for(lambda: "warmed up" in phases.begun.values())
    found = phases.seconds(started, status.started + 2.0)
    assert [row["phase"] for row in found] == ["python and imports", "loading", "warming up", "warmed up"]
    assert found[-1]["seconds"] == pytest.approx(2.0)
    assert sum(row["seconds"] for row in found) == pytest.approx(status.started + 2.0 - started)
    assert not phases.is_alive()


def wait_for(condition: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("made", [False, True])
def test_gpu_check_makes_the_checkpoint_once(tmp_path: Path, made: bool) -> None:
    stub, model = tmp_path / "python", tmp_path / "model"
    stub.write_text('#!/bin/sh\necho "asked: $*"\n')
    stub.chmod(0o755)
    model.mkdir()
    if made:
        (model / "config.json").touch()
    env = os.environ | {"PYTHON": str(stub), "MIDSIZE_DIR": str(model)}
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "logs"), "midsize"]
    subprocess.run(command, env=env, capture_output=True, timeout=60, check=True)
    asked = [
        line
        for line in (tmp_path / "logs" / "midsize.log").read_text().splitlines()
        if line.startswith("asked: scripts")
    ]
    serve = f"asked: scripts/gpu_engine.py --model {model} --out {tmp_path}/logs/midsize.json"
    assert asked == ([] if made else [f"asked: scripts/make_random_checkpoint.py {model}"]) + [serve]


@pytest.mark.engine
def test_rehearsal_on_a_cpu(small: Path, tmp_path: Path) -> None:
    """The loader takes the checkpoint, the engine serves it, and every part of the script runs."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_engine.py"), "--model", str(small), "--out", str(out)]
    command += ["--cpu-rehearsal", "--requests", "3", "--at-once", "2", "--max-prompt", "40", "--output-tokens", "4"]
    env = os.environ | {"COMMIT": "c0ffee"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = json.loads(out.read_text())
    assert (found["failed"], found["commit"]) == ({}, "c0ffee")
    assert {name: phase["requests"] for name, phase in found["phases"].items()} == {
        "before": 8, "mixed": 3, "after": 8, "together": 8,
    }  # fmt: skip
    assert found["before_after"]["different_tokens"] == 0
    assert found["checks"] == dict.fromkeys(
        (
            "no fallbacks", "nothing compiled while serving", "alone equals together, but for near ties",
            "log-probabilities are finite",
            "weights as planned", "every request answered",
        ), True,
    )  # fmt: skip
    assert {row["served_by"] for row in found["selection"]} == {"cutedsl reference"}
    assert "loading" in {row["phase"] for row in found["start"]["phases"]}
    planned = {row["what"]: row for row in found["memory"]["against_plan"]}
    assert planned["weights: routed_experts"]["measured"] == planned["weights: routed_experts"]["planned"] > 0
    assert "alone_together: 0 of 32 tokens differ" in done.stdout
