"""Every checkpoint spelling of DeepSeek-V4 -> one canonical naming: vLLM's modules with their shards not yet fused.

The hard part: the same word means different things in different places. `norm` is the model's last norm, the norm of
the latent KV (ModelOpt's spelling), a compressor's norm or an MTP head's; `scale` is an FP8 block scale or a
hyper-connection parameter; `wkv` exists in the attention and in two compressors. Substring replacement cannot tell
them apart, so each rule must match everything that follows `layers.N.` or `mtp.N.`, and a name that no rule matches is
an error instead of a tensor that is silently left out.

A name costs one match for its scope, then the rules of that scope from the top. The routed experts, which are nearly
all of a checkpoint, are the first row. Needs neither vLLM nor torch.
"""

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final, NamedTuple


class UnknownLayoutError(ValueError):
    """The names belong to no known checkpoint layout, or to more than one."""


class UnknownNameError(ValueError):
    """No rule covers this tensor name."""


class Layout(enum.StrEnum):
    """How a checkpoint spells its tensor names."""

    L1 = "L1"
    L2 = "L2"
    L3 = "L3"
    BARE = "bare"


@dataclass(frozen=True)
class Rule:
    """One row: what it is for, the regex the whole text must match, and the canonical text (None: drop the tensor).

    `{group}` in the replacement stands for a named group of the pattern, in canonical spelling.
    """

    purpose: str
    pattern: str
    replacement: str | None

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """The pattern, compiled at first use."""
        return re.compile(self.pattern)


class ExpertName(NamedTuple):
    """The parts of a routed expert's canonical tensor name."""

    layer: str
    expert: int
    projection: str
    leaf: str


_LEAF = r"(?P<leaf>weight|weight_scale|weight_scale_2|input_scale|weight_scale_inv|scale)"
_PART = r"(?P<part>fn|base|scale)"
_ATTN = r"(?:self_attn|attn)\."
_COMPRESSOR = rf"{_ATTN}compressor\."
# transformers nests the indexer in the compressor and gives it the compressor's leaves; some writers lift it out.
_INDEXER = rf"{_ATTN}(?:compressor\.)?indexer\."
_INDEXER_COMPRESSOR = rf"{_INDEXER}(?:compressor\.)?"
_FFN = r"(?:mlp|ffn)\."
_HC_HEAD = rf"hc_head(?:\.hc)?_{_PART}"

# Spellings of a group's value that differ from the canonical one.
_SPELLING: Final[Mapping[str, Mapping[str, str]]] = {
    "leaf": {"scale": "weight_scale_inv"},
    "projection": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
}

LAYER_RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "routed expert",
        rf"{_FFN}experts\.(?P<expert>[0-9]+)\.(?P<projection>w[123]|gate_proj|up_proj|down_proj)\.{_LEAF}",
        "ffn.experts.{expert}.{projection}.{leaf}",
    ),
    Rule("shared expert, gate", rf"{_FFN}shared_experts\.(?:w1|gate_proj)\.{_LEAF}", "ffn.shared_experts.w1.{leaf}"),
    Rule("shared expert, up", rf"{_FFN}shared_experts\.(?:w3|up_proj)\.{_LEAF}", "ffn.shared_experts.w3.{leaf}"),
    Rule(
        "shared expert, down",
        rf"{_FFN}shared_experts\.(?:w2|down_proj)\.{_LEAF}",
        "ffn.shared_experts.down_proj.{leaf}",
    ),
    Rule("router weight", rf"{_FFN}gate\.weight", "ffn.gate.weight"),
    Rule("router bias", rf"{_FFN}gate\.(?:bias|e_score_correction_bias)", "ffn.gate.e_score_correction_bias"),
    Rule("router hash table", rf"{_FFN}gate\.tid2eid", "ffn.gate.tid2eid"),
    Rule("norm before attention", r"(?:attn_norm|input_layernorm)\.weight", "attn_norm.weight"),
    Rule("norm before the experts", r"(?:ffn_norm|post_attention_layernorm)\.weight", "ffn_norm.weight"),
    Rule("hyper-connection, DeepSeek", rf"hc_(?P<block>attn|ffn)_{_PART}", "hc_{block}_{part}"),
    Rule("hyper-connection, transformers", rf"(?P<block>attn|ffn)_hc\.{_PART}", "hc_{block}_{part}"),
    Rule("query down", rf"{_ATTN}(?:wq_a|q_a_proj)\.{_LEAF}", "attn.wq_a.{leaf}"),
    Rule("query up", rf"{_ATTN}(?:wq_b|q_b_proj)\.{_LEAF}", "attn.wq_b.{leaf}"),
    Rule("latent KV", rf"{_ATTN}(?:wkv|kv_proj)\.{_LEAF}", "attn.wkv.{leaf}"),
    Rule("output, grouped", rf"{_ATTN}(?:wo_a|o_a_proj)\.{_LEAF}", "attn.wo_a.{leaf}"),
    Rule("output", rf"{_ATTN}(?:wo_b|o_b_proj)\.{_LEAF}", "attn.wo_b.{leaf}"),
    Rule("query norm", rf"{_ATTN}(?:q_norm|q_a_norm)\.weight", "attn.q_norm.weight"),
    Rule("latent KV norm", rf"{_ATTN}(?:kv_norm|norm)\.weight", "attn.kv_norm.weight"),
    Rule("attention sink", rf"{_ATTN}(?:attn_sink|sinks)", "attn.attn_sink"),
    Rule("compressor KV", rf"{_COMPRESSOR}(?:wkv|kv_proj)\.{_LEAF}", "attn.compressor.wkv.{leaf}"),
    Rule("compressor gate", rf"{_COMPRESSOR}(?:wgate|gate_proj)\.{_LEAF}", "attn.compressor.wgate.{leaf}"),
    Rule("compressor position bias", rf"{_COMPRESSOR}(?:ape|position_bias)", "attn.compressor.ape"),
    Rule("compressor norm", rf"{_COMPRESSOR}(?:norm|kv_norm)\.weight", "attn.compressor.norm.weight"),
    Rule("indexer query", rf"{_INDEXER}(?:wq_b|q_b_proj)\.{_LEAF}", "attn.indexer.wq_b.{leaf}"),
    Rule("indexer head weights", rf"{_INDEXER}(?:scorer\.)?weights_proj\.{_LEAF}", "attn.indexer.weights_proj.{leaf}"),
    Rule(
        "indexer compressor KV",
        rf"{_INDEXER_COMPRESSOR}(?:wkv|kv_proj)\.{_LEAF}",
        "attn.indexer.compressor.wkv.{leaf}",
    ),
    Rule(
        "indexer compressor gate",
        rf"{_INDEXER_COMPRESSOR}(?:wgate|gate_proj)\.{_LEAF}",
        "attn.indexer.compressor.wgate.{leaf}",
    ),
    Rule(
        "indexer compressor position bias",
        rf"{_INDEXER_COMPRESSOR}(?:ape|position_bias)",
        "attn.indexer.compressor.ape",
    ),
    Rule(
        "indexer compressor norm",
        rf"{_INDEXER_COMPRESSOR}(?:norm|kv_norm)\.weight",
        "attn.indexer.compressor.norm.weight",
    ),
)

MTP_RULES: Final[tuple[Rule, ...]] = (
    Rule("MTP input norm", r"(?P<norm>enorm|hnorm)\.weight", "{norm}.weight"),
    Rule("MTP input projection", rf"(?P<linear>e_proj|h_proj)\.{_LEAF}", "{linear}.{leaf}"),
    Rule("MTP embedding", r"(?:emb\.tok_emb|embed|embed_tokens)\.weight", "embed_tokens.weight"),
    Rule("MTP head", r"(?:shared_head\.head|lm_head|head)\.weight", "shared_head.head.weight"),
    Rule("MTP head norm", r"(?:shared_head\.)?norm\.weight", "shared_head.norm.weight"),
    Rule("MTP head hyper-connection", _HC_HEAD, "hc_head_{part}"),
)

TOP_RULES: Final[tuple[Rule, ...]] = (
    Rule("embedding", r"(?:model\.)?(?:embed|embed_tokens)\.weight", "model.embed_tokens.weight"),
    Rule("last norm", r"(?:model\.)?norm\.weight", "model.norm.weight"),
    Rule("head", r"(?:model\.)?(?:lm_head|head)\.weight", "lm_head.weight"),
    Rule("head hyper-connection", rf"(?:model\.)?{_HC_HEAD}", "model.hc_head_{part}"),
)

# A dropping rule sees the whole name; its purpose is the reason given to the user.
DROP_RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "KV-cache scale: vLLM's DeepSeek-V4 KV cache has no such parameter",
        r".+\.(?:k|v|kv)_(?:scale|bias)",
        None,
    ),
    Rule(
        "rotary frequencies: vLLM computes them from the config",
        r"(?:.+\.)?rotary_emb\.(?:[a-z]+_)*inv_freq",
        None,
    ),
)

RULES: Final[tuple[Rule, ...]] = (*TOP_RULES, *LAYER_RULES, *MTP_RULES, *DROP_RULES)

_SCOPE = re.compile(r"(?:model\.)?(layers|mtp)\.([0-9]+)\.(.+)")
_IN_MTP = (*LAYER_RULES, *MTP_RULES)
_EXPERT = re.compile(
    r"(?P<layer>model\.layers\.[0-9]+|mtp\.[0-9]+)\.ffn\.experts\.(?P<expert>[0-9]+)"
    r"\.(?P<projection>w[123])\.(?P<leaf>weight|weight_scale|weight_scale_2|input_scale|weight_scale_inv)"
)


def _find(name: str, num_hidden_layers: int | None) -> tuple[Rule, str | None]:
    """The rule that covers a name, and the canonical name it gives."""
    scope = _SCOPE.fullmatch(name)
    prefix, text, rules = "", name, TOP_RULES
    if scope:
        kind, index, text = scope.groups()
        if kind == "layers" and num_hidden_layers is not None and int(index) >= num_hidden_layers:
            kind, index = "mtp", str(int(index) - num_hidden_layers)
        prefix, rules = (f"mtp.{index}.", _IN_MTP) if kind == "mtp" else (f"model.layers.{index}.", LAYER_RULES)
    for rule in rules:
        if (match := rule.regex.fullmatch(text)) and rule.replacement is not None:
            groups = {g: _SPELLING.get(g, {}).get(value, value) for g, value in match.groupdict().items()}
            return rule, prefix + rule.replacement.format(**groups)
    for rule in DROP_RULES:
        if rule.regex.fullmatch(name):
            return rule, None
    hint = "add a Rule to vllm_nvfp4/names.py, or take the tensor out of the checkpoint"
    if rules is LAYER_RULES and any(rule.regex.fullmatch(text) for rule in MTP_RULES):
        hint = f"{text!r} belongs to an MTP layer: pass num_hidden_layers (found {num_hidden_layers})"
    raise UnknownNameError(f"no rule covers the tensor {name!r}; expected a DeepSeek-V4 tensor name; {hint}")


def canonical(name: str, num_hidden_layers: int | None = None) -> str | None:
    """Canonical name = scope + the first rule's replacement; idempotent.

    Args:
        name: a tensor name in any layout, or a canonical one.
        num_hidden_layers: layers of the main model, at least 1; `layers.{num_hidden_layers + i}` then means `mtp.i`.

    Returns:
        The canonical name; None for a tensor dropped on purpose (`dropped_reason` tells why).

    Raises:
        UnknownNameError: no rule covers the name.
        ValueError: num_hidden_layers is below 1.
    """
    if num_hidden_layers is not None and num_hidden_layers < 1:
        raise ValueError(
            f"num_hidden_layers is {num_hidden_layers}; expected at least 1: pass the model config's value"
        )
    return _find(name, num_hidden_layers)[1]


def dropped_reason(name: str) -> str | None:
    """Why `canonical` drops this tensor; None if it does not drop it."""
    return next((rule.purpose for rule in DROP_RULES if rule.regex.fullmatch(name)), None)


class _Mark(NamedTuple):
    layout: Layout
    purpose: str
    regex: re.Pattern[str]


_DEEPSEEK = r"(?:(?:attn|ffn|attn_norm|ffn_norm)\.|hc_(?:attn|ffn)_).+"
_MARKS: Final = (
    _Mark(
        Layout.L1,
        "transformers module names under layers.N",
        re.compile(
            r"(?:model\.)?layers\.[0-9]+"
            r"\.(?:self_attn|mlp|input_layernorm|post_attention_layernorm|attn_hc|ffn_hc)\..+"
        ),
    ),
    _Mark(Layout.L2, "DeepSeek names under model.layers.N", re.compile(rf"model\.layers\.[0-9]+\.{_DEEPSEEK}")),
    _Mark(Layout.BARE, "DeepSeek names under layers.N, no prefix", re.compile(rf"layers\.[0-9]+\.{_DEEPSEEK}")),
)
# Not a layout by itself: it tells L3 from bare.
_FP8_MARK: Final = _Mark(
    Layout.L3,
    "FP8 scale of a linear other than a routed expert",
    re.compile(r"(?:layers|mtp)\.[0-9]+\.(?!ffn\.experts\.).+\.(?:scale|weight_scale_inv)"),
)
_KNOWN_LAYOUTS: Final = (
    "L1 (transformers names: model.layers.N.self_attn.q_a_proj), L2 (ModelOpt 0.47: model.layers.N.attn.wq_a), "
    "L3 (layers.N.attn.wq_a with FP8 .scale), bare (layers.N.attn.wq_a, all NVFP4)"
)


def detect_layout(names: Iterable[str]) -> tuple[Layout, str]:
    """Layout = the only mark that the checkpoint's names carry.

    Only the main model's layers decide between L1, L2 and unprefixed names: the rest (head, MTP) is spelled alike in
    several layouts. L3 is an unprefixed checkpoint with an FP8 scale on any linear other than a routed expert's.

    Args:
        names: all tensor names of the checkpoint, of every shard file.

    Returns:
        The layout, and the evidence: the name and the rule that decided.

    Raises:
        UnknownLayoutError: no name carries a mark, or names of two layouts are mixed.
    """
    first: dict[Layout, str] = {}
    samples: list[str] = []
    num_names = 0
    for name in names:
        num_names += 1
        if len(samples) < 3:
            samples.append(name)
        for mark in (*_MARKS, _FP8_MARK):
            if mark.layout not in first and mark.regex.fullmatch(name):
                first[mark.layout] = name
    found = [mark for mark in _MARKS if mark.layout in first]
    if not found:
        raise UnknownLayoutError(
            f"no DeepSeek-V4 layer among {num_names} tensor names, which begin with {samples}; known layouts: "
            f"{_KNOWN_LAYOUTS}; check that this is a whole DeepSeek-V4 checkpoint (all shard files), or add its "
            "spelling to vllm_nvfp4/names.py"
        )
    if len(found) > 1:
        mixed = " and ".join(f"{mark.layout} ({first[mark.layout]!r}: {mark.purpose})" for mark in found)
        raise UnknownLayoutError(
            f"names of different layouts in one checkpoint: {mixed}; known layouts: {_KNOWN_LAYOUTS}; export the "
            "checkpoint again with one tool, or remove the shard files that another export left behind"
        )
    mark = found[0]
    if mark.layout is not Layout.BARE:
        return mark.layout, f"{first[mark.layout]!r}: {mark.purpose}"
    if Layout.L3 in first:
        return Layout.L3, f"{first[Layout.L3]!r}: {_FP8_MARK.purpose}"
    return Layout.BARE, f"{first[Layout.BARE]!r}: {mark.purpose}, and no {_FP8_MARK.purpose}"


def parse_expert(canonical_name: str) -> ExpertName | None:
    """(layer, expert, projection, leaf) of a routed expert's canonical name; None for any other name."""
    match = _EXPERT.fullmatch(canonical_name)
    if match is None:
        return None
    return ExpertName(match["layer"], int(match["expert"]), match["projection"], match["leaf"])


def split_leaf(canonical_name: str) -> tuple[str, str]:
    """(module, leaf) = the name cut at its last dot; a parameter such as `hc_attn_fn` is a leaf of its layer.

    Raises:
        UnknownNameError: the name has no module.
    """
    module, dot, leaf = canonical_name.rpartition(".")
    if not (module and dot and leaf):
        raise UnknownNameError(f"{canonical_name!r} is no <module>.<leaf>; pass what canonical() returned")
    return module, leaf


# vLLM's fused module, with the module that holds it -> its shards, in the order of their rows.
FUSED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "attn.fused_wqa_wkv": ("wq_a", "wkv"),
        "compressor.fused_wkv_wgate": ("wkv", "wgate"),
        "shared_experts.gate_up_proj": ("w1", "w3"),
    }
)
_SHARD: Final[Mapping[tuple[str, str], tuple[str, int]]] = {
    (fused_name.partition(".")[0], shard): (fused_name.partition(".")[2], shard_id)
    for fused_name, shards in FUSED.items()
    for shard_id, shard in enumerate(shards)
}


def fused(canonical_name: str) -> tuple[str, int] | None:
    """(vLLM's parameter, shard id) of a tensor that vLLM stores in a fused module; None if it is stored as named."""
    module, leaf = split_leaf(canonical_name)
    parent, _, shard = module.rpartition(".")
    target = _SHARD.get((parent.rpartition(".")[2], shard))
    return None if target is None else (f"{parent}.{target[0]}.{leaf}", target[1])


def module_of(vllm_prefix: str) -> tuple[str, ...]:
    """Canonical module names that feed vLLM's module, in shard order; an unfused module feeds from its own name."""
    parent, _, module = vllm_prefix.rpartition(".")
    shards = FUSED.get(f"{parent.rpartition('.')[2]}.{module}")
    return (vllm_prefix,) if shards is None else tuple(f"{parent}.{shard}" for shard in shards)
