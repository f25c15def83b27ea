"""One checkpoint in every spelling a user may hold: the engine's answers are the same bits.

The export in tests/data/affine-a (layout L2) is renamed on the fly; its tensors stay as they are.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from serving import run_engine

pytestmark = pytest.mark.engine

# L2 -> bare DeepSeek names, in order; written here, not taken from the overlay's table.
TO_BARE = (("model.layers.", "layers."), ("model.embed_tokens.", "embed."), ("model.norm.", "norm."))
# bare -> transformers' module names, by piece of the name, in order.
TO_HF = (
    ("embed.", "model.embed_tokens."), ("layers.", "model.layers."), ("norm.", "model.norm."), ("head.", "lm_head."),
    ("hc_head_", "model.hc_head.hc_"),
)  # fmt: skip
TO_HF_PARTS = (
    (".hc_attn_", ".attn_hc."), (".hc_ffn_", ".ffn_hc."), (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."), (".attn.attn_sink", ".self_attn.sinks"),
    (".attn.kv_norm.", ".self_attn.kv_norm."), (".attn.q_norm.", ".self_attn.q_a_norm."),
    (".attn.wq_a.", ".self_attn.q_a_proj."), (".attn.wq_b.", ".self_attn.q_b_proj."),
    (".attn.wkv.", ".self_attn.kv_proj."), (".attn.wo_a.", ".self_attn.o_a_proj."),
    (".attn.wo_b.", ".self_attn.o_b_proj."), (".attn.indexer.compressor.", ".INDEXER."),
    (".attn.indexer.wq_b.", ".INDEXER.q_b_proj."), (".attn.indexer.weights_proj.", ".INDEXER.scorer.weights_proj."),
    (".attn.compressor.", ".self_attn.compressor."), (".wkv.", ".kv_proj."), (".wgate.", ".gate_proj."),
    (".ape", ".position_bias"), (".compressor.norm.", ".compressor.kv_norm."), (".INDEXER.norm.", ".INDEXER.kv_norm."),
    (".ffn.gate.bias", ".mlp.gate.e_score_correction_bias"), (".ffn.", ".mlp."),
    (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."),
)  # fmt: skip
INDEXER = {"L1": ".self_attn.compressor.indexer.", "L1 other spelling": ".self_attn.indexer."}


def bare(name: str) -> str:
    """The DeepSeek name of an L2 name."""
    for old, new in TO_BARE:
        if name.startswith(old):
            name = new + name[len(old) :]
    name = name.replace("model.hc_head.hc_", "hc_head_")
    return name.replace(".attn.norm.", ".attn.kv_norm.")


def hf(name: str, indexer: str) -> str:
    """The transformers name of an L2 name."""
    name = bare(name)
    name = next((new + name[len(old) :] for old, new in TO_HF if name.startswith(old)), name)
    for old, new in TO_HF_PARTS:
        name = name.replace(old, new)
    return name.replace(".INDEXER.", indexer)


def renamed(source: Path, target: Path, layout: str) -> Path:
    """A copy of the checkpoint with other names, in two shards with an index."""
    target.mkdir()
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    rename = bare if layout == "bare" else lambda name: hf(name, INDEXER[layout])
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {rename(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(tensors) == 1776
    weight_map = {}
    for shard in (0, 1):
        part = {name: tensors[name] for i, name in enumerate(sorted(tensors)) if i % 2 == shard}
        file_name = f"model-0000{shard + 1}-of-00002.safetensors"
        save_file(part, target / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def test_every_spelling_answers_with_the_same_bits(affine: Path, tmp_path: Path) -> None:
    folders = {"L2": affine}
    for i, layout in enumerate(("bare", *INDEXER)):
        folders[layout] = renamed(affine, tmp_path / f"copy{i}", layout)
    rows = json.loads((affine / "reference.json").read_text())
    # 24 tokens, and 300: over the window, several compressed blocks, both kinds of compressor.
    prompts = [rows[1]["prompt_token_ids"], rows[4]["prompt_token_ids"]]

    def answer(item: tuple[str, Path]) -> dict:
        return run_engine(tmp_path / f"run {item[0]}", item[1], prompts, max_tokens=8, env={"NVFP4_STRICT": "1"})

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(folders, pool.map(answer, folders.items()), strict=True))
    for layout, result in results.items():
        assert result["selection"] == results["L2"]["selection"], layout
        for ours, first in zip(result["answers"], results["L2"]["answers"], strict=True):
            assert ours["tokens"] == first["tokens"], layout
            assert ours["logprobs_hex"] == first["logprobs_hex"], layout
    assert results["L2"]["answers"][0]["tokens"] == rows[1]["greedy"][:8]
