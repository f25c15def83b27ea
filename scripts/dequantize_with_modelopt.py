"""What NVIDIA ModelOpt makes of every NVFP4 tensor of a checkpoint: one SHA-256 a tensor, of its float32 bytes.

    .venv-modelopt/bin/python scripts/dequantize_with_modelopt.py CHECKPOINT > tests/data/affine-a-dequantized.json

The digests are golden data: tests without ModelOpt compare their own oracle with them, `make test-modelopt` compares them
with ModelOpt again.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file

BLOCK_SIZE = 16


def digests(folder: Path) -> dict[str, str]:
    """module -> SHA-256 of NVFP4QTensor.dequantize(...) in float32, row-major."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    found = {}
    for name in sorted(tensors):
        if not name.endswith(".weight_scale_2"):
            continue
        module = name.removesuffix(".weight_scale_2")
        packed = tensors[f"{module}.weight"]
        shape = torch.Size((packed.shape[0], packed.shape[1] * 2))
        quantized = NVFP4QTensor(shape, torch.float32, packed)
        values = quantized.dequantize(
            dtype=torch.float32,
            scale=tensors[f"{module}.weight_scale"],
            double_scale=tensors[name],
            block_sizes={-1: BLOCK_SIZE},
        )
        # + 0.0 makes every zero positive: ModelOpt's table has no negative zero, others keep the sign of code 8.
        found[module] = hashlib.sha256((values + 0.0).contiguous().numpy().tobytes()).hexdigest()
    return found


if __name__ == "__main__":
    print(json.dumps(digests(Path(sys.argv[1])), indent=0))
