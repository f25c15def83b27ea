"""`nvfp4 kernels explain`: which kernel each operator of a decoder layer calls, in which configuration, and its roofline.

Nothing is measured, compiled or run: configurations are what `choose_config` gives, and times are the larger of bytes over
the memory's and FLOP over the tensor cores' throughput. A kernel cannot be faster than that; how much slower it is, only a
GPU can tell.

What moves is counted once: codes, block scales and factors of both operands, and the result. Routed experts are assumed to be
chosen evenly; weights of an expert nobody chose are not read.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from cutedsl.deployment import Experts, Model, Rank

USAGE_ERROR = 64
# Source: NVIDIA's data sheet and architecture brief of Blackwell, HGX B200, one GPU: 8 TB/s of HBM3e, 18 PFLOPS of FP4 with
# sparsity, which is 9 PFLOPS dense.
GPU = "B200"
MEMORY_BYTES_PER_S = 8e12
FP4_FLOP_PER_S = 9e15
_LIMITS = f"{MEMORY_BYTES_PER_S / 1e12:.0f} TB/s, {FP4_FLOP_PER_S / 1e15:.0f} PFLOPS dense FP4"
LABEL = f"roofline of one {GPU}, not measured: {_LIMITS}"
# Half a byte of code, and a sixteenth of a byte of block scale.
_NVFP4_BYTES = 1 / 2 + 1 / 16
_BF16_BYTES = 2


@dataclass(frozen=True)
class Operator:
    """One launch, on one rank.

    Attributes:
        name: of the operator.
        layers: how often a step launches it.
        kernel: module in cutedsl.kernels.
        shape: in words.
        tile: rows x columns x k of a CTA's tile.
        cluster: CTAs.
        stages: of operands, and accumulators.
        smem_bytes: of a CTA as the configuration bounds them; None where it says nothing.
        tmem_columns: None for a kernel without tensor memory.
        swap: weights on M of the MMA.
        config: all of the configuration.
        num_bytes, flop: of one launch.
    """

    name: str
    layers: int
    kernel: str
    shape: str
    tile: str
    cluster: int
    stages: str
    smem_bytes: int | None
    tmem_columns: int | None
    swap: bool
    config: dict[str, Any]
    num_bytes: int
    flop: int

    @property
    def seconds(self) -> float:
        """Roofline of one launch."""
        return max(self.num_bytes / MEMORY_BYTES_PER_S, self.flop / FP4_FLOP_PER_S)

    @property
    def bound(self) -> str:
        """What the roofline is: memory or tensor."""
        return "memory" if self.num_bytes / MEMORY_BYTES_PER_S >= self.flop / FP4_FLOP_PER_S else "tensor"


def explain(model: "Model", tp: int, tokens: int, ep: bool = False) -> list[Operator]:
    """The operators of one step on one rank that our kernels serve.

    Args:
        model: sizes.
        tp: tensor parallel size.
        tokens: in the step.
        ep: experts are dealt out over the ranks instead of cut.

    Raises:
        ValueError: the model cannot be cut so, or there are no tokens.
    """
    from cutedsl.deployment import Rank

    if tokens < 1:
        raise ValueError(f"-m is {tokens}, expected at least 1 token")
    rank = Rank(model, tp, ep).check()
    routed, shared = rank.experts()
    return [
        *_attention(rank, tokens),
        *_wo_a(rank, tokens),
        *_routing(rank, routed, tokens),
        *_experts(rank, routed, tokens),
        *_experts(rank, shared, tokens),
        _finalize(rank, tokens),
    ]


# ---- operators ------------------------------------------------------------------------------------------------------


def _attention(rank: "Rank", tokens: int) -> Iterator[Operator]:
    for linear in rank.linears():
        yield _quantize(linear.name, linear.layers, tokens, linear.k)
        yield _linear(linear.name, linear.layers, tokens, linear.n, linear.k)


def _linear(name: str, layers: int, m: int, n: int, k: int) -> Operator:
    from cutedsl.kernels import linear_sm100 as kernel
    from cutedsl.runners.sm100 import SWAP_TOKENS

    shape, moved, flop = f"m {m}, n {n}, k {k}", (m + n) * k * _NVFP4_BYTES + 4 * n + m * n * _BF16_BYTES, 2 * m * n * k
    if m <= SWAP_TOKENS:
        # One group, whose rows are all tokens.
        return _grouped(name, layers, shape, "bf16", (m, m, n, k, 1), moved, flop)
    config = kernel.choose_config(kernel.Shape(m, n, k))
    tile = f"{kernel.TILE_M}x{config.tile_n}x{kernel.TILE_K}"
    return _operator(name, layers, kernel, shape, config, moved, flop, tile=tile)


def _quantize(name: str, layers: int, rows: int, k: int, tokens: int | None = None) -> Operator:
    """Rows of their own, or, with a number of tokens, slots that are gathered from so many."""
    from cutedsl.kernels import quantize_sm100 as kernel

    config = kernel.Config(by_slot=tokens is not None).validate()
    read = rows if tokens is None else min(rows, tokens)
    moved = (read * _BF16_BYTES + rows * _NVFP4_BYTES) * k
    return _operator(f"quantize for {name}", layers, kernel, f"rows {rows}, k {k}", config, moved, 0)


def _wo_a(rank: "Rank", tokens: int) -> Iterator[Operator]:
    """With NVFP4_WO_A=1, or a checkpoint that has it in NVFP4."""
    from cutedsl.kernels import inverse_rope_quantize_sm100 as inverse_rope

    (n, k), groups = rank.wo_a, rank.num_groups
    config = inverse_rope.Config(rank.model.head_dim, rank.model.rope_dim).validate()
    elements = tokens * groups * k
    angles = 4 * tokens * rank.model.rope_dim
    shape = f"tokens {tokens}, groups {groups}, k {k}"
    moved = elements * (_BF16_BYTES + _NVFP4_BYTES) + angles
    yield _operator("inverse rope, quantize for wo_a", rank.num_layers, inverse_rope, shape, config, moved, 0)
    shape = f"{groups} groups of {tokens} tokens, n {n}, k {k}"
    moved = (groups * tokens + groups * n) * k * _NVFP4_BYTES + groups * tokens * n * _BF16_BYTES
    flop = 2 * groups * tokens * n * k
    sizes = (tokens, groups * -(-tokens // 128) * 128, n, k, groups)
    yield _grouped("wo_a (if NVFP4)", rank.num_layers, shape, "bf16", sizes, moved, flop)


def _routing(rank: "Rank", routed: "Experts", tokens: int) -> Iterator[Operator]:
    from cutedsl.kernels import route_sm100 as kernel

    top_k = rank.model.top_k
    config = kernel.choose_config(tokens, top_k, 32, rank.ep)
    moved = 4 * sum(kernel.route_sizes(tokens, top_k, routed.num_experts)) + 4 * tokens * top_k
    shape = f"tokens {tokens}, top_k {top_k}, experts {routed.num_experts}"
    yield _operator("route", routed.layers, kernel, shape, config, moved, 0)


def _experts(rank: "Rank", experts: "Experts", tokens: int) -> Iterator[Operator]:
    from cutedsl.deployment import group_tokens, padded_rows

    hidden, columns, count = rank.model.hidden_size, experts.intermediate, experts.num_experts
    # Choices that fall on this rank, and experts that at least one of them falls on, both on average.
    rows = math.ceil(tokens * experts.top_k * experts.share)
    total = round(count / experts.share)
    used = count * (1 - (1 - experts.top_k / total) ** tokens)
    yield _quantize(experts.name, experts.layers, rows, hidden, tokens if count > 1 else None)
    guess, padded = group_tokens(experts, tokens), padded_rows(tokens, experts.top_k, count)
    n = 2 * columns
    shape = f"rows {rows}, experts {used:.0f} of {count}, n {n}, k {hidden}"
    moved = (rows + used * n) * hidden * _NVFP4_BYTES + rows * columns * _NVFP4_BYTES
    sizes = (guess, padded, n, hidden, count)
    flop = 2 * rows * n * hidden
    yield _grouped(f"{experts.name}: gate, up", experts.layers, shape, "swiglu_nvfp4", sizes, moved, flop)
    if count == 1:
        yield _linear(f"{experts.name}: down", experts.layers, tokens, hidden, columns)
        return
    shape = f"rows {rows}, experts {used:.0f} of {count}, n {hidden}, k {columns}"
    moved = (rows + used * hidden) * columns * _NVFP4_BYTES + rows * hidden * _BF16_BYTES
    sizes = (guess, padded, hidden, columns, count)
    yield _grouped(f"{experts.name}: down", experts.layers, shape, "bf16", sizes, moved, 2 * rows * hidden * columns)


def _grouped(
    name: str, layers: int, shape: str, epilogue: str, sizes: tuple[int, ...], moved: float, flop: int
) -> Operator:
    """Of the two grouped GEMMs the one that `cutedsl.runners.sm100` takes: with few tokens, weights on M.

    Args:
        name, layers, shape: of the operator.
        epilogue: what follows the sums.
        sizes: tokens of a group, rows with padding, n, k, groups.
        moved, flop: of the operator.
    """
    from cutedsl.kernels import grouped_gemm_sm100, grouped_gemm_swap_sm100
    from cutedsl.runners.sm100 import SWAP_TOKENS

    tokens, rows, n, k, groups = sizes
    kernel: Any
    if tokens <= SWAP_TOKENS:
        kernel = grouped_gemm_swap_sm100
        config = kernel.choose_config(kernel.Shape(tokens, n, k), epilogue)
        tile = f"{kernel.TILE_W}x{config.tile_n}x{kernel.TILE_K}"
        return _operator(name, layers, kernel, shape, config, moved, flop, tile=tile, swap=True)
    kernel = grouped_gemm_sm100
    config = kernel.choose_config(kernel.Shape(rows, n, k, groups), epilogue)
    tile = f"{kernel.TILE_M}x{config.tile_n}x{kernel.TILE_K}"
    return _operator(name, layers, kernel, shape, config, moved, flop, tile=tile)


def _finalize(rank: "Rank", tokens: int) -> Operator:
    from cutedsl.kernels import finalize_sm100 as kernel

    hidden, top_k = rank.model.hidden_size, rank.model.top_k
    config = kernel.choose_config(top_k, y_fp32=False, shared=False)
    share = 1 / rank.tp if rank.ep else 1
    # Rows of the experts on this rank, and the result; the shared expert's output is added by vLLM.
    moved = (tokens * top_k * share + tokens) * hidden * _BF16_BYTES + 8 * tokens * top_k
    shape = f"tokens {tokens}, top_k {top_k}, columns {hidden}"
    return _operator("finalize", rank.num_layers, kernel, shape, config, moved, 0)


def _operator(
    name: str,
    layers: int,
    kernel: Any,
    shape: str,
    config: Any,
    moved: float,
    flop: int,
    tile: str = "",
    swap: bool = False,
) -> Operator:
    stages = ""
    if hasattr(config, "num_ab_stages"):
        stages = f"{config.num_ab_stages} ab, {config.num_acc_stages} acc"
    return Operator(
        name=name,
        layers=layers,
        kernel=kernel.__name__.rpartition(".")[2],
        shape=shape,
        tile=tile,
        cluster=getattr(config, "cta_group", getattr(config, "num_ctas", 1)),
        stages=stages,
        smem_bytes=getattr(config, "smem_bytes", None),
        tmem_columns=getattr(config, "tmem_columns", None),
        swap=swap,
        config=asdict(config),
        num_bytes=round(moved),
        flop=flop,
    )


# ---- command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Runs `nvfp4 kernels`; returns the exit code: 0, or 64 where the command itself is wrong."""
    arguments = _parser().parse_args(argv)
    from cutedsl.deployment import find_model

    try:
        model = find_model(arguments.model)
        operators = explain(model, arguments.tp, arguments.m, arguments.ep)
    except ValueError as error:
        print(f"nvfp4 kernels: {error}", file=sys.stderr)
        return USAGE_ERROR
    try:
        if arguments.json:
            print(json.dumps([_as_dict(operator) for operator in operators], indent=1))
        else:
            _show(operators, arguments, model.name)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nvfp4 kernels", description="What our kernels for Blackwell are and would do.")
    commands = parser.add_subparsers(required=True, metavar="explain", parser_class=_Parser)
    command = commands.add_parser(
        "explain", help="each operator's kernel, configuration and roofline; measures nothing"
    )
    command.add_argument(
        "--model", default="deepseek-v4-pro", help="deepseek-v4-pro, deepseek-v4-flash, or a config.json"
    )
    command.add_argument("--tp", type=int, default=1, help="tensor parallel size, default 1")
    command.add_argument("--ep", action="store_true", help="experts are dealt out over the ranks instead of cut")
    command.add_argument("-m", type=int, default=64, metavar="TOKENS", help="tokens in a step, default 64")
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _as_dict(operator: Operator) -> dict[str, Any]:
    return {**asdict(operator), "roofline_seconds": operator.seconds, "bound": operator.bound, "label": LABEL}


def _show(operators: list[Operator], arguments: argparse.Namespace, model: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    layout = f"tp {arguments.tp}" + (" with expert parallelism" if arguments.ep else "")
    title = f"{model}, {layout}, {arguments.m} tokens: one rank"
    table = Table(title=title, caption=LABEL, box=box.SIMPLE)
    for column in ("operator", "kernel", "shape", "tile", "stages", "swap"):
        table.add_column(column, overflow="fold")
    for column in ("launches", "cluster", "smem", "TMEM", "MB", "GFLOP", "roofline us", "bound"):
        table.add_column(column, justify="right")
    for it in operators:
        cells = [it.name, it.kernel, it.shape, it.tile, it.stages, "yes" if it.swap else "", str(it.layers)]
        cells += [str(it.cluster), _number(it.smem_bytes), _number(it.tmem_columns)]
        cells += [f"{it.num_bytes / 1e6:.2f}", f"{it.flop / 1e9:.2f}", f"{it.seconds * 1e6:.2f}", it.bound]
        table.add_row(*cells)
    total = sum(operator.layers * operator.seconds for operator in operators)
    # A table that is folded to 80 columns cannot be read: a terminal scrolls, a file has no width.
    console = Console(width=max(200, Console().width), highlight=False)
    with console.capture() as captured:
        console.print(table)
        console.print(f"all launches of a step: {total * 1e3:.3f} ms ({LABEL})")
        console.print("MB and GFLOP are of one launch; experts are assumed to be chosen evenly.")
    sys.stdout.write(captured.get())


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
