"""What serves how many modules and what the kernel cache did, as Prometheus metrics.

Modules live in worker processes, /metrics in the API server's and in the side port's: each worker writes its counts into
a folder that the front process made before it started them, and a collector reads the folder when it is scraped.
"""

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prometheus_client import multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry

from vllm_nvfp4 import env, selection
from vllm_nvfp4.status import FRONT, Status

# Set by the front process for its children; not for users. The folder's name ends in its maker's process id.
FOLDER_VARIABLE = "NVFP4_INTERNAL_METRICS_DIR"
# vLLM sets it for several API servers, whose /metrics is then the sum of all; --data-parallel-size brings as many.
SEVERAL_SERVERS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_is_open = False
KERNEL_COUNTS = {
    "hits": "Kernels asked for and found in the cache",
    "misses": "Kernels asked for and not found",
    "loaded": "Misses that a set built ahead of time answered",
    "compilations": "Misses that the compiler answered",
}


class ModuleCollector(Collector):
    """nvfp4_modules{rank, kind, served_by, fallback}, nvfp4_fallback_modules{rank}, nvfp4_kernel_cache_*_total{rank}."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        """The counts that workers have published so far."""
        metric = GaugeMetricFamily(
            "nvfp4_modules", "Modules by what serves them", labels=["rank", "kind", "served_by", "fallback"]
        )
        fallbacks = GaugeMetricFamily("nvfp4_fallback_modules", "Modules served by a stock fallback", labels=["rank"])
        kernels = {
            name: CounterMetricFamily(f"nvfp4_kernel_cache_{name}", doc, labels=["rank"])
            for name, doc in KERNEL_COUNTS.items()
        }
        for path in sorted(self.folder.glob("*.json")):
            found = json.loads(path.read_text())
            for kind, served_by, fallback, count in found["modules"]:
                metric.add_metric([path.stem, kind, served_by, str(int(fallback))], count)
            fallbacks.add_metric([path.stem], sum(row[3] for row in found["modules"] if row[2]))
            for name, count in found["kernels"].items():
                kernels[name].add_metric([path.stem], count)
        yield metric
        yield fallbacks
        yield from kernels.values()


def make_folder() -> Path:
    """In the front process: the folder, made once and named to children."""
    found = os.environ.get(FOLDER_VARIABLE)
    if not found:
        found = tempfile.mkdtemp(prefix="nvfp4-metrics-", suffix=f"-{os.getpid()}")
        os.environ[FOLDER_VARIABLE] = found
    return Path(found)


def open_folder() -> None:
    """Show the folder's counts on this process's /metrics; who made the folder removes it at the end.

    Called when the configuration is being checked: in the front process, which may have made the folder before it
    became vLLM (there this is also where the heartbeat says `config`), and in each of several API servers.
    """
    global _is_open
    folder, owner = make_folder(), os.getpid()
    if _is_open:
        return
    _is_open = True
    if folder.name.endswith(f"-{owner}"):
        Status(rank=FRONT).update("config")
        # Forked children inherit the handler; only the maker may remove the folder.
        atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    collectors = _collectors(folder)
    for collector in collectors:
        REGISTRY.register(collector)
    if SEVERAL_SERVERS_VARIABLE in os.environ:
        _show_beside_sums(collectors)


def _collectors(folder: Path) -> list[Collector]:
    # Imported here: both import this module.
    from vllm_nvfp4.side_port import StartCollector
    from vllm_nvfp4.warmup_worker import CompilationCollector

    path = env.text(env.STATUS_FILE)
    return [ModuleCollector(folder), CompilationCollector(folder), *([StartCollector(path)] if path else [])]


def _show_beside_sums(collectors: list[Collector]) -> None:
    """Several API servers: each scrape of one makes a registry with the servers' sums and nothing of REGISTRY."""

    class SumsAndOurs(multiprocess.MultiProcessCollector):
        def __init__(self, registry: CollectorRegistry, path: str | None = None) -> None:
            super().__init__(registry, path)
            for collector in collectors:
                registry.register(collector)

    # Both vLLM and its instrumentator look the class up in its module.
    vars(multiprocess)["MultiProcessCollector"] = SumsAndOurs


def kernel_counts() -> dict[str, Any]:
    """What the kernel cache of this process did; nothing where no kernel was ever asked for."""
    module = sys.modules.get("cutedsl.compile")
    return {name: asdict(module.counters())[name] for name in KERNEL_COUNTS} if module else {}


def publish(rank: int) -> None:
    """In a worker: write this process's counts; call it again when they changed."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    rows = [[kind, served_by, fallback, count] for (kind, served_by, fallback), count in selection.summary().items()]
    temporary = Path(folder, f"{rank}.tmp")
    temporary.write_text(json.dumps({"modules": rows, "kernels": kernel_counts()}))
    os.replace(temporary, Path(folder, f"{rank}.json"))
