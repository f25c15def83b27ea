"""atom and red: every operation, type, vector and ordering, on shared and global memory.

Lanes that meet at one address take turns in the order of their numbers (hardware may take any). Atomics never race with each
other; an atomic and a plain access that nothing orders do.

Source: PTX ISA 9.x, "atom", "red".
Checked against recordings of an H200: every operation in global and shared memory, NaNs and subnormal numbers among the
operands. Not pinned by silicon: which of two NaNs an f64 addition passes on (that in memory here), 128-bit atomics.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.accesses import (
    CACHE,
    SCOPES,
    SEMANTICS,
    SHARED_SPACES,
    after_strong_read,
    as_lanes,
    before_strong_write,
    check_aligned,
    check_count,
    check_semantics,
    load_lanes,
    modifiers,
    pack,
    space_of,
    store_lanes,
)
from ptxsim.findings import OUT_OF_BOUNDS, Unsupported
from ptxsim.ptx import Instruction, Operand, Reg, Vector
from ptxsim.registry import Effect, Source, decoder
from ptxsim.values import FULL, Value, bools

if TYPE_CHECKING:
    from ptxsim.machine import Warp

Cells = npt.NDArray[Any]
Function = Callable[[Cells, Cells, Any], Cells]

_INTEGERS = ("u32", "s32", "u64", "s64")
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")
_OPS: dict[str, tuple[str, ...]] = {
    "add": (*_INTEGERS, "f32", "f64", *_HALVES),
    "min": (*_INTEGERS, *_HALVES),
    "max": (*_INTEGERS, *_HALVES),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64", "b128"),
    "cas": ("b16", "b32", "b64", "b128"),
}
_BITS = {"f16x2": 32, "bf16x2": 32, "f16": 16, "bf16": 16}


def _f32_add(flush: bool) -> Function:
    def add(old: Cells, value: Cells, _: Any) -> Cells:
        a, b = old.view(np.float32), value.view(np.float32)
        if flush:
            a, b = _flushed(a), _flushed(b)
        with np.errstate(all="ignore"):
            out = a + b
        if flush:
            out = _flushed(out)
        return np.where(np.isnan(out), np.uint32(0x7FFFFFFF), out.view(np.uint32))

    return add


def _flushed(value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Subnormal numbers as zeros of the same sign."""
    tiny = np.abs(value) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), value), value)


def _f64_add(old: Cells, value: Cells, _: Any) -> Cells:
    """As add.f64: an operand's NaN is passed on, made quiet; inf - inf gives the negative one."""
    quiet, default = np.uint64(1 << 51), np.uint64(0xFFF8000000000000)
    a, b = old.view(np.float64), value.view(np.float64)
    with np.errstate(all="ignore"):
        out = a + b
    bits = np.where(np.isnan(out), default, out.view(np.uint64))
    bits = np.where(np.isnan(b), value | quiet, bits)
    return np.where(np.isnan(a), old | quiet, bits)


def _widen(bits: Cells, bf16: bool) -> npt.NDArray[np.float32]:
    if bf16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def _narrow(value: npt.NDArray[np.float32], bf16: bool) -> Cells:
    """Rounded to nearest even; one rounding of the float32 sum more is harmless, 24 bits being 2 * 11 + 2."""
    with np.errstate(all="ignore"):
        if bf16:
            raw = value.view(np.uint32).astype(np.uint64)
            out = ((raw + np.uint64(0x7FFF) + ((raw >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(
                np.uint16
            )
        else:
            out = value.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), out)


def _half(op: str, bf16: bool) -> Function:
    def run(old: Cells, value: Cells, _: Any) -> Cells:
        a, b = _widen(old, bf16), _widen(value, bf16)
        if op == "add":
            with np.errstate(all="ignore"):
                return _narrow(a + b, bf16)
        if op == "min":
            # -0 is below +0: where both are zero, a sign in either counts.
            picked = np.where(np.isnan(b) | (a < b), old, value)
            zeros = old | value
        else:
            picked = np.where(np.isnan(b) | (a > b), old, value)
            zeros = old & value
        picked = np.where(np.isnan(a) & np.isnan(b), np.uint16(0x7FFF), picked)
        return np.where((a == 0) & (b == 0), zeros, picked)

    return run


def _integer(op: str, signed: bool) -> Function:
    def compare(old: Cells, value: Cells, _: Any) -> Cells:
        kind = np.dtype(f"i{old.dtype.itemsize}" if signed else f"u{old.dtype.itemsize}")
        pick = np.minimum if op == "min" else np.maximum
        return pick(old.view(kind), value.view(kind)).view(old.dtype)

    simple: dict[str, Function] = {
        "add": lambda old, value, _: old + value,
        "and": lambda old, value, _: old & value,
        "or": lambda old, value, _: old | value,
        "xor": lambda old, value, _: old ^ value,
        "exch": lambda old, value, _: value,
        "inc": lambda old, value, _: np.where(old >= value, np.uint32(0), old + np.uint32(1)),
        "dec": lambda old, value, _: np.where((old == 0) | (old > value), value, old - np.uint32(1)),
        "cas": lambda old, value, new: np.where((old == value).all(axis=1, keepdims=True), new, old),
    }
    return simple.get(op, compare)


def _function(op: str, kind: str, shared: bool) -> tuple[Function, int]:
    """The operation on cells, and the bits of a cell."""
    if kind in _HALVES:
        return _half(op, kind.startswith("bf")), 16
    if kind == "f32":
        return _f32_add(not shared), 32
    if kind == "f64":
        return _f64_add, 64
    return _integer(op, kind[0] == "s"), min(64, int(kind[1:]))


def _decode(ins: Instruction) -> tuple[dict[str, str], str, int, int]:
    """Modifiers, type, elements, bits of an element; checks what fits together."""
    found = modifiers(
        ins,
        1,
        {
            "semantics": SEMANTICS,
            "scope": SCOPES,
            "space": ("global", *SHARED_SPACES),
            "op": tuple(_OPS),
            "noftz": ("noftz",),
            "vector": ("v2", "v4", "v8"),
            "type": tuple({kind for kinds in _OPS.values() for kind in kinds}),
            "hint": CACHE["hint"],
        },
    )
    where = f"PTX line {ins.line}: {ins.text}"
    op, kind = found.get("op"), found.get("type")
    if op is None or kind is None or kind not in _OPS[op]:
        raise Unsupported(f"{where}: .{op} of .{kind} is not known")
    if ins.parts[0] == "red" and op in ("exch", "cas"):
        raise Unsupported(f"{where}: red has no .{op}")
    if ("noftz" in found) and kind not in _HALVES:
        raise Unsupported(f"{where}: .noftz is for 16-bit floats")
    count = int(found.get("vector", "v1")[1:])
    bits = _BITS.get(kind) or int(kind[1:])
    if count > 1 and (kind not in ("f32", *_HALVES) or count * bits > 128 or found.get("space", "global") != "global"):
        raise Unsupported(f"{where}: .v{count} of .{kind} is not known")
    if kind in _HALVES and op != "add" and count == 1:
        raise Unsupported(f"{where}: .{op} of .{kind} exists for vectors alone")
    if found.get("semantics", "relaxed") not in ("relaxed", "acquire", "release", "acq_rel"):
        raise Unsupported(f"{where}: .{found['semantics']} is not known here")
    if "semantics" in found and "scope" in found:
        check_semantics(ins, found, SEMANTICS)
    return found, kind, count, bits


def _registers(operand: Operand) -> list[Reg]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    return [item for item in items if isinstance(item, Reg)]


@decoder("atom", "red")
def atomic(ins: Instruction) -> Effect:
    """atom and red."""
    found, kind, count, bits = _decode(ins)
    returns = ins.parts[0] == "atom"
    op, sem = found["op"], found.get("semantics", "relaxed")
    operands = ins.operands[1:] if returns else ins.operands
    check_count(ins, found, (3 if op == "cas" else 2) + returns)
    for operand in (*ins.operands[:1], operands[1]) if returns else (operands[1],):
        if isinstance(operand, Vector) != (count > 1) or (isinstance(operand, Vector) and len(operand.items) != count):
            raise Unsupported(f"PTX line {ins.line}: {ins.text}: operands do not fit .v{count}")
    if returns and any(reg.width != max(bits, 16) for reg in _registers(ins.operands[0])):
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: destination registers must be as wide as the type")
    size = count * bits // 8
    space = found.get("space", "generic")
    acquire, release = sem in ("acquire", "acq_rel"), sem in ("release", "acq_rel")

    def run(w: "Warp", mask: int, address: Value, value: Any, new: Any = None) -> Any:
        check_aligned(w, address, mask, size)
        addresses, _ = as_lanes(address, mask)
        where = space if space != "generic" else space_of(int(addresses[0]))
        if where in ("param", "local"):
            w.found(OUT_OF_BOUNDS, f"atomic on {where} memory at {int(addresses[0]):#x}", fatal=True)
        function, width = _function(op, kind, where != "global")
        before_strong_write(w, address, mask, release)
        rows = pack(value if value.__class__ is list else [value], bits, mask).view(f"u{width // 8}")
        third = None if new is None else pack([new], bits, mask).view(f"u{width // 8}")
        old = _apply(w, where, addresses, size, function, rows, third)
        after_strong_read(w, address, mask, acquire)
        return _results(old, bits, mask, count) if returns else None

    sources = (Source(operands[0], 64), *(Source(operand, bits) for operand in operands[1 : 3 if op == "cas" else 2]))
    return Effect(run, ins.operands[:1] if returns else (), sources)


def _apply(
    w: "Warp", space: str, addresses: Cells, size: int, function: Function, rows: Cells, third: Cells | None
) -> Cells:
    """Each lane's turn; returns what each found."""
    places, at = np.unique(addresses, return_inverse=True)
    lanes = np.zeros(len(places), np.int64)
    cells = load_lanes(w, space, places, lanes, size, True).view(rows.dtype)
    if len(places) == len(addresses):
        old = cells[at]
        cells[at] = function(old, rows, third)
    else:
        old = np.empty_like(rows)
        turns: dict[int, int] = {}
        turn = np.empty(len(at), np.int64)
        for lane, place in enumerate(at.tolist()):
            turn[lane] = turns.get(place, 0)
            turns[place] = turn[lane] + 1
        for now in range(max(turns.values())):
            chosen = turn == now
            old[chosen] = cells[at[chosen]]
            cells[at[chosen]] = function(old[chosen], rows[chosen], None if third is None else third[chosen])
    store_lanes(w, space, places, lanes, np.ascontiguousarray(cells).view(np.uint8), True)
    return old


def _results(old: Cells, bits: int, mask: int, count: int) -> Any:
    """Register values of the destinations."""
    packed = np.ascontiguousarray(old).view(f"u{min(bits, 64) // 8}")
    out: list[Any] = []
    for column in packed.T:
        wide = column.astype(np.uint64 if bits >= 64 else np.uint32)
        if len(wide) == 1:
            out.append(int(wide[0]))
            continue
        full = np.zeros(32, wide.dtype)
        full[bools(mask) if mask != FULL else slice(None)] = wide
        out.append(full)
    if bits == 128:
        return tuple(out)
    return out if count > 1 else out[0]
