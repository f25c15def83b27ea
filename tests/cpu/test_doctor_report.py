"""The doctor's output: terminal of any width, JSON by its schema, picture, exit codes of the command, plans."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from damage_checkpoint import Copy
from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint
from rich.console import Console
from vllm_nvfp4.doctor import report
from vllm_nvfp4.doctor.cli import USAGE_ERROR, main
from vllm_nvfp4.doctor.examine import Options, examine

SCHEMA = json.loads(report.SCHEMA_PATH.read_text(encoding="utf-8"))


def validated(text: str) -> dict[str, Any]:
    value = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(value)
    return value


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An error, a warning, a pattern of many tensors and a hostile name."""
    folder = tmp_path_factory.mktemp("damaged") / "x"
    make_tiny_checkpoint(folder, TinySpec(hidden=128, experts=8, topk=2, shards=2))
    copy = Copy(folder)
    experts = {copy.names[n]: None for n in copy.names if n and ".ffn.experts." in n and n.endswith("w2.input_scale")}
    copy.put(experts)
    Copy(folder).put({"model.layers.0.\x1b[31m\ud7ff\u202e": torch.zeros(2)}, copy.names["model.norm.weight"])
    (folder / "tokenizer_config.json").unlink()
    return folder


def test_the_schema_is_a_schema_and_refuses_what_it_should(affine: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    value = validated(report.to_json(examine(str(affine), Options())))
    for change in ({"exit_code": 3}, {"findings": [{}]}, {"surprise": 1}, {"coverage": None}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value | change, SCHEMA)


@pytest.mark.parametrize("flags", [[], ["--deep"], ["--gpu", "h200", "--tp", "2"], ["--plan-only"]])
def test_json_by_its_schema(affine: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    status = main([str(affine), "--json", *flags])
    value = validated(capsys.readouterr().out)
    assert value["exit_code"] == status == 0
    assert (value["code_shares"] is not None) == ("--deep" in flags)
    if "--deep" in flags:
        assert sum(value["code_shares"].values()) == pytest.approx(1)
        assert value["read"]["weight_bytes"] > 10_000_000
    if "--plan-only" in flags:
        assert (value["kind"], value["coverage"], value["layout"]["name"]) == ("config", [], "unknown")
    else:
        by_class = {row["class"]: row for row in value["coverage"]}
        assert by_class["routed experts"]["kernels"] == {
            "cpu": "cutedsl reference", "sm90": "cutedsl sm90", "sm100": "cutedsl sm100",
        }  # fmt: skip
        scales = {(s["class"], s["layer"], s["leaf"]): s for s in value["scales"]}
        assert scales["ffn.experts.w2", 3, "input_scale"]["amax_max"] == pytest.approx(77.14, rel=1e-3)
        assert scales["ffn.experts.w2", 3, "input_scale"]["count"] == 32


def test_json_of_a_damaged_checkpoint(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(damaged), "--json"]) == 1
    findings = {f["code"]: f for f in validated(capsys.readouterr().out)["findings"]}
    assert (findings["EXPERT_UNCALIBRATED"]["count"], len(findings["EXPERT_UNCALIBRATED"]["examples"])) == (32, 3)
    assert findings["NAME_UNKNOWN"]["tensor"].startswith("model.layers.0.\\x1b[31m")
    assert findings["TOKENIZER_CONFIG_MISSING"]["severity"] == "warning"


def test_json_where_nothing_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--json"]) == 1
    value = validated(capsys.readouterr().out)
    assert (value["architecture"], value["plan"]) == (None, None)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_report_keeps_to_the_width(damaged: Path, width: int) -> None:
    out = io.StringIO()
    report.render(examine(str(damaged), Options()), Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(out.getvalue().split())
    for text in (
        "will not serve",
        "ERROR EXPERT_UNCALIBRATED",
        "(32 tensors)",
        "WARNING TOKENIZER_CONFIG_MISSING",
        "do: ",
    ):
        assert text in words
    assert not any(ord(c) < 32 for line in lines for c in line)


def test_no_colour_where_there_is_no_terminal(affine: Path) -> None:
    command = [sys.executable, "-m", "vllm_nvfp4.doctor.cli", str(affine)]
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=True)
    assert "\x1b" not in done.stdout
    assert "will serve" in done.stdout
    coloured = io.StringIO()
    report.render(examine(str(affine), Options()), Console(file=coloured, force_terminal=True, color_system="standard"))
    assert "\x1b[" in coloured.getvalue()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_who_stops_early_does_not_change_the_verdict(affine: Path, flags: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vllm_nvfp4.doctor.cli", str(affine), *flags]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_many_findings_are_cut_on_a_terminal_only(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_SHOWN", 1)
    result, out = examine(str(damaged), Options()), io.StringIO()
    report.render(result, Console(file=out, width=100))
    assert f"... and {len(result.findings) - 1} more findings: --json has them all" in out.getvalue()
    assert len(report.as_dict(result)["findings"]) == len(result.findings)


@pytest.mark.parametrize("which", ["affine", "plan", "nothing"])
def test_a_picture(which: str, affine: Path, tmp_path: Path) -> None:
    path = {"affine": affine, "plan": affine / "config.json", "nothing": tmp_path / "none"}[which]
    main([str(path), "--plot", str(tmp_path / "out.png")])
    content = (tmp_path / "out.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


def test_a_picture_that_cannot_be_written(affine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none" / "x.png", tmp_path / "x.unknown"):
        assert main([str(affine), "--plot", str(path)]) == USAGE_ERROR
        assert f"{path} is not written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PATH_OR_HUB_ID"),
        (["x", "--gpu", "abacus"], "invalid choice: 'abacus'"),
        (["x", "--tp", "many"], "invalid int value"),
        (["x", "--plan-only", "--deep"], "choose one"),
        (["x", "--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_none_of_the_verdicts(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == USAGE_ERROR
    assert words in capsys.readouterr().err


# Plans. What they say is tested in test_doctor_plan.py; here, that it is asked, shown and counted.


def configuration(tmp_path: Path, affine: Path, **fields: Any) -> Path:
    folder = tmp_path / "planned"
    folder.mkdir()
    config = json.loads((affine / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# V4-Pro's sizes where they are what fills a GPU.
LARGE = {
    "hidden_size": 7168,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "max_position_embeddings": 1048576,
}


@pytest.mark.parametrize("as_file", [True, False])
def test_a_plan_from_the_configuration_alone(
    tmp_path: Path, affine: Path, capsys: pytest.CaptureFixture[str], as_file: bool
) -> None:
    folder = configuration(tmp_path, affine)
    arguments = [str(folder / "config.json")] if as_file else [str(folder), "--plan-only"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "fits" in out
    assert "layout:" not in out


def test_a_folder_without_weights_does_not_serve_but_is_planned(
    tmp_path: Path, affine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(configuration(tmp_path, affine)), "--json"]) == 1
    value = validated(capsys.readouterr().out)
    assert "NO_WEIGHTS" in [f["code"] for f in value["findings"]]
    assert value["plan"]["fit"]["fits"] is True


@pytest.mark.parametrize(
    ("flags", "status", "code"),
    [
        ([], 0, None),  # not asked: the plan is there to be read
        (["--gpu", "b200", "--context", "8192"], 0, None),
        (["--gpu", "b200", "--context", "1048576", "--max-num-seqs", "400"], 2, "PLAN_FEWER_REQUESTS"),
        (["--gpu", "h100", "--gpu-memory-utilization", "0.2"], 1, "PLAN_DOES_NOT_FIT"),
    ],
)
def test_plans_and_exit_codes(
    tmp_path: Path, affine: Path, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, code: str | None
) -> None:
    folder = configuration(tmp_path, affine, **LARGE)
    assert main([str(folder), "--plan-only", "--json", *flags]) == status
    codes = [f["code"] for f in validated(capsys.readouterr().out)["findings"]]
    assert codes == ([] if code is None else [code])


def test_a_layout_that_cannot_be(tmp_path: Path, affine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(configuration(tmp_path, affine)), "--plan-only", "--json", "--tp", "3"]) == 1
    value = validated(capsys.readouterr().out)
    assert value["plan"] is None
    assert [f["code"] for f in value["findings"]] == ["PLAN_OPTIONS"]
    assert "--tensor-parallel-size 3 does not divide" in value["findings"][0]["value"]


def test_no_layout_at_all(tmp_path: Path, affine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = configuration(tmp_path, affine, **LARGE)
    assert main([str(folder), "--plan-only", "--json", "--gpu-memory-utilization", "0.001"]) == 1
    codes = [f["code"] for f in validated(capsys.readouterr().out)["findings"]]
    assert codes == ["PLAN_DOES_NOT_FIT", "PLAN_NO_LAYOUT"]


def test_the_flags_reach_the_plan(affine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gpu", "h200", "--tp", "2", "--dp", "2", "--ep", "--context", "4096", "--max-num-seqs", "8"]
    main([str(affine / "config.json"), "--json", *flags])
    options = validated(capsys.readouterr().out)["plan"]["options"]
    assert {k: options[k] for k in ("gpu", "tp", "dp", "pp", "ep", "context", "max_num_seqs")} == {
        "gpu": "h200", "tp": 2, "dp": 2, "pp": 1, "ep": True, "context": 4096, "max_num_seqs": 8,
    }  # fmt: skip
