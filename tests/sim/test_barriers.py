import numpy as np
import pytest
from asm_kit import clean, codes, run, wait

from ptxsim.findings import Unsupported

POLICIES = ("eager", "random", "lazy")
INIT = """
@%first mbarrier.init.shared.b64 [%sm], {count};
@%first fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
CLUSTER_SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def out_words(n):
    return np.zeros(n, np.uint32)


# mbarrier


def test_arrivals_of_all_threads_complete_a_phase_and_order_memory():
    body = (
        INIT.format(count=64)
        + f"""
    shl.b32 %r1, %tid, 2;
    add.u32 %r2, %sm, %r1;
    st.shared.b32 [%r2+1024], %tid;
    mbarrier.arrive.shared.b64 _, [%sm];
    {wait("%sm", 0)}
    xor.b32 %r3, %r1, 252;
    add.u32 %r3, %r3, %sm;
    ld.shared.b32 %r4, [%r3+1024];
    cvt.u64.u32 %d0, %r1;
    add.u64 %d1, %g0, %d0;
    st.global.b32 [%d1], %r4;
    """
    )
    for policy in POLICIES:
        out = out_words(64)
        clean(body, [out], block=64, policy=policy)
        assert (out == 63 - np.arange(64)).all()


def test_relaxed_arrival_orders_nothing():
    body = (
        INIT.format(count=64)
        + f"""
    shl.b32 %r1, %tid, 2;
    add.u32 %r2, %sm, %r1;
    st.shared.b32 [%r2+1024], %tid;
    mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%sm];
    {wait("%sm", 0)}
    xor.b32 %r3, %r1, 252;
    add.u32 %r3, %r3, %sm;
    ld.shared.b32 %r4, [%r3+1024];
    """
    )
    assert codes(body, block=64) == {"race"}


def test_relaxed_wait_acquires_nothing():
    body = (
        INIT.format(count=1)
        + """
    setp.lt.u32 %p1, %tid, 32;
    @%p1 bra writer;
    again:
    mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64 %p2, [%sm], 0;
    @!%p2 bra again;
    ld.shared.b32 %r4, [%sm+1024];
    ret;
    writer:
    @%first st.shared.b32 [%sm+1024], 5;
    @%first mbarrier.arrive.shared.b64 _, [%sm];
    """
    )
    assert codes(body, block=64) == {"race"}


def test_states_and_pending_counts():
    body = (
        INIT.format(count=3)
        + """
    setp.ne.u32 %p1, %tid, 0;
    @%p1 ret;
    mbarrier.arrive.shared.b64 %d0, [%sm];
    mbarrier.pending_count.b64 %r0, %d0;
    st.global.b32 [%g0], %r0;
    mbarrier.test_wait.shared.b64 %p2, [%sm], %d0;
    selp.b32 %r1, 1, 0, %p2;
    st.global.b32 [%g0+4], %r1;
    mbarrier.arrive.shared::cta.b64 %d1, [%sm], 2;
    mbarrier.pending_count.b64 %r0, %d1;
    st.global.b32 [%g0+8], %r0;
    mbarrier.test_wait.shared.b64 %p2, [%sm], %d0;
    selp.b32 %r1, 1, 0, %p2;
    st.global.b32 [%g0+12], %r1;
    """
    )
    out = out_words(4)
    clean(body, [out])
    assert out.tolist() == [3, 0, 2, 1]


def test_state_of_an_older_phase_is_misuse():
    body = (
        INIT.format(count=1)
        + """
    setp.ne.u32 %p1, %tid, 0;
    @%p1 ret;
    mbarrier.arrive.shared.b64 %d0, [%sm];
    mbarrier.test_wait.shared.b64 %p2, [%sm], %d0;
    mbarrier.arrive.shared.b64 _, [%sm];
    mbarrier.test_wait.parity.shared.b64 %p2, [%sm], 1;
    mbarrier.test_wait.shared.b64 %p2, [%sm], %d0;
    """
    )
    assert codes(body) == {"barrier-misuse"}


@pytest.mark.parametrize("policy", POLICIES)
def test_phases_alternate_between_two_warps(policy):
    """A ring of one stage: producer and consumer take turns 10 times."""
    body = (
        """
    @%first mbarrier.init.shared.b64 [%sm], 1;
    @%first mbarrier.init.shared.b64 [%sm+8], 1;
    bar.sync 0;
    mov.b32 %r0, 0;
    mov.b32 %r10, 0;
    add.u32 %r20, %sm, 8;
    setp.lt.u32 %p1, %tid, 32;
    setp.eq.u32 %p3, %lane, 0;
    @%p1 bra producer;
    consume:
    and.b32 %r1, %r0, 1;
    """
        + wait("%sm", "%r1")
        + """
    ld.shared.b32 %r2, [%sm+1024];
    add.u32 %r10, %r10, %r2;
    bar.warp.sync -1;
    @%p3 mbarrier.arrive.shared.b64 _, [%sm+8];
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p2, %r0, 10;
    @%p2 bra consume;
    @%p3 st.global.b32 [%g0], %r10;
    ret;
    producer:
    and.b32 %r1, %r0, 1;
    xor.b32 %r1, %r1, 1;
    """
        + wait("%r20", "%r1")
        + """
    @%p3 st.shared.b32 [%sm+1024], %r0;
    @%p3 mbarrier.arrive.shared.b64 _, [%sm];
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p2, %r0, 10;
    @%p2 bra producer;
    """
    )
    out = out_words(1)
    clean(body, [out], block=64, policy=policy)
    assert out[0] == 45


def test_transactions_hold_a_phase_and_may_come_early():
    body = (
        INIT.format(count=1)
        + """
    setp.ne.u32 %p1, %tid, 0;
    @%p1 ret;
    mbarrier.complete_tx.shared::cta.b64 [%sm], 32;
    mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 48;
    mbarrier.test_wait.parity.shared.b64 %p2, [%sm], 0;
    selp.b32 %r1, 1, 0, %p2;
    st.global.b32 [%g0], %r1;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%sm], 16;
    mbarrier.test_wait.parity.shared.b64 %p2, [%sm], 0;
    selp.b32 %r1, 1, 0, %p2;
    st.global.b32 [%g0+4], %r1;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%sm], 16;
    mbarrier.complete_tx.shared::cta.b64 [%sm], 16;
    """
    )
    out = out_words(2)
    clean(body, [out])
    assert out.tolist() == [0, 1]


def test_leftover_transactions():
    body = INIT.format(count=1) + "@%first mbarrier.expect_tx.relaxed.cta.shared.b64 [%sm], 16;"
    report = run(body)
    assert report.codes() == {"leftover-transactions"}
    assert "16 transaction bytes pending" in report.findings[0].message


def test_arrive_drop_lowers_later_phases():
    body = (
        INIT.format(count=2)
        + """
    setp.ne.u32 %p1, %tid, 0;
    @%p1 ret;
    mbarrier.arrive_drop.shared.b64 _, [%sm];
    mbarrier.arrive.shared.b64 _, [%sm];
    mbarrier.test_wait.parity.shared.b64 %p2, [%sm], 0;
    mbarrier.arrive.shared.b64 _, [%sm];
    mbarrier.test_wait.parity.shared.b64 %p3, [%sm], 1;
    and.pred %p2, %p2, %p3;
    selp.b32 %r1, 1, 0, %p2;
    st.global.b32 [%g0], %r1;
    """
    )
    out = out_words(1)
    clean(body, [out])
    assert out[0] == 1


def test_overflowing_counts_are_found():
    one = "@%first "
    assert codes(one + "mbarrier.init.shared.b64 [%sm], 0;") == {"barrier-misuse"}
    assert codes(one + "mbarrier.init.shared.b64 [%sm], 1048576;") == {"barrier-misuse"}
    clean(one + "mbarrier.init.shared.b64 [%sm], 1048575;")
    assert "barrier-overarrival" in codes(INIT.format(count=31) + "mbarrier.arrive.shared.b64 _, [%sm];")
    body = INIT.format(count=2) + "@%first mbarrier.arrive.shared.b64 _, [%sm], 3;"
    assert codes(body) == {"barrier-overarrival"}
    body = INIT.format(count=1) + "@%first mbarrier.expect_tx.relaxed.cta.shared.b64 [%sm], 1048576;"
    assert codes(body) == {"barrier-misuse", "leftover-transactions"}
    body = INIT.format(count=1) + "@%first mbarrier.arrive_drop.shared.b64 _, [%sm];"
    assert codes(body) == {"barrier-misuse"}
    body = INIT.format(count=1) + "@%first mbarrier.arrive.noComplete.shared.b64 _, [%sm], 1;"
    assert codes(body) == {"barrier-misuse"}


def test_arrival_before_anyone_saw_the_phase_before():
    body = (
        INIT.format(count=1)
        + """
    @%first mbarrier.arrive.shared.b64 _, [%sm];
    @%first mbarrier.arrive.shared.b64 _, [%sm];
    """
    )
    assert codes(body) == {"barrier-overarrival"}


def test_uninitialised_and_dead_barriers():
    assert codes("@%first mbarrier.arrive.shared.b64 _, [%sm];") == {"barrier-misuse"}
    assert codes("mbarrier.test_wait.parity.shared.b64 %p1, [%sm], 0;") == {"barrier-misuse"}
    assert codes("@%first mbarrier.arrive.shared.b64 _, [%sm+4];") == {"misaligned"}
    init = "@%first mbarrier.init.shared.b64 [%sm], 1;"
    assert codes(init + init) == {"barrier-misuse"}
    clean(init + "@%first mbarrier.inval.shared.b64 [%sm];" + init)
    inval = "@%first mbarrier.inval.shared.b64 [%sm];"
    assert codes(init + inval + "@%first mbarrier.arrive.shared.b64 _, [%sm];") == {"barrier-misuse"}
    assert codes("mbarrier.init.shared.b64 [%sm], 1;") == {"barrier-misuse"}
    assert codes(init + "@%first st.shared.b32 [%sm], 1;") == {"barrier-misuse"}


def test_use_without_a_barrier_after_init_is_a_race():
    body = """
    setp.ge.u32 %p1, %tid, 32;
    @%first mbarrier.init.shared.b64 [%sm], 1;
    setp.eq.u32 %p2, %tid, 32;
    @%p2 mbarrier.arrive.shared.b64 _, [%sm];
    """
    assert codes(body, block=64) == {"race"}


def test_generic_addresses():
    body = (
        INIT.format(count=1)
        + """
    cvt.u64.u32 %d0, %sm;
    cvta.shared.u64 %d0, %d0;
    @%first mbarrier.arrive.release.cta.b64 _, [%d0];
    mbarrier.test_wait.parity.acquire.cta.b64 %p1, [%d0], 0;
    selp.b32 %r0, 1, 0, %p1;
    @%first st.global.b32 [%g0], %r0;
    """
    )
    out = out_words(1)
    clean(body, [out])
    assert out[0] == 1


def test_lanes_with_different_barriers():
    body = """
    shl.b32 %r1, %lane, 3;
    add.u32 %r1, %r1, %sm;
    mbarrier.init.shared.b64 [%r1], 1;
    bar.warp.sync -1;
    setp.lt.u32 %p1, %lane, 16;
    @%p1 mbarrier.arrive.shared.b64 _, [%r1];
    mbarrier.test_wait.parity.shared.b64 %p2, [%r1], 0;
    selp.b32 %r2, 1, 0, %p2;
    shl.b32 %r3, %lane, 2;
    cvt.u64.u32 %d0, %r3;
    add.u64 %d0, %d0, %g0;
    st.global.b32 [%d0], %r2;
    """
    out = out_words(32)
    clean(body, [out])
    assert out.tolist() == [1] * 16 + [0] * 16


@pytest.mark.parametrize("policy", POLICIES)
def test_lanes_wait_for_different_barriers(policy):
    """Lane i of warp 1 waits for barrier i & 1, and neither order of their completion leaves it asleep."""
    body = (
        """
    @%first mbarrier.init.shared.b64 [%sm], 1;
    @%first mbarrier.init.shared.b64 [%sm+8], 1;
    @%first mbarrier.init.shared.b64 [%sm+16], 1;
    bar.sync 0;
    setp.eq.u32 %p4, %lane, 0;
    setp.eq.u32 %p1, %warp, 0;
    @%p1 bra second;
    setp.eq.u32 %p1, %warp, 2;
    @%p1 bra first;
    and.b32 %r1, %lane, 1;
    shl.b32 %r1, %r1, 3;
    add.u32 %r1, %r1, %sm;
    again:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;
    @!%p2 bra again;
    ret;
    second:
    add.u32 %r2, %sm, 16;
    """
        + wait("%r2", 0)
        + """
    @%p4 mbarrier.arrive.shared.b64 _, [%sm+{a}];
    ret;
    first:
    @%p4 mbarrier.arrive.shared.b64 _, [%sm+{b}];
    @%p4 mbarrier.arrive.shared.b64 _, [%sm+16];
    """
    )
    clean(body.replace("{a}", "8").replace("{b}", "0"), block=96, policy=policy)
    clean(body.replace("{a}", "0").replace("{b}", "8"), block=96, policy=policy)


def test_deadlock_text_says_what_is_missing():
    body = INIT.format(count=2) + "@%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 64;" + wait("%sm", 0)
    report = run(body)
    assert "deadlock" in report.codes()
    text = next(f.message for f in report.findings if f.code == "deadlock")
    for part in ("parity 0", "1 of 2 arrivals", "64 transaction bytes", "0 phases completed", "0x400"):
        assert part in text, text


def test_polling_loop_with_other_work_ends():
    """A test_wait loop that sleeps between polls must neither spin forever nor be called a deadlock."""
    body = (
        INIT.format(count=1)
        + """
    setp.ge.u32 %p1, %tid, 32;
    @!%p1 bra arrives;
    mov.b32 %r0, 0;
    poll:
    add.u32 %r0, %r0, 1;
    mbarrier.test_wait.parity.shared.b64 %p2, [%sm], 0;
    @!%p2 bra poll;
    ret;
    arrives:
    @%first mbarrier.arrive.shared.b64 _, [%sm];
    """
    )
    clean(body, block=64)


def test_unknown_forms_are_refused():
    for line in (
        "mbarrier.arrive.acquire.cta.shared.b64 _, [%sm];",
        "mbarrier.arrive.release.shared.b64 _, [%sm];",
        "mbarrier.arrive.shared::cluster.b64 %d0, [%sm];",
        "mbarrier.init.layout::v1.shared.b64 [%sm], 1;",
        "mbarrier.arrive.noComplete.shared.b64 _, [%sm];",
        "mbarrier.try_wait.parity.shared::cluster.b64 %p1, [%sm], 0;",
        "mbarrier.test_wait.parity.shared.b64 %p1, [%sm], 0, 100;",
        "barrier.cluster.arrive.acquire;",
        "bar.red.xor.pred %p1, 0, %p2;",
        "bar.arrive 0;",
    ):
        with pytest.raises(Unsupported):
            run(line)


# Clusters


REMOTE = """
mapa.shared::cluster.u32 %r1, %sm, 0;
@%first mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];
"""


def remote_arrival(fence: str, arrive: str) -> str:
    return f"""
    setp.eq.u32 %p1, %rank, 0;
    and.pred %p2, %p1, %first;
    @%p2 mbarrier.init.shared.b64 [%sm], 2;
    @%p2 {fence};
    {arrive}
    barrier.cluster.wait.aligned;
    {REMOTE}
    @!%p1 bra finish;
    {wait("%sm", 0)}
    finish:
    {CLUSTER_SYNC}
    """


@pytest.mark.parametrize("policy", POLICIES)
def test_remote_arrival(policy):
    fence, relaxed = "fence.mbarrier_init.release.cluster", "barrier.cluster.arrive.relaxed.aligned;"
    clean(remote_arrival(fence, relaxed), grid=2, cluster=2, block=64, policy=policy)
    clean(remote_arrival("mov.b32 %r9, 0", "barrier.cluster.arrive.aligned;"), grid=2, cluster=2, policy=policy)


def test_remote_arrival_without_init_fence():
    found = codes(remote_arrival("mov.b32 %r9, 0", "barrier.cluster.arrive.relaxed.aligned;"), grid=2, cluster=2)
    assert found == {"missing-mbarrier-init-fence"}


def test_wait_on_a_remote_barrier_is_misuse():
    body = (
        """
    @%first mbarrier.init.shared.b64 [%sm], 1;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    cvt.u64.u32 %d0, %sm;
    cvta.shared.u64 %d0, %d0;
    xor.b64 %d0, %d0, 0x1000000;
    mbarrier.test_wait.parity.b64 %p1, [%d0], 0;
    """
        + CLUSTER_SYNC
    )
    assert codes(body, grid=2, cluster=2) == {"barrier-misuse"}


def test_cluster_barrier_orders_memory():
    body = f"""
    st.shared.b32 [%sm+1024], %rank;
    {{sync}}
    xor.b32 %r1, %rank, 1;
    mapa.shared::cluster.u32 %r2, %sm, %r1;
    ld.shared::cluster.b32 %r3, [%r2+1024];
    {CLUSTER_SYNC}
    setp.ne.b32 %p1, %r3, %r1;
    @%p1 trap;
    """
    clean(body.format(sync=CLUSTER_SYNC), grid=2, cluster=2)
    relaxed = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"
    assert codes(body.format(sync=relaxed), grid=2, cluster=2) == {"race"}


def test_exited_threads_do_not_hold_the_cluster_barrier():
    body = f"""
    setp.eq.u32 %p1, %warp, 1;
    @%p1 ret;
    {CLUSTER_SYNC}
    """
    for policy in POLICIES:
        clean(body, grid=2, cluster=2, block=64, policy=policy)


def test_cluster_barrier_misuse():
    assert codes("barrier.cluster.wait.aligned;", grid=2, cluster=2) == {"barrier-misuse"}
    twice = "barrier.cluster.arrive.aligned; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    assert "barrier-misuse" in codes(twice, grid=2, cluster=2)
    body = "setp.eq.u32 %p1, %rank, 0; @%p1 bra skip; barrier.cluster.arrive; barrier.cluster.wait; skip:" + wait(
        "%sm", 0
    )
    assert codes(body, grid=2, cluster=2) & {"barrier-misuse", "deadlock"}


def test_aligned_barrier_by_part_of_a_warp():
    assert codes("setp.lt.u32 %p1, %lane, 3; @%p1 barrier.cluster.arrive.aligned;") == {"divergence"}
    assert codes("setp.lt.u32 %p1, %lane, 3; @%p1 bar.sync 0;") == {"divergence"}


# Named barriers


def exchange(sync: str) -> str:
    return f"""
    shl.b32 %r1, %tid, 2;
    add.u32 %r2, %sm, %r1;
    st.shared.b32 [%r2+1024], %tid;
    {sync}
    xor.b32 %r3, %r1, 128;
    add.u32 %r3, %r3, %sm;
    ld.shared.b32 %r4, [%r3+1024];
    """


@pytest.mark.parametrize(
    "sync", ["bar.sync 0;", "bar.cta.sync 3, 64;", "barrier.sync 1, 64;", "barrier.sync.aligned 1;"]
)
def test_bar_sync_orders_memory(sync):
    for policy in POLICIES:
        clean(exchange(sync), block=64, policy=policy)


def test_without_bar_sync_it_is_a_race():
    assert codes(exchange(""), block=64) & {"race", "uninitialised-read"}


def test_arrive_and_sync():
    body = """
    setp.eq.u32 %p1, %warp, 0;
    @%p1 bra producer;
    bar.sync 2, 64;
    ld.shared.b32 %r1, [%sm+1024];
    st.global.b32 [%g0], %r1;
    ret;
    producer:
    @%first st.shared.b32 [%sm+1024], 77;
    bar.arrive 2, 64;
    """
    for policy in POLICIES:
        out = out_words(1)
        clean(body, [out], block=64, policy=policy)
        assert out[0] == 77


def test_barrier_number_in_a_register_and_several_rounds():
    body = """
    mov.b32 %r5, 0;
    loop:
    add.u32 %r6, %r5, 1;
    bar.sync %r6, 96;
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, 15;
    @%p1 bra loop;
    """
    for policy in POLICIES:
        clean(body, block=96, policy=policy)


def test_reductions():
    body = """
    setp.lt.u32 %p1, %tid, 40;
    bar.red.popc.u32 %r1, 0, %p1;
    bar.red.and.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 1, 64, %p1;
    bar.red.and.pred %p4, 0, !%p5;
    selp.b32 %r2, 1, 0, %p2;
    selp.b32 %r3, 1, 0, %p3;
    selp.b32 %r4, 1, 0, %p4;
    setp.eq.u32 %p6, %tid, 63;
    @!%p6 ret;
    st.global.b32 [%g0], %r1;
    st.global.b32 [%g0+4], %r2;
    st.global.b32 [%g0+8], %r3;
    st.global.b32 [%g0+12], %r4;
    """
    out = out_words(4)
    clean("setp.ne.u32 %p5, 0, 0;" + body, [out], block=64)
    assert out.tolist() == [40, 0, 1, 1]


def test_exited_warps_do_not_hold_a_barrier_of_all_threads():
    body = "setp.eq.u32 %p1, %warp, 1; @%p1 ret; bar.sync 0;"
    for policy in POLICIES:
        clean(body, block=96, policy=policy)
    counted = "setp.eq.u32 %p1, %warp, 1; @%p1 ret; bar.sync 0, 96;"
    report = run(counted, block=96)
    assert report.codes() == {"deadlock"}
    assert "64 of 96 threads arrived (warps [0, 2])" in report.findings[0].message


def test_named_barrier_misuse():
    assert codes("bar.sync 16;") == {"barrier-misuse"}
    assert codes("bar.sync 0, 48;", block=64) == {"barrier-misuse"}
    assert codes("bar.sync 0, 64;") == {"barrier-misuse"}
    split = "setp.eq.u32 %p1, %warp, 0; @%p1 bra one; bar.sync 1, 96; ret; one: bar.sync 1, 64;"
    assert "barrier-misuse" in codes(split, block=96)
    mixed = "setp.eq.u32 %p1, %warp, 0; @%p1 bra one; bar.sync 1; ret; one: bar.red.popc.u32 %r1, 1, %p1;"
    assert "barrier-misuse" in codes(mixed, block=64)


def test_a_warp_may_arrive_on_behalf_of_another():
    """Hardware counts arrivals: warp 0 arrives twice, and nobody else is needed."""
    body = "setp.eq.u32 %p1, %warp, 1; @%p1 ret; bar.arrive 1, 64; bar.sync 1, 64;"
    for policy in POLICIES:
        clean(body, block=64, policy=policy)


def test_bar_warp_sync_waits_for_separated_lanes():
    body = """
    setp.lt.u32 %p1, %lane, 16;
    @%p1 bra low;
    mov.b32 %r1, 1;
    bar.warp.sync -1;
    bra join;
    low:
    mov.b32 %r1, 2;
    bar.warp.sync 0xffffffff;
    join:
    """
    clean(body)
    assert codes("setp.lt.u32 %p1, %lane, 16; @%p1 bar.warp.sync 0xfff;") == {"divergence"}
    assert codes("setp.lt.u32 %p1, %lane, 16; @%p1 bra low; ret; low: bar.warp.sync 0xffffffff;") == set()
