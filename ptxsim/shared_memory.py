"""Shared memory of a CTA, with a shadow that finds races and accesses that hardware does not order.

The shadow holds, for each byte, whether it was written, whether a copy is in flight to it, the last writer as (thread, tick)
in the cluster's vector clocks, whether that writer was in the generic proxy, and the last read of every thread that read it.
An access is in order if the reader's or writer's clock covers those ticks (happens-before). A warp is one thread: lanes
of a warp are taken to run in step, and a missing bar.warp.sync is not looked for; only one store whose lanes write different
values to one address is a finding. Asynchronous agents are threads of their own; what an operation may rely on is what
the warp that issued it knew.

For speed the shadow has two layers: 16-byte chunks, which nearly every access covers whole, and single bytes for the chunks
that someone accessed in part.

Generic writes become visible to the async proxy by fence.proxy.async. A fence of thread t at tick k covers every write that
happened before it; a reader with clock C may rely on the last fence of each t with k <= C[t]. So fences are kept as a list
of clocks, and cost nothing where asynchronous units read what asynchronous units wrote.

Source: PTX ISA 9.x, memory consistency model (causality order, proxies) and "Async proxy".
Not pinned by silicon: that a copy that overwrites generic writes needs the fence too; that what cp.async wrote (through the
generic proxy) does not need it before wgmma or tcgen05.mma read it: gather kernels of FlashInfer and QuACK leave it out.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.findings import (
    BARRIER_MISUSE,
    IN_FLIGHT_ACCESS,
    MISSING_PROXY_FENCE,
    OUT_OF_BOUNDS,
    RACE,
    SHARED_IN_USE,
    UNINITIALISED_READ,
)

if TYPE_CHECKING:
    from ptxsim.machine import CTA, Cluster, Issue, Warp

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
Clock = npt.NDArray[np.uint32]
Index = slice | Offsets
Found = Callable[..., None]

# The first KiB belongs to the system.
SHARED_BASE = 0x400
CHUNK = 16

# Flags of a chunk or byte. A chunk with SPLIT has no other: its bytes have their own.
UNINIT, IN_FLIGHT, GENERIC, SPLIT, STRONG = 1, 2, 4, 8, 16
_READABLE = bytes([0, GENERIC, GENERIC | STRONG])
_WRITABLE = _READABLE + bytes([UNINIT])
_ONLY_SPLIT = bytes([SPLIT])
_NOT_IN_FLIGHT = bytes(f for f in range(32) if not f & (IN_FLIGHT | SPLIT))

# Byte strings of the offsets k * size of 32 lanes: equality of byte strings is the fastest test for contiguous lanes.
LANE_STEPS = {size: (np.arange(32, dtype=np.int64) * size).tobytes() for size in (1, 2, 4, 8, 16, 32)}
_WITHIN = {size: np.arange(size, dtype=np.int64) for size in (1, 2, 4, 8, 16, 32)}
# Proxies that a fence separates from the generic one. cp.async writes through the generic proxy, but kernels that ship
# and run (FlashInfer's gather GEMM, QuACK's on sm_90 and sm_100) let tensor cores read what it wrote without a proxy
# fence, so that none is asked for; no text of the ISA that would settle it was found.
_UNFENCED_BY_PRACTICE = ("cp", "async")
_ASYNC_PROXY = (("cp", "async", "bulk"), ("cp", "reduce", "async"), ("tcgen05",), ("wgmma",), ("clusterlaunchcontrol",))


def spread(offsets: Offsets, size: int) -> Offsets:
    """Offsets of every byte of accesses of `size` bytes."""
    return (offsets[:, None] + _WITHIN[size]).reshape(-1)


def thread_name(cluster: "Cluster", thread: int) -> str:
    """What a number in the vector clocks stands for."""
    for cta in cluster.ctas:
        at = thread - cta.first_thread
        if 0 <= at < len(cta.warps):
            return f"warp {at} of CTA {cta.index}"
        if at == len(cta.warps):
            return f"the TMA unit (for CTA {cta.index})"
        if at == len(cta.warps) + 1:
            return f"the tensor core (for CTA {cta.index})"
        if at == len(cta.warps) + 2:
            return f"a cp.async (for CTA {cta.index})"
        if at == len(cta.warps) + 3:
            return f"the TMA unit's stores (for CTA {cta.index})"
    return f"thread {thread}"


class Fences:
    """The proxy fences of all threads: the warps' clocks when they fenced."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[list[int], list[Clock]]] = {}

    def note(self, w: "Warp") -> None:
        """The warp fences now."""
        ticks, clocks = self._of.setdefault(w.thread, ([], []))
        tick = w.clock.item(w.thread)
        if ticks and ticks[-1] == tick:
            clocks[-1] = w.clock.copy()
        else:
            ticks.append(tick)
            clocks.append(w.clock.copy())

    def join(self, clock: Clock, into: Clock) -> None:
        """Joins what the fences known to `clock` cover into `into`."""
        for thread, (ticks, clocks) in self._of.items():
            last = bisect_right(ticks, clock.item(thread))
            if last:
                np.maximum(into, clocks[last - 1], out=into)


def note_fence(w: "Warp", kind: str) -> None:
    """A proxy fence by `w` that covers memory of the given kind in the whole cluster: "shared", "global", or another."""
    fences = w.cluster.state.get("fences of " + kind)
    if fences is None:
        fences = w.cluster.state["fences of " + kind] = Fences()
    fences.note(w)


def fenced_clock(cluster: "Cluster", clock: Clock, kind: str) -> Clock:
    """For each thread, the tick up to which its writes are behind a fence of that kind which `clock` covers."""
    out = np.zeros_like(clock)
    fences = cluster.state.get("fences of " + kind)
    if fences is not None:
        fences.join(clock, out)
    return out


def in_async_proxy(issue: "Issue") -> bool:
    """True if the operation accesses memory through the async proxy; cp.async and st.async use the generic one."""
    parts = issue.ins.parts
    return any(parts[: len(prefix)] == prefix for prefix in _ASYNC_PROXY)


class _Layer:
    """The shadow at one granularity."""

    __slots__ = ("flags", "reads", "tick", "unit", "writer")

    def __init__(self, count: int, unit: int, columns: int, flags: int) -> None:
        self.unit = unit
        self.flags: Bytes = np.full(count, flags, np.uint8) if flags else np.zeros(count, np.uint8)
        self.writer = np.zeros(count, np.int64)
        self.tick = np.zeros(count, np.uint32)
        self.reads = np.zeros((count, columns), np.uint32)

    def widen(self, rows: Index) -> None:
        """Twice as many columns for readers; only the given rows are kept."""
        old = self.reads
        self.reads = np.zeros((old.shape[0], old.shape[1] * 2), np.uint32)
        self.reads[rows, : old.shape[1]] = old[rows]


class _Actor:
    """Who accesses: a warp, or the agent of an asynchronous operation with what its issuer knows."""

    __slots__ = ("clock", "fenced", "found", "thread", "tick")

    def __init__(self, found: Found, clock: Clock, thread: int, tick: int, fenced: bool) -> None:
        self.found, self.clock, self.thread, self.tick, self.fenced = found, clock, thread, tick, fenced


class SharedMemory:
    """Shared memory of one CTA; offsets count from the start of its window, the first KiB of which is reserved.

    Attributes:
        data: the bytes.
        barriers: mbarrier objects by offset.
        barrier_bytes: 1 where an mbarrier lives.
        closed: the CTA has exited.
    """

    def __init__(self, cta: "CTA", num_bytes: int) -> None:
        self.cta, self.num_bytes = cta, num_bytes
        self._count = -(-num_bytes // 32) * 2
        # Not zero: what is read uninitialised should look wrong.
        self.data: Bytes = np.full(self._count * CHUNK, 0xFF, np.uint8)
        self.barriers: dict[int, Any] = {}
        self.barrier_bytes: Bytes = np.zeros(self._count * CHUNK, np.uint8)
        self.closed = False
        self._barrier_span = (0, 0, 0)
        self._rows = {size: self.data.reshape(-1, size) for size in LANE_STEPS}
        # A column for each thread that reads: the CTA's warps and agents, a few of other CTAs; more are made when needed.
        columns = cta.num_warps + 4 + (4 if cta.cluster.size > 1 else 0)
        self._chunks = _Layer(self._count, CHUNK, columns, UNINIT)
        self._fine: _Layer | None = None
        self._columns: dict[int, int] = {}
        # The thread of each column of `reads`; unused columns hold no read, so any thread will do.
        self._readers = np.zeros(self._chunks.reads.shape[1], np.int64)
        self._fences = Fences()

    # Generic proxy.

    def load(self, w: "Warp", offsets: Offsets, size: int, strong: bool = False) -> Bytes:
        """Reads `size` bytes at each offset (a multiple of `size`) through the generic proxy; rows of bytes.

        Args:
            w: who reads.
            offsets: one for each lane that reads.
            size: 1, 2, 4, 8, 16 or 32.
            strong: the access is volatile, relaxed, acquiring or atomic: it may meet unordered strong writes.
        """
        n, start = len(offsets), offsets.item(0)
        actor = _Actor(w.found, w.clock, w.thread, w.clock.item(w.thread), False)
        if n == 1 or (offsets - start).tobytes() == LANE_STEPS[size][: 8 * n]:
            stop = start + n * size
            self._bounds(w.found, start, stop, None, "read")
            self._read_range(actor, start, stop, strong)
            return self.data[start:stop].reshape(n, size).copy()
        places = offsets.tolist()
        self._bounds(w.found, min(places), max(places) + size, (offsets, size), "read")
        rows = offsets // size
        if size >= CHUNK and not strong:
            self._read(actor, self._chunks, rows if size == CHUNK else spread(offsets >> 4, size >> 4))
        else:
            self._read(actor, self._split(offsets >> 4), spread(offsets, size), strong)
        return self._rows[size][rows]

    def store(self, w: "Warp", offsets: Offsets, size: int, values: Bytes, strong: bool = False) -> None:
        """Writes rows of bytes through the generic proxy; see load."""
        n, start = len(offsets), offsets.item(0)
        actor = _Actor(w.found, w.clock, w.thread, w.clock.item(w.thread), False)
        flags = GENERIC | STRONG if strong else GENERIC
        if n == 1 or (offsets - start).tobytes() == LANE_STEPS[size][: 8 * n]:
            stop = start + n * size
            self._bounds(w.found, start, stop, None, "write")
            layer, index = self._range(start, stop, strong)
            self._check_write(actor, layer, index, strong)
            self._note_write(layer, index, w.thread, actor.tick, flags)
            self.data[start:stop] = values.reshape(-1)
            return
        places = offsets.tolist()
        self._bounds(w.found, min(places), max(places) + size, (offsets, size), "write")
        if not strong and len(set(places)) < n:
            self._check_lanes(w, places, values)
        rows = offsets // size
        if size >= CHUNK and not strong:
            layer, index = self._chunks, rows if size == CHUNK else spread(offsets >> 4, size >> 4)
        else:
            layer, index = self._split(offsets >> 4), spread(offsets, size)
        self._check_write(actor, layer, index, strong)
        self._note_write(layer, index, w.thread, actor.tick, flags)
        self._rows[size][rows] = values

    def _check_lanes(self, w: "Warp", places: list[int], values: Bytes) -> None:
        """Lanes of one instruction that write different values to the same place."""
        seen: dict[int, bytes] = {}
        for place, row in zip(places, values, strict=True):
            if seen.setdefault(place, row.tobytes()) != row.tobytes():
                w.found(RACE, f"lanes write different values to the same address: {self._name(place)}")
                return

    def load_one(self, w: "Warp", offset: int, size: int, strong: bool = False) -> bytes:
        """Reads the same `size` bytes for all lanes."""
        self._bounds(w.found, offset, offset + size, None, "read")
        actor = _Actor(w.found, w.clock, w.thread, w.clock.item(w.thread), False)
        self._read_range(actor, offset, offset + size, strong)
        return self.data[offset : offset + size].tobytes()

    def store_one(self, w: "Warp", offset: int, values: bytes, strong: bool = False) -> None:
        """Writes bytes at one place."""
        stop = offset + len(values)
        self._bounds(w.found, offset, stop, None, "write")
        actor = _Actor(w.found, w.clock, w.thread, w.clock.item(w.thread), False)
        layer, index = self._range(offset, stop, strong)
        self._check_write(actor, layer, index, strong)
        self._note_write(layer, index, w.thread, actor.tick, GENERIC | STRONG if strong else GENERIC)
        self.data[offset:stop] = np.frombuffer(values, np.uint8)

    def fence_async(self, w: "Warp") -> None:
        """`fence.proxy.async.shared::cta` by `w`: writes to this memory that happened before now may be read by copies."""
        self._fences.note(w)

    # Async proxy.

    def begin_async_write(self, issue: "Issue", start: int, size: int) -> None:
        """A copy that will write a range is issued: earlier accesses must be ordered before it; marks the range in flight."""
        self._begin(issue, start, start + size, None)

    def begin_async_write_lanes(self, issue: "Issue", offsets: Offsets, size: int) -> None:
        """The same for ranges of `size` bytes (up to 16) at each offset, as cp.async writes them."""
        low, high = offsets.min().item(), offsets.max().item() + size
        self._begin(issue, low, high, (offsets, size))

    def _begin(self, issue: "Issue", start: int, stop: int, lanes: tuple[Offsets, int] | None) -> None:
        w = issue.warp
        self._bounds(w.found, start, stop, lanes, "asynchronous write")
        actor = _Actor(w.found, w.clock, issue.thread, issue.tick, in_async_proxy(issue))
        layer, index = self._range(start, stop) if lanes is None else self._lanes(*lanes)
        self._check_write(actor, layer, index)
        for part, where in self._parts(layer, index):
            part.flags[where] |= IN_FLIGHT

    def end_async_write(self, issue: "Issue", start: int, size: int) -> None:
        """The copy's bytes are in `data`: they are valid, and its agent is their last writer."""
        layer, index = self._range(start, start + size)
        flags = 0 if in_async_proxy(issue) else GENERIC
        self._note_write(layer, index, issue.thread, issue.tick, flags)

    def end_async_write_lanes(self, issue: "Issue", offsets: Offsets, size: int) -> None:
        """The same for begin_async_write_lanes."""
        layer, index = self._lanes(offsets, size)
        needs_no_fence = in_async_proxy(issue) or issue.ins.parts[:2] == _UNFENCED_BY_PRACTICE
        flags = 0 if needs_no_fence else GENERIC
        self._note_write(layer, index, issue.thread, issue.tick, flags)

    def check_async_read(self, issue: "Issue", start: int, size: int) -> None:
        """An asynchronous operation that will read a range is issued: the bytes must be there, ordered and fenced."""
        w = issue.warp
        self._bounds(w.found, start, start + size, None, "asynchronous read")
        actor = _Actor(w.found, w.clock, issue.thread, issue.tick, in_async_proxy(issue))
        self._read_range(actor, start, start + size)

    def check_async_read_chunks(self, issue: "Issue", chunks: Offsets) -> None:
        """The same for 16-byte chunks, given by number (offset / 16)."""
        w = issue.warp
        low, high = chunks.min().item() * CHUNK, chunks.max().item() * CHUNK + CHUNK
        lanes = None
        if self._near_barrier(low, high):
            lanes = (chunks.astype(np.int64) * CHUNK, CHUNK)
        self._bounds(w.found, low, high, lanes, "asynchronous read")
        actor = _Actor(w.found, w.clock, issue.thread, issue.tick, in_async_proxy(issue))
        self._read(actor, self._chunks, chunks)

    def recheck_async_read(self, issue: "Issue", start: int, size: int) -> None:
        """When the operation reads: nothing may be in flight to the range by now."""
        self._recheck(slice(start // CHUNK, -(-(start + size) // CHUNK)), start, start + size)

    def recheck_async_read_chunks(self, issue: "Issue", chunks: Offsets) -> None:
        """The same for chunks."""
        self._recheck(chunks, 0, self.num_bytes)

    def _recheck(self, chunks: Index, start: int, stop: int) -> None:
        if not self._chunks.flags[chunks].tobytes().translate(None, _NOT_IN_FLIGHT):
            return
        for layer, index in self._parts(self._chunks, chunks):
            bad = _numbers(index)[(layer.flags[index] & IN_FLIGHT) != 0] * layer.unit
            bad = bad[(bad + layer.unit > start) & (bad < stop)]
            if len(bad):
                text = f"reads bytes to which a copy is in flight: {self._name(int(bad[0]))}"
                self.cta.machine.found(IN_FLIGHT_ACCESS, text)
                return

    def exit_check(self) -> None:
        """The CTA exits: no copy may be in flight, and foreign accesses must have happened before.

        An access by an agent or another CTA's warp is over for sure only if some warp of this CTA knows so.
        """
        self.closed = True
        machine = self.cta.machine
        parts: list[tuple[_Layer, Index]] = [(self._chunks, np.flatnonzero(self._chunks.flags != SPLIT))]
        if self._fine is not None:
            parts.append((self._fine, spread(np.flatnonzero(self._chunks.flags == SPLIT) * CHUNK, CHUNK)))
        for layer, index in parts:
            flying = _numbers(index)[(layer.flags[index] & IN_FLIGHT) != 0]
            if len(flying):
                place = self._name(int(flying[0]) * layer.unit)
                machine.found(SHARED_IN_USE, f"CTA exits while a copy to its shared memory is in flight: {place}")
                return
        known = self.cta.warps[0].clock.copy()
        for w in self.cta.warps[1:]:
            np.maximum(known, w.clock, out=known)
        for layer, index in parts:
            self._check_foreign(layer, _numbers(index), known)

    def _check_foreign(self, layer: _Layer, index: Offsets, known: Clock) -> None:
        own = [w.thread for w in self.cta.warps]
        writer = layer.writer[index]
        late = (layer.tick[index] > known.take(writer)) & ~np.isin(writer, own)
        if late.any():
            first = int(np.flatnonzero(late)[0])
            who, place = thread_name(self.cta.cluster, int(writer[first])), self._name(int(index[first]) * layer.unit)
            text = f"CTA exits, and none of its warps waited for the write by {who}: {place}"
            self.cta.machine.found(SHARED_IN_USE, text)
        for thread, column in self._columns.items():
            late = layer.reads[index, column] > known[thread]
            if thread not in own and late.any():
                place = self._name(int(index[late][0]) * layer.unit)
                who = thread_name(self.cta.cluster, thread)
                text = f"CTA exits, and none of its warps waited until {who} had read {place}"
                self.cta.machine.found(SHARED_IN_USE, text)
                return

    # Shadow.

    def _name(self, offset: int) -> str:
        return f"shared memory of CTA {self.cta.index} at offset {offset:#x}"

    def _near_barrier(self, start: int, stop: int) -> bool:
        count, low, high = self._barrier_span
        if len(self.barriers) != count:
            low, high = min(self.barriers, default=0), max(self.barriers, default=-8) + 8
            self._barrier_span = (len(self.barriers), low, high)
        return start < high and stop > low

    def _bounds(self, found: Found, start: int, stop: int, lanes: tuple[Offsets, int] | None, verb: str) -> None:
        """Checks that hold for the whole span of an access; `lanes` if it does not cover the span."""
        if start < SHARED_BASE or stop > self.num_bytes:
            text = (
                f"{verb} of [{start:#x}, {stop:#x}) in shared memory, which is [{SHARED_BASE:#x}, {self.num_bytes:#x})"
            )
            found(OUT_OF_BOUNDS, text, fatal=True)
        if self.closed:
            found(SHARED_IN_USE, f"{verb} of shared memory of CTA {self.cta.index}, which has exited")
        if self.barriers and self._near_barrier(start, stop):
            touched = self.barrier_bytes[start:stop] if lanes is None else self.barrier_bytes[spread(*lanes)]
            if touched.any():
                where = start + int(np.flatnonzero(touched)[0]) if lanes is None else start
                found(BARRIER_MISUSE, f"{verb} of bytes of an mbarrier object: {self._name(where)}")

    def _range(self, start: int, stop: int, strong: bool = False) -> tuple[_Layer, Index]:
        """The layer and index for a contiguous access."""
        if not (start | stop) & 15 and not strong:
            return self._chunks, slice(start >> 4, stop >> 4)
        chunks = slice(start >> 4, (stop + 15) >> 4)
        if self._chunks.flags[chunks].tobytes().translate(None, _ONLY_SPLIT):
            self._split(np.arange(chunks.start, chunks.stop))
        assert self._fine is not None
        return self._fine, slice(start, stop)

    def _lanes(self, offsets: Offsets, size: int) -> tuple[_Layer, Index]:
        if size == CHUNK:
            return self._chunks, offsets >> 4
        return self._split(offsets >> 4), spread(offsets, size)

    def _split(self, chunks: Offsets) -> _Layer:
        """Gives the chunks a shadow for each byte; returns that layer."""
        coarse = self._chunks
        if self._fine is None:
            self._fine = _Layer(self._count * CHUNK, 1, coarse.reads.shape[1], 0)
        fine = self._fine
        whole = coarse.flags[chunks]
        if whole.tobytes().translate(None, _ONLY_SPLIT):
            chunks = np.unique(chunks[whole != SPLIT])
            fine.flags.reshape(-1, CHUNK)[chunks] = coarse.flags[chunks, None]
            fine.writer.reshape(-1, CHUNK)[chunks] = coarse.writer[chunks, None]
            fine.tick.reshape(-1, CHUNK)[chunks] = coarse.tick[chunks, None]
            fine.reads.reshape(self._count, CHUNK, -1)[chunks] = coarse.reads[chunks, None]
            coarse.flags[chunks] = SPLIT
        return fine

    def _parts(self, layer: _Layer, index: Index) -> list[tuple[_Layer, Index]]:
        """The index in the layer, with the chunks that are split moved to the fine layer."""
        if layer is not self._chunks or SPLIT not in layer.flags[index].tobytes():
            return [(layer, index)]
        chunks = _numbers(index)
        split = layer.flags[chunks] == SPLIT
        assert self._fine is not None
        parts: list[tuple[_Layer, Index]] = [(self._fine, spread(chunks[split] * CHUNK, CHUNK))]
        if not split.all():
            parts.append((layer, chunks[~split]))
        return parts

    def _column(self, thread: int) -> int:
        column = self._columns.get(thread)
        if column is None:
            column = self._columns[thread] = len(self._columns)
            if column == len(self._readers):
                self._chunks.widen(slice(None))
                if self._fine is not None:
                    self._fine.widen(spread(np.flatnonzero(self._chunks.flags == SPLIT) * CHUNK, CHUNK))
                self._readers = np.concatenate([self._readers, np.zeros_like(self._readers)])
            self._readers[column] = thread
        return column

    def _read_range(self, actor: _Actor, start: int, stop: int, strong: bool = False) -> None:
        layer, index = self._range(start, stop, strong)
        self._read(actor, layer, index, strong)

    def _read(self, actor: _Actor, layer: _Layer, index: Index, strong: bool = False) -> None:
        """Checks a read and notes it."""
        flags = layer.flags[index].tobytes()
        if flags.translate(None, _READABLE):
            parts = self._parts(layer, index)
            if parts[0][0] is not layer:
                for part, where in parts:
                    self._read(actor, part, where, strong)
                return
            self._report_state(actor, layer, index, "reads")
        known = layer.tick[index] <= actor.clock.take(layer.writer[index])
        if b"\0" in known.tobytes():
            self._report_writer(actor, layer, index, ~known, "reads", strong)
        elif actor.fenced and flags.strip(b"\0"):
            self._check_fence(actor, layer, index, "reads")
        if not strong:
            column = self._column(actor.thread)
            layer.reads[index, column] = actor.tick

    def _check_write(self, actor: _Actor, layer: _Layer, index: Index, strong: bool = False) -> None:
        """Checks a write against what came before."""
        flags = layer.flags[index].tobytes()
        if flags.translate(None, _WRITABLE):
            parts = self._parts(layer, index)
            if parts[0][0] is not layer:
                for part, where in parts:
                    self._check_write(actor, part, where, strong)
                return
            self._report_state(actor, layer, index, "writes")
        known = layer.tick[index] <= actor.clock.take(layer.writer[index])
        if b"\0" in known.tobytes():
            self._report_writer(actor, layer, index, ~known, "overwrites", strong)
        elif actor.fenced and flags.strip(b"\0\1"):
            self._check_fence(actor, layer, index, "overwrites")
        reads = layer.reads[index] if isinstance(index, slice) else layer.reads.take(index, axis=0)
        readers = self._readers
        late = reads > actor.clock.take(readers)
        if b"\1" in late.tobytes():
            row, column = (int(i[0]) for i in np.nonzero(late))
            place = self._name(int(_numbers(index)[row]) * layer.unit)
            who = thread_name(self.cta.cluster, int(readers[column]))
            actor.found(RACE, f"overwrites what {who} reads, and nothing orders the read before: {place}")

    def _note_write(self, layer: _Layer, index: Index, thread: int, tick: int, flags: int) -> None:
        layer.flags[index] = flags
        layer.writer[index] = thread
        layer.tick[index] = tick

    def _report_state(self, actor: _Actor, layer: _Layer, index: Index, verb: str) -> None:
        flags = layer.flags[index]
        flying = (flags & IN_FLIGHT) != 0
        if flying.any():
            place = self._name(int(_numbers(index)[flying][0]) * layer.unit)
            actor.found(IN_FLIGHT_ACCESS, f"{verb} bytes to which a copy is in flight: {place}")
        elif verb == "reads":
            empty = _numbers(index)[(flags & UNINIT) != 0]
            place = self._name(int(empty[0]) * layer.unit)
            actor.found(UNINITIALISED_READ, f"reads {len(empty) * layer.unit} bytes that nothing wrote: {place}")

    def _report_writer(
        self, actor: _Actor, layer: _Layer, index: Index, late: npt.NDArray[np.bool_], verb: str, strong: bool
    ) -> None:
        if strong:
            late = late & ((layer.flags[index] & STRONG) == 0)
            if not late.any():
                return
        place = int(_numbers(index)[late][0])
        who = thread_name(self.cta.cluster, int(layer.writer[place]))
        where = self._name(place * layer.unit)
        actor.found(RACE, f"{verb} what {who} wrote, and nothing orders the write before: {where}")

    def _check_fence(self, actor: _Actor, layer: _Layer, index: Index, verb: str) -> None:
        """Generic writes must lie before a proxy fence that the actor knows."""
        fenced = fenced_clock(self.cta.cluster, actor.clock, "shared")
        self._fences.join(actor.clock, fenced)
        late = ((layer.flags[index] & GENERIC) != 0) & (layer.tick[index] > fenced.take(layer.writer[index]))
        if late.any():
            place = int(_numbers(index)[late][0])
            who = thread_name(self.cta.cluster, int(layer.writer[place]))
            where = self._name(place * layer.unit)
            text = f"{verb} through the async proxy what {who} wrote, and no fence.proxy.async lies between: {where}"
            actor.found(MISSING_PROXY_FENCE, text)


def _numbers(index: Index) -> Offsets:
    return np.arange(index.start, index.stop) if isinstance(index, slice) else index
