"""The warm-up's batches meet every kernel that any batch can choose, and kernel sets are used, refused or done without."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm_nvfp4 import kernel_sets, selection, warmup
from vllm_nvfp4.status import Status

from cutedsl import aot, compile, deployment


@pytest.mark.parametrize("largest", [1, 2, 7, 16, 17, 100, 2048, 8192, 16384, 65536])
def test_batches_go_down_from_the_largest_to_one(largest: int) -> None:
    sizes = warmup.batches(largest)
    assert (sizes[0], sizes[-1]) == (largest, 1)
    assert sizes == sorted(set(sizes), reverse=True)
    assert len(sizes) <= 170  # a few hundred calls a shape, whatever the largest batch
    for large, small in pairwise(sizes):
        assert large - small <= max(1, small / warmup.STEPS)


@pytest.mark.parametrize("width", [8, 16, 32, 64, 128])
def test_no_tile_is_stepped_over(width: int) -> None:
    met = {-(-tokens // width) for tokens in warmup.batches(16 * width)}
    assert met == set(range(1, 17))


@pytest.mark.parametrize("arch", ["sm_100a", "sm_90a"])
@pytest.mark.parametrize("name", ["deepseek-v4-pro", "deepseek-v4-flash"])
def test_every_kernel_of_the_closed_set_is_met(name: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = deployment.deployment(deployment.find_model(name), [1, 8], arch)
    want = {(v.kernel, v.config) for v in deployment.variants(asked)}
    monkeypatch.setattr(deployment.Deployment, "batches", lambda self: warmup.batches(self.max_tokens)[::-1])
    assert {(v.kernel, v.config) for v in deployment.variants(asked)} == want


def test_limits_of_an_engine() -> None:
    def limits(tp: int, dp: int, tokens: int) -> warmup.Limits:
        return warmup.Limits.of(
            SimpleNamespace(
                parallel_config=SimpleNamespace(tensor_parallel_size=tp, data_parallel_size=dp),
                scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens),
                model_config=SimpleNamespace(hf_config=SimpleNamespace(num_experts_per_tok=6)),
            )
        )

    assert limits(1, 1, 8192) == warmup.Limits(8192, 8192, 6)
    # Experts see the tokens of all data-parallel ranks, in whole shards of tensor-parallel ones.
    assert limits(4, 2, 1001) == warmup.Limits(1001, 2008, 6)


def test_the_reference_needs_no_warm_up() -> None:
    compile.freeze(False)
    warmup.run(torch.nn.Linear(2, 2), warmup.Limits(8, 8, 2), Status())
    assert not compile.frozen()


# --- kernel sets


@pytest.fixture
def records() -> Iterator[None]:
    kept = dict(selection._choices)
    selection.clear()
    kernel_sets.use.cache_clear()
    yield
    kernel_sets.use.cache_clear()
    selection.clear()
    selection._choices.update(kept)


def test_a_folder_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVFP4_AOT_DIR", str(tmp_path / "absent"))
    with pytest.raises(RuntimeError, match=re.escape(f"NVFP4_AOT_DIR={tmp_path / 'absent'} is no folder; build a set")):
        kernel_sets.folder()


def test_the_packaged_set_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_sets, "PACKAGED", tmp_path / "prebuilt")
    assert kernel_sets.folder() is None
    (tmp_path / "prebuilt").mkdir()
    assert kernel_sets.folder() == tmp_path / "prebuilt"
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("NVFP4_AOT_DIR", str(tmp_path / "own"))
    assert kernel_sets.folder() == tmp_path / "own"


@pytest.mark.usefixtures("records")
def test_a_set_is_used_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used: list[Path] = []
    monkeypatch.setattr(compile, "use", lambda folder: used.append(folder) or 3)
    monkeypatch.setenv("NVFP4_AOT_DIR", str(tmp_path))
    kernel_sets.use()
    kernel_sets.use()
    assert used == [tmp_path]
    assert selection.num_fallbacks() == 0


@pytest.mark.usefixtures("records")
def test_no_set_is_no_fallback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_sets, "PACKAGED", tmp_path / "prebuilt")
    kernel_sets.use()
    assert selection.choices() == []


@pytest.mark.usefixtures("records")
def test_a_stale_set_is_counted_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A folder without a manifest is no set: cutedsl's own reason comes through.
    monkeypatch.setenv("NVFP4_AOT_DIR", str(tmp_path))
    with pytest.raises(aot.StaleSetError) as stale:
        compile.use(tmp_path)
    kernel_sets.use()
    (choice,) = selection.choices()
    assert (choice.kind, choice.served_by, choice.fallback) == ("kernel_set", "compiler", True)
    assert choice.reason == str(stale.value)
    kernel_sets.use.cache_clear()
    monkeypatch.setenv("NVFP4_STRICT", "1")
    with pytest.raises(RuntimeError, match=re.escape(str(stale.value))):
        kernel_sets.use()
