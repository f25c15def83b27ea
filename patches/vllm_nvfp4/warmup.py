"""Every kernel that serving can select runs once behind the load, and from then on nothing is compiled.

What vLLM 0.32.0 runs before it serves, in this order: `profile_run` (the largest batch, attention left out),
`profile_cudagraph_memory` (captures some graphs to see their size, each behind an eager run), then
`compile_or_warm_up_model`: `kernel_warmup` (Triton and CuTe DSL kernels registered for it, DeepGEMM, FlashInfer's
autotuner at the largest batch), one mixed step of prefill and decode, `capture_model` (every capture size, each behind
an eager run).

Not covered there, and so here: batches between the capture sizes and the largest one; wo_a and the indexer's wq_b, which
profile runs leave out; and all of it before the first capture, as buffers must not grow during one. The end of the
load is the last point of ours before that. The inputs are random BF16 activations, the weights the model's own.

Two phases: `kernels` says how many the set in use has, `warming up` counts the calls; what these load and compile is
published after each shape. docs/warmup.md lists what else serving can reach, and who warms that.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cutedsl.runners.moe import MoeRunner
from cutedsl.runners.wo_a import WoARunner
from vllm_nvfp4 import kernel_sets, metrics, platform
from vllm_nvfp4.status import KERNELS, WARM, WARMING, Status

logger = logging.getLogger("vllm.nvfp4")

# Kernels are chosen by the number of tokens, in classes wider than this: 1 in 16.
STEPS = 16
STRIDED_ROWS = 2  # at least two rows have a stride


@dataclass(frozen=True)
class Limits:
    """tokens: of a rank's largest step; gathered: of all data-parallel ranks', which experts see; top_k: of the router."""

    tokens: int
    gathered: int
    top_k: int

    @staticmethod
    def of(vllm_config: Any) -> "Limits":
        """The limits of an engine."""
        parallel = vllm_config.parallel_config
        tokens, tp = vllm_config.scheduler_config.max_num_batched_tokens, parallel.tensor_parallel_size
        # Sequence parallelism pads to whole shards.
        gathered = parallel.data_parallel_size * -(-tokens // tp) * tp
        return Limits(tokens, gathered, vllm_config.model_config.hf_config.num_experts_per_tok)


def batches(largest: int) -> list[int]:
    """Numbers of tokens, the largest first, so that buffers grow once: every small one, then steps of 1/16."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(largest, sizes[-1] + max(1, sizes[-1] // STEPS)))
    return sizes[::-1]


def run(model: torch.nn.Module, limits: Limits, status: Status) -> None:
    """Call each distinct runner of the model with every batch of `batches`, then forbid compilation in this process.

    Nothing to do for the reference, which has neither kernels nor buffers.

    Raises: what a kernel raises; one that cannot be compiled should stop the start, not a request.
    """
    distinct = {_shape(runner): (runner, table) for runner, table in _runners(model)}
    if not distinct:
        return
    from cutedsl import compile as compiler

    compiler.freeze(False)  # a draft model is loaded behind the main one
    started, before = time.perf_counter(), compiler.counters()
    built = kernel_sets.use() if platform.backend() in platform.CAPABILITY_OF else 0
    status.update(KERNELS, built, built, "kernels")
    done, total = 0, sum(len(batches(_largest(runner, limits))) for runner, _ in distinct.values())
    with torch.inference_mode():
        for runner, table in distinct.values():
            inputs = _inputs(runner, table, limits)
            for tokens in batches(_largest(runner, limits)):
                status.update(WARMING, done, total, "batches")
                runner(*(tensor[:tokens] for tensor in inputs), *([] if table is None else [table]))
                done += 1
            # Where rows are a slice of wider ones, some backends choose another kernel.
            first, *others = (tensor[:STRIDED_ROWS] for tensor in inputs)
            runner(_strided(first), *others, *([] if table is None else [table]))
            del inputs
            metrics.publish(status.rank)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    status.update(WARM, total, total, "batches")
    compiler.freeze()
    after = compiler.counters()
    logger.info(
        "NVFP4 warm-up: %d runners of distinct shape, up to %d tokens, %.1f s; of %d kernels built ahead of time %d loaded, "
        "and %d compiled",
        len(distinct), max(_largest(runner, limits) for runner, _ in distinct.values()), time.perf_counter() - started,
        built, after.loaded - before.loaded, after.compilations - before.compilations,
    )  # fmt: skip


def _runners(model: torch.nn.Module) -> Iterator[tuple[Any, torch.Tensor | None]]:
    """The runners that use kernels, wo_a's with RoPE's table."""
    for module in model.modules():
        for name in ("nvfp4_runner", "nvfp4_input_runner", "nvfp4_wo_a_runner"):
            runner = vars(module).get(name)
            if hasattr(runner, "chain"):
                yield runner, module.rotary_emb.cos_sin_cache if isinstance(runner, WoARunner) else None


def _shape(runner: Any) -> tuple[Any, ...]:
    """What decides kernels and buffers: of runners with the same, one has to run."""
    names = (
        "in_features",
        "out_features",
        "shard_sizes",
        "num_groups",
        "num_heads",
        "num_experts",
        "num_global_experts",
    )
    sizes = [getattr(runner, name, None) for name in names]
    # A linear quantizes once for each distinct input scale of its shards.
    scales = getattr(runner, "input_scale", torch.zeros(1)).flatten()
    pattern = tuple((scales.unsqueeze(0) == scales.unsqueeze(1)).flatten().tolist())
    return (type(runner), *sizes, getattr(runner.chain, "intermediate", None), pattern, id(runner.chain.workspace))


def _strided(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, each with 16 more bytes behind it."""
    wide = rows.new_empty(len(rows), rows[0].numel() + 8)
    strided = wide[:, :-8].view(rows.shape)
    return strided.copy_(rows)


def _largest(runner: Any, limits: Limits) -> int:
    return limits.gathered if isinstance(runner, MoeRunner) else limits.tokens


def _inputs(runner: Any, table: torch.Tensor | None, limits: Limits) -> list[torch.Tensor]:
    """A runner's arguments for the largest batch, without RoPE's table."""
    device, largest = runner.device, _largest(runner, limits)
    if table is not None:
        o = torch.randn(largest, runner.num_heads, runner.head_dim, dtype=torch.bfloat16, device=device)
        return [o, torch.arange(largest, device=device) % len(table)]
    x = torch.randn(largest, runner.in_features, dtype=torch.bfloat16, device=device)
    if not isinstance(runner, MoeRunner):
        return [x]
    scores = torch.rand(largest, runner.num_global_experts, device=device)
    ids = scores.topk(limits.top_k, dim=1).indices.to(torch.int32)  # the type that vLLM's routers give
    return [x, torch.rand(largest, limits.top_k, device=device), ids]
