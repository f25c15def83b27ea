"""FP8 linears with 128x128 blocks on a CPU: e8m0 scales byte by byte, products against loops in float64."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS
from vllm.platforms import PlatformEnum
from vllm_nvfp4 import fp8_block
from vllm_nvfp4.checkpoint import CheckpointError
from vllm_nvfp4.fp8_block import ReferenceFp8BlockKernel, fp8_block_linear, quantize_rows, upcast_e8m0

# (M, N, K): DeepSeek-V4's widths in little, whole blocks, parts of blocks, one row, none.
SHAPES = [(3, 256, 512), (1, 128, 128), (5, 130, 200), (2, 1, 129), (4, 127, 16), (0, 128, 256)]


def random_case(m: int, n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x BF16 with rows of different sizes, an FP8 weight, power-of-two scales."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=generator) * torch.logspace(-3, 3, max(m, 1))[:m, None]).bfloat16()
    weight = (torch.randn(n, k, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    exponents = torch.randint(-12, -4, (-(-n // 128), -(-k // 128)), generator=generator)
    return x, weight, torch.exp2(exponents.float())


def round_e4m3(value: float) -> float:
    """The nearest e4m3 number, ties to even, by the format's definition: 3 bits of mantissa, least exponent -6."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return max(-448.0, min(448.0, round(value / step) * step))  # Python rounds half to even


def in_float64(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """The definition, in loops over blocks; only the activation's scale is rounded to fp32, as it is there."""
    xs, ws, ss = x.double().numpy(), weight.double().numpy(), scale.double().numpy()
    out = np.zeros((xs.shape[0], ws.shape[0]))
    for row in range(xs.shape[0]):
        for start in range(0, xs.shape[1], 128):
            block = xs[row, start : start + 128]
            sf = np.float32(max(np.abs(block).max(), 1e-10)) / np.float32(448)
            q = np.array([round_e4m3(float(np.float32(v) / sf)) for v in block]) * float(sf)
            for n_start in range(0, ws.shape[0], 128):
                rows = slice(n_start, n_start + 128)
                out[row, rows] += ws[rows, start : start + 128] @ q * ss[n_start // 128, start // 128]
    return out


def check(found: torch.Tensor, wanted: np.ndarray) -> None:
    """Close as a whole and in the worst row.

    fp32 products and sums of up to 512 terms: each rounding is 6e-8 of a partial sum, and they add up as random walks do.
    """
    assert (found.dtype, found.shape) == (torch.float32, wanted.shape)
    error, size = found.double().numpy() - wanted, np.linalg.norm(wanted, axis=1)
    if wanted.size:
        assert np.linalg.norm(error) <= 1e-6 * np.linalg.norm(wanted)
        assert (np.linalg.norm(error, axis=1) <= 2e-6 * size).all()
        assert (size > 0).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_the_product(m: int, n: int, k: int) -> None:
    x, weight, scale = random_case(m, n, k, seed=m * n + k)
    check(fp8_block_linear(x, weight, scale), in_float64(x, weight, scale))


def test_each_block_has_its_own_scale() -> None:
    _, weight, _ = random_case(1, 256, 256, seed=1)
    x = torch.ones(1, 256).bfloat16()
    one = fp8_block_linear(x, weight, torch.ones(2, 2))
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        scale = torch.zeros(2, 2)
        scale[row, column] = 4.0
        found = fp8_block_linear(x, weight, scale)
        rows, columns = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
        torch.testing.assert_close(found[0, rows], 4 * weight[rows, columns].float().sum(1))
        assert int(found.count_nonzero()) <= 128
        assert not found.equal(one)


def test_rows_are_quantized_by_blocks_of_128() -> None:
    x, _, _ = random_case(4, 1, 300, seed=2)
    x[1] = 0
    x[2, :128] = 0
    found = quantize_rows(x)
    assert (found.dtype, found.shape) == (torch.float32, x.shape)
    for row in range(4):
        for start in range(0, 300, 128):
            block, result = x[row, start : start + 128].float(), found[row, start : start + 128]
            amax = float(block.abs().max())
            # Half a step of e4m3 is 1/16 of a value, and 2^-10 of the scale for the smallest ones.
            assert bool(((result - block).abs() <= block.abs() / 16 + amax / 448 * 2**-10 + 1e-30).all())
            assert float(result.abs().max()) == pytest.approx(amax, rel=1e-6)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight, scale = random_case(5, 130, 200, seed=3)
    alone = torch.cat([quantize_rows(row[None]) for row in x])
    assert quantize_rows(x).equal(alone)
    check(torch.cat([fp8_block_linear(row[None], weight, scale) for row in x]), in_float64(x, weight, scale))


def test_every_e8m0_byte() -> None:
    scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    found = upcast_e8m0(scale)
    assert found.dtype == torch.float32
    assert found[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(found[255])
    assert float(found[0]) == 2.0**-127 > 0, "a subnormal of fp32, which must not be flushed to 0"


def test_fp32_scales_pass_through() -> None:
    scale = torch.tensor([[0.1, 3e-39], [0.0, 1e30]])
    assert upcast_e8m0(scale).equal(scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.float64])
def test_other_scales_are_refused(dtype: torch.dtype) -> None:
    message = f"FP8 block scales are {dtype}, expected float8_e8m0fnu or float32; export the checkpoint again"
    with pytest.raises(TypeError, match=re.escape(message)):
        upcast_e8m0(torch.ones(2, 2).to(dtype))


def layer_of(weight: torch.Tensor, scale: torch.Tensor, attribute: str = "weight_scale_inv") -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.prefix = "model.layers.1.attn.wq_b"
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.register_parameter(attribute, torch.nn.Parameter(scale, requires_grad=False))
    return layer


def kernel() -> ReferenceFp8BlockKernel:
    """The kernel without vLLM's quantizer, which it does not use."""
    found = ReferenceFp8BlockKernel.__new__(ReferenceFp8BlockKernel)
    found.config = SimpleNamespace(out_dtype=torch.bfloat16)
    found.layer_param_names = ["weight", "weight_scale_inv", "input_scale", "input_scale_ub"]
    return found


@pytest.mark.parametrize("attribute", ["weight_scale_inv", "weight_scale"])
def test_a_layer_from_the_load_to_the_product(attribute: str) -> None:
    x, weight, scale = random_case(6, 200, 256, seed=4)
    layer = layer_of(weight, scale.to(torch.float8_e8m0fnu), attribute)
    reference = kernel()
    reference.process_weights_after_loading(layer)
    assert getattr(layer, attribute).equal(scale)
    assert not getattr(layer, attribute).requires_grad
    assert layer.weight.data_ptr() == weight.data_ptr(), "the weight stays as loaded"
    bias = torch.arange(200).bfloat16()
    found = reference.apply_weights(layer, x.reshape(2, 3, 256), bias)
    wanted = fp8_block_linear(x, weight, scale) + bias
    assert found.equal(wanted.bfloat16().reshape(2, 3, 200))
    assert reference.apply_weights(layer, x).equal(fp8_block_linear(x, weight, scale).bfloat16())


@pytest.mark.parametrize(
    ("value", "dtype", "shown"),
    [
        (float("nan"), torch.float8_e8m0fnu, "nan"),
        (float("nan"), torch.float32, "nan"),
        (float("inf"), torch.float32, "inf"),
        (-1.0, torch.float32, "-1.0"),
    ],
)
def test_a_bad_scale_is_refused_by_name(value: float, dtype: torch.dtype, shown: str) -> None:
    scale = torch.ones(2, 3)
    scale[1, 2] = value
    layer = layer_of(torch.zeros(256, 384).to(torch.float8_e4m3fn), scale.to(dtype))
    message = f"model.layers.1.attn.wq_b.weight_scale_inv[1, 2] is {shown}; expected a finite number"
    with pytest.raises(CheckpointError, match=re.escape(message) + ".*export or download the checkpoint again"):
        kernel().process_weights_after_loading(layer)


def test_a_scale_of_zero_is_a_block_of_zeros() -> None:
    layer = layer_of(torch.zeros(128, 128).to(torch.float8_e4m3fn), torch.zeros(1, 1))
    kernel().process_weights_after_loading(layer)
    assert kernel().apply_weights(layer, torch.ones(1, 128).bfloat16()).equal(torch.zeros(1, 128).bfloat16())


def test_registered_once_behind_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = [k for k in _POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] if k is not ReferenceFp8BlockKernel]
    assert stock, "vLLM has no FP8 block kernels for CPUs any more: is ours still needed?"
    monkeypatch.setitem(_POSSIBLE_FP8_BLOCK_KERNELS, PlatformEnum.CPU, list(stock))
    fp8_block.register()
    fp8_block.register()
    assert _POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] == [*stock, ReferenceFp8BlockKernel]
    supported, _ = ReferenceFp8BlockKernel.is_supported()
    assert supported
