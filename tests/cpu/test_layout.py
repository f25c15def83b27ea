"""The swizzled scale layout against a loop over the formula, the steps of the PTX picture, and vLLM's own function."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale

from cutedsl import layout
from cutedsl.layout import (
    max_padded_rows,
    padded_shape,
    swizzle_block_scale,
    swizzle_grouped_block_scale,
    swizzled_offset,
    unswizzle_block_scale,
    unswizzle_grouped_block_scale,
)

E4M3 = torch.float8_e4m3fn
# Edges of tiles, and scales of DeepSeek-V4: expert gate and up, down, kv, q_a, and one hidden size four times wide.
SIZES = [(m, k) for m in (0, 1, 127, 128, 129) for k in (0, 1, 3, 4, 5)]
MODEL_SIZES = [(3072, 448), (7168, 192), (512, 448), (1536, 448), (24, 1792), (2048, 256)]

bounded = settings(max_examples=60, deadline=None, derandomize=True)


def scales(*shape: int, seed: int = 0) -> torch.Tensor:
    """Bytes 1..255, so that no real scale can be taken for padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def by_loop(scale: torch.Tensor) -> np.ndarray:
    """One matrix by the formula of the format, a scale at a time; flat."""
    rows, columns = scale.shape
    k64 = (columns + 3) // 4
    out = np.zeros((rows + 127) // 128 * k64 * 512, np.uint8)
    for m, row in enumerate(scale.tolist()):
        for k, value in enumerate(row):
            out[((m // 128) * k64 + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4] = value
    return out


def by_lanes(scale: torch.Tensor) -> np.ndarray:
    """One matrix by the hardware's view: a tile is 32 lanes of 16 bytes, a lane holds rows l, l + 32, l + 64, l + 96."""
    rows, columns = scale.shape
    padded = np.zeros(padded_shape(rows, columns), np.uint8)
    padded[:rows, :columns] = scale.numpy()
    tiles = []
    for top in range(0, padded.shape[0], 128):
        for left in range(0, padded.shape[1], 4):
            lanes = [padded[top + lane : top + 128 : 32, left : left + 4].reshape(16) for lane in range(32)]
            tiles.append(np.concatenate(lanes))
    return np.concatenate([np.empty(0, np.uint8), *tiles])


# --- one matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (300, 7), (512, 48)], ids=str)
def test_swizzle_equals_two_derivations(rows: int, columns: int) -> None:
    scale = scales(rows, columns)
    result = swizzle_block_scale(scale)
    assert result.shape == padded_shape(rows, columns)
    assert result.is_contiguous()
    np.testing.assert_array_equal(result.numpy().reshape(-1), by_loop(scale))
    np.testing.assert_array_equal(result.numpy().reshape(-1), by_lanes(scale))


@pytest.mark.parametrize(("rows", "columns"), [(129, 5), *MODEL_SIZES], ids=str)
def test_swizzle_equals_vllms(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM's function ends with .cuda(); here it stays where it is.
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    scale = scales(rows, columns).view(E4M3)
    assert same_bytes(swizzle_block_scale(scale), swizzle_blockscale(scale))
    stack = scales(3, rows, columns, seed=1).view(E4M3)[:, : rows // 2]
    assert same_bytes(swizzle_block_scale(stack), swizzle_blockscale(stack))


@pytest.mark.parametrize(("rows", "columns"), [*SIZES, *MODEL_SIZES], ids=str)
def test_offset_is_where_swizzle_puts_it(rows: int, columns: int) -> None:
    scale = scales(rows, columns)
    offset = swizzled_offset(torch.arange(rows)[:, None], torch.arange(columns), columns)
    flat = swizzle_block_scale(scale).reshape(-1)
    assert torch.equal(flat[offset], scale)
    assert offset.unique().numel() == scale.numel()
    assert int(flat.ne(0).sum()) == scale.numel()


def test_offset_of_known_places() -> None:
    """By hand, 448 scales a row: 112 tiles of 512 bytes for each 128 rows."""
    row, column = torch.tensor([0, 0, 1, 32, 127, 128, 130]), torch.tensor([1, 4, 0, 0, 447, 0, 6])
    expected = [1, 512, 16, 4, 111 * 512 + 31 * 16 + 3 * 4 + 3, 112 * 512, 113 * 512 + 2 * 16 + 2]
    assert swizzled_offset(row, column, 448).tolist() == expected


def test_padding_is_zero_whatever_memory_held() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        # In this mode torch fills memory that it hands out unwritten, with 255 for bytes.
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3, dtype=torch.uint8).tolist() == [255] * 3
        result = swizzle_block_scale(scales(129, 5))
        grouped = swizzle_grouped_block_scale(scales(131, 5), torch.tensor([1, 0, 130])).scale
    finally:
        torch.use_deterministic_algorithms(before)
    assert int(result.eq(0).sum()) == 256 * 8 - 129 * 5
    assert int(grouped.eq(0).sum()) == grouped.numel() - 131 * 5


@bounded
@given(st.integers(0, 300), st.integers(0, 20), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 99))
def test_unswizzle_inverts_swizzle(rows: int, columns: int, stack: list[int], seed: int) -> None:
    scale = scales(*stack, rows, columns, seed=seed)
    assert torch.equal(unswizzle_block_scale(swizzle_block_scale(scale), rows, columns), scale)


@pytest.mark.parametrize(("rows", "columns"), MODEL_SIZES, ids=str)
def test_unswizzle_at_model_sizes_drops_poisoned_padding(rows: int, columns: int) -> None:
    scale = scales(rows - 3, columns - 1).view(E4M3)
    swizzled = swizzle_block_scale(scale)
    swizzled.view(torch.uint8)[swizzled.view(torch.uint8) == 0] = 0x7F
    assert same_bytes(unswizzle_block_scale(swizzled, rows - 3, columns - 1), scale)


def test_strided_and_misaligned_inputs() -> None:
    wide = scales(10, 140, 11)
    view = wide[::2, 3:133, 1::2]
    expected = swizzle_block_scale(view.contiguous())
    assert torch.equal(swizzle_block_scale(view), expected)
    shifted = torch.empty(expected.numel() + 1, dtype=torch.uint8)[1:].view(expected.shape)
    shifted.copy_(expected)
    assert torch.equal(unswizzle_block_scale(shifted, *view.shape[-2:]), view)


# --- ragged groups ---------------------------------------------------------------------------------------------------

GROUPS = [
    ([3, 0, 130, 0], 133),
    ([128, 128], 256),
    ([127, 1, 129], 257),
    ([0, 0, 0], 0),
    ([], 0),
    ([], 5),
    ([7, 0], 20),
    ([0] * 300 + [1] * 6 + [0] * 78, 6),
]


def assert_grouped(scale: torch.Tensor, sizes: list[int], dtype: torch.dtype) -> None:
    group_sizes = torch.tensor(sizes, dtype=dtype)
    result = swizzle_grouped_block_scale(scale, group_sizes)
    assert result.scale.shape == (max_padded_rows(len(scale), len(sizes)), padded_shape(0, scale.shape[1])[1])
    start, first = 0, 0
    for group, size in enumerate(sizes):
        assert int(result.padded_offsets[group]) == first
        part = swizzle_block_scale(scale[start : start + size])
        assert torch.equal(result.scale[first : first + len(part)], part)
        start, first = start + size, first + len(part)
    assert result.padded_offsets.shape == (len(sizes) + 1,)
    assert int(result.padded_offsets[-1]) == first <= len(result.scale)
    assert result.scale[first:].eq(0).all()
    back = unswizzle_grouped_block_scale(result.scale, group_sizes, *scale.shape)
    assert torch.equal(back[:start], scale[:start])
    assert back[start:].eq(0).all()


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 448])
@pytest.mark.parametrize(("sizes", "rows"), GROUPS, ids=lambda value: str(value)[:20])
def test_each_group_is_swizzled_for_itself(sizes: list[int], rows: int, columns: int) -> None:
    assert_grouped(scales(rows, columns), sizes, torch.int32)


@bounded
@given(st.lists(st.one_of(st.integers(0, 3), st.integers(120, 300)), max_size=8), st.integers(0, 9), st.integers(0, 5))
def test_any_groups(sizes: list[int], columns: int, num_extra_rows: int) -> None:
    assert_grouped(scales(sum(sizes) + num_extra_rows, columns), sizes, torch.int64)


def test_max_padded_rows_is_reached_and_never_passed() -> None:
    assert max_padded_rows(6, 384) == 6 * 128  # a token to each of 6 of 384 experts
    assert max_padded_rows(0, 9) == max_padded_rows(9, 0) // 128 == 0
    for rows in range(1, 300, 7):
        for groups in range(1, 5):
            # The worst split: all groups but one have a single row, if there are so many rows.
            alone = min(groups, rows) - 1
            assert max_padded_rows(rows, groups) == alone * 128 + padded_shape(rows - alone, 0)[0]


# --- any device, and what is refused ---------------------------------------------------------------------------------


def test_nothing_is_read_back_on_any_device() -> None:
    """A tensor on `meta` has no values: whatever reads one raises."""
    scale, sizes = torch.empty(130, 5, dtype=E4M3, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    swizzled, grouped = swizzle_block_scale(scale), swizzle_grouped_block_scale(scale, sizes).scale
    assert (swizzled.shape, swizzled.dtype) == ((256, 8), E4M3)
    assert (grouped.shape, grouped.dtype) == ((max_padded_rows(130, 3), 8), E4M3)
    assert unswizzle_block_scale(swizzled, 130, 5).shape == (130, 5)
    assert unswizzle_grouped_block_scale(grouped, sizes, 130, 5).shape == (130, 5)


@pytest.mark.parametrize(
    "function",
    [
        swizzle_block_scale,
        lambda s: unswizzle_block_scale(s, 128, 4),
        lambda s: swizzle_grouped_block_scale(s, torch.tensor([128])),
        lambda s: unswizzle_grouped_block_scale(s, torch.tensor([128]), 128, 4),
    ],
    ids=["swizzle", "unswizzle", "swizzle_grouped", "unswizzle_grouped"],
)
def test_scales_of_another_kind_raise(function) -> None:
    function(torch.zeros(128, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"scales are torch\.float32, expected one byte each"):
        function(torch.zeros(128, 4))
    with pytest.raises(ValueError, match=r"scales have shape \(512,\)"):
        function(torch.zeros(512, dtype=torch.uint8))


def test_unswizzle_raises_on_another_shape() -> None:
    for shape in [(129, 4), (256, 8), (128, 8)]:
        with pytest.raises(ValueError, match=r"expected \(\.\.\., 256, 4\) for 129 x 4 scales"):
            unswizzle_block_scale(torch.zeros(shape, dtype=torch.uint8), 129, 4)
    with pytest.raises(ValueError, match=r"expected \(256, 4\) for 129 x 4 scales in 1 groups"):
        unswizzle_grouped_block_scale(torch.zeros(128, 4, dtype=torch.uint8), torch.tensor([129]), 129, 4)


def test_grouped_raises() -> None:
    scale, sizes = scales(4, 4), torch.tensor([4])
    with pytest.raises(ValueError, match=r"expected \(T, K/16\)"):
        swizzle_grouped_block_scale(scale[None], sizes)
    with pytest.raises(TypeError, match=r"group_sizes are torch\.float32"):
        swizzle_grouped_block_scale(scale, sizes.float())
    for bad in (sizes[None], sizes.to("meta")):
        with pytest.raises(ValueError, match=r"group_sizes have shape .* expected \(G,\) on cpu"):
            swizzle_grouped_block_scale(scale, bad)


def test_a_tile_is_128_rows_of_4_scales() -> None:
    assert (layout.TILE_ROWS, layout.TILE_COLUMNS, layout.TILE_BYTES) == (128, 4, 512)
