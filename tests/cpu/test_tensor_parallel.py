"""TP=2 on two CPU worker processes, through HTTP: the same answers as ModelOpt's simulation."""

import json
import re
from pathlib import Path

import openai
import pytest
from serving import serve
from test_http import EXTRA, LOGPROB_TOLERANCE, SURE_LENGTH, parse, sure_positions

pytestmark = pytest.mark.engine


def test_two_ranks_answer_as_modelopt(affine: Path, tmp_path: Path) -> None:
    # Bind one thread a rank: two ranks on the same core would take turns.
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "NVFP4_STRICT": "1"}
    with serve(tmp_path, affine, "--tensor-parallel-size", "2", env=env) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
        for row in json.loads((affine / "reference.json").read_text()):
            answer = client.completions.create(
                model=str(affine),
                prompt=row["prompt_token_ids"],
                max_tokens=16,
                temperature=0,
                logprobs=1,
                extra_body=EXTRA,
            )
            tokens, logprobs = parse(answer)
            count = sure_positions(row)
            assert tokens[:count] == row["greedy"][:count], f"prompt of {len(row['prompt_token_ids'])} tokens"
            if len(row["prompt_token_ids"]) <= SURE_LENGTH:
                pairs = zip(logprobs, row["top5_logprobs"], strict=True)
                worst = max(abs(logprob - top[0][1]) for logprob, top in pairs)
                assert worst < LOGPROB_TOLERANCE
        # Each rank serves every module itself; nothing fell back on either.
        metrics = server.get("/metrics")[1]
        assert re.findall(r'nvfp4_modules\{[^}]*kind="linear",rank="(\d)"[^}]*\} 29\.0', metrics) == ["0", "1"]
