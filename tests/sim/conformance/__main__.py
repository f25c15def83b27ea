"""Run conformance cases by hand: `python -m conformance [--arch sm_90a] [--policy lazy] [--seed 1] [--nightly] [names]`.

Prints a line for each case; `--json` prints one JSON object a line instead, which is how the tests run QuACK's cases.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from typing import Any

MODULES = {
    "flashinfer": ("flashinfer_moe", "flashinfer_dense", "flashinfer_rows"),
    "quack": ("quack_kernels",),
}


def main() -> int:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("names", nargs="*", help="cases; default: all of the package")
    parser.add_argument("--package", choices=sorted(MODULES), default="flashinfer")
    parser.add_argument("--arch", default="sm_100a")
    parser.add_argument("--policy", default="eager", help="comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nightly", action="store_true", help="larger sizes, and cases that CI leaves out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ["CUTE_DSL_ARCH"] = options.arch
    cases = [case for name in MODULES[options.package] for case in importlib.import_module(f"conformance.{name}").CASES]
    failed = 0
    for case in cases:
        if case.name not in options.names if options.names else case.nightly_only and not options.nightly:
            continue
        for policy in options.policy.split(","):
            result: dict[str, Any] = {"name": case.name, "policy": policy}
            start = time.perf_counter()
            try:
                report = case.run(policy, options.seed, options.nightly)
                result["instructions"] = report.counters.get("instructions", 0)
            except Exception as error:
                failed += 1
                result["error"] = f"{type(error).__name__}: {error}"
                if not options.json:
                    traceback.print_exc()
            result["seconds"] = round(time.perf_counter() - start, 2)
            line = f"{case.name} {policy}: {result.get('error', 'ok')} {result['seconds']} s"
            print(json.dumps(result) if options.json else line, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
