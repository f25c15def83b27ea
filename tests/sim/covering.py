"""Nightly sizes without their whole product: every two values of two axes occur together in some case.

Why that is enough. The simulator reports a race, a read of what nothing wrote or a write outside of the buffers wherever it
happens, and results are compared everywhere, so a case need not be lucky: it must only reach the code. What code a launch
reaches follows from

    rows        tiles of M, the last one's rows, groups without rows, pairs of tiles with two experts
    columns     tiles of N, the last one's columns, which half of a scale tile
    k           steps of K, blocks of the last step, how often barriers wrap
    run         the order in which copies, MMAs and warps complete: the policy and its seed

and from what is compiled: epilogue, tile, pair of CTAs. A branch looks at one of the four or at two (where a tile is: rows
and columns; what a wait sees: a size and the order), and each two of their values meet here. What is compiled is no axis of
a design: each kernel has all of its rows. Only a count depends on three: in which stage and phase a barrier is after several
tiles of several steps. For that test_fewest_stages of each GEMM makes all barriers wrap within a tile, in every policy.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ptxsim.findings import Report
from ptxsim.testing import POLICIES, Matrix


def every_pair(**axes: Iterable[Any]) -> list[dict[str, Any]]:
    """Few points of the product of the axes in which each two values of two axes occur together; always the same ones."""
    values = [tuple(axis) for axis in axes.values()]
    points = list(itertools.product(*(range(len(axis)) for axis in values)))
    pairs = {point: frozenset(itertools.combinations(enumerate(point), 2)) for point in points}
    missing, chosen = frozenset().union(*pairs.values()), []
    while missing:
        best = max(points, key=lambda point: len(pairs[point] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return [{name: axis[i] for name, axis, i in zip(axes, values, point, strict=True)} for point in chosen]


def run_pairs(
    matrix: Matrix,
    case: Callable[..., Report | None],
    *,
    policies: Sequence[str] = POLICIES,
    seeds: Sequence[int] = (0,),
    **axes: Iterable[Any],
) -> None:
    """As matrix(case, ...), but only every_pair of the axes, one of which is a policy with a seed."""
    runs = [(policy, seed) for policy in policies for seed in (seeds if policy == "random" else seeds[:1])]
    points = every_pair(run=runs, **axes)

    def at_point(policy: str, seed: int, point: dict[str, Any]) -> Report | None:
        return case(policy=policy, seed=seed, **point)

    for run in runs:
        chosen = [{name: point[name] for name in axes} for point in points if point["run"] == run]
        matrix(at_point, policies=run[:1], seeds=run[1:], point=chosen)
