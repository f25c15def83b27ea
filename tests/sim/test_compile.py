"""The cache of compiled kernels: what its key holds, what it counts, and that a frozen one never compiles."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cutedsl import compile as compiler
from cutedsl.kernels import finalize_sm100
from cutedsl.kernels.finalize_sm100 import Config, FinalizeSm100
from cutedsl.kernels.linear_sm100 import LinearSm100
from ptxsim.host.capture import prepare_environment

prepare_environment()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache as at the start of a process."""
    monkeypatch.setattr(compiler, "_functions", {})
    monkeypatch.setattr(compiler, "_sets", [])
    monkeypatch.setattr(compiler, "_counts", dict.fromkeys(compiler._counts, 0))
    monkeypatch.delenv(compiler.NO_JIT, raising=False)
    yield
    compiler.freeze(False)


@dataclass(frozen=True)
class Other:
    value: Any


# ---- counters and freezing ------------------------------------------------------------------------------------------


def test_hits_misses_and_seconds_are_counted() -> None:
    first = finalize_sm100.compiled(Config(1))
    assert finalize_sm100.compiled(Config(1)) is first
    assert finalize_sm100.compiled(Config(1), line_info=True) is first, "the tests' environment asks for line numbers"
    found = compiler.counters()
    assert (found.hits, found.misses, found.loaded, found.compilations) == (2, 1, 0, 1)
    assert found.compile_seconds > 0
    assert found.load_seconds == 0
    (key,) = compiler.cached_keys()
    assert (key.kernel, key.config, key.arch) == ("cutedsl.kernels.finalize_sm100.FinalizeSm100", Config(1), "sm_100a")


def test_a_frozen_cache_serves_what_it_has() -> None:
    first = finalize_sm100.compiled(Config(1))
    compiler.freeze()
    assert compiler.frozen()
    assert finalize_sm100.compiled(Config(1)) is first


def test_a_frozen_cache_compiles_nothing() -> None:
    compiler.freeze()
    with pytest.raises(compiler.CompilationRefusedError) as caught:
        finalize_sm100.compiled(Config(7), line_info=False)
    message = str(caught.value)
    for part in (
        "the cache is frozen",
        "cutedsl.kernels.finalize_sm100.FinalizeSm100",
        "top_k=7",
        "sm_100a",
        "sets in use: none",
        "python -m cutedsl.aot build",
        "during warm-up",
    ):
        assert part in message
    assert compiler.counters().compilations == 0
    compiler.freeze(False)
    assert not compiler.frozen()


def test_the_environment_freezes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.NO_JIT, "1")
    compiler.freeze(False)
    with pytest.raises(compiler.CompilationRefusedError, match=r"NVFP4_NO_JIT=1, and .*unset CUTE_DSL_LINEINFO"):
        finalize_sm100.compiled(Config(7), line_info=True)
    monkeypatch.setenv(compiler.NO_JIT, "yes")
    with pytest.raises(ValueError, match="NVFP4_NO_JIT='yes': expected 0 or 1"):
        compiler.frozen()


def test_strict_mode_compiles_nothing_beside_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.STRICT, "1")
    assert not compiler.frozen()
    monkeypatch.setattr(compiler, "_sets", [SimpleNamespace(directory="a-set", find=lambda *_: None)])
    assert compiler.frozen()
    with pytest.raises(compiler.CompilationRefusedError, match=r"NVFP4_STRICT=1"):
        compiler._compile((finalize_sm100.FinalizeSm100, Config(7), "sm_100a", False), lambda: ())


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_sources_are_the_module_and_what_it_imports() -> None:
    found = set(compiler.source_digests(LinearSm100))
    names = ("kernels/linear_sm100", "kernels/blackwell", "ops/registry", "formats", "layout")
    assert found >= {f"cutedsl/{name}.py" for name in names}
    assert "cutedsl/compile.py" not in found
    assert "cutedsl/kernels/route_sm100.py" not in found


def package(root: Path) -> Path:
    """A kernel that imports a module, a name of a module, and one of these a third; and one that does so late."""
    files = {
        "kernels/k": "from cutedsl.kernels import helper\nfrom cutedsl.names import NAME\nimport cutedsl.compile\n"
        "def late():\n    from cutedsl import unused\n",
        "kernels/helper": "import cutedsl.deep\nimport json\n",
        "names": "NAME = 1\n",
        "deep": "",
        "unused": "",
        "compile": "",
    }
    for name, text in files.items():
        path = root / "cutedsl" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "cutedsl" / "kernels" / "k.py"


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("kernels/k", True),
        ("kernels/helper", True),
        ("names", True),
        ("deep", True),
        ("unused", False),
        ("compile", False),
    ],
)
def test_a_changed_source_is_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, matters: bool
) -> None:
    monkeypatch.setattr(compiler, "_ROOT", tmp_path)
    path = package(tmp_path)
    before = compiler.combined_digest(compiler.sources(path))
    changed = tmp_path / "cutedsl" / f"{name}.py"
    changed.write_text(changed.read_text() + "# changed\n")
    assert (compiler.combined_digest(compiler.sources(path)) != before) == matters


def test_the_place_of_the_package_is_not_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for place in ("one", "two"):
        monkeypatch.setattr(compiler, "_ROOT", tmp_path / place)
        digests.add(compiler.combined_digest(compiler.sources(package(tmp_path / place))))
    assert len(digests) == 1


def test_everything_in_a_key_is_in_its_digest() -> None:
    key = compiler.key_of(FinalizeSm100, Config(1), "sm_100a", False)
    others = [
        compiler.key_of(FinalizeSm100, Config(2), "sm_100a", False),
        compiler.key_of(FinalizeSm100, Config(1), "sm_103a", False),
        compiler.key_of(FinalizeSm100, Config(1), "sm_100a", True),
        compiler.Key(key.kernel, "0" * 64, key.config, key.arch, key.dsl_version, key.options),
        compiler.Key(key.kernel, key.source, key.config, key.arch, "4.8.1", key.options),
        compiler.Key("x", key.source, key.config, key.arch, key.dsl_version, key.options),
    ]
    assert len({key.digest, *(other.digest for other in others)}) == 1 + len(others)
    assert key.digest == compiler.key_of(FinalizeSm100, Config(1), "sm_100a", False).digest


@pytest.mark.parametrize("config", ["text", Config, Other(object())])
def test_configurations_that_have_no_text(config: Any) -> None:
    with pytest.raises(TypeError, match=r"config is .*, expected"):
        compiler.config_text(config)


def test_the_version_is_that_of_the_compiler() -> None:
    import cutlass

    assert compiler.dsl_version() == cutlass.__version__
