"""tcgen05.mma: D = A * B (+ D) in tensor memory, with and without block scaling.

Operands are decoded to float32, scaled, and multiplied with float32 accumulation: products are exact, the order of additions
and their rounding are not those of hardware (not pinned). Layouts, with r a row of A and n a column of B:

* M 128 in one CTA, 256 in a pair: lane = row, column = n; a pair splits A and D by rows, B by columns (even CTA first).
* M 64 in one CTA: row r in lane r // 16 * 32 + r % 16, plus 16 if the address says lane 16.
* M 128 in a pair: each CTA has 64 rows; lanes 0 to 63 hold the first half of the columns, lanes 64 to 127 the second.
* Scale factors: row r (column n of B) in column r // 32, lane r % 32, byte k of the cell, the same in every quarter of the
  lanes; for B in the layout before, the first two quarters hold the first half, the others the second.

Refused: .ws, .sp, .ashift, sub-byte A from tensor memory for kind::f8f6f4 and kind::mxf8f6f4 (container layout unknown).

Sources: PTX ISA 9.x, "tcgen05.mma" and "Data Path Layout Organization"; NVIDIA CUTLASS,
include/cute/atom/mma_traits_sm100_frag.hpp (tmem_frg, tmem_sf_frg). Not pinned by silicon: M 64, M 128 in a pair, A from
tensor memory, which half of an 8-word lane mask belongs to which CTA (the first to the even one here).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ptxsim.descriptors import BLOCK_SCALED, InstructionDescriptor, decode_instruction, k_major_chunks, mn_major_chunks
from ptxsim.findings import BAD_VALUE, TMEM_MISUSE, UNINITIALISED_READ, Unsupported
from ptxsim.mma_formats import FORMATS, SCALE_TABLES, bad_scales
from ptxsim.ptx import Address, Imm, Instruction, Vector
from ptxsim.registry import Effect, Reader, Source, decoder
from ptxsim.tmem import ALL_BANDS, BAND, BANDS
from ptxsim.values import Value, lane, lanes_of

if TYPE_CHECKING:
    from ptxsim.machine import CTA, Issue, Warp
    from ptxsim.memory import SharedMemory
    from ptxsim.tmem import TensorMemory

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
K_BYTES = 32
A_COLUMNS = K_BYTES // 4

# ---------------------------------------------------------------------------------------------------------------------
# Shared with tcgen05.py


def group_of(r: Reader) -> bool:
    """Reads `.cta_group::N`; True for a pair."""
    return r.one_of("cta_group::1", "cta_group::2") == "cta_group::2"


def participants(w: "Warp", pair: bool, peer_may_exit: bool = False) -> "tuple[CTA, ...]":
    """The CTAs that an instruction acts on, even one first; checks what `.cta_group::N` demands."""
    state = w.cta.state
    if state.setdefault("cta_group", pair) != pair:
        w.found(TMEM_MISUSE, "a kernel must use one .cta_group in all its tcgen05 instructions; this CTA used both")
    if not pair:
        return (w.cta,)
    first = w.cta.rank & ~1
    if first + 1 >= w.cluster.size:
        w.found(TMEM_MISUSE, f"cta_group::2 in a cluster of {w.cluster.size}: CTA {w.cta.rank} has no peer", fatal=True)
    both = (w.cluster.ctas[first], w.cluster.ctas[first + 1])
    if both[1 - (w.cta.rank & 1)].exited and not peer_may_exit:
        w.found(TMEM_MISUSE, "cta_group::2, but the peer CTA has exited", fatal=True)
    return both


def tensor_queue(cta: "CTA") -> tuple[str, int, int]:
    """The in-order queue of tensor-core operations that a CTA issues."""
    return ("tensor", cta.cluster.index, cta.rank)


def gather(smem: "SharedMemory", chunks: I64) -> npt.NDArray[np.uint8]:
    """The bytes of 16-byte chunks, one after the other."""
    # complex128 is NumPy's only 16-byte number: taking 16 bytes at once is four times faster than bytes.
    units = smem.data[: smem.data.size & ~15].view(np.complex128)
    return units.take(chunks).view(np.uint8).reshape(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Operands


@dataclass(frozen=True, slots=True)
class _Tile:
    """An operand in shared memory.

    Attributes:
        chunks: flat chunk numbers.
        rows: along M or N.
        k: along K.
        name: format.
        mn_major: stored along M or N.
    """

    chunks: I64
    rows: int
    k: int
    name: str
    mn_major: bool

    def fetch(self, smem: "SharedMemory") -> F32:
        """(rows, k) float32."""
        raw = gather(smem, self.chunks)
        decode = FORMATS[self.name].decode
        if self.mn_major:
            return decode(raw.reshape(self.k, -1)).T[: self.rows]
        return decode(raw.reshape(self.rows, -1))


@lru_cache(maxsize=8192)
def tile(desc: int, rows: int, k: int, name: str, mn_major: bool, arch: str = "sm100") -> _Tile:
    """The operand that a matrix descriptor means."""
    if mn_major:
        per_chunk = 128 // FORMATS[name].bits
        chunks = mn_major_chunks(desc, arch, -(-rows // per_chunk), k)
    else:
        chunks = k_major_chunks(desc, arch, rows, K_BYTES // 16)
    flat = chunks.reshape(-1)
    flat.setflags(write=False)
    return _Tile(flat, rows, k, name, mn_major)


def _read_scales(tmem: "TensorMemory", found: Any, column: int, rows: int, form: "_Form", byte: int, half: bool) -> F32:
    """(rows, factors) scale factors; `half`: quarters 0 and 1 hold the first half of the rows, 2 and 3 the second."""
    if half:
        parts = [_scale_bytes(tmem, found, column, rows // 2, i, i + 2) for i in (0, 2)]
        cells = np.concatenate(parts)
    else:
        cells = _scale_bytes(tmem, found, column, rows, 0, 4)
    raw = cells[:, byte : byte + form.factors]
    if raw.tobytes().translate(None, _GOOD_SCALES[form.scale]):
        row, k = (int(i[0]) for i in np.nonzero(bad_scales(raw, form.scale)))
        found(BAD_VALUE, f"scale factor {raw[row, k]:#04x} ({form.scale}) of row {row}, block {k} is NaN or negative")
    return SCALE_TABLES[form.scale].take(raw)


_GOOD_SCALES = {
    name: bytes(np.flatnonzero(~bad_scales(np.arange(256, dtype=np.uint8), name)).tolist()) for name in SCALE_TABLES
}


def _scale_bytes(
    tmem: "TensorMemory", found: Any, column: int, rows: int, first: int, last: int
) -> npt.NDArray[np.uint8]:
    """(rows, 4) bytes of the cells of scale factors, which must be there and the same in quarters `first` to `last` - 1."""
    columns = -(-rows // 32)
    lanes, where = slice(32 * first, 32 * last), slice(column, column + columns)
    valid, cells = tmem.valid[lanes, where], tmem.data[lanes, where]
    raw = cells.tobytes()
    if b"\0" in valid.tobytes() or raw[: 128 * columns] * (last - first) != raw:
        _check_scale_cells(found, valid, cells, column, rows)
    quarter = np.frombuffer(raw, np.uint8, 128 * columns).reshape(32, columns, 4)
    return quarter.transpose(1, 0, 2).reshape(columns * 32, 4)[:rows]


def _check_scale_cells(
    found: Any, valid: npt.NDArray[np.bool_], cells: npt.NDArray[np.uint32], column: int, rows: int
) -> None:
    """The slow form: only `rows` rows count."""
    columns = valid.shape[1]
    # (quarter, column, lane): rows in order.
    ok = valid.reshape(-1, 32, columns).transpose(0, 2, 1).reshape(-1, columns * 32)[:, :rows]
    if not ok.all():
        row = int(np.flatnonzero(~ok.all(axis=0))[0])
        where = f"column {column + row // 32}, lane {row % 32}"
        found(
            UNINITIALISED_READ,
            f"scale factors: tensor memory {where} (or the same lane of another quarter) never written",
        )
    words = cells.reshape(-1, 32, columns).transpose(0, 2, 1).reshape(-1, columns * 32)[:, :rows]
    if (words != words[0]).any():
        row = int(np.nonzero(words != words[0])[1][0])
        found(
            TMEM_MISUSE,
            f"scale factors of row {row} (column {column + row // 32}) differ between quarters of the lanes",
        )


# ---------------------------------------------------------------------------------------------------------------------
# The instruction


@dataclass(frozen=True)
class _Form:
    """What an instruction's modifiers say.

    Attributes:
        kind: behind `.kind::`.
        pair: `.cta_group::2`.
        factors: scale factors in a row of K, 0 without block scaling.
        a_in_tmem: A comes from tensor memory.
        scale: format of the scale factors, known from the instruction descriptor.
    """

    kind: str
    pair: bool
    factors: int
    a_in_tmem: bool
    scale: str = ""


@dataclass(frozen=True)
class _Operation:
    """One issued multiplication."""

    form: _Form
    desc: InstructionDescriptor
    ctas: "tuple[CTA, ...]"
    d_column: int
    d_lane: int
    a: "_Tile | int"
    b: _Tile
    accumulate: bool
    shift: int
    enabled: "tuple[npt.NDArray[np.bool_] | None, ...]"
    a_scale: int = 0
    b_scale: int = 0

    @property
    def split(self) -> bool:
        """Lanes 64 to 127 hold the second half of the columns."""
        return self.form.pair and self.desc.m == 128

    @property
    def d_columns(self) -> int:
        """Columns that D takes."""
        return self.desc.n // 2 if self.split else self.desc.n


def _factors(form: str, kind: str, where: str) -> int:
    """Scale factors in a row for a `.scale_vectorsize`."""
    table = {
        "mxf8f6f4": {"": 1, "scale_vec::1X": 1, "block32": 1},
        "mxf4": {"": 2, "scale_vec::2X": 2, "block32": 2},
        "mxf4nvf4": {"scale_vec::2X": 2, "block32": 2, "scale_vec::4X": 4, "block16": 4},
    }[kind]
    if form not in table:
        raise Unsupported(f"{where}: scale vector size {form or '(none)'} does not exist for kind::{kind}")
    return table[form]


@decoder("tcgen05.mma")
def mma(ins: Instruction) -> Effect:
    """tcgen05.mma.cta_group::N.kind::K{.block_scale{.scale_vec::NX|.blockN}}{.collector::a::OP} ..."""
    r = Reader(ins, 2)
    if r.peek() in ("ws", "sp"):
        raise Unsupported(f"{r.where}: tcgen05.mma.{r.peek()} is not modelled")
    pair = group_of(r)
    kind = r.one_of("kind::f16", "kind::tf32", "kind::f8f6f4", "kind::i8", *(f"kind::{k}" for k in BLOCK_SCALED))[6:]
    factors = 0
    if kind in BLOCK_SCALED:
        r.one_of("block_scale")
        size = r.one_of("scale_vec::1X", "scale_vec::2X", "scale_vec::4X", "block16", "block32", default="")
        factors = _factors(size, kind, r.where)
    if r.peek() == "ashift":
        raise Unsupported(f"{r.where}: .ashift is not modelled")
    # Reuse of A is opportunistic: memory must not change while the instruction runs, so reading it again is the same.
    r.one_of(*(f"collector::a::{use}" for use in ("fill", "use", "lastuse", "discard")), default="discard")
    r.end()
    return _mma_effect(ins, r, kind, pair, factors)


def _mma_effect(ins: Instruction, r: Reader, kind: str, pair: bool, factors: int) -> Effect:
    operands = ins.operands
    form = _Form(kind, pair, factors, isinstance(operands[1], Address))
    sources = [Source(operands[0]), Source(operands[1], 32 if form.a_in_tmem else 64), Source(operands[2], 64)]
    sources.append(Source(operands[3]))
    masked, shift = False, 0
    rest = operands[4:]
    if factors:
        if len(rest) != 3:
            raise Unsupported(f"{r.where}: {len(operands)} operands found, 7 expected")
        sources += [Source(rest[0]), Source(rest[1])]
    else:
        masked = bool(rest) and isinstance(rest[0], Vector)
        if masked:
            if len(rest[0].items) != (8 if pair else 4):  # type: ignore[union-attr]
                raise Unsupported(f"{r.where}: the lane mask must have {8 if pair else 4} words")
            sources.append(Source(rest[0]))
        rest = rest[masked:]
        if len(rest) == 2 and isinstance(rest[1], Imm) and kind in ("f16", "tf32") and 0 <= rest[1].integer() <= 15:
            shift = rest[1].integer()
        elif len(rest) != 1:
            raise Unsupported(f"{r.where}: operands behind the instruction descriptor are not understood")
    sources.append(Source(operands[6] if factors else rest[0], 1))

    def run(w: "Warp", mask: int, d: Value, a: Value, b: Value, idesc: Value, *more: Any) -> None:
        for i in lanes_of(mask):
            desc = decode_instruction(lane(idesc, i), kind, pair)
            accumulate = bool(more[-1] >> i & 1)
            scales = (lane(more[0], i), lane(more[1], i)) if factors else (0, 0)
            words = [lane(word, i) for word in more[0]] if masked else None
            operation = _operation(w, form, desc, lane(d, i), lane(a, i), lane(b, i), accumulate, shift, words, scales)
            _submit(w, operation)

    return Effect(run, (), tuple(sources))


@lru_cache(maxsize=256)
def _enabled(words: tuple[int, ...]) -> "npt.NDArray[np.bool_] | None":
    """Lanes that may be written, None for all."""
    if not any(words):
        return None
    return np.unpackbits(np.array(words, "<u4").view(np.uint8), bitorder="little") == 0


def _operation(
    w: "Warp",
    form: _Form,
    desc: InstructionDescriptor,
    d: int,
    a: int,
    b: int,
    accumulate: bool,
    shift: int,
    words: list[int] | None,
    scales: tuple[int, int],
) -> _Operation:
    ctas = participants(w, form.pair)
    rows = desc.m // len(ctas)
    d_lane = d >> 16
    if d_lane not in ((0, 16) if desc.m == 64 else (0,)):
        w.found(TMEM_MISUSE, f"D at address {d:#x} starts at lane {d_lane}, expected 0", fatal=True)
    if form.a_in_tmem:
        if a >> 16 != d_lane:
            w.found(TMEM_MISUSE, f"A at address {a:#x} must start at the lane of D, {d_lane}", fatal=True)
        if FORMATS[desc.a].bits == 8 and desc.a in ("e2m1", "e2m3", "e3m2"):
            raise Unsupported(f"{w.instruction.text}: {desc.a} in tensor memory")
        if desc.a_mn_major:
            raise Unsupported(f"{w.instruction.text}: a transposed A in tensor memory")
    operand = a & 0xFFFF if form.a_in_tmem else tile(a, rows, desc.k, desc.a, desc.a_mn_major)
    masks = tuple(_enabled(tuple(words[4 * i : 4 * i + 4])) if words else None for i in range(len(ctas)))
    if form.factors:
        _check_scale_form(w, form, desc, scales)
        form = _Form(form.kind, form.pair, form.factors, form.a_in_tmem, desc.scale)
    return _Operation(
        form,
        desc,
        ctas,
        d & 0xFFFF,
        d_lane,
        operand,
        tile(b, desc.n // len(ctas), desc.k, desc.b, desc.b_mn_major),
        accumulate,
        shift,
        masks,
        scales[0] & 0xFFFF,
        scales[1] & 0xFFFF,
    )


def _check_scale_form(w: "Warp", form: _Form, desc: InstructionDescriptor, scales: tuple[int, int]) -> None:
    if desc.scale == "ue4m3" and form.factors != 4:
        raise Unsupported(f"{w.instruction.text}: UE4M3 scale factors go with .block16 only")
    for which, number, address in (("A", desc.a_scale_id, scales[0]), ("B", desc.b_scale_id, scales[1])):
        if number % form.factors or number + form.factors > 4:
            raise Unsupported(
                f"{w.instruction.text}: scale factor {which} ID {number} with {form.factors} factors a row"
            )
        # The two highest bits name the byte; the instruction descriptor repeats them.
        if address >> 16 & 0x3FFF:
            w.found(TMEM_MISUSE, f"scale factors of {which} at {address:#x} do not start at lane 0", fatal=True)


def _submit(w: "Warp", op: _Operation) -> None:
    """Checks an operation as of its issue and queues it."""
    from ptxsim.machine import AsyncOp

    issue = w.issue("tensor")
    desc = op.desc
    sources: list[tuple[str, int, int]] = []
    if op.form.factors:
        a_rows, b_rows = desc.m // len(op.ctas), desc.n // 2 if op.split else desc.n
        sources = [
            ("scale factors of A", op.a_scale, -(-a_rows // 32)),
            ("scale factors of B", op.b_scale, -(-b_rows // 32)),
        ]
    # M 64 leaves every other band of 16 lanes alone.
    bands = slice(op.d_lane // BAND, BANDS, 2) if desc.m == 64 else ALL_BANDS
    for cta in op.ctas:
        tmem = cta.tmem
        cta.smem.check_async_read_chunks(issue, op.b.chunks)
        if isinstance(op.a, int):
            _check_source(w, tmem, issue, bands, "A", op.a, A_COLUMNS)
        else:
            cta.smem.check_async_read_chunks(issue, op.a.chunks)
        for name, column, count in sources:
            _check_source(w, tmem, issue, ALL_BANDS, name, column, count)
        tmem.check_range(w.found, op.d_column, op.d_columns, "D")
        tmem.check_write(w.found, issue.clock, issue.thread, bands, op.d_column, op.d_columns, "D")
        tmem.note_write(issue.thread, issue.tick, bands, op.d_column, op.d_columns)
    w.machine.counters["mma_flops"] += 2 * desc.m * desc.n * desc.k

    def execute() -> None:
        for cta in op.ctas:
            cta.smem.recheck_async_read_chunks(issue, op.b.chunks)
            if not isinstance(op.a, int):
                cta.smem.recheck_async_read_chunks(issue, op.a.chunks)
        with np.errstate(all="ignore"):
            _multiply(op, w.machine.found)

    text = f"{desc.m}x{desc.n}x{desc.k} to column {op.d_column}"
    w.machine.engine.submit(AsyncOp("tensor", tensor_queue(w.cta), execute, text, issue))


def _check_source(
    w: "Warp", tmem: "TensorMemory", issue: "Issue", bands: slice, name: str, column: int, count: int
) -> None:
    """An operand in tensor memory."""
    tmem.check_range(w.found, column, count, name)
    tmem.check_read(w.found, issue.clock, bands, column, count, name)
    tmem.note_read(issue.thread, issue.tick, bands, column, count)


def _multiply(op: _Operation, found: Any) -> None:
    desc, form = op.desc, op.form
    parts = [op.b.fetch(cta.smem) for cta in op.ctas]
    b = parts[0] if len(parts) == 1 else np.concatenate(parts)
    rows = desc.m // len(op.ctas)
    for cta, enabled in zip(op.ctas, op.enabled, strict=True):
        tmem, scaled_b = cta.tmem, b
        if form.factors:
            factors = _read_scales(tmem, found, op.b_scale, desc.n, form, desc.b_scale_id, op.split)
            scaled_b = _scaled(b, factors)
        a = _a_from_tmem(op, cta, op.a, found) if isinstance(op.a, int) else op.a.fetch(cta.smem)
        if form.factors:
            factors = _read_scales(tmem, found, op.a_scale, rows, form, desc.a_scale_id, False)
            a = _scaled(a, np.concatenate([factors, factors]) if a.shape[0] > rows else factors)
        if desc.a_negative != desc.b_negative:
            a = -a
        if op.split:
            half = desc.n // 2
            lower, upper = a[:64], a[-64:]
            product = np.concatenate([lower @ scaled_b[:half].T, upper @ scaled_b[half:].T])
        else:
            product = a @ scaled_b.T
        _accumulate(op, tmem, product, enabled, found)


def _scaled(values: F32, factors: F32) -> F32:
    rows, k = values.shape
    return (values.reshape(rows, factors.shape[1], -1) * factors[:, :, None]).reshape(rows, k)


def _lanes(op: _Operation) -> "slice | I64":
    if op.desc.m == 64:
        r = np.arange(64)
        return r // 16 * 32 + r % 16 + op.d_lane
    return slice(0, 128)


def _a_from_tmem(op: _Operation, cta: "CTA", column: int, found: Any) -> F32:
    """A from tensor memory: 32 bytes a row; 128 rows (both copies) for M 128 in a pair."""
    lanes, tmem = _lanes(op), cta.tmem
    tmem.check_valid(found, lanes, column, A_COLUMNS, "A")
    raw = np.ascontiguousarray(tmem.data[lanes, column : column + A_COLUMNS]).view(np.uint8)
    return FORMATS[op.desc.a].decode(raw)


def _accumulate(op: _Operation, tmem: "TensorMemory", product: F32, enabled: Any, found: Any) -> None:
    lanes = _lanes(op)
    columns = slice(op.d_column, op.d_column + op.d_columns)
    if enabled is not None:
        chosen = np.arange(128)[lanes]
        keep = enabled[chosen]
        lanes, product = chosen[keep], product[keep]
    if op.accumulate:
        tmem.check_valid(found, lanes, op.d_column, op.d_columns, "D as accumulator")
    if op.desc.d == "s32":
        total = product.astype(np.int64)
        if op.accumulate:
            total += tmem.data[lanes, columns].view(np.int32)
        if op.desc.saturate:
            total = total.clip(-(1 << 31), (1 << 31) - 1)
        tmem.data[lanes, columns] = total.astype(np.uint32)
    else:
        old = None
        if op.accumulate:
            old = tmem.f32[lanes, columns] if op.desc.d == "f32" else _halves(tmem.data[lanes, columns])
            if op.shift:
                old = old * np.float32(2.0**-op.shift)
            if isinstance(lanes, slice) and op.desc.d == "f32" and not op.shift:
                np.add(old, product, out=old)
                return
            product += old
        if op.desc.d == "f32":
            tmem.f32[lanes, columns] = product
        else:
            tmem.data[lanes, columns] = product.astype(np.float16).view(np.uint16)
    tmem.valid[lanes, columns] = True


def _halves(words: npt.NDArray[np.uint32]) -> F32:
    return words.astype(np.uint16).view(np.float16).astype(np.float32)
