import numpy as np
import pytest
from asm_kit import clean, codes, run, wait

from ptxsim.findings import Unsupported

POLICIES = ("eager", "random", "lazy")


def test_griddepcontrol():
    clean("griddepcontrol.wait; griddepcontrol.launch_dependents;")


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
