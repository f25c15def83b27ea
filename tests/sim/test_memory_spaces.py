"""Global and shared memory and their shadows, with warps that are nothing but a vector clock."""

from types import SimpleNamespace

import numpy as np
import pytest

from ptxsim import findings
from ptxsim.memory import Buffer, GlobalMemory, SharedMemory, fenced_clock, note_fence

LANES = np.arange(32, dtype=np.int64)
TMA, TENSOR, COPY = 4, 5, 6
BULK, CP_ASYNC, MMA = ("cp", "async", "bulk"), ("cp", "async", "ca"), ("tcgen05", "mma")
BASE = 0x400


class Warp:
    def __init__(self, world, thread):
        self.thread, self.index = thread, thread
        self.cta, self.cluster, self.machine = world.cta, world.cluster, world
        self.clock = np.zeros(7, np.uint32)
        self.clock[thread] = 1
        self.found = world.found
        self.state = {}

    def release(self):
        clock = self.clock.copy()
        self.clock[self.thread] += 1
        return clock

    def acquire(self, clock):
        np.maximum(self.clock, clock, out=self.clock)


class World:
    """One CTA of four warps; findings in a list, fatal ones raise."""

    def __init__(self, num_bytes=BASE + 8192):
        self.codes, self.messages = [], []
        self.cluster = SimpleNamespace(index=0, state={}, ctas=[], size=1)
        self.cta = SimpleNamespace(
            cluster=self.cluster, machine=self, index=0, rank=0, first_thread=0, warps=[], num_warps=4
        )
        self.cluster.ctas.append(self.cta)
        self.cta.warps = [Warp(self, thread) for thread in range(4)]
        self.warps = self.cta.warps
        self.smem = SharedMemory(self.cta, num_bytes)
        self.gmem = GlobalMemory(self)
        self.ticks = dict.fromkeys((TMA, TENSOR, COPY), 0)

    def found(self, code, message, fatal=False):
        self.codes.append(code)
        self.messages.append(message)
        if fatal:
            raise findings.Stop

    def issue(self, w, parts=BULK):
        agent = {BULK: TMA, MMA: TENSOR, CP_ASYNC: COPY}[parts]
        self.ticks[agent] += 1
        clock = w.release()
        clock[agent] = self.ticks[agent]
        return SimpleNamespace(
            warp=w, ins=SimpleNamespace(parts=parts), thread=agent, tick=self.ticks[agent], clock=clock
        )

    def copy_in(self, w, start, data, parts=BULK):
        issue = self.issue(w, parts)
        self.smem.begin_async_write(issue, start, len(data))
        self.smem.data[start : start + len(data)] = data
        self.smem.end_async_write(issue, start, len(data))
        return issue

    def order(self, first, second):
        second.acquire(first.release())

    def take(self):
        codes, self.codes = self.codes, []
        return codes


@pytest.fixture
def world():
    return World()


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# Shared memory: values.

PATTERNS = {
    "contiguous": LANES,
    "reversed": LANES[::-1].copy(),
    "strided": LANES * 3,
    "shuffled": LANES * 37 % 64,
    "one": LANES[:1],
    "some": np.array([4, 5, 6, 7, 9]),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_shared_values(world, pattern, size, start):
    offsets = BASE + (PATTERNS[pattern] + start) * size
    w, smem = world.warps[0], world.smem
    values = random_bytes(len(offsets), size)
    before = smem.data.copy()
    smem.store(w, offsets, size, values)
    expected = before
    for offset, row in zip(offsets, values, strict=True):
        expected[offset : offset + size] = row
    np.testing.assert_array_equal(smem.data, expected)
    np.testing.assert_array_equal(smem.load(w, offsets, size), values)
    assert smem.load_one(w, int(offsets[0]), size) == values[0].tobytes()
    assert world.codes == []


def test_shared_store_one_and_strong_accesses(world):
    w, smem = world.warps[0], world.smem
    smem.store_one(w, BASE + 6, b"\1\2")
    smem.store(w, BASE + 8 + LANES * 4, 4, random_bytes(32, 4), strong=True)
    np.testing.assert_array_equal(smem.load(w, BASE + 8 + LANES * 4, 4, strong=True), random_bytes(32, 4))
    assert smem.load_one(w, BASE + 6, 2) == b"\1\2"
    assert world.codes == []


# Shared memory: one test a check.


@pytest.mark.parametrize("offset", [0, BASE - 16, BASE + 8192, BASE + 8192 - 512 + 16])
def test_shared_bounds(world, offset):
    with pytest.raises(findings.Stop):
        world.smem.store(world.warps[0], offset + LANES * 16, 16, random_bytes(32, 16))
    assert world.codes == [findings.OUT_OF_BOUNDS]


def test_shared_read_of_the_last_byte_is_fine_and_one_more_is_not():
    world = World(BASE + 40)
    world.smem.store_one(world.warps[0], BASE + 36, b"abcd")
    assert world.codes == []
    with pytest.raises(findings.Stop):
        world.smem.store_one(world.warps[0], BASE + 40, b"abcd")


def test_shared_uninitialised(world):
    w = world.warps[0]
    world.smem.store(w, BASE + LANES[:4] * 4, 4, random_bytes(4, 4))
    world.smem.load_one(w, BASE, 16)
    assert world.take() == []
    world.smem.load_one(w, BASE + 16, 4)
    assert world.take() == [findings.UNINITIALISED_READ]
    world.smem.store_one(w, BASE + 32, b"a")
    world.smem.load_one(w, BASE + 33, 1)
    assert world.take() == [findings.UNINITIALISED_READ]
    world.smem.load(w, BASE + LANES[:3] * 16, 16)
    assert findings.UNINITIALISED_READ in world.take()


@pytest.mark.parametrize("size", [4, 16])
def test_shared_write_then_read_by_another_warp(world, size):
    a, b = world.warps[:2]
    values = random_bytes(32, size)
    for at, ordered in ((BASE, False), (BASE + 1024, True)):
        world.smem.store(a, at + LANES * size, size, values)
        if ordered:
            world.order(a, b)
        world.smem.load(b, at + LANES * size, size)
        assert world.take() == ([] if ordered else [findings.RACE])


@pytest.mark.parametrize("size", [2, 16])
def test_shared_write_after_read(world, size):
    a, b, c = world.warps[:3]
    offsets, values = BASE + LANES * 2 * size, random_bytes(32, size)
    world.smem.store(a, offsets, size, values)
    world.order(a, b)
    world.order(a, c)
    world.smem.load(b, offsets, size)
    world.smem.load(c, offsets, size)
    world.order(b, a)
    world.smem.store(a, offsets, size, values)
    assert world.take() == [findings.RACE]
    assert "warp 2" in world.messages[-1]
    world.order(c, a)
    world.smem.store(a, offsets, size, values)
    assert world.take() == []


def test_shared_write_after_write(world):
    a, b = world.warps[:2]
    world.smem.store_one(a, BASE, bytes(16))
    world.smem.store_one(b, BASE, bytes(16))
    assert world.take() == [findings.RACE]
    assert "warp 0" in world.messages[-1]


def test_shared_release_does_not_cover_later_writes(world):
    a, b = world.warps[:2]
    clock = a.release()
    world.smem.store_one(a, BASE, bytes(16))
    b.acquire(clock)
    world.smem.load_one(b, BASE, 16)
    assert world.take() == [findings.RACE]


def test_shared_neighbouring_bytes_do_not_race(world):
    a, b = world.warps[:2]
    world.smem.store_one(a, BASE, bytes(32))
    world.order(a, b)
    for w, offset in ((a, BASE), (b, BASE + 4), (a, BASE), (b, BASE + 7)):
        world.smem.load_one(w, offset, 1)
        world.smem.store_one(w, offset, b"a")
    assert world.take() == []
    world.smem.store_one(a, BASE + 7, b"a")
    assert findings.RACE in world.take()


def test_shared_whole_chunks_after_bytes(world):
    """A chunk that was accessed by bytes, then whole, then by bytes again."""
    a, b = world.warps[:2]
    world.smem.store_one(a, BASE + 3, b"a")
    world.smem.store_one(a, BASE, bytes(16))
    world.smem.load_one(a, BASE + 3, 1)
    world.smem.store_one(b, BASE + 4, b"b")
    assert world.take() == [findings.RACE]
    world.order(b, a)
    world.smem.store_one(a, BASE, bytes(16))
    world.order(a, b)
    world.smem.load_one(b, BASE + 4, 1)
    world.smem.load_one(b, BASE, 16)
    assert world.take() == []
    world.smem.store_one(a, BASE, bytes(16))
    assert world.take() == [findings.RACE]
    assert "warp 1 of CTA 0 reads" in world.messages[-1]


def test_shared_many_readers(world):
    """More reading threads than the shadow starts with columns for."""
    world.smem.store_one(world.warps[0], BASE, bytes(16))
    world.smem.store_one(world.warps[0], BASE + 20, bytes(4))
    clock = world.warps[0].release()
    readers = []
    for thread in range(20):
        w = Warp(world, thread % 4)
        w.thread = thread
        w.clock = np.zeros(20, np.uint32)
        w.clock[:7] = clock
        w.clock[thread] = 5
        readers.append(w)
        world.smem.load_one(w, BASE, 16)
        world.smem.load_one(w, BASE + 20, 4)
    assert world.take() == []
    last = readers[-1]
    for w in readers[:-2]:
        last.acquire(w.clock)
    world.smem.store_one(last, BASE, bytes(16))
    assert world.take() == [findings.RACE]
    world.smem.store_one(last, BASE + 20, bytes(4))
    assert world.take() == [findings.RACE]
    last.acquire(readers[-2].clock)
    world.smem.store_one(last, BASE, bytes(16))
    world.smem.store_one(last, BASE + 20, bytes(4))
    assert world.take() == []


def test_shared_lanes_that_write_different_values(world):
    offsets = np.full(32, BASE, np.int64)
    world.smem.store(world.warps[0], offsets, 4, random_bytes(32, 4))
    assert world.take() == [findings.RACE]
    world.smem.store(world.warps[0], offsets, 4, np.full((32, 4), 7, np.uint8))
    assert world.take() == []


def test_shared_strong_accesses_do_not_race_with_each_other(world):
    a, b = world.warps[:2]
    world.smem.store_one(a, BASE, bytes(4), strong=True)
    world.smem.load_one(b, BASE, 4, strong=True)
    world.smem.store_one(b, BASE, bytes(4), strong=True)
    assert world.take() == []
    world.smem.load_one(a, BASE, 4)
    assert world.take() == [findings.RACE]


def test_shared_strong_and_plain_accesses_race(world):
    a, b = world.warps[:2]
    world.smem.store_one(a, BASE, bytes(4))
    world.smem.load_one(b, BASE, 4, strong=True)
    assert world.take() == [findings.RACE]


def test_shared_barrier_bytes(world):
    smem, w = world.smem, world.warps[0]
    smem.barriers[BASE + 64] = object()
    smem.barrier_bytes[BASE + 64 : BASE + 72] = 1
    smem.store(w, BASE + LANES[:4] * 16, 16, random_bytes(4, 16))
    assert world.take() == []
    smem.store_one(w, BASE + 64, bytes(4))
    assert world.take() == [findings.BARRIER_MISUSE]
    smem.store(w, BASE + np.array([0, 8, 9, 10]) * 8, 8, random_bytes(4, 8))
    assert world.take() == [findings.BARRIER_MISUSE]
    smem.store(w, BASE + np.array([0, 9, 10, 11]) * 8, 8, random_bytes(4, 8))
    assert world.take() == []
    issue = world.issue(w)
    smem.begin_async_write(issue, BASE + 48, 64)
    assert findings.BARRIER_MISUSE in world.take()
    smem.check_async_read_chunks(issue, BASE // 16 + np.array([2, 4, 5]))
    assert findings.BARRIER_MISUSE in world.take()
    smem.check_async_read_chunks(issue, BASE // 16 + np.array([2, 5]))
    assert findings.BARRIER_MISUSE not in world.take()


# Shared memory: asynchronous operations.


@pytest.mark.parametrize("split", [False, True])
def test_copy_then_read(world, split):
    a, b = world.warps[:2]
    if split:
        world.smem.store_one(a, BASE + 2, b"ab")
        world.smem.fence_async(a)
    issue = world.copy_in(a, BASE, random_bytes(256))
    assert world.take() == []
    world.smem.load_one(b, BASE + 16, 4)
    assert world.take() == [findings.RACE]
    assert "TMA" in world.messages[-1]
    b.acquire(issue.clock)
    np.testing.assert_array_equal(world.smem.load(b, BASE + LANES * 8, 8).reshape(-1), random_bytes(256))
    assert world.take() == []


def test_issuer_does_not_see_its_copy_before_it_waits(world):
    a = world.warps[0]
    issue = world.copy_in(a, BASE, random_bytes(64))
    world.smem.load_one(a, BASE, 16)
    assert world.take() == [findings.RACE]
    a.acquire(issue.clock)
    world.smem.load_one(a, BASE, 16)
    assert world.take() == []


@pytest.mark.parametrize("size", [4, 16])
def test_in_flight(world, size):
    a = world.warps[0]
    issue = world.issue(a)
    world.smem.begin_async_write(issue, BASE, 64)
    world.smem.load(a, BASE + LANES[:2] * size, size)
    assert world.take() == [findings.IN_FLIGHT_ACCESS]
    world.smem.store(a, BASE + 32 + LANES[:2] * size, size, random_bytes(2, size))
    assert world.take() == [findings.IN_FLIGHT_ACCESS]
    world.smem.begin_async_write(world.issue(a), BASE + 16, 16)
    assert world.take() == [findings.IN_FLIGHT_ACCESS]
    world.smem.check_async_read(world.issue(a), BASE + 16, 16)
    assert findings.IN_FLIGHT_ACCESS in world.take()


def test_recheck_finds_a_copy_that_started_meanwhile(world):
    a = world.warps[0]
    world.copy_in(a, BASE, random_bytes(256))
    a.clock[TMA] = 1
    read = world.issue(a, MMA)
    chunks = BASE // 16 + np.arange(0, 16, 3)
    world.smem.check_async_read_chunks(read, chunks)
    world.smem.recheck_async_read_chunks(read, chunks)
    world.smem.recheck_async_read(read, BASE, 256)
    assert world.take() == []
    a.acquire(read.clock)
    world.smem.begin_async_write(world.issue(a), BASE + 48, 16)
    world.smem.recheck_async_read_chunks(read, chunks)
    assert world.take() == [findings.IN_FLIGHT_ACCESS]
    world.smem.recheck_async_read(read, BASE, 32)
    assert world.take() == []
    world.smem.recheck_async_read(read, BASE, 64)
    assert world.take() == [findings.IN_FLIGHT_ACCESS]


def test_recheck_of_bytes(world):
    a = world.warps[0]
    world.smem.store_one(a, BASE, bytes(64))
    copy = world.issue(a, CP_ASYNC)
    world.smem.begin_async_write(copy, BASE + 20, 4)
    world.smem.recheck_async_read(copy, BASE, 16)
    world.smem.recheck_async_read(copy, BASE + 24, 8)
    assert world.take() == []
    world.smem.recheck_async_read(copy, BASE, 32)
    assert world.take() == [findings.IN_FLIGHT_ACCESS]
    world.smem.end_async_write(copy, BASE + 20, 4)
    world.smem.recheck_async_read(copy, BASE, 32)
    assert world.take() == []


@pytest.mark.parametrize("size", [2, 16])
def test_copy_over_what_someone_reads(world, size):
    a, b = world.warps[:2]
    first = world.copy_in(a, BASE, random_bytes(512))
    b.acquire(first.clock)
    a.acquire(first.clock)
    world.smem.load(b, BASE + LANES * size, size)
    world.copy_in(a, BASE, random_bytes(512))
    assert world.take() == [findings.RACE]
    world.order(b, a)
    a.acquire(world.copy_in(a, BASE + 512, random_bytes(512)).clock)
    world.copy_in(a, BASE, random_bytes(512))
    assert world.take() == []


def test_copy_over_a_copy_nobody_waited_for(world):
    a = world.warps[0]
    first = world.copy_in(a, BASE, random_bytes(64))
    world.copy_in(a, BASE + 32, random_bytes(64))
    assert world.take() == [findings.RACE]
    a.acquire(first.clock)
    world.copy_in(a, BASE, random_bytes(32))
    assert world.take() == []


def test_copy_over_what_the_tensor_core_reads(world):
    a = world.warps[0]
    a.acquire(world.copy_in(a, BASE, random_bytes(512)).clock)
    mma = world.issue(a, MMA)
    world.smem.check_async_read_chunks(mma, BASE // 16 + np.arange(0, 32, 2))
    world.copy_in(a, BASE + 16, random_bytes(16))
    assert world.take() == []
    world.copy_in(a, BASE + 32, random_bytes(16))
    assert world.take() == [findings.RACE]
    assert "tensor core" in world.messages[-1]
    a.acquire(mma.clock)
    world.copy_in(a, BASE + 64, random_bytes(16))
    assert world.take() == []


def test_store_over_what_a_copy_reads(world):
    a, b = world.warps[:2]
    world.smem.store(a, BASE + LANES * 4, 4, random_bytes(32, 4))
    world.smem.fence_async(a)
    world.order(a, b)
    out = world.issue(b)
    world.smem.check_async_read(out, BASE, 128)
    assert world.take() == []
    world.order(b, a)
    world.smem.store(a, BASE + LANES * 4, 4, random_bytes(32, 4))
    assert world.take() == [findings.RACE]
    a.acquire(out.clock)
    world.smem.store(a, BASE + LANES * 4, 4, random_bytes(32, 4))
    assert world.take() == []


@pytest.mark.parametrize("size", [2, 4, 16])
def test_missing_proxy_fence(world, size):
    a, b = world.warps[:2]
    start, stop = BASE, BASE + 32 * size
    world.smem.store(a, start + LANES[::-1] * size, size, random_bytes(32, size))
    world.order(a, b)
    world.smem.check_async_read(world.issue(b), start, stop - start)
    assert world.take() == [findings.MISSING_PROXY_FENCE]


def test_fence_by_the_writer(world):
    a, b = world.warps[:2]
    world.smem.store_one(a, BASE, bytes(16))
    world.smem.fence_async(a)
    world.order(a, b)
    world.smem.check_async_read(world.issue(b), BASE, 16)
    assert world.take() == []


def test_fence_by_the_issuer(world):
    a, b = world.warps[:2]
    world.smem.store_one(a, BASE, bytes(16))
    world.order(a, b)
    world.smem.fence_async(b)
    world.smem.check_async_read(world.issue(b), BASE, 16)
    assert world.take() == []


def test_fence_of_the_cluster(world):
    a, b = world.warps[:2]
    world.smem.store_one(a, BASE, bytes(16))
    world.order(a, b)
    note_fence(b, "shared")
    world.smem.check_async_read(world.issue(b), BASE, 16)
    assert world.take() == []


def test_fence_before_the_write_or_not_ordered_before_the_read(world):
    a, b, c = world.warps[:3]
    world.smem.fence_async(a)
    a.release()
    world.smem.store_one(a, BASE, bytes(16))
    world.order(a, b)
    world.order(a, c)
    world.smem.fence_async(c)
    world.smem.check_async_read(world.issue(b), BASE, 16)
    assert world.take() == [findings.MISSING_PROXY_FENCE]
    world.order(c, b)
    world.smem.check_async_read(world.issue(b), BASE, 16)
    assert world.take() == []


def test_fence_does_not_order(world):
    a, b = world.warps[:2]
    world.smem.store_one(a, BASE, bytes(16))
    world.smem.fence_async(b)
    world.smem.check_async_read(world.issue(b), BASE, 16)
    assert world.take() == [findings.RACE]


def test_copy_over_unfenced_writes(world):
    a = world.warps[0]
    world.smem.store_one(a, BASE, bytes(16))
    world.copy_in(a, BASE, random_bytes(16))
    assert world.take() == [findings.MISSING_PROXY_FENCE]


def test_copies_read_what_copies_wrote_without_a_fence(world):
    a = world.warps[0]
    a.acquire(world.copy_in(a, BASE, random_bytes(64)).clock)
    world.smem.check_async_read(world.issue(a), BASE, 64)
    assert world.take() == []


@pytest.mark.parametrize("size", [4, 16])
def test_cp_async_alone_needs_no_proxy_fence(world, size):
    a = world.warps[0]
    offsets = BASE + LANES[:16] * 32
    world.smem.store(a, BASE + LANES * 16, 16, random_bytes(32, 16))
    issue = world.issue(a, CP_ASYNC)
    world.smem.begin_async_write_lanes(issue, offsets, size)
    assert world.take() == []
    world.smem.load_one(a, BASE + 32, size)
    assert world.take() == [findings.IN_FLIGHT_ACCESS]
    world.smem.end_async_write_lanes(issue, offsets, size)
    a.acquire(issue.clock)
    world.smem.load(a, offsets, 16)
    assert world.take() == []
    chunks = offsets // 16
    world.smem.check_async_read_chunks(world.issue(a, MMA), chunks)
    # With 4 bytes copied, the other 12 of a chunk are still an ordinary store's.
    assert world.take() == ([] if size == 16 else [findings.MISSING_PROXY_FENCE])
    world.smem.fence_async(a)
    world.smem.check_async_read_chunks(world.issue(a, MMA), chunks)
    assert world.take() == []


def test_async_read_of_nothing(world):
    world.smem.check_async_read(world.issue(world.warps[0]), BASE, 64)
    assert world.take() == [findings.UNINITIALISED_READ]


# Shared memory: the CTA's end.


def test_exit_clean(world):
    a, b = world.warps[:2]
    a.acquire(world.copy_in(a, BASE, random_bytes(64)).clock)
    world.order(a, b)
    out = world.issue(b)
    world.smem.check_async_read(out, BASE, 64)
    b.acquire(out.clock)
    world.smem.store_one(b, BASE + 100, bytes(4))
    world.smem.exit_check()
    assert world.take() == []


@pytest.mark.parametrize("size", [4, 64])
def test_exit_with_a_copy_in_flight(world, size):
    world.smem.begin_async_write(world.issue(world.warps[0]), BASE, size)
    world.smem.exit_check()
    assert world.take() == [findings.SHARED_IN_USE]


def test_exit_without_waiting_for_a_write(world):
    world.copy_in(world.warps[0], BASE, random_bytes(64))
    world.smem.exit_check()
    assert world.take() == [findings.SHARED_IN_USE]


@pytest.mark.parametrize("size", [4, 64])
def test_exit_without_waiting_for_a_read(world, size):
    a = world.warps[0]
    world.smem.store(a, BASE + LANES[: size // 4] * 4, 4, random_bytes(size // 4, 4))
    world.smem.fence_async(a)
    world.smem.check_async_read(world.issue(a), BASE, size)
    world.smem.exit_check()
    assert world.take() == [findings.SHARED_IN_USE]


def test_access_after_exit(world):
    world.smem.exit_check()
    world.smem.store_one(world.warps[0], BASE, bytes(4))
    assert world.take() == [findings.SHARED_IN_USE]


# Buffers.


def test_buffer_of_an_array():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    buffer = Buffer.of(array, "a")
    assert (buffer.address, buffer.num_bytes, buffer.layout) == (array.ctypes.data, 96, None)
    part = Buffer.of(array[1:, ::2])
    assert (part.address, part.num_bytes) == (array.ctypes.data + 24, 68)
    assert part.layout == ((3, 3), (24, 8), 4)
    backwards = Buffer.of(array[::-1])
    assert (backwards.address, backwards.num_bytes) == (array.ctypes.data, 96)
    assert Buffer.of(array[:0]).num_bytes == 0


def test_buffer_of_a_tensor():
    class Tensor:
        shape = (4, 6)

        def data_ptr(self):
            return 4096

        def stride(self):
            return (8, 1)

        def element_size(self):
            return 2

    buffer = Buffer.of(Tensor())
    assert (buffer.address, buffer.num_bytes, buffer.layout) == (4096, 60, ((4, 6), (16, 2), 2))


def test_buffer_that_must_be_written_starts_empty():
    with pytest.raises(ValueError, match="initialised"):
        Buffer.of(np.zeros(4), must_be_written=True)


# Global memory.


def addresses(array, elements, size):
    return np.uint64(array.ctypes.data) + np.asarray(elements, np.uint64) * np.uint64(size)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("output", [False, True])
def test_global_values(world, pattern, size, output):
    array = np.zeros((128, size), np.uint8)
    world.gmem.register(Buffer.of(array, initialised=not output))
    where, values = addresses(array, PATTERNS[pattern], size), random_bytes(len(PATTERNS[pattern]), size)
    w = world.warps[0]
    world.gmem.store(w, where, size, values)
    np.testing.assert_array_equal(array[PATTERNS[pattern]], values)
    np.testing.assert_array_equal(world.gmem.load(w, where, size), values)
    assert world.gmem.load_one(w, int(where[0]), size) == values[0].tobytes()
    assert world.take() == []


def test_global_lanes_in_several_buffers(world):
    one, two = np.arange(64, dtype=np.uint32), np.arange(100, 164, dtype=np.uint32)
    world.gmem.register(Buffer.of(one))
    world.gmem.register(Buffer.of(two))
    where = np.concatenate([addresses(one, LANES[:16], 4), addresses(two, LANES[:16], 4)])
    got = world.gmem.load(world.warps[0], where, 4).view(np.uint32).reshape(-1)
    assert got.tolist() == [*range(16), *range(100, 116)]
    world.gmem.store(world.warps[0], where, 4, got[::-1].copy().view(np.uint8).reshape(32, 4))
    assert one[:2].tolist() == [115, 114]
    assert two[:2].tolist() == [15, 14]


@pytest.mark.parametrize("element", [-1, 64])
def test_global_bounds(world, element):
    array = np.zeros(64, np.uint32)
    world.gmem.register(Buffer.of(array, "array"))
    where = np.array([array.ctypes.data + 4 * element], np.uint64)
    with pytest.raises(findings.Stop):
        world.gmem.load(world.warps[0], where, 4)
    with pytest.raises(findings.Stop):
        world.gmem.store(world.warps[0], where, 4, np.zeros((1, 4), np.uint8))
    with pytest.raises(findings.Stop):
        world.gmem.load(world.warps[0], np.concatenate([addresses(array, [0], 4), where]), 4)
    with pytest.raises(findings.Stop):
        world.gmem.load_one(world.warps[0], int(where[0]), 4)
    assert world.take() == [findings.OUT_OF_BOUNDS] * 4
    assert "array" in world.messages[-1]


def test_global_access_over_the_end(world):
    array = np.zeros(30, np.uint8)
    world.gmem.register(Buffer.of(array))
    with pytest.raises(findings.Stop):
        world.gmem.view(array.ctypes.data + 16, 16)
    with pytest.raises(findings.Stop):
        world.gmem.load(world.warps[0], addresses(array, LANES[:8], 4), 4)
    assert world.take() == [findings.OUT_OF_BOUNDS] * 2


def test_global_uninitialised(world):
    array = np.zeros(64, np.uint32)
    world.gmem.register(Buffer.of(array, initialised=False))
    w = world.warps[0]
    world.gmem.store(w, addresses(array, LANES, 4), 4, random_bytes(32, 4))
    world.gmem.load(w, addresses(array, LANES[::-1], 4), 4)
    assert world.take() == []
    world.gmem.load(w, addresses(array, LANES + 1, 4), 4)
    world.gmem.load(w, addresses(array, LANES * 2, 4), 4)
    world.gmem.load_one(w, array.ctypes.data + 128, 4)
    assert world.take() == [findings.UNINITIALISED_READ] * 3


def test_global_readonly(world):
    array = np.zeros(64, np.uint32)
    world.gmem.register(Buffer.of(array, readonly=True))
    w = world.warps[0]
    world.gmem.store(w, addresses(array, LANES, 4), 4, random_bytes(32, 4))
    world.gmem.store_one(w, array.ctypes.data, b"abcd")
    assert world.take() == [findings.WRITE_READONLY] * 2
    assert not array.any()


def test_global_unwritten(world):
    array = np.zeros((8, 16), np.uint8)
    full, view = Buffer.of(array[:, :12], "view", initialised=False, must_be_written=True), np.zeros(16, np.uint8)
    other = Buffer.of(view, "dense", initialised=False, must_be_written=True)
    world.gmem.register(full)
    world.gmem.register(other)
    w = world.warps[0]
    for row in range(8):
        world.gmem.store(w, addresses(array[row], LANES[:3], 4), 4, random_bytes(3, 4))
    assert [(b.name, n, first) for b, n, first in world.gmem.unwritten()] == [("dense", 16, 0)]
    world.gmem.store_one(w, view.ctypes.data, bytes(8))
    world.gmem.store_one(w, view.ctypes.data + 12, bytes(4))
    assert [(b.name, n, first) for b, n, first in world.gmem.unwritten()] == [("dense", 4, 8)]
    later = GlobalMemory(world)
    later.register(other)
    assert [n for _, n, _ in later.unwritten()] == [4], "a buffer remembers over launches"


def test_global_overlapping_buffers(world):
    array = np.zeros(64, np.uint8)
    world.gmem.register(Buffer.of(array[:32], "low", initialised=False, must_be_written=True))
    world.gmem.register(Buffer.of(array[16:], "high"))
    w = world.warps[0]
    world.gmem.load_one(w, array.ctypes.data + 32, 32)
    assert world.take() == []
    world.gmem.load_one(w, array.ctypes.data + 16, 32)
    assert world.take() == [findings.UNINITIALISED_READ]
    world.gmem.store_one(w, array.ctypes.data, bytes(32))
    assert world.gmem.unwritten() == []
    repeated = Buffer.of(array, "same", initialised=False)
    world.gmem.register(repeated)
    world.gmem.register(repeated)
    world.gmem.load_one(w, array.ctypes.data, 64)
    assert world.take() == [findings.UNINITIALISED_READ]


def test_global_race(world):
    array = np.zeros(64, np.uint32)
    world.gmem.register(Buffer.of(array))
    a, b = world.warps[:2]
    world.gmem.store(a, addresses(array, LANES, 4), 4, random_bytes(32, 4))
    world.gmem.load(b, addresses(array, LANES + 16, 4), 4)
    assert world.take() == [findings.RACE]
    world.gmem.store(b, addresses(array, LANES, 4), 4, random_bytes(32, 4))
    assert world.take() == [], "the same values"
    world.gmem.store(a, addresses(array, LANES * 2 % 32 + LANES // 16, 4), 4, random_bytes(32, 4, seed=1))
    assert world.take() == [findings.RACE]
    world.order(a, b)
    world.gmem.store(b, addresses(array, LANES, 4), 4, random_bytes(32, 4, seed=2))
    world.gmem.load_one(b, array.ctypes.data, 4)
    assert world.take() == []


def test_global_race_of_other_clusters_and_strong_accesses_is_not_looked_for(world):
    array = np.zeros(64, np.uint32)
    world.gmem.register(Buffer.of(array))
    a, b = world.warps[:2]
    b.cluster = SimpleNamespace(index=1, state={}, ctas=[])
    world.gmem.store_one(a, array.ctypes.data, b"abcd")
    world.gmem.store_one(b, array.ctypes.data, b"efgh")
    world.gmem.store_one(a, array.ctypes.data, b"ijkl", strong=True)
    world.gmem.load_one(world.warps[2], array.ctypes.data, 4)
    assert world.take() == []


def test_global_lanes_that_write_different_values(world):
    array = np.zeros(4, np.uint32)
    world.gmem.register(Buffer.of(array))
    where = np.full(32, array.ctypes.data, np.uint64)
    world.gmem.store(world.warps[0], where, 4, random_bytes(32, 4))
    assert world.take() == [findings.RACE]


def test_global_discard(world):
    array = np.zeros(64, np.uint32)
    world.gmem.register(Buffer.of(array))
    world.gmem.forget(world.warps[0], array.ctypes.data, 128)
    world.gmem.load_one(world.warps[0], array.ctypes.data + 128, 4)
    assert world.take() == []
    world.gmem.load_one(world.warps[0], array.ctypes.data, 4)
    assert world.take() == [findings.UNINITIALISED_READ]


def test_global_async_read(world):
    array = np.zeros(64, np.uint32)
    world.gmem.register(Buffer.of(array))
    a, b = world.warps[:2]
    region, at = world.gmem.view(array.ctypes.data, 256)
    world.gmem.check_async_read(world.issue(b), region, slice(at, at + 256))
    assert world.take() == []
    world.gmem.store_one(a, array.ctypes.data + 16, bytes(16))
    world.gmem.check_async_read(world.issue(b), region, np.arange(0, 256, 16))
    assert world.take() == [findings.RACE]
    world.order(a, b)
    world.gmem.check_async_read(world.issue(b), region, slice(0, 16))
    assert world.take() == []
    world.gmem.check_async_read(world.issue(b), region, slice(0, 32))
    assert world.take() == [findings.MISSING_PROXY_FENCE]
    note_fence(b, "global")
    world.gmem.check_async_read(world.issue(b), region, slice(0, 32))
    assert world.take() == []


def test_fenced_clock(world):
    a, b = world.warps[:2]
    a.clock[0] = 9
    note_fence(a, "global")
    assert fenced_clock(world.cluster, a.clock, "global")[0] == 9
    assert not fenced_clock(world.cluster, a.clock, "shared").any()
    assert not fenced_clock(world.cluster, b.clock, "global").any()
    b.acquire(a.release())
    note_fence(a, "global")
    assert fenced_clock(world.cluster, b.clock, "global")[0] == 9
    assert fenced_clock(world.cluster, a.clock, "global")[0] == 10
