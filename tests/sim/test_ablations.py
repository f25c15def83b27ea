"""Break one semantic of the simulator at a time: some public kernel must notice.

What no kernel notices is listed too, and checked, so that the list of unpinned semantics stays true: it is what the simulator
believes without evidence.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from conformance import flashinfer_dense, flashinfer_moe
from conformance.driver import Case

from ptxsim import api, bulk, descriptors, groups, tcgen05, tcgen05_mma
from ptxsim.boxes import Box

CASES = {case.name: case for case in flashinfer_moe.CASES + flashinfer_dense.CASES}
Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Ablation:
    """A broken semantic.

    Attributes:
        name: what is broken.
        apply: breaks it.
        noticed: kernels that must fail.
        unnoticed: kernels that must still pass: for them the semantic is not pinned.
        policy: of the runs.
    """

    name: str
    apply: Patch
    noticed: tuple[str, ...] = ()
    unnoticed: tuple[str, ...] = ()
    policy: str = "eager"


def _forget() -> None:
    """Drops what was computed with the semantics of before."""
    api._programs.clear()
    tcgen05_mma.tile.cache_clear()
    for cached in (descriptors.k_major_chunks, descriptors.mn_major_chunks):
        cached.cache_clear()


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    _forget()
    yield monkeypatch
    monkeypatch.undo()
    _forget()


def _no_swizzle_in_loads(patch: pytest.MonkeyPatch) -> None:
    def put(self: Box, shared: Any, offset: int, data: Any) -> None:
        shared[offset : offset + len(data)] = data

    patch.setattr(Box, "put", put)


def _no_swizzle_in_stores(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Box, "get", lambda self, shared, offset: shared[offset : offset + self.num_bytes].copy())


def _no_swizzle_in_mma(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(descriptors, "swizzled", lambda address, swizzle: address)


def _both(*patches: Patch) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        for one in patches:
            one(patch)

    return apply


def _scale_cells(change: Callable[[Any], Any]) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        read = tcgen05_mma._scale_bytes
        patch.setattr(tcgen05_mma, "_scale_bytes", lambda *args: change(read(*args)))

    return apply


def _swap_rows(cells: Any) -> Any:
    return cells[np.arange(len(cells)) ^ 1]


def _copy_swaps_rows(patch: pytest.MonkeyPatch) -> None:
    for key, form in tcgen05._COPIES.items():
        patch.setitem(tcgen05._COPIES, key, dataclasses.replace(form, source=form.source ^ 1))


def _copy_reverses_bytes(patch: pytest.MonkeyPatch) -> None:
    gather = tcgen05.gather
    patch.setattr(tcgen05, "gather", lambda smem, chunks: gather(smem, chunks).reshape(-1, 4)[:, ::-1].copy())


def _exchange_scales(patch: pytest.MonkeyPatch) -> None:
    build = tcgen05_mma._operation

    def exchanged(*args: Any) -> Any:
        return build(*args[:-1], args[-1][::-1])

    patch.setattr(tcgen05_mma, "_operation", exchanged)


def _copy_in_one_cta(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tcgen05, "participants", lambda w, pair, peer_may_exit=False: (w.cta,))


def _exchange_b_halves(patch: pytest.MonkeyPatch) -> None:
    participants = tcgen05_mma.participants
    patch.setattr(tcgen05_mma, "participants", lambda *args: participants(*args)[::-1])


def _exchange_d_halves(patch: pytest.MonkeyPatch) -> None:
    accumulate = tcgen05_mma._accumulate

    def exchanged(op: Any, tmem: Any, *rest: Any) -> None:
        others = [cta.tmem for cta in op.ctas if cta.tmem is not tmem]
        accumulate(op, others[0] if others else tmem, *rest)

    patch.setattr(tcgen05_mma, "_accumulate", exchanged)


def _one_group_less(patch: pytest.MonkeyPatch) -> None:
    wait = groups.Groups.wait
    patch.setattr(groups.Groups, "wait", lambda self, w, mask, newest: wait(self, w, mask, newest + 1))


def _fill_with_ones(patch: pytest.MonkeyPatch) -> None:
    # 0x22 is 1.0 twice in E2M1.
    patch.setattr(Box, "_filled", lambda self: np.full((*self.rows, self.row_bytes), 0x22, np.uint8))


def _reduction_stores(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bulk, "reduce", lambda operation, dtype, old, new: new)


def _never_accumulate(patch: pytest.MonkeyPatch) -> None:
    build = tcgen05_mma._operation

    def fresh(w: Any, form: Any, desc: Any, d: int, a: int, b: int, accumulate: bool, *rest: Any) -> Any:
        return build(w, form, desc, d, a, b, False, *rest)

    patch.setattr(tcgen05_mma, "_operation", fresh)


def _decoded(name: str, change: Callable[[Any], Any]) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        form = tcgen05_mma.FORMATS[name]
        decode = form.decode
        changed = dataclasses.replace(form, decode=lambda raw: change(decode(raw)))
        patch.setitem(tcgen05_mma.FORMATS, name, changed)

    return apply


def _swap_neighbours(values: Any) -> Any:
    return np.ascontiguousarray(values.reshape(len(values), -1, 2)[:, :, ::-1]).reshape(values.shape)


ABLATIONS = (
    Ablation("no swizzle in tensor loads", _no_swizzle_in_loads, ("mm-fp4-1cta",)),
    Ablation("no swizzle in tensor stores", _no_swizzle_in_stores, ("mm-fp4-1cta",)),
    Ablation("no swizzle in the MMA", _no_swizzle_in_mma, ("mm-fp4-1cta",)),
    # Loads and MMA agree with each other in any permutation; a kernel that fills a tile with cp.async pins it.
    Ablation(
        "no swizzle in tensor loads and MMA",
        _both(_no_swizzle_in_loads, _no_swizzle_in_mma),
        ("act-1cta",),
        ("mm-fp4-1cta",),
    ),
    Ablation("bytes of a scale factor cell reversed", _scale_cells(lambda cells: cells[:, ::-1]), ("mm-fp4-1cta",)),
    Ablation("rows of scale factors swapped", _scale_cells(_swap_rows), ("mm-fp4-1cta",)),
    Ablation("scale factors of A and B exchanged", _exchange_scales, ("mm-fp4-1cta",)),
    Ablation("tcgen05.cp of a pair copies in one CTA", _copy_in_one_cta, ("mm-fp4-2cta",)),
    Ablation("halves of B exchanged in a pair", _exchange_b_halves, ("mm-fp4-2cta",)),
    Ablation("halves of D exchanged in a pair", _exchange_d_halves, ("mm-fp4-2cta",)),
    Ablation("wait_group N leaves N + 1", _one_group_less, ("mm-fp4-1cta",), policy="lazy"),
    Ablation("elements outside of a tensor are 1", _fill_with_ones, ("mm-fp4-1cta",)),
    Ablation("a bulk reduction overwrites", _reduction_stores, ("scatter-1cta",)),
    Ablation("the MMA never accumulates", _never_accumulate, ("mm-fp4-1cta",)),
    # One kernel writes scale factors with tcgen05.st: it pins where the MMA reads them, whatever tcgen05.cp does.
    Ablation(
        "rows of scale factors swapped in tcgen05.cp and MMA",
        _both(_copy_swaps_rows, _scale_cells(_swap_rows)),
        ("low-latency-registers",),
        ("mm-fp4-1cta",),
    ),
    Ablation(
        "bytes of a scale factor cell reversed in tcgen05.cp and MMA",
        _both(_copy_reverses_bytes, _scale_cells(lambda cells: cells[:, ::-1])),
        ("low-latency-registers",),
        ("mm-fp4-1cta",),
    ),
    # Both operands are FP4, so any order within a block of 16 gives the same sum. With A in FP8 it is pinned.
    Ablation(
        "nibbles of packed E2M1 exchanged in the MMA",
        _decoded("e2m1x2", _swap_neighbours),
        (),
        ("mm-fp4-1cta", "mm-fp4-2cta", "act-1cta", "low-latency"),
    ),
    Ablation(
        "neighbours of padded E2M1 exchanged in the MMA", _decoded("e2m1", _swap_neighbours), ("low-latency-mixed",)
    ),
)


@functools.cache
def _passes(name: str, policy: str) -> None:
    """A kernel that fails anyway notices nothing."""
    CASES[name].run(policy)


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: ablation.name)
def test_ablation(ablation: Ablation, patch: pytest.MonkeyPatch) -> None:
    cases: list[Case] = [CASES[name] for name in ablation.noticed + ablation.unnoticed]
    for case in cases:
        _passes(case.name, ablation.policy)
    _forget()
    ablation.apply(patch)
    for case in cases:
        if case.name in ablation.noticed:
            with pytest.raises(AssertionError):
                case.run(ablation.policy)
        else:
            case.run(ablation.policy)
