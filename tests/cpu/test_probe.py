"""`nvfp4 probe` against real processes and real HTTP; its verdicts over time are in test_rehearsal_virtual.py."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from serving import Answers, free_port
from vllm_nvfp4 import probe, probe_plan, status
from vllm_nvfp4.probe import Limits, Node
from vllm_nvfp4.probe_machine import STEPS_METRIC, RealMachine, usage
from vllm_nvfp4.probe_plan import Plan, plan
from vllm_nvfp4.status import ANSWERED, FRONT, HEALTHY, SWEEP, SWEEP_FAILED, SWEEPING, SWEPT, State, Status

GB = 10**9
COMPLETION_S = 1.0
BUSY = "while True: pass"
READING = "import time\nwhile True: open('/dev/zero', 'rb', buffering=0).read(1 << 20); time.sleep(0.05)"
PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"


class Engine:
    """What the HTTP server answers; a test sets it."""

    health, completion, delay_s, key, steps = 200, 200, 0.0, "", 0
    bodies: list[dict[str, Any]]


@pytest.fixture
def engine() -> Iterator[tuple[Engine, int]]:
    state = Engine()
    state.bodies = []

    class Handler(Answers):
        def do_GET(self) -> None:
            if self.path == "/health":
                self.answer(state.health)
            else:
                state.steps += 1 if state.steps else 0
                lines = [f'{STEPS_METRIC}{{engine="{i}"}} {state.steps}.0' for i in (0, 1)]
                self.answer(200, "\n".join(["# HELP x", "vllm:other 7.0", *lines]))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.bodies.append(json.loads(body))
            time.sleep(state.delay_s)
            known = not state.key or self.headers.get("Authorization") == f"Bearer {state.key}"
            self.answer(state.completion if known else 401, "why")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state, server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def machine(engine: tuple[Engine, int], tmp_path: Path) -> RealMachine:
    """This process as a server whose weights are loaded."""
    path = str(tmp_path / "beat")
    Status(path, FRONT).update("imports")
    Status(path).update("loaded", 1, 1, "model")
    return RealMachine(path, engine[1], COMPLETION_S)


@pytest.fixture
def child() -> Iterator[Callable[[str], int]]:
    """Starts a Python process and says its process id."""
    started: list[subprocess.Popen] = []

    def start(code: str) -> int:
        started.append(subprocess.Popen([sys.executable, "-c", code], start_new_session=True))
        time.sleep(1)  # imports are activity
        return started[-1].pid

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def beat_of(pid: int, monotonic_s: float | None = None) -> State:
    """A heartbeat of a process, now."""
    return State("imports", 0, 0, "bytes", time.monotonic() if monotonic_s is None else monotonic_s, 0.0, pid, FRONT)


# ---- processes


@pytest.mark.parametrize(
    ("code", "expected"),
    [("import time; time.sleep(60)", False), (BUSY, True), (READING, True), (PARENT.format(BUSY), True)],
    ids=["sleeping", "computing", "reading", "a child computes"],
)
def test_what_counts_as_activity(machine: RealMachine, child: Callable[[str], int], code: str, expected: bool) -> None:
    assert machine.active(child(code)) is expected


def test_a_stopped_process_is_not_active(machine: RealMachine, child: Callable[[str], int]) -> None:
    pid = child(BUSY)
    os.kill(pid, signal.SIGSTOP)
    assert machine.active(pid) is False
    assert machine.alive(beat_of(pid)) is True


def test_the_dead_are_not_alive(machine: RealMachine) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while machine.alive(beat_of(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.wait()  # it was a zombie
    assert machine.alive(beat_of(process.pid)) is False
    assert machine.active(process.pid) is False
    assert machine.alive(beat_of(os.getpid())) is True


def test_a_process_that_began_after_the_heartbeat_did_not_write_it(
    machine: RealMachine, child: Callable[[str], int]
) -> None:
    before = time.monotonic()
    time.sleep(0.3)
    pid = child("import time; time.sleep(60)")
    assert machine.alive(beat_of(pid)) is True
    assert machine.alive(beat_of(pid, before)) is False


def test_usage_has_the_whole_tree_and_nothing_else(child: Callable[[str], int]) -> None:
    pid = child(PARENT.format("import time; time.sleep(60)"))
    found = usage(pid)
    assert pid in found
    assert len(found) == 2
    assert os.getpid() not in found


# ---- startup and live


def test_startup_needs_a_heartbeat_of_a_living_process(machine: RealMachine, tmp_path: Path) -> None:
    assert probe.startup(machine).passed
    nothing = RealMachine(str(tmp_path / "absent"), 1, COMPLETION_S)
    assert probe.startup(nothing) == (False, "no heartbeat yet")
    assert probe.live(nothing, Limits()) == (False, "no heartbeat")
    front = tmp_path / "beat.front"
    front.write_text(json.dumps(json.loads(front.read_text()) | {"pid": 2**22 + 1}))  # above every process id
    assert probe.startup(machine) == (False, f"process {2**22 + 1} of the last heartbeat is gone")
    assert probe.live(machine, Limits()) == (False, f"process {2**22 + 1} is gone")


def test_once_http_answered_it_must_go_on(engine: tuple[Engine, int], machine: RealMachine) -> None:
    assert probe.live(machine, Limits()).passed
    assert machine.marked_at(HEALTHY) is not None
    engine[0].health = 503
    assert probe.live(machine, Limits()) == (False, "/health answered before and does not now")


def test_before_http_answers_a_load_is_judged(machine: RealMachine) -> None:
    machine.port = free_port()
    assert probe.live(machine, Limits()).passed
    assert machine.marked_at(HEALTHY) is None


def test_without_a_token_for_too_long_http_is_not_enough(engine: tuple[Engine, int], machine: RealMachine) -> None:
    assert probe.ready(machine).passed
    assert probe.live(machine, Limits(wedged_s=300)).passed
    time.sleep(0.3)
    verdict = probe.live(machine, Limits(wedged_s=0.2))
    assert not verdict.passed
    assert "no token for 0 s" in verdict.reason


@pytest.mark.parametrize("limits", [Limits(stall_s=0), Limits(stall_s=61, silent_s=60), Limits(wedged_s=0)])
def test_limits_that_make_no_sense_are_refused(machine: RealMachine, limits: Limits) -> None:
    with pytest.raises(ValueError, match="expected 0 < stall_s <= silent_s"):
        probe.live(machine, limits)


@pytest.mark.parametrize("phase", ["loaded", "warmed up"])
def test_a_worker_node_is_ready_when_all_its_ranks_are(tmp_path: Path, phase: str) -> None:
    path = str(tmp_path / "beat")
    machine, worker = RealMachine(path, 1, COMPLETION_S), Node(headless=True, in_group=True)
    Status(path, FRONT).update("imports")
    assert not probe.ready(machine, worker).passed
    Status(path, 8).update("loaded", 1, 1, "model")
    Status(path, 9).update("loading", 5, 10)
    assert not probe.ready(machine, worker).passed
    Status(path, 8).update(phase, 3, 3, "batches")
    Status(path, 9).update(phase, 3, 3, "batches")
    assert probe.ready(machine, worker).passed
    assert probe.live(machine, Limits(), worker) == (True, "loaded")


# ---- ready


def test_ready_asks_for_one_token(engine: tuple[Engine, int], machine: RealMachine) -> None:
    assert probe.ready(machine) == (True, "one token")
    assert engine[0].bodies == [{"prompt": [0], "max_tokens": 1, "temperature": 0, "ignore_eos": True}]
    assert machine.marked_at(ANSWERED) is not None


@pytest.mark.parametrize("code", [400, 401, 404, 500, 503])
def test_another_answer_is_not_ready(engine: tuple[Engine, int], machine: RealMachine, code: int) -> None:
    engine[0].completion = code
    assert probe.ready(machine) == (False, f"completion: HTTP {code}: why")
    assert machine.marked_at(ANSWERED) is None


def test_without_health_no_completion_is_asked_for(engine: tuple[Engine, int], machine: RealMachine) -> None:
    engine[0].health = 503
    assert probe.ready(machine) == (False, "/health: 503")
    machine.port = free_port()
    assert probe.ready(machine) == (False, "/health: no answer")
    assert engine[0].bodies == []


def test_an_engine_at_rest_that_does_not_answer_is_wedged(engine: tuple[Engine, int], machine: RealMachine) -> None:
    engine[0].delay_s = 3
    assert probe.ready(machine) == (False, "completion: no answer in time, and none before")
    machine.mark(ANSWERED)
    before = machine.marked_at(ANSWERED)
    assert probe.ready(machine) == (False, "completion: no answer in time, and the engine rests at 0.0 steps")
    assert machine.marked_at(ANSWERED) == before


def test_an_engine_that_steps_is_busy(engine: tuple[Engine, int], machine: RealMachine) -> None:
    engine[0].delay_s, engine[0].steps = 3, 5
    assert not probe.ready(machine).passed, "but not before its first token"
    machine.mark(ANSWERED)
    before = machine.marked_at(ANSWERED)
    verdict = probe.ready(machine)
    assert verdict == (True, "busy: no answer in time, but the engine took 2 steps"), "of both engines"
    assert machine.marked_at(ANSWERED) > before


def test_with_a_sweep_a_token_is_not_enough(engine: tuple[Engine, int], machine: RealMachine) -> None:
    node, sweep = Node(sweeps=True, strict=True), Status(machine.status_file, SWEEP)
    assert probe.ready(machine, node) == (False, "the warm-up's requests have not begun")
    sweep.update(SWEEPING, 5, 9, "requests")
    assert probe.ready(machine, node) == (False, "warm-up sweeping 5 of 9 requests")
    assert engine[0].bodies == [], "its own requests are not disturbed"
    sweep.update(SWEPT, 1, 1, "sweep")
    assert probe.ready(machine, node) == (True, "one token")
    engine[0].completion = 500
    assert not probe.ready(machine, node).passed, "and the sweep is not enough either"


def test_a_failed_sweep_counts_in_strict_mode_only(machine: RealMachine) -> None:
    Status(machine.status_file, SWEEP).update(SWEEP_FAILED, reason="HTTP 500")
    refused = probe.ready(machine, Node(sweeps=True, strict=True))
    assert refused == (False, "the warm-up's requests failed, and NVFP4_STRICT=1: HTTP 500")
    assert probe.ready(machine, Node(sweeps=True)) == (True, "one token")


def test_a_sweep_that_was_killed_has_failed(machine: RealMachine) -> None:
    code = "import sys; from vllm_nvfp4.status import *; Status(sys.argv[1], SWEEP).update(SWEEPING, 5, 9, 'requests')"
    process = subprocess.Popen([sys.executable, "-c", code, machine.status_file])
    process.wait()
    refused = probe.ready(machine, Node(sweeps=True, strict=True))
    assert not refused.passed
    assert refused.reason.endswith(f"process {process.pid}, which sent them, is gone without a result")
    assert probe.ready(machine, Node(sweeps=True)).passed


def test_a_sweep_is_no_rank(machine: RealMachine) -> None:
    """It is neither the process that all others are below, nor one that loads."""
    Status(machine.status_file, SWEEP).update(SWEEPING, 5, 9, "requests")
    assert [state.rank for state in machine.states()] == [0, FRONT]
    assert probe.ready(machine, Node(headless=True)).passed


def test_the_environment_says_whether_to_wait_for_a_sweep(engine: tuple[Engine, int], machine: RealMachine) -> None:
    flags = probe.parser().parse_args(["ready", "--status-file", machine.status_file, "--port", str(engine[1])])
    for mode, passed in (("sweep", False), ("steps", True), ("off", True)):
        assert probe.judge(machine, flags, {"NVFP4_WARMUP": mode}).passed is passed
    Status(machine.status_file, SWEEP).update(SWEEP_FAILED, reason="why")
    for strict, passed in (("1", False), ("0", True)):
        assert probe.judge(machine, flags, {"NVFP4_WARMUP": "sweep", "NVFP4_STRICT": strict}).passed is passed


def test_the_key_is_used_and_never_shown(
    engine: tuple[Engine, int], machine: RealMachine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine[0].key = "a-secret"
    flags = ["ready", "--port", str(engine[1]), "--status-file", machine.status_file]
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert probe.main(flags) == 1
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    assert probe.main(flags) == 0
    monkeypatch.setenv("VLLM_API_KEY", "another-secret")
    assert probe.main(flags) == 1
    shown = "".join(capfd.readouterr())
    assert "one token" in shown
    assert "secret" not in shown


# ---- the command


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NVFP4_", "LWS_"))}
    command = [sys.executable, "-m", "vllm_nvfp4.cli", "probe", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True)


def test_exit_codes(tmp_path: Path) -> None:
    beat = str(tmp_path / "beat")
    assert run("startup", NVFP4_STATUS_FILE=beat).returncode == 1
    Status(beat, FRONT).update("imports")
    done = run("startup", NVFP4_STATUS_FILE=beat)
    assert (done.returncode, done.stdout) == (0, "startup: started: front imports\n")
    assert run("live", "--status-file", beat, "--port", str(free_port())).returncode == 0
    assert run("startup").returncode == 64
    assert "set NVFP4_STATUS_FILE" in run("startup").stderr
    assert run().returncode == 64
    assert run("alive").returncode == 64
    assert run("--help").returncode == 0
    refused = run("live", "--stall-s", "0", NVFP4_STATUS_FILE=beat)
    assert (refused.returncode, "correct the probe's flags" in refused.stderr) == (64, True)
    Path(beat).write_text("nonsense")
    broken = run("startup", NVFP4_STATUS_FILE=beat)
    assert (broken.returncode, "is not a heartbeat" in broken.stderr) == (64, True)


def test_a_leader_worker_set_says_which_node_it_is(tmp_path: Path) -> None:
    beat = str(tmp_path / "beat")
    Status(beat, FRONT).update("imports")
    Status(beat, 8).update("loaded", 1, 1, "model")
    flags = ["ready", "--port", str(free_port())]
    worker = run(*flags, NVFP4_STATUS_FILE=beat, LWS_GROUP_SIZE="2", LWS_WORKER_INDEX="1")
    leader = run(*flags, NVFP4_STATUS_FILE=beat, LWS_GROUP_SIZE="2", LWS_WORKER_INDEX="0")
    assert (worker.returncode, leader.returncode) == (0, 1)


def test_a_probe_does_not_import_what_is_slow() -> None:
    code = "import sys; from vllm_nvfp4 import cli, probe, probe_machine, probe_plan; "
    code += "print([m for m in ('torch', 'vllm', 'numpy', 'prometheus_client') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---- plan


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ((GB, GB // 100, GB), Plan(60, 1800, 1860)),
        ((450 * GB, GB, GB), Plan(60, 1800, 2700)),
        ((450 * GB + 1, GB, GB), Plan(60, 1860, 2820)),
        ((898 * GB, 1_853_358_080, GB), Plan(60, 2700, 4500)),
        ((898 * GB, 20 * GB, GB), Plan(60, 2700, 4500)),
    ],
)
def test_limits_by_size_and_speed(facts: tuple[int, int, float], expected: Plan) -> None:
    assert plan(*facts) == expected


def test_a_disk_on_which_slow_looks_like_stuck_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at 999 MB/s .* expected at least 1000 MB/s: use a faster disk"):
        plan(898 * GB, 20 * GB, 0.999 * GB)


@pytest.mark.parametrize("facts", [(0, 0, GB), (GB, 2 * GB, GB), (GB, GB, 0), (-1, -1, GB)])
def test_sizes_that_cannot_be_are_refused(facts: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 < largest tensor <= checkpoint"):
        plan(*facts)


def test_the_plan_of_a_checkpoint(affine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(["plan", str(affine)]) == 0
    found = json.loads(capsys.readouterr().out)
    size = (affine / "model.safetensors").stat().st_size
    assert 0.9 * size < found["checkpoint_bytes"] < size
    assert 0 < found["largest_tensor_bytes"] < found["checkpoint_bytes"]
    assert found["disk_bytes_per_s"] > 1e6
    assert (found["stall_s"], found["silent_s"], found["progress_deadline_s"]) == (60, 1800, 1860)
    assert probe.main(["plan", str(affine), "--disk-bytes-per-s", "1000"]) == 1
    assert probe.main(["plan", str(affine / "absent")]) == 1


def test_the_disks_speed_is_bytes_over_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(bytes(1000))
    clock = iter([10.0, 10.5, 11.0, 14.0])
    monkeypatch.setattr(probe_plan.time, "monotonic", lambda: next(clock))
    assert probe_plan.disk_speed(tmp_path / "f") == 250


def test_status_files_are_the_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The probe finds what the server wrote by the variable that both have."""
    monkeypatch.setenv("NVFP4_STATUS_FILE", str(tmp_path / "beat"))
    Status(rank=FRONT).update("imports")
    assert probe.parser().parse_args(["startup"]).status_file == str(tmp_path / "beat")
    assert status.read_all(str(tmp_path / "beat"))
