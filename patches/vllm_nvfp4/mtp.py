"""The MTP draft model on NVIDIA with the overlay's parts; upstream has none for CPUs.

Not verified on hardware: constructed and loaded on a CPU only (tests/cpu/test_nvidia_classes.py).
"""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.models.deepseek_v4 import DeepSeekV4MTP as UpstreamMTP

from vllm_nvfp4 import attention, shared_expert
from vllm_nvfp4.loader import Loader, target_name
from vllm_nvfp4.mixin import Upstream
from vllm_nvfp4.quantization import Nvfp4Config


class Nvfp4MTPMixin(Upstream):
    """What the overlay adds to an upstream MTP class."""

    nvfp4_config: Nvfp4Config | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not isinstance(vllm_config.quant_config, Nvfp4Config):
            return
        self.nvfp4_config = vllm_config.quant_config
        for layer in self.nvfp4_layers():
            attention.adapt(layer.attn, self.nvfp4_config)
            shared_expert.adapt(layer.ffn)

    def nvfp4_layers(self) -> list[Any]:
        """The draft's decoder blocks."""
        return [layer.mtp_block for layer in self.model.layers.values()]

    def nvfp4_target_name(self, canonical: str) -> str | None:
        """Only MTP tensors belong here."""
        return target_name(canonical, self.config.num_hidden_layers, is_mtp=True)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Nothing is skipped by file: `nvfp4_target_name` decides by tensor, for any layout."""
        return False if self.nvfp4_config is not None else super().is_unused_checkpoint_weight(name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load any layout, failing closed."""
        if self.nvfp4_config is None:
            return super().load_weights(weights)
        # Only here: the module is part of every vLLM, but of no use where the MTP class is a stub.
        from vllm.models.deepseek_v4.nvidia.model import DeepseekV4Model

        pad_fp8 = DeepseekV4Model._pad_shared_expert_weight if self.pad_shared_expert else None
        loaded = Loader(self, self.config, self.nvfp4_config, is_mtp=True, pad_fp8=pad_fp8).load(weights)
        # Upstream's own load_weights ends with this.
        super().process_weights_after_loading()
        return loaded

    def process_weights_after_loading(self) -> None:
        """The runners that need more than one module's weights."""
        super().process_weights_after_loading()
        if self.nvfp4_config is None:
            return
        for layer in self.nvfp4_layers():
            attention.finish(layer.attn)
            shared_expert.finish(layer.ffn)


class DeepSeekV4MTP(Nvfp4MTPMixin, UpstreamMTP):
    """The platform's MTP draft with the overlay."""
