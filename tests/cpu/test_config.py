"""config.json in transformers' and in DeepSeek's spelling, and every contradiction between the two."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from vllm_nvfp4 import config
from vllm_nvfp4.config import DeepseekV4Config

CSA, HCA, SWA = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
RATES = {CSA: 4, HCA: 128}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "hidden_size": 4096,
    "compress_ratios": [0, 4, 128],
    "num_hash_layers": 2,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16},
    "topk_method": "noaux_tc",
    "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.fixture
def exported(affine: Path) -> dict[str, Any]:
    return json.loads((affine / "config.json").read_text())


def test_a_real_export(exported: dict[str, Any]) -> None:
    found = DeepseekV4Config(**exported)
    assert found.compress_ratios == [0, 4, 128, 4]
    assert found.num_hash_layers == 1
    assert found.expert_dtype == "nvfp4"
    assert found.topk_method == "noaux_tc"
    assert (found.rope_theta, found.compress_rope_theta) == (10000.0, 160000.0)
    assert (found.hidden_size, found.o_groups, found.n_routed_experts) == (256, 2, 32)
    assert found.quantization_config == exported["quantization_config"]
    assert not hasattr(found, "mlp_layer_types")


def test_the_same_from_the_file(affine: Path, exported: dict[str, Any]) -> None:
    assert DeepseekV4Config.from_pretrained(affine).to_dict() == DeepseekV4Config(**exported).to_dict()


def test_deepseeks_spelling_stays() -> None:
    found = DeepseekV4Config(**copy.deepcopy(DEEPSEEK))
    assert found.compress_ratios == [0, 4, 128]
    assert found.num_hash_layers == 2
    assert found.expert_dtype == "fp4"
    assert found.topk_method == "noaux_tc"
    assert (found.rope_theta, found.compress_rope_theta) == (10000.0, 160000.0)
    assert found.rope_parameters["factor"] == 16


def test_deepseeks_format_without_expert_dtype_gets_none() -> None:
    assert not hasattr(DeepseekV4Config(**{k: v for k, v in DEEPSEEK.items() if k != "expert_dtype"}), "expert_dtype")


@pytest.mark.parametrize("method", ["modelopt", "modelopt_fp4"])
def test_modelopts_format_says_nvfp4(method: str) -> None:
    kwargs = {k: v for k, v in DEEPSEEK.items() if k != "expert_dtype"} | {
        "quantization_config": {"quant_method": method}
    }
    assert DeepseekV4Config(**kwargs).expert_dtype == "nvfp4"
    assert DeepseekV4Config(**kwargs, expert_dtype="bf16").expert_dtype == "bf16"


def test_nothing_given() -> None:
    found = DeepseekV4Config()  # transformers constructs a default instance of each configuration class
    assert (found.num_hash_layers, found.topk_method) == (0, "noaux_tc")
    assert getattr(found, "compress_ratios", None) is None


def test_both_spellings_may_be_given_where_they_agree(exported: dict[str, Any]) -> None:
    both = exported | {"compress_ratios": [0, 4, 128, 4], "num_hash_layers": 1}
    found = DeepseekV4Config(**both)
    assert (found.compress_ratios, found.num_hash_layers) == ([0, 4, 128, 4], 1)


def changed(exported: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(exported)
    *parents, last = path.split("/")
    inner = found
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "compress_ratios",
            [0, 4, 128, 128],
            "compress_ratios is [0, 4, 128, 128], but layer_types and compress_rates give [0, 4, 128, 4]; they must",
        ),
        ("num_hash_layers", 3, "num_hash_layers is 3, but mlp_layer_types give 1; they must agree"),
        ("num_hash_layers", 0, "num_hash_layers is 0, but mlp_layer_types give 1; they must agree"),
        (
            "rope_theta",
            500.0,
            "rope_theta is 500.0, but rope_parameters['main']['rope_theta'] is 10000.0; they must be the same number",
        ),
        (
            "rope_parameters/compress/rope_theta",
            1e6,
            "compress_rope_theta is 160000.0, but rope_parameters['compress']['rope_theta'] is 1000000.0; they must be",
        ),
        ("layer_types", [SWA, CSA, HCA], "layer_types has 3 entries, but num_hidden_layers is 4; compare it with"),
        ("mlp_layer_types", ["hash_moe"], "mlp_layer_types has 1 entries, but num_hidden_layers is 4; compare it with"),
        ("compress_ratios", [0, 4], "compress_ratios has 2 entries, but num_hidden_layers is 4; compare it with"),
        (
            "layer_types",
            [SWA, CSA, "linear_attention", CSA],
            "layer_types[2] is 'linear_attention'; expected one of ['compressed_sparse_attention', "
            "'heavily_compressed_attention', 'sliding_attention']. Is this a DeepSeek-V4 configuration?",
        ),
        (
            "compress_rates",
            {CSA: 4},
            "layer_types[2] is 'heavily_compressed_attention', but compress_rates has no "
            "'heavily_compressed_attention' (found ['compressed_sparse_attention']); export the configuration again",
        ),
        (
            "compress_rates",
            None,
            "layer_types[1] is 'compressed_sparse_attention', but compress_rates has no 'compressed_sparse_attention' "
            "(found []); export the configuration again",
        ),
        ("compress_rates", {CSA: 8, HCA: 128}, "compress_ratios[1] is 8; vLLM's attention knows (0, 1, 4, 128)"),
        (
            "mlp_layer_types",
            ["hash_moe", "moe", "moe", "dense"],
            "mlp_layer_types holds ['dense']; expected only 'hash_moe' and 'moe'",
        ),
        (
            "mlp_layer_types",
            ["moe", "moe", "hash_moe", "moe"],
            "mlp_layer_types has 'hash_moe' at layer 2 behind a 'moe' layer; vLLM supports hash routing in the first",
        ),
    ],
)
def test_contradictions(exported: dict[str, Any], path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")):
        DeepseekV4Config(**changed(exported, path, value))


def test_ratios_in_deepseeks_spelling_are_checked_too() -> None:
    with pytest.raises(ValueError, match=re.escape("compress_ratios[2] is 64; vLLM's attention knows (0, 1, 4, 128)")):
        DeepseekV4Config(**DEEPSEEK | {"compress_ratios": [0, 4, 64]})
    with pytest.raises(ValueError, match="compress_ratios has 3 entries, but num_hidden_layers is 61"):
        DeepseekV4Config(**DEEPSEEK | {"num_hidden_layers": 61})
    # One more for the MTP layer, as DeepSeek writes it.
    assert DeepseekV4Config(**DEEPSEEK | {"compress_ratios": [0, 4, 128, 0]}).compress_ratios == [0, 4, 128, 0]


def test_compress_ratios() -> None:
    assert config.compress_ratios([SWA, CSA, HCA, CSA], RATES) == [0, 4, 128, 4]
    assert config.compress_ratios([SWA, SWA], {}) == [0, 0]
    assert config.compress_ratios([], RATES) == []


@pytest.mark.parametrize(("kinds", "count"), [("", 0), ("m", 0), ("h", 1), ("hhh", 3), ("hmm", 1), ("hhm", 2)])
def test_num_hash_layers(kinds: str, count: int) -> None:
    assert config.num_hash_layers([{"h": "hash_moe", "m": "moe"}[kind] for kind in kinds]) == count


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {}),
        ({"rope_theta": 5}, {"rope_theta": 5.0}),
        ({"rope_parameters": None, "compress_rope_theta": 7}, {"compress_rope_theta": 7.0}),
        ({"rope_parameters": {"rope_theta": 5, "rope_type": "yarn"}}, {}),
        (
            {"rope_parameters": {"main": {"rope_theta": 5}, "compress": {"rope_theta": 7}}},
            {"rope_theta": 5.0, "compress_rope_theta": 7.0},
        ),
        ({"rope_parameters": {"main": {"rope_theta": 5}, "compress": None}, "rope_theta": 5.0}, {"rope_theta": 5.0}),
    ],
)
def test_rope_thetas(kwargs: dict[str, Any], expected: dict[str, float]) -> None:
    assert config.rope_thetas(kwargs) == expected


def test_nested_thetas_reach_the_top_level(exported: dict[str, Any]) -> None:
    del exported["rope_theta"], exported["compress_rope_theta"]
    exported["rope_parameters"]["compress"]["rope_theta"] = 123456.0
    found = DeepseekV4Config(**exported)
    assert (found.rope_theta, found.compress_rope_theta) == (10000.0, 123456.0)
