"""The design of nightly sizes: complete, small, and run point by point."""

import itertools

import pytest
from covering import every_pair, run_pairs

from ptxsim.testing import Matrix

AXES = {"run": ("eager", "random", "lazy"), "m": (0, 1, 7, 64, 129, 820), "n": (8, 136, 576), "k": (32, 64, 384, 1536)}


def test_every_pair_occurs() -> None:
    points = every_pair(**AXES)
    for one, other in itertools.combinations(AXES, 2):
        found = {(point[one], point[other]) for point in points}
        assert found == set(itertools.product(AXES[one], AXES[other])), f"{one}, {other}"


def test_few_points() -> None:
    points = every_pair(**AXES)
    # As many as the two longest axes need at least, and not many more; of 216.
    assert 24 <= len(points) <= 30
    assert len({tuple(point.values()) for point in points}) == len(points)
    assert points == every_pair(**AXES)


def test_one_axis_is_run_whole() -> None:
    # Beside the policies.
    assert len(every_pair(run=("eager",), m=(1, 2, 3))) == 3


def test_cases_are_run_with_their_policy_and_seed() -> None:
    seen, lines = [], []

    def case(policy: str, seed: int, m: int, n: int) -> None:
        seen.append((policy, seed, m, n))

    run_pairs(Matrix(lines.append), case, seeds=(3, 4), m=(1, 2, 3), n=(8, 16))
    assert {(policy, seed) for policy, seed, _, _ in seen} == {("eager", 3), ("random", 3), ("random", 4), ("lazy", 3)}
    assert {(policy, seed, m) for policy, seed, m, _ in seen} == {
        (*run, m) for run in (("eager", 3), ("random", 3), ("random", 4), ("lazy", 3)) for m in (1, 2, 3)
    }
    assert {(m, n) for _, _, m, n in seen} == set(itertools.product((1, 2, 3), (8, 16)))
    assert len(lines) == len(seen) == 12


def test_a_failure_names_its_point() -> None:
    def case(policy: str, seed: int, m: int, n: int) -> None:
        assert (m, n) != (2, 16), "two is too wide"

    with pytest.raises(AssertionError, match=r"'m': 2, 'n': 16.*two is too wide"):
        run_pairs(Matrix(lambda line: None), case, m=(1, 2), n=(8, 16))
