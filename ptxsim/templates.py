"""Inline templates: register arithmetic as Python expressions, used both as functions and pasted into generated code.

An expression names its sources `{0}`, `{1}`, ... and may call the helpers registered here. NumPy's rule that a Python int
takes the type of the array beside it makes most expressions right for `int` and array sources alike, unsigned wrap included.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim import values
from ptxsim.findings import Unsupported
from ptxsim.ptx import Imm, Instruction, Not, Operand, Pair, Reg, Sink, Vector
from ptxsim.registry import Pure, Source

# What an expression may name.
NAMES: dict[str, Any] = {name: item for name, item in vars(values).items() if not name.startswith("__")} | {"np": np}


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function callable from expressions under its own name."""
    NAMES[function.__name__] = function
    return function


@functools.cache
def function_of(expression: str, count: int) -> Callable[..., Any]:
    """The expression as a function of `count` sources; its globals are NAMES."""
    names = [f"a{i}" for i in range(count)]
    return eval(f"lambda {', '.join(names)}: {expression.format(*names)}", NAMES)


def pure(expression: str, dsts: tuple[Operand, ...], srcs: tuple[Source, ...]) -> Pure:
    """A Pure that computes an expression."""
    return Pure(function_of(expression, len(srcs)), dsts, srcs, "{d} = " + expression)


def all_int(srcs: tuple[Source, ...]) -> str:
    """An expression that is true when every source is an int; literals need no look."""
    tests = {
        source.operand: f"({{{i}}}).__class__ is int"
        for i, source in enumerate(srcs)
        if not isinstance(source.operand, Imm)
    }
    return " and ".join(tests.values()) or "True"


def guarded(fast: str, slow: str, srcs: tuple[Source, ...]) -> str:
    """`fast` when every source is an int, else `slow`."""
    return f"({fast}) if {all_int(srcs)} else {slow}"


def literal(operand: Operand, width: int) -> int | None:
    """The unsigned bits of a literal operand; None for anything else."""
    return operand.bits(width) if isinstance(operand, Imm) else None


def sources(ins: Instruction, first: int, *widths: int) -> tuple[Source, ...]:
    """Operands from number `first` on, as sources of the given widths."""
    return tuple(Source(ins.operands[first + i], width) for i, width in enumerate(widths))


def register(ins: Instruction, number: int = 0) -> Reg:
    """The destination register.

    Raises:
        Unsupported: the operand is something else.
    """
    operand = ins.operands[number]
    if not isinstance(operand, Reg):
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: operand {number} must be a register")
    return operand


def flat(operand: Operand) -> tuple[Operand, ...]:
    """The items of a vector or pair; anything else alone."""
    if isinstance(operand, Vector):
        return operand.items
    if isinstance(operand, Pair):
        return operand.first, operand.second
    return (operand,)


def wanted(operand: Operand) -> tuple[Reg | Not, ...]:
    """Items of a destination that are not sinks."""
    return tuple(item for item in flat(operand) if not isinstance(item, Sink))  # type: ignore[misc]
