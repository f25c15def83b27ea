"""tcgen05 instructions against slow references written independently of the implementation's index arithmetic."""

import re

import asm_kit
import numpy as np
import pytest
from tensor_bench import Bench, vector

from ptxsim import barriers, registry
from ptxsim.findings import (
    BAD_VALUE,
    DEADLOCK,
    MISSING_PROXY_FENCE,
    RACE,
    TMEM_IN_USE,
    TMEM_MISUSE,
    UNINITIALISED_READ,
    Stop,
    Unsupported,
)
from ptxsim.mma_formats import E2M1, E2M3, E3M2, E4M3, E5M2, UE4M3, UE8M0
from ptxsim.registry import BLOCK

MMA4 = (
    "tcgen05.mma.cta_group::{g}.kind::mxf4nvf4.block_scale.block16.collector::a::discard "
    "[%r1], %d1, %d2, %r2, [%r3], [%r4], %p1"
)
ALLOC = "tcgen05.alloc.cta_group::{g}.sync.aligned.shared::cta.b32 [%r1], %r2"
CP = "tcgen05.cp.cta_group::{g}.32x128b.warpx4 [%r1], %d1"


def desc(start, leading=0, stride=1024, swizzle=2):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | swizzle << 61


def idesc4(m, n):
    return 1 << 7 | 1 << 10 | n >> 3 << 17 | m >> 7 << 27


def prepared(*texts, columns=512, **options):
    """A bench whose CTAs have tensor memory allocated at column 0."""
    group = 2 if any("cta_group::2" in text for text in texts) else 1
    bench = Bench(*texts, ALLOC.format(g=group), **options)
    for cta in bench.ctas:
        bench.machine.running = cta.warps[0]
        cta.tmem.allocate(bench.machine.found, columns)
    bench.machine.running = None
    return bench


def write_tmem(bench, cta, column, words):
    """(128, n) words as if somebody had written them long ago."""
    tmem = bench.ctas[cta].tmem
    columns = slice(column, column + words.shape[1])
    tmem.data[:, columns] = words
    tmem.valid[:, columns] = True


def put_k_major(image, start, rows, row_bytes):
    """Stores rows of 128 bytes into a shared memory image in 8-row atoms of 1024 bytes, 128-byte swizzle."""
    for r in range(rows.shape[0]):
        for byte in range(row_bytes):
            address = start + r // 8 * 1024 + r % 8 * 128 + byte
            image[address ^ ((address >> 7) % 8) << 4] = rows[r, byte]


def pack4(codes):
    return (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)


def scale_words(scales):
    """(rows, 4) scale bytes -> the (128, rows / 32) words of tensor memory that hold them."""
    rows = scales.shape[0]
    words = np.zeros((128, -(-rows // 32)), np.uint32)
    for r in range(rows):
        word = sum(int(scales[r, k]) << 8 * k for k in range(scales.shape[1]))
        for quarter in range(4):
            words[32 * quarter + r % 32, r // 32] = word
    return words


def expand(values, scales, block):
    return values.astype(np.float64) * np.repeat(scales.astype(np.float64), block, axis=1)


def random_scales(rng, rows, count=4):
    return rng.integers(0x20, 0x48, (rows, count)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Allocation


def test_alloc_writes_the_address_and_dealloc_frees():
    bench = Bench(
        ALLOC.format(g=1),
        "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, %r2",
        "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned",
    )
    w = bench.warp(0)
    for k, expected in enumerate((0, 256, 384)):
        assert bench.do(w, 0, 0x400 + 4 * k, (256, 128, 128)[k]) is None
        assert bench.ctas[0].smem.data[0x400 + 4 * k : 0x404 + 4 * k].view(np.uint32)[0] == expected
    assert bench.do(w, 0, 0x410, 32) is BLOCK
    bench.do(w, 1, 256, 128)
    assert bench.do(w, 0, 0x410, 32) is None
    assert bench.ctas[0].smem.data[0x410:0x414].view(np.uint32)[0] == 256
    assert not bench.codes()
    bench.do(w, 2)
    bench.do(w, 1, 256, 32)
    bench.do(w, 0, 0x414, 32)
    assert bench.codes() == [TMEM_MISUSE]
    assert "relinquish" in bench.messages()[0]


@pytest.mark.parametrize("columns", [0, 16, 48, 1024])
def test_alloc_of_a_bad_number_of_columns(columns):
    bench = Bench(ALLOC.format(g=1))
    with pytest.raises(Stop):
        bench.do(bench.warp(0), 0, 0x400, columns)
    assert bench.codes() == [TMEM_MISUSE]


def test_alloc_sizes_must_not_grow():
    bench = Bench(ALLOC.format(g=1))
    bench.do(bench.warp(0), 0, 0x400, 32)
    bench.do(bench.warp(0), 0, 0x400, 64)
    assert bench.codes() == [TMEM_MISUSE]


def test_dealloc_of_what_is_not_allocated():
    bench = Bench("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, %r2")
    bench.do(bench.warp(0), 0, 0, 32)
    assert bench.codes() == [TMEM_MISUSE]


def test_alloc_of_a_pair_waits_for_the_peer():
    bench = Bench(ALLOC.format(g=2), "tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r1, %r2", cluster=2)
    first, second = bench.warp(0), bench.warp(0, cta=1)
    assert bench.do(first, 0, 0x400, 512) is BLOCK
    assert bench.do(second, 0, 1 << 24 | 0x400, 512) is None
    assert bench.do(first, 0, 0x400, 512) is None
    assert bench.do(second, 1, 0, 512) is BLOCK
    assert bench.do(first, 1, 0, 512) is None
    assert bench.do(second, 1, 0, 512) is None
    assert not bench.codes()


def test_a_pair_needs_a_peer():
    bench = Bench(ALLOC.format(g=2))
    with pytest.raises(Stop):
        bench.do(bench.warp(0), 0, 0x400, 512)
    assert bench.codes() == [TMEM_MISUSE]


def test_one_cta_group_in_a_kernel():
    bench = Bench(ALLOC.format(g=1), "tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned", cluster=2)
    bench.do(bench.warp(0), 0, 0x400, 32)
    bench.do(bench.warp(0), 1)
    assert bench.codes() == [TMEM_MISUSE]


# ---------------------------------------------------------------------------------------------------------------------
# ld and st


def lane_and_column(shape, register, thread):
    """From the figures of PTX ISA, "Matrix fragments for shape ...": where a thread's register lies."""
    if shape == "32x32b":
        return thread, register
    if shape == "16x64b":
        return (thread % 2) * 8 + thread // 4, 2 * register + (thread % 4) // 2
    if shape == "16x128b":
        return thread // 4 + (8 if register % 2 else 0), 4 * (register // 2) + thread % 4
    assert shape == "16x256b"
    return thread // 4 + (8 if register & 2 else 0), 8 * (register // 4) + 2 * (thread % 4) + register % 2


SHAPES = [
    ("32x32b", 1, 1),
    ("32x32b", 32, 32),
    ("32x32b", 128, 128),
    ("16x64b", 4, 4),
    ("16x128b", 2, 4),
    ("16x256b", 2, 8),
]


@pytest.mark.parametrize(("shape", "number", "registers"), SHAPES)
def test_ld_layout(shape, number, registers):
    bench = prepared(f"tcgen05.ld.sync.aligned.{shape}.x{number}.b32 {vector(1, registers)}, [%r200]")
    words = np.arange(128 * 512, dtype=np.uint32).reshape(128, 512)
    write_tmem(bench, 0, 0, words)
    values = bench.do(bench.warp(2), 0, 64 << 16 | 16)
    for register in range(registers):
        for thread in range(32):
            lane, column = lane_and_column(shape, register, thread)
            assert values[register][thread] == words[64 + lane, 16 + column]
    assert not bench.codes()


HALVES = [(*shape, half) for shape in SHAPES for half in (0, 16) if shape[0] != "32x32b" or not half]


@pytest.mark.parametrize(("shape", "number", "registers", "half"), HALVES)
def test_st_and_ld_with_packing(shape, number, registers, half):
    if registers > 64:
        number, registers = 64, 64
    bench = prepared(
        f"tcgen05.st.sync.aligned.{shape}.x{number}.unpack::16b.b32 [%r200], {vector(1, registers)}",
        f"tcgen05.ld.sync.aligned.{shape}.x{number}.pack::16b.b32 {vector(1, registers)}, [%r200]",
        "tcgen05.wait::st.sync.aligned",
    )
    rng = np.random.default_rng(1)
    values = [rng.integers(0, 2**32, 32, np.uint32) for _ in range(registers)]
    w, address = bench.warp(1), (32 + half) << 16 | 8
    bench.do(w, 0, address, values)
    tmem = bench.ctas[0].tmem
    for register in range(registers):
        for thread in range(32):
            lane, column = lane_and_column(shape, register, thread)
            both = tmem.data[32 + half + lane, 8 + 2 * column : 10 + 2 * column]
            assert both[0] | both[1] << 16 == values[register][thread]
    bench.do(w, 2)
    np.testing.assert_array_equal(np.stack(bench.do(w, 1, address)), np.stack(values))
    assert not bench.codes()


def test_16x32bx2_reads_two_halves():
    bench = prepared(f"tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {vector(1, 4)}, [%r200], 64")
    words = np.arange(128 * 512, dtype=np.uint32).reshape(128, 512)
    write_tmem(bench, 0, 0, words)
    values = bench.do(bench.warp(0), 0, 16 << 16 | 2)
    for register in range(4):
        for thread in range(32):
            assert values[register][thread] == words[16 + thread % 16, 2 + register + (64 if thread >= 16 else 0)]


def test_st_of_uniform_registers_and_a_single_register():
    bench = prepared(
        "tcgen05.st.sync.aligned.32x32b.x2.b32 [%r200], {%r1, %r2}",
        "tcgen05.wait::st.sync.aligned",
        "tcgen05.ld.sync.aligned.32x32b.x1.b32 %r1, [%r200]",
    )
    w = bench.warp(3)
    bench.do(w, 0, 96 << 16, [5, 7])
    bench.do(w, 1)
    assert bench.do(w, 2, 96 << 16 | 1).tolist() == [7] * 32


@pytest.mark.parametrize("lane", [16, 31, 33, 64])
def test_ld_outside_the_warps_lanes(lane):
    bench = prepared("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r200]")
    with pytest.raises(Stop):
        bench.do(bench.warp(1), 0, lane << 16)
    assert bench.codes() == [TMEM_MISUSE]


def test_lane_0_means_the_warps_own_quarter():
    bench = prepared("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r200]")
    words = np.arange(128 * 512, dtype=np.uint32).reshape(128, 512)
    write_tmem(bench, 0, 0, words)
    np.testing.assert_array_equal(bench.do(bench.warp(1), 0, 7)[0], words[32:64, 7])
    assert not bench.codes()


def test_ld_outside_the_allocation():
    bench = prepared("tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r1, %r2}, [%r200]", columns=64)
    write_tmem(bench, 0, 0, np.zeros((128, 512), np.uint32))
    bench.do(bench.warp(0), 0, 62)
    with pytest.raises(Stop):
        bench.do(bench.warp(0), 0, 63)
    assert bench.codes() == [TMEM_MISUSE]


def test_ld_of_what_nobody_wrote():
    bench = prepared("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r200]")
    bench.do(bench.warp(0), 0, 0)
    assert bench.codes() == [UNINITIALISED_READ]


def test_ld_of_a_store_under_way():
    texts = (
        "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r200], {%r1}",
        "tcgen05.wait::st.sync.aligned",
        "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r200]",
    )
    bench = prepared(*texts)
    w = bench.warp(0)
    bench.do(w, 0, 0, [1])
    bench.do(w, 0, 0, [2])
    assert not bench.codes()
    bench.do(w, 2, 0)
    assert bench.codes() == [RACE]
    assert "wait::st" in bench.messages()[0]
    bench = prepared(*texts, warps=8)
    w, other = bench.warp(0), bench.warp(4)
    bench.do(w, 0, 0, [1])
    bench.do(w, 1)
    bench.order(w, other)
    bench.do(other, 2, 0)
    assert not bench.codes()


@pytest.mark.parametrize(
    "text",
    [
        "tcgen05.ld.red.sync.aligned.32x32b.x2.min.u32 {%r1, %r2}, %r3, [%r4]",
        "tcgen05.ld.sync.aligned.16x256b.x64.b32 {%r1}, [%r4]",
        "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r1}, [%r4]",
        "tcgen05.shift.cta_group::1.down [%r1]",
        "tcgen05.cp.cta_group::1.32x128b [%r1], %d1",
        "tcgen05.cp.cta_group::1.128x128b.b8x16.b4x16_p64 [%r1], %d1",
        "tcgen05.mma.ws.cta_group::1.kind::f16 [%r1], %d1, %d2, %r2, %p1",
        "tcgen05.mma.sp.cta_group::1.kind::f16 [%r1], %d1, %d2, [%r3], %r2, %p1",
        "tcgen05.mma.cta_group::1.kind::i8.ashift [%r1], [%r5], %d2, %r2, %p1",
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale [%r1], %d1, %d2, %r2, [%r3], [%r4], %p1",
        "tcgen05.mma.cta_group::1.kind::f16 [%r1], %d1, %d2, %r2, {%r3, %r4}, %p1",
        "tcgen05.mma.cta_group::1.kind::f8f6f4 [%r1], %d1, %d2, %r2, %p1, 3",
        "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cta.b64 [%r1]",
    ],
)
def test_refused_forms(text):
    with pytest.raises(Unsupported):
        Bench(text)


# ---------------------------------------------------------------------------------------------------------------------
# cp


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ("32x128b.warpx4", 32, 4),
        ("64x128b.warpx2::02_13", 64, 4),
        ("64x128b.warpx2::01_23", 64, 4),
        ("128x128b", 128, 4),
        ("128x256b", 128, 8),
        ("4x256b", 4, 8),
    ],
)
@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_cp(shape, rows, columns, policy):
    bench = prepared(f"tcgen05.cp.cta_group::1.{shape} [%r1], %d1", policy=policy)
    data = np.random.default_rng(2).integers(0, 256, 8192).astype(np.uint8)
    bench.fill(0x800, data)
    bench.one(bench.warp(1), 0, 20, desc(0x800, leading=4096, stride=128, swizzle=0))
    bench.drain()
    tmem = bench.ctas[0].tmem
    expected = np.zeros((128, columns), np.uint32)
    written = np.zeros(128, bool)
    for r in range(rows):
        # Core matrices of 8 rows x 16 bytes; the second half of 256 bits is a leading dimension further.
        raw = b"".join(bytes(data[r // 8 * 128 + r % 8 * 16 + c * 4096 :][:16]) for c in range(columns // 4))
        lanes = {
            "32x128b.warpx4": [r, r + 32, r + 64, r + 96],
            "64x128b.warpx2::02_13": [r, r + 64],
            "64x128b.warpx2::01_23": [r, r + 32] if r < 32 else [r + 32, r + 64],
            "4x256b": [32 * r],
        }.get(shape, [r])
        for lane in lanes:
            expected[lane] = np.frombuffer(raw, np.uint32)
            written[lane] = True
    np.testing.assert_array_equal(tmem.data[written, 20 : 20 + columns], expected[written])
    np.testing.assert_array_equal(tmem.valid[:, 20 : 20 + columns].all(1), written)
    assert not tmem.valid[:, :20].any()
    assert not tmem.valid[:, 20 + columns :].any()
    assert not bench.codes()


def test_cp_of_a_pair_copies_each_ctas_own_memory():
    bench = prepared(CP.format(g=2), cluster=2)
    images = [np.random.default_rng(cta).integers(0, 256, 512).astype(np.uint8) for cta in range(2)]
    for cta in range(2):
        bench.fill(0x800, images[cta], cta)
    bench.order(bench.warp(0, 1), bench.warp(0, 0))
    bench.one(bench.warp(0), 0, 0, desc(0x800, stride=128, swizzle=0))
    for cta in range(2):
        got = bench.ctas[cta].tmem.data[:32, :4]
        np.testing.assert_array_equal(np.ascontiguousarray(got).view(np.uint8).reshape(-1), images[cta])
    assert not bench.codes()


def test_cp_of_unfenced_stores():
    bench = prepared(CP.format(g=1))
    w = bench.warp(0)
    bench.machine.running = w
    bench.ctas[0].smem.store(w, np.arange(0x800, 0xA00, 16), 16, np.zeros((32, 16), np.uint8))
    bench.one(w, 0, 0, desc(0x800, stride=128, swizzle=0))
    assert bench.codes() == [MISSING_PROXY_FENCE]


# ---------------------------------------------------------------------------------------------------------------------
# mma


def fp4_problem(bench, m, n, seed=0, ctas=1):
    """Fills shared memory (A at 0x400, B at 0x8400) and scale factors (columns 256, 272); returns the product."""
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 16, (rows, 64)).astype(np.uint8) for rows in (m, n))
    sa, sb = random_scales(rng, m), random_scales(rng, n)
    for cta in range(ctas):
        image = np.zeros(0x10400, np.uint8)
        rows_a, rows_b = slice(cta * m // ctas, (cta + 1) * m // ctas), slice(cta * n // ctas, (cta + 1) * n // ctas)
        put_k_major(image, 0x400, pack4(a[rows_a]), 32)
        put_k_major(image, 0x8400, pack4(b[rows_b]), 32)
        bench.fill(0x400, image[0x400:], cta)
        write_tmem(bench, cta, 256, scale_words(sa[rows_a]))
        write_tmem(bench, cta, 272, scale_words(sb))
    return expand(E2M1[a], UE4M3[sa], 16) @ expand(E2M1[b], UE4M3[sb], 16).T


def mma4(bench, m, n, accumulate=0, d=0, sfa=256, sfb=272, w=None):
    bench.one(w or bench.warp(0), 0, d, desc(0x400), desc(0x8400), idesc4(m, n), sfa, sfb, accumulate)


@pytest.mark.parametrize("n", [8, 16, 96, 128, 256])
@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_nvfp4(n, policy):
    bench = prepared(MMA4.format(g=1), policy=policy)
    expected = fp4_problem(bench, 128, n)
    mma4(bench, 128, n)
    mma4(bench, 128, n, accumulate=1)
    bench.drain()
    np.testing.assert_allclose(bench.ctas[0].tmem.f32[:, :n], 2 * expected, rtol=1e-5, atol=1e-3)
    assert not bench.ctas[0].tmem.valid[:, n:256].any()
    assert not bench.codes()
    assert bench.machine.counters["mma_flops"] == 2 * 2 * 128 * n * 64


@pytest.mark.parametrize("n", [32, 256])
def test_nvfp4_pair(n):
    bench = prepared(MMA4.format(g=2), cluster=2)
    expected = fp4_problem(bench, 256, n, ctas=2)
    bench.order(bench.warp(0, 1), bench.warp(0, 0))
    mma4(bench, 256, n)
    for cta in range(2):
        got = bench.ctas[cta].tmem.f32[:, :n]
        np.testing.assert_allclose(got, expected[128 * cta : 128 * cta + 128], rtol=1e-5, atol=1e-3)
    assert not bench.codes()


def test_nvfp4_pair_with_128_rows():
    bench = prepared(MMA4.format(g=2), cluster=2)
    n = 128
    expected = fp4_problem(bench, 128, n, ctas=2)
    for cta in bench.ctas:
        # B's scale factors: the lower quarters hold those of the first half of the columns, the upper ones the rest.
        words = cta.tmem.data[:, 272:276].copy()
        cta.tmem.data[:64, 272:274] = words[:64, :2]
        cta.tmem.data[64:, 272:274] = words[64:, 2:]
        cta.tmem.valid[:, 274:276] = False
    bench.order(bench.warp(0, 1), bench.warp(0, 0))
    mma4(bench, 128, n)
    for cta in range(2):
        got = bench.ctas[cta].tmem.f32[:, : n // 2]
        rows = expected[64 * cta : 64 * cta + 64]
        np.testing.assert_allclose(got[:64], rows[:, : n // 2], rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(got[64:], rows[:, n // 2 :], rtol=1e-5, atol=1e-3)
    assert not bench.codes()


@pytest.mark.parametrize(
    ("kind", "size", "count", "a_id", "b_id", "fp4"),
    [("mxf4", ".block32", 2, 2, 0, True), ("mxf4", "", 2, 0, 2, True), ("mxf4nvf4", ".scale_vec::2X", 2, 0, 0, True),
     ("mxf8f6f4", ".scale_vec::1X", 1, 3, 1, False), ("mxf8f6f4", ".block32", 1, 0, 2, False)],
)  # fmt: skip
def test_mx_kinds(kind, size, count, a_id, b_id, fp4):
    bench = prepared(f"tcgen05.mma.cta_group::1.kind::{kind}.block_scale{size} [%r1], %d1, %d2, %r2, [%r3], [%r4], %p1")
    rng = np.random.default_rng(3)
    n, k = 64, 64 if fp4 else 32
    a, b = (rng.integers(0, 16 if fp4 else 0x70, (rows, k)).astype(np.uint8) for rows in (128, n))
    sa, sb = (rng.integers(120, 134, (rows, 4)).astype(np.uint8) for rows in (128, n))
    image = np.zeros(0x10400, np.uint8)
    put_k_major(image, 0x400, pack4(a) if fp4 else a, 32)
    put_k_major(image, 0x8400, pack4(b) if fp4 else b, 32)
    bench.fill(0x400, image[0x400:])
    write_tmem(bench, 0, 256, scale_words(sa))
    write_tmem(bench, 0, 272, scale_words(sb))
    format_bits = (1 << 7 | 1 << 10) if fp4 else 0  # E2M1, or E4M3
    idesc = b_id << 4 | format_bits | n >> 3 << 17 | 1 << 23 | 1 << 27 | a_id << 29
    # The upper two bits of a scale factor address name the byte too.
    bench.one(bench.warp(0), 0, 0, desc(0x400), desc(0x8400), idesc, a_id << 30 | 256, b_id << 30 | 272, 0)
    table = E2M1 if fp4 else E4M3
    expected = expand(table[a], UE8M0[sa[:, a_id : a_id + count]], 32) @ expand(
        table[b], UE8M0[sb[:, b_id : b_id + count]], 32
    ).T  # fmt: skip
    np.testing.assert_allclose(bench.ctas[0].tmem.f32[:, :n], expected, rtol=1e-5, atol=1e-2)
    assert not bench.codes()


def plain_idesc(m, n, a, b, d=1, extra=0):
    return d << 4 | a << 7 | b << 10 | n >> 3 << 17 | m >> 4 << 24 | extra


def random_operand(rng, name, rows, k):
    """Bytes (rows, 32) and values (rows, k) of an operand."""
    if name == "tf32":
        values = (rng.integers(-64, 64, (rows, k)) / 8).astype(np.float32)
        return values.view(np.uint8), values
    if name == "f16":
        values = (rng.integers(-64, 64, (rows, k)) / 8).astype(np.float16)
        return values.view(np.uint8), values.astype(np.float32)
    if name == "bf16":
        values = (rng.integers(-64, 64, (rows, k)) / 8).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), values
    codes = rng.integers(0, 0x70, (rows, k)).astype(np.uint8)
    if name in ("s8", "u8"):
        codes = rng.integers(0, 256, (rows, k)).astype(np.uint8)
        return codes, (codes.view(np.int8) if name == "s8" else codes).astype(np.float32)
    if name in ("e4m3", "e5m2"):
        return codes, (E4M3 if name == "e4m3" else E5M2)[codes]
    bits = 4 if name == "e2m1" else 6
    codes &= (1 << bits) - 1
    raw = np.full((rows, 32), 0xAB, np.uint8)
    for r in range(rows):
        for chunk in range(2):
            number = sum(int(codes[r, 16 * chunk + i]) << bits * i for i in range(16))
            raw[r, 16 * chunk : 16 * chunk + 2 * bits] = np.frombuffer(number.to_bytes(2 * bits, "little"), np.uint8)
    return raw, {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2}[name][codes]


F8F6F4 = {"e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5}
PLAIN = [
    ("f16", "f16", 0, "f16", 0, 16),
    ("f16", "bf16", 1, "f16", 0, 16),
    ("tf32", "tf32", 2, "tf32", 2, 8),
    ("i8", "s8", 1, "u8", 0, 32),
    *(("f8f6f4", a, F8F6F4[a], b, F8F6F4[b], 32) for a, b in (("e4m3", "e2m1"), ("e5m2", "e3m2"), ("e2m3", "e4m3"))),
]


@pytest.mark.parametrize(("kind", "a_name", "a_code", "b_name", "b_code", "k"), PLAIN)
@pytest.mark.parametrize("m", [64, 128])
def test_plain_kinds(kind, a_name, a_code, b_name, b_code, k, m):
    bench = prepared(f"tcgen05.mma.cta_group::1.kind::{kind} [%r1], %d1, %d2, %r2, %p1")
    rng = np.random.default_rng(4)
    n, lane = 48, 16 if m == 64 else 0
    (raw_a, a), (raw_b, b) = random_operand(rng, a_name, m, k), random_operand(rng, b_name, n, k)
    image = np.zeros(0x10400, np.uint8)
    put_k_major(image, 0x400, raw_a, 32)
    put_k_major(image, 0x8400, raw_b, 32)
    bench.fill(0x400, image[0x400:])
    idesc = plain_idesc(m, n, a_code, b_code, 2 if kind == "i8" else 1)
    for accumulate in (0, 1):
        bench.one(bench.warp(0), 0, lane << 16 | 32, desc(0x400), desc(0x8400), idesc, accumulate)
    expected = 2 * a.astype(np.float64) @ b.astype(np.float64).T
    tmem = bench.ctas[0].tmem
    result = (tmem.data.view(np.int32) if kind == "i8" else tmem.f32)[:, 32 : 32 + n]
    for row in range(m):
        where = row if m == 128 else 32 * (row // 16) + 16 + row % 16
        np.testing.assert_allclose(result[where], expected[row], rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert not bench.codes()


def test_transposed_bf16():
    """MN-major, 128-byte swizzle: 64 elements of M or N a row of 128 bytes, 8 rows of K an atom."""
    bench = prepared("tcgen05.mma.cta_group::1.kind::f16 [%r1], %d1, %d2, %r2, %p1")
    rng = np.random.default_rng(5)
    m, n, k = 128, 128, 16
    a, b = (rng.integers(-64, 64, (rows, k)).astype(np.float32) / 8 for rows in (m, n))
    image = np.zeros(0x10400, np.uint8)
    for start, values in ((0x400, a), (0x8400, b)):
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
        for r in range(values.shape[0]):
            for depth in range(k):
                address = start + r // 64 * 0x2000 + depth // 8 * 0x400 + depth % 8 * 128 + r % 64 * 2
                address ^= ((address >> 7) % 8) << 4
                image[address : address + 2] = raw[r : r + 1, depth].view(np.uint8)
    bench.fill(0x400, image[0x400:])
    one = desc(0x400, leading=0x2000, stride=0x400), desc(0x8400, leading=0x2000, stride=0x400)
    bench.one(bench.warp(0), 0, 0, *one, plain_idesc(m, n, 1, 1, 1, 0b11 << 15), 0)
    np.testing.assert_allclose(bench.ctas[0].tmem.f32[:, :n], a.astype(np.float64) @ b.astype(np.float64).T, rtol=1e-6)


def test_negation_lane_mask_and_input_scale():
    mask = "{%r3, %r4, %r5, %r6}"
    bench = prepared(f"tcgen05.mma.cta_group::1.kind::f16.collector::a::lastuse [%r1], %d1, %d2, %r2, {mask}, %p1, 3")
    rng = np.random.default_rng(6)
    (raw_a, a), (raw_b, b) = random_operand(rng, "f16", 128, 16), random_operand(rng, "f16", 32, 16)
    image = np.zeros(0x10400, np.uint8)
    put_k_major(image, 0x400, raw_a, 32)
    put_k_major(image, 0x8400, raw_b, 32)
    bench.fill(0x400, image[0x400:])
    before = rng.integers(-64, 64, (128, 32)).astype(np.float32)
    write_tmem(bench, 0, 0, before.view(np.uint32))
    disabled = [0x80000001, 0, 0xFFFF, 0]
    bench.one(bench.warp(0), 0, 0, desc(0x400), desc(0x8400), plain_idesc(128, 32, 0, 0, 1, 1 << 14), disabled, 1)
    for lane in range(128):
        off = disabled[lane // 32] >> lane % 32 & 1
        expected = before[lane] if off else before[lane] / 8 - a[lane] @ b.T
        np.testing.assert_allclose(bench.ctas[0].tmem.f32[lane, :32], expected, rtol=1e-6)


def test_half_results_lie_in_the_low_half_of_a_word():
    bench = prepared("tcgen05.mma.cta_group::1.kind::f16 [%r1], %d1, %d2, %r2, %p1")
    rng = np.random.default_rng(7)
    (raw_a, a), (raw_b, b) = random_operand(rng, "f16", 128, 16), random_operand(rng, "f16", 16, 16)
    image = np.zeros(0x10400, np.uint8)
    put_k_major(image, 0x400, raw_a, 32)
    put_k_major(image, 0x8400, raw_b, 32)
    bench.fill(0x400, image[0x400:])
    for accumulate in (0, 1):
        bench.one(bench.warp(0), 0, 0, desc(0x400), desc(0x8400), plain_idesc(128, 16, 0, 0, 0), accumulate)
    words = bench.ctas[0].tmem.data[:, :16]
    np.testing.assert_array_equal(words >> 16, 0)
    half = words.astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(half, (2 * (a @ b.T).astype(np.float16)))


def test_saturating_integers():
    bench = prepared("tcgen05.mma.cta_group::1.kind::i8 [%r1], %d1, %d2, %r2, %p1")
    image = np.full(0x10400, 127, np.uint8)
    bench.fill(0x400, image[0x400:])
    write_tmem(bench, 0, 0, np.full((128, 16), 0x7FFFFFF0, np.uint32))
    for extra, d in ((8, 0), (0, 8)):
        idesc = plain_idesc(128, 8, 1, 1, 2, extra)
        bench.one(bench.warp(0), 0, d, desc(0x400), desc(0x8400), idesc, 1)
    data = bench.ctas[0].tmem.data
    assert (data[:, :8] == 0x7FFFFFFF).all()
    assert (data[:, 8:16] == (0x7FFFFFF0 + 32 * 127 * 127)).all()


@pytest.mark.parametrize("m", [64, 128])
def test_a_from_tensor_memory(m):
    bench = prepared("tcgen05.mma.cta_group::1.kind::f16 [%r1], [%r5], %d2, %r2, %p1")
    rng = np.random.default_rng(8)
    n = 32
    (raw_a, a), (raw_b, b) = random_operand(rng, "bf16", m, 16), random_operand(rng, "bf16", n, 16)
    image = np.zeros(0x10400, np.uint8)
    put_k_major(image, 0x8400, raw_b, 32)
    bench.fill(0x400, image[0x400:])
    words = np.zeros((128, 8), np.uint32)
    lanes = [row if m == 128 else 32 * (row // 16) + row % 16 for row in range(m)]
    words[lanes] = raw_a.view(np.uint32)
    write_tmem(bench, 0, 64, words)
    bench.one(bench.warp(0), 0, 0, 64, desc(0x8400), plain_idesc(m, n, 1, 1), 0)
    np.testing.assert_allclose(bench.ctas[0].tmem.f32[lanes, :n], a @ b.T, rtol=1e-6)
    assert not bench.codes()


def test_accumulating_on_nothing():
    bench = prepared(MMA4.format(g=1))
    fp4_problem(bench, 128, 64)
    mma4(bench, 128, 64, accumulate=1)
    assert bench.codes() == [UNINITIALISED_READ]


def test_scale_factors_that_nobody_wrote():
    bench = prepared(MMA4.format(g=1))
    fp4_problem(bench, 128, 64)
    bench.ctas[0].tmem.valid[37, 273] = False
    mma4(bench, 128, 64)
    assert bench.codes() == [UNINITIALISED_READ]
    assert "column 273, lane 5" in bench.messages()[0]


def test_scale_factors_that_differ_between_quarters():
    bench = prepared(MMA4.format(g=1))
    fp4_problem(bench, 128, 64)
    bench.ctas[0].tmem.data[101, 258] ^= 1
    mma4(bench, 128, 64)
    assert bench.codes() == [TMEM_MISUSE]


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xFF])
def test_bad_scale_factors(byte):
    bench = prepared(MMA4.format(g=1))
    fp4_problem(bench, 128, 64)
    bench.ctas[0].tmem.data[7::32, 256] = byte << 16
    mma4(bench, 128, 64)
    assert bench.codes() == [BAD_VALUE]
    assert "row 7, block 2" in bench.messages()[0]


def test_d_outside_the_allocation():
    bench = prepared(MMA4.format(g=1), columns=256)
    fp4_problem(bench, 128, 64)
    with pytest.raises(Stop):
        mma4(bench, 128, 64, sfa=128, sfb=136, d=200)
    assert bench.codes() == [TMEM_MISUSE]


def test_a_set_reserved_bit_is_refused():
    bench = prepared(MMA4.format(g=1))
    fp4_problem(bench, 128, 64)
    with pytest.raises(Unsupported):
        bench.one(bench.warp(0), 0, 0, desc(0x400), desc(0x8400), idesc4(128, 64) | 1 << 25, 256, 272, 0)


def test_operands_that_nobody_wrote():
    bench = prepared(MMA4.format(g=1))
    write_tmem(bench, 0, 256, np.full((128, 32), 0x38383838, np.uint32))
    mma4(bench, 128, 64)
    assert bench.codes()[0] == UNINITIALISED_READ


# ---------------------------------------------------------------------------------------------------------------------
# Order between warps and the tensor core

LD = "tcgen05.ld.sync.aligned.32x32b.x32.b32 " + vector(1, 32) + ", [%r200]"
COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1]"
INIT = "mbarrier.init.shared.b64 [%r1], 1"


def with_barrier(policy="eager", group=1, cluster=1):
    text = COMMIT.replace("cta_group::1", f"cta_group::{group}")
    if cluster > 1:
        text = text.replace(".b64 [%r1]", ".multicast::cluster.b64 [%r1], %h1")
    bench = prepared(MMA4.format(g=group), LD, text, INIT, policy=policy, cluster=cluster)
    for cta in range(cluster):
        w = bench.warp(0, cta)
        bench.one(w, 3, cta << 24 | 0x10C00, 1)
        barriers.fence_init(w)
        for other in range(cluster):
            bench.order(w, *bench.ctas[other].warps)
    return bench


@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_ld_before_the_mma_is_known_to_be_complete(policy):
    bench = with_barrier(policy)
    fp4_problem(bench, 128, 64)
    mma4(bench, 128, 64, w=bench.warp(1))
    bench.do(bench.warp(0), 1, 0)
    assert RACE in bench.codes()


@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_ld_behind_a_commit(policy):
    bench = with_barrier(policy)
    expected = fp4_problem(bench, 128, 64)
    mma4(bench, 128, 64, w=bench.warp(1))
    bench.one(bench.warp(1), 2, 0x10C00)
    bar = bench.ctas[0].smem.barriers[0x10C00]
    assert bar.phases == (1 if policy == "eager" else 0)
    bench.drain()
    assert bar.phases == 1
    bar.observe(bench.warp(3), True)
    values = bench.do(bench.warp(3), 1, 96 << 16)
    np.testing.assert_allclose(np.stack(values).view(np.float32).T, expected[96:, :32], rtol=1e-5, atol=1e-3)
    assert not bench.codes()


def test_mma_that_overwrites_what_the_epilogue_still_reads():
    bench = with_barrier()
    fp4_problem(bench, 128, 64)
    mma4(bench, 128, 64, w=bench.warp(1))
    bench.one(bench.warp(1), 2, 0x10C00)
    bench.ctas[0].smem.barriers[0x10C00].observe(bench.warp(2), True)
    bench.do(bench.warp(2), 1, 64 << 16)
    assert not bench.codes()
    mma4(bench, 128, 32, d=64, w=bench.warp(1))
    assert not bench.codes()
    mma4(bench, 128, 64, w=bench.warp(1))
    assert bench.codes() == [RACE]
    assert "read by warp 2" in bench.messages()[0]


def test_mma_behind_the_epilogues_signal():
    bench = with_barrier()
    fp4_problem(bench, 128, 64)
    mma4(bench, 128, 64, w=bench.warp(1))
    bench.one(bench.warp(1), 2, 0x10C00)
    bench.ctas[0].smem.barriers[0x10C00].observe(bench.warp(2), True)
    bench.do(bench.warp(2), 1, 64 << 16)
    bench.order(bench.warp(2), bench.warp(1))
    mma4(bench, 128, 64, w=bench.warp(1))
    assert not bench.codes()


def test_commit_to_both_ctas_of_a_pair():
    bench = with_barrier(group=2, cluster=2)
    fp4_problem(bench, 256, 64, ctas=2)
    bench.order(bench.warp(0, 1), bench.warp(0, 0))
    mma4(bench, 256, 64)
    bench.one(bench.warp(0), 2, 0x10C00, 0b11)
    assert [cta.smem.barriers[0x10C00].phases for cta in bench.ctas] == [1, 1]
    w = bench.warp(1, 1)
    bench.ctas[1].smem.barriers[0x10C00].observe(w, True)
    bench.do(w, 1, 32 << 16)
    assert not bench.codes()


def test_dealloc_while_a_warp_may_still_read():
    bench = prepared(LD, "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, %r2")
    write_tmem(bench, 0, 0, np.zeros((128, 32), np.uint32))
    bench.do(bench.warp(1), 0, 32 << 16)
    bench.do(bench.warp(0), 1, 0, 512)
    assert bench.codes() == [RACE]


def test_fences_decode():
    for text in ("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync"):
        bench = Bench(text)
        assert bench.do(bench.warp(0), 0) is None


def test_every_opcode_has_one_decoder():
    for op in ("tcgen05.alloc", "tcgen05.ld", "tcgen05.mma", "tcgen05.wait::ld"):
        assert registry.find(op.split(".")) is not None


# ---------------------------------------------------------------------------------------------------------------------
# A whole kernel: NVFP4, 128 x 64 x 64, no swizzle

STEPS = {
    "copy": "\n".join(
        f"""
        ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d1+{2048 * i}];
        st.shared.v4.b32 [%r2+{1024 + 2048 * i}], {{%r20, %r21, %r22, %r23}};"""
        for i in range(4)
    ),
    "proxy fence": "fence.proxy.async.shared::cta;",
    "init": "@%first mbarrier.init.shared.b64 [%sm], 1;\n@%first fence.mbarrier_init.release.cluster;",
    "alloc": "@%p1 bra BEHIND;\ntcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%sm+16], %r3;\nBEHIND:",
    "barrier": "bar.sync 0;",
    "address": "ld.shared.b32 %r10, [%sm+16];\nadd.s32 %r11, %r10, 128;\nadd.s32 %r12, %r10, 132;\n@!%first bra ISSUED;",
    "cp": "tcgen05.cp.cta_group::1.32x128b.warpx4 [%r11], SFA;\ntcgen05.cp.cta_group::1.32x128b.warpx4 [%r12], SFB;",
    "mma": "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [%r10], A, B, %r4, [%r11], [%r12], %p2;",
    "commit": "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%sm];",
    "issued": "ISSUED:",
    "wait": asm_kit.wait("%sm", 0),
    "load": f"""
        tcgen05.fence::after_thread_sync;
        shl.b32 %r5, %warp, 21;
        add.s32 %r5, %r5, %r10;
        tcgen05.ld.sync.aligned.32x32b.x32.b32 {vector(24, 32)}, [%r5];
        tcgen05.wait::ld.sync.aligned;""",
    "store": "\n".join(f"st.global.b32 [%d2+{4 * i}], %r{24 + i};" for i in range(32)),
    "second barrier": "bar.sync 0;",
    "dealloc": "@%p1 bra LAST;\ntcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, %r3;\nLAST:",
}
PROLOGUE = """
    shl.b32 %r1, %tid, 4;
    cvt.u64.u32 %d3, %r1;
    add.s64 %d1, %g0, %d3;
    add.s32 %r2, %sm, %r1;
    shl.b32 %r1, %tid, 7;
    cvt.u64.u32 %d3, %r1;
    add.s64 %d2, %g1, %d3;
    setp.ne.u32 %p1, %warp, 0;
    setp.ne.u32 %p2, %tid, %tid;
    mov.b32 %r3, 256;
    mov.b32 %r4, {idesc};
"""


def kernel_result(policy, without=(), n=32):
    """Runs the kernel, less some of its steps; (report, result, expected)."""
    rng = np.random.default_rng(9)
    a, b = (rng.integers(0, 16, (rows, 64)).astype(np.uint8) for rows in (128, n))
    sa, sb = random_scales(rng, 128), random_scales(rng, n)
    image = np.zeros(8192, np.uint8)
    for start, rows in ((0, pack4(a)), (4096, pack4(b))):
        for r in range(rows.shape[0]):
            for c in range(2):
                address = start + r // 8 * 256 + c * 128 + r % 8 * 16
                image[address : address + 16] = rows[r, 16 * c : 16 * c + 16]
    for start, scales in ((6144, sa), (6656, sb)):
        for r in range(scales.shape[0]):
            address = start + r % 32 * 16 + r // 32 * 4
            image[address : address + 4] = scales[r]
    body = PROLOGUE.format(idesc=idesc4(128, n)) + "\n".join(
        text for name, text in STEPS.items() if name not in without
    )
    base = 0x400 + 1024
    places = {"SFA": (6144, 0, 128), "SFB": (6656, 0, 128), "A": (0, 128, 256), "B": (4096, 128, 256)}
    for name, (start, leading, stride) in places.items():
        body = re.sub(rf"\b{name}\b(?=[,;])", str(desc(base + start, leading, stride, 0)), body)
    result = np.zeros((128, 32), np.float32)
    report = asm_kit.run(body, [image, result], block=128, policy=policy, target="sm_100a")
    return report, result, expand(E2M1[a], UE4M3[sa], 16) @ expand(E2M1[b], UE4M3[sb], 16).T


@pytest.mark.parametrize("policy", ["eager", "random", "lazy"])
def test_kernel(policy):
    report, result, expected = kernel_result(policy)
    assert not report.findings, report.findings
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("proxy fence", {MISSING_PROXY_FENCE}),
        ("barrier", {RACE}),
        ("cp", {UNINITIALISED_READ}),
        ("mma", {UNINITIALISED_READ}),
        ("commit", {DEADLOCK}),
        ("wait", {RACE}),
        ("dealloc", {TMEM_IN_USE}),
        # Whichever comes first: the read, or the end of the allocation.
        ("second barrier", {RACE, TMEM_MISUSE}),
    ],
)
@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_kernel_without_a_step(policy, without, expected):
    report, _, _ = kernel_result(policy, without={without})
    assert report.codes() & expected
