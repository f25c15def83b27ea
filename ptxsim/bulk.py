"""Bulk copies: cp.async.bulk and cp.reduce.async.bulk, with tensor maps (TMA) and without.

A copy is checked when it is issued (addresses, what it may read, what it overwrites) and moves its bytes when the engine
completes it, so a buffer that is reused too early is really corrupted. Loads are one operation for each destination CTA and
for each executing lane: that is how often the barrier counts their bytes. Stores are one operation for each distinct set of
operands among the lanes: CuTe DSL emits them without electing a lane, and ptxas makes one instruction of it for the warp.
Reductions, which a repetition changes, run once for each lane.

Source: PTX ISA 9.x, cp.async.bulk, cp.async.bulk.tensor, cp.reduce.async.bulk, cp.reduce.async.bulk.tensor; CUDA
programming guide, Tensor Memory Accelerator (destinations aligned to 128 bytes).
Pinned on an H200: first coordinates at multiples of 16 bytes, no negative coordinates in stores (both end the kernel
there), stores that write whole 16-byte chunks, loads and reductions by several lanes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptxsim import async_copy, boxes, tensormap_ops
from ptxsim.barriers import MBarrier, find, shared_address
from ptxsim.boxes import Box, Bytes, Clip
from ptxsim.findings import (
    BAD_VALUE,
    BARRIER_MISUSE,
    MISALIGNED,
    OUT_OF_BOUNDS,
    SHARED_IN_USE,
    TENSORMAP,
    UNINITIALISED_READ,
    WRITE_READONLY,
    Unsupported,
)
from ptxsim.groups import Groups
from ptxsim.ptx import Instruction
from ptxsim.reduction import ELEMENT_BYTES, reduce
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.values import Value, lane, lanes_of

if TYPE_CHECKING:
    from ptxsim.machine import CTA, Issue, Warp
    from ptxsim.memory import Region

__all__ = ["async_copy"]

# The clock thread of stores is not that of loads: a warp that saw later loads complete has not waited for its stores.
LOAD_AGENT, STORE_AGENT = "tma", "store"
_OFFSET_MASK = 0xFFFFFF


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def _bulk_groups(w: "Warp") -> Groups:
    groups = w.state.get("bulk")
    if groups is None:
        groups = w.state["bulk"] = Groups(w, "bulk")
        w.cta.state.setdefault("at_exit", []).append(lambda: _check_waited(w, groups))
    return groups


def _check_waited(w: "Warp", groups: Groups) -> None:
    for operation in groups.unwaited():
        w.found(
            SHARED_IN_USE,
            f"the CTA exits although no thread waited (cp.async.bulk.wait_group.read 0) until the bulk copy of warp "
            f"{w.index}, PTX line {operation.line}, had read its shared memory",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Modifiers


@dataclass(frozen=True)
class _Form:
    """What the modifiers of a bulk instruction say.

    Attributes:
        dim: dimensions named by the opcode; 0 without a tensor map.
        destination, source: state spaces.
        mode: "tile", "tile::gather4" or "tile::scatter4".
        multicast, cache_hint: qualifiers that bring an operand along.
        cta_group: 1 or 2.
        operation, dtype: of a reduction, else "".
    """

    dim: int
    destination: str
    source: str
    mode: str = "tile"
    multicast: bool = False
    cta_group: int = 1
    cache_hint: bool = False
    operation: str = ""
    dtype: str = ""


_MODES = ("tile", "tile::gather4", "tile::scatter4", "im2col", "im2col::w", "im2col::w::128", "im2col_no_offs")
_OPERATIONS = ("add", "min", "max", "inc", "dec", "and", "or", "xor")
_DIMS = ("1d", "2d", "3d", "4d", "5d")


def _read_form(r: Reader, tensor: bool, reduces: bool) -> _Form:
    """Modifiers behind the base opcode. Compilers write some of them in different orders."""
    values: dict[str, Any] = {"dim": 0, "destination": "", "source": ""}
    completion = ""
    while r.peek() is not None:
        name = r.pop()
        if tensor and name in _DIMS:
            values["dim"] = int(name[0])
        elif name in ("shared::cta", "shared::cluster", "global"):
            values["source" if values["destination"] else "destination"] = name
        elif tensor and name in _MODES:
            values["mode"] = name
        elif name in ("mbarrier::complete_tx::bytes", "bulk_group"):
            completion = name
        elif name in ("multicast::cluster", "multicast::cluster::16b"):
            values["multicast"] = True
        elif tensor and name in ("cta_group::1", "cta_group::2"):
            values["cta_group"] = int(name[-1])
        elif name == "L2::cache_hint":
            values["cache_hint"] = True
        elif reduces and name in _OPERATIONS:
            values["operation"] = name
        elif reduces and not tensor and (name in ELEMENT_BYTES or name == "noftz"):
            values["dtype"] = values.get("dtype", "") if name == "noftz" else name
        elif not (name == "weak" and not tensor):
            raise Unsupported(f"{r.where}: modifier .{name} is not known here")
    form = _Form(**values)
    wanted = "bulk_group" if form.destination == "global" else "mbarrier::complete_tx::bytes"
    if completion != wanted or not form.source or (tensor and not form.dim):
        raise Unsupported(f"{r.where}: destination, source, dimension or .{wanted} is missing")
    if form.multicast and form.destination != "shared::cluster":
        raise Unsupported(f"{r.where}: .multicast::cluster needs destination .shared::cluster")
    return form


# ---------------------------------------------------------------------------------------------------------------------
# Tensor loads


@decoder("cp.async.bulk.tensor")
def tensor_copy(ins: Instruction) -> Effect:
    """cp.async.bulk.tensor.Nd..., both directions, tile and row-gather modes."""
    r = Reader(ins, 4)
    form = _read_form(r, tensor=True, reduces=False)
    if form.destination == "global":
        return _tensor_store(ins, r, form)
    if form.source != "global" or form.mode not in ("tile", "tile::gather4"):
        raise Unsupported(f"{r.where}: source .{form.source} in mode .{form.mode} is not modelled")
    count = 3 + form.multicast + form.cache_hint
    if len(ins.operands) != count:
        raise Unsupported(f"{r.where}: {len(ins.operands)} operands found, {count} expected")
    destination, tensor, barrier, *rest = ins.operands

    def run(w: "Warp", mask: int, dst: Value, where: Any, mbar: Value, *others: Value) -> None:
        address, (coordinates,) = where
        targets = others[0] if form.multicast else 0
        for i in lanes_of(mask):
            at = [_signed(lane(c, i)) for c in coordinates]
            _load(w, form, lane(dst, i), lane(address, i), at, lane(mbar, i), lane(targets, i))

    sources = [Source(destination), Source(tensor, 64), Source(barrier)]
    if form.multicast:
        sources.append(Source(rest[0], 16))
    return Effect(run, (), tuple(sources))


def _box(w: "Warp", form: _Form, address: int, coordinates: list[int]) -> Box | None:
    """The geometry of a copy; None after a finding."""
    rows = 4 if form.mode != "tile" else None
    box = tensormap_ops.box_of(w, address, rows)
    if box is None:
        return None
    if box.map.rank != form.dim:
        w.found(
            TENSORMAP, f"the instruction copies {form.dim} dimensions, its tensor map has {box.map.rank}", fatal=True
        )
        return None
    if len(coordinates) != (5 if rows else form.dim):
        w.found(TENSORMAP, f"{len(coordinates)} coordinates for {form.mode} of {form.dim} dimensions", fatal=True)
        return None
    if rows and (form.dim != 2 or box.map.box[1] != 1):
        w.found(TENSORMAP, f"{form.mode} needs a map of rank 2 with 1 row in its box, this has box {box.map.box}")
    if not box.aligned(coordinates):
        w.found(
            MISALIGNED,
            f"coordinate {coordinates[0]} of dimension 0 ({box.map.dtype}) is not at a multiple of 16 bytes",
            fatal=True,
        )
        return None
    if form.destination == "global" and min(coordinates) < 0:
        w.found(BAD_VALUE, f"copy to global memory from negative coordinates {coordinates}", fatal=True)
        return None
    return box


def _clips(box: Box, form: _Form, coordinates: list[int]) -> list[Clip | None]:
    store = form.destination == "global"
    if form.mode == "tile":
        return [box.clip(coordinates, store)]
    return [box.clip([coordinates[0], row], store) for row in coordinates[1:]]


class _Global:
    """The global side of a copy: one clip for each part of the box, and the buffers they lie in."""

    __slots__ = ("_parts", "box")

    def __init__(self, w: "Warp", box: Box, clips: list[Clip | None]) -> None:
        self.box = box
        self._parts: list[tuple[Clip | None, Region | None, int]] = []
        for clip in clips:
            if clip is None:
                self._parts.append((None, None, 0))
            else:
                buffer, start = w.machine.gmem.view(clip.first, clip.end - clip.first)
                self._parts.append((clip, buffer, start))

    def check_readable(self, w: "Warp", issue: "Issue") -> None:
        """Everything inside the tensor has been written, and the async proxy may see it."""
        for clip, buffer, start in self._parts:
            if clip is not None and buffer is not None:
                w.machine.gmem.check_waited(w, buffer, slice(start, start + 1))
                _check_global_read(w, issue, self.box, clip, buffer, start)

    def check_writable(self, w: "Warp") -> None:
        """No part lies in read-only memory, or in what an earlier launch may still use."""
        for _, buffer, start in self._parts:
            if buffer is not None and buffer.readonly:
                w.found(WRITE_READONLY, f"tensor copy writes to {buffer.name}, which is read-only", fatal=True)
            if buffer is not None:
                w.machine.gmem.check_waited(w, buffer, slice(start, start + 1), writes=True)

    def gather(self) -> Bytes:
        """The box as it goes to shared memory, unswizzled."""
        if len(self._parts) == 1:
            clip, buffer, start = self._parts[0]
            return self.box.gather(clip, buffer.data if buffer is not None else _NOTHING, start)
        rows = Box(self.box.map, 1)
        pieces = [rows.gather(clip, b.data if b is not None else _NOTHING, start) for clip, b, start in self._parts]
        return np.concatenate(pieces)

    def parts(self, data: Bytes) -> Iterator[tuple[Box, Clip, "Region", int, Bytes]]:
        """(geometry, clip, buffer, start, bytes of that part of the box) of what lies inside the tensor."""
        box = self.box if len(self._parts) == 1 else Box(self.box.map, 1)
        size = len(data) // len(self._parts)
        for i, (clip, buffer, start) in enumerate(self._parts):
            if clip is not None and buffer is not None:
                yield box, clip, buffer, start, data[i * size : (i + 1) * size]


_NOTHING: Bytes = np.zeros(0, np.uint8)


def _check_global_read(w: "Warp", issue: "Issue", box: Box, clip: Clip, buffer: "Region", start: int) -> None:
    if buffer.valid is not None and not box.view(clip, buffer.valid, start).all():
        w.found(
            UNINITIALISED_READ,
            f"tensor copy reads bytes that nobody has written, among those from {buffer.name_at(start)} on",
        )
    if buffer.who is not None and box.view(clip, buffer.who, start).any():
        w.machine.gmem.check_async_read(issue, buffer, boxes.indices(clip, start))


@dataclass(frozen=True, slots=True)
class _Target:
    """One destination CTA of a load, and the barrier that counts its bytes."""

    cta: "CTA"
    offset: int
    barrier: MBarrier


def _targets(w: "Warp", form: _Form, dst: int, mbar: int, mask: int) -> list[_Target] | None:
    """Where a load writes and what it signals; None after a finding."""
    address = shared_address(w, dst, form.destination)
    signal = shared_address(w, mbar, form.destination)
    if address is None or signal is None:
        return None
    if not form.multicast:
        cta, offset = w.cluster.locate(address)
        pair = 1 if form.cta_group == 2 else 0
        if signal >> 24 != cta.rank and signal >> 24 | pair != cta.rank | pair:
            w.found(
                BARRIER_MISUSE,
                f"the mbarrier {signal:#x} is not in the CTA of the destination {address:#x}"
                + (" nor in its peer" if pair else ""),
            )
        bar = find(w, signal, asynchronous=True)
        return None if bar is None else [_Target(cta, offset, bar)]
    if not mask or mask >> w.cluster.size:
        w.found(OUT_OF_BOUNDS, f"multicast mask {mask:#x} for a cluster of {w.cluster.size} CTAs", fatal=True)
        return None
    found = []
    for rank in lanes_of(mask):
        to = rank if form.cta_group == 1 else rank & ~1 | signal >> 24 & 1
        bar = find(w, to << 24 | signal & _OFFSET_MASK, asynchronous=True)
        if bar is None:
            return None
        found.append(_Target(w.cluster.ctas[rank], address & _OFFSET_MASK, bar))
    return found


def _load(w: "Warp", form: _Form, dst: int, address: int, at: list[int], mbar: int, mask: int) -> None:
    box = _box(w, form, address, at)
    targets = _targets(w, form, dst, mbar, mask)
    if box is None or targets is None:
        return
    if dst & 127:
        w.found(MISALIGNED, f"destination {dst:#x} of a tensor copy is not a multiple of 128", fatal=True)
        return
    clips = _clips(box, form, at)
    side = _Global(w, box, clips)
    issue = w.issue(LOAD_AGENT)
    side.check_readable(w, issue)
    machine = w.machine
    counters = machine.counters
    counters["tma_loads"] += 1
    counters["tma_load_bytes"] += box.num_bytes * len(targets)
    counters["tma_load_global_bytes"] += box.num_bytes
    from ptxsim.machine import AsyncOp

    for target in targets:
        smem = target.cta.smem
        chunks = box.chunks(target.offset)
        if chunks is None:
            smem.begin_async_write(issue, target.offset, box.num_bytes)
        else:
            smem.begin_async_write_lanes(issue, chunks * 16, 16)

        def complete(target: _Target = target, chunks: Any = chunks) -> None:
            memory = target.cta.smem
            box.put(memory.data, target.offset, side.gather())
            if chunks is None:
                memory.end_async_write(issue, target.offset, box.num_bytes)
            else:
                memory.end_async_write_lanes(issue, chunks * 16, 16)
            target.barrier.complete_tx(machine.found, box.counted_bytes, issue.clock)

        what = f"tensor load of box {box.map.box} at {at} to CTA {target.cta.index} offset {target.offset:#x}"
        machine.engine.submit(AsyncOp("load", None, complete, what, issue))


# ---------------------------------------------------------------------------------------------------------------------
# Tensor stores and reductions


def _tensor_store(ins: Instruction, r: Reader, form: _Form) -> Effect:
    if form.source != "shared::cta" or form.mode not in ("tile", "tile::scatter4"):
        raise Unsupported(f"{r.where}: source .{form.source} in mode .{form.mode} is not modelled")
    if len(ins.operands) != 2 + form.cache_hint:
        raise Unsupported(f"{r.where}: {len(ins.operands)} operands found, {2 + form.cache_hint} expected")

    copies = _each if form.operation else _distinct

    def run(w: "Warp", mask: int, where: Any, src: Value) -> None:
        address, (coordinates,) = where
        for (one, source, *at), lanes in copies(mask, [address, src, *coordinates]):
            _store(w, form, lanes, one, [_signed(c) for c in at], source)

    return Effect(run, (), (Source(ins.operands[0], 64), Source(ins.operands[1])))


@decoder("cp.reduce.async.bulk.tensor")
def tensor_reduce(ins: Instruction) -> Effect:
    """cp.reduce.async.bulk.tensor.Nd.global.shared::cta.op..."""
    r = Reader(ins, 5)
    form = _read_form(r, tensor=True, reduces=True)
    if not form.operation or form.mode != "tile":
        raise Unsupported(f"{r.where}: an operation in mode .tile is expected")
    return _tensor_store(ins, r, form)


def _distinct(mask: int, values: list[Any]) -> list[tuple[tuple[int, ...], int]]:
    """Distinct tuples of the values among the lanes, with the lanes that have them."""
    if all(value.__class__ is int for value in values):
        return [(tuple(values), mask)]
    found: dict[tuple[int, ...], int] = {}
    for i in lanes_of(mask):
        key = tuple(lane(value, i) for value in values)
        found[key] = found.get(key, 0) | 1 << i
    return list(found.items())


def _each(mask: int, values: list[Any]) -> list[tuple[tuple[int, ...], int]]:
    """The tuple of every lane."""
    return [(tuple(lane(value, i) for value in values), 1 << i) for i in lanes_of(mask)]


def _store(w: "Warp", form: _Form, lanes: int, address: int, at: list[int], src: int) -> None:
    box = _box(w, form, address, at)
    source = shared_address(w, src, "shared::cta")
    if box is None or source is None:
        return
    if source & 127:
        w.found(MISALIGNED, f"source {source:#x} of a tensor copy is not a multiple of 128", fatal=True)
        return
    if box.map.dtype == "b4x16_p64":
        w.found(TENSORMAP, "type b4x16_p64 can be loaded only", fatal=True)
        return
    dtype = box.map.dtype
    if form.operation and not _reducible(w, form.operation, dtype):
        return
    offset = source & _OFFSET_MASK
    side = _Global(w, box, _clips(box, form, at))
    side.check_writable(w)
    issue = w.issue(STORE_AGENT)
    machine, smem = w.machine, w.cta.smem
    chunks = box.chunks(offset)
    if chunks is None:
        smem.check_async_read(issue, offset, box.num_bytes)
    else:
        smem.check_async_read_chunks(issue, chunks)
    groups = _bulk_groups(w)
    operation = groups.add(w, lanes, issue)
    machine.counters["tma_stores"] += 1
    machine.counters["tma_store_bytes"] += box.num_bytes
    combine = _combiner(form.operation, dtype)

    def complete() -> None:
        if chunks is None:
            smem.recheck_async_read(issue, offset, box.num_bytes)
        else:
            smem.recheck_async_read_chunks(issue, chunks)
        data = box.get(smem.data, offset)
        for part, clip, buffer, start, piece in side.parts(data):
            _write_global(w, part, clip, buffer, start, piece, combine)
        groups.finish(operation)

    from ptxsim.machine import AsyncOp

    what = f"tensor {'reduction' if form.operation else 'store'} of box {box.map.box} at {at} from offset {offset:#x}"
    machine.engine.submit(AsyncOp("store", None, complete, what, issue))


Combine = Callable[[Bytes, Bytes], Bytes]


def _combiner(operation: str, dtype: str) -> Combine | None:
    if not operation:
        return None
    return lambda old, new: reduce(operation, dtype, old, new)


_REDUCIBLE = {
    "add": ("u32", "s32", "u64", "f32", "f64", "f16", "bf16"),
    "min": ("u32", "s32", "u64", "s64", "f16", "bf16"),
    "max": ("u32", "s32", "u64", "s64", "f16", "bf16"),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32", "b64", "u32", "s32", "u64", "s64"),
    "or": ("b32", "b64", "u32", "s32", "u64", "s64"),
    "xor": ("b32", "b64", "u32", "s32", "u64", "s64"),
}


def _reducible(w: "Warp", operation: str, dtype: str) -> bool:
    if dtype in _REDUCIBLE[operation]:
        return True
    w.found(TENSORMAP, f"reduction .{operation} of type {dtype} does not exist", fatal=True)
    return False


def _write_global(
    w: "Warp", box: Box, clip: Clip, buffer: "Region", start: int, data: Bytes, combine: Combine | None
) -> None:
    inside = box.inside(clip, data)
    target = box.view(clip, buffer.data, start)
    valid = None if buffer.valid is None else box.view(clip, buffer.valid, start)
    if combine is not None:
        if valid is not None and not valid.all():
            w.machine.found(UNINITIALISED_READ, f"reduction into bytes of {buffer.name} that nobody has written")
        inside = combine(np.ascontiguousarray(target), np.ascontiguousarray(inside))
    target[...] = inside
    if valid is not None:
        valid[...] = True
    if buffer.who is not None:
        box.view(clip, buffer.who, start)[...] = 0


# ---------------------------------------------------------------------------------------------------------------------
# Bulk copies without a tensor map


@decoder("cp.async.bulk", "cp.reduce.async.bulk")
def bulk_copy(ins: Instruction) -> Effect:
    """cp{.reduce}.async.bulk.dst.src.completion... [dst], [src], size{, [mbar]}..."""
    reduces = ins.parts[1] == "reduce"
    r = Reader(ins, 4 if reduces else 3)
    form = _read_form(r, tensor=False, reduces=reduces)
    if reduces and (not form.operation or form.dtype not in _REDUCIBLE[form.operation]):
        raise Unsupported(f"{r.where}: reduction .{form.operation} of type .{form.dtype} does not exist")
    signals = form.destination != "global"
    count = 3 + signals + form.multicast + form.cache_hint
    if len(ins.operands) != count:
        raise Unsupported(f"{r.where}: {len(ins.operands)} operands found, {count} expected")
    dst, src, size, *rest = ins.operands
    pair = (form.destination, form.source)
    if pair == ("global", "shared::cta"):

        def run(w: "Warp", mask: int, to: Value, source: Value, length: Value) -> None:
            for (one, two, three), lanes in (_each if reduces else _distinct)(mask, [to, source, length]):
                _bulk_store(w, form, lanes, one, two, three)

        return Effect(run, (), (Source(dst, 64), Source(src), Source(size)))
    if pair in (("shared::cta", "global"), ("shared::cluster", "global")) and not reduces:
        work, width = _bulk_load, 64
    elif pair == ("shared::cluster", "shared::cta"):
        work, width = _bulk_remote, 32
    else:
        raise Unsupported(f"{r.where}: no such direction")

    def run_signalling(w: "Warp", mask: int, to: Value, source: Value, length: Value, mbar: Value, *m: Value) -> None:
        targets = m[0] if form.multicast else 0
        for i in lanes_of(mask):
            work(w, form, lane(to, i), lane(source, i), lane(length, i), lane(mbar, i), lane(targets, i))

    sources = [Source(dst), Source(src, width), Source(size), Source(rest[0])]
    if form.multicast:
        sources.append(Source(rest[1], 16))
    return Effect(run_signalling, (), tuple(sources))


def _bulk_aligned(w: "Warp", dst: int, src: int, size: int) -> bool:
    for name, value in (("destination", dst), ("source", src), ("size", size)):
        if value & 15:
            w.found(MISALIGNED, f"{name} {value:#x} of a bulk copy is not a multiple of 16", fatal=True)
            return False
    return size > 0


def _bulk_load(w: "Warp", form: _Form, dst: int, src: int, size: int, mbar: int, mask: int) -> None:
    targets = _targets(w, form, dst, mbar, mask)
    if targets is None or not _bulk_aligned(w, dst, src, size):
        return
    buffer, start = w.machine.gmem.view(src, size)
    w.machine.gmem.check_waited(w, buffer, slice(start, start + size))
    issue = w.issue(LOAD_AGENT)
    if buffer.valid is not None and not buffer.valid[start : start + size].all():
        w.found(UNINITIALISED_READ, f"bulk copy reads bytes of {buffer.name} that nobody has written")
    w.machine.gmem.check_async_read(issue, buffer, slice(start, start + size))
    machine = w.machine
    machine.counters["tma_loads"] += 1
    machine.counters["tma_load_bytes"] += size * len(targets)
    machine.counters["tma_load_global_bytes"] += size
    from ptxsim.machine import AsyncOp

    for target in targets:
        target.cta.smem.begin_async_write(issue, target.offset, size)

        def complete(target: _Target = target) -> None:
            memory = target.cta.smem
            memory.data[target.offset : target.offset + size] = buffer.data[start : start + size]
            memory.end_async_write(issue, target.offset, size)
            target.barrier.complete_tx(machine.found, size, issue.clock)

        what = f"bulk load of {size} bytes to CTA {target.cta.index} offset {target.offset:#x}"
        machine.engine.submit(AsyncOp("load", None, complete, what, issue))


def _bulk_remote(w: "Warp", form: _Form, dst: int, src: int, size: int, mbar: int, mask: int) -> None:
    targets = _targets(w, form, dst, mbar, mask)
    source = shared_address(w, src, "shared::cta")
    if targets is None or source is None or not _bulk_aligned(w, dst, src, size):
        return
    (target,) = targets
    if target.cta is w.cta:
        w.found(BAD_VALUE, f"bulk copy from shared memory to {dst:#x}, which is the CTA's own: must be another CTA's")
    issue = w.issue(LOAD_AGENT)
    machine, mine, theirs = w.machine, w.cta.smem, target.cta.smem
    offset = source & _OFFSET_MASK
    mine.check_async_read(issue, offset, size)
    if not form.operation:
        theirs.begin_async_write(issue, target.offset, size)
    elif target.offset + size > theirs.num_bytes:
        w.found(OUT_OF_BOUNDS, f"bulk reduction to {dst:#x}, outside shared memory", fatal=True)
    combine = _combiner(form.operation, form.dtype)

    def complete() -> None:
        mine.recheck_async_read(issue, offset, size)
        data = mine.data[offset : offset + size].copy()
        where = slice(target.offset, target.offset + size)
        theirs.data[where] = data if combine is None else combine(theirs.data[where].copy(), data)
        theirs.end_async_write(issue, target.offset, size)
        target.barrier.complete_tx(machine.found, size, issue.clock)

    from ptxsim.machine import AsyncOp

    machine.counters["dsmem_bytes"] += size
    machine.engine.submit(AsyncOp("load", None, complete, f"bulk copy of {size} bytes to {dst:#x}", issue))


def _bulk_store(w: "Warp", form: _Form, lanes: int, dst: int, src: int, size: int) -> None:
    source = shared_address(w, src, "shared::cta")
    if source is None or not _bulk_aligned(w, dst, src, size):
        return
    offset = source & _OFFSET_MASK
    buffer, start = w.machine.gmem.view(dst, size)
    if buffer.readonly:
        w.found(WRITE_READONLY, f"bulk copy writes to {buffer.name}, which is read-only", fatal=True)
    w.machine.gmem.check_waited(w, buffer, slice(start, start + size), writes=True)
    issue = w.issue(STORE_AGENT)
    machine, smem = w.machine, w.cta.smem
    smem.check_async_read(issue, offset, size)
    groups = _bulk_groups(w)
    operation = groups.add(w, lanes, issue)
    machine.counters["tma_stores"] += 1
    machine.counters["tma_store_bytes"] += size
    combine = _combiner(form.operation, form.dtype)

    def complete() -> None:
        smem.recheck_async_read(issue, offset, size)
        where = slice(start, start + size)
        data = smem.data[offset : offset + size].copy()
        if combine is not None:
            if buffer.valid is not None and not buffer.valid[where].all():
                machine.found(UNINITIALISED_READ, f"reduction into bytes of {buffer.name} that nobody has written")
            data = combine(buffer.data[where].copy(), data)
        buffer.data[where] = data
        if buffer.valid is not None:
            buffer.valid[where] = True
        if buffer.who is not None:
            buffer.who[where] = 0
        groups.finish(operation)

    from ptxsim.machine import AsyncOp

    what = f"bulk {'reduction' if form.operation else 'store'} of {size} bytes from offset {offset:#x}"
    machine.engine.submit(AsyncOp("store", None, complete, what, issue))


# ---------------------------------------------------------------------------------------------------------------------
# Prefetches and groups


@decoder("cp.async.bulk.prefetch.L2")
def bulk_prefetch(ins: Instruction) -> Effect:
    """cp.async.bulk.prefetch.L2.global{.L2::cache_hint} [src], size{, policy}: no effect but its operands' rules."""
    r = Reader(ins, 5)
    r.one_of("global")
    hint = r.take("L2::cache_hint")
    r.end(2 + hint)

    def run(w: "Warp", mask: int, source: Value, size: Value) -> None:
        for (one, two), _ in _distinct(mask, [source, size]):
            _bulk_aligned(w, 0, one, two)

    return Effect(run, (), (Source(ins.operands[0], 64), Source(ins.operands[1])))


@decoder("cp.async.bulk.prefetch.tensor")
def tensor_prefetch(ins: Instruction) -> Effect:
    """cp.async.bulk.prefetch.tensor.Nd.L2.global...: reads the tensor map, moves nothing that the model sees."""
    r = Reader(ins, 5)
    dim = int(r.one_of(*_DIMS)[0])
    r.one_of("L2")
    r.one_of("global")
    mode = r.one_of("tile", "tile::gather4", default="tile")
    hint = r.take("L2::cache_hint")
    r.end(1 + hint)
    form = _Form(dim, "L2", "global", mode)

    def run(w: "Warp", mask: int, where: Any) -> None:
        address, (coordinates,) = where
        for (one, *at), _ in _distinct(mask, [address, *coordinates]):
            _box(w, form, one, [_signed(c) for c in at])

    return Effect(run, (), (Source(ins.operands[0], 64),))


@decoder("cp.async.bulk.commit_group")
def bulk_commit(ins: Instruction) -> Effect:
    """cp.async.bulk.commit_group."""
    Reader(ins, 4).end(0)

    def run(w: "Warp", mask: int) -> None:
        _bulk_groups(w).commit(mask)

    return Effect(run)


@decoder("cp.async.bulk.wait_group")
def bulk_wait(ins: Instruction) -> Effect:
    """cp.async.bulk.wait_group{.read} N."""
    r = Reader(ins, 4)
    r.take("read")
    r.end(1)

    def run(w: "Warp", mask: int, newest: int) -> Any:
        return _bulk_groups(w).wait(w, mask, newest)

    return Effect(run, (), (Source(ins.operands[0]),), blocks=True)
