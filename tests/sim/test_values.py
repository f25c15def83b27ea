"""Lane values: what merge makes of a register that some lanes write."""

import numpy as np
import pytest

from ptxsim.values import FULL, merge

SHORT = np.arange(32, dtype=np.uint32)
LONG = np.arange(32, dtype=np.uint64) + np.uint64(1 << 40)
LOW_HALF = 0xFFFF


@pytest.mark.parametrize("old", [7, 1 << 40, SHORT, LONG], ids=["int", "long int", "uint32", "uint64"])
@pytest.mark.parametrize(
    "new", [9, 1 << 50, SHORT + np.uint32(100), LONG * np.uint64(2)], ids=["int", "long int", "uint32", "uint64"]
)
def test_merge_mixes_widths(old, new):
    merged = merge(old, new, LOW_HALF)
    want = [int(np.broadcast_to(new if i < 16 else old, 32)[i]) for i in range(32)]
    assert [int(value) for value in merged] == want
    assert merged.dtype in (np.uint32, np.uint64)


def test_merge_keeps_uniform_values_uniform():
    assert merge(5, 5, LOW_HALF) == 5
    assert merge(5, 6, FULL) == 6
    assert merge(None, 6, LOW_HALF) == 6
    assert merge((1, 2), (1, 2), LOW_HALF) == (1, 2)
