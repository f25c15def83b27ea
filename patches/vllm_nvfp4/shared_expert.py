"""The shared expert as one op: L1, SwiGLU with the gate clamped before SiLU, L2, with nothing rounded to BF16 between."""

from typing import Any

import torch

from cutedsl.ops.shared_expert import shared_expert as shared_expert_op
from cutedsl.runners.shared_expert import SharedExpertRunner
from vllm_nvfp4 import dump, platform, selection
from vllm_nvfp4.linear import Nvfp4RunnerLinearKernel
from vllm_nvfp4.mixin import Upstream, in_front_of


class Nvfp4SharedExpertMixin(Upstream):
    """Replaces the three steps of an upstream MLP by one op, once the runner exists."""

    nvfp4_runner: SharedExpertRunner | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """down(silu(min(gate, limit)) * clamp(up)); the sum over tensor-parallel ranks is the caller's, as upstream."""
        if self.nvfp4_runner is None:
            return super().forward(x)
        out = shared_expert_op(x.reshape(-1, x.shape[-1]), self.nvfp4_runner.runner_id)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def adapt(ffn: Any) -> None:
    """Put the mixin in front of the layer's shared expert, if it has one."""
    if ffn.shared_experts is not None:
        ffn.shared_experts.__class__ = in_front_of(Nvfp4SharedExpertMixin, type(ffn.shared_experts))


def finish(ffn: Any) -> None:
    """After the load: build the runner where both linears are ours; else upstream's forward stays, on a runner each."""
    mlp = ffn.shared_experts
    if mlp is None:
        return
    up, down = mlp.gate_up_proj, mlp.down_proj
    prefix = up.prefix.removesuffix(".gate_up_proj")
    ours = [m for m in (up, down) if isinstance(getattr(m.quant_method, "kernel", None), Nvfp4RunnerLinearKernel)]
    if len(ours) < 2:
        for linear in ours:
            linear.quant_method.kernel.build_runner(linear)
        return  # the two linears were recorded one by one, with their reasons
    if mlp.down_proj.reduce_results:
        raise RuntimeError(f"{prefix}: upstream reduces inside the shared expert; vLLM's call order changed")
    backend = platform.backend()
    assert backend is not None  # both linears have our kernel, which needs one
    mlp.nvfp4_runner = SharedExpertRunner(
        prefix,
        up.weight.data,
        up.weight_scale.data,
        up.weight_scale_2.data,
        up.input_scale.data,
        down.weight.data,
        down.weight_scale.data,
        down.weight_scale_2.data,
        down.input_scale.data,
        swiglu_limit=ffn.swiglu_limit,
        backend=backend,
        activations=platform.activations(),
    )
    selection.record(prefix, "shared_expert", f"cutedsl {backend}")
    dump.watch(mlp.nvfp4_runner)
