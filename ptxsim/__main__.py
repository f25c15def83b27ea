"""`python -m ptxsim inventory FILE.ptx` and `python -m ptxsim trace SCRIPT.py`."""

import argparse
import runpy
import sys
from pathlib import Path

from ptxsim import api
from ptxsim.findings import FindingsError, Unsupported
from ptxsim.inventory import format_inventory, inventory


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (1: something the simulator cannot run, or findings; 2: wrong usage)."""
    parser = argparse.ArgumentParser(prog="python -m ptxsim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("inventory", help="the opcodes of a PTX file, and which of them cannot be simulated")
    one.add_argument("file", type=Path)
    two = commands.add_parser("trace", help="run a script; print the timeline of each ptxsim.run or simulate in it")
    two.add_argument("--json", type=Path, help="also write it for Perfetto or chrome://tracing")
    two.add_argument(
        "--launch", type=int, default=0, help="which of the script's launches to show (default: the first)"
    )
    two.add_argument("--width", type=int, default=100, help="columns of the text timeline")
    two.add_argument("script", type=Path)
    two.add_argument("args", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    return _inventory(options) if options.command == "inventory" else _trace(options)


def _inventory(options: argparse.Namespace) -> int:
    try:
        rows = inventory(options.file.read_text())
    except (OSError, Unsupported) as error:
        print(f"ptxsim: {options.file}: {error}", file=sys.stderr)
        return 1
    print(format_inventory(rows))
    return 1 if any(row.problem for row in rows) else 0


def _trace(options: argparse.Namespace) -> int:
    if not options.script.is_file():
        print(
            f"ptxsim: {options.script} is not a file; expected a Python script that calls ptxsim.run", file=sys.stderr
        )
        return 2
    sys.argv = [str(options.script), *options.args]
    sys.path.insert(0, str(options.script.parent))
    code = 0
    with api.traced() as traces:
        try:
            runpy.run_path(str(options.script), run_name="__main__")
        except FindingsError as error:
            print(f"ptxsim: {error}", file=sys.stderr)
            code = 1
    if options.launch >= len(traces):
        print(f"ptxsim: launch {options.launch} asked for, the script made {len(traces)}", file=sys.stderr)
        return 2
    trace = traces[options.launch]
    print(trace.to_text(options.width))
    if options.json:
        trace.write_json(options.json)
        print(f"written: {options.json} ({len(trace.spans)} spans)")
    return code


if __name__ == "__main__":
    sys.exit(main())
