"""`nvfp4 kernels explain`: which kernel each operator of a decoder layer calls, in which configuration, and its roofline.

Nothing is measured, compiled or run: configurations are what `choose_config` gives, and times are the larger of bytes over
the memory's and FLOP over the tensor cores' throughput. A kernel cannot be faster than that; how much slower it is, only a
GPU can tell.

What moves is counted once: codes, block scales and factors, activations as the GEMM reads them, and the result. Routed
experts are assumed to be chosen evenly; weights of an expert nobody chose are not read.

The hard part is that two GPUs have different chains: Blackwell multiplies NVFP4 by NVFP4 and has two kernels for a GEMM,
Hopper multiplies BF16, to which activations are rounded or as which they are taken. `_Blackwell` and `_Hopper` know their
kernels, and the walk over a layer's operators is common.
"""

import abc
import argparse
import importlib
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
# Half a byte of code, and a sixteenth of a byte of block scale.
_NVFP4_BYTES = 1 / 2 + 1 / 16
_BF16_BYTES = 2


@dataclass(frozen=True)
class Gpu:
    """A roofline.

    Attributes:
        name: of the GPU.
        memory_bytes_per_s: of its memory.
        flop_per_s: dense, of its tensor cores, in the type that our kernels multiply.
        flop_type: that type.
        activations: the first is the default.
    """

    name: str
    memory_bytes_per_s: float
    flop_per_s: float
    flop_type: str
    activations: tuple[str, ...]

    @property
    def label(self) -> str:
        """What goes with every number."""
        memory, flop = f"{self.memory_bytes_per_s / 1e12:g} TB/s", f"{self.flop_per_s / 1e15:g} PFLOPS"
        return f"roofline of one {self.name}, not measured: {memory}, {flop} dense {self.flop_type}"


# By architecture. Sources: NVIDIA's data sheet and architecture brief of Blackwell, HGX B200, one GPU: 8 TB/s of HBM3e, 18
# PFLOPS of FP4 with sparsity, which is 9 PFLOPS dense; NVIDIA's data sheet of the H200 SXM: 4.8 TB/s, 1979 TFLOPS of BF16
# with sparsity.
GPUS = {
    "sm_100a": Gpu("B200", 8e12, 9e15, "FP4", ("nvfp4",)),
    "sm_90a": Gpu("H200", 4.8e12, 0.989e15, "BF16", ("bf16", "nvfp4")),
}


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
        arch: key of GPUS.
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
    arch: str

    @property
    def seconds(self) -> float:
        """Roofline of one launch."""
        return max(self._rooflines())

    @property
    def bound(self) -> str:
        """What the roofline is: memory or tensor."""
        memory, tensor = self._rooflines()
        return "memory" if memory >= tensor else "tensor"

    def _rooflines(self) -> tuple[float, float]:
        gpu = GPUS[self.arch]
        return self.num_bytes / gpu.memory_bytes_per_s, self.flop / gpu.flop_per_s


def explain(
    model: "Model", tp: int, tokens: int, ep: bool = False, arch: str = "sm_100a", activations: str | None = None
) -> list[Operator]:
    """The operators of one step on one rank that our kernels serve.

    Args:
        model: sizes.
        tp: tensor parallel size.
        tokens: in the step.
        ep: experts are dealt out over the ranks instead of cut.
        arch: key of GPUS.
        activations: "nvfp4" or "bf16"; None: what is usual on the architecture.

    Raises:
        ValueError: the model cannot be cut so, there are no tokens, or no kernels for this architecture and activations.
    """
    from cutedsl.deployment import Rank

    if tokens < 1:
        raise ValueError(f"-m is {tokens}, expected at least 1 token")
    if arch not in GPUS:
        raise ValueError(f"--arch is {arch!r}, expected one of {', '.join(GPUS)}")
    known = GPUS[arch].activations
    if activations is not None and activations not in known:
        raise ValueError(f"--activations is {activations!r}, expected {' or '.join(known)} on {arch}")
    rank = Rank(model, tp, ep).check()
    kernels = _Blackwell(rank) if arch == "sm_100a" else _Hopper(rank, activations or known[0])
    return list(kernels.step(tokens))


# ---- operators ------------------------------------------------------------------------------------------------------


class _Kernels(abc.ABC):
    """The operators of one rank's step; what a GPU's kernels are is left to subclasses.

    Attributes:
        arch: key of GPUS.
        operand_bytes: of an activation as the GEMMs read it.
    """

    arch: str
    operand_bytes: float

    def __init__(self, rank: "Rank") -> None:
        self.rank = rank

    @abc.abstractmethod
    def quantize(self, name: str, layers: int, rows: int, k: int, tokens: int | None = None) -> Iterator[Operator]:
        """Rows of their own, or, with a number of tokens, slots that are gathered from so many."""

    @abc.abstractmethod
    def inverse_rope(self, shape: str, moved: float) -> Operator:
        """What comes before wo_a."""

    @abc.abstractmethod
    def linear(self, name: str, layers: int, m: int, n: int, k: int) -> Operator:
        """A GEMM of all tokens."""

    @abc.abstractmethod
    def grouped(
        self, name: str, layers: int, shape: str, epilogue: str, sizes: tuple[int, ...], moved: float, flop: int
    ) -> Operator:
        """A grouped GEMM.

        Args:
            name, layers, shape: of the operator.
            epilogue: what follows the sums: BF16, or SwiGLU and what the next GEMM wants.
            sizes: tokens of a group, rows with padding, n, k, groups.
            moved, flop: of the operator.
        """

    @abc.abstractmethod
    def guess(self, experts: "Experts", tokens: int) -> int:
        """Tokens of a large expert, as the runners guess them."""

    @abc.abstractmethod
    def module(self, name: str) -> Any:
        """The module of this architecture's route or finalize."""

    def step(self, tokens: int) -> Iterator[Operator]:
        """All launches."""
        routed, shared = self.rank.experts()
        for linear in self.rank.linears():
            yield from self.quantize(linear.name, linear.layers, tokens, linear.k)
            yield self.linear(linear.name, linear.layers, tokens, linear.n, linear.k)
        yield from self._wo_a(tokens)
        yield self._route(routed, tokens)
        yield from self._experts(routed, tokens)
        yield from self._experts(shared, tokens)
        yield self._finalize(tokens)

    def _wo_a(self, tokens: int) -> Iterator[Operator]:
        """With NVFP4_WO_A=1, or a checkpoint that has it in NVFP4."""
        (n, k), groups = self.rank.wo_a, self.rank.num_groups
        elements = tokens * groups * k
        moved = elements * (_BF16_BYTES + self.operand_bytes) + 4 * tokens * self.rank.model.rope_dim
        yield self.inverse_rope(f"tokens {tokens}, groups {groups}, k {k}", moved)
        shape = f"{groups} groups of {tokens} tokens, n {n}, k {k}"
        moved = groups * (tokens * k * self.operand_bytes + n * k * _NVFP4_BYTES + tokens * n * _BF16_BYTES)
        sizes = (tokens, groups * -(-tokens // 128) * 128, n, k, groups, groups)
        flop = 2 * groups * tokens * n * k
        yield self.grouped("wo_a (if NVFP4)", self.rank.num_layers, shape, "bf16", sizes, moved, flop)

    def _route(self, routed: "Experts", tokens: int) -> Operator:
        kernel, top_k = self.module("route"), self.rank.model.top_k
        config = kernel.choose_config(tokens, top_k, 32, self.rank.ep, self.arch)
        moved = 4 * sum(kernel.route_sizes(tokens, top_k, routed.num_experts)) + 4 * tokens * top_k
        shape = f"tokens {tokens}, top_k {top_k}, experts {routed.num_experts}"
        return self.operator("route", routed.layers, kernel, shape, config, moved, 0)

    def _experts(self, experts: "Experts", tokens: int) -> Iterator[Operator]:
        from cutedsl.deployment import padded_rows
        from cutedsl.runners.workspace import expected_hit

        hidden, columns, count = self.rank.model.hidden_size, experts.intermediate, experts.num_experts
        # Choices that fall on this rank, and experts that at least one of them falls on, both on average.
        rows = math.ceil(tokens * experts.top_k * experts.share)
        used = count * (1 - (1 - experts.top_k / experts.total) ** tokens)
        yield from self.quantize(experts.name, experts.layers, rows, hidden, tokens if count > 1 else None)
        guess, padded = self.guess(experts, tokens), padded_rows(tokens, experts.top_k, count)
        num_hit = expected_hit(tokens, experts.top_k, experts.total, count)
        n = 2 * columns
        shape = f"rows {rows}, experts {used:.0f} of {count}, n {n}, k {hidden}"
        moved = rows * (hidden + columns) * self.operand_bytes + used * n * hidden * _NVFP4_BYTES
        sizes = (guess, padded, n, hidden, count, num_hit)
        flop = 2 * rows * n * hidden
        yield self.grouped(f"{experts.name}: gate, up", experts.layers, shape, "swiglu", sizes, moved, flop)
        if count == 1:
            yield self.linear(f"{experts.name}: down", experts.layers, tokens, hidden, columns)
            return
        shape = f"rows {rows}, experts {used:.0f} of {count}, n {hidden}, k {columns}"
        moved = rows * (columns * self.operand_bytes + hidden * _BF16_BYTES) + used * hidden * columns * _NVFP4_BYTES
        sizes = (guess, padded, hidden, columns, count, num_hit)
        flop = 2 * rows * hidden * columns
        yield self.grouped(f"{experts.name}: down", experts.layers, shape, "bf16", sizes, moved, flop)

    def _finalize(self, tokens: int) -> Operator:
        kernel = self.module("finalize")
        hidden, top_k = self.rank.model.hidden_size, self.rank.model.top_k
        config = kernel.choose_config(top_k, False, False, self.arch)
        share = 1 / self.rank.tp if self.rank.ep else 1
        # Rows of the experts on this rank, and the result; the shared expert's output is added by vLLM.
        moved = (tokens * top_k * share + tokens) * hidden * _BF16_BYTES + 8 * tokens * top_k
        shape = f"tokens {tokens}, top_k {top_k}, columns {hidden}"
        return self.operator("finalize", self.rank.num_layers, kernel, shape, config, moved, 0)

    def linear_cost(self, m: int, n: int, k: int) -> tuple[float, int]:
        """Bytes and FLOP of a GEMM with a factor for each of n."""
        moved = m * k * self.operand_bytes + n * k * _NVFP4_BYTES + 4 * n + m * n * _BF16_BYTES
        return moved, 2 * m * n * k

    def operator(
        self,
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
        """An operator of which the configuration says the rest."""
        stages = ""
        if hasattr(config, "num_ab_stages"):
            stages = f"{config.num_ab_stages} ab, {config.num_acc_stages} acc"
        elif hasattr(config, "num_stages"):
            stages = str(config.num_stages)
        clusters = (getattr(config, field, None) for field in ("cta_group", "num_ctas", "cluster_w"))
        return Operator(
            name=name,
            layers=layers,
            kernel=kernel.__name__.rpartition(".")[2],
            shape=shape,
            tile=tile,
            cluster=next((size for size in clusters if size is not None), 1),
            stages=stages,
            smem_bytes=getattr(config, "smem_bytes", None),
            tmem_columns=getattr(config, "tmem_columns", None),
            swap=swap,
            config=asdict(config),
            num_bytes=round(moved),
            flop=flop,
            arch=self.arch,
        )


class _Blackwell(_Kernels):
    """Chains of `cutedsl.runners.sm100`."""

    arch = "sm_100a"
    operand_bytes = _NVFP4_BYTES

    def quantize(self, name: str, layers: int, rows: int, k: int, tokens: int | None = None) -> Iterator[Operator]:
        from cutedsl.kernels import quantize_sm100 as kernel

        config = kernel.Config(by_slot=tokens is not None).validate()
        read = rows if tokens is None else min(rows, tokens)
        moved = (read * _BF16_BYTES + rows * _NVFP4_BYTES) * k
        yield self.operator(f"quantize for {name}", layers, kernel, f"rows {rows}, k {k}", config, moved, 0)

    def inverse_rope(self, shape: str, moved: float) -> Operator:
        from cutedsl.kernels import inverse_rope_quantize_sm100 as kernel

        config = kernel.Config(self.rank.model.head_dim, self.rank.model.rope_dim).validate()
        name = "inverse rope, quantize for wo_a"
        return self.operator(name, self.rank.num_layers, kernel, shape, config, moved, 0)

    def linear(self, name: str, layers: int, m: int, n: int, k: int) -> Operator:
        from cutedsl.kernels import linear_sm100 as kernel
        from cutedsl.runners.sm100 import SWAP_TOKENS

        shape, (moved, flop) = f"m {m}, n {n}, k {k}", self.linear_cost(m, n, k)
        if m <= SWAP_TOKENS:
            # One group, whose rows are all tokens.
            return self.grouped(name, layers, shape, "bf16", (m, m, n, k, 1, 1), moved, flop)
        config = kernel.choose_config(kernel.Shape(m, n, k))
        tile = f"{kernel.TILE_M}x{config.tile_n}x{kernel.TILE_K}"
        return self.operator(name, layers, kernel, shape, config, moved, flop, tile=tile)

    def grouped(
        self, name: str, layers: int, shape: str, epilogue: str, sizes: tuple[int, ...], moved: float, flop: int
    ) -> Operator:
        """Of the two grouped GEMMs the one that the runners take: with few tokens, weights on M."""
        from cutedsl.kernels import grouped_gemm_sm100, grouped_gemm_swap_sm100
        from cutedsl.runners.sm100 import SWAP_TOKENS

        tokens, rows, n, k, groups, _ = sizes
        epilogue = "swiglu_nvfp4" if epilogue == "swiglu" else epilogue
        kernel: Any
        if tokens <= SWAP_TOKENS:
            kernel = grouped_gemm_swap_sm100
            config = kernel.choose_config(kernel.Shape(tokens, n, k), epilogue)
            tile = f"{kernel.TILE_W}x{config.tile_n}x{kernel.TILE_K}"
            return self.operator(name, layers, kernel, shape, config, moved, flop, tile=tile, swap=True)
        kernel = grouped_gemm_sm100
        config = kernel.choose_config(kernel.Shape(rows, n, k, groups), epilogue)
        tile = f"{kernel.TILE_M}x{config.tile_n}x{kernel.TILE_K}"
        return self.operator(name, layers, kernel, shape, config, moved, flop, tile=tile)

    def guess(self, experts: "Experts", tokens: int) -> int:
        from cutedsl.deployment import group_tokens

        return group_tokens(experts, tokens)

    def module(self, name: str) -> Any:
        return importlib.import_module(f"cutedsl.kernels.{name}_sm100")


class _Hopper(_Kernels):
    """Chains of `cutedsl.runners.sm90`: activations are BF16 numbers, rounded to NVFP4 before or not."""

    arch = "sm_90a"
    operand_bytes = _BF16_BYTES

    def __init__(self, rank: "Rank", activations: str) -> None:
        super().__init__(rank)
        self.rounds = activations == "nvfp4"

    def quantize(self, name: str, layers: int, rows: int, k: int, tokens: int | None = None) -> Iterator[Operator]:
        """Nothing for rows that are taken as they are where they are."""
        from cutedsl.kernels import quantize_sm90 as kernel

        if tokens is None and not self.rounds:
            return
        config = kernel.Config(kernel.BF16 if self.rounds else kernel.COPY, by_slot=tokens is not None).validate()
        read = rows if tokens is None else min(rows, tokens)
        verb = "round" if self.rounds else "copy"
        moved = (read + rows) * _BF16_BYTES * k
        yield self.operator(f"{verb} for {name}", layers, kernel, f"rows {rows}, k {k}", config, moved, 0)

    def inverse_rope(self, shape: str, moved: float) -> Operator:
        from cutedsl.kernels import inverse_rope_quantize_sm90 as kernel

        output = kernel.BF16 if self.rounds else kernel.COPY
        config = kernel.Config(output, self.rank.model.head_dim, self.rank.model.rope_dim).validate()
        name = f"inverse rope{', round' * self.rounds} for wo_a"
        return self.operator(name, self.rank.num_layers, kernel, shape, config, moved, 0)

    def linear(self, name: str, layers: int, m: int, n: int, k: int) -> Operator:
        return self.grouped(
            name, layers, f"m {m}, n {n}, k {k}", "bf16", (m, m, n, k, 1, 1), *self.linear_cost(m, n, k)
        )

    def grouped(
        self, name: str, layers: int, shape: str, epilogue: str, sizes: tuple[int, ...], moved: float, flop: int
    ) -> Operator:
        from cutedsl.kernels import grouped_gemm_sm90 as kernel

        tokens, _, n, k, groups, num_hit = sizes
        epilogue = "swiglu_nvfp4" if epilogue == "swiglu" and self.rounds else epilogue
        config = kernel.choose_config(kernel.Shape(tokens, n, k, groups, num_hit), epilogue)
        tile = f"{config.tile_w}x{config.tile_n}x{kernel.TILE_K}"
        return self.operator(name, layers, kernel, shape, config, moved, flop, tile=tile, swap=True)

    def guess(self, experts: "Experts", tokens: int) -> int:
        from cutedsl.runners.workspace import large_group

        return large_group(tokens, experts.top_k, experts.total)

    def module(self, name: str) -> Any:
        return importlib.import_module(f"cutedsl.kernels.{name}_sm90")


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
        operators = explain(model, arguments.tp, arguments.m, arguments.ep, arguments.arch, arguments.activations)
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
    parser = _Parser(prog="nvfp4 kernels", description="What our kernels are and would do.")
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
    command.add_argument("--arch", default="sm_100a", help=f"one of {', '.join(GPUS)}; default sm_100a")
    command.add_argument(
        "--activations", help="nvfp4 or bf16; default bf16 on sm_90a, the only choice on sm_100a is nvfp4"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _as_dict(operator: Operator) -> dict[str, Any]:
    return {
        **asdict(operator),
        "roofline_seconds": operator.seconds,
        "bound": operator.bound,
        "label": GPUS[operator.arch].label,
    }


def _show(operators: list[Operator], arguments: argparse.Namespace, model: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    layout = f"tp {arguments.tp}" + (" with expert parallelism" if arguments.ep else "")
    label = GPUS[arguments.arch].label
    title = f"{model}, {layout}, {arguments.m} tokens: one rank"
    table = Table(title=title, caption=label, box=box.SIMPLE)
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
        console.print(f"all launches of a step: {total * 1e3:.3f} ms ({label})")
        console.print("MB and GFLOP are of one launch; experts are assumed to be chosen evenly.")
    sys.stdout.write(captured.get())


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
