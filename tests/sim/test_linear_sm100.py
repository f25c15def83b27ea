"""The Blackwell linear: simulated against the reference over ragged shapes, every contract, every V4 shape's config."""

import functools
import os
from typing import NamedTuple

import pytest
import torch
from covering import run_pairs

import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import linear_sm100
from cutedsl.kernels.blackwell import ARCHS
from cutedsl.kernels.linear_sm100 import Config, Shape, choose_config, largest_config
from cutedsl.layout import swizzle_block_scale, unswizzle_block_scale
from cutedsl.quantize import quantize_activation, quantize_weight
from cutedsl.reference.linear import PackedMatrix, ScaleGroup
from cutedsl.reference.linear import linear_fp32 as reference_fp32
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

INPUT_SCALE = 0.0021
CANARY = -12345.0


class Problem(NamedTuple):
    """The kernel's arguments, and what it must give before the last rounding."""

    a: torch.Tensor
    b: torch.Tensor
    sfa: torch.Tensor
    sfb: torch.Tensor
    alpha: torch.Tensor
    expected: torch.Tensor


@functools.lru_cache(maxsize=64)
def make_problem(m: int, n: int, k: int) -> Problem:
    generator = torch.Generator().manual_seed(m * 1_000_003 + n * 1009 + k)
    # Rows and blocks of different sizes, so that scales differ.
    x = torch.randn(m, k, generator=generator) * torch.rand(m, 1, generator=generator).add(0.2) * 3
    x = (x * torch.rand(m, k // 16, generator=generator).add(0.1).repeat_interleave(16, 1)).bfloat16()
    w = torch.randn(n, k, generator=generator) * torch.rand(n, k // 16, generator=generator).repeat_interleave(16, 1)
    packed = quantize_weight(w)
    input_scale = torch.tensor(INPUT_SCALE)
    # As if every row were a shard with a weight_scale_2 of its own.
    alpha = input_scale * packed.weight_scale_2 * torch.rand(n, generator=generator).add(0.5)
    codes, block_sf = quantize_activation(x, input_scale)
    matrix = PackedMatrix(packed.weight, packed.weight_scale, alpha, (ScaleGroup(input_scale, ((0, n),)),))
    return Problem(
        codes,
        packed.weight,
        swizzle_block_scale(block_sf),
        swizzle_block_scale(packed.weight_scale),
        alpha,
        reference_fp32(x, matrix),
    )


def assert_matches(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one BF16 ulp everywhere, nearly always equal; all rows alike."""
    assert torch.isfinite(y).all(), "NaN or infinity in D"
    exact = expected.double()
    error = (y.double() - expected.bfloat16().double()).abs()
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 7)
    # Where a sum cancels, FP32 sums of another order differ by more than an ulp of the result.
    allowed = ulp + 2e-6 * exact.abs().amax()
    wrong = error > allowed
    assert not wrong.any(), f"{int(wrong.sum())} of {y.numel()} elements wrong, first at {wrong.nonzero()[0].tolist()}"
    assert (error > 0).double().mean() <= 0.005, "too many elements are rounded differently"
    row_error = error.norm(dim=1) / exact.norm(dim=1)
    assert row_error.max() <= 2.0**-9, f"row {int(row_error.argmax())} is off by {float(row_error.max()):.2e}"


def simulate(config: Config, m: int, n: int, k: int, clusters: int, policy: str, seed: int) -> ptxsim.Report:
    return run(config, make_problem(m, n, k), clusters, policy, seed)


def run(config: Config, problem: Problem, clusters: int, policy: str, seed: int) -> ptxsim.Report:
    m, n = problem.expected.shape
    guarded = torch.full((m + 2, n), CANARY, dtype=torch.bfloat16)
    d = guarded[1:-1]
    d.fill_(float("nan"))
    arguments = (*problem[:5], d)
    linear_sm100.check(*arguments, clusters)
    report = ptxsim.run(linear_sm100.compiled(config), *arguments, clusters, outputs=(d,), policy=policy, seed=seed)
    assert_matches(d, problem.expected)
    assert (guarded[0] == CANARY).all(), "the row before D was written"
    assert (guarded[-1] == CANARY).all(), "the row behind D was written"
    return report


# m, n, k, CTAs: one tile and many, whole and ragged in every size; k below, at and across steps of 256 and of 64.
SHAPES = [
    (1, 8, 64, 1),
    (7, 136, 96, 2),
    (64, 576, 256, 3),
    (129, 136, 320, 1),
    (300, 64, 512, 2),
    (1, 576, 32, 4),
    (7, 264, 1536, 1),
    (129, 264, 448, 1),
]


@pytest.mark.parametrize("tile_n", linear_sm100.TILES_N)
def test_shapes(matrix, tile_n: int) -> None:
    config = largest_config(tile_n, ARCHS["sm_100a"])

    def case(policy: str, seed: int, shape: tuple[int, int, int, int]) -> ptxsim.Report:
        m, n, k, clusters = shape
        return simulate(config, m, n, k, clusters, policy, seed)

    matrix(case, seeds=(0, 1), shape=SHAPES)


def test_fewest_stages(matrix) -> None:
    # Every barrier wraps within a tile, and nothing is double-buffered.
    config = Config(tile_n=128, num_ab_stages=2, num_acc_stages=1, num_d_stages=1)

    def case(policy: str, seed: int, m: int) -> ptxsim.Report:
        return simulate(config, m, 264, 1312, 2, policy, seed)

    matrix(case, seeds=(0, 1, 2), m=(7, 129))


def test_padding_of_scales_is_ignored(matrix) -> None:
    # 7 of 128 rows and 6 of 8 columns are scales; a kernel that quantizes may leave anything finite in the rest.
    problem = make_problem(7, 136, 96)
    sizes = {"sfa": 7, "sfb": 136}
    padded = {
        name: swizzle_block_scale(unswizzled_with(getattr(problem, name), rows, 6, 448.0))
        for name, rows in sizes.items()
    }

    def case(policy: str, seed: int, tile_n: int) -> ptxsim.Report:
        return run(largest_config(tile_n, ARCHS["sm_100a"]), problem._replace(**padded), 1, policy, seed)

    matrix(case, tile_n=linear_sm100.TILES_N)


def unswizzled_with(swizzled: torch.Tensor, rows: int, columns: int, padding: float) -> torch.Tensor:
    """All padded rows and columns, unswizzled, with another value in the padding."""
    scale = torch.full(swizzled.shape, padding).to(swizzled.dtype)
    scale[:rows, :columns] = unswizzle_block_scale(swizzled, rows, columns)
    return scale


@pytest.mark.full
@pytest.mark.parametrize("tile_n", linear_sm100.TILES_N)
def test_all_sizes(matrix, tile_n: int) -> None:
    config = largest_config(tile_n, ARCHS["sm_100a"])

    def case(policy: str, seed: int, m: int, n: int, k: int) -> ptxsim.Report:
        return simulate(config, m, n, k, 1 + (m + n + k // 32) % 4, policy, seed)

    sizes = {"m": (1, 7, 64, 129, 300, 820), "n": (8, 136, 576), "k": (64, 96, 256, 320, 384, 512, 1536)}
    run_pairs(matrix, case, seeds=(0, 1, 2), **sizes)


@pytest.mark.full
@pytest.mark.parametrize(("n", "k"), [(2048, 7168), (7168, 384), (1024, 7168), (768, 7168), (7168, 2048)])
def test_real_shapes_slow(matrix, n: int, k: int) -> None:
    def case(policy: str, seed: int, m: int) -> ptxsim.Report:
        return simulate(choose_config(Shape(m, n, k)), m, n, k, 4, policy, seed)

    matrix(case, m=(7, 200))


@pytest.mark.parametrize(("tile_n", "clusters", "ctas"), [(64, 148, 15), (128, 148, 9), (256, 148, 6), (64, 4, 4)])
def test_launch(tile_n: int, clusters: int, ctas: int) -> None:
    config = largest_config(tile_n, ARCHS["sm_100a"])
    problem = make_problem(300, 264, 96)
    d = torch.empty(300, 264, dtype=torch.bfloat16)
    (launch,) = capture(linear_sm100.compiled(config), *problem[:5], d, clusters)
    assert (launch.grid, launch.block, launch.cluster) == ((ctas, 1, 1), (192, 1, 1), (1, 1, 1))
    # The bound is for choosing stages: it may be high by less than the kibibyte it allows for barriers.
    assert config.smem_bytes - 1024 < launch.shared_bytes <= config.smem_bytes


def test_no_rows_launches_nothing() -> None:
    problem = make_problem(1, 8, 64)
    d = torch.empty(0, 8, dtype=torch.bfloat16)
    # Without a GPU a launch would fail.
    linear_sm100.linear(problem.a[:0], problem.b, problem.sfa[:0], problem.sfb, problem.alpha, d)


def test_sizes_do_not_compile_again() -> None:
    config = choose_config(Shape(7, 136, 96))
    first = linear_sm100.compiled(config)
    num_kernels = len(compiler.cached_keys())
    for m in (1, 64, 1000):
        assert linear_sm100.compiled(choose_config(Shape(m, 136, 96))) is first
    assert len(compiler.cached_keys()) == num_kernels


# ---- contracts ------------------------------------------------------------------------------------------------------

NAMES = ("mA", "mB", "mSFA", "mSFB", "alpha", "mD")


def arguments() -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, (*make_problem(7, 136, 96)[:5], torch.zeros(7, 136, dtype=torch.bfloat16)), strict=True))


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    return flat[1 : 1 + tensor.numel()].view(tensor.shape)


def test_the_contract_accepts_what_is_right() -> None:
    linear_sm100.check(**arguments(), max_active_clusters=3)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_type(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].to(torch.float64)
    with pytest.raises(TypeError, match=f"{name} is torch.float64"):
        linear_sm100.linear(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shape(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].repeat(*([1] * (tensors[name].ndim - 1)), 2)
    # With twice the bytes in mA, mB does not fit.
    with pytest.raises(ValueError, match=f"{'mB' if name == 'mA' else name} has shape .* expected"):
        linear_sm100.linear(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_device(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=r"is on (meta|cpu), expected (cpu|meta)"):
        linear_sm100.linear(**tensors)


@pytest.mark.parametrize("name", ["mA", "mB", "mSFA", "mSFB", "mD"])
def test_not_contiguous(name: str) -> None:
    tensors = arguments()
    columns = tensors[name].shape[1]
    tensors[name] = tensors[name].repeat(1, 2)[:, :columns]
    with pytest.raises(ValueError, match=f"{name} has strides"):
        linear_sm100.linear(**tensors)


@pytest.mark.parametrize("name", NAMES)
def test_misaligned(name: str) -> None:
    tensors = arguments()
    tensors[name] = misaligned(tensors[name])
    with pytest.raises(ValueError, match=f"{name} starts at 0x"):
        linear_sm100.linear(**tensors)


@pytest.mark.parametrize(("k", "n"), [(48, 136), (16, 136), (0, 136)])
def test_k_that_tma_cannot_load(k: int, n: int) -> None:
    tensors = arguments()
    tensors["mA"], tensors["mB"] = torch.zeros(7, k // 2, dtype=torch.uint8), torch.zeros(n, k // 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"k is {k}, expected a positive multiple of 32"):
        linear_sm100.linear(**tensors)


@pytest.mark.parametrize("n", [0, 4, 129])
def test_n_that_tma_cannot_store(n: int) -> None:
    tensors = arguments()
    tensors["mB"] = torch.zeros(n, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"n is {n}, expected a positive multiple of 8"):
        linear_sm100.linear(**tensors)


def test_no_clusters() -> None:
    with pytest.raises(ValueError, match="max_active_clusters is 0"):
        linear_sm100.linear(**arguments(), max_active_clusters=0)


# ---- configurations -------------------------------------------------------------------------------------------------

# DeepSeek-V4's linears, n and k of the whole model, and which of them tensor parallelism divides. q_a and kv, compressor's
# kv and gate, and the shared expert's gate and up are merged.
LINEARS = {
    "pro wq_a+wkv": (2048, 7168, ""),
    "pro wq_b": (65536, 1536, "n"),
    "pro wo_b": (7168, 16384, "k"),
    "pro compressor, ratio 128": (1024, 7168, ""),
    "pro compressor, ratio 4": (2048, 7168, ""),
    "pro compressor wgate, ratio 128": (512, 7168, ""),
    "pro indexer compressor": (512, 7168, ""),
    "pro indexer wq_b": (8192, 1536, ""),
    "pro indexer weights_proj": (64, 7168, ""),
    "pro shared gate+up": (6144, 7168, "n"),
    "pro shared down": (7168, 3072, "k"),
    "pro mtp e_proj": (7168, 7168, ""),
    "flash wq_a+wkv": (1536, 4096, ""),
    "flash wq_b": (32768, 1024, "n"),
    "flash wo_b": (4096, 8192, "k"),
    "flash compressor, ratio 128": (1024, 4096, ""),
    "flash compressor, ratio 4": (2048, 4096, ""),
    "flash indexer compressor": (512, 4096, ""),
    "flash indexer wq_b": (8192, 1024, ""),
    "flash indexer weights_proj": (64, 4096, ""),
    "flash shared gate+up": (4096, 4096, "n"),
    "flash shared down": (4096, 2048, "k"),
    "flash mtp e_proj": (4096, 4096, ""),
}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", LINEARS)
def test_every_v4_linear_has_a_config(name: str, tp: int) -> None:
    n, k, divided = LINEARS[name]
    n, k = n // (tp if divided == "n" else 1), k // (tp if divided == "k" else 1)
    assert n % linear_sm100.N_MULTIPLE == 0
    assert k % linear_sm100.K_MULTIPLE == 0
    for m in (1, 7, 128, 1000, 65536):
        config = choose_config(Shape(m, n, k))
        assert config.validate() is config
        assert config.tmem_columns <= 512
        assert config.smem_bytes <= 232448


def test_few_kernels_serve_every_shape() -> None:
    shapes = [Shape(m, n, k) for m in (1, 5, 130, 4096) for n, k, _ in LINEARS.values()]
    assert len({choose_config(shape) for shape in shapes}) <= 3


def test_small_batches_get_small_tiles() -> None:
    assert choose_config(Shape(1, 2048, 7168)).tile_n == 64
    assert choose_config(Shape(8192, 65536, 1536)).tile_n == 256


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(128, 5, 2, arch="sm_90a"), "arch is 'sm_90a'"),
        (Config(96, 2, 2), "tile_n is 96"),
        (Config(128, 1, 2), "too few stages"),
        (Config(128, 2, 0), "too few stages"),
        (Config(128, 7, 2), "bytes of shared memory"),
        (Config(256, 3, 2), "1024 TMEM columns"),
    ],
)
def test_impossible_configs_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_100'"):
        choose_config(Shape(1, 8, 64), arch="sm_100")


def test_ptx_is_of_the_architecture() -> None:
    text = linear_sm100.compiled(largest_config(64, ARCHS["sm_100a"])).artifacts.PTX
    assert ".target sm_100a" in text
    if os.environ.get("CUTE_DSL_LINEINFO") == "1":
        assert "linear_sm100.py" in text
