"""Control flow, divergence, scheduling, deadlocks and policies of the machine."""

import numpy as np
import pytest
from asm_kit import clean, codes, run, wait

from ptxsim.findings import Unsupported

STORE = """
mul.wide.u32 %d1, %r9, 4;
add.s64 %d1, %g0, %d1;
"""


def store(register, index="%tid"):
    return f"mov.u32 %r9, {index};\n{STORE}st.global.b32 [%d1], {register};"


def out(size=32):
    return np.full(size, 0xDEADBEEF, np.uint32)


def test_lanes_run_apart_and_meet_again():
    a = out()
    body = f"""
setp.lt.u32 %p1, %lane, 10;
mov.b32 %r1, 0;
@%p1 bra LOW;
add.s32 %r1, %lane, 1000;
bra JOIN;
LOW:
add.s32 %r1, %lane, 2000;
JOIN:
activemask.b32 %r2;
add.s32 %r1, %r1, %r2;
{store("%r1")}
"""
    clean(body, [a])
    lanes = np.arange(32, dtype=np.uint32)
    assert (a == np.where(lanes < 10, lanes + 2000, lanes + 1000) + np.uint32(0xFFFFFFFF)).all()


def test_loops_with_different_trip_counts():
    a = out()
    body = f"""
mov.b32 %r1, 0;
mov.b32 %r2, 0;
LOOP:
add.s32 %r1, %r1, %lane;
add.s32 %r2, %r2, 1;
setp.le.u32 %p1, %r2, %lane;
@%p1 bra LOOP;
{store("%r1")}
"""
    clean(body, [a])
    lanes = np.arange(32, dtype=np.uint32)
    assert (a == lanes * (lanes + 1)).all()


def test_registers_that_nothing_wrote_hold_a_pattern():
    a = out()
    body = f"""
setp.gt.u32 %p1, %lane, 40;
@%p1 mov.b32 %r3, 5;
@!%p1 bra SKIP;
mov.b32 %r4, 7;
SKIP:
mov.b64 %d3, {{%r3, %r4}};
cvt.u32.u64 %r5, %d3;
add.s32 %r5, %r5, %r6;
{store("%r5")}
"""
    clean(body, [a])
    assert (a == 2 * 0xA5A5A5A5 & 0xFFFFFFFF).all()


def test_64_bit_registers_stay_64_bits_wide_in_part_of_a_warp():
    a = out()
    body = f"""
mov.b64 %d2, 3;
setp.lt.u32 %p1, %lane, 8;
@!%p1 bra SKIP;
mov.b64 %d2, 5;
SKIP:
shl.b64 %d3, %d2, 40;
shr.u64 %d3, %d3, 36;
cvt.u32.u64 %r5, %d3;
{store("%r5")}
"""
    clean(body, [a])
    assert a.tolist() == [5 << 4] * 8 + [3 << 4] * 24


def test_nested_divergence_keeps_what_each_lane_wrote():
    a = out()
    body = f"""
and.b32 %r1, %lane, 1;
and.b32 %r2, %lane, 2;
setp.ne.u32 %p1, %r1, 0;
setp.ne.u32 %p2, %r2, 0;
mov.b32 %r3, 7;
@!%p1 bra OUTER;
mov.b32 %r3, 1;
@!%p2 bra INNER;
add.s32 %r3, %r3, 10;
INNER:
add.s32 %r3, %r3, 100;
OUTER:
{store("%r3")}
"""
    clean(body, [a])
    expected = [7 if not lane & 1 else 111 if lane & 2 else 101 for lane in range(32)]
    assert a.tolist() == expected


def test_a_register_written_in_a_loop_survives_for_lanes_that_left():
    a = out()
    body = f"""
mov.b32 %r2, 0;
LOOP:
mul.lo.s32 %r3, %r2, 3;
add.s32 %r2, %r2, 1;
setp.lt.u32 %p1, %r2, %lane;
@%p1 bra LOOP;
{store("%r3")}
"""
    clean(body, [a])
    assert a.tolist() == [3 * max(0, lane - 1) for lane in range(32)]


def test_guarded_exit_leaves_the_others_running():
    a = out()
    body = f"""
setp.gt.u32 %p1, %lane, 20;
@%p1 exit;
{store("%lane")}
bar.sync 0;
"""
    clean(body, [a])
    assert a[:21].tolist() == list(range(21))
    assert (a[21:] == 0xDEADBEEF).all()


def test_exit_inside_a_branch_does_not_hold_up_the_join():
    a = out()
    body = f"""
setp.lt.u32 %p1, %lane, 4;
setp.lt.u32 %p2, %lane, 16;
mov.b32 %r1, 5;
@!%p2 bra JOIN;
@%p1 bra GONE;
mov.b32 %r1, 6;
bra JOIN;
GONE:
exit;
JOIN:
{store("%r1")}
"""
    clean(body, [a])
    assert a.tolist() == [0xDEADBEEF] * 4 + [6] * 12 + [5] * 16


def test_branch_tables():
    a = out()
    body = f"""
and.b32 %r1, %lane, 3;
brx.idx %r1, ts;
ts: .branchtargets A, B, C, D;
A: mov.b32 %r2, 10; bra JOIN;
B: mov.b32 %r2, 11; bra JOIN;
C: mov.b32 %r2, 12; bra JOIN;
D: mov.b32 %r2, 13;
JOIN:
{store("%r2")}
"""
    clean(body, [a])
    assert a.tolist() == [10 + lane % 4 for lane in range(32)]


def test_branch_table_overrun_is_found():
    assert "out-of-bounds" in codes("brx.idx %lane, ts;\nts: .branchtargets A;\nA:")


def test_partial_warps():
    a = out(48)
    clean(store("%tid"), [a], block=40)
    assert a.tolist() == list(range(40)) + [0xDEADBEEF] * 8


def test_aligned_instruction_in_a_branch_is_found():
    body = "setp.lt.u32 %p1, %lane, 10;\n@%p1 bar.sync 0;"
    assert codes(body) == {"divergence"}


@pytest.mark.parametrize("policy", ["eager", "random", "lazy"])
def test_deadlock_names_every_warp_and_its_barrier(policy):
    body = f"""
@!%first bra SKIP;
mbarrier.init.shared.b64 [%sm], 2;
SKIP:
bar.sync 0;
setp.ne.u32 %p1, %warp, 0;
@%p1 bra OTHER;
{wait("%sm", 0)}
OTHER:
bar.sync 1;
"""
    report = run(body, block=64, policy=policy)
    assert report.codes() == {"deadlock"}
    text = report.findings[0].message
    assert "warp 0" in text
    assert "warp 1" in text
    assert "0x400" in text
    assert "named barrier 1" in text


def test_a_loop_without_end_is_reported_with_its_place():
    report = run("AGAIN:\nadd.s32 %r1, %r1, 1;\nbra AGAIN;", max_instructions=100_000)
    assert report.codes() == {"deadlock"}
    assert "does not end" in report.findings[0].message
    assert "warp 0 at PTX line" in report.findings[0].message


def test_clusters_are_interleaved():
    # The first cluster waits for what the second writes: one by one this would never end.
    flag = np.zeros(1, np.uint32)
    body = """
mov.u32 %r1, %ctaid.x;
setp.eq.u32 %p1, %r1, 1;
@%p1 bra WRITE;
SPIN:
ld.acquire.gpu.global.b32 %r2, [%g0];
setp.eq.u32 %p2, %r2, 0;
@%p2 bra SPIN;
bra DONE;
WRITE:
mov.b32 %r3, 1;
st.release.gpu.global.b32 [%g0], %r3;
DONE:
"""
    for policy in ("eager", "random", "lazy"):
        flag[0] = 0
        clean(body, [flag], grid=2, policy=policy)
        assert flag[0] == 1


def test_grids_larger_than_what_is_resident():
    a = out(64)
    clean(f"mov.u32 %r1, %ctaid.x;\n{store('%r1', '%r1')}", [a], grid=64, resident=3)
    assert a.tolist() == list(range(64))


def test_random_policy_repeats_with_its_seed():
    body = "atom.global.add.u32 %r1, [%g0], 1;\nmul.wide.u32 %d1, %tid, 4;\nadd.s64 %d1, %g1, %d1;\nst.global.b32 [%d1], %r1;"

    def order(seed):
        a, b = np.zeros(1, np.uint32), out(256)
        clean(body, [a, b], block=256, policy="random", seed=seed)
        assert sorted(b.tolist()) == list(range(256))
        return b.tolist()

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1


def test_unknown_policy():
    with pytest.raises(ValueError, match="policy is 'fast'"):
        run("", policy="fast")


@pytest.mark.parametrize("text", ["frobnicate.b32 %r1, %r2;", "add.strange.s32 %r1, %r2, %r3;", "call.uni func;"])
def test_unknown_opcodes_are_refused_even_where_unreachable(text):
    with pytest.raises(Unsupported, match="PTX line"):
        run(f"bra END;\n{text}\nEND:")


def test_special_registers():
    a = out(256)
    body = f"""
mov.u32 %r1, %ctaid.x;
mov.u32 %r2, %nctaid.x;
mov.u32 %r3, %ntid.x;
mov.u32 %r4, %warpid;
mov.u32 %r5, %laneid;
shl.b32 %r1, %r1, 24;
shl.b32 %r2, %r2, 16;
shl.b32 %r4, %r4, 8;
or.b32 %r6, %r1, %r2;
or.b32 %r6, %r6, %r4;
or.b32 %r6, %r6, %r5;
mov.u32 %r7, %ctaid.x;
mad.lo.s32 %r8, %r7, %r3, %tid;
{store("%r6", "%r8")}
"""
    clean(body, [a], block=64, grid=4)
    expected = [c << 24 | 4 << 16 | w << 8 | lane for c in range(4) for w in range(2) for lane in range(32)]
    assert a.tolist() == expected


def test_counters_count_what_ran():
    report = clean("mov.b32 %r1, 0;\nLOOP:\nadd.s32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 10;\n@%p1 bra LOOP;")
    assert report.counters["op:add.s32"] == 10
    assert report.counters["instructions"] > 30
