"""Faults of the small kernels: clusters, multicast, cp.async, reductions, pairs of CTAs, wgmma, changed tensor maps."""

import re
from dataclasses import replace

import kernels_seeding_ptx as kernels
import numpy as np
from seeding import (
    REFUSED,
    WRONG,
    Base,
    Bug,
    Edit,
    Prepared,
    Text,
    bug,
    change_all,
    change_launch,
    change_map,
    drop,
    drop_wait,
    half_a_warp,
    replaced,
    shorten,
)

CLUSTER_ARRIVE = r"barrier\.cluster\.arrive"
CLUSTER_WAIT = r"barrier\.cluster\.wait"
INIT_FENCE = r"fence\.mbarrier_init"
INIT = r"mbarrier\.init"
EXPECT = r"mbarrier\.arrive\.expect_tx"
TENSOR_COPY = r"cp\.async\.bulk\.tensor"
REMOTE_ARRIVE = r"mbarrier\.arrive\.release\.cluster"
BULK = r"cp\.async\.bulk\.shared::cluster\.shared::cta"
LDGSTS = r"cp\.async\.cg"
REDUCE = r"cp\.reduce\.async\.bulk"


def cluster_barrier_gone(at: int, of: int) -> Edit:
    """A barrier of the cluster is missing altogether."""

    def edit(t: Text) -> None:
        t.drop(t.one(CLUSTER_ARRIVE, at, of))
        t.drop(t.one(CLUSTER_WAIT, at, of))

    return edit


def cta_barrier_instead(at: int, of: int) -> Edit:
    """The CTA synchronises where the cluster should."""

    def edit(t: Text) -> None:
        t.drop(t.one(CLUSTER_ARRIVE, at, of))
        t.lines[t.one(CLUSTER_WAIT, at, of)] = "bar.sync 0;"

    return edit


def relaxed_wait(t: Text) -> None:
    t.change(t.waits(of=2)[1], r"parity\.shared::cta", "parity.relaxed.cluster.shared::cta")


MULTICAST: list[Bug] = [
    bug("multicast to one CTA only", "deadlock", replaced(r"mov\.b16\s+%h1, 3", 0, 1, ", 3;", ", 1;")),
    bug("multicast to a CTA that is not there", "out-of-bounds", replaced(r"mov\.b16\s+%h1, 3", 0, 1, ", 3;", ", 7;")),
    bug("both arrivals go to CTA 0", "barrier-overarrival | deadlock", replaced(r"mapa", 1, 2, ", 1;", ", 0;")),
    bug("no arrival at the other CTA's barrier", "deadlock", drop(REMOTE_ARRIVE, 1, 2)),
    bug(
        "address of the other CTA's barrier not mapped",
        "race | deadlock | barrier-overarrival",
        replaced(r"mapa", 1, 2, r"mapa\.shared::cluster\.u32 %r8, %r5, 1;", "mov.u32 %r8, %r5;"),
    ),
    bug(
        "remote barrier used as one of the CTA",
        "barrier-misuse",
        change_all(REMOTE_ARRIVE, 2, r"release\.cluster\.shared::cluster", "shared::cta"),
    ),
    bug(
        "empty barrier expects one CTA only",
        "barrier-overarrival | race",
        change_all(rf"{INIT}.*, 2;", 2, ", 2;", ", 1;"),
    ),
    bug("producer never waits", "race | barrier-overarrival | in-flight-access", drop_wait(0, 2)),
    bug("consumer never waits", "race | in-flight-access | uninitialised-read", drop_wait(1, 2)),
    bug(
        "expects its own half only",
        "deadlock | leftover-transactions | race | in-flight-access",
        replaced(EXPECT, 0, 1, r"8192", "4096"),
    ),
    bug(
        "both halves land in one place",
        "race | in-flight-access",
        replaced(r"shl\.b32 %r7, %rank, 12", 0, 1, "12", "31"),
    ),
    bug("no fence.mbarrier_init", "missing-mbarrier-init-fence", drop(INIT_FENCE)),
    bug(
        "only the CTA waits for the initialisation",
        "missing-mbarrier-init-fence | barrier-misuse",
        cta_barrier_instead(0, 2),
    ),
    bug("cluster barrier without a wait", "barrier-misuse", drop(CLUSTER_WAIT, 0, 2)),
    bug("no cluster barrier before exit", "shared-in-use-at-exit", cluster_barrier_gone(1, 2)),
    bug("cluster barrier by half a warp", "divergence", half_a_warp(CLUSTER_ARRIVE, 0, 2)),
    bug("arrivals that release nothing", "race", change_all(REMOTE_ARRIVE, 2, "release", "relaxed")),
    bug("consumer's wait that acquires nothing", "race", relaxed_wait),
    bug("launched without a cluster", "out-of-bounds | barrier-misuse", host=change_launch(cluster=(1, 1, 1))),
    bug("grid no multiple of the cluster", "launch", host=change_launch(grid=(3, 1, 1))),
    bug("cluster of 16 without the attribute", "launch", host=change_launch(cluster=(16, 1, 1), grid=(16, 1, 1))),
    bug("map of 4-bit elements on sm_90a", "tensormap", host=change_map(0, dtype="b4x16")),
]

EXCHANGE: list[Bug] = [
    bug("no fence.proxy.async before the copy", "missing-proxy-fence", drop(r"fence\.proxy\.async")),
    bug(
        "copy reports to the sender's barrier",
        "barrier-misuse | race | deadlock",
        replaced(BULK, 0, 1, r"\[%r5\];", "[%sm];"),
    ),
    bug(
        "copy goes to the sender itself",
        "bad-value",
        replaced(r"mapa", 0, 1, ", %r4;", ", %rank;"),
    ),
    bug("only the CTA waits before the copy", "missing-mbarrier-init-fence", cta_barrier_instead(0, 2)),
    bug("no cluster barrier before exit", "shared-in-use-at-exit", cluster_barrier_gone(1, 2)),
    bug("size no multiple of 16", "misaligned", replaced(r"mov\.b32 %r8, 512", 0, 1, "512", "504")),
    bug("copies half of what is expected", "deadlock", replaced(r"mov\.b32 %r8, 512", 0, 1, "512", "256")),
    bug("copies beyond shared memory", "out-of-bounds", replaced(r"add\.u32 %r6, %r5, 2048", 0, 1, "2048", "4992")),
    bug("copies over the barrier", "barrier-misuse", replaced(r"add\.u32 %r6, %r5, 2048", 0, 1, ", 2048", ", 0")),
    bug("receiver never waits", "race | in-flight-access | uninitialised-read", drop_wait(0, 1)),
    bug("sends what nobody wrote", "uninitialised-read", replaced(r"add\.u32 %r7, %sm, 1024", 0, 1, "1024", "1536")),
    bug(
        "every lane copies",
        "barrier-overarrival | race | leftover-transactions | in-flight-access",
        replaced(BULK, 0, 1, "@%first ", ""),
    ),
]

CP_ASYNC: list[Bug] = [
    bug("wait_group 1 becomes 2", "in-flight-access | race", replaced(r"wait_group", 1, 4, "1;", "2;")),
    bug("commit_group missing", "in-flight-access | race", drop(r"commit_group", 1, 4)),
    bug("last wait_group missing", "in-flight-access | race", drop(r"wait_group", 3, 4)),
    bug("no barrier behind the wait", "race | in-flight-access", drop(r"bar\.sync", 0, 8)),
    bug("no barrier before a buffer is overwritten", "race", drop(r"bar\.sync", 1, 8)),
    bug(
        "source address no multiple of 16",
        "misaligned",
        replaced(r"add\.u64 %d1, %g0, %d0", 0, 1, r"%d0;", "%d0; add.u64 %d1, %d1, 8;"),
    ),
    bug("wrong buffer overwritten", "race | in-flight-access", replaced(LDGSTS, 2, 4, r"\[%r2\+0\]", "[%r2+1024]")),
    bug("source is one step short", "out-of-bounds", host=shorten("input 0", 1024)),
    bug("last step is not stored", "output-not-written", drop(r"st\.global", 3, 4)),
    bug(
        "reads the source's buffer one row too far",
        "out-of-bounds | uninitialised-read",
        replaced(r"ld\.shared\.v4", 3, 4, r"\+1024", "+16384"),
    ),
]


def partial_sums_of_all_lanes(t: Text) -> None:
    # A round of the butterfly is missing, so lanes differ, and all of them store.
    t.drop(t.one(r"shfl\.sync", 4, 5))
    t.change(t.one(r"@%p1 st\.shared"), "@%p1 ", "")


def add_without_atomics(t: Text) -> None:
    line = t.one(r"red\.global\.add")
    t.lines[line] = "ld.global.b32 %r14, [%g1]; add.f32 %r14, %r14, %r10; st.global.b32 [%g1], %r14;"


def add_by_every_warp(t: Text) -> None:
    """The first thread of each warp adds, where that of the CTA should; without atomics."""
    add_without_atomics(t)
    t.change(t.one(r"@!%first bra OVER"), "%first", "%p1")


def sum_starts_uninitialised(prepared: Prepared) -> Prepared:
    memory = [
        replace(buffer, initialised=False, valid=np.zeros(buffer.num_bytes, np.bool_))
        if buffer.name == "sum 1"
        else buffer
        for buffer in prepared.memory
    ]
    return replace(prepared, memory=memory)


REDUCTION: list[Bug] = [
    bug("no barrier before the partial sums are read", "race | uninitialised-read", drop(r"bar\.sync")),
    bug("barrier of 96 threads for 128", "barrier-misuse | race", replaced(r"bar\.sync", 0, 1, "128", "96")),
    bug("barrier of 160 threads for 128", "barrier-misuse", replaced(r"bar\.sync", 0, 1, "128", "160")),
    bug("barrier of a number that is no multiple of 32", "barrier-misuse", replaced(r"bar\.sync", 0, 1, "128", "100")),
    bug("barrier 16", "barrier-misuse | refused", replaced(r"bar\.sync", 0, 1, "0, 128", "16, 128")),
    bug(
        "one warp does not reach the barrier",
        "deadlock",
        replaced(r"bar\.sync", 0, 1, "bar", "setp.eq.u32 %p2, %warp, 3;\n@!%p2 bar"),
    ),
    bug("lanes store different partial sums", "race", partial_sums_of_all_lanes),
    bug("shfl by half a warp", "divergence", half_a_warp(r"shfl\.sync", 0, 5)),
    bug("a round of the butterfly missing", WRONG, drop(r"shfl\.sync", 2, 5)),
    bug("warps add to one number without atomics", "race", add_by_every_warp),
    bug("no fence.proxy.async before the bulk reduction", "missing-proxy-fence", drop(r"fence\.proxy\.async")),
    bug("bulk reduction is not waited for", "shared-in-use-at-exit", drop(r"wait_group\.read")),
    bug("bulk reduction is not committed", "shared-in-use-at-exit", drop(r"commit_group")),
    bug("every warp reduces the vector", WRONG, replaced(r"@!%first bra OVER", 0, 1, "%first", "%p1")),
    bug(
        "bulk reduction one vector too far",
        "out-of-bounds",
        replaced(r"add\.s32 %r7, %sm, 1024", 0, 1, "%r7, %sm, 1024;", "%r7, %sm, 1024; add.u64 %g2, %g2, 512;"),
    ),
    bug("bulk reduction of 504 bytes", "misaligned", replaced(r"mov\.b32 %r8, 512", 0, 1, "512", "504")),
    bug("partial sums lie 2 bytes apart", "misaligned", replaced(r"shl\.b32 %r6, %warp, 2", 0, 1, "2;", "1;")),
    bug("sum is not zeroed", "uninitialised-read", host=sum_starts_uninitialised),
    bug("parameter missing", "launch", host=lambda p: replace(p, launch=replace(p.launch, params=p.launch.params[:2]))),
]


def signal_own_barrier(t: Text) -> None:
    t.drop(t.one(r"and\.b32 %r3, %r3, 0xFEFFFFFF"))


def dealloc_in_one_cta(t: Text) -> None:
    t.add_behind(t.one(r"@!%p1 bra END"), "\n@!%p4 bra END;")
    t.add(t.one(r"setp\.ne\.u32 %p2, %lane, 0"), "setp.eq.u32 %p4, %rank, 0;")


def alloc_in_one_cta(t: Text) -> None:
    t.add_behind(t.one(r"@!%p1 bra SETUP"), "\nsetp.ne.u32 %p7, %rank, 0;\n@%p7 bra SETUP;")


def a_commit_for_one(at: int) -> Edit:
    return lambda t: t.change(t.one(r"tcgen05\.commit", at, 2), r"(\[%r1[34]\]), %h1;", r"\1, 1;")


PAIR: list[Bug] = [
    bug("each CTA's copies report to its own barrier", "deadlock | leftover-transactions", signal_own_barrier),
    bug(
        "bytes of one CTA expected",
        "deadlock | leftover-transactions | in-flight-access | race",
        replaced(EXPECT, 0, 1, r"40960", "20480"),
    ),
    bug("stage is given back to the leader alone", "deadlock", a_commit_for_one(0)),
    bug("result is announced to the leader alone", "deadlock", a_commit_for_one(1)),
    bug("both CTAs issue the MMA", "race | barrier-overarrival | deadlock | tmem-misuse", drop(r"@!%p4 bra EPILOGUE")),
    bug("MMA never waits", "race | in-flight-access | uninitialised-read", drop_wait(1, 3)),
    bug("load never waits for the MMA", "race | in-flight-access | barrier-overarrival", drop_wait(0, 3)),
    bug("epilogue never waits", "race | uninitialised-read", drop_wait(2, 3)),
    bug("tensor memory given back by one CTA", "deadlock | tmem-in-use-at-exit", dealloc_in_one_cta),
    bug("tensor memory allocated by one CTA", "deadlock | tmem-misuse", alloc_in_one_cta),
    bug("no cluster barrier before dealloc", "race | tmem-misuse", cluster_barrier_gone(1, 2)),
    bug(
        "only the CTA waits behind the setup", "missing-mbarrier-init-fence | barrier-misuse", cta_barrier_instead(0, 2)
    ),
    bug("MMA of 512 rows", REFUSED, replaced(r"mov\.b32 %r9, \d+", 0, 1, r"(\d+);", str(1 << 28 | 1 << 17) + ";")),
    bug(
        "B of 16 columns a CTA instead of 32",
        "uninitialised-read",
        lambda t: t.change(
            i := t.one(r"mov\.b32 %r9, \d+"),
            r"\d{5,}",
            str(int(re.findall(r"\d{5,}", t.lines[i])[0]) - (32 >> 3 << 17)),
        ),
    ),
    bug(
        "descriptor of 64-byte swizzle",
        WRONG,
        replaced(r"or\.b64 %d3", 0, 1, r"(\d{10,});", str(1024 >> 4 << 32 | 1 << 46 | 4 << 61) + ";"),
    ),
    bug("both CTAs load the same rows of B", WRONG, replaced(r"shl\.b32 %r8, %rank, 5", 0, 1, ", 5;", ", 31;")),
    bug("lane offset of the warps halved", "tmem-misuse", replaced(r"shl\.b32 %r15, %warp, 21", 0, 1, "21", "20")),
    bug("two kinds of CTA group", "tmem-misuse", replaced(r"tcgen05\.relinquish", 0, 1, "group::2", "group::1")),
]

WGMMA: list[Bug] = [
    bug("no wgmma.fence", "race", drop(r"wgmma\.fence")),
    bug("wait_group 0 becomes 1", "race", replaced(r"wgmma\.wait_group", 0, 1, "0;", "1;")),
    bug("no commit_group", "race", drop(r"wgmma\.commit_group")),
    bug("consumer never waits", "race | in-flight-access | uninitialised-read", drop_wait(1, 2)),
    bug("producer never waits", "race | barrier-overarrival | in-flight-access", drop_wait(0, 2)),
    bug(
        "empty barrier expects one warp", "barrier-overarrival | race", change_all(rf"{INIT}.*, 4;", 2, ", 4;", ", 1;")
    ),
    bug("descriptor advances by 4 instead of 2", WRONG, replaced(r"add\.s64 %d5, %d3, 2", 0, 1, ", 2;", ", 4;")),
    bug("wgmma by half a warp", "divergence", half_a_warp(r"wgmma\.mma_async", 0, 4)),
    bug("setmaxnreg to 44", REFUSED, replaced(r"setmaxnreg\.dec", 0, 1, "40", "44")),
    bug("more registers than are free", "deadlock", drop(r"setmaxnreg\.dec")),
    bug("setmaxnreg by half a warp", "divergence", half_a_warp(r"setmaxnreg\.inc")),
    bug("setmaxnreg.inc to fewer registers", "launch", replaced(r"setmaxnreg\.inc", 0, 1, "216", "120")),
    bug(
        "A and B expect too few bytes",
        "deadlock | leftover-transactions | in-flight-access | race",
        replaced(EXPECT, 0, 1, "9216", "8192"),
    ),
    bug(
        "B lands behind its place",
        "uninitialised-read | " + WRONG,
        replaced(r"add\.s32 %r7, %r6, 8192", 0, 1, "8192", "9216"),
    ),
    bug(
        "destination of A not aligned",
        "misaligned",
        replaced(r"mul\.lo\.u32 %r6, %r2", 0, 2, ";", "; add.s32 %r6, %r6, 64;"),
    ),
    bug("steps do not accumulate", WRONG, lambda t: t.drop(*t.find(r"setp\.eq\.u32 %p5", 4))),
]


def misaligned_tensor(t: Text) -> None:
    line = t.one(r"tensormap\.replace\.tile\.global_address")
    t.change(line, "%g1;", "%d4;")
    t.add(line, "add.u64 %d4, %g1, 4;")


DEVICE_MAP: list[Bug] = [
    bug("no acquire of the changed map", "missing-proxy-fence", drop(r"fence\.proxy\.tensormap")),
    bug("acquire of another map", "missing-proxy-fence", replaced(r"fence\.proxy\.tensormap", 0, 1, "%g3", "%g0")),
    bug(
        "map published before it is complete",
        "race | tensormap | out-of-bounds | " + WRONG,
        lambda t: t.swap(t.one(r"tensormap\.cp_fenceproxy"), t.one(r"tensormap\.replace\.tile\.global_address")),
    ),
    bug("map at an odd place", "misaligned", replaced(r"add\.s32 %r3, %sm, 1024", 0, 1, "1024", "1088")),
    bug("tensor is one row short", "out-of-bounds", host=shorten("input 1", 128)),
    bug("address of the tensor no multiple of 16", "tensormap | bad-value", misaligned_tensor),
]

BUGS: list[tuple[Base, list[Bug]]] = [
    (kernels.multicast, MULTICAST),
    (kernels.exchange, EXCHANGE),
    (kernels.cp_async, CP_ASYNC),
    (kernels.reduction, REDUCTION),
    (kernels.pair, PAIR),
    (kernels.wgmma, WGMMA),
    (kernels.device_map, DEVICE_MAP),
]
