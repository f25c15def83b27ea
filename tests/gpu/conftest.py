"""The GPU suite: needs one NVIDIA GPU, vLLM 0.32.0 with CUDA, and this package installed. Without a GPU it fails."""

import os
from pathlib import Path

import pytest

for name in [n for n in os.environ if n.startswith("NVFP4_")]:
    del os.environ[name]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    import torch

    assert torch.cuda.is_available(), "tests/gpu needs an NVIDIA GPU; tests/cpu is the suite without one"
    return torch.cuda.get_device_name()


@pytest.fixture(scope="session")
def affine() -> Path:
    return ROOT / "tests" / "data" / "affine-a"
