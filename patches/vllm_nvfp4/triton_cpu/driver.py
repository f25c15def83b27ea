"""The driver class that Triton's backend discovery looks for."""

import os
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class CPUDriver(DriverBase):
    """Active only when asked for by name, so that a GPU host never sees two active drivers."""

    @classmethod
    def is_active(cls) -> bool:
        """True under TRITON_DEFAULT_BACKEND=cpu."""
        return os.environ.get("TRITON_DEFAULT_BACKEND") == "cpu"

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Refuse: only a compiler needs C++ types."""
        raise NotImplementedError(f"the cpu backend interprets kernels and has no C++ type for {ty!r}")

    def get_current_target(self) -> GPUTarget:
        """A target that only our compiler class claims."""
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """torch.cpu, which has the stream and synchronize calls that Triton's helpers use."""
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., Any]:
        """Refuse: timing interpreted kernels says nothing."""
        raise NotImplementedError("the cpu backend interprets kernels; benchmarking them is meaningless")
