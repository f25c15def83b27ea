"""NVFP4 routed experts: each token's choices through their experts, weighted and summed in FP32.

The hard part is that every expert has its own four tensor scales and each is used exactly: a token sent to six experts
is quantized six times (or more, where gate and up were calibrated apart).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from cutedsl.reference.linear import PackedMatrix
from cutedsl.reference.shared_expert import expert_fp32
from cutedsl.routing import reduce_slots, sort_by_expert


def moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    experts: Sequence[tuple[PackedMatrix, PackedMatrix]],
    limit: float | None,
) -> torch.Tensor:
    """y[t] = bf16(sum over j of topk_weights[t, j] * expert[topk_ids[t, j]](x[t])).

    Args:
        x: (T, H) bfloat16.
        topk_weights: (T, top_k) fp32.
        topk_ids: (T, top_k) int32 or int64 - local expert ids; -1 for an expert of another rank.
        experts: gate_up and down of each local expert.
        limit: of swiglu.

    Returns:
        (T, H) bfloat16 - zero for a token without a local expert.

    Raises:
        ValueError: an id is not below the number of experts.

    Numerics: experts as expert_fp32; weights and sums in fp32, in the order of the choices; one rounding at the end.
    Only experts that have tokens are decoded, so the offsets are read back to the host: not graph-safe.
    """
    if topk_ids.numel() and int(topk_ids.max()) >= len(experts):
        raise ValueError(
            f"moe: the largest expert id is {int(topk_ids.max())} but there are {len(experts)} experts here; "
            "pass an expert_map if ids are global"
        )
    routing = sort_by_expert(topk_ids, len(experts))
    y = torch.empty(topk_ids.numel(), x.shape[1], dtype=torch.float32, device=x.device)
    offsets = routing.expert_offset.tolist()
    for expert, (start, end) in enumerate(pairwise(offsets)):
        if start < end:
            gate_up, down = experts[expert]
            y[start:end] = expert_fp32(x[routing.slot_token[start:end]], gate_up, down, limit)
    return reduce_slots(y, routing, topk_weights).to(torch.bfloat16)
