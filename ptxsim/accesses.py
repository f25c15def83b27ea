"""What loads, stores and atomics share: modifiers, address spaces, the lanes' bytes, ordering through memory.

A uniform address takes a path without arrays. Everything else is arrays of the lanes that take part: addresses as uint64,
lane numbers (local memory is per lane), and bytes as rows.

Ordering through memory: a releasing store or atomic publishes the warp's clock under its address, an acquiring load or atomic
takes it over; relaxed and volatile accesses do the same together with a fence before or after. Scopes are not told apart,
and clocks travel within a cluster alone: what a narrower scope than needed would break is not found.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.findings import MISALIGNED, OUT_OF_BOUNDS, UNINITIALISED_READ, Unsupported
from ptxsim.memory import LOCAL_WINDOW, PARAM_WINDOW
from ptxsim.ptx import Instruction
from ptxsim.values import FULL, LANE_IDS, M32, Value, bools, uniform

if TYPE_CHECKING:
    from ptxsim.machine import Warp

Addresses = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

SEMANTICS = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel")
SCOPES = ("cta", "cluster", "gpu", "sys")
SHARED_SPACES = ("shared", "shared::cta", "shared::cluster")
CACHE: dict[str, tuple[str, ...]] = {
    "cache operation": ("ca", "cg", "cs", "lu", "cv", "wb", "wt"),
    "L1 priority": tuple(
        f"L1::{p}" for p in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")
    ),
    "L2 priority": tuple(f"L2::{p}" for p in ("evict_normal", "evict_first", "evict_last")),
    "hint": ("L2::cache_hint",),
    "prefetch size": ("L2::64B", "L2::128B", "L2::256B"),
}
UNSIGNED: dict[int, np.dtype[Any]] = {bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
SIGNED: dict[int, np.dtype[Any]] = {bits: np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}


def modifiers(ins: Instruction, skip: int, groups: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Sorts modifiers into groups; compilers and assembler accept them in several orders.

    Returns:
        group name -> modifier; groups that do not occur are absent.

    Raises:
        Unsupported: a modifier belongs to no group, or a group occurs twice.
    """
    found: dict[str, str] = {}
    for part in ins.parts[skip:]:
        group = next((name for name, members in groups.items() if part in members), None)
        if group is None:
            raise Unsupported(f"PTX line {ins.line}: {ins.text}: modifier .{part} is not known here")
        if group in found:
            raise Unsupported(f"PTX line {ins.line}: {ins.text}: two of .{found[group]}, .{part}")
        found[group] = part
    return found


def check_semantics(ins: Instruction, found: dict[str, str], allowed: tuple[str, ...]) -> bool:
    """Checks .sem and .scope; returns True if the access is strong (it may race with other strong ones)."""
    sem = found.get("semantics", "weak")
    if sem not in allowed:
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: .{sem} is not known here")
    if ("scope" in found) != (sem in ("relaxed", "acquire", "release", "acq_rel")):
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: .{sem} and its scope do not fit")
    if "mmio" in found and (sem, found["scope"]) != ("relaxed", "sys"):
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: .mmio is .relaxed.sys")
    return sem != "weak"


def check_count(ins: Instruction, found: dict[str, str], count: int) -> None:
    """Checks the number of operands; a cache hint adds one."""
    wanted = count + ("hint" in found)
    if len(ins.operands) != wanted:
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: {len(ins.operands)} operands found, {wanted} expected")


# Where the bytes are.


def single(address: Value, mask: int) -> int | None:
    """The address that all lanes of `mask` share, or None."""
    if address.__class__ is int:
        return address
    first = address.item((mask & -mask).bit_length() - 1)
    if not mask & (mask - 1):
        return first
    if address.item(mask.bit_length() - 1) != first:
        return None
    return uniform(address, mask)


def space_of(address: int) -> str:
    """The space that a generic address lies in."""
    return {0: "global", 1: "shared::cluster", 2: "param", 4: "local"}.get(address >> 56, "global")


def _spaces(addresses: Addresses) -> Iterable[tuple[str, npt.NDArray[np.bool_]]]:
    tops = addresses >> np.uint64(56)
    for top in np.unique(tops):
        yield space_of(int(top) << 56), tops == top


def _ranks(addresses: Addresses) -> Iterable[tuple[int, npt.NDArray[np.bool_]]]:
    ranks = (addresses & np.uint64(M32)) >> np.uint64(24)
    for rank in np.unique(ranks):
        yield int(rank), ranks == rank


def check_aligned(w: "Warp", address: Value, mask: int, size: int) -> None:
    """A fatal finding if a lane's address is not a multiple of `size`."""
    if address.__class__ is int:
        bad = address if address & (size - 1) else None
    else:
        low = address[bools(mask)] & address.dtype.type(size - 1)
        bad = int(address[bools(mask)][low != 0][0]) if low.any() else None
    if bad is not None:
        w.found(MISALIGNED, f"address {bad:#x} is not a multiple of the access's {size} bytes", fatal=True)


def _own(w: "Warp", address: int) -> int:
    """The offset of a shared::cta address."""
    if address >> 24 != w.cta.rank:
        text = f"shared address {address:#x} is not in this CTA's window (rank {w.cta.rank}); use .shared::cluster"
        w.found(OUT_OF_BOUNDS, text, fatal=True)
    return address & 0xFFFFFF


def param_offset(w: "Warp", address: int, size: int) -> int:
    """The offset of a parameter address in the parameter block."""
    offset = address & ~PARAM_WINDOW
    if offset + size > len(w.machine.params):
        text = f"{size} bytes at parameter offset {offset:#x} of a block of {len(w.machine.params)}"
        w.found(OUT_OF_BOUNDS, text, fatal=True)
    return offset


def _local(w: "Warp") -> tuple[Bytes, npt.NDArray[np.bool_]]:
    found = w.state.get("local")
    if found is None:
        size = w.machine.local_bytes
        found = w.state["local"] = (np.full((32, size), 0xFF, np.uint8), np.zeros((32, size), np.bool_))
    return found


def _local_index(w: "Warp", addresses: Addresses, lanes: Addresses, size: int) -> tuple[Addresses, Addresses]:
    offsets = (addresses & np.uint64(LOCAL_WINDOW - 1)).astype(np.int64)
    limit = w.machine.local_bytes
    if offsets.max() + size > limit:
        w.found(OUT_OF_BOUNDS, f"{size} bytes at local offset {offsets.max():#x} of {limit}", fatal=True)
    return lanes[:, None], offsets[:, None] + np.arange(size)


def load_one(w: "Warp", space: str, address: int, size: int, strong: bool) -> bytes | None:
    """What all lanes read at one address; None for local memory, where each lane has its own."""
    if space == "generic":
        space = space_of(address)
    if space in ("global", "const"):
        return w.machine.gmem.load_one(w, address, size, strong)
    if space in ("shared", "shared::cta"):
        return w.cta.smem.load_one(w, _own(w, address), size, strong)
    if space == "shared::cluster":
        cta, offset = w.cluster.locate(address & M32)
        return cta.smem.load_one(w, offset, size, strong)
    if space == "param":
        offset = param_offset(w, address, size)
        return w.machine.params[offset : offset + size].tobytes()
    return None


def load_lanes(w: "Warp", space: str, addresses: Addresses, lanes: Addresses, size: int, strong: bool) -> Bytes:
    """What lanes read at their addresses, as rows of bytes."""
    if space in ("global", "const"):
        return w.machine.gmem.load(w, addresses, size, strong)
    if space in ("shared", "shared::cta"):
        return w.cta.smem.load(w, addresses.astype(np.int64) - (w.cta.rank << 24), size, strong)
    if space == "local":
        data, valid = _local(w)
        index = _local_index(w, addresses, lanes, size)
        if not valid[index].all():
            w.found(UNINITIALISED_READ, f"reads local memory that nothing wrote, at {int(addresses[0]):#x}")
        return data[index]
    out = np.zeros((len(addresses), size), np.uint8)
    if space == "param":
        for i, address in enumerate(addresses.tolist()):
            offset = param_offset(w, address, size)
            out[i] = w.machine.params[offset : offset + size]
    elif space == "shared::cluster":
        for rank, chosen in _ranks(addresses):
            offsets = (addresses[chosen] & np.uint64(0xFFFFFF)).astype(np.int64)
            out[chosen] = w.cluster.locate(rank << 24)[0].smem.load(w, offsets, size, strong)
    else:
        for inner, chosen in _spaces(addresses):
            out[chosen] = load_lanes(w, inner, addresses[chosen], lanes[chosen], size, strong)
    return out


def store_one(w: "Warp", space: str, address: int, values: bytes, strong: bool) -> bool:
    """Writes at one address for all lanes; False for local memory, where each lane has its own."""
    if space == "generic":
        space = space_of(address)
    if space in ("global", "const"):
        w.machine.gmem.store_one(w, address, values, strong)
    elif space in ("shared", "shared::cta"):
        w.cta.smem.store_one(w, _own(w, address), values, strong)
    elif space == "shared::cluster":
        cta, offset = w.cluster.locate(address & M32)
        cta.smem.store_one(w, offset, values, strong)
    elif space == "param":
        w.found(OUT_OF_BOUNDS, "store to a kernel parameter", fatal=True)
    else:
        return False
    return True


def store_lanes(w: "Warp", space: str, addresses: Addresses, lanes: Addresses, values: Bytes, strong: bool) -> None:
    """Writes the lanes' rows of bytes at their addresses."""
    size = values.shape[1]
    if space in ("global", "const"):
        w.machine.gmem.store(w, addresses, size, values, strong)
    elif space in ("shared", "shared::cta"):
        w.cta.smem.store(w, addresses.astype(np.int64) - (w.cta.rank << 24), size, values, strong)
    elif space == "local":
        data, valid = _local(w)
        index = _local_index(w, addresses, lanes, size)
        data[index] = values
        valid[index] = True
    elif space == "shared::cluster":
        for rank, chosen in _ranks(addresses):
            offsets = (addresses[chosen] & np.uint64(0xFFFFFF)).astype(np.int64)
            w.cluster.locate(rank << 24)[0].smem.store(w, offsets, size, values[chosen], strong)
    elif space == "param":
        w.found(OUT_OF_BOUNDS, "store to a kernel parameter", fatal=True)
    else:
        for inner, chosen in _spaces(addresses):
            store_lanes(w, inner, addresses[chosen], lanes[chosen], values[chosen], strong)


def as_lanes(address: Value, mask: int) -> tuple[Addresses, Addresses]:
    """(addresses, lane numbers) of the lanes in the mask; addresses as uint64."""
    wide = np.full(32, address, np.uint64) if address.__class__ is int else address.astype(np.uint64)
    if mask == FULL:
        return wide, LANE_IDS
    chosen = bools(mask)
    return wide[chosen], LANE_IDS[chosen]


# Ordering through memory.


def _keys(address: Value, mask: int) -> set[int]:
    one = single(address, mask)
    found = {one} if one is not None else set(address[bools(mask)].tolist())
    return {a & M32 if a >> 56 == 1 else a for a in found}


def after_strong_read(w: "Warp", address: Value, mask: int, acquire: bool) -> None:
    """Takes over what was published under the addresses, now or at the next fence."""
    published = w.cluster.state.get("published clocks")
    if not published:
        return
    for key in _keys(address, mask):
        clock = published.get(key)
        if clock is None:
            continue
        if acquire:
            w.acquire(clock)
        else:
            seen = w.state.get("unacquired clock")
            w.state["unacquired clock"] = clock if seen is None else np.maximum(seen, clock)


def before_strong_write(w: "Warp", address: Value, mask: int, release: bool) -> None:
    """Publishes the warp's clock, or that of its last fence, under the addresses."""
    clock = w.release() if release else w.state.get("fence clock")
    if clock is None:
        return
    published = w.cluster.state.setdefault("published clocks", {})
    for key in _keys(address, mask):
        old = published.get(key)
        published[key] = clock if old is None else np.maximum(old, clock)


def pack(values: list[Any], bits: int, mask: int) -> Bytes:
    """Register values -> the lanes' rows of bytes."""
    if bits == 128:
        values, bits = list(values[0]), 64
    chosen = None if mask == FULL else bools(mask)
    count = 32 if chosen is None else int(chosen.sum())
    rows = np.empty((count, len(values)), UNSIGNED[bits])
    limit = (1 << bits) - 1
    for i, value in enumerate(values):
        if value.__class__ is int:
            rows[:, i] = value & limit
        elif bits >= 32:
            rows[:, i] = value if chosen is None else value[chosen]
        else:
            rows[:, i] = (value if chosen is None else value[chosen]) & np.uint32(limit)
    return rows.view(np.uint8)


def lane_bytes(values: list[Any], bits: int, lane: int) -> bytes:
    """One lane's register values as bytes."""
    if bits == 128:
        values, bits = list(values[0]), 64
    limit, size = (1 << bits) - 1, bits // 8
    return b"".join(((v if v.__class__ is int else v.item(lane)) & limit).to_bytes(size, "little") for v in values)
