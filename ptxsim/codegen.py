"""PTX instructions -> Python functions, one for each run of instructions that control enters only at its top.

Why generate code: a closure for each instruction spends most of its time on operand lookup. A generated function keeps the
registers that live only inside it in Python locals, and knows at generation time which instructions are plain arithmetic.

Each segment exists in two forms, made when first needed: one for a warp whose 32 lanes run together, and one for a part of a
warp, which merges what it writes into the lanes that it stands for. A segment function returns the next segment's number, or
DIVERGED, BLOCKED or EXITED.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptxsim import values
from ptxsim.findings import Unsupported
from ptxsim.ptx import (
    Address,
    Imm,
    Instruction,
    Kernel,
    Label,
    Not,
    Operand,
    Pair,
    Reg,
    Sink,
    Special,
    Symbol,
    TensorAddress,
    Vector,
)
from ptxsim.registry import BLOCK, Effect, Pure, Source, decode

DIVERGED, BLOCKED, EXITED = -1, -2, -3
SegmentFunction = Callable[[Any, int, list[Any]], int]
_DYNAMIC_SPECIALS = ("%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi")


@dataclass
class Segment:
    """Instructions [start, end) of the kernel; successors and the point where divergent lanes meet again."""

    number: int
    start: int
    end: int
    successors: tuple[int, ...] = ()
    join: int = -1


@dataclass
class Program:
    """A kernel ready to run.

    Attributes:
        kernel: what was compiled.
        segments: in program order.
        full, partial: segment functions for a whole warp and for a part of one; entries compile themselves when first called.
        sources: generated Python, by (segment, partial), for those who debug the generator.
    """

    kernel: Kernel
    segments: list[Segment]
    decoded: list[Pure | Effect | None]
    full: list[SegmentFunction] = field(default_factory=list)
    partial: list[SegmentFunction] = field(default_factory=list)
    sources: dict[tuple[int, bool], str] = field(default_factory=dict)


def is_branch(ins: Instruction) -> bool:
    """True for the instructions that the generator itself understands."""
    return ins.parts[0] in ("bra", "brx", "ret", "exit")


def compile_kernel(kernel: Kernel) -> Program:
    """Decodes every instruction and cuts the kernel into segments.

    Raises:
        Unsupported: an opcode, modifier or operand form is not known, reachable or not.
    """
    decoded: list[Pure | Effect | None] = []
    for ins in kernel.instructions:
        if is_branch(ins):
            if any(part not in ("bra", "brx", "ret", "exit", "uni", "idx") for part in ins.parts):
                raise Unsupported(f"PTX line {ins.line}: {ins.text} is not known")
            decoded.append(None)
        else:
            decoded.append(decode(ins))
    segments = _segments(kernel, decoded)
    _joins(segments)
    program = Program(kernel, segments, decoded)
    use = _Liveness(program)
    for segment in segments:
        program.full.append(_lazy(program, segment, use, partial=False))
        program.partial.append(_lazy(program, segment, use, partial=True))
    return program


def _lazy(program: Program, segment: Segment, use: "_Liveness", partial: bool) -> SegmentFunction:
    def first_call(w: Any, m: int, registers: list[Any]) -> int:
        function = _generate(program, segment, use, partial)
        (program.partial if partial else program.full)[segment.number] = function
        return function(w, m, registers)

    return first_call


def _segments(kernel: Kernel, decoded: list[Pure | Effect | None]) -> list[Segment]:
    count = len(kernel.instructions)
    leaders = {0, *kernel.labels.values()}
    for i, item in enumerate(decoded):
        if item is None:
            leaders.add(i + 1)
        elif isinstance(item, Effect) and item.blocks:
            leaders.add(i)
    starts = sorted(leader for leader in leaders if leader < count)
    segments = [Segment(n, start, end) for n, (start, end) in enumerate(zip(starts, [*starts[1:], count], strict=True))]
    at = {segment.start: segment.number for segment in segments}
    at[count] = len(segments)

    def target(name: str) -> int:
        return at[kernel.labels[name]]

    for segment in segments:
        ins = kernel.instructions[segment.end - 1]
        after = segment.number + 1
        if ins.parts[0] == "bra":
            taken = target(_label(ins))
            segment.successors = (taken,) if ins.guard is None else (taken, after)
        elif ins.parts[0] == "brx":
            segment.successors = tuple(target(name) for name in _table(kernel, ins)) + ((after,) if ins.guard else ())
        elif ins.parts[0] in ("ret", "exit"):
            segment.successors = () if ins.guard is None else (after,)
        else:
            segment.successors = (after,)
        segment.successors = tuple(s for s in segment.successors if s < len(segments))
    return segments


def _label(ins: Instruction) -> str:
    operand = ins.operands[0]
    if not isinstance(operand, Label):
        raise Unsupported(f"PTX line {ins.line}: {ins.text} does not branch to a label of this kernel")
    return operand.name


def _table(kernel: Kernel, ins: Instruction) -> tuple[str, ...]:
    operand = ins.operands[1]
    if not isinstance(operand, Label) or operand.name not in kernel.tables:
        raise Unsupported(f"PTX line {ins.line}: {ins.text} has no table of targets")
    return kernel.tables[operand.name]


def _joins(segments: list[Segment]) -> None:
    """Immediate post-dominators: where the lanes that a branch separated run together again.

    A guarded `ret` is no way out here: its lanes leave the warp's mask instead.
    """
    count = len(segments)
    exit_node = count
    order: list[int] = []
    predecessors: list[list[int]] = [[] for _ in range(count + 1)]
    for segment in segments:
        for successor in segment.successors or (exit_node,):
            predecessors[successor].append(segment.number)
    seen = {exit_node}
    stack: list[tuple[int, int]] = [(exit_node, 0)]
    while stack:
        node, i = stack.pop()
        if i < len(predecessors[node]):
            stack.append((node, i + 1))
            nxt = predecessors[node][i]
            if nxt not in seen:
                seen.add(nxt)
                stack.append((nxt, 0))
        else:
            order.append(node)
    rank = {node: i for i, node in enumerate(order)}
    idom: dict[int, int] = {exit_node: exit_node}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            successors = segments[node].successors or (exit_node,)
            done = [s for s in successors if s in idom]
            if not done:
                continue
            new = done[0]
            for other in done[1:]:
                a, b = other, new
                while a != b:
                    while rank[a] < rank[b]:
                        a = idom[a]
                    while rank[b] < rank[a]:
                        b = idom[b]
                new = a
            if idom.get(node) != new:
                idom[node] = new
                changed = True
    for segment in segments:
        join = idom.get(segment.number, exit_node)
        segment.join = -1 if join == exit_node else join


def registers_of(operand: Operand) -> tuple[Reg, ...]:
    """Every register named by an operand."""
    if isinstance(operand, Reg):
        return (operand,)
    if isinstance(operand, Not):
        return (operand.reg,)
    if isinstance(operand, Vector):
        return tuple(reg for item in operand.items for reg in registers_of(item))
    if isinstance(operand, Pair):
        return registers_of(operand.first) + registers_of(operand.second)
    if isinstance(operand, Address):
        return registers_of(operand.base)
    if isinstance(operand, TensorAddress):
        return registers_of(operand.base) + tuple(reg for vector in operand.vectors for reg in registers_of(vector))
    return ()


class _Liveness:
    """Which registers a segment must load from and store to the warp's list; the others never leave the function."""

    def __init__(self, program: Program) -> None:
        homes: dict[int, set[int]] = {}
        self.escapes: set[int] = set()
        # Registers that every way into a segment has written, as bits.
        self.assigned = [-1] * len(program.segments)
        for segment in program.segments:
            defined: set[int] = set()
            for i in range(segment.start, segment.end):
                ins, item = program.kernel.instructions[i], program.decoded[i]
                used, written = _uses(ins, item)
                for reg in used + written:
                    homes.setdefault(reg.index, set()).add(segment.number)
                self.escapes.update(reg.index for reg in used if reg.index not in defined)
                for reg in written:
                    if ins.guard is not None and reg.index not in defined:
                        self.escapes.add(reg.index)
                    defined.add(reg.index)
        self.escapes.update(index for index, where in homes.items() if len(where) > 1)
        self._assign(program)

    def _assign(self, program: Program) -> None:
        """Definite assignment: all ones, and then what each way in takes away, until nothing changes."""
        gains = []
        for segment in program.segments:
            gain = 0
            for i in range(segment.start, segment.end):
                ins = program.kernel.instructions[i]
                if ins.guard is None:
                    for reg in _uses(ins, program.decoded[i])[1]:
                        gain |= 1 << reg.index
            gains.append(gain)
        if not program.segments:
            return
        self.assigned[0] = 0
        changed = [0]
        while changed:
            number = changed.pop()
            out = self.assigned[number] | gains[number]
            for successor in program.segments[number].successors:
                entry = self.assigned[successor] & out
                if entry != self.assigned[successor]:
                    self.assigned[successor] = entry
                    changed.append(successor)


def _uses(ins: Instruction, item: Pure | Effect | None) -> tuple[tuple[Reg, ...], tuple[Reg, ...]]:
    guard = (ins.guard,) if ins.guard is not None else ()
    if item is None:
        operands = ins.operands[:1] if ins.parts[0] == "brx" else ()
        return guard + tuple(reg for operand in operands for reg in registers_of(operand)), ()
    used = tuple(reg for source in item.srcs for reg in registers_of(source.operand))
    written = tuple(reg for dst in item.dsts for reg in registers_of(dst))
    return guard + used, written


class _Writer:
    """Generates one segment function."""

    def __init__(self, program: Program, segment: Segment, use: _Liveness, partial: bool) -> None:
        self.program, self.segment, self.use, self.partial = program, segment, use, partial
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        self.known: set[int] = set()
        self.dirty: dict[int, Reg] = {}
        self.temporaries = 0

    def add(self, text: str, indent: int = 1) -> None:
        self.lines.extend("    " * indent + line for line in text.split("\n"))

    def temporary(self) -> str:
        self.temporaries += 1
        return f"t{self.temporaries}"

    def read(self, reg: Reg, indent: int) -> str:
        if reg.index not in self.known:
            # Always at the function's own level: a load inside a guarded block would not be seen behind it.
            self.add(f"v{reg.index} = R[{reg.index}]", indent)
            if not self.use.assigned[self.segment.number] >> reg.index & 1:
                # Compilers leave registers undefined whose content does not matter, such as the upper half of a lone b16.
                # A pattern rather than 0, so that a program that does depend on it goes wrong.
                junk = 0xA5A5A5A5A5A5A5A5
                nothing = {1: "0", 128: f"({junk}, {junk})"}.get(reg.width, str(junk & ((1 << reg.width) - 1)))
                self.add(f"if v{reg.index} is None: v{reg.index} = {nothing}", indent)
            if indent == 1:
                self.known.add(reg.index)
        return f"v{reg.index}"

    def preload(self, ins: Instruction, item: Pure | Effect | None) -> None:
        used, written = _uses(ins, item)
        for reg in used:
            self.read(reg, 1)
        if ins.guard is not None:
            for reg in written:
                self.read(reg, 1)

    def source(self, source: Source, ins: Instruction, indent: int) -> str:
        return self.operand(source.operand, source.width, ins, indent)

    def operand(self, operand: Operand, width: int, ins: Instruction, indent: int) -> str:
        if isinstance(operand, Reg):
            return self.read(operand, indent)
        if isinstance(operand, Not):
            return f"({self.read(operand.reg, indent)} ^ 0xFFFFFFFF)"
        if isinstance(operand, Imm):
            if width == 1:
                return "0xFFFFFFFF" if operand.integer() else "0"
            return str(operand.bits(width))
        if isinstance(operand, Special):
            if operand.name in _DYNAMIC_SPECIALS:
                return f"w.read_special({operand.name!r})"
            return f"w.specials[{operand.name!r}]"
        if isinstance(operand, Symbol):
            return f"w.symbol({operand.name!r})"
        if isinstance(operand, Vector):
            return "[" + ", ".join(self.operand(item, width, ins, indent) for item in operand.items) + "]"
        if isinstance(operand, Address):
            return self.address(operand, ins, indent)
        if isinstance(operand, TensorAddress):
            base = self.address(operand.base, ins, indent)
            vectors = ", ".join(self.operand(vector, 32, ins, indent) for vector in operand.vectors)
            return f"({base}, [{vectors}])"
        if isinstance(operand, Sink):
            return "None"
        raise Unsupported(f"PTX line {ins.line}: operand {operand} of {ins.text} cannot be a source")

    def address(self, operand: Address, ins: Instruction, indent: int) -> str:
        if isinstance(operand.base, Imm):
            return str((operand.base.integer() + operand.offset) & values.M64)
        width = operand.base.width if isinstance(operand.base, Reg) else 64
        base = self.operand(operand.base, width, ins, indent)
        if operand.offset == 0:
            return base
        mask = (1 << width) - 1
        name = self.temporary()
        self.add(f"{name} = {base} + {operand.offset & mask}\nif {name}.__class__ is int: {name} &= {mask}", indent)
        return name

    def target(self, operand: Operand, renamed: dict[int, str]) -> str:
        if isinstance(operand, Sink):
            return "_"
        if isinstance(operand, Reg):
            return renamed.get(operand.index, f"v{operand.index}")
        if isinstance(operand, Vector):
            inner = "".join(f"{self.target(item, renamed)}, " for item in operand.items)
            return f"({inner})"
        if isinstance(operand, Pair):
            return f"{self.target(operand.first, renamed)}, {self.target(operand.second, renamed)}"
        raise Unsupported(f"operand {operand} cannot be a destination")

    def instruction(self, i: int) -> None:
        ins, item = self.program.kernel.instructions[i], self.program.decoded[i]
        assert item is not None
        self.preload(ins, item)
        indent, mask = 1, "m"
        renamed: dict[int, str] = {}
        written = [reg for dst in item.dsts for reg in registers_of(dst)]
        if ins.guard is not None:
            guard = self.read(ins.guard, 1)
            self.add(f"g = ({guard} ^ 0xFFFFFFFF) & m" if ins.guard_negated else f"g = {guard} & m")
            self.add("if g:")
            indent, mask = 2, "g"
            renamed = {reg.index: self.temporary() for reg in written}
        if isinstance(item, Effect):
            self.effect(i, ins, item, indent, mask, renamed)
        else:
            self.pure(i, ins, item, indent, renamed)
        for reg in written:
            if ins.guard is not None:
                old, new = f"v{reg.index}", renamed[reg.index]
                self.add(f"{old} = {new} if g == m else {self.merge(reg)}({old}, {new}, g)", 2)
            self.known.add(reg.index)
            if reg.index in self.use.escapes:
                self.dirty[reg.index] = reg

    def merge(self, reg: Reg) -> str:
        return {1: "merge_pred", 64: "merge64", 128: "merge128"}.get(reg.width, "merge")

    def pure(self, i: int, ins: Instruction, item: Pure, indent: int, renamed: dict[int, str]) -> None:
        sources = [self.source(source, ins, indent) for source in item.srcs]
        if item.inline is not None and "\n" not in item.inline and item.inline.startswith("{d} = "):
            self.assign(item, item.inline.removeprefix("{d} = ").format(*sources), indent, renamed)
            return
        if item.inline is not None and len(item.dsts) == 1 and isinstance(item.dsts[0], Reg):
            # The result may be one of the sources: templates of several statements would read what they just wrote.
            name = self.temporary()
            self.add(item.inline.format(*sources, d=name), indent)
            self.add(f"{self.target(item.dsts[0], renamed)} = {name}", indent)
            return
        self.names[f"F{i}"] = item.fn
        self.assign(item, f"F{i}({', '.join(sources)})", indent, renamed)

    def assign(self, item: Pure | Effect, call: str, indent: int, renamed: dict[int, str]) -> None:
        if not item.dsts:
            self.add(call, indent)
        elif len(item.dsts) == 1:
            self.add(f"{self.target(item.dsts[0], renamed)} = {call}", indent)
        else:
            self.add(f"{', '.join(self.target(dst, renamed) for dst in item.dsts)} = {call}", indent)

    def effect(self, i: int, ins: Instruction, item: Effect, indent: int, mask: str, renamed: dict[int, str]) -> None:
        sources = [self.source(source, ins, indent) for source in item.srcs]
        self.names[f"E{i}"] = item.run
        self.add(f"w.at = {i}", indent)
        if item.aligned:
            self.add(f"if {mask} != w.active: w.diverged_here({mask})", indent)
        call = f"E{i}(w, {', '.join([mask, *sources])})"
        if not item.blocks:
            self.assign(item, call, indent, renamed)
            return
        self.add(f"b = {call}\nif b is BLOCK: return {BLOCKED}", indent)
        if item.dsts:
            self.assign(item, "b", indent, renamed)

    def flush(self, indent: int = 1) -> None:
        for index, reg in self.dirty.items():
            if not self.partial:
                self.add(f"R[{index}] = v{index}", indent)
            else:
                self.add(f"R[{index}] = {self.merge(reg)}(R[{index}], v{index}, m)", indent)

    def finish(self) -> None:
        segment, kernel = self.segment, self.program.kernel
        ins = kernel.instructions[segment.end - 1]
        after = segment.number + 1
        if not is_branch(ins):
            self.flush()
            self.add(f"return {after if after < len(self.program.segments) else EXITED}")
            return
        self.preload(ins, None)
        self.flush()
        guard = None
        if ins.guard is not None:
            guard = self.read(ins.guard, 1)
            self.add(f"p = ({guard} ^ 0xFFFFFFFF) & m" if ins.guard_negated else f"p = {guard} & m")
        if ins.parts[0] == "bra":
            taken = segment.successors[0]
            if guard is None:
                self.add(f"return {taken}")
            else:
                self.add(f"if not p: return {after}\nif p == m: return {taken}\nw.at = {segment.end - 1}")
                self.add(f"return w.diverge(p, {taken}, {after}, {segment.join})")
        elif ins.parts[0] == "brx":
            if guard is not None:
                raise Unsupported(f"PTX line {ins.line}: guarded {ins.op}")
            index = self.operand(ins.operands[0], 32, ins, 1)
            self.add(
                f"w.at = {segment.end - 1}\nreturn w.diverge_table({index}, {segment.successors!r}, {segment.join}, m)"
            )
        else:
            self.add(f"w.at = {segment.end - 1}")
            if guard is None:
                self.add(f"return {EXITED}")
            else:
                self.add(f"if not p: return {after}\nif p == m: return {EXITED}\nreturn w.exit_some(p, {after})")


def merge_pred(old: int | None, new: int, mask: int) -> int:
    """`new` in the lanes of `mask`, `old` elsewhere."""
    return new if old is None else (old & ~mask) | (new & mask)


def _generate(program: Program, segment: Segment, use: _Liveness, partial: bool) -> SegmentFunction:
    writer = _Writer(program, segment, use, partial)
    name = f"{'partial' if partial else 'full'}_{segment.number}"
    writer.lines.append(f"def {name}(w, m, R):")
    for i in range(segment.start, segment.end):
        if not is_branch(program.kernel.instructions[i]):
            writer.instruction(i)
    writer.finish()
    text = "\n".join(writer.lines)
    program.sources[segment.number, partial] = text
    namespace: dict[str, Any] = {k: v for k, v in vars(values).items() if not k.startswith("__")}
    namespace.update(np=np, BLOCK=BLOCK, merge_pred=merge_pred, **writer.names)
    for item in program.decoded[segment.start : segment.end]:
        # An inline template may name helpers of the module that wrote it.
        if isinstance(item, Pure) and item.inline is not None:
            module = getattr(item.fn, "__globals__", {})
            for word in re.findall(r"\b[A-Za-z_]\w*\b", item.inline):
                if word in module and word not in namespace:
                    namespace[word] = module[word]
    exec(compile(text, f"<ptxsim {program.kernel.name[:40]} {name}>", "exec"), namespace)
    return namespace[name]
