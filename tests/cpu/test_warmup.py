"""Every phase behind a load: its batches, layers and graphs counted, and each kernel met; sets are used or refused."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from vllm_nvfp4 import kernel_sets, metrics, model_loader, platform, selection, warmup, warmup_worker
from vllm_nvfp4.status import Status, read_limits

from cutedsl import aot, compile, deployment


@pytest.mark.parametrize("largest", [1, 2, 7, 16, 17, 100, 2048, 8192, 16384, 65536])
def test_batches_go_down_from_the_largest_to_one(largest: int) -> None:
    sizes = warmup.batches(largest)
    assert (sizes[0], sizes[-1]) == (largest, 1)
    assert sizes == sorted(set(sizes), reverse=True)
    assert len(sizes) <= 170  # a few hundred calls a shape, whatever the largest batch
    for large, small in pairwise(sizes):
        assert large - small <= max(1, small / warmup.STEPS)


@pytest.mark.parametrize("width", [8, 16, 32, 64, 128])
def test_no_tile_is_stepped_over(width: int) -> None:
    met = {-(-tokens // width) for tokens in warmup.batches(16 * width)}
    assert met == set(range(1, 17))


@pytest.mark.parametrize("arch", ["sm_100a", "sm_90a"])
@pytest.mark.parametrize("name", ["deepseek-v4-pro", "deepseek-v4-flash"])
def test_every_kernel_of_the_closed_set_is_met(name: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = deployment.deployment(deployment.find_model(name), [1, 8], arch)
    want = {(v.kernel, v.config) for v in deployment.variants(asked)}
    monkeypatch.setattr(deployment.Deployment, "batches", lambda self: warmup.batches(self.max_tokens)[::-1])
    assert {(v.kernel, v.config) for v in deployment.variants(asked)} == want


def test_limits_of_an_engine() -> None:
    def limits(tp: int, dp: int, tokens: int) -> warmup.Limits:
        return warmup.Limits.of(
            SimpleNamespace(
                parallel_config=SimpleNamespace(tensor_parallel_size=tp, data_parallel_size=dp),
                scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens),
                model_config=SimpleNamespace(hf_config=SimpleNamespace(num_experts_per_tok=6)),
            )
        )

    assert limits(1, 1, 8192) == warmup.Limits(8192, 8192, 6)
    # Experts see the tokens of all data-parallel ranks, in whole shards of tensor-parallel ones.
    assert limits(4, 2, 1001) == warmup.Limits(1001, 2008, 6)


def test_the_reference_needs_no_warm_up() -> None:
    compile.freeze(False)
    warmup.run(torch.nn.Linear(2, 2), warmup.Limits(8, 8, 2), Status())
    assert not compile.frozen()


class Beats:
    """Stands in for the heartbeat file."""

    rank = 0

    def __init__(self) -> None:
        self.found: list[tuple[Any, ...]] = []

    def update(self, *state: Any) -> None:
        self.found.append(state)


class Runner:
    """A runner that says which batches it was called with."""

    chain = SimpleNamespace(workspace=None)
    device, in_features = torch.device("cpu"), 16

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.strided = 0

    def __call__(self, x: torch.Tensor) -> None:
        self.batches.append(len(x))
        self.strided += not x.is_contiguous()


def test_phases_of_our_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runner, beats = torch.nn.Linear(2, 2), Runner(), Beats()
    model.nvfp4_runner = runner
    published: list[int] = []
    monkeypatch.setattr(metrics, "publish", published.append)
    monkeypatch.setattr(platform, "backend", lambda: "sm100")
    monkeypatch.setattr(kernel_sets, "use", lambda: 36)
    try:
        warmup.run(model, warmup.Limits(40, 40, 2), beats)
        assert compile.frozen()
    finally:
        compile.freeze(False)
    assert runner.batches == [*warmup.batches(40), 2]
    assert runner.strided == 1
    total = len(warmup.batches(40))
    counted = [("warming up", done, total, "batches") for done in range(total)]
    assert beats.found == [("kernels", 36, 36, "kernels"), *counted, ("warmed up", total, total, "batches")]
    assert published == [0], "after the only shape"


# --- preparation, layer by layer


class Method:
    """A quantization method."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.processed = True


def test_layers_are_counted_when_their_last_module_is_through() -> None:
    model, beats, shared = torch.nn.Module(), Beats(), Method()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList(torch.nn.ModuleList(torch.nn.Identity() for _ in range(2)) for _ in "ab")
    modules = [module for layer in model.model.layers for module in layer]
    for module, method in zip(modules, (shared, shared, shared, Method()), strict=True):
        module.quant_method = method
    modules[0].act = torch.nn.Identity()
    modules[0].act.quant_method = None
    with model_loader.counted_layers(model, beats):
        for module in modules:
            module.quant_method.process_weights_after_loading(module)
    assert beats.found == [("preparing", done, 2, "layers") for done in (0, 0, 1, 1, 2, 2)]
    assert all(module.processed for module in modules)
    assert not any(vars(module.quant_method) for module in modules), "methods are as before"


# --- what follows in vLLM's worker


class Manager:
    """vLLM's CudaGraphManager, as far as we rely on it."""

    def __init__(self, descs: dict[str, list[int]]) -> None:
        self._capture_descs, self.created = descs, []

    def capture(self, create_forward_fn: Callable[..., Any], progress_bar_desc: str = "") -> None:
        for descs in self._capture_descs.values():
            for desc in descs:
                self.created += [create_forward_fn(desc, warmup=True), create_forward_fn(desc, warmup=False)]


class ModelManager(Manager):
    def capture(self, model: str) -> None:
        super().capture(lambda desc, warmup: (model, desc, warmup), "graphs")


class DraftManager(Manager):
    def capture(self) -> None:
        super().capture(lambda desc, warmup: ("draft", desc, warmup))


def test_graphs_of_managers_are_counted_with_the_drafts() -> None:
    runner = SimpleNamespace(cudagraph_manager=ModelManager({"piecewise": [8, 4], "full": [4]}))
    draft, beats, before = DraftManager({"full": [2]}), Beats(), Manager.capture
    runner.cudagraph_manager.capture("profiling")
    with warmup_worker.counted_graphs(runner, beats):
        runner.cudagraph_manager.capture("model")
        draft.capture()
    assert beats.found[:4] == [("capturing graphs", done, 3, "graphs") for done in range(4)]
    assert beats.found[4:6] == [("capturing graphs", done, 4, "graphs") for done in (3, 4)]
    assert runner.cudagraph_manager.created[6:8] == [("model", 8, True), ("model", 8, False)]
    assert draft.created == [("draft", 2, True), ("draft", 2, False)]
    assert Manager.capture is before


class OldRunner:
    """vLLM's first GPUModelRunner, as far as we rely on it."""

    cudagraph_dispatcher = SimpleNamespace(get_capture_descs=lambda: [("piecewise", [8, 4]), ("full", [4])])

    def __init__(self) -> None:
        self.captured: list[int] = []

    def _warmup_and_capture(self, desc: int, cudagraph_runtime_mode: str) -> None:
        self.captured.append(desc)

    def capture_model(self) -> None:
        for mode, descs in self.cudagraph_dispatcher.get_capture_descs():
            for desc in descs:
                self._warmup_and_capture(desc, cudagraph_runtime_mode=mode)


def test_graphs_of_the_old_runner_are_counted() -> None:
    runner, beats = OldRunner(), Beats()
    with warmup_worker.counted_graphs(runner, beats):
        runner.capture_model()
    assert beats.found == [("capturing graphs", done, 3, "graphs") for done in range(4)]
    assert runner.captured == [8, 4, 4]
    assert "_warmup_and_capture" not in vars(runner)


def test_without_graphs_there_is_no_such_phase() -> None:
    beats = Beats()
    for runner in (OldRunner(), SimpleNamespace(), SimpleNamespace(cudagraph_manager=ModelManager({}))):
        with warmup_worker.counted_graphs(runner, beats):
            pass
    assert beats.found == []


class Worker:
    """vLLM's worker, as far as we rely on it."""

    def __init__(self) -> None:
        self.model_runner = OldRunner()

    def compile_or_warm_up_model(self) -> str:
        self.model_runner.capture_model()
        return "times"


def test_a_worker_is_followed_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup_worker, "_followed", set())
    monkeypatch.setattr(warmup_worker, "_status", Status(""))
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", Worker.compile_or_warm_up_model)  # undone at the end
    config = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=f"{__name__}.Worker"))
    main, draft = Beats(), Beats()
    warmup_worker.follow(config, main)
    warmup_worker.follow(config, draft)
    assert Worker().compile_or_warm_up_model() == "times"
    assert main.found == [], "the draft model was loaded last, and its heartbeat goes on"
    assert draft.found[0] == ("warming vLLM up",)
    assert [state[0] for state in draft.found[1:-1]] == ["capturing graphs"] * 4, "followed once"
    assert draft.found[-1] == ("ready", 1, 1, "model")
    config.parallel_config.worker_cls = f"{__name__}.NoWorker"
    with pytest.raises(AttributeError, match="NoWorker"):
        warmup_worker.follow(config, main)


# --- what is compiled while serving


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_says_what_the_engine_was_started_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int
) -> None:
    path = str(tmp_path / "beat")
    monkeypatch.setenv("NVFP4_STATUS_FILE", path)
    monkeypatch.setattr(warmup_worker, "_followed", set())
    monkeypatch.setattr(warmup_worker, "_status", Status(""))
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", Worker.compile_or_warm_up_model)  # undone at the end
    warmup_worker.follow(
        SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=f"{__name__}.Worker")), Status(path, rank)
    )
    worker = Worker()
    worker.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=256),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(index_topk=1024)),
        parallel_config=SimpleNamespace(data_parallel_size=2),
    )
    worker.compile_or_warm_up_model()
    expected = {"chunk": 8192, "users": 256, "top_k": 1024, "engines": 2}
    assert read_limits(path) == ({} if rank else expected)


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """vLLM's JIT monitor, as far as we rely on it."""
    module: Any = ModuleType("vllm.utils.jit_monitor")
    module.seen = []
    module.is_active = lambda: True
    module._handle_jit_event = lambda **event: module.seen.append(event)
    monkeypatch.setitem(sys.modules, "vllm.utils.jit_monitor", module)
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(warmup_worker, "_compiled", type(warmup_worker._compiled)())
    return module


def shown(folder: Path) -> list[str]:
    registry = CollectorRegistry()
    registry.register(warmup_worker.CompilationCollector(folder))
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_late_compilations_are_counted_by_kernel(monitor: Any, tmp_path: Path) -> None:
    warmup_worker.count_compilations(2)
    assert shown(tmp_path) == ['nvfp4_jit_monitor_active{rank="2"} 1.0']
    warmup_worker.count_compilations(2)
    for _ in range(2):
        monitor._handle_jit_event(backend="Triton", event="kernel JIT compilation", fn_name="_late", detail=None)
    assert shown(tmp_path)[1:] == ['nvfp4_jit_compilations_total{backend="Triton",kernel="_late",rank="2"} 2.0']
    assert [event["fn_name"] for event in monitor.seen] == ["_late", "_late"], "and vLLM still hears of them"
    assert monitor.seen[0]["event"] == "kernel JIT compilation"


def test_in_error_mode_a_compilation_is_counted_too(monitor: Any, tmp_path: Path) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("refused")

    monitor._handle_jit_event = refuse
    warmup_worker.count_compilations(0)
    with pytest.raises(RuntimeError, match="refused"):
        monitor._handle_jit_event(backend="TileLang", event="x", fn_name="mhc")
    assert json.loads((tmp_path / "0.jit").read_text()) == {"active": True, "compiled": [["TileLang", "mhc", 1]]}


def test_a_monitor_that_is_off_is_shown_as_off(monitor: Any, tmp_path: Path) -> None:
    monitor.is_active = lambda: False
    handle = monitor._handle_jit_event
    warmup_worker.count_compilations(0)
    assert shown(tmp_path) == ['nvfp4_jit_monitor_active{rank="0"} 0.0']
    assert monitor._handle_jit_event is handle


# --- kernel sets


@pytest.fixture
def records() -> Iterator[None]:
    kept = dict(selection._choices)
    selection.clear()
    kernel_sets.use.cache_clear()
    yield
    kernel_sets.use.cache_clear()
    selection.clear()
    selection._choices.update(kept)


def test_a_folder_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVFP4_AOT_DIR", str(tmp_path / "absent"))
    with pytest.raises(RuntimeError, match=re.escape(f"NVFP4_AOT_DIR={tmp_path / 'absent'} is no folder; build a set")):
        kernel_sets.folder()


def test_the_packaged_set_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_sets, "PACKAGED", tmp_path / "prebuilt")
    assert kernel_sets.folder() is None
    (tmp_path / "prebuilt").mkdir()
    assert kernel_sets.folder() == tmp_path / "prebuilt"
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("NVFP4_AOT_DIR", str(tmp_path / "own"))
    assert kernel_sets.folder() == tmp_path / "own"


@pytest.mark.usefixtures("records")
def test_a_set_is_used_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used: list[Path] = []
    monkeypatch.setattr(compile, "use", lambda folder: used.append(folder) or 3)
    monkeypatch.setenv("NVFP4_AOT_DIR", str(tmp_path))
    assert (kernel_sets.use(), kernel_sets.use()) == (3, 3)
    assert used == [tmp_path]
    assert selection.num_fallbacks() == 0


@pytest.mark.usefixtures("records")
def test_no_set_is_no_fallback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_sets, "PACKAGED", tmp_path / "prebuilt")
    assert kernel_sets.use() == 0
    assert selection.choices() == []


@pytest.mark.usefixtures("records")
def test_a_stale_set_is_counted_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A folder without a manifest is no set: cutedsl's own reason comes through.
    monkeypatch.setenv("NVFP4_AOT_DIR", str(tmp_path))
    with pytest.raises(aot.StaleSetError) as stale:
        compile.use(tmp_path)
    assert kernel_sets.use() == 0
    (choice,) = selection.choices()
    assert (choice.kind, choice.served_by, choice.fallback) == ("kernel_set", "compiler", True)
    assert choice.reason == str(stale.value)
    kernel_sets.use.cache_clear()
    monkeypatch.setenv("NVFP4_STRICT", "1")
    with pytest.raises(RuntimeError, match=re.escape(str(stale.value))):
        kernel_sets.use()
