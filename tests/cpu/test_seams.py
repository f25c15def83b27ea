"""The list of vLLM's names: it has all the overlay imports and overrides, the installed wheel fits, drift is seen."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_nvfp4 import seams
from vllm_nvfp4.seams import SEAMS, Seam, Source, describe, find

OVERLAY = Path(seams.__file__).parent
REPOSITORY = Path(__file__).parents[2]
FILES = sorted(path for path in OVERLAY.rglob("*.py") if path.name != "seams.py")


def name_of(path: Path) -> str:
    """A file of ours as `used_by` writes it."""
    return path.relative_to(OVERLAY).as_posix()


def seams_of(path: Path) -> list[Seam]:
    return [seam for seam in SEAMS if name_of(path) in seam.used_by.split()]


# --- The installed vLLM.


def test_the_installed_vllm_is_as_recorded() -> None:
    assert seams.check() == []


def test_the_record_is_of_the_pinned_version() -> None:
    pinned = dict(line.split("=", 1) for line in (REPOSITORY / "versions.env").read_text().splitlines() if "=" in line)
    assert seams.recorded()["vllm"] == pinned["VLLM_VERSION"]


def test_the_check_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; from vllm_nvfp4 import seams; seams.check(); print(sorted({'vllm', 'torch'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


# --- The table: nothing left out, nothing left over.


def test_rows_are_distinct_and_complete() -> None:
    assert len(SEAMS) > 200
    assert len({(seam.kind, seam.target) for seam in SEAMS}) == len(SEAMS)
    assert {seam.kind for seam in SEAMS} == set(seams.KINDS)
    assert all(seam.target.startswith("vllm") and seam.used_by and seam.why for seam in SEAMS)


def test_the_record_has_these_rows_and_no_others() -> None:
    recorded = {(kind, target) for kind, rows in seams.recorded()["seams"].items() for target in rows}
    assert recorded == {(seam.kind, seam.target) for seam in SEAMS}


def names_from_vllm(tree: ast.Module) -> dict[str, str]:
    """What a file of ours calls vLLM's names -> their targets; `import vllm.x` gives one that no row can have."""
    names = {}
    for node in ast.walk(tree):
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if (module or alias.name).split(".")[0] == "vllm":
                    names[alias.asname or alias.name] = f"{module}:{alias.name}"
    return names


def test_every_import_from_vllm_is_listed_with_its_file() -> None:
    imports = {(target, p) for p in FILES for target in names_from_vllm(ast.parse(p.read_text())).values()}
    assert len(imports) > 40  # the walk does find them
    missing = [f"{name_of(p)}: {t}" for t, p in imports if t not in {seam.target for seam in seams_of(p)}]
    assert not missing, "imported from vLLM, but not in seams.TABLE with this file: " + ", ".join(sorted(missing))


def listed(source: Source, path: Path, name: str) -> bool:
    """True if a row of this file is that member or entry, or the whole class that has it."""
    return any(
        seam.target.endswith((f".{name}", f":{name}", f"[{name}]"))
        or (seam.kind == "source" and find(source, f"{seam.target}.{name}") is not None)
        for seam in seams_of(path)
    )


def test_every_attribute_of_an_imported_name_is_listed() -> None:
    source = Source(seams.installed_root())
    touched = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        names = names_from_vllm(tree)
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        touched |= {(path, node.attr) for node in attributes if ast.unparse(node.value) in names}
    assert len(touched) > 15
    own = touched - {(path, name) for path, name in touched if hasattr(dict, name)}  # registries are dictionaries
    missing = [f"{name_of(path)}: {name}" for path, name in own if not listed(source, path, name)]
    assert not missing, sorted(missing)


def test_every_method_called_through_super_is_listed() -> None:
    source = Source(seams.installed_root())
    upstream = [path for path in FILES if "vllm." in path.read_text() or "Upstream" in path.read_text()]
    called = {
        (path, node.attr)
        for path in upstream
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()"
    }
    assert len(called) > 15
    missing = [f"{name_of(path)}: {method}" for path, method in called if not listed(source, path, method)]
    assert not missing, sorted(missing)


def upstream_has(source: Source, target: str, method: str) -> bool:
    """True if vLLM's class or one of its bases in vLLM defines the method."""
    found = find(source, target)
    if found is None or not isinstance(found.node, ast.ClassDef):
        return False
    bases = [ast.unparse(b.value if isinstance(b, ast.Subscript) else b) for b in found.node.bases]
    own = find(source, f"{found.module}:{found.node.name}.{method}")
    return own is not None or any(upstream_has(source, f"{found.module}:{base}", method) for base in bases)


def test_every_override_of_a_vllm_method_is_listed() -> None:
    source = Source(seams.installed_root())
    overrides = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        upstream = names_from_vllm(tree)
        for cls in (n for n in tree.body if isinstance(n, ast.ClassDef)):
            bases = [upstream[b] for b in map(ast.unparse, cls.bases) if b in upstream]
            methods = [n.name for n in cls.body if isinstance(n, ast.FunctionDef)]
            overrides += [(path, m) for m in methods if any(upstream_has(source, base, m) for base in bases)]
    assert len(overrides) > 25
    missing = {f"{name_of(path)}: {method}" for path, method in overrides if not listed(source, path, method)}
    assert not missing, sorted(missing)


def test_our_files_still_use_every_name() -> None:
    texts = {name_of(path): path.read_text() for path in FILES}
    unused = []
    for seam in SEAMS:
        last, _, key = seam.target.rpartition(":")[2].rpartition(".")[2].partition("[")
        words = {key.removesuffix("]") or last, *filter(None, seam.word.split(", "))}
        for name in seam.used_by.split():
            assert name in texts, f"{seam.target}: used_by names {name}, which is no file of the overlay"
            if not any(word in texts[name] for word in words):
                unused.append(f"{seam.target}: {name} has none of {sorted(words)}")
    assert not unused, unused


# --- Drift: a copy of vLLM's sources, one of them edited.


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed vLLM's Python files, as links."""
    root = tmp_path_factory.mktemp("root")

    def only_python(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if not n.endswith(".py") and ("." in n or n == "__pycache__")]

    shutil.copytree(seams.installed_root() / "vllm", root / "vllm", copy_function=os.symlink, ignore=only_python)
    return root


class Edit:
    """Replaces a linked file by an edited copy, and puts the link back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.links: dict[Path, str] = {}

    def __call__(self, module: str, old: str, new: str) -> list[str]:
        """Replace the first `old` (it must be there) in a module, and return the drift of that module's rows."""
        path = Source(self.root).path(module)
        text = path.read_text()
        assert old in text, f"{module} no longer has {old!r}: choose another edit"
        if path.is_symlink():
            self.links[path] = os.readlink(path)
            path.unlink()  # or the installed file would be written
        path.write_text(text.replace(old, new, 1))
        return seams.check(self.root, [seam for seam in SEAMS if seam.target.startswith(f"{module}:")])

    def undo(self) -> None:
        for path, link in self.links.items():
            path.unlink(missing_ok=True)
            path.symlink_to(link)


@pytest.fixture
def edit(farm: Path) -> Iterator[Edit]:
    editor = Edit(farm)
    yield editor
    editor.undo()


STREAMS = "vllm.utils.multi_stream_utils"
CPU_MLA = "vllm.models.deepseek_v4.cpu.cpu_mla"
SWA = "vllm.v1.attention.backends.mla.sparse_swa"
ATTENTION = "vllm.models.deepseek_v4.attention"

# module | what is replaced | by what | rows that must be reported | what each line must say
EDITS = {
    "parameter added": (STREAMS, "enable: bool = False,", "enable: bool = False, priority: int = 0,",
        ["execute_in_parallel"], ["signature was (", "priority: int=0", "attention.py"]),
    "default changed": (STREAMS, "enable: bool = False,", "enable: bool = True,",
        ["execute_in_parallel"], ["enable: bool=False", "enable: bool=True"]),
    "body changed": (CPU_MLA, "_LAYER_TYPE_C4A: None,", "_LAYER_TYPE_C4A: 0,",
        ["DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler"], ["source was", "cpu_gaps.py"]),
    "method renamed": (CPU_MLA, "def build_tile_scheduler(", "def build_tile_schedule(",
        ["DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler"], ["is missing", "cpu_gaps.py"]),
    "class renamed": (CPU_MLA, "class DeepseekV4CPUSparseSWAMetadataBuilder", "class Other",
        ["DeepseekV4CPUSparseSWAMetadataBuilder", "DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler"],
        ["is missing"]),
    "constant changed": (SWA, '_LAYER_TYPE_C1A = "c1a"', '_LAYER_TYPE_C1A = "c1b"',
        ["_LAYER_TYPE_C1A"], ["value was 'c1a', is 'c1b'"]),
    "constant computed": (SWA, '_LAYER_TYPE_C1A = "c1a"', '_LAYER_TYPE_C1A = f"c{1}a"',
        ["_LAYER_TYPE_C1A"], ["is no constant, but a value"]),
    "field added": (SWA, "    tile_sched_c2a:", "    tile_sched_c8a: int = 0\n    tile_sched_c2a:",
        ["DeepseekSparseSWAMetadata"], ["source was"]),
    "attribute built differently": (ATTENTION, "hidden_size,\n            self.n_head,\n            bias=False,\n"
        "            quant_config=None,", "hidden_size, self.n_head, bias=False, quant_config=quant_config,",
        ["DeepseekV4Indexer.weights_proj"], ["source was", f"{ATTENTION.replace('.', '/')}.py:"]),
    "entry of a registry changed": ("vllm.transformers_utils.config", 'deepseek_v4="DeepseekV4Config"',
        'deepseek_v4="DeepseekV4TextConfig"', ["_CONFIG_REGISTRY[deepseek_v4]"], ["is 'DeepseekV4TextConfig'"]),
    "entry of a registry gone": ("vllm.tool_parsers", '"deepseek_v4":', '"deepseek_v4_0":',
        ["_TOOL_PARSERS_TO_REGISTER[deepseek_v4]"], ["is missing", "cli.py"]),
    "name of a Literal gone": ("vllm.config.model", '    "deepseek_v4",\n', "",
        ["TokenizerMode[deepseek_v4]"], ["is missing"]),
    "code under a condition changed": ("vllm.triton_utils.importing", 'if name != "cpu" and x.driver', "if x.driver",
        ["HAS_TRITON"], ["source was"]),
    "re-export gone": ("vllm.model_executor.layers.fused_moe", "    RoutedExperts,\n", "",
        ["RoutedExperts"], ["exists was class, is missing", "moe.py quantization.py"]),
    "function became a class": (STREAMS, "def execute_in_parallel(", "class execute_in_parallel: pass\ndef other(",
        ["execute_in_parallel"], ["is no __init__ of its own"]),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_drift_is_reported(edit: Edit, case: str) -> None:
    module, old, new, names, texts = EDITS[case]
    drift = edit(module, old, new)
    assert [line.partition(": ")[0] for line in drift] == [f"{module}:{name}" for name in names]
    for line in drift:
        assert "\n" not in line
        assert all(text in line for text in texts), line


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (CPU_MLA, "            _LAYER_TYPE_C128A: None,\n", "            #\n\n            _LAYER_TYPE_C128A: None,\n"),
        (CPU_MLA, '"""CPU never runs the FlashMLA', '"""On CPUs nothing runs the FlashMLA'),
        (CPU_MLA, "            _LAYER_TYPE_C4A: None,\n", "            _LAYER_TYPE_C4A: (\n                None),\n"),
        (STREAMS, "enable: bool = False,", "enable: bool=False,  # opt in\n"),
        (SWA, '_LAYER_TYPE_C1A = "c1a"', "# ratio 1\n_LAYER_TYPE_C1A = 'c1a'"),
        ("vllm.config.load", "use_tqdm_on_load: bool = True", "use_tqdm_on_load: bool = False"),  # an `exists` row
    ],
)  # fmt: skip
def test_an_edit_without_effect_is_no_drift(edit: Edit, module: str, old: str, new: str) -> None:
    assert edit(module, old, new) == []


def test_a_module_that_is_gone_takes_its_rows_along(edit: Edit) -> None:
    edit(STREAMS, "import", "import")
    Source(edit.root).path(STREAMS).unlink()
    (line,) = seams.check(edit.root, [seam for seam in SEAMS if seam.target.startswith(STREAMS)])
    assert "is missing; look at vllm/utils/multi_stream_utils.py and attention.py" in line


def test_a_row_without_a_record_is_drift() -> None:
    (line,) = seams.check(seams=[Seam("vllm.envs:environment_variables", "exists", "env.py", "test")])
    assert "was not recorded, is value" in line


# --- The command.


def test_update_writes_the_file_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = seams.RECORD.read_bytes()
    monkeypatch.setattr(seams, "RECORD", tmp_path / "seams.json")
    monkeypatch.setattr(sys, "argv", ["seams", "--update"])
    seams.main()
    assert (tmp_path / "seams.json").read_bytes() == before


def test_update_refuses_a_vllm_that_lacks_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, edit: Edit) -> None:
    edit(STREAMS, "def execute_in_parallel(", "def run_in_parallel(")
    monkeypatch.setattr(seams, "RECORD", tmp_path / "seams.json")
    with pytest.raises(ValueError, match=r"multi_stream_utils:execute_in_parallel is missing, signature was asked for"):
        seams.update(edit.root)
    assert not seams.RECORD.exists()


def test_the_command_lists_drift_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["seams"])
    seams.main()
    assert capsys.readouterr().out == f"{len(SEAMS)} names of vLLM are as recorded\n"
    record = seams.recorded()
    record["seams"]["value"][f"{SWA}:_LAYER_TYPE_C1A"] = "'c1'"
    monkeypatch.setattr(seams, "RECORD", tmp_path / "seams.json")
    seams.RECORD.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as stopped:
        seams.main()
    assert str(stopped.value).startswith(f"1 of {len(SEAMS)} names differ; recorded: {record['vllm']}, found: vllm")
    assert f"{SWA}:_LAYER_TYPE_C1A: value was 'c1', is 'c1a'" in capsys.readouterr().out


def test_the_command_knows_one_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["seams", "--upgrade"])
    with pytest.raises(SystemExit, match=r"usage: .* found --upgrade"):
        seams.main()


def test_no_record_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(seams, "RECORD", tmp_path / "seams.json")
    with pytest.raises(RuntimeError, match=r"seams\.json is missing: install this package whole"):
        seams.check()


def test_no_vllm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="no vLLM is installed"):
        seams.installed_root()


# --- How names are found, on a package made for it.

PACKAGE = {
    "vllm/__init__.py": "from .a import *\nfrom .a import first as second, second as first\nfrom . import b as other\n",
    "vllm/a.py": (
        "import typing\nfrom typing import overload\n"
        "if typing.TYPE_CHECKING:\n    hidden: int = 1\nelse:\n    shown = 2\n"
        "try:\n    import fast\n    which = 1\nexcept ImportError:\n    which = 2\n"
        "def __getattr__(name):\n    if name == 'late':\n        return 1\n"
        "@overload\ndef first(x: int) -> int: ...\n@overload\ndef first(x: str) -> str: ...\n"
        "def first(x):\n    return x\n"
        "async def second(*, y: 'int' = 3, **rest) -> None: pass\n"
        "left, right = 1, 2\n"
        "TABLE = {'plain': 1, Kind.CPU: 2, **{'inner': 3}}\n"
    ),
    "vllm/b/__init__.py": "from ..a import first\nfrom .c import Klass\n",
    "vllm/b/c.py": (
        "from .. import other\nfrom elsewhere import foreign\n"
        "class Klass:\n    flag = True\n    field: int\n"
        "    def method(self):\n        self.one, self.two = 1, 2\n        self.two = 3\n"
        "    class Inner:\n        def deep(self, z=1): pass\n"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("package")
    for name, text in PACKAGE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Source(root)


@pytest.mark.parametrize(
    ("target", "kind", "text"),
    [
        ("vllm:left", "value", "(1, 2)"),  # starred in; a tuple's targets share its value
        ("vllm:second", "signature", "(x)"),  # renamed on import, and the overloads passed over
        ("vllm:first", "signature", "(*, y: 'int'=3, **rest) -> None"),
        ("vllm:b", "exists", "module"),
        ("vllm:other.Klass", "exists", "class"),
        ("vllm.b:first", "exists", "function"),
        ("vllm.b:Klass.flag", "value", "True"),
        ("vllm.b:Klass.field", "exists", "value"),
        ("vllm.b:Klass.field", "value", "no constant, but a value"),
        ("vllm.b:Klass", "signature", "no __init__ of its own"),
        ("vllm.b:Klass.flag", "signature", "no function or class, but a value"),
        ("vllm.b:Klass.one", "exists", "attribute"),
        ("vllm.b:Klass.two", "value", "3"),
        ("vllm.b:Klass.Inner.deep", "signature", "(self, z=1)"),
        ("vllm.a:shown", "value", "2"),
        ("vllm.a:which", "value", "2"),
        ("vllm.a:late", "exists", "lazy"),
        ("vllm.a:TABLE[plain]", "value", "1"),
        ("vllm.a:TABLE[CPU]", "value", "2"),
        ("vllm.a:TABLE[inner]", "value", "3"),
    ],
)
def test_names_are_found(package: Source, target: str, kind: str, text: str) -> None:
    found = find(package, target)
    assert found is not None
    assert describe(kind, found) == text


@pytest.mark.parametrize(
    "target",
    ["vllm.a:hidden", "vllm.a:nothing", "vllm.a:TABLE[none]", "vllm.a:which[key]", "vllm.a:first.x", "vllm.a:late.more",
     "vllm.b:Klass.three", "vllm.b.c:foreign", "vllm.z:any"],
)  # fmt: skip
def test_what_is_not_there_is_not_found(package: Source, target: str) -> None:
    assert find(package, target) is None


def test_what_is_bound_twice_is_hashed_whole(package: Source) -> None:
    found = find(package, "vllm.a:which")
    assert found is not None
    assert [type(node) for node in found.code] == [ast.Try]
