"""NVFP4 in numpy, slow and plain, sharing no code with the package: what the numeric tests compare with.

Tables come from the bits of the formats, roundings from a search for the nearest entry, sums from float64. Only the
places where the definition itself says fp32 (quotients and products of scales) are np.float32.
"""

from typing import NamedTuple

import numpy as np
import torch

# |index|: exponent in 2 bits (bias 1), 1 bit of mantissa.
E2M1 = np.array([m * 0.5 if e == 0 else (1 + m * 0.5) * 2.0 ** (e - 1) for e in range(4) for m in range(2)])
# Bits 0x00 .. 0x7e: exponent in 4 bits (bias 7), 3 bits of mantissa; 0x7f is NaN and left out.
E4M3 = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])[:-1]

# One rounding to bfloat16 (8 significant bits) is off by at most 2^-8 of the value, and 2^-8 / sqrt(3) in the mean
# square of many; 1e-5 is for fp32 sums. An oracle in float64 is matched this closely whatever the order of summation.
BF16_TOLERANCE = 2.0**-8 + 1e-5
BF16_MEAN_TOLERANCE = 2.0**-8 / 3**0.5 + 1e-5


def nearest(table: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Index of the entry nearest to each x >= 0; ties to the even index, beyond the end to the last."""
    x = np.asarray(x, dtype=np.float64)
    above = np.clip(np.searchsorted(table, x), 1, len(table) - 1)
    to_lower, to_upper = x - table[above - 1], table[above] - x
    take_upper = (to_upper < to_lower) | ((to_upper == to_lower) & (above % 2 == 0))
    return np.where(take_upper, above, above - 1)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """fp32 numpy copy of a floating tensor."""
    return x.detach().float().numpy().copy()


def quantize(x: np.ndarray, tensor_scale: float, *, is_weight: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Codes (M, K) and the bits of block scales (M, K/16) of a finite fp32 matrix, one block at a time."""
    scale = np.float32(tensor_scale)
    rows, k = x.shape
    codes, bits = np.zeros((rows, k), np.uint8), np.zeros((rows, k // 16), np.uint8)
    for row in range(rows):
        blocks = x[row].astype(np.float32).reshape(-1, 16)
        raw = np.abs(blocks).max(axis=1) / (np.float32(6) * scale)
        if is_weight:
            raw = np.maximum(np.where(raw == 0, np.float32(1), raw), np.float32(2.0**-9))
        bits[row] = nearest(E4M3, np.minimum(raw, np.float32(448)))
        divisor = E4M3[bits[row]].astype(np.float32) * scale
        q = np.zeros_like(blocks)
        np.divide(blocks, divisor[:, None], out=q, where=(divisor > 0)[:, None])
        codes[row] = (nearest(E2M1, np.abs(q)) + 8 * (q < 0)).reshape(-1)
    return codes, bits


def values(codes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """float64 code * block scale, (M, K)."""
    signed = np.concatenate((E2M1, -E2M1))
    return signed[codes] * np.repeat(E4M3[bits], 16, axis=-1)


def unpack(packed: torch.Tensor) -> np.ndarray:
    """Codes of packed bytes: element 2i in the low nibble."""
    data = packed.numpy()
    codes = np.empty((*data.shape[:-1], data.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = data % 16
    codes[..., 1::2] = data // 16
    return codes


def scale_bits(scale: torch.Tensor) -> np.ndarray:
    """Bytes of an e4m3 tensor."""
    return scale.view(torch.uint8).numpy()


class Packed(NamedTuple):
    """A random packed weight and its float64 values without tensor scale."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    values: np.ndarray


def random_packed(*shape: int, seed: int = 0) -> Packed:
    """Random codes with block scales from 2^-3 to 2, a few of them 0; `shape` ends in K."""
    generator = torch.Generator().manual_seed(seed)
    *leading, k = shape
    weight = torch.randint(0, 256, (*leading, k // 2), dtype=torch.uint8, generator=generator)
    bits = torch.randint(0x20, 0x40, (*leading, k // 16), dtype=torch.uint8, generator=generator)
    bits[torch.rand(bits.shape, generator=generator) < 0.02] = 0
    return Packed(weight, bits.view(torch.float8_e4m3fn), values(unpack(weight), bits.numpy()))


def random_x(rows: int, k: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """(rows, k) bfloat16 whose rows differ in magnitude, with a few outliers."""
    generator = torch.Generator().manual_seed(seed + 1000)
    x = torch.randn(rows, k, generator=generator) * torch.exp(spread * torch.randn(rows, 1, generator=generator))
    x[torch.rand(x.shape, generator=generator) < 0.002] *= 20
    return x.to(torch.bfloat16)


def linear(x: np.ndarray, w_values: np.ndarray, input_scale: float, weight_scale_2: float) -> np.ndarray:
    """float64 (M, N): x quantized, times the weight's values, times both tensor scales."""
    codes, bits = quantize(x, input_scale)
    alpha = np.float32(input_scale) * np.float32(weight_scale_2)
    return values(codes, bits) @ w_values.T * np.float64(alpha)


def swiglu(gate: np.ndarray, up: np.ndarray, limit: float | None) -> np.ndarray:
    """float64, the gate clamped before SiLU."""
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-gate)) * up


def errors(actual: torch.Tensor, expected: np.ndarray) -> tuple[float, float]:
    """Relative error of the whole matrix and of its worst row, in the 2-norm."""
    assert tuple(actual.shape) == expected.shape, f"shape {tuple(actual.shape)}, expected {expected.shape}"
    difference = actual.double().numpy() - expected
    whole = np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-30)
    rows = np.linalg.norm(difference, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    return float(whole), float(rows.max(initial=0.0))


def assert_close(actual: torch.Tensor, expected: np.ndarray, tolerance: float, row_tolerance: float) -> None:
    """Both metrics of `errors` are within their tolerance; NaN is not."""
    whole, worst_row = errors(actual, expected)
    assert whole <= tolerance, f"relative error {whole:.2e} above {tolerance:.2e} (worst row {worst_row:.2e})"
    assert worst_row <= row_tolerance, f"worst row's error {worst_row:.2e} above {row_tolerance:.2e}"


def assert_rounded_once(actual: torch.Tensor, expected: np.ndarray) -> None:
    """At most 1 % of a bfloat16 result differs from the rounded float64 oracle.

    Errors of fp32 sums, about 1e-6, move a value across a rounding boundary once in some thousand values; a second
    rounding anywhere, of alpha or of a partial sum, moves a quarter of them.
    """
    different = actual != torch.from_numpy(expected).to(torch.bfloat16)
    allowed = max(1, actual.numel() // 100)
    assert int(different.sum()) <= allowed, f"{int(different.sum())} of {actual.numel()} values are not rounded once"
