"""All probes."""

from collections.abc import Iterator

from . import alu, cluster, floats, matrix, sync, tma, warp
from .kit import Case

MODULES = (tma, sync, cluster, matrix, warp, alu, floats)


def all_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for case in _every():
        assert case.name not in found, f"two probes are called {case.name}"
        found[case.name] = case
    return found


def _every() -> Iterator[Case]:
    for module in MODULES:
        yield from module.cases()
