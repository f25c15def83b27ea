"""What the doctor says about checkpoints that the corpus cannot make, how it reads, and that damaged input never stops it."""

import io
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from damage_checkpoint import Copy
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint
from rich.console import Console
from vllm_nvfp4.checkpoint import DTYPES, Tensor, read_folder
from vllm_nvfp4.doctor import metadata, ranges, report, scale_checks
from vllm_nvfp4.doctor.examine import Options, Report, examine
from vllm_nvfp4.doctor.findings import CODES, ERROR, INFO, Finding, grouped, make, printable
from vllm_nvfp4.doctor.plan import PlanOptions

from cutedsl.quantize import quantize_weight

ON_B200 = Options(plan=PlanOptions(gpu="b200"), asked=True)
ON_H200 = Options(plan=PlanOptions(gpu="h200"), asked=True)
SMALL = {"hidden": 128, "experts": 4, "topk": 2}


def found(report: Report) -> list[tuple[str, str]]:
    return [(str(f.severity), f.code) for f in report.findings]


def only(report: Report, code: str) -> Finding:
    findings = [f for f in report.findings if f.code == code]
    assert len(findings) == 1, report.findings
    return findings[0]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    make_tiny_checkpoint(tmp_path / "tiny", TinySpec(**SMALL, shards=2))
    return tmp_path / "tiny"


def test_a_real_export(affine: Path) -> None:
    result = examine(str(affine), Options(deep=True))
    assert (result.exit_code, result.coverage.layout) == (0, "L2")
    assert "'model.layers.0.ffn.gate.tid2eid'" in result.coverage.evidence
    assert found(result) == [("info", "IGNORE_OMITS"), ("info", "IGNORE_UNMATCHED")]
    omitted = only(result, "IGNORE_OMITS")
    assert (omitted.tensor, omitted.count, omitted.examples[0]) == (
        "model.layers.*.attn.wo_a", 4, "model.layers.0.attn.wo_a",
    )  # fmt: skip
    assert only(result, "IGNORE_UNMATCHED").tensor == "lm_head"
    header = read_folder(affine)
    assert result.num_tensors == len(header) == sum(row.tensors for row in result.coverage.rows)
    assert (
        result.num_bytes == sum(t.num_bytes for t in header.values()) == sum(row.bytes for row in result.coverage.rows)
    )


def test_the_coverage_of_a_real_export(affine: Path) -> None:
    rows = {(row.cls, row.format): row for row in examine(str(affine), Options()).coverage.rows}
    assert rows["routed experts", "NVFP4"].kernels == ("cutedsl reference", "cutedsl sm90", "cutedsl sm100")
    assert rows["o_a", "FP32"].kernels == ("vLLM",) * 3
    counts = {key: (row.modules, row.tensors) for key, row in rows.items()}
    assert counts == {
        ("routed experts", "NVFP4"): (384, 1536), ("shared experts", "NVFP4"): (12, 48), ("q_a", "NVFP4"): (4, 16),
        ("q_b", "NVFP4"): (4, 16), ("kv", "NVFP4"): (4, 16), ("o_a", "FP32"): (4, 4), ("o_b", "NVFP4"): (4, 16),
        ("norms", "FP32"): (0, 22), ("compressor", "FP32"): (0, 3), ("compressor", "NVFP4"): (6, 24),
        ("indexer compressor", "FP32"): (0, 2), ("indexer compressor", "NVFP4"): (4, 16), ("indexer q_b", "NVFP4"): (2, 8),
        ("indexer weights_proj", "NVFP4"): (2, 8), ("router", "FP32"): (0, 7), ("router", "INT64"): (0, 1),
        ("hyper-connections", "FP32"): (0, 27), ("attention sinks", "FP32"): (0, 4), ("embedding", "FP32"): (0, 1),
        ("head", "FP32"): (0, 1),
    }  # fmt: skip


def test_mtp_layers_are_a_class_of_their_own(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "x", TinySpec(**SMALL, layout="L3", mtp=1))
    rows = {row.format: row for row in examine(str(tmp_path / "x"), Options()).coverage.rows if row.cls == "mtp"}
    assert rows["NVFP4"].kernels == ("not used", "cutedsl sm90", "cutedsl sm100")
    assert rows["FP8 block"].modules == 10


def test_nothing_there(tmp_path: Path) -> None:
    result = examine(str(tmp_path / "no" / "such" / "path"), Options())
    assert (found(result), result.exit_code) == ([("error", "NOT_FOUND")], 1)


def test_no_generation_config(tiny: Path) -> None:
    (tiny / "generation_config.json").unlink()
    result = examine(str(tiny), Options())
    assert ("info", "GENERATION_CONFIG_MISSING") in found(result)
    assert result.exit_code == 0


def test_known_tensors_without_a_use(tiny: Path) -> None:
    copy = Copy(tiny)
    like = copy.names["model.layers.0.attn.wkv.weight"]
    copy.put({f"model.layers.{i}.attn.wkv.k_scale": torch.ones(()) for i in (0, 1)}, like)
    unused = only(examine(str(tiny), Options()), "TENSOR_UNUSED")
    assert (unused.tensor, unused.count, unused.severity) == ("model.layers.*.attn.wkv.k_scale", 2, INFO)


def test_wo_a_in_nvfp4_serves_everywhere(tiny: Path) -> None:
    copy = Copy(tiny)
    stem = "model.layers.2.attn.wo_a."
    packed = quantize_weight(copy.read(f"{stem}weight"))
    changed = {
        "weight": packed.weight,
        "weight_scale": packed.weight_scale,
        "weight_scale_2": packed.weight_scale_2.clone(),
    }
    name = copy.names[f"{stem}weight"]
    copy.put({name.removesuffix("weight") + leaf: value for leaf, value in changed.items()}, name)
    Copy(tiny).put({name.removesuffix("weight") + "input_scale": torch.tensor(0.01)}, name)
    for options in (Options(), ON_B200, ON_H200):
        assert "NO_KERNEL" not in [finding.code for finding in examine(str(tiny), options).findings]


def test_a_gpu_that_kernels_are_not_compiled_for(tiny: Path) -> None:
    # 10.3: another machine code than a B200's 10.0.
    for gpu in ("b300", "gb300"):
        report = examine(str(tiny), Options(plan=PlanOptions(gpu=gpu), asked=True))
        missing = [finding for finding in report.findings if finding.code == "NO_KERNEL"]
        assert missing
        assert {(finding.severity, finding.value) for finding in missing} == {(ERROR, "NVFP4: no kernel on sm103")}
        assert report.exit_code == 1


def test_shards_that_differ_are_exact(tiny: Path) -> None:
    copy = Copy(tiny)
    copy.edit("model.layers.1.attn.wkv.input_scale", lambda t: t * 2)
    copy.edit("model.layers.2.attn.wkv.input_scale", lambda t: t * 3)
    copy.edit("model.layers.1.ffn.experts.1.w3.weight_scale_2", lambda t: t * 1.5)
    for options in (Options(), ON_H200, ON_B200):
        differ = [f for f in examine(str(tiny), options).findings if f.code == "SHARD_SCALES_DIFFER"]
        assert [(finding.severity, finding.count) for finding in differ] == [(INFO, 2), (INFO, 1)]
        assert "a ratio of 3" in differ[0].value  # the largest is shown


@pytest.mark.parametrize("module", ["experts.1.w3", "shared_experts.w3"])
def test_gate_and_up_that_sm100_would_quantize_once(tiny: Path, module: str) -> None:
    Copy(tiny).edit(f"model.layers.1.ffn.{module}.input_scale", lambda t: t * 2)
    found_on = {"cpu": Options(), "h200": ON_H200, "b200": ON_B200}
    reports = {name: examine(str(tiny), options) for name, options in found_on.items()}
    severities = {name: only(report, "SHARD_SCALES_DIFFER").severity for name, report in reports.items()}
    assert severities == {"cpu": INFO, "h200": INFO, "b200": ERROR}
    assert reports["b200"].exit_code == 1


def test_the_factor_of_an_inverted_scale_is_reported(tiny: Path) -> None:
    copy = Copy(tiny)
    # amax 42.6 stored as 2688 / 42.6: the square of 63.1 is the factor that once went unnoticed.
    copy.edit("model.layers.3.attn.wq_b.input_scale", lambda t: torch.full_like(t, 2688 / 42.6))
    value = only(examine(str(tiny), Options()), "INPUT_SCALE_AMPLIFIES").value
    assert "implies values up to 1.696e+05" in value
    assert "read as an inverse it implies 42.6, a factor of 3981" in value


def test_fp8_scales(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "x", TinySpec(**SMALL, layout="L3"))
    path = tmp_path / "x" / "model.safetensors"
    scale = read_folder(tmp_path / "x")["layers.1.attn.wq_b.scale"]
    with path.open("r+b") as file:
        file.seek(scale.start)
        file.write(b"\xff")
    bad = only(examine(str(tmp_path / "x"), Options()), "FP8_SCALE_BAD")
    assert bad.tensor == "layers.1.attn.wq_b.scale"
    assert bad.value.startswith("1 block scales")


def test_mtp_layers_that_the_configuration_does_not_count(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "x", TinySpec(**SMALL, layout="bare", mtp=1))
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    result = examine(str(tmp_path / "x"), Options())
    assert ("warning", "MTP_UNDECLARED") in found(result)
    assert result.exit_code == 2


def test_all_problems_at_once(tiny: Path) -> None:
    copy = Copy(tiny)
    copy.edit("model.layers.1.attn.wq_b.input_scale", lambda t: t * float("nan"))
    Copy(tiny).edit("model.layers.2.attn.wo_b.weight_scale_2", lambda t: None)
    Copy(tiny).edit("model.layers.2.ffn.experts.1.w2.weight_scale", lambda t: t.float())
    (tiny / "tokenizer.json").unlink()
    copy.configure(num_hash_layers=3, rope_theta=7.0)
    codes = [f.code for f in examine(str(tiny), Options()).findings if f.severity is not INFO]
    assert sorted(codes) == [
        "CONFIG_CONTRADICTION", "CONFIG_CONTRADICTION", "SCALE_NAN", "TENSOR_DTYPE", "TENSOR_MISSING", "TOKENIZER_MISSING",
    ]  # fmt: skip


def test_a_lost_shard_does_not_become_missing_tensors_but_others_still_do(tiny: Path) -> None:
    Copy(tiny).edit("model.layers.1.attn.q_norm.weight", lambda t: None)
    Copy(tiny).edit("model.norm.weight", lambda t: None)
    files = sorted(tiny.glob("*.safetensors"))
    files[0].write_bytes(b"")
    missing = [f.tensor for f in examine(str(tiny), Options()).findings if f.code == "TENSOR_MISSING"]
    assert missing == ["model.layers.1.attn.q_norm.weight", "model.norm.weight"] or missing == [
        "model.norm.weight", "model.layers.1.attn.q_norm.weight",
    ]  # fmt: skip


def test_the_same_declarations_count_as_in_the_server() -> None:
    from vllm_nvfp4.quantization import is_ours

    values: list[Any] = [None, "modelopt", "modelopt_fp4", "fp8", "deepseek_v4_fp8", "awq", "MODELOPT"]
    for method in values:
        for algo in (None, "NVFP4", "nvfp4", "FP8", 4):
            for key in ("quant_algo", "moe_quant_algo"):
                declared = {"quant_method": method, key: algo}
                assert metadata.declares_nvfp4(declared) == is_ours(declared, "deepseek_v4"), declared
    nested = {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}
    assert metadata.declares_nvfp4(nested) is is_ours(nested, "deepseek_v4") is True
    assert metadata.declares_nvfp4("modelopt") is is_ours("modelopt", "deepseek_v4") is False  # type: ignore[arg-type]


def test_wildcards_in_ignore_lists(tiny: Path) -> None:
    copy = Copy(tiny)
    quantization = copy.config["quantization_config"]
    copy.configure(
        quantization_config=quantization | {"ignore": ["*.wo_a", "*.gate", "*.experts.*.w2", "mtp.*", "head"]}
    )
    (tiny / "hf_quant_config.json").unlink()
    result = examine(str(tiny), Options())
    assert only(result, "IGNORE_CONTRADICTS").tensor == "model.layers.*.ffn.experts.*.w2"
    assert only(result, "IGNORE_CONTRADICTS").count == 16
    assert only(result, "IGNORE_UNMATCHED").tensor == "mtp.*"
    assert "IGNORE_OMITS" not in [f.code for f in result.findings]


# Reading.


def test_large_checkpoints_are_sampled_and_say_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison_middle(t: torch.Tensor) -> torch.Tensor:
        raw = t.view(torch.uint8).flatten().clone()
        raw[raw.numel() // 2] = 0x7F
        return raw.view(t.dtype).reshape(t.shape)

    Copy(tiny).edit("model.layers.1.attn.wq_b.weight_scale", poison_middle)
    monkeypatch.setattr(scale_checks, "WHOLE_BYTES", 0)
    monkeypatch.setattr(scale_checks, "END_BYTES", 64)
    sampled, deep = examine(str(tiny), Options()), examine(str(tiny), Options(deep=True))
    assert sampled.exit_code == 0
    assert 0 < sampled.scales.block_bytes_read < sampled.scales.block_bytes == deep.scales.block_bytes_read
    assert only(deep, "BLOCK_SCALE_NAN").tensor == "model.layers.1.attn.wq_b.weight_scale"
    out = io.StringIO()
    report.render(sampled, Console(file=out, width=200))
    assert "both ends of each tensor; --deep reads all" in out.getvalue()


def test_ranges_come_back_as_they_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    contents = {tmp_path / n: generator.integers(0, 256, 100_000, dtype=np.uint8) for n in "ab"}
    for path, content in contents.items():
        content.tofile(path)
    monkeypatch.setattr(ranges, "MAX_GAP", 500)
    monkeypatch.setattr(ranges, "MAX_SPAN", 3000)
    starts = generator.integers(0, 90_000, 400)
    wanted = [
        ranges.Range(f"{i}", tmp_path / "ab"[i % 2], int(start), int(generator.integers(0, 3000)))
        for i, start in enumerate(starts)
    ]
    done = list(ranges.reduce_all(wanted, bytes))
    assert sorted(d.range.name for d in done) == sorted(w.name for w in wanted)
    for d in done:
        end = d.range.start + d.range.num_bytes
        assert d.result == contents[d.range.file][d.range.start : end].tobytes(), d.range


@pytest.mark.parametrize("size", [0, 1, 7, ranges.PAIRS_FROM - 1, ranges.PAIRS_FROM, ranges.PAIRS_FROM + 1])
def test_bytes_are_counted(size: int) -> None:
    raw = np.random.default_rng(size).integers(0, 251, size, dtype=np.uint8)  # five values never occur
    counts = ranges.histogram(raw)
    assert counts.shape == (256,)
    assert {int(v): int(counts[v]) for v in counts.nonzero()[0]} == {
        int(v): int((raw == v).sum()) for v in np.unique(raw)
    }


def test_ranges_of_a_tensor(tmp_path: Path) -> None:
    tensor = Tensor(tmp_path / "x", 10, ranges.MAX_SPAN + 5, torch.uint8, (ranges.MAX_SPAN + 5,))
    assert [(r.start, r.num_bytes) for r in ranges.whole("t", tensor)] == [
        (10, ranges.MAX_SPAN),
        (10 + ranges.MAX_SPAN, 5),
    ]
    assert [(r.start, r.num_bytes) for r in ranges.ends("t", tensor, 7)] == [(10, 7), (10 + ranges.MAX_SPAN - 2, 7)]
    short = Tensor(tmp_path / "x", 10, 14, torch.uint8, (14,))
    assert [(r.start, r.num_bytes) for r in ranges.ends("t", short, 7)] == [(10, 14)]
    assert list(ranges.whole("t", Tensor(tmp_path / "x", 10, 0, torch.uint8, (0,)))) == []


def test_a_file_that_shrinks_or_goes_is_a_finding(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sorted(tiny.glob("*.safetensors"))[0]
    done = list(ranges.reduce_all([ranges.Range("t", path, path.stat().st_size - 2, 4)], bytes))
    assert (done[0].result, "ends early" in done[0].error) == (None, True)
    done = list(ranges.reduce_all([ranges.Range("t", tiny / "gone", 0, 4)], bytes))
    assert (done[0].result, "gone" in done[0].error) == (None, True)

    checked = scale_checks.check
    monkeypatch.setattr(scale_checks, "check", lambda *a, **k: (path.unlink(missing_ok=True), checked(*a, **k))[1])
    result = examine(str(tiny), Options())
    assert only(result, "FILE_UNREADABLE").tensor == path.name
    assert result.exit_code == 1


# The Hub: never reached here, a stand-in answers.


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def snapshot_download(repo_id: str, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("nothing cached")

    def hf_hub_download(repo_id: str, name: str, revision: str | None = None) -> str:
        asked.append(name)
        if not (tiny / name).is_file():
            raise EntryNotFoundError(name)
        return str(tiny / name)

    def get_safetensors_metadata(repo_id: str, revision: str | None = None) -> SafetensorsRepoMetadata:
        spelled = {dtype: name for name, dtype in DTYPES.items()}
        files: dict[str, SafetensorsFileMetadata] = {}
        for name, t in read_folder(tiny).items():
            file = files.setdefault(t.file.name, SafetensorsFileMetadata(metadata={}, tensors={}))
            offsets = (t.start, t.start + t.num_bytes)
            file.tensors[name] = TensorInfo(dtype=spelled[t.dtype], shape=list(t.shape), data_offsets=offsets)
        return SafetensorsRepoMetadata(metadata={}, sharded=True, weight_map={}, files_metadata=files)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    return asked


def test_a_model_on_the_hub(hub: list[str]) -> None:
    result = examine("someone/model", Options())
    assert (result.exit_code, result.coverage.layout, result.kind) == (0, "L2", "hub")
    assert ("info", "HUB_SCALES_NOT_READ") in found(result)
    assert result.num_files == 2
    assert result.scales.bytes_read == 0
    assert hub[0] == "config.json"


def test_only_the_configuration_of_a_model_on_the_hub(hub: list[str]) -> None:
    result = examine("someone/model", Options(plan_only=True))
    assert (result.exit_code, result.kind, hub) == (0, "config", ["config.json"])
    assert result.plan is not None


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, hub: list[str]) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    result = examine("someone/model", Options())
    assert "no route to host" in only(result, "NOT_FOUND").value
    assert result.exit_code == 1


def test_a_cached_snapshot_is_examined_as_a_folder(monkeypatch: pytest.MonkeyPatch, hub: list[str], tiny: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tiny))
    result = examine("someone/model", Options())
    assert (result.kind, result.exit_code) == ("folder", 0)
    assert result.scales.bytes_read > 0


# Findings.


def test_alike_findings_become_one_with_a_count() -> None:
    hits = [(f"model.layers.{i}.ffn.experts.{e}.w1.weight", "gone") for i in range(3) for e in range(384)]
    (one,) = grouped("TENSOR_MISSING", hits)
    assert (one.tensor, one.count) == ("model.layers.*.ffn.experts.*.w1.weight", 1152)
    assert one.examples == tuple(name for name, _ in hits[:3])
    assert one.value == "gone"
    differing = grouped("TENSOR_MISSING", [("a.1.b", "x"), ("a.2.b", "y"), ("c", "z")])
    assert [(f.tensor, f.value, f.count) for f in differing] == [("a.*.b", "first: x", 2), ("c", "z", 1)]


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("a\x1b[31mb\ud800\n") == "a\\x1b[31mb\\ud800\\n"
    assert printable("gut") == "gut"
    assert len(printable("x" * 10_000)) < 700
    assert make("TENSOR_MISSING", "\x07", "\r").tensor == "\\x07"


def test_every_code_is_explained_in_the_documentation(root: Path) -> None:
    text = (root / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = {code: f"| `{code}` | {known.severity} | " for code, known in CODES.items()}
    assert [code for code, row in rows.items() if text.count(row) != 1] == []
    assert [line for line in text.splitlines() if line.startswith("| `") and line.split("`")[1] not in CODES] == []
    assert all(known.why and known.action for known in CODES.values())


def test_neither_vllm_nor_transformers_is_imported(affine: Path) -> None:
    code = (
        "import sys; from vllm_nvfp4.doctor.cli import main; status = main(sys.argv[1:]); "
        "print(sorted({'vllm', 'transformers', 'torch._dynamo'} & set(sys.modules)), status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(affine)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[] 0"


# Fuzzing: whatever the bytes are, there is a report, and an exit code that it explains.


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "x"
    make_tiny_checkpoint(
        folder, TinySpec(hidden=16, layers=(4,), experts=1, topk=1, heads=2, q_lora=16, o_lora=16, vocab=512)
    )
    return folder


def check_any(folder: Path) -> Report:
    result = examine(str(folder), Options())
    assert result.exit_code in (0, 1, 2)
    assert (result.exit_code == 0) == all(f.severity is INFO for f in result.findings)
    assert json.loads(report.to_json(result))["exit_code"] == result.exit_code
    report.render(result, Console(file=io.StringIO(), width=70))
    return result


FUZZ = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), inside=st.booleans())
def test_bytes_of_a_header_changed(smallest: Path, edits: list[tuple[float, int]], inside: bool) -> None:
    path = smallest / "model.safetensors"
    original = path.read_bytes()
    length = 8 + struct.unpack("<Q", original[:8])[0]
    content = bytearray(original)
    for place, value in edits:
        content[int(place * (length - 9)) + 8 if inside else int(place * 7)] = value
    try:
        path.write_bytes(content)
        check_any(smallest)
    finally:
        path.write_bytes(original)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_values_of_the_small_files_changed(smallest: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(["config.json", "config.json", "tokenizer.json", "hf_quant_config.json"]))
    path = smallest / file
    original = path.read_text()
    content = json.loads(original)
    key = data.draw(st.sampled_from([*sorted(content), "compress_ratios", "num_hash_layers", "quantization"]))
    content[key] = data.draw(JSON)
    try:
        path.write_text(json.dumps(content if data.draw(st.booleans()) or file == "config.json" else content[key]))
        check_any(smallest)
    finally:
        path.write_text(original)


def test_the_fuzz_starts_from_a_healthy_checkpoint_and_would_see_a_crash(
    smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_any(smallest).exit_code == 0
    broken: Callable[..., Any] = lambda *args, **kwargs: 1 / 0  # noqa: E731
    monkeypatch.setattr(metadata, "check_tokenizer", broken)
    with pytest.raises(ZeroDivisionError):
        check_any(smallest)


def test_a_name_as_long_as_a_header_allows(tiny: Path) -> None:
    copy = Copy(tiny)
    copy.put({f"mtp.{'9' * 5000}.enorm.weight": torch.zeros(2)}, copy.names["model.norm.weight"])
    assert only(examine(str(tiny), Options()), "NAME_UNKNOWN").value == "no rule covers this name"
    shutil.rmtree(tiny)
