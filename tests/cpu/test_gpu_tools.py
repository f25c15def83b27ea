"""What runs on GPUs, tried on a CPU: benchmarks with the reference backend, scripts/gpu_check.sh, tests/gpu's own checks."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cutedsl.ops import registry
from cutedsl.reference import linear as reference_linear

MODULES = ("common", "linear", "moe")
REHEARSAL = ("--device", "cpu", "--provider", "reference", "--rounds", "3")
LINEAR, MOE = "48x32", "64x32x8x2"


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(root / "scripts" / "bench"))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


def run(bench: dict[str, ModuleType], name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    module = bench[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *REHEARSAL, *arguments])
    return bench["common"].main("", module.MS, module.PEERS, list(module.SHAPES), module.measure)


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_linear(bench: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COMMIT", "c0ffee")
    assert run(bench, "linear", monkeypatch, "--shapes", LINEAR, "--m", "1,70", "--peers", "cublas") == 0
    found = rows(capsys)
    names = ["ours bf16", "ours nvfp4", "cublas"]
    assert [(row["m"], row["variant"]) for row in found] == [(m, name) for m in (1, 70) for name in names]
    for row in found:
        assert (row["n"], row["k"], row["rounds"], row["commit"], row["ok"]) == (48, 32, 3, "c0ffee", True)
        assert row["low_us"] <= row["us"] <= row["high_us"]
        # A BF16 rounding of the answer, and of cuBLAS's weight; an answer that is compared with itself is off by 0.
        assert 1e-4 < row["relative"] <= row["worst_row"] < 6e-3
        bytes_of_weight = 48 * 32 * (2 if row["variant"] == "cublas" else 9 / 16)
        assert row["weight_gb_per_s"] == pytest.approx(bytes_of_weight / row["us"] / 1e3, abs=0.051)
    assert found[2]["x_cublas"] == 1.0
    assert registry.describe() == [], "runners are kept"


def test_moe(bench: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert run(bench, "moe", monkeypatch, "--shapes", MOE, "--m", "1,5", "--out", str(out)) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["m"], row["variant"]) for row in found] == [
        (m, f"ours {a}") for m in (5, 1) for a in ("bf16", "nvfp4")
    ]
    for row in found:
        assert row["ok"]
        assert 1e-4 < row["relative"] <= row["worst_row"] < 0.05
        assert row["experts"] == 2 if row["m"] == 1 else 2 < row["experts"] <= 8
    table = capsys.readouterr().out
    assert table.count(MOE) == 4
    assert "{" not in table


def test_choices_differ_from_round_to_round(bench: dict) -> None:
    moe = bench["moe"]
    args = type("Args", (), {"device": torch.device("cpu"), "peers": [], "activations": [], "provider": "reference"})
    layer = moe.Moe(moe.Shape(64, 32, 48, 6), args)
    layer.variants(4)
    seen = []
    for number in range(3):
        layer.choose(number)
        seen.append(layer.ids[0].clone())
        assert all(len(row.unique()) == 6 for row in layer.ids[0]), "a token chose an expert twice"
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert layer.experts_hit == round(sum(len(ids.unique()) for ids in seen[1:]) / 2, 1)
    assert layer.work(4).weight_bytes == pytest.approx(layer.experts_hit * 3 * 64 * 32 * 9 / 16, rel=0.01)
    weights = {layer.experts.w13_weight[e].numpy().tobytes() for e in range(48)}
    assert len(weights) == 48, "two experts are alike"


@pytest.mark.parametrize("factor", [1.02, float("nan"), 0.0])
def test_a_wrong_answer(
    bench: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    right = reference_linear.linear
    monkeypatch.setattr(reference_linear, "linear", lambda *args, **kwargs: right(*args, **kwargs) * factor)
    arguments = ("--shapes", LINEAR, "--m", "2", "--activations", "nvfp4", "--peers", "cublas")
    assert run(bench, "linear", monkeypatch, *arguments) == 1
    found = capsys.readouterr()
    assert found.err == f"WRONG ANSWERS: {LINEAR} m=2 ours nvfp4\n"
    assert '"ok": false' in found.out


class OfVllm:
    """Stands for a linear of vLLM's: a layer and its kernel. Its call of this number raises an error."""

    def __init__(self, weight: torch.Tensor, fails_at: int) -> None:
        self.kernel, self.weight, self.num_calls, self.fails_at = self, weight, 0, fails_at

    def apply_weights(self, layer: object, x: torch.Tensor) -> torch.Tensor:
        assert layer is self
        self.num_calls += 1
        if self.num_calls == self.fails_at:
            raise RuntimeError("no kernel for this\n(a long explanation)")
        return torch.nn.functional.linear(x, self.weight)


def stand_in(bench: dict, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """In the place of Humming's linears; 0: they cannot be prepared."""

    def prepare(packed: Any, n: int, k: int) -> OfVllm:
        if fails_at == 0:
            raise AssertionError
        return OfVllm(bench["linear"].dequantize(*packed).bfloat16(), fails_at)

    monkeypatch.setattr(bench["linear"], "_humming", prepare)


# A weight is called six times for each m: twice for the answer that is compared, and in four rounds.
@pytest.mark.parametrize(
    ("fails_at", "good", "message"),
    [
        (0, [], "AssertionError: "),
        (1, [], "RuntimeError: no kernel for this"),
        (2, [], "RuntimeError: no kernel for this"),
        (7, [1], "RuntimeError: no kernel for this"),
    ],
)
def test_a_peer_that_fails_ends_only_itself(
    bench: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails_at: int,
    good: list[int],
    message: str,
) -> None:
    stand_in(bench, monkeypatch, fails_at)
    assert run(bench, "linear", monkeypatch, "--shapes", LINEAR, "--m", "1,2", "--peers", "humming,cublas") == 0
    output = capsys.readouterr()
    found = [json.loads(line) for line in output.out.splitlines() if line.startswith("{")]
    for m in (1, 2):
        of_m = {row["variant"]: row for row in found if row["m"] == m}
        assert list(of_m)[:2] == ["ours bf16", "ours nvfp4"]
        assert set(of_m) == {"ours bf16", "ours nvfp4", "humming", "cublas"}
        assert of_m["ours bf16"]["x_cublas"] > 0
        assert ("x_humming" in of_m["ours bf16"]) == (m in good)
        if m in good:
            assert of_m["humming"]["ok"]
        else:
            assert of_m["humming"]["error"] == message
            assert (of_m["humming"]["n"], "us" in of_m["humming"]) == (48, False)
    # Libraries may warn there too, the first time that they are imported.
    said = [line for line in output.err.splitlines() if line.startswith("FAILED")]
    assert said == [f"FAILED PEER: {LINEAR} humming: {message}"]


def test_vllm_says_why_there_is_no_humming(bench: dict) -> None:
    """vLLM is asked by the names and with the arguments that it has, as far as a CPU goes."""
    linear, moe = bench["linear"], bench["moe"]
    cpu = {"device": torch.device("cpu"), "provider": "reference", "activations": [], "peers": ["humming"]}
    args = type("Args", (), cpu)
    assert linear.Linear(256, 128, args).failures == {"humming": "RuntimeError: Humming only supported on CUDA"}
    failures = moe.Moe(moe.Shape(256, 128, 4, 2), args).failures
    assert failures["humming"].startswith("ValueError: NvFp4 MoE backend 'HUMMING' does not support the deployment")


def test_a_peer_that_cannot_be_recorded_is_left_out(bench: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    common = bench["common"]
    right = common.recorded

    def recorded(variant: Any, device: torch.device) -> Any:
        if variant.name != "ours bf16":
            raise RuntimeError("operation not permitted when stream is capturing")
        return right(variant, device)

    monkeypatch.setattr(common, "recorded", recorded)
    ours, peer, no_peer = (common.Variant(name, [lambda: torch.ones(1)]) for name in ("ours bf16", "marlin", "triton"))
    failures = common.Failures()
    cpu = torch.device("cpu")
    assert list(common.interleaved([ours, peer], 2, cpu, failures=failures)) == ["ours bf16"]
    assert failures == {"marlin": "RuntimeError: operation not permitted when stream is capturing"}
    for variants, known in (([ours, peer], None), ([ours, no_peer], failures)):
        with pytest.raises(RuntimeError, match="not permitted"):
            common.interleaved(variants, 2, cpu, failures=known)


@pytest.mark.parametrize("prepared", [True, False])
def test_peers_of_experts(
    bench: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prepared: bool
) -> None:
    moe = bench["moe"]

    def prepare(experts: Any, shape: Any) -> Any:
        if not prepared:
            raise ValueError("NvFp4 MoE backend 'HUMMING' does not support the deployment configuration")
        limit = moe.SWIGLU_LIMIT
        runner = moe.MoeRunner("peer", **experts.clone(), swiglu_limit=limit, backend="reference", activations="bf16")
        return lambda x, weights, ids: moe.moe_op(x, weights, ids, runner.runner_id)

    monkeypatch.setattr(moe, "_Humming", prepare)
    arguments = ("--shapes", MOE, "--m", "1,5", "--activations", "bf16", "--peers", "humming")
    assert run(bench, "moe", monkeypatch, *arguments) == 0
    found = rows(capsys)
    assert [(row["m"], row["variant"]) for row in found] == [
        (m, name) for m in (5, 1) for name in ("ours bf16", "humming")
    ]
    for ours, peer in zip(found[::2], found[1::2], strict=True):
        assert ("x_humming" in ours) == prepared
        assert peer["experts"] == ours["experts"]
        assert peer["relative"] == ours["relative"] if prepared else "HUMMING" in peer["error"]


def test_what_there_is_no_time_for_is_named(
    bench: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bench, "linear", monkeypatch, "--shapes", LINEAR, "--m", "1,2", "--seconds-budget", "0") == 0
    assert f"not run, as the time was up: {LINEAR} m=1, {LINEAR} m=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "turbo"), "no shape begins with 'turbo'; known: pro.wqa_wkv, "),
        (("--peers", "marlin,triton"), "--peers: triton is not one of marlin, humming, cublas"),
        (("--activations", "fp8"), "--activations: fp8 is not one of bf16, nvfp4"),
        (("--rounds", "0"), "expected numbers of at least 1"),
        (("--m", "0"), "expected numbers of at least 1"),
        (("--device", "cuda"), "there is no CUDA GPU"),
    ],
)
def test_usage_errors(
    bench: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(bench, "linear", monkeypatch, *arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_shapes_by_the_beginnings_of_their_names(bench: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(name: str, *_: Any) -> list[str]:
        asked.append(name)
        return []

    monkeypatch.setattr(bench["linear"], "measure", measure)
    assert run(bench, "linear", monkeypatch, "--shapes", "8x16,flash.w,pro.wo_b") == 0
    assert asked == ["8x16", "pro.wo_b", "flash.wqa_wkv", "flash.wq_b", "flash.wo_b"]


def test_numbers(bench: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    common = bench["common"]
    exact = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    off = common.errors(exact + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), exact)
    assert (off.relative, off.worst_row) == (pytest.approx(0.5 / 125**0.5), pytest.approx(0.1))
    assert not common.errors(exact * float("nan"), exact).ok
    assert common.spread([4e-6, 1e-6, 3e-6, 2e-6, 5e-6]) == (3.0, 2.0, 4.0)
    assert common.spread([7e-6]) == (7.0, 7.0, 7.0)
    # On a GPU: calls that together are four times its L2.
    properties = type("Properties", (), {"L2_cache_size": 60 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    cuda = torch.device("cuda")
    assert [common.num_copies(size << 20, cuda) for size in (8, 241, 1000)] == [30, 1, 1]
    budget = common.Budget(100.0)
    assert 24 < budget.share(4).left() <= 25
    assert not common.Budget(None).share(3).spent


def test_preparation_takes_nothing_from_a_budget(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    common = bench["common"]
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    budget = common.Budget(10.0)
    share = budget.share(2)
    with share.preparing():
        now[0] = 100.0
    assert (share.left(), budget.left()) == (5.0, 10.0)
    now[0] = 104.0
    assert (share.left(), budget.left()) == (1.0, 6.0)
    now[0] = 106.0
    assert share.spent
    assert not budget.spent


# ---- scripts/gpu_check.sh -------------------------------------------------------------------------------------------


def gpu_check(root: Path, tmp_path: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    """The script with an interpreter that only says what it was asked for."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "asked: $*"\ncase "$1" in -c) exit 0 ;; esac\nexit {code}\n')
    stub.chmod(0o755)
    env = os.environ | {"PYTHON": str(stub), "COMMIT": "c0ffee", "BENCH_SECONDS": "7"}
    command = ["bash", str(root / "scripts" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_gpu_check_writes_logs(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "logs"
    done = gpu_check(root, tmp_path, str(out), "tests", "moe")
    assert done.returncode == 0, done.stderr
    tests, moe = ((out / f"{step}.log").read_text() for step in ("tests", "moe"))
    assert "commit c0ffee" in tests
    assert "asked: -m pytest tests/gpu -m not engine" in tests
    assert "--peers marlin --seconds-budget 7" in moe
    assert tests.splitlines()[-1].startswith("# exit code 0 after ")


def test_gpu_check_fails_with_any_step(root: Path, tmp_path: Path) -> None:
    done = gpu_check(root, tmp_path, str(tmp_path / "logs"), "linear", "tests", code=3)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "FAILED: linear tests"


@pytest.mark.parametrize("arguments", [(), ("OUT", "everything")])
def test_gpu_check_usage(root: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    given = [str(tmp_path / name) if name == "OUT" else name for name in arguments]
    done = gpu_check(root, tmp_path, *given)
    assert done.returncode == 64
    assert ("unknown step everything" if arguments else "SERVE_LIMIT_S") in done.stderr


# ---- tests/gpu/gpu_kit.py: what it asserts can fail ------------------------------------------------------------------


@pytest.fixture
def kit(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(root / "tests" / "gpu"))
    found = importlib.import_module("gpu_kit")
    monkeypatch.setattr(found, "device", lambda: torch.device("cpu"))
    yield found
    del sys.modules["gpu_kit"]


@pytest.mark.parametrize("place", [-1, 32])
def test_a_byte_beside_an_output_is_noticed(kit: ModuleType, place: int) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(4, 4)
        whole = y.as_strided((48,), (1,), y.storage_offset() - 16).view(torch.uint8)
        whole[32 + place] = 0
        return y

    message = "before an output" if place < 0 else "behind an output"
    with pytest.raises(AssertionError, match=message):
        kit.guarded(call, torch.zeros(1, dtype=torch.bfloat16))


def test_guarded_memory_is_full_of_nan_and_found_again(kit: ModuleType) -> None:
    y = kit.guarded(lambda x: x.new_empty((2, 3)), torch.zeros(1, dtype=torch.bfloat16))
    assert y.isnan().all()
    assert torch.zeros(1).new_empty(2).shape == (2,)


def test_comparisons_of_gpu_tests(kit: ModuleType) -> None:
    exact = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    y = exact.bfloat16()
    kit.assert_rounded(y, exact, 256)
    kit.assert_near(y, exact, torch.zeros_like(exact), requantized=0)
    kit.assert_same("y", y, y.clone())
    for fault, message in ((3e-2, "1 of 3200 elements"), (float("nan"), "NaN or infinity")):
        wrong = y.clone()
        wrong[7, 9] = wrong[7, 9] * (1 + fault)
        with pytest.raises(AssertionError, match=message):
            kit.assert_rounded(wrong, exact, 256)
        with pytest.raises(AssertionError, match="1 of 3200 elements differ, first at \\[7, 9\\]"):
            kit.assert_same("y", wrong, y)
    wrong = y.clone()
    wrong[7] *= 1.02
    with pytest.raises(AssertionError, match="rows \\[7\\] are wrong, 0 may be"):
        kit.assert_near(wrong, exact, torch.zeros_like(exact), requantized=0)
    kit.assert_near(wrong, exact, torch.zeros_like(exact), requantized=10)
    wrong[7] *= 1.05
    with pytest.raises(AssertionError, match="the worst row is off by"):
        kit.assert_near(wrong, exact, torch.zeros_like(exact), requantized=10)
