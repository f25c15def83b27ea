"""`make serve`: a taken port is refused at once, and the line it prints is a request that shells and servers take."""

import json
import shlex
import socket
from pathlib import Path

import make_serve
import pytest


def test_a_taken_port_is_refused_by_name() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=f"127.0.0.1:{port} is taken by another program"):
            make_serve.refuse_taken_port("127.0.0.1", port)
    make_serve.refuse_taken_port("127.0.0.1", port)


def test_the_printed_line_is_one_shell_command() -> None:
    words = shlex.split(make_serve.curl_line("127.0.0.1", 8000, Path("/a folder/model")))
    assert words[0] == "curl"
    assert "http://127.0.0.1:8000/v1/chat/completions" in words
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "/a folder/model"
    # With thinking, a short answer is all reasoning and its text is null: a bad first impression.
    assert body["chat_template_kwargs"] == {"thinking": False}
