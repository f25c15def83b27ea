"""Prometheus metrics on a port of their own, from the first second of the process to its last.

vLLM's /metrics exists once the model is loaded, which is when a load that is slow or stuck can no longer be watched. So
`nvfp4 serve` starts a small process, before it becomes vLLM, that shows the heartbeat files and what workers published:

    nvfp4_phase{rank, phase} 1                    nvfp4_phase_seconds{rank}     nvfp4_heartbeat_age_seconds{rank}
    nvfp4_progress_done{rank, unit}               nvfp4_progress_total{rank, unit}
    nvfp4_last_token_age_seconds                  since a readiness probe saw one; missing: never yet
    nvfp4_modules, nvfp4_fallback_modules, nvfp4_kernel_cache_{hits,misses,loaded,compilations}_total

It serves counts and no more, so that it needs no API key; the port is closed unless NVFP4_SIDE_PORT names one.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_nvfp4 import env, metrics, status, warmup_worker

PR_SET_PDEATHSIG = 1


class StartCollector(Collector):
    """Where every rank of the start stands."""

    def __init__(self, path: str) -> None:
        self.path = path

    def collect(self) -> Iterator[Metric]:
        """What the heartbeat files say now."""
        phase = GaugeMetricFamily("nvfp4_phase", "1 for the phase that a rank is in", labels=["rank", "phase"])
        seconds = GaugeMetricFamily("nvfp4_phase_seconds", "Seconds since the phase began", labels=["rank"])
        age = GaugeMetricFamily("nvfp4_heartbeat_age_seconds", "Seconds since the last progress", labels=["rank"])
        done = GaugeMetricFamily("nvfp4_progress_done", "Progress within the phase", labels=["rank", "unit"])
        total = GaugeMetricFamily("nvfp4_progress_total", "What the phase has to do", labels=["rank", "unit"])
        now = time.monotonic()
        sweep = status.read_sweep(self.path)
        for state in [*status.read_all(self.path), *([sweep] if sweep else [])]:
            rank = {status.FRONT: "front", status.SWEEP: "sweep"}.get(state.rank, str(state.rank))
            phase.add_metric([rank, state.phase], 1)
            seconds.add_metric([rank], now - state.phase_started_monotonic_s)
            age.add_metric([rank], now - state.monotonic_s)
            if state.total:
                done.add_metric([rank, state.unit], state.done)
                total.add_metric([rank, state.unit], state.total)
        token = GaugeMetricFamily("nvfp4_last_token_age_seconds", "Seconds since a readiness probe saw a token")
        if (answered := status.marked_at(self.path, status.ANSWERED)) is not None:
            token.add_metric([], now - answered)
        yield from (phase, seconds, age, done, total, token)


def port() -> int | None:
    """The port that the user asked for.

    Raises: ValueError - NVFP4_SIDE_PORT is no port number.
    """
    text = env.text(env.SIDE_PORT).strip()
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ValueError(f"{env.SIDE_PORT.name}={text!r}: expected a port number from 1 to 65535 ({env.SIDE_PORT.doc})")
    return int(text)


def begin() -> None:
    """In the process that becomes vLLM: forget an earlier server's heartbeats, write the first, open the side port.

    Raises: ValueError - NVFP4_SIDE_PORT is no port number; OSError - the heartbeat cannot be written.
    """
    number = port()
    if number is not None and not env.text(env.STATUS_FILE):
        os.environ[env.STATUS_FILE.name] = str(metrics.make_folder() / "status")
    path = env.text(env.STATUS_FILE)
    if path:
        status.reset(path)
        status.Status(path, status.FRONT).update("imports")
    if number is not None:
        metrics.make_folder()
        # A process of its own: it answers while vLLM holds the interpreter for minutes.
        subprocess.Popen([sys.executable, "-m", "vllm_nvfp4.side_port", str(number), str(os.getpid())])


def die_with(parent: int) -> None:
    """End this process when `parent` ends; at once where it has ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def main() -> None:
    """`python -m vllm_nvfp4.side_port PORT PARENT`: serve until the parent ends."""
    die_with(int(sys.argv[2]))
    # Ctrl-C and a group's SIGTERM are for the server; this goes when the server has gone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    registry = CollectorRegistry()
    registry.register(StartCollector(env.text(env.STATUS_FILE)))
    folder = Path(os.environ[metrics.FOLDER_VARIABLE])
    registry.register(metrics.ModuleCollector(folder))
    registry.register(warmup_worker.CompilationCollector(folder))
    try:
        start_http_server(int(sys.argv[1]), registry=registry)
    except OSError as error:
        sys.exit(f"nvfp4: the side port {sys.argv[1]} cannot be opened ({error}); choose another {env.SIDE_PORT.name}")
    signal.pause()


if __name__ == "__main__":
    main()
