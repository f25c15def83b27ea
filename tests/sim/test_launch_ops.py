import numpy as np
import pytest
from asm_kit import aligned, clean, codes, run, wait

from ptxsim.findings import Unsupported
from ptxsim.memory import Buffer

POLICIES = ("eager", "random", "lazy")


def test_griddepcontrol():
    clean("griddepcontrol.wait; griddepcontrol.launch_dependents;")


# What may be done before griddepcontrol.wait, if launches overlap.

OVERLAP = {"attributes": {"programmatic_stream_serialization": 1}}
LOAD, STORE = "ld.global.u32 %r0, [%g0];", "st.global.u32 [%g0], 7;"
LOAD_LANES = "mul.wide.u32 %d0, %lane, 4; add.u64 %d0, %d0, %g0; ld.global.u32 %r0, [%d0];"
STORE_LANES = LOAD_LANES.replace("ld.global.u32 %r0, [%d0]", "st.global.u32 [%d0], %lane")
BULK_LOAD = f"""
@%first mbarrier.init.shared.b64 [%sm], 1;
@%first fence.mbarrier_init.release.cluster;
bar.sync 0;
@%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 64;
@%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%sm+64], [%g0], 64, [%sm];
{wait("%sm", 0)}
"""
BULK_STORE = """
st.shared.u32 [%sm], 7;
st.shared.u32 [%sm+4], 7;
st.shared.u32 [%sm+8], 7;
st.shared.u32 [%sm+12], 7;
fence.proxy.async;
@%first cp.async.bulk.global.shared::cta.bulk_group [%g0], [%sm], 16;
@%first cp.async.bulk.commit_group;
@%first cp.async.bulk.wait_group 0;
"""
READS = [LOAD, LOAD_LANES, BULK_LOAD]
WRITES = [STORE, STORE_LANES, BULK_STORE, "atom.global.add.u32 %r0, [%g0], 1;"]


def words(constant=False):
    return [Buffer.of(aligned(np.zeros(32, np.uint32)), "words", constant=constant)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("access", READS + WRITES)
def test_access_before_the_wait(access, policy):
    wait_first, wait_last = f"griddepcontrol.wait; {access}", f"{access} griddepcontrol.wait;"
    clean(wait_first, words(), policy=policy, **OVERLAP)
    assert codes(wait_last, words(), policy=policy, **OVERLAP) == {"access-before-wait"}
    assert codes(access, words(), policy=policy, **OVERLAP) == {"access-before-wait"}
    # Launched without the attribute it begins when all before it have ended.
    clean(wait_last, words(), policy=policy)


@pytest.mark.parametrize("access", READS + WRITES)
def test_constants_may_be_read_before_the_wait(access):
    found = codes(f"{access} griddepcontrol.wait;", words(constant=True), **OVERLAP)
    assert found == (set() if access in READS else {"access-before-wait"})


def test_a_message_says_what_was_touched():
    (finding,) = run(STORE, words(), **OVERLAP).findings
    assert "write to words at byte 0 of 128 before griddepcontrol.wait" in finding.message


@pytest.mark.parametrize("policy", POLICIES)
def test_a_warp_that_is_ordered_behind_one_that_waits_need_not_wait(policy):
    """Warp 0 waits, then both meet, then warp 1 stores; without the meeting, or with it before the wait, it must not."""
    body = "setp.ne.u32 %p1, %warp, 0; @%p1 bra other; {first} bar.sync 0; {then} ret; other: bar.sync 0; " + STORE
    waits = "griddepcontrol.wait;"
    options = {"block": 64, "policy": policy, **OVERLAP}
    clean(body.format(first=waits, then=""), words(), **options)
    assert codes(body.format(first="", then=waits), words(), **options) == {"access-before-wait"}
    assert codes(body.format(first=waits, then="").replace("bar.sync 0;", ""), words(), **options) == {
        "access-before-wait"
    }


def test_prefetches_and_shared_memory_need_no_wait():
    clean("prefetch.global.L2 [%g0]; st.shared.u32 [%sm], 1; ld.shared.u32 %r0, [%sm];", words(), **OVERLAP)


# setmaxnreg


def test_registers_move_between_warps():
    """With 12 warps a thread gets 168 registers; 4 warps give up enough for the other 8 to hold 224."""
    body = """
    setp.lt.u32 %p1, %warp, 4;
    @%p1 bra few;
    setmaxnreg.inc.sync.aligned.u32 224;
    ret;
    few:
    setmaxnreg.dec.sync.aligned.u32 56;
    """
    for policy in POLICIES:
        clean(body, block=384, policy=policy)
    report = run(body.replace("224", "232"), block=384)
    assert report.codes() == {"deadlock"}
    assert "setmaxnreg.inc to 232" in report.findings[0].message


def test_wrong_direction():
    """Only .maxnreg says what a thread holds at launch."""
    assert codes("setmaxnreg.dec.sync.aligned.u32 240;", block=384, directives=".maxnreg 168") == {"launch"}
    assert codes("setmaxnreg.inc.sync.aligned.u32 24;", block=384, directives=".maxnreg 168") == {"launch"}
    clean("setmaxnreg.dec.sync.aligned.u32 160;", block=384, directives=".maxnreg 168")


@pytest.mark.parametrize("count", ["16", "260", "100", "%r1"])
def test_register_counts(count):
    with pytest.raises(Unsupported):
        run(f"setmaxnreg.dec.sync.aligned.u32 {count};")


# clusterlaunchcontrol: %g0 counts how often each CTA's work was done.

DYNAMIC = (
    """
@%first mbarrier.init.shared.b64 [%sm], 1;
@%first fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r0, %ctaid.x;
mov.b32 %r1, 0;
work:
shl.b32 %r2, %r0, 2;
cvt.u64.u32 %d0, %r2;
add.u64 %d0, %d0, %g0;
@%first atom.global.add.u32 %r3, [%d0], 1;
@%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 16;
setp.eq.u32 %p1, %rank, 0;
and.pred %p1, %p1, %first;
add.u32 %r4, %sm, 1024;
{request}
"""
    + wait("%sm", "%r1")
    + """
xor.b32 %r1, %r1, 1;
ld.shared.v2.b64 {%d1, %d2}, [%sm+1024];
mov.b128 %q0, {%d1, %d2};
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p2, %q0;
clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r0, %q0;
add.u32 %r0, %r0, %rank;
fence.proxy.async.shared::cta;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
@%p2 bra work;
"""
)
SINGLE = "@%p1 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r4], [%sm];"
MULTICAST = SINGLE.replace("bytes.b128", "bytes.multicast::cluster::all.b128")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cluster", [1, 2])
def test_every_tile_is_done_once(cluster, policy):
    done = np.zeros(12, np.uint32)
    request = SINGLE if cluster == 1 else MULTICAST
    report = clean(
        DYNAMIC.replace("{request}", request), [done], grid=12, cluster=cluster, policy=policy, resident=2, seed=3
    )
    assert (done == 1).all()
    assert report.counters["clusters_cancelled"] > 0


def test_vector_of_coordinates():
    body = DYNAMIC.replace("{request}", SINGLE).replace(
        "get_first_ctaid::x.b32.b128 %r0, %q0", "get_first_ctaid.v4.b32.b128 {%r0, %r10, %r11, _}, %q0"
    )
    done = np.zeros(5, np.uint32)
    clean(body, [done], grid=5, resident=1)
    assert (done == 1).all()


def test_request_after_a_failure():
    body = DYNAMIC.replace("{request}", SINGLE).replace("@%p2 bra work;", SINGLE)
    assert "barrier-misuse" in codes(body, [np.zeros(1, np.uint32)], grid=1)


def test_response_must_be_aligned():
    body = DYNAMIC.replace("{request}", SINGLE.replace("[%r4]", "[%r4+8]"))
    assert codes(body, [np.zeros(1, np.uint32)], grid=1) == {"misaligned"}


def test_unknown_forms_are_refused():
    for line in (
        "griddepcontrol.stop;",
        "clusterlaunchcontrol.try_cancel.async.b128 [%sm], [%sm];",
        "clusterlaunchcontrol.query_cancel.get_first_ctaid.b32.b128 %r1, %q0;",
    ):
        with pytest.raises(Unsupported):
            run(line)
