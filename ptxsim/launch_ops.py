"""Instructions that concern the launch: griddepcontrol, setmaxnreg, clusterlaunchcontrol.

Launches run one after the other here, so a dependent grid has nothing to wait for. But a launch with the attribute
programmatic_stream_serialization may begin before those before it have ended: there a warp that touches global memory must
have waited, or be ordered behind one that has. Only buffers said to be constant may be read earlier.

Source: PTX ISA, griddepcontrol, setmaxnreg, clusterlaunchcontrol.try_cancel and .query_cancel. The 16-byte response is
opaque; its bits here are this model's own. The coordinates in a response that cancelled nothing are undefined by the
ISA; asking for them is no finding, as public kernels ask before they look at the outcome; here they are 0.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ptxsim.barriers import find, shared_address
from ptxsim.findings import BARRIER_MISUSE, LAUNCH, MISALIGNED, SHARED_IN_USE, Unsupported
from ptxsim.ptx import Imm, Instruction, Vector
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.values import M32, Value, lane, lanes_of

if TYPE_CHECKING:
    from ptxsim.machine import CTA, Warp

_REGISTERS_OF_SM = 65536


@decoder("griddepcontrol")
def griddepcontrol(ins: Instruction) -> Effect:
    """griddepcontrol.wait and .launch_dependents: launches run in order, so that waiting is only noted."""
    r = Reader(ins, 1)
    action = r.one_of("wait", "launch_dependents")
    r.end(0)
    if action == "launch_dependents":
        return Effect(lambda w, mask: None)
    return Effect(lambda w, mask: w.note_wait())


# ---------------------------------------------------------------------------------------------------------------------
# setmaxnreg


@decoder("setmaxnreg")
def setmaxnreg(ins: Instruction) -> Effect:
    """setmaxnreg.{inc,dec}.sync.aligned.u32 N."""
    r = Reader(ins, 1)
    direction = r.one_of("inc", "dec")
    r.one_of("sync")
    r.one_of("aligned")
    r.one_of("u32")
    r.end(1)
    if not isinstance(ins.operands[0], Imm):
        raise Unsupported(f"{r.where}: the register count must be a literal")
    count = ins.operands[0].integer()
    if count % 8 or not 24 <= count <= 256:
        raise Unsupported(f"{r.where}: register count {count}, which must be a multiple of 8 from 24 to 256")

    def run(w: "Warp", mask: int) -> Any:
        return _set_registers(w, direction, count)

    return Effect(run, blocks=True, aligned=True)


class _Registers:
    """The register pool of a CTA.

    What a thread holds at launch is the assembler's choice unless .maxnreg fixes it; otherwise the most that the launch
    bounds allow is taken, so that a shortage found here is a shortage on hardware.
    """

    def __init__(self, cta: "CTA") -> None:
        from ptxsim.machine import WaitQueue

        directives = cta.machine.kernel.directives
        per_sm = max(1, directives.get("minnctapersm", (1,))[0])
        fair = _REGISTERS_OF_SM // (32 * len(cta.warps) * per_sm) // 8 * 8
        self.exact = "maxnreg" in directives
        self.at_launch = (min(directives.get("maxnreg", (255,))[0], fair, 255) + 7) // 8 * 8
        # Whole register file of the CTA: setmaxnreg only moves registers between warps.
        self.total = self.at_launch * len(cta.warps)
        self.held = {w.index: self.at_launch for w in cta.warps}
        self.queue = WaitQueue(cta.machine)


def _set_registers(w: "Warp", direction: str, count: int) -> Any:
    pool = w.cta.state.get("registers")
    if pool is None:
        pool = w.cta.state["registers"] = _Registers(w.cta)
    held = pool.held[w.index]
    if direction == "dec":
        if held < count and pool.exact:
            w.found(LAUNCH, f"setmaxnreg.dec to {count}, but the warp holds {held} registers a thread")
        pool.held[w.index] = count
        pool.queue.wake()
        return None
    if held > count and pool.exact:
        w.found(LAUNCH, f"setmaxnreg.inc to {count}, but the warp holds {held} registers a thread")
    free = pool.total - sum(pool.held.values())
    if count - held > free:
        return w.block(
            pool.queue,
            lambda: (
                f"setmaxnreg.inc to {count}: {count - held} more registers a thread wanted, "
                f"{pool.total - sum(pool.held.values())} are free in the CTA's pool of {pool.total} (warps: {pool.held})"
            ),
        )
    pool.held[w.index] = count
    return None


# ---------------------------------------------------------------------------------------------------------------------
# clusterlaunchcontrol

_RESPONSE_BYTES = 16
_CANCELLED = 1 << 63


@decoder("clusterlaunchcontrol.try_cancel")
def try_cancel(ins: Instruction) -> Effect:
    """clusterlaunchcontrol.try_cancel.async{.shared::cta}.mbarrier::complete_tx::bytes{.multicast...}.b128 [addr], [mbar]."""
    r = Reader(ins, 2)
    r.one_of("async")
    space = r.one_of("shared::cta", default="generic")
    r.one_of("mbarrier::complete_tx::bytes")
    multicast = r.take("multicast::cluster::all")
    r.one_of("b128")
    r.end(2)
    width = 32 if space == "shared::cta" else 64

    def run(w: "Warp", mask: int, address: Value, mbar: Value) -> None:
        for i in lanes_of(mask):
            _try_cancel(w, lane(address, i), lane(mbar, i), space, multicast)

    return Effect(run, (), (Source(ins.operands[0], width), Source(ins.operands[1], width)))


def _try_cancel(w: "Warp", address: int, mbar: int, space: str, multicast: bool) -> None:
    where, signal = shared_address(w, address, space), shared_address(w, mbar, space)
    if where is None or signal is None:
        return
    if where & 15:
        w.found(MISALIGNED, f"response address {where:#x} is not a multiple of 16", fatal=True)
        return
    if w.cta.state.get("cancel_failed"):
        w.found(BARRIER_MISUSE, "clusterlaunchcontrol.try_cancel after a request of this CTA was seen to fail")
    offset, signal_offset = where & 0xFFFFFF, signal & 0xFFFFFF
    ctas = w.cluster.ctas if multicast else [w.cta]
    if any(cta.exited for cta in ctas):
        w.found(SHARED_IN_USE, "multicast clusterlaunchcontrol.try_cancel in a cluster of which a CTA has exited")
        return
    barriers = [find(w, cta.rank << 24 | signal_offset, asynchronous=True) for cta in ctas]
    # Which request gets which cluster is decided here, not when the response arrives: either is a legal order.
    origin = w.machine.cancel_cluster()
    low = 0 if origin is None else origin[0] | origin[1] << 32
    high = 0 if origin is None else origin[2] | _CANCELLED
    response = np.array([low, high], np.uint64).view(np.uint8)
    issue = w.issue("tma")
    machine = w.machine
    machine.counters["clusters_cancelled"] += origin is not None
    from ptxsim.machine import AsyncOp

    for cta, bar in zip(ctas, barriers, strict=True):
        if bar is None:
            continue
        cta.smem.begin_async_write(issue, offset, _RESPONSE_BYTES)

        def complete(cta: "CTA" = cta, bar: Any = bar) -> None:
            cta.smem.data[offset : offset + _RESPONSE_BYTES] = response
            cta.smem.end_async_write(issue, offset, _RESPONSE_BYTES)
            bar.complete_tx(machine.found, _RESPONSE_BYTES, issue.clock)

        machine.engine.submit(AsyncOp("load", None, complete, "clusterlaunchcontrol.try_cancel", issue))


@decoder("clusterlaunchcontrol.query_cancel")
def query_cancel(ins: Instruction) -> Effect:
    """clusterlaunchcontrol.query_cancel.{is_canceled.pred,get_first_ctaid{::dim}.b32|.v4.b32}.b128 d, response."""
    r = Reader(ins, 2)
    what = r.one_of("is_canceled", "get_first_ctaid", "get_first_ctaid::x", "get_first_ctaid::y", "get_first_ctaid::z")
    vector = r.take("v4")
    r.one_of("pred" if what == "is_canceled" else "b32")
    r.one_of("b128")
    r.end(2)
    if vector != (what == "get_first_ctaid") or vector != isinstance(ins.operands[0], Vector):
        raise Unsupported(f"{r.where}: .v4 goes with get_first_ctaid and a vector of four")

    def run(w: "Warp", mask: int, response: tuple[Value, Value]) -> Any:
        low, high = response
        cancelled = _each(high, lambda v: v >> 63)
        if what == "is_canceled":
            if cancelled.__class__ is int:
                if not cancelled:
                    w.cta.state["cancel_failed"] = True
                return mask if cancelled else 0
            return sum(1 << i for i in lanes_of(mask) if cancelled[i])
        parts = {
            "x": _each(low, lambda v: v & M32),
            "y": _each(low, lambda v: v >> 32),
            "z": _each(high, lambda v: v & M32),
        }
        return [parts["x"], parts["y"], parts["z"], 0] if vector else parts[what[-1]]

    return Effect(run, (ins.operands[0],), (Source(ins.operands[1], 128),))


def _each(value: Value, function: Any) -> Any:
    if value.__class__ is int:
        return function(value)
    return np.array([function(int(v)) for v in value], np.uint32)
