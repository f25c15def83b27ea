"""How long `nvfp4 doctor` takes on a checkpoint of DeepSeek-V4-Pro's size: one JSON line.

    python scripts/bench/doctor.py [--config tests/data/configs/deepseek-v4-pro.json]

The files are sparse: headers, global scales and sizes are those of an all-NVFP4 model, weights and block scales read as
zeros from no disk. So this is the doctor's own time; a disk adds what it takes to read the bytes that the report names.
"""

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_nvfp4 import architecture

ROOT = Path(__file__).resolve().parents[2]
NUM_SHARDS = 64
SCALE = struct.pack("<f", 2e-4)
# Canonical names in DeepSeek's spelling.
BARE = (
    ("model.layers.", "layers."), ("model.embed_tokens.", "embed."), ("lm_head.", "head."), ("model.norm.", "norm."),
    ("model.hc_head", "hc_head"), ("shared_experts.down_proj", "shared_experts.w2"),
    ("gate.e_score_correction_bias", "gate.bias"),
)  # fmt: skip


def bare(name: str) -> str:
    """A canonical name as DeepSeek spells it."""
    for old, new in BARE:
        name = name.replace(old, new)
    return name


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, str, list[int], int]]:
    """(name, dtype, shape, bytes) of everything in an all-NVFP4 export; wo_a stays BF16, as ModelOpt leaves it."""
    expected = architecture.expected(SimpleNamespace(**config))
    for module, (n, k) in expected.linears.items():
        name = bare(f"{module}.")
        if module.endswith(".wo_a"):
            yield f"{name}weight", "BF16", [n, k], 2 * n * k
            continue
        yield f"{name}weight", "U8", [n, k // 2], n * k // 2
        yield f"{name}weight_scale", "F8_E4M3", [n, k // 16], n * k // 16
        yield f"{name}weight_scale_2", "F32", [], 4
        yield f"{name}input_scale", "F32", [], 4
    for name, shape in expected.tensors.items():
        dtype, width = ("I64", 8) if name.endswith("tid2eid") else ("F32", 4)
        yield bare(name), dtype, list(shape), prod(shape) * width


def write(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """The checkpoint as sparse files; returns the number of tensors and of bytes."""
    (folder / "config.json").write_text(json.dumps(config))
    rows, weight_map, total = list(tensors(config)), {}, 0
    for shard in range(NUM_SHARDS):
        file_name = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        # Scalars first, so that only the start of a file is really written.
        part = sorted(rows[shard::NUM_SHARDS], key=lambda row: row[3])
        header, end = {}, 0
        for name, dtype, shape, num_bytes in part:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
            end += num_bytes
            weight_map[name] = file_name
        raw = json.dumps(header).encode()
        with open(folder / file_name, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw + SCALE * sum(row[3] == 4 for row in part))
            file.truncate(8 + len(raw) + end)
        total += end
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return len(rows), total


def main() -> None:
    """Write, examine in a process of its own, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "tests/data/configs/deepseek-v4-pro.json")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    config |= {
        "num_nextn_predict_layers": 0,
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    }
    with tempfile.TemporaryDirectory() as name:
        num_tensors, num_bytes = write(Path(name), config)
        started = time.perf_counter()
        command = [sys.executable, "-m", "vllm_nvfp4.cli", "doctor", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
    if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr:
        sys.exit(f"the doctor failed:\n{done.stderr}")
    read = re.search(r"read in ([\d.]+) s", done.stdout)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    row = {
        "tensors": num_tensors, "bytes": num_bytes, "seconds": round(seconds, 1),
        "reading_seconds": float(read[1]) if read else None, "cpu": cpu[1] if cpu else None,
        "commit": commit.stdout.strip(), "command": "python scripts/bench/doctor.py",
    }  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main()
