"""What `nvfp4 probe` sees of the machine: heartbeat files, /proc, and vLLM's HTTP on the loopback interface.

Standard library only: a kubelet starts this every few seconds, on cores that serve.
"""

import http.client
import json
import os
import time
from pathlib import Path

from vllm_nvfp4 import status

WATCH_S = 1.0  # how long `active` looks
# Above what waiting takes, which was seen to be no CPU and no bytes in 20 s of a load that others of the tree worked at;
# and below the slowest disk.
ACTIVE_CPU = 0.05  # cores
ACTIVE_BYTES_PER_S = 3e4
CLOCK_STEP_S = 0.1  # of the kernel's times of starts, and then some
HEALTH_S = 5.0  # a front that handles thousands of streams may take a moment, and a restart takes minutes
QUICK_S = 2.0  # limit of other answers that compute nothing
STEPS_METRIC = "vllm:iteration_tokens_total_count"


class RealMachine:
    """probe.Machine of this host."""

    def __init__(self, status_file: str, port: int, completion_s: float) -> None:
        self.status_file, self.port, self.completion_s = status_file, port, completion_s

    def now(self) -> float:
        """CLOCK_MONOTONIC."""
        return time.monotonic()

    def states(self) -> list[status.State]:
        """Every heartbeat."""
        return status.read_all(self.status_file)

    def sweep(self) -> status.State | None:
        """The heartbeat of the process that sends the warm-up's requests."""
        return status.read_sweep(self.status_file)

    def alive(self, state: status.State) -> bool:
        """Does the process that wrote a heartbeat still run? Not another one, that got its id later.

        A container's first process has the id 1 in every life, and finds the heartbeats of the life before.
        """
        fields = _stat(Path(f"/proc/{state.pid}"))
        if fields is None or fields[0] == "Z":
            return False
        # The kernel counts from boot, and goes on counting while a machine sleeps.
        asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK") - asleep_s
        return started_s <= state.monotonic_s + CLOCK_STEP_S

    def active(self, pid: int) -> bool:
        """Do the process and those below it use ACTIVE_CPU cores, or read ACTIVE_BYTES_PER_S, for WATCH_S?"""
        before = usage(pid)
        time.sleep(WATCH_S)
        after = usage(pid)
        # A process that ended takes its counts along; what the others did is left.
        common = before.keys() & after.keys()
        cpu_s = sum(after[p][0] - before[p][0] for p in common)
        num_bytes = sum(after[p][1] - before[p][1] for p in common)
        started = after.keys() - before.keys()
        return bool(started) or cpu_s >= ACTIVE_CPU * WATCH_S or num_bytes >= ACTIVE_BYTES_PER_S * WATCH_S

    def health(self) -> int | None:
        """Status of GET /health; None: no answer."""
        answer = self._request("GET", "/health", HEALTH_S)
        return answer and answer[0]

    def steps(self) -> float | None:
        """Engine steps so far, all engines of this server together; None: no answer."""
        answer = self._request("GET", "/metrics", QUICK_S)
        if answer is None or answer[0] != 200:
            return None
        counts = [line.rsplit(" ", 1)[1] for line in answer[1].splitlines() if line.startswith(STEPS_METRIC)]
        return sum(map(float, counts)) if counts else None

    def complete(self) -> tuple[int, str] | None:
        """Status and body of a request for one token; None: no answer within completion_s."""
        body = {"prompt": [0], "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        return self._request("POST", "/v1/completions", self.completion_s, json.dumps(body))

    def mark(self, event: str) -> None:
        """Remember an event for later probes."""
        status.mark(self.status_file, event)

    def marked_at(self, event: str) -> float | None:
        """When it happened last; None: not in this server's life."""
        return status.marked_at(self.status_file, event)

    def _request(self, method: str, path: str, timeout_s: float, body: str | None = None) -> tuple[int, str] | None:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        # The timeout is for each wait on the socket; answers this small take one.
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


def usage(pid: int) -> dict[int, tuple[float, int]]:
    """pid -> (CPU seconds, bytes read) of a process and all below it."""
    parents, cpu_s = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (fields := _stat(folder)):
            parents[int(folder.name)] = int(fields[1])
            cpu_s[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found: dict[int, tuple[float, int]] = {}
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        if current in cpu_s:
            found[current] = cpu_s[current], _bytes_read(current)
        waiting += [child for child, parent in parents.items() if parent == current]
    return found


def _stat(folder: Path) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name, which may hold anything: state, parent, ...; None: it has ended."""
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _bytes_read(pid: int) -> int:
    """Bytes that read calls returned and that came from disks; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "read_bytes")))
