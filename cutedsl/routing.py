"""From the router's choices to rows grouped by expert, and back.

The hard part is determinism without reading anything back to the host: the order of slots and the order in which an
output row is summed depend only on the choices, so that a result never depends on the batch around it, and shapes
depend only on the shapes given, so that the same code can run under a CUDA graph.

A *choice* is a place in the flattened (T, top_k) table; a *slot* is a place after sorting by expert.
"""

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Choices sorted by expert.

    Attributes:
        slot_token: (T * top_k,) int64 - token of a slot.
        slot_choice: (T * top_k,) int64 - choice of a slot, an index into the flattened topk_ids.
        expert_offset: (num_experts + 1,) int64 - expert e owns slots expert_offset[e] .. expert_offset[e + 1] - 1;
            slots from expert_offset[-1] on belong to no expert of this rank.
    """

    slot_token: torch.Tensor
    slot_choice: torch.Tensor
    expert_offset: torch.Tensor


def sort_by_expert(topk_ids: torch.Tensor, num_experts: int) -> Routing:
    """slot_choice = stable argsort of the experts' ids.

    Args:
        topk_ids: (T, top_k) int32 or int64 - expert of each choice; an id outside 0 .. num_experts - 1 (-1: an expert
            of another rank) is sorted behind the last offset.
        num_experts: experts on this rank.

    Returns:
        Routing; within an expert, slots keep the order of the choices.

    Raises:
        TypeError: ids are not int32 or int64.
        ValueError: topk_ids is not two-dimensional, or num_experts is below 1.

    Numerics: integers; deterministic. Nothing is read back to the host; graph-safe apart from its allocations.
    """
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sort_by_expert: topk_ids are {topk_ids.dtype}, expected torch.int32 or torch.int64")
    if topk_ids.ndim != 2:
        raise ValueError(f"sort_by_expert: topk_ids have shape {tuple(topk_ids.shape)}, expected (tokens, top_k)")
    if num_experts < 1:
        raise ValueError(f"sort_by_expert: num_experts is {num_experts}, expected at least 1")
    ids = topk_ids.flatten().long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sorted_ids, slot_choice = torch.sort(ids, stable=True)
    # The first slot of expert e is the number of ids below e: a search, where bincount would wait for the device.
    boundaries = torch.arange(num_experts + 1, device=ids.device, dtype=torch.int64)
    expert_offset = torch.searchsorted(sorted_ids, boundaries)
    return Routing(slot_choice // max(topk_ids.shape[1], 1), slot_choice, expert_offset)


def local_expert_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """local = expert_map[global], -1 staying -1.

    Args:
        topk_ids: (T, top_k) int32 or int64 - global ids, or -1.
        expert_map: (num_global_experts,) int32 or int64 - local id of each expert or -1; None: ids are local already.

    Returns:
        (T, top_k) - local ids, or -1 for an expert of another rank.

    Raises:
        IndexError: (on CPU) an id is not below num_global_experts.

    Numerics: integers. Graph-safe apart from its allocations.
    """
    if expert_map is None:
        return topk_ids
    # -1 as an index would mean the last expert.
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0).long()])


def reduce_slots(y: torch.Tensor, routing: Routing, topk_weights: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over j of topk_weights[t, j] * y[slot of choice (t, j)].

    Args:
        y: (T * top_k, N) fp32 - expert outputs by slot; rows of slots that belong to no expert may hold anything.
        routing: from sort_by_expert.
        topk_weights: (T, top_k) fp32.

    Returns:
        (T, N) fp32 - zero for a token without an expert on this rank.

    Raises:
        TypeError: y or topk_weights are not fp32.
        ValueError: their shapes do not belong together.

    Numerics: product and sum in fp32, in the order of the choices j = 0, 1, ...: deterministic and independent of the
    other tokens. Nothing is read back to the host; graph-safe apart from its allocations.
    """
    if y.dtype != torch.float32 or topk_weights.dtype != torch.float32:
        raise TypeError(f"reduce_slots: y is {y.dtype} and topk_weights {topk_weights.dtype}, expected torch.float32")
    num_slots = routing.slot_choice.numel()
    if y.ndim != 2 or topk_weights.ndim != 2 or y.shape[0] != num_slots or topk_weights.numel() != num_slots:
        raise ValueError(
            f"reduce_slots: y has shape {tuple(y.shape)} and topk_weights {tuple(topk_weights.shape)} for {num_slots} "
            "slots; expected (T * top_k, N) and (T, top_k) of the call that made the routing"
        )
    slots = torch.arange(num_slots, device=y.device, dtype=torch.int64)
    slot_of_choice = torch.empty_like(slots).scatter_(0, routing.slot_choice, slots).view(topk_weights.shape)
    out = y.new_zeros(topk_weights.shape[0], y.shape[1])
    for choice in range(topk_weights.shape[1]):
        slot = slot_of_choice[:, choice]
        term = y[slot] * topk_weights[:, choice, None]
        # Selected, not multiplied by 0: a row that nobody wrote may be NaN.
        out += torch.where((slot < routing.expert_offset[-1]).unsqueeze(1), term, 0.0)
    return out
