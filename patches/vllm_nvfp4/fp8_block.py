"""FP8 linears with 128x128 block scales on a CPU without AMX, for checkpoints whose dense part is FP8 (layout L3).

Why: both CPU kernels of vLLM 0.32.0 (kernels/linear/scaled_mm/cpu.py) need AMX tiles and there is no fallback, so that
DeepSeek's own format cannot start on other CPUs. Remove when: upstream has a kernel for them.
"""

from typing import Any

import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import PlatformEnum, current_platform

from vllm_nvfp4 import selection
from vllm_nvfp4.checkpoint import CheckpointError

BLOCK = 128
E4M3_MAX = 448.0


def upcast_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127) as fp32, NaN for byte 255, for e8m0 scales; fp32 ones pass through.

    Raises: TypeError - neither e8m0 nor fp32.
    """
    if scale.dtype not in (torch.float32, torch.float8_e8m0fnu):
        raise TypeError(
            f"FP8 block scales are {scale.dtype}, expected float8_e8m0fnu or float32; export the checkpoint again"
        )
    return scale.float()


def quantize_rows(x: torch.Tensor) -> torch.Tensor:
    """x as DeepSeek's W8A8 sees it: e4m3 with one fp32 scale for each 1x128 of a row, dequantized to fp32.

    Numerics: scale = amax / 448 in fp32, round to nearest even in the cast.
    """
    k = x.shape[-1]
    blocks = torch.nn.functional.pad(x.float(), (0, -k % BLOCK)).unflatten(-1, (-(-k // BLOCK), BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10) / E4M3_MAX
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)[:, :k]


def fp8_block_linear(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """quantize_rows(x) @ (weight * its block scale).T in fp32.

    Args:
        x: (M, K) bf16. weight: (N, K) float8_e4m3fn. weight_scale: (ceil(N/128), ceil(K/128)) fp32.
    Returns: (M, N) fp32.
    """
    n, k = weight.shape
    scale = weight_scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return quantize_rows(x) @ (weight.float() * scale).T


class ReferenceFp8BlockKernel(Fp8BlockScaledMMLinearKernel):
    """W8A8 with 128x128 weight blocks in plain torch; slow and exact."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Any CPU."""
        return current_platform.is_cpu(), "the torch FP8 block kernel serves CPUs only"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Widen e8m0 scales to fp32; the weight stays FP8 as loaded.

        Raises: CheckpointError - a scale is NaN, infinite or negative; 0 is legal, for a block of zeros.
        """
        params = self._get_layer_params(layer)
        scale = upcast_e8m0(params.block_scale.data).contiguous()
        bad = ~(torch.isfinite(scale) & (scale >= 0))
        if bool(bad.any()):
            index = tuple(bad.nonzero()[0].tolist())
            raise CheckpointError(
                f"{layer.prefix}.{params.block_scale_attr}{list(index)} is {float(scale[index])}; expected a finite "
                "number that is not negative; export or download the checkpoint again"
            )
        replace_parameter(layer, params.block_scale_attr, torch.nn.Parameter(scale, requires_grad=False))

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor:
        """The product; As is a placeholder, the activation is quantized inside."""
        return fp8_block_linear(A, B, Bs)


def linear_method(original: dict[str, Any], layer: torch.nn.Module, prefix: str) -> Any:
    """vLLM's own FP8 method for this linear; the kernel it selects is vLLM's choice among those registered."""
    from vllm_nvfp4.quantization import stock_fp8_config

    selection.record(prefix, "linear", "vLLM FP8 block")
    return stock_fp8_config(original).get_quant_method(layer, prefix)


def register() -> None:
    """Behind the stock kernels: where AMX exists they are faster and serve."""
    kernels = _POSSIBLE_FP8_BLOCK_KERNELS.setdefault(PlatformEnum.CPU, [])
    if ReferenceFp8BlockKernel not in kernels:
        kernels.append(ReferenceFp8BlockKernel)
