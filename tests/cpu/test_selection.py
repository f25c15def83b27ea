"""What serves each module is recorded and counted; strict mode refuses a fallback; a misspelled switch is no `off`."""

import logging
import re
from collections.abc import Iterator

import pytest
from vllm_nvfp4 import env, selection


class Lines(logging.Handler):
    """Keeps what the overlay logs, at its own logger: vLLM decides whether records go on to the root logger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


@pytest.fixture
def lines() -> Iterator[list[tuple[str, str]]]:
    handler, logger = Lines(), logging.getLogger("vllm.nvfp4")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No other test's records before, none of ours behind."""
    kept, logged = dict(selection._choices), set(selection._logged_fallbacks)
    selection.clear()
    yield
    selection.clear()
    selection._choices.update(kept)
    selection._logged_fallbacks.update(logged)


def test_recorded_in_order_and_counted() -> None:
    selection.record("b", "linear", "cutedsl reference")
    selection.record("a", "linear", "cutedsl reference")
    selection.record("c", "moe", "cutedsl reference")
    assert [choice.module for choice in selection.choices()] == ["b", "a", "c"]
    assert selection.summary() == {("linear", "cutedsl reference", False): 2, ("moe", "cutedsl reference", False): 1}
    assert selection.num_fallbacks() == 0


def test_fallbacks_are_counted_and_logged_once_a_kind(lines: list[tuple[str, str]]) -> None:
    for module in ("a", "b", "c"):
        selection.record(module, "linear", "CutlassNvFp4", fallback=True, reason="no kernels yet")
    selection.record("d", "moe", "CutlassNvFp4", fallback=True, reason="no kernels yet")
    selection.record("e", "linear", "cutedsl reference")
    assert selection.num_fallbacks() == 4
    assert selection.summary()[("linear", "CutlassNvFp4", True)] == 3
    assert lines == [
        ("WARNING", "NVFP4 fallback: linear served by stock CutlassNvFp4 (no kernels yet), first for a"),
        ("WARNING", "NVFP4 fallback: moe served by stock CutlassNvFp4 (no kernels yet), first for d"),
    ]


def test_a_module_recorded_again_counts_once() -> None:
    selection.record("a", "linear", "stock", fallback=True)
    selection.record("a", "linear", "cutedsl reference")
    assert selection.num_fallbacks() == 0
    assert [choice.served_by for choice in selection.choices()] == ["cutedsl reference"]


def test_the_summary_is_one_line_a_kind(lines: list[tuple[str, str]]) -> None:
    for module, kind, fallback in (
        ("a", "moe", False),
        ("b", "linear", True),
        ("c", "linear", False),
        ("d", "moe", False),
    ):
        selection.record(module, kind, "stock" if fallback else "cutedsl reference", fallback=fallback)
    del lines[:]
    selection.log_summary()
    assert lines == [
        ("INFO", "NVFP4 selection: 1 linear by cutedsl reference: c"),
        ("INFO", "NVFP4 selection: 1 linear by stock (stock fallback): b"),
        ("INFO", "NVFP4 selection: 2 moe by cutedsl reference: a, d"),
    ]


def test_the_summary_names_every_module_with_its_layers() -> None:
    modules = [f"model.layers.{i}.attn.wq_b" for i in (3, 0, 1, 2, 5, 10)] + ["model.layers.1.attn.wo_b", "lm_head"]
    assert selection.by_pattern(modules) == [
        "lm_head",
        "model.layers.{0-3,5,10}.attn.wq_b",
        "model.layers.{1}.attn.wo_b",
    ]
    assert selection.by_pattern([]) == []


def test_strict_mode_refuses_a_fallback_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFP4_STRICT", "1")
    selection.record("a", "linear", "cutedsl reference")
    message = (
        "NVFP4_STRICT=1 refuses a stock fallback: moe model.layers.0.ffn.experts would be served by Stock (no "
        "kernels). Unset NVFP4_STRICT to allow it"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        selection.record("model.layers.0.ffn.experts", "moe", "Stock", fallback=True, reason="no kernels")
    assert [choice.module for choice in selection.choices()] == ["a"]
    assert selection.num_fallbacks() == 0


@pytest.mark.parametrize("value", ["0", " 0 ", None])
def test_not_strict(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("NVFP4_STRICT", value)
    selection.record("a", "linear", "Stock", fallback=True)
    assert selection.num_fallbacks() == 1


@pytest.mark.parametrize("value", ["true", "yes", "", "on", "2", "1.0", "01", "O", "l"])
def test_a_misspelled_switch_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NVFP4_STRICT", value)
    message = f"NVFP4_STRICT={value!r}: expected 0 or 1 ({env.STRICT.doc}); set it to one of them or unset it"
    with pytest.raises(ValueError, match=re.escape(message)):
        selection.record("a", "linear", "Stock", fallback=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        env.flag(env.STRICT)
    assert selection.choices() == []


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), (" 1 ", True), (None, False)])
def test_flags(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    if value is not None:
        monkeypatch.setenv("NVFP4_WO_A", value)
    assert env.flag(env.WO_A) is expected


def test_the_table_of_variables() -> None:
    assert [v.name for v in env.VARIABLES] == [v.name for v in vars(env).values() if isinstance(v, env.Variable)], (
        "a variable is missing in VARIABLES"
    )
    for variable in env.VARIABLES:
        assert variable.name.startswith("NVFP4_")
        assert variable.doc
        assert env.text(variable) == variable.default


def test_one_of_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = ("auto", "nvfp4", "bf16")
    assert env.choice(env.ACTIVATIONS, allowed) == "auto"
    monkeypatch.setenv("NVFP4_ACTIVATIONS", " bf16 ")
    assert env.choice(env.ACTIVATIONS, allowed) == "bf16"
    for value in ("BF16", "", "fp4", "bf16,nvfp4"):
        monkeypatch.setenv("NVFP4_ACTIVATIONS", value)
        with pytest.raises(
            ValueError, match=re.escape(f"NVFP4_ACTIVATIONS={value!r}: expected one of auto, nvfp4, bf16")
        ):
            env.choice(env.ACTIVATIONS, allowed)
