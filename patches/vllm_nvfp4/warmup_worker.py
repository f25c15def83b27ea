"""What a rank does behind its load, as phases: vLLM's own warm-up, graph capture, ready; and what is compiled after that.

    warming vLLM up    compile_or_warm_up_model has begun; nothing to count
    warming steps      ours of all (warmup_steps.py); absent on CPUs and with --enforce-eager
    capturing graphs   graphs done of all, the draft model's included; absent on CPUs and with --enforce-eager
    ready              the rank waits for steps; from here a compilation is counted by backend and kernel

The hard part is to see this without editing vLLM: the worker's class is wrapped when its model is loaded, once, and the
runner's capture for the time of that one call. vLLM 0.32.0 has two runners: one captures in `_warmup_and_capture`, the
other (the default on GPUs) in `capture` of its graph managers. Profiling captures graphs too, earlier, and is not counted.
Seen on an H200 with vLLM's default runner; its first one was exercised with a stand-in only.
"""

import functools
import json
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_nvfp4 import deepgemm_set, env, metrics, tilelang_set, warmup_steps
from vllm_nvfp4.status import CAPTURING, READY, UPSTREAM, Status, write_limits

_status = Status("")
_followed: set[type] = set()
_compiled: Counter[tuple[str, str]] = Counter()


def follow(vllm_config: Any, status: Status) -> None:
    """From now on the worker of this process reports its phases to `status`; call it again for another model's load.

    Raises: AttributeError, ImportError - the worker's class, or what we wrap of it, is not there.
    """
    global _status
    _status = status
    worker = pkgutil.resolve_name(vllm_config.parallel_config.worker_cls)
    if worker in _followed:
        return
    warm_up = worker.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def compile_or_warm_up_model(self: Any) -> Any:
        _status.update(UPSTREAM)
        with warmup_steps.before_capture(self, _status), counted_graphs(self.model_runner, _status):
            times = warm_up(self)
        tilelang_set.report()
        deepgemm_set.report()
        count_compilations(_status.rank)
        if _status.rank == 0 and (path := env.text(env.STATUS_FILE)):
            write_limits(path, _limits(self.vllm_config))
        metrics.publish(_status.rank)
        _status.update(READY, 1, 1, "model")
        return times

    worker.compile_or_warm_up_model = compile_or_warm_up_model
    _followed.add(worker)


def _limits(vllm_config: Any) -> dict[str, int]:
    """What decides which kernels a request can reach, in the names of scripts/warmup.py."""
    return {
        "chunk": vllm_config.scheduler_config.max_num_batched_tokens,
        "users": vllm_config.scheduler_config.max_num_seqs,
        "top_k": vllm_config.model_config.hf_config.index_topk,
        "engines": vllm_config.parallel_config.data_parallel_size,
    }


class _Graphs:
    """Counts graphs; one is done when the next begins, or its manager ends."""

    def __init__(self, status: Status) -> None:
        self.status, self.begun, self.total = status, 0, 0

    def expect(self, count: int) -> None:
        self.total += count

    def begin(self) -> None:
        self.status.update(CAPTURING, self.begun, self.total, "graphs")
        self.begun += 1

    def end(self) -> None:
        if self.begun:
            self.status.update(CAPTURING, self.begun, self.total, "graphs")


@contextmanager
def counted_graphs(runner: Any, status: Status) -> Iterator[None]:
    """Inside, every graph that `runner` captures is reported to `status`."""
    graphs = _Graphs(status)
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is not None:
        # The draft model has a manager of another class, with the same one below it.
        owner: Any = [c for c in type(manager).__mro__ if "capture" in vars(c)][-1]
        name, wrapped = "capture", _capture_of_managers(owner.capture, graphs)
    elif hasattr(runner, "_warmup_and_capture"):
        owner, name = runner, "_warmup_and_capture"
        wrapped = _capture_of_runner(runner, graphs)
    else:
        yield
        return
    before = vars(owner).get(name)
    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
    graphs.end()


def _capture_of_managers(capture: Callable[..., None], graphs: _Graphs) -> Callable[..., None]:
    """CudaGraphManager.capture: it asks for a forward function twice a graph, the first time with warmup=True."""

    @functools.wraps(capture)
    def counting(self: Any, create_forward_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        graphs.expect(sum(map(len, self._capture_descs.values())))

        def create(desc: Any, warmup: bool) -> Any:
            if warmup:
                graphs.begin()
            return create_forward_fn(desc, warmup=warmup)

        capture(self, create, *args, **kwargs)
        graphs.end()

    return counting


def _capture_of_runner(runner: Any, graphs: _Graphs) -> Callable[..., None]:
    """GPUModelRunner._warmup_and_capture: called once a graph."""
    capture = runner._warmup_and_capture

    @functools.wraps(capture)
    def counting(*args: Any, **kwargs: Any) -> None:
        if not graphs.begun:
            graphs.expect(sum(len(descs) for _, descs in runner.cudagraph_dispatcher.get_capture_descs()))
        graphs.begin()
        capture(*args, **kwargs)

    return counting


def count_compilations(rank: int) -> None:
    """Count what vLLM's JIT monitor (Triton, TileLang, CuTe DSL) sees from now on; it warns once a kernel and counts none.

    Where the monitor is off (CPUs, --enforce-eager) that is published instead, so that no count is not taken for zero.
    """
    monitor: Any = sys.modules.get("vllm.utils.jit_monitor")
    is_active = monitor is not None and monitor.is_active()
    _publish(rank, is_active)
    if monitor is None or not is_active or hasattr(monitor._handle_jit_event, "__wrapped__"):
        return
    handle = monitor._handle_jit_event

    @functools.wraps(handle)
    def counting(*, backend: str, fn_name: str, **details: Any) -> None:
        _compiled[backend, fn_name] += 1
        _publish(rank, is_active)
        handle(backend=backend, fn_name=fn_name, **details)

    monitor._handle_jit_event = counting


def _publish(rank: int, is_active: bool) -> None:
    folder = os.environ.get(metrics.FOLDER_VARIABLE)
    if not folder:
        return
    rows = [[backend, kernel, count] for (backend, kernel), count in _compiled.items()]
    temporary = Path(folder, f"{rank}.jit.tmp")
    temporary.write_text(json.dumps({"active": is_active, "compiled": rows}))
    os.replace(temporary, Path(folder, f"{rank}.jit"))


class CompilationCollector(Collector):
    """nvfp4_jit_monitor_active{rank}, nvfp4_jit_compilations_total{rank, backend, kernel}: after a rank was ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        """What workers have published so far."""
        active = GaugeMetricFamily("nvfp4_jit_monitor_active", "1 where vLLM's JIT monitor watches", labels=["rank"])
        compiled = CounterMetricFamily(
            "nvfp4_jit_compilations", "Kernels compiled while serving", labels=["rank", "backend", "kernel"]
        )
        for path in sorted(self.folder.glob("*.jit")):
            found = json.loads(path.read_text())
            active.add_metric([path.stem], int(found["active"]))
            for backend, kernel, count in found["compiled"]:
                compiled.add_metric([path.stem, backend, kernel], count)
        yield active
        yield compiled
