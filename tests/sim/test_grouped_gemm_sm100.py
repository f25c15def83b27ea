"""The grouped GEMM for Blackwell: every epilogue simulated against the reference over ragged groups, every contract."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch

import ptxsim
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

    blocks = row_blocks(epilogue, n)
    size = 0.05 / 2**13 if not integers else 0.03
    alpha = torch.rand(experts, blocks, generator=generator).add(0.5) * size * (1536 / k) ** 0.5
    alpha_rows = alpha.repeat_interleave(n // blocks, 1)
    if epilogue != BF16:
        b, sfb = interleave(b), interleave(sfb.view(torch.uint8)).view(sfb.dtype)
        alpha_rows = interleave(alpha_rows)
    sums = torch.zeros(rows, n, dtype=torch.float64)
    for e in range(experts):
        mine = real & (expert == e)
        a_values = unscaled(a[mine], sfa[mine], torch.float32).double()
        sums[mine] = a_values @ unscaled(b[e], sfb[e], torch.float32).double().T
    if integers:
        assert (sums.abs() < 2**22).all()
    exact = sums.float().double() * alpha_rows[expert.clamp(min=0)].double()
    h_scale = torch.rand(experts, generator=generator).add(0.5) * 0.003
    return Problem(
        a, b, swizzle_block_scale(sfa), swizzle_block_scale(sfb), alpha, tile_expert, padded_offset, h_scale, real,
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


def assert_bf16(d: torch.Tensor, expected: torch.Tensor, real: torch.Tensor, ulps: int) -> None:
    if not real.any():
        return
    d, exact = d[real].double(), expected[real].double()
    assert torch.isfinite(d).all(), "NaN or infinity in D"
    error = (d - exact.bfloat16().double()).abs()
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 7)
    wrong = error > ulps * ulp + 2e-6 * exact.abs().amax()
    assert not wrong.any(), f"{int(wrong.sum())} of {d.numel()} elements wrong, first at {wrong.nonzero()[0].tolist()}"
    assert (error > 0).double().mean() <= 0.01, "too many elements are rounded differently"
    cosine = (d * exact).sum(1) / (d.norm(dim=1) * exact.norm(dim=1))
    assert cosine.min() >= 0.9999


def case_of(config: Config, problem: Problem, clusters: int, policy: str, seed: int) -> ptxsim.Report:
    limit = None if config.epilogue == BF16 or seed == 1 else LIMIT
    result = run(config, problem, clusters, policy, seed, limit)
    if config.epilogue == BF16:
        assert_bf16(result.d, problem.exact, problem.real, 1)
    elif config.epilogue == SWIGLU:
        assert_bf16(result.d, expected_h(problem, limit), problem.real, 1)
    else:
        assert_quantized(result, problem, expected_h(problem, limit), 1e-3)
    return result.report


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


# Rows of each expert, n, k, clusters. Groups empty, of one row, of whole tiles; ragged n and k; idle and busy CTAs.
SHAPES = [
    ((1,), 128, 256, 1),
    ((0, 7, 0), 192, 320, 2),
    ((64, 0, 129, 1), 320, 256, 1),
    ((128, 0, 0, 200, 5), 128, 544, 3),
    ((0, 0), 128, 256, 1),
]


@pytest.mark.parametrize(("cta_group", "tile_n"), [tile for tile in TILES if tile[0] == 1])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_shapes(matrix, epilogue: str, cta_group: int, tile_n: int) -> None:
    config = largest_config(epilogue, tile_n, cta_group, ARCH)

    def case(policy: str, seed: int, shape: tuple[tuple[int, ...], int, int, int]) -> ptxsim.Report:
        counts, n, k, clusters = shape
        return case_of(config, make_problem(counts, n, k, epilogue), clusters, policy, seed)

    matrix(case, seeds=(0, 1), shape=SHAPES)
