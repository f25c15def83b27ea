"""Runner of an NVFP4 shared expert: gate_up, SwiGLU and down as one operator.

The hard part is that gate and up are two shards with their own scales, and that down's input_scale belongs to the
FP32 output of SwiGLU, which never exists as a BF16 tensor unless activations stay BF16.
"""

from collections.abc import Callable
from typing import Any

import torch

from cutedsl.formats import NVFP4
from cutedsl.ops import registry
from cutedsl.reference import shared_expert as reference
from cutedsl.runners import (
    check_activations,
    check_packed,
    check_scale,
    check_swiglu_limit,
    import_chains,
    pack_matrix,
    select_backend,
)


class SharedExpertRunner:
    """y = bf16(down(swiglu(gate_up(x)))) for one layer.

    Args:
        name: of the layer, used in every message.
        gate_up_weight: (2I, H/2) uint8, contiguous - gate rows, then up rows.
        gate_up_weight_scale: (2I, H/16) e4m3, contiguous.
        gate_up_weight_scale_2: (2,) fp32 - of gate and of up, finite and positive.
        gate_up_input_scale: (2,) fp32 - of gate and of up, finite and positive.
        down_weight: (H, I/2) uint8, contiguous; I on this rank a multiple of 16.
        down_weight_scale: (H, I/16) e4m3, contiguous.
        down_weight_scale_2: () or (1,) fp32.
        down_input_scale: () or (1,) fp32.
        swiglu_limit: finite and positive, or None for no clamp.
        backend: a key of BACKENDS. sm100 and sm90 prepare the weights in place (`cutedsl.prepare`, `cutedsl.prepare_sm90`):
            nothing else can use them any more.
        activations: "nvfp4": quantized with input scales, before both GEMMs; "bf16": as they are, and h rounded to BF16.
            sm100 has nvfp4 only.

    Attributes:
        runner_id: what the op takes; the registry keeps the runner alive.
        in_features, out_features: both H.
        device: of the weights.
        gate_up, down: the matrices with their alphas; backend reference only.
        activations: as given.
        chain: of kernels, with its workspace; backends sm100 and sm90 only.

    Raises:
        TypeError: a type is wrong.
        ValueError: a shape, device or value is wrong, the backend is unknown, or cannot compute this layer.

    Numerics: as reference.shared_expert; the order of sums is the backend's. Construction reads scales back to the
    host; a call does not.
    """

    chain: Any

    def __init__(
        self,
        name: str,
        gate_up_weight: torch.Tensor,
        gate_up_weight_scale: torch.Tensor,
        gate_up_weight_scale_2: torch.Tensor,
        gate_up_input_scale: torch.Tensor,
        down_weight: torch.Tensor,
        down_weight_scale: torch.Tensor,
        down_weight_scale_2: torch.Tensor,
        down_input_scale: torch.Tensor,
        swiglu_limit: float | None,
        backend: str = "reference",
        activations: str = NVFP4.name,
    ) -> None:
        self.name = name
        self.backend = backend
        make_forward = select_backend(name, backend, BACKENDS)
        self.activations = check_activations(name, activations, backend)
        self.swiglu_limit = check_swiglu_limit(name, swiglu_limit)
        rows = gate_up_weight.shape[0]
        if rows % 2:
            raise ValueError(f"{name}: gate_up weight has {rows} rows, expected an even number (gate, then up)")
        self.device = gate_up_weight.device
        hidden = check_packed(name, "gate_up", gate_up_weight, gate_up_weight_scale, (rows,))
        intermediate = check_packed(name, "down", down_weight, down_weight_scale, (hidden,))
        if down_weight.device != self.device:
            raise ValueError(f"{name}: gate_up is on {self.device}, down on {down_weight.device}; move one of them")
        if intermediate != rows // 2:
            raise ValueError(f"{name}: down has K = {intermediate}, expected {rows // 2}, half the rows of gate_up")
        self.in_features = self.out_features = hidden
        self.gate_up_weight_scale_2 = check_scale(
            name, "gate_up weight_scale_2", gate_up_weight_scale_2, (2,), self.device
        )
        self.gate_up_input_scale = check_scale(name, "gate_up input_scale", gate_up_input_scale, (2,), self.device)
        self.gate_up = pack_matrix(
            gate_up_weight,
            gate_up_weight_scale,
            self.gate_up_weight_scale_2,
            self.gate_up_input_scale,
            (intermediate, intermediate),
            activations,
        )
        self.down = pack_matrix(
            down_weight,
            down_weight_scale,
            check_scale(name, "down weight_scale_2", down_weight_scale_2, (1,), self.device),
            check_scale(name, "down input_scale", down_input_scale, (1,), self.device),
            (hidden,),
            activations,
        )
        self._forward = make_forward(self)
        self.runner_id = registry.register(self, "shared_expert")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the layer: x (M, H) bfloat16 -> (M, H) bfloat16. The op has checked x."""
        return self._forward(self, x)


Forward = Callable[[SharedExpertRunner, torch.Tensor], torch.Tensor]


def _reference(runner: SharedExpertRunner) -> Forward:
    return lambda runner, x: reference.shared_expert(x, runner.gate_up, runner.down, runner.swiglu_limit)


def _chain(runner: SharedExpertRunner) -> Forward:
    scales = runner.gate_up_weight_scale_2, runner.gate_up_input_scale
    runner.chain = import_chains(runner.name, runner.backend).SharedExpertChain(
        runner.name, runner.gate_up, runner.down, *scales, runner.swiglu_limit
    )
    # What was prepared in place is no matrix for others, and what was replaced should not be kept.
    del runner.gate_up, runner.down
    return lambda runner, x: runner.chain(x)


BACKENDS: dict[str, Callable[[SharedExpertRunner], Forward]] = {
    "reference": _reference,
    "sm100": _chain,
    "sm90": _chain,
}
