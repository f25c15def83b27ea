"""Memory of the simulated GPU: address windows, buffers of the host, global memory. Shared memory: shared_memory.py.

Global memory is the host's own memory: every access must lie in one registered buffer, exactly. Beyond bounds these are
checked: bytes read before anything wrote them, writes to read-only buffers, outputs not written completely, accesses before
griddepcontrol.wait in a launch that may begin before those before it have ended, and, for
generic-proxy accesses of warps of one cluster, conflicting accesses that nothing orders.

Not looked for: conflicts between clusters (only flags in memory order those, through chains that cannot be followed here),
plain stores over what another warp only read, and conflicts of generic accesses with what the asynchronous units write.
"""

import ctypes
import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.findings import (
    BEFORE_WAIT,
    MISSING_PROXY_FENCE,
    OUT_OF_BOUNDS,
    RACE,
    UNINITIALISED_READ,
    WRITE_READONLY,
)
from ptxsim.shared_memory import (
    LANE_STEPS,
    SHARED_BASE,
    Bytes,
    Index,
    Offsets,
    SharedMemory,
    fenced_clock,
    note_fence,
    spread,
    thread_name,
)

if TYPE_CHECKING:
    from ptxsim.machine import Issue, Machine, Warp

__all__ = [
    "LOCAL_WINDOW",
    "PARAM_WINDOW",
    "SHARED_BASE",
    "SHARED_WINDOW",
    "Buffer",
    "GlobalMemory",
    "Region",
    "SharedMemory",
    "fenced_clock",
    "note_fence",
]

# Generic addresses of the spaces that are not global; a shared address is (CTA rank << 24) | offset.
SHARED_WINDOW = 1 << 56
PARAM_WINDOW = 1 << 57
LOCAL_WINDOW = 1 << 58

Layout = tuple[tuple[int, ...], tuple[int, ...], int]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Buffer:
    """Host memory that a kernel may access: exact range, checked.

    Attributes:
        name: for messages.
        address: of the first byte.
        num_bytes: size.
        initialised: False: reading a byte before it was written is a finding. Such a buffer remembers over several
            launches which bytes were written.
        must_be_written: every byte must have been written when it is asked for at the end; needs initialised=False.
        readonly: writing is a finding.
        layout: (shape, strides in bytes, item size) if the elements do not fill the range; the gaps may be accessed, count
            as initialised and need not be written.
        owner: kept alive as long as this object.
        constant: no launch that may still be running writes it: it may be read before griddepcontrol.wait.
    """

    name: str
    address: int
    num_bytes: int
    initialised: bool = True
    must_be_written: bool = False
    readonly: bool = False
    layout: Layout | None = None
    owner: Any = field(default=None, repr=False)
    valid: Bools | None = field(default=None, repr=False)
    constant: bool = False

    def __post_init__(self) -> None:
        if self.must_be_written and self.initialised:
            raise ValueError(f"{self.name}: must_be_written needs initialised=False")
        if not self.initialised and self.valid is None:
            valid = np.zeros(self.num_bytes, np.bool_)
            if self.layout is not None:
                valid[:] = True
                shape, strides, item = self.layout
                start = -sum(min(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True))
                np.lib.stride_tricks.as_strided(valid[start:], (*shape, item), (*strides, 1))[...] = False
            object.__setattr__(self, "valid", valid)

    @classmethod
    def of(
        cls,
        array: Any,
        name: str = "buffer",
        *,
        initialised: bool = True,
        must_be_written: bool = False,
        readonly: bool = False,
        constant: bool = False,
    ) -> "Buffer":
        """The memory of a NumPy array or of anything with data_ptr(), shape, stride() and element_size(), as tensors have."""
        if hasattr(array, "data_ptr"):
            item = int(array.element_size())
            address, shape = int(array.data_ptr()), tuple(int(n) for n in array.shape)
            strides = tuple(int(s) * item for s in array.stride())
        else:
            item, address, shape = array.itemsize, array.__array_interface__["data"][0], array.shape
            strides = array.strides
        layout: Layout | None = None
        size = math.prod(shape) * item
        if size:
            low = sum(min(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True))
            high = sum(max(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True)) + item
            if high - low != size:
                layout = (shape, strides, item)
            address, size = address + low, high - low
        return cls(name, address, size, initialised, must_be_written, readonly, layout, array, constant=constant)


class Region:
    """Bytes of the host that kernels may access: one buffer, or several that overlap.

    Attributes:
        data: the bytes themselves.
        valid: which of them hold something; None if all do.
        readonly: writing is a finding.
        constant: reading before griddepcontrol.wait is none.
        who, tick: last generic-proxy writer of each byte, (cluster + 1) << 12 | thread, and its clock then; None until the
            first such write.
    """

    def __init__(self, name: str, address: int, num_bytes: int) -> None:
        self.name, self.address, self.num_bytes = name, address, num_bytes
        self.end = address + num_bytes
        self.data: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
        self.valid: Bools | None = None
        self.readonly = False
        self.constant = False
        self.buffers: list[Buffer] = []
        self.who: npt.NDArray[np.uint32] | None = None
        self.tick: npt.NDArray[np.uint32] | None = None
        self._rows: dict[int, Bytes] = {}

    def add(self, buffer: Buffer) -> None:
        """Takes a buffer that lies within; the strictest of several rights counts."""
        at = buffer.address - self.address
        self.readonly = buffer.readonly if not self.buffers else self.readonly and buffer.readonly
        self.constant = buffer.constant if not self.buffers else self.constant and buffer.constant
        self.buffers.append(buffer)
        if buffer.valid is None:
            return
        if buffer.num_bytes == self.num_bytes and self.valid is None:
            self.valid = buffer.valid
            return
        if self.valid is None:
            self.valid = np.ones(self.num_bytes, np.bool_)
        elif any(self.valid is other.valid for other in self.buffers):
            self.valid = self.valid.copy()
        self.valid[at : at + buffer.num_bytes] &= buffer.valid

    def rows(self, size: int) -> Bytes | None:
        """The bytes as rows of `size`, or None if the rows of aligned accesses do not start at multiples of it."""
        if self.address % size:
            return None
        found = self._rows.get(size)
        if found is None:
            found = self._rows[size] = self.data[: self.num_bytes // size * size].reshape(-1, size)
        return found

    def name_at(self, offset: int) -> str:
        """The buffer and the byte in it, for messages."""
        for buffer in self.buffers:
            start = self.address + offset - buffer.address
            if 0 <= start < buffer.num_bytes:
                return f"{buffer.name} at byte {start} of {buffer.num_bytes}"
        return f"{self.name} at byte {offset}"


class GlobalMemory:
    """The registered buffers, and the checks on them.

    Accesses whose bytes do not all lie in one buffer are fatal findings.

    Args:
        machine: findings go there.
        overlaps: the launch may begin before those before it have ended.
    """

    def __init__(self, machine: "Machine", overlaps: bool = False) -> None:
        self.machine, self.overlaps = machine, overlaps
        self.regions: list[Region] = []
        self._starts: list[int] = []
        self._last: Region | None = None

    def register(self, buffer: Buffer) -> None:
        """Makes a buffer accessible; buffers may overlap."""
        if not buffer.num_bytes:
            return
        low, high = buffer.address, buffer.address + buffer.num_bytes
        same = [r for r in self.regions if r.address < high and low < r.end]
        if len(same) == 1 and same[0].address <= low and high <= same[0].end:
            same[0].add(buffer)
            return
        low, high = min([low, *(r.address for r in same)]), max([high, *(r.end for r in same)])
        merged = Region(buffer.name, low, high - low)
        for old in same:
            for other in old.buffers:
                merged.add(other)
            self.regions.remove(old)
        merged.add(buffer)
        self.regions.append(merged)
        self.regions.sort(key=lambda region: region.address)
        self._starts = [region.address for region in self.regions]
        self._last = None

    def find(self, address: int, size: int = 1) -> Region | None:
        """The region that holds these bytes, or None."""
        last = self._last
        if last is not None and last.address <= address and address + size <= last.end:
            return last
        i = bisect_right(self._starts, address) - 1
        if i >= 0 and address + size <= self.regions[i].end:
            self._last = self.regions[i]
            return self._last
        return None

    def view(self, address: int, size: int) -> tuple[Region, int]:
        """The region that holds a range, and the range's offset in it; a fatal finding if there is none."""
        region = self.find(address, size)
        if region is None:
            self._outside(address, size)
        assert region is not None
        return region, address - region.address

    def _outside(self, address: int, size: int) -> None:
        near = self.regions[max(0, bisect_right(self._starts, address) - 1)] if self.regions else None
        text = f"global access to {size} bytes at {address:#x}, which is in no buffer"
        if near is not None:
            away = address - near.end
            side = f"{away} bytes behind the end" if away >= 0 else f"{near.address - address} bytes before the start"
            if address >= near.address and address < near.end:
                side = f"{address + size - near.end} bytes over the end"
            text += f" ({side} of {near.buffers[-1].name}, {near.num_bytes} bytes at {near.address:#x})"
        self.machine.found(OUT_OF_BOUNDS, text, fatal=True)

    def _locate(self, addresses: npt.NDArray[np.uint64], size: int) -> tuple[Region, Index] | None:
        """The region of all lanes and a slice of bytes, or an array of byte offsets; None if there are several regions."""
        n, first = len(addresses), int(addresses[0])
        region = self.find(first, size)
        if region is None:
            self._outside(first, size)
            return None
        offsets = (addresses - np.uint64(region.address)).view(np.int64)
        start = first - region.address
        if (offsets - start).tobytes() == LANE_STEPS[size][: 8 * n]:
            if start + n * size > region.num_bytes:
                return None
            return region, slice(start, start + n * size)
        places = offsets.tolist()
        if min(places) < 0 or max(places) > region.num_bytes - size:
            return None
        return region, offsets

    def load(self, w: "Warp", addresses: npt.NDArray[np.uint64], size: int, strong: bool = False) -> Bytes:
        """Reads `size` bytes at each address (a multiple of `size`); rows of bytes.

        Args:
            w: who reads.
            addresses: one for each lane that reads.
            size: 1, 2, 4, 8, 16 or 32.
            strong: the access is volatile, relaxed, acquiring or atomic: it may meet unordered writes.
        """
        where = self._locate(addresses, size)
        if where is None:
            return self._load_apart(w, addresses, size, strong)
        region, index = where
        if self.overlaps:
            self.check_waited(w, region, index)
        if isinstance(index, slice):
            out = region.data[index].reshape(-1, size).copy()
        else:
            rows = region.rows(size)
            if rows is None:
                index = spread(index, size)
                out = region.data[index].reshape(-1, size)
            else:
                out = rows[index // size]
                if region.valid is not None or region.who is not None:
                    index = spread(index, size)
        if region.valid is not None and b"\0" in region.valid[index].tobytes():
            self._uninitialised(w, region, index)
        if region.who is not None and not strong:
            self._check_order(w, region, index, None)
        return out

    def store(
        self, w: "Warp", addresses: npt.NDArray[np.uint64], size: int, values: Bytes, strong: bool = False
    ) -> None:
        """Writes rows of bytes; see load."""
        where = self._locate(addresses, size)
        if where is None:
            for i in range(len(addresses)):
                one = addresses[i : i + 1]
                if self._locate(one, size) is not None:
                    self.store(w, one, size, values[i : i + 1], strong)
            return
        region, index = where
        if region.readonly:
            self._readonly(w, region, index)
            return
        if self.overlaps:
            self.check_waited(w, region, index, writes=True)
        flat = values.reshape(-1)
        if not isinstance(index, slice):
            self._check_lanes(w, region, index, values, strong)
            index = spread(index, size)
        if strong:
            if region.who is not None:
                region.who[index] = 0
        else:
            self._check_order(w, region, index, flat)
        region.data[index] = flat
        if region.valid is not None:
            region.valid[index] = True

    def load_one(self, w: "Warp", address: int, size: int, strong: bool = False) -> bytes:
        """Reads the same `size` bytes for all lanes."""
        region, at = self.view(address, size)
        index = slice(at, at + size)
        if self.overlaps:
            self.check_waited(w, region, index)
        if region.valid is not None and b"\0" in region.valid[index].tobytes():
            self._uninitialised(w, region, index)
        if region.who is not None and not strong:
            self._check_order(w, region, index, None)
        return region.data[index].tobytes()

    def store_one(self, w: "Warp", address: int, values: bytes, strong: bool = False) -> None:
        """Writes bytes at one place."""
        region, at = self.view(address, len(values))
        index = slice(at, at + len(values))
        if region.readonly:
            self._readonly(w, region, index)
            return
        if self.overlaps:
            self.check_waited(w, region, index, writes=True)
        flat = np.frombuffer(values, np.uint8)
        if not strong:
            self._check_order(w, region, index, flat)
        elif region.who is not None:
            region.who[index] = 0
        region.data[index] = flat
        if region.valid is not None:
            region.valid[index] = True

    def _load_apart(self, w: "Warp", addresses: npt.NDArray[np.uint64], size: int, strong: bool) -> Bytes:
        out = np.zeros((len(addresses), size), np.uint8)
        for i in range(len(addresses)):
            one = addresses[i : i + 1]
            if self._locate(one, size) is not None:
                out[i] = self.load(w, one, size, strong)[0]
        return out

    def check_waited(self, w: "Warp", region: Region, index: Index, writes: bool = False) -> None:
        """An access that earlier launches must have ended for: if this one overlaps them, the warp must have waited."""
        if not self.overlaps or (region.constant and not writes) or w.has_waited():
            return
        verb = "write to" if writes else "read of"
        where = region.name_at(int(_offsets(index)[0]))
        w.found(BEFORE_WAIT, f"{verb} {where} before griddepcontrol.wait: earlier launches may not have ended")

    def _uninitialised(self, w: "Warp", region: Region, index: Index) -> None:
        assert region.valid is not None
        bad = _offsets(index)[~region.valid[index]]
        w.found(UNINITIALISED_READ, f"read of {len(bad)} bytes that nothing wrote: {region.name_at(int(bad[0]))}")

    def _readonly(self, w: "Warp", region: Region, index: Index) -> None:
        w.found(WRITE_READONLY, f"write to the read-only buffer {region.name_at(int(_offsets(index)[0]))}")

    def _check_lanes(self, w: "Warp", region: Region, offsets: Offsets, values: Bytes, strong: bool) -> None:
        """Lanes of one instruction that write different values to the same place."""
        places = offsets.tolist()
        if strong or len(set(places)) == len(places):
            return
        seen: dict[int, bytes] = {}
        for place, row in zip(places, values, strict=True):
            if seen.setdefault(place, row.tobytes()) != row.tobytes():
                w.found(RACE, f"lanes write different values to the same address: {region.name_at(place)}")
                return

    def _check_order(self, w: "Warp", region: Region, index: Index, written: Bytes | None) -> None:
        """Generic-proxy accesses of this cluster that nothing orders; notes a write (`written`: its bytes)."""
        cluster = (w.cluster.index + 1) & 0xFFFFF
        own = cluster << 12 | w.thread
        if region.who is None:
            region.who = np.zeros(region.num_bytes, np.uint32)
            region.tick = np.zeros(region.num_bytes, np.uint32)
        assert region.tick is not None
        who = region.who[index]
        others = (who != own) & (who >> np.uint32(12) == cluster)
        if b"\1" in others.tobytes():
            late = others & (region.tick[index] > w.clock.take(who & np.uint32(0xFFF)))
            if written is not None:
                late &= region.data[index] != written
            if late.any():
                place = int(np.flatnonzero(late)[0])
                before = thread_name(w.cluster, int(who[place]) & 0xFFF)
                verb = "read of bytes that" if written is None else "overwrites with another value bytes that"
                where = region.name_at(int(_offsets(index)[place]))
                w.found(RACE, f"{verb} {before} wrote, and nothing orders the two: {where}")
        if written is not None:
            region.who[index] = own
            region.tick[index] = w.clock[w.thread]

    def written_here(self, addresses: npt.NDArray[np.uint64], size: int) -> bool:
        """True if a plain store of this launch wrote the first byte of one of the accesses (for non-coherent loads)."""
        where = self._locate(addresses, size)
        if where is None or where[0].who is None:
            return False
        return bool(where[0].who[where[1]].any())

    def forget(self, w: "Warp", address: int, size: int) -> None:
        """`discard`: the bytes' content is lost."""
        region, at = self.view(address, size)
        if region.readonly:
            self._readonly(w, region, slice(at, at + size))
            return
        self.check_waited(w, region, slice(at, at + size), writes=True)
        if region.valid is None:
            region.valid = np.ones(region.num_bytes, np.bool_)
        region.valid[at : at + size] = False

    def check_async_read(self, issue: "Issue", region: Region, index: Index) -> None:
        """The async proxy will read these bytes: generic writes of this launch must be ordered and fenced.

        Initialisation is not looked at: callers that read `data` check `valid` themselves.

        Args:
            issue: the operation.
            region: from view().
            index: slice or array of byte offsets in it.
        """
        if region.who is None or region.tick is None:
            return
        w = issue.warp
        who = region.who[index]
        mine = who >> np.uint32(12) == ((w.cluster.index + 1) & 0xFFFFF)
        if not mine.any():
            return
        threads, ticks = who[mine] & np.uint32(0xFFF), region.tick[index][mine]
        if (ticks > w.clock.take(threads)).any():
            bad = np.flatnonzero(ticks > w.clock.take(threads))[0]
            code, why = RACE, "and nothing orders the two"
        else:
            late = ticks > fenced_clock(w.cluster, w.clock, "global").take(threads)
            if not late.any():
                return
            bad = np.flatnonzero(late)[0]
            code, why = MISSING_PROXY_FENCE, "and no fence.proxy.async lies between"
        place = region.name_at(int(_offsets(index)[np.flatnonzero(mine)[bad]]))
        w.found(code, f"reads what {thread_name(w.cluster, int(threads[bad]))} wrote with plain stores, {why}: {place}")

    def unwritten(self) -> list[tuple[Buffer, int, int]]:
        """Outputs that are not complete: (buffer, bytes missing, first of them).

        Also hands each buffer that shares a region with others its part of the region's state.
        """
        out = []
        for region in self.regions:
            for buffer in region.buffers:
                if buffer.valid is None or region.valid is None:
                    continue
                at = buffer.address - region.address
                part = region.valid[at : at + buffer.num_bytes]
                if buffer.valid is not region.valid:
                    buffer.valid[:] = part
                if buffer.must_be_written and not part.all():
                    missing = np.flatnonzero(~part)
                    out.append((buffer, len(missing), int(missing[0])))
        return out


def _offsets(index: Index) -> Offsets:
    return np.arange(index.start, index.stop) if isinstance(index, slice) else index
