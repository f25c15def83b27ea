"""Weights as checkpoints have them to weights as the sm90 GEMM wants them, once, when a layer is loaded, in place.

The GEMM decodes codes to BF16 in registers, on their way to the tensor core, and what it needs to be fast is prepared here:
every thread finds the codes of one tensor-core operand in 16 bytes next to each other, in an order in which few shifts and
masks make BF16 numbers of them, and block scales whose bits are nearly those of a BF16 number.

The hard part is memory and time. A layer's experts fill a good part of a GPU, so that nothing may exist twice, and a model
has too many blocks for loops over them. A block of 64 rows and 128 k takes as many bytes after as before, and so do all
blocks of 64 rows: `CHUNK_BYTES` of them are permuted at a time, by a handful of operations, and go back to where they
were. A matrix whose rows are no multiple of 64, or whose K is no multiple of 128, does not fit where it was: it (a stack
of them as a whole) gets a new tensor, padded with zeros; whoever holds the old one should drop it.

Layout of codes, 4096 bytes for a block; blocks follow along k, then along rows, and (E, N up to 64, K up to 128 / 2) is
still the shape:

    byte kh * 2048 + thread * 16 + j * 4 + b      kh: which 64 of the 128 k; j: which 16 of those; thread = 32 w + 4 g + t

The 4 bytes are a little-endian word with 8 codes of columns k = 64 kh + 16 j + 2 t + {0, 1, 8, 9}: even k in its low half,
odd k in its high half. A half holds, of a code with sign s and magnitude bits m2 m1 m0,

    row 16 w + g,      k, k + 1        s at bit 9,  m2 m1 m0 at bits 2 1 0
    row 16 w + g + 8,  k, k + 1        s at bit 13, m2 m1 m0 at bits 6 5 4
    row 16 w + g,      k + 8, k + 9    s at bit 3 of the other half, m2 m1 m0 at bits 12 11 10
    row 16 w + g + 8,  k + 8, k + 9    s at bit 15, m2 m1 m0 at bits 8 7 14

Shifts by 6 and 2 to the left and a rotation by 4 to the right bring the first three to bits 15 and 8 7 6 of each half, where
the fourth is but for m0, which is 8 bits off. No places need less: a bit comes from four, so that there are at least three
shifts, and with three every code would be all there after one of them, for which no places exist.

Layout of block scales, 512 bytes for the same block:

    row 16 w + g + 8 h, scales 4 i .. 4 i + 3 of the 8 along k        at byte (8 w + g) * 16 + 8 h + 4 i

The 4 bytes are a little-endian word, rotated by 4 bits to the left: scales 0 and 2 are where a BF16 number has them, and
scales 1 and 3 after a rotation by 8 to the right.

A scale 2^e * 1.mmm becomes (e + 21) << 3 | mmm, subnormals normalized (e = -9 .. 8); 0 becomes 0, and its 16 codes too.

Rows of gates and ups are interleaved before that, 8 gate rows, 8 up rows, ...: packed row 16 b + r is gate row 8 b + r, and
packed row 16 b + 8 + r up row 8 b + r.
"""

import functools
from typing import NamedTuple

import torch

from cutedsl.formats import NVFP4
from cutedsl.gate_up import CHUNK_BYTES, move_gate_up
from cutedsl.reference.linear import PackedMatrix

# Rows and K of a block, and gate rows that are followed by as many up rows.
BLOCK_ROWS, BLOCK_K = 64, 128
INTERLEAVE = 8
_WORD_BYTES = 4
_BLOCK_BYTES_K = BLOCK_K // NVFP4.codes_per_byte
_BLOCK_SCALES_K = BLOCK_K // NVFP4.block_size
_NAN_BYTE = 0x7F
# Bits of sign and magnitude of a code from the beginning of its half of a word on, by place; a magnitude's bits from the
# lowest. Bits from 16 on are the other half's.
_PLACES = ((9, (0, 1, 2)), (13, (4, 5, 6)), (19, (10, 11, 12)), (15, (14, 7, 8)))
# Bits that a word of four scales is rotated by.
_SCALE_ROTATION = 4
# Views of a block: rows are (w, h, g), bytes of codes along k are (kh, j, hi, t), scales along k are i.
_WARPS, _HALVES, _GROUPS = 4, 2, 8
_K_HALVES, _STEPS, _THREADS = 2, 4, 4


class Operand(NamedTuple):
    """Weights of one GEMM, or of one for each expert.

    Attributes:
        weight: (E, N up to 64, K up to 128 / 2) uint8 - prepared codes.
        weight_scale: (E, N up to 64, K up to 128 / 16) uint8 - prepared block scales.
        alpha: (E, R) fp32 - what to multiply each N/R rows of sums with.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    alpha: torch.Tensor


class LinearGroup(NamedTuple):
    """Output columns of a linear that take the same activation.

    Attributes:
        input_scale: (1,) fp32 - tensor scale of the activation; None: it is not quantized.
        spans: (first column, past the last, operand) of each run of columns; E is 1, R is N.
    """

    input_scale: torch.Tensor | None
    spans: tuple[tuple[int, int, Operand], ...]


def padded_sizes(num_rows: int, k: int) -> tuple[int, int]:
    """Rows and K of a prepared matrix: num_rows up to a multiple of 64, k up to a multiple of 128."""
    return -(-num_rows // BLOCK_ROWS) * BLOCK_ROWS, -(-k // BLOCK_K) * BLOCK_K


def prepare_linear(matrix: PackedMatrix) -> tuple[LinearGroup, ...]:
    """A linear's codes and scales prepared, run of columns by run of columns.

    Args:
        matrix: checked; weight and weight_scale are replaced where a run of rows fits (`padded_sizes`).

    Returns:
        One LinearGroup for each distinct input_scale; a single one, of all columns, if activations are not quantized.

    Raises:
        ValueError: as prepare_experts, before anything is changed.

    Memory: as prepare_experts, of the largest run.
    """
    _check("prepare_linear", matrix.weight, matrix.weight_scale)
    if not matrix.scale_groups:
        num_rows = matrix.weight.shape[0]
        return (LinearGroup(None, ((0, num_rows, _span(matrix, 0, num_rows)),)),)
    return tuple(
        LinearGroup(
            group.input_scale.view(1),
            tuple((start, end, _span(matrix, start, end)) for start, end in group.row_spans),
        )
        for group in matrix.scale_groups
    )


def prepare_experts(
    weight: torch.Tensor, weight_scale: torch.Tensor, alpha: torch.Tensor, gate_up: bool = False
) -> Operand:
    """A stack of matrices for a grouped GEMM, in place.

    Args:
        weight: (E, N, K/2) uint8, contiguous - replaced if it fits (`padded_sizes`), else only interleaved.
        weight_scale: (E, N, K/16) e4m3, contiguous - likewise.
        alpha: (E,) or (E, R) fp32 - factors of each N/R rows, before they are interleaved.
        gate_up: matrices are N/2 gate rows, then N/2 up rows.

    Returns:
        Operand with the alpha given, (E, 1) for (E,).

    Raises:
        ValueError: a tensor is not contiguous, a scale NaN or negative, or N/2, of gates and ups, no multiple of 8.
            Nothing has been changed then.

    Memory: beside the result, where it is padded, about four times CHUNK_BYTES.
    Numerics: exact: `restore_experts` gives back what was there, but zeros for codes whose scale is 0. Reads one flag
    back; a load-time function.
    """
    _check("prepare_experts", weight, weight_scale)
    if gate_up:
        _check_gate_up("prepare_experts", weight)
        for tensor in (weight, weight_scale):
            move_gate_up(tensor, INTERLEAVE, inverse=False)
    return Operand(*_prepared(weight, weight_scale), alpha.view(weight.shape[0], -1))


def restore_experts(
    operand: Operand, num_rows: int, k: int, gate_up: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of prepare_experts, in tensors of its own.

    Args:
        operand: from prepare_experts, or of a run of a linear's columns.
        num_rows: N.
        k: K.
        gate_up: rows are interleaved.

    Returns:
        weight (E, N, K/2) uint8 and weight_scale (E, N, K/16) e4m3, as they were, but zeros for codes whose scale is 0.
    """
    padded_rows, padded_k = padded_sizes(num_rows, k)
    stack = operand.weight.shape[0]
    words = operand.weight.view(-1, padded_k // BLOCK_K, _K_HALVES, _WARPS, _GROUPS, _THREADS, _STEPS, _WORD_BYTES)
    words = words.view(torch.int32).squeeze(-1)
    parts = torch.stack([_code_pairs(words, place) for place in range(len(_PLACES))], dim=-1)
    # Places are (hi, h), h fastest; bytes are (blocks, k, kh, w, g, t, j, hi, h).
    codes = parts.unflatten(-1, (2, _HALVES)).permute(0, 3, 8, 4, 1, 2, 6, 7, 5)
    weight = codes.reshape(stack, padded_rows, -1)[:, :num_rows, : k // NVFP4.codes_per_byte].contiguous()
    places = (-1, padded_k // BLOCK_K, _WARPS, _GROUPS, _HALVES, _BLOCK_SCALES_K)
    scales = _rotated(operand.weight_scale.view(-1), -_SCALE_ROTATION)
    scales = scales.view(places).permute(0, 2, 4, 3, 1, 5).reshape(stack, padded_rows, -1)
    decoded = _scale_tables(scales.device)[1].index_select(0, scales.flatten().int()).view(scales.shape)
    weight_scale = decoded[:, :num_rows, : k // NVFP4.block_size].contiguous().view(NVFP4.scale_dtype)
    if gate_up:
        for tensor in (weight, weight_scale):
            move_gate_up(tensor, INTERLEAVE, inverse=True)
    return weight, weight_scale


def _span(matrix: PackedMatrix, start: int, end: int) -> Operand:
    weight, weight_scale = matrix.weight[start:end].unsqueeze(0), matrix.weight_scale[start:end].unsqueeze(0)
    return Operand(*_prepared(weight, weight_scale), matrix.alpha[start:end].unsqueeze(0))


def _prepared(weight: torch.Tensor, weight_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales (E, ...) in blocks: where they were, or in new tensors if they do not fit."""
    weight_scale = weight_scale.view(torch.uint8)
    stack, num_rows, num_bytes = weight.shape
    rows, k = padded_sizes(num_rows, num_bytes * NVFP4.codes_per_byte)
    if (rows, k) != (num_rows, num_bytes * NVFP4.codes_per_byte):
        weight = _padded(weight, stack, rows, k // NVFP4.codes_per_byte)
        weight_scale = _padded(weight_scale, stack, rows, k // NVFP4.block_size)
    by_rows = weight.view(-1, BLOCK_ROWS, k // NVFP4.codes_per_byte)
    scales_by_rows = weight_scale.view(-1, BLOCK_ROWS, k // NVFP4.block_size)
    chunk = max(1, CHUNK_BYTES // by_rows[0].numel())
    for codes, scales in zip(by_rows.split(chunk), scales_by_rows.split(chunk), strict=True):
        _permute(codes, scales)
    if weight.is_cuda:
        # Kernels read weights before they wait for others: see `cutedsl.kernels.hopper`.
        torch.cuda.current_stream(weight.device).synchronize()
    return weight, weight_scale


def _permute(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Blocks of rows in place.

    Args:
        codes: (blocks of rows, 64, k/2) uint8, contiguous.
        scales: (blocks of rows, 64, k/16) uint8, contiguous.
    """
    num_k = codes.shape[2] // _BLOCK_BYTES_K
    codes.view(*scales.shape, -1).mul_((scales != 0).unsqueeze(-1))
    places = (-1, _WARPS, _HALVES, _GROUPS, num_k, _K_HALVES, _STEPS, 2, _THREADS)
    # (hi, h), then (blocks, k, kh, w, g, t, j).
    parts = codes.view(places).permute(7, 2, 0, 4, 5, 1, 3, 8, 6).flatten(0, 1)
    tables = _code_tables(codes.device)
    words = torch.zeros(parts[0].numel(), dtype=torch.int32, device=codes.device)
    for table, part in zip(tables, parts, strict=True):
        words |= table.index_select(0, part.int().flatten())
    codes.view(-1).view(torch.int32).copy_(words)
    blocks = scales.view(-1, _WARPS, _HALVES, _GROUPS, num_k, _BLOCK_SCALES_K).permute(0, 4, 1, 3, 2, 5)
    prepared = _scale_tables(scales.device)[0].index_select(0, blocks.int().flatten())
    scales.view(-1).copy_(_rotated(prepared, _SCALE_ROTATION))


def _rotated(scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes whose words of 4 are rotated by so many bits to the left."""
    words = scales.view(torch.int32)
    bits %= 32
    # The shift to the right brings copies of the sign.
    return (words << bits | words >> (32 - bits) & (1 << bits) - 1).view(torch.uint8)


def _padded(matrices: torch.Tensor, *shape: int) -> torch.Tensor:
    """Matrices in the corners of zeros."""
    out = matrices.new_zeros(shape)
    out[:, : matrices.shape[1], : matrices.shape[2]] = matrices
    return out


def _code_pairs(words: torch.Tensor, place: int) -> torch.Tensor:
    """The byte, as checkpoints have it, of the two codes at a place of each word."""
    sign, magnitude = _PLACES[place]
    out = torch.zeros_like(words, dtype=torch.uint8)
    for half in range(2):
        for target, source in enumerate((*magnitude, sign)):
            out |= ((words >> (16 * half + source) % 32 & 1) << (4 * half + target)).to(torch.uint8)
    return out


@functools.cache
def _code_tables(device: torch.device) -> torch.Tensor:
    """(4, 256) int32: the bits of a word, by place and byte."""
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    out = torch.zeros(len(_PLACES), 256, dtype=torch.int64, device="cpu")
    for place, (sign, magnitude) in enumerate(_PLACES):
        for half in range(2):
            for source, target in enumerate((*magnitude, sign)):
                out[place] |= (byte >> (4 * half + source) & 1) << (16 * half + target) % 32
    # As the same bits; the highest is the sign of an int32.
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32).to(device)


@functools.cache
def _scale_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(256,) uint8 each: a prepared scale by the byte of an E4M3 number, and back."""
    numbers = torch.arange(1, _NAN_BYTE, device="cpu").to(torch.uint8)
    mantissa, exponent = torch.frexp(numbers.view(NVFP4.scale_dtype).float())
    # frexp's mantissa is in [1/2, 1): 1.mmm is twice that, e one less.
    prepared = ((exponent - 1 + 21) << 3 | (mantissa * 16 - 8).int()).to(torch.uint8)
    there, back = torch.zeros(2, 256, dtype=torch.uint8, device="cpu")
    there[1:_NAN_BYTE] = prepared
    back[prepared.long()] = numbers
    return there.to(device), back.to(device)


def _check(function: str, weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    for label, tensor in (("weight", weight), ("weight_scale", weight_scale)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{function}: {label} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, expected contiguous: "
                "it is prepared in place"
            )
    # As bytes, NaN is 0x7f and everything above has the sign bit. A maximum needs no tensor of flags.
    if int(weight_scale.view(torch.uint8).amax()) >= _NAN_BYTE:
        raise ValueError(f"{function}: weight_scale holds NaN or negative values; was it loaded?")


def _check_gate_up(function: str, weight: torch.Tensor) -> None:
    if weight.shape[1] % (2 * INTERLEAVE):
        raise ValueError(
            f"{function}: weight has shape {tuple(weight.shape)}, expected as many gate as up rows, a multiple of "
            f"{INTERLEAVE} each; use a tensor-parallel size that does not cut a block"
        )
