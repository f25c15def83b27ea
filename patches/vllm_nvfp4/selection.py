"""What serves each module: recorded once, logged once, counted, and refused in strict mode if it is a fallback."""

import logging
from dataclasses import dataclass

from vllm_nvfp4 import env

logger = logging.getLogger("vllm.nvfp4")


@dataclass(frozen=True)
class Choice:
    """module: vLLM's prefix; kind: linear, moe, shared_expert, wo_a; served_by: backend or class; fallback: stock?"""

    module: str
    kind: str
    served_by: str
    fallback: bool
    reason: str = ""


_choices: dict[str, Choice] = {}
_logged_fallbacks: set[tuple[str, str]] = set()


def record(module: str, kind: str, served_by: str, *, fallback: bool = False, reason: str = "") -> None:
    """Remember what serves `module`; a fallback is logged once for each kind and server.

    Raises: RuntimeError - a fallback under NVFP4_STRICT=1.
    """
    choice = Choice(module, kind, served_by, fallback, reason)
    if fallback and env.flag(env.STRICT):
        raise RuntimeError(
            f"{env.STRICT.name}=1 refuses a stock fallback: {kind} {module} would be served by {served_by} ({reason}). "
            f"Unset {env.STRICT.name} to allow it"
        )
    _choices[module] = choice
    if fallback and (kind, served_by) not in _logged_fallbacks:
        _logged_fallbacks.add((kind, served_by))
        logger.warning("NVFP4 fallback: %s served by stock %s (%s), first for %s", kind, served_by, reason, module)


def choices() -> list[Choice]:
    """Everything recorded in this process, in order of construction."""
    return list(_choices.values())


def summary() -> dict[tuple[str, str, bool], int]:
    """(kind, served_by, fallback) -> number of modules."""
    counts: dict[tuple[str, str, bool], int] = {}
    for choice in _choices.values():
        key = (choice.kind, choice.served_by, choice.fallback)
        counts[key] = counts.get(key, 0) + 1
    return counts


def log_summary() -> None:
    """Every module and what serves it, one line a (kind, server), once a model is complete."""
    for (kind, served_by, fallback), count in sorted(summary().items()):
        modules = [
            c.module for c in _choices.values() if (c.kind, c.served_by, c.fallback) == (kind, served_by, fallback)
        ]
        note = " (stock fallback)" if fallback else ""
        logger.info("NVFP4 selection: %d %s by %s%s: %s", count, kind, served_by, note, ", ".join(by_pattern(modules)))


def by_pattern(modules: list[str]) -> list[str]:
    """Module names with the layers they occur in collapsed: "model.layers.{0-2,5}.attn.wq_b"."""
    layers: dict[tuple[str, str], list[int]] = {}
    patterns: list[str] = []
    for module in modules:
        head, number, rest = _split_layer(module)
        if number is None:
            patterns.append(module)
        else:
            layers.setdefault((head, rest), []).append(number)
    for (head, rest), numbers in layers.items():
        patterns.append(f"{head}{{{_ranges(sorted(numbers))}}}{rest}")
    return sorted(patterns)


def _split_layer(module: str) -> tuple[str, int | None, str]:
    """("model.layers.", 3, ".attn.wq_b"); no number where the module is in no layer."""
    head, found, tail = module.partition("layers.")
    number, dot, rest = tail.partition(".")
    return (head + found, int(number), dot + rest) if found and number.isdecimal() else (module, None, "")


def _ranges(numbers: list[int]) -> str:
    """0,1,2,5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def num_fallbacks() -> int:
    """How many modules a stock implementation serves; exported as a metric."""
    return sum(choice.fallback for choice in _choices.values())


def clear() -> None:
    """Forget everything; for tests."""
    _choices.clear()
    _logged_fallbacks.clear()
