"""CPU seconds of the simulator: an NVFP4 GEMM of 1024 x 1024 x 4096, and FlashInfer's fused gather, SwiGLU, quantize kernel.

    python scripts/bench/ptxsim_speed.py [--rounds 5]

Results are checked before anything is timed. Seconds are of one thread's CPU (time.process_time, BLAS held to one thread),
so that other work on the machine does not count; compiling the kernel and generating code are not in them, as a test suite
pays for those once. The fused kernel needs `.conformance` (make .conformance/.stamp). One JSON line a row.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "sim")]

import ptxsim  # noqa: E402


def gemm() -> Callable[[], ptxsim.Report]:
    """cutedsl.kernels.linear_sm100, tile 128 x 128, two CTAs: 64 tiles of 16 steps."""
    import test_linear_sm100 as linear

    config = linear.largest_config(128, linear.ARCHS["sm_100a"])
    problem = linear.make_problem(1024, 1024, 4096)
    arguments = (*problem[:5], linear.torch.empty(1024, 1024, dtype=linear.torch.bfloat16))
    linear.run(config, problem, 2, "eager", 0)
    compiled = linear.linear_sm100.compiled(config)
    return lambda: ptxsim.run(compiled, *arguments, 2, outputs=arguments[-1:])


def fused() -> Callable[[], ptxsim.Report]:
    """FlashInfer's blockscaled_contiguous_gather_grouped_gemm_act_fusion, one CTA of 12 warps a tile, CI size."""
    from conformance import flashinfer_moe

    (case,) = (case for case in flashinfer_moe.CASES if case.name == "act-1cta")
    case.run("eager")
    call = case.prepare(0, False)
    return lambda: ptxsim.run(call.compiled, *call.args, outputs=call.outputs, memory=call.memory)


def _cpu() -> str:
    """The processor's name, where Linux says it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    """Runs the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    rows = {"nvfp4_gemm_1024x1024x4096": gemm(), "flashinfer_act_1cta": fused()}
    times: dict[str, list[float]] = {name: [] for name in rows}
    reports = {}
    for _ in range(options.rounds):
        for name, call in rows.items():
            start = time.process_time()
            reports[name] = call()
            times[name].append(time.process_time() - start)
    for name, seconds in times.items():
        ctas = reports[name].counters["ctas"]
        print(
            json.dumps(
                {
                    "row": name,
                    "seconds": round(statistics.median(seconds), 3),
                    "spread": [round(min(seconds), 3), round(max(seconds), 3)],
                    "seconds_per_cta": round(statistics.median(seconds) / ctas, 3),
                    "ctas": ctas,
                    "instructions": reports[name].counters["instructions"],
                    "cpu": _cpu(),
                    "python": platform.python_version(),
                    "commit": commit,
                    "command": "python scripts/bench/ptxsim_speed.py",
                }
            )
        )


if __name__ == "__main__":
    main()
