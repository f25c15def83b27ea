"""Faults put into good kernels: each must be noticed, and the good kernels must pass.

Run as a program it prints the table of faults and what noticed them.
"""

from collections.abc import Iterator

import kernels_seeding
import kernels_seeding_ptx
import pytest
import seeded_linear
import seeded_small
from seeding import POLICIES, REFUSED, WRONG, Base, Bug, Table, run_all

from ptxsim import findings

BASES = (kernels_seeding.linear, *kernels_seeding_ptx.ALL)
CASES = [(kernels_seeding.linear, seeded) for seeded in seeded_linear.BUGS + seeded_linear.HOST_BUGS]
CASES += [(base, seeded) for base, bugs in seeded_small.BUGS for seeded in bugs]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    lines = Table()
    yield lines
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if request.config.get_verbosity() > 0 and capture is not None:
        with capture.global_and_fixture_disabled():
            print(f"\n{lines}")


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_good_kernel(base: Base, table: Table) -> None:
    outcomes = run_all(base)
    table.add(base.name, "none", outcomes)
    for policy, runs in outcomes.items():
        assert all(not run.codes for run in runs), f"{policy}: {[(run.codes, run.detail) for run in runs]}"


@pytest.mark.parametrize(("base", "seeded"), CASES, ids=[f"{base.name}: {seeded.name}" for base, seeded in CASES])
def test_bug_is_noticed(base: Base, seeded: Bug, table: Table) -> None:
    outcomes = run_all(base, seeded)
    table.add(base.name, seeded.name, outcomes)
    for policy in seeded.policies:
        found = {code for run in outcomes[policy] for code in run.codes}
        assert found & seeded.expected, (
            f"{policy}: found {sorted(found) or 'nothing'}, expected one of {sorted(seeded.expected)}: "
            f"{[run.detail for run in outcomes[policy]]}"
        )


@pytest.mark.parametrize("seeded", seeded_linear.MISSED, ids=lambda seeded: seeded.name)
def test_bug_that_is_known_to_be_missed(seeded: Bug, table: Table) -> None:
    # Fails when the simulator learns to see it: then it belongs into the list above.
    outcomes = run_all(kernels_seeding.linear, seeded)
    table.add(kernels_seeding.linear.name, seeded.name, outcomes)
    assert all(not run.codes for runs in outcomes.values() for run in runs)


def test_every_bug_names_codes_and_policies_that_exist() -> None:
    # A misspelt one would test nothing.
    codes = {value for name, value in vars(findings).items() if name.isupper()} | {WRONG, REFUSED}
    for _, seeded in CASES:
        assert seeded.policies
        assert set(seeded.policies) <= set(POLICIES)
        assert seeded.expected
        assert seeded.expected <= codes, seeded.name


if __name__ == "__main__":
    everything = Table()
    for kernel in BASES:
        everything.add(kernel.name, "none", run_all(kernel))
        for owner, fault in CASES:
            if owner is kernel:
                everything.add(kernel.name, fault.name, run_all(kernel, fault))
        if kernel is kernels_seeding.linear:
            for fault in seeded_linear.MISSED:
                everything.add(kernel.name, fault.name, run_all(kernel, fault))
    print(everything)
