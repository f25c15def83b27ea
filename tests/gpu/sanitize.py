"""Every kernel a few times on small shapes, for compute-sanitizer, which is far too slow for the suite.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py

Without PyTorch's cache every tensor is an allocation of its own, so that memcheck sees where it ends.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpu_kit
import torch
from test_runners import KINDS, OPS, built

from cutedsl import compile as compiler
from cutedsl.ops import registry

# Each kernel's narrow and wide tiles, whole and in part.
TOKENS = (1, 7, 40, 200)
Call = tuple[str, Callable[[], torch.Tensor]]


def runner_calls() -> Iterator[Call]:
    """Every kind of runner in every mode: all kernels but the quantizers to codes on Hopper."""
    for mode in gpu_kit.modes():
        for kind, (make, arguments, inputs) in KINDS.items():
            runner = built(make, arguments(), mode)
            for tokens in TOKENS:
                given = inputs(tokens, 1)
                yield f"{kind} {mode} m={tokens}", lambda: getattr(OPS, kind)(*given, runner.runner_id)  # noqa: B023
            registry.clear()


def code_calls() -> Iterator[Call]:
    """Quantization to codes, which no runner needs on Hopper."""
    from cutedsl.kernels import quantize_sm90

    for tokens in TOKENS:
        x = gpu_kit.random_x(1, tokens, 256)
        codes = torch.zeros(tokens, 128, dtype=torch.uint8, device=x.device)
        scales = torch.zeros(-(-tokens // 128) * 128, 16, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn)

        def call() -> torch.Tensor:
            quantize_sm90.quantize(x, gpu_kit.input_scales(1, 1), codes, scales)  # noqa: B023
            return scales.float()  # noqa: B023

        yield f"quantize codes m={tokens}", call


def main() -> int:
    """Runs the calls whose names contain what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="", help="part of a name, such as moe")
    only = parser.parse_args().only
    if gpu_kit.capability() not in gpu_kit.CAPABILITIES:
        parser.error(f"compute capability {gpu_kit.capability()}, expected one of {sorted(gpu_kit.CAPABILITIES)}")
    if directory := os.environ.get("NVFP4_AOT_DIR"):
        compiler.use(directory)
    done = 0
    # One after another: a call is good until the next one is asked for.
    for name, call in itertools.chain(runner_calls(), code_calls() if gpu_kit.backend() == "sm90" else ()):
        if only not in name:
            continue
        y = call()
        torch.cuda.synchronize()
        assert torch.isfinite(y).all(), f"{name}: NaN or infinity"
        gpu_kit.assert_no_sums_left()
        print(f"ok {name}", flush=True)
        done += 1
    print(f"{done} calls on {torch.cuda.get_device_name()}, {compiler.counters()}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
