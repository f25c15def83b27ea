"""Kernels built ahead of time: a small set is built, loaded without the compiler, run, damaged and refused.

And docs/kernels.md, which is taken from the machine code of the same kernels.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernel_table
import pytest
import torch

import ptxsim
from cutedsl import aot, cpu_features, deployment
from cutedsl import compile as compiler
from cutedsl.deployment import FAMILIES, Family, Variant
from cutedsl.kernels import finalize_sm100, grouped_gemm_sm90, linear_sm100
from cutedsl.kernels.finalize_sm100 import Config, FinalizeSm100
from ptxsim.host.capture import capture, load_aot, prepare_environment

prepare_environment()

VARIANTS = [Variant(FinalizeSm100, Config(top_k, shared=True), finalize_sm100.compiled) for top_k in (1, 2)]
NAME = compiler.kernel_name(FinalizeSm100)
OPTIONS = compiler.compile_options("sm_100a", False)


# Of an AMD CPU beyond an Intel one, and the other way round.
AMD_ONLY, INTEL_ONLY = ["sse4a", "xop"], ["amx_tile", "avx512_fp16"]


def pretend_cpu(patch: pytest.MonkeyPatch, file: Path, features: list[str]) -> None:
    """What Linux says of the CPU from here on: a file to write, and features in it."""
    file.write_text(f"processor\t: 0\nflags\t\t: {' '.join(features)}\n")
    patch.setattr(cpu_features, "CPUINFO", file)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Through the command, as a user would, on an AMD CPU; two kernels stand for the closed set."""
    directory = tmp_path_factory.mktemp("aot") / "set"
    command = ["build", "--model", "deepseek-v4-pro", "--tp", "8", "--out", str(directory), "--ptx", "-j", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment, "variants", lambda asked: VARIANTS)
        cpuinfo = tmp_path_factory.mktemp("cpu") / "cpuinfo"
        pretend_cpu(patch, cpuinfo, [*cpu_features.of_this_cpu(), *AMD_ONLY])
        assert aot.main(command) == 0
    return directory


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache as at the start of a process."""
    monkeypatch.setattr(compiler, "_functions", {})
    monkeypatch.setattr(compiler, "_sets", [])
    monkeypatch.setattr(compiler, "_counts", dict.fromkeys(compiler._counts, 0))
    monkeypatch.delenv(compiler.NO_JIT, raising=False)
    yield
    compiler.freeze(False)


def edit(directory: Path, **fields: object) -> None:
    path = directory / aot.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ---- what is built --------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_built(built: Path) -> None:
    manifest = json.loads((built / aot.MANIFEST).read_text())
    assert (manifest["model"], manifest["tp"], manifest["archs"]) == ("deepseek-v4-pro", [8], ["sm_100a"])
    assert manifest["dsl_version"] == compiler.dsl_version()
    assert [json.loads(entry["config"])["top_k"] for entry in manifest["kernels"]] == [1, 2]
    for variant, entry in zip(VARIANTS, manifest["kernels"], strict=True):
        key = compiler.key_of(FinalizeSm100, variant.config, "sm_100a", False)
        assert (entry["kernel"], entry["arch"], entry["key"]) == (NAME, "sm_100a", key.digest)
        assert entry["sha256"] == compiler.file_digest(built / entry["file"])
        assert entry["sources"] == compiler.source_digests(FinalizeSm100)
    suffixes = sorted(path.suffix for path in built.iterdir())
    assert suffixes == [".json", ".o", ".o", ".ptx", ".ptx", ".so", ".so"]
    assert [path.name for path in built.parent.iterdir()] == ["set"], "something temporary is left"


def test_objects_need_two_libraries_by_name(built: Path) -> None:
    for path in built.glob("*.so"):
        content = path.read_bytes()
        assert b"libcute_dsl_runtime.so\0" in content
        assert b"libtvm_ffi.so\0" in content
        assert str(Path(sys.prefix)).encode() not in content, "a path of this machine is in the object"


def test_a_set_asks_for_the_cpu_features_that_its_code_uses(built: Path) -> None:
    manifest = json.loads((built / aot.MANIFEST).read_text())
    assert manifest["cpu_features_from"] == "the machine code"
    found = set(manifest["cpu_features"])
    assert not found & {*AMD_ONLY, "sha_ni", "aes", "fpu", "sse2"}
    command = ["objdump", "--disassemble", "--no-show-raw-insn", *map(str, built.glob("*.so"))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # By another disassembler: registers that only AVX-512 has, the three-operand forms that come with AVX, and bzhi.
    assert ("avx512f" in found) == ("%zmm" in text)
    assert ("avx" in found) == bool(re.search(r"\tvmov", text))
    assert ("bmi2" in found) == bool(re.search(r"\t(bzhi|shlx|shrx|sarx|rorx|mulx|pdep|pext)", text))


def test_the_build_says_what_it_asks_of_a_cpu_and_how_that_is_known(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (entry,) = aot.KernelSet(built).entries[:1]

    def build_one(variants: object, scratch: Path, *_: object) -> list[aot.Entry]:
        shutil.copy(built / entry.file, scratch)
        return [entry]

    monkeypatch.setattr(aot, "_build_all", build_one)
    pretend_cpu(monkeypatch, tmp_path / "cpuinfo", ["fpu", "vme", "sse4a"])
    command = ["build", "--model", "deepseek-v4-pro", "--tp", "8", "--out", str(tmp_path / "set")]
    assert aot.main(command) == 0
    needed = ", ".join(cpu_features.of_libraries([built / entry.file]))
    line = "\nhost code needs of a CPU, as told by "
    assert f"{line}the machine code: {needed}\n" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "iced_x86", None)
    assert aot.main(command) == 0
    why = "the building CPU, all that it has, because iced-x86 is not installed"
    assert f"{line}{why}: fpu, sse4a\n" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "set" / aot.MANIFEST).read_text())
    assert (manifest["cpu_features"], manifest["cpu_features_from"]) == (["fpu", "sse4a"], why)


def test_a_set_that_stood_there_is_replaced(copied: Path) -> None:
    aot.build([], copied, jobs=1)
    assert [path.name for path in copied.iterdir()] == [aot.MANIFEST]
    assert aot.KernelSet(copied).entries == []
    assert [path.name for path in copied.parent.iterdir()] == ["set"]


def test_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(aot.BuildError, match="holds something else than a set of kernels and is left alone"):
        aot.build([], tmp_path, jobs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_kernel_that_does_not_compile_leaves_the_old_set(copied: Path) -> None:
    before = (copied / aot.MANIFEST).read_text()
    # Whatever is called with a configuration and line_info, json.loads does not like it.
    with pytest.raises(aot.BuildError, match=r"finalize_sm100\.FinalizeSm100 with Config\(top_k=1.* was not built: "):
        aot.build([Variant(FinalizeSm100, Config(1), json.loads)], copied, jobs=1)
    assert (copied / aot.MANIFEST).read_text() == before
    assert [path.name for path in copied.parent.iterdir()] == ["set"]


def test_no_linker_and_no_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(aot.BuildError, match="jobs is 0"):
        aot.build([], tmp_path / "set", jobs=0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(aot.BuildError, match="no C compiler to link with"):
        aot.build([], tmp_path / "set", jobs=1)


def test_sources_edited_during_a_build(built: Path) -> None:
    entries = aot.KernelSet(built).entries
    entries[1].sources["cutedsl/layout.py"] = "0" * 64
    with pytest.raises(aot.BuildError, match=r"cutedsl/layout.py changed while kernels were built"):
        aot._check_unchanged(entries)


# ---- loading --------------------------------------------------------------------------------------------------------

LOAD = """
import json, sys, time
from pathlib import Path
sys.modules["cutlass"] = None  # an import of the compiler fails
import torch, tvm_ffi
from cutedsl import aot, compile as compiler
directory, name, options = sys.argv[1:]
start = time.perf_counter()
kernels = aot.KernelSet(directory)
opened = time.perf_counter() - start
seconds = []
for entry in kernels.entries:
    start = time.perf_counter()
    function = kernels.function(name, entry.config, options)
    seconds.append(time.perf_counter() - start)
    try:
        function()
    except TypeError as error:
        assert "Expects 5 parameters" in str(error), error
    else:
        raise AssertionError("called without arguments")
loaded = sorted(module for module in sys.modules if module.startswith("cutlass."))
print(json.dumps({"opened": opened, "seconds": seconds, "compiler": loaded}))
"""


def test_loading_takes_milliseconds_and_no_compiler(built: Path) -> None:
    # Away from the simulator's libraries: what a server does.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUTE_DSL_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", LOAD, str(built), NAME, OPTIONS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["compiler"] == []
    # The first one loads the runtime library too. Measured: 30 ms and 0.5 ms; the bound is for a busy machine.
    assert found["seconds"][1] < 0.1, found
    assert found["opened"] < 1, found


def arguments() -> tuple[torch.Tensor, ...]:
    y = torch.arange(3 * 16, dtype=torch.float32).reshape(3, 16).bfloat16()
    weights, shared = torch.tensor([[2.0, -1.0]]), torch.ones(1, 16, dtype=torch.bfloat16)
    return y, torch.tensor([2, 0], dtype=torch.int32), weights, shared, torch.empty(1, 16, dtype=torch.bfloat16)


def simulate(function: object, ptx: str | None = None) -> torch.Tensor:
    tensors = arguments()
    ptxsim.run(function, *tensors, outputs=tensors[-1:], ptx=ptx)
    return tensors[-1]


def test_compiled_finds_the_kernels_of_a_set(built: Path) -> None:
    assert compiler.use(built) == 2
    compiler.freeze()
    function = finalize_sm100.compiled(Config(2, shared=True), line_info=False)
    assert finalize_sm100.compiled(Config(2, shared=True), line_info=False) is function
    found = compiler.counters()
    assert (found.hits, found.misses, found.loaded, found.compilations) == (1, 1, 1, 0)
    assert 0 < found.load_seconds < 1
    entry = aot.KernelSet(built).entries[1]
    result = simulate(function, ptx=(built / entry.file).with_suffix(".ptx").read_text())
    y, _, _, shared, _ = (tensor.float() for tensor in arguments())
    assert torch.equal(result, (2 * y[2] - y[0] + shared).bfloat16())


def test_what_a_set_lacks_is_compiled_or_refused(built: Path) -> None:
    compiler.use(built)
    compiler.freeze()
    with pytest.raises(compiler.CompilationRefusedError, match=re.escape(f"sets in use: {built}")):
        finalize_sm100.compiled(Config(3), line_info=False)


def test_the_simulator_takes_the_object_file(built: Path) -> None:
    entry = aot.KernelSet(built).entries[1]
    function = load_aot((built / entry.file).with_suffix(".o"), entry.symbol)
    assert torch.equal(simulate(function), simulate(finalize_sm100.compiled(Config(2, shared=True))))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dsl_version": "4.7.0"}, "built by nvidia-cutlass-dsl 4.7.0, here is "),
        ({"machine": "riscv64"}, "built on riscv64, this is "),
        (
            {"cpu_features": ["avx", "avx2048"]},
            r"built for a CPU with avx2048, which this one lacks \(as told by the machine code\)",
        ),
        ({"format": "other"}, "has format 'other', expected 'nvfp4-kernels-1'"),
        ({"kernels": [{"kernel": "x"}]}, "manifest.json is damaged"),
    ],
)
def test_a_set_for_another_place_is_refused(copied: Path, fields: dict[str, object], message: str) -> None:
    edit(copied, **fields)
    with pytest.raises(aot.StaleSetError, match=message):
        compiler.use(copied)
    assert aot.main(["verify", str(copied)]) == 1


def test_another_maker_s_cpu_with_what_the_code_uses_takes_the_set(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = json.loads((copied / aot.MANIFEST).read_text())["cpu_features"]
    assert needed, "a compiler that uses nothing of this CPU makes this test empty"
    intel = {*cpu_features.of_this_cpu(), *INTEL_ONLY} - {*AMD_ONLY}
    pretend_cpu(monkeypatch, tmp_path / "cpuinfo", sorted(intel))
    assert compiler.use(copied) == 2
    pretend_cpu(monkeypatch, tmp_path / "cpuinfo", sorted(intel - {needed[0]}))
    with pytest.raises(aot.StaleSetError, match=f"built for a CPU with {needed[0]}, which this one lacks"):
        compiler.use(copied)


def test_other_sources_are_refused(copied: Path) -> None:
    kernels = json.loads((copied / aot.MANIFEST).read_text())["kernels"]
    kernels[0]["sources"] = {"cutedsl/layout.py": "0" * 64, "cutedsl/gone.py": "0" * 64}
    edit(copied, kernels=kernels[:1])
    with pytest.raises(aot.StaleSetError) as caught:
        compiler.use(copied)
    message = str(caught.value)
    assert "cutedsl/layout.py is not what kernels were built from" in message
    assert "cutedsl/gone.py, which kernels were built from, is not there" in message
    assert "python -m cutedsl.aot build --model deepseek-v4-pro" in message


def test_damaged_and_missing_files_are_refused(copied: Path) -> None:
    first, second = sorted(copied.glob("*.so"))
    kernels = aot.KernelSet(copied)
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    second.unlink()
    with pytest.raises(aot.StaleSetError, match=rf"(?s){first.name} is damaged|{second.name} is missing") as caught:
        aot.KernelSet(copied)
    assert f"{first.name} is damaged" in str(caught.value)
    assert f"{second.name} is missing" in str(caught.value)
    # Also where the damage came after the set was opened.
    for entry in kernels.entries:
        with pytest.raises(aot.StaleSetError, match="has changed since the set came into use"):
            kernels.function(entry.kernel, entry.config, entry.options)


def test_a_file_that_is_no_library_is_refused(copied: Path) -> None:
    kernels = json.loads((copied / aot.MANIFEST).read_text())["kernels"]
    path = copied / kernels[0]["file"]
    path.write_bytes(b"not a library")
    kernels[0]["sha256"] = compiler.file_digest(path)
    edit(copied, kernels=kernels)
    found = aot.KernelSet(copied)
    with pytest.raises(aot.StaleSetError, match=f"{path.name} cannot be loaded"):
        found.function(NAME, found.entries[0].config, OPTIONS)
    assert found.function(NAME, "{}", OPTIONS) is None


# ---- command line ---------------------------------------------------------------------------------------------------


def test_verify_and_list(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["verify", str(built)]) == 0
    assert "2 kernels, all as built" in capsys.readouterr().out
    assert aot.main(["list", str(built)]) == 0
    text = capsys.readouterr().out
    assert "model=deepseek-v4-pro  tp=[8]" in text
    assert text.count("FinalizeSm100") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["verify", "{tmp}"], 1, "is no set of kernels"),
        (["list", "{tmp}"], 1, "is no set of kernels"),
        (["build", "--model", "nowhere", "--out", "{tmp}/x"], 64, "nor a readable config.json"),
        (["build", "--model", "deepseek-v4-pro", "--tp", "1,x", "--out", "{tmp}/x"], 64, "--tp: 'x' is no number"),
        (["build", "--model", "deepseek-v4-pro", "--tp", "3", "--out", "{tmp}/x"], 64, "no multiple of 3"),
        (["build", "--model", "deepseek-v4-pro", "--arch", "sm_80", "--out", "{tmp}/x"], 64, "no kernel"),
        (["build", "--model", "deepseek-v4-pro", "--out", "{tmp}/x", "-j", "0"], 64, "--jobs is 0"),
    ],
)
def test_exit_codes(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert aot.main([argument.format(tmp=tmp_path) for argument in arguments]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        aot.main(["build"])
    assert caught.value.code == 64
    assert "--model" in capsys.readouterr().err


# ---- docs/kernels.md ------------------------------------------------------------------------------------------------

REGENERATE = "docs/kernels.md is out of date: run scripts/kernel_table.py"


def rows(arch: str) -> list[str]:
    _, section = kernel_table.DOCUMENT.read_text().split(f", {arch}: ")
    return [line for line in section.split("\n## ")[0].splitlines() if re.match(r"\| \w+_sm\d", line)]


@functools.cache
def closed_set(arch: str) -> list[Variant]:
    return kernel_table.closed_set(arch)


def test_the_tables_have_every_kernel_and_no_other() -> None:
    for arch in kernel_table.ARCHS:
        labels = [kernel_table.label(variant) for variant in closed_set(arch)]
        assert [row[: len(label)] for row, label in zip(rows(arch), labels, strict=True)] == labels, REGENERATE
    found = {arch: rows(arch) for arch in kernel_table.ARCHS}
    assert kernel_table.DOCUMENT.read_text() == kernel_table.document(found), REGENERATE


@pytest.mark.parametrize("family", FAMILIES, ids=lambda it: it.module)
def test_the_tables_are_up_to_date(family: Family) -> None:
    # One kernel of each module; all of them where there is time, below.
    (arch,) = set(family.load().ARCHS) & set(kernel_table.ARCHS)
    variant = next(variant for variant in closed_set(arch) if variant.kernel.__name__ == family.kernel)
    assert kernel_table.row(variant, kernel_table.examine(variant)) in rows(arch), REGENERATE


@pytest.mark.full
@pytest.mark.parametrize("arch", kernel_table.ARCHS)
def test_a_whole_table_is_up_to_date(arch: str) -> None:
    assert kernel_table.table(closed_set(arch), jobs=2) == rows(arch), REGENERATE


def mma_instructions(name: str, config: str) -> int:
    """Of a step of K; its loop is in the code once."""
    if "linear" not in name and "gemm" not in name:
        return 0
    if name.endswith("sm100"):
        # A step is 256, an MMA's K 64; and one more in the loop of a last step that ends before 256.
        return 256 // 64 + 1
    # A loop of two lots, for each width; all warpgroups run the same code, each for its blocks of the tile.
    epilogue, *fields = (field.split()[1] for field in config.split(", "))
    tile_w, tile_n, num_stages, num_consumers, cluster_w, even, cluster_k, one_group = map(json.loads, fields)
    found = grouped_gemm_sm90.Config(
        epilogue, tile_w, tile_n, num_stages, num_consumers, cluster_w, even, cluster_k, one_group
    ).validate()
    return 2 * found.lot_steps * found.blocks_of_warpgroup * len(found.widths)


@pytest.mark.parametrize("arch", kernel_table.ARCHS)
def test_no_kernel_spills_and_every_gemm_uses_the_tensor_core(arch: str) -> None:
    for row in rows(arch):
        name, config, *numbers = (cell.strip() for cell in row.strip("| ").split("|"))
        registers, static, dynamic, stack, local, mma, instructions = map(int, numbers)
        assert (stack, local) == (0, 0), row
        assert registers <= 255
        # Static shared memory is the system's own KiB, which is not of the 227 that a CTA may ask for.
        assert dynamic <= 227 * 1024
        assert static in (0, 1024), row
        assert mma == mma_instructions(name, config), row
        assert instructions > mma, row


def test_dynamic_shared_memory_is_that_of_the_launch() -> None:
    config = linear_sm100.choose_config(linear_sm100.Shape(1, 64, 64))
    function: Any = linear_sm100.compiled(config)
    m, n, k = 1, 64, 64
    tensors = (
        torch.zeros(m, k // 2, dtype=torch.uint8),
        torch.zeros(n, k // 2, dtype=torch.uint8),
        torch.zeros(128, 4, dtype=torch.float8_e4m3fn),
        torch.zeros(128, 4, dtype=torch.float8_e4m3fn),
        torch.zeros(n),
        torch.zeros(m, n, dtype=torch.bfloat16),
    )
    (launch,) = capture(function, *tensors, 1)
    assert kernel_table.dynamic_smem(str(function.ir_module)) == launch.shared_bytes
    with pytest.raises(ValueError, match="no launch configuration"):
        kernel_table.dynamic_smem("")
    with pytest.raises(ValueError, match="expected one CUDA image in the object file, found 0"):
        kernel_table.find_cubin(b"")
