"""What every probe is made of: the case record, deterministic data, and PTX text blocks.

A probe is one small kernel. Its PTX text is ours and is the same in both places: the driver compiles it on a GPU
(scripts/record_probes.py) and the simulator runs it on a CPU (test_probes.py). So a probe must behave the same on every
run: no clocks, no races, no addresses of global memory in its results.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

HEADER = """.version 8.6
.target sm_90a
.address_size 64
"""
FILL = 0xA5  # every byte of shared memory before a copy lands in it
SENTINEL = 0xC3  # every byte of an output buffer before the launch

_labels = count()


@dataclass(frozen=True)
class TensorMap:
    """Arguments of cuTensorMapEncodeTiled; `buffer` names the case's buffer that the map describes."""

    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of dims 1...
    box: tuple[int, ...]
    swizzle: str = "none"
    element_strides: tuple[int, ...] = ()
    interleave: str = "none"
    promotion: str = "none"
    oob_fill: str = "none"
    buffer: str = ""
    offset: int = 0  # bytes from the buffer's start

    def steps(self) -> tuple[int, ...]:
        return self.element_strides or (1,) * len(self.dims)


# Numbers of the driver's enumerations (cuda.h).
DTYPES = {
    "u8": 0,
    "u16": 1,
    "u32": 2,
    "s32": 3,
    "u64": 4,
    "s64": 5,
    "f16": 6,
    "f32": 7,
    "f64": 8,
    "bf16": 9,
    "f32_ftz": 10,
    "tf32": 11,
    "tf32_ftz": 12,
    "b4x16": 13,
    "b4x16_p64": 14,
    "b6x16_p32": 15,
}
INTERLEAVES = {"none": 0, "16": 1, "32": 2}
SWIZZLES = {"none": 0, "32": 1, "64": 2, "128": 3, "128_atom32": 4, "128_atom32_flip8": 5, "128_atom64": 6}
PROMOTIONS = {"none": 0, "64": 1, "128": 2, "256": 3}
OOB_FILLS = {"none": 0, "nan": 1}
ELEMENT_BYTES = {
    "u8": 1,
    "u16": 2,
    "u32": 4,
    "s32": 4,
    "u64": 8,
    "s64": 8,
    "f16": 2,
    "f32": 4,
    "f64": 8,
    "bf16": 2,
    "f32_ftz": 4,
    "tf32": 4,
    "tf32_ftz": 4,
}


@dataclass(frozen=True, eq=False)
class Case:
    """One probe: a kernel, its launch and its data.

    The kernel's parameters are a pointer to each buffer, in order, then the tensor maps. `outputs` are compared with the
    recording; `info` buffers are recorded for the reader only (opaque words such as an mbarrier's).
    """

    name: str
    ptx: str
    buffers: dict[str, np.ndarray[Any, Any]]
    outputs: tuple[str, ...]
    info: tuple[str, ...] = ()
    maps: tuple[TensorMap, ...] = ()
    grid: tuple[int, int, int] = (1, 1, 1)
    block: int = 32
    cluster: tuple[int, int, int] = (1, 1, 1)
    shared_bytes: int = 0
    programmatic: bool = False  # launched with programmatic stream serialization
    is_async: bool = False  # has copies in flight: run it under every scheduling policy
    rtol: float = 0.0  # relative error allowed to approximate instructions; 0 means bit for bit
    atol: float = 0.0
    float_type: str = "f32"  # f32, f16 or bf16: of the results of approximate instructions
    fails: str = ""  # the error with which the GPU ends the launch
    finding: str = ""  # what the simulator must report; then no outputs are compared
    note: str = ""
    compared: bool = True  # False: undefined by the PTX ISA or not modelled; recorded only, `note` says why

    def ptx_sha256(self) -> str:
        return hashlib.sha256(self.ptx.encode()).hexdigest()

    def data_sha256(self) -> str:
        """Hash of everything but the PTX that the result depends on."""
        digest = hashlib.sha256()
        launch = (self.grid, self.block, self.cluster, self.shared_bytes, self.programmatic, self.maps)
        digest.update(repr(launch).encode())
        for name, array in self.buffers.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def random_u64(seed: int, n: int) -> np.ndarray[Any, Any]:
    """Return n pseudo-random words (splitmix64): the same in every NumPy version, unlike np.random."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 0x2545F491 + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def random_u32(seed: int, n: int) -> np.ndarray[Any, Any]:
    return (random_u64(seed, n) >> np.uint64(17)).astype(np.uint32)


def random_bytes(seed: int, n: int) -> np.ndarray[Any, Any]:
    return random_u64(seed, (n + 7) // 8).view(np.uint8)[:n].copy()


def sentinel(num_bytes: int) -> np.ndarray[Any, Any]:
    return np.full(num_bytes, SENTINEL, dtype=np.uint8)


def status(ctas: int = 1) -> np.ndarray[Any, Any]:
    """Return the buffer that holds, per CTA, how many waits timed out."""
    return np.full(ctas, 0xFFFFFFFF, dtype=np.uint32)


def bf16_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the bfloat16 bits of values that bfloat16 holds exactly."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def words(text: str) -> list[str]:
    return text.split()


def label(stem: str) -> str:
    return f"{stem}_{next(_labels)}"


def renumber_labels(text: str) -> str:
    """Number labels by their first use, so that a kernel's text does not depend on the kernels built before it."""
    numbers: dict[str, str] = {}

    def new(match: re.Match[str]) -> str:
        return numbers.setdefault(match[0], f"{match[1]}_{len(numbers)}")

    return re.sub(r"\b([A-Z]+)_\d+\b", new, text)


def kernel(
    body: str,
    *,
    pointers: int,
    maps: int = 0,
    threads: int = 32,
    shared: bool = True,
    registers: str = "",
    directives: str = "",
) -> str:
    """Return a module with one entry, `probe`.

    The body finds: %ptr0... (global addresses of the buffers), %map0... (generic addresses of the tensor maps), %tix
    (thread index), %smem (shared address of the dynamic shared memory, 1024-byte aligned), %stuck (0; bounded waits count
    their timeouts in it), and free registers %p, %h (16 bit), %r (32), %d (64).
    """
    params = [f"\t.param .u64 probe_param_{i}" for i in range(pointers)]
    params += [f"\t.param .align 64 .b8 probe_param_{pointers + i}[128]" for i in range(maps)]
    lines = [HEADER]
    if shared:
        lines.append(".extern .shared .align 1024 .b8 probe_smem[];\n")
    lines.append(".visible .entry probe(")
    lines.append(",\n".join(params))
    lines.append(f")\n.reqntid {threads}, 1, 1\n{directives}{{")
    lines.append("\t.reg .pred %p<32>;\n\t.reg .b16 %h<64>;\n\t.reg .b32 %r<128>;\n\t.reg .b64 %d<64>;")
    lines.append("\t.reg .b32 %tix;\n\t.reg .b32 %smem;\n\t.reg .b32 %stuck;")
    lines.append(f"\t.reg .b64 %ptr<{pointers}>;")
    if maps:
        lines.append(f"\t.reg .b64 %map<{maps}>;")
    if registers:
        lines.append(registers.rstrip("\n"))
    lines.append("\tmov.u32 %tix, %tid.x;\n\tmov.b32 %stuck, 0;")
    if shared:
        lines.append("\tmov.u32 %smem, probe_smem;")
    for i in range(pointers):
        lines.append(f"\tld.param.u64 %d0, [probe_param_{i}];\n\tcvta.to.global.u64 %ptr{i}, %d0;")
    for i in range(maps):
        lines.append(f"\tmov.b64 %d0, probe_param_{pointers + i};\n\tcvta.param.u64 %map{i}, %d0;")
    lines.append(indent(renumber_labels(body)))
    lines.append("\tret;\n}\n")
    return "\n".join(lines)


def indent(text: str) -> str:
    """Indent instructions by a tab, leave labels at the margin, drop empty lines."""
    lines = [line.strip() for line in text.splitlines()]
    return "\n".join(line if line.endswith(":") else "\t" + line for line in lines if line)


def each_16_bytes(num_bytes: int, threads: int, text: str) -> str:
    """Repeat `text` for every 16 bytes; %r121 is the offset. GUARD stands for the predicate of a ragged last round.

    All lanes take the same branches, so that the warp is whole at the barrier that follows.
    """
    loop, step = label("EACH"), threads * 16
    guard, test = "", ""
    if num_bytes % step:
        guard, test = "@%p29", f"setp.lt.u32 %p29, %r121, {num_bytes};"
    return f"""
    shl.b32 %r121, %tix, 4;
    mov.b32 %r119, 0;
    {loop}:
    {test}
    {text.replace("GUARD", guard)}
    add.u32 %r121, %r121, {step};
    add.u32 %r119, %r119, {step};
    setp.lt.u32 %p31, %r119, {num_bytes};
    @%p31 bra {loop};
    """


def fill_shared(num_bytes: int, threads: int) -> str:
    """Write the fill byte to all of shared memory and make it visible to the copy engine."""
    write = """
    add.u32 %r122, %smem, %r121;
    GUARD st.shared.v4.b32 [%r122], {%r120, %r120, %r120, %r120};
    """
    return f"""
    mov.b32 %r120, 0x{FILL * 0x01010101:08x};
    {each_16_bytes(num_bytes, threads, write)}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    """


def copy_in(pointer: str, num_bytes: int, threads: int, offset: int = 0) -> str:
    """Copy a buffer to shared memory at `offset` and make it visible to the copy engine."""
    copy = f"""
    cvt.u64.u32 %d63, %r121;
    add.u64 %d62, {pointer}, %d63;
    GUARD ld.global.v4.b32 {{%r120, %r122, %r123, %r124}}, [%d62];
    add.u32 %r125, %smem, %r121;
    GUARD st.shared.v4.b32 [%r125+{offset}], {{%r120, %r122, %r123, %r124}};
    """
    return f"""
    {each_16_bytes(num_bytes, threads, copy)}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    """


def dump_shared(pointer: str, num_bytes: int, threads: int, offset: int = 0, cta: bool = False) -> str:
    """Copy shared memory to a buffer; with `cta`, to the CTA's own slice of it (%ctaid.x)."""
    base = f"mov.u32 %r126, %ctaid.x;\nmul.wide.u32 %d61, %r126, {num_bytes};" if cta else "mov.b64 %d61, 0;"
    copy = f"""
    add.u32 %r125, %smem, %r121;
    GUARD ld.shared.v4.b32 {{%r120, %r122, %r123, %r124}}, [%r125+{offset}];
    cvt.u64.u32 %d63, %r121;
    add.u64 %d62, %d61, %d63;
    GUARD st.global.v4.b32 [%d62], {{%r120, %r122, %r123, %r124}};
    """
    return f"""
    {base}
    add.u64 %d61, %d61, {pointer};
    bar.sync 0;
    {each_16_bytes(num_bytes, threads, copy)}
    """


def wait_parity(barrier: str, parity: int) -> str:
    """Wait for a phase, but not for ever: a wrong byte count must not hang the GPU. Timeouts are counted in %stuck."""
    loop, done = label("WAIT"), label("DONE")
    return f"""
    mov.b32 %r127, 0;
    {loop}:
    mbarrier.try_wait.parity.shared::cta.b64 %p31, [{barrier}], {parity}, 10000;
    @%p31 bra {done};
    add.u32 %r127, %r127, 1;
    setp.lt.u32 %p31, %r127, 5000;
    @%p31 bra {loop};
    add.u32 %stuck, %stuck, 1;
    {done}:
    """


def store_status(pointer: str) -> str:
    """Thread 0 stores %stuck to the CTA's word of the status buffer."""
    return f"""
    mov.u32 %r126, %ctaid.x;
    mul.wide.u32 %d61, %r126, 4;
    add.u64 %d61, %d61, {pointer};
    setp.eq.u32 %p31, %tix, 0;
    @%p31 st.global.b32 [%d61], %stuck;
    """


def init_barrier(address: str, arrivals: int = 1) -> str:
    """Thread 0 initialises an mbarrier for the whole cluster and the copy engine; the CTA syncs."""
    return f"""
    setp.eq.u32 %p30, %tix, 0;
    @%p30 mbarrier.init.shared.b64 [{address}], {arrivals};
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
    """


def coordinates(values: Sequence[int], first_register: int = 100) -> tuple[str, str]:
    """Return the moves that load coordinates into registers, and the brace list that names them."""
    names = [f"%r{first_register + i}" for i in range(len(values))]
    moves = "\n".join(f"mov.b32 {name}, {value};" for name, value in zip(names, values, strict=True))
    return moves, "{" + ", ".join(names) + "}"
