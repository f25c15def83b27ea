"""Comparisons and selections: setp, set, selp, slct, testp.

Source: PTX ISA, "Comparison and Selection Instructions".
"""

import numpy as np

from ptxsim import floats
from ptxsim.findings import Unsupported
from ptxsim.lanes import INT_TYPES, flags_of
from ptxsim.ptx import Instruction, Operand
from ptxsim.registry import Pure, Reader, Source, decoder
from ptxsim.templates import flat, function_of, helper, pure, register, sources
from ptxsim.values import FULL, M32, Value, bools

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


_UNSIGNED_COMPARE = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def comparison(r: Reader, cmp: str, name: str, ftz: bool, srcs: tuple[Source, ...]) -> str:
    """An expression for a comparison: a bool for ints, an array of bools else."""
    if name in floats.TYPES:
        return floats.comparison(r, cmp, name, ftz)
    if name not in INT_TYPES or INT_TYPES[name][1] == 8 or ftz:
        raise Unsupported(f"{r.where}: type .{name}{' with .ftz' if ftz else ''} is not known here")
    kind, width = INT_TYPES[name]
    if kind == "b" and cmp not in ("eq", "ne"):
        raise Unsupported(f"{r.where}: .{cmp} does not go with .{name}")
    if cmp in _COMPARE:
        sign = f" ^ {1 << (width - 1)}" if kind == "s" and cmp not in ("eq", "ne") else ""
        return f"({{0}}{sign}) {_COMPARE[cmp]} ({{1}}{sign})" if sign else f"{{0}} {_COMPARE[cmp]} {{1}}"
    if cmp in _UNSIGNED_COMPARE and kind != "s":
        return f"{{0}} {_UNSIGNED_COMPARE[cmp]} {{1}}"
    raise Unsupported(f"{r.where}: comparison .{cmp} is not known here")


@decoder("setp")
def decode_setp(ins: Instruction) -> Pure:
    """`setp`: compares; `p|q` gets the result and its opposite, each combined with an optional predicate."""
    r = Reader(ins)
    cmp = r.pop()
    combine = r.one_of("and", "or", "xor", default="")
    ftz = r.take("ftz")
    name = r.pop()
    r.end(4 if combine else 3)
    width = _type_width(r, name)
    srcs = sources(ins, 1, width, width, *([1] if combine else []))
    test = comparison(r, cmp, name, ftz, srcs)
    dsts = flat(ins.operands[0])
    if name.endswith("x2"):
        return _packed_setp(r, test, combine, dsts, srcs)
    flags = f"({FULL} if _t else 0) if (_t := {test}).__class__ is bool else mask_of(_t)"
    symbol = {"and": "&", "or": "|", "xor": "^"}.get(combine, "")
    if len(dsts) == 1:
        return pure(f"({flags}) {symbol} {{2}}" if combine else flags, dsts, srcs)
    compare = function_of(flags, 2)

    def fn(a: Value, b: Value, c: int = 0) -> tuple[int, int]:
        p = compare(a, b)
        q = p ^ FULL
        if combine == "and":
            return p & c, q & c
        if combine == "or":
            return p | c, q | c
        return (p ^ c, q ^ c) if combine else (p, q)

    return Pure(fn, dsts, srcs)


def _packed_setp(r: Reader, test: str, combine: str, dsts: tuple[Operand, ...], srcs: tuple[Source, ...]) -> Pure:
    """Two halves compared: p for the low one, q for the high one."""
    if len(dsts) != 2:
        raise Unsupported(f"{r.where}: expected p|q")
    compare = function_of(test, 2)

    def fn(a: Value, b: Value, c: int = 0) -> tuple[int, ...]:
        both = compare(a, b)
        flags = [flags_of(both[:, i]) if len(both) > 1 else FULL if both[0, i] else 0 for i in range(2)]
        if combine == "and":
            flags = [flag & c for flag in flags]
        elif combine == "or":
            flags = [flag | c for flag in flags]
        elif combine == "xor":
            flags = [flag ^ c for flag in flags]
        return tuple(flags)

    return Pure(fn, dsts, srcs)


def _type_width(r: Reader, name: str) -> int:
    if name in INT_TYPES:
        return INT_TYPES[name][1]
    if name in floats.TYPES:
        return floats.TYPES[name].bits
    raise Unsupported(f"{r.where}: type .{name} is not known here")


@decoder("set")
def decode_set(ins: Instruction) -> Pure:
    """`set`: a comparison's result as all ones or 1.0, else zero."""
    r = Reader(ins)
    cmp = r.pop()
    combine = r.one_of("and", "or", "xor", default="")
    ftz = r.take("ftz")
    dtype = r.one_of("u32", "s32", "f32", "u16", "s16", "f16", "bf16")
    name = r.pop()
    r.end(4 if combine else 3)
    width = _type_width(r, name)
    srcs = sources(ins, 1, width, width, *([1] if combine else []))
    test = comparison(r, cmp, name, ftz, srcs)
    if name.endswith("x2"):
        raise Unsupported(f"{r.where}: packed set is not known")
    yes = {"u32": M32, "s32": M32, "u16": 0xFFFF, "s16": 0xFFFF, "f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}[
        dtype
    ]
    flags = f"(({FULL} if _t else 0) if (_t := {test}).__class__ is bool else mask_of(_t))"
    symbol = {"and": "&", "or": "|", "xor": "^"}.get(combine, "")
    return pure(f"selected({yes}, 0, {flags} {symbol + ' {2}' if combine else ''})", (register(ins),), srcs)


@helper
def selected(a: Value, b: Value, mask: int) -> Value:
    """a in the lanes of a mask, b elsewhere."""
    if mask == FULL:
        return a
    if mask == 0:
        return b
    if a.__class__ is int and b.__class__ is int:
        if a == b:
            return a
        # Python ints make int64 here: quicker than np.where on NumPy scalars.
        return np.where(bools(mask), a, b).astype(np.uint32)
    return np.where(bools(mask), a, b)


@helper
def selected64(a: Value, b: Value, mask: int) -> Value:
    """The same for b64."""
    if mask == FULL:
        return a
    if mask == 0:
        return b
    return np.where(bools(mask), np.uint64(a) if a.__class__ is int else a, np.uint64(b) if b.__class__ is int else b)


@decoder("selp")
def decode_selp(ins: Instruction) -> Pure:
    """`selp`: one of two values by a predicate."""
    r = Reader(ins)
    name = r.pop()
    r.end(4)
    width = _type_width(r, name)
    srcs = sources(ins, 1, width, width, 1)
    slow = "selected64" if width == 64 else "selected"
    return pure(
        f"{{0}} if {{2}} == {FULL} else {{1}} if {{2}} == 0 else {slow}({{0}}, {{1}}, {{2}})", (register(ins),), srcs
    )


@decoder("slct")
def decode_slct(ins: Instruction) -> Pure:
    """`slct`: one of two values by the sign of a third (NaN counts as negative, -0.0 as zero)."""
    r = Reader(ins)
    ftz = r.take("ftz")
    name = r.pop()
    kind = r.one_of("s32", "f32")
    r.end(4)
    width = _type_width(r, name)
    srcs = sources(ins, 1, width, width, 32)
    if ftz and kind != "f32":
        raise Unsupported(f"{r.where}: .ftz is for .f32")
    # Subnormal negative numbers count as -0.0 with .ftz.
    limit = 0x80800000 if ftz else 0x80000001
    nonnegative = f"(_t <= 2139095040) | (_t >= 2147483648) & (_t < {limit})"
    test = nonnegative if kind == "f32" else "_t < 2147483648"
    flags = f"({FULL} if _t else 0) if (_t := {test.replace('_t', '{2}')}).__class__ is bool else mask_of(_t)"
    slow = "selected64" if width == 64 else "selected"
    return pure(f"{slow}({{0}}, {{1}}, {flags})", (register(ins),), srcs)


@decoder("testp")
def decode_testp(ins: Instruction) -> Pure:
    """`testp`: the class of a floating-point number."""
    return floats.decode_testp(ins)
