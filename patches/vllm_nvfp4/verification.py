"""What is checked in the front process, before any worker is started: a bad start should cost seconds, not a load."""

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import DeepseekV4ForCausalLMConfig

from vllm_nvfp4 import architecture, compat, env, kernel_sets, metrics, platform
from vllm_nvfp4.model_loader import LOAD_FORMAT, REPLACED_FORMATS
from vllm_nvfp4.quantization import METHOD_NAME

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

# Every rank gathers all tokens, computes its experts, and gets its own tokens' sums back.
EXCHANGE = "allgather_reducescatter"


class Nvfp4ModelChecks(DeepseekV4ForCausalLMConfig):
    """vLLM's hook for DeepSeek-V4's configuration, with our checks when the checkpoint is ours."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Upstream's own adjustment of FP8 checkpoints."""
        DeepseekV4ForCausalLMConfig.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Check the process, the switches and the parallel layout; choose our loader.

        Raises: ValueError - a tensor-parallel size that does not divide, a feature that our experts do not have, a
            load format without real weights, or a misspelled switch; RuntimeError - the environment lacks what the CPU
            path needs, or there are no kernels for this device.
        """
        DeepseekV4ForCausalLMConfig.verify_and_update_config(vllm_config)
        if vllm_config.model_config.quantization != METHOD_NAME:
            return
        compat.check_process()
        for variable in (env.STRICT, env.WO_A, env.NO_JIT):
            env.flag(variable)
        env.choice(env.WARMUP, env.WARMUP_MODES)
        platform.check(vllm_config.model_config.enforce_eager)
        if platform.backend() in platform.CAPABILITY_OF:
            kernel_sets.folder()
        parallel = vllm_config.parallel_config
        config = vllm_config.model_config.hf_config
        architecture.check_parallel(
            config, parallel.tensor_parallel_size, parallel.enable_expert_parallel, parallel.data_parallel_size
        )
        if platform.backend() is not None:
            check_features(parallel)
        load = vllm_config.load_config
        if load.load_format == "dummy":
            raise ValueError(
                "--load-format dummy: random bytes are not NVFP4 weights, and their scales would be NaN; "
                "make a small checkpoint with scripts/make_tiny_checkpoint.py instead"
            )
        if load.load_format in REPLACED_FORMATS:
            load.load_format = LOAD_FORMAT
        metrics.open_folder()


def check_features(parallel: "ParallelConfig") -> None:
    """Refuse ways of running in parallel that our runners do not have; NVFP4_PROVIDER=stock leaves them to vLLM.

    Raises: ValueError - names the flag and what to do.
    """
    exchanges = parallel.data_parallel_size > 1
    refused = {
        "--enable-dbo / --ubatch-size": (
            parallel.use_ubatching,
            "two micro-batches would run at a time, in the same buffers",
        ),
        f"--all2all-backend {parallel.all2all_backend}": (
            exchanges and parallel.all2all_backend != EXCHANGE,
            f"our experts exchange tokens by {EXCHANGE} only",
        ),
        "--prefill-context-parallel-size": (
            parallel.prefill_context_parallel_size > 1,
            "hash routing needs the token ids of all the tokens that experts see",
        ),
        "--enable-eplb": (parallel.enable_eplb, "prepared experts cannot move between ranks"),
        "--enable-elastic-ep": (parallel.enable_elastic_ep, "prepared experts cannot move between ranks"),
    }
    for flag, (is_given, why) in refused.items():
        if is_given:
            raise ValueError(f"{flag}: {why}; leave it out, or set {env.PROVIDER.name}=stock")
