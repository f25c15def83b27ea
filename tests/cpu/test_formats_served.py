"""Checkpoints that are not all-NVFP4, or are asked to be more so: FP8 dense parts (L3), wo_a in NVFP4, MTP tensors."""

import json
from pathlib import Path

import pytest
from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint
from serving import run_engine

pytestmark = pytest.mark.engine


def test_fp8_dense_with_nvfp4_experts_and_mtp(tmp_path: Path) -> None:
    # Layout L3, as NVIDIA publishes V4-Pro-NVFP4, with an MTP layer that the CPU has no use for and must leave unread.
    model = tmp_path / "l3"
    make_tiny_checkpoint(model, TinySpec(layout="L3", mtp=1, intermediate=128))
    prompts = [[7, 8, 9, 10], list(range(6, 256)) * 1]
    result = run_engine(tmp_path / "run", model, prompts, max_tokens=4)
    kinds = {(kind, served_by): count for kind, served_by, _, count in result["selection"]}
    assert kinds[("moe", "cutedsl reference")] == 4
    # 4 layers: fused_wqa_wkv, wq_b, wo_a, wo_b, the shared expert's two; and two indexers' wq_b.
    assert kinds[("linear", "vLLM FP8 block")] == 4 * 6 + 2
    assert not any(fallback for _, _, fallback, _ in result["selection"])
    # Noise, but numbers: a NaN anywhere would make every log-probability NaN.
    for answer in result["answers"]:
        assert all(-20 < value <= 0 for value in answer["logprobs"])
    assert "mtp.0" not in result["log"]


def test_wo_a_quantized_on_request(affine: Path, tmp_path: Path) -> None:
    rows = json.loads((affine / "reference.json").read_text())[:3]
    prompts = [row["prompt_token_ids"] for row in rows]
    result = run_engine(tmp_path / "run", affine, prompts, env={"NVFP4_WO_A": "1", "NVFP4_STRICT": "1"})
    assert ["wo_a", "cutedsl reference", False, 4] in result["selection"]
    for row, answer in zip(rows, result["answers"], strict=True):
        # A margin of 8 between first and second: one more quantized matrix must not change a sure answer.
        assert answer["tokens"] == row["greedy"]
        worst = max(abs(a - top[0][1]) for a, top in zip(answer["logprobs"], row["top5_logprobs"], strict=True))
        assert worst < 0.05
    plain = run_engine(tmp_path / "plain", affine, prompts, env={"NVFP4_WO_A": "0"})
    assert not any(kind == "wo_a" for kind, *_ in plain["selection"])
    # The switch does something: the same numbers with and without would mean that it was ignored.
    assert any(a["logprobs"] != b["logprobs"] for a, b in zip(plain["answers"], result["answers"], strict=True))
