"""The heartbeat file: where a load stands, for a probe in the same container.

Written when something happened, never by a timer: a stuck load shows as an age that grows. One writer a rank; rank 0
writes the file itself, rank N the same path with `.rankN` behind it.
"""

import json
import os
import time
from pathlib import Path

from vllm_nvfp4 import env

MIN_INTERVAL_S = 0.5  # a progress update more often than this is dropped; a new phase never is


class Status:
    """Writes {phase, done, total, unit, monotonic_s, phase_started_monotonic_s, pid, rank} atomically."""

    def __init__(self, path: str | None = None, rank: int = 0) -> None:
        base = env.text(env.STATUS_FILE) if path is None else path
        self.path = Path(base if rank == 0 else f"{base}.rank{rank}") if base else None
        self.rank, self.phase, self.started, self.written = rank, "", 0.0, 0.0

    def update(self, phase: str, done: int = 0, total: int = 0, unit: str = "bytes") -> None:
        """Write the state; cheap where no file is asked for.

        `monotonic_s` is CLOCK_MONOTONIC, which all processes of a machine share: age = time.monotonic() - monotonic_s.
        Raises: OSError - the file cannot be written; a probe that reads nothing must not look like health.
        """
        if self.path is None:
            return
        now = time.monotonic()
        if phase != self.phase:
            self.phase, self.started = phase, now
        elif now - self.written < MIN_INTERVAL_S and done < total:
            return
        self.written = now
        state = {
            "phase": phase, "done": done, "total": total, "unit": unit, "monotonic_s": now,
            "phase_started_monotonic_s": self.started, "pid": os.getpid(), "rank": self.rank,
        }  # fmt: skip
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self.path)
