"""Which opcodes a PTX file uses, how often, and which of them the simulator knows."""

from collections import Counter
from dataclasses import dataclass

from ptxsim import ptx
from ptxsim.codegen import is_branch
from ptxsim.findings import Unsupported
from ptxsim.registry import decode


@dataclass(frozen=True)
class Row:
    """One full opcode of one kernel.

    Attributes:
        kernel: entry.
        op: full opcode.
        count: static number of instructions.
        example: one of them, as written.
        line: its line.
        problem: why the simulator cannot run it, or None.
    """

    kernel: str
    op: str
    count: int
    example: str
    line: int
    problem: str | None


def inventory(text: str) -> list[Row]:
    """Every full opcode of every kernel in a PTX file.

    Args:
        text: the file.

    Returns:
        Rows sorted by kernel and opcode; an opcode that one instruction of many cannot be decoded for has that problem.
    """
    import ptxsim.semantics  # noqa: F401 - registers the decoders

    rows = []
    for kernel in ptx.parse(text).kernels.values():
        counts: Counter[str] = Counter()
        first: dict[str, ptx.Instruction] = {}
        problems: dict[str, str] = {}
        for ins in kernel.instructions:
            counts[ins.op] += 1
            first.setdefault(ins.op, ins)
            if is_branch(ins) or ins.op in problems:
                continue
            try:
                decode(ins)
            except Unsupported as error:
                problems[ins.op] = str(error)
        for op in sorted(counts):
            rows.append(Row(kernel.name, op, counts[op], first[op].text, first[op].line, problems.get(op)))
    return rows


def format_inventory(rows: list[Row]) -> str:
    """The rows as a table for people."""
    lines = []
    kernel = None
    for row in rows:
        if row.kernel != kernel:
            kernel = row.kernel
            own = [r for r in rows if r.kernel == kernel]
            lines.append(f"{kernel}: {len(own)} opcodes, {sum(r.count for r in own)} instructions")
        lines.append(f"  {row.count:5d}  {row.op}" + (f"\n         CANNOT RUN: {row.problem}" if row.problem else ""))
    return "\n".join(lines)
