"""Start an engine and write what it really holds: `python plan_run.py JOB.json OUT.json`.

JOB: {"model", "ranks", "llm": {LLM arguments}}. With two ranks the script starts itself for each, as torchrun would.
OUT: {"weights": {class: bytes of the parameters as loaded, before any packing}, "rope_bytes": of RoPE's tables, "kv": what
vLLM made of its KV cache}, of rank 0; with several ranks "weights_of_rank" holds the others' too.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

KV_BYTES = 1 << 30
# By vLLM's parameter names, first match; written without looking at the plan's own table.
CLASSES = (
    ("routed_experts", r"\.experts\.routed_experts\."),
    ("shared_experts", r"\.shared_experts\."),
    ("embeddings_head", r"embed_tokens|lm_head"),
    ("compressor_indexer", r"\.(compressor|indexer)\."),
    ("wo_a", r"\.wo_a\."),
    ("attention", r"\.(fused_wqa_wkv|wq_b|wo_b)\."),
    ("router_norms_hc", r"norm\.weight|\.gate\.|attn_sink|hc_"),
)


def weights_of(model) -> dict[str, int]:
    """Bytes of storage by class; a storage that two parameters share counts once."""
    sizes = {name: 0 for name, _ in CLASSES}
    seen = set()
    for name, parameter in model.named_parameters():
        storage = parameter.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes[next(cls for cls, pattern in CLASSES if re.search(pattern, name))] += storage.nbytes()
    return sizes


def kv_of(engine) -> dict[str, int | float]:
    """What the engine core decided, and what the worker allocated."""
    core = engine.llm_engine.engine_core.engine_core
    config = engine.llm_engine.vllm_config
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in caches}
    return {
        "num_blocks": core.scheduler.kv_cache_config.num_blocks,
        "num_groups": len(core.scheduler.kv_cache_config.kv_cache_groups),
        "tokens": config.cache_config.kv_cache_size_tokens,
        "concurrency": config.cache_config.kv_cache_max_concurrency,
        "in_flight": config.max_in_flight_tokens,
        "bytes": sum(storages.values()),
    }


def run(job: dict, out: Path) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_BYTES >> 30)
    from vllm import LLM
    from vllm_nvfp4.model_loader import Nvfp4ModelLoader

    found: dict = {}
    load = Nvfp4ModelLoader.load_weights

    def measured(self, model, model_config):
        load(self, model, model_config)
        found["weights"] = weights_of(model)
        tables = {t.data_ptr(): t.untyped_storage().nbytes() for n, t in model.named_buffers() if "cos_sin_cache" in n}
        found["rope_bytes"] = sum(tables.values())

    Nvfp4ModelLoader.load_weights = measured
    backend = "uni" if job["ranks"] == 1 else "external_launcher"
    arguments = {"tensor_parallel_size": job["ranks"], "distributed_executor_backend": backend, **job["llm"]}
    engine = LLM(model=job["model"], **arguments)
    found["kv"] = kv_of(engine)
    out.write_text(json.dumps(found))


def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if job["ranks"] == 1 or "RANK" in os.environ:
        rank = int(os.environ.get("RANK", "0"))
        run(job, out if rank == 0 else out.with_suffix(f".{rank}.json"))
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    world = {"WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(job["ranks"]):
        env = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(subprocess.Popen([sys.executable, *sys.argv], env=env))
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"exit codes of the ranks: {codes}")
    answers = [out, *(out.with_suffix(f".{rank}.json") for rank in range(1, job["ranks"]))]
    found = [json.loads(path.read_text()) for path in answers]
    out.write_text(json.dumps({**found[0], "weights_of_rank": [f["weights"] for f in found]}))


if __name__ == "__main__":
    main()
