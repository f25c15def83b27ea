"""Loading holds nothing twice: the peak of host memory stays within a tenth of the weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint
from safetensors.torch import load_file, save_file
from serving import run_script

pytestmark = pytest.mark.engine

# Of the weights of the rank; what a tensor takes between disk and parameter is in it.
LIMIT = 1.1
# Made with few experts, which are then repeated: quantizing half a gigabyte would take a minute.
SPEC = TinySpec(hidden=1024, intermediate=1024, experts=8, topk=6, q_lora=256)
REPEAT = 8
EXPERT = re.compile(r"(.*\.ffn\.experts\.)(\d+)(\..*)")


def repeat_experts(source: Path, target: Path) -> Path:
    """The checkpoint with every expert REPEAT times, one shard a repetition."""
    target.mkdir()
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    config = json.loads((source / "config.json").read_text())
    config["n_routed_experts"] *= REPEAT
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    weight_map = {}
    for i in range(REPEAT):
        part = {}
        for name, tensor in tensors.items():
            found = EXPERT.fullmatch(name)
            if found:
                part[f"{found[1]}{int(found[2]) + i * SPEC.experts}{found[3]}"] = tensor
            elif i == 0:
                # The router's rows, one an expert.
                routed = name.endswith((".gate.weight", ".gate.bias"))
                part[name] = tensor.repeat(REPEAT, *[1] * (tensor.ndim - 1)) if routed else tensor
        save_file(part, target / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


def test_peak_of_loading(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "small", SPEC)
    model = repeat_experts(tmp_path / "small", tmp_path / "model")
    found = run_script("memory_run.py", model, tmp_path / "memory.json")
    print({key: value for key, value in found.items() if key != "log"})
    assert found["weights_bytes"] > 450e6
    assert found["peak_bytes"] <= LIMIT * found["weights_bytes"]
    # And a load that was measured: the weights are really resident.
    assert found["after_bytes"] >= 0.9 * found["weights_bytes"]
