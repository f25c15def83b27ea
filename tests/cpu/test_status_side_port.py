"""The side port: metrics from the first second, of the start as it is, until the server's process ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from serving import free_port
from vllm_nvfp4 import metrics, side_port, status
from vllm_nvfp4.side_port import StartCollector
from vllm_nvfp4.status import FRONT, Status

# What `nvfp4 serve` does, with a process that sleeps in vLLM's place.
SERVER = """
import os, sys, time
from vllm_nvfp4 import side_port
side_port.begin()
os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"])
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int, Path]]:
    port, path = free_port(), tmp_path / "run" / "beat"
    environment = {**os.environ, "NVFP4_SIDE_PORT": str(port), "NVFP4_STATUS_FILE": str(path)}
    environment.pop(metrics.FOLDER_VARIABLE, None)
    process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment)
    yield process, port, path
    process.kill()
    process.wait()


def scrape(port: int, limit_s: float = 20) -> list[str]:
    """The samples on a port, once it answers."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
                return [line for line in lines if not line.startswith("#")]
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_it_shows_the_start_as_it_goes_on(server: tuple[subprocess.Popen, int, Path]) -> None:
    process, port, path = server
    assert 'nvfp4_phase{phase="imports",rank="front"} 1.0' in scrape(port)
    assert status.read_all(str(path))[0].pid == process.pid, "the process that becomes vLLM, not the side port's"
    Status(str(path), 2).update("loading", 5, 100)
    lines = scrape(port)
    assert 'nvfp4_phase{phase="loading",rank="2"} 1.0' in lines
    assert 'nvfp4_progress_done{rank="2",unit="bytes"} 5.0' in lines
    assert 'nvfp4_progress_total{rank="2",unit="bytes"} 100.0' in lines
    Status(str(path), status.SWEEP).update(status.SWEEP_FAILED, reason="why")
    assert 'nvfp4_phase{phase="sweep failed",rank="sweep"} 1.0' in scrape(port)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_the_server(server: tuple[subprocess.Popen, int, Path], number: signal.Signals) -> None:
    process, port, _ = server
    scrape(port)
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            scrape(port, limit_s=0)
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError("the side port outlived its server")


def test_what_is_shown(tmp_path: Path) -> None:
    path = str(tmp_path / "beat")
    Status(path, FRONT).update("imports")
    Status(path).update("loaded", 1, 1, "model")
    registry = CollectorRegistry()
    registry.register(StartCollector(path))
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    names = sorted(line.rpartition(" ")[0] for line in lines)
    assert names == [
        'nvfp4_heartbeat_age_seconds{rank="0"}',
        'nvfp4_heartbeat_age_seconds{rank="front"}',
        'nvfp4_phase_seconds{rank="0"}',
        'nvfp4_phase_seconds{rank="front"}',
        'nvfp4_phase{phase="imports",rank="front"}',
        'nvfp4_phase{phase="loaded",rank="0"}',
        'nvfp4_progress_done{rank="0",unit="model"}',
        'nvfp4_progress_total{rank="0",unit="model"}',
    ]
    status.mark(path, status.ANSWERED)
    assert "nvfp4_last_token_age_seconds" in generate_latest(registry).decode().split()
    ages = [float(line.rpartition(" ")[2]) for line in lines if "age_seconds" in line]
    assert all(0 <= age < 5 for age in ages)


@pytest.mark.parametrize("text", ["http", "0", "-1", "65536", "8000.5"])
def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("NVFP4_SIDE_PORT", text)
    with pytest.raises(ValueError, match=r"NVFP4_SIDE_PORT=.*expected a port number"):
        side_port.port()


def test_a_taken_port_is_named_and_not_fatal(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "vllm_nvfp4.side_port", str(port), str(os.getpid())]
    environment = {**os.environ, metrics.FOLDER_VARIABLE: str(tmp_path), "NVFP4_STATUS_FILE": str(tmp_path / "beat")}
    first = subprocess.Popen(command, env=environment)
    try:
        scrape(port)
        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
        assert second.returncode == 1
        assert f"the side port {port} cannot be opened" in second.stderr
    finally:
        first.kill()
        first.wait()


def test_without_a_port_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NVFP4_SIDE_PORT", raising=False)
    monkeypatch.delenv(metrics.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("NVFP4_STATUS_FILE", str(tmp_path / "run" / "beat"))
    monkeypatch.setattr(side_port.subprocess, "Popen", lambda *_: pytest.fail("started"))
    side_port.begin()
    assert [state.phase for state in status.read_all(str(tmp_path / "run" / "beat"))] == ["imports"]
    assert metrics.FOLDER_VARIABLE not in os.environ


def test_with_a_port_there_is_always_a_heartbeat_file(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setenv("NVFP4_SIDE_PORT", "9400")
    for name in ("NVFP4_STATUS_FILE", metrics.FOLDER_VARIABLE):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
    monkeypatch.setattr(side_port.subprocess, "Popen", lambda command: started.append(command))
    side_port.begin()
    folder = Path(os.environ[metrics.FOLDER_VARIABLE])
    try:
        assert Path(os.environ["NVFP4_STATUS_FILE"]).parent == folder
        assert status.read_all(os.environ["NVFP4_STATUS_FILE"])[0].phase == "imports"
        assert started[0][1:] == ["-m", "vllm_nvfp4.side_port", "9400", str(os.getpid())]
    finally:
        shutil.rmtree(folder)
