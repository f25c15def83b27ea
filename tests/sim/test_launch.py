"""The static checks of a launch, on a hand-written header with one fault at a time."""

from dataclasses import replace

import pytest

from ptxsim.launch import Launch, PtxHeaderError, check_launch, entry_header

PTX = """
.version 9.0
.target sm_100a
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.shared .align 16 .b8 table[100];
.shared .align 8 .b64 barrier;
.shared .b32 unused[1000];
.visible .entry other( .param .u32 other_0 ) { ret; }   // .entry commented(
.visible .entry kern$1(
    .param .align 64 .b8 kern$1_param_0[128],
    .param .u64 .ptr .global .align 128 kern$1_param_1,
    .param .b8 kern$1_param_2[3],
    .param .f32 kern$1_param_3
)
.reqntid 128, 1, 1
.minnctapersm 1
{
    { mov.u32 %r1, table; }
    mov.u32 %r2, barrier; /* unused */
    ret;
}
.visible .entry clustered()
.maxntid 64
.explicitcluster
.reqnctapercluster 2, 1, 1
{ ret; }
"""
GOOD = Launch(
    PTX,
    "kern$1",
    grid=(8, 2, 1),
    block=(128, 1, 1),
    cluster=(2, 1, 1),
    shared_bytes=200_000,
    params=(bytes(128), bytes(8), bytes(3), bytes(4)),
    attributes={"max_dynamic_shared_bytes": 232448},
)


def test_header():
    header = entry_header(PTX, "kern$1")
    assert header.param_sizes == (128, 8, 3, 4)
    assert header.reqntid == (128, 1, 1)
    assert header.maxntid is header.reqnctapercluster is None
    # 100 bytes, then 8 aligned to 8.
    assert header.static_shared_bytes == 112


def test_header_of_entry_without_parameters():
    header = entry_header(PTX, "clustered")
    assert header.param_sizes == ()
    assert header.maxntid == (64, 1, 1)
    assert header.reqnctapercluster == (2, 1, 1)
    assert header.static_shared_bytes == 0


def test_missing_entry_names_those_there_are():
    with pytest.raises(PtxHeaderError, match=r"no entry 'absent'.*'other', 'kern\$1', 'clustered'"):
        entry_header(PTX, "absent")


def test_unknown_parameter_form():
    with pytest.raises(PtxHeaderError, match="unknown"):
        entry_header(".entry bad(.param .texref t) { ret; }", "bad")
    with pytest.raises(PtxHeaderError, match=r"type \.b7"):
        entry_header(".entry bad(.param .b7 t) { ret; }", "bad")


def test_cut_off_text():
    with pytest.raises(PtxHeaderError, match="balanced"):
        entry_header(".entry bad() { { ret; }", "bad")


def test_good_launch():
    assert check_launch(GOOD) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (0, 1, 1)}, "grid"),
        ({"grid": (2, 65536, 1)}, "grid"),
        ({"block": (64, 1, 1)}, "reqntid"),
        ({"block": (128, 1, 65)}, "block"),
        ({"block": (1024, 2, 1)}, "2048 threads"),
        ({"shared_bytes": 232448}, "232448 bytes of dynamic and 112 of static"),
        ({"attributes": {}}, "cudaFuncAttributeMaxDynamicSharedMemorySize"),
        ({"attributes": {"max_dynamic_shared_bytes": 199_999}}, "limit is 199999"),
        ({"cluster": (3, 1, 1)}, "not a multiple"),
        ({"cluster": (8, 2, 1)}, "16 CTAs, at most 8"),
        ({"cluster": (0, 1, 1)}, "at least 1"),
        ({"params": GOOD.params[:-1]}, "3 parameters given, kern\\$1 has 4"),
        ({"params": (*GOOD.params[:-1], bytes(8))}, "parameter 3 has 8 bytes"),
    ],
)
def test_fault(change, message):
    findings = check_launch(replace(GOOD, **change))
    assert {code for code, _ in findings} == {"launch"}
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(" ".join(text for _, text in findings))


def test_limits_are_inclusive():
    attributes = {"max_dynamic_shared_bytes": 232448}
    assert check_launch(replace(GOOD, shared_bytes=232448 - 112, attributes=attributes)) == []
    # Without the attribute, 48 KiB are shared by static and dynamic memory.
    assert check_launch(replace(GOOD, shared_bytes=48 * 1024 - 112, attributes={})) == []
    assert check_launch(replace(GOOD, shared_bytes=48 * 1024 - 111, attributes={})) != []


def test_nonportable_cluster():
    big = replace(GOOD, cluster=(8, 2, 1), attributes={"max_dynamic_shared_bytes": 232448, "nonportable_cluster": 1})
    assert check_launch(big) == []
    [(_, message)] = check_launch(replace(big, cluster=(8, 2, 2), grid=(8, 2, 2)))
    assert "32 CTAs, at most 16" in message


def test_required_cluster_and_maxntid():
    launch = Launch(PTX, "clustered", grid=(4, 1, 1), block=(64, 1, 1), cluster=(2, 1, 1))
    assert check_launch(launch) == []
    assert "reqnctapercluster" in check_launch(replace(launch, cluster=(4, 1, 1)))[0][1]
    assert "maxntid" in check_launch(replace(launch, block=(65, 1, 1)))[0][1]


def test_too_many_parameter_bytes():
    ptx = ".entry big(.param .b8 a[32764], .param .b8 b[1]) { ret; }"
    launch = Launch(ptx, "big", (1, 1, 1), (1, 1, 1), params=(bytes(32764), bytes(1)))
    assert check_launch(launch) == [("launch", "32765 bytes of parameters, at most 32764 are possible")]
