"""Time of NVFP4 linears of DeepSeek-V4 on a GPU: ours in both activation modes, vLLM's Marlin and Humming, and cuBLAS.

    python scripts/bench/linear.py --peers marlin,humming,cublas --out rows.jsonl
    python scripts/bench/linear.py --shapes pro.wqa_wkv --m 1,32,4096 --seconds-budget 60
    python scripts/bench/linear.py --device cpu --provider reference --shapes 128x256 --m 1,3 --rounds 2    # a rehearsal

Shapes are names below, beginnings of names, or NxK. How it is measured: `common`. Every call of a graph has its own
weight and its own input. The share of HBM counts weight, scales, input and output once; cuBLAS reads its weight in BF16,
3.6 times the bytes. Answers are compared with FP32 matrix products of the dequantized weight, and for W4A4 of the
dequantized activation. Humming compiles its kernels for every M (about 33) at the first call of a shape, which is not timed.
"""

import math
import sys
from types import SimpleNamespace
from typing import Any

import common
import torch

from cutedsl.ops import registry
from cutedsl.ops.linear import linear as linear_op
from cutedsl.quantize import PackedTensor, dequantize, quantize_activation, quantize_weight
from cutedsl.runners.linear import LinearRunner

# Source: cutedsl.deployment.MODELS, one rank; (n, k).
SHAPES = {
    "pro.wqa_wkv": (2048, 7168),
    # All that reads the input of a layer with a compressor, as served: joined.
    "pro.inputs_c4": (4672, 7168),
    "pro.inputs_c128": (3072, 7168),
    "pro.wq_b": (65536, 1536),
    "pro.wo_b": (7168, 16384),
    "pro.shared_l1": (6144, 7168),
    "pro.shared_l2": (7168, 3072),
    "flash.wqa_wkv": (1536, 4096),
    "flash.inputs_c4": (4160, 4096),
    "flash.inputs_c128": (2560, 4096),
    "flash.wq_b": (32768, 1024),
    "flash.wo_b": (4096, 8192),
    "flash.shared_l1": (4096, 4096),
    "flash.shared_l2": (4096, 2048),
}
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
PEERS = common.PEERS
# Tensor scale of inputs from a normal distribution: the largest of them are about 6.
INPUT_SCALE = 6 / 2688
# Bytes of code and block scale of a weight; of a BF16 number.
NVFP4_BYTES, BF16_BYTES = 9 / 16, 2
# Rows of an answer that are compared: the first and the last, and some between.
ROWS_COMPARED = 64


class Linear:
    """A weight of one shape in as many copies as a cold L2 takes, and everybody's calls of them.

    Args:
        n, k: of the weight.
        args: of the command line.
    """

    def __init__(self, n: int, k: int, args: Any) -> None:
        self.n, self.k, self.device, self.args = n, k, args.device, args
        self.weights = self._weights(common.num_copies(self._call_bytes("ours", 1), args.device))
        self.input_scale = torch.tensor([INPUT_SCALE], device=args.device)
        self.ours = {mode: [self._runner(packed, mode) for packed in self.weights] for mode in args.activations}
        num_dense = common.num_copies(self._call_bytes("cublas", 1), args.device)
        prepare = {
            "marlin": lambda: [_marlin(packed, n, k) for packed in self.weights],
            "humming": lambda: [_humming(packed, n, k) for packed in self.weights],
            "cublas": lambda: [dequantize(*packed).bfloat16() for packed in self.weights[:num_dense]],
        }
        self.failures = common.Failures()
        self.peers = {name: self.failures.attempt(name, prepare[name]) for name in PEERS if name in args.peers}

    def _call_bytes(self, name: str, m: int) -> int:
        weight = self.n * self.k * (BF16_BYTES if name == "cublas" else NVFP4_BYTES)
        return math.ceil(weight + m * (self.n + self.k) * BF16_BYTES)

    def _weights(self, copies: int) -> list[PackedTensor]:
        """One random matrix, quantized once; the copies have its rows in another order."""
        w = torch.randn(self.n, self.k, device=self.device) / self.k**0.5
        weight, scale, scale_2 = quantize_weight(w)
        scale = scale.view(torch.uint8)
        return [
            PackedTensor(weight.roll(i, 0), scale.roll(i, 0).view(torch.float8_e4m3fn), scale_2) for i in range(copies)
        ]

    def _runner(self, packed: PackedTensor, mode: str) -> LinearRunner:
        # Clones: a runner may prepare them in place.
        weight, scale = packed.weight.clone(), packed.weight_scale.clone()
        sizes = [self.n]
        scales = packed.weight_scale_2.reshape(1), self.input_scale
        return LinearRunner("bench", weight, scale, *scales, sizes, backend=self.args.provider, activations=mode)

    def variants(self, m: int) -> list[common.Variant]:
        """Everybody's calls for m tokens."""
        copies = common.num_copies(self._call_bytes("ours", m), self.device)
        xs = [torch.randn(m, self.k, device=self.device, dtype=torch.bfloat16) for _ in range(copies)]
        self.x = xs[0]

        def ours(x: torch.Tensor, runner: LinearRunner) -> common.Call:
            return lambda: linear_op(x, runner.runner_id)

        def vllm(x: torch.Tensor, layer: Any) -> common.Call:
            return lambda: layer.kernel.apply_weights(layer, x)

        def cublas(x: torch.Tensor, weight: torch.Tensor) -> common.Call:
            return lambda: torch.nn.functional.linear(x, weight)

        found = [
            common.Variant(f"ours {mode}", [ours(*pair) for pair in zip(xs, runners, strict=False)])
            for mode, runners in self.ours.items()
        ]
        for name, operands in self.peers.items():
            if operands is not None:
                call = cublas if name == "cublas" else vllm
                found.append(common.Variant(name, [call(*pair) for pair in zip(xs, operands, strict=False)]))
        return found

    def errors(self, variants: list[common.Variant]) -> dict[str, common.Errors]:
        """Of each variant's first call."""
        rows = torch.linspace(0, len(self.x) - 1, min(len(self.x), ROWS_COMPARED)).long().to(self.device)
        w = dequantize(*self.weights[0])

        def errors(variant: common.Variant) -> common.Errors:
            x = self.x[rows].float()
            if variant.name == "ours nvfp4":
                x = dequantize(*quantize_activation(x, self.input_scale), self.input_scale)
            return common.errors(common.answer(variant.calls[0])[rows], x @ w.t())

        return self.failures.attempt_all(variants, errors)

    def work(self, name: str, m: int) -> common.Work:
        """What a call of a variant must do."""
        weight = self._call_bytes(name, 0)
        return common.Work(weight, self._call_bytes(name, m), 2 * m * self.n * self.k)


def _humming(packed: PackedTensor, n: int, k: int) -> torch.nn.Module:
    """A layer as vLLM's Humming kernel wants it, prepared by vLLM: W4A16, which it makes of W4A4 on Hopper, too."""
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig
    from vllm.model_executor.kernels.linear.nvfp4.humming import HummingNvFp4LinearKernel

    supported, reason = HummingNvFp4LinearKernel.is_supported()
    if not supported:
        raise RuntimeError(reason)
    layer = torch.nn.Module()
    layer.weight = _parameter(packed.weight.clone())
    layer.weight_scale = _parameter(packed.weight_scale.clone())
    layer.weight_global_scale = _parameter(packed.weight_scale_2.clone())
    layer.output_partition_sizes = [n]
    layer.input_size_per_partition = k
    layer.params_dtype = torch.bfloat16
    layer.has_bias = False
    layer.kernel = HummingNvFp4LinearKernel(NvFp4LinearLayerConfig())
    layer.kernel.process_weights_after_loading(layer)
    return layer


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _marlin(packed: PackedTensor, n: int, k: int) -> SimpleNamespace:
    """A layer as vLLM's Marlin kernel wants it, prepared by vLLM."""
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig
    from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel

    common.vllm_workspace(packed.weight.device)
    layer = SimpleNamespace(
        kernel=MarlinNvFp4LinearKernel(NvFp4LinearLayerConfig()),
        weight=packed.weight.clone(),
        weight_scale=packed.weight_scale.clone(),
        weight_global_scale=packed.weight_scale_2.clone(),
        output_size_per_partition=n,
        input_size_per_partition=k,
        params_dtype=torch.bfloat16,
    )
    layer.kernel.process_weights_after_loading(layer)
    return layer


def sizes(name: str) -> tuple[int, int]:
    """(n, k) of a name, or of NxK."""
    if name in SHAPES:
        return SHAPES[name]
    n, k = map(int, name.split("x"))
    return n, k


def measure(name: str, args: Any, table: common.Table, budget: common.Budget) -> list[str]:
    """Adds the rows of one shape; returns what there was no time for."""
    n, k = sizes(name)
    with budget.preparing():
        operands = Linear(n, k, args)
    skipped: list[str] = []
    for m in args.m:
        if budget.spent:
            skipped.append(f"{name} m={m}")
            continue
        with budget.preparing():
            variants = operands.variants(m)
            found = operands.errors(variants)
        times = common.interleaved(variants, args.rounds, args.device, failures=operands.failures)
        work = {variant.name: operands.work(variant.name, m) for variant in variants}
        fields = {"bench": "linear", "shape": name, "m": m, "n": n, "k": k}
        table.add(fields, times, found, work, operands.failures)
    registry.clear()
    return skipped


if __name__ == "__main__":
    sys.exit(common.main(__doc__, MS, PEERS, list(SHAPES), measure))
