"""Two GPUs: tensor parallel, experts spread over the ranks, data-parallel attention; over HTTP, as users have it.

Needs vLLM 0.32.0 for CUDA and two GPUs: `-m parallel`.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from serving import Server, serve

pytestmark = pytest.mark.parallel

# Prompts on which the reference is sure, as test_http and test_engine have it.
SURE_LENGTH = 40
# As test_engine has it for W4A16: another function than the reference's W4A4.
LOGPROB_TOLERANCE = 0.05
EXPERT_PARALLEL = "--enable-expert-parallel"
WAYS = {
    "tensor": ("--tensor-parallel-size", "2"),
    "tensor and experts": ("--tensor-parallel-size", "2", EXPERT_PARALLEL),
    "data and experts": ("--data-parallel-size", "2", EXPERT_PARALLEL),
}
# tests/data/affine-a has 8 index heads, for which DeepGEMM's indexer has no kernel: see test_engine.
# A KV cache of a given size: what vLLM would measure is everybody's on these GPUs.
FLAGS = ("--enforce-eager", "--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2 << 30))


@pytest.fixture(scope="module", autouse=True)
def two_gpus(gpu: str) -> None:
    assert torch.cuda.device_count() >= 2, f"one {gpu}; this file needs two GPUs"


def ask(server: Server, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities."""
    # Not at the top: collecting the other tests must not need a client.
    import openai
    from test_http import EXTRA, parse

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
    return parse(
        client.completions.create(
            model=server.model, prompt=prompt, max_tokens=16, temperature=0, logprobs=1, extra_body=EXTRA
        )
    )


def worst_distance(rows: list[dict], answers: list[tuple[list[int], list[float]]]) -> float:
    """Of log-probabilities of sure prompts, whose tokens must be the reference's."""
    worst = 0.0
    for row, (tokens, logprobs) in zip(rows, answers, strict=True):
        if len(row["prompt_token_ids"]) <= SURE_LENGTH:
            assert tokens == row["greedy"], f"prompt of {len(row['prompt_token_ids'])} tokens"
            pairs = zip(logprobs, row["top5_logprobs"], strict=True)
            worst = max(worst, *(abs(found - top[0][1]) for found, top in pairs))
    return worst


@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_answer_as_modelopt(affine: Path, tmp_path: Path, gpu: str, way: str) -> None:
    rows = json.loads((affine / "reference.json").read_text())
    prompts = [row["prompt_token_ids"] for row in rows]
    with serve(tmp_path, affine, *FLAGS, *WAYS[way], env={"NVFP4_STRICT": "1"}) as server:
        alone = [ask(server, prompt) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(lambda prompt: ask(server, prompt), prompts))
        metrics = server.get("/metrics")[1]
    distances = worst_distance(rows, alone), worst_distance(rows, together)
    print(f"2 x {gpu}, {way}: log-probabilities within {distances[0]:.4f} alone and {distances[1]:.4f} together")
    assert max(distances) < LOGPROB_TOLERANCE
    served = [line for line in metrics.splitlines() if line.startswith("nvfp4_modules{")]
    print("\n".join(served))
    assert {name for line in served for name in re.findall(r'rank="(\d+)"', line)} == {"0", "1"}
    assert {name for line in served for name in re.findall(r'served_by="([^"]*)"', line)} == {"cutedsl sm90"}
