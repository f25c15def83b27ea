"""Quantization on Hopper: simulated, byte for byte the reference's, and nothing else written; every contract."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hopper_kit import machine, on_hopper
from kernel_table import facts, find_cubin
from quantize_kit import POISON, SPECIAL_SCALES, TIES, Outputs, assert_same_bytes, random_rows, simulated, special_rows
from test_quantize_sm100 import ROUTINGS, TENSOR_SCALE, Edge, Slots, code_edges, make_slots, scale_edges, sources

import ptxsim
from cutedsl import compile as compiler
from cutedsl.kernels import quantize_sm90, quantize_sm100
from cutedsl.kernels.quantize_sm90 import BF16, CODES, COPY, OUTPUTS, Config, choose_config
from cutedsl.kernels.quantize_sm100 import NARROW_LOAD, WIDE_LOAD
from cutedsl.quantize import quantize_activation, unscaled_activation
from ptxsim.host.capture import capture, prepare_environment

prepare_environment()

__all__ = ["on_hopper"]

GUARD = 64


class Rows:
    """BF16 rows full of poison, with guards around them, and the bits that they must hold after the kernel.

    Args:
        rows, k: of y.
        output: BF16 or COPY.
        any_nan: a NaN may be any NaN; None: unless rows are copied.
    """

    def __init__(self, rows: int, k: int, output: str, any_nan: bool | None = None) -> None:
        self._whole = torch.full((2 * rows * k + 2 * GUARD,), POISON, dtype=torch.uint8)
        self.y = self._whole[GUARD : GUARD + 2 * rows * k].view(rows, 2 * k).view(torch.bfloat16)
        self._output = output
        self._any_nan = output == BF16 if any_nan is None else any_nan
        self._expected = self.y.clone()

    def expect(self, rows: torch.Tensor | slice, x: torch.Tensor, tensor_scale: torch.Tensor) -> None:
        """Rows of y are those of x, as they are or in NVFP4."""
        self._expected[rows] = x if self._output == COPY else unscaled_activation(x, tensor_scale)

    def check(self) -> None:
        """Every bit is as expected, also those that keep their poison."""
        assert (self._whole[:GUARD] == POISON).all(), "bytes before y were written"
        assert (self._whole[-GUARD:] == POISON).all(), "bytes behind y were written"
        found, expected = self.y.clone(), self._expected.clone()
        if self._any_nan:
            for numbers in (found, expected):
                numbers[numbers.isnan()] = float("nan")
        assert_same_bytes("y", found.view(torch.uint8), expected.view(torch.uint8))


def outputs_of(output: str, rows: int, k: int) -> Any:
    return Outputs(rows, k) if output == CODES else Rows(rows, k, output)


def simulate(
    x: torch.Tensor, tensor_scale: float, output: str, ctas: int | None, policy: str, seed: int
) -> ptxsim.Report:
    """Quantizes or copies (M, K) or (T, G, D) and compares all bytes."""
    grouped = quantize_sm100.grouped(x)
    num_tokens, num_groups, k = grouped.shape
    padded = -(-num_tokens // 128) * 128
    out = outputs_of(output, num_groups * padded if x.ndim == 3 else num_tokens, k)
    scale = torch.tensor([tensor_scale])
    for group in range(num_groups):
        first = group * padded
        out.expect(slice(first, first + num_tokens), grouped[:, group], scale)
    with simulated(quantize_sm90, policy, seed) as reports:
        if output == CODES:
            quantize_sm90.quantize(x, scale, out.codes, out.scales, ctas)
        elif output == BF16:
            quantize_sm90.round_rows(x, scale, out.y, ctas)
        else:
            quantize_sm90.copy_rows(x, out.y, ctas)
    out.check()
    (report,) = reports
    return report


# M, K, CTAs: K of a part of a scale tile, of one, of several; fewer threads than parts, and more.
SHAPES = [
    (1, 16, 1),
    (7, 64, 4),
    (64, 512, 6),
    (129, 48, 2),
    (129, 176, None),
    (820, 16, 5),
    (5, 1536, 7),
    (1, 7168, 2),
]


@pytest.mark.parametrize("output", OUTPUTS)
def test_shapes(matrix, output: str) -> None:
    def case(policy: str, seed: int, shape: tuple[int, int, int | None]) -> ptxsim.Report:
        m, k, ctas = shape
        return simulate(random_rows(m, k, seed), TENSOR_SCALE, output, ctas, policy, seed)

    # Pairs of lanes alone meet here, so policies differ only in the order in which warps run.
    matrix(case, policies=("eager", "random"), shape=SHAPES)


@pytest.mark.full
@pytest.mark.parametrize("output", OUTPUTS)
def test_all_sizes(matrix, output: str) -> None:
    def case(policy: str, seed: int, m: int, k: int) -> ptxsim.Report:
        return simulate(random_rows(m, k, seed), TENSOR_SCALE, output, 1 + (m + k) % 9, policy, seed)

    matrix(case, seeds=(0, 1), m=(1, 7, 64, 129, 820), k=(16, 64, 512, 1536))


@pytest.mark.parametrize("tensor_scale", SPECIAL_SCALES)
def test_special_values(matrix, tensor_scale: float) -> None:
    def case(policy: str, seed: int, output: str, scaled: bool) -> ptxsim.Report:
        # Once as they are, once such that they have the same place in the range of the scale.
        x = special_rows(7, tensor_scale if scaled else 1.0)
        return simulate(x, tensor_scale, output, 1, policy, seed)

    matrix(case, policies=("random",), output=(CODES, BF16), scaled=(False, True))


@pytest.mark.parametrize("tensor_scale", [1.0, TENSOR_SCALE, 1e-36])
def test_every_bf16_number(matrix, tensor_scale: float) -> None:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # Neighbours differ in their last bits, so that every number is quantized with a scale that fits it.
    x = numbers.view(64, 1024)

    def case(policy: str, seed: int, output: str) -> ptxsim.Report:
        return simulate(x, tensor_scale, output, 8, policy, seed)

    matrix(case, policies=("eager",), output=(CODES, BF16))


def test_every_number_is_copied(matrix) -> None:
    # A NaN keeps its bits.
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(64, 1024)
    matrix(lambda policy, seed: simulate(x, 1.0, COPY, 8, policy, seed), policies=("eager",))


def test_random_bits(matrix) -> None:
    def case(policy: str, seed: int, output: str, spread: int) -> ptxsim.Report:
        generator = torch.Generator().manual_seed(seed * 100 + spread)
        mantissas = torch.randint(0, 128, (64, 256), generator=generator)
        signs = torch.randint(0, 2, (64, 256), generator=generator) << 15
        first = torch.randint(0, 255 - spread, (64, 16), generator=generator).repeat_interleave(16, 1)
        exponents = first + torch.randint(0, spread, (64, 256), generator=generator)
        bits = signs | exponents << 7 | mantissas
        tensor_scale = float(torch.rand((), generator=generator) * 2.0 ** (spread - 8))
        return simulate(bits.to(torch.int16).view(torch.bfloat16), tensor_scale, output, 8, policy, seed)

    matrix(case, policies=("random",), seeds=(0, 1), output=(CODES, BF16), spread=(1, 5, 12))


@pytest.mark.parametrize("output", OUTPUTS)
def test_strided_and_grouped(matrix, output: str) -> None:
    def case(policy: str, seed: int, source: str) -> ptxsim.Report:
        x, load_bytes = sources()[source]
        assert choose_config(x, output, by_slot=False).load_bytes == load_bytes
        return simulate(x, TENSOR_SCALE, output, 2, policy, seed)

    matrix(case, policies=("random",), source=sources())


def test_codes_are_those_of_blackwell(matrix) -> None:
    x, scale = random_rows(65, 208, 3), torch.tensor([TENSOR_SCALE])

    def case(policy: str, seed: int) -> None:
        found = []
        for module, arch in ((quantize_sm90, "sm_90a"), (quantize_sm100, "sm_100a")):
            out = Outputs(65, 208)
            with machine(arch), simulated(module, policy, seed):
                module.quantize(x, scale, out.codes, out.scales, 4)
            found.append(out)
        assert_same_bytes("codes", found[0].codes, found[1].codes)
        assert_same_bytes("scales", found[0].scales.view(torch.uint8), found[1].scales.view(torch.uint8))

    matrix(case, policies=("eager",))


# ---- slots ---------------------------------------------------------------------------------------------------------


def simulate_slots(slots: Slots, output: str, ctas: int | None, policy: str, seed: int) -> ptxsim.Report:
    out = outputs_of(output, len(slots.tile_expert) * 128, slots.x.shape[1])
    for slot in range(int(slots.num_slots)):
        row = int(slots.slot_row[slot])
        scale = slots.tensor_scale[slots.tile_expert[row // 128]]
        out.expect(slice(row, row + 1), slots.x[slots.slot_token[slot], None], scale)
    x, _, slot_token, slot_row, num_slots, _ = slots
    with simulated(quantize_sm90, policy, seed) as reports:
        if output == CODES:
            quantize_sm90.quantize_slots(*slots, out.codes, out.scales, ctas)
        elif output == BF16:
            quantize_sm90.round_slots(*slots, out.y, ctas)
        else:
            quantize_sm90.copy_slots(x, slot_token, slot_row, num_slots, out.y, ctas)
    out.check()
    (report,) = reports
    return report


@pytest.mark.parametrize("output", OUTPUTS)
def test_slots(matrix, output: str) -> None:
    def case(policy: str, seed: int, routing: str) -> ptxsim.Report:
        topk_ids, num_experts = ROUTINGS[routing]
        k = 16 if len(topk_ids) > 200 else 176
        slots = make_slots(random_rows(len(topk_ids), k, 1), topk_ids, num_experts)
        return simulate_slots(slots, output, 3, policy, seed)

    matrix(case, policies=("eager", "random"), routing=ROUTINGS)


@pytest.mark.parametrize("output", OUTPUTS)
def test_slots_of_misaligned_rows(matrix, output: str) -> None:
    topk_ids, num_experts = ROUTINGS["many experts, few tokens"]
    x = random_rows(len(topk_ids), 128, 0)[:, 5:101]
    assert choose_config(x, output, by_slot=True).load_bytes == NARROW_LOAD

    def case(policy: str, seed: int) -> ptxsim.Report:
        return simulate_slots(make_slots(x, topk_ids, num_experts), output, None, policy, seed)

    matrix(case, policies=("random",))


def quotient_edges(_: int) -> Edge:
    """Every BF16 number with divisors around those where it is a tie; the hardest divisor is next to a power of two."""
    tie = torch.tensor(TIES, dtype=torch.float64)
    x = torch.arange(128, 256, dtype=torch.float64).view(-1, 1, 1)
    around = (x / tie.view(-1, 1)).float().view(torch.int32) + torch.arange(-2, 3, dtype=torch.int32)
    tensor_scale = around.view(torch.float32)
    # The block's scale is 1, so that the tensor scale is the divisor.
    amax = (6 * tensor_scale).bfloat16().float()
    assert ((amax / (6 * tensor_scale)).to(torch.float8_e4m3fn).float() == 1).all()
    # A power of two, and a divisor one step below another: what the two-part reciprocal gives is on the wrong side of a tie.
    assert 0x43FFFFFF in around[0, 0]
    every_third = torch.arange(around.numel()).view(around.shape) % 3 == 0
    every_third[0] = True
    x = x.float().expand(around.shape)[every_third]
    blocks = torch.zeros(len(x), 16)
    blocks[:, 0], blocks[:, 1], blocks[:, 15] = amax[every_third], x, -x
    return Edge(blocks.bfloat16(), tensor_scale[every_third])


@pytest.mark.parametrize("edges", [scale_edges, code_edges, quotient_edges])
def test_every_operation_is_the_reference_s(matrix, edges: Callable[[int], Edge]) -> None:
    blocks, tensor_scale = edges(200_000)
    num_experts = len(blocks)
    slots = make_slots(blocks, torch.arange(num_experts).unsqueeze(1), num_experts)._replace(tensor_scale=tensor_scale)

    def case(policy: str, seed: int, output: str) -> ptxsim.Report:
        return simulate_slots(slots, output, 4, policy, seed)

    matrix(case, policies=("eager",), output=(CODES, BF16))


# ---- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "m", "k", "ctas", "expected"),
    [
        (COPY, 1, 16, 99, 1),
        (BF16, 1, 7168, 99, 7),
        (BF16, 7, 7168, 4, 4),
        (CODES, 9, 16, 99, 1),
        (CODES, 17, 16, 99, 2),
    ],
)
def test_grid(output: str, m: int, k: int, ctas: int, expected: int) -> None:
    out = outputs_of(output, m, k)
    outputs = (out.codes, out.scales) if output == CODES else (out.y, None)
    kernel = quantize_sm90.compiled(Config(output, by_slot=False))
    x, scale = torch.zeros(m, 1, k, dtype=torch.bfloat16), None if output == COPY else torch.ones(1)
    (launch,) = capture(kernel, x, scale, *outputs, None, None, None, None, ctas)
    assert (launch.grid, launch.block) == ((expected, 1, 1), (128, 1, 1))


def test_grid_does_not_depend_on_slots_in_use() -> None:
    grids = set()
    for ids in (torch.full((9, 4), -1), torch.zeros(9, 4, dtype=torch.int64)):
        slots = make_slots(random_rows(9, 128, 0), ids, 2)
        out = Rows(len(slots.tile_expert) * 128, 128, BF16)
        x, tensor_scale, *maps = slots
        kernel = quantize_sm90.compiled(Config(BF16, by_slot=True))
        (launch,) = capture(kernel, x.unsqueeze(1), tensor_scale, out.y, None, *maps, 99)
        grids.add(launch.grid)
    assert grids == {(5, 1, 1)}


def test_most_ctas_fill_the_gpu() -> None:
    assert quantize_sm90.most_ctas(torch.device("cpu"), None) == 132 * 12
    assert quantize_sm90.most_ctas(torch.device("cpu"), 3) == 3


def test_no_rows_launch_nothing() -> None:
    # Without a GPU a launch would fail.
    for function, arguments in ENTRIES.values():
        tensors = arguments()
        empty = {name: tensors[name][:0] for name in ("x", "slot_token", "slot_row") if name in tensors}
        if "slot_row" not in tensors:
            empty |= {name: tensors[name][:0] for name in ("codes", "scales", "y") if name in tensors}
        function(**tensors | empty)


def test_sizes_do_not_compile_again() -> None:
    kernels = {
        quantize_sm90.compiled(choose_config(torch.zeros(m, k, dtype=torch.bfloat16), BF16, by_slot=False))
        for m, k in ((1, 16), (7, 7168), (820, 512))
    }
    assert len(kernels) == 1
    keys = [key for key in compiler.cached_keys() if key.kernel.endswith(".QuantizeSm90")]
    assert len({(key.config, key.options) for key in keys}) == len(keys)
    assert len({key.config for key in keys}) <= 12


@pytest.mark.parametrize(("by_slot", "load_bytes"), list(itertools.product((False, True), (WIDE_LOAD, NARROW_LOAD))))
@pytest.mark.parametrize("output", OUTPUTS)
def test_arithmetic_is_as_written(output: str, by_slot: bool, load_bytes: int) -> None:
    text = quantize_sm90.compiled(Config(output, by_slot, load_bytes)).artifacts.PTX
    assert ".target sm_90a" in text
    rounds = output != COPY
    # One for the scale, one for its reciprocal, and those of a block near the ends of FP32's range.
    assert len(re.findall(r"(?:div|rcp)\.rn\.f32", text)) == (2 + 8) * rounds
    # The rest of the reciprocal; then of each number quotient, remainder, their sum, and two to round it.
    assert text.count("fma.rn.f32") >= (1 + 8 * 5) * rounds
    assert text.count("cvt.rn.satfinite.e4m3x2.f32") == rounds
    assert text.count("ld.global.v4.b32") == (1 if load_bytes == WIDE_LOAD else 0)
    assert text.count("st.global.v4.b32") == (0 if output == CODES else 1)
    for loose in ("approx", ".ftz", "div.full"):
        assert loose not in text, loose


@pytest.mark.parametrize("output", OUTPUTS)
def test_machine_code_needs_no_local_memory(tmp_path: Path, output: str) -> None:
    for by_slot, load_bytes in ((True, WIDE_LOAD), (False, NARROW_LOAD)):
        function: Any = quantize_sm90.compiled(Config(output, by_slot, load_bytes), line_info=False)
        function.export_to_c(object_file_path=str(tmp_path / "kernel.o"), function_name="kernel")
        found = facts(find_cubin((tmp_path / "kernel.o").read_bytes()), str(function.ir_module))
        assert (found.stack, found.local) == (0, 0)
        # Registers are handed out in eights; all of an SM are 65536.
        registers = -(-found.registers // 8) * 8
        assert registers * quantize_sm90.THREADS * quantize_sm90.CTAS_PER_SM <= 65536


# ---- contracts -------------------------------------------------------------------------------------------------------


def plain_arguments(output: str) -> dict[str, Any]:
    x = torch.zeros(7, 64, dtype=torch.bfloat16)
    out = outputs_of(output, 7, 64)
    if output == CODES:
        return {"x": x, "tensor_scale": torch.ones(1), "codes": out.codes, "scales": out.scales}
    return {"x": x, "y": out.y} | ({"tensor_scale": torch.ones(1)} if output == BF16 else {})


def slot_arguments(output: str) -> dict[str, Any]:
    slots = make_slots(torch.zeros(7, 64, dtype=torch.bfloat16), torch.arange(14).view(7, 2) % 4, 4)._asdict()
    out = outputs_of(output, len(slots["tile_expert"]) * 128, 64)
    if output == CODES:
        return slots | {"codes": out.codes, "scales": out.scales}
    if output == COPY:
        del slots["tensor_scale"], slots["tile_expert"]
    return slots | {"y": out.y}


ENTRIES: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
    "quantize": (quantize_sm90.quantize, lambda: plain_arguments(CODES)),
    "round_rows": (quantize_sm90.round_rows, lambda: plain_arguments(BF16)),
    "copy_rows": (quantize_sm90.copy_rows, lambda: plain_arguments(COPY)),
    "quantize_slots": (quantize_sm90.quantize_slots, lambda: slot_arguments(CODES)),
    "round_slots": (quantize_sm90.round_slots, lambda: slot_arguments(BF16)),
    "copy_slots": (quantize_sm90.copy_slots, lambda: slot_arguments(COPY)),
}
TENSORS = [(entry, name) for entry, (_, arguments) in ENTRIES.items() for name in arguments()]
OUTPUT_TENSORS = [(entry, name) for entry, name in TENSORS if name in ("codes", "scales", "y")]
# What has no size of its own, so that another size is an error of another tensor.
ANY_SIZE = {"x", "slot_token", "tile_expert"}


def has_own_size(entry: str, name: str) -> bool:
    any_rows = (entry.endswith("slots") and name == "tensor_scale") or (entry == "copy_slots" and name == "y")
    return name not in ANY_SIZE and not any_rows


def test_the_contract_accepts_what_is_right() -> None:
    quantize_sm90.check(**plain_arguments(CODES), max_ctas=3)
    quantize_sm90.check_slots(**slot_arguments(CODES), max_ctas=3)
    quantize_sm90.check_rows(**plain_arguments(BF16), max_ctas=3)
    quantize_sm90.check_row_slots(**slot_arguments(BF16), max_ctas=3)


@pytest.mark.parametrize(("entry", "name"), TENSORS)
def test_wrong_type(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors[name] = tensors[name].to(torch.float64)
    with pytest.raises(TypeError, match=f"{name} is torch.float64"):
        function(**tensors)


@pytest.mark.parametrize(("entry", "name"), [place for place in TENSORS if has_own_size(*place)])
def test_wrong_size(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors[name] = torch.cat((tensors[name].view(torch.uint8), tensors[name].view(torch.uint8)))
    tensors[name] = tensors[name].view(arguments()[name].dtype)
    with pytest.raises(ValueError, match=f"{name} has shape .* expected"):
        function(**tensors)


@pytest.mark.parametrize(("entry", "name"), TENSORS)
def test_wrong_number_of_dimensions(entry: str, name: str) -> None:
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


@pytest.mark.parametrize(("entry", "name"), OUTPUT_TENSORS)
def test_outputs_not_contiguous(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors[name] = tensors[name].repeat(1, 2)[:, : tensors[name].shape[1]]
    with pytest.raises(ValueError, match=f"{name} has strides"):
        function(**tensors)


@pytest.mark.parametrize(("entry", "name"), OUTPUT_TENSORS)
def test_outputs_misaligned(entry: str, name: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    flat = torch.zeros(tensors[name].nbytes + 16, dtype=torch.uint8)
    tensors[name] = flat[8:-8].view(tensors[name].dtype).view(tensors[name].shape)
    with pytest.raises(ValueError, match=f"{name} starts at 0x"):
        function(**tensors)


@pytest.mark.parametrize("entry", ENTRIES)
def test_columns_not_side_by_side(entry: str) -> None:
    function, arguments = ENTRIES[entry]
    tensors = arguments()
    tensors["x"] = tensors["x"].repeat(1, 2)[:, ::2]
    with pytest.raises(ValueError, match="x has strides"):
        function(**tensors)


@pytest.mark.parametrize("entry", ["quantize", "round_rows", "copy_rows"])
@pytest.mark.parametrize("shape", [(7, 8), (7, 0), (7, 24), (7, 0, 64), (7, 3, 40)])
def test_k_that_is_no_blocks(entry: str, shape: tuple[int, ...]) -> None:
    function, arguments = ENTRIES[entry]
    with pytest.raises(ValueError, match=r"x has shape .* multiple of 16"):
        function(**arguments() | {"x": torch.zeros(shape, dtype=torch.bfloat16)})


def test_too_many_blocks() -> None:
    rows = (1 << 23) + 128
    x, y = (torch.empty(rows, 1024, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with pytest.raises(ValueError, match="are 536879104 blocks, expected at most 2\\^29"):
        quantize_sm90.copy_rows(x, y)


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_ctas(entry: str) -> None:
    function, arguments = ENTRIES[entry]
    with pytest.raises(ValueError, match="max_ctas is 0"):
        function(**arguments(), max_ctas=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(BF16, False, arch="sm_100a"), "arch is 'sm_100a'"),
        (Config("fp8", False), "output is 'fp8', expected one of"),
        (Config(CODES, True, load_bytes=8), "load_bytes is 8"),
    ],
)
def test_impossible_configs_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_unknown_arch() -> None:
    with pytest.raises(ValueError, match="arch is 'sm_90'"):
        choose_config(torch.zeros(1, 16), BF16, by_slot=False, arch="sm_90")


def test_zeros_have_the_signs_of_their_codes() -> None:
    # What the comparison of bits above relies on: the reference tells the two zeros apart.
    x = torch.tensor([[6.0, -0.0, -0.1, 0.1, *[0.0] * 12]])
    y = unscaled_activation(x, torch.tensor(1.0))
    assert y[0, 1:4].view(torch.int16).tolist() == [0, -(1 << 15), 0]
    assert quantize_activation(x, torch.tensor(1.0))[0][0, 1] == 0x08
