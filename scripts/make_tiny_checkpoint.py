"""Make a small random DeepSeek-V4 checkpoint, its linears in NVFP4, without ModelOpt, vLLM or transformers.

    python scripts/make_tiny_checkpoint.py OUT [--layout L1|L2|L3|bare] [--seed 0] [--hidden 256] ...

Four spellings of one model. L2 is what ModelOpt 0.47 exports; L1 has the module names of transformers; bare has
DeepSeek's own names; L3 is the published mixture of NVFP4 experts, FP8 128x128-block dense linears and BF16 rest.
What is drawn depends on the seed, the shape and DeepSeek's name of a tensor, never on layout, shards or order: L1, L2
and bare hold the same values under other names, so a loader that reads all three must answer alike, bit for bit.

The hard part is to leave nothing broken behind: sizes and free space are checked before the first byte, one shard is in
memory at a time, and all is written to a sibling directory that takes OUT's name at the end.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# A checkout need not be installed to be run; an installed cutedsl goes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from cutedsl.quantize import quantize_weight

# Sizes that the attention kernels and the mHC kernels are written for: not options.
HEAD_DIM, ROPE_DIM, INDEX_DIM, WINDOW, HC_MULT = 512, 64, 128, 128, 4
BLOCK, FP8_BLOCK, NVFP4_MAX, MARGIN_BYTES = 16, 128, 6.0 * 448.0, 16 << 20
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
ATTENTION = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# Never shown to a client: turn marks and the tasks of DeepSeek-V4's chat encoding.
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
SPECIAL_TOKENS = (BOS, EOS, *(f"<｜{name}｜>" for name in ("User", "Assistant", "latest_reminder", *TASKS)))
# Single tokens too, but text: the parsers must find them in what was decoded with skip_special_tokens=True.
VISIBLE_TOKENS = ("<think>", "</think>", "｜DSML｜")
MIN_VOCAB = 256 + len(SPECIAL_TOKENS) + len(VISIBLE_TOKENS)

# How each role is stored. "float" is what runs in the model's dtype, "master" what always stays FP32.
ALL_NVFP4 = {"expert": "NVFP4", "dense": "NVFP4", "compressor": "NVFP4", "wo_a": "F32", "float": "F32"}
ALL_NVFP4 |= {"master": "F32", "table": "I64"}
EXPERTS_NVFP4 = ALL_NVFP4 | {"dense": "FP8", "wo_a": "FP8", "compressor": "BF16", "float": "BF16"}
PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}

# From DeepSeek's module names to the layouts'; what L2_LAYER lacks keeps its name there.
TOP = {"embed": "model.embed_tokens", "norm": "model.norm"}
TOP |= {f"hc_head_{leaf}": f"model.hc_head.hc_{leaf}" for leaf in ("fn", "base", "scale")}
L1_TOP, L2_TOP = TOP | {"head": "lm_head"}, TOP | {"head": "head"}
L2_LAYER = {"attn.kv_norm": "attn.norm"}  # ModelOpt's reverse of transformers' renaming takes this one too far
L1_MLP = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
L1_COMPRESSOR = {"wkv": "kv_proj", "wgate": "gate_proj", "norm": "kv_norm", "ape": "position_bias"}
L1_LAYER = {
    "attn.wq_a": "self_attn.q_a_proj", "attn.q_norm": "self_attn.q_a_norm", "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj", "attn.kv_norm": "self_attn.kv_norm", "attn.attn_sink": "self_attn.sinks",
    "attn.wo_a": "self_attn.o_a_proj", "attn.wo_b": "self_attn.o_b_proj",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn.gate": "mlp.gate",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias", "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    **{f"attn.compressor.{k}": f"self_attn.compressor.{v}" for k, v in L1_COMPRESSOR.items()},
    **{f"attn.indexer.compressor.{k}": f"self_attn.compressor.indexer.{v}" for k, v in L1_COMPRESSOR.items()},
    **{f"ffn.shared_experts.{k}": f"mlp.shared_experts.{v}" for k, v in L1_MLP.items()},
    **{f"hc_{part}_{leaf}": f"{part}_hc.{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")},
}  # fmt: skip
LEAF = re.compile(r"(?:\.weight|\.weight_scale|\.weight_scale_2|\.input_scale)?$")
EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(w[123])")


def _opt(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class TinySpec:
    """What to make: sizes, layout and seed. One field is one flag of the command."""

    layout: str = _opt("L2", "names and formats of the tensors", choices=("L1", "L2", "L3", "bare"))
    seed: int = _opt(0, "same seed and flags, same bytes")
    hidden: int = _opt(256, "hidden size, a multiple of 16")
    layers: tuple[int, ...] = _opt((0, 4, 128, 4), "compress ratio of each layer: 0 sliding, 4 CSA, 128 HCA")
    experts: int = _opt(32, "routed experts")
    topk: int = _opt(6, "experts per token")
    intermediate: int | None = _opt(None, "width of an expert; default 64, in L3 128")
    heads: int = _opt(8, "query heads of 512")
    q_lora: int = _opt(128, "rank of the query projection")
    o_groups: int = _opt(2, "groups of the output projection, dividing heads")
    o_lora: int = _opt(128, "rank of the output projection, per group")
    index_heads: int = _opt(8, "heads of the indexer")
    index_topk: int = _opt(512, "compressed entries a query keeps")
    hash_layers: int = _opt(1, "leading layers routed by token id")
    vocab: int = _opt(512, f"vocabulary, at least {MIN_VOCAB}")
    shards: int = _opt(1, "files to spread the tensors over; one at a time is in memory")
    mtp: int = _opt(0, "multi-token-prediction layers, in bare and L3")
    indexer_spelling: str = _opt("compressor", "L1: the module that holds the indexer", choices=("compressor", "attn"))

    @property
    def width(self) -> int:
        """Width of an expert, the layout's default where none was given."""
        return self.intermediate if self.intermediate is not None else 128 if self.layout == "L3" else 64

    def validate(self) -> None:
        """Raise ValueError for the first flag out of range: what was found, and what is expected."""
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in ("seed", "hash_layers", "mtp") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{f.name} is {value}; expected at least {least}")
            if "choices" in f.metadata and value not in f.metadata["choices"]:
                raise ValueError(f"{f.name} is {value!r}; expected one of {f.metadata['choices']}")
        ragged = [k for k in (self.hidden, self.width, self.q_lora, self.o_groups * self.o_lora) if k % BLOCK]
        unknown = sorted(set(self.layers) - set(ATTENTION))
        # In L3 vLLM fuses FP8 linears row by row of blocks: w1 and wq_a must end where a block ends.
        partial_fp8 = self.layout == "L3" and (self.width % FP8_BLOCK or self.q_lora % FP8_BLOCK)
        checks = (
            (ragged, f"hidden, intermediate, q_lora or o_groups * o_lora is {ragged}; expected multiples of {BLOCK}"),
            (unknown or not self.layers, f"layers has ratios {unknown or 'none'}; expected one or more of 0, 4, 128"),
            (self.heads % self.o_groups, f"o_groups is {self.o_groups}; expected a divisor of heads, {self.heads}"),
            (self.topk > self.experts, f"topk is {self.topk}; expected at most experts, {self.experts}"),
            (self.hash_layers > len(self.layers), f"hash_layers is {self.hash_layers} of {len(self.layers)} layers"),
            (self.vocab < MIN_VOCAB, f"vocab is {self.vocab}; expected at least {MIN_VOCAB}: bytes and chat tokens"),
            (partial_fp8, f"intermediate is {self.width}, q_lora {self.q_lora}; in L3 expected multiples of 128"),
            (self.mtp and self.layout in ("L1", "L2"), f"mtp is {self.mtp} in {self.layout}; expected bare or L3"),
        )
        for bad, message in checks:
            if bad:
                raise ValueError(message)


@dataclass(frozen=True)
class Item:
    """One weight to draw: mean + std * N(0, 1), stored by its role's format. `std` None means 1 / sqrt(K)."""

    name: str
    shape: tuple[int, ...]
    role: str
    std: float | None = None
    mean: float = 0.0
    # Labels of who shares: one weight_scale_2 (drawn together, as it needs all their maxima), and one input_scale.
    shares: tuple[str, str] = ("", "")

    def kind(self, spec: TinySpec) -> str:
        """Storage format in the layout of `spec`."""
        return (EXPERTS_NVFP4 if spec.layout == "L3" else ALL_NVFP4)[self.role]

    def stored(self, spec: TinySpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Names (DeepSeek's), dtypes and shapes of the tensors this item becomes."""
        kind, stem = self.kind(spec), self.name.removesuffix("weight")
        if kind in PLAIN:
            return {self.name: (PLAIN[kind], self.shape)}
        n, k = self.shape
        if kind == "FP8":
            blocks = (math.ceil(n / FP8_BLOCK), math.ceil(k / FP8_BLOCK))
            return {self.name: (torch.float8_e4m3fn, self.shape), stem + "scale": (torch.float8_e8m0fnu, blocks)}
        packed = {self.name: (torch.uint8, (n, k // 2)), stem + "weight_scale": (torch.float8_e4m3fn, (n, k // BLOCK))}
        return {**packed, stem + "weight_scale_2": (torch.float32, ()), stem + "input_scale": (torch.float32, ())}


def _attention(p: str, ratio: int, spec: TinySpec) -> list[Item]:
    h, rank, heads, out = spec.hidden, spec.q_lora, spec.heads, spec.o_groups * spec.o_lora
    x, q = (p + "x", p + "x"), (p + "q", p + "q")  # linears that read the hidden state, and the query latent
    items = [
        Item(p + "attn_sink", (heads,), "master", 0.5),
        Item(p + "q_norm.weight", (rank,), "float", 0.0, 1.0),
        Item(p + "kv_norm.weight", (HEAD_DIM,), "float", 0.0, 1.0),
        Item(p + "wq_a.weight", (rank, h), "dense", shares=x),
        Item(p + "wkv.weight", (HEAD_DIM, h), "dense", shares=x),
        Item(p + "wq_b.weight", (heads * HEAD_DIM, rank), "dense", shares=q),
        Item(p + "wo_a.weight", (out, heads * HEAD_DIM // spec.o_groups), "wo_a"),
        Item(p + "wo_b.weight", (h, out), "dense", shares=("", p + "o")),
    ]
    compressors = {"compressor.": HEAD_DIM} if ratio else {}
    if ratio == 4:
        items.append(Item(p + "indexer.wq_b.weight", (spec.index_heads * INDEX_DIM, rank), "dense", shares=q))
        items.append(Item(p + "indexer.weights_proj.weight", (spec.index_heads, h), "compressor", shares=x))
        compressors["indexer.compressor."] = INDEX_DIM
    for name, dim in compressors.items():
        c, rows = p + name, dim * (2 if ratio == 4 else 1)  # at ratio 4 windows overlap: a token has a row in either
        items += [Item(c + "norm.weight", (dim,), "float", 0.0, 1.0), Item(c + "ape", (ratio, rows), "master", 0.1)]
        items += [Item(c + f"{w}.weight", (rows, h), "compressor", shares=x) for w in ("wkv", "wgate")]
    return items


def _ffn(p: str, hashed: bool, spec: TinySpec) -> list[Item]:
    table, bias = Item(p + "gate.tid2eid", (spec.vocab, spec.topk), "table"), (p + "gate.bias", (spec.experts,))
    gate = Item(p + "gate.weight", (spec.experts, spec.hidden), "float")
    items = [gate, table if hashed else Item(*bias, "master", 0.1)]
    experts = [(f"{p}experts.{e}.", "expert", p + "down") for e in range(spec.experts)]
    for e, role, down in [*experts, (p + "shared_experts.", "dense", p + "shared")]:
        up, x = (spec.width, spec.hidden), (e + "w13", p + "x")
        items += [Item(e + "w1.weight", up, role, shares=x), Item(e + "w3.weight", up, role, shares=x)]
        items.append(Item(e + "w2.weight", up[::-1], role, shares=("", down)))
    return items


def _hyper(p: str, rows: int, num_scales: int, spec: TinySpec) -> list[Item]:
    items = [Item(p + "fn", (rows, HC_MULT * spec.hidden), "master"), Item(p + "base", (rows,), "master", 0.1)]
    return [*items, Item(p + "scale", (num_scales,), "master", 0.0, 1.0)]


def _layer(p: str, ratio: int, hashed: bool, spec: TinySpec) -> list[Item]:
    rows = HC_MULT * (2 + HC_MULT)  # streams into the block, out of it, and among themselves
    norms = [Item(p + f"{n}_norm.weight", (spec.hidden,), "float", 0.0, 1.0) for n in ("attn", "ffn")]
    hyper = _hyper(p + "hc_attn_", rows, 3, spec) + _hyper(p + "hc_ffn_", rows, 3, spec)
    return norms + hyper + _attention(p + "attn.", ratio, spec) + _ffn(p + "ffn.", hashed, spec)


def plan(spec: TinySpec) -> list[list[Item]]:
    """Every item of the checkpoint, in groups that must be drawn together because they share a scale."""
    h, table = (spec.hidden,), (spec.vocab, spec.hidden)
    # Embedding rows of unit RMS: the residual stream starts at the size of what the layers add to it.
    items = [Item("embed.weight", table, "float", 1.0), Item("head.weight", table, "float")]
    items += [Item("norm.weight", h, "float", 0.0, 1.0), *_hyper("hc_head_", HC_MULT, 1, spec)]
    for i, ratio in enumerate(spec.layers):
        items += _layer(f"layers.{i}.", ratio, i < spec.hash_layers, spec)
    for i in range(spec.mtp):
        p = f"mtp.{i}."
        items += _layer(p, 0, False, spec) + _hyper(p + "hc_head_", HC_MULT, 1, spec)
        items += [Item(p + f"{n}.weight", h, "float", 0.0, 1.0) for n in ("enorm", "hnorm", "norm")]
        items += [Item(p + f"{n}.weight", h * 2, "dense", shares=("", p + n)) for n in ("e_proj", "h_proj")]
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.shares[0] or item.name, []).append(item)
    return list(groups.values())


def rename(name: str, spec: TinySpec) -> str:
    """The layout's name of a tensor that DeepSeek calls `name`; KeyError for one that no table here covers."""
    if spec.layout in ("bare", "L3"):
        return name
    leaf = LEAF.findall(name)[0]
    module = name.removesuffix(leaf)
    if not module.startswith("layers."):
        return (L1_TOP if spec.layout == "L1" else L2_TOP)[module] + leaf
    _, layer, inner = module.split(".", 2)
    if spec.layout == "L2":
        inner = L2_LAYER.get(inner, inner)
    elif expert := EXPERT.fullmatch(inner):
        inner = f"mlp.experts.{expert[1]}.{L1_MLP[expert[2]]}"
    else:
        root = "self_attn.compressor.indexer." if spec.indexer_spelling == "compressor" else "self_attn.indexer."
        inner = L1_LAYER[inner].replace("self_attn.compressor.indexer.", root)
    return f"model.layers.{layer}.{inner}{leaf}"


def _generator(spec: TinySpec, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{spec.seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draw(item: Item, spec: TinySpec) -> torch.Tensor:
    g = _generator(spec, item.name)
    if item.role == "table":
        # Consecutive entries of one shuffle: topk distinct experts a row, without a (vocab, experts) sort.
        first = torch.randint(spec.experts, (spec.vocab, 1), generator=g)
        return torch.randperm(spec.experts, generator=g)[(first + torch.arange(spec.topk)) % spec.experts]
    std = item.shape[-1] ** -0.5 if item.std is None else item.std
    return torch.randn(item.shape, generator=g).mul_(std).add_(item.mean)


def _fp8_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w ~ e4m3 * e8m0_scale(128x128), the scale being the smallest power of two not below amax / 448."""
    n, k = w.shape
    padded = torch.nn.functional.pad(w, (0, -k % FP8_BLOCK, 0, -n % FP8_BLOCK))
    tiles = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    amax = tiles.abs().amax(dim=(1, 3)).clamp(min=2.0**-100)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448.0)))
    # Where log2 rounds down to a whole number, amax is an ulp above 448 * scale, and still rounds to 448, not to NaN.
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.reshape(padded.shape)[:n, :k].contiguous(), scale.to(torch.float8_e8m0fnu)


def _draw_group(group: list[Item], spec: TinySpec) -> dict[str, torch.Tensor]:
    """The tensors of one group under the layout's names; the NVFP4 ones have one weight_scale_2."""
    weights = [_draw(item, spec) for item in group]
    shared = torch.stack([w.abs().amax() for w in weights]).amax() / NVFP4_MAX if len(group) > 1 else None
    made: dict[str, torch.Tensor] = {}
    for item, w in zip(group, weights, strict=True):
        values: tuple[torch.Tensor, ...] = (w,)
        if item.kind(spec) == "NVFP4":
            packed = quantize_weight(w, weight_scale_2=shared)
            # Calibrated amax in real exports: 4 for normed activations to 40 for SwiGLU's output.
            amax = 8.0 + 12.0 * torch.rand((), generator=_generator(spec, item.shares[1] + ":amax"))
            # Cloned, for safetensors refuses tensors that share memory.
            values = (packed.weight, packed.weight_scale, packed.weight_scale_2.clone(), amax / NVFP4_MAX)
        elif item.kind(spec) == "FP8":
            values = _fp8_blocks(w)
        for value, (name, (dtype, _)) in zip(values, item.stored(spec).items(), strict=True):
            made[rename(name, spec)] = value.to(dtype).contiguous()
    return made


def _ignored(spec: TinySpec) -> list[str]:
    """What ModelOpt lists as left alone. It forgets wo_a, and so do we: the tensors decide, not this list."""
    layers = [f"layers.{i}" for i in range(len(spec.layers))] + [f"mtp.{i}" for i in range(spec.mtp)]
    names = ["embed.weight", *(f"{layer}.ffn.gate.weight" for layer in layers)]
    return ["head" if spec.layout == "bare" else "lm_head", *(rename(n, spec).removesuffix(".weight") for n in names)]


def model_config(spec: TinySpec) -> dict[str, Any]:
    """config.json: as transformers writes it, or for L3 as DeepSeek writes it."""
    yarn = {"factor": 16, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    config = {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "transformers_version": "5.17.0",
        "vocab_size": spec.vocab, "hidden_size": spec.hidden, "moe_intermediate_size": spec.width,
        "num_hidden_layers": len(spec.layers), "num_nextn_predict_layers": spec.mtp, "num_attention_heads": spec.heads,
        "num_key_value_heads": 1, "head_dim": HEAD_DIM, "qk_rope_head_dim": ROPE_DIM, "q_lora_rank": spec.q_lora,
        "o_groups": spec.o_groups, "o_lora_rank": spec.o_lora, "index_n_heads": spec.index_heads,
        "index_head_dim": INDEX_DIM, "index_topk": spec.index_topk, "sliding_window": WINDOW,
        "n_routed_experts": spec.experts, "n_shared_experts": 1, "num_experts_per_tok": spec.topk,
        "norm_topk_prob": True, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
        "hc_mult": HC_MULT, "hc_eps": 1e-06, "hc_sinkhorn_iters": 20, "rms_norm_eps": 1e-06, "hidden_act": "silu",
        "max_position_embeddings": 8192, "rope_theta": 10000.0, "compress_rope_theta": 160000.0,
        "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False,
        "use_cache": True, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if spec.layout == "L3":
        fp8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
        return config | {
            "torch_dtype": "bfloat16", "expert_dtype": "fp4", "topk_method": "noaux_tc",
            "compress_ratios": [*spec.layers, *[0] * spec.mtp],  # DeepSeek lists the MTP layers too, at the end
            "num_hash_layers": spec.hash_layers, "rope_scaling": {"type": "yarn", **yarn},
            "quantization_config": {**fp8, "weight_block_size": [128, 128], "moe_quant_algo": "NVFP4"},
        }  # fmt: skip
    partial = {"partial_rotary_factor": ROPE_DIM / HEAD_DIM}
    compress = {"rope_type": "yarn", "rope_theta": 160000.0, "attention_factor": 1.0, **yarn, **partial}
    floats = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    group = {"input_activations": floats, "weights": floats, "targets": ["Linear"]}
    return config | partial | {
        "dtype": "float32", "mlp_bias": False, "pad_token_id": None, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "layer_types": [ATTENTION[r] for r in spec.layers],
        "mlp_layer_types": ["hash_moe" if i < spec.hash_layers else "moe" for i in range(len(spec.layers))],
        "compress_rates": {name: ratio for ratio, name in ATTENTION.items() if ratio},
        "rope_parameters": {"compress": compress, "main": {"rope_type": "default", "rope_theta": 10000.0, **partial}},
        "quantization_config": {"config_groups": {"group_0": group}, "ignore": _ignored(spec), "quant_algo": "NVFP4",
                                "producer": PRODUCER, "quant_method": "modelopt"},
    }  # fmt: skip


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_configs(out: Path, spec: TinySpec) -> None:
    _write_json(out / "config.json", model_config(spec))
    generation = {"bos_token_id": 0, "eos_token_id": 1, "transformers_version": "5.17.0", "use_cache": True}
    generation |= {"_from_model_config": True, "output_attentions": False, "output_hidden_states": False}
    _write_json(out / "generation_config.json", generation)
    if spec.layout != "L3":
        quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": BLOCK}
        described = {"producer": PRODUCER, "quantization": quantization | {"exclude_modules": _ignored(spec)}}
        _write_json(out / "hf_quant_config.json", described)
    # Byte-level BPE without merges: any text is its UTF-8 bytes, and nothing has to be trained.
    symbols = [*SPECIAL_TOKENS, *VISIBLE_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in VISIBLE_TOKENS])
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    names = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "TokenizersBackend", "model_max_length": 8192}
    _write_json(out / "tokenizer_config.json", names)


def split_into_shards(groups: list[list[Item]], spec: TinySpec) -> list[list[list[Item]]]:
    """Deal the groups, in order, to `shards` files of about one size; ValueError if there are too few groups."""
    if spec.shards > len(groups):
        raise ValueError(f"shards is {spec.shards}; expected at most {len(groups)}, the groups that share a scale")
    shards: list[list[list[Item]]] = []
    used, share, left = 0, 0.0, num_bytes(groups, spec)
    for i, group in enumerate(groups):
        to_begin = spec.shards - len(shards)
        if to_begin and (used >= share or len(groups) - i == to_begin):
            shards.append([])
            used, share = 0, left / to_begin
        shards[-1].append(group)
        used, left = used + num_bytes([group], spec), left - num_bytes([group], spec)
    return shards


def num_bytes(groups: list[list[Item]], spec: TinySpec) -> int:
    """Exact size of all tensors of the groups."""
    stored = (tensor for group in groups for item in group for tensor in item.stored(spec).values())
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored)


def _check_target(out: Path, overwrite: bool, groups: list[list[Item]], spec: TinySpec) -> None:
    if out.exists() and any(out.iterdir()):  # NotADirectoryError for a file
        if not overwrite:
            raise FileExistsError(f"{out} is not empty; give another path, or --overwrite to replace it")
        if not (out / "config.json").is_file():
            raise FileExistsError(f"{out} has no config.json, so it is no checkpoint, and is not overwritten")
    there = next(parent for parent in (out, *out.parents) if parent.is_dir())
    # Half a KiB a tensor for header and index. What --overwrite will free does not count: it goes last.
    needed = MARGIN_BYTES + num_bytes(groups, spec) + 512 * sum(len(i.stored(spec)) for g in groups for i in g)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(f"{out} needs {needed} bytes, {there} has {free} free; free some, or choose smaller sizes")


@contextmanager
def _replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A fresh sibling directory to fill; it becomes `out` if the block ends well, and is removed if it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    old = fresh.with_suffix(".old")
    try:
        yield fresh
        fresh.chmod(0o755)  # was 0700: a server may run as another user
        if overwrite and out.exists():
            os.replace(out, old)
        os.replace(fresh, out)
    finally:  # also after Ctrl-C
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(fresh, ignore_errors=True)


def _write_shard(file: Path, groups: list[list[Item]], spec: TinySpec) -> list[str]:
    tensors = {name: tensor for group in groups for name, tensor in _draw_group(group, spec).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it 0600
    return list(tensors)


def make_tiny_checkpoint(out: Path, spec: TinySpec, overwrite: bool = False) -> str:
    """Write the checkpoint `spec` describes to the directory `out`, all of it or nothing.

    Args:
        out: directory to make; must be absent or empty, parents are made.
        spec: sizes, layout, seed.
        overwrite: replace `out` if it holds a checkpoint.

    Returns:
        One line: path, layout, tensors, bytes of all files, seconds.

    Raises:
        ValueError: `spec` is not valid.
        OSError, SafetensorError: `out` is taken, the disk is too small, or a write failed; nothing is left behind.

    Numerics: drawn and quantized in fp32 on the CPU; equal wherever torch draws equal normals. Not graph-safe.
    """
    spec.validate()
    start, out = time.perf_counter(), out.resolve()
    groups = plan(spec)
    shards = split_into_shards(groups, spec)
    _check_target(out, overwrite, groups, spec)
    weight_map: dict[str, str] = {}
    with _replacing(out, overwrite) as fresh:
        _write_configs(fresh, spec)
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(_write_shard(fresh / file, shard, spec), file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": num_bytes(groups, spec)}, "weight_map": weight_map}
            _write_json(fresh / "model.safetensors.index.json", index)
        size = sum(file.stat().st_size for file in fresh.iterdir())
    return f"{out}: layout {spec.layout}, {len(weight_map)} tensors, {size} bytes, {time.perf_counter() - start:.2f} s"


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0 made, 1 could not be written, 2 bad flags, 130 interrupted."""

    def ratios(text: str) -> tuple[int, ...]:
        return tuple(int(ratio) for ratio in text.split(","))

    parser = argparse.ArgumentParser(description="Make a small random DeepSeek-V4 checkpoint in NVFP4.")
    parser.add_argument("out", type=Path, help="directory to make")
    for f in fields(TinySpec):
        kind = ratios if f.name == "layers" else str if "choices" in f.metadata else int
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default, **f.metadata)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds a checkpoint")
    args = vars(parser.parse_args(argv))
    out, overwrite = args.pop("out"), args.pop("overwrite")
    try:
        print(make_tiny_checkpoint(out, TinySpec(**args), overwrite))
    except ValueError as error:
        parser.error(str(error))
    except (OSError, SafetensorError, KeyboardInterrupt) as error:
        status, reason = (130, "interrupted") if isinstance(error, KeyboardInterrupt) else (1, error)
        print(f"{parser.prog}: error: {out} is not written: {reason}", file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
