"""The grouped GEMM for Blackwell: every epilogue simulated against the reference over ragged groups, every contract."""

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from covering import run_pairs

import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import grouped_gemm_sm100
from cutedsl.kernels.blackwell import ARCHS
from cutedsl.kernels.grouped_gemm_sm100 import (
    BF16,
    EPILOGUES,
    SWIGLU,
    SWIGLU_NVFP4,
    Config,
    Shape,
    choose_config,
    largest_config,
)
from cutedsl.layout import max_padded_rows, swizzle_block_scale, unswizzle_block_scale
from cutedsl.quantize import quantize_activation, quantize_weight, unscaled
from cutedsl.reference.swiglu import swiglu
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

ARCH = ARCHS["sm_100a"]
CANARY = 0x5C
MARGIN = 128
LIMIT = 1.5
# (cta_group, tile_n)
TILES = [(group, tile_n) for group, tiles in grouped_gemm_sm100.TILES_N.items() for tile_n in tiles]


class Problem(NamedTuple):
    """The kernel's arguments, the rows that count, and alpha * y of all padded rows in FP64."""

    a: torch.Tensor
    b: torch.Tensor
    sfa: torch.Tensor
    sfb: torch.Tensor
    alpha: torch.Tensor
    tile_expert: torch.Tensor
    padded_offset: torch.Tensor
    h_scale: torch.Tensor
    real: torch.Tensor
    expert: torch.Tensor
    sums: torch.Tensor
    exact: torch.Tensor


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """(E, 2I, ...), gate rows first, to 16 gate rows, 16 up rows, and so on."""
    experts, n, *rest = rows.shape
    return rows.view(experts, 2, n // 32, 16, *rest).transpose(1, 2).reshape(experts, n, *rest).contiguous()


def swizzled_in_garbage(scale: torch.Tensor) -> torch.Tensor:
    """Swizzled, with the largest number in all padding."""
    *_, rows, columns = scale.shape
    bits = torch.nn.functional.pad(scale.view(torch.uint8), (0, -columns % 4, 0, -rows % 128), value=0x7E)
    return swizzle_block_scale(bits).view(scale.dtype)


def row_blocks(epilogue: str, n: int) -> int:
    return {BF16: 4 if n % 16 == 0 else 1, SWIGLU: 2, SWIGLU_NVFP4: 2}[epilogue]


@functools.lru_cache(maxsize=128)
def make_problem(counts: tuple[int, ...], n: int, k: int, epilogue: str, integers: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(sum(counts) * 1_000_003 + len(counts) * 101 + n * 1009 + k)
    experts, total = len(counts), sum(counts)
    # Some choices are of other ranks' experts.
    rows = max_padded_rows(total + 3, experts)
    padded = [-(-count // 128) for count in counts]
    tile_expert = torch.full((rows // 128,), -1, dtype=torch.int32)
    tiles = torch.repeat_interleave(torch.arange(experts), torch.tensor(padded))
    tile_expert[: len(tiles)] = tiles.int()
    padded_offset = torch.tensor([0, *np.cumsum(padded).tolist()], dtype=torch.int32) * 128
    expert = torch.full((rows,), -1).scatter(0, torch.arange(len(tiles) * 128), tiles.repeat_interleave(128))
    local = torch.arange(rows) - padded_offset[expert.clamp(min=0)]
    real = (expert >= 0) & (local < torch.tensor(counts)[expert.clamp(min=0)])
    if integers:
        # Scales are powers of two around 1: sums are exact in FP32, whatever their order.
        a = torch.randint(0, 256, (rows, k // 2), generator=generator, dtype=torch.uint8)
        b = torch.randint(0, 256, (experts, n, k // 2), generator=generator, dtype=torch.uint8)
        sfa = torch.exp2(torch.randint(-1, 2, (rows, k // 16), generator=generator).float()).to(torch.float8_e4m3fn)
        sfb = torch.exp2(torch.randint(-1, 2, (experts, n, k // 16), generator=generator).float())
        sfb = sfb.to(torch.float8_e4m3fn)
    else:
        x = torch.randn(rows, k, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.2)
        x = x * torch.rand(rows, k // 16, generator=generator).add(0.1).repeat_interleave(16, 1)
        w = torch.randn(experts, n, k, generator=generator)
        w = w * torch.rand(experts, n, k // 16, generator=generator).repeat_interleave(16, 2)
        a, sfa = quantize_activation(x, torch.tensor(0.002))
        b, sfb, _ = quantize_weight(w)
    # Padding is garbage, as far as a scale can be.
    a[~real] = torch.randint(0, 256, (k // 2,), generator=generator, dtype=torch.uint8)
    sfa = sfa.float().where(real[:, None], 448.0).to(sfa.dtype)

    sums = torch.zeros(rows, n, dtype=torch.float64)
    for e in range(experts):
        mine = real & (expert == e)
        a_values = unscaled(a[mine], sfa[mine], torch.float32).double()
        sums[mine] = a_values @ unscaled(b[e], sfb[e], torch.float32).double().T
    if integers:
        assert (sums.abs() < 2**22).all()
    # Values around the limit.
    blocks = row_blocks(epilogue, n)
    size = float(sums.square().sum() / max(1, total * n)) ** 0.5
    alpha = torch.rand(experts, blocks, generator=generator).add(0.5) / max(size, 1e-3)
    alpha_rows = alpha.repeat_interleave(n // blocks, 1)
    if epilogue != BF16:
        b, sfb = interleave(b), interleave(sfb.view(torch.uint8)).view(sfb.dtype)
        alpha_rows = interleave(alpha_rows)
        sums = interleave(sums.T[None])[0].T.contiguous()
    exact = sums.float().double() * alpha_rows[expert.clamp(min=0)].double()
    h_scale = torch.rand(experts, generator=generator).add(0.5) * 0.02
    return Problem(
        a, b, swizzled_in_garbage(sfa), swizzled_in_garbage(sfb), alpha, tile_expert, padded_offset, h_scale, real,
        expert, sums, exact,
    )  # fmt: skip


def expected_h(problem: Problem, limit: float | None) -> torch.Tensor:
    """(P, I) FP32 by the reference."""
    gate, up = problem.exact.view(len(problem.exact), -1, 2, 16).float().unbind(2)
    return swiglu(torch.cat((gate.flatten(1), up.flatten(1)), 1), limit)


class Result(NamedTuple):
    """What the kernel wrote, and the report."""

    d: torch.Tensor
    sfd: torch.Tensor | None
    report: ptxsim.Report


def guarded(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with MARGIN rows before it and behind it, and all of it as bytes, which are canaries."""
    everything = torch.full(((rows + 2 * MARGIN), columns * dtype.itemsize), CANARY, dtype=torch.uint8)
    return everything[MARGIN : rows + MARGIN].view(dtype), everything


def run(config: Config, problem: Problem, clusters: int, policy: str, seed: int, limit: float | None = None) -> Result:
    rows, n = problem.exact.shape
    used = int(problem.padded_offset[-1])
    quantized = config.epilogue == SWIGLU_NVFP4
    columns = {BF16: n, SWIGLU: n // 2, SWIGLU_NVFP4: n // 4}[config.epilogue]
    d, d_bytes = guarded(rows, columns, torch.uint8 if quantized else torch.bfloat16)
    sfd = sfd_bytes = None
    if quantized:
        sfd, sfd_bytes = guarded(rows, -(-n // 128) * 4, torch.float8_e4m3fn)
    h_scale = problem.h_scale if quantized else None
    grouped_gemm_sm100.check(
        *problem[:7], d, epilogue=config.epilogue, mSFD=sfd, h_scale=h_scale, limit=limit, max_active_clusters=clusters
    )
    arguments = (*problem[:7], d, sfd, h_scale, float("inf") if limit is None else limit, clusters)
    # Rows behind the last group are no part of the memory that the simulator allows.
    outputs = [tensor[:used] for tensor in (d, sfd) if tensor is not None]
    report = ptxsim.run(grouped_gemm_sm100.compiled(config), *arguments, outputs=outputs, policy=policy, seed=seed)
    for tensor, everything in ((d, d_bytes), (sfd, sfd_bytes)):
        if tensor is not None and everything is not None:
            assert (everything[:MARGIN] == CANARY).all(), "a row before the output was written"
            assert (everything[MARGIN + used :] == CANARY).all(), "a row behind the last group was written"
    return Result(d, sfd, report)


def assert_bf16(d: torch.Tensor, expected: torch.Tensor, real: torch.Tensor) -> None:
    """Within one BF16 ulp everywhere, nearly always equal; all rows alike."""
    if not real.any():
        return
    d, exact = d[real].double(), expected[real].double()
    assert torch.isfinite(d).all(), "NaN or infinity in D"
    error = (d - exact.bfloat16().double()).abs()
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 7)
    wrong = error > ulp + 2e-6 * exact.abs().amax()
    assert not wrong.any(), f"{int(wrong.sum())} of {d.numel()} elements wrong, first at {wrong.nonzero()[0].tolist()}"
    assert (error > 0).double().mean() <= 0.01, "too many elements are rounded differently"
    cosine = (d * exact).sum(1) / (d.norm(dim=1) * exact.norm(dim=1))
    assert cosine.min() >= 0.9999


def assert_quantized(result: Result, problem: Problem, h: torch.Tensor, tolerance: float) -> None:
    """Codes and scales of real rows; at most a share of them differs, and then by one step."""
    columns = h.shape[1]
    used = int(problem.padded_offset[-1])
    scale = unswizzle_block_scale(result.sfd, len(h), columns // 16)
    tail = unswizzle_block_scale(result.sfd, len(h), result.sfd.shape[1])[:used, columns // 16 :]
    assert (tail.view(torch.uint8) == 0).all(), "scales behind a row's last block"
    for e, h_scale in enumerate(problem.h_scale):
        mine = problem.real & (problem.expert == e)
        codes, block_sf = quantize_activation(h[mine], h_scale)
        assert (block_sf.float() < 448).all(), "a saturated scale tests little"
        assert_neighbours(scale[mine].view(torch.uint8), block_sf.view(torch.uint8), tolerance)
        same = (scale[mine].view(torch.uint8) == block_sf.view(torch.uint8)).repeat_interleave(8, 1)
        for shift in (0, 4):
            found, wanted = result.d[mine] >> shift & 15, codes >> shift & 15
            assert_neighbours(found[same] & 7, wanted[same] & 7, tolerance)
            assert (((found ^ wanted) & 8)[same & (found & 7 > 0)] == 0).all(), "signs"


def assert_neighbours(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    distance = (found.int() - wanted.int()).abs()
    if distance.numel():
        assert distance.max() <= (1 if tolerance else 0), f"differs by {int(distance.max())}"
        assert (distance > 0).double().mean() <= tolerance


def simulate(
    config: Config, counts: tuple[int, ...], n: int, k: int, clusters: int, policy: str, seed: int
) -> ptxsim.Report:
    """One launch against the reference; with seed 1 SwiGLU has no limit."""
    problem = make_problem(counts, n, k, config.epilogue)
    limit = None if config.epilogue == BF16 or seed == 1 else LIMIT
    result = run(config, problem, clusters, policy, seed, limit)
    if config.epilogue == BF16:
        assert_bf16(result.d, problem.exact, problem.real)
    elif config.epilogue == SWIGLU:
        assert_bf16(result.d, expected_h(problem, limit), problem.real)
    else:
        assert_quantized(result, problem, expected_h(problem, limit), 1e-3)
    return result.report


# n that no tile divides: it ends within a swizzle's span, a block of 64 sums, a scale tile.
RAGGED_N = {BF16: 200, SWIGLU: 160, SWIGLU_NVFP4: 192}
# Rows of each expert, k, clusters: empty groups, one row, more tiles than clusters, fewer tiles than clusters, no tile.
SHAPES = [
    ((0, 7, 0), 416, 2),
    ((64, 0, 129, 1), 256, 1),
    ((0, 0), 256, 1),
]
# For each epilogue every way of its own through the kernel; the other tiles run nightly.
CI_TILES = {BF16: [(1, 64), (1, 256), (2, 128)], SWIGLU: [(1, 128)], SWIGLU_NVFP4: [(1, 64), (2, 128)]}


@pytest.mark.parametrize(
    ("epilogue", "cta_group", "tile_n"), [(epilogue, *tile) for epilogue in EPILOGUES for tile in CI_TILES[epilogue]]
)
def test_shapes(matrix, epilogue: str, cta_group: int, tile_n: int) -> None:
    config = largest_config(epilogue, tile_n, cta_group, ARCH)

    def case(policy: str, seed: int, shape: tuple[tuple[int, ...], int, int]) -> ptxsim.Report:
        counts, k, clusters = shape
        return simulate(config, counts, RAGGED_N[epilogue], k, clusters, policy, seed)

    matrix(case, seeds=(0, 1), shape=SHAPES)


@pytest.mark.parametrize("cta_group", [1, 2])
def test_fewest_stages(matrix, cta_group: int) -> None:
    # Every barrier wraps within a tile, and nothing is double-buffered.
    config = Config(BF16, 128, num_ab_stages=2, num_acc_stages=1, num_d_stages=1, cta_group=cta_group)

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(config, (130, 1), 256, 1312, 1, policy, seed)

    matrix(case, seeds=(0, 1))


def test_a_typical_batch(matrix) -> None:
    # 820 rows over 8 experts; pairs with one expert and with two; the second tile of n ends before its last scale tile.
    config = largest_config(SWIGLU_NVFP4, 256, 2, ARCH)

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(config, (257, 0, 1, 128, 129, 7, 298, 0), 320, 512, 2, policy, seed)

    matrix(case, policies=("random",))


def kernels_h(problem: Problem, limit: float) -> torch.Tensor:
    """(P, I) FP32: the kernel's operations in its order, ex2 and rcp rounded correctly as the simulator does."""
    gate, up = problem.exact.float().view(len(problem.exact), -1, 2, 16).unbind(2)
    gate, up = gate.flatten(1).clamp(max=limit), up.flatten(1).clamp(-limit, limit)
    exponential = torch.exp2((gate * torch.tensor(-1.4426950408889634)).double()).float()
    sigmoid = (1 / (1 + flushed(exponential)).double()).float()
    return gate * flushed(sigmoid) * up


def flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 2.0**-126, 0.0, x)


def test_quantization_is_bit_identical(matrix) -> None:
    # Sums are exact; experts whose h are ordinary, zero, NaN, and far beyond the scale's range.
    problem = make_problem((40, 3, 3, 130), 192, 256, SWIGLU_NVFP4, integers=True)
    alpha = problem.alpha.clone()
    alpha[1], alpha[2, 1], alpha[3] = 0.0, float("nan"), alpha[3] * 50
    rows = interleave(alpha.repeat_interleave(96, 1))[problem.expert.clamp(min=0)].double()
    problem = problem._replace(alpha=alpha, exact=problem.sums * rows)

    def case(policy: str, seed: int, limit: float, size: float) -> ptxsim.Report:
        scaled = problem._replace(h_scale=problem.h_scale * size)
        result = run(largest_config(SWIGLU_NVFP4, 64, 1, ARCH), scaled, 2, policy, seed, limit)
        h = kernels_h(scaled, limit)
        scale = unswizzle_block_scale(result.sfd, len(h), 6).view(torch.uint8)
        for e, h_scale in enumerate(scaled.h_scale):
            mine = scaled.real & (scaled.expert == e)
            codes, block_sf = quantize_activation(h[mine], h_scale)
            assert torch.equal(scale[mine], block_sf.view(torch.uint8)), f"scales of expert {e}"
            assert torch.equal(result.d[mine], codes), f"codes of expert {e}"
        return result.report

    # Sizes: scales in range, all saturated, some underflowing to 0.
    matrix(case, limit=(LIMIT, float("inf")), size=(1.0, 1e-3, 1e3), policies=("random",))


def test_silu_is_within_its_bound() -> None:
    gate = torch.cat((torch.linspace(-80, 80, 100_001), torch.randn(100_000))).float()
    sigmoid = 1 / (1 + torch.exp2((gate * torch.tensor(-1.4426950408889634)).double()).float())
    exact = gate.double() * torch.sigmoid(gate.double())
    # Here ex2 and rcp are rounded correctly, to 2^-24, where hardware may be off by 2^-22 and 2^-23.
    bound = 2.0**-21 - (2.0**-22 - 2.0**-24) - (2.0**-23 - 2.0**-24) + gate.double().clamp(max=0).abs() * 2.0**-23
    assert ((gate * sigmoid - exact).abs() <= bound * exact.abs()).all()


@pytest.mark.full
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("cta_group", "tile_n"), TILES)
def test_all_sizes(matrix, epilogue: str, cta_group: int, tile_n: int) -> None:
    config = largest_config(epilogue, tile_n, cta_group, ARCH)
    groups = [(0, 0), (1,), (7,), (64,), (0, 129), (128, 0, 0, 200, 5), (300, 0, 1, 128, 129, 7, 255, 0), (256, 256)]
    sizes = [(128, 32), (RAGGED_N[epilogue], 256), (768, 352), (RAGGED_N[epilogue], 1536)]

    def case(policy: str, seed: int, counts: tuple[int, ...], size: tuple[int, int]) -> ptxsim.Report:
        return simulate(config, counts, *size, 1 + (sum(counts) + sum(size) // 32) % 4, policy, seed)

    run_pairs(matrix, case, seeds=(0, 1), counts=groups, size=sizes)


@pytest.mark.full
@pytest.mark.parametrize(("cta_group", "tile_n"), TILES)
def test_real_k_slow(matrix, cta_group: int, tile_n: int) -> None:
    def case(policy: str, seed: int, epilogue: str) -> ptxsim.Report:
        return simulate(largest_config(epilogue, tile_n, cta_group, ARCH), (130, 1), 256, 7168, 1, policy, seed)

    matrix(case, epilogue=EPILOGUES)


@pytest.mark.parametrize(
    ("cta_group", "tile_n", "clusters", "ctas"), [(1, 64, 148, 12), (1, 256, 2, 2), (2, 128, 148, 8), (2, 256, 1, 2)]
)
def test_launch(cta_group: int, tile_n: int, clusters: int, ctas: int) -> None:
    config = largest_config(BF16, tile_n, cta_group, ARCH)
    # With choices of other ranks there is room for 3 row tiles.
    problem = make_problem((64, 129), 200, 256, BF16)
    d = torch.empty(len(problem.exact), 200, dtype=torch.bfloat16)
    arguments = (*problem[:7], d, None, None, float("inf"), clusters)
    (launch,) = capture(grouped_gemm_sm100.compiled(config), *arguments)
    assert (launch.grid, launch.block, launch.cluster) == ((ctas, 1, 1), (192, 1, 1), (cta_group, 1, 1))
    # The bound is for choosing stages: it may be high by less than the kibibyte it allows for barriers.
    assert config.smem_bytes - 1024 < launch.shared_bytes <= config.smem_bytes


def test_no_rows_launches_nothing() -> None:
    tensors = arguments()
    for name in ("mA", "mSFA", "tile_expert", "mD"):
        tensors[name] = tensors[name][:0]
    # Without a GPU a launch would fail.
    grouped_gemm_sm100.grouped_gemm(**tensors)


def test_sizes_do_not_compile_again() -> None:
    configs = {choose_config(Shape(rows, 200, 256, 4), BF16) for rows in (128, 256, 1024)}
    assert len(configs) == 1
    first = grouped_gemm_sm100.compiled(*configs)
    num_kernels = len(compiler.cached_keys())
    assert grouped_gemm_sm100.compiled(*configs) is first
    assert len(compiler.cached_keys()) == num_kernels


# ---- contracts ------------------------------------------------------------------------------------------------------

NAMES = ("mA", "mB", "mSFA", "mSFB", "alpha", "tile_expert", "padded_offset", "mD")
QUANTIZED_NAMES = (*NAMES, "mSFD", "h_scale")


def arguments(epilogue: str = BF16) -> dict[str, Any]:
    problem = make_problem((7, 3), 192, 96, epilogue)
    rows = len(problem.exact)
    tensors = dict(zip(NAMES[:-1], problem[:7], strict=True))
    if epilogue == SWIGLU_NVFP4:
        sfd = torch.zeros(rows, 8).to(torch.float8_e4m3fn)
        return {
            **tensors,
            "mD": torch.zeros(rows, 48, dtype=torch.uint8),
            "mSFD": sfd,
            "h_scale": problem.h_scale,
            "epilogue": epilogue,
        }
    columns = 192 if epilogue == BF16 else 96
    return {**tensors, "mD": torch.zeros(rows, columns, dtype=torch.bfloat16), "epilogue": epilogue}


def refuse(error: type[Exception], match: str, tensors: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        grouped_gemm_sm100.grouped_gemm(**tensors)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_contract_accepts_what_is_right(epilogue: str) -> None:
    grouped_gemm_sm100.check(**arguments(epilogue), max_active_clusters=3)


def test_alpha_of_each_expert_or_row_block() -> None:
    for shape in ((2,), (2, 1), (2, 192), (2, 64)):
        grouped_gemm_sm100.check(**{**arguments(), "alpha": torch.ones(shape)})


@pytest.mark.parametrize("name", QUANTIZED_NAMES)
def test_wrong_type(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    refuse(TypeError, f"{name} is torch.float64", {**tensors, name: tensors[name].to(torch.float64)})


@pytest.mark.parametrize("name", QUANTIZED_NAMES)
def test_wrong_shape(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    wrong = tensors[name].repeat(*([1] * (tensors[name].ndim - 1)), 2)
    # With twice the bytes in mA, mB does not fit.
    refuse(ValueError, f"{'mB' if name == 'mA' else name} has shape .* expected", {**tensors, name: wrong})


@pytest.mark.parametrize("name", QUANTIZED_NAMES)
def test_wrong_device(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    refuse(ValueError, r"is on (meta|cpu), expected (cpu|meta)", {**tensors, name: tensors[name].to("meta")})


@pytest.mark.parametrize("name", ["mA", "mB", "mSFA", "mSFB", "alpha", "mD", "mSFD"])
def test_not_contiguous(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    columns = tensors[name].shape[-1]
    wide = tensors[name].repeat(*([1] * (tensors[name].ndim - 1)), 2)
    refuse(ValueError, f"{name} has strides", {**tensors, name: wide[..., :columns]})


@pytest.mark.parametrize("name", QUANTIZED_NAMES)
def test_misaligned(name: str) -> None:
    tensors = arguments(SWIGLU_NVFP4)
    right = tensors[name]
    flat = torch.empty(right.numel() + 16, dtype=right.dtype)
    refuse(ValueError, f"{name} starts at 0x", {**tensors, name: flat[1 : 1 + right.numel()].view(right.shape)})


@pytest.mark.parametrize("rows", [1, 130])
def test_rows_without_padding(rows: int) -> None:
    refuse(ValueError, f"mA has {rows} rows", {**arguments(), "mA": torch.zeros(rows, 48, dtype=torch.uint8)})


def test_no_experts() -> None:
    refuse(ValueError, "mB 0 experts", {**arguments(), "mB": torch.zeros(0, 192, 48, dtype=torch.uint8)})


@pytest.mark.parametrize("k", [0, 16, 48])
def test_k_that_tma_cannot_load(k: int) -> None:
    tensors = arguments()
    a, b = tensors["mA"].new_zeros(len(tensors["mA"]), k // 2), tensors["mB"].new_zeros(2, 192, k // 2)
    refuse(ValueError, f"k is {k}, expected a positive multiple of 32", {**tensors, "mA": a, "mB": b})


@pytest.mark.parametrize(("epilogue", "n"), [(BF16, 0), (BF16, 12), (SWIGLU, 48), (SWIGLU_NVFP4, 96)])
def test_n_that_tma_cannot_store(epilogue: str, n: int) -> None:
    tensors = arguments(epilogue)
    refuse(ValueError, f"n is {n}, expected a positive multiple", {**tensors, "mB": tensors["mB"].new_zeros(2, n, 48)})


def test_alpha_that_does_not_divide_n() -> None:
    refuse(ValueError, "alpha has 5 row blocks", {**arguments(), "alpha": torch.ones(2, 5)})


def test_swiglu_needs_two_alphas() -> None:
    refuse(ValueError, r"alpha has shape \(2,\)", {**arguments(SWIGLU), "alpha": torch.ones(2)})


@pytest.mark.parametrize("name", ["mSFD", "h_scale"])
def test_what_quantization_alone_needs(name: str) -> None:
    quantized = arguments(SWIGLU_NVFP4)
    refuse(ValueError, f"{name} is not given", {**quantized, name: None})
    refuse(ValueError, f"{name} is given", {**arguments(SWIGLU), name: quantized[name]})


@pytest.mark.parametrize(
    ("epilogue", "limit"), [(BF16, 7.0), (SWIGLU, 0.0), (SWIGLU, -1.0), (SWIGLU_NVFP4, float("nan"))]
)
def test_limits_that_mean_nothing(epilogue: str, limit: float) -> None:
    refuse(ValueError, f"limit is {limit}", {**arguments(epilogue), "limit": limit})


def test_unknown_epilogue() -> None:
    refuse(ValueError, "epilogue is 'gelu'", {**arguments(), "epilogue": "gelu"})


def test_no_clusters() -> None:
    refuse(ValueError, "max_active_clusters is 0", {**arguments(), "max_active_clusters": 0})


# ---- configurations -------------------------------------------------------------------------------------------------

# DeepSeek-V4's experts: n of the whole model, k, and which of them tensor parallelism divides.
EXPERTS = {
    "pro gate+up": (6144, 7168, "n"),
    "pro down": (7168, 3072, "k"),
    "flash gate+up": (4096, 4096, "n"),
    "flash down": (4096, 2048, "k"),
}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", EXPERTS)
def test_every_v4_expert_has_a_config(name: str, tp: int) -> None:
    n, k, divided = EXPERTS[name]
    n, k = n // (tp if divided == "n" else 1), k // (tp if divided == "k" else 1)
    assert k % grouped_gemm_sm100.K_MULTIPLE == 0
    for epilogue in (BF16,) if divided == "k" else (SWIGLU, SWIGLU_NVFP4):
        assert n % grouped_gemm_sm100.N_MULTIPLE[epilogue] == 0
        for rows, experts in ((128, 1), (1024, 8), (49152, 48), (49152, 384)):
            config = choose_config(Shape(rows, n, k, experts), epilogue)
            assert config.validate() is config
            assert config.tmem_columns <= 512
            assert config.smem_bytes <= 232448


@pytest.mark.parametrize(
    ("epilogue", "tiles"),
    [(BF16, [(1, 64), (1, 128), (1, 256), (2, 256)]), (SWIGLU_NVFP4, [(1, 64), (1, 128), (1, 128), (2, 128)])],
)
def test_larger_batches_get_larger_tiles(epilogue: str, tiles: list[tuple[int, int]]) -> None:
    for (rows, experts), tile in zip(((256, 8), (1024, 8), (4096, 48), (65536, 48)), tiles, strict=True):
        config = choose_config(Shape(rows, 4096, 7168, experts), epilogue)
        assert (config.cta_group, config.tile_n) == tile


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(BF16, 128, 5, 2, arch="sm_90a"), "arch is 'sm_90a'"),
        (Config("gelu", 128, 5, 2), "epilogue is 'gelu'"),
        (Config(BF16, 128, 5, 2, cta_group=4), "cta_group is 4"),
        (Config(BF16, 96, 2, 2), "tile_n is 96"),
        (Config(BF16, 64, 2, 2, cta_group=2), "tile_n is 64"),
        (Config(BF16, 128, 1, 2), "too few stages"),
        (Config(BF16, 128, 2, 0), "too few stages"),
        (Config(BF16, 128, 7, 2), "bytes of shared memory"),
        (Config(BF16, 256, 3, 2), "1024 TMEM columns"),
    ],
)
def test_impossible_configs_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_100'"):
        choose_config(Shape(128, 64, 64, 1), BF16, arch="sm_100")


def test_unknown_epilogue_has_no_config() -> None:
    with pytest.raises(ValueError, match="epilogue is 'gelu'"):
        choose_config(Shape(128, 64, 64, 1), "gelu")
