"""Launches taken from real CuTe DSL functions through JIT, TVM-FFI and AOT, and from calls made by hand."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cutlass")
torch = pytest.importorskip("torch")

import cutlass  # noqa: E402
import cutlass.cute as cute  # noqa: E402
import kernels_small as kernels  # noqa: E402
from cutlass.cute.runtime import from_dlpack, make_fake_compact_tensor, make_fake_stream, make_ptr  # noqa: E402

from ptxsim import tensormap  # noqa: E402
from ptxsim.host import build, cubin  # noqa: E402
from ptxsim.host import capture as host  # noqa: E402
from ptxsim.host.capture import CaptureError, as_device_tensor, capture  # noqa: E402
from ptxsim.launch import check_launch, entry_header  # noqa: E402

STREAM = kernels.cuda.CUstream(0)
COUNT = 200


def cute_tensor(tensor):
    return from_dlpack(as_device_tensor(tensor)).mark_layout_dynamic()


def pointer_and_size(param):
    """The first 12 bytes of a one-dimensional tensor parameter; the rest is padding of unknown content."""
    return int.from_bytes(param[:8], "little"), int.from_bytes(param[8:12], "little")


@pytest.fixture(scope="module")
def tensors():
    return torch.arange(COUNT, dtype=torch.float32), torch.zeros(COUNT)


@pytest.fixture(scope="module")
def jit_twice(tensors):
    source, target = tensors
    return cute.compile(kernels.copy_twice, cute_tensor(source), cute_tensor(target), cutlass.Float32(2), STREAM)


@pytest.fixture(scope="module")
def ffi_twice(tensors):
    source, target = map(cute_tensor, tensors)
    options = "--enable-tvm-ffi"
    return cute.compile(kernels.copy_twice, source, target, cutlass.Float32(2), STREAM, options=options)


def assert_two_launches(launches, source, target, scale):
    first, second = launches
    for launch in launches:
        assert launch.grid == (4, 1, 1)
        assert launch.block == (kernels.THREADS, 1, 1)
        assert launch.cluster == (1, 1, 1)
        assert f".entry {launch.entry}(" in launch.ptx
        assert ".target sm_100a" in launch.ptx
        assert [len(param) for param in launch.params] == [16, 16, 4]
        assert launch.attributes["max_dynamic_shared_bytes"] == 232448
        assert launch.attributes["cooperative"] == 0
        assert check_launch(launch) == []
    assert pointer_and_size(first.params[0]) == (source.data_ptr(), COUNT)
    assert pointer_and_size(first.params[1]) == (target.data_ptr(), COUNT)
    assert pointer_and_size(second.params[0]) == (target.data_ptr(), COUNT)
    assert pointer_and_size(second.params[1]) == (source.data_ptr(), COUNT)
    assert np.frombuffer(first.params[2] + second.params[2], np.float32).tolist() == [scale, scale + 1]
    assert [launch.shared_bytes for launch in launches] == [0, 1024]
    assert [launch.attributes["programmatic_stream_serialization"] for launch in launches] == [0, 1]


def test_jit(jit_twice, tensors):
    source, target = tensors
    launches = capture(jit_twice, cute_tensor(source), cute_tensor(target), 3.0, STREAM)
    assert_two_launches(launches, source, target, 3.0)
    assert not target.any()  # nothing ran


def test_jit_takes_torch_and_numpy(jit_twice, tensors):
    source, target = tensors
    assert_two_launches(capture(jit_twice, source, target, 5.0, STREAM), source, target, 5.0)
    assert_two_launches(capture(jit_twice, source.numpy(), as_device_tensor(target), 5.0, STREAM), source, target, 5.0)


def test_tvm_ffi(ffi_twice, tensors):
    source, target = tensors
    assert_two_launches(capture(ffi_twice, source, target, 3.0, STREAM), source, target, 3.0)
    assert_two_launches(capture(ffi_twice, source.numpy(), target.numpy(), 4.0, STREAM), source, target, 4.0)
    assert_two_launches(capture(ffi_twice, source, target, scale=4.0, stream=STREAM), source, target, 4.0)


def test_tvm_ffi_compiled_without_tensors(tensors):
    """Fake tensors of symbolic size and the environment's stream: how a library compiles its kernels."""
    source, target = tensors
    size = cute.sym_int()
    fakes = [make_fake_compact_tensor(cutlass.Float32, (size,)) for _ in range(2)]
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    compiled = cute.compile(kernels.copy_once, *fakes, cutlass.Float32(1), stream, options="--enable-tvm-ffi")
    [launch] = capture(compiled, source, target, 2.0)
    assert pointer_and_size(launch.params[0]) == (source.data_ptr(), COUNT)
    assert pointer_and_size(launch.params[1]) == (target.data_ptr(), COUNT)


def test_aot(ffi_twice, tensors, tmp_path):
    source, target = tensors
    path = host.export_aot(ffi_twice, tmp_path, "twice")
    function = host.load_aot(path, "twice")
    assert function.ptx == ffi_twice.artifacts.PTX
    assert_two_launches(capture(function, source, target, 3.0, STREAM), source, target, 3.0)

    path.with_suffix(".ptx").unlink()
    with pytest.raises(CaptureError, match=r"twice\.ptx is not beside it: pass ptx="):
        host.load_aot(path, "twice")
    again = host.load_aot(path, "twice", ptx=function.ptx)
    assert_two_launches(capture(again, source, target, 3.0, STREAM), source, target, 3.0)
    with pytest.raises(CaptureError, match="no TVM-FFI function 'thrice'"):
        host.load_aot(path, "thrice", ptx=function.ptx)
    with pytest.raises(CaptureError, match="does not exist"):
        host.load_aot(tmp_path / "absent.o", "twice")


def test_aot_without_tvm_ffi(jit_twice, tensors, tmp_path):
    source, target = tensors
    jit_twice.export_to_c(file_path=str(tmp_path), file_name="plain", function_prefix="plain")
    loaded = cute.runtime.load_module(str(tmp_path / "plain.o"))["plain"]
    with pytest.raises(CaptureError, match="pass ptx="):
        capture(loaded, source, target, 3.0, STREAM)
    launches = capture(loaded, source, target, 3.0, STREAM, ptx=jit_twice.artifacts.PTX)
    assert_two_launches(launches, source, target, 3.0)


def test_pointers(tensors):
    source, target = tensors
    pointers = [make_ptr(cutlass.Float32, t.data_ptr(), cute.AddressSpace.gmem, assumed_align=16) for t in tensors]
    compiled = cute.compile(kernels.copy_pointers, *pointers, cutlass.Int32(COUNT), cutlass.Float32(2), STREAM)
    [launch] = capture(compiled, *pointers, 100, 2.0, STREAM)
    assert launch.grid == (2, 1, 1)
    assert pointer_and_size(launch.params[0]) == (source.data_ptr(), 100)
    assert pointer_and_size(launch.params[1]) == (target.data_ptr(), 100)


def test_tensor_map_and_cluster():
    source = torch.zeros(192, 64, dtype=torch.float16)
    arguments = (cute_tensor(source), cute_tensor(torch.zeros_like(source)))
    compiled = cute.compile(kernels.tma_copy, *arguments, (3, 4, 3), (32, 64), (2, 1, 1), STREAM)
    [launch] = capture(compiled, *arguments, STREAM)
    assert launch.grid == (6, 1, 1)
    assert launch.cluster == (2, 1, 1)
    assert launch.shared_bytes == 32 * 64 * 2 + 8
    assert launch.attributes["nonportable_cluster"] == 1
    assert check_launch(launch) == []
    [packed] = [param for param in launch.params if len(param) == tensormap.MAP_BYTES]
    decoded = tensormap.decode(packed)
    assert decoded.global_address == source.data_ptr()
    assert decoded.dtype == "f16"
    assert (decoded.dims, decoded.strides_bytes, decoded.box) == ((64, 192), (128,), (64, 32))
    assert decoded.swizzle == tensormap.Swizzle.B128
    assert tensormap.check(decoded) == []
    # A second call packs the same map; what follows its first half is left over from elsewhere.
    [again] = capture(compiled, *arguments, STREAM)
    maps = [param for param in again.params if len(param) == tensormap.MAP_BYTES]
    assert [tensormap.meaningful_bytes(m) for m in maps] == [tensormap.meaningful_bytes(packed)]


def test_two_compiles_of_one_function_keep_their_own_text(tensors):
    source, target = tensors
    cute_tensors = list(map(cute_tensor, tensors))
    first = cute.compile(kernels.copy_once, *cute_tensors, cutlass.Float32(2), STREAM)
    halves = [t.to(torch.float16) for t in tensors]
    second = cute.compile(kernels.copy_once, *map(cute_tensor, halves), cutlass.Float32(2), STREAM)
    [launch] = capture(first, source, target, 2.0, STREAM)
    [half_launch] = capture(second, *halves, 2.0, STREAM)
    assert "st.global.f32" in launch.ptx or "st.global.b32" in launch.ptx
    assert launch.ptx != half_launch.ptx
    assert launch.entry in first.artifacts.PTX
    assert half_launch.entry in second.artifacts.PTX


def test_machine_code_tells_parameter_sizes(jit_twice, tensors):
    """PTX text of another compile is noticed, though the entry has the same name."""
    text = jit_twice.artifacts.PTX
    entry = capture(jit_twice, *tensors, 2.0, STREAM)[0].entry
    assert entry_header(text, entry).param_sizes == (16, 16, 4)
    changed = text.replace(f".param .f32 {entry}_param_2", f".param .f64 {entry}_param_2")
    changed = changed.replace(f".param .b32 {entry}_param_2", f".param .b64 {entry}_param_2")
    assert changed != text
    with pytest.raises(CaptureError, match=r"another compile: .*\(16, 16, 8\).*\(16, 16, 4\)"):
        capture(jit_twice, *tensors, 2.0, STREAM, ptx=changed)
    with pytest.raises(CaptureError, match="not that of this function: no entry"):
        capture(jit_twice, *tensors, 2.0, STREAM, ptx=".entry unrelated() { ret; }")


def test_an_image_that_is_not_machine_code():
    text = ctypes.create_string_buffer(b".version 9.0".ljust(64))
    assert cubin.read_image(ctypes.addressof(text)) is None


def test_wrong_arguments(jit_twice, ffi_twice, tensors):
    source, target = tensors
    with pytest.raises(CaptureError, match=r"calling TVMFFI.* failed"):
        capture(ffi_twice, source.to(torch.float16), target, 2.0, STREAM)
    with pytest.raises(CaptureError, match=r"calling TVMFFI.* failed"):
        capture(ffi_twice, source, target)
    with pytest.raises(CaptureError, match=r"calling CudaDialect.* failed"):
        capture(jit_twice, source, target)
    # The next call is not disturbed.
    assert len(capture(ffi_twice, source, target, 2.0, STREAM)) == 2


def test_device_tensor_of_something_else():
    with pytest.raises(CaptureError, match="got str, which has no __dlpack__"):
        as_device_tensor("tensor")
    with pytest.raises(CaptureError, match="CPU memory"):
        as_device_tensor(FakeDeviceArray())


class FakeDeviceArray:
    def __dlpack__(self):
        raise AssertionError

    def __dlpack_device__(self):
        return (2, 0)


def test_device_tensor_keeps_memory_and_says_cuda():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    wrapped = as_device_tensor(array)
    assert as_device_tensor(wrapped) is wrapped
    assert wrapped.__dlpack_device__() == (2, 0)
    tensor = from_dlpack(wrapped)
    assert tensor.data_ptr == array.ctypes.data
    assert tensor.memspace == cute.AddressSpace.gmem


class Artifacts:
    def __init__(self, ptx):
        self.PTX = ptx


class HostCode:
    """Stands for compiled host code: calls the shim as that would."""

    def __init__(self, call, ptx=".version 9.0 .entry k(.param .u32 a) { ret; }"):
        self.artifacts, self.call = Artifacts(ptx), call

    def __call__(self, *args):
        error = self.call(ctypes.CDLL(str(build.shim_library())))
        if error:
            raise RuntimeError(f"error {error}")


def test_ptx_path_that_does_not_exist():
    with pytest.raises(CaptureError, match=r"did not find '/nowhere/f\.ptx'.*CUTE_DSL_DUMP_DIR"):
        capture(HostCode(lambda shim: 0, ptx="/nowhere/f.ptx"))
    with pytest.raises(CaptureError, match="compile it after prepare_environment"):
        capture(HostCode(lambda shim: 0, ptx=None))


def test_no_launch():
    with pytest.raises(CaptureError, match="launched nothing"):
        capture(HostCode(lambda shim: 0))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda shim: shim._cudaMemsetAsync(None, 0, 4, None), "_cudaMemsetAsync"),
        (lambda shim: shim._cuTensorMapEncodeTiled(), "_cuTensorMapEncodeTiled"),
        (
            lambda shim: shim._cudaDeviceGetAttribute(ctypes.byref(ctypes.c_int()), 12, 0),
            r"_cudaDeviceGetAttribute of attribute \(12\)",
        ),
        (lambda shim: shim._cudaSetDevice(1), r"_cudaSetDevice of device \(1\)"),
    ],
)
def test_call_that_the_shim_lacks_is_named(call, name):
    with pytest.raises(CaptureError, match=rf"calls {name}, which the capture shim does not provide"):
        capture(HostCode(call))


def launch_by_hand(attributes=(), kernel_attributes=()):
    def call(shim):
        kernel = ctypes.c_void_p()
        shim._cudaLibraryGetKernel(ctypes.byref(kernel), None, b"k")
        for attribute, value in kernel_attributes:
            error = shim._cudaKernelSetAttributeForDevice(kernel, attribute, value, 0)
            if error:
                return error
        packed = (host._LaunchAttribute * 8)()
        for i, (identifier, values) in enumerate(attributes):
            packed[i].id = identifier
            packed[i].value[: len(values)] = values
        config = host._LaunchConfig((3, 2, 1), (32, 1, 1), 7, None, packed, len(attributes))
        value = ctypes.c_uint32(0xABCD)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(value))
        return shim._cudaLaunchKernelEx(ctypes.byref(config), kernel, arguments)

    return HostCode(call)


def test_every_attribute_is_recorded():
    code = launch_by_hand([(0, [9]), (4, [3, 1, 1]), (2, [1]), (6, [1]), (8, [5])], [(8, 1000), (14, 1), (9, 50)])
    [launch] = capture(code)
    assert (launch.entry, launch.grid, launch.block) == ("k", (3, 2, 1), (32, 1, 1))
    assert (launch.cluster, launch.shared_bytes) == ((3, 1, 1), 7)
    assert launch.params == ((0xABCD).to_bytes(4, "little"),)
    assert launch.attributes == {
        "cooperative": 1,
        "programmatic_stream_serialization": 1,
        "priority": 5,
        "max_dynamic_shared_bytes": 1000,
        "nonportable_cluster": 1,
        "shared_carveout": 50,
    }


def test_unknown_attributes_are_errors():
    with pytest.raises(CaptureError, match="launch attribute 7 of k is unknown"):
        capture(launch_by_hand([(7, [1])]))
    with pytest.raises(CaptureError, match="kernel attribute 3 = 1 of k is unknown"):
        capture(launch_by_hand((), [(3, 1)]))
    with pytest.raises(CaptureError, match=r"calls kernel attribute \(40\)"):
        capture(launch_by_hand((), [(40, 1)]))


def test_launch_outside_of_capture_is_refused():
    code = launch_by_hand()
    with pytest.raises(RuntimeError, match="error 801"):
        code()


def test_libraries_put_one_shim_first(monkeypatch):
    runtime = str(build.runtime_library())
    monkeypatch.setenv("CUTE_DSL_LIBS", os.pathsep.join(["/old/libptxsim-0123.so", runtime, "/other/libhelp.so"]))
    monkeypatch.setattr(host, "_update_imported_cutlass", lambda: None)
    host.prepare_environment()
    host.prepare_environment()
    expected = [str(build.shim_library()), runtime, "/other/libhelp.so"]
    assert os.environ["CUTE_DSL_LIBS"].split(os.pathsep) == expected
    assert os.environ["CUTE_DSL_KEEP"].split(",").count("ptx") == 1


def test_no_runtime_library(monkeypatch):
    monkeypatch.delenv("CUTE_DSL_LIBS", raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="install nvidia-cutlass-dsl"):
        build.runtime_library()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.BuildError, match=r"no C compiler found.*apt-get install gcc"):
        build.shim_library()
    assert list((tmp_path / "ptxsim").iterdir()) == []


def test_compiler_fails(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(build.BuildError, match="broken"):
        build.shim_library()
    assert list((tmp_path / "ptxsim").iterdir()) == []


def test_concurrent_builds(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(build.__file__).parents[2])}
    code = "import ctypes; from ptxsim.host.build import shim_library as f; p = f(); ctypes.CDLL(str(p)); print(p)"
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert [str(path) for path in (tmp_path / "ptxsim").iterdir()] == [outputs[0]]


def test_wrappers_of_the_runtime_are_all_exported():
    shim = ctypes.CDLL(str(build.shim_library()))
    names = build.wrapper_names(build.runtime_library())
    assert "_cudaMalloc" in names
    assert [name for name in names if not hasattr(shim, name)] == []


def test_cutlass_imported_first():
    code = """
import cutlass, os
from ptxsim.host.capture import prepare_environment, capture
prepare_environment()
import sys
sys.path.insert(0, sys.argv[1])
import cutlass.cute as cute, kernels_small as kernels, numpy as np
a, b, s = np.zeros(8, np.float32), np.zeros(8, np.float32), kernels.cuda.CUstream(0)
from cutlass.cute.runtime import from_dlpack
from ptxsim.host.capture import as_device_tensor
t = lambda x: from_dlpack(as_device_tensor(x)).mark_layout_dynamic()
f = cute.compile(kernels.copy_once, t(a), t(b), cutlass.Float32(1), s)
[launch] = capture(f, a, b, 1.0, s)
assert ".target sm_100a" in launch.ptx and ".loc" in launch.ptx
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUTE_DSL_")}
    environment["PYTHONPATH"] = str(Path(build.__file__).parents[2])
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, here], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
