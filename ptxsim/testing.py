"""A pytest fixture that runs a kernel over a matrix of cases and prints one line a case.

from ptxsim.testing import matrix          # in conftest.py

def test_gemm(matrix):
    def case(policy, seed, m, n):
        ...                                 # build tensors
        report = ptxsim.run(compiled, a, b, c, outputs=(c,), policy=policy, seed=seed)
        assert ...                          # compare the result
        return report                       # optional: its counters are printed

    matrix(case, m=(1, 64), n=(128,))       # every m x n x policy, several seeds for `random`
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from ptxsim.findings import Report

POLICIES = ("eager", "random", "lazy")


class Matrix:
    """Runs cases, prints a line for each, fails once at the end with everything that went wrong."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def __call__(
        self,
        case: Callable[..., Report | None],
        *,
        policies: Sequence[str] = POLICIES,
        seeds: Sequence[int] = (0,),
        **axes: Iterable[Any],
    ) -> None:
        """Runs `case(policy=, seed=, **values)` for the product of the axes, policies and (for `random`) seeds.

        Args:
            case: builds inputs, runs the kernel, asserts on the result; may return the Report.
            policies: completion policies.
            seeds: of the random policy; the other two run with the first.
            **axes: name -> values.

        Raises:
            AssertionError: a case failed; all failures are listed.
        """
        failures = []
        names = list(axes)
        for values in itertools.product(*(tuple(axes[name]) for name in names)):
            for policy in policies:
                for seed in seeds if policy == "random" else seeds[:1]:
                    point = dict(zip(names, values, strict=True))
                    label = " ".join([*(f"{k}={v}" for k, v in point.items()), policy, f"seed={seed}"])
                    start = time.perf_counter()
                    outcome, report = "ok", None
                    try:
                        report = case(policy=policy, seed=seed, **point)
                    except AssertionError as error:
                        outcome = "FAILED"
                        failures.append(f"{label}: {error}")
                    seconds = time.perf_counter() - start
                    detail = f" {report.counters.get('instructions', 0)} instructions" if report is not None else ""
                    self._write(f"{label}: {outcome} {seconds:.2f} s{detail}")
        assert not failures, f"{len(failures)} case(s) failed\n" + "\n".join(failures)


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> Matrix:
    """Runs a matrix of simulated cases; see ptxsim.testing."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")

    def write(line: str) -> None:
        if reporter is not None and request.config.get_verbosity() > 0:
            reporter.write_line(f"  {request.node.name}: {line}")
        else:
            print(line)

    return Matrix(write)
