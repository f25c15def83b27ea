"""NumPy references for block-scaled kernels, written from the formats' definitions and independent of every kernel.

A kernel accumulates in FP32 in an order of its own, so its result is not one number but an interval: `Exact` carries the
FP64 value of each output together with the sum of the magnitudes that were added up, and the checks accept exactly what
rounding may make of it. There is no tolerance to tune.

Source of the formats: OCP Microscaling Formats (MX) 1.0 for E2M1, E4M3 and UE8M0; the 128x4 scale layout is that of cuBLAS
(cuBLAS documentation, "1D Block Scaling Factors Layout").
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

_E2M1_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = np.concatenate([_E2M1_MAGNITUDES, -_E2M1_MAGNITUDES])
# FP32 accumulation of K terms errs by a few units of 2^-24 of the sum of magnitudes; 2^-20 leaves room for any order.
ACCUMULATION = 2.0**-20

# A scale for what pads a layout: 1 in E4M3, 2^-71 in UE8M0.
PADDING = 0x38


def _e4m3_table() -> Floats:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(codes & 127) == 127] = np.nan
    return np.where(codes >> 7, -magnitude, magnitude)


E4M3 = _e4m3_table()
UE8M0 = np.concatenate([2.0 ** (np.arange(255.0) - 127), [np.nan]])


def _encode(values: Floats, table: Floats) -> Bytes:
    """Codes of the nearest entries of an increasing table, ties to the even code, saturating."""
    index = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    low, high = table[index - 1], table[index]
    middle = (low + high) / 2
    up = (values > middle) | ((values == middle) & (index % 2 == 0))
    return np.where(up, index, index - 1).astype(np.uint8)


def encode_e2m1(values: Floats) -> Bytes:
    """E2M1 codes: nearest, ties to even, saturating at 6."""
    codes = _encode(np.abs(values), _E2M1_MAGNITUDES)
    return np.where(np.signbit(values), codes | 8, codes).astype(np.uint8)


def encode_e4m3(values: Floats) -> Bytes:
    """E4M3 codes of numbers that are not negative: nearest, ties to even, saturating at 448."""
    return _encode(values, E4M3[:127])


def pack_e2m1(codes: Bytes) -> Bytes:
    """Two codes a byte, the element of even index in the low nibble."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def unpack_e2m1(packed: Bytes) -> Bytes:
    """The inverse of pack_e2m1."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def to_blocked(scales: Bytes) -> Bytes:
    """Scales [rows, columns] in the 128x4 layout: [row blocks, column blocks, 32, 4, 4].

    Padding is not zero, since a kernel must not depend on it: elements beyond the end are zero.
    """
    rows, columns = -(-scales.shape[0] // 128), -(-scales.shape[1] // 4)
    padded = np.full((rows * 128, columns * 4), PADDING, np.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    blocked = padded.reshape(rows, 4, 32, columns, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(blocked)


def from_blocked(blocked: Bytes, rows: int, columns: int) -> Bytes:
    """The inverse of to_blocked, without the padding; any shape of the right number of elements."""
    row_blocks, column_blocks = -(-rows // 128), -(-columns // 4)
    blocks = blocked.reshape(row_blocks, column_blocks, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return blocks.reshape(row_blocks * 128, column_blocks * 4)[:rows, :columns]


@dataclass(frozen=True)
class Scaled:
    """A block-scaled matrix [rows, K].

    Attributes:
        elements: element bytes as a kernel reads them: packed E2M1 [rows, K / 2], or E4M3 [rows, K].
        scales: scale bytes, [rows, K / block].
        values: what they stand for, FP64 [rows, K].
    """

    elements: Bytes
    scales: Bytes
    values: Floats

    @property
    def blocked(self) -> Bytes:
        """The scales in the 128x4 layout."""
        return to_blocked(self.scales)


def random_nvfp4(rng: np.random.Generator, rows: int, columns: int) -> Scaled:
    """E2M1 elements with an E4M3 scale for every 16. No two scales of a row group agree by construction."""
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    # Powers of two around 1 with all mantissas: products stay far from FP32's and BF16's limits.
    scales = rng.integers(0x20, 0x48, (rows, columns // 16), dtype=np.uint8)
    return Scaled(pack_e2m1(codes), scales, E2M1[codes] * np.repeat(E4M3[scales], 16, axis=1))


def random_mxfp8(rng: np.random.Generator, rows: int, columns: int) -> Scaled:
    """E4M3 elements with a UE8M0 scale for every 32."""
    codes = rng.integers(0x20, 0x48, (rows, columns), dtype=np.uint8) | rng.integers(0, 2, (rows, columns)) << 7
    scales = rng.integers(124, 131, (rows, columns // 32), dtype=np.uint8)
    values = E4M3[codes] * np.repeat(UE8M0[scales], 32, axis=1)
    return Scaled(codes.astype(np.uint8), scales, values)


def random_mxfp4(rng: np.random.Generator, rows: int, columns: int) -> Scaled:
    """E2M1 elements with a UE8M0 scale for every 32."""
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    scales = rng.integers(124, 131, (rows, columns // 32), dtype=np.uint8)
    return Scaled(pack_e2m1(codes), scales, E2M1[codes] * np.repeat(UE8M0[scales], 32, axis=1))


@dataclass(frozen=True)
class Exact:
    """A result before rounding: FP64 value, and how far FP32 arithmetic may be off."""

    value: Floats
    slack: Floats

    def __getitem__(self, index: Any) -> "Exact":
        return Exact(self.value[index], self.slack[index])

    def scaled(self, factor: Floats | float) -> "Exact":
        """The result times a factor."""
        return Exact(self.value * factor, self.slack * np.abs(factor))

    def plus(self, other: Floats | float) -> "Exact":
        """The result plus a number that FP32 holds."""
        value = self.value + other
        return Exact(value, self.slack + np.abs(value) * 2.0**-23)


def matmul(a: Floats, b: Floats) -> Exact:
    """a [M, K] times the transpose of b [N, K], as FP32 accumulation gives it."""
    return Exact(a @ b.T, np.abs(a) @ np.abs(b).T * ACCUMULATION)


def silu_gate(up: Exact, gate: Exact) -> Exact:
    """up * gate * sigmoid(gate); the kernel's exp2 and reciprocal are approximate to about 2^-22."""
    sigmoid = 1 / (1 + np.exp(-gate.value))
    silu = gate.value * sigmoid
    # |d silu / d gate| < 1.1
    slack = up.slack * np.abs(silu) + np.abs(up.value) * gate.slack * 1.1
    value = up.value * silu
    return Exact(value, slack + np.abs(value) * 2.0**-19)


def half_unit(magnitude: Floats, mantissa_bits: int) -> Floats:
    """Half the distance between neighbours of a binary format at a magnitude (2^-126 and below: that of 2^-126)."""
    _, exponent = np.frexp(np.maximum(magnitude, 2.0**-126))
    return np.ldexp(0.5, exponent - 1 - mantissa_bits)


_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def assert_rounded(actual: torch.Tensor, exact: Exact, roundings: int = 1) -> None:
    """Every element is what rounding to the tensor's dtype may make of the exact result.

    Args:
        actual: what the kernel wrote.
        exact: the reference.
        roundings: how many times the kernel rounds to that format on the way (an addition in memory is one).

    Raises:
        AssertionError: how many elements differ, the first one, and by how much.
    """
    found = actual.double().numpy().reshape(exact.value.shape)
    unit = half_unit(np.abs(exact.value) + exact.slack, _MANTISSA[actual.dtype])
    _assert_all(np.abs(found - exact.value) <= exact.slack + unit * roundings, found, exact.value)


def _assert_all(good: npt.NDArray[np.bool_], found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        raise AssertionError(
            f"{(~good).sum()} of {good.size} elements are wrong; the first is at {where}: "
            f"{found[where]!r}, expected {expected[where]!r}"
        )


def assert_quantized(packed: Bytes, scales: Bytes, exact: Exact, global_scale: float) -> None:
    """NVFP4 codes and scales are what quantizing the exact result gives, up to what its slack allows.

    A block's scale is e4m3(amax / 6 * global_scale); its codes are e2m1(value * global_scale / scale), with the scale that
    the kernel stored, so that a scale next to a rounding boundary does not count twice.

    Args:
        packed: codes, two a byte, [rows, columns / 2].
        scales: E4M3 bytes [rows, columns / 16].
        exact: the values that were quantized, [rows, columns].
        global_scale: multiplied into the scales.

    Raises:
        AssertionError: a scale or a code is outside of the interval.
    """
    rows, columns = exact.value.shape
    magnitude = np.abs(exact.value).reshape(rows, columns // 16, 16)
    slack = exact.slack.reshape(magnitude.shape)
    relative = 2.0**-20
    low = np.maximum(magnitude - slack, 0).max(axis=2) * (global_scale / 6) * (1 - relative)
    high = (magnitude + slack).max(axis=2) * (global_scale / 6) * (1 + relative)
    _assert_all((encode_e4m3(low) <= scales) & (scales <= encode_e4m3(high)), scales, encode_e4m3((low + high) / 2))

    stored = np.repeat(E4M3[scales], 16, axis=1)
    factor = np.divide(global_scale, stored, out=np.zeros_like(stored), where=stored != 0)
    value, error = exact.value * factor, exact.slack * factor + np.abs(exact.value * factor) * relative
    codes = unpack_e2m1(packed)
    found = E2M1[codes]
    lowest, highest = E2M1[encode_e2m1(value - error)], E2M1[encode_e2m1(value + error)]
    _assert_all((lowest <= found) & (found <= highest), found, E2M1[encode_e2m1(value)])
