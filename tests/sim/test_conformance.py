"""Public kernels, tested by their authors on hardware, against NumPy: the simulator's own regression suite."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conformance import flashinfer_dense, flashinfer_moe, flashinfer_rows, quack_kernels
from conformance.driver import POLICIES, Case

from ptxsim.findings import FindingsError

FLASHINFER = flashinfer_moe.CASES + flashinfer_dense.CASES + flashinfer_rows.CASES


def _ci(cases: tuple[Case, ...]) -> list[Case]:
    return [case for case in cases if not case.nightly_only]


@pytest.mark.parametrize("case", _ci(FLASHINFER), ids=lambda case: case.name)
def test_flashinfer(case: Case) -> None:
    for policy in case.policies:
        case.run(policy)


def test_a_race_in_a_public_kernel_is_found() -> None:
    # See LATE in flashinfer_dense.
    (case,) = (case for case in flashinfer_dense.CASES if case.name == "low-latency-split-k")
    with pytest.raises(FindingsError, match=r"race: tcgen05\.dealloc"):
        case.run("eager")


@pytest.mark.full
@pytest.mark.parametrize("case", FLASHINFER, ids=lambda case: case.name)
def test_flashinfer_nightly(case: Case) -> None:
    # Each policy has inputs of its own; `random` is the one whose order of events depends on the seed.
    for seed, policy in enumerate(case.policies, 1):
        case.run(policy, seed, nightly=True)


def _run_quack(arch: str, policies: tuple[str, ...], *options: str) -> dict[tuple[str, str], dict[str, Any]]:
    """QuACK changes CuTe DSL and is compiled for another architecture too: a process of its own, all cases in one."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests" / "sim")])}
    environment.pop("CUTE_DSL_DUMP_DIR", None)
    command = [sys.executable, "-m", "conformance", "--json", "--package", "quack", "--arch", arch]
    done = subprocess.run(
        [*command, "--policy", ",".join(policies), *options], capture_output=True, text=True, env=environment
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert results, f"no case ran:\n{done.stdout}\n{done.stderr}"
    return {(result["name"], result["policy"]): result for result in results}


@pytest.fixture(scope="module")
def quack_results() -> dict[tuple[str, str], dict[str, Any]]:
    return _run_quack("sm_100a", POLICIES) | _run_quack("sm_90a", POLICIES)


@pytest.mark.parametrize("case", _ci(quack_kernels.BLACKWELL + quack_kernels.HOPPER), ids=lambda case: case.name)
def test_quack(case: Case, quack_results: dict[tuple[str, str], dict[str, Any]]) -> None:
    for policy in POLICIES:
        result = quack_results[case.name, policy]
        assert "error" not in result, f"{policy}: {result['error']}"


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_100a", "sm_90a"])
def test_quack_nightly(arch: str) -> None:
    cases = quack_kernels.BLACKWELL if arch == "sm_100a" else quack_kernels.HOPPER
    results = _run_quack(arch, POLICIES, "--nightly", "--seed", "1")
    assert len(results) == len(cases) * len(POLICIES)
    failures = {key: result["error"] for key, result in results.items() if "error" in result}
    assert not failures, failures
