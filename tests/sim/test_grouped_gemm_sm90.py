"""The grouped GEMM on Hopper: every epilogue simulated against the reference, even shares, clusters, contracts, its configs.

Most operands are chosen so that sums are exact in FP32 whatever their order: results are then compared bit for bit.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from covering import run_pairs
from hopper_kit import on_hopper
from test_grouped_gemm_swap_sm100 import CANARY, LIMIT, MARGIN, assert_bf16, hardware_h, poisoned

import ptxsim
from cutedsl import compile as compiler
from cutedsl import deployment
from cutedsl.kernels import grouped_gemm_sm90 as gemm
from cutedsl.kernels.grouped_gemm_sm90 import BF16, EPILOGUES, SWIGLU, SWIGLU_NVFP4, Config, Shape
from cutedsl.layout import max_padded_rows
from cutedsl.prepare_sm90 import Operand, prepare_experts
from cutedsl.quantize import quantize_weight, unscaled_activation
from cutedsl.reference.linear import unscaled_mm
from cutedsl.reference.swiglu import swiglu
from ptxsim import findings
from ptxsim.testing import POLICIES

__all__ = ["on_hopper"]

# SMs of the simulated GPU: room for as many shares.
NUM_SMS = 11
STALE = 0x7F7F7F7F


class Problem(NamedTuple):
    """The kernel's inputs, which expert a row belongs to (-1: none), and alpha * X W^T before any rounding of D."""

    x: torch.Tensor
    operand: Operand
    count: torch.Tensor
    padded_offset: torch.Tensor
    h_scale: torch.Tensor
    expert: torch.Tensor
    y: torch.Tensor


@functools.lru_cache(maxsize=128)
def make_problem(counts: tuple[int, ...], n: int, k: int, epilogue: str, exact: bool = True) -> Problem:
    """Exact: X is small integers over 4 and block scales are powers of 2, or 0, so that every sum is exact."""
    generator = torch.Generator().manual_seed(hash((counts, n, k)) % 2**31)
    experts, count = len(counts), torch.tensor(counts, dtype=torch.int32)
    # Some choices are of other ranks' experts, so there may be rows behind the last group's.
    rows = max_padded_rows(sum(counts) + 3, experts)
    padded_offset = torch.zeros(experts + 1, dtype=torch.int32)
    padded_offset[1:] = ((count + 127) // 128 * 128).cumsum(0)
    expert = torch.full((rows,), -1)
    for e, start in enumerate(padded_offset[:-1].tolist()):
        expert[start : start + counts[e]] = e
    if exact:
        x = torch.randint(-8, 9, (rows, k), generator=generator).bfloat16() / 4
        w = torch.randint(0, 256, (experts, n, k // 2), generator=generator, dtype=torch.uint8)
        sfw = torch.exp2(torch.randint(-1, 2, (experts, n, k // 16), generator=generator).float())
        sfw[torch.rand(sfw.shape, generator=generator) < 0.05] = 0.0
        sfw = sfw.to(torch.float8_e4m3fn)
    else:
        x = (torch.randn(rows, k, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.2)).bfloat16()
        size = torch.rand(experts, n, k // 16, generator=generator).add(0.1).repeat_interleave(16, 2)
        w, sfw, _ = quantize_weight(torch.randn(experts, n, k, generator=generator) * size)
    # Sums that are +0 everywhere: a token in each group that has two.
    for e, start in enumerate(padded_offset[:-1].tolist()):
        x[start + 1 : start + min(counts[e], 2)] = 0
    # What no token wrote must not reach any.
    x[expert < 0] = float("nan")
    y = torch.zeros(rows, n)
    for e in range(experts):
        y[expert == e] = unscaled_mm(x[expert == e], w[e], sfw[e])
    blocks = 2 if epilogue != BF16 or n % 16 == 0 else 1
    alpha = torch.rand(experts, blocks, generator=generator).add(0.5) / (y[expert >= 0].std() if sum(counts) else 1.0)
    y *= alpha.repeat_interleave(n // blocks, 1)[expert.clamp(min=0)]
    h_scale = torch.rand(experts, generator=generator).add(0.5) * 0.002
    operand = prepare_experts(w, sfw, alpha, gate_up=epilogue != BF16)
    return Problem(x, operand, count, padded_offset, h_scale, expert, y)


def as_one_group(problem: Problem) -> Problem:
    """The rows of the tokens alone."""
    [tokens] = problem.count.tolist()
    rows = slice(0, tokens)
    return problem._replace(x=problem.x[rows].clone(), expert=problem.expert[rows], y=problem.y[rows])


class Result(NamedTuple):
    """What the kernel wrote, and all of it with its margins, as bytes."""

    d: torch.Tensor
    d_bytes: torch.Tensor
    report: ptxsim.Report


def small(epilogue: str, tile_w: int, tile_n: int, **more: Any) -> Config:
    """A configuration with as few stages as can be in flight at once: barriers wrap within few steps of K."""
    return Config(epilogue, tile_w, tile_n, num_stages=more.pop("num_stages", 3), **more).validate()


def name(config: Config) -> str:
    """For the names of tests."""
    flags = [f"{config.num_consumers} consumers" * (config.num_consumers > 2), f"{config.num_stages} stages"]
    flags += [
        "pair" * (config.cluster_w > 1),
        f"shared by {config.cluster_k}" * (config.cluster_k > 1),
        "even" * config.even,
        "one group" * config.one_group,
    ]
    return " ".join([config.epilogue, f"{config.tile_w}x{config.tile_n}", *filter(None, flags)])


def launch(
    config: Config, problem: Problem, d: torch.Tensor, limit: float | None, policy: str, seed: int, **more: Any
) -> ptxsim.Report:
    """One call of grouped_gemm, simulated; where CTAs leave sums for each other is as it was afterwards."""
    p, reports, compiled = problem, [], gemm.compiled
    # Lazy puts off loads as long as any warp can do something, and one that polls always can: there CTAs run one by one.
    most = 1 if config.even and policy == "lazy" else None
    more = {"resident_clusters": most, "n": p.y.shape[1], "tokens": 1, "constant_rows": len(p.count) == 1} | more
    options = {"policy": policy, "seed": seed, "resident_clusters": more.pop("resident_clusters")}
    # What may be read while earlier kernels still run.
    constants = (p.operand.weight, p.operand.weight_scale, p.count)
    options["constant"] = more.pop("constant", constants if more["constant_rows"] else ())

    def simulated(config: Config) -> Callable[..., None]:
        return lambda *args: reports.append(ptxsim.run(compiled(config), *args, **options))

    with (
        mock.patch.object(gemm.hopper, "num_sms", return_value=NUM_SMS),
        mock.patch.object(gemm, "choose_config", return_value=config),
        mock.patch.object(gemm, "compiled", simulated),
    ):
        sums = more.pop("sums", None)
        if sums is None:
            sums = torch.full((gemm.sums_elements(p.x.device),), STALE, dtype=torch.int32)
            gemm.zeros(sums).zero_()
        groups = (None, None) if config.one_group else (p.count, p.padded_offset)
        gemm.grouped_gemm(
            p.x, *p.operand, *groups, d, p.h_scale if config.epilogue == SWIGLU_NVFP4 else None, limit,
            epilogue=config.epilogue, sums=sums, **more,
        )  # fmt: skip
        assert not gemm.zeros(sums).any(), "sums were left behind"
    [report] = reports
    return report


def run(
    config: Config, problem: Problem, clusters: int, policy: str, seed: int, limit: float | None = None, **more: Any
) -> Result:
    rows, n = problem.y.shape
    d, d_bytes = poisoned(rows, n if config.epilogue == BF16 else n // 2, torch.bfloat16)
    report = launch(config, problem, d, limit, policy, seed, max_active_clusters=clusters, **more)
    return Result(d, d_bytes, report)


def assert_right(config: Config, problem: Problem, result: Result, limit: float | None, exact: bool) -> None:
    outside = torch.cat((torch.full((MARGIN,), -1), problem.expert, torch.full((MARGIN,), -1))) < 0
    assert (result.d_bytes[outside] == CANARY).all(), "a row of no token was written"
    real = problem.expert >= 0
    y, d = problem.y[real], result.d[real]
    if config.epilogue == BF16:
        if exact:
            assert torch.equal(d, y.bfloat16()), "D is not the exact sums, rounded once"
        assert_bf16(d, y)
    elif config.epilogue == SWIGLU:
        if exact:
            assert torch.equal(d, hardware_h(y, limit).bfloat16()), "D is not h of the exact sums, rounded once"
        assert_bf16(d, swiglu(y, limit))
    else:
        assert_quantized(problem, result, limit, exact)


def assert_quantized(problem: Problem, result: Result, limit: float | None, exact: bool) -> None:
    for e, h_scale in enumerate(problem.h_scale):
        mine = problem.expert == e
        if not mine.any():
            continue
        d = result.d[mine]
        if exact:
            expected = unscaled_activation(hardware_h(problem.y[mine], limit), h_scale)
            assert torch.equal(d, expected), f"expert {e}: not the numbers of h of the exact sums"
        expected = unscaled_activation(swiglu(problem.y[mine], limit), h_scale)
        assert (d != expected).double().mean() <= 0.01, f"too many of expert {e}'s values are not the reference's"
        assert (d.double() - expected.double()).norm() <= 0.02 * expected.double().norm(), f"expert {e}'s values"


Shapes = tuple[tuple[int, ...], int, int, int]


def simulate(
    config: Config, shape: Shapes, policy: str, seed: int, limit: float | None = None, exact: bool = True
) -> ptxsim.Report:
    counts, n, k, clusters = shape
    problem = make_problem(counts, n, k, config.epilogue, exact)
    if config.one_group:
        problem = as_one_group(problem)
    result = run(config, problem, clusters, policy, seed, limit)
    assert_right(config, problem, result, limit, exact)
    return result.report


def policy_of(i: int) -> str:
    """Cases take turns."""
    return POLICIES[i % len(POLICIES)]


# Tokens of each expert, n, k, clusters: empty experts first, last and between; counts at, below and above tiles; n below, at
# and across blocks of 64 and tiles, an odd number of tiles too; k below, at and across steps of 128.
SHAPES: list[Shapes] = [
    ((3,), 136, 256, 1),
    ((0, 1, 3), 384, 288, 2),
    ((7, 8, 9, 0), 136, 96, 3),
    ((63, 0, 65, 64), 8, 336, 2),
    ((0, 0, 9, 1, 0, 17, 3, 0), 264, 544, 5),
]
BF16_CONFIGS = [
    small(BF16, 128, 8),
    small(BF16, 128, 80),
    small(BF16, 256, 16, num_stages=2),
    small(BF16, 256, 128),
    small(BF16, 128, 16, cluster_w=2),
    small(BF16, 256, 32, num_consumers=4),
]


@pytest.mark.parametrize("config", BF16_CONFIGS, ids=name)
def test_bf16(matrix, config: Config) -> None:
    first = BF16_CONFIGS.index(config)

    def case(policy: str, seed: int, shape: Shapes) -> ptxsim.Report:
        return simulate(config, shape, policy_of(first + SHAPES.index(shape)), seed)

    matrix(case, policies=("random",), seeds=(first,), shape=SHAPES)


SWIGLU_SHAPES: list[Shapes] = [((3, 0, 9), 160, 256, 2), ((0, 65, 1), 32, 416, 1), ((7, 8, 0, 1), 384, 96, 3)]
SWIGLU_CONFIGS = [
    small(SWIGLU, 128, 32),
    small(SWIGLU, 256, 8),
    small(SWIGLU_NVFP4, 128, 16),
    small(SWIGLU_NVFP4, 256, 80),
    small(SWIGLU_NVFP4, 256, 16, num_consumers=4),
    small(SWIGLU_NVFP4, 256, 144, cluster_w=2),
]


@pytest.mark.parametrize("config", SWIGLU_CONFIGS, ids=name)
def test_swiglu(matrix, config: Config) -> None:
    first = SWIGLU_CONFIGS.index(config)

    def case(policy: str, seed: int, shape: Shapes) -> ptxsim.Report:
        i = SWIGLU_SHAPES.index(shape)
        # A limit in every second case.
        return simulate(config, shape, policy_of(first + i), seed, LIMIT if (first + i) % 2 else None)

    matrix(case, policies=("random",), seeds=(first,), shape=SWIGLU_SHAPES)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_inexact_sums(matrix, epilogue: str) -> None:
    config = next(config for config in BF16_CONFIGS + SWIGLU_CONFIGS if config.epilogue == epilogue)
    limit = None if epilogue == BF16 else LIMIT

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(config, ((9, 1), 160, 1536, 2), policy, seed, limit, exact=False)

    matrix(case, policies=("random",))


# Tokens of a group that has all rows, n, k, clusters: in two tiles, and in one.
ONE_GROUP = [
    (small(BF16, 128, 8, one_group=True), ((9,), 136, 544, 2)),
    (small(SWIGLU, 256, 16, one_group=True), ((3,), 288, 272, 1)),
    (small(SWIGLU_NVFP4, 128, 8, one_group=True, even=True), ((9,), 160, 1152, 5)),
    (small(BF16, 128, 64, one_group=True, even=True), ((65,), 136, 640, 3)),
    (small(BF16, 128, 16, one_group=True, cluster_w=2), ((20,), 264, 272, 1)),
    (small(BF16, 128, 16, one_group=True, cluster_k=2), ((33,), 136, 640, 1)),
    # More than a band of tokens, and a tile of which no number makes one.
    (small(BF16, 128, 96, one_group=True), ((gemm.BAND_TOKENS + 6,), 136, 64, 3)),
]


@pytest.mark.parametrize(("config", "shape"), ONE_GROUP, ids=[name(config) for config, _ in ONE_GROUP])
def test_one_group_of_all_rows(config: Config, shape: Shapes) -> None:
    simulate(config, shape, policy_of(ONE_GROUP.index((config, shape))), 0)


# ---- widths ---------------------------------------------------------------------------------------------------------

# At, below and above each width of 32 .. 80 and each number of tiles of 80.
WIDTH_COUNTS = (1, 31, 32, 33, 47, 48, 49, 0, 63, 64, 65, 79, 80, 81, 96, 97, 160, 161)
# Columns of MMAs of those tokens. An expert's tiles are equal up to 16.
WIDTHS = [32, 32, 32, 48, 48, 48, 64, 64, 64, 80, 80, 80]
WIDTHS += [48, 48, 48, 48, 64, 48, 80, 80, 64, 64, 48]
WIDTH_CONFIGS = [small(BF16, 128, 80), small(SWIGLU, 256, 80, num_consumers=4), small(BF16, 128, 80, cluster_w=2)]


@pytest.mark.parametrize("config", WIDTH_CONFIGS, ids=name)
def test_few_tokens_are_few_columns_and_bytes(config: Config) -> None:
    i = WIDTH_CONFIGS.index(config)
    n, k = 32, 160
    report = simulate(config, (WIDTH_COUNTS, n, k, 2), policy_of(i), i)
    weights = config.tile_w * config.cluster_w * 256
    assert report.counters["mma_flops"] == 2 * weights * sum(WIDTHS)
    # Two steps of K, each with the weights of every CTA, and tokens for all columns in whole units, once for a cluster.
    tokens = sum(-(-width // config.load_tokens) * config.load_tokens for width in WIDTHS)
    loaded = len(WIDTHS) * config.weight_bytes * config.cluster_w + tokens * 256
    assert report.counters["tma_load_global_bytes"] == 2 * loaded


@pytest.mark.parametrize("config", [small(BF16, 256, 160, cluster_w=2, num_stages=2), small(BF16, 256, 128)], ids=name)
def test_small_and_large_lots(config: Config) -> None:
    # Each width of a wide tile; more steps than stages.
    counts = tuple(width - 5 for width in config.widths)
    report = simulate(config, (counts, 264, 416, 3), "random", 0)
    # Two tiles of 256 rows, or one of a pair of CTAs; four steps of K.
    assert report.counters["mma_flops"] == 2 * 512 * 512 * sum(config.widths)


# ---- even shares ----------------------------------------------------------------------------------------------------

# Few steps of K, as MIN_STEPS is 4. Of tiles of 128 by 8: 2 tiles of 5 steps; 7 of 5; 2 of 20, a share inside of a tile; 1 of
# 40, so that one CTA adds more sums than it loads at a time; 4 of 3, each smaller than a share.
EVEN_SHAPES = [((2,), 136, 640), ((3, 0, 9, 4), 200, 544), ((8,), 256, 2560), ((1, 0), 64, 5120), ((9, 0, 2), 136, 384)]
EVEN_CONFIGS = [
    small(BF16, 128, 8, even=True),
    small(SWIGLU_NVFP4, 256, 8, even=True),
    small(BF16, 256, 8, even=True, num_consumers=4),
    # With flags.
    small(BF16, 128, 128, even=True),
    small(SWIGLU, 128, 64, even=True),
]


def even_shape(config: Config, shape: tuple[tuple[int, ...], int, int], clusters: int) -> Shapes:
    counts, n, k = shape
    return counts, n if config.epilogue == BF16 else -(-n // 32) * 32, k, clusters


@pytest.mark.parametrize("clusters", [1, 3, 7, 11])
@pytest.mark.parametrize("config", EVEN_CONFIGS, ids=name)
def test_even_shares(config: Config, clusters: int) -> None:
    # One shape for each pair; all of them nightly.
    i = EVEN_CONFIGS.index(config) + clusters
    simulate(config, even_shape(config, EVEN_SHAPES[i % len(EVEN_SHAPES)], clusters), policy_of(i), 0)


@pytest.mark.full
@pytest.mark.parametrize("config", EVEN_CONFIGS, ids=name)
def test_even_shares_of_all_shapes(matrix, config: Config) -> None:
    first = EVEN_CONFIGS.index(config)

    def case(policy: str, seed: int, shape: tuple[tuple[int, ...], int, int], clusters: int) -> ptxsim.Report:
        i = first + EVEN_SHAPES.index(shape) + clusters
        return simulate(config, even_shape(config, shape, clusters), policy_of(i), seed)

    matrix(case, policies=("random",), shape=EVEN_SHAPES, clusters=(1, 3, 7, 11))


@pytest.mark.parametrize("config", [EVEN_CONFIGS[0], EVEN_CONFIGS[3]], ids=name)
def test_even_shares_where_one_cta_runs_at_a_time(config: Config) -> None:
    # CTAs wait for those before them only, so that each finds what it waits for.
    counts, n, k = (3, 9), 264, 1152
    problem = make_problem(counts, n, k, BF16)
    result = run(config, problem, 7, "lazy", 0, resident_clusters=1)
    assert_right(config, problem, result, None, exact=True)


@pytest.mark.parametrize("config", [EVEN_CONFIGS[0], EVEN_CONFIGS[3]], ids=name)
def test_even_shares_give_the_same_bits_each_time(config: Config) -> None:
    problem = make_problem((5,), 136, 2560, BF16, exact=False)
    runs = [("eager", 0), ("lazy", 0), ("random", 1), ("random", 2)]
    results = [run(config, problem, 7, policy, seed).d[:5] for policy, seed in runs]
    assert all(torch.equal(results[0], result) for result in results)
    assert_bf16(results[0], problem.y[:5])


def test_even_shares_of_launches_that_follow_each_other() -> None:
    # What a launch finds is what another configuration left: anything, but zeros where it looks for zeros.
    problem = make_problem((9,), 136, 1280, BF16)
    with mock.patch.object(gemm.hopper, "num_sms", return_value=NUM_SMS):
        sums = torch.zeros(gemm.sums_elements(problem.x.device), dtype=torch.int32)
    for i, config in enumerate([EVEN_CONFIGS[j] for j in (0, 3, 2, 3, 0)]):
        result = run(config, problem, 5, policy_of(i), i, sums=sums)
        assert_right(config, problem, result, None, exact=True)


# ---- tiles shared in a cluster --------------------------------------------------------------------------------------

# Experts in turn, tiles without all of their tokens too; fewer steps of K than CTAs, and more.
SHARED = [
    (small(BF16, 128, 64, cluster_k=4), ((70, 0, 9), 72, 1152, 1)),
    (small(BF16, 128, 8, cluster_k=4, num_stages=4), ((9, 0), 136, 272, 1)),
    (small(BF16, 128, 80, cluster_k=2), ((3, 81), 72, 272, 2)),
    (small(SWIGLU, 128, 16, cluster_k=8, num_stages=4), ((0, 17), 96, 1168, 1)),
    # Of three CTAs, the last has a chunk of tokens less than the others; of five, the last has none.
    (small(SWIGLU_NVFP4, 256, 32, cluster_k=3), ((33, 1), 160, 416, 1)),
    (small(BF16, 256, 64, cluster_k=5, num_consumers=4, num_stages=5), ((50, 0), 72, 672, 1)),
]


@pytest.mark.parametrize(("config", "shape"), SHARED, ids=[f"{name(config)}" for config, _ in SHARED])
def test_tiles_shared_in_a_cluster(matrix, config: Config, shape: Shapes) -> None:
    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(config, shape, policy, seed, None if config.epilogue == BF16 else LIMIT)

    # Lazy takes long where many stores are under way.
    matrix(case, policies=POLICIES if config.tile_n == 8 else ("random",))


def test_clusters_run_one_at_a_time() -> None:
    config, shape = SHARED[0]
    problem = make_problem(*shape[:3], config.epilogue)
    result = run(config, problem, 1, "random", 0, resident_clusters=1)
    assert_right(config, problem, result, None, exact=True)


def test_shared_tiles_give_the_same_bits_each_time() -> None:
    config = SHARED[0][0]
    problem = make_problem((33,), 72, 1152, BF16, exact=False)
    runs = [("eager", 0), ("random", 1), ("random", 2)]
    results = [run(config, problem, 7, policy, seed).d[:33] for policy, seed in runs]
    assert all(torch.equal(results[0], result) for result in results)
    assert_bf16(results[0], problem.y[:33])


# ---- where rows and columns go --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*(BF16_CONFIGS[i] for i in (0, 3, 4)), EVEN_CONFIGS[0]], ids=name)
@pytest.mark.parametrize("tokens", [1, 20, 40])
def test_groups_of_columns(config: Config, tokens: int) -> None:
    # As wo_a: all tokens in every group, and group g's result is columns g * n of the tokens' rows, in a wider matrix.
    groups, n, padded = 3, 72, 128
    problem = make_problem((tokens,) * groups, n, 544, BF16)
    wide, wide_bytes = poisoned(tokens, groups * n + 24, torch.bfloat16)
    d = wide[:, 8 : 8 + groups * n]
    launch(
        config, problem, d, None, policy_of(tokens), 0,
        d_group_rows=padded, d_group_columns=n, constant_rows=tokens > 1, max_active_clusters=3,
    )  # fmt: skip
    expected = torch.cat([problem.y[g * padded : g * padded + tokens] for g in range(groups)], dim=1)
    assert torch.equal(d, expected.bfloat16())
    wide[:, 8 : 8 + groups * n].view(torch.uint8).fill_(CANARY)
    assert (wide_bytes == CANARY).all(), "something beside D was written"


@pytest.mark.parametrize(
    "config",
    [
        small(BF16, 128, 8, one_group=True),
        small(BF16, 256, 128, one_group=True),
        small(BF16, 128, 64, one_group=True, even=True),
        small(BF16, 128, 16, one_group=True, cluster_k=2),
    ],
    ids=name,
)
def test_one_group_in_a_larger_matrix(config: Config) -> None:
    # Boxes end behind the last token and the last column.
    tokens, n = 73, 136
    problem = as_one_group(make_problem((tokens,), n, 544, BF16))
    larger, larger_bytes = poisoned(tokens + 20, n + 24, torch.bfloat16)
    launch(config, problem, larger[:, 8 : 8 + n], None, "random", 0, max_active_clusters=3)
    assert torch.equal(larger[:tokens, 8 : 8 + n], problem.y.bfloat16())
    larger[:tokens, 8 : 8 + n].view(torch.uint8).fill_(CANARY)
    assert (larger_bytes == CANARY).all(), "something beside the result was written"


def test_columns_of_h_in_a_wider_matrix() -> None:
    config = SWIGLU_CONFIGS[0]
    problem = make_problem((3, 0, 9), 160, 256, SWIGLU)
    rows = len(problem.x)
    wide, wide_bytes = poisoned(rows, 80 + 24, torch.bfloat16)
    launch(config, problem, wide[:, 16:96], None, "lazy", 0, max_active_clusters=2)
    real = problem.expert >= 0
    assert torch.equal(wide[real, 16:96], hardware_h(problem.y[real], None).bfloat16())
    wide[real, 16:96] = poisoned(1, 1, torch.bfloat16)[0]
    assert (wide_bytes == CANARY).all(), "something beside D was written"


def test_one_expert_is_a_linear(matrix) -> None:
    # Rows are not padded, alpha is of each column, and n is what the weights are prepared for.
    problem = make_problem((7,), 128, 96, BF16)
    alpha = torch.rand(1, 128, generator=torch.Generator().manual_seed(0))
    scaled = problem.y[:7] / problem.operand.alpha.repeat_interleave(64, 1) * alpha
    problem = problem._replace(
        x=problem.x[:7].clone(), operand=problem.operand._replace(alpha=alpha), y=scaled, expert=problem.expert[:7]
    )

    def case(policy: str, seed: int, config: Config) -> ptxsim.Report:
        result = run(config, problem, 2, policy, seed, n=None)
        assert_right(config, problem, result, None, exact=False)
        return result.report

    matrix(case, config=[BF16_CONFIGS[0], EVEN_CONFIGS[0]])


# ---- launches that overlap ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [BF16_CONFIGS[0], BF16_CONFIGS[4], SWIGLU_CONFIGS[2], EVEN_CONFIGS[0], EVEN_CONFIGS[3]], ids=name
)
def test_weights_are_loaded_early(matrix, config: Config) -> None:
    # Fewer steps of K than stages, as many, and more; a CTA with several tiles, and one with none.
    shapes = [((9,), 160, 256, 2), ((3, 0, 20), 288, 3 * 128, 1), ((1,), 160, 1152, 3), ((0, 0), 160, 96, 2)]

    def case(policy: str, seed: int, shape: Shapes) -> ptxsim.Report:
        counts, n, k, clusters = shape
        problem = make_problem(counts, n, k, config.epilogue)
        result = run(config, problem, clusters, policy, seed, constant_rows=True)
        assert_right(config, problem, result, None, exact=True)
        return result.report

    matrix(case, shape=shapes)


@pytest.mark.parametrize("config", [BF16_CONFIGS[0], EVEN_CONFIGS[0]], ids=name)
def test_what_is_read_early_is_what_is_constant(config: Config) -> None:
    # The simulator reports each of the three if it is not said to be constant; without constant_rows nothing.
    problem = make_problem((9, 0, 3), 160, 544, BF16)
    constants = (problem.operand.weight, problem.operand.weight_scale, problem.count)
    for left_out in range(len(constants)):
        constant = constants[:left_out] + constants[left_out + 1 :]
        with pytest.raises(ptxsim.FindingsError) as caught:
            run(config, problem, 2, "eager", 0, constant_rows=True, constant=constant)
        assert caught.value.report.codes() == {findings.BEFORE_WAIT}
    run(config, problem, 2, "eager", 0, constant_rows=True, constant=constants)
    run(config, problem, 2, "eager", 0, constant_rows=False, constant=())


# ---- how much work there is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [BF16_CONFIGS[0], BF16_CONFIGS[4], EVEN_CONFIGS[0], EVEN_CONFIGS[3]], ids=name)
def test_no_tokens_at_all(matrix, config: Config) -> None:
    # P is not 0, as the choices may all be of other ranks' experts: no CTA finds a tile.
    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(config, ((0, 0, 0), 136, 96, 4), policy, seed)

    matrix(case, policies=("random",))


@pytest.mark.parametrize("experts", [40, 512])
def test_many_experts(matrix, experts: int) -> None:
    # A warp counts 16 experts in each lane, and a tile's expert is found by bits of its number.
    tokens = {0: 1, 15: 2, 16: 9, 31: 1, 39: 3, 255: 1, 256: 8, 511: 2}
    counts = tuple(tokens.get(expert, 0) for expert in range(experts))

    def case(policy: str, seed: int, config: Config) -> ptxsim.Report:
        return simulate(config, (counts, 40, 32, 3), policy, seed)

    matrix(case, policies=("random",), config=[BF16_CONFIGS[0], EVEN_CONFIGS[0]])


def test_no_rows_launches_nothing() -> None:
    tensors = arguments(BF16)
    # Without a GPU a launch would fail.
    gemm.grouped_gemm(**tensors | {"mX": tensors["mX"][:0], "mD": tensors["mD"][:0]})


def test_rows_do_not_depend_on_others() -> None:
    # The same tokens in a group of 3 and in one of 9, by tiles of 8 and 80.
    few = make_problem((3,), 136, 544, BF16, exact=False)
    x = torch.where(few.x.isnan(), 1.0, few.x)
    many = few._replace(
        x=x, count=torch.tensor([9], dtype=torch.int32), expert=torch.where(torch.arange(128) < 9, 0, -1)
    )
    results = [
        run(config, problem, 2, "random", 0).d[:3]
        for problem in (few, many)
        for config in (BF16_CONFIGS[0], BF16_CONFIGS[1])
    ]
    assert all(torch.equal(results[0], result) for result in results)


# ---- nightly sizes --------------------------------------------------------------------------------------------------

TILES = [(128, 8), (256, 8), (128, 16), (256, 32), (128, 80), (256, 128), (256, 144), (128, 256)]


@pytest.mark.full
@pytest.mark.parametrize(("tile_w", "tile_n"), TILES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_all_sizes(matrix, epilogue: str, tile_w: int, tile_n: int) -> None:
    config = gemm.largest_config(epilogue, tile_w, tile_n, cluster_w=2 if tile_n > 128 else 1)

    def case(policy: str, seed: int, counts: tuple[int, ...], n: int, k: int) -> ptxsim.Report:
        n = n if epilogue == BF16 else -(-n // 32) * 32
        clusters = 1 + (sum(counts) + n + k // 32) % 5
        limit = LIMIT if epilogue != BF16 and k > 32 else None
        return simulate(config, (counts, n, k, clusters), policy, seed, limit, exact=k != 800)

    # 0, 1, 7, 64, 129, 820 tokens and groups of all kinds.
    counts = [
        (0, 0),
        (1,),
        (0, 7),
        (64,),
        (0, 3, 7),
        (129, 0),
        (65, 0, 9, 64, 1, 8, 0, 63),
        (300, 127, 0, 129, 1, 8, 255),
    ]
    run_pairs(matrix, case, counts=counts, n=(8, 136, 768), k=(32, 384, 800, 1536))


@pytest.mark.full
@pytest.mark.parametrize(("tile_w", "tile_n"), [(128, 8), (256, 8), (128, 32), (128, 64), (128, 128)])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_all_even_shares(matrix, epilogue: str, tile_w: int, tile_n: int) -> None:
    config = gemm.largest_config(epilogue, tile_w, tile_n, even=True)

    def case(policy: str, seed: int, counts: tuple[int, ...], n: int, k: int, clusters: int) -> ptxsim.Report:
        return simulate(config, even_shape(config, (counts, n, k), clusters), policy, seed, exact=k != 800)

    counts = [(1,), (0, 7), (64,), (129, 0), (65, 0, 9, 1, 8, 0, 63)]
    run_pairs(matrix, case, counts=counts, n=(8, 136, 520), k=(96, 800, 1536, 5120), clusters=(1, 2, 3, 7, 11))


# ---- contracts ------------------------------------------------------------------------------------------------------

NAMES = ("mX", "mW", "mSFW", "alpha", "count", "padded_offset", "mD", "h_scale", "sums")


def arguments(epilogue: str) -> dict[str, Any]:
    problem = make_problem((3, 9), 64, 96, epilogue)
    d = torch.zeros(len(problem.x), 64 if epilogue == BF16 else 32, dtype=torch.bfloat16)
    h_scale = problem.h_scale if epilogue == SWIGLU_NVFP4 else None
    sums = torch.zeros(gemm.sums_elements(d.device), dtype=torch.int32)
    tensors = (problem.x, *problem.operand, problem.count, problem.padded_offset, d, h_scale, sums)
    return {**dict(zip(NAMES, tensors, strict=True)), "epilogue": epilogue, "tokens": 9}


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_contract_accepts_what_is_right(epilogue: str) -> None:
    gemm.check(**arguments(epilogue), n=64, max_active_clusters=3)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_type(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    tensors[name] = tensors[name].to(torch.float64)
    with pytest.raises(TypeError, match=f"{name} is torch.float64"):
        gemm.grouped_gemm(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shape(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    tensors[name] = tensors[name].unsqueeze(0)
    with pytest.raises(ValueError, match=f"{name} has shape .* expected"):
        gemm.grouped_gemm(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_device(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=r"is on (meta|cpu), expected (cpu|meta)"):
        gemm.grouped_gemm(**tensors)


@pytest.mark.parametrize("name", ["mX", "mW", "mSFW", "alpha", "mD"])
def test_not_contiguous(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    columns = tensors[name].shape[-1]
    tensors[name] = torch.stack((tensors[name], tensors[name]), -1)[..., 0]
    assert tensors[name].shape[-1] == columns
    with pytest.raises(ValueError, match=f"{name} has strides"):
        gemm.grouped_gemm(**tensors)


@pytest.mark.parametrize("name", ["mX", "mW", "mSFW", "mD", "sums"])
def test_misaligned(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    flat = torch.empty(tensors[name].numel() + 16, dtype=tensors[name].dtype)
    tensors[name] = flat[1 : 1 + tensors[name].numel()].view(tensors[name].shape)
    with pytest.raises(ValueError, match=f"{name} .*starts at 0x"):
        gemm.grouped_gemm(**tensors)


@pytest.mark.parametrize("k", [100, 0])
def test_k_that_tma_cannot_load(k: int) -> None:
    tensors = arguments(BF16)
    tensors["mX"] = torch.zeros(256, k, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"k is {k}, expected a positive multiple of 8"):
        gemm.grouped_gemm(**tensors)


@pytest.mark.parametrize(
    ("epilogue", "n", "multiple"), [(BF16, 0, 8), (BF16, 12, 8), (SWIGLU, 48, 32), (SWIGLU_NVFP4, 16, 32)]
)
def test_n_that_does_not_fit_the_epilogue(epilogue: str, n: int, multiple: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n} with {epilogue}, expected a positive multiple of {multiple}"):
        gemm.grouped_gemm(**arguments(epilogue), n=n)


def test_weights_prepared_for_another_matrix() -> None:
    with pytest.raises(ValueError, match="mW is prepared for 64 rows and 128 columns, expected 72 and 96"):
        gemm.grouped_gemm(**arguments(BF16), n=72)
    with pytest.raises(ValueError, match="mW is prepared for 64 rows and 128 columns, expected 64 and 136"):
        gemm.grouped_gemm(**arguments(BF16) | {"mX": torch.zeros(256, 136, dtype=torch.bfloat16)})


@pytest.mark.parametrize("experts", [0, 513])
def test_number_of_experts(experts: int) -> None:
    tensors = arguments(BF16)
    tensors["mW"] = torch.zeros(experts, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"mW has {experts} experts, expected 1 .. 512"):
        gemm.grouped_gemm(**tensors)


@pytest.mark.parametrize("blocks", [0, 3])
def test_blocks_of_alpha_that_do_not_divide_n(blocks: int) -> None:
    tensors = arguments(BF16)
    tensors["alpha"] = torch.ones(2, blocks)
    with pytest.raises(ValueError, match=f"alpha has {blocks} blocks, expected a divisor of n, which is 64"):
        gemm.grouped_gemm(**tensors)


def test_sums_of_another_size() -> None:
    tensors = arguments(BF16)
    with pytest.raises(
        ValueError, match=f"sums has {len(tensors['sums']) - 4} elements, expected {len(tensors['sums'])}"
    ):
        gemm.grouped_gemm(**tensors | {"sums": tensors["sums"][4:]})


@pytest.mark.parametrize(
    ("missing", "given"),
    [(("count",), r"\['padded_offset'\]"), (("padded_offset",), r"\['count'\]"), (NAMES[4:6], "none")],
)
def test_groups_that_are_not_given(missing: tuple[str, ...], given: str) -> None:
    with pytest.raises(TypeError, match=f"of count and padded_offset, {given} are given for 2 experts"):
        gemm.grouped_gemm(**arguments(BF16) | dict.fromkeys(missing))


def test_one_expert_with_a_count_is_as_several() -> None:
    # Its rows may be fewer than those of X: no configuration for a group of all rows will do.
    problem, chosen = make_problem((3,), 64, 96, BF16), []
    d = torch.zeros(len(problem.x), 64, dtype=torch.bfloat16)
    sums = torch.zeros(gemm.sums_elements(d.device), dtype=torch.int32)
    with mock.patch.object(gemm, "compiled", lambda config: lambda *args: chosen.append(config)):
        for groups in ((problem.count, problem.padded_offset), (None, None)):
            gemm.grouped_gemm(problem.x, *problem.operand, *groups, d, epilogue=BF16, tokens=3, sums=sums)
    assert [config.one_group for config in chosen] == [False, True]


def test_h_scale_is_for_one_epilogue() -> None:
    tensors = arguments(SWIGLU_NVFP4)
    with pytest.raises(TypeError, match=r"h_scale is for swiglu_nvfp4, .* the epilogue is swiglu_nvfp4"):
        gemm.grouped_gemm(**tensors | {"h_scale": None})
    with pytest.raises(TypeError, match=r"h_scale is for swiglu_nvfp4, .* the epilogue is bf16"):
        gemm.grouped_gemm(**arguments(BF16) | {"h_scale": tensors["h_scale"]})


@pytest.mark.parametrize(
    ("epilogue", "limit"), [(BF16, 7.0), (SWIGLU, 0.0), (SWIGLU_NVFP4, -1.0), (SWIGLU, float("nan"))]
)
def test_limit(epilogue: str, limit: float) -> None:
    with pytest.raises(ValueError, match=f"limit is {limit} with {epilogue}"):
        gemm.grouped_gemm(**arguments(epilogue), limit=limit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epilogue": "gelu"}, "epilogue is 'gelu'"),
        ({"tokens": -1}, "tokens is -1"),
        ({"max_active_clusters": 0}, "max_active_clusters is 0"),
        ({"d_group_rows": -128}, "d_group_rows and d_group_columns are -128 and 0"),
        ({"d_group_columns": 12}, "d_group_rows and d_group_columns are 0 and 12"),
    ],
)
def test_other_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gemm.grouped_gemm(**arguments(BF16) | change)


# ---- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_what_is_chosen_is_in_the_closed_set(epilogue: str) -> None:
    closed = gemm.all_configs(epilogue)
    for config in closed:
        assert config.validate() is config
    # Linears and groups of both models, of one rank and of 8.
    sizes = [(512, 7168, 1), (2048, 7168, 1), (65536, 1536, 1), (7168, 16384, 1), (64, 7168, 1), (32768, 1024, 1)]
    sizes += [(6144, 7168, 384), (7168, 3072, 48), (4096, 4096, 256), (1024, 4096, 16), (4096, 512, 2)]
    for n, k, groups in sizes:
        for tokens in (*range(1, 300), 820, 1000, 2048, 4096, 8192, 16384, 100_000):
            assert gemm.choose_config(Shape(tokens, n, k, groups), epilogue) in closed


@pytest.mark.parametrize(
    ("tokens", "tile_n"),
    # One tile while most groups fit 160; a mean of 192 is two tiles of 112 for most, one of 320 two of 160.
    [(1, 8), (9, 16), (64, 64), (80, 96), (150, 160), (161, 160), (184, 160), (218, 112), (354, 160), (8192, 160)],
)
def test_tile_of_groups(tokens: int, tile_n: int) -> None:
    assert gemm.choose_config(Shape(tokens, 4096, 4096, 256), BF16).tile_n == tile_n


def test_the_models_need_no_other_configuration() -> None:
    closed = {config for epilogue in EPILOGUES for config in gemm.all_configs(epilogue)}
    for model in deployment.MODELS.values():
        variants = deployment.variants(deployment.deployment(model, (1, 2, 4, 8), "sm_90a"))
        chosen = {variant.config for variant in variants if variant.kernel.__name__ == "GroupedGemmSm90"}
        assert chosen
        assert chosen <= closed


GOOD = Config(BF16, 128, 8, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "sm_100a"}, "arch is 'sm_100a'"),
        ({"epilogue": "gelu"}, "epilogue is 'gelu'"),
        ({"tile_w": 64}, "tile_w is 64"),
        ({"num_consumers": 3}, "num_consumers is 3"),
        ({"num_consumers": 4}, "num_consumers is 4 with tile_w 128"),
        ({"tile_n": 24}, "tile_n is 24"),
        ({"tile_n": 272}, "tile_n is 272"),
        ({"cluster_w": 2}, "tile_n is 8 with cluster_w 2"),
        ({"tile_w": 256, "tile_n": 176}, "more sums than registers"),
        ({"num_stages": 1}, "num_stages is 1"),
        ({"cluster_w": 4, "tile_n": 32}, "cluster_w is 4"),
        ({"cluster_w": 2, "tile_n": 16, "even": True}, "cluster_w is 2 and even True"),
        ({"cluster_k": 9}, "cluster_k is 9 with cluster_w 1 and even False"),
        ({"cluster_k": 0}, "cluster_k is 0"),
        ({"cluster_k": 2, "even": True}, "cluster_k is 2 with cluster_w 1 and even True"),
        ({"cluster_k": 2, "cluster_w": 2, "tile_n": 16}, "cluster_k is 2 with cluster_w 2"),
        ({"cluster_k": 8}, "leaves 32768 bytes of sums in stages that have 24576"),
        ({"num_stages": 40}, "bytes of shared memory"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GOOD.validate(), **changes).validate()


@pytest.mark.parametrize(
    ("config", "num_buffers"),
    [
        # As much as fits beside the stages, up to all units of a tile, or MAX_BUFFERS.
        (gemm.largest_config(BF16, 256, 128, one_group=True), 2),
        (gemm.largest_config(BF16, 256, 144, cluster_w=2), 1),
        (small(BF16, 256, 8), 2),
        (small(BF16, 256, 112), gemm.MAX_BUFFERS),
        (small(SWIGLU, 256, 128), 1),
    ],
)
def test_buffers_take_what_stages_leave(config: Config, num_buffers: int) -> None:
    assert config.num_buffers == num_buffers
    assert config.copies == (num_buffers > 1)
    assert config.validate().smem_bytes <= gemm.ARCHS[config.arch].smem_bytes


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_90'"):
        gemm.choose_config(Shape(1, 8, 64), BF16, arch="sm_90")


def test_sizes_do_not_compile_again() -> None:
    first = gemm.compiled(BF16_CONFIGS[0])
    num_kernels = len(compiler.cached_keys())
    assert gemm.compiled(small(BF16, 128, 8)) is first
    assert len(compiler.cached_keys()) == num_kernels
