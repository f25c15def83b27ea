"""Quantization bit for bit against a numpy oracle, and the decisions about zeros, NaN and infinity.

ModelOpt's own answers are in test_quantize_golden.py.
"""

import numerics
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutedsl import quantize
from cutedsl.quantize import (
    ZERO_TENSOR_SCALE,
    PackedTensor,
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
    with pytest.raises(ValueError, match="input_scale is on meta, expected cpu"):
        function(torch.zeros(1, 16), torch.ones((), device="meta"))


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


def test_nothing_is_read_back_on_any_device() -> None:
    """A tensor on `meta` has no values: whatever reads one raises."""
    x, scale = torch.empty(5, 96, dtype=torch.bfloat16, device="meta"), torch.empty((), device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        scale.item()
    packed, block_sf = quantize_activation(x, scale)
    assert (packed.shape, packed.dtype, packed.device.type) == ((5, 48), torch.uint8, "meta")
    assert (block_sf.shape, block_sf.dtype, block_sf.device.type) == ((5, 6), torch.float8_e4m3fn, "meta")
    for result, dtype in [
        (dequantize(packed, block_sf, scale), F32),
        (unscaled(packed, block_sf), torch.bfloat16),
        (unscaled_activation(x, scale), torch.bfloat16),
    ]:
        assert (result.shape, result.dtype, result.device.type) == ((5, 96), dtype, "meta")


def test_results_do_not_depend_on_tiles_or_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = numerics.random_x(96, 14, spread=3.0).float()
    x, scale = wide.t(), scalar(0.01)
    assert not x.is_contiguous()
    packed, block_sf = quantize_activation(x.contiguous(), scale)
    weight = quantize_weight(x.contiguous())
    expected = [packed, block_sf, *weight, dequantize(*weight)]
    for tile_blocks in (1, 5, 84):
        monkeypatch.setattr(quantize, "TILE_BLOCKS", tile_blocks)
        weight = quantize_weight(x)
        found = [*quantize_activation(x, scale), *weight, dequantize(*weight)]
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


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
    with pytest.raises(ValueError, match="weight_scale_2 is on meta, expected cpu"):
        dequantize(weight, scale, torch.ones((), device="meta"))


# --- properties ------------------------------------------------------------------------------------------------------

# Tensor scales for which no product below leaves fp32: from the smallest allowed up to 6 * 448 * 2^115 < 2^127.
tensor_scales = st.floats(2.0**-117, 2.0**115, width=32)
# A block's largest element over 6 * tensor scale: from below the smallest e4m3 to above the largest, and zero.
block_scales = st.one_of(st.floats(2.0**-12, 2.0**10, width=32), st.floats(2.0**-11, 2.0**-6, width=32), st.just(0.0))
fractions = st.one_of(st.floats(-1, 1, width=32), st.sampled_from([-1.0, -0.0, 0.0, 0.125, 0.25, 0.5, 7 / 12, 5 / 6]))


@st.composite
def weights(draw: st.DrawFn, max_scale: float = 2.0**10) -> tuple[torch.Tensor, float]:
    """(1, 16 * blocks) fp32 and a tensor scale; every block has its own range, as a fraction of the tensor's."""
    tensor_scale = draw(tensor_scales)
    blocks = []
    for scale in draw(st.lists(block_scales.filter(lambda s: s <= max_scale), min_size=1, max_size=4)):
        row = draw(st.lists(fractions, min_size=15, max_size=15))
        blocks.append(np.float32([1.0, *row]) * np.float32(6 * scale) * np.float32(tensor_scale))
    return torch.from_numpy(np.concatenate(blocks)[None]), tensor_scale


bounded = settings(max_examples=120, deadline=None, derandomize=True)


@bounded
@given(weights())
def test_any_block_equals_oracle(case: tuple[torch.Tensor, float]) -> None:
    w, scale = case
    assert_quantized(w, scale)
    assert_weight(w, scale)


@bounded
@given(st.lists(st.integers(0, 255), min_size=0, max_size=40))
def test_pack_inverts_unpack(data: list[int]) -> None:
    packed = torch.tensor(data, dtype=torch.uint8)
    assert torch.equal(pack_codes(unpack_codes(packed)), packed)


def requantized(codes: torch.Tensor, bits: torch.Tensor, *, is_weight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What must come of blocks (..., 16) of codes with these scale bits (...) when decoded and quantized once more.

    A block comes back as it is, apart from the sign of zeros, if its largest code is 7: then amax / 6 is its scale. A
    scale of normal range always leads to a code 7, being off by at most 1/16. Below that e4m3 is coarse, and a block
    whose largest code is less may get another scale, in four ways:

    - codes all 0: scale 1 for a weight, 0 for an activation;
    - scale 2^-9, activation, largest value up to 3: the new scale, at most 2^-10, underflows, and the codes are 0;
    - scale 2^-9, otherwise: 2^-9 again, by rounding or as a weight's floor;
    - scale 2 * 2^-9, largest value 4: 4/6 of it rounds to 2^-9, so that values double and 4 saturates at 6. (3 does not
      occur: the scale is at most 4/3 of amax / 6.)
    """
    magnitude, sign = codes & 7, codes & 8
    largest = magnitude.amax(-1)
    zero = largest == 0
    vanishing = (bits == 1) & (largest < 6) & (not is_weight)
    doubled = (bits == 2) & (largest == 6)
    new_bits = torch.where(doubled, 1, bits)
    new_bits = torch.where(zero | vanishing, 0x38 if is_weight else 0, new_bits).to(torch.uint8)
    # The code of twice a code's value: 0, 1, 2, 3, 4, 6, then saturated.
    twice = torch.tensor([0, 2, 4, 5, 6, 7, 7, 7], dtype=torch.uint8)
    magnitude = torch.where(doubled.unsqueeze(-1), twice[magnitude.long()], magnitude)
    magnitude = torch.where((zero | vanishing).unsqueeze(-1), 0, magnitude)
    # Code 8 decodes to -0.0, and -0.0 gets code 0.
    return torch.where(magnitude == 0, 0, magnitude | sign), new_bits


def assert_requantized(old: PackedTensor, new: PackedTensor, *, is_weight: bool) -> None:
    codes = unpack_codes(old.weight).unflatten(-1, (-1, 16))
    expected_codes, expected_bits = requantized(codes, old.weight_scale.view(torch.uint8), is_weight=is_weight)
    assert torch.equal(new.weight_scale.view(torch.uint8), expected_bits)
    assert torch.equal(unpack_codes(new.weight).unflatten(-1, (-1, 16)), expected_codes)


@bounded
@given(weights())
def test_quantizing_a_decoded_weight_again(case: tuple[torch.Tensor, float]) -> None:
    """dequantize(quantize(x)) is idempotent but for the named blocks, and always from the second time on."""
    w, scale = case
    first = quantize_weight(w, scale)
    second = quantize_weight(dequantize(*first), scale)
    assert_requantized(first, second, is_weight=True)
    third = quantize_weight(dequantize(*second), scale)
    assert dequantize(*third).equal(dequantize(*second))


@bounded
@given(weights())
def test_quantizing_a_decoded_activation_again(case: tuple[torch.Tensor, float]) -> None:
    x, scale = case[0], scalar(case[1])
    first = PackedTensor(*quantize_activation(x, scale), scale)
    second = PackedTensor(*quantize_activation(dequantize(*first), scale), scale)
    assert_requantized(first, second, is_weight=False)
    third = PackedTensor(*quantize_activation(dequantize(*second), scale), scale)
    assert dequantize(*third).equal(dequantize(*second))


@pytest.mark.parametrize(("units", "second_units"), [(1.5, 1), (1.6, 1), (5 / 3 - 1e-6, 1), (5 / 3 + 1e-6, 2)], ids=str)
def test_the_one_range_in_which_a_weight_is_not_kept(units: float, second_units: int) -> None:
    """amax / (6 * tensor scale) from 1.5 to 5/3 units of 2^-9: scale 2 units and code 4, then scale 1 unit and code 6."""
    w = torch.zeros(1, 16)
    w[0, 3] = units * 6 * 2.0**-9
    first = quantize_weight(w, 1.0)
    again = quantize_weight(dequantize(*first), 1.0)
    assert first.weight_scale.float().item() == 2 * 2.0**-9
    assert again.weight_scale.float().item() == second_units * 2.0**-9
    assert dequantize(*again).equal(dequantize(*first)) == (second_units == 2)


@bounded
@given(weights(max_scale=448.0))
def test_with_its_own_tensor_scale_a_weight_keeps_codes_and_scales(case: tuple[torch.Tensor, float]) -> None:
    """The tensor scale itself may move: 6 * (448 * s) / 2688 is rounded three times, each by 2^-24 at most."""
    first = quantize_weight(case[0])
    second = quantize_weight(dequantize(*first))
    assert_requantized(first, second, is_weight=True)
    assert abs(second.weight_scale_2.double() / first.weight_scale_2.double() - 1) <= 3.01 * 2.0**-24


def test_weights_and_activations_differ_in_blocks_without_a_scale_alone() -> None:
    w = torch.from_numpy(np.ldexp(np.float32(6), np.arange(-14, 9))[:, None] * np.linspace(1, -1, 16)).float()
    w = torch.cat((w, torch.zeros(2, 16), numerics.random_x(40, 16, spread=2.0).float()))
    weight, activation = quantize_weight(w, 1.0), PackedTensor(*quantize_activation(w, scalar(1.0)), scalar(1.0))
    raw = w.abs().amax(-1) / 6
    differs = raw <= 2.0**-10
    assert 0 < int(differs.sum()) < 10
    for ours, theirs in zip(weight[:2], activation[:2], strict=True):
        assert same_bits(ours[~differs], theirs[~differs])
    bits = weight.weight_scale.view(torch.uint8)[differs, 0]
    assert bits.tolist() == [0x38 if value == 0 else 1 for value in raw[differs].tolist()]
    assert activation.weight_scale.view(torch.uint8)[differs].eq(0).all()
    assert activation.weight[differs].eq(0).all()
    # A floored scale keeps what it can: here half of its smallest value and more.
    assert weight.weight[differs].ne(0).any()
