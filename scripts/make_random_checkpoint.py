"""Make a random DeepSeek-V4 checkpoint, its linears in NVFP4, with the layer shapes of V4-Pro: for memory and speed.

    python scripts/make_random_checkpoint.py OUT [--layers 4] [--experts 64] [--hidden 7168] [--heads 128] [--device cuda]

Names, configs and scales are those of scripts/make_tiny_checkpoint.py, layout L2, as ModelOpt exports a model in BF16.
Without --layers and --experts cut down it would be V4-Pro; 4 layers of 64 experts are about 11 GB.

The hard part is the time that this many numbers take to draw, quantize and write. Few matrices are quantized, on the
device; an expert is one of them with its rows in an order and with signs of its own, which changes codes and moves block
scales without a new quantization, and with a weight_scale_2 of its own. Each shard is written by a thread, tensor by
tensor to its place in the file, so that no shard is ever in memory.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

# A checkout need not be installed to be run; an installed cutedsl goes first.
sys.path += [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import make_tiny_checkpoint as tiny

from cutedsl.quantize import PackedTensor, quantize_weight

# V4-Pro: the first two layers compress by 128, then 4 and 128 alternate (tests/data/configs/deepseek-v4-pro.json).
FIRST_RATIOS, NEXT_RATIOS = (128, 128), (4, 128)
# Matrices of a kind that are drawn and quantized; experts are made of them.
NUM_BASES = 4
# What a real model is at random sizes too: of V4-Pro's config.json, beyond what a spec says.
PRO_CONFIG = {"dtype": "bfloat16", "routed_scaling_factor": 2.5}
SAFETENSORS_DTYPES = {
    torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64",
}  # fmt: skip
# One bit of each of a byte's two codes.
SIGNS = 0x88


def ratios(num_layers: int) -> tuple[int, ...]:
    """Compress ratios of the first layers of V4-Pro."""
    return (FIRST_RATIOS + NEXT_RATIOS * num_layers)[:num_layers]


def _opt(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RandomSpec:
    """What to make; the defaults are V4-Pro's shapes but for layers, experts and vocabulary. One field is one flag."""

    layers: int = _opt(4, "layers; their compress ratios are those of V4-Pro's first layers")
    experts: int = _opt(64, "routed experts")
    topk: int = _opt(6, "experts per token")
    hidden: int = _opt(7168, "hidden size, a multiple of 16")
    intermediate: int = _opt(3072, "width of an expert")
    heads: int = _opt(128, "query heads of 512")
    q_lora: int = _opt(1536, "rank of the query projection")
    o_groups: int = _opt(16, "groups of the output projection, dividing heads")
    o_lora: int = _opt(1024, "rank of the output projection, per group")
    index_heads: int = _opt(64, "heads of the indexer")
    index_topk: int = _opt(1024, "compressed entries a query keeps")
    hash_layers: int = _opt(1, "leading layers routed by token id")
    vocab: int = _opt(4096, "vocabulary")
    shards: int = _opt(16, "files, each written by a thread")
    seed: int = _opt(0, "same seed, flags and kind of device, same bytes")

    @property
    def tiny(self) -> tiny.TinySpec:
        """The same in the terms of make_tiny_checkpoint, checked.

        Raises: ValueError - a size is out of range.
        """
        if self.layers < 1:
            raise ValueError(f"layers is {self.layers}; expected at least 1")
        sizes = {f.name: getattr(self, f.name) for f in fields(self)}
        spec = tiny.TinySpec(**sizes | {"layers": ratios(self.layers)})
        spec.validate()
        return spec


@dataclass(frozen=True)
class Item(tiny.Item):
    """A weight of a model that was trained in BF16: what is not quantized is BF16, but for what always stays FP32."""

    def kind(self, spec: tiny.TinySpec) -> str:
        """Storage format."""
        found = super().kind(spec)
        return "BF16" if self.role in ("float", "wo_a") and found == "F32" else found


def plan(spec: tiny.TinySpec) -> list[list[tiny.Item]]:
    """Every item of the checkpoint, in groups that share a weight_scale_2."""
    return [[Item(**vars(item)) for item in group] for group in tiny.plan(spec)]


class Maker:
    """Draws and quantizes on a device; what is drawn depends on the seed and a name, never on the order of calls."""

    def __init__(self, spec: tiny.TinySpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self._bases: dict[tuple[int, ...], list[PackedTensor]] = {}
        # One at a time: temporaries of a large matrix are some GB.
        self._lock = threading.Lock()

    def tensors(self, group: list[tiny.Item]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the checkpoint, tensor on the CPU) of everything that a group of items becomes."""
        scale = self._shared_scale(group)
        for item in group:
            for value, (name, (dtype, shape)) in zip(
                self._values(item, scale), item.stored(self.spec).items(), strict=True
            ):
                assert tuple(value.shape) == shape, name
                yield tiny.rename(name, self.spec), value.to(dtype).contiguous().cpu()

    def _values(self, item: tiny.Item, scale: float | None) -> tuple[torch.Tensor, ...]:
        """What is stored of an item, in the order of item.stored()."""
        if item.kind(self.spec) != "NVFP4":
            return (self._draw(item),)
        packed = self._expert(item) if item.role == "expert" else self._linear(item, scale)
        # As in make_tiny_checkpoint: calibrated maxima of real exports.
        amax = 8.0 + 12.0 * self._uniform(item.shares[1] + ":amax")
        return (*packed, torch.tensor(amax / tiny.NVFP4_MAX))

    def _linear(self, item: tiny.Item, scale: float | None) -> PackedTensor:
        with self._lock:
            return quantize_weight(self._draw(item), weight_scale_2=scale)

    def _expert(self, item: tiny.Item) -> PackedTensor:
        """A base with rows in another order, half of them negated, times a number between 0.9 and 1.1."""
        with self._lock:
            bases = self._bases.get(item.shape) or self._quantize_bases(item)
        base = bases[_hash(self.spec, item.name) % len(bases)]
        g, n = self._cpu_generator(item.name), item.shape[0]
        order = torch.randperm(n, generator=g).to(self.device)
        signs = (torch.randint(2, (n, 1), generator=g) * SIGNS).to(torch.uint8).to(self.device)
        factor = 0.9 + 0.2 * self._uniform(item.shares[0] or item.name)
        return PackedTensor(base.weight[order] ^ signs, base.weight_scale[order], base.weight_scale_2 * factor)

    def _quantize_bases(self, item: tiny.Item) -> list[PackedTensor]:
        """Bases of a shape, with one weight_scale_2, as those of gate and up must be equal."""
        drawn = [
            self._normal(item.shape, f"base {i} {item.shape}").div_(math.sqrt(item.shape[1])) for i in range(NUM_BASES)
        ]
        scale = float(torch.stack([w.abs().amax() for w in drawn]).amax()) / tiny.NVFP4_MAX
        self._bases[item.shape] = [quantize_weight(w, weight_scale_2=scale) for w in drawn]
        return self._bases[item.shape]

    def _shared_scale(self, group: list[tiny.Item]) -> float | None:
        """The weight_scale_2 that several linears share, from the width of what is drawn; None for one alone.

        The largest of up to 1e8 normal numbers is below 6.5 deviations. A value beyond would saturate, by a little.
        """
        if len(group) == 1 or group[0].role == "expert":
            return None
        return 6.5 / math.sqrt(group[0].shape[1]) / tiny.NVFP4_MAX

    def _draw(self, item: tiny.Item) -> torch.Tensor:
        if item.role == "table":
            return tiny._draw(item, self.spec)
        std = item.shape[-1] ** -0.5 if item.std is None else item.std
        return self._normal(item.shape, item.name).mul_(std).add_(item.mean)

    def _normal(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        g = torch.Generator(self.device).manual_seed(_hash(self.spec, name))
        return torch.randn(shape, generator=g, device=self.device)

    def _uniform(self, name: str) -> float:
        return float(torch.rand((), generator=self._cpu_generator(name + ":uniform")))

    def _cpu_generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(_hash(self.spec, name))


def _hash(spec: tiny.TinySpec, name: str) -> int:
    digest = hashlib.sha256(f"{spec.seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def write_shard(file: Path, groups: list[list[tiny.Item]], maker: Maker) -> list[str]:
    """Write a safetensors file, each tensor to its place as soon as it is made; returns the names."""
    stored = {
        tiny.rename(name, maker.spec): kind
        for group in groups for item in group for name, kind in item.stored(maker.spec).items()
    }  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest first, as safetensors does: then every tensor is aligned.
    for name, (dtype, shape) in sorted(stored.items(), key=lambda entry: (-entry[1][0].itemsize, entry[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.flush()
        for group in groups:
            for name, tensor in maker.tensors(group):
                _write_at(f.fileno(), data + header[name]["data_offsets"][0], tensor)
    file.chmod(0o644)
    return list(stored)


def _write_at(descriptor: int, offset: int, tensor: torch.Tensor) -> None:
    """All bytes of a tensor; one call of the system may write less."""
    left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def make_random_checkpoint(out: Path, spec: RandomSpec, device: str = "cuda", overwrite: bool = False) -> str:
    """Write the checkpoint `spec` describes to the directory `out`, all of it or nothing.

    Args:
        out: directory to make; must be absent or empty, parents are made.
        spec: sizes and seed.
        device: where matrices are drawn and quantized.
        overwrite: replace `out` if it holds a checkpoint.

    Returns:
        One line: path, tensors, bytes of all files, seconds.

    Raises:
        ValueError: `spec` is not valid.
        OSError: `out` is taken, the disk is too small, or a write failed; nothing is left behind.
        RuntimeError: torch cannot use `device`.

    Numerics: drawn and quantized in fp32; other kinds of devices draw other numbers. Not graph-safe.
    """
    start, out, sizes = time.perf_counter(), out.resolve(), spec.tiny
    groups = plan(sizes)
    shards = tiny.split_into_shards(groups, sizes)
    tiny._check_target(out, overwrite, groups, sizes)
    maker = Maker(sizes, torch.device(device))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    with tiny._replacing(out, overwrite) as fresh:
        tiny._write_configs(fresh, sizes)
        tiny._write_json(fresh / "config.json", tiny.model_config(sizes) | PRO_CONFIG)
        with ThreadPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
            files = [pool.submit(write_shard, fresh / n, s, maker) for n, s in zip(names, shards, strict=True)]
            written = [file.result() for file in files]
        weight_map = {tensor: name for name, tensors in zip(names, written, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": tiny.num_bytes(groups, sizes)}, "weight_map": weight_map}
        tiny._write_json(fresh / "model.safetensors.index.json", index)
        size = sum(file.stat().st_size for file in fresh.iterdir())
    seconds = time.perf_counter() - start
    return f"{out}: {len(weight_map)} tensors, {size} bytes in {len(shards)} shards, {seconds:.2f} s on {device}"


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0 made, 1 could not be written, 2 bad flags, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Make a random DeepSeek-V4 checkpoint in NVFP4 with V4-Pro's shapes.")
    parser.add_argument("out", type=Path, help="directory to make")
    for f in fields(RandomSpec):
        parser.add_argument("--" + f.name.replace("_", "-"), type=int, default=f.default, **f.metadata)
    parser.add_argument("--device", default="cuda", help="where to draw and quantize, default cuda")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds a checkpoint")
    args = vars(parser.parse_args(argv))
    out, device, overwrite = args.pop("out"), args.pop("device"), args.pop("overwrite")
    try:
        print(make_random_checkpoint(out, RandomSpec(**args), device, overwrite))
    except ValueError as error:
        parser.error(str(error))
    except (OSError, RuntimeError, KeyboardInterrupt) as error:
        status, reason = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (1, error)
        print(f"{parser.prog}: error: {out} is not written: {reason}", file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
