"""The NVIDIA model and MTP draft with the overlay, built and loaded without a GPU: nothing missing, nothing unexpected.

All scenarios run in one other process (nvidia_stubs.py, which says what is faked and why) and are judged here. What it
cannot tell: whether anything computes on a GPU, and which stock kernel vLLM would choose there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint
from safetensors.torch import load_file, save_file

STUBS = Path(__file__).with_name("nvidia_stubs.py")
TIMEOUT_S = 300  # about 20 s on an idle core
ENVIRONMENT = {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_BACKEND": "cpu", "OMP_NUM_THREADS": "1"}
RATIOS = (0, 4, 128, 4)  # of affine-a and of the tiny checkpoints, which are one model

# fused_wqa_wkv, wq_b, wo_b; gate_up_proj, down_proj, which share a runner of another kind; a compressor at 128; at 4
# two of them, indexer.wq_b, weights_proj.
NUM_LINEARS = sum(5 + {0: 0, 128: 1, 4: 4}[ratio] for ratio in RATIOS)
NUM_DRAFT_LINEARS = 5 + 2  # e_proj and h_proj
NUM_SHARED = 2
# In L3 wo_a is FP8 too, compressors and weights_proj are not quantized.
NUM_FP8, NUM_DRAFT_FP8 = sum(6 + (ratio == 4) for ratio in RATIOS), 6 + 2

MODEL = "vllm.models.deepseek_v4.nvidia.model.DeepseekV4ForCausalLM"
DRAFT = "vllm.models.deepseek_v4.nvidia.mtp.DeepSeekV4MTP"
OURS = "ModelOptNvFp4ShardedLinearMethod/Nvfp4RunnerLinearKernel"


def make(folder: Path, *, extra: dict[str, torch.Tensor] | None = None, **spec: Any) -> Path:
    """A tiny checkpoint in which no two tensor scales are equal, so that none can pass for another.

    Exporters make the scales of linears that share an input equal; then a loader that mixes them up is not found out.
    """
    make_tiny_checkpoint(folder, TinySpec(**spec))
    file = folder / "model.safetensors"
    tensors = load_file(file) | (extra or {})
    scales = [name for name in tensors if name.endswith((".weight_scale_2", ".input_scale"))]
    for i, name in enumerate(scales):
        tensors[name] = torch.tensor(2.0**-14 * (1 + i * 2.0**-12))
    assert len({float(tensors[name]) for name in scales}) == len(scales)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def with_a_scale_of_its_own(affine: Path, folder: Path) -> Path:
    """A copy of a checkpoint in which one shard of every compressor has another input_scale than its neighbours."""
    shutil.copytree(affine, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(".attn.compressor.wgate.input_scale"):
            tensors[name] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def results(affine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Facts of every scenario."""
    root = tmp_path_factory.mktemp("nvidia")
    table = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    own_tables = {"mtp.0.emb.tok_emb.weight": table, "mtp.0.head.weight": table + 1}
    bare = make(root / "bare", layout="bare", mtp=1, extra=own_tables)
    apart = with_a_scale_of_its_own(affine, root / "apart")
    checkpoints = {
        "main-affine": affine,
        "main-l1": make(root / "l1", layout="L1"),
        "main-l1attn": make(root / "l1attn", layout="L1", indexer_spelling="attn"),
        "mtp-bare": bare,
        "mtp-l3": make(root / "l3", layout="L3", mtp=1),
        "wo_a": affine,
        "bf16": affine,
        "chains": affine,
        "chains-apart": apart,
        "breaks": affine,
        "joined": affine,
        "joined-apart": apart,
        "ep": bare,
        "stock": affine,
        "broken": bare,
    }
    command = [sys.executable, str(STUBS), *(f"{name}={path}" for name, path in checkpoints.items())]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    lines = [json.loads(line[len("RESULT ") :]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    facts = {line["scenario"]: line["facts"] for line in lines}
    assert set(facts) == set(checkpoints), f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    return facts


def facts_of(results: dict[str, Any], scenario: str) -> dict[str, Any]:
    facts = results[scenario]
    assert "error" not in facts, facts["error"]
    return facts


def assert_complete(facts: dict[str, Any], unfilled: list[str]) -> None:
    """Every parameter holds its tensor's bytes, every tensor went somewhere, and every runner works on them."""
    assert facts["unfilled"] == unfilled
    assert facts["mismatched"] == []
    assert facts["unused"] == []
    assert facts["foreign"] == []
    assert facts["bad_runners"] == []


def main_facts(results: dict[str, Any], scenario: str) -> dict[str, Any]:
    facts = facts_of(results, scenario)
    return facts.get("main", facts)


@pytest.mark.parametrize("scenario", ["main-affine", "main-l1", "main-l1attn", "mtp-bare", "mtp-l3"])
def test_main_model_is_complete(results: dict[str, Any], scenario: str) -> None:
    facts = main_facts(results, scenario)
    assert_complete(facts, unfilled=[])
    assert facts["classes"][0] == "vllm_nvfp4.model.DeepseekV4ForCausalLM"
    assert MODEL in facts["classes"]
    # From disk: everything of the main model, nothing of the draft.
    assert facts["read_mtp"] == 0
    assert facts["read_main"] == facts["num_tensors"] - {"mtp-bare": 442, "mtp-l3": 423}.get(scenario, 0)


@pytest.mark.parametrize("scenario", ["main-affine", "main-l1", "main-l1attn", "mtp-bare"])
def test_every_nvfp4_module_of_the_main_model_is_ours(results: dict[str, Any], scenario: str) -> None:
    facts = main_facts(results, scenario)
    assert facts["num_params"] == 220
    assert facts["methods"][OURS] == NUM_LINEARS
    assert facts["methods"]["ModelOptNvFp4RunnerMoEMethod"] == len(RATIOS)
    # wo_a and the router's gate, a layer each; embedding and head.
    assert facts["methods"]["UnquantizedLinearMethod"] == 2 * len(RATIOS)
    assert facts["methods"]["UnquantizedEmbeddingMethod"] == 2
    assert len(facts["methods"]) == 4
    per_layer = dict.fromkeys(("MoeRunner", "SharedExpertRunner"), len(RATIOS))
    assert facts["runners"] == {"LinearRunner": NUM_LINEARS - NUM_SHARED * len(RATIOS), **per_layer}


def test_draft_takes_all_mtp_tensors_and_nothing_else(results: dict[str, Any]) -> None:
    facts = facts_of(results, "mtp-bare")
    draft = facts["draft"]
    assert_complete(draft, unfilled=[])
    assert draft["classes"][0] == "vllm_nvfp4.mtp.DeepSeekV4MTP"
    assert DRAFT in draft["classes"]
    assert facts["main"]["registered_draft"].endswith("(module_name='vllm_nvfp4.mtp', class_name='DeepSeekV4MTP')")
    assert (draft["read_mtp"], draft["read_main"]) == (442, 0)
    assert draft["num_params"] == 58
    assert draft["methods"][OURS] == NUM_DRAFT_LINEARS
    assert draft["methods"]["ModelOptNvFp4RunnerMoEMethod"] == 1
    runners = {"LinearRunner": NUM_DRAFT_LINEARS - NUM_SHARED, "MoeRunner": 1, "SharedExpertRunner": 1}
    assert draft["runners"] == runners


def test_fp8_dense_layers_beside_nvfp4_experts(results: dict[str, Any]) -> None:
    facts = facts_of(results, "mtp-l3")
    main, draft = facts["main"], facts["draft"]
    # This checkpoint has no tables for the draft: vLLM gives it the main model's.
    assert_complete(draft, unfilled=["model.layers.4.shared_head.head.weight", "model.embed_tokens.weight"])
    assert (draft["read_mtp"], draft["read_main"]) == (423, 0)
    assert (main["num_params"], draft["num_params"]) == (159, 45)
    for model, num_fp8, num_layers in ((main, NUM_FP8, len(RATIOS)), (draft, NUM_DRAFT_FP8, 1)):
        assert model["methods"]["Fp8LinearMethod/AnywhereFp8BlockKernel"] == num_fp8
        assert model["methods"]["ModelOptNvFp4RunnerMoEMethod"] == num_layers
        assert model["runners"] == {"MoeRunner": num_layers}


def test_fp8_shared_experts_are_padded_in_both_models(results: dict[str, Any]) -> None:
    # One block of 128 rows at TP=3: upstream builds three blocks, and zeros fill the last two.
    assert main_facts(results, "mtp-l3")["padded_rows"] == [384, 384]
    assert main_facts(results, "mtp-bare")["padded_rows"] == [128, 128]


def test_every_layout_of_one_model_loads_alike(results: dict[str, Any]) -> None:
    digests = {main_facts(results, scenario)["digest"] for scenario in ("main-l1", "main-l1attn", "mtp-bare")}
    assert len(digests) == 1
    assert main_facts(results, "main-affine")["digest"] not in digests


@pytest.mark.parametrize("scenario", ["main-affine", "main-l1"])
def test_what_upstream_derives_from_weights_is_right(results: dict[str, Any], scenario: str) -> None:
    assert facts_of(results, scenario)["broadcast_is_derived"]


def test_what_upstream_derives_is_there_right_after_a_load(results: dict[str, Any]) -> None:
    # Reloading weights into a running engine ends with load_weights.
    assert facts_of(results, "stock")["derived_by_load"]


@pytest.mark.parametrize("scenario", ["main-affine", "main-l1"])
def test_input_projections_come_in_upstreams_order(results: dict[str, Any], scenario: str) -> None:
    bf16, fp32 = [True, "torch.bfloat16"], [True, "torch.float32"]
    none = [True, None]
    expected = {0: [bf16, none, none, none], 128: [bf16, fp32, none, none], 4: [bf16, fp32, fp32, bf16]}
    assert facts_of(results, scenario)["projections"] == [expected[ratio] for ratio in RATIOS]


def test_our_kernel_is_the_first_that_cuda_asks(results: dict[str, Any]) -> None:
    assert facts_of(results, "main-affine")["first_cuda_kernel"] == "Nvfp4RunnerLinearKernel"


def test_wo_a_is_quantized_on_request(results: dict[str, Any]) -> None:
    facts = facts_of(results, "wo_a")
    assert_complete(facts, unfilled=[])
    assert facts["wo_a"] == [True] * len(RATIOS)
    assert facts["methods"]["ModelOptNvFp4WoAMethod"] == len(RATIOS)
    assert facts["runners"]["WoARunner"] == len(RATIOS)


def test_every_runner_is_told_the_activations(results: dict[str, Any]) -> None:
    facts = facts_of(results, "bf16")
    assert (facts["unfilled"], facts["mismatched"], facts["unused"]) == ([], [], [])
    per_layer = dict.fromkeys(("MoeRunner bf16", "SharedExpertRunner bf16", "WoARunner bf16"), len(RATIOS))
    linears = {"LinearRunner bf16": NUM_LINEARS - NUM_SHARED * len(RATIOS)}
    assert facts["activations"] == {**linears, **per_layer}


BACKENDS = {"sm100": "nvfp4", "sm90": "bf16"}  # with their activations
NUM_INPUTS = {0: 1, 128: 2, 4: 4}  # linears that read the layer's input, by ratio


def is_joined(scenario: str, backend: str, ratio: int) -> bool:
    """In "apart" input scales differ, which matters where activations are quantized."""
    return NUM_INPUTS[ratio] > 1 and (scenario == "chains" or BACKENDS[backend] == "bf16")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scenario", ["chains", "chains-apart"])
def test_a_gpus_own_kernels_serve_every_module(results: dict[str, Any], scenario: str, backend: str) -> None:
    # All linears but the shared experts' two, and three more operators, a layer each; joined ones have one.
    num_runners = NUM_LINEARS + (3 - NUM_SHARED) * len(RATIOS)
    num_runners -= sum(NUM_INPUTS[ratio] - 1 for ratio in RATIOS if is_joined(scenario, backend, ratio))
    facts = facts_of(results, scenario)[backend]
    assert facts["runners"] == {f"{backend} {BACKENDS[backend]}": num_runners}
    assert facts["all_served"] == "no error: None"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scenario", ["chains", "chains-apart"])
def test_linears_with_one_input_are_one_where_it_is_rounded_once(
    results: dict[str, Any], scenario: str, backend: str
) -> None:
    facts = facts_of(results, scenario)[backend]
    assert [facts[problem] for problem in ("unfilled", "mismatched", "unused", "foreign")] == [[], [], [], []]
    for layer, (ratio, found) in enumerate(zip(RATIOS, facts["inputs"], strict=True)):
        if is_joined(scenario, backend, ratio):
            name = f"model.layers.{layer}.attn.input_projections"
            assert found == {"alone": 0, "joined": True, "name": name, "prepared_once": True, "held_once": True}
        else:
            assert found == {"alone": NUM_INPUTS[ratio], "joined": False}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_query_latent_is_quantized_once(results: dict[str, Any], backend: str) -> None:
    # Alone, or not quantized at all, wq_b takes it as it is.
    want = [ratio == 4 and BACKENDS[backend] == "nvfp4" for ratio in RATIOS]
    assert facts_of(results, "chains")[backend]["shares_query"] == want


def test_attention_runs_outside_of_piecewise_graphs(results: dict[str, Any]) -> None:
    found = results["breaks"]
    assert found["upstream's"] == [False, False], "imported with the variable set: this is not the case under test"
    assert found["v2"] == [[2, 2]] * len(RATIOS)
    assert found["v1"] == [[3, 3]] * len(RATIOS)


@pytest.mark.parametrize("activations", ["nvfp4", "bf16"])
@pytest.mark.parametrize("scenario", ["joined", "joined-apart"])
def test_joined_projections_are_those_of_the_parts(results: dict[str, Any], scenario: str, activations: str) -> None:
    facts = facts_of(results, scenario)[activations]
    assert [facts[problem] for problem in ("unfilled", "mismatched", "unused", "foreign")] == [[], [], [], []]
    for ratio, found in zip(RATIOS, facts["projections"], strict=True):
        assert found["same"] == [True] * 4
        assert found["joined"] == (NUM_INPUTS[ratio] > 1 and (scenario == "joined" or activations == "bf16"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_experts_weights_are_prepared_once(results: dict[str, Any], backend: str) -> None:
    # Its two linears have kernels of ours too, which would permute the same bytes first.
    assert facts_of(results, "chains")[backend]["shared_expert"] == [True] * len(RATIOS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scenario", ["chains", "chains-apart"])
def test_linears_that_run_side_by_side_share_no_buffers(results: dict[str, Any], scenario: str, backend: str) -> None:
    for ratio, found in zip(RATIOS, facts_of(results, scenario)[backend]["workspaces"], strict=True):
        main = {found[name] for name in ("wqa_wkv", "wq_b", "wo_b")}
        assert len(main) == 1  # one after the other: no need for more memory
        others = {0: [], 128: ["compressor"], 4: ["compressor", "weights_proj", "indexer compressor"]}[ratio]
        at_once = 0 if is_joined(scenario, backend, ratio) else len(others)
        assert len(main | {found[name] for name in others}) == 1 + at_once
        if ratio == 4:
            assert found["indexer wq_b"] not in main


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_warm_up_calls_each_shape_with_every_batch(results: dict[str, Any], backend: str) -> None:
    found = facts_of(results, "chains")[backend]["warm_up"]
    assert found["frozen"]
    of_kind: dict[str, list[str]] = {}
    for name, calls in found["calls"].items():
        kind, layer = name.split(" ", 1)
        *ordinary, strided = calls
        assert strided == [2, False]
        assert all(is_contiguous for _, is_contiguous in ordinary)
        sizes = [size for size, _ in ordinary]
        of_kind.setdefault(kind, []).append(layer)
        largest = 80 if kind == "MoeRunner" else 40
        assert sizes == sorted(set(sizes), reverse=True)
        assert (sizes[0], sizes[-1]) == (largest, 1)
    # wqa_wkv, wq_b, wo_b, indexer.wq_b, and the joined inputs at 4 and at 128.
    once = dict.fromkeys(("MoeRunner", "SharedExpertRunner", "WoARunner"), 1)
    assert {kind: len(layers) for kind, layers in of_kind.items()} == {"LinearRunner": 6, **once}


def test_a_module_without_its_runner_ends_the_start(results: dict[str, Any]) -> None:
    facts = facts_of(results, "main-affine")
    assert facts["all_served"]
    first, shared, experts = facts["unserved"]
    assert "1 modules that the checkpoint has in NVFP4 have no runner" in first
    assert "the first is model.layers.1.attn.wq_b, with ModelOptNvFp4ShardedLinearMethod" in first
    assert "2 modules" in shared
    assert "the first is model.layers.1.ffn.shared_experts.gate_up_proj" in shared
    assert "the first is model.layers.1.ffn.experts, with ModelOptNvFp4RunnerMoEMethod" in experts


@pytest.mark.parametrize("scenario", ["mtp-bare", "mtp-l3", "stock"])
def test_drafts_fp8_and_recorded_fallbacks_count_as_served(results: dict[str, Any], scenario: str) -> None:
    facts = main_facts(results, scenario)["all_served"]
    assert facts in ("no error: None", ["no error: None"] * 2)


def test_runner_ids_are_part_of_the_key_of_compiled_graphs(results: dict[str, Any]) -> None:
    # Without ours, with it, again, with one more runner.
    assert facts_of(results, "main-affine")["keys"] == [0, 1, 1, 3]


def test_expert_parallel_rank_holds_its_own_experts(results: dict[str, Any]) -> None:
    facts = facts_of(results, "ep")
    assert (facts["unfilled"], facts["mismatched"], facts["bad_runners"]) == ([], [], [])
    assert facts["num_local"] == [16] * len(RATIOS)
    assert "31 of 32" in facts["missing"]
    assert "layers.2.ffn.experts.routed_experts.w13_weight" in facts["missing"]


def test_stock_kernels_serve_as_a_recorded_fallback(results: dict[str, Any]) -> None:
    facts = facts_of(results, "stock")
    assert facts["backend"] is None
    assert facts["reason"]
    assert facts["num_loaded"] == 220
    assert (facts["unfilled"], facts["mismatched"], facts["unused"]) == ([], [], [])
    linears = ["linear", "EmulationNvFp4LinearKernel", True, NUM_LINEARS]
    assert facts["summary"] == [linears, ["moe", "ModelOptNvFp4FusedMoE EMULATION", True, len(RATIOS)]]
    assert facts["num_fallbacks"] == NUM_LINEARS + len(RATIOS)
    assert facts["runners"] == {}


def test_stock_kernels_never_merge_scales_that_differ(results: dict[str, Any]) -> None:
    facts = facts_of(results, "stock")
    for fact, leaf, module in (
        ("shard_weight", "weight_scale_2", "model.layers.1.attn.fused_wqa_wkv"),
        ("shard_input", "input_scale", "model.layers.1.ffn.shared_experts.gate_up_proj"),
    ):
        assert facts[fact].startswith(f"ValueError: {module}: the shards' {leaf} differ")
        assert "EmulationNvFp4LinearKernel" in facts[fact]
    assert facts["expert"].startswith("CheckpointError: model.layers.1.ffn.experts: w1 and w3 of expert 7")


def test_strict_mode_refuses_stock_kernels(results: dict[str, Any]) -> None:
    facts = facts_of(results, "stock")
    refusal = "RuntimeError: NVFP4_STRICT=1 refuses a stock fallback: linear model.layers.0.attn.fused_wqa_wkv"
    assert facts["strict"].startswith(refusal)
    assert facts["reason"] in facts["strict"]
    assert facts["strict_by_flag"].startswith(refusal)
    assert "--linear-backend" in facts["strict_by_flag"]


# What the message must name: the checkpoint's tensor, or the parameter that stayed incomplete.
BROKEN = {
    "extra unknown": "UnknownNameError: no rule covers the tensor 'layers.1.attn.mystery.weight'",
    "extra module": "CheckpointError: layers.0.attn.compressor.wkv.weight has no place in the model",
    "extra expert": "CheckpointError: layers.0.ffn.experts.99.w1.weight: the model has no expert 99",
    "missing plain": "1 parameters were not in the checkpoint and 0 only in part: model.layers.1.attn_norm.weight;",
    "missing head": "1 parameters were not in the checkpoint and 0 only in part: lm_head.weight;",
    "missing shard": "model.layers.1.attn.fused_wqa_wkv.weight (1 of 2 tensors)",
    "missing expert weight": "model.layers.2.ffn.experts.routed_experts.w13_weight (63 of 64 tensors)",
    "missing expert scale": "model.layers.2.ffn.experts.routed_experts.w2_input_scale (31 of 32 tensors)",
    "shape plain": "CheckpointError: layers.1.attn_norm.weight: torch.float32 (512,) does not fit",
    "shape small sink": "CheckpointError: layers.1.attn.attn_sink: torch.float32 (7,) does not fit",
    "shape large sink": "CheckpointError: layers.1.attn.attn_sink: torch.float32 (16,) does not fit",
    "shape linear": "CheckpointError: layers.1.attn.wq_b.weight: torch.uint8 (4096, 128) does not fit",
    "shape shard": "CheckpointError: layers.1.attn.wkv.weight: torch.uint8 (511, 128) does not fit",
    "shape scalar": "CheckpointError: layers.1.attn.wq_b.input_scale is of shape (2,)",
    "shape small expert": "CheckpointError: layers.2.ffn.experts.5.w1.weight: torch.uint8 (63, 128) does not fit",
    "shape thin expert": "CheckpointError: layers.2.ffn.experts.5.w2.weight_scale: torch.float8_e4m3fn (256, 3) does",
    "shape large expert": "CheckpointError: layers.2.ffn.experts.5.w1.weight: torch.uint8 (64, 256) does not fit",
    "dtype packed": "CheckpointError: layers.1.attn.wq_b.weight: torch.bfloat16 (4096, 64) does not fit",
    "dtype scale": "CheckpointError: layers.2.ffn.experts.5.w2.weight_scale: torch.float32 (256, 4) does not fit",
    "dtype plain": "CheckpointError: layers.1.attn_norm.weight: torch.float8_e4m3fn (256,) does not fit",
    "nan": "CheckpointError: layers.2.ffn.experts.5.w1.input_scale is NaN",
    "draft missing": "1 parameters were not in the checkpoint and 0 only in part: model.layers.4.h_proj.weight;",
    "draft expert": "model.layers.4.mtp_block.ffn.experts.routed_experts.w13_weight (63 of 64 tensors)",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_refused_by_name(results: dict[str, Any], case: str) -> None:
    assert BROKEN[case] in facts_of(results, "broken")[case]


def test_the_same_models_take_the_intact_checkpoint(results: dict[str, Any]) -> None:
    facts = facts_of(results, "broken")
    assert facts["intact"] == [220, 58]
    assert set(facts) == {*BROKEN, "intact"}
