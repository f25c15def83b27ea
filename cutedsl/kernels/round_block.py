"""Device functions that round to NVFP4 where no instruction does: two threads share a block of 16, each has a part of 8.

The hard part is to give the bits of `cutedsl.quantize.quantize_activation` in few instructions, as the kernels around this
are to run at the speed of memory. A number takes about a dozen:

  - its quotient RN(x / divisor), without a division of its own. The block's reciprocal, in two FP32 numbers, gives a
    quotient within one unit in the last place; its exact remainder, times the rounded reciprocal, corrects it to the
    rounded one (Markstein's theorem). That holds away from the ends of FP32's range: a block that comes near one, or whose
    largest quotient needs the clamp to 6, divides instead;
  - the nearest E2M1 number, ties to even. Numbers below 2 are 1/2 apart, those below 4 are 1, the others 2: half of 2^e,
    the power of two below max(|q|, 1). FP32 numbers around 1.5 * 2^(22 + e) are as far apart, and it is itself an even one
    of them: adding it and taking it away rounds as the format does, and each is one FMA.

A zero has the sign that its code has: a negative number that rounds to 0 keeps its sign, -0.0 becomes +0.0.

Who has a block in another way calls `block_scale` with its amax and `nearest_e2m1` with any of its numbers.

Source: P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990; PTX ISA, "cvt"
(.e4m3x2 since sm_89, .satfinite, NaN), "div" (.rn), "fma", "max" (.NaN), "shfl.sync".
"""

from typing import Any

import cutlass
import torch
from cutlass import cute

from cutedsl.formats import NVFP4

# Numbers of a thread: 16 bytes of BF16.
PART = NVFP4.block_size // 2
_LARGEST = torch.finfo(torch.float32).max
# With divisors between these no remainder that matters is below FP32's smallest number, and no quotient of two BF16 numbers
# becomes 0, which would lose its sign.
_DIVISOR_MIN, _DIVISOR_MAX = 2.0**-100, 2.0**15
# Up to this a quotient rounds to 6 without a clamp; 7 would be a tie with 8.
_QUOTIENT_MAX = 6.5
_EXPONENT_BITS, _MAGNITUDE_BITS, _SIGN_BIT = 0x7F800000, 0x7FFFFFFF, 0x80000000
# Times 2^e: see above.
_ROUNDER = 1.5 * 2.0**22
# An E2M1 number times this has its code as the highest bits under the sign.
_CODE_SCALE, _CODE_SHIFT = 2.0**-126, 22
_CODE_BITS = 4


@cute.jit
def part_amax(values: cute.Tensor) -> cutlass.Float32:
    """Largest magnitude of a block, or NaN if it holds one.

    Args:
        values: (8,) FP32 in registers - the parts of an even lane and the next one are a block; both must call this.
    """
    amax = cute.math.absf(values[0])
    for i in cutlass.range_constexpr(1, PART):
        amax = cute.arch.fmax(amax, cute.math.absf(values[i]), nan=True)
    pair = cutlass.Int32(3) << (cute.arch.lane_idx() & 30)
    return cute.arch.fmax(amax, cute.arch.shuffle_sync_bfly(amax, 1, mask=pair), nan=True)


def block_scale(amax: cutlass.Float32, tensor_scale: cutlass.Float32) -> tuple[cutlass.Float32, cutlass.Uint8]:
    """block_sf = e4m3(min(amax / (6 * tensor_scale), 448)).

    Args:
        amax: of the block.
        tensor_scale: positive, and 6 * tensor_scale finite.

    Returns:
        block_sf as FP32, and its bits.

    Numerics: as `quantize_activation`; NaN stays NaN.
    """
    quotient = amax / (NVFP4.code_max * tensor_scale)
    twice = cute.arch.inline_ptx(
        "cvt.rn.satfinite.e4m3x2.f32 {$w0}, {$r0}, {$r0};",
        write_only_types=[cutlass.Uint16],
        read_only_args=[quotient],
    )
    halves = cute.arch.inline_ptx(
        "cvt.rn.f16x2.e4m3x2 {$w0}, {$r0};", write_only_types=[cutlass.Uint32], read_only_args=[twice]
    )
    return cutlass.Uint16(halves & 0xFFFF).bitcast(cutlass.Float16).to(cutlass.Float32), cutlass.Uint8(twice & 0xFF)


@cute.jit
def nearest_e2m1(
    values: cute.Tensor, amax: cutlass.Float32, block_sf: cutlass.Float32, tensor_scale: cutlass.Float32
) -> cute.Tensor:
    """e2m1(value / (block_sf * tensor_scale)), as numbers.

    Args:
        values: (n,) FP32 in registers - numbers of one block.
        amax: of the whole block.
        block_sf: from block_scale.
        tensor_scale: that of block_sf.

    Returns:
        (n,) FP32 in registers; 0 where the divisor is not positive and finite.

    Numerics: equal to the codes of `quantize_activation` for all values; the sign of a zero too for values that are BF16
    numbers, otherwise it may differ.
    """
    divisor = block_sf * tensor_scale
    nearest = cute.make_rmem_tensor(values.shape, cutlass.Float32)
    if (amax < _QUOTIENT_MAX * divisor) & (divisor > _DIVISOR_MIN) & (divisor < _DIVISOR_MAX):
        reciprocal = 1.0 / divisor
        rest = cute.math.fma(-divisor, reciprocal, cutlass.Float32(1.0)) * reciprocal
        for i in cutlass.range_constexpr(cute.size(values)):
            near = cute.math.fma(values[i], reciprocal, values[i] * rest)
            remainder = cute.math.fma(-near, divisor, values[i])
            # -0.0 becomes +0.0 here, by the rules of sums of zeros.
            nearest[i] = _round(cute.math.fma(remainder, reciprocal, near))
    else:
        has_codes = (divisor > 0.0) & (divisor <= _LARGEST)
        for i in cutlass.range_constexpr(cute.size(values)):
            # The sum with +0.0 changes -0.0 alone.
            quotient = values[i] / divisor + cutlass.Float32(0.0)
            quotient = cute.arch.fmin(cute.arch.fmax(quotient, -NVFP4.code_max), NVFP4.code_max)
            nearest[i] = _round(cutlass.select_(has_codes, quotient, cutlass.Float32(0.0)))
    return nearest


def pack_codes(nearest: cute.Tensor) -> cutlass.Uint32:
    """Returns the codes of a part, element i in bits 4i .. 4i + 3.

    Args:
        nearest: (8,) from nearest_e2m1.
    """
    packed = cutlass.Uint32(0)
    for i in range(PART):
        bits = _bits(nearest[i] * _CODE_SCALE)
        packed = packed | ((bits >> _CODE_SHIFT & 7 | bits >> 28 & 8) << _CODE_BITS * i)
    return packed


def unscaled(nearest: cute.Tensor, block_sf: cutlass.Float32) -> cute.Tensor:
    """Returns nearest * block_sf as BF16 numbers in registers, which is exact; 16 NaN for a scale that is one."""
    numbers = cute.make_rmem_tensor(nearest.shape, cutlass.Float32)
    for i in range(cute.size(nearest)):
        numbers[i] = nearest[i] * block_sf
    rounded = cute.make_rmem_tensor(nearest.shape, cutlass.BFloat16)
    rounded.store(numbers.load().to(cutlass.BFloat16))
    return rounded


def _round(quotient: cutlass.Float32) -> cutlass.Float32:
    """Returns the E2M1 number next to a quotient, at most _QUOTIENT_MAX in magnitude, with its sign."""
    magnitude = cute.arch.fmax(cute.math.absf(quotient), 1.0)
    power = (_bits(magnitude) & _EXPONENT_BITS).bitcast(cutlass.Float32)
    shifted = cute.math.fma(power, cutlass.Float32(_ROUNDER), quotient)
    rounded = cute.math.fma(power, cutlass.Float32(-_ROUNDER), shifted)
    sign = _bits(quotient) & cutlass.Uint32(_SIGN_BIT)
    return (_bits(rounded) & _MAGNITUDE_BITS | sign).bitcast(cutlass.Float32)


def _bits(number: Any) -> cutlass.Uint32:
    return cutlass.Float32(number).bitcast(cutlass.Uint32)
