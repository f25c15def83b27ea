"""Preparing weights for the sm100 kernels: where every row and scale goes, back again, and how much memory it takes."""

import weakref
from collections.abc import Callable
from typing import Any

import numerics
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cutedsl import prepare, prepare_sm90
from cutedsl.gate_up import CHUNK_BYTES
from cutedsl.layout import swizzled_offset
from cutedsl.prepare import INTERLEAVE
from cutedsl.runners import pack_matrix


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages that are made while it is active, the most that lived at a time, and the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What goes in existed before, or was counted when it came out.
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                self._known.setdefault(tensor.untyped_storage()._cdata, 0)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known and self._known[key] == 0:
            return
        if key not in self._known:
            self._known[key] = 0
            self.live += storage.nbytes()
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, storage.nbytes())
        # A storage lives as long as any tensor that shows it.
        self._known[key] += 1
        weakref.finalize(tensor, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known[key] -= 1
        if self._known[key] == 0:
            del self._known[key]
            self.live -= num_bytes


def scales_of(num_matrices: int, rows: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 0x7F, (num_matrices, rows, k // 16), dtype=torch.uint8, generator=generator)
    return bits.view(torch.float8_e4m3fn)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intermediate", [16, 48, 192])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_gate_and_up_rows_are_interleaved_in_place(intermediate: int, stack: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(intermediate)
    rows = torch.randint(0, 256, (*stack, 2 * intermediate, 24), dtype=torch.uint8, generator=generator)
    before, address = rows.clone(), rows.data_ptr()
    prepare.interleave_gate_up(rows)
    assert rows.data_ptr() == address
    for block in range(intermediate // INTERLEAVE):
        for r in range(INTERLEAVE):
            h = block * INTERLEAVE + r
            assert torch.equal(rows[..., 32 * block + r, :], before[..., h, :]), "gate"
            assert torch.equal(rows[..., 32 * block + 16 + r, :], before[..., intermediate + h, :]), "up"
    prepare.deinterleave_gate_up(rows)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("function", [prepare.interleave_gate_up, prepare.deinterleave_gate_up])
@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (torch.zeros(40, 8), r"shape \(40, 8\), expected as many gate as up rows, a multiple of 16"),
        (torch.zeros(2, 16, 8), "expected as many gate as up rows"),
        (torch.zeros(8, 32).t(), r"strides \(1, 32\).*in place"),
        (torch.zeros(32), "expected a matrix or a stack"),
    ],
)
def test_rows_that_cannot_be_interleaved(function: Callable, rows: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=f"{function.__name__}: .*{match}"):
        function(rows)


# ---- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "k"), [(128, 64), (384, 256), (64, 64), (130, 96), (128, 32), (8, 16)])
def test_swizzle(rows: int, k: int) -> None:
    scale = scales_of(2, rows, k)
    before = scale.clone()
    swizzled = prepare.swizzle(scale)
    padded = prepare.needs_padding(rows, k)
    assert padded == (rows % 128 != 0 or k % 64 != 0)
    assert (swizzled.data_ptr() == scale.data_ptr()) == (not padded)
    assert swizzled.is_contiguous()
    row, column = torch.arange(rows)[:, None], torch.arange(k // 16)[None]
    places = swizzled_offset(row, column, k // 16)
    for e in range(2):
        flat = as_bytes(swizzled[e]).flatten()
        assert torch.equal(flat[places], as_bytes(before[e]))
        assert int(flat.ne(0).sum()) == int(as_bytes(before[e]).ne(0).sum()), "padding is 0"
    if padded:
        assert torch.equal(as_bytes(scale), as_bytes(before)), "what does not fit is left alone"
    assert torch.equal(as_bytes(prepare.unswizzle(swizzled, rows, k // 16)), as_bytes(before))


def test_a_scale_that_cannot_be_swizzled() -> None:
    with pytest.raises(ValueError, match=r"swizzle: rows have shape .*contiguous"):
        prepare.swizzle(scales_of(1, 128, 128)[..., :4])
    with pytest.raises(ValueError, match="unswizzle: rows have shape"):
        prepare.unswizzle(scales_of(1, 128, 128)[..., :4], 128, 4)


# Rows and K on one rank, and what divides them: n or k.
PRO = {
    "wq_a+wkv": (2048, 7168, ""), "wq_a": (1536, 7168, ""), "wkv": (512, 7168, ""), "wq_b": (65536, 1536, "n"),
    "wo_a group": (1024, 4096, ""), "wo_b": (7168, 16384, "k"), "compressor 128": (1024, 7168, ""),
    "compressor 4": (2048, 7168, ""), "indexer compressor": (512, 7168, ""), "indexer wq_b": (8192, 1536, ""),
    "indexer weights_proj": (64, 7168, ""), "gate+up": (6144, 7168, "n"), "down": (7168, 3072, "k"),
    "e_proj": (7168, 7168, ""),
}  # fmt: skip
FLASH = {
    "wq_a+wkv": (1536, 4096, ""), "wq_a": (1024, 4096, ""), "wkv": (512, 4096, ""), "wq_b": (32768, 1024, "n"),
    "wo_a group": (1024, 4096, ""), "wo_b": (4096, 8192, "k"), "compressor 128": (1024, 4096, ""),
    "compressor 4": (2048, 4096, ""), "indexer compressor": (512, 4096, ""), "indexer wq_b": (8192, 1024, ""),
    "indexer weights_proj": (64, 4096, ""), "gate+up": (4096, 4096, "n"), "down": (4096, 2048, "k"),
    "e_proj": (4096, 4096, ""),
}  # fmt: skip


@pytest.mark.parametrize(("model", "sizes"), [(PRO, (1, 2, 4, 8, 16)), (FLASH, (1, 2, 4, 8))])
def test_of_v4_only_weights_proj_is_padded(model: dict[str, tuple[int, int, str]], sizes: tuple[int, ...]) -> None:
    padded = {
        name
        for name, (n, k, divided) in model.items()
        for tp in sizes
        if prepare.needs_padding(n // (tp if divided == "n" else 1), k // (tp if divided == "k" else 1))
    }
    assert padded == {"indexer weights_proj"}


# ---- operands -------------------------------------------------------------------------------------------------------


def test_linear_by_scale_group() -> None:
    packed = numerics.random_packed(256 + 128 + 64, 128)
    before = packed.weight_scale.clone()
    input_scale, weight_scale_2 = torch.tensor([0.5, 0.25, 0.5]), torch.tensor([3.0, 5.0, 7.0])
    matrix = pack_matrix(packed.weight, packed.weight_scale, weight_scale_2, input_scale, [256, 128, 64])
    groups = prepare.prepare_linear(matrix)
    assert [(group.input_scale.tolist(), [start for start, _ in group.spans]) for group in groups] == [
        ([0.5], [0, 384]),
        ([0.25], [256]),
    ]
    for start, operand in (span for group in groups for span in group.spans):
        rows = operand.weight.shape[1]
        assert operand.weight.data_ptr() == packed.weight[start].data_ptr(), "codes are not copied"
        assert (operand.weight_scale.data_ptr() == packed.weight_scale[start].data_ptr()) == (rows != 64)
        assert torch.equal(operand.alpha[0], matrix.alpha[start : start + rows])
        restored = prepare.unswizzle(operand.weight_scale.clone(), rows, 8)
        assert torch.equal(as_bytes(restored[0]), as_bytes(before[start : start + rows]))


@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 64), (128, 192), (96, 48), (32, 16)])
def test_experts_there_and_back(hidden: int, intermediate: int) -> None:
    w13, w2 = numerics.random_packed(3, 2 * intermediate, hidden), numerics.random_packed(3, hidden, intermediate)
    generator = torch.Generator().manual_seed(0)
    for packed, shape in ((w13, (3, 2)), (w2, (3,))):
        gate_up = len(shape) == 2
        weight_scale_2, input_scale = (torch.rand(shape, generator=generator) for _ in range(2))
        given = packed.weight.clone(), packed.weight_scale.clone()
        rows, k = given[0].shape[1], 2 * given[0].shape[2]
        operand = prepare.prepare_experts(*given, weight_scale_2, input_scale)
        assert operand.weight is given[0]
        assert (operand.weight_scale.data_ptr() == given[1].data_ptr()) == (not prepare.needs_padding(rows, k))
        assert torch.equal(operand.alpha, (input_scale * weight_scale_2).view(3, -1))
        if gate_up:
            # Row 16 is the first up row, and so are its scales.
            assert torch.equal(operand.weight[:, 16], packed.weight[:, intermediate])
            scale = prepare.unswizzle(operand.weight_scale.clone(), rows, k // 16)
            assert torch.equal(as_bytes(scale[:, 16]), as_bytes(packed.weight_scale[:, intermediate]))
        weight, scale = prepare.restore_experts(operand, k, gate_up)
        assert torch.equal(weight, packed.weight)
        assert torch.equal(as_bytes(scale), as_bytes(packed.weight_scale))


def test_alpha_is_one_fp32_product() -> None:
    packed = numerics.random_packed(64, 32, 64)
    generator = torch.Generator().manual_seed(3)
    weight_scale_2, input_scale = (torch.rand(64, 2, generator=generator) for _ in range(2))
    alpha = prepare.prepare_experts(*packed[:2], weight_scale_2, input_scale).alpha
    for e in range(64):
        rows = pack_matrix(packed.weight[e], packed.weight_scale[e], weight_scale_2[e], input_scale[e], (16, 16)).alpha
        assert torch.equal(alpha[e].repeat_interleave(16), rows)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_the_meter_sees_copies_and_forgets_them() -> None:
    old = torch.zeros(1000, dtype=torch.uint8)
    with LiveBytes() as meter:
        old.view(10, 100).t().add_(1)
        assert meter.peak == 0
        copy = old.clone()
        view = copy[:10]
        del copy
        assert (meter.live, meter.peak) == (1000, 1000)
        old.view(10, 100).t().reshape(-1)
        assert (meter.live, meter.peak) == (1000, 2000)
        del view
        assert (meter.live, meter.peak) == (0, 2000)


def test_at_most_one_experts_copy_at_a_time() -> None:
    """V4-Pro's 48 experts of a rank at EP8, rows and columns an eighth."""
    experts, hidden, intermediate = 48, 896, 384
    w13 = torch.zeros(experts, 2 * intermediate, hidden // 2, dtype=torch.uint8)
    w2 = torch.zeros(experts, hidden, intermediate // 2, dtype=torch.uint8)
    w13_scale, w2_scale = scales_of(experts, 2 * intermediate, hidden), scales_of(experts, hidden, intermediate)
    ones = torch.ones(experts, 2)
    with LiveBytes() as meter:
        first = prepare.prepare_experts(w13, w13_scale, ones, ones)
        second = prepare.prepare_experts(w2, w2_scale, ones[:, 0].contiguous(), ones[:, 0].contiguous())
    assert {first.weight.data_ptr(), first.weight_scale.data_ptr()} == {w13.data_ptr(), w13_scale.data_ptr()}
    assert {second.weight.data_ptr(), second.weight_scale.data_ptr()} == {w2.data_ptr(), w2_scale.data_ptr()}
    one_expert = w13[0].numel() + w13_scale[0].numel() + w2[0].numel() + w2_scale[0].numel()
    assert w13[0].numel() <= meter.peak <= one_expert
    # What stays are the two alphas.
    assert meter.live <= 2 * experts * 2 * 4 + 2 * experts * 4


# V4-Pro's, one expert of each kind: (rows, k, gates and ups).
EXPERTS = {"w13": (6144, 7168, True), "w2": (7168, 3072, False)}


@pytest.mark.parametrize("stack", EXPERTS)
@pytest.mark.parametrize("arch", ["sm90", "sm100"])
def test_nothing_is_allocated_of_which_pytorch_takes_20_mib(arch: str, stack: str) -> None:
    """See gate_up.CHUNK_BYTES."""
    num_rows, k, gate_up = EXPERTS[stack]
    weight, scale = torch.zeros(2, num_rows, k // 2, dtype=torch.uint8), scales_of(2, num_rows, k)
    ones = torch.ones(2, 2) if gate_up else torch.ones(2)
    with LiveBytes() as meter:
        if arch == "sm90":
            prepare_sm90.prepare_experts(weight, scale, ones, gate_up)
        else:
            prepare.prepare_experts(weight, scale, ones, ones)
    assert CHUNK_BYTES // 2 < meter.largest <= CHUNK_BYTES == 1 << 20
    assert meter.peak <= 5 * CHUNK_BYTES


@pytest.mark.parametrize(("num_rows", "k"), [(65536, 1536), (7168, 16384), (2112, 7168)])
@pytest.mark.parametrize("arch", [prepare_sm90, prepare])
def test_nor_for_linears(arch: Any, num_rows: int, k: int) -> None:
    """V4-Pro's wq_b, wo_b and wqa_wkv."""
    weight, scale = torch.zeros(num_rows, k // 2, dtype=torch.uint8), scales_of(1, num_rows, k)[0]
    matrix = pack_matrix(weight, scale, torch.ones(1), torch.ones(1), [num_rows])
    with LiveBytes() as meter:
        arch.prepare_linear(matrix)
    assert meter.largest <= CHUNK_BYTES


def test_padding_costs_the_scales_and_nothing_more() -> None:
    weight, scale = torch.zeros(8, 64, 512, dtype=torch.uint8), scales_of(8, 64, 1024)
    ones = torch.ones(8)
    with LiveBytes() as meter:
        operand = prepare.prepare_experts(weight, scale, ones, ones)
    assert operand.weight_scale.numel() == 2 * scale.numel()
    assert meter.peak <= operand.weight_scale.numel() + 2 * operand.weight_scale[0].numel() + 64
