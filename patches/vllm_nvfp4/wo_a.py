"""wo_a, the grouped output projection: kept as exported, or in NVFP4 on request (NVFP4_WO_A=1).

ModelOpt 0.47 does not quantize wo_a, so there is no calibrated `input_scale` for it. The scale is derived instead from
a bound that holds for every input: attention output is a convex combination of RMS-normalised key/value rows, so no
element can exceed sqrt(head_dim) * max|norm weight| (docs/decisions/0003-wo-a-input-scale.md).
"""

import math
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method as v2_loader

from cutedsl.formats import NVFP4
from cutedsl.quantize import quantize_weight
from vllm_nvfp4 import platform, selection
from vllm_nvfp4.checkpoint import CheckpointError
from vllm_nvfp4.inventory import Format
from vllm_nvfp4.linear import ModelOptNvFp4ShardedLinearMethod
from vllm_nvfp4.scales import check_scales

# KV rows pass through an FP8 cache: e4m3 with a power-of-two scale can round a value up by one part in 16.
FP8_CACHE_MARGIN = 1 + 2**-4
ROWS_AT_ONCE = 1024


def input_scale_bound(norm_weights: list[torch.Tensor], head_dim: int) -> float:
    """sqrt(head_dim) * max|w| * margin / (6 * 448): an activation scale that no input can exceed.

    Args: norm_weights: (head_dim,) each - kv_norm's and the compressor's RMSNorm weights.
    """
    # Not Python's max, which may drop a NaN.
    largest = float(torch.stack([w.detach().float().abs().max() for w in norm_weights]).max())
    return math.sqrt(head_dim) * largest * FP8_CACHE_MARGIN / NVFP4.tensor_scale_divisor


@v2_loader
class ModelOptNvFp4WoAMethod(LinearMethodBase):
    """Loads wo_a as stored; after the load it is NVFP4 and is computed with the inverse RoPE by a cutedsl WoARunner."""

    def __init__(self, config: Any, prefix: str, stored: Format) -> None:
        if platform.backend() is None:
            raise ValueError(
                f"{prefix}: wo_a in NVFP4 (from the checkpoint, or NVFP4_WO_A=1) needs a cutedsl kernel, and "
                f"{platform.unavailable_reason()}; unset NVFP4_WO_A, or export wo_a in BF16"
            )
        if stored not in (Format.NVFP4, Format.HIGH):
            raise ValueError(f"{prefix} is {stored} in the checkpoint; NVFP4_WO_A=1 can quantize BF16 only: unset it")
        self.prefix, self.stored = prefix, stored
        self.inner = (
            ModelOptNvFp4ShardedLinearMethod(config, prefix) if stored is Format.NVFP4 else UnquantizedLinearMethod()
        )

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """The parameters of the stored format."""
        self.inner.create_weights(layer, *args, **kwargs)
        selection.record(self.prefix, "wo_a", f"cutedsl {platform.backend()}")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Quantize a high-precision weight in place of it; the runner is built when the norms are known (attention.py).

        Raises: CheckpointError - the weight holds NaN or infinity, or a scale is unusable.
        """
        if self.stored is Format.NVFP4:
            check_scales(
                self.prefix, layer.weight_scale, weight_scale_2=layer.weight_scale_2, input_scale=layer.input_scale
            )
            return
        weight = layer.weight.data
        low, high = torch.aminmax(weight)
        try:
            # A block of the largest magnitude has the tensor scale of the whole matrix, by quantize_weight's own rules.
            weight_scale_2 = quantize_weight(torch.maximum(-low, high).repeat(NVFP4.block_size)).weight_scale_2
        except ValueError as error:
            raise CheckpointError(f"{self.prefix}.weight cannot be quantized: {error}; export it again") from error
        packed = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(
            weight.shape[0], weight.shape[1] // NVFP4.block_size, dtype=NVFP4.scale_dtype, device=weight.device
        )
        # A slice at a time: the fp32 working copy must not be as large as the matrix.
        for start in range(0, weight.shape[0], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            part = quantize_weight(weight[rows], weight_scale_2)
            packed[rows], scale[rows] = part.weight, part.weight_scale
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        layer.weight_scale_2 = torch.nn.Parameter(weight_scale_2.reshape(1), requires_grad=False)
        layer.input_scale = None

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Never called: attention computes wo_a together with the inverse RoPE."""
        raise RuntimeError(f"{self.prefix}: wo_a is computed by the attention's _o_proj; vLLM's call order changed")
