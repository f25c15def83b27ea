"""Time of the Hopper GEMM alone on linears of DeepSeek-V4, for given configurations, and what the times say.

    python scripts/bench/linear_configs.py --out rows.jsonl
    python scripts/bench/linear_configs.py --shapes flash.shared_l2,pro.shared_l1 --m 128,256 --specs "cublas;chosen;128xN,k4"
    python scripts/bench/linear_configs.py --fit rows.jsonl other_rows.jsonl        # no GPU is needed

A spec is tile_w x tile_n, where N is the tile that linears of so many tokens have, and then, with commas, of
    even    even shares                             wS    S CTAs share the loads of their tokens
    kS      S CTAs share a tile's steps of K        cC    C warpgroups decode and multiply
or `cublas`, in BF16, or `chosen`, which is what choose_config takes. How it is measured: `common`. Stages are as many as fit.

`--fit` finds the times of `_splits` in cutedsl/kernels/grouped_gemm_sm90.py: for each class of tokens and each spec those of
the least squares of relative errors, none below 0. Then it names the linears for which they choose a spec that is slower than
the best of the same commit. Rows of all commits are fitted together: give it rows of the kernel as it is.
"""

import argparse
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import common
import linear
import torch

from cutedsl.kernels import grouped_gemm_sm90 as gemm
from cutedsl.kernels import hopper
from cutedsl.prepare_sm90 import Operand, prepare_experts
from cutedsl.quantize import dequantize, quantize_weight

SPECS = (
    "cublas;chosen;256xN;256xN,c4;256xN,k4;256xN,k4,c4;128xN;128xN,even;128xN,k2;128xN,k4;128xN,k8;"
    "256x96;128x64;128x64,k2;128x64,k4;128x96;128x96,k2;128x192;128x256"
)
MS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
# Nothing to fit.
OTHERS = ("cublas", "chosen")
PARTS = {"w": "cluster_w", "k": "cluster_k", "c": "num_consumers"}
# The most tokens of a class: `_splits` has times for each, and for more.
CLASSES = (16, 32, gemm.MAX_SMALL_TILE_N, gemm.MANY_TOKENS)
TERMS = ("step_us", "round_us", "fixed_us", "share_us")
# Fewer rows would say nothing about as many terms. A choice within NEAR of the best is as good.
MIN_ROWS, NEAR = 4, 1.02
# Of a class and a spec: microseconds of each of TERMS, the rows' largest relative error, and how many they were.
Fits = dict[tuple[str, str], tuple[list[float], float, int]]


def fields(spec: str, tokens: int) -> dict[str, Any]:
    """What a spec says of a Config; ValueError if a part of it is unknown."""
    size, *parts = spec.split(",")
    tile = re.fullmatch(r"(\d+)x(\d+|N)", size)
    if tile is None:
        raise ValueError(f"spec {spec!r} begins with {size!r}, expected tile_w x tile_n as 128x64 or 128xN")
    tile_n = 1 << max(3, (tokens - 1).bit_length()) if tokens <= gemm.MAX_SMALL_TILE_N else gemm.LARGE_TILE_N
    found: dict[str, Any] = {"tile_w": int(tile[1]), "tile_n": tile_n if tile[2] == "N" else int(tile[2])}
    for part in parts:
        if part == "even":
            found["even"] = True
        elif re.fullmatch(rf"[{''.join(PARTS)}]\d+", part):
            found[PARTS[part[0]]] = int(part[1:])
        else:
            raise ValueError(f"spec {spec!r} has the part {part!r}, expected even, wS, kS or cC with a number")
    return found


def config(spec: str, shape: gemm.Shape) -> gemm.Config:
    """The kernel of a spec; ValueError if there is none."""
    if spec == "chosen":
        return gemm.choose_config(shape, gemm.BF16)
    return gemm.largest_config(gemm.BF16, one_group=True, **fields(spec, shape.tokens))


def weights(n: int, k: int, device: torch.device) -> tuple[torch.Tensor, list[Operand]]:
    """A random weight, dequantized, and prepared copies of it, together several times the L2."""
    codes, sf, scale_2 = quantize_weight(torch.randn(n, k, device=device) / k**0.5)
    operand = prepare_experts(codes.clone()[None], sf.clone()[None], scale_2.reshape(1, 1).float())
    copies = common.num_copies(n * k * 9 // 16, device)
    return dequantize(codes, sf, scale_2), [Operand(*(t.clone() for t in operand)) for _ in range(copies)]


def measure(dense: torch.Tensor, copies: list[Operand], m: int, specs: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each spec that has a kernel for m tokens; the others are named on stderr."""
    (n, k), device = dense.shape, dense.device
    sums = torch.zeros(gemm.sums_elements(device), dtype=torch.int32, device=device)
    xs = [torch.randn(m, k, device=device, dtype=torch.bfloat16) for _ in copies]
    ds = [torch.empty(m, n, device=device, dtype=torch.bfloat16) for _ in copies]
    bf16 = [dense.bfloat16().t() for _ in range(common.num_copies(2 * n * k, device))] if "cublas" in specs else []

    def ours(x: torch.Tensor, operand: Operand, d: torch.Tensor, found: gemm.Config) -> torch.Tensor:
        with mock.patch.object(gemm, "choose_config", return_value=found):
            gemm.grouped_gemm(x, *operand, None, None, d, epilogue=gemm.BF16, tokens=m, sums=sums, n=n)
        return d

    variants, about, exact = [], {}, xs[0].float() @ dense.t()
    for spec in specs:
        found = None
        calls: list[common.Call] = [partial(torch.mm, x, w, out=d) for x, w, d in zip(xs, bf16, ds, strict=False)]
        try:
            if spec != "cublas":
                found = config(spec, gemm.Shape(m, n, k))
                calls = [partial(ours, *each, found) for each in zip(xs, copies, ds, strict=True)]
        except ValueError as error:
            print(f"not measured: {spec} at {m} tokens: {error}", file=sys.stderr)
            continue
        variants.append(common.Variant(spec, calls))
        errors = common.errors(common.answer(calls[0]), exact)
        # Who leaves sums behind makes the next launch wrong.
        ok = errors.ok and not gemm.zeros(sums).any()
        about[spec] = errors._asdict() | {"ok": bool(ok), "config": str(found), "rounds": rounds}
    times = {spec: common.spread(taken) for spec, taken in common.interleaved(variants, rounds, device).items()}
    return [{"m": m, "n": n, "k": k, "spec": spec} | times[spec]._asdict() | about[spec] for spec in times]


def run(args: argparse.Namespace) -> int:
    """Measures, and writes the rows of a shape and m as soon as they are there; 1 if an answer was wrong."""
    device, budget, wrong = torch.device("cuda", 0), common.Budget(args.seconds_budget), 0
    shared = {"bench": "linear_configs"} | common.facts(device)
    torch.manual_seed(0)
    for name, m in itertools.product(args.shapes, args.m):
        if budget.spent:
            print(f"not run, as the time was up: {name} m={m}", file=sys.stderr)
            continue
        for row in measure(*weights(*linear.sizes(name), device), m, args.specs, args.rounds):
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"shape": name} | row | shared) + "\n")
            print(f"{name} m={m} {row['spec']}: {row['us']} us{'' if row['ok'] else ', WRONG ANSWER'}", file=sys.stderr)
            wrong += not row["ok"]
    return 1 if wrong else 0


def key_of(row: dict[str, Any]) -> tuple[str, str]:
    """Class and spec: the rows that have times in common."""
    tokens = next((f"to {most}" for most in CLASSES if row["m"] <= most), f"above {CLASSES[-1]}")
    return tokens, row["spec"]


def factors(row: dict[str, Any]) -> list[float]:
    """How often each of TERMS is in a row's time: the time of the kernel's own model at one microsecond of that."""
    found = {"cluster_w": 1, "even": False, "cluster_k": 1} | fields(row["spec"], row["m"])
    # The model has no clusters of weight tiles: they are as larger tiles on fewer SMs.
    sizes = found["tile_w"] * found["cluster_w"], found["tile_n"]
    num_sms = hopper.ARCHS["sm_90a"].num_sms // found["cluster_w"]
    split = gemm._Split(*sizes, 0.0, 0.0, even=found["even"], cluster_k=found["cluster_k"])
    units: list[dict[str, Any]] = [{term: float(term == one) for term in TERMS} for one in TERMS]
    shape = gemm.Shape(row["m"], *linear.sizes(row["shape"]))
    return [gemm._time_us(shape, split._replace(**unit), num_sms) for unit in units]


def fit(rows: Iterable[dict[str, Any]]) -> Fits:
    """For each class and spec with MIN_ROWS rows, the times without negative ones; of equally good ones, the fewest."""
    groups = defaultdict(list)
    for row in rows:
        if row["spec"] not in OTHERS and row["ok"]:
            groups[key_of(row)].append(row)
    # Each row is divided by its time, so that all times are 1, and errors relative.
    return {
        key: _solve(torch.tensor([[x / row["us"] for x in factors(row)] for row in group]).double())
        for key, group in sorted(groups.items())
        if len(group) >= MIN_ROWS
    }


def _solve(a: torch.Tensor) -> tuple[list[float], float, int]:
    """Least squares of a x = 1, x >= 0: the best of all sets of columns, which are few."""
    best, least = torch.zeros(a.shape[1]).double(), float(len(a))
    used = [i for i in range(a.shape[1]) if a[:, i].any()]
    for columns in itertools.chain.from_iterable(itertools.combinations(used, r + 1) for r in range(len(used))):
        x = torch.zeros_like(best)
        x[list(columns)] = torch.linalg.lstsq(a[:, columns], torch.ones(len(a), 1).double()).solution[:, 0]
        squares = float((a @ x - 1).square().sum())
        if (x >= 0).all() and squares < least - 1e-9:
            best, least = x, squares
    return best.tolist(), float((a @ best - 1).abs().max()), len(a)


def slower(rows: Iterable[dict[str, Any]], fits: Fits) -> list[str]:
    """Linears, in words, whose choice by the fits is slower than the best fitted spec of the same commit, beyond NEAR."""
    linears, found = defaultdict(list), []
    for row in rows:
        if key_of(row) in fits and row["ok"]:
            guess = sum(x * us for x, us in zip(factors(row), fits[key_of(row)][0], strict=True))
            linears[row["shape"], row["m"], row["commit"]].append((guess, row["us"], row["spec"]))
    for (name, m, commit), specs in sorted(linears.items()):
        (_, us, choice), (_, best_us, best) = min(specs), min(specs, key=lambda one: one[1])
        if us > NEAR * best_us:
            found.append(f"{name} m={m} ({commit}): {choice} {us} us, best {best} {best_us} us")
    return found


def report(paths: Sequence[Path], ms: Sequence[int]) -> int:
    """Prints the times fitted to the rows of files, and where they choose badly."""
    lines = itertools.chain.from_iterable(path.read_text(encoding="utf-8").splitlines() for path in paths)
    rows = [row for row in map(json.loads, lines) if row["m"] in ms]
    fits = fit(rows)
    print(f"{'tokens':>9}  {'spec':14}{'rows':>5}", *(f"{term:>9}" for term in TERMS), f"{'largest error':>14}")
    for (tokens, spec), (times_us, error, num_rows) in fits.items():
        print(f"{tokens:>9}  {spec:14}{num_rows:>5}", *(f"{us:9.3f}" for us in times_us), f"{error:14.1%}")
    found = slower(rows, fits)
    print(f"choices slower than the best by more than {NEAR - 1:.0%}: {len(found)}", *found, sep="\n  ")
    return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(linear.SHAPES), help="names or NxK")
    parser.add_argument("--m", type=lambda text: [int(m) for m in text.split(",")], default=list(MS), help="tokens")
    parser.add_argument("--specs", type=lambda text: text.split(";"), default=SPECS.split(";"), help="with semicolons")
    parser.add_argument("--rounds", type=int, default=9, help="default 9")
    parser.add_argument("--seconds-budget", type=float, help="begin no shape and m after so many")
    parser.add_argument("--out", type=Path, default="/dev/stdout", help="file that rows are added to, as lines of JSON")
    parser.add_argument("--fit", type=Path, nargs="+", metavar="ROWS", help="fit the rows with --m of files instead")
    args = parser.parse_args()
    if args.fit:
        return report(args.fit, args.m)
    for spec in set(args.specs) - set(OTHERS):
        fields(spec, 1)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("there is no Hopper GPU; --fit needs none")
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
