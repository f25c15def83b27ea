"""Run every probe of tests/sim/probes on this machine's GPU and record what it did in tests/data/probes.

    python3 scripts/record_probes.py                 # all probes; needs an NVIDIA driver, Python and NumPy, nothing else
    python3 scripts/record_probes.py --only wgmma tma_  # probes whose name contains one of the texts; others keep theirs
    python3 scripts/record_probes.py --assemble ptxas  # no GPU: assemble every probe

A probe that the driver rejects, that fails or that hangs is recorded as an error and the next one runs in a fresh process.
Some are meant to fail; the exit status is 1 if any other did, or if one of those did not. Another GPU or driver starts a new
recording: run all probes then.
"""

import argparse
import ctypes
import datetime
import json
import lzma
import multiprocessing
import pathlib
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "sim"))

from probes import kit  # noqa: E402
from probes.cases import all_cases  # noqa: E402
from probes.maps import table  # noqa: E402

DATA = ROOT / "tests" / "data" / "probes"
ARENA_BYTES = 64 << 20
ALIGNMENT = 1024
TIMEOUT_S = 30
MAX_PROCESSES = 40  # after so many failures something else is wrong

# Attribute numbers of cuda.h.
MAX_DYNAMIC_SHARED = 8
CLUSTER_DIMENSION, PROGRAMMATIC_SERIALIZATION = 4, 6
JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES = 5, 6


class DriverError(RuntimeError):
    """A driver call failed."""


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding, and a 64-byte union."""

    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class Driver:
    """The few calls of libcuda that a launch takes, and one block of device memory for all buffers."""

    def __init__(self, library: str) -> None:
        self.lib = ctypes.CDLL(library)
        self.call("cuInit", 0)
        device, context, arena = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuMemAlloc_v2", ctypes.byref(arena), ctypes.c_size_t(ARENA_BYTES))
        self.arena = arena.value
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, 256, device)
        version, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.call("cuDeviceGetAttribute", ctypes.byref(major), 75, device)
        self.call("cuDeviceGetAttribute", ctypes.byref(minor), 76, device)
        self.about = {
            "gpu": name.value.decode(),
            "compute_capability": f"{major.value}.{minor.value}",
            "cuda_driver_api": f"{version.value // 1000}.{version.value % 1000 // 10}",
        }

    def call(self, function: str, *args: Any) -> None:
        """Call the driver; raise DriverError unless it succeeds."""
        result = getattr(self.lib, function)(*args)
        if result:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorName(result, ctypes.byref(text))
            raise DriverError(f"{function}: {text.value.decode() if text.value else result}")

    def encode(self, tensor: kit.TensorMap, address: int) -> bytes:
        """Return the 128 bytes of a tensor map."""
        block = (ctypes.c_uint8 * 256)()
        start = -ctypes.addressof(block) % 64  # the map must lie at a multiple of 64
        rank = len(tensor.dims)
        self.call(
            "cuTensorMapEncodeTiled",
            ctypes.byref(block, start),
            kit.DTYPES[tensor.dtype],
            ctypes.c_uint(rank),
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*tensor.dims),
            (ctypes.c_uint64 * rank)(*tensor.strides),
            (ctypes.c_uint32 * rank)(*tensor.box),
            (ctypes.c_uint32 * rank)(*tensor.steps()),
            kit.INTERLEAVES[tensor.interleave],
            kit.SWIZZLES[tensor.swizzle],
            kit.PROMOTIONS[tensor.promotion],
            kit.OOB_FILLS[tensor.oob_fill],
        )
        return bytes(block[start : start + 128])

    def load(self, ptx: str) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """Compile a module; return it and its entry `probe`. The compiler's log is in the error."""
        log = ctypes.create_string_buffer(8192)
        options = (ctypes.c_int * 2)(JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self.call("cuModuleLoadDataEx", ctypes.byref(module), ptx.encode() + b"\0", 2, options, values)
        except DriverError as error:
            raise DriverError(f"{error}\n{log.value.decode(errors='replace')}") from error
        self.call("cuModuleGetFunction", ctypes.byref(function), module, b"probe")
        return module, function

    def run(self, case: kit.Case) -> dict[str, Any]:
        """Run one probe; return its output arrays and the maps it was given."""
        module, function = self.load(case.ptx)
        addresses, top = {}, self.arena
        for name, array in case.buffers.items():
            addresses[name] = top
            self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(top), array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
            top += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        maps = [self.encode(tensor, addresses[tensor.buffer] + tensor.offset) for tensor in case.maps]
        params: list[Any] = [ctypes.c_uint64(address) for address in addresses.values()]
        params += [(ctypes.c_uint8 * 128).from_buffer_copy(data) for data in maps]
        self.launch(case, function, params)
        outputs = {}
        for name in case.outputs + case.info:
            array = np.zeros_like(case.buffers[name])
            source = ctypes.c_uint64(addresses[name])
            self.call("cuMemcpyDtoH_v2", array.ctypes.data_as(ctypes.c_void_p), source, array.nbytes)
            outputs[name] = array
        self.call("cuModuleUnload", module)
        return {"outputs": outputs, "maps": maps}

    def launch(self, case: kit.Case, function: ctypes.c_void_p, params: list[Any]) -> None:
        """Launch and wait."""
        attributes = (LaunchAttribute * 2)()
        n = 0
        if case.cluster != (1, 1, 1):
            attributes[n].id = CLUSTER_DIMENSION
            attributes[n].value[:3] = list(case.cluster)
            n += 1
        if case.programmatic:
            attributes[n].id = PROGRAMMATIC_SERIALIZATION
            attributes[n].value[0] = 1
            n += 1
        config = LaunchConfig()
        config.grid[:] = list(case.grid)
        config.block[:] = [case.block, 1, 1]
        config.shared_bytes = case.shared_bytes
        config.attributes = attributes
        config.num_attributes = n
        if case.shared_bytes > 48 << 10:
            self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, case.shared_bytes)
        pointers = (ctypes.c_void_p * len(params))(*(ctypes.addressof(value) for value in params))
        self.call("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)
        self.call("cuCtxSynchronize")


def worker(link: Connection, library: str, names: list[str]) -> None:
    """Run probes one after another in this process, and send each result. A failed launch ends the process."""
    driver = Driver(library)
    cases = all_cases()
    link.send(("about", driver.about | {"arena": driver.arena}))
    link.send(("table", encode_table(driver)))
    for name in names:
        link.send(("start", name))
        try:
            link.send(("result", driver.run(cases[name])))
        except DriverError as error:
            link.send(("error", str(error)))
            if "cuModuleLoadDataEx" not in str(error) and "cuTensorMapEncodeTiled" not in str(error):
                return  # an error of the kernel stays with the context
        except Exception:
            link.send(("error", traceback.format_exc()))
            return
    link.send(("done", None))


def encode_table(driver: Driver) -> dict[str, dict[str, Any]]:
    """Encode the table of maps.py at the start of device memory."""
    entries: dict[str, dict[str, Any]] = {}
    for name, tensor in table().items():
        address = driver.arena + tensor.offset
        try:
            entries[name] = {"address": address, "hex": driver.encode(tensor, address).hex()}
        except DriverError as error:
            entries[name] = {"address": address, "error": str(error)}
    return entries


def run_all(library: str, names: list[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Run probes in as many processes as failures make necessary; return what is known of the GPU, table, results."""
    context = multiprocessing.get_context("spawn")
    about: dict[str, Any] = {}
    encoded: dict[str, Any] = {}
    results: dict[str, Any] = {}
    todo = list(names)
    for _ in range(MAX_PROCESSES):
        if not todo:
            break
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(there, library, todo))
        process.start()
        there.close()
        current = ""
        try:
            while here.poll(TIMEOUT_S):
                kind, value = here.recv()
                if kind == "about":
                    about = value
                elif kind == "table":
                    encoded = value
                elif kind == "start":
                    current = value
                elif kind == "done":
                    break
                else:
                    results[current] = value if kind == "result" else {"error": value}
                    if kind == "error":
                        print(f"ENDED WITH AN ERROR {current}: {value}", flush=True)
            else:
                results[current] = {"error": f"no answer within {TIMEOUT_S} s"}
                print(f"FAILED {current}: no answer", flush=True)
        except EOFError:
            if current and current not in results:
                results[current] = {"error": "the process ended"}
                print(f"FAILED {current}: the process ended", flush=True)
        if not about:
            sys.exit("the driver could not be started; see the message above")
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        todo = [name for name in todo if name not in results]
    results.update({name: {"error": "not run: too many others failed"} for name in todo})
    return about, encoded, results


def driver_release() -> str:
    """Return the kernel driver's version, such as 580.159.04."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def save(about: dict[str, Any], encoded: dict[str, Any], results: dict[str, Any], folder: pathlib.Path) -> None:
    """Write recording.json and outputs.xz. Probes that were not run keep what is recorded of them."""
    cases = all_cases()
    stamp = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "driver": driver_release(), **about}
    recorded = load_old(DATA, cases, stamp)
    for name, result in results.items():
        case = cases[name]
        entry: dict[str, Any] = {"ptx_sha256": case.ptx_sha256(), "data_sha256": case.data_sha256()}
        if "error" in result:
            entry["error"] = result["error"]
        else:
            entry["maps"] = [data.hex() for data in result["maps"]]
        recorded[name] = (entry, result.get("outputs", {}))
    blob, index = bytearray(), {}
    for name in cases:
        if name not in recorded:
            continue
        entry, outputs = recorded[name]
        places = {}
        for buffer, array in outputs.items():
            places[buffer] = [len(blob), array.nbytes]
            blob += array.tobytes()
        index[name] = {**entry, "outputs": places}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recording.json").write_text(
        one_line_each({"recorded_on": stamp, "tensor_maps": encoded, "cases": index})
    )
    (folder / "outputs.xz").write_bytes(lzma.compress(bytes(blob), preset=9 | lzma.PRESET_EXTREME))


def one_line_each(sections: dict[str, dict[str, Any]]) -> str:
    """Return JSON with a line for every entry of every section."""
    parts = []
    for section, entries in sections.items():
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
        parts.append(f"{json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load_old(
    folder: pathlib.Path, cases: dict[str, kit.Case], stamp: dict[str, Any]
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return what is recorded of this GPU and driver, by probe: its entry and output arrays."""
    if not (folder / "recording.json").exists():
        return {}
    recording = json.loads((folder / "recording.json").read_text())
    if any(recording["recorded_on"][key] != stamp[key] for key in ("gpu", "driver")):
        return {}
    index = recording["cases"]
    blob = lzma.decompress((folder / "outputs.xz").read_bytes())
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for name, entry in index.items():
        if name in cases:
            places = entry.pop("outputs")
            arrays = {key: np.frombuffer(blob, np.uint8, size, at) for key, (at, size) in places.items()}
            found[name] = (entry, arrays)
    return found


def assemble(ptxas: str, names: list[str]) -> int:
    """Assemble every probe; return how many fail."""
    failures = 0
    cases = all_cases()
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "probe.ptx"
        for name in names:
            source.write_text(cases[name].ptx)
            command = [ptxas, "-arch=sm_90a", "-o", str(pathlib.Path(folder) / "probe.cubin"), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or done.stderr.strip():
                failures += 1
                print(f"{name}: {done.stderr.strip()}")
    print(f"{len(names)} probes assembled, {failures} failed or warned")
    return failures


def main() -> int:
    """Parse the command line and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="probes whose name contains one of these texts")
    parser.add_argument("--assemble", metavar="PTXAS", help="assemble the probes instead of running them")
    parser.add_argument("--libcuda", default="libcuda.so.1", help="the driver's library")
    parser.add_argument("--out", type=pathlib.Path, default=DATA, help="where to write the recording")
    arguments = parser.parse_args()
    cases = all_cases()
    names = [name for name in cases if any(text in name for text in arguments.only)]
    if arguments.assemble:
        return 1 if assemble(arguments.assemble, names) else 0
    about, encoded, results = run_all(arguments.libcuda, names)
    save(about, encoded, results, arguments.out)
    failed = sum(("error" in result) != bool(cases[name].fails) for name, result in results.items())
    print(f"{len(results)} probes run on {about['gpu']}, {failed} not as expected; {len(encoded)} tensor maps")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
