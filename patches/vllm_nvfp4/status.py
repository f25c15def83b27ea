"""The heartbeat files: where a start stands, for probes and metrics in the same container.

Written when something happened, never by a timer: a stuck load shows as an age that grows. One writer a file: rank 0
writes PATH, rank N PATH.rankN, the process that users start PATH.front, before vLLM is imported, and scripts/warmup.py,
where a pod's readiness waits for it, PATH.sweep.
"""

import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from vllm_nvfp4 import env

logger = logging.getLogger("vllm.nvfp4")

MIN_INTERVAL_S = 0.5  # a progress update more often than this is dropped; a new phase never is
FRONT, SWEEP = -1, -2  # the rank of the process that users start, and of the one that sends the warm-up's requests
HEALTHY, ANSWERED = "healthy", "answered"  # events that probes remember for each other

# A rank's phases in their order; a draft model goes through those of a load again.
CONSTRUCTING, LOADING, PREPARING, LOADED = "constructing", "loading", "preparing", "loaded"
KERNELS, WARMING, WARM = "kernels", "warming up", "warmed up"
UPSTREAM, STEPPING, CAPTURING, READY = "warming vLLM up", "warming steps", "capturing graphs", "ready"
# Of the process that sends requests to a server that answers, and lets a pod become ready.
SWEEPING, SWEPT, SWEEP_FAILED = "sweeping", "swept", "sweep failed"
# One item of these may be minutes of vLLM's compilers at work: a count that rests says nothing.
UNEVEN = (STEPPING, CAPTURING)


@dataclass(frozen=True)
class State:
    """One heartbeat, as written; `monotonic_s` is CLOCK_MONOTONIC, which all processes of a machine share.

    phase: imports, config (front); constructing, loading (bytes), preparing (layers), loaded, kernels, warming up
        (batches), warmed up, warming vLLM up, warming steps (steps), capturing graphs (graphs), ready (ranks); sweeping
        (requests), swept, sweep failed. docs/warmup.md has what each is.
    done, total, unit: progress within the phase; total 0: the phase reports none, and `working` is False.
    reason: why it failed.
    """

    phase: str
    done: int
    total: int
    unit: str
    monotonic_s: float
    phase_started_monotonic_s: float
    pid: int
    rank: int
    reason: str = ""

    @property
    def working(self) -> bool:
        """True while the phase counts something evenly and is not through: from here silence is a hang."""
        return self.phase not in UNEVEN and self.done < self.total


class Status:
    """Writes a State atomically, for one rank."""

    def __init__(self, path: str | None = None, rank: int = 0) -> None:
        base = env.text(env.STATUS_FILE) if path is None else path
        suffix = {0: "", FRONT: ".front", SWEEP: ".sweep"}.get(rank, f".rank{rank}")
        self.path = Path(base + suffix) if base else None
        self.rank, self.phase, self.started, self.written = rank, "", 0.0, 0.0

    def update(self, phase: str, done: int = 0, total: int = 0, unit: str = "bytes", reason: str = "") -> None:
        """Log a new phase (rank 0), and write the state; cheap where no file is asked for.

        Raises: OSError - the file cannot be written; a probe that reads nothing must not look like health.
        """
        now = time.monotonic()
        is_new = phase != self.phase
        if is_new:
            if self.rank == 0 and self.phase:
                logger.info("NVFP4 start: %s after %.1f s of %s", phase, now - self.started, self.phase)
            self.phase, self.started = phase, now
        if self.path is None:
            return
        if not is_new and now - self.written < MIN_INTERVAL_S and done < total:
            return
        self.written = now
        state = {
            "phase": phase, "done": done, "total": total, "unit": unit, "monotonic_s": now,
            "phase_started_monotonic_s": self.started, "pid": os.getpid(), "rank": self.rank, "reason": reason,
        }  # fmt: skip
        _write(self.path, json.dumps(state))


def _write(path: Path, text: str) -> None:
    """Write a file that no reader ever sees half of."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def files(path: str) -> list[Path]:
    """The heartbeat files of a status path that exist now, rank 0's first."""
    base = Path(path)
    found = [base, base.with_name(f"{base.name}.front"), *sorted(base.parent.glob(f"{base.name}.rank*"))]
    return [file for file in found if file.suffix != ".tmp" and file.is_file()]


def read_all(path: str) -> list[State]:
    """Every heartbeat of the server there is; none before the first.

    Raises: ValueError - a file is not a heartbeat; OSError - it cannot be read.
    """
    return [_read(file) for file in files(path)]


def read_sweep(path: str) -> State | None:
    """The heartbeat of the process that sends the warm-up's requests; None before its first.

    Raises: as `read_all`.
    """
    file = Path(f"{path}.sweep")
    return _read(file) if file.is_file() else None


def _read(file: Path) -> State:
    try:
        return State(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a heartbeat ({error}); let nothing else write there") from error


def write_limits(path: str, limits: dict[str, int]) -> None:
    """Say what an engine was started with, for scripts/warmup.py in the same container; its names."""
    _write(Path(f"{path}.limits"), json.dumps(limits))


def read_limits(path: str) -> dict[str, int]:
    """What `write_limits` said; nothing before an engine is warm."""
    file = Path(f"{path}.limits")
    return json.loads(file.read_text()) if file.is_file() else {}


def mark(path: str, event: str) -> None:
    """Remember that `event` happened now."""
    _write(Path(f"{path}.{event}"), repr(time.monotonic()))


def marked_at(path: str, event: str) -> float | None:
    """When `event` last happened, on CLOCK_MONOTONIC; None: not since the server started."""
    try:
        return float(Path(f"{path}.{event}").read_text())
    except FileNotFoundError:
        return None


def reset(path: str) -> None:
    """Forget an earlier server: a container that restarts finds the files of the one before, in the same volume."""
    base = Path(path)
    base.parent.mkdir(parents=True, exist_ok=True)
    ours = re.compile(re.escape(base.name) + rf"(\.(front|sweep|limits|rank\d+|{HEALTHY}|{ANSWERED}))?(\.\d+\.tmp)?")
    for file in base.parent.iterdir():
        if ours.fullmatch(file.name):
            file.unlink(missing_ok=True)
