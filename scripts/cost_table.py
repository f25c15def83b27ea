"""Writes docs/cost.md: what the GEMMs of DeepSeek-V4 move and multiply against what their shapes need.

    python scripts/cost_table.py            # writes the file
    python scripts/cost_table.py --check    # exit code 1 where the file is not what it would write

Operators and sizes come from cutedsl.deployment, kernels from the rules of cutedsl.runners.sm100 and each kernel's
choose_config, numbers from cutedsl.cost. Nothing is compiled or simulated.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cutedsl import cost
from cutedsl.cost import BF16, SWIGLU_NVFP4, Cost
from cutedsl.deployment import MODELS, Rank
from cutedsl.kernels import grouped_gemm_sm100, grouped_gemm_swap_sm100, linear_sm100
from cutedsl.layout import TILE_ROWS, max_padded_rows
from cutedsl.runners.sm100 import SWAP_TOKENS

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "cost.md"
TOKENS = (1, 8, 64, 512, 4096)
TP = 8
ROUTINGS = ("balanced", "random")
SEED = 0
# Waste that counts as none.
LIMIT = 1.1
_WITH = f"{round(100 * (LIMIT - 1))} % with"


class Choice(NamedTuple):
    """A configuration, as far as it matters here, the weight rows of its tile, and its cost."""

    name: str
    tile_w: int
    cost: Cost


@dataclass(frozen=True)
class Operator:
    """A GEMM on one rank.

    Attributes:
        name: for the table.
        n, k: weight rows of a group, columns.
        epilogue: BF16 or SWIGLU_NVFP4.
        layers: how many have it.
        counts: gives rows of each group for a number of tokens.
        tokens: gives the guess of the largest group for a number of tokens.
        dense: a matrix without groups: `linear_sm100` where operands are not swapped.
        routed: groups are chosen token by token, so that their sizes are unknown on the host.
    """

    name: str
    n: int
    k: int
    epilogue: str
    layers: int
    counts: Callable[[int], Sequence[int]]
    tokens: Callable[[int], int]
    dense: bool = False
    routed: bool = False

    def num_rows(self, tokens: int) -> int:
        """Rows of the operand with all padding, as the runner allocates them."""
        groups = self.counts(tokens)
        if self.dense:
            return tokens
        if self.routed:
            return max_padded_rows(tokens * _TOP_K, len(groups))
        return len(groups) * (-(-tokens // TILE_ROWS) * TILE_ROWS)

    def chosen(self, tokens: int) -> Choice:
        """What the runner launches."""
        guess = self.tokens(tokens)
        if guess <= SWAP_TOKENS:
            shape = grouped_gemm_swap_sm100.Shape(guess, self.n, self.k)
            return self.swapped(tokens, grouped_gemm_swap_sm100.choose_config(shape, self.epilogue).tile_n)
        if self.dense:
            return self.linear(tokens, linear_sm100.choose_config(linear_sm100.Shape(tokens, self.n, self.k)).tile_n)
        num_groups = len(self.counts(tokens))
        grouped_shape = grouped_gemm_sm100.Shape(self.num_rows(tokens), self.n, self.k, num_groups)
        config = grouped_gemm_sm100.choose_config(grouped_shape, self.epilogue)
        return self.grouped(tokens, config.tile_n, config.cta_group)

    def others(self, tokens: int) -> Iterator[Choice]:
        """Every kernel that exists for this operator."""
        for tile_n in grouped_gemm_swap_sm100.TILES_N:
            yield self.swapped(tokens, tile_n)
        if self.dense:
            for tile_n in linear_sm100.TILES_N:
                yield self.linear(tokens, tile_n)
            return
        tiles = {BF16: ((1, 64), (1, 128), (1, 256), (2, 256)), SWIGLU_NVFP4: ((1, 64), (1, 128), (2, 128))}
        for cta_group, tile_n in tiles[self.epilogue]:
            yield self.grouped(tokens, tile_n, cta_group)

    def linear(self, tokens: int, tile_n: int) -> Choice:
        """`linear_sm100` with that tile."""
        return Choice(f"128 x {tile_n}", tile_n, cost.linear(tokens, self.n, self.k, tile_n))

    def swapped(self, tokens: int, tile_n: int) -> Choice:
        """`grouped_gemm_swap_sm100` with that tile."""
        counts, rows = self.counts(tokens), self.num_rows(tokens)
        found = cost.swapped(counts, self.n, self.k, self.epilogue, tile_n, rows)
        return Choice(f"swap, {tile_n}", cost.TILE_M, found)

    def grouped(self, tokens: int, tile_n: int, cta_group: int) -> Choice:
        """`grouped_gemm_sm100` with that tile."""
        counts, rows = self.counts(tokens), self.num_rows(tokens)
        found = cost.grouped(counts, self.n, self.k, self.epilogue, tile_n, cta_group, rows)
        return Choice(f"{128 * cta_group} x {tile_n}", tile_n, found)


# Of both models.
_TOP_K = 6


def guess(tokens: int, top_k: int, num_experts: int) -> int:
    """Rows of a large group as the MoE runner guesses them: 4/3 of the mean of all ranks' experts."""
    return min(tokens, -(-4 * -(-tokens * top_k // num_experts) // 3))


@cache
def counts(rank: Rank, tokens: int, routing: str) -> tuple[int, ...]:
    """Rows of each expert of rank 0.

    Args:
        rank: the model and how it is cut.
        tokens: of the step.
        routing: balanced: choices are dealt to ranks in turn, and on a rank to experts in turn. random: each token takes
            different experts, all equally likely, from a fixed seed.
    """
    num_experts, top_k = rank.model.num_experts, rank.model.top_k
    num_ranks = rank.tp if rank.ep else 1
    of_rank = num_experts // num_ranks
    found = [0] * num_experts
    if routing == "balanced":
        for choice in range(tokens * top_k):
            found[choice % num_ranks * of_rank + choice // num_ranks % of_rank] += 1
    else:
        generator = random.Random(SEED)
        for _ in range(tokens):
            for expert in generator.sample(range(num_experts), top_k):
                found[expert] += 1
    return tuple(found[:of_rank])


def everything(rank: Rank, routing: str) -> list[Operator]:
    """All GEMMs in NVFP4 of a rank: linears, wo_a, shared expert, routed experts."""
    model, all_layers = rank.model, rank.num_layers
    found = [
        Operator(linear.name, linear.n, linear.k, BF16, linear.layers, _one, _all, dense=True)
        for linear in rank.linears()
    ]
    found.append(Operator("wo_a", *rank.wo_a, BF16, all_layers, lambda m: (m,) * rank.num_groups, _all))
    routed, shared = rank.experts()
    hidden, inner = model.hidden_size, shared.intermediate
    found.append(Operator("shared gate, up", 2 * inner, hidden, SWIGLU_NVFP4, shared.layers, _one, _all))
    found.append(Operator("shared down", hidden, inner, BF16, shared.layers, _one, _all, dense=True))
    inner = routed.intermediate

    def of_experts(tokens: int) -> Sequence[int]:
        return counts(rank, tokens, routing)

    def guess_of(tokens: int) -> int:
        return guess(tokens, model.top_k, model.num_experts)

    for name, n, k, epilogue in (("MoE GEMM1", 2 * inner, hidden, SWIGLU_NVFP4), ("MoE GEMM2", hidden, inner, BF16)):
        found.append(Operator(name, n, k, epilogue, routed.layers, of_experts, guess_of, routed=True))
    return found


def _one(tokens: int) -> Sequence[int]:
    return (tokens,)


def _all(tokens: int) -> int:
    return tokens


# ---- the document ---------------------------------------------------------------------------------------------------

_INTRODUCTION = """\
# What the Blackwell GEMMs move and multiply

Counted from shapes, for DeepSeek-V4 Pro and Flash on one of {tp} ranks: experts cut (TP{tp}), or dealt out whole (EP{tp}; the
rest as in TP{tp}). No times, and nothing here is verified on hardware. Written by `scripts/cost_table.py`;
`tests/sim/test_cost.py` holds the numbers to what the simulator counts on small shapes, byte for byte, and this file to the
code.

- **requested**: bytes of all TMA boxes (parts outside of a tensor, which TMA fills with zeros, counted) and stores, as often
  as they are moved between L2 and the SMs.
- **unique**: different bytes of global memory among them; device memory moves no less, and no more if re-reads hit L2.
- **minimum**: codes, scales and results of real rows once, and weights of experts that have rows. Rows of a routed GEMM are
  choices: a token that six experts take is six rows.
- **FLOPs**: those of executed MMAs to those of real rows. **order**: `swap` has weights on the MMA's M and so many tokens of
  a tile on N; otherwise rows x weight rows of a tile, 256 rows being a pair of CTAs.
- **{with_limit}**: where padding (unique / minimum or FLOPs) is above {limit:.2f}: the existing configuration with the fewest
  requested bytes that stays below, with its requested / unique; or that there is none.

alpha, scales of second quantizers and tables of tiles are in no column. A linear whose shards have different `input_scale` is
several launches; here it is one. balanced: choices in turn to all experts; random: six different experts of equal chance
for each token, seed {seed}. Rank 0.

Order: swapped as long as the host's guess of a large group is at most {swap} tokens. Of a linear the guess is M. Of routed
experts it is 4/3 of the mean, so that they are swapped up to {moe} tokens.

Re-reads stay far above 10 % wherever a matrix has many tiles in the other direction: a tile of 128 x 256 loads, for each
step of K, the codes of 128 + 256 rows. They are L2's to serve and no padding.
"""


def document() -> str:
    """The content of docs/cost.md."""
    limits = [
        f"{_last_swapped(model.num_experts)} ({name.removeprefix('deepseek-')})" for name, model in MODELS.items()
    ]
    parts = [
        _INTRODUCTION.format(
            tp=TP,
            limit=LIMIT,
            with_limit=_WITH,
            seed=SEED,
            swap=SWAP_TOKENS,
            moe=" and ".join(limits),
        ),
        _totals(),
        _verdict(),
    ]
    for name, model in MODELS.items():
        tp, ep = Rank(model, TP), Rank(model, TP, ep=True)
        parts.append(f"## {name}: linears, wo_a, shared expert, TP{TP}\n\n" + _table(_dense(tp)))
        for layout, rank in ((f"TP{TP}", tp), (f"EP{TP}", ep)):
            for routing in ROUTINGS:
                parts.append(f"## {name}: experts, {layout}, {routing}\n\n" + _table(_routed(rank, routing)))
    return "\n".join(parts)


def _dense(rank: Rank) -> list[Operator]:
    return [operator for operator in everything(rank, ROUTINGS[0]) if not operator.routed]


def _routed(rank: Rank, routing: str) -> list[Operator]:
    return [operator for operator in everything(rank, routing) if operator.routed]


def _last_swapped(num_experts: int) -> int:
    return max(m for m in range(1, 1 << 14) if guess(m, _TOP_K, num_experts) <= SWAP_TOKENS)


def _ranks() -> Iterator[tuple[str, Rank]]:
    for name, model in MODELS.items():
        for layout, ep in (("TP", False), ("EP", True)):
            yield f"{name} {layout}{TP}", Rank(model, TP, ep)


def _totals() -> str:
    lines = [
        "## All GEMMs of a step\n\nEach operator times the layers that have it.\n",
        "| model | routing | M | requested GB | unique GB | requested / unique | unique / minimum | FLOPs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rank in _ranks():
        for routing in ROUTINGS:
            operators = everything(rank, routing)
            for m in TOKENS:
                total = sum((operator.chosen(m).cost * operator.layers for operator in operators), Cost())
                sizes = f"{total.requested / 1e9:.2f} | {total.unique / 1e9:.2f}"
                lines.append(f"| {name} | {routing} | {m} | {sizes} | {_ratios(total)} |")
    return "\n".join(lines) + "\n"


def _verdict() -> str:
    """Which operators keep the target for many tokens, and what keeps the others from it."""
    lines = [
        f"## Padding at M >= 512\n\nThe target is below {LIMIT:.2f}. All operators, dense ones once:\n",
        "| M | operators | unique / minimum within | FLOPs within |",
        "| ---: | ---: | ---: | ---: |",
    ]
    high = [
        "\nThose above it. FLOPs are the product of three paddings: of rows, to tiles (a group of r rows takes at least r up",
        "to a multiple of 128, or swapped of the tile's tokens); of n, to weight rows of a tile; and of k, to the MMA's "
        f"{cost.MMA_K}.\n",
        f"| model | operator | routing | M | mean rows | order | unique / minimum | FLOPs | rows | n | k | {_WITH} |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for m in (m for m in TOKENS if m >= 512):
        cases = list(_cases())
        chosen = [operator.chosen(m) for _, _, operator in cases]
        of_bytes = sum(found.unique <= LIMIT * found.minimum for *_, found in chosen)
        of_flops = sum(found.flops <= LIMIT * found.min_flops for *_, found in chosen)
        lines.append(f"| {m} | {len(cases)} | {of_bytes} | {of_flops} |")
        for (model, routing, operator), (name, tile_w, found) in zip(cases, chosen, strict=True):
            if _within(found):
                continue
            counts = operator.counts(m)
            flops = found.flops / found.min_flops
            of_n, of_k = (
                -(-size // unit) * unit / size for size, unit in ((operator.n, tile_w), (operator.k, cost.MMA_K))
            )
            high.append(
                f"| {model} | {operator.name} | {routing} | {m} | {sum(counts) / len(counts):.0f} | {name} "
                f"| {found.unique / found.minimum:.3f} | {flops:.2f} | {flops / of_n / of_k:.2f} | {of_n:.2f} | {of_k:.2f} "
                f"| {_better(operator, m)} |"
            )
    return "\n".join((*lines, *high)) + "\n"


def _cases() -> Iterator[tuple[str, str, Operator]]:
    """Yields model, routing and operator; what routing or EP does not change comes once."""
    for name, rank in _ranks():
        for operator in () if rank.ep else _dense(rank):
            yield name, "-", operator
        for routing in ROUTINGS:
            for operator in _routed(rank, routing):
                yield name, routing, operator


def _table(operators: Sequence[Operator]) -> str:
    lines = [
        f"| operator | n | k | M | order | requested / unique | unique / minimum | FLOPs | {_WITH} |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for operator in operators:
        for m in TOKENS:
            name, _, found = operator.chosen(m)
            start = f"| {operator.name} | {operator.n} | {operator.k} | {m} | {name} |"
            lines.append(f"{start} {_ratios(found)} | {_better(operator, m)} |")
    return "\n".join(lines) + "\n"


def _ratios(found: Cost) -> str:
    if not found.minimum:
        return "- | - | -"
    return f"{found.requested / found.unique:.2f} | {found.unique / found.minimum:.3f} | {found.flops / found.min_flops:.2f}"


def _within(found: Cost) -> bool:
    return found.unique <= LIMIT * found.minimum and found.flops <= LIMIT * found.min_flops


def _better(operator: Operator, tokens: int) -> str:
    """Returns the configuration that keeps the target where the chosen one does not, if there is one."""
    if _within(operator.chosen(tokens).cost):
        return ""
    good = [choice for choice in operator.others(tokens) if _within(choice.cost)]
    if not good:
        return "none"
    name, _, found = min(good, key=lambda choice: choice.cost.requested)
    return f"{name} ({found.requested / found.unique:.2f})"


def main() -> int:
    """Writes or checks the document; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the document is stale")
    text = document()
    if not parser.parse_args().check:
        DOCUMENT.write_text(text, encoding="utf-8")
        return 0
    if DOCUMENT.exists() and DOCUMENT.read_text(encoding="utf-8") == text:
        return 0
    print(f"{DOCUMENT} is stale: run python scripts/cost_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
