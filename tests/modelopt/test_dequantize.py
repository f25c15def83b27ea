"""The golden digests of tests/data, computed by ModelOpt again: `make test-modelopt`, in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_golden_digests_are_modelopts() -> None:
    python = os.environ["NVFP4_MODELOPT_PYTHON"]  # set by `make test-modelopt`
    script, folder = ROOT / "scripts" / "dequantize_with_modelopt.py", ROOT / "tests" / "data" / "affine-a"
    done = subprocess.run([python, str(script), str(folder)], capture_output=True, text=True, check=True)
    golden = json.loads((ROOT / "tests" / "data" / "affine-a-dequantized.json").read_text())
    assert json.loads(done.stdout) == golden
