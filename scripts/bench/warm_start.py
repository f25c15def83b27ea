"""What a start costs: the CPU flavor until ready and until the first token; kernels compiled against loaded.

    python scripts/bench/warm_start.py [--rounds 3] [--only kernels|server] [--set DIR] [--arch sm_100a]

`kernels` rows: every kernel of the model's closed set made ready in a fresh process, by the compiler ("jit") or from a
set built ahead of time ("aot"); it is built first unless --set names one. `server` rows: `nvfp4 serve` on a small
checkpoint, with and without NVFP4_AOT_DIR. The CPU flavor calls no compiled kernel, so its two should not differ; what
a GPU's start gains is the difference of the kernels rows, which no GPU has confirmed.

The hard part is a cold page cache on a shared machine: the files below are given back to the disk one by one
(posix_fadvise), and the row says what share of their bytes stayed cached, as programs that map them keep them.

Every variant runs once a round, in an order that turns with the rounds; the last rows are ratios of medians. Wall
seconds count other work on the machine, whose load average is in each row; CPU seconds do less so. One JSON line a row.
"""

import argparse
import ctypes
import json
import mmap
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TP = "1,2,4,8"
START_LIMIT_S = 600
STOP_LIMIT_S = 60
Row = dict[str, Any]


class Variant(NamedTuple):
    """One thing to measure: its row's name, compiled or loaded, and whether files are cached when it starts."""

    name: str
    how: str
    cache: str


# ---- the page cache -------------------------------------------------------------------------------------------------


def files_of_a_start(folders: list[Path]) -> list[Path]:
    """Everything in Python's packages, this repository's and the folders given."""
    places = [Path(sys.prefix) / "lib", ROOT / "cutedsl", ROOT / "patches", *folders]
    return [path for place in places for path in place.rglob("*") if path.is_file() and path.stat().st_size]


def evict(files: list[Path]) -> None:
    """Ask the kernel to drop the files' pages."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(files: list[Path]) -> None:
    """Read every file once."""
    for path in files:
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass


def cached_share(files: list[Path]) -> float:
    """What share of the files' pages is in the page cache, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    cached = total = 0
    for path in files:
        size = path.stat().st_size
        # Writable and private, as ctypes takes the address of nothing else.
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view,
        ):
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            first = ctypes.c_char.from_buffer(view)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
            del first  # a view that is in use cannot be closed
        if failed:
            raise OSError(f"mincore of {path}: {os.strerror(ctypes.get_errno())}")
        cached += sum(page & 1 for page in pages)
        total += len(pages)
    return cached / total


# ---- kernels --------------------------------------------------------------------------------------------------------


def make_ready(model: str, arch: str, kernel_set: str) -> Row:
    """In this process: every kernel of the closed set compiled, or loaded where a set is named."""
    start = time.perf_counter()
    from cutedsl import compile as compiler
    from cutedsl import deployment

    sizes = [int(size) for size in TP.split(",")]
    variants = deployment.variants(deployment.deployment(deployment.find_model(model), sizes, arch))
    imported = time.perf_counter()
    if kernel_set:
        compiler.use(kernel_set)
    used = time.perf_counter()
    for variant in variants:
        variant.compiled(variant.config, line_info=False)
    done = time.perf_counter()
    counters = compiler.counters()
    if kernel_set and counters.compilations:
        raise RuntimeError(f"{counters.compilations} kernels are not in {kernel_set}: build it for {model} and {arch}")
    return {
        "kernels": len(variants), "import_s": imported - start, "open_set_s": used - imported,
        "kernels_s": done - imported,
    }  # fmt: skip


def measure_kernels(variant: Variant, args: argparse.Namespace) -> Row:
    """`make_ready` in a process of its own."""
    command = [sys.executable, __file__, "--child", "--model", args.model, "--arch", args.arch]
    command += ["--set", str(args.set)] if variant.how == "aot" else []
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, os.times()
    if done.returncode:
        sys.exit(f"warm_start: {' '.join(command)} failed:\n{done.stderr[-4000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": seconds, "cpu_s": cpu}


# ---- a server -------------------------------------------------------------------------------------------------------


def measure_server(variant: Variant, args: argparse.Namespace) -> Row:
    """A server from its start to ready, and to the first token of the first request."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NVFP4_")}
    if variant.how == "aot":
        environment["NVFP4_AOT_DIR"] = str(args.set)
    command = [sys.executable, "-m", "vllm_nvfp4.cli", "serve", str(args.checkpoint), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "4096", "--max-num-seqs", "8"]
    with tempfile.TemporaryFile() as log:
        before, start = os.times(), time.perf_counter()
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            ready = wait_until_ready(server, port, start)
            token = first_token(f"http://127.0.0.1:{port}/v1/completions", str(args.checkpoint), start)
        except (RuntimeError, OSError) as error:
            log.seek(0)
            sys.exit(f"warm_start: {error}:\n{log.read().decode(errors='replace')[-4000:]}")
        finally:
            stop(server)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"ready_s": ready, "first_token_s": token, "cpu_s": cpu}


def wait_until_ready(server: subprocess.Popen[bytes], port: int, start: float) -> float:
    """Seconds from start until /health answered 200.

    Raises: RuntimeError - the server ended, or START_LIMIT_S passed.
    """
    while time.perf_counter() - start < START_LIMIT_S:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            if answer.status == 200:
                return time.perf_counter() - start
        time.sleep(0.05)
    raise RuntimeError(f"not ready in {START_LIMIT_S} s")


def first_token(url: str, model: str, start: float) -> float:
    """Seconds from start until the first token of a streamed answer.

    Raises: RuntimeError - the answer has none.
    """
    body = {"model": model, "prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=START_LIMIT_S) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                return time.perf_counter() - start
    raise RuntimeError("the first answer has no token")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(timeout=STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# ---- the run --------------------------------------------------------------------------------------------------------

MEASURE: dict[str, Callable[[Variant, argparse.Namespace], Row]] = {
    "kernels": measure_kernels,
    "server": measure_server,
}


def run(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each variant and round."""
    names = [args.only] if args.only else list(MEASURE)
    variants = [Variant(name, how, cache) for name in names for how in ("jit", "aot") for cache in ("warm", "cold")]
    files = files_of_a_start([args.set, args.checkpoint])
    for i in range(args.rounds):
        turn = i % len(variants)
        for variant in variants[turn:] + variants[:turn]:
            (warm if variant.cache == "warm" else evict)(files)
            share, load = cached_share(files), os.getloadavg()[0]
            measured = {key: round(value, 4) for key, value in MEASURE[variant.name](variant, args).items()}
            yield {
                "row": variant.name, "how": variant.how, "cache": variant.cache, "round": i, **measured,
                "cached_share": round(share, 3), "load_average": round(load, 1),
            }  # fmt: skip


def ratios(rows: list[Row]) -> Iterator[Row]:
    """Medians of compiled over loaded, of each measured time."""
    for name, keys in (
        ("kernels", ("kernels_s", "process_s", "cpu_s")),
        ("server", ("ready_s", "first_token_s", "cpu_s")),
    ):
        for cache in ("warm", "cold"):
            of = {how: [row for row in rows if (row["row"], row["how"], row["cache"]) == (name, how, cache)]
                  for how in ("jit", "aot")}  # fmt: skip
            if of["jit"]:
                median = {(how, key): statistics.median(row[key] for row in of[how]) for how in of for key in keys}
                found = {key: round(median["jit", key] / median["aot", key], 3) for key in keys}
                yield {"row": f"{name}: jit over aot", "cache": cache, **found}


def facts() -> Row:
    """What every row needs to mean something later."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu[1] if cpu else None, "cores": os.cpu_count(), "python": platform.python_version(),
        "commit": commit.stdout.strip(), "command": "python scripts/bench/warm_start.py",
    }  # fmt: skip


def main() -> None:
    """Build what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="deepseek-v4-pro")
    parser.add_argument("--arch", default="sm_100a")
    parser.add_argument("--set", type=Path, help="of kernels built ahead of time; built if not named")
    parser.add_argument("--only", choices=list(MEASURE))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(make_ready(args.model, args.arch, str(args.set or ""))))
        return
    with tempfile.TemporaryDirectory() as name:
        if args.set is None:
            args.set = Path(name) / "set"
            build = [sys.executable, "-m", "cutedsl.aot", "build", "--model", args.model, "--arch", args.arch]
            subprocess.run([*build, "--tp", TP, "--out", str(args.set)], check=True, stdout=sys.stderr)
        args.checkpoint = Path(name) / "checkpoint"
        make = [sys.executable, str(ROOT / "scripts" / "make_tiny_checkpoint.py"), str(args.checkpoint)]
        subprocess.run(make, check=True, stdout=sys.stderr)
        rows, about = [], facts()
        for row in run(args):
            rows.append(row)
            print(json.dumps(row | about), flush=True)
        for row in ratios(rows):
            print(json.dumps(row | about), flush=True)


if __name__ == "__main__":
    main()
