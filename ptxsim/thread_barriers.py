"""Barriers that count threads: the sixteen named barriers of a CTA, bar.warp.sync and the cluster barrier.

Each is a sequence of rounds. A round takes the arrivals of whole warps and ends when everybody has come; who waits keeps the
round it arrived in, as the next one may start before it wakes. Exits count: a barrier of all threads no longer waits for
threads that have left, one with a thread count does.

Source: PTX ISA 9.x, bar and barrier, bar.warp.sync, barrier.cluster, exit.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.findings import BARRIER_MISUSE, DIVERGENCE, Unsupported
from ptxsim.ptx import Instruction, Operand
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.values import Value, uniform

if TYPE_CHECKING:
    from ptxsim.machine import CTA, Cluster, Machine, Warp

Clock = npt.NDArray[np.uint32]


def _joined(old: Clock | None, new: Clock) -> Clock:
    return new.copy() if old is None else np.maximum(old, new)


class _Round:
    """One use of a barrier, from the first arrival to its completion."""

    __slots__ = ("clock", "count", "done", "everything", "extra", "masks", "queue", "reduced", "reduces", "voters")

    def __init__(self, machine: "Machine", count: int, reduces: str = "") -> None:
        self.count, self.reduces = count, reduces
        self.masks: dict[Warp, int] = {}
        self.clock: Clock | None = None
        self.everything: Clock | None = None
        from ptxsim.machine import WaitQueue

        self.queue = WaitQueue(machine)
        self.done = False
        self.voters = self.reduced = self.extra = 0

    def join(self, w: "Warp", mask: int, relaxed: bool = False) -> None:
        """Lanes of `w` arrive; a relaxed arrival publishes what a fence before it did."""
        before = self.masks.get(w, 0)
        if before & mask:
            # A warp may arrive for another one too: hardware counts arrivals, not warps.
            self.extra += 32
            before = 0
        self.masks[w] = before | mask
        present = w.release()
        self.everything = _joined(self.everything, present)
        released = w.state.get("fence clock") if relaxed else present
        if released is not None:
            self.clock = _joined(self.clock, released)

    def arrived(self) -> int:
        """Threads that have arrived, in whole warps: a warp counts when all its live lanes have come."""
        return self.extra + 32 * sum(1 for w, mask in self.masks.items() if w.active & ~mask == 0)

    def finish(self) -> None:
        """Completes the round and wakes everybody."""
        self.done = True
        self.queue.wake()


def _live_warps(cta: "CTA") -> int:
    return sum(1 for w in cta.warps if w.active)


def warp_exited(w: "Warp") -> None:
    """To be called when lanes of `w` have exited (`w.active` already without them): exits can complete barriers.

    Barriers of all threads no longer wait for them; those with a thread count do.
    Source: PTX ISA, exit.
    """
    rounds = w.cta.state.get("named_barriers")
    if rounds:
        for number, current in list(rounds.items()):
            _settle(w.cta, number, current)
    if w.cluster.state.get("cluster_round") is not None:
        _settle_cluster(w.cluster)


def _settle(cta: "CTA", number: int, current: _Round) -> None:
    """Completes a named barrier's round if everybody has come."""
    arrived = current.arrived()
    if current.count:
        complete = arrived >= current.count
    else:
        here = sum(1 for w, mask in current.masks.items() if w.active and w.active & ~mask == 0)
        complete = here >= _live_warps(cta)
    if complete and current.masks:
        rounds = cta.state["named_barriers"]
        if rounds.get(number) is current:
            del rounds[number]
        current.finish()


def _describe(cta: "CTA", number: int, current: _Round) -> str:
    who = sorted(w.index for w in current.masks)
    wanted = current.count or 32 * len(cta.warps)
    return f"named barrier {number} of CTA {cta.index}: {current.arrived()} of {wanted} threads arrived (warps {who})"


def _bar_operands(ins: Instruction, r: Reader, kind: str) -> tuple[tuple[Operand, ...], tuple[Source, ...], bool]:
    """Destinations, sources and whether a thread count is given, for sync, arrive and red."""
    operands = ins.operands
    if kind == "red":
        if len(operands) not in (3, 4):
            raise Unsupported(f"{r.where}: 3 or 4 operands expected")
        counted = len(operands) == 4
        sources = [Source(operands[1]), *([Source(operands[2])] if counted else []), Source(operands[-1], 1)]
        return (operands[0],), tuple(sources), counted
    if len(operands) not in (1, 2) or (kind == "arrive" and len(operands) != 2):
        raise Unsupported(f"{r.where}: {len(operands)} operands do not fit")
    return (), tuple(Source(operand) for operand in operands), len(operands) == 2


@decoder("bar.sync", "bar.arrive", "bar.red", "bar.cta", "barrier.sync", "barrier.arrive", "barrier.red", "barrier.cta")
def named_barrier(ins: Instruction) -> Effect:
    """bar{.cta}.{sync,arrive,red...} and barrier{.cta}.{sync,arrive,red...}{.aligned}."""
    r = Reader(ins, 1)
    r.take("cta")
    kind = r.one_of("sync", "arrive", "red")
    reduces = r.one_of("popc", "and", "or") if kind == "red" else ""
    aligned = r.take("aligned") or ins.parts[0] == "bar"
    if reduces:
        r.one_of("u32" if reduces == "popc" else "pred")
    r.end()
    destinations, sources, counted = _bar_operands(ins, r, kind)
    waits = kind != "arrive"
    key = "bar round"

    def run(w: "Warp", mask: int, number: Value, *rest: Any) -> Any:
        current = w.path.state.get(key)
        if current is None:
            count = rest[0] if counted else 0
            vote = rest[-1] if reduces else 0
            current = _join_named(w, mask, number, count, counted, reduces, vote)
            if current is None or not waits:
                return 0 if reduces else None
            w.path.state[key] = current
        if not current.done:
            cta, which = w.cta, number
            return w.block(current.queue, lambda: "waits at " + _describe(cta, which, current))
        del w.path.state[key]
        if current.clock is not None:
            w.acquire(current.clock)
        return _reduced(current, mask) if reduces else None

    return Effect(run, destinations, sources, blocks=waits, aligned=aligned)


def _join_named(
    w: "Warp", mask: int, number: Value, count: Value, counted: bool, reduces: str, vote: int
) -> _Round | None:
    which, threads = uniform(number, mask), uniform(count, mask)
    if which is None or threads is None:
        w.found(BARRIER_MISUSE, "lanes of a warp name different barriers or thread counts", fatal=True)
        return None
    if which > 15:
        w.found(BARRIER_MISUSE, f"barrier number {which}, which must be 0 to 15", fatal=True)
        return None
    if counted and (threads % 32 or not threads or threads > 32 * len(w.cta.warps)):
        w.found(
            BARRIER_MISUSE,
            f"barrier {which} for {threads} threads: must be a positive multiple of 32 within the CTA's {w.cta.num_threads}",
            fatal=True,
        )
        return None
    rounds = w.cta.state.setdefault("named_barriers", {})
    current = rounds.get(which)
    if current is None:
        current = rounds[which] = _Round(w.machine, threads, reduces)
    elif (current.count or 32 * len(w.cta.warps)) != (threads or 32 * len(w.cta.warps)):
        wanted = threads or "all"
        w.found(BARRIER_MISUSE, f"thread count {wanted} does not fit {_describe(w.cta, which, current)}")
    if bool(current.reduces) != bool(reduces):
        w.found(BARRIER_MISUSE, f"bar.red mixed with bar.sync or bar.arrive: {_describe(w.cta, which, current)}")
    before = current.masks.get(w, 0)
    if before & mask and (w.active & ~before or not current.count):
        w.found(BARRIER_MISUSE, f"a warp arrives twice: {_describe(w.cta, which, current)}")
    current.join(w, mask)
    if current.count and current.arrived() > current.count:
        w.found(BARRIER_MISUSE, f"more arrivals than expected: {_describe(w.cta, which, current)}")
    current.voters += mask.bit_count()
    current.reduced += (vote & mask).bit_count()
    _settle(w.cta, which, current)
    return current


def _reduced(current: _Round, mask: int) -> int:
    if current.reduces == "popc":
        return current.reduced
    if current.reduces == "and":
        return mask if current.reduced == current.voters else 0
    return mask if current.reduced else 0


@decoder("bar.warp.sync")
def bar_warp_sync(ins: Instruction) -> Effect:
    """bar.warp.sync membermask."""
    r = Reader(ins, 3)
    r.end(1)

    def run(w: "Warp", mask: int, members: Value) -> Any:
        wanted = uniform(members, mask)
        if wanted is None or mask & ~wanted:
            w.found(DIVERGENCE, f"bar.warp.sync by lanes {mask:#x}, which the member mask does not all contain")
            return None
        if w.active & wanted & ~mask == 0:
            return None
        current = w.path.state.get("warp_round")
        if current is None:
            rounds = w.state.setdefault("warp_rounds", {})
            current = rounds.get(wanted)
            if current is None:
                current = rounds[wanted] = _Round(w.machine, 0)
            current.masks[w] = current.masks.get(w, 0) | mask
            w.path.state["warp_round"] = current
            if w.active & wanted & ~current.masks[w] == 0:
                del rounds[wanted]
                current.finish()
        if not current.done:
            return w.block(current.queue, lambda: f"waits at bar.warp.sync {wanted:#x}, arrived {current.masks[w]:#x}")
        del w.path.state["warp_round"]
        return None

    return Effect(run, (), (Source(ins.operands[0]),), blocks=True)


def _settle_cluster(cluster: "Cluster") -> None:
    current = cluster.state.get("cluster_round")
    if current is None:
        return
    for cta in cluster.ctas:
        for w in cta.warps:
            if w.active & ~current.masks.get(w, 0):
                return
    cluster.state["cluster_round"] = None
    current.finish()


def _describe_cluster(cluster: "Cluster", current: _Round) -> str:
    missing = [
        f"CTA {cta.index} warp {w.index}"
        for cta in cluster.ctas
        for w in cta.warps
        if w.active & ~current.masks.get(w, 0)
    ]
    return f"cluster barrier of cluster {cluster.index}; not arrived: {', '.join(missing[:8])}" + (
        f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    )


@decoder("barrier.cluster.arrive")
def cluster_arrive(ins: Instruction) -> Effect:
    """barrier.cluster.arrive{.release|.relaxed}{.aligned}."""
    r = Reader(ins, 3)
    relaxed = r.one_of("release", "relaxed", default="release") == "relaxed"
    aligned = r.take("aligned")
    r.end(0)

    def run(w: "Warp", mask: int) -> None:
        cluster = w.cluster
        current = cluster.state.get("cluster_round")
        if current is None:
            current = cluster.state["cluster_round"] = _Round(w.machine, 0)
        if current.masks.get(w, 0) & mask:
            w.found(BARRIER_MISUSE, f"a thread arrives twice at the {_describe_cluster(cluster, current)}")
            return
        if w.state.get("cluster_round", current) is not current:
            w.found(BARRIER_MISUSE, "barrier.cluster.arrive without a wait for the round before")
        current.join(w, mask, relaxed)
        w.state["cluster_round"] = current
        _settle_cluster(cluster)

    return Effect(run, aligned=aligned)


@decoder("barrier.cluster.wait")
def cluster_wait(ins: Instruction) -> Effect:
    """barrier.cluster.wait{.acquire}{.aligned}."""
    r = Reader(ins, 3)
    r.take("acquire")
    aligned = r.take("aligned")
    r.end(0)

    def run(w: "Warp", mask: int) -> Any:
        current = w.state.get("cluster_round")
        if current is None or mask & ~current.masks.get(w, 0):
            w.found(BARRIER_MISUSE, "barrier.cluster.wait without an arrival before it")
            return None
        if not current.done:
            cluster = w.cluster
            return w.block(current.queue, lambda: "waits at the " + _describe_cluster(cluster, current))
        if w.active & ~mask == 0:
            del w.state["cluster_round"]
        else:
            current.masks[w] &= ~mask
            if not current.masks[w] & w.active:
                del w.state["cluster_round"]
        if current.clock is not None:
            w.acquire(current.clock)
        if current.everything is not None:
            w.state["init_seen"] = _joined(w.state.get("init_seen"), current.everything)
        return None

    return Effect(run, blocks=True, aligned=aligned)
