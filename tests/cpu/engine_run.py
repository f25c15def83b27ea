"""Run one in-process vLLM engine and write what it answered: `python engine_run.py JOB.json OUT.json`.

A process of its own for each engine: vLLM keeps global state, and the switches under test are environment variables.
JOB: {"model", "prompts": [[token ids]], "max_tokens", "llm": {extra LLM arguments},
"steps": run those that precede graph capture}.
OUT: {"answers": [{"tokens", "logprobs", "logprobs_hex"}], "selection": [[kind, served_by, fallback, count]], "modules": n}.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def warm_up(engine: Any) -> None:
    """The steps that a worker on a GPU runs before it captures graphs, on this CPU: with its real scheduler interface."""
    from vllm_nvfp4 import warmup_steps
    from vllm_nvfp4.status import Status

    warmup_steps._num_sms = lambda _: 4
    warmup_steps.run(engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker, Status(""))


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    arguments = {"max_model_len": 4096, "max_num_seqs": 8, "distributed_executor_backend": "uni", **job.get("llm", {})}
    engine = LLM(model=job["model"], **arguments)
    if job.get("steps"):
        warm_up(engine)
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=1, ignore_eos=True)
    answers = []
    for prompt in job["prompts"]:
        answer = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        chosen = [row[token].logprob for row, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        answers.append(
            {"tokens": list(answer.token_ids), "logprobs": chosen, "logprobs_hex": [float(v).hex() for v in chosen]}
        )
    from vllm_nvfp4 import selection

    rows = [[*key, count] for key, count in sorted(selection.summary().items())]
    Path(sys.argv[2]).write_text(json.dumps({"answers": answers, "selection": rows}))


if __name__ == "__main__":
    main()
