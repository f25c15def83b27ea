"""Compiled CuTe DSL kernels, each compiled once per process.

The hard part is the key: it holds everything the machine code depends on - the kernel's source, its configuration, the
architecture, the compiler's version and options - and nothing that changes from call to call, so that sizes never
start a compilation while serving. The same key will name files once kernels are compiled ahead of time.
"""

import functools
import hashlib
import inspect
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cutlass
from cutlass import cute


@dataclass(frozen=True)
class Key:
    """What a compiled kernel depends on.

    Attributes:
        kernel: module and class.
        source: digest of the module's file.
        config: the kernel's configuration.
        arch: such as sm_100a.
        dsl_version: of nvidia-cutlass-dsl.
        options: of the compiler.
    """

    kernel: str
    source: str
    config: Hashable
    arch: str
    dsl_version: str
    options: str


_compiled: dict[Key, Callable[..., Any]] = {}
_lock = threading.Lock()


def compiled(
    kernel: type,
    config: Hashable,
    arguments: Callable[[], Sequence[Any]],
    arch: str,
    line_info: bool | None = None,
) -> Callable[..., Any]:
    """The function that launches kernel(config), compiled on the first call.

    Args:
        kernel: class whose instances, made from a config, can be compiled.
        config: frozen and hashable.
        arguments: gives what `cute.compile` takes beside the kernel: stand-ins for tensors, with symbolic sizes.
        arch: to compile for; no GPU is needed.
        line_info: keep the kernel's source lines in the code, as a debugger or simulator wants; None: if the environment
            variable CUTE_DSL_LINEINFO is 1.

    Returns:
        A TVM-FFI function of tensors and numbers.
    """
    if line_info is None:
        line_info = os.environ.get("CUTE_DSL_LINEINFO") == "1"
    options = f"--enable-tvm-ffi --gpu-arch {arch}" + (" --generate-line-info" if line_info else "")
    name = f"{kernel.__module__}.{kernel.__qualname__}"
    key = Key(name, _source_digest(kernel), config, arch, cutlass.__version__, options)
    # The compiler keeps global state, so that one compilation runs at a time.
    with _lock:
        if key not in _compiled:
            _compiled[key] = cute.compile(kernel(config), *arguments(), options=options)
        return _compiled[key]


def cached_keys() -> list[Key]:
    """The keys of all kernels compiled so far."""
    with _lock:
        return list(_compiled)


@functools.cache
def _source_digest(kernel: type) -> str:
    return hashlib.sha256(Path(inspect.getfile(kernel)).read_bytes()).hexdigest()
