"""Runs one instruction's handler in every form that generated code uses, against a plain reference for a single lane."""

import itertools
import random
import re

import numpy as np

from ptxsim import ptx, semantics, values
from ptxsim.ptx import Imm
from ptxsim.registry import Effect, Pure, decode

assert semantics.__all__

KERNEL = """
.version 9.0
.target sm_100a
.address_size 64
.visible .entry k()
{
.reg .pred %p<8>;
.reg .b8 %b<8>;
.reg .b16 %rs<8>;
.reg .b32 %r<8>;
.reg .b64 %rd<8>;
.reg .b128 %q<4>;
TEXT
ret;
}
"""


def instruction(text):
    kernel = ptx.parse(KERNEL.replace("TEXT", text.rstrip(";") + ";")).kernels["k"]
    assert len(kernel.instructions) == 2
    return kernel.instructions[0]


def decoded(text):
    return decode(instruction(text))


def to_value(column, width):
    """32 numbers of one source as the register value; one number as a uniform one."""
    if width == 1:
        if isinstance(column, int):
            return values.FULL if column else 0
        return sum(bool(flag) << i for i, flag in enumerate(column))
    if isinstance(column, int):
        return column
    return np.array(column, np.uint64 if width == 64 else np.uint32)


def from_value(value, width):
    """A result as 32 numbers, after checks of its form."""
    if width == 1:
        assert type(value) is int, type(value)
        assert 0 <= value <= values.FULL
        return [value >> i & 1 for i in range(32)]
    if width == 128:
        assert type(value) is tuple
        low, high = (from_value(item, 64) for item in value)
        return [a | b << 64 for a, b in zip(low, high, strict=True)]
    if type(value) is int:
        assert 0 <= value < 1 << width, hex(value)
        return [value] * 32
    assert isinstance(value, np.ndarray), type(value)
    assert value.shape == (32,)
    assert value.dtype == (np.uint64 if width == 64 else np.uint32), value.dtype
    out = [int(item) for item in value]
    assert max(out) < 1 << width, hex(max(out))
    return out


def inline_call(item):
    """The inline template as a function, with the names that generated code gives it."""
    namespace = {k: v for k, v in vars(values).items() if not k.startswith("__")} | {"np": np}
    module = item.fn.__globals__
    for word in re.findall(r"\b[A-Za-z_]\w*\b", item.inline):
        if word in module:
            namespace[word] = module[word]
    names = [str(s.operand.bits(s.width)) if isinstance(s.operand, Imm) else f"a{i}" for i, s in enumerate(item.srcs)]
    arguments = ", ".join(f"a{i}" for i in range(len(item.srcs)))
    lines = "\n".join("    " + line for line in item.inline.format(*names, d="d").split("\n"))
    exec(f"def f({arguments}):\n{lines}\n    return d", namespace)
    return namespace["f"]


def check(text, reference, *columns, ints=24):
    """Compares a register instruction with a reference.

    Args:
        text: the instruction; literals are sources like any other.
        reference: numbers of one lane (bool for a predicate) -> result or tuple of results.
        columns: for each source that is not a literal the test numbers, all of the same length.
        ints: how many of the tests also run with uniform sources.
    """
    item = decoded(text)
    assert isinstance(item, Pure), text
    widths = [s.width for s in item.srcs]
    given = iter(columns)
    sources = [
        [s.operand.bits(s.width)] * len(columns[0]) if isinstance(s.operand, Imm) else list(next(given))
        for s in item.srcs
    ]
    assert next(given, None) is None, "more columns than sources"
    forms = [item.fn] + ([inline_call(item)] if item.inline else [])
    out_widths = [dst.width for dst in item.dsts]
    count = len(columns[0])

    def run(args, expected, chosen):
        for form, function in enumerate(forms):
            result = function(*(to_value(arg, width) for arg, width in zip(args, widths, strict=True)))
            results = result if len(out_widths) > 1 else (result,)
            assert len(results) == len(out_widths)
            for number, (got, width) in enumerate(zip(results, out_widths, strict=True)):
                if all(isinstance(arg, int) for arg in args) and width != 128:
                    assert type(got) is int, (text, type(got))
                for i, (mine, row) in enumerate(zip(from_value(got, width), expected, strict=True)):
                    want = int(row[number] if isinstance(row, tuple) else row)
                    sources_there = [hex(arg if isinstance(arg, int) else arg[i]) for arg in args]
                    where = f"{text}: form {form}, {chosen}, result {number}: {sources_there}"
                    assert mine == want, f"{where}: {mine:#x}, expected {want:#x}"

    def expect(args):
        rows = zip(*(([arg] * 32 if isinstance(arg, int) else arg) for arg in args), strict=True) if args else [()] * 32
        memo = {}
        out = []
        for row in rows:
            if row not in memo:
                memo[row] = reference(*row)
            out.append(memo[row])
        return out

    literal = [isinstance(s.operand, Imm) for s in item.srcs]
    picked = random.Random(text)
    for start in range(0, count, 32):
        index = [(start + i) % count for i in range(32)]
        lanes = [
            column[index[0]] if fixed else [column[i] for i in index]
            for column, fixed in zip(sources, literal, strict=True)
        ]
        uniform = [column[picked.choice(index)] for column in sources]
        patterns = [(False,) * len(sources)]
        if start == 0:
            patterns = list(itertools.product((False, True), repeat=len(sources)))
        for pattern in patterns:
            if any(fixed and flag for fixed, flag in zip(literal, pattern, strict=True)) or (all(pattern) and pattern):
                continue
            args = [uniform[i] if flag else lanes[i] for i, flag in enumerate(pattern)]
            run(args, expect(args), pattern)
    for i in picked.sample(range(count), min(ints, count)):
        args = [column[i] for column in sources]
        run(args, expect(args), "uniform")


SPECIALS = {
    1: [0, 1],
    8: [0, 1, 0x7F, 0x80, 0xFF, 0x55],
    16: [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF],
    32: [0, 1, 2, 31, 32, 33, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF],
    64: [0, 1, 63, 64, 1 << 31, 1 << 32, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, (1 << 64) - 1],
}


def numbers(width, count=96, seed=0):
    """Special and random numbers of a width, of all magnitudes."""
    source = random.Random(f"{width} {seed}")
    out = SPECIALS[width][:]
    source.shuffle(out)
    while len(out) < count:
        out.append(source.getrandbits(width) >> source.choice((0, 0, source.randrange(width))))
    return out[:count]


def pairs(*widths, count=96):
    """A column of test numbers for each width; all pairs of specials come first as far as they fit."""
    columns = [numbers(width, count, seed) for seed, width in enumerate(widths)]
    source = random.Random(str(widths))
    for column in columns[1:]:
        source.shuffle(column)
    return columns


class FakeWarp:
    """What warp operations need of a warp."""

    def __init__(self, active=values.FULL):
        self.active = active
        self.state = {}
        self.findings = []

    def found(self, code, message, fatal=False):
        self.findings.append((code, message, fatal))
        if fatal:
            raise Fatal(code, message)


class Fatal(Exception):
    """Stands for the end of a run."""


def effect(text):
    item = decoded(text)
    assert isinstance(item, Effect), text
    return item
