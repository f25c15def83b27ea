"""Lane values: what merge makes of a register that some lanes write."""

import numpy as np
import pytest

from ptxsim.values import FULL, merge, merge64, merge128

SHORT = np.arange(32, dtype=np.uint32)
LONG = np.arange(32, dtype=np.uint64) + np.uint64(1 << 40)
LOW_HALF = 0xFFFF


@pytest.mark.parametrize("old", [7, 1 << 40, SHORT, LONG], ids=["int", "long int", "uint32", "uint64"])
@pytest.mark.parametrize(
    "new", [9, 1 << 50, SHORT + np.uint32(100), LONG * np.uint64(2)], ids=["int", "long int", "uint32", "uint64"]
)
def test_merge_mixes_widths(old, new):
    merged = merge64(old, new, LOW_HALF)
    want = [int(np.broadcast_to(new if i < 16 else old, 32)[i]) for i in range(32)]
    assert [int(value) for value in merged] == want
    # Also of short values: arithmetic of the register must not wrap at 32 bits.
    assert merged.dtype == np.uint64


@pytest.mark.parametrize("old", [7, SHORT], ids=["int", "array"])
@pytest.mark.parametrize("new", [0xFFFFFFFF, SHORT + np.uint32(100)], ids=["int", "array"])
def test_merge_of_32_bits(old, new):
    merged = merge(old, new, LOW_HALF)
    assert merged.tolist() == [int(np.broadcast_to(new if i < 16 else old, 32)[i]) for i in range(32)]
    assert merged.dtype == np.uint32


def test_merge_keeps_uniform_values_uniform():
    assert merge(5, 5, LOW_HALF) == 5
    assert merge(5, 6, FULL) == 6
    assert merge(None, 6, LOW_HALF) == 6
    assert merge128((1, 2), (1, 2), LOW_HALF) == (1, 2)
    assert merge128((1, 2), (1, 3), LOW_HALF)[1].tolist() == [3] * 16 + [2] * 16
