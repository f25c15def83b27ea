"""What vLLM 0.32.0's CPU path lacks for DeepSeek-V4, closed by replacing single functions.

Each entry says why, where upstream, and when to remove it. The two others are whole modules: triton_cpu/ (Triton's
interpreter as a backend) and fp8_block.py (FP8 linears without AMX).
"""

from functools import wraps
from typing import Any

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder
from vllm.v1.attention.backends.mla import sparse_swa
from vllm.v1.sample.ops import topk_topp_sampler

TILE_SCHEDULER_KEYS = (
    "_LAYER_TYPE_SWAONLY",
    "_LAYER_TYPE_C1A",
    "_LAYER_TYPE_C2A",
    "_LAYER_TYPE_C4A",
    "_LAYER_TYPE_C128A",
)


def close_all() -> None:
    """Apply every replacement; a second call changes nothing."""
    _close_tile_scheduler()
    _close_topk()
    _close_exchange()
    _close_sampler()


def _close_tile_scheduler() -> None:
    """Give the CPU tile scheduler the layer types that its caller asks for.

    Why: sparse_swa.py:780 reads "c1a" and "c2a", which cpu_mla.py:116 does not return: KeyError on the first request.
    Remove when: upstream's build_tile_scheduler for CPUs returns all five keys.
    """
    upstream = DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler
    if hasattr(upstream, "__wrapped__"):
        return

    @wraps(upstream)
    def build_tile_scheduler(self: Any, num_decode_tokens: int) -> dict[str, Any]:
        every = {getattr(sparse_swa, key): None for key in TILE_SCHEDULER_KEYS}
        return {**every, **upstream(self, num_decode_tokens)}

    DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler = build_tile_scheduler


def _close_sampler() -> None:
    """Mask by top-k and top-p in torch.

    Why: topk_topp_sampler.py:466 calls a Triton kernel wherever Triton is there, and `_topk_topp` fails in the
    interpreter: a request with top_p stopped the engine.
    Remove when: the kernel runs in Triton's interpreter, or upstream asks for a GPU.
    """
    topk_topp_sampler.HAS_TRITON = False


def _close_topk() -> None:
    """Route in torch, for any number of experts.

    Why: biased_topk_cpu and hash_topk_cpu (csrc/cpu/sgl-kernels/topk.cpp, called from router/cpu_router.py:115,125) are
    compiled for a few expert counts and raise for others.
    Remove when: they take any count.
    """
    cpu_router.hash_topk_cpu = hash_topk
    cpu_router.biased_topk_cpu = biased_topk


def _close_exchange() -> None:
    """Let data-parallel ranks exchange different numbers of tokens.

    Why: AgRsAll2AllManager (all2all.py:148,172), the CPU's only way for experts to see other ranks' tokens, calls two methods
    that cpu_communicator.py lacks: NotImplementedError on the first request with --data-parallel-size 2.
    Remove when: CpuCommunicator has them.
    """
    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(
    self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """The rows of all ranks, in the order of ranks.

    Args: input_: (sizes[rank], ...) each. sizes: rows of each rank; None if all have as many.
    """
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    counts = _counts(self, dim, sizes, len(input_) * self.world_size)
    # gloo gathers equal shapes.
    padded = input_.new_zeros(max(counts), *input_.shape[1:])
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """This rank's rows of the sum over ranks.

    Args: input_: (sum(sizes), ...). sizes: rows of each rank; None if all have as many.
    """
    counts = _counts(self, dim, sizes, len(input_))
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    return total.split(counts)[self.rank_in_group]


def _counts(self: Any, dim: int, sizes: list[int] | None, num_rows: int) -> list[int]:
    if dim != 0:
        raise NotImplementedError(f"dim is {dim}; experts exchange rows")
    return sizes or [num_rows // self.world_size] * self.world_size


def scores_of(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """sqrt(softplus(logits)) in fp32.

    Raises: ValueError - another scoring function; DeepSeek-V4 has one.
    """
    if scoring_func != "sqrtsoftplus":
        raise ValueError(f"scoring_func is {scoring_func!r}; DeepSeek-V4's CPU router knows 'sqrtsoftplus' only")
    return torch.nn.functional.softplus(logits.float()).sqrt()


def _weights(scores: torch.Tensor, ids: torch.Tensor, scaling: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen experts' scores, normalised to sum to `scaling`; 0 where all of them underflow, as upstream has it."""
    chosen = scores.gather(1, ids.long())
    total = chosen.sum(-1, keepdim=True)
    chosen = chosen / torch.where(total == 0, 1.0, total) * (1.0 if scaling is None else scaling)
    return chosen, ids.to(torch.int32)


def hash_topk(
    gating_output: torch.Tensor,
    tid2eid: torch.Tensor,
    topk: int,
    scoring_func: str,
    num_fused_shared_experts: int,
    num_experts: int,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of the experts that the token's id names.

    Args: gating_output: (T, E) fp32 logits. tid2eid: (T, topk) int32, already looked up by token.
    Returns: (T, topk) fp32, (T, topk) int32.
    """
    _refuse_fused(num_fused_shared_experts)
    return _weights(scores_of(gating_output, scoring_func), tid2eid[:, :topk], routed_scaling_factor)


def biased_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_fused_shared_experts: int,
    routed_scaling_factor: float | None,
    apply_routed_scaling_factor_on_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The topk experts by score + bias; the bias steers the choice and does not enter the weights.

    Args: gating_output: (T, E) fp32 logits. correction_bias: (E,) fp32.
    Returns: (T, topk) fp32, (T, topk) int32.
    """
    _refuse_fused(num_fused_shared_experts)
    if not renormalize:
        raise ValueError("renormalize=False: DeepSeek-V4 always normalises its routing weights")
    scores = scores_of(gating_output, scoring_func)
    ids = (scores + correction_bias.float()).topk(topk, dim=-1, sorted=True).indices
    return _weights(scores, ids, routed_scaling_factor if apply_routed_scaling_factor_on_output else None)


def _refuse_fused(num_fused_shared_experts: int) -> None:
    if num_fused_shared_experts:
        raise ValueError(
            f"num_fused_shared_experts is {num_fused_shared_experts}; upstream's CPU model never fuses them"
        )
