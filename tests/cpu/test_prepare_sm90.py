"""Preparing weights for the sm90 GEMM: every bit's place, what a thread decodes, back again, and memory and time."""

import numerics
import numpy as np
import pytest
import torch
from test_prepare import LiveBytes, as_bytes, scales_of

from cutedsl import prepare_sm90
from cutedsl.prepare_sm90 import prepare_experts, prepare_linear, restore_experts
from cutedsl.runners import pack_matrix


def codes_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Packed codes whose last size is K."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)


def zeroed(weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Codes with those of blocks without a scale set to 0."""
    blocks = weight.view(*weight_scale.shape, 8)
    return torch.where((as_bytes(weight_scale) != 0).unsqueeze(-1), blocks, 0).view(weight.shape)


def words_of(block: np.ndarray) -> np.ndarray:
    """The words of a block, (kh, thread, j), from its 4096 bytes."""
    return block.view("<u4").reshape(2, 128, 4)


def rotated(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 rotated to the right."""
    return words >> np.uint32(bits) | words << np.uint32(32 - bits)


def scale_bytes(weight_scale: torch.Tensor) -> np.ndarray:
    """Prepared scales, flat, each in a byte of its own again."""
    return rotated(weight_scale.numpy().reshape(-1).view("<u4"), 4).view(np.uint8)


# ---- layout ---------------------------------------------------------------------------------------------------------


def code_in(word: int, odd: int, place: int) -> int:
    """The code of even or odd k that a word holds at a place, bit by bit."""
    bits = {0: (9, 2, 1, 0), 1: (13, 6, 5, 4), 2: (19, 12, 11, 10), 3: (15, 8, 7, 14)}[place]
    return sum((word >> (bit + 16 * odd) % 32 & 1) << (3 - i) for i, bit in enumerate(bits))


def test_every_code_is_in_its_place() -> None:
    """Two experts of 128 x 256: four blocks each, all of them read by hand."""
    weight, scale = codes_of(2, 128, 256), scales_of(2, 128, 256)
    codes = numerics.unpack(zeroed(weight, scale))
    operand = prepare_experts(weight, scale, torch.ones(2))
    blocks = operand.weight.numpy().reshape(2, 2, 2, 4096)
    for e, block_row, block_k in np.ndindex(2, 2, 2):
        words = words_of(blocks[e, block_row, block_k])
        for kh, thread, j, odd in np.ndindex(*words.shape, 2):
            w, g, t = thread // 32, thread % 32 // 4, thread % 4
            row, k = 64 * block_row + 16 * w + g, 128 * block_k + 64 * kh + 16 * j + 2 * t + odd
            found = [code_in(int(words[kh, thread, j]), odd, place) for place in range(4)]
            assert found == [codes[e, row, k], codes[e, row + 8, k], codes[e, row, k + 8], codes[e, row + 8, k + 8]]


def test_every_scale_is_in_its_place() -> None:
    weight, scale = codes_of(2, 128, 256), scales_of(2, 128, 256)
    before = numerics.scale_bits(scale).copy()
    blocks = scale_bytes(prepare_experts(weight, scale, torch.ones(2)).weight_scale).reshape(2, 2, 2, 512)
    for e, row, column in np.ndindex(before.shape):
        w, h, g = row % 64 // 16, row % 16 // 8, row % 8
        found = blocks[e, row // 64, column // 8, (8 * w + g) * 16 + 8 * h + column % 8]
        value = numerics.E4M3[before[e, row, column]]
        if value == 0:
            assert found == 0
        else:
            exponent = int(np.floor(np.log2(value)))
            assert found >> 3 == exponent + 21
            assert (1 + (found & 7) / 8) * 2.0**exponent == value


def test_every_scale_has_one_byte() -> None:
    """All 126 positive scales, subnormals among them, and 0: different bytes, in the scales' order."""
    scale = torch.arange(128, dtype=torch.uint8)[:, None].clamp(max=126).view(torch.float8_e4m3fn).repeat(1, 8)[None]
    prepared = scale_bytes(prepare_experts(codes_of(1, 128, 128), scale, torch.ones(1)).weight_scale)
    found = torch.from_numpy(prepared).view(2, 4, 8, 2, 8)
    found = found.permute(0, 1, 3, 2, 4).reshape(128, 8)
    assert found.eq(found[:, :1]).all()
    assert found[0, 0] == 0
    assert found[1, 0] == (-9 + 21) << 3
    assert found[126, 0] == (8 + 21) << 3 | 6
    assert (found[1:127, 0].int().diff() > 0).all()


def bf16(bits: np.ndarray) -> np.ndarray:
    """float64 values of BF16 numbers given by their bits; subnormals count."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def test_what_a_thread_makes_of_it() -> None:
    """Shifts and masks as on the GPU: sign to bit 15, magnitude to 8:6; the scale's byte under three exponent bits."""
    packed = numerics.random_packed(1, 64, 128, seed=5)
    operand = prepare_experts(packed.weight.clone(), packed.weight_scale.clone(), torch.ones(1))
    words = words_of(operand.weight.numpy().reshape(4096))
    fourth = words & 0x81808180 | words >> np.uint32(8) & 0x00400040
    codes = [
        words << np.uint32(6) & 0x81C081C0,
        words << np.uint32(2) & 0x81C081C0,
        rotated(words, 4) & 0x81C081C0,
        fourth,
    ]
    # Two of the scales for 16 k each, of rows g and g + 8.
    word = operand.weight_scale.numpy().reshape(4, 8, 2, 8).view("<u4")
    pairs = [(part & 0x0FF00FF0 | 0x70007000).view("<u2").reshape(4, 8, 2, 2, 2) for part in (word, rotated(word, 8))]
    scales = np.stack(pairs, axis=-1).reshape(4, 8, 2, 2, 4)
    for place, bits in enumerate(codes):
        h, hi = place % 2, place // 2
        # (kh, w, g, t, j, odd); scales (w, g, kh, j) of half h.
        number = bf16(bits.view("<u2")).reshape(2, 4, 8, 4, 4, 2)
        # A code without a scale is 0 itself.
        found = number * bf16(scales[:, :, h]).transpose(2, 0, 1, 3)[:, :, :, None, :, None] * 2.0**8
        k = (
            np.arange(2)[:, None, None, None] * 64
            + np.arange(4)[:, None] * 16
            + np.arange(4)[:, None, None] * 2
            + 8 * hi
        )
        k = k + np.arange(2)
        rows = 16 * np.arange(4)[:, None] + np.arange(8) + 8 * h
        expected = packed.values[0][rows[None, :, :, None, None, None], k[:, None, None]]
        np.testing.assert_array_equal(found, expected)


def test_gate_and_up_rows_alternate_by_eight() -> None:
    weight, scale = codes_of(2, 96, 128), scales_of(2, 96, 128)
    given, given_scale = zeroed(weight, scale), scale.clone()
    operand = prepare_experts(weight, scale, torch.ones(2, 2), gate_up=True)
    packed, packed_scale = restore_experts(operand, 96, 128)
    for b in range(6):
        for r in range(8):
            assert torch.equal(packed[:, 16 * b + r], given[:, 8 * b + r]), "gate"
            assert torch.equal(packed[:, 16 * b + 8 + r], given[:, 48 + 8 * b + r]), "up"
            assert torch.equal(as_bytes(packed_scale[:, 16 * b + r]), as_bytes(given_scale[:, 8 * b + r]))
            assert torch.equal(as_bytes(packed_scale[:, 16 * b + 8 + r]), as_bytes(given_scale[:, 48 + 8 * b + r]))


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(64, 128), (192, 384), (32, 128), (96, 192), (208, 16)])
def test_there_and_back(monkeypatch: pytest.MonkeyPatch, rows: int, k: int, gate_up: bool) -> None:
    # More chunks than one, and a last one that is smaller.
    monkeypatch.setattr(prepare_sm90, "CHUNK_BYTES", 2 * 64 * 64)
    weight, scale = codes_of(3, rows, k, seed=rows), scales_of(3, rows, k, seed=k)
    given, given_scale = zeroed(weight, scale), scale.clone()
    alpha = torch.rand(3, 2) if gate_up else torch.rand(3)
    operand = prepare_experts(weight, scale, alpha, gate_up)
    padded_rows, padded_k = prepare_sm90.padded_sizes(rows, k)
    assert (padded_rows, padded_k) == (-(-rows // 64) * 64, -(-k // 128) * 128)
    assert operand.weight.shape == (3, padded_rows, padded_k // 2)
    assert operand.weight_scale.shape == (3, padded_rows, padded_k // 16)
    assert operand.weight.dtype == operand.weight_scale.dtype == torch.uint8
    in_place = (padded_rows, padded_k) == (rows, k)
    assert (operand.weight.data_ptr() == weight.data_ptr()) == in_place
    assert (operand.weight_scale.data_ptr() == scale.data_ptr()) == in_place
    assert operand.alpha.shape == (3, 2 if gate_up else 1)
    assert torch.equal(operand.alpha.flatten(), alpha.flatten())
    # Padding adds nothing but zeros.
    assert int((scale_bytes(operand.weight_scale) != 0).sum()) == int(as_bytes(given_scale).ne(0).sum())
    restored, restored_scale = restore_experts(operand, rows, k, gate_up)
    assert torch.equal(restored, given)
    assert torch.equal(as_bytes(restored_scale), as_bytes(given_scale))


def test_codes_without_a_scale_become_zero() -> None:
    weight, scale = torch.full((1, 64, 64), 0xFF, dtype=torch.uint8), torch.ones(1, 64, 8).to(torch.float8_e4m3fn)
    scale[0, 3, 5] = 0
    operand = prepare_experts(weight, scale, torch.ones(1))
    restored, _ = restore_experts(operand, 64, 128)
    assert restored[0, 3, 40:48].eq(0).all()
    assert int(restored.eq(0xFF).sum()) == 64 * 64 - 8


# ---- linears --------------------------------------------------------------------------------------------------------


def linear_matrix(activations: str) -> tuple:
    packed = numerics.random_packed(256 + 128 + 72, 128)
    given = packed.weight.clone(), packed.weight_scale.clone()
    scales = torch.tensor([3.0, 5.0, 7.0]), torch.tensor([0.5, 0.25, 0.5])
    return pack_matrix(packed.weight, packed.weight_scale, *scales, [256, 128, 72], activations), given


def test_linear_by_scale_group() -> None:
    matrix, (weight, scale) = linear_matrix("nvfp4")
    alpha = matrix.alpha.clone()
    groups = prepare_linear(matrix)
    assert [(group.input_scale.tolist(), [span[:2] for span in group.spans]) for group in groups] == [
        ([0.5], [(0, 256), (384, 456)]),
        ([0.25], [(256, 384)]),
    ]
    for start, end, operand in (span for group in groups for span in group.spans):
        rows = end - start
        assert operand.weight.shape == (1, -(-rows // 64) * 64, 64)
        assert (operand.weight.data_ptr() == matrix.weight[start].data_ptr()) == (rows % 64 == 0)
        assert torch.equal(operand.alpha[0], alpha[start:end])
        restored, restored_scale = restore_experts(operand, rows, 128)
        assert torch.equal(restored[0], zeroed(weight, scale)[start:end])
        assert torch.equal(as_bytes(restored_scale[0]), as_bytes(scale[start:end]))


def test_a_linear_whose_activations_stay_is_one_group() -> None:
    matrix, (weight, scale) = linear_matrix("bf16")
    ((input_scale, ((start, end, operand),)),) = prepare_linear(matrix)
    assert (input_scale, start, end) == (None, 0, 456)
    assert torch.equal(operand.alpha[0], torch.tensor([3.0] * 256 + [5.0] * 128 + [7.0] * 72))
    restored, _ = restore_experts(operand, 456, 128)
    assert torch.equal(restored[0], zeroed(weight, scale))


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_at_most_one_experts_copy_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts with rows and columns a quarter of V4-Pro's."""
    experts, hidden, intermediate = 8, 1792, 768
    w13, w2 = codes_of(experts, 2 * intermediate, hidden), codes_of(experts, hidden, intermediate)
    w13_scale, w2_scale = scales_of(experts, 2 * intermediate, hidden), scales_of(experts, hidden, intermediate)
    ones, pairs = torch.ones(experts), torch.ones(experts, 2)
    monkeypatch.setattr(prepare_sm90, "CHUNK_BYTES", 1 << 18)
    # Tables are kept, and made by the first call.
    prepare_experts(codes_of(1, 64, 128), scales_of(1, 64, 128), torch.ones(1))
    with LiveBytes() as meter:
        first = prepare_experts(w13, w13_scale, pairs, gate_up=True)
        second = prepare_experts(w2, w2_scale, ones)
    assert {first.weight.data_ptr(), first.weight_scale.data_ptr()} == {w13.data_ptr(), w13_scale.data_ptr()}
    assert {second.weight.data_ptr(), second.weight_scale.data_ptr()} == {w2.data_ptr(), w2_scale.data_ptr()}
    assert 1 << 18 <= meter.peak <= 5 << 18
    assert meter.peak < w13[0].numel()
    assert meter.live == 0


def test_chunks_bound_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = codes_of(2, 1024, 1024), scales_of(2, 1024, 1024)
    monkeypatch.setattr(prepare_sm90, "CHUNK_BYTES", 1 << 16)
    with LiveBytes() as meter:
        prepare_experts(weight, scale, torch.ones(2))
    assert 1 << 16 <= meter.peak <= 5 << 16


def test_there_is_no_loop_over_blocks_or_experts() -> None:
    weight, scale = codes_of(64, 64, 128), scales_of(64, 64, 128)
    prepare_experts(weight[:1].clone(), scale[:1].clone(), torch.ones(1))

    class Calls(LiveBytes):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Calls() as one:
        prepare_experts(weight[:1].clone(), scale[:1].clone(), torch.ones(1))
    with Calls() as many:
        prepare_experts(weight, scale, torch.ones(64))
    assert many.count <= one.count


# ---- refusals -------------------------------------------------------------------------------------------------------


def spoiled(scale: torch.Tensor, byte: int) -> torch.Tensor:
    as_bytes(scale)[-1, -1, -1] = byte
    return scale


@pytest.mark.parametrize(
    ("weight", "scale", "gate_up", "match"),
    [
        (codes_of(2, 64, 128), spoiled(scales_of(2, 64, 128), 0x7F), False, "NaN or negative values; was it loaded"),
        (codes_of(2, 64, 128), spoiled(scales_of(2, 64, 128), 0x81), True, "NaN or negative"),
        (codes_of(2, 64, 256)[..., ::2], scales_of(2, 64, 128), False, r"weight has shape .* in place"),
        (codes_of(2, 64, 128), scales_of(2, 64, 256)[..., ::2], False, r"weight_scale has shape .*contiguous"),
        (codes_of(2, 40, 128), scales_of(2, 40, 128), True, r"shape \(2, 40, 64\), .*a multiple of 8 each"),
    ],
)
def test_what_cannot_be_prepared_is_left_alone(
    weight: torch.Tensor, scale: torch.Tensor, gate_up: bool, match: str
) -> None:
    before = weight.clone(), as_bytes(scale).clone()
    with pytest.raises(ValueError, match=f"prepare_experts: .*{match}"):
        prepare_experts(weight, scale, torch.ones(2), gate_up)
    assert torch.equal(weight, before[0])
    assert torch.equal(as_bytes(scale), before[1])


def test_a_linear_with_a_bad_scale_is_left_alone() -> None:
    """The bad one is in the last run of columns, after others would have been changed."""
    matrix, (weight, _) = linear_matrix("nvfp4")
    as_bytes(matrix.weight_scale)[300, 0] = 0x7F
    with pytest.raises(ValueError, match="prepare_linear: weight_scale holds NaN"):
        prepare_linear(matrix)
    assert torch.equal(matrix.weight, weight)
