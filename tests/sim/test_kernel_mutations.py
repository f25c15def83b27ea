"""Faults in the sources and the PTX of the sm100 kernels: each must be noticed, and the good kernels must pass.

What a fault must show is either a finding of the simulator or, without any, a result that the kernel's own test refuses.
The linear has a longer list of its own, test_seeded_bugs.py. Run as a program it prints the table.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("CUTE_DSL_ARCH", "sm_100a")

import pytest
import seeded_linear as ptx_edits
import test_finalize_sm100 as finalize_test
import test_grouped_gemm_sm100 as gemm_test
import test_grouped_gemm_swap_sm100 as swap_test
import test_inverse_rope_quantize_sm100 as rope_test
import test_quantize_sm100 as quantize_test
import test_route_sm100 as route_test
import torch
from mutations import Kernel, Mutation, Table, ptx, run_mutant, source
from quantize_kit import random_rows, special_rows
from seeding import POLICIES, WRONG, change_all, drop, drop_all

from ptxsim import findings

# ---- quantize -------------------------------------------------------------------------------------------------------


def run_rows(module: ModuleType, policy: str, seed: int) -> None:
    quantize_test.simulate(special_rows(7), 1.0, 1, policy, seed)
    quantize_test.simulate(random_rows(9, 48, 0), quantize_test.TENSOR_SCALE, 2, policy, seed)
    quantize_test.simulate(random_rows(130, 2 * 32, 3).view(130, 2, 32), quantize_test.TENSOR_SCALE, 2, policy, seed)


def run_slots(module: ModuleType, policy: str, seed: int) -> None:
    topk_ids, num_experts = quantize_test.ROUTINGS["many experts, few tokens"]
    slots = quantize_test.make_slots(random_rows(len(topk_ids), 48, 1), topk_ids, num_experts)
    quantize_test.simulate_slots(slots, 3, policy, seed)


def run_edges(module: ModuleType, policy: str, seed: int) -> None:
    # Blocks whose bytes depend on the last bit of each operation.
    for edges in (quantize_test.scale_edges, quantize_test.code_edges):
        blocks, tensor_scale = edges(200_000)
        num_experts = len(blocks)
        slots = quantize_test.make_slots(blocks, torch.arange(num_experts).unsqueeze(1), num_experts)
        quantize_test.simulate_slots(slots._replace(tensor_scale=tensor_scale), 4, policy, seed)


rows = Kernel("quantize", "quantize_sm100", quantize_test, "quantize_sm100", run_rows)
slots = Kernel("quantize by slot", "quantize_sm100", quantize_test, "quantize_sm100", run_slots)
edges = Kernel("quantize, last bits", "quantize_sm100", quantize_test, "quantize_sm100", run_edges)

ROWS = [
    source(
        "scales behind a row's last block not zeroed",
        WRONG,
        "            else:\n                mSF[row, block] = quantize_block.zero_scale()\n",
        "",
    ),
    source("groups start at rows that are not padded", WRONG, "group * cute.round_up(num_items, TILE_ROWS)", "group * num_items"),
    source("largest of signed values", WRONG, "absf(values[i])", "absf(values[0])", where="quantize_block"),
    source("-0.0 keeps its sign", WRONG, " / divisor + cutlass.Float32(0.0)", " / divisor", where="quantize_block"),
    source(
        "rows of a scale tile not interleaved",
        WRONG,
        "(TILE_BYTES // _RUN_ROWS, TILE_COLUMNS, tiles_k",
        "(TILE_COLUMNS, TILE_BYTES // TILE_COLUMNS, tiles_k",
        where="quantize_block",
    ),
]
SLOTS = [
    source("tensor scale of another expert", WRONG, "mTensorScale[mTileExpert[row // TILE_ROWS]]", "mTensorScale[0]"),
    source("one slot too many", "out-of-bounds", "num_items = mNumSlots[0]", "num_items = mNumSlots[0] + 1"),
    source("rows not gathered", WRONG, "token, row = mSlotToken[item]", "token, row = item // 6"),
]
EDGES = [
    source(
        "product with a reciprocal for the scale",
        WRONG,
        "amax / (NVFP4.code_max * tensor_scale)",
        "amax * (1.0 / (NVFP4.code_max * tensor_scale))",
        where="quantize_block",
    ),
    source(
        "product with a reciprocal for the codes",
        WRONG,
        "values[i] / divisor",
        "values[i] * (1.0 / divisor)",
        where="quantize_block",
    ),
]

# ---- inverse RoPE and quantize --------------------------------------------------------------------------------------


def run_rope(module: ModuleType, policy: str, seed: int) -> None:
    rope_test.simulate(rope_test.random_o(7, 4, 192, seed), rope_test.make_cache(48), 2, 0.0021, 2, policy, seed)


rope = Kernel("inverse RoPE, quantize", "inverse_rope_quantize_sm100", rope_test, "kernels", run_rope)

ROPE = [
    source("rotated forth, not back", WRONG, "rounded_product(a, -sin[i])", "rounded_product(a, sin[i])"),
    source("first rotated block left out", WRONG, "if head_block >= self", "if head_block > self"),
    source("cosines for sines", WRONG, "(num_cosines + block,)", "(block,)"),
    source("place in the batch for the position", WRONG, "mCosSin[mPositions[token], None]", "mCosSin[token, None]"),
    source("no rounding to BF16 between", WRONG, ".to(cutlass.BFloat16).to(cutlass.Float32))", ")"),
    source("every group reads the first heads", WRONG, "first_block = group * blocks.divisor", "first_block = 0"),
]

# ---- route ----------------------------------------------------------------------------------------------------------


def run_route(module: ModuleType, policy: str, seed: int) -> None:
    route_test.simulate(module.Config(6), route_test.make_ids(129, 6, 48, 32), 48, None, policy, seed)


def run_route_cluster(module: ModuleType, policy: str, seed: int) -> None:
    config = module.Config(8, 32, True, num_ctas=2)
    route_test.simulate(config, route_test.make_ids(64, 8, 256, 32), 64, route_test.rank_map(1, 4, 256), policy, seed)


route = Kernel("route", "route_sm100", route_test, "route_sm100", run_route)
route_cluster = Kernel("route, 2 CTAs", "route_sm100", route_test, "route_sm100", run_route_cluster)

ROUTE = [
    source("order of 32 choices reversed", WRONG, "lower = same & cute.arch.lanemask_lt()", "lower = same & cute.arch.lanemask_gt()"),
    source("-1 is expert 0", WRONG, "cutlass.Int32(expert), num_experts)", "cutlass.Int32(expert), cutlass.Int32(0))"),
    source("no barrier behind the counts", "race", "place)\n        cute.arch.sync_threads()\n        before", "place)\n        before"),
    source("choice behind the last gets a slot", "out-of-bounds", "if choice < num_choices:", "if choice <= num_choices:"),
    source("part of a tile is no tile", WRONG, "tiles = cute.ceil_div(total, TILE_ROWS)", "tiles = total // TILE_ROWS"),
    source("expert of the tile before", WRONG, "smem.sTile[expert + bit] <= tile", "smem.sTile[expert + bit] < tile"),
    source("a warp counted twice in the scan", WRONG, "if warp < place.warp:", "if warp <= place.warp:"),
]
ROUTE_CLUSTER = [
    source(
        "no cluster barrier before the exchange",
        "race | uninitialised-read",
        "            cute.arch.cluster_arrive()\n            cute.arch.cluster_wait()\n            own",
        "            own",
    ),
    source(
        "CTA leaves while others read",
        "race | shared-in-use-at-exit",
        "outlive the CTAs that read it.\n            cute.arch.cluster_wait()",
        "outlive the CTAs that read it.\n            pass",
    ),
    source("an expert of another rank is expert 0", WRONG, "local, cutlass.Int32(-1))", "cutlass.max(local, 0), cutlass.Int32(-1))"),
]

# ---- grouped GEMM ---------------------------------------------------------------------------------------------------


def run_gemm(epilogue: str, tile_n: int, group: int, counts: tuple[int, ...], n: int, k: int):
    # As few stages as there can be: every barrier wraps.
    def run(module: ModuleType, policy: str, seed: int) -> None:
        config = module.Config(epilogue, tile_n, num_ab_stages=2, num_acc_stages=1, num_d_stages=1, cta_group=group)
        gemm_test.simulate(config, counts, n, k, 1, policy, seed)

    return run


def gemm_kernel(name: str, *args) -> Kernel:
    return Kernel(f"grouped GEMM, {name}", "grouped_gemm_sm100", gemm_test, "grouped_gemm_sm100", run_gemm(*args))


gemm = gemm_kernel("bf16", "bf16", 128, 1, (130, 0, 1), 200, 544)
# The pairs have two experts, and one with a tile that is nobody's.
gemm_pair = gemm_kernel("bf16, 2 CTAs", "bf16", 128, 2, (1, 130), 200, 544)
gemm_swiglu = gemm_kernel("swiglu", "swiglu", 128, 1, (7, 3), 160, 256)
# Tiles of 64: two share a scale tile.
gemm_quantized = gemm_kernel("swiglu_nvfp4", "swiglu_nvfp4", 64, 1, (7, 3), 192, 256)
gemm_quantized_pair = gemm_kernel("swiglu_nvfp4, 2 CTAs", "swiglu_nvfp4", 128, 2, (1, 130), 192, 256)

GEMM = [
    source("B of another expert", WRONG, "tBgB[None, n_tile, k_tile, expert]", "tBgB[None, n_tile, k_tile, 0]"),
    source("B's scales of another expert", WRONG, "tBgSFB[None, k_tile, sf_tile, expert]", "tBgSFB[None, k_tile, sf_tile, 0]"),
    source("alpha of another expert", WRONG, "scaling.mAlpha[expert, n // (", "scaling.mAlpha[0, n // ("),
    source("A's scales of another block of K", WRONG, "tAgSFA[None, k_tile, row_tile]", "tAgSFA[None, 0, row_tile]"),
    source("B's scales of another stage", "race | in-flight-access", "tCsSFB[None, None, None, None, stage.index]", "tCsSFB[None, None, None, None, 0]"),
    source("alpha read beyond n", "out-of-bounds", "if n < scaling.n:", "if n <= scaling.n:"),
    source("last group left out", "output-not-written", "cute.size(mPaddedOffset) - 1]", "cute.size(mPaddedOffset) - 2]"),
    source("tiles behind the last group too", "out-of-bounds", "end=cute.ceil_div(num_row_tiles", "end=cute.ceil_div(num_row_tiles + 1"),
    source("accumulator given back before it is read", "race", "if step == num_steps - 1:", "if step == 0:", policies="eager random"),
    source("a store's columns of another tile", "output-not-written", "column = n_tile * (num_steps", "column = 0 * (num_steps"),
    ptx("load never waits for an empty stage", "race | barrier-overarrival", ptx_edits.load_never_waits),
    ptx("MMA never waits for A and B", "race | in-flight-access | uninitialised-read", ptx_edits.mma_never_waits_for_data),
    ptx("MMA never waits for a free accumulator", "race", ptx_edits.mma_never_waits_for_accumulator),
    ptx("epilogue never waits for the accumulator", "race | uninitialised-read", ptx_edits.epilogue_never_waits),
    ptx("stage is never given back", "deadlock", drop(ptx_edits.COMMIT, 0, 2)),
    ptx("expect_tx of 128 bytes too few", "deadlock | leftover-transactions", ptx_edits.expect(-128)),
    ptx("no fence before the TMA store", "missing-proxy-fence", drop_all(ptx_edits.FENCE_ASYNC, 1)),
    ptx("no wait before D is overwritten", "race", drop(ptx_edits.WAIT_READ, 0, 2)),
    ptx("no barrier before the TMA store", "race", ptx_edits.no_barrier_before_store),
    ptx("accumulator's barrier expects 129 arrivals", "deadlock", ptx_edits.init_count(ptx_edits.acc_empty, 129)),
    ptx("sums rounded towards zero", WRONG, change_all(r"cvt\.rn\.bf16x2", 32, r"\.rn\.", ".rz.")),
]
GEMM_PAIR = [
    source("A's scales of the pair's other tile", WRONG, "tAgSFA[None, k_tile, row_tile]", "tAgSFA[None, k_tile, m_tile]"),
    source("one pass for two experts", "output-not-written", "passes = cutlass.Int32(2)", "passes = cutlass.Int32(1)"),
    source("both CTAs store in both passes", WRONG, "is_mine = tiles.mTileExpert[row_tile] == expert", "is_mine = cutlass.Boolean(True)"),
    source("both CTAs issue MMAs", "race | barrier-overarrival | deadlock | tmem-misuse | barrier-misuse", "if tiles.rank == 0:", "if tiles.rank >= 0:"),
    source(
        "setup ends without a cluster barrier",
        "race | barrier-misuse | missing-mbarrier-init-fence | uninitialised-read",
        "_sync_all()\n        blackwell.after",
        "epilogue_barrier\n        cute.arch.sync_threads()\n        blackwell.after",
    ),
    source("one CTA's epilogue frees the accumulator", "barrier-overarrival | race", "EPILOGUE_THREADS * self.config.cta_group", "EPILOGUE_THREADS"),
    ptx("expect_tx of one CTA's bytes", "barrier-misuse | race | in-flight-access | leftover-transactions | deadlock", ptx_edits.expect(-128)),
]
GEMM_SWIGLU = [
    source("gate and up exchanged", WRONG, "gate, up = rAcc[at] * factors.alpha_gate, rAcc[at + INTERLEAVE]", "up, gate = rAcc[at] * factors.alpha_gate, rAcc[at + INTERLEAVE]"),
    source("gate and up alternate by columns", WRONG, "at = i // INTERLEAVE * 2 * INTERLEAVE + i % INTERLEAVE", "at = i"),
    source("clamp behind SiLU", WRONG, "    return gate * sigmoid * up", "    return cute.arch.fmin(gate * sigmoid, limit, nan=True) * up", where="blackwell"),
    source("gate is not clamped", WRONG, "gate = cute.arch.fmin(gate, limit, nan=True)", "pass", where="blackwell"),
    source("up is not clamped from below", WRONG, "cute.arch.fmax(up, -limit, nan=True)", "up", where="blackwell"),
]
GEMM_QUANTIZED = [
    source("h_scale of another expert", WRONG, "scaling.mHScale[expert]", "scaling.mHScale[0]"),
    source("scales of the scale tile's first half", WRONG, "shift = half * (", "shift = 0 * ("),
    source("h rounded to BF16 before it is quantized", WRONG, "gate, up, factors.limit)", "gate, up, factors.limit).to(cutlass.BFloat16).to(cutlass.Float32)"),
    source("scales behind the last block not zeroed", WRONG, "quantize_block.zero_scale()", "scale"),
]
GEMM_QUANTIZED_PAIR = [
    source("scales of D from both passes", WRONG, "if is_mine & (block + i < scaling.num_blocks):", "if block + i < scaling.num_blocks:"),
    source("scales of D of another tile", WRONG, "(n_tile * num_steps + step) * STEP_BLOCKS", "(n_tile + step) * STEP_BLOCKS"),
]

# ---- grouped GEMM, operands exchanged -------------------------------------------------------------------------------


def run_swap(epilogue: str, tile_n: int, shape: tuple[tuple[int, ...], int, int, int]):
    limit = None if epilogue == "bf16" else swap_test.LIMIT

    def run(module: ModuleType, policy: str, seed: int) -> None:
        config = module.Config(epilogue, tile_n, num_ab_stages=2, num_acc_stages=1)
        counts, n, k, clusters = shape
        problem = swap_test.make_problem(counts, n, k, epilogue)
        result = swap_test.run(config, problem, clusters, policy, seed, limit)
        swap_test.assert_right(config, problem, result, limit, exact=True)

    return run


def swap_kernel(name: str, *args) -> Kernel:
    return Kernel(f"swapped GEMM, {name}", "grouped_gemm_swap_sm100", swap_test, "swap", run_swap(*args))


swap = swap_kernel("bf16", "bf16", 8, ((3, 0, 9), 136, 544, 1))
swap_quantized = swap_kernel("swiglu_nvfp4", "swiglu_nvfp4", 32, ((65, 0, 1), 160, 256, 1))

SWAP = [
    source("W of another expert", WRONG, "tAgW[None, at.w_tile, k_tile, at.expert]", "tAgW[None, at.w_tile, k_tile, 0]"),
    source("W's scales of another expert", WRONG, "tAgSFW[None, k_tile, at.w_tile, at.expert]", "tAgSFW[None, k_tile, at.w_tile, 0]"),
    source("tokens' scales not moved to lane 0", WRONG, "group = row % WARP // SF_GROUP_LANES", "group = 0"),
    source("sums read without their padding", f"{WRONG} | uninitialised-read", "stride=(1, (BF16_UNIT, GROUP_WORDS), TOKEN_WORDS),", "stride=(1, (BF16_UNIT, WARP), TOKEN_WORDS),"),
    source("sums of a token overlap the next one's", "race", "((1, GROUP_WORDS), TOKEN_WORDS)", "((1, GROUP_WORDS), TILE_W)"),
    source("rows of no token stored", WRONG, "if token < cutlass.min(num_tokens, config.tile_n):", "if token < config.tile_n:"),
    source("last tile left out", WRONG, "end=sTile[MAX_EXPERTS] * num_w,", "end=sTile[MAX_EXPERTS] * num_w - 1,"),
    ptx("MMA never waits for W and X", "race | in-flight-access | uninitialised-read", ptx_edits.mma_never_waits_for_data),
    ptx("epilogue never waits for the accumulator", "race | uninitialised-read", ptx_edits.epilogue_never_waits),
    ptx("sums stored before the last ones are read", "race", drop(ptx_edits.EPILOGUE_BARRIER, 0, 2)),
    ptx("sums read before they are stored", "race | uninitialised-read", drop(ptx_edits.EPILOGUE_BARRIER, 1, 2)),
    ptx("setup ends without a barrier", "race | uninitialised-read | barrier-misuse", ptx_edits.no_initial_barrier),
]
SWAP_QUANTIZED = [
    source("scales of the first 32 tokens for all", WRONG, "shift = at.first_token % TILE_ROWS // WARP * TILE_COLUMNS", "shift = 0"),
    source("alpha of gate rows first, then up rows", WRONG, "w_row // INTERLEAVE % 2", "w_row // (out.n // 2)"),
    source("gate and up exchanged", WRONG, "swiglu(rSums[i], rSums[INTERLEAVE + i]", "swiglu(rSums[INTERLEAVE + i], rSums[i]"),
    source("h_scale of another expert", WRONG, "out.mHScale[expert]", "out.mHScale[0]"),
]

# ---- finalize -------------------------------------------------------------------------------------------------------


def run_finalize(module: ModuleType, policy: str, seed: int) -> None:
    finalize_test.simulate(module.Config(6, shared=True), 7, 520, policy, seed)


finalize = Kernel("finalize", "finalize_sm100", finalize_test, "finalize_sm100", run_finalize)

FINALIZE = [
    source(
        "sum from the last choice to the first",
        WRONG,
        "in cutlass.range_constexpr(self.config.top_k):\n            if rows[choice] >= 0:\n                _add",
        "in cutlass.range_constexpr(self.config.top_k - 1, -1, -1):\n            if rows[choice] >= 0:\n                _add",
    ),
    source("-1 is a row", "out-of-bounds", "if rows[choice] >= 0:\n                cute.autovec", "if rows[choice] >= -1:\n                cute.autovec"),
    source("a vector behind the last column", "out-of-bounds | race", "vector * VECTOR < mOut.shape[1]", "vector * VECTOR <= mOut.shape[1]"),
    source("weights of another token", WRONG, "mTopkWeights[token, choice]", "mTopkWeights[0, choice]"),
    source("products rounded towards zero", WRONG, '"mul.rn.f32', '"mul.rz.f32', where="rounding"),
]

MUTANTS: list[tuple[Kernel, list[Mutation]]] = [
    (rows, ROWS),
    (slots, SLOTS),
    (edges, EDGES),
    (rope, ROPE),
    (route, ROUTE),
    (route_cluster, ROUTE_CLUSTER),
    (gemm, GEMM),
    (gemm_pair, GEMM_PAIR),
    (gemm_swiglu, GEMM_SWIGLU),
    (gemm_quantized, GEMM_QUANTIZED),
    (gemm_quantized_pair, GEMM_QUANTIZED_PAIR),
    (swap, SWAP),
    (swap_quantized, SWAP_QUANTIZED),
    (finalize, FINALIZE),
]
KERNELS = [kernel for kernel, _ in MUTANTS]
CASES = [(kernel, mutation) for kernel, mutations in MUTANTS for mutation in mutations]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    lines = Table()
    yield lines
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if request.config.get_verbosity() > 0 and capture is not None:
        with capture.global_and_fixture_disabled():
            print(f"\n{lines}")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_good_kernel(kernel: Kernel, table: Table, tmp_path: Path) -> None:
    outcomes = run_mutant(kernel, None, tmp_path)
    table.add(kernel.name, "none", outcomes)
    for policy, outcome in outcomes.items():
        assert not outcome.codes, f"{policy}: {outcome}: {outcome.detail}"


@pytest.mark.parametrize(
    ("kernel", "mutation"), CASES, ids=[f"{kernel.name}: {mutation.name}" for kernel, mutation in CASES]
)
def test_fault_is_noticed(kernel: Kernel, mutation: Mutation, table: Table, tmp_path: Path) -> None:
    outcomes = run_mutant(kernel, mutation, tmp_path)
    table.add(kernel.name, mutation.name, outcomes)
    for policy, outcome in outcomes.items():
        assert mutation.expected & set(outcome.codes), (
            f"{policy}: {outcome}, expected one of {sorted(mutation.expected)}: {outcome.detail}"
        )


def test_every_fault_names_codes_and_policies_that_exist() -> None:
    # A misspelt one would test nothing.
    codes = {value for name, value in vars(findings).items() if name.isupper()} | {WRONG}
    for _, mutation in CASES:
        assert mutation.policies
        assert set(mutation.policies) <= set(POLICIES)
        assert mutation.expected
        assert mutation.expected <= codes, mutation.name
    names = [(kernel.name, mutation.name) for kernel, mutation in CASES]
    assert len(set(names)) == len(names)


if __name__ == "__main__":
    everything = Table()
    with tempfile.TemporaryDirectory() as folder:
        for good, faults in MUTANTS:
            everything.add(good.name, "none", run_mutant(good, None, Path(folder)))
            for fault in faults:
                everything.add(good.name, fault.name, run_mutant(good, fault, Path(folder)))
    print(everything)
