"""DeepSeek-V4's `config.json`, as ModelOpt exports it (transformers' spelling) or as DeepSeek publishes it, for vLLM.

vLLM's own class rejects transformers' spelling (`mlp_layer_types` holds values its validator does not know), and vLLM's
model code reads fields that spelling lacks. This class accepts both and derives the one from the other; a contradiction
between the two is an error, not a choice.
"""

from typing import Any

from vllm.transformers_utils.configs.deepseek_v4 import DeepseekV4Config as UpstreamConfig

from vllm_nvfp4.config_fields import compress_ratios, normalised, num_hash_layers, rope_thetas

__all__ = ["DeepseekV4Config", "compress_ratios", "num_hash_layers", "rope_thetas"]


class DeepseekV4Config(UpstreamConfig):
    """vLLM's DeepSeek-V4 configuration that also accepts what transformers and ModelOpt write."""

    model_type = "deepseek_v4"

    def __init__(self, **kwargs: Any) -> None:
        kwargs = normalised(kwargs)
        quantization = kwargs.get("quantization_config") or {}
        if str(quantization.get("quant_method", "")).startswith("modelopt"):
            # Keeps vLLM off its MXFP4 paths; checkpoints in DeepSeek's own FP8 format must keep saying "fp4".
            kwargs.setdefault("expert_dtype", "nvfp4")
        super().__init__(**kwargs)
