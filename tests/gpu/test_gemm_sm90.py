"""The grouped GEMM on Hopper, alone: every configuration that can be chosen, every epilogue, what it may write and what not.

Most operands are chosen so that sums are exact in FP32 whatever their order: D is then compared bit for bit.
"""

import functools
from typing import NamedTuple

import gpu_kit
import pytest
import torch
from gpu_kit import SUMS, Arena, assert_rounded, assert_same

from cutedsl import deployment
from cutedsl.kernels import grouped_gemm_sm90
from cutedsl.kernels.grouped_gemm_sm90 import BF16, EPILOGUES, SWIGLU, SWIGLU_NVFP4, Config
from cutedsl.layout import max_padded_rows
from cutedsl.prepare_sm90 import Operand, prepare_experts
from cutedsl.quantize import unscaled_activation
from cutedsl.reference.linear import unscaled_mm
from cutedsl.reference.swiglu import swiglu

LIMIT = 1.5


@functools.cache
def configs() -> tuple[Config, ...]:
    """The closed set: what choose_config gives for the published models at TP 1 to 8."""
    found = []
    for model in deployment.MODELS.values():
        asked = deployment.deployment(model, (1, 2, 4, 8), "sm_90a")
        found += [
            variant.config for variant in deployment.variants(asked) if variant.kernel.__name__ == "GroupedGemmSm90"
        ]
    assert found, "no configuration of the grouped GEMM is in the closed set"
    return tuple(dict.fromkeys(found))


def name(config: Config) -> str:
    return "-".join(str(value) for value in vars(config).values())


class Problem(NamedTuple):
    """The kernel's inputs; which expert a row belongs to, -1 for none; and alpha * X W^T in FP32."""

    x: torch.Tensor
    operand: Operand
    count: torch.Tensor | None
    padded_offset: torch.Tensor | None
    h_scale: torch.Tensor
    expert: torch.Tensor
    y: torch.Tensor


def make_problem(counts: tuple[int, ...], n: int, k: int, epilogue: str) -> Problem:
    """X is small integers over 4, block scales are powers of 2: a sum of up to 2^13 products is exact."""
    random, where = gpu_kit.generator(sum(counts) + n + k), {"device": gpu_kit.device()}
    experts, count = len(counts), torch.tensor(counts, dtype=torch.int32, **where)
    rows = max_padded_rows(sum(counts) + 3, experts)
    padded_offset = torch.zeros(experts + 1, dtype=torch.int32, **where)
    padded_offset[1:] = ((count + 127) // 128 * 128).cumsum(0)
    expert = torch.full((rows,), -1, **where)
    for e, start in enumerate(padded_offset[:-1].tolist()):
        expert[start : start + counts[e]] = e
    x = torch.randint(-8, 9, (rows, k), generator=random, **where).bfloat16() / 4
    # What no token wrote must not reach any.
    x[expert < 0] = float("nan")
    weight = torch.randint(0, 256, (experts, n, k // 2), generator=random, dtype=torch.uint8, **where)
    exponent = torch.randint(-1, 2, (experts, n, k // 16), generator=random, **where)
    scale = torch.exp2(exponent.float()).to(torch.float8_e4m3fn)
    y = torch.zeros(rows, n, **where)
    for e in range(experts):
        y[expert == e] = unscaled_mm(x[expert == e], weight[e], scale[e])
    blocks = 2 if epilogue != BF16 or n % 16 == 0 else 1
    alpha = gpu_kit.uniform(n, experts, blocks) / k**0.5
    y *= alpha.repeat_interleave(n // blocks, 1)[expert.clamp(min=0)]
    operand = prepare_experts(weight, scale, alpha, gate_up=epilogue != BF16)
    return Problem(x, operand, count, padded_offset, gpu_kit.uniform(k, experts) * 0.002, expert, y)


def make_linear(tokens: int, n: int, k: int, epilogue: str) -> Problem:
    """One group that has all rows, and no count."""
    problem = make_problem((tokens,), n, k, epilogue)
    x, expert, y = (tensor[:tokens].clone() for tensor in (problem.x, problem.expert, problem.y))
    return problem._replace(x=x, expert=expert, y=y, count=None, padded_offset=None)


def run(problem: Problem, epilogue: str, limit: float | None, d: torch.Tensor, **more: int) -> None:
    """One launch; where CTAs leave sums lies between canaries, and is behind it as it was before."""
    p, arena = problem, Arena()
    sums = arena.tensor(SUMS, torch.int32, grouped_gemm_sm90.sums_elements(p.x.device))
    arguments = (p.x, *p.operand, p.count, p.padded_offset, d, p.h_scale if epilogue == SWIGLU_NVFP4 else None, limit)
    tokens = len(p.x) if p.count is None else int(p.count.max())
    given = {"tokens": tokens, "n": p.y.shape[1], "sums": sums} | more
    grouped_gemm_sm90.grouped_gemm(*arguments, epilogue=epilogue, **given)
    arena.check()


def assert_right(d: torch.Tensor, problem: Problem, epilogue: str, limit: float | None) -> None:
    """Rows of tokens are right, and others are as they were."""
    real = problem.expert >= 0
    y = problem.y[real]
    if epilogue == BF16:
        assert_same("D", d[real], y.bfloat16())
    elif epilogue == SWIGLU:
        assert_rounded(d[real], swiglu(y, limit), 16)
    else:
        for e, h_scale in enumerate(problem.h_scale):
            mine = problem.expert == e
            expected = unscaled_activation(swiglu(problem.y[mine], limit), h_scale)
            different = (d[mine] != expected).double().mean() if mine.any() else 0.0
            # SiLU in another order of FP32 operations: a value may fall on the other side of a bound.
            assert different <= 0.01, f"{different:.2%} of expert {e}'s values are not the reference's"
            assert (d[mine].double() - expected.double()).norm() <= 0.02 * expected.double().norm()
    assert (d[~real].view(torch.uint8) == gpu_kit.STALE_FLOAT).all(), "a row of no token was written"


# At, below and above columns of MMAs.
WIDTHS = (tuple(range(31, 162, 16)) + tuple(range(32, 162, 16)) + tuple(range(33, 162, 16)), 544, 1552)
# Tokens of each expert, n, k: empty experts first, last and between; counts at, below and above tiles; n and k below, at and
# across blocks of 64 and 128.
SHAPES = [
    ((3,), 136, 256),
    ((0, 1, 3), 384, 288),
    ((7, 8, 9, 0), 136, 96),
    ((63, 0, 65, 64), 8, 320),
    ((0, 0, 9, 1, 0, 17, 3, 0), 264, 544),
    ((130, 0, 257, 1), 520, 1040),
    ((1, 700), 2048, 2064),
    WIDTHS,
]
SWIGLU_SHAPES = [
    ((3, 0, 9), 160, 256),
    ((0, 65, 1), 32, 320),
    ((7, 8, 0, 1), 384, 96),
    ((300, 129), 1056, 1040),
    WIDTHS,
]
# Of linears: fewer steps of K than CTAs that share them, and more; and so many tiles that not all clusters have room at once.
LINEAR_SHAPES = [((1,), 160, 96), ((8,), 384, 288), ((65,), 1056, 2064), ((129,), 2048, 7168), ((700,), 4096, 1040)]


@pytest.mark.parametrize("config", configs(), ids=name)
def test_every_configuration(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(grouped_gemm_sm90, "choose_config", lambda *_, **__: config)
    epilogue = config.epilogue
    shapes = LINEAR_SHAPES if config.one_group else SHAPES if epilogue == BF16 else SWIGLU_SHAPES
    for i, (counts, n, k) in enumerate(shapes):
        limit = LIMIT if i % 2 and epilogue != BF16 else None
        arena = Arena()
        problem = make_linear(*counts, n, k, epilogue) if config.one_group else make_problem(counts, n, k, epilogue)
        d = arena.tensor("D", torch.bfloat16, len(problem.x), n if epilogue == BF16 else n // 2)
        run(problem, epilogue, limit, d)
        arena.check()
        assert_right(d, problem, epilogue, limit)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 33, 64, 129, 820])
def test_what_is_chosen_by_tokens(epilogue: str, tokens: int) -> None:
    # More tokens than the host thought, and fewer.
    for counts in ((tokens, 0, 2 * tokens), (1, tokens // 2, 0)):
        problem, arena = make_problem(counts, 288, 416, epilogue), Arena()
        d = arena.tensor("D", torch.bfloat16, len(problem.x), 288 if epilogue == BF16 else 144)
        run(problem, epilogue, None, d, tokens=tokens)
        arena.check()
        assert_right(d, problem, epilogue, None)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("tokens", [1, 8, 33, 64, 128, 513])
@pytest.mark.parametrize(("n", "k"), [(1536, 4096), (4096, 2048), (7168, 3072)])
def test_what_is_chosen_for_linears(epilogue: str, tokens: int, n: int, k: int) -> None:
    problem, arena = make_linear(tokens, n, k, epilogue), Arena()
    d = arena.tensor("D", torch.bfloat16, tokens, n if epilogue == BF16 else n // 2)
    run(problem, epilogue, None, d)
    arena.check()
    assert_right(d, problem, epilogue, None)


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_groups_of_columns(tokens: int) -> None:
    # As wo_a: all tokens in every group, and group g's result is columns g * n of the tokens' rows.
    groups, n, padded = 3, 72, -(-tokens // 128) * 128
    problem, arena = make_problem((tokens,) * groups, n, 256, BF16), Arena()
    d = arena.tensor("D", torch.bfloat16, tokens, groups * n)
    run(problem, BF16, None, d, d_group_rows=padded, d_group_columns=n)
    arena.check()
    expected = [problem.y[g * padded : g * padded + tokens] for g in range(groups)]
    assert_same("D", d, torch.cat(expected, dim=1).bfloat16())


def test_columns_of_a_wider_matrix() -> None:
    problem, arena = make_problem((129,), 136, 256, BF16), Arena()
    wide = arena.tensor("D", torch.bfloat16, len(problem.x), 400)
    run(problem, BF16, None, wide[:, 96:232])
    arena.check()
    assert_right(wide[:, 96:232].contiguous(), problem, BF16, None)
    others = torch.cat((wide[:, :96], wide[:, 232:]), dim=1)
    assert (others.view(torch.uint8) == gpu_kit.STALE_FLOAT).all(), "columns beside D were written"


@pytest.mark.parametrize("max_active_clusters", [1, 3, 7])
@pytest.mark.parametrize("tokens", [8, 200])
def test_few_ctas_walk_all_tiles(tokens: int, max_active_clusters: int) -> None:
    # A guess of 8 tokens means even shares: they cut tiles at any step of K.
    problem, arena = make_problem((63, 0, 200, 64), 520, 320, BF16), Arena()
    d = arena.tensor("D", torch.bfloat16, len(problem.x), 520)
    run(problem, BF16, None, d, tokens=tokens, max_active_clusters=max_active_clusters)
    arena.check()
    assert_right(d, problem, BF16, None)


def test_launches_in_a_row_share_sums() -> None:
    # 8 tiles of 56 steps in even shares: nearly all CTAs leave sums, in the same places each time.
    problem, arena = make_problem((1,), 2048, 7168, BF16), Arena()
    sums = arena.tensor(SUMS, torch.int32, grouped_gemm_sm90.sums_elements(problem.x.device))
    rows = problem.expert >= 0
    ds = [arena.tensor("D", torch.bfloat16, len(problem.x), 2048) for _ in range(50)]
    arguments = problem.x, *problem.operand, problem.count, problem.padded_offset
    for d in ds:
        grouped_gemm_sm90.grouped_gemm(*arguments, d, epilogue=BF16, tokens=1, sums=sums)
    arena.check()
    for d in ds:
        assert_same("D", d[rows], problem.y[rows].bfloat16())


def test_no_tokens_at_all() -> None:
    problem, arena = make_problem((0, 0, 0), 136, 96, BF16), Arena()
    d = arena.tensor("D", torch.bfloat16, len(problem.x), 136)
    run(problem, BF16, None, d, tokens=1)
    arena.check()
    assert (d.view(torch.uint8) == gpu_kit.STALE_FLOAT).all(), "a row of no token was written"
