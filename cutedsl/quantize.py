"""NVFP4 quantization and its inverse in plain torch: the bit-exact definition that kernels are compared with.

The hard part is that "the same value" is not enough: codes and block scales are compared bit for bit with other
implementations, so every division, rounding and tie below is an fp32 operation in a fixed order. Weights and
activations differ on purpose in one point, blocks without a scale (docs/decisions/0005-weight-blocks-without-scale.md):

| input                                           | quantize_weight             | quantize_activation              |
|-------------------------------------------------|-----------------------------|----------------------------------|
| block of zeros                                  | scale 1, codes 0            | scale 0, codes 0                 |
| block, 0 < amax / (6 * tensor scale) <= 2^-10   | scale 2^-9, codes with it   | scale 0, codes 0                 |
| tensor of zeros, or amax below 2688 * 2^-117    | tensor scale 1 / 2688       | given scale, blocks as above     |
| block with a NaN                                | ValueError                  | scale NaN, codes 0: 16 NaN       |
| infinity, or amax / (6 * tensor scale) > 448    | ValueError; saturates       | saturates: scale 448, code +-6   |

A weight is what ModelOpt writes into checkpoints; an activation is what GPU quantizers make of one. Who wants the
activation's rule for a weight calls `quantize_activation(w, weight_scale_2)`: all other blocks come out the same.

Sign of zero: a negative value that rounds to zero keeps its sign bit (code 8), -0.0 itself becomes code 0. Both decode
to a zero; the rule is ModelOpt's for weights and is used for activations too.

Divisors are tensors on the operand's device, never Python numbers: torch on CUDA turns a division by a number into a
multiplication by its reciprocal, which differs in the last bit.
"""

import functools
from typing import NamedTuple

import torch

from cutedsl.formats import NVFP4

# The smallest positive e4m3 number, the floor of a weight's block scale.
SCALE_MIN = 2.0**-9
# Below this the smallest block scale times the tensor scale is no longer a normal fp32 number, and x / 0 looms.
TENSOR_SCALE_MIN = 2.0**-117
# Tensor scale of a tensor without any magnitude: positive, as loaders demand, and that of a tensor with amax 1.
ZERO_TENSOR_SCALE = 1.0 / NVFP4.tensor_scale_divisor

# Blocks quantized or decoded at a time on a CPU: temporaries stay in cache and are not fresh pages from the kernel each
# time (3 to 5 times faster than whole tensors; 7168 x 3072, one core, scripts/bench/quantize.py).
TILE_BLOCKS = 1 << 14

_SIGN = len(NVFP4.code_values)
_SIGNED_VALUES = NVFP4.code_values + tuple(-v for v in NVFP4.code_values)


def _encode_table() -> torch.Tensor:
    """Returns (65536,) uint8: the packed codes of two values, given as int8 eighths side by side in 16 bits.

    A tie goes to the even code: the upper one wins it where its index is even.
    """
    magnitudes = torch.tensor(NVFP4.code_values, dtype=torch.float32, device="cpu")
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    upper_is_even = torch.arange(1, len(magnitudes), device="cpu") % 2 == 0
    eighths = torch.arange(256, device="cpu").to(torch.uint8).view(torch.int8).float()
    x = eighths.abs().unsqueeze(1) / 8
    codes = ((x > middle) | ((x == middle) & upper_is_even)).sum(1) + _SIGN * (eighths < 0)
    return (codes.repeat(256) | codes.repeat_interleave(256) << 4).to(torch.uint8)


def _decode_table() -> torch.Tensor:
    """Returns (256,) int64 whose bits are the two fp32 values of a byte: one look-up decodes both."""
    byte = torch.arange(256, device="cpu")
    values = torch.tensor(_SIGNED_VALUES, dtype=torch.float32, device="cpu")
    return values[torch.stack((byte & 0xF, byte >> 4), dim=1)].view(torch.int64).reshape(256)


# By the type of an entry.
_TABLES = {torch.uint8: _encode_table(), torch.int64: _decode_table()}


class PackedTensor(NamedTuple):
    """A quantized weight: `weight` (..., K/2) uint8, `weight_scale` (..., K/16) e4m3, `weight_scale_2` () fp32."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """byte[i] = codes[2i] | codes[2i + 1] << 4.

    Args:
        codes: (..., K) uint8 - 4-bit codes, 0..15, K even.

    Returns:
        (..., K/2) uint8.

    Raises:
        TypeError: codes are not uint8.
        ValueError: K is odd, or a code is above 15.

    Numerics: exact. Reads one flag back to the host; not graph-safe.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"pack_codes: codes are {codes.dtype}, expected torch.uint8; cast them")
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"pack_codes: codes have shape {tuple(codes.shape)}, expected an even last size; pad K")
    if (codes > 15).any():
        raise ValueError(f"pack_codes: the largest code is {int(codes.max())}, expected 0..15; quantize first")
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """codes[2i] = byte[i] & 15, codes[2i + 1] = byte[i] >> 4.

    Args:
        packed: (..., K/2) uint8 - two codes a byte, the even element in the low nibble.

    Returns:
        (..., K) uint8, 0..15.

    Raises:
        TypeError: packed is not uint8.

    Numerics: exact. Graph-safe.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack_codes: packed codes are {packed.dtype}, expected torch.uint8; view them as bytes")
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def quantize_weight(w: torch.Tensor, weight_scale_2: torch.Tensor | float | None = None) -> PackedTensor:
    """w ~ e2m1 * e4m3(clamp(amax_16 / (6 * weight_scale_2), 2^-9, 448)) * weight_scale_2.

    Args:
        w: (..., K) any floating type - K a multiple of 16, finite, not empty.
        weight_scale_2: () or number - the tensor scale to use; None means amax / 2688 of this tensor.

    Returns:
        PackedTensor on w's device.

    Raises:
        TypeError: w is not floating.
        ValueError: K is not a multiple of 16, w is empty, w holds NaN or infinity, or weight_scale_2 is not one finite
            number of at least 2^-117.

    Numerics: all in fp32, wider input rounded to it first; for other input equal to ModelOpt 0.47 bit for bit. A block
    of zeros has scale 1 and codes 0; a scale that would underflow is 2^-9, and the codes are those with it, not 0. Where
    ModelOpt gives NaN, for a tensor of zeros (or below 2^-117 * 2688), the tensor scale is 1/2688, so that the tensor
    loads and decodes to zeros. Reads back to the host; a load-time function, not graph-safe.
    """
    blocks = _blocks("quantize_weight", w)
    if blocks.numel() == 0:
        raise ValueError(
            f"quantize_weight: w is empty, shape {tuple(w.shape)}; a weight has at least one row and block"
        )
    amax = _block_amax(blocks)
    if not torch.isfinite(amax).all():
        raise ValueError("quantize_weight: w holds NaN or infinity, expected finite values; look at the checkpoint")
    tensor_scale = _weight_tensor_scale(amax, weight_scale_2)
    scale = amax / (NVFP4.code_max * tensor_scale)
    scale = torch.where(scale == 0, 1.0, scale).clamp(SCALE_MIN, NVFP4.scale_max).to(NVFP4.scale_dtype)
    packed = _encode(blocks, scale.float() * tensor_scale)
    return PackedTensor(packed.view(*w.shape[:-1], -1), scale.view(*w.shape[:-1], -1), tensor_scale)


def quantize_activation(x: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """block_sf = e4m3(min(amax_16 / (6 * input_scale), 448)), code = e2m1(x / (block_sf * input_scale)).

    Args:
        x: (M, K) any floating type - K a multiple of 16; leading sizes may be any, also 0.
        input_scale: () fp32 - tensor scale, positive and finite (checked where runners are made), on x's device.

    Returns:
        (M, K/2) uint8 packed codes and (M, K/16) e4m3 block scales.

    Raises:
        TypeError: x is not floating, or input_scale is not an fp32 tensor.
        ValueError: K is not a multiple of 16, or input_scale has more than one element or is on another device.

    Numerics: all in fp32. A block whose scale is 0 or underflows to it has codes 0. A NaN in x makes its block's scale
    NaN (and its codes 0), so the 16 values decode to NaN: loud in the output row. Infinity saturates: scale 448, code 6
    with its sign. Nothing is read back to the host; graph-safe apart from its allocations, after one call on a device.
    """
    blocks = _blocks("quantize_activation", x)
    scale = _tensor_scale("quantize_activation", "input_scale", input_scale, x.device)
    amax = _block_amax(blocks)
    block_sf = (amax / (NVFP4.code_max * scale)).clamp(max=NVFP4.scale_max).to(NVFP4.scale_dtype)
    packed = _encode(blocks, block_sf.float() * scale)
    *rows, k = x.shape
    return packed.view(*rows, k // NVFP4.codes_per_byte), block_sf.view(*rows, k // NVFP4.block_size)


def dequantize(weight: torch.Tensor, weight_scale: torch.Tensor, weight_scale_2: torch.Tensor) -> torch.Tensor:
    """w = e2m1 * (weight_scale * weight_scale_2).

    Args:
        weight: (..., K/2) uint8 - packed codes.
        weight_scale: (..., K/16) e4m3 - block scales.
        weight_scale_2: () fp32 - tensor scale, multiplied.

    Returns:
        (..., K) fp32.

    Raises:
        TypeError: a type is not as above.
        ValueError: shapes do not belong together, or weight_scale_2 has more than one element or is on another device.

    Numerics: the two scales are multiplied first, in fp32, then the code: ModelOpt's order. Graph-safe.
    """
    _check_packed("dequantize", weight, weight_scale)
    tensor_scale = _tensor_scale("dequantize", "weight_scale_2", weight_scale_2, weight.device)
    return _decode(weight, weight_scale.float() * tensor_scale)


def unscaled(weight: torch.Tensor, block_sf: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """w = e2m1 * block_sf, without the tensor scale: an operand of the reference GEMM.

    Args:
        weight: (..., K/2) uint8 - packed codes.
        block_sf: (..., K/16) e4m3 - block scales.
        dtype: bfloat16, or float32 to spare a caller that multiplies in fp32 the conversion; the values are the same.

    Returns:
        (..., K) dtype.

    Raises:
        TypeError: a type is not as above.
        ValueError: shapes do not belong together.

    Numerics: exact: a code has 2 significant bits, a block scale 4, and BF16 holds 8. Graph-safe.
    """
    _check_packed("unscaled", weight, block_sf)
    if dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"unscaled: dtype is {dtype}, expected torch.bfloat16 or torch.float32")
    # Converted at the end: a product of BF16 numbers is 20 times slower than one of fp32 on a CPU.
    return _decode(weight, block_sf.float()).to(dtype)


def unscaled_activation(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """unscaled(*quantize_activation(x, input_scale)): an activation as an operand of the reference GEMM.

    Args:
        x: (M, K) any floating type - as quantize_activation takes it.
        input_scale: () fp32 - tensor scale; it is not in the result.

    Returns:
        (M, K) bfloat16.

    Raises:
        TypeError, ValueError: as quantize_activation does.

    Numerics: as quantize_activation; the result is exact. Graph-safe apart from its allocations.
    """
    return unscaled(*quantize_activation(x, input_scale))


def _block_amax(blocks: torch.Tensor) -> torch.Tensor:
    """Returns (num_blocks,) fp32 largest magnitudes; NaN where a block holds one."""
    # Without signs fp32 numbers order as their bits do, NaN above infinity; a maximum of integers is 4 times faster.
    parts = [(tile.float().view(torch.int32) & 0x7FFFFFFF).amax(-1) for tile in _tiles(blocks)]
    return torch.cat(parts).view(torch.float32)


def _encode(blocks: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Returns (num_blocks, 8) packed codes of blocks / divisor; a block whose divisor is not positive has codes 0.

    Every tie is a multiple of 1/4. So floor(4q) + ceil(4q) decides the code: it is 8q where 4q is whole, and the odd
    number between its neighbours where q is strictly between two multiples. It fits a byte; a table does two at once.
    """
    table = _table(torch.uint8, blocks.device)
    packed = blocks.new_empty((len(blocks), NVFP4.block_size // NVFP4.codes_per_byte), dtype=torch.uint8)
    divisor = torch.where(divisor > 0, divisor, float("inf")).unsqueeze(-1)
    limit = 4 * NVFP4.code_max
    for tile, tile_divisor, out in zip(_tiles(blocks), _tiles(divisor), _tiles(packed), strict=True):
        # A block with a NaN was divided by infinity: what is NaN now gets code 0, and the block's scale carries the NaN.
        quarters = (tile.float() / tile_divisor).nan_to_num_(0.0).mul_(4).clamp_(-limit, limit)
        eighths = quarters.floor().add_(quarters.ceil_()).to(torch.int8)
        pairs = eighths.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
        torch.index_select(table, 0, pairs.view(-1), out=out.view(-1))
    return packed


def _decode(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Returns (..., K) fp32: code values times their block's factor (..., K/16)."""
    table = _table(torch.int64, weight.device)
    packed = weight.reshape(-1, NVFP4.block_size // NVFP4.codes_per_byte)
    factor = factor.reshape(-1, 1)
    values = factor.new_empty((len(packed), NVFP4.block_size))
    for tile, tile_factor, out in zip(_tiles(packed), _tiles(factor), _tiles(values), strict=True):
        torch.index_select(table, 0, tile.reshape(-1).to(torch.int32), out=out.view(table.dtype).view(-1))
        out.mul_(tile_factor)
    return values.view(*weight.shape[:-1], weight.shape[-1] * NVFP4.codes_per_byte)


def _tiles(blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Splits along the blocks: cache-sized on a CPU, in one elsewhere."""
    return blocks.split(TILE_BLOCKS if blocks.device.type == "cpu" else max(1, len(blocks)))


def _table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _TABLES[dtype] if device.type == "cpu" else _table_on(dtype, device)


@functools.cache
def _table_on(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Kept: a copy from the host cannot be captured in a graph, so the first call must come before.
    return _TABLES[dtype].to(device)


def _blocks(function: str, x: torch.Tensor) -> torch.Tensor:
    """Returns x as (num_blocks, 16)."""
    if not x.is_floating_point():
        raise TypeError(f"{function}: input is {x.dtype}, expected a floating type; it may be quantized already")
    if x.ndim == 0 or x.shape[-1] % NVFP4.block_size:
        raise ValueError(
            f"{function}: input has shape {tuple(x.shape)}, expected a last size that is a multiple of "
            f"{NVFP4.block_size}; pad K or choose another split of it"
        )
    return x.detach().reshape(-1, NVFP4.block_size)


def _weight_tensor_scale(amax: torch.Tensor, given: torch.Tensor | float | None) -> torch.Tensor:
    """Returns the () fp32 tensor scale of a weight, computed from the block maxima or checked."""
    if given is None:
        scale = amax.amax() / amax.new_tensor(NVFP4.tensor_scale_divisor)
        return torch.where(scale >= TENSOR_SCALE_MIN, scale, ZERO_TENSOR_SCALE)
    scale = torch.as_tensor(given, dtype=torch.float32, device=amax.device)
    if scale.numel() != 1 or not TENSOR_SCALE_MIN <= float(scale) < float("inf"):
        raise ValueError(
            f"quantize_weight: weight_scale_2 is {given}, expected one finite number of at least 2^-117; "
            "pass amax / 2688, or None to have it computed"
        )
    return scale.reshape(())


def _tensor_scale(function: str, label: str, scale: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns the scale as (), checked without reading it."""
    if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
        found = scale.dtype if isinstance(scale, torch.Tensor) else type(scale).__name__
        raise TypeError(f"{function}: {label} is {found}, expected a torch.float32 tensor")
    if scale.numel() != 1:
        raise ValueError(f"{function}: {label} has shape {tuple(scale.shape)}, expected (); pass one tensor at a time")
    if scale.device != device:
        raise ValueError(
            f"{function}: {label} is on {scale.device}, expected {device}, where its operand is; move it once"
        )
    return scale.reshape(())


def _check_packed(function: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
    if weight.dtype != torch.uint8 or scale.dtype != NVFP4.scale_dtype:
        raise TypeError(
            f"{function}: codes are {weight.dtype} and block scales {scale.dtype}, "
            f"expected torch.uint8 and {NVFP4.scale_dtype}"
        )
    bytes_per_block = NVFP4.block_size // NVFP4.codes_per_byte
    expected = (*weight.shape[:-1], weight.shape[-1] // bytes_per_block) if weight.ndim else None
    if expected != tuple(scale.shape) or weight.shape[-1] % bytes_per_block:
        raise ValueError(
            f"{function}: codes have shape {tuple(weight.shape)} and block scales {tuple(scale.shape)}, "
            "expected (..., K/2) and (..., K/16); is the scale swizzled, or of another shard?"
        )
