"""Tensor memory of a CTA: 128 lanes of 512 32-bit columns, its allocation, validity and race shadows.

Races are found at the granularity of one column in a band of 16 lanes (M 64 uses every other band): every access is
stamped with its thread of the vector clocks when it is *issued*, and a later access must have that stamp in its past.

* Tensor-core operations (mma, cp) of a CTA or pair execute in order, so they are one thread: the agent "tensor" of the
  issuing CTA. Others know of them through tcgen05.commit and an mbarrier. (PTX promises order only for some pairs of
  operations; NVIDIA's kernels rely on mma -> cp too, which it does not list.) So a commit covers the earlier operations of
  every warp of its CTA here; on hardware those of its own thread only.
* tcgen05.ld counts as complete when it returns. PTX orders the use of its registers but nothing else without
  tcgen05.wait::ld, which NVIDIA's own kernels leave out where the registers are used before the buffer is handed on: a
  missing wait::ld is *not* reported.
* tcgen05.st is under way until tcgen05.wait::st of the same warp: whoever touches the columns before, except another st of
  that warp, races with it.
* tcgen05.fence::* is accepted and orders nothing; NVIDIA's compiler leaves it out in places.

Source: PTX ISA 9.x, "Tensor Memory", "tcgen05.alloc", "Memory Consistency Model for 5th generation of TensorCore operations".
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ptxsim.findings import RACE, TMEM_IN_USE, TMEM_MISUSE, UNINITIALISED_READ

if TYPE_CHECKING:
    from ptxsim.machine import CTA, WaitQueue

LANES = 128
COLUMNS = 512
QUARTER = 32
BAND = 16
BANDS = LANES // BAND
ALL_BANDS = slice(0, BANDS)
# The stamp of a tcgen05.st that no wait::st has completed: later than any clock.
UNDER_WAY = 0xFFFFFFFF

Clock = npt.NDArray[np.uint32]
Found = Callable[[str, str], None]
Lanes = slice | npt.NDArray[np.int64]


class TensorMemory:
    """The tensor memory of one CTA.

    Attributes:
        data: the words, (lane, column).
        f32: the same memory as float32.
        valid: True where something was written since the allocation.
        allocations: first column -> number of columns.
    """

    def __init__(self, cta: "CTA") -> None:
        self._cta = cta
        self._ready = False
        self.allocations: dict[int, int] = {}
        self.permit = True
        self._smallest = COLUMNS
        self._freed: WaitQueue | None = None

    def _prepare(self) -> None:
        """Makes the arrays; kernels that never allocate do not pay for them."""
        self.data = np.zeros((LANES, COLUMNS), np.uint32)
        self.f32 = self.data.view(np.float32)
        self.valid = np.zeros((LANES, COLUMNS), np.bool_)
        self._allocated = np.zeros(COLUMNS, np.bool_)
        self._write_thread = np.zeros((BANDS, COLUMNS), np.intp)
        self._write_tick = np.zeros((BANDS, COLUMNS), np.uint32)
        # Thread -> newest stamp of its reads; a warp reads two bands only, the tensor core any.
        self._reads: dict[int, npt.NDArray[np.uint32]] = {}
        self._newest_read: dict[int, int] = {}
        self._ready = True

    @property
    def freed(self) -> "WaitQueue":
        """Paths that wait for free columns."""
        if self._freed is None:
            from ptxsim.machine import WaitQueue

            self._freed = WaitQueue(self._cta.machine)
        return self._freed

    # Allocation

    def allocate(self, found: Found, columns: int) -> int | None:
        """Allocates columns.

        Returns:
            The first column, or None if there is no room now.
        """
        if not self._ready:
            self._prepare()
        if not self.permit:
            found(TMEM_MISUSE, "tcgen05.alloc after tcgen05.relinquish_alloc_permit")
        start = self._fit(columns)
        if start is None:
            return None
        if columns > self._smallest:
            found(
                TMEM_MISUSE, f"{columns} columns allocated after an allocation of {self._smallest}: sizes must not grow"
            )
        self._smallest = min(self._smallest, columns)
        self.allocations[start] = columns
        self._allocated[start : start + columns] = True
        self.valid[:, start : start + columns] = False
        return start

    def _fit(self, columns: int) -> int | None:
        for start in range(0, COLUMNS - columns + 1, columns):
            if not self._allocated[start : start + columns].any():
                return start
        return None

    def free(self, found: Found, clock: Clock, address: int, columns: int) -> None:
        """Gives an allocation back; accesses that are not ordered before it are races."""
        start = address & 0xFFFF
        if address >> 16 or self.allocations.get(start) != columns:
            have = ", ".join(f"{n} at column {c}" for c, n in sorted(self.allocations.items())) or "nothing"
            found(TMEM_MISUSE, f"tcgen05.dealloc of {columns} columns at {address:#x}, but allocated is: {have}")
            return
        self.check_write(found, clock, -1, ALL_BANDS, start, columns, "deallocation")
        del self.allocations[start]
        self._allocated[start : start + columns] = False
        self.valid[:, start : start + columns] = False
        self._write_tick[:, start : start + columns] = 0
        for reads in self._reads.values():
            reads[:, start : start + columns] = 0
        self.freed.wake()

    def exit_check(self) -> None:
        """Everything allocated must have been given back when the CTA exits."""
        if self.allocations:
            what = ", ".join(f"{n} columns at {c}" for c, n in sorted(self.allocations.items()))
            self._cta.machine.found(TMEM_IN_USE, f"CTA {self._cta.index} exits with tensor memory allocated: {what}")

    # Checks

    def check_range(self, found: Callable[..., None], first: int, count: int, what: str) -> None:
        """Columns outside every allocation end the run."""
        for start, columns in self.allocations.items():
            if start <= first and first + count <= start + columns:
                return
        if first + count <= COLUMNS and self._ready and self._allocated[first : first + count].all():
            return
        have = ", ".join(f"[{c}, {c + n})" for c, n in sorted(self.allocations.items())) or "none"
        found(
            TMEM_MISUSE,
            f"{what}: columns [{first}, {first + count}) are not allocated (allocated: {have})",
            fatal=True,
        )

    def check_valid(self, found: Found, lanes: Lanes, first: int, count: int, what: str) -> None:
        """Reading what nobody wrote since the allocation is a finding; it is reported once for a column."""
        part = self.valid[lanes, first : first + count]
        if b"\0" not in part.tobytes():
            return
        column = first + int(np.flatnonzero(~part.all(axis=0))[0])
        found(
            UNINITIALISED_READ,
            f"{what}: tensor memory column {column} (of [{first}, {first + count})) was never written",
        )
        self.valid[lanes, first : first + count] = True

    def check_read(self, found: Found, clock: Clock, bands: slice, first: int, count: int, what: str) -> None:
        """The last write of every cell must have happened before `clock`."""
        ticks = self._write_tick[bands, first : first + count]
        threads = self._write_thread[bands, first : first + count]
        late = clock.take(threads) < ticks
        if b"\1" in late.tobytes():
            self._report(found, "write", bands, late, threads, ticks, first, what)
            ticks[late] = 0

    def check_write(
        self, found: Found, clock: Clock, thread: int, bands: slice, first: int, count: int, what: str
    ) -> None:
        """The last write and all reads of every cell must have happened before `clock`.

        Args:
            thread: the writer; its own tcgen05.st that is still under way is no conflict. -1 if that does not apply.
        """
        ticks = self._write_tick[bands, first : first + count]
        threads = self._write_thread[bands, first : first + count]
        late = clock.take(threads) < ticks
        if b"\1" in late.tobytes():
            late &= ~((threads == thread) & (ticks == UNDER_WAY))
            if late.any():
                self._report(found, "write", bands, late, threads, ticks, first, what)
        for reader, newest in self._newest_read.items():
            if clock[reader] >= newest:
                continue
            reads = self._reads[reader][bands, first : first + count]
            late = reads > clock[reader]
            if late.any():
                self._report(found, "read", bands, late, np.full(late.shape, reader), reads, first, what)
                reads[late] = 0

    def _report(
        self,
        found: Found,
        kind: str,
        bands: slice,
        late: npt.NDArray[np.bool_],
        threads: npt.NDArray[np.intp],
        ticks: npt.NDArray[np.uint32],
        first: int,
        what: str,
    ) -> None:
        band, column = (int(i[0]) for i in np.nonzero(late))
        who = self._name(int(threads[band, column]))
        lane = (bands.start + band * (bands.step or 1)) * BAND
        if kind == "write" and ticks[band, column] == UNDER_WAY:
            text = f"a tcgen05.st of {who} that no tcgen05.wait::st has completed"
        else:
            text = f"a {kind} by {who}"
        found(RACE, f"{what}: column {first + column}, lanes {lane} to {lane + 15}: not ordered behind {text}")

    def _name(self, thread: int) -> str:
        return thread_name(self._cta, thread)

    # Bookkeeping

    def note_read(self, thread: int, tick: int, bands: slice, first: int, count: int) -> None:
        """Stamps a read."""
        reads = self._reads.get(thread)
        if reads is None:
            reads = self._reads[thread] = np.zeros((BANDS, COLUMNS), np.uint32)
        reads[bands, first : first + count] = tick
        self._newest_read[thread] = tick

    def note_write(self, thread: int, tick: int, bands: slice, first: int, count: int) -> None:
        """Stamps a write."""
        self._write_thread[bands, first : first + count] = thread
        self._write_tick[bands, first : first + count] = tick

    def settle_stores(self, thread: int, tick: int, bands: slice, first: int, count: int) -> None:
        """tcgen05.wait::st: stores of `thread` that are under way complete."""
        ticks = self._write_tick[bands, first : first + count]
        mine = (self._write_thread[bands, first : first + count] == thread) & (ticks == UNDER_WAY)
        ticks[mine] = tick


def thread_name(cta: "CTA", thread: int) -> str:
    """A thread of the cluster's vector clocks in words."""
    from ptxsim.machine import AGENTS

    rank, number = divmod(thread, cta.num_warps + len(AGENTS))
    where = "" if rank == cta.rank else f" of CTA rank {rank}"
    if number < cta.num_warps:
        return f"warp {number}{where}"
    agent = AGENTS[number - cta.num_warps]
    return ("a tensor-core operation" if agent == "tensor" else f"an operation of the {agent} unit") + where
