"""The GPU suite: needs one NVIDIA GPU of compute capability 9.0 or 10.0 and this package. Without it every test fails.

Kernels are compiled by CuTe DSL when they are first called, or loaded from the set that NVFP4_AOT_DIR names (engines: and
other libraries' kernels from theirs, docs/warmup.md). What is marked `engine` needs vLLM 0.32.0 for CUDA too.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import gpu_kit
import pytest
import torch

AOT_DIR = os.environ.get("NVFP4_AOT_DIR")
# Sets built ahead of time make engines start sooner and change no answer.
SETS = ("NVFP4_AOT_DIR", "NVFP4_TILELANG_DIR", "NVFP4_DEEPGEMM_DIR")
for name in [n for n in os.environ if n.startswith("NVFP4_") and n not in SETS]:
    del os.environ[name]

ROOT = Path(__file__).resolve().parents[2]
# Kernels of another architecture are not for this GPU; without a known GPU nothing is left out, and everything fails.
OTHERS = {"sm90": ["test_*_sm100.py"], "sm100": ["test_*_sm90.py"]}
collect_ignore_glob = OTHERS[gpu_kit.backend()] if gpu_kit.capability() in gpu_kit.CAPABILITIES else []


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    found = gpu_kit.capability()
    assert found is not None, "tests/gpu needs an NVIDIA GPU; tests/cpu and tests/sim are the suites without one"
    assert found in gpu_kit.CAPABILITIES, f"compute capability {found}: expected one of {sorted(gpu_kit.CAPABILITIES)}"
    if AOT_DIR:
        from cutedsl import compile as compiler

        print(f"{compiler.use(AOT_DIR)} kernels from {AOT_DIR}")
    return torch.cuda.get_device_name()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Weights of one test do not stay for the next, and no launch has left sums for the next."""
    from cutedsl.ops import registry
    from cutedsl.runners import workspace

    yield
    try:
        gpu_kit.assert_no_sums_left()
    finally:
        registry.clear()
        workspace.workspace.cache_clear()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def affine() -> Path:
    return ROOT / "tests" / "data" / "affine-a"
