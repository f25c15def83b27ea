"""Small PTX kernels for tests of single instructions: a frame around the lines under test, and what runs them.

Registers of the frame: %tid, %lane, %warp, %rank (of the CTA in its cluster), %sm (16 KiB of shared memory), %g0, %g1, ...
(pointers to the buffers), %m0, %m1, ... (tensor maps), %first (predicate: thread 0 of the CTA). Free for the body: %r, %d,
%h, %p, %q (b128).
"""

from collections.abc import Sequence

import numpy as np

import ptxsim
from ptxsim import tensormap
from ptxsim.launch import Launch
from ptxsim.memory import Buffer

SHARED = 16384

WAIT = """
{{
.reg .pred done;
again:
mbarrier.try_wait.parity.shared::cta.b64 done, [{address}], {parity};
@done bra over;
bra again;
over:
}}
"""


def wait(address: str, parity: int | str) -> str:
    """A spin loop on an mbarrier."""
    return WAIT.format(address=address, parity=parity)


def aligned(array: np.ndarray, multiple: int = 128) -> np.ndarray:
    """A copy of an array whose first byte lies at a multiple of `multiple`."""
    raw = np.zeros(array.nbytes + multiple, np.uint8)
    start = -raw.ctypes.data % multiple
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def kernel(body: str, buffers: int, maps: int, block: int, target: str, directives: str) -> str:
    params = [f".param .u64 p{i}" for i in range(buffers)] + [f".param .align 64 .b8 t{i}[128]" for i in range(maps)]
    loads = [f"ld.param.u64 %g{i}, [p{i}];" for i in range(buffers)] + [f"mov.b64 %m{i}, t{i};" for i in range(maps)]
    return f"""
.version 8.7
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 dyn[];
.visible .entry k({", ".join(params)}) .reqntid {block}, 1, 1 {directives}
{{
.reg .pred %p<16>, %first;
.reg .b16 %h<16>;
.reg .b32 %r<64>, %tid, %lane, %warp, %rank, %sm;
.reg .b64 %d<32>, %g<8>, %m<8>;
.reg .b128 %q<4>;
{chr(10).join(loads)}
mov.u32 %tid, %tid.x;
and.b32 %lane, %tid, 31;
shr.u32 %warp, %tid, 5;
mov.u32 %rank, %cluster_ctarank;
mov.b32 %sm, dyn;
setp.eq.u32 %first, %tid, 0;
{body}
ret;
}}
"""


def run(
    body: str,
    buffers: Sequence[np.ndarray | Buffer] = (),
    maps: Sequence[tensormap.TensorMap | bytes] = (),
    *,
    block: int = 32,
    grid: int = 1,
    cluster: int = 1,
    policy: str = "eager",
    seed: int = 0,
    shared: int = SHARED,
    target: str = "sm_100a",
    resident: int | None = None,
    directives: str = "",
    attributes: dict[str, int] | None = None,
    max_instructions: int = 50_000_000,
) -> ptxsim.Report:
    """Simulates one launch of a kernel with this body."""
    memory = [b if isinstance(b, Buffer) else Buffer.of(b, f"g{i}") for i, b in enumerate(buffers)]
    packed = [m if isinstance(m, bytes) else tensormap.encode(m) for m in maps]
    launch = Launch(
        ptx=kernel(body, len(memory), len(packed), block, target, directives),
        entry="k",
        grid=(grid, 1, 1),
        block=(block, 1, 1),
        cluster=(cluster, 1, 1),
        shared_bytes=shared,
        params=(*(b.address.to_bytes(8, "little") for b in memory), *packed),
        attributes=attributes or {},
    )
    return ptxsim.simulate(
        launch, memory, policy=policy, seed=seed, resident_clusters=resident, max_instructions=max_instructions
    )


def codes(*args, **kwargs) -> set[str]:
    """The codes of the findings of a run."""
    return run(*args, **kwargs).codes()


def clean(*args, **kwargs) -> ptxsim.Report:
    """A run that must have no finding."""
    return run(*args, **kwargs).check()
