"""Runner of NVFP4 wo_a: inverse rotary embedding and the block-diagonal grouped linear after attention.

The hard part is that all sizes of the grouped linear follow from the weight and the number of groups, and a wrong
number of groups gives shapes that still multiply: heads per group must come out whole.
"""

from collections.abc import Callable
from typing import Any

import torch

from cutedsl.formats import NVFP4
from cutedsl.ops import registry
from cutedsl.reference import wo_a as reference
from cutedsl.runners import (
    check_activations,
    check_packed,
    check_scale,
    import_chains,
    pack_matrix,
    select_backend,
)


class WoARunner:
    """y[t, g] = bf16(alpha * (Q(inverse_rope(o)[t, g]) @ W[g]^T)) for one layer; without Q if activations are "bf16".

    Args:
        name: of the layer, used in every message.
        weight: (G * R, D/2) uint8, contiguous - rows of group g at g * R; D = heads per group * head_dim.
        weight_scale: (G * R, D/16) e4m3, contiguous.
        weight_scale_2: () or (1,) fp32, finite and positive.
        input_scale: () or (1,) fp32, finite and positive.
        num_groups: G, on this rank.
        head_dim: elements of a head; divides D.
        rope_dim: rotated elements at the end of a head; even, at most head_dim.
        backend: a key of BACKENDS. sm100 and sm90 prepare the weight in place (`cutedsl.prepare`, `cutedsl.prepare_sm90`):
            nothing else can use it any more.
        activations: "nvfp4": quantized with input_scale; "bf16": as they are. sm100 has nvfp4 only.

    Attributes:
        runner_id: what the op takes; the registry keeps the runner alive.
        num_heads: heads on this rank, G * D / head_dim.
        out_features: G * R.
        device: of the weight.
        matrix: the weight with alpha (G * R,); backend reference only.
        activations: as given.
        chain: of kernels, with its workspace; backends sm100 and sm90 only.

    Raises:
        TypeError: a type is wrong.
        ValueError: a shape, device or value is wrong, the backend is unknown, or cannot compute this layer.

    Numerics: as reference.wo_a; the order of sums is the backend's. Construction reads scales back to the
    host; a call does not.
    """

    chain: Any

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_scale_2: torch.Tensor,
        input_scale: torch.Tensor,
        num_groups: int,
        head_dim: int,
        rope_dim: int,
        backend: str = "reference",
        activations: str = NVFP4.name,
    ) -> None:
        self.name = name
        self.backend = backend
        make_forward = select_backend(name, backend, BACKENDS)
        self.activations = check_activations(name, activations, backend)
        self.out_features = weight.shape[0]
        d_in = check_packed(name, "wo_a", weight, weight_scale, (self.out_features,))
        if num_groups < 1 or self.out_features % num_groups:
            raise ValueError(f"{name}: {self.out_features} rows do not divide into num_groups = {num_groups}")
        if head_dim < 1 or d_in % head_dim:
            raise ValueError(f"{name}: K = {d_in} is not a whole number of heads of head_dim = {head_dim}")
        if rope_dim < 2 or rope_dim % 2 or rope_dim > head_dim:
            raise ValueError(f"{name}: rope_dim is {rope_dim}, expected an even number from 2 to head_dim = {head_dim}")
        self.num_groups, self.head_dim, self.rope_dim = num_groups, head_dim, rope_dim
        self.num_heads = num_groups * d_in // head_dim
        self.device = weight.device
        self.weight_scale_2 = check_scale(name, "weight_scale_2", weight_scale_2, (1,), self.device)
        self.input_scale = check_scale(name, "input_scale", input_scale, (1,), self.device)
        scales = self.weight_scale_2, self.input_scale
        self.matrix = pack_matrix(weight, weight_scale, *scales, (self.out_features,), activations)
        self._forward = make_forward(self)
        self.runner_id = registry.register(self, "wo_a")

    def __call__(self, o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> torch.Tensor:
        """Runs the layer: o (T, num_heads, head_dim) bfloat16 -> (T, G * R) bfloat16. The op has checked its input."""
        return self._forward(self, o, positions, cos_sin_cache)


Forward = Callable[[WoARunner, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _reference(runner: WoARunner) -> Forward:
    def forward(
        runner: WoARunner, o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor
    ) -> torch.Tensor:
        return reference.wo_a(o, positions, cos_sin_cache, runner.matrix, runner.num_groups, runner.rope_dim)

    return forward


def _chain(runner: WoARunner) -> Forward:
    sizes = runner.num_groups, runner.head_dim, runner.rope_dim
    runner.chain = import_chains(runner.name, runner.backend).WoAChain(
        runner.name, runner.matrix, runner.weight_scale_2, runner.input_scale, *sizes
    )
    # What was prepared in place is no matrix for others, and what was replaced should not be kept.
    del runner.matrix
    return lambda runner, o, positions, cos_sin_cache: runner.chain(o, positions, cos_sin_cache)


BACKENDS: dict[str, Callable[[WoARunner], Forward]] = {"reference": _reference, "sm100": _chain, "sm90": _chain}
