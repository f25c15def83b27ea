"""`nvfp4 layertest CHECKPOINT`: single layers of a checkpoint through our kernels, without the engine.

    nvfp4 layertest CHECKPOINT [--layers 0,2,30] [--tokens 1,64,512] [--backend reference] [--json]

Every NVFP4 operator of a layer is built as the engine builds it (linears with a common input each alone), given random
inputs of the calibrated size, and compared with FP32 matrix products of the dequantized tensors: cosine, worst row, and the
time of a call on warm caches. With NVFP4_WO_A=1 a wo_a in BF16 is quantized and tested too.

Exit codes: 0 all answers are right, 1 one is not or an operator was refused, 2 the checkpoint cannot be read, 64 the command
itself is wrong.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import torch

    from vllm_nvfp4.layertest_cases import Case, Checkpoint

WRONG, UNREADABLE, USAGE_ERROR = 1, 2, 64
TOKENS = (1, 64, 512)
MODES = {"reference": ("nvfp4", "bf16"), "sm90": ("bf16", "nvfp4"), "sm100": ("nvfp4",)}
# ||y - exact|| / ||exact|| of the worst token. One rounding to BF16 is at most 2^-8. Inside an expert values are quantized,
# or rounded, once more: a sum that differs in its last bit may fall on the other side of a boundary, which moves a row by
# 3e-2.
MAX_WORST_ROW = {"linear": 0.006, "wo_a": 0.006, "shared_expert": 0.05, "moe": 0.05}
MIN_COSINE = 0.999
# Calls that are timed, each alone; on a CPU no further ones after a while.
REPEATS, CPU_SECONDS = 5, 0.5


class _Parser(argparse.ArgumentParser):
    """Exits with USAGE_ERROR."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nvfp4 layertest",
        description="Runs single layers of a checkpoint through the NVFP4 kernels and compares them with FP32.",
        epilog="exit code: 0 right, 1 wrong or refused, 2 the checkpoint cannot be read, 64 wrong usage",
    )
    parser.add_argument("path", metavar="CHECKPOINT", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("--layers", type=_numbers, help="with commas; default: the first, one of the middle, the last")
    parser.add_argument("--tokens", type=_numbers, default=list(TOKENS), help="of a batch; default 1,64,512")
    parser.add_argument("--backend", choices=sorted(MODES), help="default: what fits the device")
    parser.add_argument("--activations", choices=MODES["reference"], help="default: all that the backend has")
    parser.add_argument("--max-worst-row", type=float, help=f"relative error; default by operator: {MAX_WORST_ROW}")
    parser.add_argument("--min-cosine", type=float, default=MIN_COSINE, help=f"default {MIN_COSINE}")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


class Errors(NamedTuple):
    """How far an answer is from the exact one."""

    cosine: float
    relative: float
    worst_row: float


def errors(y: "torch.Tensor", exact: "torch.Tensor") -> Errors:
    """Cosine, relative error of all rows together, and of the worst row; NaN where y has NaN."""
    found, exact = y.double(), exact.double()
    off, size = (found - exact).norm(dim=1), exact.norm(dim=1).clamp(min=1e-30)
    cosine = (found * exact).sum() / (found.norm() * exact.norm()).clamp(min=1e-30)
    return Errors(float(cosine), float(off.norm() / size.norm()), float((off / size).max()))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if min(args.tokens) < 1:
        parser.error(f"--tokens {args.tokens}: expected numbers of at least 1")
    # Imported once the flags are right: --help need not wait for torch.
    from vllm_nvfp4.layertest_cases import Checkpoint

    try:
        device, backend = _device(args.backend)
    except RuntimeError as error:
        parser.error(str(error))
    modes = MODES[backend] if args.activations is None else (args.activations,)
    if not set(modes) <= set(MODES[backend]):
        parser.error(f"--activations {args.activations}: {backend} has {', '.join(MODES[backend])} only")
    try:
        checkpoint = Checkpoint.open(args.path)
        layers = _layers(checkpoint, args.layers)
        report = _Report(args, str(device), backend)
        for layer in layers:
            _test_layer(report, checkpoint, layer, modes, device)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return UNREADABLE
    report.show()
    return 0 if report.ok else WRONG


def _device(backend: str | None) -> tuple["torch.device", str]:
    """The device, and the backend that was asked for or fits it.

    Raises: RuntimeError - there is none for this device, or another than was asked for.
    """
    import torch

    from vllm_nvfp4.platform import CAPABILITY_OF

    device, found, capability = torch.device("cpu"), "a machine without a CUDA GPU", None
    if torch.cuda.is_available():
        device, capability = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_capability()
        found = f"{torch.cuda.get_device_name()} (compute capability {capability[0]}.{capability[1]})"
    fitting = [name for name, needed in CAPABILITY_OF.items() if needed == capability]
    wanted = backend or (fitting[0] if fitting else "reference" if capability is None else None)
    if wanted is None or (wanted in CAPABILITY_OF and wanted not in fitting):
        needed = ", ".join(f"{name} for {major}.{minor}" for name, (major, minor) in CAPABILITY_OF.items())
        raise RuntimeError(
            f"no {wanted or 'NVFP4'} kernels for {found}; there are {needed}; or give --backend reference"
        )
    return device, wanted


def _layers(checkpoint: "Checkpoint", asked: list[int] | None) -> list[int]:
    """The layers to test.

    Raises: ValueError - one is not in the model.
    """
    count = checkpoint.config.num_hidden_layers
    layers = [0, count // 2, count - 1] if asked is None else asked
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside:
        raise ValueError(f"--layers: the checkpoint has layers 0 .. {count - 1}, found {outside[0]}")
    return list(dict.fromkeys(layers))


def _test_layer(
    report: "_Report", checkpoint: "Checkpoint", layer: int, modes: tuple[str, ...], device: "torch.device"
) -> None:
    """Adds the rows of a layer, an operator at a time: only one operator's tensors are held."""
    from cutedsl.ops import registry
    from vllm_nvfp4.layertest_cases import make_case, modules_of

    groups, others = modules_of(checkpoint, layer)
    report.skipped |= {module: str(form) for module, form in others.items()}
    for modules in groups:
        case = make_case(checkpoint, modules, device)
        for mode in modes:
            try:
                runner = case.runner(report.backend, mode)
            except (ImportError, TypeError, ValueError) as error:
                report.refuse(case, layer, mode, str(error))
                continue
            # The largest first: workspaces grow with it, and must not do so later, in a graph.
            for tokens in sorted(report.args.tokens, reverse=True):
                report.add(case, layer, mode, tokens, *_measure(report, case, runner, mode, tokens))
            registry.clear()


def _measure(report: "_Report", case: "Case", runner: Any, mode: str, tokens: int) -> tuple[Errors, float]:
    """Errors of one batch, and the median seconds of a call."""
    import torch

    op = getattr(torch.ops.nvfp4, case.kind)
    inputs = case.inputs(tokens, torch.Generator().manual_seed(report.args.seed + tokens))
    y = op(*inputs, runner.runner_id)
    # Once more where NaN stood, as far as the allocator hands out the same memory again.
    y.fill_(float("nan"))
    del y
    y = op(*inputs, runner.runner_id)
    rows = case.compared(tokens)
    found = errors(y[rows], case.exact(case.of_tokens(inputs, rows), rounded=mode == "nvfp4"))
    return found, _seconds(lambda: op(*inputs, runner.runner_id), case.device, graph=report.backend != "reference")


def _seconds(call: Callable[[], object], device: "torch.device", graph: bool) -> float:
    """Median of a call: by the GPU's clock on a GPU, there in a CUDA graph if the backend can."""
    import torch

    if device.type != "cuda":
        times: list[float] = []
        while len(times) < REPEATS and sum(times) < CPU_SECONDS:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    replay = call
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        replay = captured.replay
    spans = []
    for _ in range(REPEATS + 1):
        spans.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        spans[-1][0].record()
        replay()
        spans[-1][1].record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in spans[1:]) / 1e3


# ---- report ---------------------------------------------------------------------------------------------------------


class _Report:
    """Rows as they come, and the verdict."""

    def __init__(self, args: argparse.Namespace, device: str, backend: str) -> None:
        self.args, self.device, self.backend = args, device, backend
        self.rows: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}

    def add(self, case: "Case", layer: int, mode: str, tokens: int, found: Errors, seconds: float) -> None:
        """A row of one batch."""
        limit = MAX_WORST_ROW[case.kind] if self.args.max_worst_row is None else self.args.max_worst_row
        # Compared so that NaN is wrong.
        ok = found.worst_row <= limit and found.cosine >= self.args.min_cosine
        numbers = {name: float(f"{value:.6g}") for name, value in found._asdict().items()}
        row = self._about(case, layer, mode) | {"tokens": tokens, **numbers, "us": round(seconds * 1e6, 1), "ok": ok}
        self.rows.append(row)

    def refuse(self, case: "Case", layer: int, mode: str, message: str) -> None:
        """A row of an operator that could not be built."""
        self.rows.append(self._about(case, layer, mode) | {"error": message, "ok": False})

    def _about(self, case: "Case", layer: int, mode: str) -> dict[str, Any]:
        about = {"layer": layer, "module": case.module, "kind": case.kind, "shape": case.shape}
        return about | {"activations": mode}

    @property
    def ok(self) -> bool:
        """Everything is right, and there was something."""
        return bool(self.rows) and all(row["ok"] for row in self.rows)

    def show(self) -> None:
        """JSON, or a table with what was left out and what was wrong."""
        if self.args.json:
            about = {"checkpoint": str(self.args.path), "device": self.device, "backend": self.backend}
            print(json.dumps(about | {"ok": self.ok, "skipped": self.skipped, "rows": self.rows}, indent=1))
            return
        print(f"{self.args.path}: {self.backend} on {self.device}")
        heads = ("module", "activations", "tokens", "cosine", "worst_row", "us", "verdict")
        lines = [heads, *(self._line(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if self.skipped:
            print(
                f"not in NVFP4, so not tested: {', '.join(f'{name} ({form})' for name, form in self.skipped.items())}"
            )
        wrong = sum(not row["ok"] for row in self.rows)
        print(
            f"{len(self.rows) - wrong} of {len(self.rows)} right" if self.rows else "no module of these layers is NVFP4"
        )

    def _line(self, row: dict[str, Any]) -> tuple[str, ...]:
        about = row["module"], row["activations"]
        if "error" in row:
            return (*about, "", "", "", "", f"refused: {row['error']}")
        verdict = "ok" if row["ok"] else "WRONG"
        numbers = f"{row['cosine']:.6f}", f"{row['worst_row']:.2e}", f"{row['us']:.1f}"
        return (*about, str(row["tokens"]), *numbers, verdict)


if __name__ == "__main__":
    sys.exit(main())
