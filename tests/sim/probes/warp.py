"""Probes of warp-wide instructions, atomics, vector loads and stores, and launch-related instructions."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .kit import Case, kernel, random_bytes, random_u32, random_u64, sentinel, words
from .tma import float_data

LANE = """
shl.b32 %r0, %tix, 2;
cvt.u64.u32 %d0, %r0;
add.u64 %d1, %ptr0, %d0;
add.u64 %d2, %ptr1, %d0;
ld.global.b32 %r1, [%d2];
ld.global.b32 %r2, [%d2+128];
"""


def warp_case(name: str, body: str, slots: int, source: np.ndarray[Any, Any] | None = None, note: str = "") -> Case:
    """Per lane: %r1 and %r2 are inputs; results go to [%d1 + 128 * slot]."""
    data = random_u32(501, 64) if source is None else source
    return Case(
        name=name,
        ptx=kernel(LANE + body, pointers=2, shared=False),
        buffers={"out": sentinel(128 * slots), "source": data},
        outputs=("out",),
        note=note,
    )


def shfl_cases() -> Iterator[Case]:
    lanes = np.concatenate([random_u32(502, 32), random_u32(503, 32) % 70]).astype(np.uint32)
    clamps = {
        "idx": ("31", "0x1f", "0x181f", "0x1c1f", "0x0b"),
        "up": ("0", "0x1800", "0x1c00", "3"),
        "down": ("31", "0x181f", "0x1c1f", "0x0f"),
        "bfly": ("31", "0x181f", "0x1c1f", "7"),
    }
    for mode, masks in clamps.items():
        body = ""
        slot = 0
        for mask in masks:
            for distance in ("0", "1", "5", "16", "31", "%r2"):
                body += f"""
                shfl.sync.{mode}.b32 %r3|%p1, %r1, {distance}, {mask}, 0xffffffff;
                selp.b32 %r4, 1, 0, %p1;
                st.global.b32 [%d1+{128 * slot}], %r3;
                st.global.b32 [%d1+{128 * (slot + 1)}], %r4;
                """
                slot += 2
        yield warp_case(f"shfl/{mode}", body, slot, lanes)
    body = """
    setp.lt.u32 %p0, %tix, 16;
    mov.b32 %r3, 0;
    @!%p0 bra UPPER;
    shfl.sync.bfly.b32 %r3, %r1, 3, 0x1f, 0xffff;
    bra.uni JOIN;
    UPPER:
    shfl.sync.idx.b32 %r3, %r1, 20, 0x1f, 0xffff0000;
    JOIN:
    st.global.b32 [%d1], %r3;
    """
    yield warp_case("shfl/half_warps", body, 1)


def vote_cases() -> Iterator[Case]:
    body = ""
    slot = 0
    tests = {"even": "and.b32 %r9, %tix, 1;", "none": "mov.b32 %r9, 1;", "all": "mov.b32 %r9, 0;"}
    tests["mixed"] = "and.b32 %r9, %r1, 3;"
    for test in tests.values():
        body += test + "\nsetp.eq.u32 %p1, %r9, 0;\n"
        for mode in ("all", "any", "uni"):
            body += f"""
            vote.sync.{mode}.pred %p2, %p1, 0xffffffff;
            selp.b32 %r3, 1, 0, %p2;
            vote.sync.{mode}.pred %p2, !%p1, 0xffffffff;
            selp.b32 %r4, 2, 0, %p2;
            or.b32 %r3, %r3, %r4;
            st.global.b32 [%d1+{128 * slot}], %r3;
            """
            slot += 1
        body += f"vote.sync.ballot.b32 %r3, %p1, 0xffffffff;\nst.global.b32 [%d1+{128 * slot}], %r3;\n"
        slot += 1
    yield warp_case("vote/full", body, slot)
    body = """
    and.b32 %r9, %r1, 1;
    setp.eq.u32 %p1, %r9, 0;
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
    setp.lt.u32 %p0, %tix, 11;
    @!%p0 bra JOIN;
    vote.sync.ballot.b32 %r3, %p1, 0x7ff;
    activemask.b32 %r4;
    JOIN:
    bar.warp.sync 0xffffffff;
    st.global.b32 [%d1], %r3;
    st.global.b32 [%d1+128], %r4;
    activemask.b32 %r4;
    st.global.b32 [%d1+256], %r4;
    """
    yield warp_case("vote/divergent", body, 3)
    body = """
    elect.sync %r3|%p1, 0xffffffff;
    selp.b32 %r4, 1, 0, %p1;
    st.global.b32 [%d1], %r3;
    st.global.b32 [%d1+128], %r4;
    mov.b32 %r3, 99;
    mov.b32 %r4, 99;
    setp.gt.u32 %p0, %tix, 6;
    @!%p0 bra JOIN;
    elect.sync %r3|%p1, 0xffffff80;
    selp.b32 %r4, 1, 0, %p1;
    JOIN:
    bar.warp.sync 0xffffffff;
    st.global.b32 [%d1+256], %r3;
    st.global.b32 [%d1+384], %r4;
    """
    yield warp_case("vote/elect", body, 4)


def match_and_redux_cases() -> Iterator[Case]:
    values = np.concatenate([random_u32(504, 32) % 5, np.full(32, 77)]).astype(np.uint32)
    body = """
    match.any.sync.b32 %r3, %r1, 0xffffffff;
    st.global.b32 [%d1], %r3;
    match.all.sync.b32 %r3|%p1, %r1, 0xffffffff;
    selp.b32 %r4, 1, 0, %p1;
    st.global.b32 [%d1+128], %r3;
    st.global.b32 [%d1+256], %r4;
    match.all.sync.b32 %r3|%p1, %r2, 0xffffffff;
    selp.b32 %r4, 1, 0, %p1;
    st.global.b32 [%d1+384], %r3;
    st.global.b32 [%d1+512], %r4;
    mov.b64 %d3, {%r1, %r2};
    match.any.sync.b64 %r3, %d3, 0xffffffff;
    st.global.b32 [%d1+640], %r3;
    """
    yield warp_case("match/any_and_all", body, 6, values)
    body = ""
    operations = words("add.u32 add.s32 min.u32 max.u32 min.s32 max.s32 and.b32 or.b32 xor.b32")
    for i, operation in enumerate(operations):
        body += f"redux.sync.{operation} %r3, %r1, 0xffffffff;\nst.global.b32 [%d1+{128 * i}], %r3;\n"
    n = len(operations)
    body += "mov.b32 %r3, 0;\nsetp.gt.u32 %p0, %tix, 9;\n@!%p0 bra JOIN;\n"
    body += f"redux.sync.min.s32 %r3, %r1, 0xfffffc00;\nJOIN:\nst.global.b32 [%d1+{128 * n}], %r3;\n"
    yield warp_case("redux/all", body, n + 1)


# Operations of atom and red on 32 lanes' own words: the old value and the result are both deterministic.
ATOMICS = words(
    "add.u32 add.s32 add.u64 min.u32 max.u32 min.s32 max.s32 min.u64 max.u64 min.s64 max.s64 inc.u32 dec.u32 "
    "and.b32 or.b32 xor.b32 and.b64 or.b64 xor.b64 exch.b32 exch.b64 cas.b32 cas.b64 cas.b16 "
    "add.f32 add.f64 add.noftz.f16 add.noftz.bf16 add.noftz.f16x2 add.noftz.bf16x2"
)
REDUCTIONS = [name for name in ATOMICS if name.split(".")[0] not in ("exch", "cas")]


def width_of(operation: str) -> int:
    kind = operation.split(".")[-1]
    return {"f16": 2, "bf16": 2, "b16": 2, "f16x2": 4, "bf16x2": 4}.get(kind) or int(kind[1:]) // 8


def atomic_data(operation: str, seed: int, width: int) -> np.ndarray[Any, Any]:
    kind = operation.split(".")[-1]
    if kind[0] == "f" or kind.startswith("bf"):
        dtype = kind.removesuffix("x2")
        return float_data(dtype, seed, 32 * width // {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}[dtype])
    data = random_bytes(seed, 32 * width)
    if "cas" in operation or operation.startswith(("inc", "dec")):
        # small numbers, so that comparisons go both ways
        data = (random_u64(seed, 32) % np.uint64(3)).astype({2: np.uint16, 4: np.uint32, 8: np.uint64}[width])
        return data.view(np.uint8).copy()
    return data


def atomic_cases() -> Iterator[Case]:
    for i, operation in enumerate(ATOMICS):
        width = width_of(operation)
        prefix = {2: "%h", 4: "%r", 8: "%d"}[width]
        bits = f"b{8 * width}"
        compare = f", {prefix}13" if operation.startswith("cas") else ""
        for space in ("global", "shared"):
            addresses = "add.u64 %d3, %ptr0, %d2;" if space == "global" else "add.u32 %r5, %smem, %r4;"
            address = "%d3" if space == "global" else "%r5"
            place = "" if space == "global" else f"st.shared.{bits} [%r5], {prefix}10;"
            back = (
                "" if space == "global" else f"ld.shared.{bits} {prefix}10, [%r5];\nst.global.{bits} [%d6], {prefix}10;"
            )
            reduction = f"red.{space}.{operation} [{address}], {prefix}11;" if operation in REDUCTIONS else ""
            body = f"""
            mul.lo.u32 %r4, %tix, {width};
            cvt.u64.u32 %d2, %r4;
            {addresses}
            add.u64 %d4, %ptr1, %d2;
            add.u64 %d5, %ptr2, %d2;
            add.u64 %d6, %ptr0, %d2;
            ld.global.{bits} {prefix}10, [%d6];
            ld.global.{bits} {prefix}11, [%d4];
            ld.global.{bits} {prefix}13, [%d4+{32 * width}];
            {place}
            atom.{space}.{operation} {prefix}12, [{address}], {prefix}11{compare};
            st.global.{bits} [%d5], {prefix}12;
            {reduction}
            {back}
            """
            source = np.concatenate([atomic_data(operation, 521 + i, width), atomic_data(operation, 561 + i, width)])
            yield Case(
                name=f"atomic/{operation}_{space}",
                ptx=kernel(body, pointers=3, shared=space == "shared"),
                buffers={
                    "memory": atomic_data(operation, 601 + i, width),
                    "source": source,
                    "old": sentinel(32 * width),
                },
                outputs=("memory", "old"),
                shared_bytes=32 * width if space == "shared" else 0,
            )
    yield contended_atomics()
    yield from vector_reductions()


def contended_atomics() -> Case:
    """All threads of four CTAs on the same words, with operations whose final result does not depend on the order."""
    body = """
    mov.u32 %r4, %ctaid.x;
    mad.lo.u32 %r5, %r4, 64, %tix;
    mul.lo.u32 %r6, %r5, 0x9E3779B1;
    red.relaxed.gpu.global.add.u32 [%ptr0], %r6;
    red.global.gpu.min.s32 [%ptr0+4], %r6;
    red.global.max.u32 [%ptr0+8], %r6;
    red.global.xor.b32 [%ptr0+12], %r6;
    red.release.gpu.global.or.b32 [%ptr0+16], %r5;
    atom.add.acq_rel.gpu.global.s32 %r7, [%ptr0+20], 1;
    atom.global.add.f32 %r8, [%ptr0+24], 0f3F800000;
    red.global.inc.u32 [%ptr0+28], 100;
    """
    body = body.replace("atom.add.acq_rel.gpu.global.s32", "atom.acq_rel.gpu.global.add.s32")
    return Case(
        name="atomic/contended",
        ptx=kernel(body, pointers=1, threads=64, shared=False),
        buffers={"memory": np.zeros(8, dtype=np.uint32)},
        outputs=("memory",),
        grid=(4, 1, 1),
        block=64,
    )


def vector_reductions() -> Iterator[Case]:
    forms = {
        "v2.f32.add": ("f32", 8, "r", 2),
        "v4.f32.add": ("f32", 16, "r", 4),
        "v2.bf16x2.add.noftz": ("bf16", 8, "r", 2),
        "v4.bf16x2.add.noftz": ("bf16", 16, "r", 4),
        "v4.f16x2.add.noftz": ("f16", 16, "r", 4),
        "v4.bf16.add.noftz": ("bf16", 8, "h", 4),
        "v8.bf16.add.noftz": ("bf16", 16, "h", 8),
        "v2.f16.add.noftz": ("f16", 4, "h", 2),
        "v4.bf16x2.min.noftz": ("bf16", 16, "r", 4),
        "v4.f16x2.max.noftz": ("f16", 16, "r", 4),
    }
    for i, (form, (dtype, width, kind, count)) in enumerate(forms.items()):
        bits = "b32" if kind == "r" else "b16"
        step = width // count
        loads = "\n".join(f"ld.global.{bits} %{kind}{10 + j}, [%d4+{step * j}];" for j in range(count))
        names = "{" + ", ".join(f"%{kind}{10 + j}" for j in range(count)) + "}"
        olds = "{" + ", ".join(f"%{kind}{20 + j}" for j in range(count)) + "}"
        stores = "\n".join(f"st.global.{bits} [%d5+{step * j}], %{kind}{20 + j};" for j in range(count))
        vector, element, operation, *rest = form.split(".")
        tail = ".".join([operation, *rest, vector, element])
        body = f"""
        mul.wide.u32 %d2, %tix, {width};
        add.u64 %d3, %ptr0, %d2;
        add.u64 %d4, %ptr1, %d2;
        add.u64 %d5, %ptr2, %d2;
        {loads}
        atom.global.{tail} {olds}, [%d3], {names};
        {stores}
        red.global.{tail} [%d3], {names};
        """
        n = 32 * width // (4 if dtype == "f32" else 2)
        yield Case(
            name=f"atomic/{form}",
            ptx=kernel(body, pointers=3, shared=False),
            buffers={
                "memory": float_data(dtype, 641 + i, n),
                "source": float_data(dtype, 661 + i, n),
                "old": sentinel(32 * width),
            },
            outputs=("memory", "old"),
        )


def load_store_cases() -> Iterator[Case]:
    """Vector and narrow loads and stores, sign extension, cache operators."""
    forms = {
        "b8": ("h", 1, 1),
        "v2.b8": ("h", 2, 1),
        "v4.b8": ("h", 4, 1),
        "b16": ("h", 1, 2),
        "v2.b16": ("h", 2, 2),
        "v4.b16": ("h", 4, 2),
        "b32": ("r", 1, 4),
        "v2.b32": ("r", 2, 4),
        "v4.b32": ("r", 4, 4),
        "b64": ("d", 1, 8),
        "v2.b64": ("d", 2, 8),
        "v4.u32": ("r", 4, 4),
        "v2.f32": ("r", 2, 4),
        "v4.f32": ("r", 4, 4),
        "v4.u16": ("h", 4, 2),
    }
    for form, (kind, count, size) in forms.items():
        for operators in (("global", "global"), ("global.nc", "global"), ("shared", "shared"), ("", "")):
            width = count * size
            names = ", ".join(f"%{kind}{10 + j}" for j in range(count))
            names = "{" + names + "}" if count > 1 else names
            load_space, store_space = ("." + name if name else "" for name in operators)
            if load_space == ".shared":
                body = f"""
                mul.lo.u32 %r0, %tix, {width};
                cvt.u64.u32 %d0, %r0;
                add.u64 %d1, %ptr0, %d0;
                add.u64 %d2, %ptr1, %d0;
                add.u32 %r1, %smem, %r0;
                ld.global.{form} {names}, [%d2];
                st.shared.{form} [%r1], {names};
                bar.sync 0;
                xor.b32 %r2, %r0, {width};
                add.u32 %r2, %r2, %smem;
                ld.shared.{form} {names}, [%r2];
                st.global.{form} [%d1], {names};
                """
            else:
                body = f"""
                mul.wide.u32 %d0, %tix, {width};
                add.u64 %d1, %ptr0, %d0;
                add.u64 %d2, %ptr1, %d0;
                ld{load_space}.{form} {names}, [%d2+{width}];
                st{store_space}.{form} [%d1], {names};
                """
            space = operators[0].replace(".", "_") or "generic"
            yield Case(
                name=f"load_store/{form}_{space}",
                ptx=kernel(body, pointers=2, shared=space == "shared"),
                buffers={"out": sentinel(32 * width), "source": random_bytes(681, 33 * width)},
                outputs=("out",),
                shared_bytes=32 * width if space == "shared" else 0,
            )
    yield extension_case()
    yield cache_operator_case()
    yield generic_shared_case()


def extension_case() -> Case:
    """Narrow loads into wide registers: signed ones extend the sign. Stores keep the low bits."""
    lines = []
    loads: tuple[tuple[str, str], ...] = (
        ("u8", "r"),
        ("s8", "r"),
        ("u16", "r"),
        ("s16", "r"),
        ("s8", "h"),
        ("u8", "h"),
        ("s32", "d"),
        ("u32", "d"),
    )
    loads += (("s8", "d"), ("u16", "d"), ("s16", "d"))
    for i, (kind, register) in enumerate(loads):
        name = f"%{register}20"
        lines.append(f"ld.global.{kind} {name}, [%d2];")
        if register == "h":
            lines.append(f"mov.b32 %r21, {{{name}, {name}}};\ncvt.u64.u32 %d20, %r21;")
        elif register == "r":
            lines.append("cvt.u64.u32 %d20, %r20;")
        lines.append(f"st.global.b64 [%d1+{256 * i}], %d20;")
    n = len(loads)
    lines.append("ld.global.b32 %r20, [%d2];\nld.global.b64 %d21, [%d2];\nmov.b64 %d20, -1;")
    lines.append(f"st.global.b64 [%d1+{256 * n}], %d20;\nst.global.b8 [%d1+{256 * n}], %r20;")
    lines.append(f"st.global.b64 [%d1+{256 * n + 256}], %d20;\nst.global.b16 [%d1+{256 * n + 256}], %r20;")
    lines.append(f"st.global.b64 [%d1+{256 * n + 512}], %d20;\nst.global.b32 [%d1+{256 * n + 512}], %d21;")
    body = "mul.wide.u32 %d0, %tix, 8;\nadd.u64 %d1, %ptr0, %d0;\nadd.u64 %d2, %ptr1, %d0;\n" + "\n".join(lines)
    return Case(
        name="load_store/extension",
        ptx=kernel(body, pointers=2, shared=False),
        buffers={"out": sentinel(256 * (n + 3)), "source": random_bytes(682, 256)},
        outputs=("out",),
    )


def cache_operator_case() -> Case:
    loads = (
        "ld.global.ca.b32",
        "ld.global.cg.b32",
        "ld.global.cs.b32",
        "ld.volatile.global.b32",
        "ld.relaxed.gpu.global.b32",
        "ld.acquire.gpu.global.b32",
        "ld.acquire.sys.global.b32",
        "ld.global.L1::no_allocate.b32",
        "ld.global.nc.L1::no_allocate.L2::128B.b32",
        "ld.global.L1::evict_last.b32",
        "ld.weak.global.b32",
    )
    stores = (
        "st.global.wb.b32",
        "st.global.cg.b32",
        "st.global.cs.b32",
        "st.volatile.global.b32",
        "st.relaxed.gpu.global.b32",
        "st.release.gpu.global.b32",
        "st.release.sys.global.b32",
        "st.global.L1::no_allocate.b32",
        "st.weak.global.b32",
        "st.relaxed.sys.global.b32",
        "st.global.b32",
    )
    body = ""
    for i, (load, store) in enumerate(zip(loads, stores, strict=True)):
        body += f"{load} %r3, [%d2+{4 * i}];\n{store} [%d1+{128 * i}], %r3;\n"
    body += "prefetch.global.L2 [%d2];\nprefetchu.L1 [%d2];\n"
    body += "createpolicy.fractional.L2::evict_first.b64 %d5, 1.0;\n"
    body += f"ld.global.L2::cache_hint.b32 %r3, [%d2], %d5;\nst.global.L2::cache_hint.b32 [%d1+{128 * 11}], %r3, %d5;\n"
    return warp_case("load_store/cache_operators", body, 12)


def generic_shared_case() -> Case:
    """Shared memory through generic addresses."""
    body = """
    shl.b32 %r0, %tix, 2;
    cvt.u64.u32 %d0, %r0;
    add.u64 %d1, %ptr0, %d0;
    cvt.u64.u32 %d3, %smem;
    cvta.shared.u64 %d4, %d3;
    add.u64 %d5, %d4, %d0;
    mul.lo.u32 %r1, %tix, 77;
    st.b32 [%d5], %r1;
    bar.warp.sync 0xffffffff;
    xor.b32 %r2, %r0, 12;
    add.u32 %r2, %r2, %smem;
    ld.shared.b32 %r3, [%r2];
    st.global.b32 [%d1], %r3;
    """
    return Case(
        name="load_store/generic_shared",
        ptx=kernel(body, pointers=1),
        buffers={"out": sentinel(128)},
        outputs=("out",),
        shared_bytes=128,
    )


def launch_cases() -> Iterator[Case]:
    """Instructions that must run but change no result."""
    body = """
    setp.lt.u32 %p0, %tix, 128;
    @!%p0 bra CONSUMER;
    setmaxnreg.dec.sync.aligned.u32 40;
    mov.b32 %r1, 1;
    bra.uni JOIN;
    CONSUMER:
    setmaxnreg.inc.sync.aligned.u32 232;
    mov.b32 %r1, 2;
    JOIN:
    mul.wide.u32 %d0, %tix, 4;
    add.u64 %d1, %ptr0, %d0;
    st.global.b32 [%d1], %r1;
    """
    yield Case(
        name="launch/setmaxnreg",
        ptx=kernel(body, pointers=1, threads=384, shared=False, directives=".minnctapersm 1\n"),
        buffers={"out": sentinel(1536)},
        outputs=("out",),
        block=384,
    )
    for programmatic in (False, True):
        body = """
        griddepcontrol.wait;
        mul.wide.u32 %d0, %tix, 4;
        add.u64 %d1, %ptr0, %d0;
        st.global.b32 [%d1], %tix;
        griddepcontrol.launch_dependents;
        nanosleep.u32 20;
        """
        yield Case(
            name=f"launch/griddepcontrol{'_programmatic' if programmatic else ''}",
            ptx=kernel(body, pointers=1, shared=False),
            buffers={"out": sentinel(128)},
            outputs=("out",),
            programmatic=programmatic,
        )
    yield from control_flow_cases()


def control_flow_cases() -> Iterator[Case]:
    """Divergent loops and nested branches reconverge with every lane's own trip count."""
    body = """
    and.b32 %r3, %r1, 15;
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
    AGAIN:
    setp.ge.u32 %p0, %r4, %r3;
    @%p0 bra OUT;
    and.b32 %r6, %r4, 1;
    setp.eq.u32 %p1, %r6, 0;
    @%p1 bra EVEN;
    mad.lo.u32 %r5, %r5, 3, %r4;
    bra NEXT;
    EVEN:
    add.u32 %r5, %r5, %r2;
    NEXT:
    add.u32 %r4, %r4, 1;
    bra AGAIN;
    OUT:
    bar.warp.sync 0xffffffff;
    st.global.b32 [%d1], %r5;
    """
    yield warp_case("control/divergent_loop", body, 1)
    body = """
    {
    .reg .b32 %r1;
    .reg .pred p;
    mov.b32 %r1, 5;
    setp.gt.u32 p, %tix, %r1;
    @p st.global.b32 [%d1], %r1;
    }
    @!%p0 bra SKIP;
    SKIP:
    st.global.b32 [%d1+128], %r1;
    """
    body = body.replace("@!%p0 bra SKIP;\n    SKIP:\n", "")
    yield warp_case("control/scoped_registers", body, 2)


def cases() -> Iterator[Case]:
    yield from shfl_cases()
    yield from vote_cases()
    yield from match_and_redux_cases()
    yield from atomic_cases()
    yield from load_store_cases()
    yield from launch_cases()
