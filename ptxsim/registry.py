"""Opcode -> decoder. A decoder reads one instruction's modifiers once and returns what runs each time it executes.

The contract between decoders and the code generator:

* `Pure`: results depend on the source values alone. `fn(*values)` computes; `inline`, if given, is the same in Python
  statements, pasted into the generated code (`{d}` is the result, `{0}`, `{1}`, ... the sources).
* `Effect`: reads or writes anything else. `run(w, mask, *values)` is called with the warp, the mask of the lanes that execute
  (never 0) and the source values; it returns the result (a tuple if there are several; None if there is none) or BLOCK.

A decoder raises Unsupported for every modifier that it does not know: `Reader` makes that the easy way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ptxsim.findings import Unsupported
from ptxsim.ptx import Instruction, Operand


class _Block:
    """The type of BLOCK."""

    def __repr__(self) -> str:
        return "BLOCK"


# Returned by an effect that cannot finish: the path sleeps (it called w.block) and the instruction runs again when woken.
BLOCK = _Block()


@dataclass(frozen=True, slots=True)
class Source:
    """A source operand; `width` is the bits that a literal is cut to (1: predicate)."""

    operand: Operand
    width: int = 32


@dataclass(frozen=True, slots=True)
class Pure:
    """Register arithmetic."""

    fn: Callable[..., Any]
    dsts: tuple[Operand, ...]
    srcs: tuple[Source, ...]
    inline: str | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """Anything that touches more than registers.

    Attributes:
        run: `run(w, mask, *values)`.
        dsts: operands written, in the order of the results; a Vector takes a list, a Pair two results.
        srcs: operands read. A Vector gives a list, an Address its sum, a TensorAddress (address, [list, ...]), a predicate a
            lane mask.
        blocks: may return BLOCK.
        aligned: all lanes of the warp that have not exited must execute it together; anything else is a finding.
    """

    run: Callable[..., Any]
    dsts: tuple[Operand, ...] = ()
    srcs: tuple[Source, ...] = ()
    blocks: bool = False
    aligned: bool = False


Decoder = Callable[[Instruction], Pure | Effect]
_DECODERS: dict[tuple[str, ...], Decoder] = {}


def decoder(*opcodes: str) -> Callable[[Decoder], Decoder]:
    """Registers a decoder for opcodes that start with the given dotted prefixes; the longest prefix wins."""

    def wrap(function: Decoder) -> Decoder:
        for opcode in opcodes:
            key = tuple(opcode.split("."))
            if key in _DECODERS:
                raise ValueError(f"two decoders for {opcode}: {_DECODERS[key].__name__} and {function.__name__}")
            _DECODERS[key] = function
        return function

    return wrap


def find(parts: Sequence[str]) -> Decoder | None:
    """The decoder with the longest matching prefix, or None."""
    for length in range(len(parts), 0, -1):
        if found := _DECODERS.get(tuple(parts[:length])):
            return found
    return None


def decode(ins: Instruction) -> Pure | Effect:
    """Decodes one instruction.

    Raises:
        Unsupported: nobody knows the opcode, one of its modifiers or its operands.
    """
    found = find(ins.parts)
    if found is None:
        raise Unsupported(f"PTX line {ins.line}: opcode {ins.op} is not known ({ins.text})")
    return found(ins)


class Reader:
    """Reads an opcode's modifiers in order; what nobody took is an error.

    >>> r = Reader(ins, skip=1)          # behind the base opcode
    >>> r.one_of("shared::cta", "shared", default="generic")
    >>> r.end()
    """

    def __init__(self, ins: Instruction, skip: int = 1) -> None:
        self.ins = ins
        self._rest = list(ins.parts[skip:])

    def peek(self) -> str | None:
        """The next modifier, or None."""
        return self._rest[0] if self._rest else None

    def take(self, name: str) -> bool:
        """True and one step on if the next modifier is `name`."""
        if self._rest and self._rest[0] == name:
            self._rest.pop(0)
            return True
        return False

    def one_of(self, *names: str, default: str | None = None) -> str:
        """The next modifier if it is among `names`; else `default`, or an error without one."""
        if self._rest and self._rest[0] in names:
            return self._rest.pop(0)
        if default is None:
            raise Unsupported(
                f"{self.where}: expected one of {', '.join(names)} at {'.'.join(self._rest) or 'its end'!r}"
            )
        return default

    def pop(self) -> str:
        """The next modifier, whatever it is."""
        if not self._rest:
            raise Unsupported(f"{self.where}: a modifier is missing")
        return self._rest.pop(0)

    def end(self, operands: int | None = None) -> None:
        """Checks that all modifiers were read and, if given, the number of operands."""
        if self._rest:
            raise Unsupported(f"{self.where}: modifier .{self._rest[0]} is not known here")
        if operands is not None and len(self.ins.operands) != operands:
            raise Unsupported(f"{self.where}: {len(self.ins.operands)} operands found, {operands} expected")

    @property
    def where(self) -> str:
        """Line and text, for messages."""
        return f"PTX line {self.ins.line}: {self.ins.text}"
