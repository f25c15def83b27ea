"""Start engines and servers for tests, and stop them again."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 400


def run_script(script: str, argument: Path, out: Path, env: dict[str, str] | None = None) -> dict:
    """What `script ARGUMENT OUT` of this folder wrote to OUT, with its output as "log".

    Raises: AssertionError - it failed; the message ends with what it printed last.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(argument), str(out)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, f"{script} failed:\n{log[-6000:]}"
    return {**json.loads(out.read_text()), "log": log}


def run_engine(folder: Path, model: Path, prompts: list[list[int]], max_tokens: int = 16, **options: Any) -> dict:
    """Answers of an in-process engine, run in a process of its own; `env`, `llm` and `steps` are passed on."""
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    llm = options.get("llm", {})
    asked = {"prompts": prompts, "max_tokens": max_tokens, "llm": llm, "steps": options.get("steps", False)}
    job.write_text(json.dumps({"model": str(model), **asked}))
    return run_script("engine_run.py", job, folder / "out.json", options.get("env"))


class Answers(BaseHTTPRequestHandler):
    """What stand-ins for servers share: silence, and an answer in one call."""

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, text: str = "") -> None:
        """A status and a body, no headers."""
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A running `nvfp4 serve`: its base URL, its model name and its log."""

    def __init__(self, port: int, model: str, log: Path, process: subprocess.Popen) -> None:
        self.url, self.model, self.log, self.process = f"http://127.0.0.1:{port}", model, log, process

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and body of a GET; an error status is returned, not raised."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextlib.contextmanager
def serve(folder: Path, model: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """`nvfp4 serve MODEL` on a free port, from ready until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "vllm_nvfp4.cli", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "4096", "--max-num-seqs", "8", *flags]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, start_new_session=True
        )
    server = Server(port, str(model), log, process)
    try:
        _wait(server)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server) -> None:
    started = time.monotonic()
    while time.monotonic() - started < START_LIMIT_S:
        assert server.process.poll() is None, f"the server stopped:\n{server.log.read_text()[-6000:]}"
        with contextlib.suppress(OSError):
            if server.get("/health")[0] == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"no answer within {START_LIMIT_S} s:\n{server.log.read_text()[-6000:]}")
