"""The table of a DeepSeek-V4 model's tensors against a real export, and the tensor-parallel sizes it allows."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_nvfp4 import architecture, names
from vllm_nvfp4.checkpoint import read_folder
from vllm_nvfp4.config import DeepseekV4Config

# The published models, as far as their sizes matter here.
PRO: dict[str, Any] = {
    "hidden_size": 7168, "num_hidden_layers": 61, "n_routed_experts": 384, "num_experts_per_tok": 6,
    "moe_intermediate_size": 3072, "n_shared_experts": 1, "num_attention_heads": 128, "head_dim": 512,
    "q_lora_rank": 1536, "o_groups": 16, "o_lora_rank": 1024, "hc_mult": 4, "index_n_heads": 64, "index_head_dim": 128,
    "vocab_size": 129280, "num_hash_layers": 3, "compress_ratios": [128, 128] + [4, 128] * 29 + [4],
}  # fmt: skip
FLASH = PRO | {
    "hidden_size": 4096, "num_hidden_layers": 43, "n_routed_experts": 256, "moe_intermediate_size": 2048,
    "num_attention_heads": 64, "q_lora_rank": 1024, "o_groups": 8, "compress_ratios": [0, 0] + [4, 128] * 20 + [4],
}  # fmt: skip


def model(base: dict[str, Any] = PRO, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**(base | changes))


def test_the_table_is_exactly_what_a_real_export_holds(affine: Path) -> None:
    config = DeepseekV4Config(**json.loads((affine / "config.json").read_text()))
    wanted = architecture.expected(config)
    found = {
        names.canonical(name, config.num_hidden_layers): tensor.shape for name, tensor in read_folder(affine).items()
    }
    stored: dict[str, tuple[int, ...]] = dict(wanted.tensors)
    for module, (n, k) in wanted.linears.items():
        if module.endswith(".wo_a"):
            stored[f"{module}.weight"] = (n, k)
            continue
        stored |= {f"{module}.weight": (n, k // 2), f"{module}.weight_scale": (n, k // 16)}
        stored |= {f"{module}.weight_scale_2": (), f"{module}.input_scale": ()}
    assert found == stored
    assert len(found) == 1776
    assert wanted.optional == frozenset()


def test_a_published_models_matrices() -> None:
    wanted = architecture.expected(model())
    linears = wanted.linears
    assert linears["model.layers.0.attn.wq_a"] == (1536, 7168)
    assert linears["model.layers.0.attn.wkv"] == (512, 7168)
    assert linears["model.layers.0.attn.wq_b"] == (65536, 1536)
    assert linears["model.layers.0.attn.wo_a"] == (16384, 4096)
    assert linears["model.layers.0.attn.wo_b"] == (7168, 16384)
    assert linears["model.layers.0.attn.compressor.wkv"] == (512, 7168)
    assert "model.layers.0.attn.indexer.wq_b" not in linears
    assert linears["model.layers.2.attn.compressor.wgate"] == (1024, 7168)
    assert linears["model.layers.2.attn.indexer.wq_b"] == (8192, 1536)
    assert linears["model.layers.2.attn.indexer.weights_proj"] == (64, 7168)
    assert linears["model.layers.60.ffn.experts.383.w2"] == (7168, 3072)
    assert linears["model.layers.60.ffn.shared_experts.down_proj"] == (7168, 3072)
    assert wanted.tensors["model.layers.2.ffn.gate.tid2eid"] == (129280, 6)
    assert wanted.tensors["model.layers.3.ffn.gate.e_score_correction_bias"] == (384,)
    assert wanted.tensors["model.layers.3.hc_ffn_fn"] == (24, 28672)
    assert wanted.tensors["model.layers.2.attn.compressor.ape"] == (4, 1024)
    assert wanted.tensors["model.layers.3.attn.compressor.ape"] == (128, 512)
    # 1.6 trillion parameters, as announced for V4-Pro; 284 billion for V4-Flash.
    for base, billions in ((PRO, 1600), (FLASH, 284)):
        table = architecture.expected(model(base))
        count = sum(n * k for n, k in table.linears.values())
        assert abs(count / 1e9 / billions - 1) < 0.05, count


def test_a_layer_without_compression_has_no_compressor() -> None:
    for ratio in (0, 1):
        wanted = architecture.expected(model(FLASH, compress_ratios=[ratio] * 43))
        assert not [name for name in (*wanted.linears, *wanted.tensors) if "compressor" in name or "indexer" in name]


def test_mtp_layers_add_their_own() -> None:
    without, with_two = architecture.expected(model(FLASH)), architecture.expected(model(FLASH), mtp_layers=2)
    added = {name for name in with_two.linears if name not in without.linears}
    assert all(name.startswith(("mtp.0.", "mtp.1.")) for name in added)
    assert with_two.linears["mtp.1.h_proj"] == with_two.linears["mtp.0.e_proj"] == (4096, 4096)
    assert with_two.tensors["mtp.1.hc_head_fn"] == (4, 16384)
    assert with_two.tensors["mtp.0.ffn.gate.e_score_correction_bias"] == (256,)
    assert "mtp.0.attn.compressor.wkv" not in with_two.linears
    assert with_two.optional == {f"mtp.{i}.{t}.weight" for i in (0, 1) for t in ("shared_head.head", "embed_tokens")}
    assert {n for n in with_two.tensors if n not in without.tensors} >= with_two.optional


def test_a_tied_head_may_be_absent() -> None:
    assert architecture.expected(model(tie_word_embeddings=True)).optional == {"lm_head.weight"}
    assert architecture.expected(model(tie_word_embeddings=False)).optional == frozenset()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"compress_ratios": None}, "NoneType"),
        ({"compress_ratios": [128] * 60}, "list index out of range"),
        ({"num_hash_layers": None}, "not supported between instances of 'int' and 'NoneType'"),
        ({"o_groups": 0}, "zero"),
    ],
)
def test_a_configuration_that_is_no_model(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not describe a DeepSeek-V4 model.*compare it") as error:
        architecture.expected(model(**changes))
    assert found in str(error.value)


@pytest.mark.parametrize("field", sorted(PRO))
def test_a_missing_field_is_named(field: str) -> None:
    config = model(num_hidden_layers=3)
    delattr(config, field)
    with pytest.raises(ValueError, match=rf"does not describe a DeepSeek-V4 model.*'{field}'; compare it"):
        architecture.expected(config)


@pytest.mark.parametrize(
    ("base", "tp", "expert_parallel"),
    [(PRO, tp, ep) for tp in (1, 2, 4, 8, 16) for ep in (False, True)] + [(FLASH, tp, False) for tp in (1, 2, 4, 8)],
)
def test_sizes_that_divide(base: dict[str, Any], tp: int, expert_parallel: bool) -> None:
    architecture.check_parallel(model(base), tp, expert_parallel)


@pytest.mark.parametrize(
    ("base", "changes", "tp", "expert_parallel", "words"),
    [
        (PRO, {}, 32, False, "o_groups is 16, not a multiple of 32|Sizes that work: [1, 2, 4, 8, 16]"),
        (FLASH, {}, 16, False, "o_groups is 8, not a multiple of 16|Sizes that work: [1, 2, 4, 8]"),
        (PRO, {}, 3, False, "num_attention_heads is 128, not a multiple of 3;|o_groups is 16, not a multiple of 3;"),
        (PRO, {"num_attention_heads": 12}, 8, False, "num_attention_heads is 12, not a multiple of 8. |[1, 2, 4]"),
        (
            PRO,
            {"moe_intermediate_size": 64},
            8,
            False,
            "moe_intermediate_size is 64, not a multiple of 128 (each rank needs whole blocks of 16)|work: [1, 2, 4]",
        ),
        (
            PRO,
            {"moe_intermediate_size": 64},
            8,
            True,
            "moe_intermediate_size * n_shared_experts is 64, not a multiple of 128 (each rank needs whole blocks of",
        ),
        (PRO, {"o_lora_rank": 8}, 16, False, "o_groups * o_lora_rank is 128, not a multiple of 256 (each rank needs"),
        (PRO, {"n_routed_experts": 36}, 8, True, "n_routed_experts is 36, not a multiple of 8. |work: [1, 2, 4]"),
        (PRO, {"moe_intermediate_size": 24}, 1, False, "moe_intermediate_size is 24, not a multiple of 16|work: []"),
    ],
)
def test_sizes_that_do_not_divide(
    base: dict[str, Any], changes: dict[str, Any], tp: int, expert_parallel: bool, words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--tensor-parallel-size {tp} does not divide this model")) as error:
        architecture.check_parallel(model(base, **changes), tp, expert_parallel)
    assert [word for word in words.split("|") if word not in str(error.value)] == [], str(error.value)


def test_experts_are_cut_by_number_or_by_width_not_by_both() -> None:
    architecture.check_parallel(model(n_routed_experts=37), 8, expert_parallel=False)
    narrow = model(moe_intermediate_size=64, n_shared_experts=4)
    architecture.check_parallel(narrow, 16, expert_parallel=True)
    with pytest.raises(ValueError, match="moe_intermediate_size is 64, not a multiple of 256"):
        architecture.check_parallel(narrow, 16, expert_parallel=False)


def test_data_parallel_ranks_share_the_experts() -> None:
    architecture.check_parallel(model(PRO), 1, expert_parallel=True, data_parallel_size=8)
    architecture.check_parallel(model(n_routed_experts=36), 2, expert_parallel=True, data_parallel_size=2)
    message = (
        "--tensor-parallel-size 2 with --data-parallel-size 4 does not divide this model: n_routed_experts is 36, not a"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        architecture.check_parallel(model(n_routed_experts=36), 2, expert_parallel=True, data_parallel_size=4)
    narrow = model(moe_intermediate_size=64)
    architecture.check_parallel(narrow, 1, expert_parallel=False, data_parallel_size=4)
    with pytest.raises(
        ValueError, match=re.escape("moe_intermediate_size is 64, not a multiple of 128 (each rank needs")
    ):
        architecture.check_parallel(narrow, 1, expert_parallel=False, data_parallel_size=8)
