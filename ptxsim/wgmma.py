"""wgmma (sm_90a): asynchronous matrix multiplication by a warpgroup, accumulators in registers.

The model: a warpgroup is four consecutive warps, and each computes its own 16 of the 64 rows when it executes the
instruction. Results are in the registers at once; reading them before wgmma.wait_group is undefined on hardware and *not*
found here, as registers carry no state. What is found is the other half of that contract: operands in shared memory count as
read until the warp executes the wait_group that covers them, so handing a stage back to its producer before that is a race.
For the vector clocks such a read is an event in the warp's own future: its stamp lies _LEAP above the warp's clock, which
wait_group moves up to it. The first wgmma.mma_async of a warp without a wgmma.fence before it is found too; later missing
fences are not.

Refused: .sp, .b1.

Sources: PTX ISA 9.x, "wgmma.mma_async" (operand fragments: "Register Fragments"), "Matrix Descriptor Format". Accumulation
order and rounding are unspecified by the ISA; here float32 sums of exact products.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.findings import DIVERGENCE, RACE, UNINITIALISED_READ, Unsupported
from ptxsim.mma_formats import FORMATS
from ptxsim.ptx import Imm, Instruction, Operand, Vector
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.tcgen05_mma import tile
from ptxsim.values import Value, lanes32, uniform

if TYPE_CHECKING:
    from ptxsim.machine import Issue, Warp

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]
_K = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}
_RESULTS = {"f16": ("f16", "f32"), "bf16": ("f32",), "tf32": ("f32",), "e4m3": ("f16", "f32"), "e5m2": ("f16", "f32")}
_INTEGERS = ("s8", "u8")
# More than a warp publishes its clock between issuing a group and waiting for it, and few enough for 32-bit clocks.
_LEAP = 1 << 12
_INTEGER_N = frozenset((8, 16, 24, 32, *range(48, 225, 16), 240, 256))


@dataclass(frozen=True)
class _Form:
    """Shape, types and immediate operands of an instruction."""

    n: int
    k: int
    d: str
    a: str
    b: str
    saturate: bool
    a_in_registers: bool
    negative: bool
    a_mn_major: bool
    b_mn_major: bool

    @property
    def registers(self) -> int:
        """Accumulator registers of a thread."""
        return self.n // 4 if self.d == "f16" else self.n // 2


def _types(r: Reader) -> tuple[int, int, str, str, str, bool]:
    match = re.fullmatch(r"m64n(\d+)k(\d+)", r.pop())
    if not match:
        raise Unsupported(f"{r.where}: the shape is not understood")
    n, k = int(match[1]), int(match[2])
    # PTX writes .satfinite behind the shape, its examples behind the types: both are taken.
    saturate = r.take("satfinite")
    d, a, b = r.pop(), r.pop(), r.pop()
    saturate = r.take("satfinite") or saturate
    integer = a in _INTEGERS
    if a not in _K or b not in _K or k != _K[a] or d not in (("s32",) if integer else _RESULTS[a]):
        raise Unsupported(f"{r.where}: types {d}.{a}.{b} with k{k} are not known")
    if (a != b and not (_K[a] == _K[b] == 32 and integer == (b in _INTEGERS))) or (saturate and not integer):
        raise Unsupported(f"{r.where}: types {d}.{a}.{b} do not go together")
    if n not in (_INTEGER_N if integer else range(8, 257, 8)):
        raise Unsupported(f"{r.where}: no shape with N = {n}")
    return n, k, d, a, b, saturate


def _literal(operand: Operand, allowed: tuple[int, ...], r: Reader) -> int:
    if not isinstance(operand, Imm) or operand.integer() not in allowed:
        raise Unsupported(f"{r.where}: expected one of {allowed} as a literal")
    return operand.integer()


@decoder("wgmma.mma_async.sync.aligned")
def mma_async(ins: Instruction) -> Effect:
    """wgmma.mma_async.sync.aligned.SHAPE.D.A.B d, a, b-desc, scale-d{, imm-scale-a, imm-scale-b{, imm-trans...}}."""
    r = Reader(ins, 4)
    n, k, d, a, b, saturate = _types(r)
    r.end()
    operands = ins.operands
    in_registers = isinstance(operands[1], Vector)
    trailing = list(operands[4:])
    negative = False
    if a not in _INTEGERS:
        if len(trailing) < 2:
            raise Unsupported(f"{r.where}: imm-scale-a and imm-scale-b are missing")
        negative = _literal(trailing.pop(0), (1, -1), r) != _literal(trailing.pop(0), (1, -1), r)
    a_major = b_major = False
    if FORMATS[a].bits == 16:
        if not in_registers and trailing:
            a_major = bool(_literal(trailing.pop(0), (0, 1), r))
        b_major = bool(trailing and _literal(trailing.pop(0), (0, 1), r))
    if trailing:
        raise Unsupported(f"{r.where}: {len(trailing)} operands too many")
    form = _Form(n, k, d, a, b, saturate, in_registers, negative, a_major, b_major)
    accumulators = operands[0]
    if not isinstance(accumulators, Vector) or len(accumulators.items) != form.registers:
        raise Unsupported(f"{r.where}: {form.registers} accumulator registers expected")

    def run(w: "Warp", mask: int, old: list[Value], a_value: Any, b_desc: Value, scale: int) -> Any:
        return _multiply(w, mask, form, old, a_value, b_desc, scale)

    sources = (
        Source(accumulators),
        Source(operands[1], 32 if in_registers else 64),
        Source(operands[2], 64),
        Source(operands[3], 1),
    )
    return Effect(run, (accumulators,), sources, aligned=True)


def _multiply(w: "Warp", mask: int, form: _Form, old: list[Value], a_value: Any, b_desc: Value, scale: int) -> Any:
    group = w.index // 4
    if 4 * group + 3 >= len(w.cta.warps):
        w.found(
            DIVERGENCE, f"warp {w.index} is in no complete warpgroup: the CTA has {len(w.cta.warps)} warps", fatal=True
        )
    if not w.state.get("wgmma_fence"):
        w.found(
            RACE, "wgmma.mma_async, but this warp has executed no wgmma.fence: its registers are not ordered before it"
        )
        w.state["wgmma_fence"] = True
    if scale & mask not in (0, mask):
        w.found(DIVERGENCE, "scale-d differs between the lanes of the warp", fatal=True)
    issue = _issue(w)
    b_tile = tile(_desc(w, b_desc, mask, "B"), form.n, form.k, form.b, form.b_mn_major, "sm90")
    w.cta.smem.check_async_read_chunks(issue, b_tile.chunks)
    if form.a_in_registers:
        a = _a_fragment(form, a_value)
    else:
        # All 64 rows: which chunks hold which rows depends on the layout, and this keeps the check the same for all warps.
        a_tile = tile(_desc(w, a_value, mask, "A"), 64, form.k, form.a, form.a_mn_major, "sm90")
        w.cta.smem.check_async_read_chunks(issue, a_tile.chunks)
        first = w.index % 4 * 16
        a = a_tile.fetch(w.cta.smem)[first : first + 16]
    w.machine.counters["mma_flops"] += 2 * 16 * form.n * form.k
    with np.errstate(all="ignore"):
        product = a @ b_tile.fetch(w.cta.smem).T
        if form.negative:
            product = -product
        return _accumulated(w, form, product, old if scale & mask else None)


def _issue(w: "Warp") -> "Issue":
    """A ticket of this warp whose reads are over when it has waited for the open group."""
    from ptxsim.machine import Issue

    tick = w.state.get("wgmma_open")
    if tick is None:
        tick = max(w.clock.item(w.thread), w.state.get("wgmma_newest", 0)) + _LEAP
        w.state["wgmma_open"] = w.state["wgmma_newest"] = tick
    return Issue(w, w.instruction, w.thread, tick, w.clock)


def _desc(w: "Warp", value: Value, mask: int, which: str) -> int:
    desc = uniform(value, mask)
    if desc is None:
        w.found(DIVERGENCE, f"the matrix descriptor of {which} differs between the lanes of the warp", fatal=True)
        return 0
    return desc


def _a_fragment(form: _Form, registers: list[Value]) -> F32:
    """A's 16 rows from four registers a thread: rows t//4 and +8, 4 bytes at 4*(t%4) of each 16-byte half of K."""
    words = np.stack([lanes32(value) for value in registers])
    # (half of K, row + 8, thread row, thread column) -> (16 rows, 32 bytes)
    rows = words.reshape(2, 2, 8, 4).transpose(1, 2, 0, 3)
    raw = np.ascontiguousarray(rows).reshape(16, 8).view(np.uint8)
    return FORMATS[form.a].decode(raw)


def _stacked(w: "Warp", registers: Sequence[Value | None]) -> U32:
    if any(value is None for value in registers):
        w.found(UNINITIALISED_READ, "an accumulator register that was never written, with scale-d true")
        registers = [0 if value is None else value for value in registers]
    return np.stack([lanes32(value) for value in registers])


def _accumulated(w: "Warp", form: _Form, product: F32, old: list[Value] | None) -> list[U32]:
    """Adds the accumulators to the (16, N) product and hands it out as registers.

    Thread t has rows t//4 and t//4 + 8, columns 8*j + 2*(t%4) and the next; register order (j, row, column).
    """
    n8 = form.n // 8
    shaped = product.reshape(2, 8, n8, 4, 2).transpose(2, 0, 4, 1, 3)
    if form.d == "f32":
        result = np.ascontiguousarray(shaped).reshape(-1, 32)
        if old is not None:
            result += _stacked(w, old).view(np.float32)
        return list(result.view(np.uint32))
    if form.d == "s32":
        total = shaped.reshape(-1, 32).astype(np.int64)
        if old is not None:
            total += _stacked(w, old).view(np.int32)
        if form.saturate:
            total = total.clip(-(1 << 31), (1 << 31) - 1)
        return list(total.astype(np.uint32))
    # Half results: the two columns share a register.
    pairs = shaped.transpose(0, 1, 3, 4, 2)
    if old is not None:
        pairs = pairs + np.ascontiguousarray(_stacked(w, old)).view(np.float16).reshape(n8, 2, 8, 4, 2).astype(
            np.float32
        )
    return list(np.ascontiguousarray(pairs.astype(np.float16)).view(np.uint32).reshape(-1, 32))


@decoder("wgmma.fence")
def fence(ins: Instruction) -> Effect:
    """wgmma.fence.sync.aligned."""
    _plain(ins, 0)

    def run(w: "Warp", mask: int) -> None:
        w.state["wgmma_fence"] = True

    return Effect(run, aligned=True)


def _plain(ins: Instruction, operands: int) -> Reader:
    r = Reader(ins, 2)
    r.one_of("sync")
    r.one_of("aligned")
    r.end(operands)
    return r


@decoder("wgmma.commit_group")
def commit_group(ins: Instruction) -> Effect:
    """wgmma.commit_group.sync.aligned."""
    _plain(ins, 0)

    def run(w: "Warp", mask: int) -> None:
        # An empty group counts too: it takes a place in the order.
        w.state.setdefault("wgmma_groups", []).append(w.state.pop("wgmma_open", None))

    return Effect(run, aligned=True)


@decoder("wgmma.wait_group")
def wait_group(ins: Instruction) -> Effect:
    """wgmma.wait_group.sync.aligned N: all but the N newest groups are complete."""
    r = _plain(ins, 1)
    newest = _literal(ins.operands[0], tuple(range(8)), r)

    def run(w: "Warp", mask: int) -> None:
        groups = w.state.get("wgmma_groups", [])
        done = max(0, len(groups) - newest)
        for tick in groups[:done]:
            if tick is not None and w.clock[w.thread] < tick:
                w.clock[w.thread] = tick
        del groups[:done]

    return Effect(run, aligned=True)
