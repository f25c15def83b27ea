"""Faults of the NVFP4 linear.

Its barriers are called: full and empty of a stage of A and B, full and empty of the accumulator. They are told apart by who
signals them.
"""

import re
from collections.abc import Callable

import kernels_seeding as kernels
import torch
from seeding import (
    REFUSED,
    WRONG,
    Edit,
    Prepared,
    Text,
    bug,
    change_all,
    change_launch,
    change_map,
    drop,
    drop_all,
    every_lane,
    half_a_warp,
    replaced,
    shorten,
)

from ptxsim.tensormap import Swizzle

LD = r"tcgen05\.ld\.sync"
MMA = r"\btcgen05\.mma\."
# Four of a whole step of K, then the one that a loop executes for what is left of k in the last step.
NUM_MMAS, LAST_STEP = 5, 4
CP = r"tcgen05\.cp\."
STORE = r"cp\.async\.bulk\.tensor\.2d\.global"
LOAD = r"cp\.async\.bulk\.tensor\.\dd\.shared::cta\.global"
COMMIT = r"tcgen05\.commit"
WAIT_READ = r"cp\.async\.bulk\.wait_group\.read"
FENCE_ASYNC = r"fence\.proxy\.async\.shared::cta"
EPILOGUE_BARRIER = r"bar\.sync\s+1, 128"


def ab_full(t: Text) -> int:
    return t.offset(t.one(r"mbarrier\.arrive\.expect_tx"))


def ab_empty(t: Text) -> int:
    return t.offset(t.one(COMMIT, 0, 2))


def acc_full(t: Text) -> int:
    return t.offset(t.one(COMMIT, 1, 2))


def acc_empty(t: Text) -> int:
    return t.offset(t.one(r"mbarrier\.arrive\.shared"))


def load_never_waits(t: Text) -> None:
    t.drop_wait(t.waits(ab_empty(t), 3)[0])


def mma_never_waits_for_data(t: Text) -> None:
    t.drop_wait(t.waits(ab_full(t), 1)[0])


def mma_never_waits_for_accumulator(t: Text) -> None:
    t.drop_wait(t.waits(acc_empty(t), 1)[0])


def epilogue_never_waits(t: Text) -> None:
    t.drop_wait(t.waits(acc_full(t), 1)[0])


Barrier = Callable[[Text], int]


def expect(difference: int) -> Edit:
    def edit(t: Text) -> None:
        line = t.one(r"mbarrier\.arrive\.expect_tx")
        count = t.operands(line)[2]
        t.change(line, re.escape(count) + ";", f"{t.number_of(count, line) + difference};")

    return edit


def flip(barrier: Barrier) -> Edit:
    return lambda t: t.flip_parity(t.waits(barrier(t))[0])


def init_count(barrier: Barrier, count: int) -> Edit:
    def edit(t: Text) -> None:
        lines = [i for i in t.find(r"mbarrier\.init") if t.offset(i) == barrier(t)]
        assert len(lines) == 1
        t.change(lines[0], r"%r\d+;", f"{count};")

    return edit


def commit_to_the_other_barrier(t: Text) -> None:
    first, second = t.find(COMMIT, 2)
    there = re.search(r"\[.*\]", t.lines[second])[0]
    t.change(first, r"\[.*\]", there)


def wrap_late(before: str) -> Edit:
    """The stage counter wraps one too late."""

    def edit(t: Text) -> None:
        anchor = t.waits(ab_empty(t))[0] if before == "load" else t.waits(ab_full(t))[0]
        line = min(i for i in t.find(r"setp\.eq\.b32\s+%p\d+, %r\d+, 2;") if i > anchor)
        t.change(line, ", 2;", ", 3;")

    return edit


def never_flips(barrier: Barrier) -> Edit:
    """The parity of a wait is not toggled when its pipeline wraps."""

    def edit(t: Text) -> None:
        parity = re.escape(t.operands(t.waits(barrier(t))[0])[2])
        line = t.one(rf"xor\.b32\s+{parity}, {parity}, (1|%r\d+);")
        t.drop(line)

    return edit


def scales_of_the_next_stage(t: Text) -> None:
    start = t.waits(ab_full(t))[0]
    following = min(i for i in t.find(r"selp\.b32\s+%r\d+, 0, %r\d+, %p") if i > start)
    line = min(i for i in t.find(r"shl\.b32\s+%r\d+, %r\d+, 7;") if i > start)
    t.change(line, re.escape(t.operands(line)[1]), t.operands(following)[0])


def exchange_scales(t: Text) -> None:
    for line in t.find(MMA, NUM_MMAS):
        t.change(line, r"(\[%r\d+\]), (\[%r\d+\]), (%p\d+;)", r"\2, \1, \3")


def scales_of_another_block(t: Text) -> None:
    second, third = t.find(MMA, NUM_MMAS)[1:3]
    t.change(third, re.escape(t.operands(third)[4]), t.operands(second)[4])


def descriptor_advance(t: Text) -> None:
    line = t.one(MMA, 1, NUM_MMAS)
    descriptor = t.operands(line)[1]
    low = next(
        re.search(r"\{(%r\d+), ", t.lines[i])[1]
        for i in range(line, 0, -1)
        if re.match(rf"\s*mov\.b64\s+{descriptor}, ", t.lines[i])
    )
    t.change(t.one(rf"add\.s32\s+{low}, %r\d+, 2;"), ", 2;", ", 4;")


def change_descriptors(t: Text, difference: int) -> None:
    for line in t.find(r"or\.b32\s+%r\d+, %r\d+, \d{9};", NUM_MMAS):
        [number] = re.findall(r", (\d{9});", t.lines[line])
        t.change(line, number, str(int(number) + difference))


def instruction_descriptor(t: Text) -> None:
    # N / 8 lies from bit 17 on.
    change_descriptors(t, -(1 << 17))


def twice_the_rows(t: Text) -> None:
    # M / 128 lies from bit 27 on.
    change_descriptors(t, 1 << 27)


def accumulate_on_garbage(t: Text) -> None:
    flag = t.operands(t.one(MMA, 0, NUM_MMAS))[6]
    line = t.one(rf"setp\.ne\.b32\s+{flag}, ")
    t.drop(line)
    t.lines[line] = f"mov.pred {flag}, -1;"


def accumulate_never(t: Text) -> None:
    flag = t.operands(t.one(MMA, 3, NUM_MMAS))[6]
    t.change(t.one(rf"mov\.pred\s+{flag}, -1"), "-1", "0")


def only_last_step_counts(t: Text) -> None:
    flag = t.operands(t.one(MMA, LAST_STEP, NUM_MMAS))[6]
    line = t.one(rf"setp\.ne\.b32\s+{flag}, ")
    t.lines[line] = f"mov.pred {flag}, 0;"


def skip_one_mma_too_many(t: Text) -> None:
    # What is left of k in the last step is one block: a loop that wants two is not entered.
    mma = t.one(MMA, LAST_STEP, NUM_MMAS)
    t.change(max(i for i in t.find(r"setp\.lt\.s32\s+%p\d+, %r\d+, 1;") if i < mma), ", 1;", ", 2;")


def deallocate(columns: int) -> Edit:
    def edit(t: Text) -> None:
        line = t.one(r"tcgen05\.dealloc")
        t.change(line, re.escape(t.operands(line)[1]), str(columns))

    return edit


def allocate(columns: int) -> Edit:
    def edit(t: Text) -> None:
        t.change(t.one(r"tcgen05\.alloc\."), r"%r\d+;", f"{columns};")
        t.change(t.one(r"tcgen05\.dealloc"), r"%r\d+;", f"{columns};")

    return edit


def scale_copy_column(t: Text) -> None:
    # The last copy of B's scales goes 4 columns too far.
    t.change(t.one(CP, 7, 8), r"\[(%r\d+)\]", r"[\1+4]")


def lane_offset(t: Text) -> None:
    t.change(t.one(r"shl\.b32\s+%r\d+, %r\d+, 21;"), "21", "20")


def swapped_coordinates(pattern: str, at: int, of: int) -> Edit:
    return replaced(pattern, at, of, r"\{(%r\d+), (%r\d+)\}", r"{\2, \1}")


def map_of(load: int, other: int) -> Edit:
    """A copy with the tensor map of another copy."""

    def edit(t: Text) -> None:
        maps = []
        for line in t.find(LOAD, 4):
            register = re.search(r"\[(%rd\d+),", t.lines[line])[1]
            maps.append(t.one(rf"cvta\.param\.u64\s+{register}, "))
        if load < 4:
            target = maps[load]
        else:
            register = re.search(r"\[(%rd\d+),", t.lines[t.one(STORE, 0, 2)])[1]
            target = t.one(rf"cvta\.param\.u64\s+{register}, ")
        t.change(target, r"%rd\d+;", t.operands(maps[other])[1] + ";")

    return edit


def load_b_over_a(t: Text) -> None:
    a, b = t.find(LOAD, 4)[:2]
    t.change(b, r"\[%r\d+\+\d+\], \[%rd", re.search(r"\[%r\d+\]", t.lines[a])[0] + ", [%rd")


def a_misplaced(t: Text) -> None:
    t.change(t.one(LOAD, 0, 4), r"\[(%r\d+)\], \[%rd", r"[\1+64], [%rd")


def release_before_reading(t: Text) -> None:
    arrive = t.one(r"mbarrier\.arrive\.shared")
    text, t.lines[arrive] = t.lines[arrive], ""
    count = re.search(r"(%r\d+);", text)[1]
    first = t.one(LD, 0, 2)
    t.add(first, text.replace(count, "1"))


def no_barrier_before_store(t: Text) -> None:
    store = t.one(STORE, 0, 2)
    t.drop(max(i for i in t.find(EPILOGUE_BARRIER) if i < store))


def no_barrier_behind_wait_group(t: Text) -> None:
    waited = t.find(WAIT_READ)[0]
    t.drop(min(i for i in t.find(EPILOGUE_BARRIER) if i > waited))


def unswizzled_store(t: Text) -> None:
    address = re.escape(re.search(r"\[(%r\d+)\]", t.lines[t.one(r"st\.shared\.v4\.b32", 1, 16)])[1])
    line = t.one(rf"xor\.b32\s+{address}, %r\d+, %r\d+;")
    t.change(line, r"xor\.b32(\s+%r\d+), %r\d+, (%r\d+);", r"mov.b32\1, \2;")


def no_guard_of_alpha(t: Text) -> None:
    line = t.one(r"ld\.global\.b32")
    t.drop(max(i for i in t.find(r"@%p\d+ bra\b") if i < line))


def stop_one_step_early(t: Text) -> None:
    # The MMA warp's loop over K, which counts up to the number of steps.
    start = t.one(COMMIT, 0, 2)
    line = min(i for i in t.find(r"add\.s32\s+(%r\d+), \1, 1;") if i > start)
    t.change(line, ", 1;", ", 2;")


def second_store_gone(t: Text) -> None:
    t.drop(t.one(STORE, 1, 2))


def skip_every_second_tile(t: Text) -> None:
    line = t.find(r"mov\.u32\s+%r\d+, %nctaid\.x;", 1)[0]
    register = t.operands(line)[0]
    t.add_behind(line, f"shl.b32 {register}, {register}, 1;")


def all_warps_store(t: Text) -> None:
    for line in t.find(STORE, 2):
        t.drop(max(i for i in t.find(r"@%p\d+ bra\b") if i < line))


def no_initial_barrier(t: Text) -> None:
    t.drop(t.one(r"bar\.sync\s+0;"))


def no_init(barrier: Barrier) -> Edit:
    def edit(t: Text) -> None:
        lines = [i for i in t.find(r"mbarrier\.init") if t.offset(i) == barrier(t)]
        assert len(lines) == 1
        t.drop(lines[0])

    return edit


BUGS = [
    bug("load never waits for an empty stage", "race | barrier-overarrival", load_never_waits),
    bug("MMA never waits for A and B", "race | in-flight-access | uninitialised-read", mma_never_waits_for_data),
    bug("MMA never waits for a free accumulator", "race", mma_never_waits_for_accumulator),
    bug("epilogue never waits for the accumulator", "race | uninitialised-read", epilogue_never_waits),
    bug("expect_tx of 128 bytes too few", "deadlock | leftover-transactions", expect(-128)),
    bug("expect_tx of 128 bytes too many", "deadlock", expect(128)),
    bug("accumulator is never given back", "deadlock", drop(r"mbarrier\.arrive\.shared")),
    bug("stage is never given back", "deadlock", drop(COMMIT, 0, 2)),
    bug("accumulator is never announced", "deadlock", drop(COMMIT, 1, 2)),
    bug(
        "stage's commit goes to the accumulator's barrier",
        "barrier-overarrival | deadlock | race | in-flight-access",
        commit_to_the_other_barrier,
    ),
    bug("fence.proxy.async removed, first store", "missing-proxy-fence", drop(FENCE_ASYNC, 0, 2)),
    bug("fence.proxy.async removed, second store", "missing-proxy-fence", drop(FENCE_ASYNC, 1, 2)),
    bug("no barrier before the TMA store", "race | uninitialised-read", no_barrier_before_store),
    bug("no barrier behind wait_group", "race", no_barrier_behind_wait_group),
    bug("wait_group.read 0 becomes 1", "race", change_all(WAIT_READ, 3, "0;", "1;")),
    bug("no wait_group.read before D is overwritten", "race", drop(WAIT_READ, 1, 3)),
    bug("no final wait_group.read", "shared-in-use-at-exit", drop(WAIT_READ, 2, 3)),
    bug("no commit_group", "race", drop_all(r"cp\.async\.bulk\.commit_group", 2)),
    bug("scales of B copied 4 columns too far", "uninitialised-read | tmem-misuse", scale_copy_column),
    bug("scales of A of another block of K", WRONG, scales_of_another_block),
    bug("scales of A and B exchanged", WRONG, exchange_scales),
    bug("scales of the next stage", "race | in-flight-access | uninitialised-read", scales_of_the_next_stage),
    bug("descriptor advances by 4 instead of 2", WRONG, descriptor_advance),
    bug("instruction descriptor: N 8 too small", "uninitialised-read", instruction_descriptor),
    bug("accumulates on an empty accumulator", "uninitialised-read", accumulate_on_garbage),
    bug("last MMA of a step does not accumulate", WRONG, accumulate_never),
    bug("steps of K do not accumulate", WRONG, only_last_step_counts),
    bug("MMA of the last block of K left out", WRONG, skip_one_mma_too_many),
    bug("tensor memory is not given back", "tmem-in-use-at-exit", drop(r"tcgen05\.dealloc")),
    bug("dealloc of fewer columns", "tmem-misuse", deallocate(128)),
    bug("alloc of too few columns", "tmem-misuse", allocate(128)),
    bug("accumulator's barrier expects 127 arrivals", "barrier-overarrival", init_count(acc_empty, 127)),
    bug("accumulator's barrier expects 129 arrivals", "deadlock", init_count(acc_empty, 129)),
    bug("stage's barrier expects 2 arrivals", "deadlock", init_count(ab_full, 2)),
    bug("stage's barrier is not initialised", "barrier-misuse", no_init(ab_full)),
    bug("no fence.mbarrier_init", "missing-mbarrier-init-fence", drop(r"fence\.mbarrier_init")),
    bug("no barrier behind the setup", "race | uninitialised-read | barrier-misuse", no_initial_barrier),
    bug("load's stage wraps one too late", "barrier-misuse | out-of-bounds | deadlock | race", wrap_late("load")),
    bug("MMA's stage wraps one too late", "barrier-misuse | deadlock | race", wrap_late("mma")),
    bug("load waits for the wrong phase", "deadlock", flip(ab_empty)),
    bug("MMA waits for the wrong phase of a stage", "race | in-flight-access | deadlock", flip(ab_full)),
    bug("MMA waits for the wrong phase of the accumulator", "deadlock", flip(acc_empty)),
    bug("epilogue waits for the wrong phase", "race | uninitialised-read", flip(acc_full)),
    bug("load's parity is never toggled", "deadlock | race | barrier-overarrival", never_flips(ab_empty)),
    bug("MMA's parity is never toggled", "race | in-flight-access | deadlock", never_flips(ab_full)),
    bug("epilogue's parity is never toggled", "race | deadlock", never_flips(acc_full)),
    bug("tcgen05.ld one column too far", WRONG, replaced(LD, 0, 2, r"\[(%r\d+)\]", r"[\1+1]")),
    bug("lane offset of the warps halved", "tmem-misuse", lane_offset),
    bug("accumulator is given back before it is read", "race", release_before_reading),
    bug("all lanes announce the bytes", "barrier-overarrival", every_lane(r"mbarrier\.arrive\.expect_tx")),
    bug("all lanes load A", "race | in-flight-access | leftover-transactions", every_lane(LOAD, 0, 4)),
    bug("all lanes execute an MMA", WRONG, every_lane(MMA, 1, NUM_MMAS)),
    bug(
        "all lanes give a stage back",
        "barrier-overarrival | deadlock | race | in-flight-access",
        every_lane(COMMIT, 0, 2),
    ),
    bug("all warps store D", "race | shared-in-use-at-exit", all_warps_store),
    bug("coordinates of A exchanged", WRONG, swapped_coordinates(LOAD, 0, 4)),
    bug("coordinates of D exchanged", "output-not-written", swapped_coordinates(STORE, 0, 2)),
    bug("B loaded with A's tensor map", WRONG, map_of(1, 0)),
    bug("D stored with A's tensor map", "write-readonly", map_of(4, 0)),
    bug("B loaded over A", "race | in-flight-access", load_b_over_a),
    bug("A loaded 64 bytes too far", "misaligned", a_misplaced),
    bug("swizzle of one store to shared memory missing", "race | uninitialised-read", unswizzled_store),
    bug("alpha read beyond n", "out-of-bounds", no_guard_of_alpha),
    bug("MMA takes half the steps", "deadlock | barrier-overarrival", stop_one_step_early),
    bug("right half of D is not stored", "output-not-written", second_store_gone),
    bug("every second tile skipped", "output-not-written", skip_every_second_tile),
    bug("tcgen05.wait::ld by half a warp", "divergence", half_a_warp(r"tcgen05\.wait::ld", 0, 2)),
    bug("bar.sync by half a warp", "divergence", half_a_warp(EPILOGUE_BARRIER, 0, None)),
    bug("MMA of 256 rows in one CTA", REFUSED, twice_the_rows),
]


def less_shared_memory(prepared: Prepared) -> Prepared:
    return change_launch(shared_bytes=prepared.launch.shared_bytes - 16)(prepared)


def scale_is_nan(prepared: Prepared) -> Prepared:
    [scales] = [buffer for buffer in prepared.memory if buffer.name == "sfb"]
    scales.owner.view(torch.uint8)[0, 0] = 0xFF
    return prepared


def scale_is_negative(prepared: Prepared) -> Prepared:
    [scales] = [buffer for buffer in prepared.memory if buffer.name == "sfa"]
    scales.owner.view(torch.uint8)[0, 0] |= 0x80
    return prepared


HOST_BUGS = [
    bug("a scale of B is NaN", "bad-value", host=scale_is_nan),
    bug("a scale of A is negative", "bad-value", host=scale_is_negative),
    bug("D is allocated one row short", "out-of-bounds", host=shorten("d", 2 * kernels.N)),
    bug("A is allocated one row short", "out-of-bounds", host=shorten("a", kernels.K // 2)),
    bug("shared memory above 227 KiB", "launch", host=change_launch(shared_bytes=233473)),
    bug("128 threads instead of 192", "launch", host=change_launch(block=(128, 1, 1))),
    bug("cluster does not divide the grid", "launch", host=change_launch(cluster=(2, 1, 1))),
    bug("shared memory 16 bytes short", "out-of-bounds", host=less_shared_memory),
    bug("odd number of 4-bit elements in a row", "tensormap", host=change_map(0, dims=lambda d: (d[0] - 1, d[1]))),
    bug("map of A starts at an odd address", "tensormap", host=change_map(0, global_address=lambda a: a + 4)),
    bug("map of A has a row too many", "out-of-bounds", host=change_map(0, dims=lambda d: (d[0], d[1] + 1))),
    bug("map of D has a row too many", "out-of-bounds", host=change_map(4, dims=lambda d: (d[0], d[1] + 1))),
    bug("box of A is half as high", "deadlock", host=change_map(0, box=lambda b: (b[0], b[1] // 2))),
    bug("row stride of A is that of 2 rows", "out-of-bounds", host=change_map(0, strides_bytes=(kernels.K,))),
    bug("row stride of A is a row less 16 bytes", WRONG, host=change_map(0, strides_bytes=(kernels.K // 2 - 16,))),
    bug("swizzle of B is that of 64 bytes", "tensormap", host=change_map(1, swizzle=Swizzle.B64)),
]

# Faults that the simulator is known not to notice; see ptxsim/tmem.py for why.
MISSED = [
    bug("no tcgen05.wait::ld", "race", drop_all(r"tcgen05\.wait::ld", 2)),
    bug("no tcgen05.fence", "race", lambda t: t.drop(*t.find(r"tcgen05\.fence"))),
]
