"""nvfp4_modules on /metrics: what workers publish is what the front process shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from vllm_nvfp4 import metrics, selection
from vllm_nvfp4.metrics import FOLDER_VARIABLE, ModuleCollector
from vllm_nvfp4.status import FRONT as FRONT_RANK
from vllm_nvfp4.status import read_all


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No records of other tests."""
    monkeypatch.setattr(selection, "_choices", {})
    monkeypatch.setattr(selection, "_logged_fallbacks", set())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


MODULES = ("nvfp4_modules", "nvfp4_fallback_modules")


def scrape(folder: Path, beginning: str | tuple[str, ...] = MODULES) -> list[str]:
    """The samples that a scrape of the folder shows; those of kernels are there once something has imported the cache."""
    registry = CollectorRegistry()
    registry.register(ModuleCollector(folder))
    return [line for line in generate_latest(registry).decode().splitlines() if line.startswith(beginning)]


def test_a_round_trip(folder: Path) -> None:
    for module in ("a", "b"):
        selection.record(module, "linear", "cutedsl reference")
    selection.record("c", "moe", "Stock", fallback=True)
    metrics.publish(0)
    selection.record("d", "moe", "Stock", fallback=True)
    metrics.publish(1)
    assert scrape(folder) == [
        'nvfp4_modules{fallback="0",kind="linear",rank="0",served_by="cutedsl reference"} 2.0',
        'nvfp4_modules{fallback="1",kind="moe",rank="0",served_by="Stock"} 1.0',
        'nvfp4_modules{fallback="0",kind="linear",rank="1",served_by="cutedsl reference"} 2.0',
        'nvfp4_modules{fallback="1",kind="moe",rank="1",served_by="Stock"} 2.0',
        'nvfp4_fallback_modules{rank="0"} 1.0',
        'nvfp4_fallback_modules{rank="1"} 2.0',
    ]


def test_a_rank_that_publishes_again_replaces_its_counts(folder: Path) -> None:
    selection.record("a", "linear", "Stock", fallback=True)
    metrics.publish(3)
    selection.clear()
    selection.record("a", "linear", "cutedsl reference")
    metrics.publish(3)
    assert scrape(folder) == [
        'nvfp4_modules{fallback="0",kind="linear",rank="3",served_by="cutedsl reference"} 1.0',
        'nvfp4_fallback_modules{rank="3"} 0.0',
    ]
    assert [path.name for path in folder.iterdir()] == ["3.json"]


def test_before_workers_publish_there_is_nothing(folder: Path) -> None:
    assert scrape(folder) == []
    (folder / "0.tmp").write_text("[[half")  # a worker is writing
    assert scrape(folder) == []
    assert scrape(folder / "absent") == []


def test_without_a_front_process_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    selection.record("a", "linear", "cutedsl reference")
    metrics.publish(0)
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_caches_counts_are_there_once_it_was_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "kernel_counts", lambda: {"hits": 5, "misses": 2, "loaded": 2, "compilations": 0})
    metrics.publish(1)
    assert scrape(folder, "nvfp4_kernel") == [
        'nvfp4_kernel_cache_hits_total{rank="1"} 5.0',
        'nvfp4_kernel_cache_misses_total{rank="1"} 2.0',
        'nvfp4_kernel_cache_loaded_total{rank="1"} 2.0',
        'nvfp4_kernel_cache_compilations_total{rank="1"} 0.0',
    ]


def test_the_kernel_caches_counts_are_the_librarys_own() -> None:
    code = "from vllm_nvfp4 import metrics; assert metrics.kernel_counts() == {}; import cutedsl.compile as c; "
    code += "c._count(misses=2, loaded=1); print(metrics.kernel_counts())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'hits': 0, 'misses': 2, 'loaded': 1, 'compilations': 0}"


FRONT = """
import json, os, sys
from prometheus_client import REGISTRY, generate_latest
from vllm_nvfp4 import metrics, selection

metrics.open_folder()
folder = os.environ[metrics.FOLDER_VARIABLE]
metrics.open_folder()
assert os.environ[metrics.FOLDER_VARIABLE] == folder, "a second call must change nothing"
worker = os.fork()
if not worker:
    selection.record("a", "linear", "cutedsl reference")
    metrics.publish(0)
    sys.exit()  # runs the handlers that a forked child inherits
assert os.waitpid(worker, 0)[1] == 0
assert os.path.isdir(folder), "a worker's exit must not remove the front process's folder"
lines = generate_latest(REGISTRY).decode().splitlines()
lines = [line for line in lines if line.startswith(("nvfp4_modules", "nvfp4_fallback"))]
print(json.dumps([folder, lines]))
"""


def test_a_folder_made_before_the_process_became_vllm_is_shown_and_removed_too() -> None:
    """`nvfp4 serve` makes the folder for the side port; vLLM, in the same process, shows it."""
    environment = {name: value for name, value in os.environ.items() if name != FOLDER_VARIABLE}
    replaced = "import os, sys; from vllm_nvfp4 import metrics; metrics.make_folder(); "
    replaced += f"os.execv(sys.executable, [sys.executable, '-c', {FRONT!r}])"
    done = subprocess.run([sys.executable, "-c", replaced], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, lines = json.loads(done.stdout)
    assert len(lines) == 2
    assert not Path(folder).exists()


def test_the_front_process_shows_its_workers_counts_and_cleans_up(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != FOLDER_VARIABLE}
    environment["NVFP4_STATUS_FILE"] = str(tmp_path / "beat")
    done = subprocess.run([sys.executable, "-c", FRONT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, lines = json.loads(done.stdout)
    assert lines == [
        'nvfp4_modules{fallback="0",kind="linear",rank="0",served_by="cutedsl reference"} 1.0',
        'nvfp4_fallback_modules{rank="0"} 0.0',
    ]
    assert not Path(folder).exists()
    assert [(state.phase, state.rank) for state in read_all(str(tmp_path / "beat"))] == [("config", FRONT_RANK)]


SERVER = """
import json, os, sys
if sys.argv[1] == "vLLM's import first":
    import vllm.entrypoints.serve.instrumentator.metrics
from vllm_nvfp4 import metrics

metrics.open_folder()
metrics.open_folder()
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.instrumentator.metrics import attach_router

app = FastAPI()
attach_router(app)
lines = TestClient(app).get("/metrics").text.splitlines()
print(json.dumps([line for line in lines if line.startswith("nvfp4_")]))
"""


@pytest.mark.parametrize("order", ["vLLM's import first", "ours first"])
def test_one_of_several_api_servers_shows_them_and_leaves_the_folder(
    folder: Path, tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with --data-parallel-size 2: vLLM starts two API servers, none of which is the process that users started."""
    monkeypatch.setenv("NVFP4_STATUS_FILE", str(tmp_path / "beat"))
    selection.record("a", "moe", "Stock", fallback=True)
    metrics.publish(0)
    metrics.publish(1)
    (tmp_path / "sums").mkdir()
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "sums")}
    done = subprocess.run([sys.executable, "-c", SERVER, order], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = json.loads(done.stdout.splitlines()[-1])
    assert [line for line in lines if line.startswith(MODULES)] == [
        'nvfp4_modules{fallback="1",kind="moe",rank="0",served_by="Stock"} 1.0',
        'nvfp4_modules{fallback="1",kind="moe",rank="1",served_by="Stock"} 1.0',
        'nvfp4_fallback_modules{rank="0"} 1.0',
        'nvfp4_fallback_modules{rank="1"} 1.0',
    ]
    assert folder.exists(), "the front's to remove"
    assert read_all(str(tmp_path / "beat")) == [], "the front's heartbeat is the front's"
