"""What a DeepSeek-V4 checkpoint must hold, computed from its configuration: every canonical tensor and linear with its shape.

One table serves the checks before a load, the loader's errors and memory planning. Sizes are of the whole model, before any
parallel split. Knows neither vLLM nor torch: any object with the configuration's attributes will do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BLOCK_SIZE = 16  # NVFP4: values along K that share a block scale


@dataclass(frozen=True)
class Expected:
    """linears: canonical module -> (n, k); tensors: canonical tensor -> shape; optional: tensors that may be absent."""

    linears: dict[str, tuple[int, int]]
    tensors: dict[str, tuple[int, ...]]
    optional: frozenset[str] = frozenset()


def expected(config: Any, mtp_layers: int = 0) -> Expected:
    """Every linear and tensor of the model that `config` describes, and of its first `mtp_layers` MTP layers.

    Raises: ValueError - the configuration lacks a field.
    """
    try:
        linears: dict[str, tuple[int, int]] = {}
        tensors: dict[str, tuple[int, ...]] = dict(_top(config))
        for layer in range(config.num_hidden_layers):
            prefix, ratio = f"model.layers.{layer}", config.compress_ratios[layer]
            linears.update(_layer_linears(config, prefix, ratio))
            tensors.update(_layer_tensors(config, prefix, ratio, layer < config.num_hash_layers))
        optional = set()
        for i in range(mtp_layers):
            prefix = f"mtp.{i}"
            linears.update(_layer_linears(config, prefix, 0))
            linears.update({f"{prefix}.{m}": (config.hidden_size, config.hidden_size) for m in ("e_proj", "h_proj")})
            tensors.update(_layer_tensors(config, prefix, 0, False))
            tensors.update(_mtp_tensors(config, prefix))
            optional |= {f"{prefix}.shared_head.head.weight", f"{prefix}.embed_tokens.weight"}
    except (AttributeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"config.json does not describe a DeepSeek-V4 model: {error}; compare it with the one of the model's publisher"
        ) from error
    if getattr(config, "tie_word_embeddings", False):
        optional.add("lm_head.weight")
    return Expected(linears, tensors, frozenset(optional))


def _top(c: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors outside the layers."""
    yield "model.embed_tokens.weight", (c.vocab_size, c.hidden_size)
    yield "lm_head.weight", (c.vocab_size, c.hidden_size)
    yield "model.norm.weight", (c.hidden_size,)
    yield from _hc_head(c, "model.")


def _hc_head(c: Any, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The mix of the residual streams in front of an output head."""
    yield f"{prefix}hc_head_fn", (c.hc_mult, c.hc_mult * c.hidden_size)
    yield f"{prefix}hc_head_base", (c.hc_mult,)
    yield f"{prefix}hc_head_scale", (1,)


def _layer_tensors(c: Any, prefix: str, ratio: int, is_hash: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A layer's tensors that are no linear's weight."""
    mix = (2 + c.hc_mult) * c.hc_mult
    for part in ("attn", "ffn"):
        yield f"{prefix}.{part}_norm.weight", (c.hidden_size,)
        yield f"{prefix}.hc_{part}_fn", (mix, c.hc_mult * c.hidden_size)
        yield f"{prefix}.hc_{part}_base", (mix,)
        yield f"{prefix}.hc_{part}_scale", (3,)
    yield f"{prefix}.attn.attn_sink", (c.num_attention_heads,)
    yield f"{prefix}.attn.q_norm.weight", (c.q_lora_rank,)
    yield f"{prefix}.attn.kv_norm.weight", (c.head_dim,)
    yield f"{prefix}.ffn.gate.weight", (c.n_routed_experts, c.hidden_size)
    if is_hash:
        yield f"{prefix}.ffn.gate.tid2eid", (c.vocab_size, c.num_experts_per_tok)
    else:
        yield f"{prefix}.ffn.gate.e_score_correction_bias", (c.n_routed_experts,)
    for owner, head_dim in _compressors(c, ratio):
        width = _overlap(ratio) * head_dim
        yield f"{prefix}.attn.{owner}.ape", (ratio, width)
        yield f"{prefix}.attn.{owner}.norm.weight", (head_dim,)


def _layer_linears(c: Any, prefix: str, ratio: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """A layer's linears, experts included."""
    hidden, q_out, o_in = c.hidden_size, c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    yield f"{prefix}.attn.wq_a", (c.q_lora_rank, hidden)
    yield f"{prefix}.attn.wkv", (c.head_dim, hidden)
    yield f"{prefix}.attn.wq_b", (q_out, c.q_lora_rank)
    yield f"{prefix}.attn.wo_a", (o_in, q_out // c.o_groups)
    yield f"{prefix}.attn.wo_b", (hidden, o_in)
    for owner, head_dim in _compressors(c, ratio):
        yield f"{prefix}.attn.{owner}.wkv", (_overlap(ratio) * head_dim, hidden)
        yield f"{prefix}.attn.{owner}.wgate", (_overlap(ratio) * head_dim, hidden)
    if ratio == 4:
        yield f"{prefix}.attn.indexer.wq_b", (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        yield f"{prefix}.attn.indexer.weights_proj", (c.index_n_heads, hidden)
    shared = c.moe_intermediate_size * c.n_shared_experts
    yield f"{prefix}.ffn.shared_experts.w1", (shared, hidden)
    yield f"{prefix}.ffn.shared_experts.w3", (shared, hidden)
    yield f"{prefix}.ffn.shared_experts.down_proj", (hidden, shared)
    for expert in range(c.n_routed_experts):
        yield f"{prefix}.ffn.experts.{expert}.w1", (c.moe_intermediate_size, hidden)
        yield f"{prefix}.ffn.experts.{expert}.w2", (hidden, c.moe_intermediate_size)
        yield f"{prefix}.ffn.experts.{expert}.w3", (c.moe_intermediate_size, hidden)


def _compressors(c: Any, ratio: int) -> list[tuple[str, int]]:
    """The compressors a layer of this ratio has: (module under attn, head_dim)."""
    if ratio <= 1:
        return []
    main = [("compressor", c.head_dim)]
    return [*main, ("indexer.compressor", c.index_head_dim)] if ratio == 4 else main


def _overlap(ratio: int) -> int:
    """Windows of ratio 4 overlap, so their compressors are twice as wide."""
    return 2 if ratio == 4 else 1


def _mtp_tensors(c: Any, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What an MTP layer has beyond a decoder layer."""
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}.{norm}.weight", (c.hidden_size,)
    yield f"{prefix}.shared_head.head.weight", (c.vocab_size, c.hidden_size)
    yield f"{prefix}.embed_tokens.weight", (c.vocab_size, c.hidden_size)
    yield from _hc_head(c, f"{prefix}.")


def check_parallel(config: Any, tensor_parallel_size: int, expert_parallel: bool, data_parallel_size: int = 1) -> None:
    """Refuse a tensor-parallel size that some matrix cannot be cut by; experts are spread over data-parallel ranks too.

    Raises: ValueError - names the flags, the field and its value, and the sizes that do work.
    """
    tp, dp = tensor_parallel_size, data_parallel_size
    bad = _indivisible(config, tp, dp, expert_parallel)
    if bad:
        works = [n for n in (1, 2, 4, 8, 16, 32) if not _indivisible(config, n, dp, expert_parallel)]
        beside = f" with --data-parallel-size {dp}" if dp > 1 else ""
        raise ValueError(
            f"--tensor-parallel-size {tp}{beside} does not divide this model: {'; '.join(bad)}. Sizes that work: {works}"
        )


def _indivisible(c: Any, tp: int, dp: int, expert_parallel: bool) -> list[str]:
    """Why `tp` does not fit, one phrase a field."""
    rules = [("num_attention_heads", c.num_attention_heads, tp, 1), ("o_groups", c.o_groups, tp, 1)]
    rules.append(("o_groups * o_lora_rank", c.o_groups * c.o_lora_rank, tp, BLOCK_SIZE))
    shared = c.moe_intermediate_size * c.n_shared_experts
    rules.append(("moe_intermediate_size * n_shared_experts", shared, tp, BLOCK_SIZE))
    if expert_parallel:
        rules.append(("n_routed_experts", c.n_routed_experts, tp * dp, 1))
    else:
        rules.append(("moe_intermediate_size", c.moe_intermediate_size, tp * dp, BLOCK_SIZE))
    bad = []
    for field, value, ranks, multiple in rules:
        if value % (ranks * multiple):
            why = f" (each rank needs whole blocks of {multiple})" if multiple > 1 else ""
            bad.append(f"{field} is {value}, not a multiple of {ranks * multiple}{why}")
    return bad
