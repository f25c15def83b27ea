"""The 128x4 layout in which tensor cores take block scales, and its inverse: for a matrix, a stack, ragged groups.

The hard part is the padding. A tile is 512 bytes, 128 rows by 4 scales, and a matrix of any other size is padded up to
whole tiles, with zeros: a kernel reads the padding, and a stray NaN there would reach real rows. In a ragged batch each
group starts a tile of its own, so where a group starts depends on the sizes of all before it; nothing of that is read
back to the host.

Within a tile a scale's place is (row % 32) * 16 + (row // 32) * 4 + column, so 4 neighbours of a row stay together and
are moved as one int32.
"""

from typing import NamedTuple

import torch

TILE_ROWS = 128
TILE_COLUMNS = 4
TILE_BYTES = TILE_ROWS * TILE_COLUMNS
# The rows of a tile are 4 runs of 32; the runs lie side by side.
_RUN_ROWS = 32
_NUM_RUNS = TILE_ROWS // _RUN_ROWS


class GroupedScale(NamedTuple):
    """Swizzled scales of ragged groups.

    Attributes:
        scale: (P, columns up to 4) - group g's tiles start at row padded_offsets[g]; the rest is 0.
        padded_offsets: (G + 1,) int64 - first padded row of each group, a multiple of 128, and the end of the last.
    """

    scale: torch.Tensor
    padded_offsets: torch.Tensor


def padded_shape(num_rows: int, num_columns: int) -> tuple[int, int]:
    """(num_rows up to a multiple of 128, num_columns up to a multiple of 4).

    Args:
        num_rows: M, at least 0.
        num_columns: K/16, at least 0.

    Returns:
        Rows and columns of the swizzled scale.

    Numerics: integers.
    """
    return _round_up(num_rows, TILE_ROWS), _round_up(num_columns, TILE_COLUMNS)


def swizzled_offset(row: torch.Tensor, column: torch.Tensor, num_columns: int) -> torch.Tensor:
    """((row // 128) * tiles_per_row + column // 4) * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4.

    Args:
        row: any shape, integers - rows, 0 or more.
        column: integers that broadcast with row - block index along K, 0 .. num_columns - 1.
        num_columns: K/16 of the matrix, before padding.

    Returns:
        Byte offsets into the swizzled scale, of the broadcast shape.

    Numerics: integers. Graph-safe.
    """
    tiles_per_row = _round_up(num_columns, TILE_COLUMNS) // TILE_COLUMNS
    tile = row // TILE_ROWS * tiles_per_row + column // TILE_COLUMNS
    in_tile = row % _RUN_ROWS * (TILE_BYTES // _RUN_ROWS) + row % TILE_ROWS // _RUN_ROWS * TILE_COLUMNS
    return tile * TILE_BYTES + in_tile + column % TILE_COLUMNS


def swizzle_block_scale(scale: torch.Tensor) -> torch.Tensor:
    """out.flatten()[swizzled_offset(m, j)] = scale[m, j], everything else 0.

    Args:
        scale: (..., M, K/16) e4m3 or another type of one byte - block scales, row-major; M and K/16 may be any, also 0.

    Returns:
        (..., M up to 128, K/16 up to 4) of scale's type, contiguous; each matrix of a stack is padded for itself.

    Raises:
        TypeError: an element is not one byte.
        ValueError: scale has fewer than 2 dimensions.

    Layout: 128x4 tiles, see the module. Numerics: bytes are moved. Graph-safe apart from its allocations.
    """
    _check_scale("swizzle_block_scale", scale, at_least=2)
    *stack, num_rows, num_columns = scale.shape
    padded = scale.new_zeros((*stack, *padded_shape(num_rows, num_columns)), dtype=torch.uint8)
    padded[..., :num_rows, :num_columns] = scale.view(torch.uint8)
    return _tile(padded).view(scale.dtype)


def unswizzle_block_scale(swizzled: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """out[m, j] = swizzled.flatten()[swizzled_offset(m, j)].

    Args:
        swizzled: (..., num_rows up to 128, num_columns up to 4), one byte an element - as swizzle_block_scale gives it.
        num_rows: M without padding.
        num_columns: K/16 without padding.

    Returns:
        (..., M, K/16) of swizzled's type, contiguous. Padding is dropped unseen.

    Raises:
        TypeError: an element is not one byte.
        ValueError: the shape is not that of a swizzled num_rows x num_columns scale.

    Layout: 128x4 tiles, see the module. Numerics: bytes are moved. Graph-safe apart from its allocations.
    """
    _check_scale("unswizzle_block_scale", swizzled, at_least=2)
    expected = padded_shape(num_rows, num_columns)
    if tuple(swizzled.shape[-2:]) != expected:
        raise ValueError(
            f"unswizzle_block_scale: swizzled has shape {tuple(swizzled.shape)}, expected (..., {expected[0]}, "
            f"{expected[1]}) for {num_rows} x {num_columns} scales; is it swizzled, and of this matrix?"
        )
    return _untile(swizzled.view(torch.uint8))[..., :num_rows, :num_columns].contiguous().view(swizzled.dtype)


def max_padded_rows(num_rows: int, num_groups: int) -> int:
    """The most rows that num_rows in num_groups groups can take up: each group that is not empty adds at most 127.

    Args:
        num_rows: T, rows of all groups.
        num_groups: G.

    Returns:
        A multiple of 128, known without the sizes of the groups.

    Numerics: integers.
    """
    return (num_rows + (TILE_ROWS - 1) * min(num_groups, num_rows)) // TILE_ROWS * TILE_ROWS


def swizzle_grouped_block_scale(scale: torch.Tensor, group_sizes: torch.Tensor) -> GroupedScale:
    """Each group's rows as swizzle_block_scale gives them, one group's tiles after another's.

    Args:
        scale: (T, K/16) e4m3 or another type of one byte - block scales of all rows, sorted by group.
        group_sizes: (G,) int32 or int64, on scale's device - rows of each group, 0 or more, in all at most T. Values are
            not checked, as that would read them back. Rows after the last group are left out.

    Returns:
        GroupedScale with P = max_padded_rows(T, G), so that shapes do not depend on the sizes.

    Raises:
        TypeError: an element of scale is not one byte, or group_sizes are not int32 or int64.
        ValueError: scale is not a matrix, or group_sizes not a vector on scale's device.

    Layout: 128x4 tiles, see the module. Numerics: bytes are moved. Nothing is read back; graph-safe apart from its
    allocations.
    """
    _check_groups("swizzle_grouped_block_scale", scale, group_sizes)
    num_rows, num_columns = scale.shape
    num_padded = max_padded_rows(num_rows, len(group_sizes))
    rows, padded_offsets = _padded_rows(group_sizes, num_rows, num_padded)
    # One row more than there are: it takes the rows after the last group.
    padded = scale.new_zeros((num_padded + 1, _round_up(num_columns, TILE_COLUMNS)), dtype=torch.uint8)
    padded[rows, :num_columns] = scale.view(torch.uint8)
    return GroupedScale(_tile(padded[:-1]).view(scale.dtype), padded_offsets)


def unswizzle_grouped_block_scale(
    swizzled: torch.Tensor, group_sizes: torch.Tensor, num_rows: int, num_columns: int
) -> torch.Tensor:
    """The scale that swizzle_grouped_block_scale took.

    Args:
        swizzled: (max_padded_rows(T, G), num_columns up to 4), one byte an element.
        group_sizes: (G,) int32 or int64, on swizzled's device - rows of each group, in all at most T.
        num_rows: T.
        num_columns: K/16 without padding.

    Returns:
        (T, K/16) of swizzled's type; rows after the last group are 0.

    Raises:
        TypeError: an element of swizzled is not one byte, or group_sizes are not int32 or int64.
        ValueError: swizzled has another shape, or group_sizes is not a vector on swizzled's device.

    Layout: 128x4 tiles, see the module. Numerics: bytes are moved. Nothing is read back; graph-safe apart from its
    allocations.
    """
    _check_groups("unswizzle_grouped_block_scale", swizzled, group_sizes)
    num_padded = max_padded_rows(num_rows, len(group_sizes))
    expected = (num_padded, _round_up(num_columns, TILE_COLUMNS))
    if tuple(swizzled.shape) != expected:
        raise ValueError(
            f"unswizzle_grouped_block_scale: swizzled has shape {tuple(swizzled.shape)}, expected {expected} for "
            f"{num_rows} x {num_columns} scales in {len(group_sizes)} groups"
        )
    rows, _ = _padded_rows(group_sizes, num_rows, num_padded)
    padded = swizzled.new_zeros((num_padded + 1, expected[1]), dtype=torch.uint8)
    padded[:-1] = _untile(swizzled.view(torch.uint8))
    return padded[rows, :num_columns].view(swizzled.dtype)


def _padded_rows(group_sizes: torch.Tensor, num_rows: int, num_padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (T,) the padded row of each row, num_padded for a row after the last group, and padded_offsets (G + 1,)."""
    sizes = torch.nn.functional.pad(group_sizes.long(), (1, 0))
    offsets = sizes.cumsum(0)
    padded_offsets = ((sizes + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS).cumsum(0)
    row = torch.arange(num_rows, device=group_sizes.device)
    # The group of a row is the last one that starts at or before it; len(group_sizes) says "after the last group".
    group = torch.searchsorted(offsets, row, right=True) - 1
    padded = row + (padded_offsets - offsets)[group]
    return torch.where(group < len(group_sizes), padded, num_padded), padded_offsets


def _tile(padded: torch.Tensor) -> torch.Tensor:
    """Returns row-major bytes (..., rows, columns) of whole tiles in swizzled order, of the same shape."""
    *stack, rows, columns = padded.shape
    runs = (
        padded.reshape(-1)
        .view(torch.int32)
        .view(*stack, rows // TILE_ROWS, _NUM_RUNS, _RUN_ROWS, columns // TILE_COLUMNS)
    )
    return runs.transpose(-3, -1).reshape(-1).view(torch.uint8).view(*stack, rows, columns)


def _untile(swizzled: torch.Tensor) -> torch.Tensor:
    """The inverse of _tile."""
    *stack, rows, columns = swizzled.shape
    # A copy always: a slice of a larger buffer may start anywhere, an int32 may not.
    tiles = swizzled.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.int32)
    tiles = tiles.view(*stack, rows // TILE_ROWS, columns // TILE_COLUMNS, _RUN_ROWS, _NUM_RUNS)
    return tiles.transpose(-3, -1).reshape(-1).view(torch.uint8).view(*stack, rows, columns)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _check_scale(function: str, scale: torch.Tensor, at_least: int) -> None:
    if scale.element_size() != 1:
        raise TypeError(
            f"{function}: scales are {scale.dtype}, expected one byte each; quantize first, or view as e4m3"
        )
    if scale.ndim < at_least:
        raise ValueError(f"{function}: scales have shape {tuple(scale.shape)}, expected (..., M, K/16)")


def _check_groups(function: str, scale: torch.Tensor, group_sizes: torch.Tensor) -> None:
    _check_scale(function, scale, at_least=2)
    if scale.ndim != 2:
        raise ValueError(f"{function}: scales have shape {tuple(scale.shape)}, expected (T, K/16); flatten the rows")
    if group_sizes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: group_sizes are {group_sizes.dtype}, expected torch.int32 or torch.int64")
    if group_sizes.ndim != 1 or group_sizes.device != scale.device:
        raise ValueError(
            f"{function}: group_sizes have shape {tuple(group_sizes.shape)} on {group_sizes.device}, "
            f"expected (G,) on {scale.device}"
        )
