"""tcgen05 instructions except the matrix multiply: allocation, ld/st, cp, commit, waits, fences.

Tensor-core operations (cp, mma, commit) go through one in-order queue of the issuing CTA. Shared memory is checked when the
operation is issued, as its operands must be ready then, and read when it executes: an overwrite that comes too early does
corrupt the result. With `.cta_group::2` the operation acts on both CTAs of the pair: each reads its own shared memory at the
same offset and writes its own tensor memory. alloc and dealloc of a pair wait for the peer, which hardware may do.

Refused (Unsupported): tcgen05.shift, ld.red, cp with decompression, mma.ws, mma.sp.

Sources: PTX ISA 9.x, "TensorCore 5th Generation"; register layouts of ld/st and lane layouts of cp: NVIDIA CUTLASS,
include/cute/atom/copy_traits_sm100.hpp. Not pinned by silicon: most 16-lane ld/st shapes, the upper half of words written by
.unpack::16b (0 here), cp 4x256b and 64x128b.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim import barriers, tcgen05_mma
from ptxsim.descriptors import k_major_chunks
from ptxsim.findings import BARRIER_MISUSE, TMEM_MISUSE, Unsupported
from ptxsim.ptx import Address, Imm, Instruction, Vector
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.tcgen05_mma import gather, group_of, participants, tensor_queue
from ptxsim.tmem import ALL_BANDS, BAND, COLUMNS, QUARTER, UNDER_WAY
from ptxsim.values import Value, lane, lanes32, lanes_of, uniform

if TYPE_CHECKING:
    from ptxsim.machine import Warp

__all__ = ["tcgen05_mma"]
I64 = npt.NDArray[np.int64]

# ---------------------------------------------------------------------------------------------------------------------
# Allocation


def _address_space(r: Reader) -> str:
    return r.one_of("shared::cta", "shared", default="generic")


def _one(w: "Warp", value: Value, mask: int, what: str) -> int:
    found = uniform(value, mask)
    if found is None:
        w.found(TMEM_MISUSE, f"{what} differs between the lanes of the warp", fatal=True)
        return 0
    return found


def _meeting(w: "Warp", kind: str) -> str:
    return f"tcgen05.{kind} of pair {w.cta.rank >> 1}"


def _rendezvous(w: "Warp", kind: str) -> Any:
    """Both CTAs of a pair perform the n-th alloc (dealloc) together; None when the peer is here, else BLOCK."""
    from ptxsim.machine import WaitQueue

    side = w.cta.rank & 1
    key = _meeting(w, kind)
    state = w.cluster.state.get(key)
    if state is None:
        state = w.cluster.state[key] = ([0, 0], WaitQueue(w.machine))
    counts, queue = state
    number = w.path.state.get(key)
    if number is None:
        counts[side] += 1
        number = w.path.state[key] = counts[side]
        queue.wake()
    if counts[1 - side] < number:
        return w.block(queue, f"tcgen05.{kind} with cta_group::2 waits for the same in CTA rank {w.cta.rank ^ 1}")
    return None


def _columns(w: "Warp", value: Value, mask: int) -> int:
    columns = _one(w, value, mask, "the number of columns")
    if columns not in (32, 64, 128, 256, 512):
        w.found(TMEM_MISUSE, f"{columns} columns; expected a power of two from 32 to 512", fatal=True)
    return columns


@decoder("tcgen05.alloc")
def alloc(ins: Instruction) -> Effect:
    """tcgen05.alloc.cta_group::{1,2}.sync.aligned{.shared::cta}.b32 [dst], nCols."""
    r = Reader(ins, 2)
    pair = group_of(r)
    r.one_of("sync")
    r.one_of("aligned")
    space = _address_space(r)
    r.one_of("b32")
    r.end(2)

    def run(w: "Warp", mask: int, address: Value, count: Value) -> Any:
        columns = _columns(w, count, mask)
        where = barriers.shared_address(w, _one(w, address, mask, "the address of the result"), space)
        participants(w, pair)
        if pair and (blocked := _rendezvous(w, "alloc")) is not None:
            return blocked
        tmem = w.cta.tmem
        start = tmem.allocate(w.found, columns)
        if start is None:
            have = sum(tmem.allocations.values())
            return w.block(tmem.freed, f"tcgen05.alloc of {columns} columns: {have} of {COLUMNS} are allocated")
        w.path.state.pop(_meeting(w, "alloc"), None)
        assert where is not None
        value = np.frombuffer(start.to_bytes(4, "little"), np.uint8).reshape(1, 4)
        w.cta.smem.store(w, np.array([where & 0xFFFFFF], np.int64), 4, value)
        return None

    return Effect(run, (), (Source(ins.operands[0]), Source(ins.operands[1])), blocks=True, aligned=True)


@decoder("tcgen05.dealloc")
def dealloc(ins: Instruction) -> Effect:
    """tcgen05.dealloc.cta_group::{1,2}.sync.aligned.b32 taddr, nCols."""
    r = Reader(ins, 2)
    pair = group_of(r)
    r.one_of("sync")
    r.one_of("aligned")
    r.one_of("b32")
    r.end(2)

    def run(w: "Warp", mask: int, address: Value, count: Value) -> Any:
        columns = _columns(w, count, mask)
        start = _one(w, address, mask, "the tensor memory address")
        participants(w, pair, peer_may_exit=True)
        if pair:
            if (blocked := _rendezvous(w, "dealloc")) is not None:
                return blocked
            w.path.state.pop(_meeting(w, "dealloc"), None)
        w.cta.tmem.free(w.found, w.clock, start, columns)
        return None

    return Effect(run, (), (Source(ins.operands[0]), Source(ins.operands[1])), blocks=True, aligned=True)


@decoder("tcgen05.relinquish_alloc_permit")
def relinquish(ins: Instruction) -> Effect:
    """tcgen05.relinquish_alloc_permit.cta_group::{1,2}.sync.aligned."""
    r = Reader(ins, 2)
    pair = group_of(r)
    r.one_of("sync")
    r.one_of("aligned")
    r.end(0)

    def run(w: "Warp", mask: int) -> None:
        participants(w, pair, peer_may_exit=True)
        w.cta.tmem.permit = False

    return Effect(run, aligned=True)


# ---------------------------------------------------------------------------------------------------------------------
# ld and st


@dataclass(frozen=True)
class _Fragment:
    """How the registers of a warp map to tensor memory.

    Attributes:
        registers: number of them.
        lanes: 32, or 16 for the shapes that touch half a warp's lanes.
        spans: (first, number) of the columns covered, relative to the address.
        low: (registers, 32 threads) cell of each register's (low half), lane * COLUMNS + column, relative to the address.
        high: the cell of the upper half with 16-bit packing, else None.
    """

    registers: int
    lanes: int
    spans: tuple[tuple[int, int], ...]
    low: I64
    high: I64 | None


_PER_NUMBER = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}


@lru_cache(maxsize=256)
def fragment(shape: str, number: int, packed: bool, split: int) -> _Fragment:
    """The register layout of a tcgen05.ld/st shape.

    Args:
        shape: "32x32b", "16x64b", "16x128b", "16x256b" or "16x32bx2".
        number: N of .xN.
        packed: two 16-bit elements of neighbouring columns share a register.
        split: column distance of the two halves of 16x32bx2.
    """
    registers = number * _PER_NUMBER[shape]
    if registers > 128:
        raise Unsupported(f"tcgen05.ld/st {shape}.x{number}: that would be {registers} registers")
    j = np.arange(registers, dtype=np.int64)[:, None]
    t = np.arange(32, dtype=np.int64)[None, :]
    none = 0 * j * t
    far = none
    if shape == "32x32b":
        row, column = none + t, none + j
    elif shape == "16x64b":
        row, column = none + t % 2 * 8 + t // 4, t // 2 % 2 + 2 * j
    elif shape == "16x128b":
        row, column = t // 4 + 8 * (j % 2), t % 4 + 4 * (j // 2)
    elif shape == "16x256b":
        row, column = t // 4 + 8 * (j // 2 % 2), 2 * (t % 4) + j % 2 + 8 * (j // 4)
    else:
        row, column, far = none + t % 16, none + j, none + t // 16 * split
    width = 2 if packed else 1
    low = row * COLUMNS + column * width + far
    columns = int((column * width).max()) + width
    spans = ((0, columns), (split, columns)) if shape == "16x32bx2" else ((0, columns),)
    return _Fragment(registers, 32 if shape == "32x32b" else 16, spans, low, low + 1 if packed else None)


def _window(w: "Warp", part: _Fragment, value: Value, mask: int) -> tuple[int, int]:
    """First lane and column of an access, which must lie in the warp's quarter and in allocated columns."""
    address = _one(w, value, mask, "the tensor memory address")
    row, column = address >> 16, address & 0xFFFF
    base = w.index % 4 * QUARTER
    # Lane 0 to 31 means the warp's own quarter for every warp: FlashInfer's low-latency GEMM stores scale factors that way.
    if row < QUARTER:
        row += base
    if row not in ((base,) if part.lanes == 32 else (base, base + 16)):
        where = f"lanes {base} to {base + 31} only; the address {address:#x} starts at lane {address >> 16}"
        w.found(TMEM_MISUSE, f"warp {w.index} may access {where}", fatal=True)
    for first, count in part.spans:
        w.cta.tmem.check_range(w.found, column + first, count, "access")
    return row, column


def _shape(r: Reader, pack: str) -> tuple[str, int, bool]:
    r.one_of("sync")
    r.one_of("aligned")
    shape = r.one_of(*_PER_NUMBER)
    number = int(r.one_of("x1", "x2", "x4", "x8", "x16", "x32", "x64", "x128")[1:])
    packed = r.take(f"{pack}::16b")
    r.one_of("b32")
    return shape, number, packed


def _split_of(ins: Instruction, shape: str, index: int, expected: int) -> int:
    """The immHalfSplitoff operand of 16x32bx2, in columns."""
    count = expected + (shape == "16x32bx2")
    where = f"PTX line {ins.line}: {ins.text}"
    if len(ins.operands) != count:
        raise Unsupported(f"{where}: {len(ins.operands)} operands found, {count} expected")
    if shape != "16x32bx2":
        return 0
    operand = ins.operands[index]
    if not isinstance(operand, Imm) or not 0 <= operand.integer() < COLUMNS:
        raise Unsupported(f"{where}: immHalfSplitoff must be a literal number of columns")
    return operand.integer()


@decoder("tcgen05.ld")
def load(ins: Instruction) -> Effect:
    """tcgen05.ld.sync.aligned.SHAPE.xN{.pack::16b}.b32 r, [taddr]{, immHalfSplitoff}."""
    r = Reader(ins, 2)
    shape, number, packed = _shape(r, "pack")
    r.end()
    part = fragment(shape, number, packed, _split_of(ins, shape, 2, 2))
    target, address = ins.operands[0], ins.operands[1]
    single = not isinstance(target, Vector)
    if (1 if single else len(target.items)) != part.registers:  # type: ignore[union-attr]
        raise Unsupported(f"{r.where}: {part.registers} registers expected")
    if not isinstance(address, Address):
        raise Unsupported(f"{r.where}: the second operand must be an address")
    straight = shape == "32x32b" and not packed

    def run(w: "Warp", mask: int, value: Value) -> Any:
        row, column = _window(w, part, value, mask)
        tmem = w.cta.tmem
        bands = slice(row // BAND, (row + part.lanes) // BAND)
        lanes = slice(row, row + part.lanes)
        for first, count in part.spans:
            tmem.check_read(w.found, w.clock, bands, column + first, count, "read")
            tmem.check_valid(w.found, lanes, column + first, count, "read")
            tmem.note_read(w.thread, w.clock.item(w.thread), bands, column + first, count)
        if straight:
            block = np.ascontiguousarray(tmem.data[lanes, column : column + part.registers].T)
        else:
            cells = part.low + (row * COLUMNS + column)
            block = tmem.data.reshape(-1).take(cells)
            if part.high is not None:
                upper = tmem.data.reshape(-1).take(cells + 1)
                block = (block & np.uint32(0xFFFF)) | (upper << np.uint32(16))
        return block[0] if single else list(block)

    return Effect(run, (target,), (Source(address),), aligned=True)


@decoder("tcgen05.st")
def store(ins: Instruction) -> Effect:
    """tcgen05.st.sync.aligned.SHAPE.xN{.unpack::16b}.b32 [taddr]{, immHalfSplitoff}, r."""
    r = Reader(ins, 2)
    shape, number, packed = _shape(r, "unpack")
    r.end()
    part = fragment(shape, number, packed, _split_of(ins, shape, 1, 2))
    address, source = ins.operands[0], ins.operands[-1]
    single = not isinstance(source, Vector)
    if (1 if single else len(source.items)) != part.registers:  # type: ignore[union-attr]
        raise Unsupported(f"{r.where}: {part.registers} registers expected")
    if not isinstance(address, Address):
        raise Unsupported(f"{r.where}: the first operand must be an address")

    def run(w: "Warp", mask: int, value: Value, registers: Any) -> None:
        row, column = _window(w, part, value, mask)
        tmem = w.cta.tmem
        bands = slice(row // BAND, (row + part.lanes) // BAND)
        for first, count in part.spans:
            tmem.check_write(w.found, w.clock, w.thread, bands, column + first, count, "write")
        block = np.stack([lanes32(item) for item in ([registers] if single else registers)])
        cells = part.low + (row * COLUMNS + column)
        data, valid = tmem.data.reshape(-1), tmem.valid.reshape(-1)
        if part.high is None:
            data[cells] = block
        else:
            data[cells] = block & np.uint32(0xFFFF)
            data[cells + 1] = block >> np.uint32(16)
            valid[cells + 1] = True
        valid[cells] = True
        for first, count in part.spans:
            tmem.note_write(w.thread, UNDER_WAY, bands, column + first, count)
            w.state.setdefault("tcgen05_st", []).append((bands, column + first, count))

    return Effect(run, (), (Source(address), Source(source)), aligned=True)


@decoder("tcgen05.wait::ld", "tcgen05.wait::st")
def wait(ins: Instruction) -> Effect:
    """tcgen05.wait::{ld,st}.sync.aligned."""
    r = Reader(ins, 2)
    r.one_of("sync")
    r.one_of("aligned")
    r.end(0)
    stores = ins.parts[1] == "wait::st"

    def run(w: "Warp", mask: int) -> None:
        if stores:
            for bands, column, columns in w.state.pop("tcgen05_st", ()):
                w.cta.tmem.settle_stores(w.thread, w.clock.item(w.thread), bands, column, columns)

    return Effect(run, aligned=True)


@decoder("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def fence(ins: Instruction) -> Effect:
    """tcgen05.fence::{before,after}_thread_sync: see ptxsim.tmem for why they have no effect here."""
    Reader(ins, 2).end(0)

    def run(w: "Warp", mask: int) -> None:
        return None

    return Effect(run)


# ---------------------------------------------------------------------------------------------------------------------
# cp and commit


@dataclass(frozen=True)
class _Copy:
    """A tcgen05.cp shape: `rows` of `chunks` 16-byte chunks; lane i of tensor memory takes row `source[i]`."""

    rows: int
    chunks: int
    source: I64
    every_lane: bool = True


_ALL = np.arange(128, dtype=np.int64)
_COPIES = {
    ("128x256b", ""): _Copy(128, 2, _ALL),
    ("128x128b", ""): _Copy(128, 1, _ALL),
    ("4x256b", ""): _Copy(4, 2, np.arange(4, dtype=np.int64), every_lane=False),
    ("32x128b", "warpx4"): _Copy(32, 1, _ALL % 32),
    ("64x128b", "warpx2::02_13"): _Copy(64, 1, _ALL % 64),
    ("64x128b", "warpx2::01_23"): _Copy(64, 1, _ALL // 64 * 32 + _ALL % 32),
}


@decoder("tcgen05.cp")
def copy(ins: Instruction) -> Effect:
    """tcgen05.cp.cta_group::{1,2}.SHAPE{.multicast} [taddr], s-desc."""
    r = Reader(ins, 2)
    pair = group_of(r)
    shape = r.pop()
    multicast = r.one_of("warpx4", "warpx2::02_13", "warpx2::01_23", default="")
    r.end(2)
    if (shape, multicast) not in _COPIES:
        raise Unsupported(f"{r.where}: tcgen05.cp {shape} {multicast or 'without multicast'} does not exist")
    form = _COPIES[shape, multicast]

    def run(w: "Warp", mask: int, address: Value, desc: Value) -> None:
        for i in lanes_of(mask):
            _issue_copy(w, pair, form, lane(address, i), lane(desc, i))

    return Effect(run, (), (Source(ins.operands[0]), Source(ins.operands[1], 64)))


def _issue_copy(w: "Warp", pair: bool, form: _Copy, address: int, desc: int) -> None:
    from ptxsim.machine import AsyncOp

    ctas = participants(w, pair)
    row, column = address >> 16, address & 0xFFFF
    if row > (31 if not form.every_lane else 0):
        w.found(TMEM_MISUSE, f"address {address:#x} starts at lane {row}, expected lane 0", fatal=True)
    chunks = k_major_chunks(desc, "sm100", form.rows, form.chunks).reshape(-1)
    columns = 4 * form.chunks
    lanes: slice | I64 = slice(0, 128) if form.every_lane else row + np.arange(0, 128, 32)
    issue = w.issue("tensor")
    for cta in ctas:
        cta.smem.check_async_read_chunks(issue, chunks)
        cta.tmem.check_range(w.found, column, columns, "destination")
        cta.tmem.check_write(w.found, issue.clock, issue.thread, ALL_BANDS, column, columns, "destination")
        cta.tmem.note_write(issue.thread, issue.tick, ALL_BANDS, column, columns)

    def execute() -> None:
        for cta in ctas:
            cta.smem.recheck_async_read_chunks(issue, chunks)
            words = gather(cta.smem, chunks).view(np.uint32).reshape(form.rows, columns)
            cta.tmem.data[lanes, column : column + columns] = words[form.source]
            cta.tmem.valid[lanes, column : column + columns] = True

    w.machine.engine.submit(AsyncOp("tensor", tensor_queue(w.cta), execute, f"copy to column {column}", issue))


@decoder("tcgen05.commit")
def commit(ins: Instruction) -> Effect:
    """tcgen05.commit.cta_group::{1,2}.mbarrier::arrive::one{.shared::cluster}{.multicast::cluster}.b64 [mbar]{, mask}."""
    r = Reader(ins, 2)
    pair = group_of(r)
    r.one_of("mbarrier::arrive::one")
    space = r.one_of("shared::cluster", default="generic")
    multicast = r.take("multicast::cluster")
    r.one_of("b64")
    r.end(2 if multicast else 1)

    def run(w: "Warp", mask: int, address: Value, targets: Value = 0) -> None:
        for i in lanes_of(mask):
            _issue_commit(w, pair, space, lane(address, i), lane(targets, i) if multicast else None)

    width = 64 if space == "generic" else 32
    sources = [Source(ins.operands[0], width), *(Source(operand, 16) for operand in ins.operands[1:])]
    return Effect(run, (), tuple(sources))


def _issue_commit(w: "Warp", pair: bool, space: str, value: int, targets: int | None) -> None:
    from ptxsim.machine import AsyncOp

    participants(w, pair)
    address = barriers.shared_address(w, value, space)
    assert address is not None
    if targets is None:
        places = [address]
    else:
        if targets >> w.cluster.size or not targets:
            w.found(BARRIER_MISUSE, f"multicast mask {targets:#x} for a cluster of {w.cluster.size} CTAs", fatal=True)
        places = [rank << 24 | address & 0xFFFFFF for rank in lanes_of(targets)]
    bars = [bar for bar in (barriers.find(w, place, asynchronous=True) for place in places) if bar is not None]
    issue = w.issue("tensor")

    def execute() -> None:
        for bar in bars:
            bar.arrive(w.machine.found, issue.clock, asynchronous=True)

    what = "commit to " + ", ".join(f"{place:#x}" for place in places)
    w.machine.engine.submit(AsyncOp("tensor", tensor_queue(w.cta), execute, what, issue))
