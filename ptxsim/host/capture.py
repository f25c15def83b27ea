"""Takes the launches of a compiled CuTe DSL function without a GPU, through three routes: JIT, TVM-FFI, AOT object.

The hard part is that a launch is only a list of pointers. The sizes behind them are in the PTX text, so the text must be
that of the very compile: it is taken from the compiled object, and the dump files, which two compiles of one function
share, are never read later. Pointers are host pointers of CPU tensors.

Use: call `prepare_environment()` (best before `import cutlass`), compile, then `capture(compiled, *arguments)`.
`cutlass.utils.HardwareInfo` asks a driver, so pass max_active_clusters to a persistent kernel by hand; 1 to 4 makes every
CTA do many tiles.
"""

import atexit
import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptxsim.host.build import SHIM_PREFIX, find_compiler, runtime_library, shim_library
from ptxsim.host.cubin import parameter_sizes, read_image
from ptxsim.launch import Launch, PtxHeaderError, entry_header

__all__ = [
    "AotFunction",
    "CaptureError",
    "DeviceTensor",
    "as_device_tensor",
    "capture",
    "export_aot",
    "load_aot",
    "prepare_environment",
    "ptx_text",
]


class CaptureError(RuntimeError):
    """Launches could not be taken from a compiled function."""


# ---- environment ----------------------------------------------------------------------------------------------------


def prepare_environment(arch: str = "sm_100a") -> None:
    """Make CuTe DSL compile for `arch` without a GPU, keep the PTX text, and resolve launches to the shim.

    Call it before compiling; before or after `import cutlass`. A function compiled earlier cannot be captured. Variables
    that are set already are kept: CUTE_DSL_ARCH, CUTE_DSL_DUMP_DIR, CUTE_DSL_LINEINFO.

    Args:
        arch: the architecture if CUTE_DSL_ARCH is not set.

    Raises:
        ptxsim.host.build.BuildError: the shim could not be built.
    """
    shim, runtime = str(shim_library()), str(runtime_library())
    # Another shim may have been inherited from a process of another version.
    inherited = os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep)
    libraries = [entry for entry in inherited if entry and not Path(entry).name.startswith(SHIM_PREFIX)]
    if runtime not in libraries:
        libraries.insert(0, runtime)
    os.environ["CUTE_DSL_LIBS"] = os.pathsep.join([shim, *libraries])
    kept = [token for token in os.environ.get("CUTE_DSL_KEEP", "").split(",") if token]
    os.environ["CUTE_DSL_KEEP"] = ",".join(kept if "ptx" in kept else [*kept, "ptx"])
    os.environ.setdefault("CUTE_DSL_ARCH", arch)
    os.environ.setdefault("CUTE_DSL_LINEINFO", "1")
    if "CUTE_DSL_DUMP_DIR" not in os.environ:
        # Of this process alone: two processes that compile the same function would overwrite each other's text.
        directory = tempfile.mkdtemp(prefix="ptxsim-dump-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        os.environ["CUTE_DSL_DUMP_DIR"] = directory
    os.makedirs(os.environ["CUTE_DSL_DUMP_DIR"], exist_ok=True)
    if "cutlass" in sys.modules:
        _update_imported_cutlass()


def _update_imported_cutlass() -> None:
    """Bring settings that CuTe DSL read at import up to date with the environment."""
    try:
        manager = importlib.import_module("cutlass.base_dsl.env_manager")
        singletons = importlib.import_module("cutlass.base_dsl.dsl").DSLSingletonMeta._instances
        manager.get_str_env_var.cache_clear()
        for dsl in singletons.values():
            dsl.envar.shared_libs = os.environ["CUTE_DSL_LIBS"]
            dsl.envar.keep_ptx = True
            dsl.envar.dump_dir = os.environ["CUTE_DSL_DUMP_DIR"]
            dsl.envar.arch = os.environ["CUTE_DSL_ARCH"]
            dsl.envar.lineinfo = os.environ["CUTE_DSL_LINEINFO"].lower() in ("1", "true", "yes", "on")
    except (ImportError, AttributeError) as error:
        raise CaptureError(
            f"cutlass was imported before prepare_environment(), and this version of it ({error}) keeps its settings "
            "elsewhere: call prepare_environment() before `import cutlass`"
        ) from error


# ---- arguments ------------------------------------------------------------------------------------------------------

_CUDA_DEVICE = 2
# Offset of DLTensor.device in the structure a capsule of this name points to: behind the data pointer, and, in the
# versioned one, behind version, manager context, deleter and flags. Source: dlpack.h 1.0.
_DEVICE_OFFSET = {b"dltensor": 8, b"dltensor_versioned": 32 + 8}


class DeviceTensor:
    """A CPU tensor that says, through DLPack, that it is on CUDA device 0. Use `as_device_tensor` to make one."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CUDA_DEVICE, 0)

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None, **_: Any) -> Any:
        keywords = {"max_version": max_version} if max_version else {}
        capsule = self.tensor.__dlpack__(**keywords)
        get_name = ctypes.pythonapi.PyCapsule_GetName
        get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
        name = get_name(capsule)
        if name not in _DEVICE_OFFSET:
            raise CaptureError(f"unknown DLPack capsule {name!r}, known are {sorted(_DEVICE_OFFSET)}")
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_int32.from_address(get_pointer(capsule, name) + _DEVICE_OFFSET[name]).value = _CUDA_DEVICE
        return capsule


def as_device_tensor(tensor: Any) -> DeviceTensor:
    """Wrap a CPU tensor so that `from_dlpack` and TVM-FFI take it for a CUDA tensor. Its memory is shared.

    Args:
        tensor: a torch tensor on the CPU, a NumPy array, or anything else with `__dlpack__`.

    Returns:
        The wrapper. Pass it to `cutlass.cute.runtime.from_dlpack`, or to `capture` as it is.

    Raises:
        CaptureError: the tensor is not in CPU memory, or has no DLPack protocol.
    """
    if isinstance(tensor, DeviceTensor):
        return tensor
    if not hasattr(tensor, "__dlpack__"):
        raise CaptureError(f"want a torch tensor or NumPy array, got {type(tensor).__name__}, which has no __dlpack__")
    if tensor.__dlpack_device__()[0] != 1:
        raise CaptureError("want a tensor in CPU memory: the simulated kernel reads and writes it there")
    return DeviceTensor(tensor)


def _is_tensor(argument: Any) -> bool:
    # CuTe tensors have __dlpack__ too, and must go through as they are; NumPy scalars have it in no dimension.
    root = type(argument).__module__.split(".")[0]
    return isinstance(argument, DeviceTensor) or (
        root in ("torch", "numpy") and hasattr(argument, "__dlpack__") and getattr(argument, "ndim", 0) > 0
    )


# ---- PTX text -------------------------------------------------------------------------------------------------------


def ptx_text(compiled: Any) -> str:
    """The PTX text of a compiled function.

    Args:
        compiled: what `cute.compile` returned, or an AotFunction.

    Raises:
        CaptureError: the function has no text, with what to do.
    """
    if isinstance(compiled, AotFunction):
        return compiled.ptx
    artifacts = getattr(compiled, "artifacts", None)
    text = getattr(artifacts, "PTX", None)
    if text is None:
        raise CaptureError(
            f"{type(compiled).__name__} has no PTX text: compile it after prepare_environment(), or pass ptx=; an AOT "
            "object holds machine code only"
        )
    if ".version" not in text:
        # CuTe DSL leaves the path when it could not read the file right after the compile. The file may be another
        # compile's by now, so it is not read here.
        raise CaptureError(
            f"the PTX text was not kept: CuTe DSL did not find {text!r} right after the compile; create the directory "
            "CUTE_DSL_DUMP_DIR names, or call prepare_environment(), before compiling"
        )
    return text


# ---- the callback ---------------------------------------------------------------------------------------------------


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("image", ctypes.c_void_p),
        ("attributes_set", ctypes.c_uint32),
        ("attributes", ctypes.c_int32 * 32),
    ]


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint32),
    ]


_Callback = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(_Kernel), ctypes.POINTER(_LaunchConfig), ctypes.POINTER(ctypes.c_void_p)
)

_CLUSTER_DIMENSION = 4
# Launch attributes with one integer value. Source: cudaLaunchAttributeID in driver_types.h, CUDA 13.0.
_LAUNCH_ATTRIBUTES = {
    2: "cooperative",
    5: "cluster_scheduling_policy",
    6: "programmatic_stream_serialization",
    8: "priority",
}
# Source: CUfunction_attribute in cuda.h, CUDA 13.0.
_KERNEL_ATTRIBUTES = {
    8: "max_dynamic_shared_bytes",
    9: "shared_carveout",
    14: "nonportable_cluster",
    15: "cluster_scheduling_policy",
}


def _triple(values: Sequence[int]) -> tuple[int, int, int]:
    return (int(values[0]), int(values[1]), int(values[2]))


def _read_launch(ptx: str, kernel: _Kernel, config: _LaunchConfig, arguments: Any) -> Launch:
    name = kernel.name.decode()
    attributes = {}
    for i, value in enumerate(kernel.attributes):
        if kernel.attributes_set >> i & 1:
            if i not in _KERNEL_ATTRIBUTES:
                raise CaptureError(f"kernel attribute {i} = {value} of {name} is unknown")
            attributes[_KERNEL_ATTRIBUTES[i]] = int(value)
    cluster = (1, 1, 1)
    for i in range(config.num_attributes):
        attribute = config.attributes[i]
        if attribute.id == _CLUSTER_DIMENSION:
            cluster = _triple(attribute.value)
        elif attribute.id in _LAUNCH_ATTRIBUTES:
            attributes[_LAUNCH_ATTRIBUTES[attribute.id]] = int(attribute.value[0])
        elif attribute.id != 0:  # 0: ignored entry
            raise CaptureError(f"launch attribute {attribute.id} of {name} is unknown")
    header = entry_header(ptx, name)
    image = read_image(kernel.image) if kernel.image else None
    compiled_sizes = parameter_sizes(image, name) if image else None
    if compiled_sizes is not None and compiled_sizes != header.param_sizes:
        raise CaptureError(
            f"the PTX text is of another compile: {name} has parameters of {header.param_sizes} bytes in it, and of "
            f"{compiled_sizes} bytes in the machine code"
        )
    return Launch(
        ptx=ptx,
        entry=name,
        grid=_triple(config.grid),
        block=_triple(config.block),
        cluster=cluster,
        shared_bytes=int(config.shared_bytes),
        params=tuple(ctypes.string_at(arguments[i], size) for i, size in enumerate(header.param_sizes)),
        attributes=attributes,
    )


_lock = threading.RLock()


def _shim() -> ctypes.CDLL:
    # The very file that the host code was resolved against: a copy elsewhere would have a callback of its own.
    first = os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep)[0]
    shim = ctypes.CDLL(first if Path(first).name.startswith(SHIM_PREFIX) else str(shim_library()))
    shim.ptxsim_set_callback.argtypes = [_Callback]
    shim.ptxsim_set_callback.restype = None
    shim.ptxsim_take_error.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    shim.ptxsim_take_error.restype = None
    return shim


def _take_error(shim: ctypes.CDLL) -> str:
    text = ctypes.create_string_buffer(256)
    shim.ptxsim_take_error(text, len(text))
    return text.value.decode()


def capture(compiled: Any, *args: Any, ptx: str | None = None, **kwargs: Any) -> list[Launch]:
    """Call a compiled function and return its launches, in order. No kernel runs.

    Args:
        compiled: what `cute.compile` returned (with or without --enable-tvm-ffi), an AotFunction, or a function of an
            AOT object that was loaded against the shim, together with `ptx`.
        args: its runtime arguments. CPU tensors and NumPy arrays, also in lists and tuples, stand for device tensors;
            their pointers are kept. A function without --enable-tvm-ffi takes them, as CuTe DSL itself does, with a
            fully dynamic layout: if it was compiled for another, pass the `from_dlpack` tensor of that layout.
        ptx: the module's text, for a function that does not carry it.
        kwargs: more runtime arguments.

    Returns:
        One Launch per kernel launch.

    Raises:
        CaptureError: no PTX text, no launch, a CUDA call that the shim does not provide (named), or wrong arguments.
    """
    text = ptx if ptx is not None else ptx_text(compiled)
    function = compiled.function if isinstance(compiled, AotFunction) else compiled
    launches: list[Launch] = []
    failures: list[Exception] = []

    def on_launch(kernel: Any, config: Any, arguments: Any) -> None:
        # An exception cannot pass through the C frames below; the first one is raised after the call.
        try:
            launches.append(_read_launch(text, kernel.contents, config.contents, arguments))
        except Exception as error:
            failures.append(error)

    callback = _Callback(on_launch)
    with _lock:
        shim = _shim()
        shim.ptxsim_set_callback(callback)
        _take_error(shim)
        called: Exception | None = None
        try:
            _call(function, args, kwargs)
        except Exception as error:
            called = error
        finally:
            shim.ptxsim_set_callback(_Callback(0))
        refused = _take_error(shim)
    _raise_failure(function, refused, failures, called)
    if not launches:
        raise CaptureError(
            f"{type(function).__name__} launched nothing through the shim: was it compiled before prepare_environment(), "
            "or is it host code only?"
        )
    return launches


def _call(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    convert = as_device_tensor if _is_tvm_ffi(function) else _dynamic_tensor
    wrapped = [_convert_tensors(argument, convert) for argument in args]
    named = {name: _convert_tensors(argument, convert) for name, argument in kwargs.items()}
    if hasattr(type(function), "num_devices"):
        # A cached property that would ask the CUDA runtime.
        function.__dict__["num_devices"] = 1
    try:
        function(*wrapped, **named)
    finally:
        libraries = getattr(getattr(function, "jit_module", None), "cuda_library", None)
        if libraries:
            # They are the shim's: the CUDA runtime must not be asked to unload them.
            libraries.clear()


def _convert_tensors(argument: Any, convert: Callable[[Any], Any]) -> Any:
    if type(argument) in (list, tuple):
        return type(argument)(_convert_tensors(item, convert) for item in argument)
    return convert(argument) if _is_tensor(argument) else argument


def _is_tvm_ffi(function: Any) -> bool:
    return any(base.__module__.startswith("tvm_ffi") for base in type(function).__mro__) or hasattr(
        function, "__tvm_ffi_object__"
    )


def _dynamic_tensor(tensor: Any) -> Any:
    # What CuTe DSL itself makes of a torch tensor or NumPy array that a JIT function is called with.
    return importlib.import_module("cutlass.cute.runtime").from_dlpack(as_device_tensor(tensor)).mark_layout_dynamic()


def _raise_failure(function: Any, refused: str, failures: list[Exception], called: Exception | None) -> None:
    name = type(function).__name__
    if refused:
        raise CaptureError(
            f"the host code of {name} calls {refused}, which the capture shim does not provide"
        ) from called
    if failures:
        if isinstance(failures[0], PtxHeaderError):
            raise CaptureError(f"the PTX text is not that of this function: {failures[0]}") from failures[0]
        raise failures[0]
    if called is not None:
        raise CaptureError(f"calling {name} failed: {called}") from called


# ---- AOT objects ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AotFunction:
    """A function of an AOT object, linked against the shim.

    Attributes:
        function: the loaded TVM-FFI function.
        ptx: text of the module it launches kernels of.
        name: its name in the object.
    """

    function: Any
    ptx: str
    name: str


def export_aot(compiled: Any, directory: str | Path, name: str) -> Path:
    """Export a TVM-FFI compiled function as `name`.o, with its PTX text beside it as `name`.ptx.

    Returns:
        Path of the object file.
    """
    path = Path(directory) / f"{name}.o"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ptx_text(compiled)
    compiled.export_to_c(object_file_path=str(path), function_name=name)
    path.with_suffix(".ptx").write_text(text)
    return path


def load_aot(path: str | Path, name: str, ptx: str | None = None) -> AotFunction:
    """Link an AOT object against the shim and load a function of it. CuTe DSL's compiler is not used.

    Args:
        path: an object file that `export_to_c` of a TVM-FFI compiled function wrote.
        name: the function's name in it.
        ptx: the module's text; by default that of the file of the same name with suffix .ptx.

    Returns:
        The function, for `capture`.

    Raises:
        CaptureError: no PTX text, or the object does not link or lacks the function.
    """
    path = Path(path)
    if not path.exists():
        raise CaptureError(f"{path} does not exist")
    side = path.with_suffix(".ptx")
    if ptx is None and not side.exists():
        raise CaptureError(
            f"{path} holds machine code only and {side.name} is not beside it: pass ptx=, or export with export_aot()"
        )
    text = ptx if ptx is not None else side.read_text()
    tvm_ffi = importlib.import_module("tvm_ffi")
    ffi_library = tvm_ffi.libinfo.find_libtvm_ffi()
    # The module is mapped once loaded, so its file can go.
    with tempfile.TemporaryDirectory(prefix="ptxsim-aot-") as scratch:
        linked = Path(scratch) / f"{re.sub(r'[^A-Za-z0-9_]', '_', name)}.so"
        # The order matters: the shim's names must be found before the runtime's.
        libraries = [str(shim_library()), str(runtime_library()), str(ffi_library)]
        search = [f"-Wl,-rpath,{Path(library).parent}" for library in libraries]
        command = [find_compiler(), "-shared", "-Wl,--no-as-needed", str(path), *libraries, *search, "-o", str(linked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CaptureError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        module = tvm_ffi.load_module(str(linked))
    try:
        function = module.get_function(name)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise CaptureError(f"{path} has no TVM-FFI function {name!r}: {error}") from error
    return AotFunction(function, text, name)
