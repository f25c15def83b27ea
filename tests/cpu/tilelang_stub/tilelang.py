"""TileLang as far as vLLM and the overlay rely on it: kernels with names of their own, kept in TileLang's layout.

Compiling one leaves the files of a cache; the name of a kernel hashes what TileLang's own does: the function, what it is
specialised for, the target and the pass options.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

VERSION = "0.1.12"
FILES = ("device_kernel.cu", "host_kernel.cu", "executable.so", "params.pkl")


class PassConfigKey:
    TL_DISABLE_WARP_SPECIALIZED, TL_DISABLE_TMA_LOWER, TL_PTXAS_REGISTER_USAGE_LEVEL = "warp", "tma", "registers"


class JITKernel:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in FILES:
            (folder / name).write_text(f"{name} of {folder.name}")

    @classmethod
    def from_database(cls, folder: Path) -> "JITKernel":
        assert all((folder / name).is_file() for name in FILES)
        return cls.__new__(cls)


class Implementation:
    def __init__(self, function: Any, options: dict[str, Any]) -> None:
        self.function, self.options = function, options

    def compile(self, *args: Any, **kwargs: Any) -> JITKernel:
        target = os.environ["TILELANG_DEFAULT_TARGET"]
        said = (self.function.__name__, [[a.dtype, len(a.shape)] if hasattr(a, "dtype") else a for a in args], kwargs)
        name = hashlib.sha256(repr((said, target, self.options)).encode()).hexdigest()
        folder = Path(os.environ["TILELANG_CACHE_DIR"], VERSION, "linux-x86_64", "kernels", name)
        with Path(os.environ["TILELANG_STUB_LOG"]).open("a") as log:
            log.write(json.dumps([self.function.__name__, target, self.options]) + "\n")
        # By the name in the module, as TileLang does.
        kernel = kernel_cache.JITKernel
        return kernel.from_database(folder) if folder.exists() else kernel(folder)


def jit(pass_configs: dict[str, Any]) -> Any:
    return lambda function: Implementation(function, pass_configs)


def module(name: str, **content: Any) -> Any:
    sys.modules[name] = made = ModuleType(name)
    vars(made).update(content)
    return made


nvcc = SimpleNamespace(get_nvcc_compiler=lambda: sys.executable)
language = module("tilelang.language")
contrib = module("tilelang.contrib", nvcc=nvcc)
kernel_cache = module("tilelang.cache.kernel_cache", JITKernel=JITKernel)
cache = module("tilelang.cache", kernel_cache=kernel_cache)
