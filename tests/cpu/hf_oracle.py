"""The whole model a second time: transformers' own DeepSeek-V4 in float32, fed from the NVFP4 tensors of an export.

What the engine answers is compared with this. It shares no code with the engine: not the attention, not the names, not
the number format, not the experts. The hard part is that a silent mistake here would be as bad as one in the engine, so
every tensor of the checkpoint is set by a name written out below, and one that is left over, on either side, is an error.

Only the arithmetic of the quantized matrices is emulated (4-bit weights and activations); everything else stays float32,
where the engine has BF16 activations and an FP8 KV cache. Answers therefore agree closely, not exactly. Rounding errors
are large where the model is undecided (4-bit activations turn them into other codes and other experts), so
`Oracle.disturbed` shows what errors of that size do to the oracle itself, and `Oracle.attention` computes one layer on the
engine's own inputs, where no error has built up, and in the precision in which the engine keeps what it computes.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

# A nibble is sign << 3 | index into the magnitudes.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
BLOCK = 16
E4M3_MAX, E2M1_MAX = 448.0, 6.0
ROPE_DIM = 64

# Tensors of the model and of its layers that are stored as they are: checkpoint -> transformers.
MODEL_TENSORS = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "model.hc_head.hc_base": "model.hc_head.hc_base",
    "model.hc_head.hc_fn": "model.hc_head.hc_fn",
    "model.hc_head.hc_scale": "model.hc_head.hc_scale",
    "head.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.attn_sink": "self_attn.sinks",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
}
# Quantized matrices of a layer: checkpoint -> transformers.
LAYER_LINEARS = {
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
LEAF = re.compile(r"(.+)\.(weight|weight_scale|weight_scale_2|input_scale)")
EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(w[123])")


def dequantize(packed: torch.Tensor, block_scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """value(code) * block scale * tensor scale in float32; two codes a byte, the first in the low nibble."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    # Scales first: the order in which ModelOpt multiplies, and so its very bytes (test_operators.py).
    scale = block_scale.float() * tensor_scale.float()
    return VALUES[codes.long()] * scale.repeat_interleave(BLOCK, dim=-1)


def fake_quantize(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """q * block scale * input scale, q the E2M1 value nearest to x / (block scale * input scale), ties to even."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    step = (largest / (E2M1_MAX * input_scale)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * input_scale
    scaled = torch.where(step > 0, blocks / step, 0.0).abs()
    # E2M1 is a grid of 0.5 below 2, of 1 below 4, of 2 above, and torch.round takes ties to the even multiple, which
    # is the even code on each of the three.
    grid = torch.where(scaled < 2, 0.5, torch.where(scaled < 4, 1.0, 2.0))
    rounded = (torch.round(scaled / grid) * grid).clamp(max=E2M1_MAX)
    return (rounded.copysign(blocks) * step).flatten(-2)


def stored(keys: torch.Tensor) -> torch.Tensor:
    """What the KV cache gives back: blocks of 64 in E4M3 under a power of two, but the ROPE_DIM rotated values in BF16.

    The scale is the smallest with which the block fits. May be used before the rotation too, which leaves the rest alone.
    """
    plain, rotated = keys[..., :-ROPE_DIM].unflatten(-1, (-1, 64)), keys[..., -ROPE_DIM:]
    largest = plain.abs().amax(dim=-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(largest / E4M3_MAX)))
    plain = (plain / scale).to(torch.float8_e4m3fn).float() * scale
    return torch.cat((plain.flatten(-2), rotated.bfloat16().float()), dim=-1)


def _round(module: nn.Module, args: object, out: object) -> object:
    """A forward hook: to BF16 and back; None (no change) for what is no tensor, which is a rotary table."""
    return out.bfloat16().float() if isinstance(out, torch.Tensor) else None


def _bias(seen: torch.Tensor) -> torch.Tensor:
    """(1, 1, T, S): 0 where seen, minus infinity elsewhere."""
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]


class FakeQuantLinear(nn.Module):
    """y = fake_quantize(x) @ dequantize(weight)^T in float32, in the place of an nn.Linear."""

    def __init__(self, parts: dict[str, torch.Tensor]) -> None:
        super().__init__()
        weight = dequantize(parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("input_scale", parts["input_scale"].float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(fake_quantize(x, self.input_scale), self.weight)


class FakeQuantExperts(nn.Module):
    """sum_k weight_k * w2(silu(min(w1 x, limit)) * clamp(w3 x, limit)) over a token's experts, one expert at a time."""

    def __init__(self, experts: list[dict[str, FakeQuantLinear]], limit: float) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict(expert) for expert in experts)
        self.limit = limit

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens, slots = torch.where(experts == index)
            rows = x[tokens]
            gate = expert["w1"](rows).clamp(max=self.limit)
            up = expert["w3"](rows).clamp(-self.limit, self.limit)
            out.index_add_(0, tokens, expert["w2"](functional.silu(gate) * up) * weights[tokens, slots, None])
        return out


class Oracle:
    """transformers' DeepseekV4ForCausalLM with the weights of an NVFP4 export, in float32.

    Raises: ValueError - a tensor of the checkpoint has no place in the model, or one of the model no tensor.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config")  # transformers would look for a quantizer of its own
        self.config = DeepseekV4Config(**config)
        self.config._attn_implementation = "eager"
        self.model = DeepseekV4ForCausalLM(self.config).float().eval().requires_grad_(False)
        self._fill(load_file(folder / "model.safetensors"))

    def logprobs(self, prompt: Sequence[int], num_new: int, forced: Sequence[int]) -> torch.Tensor:
        """Log-probabilities (num_new, vocab) float32 of the tokens after the prompt, each given those forced before it.

        One forward pass without a cache over the prompt and the first num_new - 1 forced tokens.
        """
        if len(forced) < num_new - 1:
            raise ValueError(f"{num_new} positions need {num_new - 1} forced tokens, found {len(forced)}")
        tokens = torch.tensor([[*prompt, *forced[: num_new - 1]]])
        with torch.inference_mode():
            logits = self.model(tokens, use_cache=False, logits_to_keep=num_new).logits
        return logits[0].float().log_softmax(dim=-1)

    @contextlib.contextmanager
    def disturbed(self, relative: float, seed: int) -> Iterator[None]:
        """Within it, every module's output is multiplied by 1 + relative * N(0, 1): rounding, with other luck each seed."""
        random = torch.Generator().manual_seed(seed)

        def disturb(module: nn.Module, args: object, out: object) -> object:
            if not isinstance(out, torch.Tensor) or not out.is_floating_point():
                return None  # routers' indices, rotary tables
            return out * (1 + relative * torch.randn(out.shape, generator=random))

        with contextlib.ExitStack() as stack:
            for module in self.model.modules():
                if next(module.children(), None) is None:
                    stack.enter_context(module.register_forward_hook(disturb))
            yield

    def attention(
        self,
        layer: int,
        hidden: torch.Tensor,
        window: int | None = None,
        blocks: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What one layer's attention gives its last projection, for a whole sequence from position 0.

        Projections and norms round to BF16, and keys (which are the values too) are stored in FP8, as the engine does;
        the rest is float32.

        Args:
            layer: its index.
            hidden: (T, hidden_size), what the engine gave this layer's first projections.
            window: positions that a token sees, itself included; the config's by default.
            blocks: mistakes for a test to make. Takes the compressed blocks each token sees, (T, B) bool, the indexer's
                selection included, and returns those it shall see instead.

        Returns: (T, o_groups * o_lora_rank) float32.
        """
        attention = self.model.model.layers[layer].self_attn
        positions = torch.arange(len(hidden))
        distance = positions[:, None] - positions
        seen = (distance >= 0) & (distance < (window or self.config.sliding_window))
        caught: list[torch.Tensor] = []

        def catch(module: nn.Module, args: object, out: torch.Tensor) -> None:
            caught.append(out[0].flatten(1))

        def store(module: nn.Module, args: object, out: tuple) -> tuple:
            keys, bias = out
            return stored(keys), bias if blocks is None else _bias(blocks(bias[0, 0] == 0))

        hooks: list[tuple[nn.Module, Callable]]
        hooks = [(module, _round) for module in attention.modules() if next(module.children(), None) is None]
        hooks += [(attention.kv_norm, lambda module, args, out: stored(out)), (attention.o_a_proj, catch)]
        if attention.compressor is not None:
            hooks.append((attention.compressor, store))
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            for module, hook in hooks:
                stack.enter_context(module.register_forward_hook(hook))
            x, at = hidden[None].float(), positions[None]
            rope = {k: self.model.model.rotary_emb(x, position_ids=at, layer_type=k) for k in ("main", "compress")}
            attention(x, rope, at, _bias(seen))
        return caught[0]

    def _fill(self, tensors: dict[str, torch.Tensor]) -> None:
        targets = dict(self.model.state_dict(keep_vars=True))
        linears: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            layer, local = match.groups() if (match := LAYER.fullmatch(name)) else ("", name)
            leaf = LEAF.fullmatch(local)
            if layer and leaf and (leaf[1] in LAYER_LINEARS or EXPERT.fullmatch(leaf[1])):
                linears.setdefault((f"model.layers.{layer}.", leaf[1]), {})[leaf[2]] = tensor
            elif layer and local in LAYER_TENSORS:
                self._copy(name, tensor, targets, f"model.layers.{layer}.{LAYER_TENSORS[local]}")
            elif name in MODEL_TENSORS:
                self._copy(name, tensor, targets, MODEL_TENSORS[name])
            else:
                raise ValueError(f"{name} {tuple(tensor.shape)}: the oracle has no place for it")
        self._replace(linears, targets)
        if targets:
            raise ValueError(f"tensors of the model without a tensor of the checkpoint: {sorted(targets)}")

    @staticmethod
    def _copy(name: str, tensor: torch.Tensor, targets: dict[str, torch.Tensor], target: str) -> None:
        place = targets.pop(target, None)
        if place is None or place.shape != tensor.shape or place.is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"{name} {tuple(tensor.shape)} does not fit {target}: {place if place is None else place.shape}"
            )
        place.copy_(tensor)

    def _replace(
        self, linears: dict[tuple[str, str], dict[str, torch.Tensor]], targets: dict[str, torch.Tensor]
    ) -> None:
        """Put FakeQuantLinear and FakeQuantExperts in the place of the modules whose weights are quantized."""
        experts: dict[str, dict[int, dict[str, FakeQuantLinear]]] = {}
        for (layer, name), parts in linears.items():
            if len(parts) != 4:
                raise ValueError(f"{layer}{name}: found only {sorted(parts)}")
            module = FakeQuantLinear(parts)
            if match := EXPERT.fullmatch(name):
                experts.setdefault(layer, {}).setdefault(int(match[1]), {})[match[2]] = module
                continue
            path = layer + LAYER_LINEARS[name]
            place = targets.pop(f"{path}.weight", None)
            if place is None or place.shape != module.weight.shape:
                raise ValueError(f"{layer}{name} {tuple(module.weight.shape)} does not fit {path}")
            self.model.set_submodule(path, module)
        for layer, by_index in experts.items():
            gate_up, down = (targets.pop(f"{layer}mlp.experts.{leaf}") for leaf in ("gate_up_proj", "down_proj"))
            if sorted(by_index) != list(range(len(gate_up))):
                raise ValueError(f"{layer}: experts {sorted(by_index)} do not fit {len(gate_up)} places")
            for expert in by_index.values():
                rows = torch.cat((expert["w1"].weight, expert["w3"].weight))
                if rows.shape != gate_up.shape[1:] or expert["w2"].weight.shape != down.shape[1:]:
                    raise ValueError(f"{layer}: an expert's shapes do not fit {gate_up.shape} and {down.shape}")
            ordered = [by_index[index] for index in range(len(gate_up))]
            self.model.set_submodule(f"{layer}mlp.experts", FakeQuantExperts(ordered, self.config.swiglu_limit))
