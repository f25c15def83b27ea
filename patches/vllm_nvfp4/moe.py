"""NVFP4 routed experts in vLLM: parameters as stock names them, computed by a cutedsl MoeRunner.

Every expert keeps its own scales, and w1 and w3 of an expert keep theirs: vLLM's own method takes w1's for both and merges
input scales over experts.
"""

from typing import Any

import torch
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE

from cutedsl.ops.moe import moe as moe_op
from cutedsl.runners.moe import MoeRunner
from vllm_nvfp4 import dump, platform, selection
from vllm_nvfp4.checkpoint import CheckpointError
from vllm_nvfp4.scales import check_scales

GLOBAL_SCALES = ("w13_weight_scale_2", "w13_input_scale", "w2_weight_scale_2", "w2_input_scale")
BLOCK_SCALES = ("w13_weight_scale", "w2_weight_scale")


def _poison_scales(layer: RoutedExperts) -> None:
    """Every scale starts as NaN, so that one that is never loaded cannot pass for a number."""
    for leaf in GLOBAL_SCALES + BLOCK_SCALES:
        getattr(layer, leaf).data.fill_(float("nan"))


def _check(layer: RoutedExperts) -> None:
    """Refuse unusable scales, naming layer, leaf and expert."""
    name = layer.layer_name
    for group in ("w13", "w2"):
        scales = {f"{group}_{leaf}": getattr(layer, f"{group}_{leaf}") for leaf in ("weight_scale_2", "input_scale")}
        check_scales(name, getattr(layer, f"{group}_weight_scale"), **scales)


class ModelOptNvFp4RunnerMoEMethod(ModelOptNvFp4FusedMoE):
    """Experts served by cutedsl. The name starts with `ModelOpt` because vLLM's expert loader looks at class names."""

    def __init__(self, config: Any, layer: RoutedExperts, prefix: str) -> None:
        # Not ModelOptNvFp4FusedMoE.__init__: it insists on a stock backend, and there is none for CPUs.
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.quant_config = config
        self.use_global_sf = False
        self.use_a16 = False
        self.per_token_activation = False
        self.prefix = prefix
        selection.record(prefix, "moe", f"cutedsl {platform.backend()}")

    # vLLM's weight cache hands over processed weights; our processing has no such mode, and must not be skipped.
    supports_pre_processed_weights = False

    @property
    def supports_eplb(self) -> bool:
        """Not tried: rearranging experts would have to rearrange the runner's tensors."""
        return False

    @property
    def supports_internal_mk(self) -> bool:
        """True: tokens of other data-parallel ranks are gathered in `apply`, behind the router.

        vLLM's own gathering comes before it, and hash routing would look this rank's token ids up for all ranks' tokens.
        """
        return True

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        """Stock parameters, poisoned."""
        super().create_weights(layer, *args, **kwargs)
        _poison_scales(layer)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check every scale and build the runner on the layer's own tensors."""
        _check(layer)
        if layer.apply_router_weight_on_input:
            raise ValueError(
                f"{self.prefix}: router weights on the input are not supported; DeepSeek-V4 does not use them"
            )
        backend = platform.backend()
        assert backend is not None  # method_for chose this class only where there is one
        layer.nvfp4_runner = MoeRunner(
            self.prefix,
            layer.w13_weight.data,
            layer.w13_weight_scale.data,
            layer.w13_weight_scale_2.data,
            layer.w13_input_scale.data,
            layer.w2_weight.data,
            layer.w2_weight_scale.data,
            layer.w2_weight_scale_2.data,
            layer.w2_input_scale.data,
            swiglu_limit=layer.swiglu_limit,
            expert_map=layer.expert_map,
            backend=backend,
            activations=platform.activations(),
        )
        dump.watch(layer.nvfp4_runner)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """Nothing for vLLM's modular kernels: they are not used."""
        return

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """sum_k topk_weights[t, k] * expert_{topk_ids[t, k]}(x[t]), of this rank's experts where the caller sums ranks.

        With data parallelism every rank computes its experts for all ranks' tokens, and gets its own tokens' sum back.
        """
        runner_id, is_sharded = layer.nvfp4_runner.runner_id, self.moe.is_sequence_parallel
        if self.moe.dp_size == 1 and not is_sharded:
            return moe_op(x, topk_weights, topk_ids, runner_id)
        group = get_ep_group()
        x, topk_weights, topk_ids = group.dispatch(x, topk_weights, topk_ids, is_sharded)
        return group.combine(moe_op(x, topk_weights, topk_ids, runner_id), is_sharded)


class ModelOptNvFp4CheckedMoE(ModelOptNvFp4FusedMoE):
    """vLLM's stock NVFP4 experts, with every scale poisoned before and checked after the load."""

    def __init__(self, config: Any, layer: RoutedExperts, prefix: str) -> None:
        super().__init__(quant_config=config, moe_config=layer.moe_config)
        self.prefix = prefix
        selection.record(
            prefix, "moe", f"ModelOptNvFp4FusedMoE {self.nvfp4_backend.value}", fallback=True,
            reason=str(platform.unavailable_reason()),
        )  # fmt: skip

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        """Stock parameters, poisoned."""
        super().create_weights(layer, *args, **kwargs)
        _poison_scales(layer)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check; refuse what the stock kernel would silently merge.

        Raises: CheckpointError - an unusable scale, or w1 and w3 of an expert with different global scales.
        """
        _check(layer)
        pair = layer.w13_weight_scale_2
        differs = pair[:, 0] != pair[:, 1]
        if bool(differs.any()):
            expert = int(differs.nonzero()[0])
            raise CheckpointError(
                f"{self.prefix}: w1 and w3 of expert {expert} have weight_scale_2 {pair[expert].tolist()}; the stock "
                "kernel takes w1's for both. Export with equal scales for w1 and w3 (ModelOpt 0.47 does)"
            )
        super().process_weights_after_loading(layer)


def method_for(config: Any, layer: RoutedExperts, prefix: str) -> FusedMoEMethodBase:
    """Ours where cutedsl has a backend; otherwise vLLM's, recorded as a fallback."""
    chosen = ModelOptNvFp4CheckedMoE if platform.backend() is None else ModelOptNvFp4RunnerMoEMethod
    return chosen(config, layer, prefix)
