"""Instructions in which the lanes of a warp exchange values: shfl, vote, match, redux, elect, activemask.

A warp's lanes that run apart here would wait for each other on hardware. They meet at the branch's join in this simulator, so
a `.sync` instruction reached by only a part of its member mask is reported as divergence.

Source: PTX ISA, sections "shfl.sync", "vote.sync", "match.sync", "redux.sync", "elect.sync", "activemask". Not pinned by
silicon: which lane `elect.sync` picks (the lowest one here and in practice).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim import floats
from ptxsim.findings import DIVERGENCE, Unsupported
from ptxsim.ptx import Instruction, Operand, Pair, Sink
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.templates import literal, register, sources
from ptxsim.values import (
    FULL,
    LANE_IDS,
    M32,
    Value,
    bools,
    compress,
    first_lane,
    lane,
    lanes32,
    lanes_of,
    mask_of,
    merge,
)

if TYPE_CHECKING:
    from ptxsim.machine import Warp

Lanes = npt.NDArray[np.int64]
_LANE = LANE_IDS.astype(np.int64)


def _wrong_members(w: "Warp", mask: int, members: int, lanes: int) -> None:
    """Reports a member mask that does not fit the lanes that execute."""
    if absent := members & w.active & ~mask:
        text = (
            f"member mask {members:#x} names lanes {sorted(lanes_of(absent))} of the warp that do not execute this now"
        )
        w.found(DIVERGENCE, f"{text} (executing: {mask:#x}): on hardware the others would wait for them", fatal=True)
    elif outside := lanes & ~members:
        w.found(
            DIVERGENCE, f"lanes {sorted(lanes_of(outside))} execute this but are not in the member mask {members:#x}"
        )


def _groups(w: "Warp", mask: int, members: Value) -> list[tuple[int, int]]:
    """(member mask, executing lanes with it) for each distinct member mask; checks each."""
    if members.__class__ is int:
        if members & w.active != mask:
            _wrong_members(w, mask, members, mask)
        return [(members, mask)]
    groups: dict[int, int] = {}
    for i in lanes_of(mask):
        own = lane(members, i)
        groups[own] = groups.get(own, 0) | 1 << i
    for own, lanes in groups.items():
        _wrong_members(w, mask, own, lanes)
    return list(groups.items())


def _results(ins: Instruction) -> tuple[Operand, ...]:
    """`d` or `d|p`, the pair as two destinations."""
    first = ins.operands[0]
    return (first.first, first.second) if isinstance(first, Pair) else (register(ins),)


# -------------------------------------------------------------------------------------------------------------------- shfl


def shuffle_sources(mode: str, b: Value, c: Value) -> tuple[Lanes, int]:
    """The lane that each lane reads, and the mask of lanes whose source lies within their segment.

    Source: PTX ISA, shfl.sync, "Semantics".
    """
    offset = lanes32(b).astype(np.int64) & 31
    clamp = lanes32(c).astype(np.int64)
    segment, limit = clamp >> 8 & 31, clamp & 31
    last = (_LANE & segment) | (limit & ~segment & 31)
    first = _LANE & segment
    if mode == "up":
        source = _LANE - offset
        inside = source >= last
    elif mode == "down":
        source = _LANE + offset
        inside = source <= last
    elif mode == "bfly":
        source = _LANE ^ offset
        inside = source <= last
    else:
        source = first | (offset & ~segment & 31)
        inside = source <= last
    return np.where(inside, source, _LANE), mask_of(inside)


@decoder("shfl")
def decode_shfl(ins: Instruction) -> Effect:
    """`shfl.sync`: each lane reads another lane's value."""
    r = Reader(ins)
    if not r.take("sync"):
        raise Unsupported(f"{r.where}: shfl without .sync does not exist for this target")
    mode = r.one_of("up", "down", "bfly", "idx")
    r.one_of("b32")
    r.end(5)
    dsts = _results(ins)
    want_predicate, want_value = len(dsts) == 2, not isinstance(dsts[0], Sink)
    offset, clamp = literal(ins.operands[2], 32), literal(ins.operands[3], 32)
    known = shuffle_sources(mode, offset, clamp) if offset is not None and clamp is not None else None

    def run(w: "Warp", mask: int, a: Value, b: Value, c: Value, members: Value) -> Any:
        if members.__class__ is not int or members & w.active != mask:
            _groups(w, mask, members)
        if known is None and a.__class__ is int and mask == FULL and not want_predicate:
            return a
        source, inside = known or shuffle_sources(mode, b, c)
        if mask != FULL and want_value:
            _check_sources(w, mask, source)
        value = a if a.__class__ is int else compress(a[source])
        return (value, inside) if want_predicate else value

    return Effect(run, dsts, sources(ins, 1, 32, 32, 32, 32))


def _check_sources(w: "Warp", mask: int, source: Lanes) -> None:
    """Reports lanes that read a lane which does not take part."""
    dead = bools(mask) & ~bools(mask)[source]
    if dead.any():
        reader = first_lane(mask_of(dead))
        text = f"lane {reader} reads lane {int(source[reader])}, which does not execute this (executing: {mask:#x})"
        w.found(DIVERGENCE, f"{text}: the value is undefined")


# --------------------------------------------------------------------------------------------------- vote, match, activemask


@decoder("vote")
def decode_vote(ins: Instruction) -> Effect:
    """`vote.sync`: all, any, uni, ballot."""
    r = Reader(ins)
    if not r.take("sync"):
        raise Unsupported(f"{r.where}: vote without .sync does not exist for this target")
    mode = r.one_of("all", "any", "uni", "ballot")
    r.one_of("b32" if mode == "ballot" else "pred")
    r.end(3)

    def one(flags: int, members: int) -> int:
        if mode == "ballot":
            return flags & members
        if mode == "any":
            return FULL if flags & members else 0
        if mode == "all":
            return FULL if flags & members == members else 0
        return FULL if flags & members in (0, members) else 0

    def run_ballot(w: "Warp", mask: int, flags: int, members: Value) -> Value:
        groups = _groups(w, mask, members)
        if len(groups) == 1:
            return one(flags, groups[0][0] & mask)
        result: Value = 0
        for own, lanes in groups:
            result = merge(result, one(flags, own & mask), lanes)
        return result

    def run_predicate(w: "Warp", mask: int, flags: int, members: Value) -> int:
        result = 0
        for own, lanes in _groups(w, mask, members):
            result |= one(flags, own & mask) & lanes
        return result

    return Effect(run_ballot if mode == "ballot" else run_predicate, (register(ins),), sources(ins, 1, 1, 32))


@decoder("match")
def decode_match(ins: Instruction) -> Effect:
    """`match.sync`: which lanes hold the same value."""
    r = Reader(ins)
    every = r.one_of("any", "all") == "all"
    if not r.take("sync"):
        raise Unsupported(f"{r.where}: match needs .sync")
    width = 64 if r.one_of("b32", "b64") == "b64" else 32
    r.end(3)
    dsts = _results(ins)
    if len(dsts) == 2 and not every:
        raise Unsupported(f"{r.where}: match.any has no predicate result")

    def run(w: "Warp", mask: int, a: Value, members: Value) -> Any:
        out, flags = np.zeros(32, np.uint32), 0
        for own, lanes in _groups(w, mask, members):
            taking = list(lanes_of(own & mask))
            by_value: dict[int, int] = {}
            for i in taking:
                by_value[lane(a, i)] = by_value.get(lane(a, i), 0) | 1 << i
            for i in lanes_of(lanes):
                same = by_value.get(lane(a, i), 0)
                if every:
                    same = same if len(by_value) == 1 else 0
                    flags |= (same != 0) << i
                out[i] = same
        result = compress(np.where(bools(mask), out, out[first_lane(mask)]))
        return (result, flags) if len(dsts) == 2 else result

    return Effect(run, dsts, sources(ins, 1, width, 32))


@decoder("activemask")
def decode_activemask(ins: Instruction) -> Effect:
    """`activemask`: the lanes that execute this together."""
    r = Reader(ins)
    r.one_of("b32")
    r.end(1)
    return Effect(lambda w, mask: mask, (register(ins),))


# ------------------------------------------------------------------------------------------------------------ redux, elect

_REDUCE: dict[str, Callable[[list[int]], int]] = {
    "add": sum,
    "min": min,
    "max": max,
    "and": lambda items: _fold(items, lambda x, y: x & y),
    "or": lambda items: _fold(items, lambda x, y: x | y),
    "xor": lambda items: _fold(items, lambda x, y: x ^ y),
}


def _fold(items: list[int], combine: Callable[[int, int], int]) -> int:
    total = items[0]
    for item in items[1:]:
        total = combine(total, item)
    return total


def _reduce_float(items: list[int], largest: bool, absolute: bool, nan: bool) -> int:
    bits = np.array(items, np.uint32)
    if absolute:
        bits = bits & np.uint32(0x7FFFFFFF)
    total = bits[:1]
    for i in range(1, len(bits)):
        total = floats.larger(total, bits[i : i + 1], floats.F32, largest, nan)
    is_nan = int(total[0]) & 0x7FFFFFFF > 0x7F800000
    return 0x7FFFFFFF if is_nan else int(total[0])


@decoder("redux")
def decode_redux(ins: Instruction) -> Effect:
    """`redux.sync`: a reduction over the member lanes."""
    r = Reader(ins)
    if not r.take("sync"):
        raise Unsupported(f"{r.where}: redux needs .sync")
    op = r.one_of(*_REDUCE)
    absolute, nan = r.take("abs"), r.take("NaN")
    legal = {"add": ("u32", "s32"), "min": ("u32", "s32", "f32"), "max": ("u32", "s32", "f32")}.get(op, ("b32",))
    kind = r.one_of(*legal)
    r.end(3)
    if (absolute or nan) and kind != "f32":
        raise Unsupported(f"{r.where}: .abs and .NaN are for .f32")

    def one(items: list[int]) -> int:
        if kind == "f32":
            return _reduce_float(items, op == "max", absolute, nan)
        if kind == "s32":
            items = [(item ^ 0x80000000) - 0x80000000 for item in items]
        return _REDUCE[op](items) & M32

    def run(w: "Warp", mask: int, a: Value, members: Value) -> Value:
        groups = _groups(w, mask, members)
        if len(groups) == 1:
            return one([lane(a, i) for i in lanes_of(groups[0][0] & mask or mask)])
        result: Value = 0
        for own, lanes in groups:
            result = merge(result, one([lane(a, i) for i in lanes_of(own & mask or lanes)]), lanes)
        return result

    return Effect(run, (register(ins),), sources(ins, 1, 32, 32))


@decoder("elect")
def decode_elect(ins: Instruction) -> Effect:
    """`elect.sync`: one leader among the member lanes."""
    r = Reader(ins)
    if not r.take("sync"):
        raise Unsupported(f"{r.where}: elect needs .sync")
    r.end(2)
    dsts = _results(ins)
    if len(dsts) != 2:
        raise Unsupported(f"{r.where}: elect writes d|p")

    def run(w: "Warp", mask: int, members: Value) -> tuple[Value, int]:
        if members.__class__ is int and members & w.active == mask:
            low = mask & -mask
            return low.bit_length() - 1, low
        leader: Value = 0
        chosen = 0
        for own, lanes in _groups(w, mask, members):
            first = first_lane(own & mask or lanes)
            leader = merge(leader, first, lanes)
            chosen |= 1 << first
        return leader, chosen

    return Effect(run, dsts, (Source(ins.operands[1], 32),))
