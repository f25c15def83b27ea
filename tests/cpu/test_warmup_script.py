"""scripts/warmup.py reaches every boundary, and says what was compiled behind it: by a fake server, and the real one."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import warmup as script
from serving import Answers, free_port, serve
from vllm_nvfp4 import probe
from vllm_nvfp4.status import read_all, read_limits, read_sweep, write_limits

WAYS = list(script.SAMPLING)
SMALL = ("--users", "3", "--requests", "12", "--chunk", "64", "--block", "32", "--window", "16", "--top-k", "8")
MAX_LEN = 160


class Served:
    """How the fake server behaves."""

    compiles_at = 10**9  # the number of the request that compiles
    fails_at = 10**9
    compiles_each = False  # with every look at the counts, one more
    health = 200
    monitor, has_metrics = 1, True
    bodies: list[dict[str, Any]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, str]]:
    state, lock = Served(), threading.Lock()
    state.bodies = []
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    class Handler(Answers):
        def do_GET(self) -> None:
            if self.path == "/health":
                self.answer(state.health)
            elif self.path == "/v1/models":
                self.answer(200, json.dumps({"data": [{"id": "m", "max_model_len": MAX_LEN}]}))
            elif not state.has_metrics:
                self.answer(200, "vllm:requests 1.0\n")
            else:
                lines = ["# HELP x", 'nvfp4_modules{fallback="0",kind="moe",rank="0",served_by="sm100"} 3.0']
                lines += ['nvfp4_kernel_cache_compilations_total{rank="0"} 7.0']
                lines += [f'nvfp4_jit_monitor_active{{rank="0"}} {state.monitor}.0']
                if state.compiles_each:
                    lines += [
                        f'nvfp4_jit_compilations_total{{backend="Triton",kernel="_late",rank="0"}} {len(state.bodies)}.0'
                    ]
                if len(state.bodies) >= state.compiles_at:
                    lines += ['nvfp4_jit_compilations_total{backend="Triton",kernel="_late_kernel",rank="0"} 2.0']
                self.answer(200, "\n".join(lines))

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                state.bodies.append(json.loads(raw))
                number = len(state.bodies)
            self.answer(500 if number >= state.fails_at else 200, "why")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    code = script.main([*SMALL, *flags])
    return code, json.loads(capsys.readouterr().out)


# ---- what is asked for


def test_every_boundary_is_met_from_both_sides() -> None:
    found = script.lengths(script.Limits(100_000))
    assert found == sorted(set(found))
    assert {1, 127, 128, 129, 255, 256, 257, 4099, 4100, 4101, 8191, 8192, 8193, 16385, 99_996} <= set(found)
    assert max(found) == 99_996, "with its answer it fills the model's length"
    assert script.lengths(script.Limits(100))[-1] == 96, "what does not fit is left out"


def test_each_number_of_users_up_to_the_most() -> None:
    assert script.users(script.Limits(100, users=1)) == [1]
    assert script.users(script.Limits(100, users=6)) == [1, 2, 3, 4, 5, 6]
    assert script.users(script.Limits(100, users=64)) == [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64]


def test_the_sweep_has_all_and_is_the_same_each_time() -> None:
    limits = script.Limits(MAX_LEN, chunk=64, users=3)
    groups = script.sweep(limits, 500, WAYS)
    assert groups == script.sweep(limits, 500, WAYS)
    lengths = [len(request["prompt"]) for group in groups for request in group if len(group) == 1]
    assert all(lengths.count(length) >= 2 for length in script.lengths(limits)), "the second time from the prefix cache"
    assert {len(group) for group in groups} == {1, 2, 3}
    asked = [json.dumps({k: v for k, v in r.items() if k != "prompt"}, sort_keys=True) for g in groups for r in g]
    assert len(set(asked)) == len(script.SAMPLING)
    assert all(0 < token < 500 for group in groups for request in group for token in request["prompt"])


def test_the_proof_has_its_number_of_requests_and_other_prompts() -> None:
    limits = script.Limits(5000, users=16)
    groups = script.proof(limits, 500, WAYS, 200, 1)
    assert groups == script.proof(limits, 500, WAYS, 200, 1) != script.proof(limits, 500, WAYS, 200, 2)
    assert sum(map(len, groups)) == 200
    assert max(map(len, groups)) <= 16
    lengths = sorted(len(request["prompt"]) for group in groups for request in group)
    assert 1 <= lengths[0] < 4
    assert 2000 < lengths[-1] <= 4996
    for request in (request for group in groups for request in group):
        assert request.get("min_tokens", 0) <= request["max_tokens"], "or it is refused"
    swept = {tuple(r["prompt"]) for g in script.sweep(limits, 500, WAYS) for r in g if len(r["prompt"]) > 20}
    assert not swept & {tuple(r["prompt"]) for g in groups for r in g}


@pytest.mark.parametrize("limits", [script.Limits(4), script.Limits(100, users=0), script.Limits(100, chunk=-1)])
def test_limits_that_make_no_sense_are_refused(limits: script.Limits) -> None:
    with pytest.raises(ValueError, match="expected positive numbers and max_len above 4"):
        limits.validate()


# ---- what is said


def test_a_warm_server_passes(served: tuple[Served, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, row = run(capsys, served[1])
    assert (code, row["compiled_in_sweep"], row["compiled_in_proof"], row["failed"]) == (0, [], [], [])
    assert row["jit_monitor"] is True
    assert len(served[0].bodies) == row["sweep_requests"] + 12


def test_what_the_sweep_compiles_is_no_failure(served: tuple[Served, str], capsys: pytest.CaptureFixture[str]) -> None:
    served[0].compiles_at = 5
    code, row = run(capsys, served[1])
    assert (code, row["compiled_in_proof"]) == (0, [])
    assert row["compiled_in_sweep"] == [
        'nvfp4_jit_compilations_total{backend="Triton",kernel="_late_kernel",rank="0"}: 2'
    ]


def test_a_late_compilation_fails_by_name(served: tuple[Served, str], capsys: pytest.CaptureFixture[str]) -> None:
    _, row = run(capsys, served[1])
    served[0].compiles_at = 2 * row["sweep_requests"] + 12 + 1
    code, row = run(capsys, served[1])
    assert code == 1
    assert row["compiled_in_sweep"] == []
    assert row["compiled_in_proof"] == [
        'nvfp4_jit_compilations_total{backend="Triton",kernel="_late_kernel",rank="0"}: 2'
    ]


def test_our_own_compilations_count(served: tuple[Served, str]) -> None:
    before = script.samples(served[1])
    name = 'nvfp4_kernel_cache_compilations_total{rank="0"}'
    assert script.compiled(before, {**before, name: 9.0, "nvfp4_kernel_cache_hits_total": 1e6}) == [f"{name}: 2"]


def test_a_new_file_in_a_cache_is_a_compilation(
    served: tuple[Served, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel.old").mkdir()
    (tmp_path / "kernel.old" / "kernel.cubin").touch()
    code, row = run(capsys, served[1], "--cache", str(tmp_path))
    assert (code, row["compiled_in_proof"]) == (0, [])
    send = script.Sender.send

    def compiling(sender: script.Sender, groups: list[list[dict[str, Any]]]) -> list[str]:
        late = tmp_path / f"kernel.late{len(list(tmp_path.iterdir()))}"
        late.mkdir()
        (late / "kernel.cubin").touch()
        return send(sender, groups)

    monkeypatch.setattr(script.Sender, "send", compiling)
    code, row = run(capsys, served[1], "--cache", str(tmp_path))
    assert (code, row["compiled_in_sweep"]) == (1, [f"{tmp_path}/kernel.late1/kernel.cubin: 1"])
    assert row["compiled_in_proof"] == [f"{tmp_path}/kernel.late2/kernel.cubin: 1"]
    assert script.main([served[1], *SMALL, "--cache", str(tmp_path / "absent")]) == 1
    assert "absent is no folder" in capsys.readouterr().err


def test_a_failed_request_fails(served: tuple[Served, str], capsys: pytest.CaptureFixture[str]) -> None:
    served[0].fails_at = 30
    code, row = run(capsys, served[1])
    assert code == 1
    assert row["num_failed"] > 0
    assert row["failed"][0].startswith("HTTP 500: why: a prompt of ")
    assert len(served[0].bodies) < row["sweep_requests"] + 12, "the proof is not begun"


def test_a_monitor_that_is_off_is_said(served: tuple[Served, str], capsys: pytest.CaptureFixture[str]) -> None:
    served[0].monitor = 0
    assert run(capsys, served[1])[1]["jit_monitor"] is False


def test_without_counts_nothing_is_proven(served: tuple[Served, str], capsys: pytest.CaptureFixture[str]) -> None:
    served[0].has_metrics = False
    assert script.main([served[1], *SMALL]) == 1
    assert "/metrics has no nvfp4_modules: not a server of `nvfp4 serve`" in capsys.readouterr().err
    assert served[0].bodies == []


def test_no_server_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([f"http://127.0.0.1:{free_port()}", *SMALL]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_local_means_this_containers_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFP4_PORT", "8123")
    monkeypatch.delenv("NVFP4_SIDE_PORT", raising=False)
    options = script.parse(["--local"])
    assert (options.url, options.metrics) == ("http://127.0.0.1:8123", "http://127.0.0.1:8123")
    monkeypatch.setenv("NVFP4_SIDE_PORT", "9400")
    assert script.parse(["--local"]).metrics == "http://127.0.0.1:9400"
    for wrong in ([], ["http://x", "--local"]):
        with pytest.raises(SystemExit):
            script.parse(wrong)


# ---- as part of a start


@pytest.fixture
def gated(served: tuple[Served, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The status file of a server that this container has."""
    monkeypatch.setenv("NVFP4_PORT", served[1].rpartition(":")[2])
    monkeypatch.setenv("NVFP4_STATUS_FILE", str(tmp_path / "beat"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NVFP4_SIDE_PORT", "NVFP4_STRICT", "XDG_CACHE_HOME", "DG_JIT_CACHE_DIR", "VLLM_CACHE_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(script, "WAIT_S", 0.01)
    return str(tmp_path / "beat")


GATE = ("--gate", *SMALL)


def test_a_warm_start_is_told_to_the_probes(served: tuple[Served, str], gated: str) -> None:
    seen = []
    reported = script.Sender.send

    def send(sender: script.Sender, groups: list[list[dict[str, Any]]]) -> list[str]:
        state = read_sweep(gated)
        seen.append((state.phase, state.done, state.total))
        return reported(sender, groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Sender, "send", send)
        assert script.main([*GATE]) == 0
    requests = len(served[0].bodies) - 12
    assert seen == [("sweeping", 0, 1), ("sweeping", requests, requests)], "one sweep, then one proof"
    assert (read_sweep(gated).phase, read_sweep(gated).working) == ("swept", False)


def test_what_one_proof_compiled_the_next_has_warm(served: tuple[Served, str], gated: str) -> None:
    assert script.main([*GATE]) == 0
    once = len(served[0].bodies)
    served[0].compiles_at = 2 * once - 5
    assert script.main([*GATE]) == 0
    assert len(served[0].bodies) == 2 * once + 12, "another proof"
    assert read_sweep(gated).phase == "swept"


def test_a_kernel_compiled_again_and_again_is_no_warm_start(
    served: tuple[Served, str], gated: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served[0].compiles_each = True
    assert script.main([*GATE]) == 1
    state = read_sweep(gated)
    assert state.phase == "sweep failed"
    assert state.reason.startswith('the proof compiled nvfp4_jit_compilations_total{backend="Triton",kernel="_late')
    assert "it serves all the same" in capsys.readouterr().err
    monkeypatch.setenv("NVFP4_STRICT", "1")
    assert script.main([*GATE]) == 1
    assert "this pod stays unready" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["a failed request", "no counts", "no time"])
def test_why_a_start_is_not_warm(served: tuple[Served, str], gated: str, what: str) -> None:
    served[0].fails_at = 30 if what == "a failed request" else served[0].fails_at
    served[0].has_metrics = what != "no counts"
    assert script.main([*GATE, *(["--limit-s", "0"] if what == "no time" else [])]) == 1
    expected = {
        "a failed request": " requests failed, the first: HTTP 500: why: a prompt of ",
        "no counts": "/metrics has no nvfp4_modules",
        "no time": "0 of ",
    }
    assert expected[what] in read_sweep(gated).reason


def test_it_waits_for_the_server_and_ends_with_it(
    served: tuple[Served, str], gated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served[0].health = 503
    looked = iter([True, True, False])

    def sleep(_: float) -> None:
        assert read_sweep(gated) is None, "its heartbeat would be an earlier server's"
        if not next(looked):
            served[0].health = 200

    monkeypatch.setattr(script.time, "sleep", sleep)
    assert script.main([*GATE]) == 0
    served[0].health = 503
    sent = len(served[0].bodies)
    parents = iter([7, 7, 1])
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    monkeypatch.setattr(script.os, "getppid", lambda: next(parents))
    assert script.main([*GATE]) == 1
    assert len(served[0].bodies) == sent


def test_deepgemms_and_flashinfers_kernels_count_in_a_start(
    served: tuple[Served, str], gated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".cache" / "vllm" / "deep_gemm" / "cache"
    folder.mkdir(parents=True)
    send = script.Sender.send

    def compiling(sender: script.Sender, groups: list[list[dict[str, Any]]]) -> list[str]:
        (folder / f"{len(list(folder.iterdir()))}.cubin").touch()
        return send(sender, groups)

    monkeypatch.setattr(script.Sender, "send", compiling)
    assert script.main([*GATE]) == 1
    assert read_sweep(gated).reason == f"the proof compiled {folder}/3.cubin: 1", "found anew by each of three proofs"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert script.jit_caches() == [Path("/x/vllm/deep_gemm"), tmp_path / ".cache" / "flashinfer"]
    monkeypatch.setenv("DG_JIT_CACHE_DIR", "/d")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "/f")
    assert script.jit_caches() == [Path("/d"), Path("/f/.cache/flashinfer")]


def test_limits_are_the_engines_unless_flags_say_otherwise(served: tuple[Served, str], gated: str) -> None:
    write_limits(gated, {"chunk": 2048, "users": 1024, "top_k": 512, "engines": 8})
    found = script.limits_of(script.parse(["--local", "--top-k", "3"]))
    assert found == script.Limits(MAX_LEN, chunk=2048, top_k=3, users=64, engines=8)
    write_limits(gated, {"chunk": 2048, "users": 5, "top_k": 512, "engines": 1})
    assert script.limits_of(script.parse(["--local"])).users == 5
    assert script.limits_of(script.parse([served[1]])) == script.Limits(MAX_LEN), (
        "of another machine's it knows nothing"
    )


def test_each_engine_meets_each_length() -> None:
    limits = script.Limits(MAX_LEN, chunk=64, users=3, engines=4)
    alone = [group for group in script.sweep(limits, 500, WAYS) if len({len(r["prompt"]) for r in group}) == 1]
    for length in script.lengths(limits):
        (first, second) = [group for group in alone if len(group) == 4 and len(group[0]["prompt"]) == length][:2]
        assert first == second
        if length > 3:
            assert len({tuple(request["prompt"]) for request in first}) == 4, "or the prefix cache would answer"


def test_a_gate_needs_a_status_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NVFP4_STATUS_FILE", raising=False)
    with pytest.raises(SystemExit):
        script.parse(["--gate"])
    assert "--gate needs NVFP4_STATUS_FILE" in capsys.readouterr().err


# ---- the real server


@pytest.mark.engine
def test_the_cpu_server_is_swept_and_proven(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint

    tiny = tmp_path / "tiny"
    make_tiny_checkpoint(tiny, TinySpec())
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    port, beat = free_port(), tmp_path / "run" / "beat"
    env = {"NVFP4_SIDE_PORT": str(port), "NVFP4_STATUS_FILE": str(beat)}
    with serve(tmp_path, tiny, "--max-num-seqs", "3", env=env) as server:
        (rank,) = [state for state in read_all(str(beat)) if state.rank == 0]
        assert (rank.phase, rank.done, rank.total) == ("ready", 1, 1)
        started = [
            line.split("NVFP4 start: ")[1] for line in server.log.read_text().splitlines() if "NVFP4 start" in line
        ]
        assert [line.split(" after ")[0] for line in started] == [
            "loading", "preparing", "loaded", "warming vLLM up", "ready"
        ]  # fmt: skip
        assert read_limits(str(beat))["users"] == 3
        # As scripts/serve.sh does it, but for less to ask.
        for name, value in (env | {"NVFP4_PORT": server.url.rpartition(":")[2], "NVFP4_WARMUP": "sweep"}).items():
            monkeypatch.setenv(name, value)
        asked = ["ready", "--port", os.environ["NVFP4_PORT"], "--completion-s", "60"]
        assert probe.main(asked) == 1
        assert capsys.readouterr().out == "ready: the warm-up's requests have not begun\n"
        code, row = run(
            capsys, "--gate", "--users", "2", "--requests", "5", "--max-len", "12", "--vocabulary", "60"
        )  # fmt: skip
        assert probe.main(asked) == 0
        assert capsys.readouterr().out == "ready: one token\n"
    assert row["failed"] == []
    assert (code, row["compiled_in_proof"], row["jit_monitor"]) == (0, [], False)
    assert row["sweep_requests"] >= 30
