"""Launches on Hopper that overlap: every kernel lets the next begin, and waits before it touches what others write.

The rules are in `cutedsl.kernels.hopper`. In every other simulated test of these kernels an access before the wait is a
finding; here is shown that it would be.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import test_finalize_sm90 as finalize_test
import test_grouped_gemm_sm90 as gemm_test
import test_inverse_rope_quantize_sm90 as rope_test
import test_quantize_sm90 as quantize_test
import test_route_sm90 as route_test
from cutlass import cute
from hopper_kit import machine, on_hopper
from quantize_kit import random_rows
from test_finalize_sm100 import make_problem
from test_inverse_rope_quantize_sm100 import make_cache, random_o
from test_quantize_sm100 import ROUTINGS, make_slots
from test_route_sm100 import make_ids

import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import finalize_sm90, finalize_sm100, hopper, route_sm90, route_sm100
from ptxsim import api, findings
from ptxsim.host.capture import prepare_environment
from ptxsim.launch import Launch

prepare_environment()

__all__ = ["on_hopper"]


def run_slots(output: str) -> ptxsim.Report:
    topk_ids, num_experts = ROUTINGS["many experts, few tokens"]
    slots = make_slots(random_rows(len(topk_ids), 176, 1), topk_ids, num_experts)
    return quantize_test.simulate_slots(slots, output, 3, "random", 0)


def run_gemm(config: gemm_test.Config, counts: tuple[int, ...]) -> ptxsim.Report:
    return gemm_test.simulate(config, (counts, 160, 544, 3), "random", 0)


# A small problem for each kernel; one group of a GEMM has constant rows.
RUNS: dict[str, Callable[[], ptxsim.Report]] = {
    "route": lambda: route_test.simulate(make_ids(7, 6, 48, 64), 48, None, 1, "random", 0),
    "route, cluster": lambda: route_test.simulate(make_ids(129, 6, 48, 64), 48, None, 8, "random", 0),
    "quantize": lambda: quantize_test.simulate(random_rows(7, 64, 1), 0.01, "codes", 2, "random", 0),
    "round rows": lambda: quantize_test.simulate(random_rows(7, 64, 1), 0.01, "bf16", 2, "random", 0),
    "round slots": lambda: run_slots("bf16"),
    "copy slots": lambda: run_slots("copy"),
    "inverse RoPE": lambda: rope_test.simulate(random_o(7, 4, 512, 0), make_cache(64, 0), 2, 0.002, None, "random", 0),
    "inverse RoPE, copy": lambda: rope_test.simulate(
        random_o(7, 4, 512, 0), make_cache(64, 0), 2, None, None, "random", 0
    ),
    "finalize": lambda: finalize_test.run(
        finalize_sm90.choose_config(8, False, True), make_problem(7, 8, 1032, False, True), "random", 0
    ),
    "GEMM": lambda: run_gemm(gemm_test.BF16_CONFIGS[0], (9, 0, 3)),
    "GEMM, pairs": lambda: run_gemm(gemm_test.BF16_CONFIGS[4], (9, 0, 3)),
    "GEMM, SwiGLU": lambda: run_gemm(gemm_test.SWIGLU_CONFIGS[2], (9, 0, 3)),
    "GEMM, even": lambda: run_gemm(gemm_test.EVEN_CONFIGS[0], (9, 0, 3)),
    "GEMM, even with flags": lambda: run_gemm(gemm_test.EVEN_CONFIGS[3], (9, 0, 3)),
    "GEMM, one group": lambda: run_gemm(gemm_test.BF16_CONFIGS[0], (9,)),
    "GEMM, one group, even": lambda: run_gemm(gemm_test.EVEN_CONFIGS[0], (9,)),
}


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Collects what is simulated inside."""
    found: list[Launch] = []
    simulate = api.simulate

    def noted(launch: Launch, *args: object, **more: object) -> ptxsim.Report:
        found.append(launch)
        return simulate(launch, *args, **more)  # type: ignore[arg-type]

    with mock.patch.object(api, "simulate", noted):
        yield found


@contextmanager
def compiled_anew() -> Iterator[None]:
    """Kernels are compiled as they are inside, and forgotten."""
    with mock.patch.dict(compiler._functions, clear=True), mock.patch.dict(api._programs):
        yield


@pytest.mark.parametrize("name", RUNS)
def test_every_kernel_overlaps_those_around_it(name: str) -> None:
    with launches() as found:
        report = RUNS[name]()
    (launch,) = found
    assert launch.attributes["programmatic_stream_serialization"] == 1
    first, wait = (launch.ptx.find(f"griddepcontrol.{action};") for action in ("launch_dependents", "wait"))
    assert 0 < first < wait
    # A kernel that has ended must have waited, so that those behind it need to wait for it alone.
    assert report.counters["op:griddepcontrol.wait"] >= report.counters["ctas"]
    assert report.counters["op:griddepcontrol.launch_dependents"] >= report.counters["ctas"]


@pytest.mark.parametrize("name", RUNS)
def test_a_kernel_that_does_not_wait_is_found(name: str) -> None:
    without = mock.patch.object(cute.arch, "griddepcontrol_wait", return_value=None)
    with compiled_anew(), without, pytest.raises(ptxsim.FindingsError) as caught:
        RUNS[name]()
    assert caught.value.report.codes() == {findings.BEFORE_WAIT}


@pytest.mark.parametrize("name", ["route", "copy slots", "inverse RoPE", "finalize", "GEMM", "GEMM, one group"])
def test_without_overlap(name: str) -> None:
    with compiled_anew(), mock.patch.object(hopper, "USE_PDL", False), launches() as found:
        RUNS[name]()
    (launch,) = found
    assert not launch.attributes.get("programmatic_stream_serialization")
    assert "griddepcontrol" not in launch.ptx


def test_kernels_shared_with_blackwell_do_not_overlap_there() -> None:
    with machine("sm_100a"):
        for compiled in (
            route_sm100.compiled(route_sm100.Config(6)),
            finalize_sm100.compiled(finalize_sm100.choose_config(6, False, False)),
        ):
            assert "griddepcontrol" not in compiled.artifacts.PTX
    assert "griddepcontrol" in route_sm90.compiled(route_sm90.Config(6)).artifacts.PTX
