"""The quantization configuration: which method loads and computes each module, decided from the checkpoint's tensors.

vLLM builds one instance in the front process, lets it look at the checkpoint (`maybe_update_config`), and pickles it to the
workers, which ask it for a method per layer. The hard part is that nothing may be decided from `ignore` lists or from the
declared algorithm: both are wrong for real exports (see inventory.py).
"""

import os
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_nvfp4 import checkpoint, env, names, selection
from vllm_nvfp4.config_fields import declares_nvfp4
from vllm_nvfp4.inventory import Format, Inventory, take_inventory

METHOD_NAME = "nvfp4_deepseek_v4"
# The draft model of speculative decoding is the same checkpoint under another model_type.
MODEL_TYPES = ("deepseek_v4", "deepseek_mtp")


def is_ours(quant_config: dict[str, Any] | None, model_type: str | None) -> bool:
    """True for ModelOpt NVFP4 exports of DeepSeek-V4, and for DeepSeek's FP8 format with NVFP4 experts."""
    return model_type in MODEL_TYPES and declares_nvfp4(quant_config)


@register_quantization_config(METHOD_NAME)
class Nvfp4Config(ModelOptNvFp4Config):
    """DeepSeek-V4 with some or all linears in NVFP4, per tensor."""

    def __init__(self, original: dict[str, Any]) -> None:
        super().__init__(is_checkpoint_nvfp4_serialized=True, group_size=16)
        self.original = original
        self.inventory: Inventory | None = None
        self.num_hidden_layers = 0
        # vLLM's NVIDIA loader pads FP8 shared experts when it sees this attribute.
        self.weight_block_size: list[int] | None = None

    def get_name(self) -> str:
        """The name under which vLLM knows this method."""
        return METHOD_NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Nvfp4Config":
        """Keep the checkpoint's own dictionary; decisions come from its tensors."""
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim the checkpoint before vLLM's own methods are asked, whatever --quantization says."""
        return METHOD_NAME if is_ours(hf_quant_cfg, getattr(hf_config, "model_type", None)) else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Nothing to map: there is no exclude list."""

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the checkpoint's headers and decide every module's format.

        Raises: CheckpointError and what inventory.take_inventory raises.
        """
        tensors = read_headers(model_name, revision)
        self.num_hidden_layers = hf_config.num_hidden_layers
        self.inventory = take_inventory(tensors, hf_config)
        if Format.FP8_BLOCK in self.inventory.formats.values():
            self.weight_block_size = [128, 128]

    def checkpoint_modules(self, prefix: str) -> tuple[str, ...]:
        """Canonical checkpoint modules that feed vLLM's module `prefix` (MTP layers carry layer numbers there)."""
        parts = prefix.split(".")
        if prefix.startswith("model.layers.") and int(parts[2]) >= self.num_hidden_layers:
            prefix = ".".join(["mtp", str(int(parts[2]) - self.num_hidden_layers), *parts[3:]]).replace(
                ".mtp_block", ""
            )
        return names.module_of(prefix)

    def format_of(self, prefix: str) -> Format:
        """The format of vLLM's module `prefix`.

        Raises: CheckpointError - the checkpoint does not have it, or mixes formats in it; RuntimeError - no checkpoint
            was read.
        """
        if self.inventory is None:
            raise RuntimeError(
                f"{METHOD_NAME}: the checkpoint's headers were never read; vLLM's start-up order changed"
            )
        return self.inventory.format_of(self.checkpoint_modules(prefix))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for one layer, by its format in the checkpoint."""
        if isinstance(layer, ParallelLMHead):
            return UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return None
        if isinstance(layer, RoutedExperts):
            return self._moe_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return self._linear_method(layer, prefix)
        return None

    def _linear_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase:
        from vllm_nvfp4 import fp8_block, linear, wo_a

        found = self.format_of(prefix)
        if prefix.endswith(".wo_a") and (found is Format.NVFP4 or env.flag(env.WO_A)):
            return wo_a.ModelOptNvFp4WoAMethod(self, prefix, stored=found)
        if found is Format.NVFP4:
            return linear.ModelOptNvFp4ShardedLinearMethod(self, prefix)
        if found is Format.FP8_BLOCK:
            return fp8_block.linear_method(self.original, layer, prefix)
        return UnquantizedLinearMethod()

    def _moe_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase:
        from vllm_nvfp4 import moe

        found = self.format_of(prefix.removesuffix(".routed_experts"))
        if found is Format.NVFP4:
            return moe.method_for(self, layer, prefix)
        if found is Format.HIGH:
            selection.record(
                prefix, "moe", "UnquantizedFusedMoEMethod", fallback=True, reason="experts are not quantized"
            )
            return UnquantizedFusedMoEMethod(layer.moe_config)
        raise checkpoint.CheckpointError(f"{prefix}: experts are {found}; this overlay serves experts in NVFP4")


def read_headers(model_name: str, revision: str | None) -> dict[str, checkpoint.Tensor]:
    """The headers of a local folder, of a cached Hub snapshot, or of a Hub repository, in this order.

    Raises: CheckpointError - as checkpoint.read_folder.
    """
    if os.path.isdir(model_name):
        return checkpoint.read_folder(Path(model_name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model_name, revision=revision, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return checkpoint.read_folder(folder)
    except LocalEntryNotFoundError:
        pass
    return checkpoint.read_hub(model_name, revision)


def stock_fp8_config(original: dict[str, Any]) -> Any:
    """vLLM's own FP8 configuration for DeepSeek-V4 on this platform, for the linears that are FP8."""
    return get_quantization_config("deepseek_v4_fp8").from_config({**original, "quant_method": "fp8"})
