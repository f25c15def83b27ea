"""Exchange between the lanes of a warp, against the pseudo-code of the PTX ISA written lane by lane."""

import itertools
import random

import exact
import numpy as np
import pytest
from handlers import FakeWarp, Fatal, effect, from_value, to_value

from ptxsim.findings import DIVERGENCE, Unsupported

FULL = 0xFFFFFFFF


def lanes(mask):
    return [i for i in range(32) if mask >> i & 1]


def column(seed, width=32, limit=None):
    source = random.Random(seed)
    return [source.getrandbits(width) if limit is None else source.randrange(limit) for _ in range(32)]


def shuffle(mode, a, b, c):
    out, inside = [], []
    for lane in range(32):
        offset, clamp, segment = b[lane] & 31, c[lane] & 31, c[lane] >> 8 & 31
        top = (lane & segment) | (clamp & ~segment & 31)
        low = lane & segment
        if mode == "up":
            source = lane - offset
            ok = source >= top
        elif mode == "down":
            source = lane + offset
            ok = source <= top
        elif mode == "bfly":
            source = lane ^ offset
            ok = source <= top
        else:
            source = low | (offset & ~segment & 31)
            ok = source <= top
        out.append(a[source if ok else lane])
        inside.append(int(ok))
    return out, inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode):
    a = column(1)
    # Segments of 32, 16, 8 and 4 lanes, as compilers write them: ((32 - size) << 8) | limit.
    for size, offset in itertools.product((32, 16, 8, 4), (0, 1, 2, 3, 5, 8, 16, 31)):
        clamp = (32 - size) << 8 | (0 if mode == "up" else 31)
        want, inside = shuffle(mode, a, [offset] * 32, [clamp] * 32)
        item = effect(f"shfl.sync.{mode}.b32 %r0|%p0, %r1, {offset}, {clamp}, -1")
        got, ok = item.run(FakeWarp(), FULL, to_value(a, 32), offset, clamp, FULL)
        assert from_value(got, 32) == want
        assert from_value(ok, 1) == inside
        plain = effect(f"shfl.sync.{mode}.b32 %r0, %r1, %r2, %r3, %r4")
        assert from_value(plain.run(FakeWarp(), FULL, to_value(a, 32), offset, clamp, FULL), 32) == want
        assert plain.run(FakeWarp(), FULL, 77, offset, clamp, FULL) == 77
    offsets, clamps = column(2), column(3, limit=1 << 13)
    want, _ = shuffle(mode, a, offsets, clamps)
    plain = effect(f"shfl.sync.{mode}.b32 %r0, %r1, %r2, %r3, %r4")
    got = plain.run(FakeWarp(), FULL, *(to_value(c, 32) for c in (a, offsets, clamps)), FULL)
    assert from_value(got, 32) == want


def test_shfl_broadcast_is_uniform():
    item = effect("shfl.sync.idx.b32 %r0, %r1, 3, 31, -1")
    got = item.run(FakeWarp(), FULL, to_value(column(4), 32), 3, 31, FULL)
    assert type(got) is int
    assert got == column(4)[3]


def test_shfl_reports_dead_sources():
    item = effect("shfl.sync.idx.b32 %r0, %r1, 3, 31, %r2")
    w = FakeWarp()
    item.run(w, 0xF0, to_value(column(4), 32), 3, 31, 0xF0)
    assert [code for code, _, _ in w.findings] == [DIVERGENCE]
    assert "lane 4 reads lane 3" in w.findings[0][1]
    w = FakeWarp()
    assert from_value(item.run(w, 0xF8, to_value(column(4), 32), 3, 31, 0xF8), 32)[5] == column(4)[3]
    assert not w.findings


@pytest.mark.parametrize(
    "text",
    [
        "shfl.sync.idx.b32 %r0, %r1, 0, 31, -1",
        "vote.sync.ballot.b32 %r0, %p1, -1",
        "vote.sync.any.pred %p0, %p1, -1",
        "match.any.sync.b32 %r0, %r1, -1",
        "redux.sync.add.u32 %r0, %r1, -1",
        "elect.sync %r0|%p0, -1",
    ],
)
def test_members_must_execute(text):
    """A part of the member mask is fatal; exited lanes do not count; lanes outside of the mask are reported."""
    item = effect(text)
    args = [5] * (len(item.srcs) - 1)
    with pytest.raises(Fatal):
        item.run(FakeWarp(), 0xFFFF, *args, FULL)
    w = FakeWarp(active=0xFFFF)
    item.run(w, 0xFFFF, *args, FULL)
    assert not w.findings
    w = FakeWarp()
    item.run(w, FULL, *args, 0xFFFF)
    assert [code for code, _, _ in w.findings] == [DIVERGENCE]


def test_vote():
    for seed, members in itertools.product(range(6), (FULL, 0x0000FFFF, 0x80000001)):
        flags = (0, FULL, members, random.Random(seed).getrandbits(32), 1, members & ~1)[seed]
        w = FakeWarp()
        taking = [flags >> i & 1 for i in lanes(members)]
        want = {"all": all(taking), "any": any(taking), "uni": len(set(taking)) == 1}
        for mode, expected in want.items():
            got = effect(f"vote.sync.{mode}.pred %p0, %p1, %r1").run(w, members, flags, members)
            assert got & members == (members if expected else 0), mode
        assert effect("vote.sync.ballot.b32 %r0, %p1, %r1").run(w, members, flags, members) == flags & members
        assert not w.findings


def test_groups_with_their_own_masks():
    """Lanes may form groups: each passes its own member mask."""
    groups = [0x000000FF, 0x0F00FF00, 0xF0FF0000]
    members = [next(g for g in groups if g >> i & 1) for i in range(32)]
    value, flags = column(9, limit=3), random.Random(9).getrandbits(32)
    w = FakeWarp()
    ballot = from_value(effect("vote.sync.ballot.b32 %r0, %p1, %r1").run(w, FULL, flags, to_value(members, 32)), 32)
    assert ballot == [flags & m for m in members]
    total = from_value(
        effect("redux.sync.add.u32 %r0, %r1, %r2").run(w, FULL, to_value(value, 32), to_value(members, 32)), 32
    )
    assert total == [sum(value[i] for i in lanes(m)) for m in members]
    same = from_value(
        effect("match.any.sync.b32 %r0, %r1, %r2").run(w, FULL, to_value(value, 32), to_value(members, 32)), 32
    )
    assert same == [sum(1 << j for j in lanes(members[i]) if value[j] == value[i]) for i in range(32)]
    leader, chosen = effect("elect.sync %r0|%p0, %r1").run(w, FULL, to_value(members, 32))
    assert from_value(leader, 32) == [lanes(m)[0] for m in members]
    assert chosen == sum(g & -g for g in groups)
    assert not w.findings


def test_match():
    for width in (32, 64):
        value = column(width, limit=4)
        w = FakeWarp()
        got = effect(f"match.any.sync.b{width} %r0, {'%rd' if width == 64 else '%r'}1, -1").run(
            w, FULL, to_value(value, width), FULL
        )
        assert from_value(got, 32) == [sum(1 << j for j in range(32) if value[j] == v) for v in value]
        every = effect(f"match.all.sync.b{width} %r0|%p0, {'%rd' if width == 64 else '%r'}1, -1")
        assert every.run(w, FULL, to_value(value, width), FULL) == (0, 0)
        assert every.run(w, FULL, 9, FULL) == (FULL, FULL)
        assert every.run(w, 0xFF, 9, 0xFF) == (0xFF, 0xFF)


def test_redux():
    value = column(11)
    signed = [v - (v >> 31 << 32) for v in value]
    for members in (FULL, 0x00FFFF00, 1 << 17):
        picked, picked_signed = ([c[i] for i in lanes(members)] for c in (value, signed))
        both = np.array(picked, np.uint32)
        want = {
            "add.u32": sum(picked) & FULL,
            "add.s32": sum(picked) & FULL,
            "min.u32": min(picked),
            "max.u32": max(picked),
            "min.s32": min(picked_signed) & FULL,
            "max.s32": max(picked_signed) & FULL,
            "and.b32": int(np.bitwise_and.reduce(both)),
            "or.b32": int(np.bitwise_or.reduce(both)),
            "xor.b32": int(np.bitwise_xor.reduce(both)),
        }
        for op, expected in want.items():
            item = effect(f"redux.sync.{op} %r0, %r1, %r2")
            assert item.run(FakeWarp(), members, to_value(value, 32), members) == expected, op
    assert effect("redux.sync.add.u32 %r0, %r1, -1").run(FakeWarp(), FULL, 3, FULL) == 96


def test_redux_of_floats():
    rng = np.random.default_rng(0)
    value = rng.standard_normal(32).astype(np.float32)
    bits = value.view(np.uint32)

    def run(op, data):
        return effect(f"redux.sync.{op}.f32 %r0, %r1, -1").run(FakeWarp(), FULL, data, FULL)

    assert run("max", bits) == int(value.max().view(np.uint32))
    assert run("min", bits) == int(value.min().view(np.uint32))
    assert run("max.abs", bits) == int(np.abs(value).max().view(np.uint32))
    nan = bits.copy()
    nan[[3, 7]] = 0xFFC00001
    rest = np.delete(value, [3, 7])
    assert run("max", nan) == int(rest.max().view(np.uint32))
    assert run("max.NaN", nan) == exact.F32.nan
    assert run("min", np.full(32, 0xFFC00001, np.uint32)) == exact.F32.nan
    zeros = np.zeros(32, np.uint32)
    zeros[5] = 0x80000000
    assert run("max", zeros) == 0
    assert run("min", zeros) == 0x80000000


def test_elect_and_activemask():
    item = effect("elect.sync %r0|%p0, -1")
    assert item.run(FakeWarp(), FULL, FULL) == (0, 1)
    assert item.run(FakeWarp(active=0xFF00), 0xFF00, FULL) == (8, 0x100)
    assert effect("elect.sync _|%p0, 0xf0").run(FakeWarp(), 0xF0, 0xF0) == (4, 0x10)
    assert effect("activemask.b32 %r0").run(FakeWarp(), 0xF0F0) == 0xF0F0


@pytest.mark.parametrize(
    "bad",
    [
        "shfl.idx.b32 %r0, %r1, 0, 31",
        "shfl.sync.idx.b64 %rd0, %rd1, 0, 31, -1",
        "vote.all.pred %p0, %p1",
        "vote.sync.ballot.pred %p0, %p1, -1",
        "redux.sync.and.u32 %r0, %r1, -1",
        "redux.sync.max.NaN.s32 %r0, %r1, -1",
        "match.any.sync.b32 %r0|%p0, %r1, -1",
        "elect.sync %r0, -1",
    ],
)
def test_unknown_forms_are_refused(bad):
    with pytest.raises(Unsupported):
        effect(bad)
