"""Runner of NVFP4 routed experts of one layer on one rank.

The hard part is that all experts are stacked into one tensor for the kernels while every expert keeps its own scales;
the matrices of single experts are views of the stack, so nothing is held twice.
"""

from collections.abc import Callable
from typing import Any

import torch

from cutedsl.formats import NVFP4
from cutedsl.ops import registry
from cutedsl.reference import moe as reference
from cutedsl.reference.linear import PackedMatrix
from cutedsl.routing import local_expert_ids
from cutedsl.runners import (
    check_activations,
    check_packed,
    check_scale,
    check_swiglu_limit,
    import_chains,
    pack_matrix,
    select_backend,
)


class MoeRunner:
    """y[t] = bf16(sum over j of topk_weights[t, j] * expert[topk_ids[t, j]](x[t])) for one layer.

    Args:
        name: of the layer, used in every message.
        w13_weight: (E, 2I, H/2) uint8, contiguous - rows 0 .. I - 1 are w1 (gate), the rest w3 (up).
        w13_weight_scale: (E, 2I, H/16) e4m3, contiguous.
        w13_weight_scale_2: (E, 2) fp32 - of w1 and of w3, finite and positive.
        w13_input_scale: (E, 2) fp32 - of w1 and of w3, finite and positive.
        w2_weight: (E, H, I/2) uint8, contiguous; I on this rank a multiple of 16.
        w2_weight_scale: (E, H, I/16) e4m3, contiguous.
        w2_weight_scale_2: (E,) fp32.
        w2_input_scale: (E,) fp32.
        swiglu_limit: finite and positive, or None for no clamp.
        expert_map: (num_global_experts,) int32 or int64 - local id or -1 of a global id; None if ids are local.
        apply_router_weight_on_input: must be False.
        backend: a key of BACKENDS. sm100 and sm90 prepare the weights in place (`cutedsl.prepare`, `cutedsl.prepare_sm90`):
            nothing else can use them any more.
        activations: "nvfp4": quantized with input scales, before both GEMMs; "bf16": as they are, and h rounded to BF16.
            sm100 has nvfp4 only.

    Attributes:
        runner_id: what the op takes; the registry keeps the runner alive.
        in_features, out_features: both H.
        device: of the weights.
        num_experts: E, on this rank.
        num_global_experts: bound of the ids the op takes.
        experts: gate_up and down of each expert, views of the stacks; backend reference only.
        activations: as given.
        chain: of kernels, with its workspace; backends sm100 and sm90 only.

    Raises:
        TypeError: a type is wrong.
        ValueError: a shape, device or value is wrong, the backend is unknown or cannot compute this layer, or the
            router's weight is to be applied to the input.

    Numerics: as reference.moe; the order of sums is the backend's, and sm100 and sm90 round each expert's output to
    BF16. Construction reads scales back to the host.
    """

    experts: tuple[tuple[PackedMatrix, PackedMatrix], ...]
    chain: Any

    def __init__(
        self,
        name: str,
        w13_weight: torch.Tensor,
        w13_weight_scale: torch.Tensor,
        w13_weight_scale_2: torch.Tensor,
        w13_input_scale: torch.Tensor,
        w2_weight: torch.Tensor,
        w2_weight_scale: torch.Tensor,
        w2_weight_scale_2: torch.Tensor,
        w2_input_scale: torch.Tensor,
        swiglu_limit: float | None,
        expert_map: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        backend: str = "reference",
        activations: str = NVFP4.name,
    ) -> None:
        self.name = name
        self.backend = backend
        make_forward = select_backend(name, backend, BACKENDS)
        self.activations = check_activations(name, activations, backend)
        self.swiglu_limit = check_swiglu_limit(name, swiglu_limit)
        if apply_router_weight_on_input:
            raise ValueError(f"{name}: apply_router_weight_on_input is not supported; weights multiply expert outputs")
        self._set_sizes(w13_weight, w13_weight_scale, w2_weight, w2_weight_scale)
        self.expert_map = self._checked_map(expert_map)
        self.num_global_experts = self.num_experts if expert_map is None else expert_map.numel()
        e = self.num_experts
        self.w13_weight_scale_2 = check_scale(name, "w13 weight_scale_2", w13_weight_scale_2, (e, 2), self.device)
        self.w13_input_scale = check_scale(name, "w13 input_scale", w13_input_scale, (e, 2), self.device)
        self.w2_weight_scale_2 = check_scale(name, "w2 weight_scale_2", w2_weight_scale_2, (e,), self.device)
        self.w2_input_scale = check_scale(name, "w2 input_scale", w2_input_scale, (e,), self.device)
        self.w13_weight, self.w13_weight_scale = w13_weight, w13_weight_scale
        self.w2_weight, self.w2_weight_scale = w2_weight, w2_weight_scale
        self._forward = make_forward(self)
        self.runner_id = registry.register(self, "moe")

    def _set_sizes(self, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """Checks the stacks against each other and sets the sizes that follow from them."""
        if w13.ndim != 3 or w13.shape[1] % 2:
            raise ValueError(f"{self.name}: w13 weight has shape {tuple(w13.shape)}, expected (experts, 2I, H/2)")
        self.device = w13.device
        self.num_experts, two_i = w13.shape[:2]
        hidden = check_packed(self.name, "w13", w13, w13_scale, (self.num_experts, two_i))
        intermediate = check_packed(self.name, "w2", w2, w2_scale, (self.num_experts, hidden))
        if w2.device != self.device:
            raise ValueError(f"{self.name}: w13 is on {self.device}, w2 on {w2.device}; move one of them")
        if intermediate != two_i // 2:
            raise ValueError(f"{self.name}: w2 has K = {intermediate}, expected {two_i // 2}, half the rows of w13")
        self.in_features = self.out_features = hidden

    def _checked_map(self, expert_map: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the map from global to local expert ids, checked."""
        if expert_map is None:
            return None
        if expert_map.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{self.name}: expert_map is {expert_map.dtype}, expected torch.int32 or torch.int64")
        if expert_map.ndim != 1 or expert_map.device != self.device:
            raise ValueError(
                f"{self.name}: expert_map has shape {tuple(expert_map.shape)} on {expert_map.device}, "
                f"expected (num_global_experts,) on {self.device}"
            )
        local = sorted(i for i in expert_map.tolist() if i != -1)
        if local != list(range(self.num_experts)):
            raise ValueError(
                f"{self.name}: expert_map names the local experts {local}, expected each of 0 .. "
                f"{self.num_experts - 1} once, and -1 elsewhere"
            )
        return expert_map

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Runs the layer: x (T, H), topk_weights and topk_ids (T, top_k), checked by the op -> (T, H) bfloat16."""
        return self._forward(self, x, topk_weights, topk_ids)


Forward = Callable[[MoeRunner, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _reference(runner: MoeRunner) -> Forward:
    rows = runner.w13_weight.shape[1] // 2
    w13 = zip(
        runner.w13_weight, runner.w13_weight_scale, runner.w13_weight_scale_2, runner.w13_input_scale, strict=True
    )
    w2_scales = runner.w2_weight_scale_2.split(1), runner.w2_input_scale.split(1)
    w2 = zip(runner.w2_weight, runner.w2_weight_scale, *w2_scales, strict=True)
    runner.experts = tuple(
        (
            pack_matrix(*gate_up, (rows, rows), runner.activations),
            pack_matrix(*down, (runner.out_features,), runner.activations),
        )
        for gate_up, down in zip(w13, w2, strict=True)
    )
    return _reference_forward


def _reference_forward(
    runner: MoeRunner, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    if topk_ids.numel() and int(topk_ids.max()) >= runner.num_global_experts:
        raise ValueError(
            f"{runner.name}: the largest expert id is {int(topk_ids.max())}, expected ids below "
            f"{runner.num_global_experts} (or -1)"
        )
    local_ids = local_expert_ids(topk_ids, runner.expert_map)
    return reference.moe(x, topk_weights, local_ids, runner.experts, runner.swiglu_limit)


def _sm100(runner: MoeRunner) -> Forward:
    return _chained(runner, import_chains(runner.name, "sm100").MoeChain(runner.name, *_parts(runner)))


def _sm90(runner: MoeRunner) -> Forward:
    chains = import_chains(runner.name, "sm90")
    return _chained(runner, chains.MoeChain(runner.name, *_parts(runner), runner.activations))


def _parts(runner: MoeRunner) -> tuple[Any, ...]:
    """What a chain is made of, in its order."""
    return (
        runner.w13_weight,
        runner.w13_weight_scale,
        runner.w13_weight_scale_2,
        runner.w13_input_scale,
        runner.w2_weight,
        runner.w2_weight_scale,
        runner.w2_weight_scale_2,
        runner.w2_input_scale,
        runner.expert_map,
        runner.swiglu_limit,
    )


def _chained(runner: MoeRunner, chain: Any) -> Forward:
    runner.chain = chain
    # What was prepared in place is no matrix for others, and what was replaced should not be kept.
    del runner.w13_weight, runner.w13_weight_scale, runner.w2_weight, runner.w2_weight_scale
    return lambda runner, x, topk_weights, topk_ids: runner.chain(x, topk_weights, topk_ids)


BACKENDS: dict[str, Callable[[MoeRunner], Forward]] = {"reference": _reference, "sm100": _sm100, "sm90": _sm90}
