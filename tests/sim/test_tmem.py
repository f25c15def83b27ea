"""Tensor memory by itself: allocation, validity, race stamps."""

from types import SimpleNamespace

import numpy as np
import pytest

from ptxsim.findings import RACE, TMEM_IN_USE, TMEM_MISUSE, UNINITIALISED_READ, Stop
from ptxsim.tmem import UNDER_WAY, TensorMemory

ALL = slice(0, 8)


def quarter(number):
    return slice(2 * number, 2 * number + 2)


class Found(list):
    def __call__(self, code, message, fatal=False):
        self.append((code, message))
        if fatal:
            raise Stop

    @property
    def codes(self):
        return [code for code, _ in self]


@pytest.fixture
def found():
    return Found()


@pytest.fixture
def tmem(found):
    machine = SimpleNamespace(found=found)
    return TensorMemory(SimpleNamespace(machine=machine, index=5, rank=0, num_warps=4))


def clock(*ticks):
    return np.array([*ticks, *[0] * (7 - len(ticks))], np.uint32)


def test_allocations_are_disjoint_and_aligned(tmem, found):
    taken = set()
    for columns in (128, 128, 64, 64, 32, 32):
        start = tmem.allocate(found, columns)
        assert start % columns == 0
        span = set(range(start, start + columns))
        assert not taken & span
        taken |= span
    assert len(taken) == 448
    assert tmem.allocate(found, 32) is not None
    assert tmem.allocate(found, 32) is not None
    assert tmem.allocate(found, 32) is None
    assert not found


def test_reallocated_columns_are_uninitialised_again(tmem, found):
    tmem.allocate(found, 512)
    tmem.valid[:] = True
    tmem.note_write(6, 9, ALL, 0, 512)
    tmem.free(found, clock(0, 0, 0, 0, 0, 0, 9), 0, 512)
    tmem.allocate(found, 512)
    tmem.check_read(found, clock(), ALL, 0, 512, "read")
    assert not found
    tmem.check_valid(found, slice(0, 32), 7, 1, "read")
    assert found.codes == [UNINITIALISED_READ]


def test_exit_with_an_allocation(tmem, found):
    tmem.exit_check()
    assert not found
    tmem.allocate(found, 64)
    tmem.exit_check()
    assert found.codes == [TMEM_IN_USE]
    assert "CTA 5" in found[0][1]
    assert "64 columns at 0" in found[0][1]


@pytest.mark.parametrize(("address", "columns"), [(0, 32), (32, 64), (1 << 16, 64)])
def test_dealloc_must_name_an_allocation(tmem, found, address, columns):
    tmem.allocate(found, 64)
    tmem.free(found, clock(), address, columns)
    assert found.codes == [TMEM_MISUSE]
    assert tmem.allocations == {0: 64}


def test_range_over_neighbouring_allocations(tmem, found):
    tmem.allocate(found, 64)
    tmem.allocate(found, 32)
    tmem.check_range(found, 60, 36, "access")
    with pytest.raises(Stop):
        tmem.check_range(found, 60, 37, "access")
    assert found.codes == [TMEM_MISUSE]


def test_access_without_any_allocation(tmem, found):
    with pytest.raises(Stop):
        tmem.check_range(found, 0, 1, "access")


def test_read_behind_a_write(tmem, found):
    tmem.allocate(found, 512)
    tmem.note_write(6, 3, ALL, 10, 4)
    tmem.check_read(found, clock(0, 0, 0, 0, 0, 0, 3), ALL, 10, 4, "read")
    tmem.check_read(found, clock(0, 0, 0, 0, 0, 0, 2), ALL, 14, 4, "read")
    assert not found
    tmem.check_read(found, clock(0, 0, 0, 0, 0, 0, 2), quarter(2), 13, 4, "read")
    assert found.codes == [RACE]
    assert "column 13, lanes 64 to 79" in found[0][1]
    assert "tensor" not in found[0][1]  # thread 6 is the third agent, "copy"


def test_write_behind_reads_of_several_warps(tmem, found):
    tmem.allocate(found, 512)
    tmem.note_read(1, 5, quarter(1), 0, 8)
    tmem.note_read(2, 7, quarter(2), 0, 8)
    tmem.check_write(found, clock(0, 5, 7), 5, ALL, 0, 8, "write")
    tmem.check_write(found, clock(0, 4, 7), 5, quarter(2), 0, 8, "write")
    tmem.check_write(found, clock(0, 4, 7), 5, ALL, 8, 8, "write")
    assert not found
    tmem.check_write(found, clock(0, 5, 6), 5, ALL, 4, 8, "write")
    assert found.codes == [RACE]
    assert "read by warp 2" in found[0][1]


def test_stores_under_way(tmem, found):
    tmem.allocate(found, 512)
    tmem.note_write(1, UNDER_WAY, quarter(1), 0, 8)
    tmem.check_write(found, clock(0, 3), 1, quarter(1), 0, 8, "write")
    assert not found
    tmem.settle_stores(1, 3, quarter(1), 0, 4)
    tmem.check_read(found, clock(0, 3), quarter(1), 0, 4, "read")
    assert not found
    tmem.check_read(found, clock(0, 3), quarter(1), 0, 8, "read")
    assert found.codes == [RACE]
    assert "tcgen05.st of warp 1" in found[0][1]


def test_settling_leaves_later_writes_alone(tmem, found):
    tmem.allocate(found, 512)
    tmem.note_write(1, UNDER_WAY, quarter(1), 0, 8)
    tmem.note_write(5, 9, ALL, 0, 8)
    tmem.settle_stores(1, 3, quarter(1), 0, 8)
    tmem.check_read(found, clock(0, 3), quarter(1), 0, 8, "read")
    assert found.codes == [RACE]


def test_bands_of_m_64_are_apart(tmem, found):
    tmem.allocate(found, 512)
    tmem.note_write(5, 9, slice(0, 8, 2), 0, 8)
    tmem.check_read(found, clock(), slice(1, 8, 2), 0, 8, "read")
    tmem.check_read(found, clock(), slice(5, 6), 0, 8, "read")
    assert not found
    tmem.check_read(found, clock(), slice(6, 7), 0, 8, "read")
    tmem.note_read(3, 9, slice(0, 8, 2), 0, 8)
    tmem.check_write(found, clock(0, 0, 0, 0, 0, 9), 5, slice(4, 8, 2), 0, 8, "write")
    assert found.codes == [RACE, RACE]
    assert "lanes 96 to 111" in found[0][1]
    assert "lanes 64 to 79" in found[1][1]
