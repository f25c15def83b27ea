"""Loads, stores and what surrounds them: address conversion, fences, prefetches, cache policies. Atomics: atomic_ops.py.

A load or store of a warp is one call into the memory, with the lanes' addresses as an array; a uniform address takes a path
without arrays and gives ints. Cache modifiers and policies are checked for their spelling and change nothing.

Source: PTX ISA 9.x, "Data Movement and Conversion Instructions", "Parallel Synchronization and Communication Instructions".
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim import atomic_ops, barriers
from ptxsim.accesses import (
    CACHE,
    SCOPES,
    SEMANTICS,
    SHARED_SPACES,
    SIGNED,
    UNSIGNED,
    Bytes,
    after_strong_read,
    as_lanes,
    before_strong_write,
    check_aligned,
    check_count,
    check_semantics,
    lane_bytes,
    load_lanes,
    load_one,
    modifiers,
    pack,
    param_offset,
    single,
    space_of,
    store_lanes,
    store_one,
)
from ptxsim.findings import BAD_VALUE, MISALIGNED, OUT_OF_BOUNDS, RACE, Unsupported
from ptxsim.memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, note_fence
from ptxsim.ptx import Instruction, Operand, Reg, Sink, Vector
from ptxsim.registry import Effect, Pure, Reader, Source, decoder
from ptxsim.values import FULL, M32, M64, Value, bools, mask_of

if TYPE_CHECKING:
    from ptxsim.machine import Warp

# Importing it registers the decoders of atom and red.
__all__ = ["atomic_ops"]

_TYPES = (*(f"{letter}{bits}" for letter in "bus" for bits in (8, 16, 32, 64)), "b128", "f32", "f64")


# ld and st.


def _elements(ins: Instruction, operand: Operand, found: dict[str, str]) -> tuple[int, int, bool]:
    """(number of elements, bits of one, signed) of a load or store."""
    if "type" not in found:
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: no type")
    kind, count = found["type"], int(found.get("vector", "v1")[1:])
    bits = int(kind[1:])
    given = len(operand.items) if isinstance(operand, Vector) else 1
    if given != count or isinstance(operand, Vector) != (count > 1):
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: {given} registers for {count} elements")
    if count * bits > (256 if found.get("space", "global") == "global" else 128):
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: wider than any access")
    return count, bits, kind[0] == "s"


def _widths(ins: Instruction, operand: Operand, bits: int) -> list[int]:
    """Register widths of the destinations."""
    widths = []
    for item in operand.items if isinstance(operand, Vector) else (operand,):
        if not isinstance(item, Reg | Sink):
            raise Unsupported(f"PTX line {ins.line}: {ins.text}: a destination must be a register")
        widths.append(item.width if isinstance(item, Reg) else max(bits, 16))
        if widths[-1] < bits:
            raise Unsupported(f"PTX line {ins.line}: {ins.text}: a register of {widths[-1]} bits for {bits}")
    return widths


def _ints(raw: bytes, bits: int, signed: bool, widths: list[int]) -> list[Any]:
    """Elements of a uniform load."""
    if bits == 128:
        return [(int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"))]
    size = bits // 8
    if not signed:
        return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]
    return [
        int.from_bytes(raw[i * size : (i + 1) * size], "little", signed=True) & ((1 << width) - 1)
        for i, width in enumerate(widths)
    ]


def _arrays(rows: Bytes, bits: int, signed: bool, widths: list[int], chosen: npt.NDArray[np.bool_] | None) -> list[Any]:
    """Elements of a load of many addresses, as register values of 32 lanes."""
    if bits == 128:
        low, high = _arrays(rows, 64, False, [64, 64], chosen)
        return [(low, high)]
    columns = rows.view((SIGNED if signed else UNSIGNED)[bits]).T
    out = []
    for column, width in zip(columns, widths, strict=True):
        wide = column.astype(np.int64 if signed else np.uint64 if width == 64 else np.uint32)
        if signed:
            wide = (wide & ((1 << width) - 1 if width < 64 else -1)).astype(np.uint64 if width == 64 else np.uint32)
        if chosen is not None:
            full = np.zeros(32, wide.dtype)
            full[chosen] = wide
            wide = full
        out.append(wide)
    return out


def _ld_groups() -> dict[str, tuple[str, ...]]:
    return {
        "mmio": ("mmio",),
        "semantics": SEMANTICS,
        "scope": SCOPES,
        "space": ("const", "global", "local", "param", "param::entry", *SHARED_SPACES),
        "nc": ("nc",),
        "vector": ("v2", "v4", "v8"),
        "type": _TYPES,
        **CACHE,
    }


@decoder("ld", "ldu")
def ld(ins: Instruction) -> Effect:
    """ld and ldu: every space, width, vector, cache modifier and ordering."""
    found = modifiers(ins, 1, _ld_groups())
    strong = check_semantics(ins, found, ("weak", "volatile", "relaxed", "acquire"))
    check_count(ins, found, 2)
    target = ins.operands[0]
    count, bits, signed = _elements(ins, target, found)
    widths = _widths(ins, target, bits)
    size = count * bits // 8
    space = found.get("space", "generic").replace("param::entry", "param")
    acquire = found.get("semantics") == "acquire"
    coherent = "nc" not in found and ins.parts[0] == "ld"
    if not coherent and space not in ("global", "generic"):
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: non-coherent loads are from global memory")
    alone = count == 1

    def run(w: "Warp", mask: int, address: Value) -> Any:
        one = single(address, mask)
        raw = None
        if one is not None:
            if one & (size - 1):
                check_aligned(w, one, mask, size)
            raw = load_one(w, space, one, size, strong)
        if raw is not None:
            out = _ints(raw, bits, signed, widths)
        else:
            addresses, lanes = as_lanes(address, mask)
            if np.bitwise_or.reduce(addresses).item() & (size - 1):
                check_aligned(w, address, mask, size)
            rows = load_lanes(w, space, addresses, lanes, size, strong)
            out = _arrays(rows, bits, signed, widths, None if mask == FULL else bools(mask))
        if strong:
            after_strong_read(w, address, mask, acquire)
        elif not coherent:
            _check_coherent(w, address, mask, size)
        return out[0] if alone else out

    return Effect(run, (target,), (Source(ins.operands[1], 64),))


def _check_coherent(w: "Warp", address: Value, mask: int, size: int) -> None:
    """ld.global.nc may only read what no one writes while the kernel runs."""
    one = single(address, mask)
    addresses = as_lanes(address, mask)[0] if one is None else np.array([one], np.uint64)
    if w.machine.gmem.written_here(addresses, size):
        w.found(RACE, f"non-coherent load of memory that this kernel writes, at {int(addresses[0]):#x}")


@decoder("st")
def st(ins: Instruction) -> Effect:
    """st: every space, width, vector, cache modifier and ordering."""
    groups = _ld_groups() | {"space": ("global", "local", *SHARED_SPACES), "nc": ()}
    found = modifiers(ins, 1, groups)
    strong = check_semantics(ins, found, ("weak", "volatile", "relaxed", "release"))
    check_count(ins, found, 2)
    source = ins.operands[1]
    count, bits, _ = _elements(ins, source, found)
    size = count * bits // 8
    space = found.get("space", "generic")
    release = found.get("semantics") == "release"

    def run(w: "Warp", mask: int, address: Value, value: Any) -> None:
        values = value if value.__class__ is list else [value]
        if strong:
            before_strong_write(w, address, mask, release)
        one = single(address, mask)
        if one is not None:
            if one & (size - 1):
                check_aligned(w, one, mask, size)
            same = not mask & (mask - 1) or all(_uniform(v) for v in values)
            if same and store_one(w, space, one, lane_bytes(values, bits, mask.bit_length() - 1), strong):
                return
        addresses, lanes = as_lanes(address, mask)
        if np.bitwise_or.reduce(addresses).item() & (size - 1):
            check_aligned(w, address, mask, size)
        store_lanes(w, space, addresses, lanes, pack(values, bits, mask), strong)

    return Effect(run, (), (Source(ins.operands[0], 64), Source(source, bits)))


def _uniform(value: Any) -> bool:
    return value.__class__ is int or (value.__class__ is tuple and all(part.__class__ is int for part in value))


# Addresses.


@decoder("cvta")
def cvta(ins: Instruction) -> Pure:
    """cvta{.to}.space.u64: variables and parameters already evaluate to addresses of their window."""
    r = Reader(ins)
    back = r.take("to")
    space = r.one_of("global", "const", "local", "param", "param::entry", *SHARED_SPACES)
    r.one_of("u64")
    r.end(2)
    sources = (Source(ins.operands[1], 64),)
    window = {"local": LOCAL_WINDOW, "param": PARAM_WINDOW, "shared": SHARED_WINDOW}.get(space.split(":")[0], 0)
    if back:
        # Parameters and local variables keep their window: ld and st of those spaces accept it.
        keep = M32 if window == SHARED_WINDOW else M64
        return Pure(lambda a: a & keep, (ins.operands[0],), sources, f"{{d}} = {{0}} & {keep}")
    return Pure(lambda a: a | window, (ins.operands[0],), sources, f"{{d}} = {{0}} | {window}")


@decoder("mapa")
def mapa(ins: Instruction) -> Pure:
    """mapa{.shared::cluster}.type d, a, rank.

    A rank outside the cluster gives an address outside it, which is a finding when it is used: QuACK maps one rank a lane and
    uses only those that exist.
    """
    r = Reader(ins)
    shared = r.one_of("shared::cluster", default="generic") != "generic"
    width = int(r.one_of("u32", "u64")[1:])
    r.end(3)
    window = 0 if shared else SHARED_WINDOW

    def run(address: Value, rank: Value) -> Value:
        if isinstance(address, int) and isinstance(rank, int):
            return (address & 0xFFFFFF) | min(rank, 0xFF) << 24 | window
        addresses, _ = as_lanes(address, FULL)
        ranks = np.minimum(as_lanes(rank, FULL)[0], np.uint64(0xFF))
        wide = (addresses & np.uint64(0xFFFFFF)) | ranks << np.uint64(24) | np.uint64(window)
        return wide if width == 64 else wide.astype(np.uint32)

    return Pure(run, (ins.operands[0],), (Source(ins.operands[1], width), Source(ins.operands[2])))


@decoder("getctarank")
def getctarank(ins: Instruction) -> Pure:
    """getctarank{.shared::cluster}.type d, a."""
    r = Reader(ins)
    r.one_of("shared::cluster", default="generic")
    width = int(r.one_of("u32", "u64")[1:])
    r.end(2)

    def rank_of(address: Value) -> Value:
        if isinstance(address, int):
            return address >> 24 & 0xFF
        return (address.astype(np.uint64) >> np.uint64(24)).astype(np.uint32) & np.uint32(0xFF)

    return Pure(rank_of, (ins.operands[0],), (Source(ins.operands[1], width),))


@decoder("isspacep")
def isspacep(ins: Instruction) -> Effect:
    """isspacep.space p, a."""
    r = Reader(ins)
    space = r.one_of("global", "local", "param", "param::entry", *SHARED_SPACES).split("::entry")[0]
    r.end(2)

    def inside(w: "Warp", address: int) -> bool:
        found = space_of(address)
        if space in ("shared", "shared::cta"):
            return found == "shared::cluster" and (address & M32) >> 24 == w.cta.rank
        return found == space

    def run(w: "Warp", mask: int, address: Value) -> int:
        if isinstance(address, int):
            return FULL if inside(w, address) else 0
        return mask_of(np.array([inside(w, a) for a in address.tolist()]))

    return Effect(run, (ins.operands[0],), (Source(ins.operands[1], 64),))


# Fences.


def _order(sem: str) -> Callable[["Warp", int], None]:
    """A thread fence: relaxed accesses before and after it become acquiring and releasing."""

    def run(w: "Warp", mask: int) -> None:
        if sem != "release":
            seen = w.state.pop("unacquired clock", None)
            if seen is not None:
                w.acquire(seen)
        if sem != "acquire":
            w.state["fence clock"] = w.release()

    return run


def _fence_shared(w: "Warp", mask: int) -> None:
    w.cta.smem.fence_async(w)
    barriers.fence_async(w)


def _fence_cluster(w: "Warp", mask: int) -> None:
    note_fence(w, "shared")
    barriers.fence_async(w)


def _fence_global(w: "Warp", mask: int) -> None:
    note_fence(w, "global")


def _fence_all(w: "Warp", mask: int) -> None:
    note_fence(w, "global")
    _fence_cluster(w, mask)


def _nothing(w: "Warp", mask: int) -> None:
    return


# `.alias` orders accesses through different virtual addresses of one location: there are none here.
_PROXY: dict[tuple[str, ...], Callable[["Warp", int], None]] = {
    ("alias",): _nothing,
    ("async",): _fence_all,
    ("async", "global"): _fence_global,
    ("async", "shared::cta"): _fence_shared,
    ("async", "shared::cluster"): _fence_cluster,
    ("async::generic", "release", "sync_restrict::shared::cta", "cluster"): _fence_shared,
    ("async::generic", "acquire", "sync_restrict::shared::cluster", "cluster"): _fence_cluster,
}


@decoder("fence", "membar")
def fence(ins: Instruction) -> Effect:
    """fence and membar: thread fences, fence.mbarrier_init, proxy fences (tensormap: tensormap_ops.py).

    Not pinned by silicon: `.sync_restrict` forms are taken as fences of their kind without the restriction.
    """
    r = Reader(ins)
    if r.take("proxy"):
        run = _PROXY.get(ins.parts[2:])
        if run is None:
            raise Unsupported(f"{r.where}: this proxy fence is not known")
        if ins.operands:
            r.end(0)
        return Effect(run)
    if ins.parts[0] == "membar":
        r.one_of("cta", "gl", "sys")
        r.end(0)
        return Effect(_order("sc"))
    if r.take("mbarrier_init"):
        r.one_of("release")
        r.one_of("cluster")
        r.end(0)
        return Effect(lambda w, mask: barriers.fence_init(w))
    sem = r.one_of("sc", "acq_rel", "acquire", "release", default="acq_rel")
    if sem in ("acquire", "release"):
        r.one_of(
            {"acquire": "sync_restrict::shared::cluster", "release": "sync_restrict::shared::cta"}[sem], default="none"
        )
    r.one_of(*SCOPES)
    r.end(0)
    return Effect(_order(sem))


# Caches, policies and the rest.


@decoder("prefetch", "prefetchu")
def prefetch(ins: Instruction) -> Effect:
    """prefetch{u}: no effect; a tensor map must at least lie in accessible memory."""
    groups = {
        "space": ("global", "local", "const", "param"),
        "level": ("L1", "L2", "tensormap", "L2::evict_last", "L2::evict_normal"),
    }
    found = modifiers(ins, 1, groups)
    if "level" not in found or len(ins.operands) != 1:
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: a level and one operand expected")
    if found["level"] != "tensormap":
        return Effect(_nothing)

    def run(w: "Warp", mask: int, address: Value) -> None:
        one = single(address, mask)
        if one is None:
            return
        if one & 63:
            w.found(MISALIGNED, f"tensor map at {one:#x} is not at a multiple of 64")
        if space_of(one) == "param":
            param_offset(w, one, 128)
        elif w.machine.gmem.find(one, 128) is None:
            w.found(OUT_OF_BOUNDS, f"prefetch of a tensor map at {one:#x}, which is in no buffer")

    return Effect(run, (), (Source(ins.operands[0], 64),))


@decoder("discard", "applypriority")
def discard(ins: Instruction) -> Effect:
    """discard{.global}.L2 [a], 128 (the bytes' content is lost) and applypriority{.global}.L2::evict_normal [a], 128."""
    r = Reader(ins)
    r.one_of("global", default="generic")
    lost = ins.parts[0] == "discard"
    r.one_of("L2" if lost else "L2::evict_normal")
    r.end(2)

    def run(w: "Warp", mask: int, address: Value, size: Value) -> None:
        check_aligned(w, address, mask, 128)
        if size != 128:
            w.found(BAD_VALUE, f"size {size}, which must be 128")
        for one in np.unique(as_lanes(address, mask)[0]).tolist():
            if lost:
                w.machine.gmem.forget(w, one, 128)
            else:
                w.machine.gmem.view(one, 128)

    return Effect(run, (), (Source(ins.operands[0], 64), Source(ins.operands[1])))


# What CUTLASS passes as ready-made policies (TMA::CacheHintSm90); the format is opaque, so any value would do.
_POLICIES = {
    "L2::evict_normal": 0x1000000000000000,
    "L2::evict_unchanged": 0x1000000000000000,
    "L2::evict_first": 0x12F0000000000000,
    "L2::evict_last": 0x14F0000000000000,
}


@decoder("createpolicy")
def createpolicy(ins: Instruction) -> Effect | Pure:
    """createpolicy.{fractional,range,cvt}: an opaque value."""
    r = Reader(ins)
    kind = r.one_of("fractional", "range", "cvt")
    if kind == "cvt":
        r.one_of("L2")
        r.one_of("b64")
        r.end(2)
        return Pure(lambda a: a, (ins.operands[0],), (Source(ins.operands[1], 64),), "{d} = {0}")
    if kind == "range":
        r.one_of("global", default="generic")
    policy = _POLICIES[r.one_of(*_POLICIES)]
    r.one_of("L2::evict_first", "L2::evict_unchanged", default="none")
    r.one_of("b64")
    r.end()
    if len(ins.operands) not in ((4,) if kind == "range" else (1, 2)):
        raise Unsupported(f"{r.where}: {len(ins.operands)} operands do not fit")
    return Effect(lambda w, mask: policy, (ins.operands[0],))


@decoder("nanosleep")
def nanosleep(ins: Instruction) -> Effect:
    """nanosleep.u32 t: a hint."""
    r = Reader(ins)
    r.one_of("u32")
    r.end(1)
    return Effect(_nothing)


@decoder("trap", "brkpt")
def trap(ins: Instruction) -> Effect:
    """trap ends the launch with an error; brkpt stops for a debugger that is not there."""
    Reader(ins).end(0)

    def run(w: "Warp", mask: int) -> None:
        w.found(BAD_VALUE, f"{ins.op} executed by lanes {mask:#x}", fatal=ins.op == "trap")

    return Effect(run)
