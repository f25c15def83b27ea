"""The public surface: simulate, run, reports, traces, the command line, the matrix fixture."""

import json
import subprocess
import sys
from pathlib import Path

import asm_kit
import numpy as np
import pytest

import ptxsim
from ptxsim.launch import Launch
from ptxsim.memory import Buffer
from ptxsim.testing import Matrix

COPY = """.version 8.7
.target sm_100a
.address_size 64
.visible .entry copy(.param .u64 src, .param .u64 dst)
{
.reg .b32 %r<8>;
.reg .b64 %rd<8>;
mov.u32 %r1, %tid.x;
mov.u32 %r2, %tid.y;
mov.u32 %r3, %ntid.x;
mad.lo.s32 %r4, %r2, %r3, %r1;
mul.wide.u32 %rd1, %r4, 4;
ld.param.u64 %rd2, [src];
ld.param.u64 %rd3, [dst];
add.s64 %rd2, %rd2, %rd1;
add.s64 %rd3, %rd3, %rd1;
ld.global.b32 %r5, [%rd2];
st.global.b32 [%rd3], %r5;
ret;
}
"""


def launch(src, dst, block=(32, 2, 1), **kwargs):
    pointers = tuple(int(a.ctypes.data).to_bytes(8, "little") for a in (src, dst))
    return Launch(COPY, "copy", (1, 1, 1), block, params=pointers, **kwargs)


def arrays(size=64):
    return np.arange(size, dtype=np.uint32), np.full(size, 0xDEADBEEF, np.uint32)


def test_two_dimensional_block():
    src, dst = arrays()
    ptxsim.simulate(launch(src, dst), [Buffer.of(src, "src"), Buffer.of(dst, "dst")]).check()
    assert (dst == src).all()


def test_missing_output_is_named_with_its_first_byte():
    src, dst = arrays(80)
    buffers = [Buffer.of(src, "src"), Buffer.of(dst, "dst", initialised=False, must_be_written=True)]
    report = ptxsim.simulate(launch(src, dst), buffers)
    assert report.codes() == {"output-not-written"}
    assert "dst: 64 of 320 bytes were not written, the first at byte 256" in report.findings[0].message


def test_two_incomplete_outputs_are_two_findings():
    src, dst = arrays(80)
    other = np.zeros(4, np.uint32)
    buffers = [Buffer.of(src, "src")] + [
        Buffer.of(a, n, initialised=False, must_be_written=True) for a, n in ((dst, "dst"), (other, "other"))
    ]
    assert len(ptxsim.simulate(launch(src, dst), buffers).findings) == 2


def test_a_finding_has_place_and_line():
    src, dst = arrays(40)
    report = ptxsim.simulate(launch(src, dst), [Buffer.of(src, "src"), Buffer.of(dst, "dst")])
    finding = report.findings[0]
    assert (finding.code, finding.kernel, finding.cta, finding.warp) == ("out-of-bounds", "copy", 0, 1)
    assert COPY.splitlines()[finding.ptx_line - 1].startswith("ld.global")
    with pytest.raises(ptxsim.FindingsError, match=r"out-of-bounds.*CTA 0, warp 1, PTX line 17"):
        report.check()


def test_the_same_finding_in_a_loop_is_one():
    body = """
mov.b32 %r1, 0;
L:
ld.shared.b32 %r2, [%sm];
add.s32 %r1, %r1, 1;
setp.lt.u32 %p1, %r1, 5;
@%p1 bra L;
"""
    assert len(asm_kit.run(body).findings) == 1


def test_static_launch_faults_end_the_run_before_it_starts():
    src, dst = arrays()
    report = ptxsim.simulate(launch(src, dst, shared_bytes=300_000), [Buffer.of(src), Buffer.of(dst)])
    assert report.codes() == {"launch"}
    assert (dst == 0xDEADBEEF).all()


def test_unknown_entry():
    src, dst = arrays()
    bad = Launch(COPY, "nothing", (1, 1, 1), (32, 1, 1))
    with pytest.raises(ValueError, match="nothing"):
        ptxsim.simulate(bad, [Buffer.of(src), Buffer.of(dst)])


@pytest.fixture(scope="module")
def twice():
    """A host function that launches two kernels: target = scale * source, then source = (scale + 1) * target."""
    import cutlass
    import kernels_small
    import torch
    from cutlass import cute
    from cutlass.cute.runtime import from_dlpack

    from ptxsim.host.capture import as_device_tensor

    stream = kernels_small.cuda.CUstream(0)
    tensors = [from_dlpack(as_device_tensor(torch.zeros(200))).mark_layout_dynamic() for _ in range(2)]
    args = (kernels_small.copy_twice, *tensors, cutlass.Float32(2), stream)
    return {"jit": cute.compile(*args), "ffi": cute.compile(*args, options="--enable-tvm-ffi"), "stream": stream}


@pytest.mark.parametrize("route", ["jit", "ffi", "aot"])
def test_run_simulates_every_launch_of_a_call_in_order(twice, route, tmp_path):
    import torch

    from ptxsim.host.capture import export_aot, load_aot

    function = twice["ffi" if route == "aot" else route]
    if route == "aot":
        function = load_aot(export_aot(function, tmp_path, "twice"), "twice")
    source, target = torch.arange(200, dtype=torch.float32), torch.full((200,), float("nan"))
    report = ptxsim.run(function, source, target, 3.0, twice["stream"], outputs=(target,))
    assert torch.equal(target, 3.0 * torch.arange(200))
    assert torch.equal(source, 12.0 * torch.arange(200))
    # 200 elements are 7 warps that store.
    assert report.counters["op:st.global.b32"] == 2 * 7


def test_run_raises_for_findings_unless_told_not_to(twice):
    import torch

    source, target = torch.zeros(200), torch.zeros(200)
    with pytest.raises(ptxsim.FindingsError, match="uninitialised-read"):
        ptxsim.run(twice["jit"], source, target, 3.0, twice["stream"], outputs=(source, target))
    report = ptxsim.run(twice["jit"], source, target, 3.0, twice["stream"], outputs=(source, target), check=False)
    assert report.findings[0].source.endswith("kernels_small.py:25")


def test_text_and_json_timelines():
    src, dst = arrays()
    buffers = [Buffer.of(src), Buffer.of(dst)]
    report = ptxsim.simulate(launch(src, dst), buffers, trace=True)
    text = report.trace.to_text(40)
    assert "warp 0" in text
    assert "warp 1" in text
    events = report.trace.to_json()["traceEvents"]
    assert {event["ph"] for event in events} >= {"M", "X"}
    ran = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["ptx_line"] for event in ran}
    json.dumps(events)


def python(*args, cwd=None):
    return subprocess.run([sys.executable, "-m", "ptxsim", *args], capture_output=True, text=True, cwd=cwd, check=False)


def test_the_core_needs_neither_torch_nor_cutlass():
    imports = "import sys, ptxsim, ptxsim.api, ptxsim.host.capture"
    script = f"{imports}; print(sorted({{'torch', 'cutlass', 'cutedsl'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_inventory_command(tmp_path: Path):
    good, bad = tmp_path / "good.ptx", tmp_path / "bad.ptx"
    good.write_text(COPY)
    bad.write_text(COPY.replace("mad.lo.s32", "mad.sideways.s32"))
    done = python("inventory", str(good))
    assert done.returncode == 0
    assert "copy: 8 opcodes, 12 instructions" in done.stdout
    done = python("inventory", str(bad))
    assert done.returncode == 1
    assert "CANNOT RUN" in done.stdout
    assert python("inventory", str(tmp_path / "none.ptx")).returncode == 1


SCRIPT = """
import numpy as np, ptxsim
from ptxsim.launch import Launch
from ptxsim.memory import Buffer
src, dst = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
pointers = tuple(int(a.ctypes.data).to_bytes(8, "little") for a in (src, dst))
text = open("copy.ptx").read()
ptxsim.simulate(Launch(text, "copy", (1, 1, 1), (32, 2, 1), params=pointers), [Buffer.of(src), Buffer.of(dst)]).check()
"""


def test_trace_command(tmp_path: Path):
    (tmp_path / "copy.ptx").write_text(COPY)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = python("trace", "--json", "out.json", "script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CTA   0 warp 1" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    assert python("trace", "--launch", "3", "script.py", cwd=tmp_path).returncode == 2
    assert python("trace", "missing.py", cwd=tmp_path).returncode == 2


def test_matrix_prints_a_line_a_case_and_reports_every_failure():
    lines, seen = [], []

    def case(policy, seed, m):
        seen.append((policy, seed, m))
        assert m != 2 or policy != "lazy", "two is too lazy"

    with pytest.raises(AssertionError, match=r"1 case.*\nm=2 lazy seed=0: two is too lazy"):
        Matrix(lines.append)(case, m=(1, 2), seeds=(0, 1))
    assert len(lines) == len(seen) == 2 * 4
    assert sum("FAILED" in line for line in lines) == 1
    assert ("random", 1, 2) in seen
    assert ("eager", 1, 2) not in seen
