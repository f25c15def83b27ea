"""The heartbeat file: whole at every moment, one a rank, written when something happens and not too often."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from vllm_nvfp4 import status
from vllm_nvfp4.status import MIN_INTERVAL_S, Status


class Clock:
    """A CLOCK_MONOTONIC that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(status.time, "monotonic", found)
    return found


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_what_is_written(tmp_path: Path, clock: Clock) -> None:
    heartbeat = Status(str(tmp_path / "beat"))
    heartbeat.update("constructing")
    clock.now += 10
    heartbeat.update("loading", 5, 100)
    clock.now += 3
    heartbeat.update("loading", 50, 100)
    assert read(tmp_path / "beat") == {
        "phase": "loading",
        "done": 50,
        "total": 100,
        "unit": "bytes",
        "monotonic_s": 1013.0,
        "phase_started_monotonic_s": 1010.0,
        "pid": os.getpid(),
        "rank": 0,
        "reason": "",
    }
    heartbeat.update("loaded", 1, 1, "model")
    found = read(tmp_path / "beat")
    assert (found["phase"], found["unit"], found["phase_started_monotonic_s"]) == ("loaded", "model", 1013.0)


def test_the_age_is_on_the_machines_clock(tmp_path: Path) -> None:
    before = time.monotonic()
    Status(str(tmp_path / "beat")).update("loading")
    assert before <= read(tmp_path / "beat")["monotonic_s"] <= time.monotonic()


def test_progress_is_throttled_but_phases_and_the_end_are_not(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "beat"
    heartbeat = Status(str(path))
    heartbeat.update("loading", 0, 100)
    clock.now += MIN_INTERVAL_S / 2
    heartbeat.update("loading", 10, 100)
    assert read(path)["done"] == 0
    clock.now += MIN_INTERVAL_S / 2
    heartbeat.update("loading", 20, 100)
    assert read(path)["done"] == 20
    heartbeat.update("loading", 100, 100)
    assert read(path)["done"] == 100
    heartbeat.update("preparing", 0, 100)
    assert read(path)["phase"] == "preparing"
    heartbeat.update("loading", 0, 100)
    assert read(path)["phase"] == "loading"


def test_a_dropped_update_leaves_the_age_as_it_is(tmp_path: Path, clock: Clock) -> None:
    heartbeat = Status(str(tmp_path / "beat"))
    heartbeat.update("loading", 0, 100)
    for _ in range(4):  # a drop must not postpone the next write
        clock.now += MIN_INTERVAL_S * 0.3
        heartbeat.update("loading", 1, 100)
    assert read(tmp_path / "beat")["monotonic_s"] == pytest.approx(1000 + 4 * 0.3 * MIN_INTERVAL_S)


def test_one_file_a_rank(tmp_path: Path) -> None:
    for rank in (0, 1, 12):
        Status(str(tmp_path / "beat"), rank).update("loading")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beat", "beat.rank1", "beat.rank12"]
    assert [read(tmp_path / name)["rank"] for name in ("beat", "beat.rank1", "beat.rank12")] == [0, 1, 12]


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFP4_STATUS_FILE", str(tmp_path / "beat"))
    Status(rank=2).update("loading")
    assert [path.name for path in tmp_path.iterdir()] == ["beat.rank2"]


@pytest.mark.parametrize("value", ["", None])
def test_without_the_variable_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if value is not None:
        monkeypatch.setenv("NVFP4_STATUS_FILE", value)
    for rank in (0, 1):
        heartbeat = Status(rank=rank)
        assert heartbeat.path is None
        heartbeat.update("loading", 1, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "beat"
    Status(str(path)).update("constructing")
    seen = []
    replace = os.replace

    def look_before(source: Path, target: Path) -> None:
        seen.append((read(path)["phase"], read(source)["phase"], Path(target)))
        replace(source, target)

    monkeypatch.setattr(status.os, "replace", look_before)
    Status(str(path)).update("loading")
    assert seen == [("constructing", "loading", path)]
    assert read(path)["phase"] == "loading"
    assert [p.name for p in tmp_path.iterdir()] == ["beat"], "the temporary file must not stay"


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        Status(str(tmp_path / "absent" / "beat")).update("loading")


def test_every_heartbeat_is_read_back(tmp_path: Path, clock: Clock) -> None:
    path = str(tmp_path / "beat")
    assert status.read_all(path) == []
    Status(path, status.FRONT).update("imports")
    clock.now += 5
    Status(path).update("loading", 5, 100)
    Status(path, 3).update("loaded", 1, 1, "model")
    (tmp_path / "beat.rank1.77.tmp").write_text("{half")
    status.mark(path, status.HEALTHY)
    found = {state.rank: state for state in status.read_all(path)}
    assert sorted(found) == [status.FRONT, 0, 3]
    assert found[0] == status.State("loading", 5, 100, "bytes", 1005.0, 1005.0, os.getpid(), 0)
    assert [found[rank].working for rank in (status.FRONT, 0, 3)] == [False, True, False]


@pytest.mark.parametrize(
    ("phase", "done", "expected"),
    [
        ("loading", 0, True),
        ("preparing", 60, True),
        ("warming up", 3, True),
        ("loading", 100, False),
        # One graph may hold a compiler's minutes: silence is judged by what the processes do.
        ("capturing graphs", 50, False),
    ],
)
def test_only_even_counts_make_silence_a_hang(tmp_path: Path, phase: str, done: int, expected: bool) -> None:
    Status(str(tmp_path / "beat")).update(phase, done, 100, "items")
    assert status.read_all(str(tmp_path / "beat"))[0].working is expected


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"phase": "loading"}'])
def test_a_file_that_is_no_heartbeat_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "beat").write_text(text)
    with pytest.raises(ValueError, match="beat is not a heartbeat"):
        status.read_all(str(tmp_path / "beat"))


def test_events_are_remembered_with_their_time(tmp_path: Path, clock: Clock) -> None:
    path = str(tmp_path / "beat")
    assert status.marked_at(path, status.ANSWERED) is None
    status.mark(path, status.ANSWERED)
    clock.now += 7
    assert status.marked_at(path, status.ANSWERED) == 1000.0
    assert status.marked_at(path, status.HEALTHY) is None
    status.mark(path, status.ANSWERED)
    assert status.marked_at(path, status.ANSWERED) == 1007.0


def test_a_new_server_forgets_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "beat")
    status.reset(path)
    status.write_limits(path, {"chunk": 1})
    for rank in (status.SWEEP, status.FRONT, 0, 1, 12):
        Status(path, rank).update("loading")
    for event in (status.HEALTHY, status.ANSWERED):
        status.mark(path, event)
    others = ["beat.md", "beat2", "beats", "beat.rank", "beat.front.old"]
    for name in others:
        (tmp_path / "new" / name).touch()
    (tmp_path / "new" / "beat.rank1.99.tmp").touch()
    status.reset(path)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(others)


def test_a_sweep_has_a_heartbeat_of_its_own(tmp_path: Path) -> None:
    path = str(tmp_path / "beat")
    assert status.read_sweep(path) is None
    Status(path, status.SWEEP).update(status.SWEEP_FAILED, reason="HTTP 500")
    found = status.read_sweep(path)
    assert (found.rank, found.phase, found.reason, found.working) == (status.SWEEP, "sweep failed", "HTTP 500", False)
    assert status.read_all(path) == []
    (tmp_path / "beat.sweep").write_text("{}")
    with pytest.raises(ValueError, match=r"beat\.sweep is not a heartbeat"):
        status.read_sweep(path)


def test_an_engines_limits_are_read_as_written(tmp_path: Path) -> None:
    path = str(tmp_path / "beat")
    assert status.read_limits(path) == {}
    status.write_limits(path, {"chunk": 8192, "engines": 2})
    assert status.read_limits(path) == {"chunk": 8192, "engines": 2}


@pytest.mark.parametrize(("rank", "expected"), [(0, 2), (1, 0), (status.FRONT, 0)])
def test_a_new_phase_is_one_line_of_rank_0_and_needs_no_file(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, rank: int, expected: int
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(status.logger, "info", lambda text, *values: lines.append(text % values))
    heartbeat = Status("", rank)
    heartbeat.update("constructing")
    clock.now += 10
    heartbeat.update("loading", 0, 100)
    clock.now += 3
    heartbeat.update("loading", 50, 100)
    clock.now += 3
    heartbeat.update("loaded")
    assert (
        lines
        == [
            "NVFP4 start: loading after 10.0 s of constructing",
            "NVFP4 start: loaded after 6.0 s of loading",
        ][:expected]
    )
