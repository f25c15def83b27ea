"""Small good kernels in PTX, for faults that the linear cannot have: clusters, pairs of CTAs, cp.async, reductions, wgmma.

One instruction a line, so that faults can be put in by line. The frame (registers, pointers %g, maps %m) is asm_kit's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import asm_kit
import numpy as np
from asm_kit import aligned, wait
from seeding import Base, Prepared

from ptxsim import tensormap
from ptxsim.launch import Launch
from ptxsim.memory import Buffer

U32 = np.uint32
F32 = np.float32
CLUSTER_BARRIER = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"


@dataclass(frozen=True)
class Small:
    """A kernel in PTX with its data.

    Attributes:
        body: lines of the kernel.
        inputs: what it reads; parameters %g0, ...
        outputs: what it must write completely; the parameters behind.
        sums: what it adds to, zeros before; the parameters behind.
        expected: of the outputs and sums; None is not compared.
        maps: makes the tensor maps %m0, ... of the inputs.
    """

    body: str
    inputs: Sequence[np.ndarray]
    outputs: Sequence[np.ndarray]
    expected: Sequence[np.ndarray | None]
    sums: Sequence[np.ndarray] = ()
    maps: Sequence[tensormap.TensorMap] = ()
    block: int = 32
    grid: int = 1
    cluster: int = 1
    shared: int = asm_kit.SHARED
    target: str = "sm_100a"
    directives: str = ""

    def prepare(self, kept: Sequence[np.ndarray]) -> Prepared:
        """Fresh memory, inputs copied from `kept`, and a launch."""
        for array, pristine in zip(self.inputs, kept, strict=True):
            array[...] = pristine
        memory = [Buffer.of(array, f"input {i}", readonly=True) for i, array in enumerate(self.inputs)]
        for i, array in enumerate(self.outputs):
            array[...] = -1 if array.dtype == F32 else 0xDEADBEEF
            memory.append(Buffer.of(array, f"output {i}", initialised=False, must_be_written=True))
        for i, array in enumerate(self.sums):
            array[...] = 0
            memory.append(Buffer.of(array, f"sum {i}"))
        pointers = [buffer.address.to_bytes(8, "little") for buffer in memory]
        packed = [tensormap.encode(m) for m in self.maps]
        launch = Launch(
            ptx=asm_kit.kernel(self.body, len(memory), len(packed), self.block, self.target, self.directives),
            entry="k",
            grid=(self.grid, 1, 1),
            block=(self.block, 1, 1),
            cluster=(self.cluster, 1, 1),
            shared_bytes=self.shared,
            params=(*pointers, *packed),
        )

        def is_right() -> bool:
            got = zip([*self.outputs, *self.sums], self.expected, strict=True)
            return all(want is None or np.allclose(have, want) for have, want in got)

        return Prepared(launch, memory, is_right)


def _base(name: str, make: Callable[[], Small]) -> Base:
    small = make()
    kept = [array.copy() for array in small.inputs]
    return Base(name, lambda: small.prepare(kept))


def _matrix_map(array: np.ndarray, dtype: str, box: tuple[int, int], swizzle: int = 0) -> tensormap.TensorMap:
    rows, columns = array.shape
    pitch = columns * array.itemsize
    return tensormap.TensorMap(
        array.ctypes.data, dtype, (columns, rows), (pitch,), box, (1, 1), tensormap.Swizzle(swizzle)
    )


# ---- multicast pipeline of a cluster --------------------------------------------------------------------------------

STEPS, STAGES = 4, 2
STAGE = 8192


def _multicast() -> Small:
    """Each CTA of two loads one half of a tile and sends it to both; each warp 1 frees the stage in both CTAs."""
    source = aligned(np.random.default_rng(1).integers(0, 2**32, (STEPS * 64, 32), dtype=U32))
    out = aligned(np.zeros((2, STEPS * 64, 32), U32))
    copies = "\n".join(
        f"ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r6+{i * 512}];\nst.global.v4.b32 [%d1+{i * 512}], "
        "{%r20, %r21, %r22, %r23};"
        for i in range(STAGE // 512)
    )
    body = f"""
@!%first bra READY;
mbarrier.init.shared::cta.b64 [%sm+{2 * STAGE}], 1;
mbarrier.init.shared::cta.b64 [%sm+{2 * STAGE + 8}], 1;
mbarrier.init.shared::cta.b64 [%sm+{2 * STAGE + 16}], 2;
mbarrier.init.shared::cta.b64 [%sm+{2 * STAGE + 24}], 2;
fence.mbarrier_init.release.cluster;
READY:
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
mov.b32 %r1, 0;
setp.eq.u32 %p1, %warp, 1;
@%p1 bra CONSUME;
setp.ne.u32 %p2, %lane, 0;
@%p2 bra OVER;
mov.b16 %h1, 3;
mov.b32 %r9, 0;
LOAD:
and.b32 %r2, %r1, 1;
shr.u32 %r3, %r1, 1;
and.b32 %r3, %r3, 1;
xor.b32 %r3, %r3, 1;
shl.b32 %r4, %r2, 3;
add.s32 %r4, %r4, %sm;
add.s32 %r5, %r4, {2 * STAGE + 16};
{wait("%r5", "%r3")}
add.s32 %r5, %r4, {2 * STAGE};
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], {STAGE};
shl.b32 %r6, %r2, 13;
add.s32 %r6, %r6, %sm;
shl.b32 %r7, %rank, 12;
add.s32 %r6, %r6, %r7;
shl.b32 %r8, %r1, 1;
add.s32 %r8, %r8, %rank;
shl.b32 %r8, %r8, 5;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster \
[%r6], [%m0, {{%r9, %r8}}], [%r5], %h1;
add.s32 %r1, %r1, 1;
setp.lt.u32 %p3, %r1, {STEPS};
@%p3 bra LOAD;
bra OVER;
CONSUME:
mul.lo.u32 %r10, %rank, {STEPS * STAGE};
shl.b32 %r11, %lane, 4;
add.u32 %r10, %r10, %r11;
cvt.u64.u32 %d1, %r10;
add.u64 %d1, %d1, %g1;
USE:
and.b32 %r2, %r1, 1;
shr.u32 %r3, %r1, 1;
and.b32 %r3, %r3, 1;
shl.b32 %r4, %r2, 3;
add.s32 %r4, %r4, %sm;
add.s32 %r5, %r4, {2 * STAGE};
{wait("%r5", "%r3")}
shl.b32 %r6, %r2, 13;
add.s32 %r6, %r6, %sm;
add.s32 %r6, %r6, %r11;
{copies}
bar.warp.sync -1;
setp.ne.u32 %p4, %lane, 0;
@%p4 bra FREED;
add.s32 %r5, %r4, {2 * STAGE + 16};
mapa.shared::cluster.u32 %r7, %r5, 0;
mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];
mapa.shared::cluster.u32 %r8, %r5, 1;
mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r8];
FREED:
add.u64 %d1, %d1, {STAGE};
add.s32 %r1, %r1, 1;
setp.lt.u32 %p3, %r1, {STEPS};
@%p3 bra USE;
OVER:
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
"""
    return Small(
        body,
        [source],
        [out],
        [np.stack([source, source])],
        maps=[_matrix_map(source, "u32", (32, 32))],
        block=64,
        grid=2,
        cluster=2,
        shared=2 * STAGE + 64,
        target="sm_90a",
    )


multicast = _base("multicast", _multicast)

# ---- bulk copies between shared memories of a cluster ---------------------------------------------------------------


def _exchange() -> Small:
    """Each CTA of two writes 512 bytes with plain stores and sends them to the other."""
    source = aligned(np.random.default_rng(2).integers(0, 2**32, (2, 128), dtype=U32))
    out = aligned(np.zeros((2, 128), U32))
    body = f"""
@!%first bra READY;
mbarrier.init.shared::cta.b64 [%sm], 1;
fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%sm], 512;
READY:
shl.b32 %r1, %lane, 4;
shl.b32 %r2, %rank, 9;
add.u32 %r2, %r2, %r1;
cvt.u64.u32 %d0, %r2;
add.u64 %d1, %g0, %d0;
ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d1];
add.u32 %r3, %sm, %r1;
st.shared.v4.b32 [%r3+1024], {{%r10, %r11, %r12, %r13}};
fence.proxy.async.shared::cta;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
xor.b32 %r4, %rank, 1;
mapa.shared::cluster.u32 %r5, %sm, %r4;
add.u32 %r6, %r5, 2048;
add.u32 %r7, %sm, 1024;
mov.b32 %r8, 512;
@%first cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r6], [%r7], %r8, [%r5];
{wait("%sm", 0)}
ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r3+2048];
add.u64 %d2, %g1, %d0;
st.global.v4.b32 [%d2], {{%r20, %r21, %r22, %r23}};
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
"""
    return Small(body, [source], [out], [source[::-1]], grid=2, cluster=2, shared=4096, target="sm_90a")


exchange = _base("exchange", _exchange)

# ---- cp.async -------------------------------------------------------------------------------------------------------


def _cp_async() -> Small:
    """Two buffers; each thread reads what a thread of the other warp copied."""
    source = aligned(np.random.default_rng(3).integers(0, 2**32, (STEPS, 64, 4), dtype=U32))
    out = aligned(np.zeros_like(source))
    lines = []
    for step in range(STEPS):
        if step == 0:
            lines += ["cp.async.cg.shared.global [%r2], [%d1], 16;", "cp.async.commit_group;"]
        if step + 1 < STEPS:
            lines += [
                f"cp.async.cg.shared.global [%r2+{(step + 1) % 2 * 1024}], [%d1+{(step + 1) * 1024}], 16;",
                "cp.async.commit_group;",
            ]
        lines += [
            f"cp.async.wait_group {int(step + 1 < STEPS)};",
            "bar.sync 0;",
            f"ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r3+{step % 2 * 1024}];",
            f"st.global.v4.b32 [%d2+{step * 1024}], {{%r10, %r11, %r12, %r13}};",
            "bar.sync 0;",
        ]
    body = """
shl.b32 %r1, %tid, 4;
add.s32 %r2, %sm, %r1;
cvt.u64.u32 %d0, %r1;
add.u64 %d1, %g0, %d0;
xor.b32 %r4, %r1, 512;
add.s32 %r3, %sm, %r4;
cvt.u64.u32 %d0, %r4;
add.u64 %d2, %g1, %d0;
""" + "\n".join(lines)
    return Small(body, [source], [out], [source], block=64, target="sm_90a")


cp_async = _base("cp.async", _cp_async)

# ---- reductions -----------------------------------------------------------------------------------------------------


def _reduction() -> Small:
    """Two CTAs add all their numbers to one, and their vectors to one vector."""
    source = aligned(np.random.default_rng(4).integers(-50, 50, (2, 128)).astype(F32))
    total, vector = aligned(np.zeros(1, F32)), aligned(np.zeros(128, F32))
    rounds = "\n".join(
        f"shfl.sync.bfly.b32 %r5, %r3, {distance}, 31, -1;\nadd.f32 %r3, %r3, %r5;" for distance in (16, 8, 4, 2, 1)
    )
    body = f"""
shl.b32 %r1, %tid, 2;
mov.u32 %r2, %ctaid.x;
shl.b32 %r2, %r2, 9;
add.u32 %r2, %r2, %r1;
cvt.u64.u32 %d0, %r2;
add.u64 %d0, %d0, %g0;
ld.global.b32 %r3, [%d0];
add.s32 %r4, %sm, %r1;
st.shared.b32 [%r4+1024], %r3;
{rounds}
setp.eq.u32 %p1, %lane, 0;
shl.b32 %r6, %warp, 2;
add.s32 %r6, %r6, %sm;
@%p1 st.shared.b32 [%r6], %r3;
fence.proxy.async.shared::cta;
bar.sync 0, 128;
@!%first bra OVER;
ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%sm];
add.f32 %r10, %r10, %r11;
add.f32 %r12, %r12, %r13;
add.f32 %r10, %r10, %r12;
red.global.add.f32 [%g1], %r10;
add.s32 %r7, %sm, 1024;
mov.b32 %r8, 512;
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%g2], [%r7], %r8;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0;
OVER:
"""
    return Small(
        body, [source], [], [source.sum(), source.sum(0)], sums=[total, vector], block=128, grid=2, target="sm_90a"
    )


reduction = _base("reduction", _reduction)

# ---- tcgen05 of a pair of CTAs --------------------------------------------------------------------------------------

A_BYTES, B_BYTES = 128 * 128, 32 * 128
PAIR_BARRIERS = A_BYTES + B_BYTES


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return aligned((values.astype(F32).view(U32) >> 16).astype(np.uint16))


def _pair() -> Small:
    """D (256, 64) = A B^T in bf16, K 128 in two steps; each CTA loads half of A and half of B."""
    rng = np.random.default_rng(5)
    a, b = rng.integers(-8, 8, (256, 128)).astype(F32), rng.integers(-8, 8, (64, 128)).astype(F32)
    a_bits, b_bits = _bfloat16(a), _bfloat16(b)
    out = aligned(np.zeros((256, 64), F32))
    full, empty, done, address = (PAIR_BARRIERS + 8 * i for i in range(4))
    # D is F32, A and B are BF16; 128-byte swizzle, 8 rows in 1024 bytes.
    idesc = 1 << 4 | 1 << 7 | 1 << 10 | 64 >> 3 << 17 | 256 >> 4 << 24
    desc = 1024 >> 4 << 32 | 1 << 46 | 2 << 61
    mmas = "\n".join(
        f"add.s64 %d5, %d3, {2 * i};\nadd.s64 %d6, %d4, {2 * i};\n"
        f"tcgen05.mma.cta_group::2.kind::f16 [%r10], %d5, %d6, %r9, %p5;\nsetp.eq.u32 %p5, %r1, %r1;"
        for i in range(4)
    )
    words = ", ".join(f"%f{i}" for i in range(64))
    stores = "\n".join(
        f"st.global.v4.b32 [%d8+{16 * i}], {{{', '.join(f'%f{4 * i + j}' for j in range(4))}}};" for i in range(16)
    )
    load = (
        "cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[{}], [%m{}, {{%r5, {}}}], [%r3];"
    )
    body = f"""
.reg .b32 %f<64>;
setp.eq.u32 %p1, %warp, 0;
@!%p1 bra SETUP;
mov.b32 %r20, 64;
tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%sm+{address}], %r20;
tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;
@!%first bra SETUP;
mbarrier.init.shared::cta.b64 [%sm+{full}], 1;
mbarrier.init.shared::cta.b64 [%sm+{empty}], 1;
mbarrier.init.shared::cta.b64 [%sm+{done}], 1;
fence.mbarrier_init.release.cluster;
SETUP:
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
tcgen05.fence::after_thread_sync;
ld.shared.b32 %r10, [%sm+{address}];
mov.b32 %r1, 0;
setp.ne.u32 %p2, %lane, 0;
@%p2 bra EPILOGUE;
setp.gt.u32 %p3, %warp, 1;
@%p3 bra EPILOGUE;
setp.eq.u32 %p4, %rank, 0;
@%p1 bra MULTIPLY;
LOAD:
xor.b32 %r2, %r1, 1;
add.s32 %r6, %sm, {empty};
{wait("%r6", "%r2")}
add.s32 %r3, %sm, {full};
@%p4 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {2 * (A_BYTES + B_BYTES)};
and.b32 %r3, %r3, 0xFEFFFFFF;
shl.b32 %r5, %r1, 6;
shl.b32 %r7, %rank, 7;
shl.b32 %r8, %rank, 5;
add.s32 %r4, %sm, {A_BYTES};
{load.format("%sm", 0, "%r7")}
{load.format("%r4", 1, "%r8")}
add.s32 %r1, %r1, 1;
setp.lt.u32 %p6, %r1, 2;
@%p6 bra LOAD;
bra EPILOGUE;
MULTIPLY:
@!%p4 bra EPILOGUE;
mov.b32 %r9, {idesc};
shr.u32 %r11, %sm, 4;
and.b32 %r11, %r11, 0x3FFF;
cvt.u64.u32 %d3, %r11;
or.b64 %d3, %d3, {desc};
add.s64 %d4, %d3, {A_BYTES >> 4};
add.s32 %r12, %sm, {full};
add.s32 %r13, %sm, {empty};
add.s32 %r14, %sm, {done};
mov.b16 %h1, 3;
setp.ne.u32 %p5, %r1, %r1;
NEXT:
{wait("%r12", "%r1")}
tcgen05.fence::after_thread_sync;
{mmas}
tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r13], %h1;
add.s32 %r1, %r1, 1;
setp.lt.u32 %p6, %r1, 2;
@%p6 bra NEXT;
tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r14], %h1;
EPILOGUE:
add.s32 %r14, %sm, {done};
{wait("%r14", 0)}
tcgen05.fence::after_thread_sync;
shl.b32 %r15, %warp, 21;
add.s32 %r15, %r15, %r10;
tcgen05.ld.sync.aligned.32x32b.x64.b32 {{{words}}}, [%r15];
tcgen05.wait::ld.sync.aligned;
shl.b32 %r16, %rank, 7;
add.s32 %r16, %r16, %tid;
mul.wide.u32 %d7, %r16, 256;
add.u64 %d8, %g2, %d7;
{stores}
tcgen05.fence::before_thread_sync;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
@!%p1 bra END;
mov.b32 %r20, 64;
tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r10, %r20;
END:
"""
    return Small(
        body,
        [a_bits, b_bits],
        [out],
        [a @ b.T],
        maps=[_matrix_map(a_bits, "bf16", (64, 128), 3), _matrix_map(b_bits, "bf16", (64, 32), 3)],
        block=128,
        grid=2,
        cluster=2,
        shared=PAIR_BARRIERS + 64,
    )


pair = _base("pair of CTAs", _pair)

# ---- wgmma ----------------------------------------------------------------------------------------------------------

WGMMA_STAGE = 10240


def _wgmma() -> Small:
    """D (64, 8) = A B^T in bf16, K 256 in four steps; a warpgroup loads, another multiplies."""
    rng = np.random.default_rng(6)
    a, b = rng.integers(-8, 8, (64, 256)).astype(F32), rng.integers(-8, 8, (8, 256)).astype(F32)
    a_bits, b_bits = _bfloat16(a), _bfloat16(b)
    out = aligned(np.zeros((64, 8), F32))
    desc = 1024 >> 4 << 32 | 1 << 62
    barriers = 2 * WGMMA_STAGE
    load = (
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[{}], [%m{}, {{%r8, %r9}}], [%r5];"
    )
    mmas = "\n".join(
        f"add.s64 %d5, %d3, {2 * i};\nadd.s64 %d6, %d4, {2 * i};\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, %d5, %d6, %p5, 1, 1, 0, 0;\n"
        "setp.eq.u32 %p5, %r1, %r1;"
        for i in range(4)
    )
    body = f"""
@!%first bra READY;
mbarrier.init.shared::cta.b64 [%sm+{barriers}], 1;
mbarrier.init.shared::cta.b64 [%sm+{barriers + 8}], 1;
mbarrier.init.shared::cta.b64 [%sm+{barriers + 16}], 4;
mbarrier.init.shared::cta.b64 [%sm+{barriers + 24}], 4;
fence.mbarrier_init.release.cluster;
READY:
bar.sync 0;
mov.b32 %r1, 0;
setp.gt.u32 %p1, %warp, 3;
@%p1 bra CONSUME;
setmaxnreg.dec.sync.aligned.u32 40;
@!%first bra OVER;
mov.b32 %r9, 0;
LOAD:
and.b32 %r2, %r1, 1;
shr.u32 %r3, %r1, 1;
xor.b32 %r3, %r3, 1;
shl.b32 %r4, %r2, 3;
add.s32 %r4, %r4, %sm;
add.s32 %r5, %r4, {barriers + 16};
{wait("%r5", "%r3")}
add.s32 %r5, %r4, {barriers};
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 9216;
mul.lo.u32 %r6, %r2, {WGMMA_STAGE};
add.s32 %r6, %r6, %sm;
add.s32 %r7, %r6, 8192;
shl.b32 %r8, %r1, 6;
{load.format("%r6", 0)}
{load.format("%r7", 1)}
add.s32 %r1, %r1, 1;
setp.lt.u32 %p3, %r1, 4;
@%p3 bra LOAD;
bra OVER;
CONSUME:
setmaxnreg.inc.sync.aligned.u32 216;
mov.b32 %r20, 0;
mov.b32 %r21, 0;
mov.b32 %r22, 0;
mov.b32 %r23, 0;
setp.ne.u32 %p5, %r1, %r1;
NEXT:
and.b32 %r2, %r1, 1;
shr.u32 %r3, %r1, 1;
shl.b32 %r4, %r2, 3;
add.s32 %r4, %r4, %sm;
add.s32 %r5, %r4, {barriers};
{wait("%r5", "%r3")}
mul.lo.u32 %r6, %r2, {WGMMA_STAGE};
add.s32 %r6, %r6, %sm;
shr.u32 %r7, %r6, 4;
and.b32 %r7, %r7, 0x3FFF;
cvt.u64.u32 %d3, %r7;
or.b64 %d3, %d3, {desc};
add.s64 %d4, %d3, 512;
wgmma.fence.sync.aligned;
{mmas}
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
setp.ne.u32 %p6, %lane, 0;
@%p6 bra FREED;
mbarrier.arrive.shared::cta.b64 _, [%r4+{barriers + 16}];
FREED:
add.s32 %r1, %r1, 1;
setp.lt.u32 %p3, %r1, 4;
@%p3 bra NEXT;
and.b32 %r10, %warp, 3;
shl.b32 %r10, %r10, 4;
shr.u32 %r11, %lane, 2;
add.s32 %r10, %r10, %r11;
shl.b32 %r10, %r10, 5;
and.b32 %r11, %lane, 3;
shl.b32 %r11, %r11, 3;
add.s32 %r10, %r10, %r11;
cvt.u64.u32 %d7, %r10;
add.u64 %d7, %d7, %g2;
st.global.v2.b32 [%d7], {{%r20, %r21}};
st.global.v2.b32 [%d7+256], {{%r22, %r23}};
OVER:
"""
    return Small(
        body,
        [a_bits, b_bits],
        [out],
        [a @ b.T],
        maps=[_matrix_map(a_bits, "bf16", (64, 64), 3), _matrix_map(b_bits, "bf16", (64, 8), 3)],
        block=256,
        directives=".maxnreg 128",
        shared=2 * WGMMA_STAGE + 64,
        target="sm_90a",
    )


wgmma = _base("wgmma", _wgmma)

# ---- a tensor map changed on the device -----------------------------------------------------------------------------


def _device_map() -> Small:
    """A warp points a map in global memory to another tensor and loads with it."""
    source = aligned(np.random.default_rng(8).integers(0, 2**32, (16, 32), dtype=U32))
    out = aligned(np.zeros((16, 32), U32))
    template = tensormap.TensorMap(4096, "u32", (32, 4), (128,), (32, 16), (1, 1))
    table = aligned(np.frombuffer(tensormap.encode(template), U32).copy())
    place = aligned(np.zeros(32, U32))
    copies = "\n".join(
        f"ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r6+{512 * i}];\n"
        f"st.global.v4.b32 [%d3+{512 * i}], {{%r10, %r11, %r12, %r13}};"
        for i in range(4)
    )
    body = f"""
@%first mbarrier.init.shared::cta.b64 [%sm], 1;
@%first fence.mbarrier_init.release.cluster;
shl.b32 %r1, %lane, 2;
cvt.u64.u32 %d0, %r1;
add.u64 %d1, %g0, %d0;
ld.global.b32 %r2, [%d1];
add.s32 %r3, %sm, 1024;
add.s32 %r4, %r3, %r1;
st.shared.b32 [%r4], %r2;
bar.warp.sync -1;
@%first tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r3], %g1;
@%first tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r3], 1, 16;
bar.warp.sync -1;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%g3], [%r3], 128;
fence.proxy.tensormap::generic.acquire.gpu [%g3], 128;
mov.b32 %r5, 0;
add.s32 %r6, %sm, 2048;
@%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [%sm], 2048;
@%first cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r6], [%g3, {{%r5, %r5}}], [%sm];
{wait("%sm", 0)}
shl.b32 %r7, %lane, 4;
add.s32 %r6, %r6, %r7;
cvt.u64.u32 %d2, %r7;
add.u64 %d3, %g2, %d2;
{copies}
"""
    return Small(body, [table, source], [out], [source, None], sums=[place], target="sm_90a")


device_map = _base("device's map", _device_map)
ALL = (multicast, exchange, cp_async, reduction, pair, wgmma, device_map)
