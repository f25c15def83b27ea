"""Everything the overlay registers with vLLM, in one list; imports vLLM, so only `register()` may import this module."""

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.platforms import current_platform
from vllm.transformers_utils.config import _CONFIG_REGISTRY

# Imported for their registrations: the quantization method and the load format.
from vllm_nvfp4 import linear, model_loader, quantization  # noqa: F401
from vllm_nvfp4.config import DeepseekV4Config
from vllm_nvfp4.verification import Nvfp4ModelChecks

ARCHITECTURE = "DeepseekV4ForCausalLM"


def register_all() -> None:
    """Configuration, checks, models, kernels and, on a CPU, the gaps of vLLM's CPU path; safe to call again."""
    _CONFIG_REGISTRY["deepseek_v4"] = DeepseekV4Config
    MODELS_CONFIG_MAP[ARCHITECTURE] = Nvfp4ModelChecks
    # As text: vLLM imports the model where it is needed, not here.
    ModelRegistry.register_model(ARCHITECTURE, "vllm_nvfp4.model:DeepseekV4ForCausalLM")
    linear.register()
    if current_platform.is_cpu():
        # Imported here: on a GPU these would pull in the model's whole package, in every process.
        from vllm_nvfp4 import cpu_gaps, cpu_kernels, fp8_block

        fp8_block.register()
        cpu_gaps.close_all()
        cpu_kernels.install()
    elif current_platform.is_cuda():
        ModelRegistry.register_model("DeepSeekV4MTPModel", "vllm_nvfp4.mtp:DeepSeekV4MTP")
