"""One in-process vLLM engine on a GPU, asked alone and together: `python engine_script.py JOB.json OUT.json`.

JOB: {"model", "prompts": [[token ids]], "max_tokens", "llm": {extra LLM arguments}}.
OUT: {"alone", "together": [{"tokens", "logprobs"}], "selection": [[kind, served_by, fallback, count]], "compiled": kernels of
ours that were compiled or loaded after the engine was ready, "peak_gb": of the GPU's memory}.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def answers(outputs: Any) -> list[dict[str, list]]:
    found = []
    for output in outputs:
        answer = output.outputs[0]
        chosen = [row[token].logprob for row, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        found.append({"tokens": list(answer.token_ids), "logprobs": chosen})
    return found


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams

    from cutedsl import compile as compiler

    job = json.loads(Path(sys.argv[1]).read_text())
    # A KV cache of a given size: what vLLM would measure is everybody's on this GPU, and tests may run beside each other.
    memory = {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 2 << 30}
    engine = LLM(model=job["model"], max_model_len=4096, max_num_seqs=8, **memory, **job["llm"])
    before = compiler.counters()
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=1, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    alone = [answers(engine.generate([prompt], params, use_tqdm=False))[0] for prompt in prompts]
    together = answers(engine.generate(prompts, params, use_tqdm=False))
    after = compiler.counters()
    from vllm_nvfp4 import selection

    found = {
        "alone": alone,
        "together": together,
        "selection": [[*key, count] for key, count in sorted(selection.summary().items())],
        "compiled": after.compilations + after.loaded - before.compilations - before.loaded,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
