"""Quantization on Blackwell: simulated, byte for byte the reference's, and nothing else written; every contract."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from covering import run_pairs
from quantize_kit import SPECIAL_SCALES, TIES, Outputs, random_rows, simulated, special_rows

import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import quantize_sm100
from cutedsl.kernels.quantize_sm100 import NARROW_LOAD, WIDE_LOAD, Config, choose_config
from cutedsl.layout import max_padded_rows
from cutedsl.quantize import quantize_activation, unpack_codes
from cutedsl.routing import sort_by_expert
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

TENSOR_SCALE = 0.0021


def simulate(x: torch.Tensor, tensor_scale: float, ctas: int | None, policy: str, seed: int) -> ptxsim.Report:
    """Quantizes (M, K) or (T, G, D) and compares all bytes."""
    grouped = quantize_sm100.grouped(x)
    num_tokens, num_groups, k = grouped.shape
    padded = -(-num_tokens // 128) * 128
    outputs = Outputs(num_groups * padded if x.ndim == 3 else num_tokens, k)
    scale = torch.tensor([tensor_scale])
    for group in range(num_groups):
        first = group * padded
        outputs.expect(slice(first, first + num_tokens), grouped[:, group], scale)
    with simulated(quantize_sm100, policy, seed) as reports:
        quantize_sm100.quantize(x, scale, outputs.codes, outputs.scales, ctas)
    outputs.check()
    (report,) = reports
    return report


# M, K, CTAs: K of a part of a scale tile, of one, of several; fewer threads than blocks, and more.
SHAPES = [
    (1, 16, 1),
    (7, 64, 4),
    (64, 512, 3),
    (129, 48, 2),
    (129, 176, None),
    (820, 16, 5),
    (820, 64, 1),
    (5, 1536, 7),
    (1, 7168, 2),
]


def test_shapes(matrix) -> None:
    def case(policy: str, seed: int, shape: tuple[int, int, int | None]) -> ptxsim.Report:
        m, k, ctas = shape
        return simulate(random_rows(m, k, seed), TENSOR_SCALE, ctas, policy, seed)

    matrix(case, seeds=(0, 1), shape=SHAPES)


@pytest.mark.full
def test_all_sizes(matrix) -> None:
    def case(policy: str, seed: int, m: int, k: int) -> ptxsim.Report:
        return simulate(random_rows(m, k, seed), TENSOR_SCALE, 1 + (m + k) % 9, policy, seed)

    run_pairs(matrix, case, seeds=(0, 1, 2), m=(1, 7, 64, 129, 820), k=(16, 64, 512, 1536))


@pytest.mark.parametrize("tensor_scale", SPECIAL_SCALES)
def test_special_values(matrix, tensor_scale: float) -> None:
    def case(policy: str, seed: int, scaled: bool) -> ptxsim.Report:
        # Once as they are, once such that they have the same place in the range of the scale.
        return simulate(special_rows(7, tensor_scale if scaled else 1.0), tensor_scale, 1, policy, seed)

    matrix(case, scaled=(False, True))


def test_special_values_are_special() -> None:
    packed, block_sf = quantize_activation(special_rows(1), torch.tensor(1.0))
    scales = block_sf.view(torch.uint8)
    for scale in (0, 0x7E, 0x7F):
        assert (scales == scale).sum() >= 3, f"few blocks have the scale {scale:#x}"
    assert set(unpack_codes(packed).flatten().tolist()) == set(range(16))


@pytest.mark.parametrize("tensor_scale", [1.0, TENSOR_SCALE, 1e-36])
def test_every_bf16_number(matrix, tensor_scale: float) -> None:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # Neighbours differ in their last bits, so that every number is quantized with a scale that fits it.
    x = numbers.view(64, 1024)

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate(x, tensor_scale, 4, policy, seed)

    matrix(case, policies=("eager",))


def test_random_bits(matrix) -> None:
    def case(policy: str, seed: int, spread: int) -> ptxsim.Report:
        generator = torch.Generator().manual_seed(seed * 100 + spread)
        mantissas = torch.randint(0, 128, (64, 256), generator=generator)
        signs = torch.randint(0, 2, (64, 256), generator=generator) << 15
        first = torch.randint(0, 255 - spread, (64, 16), generator=generator).repeat_interleave(16, 1)
        exponents = first + torch.randint(0, spread, (64, 256), generator=generator)
        bits = signs | exponents << 7 | mantissas
        tensor_scale = float(torch.rand((), generator=generator) * 2.0 ** (spread - 8))
        return simulate(bits.to(torch.int16).view(torch.bfloat16), tensor_scale, 4, policy, seed)

    matrix(case, policies=("random",), seeds=(0, 1, 2), spread=(1, 5, 12))


# ---- rows that are strided or in groups ------------------------------------------------------------------------------


class Source(NamedTuple):
    """A view of random rows, and the load that its alignment allows."""

    x: torch.Tensor
    load_bytes: int


def sources() -> dict[str, Source]:
    wide = random_rows(9, 208, 0)
    return {
        "a slice of columns": Source(wide[:, 16:112], WIDE_LOAD),
        "a slice that starts at 8": Source(wide[:, 8:104], WIDE_LOAD),
        "a slice that starts at 1": Source(wide[:, 1:97], NARROW_LOAD),
        "every other row": Source(wide[::2], WIDE_LOAD),
        "rows of an odd size": Source(random_rows(3, 128, 1).flatten()[: 3 * 113].view(3, 113)[:, :112], NARROW_LOAD),
        "groups": Source(random_rows(7, 3 * 48, 2).view(7, 3, 48), WIDE_LOAD),
        "groups of many rows": Source(random_rows(130, 2 * 32, 3).view(130, 2, 32), WIDE_LOAD),
        "one group": Source(random_rows(3, 64, 4).view(3, 1, 64), WIDE_LOAD),
        "groups, one after another": Source(random_rows(2 * 5, 80, 5).view(2, 5, 80).transpose(0, 1), WIDE_LOAD),
        "groups between others": Source(random_rows(5, 256, 6).view(5, 4, 64)[:, 1:3, 3:51], NARROW_LOAD),
        "one row": Source(random_rows(1, 64, 7), WIDE_LOAD),
        "the same row": Source(random_rows(1, 64, 8).expand(5, 64), WIDE_LOAD),
    }


def test_strided_and_grouped(matrix) -> None:
    def case(policy: str, seed: int, source: str) -> ptxsim.Report:
        x, load_bytes = sources()[source]
        assert choose_config(x, by_slot=False).load_bytes == load_bytes
        return simulate(x, TENSOR_SCALE, 2, policy, seed)

    matrix(case, source=sources())


# ---- slots ---------------------------------------------------------------------------------------------------------


class Slots(NamedTuple):
    """quantize_slots' arguments before the outputs."""

    x: torch.Tensor
    tensor_scale: torch.Tensor
    slot_token: torch.Tensor
    slot_row: torch.Tensor
    num_slots: torch.Tensor
    tile_expert: torch.Tensor


def make_slots(x: torch.Tensor, topk_ids: torch.Tensor, num_experts: int) -> Slots:
    routing = sort_by_expert(topk_ids, num_experts)
    offsets = routing.expert_offset
    counts = offsets.diff()
    tiles = (counts + 127) // 128
    padded_offset = torch.nn.functional.pad(tiles * 128, (1, 0)).cumsum(0)
    num_slots = int(offsets[-1])
    tile_expert = torch.full((max_padded_rows(topk_ids.numel(), num_experts) // 128,), -1)
    tile_expert[: int(tiles.sum())] = torch.arange(num_experts).repeat_interleave(tiles)
    expert = torch.arange(num_experts).repeat_interleave(counts)
    row = torch.arange(num_slots) - offsets[expert] + padded_offset[expert]
    # Behind the last slot that has an expert the maps hold nothing that may be used.
    slot_row = torch.full((topk_ids.numel(),), -(1 << 30))
    slot_row[:num_slots] = row
    slot_token = routing.slot_token.clone()
    slot_token[num_slots:] = 1 << 30
    scales = torch.rand(num_experts, generator=torch.Generator().manual_seed(num_experts)).add(0.1) * 0.01
    integers = (tensor.to(torch.int32) for tensor in (slot_token, slot_row, torch.tensor([num_slots]), tile_expert))
    return Slots(x, scales, *integers)


def simulate_slots(slots: Slots, ctas: int | None, policy: str, seed: int) -> ptxsim.Report:
    outputs = Outputs(len(slots.tile_expert) * 128, slots.x.shape[1])
    for slot in range(int(slots.num_slots)):
        row = int(slots.slot_row[slot])
        scale = slots.tensor_scale[slots.tile_expert[row // 128]]
        outputs.expect(slice(row, row + 1), slots.x[slots.slot_token[slot], None], scale)
    with simulated(quantize_sm100, policy, seed) as reports:
        quantize_sm100.quantize_slots(*slots, outputs.codes, outputs.scales, ctas)
    outputs.check()
    (report,) = reports
    return report


def random_ids(num_tokens: int, top_k: int, num_experts: int, elsewhere: float) -> torch.Tensor:
    """Different experts for each token; some choices belong to other ranks."""
    generator = torch.Generator().manual_seed(num_tokens * 100 + num_experts)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    return torch.where(torch.rand(ids.shape, generator=generator) < elsewhere, -1, ids)


ROUTINGS: dict[str, tuple[torch.Tensor, int]] = {
    "one token": (torch.tensor([[2, 0]]), 3),
    "one expert": (torch.zeros(129, 1, dtype=torch.int64), 1),
    "nothing here": (torch.full((5, 4), -1), 2),
    "only the last expert": (torch.tensor([[-1, 6], [6, -1], [6, 99]]), 7),
    "many experts, few tokens": (random_ids(7, 6, 40, 0.4), 40),
    "ragged": (torch.cat((torch.full((130, 1), 3), torch.full((128, 1), 1), torch.full((1, 1), 0))), 5),
    "820 tokens": (random_ids(820, 1, 4, 0.2), 4),
}


def test_slots(matrix) -> None:
    def case(policy: str, seed: int, routing: str) -> ptxsim.Report:
        topk_ids, num_experts = ROUTINGS[routing]
        k = 16 if len(topk_ids) > 200 else 176
        return simulate_slots(make_slots(random_rows(len(topk_ids), k, 1), topk_ids, num_experts), 3, policy, seed)

    matrix(case, seeds=(0, 1), routing=ROUTINGS)


def test_slots_of_misaligned_rows(matrix) -> None:
    topk_ids, num_experts = ROUTINGS["many experts, few tokens"]
    x = random_rows(len(topk_ids), 128, 0)[:, 5:101]
    assert choose_config(x, by_slot=True).load_bytes == NARROW_LOAD

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate_slots(make_slots(x, topk_ids, num_experts), None, policy, seed)

    matrix(case)


class Edge(NamedTuple):
    """Blocks whose bytes change if an operation is done in another way; each has its own tensor scale."""

    blocks: torch.Tensor
    tensor_scale: torch.Tensor


def uniform(generator: torch.Generator, count: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def near(exact: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """exact in FP32, up to two steps away."""
    steps = torch.randint(-2, 3, exact.shape, generator=generator, dtype=torch.int32)
    return (exact.float().view(torch.int32) + steps).view(torch.float32)


def scale_edges(count: int) -> Edge:
    """amax / (6 * tensor_scale) is where E4M3 rounds up or down, and not the same in another order."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.arange(0x08, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = ((scales[1:] + scales[:-1]) / 2)[torch.randint(0, len(scales) - 1, (count,), generator=generator)]
    amax = uniform(generator, count, 1, 2).bfloat16().float()
    tensor_scale = near(amax.double() / (6 * middles), generator)
    found = (amax / (6 * tensor_scale)).to(torch.float8_e4m3fn).float()
    keep = torch.zeros(count, dtype=torch.bool)
    one = torch.tensor(1.0)
    for other in (amax / 6 / tensor_scale, amax * (one / (6 * tensor_scale)), amax / tensor_scale / 6):
        differs = found != other.to(torch.float8_e4m3fn).float()
        assert differs.sum() >= 8
        keep[differs.nonzero()[:16]] = True
    blocks = torch.zeros(int(keep.sum()), 16)
    blocks[:, 0] = amax[keep]
    return Edge(blocks.bfloat16(), tensor_scale[keep])


def code_edges(count: int) -> Edge:
    """x / (block_sf * tensor_scale) is where E2M1 rounds up or down, and not the same in another order."""
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(0, len(TIES), (count,), generator=generator)
    tie = torch.tensor(TIES)[index]
    block_sf = uniform(generator, count, 1, 2).to(torch.float8_e4m3fn).float()
    x = uniform(generator, count, 1, 2).bfloat16().float()
    tensor_scale = near(x.double() / (tie * block_sf).double(), generator)
    amax = (6 * block_sf * tensor_scale).bfloat16().float()
    assert ((amax / (6 * tensor_scale)).to(torch.float8_e4m3fn).float() == block_sf).all()

    def rounds_up(quotient: torch.Tensor) -> torch.Tensor:
        # Of the codes index and index + 1 a tie goes to the even one.
        return (quotient > tie) | (quotient == tie) & (index % 2 == 1)

    divisor = block_sf * tensor_scale
    found = rounds_up(x / divisor)
    keep = torch.zeros(count, dtype=torch.bool)
    one = torch.tensor(1.0)
    for other in (x / block_sf / tensor_scale, x * (one / divisor), (x.double() / (block_sf.double() * tensor_scale))):
        differs = found != rounds_up(other)
        assert differs.sum() >= 8
        keep[differs.nonzero()[:16]] = True
    blocks = torch.zeros(int(keep.sum()), 16)
    blocks[:, 0], blocks[:, 1], blocks[:, 2] = amax[keep], x[keep], -x[keep]
    return Edge(blocks.bfloat16(), tensor_scale[keep])


@pytest.mark.parametrize("edges", [scale_edges, code_edges])
def test_every_operation_is_the_reference_s(matrix, edges: Callable[[int], Edge]) -> None:
    blocks, tensor_scale = edges(200_000)
    num_experts = len(blocks)
    slots = make_slots(blocks, torch.arange(num_experts).unsqueeze(1), num_experts)._replace(tensor_scale=tensor_scale)

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate_slots(slots, 4, policy, seed)

    matrix(case)


# ---- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k", "ctas", "expected"), [(1, 16, 99, 1), (7, 7168, 99, 25), (7, 7168, 4, 4)])
def test_grid(m: int, k: int, ctas: int, expected: int) -> None:
    outputs = Outputs(m, k)
    kernel = quantize_sm100.compiled(Config(by_slot=False))
    x = torch.zeros(m, 1, k, dtype=torch.bfloat16)
    (launch,) = capture(kernel, x, torch.ones(1), outputs.codes, outputs.scales, None, None, None, None, ctas)
    assert (launch.grid, launch.block) == ((expected, 1, 1), (128, 1, 1))


def test_grid_does_not_depend_on_slots_in_use() -> None:
    grids = set()
    for ids in (torch.full((9, 4), -1), torch.zeros(9, 4, dtype=torch.int64)):
        slots = make_slots(random_rows(9, 128, 0), ids, 2)
        outputs = Outputs(len(slots.tile_expert) * 128, 128)
        kernel = quantize_sm100.compiled(Config(by_slot=True))
        x, tensor_scale, *maps = slots
        (launch,) = capture(kernel, x.unsqueeze(1), tensor_scale, outputs.codes, outputs.scales, *maps, 99)
        grids.add(launch.grid)
    assert grids == {(3, 1, 1)}


def test_no_rows_launch_nothing() -> None:
    # Without a GPU a launch would fail.
    quantize_sm100.quantize(**dense_arguments(m=0))
    quantize_sm100.quantize(**dense_arguments(m=0) | {"x": torch.zeros(0, 3, 64, dtype=torch.bfloat16)})
    x = torch.zeros(0, 64, dtype=torch.bfloat16)
    outputs = Outputs(0, 64)
    quantize_sm100.quantize_slots(
        *make_slots(x, torch.zeros(0, 2, dtype=torch.int64), 3), outputs.codes, outputs.scales
    )


def test_sizes_do_not_compile_again() -> None:
    kernels = {
        quantize_sm100.compiled(choose_config(torch.zeros(m, k, dtype=torch.bfloat16), by_slot=False))
        for m, k in ((1, 16), (7, 7168), (820, 512))
    }
    assert len(kernels) == 1
    keys = [key for key in compiler.cached_keys() if key.kernel.endswith(".QuantizeSm100")]
    assert len({(key.config, key.options) for key in keys}) == len(keys)
    assert len({key.config for key in keys}) <= 4


@pytest.mark.parametrize(("by_slot", "load_bytes"), list(itertools.product((False, True), (WIDE_LOAD, NARROW_LOAD))))
def test_arithmetic_is_as_written(by_slot: bool, load_bytes: int) -> None:
    text = quantize_sm100.compiled(Config(by_slot, load_bytes)).artifacts.PTX
    assert ".target sm_100a" in text
    assert text.count("div.rn.f32") == 17
    assert text.count("cvt.rn.satfinite.e2m1x2.f32") == 8
    assert text.count("cvt.rn.satfinite.e4m3x2.f32") == 1
    assert text.count("ld.global.v4.b32") == (2 if load_bytes == WIDE_LOAD else 0)
    for loose in ("approx", ".ftz", "fma.", "div.full", "rcp."):
        assert loose not in text, loose


# ---- contracts -------------------------------------------------------------------------------------------------------


def dense_arguments(m: int = 7, k: int = 64) -> dict[str, Any]:
    outputs = Outputs(m, k)
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    return {"x": x, "tensor_scale": torch.ones(1), "codes": outputs.codes, "scales": outputs.scales}


def slot_arguments() -> dict[str, Any]:
    slots = make_slots(torch.zeros(7, 64, dtype=torch.bfloat16), random_ids(7, 2, 4, 0.3), 4)
    outputs = Outputs(len(slots.tile_expert) * 128, 64)
    return slots._asdict() | {"codes": outputs.codes, "scales": outputs.scales}


ENTRIES: dict[str, tuple[Any, Any]] = {
    "dense": (quantize_sm100.quantize, dense_arguments),
    "slots": (quantize_sm100.quantize_slots, slot_arguments),
}
TENSORS = [(entry, name) for entry, (_, arguments) in ENTRIES.items() for name in arguments()]
# What has no size of its own, so that another size is an error of another tensor.
SIZES_OF_OTHERS = {
    ("slots", "tensor_scale"),
    ("slots", "tile_expert"),
    ("slots", "slot_token"),
    ("dense", "x"),
    ("slots", "x"),
}


def test_the_contract_accepts_what_is_right() -> None:
    quantize_sm100.check(**dense_arguments(), max_ctas=3)
    quantize_sm100.check_slots(**slot_arguments(), max_ctas=3)


@pytest.mark.parametrize(("entry", "name"), TENSORS)
def test_wrong_type(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors[name] = tensors[name].to(torch.float64)
    with pytest.raises(TypeError, match=f"{name} is torch.float64"):
        function(**tensors)


@pytest.mark.parametrize(("entry", "name"), [place for place in TENSORS if place not in SIZES_OF_OTHERS])
def test_wrong_shape(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors[name] = torch.cat((tensors[name].view(torch.uint8), tensors[name].view(torch.uint8)))
    tensors[name] = tensors[name].view(arguments()[name].dtype)
    with pytest.raises(ValueError, match=f"{name} has shape .* expected"):
        function(**tensors)


@pytest.mark.parametrize(("entry", "name"), sorted(SIZES_OF_OTHERS))
def test_shapes_that_do_not_fit(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors[name] = tensors[name].unsqueeze(0).unsqueeze(0)
    with pytest.raises(ValueError, match=f"{name} has shape .* expected"):
        function(**tensors)


@pytest.mark.parametrize(("entry", "name"), [place for place in TENSORS if place[1] != "x"])
def test_wrong_device(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, expected cpu"):
        function(**tensors)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["codes", "scales"])
def test_outputs_not_contiguous(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors[name] = tensors[name].repeat(1, 2)[:, : tensors[name].shape[1]]
    with pytest.raises(ValueError, match=f"{name} has strides"):
        function(**tensors)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["codes", "scales"])
def test_outputs_misaligned(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    flat = torch.zeros(tensors[name].numel() + 16, dtype=torch.uint8)
    tensors[name] = flat[8:-8].view(tensors[name].shape).view(tensors[name].dtype)
    with pytest.raises(ValueError, match=f"{name} starts at 0x"):
        function(**tensors)


@pytest.mark.parametrize("entry", ENTRIES)
def test_columns_not_side_by_side(entry: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors["x"] = tensors["x"].repeat(1, 2)[:, ::2]
    with pytest.raises(ValueError, match="x has strides"):
        function(**tensors)


@pytest.mark.parametrize("shape", [(7, 8), (7, 0), (7, 24), (7, 0, 64), (7, 3, 40)])
def test_k_that_is_no_blocks(shape: tuple[int, ...]) -> None:
    tensors = dense_arguments() | {"x": torch.zeros(shape, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"x has shape .* multiple of 16"):
        quantize_sm100.quantize(**tensors)


def test_too_many_blocks() -> None:
    meta = dense_arguments()
    rows = (1 << 24) + 128
    shapes = {"x": (rows, 1024), "codes": (rows, 512), "scales": (rows, 64)}
    for name, shape in shapes.items():
        meta[name] = torch.empty(shape, dtype=meta[name].dtype, device="meta")
    meta["tensor_scale"] = meta["tensor_scale"].to("meta")
    with pytest.raises(ValueError, match="are 1073750016 blocks, expected at most 2\\^30"):
        quantize_sm100.quantize(**meta)


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_ctas(entry: str) -> None:
    function, arguments = ENTRIES[entry]
    with pytest.raises(ValueError, match="max_ctas is 0"):
        function(**arguments(), max_ctas=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [(Config(False, arch="sm_90a"), "arch is 'sm_90a'"), (Config(True, load_bytes=8), "load_bytes is 8")],
)
def test_impossible_configs_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_100'"):
        choose_config(torch.zeros(1, 16), by_slot=False, arch="sm_100")
