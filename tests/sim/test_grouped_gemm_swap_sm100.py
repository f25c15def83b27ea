"""The grouped GEMM for few rows a group: every epilogue simulated against the reference, every contract, its configs."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from covering import run_pairs

import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import grouped_gemm_swap_sm100 as swap
from cutedsl.kernels.blackwell import ARCHS, LOG2_E
from cutedsl.kernels.grouped_gemm_swap_sm100 import BF16, EPILOGUES, SWIGLU, SWIGLU_NVFP4, TILES_N, Config, Shape
from cutedsl.layout import max_padded_rows, swizzle_block_scale, unswizzle_block_scale
from cutedsl.quantize import quantize_activation, quantize_weight, unscaled
from cutedsl.reference.linear import unscaled_mm
from cutedsl.reference.swiglu import swiglu
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

ARCH = ARCHS["sm_100a"]
CANARY = 0x5C
# Rows before and behind D: whole scale tiles.
MARGIN = 128
LIMIT = 1.5


class Problem(NamedTuple):
    """The kernel's inputs, which expert a row belongs to (-1: none), and alpha * X W^T before any rounding of D."""

    x: torch.Tensor
    w: torch.Tensor
    sfx: torch.Tensor
    sfw: torch.Tensor
    alpha: torch.Tensor
    count: torch.Tensor
    padded_offset: torch.Tensor
    h_scale: torch.Tensor
    expert: torch.Tensor
    y: torch.Tensor


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """(E, 2I, ...), gate rows first, to 16 gate rows, 16 up rows, and so on."""
    experts, n, *rest = rows.shape
    return rows.view(experts, 2, n // 32, 16, *rest).transpose(1, 2).reshape(experts, n, *rest).contiguous()


def operands(rows: int, k: int, exact: bool, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales; exact: sums of a product of two are exact in FP32, whatever their order."""
    if exact:
        codes = torch.randint(0, 256, (rows, k // 2), generator=generator, dtype=torch.uint8)
        return codes, torch.exp2(torch.randint(-1, 2, (rows, k // 16), generator=generator)).to(torch.float8_e4m3fn)
    values = torch.randn(rows, k, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.2)
    values *= torch.rand(rows, k // 16, generator=generator).add(0.1).repeat_interleave(16, 1)
    return quantize_weight(values)[:2]


@functools.lru_cache(maxsize=128)
def make_problem(counts: tuple[int, ...], n: int, k: int, epilogue: str, exact: bool = True) -> Problem:
    generator = torch.Generator().manual_seed(hash((counts, n, k)) % 2**31)
    experts, count = len(counts), torch.tensor(counts, dtype=torch.int32)
    # Some choices are of other ranks' experts, so there may be rows behind the last group's.
    rows = max_padded_rows(sum(counts) + 3, experts)
    padded_offset = torch.zeros(experts + 1, dtype=torch.int32)
    padded_offset[1:] = ((count + 127) // 128 * 128).cumsum(0)
    expert = torch.full((rows,), -1)
    for e, start in enumerate(padded_offset[:-1].tolist()):
        expert[start : start + counts[e]] = e
    x, sfx = operands(rows, k, exact, generator)
    w, sfw = operands(experts * n, k, exact, generator)
    w, sfw = w.view(experts, n, -1), sfw.view(experts, n, -1)
    # Padding is garbage, as far as a scale can be.
    sfx.view(torch.uint8)[expert < 0] = torch.tensor(448.0).to(sfx.dtype).view(torch.uint8)

    y = torch.zeros(rows, n)
    for e in range(experts):
        mine = expert == e
        y[mine] = unscaled_mm(unscaled(x[mine], sfx[mine]), w[e], sfw[e])
    blocks = 2 if epilogue != BF16 or n % 16 == 0 else 1
    alpha = torch.rand(experts, blocks, generator=generator).add(0.5) / (y[expert >= 0].std() if sum(counts) else 1.0)
    y = y * alpha.repeat_interleave(n // blocks, 1)[expert.clamp(min=0)]
    if epilogue != BF16:
        w, sfw = interleave(w), interleave(sfw.view(torch.uint8)).view(sfw.dtype)
    h_scale = torch.rand(experts, generator=generator).add(0.5) * 0.002
    sf = swizzle_block_scale(sfx), swizzle_block_scale(sfw)
    return Problem(x, w, *sf, alpha, count, padded_offset, h_scale, expert, y)


class Result(NamedTuple):
    """What the kernel wrote, and all of it with its margins, as bytes."""

    d: torch.Tensor
    sfd: torch.Tensor | None
    d_bytes: torch.Tensor
    sfd_bytes: torch.Tensor | None
    report: ptxsim.Report


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with MARGIN rows before and behind it, all of it canaries; and all of it as bytes."""
    everything = torch.full((rows + 2 * MARGIN, columns * dtype.itemsize), CANARY, dtype=torch.uint8)
    return everything[MARGIN : MARGIN + rows].view(dtype), everything


def run(
    config: Config,
    problem: Problem,
    clusters: int,
    policy: str,
    seed: int,
    limit: float | None = None,
    raise_findings: bool = True,
) -> Result:
    rows, n = problem.y.shape
    sfd, sfd_bytes, h_scale = None, None, None
    if config.epilogue == SWIGLU_NVFP4:
        d, d_bytes = poisoned(rows, n // 4, torch.uint8)
        sfd, sfd_bytes = poisoned(-(-rows // 128) * 128, -(-n // 128) * 4, torch.float8_e4m3fn)
        h_scale = problem.h_scale
    else:
        d, d_bytes = poisoned(rows, n if config.epilogue == BF16 else n // 2, torch.bfloat16)
    arguments = (*problem[:7], d, sfd, h_scale)
    swap.check(*arguments, limit, epilogue=config.epilogue, tokens=1, max_active_clusters=clusters)
    limit = float("inf") if limit is None else limit
    report = ptxsim.run(
        swap.compiled(config), *arguments, limit, clusters, policy=policy, seed=seed, check=raise_findings
    )
    return Result(d, sfd, d_bytes, sfd_bytes, report)


def assert_only_tokens_written(result: Result, problem: Problem) -> None:
    outside = torch.cat((torch.full((MARGIN,), -1), problem.expert, torch.full((MARGIN,), -1))) < 0
    assert (result.d_bytes[outside] == CANARY).all(), "a row of no token was written"
    if result.sfd_bytes is not None:
        rows, columns = result.sfd_bytes.shape
        outside = torch.nn.functional.pad(outside, (0, rows - len(outside)), value=True)
        scales = unswizzle_block_scale(result.sfd_bytes, rows, columns)
        assert (scales[outside] == CANARY).all(), "a scale of no token was written"


def assert_bf16(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one BF16 ulp everywhere, nearly always equal; all rows alike."""
    if not y.numel():
        return
    assert torch.isfinite(y).all(), "NaN or infinity in D"
    exact = expected.double()
    error = (y.double() - expected.bfloat16().double()).abs()
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 7)
    # Where a sum cancels, FP32 sums of another order differ by more than an ulp of the result.
    wrong = error > ulp + 2e-6 * exact.abs().amax()
    assert not wrong.any(), f"{int(wrong.sum())} of {y.numel()} elements wrong, first at {wrong.nonzero()[0].tolist()}"
    assert (error > 0).double().mean() <= 0.005, "too many elements are rounded differently"


def hardware_h(y: torch.Tensor, limit: float | None) -> torch.Tensor:
    """swiglu as `blackwell.swiglu` computes it where ex2 and rcp are exact, as in the simulator."""
    gate, up = y.chunk(2, dim=1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    power = np.exp2((gate * np.float32(-LOG2_E)).double().numpy()).astype(np.float32)
    sigmoid = (1.0 / (np.float32(1.0) + power).astype(np.float64)).astype(np.float32)
    return gate * torch.from_numpy(sigmoid) * up


def assert_right(config: Config, problem: Problem, result: Result, limit: float | None, exact: bool) -> None:
    assert_only_tokens_written(result, problem)
    real = problem.expert >= 0
    y = problem.y[real]
    if config.epilogue == BF16:
        if exact:
            assert torch.equal(result.d[real], y.bfloat16()), "D is not the exact sums, rounded once"
        assert_bf16(result.d[real], y)
    elif config.epilogue == SWIGLU:
        assert_bf16(result.d[real], swiglu(y, limit))
    else:
        assert_quantized(problem, result, limit, exact)


def assert_quantized(problem: Problem, result: Result, limit: float | None, exact: bool) -> None:
    rows, n = problem.y.shape
    num_blocks = n // 32
    scales = unswizzle_block_scale(result.sfd, rows, result.sfd.shape[1])
    for e, h_scale in enumerate(problem.h_scale):
        mine = problem.expert == e
        codes, block_sf = result.d[mine], scales[mine][:, :num_blocks].contiguous()
        assert (scales[mine][:, num_blocks:].float() == 0).all(), "padded scales are not 0"
        if exact:
            expected, expected_sf = quantize_activation(hardware_h(problem.y[mine], limit), h_scale)
            assert torch.equal(block_sf.view(torch.uint8), expected_sf.view(torch.uint8)), f"scales of expert {e}"
            assert torch.equal(codes, expected), f"codes of expert {e}"
        expected, expected_sf = quantize_activation(swiglu(problem.y[mine], limit), h_scale)
        different = (codes != expected).double().mean() if codes.numel() else 0
        assert different <= 0.01, f"{different:.2%} of expert {e}'s codes are not the reference's"
        value, reference = unscaled(codes, block_sf).double(), unscaled(expected, expected_sf).double()
        assert (value - reference).norm() <= 0.02 * reference.norm(), f"expert {e}'s values"


def simulate(
    epilogue: str,
    tile_n: int,
    shape: tuple[tuple[int, ...], int, int, int],
    policy: str,
    seed: int,
    limit: float | None = None,
    exact: bool = True,
) -> ptxsim.Report:
    counts, n, k, clusters = shape
    config = swap.largest_config(epilogue, tile_n, ARCH)
    problem = make_problem(counts, n, k, epilogue, exact)
    result = run(config, problem, clusters, policy, seed, limit)
    assert_right(config, problem, result, limit, exact)
    return result.report


# Tokens of each expert, n, k, CTAs: empty experts first, last and between; counts at, below and above every tile_n; k
# below, at and across steps of 256 and of 64.
SHAPES = [
    ((3,), 136, 256, 1),
    ((0, 1, 3), 384, 288, 2),
    ((7, 8, 9, 0), 136, 96, 3),
    ((63, 0, 65, 64), 8, 448, 2),
    ((0, 0, 9, 1, 0, 17, 3, 0), 264, 544, 5),
]


@pytest.mark.parametrize("tile_n", TILES_N)
def test_bf16(matrix, tile_n: int) -> None:
    def case(policy: str, seed: int, shape: tuple) -> ptxsim.Report:
        return simulate(BF16, tile_n, shape, policy, seed)

    matrix(case, seeds=(0, 1), shape=SHAPES)


SWIGLU_SHAPES = [
    ((3, 0, 9), 160, 256, 2),
    ((0, 65, 1), 32, 416, 1),
    ((7, 8, 0, 1), 384, 96, 3),
]


@pytest.mark.parametrize(("epilogue", "tile_n"), [(SWIGLU, 16), *((SWIGLU_NVFP4, tile_n) for tile_n in (8, 32, 64))])
def test_swiglu(matrix, epilogue: str, tile_n: int) -> None:
    def case(policy: str, seed: int, shape: tuple) -> ptxsim.Report:
        # A limit in every second case.
        return simulate(epilogue, tile_n, shape, policy, seed, LIMIT if SWIGLU_SHAPES.index(shape) % 2 else None)

    matrix(case, seeds=(0, 1), shape=SWIGLU_SHAPES)


@pytest.mark.parametrize(("epilogue", "tile_n"), [(BF16, 16), (SWIGLU, 16), (SWIGLU_NVFP4, 8)])
def test_inexact_sums(matrix, epilogue: str, tile_n: int) -> None:
    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(
            epilogue, tile_n, ((9, 1), 160, 1536, 2), policy, seed, LIMIT * (epilogue != BF16) or None, False
        )

    matrix(case, policies=("random",))


def test_fewest_stages(matrix) -> None:
    # Every barrier wraps within a tile, and nothing is double-buffered.
    config = Config(SWIGLU_NVFP4, tile_n=8, num_ab_stages=2, num_acc_stages=1)
    problem = make_problem((9, 0, 3), 160, 1312, SWIGLU_NVFP4)

    def case(policy: str, seed: int) -> ptxsim.Report:
        result = run(config, problem, 2, policy, seed)
        assert_right(config, problem, result, None, exact=True)
        return result.report

    matrix(case, seeds=(0, 1))


def test_no_tokens_at_all(matrix) -> None:
    # P is not 0, as the choices may all be of other ranks' experts: no CTA finds a tile.
    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(BF16, 8, ((0, 0, 0), 136, 96, 4), policy, seed)

    matrix(case)


def test_one_expert_is_a_linear(matrix) -> None:
    # Rows are not padded, and alpha is of each column.
    problem = make_problem((7,), 136, 96, BF16)
    alpha = torch.rand(1, 136, generator=torch.Generator().manual_seed(0))
    scaled = problem.y[:7] / problem.alpha * alpha
    config = swap.largest_config(BF16, 8, ARCH)
    problem = problem._replace(x=problem.x[:7].clone(), alpha=alpha, y=scaled, expert=problem.expert[:7])

    def case(policy: str, seed: int) -> ptxsim.Report:
        result = run(config, problem, 2, policy, seed)
        assert_right(config, problem, result, None, exact=False)
        return result.report

    matrix(case)


def test_padding_of_scales_is_ignored(matrix) -> None:
    # 6 of 8 columns are scales; who quantizes may leave anything finite in the rest.
    problem = make_problem((7, 9), 136, 96, BF16)
    filled = []
    for sf in (problem.sfx[None], problem.sfw):
        rows = sf.shape[1]
        scales = torch.full(sf.shape, 448.0).to(sf.dtype).view(torch.uint8)
        scales[..., :6] = unswizzle_block_scale(sf.view(torch.uint8), rows, 8)[..., :6]
        filled.append(swizzle_block_scale(scales).view(sf.dtype))
    problem = problem._replace(sfx=filled[0][0], sfw=filled[1])

    def case(policy: str, seed: int, tile_n: int) -> ptxsim.Report:
        config = swap.largest_config(BF16, tile_n, ARCH)
        result = run(config, problem, 1, policy, seed)
        assert_right(config, problem, result, None, exact=True)
        return result.report

    matrix(case, policies=("random",), tile_n=(8, 64))


def test_scales_of_no_token_may_be_nan() -> None:
    problem = make_problem((7, 9), 136, 96, BF16)
    scales = unswizzle_block_scale(problem.sfx.view(torch.uint8), 256, 8)
    scales[problem.expert < 0] = 0x7F
    problem = problem._replace(sfx=swizzle_block_scale(scales).view(problem.sfx.dtype))
    config = swap.largest_config(BF16, 8, ARCH)
    result = run(config, problem, 2, "random", 0, raise_findings=False)
    # The simulator reports a NaN among scales; it must not reach a token.
    assert {finding.code for finding in result.report.findings} == {"bad-value"}
    assert_right(config, problem, result, None, exact=True)


@pytest.mark.parametrize("experts", [40, 512])
def test_many_experts(matrix, experts: int) -> None:
    # A warp counts 16 experts in each lane, and a tile's expert is found by bits of its number.
    tokens = {0: 1, 15: 2, 16: 9, 31: 1, 39: 3, 255: 1, 256: 8, 511: 2}
    counts = tuple(tokens.get(expert, 0) for expert in range(experts))

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(BF16, 8, (counts, 136, 32, 3), policy, seed)

    matrix(case, policies=("random",))


def test_reads_of_sums_hit_all_banks() -> None:
    # 8 threads load 16 bytes each: together they must touch each of 32 banks once.
    def first_words(unit_words: int) -> list[int]:
        units = range(128 // unit_words)
        rows = [(token, unit * unit_words) for token in range(8) for unit in units]
        return [token * swap.TOKEN_WORDS + row // 32 * swap.GROUP_WORDS + row % 32 for token, row in rows]

    for unit_words in (swap.BF16_UNIT, 2 * swap.INTERLEAVE):
        words = first_words(unit_words)
        for start in range(0, len(words), 8):
            assert sorted(word % 32 for word in words[start : start + 8]) == list(range(0, 32, 4))


def test_rows_do_not_depend_on_others() -> None:
    # The same tokens in a group of 3 and in one of 9, by tiles of 8 and 64.
    few = make_problem((3,), 136, 544, BF16, exact=False)
    many = few._replace(count=torch.tensor([9], dtype=torch.int32), expert=torch.where(torch.arange(128) < 9, 0, -1))
    results = [
        run(swap.largest_config(BF16, tile_n, ARCH), problem, 2, "random", 0).d[:3]
        for problem in (few, many)
        for tile_n in (8, 64)
    ]
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.full
@pytest.mark.parametrize("tile_n", TILES_N)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_all_sizes(matrix, epilogue: str, tile_n: int) -> None:
    def case(policy: str, seed: int, counts: tuple[int, ...], n: int, k: int) -> ptxsim.Report:
        n = n if epilogue == BF16 else -(-n // 32) * 32
        clusters = 1 + (sum(counts) + n + k // 32) % 5
        limit = LIMIT if epilogue != BF16 and k > 32 else None
        return simulate(epilogue, tile_n, (counts, n, k, clusters), policy, seed, limit, exact=k != 800)

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


@pytest.mark.parametrize(("tile_n", "clusters", "ctas"), [(8, 148, 96), (64, 148, 12), (64, 4, 4)])
def test_launch(tile_n: int, clusters: int, ctas: int) -> None:
    # 2 experts in 256 rows: not more CTAs than there could be tiles.
    config = swap.largest_config(BF16, tile_n, ARCH)
    problem = make_problem((3, 9), 264, 96, BF16)
    d, _ = poisoned(256, 264, torch.bfloat16)
    (launch,) = capture(swap.compiled(config), *problem[:7], d, None, None, 1.0, clusters)
    assert (launch.grid, launch.block, launch.cluster) == ((ctas, 1, 1), (192, 1, 1), (1, 1, 1))
    # The bound is for choosing stages: it may be high by less than the kibibyte it allows for barriers.
    assert config.smem_bytes - 1024 < launch.shared_bytes <= config.smem_bytes


def test_no_rows_launches_nothing() -> None:
    tensors = arguments(BF16)
    tensors |= {"mX": tensors["mX"][:0], "mSFX": tensors["mSFX"][:0], "mD": tensors["mD"][:0]}
    # Without a GPU a launch would fail.
    swap.grouped_gemm_swap(**tensors)


def test_sizes_do_not_compile_again() -> None:
    first = swap.compiled(swap.choose_config(Shape(7, 136, 96), BF16))
    num_kernels = len(compiler.cached_keys())
    for n, k in ((6144, 7168), (7168, 3072)):
        assert swap.compiled(swap.choose_config(Shape(5, n, k), BF16)) is first
    assert len(compiler.cached_keys()) == num_kernels


# ---- contracts ------------------------------------------------------------------------------------------------------

NAMES = ("mX", "mW", "mSFX", "mSFW", "alpha", "count", "padded_offset", "mD", "mSFD", "h_scale")


def arguments(epilogue: str) -> dict:
    problem = make_problem((3, 9), 64, 96, epilogue)
    rows = len(problem.x)
    if epilogue == SWIGLU_NVFP4:
        results = (
            torch.zeros(rows, 16, dtype=torch.uint8),
            torch.zeros(rows, 4).to(torch.float8_e4m3fn),
            problem.h_scale,
        )
    else:
        results = (torch.zeros(rows, 64 if epilogue == BF16 else 32, dtype=torch.bfloat16), None, None)
    tensors = dict(zip(NAMES, (*problem[:7], *results), strict=True))
    return {**tensors, "epilogue": epilogue, "tokens": 9}


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_contract_accepts_what_is_right(epilogue: str) -> None:
    swap.check(**arguments(epilogue), max_active_clusters=3)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_type(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    tensors[name] = tensors[name].to(torch.float64)
    with pytest.raises(TypeError, match=f"{name} is torch.float64"):
        swap.grouped_gemm_swap(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shape(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    tensors[name] = tensors[name].repeat(*([1] * (tensors[name].ndim - 1)), 3)
    # With thrice the bytes in mX, mW does not fit.
    with pytest.raises(ValueError, match=f"{'mW' if name == 'mX' else name} has shape .* expected"):
        swap.grouped_gemm_swap(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_device(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=r"is on (meta|cpu), expected (cpu|meta)"):
        swap.grouped_gemm_swap(**tensors)


@pytest.mark.parametrize("name", ["mX", "mW", "mSFX", "mSFW", "alpha", "mD", "mSFD"])
def test_not_contiguous(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    columns = tensors[name].shape[-1]
    tensors[name] = torch.cat((tensors[name], tensors[name]), -1)[..., :columns]
    with pytest.raises(ValueError, match=f"{name} has strides"):
        swap.grouped_gemm_swap(**tensors)


@pytest.mark.parametrize("name", ["mX", "mW", "mSFX", "mSFW", "mD", "mSFD"])
def test_misaligned(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    flat = torch.empty(tensors[name].numel() + 16, dtype=tensors[name].dtype)
    tensors[name] = flat[1 : 1 + tensors[name].numel()].view(tensors[name].shape)
    with pytest.raises(ValueError, match=f"{name} starts at 0x"):
        swap.grouped_gemm_swap(**tensors)


@pytest.mark.parametrize("k", [48, 16, 0])
def test_k_that_tma_cannot_load(k: int) -> None:
    tensors = arguments(BF16)
    tensors |= {name: torch.zeros(*tensors[name].shape[:-1], k // 2, dtype=torch.uint8) for name in ("mX", "mW")}
    with pytest.raises(ValueError, match=f"k is {k}, expected a positive multiple of 32"):
        swap.grouped_gemm_swap(**tensors)


@pytest.mark.parametrize(
    ("epilogue", "n", "multiple"), [(BF16, 0, 8), (BF16, 12, 8), (SWIGLU, 48, 32), (SWIGLU_NVFP4, 16, 32)]
)
def test_n_that_does_not_fit_the_epilogue(epilogue: str, n: int, multiple: int) -> None:
    tensors = arguments(epilogue)
    tensors["mW"] = torch.zeros(2, n, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"n is {n} with {epilogue}, expected a positive multiple of {multiple}"):
        swap.grouped_gemm_swap(**tensors)


@pytest.mark.parametrize("experts", [0, 513])
def test_number_of_experts(experts: int) -> None:
    tensors = arguments(BF16)
    tensors["mW"] = torch.zeros(experts, 64, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"mW has {experts} experts, expected 1 .. 512"):
        swap.grouped_gemm_swap(**tensors)


@pytest.mark.parametrize("blocks", [0, 3])
def test_blocks_of_alpha_that_do_not_divide_n(blocks: int) -> None:
    tensors = arguments(BF16)
    tensors["alpha"] = torch.ones(2, blocks)
    with pytest.raises(ValueError, match=f"alpha has {blocks} blocks, expected a divisor of n, which is 64"):
        swap.grouped_gemm_swap(**tensors)


@pytest.mark.parametrize("name", ["mSFD", "h_scale"])
def test_what_an_epilogue_needs(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    with pytest.raises(TypeError, match="swiglu_nvfp4 needs mSFD and h_scale"):
        swap.grouped_gemm_swap(**{**tensors, name: None})
    with pytest.raises(TypeError, match="bf16 has no mSFD and no h_scale"):
        swap.grouped_gemm_swap(**{**arguments(BF16), name: tensors[name]})


@pytest.mark.parametrize(
    ("epilogue", "limit"), [(BF16, 7.0), (SWIGLU, 0.0), (SWIGLU_NVFP4, -1.0), (SWIGLU, float("nan"))]
)
def test_limit(epilogue: str, limit: float) -> None:
    with pytest.raises(ValueError, match=f"limit is {limit} with {epilogue}"):
        swap.grouped_gemm_swap(**arguments(epilogue), limit=limit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epilogue": "gelu"}, "epilogue is 'gelu'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"max_active_clusters": 0}, "max_active_clusters is 0"),
    ],
)
def test_other_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swap.grouped_gemm_swap(**{**arguments(BF16), **change})


# ---- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_configs(epilogue: str) -> None:
    chosen = {tokens: swap.choose_config(Shape(tokens, 6144, 7168), epilogue) for tokens in range(1, 300)}
    assert {tokens: config.tile_n for tokens, config in chosen.items()} == {
        tokens: next((tile_n for tile_n in TILES_N if tokens <= tile_n), 64) for tokens in chosen
    }
    for config in chosen.values():
        assert config.validate() is config
        assert config.smem_bytes <= 232448
        assert config.tmem_columns <= 256
        # A stage is 20 to 27 KiB; as many are on their way as cover the latency of DRAM.
        assert config.num_ab_stages * config.ab_stage_bytes >= 160 * 1024


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(BF16, 8, 5, arch="sm_90a"), "arch is 'sm_90a'"),
        (Config("gelu", 8, 5), "epilogue is 'gelu'"),
        (Config(BF16, 24, 5), "tile_n is 24"),
        (Config(BF16, 8, 1), "too few stages"),
        (Config(BF16, 8, 2, 0), "too few stages"),
        (Config(BF16, 8, 11), "bytes of shared memory"),
        (Config(BF16, 64, 2, 8), "1024 TMEM columns"),
    ],
)
def test_impossible_configs_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_100'"):
        swap.choose_config(Shape(1, 8, 64), BF16, arch="sm_100")
