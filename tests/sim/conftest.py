"""Tests that execute compiled GPU kernels from their PTX on this CPU."""

import os

# Before NumPy and CuTe DSL are imported: one BLAS thread (tiles are small), the target architecture, DSL line numbers in PTX.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("CUTE_DSL_ARCH", "sm_100a")
os.environ.setdefault("CUTE_DSL_LINEINFO", "1")

from ptxsim.testing import matrix

__all__ = ["matrix"]


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the nightly sizes too (marker `full`)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    kept = [item for item in items if item.get_closest_marker("full") is None]
    if len(kept) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full") is not None])
        items[:] = kept
