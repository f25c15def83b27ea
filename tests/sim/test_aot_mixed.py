"""A set of kernels for two architectures: each asks for its own, and finds no other."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from hopper_kit import machine

import ptxsim
from cutedsl import aot, deployment
from cutedsl import compile as compiler
from cutedsl.deployment import Variant
from cutedsl.kernels import finalize_sm90, finalize_sm100
from ptxsim.host.capture import load_aot, prepare_environment

prepare_environment()

ARCHS = {"sm_100a": finalize_sm100, "sm_90a": finalize_sm90}


def small(asked: deployment.Deployment) -> list[Variant]:
    """One kernel stands for an architecture's closed set."""
    (family,) = [family for family in deployment.FAMILIES if family.module == ARCHS[asked.arch].__name__.split(".")[-1]]
    (variant,) = [it for it in family.variants(asked) if not it.config.y_fp32 and it.config.shared]
    return [variant]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Through the command, as a user would."""
    directory = tmp_path_factory.mktemp("aot") / "set"
    command = ["build", "--model", "deepseek-v4-pro", "--arch", "sm_100a,sm_90a", "--tp", "8", "--out", str(directory)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment, "variants", small)
        assert aot.main([*command, "--ptx", "-j", "1"]) == 0
    return directory


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as at the start of a process."""
    monkeypatch.setattr(compiler, "_functions", {})
    monkeypatch.setattr(compiler, "_sets", [])
    monkeypatch.setattr(compiler, "_counts", dict.fromkeys(compiler._counts, 0))
    monkeypatch.setattr(compiler, "_frozen", True)
    monkeypatch.delenv(compiler.NO_JIT, raising=False)


def test_the_manifest_names_both(built: Path) -> None:
    manifest = json.loads((built / aot.MANIFEST).read_text())
    assert manifest["archs"] == ["sm_100a", "sm_90a"]
    found = [(entry["arch"], entry["kernel"].rpartition(".")[2]) for entry in manifest["kernels"]]
    assert found == [("sm_100a", "FinalizeSm100"), ("sm_90a", "FinalizeSm90")]
    targets = [re.search(r"^\.target (\w+)", path.read_text(), re.M)[1] for path in sorted(built.glob("*.ptx"))]
    assert sorted(targets) == ["sm_100a", "sm_90a"]
    assert aot.main(["verify", str(built)]) == 0


def test_each_architecture_finds_its_own(built: Path) -> None:
    assert compiler.use(built) == 2
    functions = [
        module.compiled(module.Config(6, shared=True), line_info=False) for module in (finalize_sm100, finalize_sm90)
    ]
    assert functions[0] is not functions[1]
    assert compiler.counters().loaded == 2
    # What is there for one is not there for the other.
    kernels = aot.KernelSet(built)
    hopper = kernels.entries[1]
    assert kernels.function(hopper.kernel, hopper.config, compiler.compile_options("sm_90a", False)) is not None
    assert kernels.function(hopper.kernel, hopper.config, compiler.compile_options("sm_100a", False)) is None
    with pytest.raises(compiler.CompilationRefusedError, match="for sm_90a is not there"):
        finalize_sm90.compiled(finalize_sm90.Config(5, shared=True), line_info=False)


def test_hoppers_kernel_runs(built: Path) -> None:
    entry = aot.KernelSet(built).entries[1]
    y = torch.arange(8 * 16, dtype=torch.float32).reshape(8, 16).bfloat16()
    weights, shared = torch.tensor([[2.0, -1.0, 0.5, 1.0, 3.0, 4.0]]), torch.ones(1, 16, dtype=torch.bfloat16)
    rows, out = torch.tensor([2, 0, 7, -1, -1, 1], dtype=torch.int32), torch.empty(1, 16, dtype=torch.bfloat16)
    with machine("sm_90a"):
        function = load_aot((built / entry.file).with_suffix(".o"), entry.symbol)
        ptxsim.run(function, y, rows, weights, shared, out, outputs=(out,))
    y = y.float()
    assert torch.equal(out, (2 * y[2] - y[0] + y[7] / 2 + 4 * y[1] + 1)[None].bfloat16())


def test_a_server_needs_no_compiler_for_either(built: Path) -> None:
    """Objects of both name the same two libraries, so that one image serves both GPUs."""
    for path in built.glob("*.so"):
        listed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"NEEDED.*\[(lib(?:cute|tvm)\S+)\]", listed)
        assert needed == ["libcute_dsl_runtime.so", "libtvm_ffi.so"]
