"""An attention layer with its linears that share inputs, as far as shared_input.py and attention.py look at it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm_nvfp4 import platform
from vllm_nvfp4.attention import Nvfp4AttentionMixin, Nvfp4IndexerMixin, finish, input_linears
from vllm_nvfp4.linear import Nvfp4RunnerLinearKernel
from vllm_nvfp4.shared_input import SharedInput, join

from cutedsl.quantize import quantize_weight
from cutedsl.reference.linear import linear_fp32
from cutedsl.runners.linear import LinearRunner

K = 256
# wq_a and wkv; the compressor's wkv and wgate; weights_proj; the indexer's compressor. In the order of upstream's streams.
SHARDS = ((64, 32), (32, 32), (8,), (16, 16))
# Shards have a weight_scale_2 each, and one input_scale, unless a test says otherwise.
INPUT_SCALE = 4 / 2688
MAX_TOKENS = 200


def serve_with(backend: str | None, activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a backend serve; the reference joins as a GPU's backends do."""
    monkeypatch.setattr(platform, "backend", lambda: backend)
    monkeypatch.setattr(platform, "activations", lambda: activations)
    monkeypatch.setitem(platform.CAPABILITY_OF, "reference", (0, 0))


class Linear(torch.nn.Module):
    """An NVFP4 linear of vLLM with our kernel, loaded."""

    def __init__(self, name: str, shards: tuple[int, ...], seed: int, returns_bias: bool, k: int = K) -> None:
        super().__init__()
        self.prefix, self.logical_widths, self.returns_bias = f"layer.{name}", list(shards), returns_bias
        generator = torch.Generator().manual_seed(seed)
        packed = quantize_weight(torch.randn(sum(shards), k, generator=generator))
        scale_2 = packed.weight_scale_2 * torch.rand(len(shards), generator=generator).add(0.5)
        self.values = {"weight": packed.weight, "weight_scale": packed.weight_scale, "weight_scale_2": scale_2}
        self.values["input_scale"] = torch.full((len(shards),), INPUT_SCALE)
        for leaf, value in self.values.items():
            setattr(self, leaf, torch.nn.Parameter(torch.zeros_like(value), requires_grad=False))
        # Its constructor asks whether the platform has it.
        self.quant_method: Any = SimpleNamespace(kernel=object.__new__(Nvfp4RunnerLinearKernel))

    def load(self) -> None:
        """What vLLM's loaders do, and its step after the load."""
        for leaf, value in self.values.items():
            getattr(self, leaf).data.copy_(value)
        self.quant_method.kernel.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.quant_method.kernel.apply_weights(self, x)
        return (y, None) if self.returns_bias else y

    def exact(self, x: torch.Tensor, activations: str) -> torch.Tensor:
        """The answer in FP32, of this linear alone."""
        values = {leaf: value.clone() for leaf, value in self.values.items()}
        runner = LinearRunner("alone", **values, shard_sizes=self.logical_widths, activations=activations)
        return linear_fp32(x, runner.matrix)


class Unquantized(torch.nn.Module):
    """A linear in BF16."""

    def __init__(self, rows: int, returns_bias: bool) -> None:
        super().__init__()
        weight = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).bfloat16()
        self.weight, self.returns_bias = torch.nn.Parameter(weight, requires_grad=False), returns_bias
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.nn.functional.linear(x, self.weight)
        return (y, None) if self.returns_bias else y


class UpstreamIndexer(torch.nn.Module):
    """What ours stands in front of."""

    def _wq_b_proj(self, qr: torch.Tensor, qr_scale: torch.Tensor | None = None) -> torch.Tensor:
        assert qr_scale is None
        return self.wq_b(qr)[0]


class Indexer(Nvfp4IndexerMixin, UpstreamIndexer):
    """An indexer with the overlay."""


class UpstreamAttention(torch.nn.Module):
    """What ours stands in front of; without norms."""

    def _fused_wqa_wkv_gemm(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused_wqa_wkv(x)[0]

    def _split_qkv_and_norm(self, qr_kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        qr, kv = qr_kv.split(SHARDS[0], dim=-1)
        return qr.contiguous(), None, kv.contiguous()

    def _wq_b_proj(self, qr: torch.Tensor, qr_scale: torch.Tensor | None = None) -> torch.Tensor:
        assert qr_scale is None
        return self.wq_b(qr)


class Attention(Nvfp4AttentionMixin, UpstreamAttention):
    """A layer of ratio 4 on one stream."""

    def __init__(self) -> None:
        super().__init__()
        names = (
            "fused_wqa_wkv",
            "compressor.fused_wkv_wgate",
            "indexer.weights_proj",
            "indexer.compressor.fused_wkv_wgate",
        )
        first, main, weights, index = (
            Linear(name, shards, seed, returns_bias=place in (0, 2))
            for seed, (place, name, shards) in enumerate(zip(range(4), names, SHARDS, strict=True))
        )
        self.prefix, self.fused_wqa_wkv = "layer", first
        self.compressor = torch.nn.Module()
        self.compressor.fused_wkv_wgate = main
        self.indexer = Indexer()
        self.indexer.weights_proj = weights
        self.wq_b = Linear("wq_b", (48,), 4, returns_bias=False, k=SHARDS[0][0])
        self.indexer.wq_b = Linear("indexer.wq_b", (32,), 5, returns_bias=True, k=SHARDS[0][0])
        self.max_num_batched_tokens = MAX_TOKENS
        self.indexer.compressor = torch.nn.Module()
        self.indexer.compressor.fused_wkv_wgate = index
        self.aux_stream_list, self.ln_events = None, [None] * 4
        self.rotary_emb = SimpleNamespace(cos_sin_cache=torch.zeros(1))
        self.wo_a = SimpleNamespace(quant_method=None)

    def serve(self) -> SharedInput | None:
        """Join, load and finish, as the model does."""
        linears = input_linears(self)
        self.nvfp4_shared_input = join("layer.input_projections", linears)
        for linear in linears:
            if isinstance(linear, Linear):
                linear.load()
        for linear in (self.wq_b, self.indexer and self.indexer.wq_b):
            if linear is not None:
                linear.load()
        finish(self)
        return self.nvfp4_shared_input

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The four results in the order of `input_linears`."""
        qr_kv, main, index, weights = self._run_parallel_input_projections(x)
        return [qr_kv, main, weights, index]

    def queries(self, qr_kv: torch.Tensor) -> list[torch.Tensor]:
        """What wq_b and the indexer's wq_b give."""
        qr, qr_scale, _ = self._split_qkv_and_norm(qr_kv)
        return [self._wq_b_proj(qr, qr_scale), self.indexer._wq_b_proj(qr, qr_scale)]
