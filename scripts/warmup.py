"""Reach what only requests reach, before users do, and prove that nothing is compiled any more.

    VLLM_API_KEY=... python scripts/warmup.py http://HOST:8000 [--metrics http://HOST:9400]
    python scripts/warmup.py --local          in the server's own container: ports from NVFP4_PORT and NVFP4_SIDE_PORT
    python scripts/warmup.py --gate           the same as part of a start (scripts/serve.sh, NVFP4_WARMUP=sweep): waits for
                                              the server, and `nvfp4 probe ready` waits for this

First a deterministic sweep: prompt lengths around every boundary, each number of users, each way to sample; docs/warmup.md
says which kernel each is for. Then the proof: seeded requests of mixed length and sampling, as users send them, during which
the server's counts of compiled kernels must rest. Our own cache is frozen by then, so that a miss there is a failed request.

DeepGEMM and FlashInfer compile unseen by any count: --cache FOLDER (their cache, in this container) counts new files there.

One JSON line; exit code 1, with the names, if a kernel was compiled or a request failed. "jit_monitor" is false where
vLLM's JIT monitor does not watch (CPUs, --enforce-eager): then only our kernels are proven.
"""

import argparse
import http.client
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_test import api_key, connect, headers

# How what `counts` counts begins: samples, and files.
COUNTED = ("nvfp4_kernel_cache_compilations_total{", "nvfp4_jit_compilations_total{", "/")
PRESENT = "nvfp4_modules"  # published by every worker of ours
MONITOR = "nvfp4_jit_monitor_active"
# Of an answer: the first token comes from a prefill, the others from decoding.
LEAST_TOKENS, MAX_TOKENS = 2, 4
WAIT_S = 1.0  # between two looks whether a server answers
# What a proof finds cold is warm behind it: as part of a start it may find something in all but the last.
GATE_PROOFS = 3
# Each way to sample that runs kernels of its own; of vLLM's two samplers, one or the other has them.
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "seeded": {"temperature": 1.0, "seed": 1},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "top-k": {"temperature": 1.0, "top_k": 20},
    "top-k and top-p": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "penalties": {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    # With a seed, FlashInfer's sampler is passed by.
    "seeded top-p": {"temperature": 1.0, "top_p": 0.9, "seed": 1},
    "seeded top-k": {"temperature": 1.0, "top_k": 20, "seed": 1},
    "seeded top-k and top-p": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 1},
    # With the sampled token a kernel for each power of two, and another for 16.
    **{f"logprobs {count}": {"temperature": 0, "logprobs": count} for count in (0, 1, 2, 4, 8, 15, 16, 20)},
    "prompt logprobs": {"temperature": 0, "prompt_logprobs": 2},
    "stop": {"temperature": 0, "stop_token_ids": [3]},
    "least tokens": {"temperature": 0, "min_tokens": LEAST_TOKENS},
    "bias": {"temperature": 0, "logit_bias": {"5": 2.0}},
    "two answers": {"temperature": 1.0, "n": 2},
}


Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Limits:
    """What decides which kernels a request reaches; the server tells max_len, the others are DeepSeek-V4's or vLLM's.

    chunk: tokens of a step (--max-num-batched-tokens). block: tokens of a KV block. window: of sliding attention.
    top_k: entries that the indexer picks, each of `ratio` tokens. users: at most so many requests at a time.
    engines: data-parallel ranks, each of which should meet each length.
    """

    max_len: int
    chunk: int = 8192
    block: int = 256
    window: int = 128
    top_k: int = 1024
    ratio: int = 4
    users: int = 64
    engines: int = 1

    def validate(self) -> None:
        """Raises: ValueError - one of them is not positive, or max_len leaves no room for a prompt and its answer."""
        if min(vars(self).values()) < 1 or self.max_len <= MAX_TOKENS:
            raise ValueError(f"{self}: expected positive numbers and max_len above {MAX_TOKENS}; correct the flags")


def lengths(limits: Limits) -> list[int]:
    """Prompt lengths, ascending: 1, each boundary, one token less and one more, and the longest that fits."""
    boundaries = {limits.ratio, 16, 64, limits.window, limits.block, limits.chunk}
    # Up to `top_k` entries the indexer picks all and computes nothing.
    boundaries.add((limits.top_k + 1) * limits.ratio)
    longest = limits.max_len - MAX_TOKENS
    near = {boundary + step for boundary in boundaries for step in (-1, 0, 1)} | {1, 2, 2 * limits.chunk + 1, longest}
    return sorted(length for length in near if 0 < length <= longest)


def users(limits: Limits) -> list[int]:
    """How many ask at a time: every power of two, one more than each, and the most."""
    powers = [1 << i for i in range(limits.users.bit_length())]
    return sorted(
        {count for power in powers for count in (power, power + 1)} & set(range(limits.users)) | {limits.users}
    )


def body(seed: int, length: int, sampling: str, vocabulary: int, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """A completion request: a prompt of token ids that no other seed has."""
    ids = random.Random(seed).choices(range(1, vocabulary), k=length)
    return {"prompt": ids, "max_tokens": max_tokens, "ignore_eos": True, **SAMPLING[sampling]}


def sweep(limits: Limits, vocabulary: int, ways: list[str]) -> list[list[dict[str, Any]]]:
    """Groups of requests; those of a group are sent at once, and a group when the one before is answered."""
    seeds = [10**8 * engine for engine in range(limits.engines)]
    groups = [[body(seed + length, length, "greedy", vocabulary) for seed in seeds] for length in lengths(limits)]
    # Once more: now their blocks are in the prefix cache, and only the rest is computed.
    groups += [list(group) for group in groups]
    for index, sampling in enumerate(ways):
        groups.append([body(10**6 + index, min(17, limits.max_len - MAX_TOKENS), sampling, vocabulary)])
    for count in users(limits):
        for mixed in (False, True):
            groups.append(
                [
                    body(10**7 + 10**4 * count + i, min(9 + i, limits.max_len - MAX_TOKENS), name, vocabulary)
                    for i in range(count)
                    for name in [ways[i % len(ways)] if mixed else "greedy"]
                ]
            )
    return groups


def proof(limits: Limits, vocabulary: int, ways: list[str], num_requests: int, seed: int) -> list[list[dict[str, Any]]]:
    """Groups as `sweep`, drawn at random: lengths evenly by their logarithm, group sizes up to `users`."""
    drawn, groups, left = random.Random(seed), [], num_requests
    while left:
        count = min(left, drawn.randint(1, limits.users))
        left -= count
        groups.append(
            [
                body(
                    drawn.randrange(10**9, 10**12),
                    round(math.exp(drawn.uniform(0, math.log(limits.max_len - MAX_TOKENS)))),
                    drawn.choice(ways),
                    vocabulary,
                    drawn.randint(LEAST_TOKENS, MAX_TOKENS),
                )
                for _ in range(count)
            ]
        )
    return groups


def ask(url: str, request: dict[str, Any]) -> str:
    """Send a completion; "" if it was answered with 200, else what happened, in a line."""
    shown = f"a prompt of {len(request['prompt'])} tokens, { ({k: v for k, v in request.items() if k != 'prompt'}) }"
    try:
        with closing(connect(url)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(request), headers(api_key()))
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}: {shown}"
    return "" if answer.status == 200 else f"HTTP {answer.status}: {text[:200]}: {shown}"


class Sender:
    """Sends groups of requests one after another and says how many it has sent.

    url: of the server. deadline: on time.monotonic's clock. report: called with (sent, to send).
    """

    def __init__(
        self, url: str, deadline: float = math.inf, report: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        self.url, self.deadline, self.report, self.done, self.total = url, deadline, report, 0, 0

    def send(self, groups: list[list[dict[str, Any]]]) -> list[str]:
        """What failed; ends with the first group of several in which every request failed.

        Raises: RuntimeError - the deadline has passed.
        """
        failed: list[str] = []
        self.total += sum(map(len, groups))
        with ThreadPoolExecutor(max(map(len, groups))) as pool:
            for group in groups:
                if time.monotonic() > self.deadline:
                    raise RuntimeError(
                        f"{self.done} of {self.total} requests in all the time that there is; raise --limit-s"
                    )
                found = [text for text in pool.map(lambda request: ask(self.url, request), group) if text]
                failed += found
                self.done += len(group)
                self.report(self.done, self.total)
                if len(found) == len(group) > 1:
                    break
        return failed


def get(url: str, path: str) -> str:
    """The body of a GET.

    Raises: RuntimeError - the server does not answer, or not with 200.
    """
    try:
        with closing(connect(url)) as connection:
            connection.request("GET", path, headers=headers(api_key()))
            answer = connection.getresponse()
            text = answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f"{url}{path} cannot be read ({error}); start the server, or correct the URL") from error
    if answer.status != 200:
        raise RuntimeError(f"{url}{path}: HTTP {answer.status}, expected 200; is VLLM_API_KEY the server's?")
    return text


def samples(url: str) -> dict[str, float]:
    """The samples of a metrics page by their name and labels.

    Raises: RuntimeError - it cannot be read, or has no metric of ours: without counts nothing would be proven.
    """
    rows = (line.rpartition(" ") for line in get(url, "/metrics").splitlines() if not line.startswith("#"))
    found = {name: float(value) for name, _, value in rows if name.startswith("nvfp4_")}
    if not any(name.startswith(PRESENT + "{") for name in found):
        raise RuntimeError(f"{url}/metrics has no {PRESENT}: not a server of `nvfp4 serve`, or one that still loads")
    return found


def counts(options: argparse.Namespace) -> dict[str, float]:
    """What has been compiled so far: the samples of the server, and each file of the caches.

    Raises: RuntimeError - as `samples`, or a cache is no folder.
    """
    found = samples(options.metrics)
    for cache in options.cache:
        if not cache.is_dir():
            raise RuntimeError(f"--cache {cache} is no folder; correct it, or run this where the server's cache is")
        found |= {str(file): 1 for file in cache.rglob("*") if file.is_file()}
    return found


def compiled(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """What was compiled between two readings, a line a count that rose."""
    rose = {name: count - before.get(name, 0) for name, count in after.items() if name.startswith(COUNTED)}
    return [f"{name}: {count:.0f}" for name, count in sorted(rose.items()) if count > 0]


def is_watched(found: dict[str, float]) -> bool:
    """Does vLLM's JIT monitor watch in every worker?"""
    workers = {label(name) for name in found if name.startswith(PRESENT + "{")}
    return workers == {label(name) for name, on in found.items() if name.startswith(MONITOR + "{") and on}


def label(name: str) -> str:
    """The rank in a sample's name."""
    return "".join(re.findall(r'\brank="([^"]*)"', name))


FIELDS = ("chunk", "block", "window", "top_k", "ratio", "users", "engines")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="the server")
    parser.add_argument("--local", action="store_true", help="the server of this container")
    parser.add_argument(
        "--gate", action="store_true", help="as --local; hold NVFP4_STATUS_FILE's pod back until it is warm"
    )
    parser.add_argument("--limit-s", type=float, default=math.inf, help="fail when it takes longer")
    parser.add_argument(
        "--metrics", help="where counts are read; default: the server itself, with --local the side port"
    )
    parser.add_argument(
        "--cache", type=lambda text: Path(text).absolute(), action="append", default=[], help="of compiled kernels"
    )
    parser.add_argument("--sampling", nargs="+", choices=SAMPLING, default=list(SAMPLING), help="ways; default: all")
    parser.add_argument("--max-len", type=int, help="longest prompt and answer; default: the server's")
    parser.add_argument("--vocabulary", type=int, default=500, help="prompts are token ids below this")
    parser.add_argument("--requests", type=int, default=200, help="of the proof")
    parser.add_argument("--seed", type=int, default=1, help="of the proof")
    for field in FIELDS:
        help_text = f"default: the engine's with --local, {getattr(Limits, field)} without"
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, help=help_text)
    options = parser.parse_intermixed_args(arguments)  # the URL may stand behind flags
    if options.gate and not os.environ.get("NVFP4_STATUS_FILE"):
        parser.error("--gate needs NVFP4_STATUS_FILE, as the server and its probes have it")
    options.local = options.local or options.gate
    if bool(options.url) == options.local:
        parser.error("expected a URL or --local")
    if options.local:
        options.url = f"http://127.0.0.1:{os.environ.get('NVFP4_PORT', '8000')}"
        side_port = os.environ.get("NVFP4_SIDE_PORT")
        options.metrics = options.metrics or (f"http://127.0.0.1:{side_port}" if side_port else None)
    options.metrics = options.metrics or options.url
    return options


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits: of a flag, or else of the engine in this container, or else the default.

    The longest request is asked from the server; of more users than the default an engine's limit says nothing.

    Raises: ValueError - as Limits.validate; RuntimeError - the server does not answer.
    """
    served = json.loads(get(options.url, "/v1/models"))["data"][0]["max_model_len"]
    found = {field: getattr(Limits, field) for field in FIELDS}
    if options.local and (path := os.environ.get("NVFP4_STATUS_FILE")):
        from vllm_nvfp4 import status

        engine = status.read_limits(path)
        found |= engine | {"users": min(engine.get("users", Limits.users), Limits.users)}
    found |= {field: given for field in FIELDS if (given := getattr(options, field)) is not None}
    limits = Limits(min(served, options.max_len or served), **found)
    limits.validate()
    return limits


def warm(
    options: argparse.Namespace, num_proofs: int, report: Callable[[int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Sweep, then prove, up to `num_proofs` times; the line to print.

    Raises: RuntimeError, ValueError - as `limits_of` and `counts`, or --limit-s has passed.
    """
    began = time.monotonic()
    sender = Sender(options.url, began + options.limit_s, report)
    limits, start = limits_of(options), counts(options)
    groups = sweep(limits, options.vocabulary, options.sampling)
    failed = sender.send(groups)
    before, swept_s, late = counts(options), time.monotonic() - began, []
    for index in range(0 if failed else num_proofs):
        second = proof(limits, options.vocabulary, options.sampling, options.requests, options.seed + index)
        cold = counts(options)
        failed = sender.send(second)
        after = counts(options)
        late = compiled(cold, after)
        if failed or not late:
            break
    return {
        "sweep_requests": sum(map(len, groups)),
        "sweep_s": round(swept_s, 1),
        "compiled_in_sweep": compiled(start, before),
        "proof_requests": options.requests,
        "proof_s": round(time.monotonic() - began - swept_s, 1),
        "compiled_in_proof": late,
        "jit_monitor": is_watched(counts(options)),
        "num_failed": len(failed),
        "failed": failed[:10],
    }


def why_cold(row: dict[str, Any]) -> str:
    """What speaks against a line of `warm`; "": nothing."""
    if row["num_failed"]:
        return f"{row['num_failed']} requests failed, the first: {row['failed'][0]}"
    return f"the proof compiled {', '.join(row['compiled_in_proof'])}" if row["compiled_in_proof"] else ""


def gate(options: argparse.Namespace) -> int:
    """Wait for the server of this container, warm it, and tell `nvfp4 probe ready` through the status file."""
    # Imported here: without --gate and --local this script needs nothing but a network.
    from vllm_nvfp4 import status

    heartbeat, server = status.Status(rank=status.SWEEP), os.getppid()
    while not answers(options.url):
        if os.getppid() != server:
            return 1
        time.sleep(WAIT_S)
    heartbeat.update(status.SWEEPING, 0, 1, "requests")
    options.cache += [folder for folder in jit_caches() if folder.is_dir()]
    try:
        row = warm(options, GATE_PROOFS, lambda done, total: heartbeat.update(status.SWEEPING, done, total, "requests"))
        print(json.dumps(row), flush=True)
        reason = why_cold(row)
    except (RuntimeError, ValueError) as error:
        reason = str(error)
    if reason:
        heartbeat.update(status.SWEEP_FAILED, reason=reason)
        then = "this pod stays unready" if os.environ.get("NVFP4_STRICT") == "1" else "it serves all the same"
        print(f"warmup.py: not proven warm: {reason}; {then} (NVFP4_STRICT)", file=sys.stderr, flush=True)
        return 1
    heartbeat.update(status.SWEPT, 1, 1, "sweep")
    return 0


def answers(url: str) -> bool:
    """Is there a server whose /health is 200?"""
    try:
        get(url, "/health")
    except RuntimeError:
        return False
    return True


def jit_caches() -> list[Path]:
    """Where DeepGEMM and FlashInfer keep what they compile, which nothing else counts."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    vllm = Path(os.environ.get("VLLM_CACHE_ROOT") or home / "vllm")
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home())
    return [Path(os.environ.get("DG_JIT_CACHE_DIR") or vllm / "deep_gemm"), base / ".cache" / "flashinfer"]


def main(arguments: list[str] | None = None) -> int:
    """Sweep, prove, print the line."""
    options = parse(arguments)
    if options.gate:
        return gate(options)
    try:
        row = warm(options, num_proofs=1)
    except (RuntimeError, ValueError) as error:
        print(f"warmup.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(row), flush=True)
    return 1 if why_cold(row) else 0


if __name__ == "__main__":
    sys.exit(main())
