"""The routed experts' last step on Hopper: simulated, every bit equal to the reference's; contracts as on Blackwell."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hopper_kit import on_hopper
from kernel_table import facts, find_cubin
from test_finalize_sm100 import CANARY, Problem, arguments, assert_same_bits, in_order, make_problem, row_of
from test_rounding import float_instructions

import ptxsim
from cutedsl.kernels import finalize_sm90, finalize_sm100
from cutedsl.kernels.finalize_sm90 import Config, choose_config
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

__all__ = ["on_hopper"]


def run(config: Config, problem: Problem, policy: str, seed: int) -> ptxsim.Report:
    num_tokens, num_columns = problem.expected.shape
    guarded = torch.full((num_tokens + 2, num_columns), CANARY, dtype=torch.bfloat16)
    out = guarded[1:-1]
    out.fill_(float("nan"))
    tensors = (*problem[:4], out)
    finalize_sm90.check(*tensors)
    report = ptxsim.run(finalize_sm90.compiled(config), *tensors, outputs=(out,), policy=policy, seed=seed)
    assert_same_bits(out, problem.expected)
    assert (guarded[0] == CANARY).all(), "the row before out was written"
    assert (guarded[-1] == CANARY).all(), "the row behind out was written"
    return report


# T, top_k, columns; a CTA has 1024 columns: one vector, less than a CTA, whole CTAs, a ragged one.
SHAPES = [(1, 6, 7168), (7, 8, 1032), (64, 1, 8), (7, 16, 264), (129, 6, 64), (820, 6, 8)]


@pytest.mark.parametrize(("y_fp32", "shared"), [(False, True), (False, False), (True, True)])
def test_shapes(matrix, y_fp32: bool, shared: bool) -> None:
    def case(policy: str, seed: int, shape: tuple[int, int, int]) -> ptxsim.Report:
        num_tokens, top_k, num_columns = shape
        problem = make_problem(num_tokens, top_k, num_columns, y_fp32, shared)
        return run(choose_config(top_k, y_fp32, shared), problem, policy, seed)

    # Warps never meet here, so policies differ only in the order in which they run.
    matrix(case, policies=("random",), shape=SHAPES)


# Order of sums, a rounded product, a tiny one, and what is not finite.
PROBLEMS = {
    "order": ([2.0**24, 1.0, -(2.0**24)], [1.0, 1.0, 1.0]),
    "rounded": ([1.0 + 2.0**-7, -(1.0 + 2.0**-7)], [1.0 / 3.0, 1.0 / 3.0]),
    "tiny": ([2.0**-120, 2.0**-126], [2.0**-10, 2.0**-3]),
    "infinite": ([1.0, float("inf"), 2.0], [1.0, 1.0, 1.0]),
    "nan": ([1.0, float("nan"), 2.0], [1.0, 1.0, 1.0]),
}


def test_arithmetic(matrix) -> None:
    def case(policy: str, seed: int, name: str) -> ptxsim.Report:
        values, weights = PROBLEMS[name]
        problem = in_order(row_of(*values).bfloat16(), torch.tensor(weights))
        return run(Config(len(values)), problem, policy, seed)

    matrix(case, policies=("eager",), name=PROBLEMS)


def test_finalize_runs_what_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(7, 8, 1032, False, True)
    assert problem.shared is not None
    # In place: the sum replaces the shared expert's output.
    out = problem.shared.clone()
    compiled = finalize_sm90.compiled
    monkeypatch.setattr(finalize_sm90, "compiled", lambda c: functools.partial(ptxsim.run, compiled(c)))
    finalize_sm90.finalize(*problem[:3], out, out)
    assert_same_bits(out, problem.expected)


def test_no_tokens_launches_nothing() -> None:
    out = torch.empty(0, 64, dtype=torch.bfloat16)
    # Without a GPU a launch would fail.
    rows, weights = torch.empty(0, dtype=torch.int32), torch.empty(0, 6)
    finalize_sm90.finalize(torch.empty(0, 64, dtype=torch.bfloat16), rows, weights, None, out)


def test_launch() -> None:
    problem = make_problem(7, 8, 1032, False, True)
    out = torch.empty(7, 1032, dtype=torch.bfloat16)
    config = choose_config(8, False, True)
    assert isinstance(config, Config)
    (launch,) = capture(finalize_sm90.compiled(config), *problem[:4], out)
    assert (launch.grid, launch.block, launch.cluster) == ((7, 2, 1), (128, 1, 1), (1, 1, 1))


@pytest.mark.parametrize("y_fp32", [False, True])
def test_machine_code_rounds_each_product(tmp_path: Path, y_fp32: bool) -> None:
    function: Any = finalize_sm90.compiled(choose_config(6, y_fp32, True), line_info=False)
    text = function.artifacts.PTX
    assert ".target sm_90a" in text
    assert len(re.findall(r"ld\.global\.v4\.b32", text)) == (12 if y_fp32 else 6) + 1
    # 6 choices x 8 columns, and as many sums with the shared expert's.
    assert float_instructions(function, tmp_path) == {"FMUL": 48, "FADD": 56}
    found = facts(find_cubin((tmp_path / "kernel.o").read_bytes()), str(function.ir_module))
    assert (found.stack, found.local) == (0, 0)


# ---- contracts ------------------------------------------------------------------------------------------------------


def test_a_wrong_type_is_refused_before_the_launch() -> None:
    with pytest.raises(TypeError, match=r"mY is torch.float64"):
        finalize_sm90.finalize(**{**arguments(), "mY": torch.zeros(640, 64).double()})


def test_a_wrong_shape_is_refused_before_the_launch() -> None:
    with pytest.raises(ValueError, match=r"choice_row has shape .* expected"):
        finalize_sm90.finalize(**{**arguments(), "choice_row": torch.zeros(41, dtype=torch.int32)})


def test_the_contract_is_that_of_blackwell() -> None:
    # Every other part of it is tested there.
    assert finalize_sm90.check is finalize_sm100.check


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(6, arch="sm_100a"), r"arch is 'sm_100a', expected one of \['sm_90a'\]"),
        (finalize_sm100.Config(6, arch="sm_90a"), r"arch is 'sm_90a', expected one of \['sm_100a'\]"),
        (Config(17), r"top_k is 17, expected 1 \.\. 16"),
    ],
)
def test_impossible_configs_are_refused(config: finalize_sm100.Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_90'"):
        choose_config(6, False, False, arch="sm_90")
