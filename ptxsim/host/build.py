"""Compiles shim.c on first use and keeps the library in the user's cache.

The hard part is several processes at once: each compiles to a file of its own and renames it, so that a reader sees a
whole library or none.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("shim.c")
SHIM_PREFIX = "libptxsim-"
_RUNTIME_NAME = "libcute_dsl_runtime.so"
_FLAGS = ("-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-std=c11")


class BuildError(RuntimeError):
    """The shim could not be compiled."""


def find_compiler() -> str:
    """Path of the system's C compiler.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BuildError(
        "no C compiler found (looked for $CC, cc, gcc, clang); launches are captured by a small C library that is "
        "compiled on first use: install one, for example `apt-get install gcc libc6-dev`"
    )


def runtime_library() -> Path:
    """Path of CuTe DSL's runtime library: the one in CUTE_DSL_LIBS, else the installed package's.

    Raises:
        BuildError: nvidia-cutlass-dsl is not installed or has no runtime library.
    """
    for entry in os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep):
        if entry.endswith(_RUNTIME_NAME) and Path(entry).exists():
            return Path(entry)
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    # One directory per CUDA major version; the newest is last.
    found = [
        path for root in roots for pattern in ("lib", "cu*/lib") for path in root.glob(f"{pattern}/{_RUNTIME_NAME}")
    ]
    if not found:
        raise BuildError(f"{_RUNTIME_NAME} not found in {roots or 'any package'}: install nvidia-cutlass-dsl")
    return sorted(found)[-1]


def wrapper_names(library: Path) -> list[str]:
    """Names of the CUDA wrappers that a runtime library exports, read from its string table."""
    names = re.findall(rb"\0(_cu(?:da)?[A-Z][A-Za-z0-9]{2,60})(?=\0)", library.read_bytes())
    return sorted({name.decode() for name in names})


def cache_dir() -> Path:
    """Where the compiled shim is kept: $XDG_CACHE_HOME/ptxsim or ~/.cache/ptxsim."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptxsim"


def shim_library() -> Path:
    """Path of the compiled shim; compiles it if this version of it is not in the cache.

    Raises:
        BuildError: no compiler, no runtime library, or the compiler failed.
    """
    runtime = runtime_library()
    stat = runtime.stat()
    # Reading the runtime's names takes a moment (it is large), so its identity and not its content is in the key.
    key = f"{_SOURCE.read_text()}|{_FLAGS}|{runtime}|{stat.st_size}|{stat.st_mtime_ns}"
    target = cache_dir() / f"{SHIM_PREFIX}{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(wrapper_names(runtime), target)
    return target


def _compile(wrappers: list[str], target: Path) -> None:
    implemented = set(re.findall(r"^int (\w+)\(", _SOURCE.read_text(), re.MULTILINE))
    stubs = " ".join(f"X({name})" for name in wrappers if name not in implemented)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        header, output = Path(scratch) / "stubs.h", Path(scratch) / target.name
        header.write_text(f"#define PTXSIM_STUBS(X) {stubs}\n")
        command = [find_compiler(), *_FLAGS, "-include", str(header), str(_SOURCE), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        os.replace(output, target)
