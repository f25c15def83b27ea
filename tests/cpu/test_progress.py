"""A load's progress: one line a layer where there is no terminal, right totals, and the heartbeat's numbers."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm_nvfp4 import loader
from vllm_nvfp4.loader import Progress
from vllm_nvfp4.model_loader import layer_key

SIZES = {
    "embed": 1_000_000,
    "model.layers.0.a": 2_000_000,
    "model.layers.1.a": 500_000,
    "model.layers.0.b": 2_500_000,
    "model.layers.1.b": 4_000_000,
}
LAYERS = {name: layer_key(name) for name in SIZES}


class Beats:
    """Stands in for the heartbeat file."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, ...]] = []

    def update(self, *state: Any) -> None:
        self.found.append(state)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """caplog, listening at the logger itself: vLLM decides whether records go on to the root logger."""
    monkeypatch.setattr(loader.logger, "level", logging.INFO)
    monkeypatch.setattr(loader.logger, "propagate", False)
    loader.logger.addHandler(caplog.handler)
    yield caplog
    loader.logger.removeHandler(caplog.handler)


def tensors() -> Iterator[tuple[str, torch.Tensor]]:
    for name in SIZES:
        yield name, torch.zeros(1)


def test_one_line_a_layer_with_bytes(logged: pytest.LogCaptureFixture) -> None:
    progress = Progress(SIZES, LAYERS, Beats(), show=True, use_bar=False)
    assert [name for name, _ in progress.wrap(tensors())] == list(SIZES)
    lines = [re.sub(r", [0-9.]+ s$", "", record.getMessage()) for record in logged.records]
    assert lines == [
        "Loaded other (1 of 3), 1.0 of 10.0 MB",
        "Loaded model.layers.0 (2 of 3), 6.0 of 10.0 MB",
        "Loaded model.layers.1 (3 of 3), 10.0 of 10.0 MB",
    ]
    assert all(re.search(r", [0-9]+\.[0-9] s$", record.getMessage()) for record in logged.records)


def test_totals_and_heartbeats() -> None:
    beats = Beats()
    progress = Progress(SIZES, LAYERS, beats, show=False, use_bar=False)
    assert (progress.total, progress.num_layers) == (10_000_000, 3)
    list(progress.wrap(tensors()))
    done = [0, 1_000_000, 3_000_000, 3_500_000, 6_000_000, 10_000_000]
    assert beats.found == [("loading", bytes_done, 10_000_000) for bytes_done in done]
    assert (progress.done, progress.layers_done) == (10_000_000, 3)


def test_a_tensor_counts_when_the_next_one_is_asked_for() -> None:
    progress = Progress(SIZES, LAYERS, Beats(), show=False, use_bar=False)
    iterator = iter(progress.wrap(tensors()))
    assert progress.done == 0
    next(iterator)
    assert progress.done == 0
    next(iterator)
    assert progress.done == 1_000_000


def test_other_ranks_are_silent(logged: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    for use_bar in (False, True):
        list(Progress(SIZES, LAYERS, Beats(), show=False, use_bar=use_bar).wrap(tensors()))
    assert logged.records == []
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_no_lines(
    logged: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(SIZES, LAYERS, Beats(), show=True, use_bar=True)
    list(progress.wrap(tensors()))
    assert logged.records == []
    shown = capsys.readouterr().err
    assert "Loading NVFP4 weights: 100%" in shown
    assert "10.0M/10.0M" in shown
    assert progress.bar.n == progress.bar.total == 10_000_000


def test_nothing_to_load() -> None:
    beats = Beats()
    assert list(Progress({}, {}, beats, show=True, use_bar=False).wrap([])) == []
    assert beats.found == [("loading", 0, 0)]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.attn.wq_a.weight", "model.layers.12"),
        ("mtp.1.ffn.experts.3.w1.weight", "mtp.1"),
        ("model.embed_tokens.weight", "other"),
        ("lm_head.weight", "other"),
        ("other", "other"),
    ],
)
def test_layer_key(name: str, layer: str) -> None:
    assert layer_key(name) == layer
