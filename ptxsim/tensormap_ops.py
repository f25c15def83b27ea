"""Tensor maps in memory: fetching them for copies, tensormap.replace, tensormap.cp_fenceproxy, fence.proxy.tensormap.

Maps in parameters are constant. A map in global memory that the kernel writes itself is read through another proxy than it
is written through: the writer needs a release (fence.proxy.tensormap::generic.release or tensormap.cp_fenceproxy), the reader
an acquire of that address behind it, each time it changes. A copy that uses a changed map without them is a finding.

Source: PTX ISA, tensormap.replace (field encodings), tensormap.cp_fenceproxy, membar/fence (proxy tensormap).
Not pinned by silicon: nothing here was compared with stale descriptor caches; the model demands what the ISA does.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim import tensormap
from ptxsim.boxes import Box
from ptxsim.findings import BAD_VALUE, MISALIGNED, MISSING_PROXY_FENCE, OUT_OF_BOUNDS, TENSORMAP, Unsupported
from ptxsim.ptx import Imm, Instruction
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.values import M32, Value, lane, lanes_of, uniform

if TYPE_CHECKING:
    from ptxsim.machine import Machine, Warp

Bytes = npt.NDArray[np.uint8]
PARAM_WINDOW = 1 << 57
_MEANINGFUL = tensormap.MEANINGFUL_BYTES


def box_of(w: "Warp", address: int, rows: int | None = None) -> Box | None:
    """The geometry behind a tensor map's generic address; None after a finding.

    Args:
        w: the warp that issues the copy.
        address: generic address of the map.
        rows: see Box.
    """
    machine = w.machine
    known: dict[Any, Box | None] = vars(machine).setdefault("tensor_boxes", {})
    if address & PARAM_WINDOW:
        found = known.get((address, rows))
        if found is None:
            raw = _fetch(w, address)
            found = known[address, rows] = None if raw is None else _make(w, raw, address, rows)
        return found
    raw = _fetch(w, address)
    if raw is None:
        return None
    _check_seen(w, address, raw)
    found = known.get((raw, rows))
    if found is None:
        found = known[raw, rows] = _make(w, raw, address, rows)
    return found


def _fetch(w: "Warp", address: int) -> bytes | None:
    if address & 63:
        w.found(MISALIGNED, f"tensor map address {address:#x} is not a multiple of 64", fatal=True)
        return None
    if address & PARAM_WINDOW:
        offset = address & M32
        if offset + _MEANINGFUL > len(w.machine.params):
            w.found(OUT_OF_BOUNDS, f"tensor map at parameter offset {offset} lies outside the parameters", fatal=True)
            return None
        return w.machine.params[offset : offset + _MEANINGFUL].tobytes()
    if address >> 56:
        w.found(TENSORMAP, f"tensor map address {address:#x} is neither in parameters nor in global memory", fatal=True)
        return None
    region, at = w.machine.gmem.view(address, _MEANINGFUL)
    if region.valid is not None and not region.valid[at : at + _MEANINGFUL].all():
        w.found(TENSORMAP, f"tensor map at {address:#x} has bytes that nobody has written", fatal=True)
    return region.data[at : at + _MEANINGFUL].tobytes()


def _make(w: "Warp", raw: bytes, address: int, rows: int | None) -> Box | None:
    try:
        decoded = tensormap.decode(raw)
        messages = tensormap.check(decoded, w.machine.arch)
    except tensormap.TensorMapError as error:
        w.found(TENSORMAP, f"tensor map at {address:#x}: {error}", fatal=True)
        return None
    if messages:
        w.found(TENSORMAP, f"tensor map at {address:#x}: {'; '.join(messages)}", fatal=True)
    return Box(decoded, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Proxy tensormap


def _released(machine: "Machine") -> dict[tuple[int, int], int]:
    """(cluster, clock thread) -> the clock of its last release towards the tensormap proxy."""
    return vars(machine).setdefault("tensor_map_releases", {})


def _release(w: "Warp") -> None:
    tick = int(w.release()[w.thread])
    _released(w.machine)[w.cluster.index, w.thread] = tick


def _check_seen(w: "Warp", address: int, raw: bytes) -> None:
    """A copy of `w` uses a map in global memory: what this launch changed in it must have passed to the tensormap proxy."""
    region, at = w.machine.gmem.view(address, _MEANINGFUL)
    if region.who is None or region.tick is None:
        return
    writers = region.who[at : at + _MEANINGFUL]
    if not writers.any():
        return
    checked = w.cta.state.setdefault("tensor_maps_checked", {})
    if checked.get(address) == raw:
        return
    checked[address] = raw
    # The order of the writes and this read is checked as for an ordinary load.
    w.machine.gmem.load(w, np.uint64(address) + _LANES16[:4], 16)
    released = _released(w.machine)
    for writer in set(writers[writers != 0].tolist()):
        cluster, thread = (writer >> 12) - 1, writer & 0xFFF
        last = int(region.tick[at : at + _MEANINGFUL][writers == writer].max())
        if released.get((cluster, thread), -1) < last:
            w.found(
                MISSING_PROXY_FENCE,
                f"the tensor map at {address:#x} was changed by this kernel without fence.proxy.tensormap::generic.release "
                "or tensormap.cp_fenceproxy by the warp that did it",
            )
    if w.cta.state.get("tensor_maps_acquired", {}).get(address) != raw:
        w.found(
            MISSING_PROXY_FENCE,
            f"the tensor map at {address:#x} was changed by this kernel, and this CTA executed no "
            "fence.proxy.tensormap::generic.acquire of it since",
        )


@decoder("fence.proxy.tensormap::generic")
def fence_tensormap(ins: Instruction) -> Effect:
    """fence.proxy.tensormap::generic.release.scope and .acquire.scope [addr], 128."""
    r = Reader(ins, 3)
    sem = r.one_of("acquire", "release")
    r.one_of("cta", "cluster", "gpu", "sys")
    if sem == "release":
        r.end(0)

        def release(w: "Warp", mask: int) -> None:
            _release(w)

        return Effect(release)
    r.end(2)
    if not isinstance(ins.operands[1], Imm) or ins.operands[1].integer() != 128:
        raise Unsupported(f"{r.where}: the size must be 128")

    def acquire(w: "Warp", mask: int, address: Value) -> None:
        for i in lanes_of(mask):
            _acquire(w, lane(address, i))
            if address.__class__ is int:
                break

    return Effect(acquire, (), (Source(ins.operands[0], 64),))


def _acquire(w: "Warp", address: int) -> None:
    region, at = w.machine.gmem.view(address, 128)
    raw = region.data[at : at + _MEANINGFUL].tobytes()
    w.cta.state.setdefault("tensor_maps_acquired", {})[address] = raw


# ---------------------------------------------------------------------------------------------------------------------
# tensormap.replace

# .elemtype values -> (code in bits 7-10, tf32 bit); the codes of this operand are not those of the driver's enum.
_ELEMENT_CODES = {
    0: "u8",
    1: "u16",
    2: "u32",
    3: "s32",
    4: "u64",
    5: "s64",
    6: "f16",
    7: "f32",
    8: "f32_ftz",
    9: "f64",
    10: "bf16",
    11: "tf32",
    12: "tf32_ftz",
    13: "b4x16",
    14: "b4x16_p64",
    15: "b6x16_p32",
}
_NO_ORDINAL = ("global_address", "rank")
_ORDINAL = ("box_dim", "global_dim", "global_stride", "element_stride")
_IMMEDIATE = {"elemtype": 16, "interleave_layout": 3, "swizzle_mode": 4, "swizzle_atomicity": 4, "fill_mode": 2}


@decoder("tensormap.replace")
def tensormap_replace(ins: Instruction) -> Effect:
    """tensormap.replace.tile.field{.space}.b1024.type [addr], {ord,} value."""
    r = Reader(ins, 2)
    r.one_of("tile")
    field = r.one_of(*_NO_ORDINAL, *_ORDINAL, *_IMMEDIATE)
    space = r.one_of("global", "shared::cta", default="generic")
    r.one_of("b1024")
    wide = field in ("global_address", "global_stride")
    r.one_of("b64" if wide else "b32")
    ordinal = 0
    if field in _ORDINAL:
        r.end(3)
        if not isinstance(ins.operands[1], Imm):
            raise Unsupported(f"{r.where}: the ordinal must be a literal")
        ordinal = ins.operands[1].integer()
        if not 0 <= ordinal < (4 if field == "global_stride" else 5):
            raise Unsupported(f"{r.where}: there is no ordinal {ordinal} of {field}")
    else:
        r.end(2)
    value = ins.operands[-1]
    if field in _IMMEDIATE and not (isinstance(value, Imm) and 0 <= value.integer() < _IMMEDIATE[field]):
        raise Unsupported(f"{r.where}: the value must be a literal below {_IMMEDIATE[field]}")
    width = 32 if space == "shared::cta" else 64

    def run(w: "Warp", mask: int, address: Value, new: Value) -> None:
        for i in lanes_of(mask):
            _replace(w, lane(address, i), space, field, ordinal, lane(new, i))
            if address.__class__ is int and new.__class__ is int:
                break

    return Effect(run, (), (Source(ins.operands[0], width), Source(value, 64 if wide else 32)))


def _replace(w: "Warp", address: int, space: str, field: str, ordinal: int, value: int) -> None:
    if address & 63:
        w.found(MISALIGNED, f"tensor map address {address:#x} is not a multiple of 64", fatal=True)
        return
    shared = space == "shared::cta" or (space == "generic" and address >> 56 == 1)
    load, store = (_load_shared, _store_shared) if shared else (_load_global, _store_global)
    raw = load(w, address & M32 if shared else address)
    changed = bytearray(raw)
    try:
        set_field(changed, field, ordinal, value)
    except ValueError as error:
        w.found(BAD_VALUE, f"tensormap.replace: {error}")
        return
    store(w, address & M32 if shared else address, bytes(changed))


def set_field(data: bytearray, field: str, ordinal: int, value: int) -> None:
    """Writes one field of a tensor map as tensormap.replace encodes it.

    Args:
        data: 128 bytes, changed in place.
        field: as in the opcode.
        ordinal: which dimension, counted from the innermost (strides: from dimension 1).
        value: as the instruction takes it; rank is one less than the rank, sizes are not.

    Raises:
        ValueError: the value does not fit the field.
    """
    if field == "global_address":
        _require(value < 1 << 57 and value % 16 == 0, f"global address {value:#x} must be a multiple of 16 below 2^57")
        data[0:8] = value.to_bytes(8, "little")
    elif field == "rank":
        _require(value < 5, f"rank field {value} must be 0 to 4 (one less than the rank)")
        _set_bits(data, 68, 3, value)
    elif field == "global_dim":
        data[32 + 4 * ordinal : 36 + 4 * ordinal] = ((value - 1) & M32).to_bytes(4, "little")
    elif field == "global_stride":
        _require(value % 16 == 0 and value < 1 << 40, f"stride {value} must be a multiple of 16 below 2^40")
        data[12 + 4 * ordinal : 16 + 4 * ordinal] = (value >> 4 & M32).to_bytes(4, "little")
        _set_bits(data, 8 * 28 + 4 * ordinal, 4, value >> 36)
    elif field == "box_dim":
        _require(1 <= value <= 256, f"box size {value} must be 1 to 256")
        data[55 + ordinal] = value - 1
    elif field == "element_stride":
        _require(1 <= value <= 8, f"element stride {value} must be 1 to 8")
        _set_bits(data, 8 * 52 + 3 * ordinal, 3, value - 1)
    else:
        _set_mode(data, field, value)


def _set_mode(data: bytearray, field: str, value: int) -> None:
    if field == "elemtype":
        element = tensormap.ELEMENT_TYPES[_ELEMENT_CODES[value]]
        _set_bits(data, 64 + 7, 4, element.code)
        _set_bits(data, 64 + 16, 1, element.tf32)
    elif field == "interleave_layout":
        _set_bits(data, 64 + 11, 2, value)
    elif field == "swizzle_mode":
        _set_bits(data, 64 + 13, 2, value)
    elif field == "swizzle_atomicity":
        _set_bits(data, 64 + 19, 2, value)
    else:
        _set_bits(data, 64 + 15, 1, value)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _set_bits(data: bytearray, first: int, count: int, value: int) -> None:
    whole = int.from_bytes(data, "little")
    mask = (1 << count) - 1
    data[:] = (whole & ~(mask << first) | (value & mask) << first).to_bytes(len(data), "little")


_LANES8 = np.arange(8, dtype=np.int64) * 16
_LANES16 = _LANES8.astype(np.uint64)


def _load_shared(w: "Warp", address: int) -> bytes:
    # Only the first half of a map has a meaning, and NVIDIA's own kernels write no more.
    cta, offset = w.cluster.locate(address)
    return cta.smem.load(w, offset + _LANES8[:4], 16).tobytes() + cta.smem.data[offset + 64 : offset + 128].tobytes()


def _store_shared(w: "Warp", address: int, data: bytes) -> None:
    cta, offset = w.cluster.locate(address)
    cta.smem.store(w, offset + _LANES8, 16, np.frombuffer(data, np.uint8).reshape(8, 16))


def _load_global(w: "Warp", address: int) -> bytes:
    region, at = w.machine.gmem.view(address, 128)
    meaningful = w.machine.gmem.load(w, np.uint64(address) + _LANES16[:4], 16).tobytes()
    return meaningful + region.data[at + 64 : at + 128].tobytes()


def _store_global(w: "Warp", address: int, data: bytes) -> None:
    w.machine.gmem.store(w, np.uint64(address) + _LANES16, 16, np.frombuffer(data, np.uint8).reshape(8, 16))


# ---------------------------------------------------------------------------------------------------------------------
# tensormap.cp_fenceproxy


@decoder("tensormap.cp_fenceproxy")
def tensormap_cp_fenceproxy(ins: Instruction) -> Effect:
    """tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.scope.sync.aligned [dst], [src], 128."""
    r = Reader(ins, 2)
    for name in ("global", "shared::cta", "tensormap::generic", "release"):
        r.one_of(name)
    r.one_of("cta", "cluster", "gpu", "sys")
    r.one_of("sync")
    r.one_of("aligned")
    r.end(3)
    if not isinstance(ins.operands[2], Imm) or ins.operands[2].integer() != 128:
        raise Unsupported(f"{r.where}: the size must be 128")

    def run(w: "Warp", mask: int, dst: Value, src: Value) -> None:
        to, source = uniform(dst, mask), uniform(src, mask)
        if to is None or source is None:
            w.found(BAD_VALUE, "lanes of tensormap.cp_fenceproxy name different maps", fatal=True)
            return
        if to & 127 or source & 127:
            w.found(
                MISALIGNED, f"tensormap.cp_fenceproxy from {source:#x} to {to:#x}: want multiples of 128", fatal=True
            )
            return
        _store_global(w, to, _load_shared(w, source))
        _release(w)

    return Effect(run, (), (Source(ins.operands[0], 64), Source(ins.operands[1])), aligned=True)
