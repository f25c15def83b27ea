"""Import kernel modules of packages that are installed in a folder of their own, without what those packages need of a GPU.

FlashInfer's `__init__` files load CUDA code and compile C++; its kernel modules need none of that. So here every package of
FlashInfer is an empty module with a `__path__`, plain modules are its own, and a few host-side modules are stand-ins. QuACK
imports on a CPU as it is, but for its autotuner, which wants Triton.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptxsim.host.capture import prepare_environment

FOLDER_VARIABLE = "NVFP4_CONFORMANCE"
# Host-side modules that need a driver, a compiler, tracing or Triton: stand-ins answer for them.
STAND_INS = ("flashinfer.utils", "flashinfer.jit", "flashinfer.trace", "flashinfer.api_logging", "quack.autotuner")


def folder() -> Path:
    """Where the packages are: $NVFP4_CONFORMANCE, else .conformance in the repository."""
    set_by_user = os.environ.get(FOLDER_VARIABLE)
    return Path(set_by_user) if set_by_user else Path(__file__).parents[3] / ".conformance"


def available(package: str) -> bool:
    """Whether `package` is installed in the folder."""
    return (folder() / package).is_dir()


def use(package: str) -> None:
    """Make the kernel modules of `package` importable in this process, and CuTe DSL ready for capture.

    Raises:
        ModuleNotFoundError: the package is not in the folder.
    """
    if not available(package):
        raise ModuleNotFoundError(
            f"{package} is not in {folder()}; `make env` installs it, or set {FOLDER_VARIABLE} to a folder that has it"
        )
    prepare_environment()
    path = str(folder())
    if path not in sys.path:
        sys.path.append(path)  # last: nothing of the environment is replaced by what happens to lie there
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _StandIn(types.ModuleType):
    """A module whose every name is a function that refuses to be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{self.__name__}.{name} needs a GPU's host code, which the conformance tests leave out")

        return refuse


def _undecorated(*args: Any, **_: Any) -> Any:
    """Stands in for a decorator, with or without arguments."""
    return args[0] if args and callable(args[0]) else lambda function: function


def _compile_now(_module: str, _name: str, compile_kernel: Callable[[], Any], **_: Any) -> Any:
    """Stands in for FlashInfer's disk cache of compiled kernels: always compile."""
    return compile_kernel()


def _positive_power_of_2(round_up: bool) -> Callable[[int], int]:
    return lambda x: 1 if x <= 1 else 1 << ((x - 1).bit_length() if round_up else x.bit_length() - 1)


# The few names of the stand-ins that are needed to compile a kernel.
REPLACED: dict[str, dict[str, Any]] = {
    "flashinfer.api_logging": {"flashinfer_api": _undecorated},
    "flashinfer.jit.cute_dsl_core": {"build_and_load_cute_dsl_kernel": _compile_now},
    "quack.autotuner": {"autotune": _undecorated, "AutotuneConfig": dict},
    "flashinfer.utils": {
        "last_positive_power_of_2": _positive_power_of_2(round_up=False),
        "next_positive_power_of_2": _positive_power_of_2(round_up=True),
    },
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-ins, and `flashinfer` with every package below it, which come out empty."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Packages and stand-ins are ours, every other module is Python's business."""
        if any(name == prefix or name.startswith(prefix + ".") for prefix in STAND_INS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        location = folder().joinpath(*name.split("."))
        if name.split(".")[0] != "flashinfer" or not location.is_dir():
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(location)]
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """An empty package, or a stand-in with the names that compiling needs."""
        if spec.submodule_search_locations:
            return types.ModuleType(spec.name)
        module = _StandIn(spec.name)
        vars(module).update(REPLACED.get(spec.name, {}))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to execute."""
