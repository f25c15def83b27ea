"""Tests that execute compiled GPU kernels from their PTX on this CPU."""

import os

# Before NumPy and CuTe DSL are imported: one BLAS thread (tiles are small), the target architecture, DSL line numbers in PTX.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("CUTE_DSL_ARCH", "sm_100a")
os.environ.setdefault("CUTE_DSL_LINEINFO", "1")

from ptxsim.testing import matrix

__all__ = ["matrix"]
