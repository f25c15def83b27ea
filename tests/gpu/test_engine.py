"""The overlay on an NVIDIA GPU: upstream's model with our loader and kernels, and vLLM's own kernels on request.

Needs vLLM 0.32.0 for CUDA: `-m engine`; `-m "not engine"` leaves these tests out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_kit
import pytest

pytestmark = pytest.mark.engine

# The reference simulates W4A4 in torch's order of sums. W4A16 is another function, nearer to the unquantized model.
TOLERANCE = {"nvfp4": 0.03, "bf16": 0.05, "stock": 0.05}
SURE_LENGTH = 40
# Which prompt of the tiny model the indexer chooses for.
LONG = 2
# Of its random weights, where sums may be in another order: one unit in the last place of its embeddings moves
# log-probabilities by up to 0.17 in W4A16 and 0.27 in W4A4, seen on a CPU.
OTHER_ORDER = 0.5
START_LIMIT_S = 500
# tests/data/affine-a has 8 index heads, and DeepGEMM's indexer kernel takes 32 or 64: without graph capture prompts this
# short never reach it. The tiny checkpoint has 64, and runs as a real model would.


def run_engine(folder: Path, model: Path, prompts: list[list[int]], env: dict[str, str], **options: Any) -> dict:
    """What engine_script.py wrote for a job."""
    folder.mkdir(parents=True, exist_ok=True)
    job, out = folder / "job.json", folder / "out.json"
    job.write_text(json.dumps({"model": str(model), "prompts": prompts, "max_tokens": 16, "llm": {}} | options))
    command = [sys.executable, str(Path(__file__).with_name("engine_script.py")), str(job), str(out)]
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=START_LIMIT_S, check=False
    )
    assert done.returncode == 0, f"the engine failed:\n{(done.stdout + done.stderr)[-6000:]}"
    return json.loads(out.read_text())


def assert_as_modelopt(rows: list[dict], found: list[dict], tolerance: float, gpu: str) -> None:
    """Greedy tokens of sure prompts are ModelOpt's, and their log-probabilities near."""
    same, worst = 0, 0.0
    for row, answer in zip(rows, found, strict=True):
        same += sum(a == b for a, b in zip(answer["tokens"], row["greedy"], strict=True))
        if len(row["prompt_token_ids"]) <= SURE_LENGTH:
            assert answer["tokens"] == row["greedy"], f"prompt of {len(row['prompt_token_ids'])} tokens"
            expected = [top[0][1] for top in row["top5_logprobs"]]
            worst = max(worst, *(abs(a - b) for a, b in zip(answer["logprobs"], expected, strict=True)))
    print(f"{gpu}: {same} of {16 * len(rows)} tokens as ModelOpt's, log-probabilities within {worst:.4f}")
    assert worst < tolerance


@pytest.mark.parametrize("activations", gpu_kit.modes())
def test_our_kernels_answer_as_modelopt(affine: Path, tmp_path: Path, gpu: str, activations: str) -> None:
    rows = json.loads((affine / "reference.json").read_text())
    prompts = [row["prompt_token_ids"] for row in rows]
    env = {"NVFP4_ACTIVATIONS": activations, "NVFP4_STRICT": "1"}
    found = run_engine(tmp_path, affine, prompts, env, llm={"enforce_eager": True})
    for row in found["selection"]:
        print(row)
    print(f"{found['peak_gb']:.2f} GB of the GPU's memory at most")
    served_by = {(kind, by) for kind, by, _, _ in found["selection"]}
    assert {kind for kind, _ in served_by} >= {"linear", "moe"}
    assert {by for _, by in served_by} == {f"cutedsl {gpu_kit.backend()}"}
    assert_as_modelopt(rows, found["alone"], TOLERANCE[activations], gpu)
    # Requests side by side are computed by other tiles, and by vLLM in another order; the answers stay.
    assert_as_modelopt(rows, found["together"], TOLERANCE[activations], gpu)
    assert found["compiled"] == 0, f"{found['compiled']} kernels were compiled or loaded while serving"


def test_stock_kernels_answer_as_modelopt(affine: Path, tmp_path: Path, gpu: str) -> None:
    rows = json.loads((affine / "reference.json").read_text())
    prompts = [row["prompt_token_ids"] for row in rows]
    found = run_engine(tmp_path, affine, prompts, {"NVFP4_PROVIDER": "stock"}, llm={"enforce_eager": True})
    assert_as_modelopt(rows, found["alone"], TOLERANCE["stock"], gpu)
    # What was asked for must still be on record.
    assert {kind for kind, _, fallback, _ in found["selection"] if fallback} >= {"linear", "moe"}


def distances(one: dict, other: dict) -> list[float]:
    """Of the best log-probabilities of two answers, up to and at the first token that differs."""
    pairs = list(zip(one["tokens"], other["tokens"], strict=True))
    end = next((i + 1 for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
    return [abs(x - y) for x, y in zip(one["logprobs"][:end], other["logprobs"][:end], strict=True)]


def assert_same(one: list[dict], other: list[dict], tolerances: list[float]) -> None:
    """The same answers, but for near ties."""
    found = [distances(a, b) for a, b in zip(one, other, strict=True)]
    print([f"{max(row):.5f}" for row in found])
    for number, (row, tolerance) in enumerate(zip(found, tolerances, strict=True)):
        # max() could lose a NaN.
        assert all(distance < tolerance for distance in row), f"prompt {number}, up to token {len(row)}: {row}"


@pytest.mark.parametrize("activations", gpu_kit.modes())
def test_tiny_model_with_cuda_graphs_and_a_long_prompt(tmp_path: Path, activations: str) -> None:
    """Graphs answer as eager does: prompts of one token (a decode's graph), of less than a graph, and of more than any.

    Eight of them, so that a step of all has no padding that would choose another kernel. Where the indexer chooses, two
    engines were 0.3 apart on an H200 at the first token already, whose step is in no graph; supposed is that vLLM's top-k
    leaves what it chose in any order. That prompt is asked twice: the line printed says how far an engine is from itself.
    """
    from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint

    model = tmp_path / "tiny"
    make_tiny_checkpoint(model, TinySpec(index_heads=64))
    prompts = [[9], [7, 8, 9], [6 + i % 250 for i in range(2300)], [11] * 60, [5, 6] * 20, list(range(20, 65)), [8] * 9]
    prompts.append(prompts[LONG])
    env = {"NVFP4_ACTIVATIONS": activations, "NVFP4_STRICT": "1"}
    options = {"enable_prefix_caching": False}
    graphs = options | {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 48, 64]}}
    found = run_engine(tmp_path / "run", model, prompts, env, max_tokens=8, llm=graphs)
    for answer in found["alone"] + found["together"]:
        assert all(-20 < value <= 0 for value in answer["logprobs"]), "NaN, or no probability"
    assert found["compiled"] == 0, f"{found['compiled']} kernels were compiled or loaded while serving"
    eager = run_engine(tmp_path / "eager", model, prompts, env, max_tokens=8, llm=options | {"enforce_eager": True})
    for name, run in ("graphs", found), ("eager", eager):
        print(f"{activations} {name}: from itself {max(distances(run['alone'][LONG], run['alone'][-1])):.5f}")
    tolerances = [OTHER_ORDER if prompt == prompts[LONG] else TOLERANCE[activations] for prompt in prompts]
    assert_same(found["alone"], eager["alone"], tolerances)
    assert_same(found["together"], eager["together"], tolerances)
    assert_same(found["together"], eager["alone"], [OTHER_ORDER] * len(prompts))
