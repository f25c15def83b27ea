"""ptxsim: executes the PTX of compiled CuTe DSL kernels on a CPU and reports what is wrong with them; see README.md."""

from typing import TYPE_CHECKING, Any

from ptxsim.findings import Finding, FindingsError, Report, Unsupported
from ptxsim.launch import Launch

if TYPE_CHECKING:
    from ptxsim.api import load, run, simulate, traced
    from ptxsim.memory import Buffer

__all__ = ["Buffer", "Finding", "FindingsError", "Launch", "Report", "Unsupported", "load", "run", "simulate", "traced"]

_LAZY = {
    "Buffer": "ptxsim.memory",
    "load": "ptxsim.api",
    "run": "ptxsim.api",
    "simulate": "ptxsim.api",
    "traced": "ptxsim.api",
}


def __getattr__(name: str) -> Any:
    # Modules of the package import each other through it; what needs all of them is loaded on first use.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ptxsim' has no attribute {name!r}")
