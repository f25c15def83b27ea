"""`make serve`: a small checkpoint made on the spot, vLLM's OpenAI server on it, and a curl line once it answers.

The checkpoint is random, so its text is noise; everything around it is the real thing. Pass --model for your own.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CHECKPOINT = ROOT / ".work" / "tiny-deepseek-v4"
START_LIMIT_S = 300
# Enough for the tiny model; any of them can be given again behind `--`.
SERVE_FLAGS = ["--max-model-len", "4096", "--max-num-seqs", "8"]


def parse() -> argparse.Namespace:
    """The command line; everything behind `--` goes to `vllm serve`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_CHECKPOINT, help="a checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("serve_flags", nargs="*", help="flags for `vllm serve`, behind --")
    return parser.parse_args()


def refuse_taken_port(host: str, port: int) -> None:
    """Exit with a clear message where something listens already: vLLM would say so only after loading."""
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex((host, port)) == 0:
            sys.exit(
                f"serve: {host}:{port} is taken by another program; stop it, or choose another: make serve PORT=8001"
            )


def curl_line(host: str, port: int, model: Path) -> str:
    """A request that works against this server."""
    body = {
        "model": str(model),
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 16,
        "temperature": 0,
        "chat_template_kwargs": {"thinking": False},  # else 16 tokens are all thought, and the text is empty
    }
    url = f"http://{host}:{port}/v1/chat/completions"
    # The shell fills the key in: it is not printed.
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if os.environ.get("VLLM_API_KEY") else ""
    return f"curl -s {url} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"


def wait_until_ready(server: subprocess.Popen[bytes], host: str, port: int) -> float:
    """Seconds until /health answered 200.

    Raises: SystemExit - the server stopped, or START_LIMIT_S passed.
    """
    started = time.monotonic()
    while time.monotonic() - started < START_LIMIT_S:
        if server.poll() is not None:
            sys.exit(f"serve: the server stopped with exit code {server.returncode}; its messages are above")
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return time.monotonic() - started
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    server.terminate()
    sys.exit(f"serve: no answer on http://{host}:{port}/health within {START_LIMIT_S} s; stopped the server")


def main() -> None:
    """Make the checkpoint if needed, start the server, print the curl line, wait."""
    args = parse()
    refuse_taken_port(args.host, args.port)
    if args.model == DEFAULT_CHECKPOINT and not (args.model / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "scripts" / "make_tiny_checkpoint.py", args.model], check=True)
    command = [ROOT / "scripts" / "serve.sh", args.model]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NVFP4_HOST": args.host,
        "NVFP4_PORT": str(args.port),
    }
    # A session of its own, so that Ctrl-C reaches it once, from us: a second signal would make it drop what it is doing.
    server = subprocess.Popen(
        [*map(str, command), *SERVE_FLAGS, *args.serve_flags], env=environment, start_new_session=True
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.terminate())
    seconds = wait_until_ready(server, args.host, args.port)
    print(f"\nReady after {seconds:.0f} s. Try:\n\n{curl_line(args.host, args.port, args.model)}\n", flush=True)
    sys.exit(server.wait())


if __name__ == "__main__":
    main()
