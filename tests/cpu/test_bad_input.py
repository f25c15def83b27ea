"""A checkpoint or a flag that cannot work stops `nvfp4 serve`: exit code not 0, and a message that names the culprit.

The same errors are tested one by one, without a server, in test_checkpoint.py, test_inventory.py and test_nvidia_classes.py.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engine

LIMIT_S = 300


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def change(name: str, edit: Callable) -> Callable[[Path], None]:
    """A damage that edits one tensor, or removes it where `edit` gives None."""

    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        edited = edit(tensors.pop(name))
        if edited is not None:
            tensors[name] = edited
        save_file(tensors, model / "model.safetensors")

    return damage


def poison_byte(tensor):
    import torch

    tensor.view(torch.uint8)[0, 0] = 0x7F
    return tensor


@dataclass(frozen=True)
class Case:
    damage: Callable[[Path], None]
    message: str
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


def nothing(model: Path) -> None:
    pass


INPUT_SCALE = "model.layers.2.ffn.experts.7.w1.input_scale"
BLOCK_SCALE = "model.layers.1.attn.wq_b.weight_scale"
CASES = {
    "truncated": Case(truncate, "model.safetensors: "),
    "zero input_scale": Case(change(INPUT_SCALE, lambda t: t * 0), f"{INPUT_SCALE} is zero (0.0)"),
    "NaN block scale": Case(change(BLOCK_SCALE, poison_byte), f"{BLOCK_SCALE} is NaN"),
    "missing scale": Case(change(INPUT_SCALE, lambda t: None), f"{INPUT_SCALE} is missing"),
    "tensor parallel": Case(nothing, "--tensor-parallel-size 4 does not divide", ("--tensor-parallel-size", "4")),
    "misspelled switch": Case(nothing, "NVFP4_STRICT='yes': expected 0 or 1", env={"NVFP4_STRICT": "yes"}),
    "dummy weights": Case(nothing, "--load-format dummy: random bytes are not NVFP4", ("--load-format", "dummy")),
}


def attempt(model: Path, case: Case) -> tuple[int, str]:
    """Exit code and output of a server start."""
    import os

    command = [sys.executable, "-m", "vllm_nvfp4.cli", "serve", str(model), "--max-model-len", "512", *case.flags]
    done = subprocess.run(
        command, env={**os.environ, **case.env}, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_every_bad_start_ends_with_its_reason(affine: Path, tmp_path: Path) -> None:
    folders = {}
    for i, (name, case) in enumerate(CASES.items()):
        folders[name] = tmp_path / str(i)
        shutil.copytree(affine, folders[name])
        case.damage(folders[name])
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(CASES, pool.map(lambda name: attempt(folders[name], CASES[name]), CASES), strict=True))
    for name, (code, output) in results.items():
        assert code != 0, f"{name}: exit code 0"
        assert CASES[name].message in output, f"{name}: {CASES[name].message!r} is not in:\n{output[-4000:]}"
