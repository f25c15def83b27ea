"""Keep a running server busy for a while, the way users do, and say whether it stayed right.

    VLLM_API_KEY=... python scripts/load_test.py --url http://127.0.0.1:8000 --users 8 --seconds 60

Each user asks again and again: most requests are streamed to their end, some are dropped half-way, some are malformed, and
some carry a wrong key where there is one. Right means: a stream ends with exactly the tokens that were asked for, a bad
request is answered with a 4xx, a wrong key with 401, and at the end the server still completes. With --same a prompt must
also get the same text every time; batches change summation order, so that holds for trained models and short answers.
One JSON line; exit code 1 if anything was wrong. The key is read from VLLM_API_KEY only.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from urllib.parse import urlsplit

# (body, status) of requests that a server must refuse and survive.
BAD_BODIES = (
    (b"{", 400),
    (b'{"prompt": [1], "max_tokens": -1}', 400),
    (b'{"prompt": [-1], "max_tokens": 1}', 400),
    (b'{"prompt": [1], "max_tokens": 1, "temperature": "hot"}', 400),
    (b'{"prompt": [1], "max_tokens": 1, "model": "no such model"}', 404),
)


@dataclass
class Tally:
    """What happened to all users together; `lock` guards it."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    request_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    answers: dict[int, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, wrong: str = "") -> None:
        """Count a request; `wrong` says what was not as it must be."""
        with self.lock:
            self.counts[kind] += 1
            if wrong:
                self.wrong.append(f"{kind}: {wrong}")


class User(threading.Thread):
    """Asks until the deadline."""

    def __init__(self, options: argparse.Namespace, number: int, tally: Tally, deadline: float) -> None:
        super().__init__(daemon=True)
        self.options, self.tally, self.deadline = options, tally, deadline
        self.random = random.Random(number)

    def run(self) -> None:
        """One request after another, of a kind drawn at random."""
        o = self.options
        kinds = ["stream", "drop", "bad", "wrong key"]
        weights = [1 - o.drop - o.bad, o.drop, o.bad / 2, o.bad / 2 if api_key() else 0]
        while time.monotonic() < self.deadline:
            (kind,) = self.random.choices(kinds, weights)
            try:
                {"stream": self.stream, "drop": self.drop, "bad": self.bad, "wrong key": self.wrong_key}[kind]()
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.tally.note(kind, f"{type(error).__name__}: {error}")
                time.sleep(0.2)

    def stream(self) -> None:
        """A completion to its end."""
        seed, began, first, text, usage = self.random.randrange(self.options.prompts), time.monotonic(), 0.0, [], None
        connection, answer = self._open(seed)
        with closing(connection):
            if answer.status != 200:
                self.tally.note("stream", f"HTTP {answer.status}: {answer.read()[:200]!r}")
                return
            for line in answer:
                data = line.decode().strip().removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                first = first or time.monotonic() - began
                chunk = json.loads(data)
                text += [choice["text"] for choice in chunk["choices"]]
                usage = chunk.get("usage") or usage
        found = usage and usage["completion_tokens"]
        wrong = "" if found == self.options.max_tokens else f"{found} tokens, expected {self.options.max_tokens}"
        with self.tally.lock:
            self.tally.first_token_s.append(first)
            self.tally.request_s.append(time.monotonic() - began)
            self.tally.num_tokens += found or 0
            before = self.tally.answers.setdefault(seed, "".join(text))
        if self.options.same and before != "".join(text):
            wrong = wrong or f"prompt {seed} was answered differently before"
        self.tally.note("stream", wrong)

    def drop(self) -> None:
        """A user who leaves after the first token."""
        connection, answer = self._open(self.random.randrange(self.options.prompts))
        with closing(connection):
            answer.readline()
            self.tally.note("drop", "" if answer.status == 200 else f"HTTP {answer.status}")

    def bad(self) -> None:
        """A request that must be refused."""
        body, expected = self.random.choice(BAD_BODIES)
        status = post(self.options.url, body, api_key())
        self.tally.note("bad", "" if status == expected else f"HTTP {status} for {body!r}, expected {expected}")

    def wrong_key(self) -> None:
        """A stranger."""
        status = post(self.options.url, b'{"prompt": [1], "max_tokens": 1}', "wrong")
        self.tally.note("wrong key", "" if status == 401 else f"HTTP {status}, expected 401")

    def _open(self, seed: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        ids = random.Random(seed).choices(range(1, self.options.vocabulary), k=self.options.prompt_tokens)
        body = {
            "prompt": ids, "max_tokens": self.options.max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        connection = connect(self.options.url)
        connection.request("POST", "/v1/completions", json.dumps(body), headers(api_key()))
        return connection, connection.getresponse()


def api_key() -> str:
    """The server's key; empty: it needs none."""
    return os.environ.get("VLLM_API_KEY", "")


def headers(key: str) -> dict[str, str]:
    """Of a JSON request."""
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def connect(url: str) -> http.client.HTTPConnection:
    """A connection to the server of a URL; whatever path it has is ignored."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=600)


def post(url: str, body: bytes, key: str) -> int:
    """Status of a completion request."""
    connection = connect(url)
    with closing(connection):
        connection.request("POST", "/v1/completions", body, headers(key))
        return connection.getresponse().status


def is_healthy(url: str) -> bool:
    """Does the server still answer, and compute?"""
    try:
        return post(url, b'{"prompt": [1], "max_tokens": 1}', api_key()) == 200
    except (OSError, http.client.HTTPException):
        return False


def quantiles_ms(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    if not seconds:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return {"median": round(cuts[49] * 1e3, 1), "p99": round(cuts[98] * 1e3, 1)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1000, help="different prompts")
    parser.add_argument("--vocabulary", type=int, default=500, help="prompts are token ids below this")
    parser.add_argument("--drop", type=float, default=0.1, help="share of requests that are left half-way")
    parser.add_argument("--bad", type=float, default=0.1, help="share of requests that must be refused")
    parser.add_argument("--same", action="store_true", help="the same prompt must give the same text")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the users, print the line."""
    options, tally, began = parse(arguments), Tally(), time.monotonic()
    users = [User(options, number, tally, began + options.seconds) for number in range(options.users)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    seconds = time.monotonic() - began
    if not is_healthy(options.url):
        tally.note("end", "the server does not answer a completion any more")
    row = {
        "seconds": round(seconds, 1),
        "requests": dict(tally.counts),
        "tokens_per_s": round(tally.num_tokens / seconds, 1),
        "first_token_ms": quantiles_ms(tally.first_token_s),
        "request_ms": quantiles_ms(tally.request_s),
        "num_wrong": len(tally.wrong),
        "wrong": tally.wrong[:10],
    }
    print(json.dumps(row), flush=True)
    return 1 if tally.wrong or not tally.counts["stream"] else 0


if __name__ == "__main__":
    sys.exit(main())
