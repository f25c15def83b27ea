"""Faults in the source of the sm90 grouped GEMM: each must be noticed, and the good kernels must pass.

As test_kernel_mutations.py, which says how; for the machine of hopper_kit.
"""

from pathlib import Path
from types import ModuleType

import pytest
import test_grouped_gemm_sm90 as gemm_test
from hopper_kit import on_hopper
from mutations import Kernel, Mutation, run_mutant, source
from seeding import WRONG

from ptxsim import findings

__all__ = ["on_hopper"]


def kernel(name: str, shape: tuple[tuple[int, ...], int, int, int], *args: object, **more: object) -> Kernel:
    """A configuration with two stages, so that every barrier wraps."""

    def run(module: ModuleType, policy: str, seed: int) -> None:
        config = module.Config(*args, num_stages=2, **more)
        gemm_test.simulate(config, shape, policy, seed, None if args[0] == "bf16" else gemm_test.LIMIT)

    return Kernel(name, "grouped_gemm_sm90", gemm_test, "gemm", run)


plain = kernel("bf16", ((9, 0, 3), 136, 544, 1), "bf16", 128, 8)
pair = kernel("bf16, pairs", ((20, 0, 3), 264, 544, 1), "bf16", 128, 16, cluster_w=2)
widths = kernel("bf16, widths", ((33, 0, 65, 3), 264, 288, 1), "bf16", 256, 64)
lots = kernel("bf16, small lots", ((3, 0, 9), 136, 288, 1), "bf16", 128, 144)
quantized = kernel("swiglu_nvfp4", ((9, 0, 3), 160, 272, 1), "swiglu_nvfp4", 128, 8)
even = kernel("bf16, even", ((9, 0, 3), 136, 1152, 5), "bf16", 128, 8, even=True)
one_group = kernel("bf16, one group", ((9,), 136, 544, 1), "bf16", 128, 8)
flagged = kernel("bf16, even with flags", ((9, 0, 3), 136, 1152, 5), "bf16", 128, 64, even=True)
# Few steps of K: stages do not keep the warps together.
short = kernel("bf16, one step of K", ((9, 0, 3), 136, 96, 1), "bf16", 128, 8)
small_units = kernel("bf16, units of 8 tokens", ((45, 0, 3), 72, 288, 1), "bf16", 128, 48, cluster_k=2)
# CTAs run one by one, those of the last group first: nobody mends what the others do to its columns.
larger = Kernel(
    "bf16, columns of others",
    "grouped_gemm_sm90",
    gemm_test,
    "gemm",
    lambda module, policy, seed: gemm_test.test_groups_of_columns(
        module.Config("bf16", 128, 64, num_stages=2, even=True), 40
    ),
)
part = Kernel(
    "bf16, one group in a larger matrix",
    "grouped_gemm_sm90",
    gemm_test,
    "gemm",
    lambda module, policy, seed: gemm_test.test_one_group_in_a_larger_matrix(
        module.Config("bf16", 256, 128, num_stages=2, one_group=True)
    ),
)
shared = kernel("bf16, shared in a cluster", ((20,), 72, 544, 1), "bf16", 128, 16, cluster_k=2, one_group=True)

COPIED = "race | in-flight-access"
RACE = "race | in-flight-access | uninitialised-read | barrier-overarrival | deadlock"
PLAIN = [
    source(
        "stage given back a step early",
        f"{RACE} | {WRONG}",
        "self._release(smem, last)\n                        last",
        "self._release(smem, index)\n                        last",
    ),
    source(
        "MMAs of two lots left in flight",
        f"{RACE} | {WRONG}",
        "warpgroup.wait_group(1)",
        "warpgroup.wait_group(2)",
    ),
    source(
        "load never waits for an empty stage",
        RACE,
        "                cute.arch.mbarrier_wait(smem.empty + index, phase)\n",
        "",
    ),
    source(
        "consumers never wait for a full stage",
        RACE,
        "            cute.arch.mbarrier_wait(smem.full + index, phase)\n",
        "",
    ),
    source("code one place off", WRONG, "(word << 6) & _CODE_MASK", "(word << 5) & _CODE_MASK"),
    source("lowest bit of a code lost", WRONG, " | ((word >> 8) & _LOWEST_MASK)", ""),
    source("scale of the other row", WRONG, "scale = scales[p % 2][step % 2]", "scale = scales[0][step % 2]"),
    source(
        "scale of the other half",
        WRONG,
        "hopper.mul_bf16x2_half(pairs[p], scale, step // 2)",
        "hopper.mul_bf16x2_half(pairs[p], scale, 1 - step // 2)",
    ),
    source("scales of the other 64 columns", WRONG, "rSF[0, h] = sSF[0, half, h,", "rSF[0, h] = sSF[0, 0, h,"),
    source(
        "alpha of the row 8 below",
        f"{WRONG} | out-of-bounds",
        "w_row + b * BLOCK_ROWS + 8 * h)",
        "w_row + b * BLOCK_ROWS + 8)",
    ),
    source(
        "alpha of another expert",
        WRONG,
        "alpha = out.mAlpha[expert, w_row // (out.n",
        "alpha = out.mAlpha[0, w_row // (out.n",
    ),
    source(
        "one token too many stored", WRONG, "(first + token < place.num_tokens)", "(first + token <= place.num_tokens)"
    ),
    source(
        "last column left out",
        WRONG,
        "(column + part * BF16_UNIT < out.n)",
        "(column + part * BF16_UNIT < out.n - 8)",
    ),
    source("sums of the tile before kept", WRONG, "            sums.fill(0.0)\n", ""),
    source(
        "tokens are counted before the wait",
        findings.BEFORE_WAIT,
        "            if constant_rows == 0:\n                hopper.wait_for_prerequisites()\n",
        "",
    ),
    source("tokens of another tile", WRONG, "% in_band) * tile_tokens", "% 1) * tile_tokens"),
]
COPIES = [
    source(
        "copied before it can be seen", "missing-proxy-fence", "            cute.arch.fence_view_async_shared()\n", ""
    ),
    source(
        "copied before all have written",
        f"{RACE} | missing-proxy-fence",
        "            self._wait_for_copies(config.num_buffers - 2, copies_units)\n"
        "        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARPGROUP)\n",
        "            self._wait_for_copies(config.num_buffers - 2, copies_units)\n",
    ),
    source(
        "buffer is written while it is copied",
        COPIED,
        "self._wait_for_copies(config.num_buffers - 2, copies_units)",
        "pass",
    ),
    source(
        "a copy too many under way",
        COPIED,
        "self._wait_for_copies(config.num_buffers - 2, copies_units)",
        "self._wait_for_copies(config.num_buffers - 1, copies_units)",
    ),
    source(
        "units with copies alone are counted",
        COPIED,
        "self._commit_copy(copies_units)",
        "self._commit_copy(copies_units & (token + config.unit_tokens <= place.num_tokens))",
    ),
    source("swizzle left out", WRONG, "(part ^ lane % 8)", "part"),
    source(
        "tokens in the other order",
        WRONG,
        "lane // 16 % at_once * 8 + lane % 8, thread",
        "(1 - lane // 16 % at_once) * 8 + lane % 8, thread",
    ),
    source(
        "columns 8 on exchanged", WRONG, "thread // WARP * 2 + lane // 8 % 2", "thread // WARP * 2 + 1 - lane // 8 % 2"
    ),
    source(
        "box reaches behind the last token",
        WRONG,
        "(token + config.unit_tokens <= place.num_tokens) & ",
        "(token < place.num_tokens) & ",
    ),
]
LARGER = [
    source("box reaches another's columns", WRONG, "(column + BLOCK_ROWS <= out.n)", "(column < out.n)"),
    source("columns of the first expert", WRONG, "place.expert * out.group_columns + column))", "column))"),
]
SHORT = [
    source(
        "the only buffer is written while it is read",
        RACE,
        "        if cutlass.const_expr(config.num_buffers == 1):\n",
        "        if cutlass.const_expr(False):\n",
    ),
]
SMALL_UNITS = [
    source(
        "more tokens stored than a unit has",
        f"{RACE} | {WRONG}",
        "(token < self.config.unit_tokens) & is_there",
        "is_there",
    ),
]
PART = [
    source(
        "ends while shared memory is copied",
        "shared-in-use-at-exit",
        "            self._wait_for_copies(0, self._copies_units(thread))\n\n    @cute.jit\n    def _multiply",
        "            pass\n\n    @cute.jit\n    def _multiply",
    ),
    source("map of all rows of D", WRONG, "cute.make_layout((num_rows, n), stride=mD.stride)", "mD.layout"),
]
PAIR = [
    source(
        "stage given back to the own CTA alone",
        RACE,
        "for cta in cutlass.range_constexpr(self.config.cluster_w):\n"
        "                        cute.arch.mbarrier_arrive(smem.empty + index, cta)",
        "cute.arch.mbarrier_arrive(smem.empty + index)",
    ),
    source(
        "both load the same half of the tokens",
        f"{RACE} | {WRONG}",
        "                tiles.rank,\n                cute.make_layout(config.cluster_w)",
        "                0,\n                cute.make_layout(config.cluster_w)",
    ),
    source("both take the same weight tile", WRONG, "* self.config.cluster_w + tiles.rank", "* self.config.cluster_w"),
]
WIDTHS = [
    source("width of fewer tokens", WRONG, "num_tokens <= widths[middle - 1]", "num_tokens <= widths[middle]"),
    source(
        "blocks of sums as near as the width", WRONG, "(1, 2, 4), config.tile_n // 2, 0)", "(1, 2, 4), width // 2, 0)"
    ),
    source(
        "tile begins where wide ones would",
        WRONG,
        "% in_band) * tile_tokens",
        "% in_band) * self.config.tile_n",
    ),
    source(
        "last unit of tokens not loaded",
        f"{RACE} | {WRONG}",
        "num_units = cute.ceil_div(width, config.load_tokens)",
        "num_units = cute.ceil_div(width - 16, config.load_tokens)",
    ),
    source("bytes of all units expected", RACE, "weight_bytes + self._num_units(at) * (2 *", "weight_bytes + 2 * (2 *"),
]
LOTS = [
    source("words of the other lot", WRONG, "sW[None, first // steps, thread, half]", "sW[None, 0, thread, half]"),
    source("scales of the other lot", WRONG, "word, step = rW[i], first + i", "word, step = rW[i], i"),
    source("tokens of the other lot", WRONG, "tCrB[None, None, step + i, index]", "tCrB[None, None, i, index]"),
]
QUANTIZED = [
    source("h_scale of another expert", WRONG, "out.mHScale[place.expert]", "out.mHScale[0]"),
    source(
        "gate and up exchanged",
        WRONG,
        "blackwell.swiglu(low, high, out.limit)",
        "blackwell.swiglu(high, low, out.limit)",
    ),
]
EVEN = [
    source("a sum read is not set back", WRONG, "[cutlass.Int32(NOTHING)] * 4)", "[cutlass.Int32(LEFT_ZERO)] * 4)"),
    source(
        "share ends a step early",
        f"{WRONG} | deadlock",
        "cutlass.min(tiles.end_step - before, tiles.num_k)",
        "cutlass.min(tiles.end_step - 1 - before, tiles.num_k)",
    ),
    source("last share of a tile not added", WRONG, "(tile + 1) * tiles.num_k - 1)", "(tile + 1) * tiles.num_k - 5)"),
    source(
        "last of longer shares is short",
        WRONG,
        "cutlass.min(share, tiles.num_longer)",
        "cutlass.min(share, tiles.num_longer - 1)",
    ),
]
FLAGGED = [
    source("flag not set back", WRONG, "            cute.arch.store(flag, cutlass.Int32(0))\n", ""),
]
SHARED = [
    source("sums left before others are done", RACE, "        cute.arch.mbarrier_wait(smem.done, 0)\n", ""),
    source("sums added before they are there", RACE, "        cute.arch.mbarrier_wait(smem.left, 0)\n", ""),
    source(
        "mbarriers of others used before they are set up",
        "missing-mbarrier-init-fence",
        "        # All CTAs have set up their mbarriers.\n        cute.arch.cluster_wait()\n",
        "",
    ),
    source(
        "bytes of one CTA not waited for",
        f"{RACE} | leftover-transactions",
        "num_chunks * (config.cluster_k * 8",
        "num_chunks * ((config.cluster_k - 1) * 8",
    ),
    source(
        "sums of the last CTA not added",
        WRONG,
        "for peer in cutlass.range_constexpr(config.cluster_k):\n                    cute.autovec_copy",
        "for peer in cutlass.range_constexpr(config.cluster_k - 1):\n                    cute.autovec_copy",
    ),
    source(
        "both left at the same place",
        f"{RACE} | {WRONG}",
        "thread, 0, 0, rank_k].iterator",
        "thread, 0, 0, 0].iterator",
    ),
    source(
        "tokens of the other CTA stored",
        f"{RACE} | {WRONG}",
        "first = tiles.rank_k * config.store_n",
        "first = 0 * tiles.rank_k",
    ),
    source(
        "steps left out between two CTAs",
        WRONG,
        "(tiles.rank_k + i) * tiles.num_k // self",
        "(tiles.rank_k + i) * (tiles.num_k - i) // self",
    ),
    source(
        "last rows of a group without a count left out",
        WRONG,
        "cute.ceil_div(num_rows, config.tile_n) if config.one_group",
        "num_rows // config.tile_n if config.one_group",
    ),
]

# Its weights are loaded before the wait.
ONE_GROUP = [
    source(
        "tokens are loaded before the wait",
        findings.BEFORE_WAIT,
        "                hopper.wait_for_prerequisites()\n"
        "                self._load(tma_x, mX, weights, out, smem, tiles, num_early)\n",
        "                self._load(tma_x, mX, weights, out, smem, tiles, num_early)\n"
        "                hopper.wait_for_prerequisites()\n",
    ),
    source(
        "consumers do not wait",
        findings.BEFORE_WAIT,
        "            hopper.wait_for_prerequisites()\n            cute.arch.setmaxregister_increase",
        "            cute.arch.setmaxregister_increase",
    ),
    source(
        "a stage too many loaded early",
        RACE,
        "cutlass.min(end_k - first_k, self.config.num_stages)",
        "cutlass.min(end_k - first_k, self.config.num_stages + 1)",
    ),
    source(
        "weights of an early step loaded again",
        RACE,
        "                    num_early -= 1\n",
        "                    num_early = cutlass.Int32(0)\n",
    ),
]

MUTANTS = [
    (plain, PLAIN),
    (pair, PAIR),
    (widths, WIDTHS),
    (widths, COPIES),
    (short, SHORT),
    (small_units, SMALL_UNITS),
    (larger, LARGER),
    (part, PART),
    (lots, LOTS),
    (quantized, QUANTIZED),
    (even, EVEN),
    (flagged, FLAGGED),
    (one_group, ONE_GROUP),
    (shared, SHARED),
]
# The simulator does not notice. Who leaves sums has them at the start of its share and who adds them at the end, so that they
# are there in time in all runs here; and it does not need a release for others to see what was stored before.
MISSED = [
    (
        even,
        source(
            "does not wait for sums",
            f"{WRONG} | race",
            "missing = missing | (rBits[i] == NOTHING)",
            "missing = cutlass.Boolean(False)",
        ),
    ),
    (
        flagged,
        source(
            "flag without release",
            "race | missing-proxy-fence",
            'cute.arch.store(flag, cutlass.Int32(1), sem="release", scope="gpu")',
            'cute.arch.store(flag, cutlass.Int32(1), sem="relaxed", scope="gpu")',
        ),
    ),
]
CASES = [(kernel, mutation) for kernel, mutations in MUTANTS for mutation in mutations]


@pytest.mark.parametrize("kernel", [kernel for kernel, _ in MUTANTS], ids=lambda kernel: kernel.name)
def test_good_kernel(kernel: Kernel, tmp_path: Path) -> None:
    for policy, outcome in run_mutant(kernel, None, tmp_path).items():
        assert not outcome.codes, f"{policy}: {outcome}: {outcome.detail}"


@pytest.mark.parametrize(
    ("kernel", "mutation"), CASES, ids=[f"{kernel.name}: {mutation.name}" for kernel, mutation in CASES]
)
def test_fault_is_noticed(kernel: Kernel, mutation: Mutation, tmp_path: Path) -> None:
    for policy, outcome in run_mutant(kernel, mutation, tmp_path).items():
        assert mutation.expected & set(outcome.codes), (
            f"{policy}: {outcome}, expected one of {sorted(mutation.expected)}: {outcome.detail}"
        )


@pytest.mark.parametrize(("kernel", "mutation"), MISSED, ids=[mutation.name for _, mutation in MISSED])
def test_fault_that_is_known_to_be_missed(kernel: Kernel, mutation: Mutation, tmp_path: Path) -> None:
    # Fails when it is seen: then it belongs into the list above.
    outcomes = run_mutant(kernel, mutation, tmp_path)
    assert all(not outcome.codes for outcome in outcomes.values())


def test_every_fault_names_codes_that_exist() -> None:
    codes = {value for name, value in vars(findings).items() if name.isupper()} | {WRONG}
    for _, mutation in CASES:
        assert mutation.expected
        assert mutation.expected <= codes, mutation.name
