"""Time of DeepSeek-V4's routed experts in NVFP4 on a GPU: ours in both activation modes, vLLM's Marlin and Humming.

    python scripts/bench/moe.py --peers marlin,humming --out rows.jsonl
    python scripts/bench/moe.py --shapes flash --m 8,64,4096 --seconds-budget 60
    python scripts/bench/moe.py --device cpu --provider reference --shapes 64x32x8x2 --m 1,5 --rounds 2    # a rehearsal

Shapes are v4-pro and v4-flash whole on one GPU (beginnings will do), or HIDDENxINTERMEDIATExEXPERTSxTOP_K. How it is
measured: `common`. Tokens choose experts evenly and at random, anew in every round; every call of a graph has its own
choices and its own input, and already one token's experts are larger than the L2. From the choices to the weighted sum
everything is timed. Bytes are those of the experts that were chosen. Answers of a few tokens are compared with FP32 matrix
products of dequantized weights, and for W4A4 of dequantized activations. Humming compiles its kernels for every M (about
30) at the first call of a shape, which is not timed.
"""

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import common
import torch

from cutedsl.ops import registry
from cutedsl.ops.moe import moe as moe_op
from cutedsl.quantize import dequantize, quantize_activation, quantize_weight
from cutedsl.reference.swiglu import swiglu
from cutedsl.runners.moe import MoeRunner


class Shape(NamedTuple):
    """Sizes of a layer's routed experts."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int


# Source: cutedsl.deployment.MODELS.
SHAPES = {"v4-pro": Shape(7168, 3072, 384, 6), "v4-flash": Shape(4096, 2048, 256, 6)}
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
PEERS = ("marlin", "humming")
SWIGLU_LIMIT = 10.0
# Tensor scale of numbers from a normal distribution: the largest of them are about 6.
INPUT_SCALE = 6 / 2688
NVFP4_BYTES, BF16_BYTES = 9 / 16, 2
# Experts that are quantized; the others have their rows in another order.
NUM_BASES = 4
# Calls in a graph, for up to so many tokens: an average over choices where they matter.
CALLS = ((16, 8), (128, 4), (1024, 2), (1 << 30, 1))
TOKENS_COMPARED = 12


@dataclass
class Experts:
    """A layer's experts, as MoeRunner takes them."""

    w13_weight: torch.Tensor
    w13_weight_scale: torch.Tensor
    w13_weight_scale_2: torch.Tensor
    w13_input_scale: torch.Tensor
    w2_weight: torch.Tensor
    w2_weight_scale: torch.Tensor
    w2_weight_scale_2: torch.Tensor
    w2_input_scale: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, device: torch.device) -> "Experts":
        """All different, and of about the same size."""
        e, hidden, inter = shape.num_experts, shape.hidden, shape.intermediate
        w13, w13_scale, w13_scale_2 = _stack(e, 2 * inter, hidden, device)
        w2, w2_scale, w2_scale_2 = _stack(e, hidden, inter, device)
        inputs = torch.full((e,), INPUT_SCALE, device=device) * _spread(e, device)
        # vLLM's Marlin takes one scale for gate and up.
        first_scale_2, first_inputs = (scale.unsqueeze(1).repeat(1, 2) for scale in (w13_scale_2, inputs))
        return cls(w13, w13_scale, first_scale_2, first_inputs, w2, w2_scale, w2_scale_2, inputs.clone())

    def clone(self) -> dict[str, torch.Tensor]:
        """MoeRunner's arguments, for its own use."""
        return {name: tensor.clone() for name, tensor in vars(self).items()}

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(2I, H) and (H, I) fp32 of an expert."""
        first = dequantize(self.w13_weight[expert], self.w13_weight_scale[expert], self.w13_weight_scale_2[expert, 0])
        second = dequantize(self.w2_weight[expert], self.w2_weight_scale[expert], self.w2_weight_scale_2[expert])
        return first, second


def _spread(e: int, device: torch.device) -> torch.Tensor:
    return torch.rand(e, device=device) * 0.4 + 0.8


def _stack(e: int, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (E, n, k/2), block scales (E, n, k/16) and tensor scales (E,)."""
    weight = torch.empty(e, n, k // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(e, n, k // 16, dtype=torch.uint8, device=device)
    scale_2 = torch.empty(e, device=device)
    for base in range(min(NUM_BASES, e)):
        packed = quantize_weight(torch.randn(n, k, device=device) / k**0.5)
        scale_2[base::NUM_BASES] = packed.weight_scale_2
        for expert in range(base, e, NUM_BASES):
            weight[expert] = packed.weight.roll(expert, 0)
            scale[expert] = packed.weight_scale.view(torch.uint8).roll(expert, 0)
    return weight, scale.view(torch.float8_e4m3fn), scale_2 * _spread(e, device)


class Moe:
    """A layer's experts, everybody's preparation of them, and their calls.

    Args:
        shape: of the layer.
        args: of the command line.
    """

    def __init__(self, shape: Shape, args: Any) -> None:
        self.shape, self.args, self.device = shape, args, args.device
        self.experts = Experts.random(shape, args.device)
        prepare = {"marlin": lambda: _Marlin(self.experts, shape), "humming": lambda: _Humming(self.experts, shape)}
        self.failures = common.Failures()
        self.peers = {name: self.failures.attempt(name, prepare[name]) for name in PEERS if name in args.peers}
        self.ours = {
            mode: MoeRunner(
                "bench", **self.experts.clone(), swiglu_limit=SWIGLU_LIMIT, backend=args.provider, activations=mode
            )
            for mode in args.activations
        }

    def variants(self, m: int) -> list[common.Variant]:
        """Everybody's calls for m tokens."""
        count = next(calls for most, calls in CALLS if m <= most) if self.device.type == "cuda" else 1
        size, hidden = (m, self.shape.top_k), self.shape.hidden
        self.xs = [torch.randn(m, hidden, device=self.device, dtype=torch.bfloat16) for _ in range(count)]
        self.weights = [torch.rand(size, device=self.device) for _ in range(count)]
        self.ids = [torch.empty(size, dtype=torch.int32, device=self.device) for _ in range(count)]
        self.choose(0)
        self.hit: list[float] = []

        def ours(runner: MoeRunner, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> common.Call:
            return lambda: moe_op(x, weights, ids, runner.runner_id)

        def theirs(peer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> common.Call:
            return lambda: peer(x, weights, ids)

        inputs = list(zip(self.xs, self.weights, self.ids, strict=True))
        found = [
            common.Variant(f"ours {mode}", [ours(runner, *call) for call in inputs])
            for mode, runner in self.ours.items()
        ]
        found += [
            common.Variant(name, [theirs(peer, *call) for call in inputs])
            for name, peer in self.peers.items()
            if peer is not None
        ]
        return found

    def choose(self, number: int) -> None:
        """Other experts for every call, from a seed of each round; also the number of experts that a call reads."""
        generator = torch.Generator(self.device).manual_seed(number)
        for ids in self.ids:
            score = torch.rand(len(ids), self.shape.num_experts, generator=generator, device=self.device)
            ids.copy_(score.topk(self.shape.top_k).indices)
        if number:
            self.hit.append(sum(len(ids.unique()) for ids in self.ids) / len(self.ids))

    def errors(self, variants: list[common.Variant]) -> dict[str, common.Errors]:
        """Of a few tokens of each variant's first call."""
        m = len(self.xs[0])
        rows = torch.linspace(0, m - 1, min(m, TOKENS_COMPARED)).long().to(self.device)
        exact = {w4a4: self._exact(rows, w4a4) for w4a4 in {variant.name == "ours nvfp4" for variant in variants}}

        def errors(variant: common.Variant) -> common.Errors:
            return common.errors(common.answer(variant.calls[0])[rows], exact[variant.name == "ours nvfp4"])

        return self.failures.attempt_all(variants, errors)

    def _exact(self, rows: torch.Tensor, w4a4: bool) -> torch.Tensor:
        """(rows, H) fp32: the sum over choices, with activations rounded to NVFP4 or not at all."""
        x, ids, weights = (tensor[0][rows] for tensor in (self.xs, self.ids, self.weights))
        out = torch.zeros(len(rows), self.shape.hidden, device=self.device)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            w13, w2 = self.experts.weights(expert)
            a = _rounded(x[token].float(), self.experts.w13_input_scale[expert, 0], w4a4)
            h = _rounded(swiglu(a @ w13.t(), SWIGLU_LIMIT), self.experts.w2_input_scale[expert], w4a4)
            out.index_add_(0, token, (h @ w2.t()) * weights[token, choice, None])
        return out

    def work(self, m: int) -> common.Work:
        """What a call must do: read the experts that were hit, on average over rounds."""
        hidden, inter = self.shape.hidden, self.shape.intermediate
        weight = sum(self.hit) / len(self.hit) * 3 * hidden * inter * NVFP4_BYTES
        return common.Work(weight, weight + 2 * m * hidden * BF16_BYTES, 6 * m * self.shape.top_k * hidden * inter)

    @property
    def experts_hit(self) -> float:
        """Experts that a call reads, on average."""
        return round(sum(self.hit) / len(self.hit), 1)


def _rounded(x: torch.Tensor, scale: torch.Tensor, w4a4: bool) -> torch.Tensor:
    return dequantize(*quantize_activation(x, scale), scale) if w4a4 else x


class _Marlin:
    """vLLM's fused Marlin MoE, prepared and called as its modular kernel does."""

    def __init__(self, experts: Experts, shape: Shape) -> None:
        from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_nvfp4_moe_layer_for_marlin

        common.vllm_workspace(experts.w13_weight.device)
        layer = SimpleNamespace(
            num_experts=shape.num_experts,
            hidden_size=shape.hidden,
            intermediate_size_per_partition=shape.intermediate,
            params_dtype=torch.bfloat16,
        )
        # vLLM's function copies what it is given.
        prepared = prepare_nvfp4_moe_layer_for_marlin(
            layer,
            experts.w13_weight,
            experts.w13_weight_scale,
            experts.w13_weight_scale_2[:, 0].contiguous(),
            experts.w2_weight,
            experts.w2_weight_scale,
            experts.w2_weight_scale_2,
            is_act_and_mul=True,
        )
        self.w13, self.w13_scale, self.w13_scale_2, self.w2, self.w2_scale, self.w2_scale_2 = prepared

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """x (T, H) -> (T, H)."""
        import vllm._custom_ops as ops
        from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
        from vllm.scalar_type import scalar_types

        def total(terms: torch.Tensor, out: torch.Tensor, *_: Any) -> torch.Tensor:
            ops.moe_sum(terms, out)
            return out

        return fused_marlin_moe(
            x,
            self.w13,
            self.w2,
            None,
            None,
            self.w13_scale,
            self.w2_scale,
            topk_weights,
            topk_ids,
            quant_type_id=scalar_types.float4_e2m1f.id,
            global_num_experts=len(self.w13),
            global_scale1=self.w13_scale_2,
            global_scale2=self.w2_scale_2,
            activation_config=ApplyMoEActivationConfig(clamp_limit=SWIGLU_LIMIT),
            moe_sum=total,
            output=torch.empty_like(x),
        )


class _Humming:
    """vLLM's Humming MoE kernel, chosen, prepared and called as ModelOpt's method does: W4A16."""

    def __init__(self, experts: Experts, shape: Shape) -> None:
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.config import (
            FusedMoEConfig,
            FusedMoEParallelConfig,
            RoutingMethodType,
        )
        from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import make_nvfp4_moe_kernel, select_nvfp4_moe_backend
        from vllm.model_executor.layers.quantization.utils import humming
        from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

        common.vllm_workspace(experts.w13_weight.device)
        self.activation = MoEActivation.SILU
        config = FusedMoEConfig(
            num_experts=shape.num_experts,
            experts_per_token=shape.top_k,
            hidden_dim=shape.hidden,
            intermediate_size=shape.intermediate,
            num_local_experts=shape.num_experts,
            num_logical_experts=shape.num_experts,
            activation=self.activation,
            device=experts.w13_weight.device,
            routing_method=RoutingMethodType.DeepseekV4,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.bfloat16,
            moe_backend="humming",
            swiglu_limit=SWIGLU_LIMIT,
        )
        backend, experts_class = select_nvfp4_moe_backend(config, kNvfp4Static, kNvfp4Dynamic)
        self.layer = torch.nn.Module()
        self.layer.layer_name, self.layer.moe_config, self.layer.params_dtype = "bench", config, torch.bfloat16
        for name, tensor in vars(experts).items():
            # vLLM's function puts tensors of its own in place of these.
            setattr(self.layer, name, torch.nn.Parameter(tensor, requires_grad=False))
        humming.convert_to_humming_moe_kernel_format(self.layer, {"quant_method": "modelopt", "quant_algo": "nvfp4"})
        quant_config = humming.get_humming_moe_quant_config(self.layer, gemm1_clamp_limit=SWIGLU_LIMIT)
        self.kernel = make_nvfp4_moe_kernel(quant_config, config, experts_class, backend)

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """x (T, H) -> (T, H)."""
        from vllm.forward_context import ForwardContext, override_forward_context

        with override_forward_context(ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={})):
            return self.kernel.apply(
                x,
                self.layer.w13_weight,
                self.layer.w2_weight,
                topk_weights,
                topk_ids,
                activation=self.activation,
                global_num_experts=len(self.layer.w13_weight),
                expert_map=None,
                apply_router_weight_on_input=False,
            )


def measure(name: str, args: Any, table: common.Table, budget: common.Budget) -> list[str]:
    """Adds the rows of one shape; returns what there was no time for."""
    shape = SHAPES[name] if name in SHAPES else Shape(*map(int, name.split("x")))
    if budget.spent:
        return [name]
    with budget.preparing():
        layer = Moe(shape, args)
    skipped: list[str] = []
    # The largest first: workspaces grow, and what graphs captured before would be kept.
    for m in sorted(args.m, reverse=True):
        if budget.spent:
            skipped.append(f"{name} m={m}")
            continue
        with budget.preparing():
            variants = layer.variants(m)
            found = layer.errors(variants)
        times = common.interleaved(variants, args.rounds, args.device, layer.choose, layer.failures)
        work = layer.work(m)
        fields = {"bench": "moe", "shape": name, "m": m, "experts": layer.experts_hit} | shape._asdict()
        table.add(fields, times, found, {variant.name: work for variant in variants}, layer.failures)
    registry.clear()
    return skipped


if __name__ == "__main__":
    sys.exit(common.main(__doc__, MS, PEERS, list(SHAPES), measure))
