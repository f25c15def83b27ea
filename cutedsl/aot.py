"""Kernels compiled ahead of time, on a machine without a GPU, and loaded where there is no compiler.

    python -m cutedsl.aot build --model deepseek-v4-pro --arch sm_100a,sm_90a --tp 1,2,4,8 --out DIR
    python -m cutedsl.aot verify DIR        # exit code 0: whole, and of these sources, this compiler and this machine
    python -m cutedsl.aot list DIR

A set is a directory: a shared object for each kernel and manifest.json, which says what each was built from. A process
makes a set known with `cutedsl.compile.use(DIR)`; a function is loaded when first asked for. One set may hold kernels for
several architectures: what is loaded is what the GPU's backend asks for.

The objects are linked when the set is built, as an image that serves has no linker either. They need two libraries, by name
and without a path, so that a set can be moved: libcute_dsl_runtime.so of nvidia-cutlass-dsl, which calls the CUDA driver,
and libtvm_ffi.so of apache-tvm-ffi. Both are loaded before the first object.

The hard part is to refuse a set that does not fit, rather than to run it: other sources would give other results, and the
host code is compiled for the very CPU that builds, which the compiler offers no way to lower. So the manifest names the
CPU features that the host code's instructions need, as found in the objects (`cutedsl.cpu_features`), and a machine without
one of them refuses the set. Where they cannot be found, all features of the building CPU are named, and the build says so.

Exit codes: 0 done, 1 the set is refused or a kernel did not compile, 64 the command itself is wrong.
"""

import argparse
import ctypes
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cutedsl import compile as compiler
from cutedsl import cpu_features

if TYPE_CHECKING:
    from cutedsl.deployment import Variant

MANIFEST = "manifest.json"
FORMAT = "nvfp4-kernels-1"
USAGE_ERROR = 64
_DUMPED = "dumped"
_RUNTIME = "libcute_dsl_runtime.so"


class StaleSetError(RuntimeError):
    """A set of kernels must not be used here."""


class BuildError(RuntimeError):
    """A set could not be built."""


@dataclass(frozen=True)
class Entry:
    """One kernel of a set.

    Attributes:
        kernel: module and class.
        config: as cutedsl.compile.config_text gives it.
        arch: such as sm_100a.
        options: of the compiler.
        key: digest of cutedsl.compile.Key.
        symbol: of the function in the file.
        file: its name in the directory.
        sha256: of the file.
        sources: path and digest of every source that the kernel was compiled from.
        seconds: that compiling and linking took.
    """

    kernel: str
    config: str
    arch: str
    options: str
    key: str
    symbol: str
    file: str
    sha256: str
    sources: dict[str, str]
    seconds: float


# ---- use ------------------------------------------------------------------------------------------------------------


class KernelSet:
    """A directory of kernels, checked completely when made.

    Args:
        directory: that `build` wrote.

    Raises:
        StaleSetError: the message names every reason.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).resolve()
        self.manifest = read_manifest(self.directory)
        known = {field.name for field in fields(Entry)}
        try:
            self.entries = [Entry(**entry) for entry in self.manifest["kernels"]]
        except (KeyError, TypeError) as error:
            raise StaleSetError(
                f"{self.directory / MANIFEST} is damaged: {error}; expected kernels with {sorted(known)}; build it again"
            ) from error
        reasons = [*self._machine_problems(), *self._source_problems(), *self._file_problems()]
        if reasons:
            listed = "".join(f"\n  - {reason}" for reason in reasons)
            raise StaleSetError(
                f"the kernels in {self.directory} are refused:{listed}\nBuild them again, on a machine like this one: "
                f"python -m cutedsl.aot build --model {self.manifest.get('model', 'CONFIG')} --out {self.directory} ..."
            )
        self._by_name = {(entry.kernel, entry.config, entry.options): entry for entry in self.entries}

    def function(self, kernel: str, config: str, options: str) -> Callable[..., Any] | None:
        """Loads a function.

        Args:
            kernel: module and class.
            config: as cutedsl.compile.config_text gives it.
            options: of the compiler.

        Returns:
            A TVM-FFI function; None if the set has no such kernel.

        Raises:
            StaleSetError: the file cannot be loaded, or has another content than when the set came into use.
        """
        entry = self._by_name.get((kernel, config, options))
        if entry is None:
            return None
        path = self.directory / entry.file
        if not path.is_file() or compiler.file_digest(path) != entry.sha256:
            raise StaleSetError(f"{path} has changed since the set came into use; build it again")
        tvm_ffi = _load_libraries()
        try:
            return tvm_ffi.load_module(str(path)).get_function(entry.symbol)
        except (RuntimeError, AttributeError, ValueError) as error:
            raise StaleSetError(f"{path} cannot be loaded: {error}; build it again") from error

    def _machine_problems(self) -> list[str]:
        found = []
        built, here = self.manifest.get("dsl_version"), compiler.dsl_version()
        if built != here:
            found.append(f"built by {compiler.DSL_PACKAGE} {built}, here is {here}")
        if self.manifest.get("machine") != platform.machine():
            found.append(f"built on {self.manifest.get('machine')}, this is {platform.machine()}")
        else:
            lacking = sorted(set(self.manifest.get("cpu_features", ())) - set(cpu_features.of_this_cpu()))
            if lacking:
                source = self.manifest.get("cpu_features_from")
                found.append(f"built for a CPU with {', '.join(lacking)}, which this one lacks (as told by {source})")
        return found

    def _source_problems(self) -> list[str]:
        built = {path: digest for entry in self.entries for path, digest in entry.sources.items()}
        found = []
        for path, digest in sorted(built.items()):
            file = compiler.source_file(path)
            if not file.is_file():
                found.append(f"{path}, which kernels were built from, is not there")
            elif compiler.file_digest(file) != digest:
                found.append(f"{path} is not what kernels were built from")
        return found

    def _file_problems(self) -> list[str]:
        found = []
        for entry in self.entries:
            path = self.directory / entry.file
            if not path.is_file():
                found.append(f"{entry.file} is missing")
            elif compiler.file_digest(path) != entry.sha256:
                found.append(f"{entry.file} is damaged: its SHA-256 is not {entry.sha256[:16]}...")
        return found


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a set.

    Raises:
        StaleSetError: there is none, or it is of another format.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StaleSetError(
            f"{directory} is no set of kernels: {error}; make one with `python -m cutedsl.aot build --out {directory}`"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise StaleSetError(f"{directory / MANIFEST} has format {found!r}, expected {FORMAT!r}; build it again")
    return manifest


_libraries: list[ctypes.CDLL] = []


def _load_libraries() -> Any:
    """Loads what objects need, once, and returns the package tvm_ffi, whose import loads its own library."""
    tvm_ffi = importlib.import_module("tvm_ffi")
    if not _libraries:
        for path in runtime_libraries():
            # What stands beside the runtime in CUTE_DSL_LIBS is there to be found before it: a simulator's, for example.
            mode = ctypes.RTLD_LOCAL if Path(path).name == _RUNTIME else ctypes.RTLD_GLOBAL
            _libraries.append(ctypes.CDLL(path, mode))
    return tvm_ffi


def runtime_libraries() -> list[str]:
    """Paths of the libraries in CUTE_DSL_LIBS, in order, and of the installed compiler's runtime if it is not among them.

    Raises:
        RuntimeError: there is no runtime library.
    """
    named = [entry for entry in os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep) if entry]
    if any(Path(entry).name == _RUNTIME for entry in named):
        return named
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    # One folder for each major version of CUDA; the newest is last.
    found = sorted(path for root in roots for place in ("lib", "cu*/lib") for path in root.glob(f"{place}/{_RUNTIME}"))
    if not found:
        raise RuntimeError(f"{_RUNTIME} is in none of {roots or 'no folder'}: install {compiler.DSL_PACKAGE}")
    return [*named, str(found[-1])]


# ---- build ----------------------------------------------------------------------------------------------------------


def build(
    variants: "Sequence[Variant]",
    directory: str | Path,
    jobs: int,
    ptx: bool = False,
    about: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Entry]:
    """Compiles kernels in processes of their own, links each, and puts a set in the place of the directory.

    Args:
        variants: what to compile.
        directory: absent, empty, or a set, which is replaced when all is done.
        jobs: processes at a time.
        ptx: keep beside each kernel its object file and PTX text, for `ptxsim.host.capture.load_aot`.
        about: more fields of the manifest: model, tp.
        progress: called with a kernel's name when it is done.

    Returns:
        The kernels, in the order of variants.

    Raises:
        BuildError: the directory holds something else, there is no linker, or a kernel does not compile.
    """
    directory = Path(directory).resolve()
    _check_place(directory)
    if jobs < 1:
        raise BuildError(f"jobs is {jobs}, expected at least 1")
    linker = _linker()
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        entries = _build_all(variants, scratch, jobs, ptx, linker, progress)
        shutil.rmtree(scratch / _DUMPED, ignore_errors=True)
        _check_unchanged(entries)
        manifest = {
            "format": FORMAT,
            **(about or {}),
            "dsl_version": compiler.dsl_version(),
            "machine": platform.machine(),
            **_needed_cpu_features([scratch / entry.file for entry in entries]),
            "kernels": [asdict(entry) for entry in entries],
        }
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        _replace(directory, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return entries


def _needed_cpu_features(libraries: list[Path]) -> dict[str, Any]:
    """The manifest's fields of what libraries need of a CPU, and of how that is known."""
    try:
        return {"cpu_features": cpu_features.of_libraries(libraries), "cpu_features_from": "the machine code"}
    except cpu_features.UndecidedError as error:
        found = cpu_features.of_this_cpu()
        return {"cpu_features": found, "cpu_features_from": f"the building CPU, all that it has, because {error}"}


def _check_unchanged(entries: list[Entry]) -> None:
    """Refuses sources that were edited while they were compiled."""
    seen: dict[str, str] = {}
    for entry in entries:
        for path, digest in entry.sources.items():
            if seen.setdefault(path, digest) != digest or compiler.file_digest(compiler.source_file(path)) != digest:
                raise BuildError(f"{path} changed while kernels were built from it; build again")


def _check_place(directory: Path) -> None:
    """Refuses a directory that holds something else than a set."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        read_manifest(directory)
    except StaleSetError as error:
        raise BuildError(
            f"{directory} holds something else than a set of kernels and is left alone; name an empty or new directory"
        ) from error


def _replace(directory: Path, scratch: Path) -> None:
    """Renames scratch to directory; a set that was there goes when the new one stands."""
    if directory.exists():
        old = scratch.with_name(f"{scratch.name}-old")
        directory.rename(old)
        try:
            scratch.rename(directory)
        except OSError:
            old.rename(directory)
            raise
        shutil.rmtree(old)
    else:
        scratch.rename(directory)


def _linker() -> str:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BuildError("no C compiler to link with (looked for $CC, cc, gcc, clang); the machine that builds needs one")


def _build_all(
    variants: "Sequence[Variant]", scratch: Path, jobs: int, ptx: bool, linker: str, progress: Callable[[str], None]
) -> list[Entry]:
    # A fresh process has none of this one's settings of the compiler, which reads them when imported.
    context = multiprocessing.get_context("spawn")
    entries: list[Entry | None] = [None] * len(variants)
    workers = min(jobs, len(variants)) or 1
    dumped = scratch / _DUMPED if ptx else None
    with ProcessPoolExecutor(workers, context, _start_worker, (dumped,)) as pool:
        waiting = {pool.submit(_build_one, variant, scratch, ptx, linker): i for i, variant in enumerate(variants)}
        try:
            for done in as_completed(waiting):
                variant = variants[waiting[done]]
                try:
                    entries[waiting[done]] = done.result()
                except Exception as error:
                    name = compiler.kernel_name(variant.kernel)
                    raise BuildError(f"{name} with {variant.config} was not built: {error}") from error
                progress(f"{variant.kernel.__name__} {variant.config}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [entry for entry in entries if entry is not None]


def _start_worker(dumped: Path | None) -> None:
    """Settings of the compiler in a process that builds, before it is imported."""
    for name in ("CUTE_DSL_LINEINFO", "CUTE_DSL_KEEP", compiler.NO_JIT):
        os.environ.pop(name, None)
    if dumped is not None:
        # The compiler writes text to a file of the function's name and reads it again: two processes must not share one.
        place = dumped / str(os.getpid())
        place.mkdir(parents=True)
        os.environ["CUTE_DSL_KEEP"] = "ptx"
        os.environ["CUTE_DSL_DUMP_DIR"] = str(place)


def _build_one(variant: "Variant", scratch: Path, ptx: bool, linker: str) -> Entry:
    """Compiles and links one kernel; runs in a process of the pool."""
    start = time.perf_counter()
    kernel, config = variant.kernel, variant.config
    key = compiler.key_of(kernel, config, config.arch, line_info=False)
    # Legal as a C identifier, as it names a function.
    symbol = f"{kernel.__module__.rpartition('.')[2]}_{key.digest[:16]}"
    object_file, library = scratch / f"{symbol}.o", scratch / f"{symbol}.so"
    function: Any = variant.compiled(config, line_info=False)
    function.export_to_c(object_file_path=str(object_file), function_name=symbol)
    _link(linker, object_file, library)
    if ptx:
        object_file.with_suffix(".ptx").write_text(function.artifacts.PTX)
    else:
        object_file.unlink()
    return Entry(
        kernel=key.kernel,
        config=compiler.config_text(config),
        arch=key.arch,
        options=key.options,
        key=key.digest,
        symbol=symbol,
        file=library.name,
        sha256=compiler.file_digest(library),
        sources=compiler.source_digests(kernel),
        seconds=round(time.perf_counter() - start, 3),
    )


def _link(linker: str, object_file: Path, library: Path) -> None:
    tvm_ffi = importlib.import_module("tvm_ffi")
    needed = [runtime_libraries()[-1], str(tvm_ffi.libinfo.find_libtvm_ffi())]
    # -z defs: a symbol that neither library has is an error here, and not in a server.
    command = [linker, "-shared", "-Wl,-z,defs", "-Wl,-s", str(object_file), *needed, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


# ---- command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Runs `python -m cutedsl.aot`; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (StaleSetError, BuildError) as error:
        print(f"cutedsl.aot: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"cutedsl.aot: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        # A reader who has seen enough, such as `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m cutedsl.aot", description="Kernels compiled ahead of time.")
    commands = parser.add_subparsers(required=True, metavar="build|verify|list", parser_class=_Parser)
    command = commands.add_parser("build", help="compile every kernel that a deployment can call; needs no GPU")
    command.add_argument("--model", required=True, help="deepseek-v4-pro, deepseek-v4-flash, or a config.json")
    command.add_argument(
        "--arch", default="sm_100a", help="sm_100a, sm_90a, or both with a comma between; default sm_100a"
    )
    command.add_argument("--tp", default="1,2,4,8", help="tensor parallel sizes, with commas between; default 1,2,4,8")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="new, empty, or a set to replace")
    command.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="processes, default one a core")
    command.add_argument("--ptx", action="store_true", help="keep object files and PTX text too, for the simulator")
    command.set_defaults(run=_run_build)
    command = commands.add_parser("verify", help="check that a set is whole and fits this installation and machine")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.set_defaults(run=_run_verify)
    command = commands.add_parser("list", help="show what a set holds; checks nothing")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.set_defaults(run=_run_list)
    return parser


def _run_build(arguments: argparse.Namespace) -> int:
    from cutedsl import deployment

    if arguments.jobs < 1:
        raise ValueError(f"--jobs is {arguments.jobs}, expected at least 1")
    sizes = [_number(text) for text in arguments.tp.split(",")]
    model = deployment.find_model(arguments.model)
    archs = arguments.arch.split(",")
    asked = [deployment.deployment(model, sizes, arch) for arch in archs]
    variants = [variant for each in asked for variant in deployment.variants(each)]
    start = time.perf_counter()
    about = {"model": model.name, "tp": sizes, "archs": archs}
    with _Bar(len(variants)) as advance:
        entries = build(variants, arguments.out, arguments.jobs, arguments.ptx, about, advance)
    size = sum((arguments.out / entry.file).stat().st_size for entry in entries)
    print(f"{len(entries)} kernels, {size / 2**20:.1f} MiB, in {time.perf_counter() - start:.0f} s: {arguments.out}")
    manifest = read_manifest(arguments.out)
    needed = ", ".join(manifest["cpu_features"]) or "nothing beyond x86-64"
    print(f"host code needs of a CPU, as told by {manifest['cpu_features_from']}: {needed}")
    return 0


def _number(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"--tp: {text!r} is no number; expected sizes with commas between, such as 1,2,4,8")
    return int(text)


class _Bar:
    """A bar on stderr; its value is called with a kernel's name when the kernel is done."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Callable[[str], None]:
        self._bar.start()
        return lambda name: self._bar.update(self._task, advance=1, description=name)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _run_verify(arguments: argparse.Namespace) -> int:
    found = KernelSet(arguments.directory)
    print(f"{arguments.directory}: {len(found.entries)} kernels, all as built, and of these sources and this machine")
    return 0


def _run_list(arguments: argparse.Namespace) -> int:
    manifest = read_manifest(arguments.directory)
    about = {name: value for name, value in manifest.items() if name != "kernels"}
    print("  ".join(f"{name}={value}" for name, value in about.items()))
    for entry in manifest["kernels"]:
        path = arguments.directory / entry["file"]
        size = f"{path.stat().st_size:>8}" if path.exists() else " missing"
        print(f"{entry['key'][:16]}  {entry['arch']}  {size}  {entry['kernel'].rpartition('.')[2]} {entry['config']}")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
