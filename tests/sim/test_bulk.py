import dataclasses

import numpy as np
import pytest
from asm_kit import aligned, clean, codes, run, wait

from ptxsim.findings import Unsupported
from ptxsim.memory import Buffer
from ptxsim.tensormap import OobFill, Swizzle, TensorMap, swizzle_offset

POLICIES = ("eager", "random", "lazy")
INIT = """
@%first mbarrier.init.shared.b64 [%sm], 1;
@%first fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
BASE = 0x400  # where %sm points
EMPTY = 0xFF  # shared memory that nothing wrote


def bytes_of(seed, n):
    return aligned(np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8))


def row_major(array, dtype, dims, box, **options):
    """A map of a dense tensor; dims and box innermost first."""
    item = {"u8": 1, "u16": 2, "f16": 2, "bf16": 2, "u32": 4, "f32": 4, "u64": 8, "b4x16": 0.5}[dtype]
    strides, step = [], int(dims[0] * item)
    step = -(-step // 16) * 16
    for d in dims[1:]:
        strides.append(step)
        step *= d
    address = array.ctypes.data
    steps = options.pop("steps", (1,) * len(dims))
    return TensorMap(address, dtype, tuple(dims), tuple(strides), tuple(box), steps, **options)


def walk(m, at, chunk=1):
    """(byte in the unswizzled box, global address) of every byte of the box that lies inside the tensor.

    Rows of the tensor end at a multiple of `chunk` bytes.
    """
    counts = m.box_counts
    bits = m.element_bits
    places = []
    for number, index in enumerate(np.ndindex(*counts[:0:-1])):
        where = [c + i * s for c, i, s in zip(at[1:], index[::-1], m.element_strides[1:], strict=True)]
        if not all(0 <= x < d for x, d in zip(where, m.dims[1:], strict=True)):
            continue
        row = m.global_address + sum(x * s for x, s in zip(where, m.strides_bytes, strict=True))
        for i in range(counts[0] * bits // 8):
            if 0 <= at[0] * bits // 8 + i < -(-(m.dims[0] * bits // 8) // chunk) * chunk:
                places.append((number * counts[0] * bits // 8 + i, row + at[0] * bits // 8 + i))
    return np.array(places, np.int64).reshape(-1, 2)


def expected_box(m, memory, at):
    """The box, unswizzled."""
    out = np.zeros(m.box_bytes, np.uint8)
    places = walk(m, at)
    out[places[:, 0]] = memory[places[:, 1] - memory.ctypes.data]
    return out


def coordinates(at):
    moves = "".join(f"mov.b32 %r{40 + i}, {value};\n" for i, value in enumerate(at))
    return moves, "{" + ", ".join(f"%r{40 + i}" for i in range(len(at))) + "}"


def dump(size, source=1024):
    """Copies shared memory to %g0 with generic loads."""
    return f"""
    mov.b32 %r30, %tid;
    copy_out:
    shl.b32 %r31, %r30, 2;
    add.u32 %r32, %sm, %r31;
    ld.shared.b32 %r33, [%r32+{source}];
    cvt.u64.u32 %d30, %r31;
    add.u64 %d30, %d30, %g0;
    st.global.b32 [%d30], %r33;
    add.u32 %r30, %r30, 32;
    setp.lt.u32 %p15, %r30, {size // 4};
    @%p15 bra copy_out;
    """


def fill(size, target=1024):
    """Writes shared memory with generic stores from %g1."""
    return f"""
    mov.b32 %r30, %tid;
    copy_in:
    shl.b32 %r31, %r30, 2;
    add.u32 %r32, %sm, %r31;
    cvt.u64.u32 %d30, %r31;
    add.u64 %d30, %d30, %g1;
    ld.global.b32 %r33, [%d30];
    st.shared.b32 [%r32+{target}], %r33;
    add.u32 %r30, %r30, 32;
    setp.lt.u32 %p15, %r30, {size // 4};
    @%p15 bra copy_in;
    """


def load_text(m, at, offset=1024, space="shared::cta"):
    moves, vector = coordinates(at)
    return f"""
    {moves}
    add.u32 %r20, %sm, {offset};
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], {m.box_bytes};
    @%first cp.async.bulk.tensor.{len(at)}d.{space}.global.tile.mbarrier::complete_tx::bytes [%r20], [%m0, {vector}], [%sm];
    {wait("%sm", 0)}
    """


SHAPES = [
    ("u8", (96, 8), (48, 8), (80, -2), {}),
    ("u8", (90, 8), (48, 8), (64, 5), {}),
    ("u16", (128, 24), (32, 16), (16, 3), {"swizzle": Swizzle.B64}),
    ("u16", (128, 24), (64, 16), (104, 20), {"swizzle": Swizzle.B128}),
    ("f16", (128, 24), (16, 8), (-8, -3), {"swizzle": Swizzle.B32}),
    ("u16", (128, 24), (32, 16), (8, -3), {"steps": (1, 2)}),
    ("u16", (128, 24), (32, 16), (8, 17), {"steps": (1, 2)}),
    ("u16", (128, 24), (32, 16), (200, 40), {}),
    ("f32", (300,), (256,), (60,), {}),
    ("u64", (16, 6, 5), (8, 4, 3), (8, 1, 1), {}),
    ("bf16", (64, 6, 5), (64, 4, 3), (0, 4, -1), {"swizzle": Swizzle.B128}),
    ("u16", (32, 4, 3, 3), (16, 3, 2, 2), (-8, 2, 2, -1), {"swizzle": Swizzle.B32}),
    ("u32", (16, 3, 3, 2, 2), (8, 2, 2, 2, 2), (4, 1, 1, 0, 0), {}),
    ("b4x16", (512, 16), (256, 8), (256, 4), {"swizzle": Swizzle.B128}),
    ("b4x16", (512, 16), (128, 8), (448, 12), {"swizzle": Swizzle.B64}),
    ("u16", (128, 24), (48, 8), (16, 3), {"swizzle": Swizzle.B128}),
    ("u16", (128, 24), (8, 8), (16, 3), {"swizzle": Swizzle.B32}),
]


def spread_rows(m, size):
    """Offset of each byte of a box before the swizzle: rows lie as far apart as the swizzle is wide."""
    at = np.arange(size)
    return at if not m.swizzle else at // m.row_bytes * m.swizzle.span + at % m.row_bytes


def swizzled(m, box, offset):
    """Shared memory from `offset` on after the box was put there, by single bytes; and which bytes were written."""
    places = swizzle_offset(BASE + offset + spread_rows(m, len(box)), m.swizzle) - BASE - offset
    out = np.full(-(-(places.max() + 1) // 128) * 128, EMPTY, np.uint8)
    out[places] = box
    return out


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("dtype", "dims", "box", "at", "options"), SHAPES)
def test_tensor_load(dtype, dims, box, at, options, policy):
    size = int(np.prod(dims)) * 8
    source = bytes_of(1, size)
    m = row_major(source, dtype, dims, box, **options)
    for offset in (1024, 1024 + 128):
        want = swizzled(m, expected_box(m, source, at), offset)
        out = aligned(np.zeros(len(want), np.uint8))
        body = INIT + load_text(m, at, offset) + dump(len(want), offset)
        report = run(body, [out, source], [m], policy=policy)
        # Rows narrower than the swizzle leave gaps, which the dump reads.
        assert report.codes() <= ({"uninitialised-read"} if m.row_bytes < m.swizzle.span else set())
        assert (out == want).all()
        assert report.counters["tma_load_bytes"] == m.box_bytes


def test_nan_fill():
    source = aligned(np.zeros((8, 64), np.uint16))
    m = row_major(source, "f16", (64, 8), (16, 4), oob_fill=OobFill.NAN)
    out = aligned(np.zeros(128, np.uint8))
    clean(INIT + load_text(m, (56, 7)) + dump(128), [out, source], [m])
    values = out.view(np.uint16).reshape(4, 16)
    assert (values[0, 8:] == 0x7FF7).all()
    assert (values[1:] == 0x7FF7).all()
    assert not values[0, :8].any()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("dtype", "dims", "box", "at", "options"), [s for s in SHAPES if min(s[3]) >= 0])
def test_tensor_store(dtype, dims, box, at, options, policy):
    target = bytes_of(2, int(np.prod(dims)) * 8)
    m = row_major(target, dtype, dims, box, **options)
    source = bytes_of(3, 4 * m.box_bytes)
    want = target.copy()
    places = walk(m, at, 16)
    unswizzled = source[swizzle_offset(BASE + 1024 + spread_rows(m, m.box_bytes), m.swizzle) - BASE - 1024]
    want[places[:, 1] - target.ctypes.data] = unswizzled[places[:, 0]]
    moves, vector = coordinates(at)
    body = f"""
    {fill(4 * m.box_bytes)}
    {moves}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    add.u32 %r20, %sm, 1024;
    cp.async.bulk.tensor.{len(at)}d.global.shared::cta.tile.bulk_group [%m0, {vector}], [%r20];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    """
    report = clean(body, [target, source], [m], policy=policy)
    assert (target == want).all()
    assert report.counters["tma_stores"] == 1


def test_coordinates_that_the_hardware_refuses():
    memory = [aligned(np.zeros(1024, np.uint8)), bytes_of(2, 1024)]
    m = row_major(memory[1], "u8", (64, 16), (64, 16))
    assert codes(INIT + load_text(m, (8, 0)), memory, [m]) == {"misaligned"}
    clean(INIT + load_text(m, (-16, 0)), memory, [m])
    text = store_text().replace("mov.b32 %r2, 0;", "mov.b32 %r2, -16;")
    assert codes(text, memory, [row_major(memory[0], "u8", (64, 16), (64, 16))]) == {"bad-value"}


def test_tf32_is_rounded_by_loads_only():
    source = aligned(
        np.array([1, 0x3F801000, 0x3F803000, 0x3F801001, 0x7FC00000, 0xFF800000, 0x7FFFFF, 0] * 8, np.uint32)
    )
    m = row_major(source, "f32", (64,), (64,))
    m = dataclasses.replace(m, dtype="tf32")
    out = aligned(np.zeros(64, np.uint32))
    clean(INIT + load_text(m, (0,)) + dump(256), [out, source], [m])
    want = [0, 0x3F800000, 0x3F804000, 0x3F802000, 0x7FFFE000, 0xFF800000, 0x800000, 0]
    assert out.tolist() == want * 8


def test_store_by_different_lanes_and_by_one():
    """Lanes with different operands are different stores; an elected lane is one."""
    target = aligned(np.zeros((4, 32), np.uint8))
    source = bytes_of(4, 128)
    m = row_major(target, "u8", (32, 4), (32, 1))
    body = (
        fill(128)
        + """
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.lt.u32 %p1, %lane, 4;
    shl.b32 %r1, %lane, 7;
    add.u32 %r20, %sm, 1024;
    mov.b32 %r2, 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%m0, {%r2, %lane}], [%r20];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    )
    report = clean(body, [target, source], [m])
    assert report.counters["tma_stores"] == 4
    assert (target == source[:32]).all()


def test_row_gather_and_scatter():
    table = bytes_of(5, 64 * 128).reshape(64, 128)
    m = row_major(table, "u8", (128, 64), (128, 1), swizzle=Swizzle.B128)
    out = aligned(np.zeros(512, np.uint8))
    moves, vector = coordinates((0, 7, 63, 64, 2))
    body = (
        INIT
        + f"""
    {moves}
    add.u32 %r20, %sm, 1024;
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 512;
    @%first cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes \
[%r20], [%m0, {vector}], [%sm];
    {wait("%sm", 0)}
    {dump(512)}
    """
    )
    clean(body, [out, table], [m])
    rows = np.stack([table[7], table[63], np.zeros(128, np.uint8), table[2]])
    assert (out == swizzled(m, rows.reshape(-1), 1024)).all()

    target = aligned(np.zeros((64, 128), np.uint8))
    m = row_major(target, "u8", (128, 64), (128, 1))
    source = bytes_of(6, 512)
    body = f"""
    {fill(512)}
    {moves}
    add.u32 %r20, %sm, 1024;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%first cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group [%m0, {vector}], [%r20];
    @%first cp.async.bulk.commit_group;
    @%first cp.async.bulk.wait_group 0;
    """
    clean(body, [target, source], [m])
    want = np.zeros((64, 128), np.uint8)
    want[[7, 63, 2]] = source.reshape(4, 128)[[0, 1, 3]]
    assert (target == want).all()


# What a tensor load must not do


def box16(source):
    return row_major(source, "u8", (64, 16), (64, 16))


def test_global_bounds():
    source = bytes_of(7, 64 * 16)
    m = row_major(source, "u8", (64, 17), (64, 16))
    assert codes(INIT + load_text(m, (0, 1)), [np.zeros(4, np.uint8), source], [m]) == {"out-of-bounds"}
    clean(INIT + load_text(m, (0, 0)), [np.zeros(4, np.uint8), source], [m])


def test_shared_bounds_and_alignment():
    source = bytes_of(7, 64 * 16)
    m = box16(source)
    memory = [np.zeros(4, np.uint8), source]
    assert codes(INIT + load_text(m, (0, 0), 1024 + 64), memory, [m]) == {"misaligned"}
    assert codes(INIT + load_text(m, (0, 0), 16384 - 512), memory, [m]) == {"out-of-bounds"}
    assert "barrier-misuse" in codes(INIT + load_text(m, (0, 0), 0), memory, [m])


def test_uninitialised_source():
    source = Buffer.of(bytes_of(7, 64 * 16), "source", initialised=False)
    m = TensorMap(source.address, "u8", (64, 16), (64,), (64, 16), (1, 1))
    assert "uninitialised-read" in codes(INIT + load_text(m, (0, 0)), [np.zeros(4, np.uint8), source], [m])


def test_readonly_target():
    target = Buffer.of(bytes_of(7, 64 * 16), "target", readonly=True)
    m = TensorMap(target.address, "u8", (64, 16), (64,), (64, 16), (1, 1))
    assert codes(store_text(), [target, bytes_of(1, 1024)], [m]) == {"write-readonly"}


def test_tensor_maps_are_checked():
    source = bytes_of(7, 64 * 16)
    good = box16(source)
    memory = [np.zeros(4, np.uint8), source]
    bad = TensorMap(good.global_address, "u8", (64, 16), (64,), (72, 16), (1, 1))
    assert "tensormap" in codes(INIT + load_text(bad, (0, 0)), memory, [bad])
    assert "tensormap" in codes(INIT + load_text(good, (0, 0, 0)), memory, [good])
    assert "tensormap" in codes(INIT + load_text(good, (0, 0)), memory, [b"\xff" * 128])


def test_reading_before_the_copy_is_complete():
    source = bytes_of(7, 64 * 16)
    m = box16(source)
    body = INIT + load_text(m, (0, 0)).split("{\n.reg .pred done")[0] + "bar.sync 0;" + dump(1024) + wait("%sm", 0)
    out = aligned(np.zeros(1024, np.uint8))
    for policy in ("random", "lazy"):
        assert codes(body, [out, source], [m], policy=policy) & {"in-flight-access", "race"}
    assert codes(body, [out, source], [m]) & {"race"}


def test_overwriting_what_others_still_read():
    """Warp 1 reads the tile while warp 0 loads the next one over it without waiting for the reader."""
    source = bytes_of(7, 64 * 16)
    m = box16(source)
    second = load_text(m, (0, 0)).replace('"%sm", 0', '"%sm", 1').replace("[%sm], 0", "[%sm], 1")
    second = second.replace("again", "again2").replace("over", "over2")
    head = INIT + "setp.eq.u32 %p4, %warp, 1;" + load_text(m, (0, 0)) + "@%p4 bra reader; bar.sync 1, 64;" + second
    memory = [np.zeros(4, np.uint8), source]
    read, arrive = "ld.shared.b32 %r1, [%sm+1024];", "bar.arrive 1, 64;"
    for policy in POLICIES:
        clean(head + "ret; reader:" + read + arrive, memory, [m], block=64, policy=policy)
    found = [codes(head + "ret; reader:" + arrive + read, memory, [m], block=64, policy=policy) for policy in POLICIES]
    assert {"race", "in-flight-access"} & set().union(*found)


def test_wrong_transaction_count():
    source = bytes_of(7, 64 * 16)
    m = box16(source)
    body = INIT + load_text(m, (0, 0))
    memory = [np.zeros(4, np.uint8), source]
    assert "deadlock" in codes(body.replace("[%sm], 1024;", "[%sm], 1152;"), memory, [m])
    assert codes(body.replace("[%sm], 1024;", "[%sm], 896;"), memory, [m]) & {"deadlock", "leftover-transactions"}


def test_missing_init_fence():
    source = bytes_of(7, 64 * 16)
    m = box16(source)
    body = INIT.replace("@%first fence.mbarrier_init.release.cluster;", "") + load_text(m, (0, 0))
    assert codes(body, [np.zeros(4, np.uint8), source], [m]) == {"missing-mbarrier-init-fence"}
    fenced = INIT.replace("fence.mbarrier_init.release.cluster", "fence.proxy.async.shared::cta")
    clean(fenced + load_text(m, (0, 0)), [np.zeros(4, np.uint8), source], [m])


def test_every_lane_that_executes_a_load_issues_one():
    source = bytes_of(7, 64 * 16)
    m = box16(source)
    body = INIT + load_text(m, (0, 0)).replace("@%first cp.async", "cp.async")
    assert codes(body, [np.zeros(4, np.uint8), source], [m], policy="lazy") >= {"in-flight-access"}


# Clusters


@pytest.mark.parametrize("policy", POLICIES)
def test_multicast(policy):
    """Each CTA of four loads a quarter of the tile and sends it to all."""
    source = bytes_of(8, 4 * 256)
    m = row_major(source, "u8", (256, 4), (256, 1))
    out = aligned(np.zeros((4, 1024), np.uint8))
    body = f"""
    @%first mbarrier.init.shared.b64 [%sm], 1;
    @%first fence.mbarrier_init.release.cluster;
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 1024;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    shl.b32 %r1, %rank, 8;
    add.u32 %r20, %sm, 1024;
    add.u32 %r20, %r20, %r1;
    mov.b32 %r2, 0;
    mov.b16 %h1, 15;
    @%first cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster \
[%r20], [%m0, {{%r2, %rank}}], [%sm], %h1;
    {wait("%sm", 0)}
    shl.b32 %r3, %rank, 10;
    cvt.u64.u32 %d0, %r3;
    add.u64 %g0, %g0, %d0;
    {dump(1024)}
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    report = clean(body, [out, source], [m], grid=4, cluster=4, policy=policy)
    assert (out == source).all()
    assert report.counters["tma_load_bytes"] == 4096
    assert report.counters["tma_load_global_bytes"] == 1024
    wrong = codes(body.replace("%h1, 15", "%h1, 31"), [out, source], [m], grid=4, cluster=4)
    assert wrong == {"out-of-bounds"}


@pytest.mark.parametrize("policy", POLICIES)
def test_pair_of_ctas_signals_the_leader(policy):
    """cta_group::2: both CTAs load to their own memory and signal the even CTA's barrier."""
    source = bytes_of(9, 512)
    m = row_major(source, "u8", (256, 2), (256, 1))
    out = aligned(np.zeros((2, 256), np.uint8))
    body = f"""
    @%first mbarrier.init.shared.b64 [%sm], 1;
    @%first fence.mbarrier_init.release.cluster;
    setp.eq.u32 %p1, %rank, 0;
    and.pred %p2, %p1, %first;
    @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 512;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    add.u32 %r20, %sm, 1024;
    and.b32 %r21, %sm, 0xFEFFFFFF;
    mov.b32 %r2, 0;
    @%first cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.cta_group::2 \
[%r20], [%m0, {{%r2, %rank}}], [%r21];
    @!%p1 bra meet;
    {wait("%sm", 0)}
    meet:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    shl.b32 %r3, %rank, 8;
    cvt.u64.u32 %d0, %r3;
    add.u64 %g0, %g0, %d0;
    {dump(256)}
    """
    clean(body, [out, source], [m], grid=2, cluster=2, policy=policy)
    assert (out.reshape(-1) == source).all()
    alone = codes(body.replace(".cta_group::2", ""), [out, source], [m], grid=2, cluster=2)
    assert "barrier-misuse" in alone


def test_pair_multicast_signals_the_side_of_the_barrier():
    """Both CTAs are destinations, and the even CTA's barrier counts both boxes."""
    source = bytes_of(10, 256)
    m = row_major(source, "u8", (256, 1), (256, 1))
    out = aligned(np.zeros((2, 256), np.uint8))
    body = f"""
    @%first mbarrier.init.shared.b64 [%sm], 1;
    @%first fence.mbarrier_init.release.cluster;
    setp.eq.u32 %p1, %rank, 0;
    and.pred %p2, %p1, %first;
    @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 512;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    add.u32 %r20, %sm, 1024;
    mov.b32 %r2, 0;
    mov.b16 %h1, 3;
    @%p2 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.cta_group::2 \
[%r20], [%m0, {{%r2, %r2}}], [%sm], %h1;
    @!%p1 bra meet;
    {wait("%sm", 0)}
    meet:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    shl.b32 %r3, %rank, 8;
    cvt.u64.u32 %d0, %r3;
    add.u64 %g0, %g0, %d0;
    {dump(256)}
    """
    clean(body, [out, source], [m], grid=2, cluster=2)
    assert (out == source).all()


# Stores, groups, reductions


def store_text(wait_line="cp.async.bulk.wait_group.read 0;", fence="fence.proxy.async.shared::cta;"):
    return (
        fill(1024)
        + f"""
    {fence}
    bar.sync 0;
    add.u32 %r20, %sm, 1024;
    mov.b32 %r2, 0;
    cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%m0, {{%r2, %r2}}], [%r20];
    cp.async.bulk.commit_group;
    {wait_line}
    """
    )


def test_store_needs_a_proxy_fence():
    target, source = bytes_of(1, 1024), bytes_of(2, 1024)
    m = box16(target)
    assert codes(store_text(fence=""), [target, source], [m]) == {"missing-proxy-fence"}


@pytest.mark.parametrize("policy", POLICIES)
def test_exit_without_waiting_for_a_store(policy):
    target, source = bytes_of(1, 1024), bytes_of(2, 1024)
    m = box16(target)
    assert "shared-in-use-at-exit" in codes(store_text(""), [target, source], [m], policy=policy)
    waits_for_older = store_text("cp.async.bulk.wait_group.read 1;")
    assert "shared-in-use-at-exit" in codes(waits_for_older, [target, source], [m], policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_wait_group_leaves_the_newest(policy):
    """Three stores from a ring of two slots: reusing slot 0 needs the first group, not the second."""
    out = aligned(np.zeros((3, 128), np.uint8))
    store = """
    mov.b32 %r3, {value};
    shl.b32 %r4, %lane, 2;
    add.u32 %r4, %r4, %sm;
    st.shared.b32 [%r4+{slot}], %r3;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    add.u32 %r20, %sm, {slot};
    add.u64 %d1, %g0, {offset};
    mov.b32 %r5, 128;
    @%first cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r20], %r5;
    @%first cp.async.bulk.commit_group;
    @%first cp.async.bulk.wait_group.read {newest};
    bar.warp.sync -1;
    """

    def body(newest):
        parts = [
            store.format(value=i + 1, slot=1024 + 128 * (i % 2), offset=128 * i, newest=newest if i < 2 else 0)
            for i in range(3)
        ]
        return "\n".join(parts)

    clean(body(1), [out], policy=policy)
    assert (out.view(np.uint32) == np.arange(1, 4, dtype=np.uint32)[:, None]).all()
    assert "race" in codes(body(2), [out], policy=policy)


def test_commits_by_different_lanes_are_different_groups():
    """Lane 1 waits for its own group only."""
    out = aligned(np.zeros(256, np.uint8))
    body = (
        fill(256)
        + """
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.lt.u32 %p1, %lane, 2;
    @!%p1 ret;
    shl.b32 %r1, %lane, 7;
    add.u32 %r20, %sm, %r1;
    add.u32 %r20, %r20, 1024;
    cvt.u64.u32 %d0, %r1;
    add.u64 %d1, %g0, %d0;
    mov.b32 %r5, 128;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r20], %r5;
    cp.async.bulk.commit_group;
    setp.eq.u32 %p2, %lane, 1;
    @%p2 cp.async.bulk.wait_group 0;
    """
    )
    source = bytes_of(1, 256)
    report = run(body, [out, source])
    assert report.codes() == {"shared-in-use-at-exit"}
    assert (out == source).all()


INTEGERS = {
    "add": lambda a, b: a + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda a, b: np.where(a >= b, 0, a + 1),
    "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - 1),
}


@pytest.mark.parametrize("operation", INTEGERS)
def test_tensor_reduction_of_integers(operation):
    target, source = bytes_of(1, 1024).view(np.uint32), bytes_of(2, 1024).view(np.uint32)
    want = INTEGERS[operation](target, source).astype(np.uint32)
    m = row_major(target, "u32", (16, 16), (16, 16))
    text = store_text().replace(
        "cp.async.bulk.tensor.2d.global.shared::cta",
        "@%first cp.reduce.async.bulk.tensor.2d.global.shared::cta." + operation,
    )
    clean(text, [target, source], [m])
    assert (target == want).all()


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_tensor_reduction_of_floats(dtype):
    rng = np.random.default_rng(3)
    n = 1024 // (4 if dtype == "f32" else 2)
    values = rng.normal(size=(2, n)).astype(np.float32)
    if dtype == "bf16":
        stored = [aligned((v.view(np.uint32) >> 16).astype(np.uint16)) for v in values]
        exact = sum((s.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for s in stored)
        got = lambda a: (a.astype(np.uint32) << 16).view(np.float32)  # noqa: E731
        rounding = 2.0**-8
    else:
        kind = np.float16 if dtype == "f16" else np.float32
        stored = [aligned(v.astype(kind)) for v in values]
        exact = sum(s.astype(np.float64) for s in stored)
        got = lambda a: a.astype(np.float64)  # noqa: E731
        rounding = 2.0**-11 if dtype == "f16" else 2.0**-24
    m = row_major(stored[0], dtype, (n // 8, 8), (n // 8, 8))
    text = store_text().replace(
        "cp.async.bulk.tensor.2d.global.shared::cta", "@%first cp.reduce.async.bulk.tensor.2d.global.shared::cta.add"
    )
    clean(text, stored, [m])
    assert (np.abs(got(stored[0]) - exact) <= np.abs(exact) * rounding).all()


def test_reductions_count_for_every_lane():
    """A reduction runs once for each lane that executes it, as an H200 showed."""
    for guard, times in (("@%first", 1), ("@%p1", 3), ("", 32)):
        target, source = aligned(np.zeros(256, np.uint32)), bytes_of(2, 1024).view(np.uint32)
        m = row_major(target, "u32", (16, 16), (16, 16))
        text = "setp.lt.u32 %p1, %lane, 3;" + store_text().replace(
            "cp.async.bulk.tensor.2d.global.shared::cta",
            guard + " cp.reduce.async.bulk.tensor.2d.global.shared::cta.add",
        )
        clean(text, [target, source], [m])
        assert (target == source * np.uint32(times)).all()


def test_reductions_that_do_not_exist():
    target, source = bytes_of(1, 1024), bytes_of(2, 1024)
    m = box16(target)
    text = store_text().replace(
        "cp.async.bulk.tensor.2d.global.shared::cta", "@%first cp.reduce.async.bulk.tensor.2d.global.shared::cta.add"
    )
    assert codes(text, [target, source], [m]) == {"tensormap"}
    with pytest.raises(Unsupported):
        run("cp.reduce.async.bulk.global.shared::cta.bulk_group.min.f32 [%g0], [%sm], 16;", [target])


# Bulk copies without a map


@pytest.mark.parametrize("policy", POLICIES)
def test_bulk_copy_in_and_out(policy):
    source, out = bytes_of(1, 512), aligned(np.zeros(512, np.uint8))
    body = (
        INIT
        + f"""
    mov.b32 %r5, 496;
    add.u32 %r20, %sm, 1040;
    add.u64 %d1, %g1, 16;
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], %r5;
    @%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%d1], %r5, [%sm];
    {wait("%sm", 0)}
    @%first cp.async.bulk.global.shared::cta.bulk_group [%g0], [%r20], %r5;
    @%first cp.async.bulk.commit_group;
    @%first cp.async.bulk.wait_group 0;
    """
    )
    clean(body, [out, source], policy=policy)
    assert (out[:496] == source[16:]).all()
    assert not out[496:].any()
    for broken in ("add.u32 %r20, %sm, 1032;", "add.u32 %r20, %sm, 1040; mov.b32 %r5, 488;"):
        assert codes(body.replace("add.u32 %r20, %sm, 1040;", broken), [out, source]) == {"misaligned"}
    assert codes(body.replace("%r5, 496", "%r5, 512"), [out, source]) == {"out-of-bounds"}


def test_bulk_reduction():
    target, source = bytes_of(1, 256).view(np.float32), bytes_of(2, 256).view(np.float32)
    target[:] = np.arange(64)
    source[:] = 0.5
    body = (
        fill(256)
        + """
    fence.proxy.async.shared::cta;
    bar.sync 0;
    add.u32 %r20, %sm, 1024;
    mov.b32 %r5, 256;
    @%first cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%g0], [%r20], %r5;
    @%first cp.async.bulk.commit_group;
    @%first cp.async.bulk.wait_group 0;
    """
    )
    clean(body, [target, source])
    assert (target == np.arange(64) + 0.5).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_copy_to_another_cta(policy):
    source, out = bytes_of(1, 256), aligned(np.zeros(256, np.uint8))
    body = f"""
    @%first mbarrier.init.shared.b64 [%sm], 1;
    @%first fence.mbarrier_init.release.cluster;
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 256;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    setp.eq.u32 %p1, %rank, 1;
    @%p1 bra receives;
    {fill(256)}
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mapa.shared::cluster.u32 %r1, %sm, 1;
    add.u32 %r2, %r1, 2048;
    add.u32 %r20, %sm, 1024;
    mov.b32 %r5, 256;
    @%first cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r2], [%r20], %r5, [%r1];
    @%first mbarrier.complete_tx.shared::cta.b64 [%sm], 256;
    bra meet;
    receives:
    {wait("%sm", 0)}
    {dump(256, 2048)}
    meet:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    clean(body, [out, source], grid=2, cluster=2, policy=policy)
    assert (out == source).all()


def test_prefetches_check_their_operands():
    source = bytes_of(1, 1024)
    m = box16(source)
    clean("mov.b32 %r1, 0; cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%m0, {%r1, %r1}];", [source], [m])
    clean("mov.b32 %r1, 64; cp.async.bulk.prefetch.L2.global [%g0], %r1;", [source])
    assert codes("mov.b32 %r1, 60; cp.async.bulk.prefetch.L2.global [%g0], %r1;", [source]) == {"misaligned"}


def test_unknown_forms_are_refused():
    for line in (
        "cp.async.bulk.tensor.2d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%sm], [%g0, {%r1, %r2}], [%sm];",
        "cp.async.bulk.tensor.2d.shared::cta.global.tile.bulk_group [%sm], [%g0, {%r1, %r2}], [%sm];",
        "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%sm], [%g0, {%r1, %r2}], [%sm], %h1;",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.frob [%sm], [%g0], 16, [%sm];",
        "cp.async.bulk.wait_group.write 0;",
        "cp.async.cg.shared.global [%sm], [%g0], 8;",
    ):
        with pytest.raises(Unsupported):
            run(line, [np.zeros(16, np.uint8)])


# cp.async


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("size", "kind"), [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")])
def test_cp_async_with_groups(size, kind, policy):
    source, out = bytes_of(1, 32 * size), aligned(np.zeros(32 * size, np.uint8))
    body = f"""
    mul.lo.u32 %r1, %lane, {size};
    add.u32 %r2, %sm, %r1;
    cvt.u64.u32 %d0, %r1;
    add.u64 %d1, %g1, %d0;
    cp.async.{kind}.shared.global [%r2+1024], [%d1], {size};
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.warp.sync -1;
    {dump(32 * size)}
    """
    clean(body, [out, source], policy=policy)
    assert (out == source).all()
    clean(body.replace("cp.async.commit_group;", "").replace("wait_group 0", "wait_all"), [out, source], policy=policy)
    found = codes(body.replace("wait_group 0", "wait_group 1"), [out, source], policy=policy)
    assert found & {"race", "in-flight-access"}


def test_cp_async_fills_with_zeros():
    source, out = bytes_of(1, 512), aligned(np.zeros(512, np.uint8))
    head = """
    shl.b32 %r1, %lane, 4;
    add.u32 %r2, %sm, %r1;
    cvt.u64.u32 %d0, %r1;
    add.u64 %d1, %g1, %d0;
    setp.lt.u32 %p1, %lane, 5;
    and.b32 %r3, %lane, 15;
    """
    tail = "cp.async.wait_all; bar.warp.sync -1;" + dump(512)
    clean(head + "cp.async.cg.shared.global [%r2+1024], [%d1], 16, %r3;" + tail, [out, source])
    keep = np.arange(16) < (np.arange(32) % 16)[:, None]
    assert (out.reshape(32, 16) == np.where(keep, source.reshape(32, 16), 0)).all()
    clean(head + "cp.async.cg.shared.global [%r2+1024], [%d1], 16, %p1;" + tail, [out, source])
    want = source.reshape(32, 16).copy()
    want[:5] = 0
    assert (out.reshape(32, 16) == want).all()
    # Lanes that read nothing may point anywhere.
    far = head + "mov.b32 %r3, 0; add.u64 %d1, %d1, 0x1000000;cp.async.cg.shared.global [%r2+1024], [%d1], 16, %r3;"
    clean(far + tail, [out, source])
    assert not out.any()
    late = head + "mov.b32 %r3, 17; cp.async.cg.shared.global [%r2+1024], [%d1], 16, %r3;"
    assert codes(late + tail, [out, source]) == {"bad-value"}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("noinc", [True, False])
def test_cp_async_reports_to_an_mbarrier(noinc, policy):
    source, out = bytes_of(1, 512), aligned(np.zeros(512, np.uint8))
    body = f"""
    @%first mbarrier.init.shared.b64 [%sm], {32 if noinc else 33};
    bar.sync 0;
    setp.eq.u32 %p1, %warp, 1;
    @%p1 bra consumer;
    shl.b32 %r1, %lane, 4;
    add.u32 %r2, %sm, %r1;
    cvt.u64.u32 %d0, %r1;
    add.u64 %d1, %g1, %d0;
    cp.async.cg.shared.global [%r2+1024], [%d1], 16;
    cp.async.mbarrier.arrive{".noinc" if noinc else ""}.shared.b64 [%sm];
    {"" if noinc else "mbarrier.arrive.shared.b64 _, [%sm];"}
    ret;
    consumer:
    {"" if noinc else "@%p2 ret; setp.eq.u32 %p3, %lane, 0; @%p3 mbarrier.arrive.shared.b64 _, [%sm];"}
    {wait("%sm", 0)}
    sub.u32 %tid, %tid, 32;
    {dump(512)}
    """
    body = "setp.ne.u32 %p2, 0, 0;" + body
    clean(body, [out, source], block=64, policy=policy)
    assert (out == source).all()


# st.async, red.async


@pytest.mark.parametrize("policy", POLICIES)
def test_remote_stores_and_reductions(policy):
    out = aligned(np.zeros(64, np.uint32))
    body = f"""
    @%first mbarrier.init.shared.b64 [%sm], 1;
    @%first fence.mbarrier_init.release.cluster;
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 384;
    shl.b32 %r1, %lane, 3;
    add.u32 %r1, %r1, %sm;
    mov.b32 %r8, 100;
    st.shared.b32 [%r1+1024], %r8;
    st.shared.b32 [%r1+1028], %r8;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    xor.b32 %r9, %rank, 1;
    mapa.shared::cluster.u32 %r2, %r1, %r9;
    mapa.shared::cluster.u32 %r3, %sm, %r9;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%r2+2048], {{%lane, %rank}}, [%r3];
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r2+1024], %lane, [%r3];
    {wait("%sm", 0)}
    ld.shared.b32 %r10, [%r1+2048];
    ld.shared.b32 %r11, [%r1+2052];
    ld.shared.b32 %r12, [%r1+1024];
    setp.ne.u32 %p1, %r10, %lane;
    @%p1 trap;
    setp.ne.u32 %p1, %r11, %r9;
    @%p1 trap;
    add.u32 %r13, %lane, 100;
    setp.ne.u32 %p1, %r12, %r13;
    @%p1 trap;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    clean(body, [out], grid=2, cluster=2, policy=policy)


# Speed is a property of this module: a 16 KiB box must not cost much more than its bytes.


def test_counters_of_many_copies():
    source = bytes_of(1, 128 * 128)
    m = row_major(source, "u8", (128, 128), (128, 128), swizzle=Swizzle.B128)
    body = (
        INIT
        + f"""
    mov.b32 %r0, 0;
    loop:
    and.b32 %r1, %r0, 1;
    {load_text(m, (0, 0), 1024).replace("], 0;", "], %r1;")}
    bar.warp.sync -1;
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p1, %r0, 20;
    @%p1 bra loop;
    """
    )
    report = clean(body, [np.zeros(4, np.uint8), source], [m], shared=32768)
    assert report.counters["tma_loads"] == 20
    assert report.counters["tma_load_bytes"] == 20 * 16384
