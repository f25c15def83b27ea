"""The small kernels on Hopper, each alone: every byte is the reference's, and nothing else is written."""

from typing import NamedTuple

import gpu_kit
import pytest
import torch
from gpu_kit import Arena, assert_same
from quantize_kit import SPECIAL_SCALES, random_rows, special_rows

from cutedsl.kernels import finalize_sm90, inverse_rope_quantize_sm90, quantize_sm90, route_sm90
from cutedsl.kernels.quantize_sm90 import BF16, CODES, COPY, OUTPUTS
from cutedsl.layout import max_padded_rows, padded_shape, swizzle_block_scale, swizzle_grouped_block_scale
from cutedsl.quantize import quantize_activation, unscaled_activation
from cutedsl.reference.wo_a import inverse_rope
from cutedsl.routing import local_expert_ids, reduce_slots, sort_by_expert

TENSOR_SCALE = 0.0021


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(gpu_kit.device())


def scale(value: float) -> torch.Tensor:
    return torch.tensor([value], device=gpu_kit.device())


# ---- quantize -------------------------------------------------------------------------------------------------------


class Rows:
    """Guarded outputs of one kind for a number of rows, and what they must hold; rows that nobody expects stay stale."""

    def __init__(self, output: str, rows: int, k: int) -> None:
        self.output, self.arena = output, Arena()
        if output == CODES:
            codes = self.arena.tensor("codes", torch.uint8, rows, k // 2)
            scales = self.arena.tensor("scales", torch.float8_e4m3fn, *padded_shape(rows, k // 16))
            self.tensors: tuple[torch.Tensor, ...] = (codes, scales)
        else:
            self.tensors = (self.arena.tensor("y", torch.bfloat16, rows, k),)
        self.expected = [tensor.view(torch.uint8).clone() for tensor in self.tensors]

    def expect(self, rows: torch.Tensor | slice, x: torch.Tensor, tensor_scale: torch.Tensor) -> None:
        """Rows of the outputs are those of x; scales are not swizzled yet."""
        if self.output == CODES:
            codes, block_sf = quantize_activation(x, tensor_scale)
            self.expected[0][rows] = codes
            self.expected[1][rows] = 0
            self.expected[1][rows, : block_sf.shape[1]] = block_sf.view(torch.uint8)
        else:
            y = x if self.output == COPY else unscaled_activation(x, tensor_scale)
            self.expected[0].view(torch.bfloat16)[rows] = y

    def check(self) -> None:
        """Every bit; of a number that is rounded, any NaN is a NaN."""
        self.arena.check()
        if self.output == CODES:
            self.expected[1] = swizzle_block_scale(self.expected[1])
        for tensor, expected in zip(self.tensors, self.expected, strict=True):
            found = tensor.view(torch.uint8).clone()
            if self.output == BF16:
                for numbers in (found.view(torch.bfloat16), expected.view(torch.bfloat16)):
                    numbers[numbers.isnan()] = float("nan")
            assert_same(self.output, found, expected)


PLAIN = {CODES: quantize_sm90.quantize, BF16: quantize_sm90.round_rows}
BY_SLOT = {CODES: quantize_sm90.quantize_slots, BF16: quantize_sm90.round_slots}


def run_plain(output: str, x: torch.Tensor, tensor_scale: torch.Tensor) -> None:
    """(M, K) or (T, G, D)."""
    tokens, k = x.shape[0], x.shape[-1]
    groups, padded = (x.shape[1], padded_shape(tokens, 0)[0]) if x.ndim == 3 else (1, tokens)
    out = Rows(output, groups * padded, k)
    for group in range(groups):
        rows = slice(group * padded, group * padded + tokens)
        out.expect(rows, x[:, group] if x.ndim == 3 else x, tensor_scale)
    if output == COPY:
        quantize_sm90.copy_rows(x, *out.tensors)
    else:
        PLAIN[output](x, tensor_scale, *out.tensors)
    out.check()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    ("m", "k"),
    [(1, 16), (7, 64), (64, 512), (129, 48), (129, 176), (820, 16), (5, 1536), (1, 7168), (64, 7168), (8192, 7168)],
)
def test_quantize(output: str, m: int, k: int) -> None:
    run_plain(output, on_gpu(random_rows(min(m, 820), k, m + k)).repeat(-(-m // 820), 1)[:m], scale(TENSOR_SCALE))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("tensor_scale", SPECIAL_SCALES)
def test_quantize_every_kind_of_number(output: str, tensor_scale: float) -> None:
    for factor in (1.0, tensor_scale):
        run_plain(output, on_gpu(special_rows(11, factor)), scale(tensor_scale))


@pytest.mark.parametrize("output", OUTPUTS)
def test_quantize_every_bf16_number(output: str) -> None:
    # With its own block's largest, and beside a larger one.
    bits = torch.arange(1 << 16, device=gpu_kit.device(), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for largest in (None, 6.0, 448.0):
        x = bits.repeat_interleave(2).view(-1, 16).clone()
        if largest is not None:
            x = torch.cat((x[:, :15], torch.full_like(x[:, :1], largest)), dim=1)
        run_plain(output, x.view(64, -1), scale(1.0))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("first", [0, 1, 8])
def test_quantize_groups_and_strided_rows(output: str, first: int) -> None:
    wide = on_gpu(random_rows(129, 1600, 5))
    run_plain(output, wide[:, first : first + 1536].unflatten(1, (4, 384)), scale(TENSOR_SCALE))
    run_plain(output, wide[:, first : first + 1536], scale(TENSOR_SCALE))


def random_ids(num_tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    """Uneven choices, a tenth of them of nobody."""
    random = gpu_kit.generator(num_tokens * 1009 + top_k * 31 + num_experts)
    size = (num_tokens, top_k)
    ids = (torch.rand(size, generator=random, device=gpu_kit.device()) ** 2 * num_experts).long()
    ids[torch.rand(size, generator=random, device=gpu_kit.device()) < 0.1] = -1
    return ids


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "k"),
    [(1, 6, 8, 256), (7, 6, 40, 64), (129, 1, 1, 48), (820, 1, 4, 272), (1000, 6, 48, 7168)],
)
def test_quantize_by_slot(output: str, tokens: int, top_k: int, experts: int, k: int) -> None:
    x, ids = on_gpu(random_rows(min(tokens, 100), k, tokens)), random_ids(tokens, top_k, experts)
    x = x.repeat(-(-tokens // len(x)), 1)[:tokens]
    route = expected_route(ids, experts)
    scales = gpu_kit.uniform(experts, experts) * 0.01
    out = Rows(output, len(route.tile_expert) * 128, k)
    here = slice(int(route.num_slots))
    rows, tokens_of_rows = route.slot_row[here].long(), route.slot_token[here].long()
    expert = route.tile_expert[rows // 128]
    for e in expert.unique().tolist():
        mine = expert == e
        out.expect(rows[mine], x[tokens_of_rows[mine]], scales[e : e + 1])
    maps = (route.slot_token, route.slot_row, route.num_slots)
    if output == COPY:
        quantize_sm90.copy_slots(x, *maps, *out.tensors)
    else:
        BY_SLOT[output](x, scales, *maps, route.tile_expert, *out.tensors)
    out.check()


# ---- route ----------------------------------------------------------------------------------------------------------


def expected_route(ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None = None) -> route_sm90.Route:
    """What the reference functions say; an id that is no expert is one of another rank."""
    num_global = experts if expert_map is None else len(expert_map)
    local = local_expert_ids(torch.where(ids < num_global, ids, -1), expert_map)
    routing = sort_by_expert(local, experts)
    count, n = routing.expert_offset.diff(), ids.numel()
    nothing = torch.zeros(n, 4, dtype=torch.uint8, device=ids.device)
    padded_offset = swizzle_grouped_block_scale(nothing, count).padded_offsets
    expert = local.flatten()[routing.slot_choice].long()
    here = (expert >= 0) & (expert < experts)
    shift = (padded_offset - routing.expert_offset)[torch.where(here, expert, 0)]
    slot_row = torch.where(here, torch.arange(n, device=ids.device) + shift, -1)
    choice_row = torch.empty(n, dtype=torch.int64, device=ids.device).scatter_(0, routing.slot_choice, slot_row)
    tile_expert = torch.full((max_padded_rows(n, experts) // 128,), -1, device=ids.device)
    used = torch.repeat_interleave(torch.arange(experts, device=ids.device), padded_offset.diff() // 128)
    tile_expert[: len(used)] = used
    outputs = (routing.slot_token, slot_row, choice_row, count, padded_offset, tile_expert, here.sum().view(1))
    return route_sm90.Route(*(tensor.int() for tensor in outputs))


def run_route(ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None = None) -> None:
    arena, sizes = Arena(), route_sm90.route_sizes(*ids.shape, experts)
    names = zip(route_sm90.Route._fields, sizes, strict=True)
    out = route_sm90.Route(*(arena.tensor(name, torch.int32, int(size)) for name, size in names))
    route_sm90.route(ids, expert_map, out)
    arena.check()
    for name, found, expected in zip(out._fields, out, expected_route(ids, experts, expert_map), strict=True):
        assert_same(name, found, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(0, 6, 48), (1, 1, 1), (1, 6, 384), (7, 8, 5), (64, 16, 512), (129, 6, 256), (820, 6, 384), (16384, 6, 384)],
)
def test_route(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> None:
    run_route(random_ids(tokens, top_k, experts).to(dtype), experts)


@pytest.mark.parametrize("tokens", [1, 7, 129, 8192])
@pytest.mark.parametrize("rank", [0, 7])
def test_route_with_a_map(tokens: int, rank: int) -> None:
    expert_map = torch.full((384,), -1, dtype=torch.int32, device=gpu_kit.device())
    share = torch.arange(47, -1, -1, dtype=torch.int32, device=gpu_kit.device())
    expert_map[rank * 48 : (rank + 1) * 48] = share
    run_route(random_ids(tokens, 6, 384), 48, expert_map)


@pytest.mark.parametrize("ids", [[-1], [3], [4, 3, 2, 1, 0, -1], [5, 4, 2**31 - 1, 0, -(2**31), -2, 6, 543, 512]])
def test_route_of_patterns(ids: list[int]) -> None:
    table = torch.tensor(ids, dtype=torch.int32, device=gpu_kit.device())
    run_route(table.repeat(129 * 6)[: 129 * 6].view(129, 6), 5)


# ---- finalize -------------------------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """finalize's arguments before the output, and what it must give."""

    y: torch.Tensor
    choice_row: torch.Tensor
    topk_weights: torch.Tensor
    shared: torch.Tensor | None
    expected: torch.Tensor


def make_terms(tokens: int, top_k: int, columns: int, y_fp32: bool, shared: bool) -> Terms:
    """Values of very different sizes; NaN in rows of no choice. The shared expert takes away what the others give."""
    ids = random_ids(tokens, top_k, 5)
    ids[tokens // 2] = -1
    route, random = expected_route(ids, 5), gpu_kit.generator(columns)
    y = torch.full((max_padded_rows(tokens * top_k, 5), columns), float("nan"), device=gpu_kit.device())
    used = route.slot_row[route.slot_row >= 0].long()
    exponent = torch.randint(-12, 13, (len(used), columns), generator=random, device=gpu_kit.device())
    values = torch.randn(len(used), columns, generator=random, device=gpu_kit.device())
    y[used] = values * torch.exp2(exponent)
    y = y if y_fp32 else y.bfloat16()
    weights = torch.randn(tokens, top_k, generator=random, device=gpu_kit.device())
    y_of_slot = torch.where((route.slot_row >= 0)[:, None], y[route.slot_row.clamp(min=0).long()].float(), float("nan"))
    total = reduce_slots(y_of_slot, sort_by_expert(ids, 5), weights)
    added = -total.bfloat16() if shared else None
    expected = (total if added is None else total + added.float()).bfloat16()
    return Terms(y, route.choice_row, weights, added, expected)


@pytest.mark.parametrize(("y_fp32", "shared"), [(False, True), (False, False), (True, True), (True, False)])
@pytest.mark.parametrize(
    ("tokens", "top_k", "columns"),
    [(1, 6, 7168), (7, 8, 1032), (64, 1, 8), (7, 16, 264), (129, 6, 64), (820, 6, 8), (8192, 6, 4096)],
)
def test_finalize(tokens: int, top_k: int, columns: int, y_fp32: bool, shared: bool) -> None:
    terms, arena = make_terms(tokens, top_k, columns, y_fp32, shared), Arena()
    out = arena.tensor("out", torch.bfloat16, tokens, columns)
    finalize_sm90.finalize(*terms[:4], out)
    arena.check()
    assert_same("out", out, terms.expected)


# ---- inverse RoPE ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "head_dim", "rope_dim"),
    [(1, 4, 2, 128, 64), (7, 6, 3, 64, 16), (64, 4, 2, 128, 64), (129, 2, 2, 256, 64), (820, 2, 1, 64, 64),
     (300, 128, 16, 512, 64)],
)  # fmt: skip
def test_inverse_rope(tokens: int, heads: int, groups: int, head_dim: int, rope_dim: int, rounded: bool) -> None:
    random, positions = gpu_kit.generator(tokens), torch.arange(tokens, device=gpu_kit.device()) * 37 % 500
    angles = torch.rand(500, rope_dim // 2, generator=random, device=gpu_kit.device()) * 6.2832
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    # Heads of a wider tensor.
    o = gpu_kit.random_x(tokens, tokens, heads + 1, head_dim)[:, 1:]
    tensor_scale = scale(TENSOR_SCALE)
    restored = inverse_rope(o, positions, table, rope_dim).unflatten(1, (groups, -1)).flatten(2)
    padded = padded_shape(tokens, 0)[0]
    out = Rows(BF16 if rounded else COPY, groups * padded, restored.shape[2])
    for group in range(groups):
        out.expect(slice(group * padded, group * padded + tokens), restored[:, group], tensor_scale)
    given = tensor_scale if rounded else None
    inverse_rope_quantize_sm90.inverse_rope(o, positions, table, given, groups, *out.tensors)
    out.check()


# ---- graphs ---------------------------------------------------------------------------------------------------------


def test_a_launch_is_captured() -> None:
    given, other = (gpu_kit.random_x(seed, 64, 7168) for seed in range(2))
    tensor_scale, y = scale(TENSOR_SCALE), torch.empty_like(given)
    quantize_sm90.round_rows(given, tensor_scale, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize_sm90.round_rows(given, tensor_scale, y)
    given.copy_(other)
    y.fill_(float("nan"))
    graph.replay()
    assert_same("a replay", y, unscaled_activation(other, tensor_scale))
