"""The model of costs: equal to what the simulator counts, byte for byte and FLOP for FLOP; and the table made of it."""

import importlib.util
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch

import ptxsim
from cutedsl import cost, deployment
from cutedsl.cost import BF16, SWIGLU, SWIGLU_NVFP4, Cost
from cutedsl.kernels import grouped_gemm_sm100, grouped_gemm_swap_sm100, linear_sm100
from cutedsl.kernels.blackwell import ARCHS
from cutedsl.layout import max_padded_rows, padded_shape
from cutedsl.runners import sm100
from ptxsim import boxes, bulk
from ptxsim.host.capture import prepare_environment
from ptxsim.memory import GlobalMemory

prepare_environment()

ARCH = ARCHS["sm_100a"]
ROOT = Path(__file__).resolve().parents[2]
MODULES = {"grouped": grouped_gemm_sm100, "swap": grouped_gemm_swap_sm100}


class Observed:
    """Global bytes that copies read, and that copies and threads write, by address."""

    def __init__(self) -> None:
        self.loads: list[np.ndarray] = []
        self.stores: list[np.ndarray] = []
        self.st_bytes = 0

    def copied(self, side: bulk._Global, into: list[np.ndarray]) -> None:
        into += [boxes.indices(clip, start) + buffer.address for clip, buffer, start in side._parts if clip is not None]

    def stored(self, addresses: np.ndarray, size: int) -> None:
        self.st_bytes += len(addresses) * size
        self.stores.append((addresses.astype(np.int64)[:, None] + np.arange(size)).reshape(-1))


def num_unique(addresses: list[np.ndarray]) -> int:
    return len(np.unique(np.concatenate(addresses))) if addresses else 0


def observe(function, *arguments) -> tuple[ptxsim.Report, Observed]:
    observed = Observed()
    check_readable, check_writable = bulk._Global.check_readable, bulk._Global.check_writable
    store, store_one = GlobalMemory.store, GlobalMemory.store_one

    def on_load(side, w, issue):
        observed.copied(side, observed.loads)
        check_readable(side, w, issue)

    def on_copy_out(side, w):
        observed.copied(side, observed.stores)
        check_writable(side, w)

    def on_store(memory, w, addresses, size, *rest):
        observed.stored(addresses, size)
        store(memory, w, addresses, size, *rest)

    def on_store_one(memory, w, address, values, *rest):
        observed.stored(np.array([address]), len(values))
        store_one(memory, w, address, values, *rest)

    with (
        mock.patch.object(bulk._Global, "check_readable", on_load),
        mock.patch.object(bulk._Global, "check_writable", on_copy_out),
        mock.patch.object(GlobalMemory, "store", on_store),
        mock.patch.object(GlobalMemory, "store_one", on_store_one),
    ):
        report = ptxsim.run(function, *arguments, policy="eager")
    return report, observed


def assert_same(model: Cost, report: ptxsim.Report, observed: Observed) -> None:
    counters = report.counters
    found = {
        "tma_load_bytes": counters.get("tma_load_bytes", 0),
        "tma_store_bytes": counters.get("tma_store_bytes", 0),
        "st_bytes": observed.st_bytes,
        "unique_load_bytes": num_unique(observed.loads),
        "unique_store_bytes": num_unique(observed.stores),
        "flops": counters.get("mma_flops", 0),
    }
    assert {name: getattr(model, name) for name in found} == found
    assert model.requested >= model.unique >= model.minimum
    assert model.flops >= model.min_flops


def codes(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


def scales(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


# m, n, k, CTAs: rows, columns and steps of K that end within a tile, at its end, behind it.
LINEAR_SHAPES = [
    (1, 8, 32, 1),
    (1, 136, 256, 2),
    (7, 264, 96, 1),
    (64, 64, 320, 1),
    (127, 200, 64, 3),
    (128, 256, 256, 1),
    (129, 128, 288, 2),
    (130, 72, 544, 1),
    (257, 320, 32, 4),
    (256, 512, 64, 3),
    (300, 8, 544, 2),
    (1, 576, 352, 2),
]


@pytest.mark.parametrize("tile_n", linear_sm100.TILES_N)
def test_linear(tile_n: int) -> None:
    function = linear_sm100.compiled(linear_sm100.largest_config(tile_n, ARCH))
    for m, n, k, clusters in LINEAR_SHAPES:
        a_sf, b_sf = scales(*padded_shape(m, k // 16)), scales(*padded_shape(n, k // 16))
        d = torch.zeros(m, n, dtype=torch.bfloat16)
        arguments = codes(m, k // 2), codes(n, k // 2), a_sf, b_sf, torch.ones(n), d, clusters
        assert_same(cost.linear(m, n, k, tile_n), *observe(function, *arguments))


def group_arguments(counts: tuple[int, ...], n: int, k: int, epilogue: str, extra: int) -> tuple:
    """Operands of either grouped kernel: a, b, their scales, alpha, counts, offsets, d, its scales, h_scale; tiles."""
    experts, rows = len(counts), max_padded_rows(sum(counts) + extra, len(counts))
    tiles = [-(-count // 128) for count in counts]
    offset = torch.tensor([0, *np.cumsum(tiles).tolist()], dtype=torch.int32) * 128
    tile_expert = torch.full((rows // 128,), -1, dtype=torch.int32)
    tile_expert[: sum(tiles)] = torch.repeat_interleave(torch.arange(experts), torch.tensor(tiles)).int()
    b_sf = scales(experts, *padded_shape(n, k // 16))
    operands = codes(rows, k // 2), codes(experts, n, k // 2), scales(*padded_shape(rows, k // 16)), b_sf
    count = torch.tensor(counts, dtype=torch.int32)
    if epilogue == SWIGLU_NVFP4:
        result = codes(rows, n // 4), scales(*padded_shape(rows, n // 32)), torch.ones(experts)
    else:
        result = torch.zeros(rows, n if epilogue == BF16 else n // 2, dtype=torch.bfloat16), None, None
    return operands, torch.ones(experts, 2), (tile_expert, offset), (count, offset), result, rows


# Rows of each group, n in units of what the epilogue takes, k, CTAs, further rows of A: no group, empty groups first, last
# and between; pairs of tiles of one group, of two, and half a pair, with and without rows of A in its other half.
GROUPS = [
    ((1,), 1, 256, 1, 0),
    ((0, 0), 3, 64, 1, 3),
    ((0, 7, 0), 3, 352, 2, 130),
    ((3, 0, 9), 1, 96, 2, 0),
    ((128,), 2, 64, 1, 300),
    ((129,), 3, 96, 3, 0),
    ((64, 0, 129, 1), 2, 256, 1, 0),
    ((256, 0, 128), 1, 64, 2, 130),
    ((1, 1, 1), 1, 32, 1, 0),
    ((8, 0, 17), 3, 320, 3, 5),
    ((65, 63), 1, 96, 2, 0),
    ((300, 2), 1, 160, 1, 0),
]
UNITS = {BF16: 72, SWIGLU: 32, SWIGLU_NVFP4: 64}


@pytest.mark.parametrize(
    ("epilogue", "cta_group", "tile_n"),
    [(BF16, 1, 64), (BF16, 1, 256), (BF16, 2, 256), (SWIGLU, 1, 128), (SWIGLU_NVFP4, 1, 64), (SWIGLU_NVFP4, 2, 128)],
)
def test_grouped(epilogue: str, cta_group: int, tile_n: int) -> None:
    function = grouped_gemm_sm100.compiled(grouped_gemm_sm100.largest_config(epilogue, tile_n, cta_group, ARCH))
    for counts, units, k, clusters, extra in GROUPS:
        n = units * UNITS[epilogue]
        operands, alpha, tables, _, result, rows = group_arguments(counts, n, k, epilogue, extra)
        found = observe(function, *operands, alpha, *tables, *result, float("inf"), clusters)
        assert_same(cost.grouped(counts, n, k, epilogue, tile_n, cta_group, rows), *found)


@pytest.mark.parametrize(("epilogue", "tile_n"), [(BF16, 8), (BF16, 64), (SWIGLU, 16), (SWIGLU_NVFP4, 32)])
def test_swapped(epilogue: str, tile_n: int) -> None:
    function = grouped_gemm_swap_sm100.compiled(grouped_gemm_swap_sm100.largest_config(epilogue, tile_n, ARCH))
    for counts, units, k, clusters, extra in GROUPS:
        n = units * UNITS[epilogue]
        operands, alpha, _, tables, result, rows = group_arguments(counts, n, k, epilogue, extra)
        found = observe(function, *operands, alpha, *tables, *result, float("inf"), clusters)
        assert_same(cost.swapped(counts, n, k, epilogue, tile_n, rows), *found)


@pytest.mark.parametrize("m", [1, 7, 8, 65, 127])
def test_swapped_as_a_linear(m: int) -> None:
    # Rows of X end with the tokens, within a tile.
    n, k, tile_n = 136, 288, 8
    function = grouped_gemm_swap_sm100.compiled(grouped_gemm_swap_sm100.largest_config(BF16, tile_n, ARCH))
    sf = scales(*padded_shape(m, k // 16)), scales(1, *padded_shape(n, k // 16))
    tables = torch.ones(1, 1), torch.tensor([m], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    result = torch.zeros(m, n, dtype=torch.bfloat16), None, None
    found = observe(function, codes(m, k // 2), codes(1, n, k // 2), *sf, *tables, *result, float("inf"), 2)
    assert_same(cost.swapped((m,), n, k, BF16, tile_n, m), *found)


def num_mmas(report: ptxsim.Report) -> int:
    return sum(count for name, count in report.counters.items() if name.startswith("op:tcgen05.mma."))


# A tile of one step and of two: the last one whole, and with 1, 2 and 3 of its 4 blocks.
@pytest.mark.parametrize(("k", "mmas"), [(32, 1), (96, 2), (256, 4), (288, 5), (384, 6), (448, 7), (512, 8)])
def test_no_mma_behind_k(k: int, mmas: int) -> None:
    m, n = 7, 64
    sf = scales(*padded_shape(m, k // 16)), scales(*padded_shape(n, k // 16))
    d = torch.zeros(m, n, dtype=torch.bfloat16)
    function = linear_sm100.compiled(linear_sm100.largest_config(64, ARCH))
    assert num_mmas(observe(function, codes(m, k // 2), codes(n, k // 2), *sf, torch.ones(n), d, 1)[0]) == mmas
    operands, alpha, tables, swapped_tables, result, _ = group_arguments((m,), n, k, BF16, 0)
    for cta_group in (1, 2):
        function = grouped_gemm_sm100.compiled(grouped_gemm_sm100.largest_config(BF16, 128, cta_group, ARCH))
        assert num_mmas(observe(function, *operands, alpha, *tables, *result, float("inf"), 1)[0]) == mmas
    function = grouped_gemm_swap_sm100.compiled(grouped_gemm_swap_sm100.largest_config(BF16, 8, ARCH))
    assert num_mmas(observe(function, *operands, alpha, *swapped_tables, *result, float("inf"), 1)[0]) == mmas


# ---- the table ------------------------------------------------------------------------------------------------------


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost_table", ROOT / "scripts" / "cost_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_document_is_up_to_date() -> None:
    script = load_script()
    assert script.DOCUMENT.read_text(encoding="utf-8") == script.document(), "run python scripts/cost_table.py"


@pytest.mark.parametrize("num_experts", [256, 384])
def test_choice_is_the_runners(num_experts: int) -> None:
    script = load_script()
    for tokens in (*range(1, 200), 1365, 1366, 2048, 2049, 4096):
        assert script.guess(tokens, 6, num_experts) == sm100.guess_tokens(tokens, 6, num_experts)
    assert script.SWAP_TOKENS == sm100.SWAP_TOKENS


@pytest.mark.parametrize("routing", ["balanced", "random"])
def test_counts(routing: str) -> None:
    script = load_script()
    model = deployment.MODELS["deepseek-v4-flash"]
    for tokens in (1, 64):
        whole = script.counts(deployment.Rank(model, 8), tokens, routing)
        assert len(whole) == 256
        assert sum(whole) == tokens * 6
        assert max(whole) <= tokens
        assert len(script.counts(deployment.Rank(model, 8, ep=True), tokens, routing)) == 32
