"""The parser: what compilers write, and what it refuses."""

import struct

import pytest

from ptxsim import ptx
from ptxsim.findings import Unsupported
from ptxsim.ptx import Address, Imm, Label, Not, Pair, Reg, Sink, Special, Symbol, TensorAddress, Vector

HEADER = ".version 8.8\n.target sm_100a\n.address_size 64\n"


def body(text, head="", tail=""):
    return ptx.parse(f"{HEADER}{head}.visible .entry k()\n{{\n{text}\n}}\n{tail}").kernels["k"]


def one(text, declared=""):
    registers = ".reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<4>; .reg .b16 %rs<4>;"
    return body(f"{registers}{declared}\n{text}").instructions[0]


def names(operand):
    return operand.name if isinstance(operand, Reg | Special | Symbol | Label) else operand


def test_guards_pairs_sinks_and_negations():
    ins = one("@!%p1 elect.sync _|%p2, -1;")
    assert (ins.guard.name, ins.guard_negated, ins.parts) == ("%p1", True, ("elect", "sync"))
    pair, mask = ins.operands
    assert isinstance(pair, Pair)
    assert isinstance(pair.first, Sink)
    assert pair.second.name == "%p2"
    assert mask.bits(32) == 0xFFFFFFFF
    assert isinstance(one("selp.b32 %r1, 1, 0, !%p1;").operands[3], Not)


def test_addresses_vectors_and_tensor_addresses():
    ins = one(
        "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4+-8];"
    )
    dst, source, bar = ins.operands
    assert dst == Address(dst.base, 0)
    assert isinstance(source, TensorAddress)
    assert [reg.name for reg in source.vectors[0].items] == ["%r2", "%r3"]
    assert (bar.base.name, bar.offset) == ("%r4", -8)
    vector = one("mov.b64 {%r1, _}, %rd1;").operands[0]
    assert isinstance(vector, Vector)
    assert isinstance(vector.items[1], Sink)
    assert one("ld.shared.b32 %r1, [128];").operands[1] == Address(Imm("128"), 0)


def test_inline_assembly_reuses_names_in_its_own_scope():
    spin = "{ .reg .pred P1; LAB_WAIT: mov.pred P1, -1; @P1 bra.uni DONE; bra.uni LAB_WAIT; DONE: }"
    kernel = body(f"{spin}\n{spin}\nret;")
    branches = [ins for ins in kernel.instructions if ins.parts[0] == "bra"]
    targets = [kernel.labels[ins.operands[0].name] for ins in branches]
    assert targets == [3, 0, 6, 3]
    predicates = {ins.guard.index for ins in branches if ins.guard}
    assert len(predicates) == 2


def test_vector_registers_are_their_elements():
    kernel = body(".reg .v4 .s32 abcd; .reg .b32 %r1;\nmov.s32 abcd.y, %r1;\nst.shared.v4.b32 [%r1], abcd;")
    first, second = kernel.instructions
    assert isinstance(second.operands[1], Vector)
    assert second.operands[1].items[1] is first.operands[0]


def test_lines_and_sources_are_kept():
    kernel = body(
        ".reg .b32 %r<4>;\n.loc 1 17 3\nmov.b32 %r1, 1;\n.loc 1 0 0\nmov.b32 %r2, 2;",
        tail='.file 1 "/some/kernel.py"\n',
    )
    first, second = kernel.instructions
    assert first.source == ("/some/kernel.py", 17)
    assert second.source is None
    assert first.line == 8


def test_comments_do_not_shift_lines():
    kernel = body("// one\n/* two\n three */ .reg .b32 %r<4>;\nmov.b32 %r1, 1; // four\n")
    assert kernel.instructions[0].line == 9


@pytest.mark.parametrize(
    ("text", "width", "bits"),
    [
        ("-1", 32, 0xFFFFFFFF),
        ("-1", 64, 0xFFFFFFFFFFFFFFFF),
        ("0x1F", 32, 31),
        ("017", 32, 15),
        ("0b101", 16, 5),
        ("0f3F800000", 32, 0x3F800000),
        ("0f3F800000", 64, struct.unpack("<Q", struct.pack("<d", 1.0))[0]),
        ("0d3FF0000000000000", 64, 0x3FF0000000000000),
        ("0dBFF8000000000000", 64, 0xBFF8000000000000),
        ("1.5", 32, struct.unpack("<I", struct.pack("<f", 1.5))[0]),
        ("10U", 32, 10),
    ],
)
def test_literals(text, width, bits):
    assert Imm(text).bits(width) == bits


def test_parameters_and_directives():
    text = f"""{HEADER}
.visible .entry k(
    .param .align 4 .b8 k_param_0[3],
    .param .u64 .ptr .global .align 128 k_param_1,
    .param .align 64 .b8 k_param_2[128],
    .param .u32 k_param_3,
    .param .u64 .ptr .align 16 k_param_4
)
.reqntid 192, 1, 1
.minnctapersm 1
.reqnctapercluster 2, 1, 1
{{
ret;
}}
"""
    kernel = ptx.parse(text).kernels["k"]
    assert [(p.num_bytes, p.align, p.offset) for p in kernel.params] == [
        (3, 4, 0),
        (8, 8, 8),
        (128, 64, 64),
        (4, 4, 192),
        (8, 8, 200),
    ]
    assert kernel.reqntid == (192, 1, 1)
    assert kernel.reqnctapercluster == (2, 1, 1)
    assert kernel.directives["minnctapersm"] == (1,)


def test_module_and_kernel_variables():
    module = ptx.parse(
        f"""{HEADER}
.extern .shared .align 1024 .b8 dyn[];
.global .align 4 .b32 table[3] = {{1, 2, 0xFF}};
.visible .entry k()
{{
.shared .align 16 .b8 tile[64];
ret;
}}
"""
    )
    assert module.variables["dyn"].num_bytes == 0
    assert module.variables["dyn"].align == 1024
    assert module.variables["table"].init == struct.pack("<3I", 1, 2, 255)
    assert module.kernels["k"].variables["tile"].num_bytes == 64


def test_branch_tables():
    kernel = body(".reg .b32 %r<2>;\nbrx.idx %r1, ts;\nts: .branchtargets A, B;\nA: ret;\nB: ret;")
    assert kernel.tables == {"ts": ("A", "B")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mov.b32 %r9, 1;", "%r9 is not declared"),
        (".strange 1;", r"directive \.strange"),
        ("ld.global.b32 %r1, [%r1*4];", "not understood|not a register"),
        ("@%tid.x mov.b32 %r1, 1;", "not a register"),
    ],
)
def test_unknown_syntax_is_refused(text, message):
    with pytest.raises(Unsupported, match=message):
        one(text)


def test_not_ptx():
    with pytest.raises(Unsupported, match="not a PTX file"):
        ptx.parse("hello")
