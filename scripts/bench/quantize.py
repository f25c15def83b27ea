"""GB/s of our NVFP4 functions on a CPU, beside torch.clone, vLLM's pure-torch functions and ModelOpt's NVFP4QTensor.

    python scripts/bench/quantize.py --modelopt-python .venv-modelopt/bin/python

The hard part is a fair comparison on a machine that others use. Each round runs every implementation once, so that all
meet the same disturbances; medians are over rounds. ModelOpt lives in an environment of its own: a worker process there
makes the same tensor and waits in each round for its turn, while this process waits for it. Nothing is timed before
results agree: with ModelOpt bit for bit, with vLLM as far as it computes the same (it multiplies by reciprocals, so few
codes differ; and its quantizer returns values, not packed codes, which is less work than ours).

GB/s counts the bytes of the tensor that is not quantized, read or written, in every row, so that a row's number over that
of `clone` is its share of the limit. One JSON line a row.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

BLOCK_SIZE = 16
# Codes that may differ from vLLM's, as a fraction: values whose quotient is within rounding of a tie.
MAX_DIFFERENT = 1e-3


class Row(NamedTuple):
    """One timed function: what it computes, whose it is, and a call of it."""

    op: str
    implementation: str
    call: Callable[[], object]


def tensor(shape: tuple[int, int], dtype: str) -> torch.Tensor:
    """The operand; torch's CPU generator gives the same in both environments, and digests prove it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return x.to(getattr(torch, dtype))


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of the bytes of tensors."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def seconds(call: Callable[[], object]) -> float:
    """One call by the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def our_rows(w: torch.Tensor) -> tuple[list[Row], dict[str, str]]:
    """Rows of this repository and of torch.clone, and the digests that ModelOpt's results must have."""
    from cutedsl.quantize import dequantize, quantize_activation, quantize_weight, unscaled

    packed = quantize_weight(w)
    values = dequantize(*packed)
    rows = [
        Row("clone", "torch", w.clone),
        Row("clone fp32", "torch", values.clone),
        Row("quantize_weight", "ours", lambda: quantize_weight(w)),
        Row("quantize_activation", "ours", lambda: quantize_activation(w, packed.weight_scale_2)),
        Row("dequantize", "ours", lambda: dequantize(*packed)),
        Row("unscaled", "ours", lambda: unscaled(packed.weight, packed.weight_scale)),
    ]
    return rows, {"input": digest(w), "quantize_weight": digest(*packed), "dequantize": digest(values + 0.0)}


def vllm_rows(w: torch.Tensor) -> list[Row]:
    """vLLM's rows, after a comparison of their results with ours."""
    from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as theirs

    from cutedsl.quantize import dequantize, quantize_activation, quantize_weight, unscaled

    packed = quantize_weight(w)
    scale = packed.weight_scale_2
    values = theirs.dequantize_to_dtype(*packed, torch.float32, BLOCK_SIZE, False)
    if not torch.equal(values, dequantize(*packed)):
        raise SystemExit("vLLM's dequantize_to_dtype gives other values than dequantize")
    codes, block_sf = theirs.ref_nvfp4_quant(w, 1 / scale, BLOCK_SIZE)
    ours, our_sf = quantize_activation(w, scale)
    products = codes.unflatten(-1, (-1, BLOCK_SIZE)) * block_sf.unsqueeze(-1)
    different = (products.flatten(-2) != unscaled(ours, our_sf, torch.float32)).float().mean().item()
    if different > MAX_DIFFERENT:
        raise SystemExit(f"vLLM's ref_nvfp4_quant differs from quantize_activation in {different:.1%} of values")
    return [
        Row("quantize_activation", "vllm", lambda: theirs.ref_nvfp4_quant(w, 1 / scale, BLOCK_SIZE)),
        Row("dequantize", "vllm", lambda: theirs.dequantize_to_dtype(*packed, torch.float32, BLOCK_SIZE, False)),
    ]


def modelopt_worker(shape: tuple[int, int], dtype: str) -> None:
    """Prints digests, then, for each line read, the seconds of one quantize and one dequantize."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    w = tensor(shape, dtype)

    def quantize() -> tuple[NVFP4QTensor, torch.Tensor, torch.Tensor]:
        return NVFP4QTensor.quantize(w, BLOCK_SIZE)

    quantized, scale, scale_2 = quantize()

    def dequantize() -> torch.Tensor:
        return quantized.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: BLOCK_SIZE})

    packed = digest(quantized._quantized_data, scale, scale_2)
    found = {"input": digest(w), "quantize_weight": packed, "dequantize": digest(dequantize() + 0.0)}
    print(json.dumps(found), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"quantize_weight": seconds(quantize), "dequantize": seconds(dequantize)}), flush=True)


class ModelOpt:
    """The worker process; `round()` has it run each function once."""

    def __init__(self, args: argparse.Namespace, shape: tuple[int, int], expected: dict[str, str]) -> None:
        options = ["--worker", "--shape", "x".join(map(str, shape)), "--dtype", args.dtype[0]]
        command = [args.modelopt_python, __file__, *options, "--threads", str(args.threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        found = self._read()
        if found != expected:
            raise SystemExit(f"ModelOpt's results are not ours: {found}, expected {expected}")

    def round(self) -> dict[tuple[str, str], float]:
        """(op, "modelopt") -> seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return {(op, "modelopt"): value for op, value in self._read().items()}

    def close(self) -> None:
        """Ends the worker."""
        self.process.communicate()

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the ModelOpt worker ended with code {self.process.wait()}")
        return json.loads(line)


def measure(args: argparse.Namespace, shape: tuple[int, int], dtype: str) -> dict[tuple[str, str], list[float]]:
    """(op, implementation) -> seconds in each round."""
    w = tensor(shape, dtype)
    rows, expected = our_rows(w)
    rows += vllm_rows(w)
    worker = None
    if args.modelopt_python:
        worker = ModelOpt(argparse.Namespace(**{**vars(args), "dtype": [dtype]}), shape, expected)
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(-1, args.rounds):
        found = {(row.op, row.implementation): seconds(row.call) for row in rows}
        if worker:
            found.update(worker.round())
        if number >= 0:  # The first round warms up.
            for key, value in found.items():
                times.setdefault(key, []).append(value)
    if worker:
        worker.close()
    return times


def facts(args: argparse.Namespace) -> dict[str, object]:
    """What a number needs to be understood later: machine, threads, versions, commit, command."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "cpu": model[0] if model else "unknown",
        "threads": args.threads,
        "torch": torch.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "command": "python " + " ".join(sys.argv),
        "rounds": args.rounds,
    }


def report(args: argparse.Namespace, shape: tuple[int, int], dtype: str) -> None:
    """Measures and prints the rows of one shape and type."""
    times = measure(args, shape, dtype)
    medians = {key: statistics.median(values) for key, values in times.items()}
    for (op, implementation), values in times.items():
        is_fp32 = op in ("dequantize", "clone fp32") or dtype == "float32"
        num_bytes = shape[0] * shape[1] * (4 if is_fp32 else 2)
        median = medians[op, implementation]
        limit = medians["clone fp32" if is_fp32 else "clone", "torch"]
        low, _, high = statistics.quantiles(values, n=4)
        row = {
            "bench": "quantize",
            "op": op,
            "implementation": implementation,
            "shape": list(shape),
            "dtype": dtype,
            "gb_per_s": round(num_bytes / median / 1e9, 3),
            "of_clone": round(limit / median, 3),
            "ours_is_faster_by": round(median / medians[op, "ours"], 2) if (op, "ours") in medians else None,
            "median_us": round(median * 1e6),
            "quartiles_us": [round(low * 1e6), round(high * 1e6)],
            "min_us": round(min(values) * 1e6),
        }
        print(json.dumps(row | facts(args)), flush=True)


def parse_shape(text: str) -> tuple[int, int]:
    """NxK."""
    rows, columns = map(int, text.split("x"))
    return rows, columns


def main() -> None:
    """Runs the benchmark, or the worker in ModelOpt's environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=parse_shape, action="append", help="NxK; default: an expert, and a few tokens")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float32"], help="default: both")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--modelopt-python", help="interpreter of ModelOpt's environment; without it its rows are missing"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes, dtypes = args.shape or [(7168, 3072), (64, 7168)], args.dtype or ["bfloat16", "float32"]
    for shape in shapes:
        for dtype in dtypes:
            if args.worker:
                modelopt_worker(shape, dtype)
            else:
                report(args, shape, dtype)


if __name__ == "__main__":
    main()
