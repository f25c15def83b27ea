"""Quantization bit for bit against a numpy oracle, and the decisions about zeros, NaN and infinity."""

import numerics
import numpy as np
import pytest
import torch

from cutedsl.quantize import (
    ZERO_TENSOR_SCALE,
    dequantize,
    pack_codes,
    quantize_activation,
    quantize_weight,
    unpack_codes,
    unscaled,
    unscaled_activation,
)

F32 = torch.float32


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def assert_quantized(x: torch.Tensor, scale: float) -> None:
    packed, block_sf = quantize_activation(x, scalar(scale))
    codes, bits = numerics.quantize(numerics.to_numpy(x), scale)
    np.testing.assert_array_equal(numerics.scale_bits(block_sf), bits)
    np.testing.assert_array_equal(numerics.unpack(packed), codes)


# --- codes -----------------------------------------------------------------------------------------------------------


def test_pack_puts_the_even_element_in_the_low_nibble() -> None:
    assert pack_codes(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


def test_unpack_inverts_pack_for_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    codes = unpack_codes(packed)
    np.testing.assert_array_equal(codes.numpy(), numerics.unpack(packed))
    assert torch.equal(pack_codes(codes), packed)


def test_pack_codes_raises() -> None:
    with pytest.raises(TypeError, match=r"expected torch\.uint8"):
        pack_codes(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="even last size"):
        pack_codes(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="largest code is 16"):
        pack_codes(torch.tensor([1, 16], dtype=torch.uint8))


def test_unpack_codes_raises() -> None:
    with pytest.raises(TypeError, match=r"expected torch\.uint8"):
        unpack_codes(torch.zeros(2, dtype=torch.int8))


# --- activations -----------------------------------------------------------------------------------------------------

# (value, its magnitude index): both sides of every midpoint, the midpoints themselves to the even index.
TIES = [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)]


def test_ties_go_to_the_even_code_and_neighbours_of_a_tie_do_not() -> None:
    values, expected = [], []
    for index, (tie, even) in enumerate(TIES):
        below, above = np.nextafter(np.float32(tie), [np.float32(0), np.float32(9)])
        values += [below, tie, above]
        expected += [index, even, index + 1]
    values += [0.0, 6.0, 5.5, -0.0]
    expected += [0, 7, 7, 0]
    for sign in (1.0, -1.0):
        # 6 in each block and input_scale 1 make the block's scale 1, so that x itself is rounded.
        blocks = torch.tensor([values[i : i + 5] + [0.0] * 10 for i in range(0, 25, 5)], dtype=F32) * sign
        x = torch.cat((torch.full((5, 1), 6.0), blocks), dim=1)
        packed, block_sf = quantize_activation(x, scalar(1.0))
        assert block_sf.float().eq(1).all()
        codes = torch.from_numpy(numerics.unpack(packed))[:, 1:6].reshape(-1)
        assert (codes & 7).tolist() == expected
        assert torch.equal(codes >> 3, (blocks[:, :5].reshape(-1) < 0).to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 3.7e-4, 2.1e-2, 1.0, 900.0])
def test_activation_equals_oracle(dtype: torch.dtype, scale: float) -> None:
    assert_quantized(numerics.random_x(17, 512, spread=3.0).to(dtype), scale)


@pytest.mark.parametrize("k", [1024, 4096, 7168])
def test_activation_equals_oracle_at_model_sizes(k: int) -> None:
    assert_quantized(numerics.random_x(5, k), 20 / 2688)


def test_activation_of_small_integers_hits_many_ties() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-24, 25, (64, 256), generator=generator) / 4
    x[:, ::16] = 6.0
    assert_quantized(x, 1.0)
    assert_quantized(x, 1.0 / 16)


@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 0.01, 0.3, 1 / 2688, 1 / 3])
def test_ties_of_the_block_scale(scale: float) -> None:
    """Maxima with a quotient on each midpoint of e4m3 or one fp32 beside it: another order of operations shows."""
    middle = ((numerics.E4M3[1:] + numerics.E4M3[:-1]) / 2).astype(np.float32)
    amax = middle * (np.float32(6) * np.float32(scale))
    amax = np.concatenate((np.nextafter(amax, np.float32(0)), amax, np.nextafter(amax, np.float32(1e9))))
    x = torch.zeros(len(amax), 16)
    x[:, 5] = -torch.from_numpy(amax)
    assert_quantized(x, scale)
    packed, block_sf = quantize_weight(x, scale)[:2]
    codes, bits = numerics.quantize(x.numpy(), scale, is_weight=True)
    np.testing.assert_array_equal(numerics.scale_bits(block_sf), bits)
    np.testing.assert_array_equal(numerics.unpack(packed), codes)


def test_scale_that_underflows_gives_codes_0() -> None:
    x = torch.full((1, 32), 1e-3)
    x[:, 16:] = 5.0
    packed, block_sf = quantize_activation(x, scalar(1.0))
    assert numerics.scale_bits(block_sf)[0].tolist()[0] == 0
    assert packed[0, :8].eq(0).all()
    assert packed[0, 8:].ne(0).all()
    assert_quantized(x, 1.0)


def test_values_above_the_range_saturate_and_infinity_with_them() -> None:
    x = torch.full((1, 16), -1e6)
    x[0, 3] = float("inf")
    packed, block_sf = quantize_activation(x, scalar(1.0))
    assert block_sf.float().item() == 448
    assert unscaled(packed, block_sf)[0].tolist() == [6 * 448 if i == 3 else -6 * 448 for i in range(16)]


def test_nan_poisons_its_block_and_no_other() -> None:
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    x[0, 17] = float("nan")
    expected = torch.zeros(2, 32, dtype=torch.bool)
    expected[0, 16:] = True
    packed, block_sf = quantize_activation(x, scalar(1 / 448))
    assert torch.equal(unscaled(packed, block_sf).isnan(), expected)
    assert torch.equal(unscaled_activation(x, scalar(1 / 448)).isnan(), expected)
    assert packed[0, 8:].eq(0).all()


def test_zero_keeps_no_sign_but_a_rounded_negative_does() -> None:
    x = torch.tensor([[6.0, -0.0, -0.1, 0.1] + [0.0] * 12])
    packed, _ = quantize_activation(x, scalar(1.0))
    assert unpack_codes(packed)[0, :4].tolist() == [7, 0, 8, 0]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 3, 32)])
def test_activation_of_any_leading_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(torch.bfloat16)
    packed, block_sf = quantize_activation(x, scalar(0.01))
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert block_sf.shape == (*shape[:-1], shape[-1] // 16)
    assert unscaled_activation(x, scalar(0.01)).shape == shape


@pytest.mark.parametrize("scale", [1e-6, 0.013, 700.0])
def test_unscaled_activation_is_the_packed_path_bit_for_bit(scale: float) -> None:
    x = numerics.random_x(9, 1024, spread=4.0)
    x[0, :40] = 0.0
    x[1, 5] = float("inf")
    packed, block_sf = quantize_activation(x, scalar(scale))
    assert same_bits(unscaled_activation(x, scalar(scale)), unscaled(packed, block_sf))


@pytest.mark.parametrize("function", [quantize_activation, unscaled_activation])
def test_activation_raises(function) -> None:
    with pytest.raises(TypeError, match="expected a floating type"):
        function(torch.zeros(1, 16, dtype=torch.uint8), scalar(1.0))
    with pytest.raises(ValueError, match="multiple of 16"):
        function(torch.zeros(1, 24), scalar(1.0))
    with pytest.raises(TypeError, match=r"input_scale is float, expected a torch\.float32"):
        function(torch.zeros(1, 16), 1.0)
    with pytest.raises(TypeError, match=r"input_scale is torch\.float64"):
        function(torch.zeros(1, 16), torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="input_scale has shape"):
        function(torch.zeros(1, 16), torch.ones(2))


def test_result_does_not_depend_on_torch_defaults() -> None:
    x, scale = numerics.random_x(4, 256), scalar(0.01)
    expected, weight = unscaled_activation(x, scale), quantize_weight(x)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert same_bits(unscaled_activation(x, scale), expected)
            assert all(same_bits(a, b) for a, b in zip(quantize_weight(x), weight, strict=True))
    finally:
        torch.set_default_dtype(before)


# --- weights ---------------------------------------------------------------------------------------------------------


def assert_weight(w: torch.Tensor, given: float | None) -> None:
    result = quantize_weight(w, given)
    x = numerics.to_numpy(w)
    scale = np.float32(given) if given is not None else np.abs(x).max() / np.float32(2688)
    assert result.weight_scale_2.dtype == F32
    assert result.weight_scale_2.shape == ()
    assert result.weight_scale_2.item() == scale
    codes, bits = numerics.quantize(x, scale, is_weight=True)
    np.testing.assert_array_equal(numerics.scale_bits(result.weight_scale), bits)
    np.testing.assert_array_equal(numerics.unpack(result.weight), codes)


@pytest.mark.parametrize("given", [None, 1e-5, 3e-3, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_equals_oracle(dtype: torch.dtype, given: float | None) -> None:
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(32, 256, generator=generator) * torch.exp(3 * torch.randn(32, 256, generator=generator))
    w[3, 16:48] = 0.0
    w[4] *= 1e-9
    assert_weight(w.to(dtype), given)


def test_weight_of_quarters_hits_ties() -> None:
    assert_weight(torch.randint(-24, 25, (64, 256), generator=torch.Generator().manual_seed(7)) / 4, 1 / 16)


def test_weight_scale_is_never_zero_and_one_for_a_block_of_zeros() -> None:
    w = torch.zeros(1, 48)
    w[0, 0], w[0, 16] = 2688.0, 1e-4
    result = quantize_weight(w)
    assert result.weight_scale.float()[0].tolist() == [448.0, 2.0**-9, 1.0]


@pytest.mark.parametrize("w", [torch.zeros(4, 32), torch.full((4, 32), 1e-38)], ids=["zeros", "almost-zeros"])
def test_weight_without_magnitude_gets_a_scale_that_loads(w: torch.Tensor) -> None:
    result = quantize_weight(w)
    assert result.weight_scale_2.item() == np.float32(1 / 2688) == np.float32(ZERO_TENSOR_SCALE)
    assert result.weight.eq(0).all()
    assert result.weight_scale.float().gt(0).all()
    assert dequantize(*result).eq(0).all()


def test_quantize_weight_raises() -> None:
    good = torch.ones(2, 32)
    with pytest.raises(TypeError, match="expected a floating type"):
        quantize_weight(good.to(torch.int8))
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize_weight(good[:, :20])
    with pytest.raises(ValueError, match="empty"):
        quantize_weight(good[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = good.clone()
        w[1, 5] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize_weight(w)
    for bad in (0.0, -1.0, float("nan"), float("inf"), 1e-40):
        with pytest.raises(ValueError, match="weight_scale_2 is"):
            quantize_weight(good, bad)
    with pytest.raises(ValueError, match="weight_scale_2 is"):
        quantize_weight(good, torch.ones(2))


# --- decoding --------------------------------------------------------------------------------------------------------


def every_byte_and_scale() -> tuple[torch.Tensor, torch.Tensor]:
    """(127, 256) bytes against every finite non-negative block scale."""
    weight = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
    return weight, torch.arange(127, dtype=torch.uint8).view(127, 1).repeat(1, 32).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unscaled_is_exact_for_every_byte_and_scale(dtype: torch.dtype) -> None:
    weight, scale = every_byte_and_scale()
    result = unscaled(weight, scale, dtype)
    assert result.dtype == dtype
    np.testing.assert_array_equal(
        result.double().numpy(), numerics.values(numerics.unpack(weight), numerics.scale_bits(scale))
    )


def test_dequantize_equals_oracle() -> None:
    weight, scale = every_byte_and_scale()
    factor = np.float32(0.0123)
    expected = np.repeat(numerics.E4M3[numerics.scale_bits(scale)].astype(np.float32) * factor, 16, axis=-1)
    codes = numerics.unpack(weight)
    expected = np.concatenate((numerics.E2M1, -numerics.E2M1))[codes].astype(np.float32) * expected
    np.testing.assert_array_equal(dequantize(weight, scale, scalar(0.0123)).numpy(), expected)


def test_decoding_takes_stacks_and_strided_views() -> None:
    packed = numerics.random_packed(3, 8, 64)
    np.testing.assert_array_equal(unscaled(packed.weight, packed.weight_scale).double().numpy(), packed.values)
    result = unscaled(packed.weight[:, ::2, 8:24], packed.weight_scale[:, ::2, 1:3])
    np.testing.assert_array_equal(result.double().numpy(), packed.values[:, ::2, 16:48])


def test_dequantized_weight_is_within_half_a_step() -> None:
    w = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    error = (dequantize(*quantize_weight(w)) - w).abs().view(16, 8, 16)
    amax = w.view(16, 8, 16).abs().amax(-1, keepdim=True)
    # Half the widest step (between codes 4 and 6) is 1/6 of the block's maximum; the scale is off by up to 1/16.
    assert (error <= amax * (1 / 6 + 1 / 16)).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    "function", [unscaled, lambda w, s: dequantize(w, s, scalar(1.0))], ids=["unscaled", "dequantize"]
)
def test_decoding_raises(function) -> None:
    weight, scale = numerics.random_packed(4, 64)[:2]
    with pytest.raises(TypeError, match=r"codes are torch\.int8"):
        function(weight.view(torch.int8), scale)
    with pytest.raises(TypeError, match=r"block scales torch\.uint8"):
        function(weight, scale.view(torch.uint8))
    with pytest.raises(ValueError, match="codes have shape"):
        function(weight, scale[:, :3])
    with pytest.raises(ValueError, match="codes have shape"):
        function(weight[:2], scale)
    with pytest.raises(ValueError, match="codes have shape"):
        function(weight[:, :31], scale[:, :3])


def test_unscaled_and_dequantize_raise_on_their_own_arguments() -> None:
    weight, scale = numerics.random_packed(4, 64)[:2]
    with pytest.raises(TypeError, match=r"dtype is torch\.float16"):
        unscaled(weight, scale, torch.float16)
    with pytest.raises(TypeError, match=r"weight_scale_2 is torch\.bfloat16"):
        dequantize(weight, scale, torch.ones((), dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="weight_scale_2 has shape"):
        dequantize(weight, scale, torch.ones(4))
