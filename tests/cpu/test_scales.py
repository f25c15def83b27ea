"""A scale that is not a positive finite number stops the load, by name: every kind of bad number, in every place."""

import re

import pytest
import torch
from vllm_nvfp4.checkpoint import CheckpointError
from vllm_nvfp4.loader import check_scale_tensor
from vllm_nvfp4.scales import bad_block_scale, bad_global_scale, check_scales

NAN, INF = float("nan"), float("inf")
GOOD = torch.tensor([[1.0, 448.0, 2.0**-9, 0.0]]).to(torch.float8_e4m3fn)
BAD_GLOBALS = [
    (NAN, "NaN, or never loaded"),
    (INF, "infinite"),
    (-INF, "infinite"),
    (0.0, "zero"),
    (-0.0, "zero"),
    (-1.0, "negative"),
    (-1e-45, "negative"),
]


def block_scales(byte: int) -> torch.Tensor:
    """(3, 5) good scales with one byte of choice."""
    found = torch.full((3, 5), 0x38, dtype=torch.uint8)
    found[2, 4] = byte
    return found.view(torch.float8_e4m3fn)


def test_every_byte_of_a_block_scale() -> None:
    for byte in range(256):
        value = float(torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float())
        expected = "NaN" if value != value else "negative" if value < 0 else None
        assert bad_block_scale(block_scales(byte)) == expected, hex(byte)
    assert bad_block_scale(torch.empty(0, 4, dtype=torch.float8_e4m3fn)) is None


def test_a_parameter_that_needs_no_gradient_is_read_too() -> None:
    parameter = torch.nn.Parameter(block_scales(0x7F), requires_grad=False)
    assert bad_block_scale(parameter) == "NaN"
    assert bad_block_scale(parameter.data[:2]) is None
    assert bad_block_scale(parameter.data.T) == "NaN"


@pytest.mark.parametrize(("value", "problem"), [*BAD_GLOBALS, (1.0, None), (1e-45, None), (3.4e38, None)])
def test_global_scales(value: float, problem: str | None) -> None:
    assert bad_global_scale(value) == problem


def test_good_scales_pass() -> None:
    check_scales("m", GOOD, weight_scale_2=torch.tensor([1e-3, 2.0]), input_scale=torch.tensor(0.5))
    check_scales("m", GOOD[:0], weight_scale_2=torch.tensor([[1.0, 2.0], [1e-45, 3.4e38]]))
    check_scales("m", GOOD)


@pytest.mark.parametrize(("byte", "problem"), [(0x7F, "NaN"), (0xFF, "NaN"), (0x81, "negative"), (0xFE, "negative")])
def test_a_bad_block_scale_is_named(byte: int, problem: str) -> None:
    message = f"model.layers.1.attn.wq_b.weight_scale holds a {problem} block scale"
    with pytest.raises(CheckpointError, match=re.escape(message) + ".*export or download the checkpoint again"):
        check_scales("model.layers.1.attn.wq_b", block_scales(byte), weight_scale_2=torch.ones(1))


@pytest.mark.parametrize(("value", "problem"), BAD_GLOBALS)
@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale"])
@pytest.mark.parametrize(
    ("shape", "index"),
    [((), ()), ((1,), (0,)), ((3,), (2,)), ((4, 2), (3, 1))],
    ids=["scalar", "one", "shards", "experts"],
)
def test_a_bad_global_scale_is_named_with_its_place(
    value: float, problem: str, leaf: str, shape: tuple[int, ...], index: tuple[int, ...]
) -> None:
    scales = {"weight_scale_2": torch.ones(shape), "input_scale": torch.ones(shape)}
    scales[leaf][index] = value
    message = f"attn.wq_b.{leaf}{list(index)} is {torch.tensor(value).item()} ({problem}); expected a positive finite"
    with pytest.raises(CheckpointError, match=re.escape(message) + ".*Calibrate and export the checkpoint again"):
        check_scales("attn.wq_b", GOOD, **scales)


def test_the_first_bad_place_is_the_one_reported() -> None:
    values = torch.tensor([1.0, NAN, 0.0])
    with pytest.raises(CheckpointError, match=re.escape("m.input_scale[1] is nan")):
        check_scales("m", GOOD, weight_scale_2=torch.ones(3), input_scale=values)


# The same numbers as they come off the disk, reported by the checkpoint's own name.

NAME = "model.layers.1.self_attn.q_b_proj"
CANONICAL = "model.layers.1.attn.wq_b"


@pytest.mark.parametrize(("value", "problem"), BAD_GLOBALS)
@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bad_global_scale_in_the_file(value: float, problem: str, leaf: str, shape: tuple[int, ...]) -> None:
    tensor = torch.full(shape, value)
    with pytest.raises(
        CheckpointError, match=re.escape(f"{NAME}.{leaf} is {problem} ({tensor.item()}); expected")
    ) as error:
        check_scale_tensor(f"{NAME}.{leaf}", f"{CANONICAL}.{leaf}", tensor)
    assert "calibrate and export the checkpoint again" in str(error.value)


@pytest.mark.parametrize(("byte", "problem"), [(0x7F, "NaN"), (0xFF, "NaN"), (0x81, "negative")])
def test_a_bad_block_scale_in_the_file(byte: int, problem: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(NAME)}\.weight_scale is {problem}; expected a positive finite"
    ):
        check_scale_tensor(f"{NAME}.weight_scale", f"{CANONICAL}.weight_scale", block_scales(byte))


def test_what_is_good_or_no_scale_passes() -> None:
    check_scale_tensor("x", f"{CANONICAL}.weight_scale", GOOD)
    check_scale_tensor("x", f"{CANONICAL}.weight_scale_2", torch.tensor(1e-6))
    check_scale_tensor("x", f"{CANONICAL}.input_scale", torch.tensor([1e-6]))
    check_scale_tensor("x", "model.norm.weight", torch.tensor([NAN, -1.0]))
    check_scale_tensor("x", "model.layers.0.hc_attn_scale", torch.tensor([0.0, -1.0, 2.0]))
