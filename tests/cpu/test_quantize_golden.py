"""quantize_weight and dequantize against what ModelOpt's NVFP4QTensor gave, bit for bit, without ModelOpt.

tests/data/quantize_golden.json is its answer to the cases of scripts/make_quantize_golden.py; `make test-modelopt` asks
again.
"""

import json
from pathlib import Path

import make_quantize_golden
import pytest
import torch
from make_quantize_golden import Case
from safetensors.torch import load_file

from cutedsl.quantize import ZERO_TENSOR_SCALE, PackedTensor, dequantize, quantize_weight, unpack_codes

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests" / "data" / "quantize_golden.json").read_text())
CASES = {case.name: case for case in make_quantize_golden.cases()}
DEFINED = [case for case in CASES.values() if case.is_defined]


def our_entry(case: Case) -> dict[str, str]:
    x = case.make()
    packed = quantize_weight(x, case.weight_scale_2)
    return make_quantize_golden.entry(x, *packed, dequantize(*packed))


def test_golden_data_has_every_case() -> None:
    assert set(GOLDEN) == set(CASES)
    assert len(DEFINED) > 70


@pytest.mark.parametrize("case", DEFINED, ids=lambda case: case.name.replace(" ", "-"))
def test_equals_modelopt(case: Case) -> None:
    assert our_entry(case) == GOLDEN[case.name]


def test_cases_reach_the_edges_they_are_for() -> None:
    """Each kind of block and code that is special occurs: golden data of ordinary tensors would prove little."""
    scales, codes = set(), set()
    for case in DEFINED:
        if not case.name.startswith("model"):
            packed = quantize_weight(case.make(), case.weight_scale_2)
            scales.update(packed.weight_scale.view(torch.uint8).unique().tolist())
            codes.update(packed.weight.unique().tolist())
    # Every e4m3 number but 0, which no weight has, and every pair of codes.
    assert scales == set(range(1, 127))
    assert codes == set(range(256))


def test_our_answer_to_a_tensor_of_zeros_is_not_modelopts() -> None:
    """ModelOpt divides 0 by 0: every block scale is NaN and every code 7. Ours loads, and decodes to zeros."""
    golden, ours = GOLDEN["zeros"], quantize_weight(CASES["zeros"].make())
    assert set(bytes.fromhex(golden["weight_scale"])) <= {0x7F, 0xFF}
    assert golden["weight_scale_2"] == "00000000"
    assert ours.weight.eq(0).all()
    assert ours.weight_scale.float().eq(1).all()
    assert ours.weight_scale_2 == torch.tensor(ZERO_TENSOR_SCALE)


@pytest.mark.parametrize("name", ["NaN", "infinity"])
def test_where_modelopt_writes_garbage_we_raise(name: str) -> None:
    scale_2 = torch.frombuffer(bytearray.fromhex(GOLDEN[name]["weight_scale_2"]), dtype=torch.float32)
    assert not scale_2.isfinite().any()
    with pytest.raises(ValueError, match="NaN or infinity"):
        our_entry(CASES[name])


def test_every_tensor_of_the_checkpoint_requantizes_to_its_bytes(affine: Path) -> None:
    """Decoded and quantized with the stored tensor scale, only code 8 changes, to 0: the value is zero all the same.

    ModelOpt writes 8 for a negative number that rounds to zero, and 0 for -0.0, which is what 8 decodes to. The other
    exceptions (see `requantized` in test_quantize.py) need block scales below 2^-6; this checkpoint has none.
    """
    tensors = load_file(affine / "model.safetensors")
    modules = [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]
    num_negative_zeros = num_blocks = 0
    for module in modules:
        stored = PackedTensor(*(tensors[f"{module}.{name}"] for name in PackedTensor._fields))
        again = quantize_weight(dequantize(*stored), stored.weight_scale_2)
        codes = unpack_codes(stored.weight)
        assert again.weight_scale.view(torch.uint8).equal(stored.weight_scale.view(torch.uint8)), module
        assert torch.equal(unpack_codes(again.weight), torch.where(codes == 8, 0, codes)), module
        num_negative_zeros += int((codes == 8).sum())
        num_blocks += stored.weight_scale.numel()
    assert (len(modules), num_blocks, num_negative_zeros) == (426, 708_864, 381_173)
