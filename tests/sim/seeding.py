"""Seeded bugs: edit a good kernel's PTX text, run it in every policy, and say what was noticed.

The hard part is to edit what a compiler wrote without depending on its register numbers. An edit names an instruction by
opcode and by what it means: its place among its like, or the barrier it addresses (the constant part of its address, found by
walking back over `add` and `mov`). Every edit asserts how many instructions it matches, so that a changed kernel fails
loudly instead of leaving a bug unseeded. Lines keep their numbers: what is removed leaves an empty line.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ptxsim
from ptxsim import api, tensormap
from ptxsim.launch import Launch
from ptxsim.memory import Buffer

WRONG = "wrong result"
REFUSED = "refused"
NOTHING = "nothing"
POLICIES = ("eager", "random", "lazy")
SEEDS = {"eager": (0,), "random": (0, 1, 2), "lazy": (0,)}


# ---- editing --------------------------------------------------------------------------------------------------------


class Text:
    """PTX text that is being edited, line by line."""

    def __init__(self, ptx: str) -> None:
        self.lines = ptx.split("\n")

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def find(self, pattern: str, of: int | None = None) -> list[int]:
        """Numbers of the lines in which a pattern occurs; comments and .loc lines are skipped.

        Args:
            pattern: a regular expression.
            of: how many there must be; None: at least one.
        """
        found = [
            i
            for i, line in enumerate(self.lines)
            if re.search(pattern, line.split("//")[0]) and not line.lstrip().startswith(".loc")
        ]
        assert found if of is None else len(found) == of, (
            f"{pattern!r} occurs {len(found)} times, expected {of or 'some'}"
        )
        return found

    def one(self, pattern: str, at: int = 0, of: int | None = 1) -> int:
        """The line of match number `at` among `of`."""
        return self.find(pattern, of)[at]

    def drop(self, *numbers: int) -> None:
        """Empties lines."""
        for number in numbers:
            assert self.lines[number].strip(), f"line {number} is empty already"
            self.lines[number] = ""

    def change(self, number: int, pattern: str, replacement: str) -> None:
        """Replaces the only occurrence of a pattern in a line."""
        text, count = re.subn(pattern, replacement, self.lines[number])
        assert count == 1, f"{pattern!r} occurs {count} times in {self.lines[number]!r}"
        assert text != self.lines[number], f"no change of {text!r}"
        self.lines[number] = text

    def add(self, number: int, text: str) -> None:
        """Puts text before a line, without changing line numbers."""
        self.lines[number] = text + " " + self.lines[number]

    def add_behind(self, number: int, text: str) -> None:
        """Puts text behind a line."""
        self.lines[number] += " " + text

    def swap(self, first: int, second: int) -> None:
        """Exchanges two lines."""
        self.lines[first], self.lines[second] = self.lines[second], self.lines[first]

    def number_of(self, register: str, before: int) -> int:
        """The constant that a register was last set to above a line."""
        match = self._definition(register, before, r"mov\.[bus](?:32|64)\s+", r"(-?\d+)")
        return int(match[1])

    def offset(self, number: int) -> int:
        """The constant part of the address in brackets in a line: which variable of shared memory it means."""
        inside = re.search(r"\[([^\]]+)\]", self.lines[number])
        assert inside, self.lines[number]
        return self._constant(inside[1], number)

    def _constant(self, expression: str, before: int) -> int:
        parts = [part.strip() for part in expression.split("+")]
        total = sum(int(part) for part in parts if re.fullmatch(r"-?\d+", part))
        for register in (part for part in parts if part.startswith("%")):
            for i in range(before - 1, -1, -1):
                line = self.lines[i]
                if match := re.match(rf"\s*add\.[su]32\s+{re.escape(register)},\s*(%\w+),\s*(-?\d+);", line):
                    return total + int(match[2]) + self._constant(match[1], i)
                if match := re.match(rf"\s*mov\.[bu]32\s+{re.escape(register)},\s*(%\w+);", line):
                    return total + self._constant(match[1], i)
                if re.match(rf"\s*[\w.:]+\s+{re.escape(register)},", line):
                    break
        return total

    def _definition(self, register: str, before: int, opcode: str, operand: str) -> re.Match[str]:
        for i in range(before - 1, -1, -1):
            if match := re.match(rf"\s*{opcode}{re.escape(register)},\s*{operand};", self.lines[i]):
                return match
        raise AssertionError(f"no {opcode} of {register} above line {before}")

    def operands(self, number: int) -> list[str]:
        """Operands of the instruction in a line, brackets and braces kept together."""
        body = self.lines[number].strip().rstrip(";")
        body = re.sub(r"^@!?%\w+\s+", "", body)
        body = body.split(None, 1)[1]
        return [part.strip() for part in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", body)]

    # Waits on mbarriers: a block in braces that spins.

    def waits(self, offset: int | None = None, of: int | None = None) -> list[int]:
        """Lines of `try_wait`s in spin loops, of one barrier if its offset is given."""
        found = [i for i in self.find(r"mbarrier\.try_wait") if offset is None or self.offset(i) == offset]
        assert found if of is None else len(found) == of, f"{len(found)} waits on {offset}, expected {of or 'some'}"
        return found

    def drop_wait(self, number: int) -> None:
        """Removes a whole spin loop."""
        start = next(i for i in range(number, -1, -1) if self.lines[i].strip() == "{")
        end = next(i for i in range(number, len(self.lines)) if self.lines[i].strip() == "}")
        for i in range(start, end + 1):
            self.lines[i] = ""

    def flip_parity(self, number: int) -> None:
        """Makes a wait wait for the other phase."""
        parity = self.operands(number)[2]
        self.change(number, re.escape(parity), "WRONG")
        start = next(i for i in range(number, -1, -1) if self.lines[i].strip() == "{")
        self.add_behind(start, f".reg .b32 WRONG; xor.b32 WRONG, {parity}, 1;")


Edit = Callable[[Text], None]
"""Changes the text of a kernel."""


# ---- edits ----------------------------------------------------------------------------------------------------------


def drop(pattern: str, at: int = 0, of: int | None = 1) -> Edit:
    """An instruction is missing: match number `at` among `of`."""
    return lambda t: t.drop(t.one(pattern, at, of))


def drop_all(pattern: str, of: int) -> Edit:
    """All `of` instructions of a kind are missing."""
    return lambda t: t.drop(*t.find(pattern, of))


def replaced(pattern: str, at: int, of: int, old: str, new: str) -> Edit:
    """An instruction has something else in one place."""
    return lambda t: t.change(t.one(pattern, at, of), old, new)


def change_all(pattern: str, of: int, old: str, new: str) -> Edit:
    """All instructions of a kind have."""

    def edit(t: Text) -> None:
        for line in t.find(pattern, of):
            t.change(line, old, new)

    return edit


def drop_wait(at: int, of: int) -> Edit:
    """A wait on an mbarrier is missing."""
    return lambda t: t.drop_wait(t.waits(of=of)[at])


def half_a_warp(pattern: str, at: int = 0, of: int | None = 1) -> Edit:
    """An instruction is executed by the upper half of each warp alone."""

    def edit(t: Text) -> None:
        line = t.one(pattern, at, of)
        t.lines[line] = (
            "{ .reg .pred HALF; .reg .b32 LANE; mov.u32 LANE, %laneid; setp.lt.u32 HALF, LANE, 16; "
            f"@HALF bra PAST; {t.lines[line].strip()} PAST: }}"
        )

    return edit


def every_lane(pattern: str, at: int = 0, of: int | None = 1) -> Edit:
    """The branch around an instruction, which kept all lanes or warps but one out, is missing."""

    def edit(t: Text) -> None:
        line = t.one(pattern, at, of)
        t.drop(max(i for i in t.find(r"@!?%p\d+ bra\b") if i < line))

    return edit


# ---- what is seeded -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A launch with its memory, ready to be run once.

    Attributes:
        launch: what to run.
        memory: all it may access.
        is_right: looks at the outputs afterwards.
    """

    launch: Launch
    memory: Sequence[Buffer]
    is_right: Callable[[], bool]


@dataclass(frozen=True)
class Base:
    """A good kernel.

    Attributes:
        name: short.
        prepare: makes a launch and fresh memory; called before every run.
    """

    name: str
    prepare: Callable[[], Prepared]


@dataclass(frozen=True)
class Bug:
    """A fault put into a good kernel.

    Attributes:
        name: what was broken, a few words.
        expected: finding codes of which at least one must be among what a run finds; WRONG if the result must be wrong
            although nothing was found, REFUSED if the simulator must refuse the kernel.
        edit: of the PTX text; it may be absent.
        host: of the launch and its memory, for bugs on the host.
        policies: those in which it must be noticed.
    """

    name: str
    expected: frozenset[str]
    edit: Edit | None = None
    host: Callable[[Prepared], Prepared] | None = None
    policies: tuple[str, ...] = POLICIES


def bug(
    name: str, expected: str, edit: Edit | None = None, *, host: Any = None, policies: str = "eager random lazy"
) -> Bug:
    """A Bug; expected codes are separated by `|`."""
    codes = frozenset(code.strip() for code in expected.split("|"))
    return Bug(name, codes, edit, host, tuple(policies.split()))


@dataclass(frozen=True)
class Outcome:
    """What one run of a kernel showed.

    Attributes:
        codes: of the findings, first one first; WRONG or REFUSED alone if there is none.
        detail: the first finding in full.
    """

    codes: tuple[str, ...] = ()
    detail: str = ""

    def __str__(self) -> str:
        return self.codes[0] if self.codes else NOTHING


def edited(base: Base, seeded: Bug | None) -> str:
    """The text of a base kernel, with a bug if one is given."""
    original = base.prepare().launch.ptx
    if seeded is None or seeded.edit is None:
        return original
    text = Text(original)
    seeded.edit(text)
    assert str(text) != original, f"{seeded.name}: the edit changed nothing"
    return str(text)


def run_once(base: Base, policy: str, seed: int, seeded: Bug | None, ptx: str) -> Outcome:
    """Runs a base kernel with the given text."""
    prepared = base.prepare()
    prepared = replace(prepared, launch=replace(prepared.launch, ptx=ptx))
    if seeded is not None and seeded.host is not None:
        prepared = seeded.host(prepared)
    try:
        report = ptxsim.simulate(prepared.launch, prepared.memory, policy=policy, seed=seed)
    except ptxsim.Unsupported as refusal:
        return Outcome((REFUSED,), str(refusal))
    if report.findings:
        return Outcome(tuple(dict.fromkeys(finding.code for finding in report.findings)), str(report.findings[0]))
    return Outcome() if prepared.is_right() else Outcome((WRONG,))


def run_all(base: Base, seeded: Bug | None = None) -> dict[str, list[Outcome]]:
    """Runs a base kernel in every policy, `random` with several seeds."""
    ptx, known = edited(base, seeded), set(api._programs)
    outcomes = {policy: [run_once(base, policy, seed, seeded, ptx) for seed in SEEDS[policy]] for policy in POLICIES}
    # An edited text is not run again: it need not stay compiled.
    for key in set(api._programs) - known:
        if seeded is not None:
            del api._programs[key]
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """A table's cell: what was found, and by how many of several seeds."""
    texts = [str(outcome) for outcome in outcomes]
    distinct = list(dict.fromkeys(texts))
    if len(distinct) == 1:
        return distinct[0]
    return ", ".join(f"{text} ({texts.count(text)}/{len(texts)})" for text in distinct)


@dataclass
class Table:
    """Outcomes of many bugs, as Markdown."""

    rows: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def add(self, base: str, name: str, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        """Adds a bug."""
        self.rows.append((base, name, {policy: summary(runs) for policy, runs in outcomes.items()}))

    def __str__(self) -> str:
        lines = ["| kernel | seeded bug | eager | random (3 seeds) | lazy |", "|---|---|---|---|---|"]
        lines += [
            f"| {base} | {name} | " + " | ".join(cells[policy] for policy in POLICIES) + " |"
            for base, name, cells in self.rows
        ]
        return "\n".join(lines)


# ---- bugs on the host -----------------------------------------------------------------------------------------------


def change_launch(**changes: Any) -> Callable[[Prepared], Prepared]:
    """A host that launches with other numbers."""

    def host(prepared: Prepared) -> Prepared:
        return replace(prepared, launch=replace(prepared.launch, **changes))

    return host


def change_map(number: int, **changes: Any) -> Callable[[Prepared], Prepared]:
    """A host that encodes tensor map `number` with other fields; a function among them gets the old value."""

    def host(prepared: Prepared) -> Prepared:
        params = list(prepared.launch.params)
        places = [i for i, param in enumerate(params) if len(param) == tensormap.MAP_BYTES]
        old = tensormap.decode(params[places[number]])
        values = {name: new(getattr(old, name)) if callable(new) else new for name, new in changes.items()}
        params[places[number]] = tensormap.encode(replace(old, **values))
        return replace(prepared, launch=replace(prepared.launch, params=tuple(params)))

    return host


def shorten(name: str, num_bytes: int) -> Callable[[Prepared], Prepared]:
    """A host that allocates fewer bytes of a buffer than the kernel accesses."""

    def host(prepared: Prepared) -> Prepared:
        [short] = [buffer for buffer in prepared.memory if buffer.name == name]
        kept = [buffer for buffer in prepared.memory if buffer.name != name]
        valid = None if short.valid is None else short.valid[:-num_bytes].copy()
        kept.append(replace(short, num_bytes=short.num_bytes - num_bytes, valid=valid))
        return replace(prepared, memory=kept)

    return host
