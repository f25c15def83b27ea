"""The routed experts' last step on Blackwell: simulated, every bit equal to the reference's; every contract."""

import functools
import os
import re
from typing import NamedTuple

import pytest
import torch
from test_route_sm100 import expected_route

import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import finalize_sm100
from cutedsl.kernels.finalize_sm100 import Config, choose_config
from cutedsl.layout import max_padded_rows
from cutedsl.routing import reduce_slots, sort_by_expert
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

NUM_EXPERTS = 5
CANARY = -12345.0


class Problem(NamedTuple):
    """The kernel's arguments, and what it must give."""

    y: torch.Tensor
    choice_row: torch.Tensor
    topk_weights: torch.Tensor
    shared: torch.Tensor | None
    expected: torch.Tensor


@functools.lru_cache(maxsize=64)
def make_problem(num_tokens: int, top_k: int, num_columns: int, y_fp32: bool, shared: bool) -> Problem:
    """Values of very different sizes; NaN in rows of no choice.

    The shared expert takes away what the routed ones give, to BF16: what is left shows the last bits of the FP32 sum, and
    so another order or another rounding of a product.
    """
    generator = torch.Generator().manual_seed(num_tokens * 1009 + top_k * 31 + num_columns)
    ids = torch.randint(-1, NUM_EXPERTS, (num_tokens, top_k), generator=generator)
    ids[num_tokens // 2] = -1
    route = expected_route(ids, NUM_EXPERTS)
    used = route.slot_row[route.slot_row >= 0].long()
    y = torch.full((max_padded_rows(num_tokens * top_k, NUM_EXPERTS), num_columns), float("nan"))
    exponent = torch.randint(-12, 13, (len(used), num_columns), generator=generator)
    y[used] = torch.randn(len(used), num_columns, generator=generator) * torch.exp2(exponent)
    weights = torch.randn(num_tokens, top_k, generator=generator)
    y = y if y_fp32 else y.bfloat16()
    added = -reference(y, ids, weights, None) if shared else None
    return Problem(y, route.choice_row, weights, added, reference(y, ids, weights, added))


def reference(y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
    """The reference's sum over slots, then the shared expert, then one rounding."""
    rows = expected_route(ids, NUM_EXPERTS).slot_row.long()
    y_of_slot = torch.where((rows >= 0)[:, None], y[rows.clamp(min=0)].float(), float("nan"))
    out = reduce_slots(y_of_slot, sort_by_expert(ids, NUM_EXPERTS), weights)
    return (out if shared is None else out + shared.float()).bfloat16()


def run(config: Config, problem: Problem, policy: str, seed: int) -> ptxsim.Report:
    num_tokens, num_columns = problem.expected.shape
    guarded = torch.full((num_tokens + 2, num_columns), CANARY, dtype=torch.bfloat16)
    out = guarded[1:-1]
    out.fill_(float("nan"))
    arguments = (*problem[:4], out)
    finalize_sm100.check(*arguments)
    report = ptxsim.run(finalize_sm100.compiled(config), *arguments, outputs=(out,), policy=policy, seed=seed)
    assert_same_bits(out, problem.expected)
    assert (guarded[0] == CANARY).all(), "the row before out was written"
    assert (guarded[-1] == CANARY).all(), "the row behind out was written"
    return report


def assert_same_bits(out: torch.Tensor, expected: torch.Tensor) -> None:
    # A NaN's bits are not specified.
    same = (out.view(torch.int16) == expected.view(torch.int16)) | (out.isnan() & expected.isnan())
    assert same.all(), f"{int((~same).sum())} of {out.numel()} elements differ, first {(~same).nonzero()[0].tolist()}"


def simulate(config: Config, num_tokens: int, num_columns: int, policy: str, seed: int) -> ptxsim.Report:
    return run(
        config,
        make_problem(num_tokens, config.top_k, num_columns, config.y_fp32, config.shared),
        policy,
        seed,
    )


# T, top_k, columns; a CTA has 1024 columns: one vector, less than a CTA, whole CTAs, a ragged one.
SHAPES = [(1, 6, 7168), (7, 8, 1032), (64, 1, 8), (7, 16, 264), (129, 6, 64), (1, 1, 2048)]


@pytest.mark.parametrize(("y_fp32", "shared"), [(False, True), (False, False), (True, True)])
def test_shapes(matrix, y_fp32: bool, shared: bool) -> None:
    def case(policy: str, seed: int, shape: tuple[int, int, int]) -> ptxsim.Report:
        num_tokens, top_k, num_columns = shape
        return simulate(choose_config(top_k, y_fp32, shared), num_tokens, num_columns, policy, seed)

    # Warps never meet here, so policies differ only in the order in which they run.
    matrix(case, policies=("eager", "random"), shape=SHAPES)


def test_policies(matrix) -> None:
    def case(policy: str, seed: int, num_threads: int) -> ptxsim.Report:
        return simulate(Config(6, num_threads=num_threads, shared=True), 7, 520, policy, seed)

    matrix(case, seeds=(0, 1, 2), num_threads=(32, 128))


def test_many_tokens(matrix) -> None:
    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(choose_config(6, False, True), 820, 8, policy, seed)

    matrix(case, policies=("random",))


@pytest.mark.full
def test_all_shapes(matrix) -> None:
    def case(policy: str, seed: int, num_tokens: int, top_k: int, y_fp32: bool, shared: bool) -> ptxsim.Report:
        return simulate(choose_config(top_k, y_fp32, shared), num_tokens, 1096, policy, seed)

    axes = {"num_tokens": (1, 7, 64, 129), "top_k": (1, 6, 8, 16), "y_fp32": (False, True), "shared": (False, True)}
    matrix(case, policies=("random",), **axes)


@pytest.mark.full
def test_large_prefill(matrix) -> None:
    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(choose_config(6, False, True), 16384, 8, policy, seed)

    matrix(case, policies=("eager",))


def in_order(y: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor | None = None) -> Problem:
    """One token, choice j is row j."""
    rows = torch.arange(len(y), dtype=torch.int32)
    ids = torch.zeros(1, len(y), dtype=torch.int64)
    weights = weights.view(1, -1)
    return Problem(y, rows, weights, shared, reference(y_padded(y), ids, weights, shared))


def y_padded(y: torch.Tensor) -> torch.Tensor:
    """The rows of expert 0 in as many as the reference asks for."""
    return torch.nn.functional.pad(y.float(), (0, 0, 0, 128 - len(y)))


def row_of(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1).repeat(1, 8)


def test_sums_in_the_order_of_choices(matrix) -> None:
    # 2**24 + 1 - 2**24 is 0 from the left, 1 in another order.
    problem = in_order(row_of(2.0**24, 1.0, -(2.0**24)).bfloat16(), torch.ones(3))
    assert (problem.expected == 0).all()
    matrix(lambda policy, seed: run(Config(3), problem, policy, seed), policies=("eager",))


def test_the_shared_expert_comes_last(matrix) -> None:
    problem = in_order(row_of(1.0, -(2.0**24)).bfloat16(), torch.ones(2), row_of(2.0**24).bfloat16())
    assert (problem.expected == 1).all()
    matrix(lambda policy, seed: run(Config(2, shared=True), problem, policy, seed), policies=("eager",))


def test_products_are_rounded(matrix) -> None:
    # Exactly 0; fused with the sum, the second product would leave the first one's rounding error.
    factor = 1.0 + 2.0**-7
    problem = in_order(row_of(factor, -factor).bfloat16(), torch.full((2,), 1.0 / 3.0))
    assert (problem.expected == 0).all()
    matrix(lambda policy, seed: run(Config(2), problem, policy, seed), policies=("eager",))


def test_tiny_products_are_not_flushed(matrix) -> None:
    problem = in_order(row_of(2.0**-120, 2.0**-126).bfloat16(), torch.tensor([2.0**-10, 2.0**-3]))
    assert (problem.expected == 2.0**-130 + 2.0**-129).all()
    matrix(lambda policy, seed: run(Config(2), problem, policy, seed), policies=("eager",))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_passes_through(matrix, bad: float) -> None:
    problem = in_order(row_of(1.0, bad, 2.0).bfloat16(), torch.ones(3))
    assert not problem.expected.isfinite().any()
    matrix(lambda policy, seed: run(Config(3), problem, policy, seed), policies=("eager",))


@pytest.mark.parametrize("shared", [False, True])
def test_no_expert_here(matrix, shared: bool) -> None:
    # Row 0 is nobody's and NaN; -0.0 from the shared expert becomes 0.0, as 0.0 + -0.0 is.
    y = torch.full((128, 8), float("nan"), dtype=torch.bfloat16)
    added = torch.full((1, 8), -0.0, dtype=torch.bfloat16) if shared else None
    rows = torch.full((6,), -1, dtype=torch.int32)
    problem = Problem(y, rows, torch.ones(1, 6), added, torch.zeros(1, 8, dtype=torch.bfloat16))
    matrix(lambda policy, seed: run(Config(6, shared=shared), problem, policy, seed), policies=("eager",))


def test_a_token_does_not_depend_on_its_batch(matrix) -> None:
    whole = make_problem(129, 6, 64, False, True)
    rows, weights = whole.choice_row.view(129, 6), whole.topk_weights

    def case(policy: str, seed: int, token: int) -> ptxsim.Report:
        part = slice(token, token + 1)
        alone = Problem(
            whole.y, rows[part].flatten(), weights[part].clone(), whole.shared[part].clone(), whole.expected[part]
        )
        return run(choose_config(6, False, True), alone, policy, seed)

    matrix(case, policies=("eager",), token=(0, 64, 128))


def test_finalize_runs_what_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(7, 8, 1032, False, True)
    # In place: the sum replaces the shared expert's output.
    out = problem.shared.clone()
    compiled = finalize_sm100.compiled
    monkeypatch.setattr(finalize_sm100, "compiled", lambda c: functools.partial(ptxsim.run, compiled(c)))
    finalize_sm100.finalize(*problem[:3], out, out)
    assert_same_bits(out, problem.expected)


def test_no_tokens_launches_nothing() -> None:
    out = torch.empty(0, 64, dtype=torch.bfloat16)
    # Without a GPU a launch would fail.
    rows, weights = torch.empty(0, dtype=torch.int32), torch.empty(0, 6)
    finalize_sm100.finalize(torch.empty(0, 64, dtype=torch.bfloat16), rows, weights, None, out)


def test_launch() -> None:
    problem = make_problem(7, 8, 1032, False, True)
    out = torch.empty(7, 1032, dtype=torch.bfloat16)
    (launch,) = capture(finalize_sm100.compiled(choose_config(8, False, True)), *problem[:4], out)
    assert (launch.grid, launch.block, launch.cluster) == ((7, 2, 1), (128, 1, 1), (1, 1, 1))


def test_sizes_do_not_compile_again() -> None:
    first = finalize_sm100.compiled(choose_config(6, False, True))
    num_kernels = len(compiler.cached_keys())
    assert finalize_sm100.compiled(choose_config(6, False, True)) is first
    assert len(compiler.cached_keys()) == num_kernels


@pytest.mark.parametrize("y_fp32", [False, True])
def test_ptx_can_not_be_fused(y_fp32: bool) -> None:
    text = finalize_sm100.compiled(choose_config(6, y_fp32, True)).artifacts.PTX
    assert ".target sm_100a" in text
    found = set(re.findall(r"\b(?:mul|add|sub|fma|mad)\.[a-z0-9.]*f32\w*", text))
    # The simulator computes PTX as it is written; what follows is what the assembler is known to keep apart.
    assert found == {"mul.rn.f32", "add.rn.f32x2"}
    if os.environ.get("CUTE_DSL_LINEINFO") == "1":
        assert "finalize_sm100.py" in text


def test_rows_move_in_16_bytes_at_64_bit_offsets() -> None:
    text = finalize_sm100.compiled(choose_config(6, False, True)).artifacts.PTX
    assert len(re.findall(r"ld\.global\.v4\.b32", text)) == 6 + 1
    assert len(re.findall(r"st\.global\.v4\.b32", text)) == 1
    # P * H may exceed 2**31: rows are multiplied by the stride in 64 bits.
    assert len(re.findall(r"mul\.lo\.s64|mad\.lo\.s64", text)) >= 6


# ---- contracts ------------------------------------------------------------------------------------------------------


def arguments() -> dict[str, torch.Tensor]:
    matrix = functools.partial(torch.zeros, dtype=torch.bfloat16)
    return {
        "mY": matrix(640, 64),
        "choice_row": torch.zeros(42, dtype=torch.int32),
        "topk_weights": torch.zeros(7, 6),
        "shared": matrix(7, 64),
        "mOut": matrix(7, 64),
    }


NAMES = tuple(arguments())


def test_the_contract_accepts_what_is_right() -> None:
    finalize_sm100.check(**arguments())
    finalize_sm100.check(**{**arguments(), "shared": None, "mY": torch.zeros(640, 64)})


@pytest.mark.parametrize("name", NAMES)
def test_wrong_type(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].double()
    with pytest.raises(TypeError, match=f"{name} is torch.float64"):
        finalize_sm100.finalize(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shape(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].repeat(*([1] * (tensors[name].ndim - 1)), 2)
    # Twice the columns or choices: the tensor compared with it is the one that does not fit.
    named = {"topk_weights": "choice_row", "mOut": "mY"}.get(name, name)
    with pytest.raises(ValueError, match=f"{named} has shape .* expected"):
        finalize_sm100.finalize(**tensors)


@pytest.mark.parametrize("name", ["topk_weights", "shared"])
def test_wrong_number_of_tokens(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name][:6]
    with pytest.raises(ValueError, match=f"{name} has shape .* expected"):
        finalize_sm100.finalize(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_device(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=r"is on (meta|cpu), expected (cpu|meta)"):
        finalize_sm100.finalize(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_not_contiguous(name: str) -> None:
    tensors = arguments()
    doubled = tensors[name].repeat_interleave(2, 0)
    tensors[name] = doubled[::2]
    with pytest.raises(ValueError, match=f"{name} has strides"):
        finalize_sm100.finalize(**tensors)


@pytest.mark.parametrize("name", ["mY", "shared", "mOut"])
def test_misaligned(name: str) -> None:
    tensors = arguments()
    flat = torch.zeros(tensors[name].numel() + 16, dtype=torch.bfloat16)
    tensors[name] = flat[1 : 1 + tensors[name].numel()].view(tensors[name].shape)
    with pytest.raises(ValueError, match=f"{name} starts at 0x"):
        finalize_sm100.finalize(**tensors)


@pytest.mark.parametrize("num_columns", [0, 4, 68])
def test_columns_that_are_no_vectors(num_columns: int) -> None:
    tensors = arguments()
    for name in ("mY", "shared", "mOut"):
        tensors[name] = torch.zeros(len(tensors[name]), num_columns, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"H is {num_columns}, expected a positive multiple of 8"):
        finalize_sm100.finalize(**tensors)


@pytest.mark.parametrize("top_k", [0, 17])
def test_top_k_out_of_range(top_k: int) -> None:
    tensors = arguments()
    tensors["topk_weights"] = torch.zeros(7, top_k)
    with pytest.raises(ValueError, match=rf"top_k is {top_k}, expected 1 \.\. 16"):
        finalize_sm100.finalize(**tensors)


def test_too_many_tokens() -> None:
    tensors = arguments()
    tensors["mOut"] = torch.empty(2**31, 8, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="2147483648 tokens, expected at most 2147483647"):
        finalize_sm100.finalize(**tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(6, arch="sm_90a"), "arch is 'sm_90a'"),
        (Config(0), r"top_k is 0, expected 1 \.\. 16"),
        (Config(17), r"top_k is 17, expected 1 \.\. 16"),
        (Config(6, num_threads=48), "num_threads is 48"),
        (Config(6, num_threads=0), "num_threads is 0"),
        (Config(6, num_threads=2048), "num_threads is 2048"),
    ],
)
def test_impossible_configs_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_100'"):
        choose_config(6, False, False, arch="sm_100")
