"""What serves how many modules, as a Prometheus metric on the server's own /metrics.

Modules live in worker processes, /metrics in the API server's: each worker writes its counts into a folder that the
front process made before it started them, and a collector there reads the folder when it is scraped.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import REGISTRY, Collector

from vllm_nvfp4 import selection

# Set by the front process for its children; not for users.
FOLDER_VARIABLE = "NVFP4_INTERNAL_METRICS_DIR"


class ModuleCollector(Collector):
    """nvfp4_modules{rank, kind, served_by, fallback}: number of modules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The counts that workers have published so far."""
        metric = GaugeMetricFamily(
            "nvfp4_modules", "Modules by what serves them", labels=["rank", "kind", "served_by", "fallback"]
        )
        fallbacks = GaugeMetricFamily("nvfp4_fallback_modules", "Modules served by a stock fallback", labels=["rank"])
        for path in sorted(self.folder.glob("*.json")):
            rows = json.loads(path.read_text())
            for kind, served_by, fallback, count in rows:
                metric.add_metric([path.stem, kind, served_by, str(int(fallback))], count)
            fallbacks.add_metric([path.stem], sum(row[3] for row in rows if row[2]))
        yield metric
        yield fallbacks


def open_folder() -> None:
    """In the front process: make the folder, tell children, register the collector; once."""
    if os.environ.get(FOLDER_VARIABLE):
        return
    folder = tempfile.mkdtemp(prefix="nvfp4-metrics-")
    os.environ[FOLDER_VARIABLE] = folder
    owner = os.getpid()
    # Forked children inherit the handler; only the maker may remove the folder.
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    REGISTRY.register(ModuleCollector(Path(folder)))


def publish(rank: int) -> None:
    """In a worker: write this process's counts."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    rows = [[kind, served_by, fallback, count] for (kind, served_by, fallback), count in selection.summary().items()]
    temporary = Path(folder, f"{rank}.tmp")
    temporary.write_text(json.dumps(rows))
    os.replace(temporary, Path(folder, f"{rank}.json"))
