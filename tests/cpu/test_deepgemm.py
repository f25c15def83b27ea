"""DeepGEMM's kernels built ahead of time: all that vLLM asks for, under the names recorded on an H200, linked, checked."""

import dataclasses
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_nvfp4 import deepgemm_build, deepgemm_set, tilelang_build

INCLUDE = Path("include")


@pytest.fixture(scope="module")
def recorded(root: Path) -> dict[str, Any]:
    """What vLLM 0.32.0 had compiled when a model of V4-Pro's shape had started: no step for the indexer's prefills."""
    return json.loads((root / "tests" / "data" / "deepgemm_h200.json").read_text())


@pytest.fixture
def headers(recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of vLLM's wheel, as far as they are hashed."""
    monkeypatch.setattr(deepgemm_build, "_header", lambda include, name: recorded["headers"].get(name, "another's"))
    monkeypatch.setattr(deepgemm_build, "_cutlass", lambda include: recorded["cutlass"])


def arguments(kernel: deepgemm_build.Kernel) -> str:
    (found,) = re.findall(r"<\n([^<>]*)\n    >\);", kernel.text)
    return re.sub(r",\s+", ", ", found.strip())


# --- what is asked for, and its name


@pytest.mark.usefixtures("headers")
def test_names_are_those_of_an_h200(recorded: dict[str, Any]) -> None:
    digests = {
        (kernel.name, arguments(kernel)): deepgemm_build.digest(INCLUDE, recorded["nvcc"], "sm_90a", kernel.text)
        for kernel in deepgemm_build.kernels(deepgemm_build.MODELS["deepseek-v4-pro"], "sm_90a")
    }
    assert len(recorded["kernels"]) == 43
    for name, wanted, digest in recorded["kernels"]:
        assert digests.pop((name, wanted)) == digest
    # What that start did not reach: prompts that the indexer chooses from, drafts, and more than 32 decodes.
    rest = {("sm90_paged_mqa_logits_metadata", f"{rows}, 256, 132, false") for rows in range(64, 2049, 32)}
    rest.add(("sm90_fp8_mqa_logits", "64, 128, false, false, 2, 256, 3, 3, 132, 128, 512, float"))
    rest.add(("sm90_fp8_paged_mqa_logits", "2, 64, 128, 64, true, false, 3, 3, 256, 128, 512, 1, float"))
    assert digests.keys() == rest


@pytest.mark.usefixtures("headers")
@pytest.mark.parametrize("changed", ["nvcc", "arch", "text", "header", "cutlass"])
def test_each_part_of_a_name_counts(changed: str, recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = deepgemm_build.kernels(deepgemm_build.MODELS["deepseek-v4-pro"], "sm_90a")[0]
    parts = {"nvcc": recorded["nvcc"], "arch": "sm_90a", "text": kernel.text}
    before = deepgemm_build.digest(INCLUDE, parts["nvcc"], parts["arch"], parts["text"])
    if changed == "header":
        monkeypatch.setattr(deepgemm_build, "_header", lambda include, name: "0" * 32)
    elif changed == "cutlass":
        monkeypatch.setattr(deepgemm_build, "_cutlass", lambda include: 422)
    else:
        parts[changed] = "sm_100a" if changed == "arch" else parts[changed] + " "
    assert deepgemm_build.digest(INCLUDE, parts["nvcc"], parts["arch"], parts["text"]) != before


def test_headers_are_followed(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        deepgemm_build._header.cache_clear()

    def digest() -> str:
        return deepgemm_build.digest(tmp_path, "nvcc", "sm_90a", "\n  # include <deep_gemm/a.cuh>\nint x;\n")

    write("cutlass/version.h", "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 1\n")
    assert deepgemm_build._cutlass(tmp_path) == 421
    write("deep_gemm/a.cuh", "#include <cute/tensor.hpp>\n#include <deep_gemm/b.cuh>\n")
    with pytest.raises(FileNotFoundError, match=r"b\.cuh"):
        digest()
    write("deep_gemm/b.cuh", "int b;\n")
    before = digest()
    write("cute/tensor.hpp", "not DeepGEMM's\n")
    assert digest() == before
    write("deep_gemm/b.cuh", "int c;\n")
    assert digest() != before


@pytest.mark.parametrize("name", list(deepgemm_build.MODELS))
@pytest.mark.parametrize(("arch", "num_sms"), [("sm_90a", 132), ("sm_100a", 148)])
def test_every_number_of_splits_is_there(name: str, arch: str, num_sms: int) -> None:
    sizes = deepgemm_build.MODELS[name]

    def split(tokens: int, k: int) -> int:
        """mhc/tilelang_kernels.py:compute_num_split, as mhc/tilelang.py:_hc_prenorm_gemm_outputs calls it."""
        return max(min(num_sms // math.ceil(tokens / 64), math.ceil(k / 64) // 4), 1)

    found = [kernel for kernel in deepgemm_build.kernels(sizes, arch) if kernel.name.endswith("hc_prenorm_gemm")]
    wanted = {
        f"24, {k}, 64, 32, 64, {split(tokens, k)}, 128, 12, 128, 128"
        for k in (sizes.hidden_size, 4 * sizes.hidden_size)
        for tokens in range(1, 16385)
    }
    assert {arguments(kernel) for kernel in found} == wanted
    assert len(found) == len(wanted)
    assert all(f"&{kernel.name}_impl<" in kernel.text for kernel in found)
    assert {kernel.name for kernel in found} == {arch.replace("_", "").rstrip("a") + "_tf32_hc_prenorm_gemm"}


def test_the_indexer_of_sm100_takes_each_token_as_a_row() -> None:
    *_, prompt, paged, schedule = deepgemm_build.kernels(deepgemm_build.MODELS["deepseek-v4-flash"], "sm_100a")
    types = "cutlass::float_e4m3_t, float, float"
    assert arguments(prompt) == f"64, 128, false, false, false, false, 2, 256, 3, 5, 148, 128, 256, {types}"
    assert arguments(paged) == f"1, 64, 128, 64, false, true, true, 3, 5, 256, 16, 128, 256, {types}"
    assert arguments(schedule) == "1, true, true, 256, 148"
    # nvcc 13.0 has compiled both with this size, and refuses another.
    for kernel in (prompt, paged):
        assert "float_e4m3_t, float\n>) == 220160, " in kernel.text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((7168, 2, 64, 128), "hc_mult is 2, expected 4"),
        ((7168, 4, 16, 128), "the indexer has 16 heads of 128, expected 32 or 64 of 128"),
        ((7168, 4, 64, 64), "the indexer has 64 heads of 64, expected 32 or 64 of 128"),
    ],
)
def test_sizes_without_a_kernel_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepgemm_build.kernels(deepgemm_build.Sizes(*sizes), "sm_90a")


# --- the build, with a stand-in for nvcc

NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "nvcc, release 13.0"; echo on stderr >&2; exit; }
echo "$*" >> "$NVCC_LOG"
grep -q "%(refused)s" kernel.cu && { echo "ptxas fatal" >&2; exit 1; }
echo cubin > kernel.cubin
"""


def write_nvcc(home: Path, refused: str = "nothing of it") -> None:
    (home / "bin").mkdir(parents=True, exist_ok=True)
    (home / "bin" / "nvcc").write_text(NVCC % {"refused": refused})
    (home / "bin" / "nvcc").chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a CUDA home and a DeepGEMM."""
    write_nvcc(tmp_path / "cuda")
    headers = tmp_path / "site" / "deep_gemm" / "include"
    for text in [kernel.text for arch in deepgemm_build.NVCC_ARCH for kernel in kernels_of_pro(arch)]:
        (name,) = re.findall("#include <(.*)>", text)
        (headers / name).parent.mkdir(parents=True, exist_ok=True)
        (headers / name).write_text("int x;\n")
    (headers / "cutlass").mkdir()
    version = "".join(f"#define CUTLASS_{part} 4\n" for part in ("MAJOR", "MINOR", "PATCH"))
    (headers / "cutlass" / "version.h").write_text(version)
    (headers.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("NVCC_LOG", str(tmp_path / "log"))
    return tmp_path


def kernels_of_pro(arch: str) -> list[deepgemm_build.Kernel]:
    return deepgemm_build.kernels(deepgemm_build.MODELS["deepseek-v4-pro"], arch)


def test_it_builds_what_deepgemm_would(tools: Path, root: Path, tmp_path: Path) -> None:
    # As the Dockerfile does it: a package of these files and no other.
    package = tmp_path / "src" / "vllm_nvfp4"
    package.mkdir(parents=True)
    (copied,) = re.findall(r"^COPY (.*deepgemm_build\.py) vllm_nvfp4/$", (root / "Dockerfile").read_text(), re.M)
    for source in copied.split():
        shutil.copy(root / source, package)
    out = tools / "set"
    command = [sys.executable, "-m", "vllm_nvfp4.deepgemm_build", "--out", str(out), "--arch", "sm_100a", "--require"]
    env = {**os.environ, "PYTHONPATH": f"{tools / 'site'}"}
    done = subprocess.run(
        command, cwd=package.parent, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    # The same for Pro and Flash: the indexer's three.
    total = sum(len(deepgemm_build.kernels(sizes, "sm_100a")) for sizes in deepgemm_build.MODELS.values()) - 3
    assert f"{total} DeepGEMM kernels, " in done.stdout
    entries = sorted((out / "cache").iterdir())
    assert len(entries) == total
    for entry in entries:
        assert {path.name for path in entry.iterdir()} == {".committed", "kernel.cu", "kernel.cubin"}
        text = (entry / "kernel.cu").read_text()
        include = tools / "site" / "deep_gemm" / "include"
        digest = deepgemm_build.digest(include, "nvcc, release 13.0\non stderr\n", "sm_100a", text)
        assert entry.name.partition(".")[2] == digest
    record = json.loads((out / "built.json").read_text())
    assert record["models"] == {name: dataclasses.asdict(sizes) for name, sizes in deepgemm_build.MODELS.items()}
    assert (record["nvcc"], record["kernels"]) == ("nvcc, release 13.0\non stderr\n", total)
    flags = f"{deepgemm_build.flags('sm_100a')} --include-path {include}"
    assert "--gpu-architecture=sm_100f -O3" in flags
    calls = set((tools / "log").read_text().splitlines())
    assert calls == {f"kernel.cu --cubin --output-file kernel.cubin {flags}"}
    assert deepgemm_set.check(out) == []


def test_a_kernel_that_does_not_compile_ends_the_build(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_nvcc(tools / "cuda", refused="false, true, true")
    flags = ["--out", str(tools / "set"), "--arch", "sm_100a", "--model", "deepseek-v4-pro"]
    assert deepgemm_build.main(flags) == 1
    wanted = r"deepgemm_build: sm100_paged_mqa_logits\.\w{32} for sm_100a does not compile: ptxas fatal\n"
    assert re.fullmatch(wanted, capsys.readouterr().err)
    assert not (tools / "set" / "built.json").exists()


def test_another_deepgemm_ends_the_build(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tools / "site/deep_gemm/include/deep_gemm/impls/sm90_tf32_hc_prenorm_gemm.cuh").unlink()
    assert deepgemm_build.main(["--out", str(tools / "set")]) == 1
    assert "sm90_tf32_hc_prenorm_gemm.cuh" in capsys.readouterr().err


def test_an_nvcc_that_fails_ends_the_build(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tools / "cuda" / "bin" / "nvcc").write_text("#!/bin/sh\necho no licence; exit 3\n")
    assert deepgemm_build.main(["--out", str(tools / "set")]) == 1
    assert capsys.readouterr().err == f"deepgemm_build: {tools}/cuda/bin/nvcc --version fails: no licence\n"


def test_a_model_of_another_shape_ends_the_build(tools: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((root / "tests" / "data" / "configs" / "deepseek-v4-pro.json").read_text())
    (tools / "config.json").write_text(json.dumps(config | {"hc_mult": 2}))
    assert deepgemm_build.main(["--out", str(tools / "set"), "--model", str(tools / "config.json")]) == 1
    assert "deepgemm_build: hc_mult is 2, expected 4" in capsys.readouterr().err


def test_published_sizes_are_those_of_their_configs(root: Path) -> None:
    for name, sizes in deepgemm_build.MODELS.items():
        config = str(root / "tests" / "data" / "configs" / f"{name}.json")
        assert tilelang_build.find_sizes(config, deepgemm_build.MODELS) == sizes


def test_what_is_missing(tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert deepgemm_build.missing_tool() == ""
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("CUDA_PATH", "/absent")
    assert deepgemm_build.missing_tool() == "no nvcc: /absent/bin/nvcc is not there"
    monkeypatch.delenv("CUDA_PATH")
    monkeypatch.setenv("PATH", str(tools / "cuda" / "bin"), prepend=os.pathsep)
    assert deepgemm_build.nvcc() == tools / "cuda" / "bin" / "nvcc"
    monkeypatch.setenv("PATH", "/absent")
    assert deepgemm_build.nvcc() == Path("/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(deepgemm_build.importlib.util, "find_spec", lambda name: None)
    assert deepgemm_build.main(["--out", str(tools / "a")]) == 0
    assert deepgemm_build.main(["--out", str(tools / "b"), "--require"]) == 1
    line = "deepgemm_build: left out, every start will compile: DeepGEMM is not installed\n"
    assert capsys.readouterr().err == line * 2
    assert deepgemm_set.check(tools / "a") == []
    assert capsys.readouterr().out == "deepgemm_set: there is none, every start compiles: DeepGEMM is not installed\n"


def test_vllms_own_deepgemm_comes_second(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert deepgemm_build.library() == tools / "site" / "deep_gemm"
    own = tools / "vllm" / "third_party" / "deep_gemm"
    (own / "include").mkdir(parents=True)
    specs = {"vllm": SimpleNamespace(origin=str(tools / "vllm" / "__init__.py"))}
    monkeypatch.setattr(deepgemm_build.importlib.util, "find_spec", specs.get)
    assert deepgemm_build.library() == own


# --- the image's check


@pytest.fixture
def built(tools: Path) -> Path:
    flags = ["--out", str(tools / "set"), "--arch", "sm_100a", "--model", "deepseek-v4-pro"]
    assert deepgemm_build.main(flags) == 0
    assert deepgemm_set.check(tools / "set") == []
    return tools / "set"


@pytest.mark.parametrize("damage", ["committed", "cubin", "empty"])
def test_the_check_names_a_kernel_that_is_not_whole(damage: str, built: Path) -> None:
    (entry,) = (built / "cache").glob("sm100_mqa_logits.*")
    if damage == "empty":
        (entry / "kernel.cubin").write_bytes(b"")
    else:
        (entry / {"committed": ".committed", "cubin": "kernel.cubin"}[damage]).unlink()
    assert deepgemm_set.check(built) == [f"sm_100a: {entry.name} is not in the set, or not whole"]


def test_the_check_sees_other_headers(built: Path, tools: Path) -> None:
    (tools / "site/deep_gemm/include/deep_gemm/impls/sm100_mqa_logits.cuh").write_text("int y;\n")
    deepgemm_build._header.cache_clear()
    lines = deepgemm_set.check(built)
    assert len(lines) == 2
    assert all(
        re.fullmatch(r"sm_100a: sm100_\w*mqa_logits\.\w{32} is not in the set, or not whole", line) for line in lines
    )


def test_the_check_sees_another_nvcc_or_none(built: Path, tools: Path) -> None:
    nvcc = tools / "cuda" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 13.1\n")
    first = "'nvcc, release 13.0\\non stderr\\n'"
    assert deepgemm_set.check(built) == [f"{built} was built by {first}, expected '13.1\\n'; build it again"]
    nvcc.unlink()
    (line,) = deepgemm_set.check(built)
    assert line.startswith(f"{built} cannot be used, as DeepGEMM would not find its own names: [Errno 2]")


def test_a_folder_without_a_record_is_no_set(tmp_path: Path) -> None:
    (line,) = deepgemm_set.check(tmp_path)
    assert line.startswith(f"{tmp_path} is no set: ")


# --- at start: what is DeepGEMM's own; the rest is as TileLang's (test_tilelang.py)


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """(a set of two kernels in use, DeepGEMM's cache)."""
    for name in ("a.0", "b.1"):
        (tmp_path / "set" / "cache" / name).mkdir(parents=True)
    (tmp_path / "set" / "built.json").write_text("{}")
    monkeypatch.setenv("NVFP4_DEEPGEMM_DIR", str(tmp_path / "set"))
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "deep_gemm"))
    deepgemm_set.use.cache_clear()
    return tmp_path / "set", tmp_path / "deep_gemm"


def test_kernels_become_links_and_what_was_compiled_is_said(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cached = folders
    caplog.set_level(logging.INFO, "vllm.nvfp4")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert deepgemm_set.use() == 2
    assert {path.name: os.readlink(path) for path in (cached / "cache").iterdir()} == {
        name: str(folder / "cache" / name) for name in ("a.0", "b.1")
    }
    deepgemm_set.report()
    assert caplog.messages == [f"DeepGEMM: 2 kernels built ahead of time in {folder}"]
    (cached / "cache" / "c.2").mkdir()
    (cached / "tmp" / "unfinished").mkdir(parents=True)
    deepgemm_set.report()
    assert caplog.messages[1:] == [f"DeepGEMM: 1 kernels that the set lacks were compiled here, in {cached}"]


def test_no_set_changes_nothing(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVFP4_DEEPGEMM_DIR")
    assert deepgemm_set.use() == 0
    assert not folders[1].exists()


def test_a_set_that_is_not_there_is_an_error(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFP4_DEEPGEMM_DIR", str(folders[0] / "absent"))
    with pytest.raises(RuntimeError, match=r"NVFP4_DEEPGEMM_DIR=.*absent is no folder; build a set there"):
        deepgemm_set.use()


def test_a_cache_that_cannot_be_written_is_an_error(folders: tuple[Path, Path]) -> None:
    folders[1].write_text("in the way")
    with pytest.raises(RuntimeError, match=r"DeepGEMM's cache cannot be written .*; set DG_JIT_CACHE_DIR to"):
        deepgemm_set.use()


def test_the_cache_is_where_vllm_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    for unset in ("", None):
        monkeypatch.delenv("DG_JIT_CACHE_DIR", raising=False)
        if unset is not None:
            monkeypatch.setenv("DG_JIT_CACHE_DIR", unset)
        assert deepgemm_set.cache_folder() == tmp_path / "deep_gemm"
    monkeypatch.setenv("DG_JIT_CACHE_DIR", "/first:/second")
    assert deepgemm_set.cache_folder() == Path("/first")
