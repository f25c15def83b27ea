"""NVFP4 linears in vLLM: the method that loads them, and the kernel class that hands them to a cutedsl runner.

The hard part is fused modules (wq_a + wkv, wkv + wgate, w1 + w3): each shard keeps its own `weight_scale_2` and
`input_scale`. vLLM's method takes their maximum without rescaling the codes, which is wrong by the ratio; ours hands the
vectors to the runner, and refuses where only a stock kernel with one scale could serve.
"""

from contextvars import ContextVar
from typing import Any

import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_NVFP4_KERNELS
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.modelopt import ModelOptLinearMethod, resolve
from vllm.platforms import PlatformEnum

from cutedsl.ops.linear import linear as linear_op
from cutedsl.runners.linear import LinearRunner
from vllm_nvfp4 import dump, platform, selection
from vllm_nvfp4.scales import check_scales

NAN = float("nan")
# The kernel class is the first that vLLM asks for any NVFP4 linear, of any model; it serves those of our method only.
_for_our_method: ContextVar[bool] = ContextVar("nvfp4_for_our_method", default=False)


class Nvfp4RunnerLinearKernel(NvFp4LinearKernel):
    """A linear computed by cutedsl's LinearRunner: packed weights stay as loaded, viewed and never copied."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Supported for our own method, where cutedsl serves."""
        if not _for_our_method.get():
            return False, "it serves DeepSeek-V4 only"
        return platform.backend() is not None, platform.unavailable_reason()

    @classmethod
    def can_implement(cls, config: NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        """Any NVFP4 linear."""
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Build the runner, but for linears that get one together (shared_expert.py, shared_input.py)."""
        if ".shared_experts." not in layer.prefix and not getattr(layer, "nvfp4_is_joined", False):
            self.build_runner(layer)

    def build_runner(self, layer: torch.nn.Module) -> None:
        """Build the runner on the layer's own tensors, which mean nothing to any other runner from then on."""
        backend = platform.backend()
        assert backend is not None  # is_supported was asked before this class was chosen
        layer.nvfp4_runner = LinearRunner(
            layer.prefix,
            layer.weight.data,
            layer.weight_scale.data,
            layer.weight_scale_2.data,
            layer.input_scale.data,
            layer.logical_widths,
            backend=backend,
            activations=platform.activations(),
        )
        dump.watch(layer.nvfp4_runner)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x @ W.T, for x of any leading shape."""
        out = linear_op(x.reshape(-1, x.shape[-1]), layer.nvfp4_runner.runner_id)
        out = out.reshape(*x.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias


@register_weight_loader_v2_supported_method
class ModelOptNvFp4ShardedLinearMethod(ModelOptLinearMethod):
    """Loads an NVFP4 linear with one pair of global scales a shard; every scale starts as NaN.

    The class name starts with `ModelOpt` because vLLM's loaders look at class names.
    """

    def __init__(self, config: Any, prefix: str) -> None:
        spec, ctx, fmt = resolve("NVFP4", config, prefix)
        super().__init__(spec, ctx, fmt)
        self.prefix = prefix

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """vLLM's parameters, with NaN in place of uninitialised memory in every scale."""
        token = _for_our_method.set(True)
        try:
            super().create_weights(layer, *args, **kwargs)
        finally:
            _for_our_method.reset(token)
        for leaf in ("weight_scale_2", "input_scale"):
            getattr(layer, leaf).data.fill_(NAN)
        own = isinstance(self.kernel, Nvfp4RunnerLinearKernel)
        selection.record(
            self.prefix,
            "linear",
            f"cutedsl {platform.backend()}" if own else type(self.kernel).__name__,
            fallback=not own,
            # Where cutedsl has a backend its kernel is first in line, so only vLLM's own switches can pass it by.
            reason="" if own else platform.unavailable_reason() or "--linear-backend or VLLM_DISABLED_KERNELS",
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check every scale, then build the runner, or let the stock kernel take over.

        Raises: CheckpointError - a scale is missing, NaN, infinite, zero or negative; ValueError - a stock kernel would
            have to merge the shards' different scales.
        """
        check_scales(
            self.prefix, layer.weight_scale, weight_scale_2=layer.weight_scale_2, input_scale=layer.input_scale
        )
        if isinstance(self.kernel, Nvfp4RunnerLinearKernel):
            self.kernel.process_weights_after_loading(layer)
            return
        for leaf in ("weight_scale_2", "input_scale"):
            values = getattr(layer, leaf)
            if not bool((values == values[0]).all()):
                raise ValueError(
                    f"{self.prefix}: the shards' {leaf} differ ({values.tolist()}), and the stock kernel "
                    f"{type(self.kernel).__name__} takes one number for all of them, which would be wrong by their "
                    "ratio. Export the checkpoint with equal scales in fused modules (ModelOpt 0.47 does)"
                )
        super().process_weights_after_loading(layer)


def register() -> None:
    """Put our kernel class first for CPU and CUDA: registering at the end would mean never being chosen."""
    for target in (PlatformEnum.CPU, PlatformEnum.CUDA):
        kernels = _POSSIBLE_NVFP4_KERNELS.setdefault(target, [])
        if Nvfp4RunnerLinearKernel not in kernels:
            kernels.insert(0, Nvfp4RunnerLinearKernel)
