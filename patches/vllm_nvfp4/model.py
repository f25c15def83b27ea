"""DeepSeek-V4 for vLLM with the overlay's parts in place: the class that vLLM's registry finds, on CPU and on NVIDIA.

The model is upstream's, constructed by upstream; afterwards attention, shared experts and the loader are adapted. A
checkpoint that is not ours (DeepSeek's own FP8 and MXFP4 formats) passes through untouched, recorded as a fallback.
"""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.models.deepseek_v4 import DeepseekV4ForCausalLM as UpstreamModel

from vllm_nvfp4 import attention, selection, shared_expert
from vllm_nvfp4.loader import Loader, target_name
from vllm_nvfp4.mixin import Upstream
from vllm_nvfp4.quantization import METHOD_NAME, Nvfp4Config

FUSED_MODULES = {
    "gate_up_proj": ["w1", "w3"],
    "fused_wqa_wkv": ["wq_a", "wkv"],
    "fused_wkv_wgate": ["wkv", "wgate"],
}


class Nvfp4ModelMixin(Upstream):
    """What the overlay adds to an upstream DeepSeek-V4 class."""

    packed_modules_mapping = FUSED_MODULES
    nvfp4_config: Nvfp4Config | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not isinstance(vllm_config.quant_config, Nvfp4Config):
            reason = f"the checkpoint's quantization is {vllm_config.model_config.quantization}, not {METHOD_NAME}"
            selection.record("model", "model", "vLLM", fallback=True, reason=reason)
            return
        self.nvfp4_config = vllm_config.quant_config
        for layer in self.nvfp4_layers():
            attention.adapt(layer.attn, self.nvfp4_config)
            shared_expert.adapt(layer.ffn)

    def nvfp4_layers(self) -> list[Any]:
        """The decoder layers of this rank."""
        return [layer for layer in self.model.layers if not isinstance(layer, PPMissingLayer)]

    def nvfp4_target_name(self, canonical: str) -> str | None:
        """Where a canonical tensor goes; None if this model has no use for it."""
        return target_name(canonical, self.config.num_hidden_layers, is_mtp=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load any layout, failing closed (loader.py)."""
        if self.nvfp4_config is None:
            return super().load_weights(weights)
        # Upstream builds FP8 shared experts in whole blocks a rank, unless sequence parallelism keeps them whole.
        whole = getattr(self.model, "use_sequence_parallel", False)
        pad_fp8 = None if whole else getattr(self.model, "_pad_shared_expert_weight", None)
        loaded = Loader(self, self.config, self.nvfp4_config, pad_fp8=pad_fp8).load(weights)
        if getattr(self, "finalizes_weights_during_load", False):
            # Upstream's NVIDIA class derives tensors from loaded ones here and asserts on them in its first forward.
            super().process_weights_after_loading()
        return loaded

    def process_weights_after_loading(self) -> None:
        """Upstream's own step, then the runners that need more than one module's weights."""
        super().process_weights_after_loading()
        if self.nvfp4_config is None:
            return
        for layer in self.nvfp4_layers():
            attention.finish(layer.attn)
            shared_expert.finish(layer.ffn)


class DeepseekV4ForCausalLM(Nvfp4ModelMixin, UpstreamModel):
    """The platform's DeepSeek-V4 with the overlay."""
