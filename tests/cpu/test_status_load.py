"""scripts/load_test.py notices what is wrong, against a server that can be told to misbehave."""

import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import load_test
import pytest
from serving import Answers, free_port

KEY = "the-key"


class Served:
    """How the server behaves."""

    num_tokens_missing, bad_status, key, text = 0, 400, KEY, "t"
    dead_after = 10**9
    num_requests = 0


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, str]]:
    state = Served()
    monkeypatch.setenv("VLLM_API_KEY", KEY)

    class Handler(Answers):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            state.num_requests += 1
            if state.num_requests > state.dead_after:
                self.answer(500)
                return
            if self.headers.get("Authorization") != f"Bearer {state.key}":
                self.answer(401)
                return
            try:
                body = json.loads(raw)
            except ValueError:
                self.answer(state.bad_status)
                return
            if body.get("model") == "no such model":
                self.answer(404)
                return
            if body["max_tokens"] < 0 or min(body["prompt"]) < 0 or isinstance(body.get("temperature"), str):
                self.answer(state.bad_status)
                return
            num_tokens = body["max_tokens"] - state.num_tokens_missing
            text = state.text + (str(state.num_requests) if state.text == "changing" else "")
            chunks = [{"choices": [{"text": text}]} for _ in range(num_tokens)]
            chunks.append({"choices": [], "usage": {"completion_tokens": num_tokens}})
            lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
            self.answer(200, "".join([*lines, "data: [DONE]\n\n"]))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(url: str, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    arguments = ["--url", url, "--users", "4", "--seconds", "1", "--max-tokens", "3", "--prompts", "5", *flags]
    code = load_test.main([*arguments, "--bad", "0.4"])
    return code, json.loads(capsys.readouterr().out)


def test_a_good_server_passes(served: tuple[Served, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, row = run(served[1], capsys, "--same")
    assert (code, row["num_wrong"], row["wrong"]) == (0, 0, [])
    assert set(row["requests"]) == {"stream", "drop", "bad", "wrong key"}
    assert row["tokens_per_s"] > 0
    assert 0 < row["first_token_ms"]["median"] <= row["request_ms"]["p99"]


@pytest.mark.parametrize(
    ("change", "flags", "noticed"),
    [
        ({"num_tokens_missing": 1}, [], "stream: 2 tokens, expected 3"),
        ({"bad_status": 200}, [], "bad: HTTP 200"),
        ({"bad_status": 500}, [], "bad: HTTP 500"),
        ({"text": "changing"}, ["--same"], "was answered differently before"),
        ({"key": "wrong"}, [], "wrong key: HTTP 200, expected 401"),
        ({"key": "another"}, [], "stream: HTTP 401"),
        ({"dead_after": 20}, [], "end: the server does not answer a completion any more"),
    ],
)
def test_what_is_wrong_is_noticed(
    served: tuple[Served, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    flags: list[str],
    noticed: str,
) -> None:
    for name, value in change.items():
        setattr(served[0], name, value)
    found: list[str] = []
    note = load_test.Tally.note

    def keep(tally: load_test.Tally, kind: str, wrong: str = "") -> None:
        found.append(f"{kind}: {wrong}")
        note(tally, kind, wrong)

    monkeypatch.setattr(load_test.Tally, "note", keep)
    code, row = run(served[1], capsys, *flags)
    assert code == 1
    assert row["num_wrong"] > 0
    assert any(noticed in text for text in found)


def test_no_server_at_all_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, row = run(f"http://127.0.0.1:{free_port()}", capsys)
    assert code == 1
    assert "ConnectionRefusedError" in row["wrong"][0]
