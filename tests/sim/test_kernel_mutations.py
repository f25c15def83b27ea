"""Faults in the sources and the PTX of the sm100 kernels: each must be noticed, and the good kernels must pass.

What a fault must show is either a finding of the simulator or, without any, a result that the kernel's own test refuses.
The linear has a longer list of its own, test_seeded_bugs.py. Run as a program it prints the table.
"""

import os
import re
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
from seeding import POLICIES, WRONG, Edit, Text, change_all, drop, drop_all

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
    source(
        "groups start at rows that are not padded",
        WRONG,
        "group * cute.round_up(num_items, TILE_ROWS)",
        "group * num_items",
    ),
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
]
EDGES = [
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
    source("place in the batch for the position", WRONG, "mCosSin[mPositions[token], None]", "mCosSin[token, None]"),
    source("no rounding to BF16 between", WRONG, ".to(cutlass.BFloat16).to(cutlass.Float32))", ")"),
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
    source(
        "order of 32 choices reversed",
        WRONG,
        "lower = same & cute.arch.lanemask_lt()",
        "lower = same & cute.arch.lanemask_gt()",
    ),
    source("-1 is expert 0", WRONG, "cutlass.Int32(expert), num_experts)", "cutlass.Int32(expert), cutlass.Int32(0))"),
    source(
        "no barrier behind the counts",
        "race",
        "place)\n        cute.arch.sync_threads()\n        before",
        "place)\n        before",
    ),
    source(
        "choice behind the last gets a slot", "out-of-bounds", "if choice < num_choices:", "if choice <= num_choices:"
    ),
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
]

# ---- grouped GEMM ---------------------------------------------------------------------------------------------------

LOADS = r"cp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global"
LOAD_A, LOAD_B, LOAD_SFA, LOAD_SFB = range(4)


def coordinate(load: int, at: int, other: str) -> Edit:
    """A load's coordinate `at`, the fastest first, is OTHER, which an instruction makes from it."""

    def edit(t: Text) -> None:
        line = t.one(LOADS, load, 4)
        [inside] = re.findall(r"\{([^}]*)\}", t.lines[line])
        parts = [part.strip() for part in inside.split(",")]
        made = other.format(parts[at])
        parts[at] = "OTHER"
        copy = t.lines[line].strip().replace(inside, ", ".join(parts))
        t.lines[line] = f"{{ .reg .b32 OTHER; {made} {copy} }}"

    return edit


def barrier_of_a_cta(at: int) -> Edit:
    """A barrier of the cluster is one of each CTA."""

    def edit(t: Text) -> None:
        t.drop(t.one(r"barrier\.cluster\.wait", at, 2))
        t.change(t.one(r"barrier\.cluster\.arrive", at, 2), r"barrier\.cluster\.arrive", "bar.sync 0")

    return edit


def frees_too_early(t: Text) -> None:
    """The accumulator's barrier expects one CTA's threads."""
    t.change(t.one(r"mbarrier\.init", 5, 6), r"%r\d+;", "128;")


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

# The last step of K has one block of 64, which is all that a loop over the step does.
LAST_STEP = [
    source(
        "MMA of the last block of K left out",
        WRONG,
        "cutlass.range(num_left, unroll",
        "cutlass.range(num_left - 1, unroll",
    ),
    source("last step of K overwrites the sums", WRONG, "k_tile + k_block != 0", "k_block != 0"),
]
GEMM = [
    *LAST_STEP,
    ptx("B of another expert", WRONG, coordinate(LOAD_B, 2, "mov.b32 OTHER, 0;")),
    ptx("B's scales of another expert", WRONG, coordinate(LOAD_SFB, 3, "mov.b32 OTHER, 0;")),
    source("alpha of another expert", WRONG, "scaling.mAlpha[expert, n // (", "scaling.mAlpha[0, n // ("),
    ptx("A's scales of another block of K", WRONG, coordinate(LOAD_SFA, 1, "mov.b32 OTHER, 0;")),
    ptx("scales of the next stage", "race | in-flight-access | uninitialised-read", ptx_edits.scales_of_the_next_stage),
    source("alpha read beyond n", "out-of-bounds", "if n < scaling.n:", "if n <= scaling.n:"),
    source(
        "last group left out", "output-not-written", "cute.size(mPaddedOffset) - 1]", "cute.size(mPaddedOffset) - 2]"
    ),
    source("accumulator given back before it is read", "race", "if step == num_steps - 1:", "if step == 0:"),
    ptx("load never waits for an empty stage", "race | barrier-overarrival", ptx_edits.load_never_waits),
    ptx(
        "MMA never waits for A and B",
        "race | in-flight-access | uninitialised-read",
        ptx_edits.mma_never_waits_for_data,
    ),
    ptx("MMA never waits for a free accumulator", "race", ptx_edits.mma_never_waits_for_accumulator),
    ptx("epilogue never waits for the accumulator", "race | uninitialised-read", ptx_edits.epilogue_never_waits),
    ptx("stage is never given back", "deadlock", drop(ptx_edits.COMMIT, 0, 2)),
    ptx("expect_tx of 128 bytes too few", "deadlock | leftover-transactions", ptx_edits.expect(-128)),
    ptx("no fence before the TMA store", "missing-proxy-fence", drop_all(ptx_edits.FENCE_ASYNC, 1)),
    ptx("no wait before D is overwritten", "race", drop(ptx_edits.WAIT_READ, 0, 2)),
    ptx("no barrier before the TMA store", "race", drop(ptx_edits.EPILOGUE_BARRIER, 1, 2)),
    ptx("accumulator's barrier expects 129 arrivals", "deadlock", ptx_edits.init_count(ptx_edits.acc_empty, 129)),
    ptx("sums rounded towards zero", WRONG, change_all(r"cvt\.rn\.bf16x2", 32, r"\.rn\.", ".rz.")),
]
GEMM_PAIR = [
    *LAST_STEP,
    ptx("A's scales of the pair's other tile", WRONG, coordinate(LOAD_SFA, 2, "xor.b32 OTHER, {}, 1;")),
    source("one pass for two experts", "output-not-written", "passes = cutlass.Int32(2)", "passes = cutlass.Int32(1)"),
    source(
        "both CTAs store in both passes",
        WRONG,
        "is_mine = tiles.mTileExpert[row_tile] == expert",
        "is_mine = cutlass.Boolean(True)",
    ),
    ptx(
        "setup ends without a cluster barrier",
        "race | barrier-misuse | missing-mbarrier-init-fence | uninitialised-read",
        barrier_of_a_cta(0),
    ),
    ptx("one CTA's epilogue frees the accumulator", "barrier-overarrival | race", frees_too_early),
]
GATE = "gate = cute.arch.fmin(gate, limit, nan=True)"
UP = "up = cute.arch.fmin(cute.arch.fmax(up, -limit, nan=True), limit, nan=True)"
SIGMOID = "sigmoid = cute.arch.rcp_approx(1.0 + cute.math.exp2(gate * -LOG2_E, fastmath=True))"
GEMM_SWIGLU = [
    source(
        "gate and up exchanged",
        WRONG,
        "gate, up = rAcc[at] * factors.alpha_gate, rAcc[at + INTERLEAVE]",
        "up, gate = rAcc[at] * factors.alpha_gate, rAcc[at + INTERLEAVE]",
    ),
    source(
        "clamp behind SiLU",
        WRONG,
        f"    {GATE}\n    {UP}\n    {SIGMOID}\n    return gate * sigmoid * up",
        f"    {UP}\n    {SIGMOID}\n    return cute.arch.fmin(gate * sigmoid, limit, nan=True) * up",
        where="blackwell",
    ),
    source("up is not clamped from below", WRONG, "cute.arch.fmax(up, -limit, nan=True)", "up", where="blackwell"),
]
GEMM_QUANTIZED = [
    source("h_scale of another expert", WRONG, "scaling.mHScale[expert]", "scaling.mHScale[0]"),
    source("scales of the scale tile's first half", WRONG, "shift = half * (", "shift = 0 * ("),
    source(
        "h rounded to BF16 before it is quantized",
        WRONG,
        "gate, up, factors.limit)",
        "gate, up, factors.limit).to(cutlass.BFloat16).to(cutlass.Float32)",
    ),
]
GEMM_QUANTIZED_PAIR = [
    source(
        "scales of D of another tile",
        WRONG,
        "(n_tile * num_steps + step) * STEP_BLOCKS",
        "(n_tile + step) * STEP_BLOCKS",
    ),
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
    *LAST_STEP,
    ptx("W of another expert", WRONG, coordinate(LOAD_A, 2, "mov.b32 OTHER, 0;")),
    ptx("W's scales of another expert", WRONG, coordinate(LOAD_SFA, 3, "mov.b32 OTHER, 0;")),
    ptx("tokens' scales not moved to lane 0", WRONG, coordinate(LOAD_SFB, 0, "mov.b32 OTHER, 0;")),
    source(
        "sums read without their padding",
        f"{WRONG} | uninitialised-read",
        "stride=(1, (BF16_UNIT, GROUP_WORDS), TOKEN_WORDS),",
        "stride=(1, (BF16_UNIT, WARP), TOKEN_WORDS),",
    ),
    source(
        "rows of no token stored",
        WRONG,
        "if token < cutlass.min(num_tokens, config.tile_n):",
        "if token < config.tile_n:",
    ),
    source("last tile left out", WRONG, "end=sTile[MAX_EXPERTS] * num_w,", "end=sTile[MAX_EXPERTS] * num_w - 1,"),
    ptx(
        "MMA never waits for W and X",
        "race | in-flight-access | uninitialised-read",
        ptx_edits.mma_never_waits_for_data,
    ),
    ptx("epilogue never waits for the accumulator", "race | uninitialised-read", ptx_edits.epilogue_never_waits),
    ptx("sums stored before the last ones are read", "race", drop(ptx_edits.EPILOGUE_BARRIER, 0, 2)),
    ptx("sums read before they are stored", "race | uninitialised-read", drop(ptx_edits.EPILOGUE_BARRIER, 1, 2)),
    ptx("setup ends without a barrier", "race | uninitialised-read | barrier-misuse", ptx_edits.no_initial_barrier),
]
SWAP_QUANTIZED = [
    source(
        "scales of the first 32 tokens for all",
        WRONG,
        "shift = at.first_token % TILE_ROWS // WARP * TILE_COLUMNS",
        "shift = 0",
    ),
    source("alpha of gate rows first, then up rows", WRONG, "w_row // INTERLEAVE % 2", "w_row // (out.n // 2)"),
]

# ---- finalize -------------------------------------------------------------------------------------------------------


def run_finalize(module: ModuleType, policy: str, seed: int) -> None:
    finalize_test.simulate(module.Config(6, shared=True), 7, 520, policy, seed)


finalize = Kernel("finalize", "finalize_sm100", finalize_test, "finalize_sm100", run_finalize)

FINALIZE = [
    source(
        "sum from the last choice to the first",
        WRONG,
        "in cutlass.range_constexpr(self.config.top_k):\n            if rows[choice] >= 0:\n                self._add",
        "in cutlass.range_constexpr(self.config.top_k - 1, -1, -1):\n"
        "            if rows[choice] >= 0:\n                self._add",
    ),
    source(
        "-1 is a row",
        "out-of-bounds",
        "if rows[choice] >= 0:\n                cute.autovec",
        "if rows[choice] >= -1:\n                cute.autovec",
    ),
    source(
        "a vector behind the last column",
        "out-of-bounds | race",
        "vector * VECTOR < mOut.shape[1]",
        "vector * VECTOR <= mOut.shape[1]",
    ),
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
# The simulator does not notice: it lets the pair's tcgen05.dealloc wait for the peer, which hardware may do, and need not.
MISSED = [(gemm_pair, ptx("CTAs end without a cluster barrier", "race | shared-in-use-at-exit", barrier_of_a_cta(1)))]
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


@pytest.mark.parametrize(("kernel", "mutation"), MISSED, ids=[mutation.name for _, mutation in MISSED])
def test_fault_that_is_known_to_be_missed(kernel: Kernel, mutation: Mutation, table: Table, tmp_path: Path) -> None:
    # Fails when the simulator learns to see it: then it belongs into the list above.
    outcomes = run_mutant(kernel, mutation, tmp_path)
    table.add(kernel.name, mutation.name, outcomes)
    assert all(not outcome.codes for outcome in outcomes.values())


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
            for fault in [*faults, *(missed for owner, missed in MISSED if owner is good)]:
                everything.add(good.name, fault.name, run_mutant(good, fault, Path(folder)))
    print(everything)
