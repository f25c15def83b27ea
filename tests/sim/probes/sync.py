"""Probes of mbarriers, cp.async, named barriers and fences inside one CTA."""

from collections.abc import Iterator

import numpy as np

from .kit import (
    Case,
    copy_in,
    dump_shared,
    fill_shared,
    init_barrier,
    kernel,
    random_bytes,
    sentinel,
    status,
    store_status,
    wait_parity,
)

# An mbarrier script: what thread 0 does, step by step. After each step it asks both parities without waiting.
# B is the barrier's address; S0..S3 are state registers.
COMPLETE = "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [B], {};"
EXPECT = "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [B], {};"
ARRIVE = "mbarrier.arrive.shared.b64 S0, [B];"
ARRIVE_N = "mbarrier.arrive.shared.b64 S0, [B], {};"
ARRIVE_EXPECT = "mbarrier.arrive.expect_tx.shared.b64 S0, [B], {};"
NO_COMPLETE = "mbarrier.arrive.noComplete.shared.b64 S0, [B], {};"
DROP = "mbarrier.arrive_drop.shared.b64 S0, [B];"
DROP_EXPECT = "mbarrier.arrive_drop.expect_tx.shared.b64 S0, [B], {};"
INIT = "mbarrier.init.shared.b64 [B], {};"
INVAL = "mbarrier.inval.shared.b64 [B];"

SCRIPTS: dict[str, list[str]] = {
    "arrivals": [INIT.format(3), *[ARRIVE] * 7, ARRIVE_N.format(2)],
    "one_arrival": [INIT.format(1), *[ARRIVE] * 5],
    "expect_then_complete": [
        INIT.format(1),
        EXPECT.format(64),
        ARRIVE,
        COMPLETE.format(32),
        COMPLETE.format(32),
        ARRIVE,
        ARRIVE_EXPECT.format(16),
        COMPLETE.format(16),
    ],
    "arrive_expect": [
        INIT.format(2),
        ARRIVE_EXPECT.format(128),
        ARRIVE,
        COMPLETE.format(64),
        COMPLETE.format(64),
        ARRIVE,
        ARRIVE_EXPECT.format(0),
    ],
    "complete_before_expect": [
        INIT.format(1),
        COMPLETE.format(64),
        ARRIVE_EXPECT.format(64),
        COMPLETE.format(48),
        EXPECT.format(48),
        ARRIVE,
    ],
    "complete_before_expect_after_arrival": [
        INIT.format(2),
        COMPLETE.format(64),
        ARRIVE,
        EXPECT.format(32),
        ARRIVE_EXPECT.format(32),
        ARRIVE,
    ],
    "expect_after_last_transaction": [INIT.format(1), EXPECT.format(8), COMPLETE.format(8), ARRIVE, ARRIVE],
    "large_transactions": [
        INIT.format(1),
        ARRIVE_EXPECT.format(1048575),
        COMPLETE.format(1048574),
        COMPLETE.format(1),
    ],
    "arrive_counts": [INIT.format(5), ARRIVE_N.format(2), ARRIVE_N.format(3), ARRIVE_N.format(4), ARRIVE],
    "no_complete": [
        INIT.format(4),
        NO_COMPLETE.format(2),
        NO_COMPLETE.format(1),
        ARRIVE,
        NO_COMPLETE.format(3),
        ARRIVE,
    ],
    "drop": [INIT.format(3), DROP, ARRIVE, ARRIVE, ARRIVE, ARRIVE, DROP, ARRIVE, ARRIVE, ARRIVE],
    "drop_last_arrival": [INIT.format(2), ARRIVE, DROP, ARRIVE, ARRIVE],
    "drop_expect": [INIT.format(2), DROP_EXPECT.format(16), ARRIVE, COMPLETE.format(16), ARRIVE],
    "init_again": [INIT.format(1), ARRIVE, ARRIVE, ARRIVE, INVAL + INIT.format(2), ARRIVE, ARRIVE],
    "largest_count": [INIT.format(1048575), ARRIVE_N.format(1048574), ARRIVE, ARRIVE],
    "scoped_forms": [
        INIT.format(2),
        "mbarrier.arrive.release.cta.shared::cta.b64 S0, [B];",
        "mbarrier.arrive.release.cluster.shared::cta.b64 S0, [B];",
        "mbarrier.arrive.release.cta.shared::cta.b64 S0, [B], 2;",
        "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 S0, [B], 8;",
        COMPLETE.format(8),
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [B];",
    ],
}


def script_case(name: str, steps: list[str], raw: bool) -> Case:
    """Out, per step: both parities' answers, and the pending count of the last returned state."""
    lines = ["setp.ne.u32 %p0, %tix, 0;", "@%p0 bra END;", "mov.b64 %d10, 0;", "mov.b32 %r12, 0;"]
    for i, step in enumerate(steps):
        lines.append(step.replace("[B]", "[%smem]").replace("S0", "%d10").replace(";", ";\n"))
        if "%d10" in lines[-1]:
            lines.append("mbarrier.pending_count.b64 %r12, %d10;")
        lines += [
            "mbarrier.test_wait.parity.shared.b64 %p1, [%smem], 0;",
            "mbarrier.test_wait.parity.shared.b64 %p2, [%smem], 1;",
            "selp.b32 %r10, 1, 0, %p1;",
            "selp.b32 %r11, 2, 0, %p2;",
            "or.b32 %r10, %r10, %r11;",
            f"st.global.v2.b32 [%ptr0+{8 * i}], {{%r10, %r12}};",
        ]
        if raw:
            lines += ["ld.shared.b64 %d11, [%smem];", f"st.global.v2.b64 [%ptr1+{16 * i}], {{%d11, %d10}};"]
    lines.append("END:")
    buffers = {"out": np.zeros(2 * len(steps), dtype=np.uint32)}
    if raw:
        buffers["words"] = np.zeros(2 * len(steps), dtype=np.uint64)
    return Case(
        name=f"{'mbarrier_words' if raw else 'mbarrier'}/{name}",
        ptx=kernel("\n".join(lines), pointers=len(buffers)),
        buffers=buffers,
        outputs=("out",),
        info=("words",) if raw else (),
        shared_bytes=16,
        compared=not raw,
        note="the barrier's and the states' opaque words" if raw else "",
    )


def mbarrier_cases() -> Iterator[Case]:
    for name, steps in SCRIPTS.items():
        yield script_case(name, steps, raw=False)
        yield script_case(name, steps, raw=True)
    body = """
    setp.ne.u32 %p0, %tix, 0;
    @%p0 bra END;
    mbarrier.init.shared.b64 [%smem], 2;
    mbarrier.arrive.shared.b64 %d10, [%smem];
    mbarrier.test_wait.shared.b64 %p1, [%smem], %d10;
    selp.b32 %r10, 1, 0, %p1;
    mbarrier.arrive.shared.b64 %d11, [%smem];
    mbarrier.test_wait.shared.b64 %p1, [%smem], %d10;
    selp.b32 %r11, 1, 0, %p1;
    mbarrier.test_wait.shared.b64 %p1, [%smem], %d11;
    selp.b32 %r12, 1, 0, %p1;
    mbarrier.arrive.shared.b64 %d12, [%smem];
    mbarrier.test_wait.shared.b64 %p1, [%smem], %d12;
    selp.b32 %r13, 1, 0, %p1;
    mbarrier.test_wait.shared.b64 %p1, [%smem], %d11;
    selp.b32 %r14, 1, 0, %p1;
    mbarrier.try_wait.shared.b64 %p1, [%smem], %d11;
    selp.b32 %r15, 1, 0, %p1;
    mbarrier.try_wait.parity.shared.b64 %p1, [%smem], 0;
    selp.b32 %r16, 1, 0, %p1;
    mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p1, [%smem], 1, 100;
    selp.b32 %r17, 1, 0, %p1;
    st.global.v4.b32 [%ptr0], {%r10, %r11, %r12, %r13};
    st.global.v4.b32 [%ptr0+16], {%r14, %r15, %r16, %r17};
    END:
    """
    yield Case("mbarrier/state_tokens", kernel(body, pointers=1), {"out": sentinel(32)}, ("out",), shared_bytes=16)
    yield all_threads_arrive()
    yield ping_pong()


def all_threads_arrive() -> Case:
    """64 threads arrive, twice; half of them wait in between."""
    body = f"""
    {init_barrier("%smem", 64)}
    mbarrier.arrive.shared.b64 _, [%smem];
    {wait_parity("%smem", 0)}
    mbarrier.arrive.release.cta.shared::cta.b64 _, [%smem];
    {wait_parity("%smem", 1)}
    shl.b32 %r0, %tix, 2;
    cvt.u64.u32 %d1, %r0;
    add.u64 %d1, %d1, %ptr0;
    st.global.b32 [%d1], %stuck;
    """
    return Case(
        name="mbarrier/all_threads_arrive",
        ptx=kernel(body, pointers=1, threads=64),
        buffers={"out": sentinel(256)},
        outputs=("out",),
        block=64,
        shared_bytes=16,
        is_async=True,
    )


def ping_pong() -> Case:
    """Warp 0 writes a slot and signals `full`; warp 1 reads it and signals `empty`; six rounds over two slots."""
    producer, consumer = [], []
    for i in range(6):
        slot, parity = i % 2, (i // 2) % 2
        full, empty = f"%smem+{8 * slot}", f"%smem+{16 + 8 * slot}"
        producer.append(
            f"""
            {wait_parity(empty, 1 - parity)}
            mad.lo.u32 %r1, %tix, 100, {i};
            st.shared.b32 [%r0+{128 + 128 * slot}], %r1;
            mbarrier.arrive.shared.b64 _, [{full}];
            """
        )
        consumer.append(
            f"""
            {wait_parity(full, parity)}
            ld.shared.b32 %r1, [%r0+{128 * slot}];
            st.global.b32 [%d1+{128 * i}], %r1;
            mbarrier.arrive.shared.b64 _, [{empty}];
            """
        )
    body = f"""
    setp.eq.u32 %p30, %tix, 0;
    @%p30 mbarrier.init.shared.b64 [%smem], 32;
    @%p30 mbarrier.init.shared.b64 [%smem+8], 32;
    @%p30 mbarrier.init.shared.b64 [%smem+16], 32;
    @%p30 mbarrier.init.shared.b64 [%smem+24], 32;
    bar.sync 0;
    shl.b32 %r0, %tix, 2;
    cvt.u64.u32 %d0, %r0;
    add.u64 %d1, %ptr0, %d0;
    sub.u64 %d1, %d1, 128;
    add.u32 %r0, %r0, %smem;
    setp.lt.u32 %p0, %tix, 32;
    @%p0 bra PRODUCER;
    {"".join(consumer)}
    bra.uni END;
    PRODUCER:
    {"".join(producer)}
    END:
    """
    return Case(
        name="mbarrier/ping_pong",
        ptx=kernel(body, pointers=1, threads=64),
        buffers={"out": sentinel(128 * 6)},
        outputs=("out",),
        block=64,
        shared_bytes=512,
        is_async=True,
    )


def cp_async_cases() -> Iterator[Case]:
    forms: list[tuple[str, int, int | None]] = [("ca", 4, None), ("ca", 8, None), ("ca", 16, None), ("cg", 16, None)]
    forms += [("ca", 4, size) for size in (0, 1, 3)] + [("ca", 8, size) for size in (0, 5)]
    forms += [("cg", 16, size) for size in (0, 4, 7, 12, 16)] + [("ca", 16, 8)]
    for level, size, source_size in forms:
        operand = "" if source_size is None else f", {source_size}"
        body = f"""
        {fill_shared(1024, 32)}
        mul.lo.u32 %r0, %tix, {size * 2};
        add.u32 %r1, %smem, %r0;
        xor.b32 %r2, %tix, 5;
        mul.wide.u32 %d1, %r2, {size};
        add.u64 %d1, %d1, %ptr1;
        cp.async.{level}.shared.global [%r1], [%d1], {size}{operand};
        cp.async.commit_group;
        cp.async.wait_group 0;
        {dump_shared("%ptr0", 1024, 32)}
        """
        yield Case(
            name=f"cp_async/{level}_{size}" + ("" if source_size is None else f"_source{source_size}"),
            ptx=kernel(body, pointers=2),
            buffers={"out": sentinel(1024), "source": random_bytes(201, 512)},
            outputs=("out",),
            shared_bytes=1024,
            is_async=True,
        )
    yield cp_async_register_size()
    yield cp_async_groups()
    yield from cp_async_mbarrier()


def cp_async_register_size() -> Case:
    """The source size in a register, different per lane: the predicated gather of a ragged tile."""
    body = f"""
    {fill_shared(512, 32)}
    shl.b32 %r0, %tix, 4;
    add.u32 %r1, %smem, %r0;
    cvt.u64.u32 %d1, %r0;
    add.u64 %d1, %d1, %ptr1;
    min.u32 %r3, %tix, 16;
    cp.async.cg.shared.global.L2::128B [%r1], [%d1], 16, %r3;
    cp.async.wait_all;
    {dump_shared("%ptr0", 512, 32)}
    """
    return Case(
        name="cp_async/size_in_register",
        ptx=kernel(body, pointers=2),
        buffers={"out": sentinel(512), "source": random_bytes(202, 512)},
        outputs=("out",),
        shared_bytes=512,
        is_async=True,
    )


def cp_async_groups() -> Case:
    """Four groups in flight; each is read after the wait that covers it."""
    copies, reads = [], []
    for i in range(4):
        copies.append(
            f"cp.async.ca.shared.global [%r1+{128 * i}], [%d1+{128 * i}], 4;\n"
            + ("" if i == 2 else "cp.async.commit_group;")
        )
    for i, pending in enumerate((2, 1, 1, 0)):  # copies 2 and 3 form one group
        reads.append(
            f"cp.async.wait_group {pending};\nld.shared.b32 %r2, [%r1+{128 * i}];\nst.global.b32 [%d2+{128 * i}], %r2;"
            if i != 2
            else "cp.async.commit_group;"
        )
    reads.append("ld.shared.b32 %r2, [%r1+256];\nst.global.b32 [%d2+256], %r2;")
    body = f"""
    shl.b32 %r0, %tix, 2;
    add.u32 %r1, %smem, %r0;
    cvt.u64.u32 %d0, %r0;
    add.u64 %d1, %d0, %ptr1;
    add.u64 %d2, %d0, %ptr0;
    {chr(10).join(copies)}
    {chr(10).join(reads)}
    """
    return Case(
        name="cp_async/groups",
        ptx=kernel(body, pointers=2),
        buffers={"out": sentinel(512), "source": random_bytes(203, 512)},
        outputs=("out",),
        shared_bytes=512,
        is_async=True,
    )


def cp_async_mbarrier() -> Iterator[Case]:
    """With .noinc the copy's arrival counts against the barrier; without, the thread arrives itself as well."""
    for noinc in (True, False):
        own = "" if noinc else "mbarrier.arrive.shared.b64 _, [%smem];"
        body = f"""
        {init_barrier("%smem", 32)}
        shl.b32 %r0, %tix, 4;
        add.u32 %r1, %smem, %r0;
        cvt.u64.u32 %d1, %r0;
        add.u64 %d1, %d1, %ptr1;
        cp.async.cg.shared.global [%r1+128], [%d1], 16;
        cp.async.mbarrier.arrive{".noinc" if noinc else ""}.shared.b64 [%smem];
        {own}
        {wait_parity("%smem", 0)}
        {dump_shared("%ptr0", 512, 32, 128)}
        {store_status("%ptr2")}
        """
        yield Case(
            name=f"cp_async/mbarrier_arrive{'_noinc' if noinc else ''}",
            ptx=kernel(body, pointers=3),
            buffers={"out": sentinel(512), "source": random_bytes(204, 512), "status": status()},
            outputs=("out", "status"),
            shared_bytes=640,
            is_async=True,
        )


def named_barrier_cases() -> Iterator[Case]:
    """Three warps: one hands values to the others through bar.arrive / bar.sync, then reductions over the CTA."""
    body = """
    shl.b32 %r0, %tix, 2;
    add.u32 %r1, %smem, %r0;
    cvt.u64.u32 %d1, %r0;
    add.u64 %d1, %d1, %ptr0;
    setp.lt.u32 %p0, %tix, 32;
    @!%p0 bra READERS;
    mul.lo.u32 %r2, %tix, 3;
    st.shared.b32 [%r1], %r2;
    bar.arrive 1, 96;
    bra.uni JOIN;
    READERS:
    bar.sync 1, 96;
    and.b32 %r3, %r0, 127;
    add.u32 %r3, %r3, %smem;
    ld.shared.b32 %r2, [%r3];
    add.u32 %r2, %r2, 1000;
    bar.sync 2, 64;
    JOIN:
    st.global.b32 [%d1], %r2;
    rem.u32 %r4, %tix, 3;
    setp.eq.u32 %p1, %r4, 0;
    bar.red.popc.u32 %r5, 3, 96, %p1;
    bar.red.and.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 0, %p1;
    selp.b32 %r6, 100, 0, %p2;
    selp.b32 %r7, 1000, 0, %p3;
    add.u32 %r5, %r5, %r6;
    add.u32 %r5, %r5, %r7;
    st.global.b32 [%d1+384], %r5;
    barrier.sync 4, 96;
    barrier.cta.sync 5;
    """
    yield Case(
        name="barrier/named",
        ptx=kernel(body, pointers=1, threads=96),
        buffers={"out": sentinel(768)},
        outputs=("out",),
        block=96,
        shared_bytes=128,
    )


def fence_cases() -> Iterator[Case]:
    """Fences have no visible result; this shows that each form is accepted, around a copy that needs one of them."""
    fences = """
    fence.proxy.async;
    fence.proxy.async.global;
    fence.proxy.async.shared::cta;
    fence.mbarrier_init.release.cluster;
    fence.acq_rel.cta;
    fence.acq_rel.cluster;
    fence.acq_rel.gpu;
    fence.acq_rel.sys;
    fence.sc.cta;
    fence.sc.gpu;
    fence.proxy.alias;
    fence.proxy.tensormap::generic.release.gpu;
    membar.cta;
    membar.gl;
    bar.warp.sync 0xffffffff;
    """
    body = f"""
    {copy_in("%ptr1", 512, 32)}
    {fences}
    setp.eq.u32 %p0, %tix, 0;
    mov.b32 %r1, 512;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%ptr0], [%smem], %r1;
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group.read 0;
    """
    yield Case(
        name="fence/forms",
        ptx=kernel(body, pointers=2),
        buffers={"out": sentinel(512), "source": random_bytes(205, 512)},
        outputs=("out",),
        shared_bytes=512,
        is_async=True,
    )


def cases() -> Iterator[Case]:
    yield from mbarrier_cases()
    yield from cp_async_cases()
    yield from named_barrier_cases()
    yield from fence_cases()
