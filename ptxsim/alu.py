"""Integer, logic, move and compare instructions.

Source: PTX ISA, sections "Integer Arithmetic", "Extended-Precision Integer Arithmetic", "Comparison and Selection", "Logic and
Shift", "Data Movement and Conversion". Not pinned by silicon: the results of a division by zero (all ones; the remainder is the
dividend).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim import floats
from ptxsim.findings import Unsupported
from ptxsim.ptx import Imm, Instruction, Operand, Pair, Reg, Vector
from ptxsim.registry import Effect, Pure, Reader, Source, decoder
from ptxsim.templates import flat, function_of, guarded, helper, literal, pure, register, sources, wanted
from ptxsim.values import FULL, M32, M64, Value, bools, lanes32, lanes64, mask_of, signed64

_INT_TYPES = {f"{kind}{width}": (kind, width) for kind in "bus" for width in (8, 16, 32, 64)}
_SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}


def is_float(ins: Instruction) -> bool:
    """True if an arithmetic opcode works on floating-point types."""
    return any(part in floats.TYPES for part in ins.parts[1:])


def _int_type(r: Reader, kinds: str = "bus", widths: tuple[int, ...] = (16, 32, 64)) -> tuple[bool, int]:
    """Reads an integer type: (signed, width)."""
    names = [f"{kind}{width}" for kind in kinds for width in widths]
    kind, width = _INT_TYPES[r.one_of(*names)]
    return kind == "s", width


def _mask(width: int) -> int:
    return (1 << width) - 1


def _as_int(expression: str, width: int) -> str:
    """An int's bits read as two's complement, as Python expression."""
    sign = 1 << (width - 1)
    return f"(({expression} ^ {sign}) - {sign})"


def _dtype(width: int) -> Any:
    return np.uint64 if width == 64 else np.uint32


def _narrow(lanes: np.ndarray, width: int) -> Value:
    """Lanes of any integer type, cut to `width` bits in their register's representation."""
    if width == 64:
        return lanes.astype(np.uint64)
    return (lanes & np.array(_mask(width)).astype(lanes.dtype)).astype(np.uint32)


@helper
def wide_lanes(value: Value, width: int, signed: bool) -> np.ndarray:
    """Lanes as int64 (signed) or uint64."""
    return signed64(value, width) if signed else lanes64(value)


# --------------------------------------------------------------------------------------------------------------------- mov


@helper
def pack_halves(low: Value, high: Value) -> Value:
    """Two b32 values as one b64."""
    out = np.empty((32, 2), np.uint32)
    out[:, 0] = low
    out[:, 1] = high
    return out.view(np.uint64).reshape(32)


@helper
def pack_wide(width: int, *items: Value) -> Value:
    """Items of `width` bits as one b64, the first one lowest."""
    out = lanes64(items[0])
    for i, item in enumerate(items[1:], 1):
        out = out | lanes64(item) << np.uint64(i * width)
    return out


@helper
def low_half(value: Value) -> Value:
    """The low 32 bits of b64 lanes."""
    return value.astype(np.uint32)  # type: ignore[union-attr]


@helper
def high_half(value: Value) -> Value:
    """The high 32 bits of b64 lanes."""
    return (value >> 32).astype(np.uint32)  # type: ignore[union-attr,operator]


@helper
def widen(value: Value) -> Value:
    """uint32 lanes as uint64."""
    return value.astype(np.uint64)  # type: ignore[union-attr]


def _pack(ins: Instruction, width: int, dst: Reg, items: tuple[Operand, ...]) -> Pure:
    each = width // len(items)
    srcs = tuple(Source(item, each) for item in items)
    if width == 128:
        if len(items) == 2:
            return pure("({0}, {1})", (dst,), srcs)
        if len(items) == 4:
            return Pure(_pack128, (dst,), srcs)
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: a b128 has two or four items")
    joined = " | ".join(f"{{{i}}} << {i * each}" if i else "{0}" for i in range(len(items)))
    if width == 64:
        names = ", ".join(f"{{{i}}}" for i in range(len(items)))
        slow = f"pack_halves({names})" if each == 32 else f"pack_wide({each}, {names})"
        return pure(guarded(joined, slow, srcs), (dst,), srcs)
    return pure(joined, (dst,), srcs)


def _pack128(a: Value, b: Value, c: Value, d: Value) -> tuple[Value, Value]:
    def pair(low: Value, high: Value) -> Value:
        if low.__class__ is int and high.__class__ is int:
            return low | high << 32
        return pack_halves(low, high)

    return pair(a, b), pair(c, d)


def _piece(value: Any, width: int, each: int, number: int) -> Value:
    if width == 128:
        per = 64 // each
        value, number, width = value[number // per], number % per, 64
    if each == 64:
        return value
    if value.__class__ is int:
        return value >> number * each & _mask(each)
    return (value >> number * each & _mask(each)).astype(np.uint32)


@helper
def halves(value: Value) -> tuple[Value, Value]:
    """A b64 value as (low, high) b32."""
    if value.__class__ is int:
        return value & M32, value >> 32
    pair = value.view(np.uint32).reshape(32, 2)  # type: ignore[union-attr]
    return pair[:, 0].copy(), pair[:, 1].copy()


def _unpack(width: int, items: tuple[Operand, ...], src: Operand) -> Pure:
    each = width // len(items)
    kept = [(i, item) for i, item in enumerate(items) if item in wanted(Vector(items))]
    dsts, srcs = tuple(item for _, item in kept), (Source(src, width),)
    numbers = [i for i, _ in kept]
    if len(kept) == 1:
        number = numbers[0]
        if width == 64 and each == 32:
            fast, slow = ("{0} & 4294967295", "low_half({0})") if number == 0 else ("{0} >> 32", "high_half({0})")
            return pure(guarded(fast, slow, srcs), dsts, srcs)
        if width <= 32:
            return pure(f"{{0}} >> {number * each} & {_mask(each)}", dsts, srcs)
        return Pure(lambda value: _piece(value, width, each, number), dsts, srcs)
    if width == 64 and len(kept) == 2 == len(items):
        return Pure(halves, dsts, srcs)
    return Pure(lambda value: tuple(_piece(value, width, each, number) for number in numbers), dsts, srcs)


@decoder("mov")
def decode_mov(ins: Instruction) -> Pure:
    """`mov`: copies, packs, unpacks; predicates; addresses of variables."""
    r = Reader(ins)
    kind = r.pop()
    r.end(2)
    dst, src = ins.operands
    if kind == "pred":
        if isinstance(src, Imm):
            return pure(str(FULL if src.integer() else 0), (register(ins),), ())
        return pure("{0}", (register(ins),), (Source(src, 1),))
    if kind not in _INT_TYPES and kind not in ("f32", "f64", "b128", "f16", "bf16", "f16x2", "bf16x2"):
        raise Unsupported(f"{r.where}: type .{kind} is not known here")
    width = 128 if kind == "b128" else 32 if kind.endswith("x2") else int(kind.lstrip("bfus"))
    if isinstance(src, Vector) and isinstance(dst, Reg):
        return _pack(ins, width, dst, src.items)
    if isinstance(dst, Vector) and not isinstance(src, Vector):
        return _unpack(width, dst.items, src)
    return pure("{0}", (register(ins),), (Source(src, width),))


# -------------------------------------------------------------------------------------------------------------- arithmetic

_CARRY = "carry flag"


def _carry_in(w: Any) -> int:
    return w.state.get(_CARRY, 0)


def _carry_out(w: Any, mask: int, flags: Any) -> None:
    bits = mask_of(flags) if flags.__class__ is not bool else FULL if flags else 0
    w.state[_CARRY] = w.state.get(_CARRY, 0) & ~mask | bits & mask


def _carried(
    w: Any, mask: int, first: np.ndarray, second: np.ndarray, width: int, subtract: bool, use: bool, keep: bool
) -> Value:
    """first +- second +- carry, lanes of object type: Python's own integers never overflow."""
    carry = bools(_carry_in(w)).astype(object) * 1 if use else 0
    total = first - second - carry if subtract else first + second + carry
    wrapped = np.array([int(t) & _mask(width) for t in total], _dtype(width))
    if keep:
        _carry_out(w, mask, np.array([not 0 <= int(t) <= _mask(width) for t in total]))
    return wrapped


def _objects(value: Value) -> np.ndarray:
    return lanes64(value).astype(object)


def _extended(ins: Instruction, subtract: bool) -> Effect:
    """add.cc, addc, sub.cc, subc: the carry flag is one mask of the warp."""
    r = Reader(ins)
    keep = r.take("cc")
    _, width = _int_type(r, widths=(32, 64))
    r.end(3)
    use = ins.parts[0].endswith("c")

    def run(w: Any, mask: int, a: Value, b: Value) -> Value:
        return _carried(w, mask, _objects(a), _objects(b), width, subtract, use, keep)

    return Effect(run, (register(ins),), sources(ins, 1, width, width))


def _mad_extended(ins: Instruction) -> Effect:
    r = Reader(ins)
    high = r.one_of("lo", "hi") == "hi"
    keep = r.take("cc")
    signed, width = _int_type(r, widths=(32, 64))
    r.end(4)
    use = ins.parts[0] == "madc"

    def run(w: Any, mask: int, a: Value, b: Value, c: Value) -> Value:
        x, y = (wide_lanes(v, width, signed).astype(object) for v in (a, b))
        product = np.array([(int(p) >> width if high else int(p)) & _mask(width) for p in x * y], object)
        return _carried(w, mask, product, _objects(c), width, False, use, keep)

    return Effect(run, (register(ins),), sources(ins, 1, width, width, width))


decoder("addc")(lambda ins: _extended(ins, False))
decoder("subc")(lambda ins: _extended(ins, True))
decoder("madc")(_mad_extended)


@decoder("add", "sub")
def decode_add(ins: Instruction) -> Pure | Effect:
    """`add` and `sub`."""
    if is_float(ins):
        return floats.decode_arithmetic(ins)
    subtract = ins.parts[0] == "sub"
    if ins.parts[1] == "cc":
        return _extended(ins, subtract)
    r = Reader(ins)
    sat = r.take("sat")
    name = r.pop()
    r.end(3)
    symbol = "-" if subtract else "+"
    if name in ("s16x2", "u16x2") and not subtract and not sat:
        srcs = sources(ins, 1, 32, 32)
        low = "({0} & 65535) + ({1} & 65535) & 65535"
        return pure(f"({low}) | (({{0}} & 4294901760) + ({{1}} & 4294901760) & 4294901760)", (register(ins),), srcs)
    if name not in _INT_TYPES or _INT_TYPES[name][1] < 16 or name[0] == "b":
        raise Unsupported(f"{r.where}: type .{name} is not known here")
    width = _INT_TYPES[name][1]
    srcs = sources(ins, 1, width, width)
    if sat:
        if name != "s32":
            raise Unsupported(f"{r.where}: .sat is for .s32 alone")
        return Pure(lambda a, b: _saturated(a, b, subtract), (register(ins),), srcs)
    return pure(f"({{0}} {symbol} {{1}}) & {_mask(width)}", (register(ins),), srcs)


def _saturated(a: Value, b: Value, subtract: bool) -> Value:
    x, y = signed64(a, 32), signed64(b, 32)
    total = np.clip(x - y if subtract else x + y, -(1 << 31), (1 << 31) - 1)
    return _same_form(_narrow(total, 32), a, b)


def in_register_form(lanes: np.ndarray, width: int) -> Value:
    """64-bit lanes cut to a register of `width` bits; an int if there is only one lane."""
    cut = _narrow(lanes, width)
    return cut if len(cut) == 32 else int(cut[0])  # type: ignore[arg-type,index]


def _same_form(result: Value, *srcs: Value) -> Value:
    """An int if every source was one: then all lanes agree."""
    return int(result[0]) if all(src.__class__ is int for src in srcs) else result  # type: ignore[index]


def _by_lanes(compute: Callable[..., np.ndarray], width: int, signed: bool, result: int) -> Callable[..., Value]:
    """A function on int64/uint64 lanes (width bits read as signed or not) as one on register values."""

    def fn(*srcs: Value) -> Value:
        if all(src.__class__ is int for src in srcs):
            one = [
                np.array([_signed(src, width) if signed else src], np.int64 if signed else np.uint64) for src in srcs
            ]
            return int(_narrow(compute(*one), result)[0])  # type: ignore[index]
        return _narrow(compute(*(wide_lanes(src, width, signed) for src in srcs)), result)

    return fn


def _signed(value: Any, width: int) -> int:
    sign = 1 << (width - 1)
    return (value ^ sign) - sign


@helper
def mul_hi64(a: Value, b: Value, signed: bool) -> Value:
    """High 64 bits of 64-bit products, lane by lane."""
    x, y = wide_lanes(a, 64, signed), wide_lanes(b, 64, signed)
    return np.array([int(p) * int(q) >> 64 & M64 for p, q in zip(x, y, strict=True)], np.uint64)


@helper
def product_lanes(a: Value, b: Value, width: int, signed: bool) -> np.ndarray:
    """Full products of up to 32-bit lanes, in 64 bits."""
    return wide_lanes(a, width, signed) * wide_lanes(b, width, signed)


@helper
def narrowed(lanes: np.ndarray, width: int) -> Value:
    """64-bit lanes cut to a register of `width` bits."""
    return _narrow(lanes, width)


def _product(r: Reader, part: str, signed: bool, width: int, srcs: tuple[Source, ...]) -> tuple[str, str, int]:
    """Expressions for ints and for arrays of a product's wanted part, and the part's width; ints are not yet masked."""
    a, b = (_as_int("{0}", width), _as_int("{1}", width)) if signed else ("{0}", "{1}")
    if part == "wide":
        if width == 64:
            raise Unsupported(f"{r.where}: .wide is for 16 and 32 bits")
        return f"{a} * {b}", f"narrowed(product_lanes({{0}}, {{1}}, {width}, {signed}), {2 * width})", 2 * width
    if width == 64:
        return f"{a} * {b} >> 64", f"mul_hi64({{0}}, {{1}}, {signed})", 64
    return (
        f"{a} * {b} >> {width}",
        f"narrowed(product_lanes({{0}}, {{1}}, {width}, {signed}) >> {width}, {width})",
        width,
    )


@decoder("mul", "mad")
def decode_mul(ins: Instruction) -> Pure | Effect:
    """`mul` and `mad` in their .lo, .hi and .wide forms."""
    if is_float(ins):
        return floats.decode_arithmetic(ins)
    mad = ins.parts[0] == "mad"
    if mad and "cc" in ins.parts:
        return _mad_extended(ins)
    r = Reader(ins)
    part = r.one_of("lo", "hi", "wide")
    sat = r.take("sat")
    signed, width = _int_type(r, "us")
    r.end(4 if mad else 3)
    wide = 2 * width if part == "wide" else width
    srcs = sources(ins, 1, width, width, *([wide] if mad else []))
    if sat:
        if not (mad and part == "hi" and signed and width == 32):
            raise Unsupported(f"{r.where}: .sat is for mad.hi.s32 alone")

        def saturated(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            return np.clip((a * b >> 32) + c, -(1 << 31), (1 << 31) - 1)

        return Pure(_by_lanes(saturated, 32, True, 32), (register(ins),), srcs)
    if part == "lo":
        # The product of two ints is cut before it meets an array.
        expression = f"({{0}} * {{1}} & {_mask(width)}) + {{2}}" if mad else "{0} * {1}"
        return pure(f"({expression}) & {_mask(width)}", (register(ins),), srcs)
    fast, slow, result = _product(r, part, signed, width, srcs)
    if mad:
        fast, slow = f"({fast}) + {{2}}", f"{slow} + {{2}}"
        slow = f"({slow}) & {_mask(result)}"
    if mad or signed:
        fast = f"({fast}) & {_mask(result)}"
    return pure(guarded(fast, slow, srcs), (register(ins),), srcs)


@decoder("mul24", "mad24")
def decode_mul24(ins: Instruction) -> Pure:
    """`mul24` and `mad24`: products of 24-bit numbers."""
    mad = ins.parts[0] == "mad24"
    r = Reader(ins)
    high = r.one_of("lo", "hi") == "hi"
    sat = r.take("sat")
    signed, _ = _int_type(r, "us", (32,))
    r.end(4 if mad else 3)
    if sat and not (mad and high and signed):
        raise Unsupported(f"{r.where}: .sat is for mad24.hi.s32 alone")

    def compute(a: np.ndarray, b: np.ndarray, c: Any = 0) -> np.ndarray:
        kind = a.dtype.type
        forty = kind(40)
        total = ((a << forty) >> forty) * ((b << forty) >> forty)
        total = (total >> kind(16) if high else total & kind(M32)) + c
        return np.clip(total, -(1 << 31), (1 << 31) - 1) if sat else total

    return Pure(_by_lanes(compute, 32, signed, 32), (register(ins),), sources(ins, 1, *([32] * (3 if mad else 2))))


@decoder("sad")
def decode_sad(ins: Instruction) -> Pure:
    """`sad`: c + |a - b|."""
    r = Reader(ins)
    signed, width = _int_type(r, "us")
    r.end(4)

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return c + np.where(a < b, b - a, a - b)

    return Pure(_by_lanes(compute, width, signed, width), (register(ins),), sources(ins, 1, width, width, width))


def _divide(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    """Quotient or remainder, truncated towards zero; by zero: all ones, or the dividend."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype == np.uint64:
        quotient = a // safe
    else:
        negative = (a < 0) != (safe < 0)
        # Magnitudes as uint64: that of the most negative number is right there, too.
        magnitude = np.abs(a).astype(np.uint64) // np.abs(safe).astype(np.uint64)
        quotient = np.where(negative, -magnitude.astype(np.int64), magnitude.astype(np.int64))
    if remainder:
        return np.where(zero, a, a - quotient * safe)
    return np.where(zero, ~a.dtype.type(0), quotient)


@helper
def int_quotient(a: int, b: int, width: int, signed: bool, remainder: bool) -> int:
    """One quotient or remainder."""
    if signed:
        a, b = _signed(a, width), _signed(b, width)
    if b == 0:
        return (a if remainder else -1) & _mask(width)
    quotient = abs(a) // abs(b)
    if (a < 0) != (b < 0):
        quotient = -quotient
    return (a - quotient * b if remainder else quotient) & _mask(width)


@decoder("div", "rem")
def decode_div(ins: Instruction) -> Pure:
    """`div` and `rem`."""
    if is_float(ins):
        return floats.decode_arithmetic(ins)
    r = Reader(ins)
    signed, width = _int_type(r, "us")
    r.end(3)
    remainder = ins.parts[0] == "rem"
    slow = _by_lanes(lambda a, b: _divide(a, b, remainder), width, signed, width)

    def fn(a: Value, b: Value) -> Value:
        if a.__class__ is int and b.__class__ is int:
            return int_quotient(a, b, width, signed, remainder)  # type: ignore[arg-type]
        return slow(a, b)

    return Pure(fn, (register(ins),), sources(ins, 1, width, width))


@decoder("neg", "abs")
def decode_neg(ins: Instruction) -> Pure:
    """`neg` and `abs`."""
    if is_float(ins):
        return floats.decode_sign(ins)
    r = Reader(ins)
    _, width = _int_type(r, "s")
    r.end(2)
    srcs = sources(ins, 1, width)
    if ins.parts[0] == "neg":
        return pure(f"(0 - {{0}}) & {_mask(width)}", (register(ins),), srcs)
    fast = f"{{0}} if {{0}} < {1 << (width - 1)} else {1 << width} - {{0}}"
    slow = f"np.where({{0}} < {1 << (width - 1)}, {{0}}, (0 - {{0}}) & {_mask(width)})"
    return pure(guarded(f"({fast})", slow, srcs), (register(ins),), srcs)


@helper
def extreme(a: Value, b: Value, width: int, signed: bool, largest: bool) -> Value:
    """min or max of lanes."""
    pick = np.maximum if largest else np.minimum
    if signed:
        sign = 1 << (width - 1)
        return pick(a ^ sign, b ^ sign) ^ sign
    return pick(a, b)


@decoder("min", "max")
def decode_min(ins: Instruction) -> Pure:
    """`min` and `max`."""
    if is_float(ins):
        return floats.decode_extreme(ins)
    r = Reader(ins)
    relu = r.take("relu")
    name = r.pop()
    relu = r.take("relu") or relu
    r.end(3)
    largest = ins.parts[0] == "max"
    if name in ("s16x2", "u16x2"):
        if relu and name[0] == "u":
            raise Unsupported(f"{r.where}: .relu is for signed types")
        return Pure(_packed_extreme(name[0] == "s", largest, relu), (register(ins),), sources(ins, 1, 32, 32))
    if name not in _INT_TYPES or _INT_TYPES[name][1] < 16 or name[0] == "b" or (relu and name != "s32"):
        raise Unsupported(f"{r.where}: type .{name} is not known here")
    signed, width = name[0] == "s", _INT_TYPES[name][1]
    srcs = sources(ins, 1, width, width)
    sign = f" ^ {1 << (width - 1)}" if signed else ""
    fast = f"({{0}} if ({{0}}{sign}) {'>' if largest else '<'} ({{1}}{sign}) else {{1}})"
    slow = f"extreme({{0}}, {{1}}, {width}, {signed}, {largest})"
    if relu:
        slow = f"extreme(extreme({{0}}, {{1}}, 32, True, {largest}), 0, 32, True, True)"
        fast = f"max({_as_int(fast, 32)}, 0)"
    return pure(guarded(fast, slow, srcs), (register(ins),), srcs)


def _packed_extreme(signed: bool, largest: bool, relu: bool) -> Callable[[Value, Value], Value]:
    kind = np.int16 if signed else np.uint16

    def fn(a: Value, b: Value) -> Value:
        pick = np.maximum if largest else np.minimum
        result = pick(lanes32(a).view(kind), lanes32(b).view(kind))
        if relu:
            result = np.maximum(result, kind(0))
        return _same_form(result.view(np.uint32), a, b)

    return fn


# ------------------------------------------------------------------------------------------------------------------- logic


@decoder("and", "or", "xor")
def decode_logic(ins: Instruction) -> Pure:
    """`and`, `or`, `xor` on bits and predicates."""
    r = Reader(ins)
    name = r.one_of("pred", "b16", "b32", "b64")
    r.end(3)
    width = 1 if name == "pred" else int(name[1:])
    symbol = {"and": "&", "or": "|", "xor": "^"}[ins.parts[0]]
    return pure(f"{{0}} {symbol} {{1}}", (register(ins),), sources(ins, 1, width, width))


@decoder("not", "cnot")
def decode_not(ins: Instruction) -> Pure:
    """`not` (bits and predicates) and `cnot` (1 if zero, else 0)."""
    r = Reader(ins)
    cnot = ins.parts[0] == "cnot"
    name = r.one_of(*(() if cnot else ("pred",)), "b16", "b32", "b64")
    r.end(2)
    width = 1 if name == "pred" else int(name[1:])
    srcs = sources(ins, 1, width)
    if cnot:
        slow = f"({{0}} == 0).astype(np.uint{max(width, 32)})"
        return pure(guarded("1 if {0} == 0 else 0", slow, srcs), (register(ins),), srcs)
    return pure(f"{{0}} ^ {FULL if width == 1 else _mask(width)}", (register(ins),), srcs)


@helper
def shift_lanes(value: Value, amount: Value, width: int, left: bool, signed: bool) -> Value:
    """Shifts of lanes by any 32-bit amount: large ones shift everything out."""
    if signed and not left:
        count = np.minimum(amount, 63).astype(np.int64) if amount.__class__ is not int else np.int64(min(amount, 63))
        return _narrow(signed64(value, width) >> count, width)
    lanes = lanes64(value)
    count = lanes64(amount) if amount.__class__ is not int else np.uint64(amount)
    # NumPy shifts by 64 and more give 0.
    return _narrow(lanes << count if left else lanes >> count, width)


@decoder("shl", "shr")
def decode_shift(ins: Instruction) -> Pure:
    """`shl` and `shr`; amounts above the width count as the width."""
    left = ins.parts[0] == "shl"
    r = Reader(ins)
    signed, width = _int_type(r, "b" if left else "bus")
    r.end(3)
    srcs = sources(ins, 1, width, 32)
    dst, amount = (register(ins),), literal(ins.operands[2], 32)
    slow = f"shift_lanes({{0}}, {{1}}, {width}, {left}, {signed})"
    if amount is not None:
        srcs = srcs[:1]
        if signed:
            amount = min(amount, width - 1)
            slow = f"({{0}}.view(np.int{width}) >> {amount}).view(np.uint{width})" if width >= 32 else slow
            slow = slow.replace("{1}", str(amount))
            return pure(guarded(f"{_as_int('{0}', width)} >> {amount} & {_mask(width)}", slow, srcs), dst, srcs)
        if amount >= width:
            return pure("0", dst, ())
        return pure(f"({{0}} << {amount}) & {_mask(width)}" if left else f"{{0}} >> {amount}", dst, srcs)
    if left:
        fast = f"({{0}} << {{1}}) & {_mask(width)} if {{1}} < {width} else 0"
    elif signed:
        fast = f"{_as_int('{0}', width)} >> {{1}} & {_mask(width)}"
    else:
        fast = "{0} >> {1}"
    return pure(guarded(fast, slow, srcs), dst, srcs)


@decoder("shf")
def decode_shf(ins: Instruction) -> Pure:
    """`shf`: the high (left) or low (right) half of a 64-bit shift."""
    r = Reader(ins)
    left = r.one_of("l", "r") == "l"
    wrap = r.one_of("clamp", "wrap") == "wrap"
    r.one_of("b32")
    r.end(4)
    count = "({2} & 31)" if wrap else "min({2}, 32)"
    wide = "({1} << 32 | {0})"
    fast = f"({wide} << {count}) >> 32 & {M32}" if left else f"{wide} >> {count} & {M32}"
    srcs = sources(ins, 1, 32, 32, 32)
    return pure(guarded(fast, f"funnel({{0}}, {{1}}, {{2}}, {left}, {wrap})", srcs), (register(ins),), srcs)


@helper
def funnel(low: Value, high: Value, amount: Value, left: bool, wrap: bool) -> Value:
    """Funnel shift of lanes."""
    count = lanes64(amount) & np.uint64(31) if wrap else np.minimum(lanes64(amount), np.uint64(32))
    both = lanes64(high) << np.uint64(32) | lanes64(low)
    return _narrow((both << count) >> np.uint64(32) if left else both >> count, 32)


def lut_expression(lut: int) -> str:
    """The Boolean function of three bits with the given truth table, as exclusive-or of products (Reed-Muller form).

    Source: PTX ISA, lop3: bit (a << 2 | b << 1 | c) of the table is the result.
    """
    form = [lut >> i & 1 for i in range(8)]
    for step in (1, 2, 4):
        for i in range(8):
            if i & step:
                form[i] ^= form[i ^ step]
    names = {4: "{0}", 2: "{1}", 1: "{2}"}
    terms = []
    for i in range(8):
        if form[i]:
            product = " & ".join(name for bit, name in names.items() if i & bit)
            terms.append(f"({product})" if product else str(M32))
    return " ^ ".join(terms) or "0"


@decoder("lop3")
def decode_lop3(ins: Instruction) -> Pure:
    """`lop3`, with or without a predicate result."""
    r = Reader(ins)
    combine = r.one_of("or", "and", default="") if r.peek() != "b32" else ""
    r.one_of("b32")
    r.end(6 if combine else 5)
    lut = literal(ins.operands[4], 8)
    if lut is None:
        raise Unsupported(f"{r.where}: the truth table must be a literal")
    expression = lut_expression(lut)
    used = sources(ins, 1, 32, 32, 32)
    if not combine:
        return pure(expression, (register(ins),), used)
    q = Source(ins.operands[5], 1)
    value = function_of(expression, 3)

    def fn(a: Value, b: Value, c: Value, q: int) -> tuple[Value, int]:
        result = value(a, b, c)
        flags = _flags(result != 0)
        return result, flags | q if combine == "or" else flags & q

    if not isinstance(ins.operands[0], Pair):
        raise Unsupported(f"{r.where}: expected d|p")
    return Pure(fn, flat(ins.operands[0]), (*used, q))


@helper
def _flags(condition: Any) -> int:
    """A bool or an array of bools as a lane mask."""
    if condition.__class__ is bool:
        return FULL if condition else 0
    return mask_of(condition)


# ------------------------------------------------------------------------------------------------------------ bits and bytes

_PRMT_MODES: dict[str, Callable[[int], int]] = {
    "f4e": lambda s: s << 0 | s + 1 << 4 | s + 2 << 8 | s + 3 << 12,
    "b4e": lambda s: s << 0 | (s - 1 & 7) << 4 | (s - 2 & 7) << 8 | (s - 3 & 7) << 12,
    "rc8": lambda s: s * 0x1111,
    "ecl": lambda s: sum(max(s, i) << 4 * i for i in range(4)),
    "ecr": lambda s: sum(min(s, i) << 4 * i for i in range(4)),
    "rc16": lambda s: 0x3232 if s & 1 else 0x1010,
}
_MODE_BITS = {"f4e": 3, "b4e": 3, "rc8": 3, "ecl": 3, "ecr": 3, "rc16": 3}


def _prmt_expression(selector: int) -> str | None:
    """Shifts and masks for a constant selector without sign replication; None with it."""
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    if any(nibble & 8 for nibble in nibbles):
        return None
    terms, i = [], 0
    while i < 4:
        source, first, length = nibbles[i] >> 2, nibbles[i] & 3, 1
        while i + length < 4 and nibbles[i + length] == nibbles[i] + length and first + length < 4:
            length += 1
        shift, mask = 8 * (first - i), _mask(8 * length) << 8 * i
        moved = (
            f"{{{source}}}"
            if shift == 0
            else f"({{{source}}} >> {shift})"
            if shift > 0
            else f"({{{source}}} << {-shift})"
        )
        terms.append(f"({moved} & {mask})")
        i += length
    return " | ".join(terms)


def _permute(a: Value, b: Value, selector: Value) -> Value:
    one = a.__class__ is int and b.__class__ is int and selector.__class__ is int
    both = lanes64(b) << np.uint64(32) | lanes64(a)
    chosen, out = lanes64(selector), np.zeros(32, np.uint64)
    for i in range(4):
        nibble = chosen >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return int(out[0]) if one else out.astype(np.uint32)


@decoder("prmt")
def decode_prmt(ins: Instruction) -> Pure:
    """`prmt`: picks four bytes out of eight."""
    r = Reader(ins)
    r.one_of("b32")
    mode = r.one_of(*_PRMT_MODES, default="")
    r.end(4)
    dst, srcs = (register(ins),), sources(ins, 1, 32, 32, 32)
    selector = literal(ins.operands[3], 32)
    if mode:
        table = np.array([_PRMT_MODES[mode](s) & 0xFFFF & 0x7777 for s in range(4)] if mode != "" else [], np.uint32)

        def by_mode(a: Value, b: Value, c: Value) -> Value:
            picked = table[c & 3]  # type: ignore[operator]
            return _permute(a, b, int(picked) if c.__class__ is int else picked)

        return Pure(by_mode, dst, srcs)
    if selector is not None:
        expression = _prmt_expression(selector)
        if expression is not None:
            return pure(expression, dst, srcs[:2])
    return Pure(_permute, dst, srcs)


@helper
def bit_field(value: Value, start: Value, length: Value, width: int, signed: bool) -> Value:
    """`bfe` on lanes."""
    first, count = lanes64(start) & np.uint64(255), lanes64(length) & np.uint64(255)
    lanes = lanes64(value)
    field = lanes >> first & ((np.uint64(1) << count) - np.uint64(1))
    if signed:
        last = np.minimum(first + count - np.uint64(1), np.uint64(width - 1))
        sign = lanes >> last & np.uint64(1)
        # Bits past the value's end, and past the field's, take the sign.
        taken = np.minimum(count, np.where(first < width, np.uint64(width) - first, np.uint64(0)))
        high = ~((np.uint64(1) << taken) - np.uint64(1))
        field = np.where(sign.astype(bool), field & ~high | high, field & ~high)
        field = np.where(count == 0, np.uint64(0), field)
    return _narrow(field, width)


@decoder("bfe")
def decode_bfe(ins: Instruction) -> Pure:
    """`bfe`: extracts a bit field."""
    r = Reader(ins)
    signed, width = _int_type(r, "us", (32, 64))
    r.end(4)
    srcs = sources(ins, 1, width, 32, 32)
    slow = f"bit_field({{0}}, {{1}}, {{2}}, {width}, {signed})"
    if signed:
        return Pure(lambda a, b, c: _same_form(bit_field(a, b, c, width, True), a, b, c), (register(ins),), srcs)
    fast = "{0} >> ({1} & 255) & (1 << ({2} & 255)) - 1"
    return pure(guarded(fast, slow, srcs), (register(ins),), srcs)


def _insert(a: Value, b: Value, c: Value, d: Value, width: int) -> Value:
    first, count = lanes64(c) & np.uint64(255), lanes64(d) & np.uint64(255)
    mask = ((np.uint64(1) << count) - np.uint64(1)) << first
    result = _narrow(lanes64(b) & ~mask | lanes64(a) << first & mask, width)
    return _same_form(result, a, b, c, d)


@decoder("bfi")
def decode_bfi(ins: Instruction) -> Pure:
    """`bfi`: inserts the low bits of a into b."""
    r = Reader(ins)
    _, width = _int_type(r, "b", (32, 64))
    r.end(5)
    return Pure(lambda a, b, c, d: _insert(a, b, c, d, width), (register(ins),), sources(ins, 1, width, width, 32, 32))


def bit_length(lanes: np.ndarray) -> np.ndarray:
    """Position of the highest set bit plus one, of uint64 lanes; 0 for 0."""
    high, low = lanes >> np.uint64(32), lanes & np.uint64(M32)
    upper = np.frexp(high.astype(np.float64))[1].astype(np.int64)
    lower = np.frexp(low.astype(np.float64))[1].astype(np.int64)
    return np.where(high > 0, upper + 32, lower)


@decoder("bfind")
def decode_bfind(ins: Instruction) -> Pure:
    """`bfind`: position of the highest bit that is not a sign; all ones if there is none."""
    r = Reader(ins)
    shift = r.take("shiftamt")
    signed, width = _int_type(r, "us", (32, 64))
    r.end(2)

    def compute(a: np.ndarray) -> np.ndarray:
        magnitude = np.where(a < 0, ~a, a).astype(np.uint64) if signed else a
        position = bit_length(magnitude) - 1
        return np.where(position < 0, -1, width - 1 - position) if shift else position

    return Pure(_by_lanes(compute, width, signed, 32), (register(ins),), sources(ins, 1, width))


def _reverse(value: Any, width: int) -> int:
    return int(f"{value:0{width}b}"[::-1], 2)


def per_lane(one: Callable[..., int], result: int) -> Callable[..., Value]:
    """A function on Python integers, applied to each lane: for rare instructions."""

    def fn(*srcs: Value) -> Value:
        if all(src.__class__ is int for src in srcs):
            return one(*srcs)
        columns = [lanes64(src) for src in srcs]
        return np.array([one(*(int(v) for v in row)) for row in zip(*columns, strict=True)], _dtype(result))

    return fn


@decoder("brev", "clz", "popc")
def decode_bits(ins: Instruction) -> Pure:
    """`brev`, `clz`, `popc`."""
    r = Reader(ins)
    _, width = _int_type(r, "b", (32, 64))
    r.end(2)
    dst, srcs = (register(ins),), sources(ins, 1, width)
    if ins.parts[0] == "brev":
        return Pure(per_lane(lambda a: _reverse(a, width), width), dst, srcs)
    if ins.parts[0] == "popc":
        return pure(guarded("({0}).bit_count()", "np.bitwise_count({0}).astype(np.uint32)", srcs), dst, srcs)
    slow = _by_lanes(lambda a: width - bit_length(a), width, False, 32)
    return Pure(lambda a: width - a.bit_length() if a.__class__ is int else slow(a), dst, srcs)


def _find_nth(mask: int, base: int, offset: int) -> int:
    """PTX ISA, `fns`: the n-th set bit from `base`, upwards (offset > 0) or downwards (offset < 0)."""
    offset = _signed(offset, 32)
    if offset == 0:
        return base if base < 32 and mask >> base & 1 else M32
    step, left, position = (1, offset, base) if offset > 0 else (-1, -offset, base)
    while 0 <= position < 32:
        left -= mask >> position & 1
        if left == 0:
            return position
        position += step
    return M32


@decoder("fns")
def decode_fns(ins: Instruction) -> Pure:
    """`fns`: finds the n-th set bit."""
    r = Reader(ins)
    r.one_of("b32")
    r.end(4)
    return Pure(per_lane(_find_nth, 32), (register(ins),), sources(ins, 1, 32, 32, 32))


@decoder("szext")
def decode_szext(ins: Instruction) -> Pure:
    """`szext`: sign- or zero-extends from a given bit position."""
    r = Reader(ins)
    wrap = r.one_of("wrap", "clamp") == "wrap"
    signed, _ = _int_type(r, "us", (32,))
    r.end(3)

    def one(a: int, b: int) -> int:
        count = b & 31 if wrap else min(b, 32)
        if count == 0:
            return 0
        low = a & _mask(count)
        return _signed(low, count) & M32 if signed else low

    return Pure(per_lane(one, 32), (register(ins),), sources(ins, 1, 32, 32))


@decoder("bmsk")
def decode_bmsk(ins: Instruction) -> Pure:
    """`bmsk`: a mask of b bits from bit a."""
    r = Reader(ins)
    wrap = r.one_of("wrap", "clamp") == "wrap"
    r.one_of("b32")
    r.end(3)

    def one(a: int, b: int) -> int:
        start, count = (a & 31, b & 31) if wrap else (a, min(b, 32))
        return _mask(count) << start & M32 if start < 32 else 0

    return Pure(per_lane(one, 32), (register(ins),), sources(ins, 1, 32, 32))


@decoder("dp4a", "dp2a")
def decode_dot(ins: Instruction) -> Pure:
    """`dp4a`, `dp2a`: sums of products of bytes, of halves with bytes."""
    r = Reader(ins)
    four = ins.parts[0] == "dp4a"
    half = 0 if four else 2 * (r.one_of("lo", "hi") == "hi")
    a_signed, b_signed = r.one_of("u32", "s32") == "s32", r.one_of("u32", "s32") == "s32"
    r.end(4)
    count, a_bits = (4, 8) if four else (2, 16)

    def element(value: int, bits: int, i: int, signed: bool) -> int:
        part = value >> bits * i & _mask(bits)
        return _signed(part, bits) if signed else part

    def one(a: int, b: int, c: int) -> int:
        total = c
        for i in range(count):
            total += element(a, a_bits, i, a_signed) * element(b, 8, i + half, b_signed)
        return total & M32

    return Pure(per_lane(one, 32), (register(ins),), sources(ins, 1, 32, 32, 32))


# ------------------------------------------------------------------------------------------------------ compare and select

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED_COMPARE = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def comparison(r: Reader, cmp: str, name: str, ftz: bool, srcs: tuple[Source, ...]) -> str:
    """An expression for a comparison: a bool for ints, an array of bools else."""
    if name in floats.TYPES:
        return floats.comparison(r, cmp, name, ftz)
    if name not in _INT_TYPES or _INT_TYPES[name][1] == 8 or ftz:
        raise Unsupported(f"{r.where}: type .{name}{' with .ftz' if ftz else ''} is not known here")
    kind, width = _INT_TYPES[name]
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
        flags = [_flags(both[:, i]) if len(both) > 1 else FULL if both[0, i] else 0 for i in range(2)]
        if combine == "and":
            flags = [flag & c for flag in flags]
        elif combine == "or":
            flags = [flag | c for flag in flags]
        elif combine == "xor":
            flags = [flag ^ c for flag in flags]
        return tuple(flags)

    return Pure(fn, dsts, srcs)


def _type_width(r: Reader, name: str) -> int:
    if name in _INT_TYPES:
        return _INT_TYPES[name][1]
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
        return np.where(bools(mask), np.uint32(a), np.uint32(b))  # type: ignore[return-value]
    return np.where(bools(mask), a, b)  # type: ignore[return-value]


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
    if kind == "s32":
        test = "_t < 2147483648"
    else:
        test = f"(_t <= 2139095040) | (_t >= 2147483648) & (_t < {limit})"
    flags = f"({FULL} if _t else 0) if (_t := {test.replace('_t', '{2}')}).__class__ is bool else mask_of(_t)"
    slow = "selected64" if width == 64 else "selected"
    return pure(f"{slow}({{0}}, {{1}}, {flags})", (register(ins),), srcs)


@decoder("testp")
def decode_testp(ins: Instruction) -> Pure:
    """`testp`: the class of a floating-point number."""
    return floats.decode_testp(ins)
