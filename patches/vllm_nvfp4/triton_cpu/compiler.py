"""The compiler class that Triton's backend discovery looks for; it declares support and compiles nothing."""

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class CPUBackend(BaseBackend):
    """Claims the `cpu` target; every stage of compilation is refused."""

    binary_ext = "none"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        """True for our own target."""
        return target.backend == "cpu"

    def hash(self) -> str:
        """A constant: nothing compiled depends on it."""
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> object:
        """Refuse: reached only when TRITON_INTERPRET is not 1."""
        raise RuntimeError("Triton's cpu backend only interprets: set TRITON_INTERPRET=1 before Python starts")

    def add_stages(self, stages: dict[str, Any], options: object) -> None:
        """Refuse, as parse_options."""
        raise RuntimeError("Triton's cpu backend only interprets: set TRITON_INTERPRET=1 before Python starts")

    def load_dialects(self, context: Any) -> None:
        """Nothing to load."""

    def get_module_map(self) -> dict[str, ModuleType]:
        """No device modules."""
        return {}
