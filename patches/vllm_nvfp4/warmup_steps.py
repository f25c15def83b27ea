"""What vLLM's own warm-up leaves to the first requests: run by each worker before it captures graphs and HTTP answers.

    prefills   beside a decode, with one number of tokens for each way in which DeepGEMM splits the hyper-connections'
               GEMM, up to the largest step, which is long enough for the indexer to choose from
    ways       to sample, those whose kernels vLLM's warm-up does not reach
    schedules  compute capability 9.0 only: DeepGEMM has another kernel for every 32 decodes that the indexer looks at

The hard part is to depend on none of these kernels' keys: prefills and ways are steps of the whole model, made by the
functions that vLLM warms up with, and only how many tokens or which sampling is ours. They come before the first capture,
as vLLM's own do: a workspace that grows later frees what graphs point at. docs/warmup.md has what is left after this.

Behind them an H200 compiled nothing more in 208 mixed requests; what the sweep of a server found, users between two and the
most that sample by top-p, is in docs/warmup.md. Not verified on hardware: compute capability 10.0.
"""

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from vllm_nvfp4 import env
from vllm_nvfp4.status import STEPPING, Status

logger = logging.getLogger("vllm.nvfp4")

TILE_TOKENS = 64  # DeepGEMM's; see mhc/tilelang_kernels.py:compute_num_split
SCHEDULE_ROWS = 32
LEAST_TOKENS = 3  # a decode, and a prefill that is none
INDEXER_RATIO = 4  # tokens of an entry that the indexer chooses from
# How many log-probabilities. With the sampled token's own, their number rounded up to a power of two decides the kernel, and
# Triton compiles it anew for exactly 1 and for multiples of 16. vLLM's warm-up asks for 5.
LOGPROBS = (0, 1, 2, 8, 15, 16)
# With a seed, FlashInfer's sampler is passed by, and the Triton kernels compute.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.9},
    "seeded": {"seed": 1},
    "seeded top-k": {"top_k": 20, "seed": 1},
    "seeded top-p": {"top_p": 0.9, "seed": 1},
    "seeded top-k and top-p": {"top_k": 20, "top_p": 0.9, "seed": 1},
    **{f"logprobs {count}": {"temperature": 0.0, "logprobs": count} for count in LOGPROBS},
}


@contextmanager
def before_capture(worker: Any, status: Status) -> Iterator[None]:
    """Inside, `worker` runs all of this when it is about to capture its graphs.

    Nothing happens on CPUs, with NVFP4_WARMUP=off, and where vLLM does not warm up itself (--enforce-eager).
    """
    if not _is_wanted(worker):
        yield
        return
    runner = worker.model_runner
    capture = runner.capture_model

    @functools.wraps(capture)
    def warm_and_capture(*args: Any, **kwargs: Any) -> Any:
        run(worker, status)
        return capture(*args, **kwargs)

    runner.capture_model = warm_and_capture
    try:
        yield
    finally:
        del runner.capture_model


def _is_wanted(worker: Any) -> bool:
    from vllm.platforms import current_platform

    if env.choice(env.WARMUP, env.WARMUP_MODES) == "off" or not current_platform.is_cuda():
        return False
    if worker.use_v2_model_runner and worker.vllm_config.kernel_config.enable_jit_warmup:
        return True
    logger.warning(
        "NVFP4 warm-up: no steps, as vLLM's JIT warm-up is off or its first model runner serves; what only requests reach "
        "is compiled by the first of them (scripts/warmup.py sends them)"
    )
    return False


def prefill_sizes(limit: int, num_sms: int, shards: int) -> list[int]:
    """Tokens of a step, the largest first: `limit`, and the fewest for each number of parts that a GEMM is split into.

    shards: over how many ranks sequence parallelism may deal the tokens out.
    """
    found = {limit}
    for tile in {TILE_TOKENS, TILE_TOKENS * shards}:
        parts = [max(1, num_sms // tiles) for tiles in range(1, -(-limit // tile) + 1)]
        first = [index for index, count in enumerate(parts) if count not in parts[:index]]
        found |= {min(limit, (index + 1) * tile) for index in first}
    return sorted((size for size in found if size >= LEAST_TOKENS), reverse=True)


def run(worker: Any, status: Status) -> None:
    """Every step, counted in the heartbeat.

    Raises: what a step raises; a kernel that cannot be compiled should stop the start, not a request.
    """
    started, config = time.perf_counter(), worker.vllm_config
    model = config.model_config
    # vLLM's function counts its prompt's token ids up from 0.
    limit = min(config.scheduler_config.max_num_batched_tokens, model.max_model_len, model.get_vocab_size())
    sizes = prefill_sizes(limit, _num_sms(worker), config.parallel_config.tensor_parallel_size)
    most = model.max_logprobs
    ways = [way for way in WAYS.values() if most < 0 or way.get("logprobs", 0) <= most]
    schedules = [partial(_schedule, worker, *schedule) for schedule in _schedules(worker)]
    calls = [partial(_prefill, worker, size) for size in sizes] + [partial(_sample, worker, way) for way in ways]
    calls += schedules
    ran = []
    with torch.inference_mode():
        for done, call in enumerate(calls):
            status.update(STEPPING, done, len(calls), "steps")
            ran.append(call())
    torch.accelerator.synchronize()
    status.update(STEPPING, len(calls), len(calls), "steps")
    left = [size for size, was_run in zip(sizes, ran, strict=False) if not was_run]
    logger.info(
        "NVFP4 warm-up: steps of %s tokens, %d ways to sample, %d schedules, %.1f s",
        [size for size in sizes if size not in left], len(ways), len(schedules), time.perf_counter() - started,
    )  # fmt: skip
    chooses_from = (model.hf_config.index_topk + 1) * INDEXER_RATIO
    _warn_of_the_rest(left, limit, chooses_from if chooses_from <= model.max_model_len else None)


def _warn_of_the_rest(left: list[int], limit: int, chooses_from: int | None) -> None:
    if left:
        logger.warning(
            "NVFP4 warm-up: steps of %s tokens were not run: vLLM has too few KV blocks for them, or serves one request at a "
            "time; scripts/warmup.py sends them",
            left,
        )
    elif chooses_from is not None and limit <= chooses_from:
        logger.warning(
            "NVFP4 warm-up: no step of at most %d tokens makes the indexer choose, as prompts of %d tokens do; raise "
            "--max-num-batched-tokens, or send one with scripts/warmup.py",
            limit,
            chooses_from,
        )


def _prefill(worker: Any, num_tokens: int) -> bool:
    """A step of a prefill and a decode; False: vLLM refused, see `_warn_of_the_rest`."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    return run_mixed_prefill_decode_warmup(
        worker.model_runner, worker.execute_model, worker.sample_tokens, num_tokens, req_id_prefix="_nvfp4"
    )


def _sample(worker: Any, way: dict[str, Any]) -> None:
    """vLLM's own steps, of as many requests as may run, of two and of one, with another way to sample."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    before = vars(SamplingParams)["for_sampler_warmup"]
    SamplingParams.for_sampler_warmup = staticmethod(lambda: SamplingParams(**way))
    try:
        warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
    finally:
        SamplingParams.for_sampler_warmup = before


def _schedules(worker: Any) -> Iterator[tuple[Any, int]]:
    """(the indexer's builder, rows) of each schedule that decodes of this engine can ask for."""
    from vllm.platforms import current_platform
    from vllm.utils.deep_gemm import has_deep_gemm
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerMetadataBuilder

    if not current_platform.is_device_capability((9, 0)) or not has_deep_gemm():
        return
    runner, scheduler = worker.model_runner, worker.vllm_config.scheduler_config
    # Where the kernel does not take a request's drafts together, each is a row of its own.
    most = min(scheduler.max_num_seqs * runner.decode_query_len, scheduler.max_num_batched_tokens)
    builders = [builder for groups in runner.attn_groups for group in groups for builder in group.metadata_builders]
    for builder in builders:
        if isinstance(builder, DeepseekV32IndexerMetadataBuilder):
            yield from ((builder, rows) for rows in range(SCHEDULE_ROWS, most + SCHEDULE_ROWS, SCHEDULE_ROWS))
            return  # all layers have the same


def _schedule(worker: Any, builder: Any, rows: int) -> None:
    from vllm.utils.deep_gemm import get_paged_mqa_logits_metadata

    lengths = torch.ones(rows, 1, dtype=torch.int32, device=worker.device)
    get_paged_mqa_logits_metadata(lengths, builder.kv_cache_spec.num_states, builder.num_sms)


def _num_sms(worker: Any) -> int:
    from vllm.platforms import current_platform

    return current_platform.num_compute_units(worker.device.index or 0)
