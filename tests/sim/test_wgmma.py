"""wgmma against references computed element by element from the fragment figures of PTX ISA."""

import numpy as np
import pytest
from tensor_bench import Bench, vector

from ptxsim.findings import DIVERGENCE, RACE, UNINITIALISED_READ, Stop, Unsupported
from ptxsim.mma_formats import E4M3, E5M2
from ptxsim.values import FULL


def desc(start, leading=0, stride=1024, swizzle=1):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62


def put_k_major(image, start, rows):
    """Rows of 32 bytes, 128-byte swizzle, 8-row atoms of 1024 bytes."""
    for r in range(rows.shape[0]):
        for byte in range(32):
            address = start + r // 8 * 1024 + r % 8 * 128 + byte
            image[address ^ ((address >> 7) % 8) << 4] = rows[r, byte]


def operand(rng, name, rows):
    """(bytes, values) of an operand; a row has 32 bytes."""
    if name in ("e4m3", "e5m2"):
        codes = rng.integers(0, 0x48, (rows, 32)).astype(np.uint8)
        return codes, (E4M3 if name == "e4m3" else E5M2)[codes]
    if name in ("s8", "u8"):
        codes = rng.integers(0, 256, (rows, 32)).astype(np.uint8)
        return codes, (codes.view(np.int8) if name == "s8" else codes).astype(np.float32)
    values = (rng.integers(-64, 64, (rows, 8 if name == "tf32" else 16)) / 8).astype(np.float32)
    if name == "tf32":
        return values.view(np.uint8), values
    if name == "f16":
        return values.astype(np.float16).view(np.uint8), values
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), values


def mma_text(n, d, a, b, tail, registers, a_operand="%d1", k=None):
    k = k or {"f16": 16, "bf16": 16, "tf32": 8}.get(a, 32)
    return f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b} {vector(1, registers)}, {a_operand}, %d2, %p1{tail}"


def bench_of(text, **options):
    return Bench(
        text,
        "wgmma.fence.sync.aligned",
        "wgmma.commit_group.sync.aligned",
        "wgmma.wait_group.sync.aligned 0",
        "wgmma.wait_group.sync.aligned 1",
        arch="sm_90a",
        **options,
    )


A_DESC, B_DESC = desc(0x400), desc(0x8400)


def matrix(bench, n, d, old=None, a=A_DESC, b=B_DESC, scale=0):
    """Runs the instruction in the four warps; the (64, n) result put together from the registers."""
    out = np.zeros((64, n), np.float64)
    count = n // 4 if d == "f16" else n // 2
    for index in range(4):
        w = bench.warp(index)
        bench.do(w, 1)
        registers = old[index] if old else [None] * count
        values = bench.do(w, 0, registers, a[index] if isinstance(a, list) else a, b, scale)
        assert len(values) == count
        for i, value in enumerate(values):
            for t in range(32):
                word = np.uint32(value[t])
                if d == "f16":
                    row = 16 * index + t // 4 + 8 * (i % 2)
                    pair = np.array([word]).view(np.float16)
                    out[row, 8 * (i // 2) + 2 * (t % 4) : 8 * (i // 2) + 2 * (t % 4) + 2] = pair
                else:
                    row = 16 * index + t // 4 + 8 * (i // 2 % 2)
                    column = 8 * (i // 4) + 2 * (t % 4) + i % 2
                    out[row, column] = word.view(np.int32) if d == "s32" else word.view(np.float32)
    return out


CASES = [
    ("f32", "f16", "f16", ", 1, 1, 0, 0", 1),
    ("f16", "f16", "f16", ", 1, -1, 0, 0", -1),
    ("f32", "bf16", "bf16", ", -1, -1, 0, 0", 1),
    ("f32", "tf32", "tf32", ", -1, 1", -1),
    ("f32", "e4m3", "e5m2", ", 1, 1", 1),
    ("f16", "e5m2", "e5m2", ", 1, 1", 1),
    ("s32", "s8", "u8", "", 1),
]


@pytest.mark.parametrize(("d", "a", "b", "tail", "sign"), CASES)
@pytest.mark.parametrize("n", [8, 32, 128])
def test_from_shared_memory(d, a, b, tail, sign, n):
    bench = bench_of(mma_text(n, d, a, b, tail, n // 4 if d == "f16" else n // 2))
    rng = np.random.default_rng(0)
    (raw_a, value_a), (raw_b, value_b) = operand(rng, a, 64), operand(rng, b, n)
    image = np.zeros(0x10400, np.uint8)
    put_k_major(image, 0x400, raw_a)
    put_k_major(image, 0x8400, raw_b)
    bench.fill(0x400, image[0x400:])
    expected = sign * value_a.astype(np.float64) @ value_b.astype(np.float64).T
    got = matrix(bench, n, d)
    np.testing.assert_allclose(got, expected, rtol=1e-3 if d == "f16" else 1e-5, atol=1e-6 * np.abs(expected).max())
    assert not bench.codes()
    assert bench.machine.counters["mma_flops"] == 2 * 64 * n * value_a.shape[1]


@pytest.mark.parametrize(("a", "d"), [("f16", "f32"), ("bf16", "f32"), ("tf32", "f32"), ("e4m3", "f32"), ("s8", "s32")])
def test_a_from_registers_and_accumulation(a, d):
    tail = {"s8": "", "tf32": ", 1, 1", "e4m3": ", 1, 1"}.get(a, ", 1, 1, 0")
    n = 16
    bench = bench_of(mma_text(n, d, a, a, tail, n // 2, vector(100, 4)))
    rng = np.random.default_rng(1)
    (raw_a, value_a), (raw_b, value_b) = operand(rng, a, 64), operand(rng, a, n)
    image = np.zeros(0x10400, np.uint8)
    put_k_major(image, 0x8400, raw_b)
    bench.fill(0x400, image[0x400:])
    size = 32 // value_a.shape[1]
    fragments = []
    for index in range(4):
        registers = []
        for i in range(4):
            # Register i: row t//4 (+8 for odd i), 4 bytes at K offset of thread t%4 (+16 bytes for i >= 2).
            words = np.zeros(32, np.uint32)
            for t in range(32):
                row = 16 * index + t // 4 + 8 * (i % 2)
                first = (16 // size) * (i // 2) + (4 // size) * (t % 4)
                words[t] = raw_a[row, first * size : first * size + 4].view(np.uint32)[0]
            registers.append(words)
        fragments.append(registers)
    one = np.float32(1).view(np.uint32) if d == "f32" else np.uint32(1)
    old = [[np.full(32, one), int(one)] * (n // 4) for _ in range(4)]
    got = matrix(bench, n, d, old, a=fragments, scale=FULL)
    np.testing.assert_allclose(got, value_a.astype(np.float64) @ value_b.astype(np.float64).T + 1, rtol=1e-5)
    assert not bench.codes()


def test_half_accumulators():
    n = 8
    bench = bench_of(mma_text(n, "f16", "f16", "f16", ", 1, 1, 0, 0", 2))
    bench.fill(0x400, np.zeros(0x10000, np.uint8))
    halves = np.arange(128, dtype=np.float16).reshape(2, 32, 2)
    old = [list(halves.view(np.uint32)[:, :, 0]) for _ in range(4)]
    got = matrix(bench, n, "f16", old, scale=FULL)
    for t in range(32):
        np.testing.assert_array_equal(got[t // 4, 2 * (t % 4) : 2 * (t % 4) + 2], halves[0, t])
        np.testing.assert_array_equal(got[t // 4 + 8, 2 * (t % 4) : 2 * (t % 4) + 2], halves[1, t])


def test_transposed_operands():
    n = 64
    bench = bench_of(mma_text(n, "f32", "bf16", "bf16", ", 1, 1, 1, 1", n // 2))
    rng = np.random.default_rng(2)
    image = np.zeros(0x10400, np.uint8)
    values = []
    for start in (0x400, 0x8400):
        value = (rng.integers(-64, 64, (64, 16)) / 8).astype(np.float32)
        raw = (value.view(np.uint32) >> 16).astype(np.uint16)
        for r in range(64):
            for k in range(16):
                address = start + k // 8 * 1024 + k % 8 * 128 + 2 * r
                address ^= ((address >> 7) % 8) << 4
                image[address : address + 2] = raw[r : r + 1, k].view(np.uint8)
        values.append(value)
    bench.fill(0x400, image[0x400:])
    np.testing.assert_allclose(matrix(bench, n, "f32"), values[0] @ values[1].T, rtol=1e-6)


def test_saturation():
    text = mma_text(8, "s32", "s8", "s8", "", 4).replace("k32.s32", "k32.satfinite.s32")
    bench = bench_of(text)
    bench.fill(0x400, np.full(0x10000, 127, np.uint8))
    old = [[0x7FFFFFFF] * 4 for _ in range(4)]
    assert (matrix(bench, 8, "s32", old, scale=FULL) == 0x7FFFFFFF).all()


def simple(warps=4):
    bench = bench_of(mma_text(8, "f32", "f16", "f16", ", 1, 1, 0, 0", 4), warps=warps)
    bench.fill(0x400, np.zeros(0x10000, np.uint8))
    return bench


def issue(bench, w, a=0x400, b=0x8400):
    return bench.do(w, 0, [0] * 4, desc(a), desc(b), 0)


def overwrite(bench, w, offset):
    """A bulk copy into a stage, issued by `w`."""
    bench.machine.running = w
    ticket = w.issue("tma")
    bench.ctas[0].smem.begin_async_write(ticket, offset, 1024)
    bench.ctas[0].smem.end_async_write(ticket, offset, 1024)


def test_a_stage_given_back_behind_the_wait():
    bench = simple(8)
    w, producer = bench.warp(0), bench.warp(4)
    bench.do(w, 1)
    issue(bench, w)
    bench.do(w, 2)
    bench.do(w, 3)
    bench.order(w, producer)
    overwrite(bench, producer, 0x400)
    assert not bench.codes()


def test_a_stage_given_back_before_the_wait():
    bench = simple(8)
    w, producer = bench.warp(0), bench.warp(4)
    bench.do(w, 1)
    issue(bench, w)
    bench.do(w, 2)
    bench.order(w, producer)
    overwrite(bench, producer, 0x400)
    assert bench.codes() == [RACE]


def test_wait_group_1_covers_all_but_the_newest_group():
    bench = simple(8)
    w, producer = bench.warp(0), bench.warp(4)
    bench.do(w, 1)
    for start in (0x400, 0x4400):
        issue(bench, w, a=start)
        bench.do(w, 2)
    bench.do(w, 4)
    bench.order(w, producer)
    overwrite(bench, producer, 0x400)
    assert not bench.codes()
    overwrite(bench, producer, 0x4400)
    assert bench.codes() == [RACE]


def test_an_empty_group_takes_a_place():
    bench = simple(8)
    w, producer = bench.warp(0), bench.warp(4)
    bench.do(w, 1)
    issue(bench, w)
    bench.do(w, 2)
    bench.do(w, 2)
    bench.do(w, 4)
    bench.order(w, producer)
    overwrite(bench, producer, 0x400)
    assert not bench.codes()


def test_one_warps_wait_does_not_speak_for_another():
    bench = simple(8)
    first, second, producer = bench.warp(0), bench.warp(1), bench.warp(4)
    for w in (first, second):
        bench.do(w, 1)
        issue(bench, w)
        bench.do(w, 2)
    bench.do(first, 3)
    bench.order(first, producer)
    bench.order(second, producer)
    overwrite(bench, producer, 0x400)
    assert bench.codes() == [RACE]


def test_operands_that_nobody_wrote():
    bench = bench_of(mma_text(8, "f32", "f16", "f16", ", 1, 1, 0, 0", 4))
    bench.do(bench.warp(0), 1)
    issue(bench, bench.warp(0))
    assert UNINITIALISED_READ in bench.codes()


def test_accumulators_that_nobody_wrote():
    bench = simple()
    bench.do(bench.warp(0), 1)
    bench.do(bench.warp(0), 0, [None] * 4, desc(0x400), desc(0x8400), 0)
    assert not bench.codes()
    bench.do(bench.warp(0), 0, [None] * 4, desc(0x400), desc(0x8400), FULL)
    assert bench.codes() == [UNINITIALISED_READ]


def test_no_fence_at_all():
    bench = simple()
    issue(bench, bench.warp(0))
    assert bench.codes() == [RACE]
    assert "wgmma.fence" in bench.messages()[0]


def test_scale_d_that_differs_between_lanes():
    bench = simple()
    bench.do(bench.warp(0), 1)
    with pytest.raises(Stop):
        bench.do(bench.warp(0), 0, [0] * 4, desc(0x400), desc(0x8400), 1)
    assert bench.codes() == [DIVERGENCE]


def test_descriptor_that_differs_between_lanes():
    bench = simple()
    bench.do(bench.warp(0), 1)
    lanes = np.full(32, desc(0x400), np.uint64)
    lanes[3] += np.uint64(2)
    with pytest.raises(Stop):
        bench.do(bench.warp(0), 0, [0] * 4, lanes, desc(0x8400), 0)
    assert bench.codes() == [DIVERGENCE]


def test_incomplete_warpgroup():
    bench = simple(warps=6)
    bench.do(bench.warp(4), 1)
    with pytest.raises(Stop):
        issue(bench, bench.warp(4))
    assert bench.codes() == [DIVERGENCE]


@pytest.mark.parametrize(
    "text",
    [
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%r1, %r2, %r3, %r4}, %d1, %d2, %r5, 0, %p1, 1, 1, 0, 0",
        "wgmma.mma_async.sync.aligned.m64n8k256.s32.b1.b1.and.popc {%r1, %r2, %r3, %r4}, %d1, %d2, %p1",
        mma_text(12, "f32", "f16", "f16", ", 1, 1, 0, 0", 6),
        mma_text(40, "s32", "s8", "s8", "", 20),
        mma_text(8, "f16", "bf16", "bf16", ", 1, 1, 0, 0", 2),
        mma_text(8, "f32", "f16", "bf16", ", 1, 1, 0, 0", 4),
        mma_text(8, "f32", "e4m3", "s8", ", 1, 1", 4),
        mma_text(8, "f32", "f16", "f16", ", 1, 2, 0, 0", 4),
        mma_text(8, "f32", "f16", "f16", ", 1, 1, 0, 0, 0", 4),
        mma_text(8, "f32", "e4m3", "e4m3", ", 1, 1, 0, 0", 4),
        mma_text(8, "f32", "f16", "f16", ", 1, 1, 0, 0", 5),
        mma_text(8, "f32", "f16", "f16", ", 1, 1, 0, 0", 4, k=8),
    ],
)
def test_refused_forms(text):
    with pytest.raises(Unsupported):
        Bench(text, arch="sm_90a")


def test_refused_descriptor():
    bench = simple()
    bench.do(bench.warp(0), 1)
    with pytest.raises(Unsupported):
        bench.do(bench.warp(0), 0, [0] * 4, desc(0x400) | 1 << 46, desc(0x8400), 0)
