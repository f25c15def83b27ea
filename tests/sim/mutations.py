"""Mutants: a fault put into the source of a good kernel, or into the PTX that it compiles to, run by the kernel's own test.

A source edit names a text that must occur exactly once in the file, so that a changed kernel fails loudly instead of
leaving a fault unseeded. The edited text becomes a module of its own, beside the good one and with classes of its own, so
that the cache of compiled kernels keeps both apart; what it imports stays good, unless an edit names it (`where`). An edit
of the PTX is one of `seeding`; it costs no compilation.
"""

import importlib
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from seeding import NOTHING, REFUSED, WRONG, Edit, Text

import ptxsim
from cutedsl import compile as compiler
from ptxsim import api
from ptxsim.launch import Launch

# Under this one every fault so far is noticed. The kernels' own tests run the good ones under all.
DEFAULT_POLICIES = ("random",)
_numbers = itertools.count()


@dataclass(frozen=True)
class Kernel:
    """A good kernel with a small problem, and the test that runs it.

    Attributes:
        name: short.
        module: in cutedsl.kernels.
        test: the module whose functions run it against the reference.
        attribute: name under which the test has the kernel's module.
        run: calls the test with the kernel's module, a policy and a seed; raises AssertionError.
    """

    name: str
    module: str
    test: ModuleType
    attribute: str
    run: Callable[[ModuleType, str, int], Any]

    def original(self) -> ModuleType:
        """The good module."""
        return importlib.import_module(f"cutedsl.kernels.{self.module}")


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Attributes:
        name: what was broken, a few words.
        expected: finding codes of which one must be among what a run finds; WRONG if nothing must be found and the result
            must be wrong.
        old, new: edit of the source; empty if there is none.
        where: module in cutedsl.kernels that is edited; None: the kernel's.
        ptx: edit of the PTX; it may be absent.
        policies: those in which it must be noticed.
    """

    name: str
    expected: frozenset[str]
    old: str = ""
    new: str = ""
    where: str | None = None
    ptx: Edit | None = None
    policies: tuple[str, ...] = DEFAULT_POLICIES


def source(
    name: str,
    expected: str,
    old: str,
    new: str,
    *,
    where: str | None = None,
    policies: str = " ".join(DEFAULT_POLICIES),
) -> Mutation:
    """A fault in the source; expected codes are separated by `|`."""
    return Mutation(name, _codes(expected), old, new, where, policies=tuple(policies.split()))


def ptx(name: str, expected: str, edit: Edit, *, policies: str = " ".join(DEFAULT_POLICIES)) -> Mutation:
    """A fault in the PTX."""
    return Mutation(name, _codes(expected), ptx=edit, policies=tuple(policies.split()))


def _codes(expected: str) -> frozenset[str]:
    return frozenset(code.strip() for code in expected.split("|"))


@dataclass(frozen=True)
class Outcome:
    """What one run showed: codes of findings, the first one first, or WRONG or REFUSED alone; and the first in full."""

    codes: tuple[str, ...] = ()
    detail: str = ""

    def __str__(self) -> str:
        if self.codes == (WRONG,):
            return f"{WRONG}: {self.detail}"
        return ", ".join(self.codes) or NOTHING


def run_mutant(kernel: Kernel, mutation: Mutation | None, folder: Path) -> dict[str, Outcome]:
    """Runs a kernel, good if there is no mutation, in each policy.

    Args:
        kernel: to run.
        mutation: of it; None runs the good kernel in DEFAULT_POLICIES.
        folder: an empty one, for sources.
    """
    if mutation is None:
        return {policy: _outcome(kernel, kernel.original(), policy) for policy in DEFAULT_POLICIES}
    with ExitStack() as stack:
        # Nothing of a mutant stays behind.
        stack.enter_context(mock.patch.dict(compiler._functions))
        stack.enter_context(mock.patch.dict(api._programs))
        module = kernel.original()
        if mutation.old:
            module = stack.enter_context(_mutant(kernel, mutation, folder))
        if mutation.ptx is not None:
            stack.enter_context(_edited_launches(mutation))
        stack.enter_context(mock.patch.object(kernel.test, kernel.attribute, module))
        return {policy: _outcome(kernel, module, policy) for policy in mutation.policies}


def _outcome(kernel: Kernel, module: ModuleType, policy: str) -> Outcome:
    try:
        kernel.run(module, policy, 0)
    except ptxsim.FindingsError as error:
        findings = error.report.findings
        return Outcome(tuple(dict.fromkeys(finding.code for finding in findings)), str(findings[0]))
    except ptxsim.Unsupported as refusal:
        return Outcome((REFUSED,), str(refusal))
    except SeedingError:
        raise
    except AssertionError as error:
        return Outcome((WRONG,), (str(error) or "a comparison with the reference").splitlines()[0])
    return Outcome()


class SeedingError(AssertionError):
    """A fault could not be put into the kernel: the kernel has changed, and the edit must follow."""


@contextmanager
def _mutant(kernel: Kernel, mutation: Mutation, folder: Path) -> Iterator[ModuleType]:
    """The kernel's module with the edit, in it or in a module that it imports."""
    good = kernel.original()
    if mutation.where is None:
        with _loaded(good, mutation, folder) as module:
            yield module
        return
    helper = importlib.import_module(f"cutedsl.kernels.{mutation.where}")
    with _loaded(helper, mutation, folder) as bad, _loaded(good, None, folder) as module:
        used = 0
        for name, value in list(vars(module).items()):
            if value is helper:
                setattr(module, name, bad)
            elif callable(value) and getattr(value, "__module__", None) == helper.__name__:
                setattr(module, name, getattr(bad, name))
            else:
                continue
            used += 1
        if not used:
            raise SeedingError(f"{mutation.name}: {kernel.module} does not import {mutation.where}")
        yield module


@contextmanager
def _loaded(good: ModuleType, mutation: Mutation | None, folder: Path) -> Iterator[ModuleType]:
    """A copy of a module from its edited text."""
    assert good.__file__ is not None
    text = Path(good.__file__).read_text()
    if mutation is not None:
        count = text.count(mutation.old)
        if count != 1 or mutation.old == mutation.new:
            raise SeedingError(f"{mutation.name}: {mutation.old!r} occurs {count} times in {good.__name__}, expected 1")
        text = text.replace(mutation.old, mutation.new)
    name = f"mutant_{next(_numbers)}_{good.__name__.rsplit('.', 1)[1]}"
    # The compiler reads a kernel's source again, so that there must be a file.
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


@contextmanager
def _edited_launches(mutation: Mutation) -> Iterator[None]:
    """Every launch has the edited text."""
    edit = mutation.ptx
    assert edit is not None
    simulate, texts = api.simulate, dict[str, str]()

    def edited(launch: Launch, *args: Any, **kwargs: Any) -> ptxsim.Report:
        if launch.ptx not in texts:
            text = Text(launch.ptx)
            try:
                edit(text)
            except AssertionError as error:
                raise SeedingError(f"{mutation.name}: {error}") from error
            if str(text) == launch.ptx:
                raise SeedingError(f"{mutation.name}: the edit changed nothing")
            texts[launch.ptx] = str(text)
        return simulate(replace(launch, ptx=texts[launch.ptx]), *args, **kwargs)

    with mock.patch.object(api, "simulate", edited):
        yield


@dataclass
class Table:
    """What caught each fault, as Markdown."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, kernel: str, name: str, outcomes: dict[str, Outcome]) -> None:
        """Adds a fault, or the good kernel."""
        caught = "; ".join(f"{policy}: {outcome}" for policy, outcome in outcomes.items())
        self.rows.append((kernel, name, re.sub(r"0x[0-9a-f]{6,}", "...", caught).replace("|", "/")))

    def __str__(self) -> str:
        lines = ["| kernel | fault | what caught it |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {kernel} | {name} | {caught} |" for kernel, name, caught in self.rows)])
