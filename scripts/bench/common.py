"""What benchmarks of GPU operators share: facts of the machine, its ceilings, fair timing, errors, rows and a table.

The hard part is a number that still means something later. Every variant is checked before it is timed. Variants run one
after another in every round, so that clocks and neighbours disturb all alike. What is timed is a replay of a CUDA graph of
several calls, begun while the GPU is still busy with something else, so that no launch from the host is in it. The L2 is
cold: the calls of a graph have operands of their own, together several times the L2, so nothing has to be flushed. Ceilings
are measured on the same GPU in the same process.

On a CPU the same code runs without graphs: a rehearsal of the benchmark, not a measurement.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Call = Callable[[], torch.Tensor]
T = TypeVar("T")
# A graph's operands are at least this many times the L2.
COLD = 4
# Cycles, about half a millisecond: the host puts the events and the graph into the queue meanwhile.
SPIN_CYCLES = 1_000_000
COPY_BYTES = 1 << 31
MATMUL_SIZE = 8192
# Of a right answer: ||y - exact|| / ||exact|| of all rows together, and of the worst row. One rounding to BF16 is 2e-3;
# values between two GEMMs that are quantized, or rounded to BF16, once more move single rows by up to 3e-2.
MAX_RELATIVE, MAX_WORST_ROW = 1e-2, 5e-2


class Errors(NamedTuple):
    """How far an answer is from the exact one: over all rows, of the worst row; and their cosine."""

    relative: float
    worst_row: float
    cosine: float

    @property
    def ok(self) -> bool:
        """Within MAX_RELATIVE and MAX_WORST_ROW; a NaN is not."""
        return self.relative <= MAX_RELATIVE and self.worst_row <= MAX_WORST_ROW


def errors(y: torch.Tensor, exact: torch.Tensor) -> Errors:
    """Errors of y (rows, columns) against fp32 of the same shape."""
    found, exact = y.double(), exact.double()
    off, size = (found - exact).norm(dim=1), exact.norm(dim=1).clamp(min=1e-30)
    cosine = (found * exact).sum() / (found.norm() * exact.norm()).clamp(min=1e-30)
    return Errors(float(off.norm() / size.norm()), float((off / size).max()), float(cosine))


class Failures(dict[str, str]):
    """The first line of the error of each peer that failed, by name. Such a peer ends only itself."""

    def attempt(self, name: str, action: Callable[[], T]) -> T | None:
        """What action returns; None if it fails, or this peer failed before. Errors of what is no peer are raised."""
        if name in self:
            return None
        try:
            return action()
        except Exception as error:
            if name not in PEERS:
                raise
            self[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            return None

    def attempt_all(self, variants: Sequence["Variant"], action: Callable[["Variant"], T]) -> dict[str, T]:
        """What action returns for each variant that does not fail."""
        found = {variant.name: self.attempt(variant.name, functools.partial(action, variant)) for variant in variants}
        return {name: value for name, value in found.items() if value is not None}


def answer(call: Call) -> torch.Tensor:
    """What a call gives where, as far as the allocator hands out the same memory again, NaN stood before."""
    call().fill_(float("nan"))
    return call()


# ---- timing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to compute the same thing.

    Attributes:
        name: of the rows.
        calls: what a graph holds; each has operands of its own.
    """

    name: str
    calls: Sequence[Call]


def num_copies(call_bytes: int, device: torch.device, most: int = 64) -> int:
    """Calls in a graph such that their operands are COLD times the L2."""
    if device.type != "cuda":
        return 2
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(most, max(1, math.ceil(COLD * l2_bytes / call_bytes)))


def recorded(variant: Variant, device: torch.device) -> Callable[[], object]:
    """A replay of all calls of a variant, each of which has run once before."""
    if device.type != "cuda":
        return lambda: [call() for call in variant.calls]
    # One stream for all: vLLM keeps locks of its kernels by stream, and would make new ones during the capture.
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in variant.calls:
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in variant.calls:
            call()
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def seconds(replay: Callable[[], object], device: torch.device) -> float:
    """One replay, by the GPU's clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        replay()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    variants: Sequence[Variant],
    rounds: int,
    device: torch.device,
    before: Callable[[int], None] = lambda number: None,
    failures: Failures | None = None,
) -> dict[str, list[float]]:
    """Seconds of a call of each variant in each round.

    Args:
        variants: run one after another in each round, in an order that rotates.
        rounds: counted; one more comes first.
        device: of the operands.
        before: called with a round's number before it; changes operands in place. Not timed.
        failures: of peers, which are left out; those are added whose calls cannot be recorded. None: that is an error.
    """

    def record(variant: Variant) -> Callable[[], object]:
        return recorded(variant, device)

    if failures is None:
        replays = {variant.name: record(variant) for variant in variants}
    else:
        replays = failures.attempt_all(variants, record)
    variants = [variant for variant in variants if variant.name in replays]
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        before(number)
        for i in range(len(variants)):
            which = (i + number) % len(variants)
            spent = seconds(replays[variants[which].name], device) / len(variants[which].calls)
            # The first round warms clocks and caches of instructions up.
            if number:
                times[variants[which].name].append(spent)
    return times


class Spread(NamedTuple):
    """Median and quartiles, in microseconds."""

    us: float
    low_us: float
    high_us: float


@functools.cache
def vllm_workspace(device: torch.device) -> None:
    """As vLLM's GPU worker begins: without it Marlin fills new locks with zeros in every call."""
    from vllm.v1.worker.workspace import init_workspace_manager

    init_workspace_manager(device)


def spread(times: Sequence[float]) -> Spread:
    """Median and quartiles of seconds."""
    quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    low, median, high = (round(value * 1e6, 2) for value in quarters)
    return Spread(median, low, high)


class Budget:
    """Seconds of wall time that a run may measure; None: any. What happens inside `preparing` is not counted."""

    def __init__(self, limit: float | None, whole: "Budget | None" = None) -> None:
        self._end = math.inf if limit is None else time.perf_counter() + limit
        self._whole = whole

    def left(self) -> float:
        """Seconds."""
        return self._end - time.perf_counter()

    def share(self, parts: int) -> "Budget":
        """The first of so many equal parts of what is left."""
        return Budget(self.left() / parts, self)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Imports, weights, compilers: a run that comes first on a machine must not measure less for them."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            budget: Budget | None = self
            while budget is not None:
                budget._end += time.perf_counter() - begun
                budget = budget._whole

    @property
    def spent(self) -> bool:
        """Nothing is left."""
        return self.left() <= 0


# ---- the machine ----------------------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """What this GPU does best, measured: bytes per second read or copied, FLOP per second of a BF16 matrix product."""

    hbm_bytes_per_s: float
    bf16_flop_per_s: float


def ceilings(device: torch.device, rounds: int = 7) -> Ceilings:
    """Of COPY_BYTES the faster of a copy, counted as read and written, and of a sum, and a product of random BF16 matrices of
    MATMUL_SIZE squared.

    The medians of so many rounds; tiny sizes on a CPU.
    """
    small = device.type != "cuda"
    num_bytes, size = (1 << 20, 128) if small else (COPY_BYTES, MATMUL_SIZE)
    source = torch.rand(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "sum": lambda: source.sum(), "matmul": lambda: a @ b}
    times = interleaved([Variant(name, [call]) for name, call in calls.items()], rounds, device)
    copy, total, matmul = (statistics.median(times[name]) for name in calls)
    return Ceilings(max(2 * num_bytes / copy, num_bytes / total), 2 * size**3 / matmul)


def facts(device: torch.device) -> dict[str, Any]:
    """What a number needs to be understood later: GPU, driver, versions, commit, command."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else f"none ({device})",
        "driver": _driver() if device.type == "cuda" else "none",
        "torch": torch.__version__,
        "commit": os.environ.get("COMMIT") or _output("git", "-C", str(Path(__file__).parent), "describe", "--always"),
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- rows -----------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a call must do at least: bytes of weights with their scales, all bytes, FLOP."""

    weight_bytes: float
    num_bytes: float
    flop: float


class Table:
    """Rows: each is written as a line of JSON when it is known, and all are printed as a table at the end.

    Args:
        common: fields of every row.
        limits: the shares in a row are of these.
        out: file that lines are added to; None: they are printed.
    """

    def __init__(self, common: Mapping[str, Any], limits: Ceilings, out: Path | None) -> None:
        self.limits, self.out, self.rows = limits, out, list[dict[str, Any]]()
        self._common = dict(common) | {
            "hbm_gb_per_s": round(limits.hbm_bytes_per_s / 1e9),
            "bf16_tflop_per_s": round(limits.bf16_flop_per_s / 1e12, 1),
        }

    def add(
        self,
        fields: Mapping[str, Any],
        times: Mapping[str, Sequence[float]],
        found: Mapping[str, Errors],
        work: Mapping[str, Work],
        failures: Mapping[str, str],
    ) -> None:
        """Adds a row for each variant: fields, its times, its errors, its rates, and how much faster it is than peers.

        For a peer that failed: fields and its error.
        """
        medians = {name: spread(values) for name, values in times.items()}
        for name, took in medians.items():
            per_s, error = took.us * 1e-6, found[name]
            row = dict(fields) | {"variant": name} | took._asdict() | {"rounds": len(times[name])}
            row |= {
                "weight_gb_per_s": round(work[name].weight_bytes / per_s / 1e9, 1),
                "of_hbm": round(work[name].num_bytes / per_s / self.limits.hbm_bytes_per_s, 3),
                "tflop_per_s": round(work[name].flop / per_s / 1e12, 1),
                "of_bf16": round(work[name].flop / per_s / self.limits.bf16_flop_per_s, 3),
            }
            row |= {key: float(f"{value:.3g}") for key, value in error._asdict().items() if key != "cosine"}
            row |= {"cosine": round(error.cosine, 6), "ok": error.ok}
            row |= {f"x_{peer}": round(medians[peer].us / took.us, 2) for peer in PEERS if peer in medians}
            self._append(row)
        for name, message in failures.items():
            self._append(dict(fields) | {"variant": name, "error": message})

    def _append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        line = json.dumps(row | self._common)
        if self.out is None:
            print(line, flush=True)
            return
        with self.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def print(self) -> None:
        """The table, a line each."""
        hbm, bf16 = self.limits.hbm_bytes_per_s / 1e12, self.limits.bf16_flop_per_s / 1e12
        print(f"{self._common['gpu']}, driver {self._common['driver']}: {hbm:.2f} TB/s, {bf16:.0f} BF16 TFLOP/s")
        heads = [*COLUMNS, *(f"x_{peer}" for peer in PEERS)]
        lines = [heads] + [[_cell(row.get(head, "")) for head in heads] for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        for line in lines:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))

    @property
    def wrong(self) -> list[str]:
        """Rows whose answer was not right, in words."""
        return [f"{row['shape']} m={row['m']} {row['variant']}" for row in self.rows if not row.get("ok", True)]

    @property
    def failed(self) -> list[str]:
        """The peers that failed, each once a shape, in words."""
        failed = [f"{row['shape']} {row['variant']}: {row['error']}" for row in self.rows if "error" in row]
        return list(dict.fromkeys(failed))


PEERS = ("marlin", "humming", "cublas")
COLUMNS = (
    "shape", "m", "variant", "us", "low_us", "high_us", "weight_gb_per_s", "of_hbm", "tflop_per_s", "of_bf16",
    "relative", "worst_row",
)  # fmt: skip


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- command line ---------------------------------------------------------------------------------------------------


# Adds the rows of one shape to a table; returns what there was no time for.
Measure = Callable[[str, argparse.Namespace, "Table", "Budget"], list[str]]


def main(
    description: str | None, ms: Sequence[int], peers: Sequence[str], known: Sequence[str], measure: Measure
) -> int:
    """A benchmark's command.

    Args:
        description: of the command.
        ms: numbers of tokens by default.
        peers: that can be asked for.
        known: names of shapes; what begins with a digit is a shape in itself.
        measure: see above.

    Returns:
        The exit code: 1 if an answer was wrong. A peer that failed is named, and does not change it.
    """
    args = _parse(_parser(description, ms, peers), peers, known)
    budget = Budget(args.seconds_budget)
    torch.manual_seed(0)
    table = Table(facts(args.device), ceilings(args.device), args.out)
    skipped = []
    for i, name in enumerate(args.shapes):
        skipped += measure(name, args, table, budget.share(len(args.shapes) - i))
    table.print()
    if skipped:
        print(f"not run, as the time was up: {', '.join(skipped)}")
    for failed in table.failed:
        print(f"FAILED PEER: {failed}", file=sys.stderr)
    if table.wrong:
        print(f"WRONG ANSWERS: {', '.join(table.wrong)}", file=sys.stderr)
    return 1 if table.wrong else 0


def _parser(description: str | None, ms: Sequence[int], peers: Sequence[str]) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--shapes", type=_words, help="names, or beginnings of names, with commas; default: all")
    found.add_argument("--m", type=_numbers, default=list(ms), help="numbers of tokens, with commas")
    found.add_argument("--rounds", type=int, default=9, help="default 9")
    found.add_argument("--seconds-budget", type=float, help="of measuring; an equal share for each shape")
    found.add_argument("--peers", type=_words, default=[], help=f"with commas, of {', '.join(peers)}; default none")
    found.add_argument("--provider", default="sm90", help="backend of our runners; default sm90")
    found.add_argument("--activations", type=_words, default=["bf16", "nvfp4"], help="default bf16,nvfp4")
    found.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default cuda")
    found.add_argument("--out", type=Path, help="file that rows are added to, a line of JSON each; default: printed")
    return found


def _parse(found: argparse.ArgumentParser, peers: Sequence[str], known: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked: what is misspelled must not be left out in silence."""
    args = found.parse_args()
    args.shapes = _shapes(found, args.shapes, known)
    args.peers = [name for name in args.peers if name != "none"]
    for label, given, choices in (("--peers", args.peers, peers), ("--activations", args.activations, MODES)):
        if unknown := sorted(set(given) - set(choices)):
            found.error(f"{label}: {', '.join(unknown)} is not one of {', '.join(choices)}")
    if args.rounds < 1 or min(args.m, default=0) < 1:
        found.error(f"--rounds is {args.rounds} and --m {args.m}, expected numbers of at least 1")
    if args.device.type == "cuda":
        if not torch.cuda.is_available():
            found.error("there is no CUDA GPU; --device cpu --provider reference rehearses on small shapes")
        # With a number, as tensors have it.
        args.device = torch.device("cuda", args.device.index or 0)
    return args


MODES = ("bf16", "nvfp4")


def _shapes(found: argparse.ArgumentParser, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """What is a shape in itself, and the known names that begin with one of those wanted; all known without any."""
    if wanted is None:
        return list(known)
    names = [start for start in wanted if start[0].isdigit()]
    for start in wanted:
        if start not in names and not any(name.startswith(start) for name in known):
            found.error(f"--shapes: no shape begins with {start!r}; known: {', '.join(known)}")
    return names + [name for name in known if any(name.startswith(start) for start in wanted)]


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]
