"""NVFP4 quantization and its inverse in plain torch: the bit-exact definition that kernels are compared with.

The hard part is that "the same value" is not enough: codes and block scales are compared bit for bit with other
implementations, so every division, rounding and tie below is an fp32 operation in a fixed order. Weights and
activations differ on purpose in one point. A weight's block scale never underflows (it is raised to the smallest e4m3,
and is 1 for a block of zeros), as ModelOpt writes checkpoints; an activation's block scale may underflow to 0, as GPU
quantizers have it, and then the block's codes are all 0.

Sign of zero: a negative value that rounds to zero keeps its sign bit (code 8), -0.0 itself becomes code 0. Both decode
to a zero; the rule is ModelOpt's for weights and is used for activations too.

Divisors are tensors on the operand's device, never Python numbers: torch on CUDA turns a division by a number into a
multiplication by its reciprocal, which differs in the last bit.
"""

from typing import NamedTuple

import torch

from cutedsl.formats import NVFP4

# The smallest positive e4m3 number, the floor of a weight's block scale.
SCALE_MIN = 2.0**-9
# Below this the smallest block scale times the tensor scale is no longer a normal fp32 number, and x / 0 looms.
TENSOR_SCALE_MIN = 2.0**-117
# Tensor scale of a tensor without any magnitude: positive, as loaders demand, and that of a tensor with amax 1.
ZERO_TENSOR_SCALE = 1.0 / NVFP4.tensor_scale_divisor

_SIGN = len(NVFP4.code_values)
_SIGNED_VALUES = NVFP4.code_values + tuple(-v for v in NVFP4.code_values)


def _rounding_bounds() -> torch.Tensor:
    """Returns (7,) fp32 bounds b such that the code of a magnitude is the number of b below it.

    The bounds are the midpoints of neighbours. A tie goes to the even code: at the bounds between an odd code and the
    even one above it the midpoint itself must count as above, so the bound there is the fp32 just below it.
    """
    values = torch.tensor(NVFP4.code_values, dtype=torch.float32, device="cpu")
    middle = (values[1:] + values[:-1]) / 2
    upper_is_even = torch.arange(1, len(NVFP4.code_values), device="cpu") % 2 == 0
    return torch.where(upper_is_even, torch.nextafter(middle, torch.zeros_like(middle)), middle)


def _byte_tables() -> dict[torch.dtype, torch.Tensor]:
    """Returns, by value type, (256,) integers whose bits are the two values of a byte: one look-up decodes both."""
    byte = torch.arange(256, device="cpu")
    values = torch.tensor(_SIGNED_VALUES, dtype=torch.float32, device="cpu")
    pairs = values[torch.stack((byte & 0xF, byte >> 4), dim=1)]
    return {
        torch.bfloat16: pairs.to(torch.bfloat16).view(torch.int32).reshape(256),
        torch.float32: pairs.view(torch.int64).reshape(256),
    }


_BOUNDS = _rounding_bounds()
_VALUES_BF16 = torch.tensor(_SIGNED_VALUES, dtype=torch.bfloat16, device="cpu")
_BYTE_TABLES = _byte_tables()


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
    return _pack(codes)


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

    Numerics: all in fp32; equal to ModelOpt 0.47 bit for bit. A block of zeros has scale 1. Where ModelOpt gives NaN,
    for a tensor of zeros (or below 2^-117 * 2688), the tensor scale is 1/2688, so that the tensor loads and decodes to
    zeros. Reads back to the host; a load-time function, not graph-safe.
    """
    blocks = _blocks("quantize_weight", w)
    if blocks.numel() == 0:
        raise ValueError(
            f"quantize_weight: w is empty, shape {tuple(w.shape)}; a weight has at least one row and block"
        )
    amax = blocks.abs().amax(-1)
    if not torch.isfinite(amax).all():
        raise ValueError("quantize_weight: w holds NaN or infinity, expected finite values; look at the checkpoint")
    tensor_scale = _weight_tensor_scale(amax, weight_scale_2)
    scale = amax / (NVFP4.code_max * tensor_scale)
    scale = torch.where(scale == 0, 1.0, scale).clamp(SCALE_MIN, NVFP4.scale_max).to(NVFP4.scale_dtype)
    codes = _encode(blocks / (scale.float() * tensor_scale).unsqueeze(-1))
    return PackedTensor(_pack(codes.flatten(-2)), scale, tensor_scale)


def quantize_activation(x: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """block_sf = e4m3(min(amax_16 / (6 * input_scale), 448)), code = e2m1(x / (block_sf * input_scale)).

    Args:
        x: (M, K) any floating type - K a multiple of 16; leading sizes may be any, also 0.
        input_scale: () fp32 - tensor scale, positive and finite (checked where runners are made), on x's device.

    Returns:
        (M, K/2) uint8 packed codes and (M, K/16) e4m3 block scales.

    Raises:
        TypeError: x is not floating, or input_scale is not an fp32 tensor.
        ValueError: K is not a multiple of 16, or input_scale has more than one element.

    Numerics: all in fp32. A block whose scale underflows to 0 has codes 0. A NaN in x makes its block's scale NaN (and
    its codes 0), so the 16 values decode to NaN: loud in the output row. Infinity saturates: scale 448, code 6.
    Nothing is read back to the host; graph-safe apart from its allocations.
    """
    codes, block_sf = _quantize_blocks("quantize_activation", x, input_scale)
    return _pack(codes.flatten(-2)), block_sf


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
        ValueError: shapes do not belong together, or weight_scale_2 has more than one element.

    Numerics: the two scales are multiplied first, in fp32, then the code: ModelOpt's order. Graph-safe.
    """
    _check_packed("dequantize", weight, weight_scale)
    tensor_scale = _tensor_scale("dequantize", "weight_scale_2", weight_scale_2)
    values = _byte_values(weight, weight_scale, torch.float32)
    return values.mul_((weight_scale.float() * tensor_scale).unsqueeze(-1)).flatten(-2)


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
    if dtype not in _BYTE_TABLES:
        raise TypeError(f"unscaled: dtype is {dtype}, expected torch.bfloat16 or torch.float32")
    return _byte_values(weight, block_sf, dtype).mul_(block_sf.to(dtype).unsqueeze(-1)).flatten(-2)


def unscaled_activation(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """unscaled(*quantize_activation(x, input_scale)), bit for bit, without packing.

    Args:
        x: (M, K) any floating type - as quantize_activation takes it.
        input_scale: () fp32 - tensor scale; it is not in the result.

    Returns:
        (M, K) bfloat16.

    Raises:
        TypeError, ValueError: as quantize_activation does.

    Numerics: as quantize_activation; the result is exact. Graph-safe apart from its allocations.
    """
    codes, block_sf = _quantize_blocks("unscaled_activation", x, input_scale)
    return _VALUES_BF16.to(x.device)[codes].mul_(block_sf.to(torch.bfloat16).unsqueeze(-1)).flatten(-2)


def _quantize_blocks(function: str, x: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes (..., K/16, 16) int32 and block scales (..., K/16) e4m3 of an activation."""
    blocks = _blocks(function, x)
    scale = _tensor_scale(function, "input_scale", input_scale)
    amax = blocks.abs().amax(-1)
    block_sf = (amax / (NVFP4.code_max * scale)).clamp(max=NVFP4.scale_max).to(NVFP4.scale_dtype)
    divisor = (block_sf.float() * scale).unsqueeze(-1)
    # NaN > 0 is false too: codes of a NaN block are 0, and its NaN scale alone carries the NaN on.
    return _encode(torch.where(divisor > 0, blocks / divisor, 0.0)), block_sf


def _encode(q: torch.Tensor) -> torch.Tensor:
    """Returns the int32 codes of fp32 values: nearest magnitude, ties to the even code, saturating at 6."""
    codes = torch.bucketize(q.abs(), _BOUNDS.to(q.device), out_int32=True)
    return torch.where(q < 0, codes + _SIGN, codes)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _byte_values(weight: torch.Tensor, block_sf: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a fresh (..., K/16, 16) tensor of code values."""
    table = _BYTE_TABLES[dtype].to(weight.device)
    pairs = torch.index_select(table, 0, weight.reshape(-1).to(torch.int32))
    return pairs.view(dtype).view(*block_sf.shape, NVFP4.block_size)


def _blocks(function: str, x: torch.Tensor) -> torch.Tensor:
    """Returns x as fp32 (..., K/16, 16)."""
    if not x.is_floating_point():
        raise TypeError(f"{function}: input is {x.dtype}, expected a floating type; it may be quantized already")
    if x.ndim == 0 or x.shape[-1] % NVFP4.block_size:
        raise ValueError(
            f"{function}: input has shape {tuple(x.shape)}, expected a last size that is a multiple of "
            f"{NVFP4.block_size}; pad K or choose another split of it"
        )
    return x.float().unflatten(-1, (x.shape[-1] // NVFP4.block_size, NVFP4.block_size))


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


def _tensor_scale(function: str, label: str, scale: torch.Tensor) -> torch.Tensor:
    if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
        found = scale.dtype if isinstance(scale, torch.Tensor) else type(scale).__name__
        raise TypeError(f"{function}: {label} is {found}, expected a torch.float32 tensor")
    if scale.numel() != 1:
        raise ValueError(f"{function}: {label} has shape {tuple(scale.shape)}, expected (); pass one tensor at a time")
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
