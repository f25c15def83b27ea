"""TileLang's kernels built ahead of time, with a stand-in for TileLang: all that vLLM asks for, linked, counted, checked."""

import dataclasses
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm_nvfp4 import deepgemm_set, kernel_sets, model_loader, platform, tilelang_build, tilelang_set, warmup_worker
from vllm_nvfp4.status import Status

STUB = Path(__file__).with_name("tilelang_stub")
LAYOUT = Path("0.1.12/linux-x86_64/kernels")


def splits(num_sms: int, hidden_size: int) -> set[int]:
    """Ways to split a reduction of this size over SMs: as many as tiles of 64 tokens leave, four blocks of 64 each."""
    longest = math.ceil(hidden_size / 64) // 4
    return {max(1, min(num_sms // tiles, longest)) for tiles in range(1, 1000)}


def expected(arch: str, sizes: tilelang_build.Sizes) -> int:
    num_sms = tilelang_build.NUM_SMS[arch]
    # 8: how the kernel that is fused with `post` splits.
    pre = splits(num_sms, sizes.hidden_size * sizes.hc_mult) | {1, 8}
    broadcast = splits(num_sms, sizes.hidden_size)
    return len(pre) + len(broadcast) + 4  # post, the head, two tiles of the fused kernel


# --- the build, in processes as the Dockerfile starts it


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which TileLang is the stand-in."""
    folder = tmp_path_factory.mktemp("stub")
    about = folder / "tilelang-0.1.12.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: tilelang\nVersion: 0.1.12\n")
    shutil.copy(STUB / "tilelang.py", folder)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "TILELANG_STUB_LOG": str(folder / "log")}


@pytest.fixture(scope="module")
def built(stub: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "tilelang"
    # Alone, and not from its folder: `platform` there is ours.
    script = shutil.copy(tilelang_build.__file__, tmp_path_factory.mktemp("src"))
    command = [sys.executable, script, "--out", str(out), "--arch", "sm_90a", "--jobs", "1", "--require"]
    done = subprocess.run(command, env={**os.environ, **stub}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_it_has_all_that_vllm_warms_up(built: Path, stub: dict[str, str]) -> None:
    total = sum(expected("sm_90a", sizes) for sizes in tilelang_build.MODELS.values())
    assert total > 60
    assert len(list(built.glob(f"{LAYOUT}/*"))) == total
    record = json.loads((built / "built.json").read_text())
    assert (record["kernels"], record["archs"], record["tilelang"]) == (total, ["sm_90a"], "0.1.12")
    assert record["models"] == {name: dataclasses.asdict(sizes) for name, sizes in tilelang_build.MODELS.items()}
    seen = [json.loads(line) for line in Path(stub["TILELANG_STUB_LOG"]).read_text().splitlines()]
    assert {json.loads(target)["arch"] for _, target, _ in seen} == {"sm_90a"}
    # The level of registers is asked of the platform: CUDA alone has it.
    assert all(options["registers"] == 10 for _, _, options in seen)


def test_sources_are_kept_empty(built: Path) -> None:
    entry = next(built.glob(f"{LAYOUT}/*"))
    sizes = {path.name: path.stat().st_size > 0 for path in entry.iterdir()}
    assert sizes == {"device_kernel.cu": False, "host_kernel.cu": False, "executable.so": True, "params.pkl": True}


def test_the_check_finds_each_kernel_and_names_one_that_is_gone(
    built: Path, stub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(stub["PYTHONPATH"].split(os.pathsep)[0])
    monkeypatch.setenv("TILELANG_STUB_LOG", str(tmp_path / "log"))
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    shutil.rmtree(next(copy.glob(f"{LAYOUT}/*")))
    (line,) = tilelang_set.check(copy)
    assert re.fullmatch(
        r"sm_90a: _\w+_TILELANG_KERNEL \{'hidden_size': .*\}: it is not in the set, or does not load", line
    )
    record = json.loads((copy / "built.json").read_text())
    (copy / "built.json").write_text(json.dumps(record | {"tilelang": "0.1.11"}))
    assert tilelang_set.check(copy) == [f"{copy} was built by TileLang 0.1.11, expected 0.1.12"]


def test_a_process_that_a_kernel_ends_is_a_line(
    built: Path, stub: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(stub["PYTHONPATH"].split(os.pathsep)[0])
    monkeypatch.setattr(tilelang_build, "pool", lambda *_: Inline())
    monkeypatch.setattr(tilelang_build, "work", lambda models: [])
    monkeypatch.setattr(tilelang_set, "_not_loaded", broken)
    (line,) = tilelang_set.check(built)
    assert line == f"sm_90a: a kernel ends the process that loads it; {built} is damaged, build it again"


# --- the build, its failures and its usage


class Inline:
    """A pool of this process."""

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def shutdown(self, *, cancel_futures: bool) -> None:
        assert cancel_futures

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def broken(*_: Any) -> None:
    raise BrokenProcessPool


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tilelang_build, "missing_tool", lambda: "")
    monkeypatch.setattr(tilelang_build, "pool", lambda *_: Inline())
    monkeypatch.setattr(tilelang_build, "work", lambda models: [("_KERNEL", {"n_splits": 3})])
    monkeypatch.setattr(tilelang_build, "compile_key", lambda *_: None)


@pytest.mark.usefixtures("inline")
def test_a_kernel_that_does_not_compile_ends_the_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, fields: Any) -> None:
        raise OSError("ptxas fatal")

    monkeypatch.setattr(tilelang_build, "compile_key", fail)
    assert tilelang_build.main(["--out", str(tmp_path), "--arch", "sm_100a"]) == 1
    want = "tilelang_build: sm_100a: ('_KERNEL', {'n_splits': 3}) does not compile: ptxas fatal\n"
    assert capsys.readouterr().err == want
    assert not (tmp_path / "built.json").exists()


@pytest.mark.usefixtures("inline")
def test_a_cache_of_another_layout_ends_the_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tilelang_build.main(["--out", str(tmp_path)]) == 1
    assert "TileLang's cache has 0 kernels in VERSION/PLATFORM/kernels, expected 2" in capsys.readouterr().err


def test_published_sizes_are_those_of_their_configs(root: Path) -> None:
    for name, sizes in tilelang_build.MODELS.items():
        config = str(root / "tests" / "data" / "configs" / f"{name}.json")
        assert tilelang_build.find_sizes(config, tilelang_build.MODELS) == sizes
        assert tilelang_build.find_sizes(name, tilelang_build.MODELS) == sizes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "sm_90a,sm_75"], "--arch: sm_75, expected some of sm_90a, sm_100a"),
        (["--model", "deepseek-v3"], "--model: 'deepseek-v3' is neither one of deepseek-v4-pro, deepseek-v4-flash nor"),
        (["--out", "{parent}"], "--out: {parent} is not empty; name a new folder"),
    ],
)
def test_wrong_usage(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = tmp_path / "parent"
    (parent / "something").mkdir(parents=True)
    asked = [flag.format(parent=parent) for flag in flags]
    assert tilelang_build.main(["--out", str(tmp_path / "new"), *asked]) == 64
    assert message.format(parent=parent) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_without_a_compiler_it_says_so_or_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tilelang_build, "missing_tool", lambda: "no nvcc: somewhere")
    assert tilelang_build.main(["--out", str(tmp_path / "a")]) == 0
    assert tilelang_build.main(["--out", str(tmp_path / "b"), "--require"]) == 1
    assert capsys.readouterr().err == "tilelang_build: left out, every start will compile: no nvcc: somewhere\n" * 2
    assert tilelang_set.check(tmp_path / "a") == []
    assert capsys.readouterr().out == "tilelang_set: there is none, every start compiles: no nvcc: somewhere\n"


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (lambda: sys.executable, ""),
        (lambda: "/absent/bin/nvcc", "no nvcc: /absent/bin/nvcc is not there"),
        (lambda: (_ for _ in ()).throw(RuntimeError("CUDA_HOME")), "no nvcc: CUDA_HOME"),
    ],
)
def test_what_is_missing(compiler: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contrib: Any = ModuleType("tilelang.contrib")
    contrib.nvcc = SimpleNamespace(get_nvcc_compiler=compiler)
    monkeypatch.setitem(sys.modules, "tilelang", ModuleType("tilelang"))
    monkeypatch.setitem(sys.modules, "tilelang.contrib", contrib)
    monkeypatch.setattr(tilelang_build.importlib.util, "find_spec", lambda name: name)
    assert tilelang_build.missing_tool() == reason
    monkeypatch.setattr(tilelang_build.importlib.util, "find_spec", lambda name: None)
    assert tilelang_build.missing_tool() == "tilelang is not installed"


# --- at start


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """(a set of two kernels in use, TileLang's cache)."""
    folder, cached = tmp_path / "set", tmp_path / "cache"
    for name in ("a", "b"):
        (folder / LAYOUT / name).mkdir(parents=True)
    (folder / "built.json").write_text("{}")
    monkeypatch.setenv("NVFP4_TILELANG_DIR", str(folder))
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(cached))
    tilelang_set.use.cache_clear()
    return folder, cached


def test_no_set_changes_nothing(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVFP4_TILELANG_DIR")
    assert tilelang_set.use() == 0
    assert not folders[1].exists()


def test_kernels_become_links_and_tilelang_can_add_its_own(folders: tuple[Path, Path]) -> None:
    folder, cached = folders
    kernels = cached / LAYOUT
    (kernels / "b").mkdir(parents=True)  # compiled here, before there was a set
    (kernels / "old").symlink_to(folder / "gone")
    assert tilelang_set.use() == 2
    assert {path.name: path.is_symlink() for path in kernels.iterdir()} == {"a": True, "b": False}
    assert os.readlink(kernels / "a") == str(folder / LAYOUT / "a")
    assert tilelang_set.link(folder, cached) == 2  # another rank
    (kernels / "c").mkdir()


def test_a_relative_folder_is_found_from_the_cache(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders[0].parent)
    monkeypatch.setenv("NVFP4_TILELANG_DIR", "set")
    assert tilelang_set.use() == 2
    assert (folders[1] / LAYOUT / "a").is_dir()


def test_a_set_that_is_not_there_is_an_error(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFP4_TILELANG_DIR", str(folders[0] / "absent"))
    with pytest.raises(
        RuntimeError, match=re.escape(f"NVFP4_TILELANG_DIR={folders[0] / 'absent'} is no folder; build")
    ):
        tilelang_set.use()


def test_a_cache_that_cannot_be_written_is_an_error(folders: tuple[Path, Path]) -> None:
    folders[1].write_text("in the way")
    with pytest.raises(RuntimeError, match=r"TileLang's cache cannot be written .*; set TILELANG_CACHE_DIR to"):
        tilelang_set.use()


def test_tilelangs_own_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TILELANG_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tilelang_set.cache_folder() == tmp_path / ".tilelang" / "cache"


def test_what_was_compiled_all_the_same_is_said(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.nvfp4")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert tilelang_set.use() == 2
    caplog.clear()
    tilelang_set.report()
    assert caplog.messages == []
    (folders[1] / LAYOUT / "c").mkdir()
    tilelang_set.report()
    assert caplog.messages == [f"TileLang: 1 kernels that the set lacks were compiled here, in {folders[1]}"]
    monkeypatch.delenv("NVFP4_TILELANG_DIR")
    tilelang_set.report()
    assert len(caplog.messages) == 1


class Worker:
    """vLLM's worker, as far as we rely on it."""

    model_runner = SimpleNamespace()

    def compile_or_warm_up_model(self) -> None:
        said.append("vLLM's warm-up")


said: list[str] = []


def test_sets_are_used_in_front_of_the_model_and_the_rest_reported_behind_vllms_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def construct(*_: Any, **__: Any) -> None:
        said.append("model")
        raise KeyError("no further")

    said.clear()
    monkeypatch.setattr(model_loader, "get_world_group", lambda: SimpleNamespace(rank=0))
    monkeypatch.setattr(platform, "backend", lambda: "sm90")
    monkeypatch.setattr(kernel_sets, "use", lambda: 0)
    for kernels in (tilelang_set, deepgemm_set):
        monkeypatch.setattr(kernels, "use", lambda: said.append("use"))
        monkeypatch.setattr(kernels, "report", lambda: said.append("report"))
    monkeypatch.setattr(model_loader.DefaultModelLoader, "load_model", construct)
    loader = object.__new__(model_loader.Nvfp4ModelLoader)
    with pytest.raises(KeyError, match="no further"):
        loader.load_model(SimpleNamespace(), SimpleNamespace())
    monkeypatch.setattr(warmup_worker, "_followed", set())
    monkeypatch.setattr(warmup_worker, "_status", Status(""))
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", Worker.compile_or_warm_up_model)  # undone at the end
    config = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=f"{__name__}.Worker"))
    warmup_worker.follow(config, Status(""))
    Worker().compile_or_warm_up_model()
    assert said == ["use", "use", "model", "vLLM's warm-up", "report", "report"]
    monkeypatch.setattr(platform, "backend", lambda: "reference")
    with pytest.raises(KeyError, match="no further"):
        loader.load_model(SimpleNamespace(), SimpleNamespace())
    assert said[6:] == ["model"], "nothing of TileLang and DeepGEMM runs on a CPU"


def test_a_folder_without_a_record_is_no_set(tmp_path: Path) -> None:
    (line,) = tilelang_set.check(tmp_path)
    assert line.startswith(f"{tmp_path} is no set: ")
