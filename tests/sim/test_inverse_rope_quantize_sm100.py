"""wo_a's input on Blackwell: simulated, byte for byte that of the reference's two steps; every contract."""

from typing import Any

import pytest
import torch
from covering import run_pairs
from quantize_kit import SPECIAL_SCALES, Outputs, random_rows, simulated, special_rows

import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import inverse_rope_quantize_sm100 as kernels
from cutedsl.kernels.inverse_rope_quantize_sm100 import Config, choose_config
from cutedsl.kernels.quantize_sm100 import NARROW_LOAD, WIDE_LOAD
from cutedsl.reference.wo_a import inverse_rope
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

MAX_POS = 37


def make_cache(rope_dim: int, seed: int = 0) -> torch.Tensor:
    """(MAX_POS, rope_dim) fp32: cosines and sines as a model has them."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(MAX_POS, rope_dim // 2, generator=generator) * 100
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def simulate(
    o: torch.Tensor,
    cache: torch.Tensor,
    num_groups: int,
    tensor_scale: float,
    ctas: int | None,
    policy: str,
    seed: int,
) -> ptxsim.Report:
    num_tokens, num_heads, head_dim = o.shape
    positions = torch.randint(0, MAX_POS, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    positions[0] = MAX_POS - 1
    d_in, padded = num_heads // num_groups * head_dim, -(-num_tokens // 128) * 128
    scale = torch.tensor([tensor_scale])
    restored = inverse_rope(o, positions, cache, cache.shape[1]).reshape(num_tokens, num_groups, d_in)
    outputs = Outputs(num_groups * padded, d_in)
    for group in range(num_groups):
        outputs.expect(slice(group * padded, group * padded + num_tokens), restored[:, group], scale)
    with simulated(kernels, policy, seed) as reports:
        kernels.inverse_rope_quantize(o, positions, cache, scale, num_groups, outputs.codes, outputs.scales, ctas)
    outputs.check()
    (report,) = reports
    return report


def random_o(num_tokens: int, num_heads: int, head_dim: int, seed: int) -> torch.Tensor:
    return random_rows(num_tokens, num_heads * head_dim, seed).view(num_tokens, num_heads, head_dim)


# T, heads, groups, CTAs of a group.
SHAPES = [(1, 1, 1, 1), (7, 4, 2, None), (2, 16, 8, 1), (64, 2, 1, 2), (129, 1, 1, 5)]


def test_shapes(matrix) -> None:
    def case(policy: str, seed: int, shape: tuple[int, int, int, int | None]) -> ptxsim.Report:
        num_tokens, num_heads, num_groups, ctas = shape
        o = random_o(num_tokens, num_heads, 512, seed)
        return simulate(o, make_cache(64, seed), num_groups, 0.0021, ctas, policy, seed)

    matrix(case, seeds=(0, 1), shape=SHAPES)


# T, heads, groups: other heads are smaller, so that more tokens are affordable.
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(64, 16), (64, 64), (192, 48)])
def test_other_heads(matrix, head_dim: int, rope_dim: int) -> None:
    def case(policy: str, seed: int, shape: tuple[int, int, int]) -> ptxsim.Report:
        num_tokens, num_heads, num_groups = shape
        o = random_o(num_tokens, num_heads, head_dim, seed)
        return simulate(o, make_cache(rope_dim), num_groups, 0.0021, 3, policy, seed)

    matrix(case, shape=[(7, 6, 3), (130, 2, 2), (820 if head_dim == 64 else 5, 1, 1)])


@pytest.mark.full
def test_all_sizes(matrix) -> None:
    def case(policy: str, seed: int, num_tokens: int, num_groups: int) -> ptxsim.Report:
        o = random_o(num_tokens, 2 * num_groups, 512, seed)
        return simulate(o, make_cache(64, seed), num_groups, 0.0021, 1 + num_tokens % 9, policy, seed)

    run_pairs(matrix, case, seeds=(0, 1, 2), num_tokens=(1, 7, 64, 129, 820), num_groups=(1, 2))


@pytest.mark.parametrize("tensor_scale", SPECIAL_SCALES)
def test_special_values(matrix, tensor_scale: float) -> None:
    cache = make_cache(64)
    # Rotations by nothing, by a quarter, and by what no angle gives.
    cache[MAX_POS - 1] = torch.tensor([1.0, 0.0]).repeat_interleave(32)
    cache[1] = torch.tensor([0.0, -1.0]).repeat_interleave(32)
    cache[2, :40] = float("inf")
    cache[3, 3], cache[3, 40] = float("nan"), 3e38

    def case(policy: str, seed: int, scaled: bool) -> ptxsim.Report:
        blocks = special_rows(4, tensor_scale if scaled else 1.0)
        # All special blocks are in the rotated part of some head.
        o = torch.zeros(len(blocks), 2, 512, dtype=torch.bfloat16)
        o[:, 0, -64:], o[:, 1, 64:128] = blocks, blocks
        return simulate(o, cache, 2, tensor_scale, 2, policy, seed)

    matrix(case, seeds=(0, 1), scaled=(False, True))


def test_products_and_sums_are_rounded_one_by_one(matrix) -> None:
    # a cos + b sin nearly cancels: what is left is what the products' roundings made, so that a fused one shows.
    generator = torch.Generator().manual_seed(3)
    o = torch.zeros(8, 1, 512, dtype=torch.bfloat16)
    o[..., -64:] = torch.rand(8, 1, 32, generator=generator).add(1).bfloat16().repeat_interleave(2, -1)
    cos = torch.rand(MAX_POS, 32, generator=generator).add(0.1)
    cache = torch.cat((cos, torch.nextafter(-cos, torch.tensor(0.0))), dim=1)
    cache[:, 32::2] *= -1
    a, b = o[..., -64::2].double(), o[..., -63::2].double()
    cos, sin = cache[:, None, :32].double(), cache[:, None, 32:].double()
    apart = inverse_rope(o, torch.arange(8), cache, 64)[..., -64:]
    fused = torch.stack((a * cos[:8] + (b * sin[:8]).float(), b * cos[:8] - (a * sin[:8]).float()), -1).flatten(-2)
    assert (apart != fused.float().bfloat16()).sum() > 50

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(o, cache, 1, 2.0**-35, 2, policy, seed)

    matrix(case)


def test_strided(matrix) -> None:
    heads = random_o(5, 6, 512, 0)
    wide = random_rows(5, 2 * 600, 1).view(5, 2, 600)
    sources = {
        "every other head": (heads[:, ::2], 3, WIDE_LOAD),
        "heads of a larger tensor": (heads[1:, 1:5], 2, WIDE_LOAD),
        "heads before tokens": (heads.transpose(0, 1).contiguous().transpose(0, 1), 6, WIDE_LOAD),
        "columns from 8 on": (wide[..., 8:520], 1, WIDE_LOAD),
        "columns from 3 on": (wide[..., 3:515], 2, NARROW_LOAD),
    }

    def case(policy: str, seed: int, source: str) -> ptxsim.Report:
        o, num_groups, load_bytes = sources[source]
        assert choose_config(o, 64).load_bytes == load_bytes
        return simulate(o, make_cache(64), num_groups, 0.0021, 2, policy, seed)

    matrix(case, source=sources)


# ---- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "ctas", "expected"), [(1, 99, 1), (7, 99, 4), (7, 3, 3)])
def test_grid(num_tokens: int, ctas: int, expected: int) -> None:
    tensors = arguments(num_tokens)
    num_groups = tensors.pop("num_groups")
    (launch,) = capture(kernels.compiled(Config()), *tensors.values(), ctas)
    assert (launch.grid, launch.block) == ((expected, num_groups, 1), (128, 1, 1))


def test_no_tokens_launch_nothing() -> None:
    # Without a GPU a launch would fail.
    kernels.inverse_rope_quantize(**arguments(num_tokens=0))


def test_sizes_do_not_compile_again() -> None:
    compiled = {
        kernels.compiled(choose_config(torch.zeros(t, h, 512, dtype=torch.bfloat16), 64))
        for t, h in ((1, 128), (129, 16), (5, 1))
    }
    assert len(compiled) == 1
    keys = [key for key in compiler.cached_keys() if key.kernel.endswith("InverseRopeQuantizeSm100")]
    assert len({(key.config, key.options) for key in keys}) == len(keys)


@pytest.mark.parametrize("load_bytes", [WIDE_LOAD, NARROW_LOAD])
def test_arithmetic_is_as_written(load_bytes: int) -> None:
    text = kernels.compiled(Config(load_bytes=load_bytes)).artifacts.PTX
    assert ".target sm_100a" in text
    # Four products a pair, not packed: see cutedsl.kernels.rounding.
    assert text.count("mul.rn.f32x2") == 0
    assert text.count("mul.rn.f32 ") >= 32
    assert text.count("add.rn.f32x2") == 8
    assert text.count("div.rn.f32") == 17
    assert text.count("cvt.rn.satfinite.e2m1x2.f32") == 8
    for loose in ("approx", ".ftz", "fma.", "div.full", "rcp."):
        assert loose not in text, loose


# ---- contracts -------------------------------------------------------------------------------------------------------


def arguments(num_tokens: int = 7) -> dict[str, Any]:
    num_groups = 2
    outputs = Outputs(num_groups * (-(-num_tokens // 128) * 128), 2 * 512)
    return {
        "o": torch.zeros(num_tokens, 4, 512, dtype=torch.bfloat16),
        "positions": torch.zeros(num_tokens, dtype=torch.int64),
        "cos_sin_cache": torch.zeros(MAX_POS, 64),
        "tensor_scale": torch.ones(1),
        "num_groups": num_groups,
        "codes": outputs.codes,
        "scales": outputs.scales,
    }


TENSORS = [name for name in arguments() if name != "num_groups"]


def test_the_contract_accepts_what_is_right() -> None:
    kernels.check(**arguments(), max_ctas=3)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_type(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].to(torch.float64)
    with pytest.raises(TypeError, match=f"{name} is torch.float64"):
        kernels.inverse_rope_quantize(**tensors)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_shape(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].unsqueeze(0)
    with pytest.raises(ValueError, match=f"{name} has shape .* expected"):
        kernels.inverse_rope_quantize(**tensors)


@pytest.mark.parametrize("name", ["positions", "tensor_scale", "codes", "scales"])
def test_wrong_size(name: str) -> None:
    tensors = arguments()
    tensors[name] = torch.cat((tensors[name].view(torch.uint8), tensors[name].view(torch.uint8)))
    tensors[name] = tensors[name].view(arguments()[name].dtype)
    with pytest.raises(ValueError, match=f"{name} has shape .* expected"):
        kernels.inverse_rope_quantize(**tensors)


@pytest.mark.parametrize("name", TENSORS[1:])
def test_wrong_device(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, expected cpu"):
        kernels.inverse_rope_quantize(**tensors)


@pytest.mark.parametrize("name", ["cos_sin_cache", "codes", "scales"])
def test_not_contiguous(name: str) -> None:
    tensors = arguments()
    tensors[name] = tensors[name].repeat(1, 2)[:, : tensors[name].shape[1]]
    with pytest.raises(ValueError, match=f"{name} has strides"):
        kernels.inverse_rope_quantize(**tensors)


@pytest.mark.parametrize("name", ["cos_sin_cache", "codes", "scales"])
def test_misaligned(name: str) -> None:
    tensors = arguments()
    flat = torch.zeros(tensors[name].nbytes + 16, dtype=torch.uint8)
    tensors[name] = flat[8:-8].view(tensors[name].dtype).view(tensors[name].shape)
    with pytest.raises(ValueError, match=f"{name} .*starts at 0x"):
        kernels.inverse_rope_quantize(**tensors)


def test_elements_not_side_by_side() -> None:
    tensors = arguments()
    tensors["o"] = tensors["o"].repeat(1, 1, 2)[..., ::2]
    with pytest.raises(ValueError, match="o has strides"):
        kernels.inverse_rope_quantize(**tensors)


@pytest.mark.parametrize("num_groups", [0, 3, -2, 8])
def test_groups_that_do_not_divide_the_heads(num_groups: int) -> None:
    with pytest.raises(ValueError, match=f"num_groups is {num_groups}, expected a divisor of 4 heads"):
        kernels.inverse_rope_quantize(**arguments() | {"num_groups": num_groups})


@pytest.mark.parametrize("head_dim", [0, 32, 500])
def test_head_dim_that_is_no_scale_tiles(head_dim: int) -> None:
    o = torch.zeros(7, 4, head_dim, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}, expected a positive multiple of 64"):
        kernels.inverse_rope_quantize(**arguments() | {"o": o})


@pytest.mark.parametrize("rope_dim", [0, 8, 40, 528])
def test_rope_dim_that_is_no_blocks(rope_dim: int) -> None:
    cache = torch.zeros(MAX_POS, rope_dim)
    with pytest.raises(ValueError, match=r"cos_sin_cache has shape .* multiple of 16, at most head_dim = 512"):
        kernels.inverse_rope_quantize(**arguments() | {"cos_sin_cache": cache})


def test_too_many_blocks() -> None:
    tensors = arguments()
    num_tokens = 1 << 18
    shapes = {"o": (num_tokens, 256, 512), "positions": (num_tokens,)}
    shapes |= {"codes": (num_tokens, 65536), "scales": (num_tokens, 8192)}
    for name in TENSORS:
        shape = shapes.get(name, tensors[name].shape)
        tensors[name] = torch.empty(shape, dtype=tensors[name].dtype, device="meta")
    with pytest.raises(ValueError, match="are 2147483648 blocks, expected at most 2\\^30"):
        kernels.inverse_rope_quantize(**tensors | {"num_groups": 1})


def test_no_ctas() -> None:
    with pytest.raises(ValueError, match="max_ctas is 0"):
        kernels.inverse_rope_quantize(**arguments(), max_ctas=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(arch="sm_90a"), "arch is 'sm_90a'"),
        (Config(load_bytes=4), "load_bytes is 4"),
        (Config(head_dim=96), "head_dim is 96"),
        (Config(rope_dim=24), "rope_dim is 24"),
        (Config(head_dim=64, rope_dim=80), "rope_dim is 80"),
    ],
)
def test_impossible_configs_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()
