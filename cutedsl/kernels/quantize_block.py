"""Device functions that quantize: 16 FP32 values to 16 E2M1 codes and one E4M3 scale, and where both belong in memory.

The hard part is that the bytes are those of `cutedsl.quantize.quantize_activation`. Its operations are done in its order,
each an FP32 operation rounded once: two divisions (not products with a reciprocal), subnormal numbers kept. Where the
hardware's conversions have rules of their own, the input is made such that they do not matter:
  - a conversion to E2M1 makes 6 of a NaN: a block without a positive finite divisor gets codes 0 instead;
  - it keeps the sign of a zero: -0.0 becomes +0.0 before, as the reference gives a zero code 0;
  - a conversion to E4M3 saturates at 448, which is the reference's clamp, and keeps a NaN.

Both an operator that quantizes and the epilogue of a GEMM call `store_block`, or `quantize_block` and store themselves:

    mCodes = quantize_block.block_codes(mCodes_packed)              # once: (rows, blocks of a row)
    mSF = quantize_block.swizzled_scales(mSF_bytes, num_blocks)     # once: (rows, blocks of a row up to 4)
    quantize_block.store_block(mCodes, mSF, row, block, values, tensor_scale)

A row whose number of blocks is no multiple of 4 has up to 3 scales behind its last. Who writes the row sets them to
zero_scale(): a tensor core multiplies them with codes 0, and 0 * NaN is NaN.
"""

from typing import Any

import cutlass
import torch
from cutlass import cute

from cutedsl.formats import NVFP4
from cutedsl.layout import TILE_BYTES, TILE_COLUMNS, TILE_ROWS

# Codes of a block are moved as one integer of this many bytes.
BLOCK_BYTES = NVFP4.block_size // NVFP4.codes_per_byte
# The rows of a scale tile are runs of 32 that lie side by side.
_RUN_ROWS = 32
# The compiler converts to types of 8 bits in units of 32 bits.
_E4M3_LANES = 4
_LARGEST = torch.finfo(torch.float32).max


@cute.jit
def quantize_block(values: Any, tensor_scale: cutlass.Float32) -> tuple[cutlass.Uint64, cutlass.Uint8]:
    """block_sf = e4m3(min(amax / (6 * tensor_scale), 448)), code = e2m1(value / (block_sf * tensor_scale)).

    Args:
        values: 16 FP32 - a tensor in registers, or a sequence, that integers index.
        tensor_scale: positive, and 6 * tensor_scale finite.

    Returns:
        The codes, element i in bits 4i .. 4i + 3, and the bits of the scale.

    Numerics: bit-identical to `quantize_activation` for all values, also NaN, infinity and zeros. (Were 6 * tensor_scale
    infinite, so that infinity / infinity is computed, the sign of the NaN would depend on the reference's machine.)
    Source: PTX ISA, "cvt" (.satfinite, NaN, ties to even), "div" (.rn), "max" (.NaN).
    """
    amax = cute.math.absf(values[0])
    for i in cutlass.range_constexpr(1, NVFP4.block_size):
        amax = cute.arch.fmax(amax, cute.math.absf(values[i]), nan=True)
    block_sf = _to_e4m3(amax / (NVFP4.code_max * tensor_scale))
    divisor = block_sf.load().to(cutlass.Float32)[0] * tensor_scale

    quotients = cute.make_rmem_tensor(NVFP4.block_size, cutlass.Float32)
    for i in cutlass.range_constexpr(NVFP4.block_size):
        # The sum with +0.0 changes -0.0 alone.
        quotients[i] = values[i] / divisor + cutlass.Float32(0.0)
    codes = cute.make_rmem_tensor(NVFP4.block_size, cutlass.Float4E2M1FN)
    codes.store(quotients.load().to(cutlass.Float4E2M1FN))
    packed = cute.recast_tensor(codes, cutlass.Uint64)[0]
    has_codes = (divisor > 0.0) & (divisor <= _LARGEST)
    return packed if has_codes else cutlass.Uint64(0), cute.recast_tensor(block_sf, cutlass.Uint8)[0]


@cute.jit
def store_block(
    mCodes: cute.Tensor, mSF: cute.Tensor, row: Any, block: Any, values: Any, tensor_scale: cutlass.Float32
) -> None:
    """Quantizes 16 values to codes and scale of one block.

    Args:
        mCodes: from block_codes.
        mSF: from swizzled_scales.
        row: of both.
        block: elements 16 * block .. 16 * block + 15 of the row.
        values, tensor_scale: as quantize_block takes them.

    Numerics: as quantize_block.
    """
    codes, scale = quantize_block(values, tensor_scale)
    mCodes[row, block] = codes
    mSF[row, block] = scale


def zero_scale() -> cutlass.Uint8:
    """Returns the scale 0 that stands behind a row's last block."""
    return cutlass.Uint8(0)


def block_codes(packed: cute.Tensor) -> cute.Tensor:
    """Returns (rows, K/16) uint64, the codes of a block in one, of (rows, K/2) bytes whose rows are 8-byte aligned."""
    rows, num_bytes = packed.shape
    pointer = cute.recast_ptr(packed.iterator, dtype=cutlass.Uint64)
    num_blocks = num_bytes // BLOCK_BYTES
    # 64 bits, as codes of many experts' rows can be more than 2^31 bytes.
    return cute.make_tensor(pointer, cute.make_layout((rows, num_blocks), stride=(cutlass.Int64(num_blocks), 1)))


def swizzled_scales(scales: cute.Tensor, num_blocks: Any) -> cute.Tensor:
    """Returns (rows up to 128, K/16 up to 4) uint8, indexed by row and block, of scales in the 128x4 layout.

    Args:
        scales: contiguous, one byte an element - whole scale tiles, see `cutedsl.layout`.
        num_blocks: K/16.
    """
    tiles_k = cute.ceil_div(num_blocks, TILE_COLUMNS)
    tiles_rows = cute.size(scales) // (tiles_k * TILE_BYTES)
    rows = (
        (_RUN_ROWS, TILE_ROWS // _RUN_ROWS, tiles_rows),
        (TILE_BYTES // _RUN_ROWS, TILE_COLUMNS, tiles_k * TILE_BYTES),
    )
    columns = ((TILE_COLUMNS, tiles_k), (1, TILE_BYTES))
    layout = cute.make_layout((rows[0], columns[0]), stride=(rows[1], columns[1]))
    return cute.make_tensor(cute.recast_ptr(scales.iterator, dtype=cutlass.Uint8), layout)


def _to_e4m3(x: cutlass.Float32) -> cute.Tensor:
    """Returns x rounded to E4M3, several times over, in registers."""
    numbers = cute.make_rmem_tensor(_E4M3_LANES, cutlass.Float32)
    numbers.fill(x)
    rounded = cute.make_rmem_tensor(_E4M3_LANES, cutlass.Float8E4M3FN)
    rounded.store(numbers.load().to(cutlass.Float8E4M3FN))
    return rounded
