"""Matrix fragments of a warp, against loops over the layouts of the PTX ISA."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest
from handlers import FakeWarp, Fatal, effect, from_value, to_value

from ptxsim.findings import DIVERGENCE, MISALIGNED, OUT_OF_BOUNDS, Unsupported

FULL = 0xFFFFFFFF


class Shared:
    """Just bytes: the checks of the real one have their own tests."""

    def __init__(self):
        self.data = np.random.default_rng(0).integers(0, 256, 1 << 14, dtype=np.uint8)

    def load(self, w, offsets, size):
        return np.stack([self.data[o : o + size] for o in offsets])

    def store(self, w, offsets, size, values):
        for offset, row in zip(offsets, values, strict=True):
            self.data[offset : offset + size] = row


def warp(rank=1):
    w = FakeWarp()
    w.cta = SimpleNamespace(smem=Shared(), rank=rank)
    w.machine = SimpleNamespace(counters=collections.defaultdict(int))
    return w


def rows(rank=1, seed=0):
    """32 scattered, aligned row addresses."""
    return [rank << 24 | 16 * int(i) for i in np.random.default_rng(seed).permutation(512)[:32] + 64]


def element(data, address, index):
    start = (address & 0xFFFFFF) + 2 * index
    return int(data[start]) | int(data[start + 1]) << 8


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count, trans):
    registers = ", ".join(f"%r{i}" for i in range(count))
    item = effect(f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r7]")
    assert item.aligned
    assert len(item.dsts) == count
    w, addresses = warp(), rows()
    result = item.run(w, FULL, to_value(addresses, 32))
    for i, value in enumerate(result if count > 1 else (result,)):
        got = from_value(value, 32)
        for lane in range(32):
            pair = []
            for j in (0, 1):
                row, col = lane // 4, 2 * (lane % 4) + j
                if trans:
                    row, col = col, row
                pair.append(element(w.cta.smem.data, addresses[8 * i + row], col))
            assert got[lane] == pair[0] | pair[1] << 16


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_undoes_ldmatrix(count, trans):
    registers = ", ".join(f"%r{i}" for i in range(count))
    load = effect(f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared::cta.b16 {{{registers}}}, [%r7]")
    store = effect(f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared::cta.b16 [%r7], {{{registers}}}")
    w, addresses = warp(), to_value(rows(), 32)
    values = load.run(w, FULL, addresses)
    before = w.cta.smem.data.copy()
    for address in rows()[: 8 * count]:
        w.cta.smem.data[address & 0xFFFFFF :][:16] = 0
    store.run(w, FULL, addresses, *(values if count > 1 else (values,)))
    assert (w.cta.smem.data == before).all()


def test_generic_address():
    load = effect("ldmatrix.sync.aligned.m8n8.x1.b16 {%r0}, [%rd7]")
    plain = effect("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r7]")
    w = warp()
    generic = to_value([1 << 56 | address for address in rows()], 64)
    assert (load.run(w, FULL, generic) == plain.run(w, FULL, to_value(rows(), 32))).all()


def test_bad_addresses():
    item = effect("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r7]")
    for addresses, mask, code in (
        ([a + 8 for a in rows()], FULL, MISALIGNED),
        (rows(rank=0), FULL, OUT_OF_BOUNDS),
        (rows(), 0xFFFF, DIVERGENCE),
    ):
        with pytest.raises(Fatal) as found:
            item.run(warp(), mask, to_value(addresses, 32))
        assert found.value.args[0] == code


def test_movmatrix():
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    item = effect("movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r1")
    got = item.run(warp(), FULL, matrix.reshape(-1).view(np.uint32))
    assert (got.view(np.uint16).reshape(8, 8) == matrix.T).all()


# Elements as small integers: every product and sum is exact, so that the order of the sum does not matter.
ENCODE = {
    "f16": lambda v: int(np.float16(v).view(np.uint16)),
    "bf16": lambda v: int(np.float32(v).view(np.uint32)) >> 16,
    "tf32": lambda v: int(np.float32(v).view(np.uint32)),
    "s8": lambda v: v & 255,
    "u8": lambda v: v & 255,
    "e4m3": lambda v: {0: 0, 1: 0x38, 2: 0x40, 3: 0x44, 4: 0x48}[abs(v)] | 0x80 * (v < 0),
    "e5m2": lambda v: {0: 0, 1: 0x3C, 2: 0x40, 3: 0x42, 4: 0x44}[abs(v)] | 0x80 * (v < 0),
}
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}
MMA = [
    ("m16n8k8", "f32", "f16", "f16", "f32"),
    ("m16n8k16", "f32", "f16", "f16", "f32"),
    ("m16n8k16", "f16", "f16", "f16", "f16"),
    ("m16n8k8", "f16", "f16", "f16", "f32"),
    ("m16n8k8", "f32", "bf16", "bf16", "f32"),
    ("m16n8k16", "f32", "bf16", "bf16", "f32"),
    ("m16n8k4", "f32", "tf32", "tf32", "f32"),
    ("m16n8k8", "f32", "tf32", "tf32", "f32"),
    ("m16n8k16", "f32", "e4m3", "e4m3", "f32"),
    ("m16n8k32", "f32", "e4m3", "e5m2", "f32"),
    ("m16n8k32", "s32", "s8", "u8", "s32"),
    ("m16n8k16", "s32", "u8", "s8", "s32"),
]


def fragment(matrix, bits, encode, places):
    """Registers of 32 lanes; places(lane, register, element) gives row and column."""
    per = 32 // bits
    count = matrix.size // 32 // per
    return [
        [
            sum(encode(int(matrix[places(lane, i, j)])) << bits * j for j in range(per))
            for lane in range(32)
        ]
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype", "atype", "btype", "ctype"), MMA)
def test_mma(shape, dtype, atype, btype, ctype):
    depth = int(shape.split("k")[1])
    rng = np.random.default_rng(depth)
    low = 0 if atype == "u8" else -4
    a = rng.integers(low, 5, (16, depth))
    b = rng.integers(0 if btype == "u8" else -4, 5, (depth, 8))
    c = rng.integers(-50, 50, (16, 8))
    per = 32 // BITS[atype]
    # Fragment layouts of the PTX ISA: groupID = lane / 4, threadID_in_group = lane % 4.
    a_regs = fragment(
        a, BITS[atype], ENCODE[atype], lambda n, i, j: (n // 4 + 8 * (i % 2), per * (n % 4) + j + 4 * per * (i // 2))
    )
    b_regs = fragment(b, BITS[btype], ENCODE[btype], lambda n, i, j: (per * (n % 4) + j + 4 * per * i, n // 4))
    if ctype == "f16":
        c_regs = fragment(c, 16, ENCODE["f16"], lambda n, i, j: (n // 4 + 8 * i, 2 * (n % 4) + j))
    else:
        encode = ENCODE["tf32"] if ctype == "f32" else lambda v: v & FULL
        c_regs = fragment(c, 32, encode, lambda n, i, j: (n // 4 + 8 * (i // 2), 2 * (n % 4) + i % 2))
    names = iter(range(40))

    def vector(count):
        return "{" + ", ".join(f"%r{next(names) % 8}" for _ in range(count)) + "}"

    outputs = 2 if dtype == "f16" else 4
    text = f"mma.sync.aligned.{shape}.row.col.{dtype}.{atype}.{btype}.{ctype} "
    item = effect(text + ", ".join(vector(n) for n in (outputs, len(a_regs), len(b_regs), len(c_regs))))
    w = warp()
    result = item.run(w, FULL, *(to_value(reg, 32) for reg in (*a_regs, *b_regs, *c_regs)))
    want = a @ b + c
    for i, value in enumerate(result):
        got = from_value(value, 32)
        for lane in range(32):
            if dtype == "f16":
                numbers = np.array([got[lane]], np.uint32).view(np.float16)
                for j in (0, 1):
                    assert numbers[j] == want[lane // 4 + 8 * i, 2 * (lane % 4) + j]
            else:
                number = np.array([got[lane]], np.uint32).view(np.float32 if dtype == "f32" else np.int32)[0]
                assert number == want[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]
    assert w.machine.counters["mma_flops"] == 2 * 16 * 8 * depth


def expand(text):
    """Short names for vectors of registers."""
    return text.replace("R4", "{%r0, %r1, %r2, %r3}").replace("R2", "{%r4, %r5}")


def test_mma_uniform_sources():
    text = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 R4, R4, R2, R4"
    ones = 0x3C003C00
    result = effect(expand(text)).run(warp(), FULL, *[ones] * 6, *[0x3F800000] * 4)
    assert all(from_value(value, 32) == [int(np.float32(17).view(np.uint32))] * 32 for value in result)


@pytest.mark.parametrize(
    "bad",
    [
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%r7]",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b4x16_p64 {%r0}, [%r7]",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0}, [%r7]",
        "stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r7], {%r0}",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r0}, {%r0}, {%r0}, {%r0}",
        "mma.sync.aligned.m16n8k16.col.col.f32.f16.f16.f32 R4, R4, R2, R4",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 R4, R4, R2, R4",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 R4, {%r0, %r1}, R2, R4",
    ],
)
def test_unknown_forms_are_refused(bad):
    with pytest.raises(Unsupported):
        effect(expand(bad))
