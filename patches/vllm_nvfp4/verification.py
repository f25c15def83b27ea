"""What is checked in the front process, before any worker is started: a bad start should cost seconds, not a load."""

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import DeepseekV4ForCausalLMConfig

from vllm_nvfp4 import architecture, compat, env, metrics
from vllm_nvfp4.model_loader import LOAD_FORMAT, REPLACED_FORMATS
from vllm_nvfp4.quantization import METHOD_NAME

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


class Nvfp4ModelChecks(DeepseekV4ForCausalLMConfig):
    """vLLM's hook for DeepSeek-V4's configuration, with our checks when the checkpoint is ours."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Upstream's own adjustment of FP8 checkpoints."""
        DeepseekV4ForCausalLMConfig.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Check the process, the switches and the parallel layout; choose our loader.

        Raises: ValueError - a tensor-parallel size that does not divide, a load format without real weights, or a
            misspelled switch; RuntimeError - the environment lacks what the CPU path needs.
        """
        DeepseekV4ForCausalLMConfig.verify_and_update_config(vllm_config)
        if vllm_config.model_config.quantization != METHOD_NAME:
            return
        compat.check_process()
        for variable in (env.STRICT, env.WO_A):
            env.flag(variable)
        parallel = vllm_config.parallel_config
        config = vllm_config.model_config.hf_config
        architecture.check_parallel(config, parallel.tensor_parallel_size, parallel.enable_expert_parallel)
        load = vllm_config.load_config
        if load.load_format == "dummy":
            raise ValueError(
                "--load-format dummy: random bytes are not NVFP4 weights, and their scales would be NaN; "
                "make a small checkpoint with scripts/make_tiny_checkpoint.py instead"
            )
        if load.load_format in REPLACED_FORMATS:
            load.load_format = LOAD_FORMAT
        metrics.open_folder()
