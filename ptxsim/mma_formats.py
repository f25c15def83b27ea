"""Number formats of tensor-core operands: bytes to float32, by tables.

Every format here has a finite set of values that float32 represents exactly, so decoding loses nothing. Encodings: OCP
"Microscaling Formats (MX) Specification" 1.0 (E2M1, E2M3, E3M2, E8M0), "OCP 8-bit Floating Point Specification" (E4M3, E5M2),
PTX ISA "Alternate Floating-Point Data Formats" (UE4M3 is E4M3 without a sign; UE8M0 is a power of two, 0xFF is NaN; TF32 is
float32 with the low 13 bits ignored).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def _small_float(exponent_bits: int, mantissa_bits: int, bias: int, special: str) -> F32:
    """Values of all codes of a sign-exponent-mantissa format.

    Args:
        exponent_bits, mantissa_bits, bias: the format.
        special: "none" (every code is a number), "nan" (only all ones is NaN), "ieee" (infinities and NaNs).
    """
    width = 1 + exponent_bits + mantissa_bits
    out = np.empty(1 << width, np.float32)
    top = (1 << exponent_bits) - 1
    for code in range(1 << width):
        sign = -1.0 if code >> (width - 1) else 1.0
        exponent = code >> mantissa_bits & top
        mantissa = code & (1 << mantissa_bits) - 1
        if exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        if exponent == top and special == "ieee":
            value = np.inf if mantissa == 0 else np.nan
        if special == "nan" and exponent == top and mantissa == (1 << mantissa_bits) - 1:
            value = np.nan
        out[code] = sign * value
    return out


E2M1 = _small_float(2, 1, 1, "none")
E2M3 = _small_float(2, 3, 1, "none")
E3M2 = _small_float(3, 2, 3, "none")
E4M3 = _small_float(4, 3, 7, "nan")
E5M2 = _small_float(5, 2, 15, "ieee")
# Scale factors. UE4M3 has no sign: a set top bit is ignored here and reported; what hardware makes of it is not pinned.
UE4M3 = np.concatenate([E4M3[:128], E4M3[:128]])
with np.errstate(over="ignore"):
    UE8M0 = np.concatenate([np.ldexp(1.0, np.arange(-127, 128)), [np.nan]]).astype(np.float32)
SCALE_TABLES = {"ue4m3": UE4M3, "ue8m0": UE8M0}

# Two E2M1 codes a byte, element 2i in the low nibble: one 64-bit table entry holds both floats.
_E2M1_PAIRS = (
    np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=1).astype("<f4").view("<u8").reshape(256)
)


def decode_e2m1_packed(raw: U8) -> F32:
    """(rows, n) bytes of packed pairs -> (rows, 2n) float32."""
    return _E2M1_PAIRS.take(raw).view(np.float32)


def decode_e2m1_padded(raw: U8) -> F32:
    """Chunks of 16 bytes that hold 16 elements in their first 8 bytes -> one float32 per byte of the input."""
    rows = raw.shape[0]
    return decode_e2m1_packed(np.ascontiguousarray(raw.reshape(rows, -1, 16)[:, :, :8]).reshape(rows, -1))


def six_bit_codes(raw: U8) -> U8:
    """Chunks of 16 bytes that hold 16 six-bit codes in their first 12 bytes -> the codes."""
    rows = raw.shape[0]
    b = raw.reshape(rows, -1, 16)[:, :, :12].reshape(rows, -1, 4, 3)
    b0, b1, b2 = b[..., 0], b[..., 1], b[..., 2]
    codes = np.stack([b0 & 63, (b0 >> 6) | ((b1 & 15) << 2), (b1 >> 4) | ((b2 & 3) << 4), b2 >> 2], axis=-1)
    return codes.reshape(rows, -1)


def decode_bf16(raw: U8) -> F32:
    """bfloat16 -> float32."""
    return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def decode_f16(raw: U8) -> F32:
    """IEEE half -> float32."""
    return raw.view("<f2").astype(np.float32)


def decode_tf32(raw: U8) -> F32:
    """TF32 in 32-bit words -> float32; the low 13 bits are dropped."""
    return (raw.view("<u4") & np.uint32(0xFFFFE000)).view(np.float32)


@dataclass(frozen=True)
class Format:
    """An operand format.

    Attributes:
        name: as in PTX.
        bits: one element's bits in shared memory, padding of the padded 4- and 6-bit forms included.
        decode: (rows, n) contiguous bytes -> (rows, elements) float32.
        packed: two elements a byte.
    """

    name: str
    bits: int
    decode: Callable[[U8], F32]
    packed: bool = False


FORMATS = {
    "e2m1x2": Format("e2m1", 4, decode_e2m1_packed, packed=True),
    "e2m1": Format("e2m1", 8, decode_e2m1_padded),
    "e2m3": Format("e2m3", 8, lambda raw: E2M3.take(six_bit_codes(raw))),
    "e3m2": Format("e3m2", 8, lambda raw: E3M2.take(six_bit_codes(raw))),
    "e4m3": Format("e4m3", 8, lambda raw: E4M3.take(raw)),
    "e5m2": Format("e5m2", 8, lambda raw: E5M2.take(raw)),
    "s8": Format("s8", 8, lambda raw: raw.view(np.int8).astype(np.float32)),
    "u8": Format("u8", 8, lambda raw: raw.astype(np.float32)),
    "f16": Format("f16", 16, decode_f16),
    "bf16": Format("bf16", 16, decode_bf16),
    "tf32": Format("tf32", 32, decode_tf32),
}


def bad_scales(raw: U8, name: str) -> npt.NDArray[np.bool_]:
    """True where a scale factor byte is NaN, or negative in the unsigned UE4M3."""
    return raw >= 0x7F if name == "ue4m3" else raw == 0xFF
