"""DeepGEMM's kernels built ahead of time: all that vLLM asks for, under the names recorded on an H200, linked, checked."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from vllm_nvfp4 import deepgemm_build

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
