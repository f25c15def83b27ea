"""What a checkpoint is taken for, and every way in which it can be incomplete, contradictory or not of this model."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint
from vllm_nvfp4 import architecture, names
from vllm_nvfp4.checkpoint import CheckpointError, Tensor, read_folder
from vllm_nvfp4.config import DeepseekV4Config
from vllm_nvfp4.inventory import Format, Inventory, take_inventory

FILE = Path("model.safetensors")
CONFIG = SimpleNamespace(
    vocab_size=24, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32, q_lora_rank=32, o_groups=2,
    o_lora_rank=16, hc_mult=4, index_n_heads=2, index_head_dim=16, moe_intermediate_size=32, n_shared_experts=1,
    n_routed_experts=2, num_experts_per_tok=2, num_hash_layers=1, compress_ratios=[0, 4, 128],
)  # fmt: skip
ATTN, FFN = "model.layers.1.attn", "model.layers.1.ffn"
Rows = dict[str, Tensor]


def row(dtype: torch.dtype, *shape: int) -> Tensor:
    return Tensor(FILE, 0, torch.Size(shape).numel() * dtype.itemsize, dtype, tuple(shape))


def linear(module: str, n: int, k: int, form: Format) -> Rows:
    """The tensors of one linear."""
    if form is Format.HIGH:
        return {f"{module}.weight": row(torch.bfloat16, n, k)}
    if form is Format.FP8_BLOCK:
        return {
            f"{module}.weight": row(torch.float8_e4m3fn, n, k),
            f"{module}.weight_scale_inv": row(torch.float8_e8m0fnu, -(-n // 128), -(-k // 128)),
        }
    return {
        f"{module}.weight": row(torch.uint8, n, k // 2),
        f"{module}.weight_scale": row(torch.float8_e4m3fn, n, k // 16),
        f"{module}.weight_scale_2": row(torch.float32),
        f"{module}.input_scale": row(torch.float32),
    }


def checkpoint(config: Any = CONFIG, mtp_layers: int = 0, forms: dict[str, Format] | None = None) -> Rows:
    """A whole checkpoint in canonical names (layout L2): NVFP4, but for wo_a and the modules that match `forms`."""
    wanted = architecture.expected(config, mtp_layers)
    forms = {r"\.wo_a$": Format.HIGH} | (forms or {})
    rows = {
        name: row(torch.int64 if name.endswith("tid2eid") else torch.float32, *shape)
        for name, shape in wanted.tensors.items()
    }
    for module, (n, k) in wanted.linears.items():
        matching = [form for pattern, form in forms.items() if re.search(pattern, module)]
        rows |= linear(module, n, k, matching[-1] if matching else Format.NVFP4)
    return rows


def refused(rows: Rows, *words: str, config: Any = CONFIG, error: type[ValueError] = CheckpointError) -> str:
    """The message with which the checkpoint is refused, which must hold all words."""
    with pytest.raises(error) as caught:
        take_inventory(rows, config)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    return message


def without(rows: Rows, *absent: str) -> Rows:
    assert set(absent) <= set(rows)
    return {name: tensor for name, tensor in rows.items() if name not in absent}


def with_shape(rows: Rows, name: str, *shape: int) -> Rows:
    return rows | {name: replace(rows[name], shape=shape)}


def with_dtype(rows: Rows, name: str, dtype: torch.dtype) -> Rows:
    return rows | {name: replace(rows[name], dtype=dtype)}


def test_a_real_export(affine: Path) -> None:
    config = DeepseekV4Config(**json.loads((affine / "config.json").read_text()))
    found = take_inventory(read_folder(affine), config)
    assert found.layout is names.Layout.L2
    assert "'model.layers.0.ffn.gate.tid2eid'" in found.evidence
    assert found.num_mtp_layers == 0
    wanted = {m for m in architecture.expected(config).linears if ".experts." not in m}
    wanted |= {f"model.layers.{i}.ffn.experts" for i in range(4)}
    assert set(found.formats) == wanted
    assert {m for m, form in found.formats.items() if form is not Format.NVFP4} == {
        f"model.layers.{i}.attn.wo_a" for i in range(4)
    }
    assert set(found.formats.values()) == {Format.NVFP4, Format.HIGH}


@pytest.mark.parametrize(("layout", "mtp"), [("L1", 0), ("L2", 0), ("L3", 1), ("bare", 1)])
def test_every_layout_of_one_model(tmp_path: Path, layout: str, mtp: int) -> None:
    spec = TinySpec(layout=layout, mtp=mtp, layers=(0, 4, 128), hidden=128, experts=4, topk=2)
    make_tiny_checkpoint(tmp_path / "x", spec)
    config = DeepseekV4Config(**json.loads((tmp_path / "x" / "config.json").read_text()))
    found = take_inventory(read_folder(tmp_path / "x"), config)
    assert (found.layout, found.num_mtp_layers) == (layout, mtp)
    assert found.formats[f"{FFN}.experts"] is Format.NVFP4
    dense = Format.FP8_BLOCK if layout == "L3" else Format.NVFP4
    assert found.format_of((f"{ATTN}.wq_a", f"{ATTN}.wkv")) is dense
    assert found.formats.get("mtp.0.e_proj") is (dense if mtp else None)
    assert found.formats[f"{ATTN}.compressor.wkv"] is (Format.HIGH if layout == "L3" else Format.NVFP4)
    assert found.formats[f"{ATTN}.wo_a"] is (Format.FP8_BLOCK if layout == "L3" else Format.HIGH)


def test_formats_per_module() -> None:
    rows = checkpoint(forms={r"weights_proj$": Format.HIGH, r"layers\.2\.attn\.(wq_a|wkv)$": Format.FP8_BLOCK})
    found = take_inventory(rows, CONFIG)
    assert found.formats[f"{ATTN}.wq_a"] is Format.NVFP4
    assert found.formats[f"{ATTN}.indexer.weights_proj"] is Format.HIGH
    assert found.formats["model.layers.2.attn.wkv"] is Format.FP8_BLOCK
    assert found.formats[f"{FFN}.experts"] is Format.NVFP4
    assert found.format_of(("model.layers.2.attn.wq_a", "model.layers.2.attn.wkv")) is Format.FP8_BLOCK


def test_all_in_deepseeks_mixture() -> None:
    forms = {r".": Format.FP8_BLOCK, r"(wo_a|compressor\.w|weights_proj)": Format.HIGH, r"experts\.\d": Format.NVFP4}
    rows = {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint(forms=forms).items()
        if name != "lm_head.weight"
    }
    rows["head.weight"] = row(torch.bfloat16, 24, 64)
    found = take_inventory(rows, CONFIG)
    assert found.layout is names.Layout.L3
    assert found.formats[f"{FFN}.experts"] is Format.NVFP4
    assert found.formats[f"{FFN}.shared_experts.w1"] is Format.FP8_BLOCK
    assert found.formats[f"{ATTN}.compressor.wgate"] is Format.HIGH


def test_a_scale_of_one_element_is_a_scalar() -> None:
    rows = checkpoint()
    for leaf in ("weight_scale_2", "input_scale"):
        rows = with_shape(rows, f"{ATTN}.wq_a.{leaf}", 1)
    assert take_inventory(rows, CONFIG).formats[f"{ATTN}.wq_a"] is Format.NVFP4
    refused(with_shape(rows, f"{ATTN}.wq_a.input_scale", 2), f"{ATTN}.wq_a.input_scale has shape (2,), expected ()")


def test_kv_cache_scales_are_left_out() -> None:
    rows = checkpoint() | {f"{ATTN}.k_scale": row(torch.float32)}
    assert take_inventory(rows, CONFIG) == take_inventory(checkpoint(), CONFIG)


# Nothing may be missing.


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_scale_2", "input_scale"])
@pytest.mark.parametrize("module", [f"{ATTN}.wq_b", f"{FFN}.experts.1.w2", f"{FFN}.shared_experts.w3"])
def test_a_missing_scale(module: str, leaf: str) -> None:
    refused(
        without(checkpoint(), f"{module}.{leaf}"),
        f"{module}.{leaf} is missing, but {module}.weight is torch.uint8 as NVFP4 packs it",
        "a missing scale cannot be guessed: export the checkpoint again",
    )


def test_all_scales_missing() -> None:
    leaves = ("weight_scale", "weight_scale_2", "input_scale")
    rows = without(checkpoint(), *(f"{ATTN}.wq_b.{leaf}" for leaf in leaves))
    refused(rows, f"{ATTN}.wq_b.weight_scale is missing, but {ATTN}.wq_b.weight is torch.uint8")


def test_a_missing_weight_or_expert() -> None:
    rows = checkpoint()
    refused(without(rows, f"{ATTN}.wq_b.weight"), f"{ATTN}.wq_b.weight is missing; export or download")
    expert = [name for name in rows if name.startswith(f"{FFN}.experts.1.")]
    assert len(expert) == 12
    refused(without(rows, *expert), f"{FFN}.experts.1.w1.weight is missing")


def test_a_missing_fp8_scale() -> None:
    rows = checkpoint(forms={"wo_b": Format.FP8_BLOCK})
    name = f"{ATTN}.wo_b.weight_scale_inv"
    refused(without(rows, name), f"{name} is missing, but {ATTN}.wo_b.weight is FP8; export the checkpoint again")


def test_every_single_tensor_is_needed_and_named() -> None:
    rows = checkpoint(mtp_layers=1)
    optional = architecture.expected(CONFIG, 1).optional
    assert len(rows) > 300
    for name in rows:
        if name in optional:
            assert take_inventory(without(rows, name), CONFIG).num_mtp_layers == 1
        else:
            refused(without(rows, name), name, "missing", "again")


def test_many_missing_tensors_are_counted_not_listed() -> None:
    rows = checkpoint()
    absent = [name for name in rows if name.endswith("norm.weight")]
    message = refused(without(rows, *absent), f"{len(absent)} tensors are missing", f"and {len(absent) - 5} more;")
    assert sum(name in message for name in absent) == 5


# Nothing may be of another shape or type.


def test_every_single_shape_and_type_is_checked() -> None:
    rows = checkpoint(mtp_layers=1, forms={r"layers\.2\.attn\.w[ko]": Format.FP8_BLOCK, r"wq_a": Format.FP8_BLOCK})
    refused_types = 0
    for name, tensor in rows.items():
        wrong = (*tensor.shape[:-1], tensor.shape[-1] + 1) if tensor.shape else (2,)
        message = refused(with_shape(rows, name, *wrong), f"{FILE}: {name} has shape {wrong}, expected {tensor.shape}")
        assert "from config.json; the file and the configuration are not of one model" in message
        refused(
            with_dtype(rows, name, torch.int16), f"{FILE}: {name} is torch.int16, expected torch.", "export it again"
        )
        refused_types += 1
    assert refused_types == len(rows) > 300


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        (f"{ATTN}.wq_b.weight_scale", torch.uint8, "torch.float8_e4m3fn"),
        (f"{ATTN}.wq_b.weight_scale", torch.float8_e8m0fnu, "torch.float8_e4m3fn"),
        (f"{ATTN}.wq_b.weight_scale_2", torch.bfloat16, "torch.float32"),
        (f"{ATTN}.wq_b.input_scale", torch.float16, "torch.float32"),
        (f"{ATTN}.wq_b.weight", torch.bfloat16, "torch.uint8"),
        (f"{ATTN}.wq_b.weight", torch.float8_e4m3fn, "torch.uint8"),
        (f"{ATTN}.wo_a.weight", torch.int8, "torch.bfloat16 or torch.float16 or torch.float32"),
        ("model.norm.weight", torch.uint8, "torch.bfloat16 or torch.float16 or torch.float32"),
        # FP8 without its scale would be converted to numbers without a word.
        ("lm_head.weight", torch.float8_e4m3fn, "torch.bfloat16 or torch.float16 or torch.float32"),
        ("model.layers.0.ffn.gate.tid2eid", torch.float32, "torch.int32 or torch.int64"),
    ],
)
def test_a_wrong_type(name: str, dtype: torch.dtype, expected: str) -> None:
    refused(with_dtype(checkpoint(), name, dtype), f"{FILE}: {name} is {dtype}, expected {expected}; export it again")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_high_precision_may_be_any_of_three(dtype: torch.dtype) -> None:
    rows = with_dtype(with_dtype(checkpoint(), "model.norm.weight", dtype), f"{ATTN}.wo_a.weight", dtype)
    assert take_inventory(rows, CONFIG).formats[f"{ATTN}.wo_a"] is Format.HIGH


@pytest.mark.parametrize(
    ("form", "leaf", "dtype"),
    [
        (Format.NVFP4, "weight_scale_inv", torch.float32),
        (Format.FP8_BLOCK, "input_scale", torch.float32),
        (Format.HIGH, "input_scale", torch.float32),
        (Format.HIGH, "weight_scale_inv", torch.float8_e8m0fnu),
    ],
)
def test_a_scale_of_another_format(form: Format, leaf: str, dtype: torch.dtype) -> None:
    rows = checkpoint(forms={"wq_b": form}) | {f"{ATTN}.wq_b.{leaf}": row(dtype)}
    if form is Format.HIGH and leaf == "weight_scale_inv":
        refused(rows, f"{ATTN}.wq_b.weight is torch.bfloat16, expected torch.float8_e4m3fn")
    else:
        refused(rows, f"{FILE}: {ATTN}.wq_b.{leaf} has no meaning for {ATTN}.wq_b.weight, which is {form}; export")


# One format within what vLLM computes as one matrix.


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"{ATTN}.wq_a", f"{ATTN}.wkv"),
        (f"{ATTN}.compressor.wkv", f"{ATTN}.compressor.wgate"),
        (f"{ATTN}.indexer.compressor.wkv", f"{ATTN}.indexer.compressor.wgate"),
        (f"{FFN}.shared_experts.w1", f"{FFN}.shared_experts.w3"),
        ("mtp.0.attn.wq_a", "mtp.0.attn.wkv"),
    ],
)
@pytest.mark.parametrize("form", [Format.HIGH, Format.FP8_BLOCK])
@pytest.mark.parametrize("which", [0, 1])
def test_mixed_formats_in_a_fused_module(first: str, second: str, form: Format, which: int) -> None:
    other = (first, second)[which]
    forms = (form, Format.NVFP4) if which == 0 else (Format.NVFP4, form)
    refused(
        checkpoint(mtp_layers=1, forms={f"^{re.escape(other)}$": form}),
        "mixed quantization inside one fused module",
        f"{first} is {forms[0]}, {second} is {forms[1]}",
        "export them in the same format",
    )


@pytest.mark.parametrize("pattern", [r"layers\.1\.ffn\.experts\.1\.", r"layers\.1\.ffn\.experts\.0\.w2$"])
def test_one_expert_in_high_precision(pattern: str) -> None:
    refused(
        checkpoint(forms={pattern: Format.HIGH}),
        "mixed quantization inside one fused module: model.layers.1.ffn.experts.",
        f"other experts of {FFN}.experts are",
        "export all experts of a layer in the same format",
    )


def test_layers_may_differ_in_their_experts() -> None:
    found = take_inventory(checkpoint(forms={r"layers\.1\.ffn\.experts": Format.HIGH}), CONFIG)
    assert [found.formats[f"model.layers.{i}.ffn.experts"] for i in range(3)] == [
        Format.NVFP4,
        Format.HIGH,
        Format.NVFP4,
    ]


def test_format_of_what_is_not_there() -> None:
    found = Inventory(names.Layout.L2, "", {"a": Format.NVFP4})
    with pytest.raises(CheckpointError, match=r"the model asks for b, which the checkpoint \(L2\) does not have"):
        found.format_of(("a", "b"))


# Nothing may be there that is not of this model.


def test_a_config_with_fewer_layers_than_the_checkpoint() -> None:
    fewer = SimpleNamespace(**{**vars(CONFIG), "num_hidden_layers": 2, "compress_ratios": [0, 4]})
    message = refused(checkpoint(), "tensors do not belong to the model that config.json describes", config=fewer)
    assert "check num_hidden_layers, n_routed_experts and compress_ratios" in message


def test_a_config_with_more_layers_than_the_checkpoint() -> None:
    more = SimpleNamespace(**{**vars(CONFIG), "num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 0]})
    refused(checkpoint(), "tensors are missing: model.layers.3.attn.attn_sink", config=more)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_routed_experts": 1}, "36 tensors"),  # 3 layers of 3 matrices of 4 tensors
        ({"compress_ratios": [0, 0, 128]}, "model.layers.1.attn.compressor.ape"),
        ({"num_hash_layers": 0}, "model.layers.0.ffn.gate.tid2eid"),
    ],
)
def test_a_config_that_lacks_what_the_checkpoint_has(changes: dict[str, Any], word: str) -> None:
    config = SimpleNamespace(**{**vars(CONFIG), **changes})
    message = refused(checkpoint(), "do not belong to the model that config.json describes", word, config=config)
    assert "check num_hidden_layers" in message


def test_an_unexpected_tensor() -> None:
    rows = checkpoint() | {"model.layers.0.attn.indexer.wq_b.weight": row(torch.uint8, 32, 16)}
    refused(rows, "1 tensors do not belong to the model", "describes: model.layers.0.attn.indexer.wq_b.weight; check")


def test_an_unknown_name() -> None:
    rows = checkpoint() | {f"{ATTN}.wq_c.weight": row(torch.uint8, 32, 16)}
    refused(rows, f"no rule covers the tensor '{ATTN}.wq_c.weight'", "names.py", error=names.UnknownNameError)


@pytest.mark.parametrize("found", [[], ["transformer.h.0.attn.weight"], ["model.layers.0.linear_attn.weight"]])
def test_an_unknown_layout(found: list[str]) -> None:
    rows = {name: row(torch.float32, 1) for name in found}
    refused(rows, f"no DeepSeek-V4 layer among {len(found)} tensor names", error=names.UnknownLayoutError)


def test_two_layouts_in_one_folder() -> None:
    rows = checkpoint() | {"model.layers.0.self_attn.q_a_proj.weight": row(torch.uint8, 32, 32)}
    refused(rows, "names of different layouts in one checkpoint", error=names.UnknownLayoutError)


def test_two_tensors_of_one_meaning() -> None:
    rows = checkpoint() | {"head.weight": row(torch.float32, 24, 64)}
    refused(rows, "lm_head.weight and head.weight are both lm_head.weight; remove one from the checkpoint")


# MTP layers are counted from the tensors.


def test_mtp_layers_are_counted() -> None:
    for count in (0, 1, 2):
        found = take_inventory(checkpoint(mtp_layers=count), CONFIG)
        assert found.num_mtp_layers == count
        assert ("mtp.0.ffn.experts" in found.formats) == (count > 0)


def stray(names_of_layer: Iterable[str]) -> Rows:
    return {name: row(torch.float32, 64) for name in names_of_layer}


@pytest.mark.parametrize(
    ("name", "layer", "count"),
    [
        ("mtp.1.enorm.weight", 1, 1),
        ("mtp.999999999.enorm.weight", 999999999, 1),
        ("layers.1000000.enorm.weight", 999997, 1),
    ],
)
def test_an_mtp_layer_out_of_order_sizes_nothing(name: str, layer: int, count: int) -> None:
    refused(
        checkpoint() | stray([name]),
        f"{name} belongs to MTP layer {layer}, but the checkpoint has {count} MTP layers",
        "is num_hidden_layers (3) right, and is every shard there?",
    )


def test_a_tied_head() -> None:
    tied = SimpleNamespace(**{**vars(CONFIG), "tie_word_embeddings": True})
    assert take_inventory(without(checkpoint(), "lm_head.weight"), tied).layout is names.Layout.L2
    refused(without(checkpoint(), "lm_head.weight"), "1 tensors are missing: lm_head.weight; export or download")
