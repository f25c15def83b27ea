"""Every damaged copy is found, named and explained, and nothing else is; healthy checkpoints give no alarm."""

import json
from pathlib import Path
from types import SimpleNamespace

import damage_checkpoint
import pytest
import test_doctor
import test_doctor_report
from damage_checkpoint import DAMAGES, Expected, make_copy, prepare
from make_tiny_checkpoint import TinySpec, make_tiny_checkpoint
from vllm_nvfp4.checkpoint import read_folder
from vllm_nvfp4.config_fields import normalised
from vllm_nvfp4.doctor.cli import main
from vllm_nvfp4.doctor.examine import Options, Report, examine
from vllm_nvfp4.doctor.findings import CODES, INFO
from vllm_nvfp4.doctor.plan import PlanOptions
from vllm_nvfp4.inventory import take_inventory

# What the loader decides from headers and config.json alone: there the doctor's errors must be its refusals, one for one.
FROM_HEADERS = (
    "FILE_", "INDEX_", "NO_WEIGHTS", "CONFIG_CONTRADICTION", "LAYOUT_", "NAME_", "TENSOR_", "SCALE_STRAY", "FORMATS_",
)  # fmt: skip
# Codes that no damaged copy of an NVFP4 checkpoint has, and the tests that have them.
ELSEWHERE = {
    "NOT_FOUND": test_doctor.test_nothing_there,
    "HUB_SCALES_NOT_READ": test_doctor.test_a_model_on_the_hub,
    "TENSOR_UNUSED": test_doctor.test_known_tensors_without_a_use,
    "NO_KERNEL": test_doctor.test_a_gpu_that_kernels_are_not_compiled_for,
    "FP8_SCALE_BAD": test_doctor.test_fp8_scales,
    "IGNORE_OMITS": test_doctor.test_a_real_export,
    "IGNORE_UNMATCHED": test_doctor.test_a_real_export,
    "MTP_UNDECLARED": test_doctor.test_mtp_layers_that_the_configuration_does_not_count,
    "GENERATION_CONFIG_MISSING": test_doctor.test_no_generation_config,
    "PLAN_OPTIONS": test_doctor_report.test_a_layout_that_cannot_be,
    "PLAN_DOES_NOT_FIT": test_doctor_report.test_plans_and_exit_codes,
    "PLAN_FEWER_REQUESTS": test_doctor_report.test_plans_and_exit_codes,
    "PLAN_NO_LAYOUT": test_doctor_report.test_no_layout_at_all,
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_tiny_checkpoint(folder / "source", TinySpec(hidden=128, experts=8, topk=2))
    prepare(folder / "source", folder / "healthy")
    return folder / "healthy"


@pytest.fixture
def copy(healthy: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Expected]:
    return tmp_path / "copy", make_copy(healthy, tmp_path / "copy", request.param)


def report_of(folder: Path, flags: tuple[str, ...] = ()) -> Report:
    plan = PlanOptions(gpu="b200") if "--gpu" in flags else PlanOptions()
    return examine(str(folder), Options(deep="--deep" in flags, plan=plan, asked="--gpu" in flags))


def test_the_corpus_is_large_and_every_code_is_tested() -> None:
    assert len(DAMAGES) >= 60
    assert {code for code, *_ in DAMAGES.values()} | set(ELSEWHERE) == set(CODES)


def test_the_undamaged_copy_is_healthy(healthy: Path) -> None:
    report = report_of(healthy, ("--deep",))
    assert [f for f in report.findings if f.severity is not INFO] == []
    assert report.exit_code == 0


@pytest.mark.parametrize("copy", DAMAGES, indirect=True)
def test_found_named_and_explained_and_nothing_else(copy: tuple[Path, Expected]) -> None:
    folder, expected = copy
    report = report_of(folder, expected.flags)
    found = [f for f in report.findings if f.severity is not INFO]
    assert {f.code for f in found} == {expected.code}, found
    assert any(expected.tensor in text for f in found for text in (f.tensor, f.value, *f.examples)), found
    assert all(f.value and f.why and f.action for f in found)
    assert report.exit_code == expected.exit_code
    # What was not asked for is not found for another reason.
    if "--deep" in expected.flags:
        assert report_of(folder).exit_code == 0


@pytest.mark.parametrize("copy", DAMAGES, indirect=True)
def test_the_doctor_refuses_what_the_loader_refuses(copy: tuple[Path, Expected]) -> None:
    folder, expected = copy
    report = report_of(folder)
    try:
        config = SimpleNamespace(**normalised(json.loads((folder / "config.json").read_text())))
        if getattr(config, "num_hidden_layers", 0) < 1000:  # the loader would begin to count to a billion
            take_inventory(read_folder(folder), config)
        refused = False
    except (ValueError, OSError):
        refused = True
    if refused:
        assert report.exit_code == 1
    elif report.exit_code == 1:
        assert not expected.code.startswith(FROM_HEADERS)


@pytest.mark.parametrize(
    ("layout", "mtp", "spelling"),
    [
        ("L1", 0, "compressor"),
        ("L1", 0, "attn"),
        ("L2", 0, "compressor"),
        ("L3", 0, "compressor"),
        ("L3", 1, "compressor"),
        ("bare", 0, "compressor"),
        ("bare", 2, "compressor"),
    ],
)
def test_no_false_alarm(tmp_path: Path, layout: str, mtp: int, spelling: str) -> None:
    spec = TinySpec(layout=layout, mtp=mtp, indexer_spelling=spelling, hidden=128, experts=8, topk=2, shards=2)
    make_tiny_checkpoint(tmp_path / "x", spec)
    report = report_of(tmp_path / "x", ("--deep", "--gpu"))
    assert [f for f in report.findings if f.severity is not INFO] == []
    assert (report.exit_code, report.coverage.layout) == (0, layout)
    assert {f.code for f in report.findings} <= {"IGNORE_OMITS", "IGNORE_UNMATCHED"}


def test_the_script(tmp_path: Path, healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["nan_input_scale", "leftover_shard"]
    assert damage_checkpoint.main([str(healthy), str(tmp_path / "out"), "--only", *names]) == 0
    listed = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert [entry["name"] for entry in listed] == names
    codes = [main([str(tmp_path / "out" / name)]) for name in ["healthy", *names]]
    assert codes == [0, 1, 2]
    assert "SCALE_NAN" in capsys.readouterr().out
    assert damage_checkpoint.main([str(healthy), str(tmp_path / "out")]) == 1
    assert "exists; give a folder that does not" in capsys.readouterr().err
    assert damage_checkpoint.main([str(tmp_path / "nothing"), str(tmp_path / "other")]) == 1
