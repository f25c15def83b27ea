"""mbarrier objects and their instructions; the barriers that count threads are in thread_barriers.py.

The hard part is what a barrier orders. Every arrival publishes a vector clock, and a successful wait joins the clocks of
the phase it observed: that is what the race checks of the memories rely on, so an arrival that publishes too much hides
races and one that publishes too little invents them. `.relaxed` forms publish only what a fence before them did.

An mbarrier phase ends when no arrival and no transaction is pending; the transaction count may go below zero meanwhile,
as a copy may complete before its bytes are announced. A polling loop must not spin forever here: a wait that fails answers
false once (a peek), and puts its path to sleep if the same lanes come back to it without having got anywhere.

Source: PTX ISA 9.x, "Parallel Synchronization and Communication Instructions: mbarrier".
Not pinned by silicon: that an arrival in a phase is a fault while nobody has observed the end of the phase before it (the
ISA demands it; hardware does not check), and that asynchronous units need a fence after mbarrier.init within one CTA (all
of CUTLASS fences; the ISA since version 9.3 demands it only across CTAs).
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.findings import (
    BARRIER_MISUSE,
    LEFTOVER_TRANSACTIONS,
    MISALIGNED,
    MISSING_INIT_FENCE,
    OUT_OF_BOUNDS,
    OVERARRIVAL,
    RACE,
    SHARED_IN_USE,
    Unsupported,
)
from ptxsim.ptx import Instruction, Sink
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.thread_barriers import warp_exited
from ptxsim.values import M32, Value, lane, lanes_of, uniform

if TYPE_CHECKING:
    from ptxsim.machine import CTA, Cluster, Machine, WaitQueue, Warp

__all__ = ["MBarrier", "check_exit", "fence_async", "fence_init", "find", "shared_address", "warp_exited"]

Clock = npt.NDArray[np.uint32]
Found = Callable[[str, str], None]

MAX_COUNT = (1 << 20) - 1
SHARED_WINDOW_BIT = 1 << 56
SHARED_BASE = 0x400


def _queue(machine: "Machine") -> "WaitQueue":
    from ptxsim.machine import WaitQueue

    return WaitQueue(machine)


class MBarrier:
    """An mbarrier object in shared memory.

    Attributes:
        cta: the CTA whose shared memory holds it.
        offset: where in that memory.
        expected: arrivals of every phase.
        pending: arrivals that the current phase still lacks.
        tx: transactions (bytes) that the current phase still lacks; negative if more were completed than announced.
        phases: completed phases; the current phase's parity is its lowest bit.
        waiters: woken when a phase completes.
        fenced: a fence that covers the initialisation was executed.
    """

    __slots__ = (
        "_closed",
        "_extra",
        "_gather",
        "_known",
        "cta",
        "expected",
        "fenced",
        "init_thread",
        "init_tick",
        "observed",
        "offset",
        "pending",
        "phases",
        "tx",
        "valid",
        "waiters",
    )

    def __init__(self, w: "Warp", cta: "CTA", offset: int, count: int) -> None:
        self.cta, self.offset = cta, offset
        self.expected = self.pending = count
        self.tx = self.phases = 0
        self.waiters = _queue(cta.machine)
        self.valid, self.fenced, self.observed = True, False, True
        self.init_thread: int = w.thread
        self.init_tick = int(w.clock[w.thread])
        self._gather: Clock | None = None
        self._closed: Clock | None = None
        self._known = {w.thread}
        self._extra: list[WaitQueue] = []

    def __repr__(self) -> str:
        return (
            f"mbarrier {self.address:#x} of CTA {self.cta.index} (rank {self.cta.rank}): parity {self.phases & 1}, "
            f"{self.pending} of {self.expected} arrivals and {self.tx} transaction bytes pending, "
            f"{self.phases} phases completed"
        )

    @property
    def address(self) -> int:
        """Its shared::cluster address."""
        return self.cta.rank << 24 | self.offset

    @property
    def state(self) -> int:
        """The opaque value that arrivals return: phase and pending count before them."""
        return 1 << 63 | (self.phases & 0x7FFFFFFF) << 32 | self.pending

    def arrive(self, found: Found, clock: Clock | None, count: int = 1, asynchronous: bool = False) -> None:
        """An arrive-on operation.

        Args:
            found: where findings go: `w.found` or `machine.found`.
            clock: what the arrival publishes; None for relaxed forms.
            count: arrivals.
            asynchronous: a unit arrives, not a thread. Units cannot observe phases: a kernel may let them arrive on barriers
                that nobody looks at before its end (FlashInfer's gather kernel for pairs of CTAs).
        """
        if not self._usable(found, "arrival"):
            return
        if not self.observed and not asynchronous:
            found(OVERARRIVAL, f"arrival before any thread saw the phase before completed: {self!r}")
            self.observed = True
        if count > self.pending:
            found(OVERARRIVAL, f"{count} arrivals where {self.pending} are pending: {self!r}")
            count = self.pending
        self.pending -= count
        self._publish(clock)
        self._advance()

    def expect_tx(self, found: Found, count: int) -> None:
        """Announces transactions."""
        if not self._usable(found, "expect_tx"):
            return
        self.tx += count
        self._check_tx(found)
        self._advance()

    def complete_tx(self, found: Found, count: int, clock: Clock | None) -> None:
        """Completes transactions; `clock` is that of the asynchronous operation (`issue.clock`)."""
        if not self._usable(found, "complete_tx"):
            return
        self.tx -= count
        self._check_tx(found)
        self._publish(clock)
        self._advance()

    def drop(self, found: Found, count: int) -> None:
        """Lowers the arrivals of all later phases (the arrival itself comes separately)."""
        if self.expected - count < 1:
            found(BARRIER_MISUSE, f"arrive_drop of {count} leaves no arrivals to expect: {self!r}")
            return
        self.expected -= count

    def add_pending(self, found: Found, count: int) -> None:
        """Raises the arrivals of the current phase alone (cp.async.mbarrier.arrive without .noinc)."""
        if not self._usable(found, "cp.async.mbarrier.arrive"):
            return
        self.pending += count
        if self.pending > MAX_COUNT:
            found(BARRIER_MISUSE, f"pending count above {MAX_COUNT}: {self!r}")

    def completed(self, parity: int) -> bool:
        """True if the phase of that parity is the one before the current one."""
        return (self.phases ^ parity) & 1 == 1

    def observe(self, w: "Warp", acquire: bool) -> None:
        """A wait of `w` saw the last completed phase."""
        self.observed = True
        if self._closed is None:
            return
        if acquire:
            w.acquire(self._closed)
        else:
            # A fence behind a relaxed wait acquires (memory_ops.py).
            seen = w.state.get("unacquired clock")
            w.state["unacquired clock"] = self._closed if seen is None else np.maximum(seen, self._closed)

    def invalidate(self) -> None:
        """Ends its life."""
        self.valid = False
        self.cta.smem.barriers.pop(self.offset, None)
        self.cta.smem.barrier_bytes[self.offset : self.offset + 8] = 0
        _by_address(self.cta.cluster).pop(self.address, None)

    def watch(self, queue: "WaitQueue") -> None:
        """Wakes one more queue, once, when the current phase completes."""
        self._extra.append(queue)

    def _usable(self, found: Found, what: str) -> bool:
        if self.valid:
            return True
        found(BARRIER_MISUSE, f"{what} on an mbarrier after mbarrier.inval: {self!r}")
        return False

    def _check_tx(self, found: Found) -> None:
        if not -MAX_COUNT <= self.tx <= MAX_COUNT:
            found(BARRIER_MISUSE, f"transaction count leaves its range of +-{MAX_COUNT}: {self!r}")

    def _publish(self, clock: Clock | None) -> None:
        if clock is None:
            return
        if self._gather is None:
            self._gather = clock.copy()
        else:
            np.maximum(self._gather, clock, out=self._gather)

    def _advance(self) -> None:
        if self.pending or self.tx:
            return
        self.phases += 1
        self.pending = self.expected
        self._closed, self._gather = self._gather, None
        self.observed = False
        self.waiters.wake()
        if self._extra:
            extra, self._extra = self._extra, []
            for queue in extra:
                queue.wake()

    def check_initialised_for(self, w: "Warp", asynchronous: bool) -> None:
        """Records a finding if `w`, or an asynchronous unit on its behalf, may not see the initialisation.

        Args:
            w: the warp that uses the barrier, or that issues the asynchronous operation which will signal it.
            asynchronous: the TMA or tensor unit signals it.
        """
        if w.thread not in self._known:
            ordered = int(w.clock[self.init_thread]) >= self.init_tick
            if not ordered and self.fenced:
                seen = w.state.get("init_seen")
                ordered = seen is not None and int(seen[self.init_thread]) >= self.init_tick
            if not ordered:
                remote = w.cta is not self.cta
                code = MISSING_INIT_FENCE if remote else RACE
                wanted = "fence.mbarrier_init and a cluster barrier" if remote else "a barrier"
                w.found(code, f"mbarrier used without {wanted} between its mbarrier.init and this: {self!r}")
            self._known.add(w.thread)
        if asynchronous and not self.fenced:
            w.found(
                MISSING_INIT_FENCE,
                f"an asynchronous unit will signal an mbarrier whose mbarrier.init no fence.mbarrier_init covers: {self!r}",
            )
            self.fenced = True


def _by_address(cluster: "Cluster") -> dict[int, MBarrier]:
    found = cluster.state.get("mbarriers")
    if found is None:
        found = cluster.state["mbarriers"] = {}
    return found


def shared_address(w: "Warp", value: int, space: str) -> int | None:
    """The shared window address (u32) that an operand of `space` means; None after a finding.

    Args:
        w: who asks.
        value: the operand: a shared window address, or a generic address if `space` is "generic".
        space: "shared", "shared::cta", "shared::cluster" or "generic".
    """
    if space == "generic":
        if value & ~M32 != SHARED_WINDOW_BIT:
            w.found(BARRIER_MISUSE, f"generic address {value:#x} is not in shared memory", fatal=True)
            return None
        value &= M32
    if space != "shared::cluster" and space != "generic" and value >> 24 != w.cta.rank:
        w.found(BARRIER_MISUSE, f"address {value:#x} of CTA rank {value >> 24} used as .{space} by rank {w.cta.rank}")
    return value


def find(w: "Warp", address: int, asynchronous: bool = False) -> MBarrier | None:
    """The live mbarrier at a shared window address, checked for use by `w`; None after a finding.

    Args:
        w: the warp that uses it, or issues the operation that will signal it.
        address: shared window address (u32).
        asynchronous: an asynchronous unit (TMA, tensor) signals it.
    """
    bar = _by_address(w.cluster).get(address)
    if bar is None:
        _report_missing(w, address)
        return None
    if asynchronous or w.thread not in bar._known:
        bar.check_initialised_for(w, asynchronous)
    if bar.cta is not w.cta and bar.cta.exited:
        w.found(SHARED_IN_USE, f"mbarrier of a CTA that has exited: {bar!r}")
    return bar


def _report_missing(w: "Warp", address: int) -> None:
    if address & 7:
        w.found(MISALIGNED, f"mbarrier address {address:#x} is not a multiple of 8", fatal=True)
        return
    cta, offset = w.cluster.locate(address)
    w.found(
        BARRIER_MISUSE,
        f"no mbarrier lives at {address:#x} (CTA {cta.index}, offset {offset:#x}): not initialised, or invalidated",
    )


def fence_init(w: "Warp") -> None:
    """`fence.mbarrier_init` by `w`: its own initialisations become visible to the cluster and to asynchronous units."""
    for bar in w.state.pop("unfenced_inits", ()):
        bar.fenced = True


def fence_async(w: "Warp") -> None:
    """`fence.proxy.async` by `w`: covers every initialisation before it in the warp's present, its own or another's."""
    for bar in w.cta.smem.barriers.values():
        if not bar.fenced and int(w.clock[bar.init_thread]) >= bar.init_tick:
            bar.fenced = True


def check_exit(cta: "CTA") -> None:
    """To be called when a CTA has exited: barriers that still wait for bytes, copies nobody waited for."""
    for check in cta.state.get("at_exit", ()):
        check()
    for bar in cta.smem.barriers.values():
        if bar.tx:
            cta.machine.found(LEFTOVER_TRANSACTIONS, f"CTA exits while {bar!r}")


# ---------------------------------------------------------------------------------------------------------------------
# mbarrier instructions


def _space(r: Reader, *, cluster: bool) -> str:
    names = ["shared::cta", "shared"] + (["shared::cluster"] if cluster else [])
    return r.one_of(*names, default="generic")


def _width(space: str) -> int:
    return 64 if space == "generic" else 32


def _semantics(r: Reader, *names: str) -> tuple[str, str]:
    """Reads `.sem.scope` in either order; "" where absent."""
    sem, scope = "", ""
    while True:
        if not sem and r.peek() in names:
            sem = r.pop()
        elif not scope and r.peek() in ("cta", "cluster"):
            scope = r.pop()
        else:
            break
    if bool(sem) != bool(scope):
        raise Unsupported(f"{r.where}: .sem and .scope must be given together")
    return sem, scope


def _groups(mask: int, address: Value, other: Value) -> Iterator[tuple[int, int, int]]:
    """(address, other value, lanes) of each distinct pair among the lanes of the mask."""
    a, b = uniform(address, mask), uniform(other, mask)
    if a is not None and b is not None:
        yield a, b, mask
        return
    groups: dict[tuple[int, int], int] = {}
    for i in lanes_of(mask):
        key = (lane(address, i), lane(other, i))
        groups[key] = groups.get(key, 0) | 1 << i
    for (one, two), lanes in groups.items():
        yield one, two, lanes


@decoder("mbarrier.init")
def mbarrier_init(ins: Instruction) -> Effect:
    """mbarrier.init{.shared{::cta}}.b64 [addr], count."""
    r = Reader(ins, 2)
    r.take("layout::v0")
    space = _space(r, cluster=False)
    r.one_of("b64")
    r.end(2)

    def run(w: "Warp", mask: int, address: Value, count: Value) -> None:
        for one, number, lanes in _groups(mask, address, count):
            if lanes & lanes - 1:
                w.found(BARRIER_MISUSE, f"{lanes.bit_count()} lanes initialise the mbarrier at {one:#x}")
            _init(w, one, number, space)

    return Effect(run, (), (Source(ins.operands[0], _width(space)), Source(ins.operands[1])))


def _init(w: "Warp", value: int, count: int, space: str) -> None:
    address = shared_address(w, value, space)
    if address is None:
        return
    if address & 7:
        w.found(MISALIGNED, f"mbarrier address {address:#x} is not a multiple of 8", fatal=True)
        return
    if not 1 <= count <= MAX_COUNT:
        w.found(BARRIER_MISUSE, f"mbarrier.init with count {count}, which must be 1 to {MAX_COUNT}")
        return
    cta, offset = w.cluster.locate(address)
    smem = cta.smem
    if offset < SHARED_BASE or offset + 8 > smem.num_bytes:
        w.found(OUT_OF_BOUNDS, f"mbarrier at {address:#x} lies outside shared memory", fatal=True)
        return
    if smem.barrier_bytes[offset : offset + 8].any():
        w.found(BARRIER_MISUSE, f"mbarrier.init over a live mbarrier at {address:#x}; mbarrier.inval must come first")
    bar = MBarrier(w, cta, offset, count)
    smem.barriers[offset] = bar
    smem.barrier_bytes[offset : offset + 8] = 1
    _by_address(cta.cluster)[address] = bar
    w.state.setdefault("unfenced_inits", []).append(bar)


@decoder("mbarrier.inval")
def mbarrier_inval(ins: Instruction) -> Effect:
    """mbarrier.inval{.shared{::cta}}.b64 [addr]."""
    r = Reader(ins, 2)
    space = _space(r, cluster=False)
    r.one_of("b64")
    r.end(1)

    def run(w: "Warp", mask: int, address: Value) -> None:
        for one, _, _ in _groups(mask, address, 0):
            where = shared_address(w, one, space)
            bar = find(w, where) if where is not None else None
            if bar is None:
                continue
            if bar.tx or bar.pending != bar.expected:
                w.found(BARRIER_MISUSE, f"mbarrier.inval in the middle of a phase: {bar!r}")
            bar.invalidate()

    return Effect(run, (), (Source(ins.operands[0], _width(space)),))


@decoder("mbarrier.expect_tx", "mbarrier.complete_tx")
def mbarrier_tx(ins: Instruction) -> Effect:
    """mbarrier.{expect,complete}_tx{.sem.scope}{.space}.b64 [addr], count."""
    r = Reader(ins, 2)
    _semantics(r, "relaxed")
    space = _space(r, cluster=True)
    r.one_of("b64")
    r.end(2)
    completes = ins.parts[1] == "complete_tx"

    def run(w: "Warp", mask: int, address: Value, count: Value) -> None:
        for one, number, lanes in _groups(mask, address, count):
            where = shared_address(w, one, space)
            bar = find(w, where) if where is not None else None
            if bar is None:
                continue
            total = number * lanes.bit_count()
            if completes:
                bar.complete_tx(w.found, total, None)
            else:
                bar.expect_tx(w.found, total)
        _forget_waits(w)

    return Effect(run, (), (Source(ins.operands[0], _width(space)), Source(ins.operands[1])))


@decoder("mbarrier.arrive", "mbarrier.arrive_drop")
def mbarrier_arrive(ins: Instruction) -> Effect:
    """mbarrier.arrive{_drop}{.expect_tx|.noComplete}{.sem.scope}{.space}.b64 state|_, [addr]{, count}."""
    r = Reader(ins, 2)
    drops = ins.parts[1] == "arrive_drop"
    expects, incomplete = r.take("expect_tx"), r.take("noComplete")
    space = _space(r, cluster=True) if r.peek() in ("shared", "shared::cta", "shared::cluster") else ""
    sem, _ = _semantics(r, "release", "relaxed")
    space = space or _space(r, cluster=True)
    r.one_of("b64")
    r.end()
    sink, address, *rest = ins.operands
    wants_state = not isinstance(sink, Sink)
    if wants_state and space == "shared::cluster":
        raise Unsupported(f"{r.where}: an arrival on a shared::cluster address returns no state; write _")
    if len(rest) > 1 or ((expects or incomplete) and not rest):
        raise Unsupported(f"{r.where}: {len(ins.operands)} operands do not fit")
    relaxed = sem == "relaxed"

    def run(w: "Warp", mask: int, address: Value, count: Value = 1) -> Value | None:
        # A relaxed arrival publishes what a fence before it did.
        clock = w.state.get("fence clock") if relaxed else w.release()
        result: Any = None
        for one, number, lanes in _groups(mask, address, count):
            where = shared_address(w, one, space)
            bar = find(w, where) if where is not None else None
            if bar is None:
                continue
            if bar.cta is not w.cta and wants_state:
                w.found(BARRIER_MISUSE, f"an arrival on another CTA's mbarrier cannot return a state: {bar!r}")
            before = bar.state
            _arrive(w, bar, number, lanes.bit_count(), clock, expects, drops, incomplete)
            result = _put(result, before, lanes)
        _forget_waits(w)
        return (0 if result is None else result) if wants_state else None

    sources = (Source(address, _width(space)), *(Source(operand) for operand in rest))
    return Effect(run, (sink,) if wants_state else (), sources)


def _arrive(
    w: "Warp",
    bar: MBarrier,
    number: int,
    lanes: int,
    clock: Clock | None,
    expects: bool,
    drops: bool,
    incomplete: bool,
) -> None:
    count = lanes if expects else number * lanes
    if not expects and not 1 <= number <= MAX_COUNT:
        w.found(BARRIER_MISUSE, f"arrival with count {number}, which must be 1 to {MAX_COUNT}: {bar!r}")
        return
    if expects:
        # Both happen as one: the phase must not end between them.
        bar.tx += number * lanes
        bar._check_tx(w.found)
    if drops:
        bar.drop(w.found, count)
    phases = bar.phases
    bar.arrive(w.found, clock, count)
    if incomplete and bar.phases != phases:
        w.found(BARRIER_MISUSE, f"a .noComplete arrival completed the phase: {bar!r}")


def _put(result: Any, value: int, lanes: int) -> Any:
    """`value` in `lanes` of a 64-bit result that is still None, or already holds other lanes."""
    if result is None:
        return value
    if result.__class__ is int:
        result = np.full(32, result, np.uint64)
    for i in lanes_of(lanes):
        result[i] = value
    return result


@decoder("mbarrier.pending_count")
def mbarrier_pending_count(ins: Instruction) -> Effect:
    """mbarrier.pending_count.b64 count, state."""
    r = Reader(ins, 2)
    r.one_of("b64")
    r.end(2)

    def run(w: "Warp", mask: int, state: Value) -> Value:
        if isinstance(state, int):
            return state & MAX_COUNT
        return np.array([int(one) & MAX_COUNT for one in state], np.uint32)

    return Effect(run, (ins.operands[0],), (Source(ins.operands[1], 64),))


@decoder("mbarrier.test_wait", "mbarrier.try_wait")
def mbarrier_wait(ins: Instruction) -> Effect:
    """mbarrier.{test,try}_wait{.parity}{.sem.scope}{.shared{::cta}}.b64 p, [addr], state|parity{, hint}."""
    r = Reader(ins, 2)
    parity = r.take("parity")
    space = _space(r, cluster=False) if r.peek() in ("shared", "shared::cta") else ""
    sem, _ = _semantics(r, "acquire", "relaxed")
    space = space or _space(r, cluster=False)
    r.one_of("b64")
    r.end()
    hint = ins.parts[1] == "try_wait" and len(ins.operands) == 4
    if len(ins.operands) != 3 + hint:
        raise Unsupported(f"{r.where}: {len(ins.operands)} operands found, 3 expected")
    acquire = sem != "relaxed"
    here = object()

    # One function for the common case, as this runs more often than any other barrier operation.
    def run(w: "Warp", mask: int, address: Value, phase: Value) -> Any:
        if isinstance(address, int) and isinstance(phase, int):
            bar = _waitable(w, address, space)
            if bar is None:
                return mask
            if _passed(w, bar, phase, parity):
                _forget_waits(w)
                bar.observe(w, acquire)
                return mask
            return _failed(w, here, (mask, bar, phase), bar)
        return _wait_lanes(w, mask, address, phase, space, parity, acquire, here)

    destination, target, state = ins.operands[:3]
    return Effect(
        run, (destination,), (Source(target, _width(space)), Source(state, 32 if parity else 64)), blocks=True
    )


def _waitable(w: "Warp", value: int, space: str) -> MBarrier | None:
    address = shared_address(w, value, space)
    bar = find(w, address) if address is not None else None
    if bar is not None and bar.cta is not w.cta:
        w.found(BARRIER_MISUSE, f"only arrivals are possible on another CTA's mbarrier, not waits: {bar!r}")
        return None
    return bar


def _passed(w: "Warp", bar: MBarrier, phase: int, parity: bool) -> bool:
    if parity:
        return bar.phases & 1 != phase & 1
    number = phase >> 32 & 0x7FFFFFFF
    behind = bar.phases - number
    if behind < 0 or behind > 1 or not phase >> 63:
        w.found(BARRIER_MISUSE, f"wait for phase {number}, which is neither the current nor the last one: {bar!r}")
    return behind > 0


def _forget_waits(w: "Warp") -> None:
    """The warp got on: what it polled before may be polled afresh."""
    waits = w.state.get("waits")
    if waits:
        waits.clear()


def _repeats(w: "Warp", here: object, key: tuple[object, ...]) -> bool:
    """True if this wait failed before with the same key, and the warp got no further meanwhile."""
    waits = w.state.get("waits")
    if waits is None:
        waits = w.state["waits"] = {}
    if waits.get(here) == key:
        return True
    waits[here] = key
    return False


def _failed(w: "Warp", here: object, key: tuple[object, ...], bar: MBarrier) -> Any:
    """False the first time, sleep when the same lanes repeat the same wait."""
    if not _repeats(w, here, key):
        return 0
    return w.block(bar.waiters, lambda: f"waits for the phase of parity {bar.phases & 1}: {bar!r}")


def _wait_lanes(
    w: "Warp", mask: int, address: Value, phase: Value, space: str, parity: bool, acquire: bool, here: object
) -> Any:
    passed, missed = 0, []
    for one, number, lanes in _groups(mask, address, phase):
        bar = _waitable(w, one, space)
        if bar is None:
            passed |= lanes
        elif _passed(w, bar, number, parity):
            bar.observe(w, acquire)
            passed |= lanes
        else:
            missed.append((bar, number))
    if passed:
        _forget_waits(w)
        return passed
    bar = missed[0][0]
    key = (mask, *missed)
    if all(other is bar for other, _ in missed):
        return _failed(w, here, key, bar)
    if not _repeats(w, here, key):
        return 0
    queue = _queue(w.machine)
    for other, _ in missed:
        other.watch(queue)
    return w.block(queue, lambda: "lanes wait for different phases: " + "; ".join(repr(one) for one, _ in missed))
