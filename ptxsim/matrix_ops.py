"""Warp-level matrix instructions: ldmatrix, stmatrix, movmatrix, mma.sync.

Source: PTX ISA, "Warp-level Matrix Instructions" (fragment layouts of m8n8 matrices and of mma.m16n8k*). Products of
mma.sync are summed in float64 and rounded once; the order and the rounding of hardware's sums are not pinned. The 8-, 6- and
4-bit forms of ldmatrix and stmatrix, and mma.sync with block scales or with types of fewer than 8 bits, are refused.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.convert import half_values
from ptxsim.findings import DIVERGENCE, MISALIGNED, OUT_OF_BOUNDS, Unsupported
from ptxsim.floats import BF16, F16, F32, encode, numbers
from ptxsim.memory import SHARED_WINDOW
from ptxsim.ptx import Instruction, Operand, Vector
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.templates import register, sources
from ptxsim.values import FULL, M32, Value, lanes32, lanes64

if TYPE_CHECKING:
    from ptxsim.machine import Warp

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]


# ----------------------------------------------------------------------------------------------------- ldmatrix, stmatrix


def _row_offsets(w: "Warp", mask: int, address: Value, count: int, generic: bool) -> npt.NDArray[np.int64]:
    """Offsets in the CTA's shared memory of the rows that the first `count` lanes name; checks them."""
    if mask != FULL:
        w.found(DIVERGENCE, f"needs all 32 lanes of the warp, executing: {mask:#x}", fatal=True)
    addresses = lanes64(address)[:count]
    if generic:
        addresses = addresses - np.uint64(SHARED_WINDOW)
    own = (addresses >> np.uint64(24)) == w.cta.rank
    if not own.all():
        first = int(np.flatnonzero(~own)[0])
        text = f"lane {first} names address {int(lanes64(address)[first]):#x}, which is not in this CTA's shared memory"
        w.found(OUT_OF_BOUNDS, text, fatal=True)
    offsets = (addresses & np.uint64(0xFFFFFF)).astype(np.int64)
    if (offsets & 15).any():
        first = int(np.flatnonzero(offsets & 15)[0])
        w.found(
            MISALIGNED, f"lane {first} names row {int(addresses[first]):#x}: rows need 16-byte alignment", fatal=True
        )
    return offsets


def _matrix_form(ins: Instruction) -> tuple[int, bool, bool]:
    """Reads the modifiers: (matrices, transposed, generic address)."""
    r = Reader(ins)
    if not (r.take("sync") and r.take("aligned")):
        raise Unsupported(f"{r.where}: expected .sync.aligned")
    r.one_of("m8n8")
    count = int(r.one_of("x1", "x2", "x4")[1:])
    transposed = r.take("trans")
    generic = r.one_of("shared::cta", "shared", default="generic") == "generic"
    r.one_of("b16")
    r.end(2)
    return count, transposed, generic


def _registers(ins: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: {len(items)} registers found, {count} expected")
    return items


def transpose(fragment: U32) -> U32:
    """An 8x8 matrix of 16-bit elements, one row on four lanes, transposed."""
    return np.ascontiguousarray(fragment.view(np.uint16).reshape(8, 8).T).view(np.uint32).reshape(32)


@decoder("ldmatrix")
def decode_ldmatrix(ins: Instruction) -> Effect:
    """`ldmatrix`: 8x8 matrices of 16-bit elements; lanes 8i to 8i+7 name the rows of matrix i."""
    count, transposed, generic = _matrix_form(ins)
    dsts = _registers(ins, ins.operands[0], count)

    def run(w: "Warp", mask: int, address: Value) -> Any:
        rows = w.cta.smem.load(w, _row_offsets(w, mask, address, 8 * count, generic), 16)
        parts = [rows[8 * i : 8 * i + 8].reshape(-1).view(np.uint32) for i in range(count)]
        if transposed:
            parts = [transpose(part) for part in parts]
        return parts[0] if count == 1 else tuple(parts)

    return Effect(run, dsts, (Source(ins.operands[1], 64),), aligned=True)


@decoder("stmatrix")
def decode_stmatrix(ins: Instruction) -> Effect:
    """`stmatrix`: the opposite of ldmatrix."""
    count, transposed, generic = _matrix_form(ins)
    items = _registers(ins, ins.operands[1], count)

    def run(w: "Warp", mask: int, address: Value, *values: Value) -> None:
        parts = [lanes32(value) for value in values]
        if transposed:
            parts = [transpose(part) for part in parts]
        rows = np.concatenate(parts).view(np.uint8).reshape(8 * count, 16)
        w.cta.smem.store(w, _row_offsets(w, mask, address, 8 * count, generic), 16, rows)

    srcs = (Source(ins.operands[0], 64), *(Source(item, 32) for item in items))
    return Effect(run, (), srcs, aligned=True)


@decoder("movmatrix")
def decode_movmatrix(ins: Instruction) -> Effect:
    """`movmatrix`: transposes an 8x8 matrix of 16-bit elements held by the warp."""
    r = Reader(ins)
    for name in ("sync", "aligned", "m8n8", "trans", "b16"):
        r.one_of(name)
    r.end(2)
    return Effect(lambda w, mask, a: transpose(lanes32(a)), (register(ins),), sources(ins, 1, 32), aligned=True)


# ------------------------------------------------------------------------------------------------------------------- mma


def _float_of(name: str) -> Callable[[U32], npt.NDArray[np.float64]]:
    """From registers, shape (..., lanes), to the numbers in them, shape (..., lanes, elements of a register)."""

    def f16(bits: U32) -> npt.NDArray[np.float64]:
        return numbers(_split(bits, np.uint16), F16).astype(np.float64)

    def bf16(bits: U32) -> npt.NDArray[np.float64]:
        return numbers(_split(bits, np.uint16), BF16).astype(np.float64)

    def tf32(bits: U32) -> npt.NDArray[np.float64]:
        return numbers(_split(bits, np.uint32) & np.uint32(0xFFFFE000), F32).astype(np.float64)

    def small(bits: U32) -> npt.NDArray[np.float64]:
        return half_values(name)[_split(bits, np.uint8)]

    def whole(bits: U32) -> npt.NDArray[np.float64]:
        return _split(bits, np.int8 if name == "s8" else np.uint8).astype(np.float64)

    return {"f16": f16, "bf16": bf16, "tf32": tf32, "e4m3": small, "e5m2": small, "s8": whole, "u8": whole}[name]


def _split(bits: U32, kind: Any) -> npt.NDArray[Any]:
    return np.ascontiguousarray(bits).view(kind).reshape(*bits.shape, -1)


_DEPTHS = {
    "f16": (8, 16),
    "bf16": (8, 16),
    "tf32": (4, 8),
    "e4m3": (16, 32),
    "e5m2": (16, 32),
    "s8": (16, 32),
    "u8": (16, 32),
}


def a_matrix(parts: U32, name: str) -> npt.NDArray[np.float64]:
    """Fragments of A, shape (registers, 32), as 16 x K: lane 4g+t holds rows g and g+8."""
    values = _float_of(name)(parts)
    blocks = values.reshape(len(parts) // 2, 2, 8, -1)
    return np.concatenate([block.reshape(16, -1) for block in blocks], axis=1)


def b_matrix(parts: U32, name: str) -> npt.NDArray[np.float64]:
    """Fragments of B, shape (registers, 32), as K x 8: lane 4g+t holds column g."""
    values = _float_of(name)(parts)
    return np.concatenate([block.reshape(8, -1) for block in values], axis=1).T


@decoder("mma")
def decode_mma(ins: Instruction) -> Effect:
    """`mma.sync.m16n8k*`: D = A B + C on one warp's registers."""
    r = Reader(ins)
    for name in ("sync", "aligned"):
        r.one_of(name)
    shape = r.pop()
    for name in ("row", "col"):
        r.one_of(name)
    satfinite = r.take("satfinite")
    dtype = r.one_of("f32", "f16", "s32")
    atype, btype = r.one_of(*_DEPTHS), r.one_of(*_DEPTHS)
    ctype = r.one_of("f32", "f16", "s32")
    r.end(4)
    depths = _DEPTHS[atype]
    if shape not in [f"m16n8k{depth}" for depth in depths] or depths != _DEPTHS[btype]:
        raise Unsupported(f"{r.where}: shape .{shape} with these types is not known")
    integer = atype in ("s8", "u8")
    if integer != (dtype == "s32") or (dtype == "s32") != (ctype == "s32") or (satfinite and not integer):
        raise Unsupported(f"{r.where}: types .{dtype}, .{atype}, .{btype}, .{ctype} do not go together")
    if (not integer and atype != btype and atype not in ("e4m3", "e5m2")) or (
        dtype == "f16" and atype in ("bf16", "tf32")
    ):
        raise Unsupported(f"{r.where}: types .{dtype}, .{atype}, .{btype}, .{ctype} do not go together")
    halves = 2 if shape == f"m16n8k{depths[1]}" else 1
    counts = (2 * halves, halves, 2 if ctype == "f16" else 4)
    groups = [_registers(ins, operand, n) for operand, n in zip(ins.operands[1:], counts, strict=True)]
    dsts = _registers(ins, ins.operands[0], 2 if dtype == "f16" else 4)

    def run(w: "Warp", mask: int, *values: Value) -> tuple[Value, ...]:
        parts = np.stack([lanes32(value) for value in values])
        a, b = a_matrix(parts[: counts[0]], atype), b_matrix(parts[counts[0] : counts[0] + counts[1]], btype)
        total = a @ b + accumulators(parts[counts[0] + counts[1] :], ctype)
        w.machine.counters["mma_flops"] += 2 * a.size * 8
        return tuple(fragments(total, dtype, satfinite))

    srcs = tuple(Source(item, 32) for group in groups for item in group)
    return Effect(run, dsts, srcs, aligned=True)


def accumulators(parts: U32, name: str) -> npt.NDArray[np.float64]:
    """Fragments of C, as 16 x 8: lane 4g+t holds columns 2t and 2t+1 of rows g and g+8."""
    if name == "f16":
        return _float_of("f16")(parts).reshape(16, 8)
    kind = np.int32 if name == "s32" else np.float32
    return parts.view(kind).astype(np.float64).reshape(2, 2, 32).transpose(0, 2, 1).reshape(16, 8)


def fragments(total: npt.NDArray[np.float64], name: str, satfinite: bool) -> list[U32]:
    """The opposite of accumulators, after rounding."""
    if name == "f16":
        return list(encode(total, F16).reshape(2, 64).view(np.uint32))
    if name == "s32":
        whole = total.astype(np.int64)
        whole = np.clip(whole, -(1 << 31), (1 << 31) - 1) if satfinite else whole
        bits = (whole & M32).astype(np.uint32)
    else:
        bits = encode(total, F32)
    return list(np.ascontiguousarray(bits.reshape(2, 32, 2).transpose(0, 2, 1)).reshape(4, 32))
