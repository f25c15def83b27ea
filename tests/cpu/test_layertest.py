"""`nvfp4 layertest`: every operator of a real export, and everything that must not pass for right."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_nvfp4 import cli, layertest, names
from vllm_nvfp4.layertest_cases import Checkpoint, MoeCase, Stack, make_case, modules_of

from cutedsl.ops import registry
from cutedsl.quantize import dequantize
from cutedsl.reference import linear as reference

LAYER = "model.layers.3"
# Of the export's layer with an indexer: what vLLM computes as one module, and by which runner.
OPERATORS = {
    "attn.wq_a+wkv": "linear",
    "attn.wq_b": "linear",
    "attn.wo_b": "linear",
    "attn.compressor.wkv+wgate": "linear",
    "attn.indexer.wq_b": "linear",
    "attn.indexer.weights_proj": "linear",
    "attn.indexer.compressor.wkv+wgate": "linear",
    "ffn.shared_experts.w1+w3+down_proj": "shared_expert",
    "ffn.experts": "moe",
}
FEW = ("--layers", "3", "--tokens", "2", "--activations", "nvfp4")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Exit code and JSON."""
    code = layertest.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_every_operator_of_a_layer_is_right(
    affine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVFP4_WO_A", "1")
    code, found = run(capsys, str(affine), "--layers", "3", "--tokens", "1,3")
    assert (code, found["ok"], found["skipped"], found["backend"]) == (0, True, {}, "reference")
    expected = {f"{LAYER}.{module}": kind for module, kind in OPERATORS.items()} | {f"{LAYER}.attn.wo_a": "wo_a"}
    assert {row["module"]: row["kind"] for row in found["rows"]} == expected
    batches = {(row["module"], row["activations"], row["tokens"]) for row in found["rows"]}
    assert len(batches) == len(found["rows"]) == 4 * len(expected), "a batch is missing, or there twice"
    for row in found["rows"]:
        # One rounding to BF16, and never none: the exact answer is no copy of the answer.
        assert 1e-4 < row["worst_row"] < 2.0**-8, row
        assert row["us"] > 0
    assert registry.describe() == [], "runners are kept"


def test_what_is_not_in_nvfp4_is_named(affine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(capsys, str(affine), "--layers", "0,3", "--tokens", "1", "--activations", "bf16")
    assert code == 0
    assert found["skipped"] == {f"model.layers.{i}.attn.wo_a": "high precision" for i in (0, 3)}
    assert {row["layer"] for row in found["rows"]} == {0, 3}
    assert {row["activations"] for row in found["rows"]} == {"bf16"}


def test_default_layers_and_the_table(affine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert layertest.main([str(affine), "--tokens", "1", "--activations", "nvfp4"]) == 0
    text = capsys.readouterr().out
    assert all(f"model.layers.{i}.ffn.experts " in text for i in (0, 2, 3))
    assert "model.layers.1." not in text
    assert text.splitlines()[-1] == "20 of 20 right"


@pytest.mark.parametrize(
    "fault",
    [lambda y: y * 1.01, lambda y: y.where(torch.arange(y.shape[1]) != 5, 0), lambda y: y.fill_(float("nan"))],
    ids=["1 % off", "a column missing", "NaN"],
)
def test_a_wrong_answer_is_found(
    affine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: Callable
) -> None:
    right = reference.linear

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return fault(right(*args, **kwargs))

    monkeypatch.setattr(reference, "linear", wrong)
    code, found = run(capsys, str(affine), *FEW)
    verdicts = {row["module"]: row["ok"] for row in found["rows"]}
    assert (code, found["ok"]) == (1, False)
    assert verdicts == {f"{LAYER}.{module}": kind != "linear" for module, kind in OPERATORS.items()}


def test_an_answer_that_is_only_left_over_is_found(
    affine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[torch.Tensor] = []
    right = reference.linear

    def once(*args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes nothing after the first call, and returns the same memory."""
        if not answers:
            answers.append(right(*args, **kwargs))
        return answers[0].view_as(answers[0])

    monkeypatch.setattr(reference, "linear", once)
    # Only one linear, one batch: the first operator of the layer.
    monkeypatch.setattr("vllm_nvfp4.layertest_cases.modules_of", lambda *_: ([(f"{LAYER}.attn.wq_b",)], {}))
    code, found = run(capsys, str(affine), *FEW)
    assert (code, [row["ok"] for row in found["rows"]]) == (1, [False])


def test_thresholds(affine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, str(affine), *FEW, "--max-worst-row", "1e-4")[0] == 1
    assert run(capsys, str(affine), *FEW, "--min-cosine", "1.1")[0] == 1


def test_experts_are_stacked_each_in_its_place(affine: Path) -> None:
    checkpoint = Checkpoint.open(affine)
    case = make_case(checkpoint, (f"{LAYER}.ffn.experts",), torch.device("cpu"))
    assert isinstance(case, MoeCase)
    tensors = load_file(affine / "model.safetensors")
    by_name = {names.canonical(name, 4): tensor for name, tensor in tensors.items()}

    def stored(expert: int, projection: str) -> torch.Tensor:
        prefix = f"{LAYER}.ffn.experts.{expert}.{projection}"
        return dequantize(*(by_name[f"{prefix}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2")))

    for expert in (0, 17, 31):
        w13 = Stack(*(tensor[expert] for tensor in case.w13)).dense()
        assert torch.equal(w13, torch.cat([stored(expert, "w1"), stored(expert, "w3")]))
        w2 = dequantize(case.w2.weight[expert], case.w2.weight_scale[expert], case.w2.weight_scale_2[expert])
        assert torch.equal(w2, stored(expert, "w2"))
        for i, projection in enumerate(("w1", "w3")):
            input_scale = by_name[f"{LAYER}.ffn.experts.{expert}.{projection}.input_scale"]
            assert case.w13.input_scale[expert, i] == input_scale


def test_operators_are_those_of_the_model(affine: Path) -> None:
    groups, others = modules_of(Checkpoint.open(affine), 1)
    flat = [module for modules in groups for module in modules]
    assert len(flat) == len(set(flat)), "a module is tested twice"
    assert list(others) == ["model.layers.1.attn.wo_a"]


# ---- what cannot be tested ------------------------------------------------------------------------------------------


def copied(affine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(affine, tmp_path / "copy"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)


BAD = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json: not there"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
    "another model": (lambda folder: edit_config(folder, hidden_size="x"), "hidden_size"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no \*.safetensors file"),
    "truncated": (truncate, "truncated"),
    "other sizes": (lambda folder: edit_config(folder, moe_intermediate_size=128), "expected .* from config.json"),
    "a tensor missing": (
        lambda folder: edit_tensors(folder, lambda t: t.pop("model.layers.3.attn.wq_b.input_scale")),
        "attn.wq_b.input_scale is missing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint(affine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    damage, message = BAD[name]
    folder = copied(affine, tmp_path)
    damage(folder)
    assert layertest.main([str(folder), *FEW]) == layertest.UNREADABLE
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("nvfp4 layertest: ")
    assert re.search(message, found.err), found.err


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert layertest.main([str(tmp_path / "nothing")]) == layertest.UNREADABLE
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("layer", ["4", "0,-1"])
def test_a_layer_that_is_not_there(affine: Path, capsys: pytest.CaptureFixture[str], layer: str) -> None:
    assert layertest.main([str(affine), "--layers", layer]) == layertest.UNREADABLE
    assert "the checkpoint has layers 0 .. 3, found" in capsys.readouterr().err


def test_an_operator_that_is_refused_is_not_right(
    affine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, name = copied(affine, tmp_path), "model.layers.3.attn.wq_b.input_scale"
    edit_tensors(folder, lambda tensors: tensors[name].fill_(float("nan")))
    code, found = run(capsys, str(folder), *FEW)
    refused = [row for row in found["rows"] if "error" in row]
    assert (code, found["ok"], len(refused), len(found["rows"])) == (1, False, 1, len(OPERATORS))
    assert refused[0]["module"] == f"{LAYER}.attn.wq_b"
    assert "input_scale has 1 of 1 values that are not finite and positive" in refused[0]["error"]
    layertest.main([str(folder), *FEW])
    assert f"{len(OPERATORS) - 1} of {len(OPERATORS)} right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokens", "0"), "expected numbers of at least 1"),
        (("--tokens", "x"), "--tokens"),
        (("--backend", "sm90"), "no sm90 kernels for a machine without a CUDA GPU"),
        (("--backend", "cuda"), "invalid choice"),
        (("--activations", "fp8"), "invalid choice"),
        (("--layer",), "--layer"),
    ],
)
def test_usage_errors(affine: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        layertest.main([str(affine), *flags])
    assert exit_.value.code == layertest.USAGE_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "backend", "expected"),
    [((9, 0), None, "sm90"), ((10, 0), None, "sm100"), ((8, 9), "reference", "reference"), ((8, 9), None, "8.9"),
     ((10, 3), None, "10.3"), ((9, 0), "sm100", "no sm100 kernels for a GPU (compute capability 9.0)")],
)  # fmt: skip
def test_backend_by_device(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], backend: str | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    if expected in ("sm90", "sm100", "reference"):
        assert layertest._device(backend) == (torch.device("cuda", 0), expected)
        return
    with pytest.raises(RuntimeError) as error:
        layertest._device(backend)
    assert expected in str(error.value)
    assert "--backend reference" in str(error.value)


def test_blackwell_has_no_bf16_activations(
    affine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layertest, "_device", lambda _: (torch.device("cpu"), "sm100"))
    with pytest.raises(SystemExit) as exit_:
        layertest.main([str(affine), "--activations", "bf16"])
    assert exit_.value.code == layertest.USAGE_ERROR
    assert "sm100 has nvfp4 only" in capsys.readouterr().err


def test_it_is_a_subcommand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["nvfp4", "layertest", "/nowhere"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == layertest.UNREADABLE
    assert "/nowhere: no such folder" in capsys.readouterr().err
