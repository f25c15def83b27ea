"""Shared fixtures of the CPU suite. What a test needs and does not find makes it fail: nothing is skipped."""

import os
from pathlib import Path

import pytest

# Triton reads these when it is first imported, in this process and in those the tests start.
os.environ.update({"TRITON_INTERPRET": "1", "TRITON_DEFAULT_BACKEND": "cpu"})
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A user's own switches must not decide a test.
for name in [n for n in os.environ if n.startswith("NVFP4_") and n != "NVFP4_MODELOPT_PYTHON"]:
    del os.environ[name]

ROOT = Path(__file__).resolve().parents[2]
AFFINE = ROOT / "tests" / "data" / "affine-a"


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def affine() -> Path:
    assert (AFFINE / "model.safetensors").is_file(), f"{AFFINE} is part of the repository; restore it from git"
    return AFFINE
