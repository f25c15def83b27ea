"""Checkpoint names: every rule, every layout, round trips by a table written the other way round, and a real export."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_nvfp4 import names
from vllm_nvfp4.names import ExpertName, Layout, UnknownLayoutError, UnknownNameError, canonical, detect_layout

AFFINE_A = Path(__file__).parents[1] / "data" / "affine-a" / "model.safetensors"
NUM_LAYERS = 4
LAYER = "model.layers.2."
NVFP4 = ("weight", "weight_scale", "weight_scale_2", "input_scale")
FP8 = ("weight", "weight_scale_inv")

# rule | spellings | canonical name, which is tested as a spelling too. Without a scope in front it lies in layer 2.
CASES = """
routed expert | mlp.experts.17.gate_proj.weight_scale | ffn.experts.17.w1.weight_scale
routed expert | mlp.experts.3.down_proj.input_scale | ffn.experts.3.w2.input_scale
routed expert | mlp.experts.0.up_proj.weight_scale_2 | ffn.experts.0.w3.weight_scale_2
routed expert | ffn.experts.255.w3.scale | ffn.experts.255.w3.weight_scale_inv
shared expert, gate | mlp.shared_experts.gate_proj.weight | ffn.shared_experts.w1.weight
shared expert, up | mlp.shared_experts.up_proj.weight_scale_2 | ffn.shared_experts.w3.weight_scale_2
shared expert, down | mlp.shared_experts.down_proj.weight | ffn.shared_experts.down_proj.weight
shared expert, down | ffn.shared_experts.w2.weight | ffn.shared_experts.down_proj.weight
router weight | mlp.gate.weight | ffn.gate.weight
router bias | mlp.gate.e_score_correction_bias ffn.gate.bias | ffn.gate.e_score_correction_bias
router hash table | mlp.gate.tid2eid | ffn.gate.tid2eid
norm before attention | input_layernorm.weight | attn_norm.weight
norm before the experts | post_attention_layernorm.weight | ffn_norm.weight
hyper-connection, DeepSeek | hc_attn_scale | hc_attn_scale
hyper-connection, DeepSeek | hc_ffn_base | hc_ffn_base
hyper-connection, transformers | attn_hc.scale | hc_attn_scale
hyper-connection, transformers | ffn_hc.fn | hc_ffn_fn
query down | self_attn.q_a_proj.weight | attn.wq_a.weight
query down | attn.wq_a.scale | attn.wq_a.weight_scale_inv
query up | self_attn.q_b_proj.input_scale | attn.wq_b.input_scale
latent KV | self_attn.kv_proj.weight_scale | attn.wkv.weight_scale
output, grouped | self_attn.o_a_proj.weight | attn.wo_a.weight
output | self_attn.o_b_proj.weight_scale_2 | attn.wo_b.weight_scale_2
query norm | self_attn.q_a_norm.weight | attn.q_norm.weight
latent KV norm | self_attn.kv_norm.weight attn.norm.weight | attn.kv_norm.weight
attention sink | self_attn.sinks | attn.attn_sink
compressor KV | self_attn.compressor.kv_proj.weight | attn.compressor.wkv.weight
compressor gate | self_attn.compressor.gate_proj.input_scale | attn.compressor.wgate.input_scale
compressor position bias | self_attn.compressor.position_bias | attn.compressor.ape
compressor norm | self_attn.compressor.kv_norm.weight | attn.compressor.norm.weight
indexer query | self_attn.compressor.indexer.q_b_proj.weight | attn.indexer.wq_b.weight
indexer query | self_attn.indexer.q_b_proj.weight | attn.indexer.wq_b.weight
indexer head weights | self_attn.compressor.indexer.scorer.weights_proj.weight | attn.indexer.weights_proj.weight
indexer head weights | self_attn.indexer.scorer.weights_proj.weight | attn.indexer.weights_proj.weight
indexer head weights | self_attn.indexer.weights_proj.weight | attn.indexer.weights_proj.weight
indexer compressor KV | self_attn.compressor.indexer.kv_proj.weight | attn.indexer.compressor.wkv.weight
indexer compressor KV | self_attn.indexer.kv_proj.weight | attn.indexer.compressor.wkv.weight
indexer compressor KV | self_attn.indexer.compressor.kv_proj.weight | attn.indexer.compressor.wkv.weight
indexer compressor gate | self_attn.compressor.indexer.gate_proj.input_scale | attn.indexer.compressor.wgate.input_scale
indexer compressor gate | self_attn.indexer.gate_proj.input_scale | attn.indexer.compressor.wgate.input_scale
indexer compressor gate | self_attn.indexer.compressor.gate_proj.input_scale | attn.indexer.compressor.wgate.input_scale
indexer compressor position bias | self_attn.compressor.indexer.position_bias | attn.indexer.compressor.ape
indexer compressor position bias | self_attn.indexer.position_bias | attn.indexer.compressor.ape
indexer compressor position bias | self_attn.indexer.compressor.position_bias | attn.indexer.compressor.ape
indexer compressor norm | self_attn.compressor.indexer.kv_norm.weight | attn.indexer.compressor.norm.weight
indexer compressor norm | self_attn.indexer.kv_norm.weight | attn.indexer.compressor.norm.weight
indexer compressor norm | self_attn.indexer.compressor.kv_norm.weight | attn.indexer.compressor.norm.weight
MTP input norm | model.mtp.0.enorm.weight model.layers.4.enorm.weight | mtp.0.enorm.weight
MTP input norm | layers.5.hnorm.weight | mtp.1.hnorm.weight
MTP input projection | mtp.0.e_proj.scale | mtp.0.e_proj.weight_scale_inv
MTP input projection | model.layers.4.h_proj.weight_scale | mtp.0.h_proj.weight_scale
MTP embedding | mtp.0.emb.tok_emb.weight mtp.0.embed.weight | mtp.0.embed_tokens.weight
MTP embedding | model.layers.4.embed_tokens.weight | mtp.0.embed_tokens.weight
MTP head | mtp.0.head.weight model.mtp.0.lm_head.weight | mtp.0.shared_head.head.weight
MTP head | model.layers.4.shared_head.head.weight | mtp.0.shared_head.head.weight
MTP head norm | mtp.0.norm.weight model.layers.4.shared_head.norm.weight | mtp.0.shared_head.norm.weight
MTP head hyper-connection | model.layers.4.hc_head.hc_scale | mtp.0.hc_head_scale
latent KV norm | mtp.0.attn.norm.weight model.layers.4.self_attn.kv_norm.weight | mtp.0.attn.kv_norm.weight
routed expert | mtp.0.ffn.experts.9.w2.scale | mtp.0.ffn.experts.9.w2.weight_scale_inv
routed expert | model.layers.4.mlp.experts.9.down_proj.scale | mtp.0.ffn.experts.9.w2.weight_scale_inv
embedding | embed.weight model.embed.weight | model.embed_tokens.weight
last norm | norm.weight | model.norm.weight
head | head.weight model.head.weight | lm_head.weight
head hyper-connection | model.hc_head.hc_scale hc_head_scale | model.hc_head_scale
"""
DROPPED = [
    ("model.layers.0.self_attn.k_proj.k_scale", "KV-cache scale"),
    ("layers.60.attn.v_scale", "KV-cache scale"),
    ("model.layers.0.self_attn.v_proj.v_bias", "KV-cache scale"),
    ("mtp.0.attn.kv_scale", "KV-cache scale"),
    ("model.rotary_emb.inv_freq", "rotary frequencies"),
    ("rotary_emb.compress_inv_freq", "rotary frequencies"),
    ("model.layers.1.self_attn.compressor.indexer.rotary_emb.inv_freq", "rotary frequencies"),
]
FLAT = [
    (rule, spelling, expected)
    for rule, spellings, expected in (row.split(" | ") for row in CASES.strip().splitlines())
    for spelling in dict.fromkeys((*spellings.split(), expected))
]


def in_layer_2(name: str) -> str:
    has_scope = name.startswith(("model.", "layers.", "mtp.", "embed.", "norm.", "head.", "lm_head.", "hc_head"))
    return name if has_scope else LAYER + name


@pytest.mark.parametrize(("rule", "spelling", "expected"), FLAT)
def test_each_rule_by_each_spelling(rule: str, spelling: str, expected: str) -> None:
    name, expected = in_layer_2(spelling), in_layer_2(expected)
    assert canonical(name, NUM_LAYERS) == expected
    if rule != "hyper-connection, transformers" or name != expected:  # its result is the other spelling's rule
        assert names._find(name, NUM_LAYERS)[0].purpose == rule
    if name.startswith(LAYER):
        assert canonical(name.removeprefix("model.")) == expected


def test_every_rule_of_the_table_is_exercised() -> None:
    tested = {names._find(in_layer_2(spelling), NUM_LAYERS)[0].purpose for _, spelling, _ in FLAT}
    tested |= {names._find(name, None)[0].purpose for name, _ in DROPPED}
    assert tested == {rule.purpose for rule in names.RULES}
    assert len(names.RULES) == len(tested), "two rules share a purpose: evidence would be ambiguous"


@pytest.mark.parametrize(("name", "reason"), DROPPED)
def test_dropped_with_a_reason(name: str, reason: str) -> None:
    assert canonical(name) is None
    assert (names.dropped_reason(name) or "").startswith(reason)


def test_nothing_that_is_kept_has_a_dropping_reason() -> None:
    assert [s for _, s, _ in FLAT if names.dropped_reason(in_layer_2(s)) is not None] == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model",
        "model.layers.0",
        "model.layers.0.",
        "model.layers.0.attn",
        "model.layers.0.attn.wq_a",
        "model.layers.0.attn.wq_a.bias",
        "model.layers.0.attn.wq_a.pre_quant_scale",
        "model.layers.0.attn.wq_a.weight\n",
        "model.layers.0.attn.fused_wqa_wkv.weight",
        "model.layers.x.attn.wq_a.weight",
        "model.layers.\u0663.attn.wq_a.weight",
        "xmodel.layers.0.attn.wq_a.weight",
        "model.layers.0.ffn.experts.w1.weight",
        "model.layers.0.ffn.experts.0.w4.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.attn.compressor.wq_b.weight",
        "model.layers.0.hc_attn_fn.weight",
        "model.layers.0.norm.weight",
        "mtp.0.main_proj.weight",
        "lm_lm_head.weight",
        "lm_head.weight_scale",
    ],
)
def test_unknown_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"no rule covers .*; expected a DeepSeek-V4 tensor name; .*") as error:
        canonical(name)
    assert repr(name) in str(error.value)
    assert names.dropped_reason(name) is None


def test_mtp_leaf_in_a_plain_layer_asks_for_the_number_of_layers() -> None:
    with pytest.raises(UnknownNameError, match=r"'enorm.weight' belongs to an MTP layer: pass num_hidden_layers"):
        canonical("model.layers.61.enorm.weight")
    with pytest.raises(UnknownNameError, match=r"num_hidden_layers \(found 62\)"):
        canonical("model.layers.61.enorm.weight", 62)
    assert canonical("model.layers.61.enorm.weight", 61) == "mtp.0.enorm.weight"


@pytest.mark.parametrize("num_hidden_layers", [0, -1])
def test_num_hidden_layers_below_one_is_refused(num_hidden_layers: int) -> None:
    with pytest.raises(ValueError, match=rf"num_hidden_layers is {num_hidden_layers}; expected at least 1"):
        canonical("model.norm.weight", num_hidden_layers)


# A whole model, built from canonical names, and for each layout a table from canonical module to that layout's: the
# other direction than the code's, and written with literal text.
BLOCK_LINEARS = ("attn.wq_a", "attn.wkv", "attn.wq_b", "attn.wo_b")
SHARED_LINEARS = ("ffn.shared_experts.w1", "ffn.shared_experts.w3", "ffn.shared_experts.down_proj")
COMPRESSOR_LINEARS = ("attn.compressor.wkv", "attn.compressor.wgate")
INDEXER_LINEARS = (
    "attn.indexer.wq_b",
    "attn.indexer.weights_proj",
    "attn.indexer.compressor.wkv",
    "attn.indexer.compressor.wgate",
)
HYPER = tuple(f"{block}_{part}" for block in ("hc_attn", "hc_ffn") for part in ("fn", "base", "scale"))
DEEPSEEK = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "lm_head": "head",
    "shared_head.norm": "norm",
    "shared_head.head": "head",
    "embed_tokens": "emb.tok_emb",
    "ffn.shared_experts.down_proj": "ffn.shared_experts.w2",
    "ffn.gate.e_score_correction_bias": "ffn.gate.bias",
}
MODELOPT = DEEPSEEK | {
    "model.embed_tokens": "model.embed_tokens",
    "model.norm": "model.norm",
    "attn.kv_norm": "attn.norm",
    "model.hc_head_fn": "model.hc_head.hc_fn",
    "model.hc_head_base": "model.hc_head.hc_base",
    "model.hc_head_scale": "model.hc_head.hc_scale",
}
TRANSFORMERS_PAIRS = """
model.hc_head_fn=model.hc_head.hc_fn model.hc_head_base=model.hc_head.hc_base
model.hc_head_scale=model.hc_head.hc_scale hc_head_fn=hc_head.hc_fn hc_head_base=hc_head.hc_base
hc_head_scale=hc_head.hc_scale attn_norm=input_layernorm ffn_norm=post_attention_layernorm hc_attn_fn=attn_hc.fn
hc_attn_base=attn_hc.base hc_attn_scale=attn_hc.scale hc_ffn_fn=ffn_hc.fn hc_ffn_base=ffn_hc.base
hc_ffn_scale=ffn_hc.scale attn.wq_a=self_attn.q_a_proj attn.wq_b=self_attn.q_b_proj attn.wkv=self_attn.kv_proj
attn.wo_a=self_attn.o_a_proj attn.wo_b=self_attn.o_b_proj attn.q_norm=self_attn.q_a_norm
attn.kv_norm=self_attn.kv_norm attn.attn_sink=self_attn.sinks attn.compressor.wkv=self_attn.compressor.kv_proj
attn.compressor.wgate=self_attn.compressor.gate_proj attn.compressor.ape=self_attn.compressor.position_bias
attn.compressor.norm=self_attn.compressor.kv_norm attn.indexer.wq_b=self_attn.compressor.indexer.q_b_proj
attn.indexer.weights_proj=self_attn.compressor.indexer.scorer.weights_proj
attn.indexer.compressor.wkv=self_attn.compressor.indexer.kv_proj
attn.indexer.compressor.wgate=self_attn.compressor.indexer.gate_proj
attn.indexer.compressor.ape=self_attn.compressor.indexer.position_bias
attn.indexer.compressor.norm=self_attn.compressor.indexer.kv_norm ffn.gate=mlp.gate
ffn.gate.e_score_correction_bias=mlp.gate.e_score_correction_bias ffn.gate.tid2eid=mlp.gate.tid2eid
ffn.shared_experts.w1=mlp.shared_experts.gate_proj ffn.shared_experts.w3=mlp.shared_experts.up_proj
ffn.shared_experts.down_proj=mlp.shared_experts.down_proj
"""
TRANSFORMERS = {key: value for key, _, value in (pair.partition("=") for pair in TRANSFORMERS_PAIRS.split())}
EXPERT_OF_TRANSFORMERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LIFTED_INDEXER = TRANSFORMERS | {
    key: value.replace(".compressor.indexer", ".indexer").replace(".scorer", "")
    for key, value in TRANSFORMERS.items()
    if ".indexer" in value
}
NESTED_INDEXER = LIFTED_INDEXER | {
    "attn.indexer.compressor.wkv": "self_attn.indexer.compressor.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.indexer.compressor.gate_proj",
    "attn.indexer.compressor.ape": "self_attn.indexer.compressor.position_bias",
    "attn.indexer.compressor.norm": "self_attn.indexer.compressor.kv_norm",
}


def block_names(linear_leaves: tuple[str, ...], compressor: bool, indexer: bool, hashed: bool) -> list[str]:
    """Canonical names below one decoder layer; 4 experts, wo_a in high precision."""
    linears = (*BLOCK_LINEARS, *SHARED_LINEARS)
    linears += COMPRESSOR_LINEARS * compressor + INDEXER_LINEARS * indexer
    found = [f"{linear}.{leaf}" for linear in linears for leaf in linear_leaves]
    found += [f"ffn.experts.{e}.{w}.{leaf}" for e in range(4) for w in ("w1", "w2", "w3") for leaf in NVFP4]
    found += ["attn.wo_a.weight", "attn.q_norm.weight", "attn.kv_norm.weight", "attn.attn_sink", *HYPER]
    found += ["attn_norm.weight", "ffn_norm.weight", "ffn.gate.weight"]
    found += ["ffn.gate.tid2eid"] if hashed else ["ffn.gate.e_score_correction_bias"]
    found += ["attn.compressor.ape", "attn.compressor.norm.weight"] * compressor
    return found + ["attn.indexer.compressor.ape", "attn.indexer.compressor.norm.weight"] * indexer


def model_names(linear_leaves: tuple[str, ...]) -> list[str]:
    """Canonical names of 4 layers (sliding, CSA, HCA, CSA; the first routed by hash) and one MTP layer."""
    found = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    found += [f"model.hc_head_{part}" for part in ("fn", "base", "scale")]
    for layer in range(NUM_LAYERS):
        block = block_names(linear_leaves, compressor=layer > 0, indexer=layer in (1, 3), hashed=layer == 0)
        found += [f"model.layers.{layer}.{name}" for name in block]
    mtp = block_names(linear_leaves, compressor=False, indexer=False, hashed=False)
    mtp += [f"{linear}.{leaf}" for linear in ("e_proj", "h_proj") for leaf in linear_leaves]
    mtp += [f"{norm}.weight" for norm in ("enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens")]
    mtp += [f"hc_head_{part}" for part in ("fn", "base", "scale")]
    return found + [f"mtp.0.{name}" for name in mtp]


def rename(name: str, table: dict[str, str], layers: str, mtp: str, experts: dict[str, str], fp8_scale: str) -> str:
    """A canonical name in another layout's spelling."""
    scope = re.match(r"model\.layers\.(\d+)\.|mtp\.0\.", name)
    prefix = "" if scope is None else f"{layers}{scope[1]}." if scope[1] else mtp
    rest = name if scope is None else name[scope.end() :]
    if rest.startswith("ffn.experts."):
        _, _, expert, projection, leaf = rest.split(".")
        return f"{prefix}{'mlp' if experts else 'ffn'}.experts.{expert}.{experts.get(projection, projection)}.{leaf}"
    module, _, leaf = rest.rpartition(".")
    leaf = fp8_scale if leaf == "weight_scale_inv" else leaf
    if rest in table:  # a parameter that is no `<linear>.<leaf>`
        return prefix + table[rest]
    if layers == "layers." and rest.startswith("model.hc_head"):
        return rest.removeprefix("model.")
    return f"{prefix}{table.get(module, module)}.{leaf}" if module else prefix + leaf


# layout, canonical names, table, prefix of a layer, prefix of the MTP layer, experts' spelling, leaf of an FP8 scale
LAYOUTS = {
    "L1": (Layout.L1, NVFP4, TRANSFORMERS, "model.layers.", "model.layers.4.", EXPERT_OF_TRANSFORMERS, ""),
    "L1, indexer lifted": (Layout.L1, NVFP4, LIFTED_INDEXER, "model.layers.", "mtp.0.", EXPERT_OF_TRANSFORMERS, ""),
    "L1, indexer nested": (Layout.L1, NVFP4, NESTED_INDEXER, "layers.", "layers.4.", EXPERT_OF_TRANSFORMERS, ""),
    "L2": (Layout.L2, NVFP4, MODELOPT, "model.layers.", "model.mtp.0.", {}, ""),
    "L3": (Layout.L3, FP8, DEEPSEEK, "layers.", "mtp.0.", {}, "scale"),
    "L3, suffix _inv": (Layout.L3, FP8, DEEPSEEK, "layers.", "mtp.0.", {}, "weight_scale_inv"),
    "bare": (Layout.BARE, NVFP4, DEEPSEEK, "layers.", "mtp.0.", {}, ""),
}


def renamed(key: str) -> tuple[list[str], list[str]]:
    _, leaves, table, layers, mtp, experts, fp8_scale = LAYOUTS[key]
    expected = model_names(leaves)
    return [rename(name, table, layers, mtp, experts, fp8_scale) for name in expected], expected


@pytest.mark.parametrize("key", LAYOUTS)
def test_a_whole_model_comes_back_from_each_layout(key: str) -> None:
    spelled, expected = renamed(key)
    assert len(set(spelled)) == len(spelled) == len(set(expected)) > 400
    assert [canonical(name, NUM_LAYERS) for name in spelled] == expected
    differing = sum(a != b for a, b in zip(spelled, expected, strict=True))
    assert differing > 0, "the layout's table renames nothing: the test would compare a list with itself"
    assert [canonical(name, NUM_LAYERS) for name in expected] == expected
    assert [canonical(name) for name in expected] == expected


@pytest.mark.parametrize("key", LAYOUTS)
def test_each_layout_is_detected_and_says_why(key: str) -> None:
    spelled, _ = renamed(key)
    for order in (spelled, spelled[::-1]):
        layout, evidence = detect_layout(iter(order))
        assert layout is LAYOUTS[key][0]
        quoted = re.match(r"'([^']+)': (.+)", evidence)
        assert quoted is not None
        assert quoted[1] in spelled
        expected = {"L1": "transformers", "L2": "DeepSeek names under model.", "L3": "FP8", "bare": "no prefix"}[layout]
        assert expected in quoted[2]


@pytest.mark.parametrize(
    ("layout", "rests"),
    [
        (Layout.L1, "self_attn.sinks mlp.gate.weight input_layernorm.weight attn_hc.fn ffn_hc.scale"),
        (Layout.L1, "post_attention_layernorm.weight"),
        (Layout.L2, "attn.attn_sink ffn.gate.bias attn_norm.weight ffn_norm.weight hc_attn_fn hc_ffn_scale"),
    ],
)
def test_one_name_of_a_layer_is_enough(layout: Layout, rests: str) -> None:
    for rest in rests.split():
        assert detect_layout([f"model.layers.0.{rest}"])[0] is layout
        unprefixed = Layout.BARE if layout is Layout.L2 else layout
        assert detect_layout([f"layers.12.{rest}"])[0] is unprefixed


def test_an_fp8_scale_on_a_routed_expert_alone_is_not_l3() -> None:
    found = ["layers.0.attn.wq_a.weight", "layers.0.ffn.experts.3.w1.scale", "mtp.0.ffn.experts.3.w1.scale"]
    assert detect_layout(found)[0] is Layout.BARE
    for scale in ("layers.0.ffn.shared_experts.w1.scale", "mtp.0.e_proj.scale", "layers.0.attn.wkv.weight_scale_inv"):
        assert detect_layout([*found, scale]) == (
            Layout.L3,
            f"{scale!r}: FP8 scale of a linear other than a routed expert",
        )


@pytest.mark.parametrize(
    ("found", "count", "shown"),
    [
        ([], "0 tensor names", "[]"),
        (["a.weight"], "1 tensor names", "['a.weight']"),
        (
            ["model.layers.0.linear_attn.a", "lm_head.weight", "model.norm.weight", "fourth"],
            "4 tensor names",
            "['model.layers.0.linear_attn.a', 'lm_head.weight', 'model.norm.weight']",
        ),
    ],
)
def test_unknown_layout_lists_what_was_found(found: list[str], count: str, shown: str) -> None:
    with pytest.raises(UnknownLayoutError) as error:
        detect_layout(found)
    message = str(error.value)
    assert count in message
    assert shown in message
    assert "fourth" not in message
    assert all(f"{layout} (" in message for layout in Layout)
    assert "check that this is a whole DeepSeek-V4 checkpoint" in message


@pytest.mark.parametrize(
    ("one", "other", "layouts"),
    [
        ("model.layers.0.self_attn.q_a_proj.weight", "model.layers.1.attn.wq_a.weight", "L1 L2"),
        ("model.layers.0.mlp.gate.weight", "layers.1.ffn.gate.weight", "L1 bare"),
        ("model.layers.0.hc_attn_fn", "layers.1.hc_attn_fn", "L2 bare"),
        ("model.layers.0.attn_hc.fn", "model.layers.0.hc_ffn_fn", "L1 L2"),
    ],
)
def test_mixed_layouts_are_refused(one: str, other: str, layouts: str) -> None:
    with pytest.raises(UnknownLayoutError, match="names of different layouts in one checkpoint") as error:
        detect_layout([other, one, "lm_head.weight"])
    message = str(error.value)
    first, second = layouts.split()
    assert f"{first} ({one!r}" in message
    assert f"{second} ({other!r}" in message
    assert "export the checkpoint again" in message


def test_parse_expert() -> None:
    parse = names.parse_expert
    assert parse("model.layers.3.ffn.experts.255.w2.weight_scale_2") == ExpertName(
        "model.layers.3", 255, "w2", "weight_scale_2"
    )
    assert parse("mtp.10.ffn.experts.3.w3.weight_scale_inv") == ("mtp.10", 3, "w3", "weight_scale_inv")
    assert parse("mtp.0.ffn.experts.0.w1.weight") == ("mtp.0", 0, "w1", "weight")
    assert parse("model.layers.3.ffn.shared_experts.w1.weight") is None
    assert parse("model.layers.3.mlp.experts.0.gate_proj.weight") is None
    assert parse("model.layers.3.ffn.experts.0.w1.scale") is None
    assert parse("model.norm.weight") is None


def test_every_expert_of_the_model_parses_back() -> None:
    experts = [name for name in model_names(NVFP4) if ".experts." in name]
    assert len(experts) == (NUM_LAYERS + 1) * 4 * 3 * 4
    for name in experts:
        parsed = names.parse_expert(name)
        assert parsed is not None
        assert f"{parsed.layer}.ffn.experts.{parsed.expert}.{parsed.projection}.{parsed.leaf}" == name


@pytest.mark.parametrize(
    ("name", "parameter", "shard_id"),
    [
        ("model.layers.0.attn.wq_a.weight_scale", "model.layers.0.attn.fused_wqa_wkv.weight_scale", 0),
        ("mtp.0.attn.wkv.weight", "mtp.0.attn.fused_wqa_wkv.weight", 1),
        ("model.layers.2.attn.compressor.wkv.weight", "model.layers.2.attn.compressor.fused_wkv_wgate.weight", 0),
        (
            "model.layers.1.attn.indexer.compressor.wgate.input_scale",
            "model.layers.1.attn.indexer.compressor.fused_wkv_wgate.input_scale",
            1,
        ),
        (
            "model.layers.0.ffn.shared_experts.w1.weight_scale_2",
            "model.layers.0.ffn.shared_experts.gate_up_proj.weight_scale_2",
            0,
        ),
        (
            "model.layers.0.ffn.shared_experts.w3.weight_scale_inv",
            "model.layers.0.ffn.shared_experts.gate_up_proj.weight_scale_inv",
            1,
        ),
    ],
)
def test_fused_and_its_inverse(name: str, parameter: str, shard_id: int) -> None:
    assert names.fused(name) == (parameter, shard_id)
    shards = names.module_of(names.split_leaf(parameter)[0])
    assert shards[shard_id] == names.split_leaf(name)[0]
    assert len(shards) == 2


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.hc_head_fn",
        "model.layers.0.hc_attn_fn",
        "model.layers.0.attn.attn_sink",
        "model.layers.0.attn.wq_b.weight",
        "model.layers.0.attn.indexer.wq_b.weight",
        "model.layers.0.attn.compressor.ape",
        "model.layers.0.ffn.experts.1.w1.weight",
        "model.layers.0.ffn.shared_experts.down_proj.weight",
        "mtp.0.e_proj.weight",
    ],
)
def test_what_is_not_fused_stays(name: str) -> None:
    assert names.fused(name) is None
    module, leaf = names.split_leaf(name)
    assert f"{module}.{leaf}" == name
    assert "." not in leaf
    assert names.module_of(module) == (module,)


def test_fused_modules_and_their_shards() -> None:
    assert dict(names.FUSED) == {
        "attn.fused_wqa_wkv": ("wq_a", "wkv"),
        "compressor.fused_wkv_wgate": ("wkv", "wgate"),
        "shared_experts.gate_up_proj": ("w1", "w3"),
    }
    assert names.module_of("model.layers.1.attn.fused_wqa_wkv") == (
        "model.layers.1.attn.wq_a",
        "model.layers.1.attn.wkv",
    )
    assert names.module_of("lm_head") == ("lm_head",)


@pytest.mark.parametrize("name", ["", "weight", ".weight", "lm_head."])
def test_split_leaf_refuses_a_name_without_module(name: str) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(f"{name!r} is no <module>.<leaf>")):
        names.split_leaf(name)


def test_a_real_modelopt_export_has_no_unknown_name() -> None:
    with AFFINE_A.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__")
    assert len(header) == 1776
    layout, evidence = detect_layout(header)
    assert layout is Layout.L2
    assert evidence == "'model.layers.0.ffn.gate.tid2eid': DeepSeek names under model.layers.N"
    found = [canonical(name, NUM_LAYERS) for name in header]
    assert None not in found
    assert len(set(found)) == len(header), "two tensors of the export share a canonical name"
    assert [canonical(name) for name in found if name] == found
    experts = [parsed for name in found if name and (parsed := names.parse_expert(name))]
    assert len(experts) == len(set(experts)) == 4 * 32 * 3 * 4
    # As the synthetic model, with 32 experts instead of 4 and without an MTP layer: nothing is missing either.
    synthetic = {name for name in model_names(NVFP4) if not name.startswith("mtp.")}
    assert {name for name in found if name and ".experts." not in name} == {
        name for name in synthetic if ".experts." not in name
    }


def test_a_long_hostile_name_is_refused_in_linear_time() -> None:
    # Seconds if matching were quadratic in the length, for ever if exponential; a few milliseconds as it is.
    for name in ("model.layers.0." + "attn." * 50_000, "a_" * 100_000 + "rotary_emb.", "rotary_emb." + "a_" * 100_000):
        with pytest.raises(UnknownNameError):
            canonical(name)


def test_names_is_importable_alone() -> None:
    code = "import sys; import names; assert not {'torch', 'vllm', 'vllm_nvfp4'} & set(sys.modules)"
    path = str(Path(names.__file__).parent)
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.append({path!r}); {code}"], check=True)
