"""PTX text -> kernels, instructions and operands.

Only the syntax that compilers emit for kernels: entries, module variables, registers scoped by `{}` (inline assembly reuses
names such as `P1` and `DONE`), vectors, `%r|%p` pairs, `_` sinks, tensor addresses. What an opcode means is not known here.
"""

import bisect
import re
import struct
from dataclasses import dataclass, field
from typing import Any

from ptxsim.findings import Unsupported

WIDTHS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64, "128": 128}


@dataclass(frozen=True, slots=True)
class Reg:
    """A register: `index` is its place in a warp's register list, `width` its bits (1: predicate)."""

    name: str
    width: int
    index: int


@dataclass(frozen=True, slots=True)
class Imm:
    """A literal; `text` as written."""

    text: str

    def bits(self, width: int) -> int:
        """The literal as an unsigned number of `width` bits; a decimal float takes the format of that width."""
        text = self.text
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            raw = int(text[2:], 16)
            return raw if width == 32 else struct.unpack("<Q", struct.pack("<d", _float_of(raw)))[0]
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return int(text[2:], 16)
        if re.match(r"[-+]?\d*\.\d+([eE][-+]?\d+)?$|[-+]?\d+\.?[eE][-+]?\d+$|[-+]?\d+\.$", text):
            code = {16: "e", 32: "f", 64: "d"}[width]
            return int.from_bytes(struct.pack("<" + code, float(text)), "little")
        return self.integer() & ((1 << width) - 1)

    def integer(self) -> int:
        """The literal as a signed integer."""
        text = self.text.rstrip("U").rstrip("u")
        sign = -1 if text.startswith("-") else 1
        text = text.lstrip("+-")
        if re.match(r"0[0-7]+$", text):
            return sign * int(text, 8)
        return sign * int(text, 0)


def _float_of(raw: int) -> float:
    return struct.unpack("<f", struct.pack("<I", raw))[0]


@dataclass(frozen=True, slots=True)
class Special:
    """A read-only register of the hardware, such as `%tid.x`."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A named variable or parameter."""

    name: str


@dataclass(frozen=True, slots=True)
class Label:
    """A branch target (an index into the kernel's instructions) or the name of a table or function."""

    name: str


@dataclass(frozen=True, slots=True)
class Sink:
    """The operand `_`: a result that nobody wants."""


@dataclass(frozen=True, slots=True)
class Not:
    """`!%p`: a negated predicate source."""

    reg: Reg


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple["Operand", ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """`%r|%p`: two results of one instruction."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`."""

    base: Reg | Symbol | Imm
    offset: int


@dataclass(frozen=True, slots=True)
class TensorAddress:
    """`[map, {c0, c1, ...}]`, and further vectors (im2col offsets) if there are any."""

    base: Address
    vectors: tuple[Vector, ...]


Operand = Reg | Imm | Special | Symbol | Label | Sink | Not | Vector | Pair | Address | TensorAddress


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        op: the full opcode, e.g. `mbarrier.try_wait.parity.shared.b64`.
        parts: `op` split at its dots.
        operands: in the order written.
        guard: predicate register of `@%p`, or None.
        guard_negated: True for `@!%p`.
        line: 1-based line in the PTX text.
        source: (file, line) of the newest `.loc` before it, or None.
        text: the statement as written, one line.
    """

    op: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None
    guard_negated: bool
    line: int
    source: tuple[str, int] | None
    text: str


@dataclass(frozen=True, slots=True)
class Param:
    """A kernel parameter and its place in the parameter block."""

    name: str
    num_bytes: int
    align: int
    offset: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A `.shared`, `.global`, `.const` or `.local` variable; num_bytes 0 stands for `name[]` (dynamic shared memory)."""

    name: str
    space: str
    num_bytes: int
    align: int
    init: bytes = b""


@dataclass
class Kernel:
    """An entry: parameters, performance directives, registers, instructions, labels."""

    name: str
    params: tuple[Param, ...] = ()
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    registers: list[Reg] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)

    @property
    def reqntid(self) -> tuple[int, ...] | None:
        """`.reqntid`, if given."""
        return self.directives.get("reqntid")

    @property
    def reqnctapercluster(self) -> tuple[int, ...] | None:
        """`.reqnctapercluster`, if given."""
        return self.directives.get("reqnctapercluster")


@dataclass
class Module:
    """A PTX file."""

    version: tuple[int, int]
    target: str
    kernels: dict[str, Kernel]
    variables: dict[str, Variable]
    files: dict[int, str]


_NAME = r"[%$\w]+(?:\.[xyzw])?"
_LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyzw]$"
    r"|%(laneid|warpid|nwarpid|smid|nsmid|gridid|cluster_ctarank|cluster_nctarank|is_explicit_cluster|clock|clock_hi|"
    r"clock64|globaltimer|globaltimer_lo|globaltimer_hi|lanemask_(?:eq|le|lt|ge|gt)|dynamic_smem_size|total_smem_size|"
    r"aggr_smem_size|current_graph_exec|envreg\d+|pm\d+)$|WARP_SZ$"
)
_IMM = re.compile(
    r"[-+]?(?:0[xX][0-9a-fA-F]+[uU]?|0[bB][01]+|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d[\d.eE+-]*[uU]?|\.\d+)$"
)
_REG_DECL = re.compile(r"\.reg\s+(?:\.v([248])\s+)?\.(\w+)\s+(.*)", re.S)
_VAR_DECL = re.compile(
    r"(?P<link>(?:\.(?:extern|visible|weak|common)\s+)*)\.(?P<space>shared|global|const|local)(?:::cta)?\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$%]+)(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.S,
)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align0>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s*(?:\.(?!align)\w+\s*)*(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[A-Za-z_$%][\w$%]*)\s*(?:\[(?P<count>\d+)\])?\s*$"
)


def type_bits(name: str) -> int:
    """Bits of a PTX type such as `b32`, `f16x2` or `pred`."""
    if name == "pred":
        return 1
    match = re.match(r"[a-z]+(\d+)(?:x(\d+))?$", name)
    if not match:
        raise Unsupported(f"PTX type .{name} is not known")
    return int(match[1]) * int(match[2] or 1)


class _Text:
    """The text without comments, and line numbers for offsets."""

    def __init__(self, text: str) -> None:
        def blank(match: re.Match[str]) -> str:
            return re.sub(r"[^\n]", " ", match[0])

        self.text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)
        self._starts = [0, *(match.end() for match in re.finditer("\n", self.text))]

    def line(self, offset: int) -> int:
        return bisect.bisect_right(self._starts, offset)


class _Body:
    """State while one entry's body is read."""

    def __init__(self, kernel: Kernel, files: dict[int, str]) -> None:
        self.kernel = kernel
        self.files = files
        self.scopes: list[dict[str, Any]] = [{}]
        self.labels: list[dict[str, str]] = [{}]
        self.source: tuple[int, int] | None = None

    def declare(self, type_name: str, names: str, lanes: int = 0) -> None:
        width = type_bits(type_name)
        for item in names.replace("\n", " ").split(","):
            match = re.match(r"\s*([%$\w.]+)\s*(?:<(\d+)>)?\s*$", item)
            if not match:
                raise Unsupported(f"register declaration {item.strip()!r} is not understood")
            stem = match[1]
            spelled = [f"{stem}{i}" for i in range(int(match[2]))] if match[2] else [stem]
            if lanes:
                # `.reg .v4 .s32 a` is a.x, a.y, a.z, a.w, and `a` all of them.
                for name in spelled:
                    self.declare(type_name, ",".join(f"{name}.{letter}" for letter in "xyzwabcd"[:lanes]))
                    self.scopes[-1][name] = Vector(
                        tuple(self.scopes[-1][f"{name}.{letter}"] for letter in "xyzwabcd"[:lanes])
                    )
                continue
            for name in spelled:
                reg = Reg(name, width, len(self.kernel.registers))
                self.kernel.registers.append(reg)
                self.scopes[-1][name] = reg


def _split(text: str) -> list[str]:
    """Splits at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    if tail or parts:
        parts.append(tail)
    return parts


class _Operands:
    """Turns operand text into objects within the scopes of a statement."""

    def __init__(self, scopes: tuple[dict[str, Any], ...], labels: tuple[dict[str, str], ...], where: str) -> None:
        self.scopes, self.labels, self.where = scopes, labels, where

    def name(self, text: str) -> Operand:
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        for names in reversed(self.labels):
            if text in names:
                return Label(names[text])
        if _SPECIAL.match(text):
            return Special(text)
        if text.startswith("%"):
            raise Unsupported(f"{self.where}: register {text} is not declared")
        return Symbol(text)

    def parse(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self.parse(item) for item in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if text.startswith("("):
            return Vector(tuple(self.parse(item) for item in _split(text[1:-1])))
        if text.startswith("!"):
            inner = self.parse(text[1:].strip())
            if not isinstance(inner, Reg):
                raise Unsupported(f"{self.where}: {text} negates something that is not a predicate register")
            return Not(inner)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.parse(first.strip()), self.parse(second.strip()))
        if _IMM.match(text):
            return Imm(text)
        if "+" in text or "-" in text[1:]:
            return self._sum(text)
        return self.name(text)

    def _sum(self, text: str) -> Address:
        match = re.match(r"([%$\w]+)\s*([+-])\s*([-+]?\w+)$", text)
        if not match:
            raise Unsupported(f"{self.where}: operand {text!r} is not understood")
        base = self.name(match[1])
        offset = Imm(match[3]).integer() * (-1 if match[2] == "-" else 1)
        if not isinstance(base, Reg | Symbol):
            raise Unsupported(f"{self.where}: operand {text!r} has an address base that is not a register or variable")
        return Address(base, offset)

    def _address(self, text: str) -> Operand:
        parts = _split(text)
        first = parts[0]
        if _IMM.match(first):
            base = Address(Imm(first), 0)
        elif re.match(r"[%$\w]+$", first):
            name = self.name(first)
            if not isinstance(name, Reg | Symbol):
                raise Unsupported(f"{self.where}: [{text}] has a base that is not a register or variable")
            base = Address(name, 0)
        else:
            base = self._sum(first)
        if len(parts) == 1:
            return base
        vectors = tuple(self.parse(part) for part in parts[1:])
        if not all(isinstance(vector, Vector) for vector in vectors):
            raise Unsupported(f"{self.where}: tensor address [{text}] is not understood")
        return TensorAddress(base, vectors)  # type: ignore[arg-type]


_GUARD = re.compile(r"@(!?)\s*([%$\w.]+)\s+")


def _instruction(
    statement: str,
    line: int,
    scopes: tuple[dict[str, Any], ...],
    labels: tuple[dict[str, str], ...],
    source: tuple[str, int] | None,
) -> Instruction:
    text = " ".join(statement.split())
    operands = _Operands(scopes, labels, f"PTX line {line}: {text}")
    guard, negated = None, False
    match = _GUARD.match(text)
    rest = text
    if match:
        reg = operands.name(match[2])
        if not isinstance(reg, Reg):
            raise Unsupported(f"PTX line {line}: guard {match[2]} is not a register")
        guard, negated, rest = reg, match[1] == "!", text[match.end() :]
    op, _, tail = rest.partition(" ")
    parsed = tuple(operands.parse(item) for item in _split(tail))
    return Instruction(op, tuple(op.split(".")), parsed, guard, negated, line, source, text)


def _read_body(text: _Text, start: int, kernel: Kernel, files: dict[int, str]) -> int:
    """Reads a body that starts behind its `{`; returns the offset behind its `}`."""
    body = _Body(kernel, files)
    raw, position, serial = text.text, start, 0
    statements: list[
        tuple[str, int, tuple[dict[str, Any], ...], tuple[dict[str, str], ...], tuple[int, int] | None]
    ] = []
    loc = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n]*")
    while True:
        position = re.compile(r"\s*").match(raw, position).end()  # type: ignore[union-attr]
        if raw[position] == "{":
            body.scopes.append({})
            body.labels.append({})
            position += 1
        elif raw[position] == "}":
            body.scopes.pop()
            body.labels.pop()
            position += 1
            if not body.scopes:
                break
        elif match := loc.match(raw, position):
            body.source = (int(match[1]), int(match[2]))
            position = match.end()
        elif match := _LABEL.match(raw, position):
            position = match.end()
            targets = re.compile(r"\s*\.branchtargets\s+([^;]*);").match(raw, position)
            serial += 1
            unique = match[1] if len(body.labels) == 1 else f"{match[1]}#{serial}"
            body.labels[-1][match[1]] = unique
            if targets:
                kernel.tables[unique] = tuple(item.strip() for item in targets[1].split(","))
                position = targets.end()
            else:
                kernel.labels[unique] = len(statements)
        else:
            end = raw.index(";", position)
            statement, line = raw[position:end].strip(), text.line(position)
            position = end + 1
            if statement.startswith(".reg"):
                match = _REG_DECL.match(statement)
                assert match, statement
                body.declare(match[2], match[3], int(match[1] or 0))
            elif match := _VAR_DECL.match(statement):
                variable = _variable(match)
                kernel.variables[variable.name] = variable
            elif statement.startswith(".pragma") or not statement:
                pass
            elif statement.startswith("."):
                raise Unsupported(f"PTX line {line}: directive {statement.split()[0]} is not known inside a body")
            else:
                # Inner scopes die before forward labels are known: keep the live dictionaries, not copies.
                statements.append((statement, line, tuple(body.scopes), tuple(body.labels), body.source))
    for statement, line, scopes, labels, source in statements:
        named = (files[source[0]], source[1]) if source and source[1] and source[0] in files else None
        kernel.instructions.append(_instruction(statement, line, scopes, labels, named))
    return position


def _variable(match: re.Match[str]) -> Variable:
    element = type_bits(match["type"]) // 8
    dims = [int(d) if d else 0 for d in re.findall(r"\[(\d*)\]", match["dims"] or "")]
    count = 1
    for dim in dims:
        count *= dim
    init = b""
    if match["init"]:
        values = re.findall(r"[-+]?\w+", match["init"])
        init = b"".join(Imm(value).bits(element * 8).to_bytes(element, "little") for value in values)
    return Variable(match["name"], match["space"], element * count, int(match["align"] or element), init)


def _params(text: str) -> tuple[Param, ...]:
    params, offset = [], 0
    for item in _split(" ".join(text.split())):
        match = _PARAM.match(item)
        if not match:
            raise Unsupported(f"parameter {item!r} is not understood")
        element = type_bits(match["type"]) // 8
        size = element * int(match["count"] or 1)
        align = int(match["align0"] or element)
        offset = -(-offset // align) * align
        params.append(Param(match["name"], size, align, offset))
        offset += size
    return tuple(params)


_ENTRY = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.entry\s+([\w$%]+)\s*(?:\(([^)]*)\))?", re.S)
_DIRECTIVE = re.compile(
    r"\s*\.(maxntid|reqntid|minnctapersm|maxnctapersm|maxnreg|reqnctapercluster|maxclusterrank|explicitcluster|"
    r"blocksareclusters|noreturn)\b\s*((?:\d+\s*,?\s*)*)"
)


def parse(text: str) -> Module:
    """Parses a PTX file.

    Args:
        text: the file.

    Returns:
        The module. Device functions (`.func`) are not read: a call of one is an error when it is reached.

    Raises:
        Unsupported: syntax that is not known here.
    """
    clean = _Text(text)
    raw = clean.text
    version = re.search(r"\.version\s+(\d+)\.(\d+)", raw)
    target = re.search(r"\.target\s+(\w+)", raw)
    if not version or not target:
        raise Unsupported("no .version and .target found: this is not a PTX file")
    files = {int(m[1]): m[2] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', raw)}
    module = Module((int(version[1]), int(version[2])), target[1], {}, {}, files)
    outer = raw
    for match in _ENTRY.finditer(raw):
        kernel = Kernel(match[1], _params(match[2] or ""))
        position = match.end()
        while directive := _DIRECTIVE.match(raw, position):
            numbers = tuple(int(n) for n in re.findall(r"\d+", directive[2]))
            kernel.directives[directive[1]] = numbers
            position = directive.end()
        rest = re.compile(r"\s*([{;])").match(raw, position)
        if not rest:
            raise Unsupported(f"PTX line {clean.line(position)}: unknown text between entry {match[1]} and its body")
        if rest[1] == ";":
            continue
        end = _read_body(clean, rest.end(), kernel, files)
        module.kernels[kernel.name] = kernel
        outer = outer[: match.start()] + re.sub(r"[^\n]", " ", outer[match.start() : end]) + outer[end:]
    outer = re.sub(r"\.section\s+\S+\s*\{[^}]*\}", "", outer)
    for statement in outer.split(";"):
        found = _VAR_DECL.match(statement.strip().split("\n\n")[-1].strip()) or _VAR_DECL.search(statement)
        if found:
            variable = _variable(found)
            module.variables[variable.name] = variable
    return module
