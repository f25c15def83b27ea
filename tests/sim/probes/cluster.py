"""Probes of clusters: addresses, remote shared memory, remote arrivals, multicast, special registers."""

from collections.abc import Iterator

import numpy as np

from .kit import (
    Case,
    coordinates,
    dump_shared,
    fill_shared,
    init_barrier,
    kernel,
    random_bytes,
    sentinel,
    status,
    store_status,
    wait_parity,
    words,
)
from .tma import counting, dense

SYNC = """
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
"""
SPECIAL = words(
    "tid.x tid.y tid.z ntid.x ntid.y ntid.z ctaid.x ctaid.y ctaid.z nctaid.x nctaid.y nctaid.z laneid "
    "clusterid.x clusterid.y clusterid.z nclusterid.x nclusterid.y nclusterid.z "
    "cluster_ctaid.x cluster_ctaid.y cluster_ctaid.z cluster_nctaid.x cluster_nctaid.y cluster_nctaid.z "
    "cluster_ctarank cluster_nctarank lanemask_eq lanemask_le lanemask_lt lanemask_ge lanemask_gt "
    "dynamic_smem_size"
)


def special_register_cases() -> Iterator[Case]:
    shapes = (
        ("single", (3, 2, 2), (1, 1, 1)),
        ("x2", (4, 2, 1), (2, 1, 1)),
        ("y2", (2, 4, 1), (1, 2, 1)),
        ("x2y2", (4, 2, 2), (2, 2, 1)),
        ("x4", (8, 1, 1), (4, 1, 1)),
        ("x2z2", (2, 2, 4), (2, 1, 2)),
    )
    for name, grid, cluster in shapes:
        loads = "\n".join(
            f"mov.u32 %r10, %{register};\nst.global.b32 [%d1+{4 * i}], %r10;" for i, register in enumerate(SPECIAL)
        )
        slot = 4 * (len(SPECIAL) + 1)
        body = f"""
        mov.u32 %r0, %ctaid.z;
        mov.u32 %r1, %nctaid.y;
        mov.u32 %r2, %ctaid.y;
        mad.lo.u32 %r0, %r0, %r1, %r2;
        mov.u32 %r1, %nctaid.x;
        mov.u32 %r2, %ctaid.x;
        mad.lo.u32 %r0, %r0, %r1, %r2;
        mul.wide.u32 %d1, %r0, {slot};
        add.u64 %d1, %d1, %ptr0;
        setp.ne.u32 %p0, %tix, 37;
        @%p0 bra END;
        {loads}
        mov.pred %p1, %is_explicit_cluster;
        selp.b32 %r10, 1, 0, %p1;
        st.global.b32 [%d1+{slot - 4}], %r10;
        END:
        """
        yield Case(
            name=f"special_registers/{name}",
            ptx=kernel(body, pointers=1, threads=64, shared=False),
            buffers={"out": sentinel(slot * grid[0] * grid[1] * grid[2])},
            outputs=("out",),
            grid=grid,
            block=64,
            cluster=cluster,
            shared_bytes=512,
        )


def address_cases() -> Iterator[Case]:
    """mapa, getctarank and the address windows: which bits name the CTA of a cluster?"""
    for size in (1, 2, 4):
        own = 16 * size + 32
        body = "mov.u32 %r50, %ctaid.x;\nmul.wide.u32 %d1, %r50, " + f"{own};\nadd.u64 %d1, %d1, %ptr0;\n"
        body += "setp.ne.u32 %p0, %tix, 0;\n@%p0 bra END;\n"
        for peer in range(size):
            body += f"""
            mapa.shared::cluster.u32 %r1, %smem, {peer};
            getctarank.shared::cluster.u32 %r2, %r1;
            mov.b32 %r3, {peer};
            mapa.shared::cluster.u32 %r4, %r1, %r3;
            add.u32 %r5, %smem, 0x1234;
            mapa.shared::cluster.u32 %r5, %r5, {peer};
            sub.u32 %r5, %r5, %r1;
            st.global.v4.b32 [%d1+{16 * peer}], {{%r1, %r2, %r4, %r5}};
            """
        body += f"""
        getctarank.shared::cluster.u32 %r2, %smem;
        cvt.u64.u32 %d3, %smem;
        cvta.shared.u64 %d2, %d3;
        cvta.to.shared.u64 %d4, %d2;
        cvt.u32.u64 %r4, %d4;
        mapa.u64 %d5, %d2, 0;
        getctarank.u64 %r3, %d5;
        isspacep.shared %p1, %d2;
        selp.b32 %r5, 1, 0, %p1;
        isspacep.shared::cluster %p1, %d5;
        selp.b32 %r6, 2, 0, %p1;
        isspacep.global %p1, %ptr0;
        selp.b32 %r7, 4, 0, %p1;
        isspacep.global %p1, %d2;
        selp.b32 %r8, 8, 0, %p1;
        or.b32 %r5, %r5, %r6;
        or.b32 %r5, %r5, %r7;
        or.b32 %r5, %r5, %r8;
        st.global.v4.b32 [%d1+{16 * size}], {{%smem, %r2, %r3, %r4}};
        st.global.b32 [%d1+{16 * size + 16}], %r5;
        END:
        {SYNC}
        """
        yield Case(
            name=f"cluster_address/{size}",
            ptx=kernel(body, pointers=1),
            buffers={"out": np.zeros(own * size, dtype=np.uint8)},
            outputs=("out",),
            grid=(size, 1, 1),
            cluster=(size, 1, 1),
            shared_bytes=8192,
        )


def remote_memory_cases() -> Iterator[Case]:
    """ld, st, atom, red through shared::cluster, then st.async and red.async with their barrier."""
    size = 2
    body = f"""
    {fill_shared(1024, 32)}
    mov.u32 %r50, %cluster_ctarank;
    xor.b32 %r51, %r50, 1;
    shl.b32 %r0, %tix, 2;
    add.u32 %r1, %smem, %r0;
    mad.lo.u32 %r2, %r50, 1000, %tix;
    st.shared.b32 [%r1], %r2;
    mov.b32 %r3, 0;
    st.shared.b32 [%r1+128], %r3;
    {SYNC}
    mapa.shared::cluster.u32 %r10, %r1, %r51;
    ld.shared::cluster.b32 %r11, [%r10];
    add.u32 %r12, %r11, 7;
    st.shared::cluster.b32 [%r10+256], %r12;
    atom.shared::cluster.add.u32 %r13, [%r10+128], 5;
    mapa.shared::cluster.u32 %r14, %smem, %r51;
    red.shared::cluster.add.u32 [%r14+384], %tix;
    {SYNC}
    st.shared.b32 [%r1+512], %r11;
    st.shared.b32 [%r1+640], %r13;
    {dump_shared("%ptr0", 1024, 32, cta=True)}
    """
    yield Case(
        name="cluster_memory/plain",
        ptx=kernel(body, pointers=1),
        buffers={"out": sentinel(1024 * size)},
        outputs=("out",),
        grid=(size, 1, 1),
        cluster=(size, 1, 1),
        shared_bytes=1024,
        is_async=True,
    )
    forms = {
        "b32": (4, "%r2"),
        "b64": (8, "%d2"),
        "v2.b32": (8, "{%r2, %r3}"),
        "v4.b32": (16, "{%r2, %r3, %r4, %r5}"),
        "v2.b64": (16, "{%d2, %d3}"),
    }
    for form, (width, value) in forms.items():
        stride = max(width, 4)
        opcode = "st.async.shared::cluster.mbarrier::complete_tx::bytes"
        body = f"""
        {fill_shared(1024, 32)}
        add.u32 %r40, %smem, 1024;
        {init_barrier("%r40")}
        mov.u32 %r50, %cluster_ctarank;
        xor.b32 %r51, %r50, 1;
        mad.lo.u32 %r2, %r50, 1000, %tix;
        add.u32 %r3, %r2, 11000;
        add.u32 %r4, %r2, 22000;
        add.u32 %r5, %r2, 33000;
        mov.b64 %d2, {{%r2, %r3}};
        mov.b64 %d3, {{%r4, %r5}};
        @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%r40], {32 * width};
        {SYNC}
        mul.lo.u32 %r0, %tix, {stride};
        add.u32 %r0, %r0, %smem;
        mapa.shared::cluster.u32 %r10, %r0, %r51;
        mapa.shared::cluster.u32 %r11, %r40, %r51;
        {opcode}.{form} [%r10], {value}, [%r11];
        {wait_parity("%r40", 0)}
        {dump_shared("%ptr0", 1024, 32, cta=True)}
        {store_status("%ptr1")}
        {SYNC}
        """
        yield Case(
            name=f"cluster_memory/st_async_{form}",
            ptx=kernel(body, pointers=2),
            buffers={"out": sentinel(2048), "status": status(2)},
            outputs=("out", "status"),
            grid=(2, 1, 1),
            cluster=(2, 1, 1),
            shared_bytes=1040,
            is_async=True,
        )


def remote_arrive_cases() -> Iterator[Case]:
    """Every CTA of the cluster arrives on CTA 0's barrier; CTA 0 waits and reports its probes before and after."""
    forms = {
        "release_cluster": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r11];",
        "release_cluster_count": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r11], 1;",
        "shared_cluster": "mbarrier.arrive.shared::cluster.b64 _, [%r11];",
        "expect_tx": "mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r11], 16;\n"
        "mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%r11], 16;",
        "drop": "mbarrier.arrive_drop.release.cluster.shared::cluster.b64 _, [%r11];\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r11];",
    }
    for name, arrive in forms.items():
        for size in (2, 4):
            body = f"""
            {init_barrier("%smem", 2 * size if name == "drop" else size)}
            {SYNC}
            mov.u32 %r50, %cluster_ctarank;
            mapa.shared::cluster.u32 %r11, %smem, 0;
            setp.ne.u32 %p0, %tix, 0;
            @%p0 bra JOIN;
            {"".join(line + chr(10) for line in arrive.splitlines())}
            JOIN:
            setp.ne.u32 %p0, %r50, 0;
            @%p0 bra LEAVE;
            {wait_parity("%smem", 0)}
            mbarrier.test_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%smem], 0;
            mbarrier.test_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%smem], 1;
            selp.b32 %r1, 1, 0, %p1;
            selp.b32 %r2, 2, 0, %p2;
            setp.eq.u32 %p3, %tix, 0;
            @%p3 st.global.v4.b32 [%ptr0], {{%r1, %r2, %stuck, %r50}};
            LEAVE:
            {SYNC}
            """
            yield Case(
                name=f"cluster_arrive/{name}_{size}",
                ptx=kernel(body, pointers=1),
                buffers={"out": sentinel(16)},
                outputs=("out",),
                grid=(size, 1, 1),
                cluster=(size, 1, 1),
                shared_bytes=16,
                is_async=True,
            )


def multicast(
    name: str, size: int, issues: dict[int, tuple[int, int]], swizzle: str = "128", clusters: int = 1
) -> Case:
    """Load with multicast. `issues`: issuing CTA rank -> (mask of receivers, first row). A box is 8 rows of 128 bytes.

    The box lands at the issuer's shared offset (1024 * (1 + the issue's position)) in every receiver, and the bytes count
    on the barrier at the same offset there.
    """
    tensor = dense("u16", (64, 64), (64, 8), swizzle=swizzle)
    expected = [sum(1024 for mask, _ in issues.values() if mask >> rank & 1) for rank in range(size)]
    parts = []
    for position, (rank, (mask, row)) in enumerate(issues.items()):
        moves, names = coordinates((0, row))
        parts.append(
            f"""
            setp.eq.u32 %p1, %r50, {rank};
            and.pred %p1, %p1, %p30;
            {moves}
            add.u32 %r1, %smem, {1024 * (1 + position)};
            mov.b16 %h1, {mask};
            @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster \
[%r1], [%map0, {names}], [%smem], %h1;
            """
        )
    region = 1024 * len(issues)
    bytes_of_rank = "\n".join(
        f"setp.eq.u32 %p2, %r50, {rank};\n@%p2 mov.b32 %r2, {count};" for rank, count in enumerate(expected)
    )
    body = f"""
    {fill_shared(1024 + region, 32)}
    {init_barrier("%smem")}
    mov.u32 %r50, %cluster_ctarank;
    mov.b32 %r2, 0;
    {bytes_of_rank}
    @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], %r2;
    {SYNC}
    {"".join(parts)}
    {wait_parity("%smem", 0)}
    {dump_shared("%ptr1", region, 32, 1024, cta=True)}
    {store_status("%ptr2")}
    {SYNC}
    """
    ctas = size * clusters
    return Case(
        name=f"multicast/{name}",
        ptx=kernel(body, pointers=3, maps=1),
        buffers={"tensor": counting(64 * 128, "u16"), "out": sentinel(region * ctas), "status": status(ctas)},
        outputs=("out", "status"),
        maps=(tensor,),
        grid=(ctas, 1, 1),
        cluster=(size, 1, 1),
        shared_bytes=1024 + region,
        is_async=True,
    )


def multicast_cases() -> Iterator[Case]:
    yield multicast("pair_from_0", 2, {0: (3, 0)})
    yield multicast("pair_from_1", 2, {1: (3, 8)})
    yield multicast("pair_both_halves", 2, {0: (3, 0), 1: (3, 8)}, clusters=2)
    yield multicast("pair_to_other_only", 2, {0: (2, 16), 1: (1, 24)})
    yield multicast("pair_to_self_only", 2, {0: (1, 16)}, swizzle="none")
    yield multicast("four_all", 4, {0: (15, 0), 1: (15, 8), 2: (15, 16), 3: (15, 24)})
    yield multicast("four_rows", 4, {0: (3, 0), 1: (3, 8), 2: (12, 16), 3: (12, 24)})
    yield multicast("four_columns", 4, {0: (5, 0), 1: (10, 8), 2: (5, 16), 3: (10, 60)})
    yield multicast("four_not_self", 4, {2: (9, 40)})
    yield bulk_multicast()
    yield remote_bulk_copy()
    yield from remote_bulk_reduce()


def bulk_multicast() -> Case:
    body = f"""
    {fill_shared(1024, 32)}
    add.u32 %r40, %smem, 1024;
    {init_barrier("%r40")}
    mov.u32 %r50, %cluster_ctarank;
    @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%r40], 512;
    {SYNC}
    setp.eq.u32 %p1, %r50, 1;
    and.pred %p1, %p1, %p30;
    mov.b32 %r1, 512;
    mov.b16 %h1, 3;
    add.u32 %r2, %smem, 128;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster \
[%r2], [%ptr0], %r1, [%r40], %h1;
    {wait_parity("%r40", 0)}
    {dump_shared("%ptr1", 1024, 32, cta=True)}
    {store_status("%ptr2")}
    {SYNC}
    """
    return Case(
        name="multicast/bulk",
        ptx=kernel(body, pointers=3),
        buffers={"source": counting(512, "u16"), "out": sentinel(2048), "status": status(2)},
        outputs=("out", "status"),
        grid=(2, 1, 1),
        cluster=(2, 1, 1),
        shared_bytes=1040,
        is_async=True,
    )


def remote_bulk_copy() -> Case:
    """Each CTA copies its shared memory to its neighbour's, which waits on its own barrier."""
    body = f"""
    {fill_shared(1024, 32)}
    add.u32 %r40, %smem, 1024;
    {init_barrier("%r40")}
    mov.u32 %r50, %cluster_ctarank;
    add.u32 %r51, %r50, 1;
    and.b32 %r51, %r51, 3;
    shl.b32 %r0, %tix, 3;
    add.u32 %r0, %r0, %smem;
    mad.lo.u32 %r1, %r50, 1000, %tix;
    st.shared.v2.b32 [%r0], {{%r1, %tix}};
    fence.proxy.async.shared::cta;
    @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%r40], 240;
    {SYNC}
    add.u32 %r2, %smem, 512;
    mapa.shared::cluster.u32 %r2, %r2, %r51;
    mapa.shared::cluster.u32 %r3, %r40, %r51;
    add.u32 %r4, %smem, 16;
    mov.b32 %r5, 240;
    @%p30 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r2], [%r4], %r5, [%r3];
    {wait_parity("%r40", 0)}
    {dump_shared("%ptr0", 1024, 32, cta=True)}
    {store_status("%ptr1")}
    {SYNC}
    """
    return Case(
        name="cluster_memory/bulk_copy_to_neighbour",
        ptx=kernel(body, pointers=2),
        buffers={"out": sentinel(4096), "status": status(4)},
        outputs=("out", "status"),
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
        shared_bytes=1040,
        is_async=True,
    )


def remote_bulk_reduce() -> Iterator[Case]:
    for operation in ("add.u32", "add.s32", "min.s32", "max.u32", "inc.u32", "and.b32", "xor.b32"):
        body = f"""
        {fill_shared(512, 32)}
        add.u32 %r40, %smem, 512;
        {init_barrier("%r40")}
        mov.u32 %r50, %cluster_ctarank;
        xor.b32 %r51, %r50, 1;
        shl.b32 %r0, %tix, 2;
        mad.lo.u32 %r6, %r50, 128, %r0;
        cvt.u64.u32 %d1, %r6;
        add.u64 %d1, %d1, %ptr2;
        ld.global.b32 %r1, [%d1];
        ld.global.b32 %r2, [%d1+256];
        add.u32 %r0, %r0, %smem;
        st.shared.b32 [%r0], %r1;
        st.shared.b32 [%r0+128], %r2;
        fence.proxy.async.shared::cta;
        @%p30 mbarrier.arrive.expect_tx.shared.b64 _, [%r40], 128;
        {SYNC}
        add.u32 %r2, %smem, 128;
        mapa.shared::cluster.u32 %r2, %r2, %r51;
        mapa.shared::cluster.u32 %r3, %r40, %r51;
        mov.b32 %r5, 128;
        @%p30 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{operation} \
[%r2], [%smem], %r5, [%r3];
        {wait_parity("%r40", 0)}
        {dump_shared("%ptr0", 512, 32, cta=True)}
        {store_status("%ptr1")}
        {SYNC}
        """
        yield Case(
            name=f"cluster_memory/bulk_reduce_{operation}",
            ptx=kernel(body, pointers=3),
            buffers={"out": sentinel(1024), "status": status(2), "source": random_bytes(301, 512)},
            outputs=("out", "status"),
            grid=(2, 1, 1),
            cluster=(2, 1, 1),
            shared_bytes=528,
            is_async=True,
        )


def cases() -> Iterator[Case]:
    yield from special_register_cases()
    yield from address_cases()
    yield from remote_memory_cases()
    yield from remote_arrive_cases()
    yield from multicast_cases()
