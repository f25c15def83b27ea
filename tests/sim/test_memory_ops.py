"""Loads, stores, atomics, address conversion and fences, as instructions of small kernels."""

import asm_kit
import numpy as np
import pytest

from ptxsim import findings, ptx, semantics
from ptxsim.findings import Unsupported
from ptxsim.memory import Buffer
from ptxsim.registry import decode

assert semantics.__all__
RNG = np.random.default_rng(0)


def words(*shape):
    return asm_kit.aligned(RNG.integers(0, 1 << 32, shape, np.uint32))


def instruction(text):
    return ptx.parse(asm_kit.kernel(text, 1, 0, 32, "sm_100a", "")).kernels["k"].instructions[-2]


def own_address(stride, base="%g0", register="%d0"):
    """Code: register = base + lane * stride."""
    return f"mad.wide.u32 {register}, %lane, {stride}, {base};"


# Every width and vector, through every space.

SHAPES = [
    ("b8", 1, "%h0"),
    ("b16", 1, "%h0"),
    ("b32", 1, "%r0"),
    ("f32", 1, "%r0"),
    ("b64", 1, "%d4"),
    ("b128", 1, "%q0"),
    ("b8", 4, "{%h0, %h1, %h2, %h3}"),
    ("b16", 2, "{%h0, %h1}"),
    ("u32", 4, "{%r0, %r1, %r2, %r3}"),
    ("b64", 2, "{%d4, %d5}"),
]
GLOBAL_ONLY = [("b32", 8, "{%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}"), ("b64", 4, "{%d4, %d5, %d6, %d7}")]


def opcode(kind, count):
    return f"v{count}.{kind}" if count > 1 else kind


@pytest.mark.parametrize(("kind", "count", "registers"), SHAPES + GLOBAL_ONLY)
@pytest.mark.parametrize("lanes", ["all", "some", "same"])
def test_global(kind, count, registers, lanes):
    size = count * int(kind[1:]) // 8
    source, target = words(32, size).view(np.uint8)[:, :size].copy(), np.zeros((32, size), np.uint8)
    source, target = asm_kit.aligned(source), asm_kit.aligned(target)
    address = own_address(size) + own_address(size, "%g1", "%d1")
    expected = source.copy()
    guard = ""
    if lanes == "some":
        address += "and.b32 %r9, %lane, 5; setp.eq.u32 %p0, %r9, 4;"
        guard = "@%p0 "
        expected[[i for i in range(32) if i & 5 != 4]] = 0
    elif lanes == "same":
        address = f"add.u64 %d0, %g0, {3 * size};" + own_address(size, "%g1", "%d1")
        expected[:] = source[3]
    op = opcode(kind, count)
    asm_kit.clean(
        address + f"{guard}ld.global.{op} {registers}, [%d0]; {guard}st.global.{op} [%d1], {registers};",
        [source, target],
    )
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize(("kind", "count", "registers"), SHAPES)
@pytest.mark.parametrize("space", ["shared", "shared::cta", "shared::cluster", "generic", "local"])
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_other_spaces(kind, count, registers, space, order):
    size = count * int(kind[1:]) // 8
    source, target = asm_kit.aligned(RNG.integers(0, 256, (32, size), np.uint8)), np.zeros((32, size), np.uint8)
    target = asm_kit.aligned(target)
    op = opcode(kind, count)
    flip = "xor.b32 %r20, %lane, 31;" if order == "descending" else "mov.u32 %r20, %lane;"
    if space == "local":
        place = ".local .align 16 .b8 spot[64]; mov.b64 %d2, spot; cvta.local.u64 %d2, %d2; cvta.to.local.u64 %d2, %d2;"
        inner = ("local", "[%d2+16]")
    else:
        place = f"{flip} mad.lo.u32 %r21, %r20, {size}, %sm;"
        inner = (space, "[%r21]")
        if space == "generic":
            place += "cvt.u64.u32 %d2, %r21; cvta.shared.u64 %d2, %d2;"
            inner = ("", "[%d2]")
    dot = f".{inner[0]}" if inner[0] else ""
    asm_kit.clean(
        f"{own_address(size)} {own_address(size, '%g1', '%d1')} {place} ld.global.{op} {registers}, [%d0];"
        f"st{dot}.{op} {inner[1]}, {registers}; ld{dot}.{op} {registers}, {inner[1]}; st.global.{op} [%d1], {registers};",
        [source, target],
    )
    np.testing.assert_array_equal(target, source)


def test_generic_lanes_in_several_spaces():
    source, target = words(32), asm_kit.aligned(np.zeros(32, np.uint32))
    asm_kit.clean(
        f"""
        {own_address(4)} {own_address(4, "%g1", "%d1")}
        mad.lo.u32 %r1, %lane, 4, %sm; cvt.u64.u32 %d2, %r1; cvta.shared.u64 %d2, %d2;
        setp.lt.u32 %p0, %lane, 16; selp.b64 %d3, %d2, %d1, %p0;
        ld.b32 %r2, [%d0]; st.b32 [%d3], %r2; ld.b32 %r3, [%d3];
        st.global.b32 [%d1], %r3;
        """,
        [source, target],
    )
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    ("kind", "register", "width"),
    [("s8", "%h0", 16), ("s8", "%r0", 32), ("s16", "%d4", 64), ("s32", "%d4", 64), ("s32", "%r0", 32)],
)
def test_signed_loads(kind, register, width, uniform):
    bits = int(kind[1:])
    source = asm_kit.aligned(RNG.integers(-(1 << bits - 1), 1 << bits - 1, 32).astype(f"i{bits // 8}"))
    target = asm_kit.aligned(np.zeros(32, f"i{width // 8}"))
    address = f"add.u64 %d0, %g0, {5 * bits // 8};" if uniform else own_address(bits // 8)
    asm_kit.clean(
        f"{address} {own_address(width // 8, '%g1', '%d1')} ld.global.{kind} {register}, [%d0];"
        f"st.global.b{width} [%d1], {register};",
        [source, target],
    )
    np.testing.assert_array_equal(target, np.full(32, source[5]) if uniform else source)


def test_narrow_loads_into_wide_registers_fill_with_zeros():
    source, target = asm_kit.aligned(np.full(32, 0xF0, np.uint8)), asm_kit.aligned(np.zeros(32, np.uint64))
    asm_kit.clean(
        f"{own_address(1)} {own_address(8, '%g1', '%d1')} ld.global.u8 %d4, [%d0]; st.global.b64 [%d1], %d4;",
        [source, target],
    )
    assert (target == 0xF0).all()


def test_stores_of_literals_and_sinks():
    source, target = words(32, 2), asm_kit.aligned(np.zeros((32, 4), np.uint32))
    asm_kit.clean(
        f"""{own_address(8)} {own_address(16, "%g1", "%d1")} ld.global.v2.b32 {{_, %r0}}, [%d0];
        st.global.v4.b32 [%d1], {{%r0, -1, 7, %lane}};""",
        [source, target],
    )
    np.testing.assert_array_equal(
        target, np.stack([source[:, 1], np.full(32, 0xFFFFFFFF), np.full(32, 7), np.arange(32)], 1)
    )


def test_parameters_and_generic_addresses_of_them():
    buffer, target = words(4), asm_kit.aligned(np.zeros((32, 3), np.uint64))
    asm_kit.clean(
        f"""
        {own_address(24, "%g1", "%d1")}
        ld.param.b64 %d2, [p1]; ld.param::entry.v2.b64 {{%d3, %d4}}, [p0];
        mov.b64 %d5, p0; cvta.param.u64 %d6, %d5; and.b32 %r1, %lane, 1; mad.wide.u32 %d7, %r1, 8, %d6;
        ld.b64 %d8, [%d7];
        st.global.b64 [%d1], %d2; st.global.b64 [%d1+8], %d3; st.global.b64 [%d1+16], %d8;
        """,
        [buffer, target],
    )
    pointers = [buffer.ctypes.data, target.ctypes.data]
    assert (target[:, 0] == pointers[1]).all()
    assert (target[:, 1] == pointers[0]).all()
    assert target[:, 2].tolist() == pointers * 16


def test_const_and_global_variables():
    target = asm_kit.aligned(np.zeros(32, np.uint32))
    text = asm_kit.kernel(
        f"""
        {own_address(4, "%g0", "%d1")} mov.b64 %d2, table; and.b32 %r1, %lane, 3; mad.wide.u32 %d2, %r1, 4, %d2;
        ld.const.b32 %r2, [%d2]; ld.global.b32 %r3, [word]; add.u32 %r2, %r2, %r3; st.global.b32 [%d1], %r2;
        """,
        1,
        0,
        32,
        "sm_100a",
        "",
    ).replace(
        ".visible", ".const .align 4 .b32 table[4] = {10, 20, 30, 40};\n.global .align 4 .b32 word = 5;\n.visible"
    )
    buffer = Buffer.of(target)
    launch = asm_kit.Launch(text, "k", (1, 1, 1), (32, 1, 1), params=(buffer.address.to_bytes(8, "little"),))
    asm_kit.ptxsim.simulate(launch, [buffer]).check()
    assert target.tolist() == [15, 25, 35, 45] * 8


# Cache modifiers and ordering: spelling.

GOOD = [
    "ld.global.ca.b32 %r0, [%g0]",
    "ld.global.nc.L1::no_allocate.L2::128B.b32 %r0, [%g0]",
    "ld.global.nc.L1::evict_last.L2::evict_first.v4.b32 {%r0, %r1, %r2, %r3}, [%g0]",
    "ld.global.L2::cache_hint.b32 %r0, [%g0], %d0",
    "ld.global.L1::no_allocate.L2::cache_hint.L2::256B.b32 %r0, [%g0], %d0",
    "ld.global.L1::no_allocate.v8.f32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%g0]",
    "ldu.global.b32 %r0, [%g0]",
    "ld.volatile.global.b32 %r0, [%g0]",
    "ld.volatile.shared.b32 %r0, [%sm]",
    "ld.relaxed.gpu.global.L1::no_allocate.b32 %r0, [%g0]",
    "ld.acquire.sys.b32 %r0, [%g0]",
    "ld.global.acquire.gpu.b32 %r0, [%g0]",
    "ld.mmio.relaxed.sys.global.b32 %r0, [%g0]",
    "ld.weak.global.cv.b32 %r0, [%g0]",
    "ld.relaxed.cluster.shared::cluster.b32 %r0, [%sm]",
    "st.global.wt.b32 [%g0], %r0",
    "st.global.cs.v2.b32 [%g0], {%r0, %r1}",
    "st.release.gpu.global.b32 [%g0], %r0",
    "st.relaxed.sys.global.L2::cache_hint.b32 [%g0], %r0, %d0",
    "st.volatile.b32 [%g0], %r0",
    "atom.global.add.u32 %r0, [%g0], %r1",
    "atom.acq_rel.gpu.global.cas.b64 %d0, [%g0], %d1, %d2",
    "atom.add.release.gpu.u32 %r0, [%g0], %r1",
    "atom.global.add.L2::cache_hint.f32 %r0, [%g0], %r1, %d0",
    "atom.global.v4.f32.add {%r0, %r1, %r2, %r3}, [%g0], {%r4, %r5, %r6, %r7}",
    "red.release.gpu.global.add.s32 [%g0], %r0",
    "red.relaxed.sys.global.add.noftz.v2.bf16x2 [%g0], {%r0, %r1}",
    "red.shared.max.s32 [%sm], %r0",
    "cvta.to.shared::cluster.u64 %d0, %d1",
    "fence.acq_rel.gpu",
    "fence.sc.cluster",
    "fence.gpu",
    "fence.acquire.sync_restrict::shared::cluster.cluster",
    "fence.release.sync_restrict::shared::cta.cluster",
    "fence.mbarrier_init.release.cluster",
    "fence.proxy.alias",
    "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster",
    "membar.gl",
    "membar.proxy.async",
    "prefetch.global.L2::evict_last [%g0]",
    "prefetchu.L1 [%g0]",
    "applypriority.global.L2::evict_normal [%g0], 128",
    "discard.global.L2 [%g0], 128",
    "createpolicy.fractional.L2::evict_first.b64 %d0",
    "createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 %d0, 0f3F000000",
    "createpolicy.range.L2::evict_last.b64 %d0, [%g0], 1024, 2048",
    "nanosleep.u32 20",
]
BAD = [
    "ld.global.b32.b32 %r0, [%g0]",
    "ld.global.zz.b32 %r0, [%g0]",
    "ld.global %r0, [%g0]",
    "ld.relaxed.global.b32 %r0, [%g0]",
    "ld.gpu.global.b32 %r0, [%g0]",
    "ld.release.gpu.global.b32 %r0, [%g0]",
    "ld.shared.nc.b32 %r0, [%sm]",
    "ld.param::func.b32 %r0, [p0]",
    "ld.global.v2.b32 %r0, [%g0]",
    "ld.global.v4.b32 {%r0, %r1}, [%g0]",
    "ld.global.v8.b64 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}, [%g0]",
    "ld.shared.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%sm]",
    "ld.global.b64 %r0, [%g0]",
    "ld.global.L2::cache_hint.b32 %r0, [%g0]",
    "ld.global.b32 %r0, [%g0], %d0",
    "st.acquire.gpu.global.b32 [%g0], %r0",
    "st.const.b32 [%g0], %r0",
    "st.global.nc.b32 [%g0], %r0",
    "atom.global.add.b32 %r0, [%g0], %r1",
    "atom.global.and.u32 %r0, [%g0], %r1",
    "atom.global.add.v2.u32 {%r0, %r1}, [%g0], {%r2, %r3}",
    "atom.shared.add.v2.f32 {%r0, %r1}, [%sm], {%r2, %r3}",
    "atom.global.add.v8.f32 {%r0}, [%g0], {%r1}",
    "atom.global.add.u32 %d0, [%g0], %r1",
    "atom.global.cas.b32 %r0, [%g0], %r1",
    "atom.global.min.noftz.f16 %h0, [%g0], %h1",
    "atom.global.add.noftz.f32 %r0, [%g0], %r1",
    "red.global.exch.b32 [%g0], %r0",
    "red.weak.global.add.u32 [%g0], %r0",
    "cvta.shared.u32 %r0, %r1",
    "mapa.shared.u32 %r0, %r1, %r2",
    "isspacep.const %p0, %d0",
    "fence.proxy.texture",
    "fence.proxy.async.local",
    "fence.mbarrier_init.release.gpu",
    "fence.relaxed.gpu",
    "membar.gpu",
    "prefetch.global.L3 [%g0]",
    "createpolicy.fractional.L2::evict_sometimes.b64 %d0",
    "nanosleep.u64 20",
]


@pytest.mark.parametrize("text", GOOD)
def test_known_forms(text):
    decode(instruction(text + ";"))


@pytest.mark.parametrize("text", BAD)
def test_unknown_forms(text):
    with pytest.raises(Unsupported, match="PTX line"):
        decode(instruction(text + ";"))


# Findings of single accesses.


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("ld.global.b32 %r0, [%g0+2];", findings.MISALIGNED),
        ("add.u64 %d0, %g0, 8; ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d0];", findings.MISALIGNED),
        (own_address(2) + "st.global.b32 [%d0], %lane;", findings.MISALIGNED),
        ("st.shared.b64 [%sm+4], %g0;", findings.MISALIGNED),
        ("atom.global.add.u32 %r0, [%g0+2], 1;", findings.MISALIGNED),
        ("ld.global.b32 %r0, [%g0+128];", findings.OUT_OF_BOUNDS),
        (own_address(8) + "ld.global.b32 %r0, [%d0];", findings.OUT_OF_BOUNDS),
        ("ld.global.b32 %r0, [64];", findings.OUT_OF_BOUNDS),
        ("add.u32 %r1, %sm, 16384; st.shared.b32 [%r1], 1;", findings.OUT_OF_BOUNDS),
        ("st.shared.b32 [64], 1;", findings.OUT_OF_BOUNDS),
        ("mov.b64 %d0, p0; ld.param.b64 %d1, [%d0+8];", findings.OUT_OF_BOUNDS),
        ("mov.b64 %d0, p0; cvta.param.u64 %d0, %d0; st.b64 [%d0], 1;", findings.OUT_OF_BOUNDS),
        (".local .align 4 .b8 spot[8]; mov.b64 %d0, spot; st.local.b32 [%d0+8], 1;", findings.OUT_OF_BOUNDS),
        (".local .align 4 .b8 spot[8]; mov.b64 %d0, spot; ld.local.b32 %r0, [%d0];", findings.UNINITIALISED_READ),
        ("ld.shared.b32 %r0, [%sm];", findings.UNINITIALISED_READ),
        ("st.shared.b32 [%sm], %lane;", findings.RACE),
        ("st.global.b32 [%g0], %lane;", findings.RACE),
        ("or.b32 %r0, %sm, 0x1000000; st.shared.b32 [%r0], 1;", findings.OUT_OF_BOUNDS),
        ("or.b32 %r0, %sm, 0x1000000; st.shared::cluster.b32 [%r0], 1;", findings.OUT_OF_BOUNDS),
        (
            "mov.u32 %r1, 1; mapa.shared::cluster.u32 %r0, %sm, %r1; st.shared::cluster.b32 [%r0], 1;",
            findings.OUT_OF_BOUNDS,
        ),
        ("mapa.shared::cluster.u32 %r0, %sm, %lane; st.shared::cluster.b32 [%r0], 1;", findings.OUT_OF_BOUNDS),
        ("prefetch.tensormap [%g0+64];", findings.OUT_OF_BOUNDS),
        ("trap;", findings.BAD_VALUE),
        ("brkpt;", findings.BAD_VALUE),
        (".local .align 4 .b8 spot[8]; mov.b64 %d0, spot; atom.add.u32 %r0, [%d0], 1;", findings.OUT_OF_BOUNDS),
        ("discard.global.L2 [%g0], 128; ld.global.b32 %r0, [%g0];", findings.UNINITIALISED_READ),
        ("discard.global.L2 [%g0+4], 128;", findings.MISALIGNED),
        ("st.global.b32 [%g0], 1; ld.global.nc.b32 %r0, [%g0];", findings.RACE),
    ],
)
def test_findings(body, code):
    assert asm_kit.codes(body, [words(32)]) == {code}


@pytest.mark.parametrize(
    "body",
    [
        "st.shared.b32 [%sm], 7; st.global.b32 [%g0], 3;",
        "mapa.shared::cluster.u32 %r0, %sm, %lane; @%first st.shared::cluster.b32 [%r0], 1;",
        "prefetch.global.L2 [%g0+4096]; prefetch.tensormap [%g0];",
        "applypriority.global.L2::evict_normal [%g0], 128;",
        "ld.global.nc.b32 %r0, [%g0]; st.global.b32 [%g0+4], 3;",
        "nanosleep.u32 5;",
        "@%first st.global.b32 [%g0], %lane;",
    ],
)
def test_no_findings(body):
    asm_kit.clean(body, [words(32)])


def test_readonly_and_unwritten_buffers():
    array = words(32)
    assert asm_kit.codes("st.global.b32 [%g0], 1;", [Buffer.of(array, readonly=True)]) == {findings.WRITE_READONLY}
    output = Buffer.of(array, initialised=False, must_be_written=True)
    report = asm_kit.run(own_address(2) + "st.global.b16 [%d0+4], 1;", [output])
    assert report.codes() == {findings.OUTPUT_NOT_WRITTEN}
    assert "64 of 128 bytes" in str(report.findings[0])


# Races between warps, and what orders them.

EXCHANGE = """
mad.lo.u32 %r1, %tid, 4, %sm; st.shared.b32 [%r1], %tid;
{sync}
xor.b32 %r2, %tid, 32; mad.lo.u32 %r2, %r2, 4, %sm; ld.shared.b32 %r3, [%r2];
mad.wide.u32 %d0, %tid, 4, %g0; st.global.b32 [%d0], %r3;
"""


def test_shared_exchange_needs_a_barrier():
    target = asm_kit.aligned(np.zeros(64, np.uint32))
    asm_kit.clean(EXCHANGE.format(sync="bar.sync 0;"), [target], block=64)
    np.testing.assert_array_equal(target, np.arange(64) ^ 32)
    assert findings.RACE in asm_kit.codes(EXCHANGE.format(sync=""), [target], block=64, policy="lazy")


@pytest.mark.parametrize("sync", ["", "bar.sync 0;"])
def test_global_exchange_needs_a_barrier(sync):
    target = asm_kit.aligned(np.zeros(64, np.uint32))
    body = f"""
    mad.wide.u32 %d0, %tid, 4, %g0; st.global.b32 [%d0], %tid;
    {sync}
    xor.b32 %r2, %tid, 32; mad.wide.u32 %d1, %r2, 4, %g0; ld.global.b32 %r3, [%d1];
    """
    found = asm_kit.codes(body, [target], block=64)
    assert found == (set() if sync else {findings.RACE})


FLAG = """
setp.ne.u32 %p1, %warp, 0;
@%p1 bra READER;
st.global.b32 [%g0], 5;
{write}
bra.uni END;
READER:
{read}
setp.eq.u32 %p2, %r0, 0;
@%p2 bra READER;
{after}
ld.global.b32 %r1, [%g0];
st.global.b32 [%g0+64], %r1;
END:
"""


@pytest.mark.parametrize(
    ("write", "read", "after", "ordered"),
    [
        ("st.release.gpu.global.b32 [%g0+32], 1;", "ld.acquire.gpu.global.b32 %r0, [%g0+32];", "", True),
        ("st.release.gpu.global.b32 [%g0+32], 1;", "ld.relaxed.gpu.global.b32 %r0, [%g0+32];", "", False),
        ("st.relaxed.gpu.global.b32 [%g0+32], 1;", "ld.acquire.gpu.global.b32 %r0, [%g0+32];", "", False),
        (
            "fence.acq_rel.gpu; st.relaxed.gpu.global.b32 [%g0+32], 1;",
            "ld.relaxed.gpu.global.b32 %r0, [%g0+32];",
            "fence.acq_rel.gpu;",
            True,
        ),
        ("membar.gl; st.volatile.global.b32 [%g0+32], 1;", "ld.volatile.global.b32 %r0, [%g0+32];", "membar.gl;", True),
        ("red.release.gpu.global.add.u32 [%g0+32], 1;", "atom.acquire.gpu.global.or.b32 %r0, [%g0+32], 0;", "", True),
        ("fence.sc.gpu; red.global.add.u32 [%g0+32], 1;", "ld.acquire.gpu.b32 %r0, [%g0+32];", "", True),
        ("red.global.add.u32 [%g0+32], 1;", "ld.acquire.gpu.b32 %r0, [%g0+32];", "", False),
        ("st.release.cta.shared.b32 [%sm], 1;", "ld.acquire.cta.shared.b32 %r0, [%sm];", "", True),
    ],
)
def test_flags_order(write, read, after, ordered):
    if "[%sm]" in write:
        body = "@%first st.volatile.shared.b32 [%sm], 0; bar.sync 0;" + FLAG.format(write=write, read=read, after=after)
    else:
        body = FLAG.format(write=write, read=read, after=after)
    buffer = asm_kit.aligned(np.zeros(32, np.uint32))
    found = asm_kit.codes(body, [buffer], block=64)
    assert found == (set() if ordered else {findings.RACE})
    assert buffer[16] == 5


# Clusters.


def test_remote_shared_memory():
    target = asm_kit.aligned(np.zeros((2, 32), np.uint32))
    body = """
    xor.b32 %r1, %rank, 1; mapa.shared::cluster.u32 %r2, %sm, %r1; mad.lo.u32 %r2, %lane, 4, %r2;
    mad.lo.u32 %r4, %rank, 100, %lane; st.shared::cluster.b32 [%r2], %r4;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    mad.lo.u32 %r3, %lane, 4, %sm; ld.shared.b32 %r5, [%r3];
    mad.lo.u32 %r6, %rank, 32, %lane; mad.wide.u32 %d0, %r6, 4, %g0; st.global.b32 [%d0], %r5;
    """
    asm_kit.clean(body, [target], grid=2, cluster=2)
    np.testing.assert_array_equal(target, np.stack([100 + np.arange(32), np.arange(32)]))
    bad = asm_kit.codes(body.replace(".release", ".relaxed"), [target], grid=2, cluster=2)
    assert findings.RACE in bad


def test_remote_access_to_a_cta_that_exits():
    body = """
    setp.eq.u32 %p1, %rank, 0; @%p1 bra END;
    mov.u32 %r1, 0; mapa.shared::cluster.u32 %r2, %sm, %r1; st.shared::cluster.b32 [%r2], 1;
    END:
    """
    assert asm_kit.codes(body, grid=2, cluster=2) == {findings.SHARED_IN_USE}


def test_map_and_rank_of_lanes():
    target = asm_kit.aligned(np.zeros((2, 32, 4), np.uint32))
    body = """
    and.b32 %r1, %lane, 1; mapa.shared::cluster.u32 %r2, %sm, %r1;
    cvt.u64.u32 %d2, %sm; cvta.shared.u64 %d3, %d2; mapa.u64 %d4, %d3, %r1; getctarank.u64 %r3, %d4;
    getctarank.shared::cluster.u32 %r4, %sm;
    isspacep.shared::cta %p1, %d4; selp.u32 %r5, 1, 0, %p1; isspacep.shared::cluster %p2, %d4; selp.u32 %r6, 2, 0, %p2;
    isspacep.global %p3, %g0; selp.u32 %r7, 4, 0, %p3; isspacep.global %p3, %d4; selp.u32 %r8, 8, 0, %p3;
    add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r7; add.u32 %r5, %r5, %r8;
    mad.lo.u32 %r9, %rank, 32, %lane; mad.wide.u32 %d0, %r9, 16, %g0;
    st.global.v4.b32 [%d0], {%r2, %r3, %r4, %r5};
    """
    asm_kit.clean(body, [target], grid=2, cluster=2)
    lane = np.arange(32) & 1
    for rank in range(2):
        np.testing.assert_array_equal(target[rank, :, 0], lane << 24 | 0x400)
        np.testing.assert_array_equal(target[rank, :, 1], lane)
        assert (target[rank, :, 2] == rank).all()
        np.testing.assert_array_equal(target[rank, :, 3], 6 + (lane == rank))


# Atomics.


def as_type(array, kind):
    return array.view({"u": np.uint32, "s": np.int32, "b": np.uint32}[kind[0]])


INTEGER = {
    "add.u32": lambda a, b: (a + b) & 0xFFFFFFFF,
    "min.u32": min,
    "max.u32": max,
    "min.s32": lambda a, b: min(a, b, key=lambda x: x - (x >> 31 << 32)),
    "max.s32": lambda a, b: max(a, b, key=lambda x: x - (x >> 31 << 32)),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "exch.b32": lambda a, b: b,
    "inc.u32": lambda a, b: 0 if a >= b else a + 1,
    "dec.u32": lambda a, b: b if a == 0 or a > b else a - 1,
}


@pytest.mark.parametrize("op", INTEGER)
@pytest.mark.parametrize("places", [32, 5, 1])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_integer_atomics(op, places, space):
    cells, values, found = words(places), words(32), asm_kit.aligned(np.zeros(32, np.uint32))
    if op[:3] in ("inc", "dec"):
        cells, values = (
            asm_kit.aligned(RNG.integers(0, 5, places).astype(np.uint32)),
            asm_kit.aligned(np.full(32, 3, np.uint32)),
        )
    expected, olds = cells.tolist(), []
    for lane in range(32):
        olds.append(expected[lane % places])
        expected[lane % places] = INTEGER[op](olds[-1], int(values[lane]))
    where = f"rem.u32 %r1, %lane, {places}; mad.wide.u32 %d0, %r1, 4, %g0;"
    atom = f"atom.global.{op} %r3, [%d0], %r2;"
    if space == "shared":
        atom = f"""mad.lo.u32 %r4, %r1, 4, %sm; ld.global.b32 %r5, [%d0]; st.shared.b32 [%r4], %r5;
        atom.shared.{op} %r3, [%r4], %r2; ld.shared.b32 %r5, [%r4]; st.global.b32 [%d0], %r5;"""
    asm_kit.clean(
        f"{where} {own_address(4, '%g1', '%d1')} {own_address(4, '%g2', '%d2')} ld.global.b32 %r2, [%d1];"
        f"{atom} st.global.b32 [%d2], %r3;",
        [cells, values, found],
    )
    np.testing.assert_array_equal(cells, np.array(expected, np.uint32))
    np.testing.assert_array_equal(found, np.array(olds, np.uint32))


def test_64_bit_and_wider_atomics():
    cells = asm_kit.aligned(np.array([5, 6, 1, 2, 9, 9, 1 << 63, 7], np.uint64))
    found = asm_kit.aligned(np.zeros(8, np.uint64))
    asm_kit.clean(
        """
        @!%first bra END;
        mov.b64 %d0, -2; atom.global.add.u64 %d1, [%g0], %d0; st.global.b64 [%g1], %d1;
        mov.b64 %d2, 6; mov.b64 %d3, 60; atom.global.cas.b64 %d1, [%g0+8], %d2, %d3; st.global.b64 [%g1+8], %d1;
        mov.b64 %d4, 1; mov.b64 %d5, 2; mov.b128 %q0, {%d4, %d5}; mov.b128 %q1, {%d2, %d3};
        atom.global.cas.b128 %q2, [%g0+16], %q0, %q1; st.global.b128 [%g1+16], %q2;
        atom.global.cas.b128 %q2, [%g0+32], %q0, %q1; st.global.b128 [%g1+32], %q2;
        atom.global.exch.b128 %q2, [%g0+32], %q0;
        atom.global.min.s64 %d1, [%g0+48], %d0;
        END:
        """,
        [cells, found],
    )
    assert cells.tolist() == [3, 60, 6, 60, 1, 2, 1 << 63, 7]
    assert found.tolist() == [5, 6, 1, 2, 9, 9, 0, 0]


def test_cas_of_16_bits():
    cells = asm_kit.aligned(np.arange(32, dtype=np.uint16))
    asm_kit.clean(
        own_address(2) + "mov.b16 %h1, 7; mov.b16 %h2, 700; atom.global.cas.b16 %h0, [%d0], %h1, %h2;", [cells]
    )
    assert cells.tolist() == [*range(7), 700, *range(8, 32)]


@pytest.mark.parametrize(("op", "space"), [("red", "global"), ("atom", "global"), ("red", "shared")])
def test_f32_add(op, space):
    cell, values = asm_kit.aligned(np.array([1.5], np.float32)), asm_kit.aligned(RNG.normal(size=32).astype(np.float32))
    result = "%r3, " if op == "atom" else ""
    code = f"{op}.global.add.f32 {result}[%g0], %r2;"
    if space == "shared":
        code = """ld.global.b32 %r4, [%g0]; st.shared.b32 [%sm], %r4; red.shared.add.f32 [%sm], %r2;
        ld.shared.b32 %r4, [%sm]; st.global.b32 [%g0], %r4;"""
    expected = cell[0]
    for value in values:
        expected = np.float32(expected + value)
    asm_kit.clean(f"{own_address(4, '%g1', '%d1')} ld.global.b32 %r2, [%d1]; {code}", [cell, values])
    assert cell[0] == expected


@pytest.mark.parametrize(
    ("space", "expected"), [("global", [0x80000000, 0x7FFFFFFF, 0]), ("shared", [0x80000003, 0x7FFFFFFF, 1])]
)
def test_f32_add_of_subnormals_and_nan(space, expected):
    cells = asm_kit.aligned(np.array([0x80000001, 0x7F800000, 0x00800001], np.uint32))
    values = asm_kit.aligned(np.array([0x80000002, 0xFF800000, 0x80800000], np.uint32))
    code = "setp.lt.u32 %p1, %lane, 3; @!%p1 bra END;" + own_address(4) + own_address(4, "%g1", "%d1")
    code += "ld.global.b32 %r2, [%d1];"
    if space == "shared":
        code += """mad.lo.u32 %r4, %lane, 4, %sm; ld.global.b32 %r5, [%d0]; st.shared.b32 [%r4], %r5;
        red.shared.add.f32 [%r4], %r2; ld.shared.b32 %r5, [%r4]; st.global.b32 [%d0], %r5; END:"""
    else:
        code += "red.global.add.f32 [%d0], %r2; END:"
    asm_kit.clean(code, [cells, values])
    assert [hex(x) for x in cells] == [hex(x) for x in expected]


def test_f64_add_of_nan():
    inf, minus, quiet, signalling = 0x7FF0000000000000, 0xFFF0000000000000, 0xFFF8000000000012, 0x7FF0000000000034
    cells = asm_kit.aligned(np.array([inf, 5, quiet, signalling, 0x3FF0000000000000], np.uint64))
    values = asm_kit.aligned(np.array([minus, signalling, 5, 7, 0x3FF0000000000000], np.uint64))
    asm_kit.clean(
        f"""setp.lt.u32 %p1, %lane, 5; {own_address(8)} {own_address(8, "%g1", "%d1")}
        @%p1 ld.global.b64 %d2, [%d1]; @%p1 red.global.add.f64 [%d0], %d2;""",
        [cells, values],
    )
    assert cells.tolist() == [0xFFF8000000000000, 0x7FF8000000000034, quiet, 0x7FF8000000000034, 0x4000000000000000]


def to_bf16(x):
    raw = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((raw + 0x7FFF + ((raw >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@pytest.mark.parametrize(
    ("op", "kind", "registers", "halves"),
    [
        ("red", "add.noftz.f16", "%h0", 1),
        ("red", "add.noftz.bf16", "%h0", 1),
        ("red", "add.noftz.f16x2", "%r0", 2),
        ("red", "add.noftz.bf16x2", "%r0", 2),
        ("red", "add.noftz.v2.bf16x2", "{%r0, %r1}", 4),
        ("red", "add.noftz.v4.bf16x2", "{%r0, %r1, %r2, %r3}", 8),
        ("red", "add.noftz.v8.bf16", "{%h0, %h1, %h2, %h3, %h4, %h5, %h6, %h7}", 8),
        ("red", "max.noftz.v4.f16", "{%h0, %h1, %h2, %h3}", 4),
        ("red", "min.noftz.v2.f16x2", "{%r0, %r1}", 4),
        ("red", "min.noftz.v4.bf16", "{%h0, %h1, %h2, %h3}", 4),
    ],
)
def test_half_atomics(op, kind, registers, halves):
    bf16 = "bf16" in kind
    pack, unpack = (
        (to_bf16, from_bf16)
        if bf16
        else (lambda x: np.asarray(x, np.float16).view(np.uint16), lambda b: b.view(np.float16))
    )
    cells = asm_kit.aligned(pack(RNG.normal(size=(32, halves)) * 10))
    values = asm_kit.aligned(pack(RNG.normal(size=(32, halves)) * 10))
    a, b = unpack(cells).astype(np.float32), unpack(values).astype(np.float32)
    expected = pack({"add": np.add, "min": np.minimum, "max": np.maximum}[kind[:3]](a, b))
    size, width = 2 * halves, 16 if "%h" in registers else 32
    load = f"v{registers.count('%')}.b{width}" if registers.count("%") > 1 else f"b{width}"
    if load == "v8.b16":
        load, registers = "v4.b32", "{%r0, %r1, %r2, %r3}"
        unpacking = "".join(f"mov.b32 {{%h{2 * i}, %h{2 * i + 1}}}, %r{i};" for i in range(4))
        reduced = "{%h0, %h1, %h2, %h3, %h4, %h5, %h6, %h7}"
    else:
        unpacking, reduced = "", registers
    asm_kit.clean(
        f"{own_address(size)} {own_address(size, '%g1', '%d1')} ld.global.{load} {registers}, [%d1]; {unpacking}"
        f"{op}.global.{kind} [%d0], {reduced};",
        [cells, values],
    )
    np.testing.assert_array_equal(cells, expected)


def test_half_atomics_of_zeros_and_nan():
    zero, nan = 0x8000, 0x7E01
    cells = asm_kit.aligned(np.array([zero, 0, zero, 0x3C00, nan, nan], np.uint16))
    values = asm_kit.aligned(np.array([0, zero, zero, nan, 0x3C00, nan], np.uint16))
    for op, expected in (
        ("min", [zero, zero, zero, 0x3C00, 0x3C00, 0x7FFF]),
        ("max", [0, 0, zero, 0x3C00, 0x3C00, 0x7FFF]),
    ):
        out = asm_kit.aligned(cells)
        asm_kit.clean(
            f"""setp.lt.u32 %p1, %lane, 3; {own_address(4)} {own_address(4, "%g1", "%d1")}
            @%p1 ld.global.v2.b16 {{%h0, %h1}}, [%d1]; @%p1 red.global.{op}.noftz.v2.f16 [%d0], {{%h0, %h1}};""",
            [out, values],
        )
        assert out.tolist() == expected


def test_vector_f32_atomics():
    cells, values = (
        asm_kit.aligned(RNG.normal(size=(8, 4)).astype(np.float32)),
        asm_kit.aligned(RNG.normal(size=(32, 4)).astype(np.float32)),
    )
    expected, olds = cells.copy(), asm_kit.aligned(np.zeros((32, 4), np.float32))
    wanted = olds.copy()
    for lane in range(32):
        wanted[lane] = expected[lane % 8]
        expected[lane % 8] += values[lane]
    asm_kit.clean(
        f"""rem.u32 %r9, %lane, 8; mad.wide.u32 %d0, %r9, 16, %g0;
        {own_address(16, "%g1", "%d1")} {own_address(16, "%g2", "%d2")}
        ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%d1];
        atom.global.add.v4.f32 {{%r4, %r5, %r6, %r7}}, [%d0], {{%r0, %r1, %r2, %r3}};
        st.global.v4.b32 [%d2], {{%r4, %r5, %r6, %r7}};""",
        [cells, values, olds],
    )
    np.testing.assert_array_equal(cells, expected)
    np.testing.assert_array_equal(olds, wanted)


def test_atomics_of_many_warps_and_clusters():
    cell = asm_kit.aligned(np.zeros(1, np.uint32))
    asm_kit.clean("red.global.add.u32 [%g0], 1;", [cell], block=96, grid=4)
    assert cell[0] == 384
    body = """@%first st.shared.b32 [%sm], 0; bar.sync 0; red.shared.add.u32 [%sm], 1; bar.sync 0;
    ld.shared.b32 %r0, [%sm]; st.global.b32 [%g0], %r0;"""
    asm_kit.clean(body, [cell], block=96)
    assert cell[0] == 96
    assert findings.RACE in asm_kit.codes(body.replace("1; bar.sync 0;", "1;"), [cell], block=96)


def test_atomics_on_uninitialised_memory():
    empty = Buffer.of(words(32), initialised=False)
    assert asm_kit.codes("red.global.add.u32 [%g0], 1;", [empty]) == {findings.UNINITIALISED_READ}


# Proxies, with copies by the TMA unit.

STORE_OUT = """
mad.lo.u32 %r1, %tid, 4, %sm; st.shared.b32 [%r1], %tid;
{before} bar.sync 0; {after}
@!%first bra END;
cp.async.bulk.global.shared::cta.bulk_group [%g0], [%sm], 256;
cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
END:
"""


@pytest.mark.parametrize(
    "fence", ["fence.proxy.async.shared::cta;", "fence.proxy.async;", "fence.proxy.async.shared::cluster;"]
)
def test_proxy_fence_before_or_after_the_barrier(fence):
    target = asm_kit.aligned(np.zeros(64, np.uint32))
    asm_kit.clean(STORE_OUT.format(before=fence, after=""), [target], block=64)
    asm_kit.clean(STORE_OUT.format(before="", after=fence), [target], block=64)
    np.testing.assert_array_equal(target, np.arange(64))


@pytest.mark.parametrize("fence", ["", "fence.proxy.async.global;", "fence.acq_rel.cta;", "@%first fence.proxy.async;"])
def test_missing_proxy_fence(fence):
    target = asm_kit.aligned(np.zeros(64, np.uint32))
    assert asm_kit.codes(STORE_OUT.format(before=fence, after=""), [target], block=64) == {findings.MISSING_PROXY_FENCE}


LOAD_BACK = """
mad.wide.u32 %d0, %tid, 4, %g0; st.global.b32 [%d0], %tid;
@%first mbarrier.init.shared.b64 [%sm+1024], 1;
fence.mbarrier_init.release.cluster;
{fence}
bar.sync 0;
@%first mbarrier.arrive.expect_tx.shared.b64 _, [%sm+1024], 256;
@%first cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%sm], [%g0], 256, [%sm+1024];
{wait}
"""


@pytest.mark.parametrize(
    ("fence", "expected"),
    [
        ("", {findings.MISSING_PROXY_FENCE}),
        ("fence.proxy.async.shared::cta;", {findings.MISSING_PROXY_FENCE}),
        ("fence.proxy.async.global;", set()),
        ("fence.proxy.async;", set()),
    ],
)
def test_proxy_fence_of_global_memory(fence, expected):
    target = asm_kit.aligned(np.zeros(64, np.uint32))
    body = LOAD_BACK.format(fence=fence, wait=asm_kit.wait("%sm+1024", 0))
    assert asm_kit.codes(body, [target], block=64) == expected
