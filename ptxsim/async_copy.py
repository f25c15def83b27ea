"""Asynchronous copies of single threads: cp.async with its groups and mbarrier arrivals, st.async and red.async.

cp.async copies 4, 8 or 16 bytes a lane from global to shared memory, through the generic proxy: what async-proxy readers
(TMA, tensor cores) need afterwards is a proxy fence like that after a store. Source bytes beyond src-size are not
read, and zero in shared memory. red.async may meet other reductions of the same word in flight, so only readers that do not
wait for it are found, not what it overwrites.

Source: PTX ISA 9.x, cp.async, cp.async.commit_group, cp.async.wait_group, cp.async.mbarrier.arrive, st.async, red.async.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.barriers import SHARED_BASE, MBarrier, find, shared_address
from ptxsim.findings import BAD_VALUE, BARRIER_MISUSE, MISALIGNED, OUT_OF_BOUNDS, Unsupported
from ptxsim.groups import Groups
from ptxsim.ptx import Imm, Instruction, Reg, Vector
from ptxsim.reduction import reduce
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.values import Value, bools, lane, lanes32, lanes64, lanes_of

if TYPE_CHECKING:
    from ptxsim.machine import Issue, Warp

Bytes = npt.NDArray[np.uint8]
_AGENT = "copy"


def _groups(w: "Warp") -> Groups:
    groups = w.state.get("cp.async")
    if groups is None:
        groups = w.state["cp.async"] = Groups(w, "cp.async")
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# cp.async


@decoder("cp.async.ca", "cp.async.cg")
def cp_async(ins: Instruction) -> Effect:
    """cp.async.{ca,cg}.shared{::cta}.global{.hints} [dst], [src], size{, src-size | ignore-src}{, policy}."""
    r = Reader(ins, 3)
    r.one_of("shared", "shared::cta")
    r.one_of("global")
    hint = r.take("L2::cache_hint")
    r.one_of("L2::64B", "L2::128B", "L2::256B", default="")
    r.end()
    dst, src, size, *rest = ins.operands
    if hint:
        if not rest:
            raise Unsupported(f"{r.where}: the cache policy is missing")
        rest.pop()
    if not isinstance(size, Imm) or size.integer() not in ((16,) if ins.parts[2] == "cg" else (4, 8, 16)):
        raise Unsupported(f"{r.where}: the size must be a literal 4, 8 or 16 (.cg: 16)")
    if len(rest) > 1:
        raise Unsupported(f"{r.where}: {len(ins.operands)} operands do not fit")
    width = size.integer()
    ignores = bool(rest) and isinstance(rest[0], Reg) and rest[0].width == 1

    def run(w: "Warp", mask: int, to: Value, source: Value, limit: Any = width) -> None:
        _copy(w, mask, to, source, width, 0 if ignores else limit, limit if ignores else 0)

    sources = [Source(dst), Source(src, 64)]
    if rest:
        sources.append(Source(rest[0], 1 if ignores else 32))
    return Effect(run, (), tuple(sources))


def _copy(w: "Warp", mask: int, dst: Value, src: Value, width: int, limit: Value, ignored: int) -> None:
    """Issues the copies of the lanes of `mask`; `ignored` is the mask of lanes that only write zeros.

    With `ignored` in use, `limit` is 0 and means `width`.
    """
    lanes = bools(mask)
    to, source = lanes32(dst)[lanes].astype(np.int64), lanes64(src)[lanes]
    if ignored or limit.__class__ is not int or limit == 0:
        limits = lanes32(width if ignored else limit)[lanes].astype(np.int64)
        if ignored:
            limits = np.where(bools(ignored)[lanes], 0, limits)
    else:
        limits = np.full(len(to), limit, np.int64)
    if (limits > width).any():
        w.found(BAD_VALUE, f"src-size {int(limits.max())} of cp.async is above its size {width}", fatal=True)
        return
    if (to % width).any() or (source % np.uint64(width)).any():
        w.found(MISALIGNED, f"an address of cp.async is not a multiple of {width}", fatal=True)
        return
    offsets = to & 0xFFFFFF
    if ((to >> 24) != w.cta.rank).any():
        w.found(BAD_VALUE, "cp.async writes to shared memory of another CTA", fatal=True)
        return
    data = _read(w, source, limits, width)
    issue = w.issue(_AGENT)
    smem, machine, groups = w.cta.smem, w.machine, _groups(w)
    smem.begin_async_write_lanes(issue, offsets, width)
    operation = groups.add(w, mask, issue)
    machine.counters["cp_async_bytes"] += int(limits.sum())
    places = offsets[:, None] + np.arange(width)

    def complete() -> None:
        smem.data[places] = data()
        smem.end_async_write_lanes(issue, offsets, width)
        groups.finish(operation)

    from ptxsim.machine import AsyncOp

    machine.engine.submit(AsyncOp("copy", None, complete, f"cp.async of {len(to)} lanes, {width} bytes each", issue))


def _read(w: "Warp", source: npt.NDArray[np.uint64], limits: npt.NDArray[np.int64], width: int) -> Callable[[], Bytes]:
    """Checks the global side; returns what fetches the bytes, which happens when the copy completes."""
    gmem = w.machine.gmem
    whole = limits == width
    if whole.all():
        gmem.load(w, source, width)
        return lambda: _fetch(w, source, limits, width)
    if whole.any():
        gmem.load(w, source[whole], width)
    for address, limit in zip(source[~whole].tolist(), limits[~whole].tolist(), strict=True):
        if limit:
            gmem.load(w, np.uint64(address) + np.arange(limit, dtype=np.uint64), 1)
    return lambda: _fetch(w, source, limits, width)


def _fetch(w: "Warp", source: npt.NDArray[np.uint64], limits: npt.NDArray[np.int64], width: int) -> Bytes:
    out = np.zeros((len(source), width), np.uint8)
    for i, (address, limit) in enumerate(zip(source.tolist(), limits.tolist(), strict=True)):
        if limit:
            region, at = w.machine.gmem.view(address, limit)
            out[i, :limit] = region.data[at : at + limit]
    return out


@decoder("cp.async.commit_group")
def commit_group(ins: Instruction) -> Effect:
    """cp.async.commit_group."""
    Reader(ins, 3).end(0)

    def run(w: "Warp", mask: int) -> None:
        _groups(w).commit(mask)

    return Effect(run)


@decoder("cp.async.wait_group", "cp.async.wait_all")
def wait_group(ins: Instruction) -> Effect:
    """cp.async.wait_group N; cp.async.wait_all, which also covers what was not committed."""
    everything = ins.parts[2] == "wait_all"
    Reader(ins, 3).end(0 if everything else 1)

    def run(w: "Warp", mask: int, newest: int = 0) -> Any:
        groups = _groups(w)
        if everything and any(operation.lanes & mask for operation in groups.open):
            groups.commit(mask)
        return groups.wait(w, mask, newest)

    return Effect(run, (), () if everything else (Source(ins.operands[0]),), blocks=True)


@decoder("cp.async.mbarrier.arrive")
def mbarrier_arrive(ins: Instruction) -> Effect:
    """cp.async.mbarrier.arrive{.noinc}{.shared{::cta}}.b64 [addr]: arrives when the thread's copies so far are complete."""
    r = Reader(ins, 4)
    increments = not r.take("noinc")
    space = r.one_of("shared", "shared::cta", default="generic")
    r.one_of("b64")
    r.end(1)

    def run(w: "Warp", mask: int, address: Value) -> None:
        by_barrier: dict[int, int] = {}
        for i in lanes_of(mask):
            by_barrier[lane(address, i)] = by_barrier.get(lane(address, i), 0) | 1 << i
        for one, lanes in by_barrier.items():
            where = shared_address(w, one, space)
            bar = find(w, where) if where is not None else None
            if bar is None:
                continue
            if bar.cta is not w.cta:
                w.found(BARRIER_MISUSE, f"cp.async.mbarrier.arrive on another CTA's mbarrier: {bar!r}")
            if increments:
                bar.add_pending(w.found, lanes.bit_count())
            _arrive_later(w, bar, lanes)

    return Effect(run, (), (Source(ins.operands[0], 64 if space == "generic" else 32),))


def _arrive_later(w: "Warp", bar: MBarrier, lanes: int) -> None:
    machine, groups = w.machine, _groups(w)
    clock = np.zeros_like(w.clock)
    operations = groups.all_of(lanes)
    for operation in operations:
        # The arrival orders the copies, not what the thread did before.
        thread = operation.issue.thread
        clock[thread] = max(int(clock[thread]), operation.issue.tick)

    def arrive() -> None:
        bar.arrive(machine.found, clock, lanes.bit_count(), asynchronous=True)

    groups.track(operations)
    if not groups.after_all(lanes, arrive):
        from ptxsim.machine import AsyncOp

        machine.engine.submit(AsyncOp("copy", None, arrive, "cp.async.mbarrier.arrive", w.issue(_AGENT)))


# ---------------------------------------------------------------------------------------------------------------------
# st.async and red.async

_STORE_TYPES = {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}
_RED_TYPES = {
    "inc": ("u32",),
    "dec": ("u32",),
    "min": ("u32", "s32"),
    "max": ("u32", "s32"),
    "add": ("u32", "s32", "u64"),
    "and": ("b32",),
    "or": ("b32",),
    "xor": ("b32",),
}


@decoder("st.async")
def st_async(ins: Instruction) -> Effect:
    """st.async{.weak}{.shared::cluster}.mbarrier::complete_tx::bytes{.v2|.v4}.type [a], b, [mbar]."""
    r = Reader(ins, 2)
    r.take("weak")
    space = r.one_of("shared::cluster", default="generic")
    r.one_of("mbarrier::complete_tx::bytes")
    vector = {"v2": 2, "v4": 4, "": 1}[r.one_of("v2", "v4", default="")]
    size = _STORE_TYPES[r.one_of(*_STORE_TYPES)]
    r.end(3)
    if (vector > 1) != isinstance(ins.operands[1], Vector):
        raise Unsupported(f"{r.where}: the value does not fit the vector size")

    def run(w: "Warp", mask: int, address: Value, value: Any, mbar: Value) -> None:
        items = value if vector > 1 else [value]
        for i in lanes_of(mask):
            data = b"".join(lane(item, i).to_bytes(size, "little") for item in items)
            _send(w, lane(address, i), data, lane(mbar, i), space, "", "")

    return _remote_effect(ins, run, space, 8 * size)


@decoder("red.async")
def red_async(ins: Instruction) -> Effect:
    """red.async.relaxed.cluster{.shared::cluster}.mbarrier::complete_tx::bytes.op.type [a], b, [mbar]."""
    r = Reader(ins, 2)
    r.one_of("relaxed")
    r.one_of("cluster")
    space = "generic"
    completes = False
    while r.peek() in ("shared::cluster", "mbarrier::complete_tx::bytes"):
        if r.pop() == "shared::cluster":
            space = "shared::cluster"
        else:
            completes = True
    operation = r.one_of(*_RED_TYPES)
    dtype = r.one_of(*_RED_TYPES[operation])
    r.end(3)
    if not completes:
        raise Unsupported(f"{r.where}: .mbarrier::complete_tx::bytes is missing")
    size = _STORE_TYPES[dtype]

    def run(w: "Warp", mask: int, address: Value, value: Value, mbar: Value) -> None:
        for i in lanes_of(mask):
            data = lane(value, i).to_bytes(size, "little")
            _send(w, lane(address, i), data, lane(mbar, i), space, operation, dtype)

    return _remote_effect(ins, run, space, 8 * size)


def _remote_effect(ins: Instruction, run: Callable[..., None], space: str, bits: int) -> Effect:
    width = 64 if space == "generic" else 32
    address, value, mbar = ins.operands
    return Effect(run, (), (Source(address, width), Source(value, bits), Source(mbar, width)))


def _send(w: "Warp", dst: int, data: bytes, mbar: int, space: str, operation: str, dtype: str) -> None:
    where, signal = shared_address(w, dst, space), shared_address(w, mbar, space)
    if where is None or signal is None:
        return
    size = len(data)
    if where % size:
        w.found(MISALIGNED, f"address {where:#x} of {w.instruction.op} is not a multiple of {size}", fatal=True)
        return
    if where >> 24 != signal >> 24:
        w.found(BARRIER_MISUSE, f"the mbarrier {signal:#x} is not in the CTA of the destination {where:#x}")
    if w.cluster.size == 1:
        w.found(BAD_VALUE, f"{w.instruction.op} needs a cluster of more than one CTA")
    bar = find(w, signal)
    if bar is None:
        return
    cta, offset = w.cluster.locate(where)
    issue: Issue = w.issue(_AGENT)
    machine, smem = w.machine, cta.smem
    new = np.frombuffer(data, np.uint8)
    if not operation:
        smem.begin_async_write(issue, offset, size)
    elif offset < SHARED_BASE or offset + size > smem.num_bytes:
        w.found(OUT_OF_BOUNDS, f"{w.instruction.op} to {where:#x}, outside shared memory", fatal=True)

    def complete() -> None:
        at = slice(offset, offset + size)
        smem.data[at] = reduce(operation, dtype, smem.data[at].copy(), new) if operation else new
        smem.end_async_write(issue, offset, size)
        bar.complete_tx(machine.found, size, issue.clock)

    from ptxsim.machine import AsyncOp

    machine.engine.submit(AsyncOp("copy", None, complete, f"{w.instruction.op} to {where:#x}", issue))
