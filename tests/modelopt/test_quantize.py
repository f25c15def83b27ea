"""quantize_weight against ModelOpt itself: `make test-modelopt`, in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import make_quantize_golden
import pytest

from cutedsl.quantize import dequantize, quantize_weight

ROOT = Path(__file__).resolve().parents[2]


def modelopt_entries(seed: int) -> dict[str, dict[str, str]]:
    python = os.environ["NVFP4_MODELOPT_PYTHON"]  # set by `make test-modelopt`
    command = [python, str(ROOT / "scripts" / "make_quantize_golden.py"), "--seed", str(seed)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_golden_data_is_modelopts() -> None:
    golden = json.loads((ROOT / "tests" / "data" / "quantize_golden.json").read_text())
    found = modelopt_entries(seed=0)
    # Elsewhere the bits of a NaN depend on the processor.
    defined = [case.name for case in make_quantize_golden.cases() if case.is_defined]
    assert {name: found[name] for name in defined} == {name: golden[name] for name in defined}
    assert set(found) == set(golden)


@pytest.mark.parametrize("seed", [1, 20261120])
def test_other_tensors_than_the_stored_ones_agree_too(seed: int) -> None:
    expected = modelopt_entries(seed)
    golden = json.loads((ROOT / "tests" / "data" / "quantize_golden.json").read_text())
    random_names = [name for name in golden if name.startswith(("random", "spread", "model"))]
    # The seed is used: no random tensor is one that is stored.
    assert all(expected[name]["input"] != golden[name]["input"] for name in random_names)
    for case in make_quantize_golden.cases(seed):
        if case.is_defined:
            x = case.make()
            packed = quantize_weight(x, case.weight_scale_2)
            assert make_quantize_golden.entry(x, *packed, dequantize(*packed)) == expected[case.name], case.name
