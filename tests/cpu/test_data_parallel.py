"""Two data-parallel ranks that share the experts, on CPU worker processes, through HTTP: the same answers as alone.

The first layer routes by token id, so a rank that looked its own ids up for the other's tokens would be found out.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from serving import serve
from test_http import EXTRA, parse, sure_positions

pytestmark = [pytest.mark.engine, pytest.mark.full]

# Experts dealt out over the ranks, and each expert cut over them.
LAYOUTS = {"dealt out": ("--enable-expert-parallel",), "cut": ()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_that_share_experts_answer_as_one(affine: Path, tmp_path: Path, layout: str) -> None:
    rows = json.loads((affine / "reference.json").read_text())
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "NVFP4_STRICT": "1"}
    with serve(tmp_path, affine, "--data-parallel-size", "2", *LAYOUTS[layout], env=env) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)

        def wrong(row: dict) -> list[int]:
            answer = client.completions.create(
                model=str(affine), prompt=row["prompt_token_ids"], max_tokens=16, temperature=0, logprobs=1,
                extra_body=EXTRA,
            )  # fmt: skip
            tokens, _ = parse(answer)
            return [i for i in range(sure_positions(row)) if tokens[i] != row["greedy"][i]]

        assert [wrong(row) for row in rows] == [[]] * len(rows)
        # At once: both ranks have tokens, of different numbers.
        with ThreadPoolExecutor(len(rows)) as pool:
            assert list(pool.map(wrong, rows)) == [[]] * len(rows)
        # As many API servers as ranks, whichever answers.
        shown = [line for line in server.get("/metrics")[1].splitlines() if line.startswith("nvfp4_fallback_modules{")]
        assert shown == ['nvfp4_fallback_modules{rank="0"} 0.0', 'nvfp4_fallback_modules{rank="1"} 0.0']
