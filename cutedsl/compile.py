"""Compiled CuTe DSL kernels: one cache in a process, filled by files built ahead of time or by the compiler.

The hard part is the key: it holds everything the machine code depends on - the kernel's source and the sources of the
cutedsl modules it imports, its configuration, the architecture, the compiler's version and options - and nothing that
changes from call to call, so that sizes never start a compilation while serving. The same key names the files of
`python -m cutedsl.aot build`.

What a server does:

    compile.use(DIR)     # before the first kernel: compiled(...) then loads files of DIR, in milliseconds each
    ...                  # warm-up: every kernel that serving needs is called, or at least found, once
    compile.freeze()     # from here on a miss is an error and never a pause; NVFP4_NO_JIT=1 is the same from the start

NVFP4_STRICT=1 freezes too once a set is in use: a strict server runs what was built ahead, and nothing else.

The compiler is imported when something is compiled, not before: a process that only loads never imports it from here.
"""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutedsl.aot import KernelSet

NO_JIT = "NVFP4_NO_JIT"
STRICT = "NVFP4_STRICT"
DSL_PACKAGE = "nvidia-cutlass-dsl"
_ROOT = Path(__file__).resolve().parents[1]
# What this module adds to machine code is in Key.options.
_NO_SOURCE_OF_KERNELS = frozenset({"cutedsl.compile"})


class CompilationRefusedError(RuntimeError):
    """A kernel is not there and may not be compiled any more."""


@dataclass(frozen=True)
class Key:
    """What a compiled kernel depends on.

    Attributes:
        kernel: module and class.
        source: digest of the module's file and of the cutedsl modules it imports.
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

    @property
    def digest(self) -> str:
        """The key as 64 hexadecimal digits, the same in every process."""
        fields = (self.kernel, self.source, config_text(self.config), self.arch, self.dsl_version, self.options)
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


@dataclass(frozen=True)
class Counters:
    """What the cache has done in this process.

    Attributes:
        hits: calls of `compiled` that found their function.
        misses: calls that did not.
        loaded: misses that a set of files answered.
        compilations: misses that the compiler answered.
        load_seconds: in all.
        compile_seconds: in all.
    """

    hits: int = 0
    misses: int = 0
    loaded: int = 0
    compilations: int = 0
    load_seconds: float = 0.0
    compile_seconds: float = 0.0


# By what a caller passes, so that a hit needs no digest.
_Call = tuple[type, Hashable, str, bool]
_functions: dict[_Call, Callable[..., Any]] = {}
_sets: list["KernelSet"] = []
_counts = asdict(Counters())
_frozen = False
# The compiler keeps global state, so that one compilation runs at a time.
_lock = threading.RLock()


def compiled(
    kernel: type,
    config: Hashable,
    arguments: Callable[[], Sequence[Any]],
    arch: str,
    line_info: bool | None = None,
) -> Callable[..., Any]:
    """The function that launches kernel(config), loaded or compiled on the first call.

    Args:
        kernel: class whose instances, made from a config, can be compiled.
        config: frozen dataclass of numbers, strings, None and tuples of these.
        arguments: gives what `cute.compile` takes beside the kernel: stand-ins for tensors, with symbolic sizes.
        arch: to compile for; no GPU is needed.
        line_info: keep the kernel's source lines in the code, as a debugger or simulator wants; None: if the environment
            variable CUTE_DSL_LINEINFO is 1.

    Returns:
        A TVM-FFI function of tensors and numbers.

    Raises:
        CompilationRefusedError: the function is not there, and after `freeze` or with NVFP4_NO_JIT=1 nothing is compiled.
        cutedsl.aot.StaleSetError: a file of a set in use is not what its manifest says.
    """
    if line_info is None:
        line_info = os.environ.get("CUTE_DSL_LINEINFO") == "1"
    call = (kernel, config, arch, line_info)
    with _lock:
        function = _functions.get(call)
        if function is None:
            _count(misses=1)
            function = _functions[call] = _load(call) or _compile(call, arguments)
        else:
            _count(hits=1)
    return function


def use(directory: str | Path) -> int:
    """Makes `compiled` find the kernels that `python -m cutedsl.aot build` wrote to a directory.

    Args:
        directory: of a set. What several sets have is taken from the one used last.

    Returns:
        The number of kernels in it.

    Raises:
        cutedsl.aot.StaleSetError: the set was built from other sources, by another version of the compiler or for
            another machine, or a file of it is damaged; the message says what, and what to do.
    """
    from cutedsl import aot

    found = aot.KernelSet(directory)
    with _lock:
        _sets.insert(0, found)
    return len(found.entries)


def freeze(frozen: bool = True) -> None:
    """Makes every later miss an error. Call it after warm-up.

    Args:
        frozen: False takes it back; NVFP4_NO_JIT=1 stays in force.
    """
    global _frozen
    with _lock:
        _frozen = frozen


def frozen() -> bool:
    """Whether a miss is an error: after `freeze`, with NVFP4_NO_JIT=1, or with NVFP4_STRICT=1 and a set in use.

    Raises:
        ValueError: NVFP4_NO_JIT is neither 0 nor 1; a misspelled switch must not pass for off.
    """
    value = os.environ.get(NO_JIT, "0").strip()
    if value not in ("0", "1"):
        raise ValueError(f"{NO_JIT}={value!r}: expected 0 or 1 (1: never compile a kernel); set it to one, or unset it")
    return _frozen or value == "1" or (bool(_sets) and os.environ.get(STRICT, "0").strip() == "1")


def counters() -> Counters:
    """What the cache has done so far."""
    with _lock:
        return Counters(**_counts)


def cached_keys() -> list[Key]:
    """The keys of all kernels loaded or compiled so far."""
    with _lock:
        return [key_of(*call) for call in _functions]


# ---- keys -----------------------------------------------------------------------------------------------------------


def key_of(kernel: type, config: Hashable, arch: str, line_info: bool) -> Key:
    """The key of kernel(config); see `compiled` for the arguments."""
    options = compile_options(arch, line_info)
    return Key(kernel_name(kernel), source_digest(kernel), config, arch, dsl_version(), options)


def source_digest(kernel: type) -> str:
    """One digest of `source_digests`."""
    return combined_digest(source_digests(kernel))


@functools.cache
def source_digests(kernel: type) -> dict[str, str]:
    """`sources` of the kernel's module, as they were when first asked for: before it is compiled."""
    return sources(Path(inspect.getfile(kernel)))


def source_file(name: str) -> Path:
    """The file that `sources` names so."""
    return _ROOT / name


def kernel_name(kernel: type) -> str:
    """Module and class."""
    return f"{kernel.__module__}.{kernel.__qualname__}"


def compile_options(arch: str, line_info: bool) -> str:
    """What the compiler is told."""
    return f"--enable-tvm-ffi --gpu-arch {arch}" + (" --generate-line-info" if line_info else "")


def config_text(config: Hashable) -> str:
    """A configuration as JSON, the same in every process.

    Raises:
        TypeError: it is no dataclass of numbers, strings, None and tuples of these.
    """
    if not is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config is {config!r}, expected an instance of a frozen dataclass")
    try:
        return json.dumps(asdict(config), sort_keys=True)
    except TypeError as error:
        raise TypeError(f"config is {config!r}, expected numbers, strings, None and tuples only: {error}") from error


@functools.cache
def dsl_version() -> str:
    """Version of the installed compiler, which is not imported.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        return importlib.metadata.version(DSL_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            f"{DSL_PACKAGE} is not installed: compiled kernels need its runtime library; install versions.env's version"
        ) from error


def sources(path: Path) -> dict[str, str]:
    """Digests of a module's file and of all cutedsl modules that it imports at its top, and they at theirs.

    Args:
        path: of the module.

    Returns:
        Paths, relative to the folder of the package where they are in it, with the digests of their contents.

    An import inside a function is no part of a kernel, as kernels take their names from the top.
    """
    found: dict[str, str] = {}
    waiting = [path.resolve()]
    while waiting:
        file = waiting.pop()
        name = str(file.relative_to(_ROOT)) if file.is_relative_to(_ROOT) else str(file)
        if name not in found:
            found[name] = file_digest(file)
            waiting += [_ROOT / module for module in _imported(file)]
    return dict(sorted(found.items()))


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of `sources`."""
    # The place of the package, or of a kernel outside it, is no part of what it computes.
    named = sorted((Path(path).name if Path(path).is_absolute() else path, digest) for path, digest in digests.items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _imported(path: Path) -> tuple[str, ...]:
    """Files, relative to _ROOT, of the cutedsl modules that a file imports at its top."""
    names: list[str] = []
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # What is imported may be a module or a name in one: both are tried.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    modules = {name for name in names if name.startswith("cutedsl.")} - _NO_SOURCE_OF_KERNELS
    files = (f"{module.replace('.', '/')}.py" for module in sorted(modules))
    return tuple(file for file in files if (_ROOT / file).is_file())


# ---- misses ---------------------------------------------------------------------------------------------------------


def _load(call: _Call) -> Callable[..., Any] | None:
    """The function from a set in use, or None."""
    if not _sets:
        return None
    kernel, config, arch, line_info = call
    start = time.perf_counter()
    # A set's sources and compiler were compared when it came into use: what is left of the key is compared here.
    name, text, options = kernel_name(kernel), config_text(config), compile_options(arch, line_info)
    for kernels in _sets:
        function = kernels.function(name, text, options)
        if function is not None:
            _count(loaded=1, load_seconds=time.perf_counter() - start)
            return function
    return None


def _compile(call: _Call, arguments: Callable[[], Sequence[Any]]) -> Callable[..., Any]:
    if frozen():
        raise CompilationRefusedError(_refusal(call))
    from cutlass import cute

    key = key_of(*call)
    start = time.perf_counter()
    kernel, config = call[:2]
    function = cute.compile(kernel(config), *arguments(), options=key.options)
    _count(compilations=1, compile_seconds=time.perf_counter() - start)
    return function


def _refusal(call: _Call) -> str:
    kernel, config, arch, line_info = call
    why = "the cache is frozen" if _frozen else f"{NO_JIT}=1" if os.environ.get(NO_JIT) == "1" else f"{STRICT}=1"
    where = ", ".join(str(kernels.directory) for kernels in _sets) or "none"
    advice = (
        f"build it ahead (python -m cutedsl.aot build --model CONFIG --arch {arch} --tp SIZES --out DIR) and use DIR, or "
        f"call it during warm-up, or allow compilation (unset {NO_JIT}, no strict mode)"
    )
    if line_info:
        advice = f"unset CUTE_DSL_LINEINFO, as sets have no line information; or {advice}"
    return f"{why}, and {kernel_name(kernel)} with {config} for {arch} is not there (sets in use: {where}): {advice}"


def _count(**amounts: float) -> None:
    for name, amount in amounts.items():
        _counts[name] += amount
