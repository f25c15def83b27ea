"""`nvfp4 doctor PATH_OR_HUB_ID`: will this checkpoint serve, and on what?

Exit codes: 0 will serve, 1 will not serve, 2 will serve with warnings, 64 the command itself is wrong.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_nvfp4.doctor.gpus import GPUS
from vllm_nvfp4.doctor.plan import PlanOptions

if TYPE_CHECKING:
    from vllm_nvfp4.doctor.examine import Report

USAGE_ERROR = 64  # sysexits' EX_USAGE: argparse's own 2 would read as "will serve, with warnings"
DEFAULTS = PlanOptions()


class _Parser(argparse.ArgumentParser):
    """Exits with USAGE_ERROR."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nvfp4 doctor",
        description="Says before a load whether a checkpoint will serve, and on what.",
        epilog="exit code: 0 will serve, 1 will not serve, 2 will serve with warnings, 64 wrong usage",
    )
    parser.add_argument(
        "path", metavar="PATH_OR_HUB_ID", help="checkpoint folder, config.json, or owner/name on the Hub"
    )
    parser.add_argument("--revision", help="of a model on the Hub")
    parser.add_argument("--deep", action="store_true", help="read all block scales and all weights too")
    parser.add_argument("--json", action="store_true", help="print JSON (doctor/schema.json) instead of the report")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture: memory of a GPU, scales by layer")
    group = parser.add_argument_group("plan", "for these the exit code says whether it fits, too")
    group.add_argument("--plan-only", action="store_true", help="plan from config.json alone, read no weights")
    group.add_argument("--gpu", type=str.lower, choices=sorted(GPUS), help=f"default {DEFAULTS.gpu}")
    group.add_argument("--tp", type=int, help="tensor parallel size")
    group.add_argument("--dp", type=int, help="data parallel size")
    group.add_argument("--pp", type=int, help="pipeline parallel size")
    group.add_argument("--ep", type=int, nargs="?", const=True, help="expert parallel: a switch, or the size (tp * dp)")
    group.add_argument("--context", type=int, metavar="TOKENS", help="length of a request")
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", help=f"requests at once, default {DEFAULTS.max_num_seqs}"
    )
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="as vLLM's flag")
    group.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="as vLLM's flag, default 0.9")
    group.add_argument("--mtp", action="store_true", default=None, help="with speculative decoding by MTP layers")
    return parser


PLAN_FLAGS = (
    "gpu", "tp", "dp", "pp", "ep", "context", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "mtp",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in PLAN_FLAGS if getattr(args, name) is not None}
    if args.plan_only and args.deep:
        parser.error("--deep reads weights, --plan-only does not: choose one")
    # Imported once the flags are right: --help need not wait for torch.
    from vllm_nvfp4.doctor.examine import Options, examine

    options = Options(args.plan_only, args.deep, args.revision, PlanOptions(**given), asked=bool(given))
    found = examine(args.path, options)
    _show(found, args.json)
    if args.plot:
        from vllm_nvfp4.doctor import plot

        try:
            plot.draw(found, args.plot)
        except (OSError, ValueError) as error:
            print(f"{parser.prog}: {args.plot} is not written: {error}", file=sys.stderr)
            return USAGE_ERROR
    return found.exit_code


def _show(found: "Report", as_json: bool) -> None:
    """Print the report. A reader who has seen enough (`| head`) changes nothing about the verdict."""
    from rich.console import Console

    from vllm_nvfp4.doctor import report

    try:
        if as_json:
            print(report.to_json(found))
        else:
            # Captured first: rich would end the process with 1, "will not serve", where the pipe is closed.
            console = Console(highlight=False)
            with console.capture() as captured:
                report.render(found, console)
            sys.stdout.write(captured.get())
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
