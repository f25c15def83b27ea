"""What an engine holds besides weights and KV cache: buffers with known shapes, and estimates of the rest.

The hard part is that vLLM measures this by running the largest batch, which needs the GPU. Buffers whose shapes follow from
the configuration are computed ("exact"); activations, NCCL and CUDA graphs are estimates and say so. Some buffers are made
after vLLM has sized the KV cache: they take what --gpu-memory-utilization leaves free, and count against that ("after_kv").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_nvfp4.doctor.gpus import GIB
from vllm_nvfp4.doctor.kv_cache import FULL_TOKENS, Group
from vllm_nvfp4.doctor.layout import Layout
from vllm_nvfp4.doctor.weights import padded_heads

PREFILLS_AT_ONCE = 4
INDEXER_LOGITS_BYTES = 512 * 2**20
# Expected tokens of the busiest expert rank over the mean: an assumption.
EXPERT_IMBALANCE = 2
# Assumptions: CUDA context with loaded kernels; NCCL and all-to-all buffers; captured graphs.
CONTEXT_BYTES, COMMUNICATION_BYTES, GRAPH_BYTES = GIB, 3 * GIB // 2, 2 * GIB


@dataclass(frozen=True)
class Workspace:
    """One item. exact: its shape follows from the configuration. after_kv: allocated when the KV cache is."""

    name: str
    bytes: int
    formula: str
    exact: bool = False
    after_kv: bool = False


@dataclass(frozen=True)
class Load:
    """context: tokens of the longest request; batched_tokens of a step; max_num_seqs of an engine."""

    context: int
    batched_tokens: int
    max_num_seqs: int


def workspaces(config: Any, layout: Layout, load: Load, made: Sequence[Group]) -> list[Workspace]:
    """Everything on one rank that is neither a parameter nor KV cache."""
    return [*_fixed(config, load), *_after_kv(config, load, made), *_estimates(config, layout, load)]


def _fixed(c: Any, load: Load) -> list[Workspace]:
    """Buffers with known shapes that exist before the KV cache is sized."""
    t, ratios = load.batched_tokens, [r for r in c.compress_ratios[: c.num_hidden_layers] if r > 1]
    items = [Workspace("rope tables", _rope_bytes(c), "positions x qk_rope_head_dim x 4, a table a RoPE kind", True)]
    items.append(Workspace("indexer top-k", t * c.index_topk * 4, "batched tokens x index_topk x 4", True))
    entries = -(-load.context // min(ratios)) if ratios else 0
    topk = -(-((c.index_topk if ratios else 0) + c.sliding_window) // 128) * 128
    gather = PREFILLS_AT_ONCE * (entries + c.sliding_window + t) * c.head_dim * 2 + t * (topk + 1) * 4
    factor = 5 if load.context <= 256 * 1024 else 2
    keys = load.context * 8 * factor // 4 * (c.index_head_dim + 4) if 4 in ratios else 0
    items.append(
        Workspace(
            "attention workspace",
            max(gather, keys),
            "max of 4 x (context / ratio + window + batched tokens) x head_dim x 2 and the indexer's keys",
            True,
        )
    )
    if 4 in ratios:
        items.append(Workspace("indexer logits", INDEXER_LOGITS_BYTES, "VLLM_SPARSE_INDEXER_MAX_LOGITS_MB", True))
    return items


def _rope_bytes(c: Any) -> int:
    """fp32 tables of cosines and sines; compressed layers may have one of their own length."""
    rope = getattr(c, "rope_parameters", None) or getattr(c, "rope_scaling", None) or {}
    nested = rope.get("compress")
    yarn = nested if isinstance(nested, dict) else rope
    stretched = int(yarn.get("factor") or 1) * int(yarn.get("original_max_position_embeddings") or 0)
    ratios = c.compress_ratios[: c.num_hidden_layers]
    plain = c.max_position_embeddings if any(r <= 1 for r in ratios) else 0
    compressed = (stretched or c.max_position_embeddings) if any(r > 1 for r in ratios) else 0
    return (plain + compressed) * c.qk_rope_head_dim * 4


def _after_kv(c: Any, load: Load, made: Sequence[Group]) -> list[Workspace]:
    """Tables of block numbers and of compressed positions, as long as the longest context."""
    t = load.batched_tokens
    rows = sum(-(-load.context // group.caches[0].block_tokens) for group in made)
    items = [
        Workspace(
            "block tables",
            2 * load.max_num_seqs * rows * 4,
            "2 x max_num_seqs x sum over groups of context / block tokens x 4",
            True,
            True,
        )
    ]
    ratios = c.compress_ratios[: c.num_hidden_layers]
    if 128 in ratios:
        width = -(-load.context // (128 * 128)) * 128
        items.append(
            Workspace("positions of ratio 128", 2 * t * width * 4, "2 x tokens x context / 128 x 4", True, True)
        )
    if 4 in ratios:
        width = -(-load.context // FULL_TOKENS)
        items.append(Workspace("indexer block tables", t * width * 4, "tokens x context / 256 x 4", True, True))
    return items


def _estimates(c: Any, layout: Layout, load: Load) -> list[Workspace]:
    """Activations of the largest step, and what libraries take."""
    t = load.batched_tokens
    streams = 3 * t * c.hc_mult * c.hidden_size * 2
    attention = 2 * t * padded_heads(c.num_attention_heads // layout.tp) * c.head_dim * 2
    tokens = t * layout.dp
    rows = min(EXPERT_IMBALANCE, layout.expert_ranks) * tokens * c.num_experts_per_tok
    rows //= layout.expert_ranks if layout.ep else 1
    width = c.moe_intermediate_size // (1 if layout.ep else layout.expert_ranks)
    experts = (tokens * c.hidden_size * 2 if layout.dp > 1 else 0) + rows * (3 * width + c.hidden_size) * 2
    logits = load.max_num_seqs * c.vocab_size * 8
    items = [
        Workspace(
            "activations",
            streams + max(attention, experts) + logits,
            "3 x tokens x hc_mult x hidden x 2 + max(queries and outputs, routed tokens) + max_num_seqs x vocabulary x 8",
        ),
        Workspace("CUDA context", CONTEXT_BYTES, "1 GiB, assumed"),
        Workspace("CUDA graphs", GRAPH_BYTES, "2 GiB, assumed"),
    ]
    if layout.num_gpus > 1:
        items.append(Workspace("NCCL and all-to-all", COMMUNICATION_BYTES, "1.5 GiB, assumed"))
    return items
