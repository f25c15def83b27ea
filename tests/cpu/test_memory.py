"""Loading holds nothing twice: the peak of host memory stays within a tenth of the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint

pytestmark = pytest.mark.engine

# Of the weights of the rank; what a tensor takes between disk and parameter is in it.
LIMIT = 1.1
# Large enough that what a process allocates besides (thread stacks, Python's own) is small against a tenth.
SPEC = TinySpec(hidden=1024, intermediate=1024, experts=64, topk=6, heads=16, q_lora=512, o_lora=256, o_groups=2, shards=4)


def test_peak_of_loading(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "memory.json"
    make_tiny_checkpoint(model, SPEC)
    script = Path(__file__).with_name("memory_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(out)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = json.loads(out.read_text())
    print(found)
    assert found["weights_bytes"] > 400e6
    assert found["peak_bytes"] <= LIMIT * found["weights_bytes"], found
    # And a load that was measured: the weights are really resident.
    assert found["after_bytes"] >= 0.9 * found["weights_bytes"], found
