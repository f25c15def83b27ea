"""What a simulation reports: findings, counters, and the two exceptions."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptxsim.trace import Trace

DEADLOCK = "deadlock"
OUT_OF_BOUNDS = "out-of-bounds"
MISALIGNED = "misaligned"
UNINITIALISED_READ = "uninitialised-read"
IN_FLIGHT_ACCESS = "in-flight-access"
MISSING_PROXY_FENCE = "missing-proxy-fence"
RACE = "race"
MISSING_INIT_FENCE = "missing-mbarrier-init-fence"
OVERARRIVAL = "barrier-overarrival"
BARRIER_MISUSE = "barrier-misuse"
LEFTOVER_TRANSACTIONS = "leftover-transactions"
SHARED_IN_USE = "shared-in-use-at-exit"
TMEM_IN_USE = "tmem-in-use-at-exit"
TMEM_MISUSE = "tmem-misuse"
OUTPUT_NOT_WRITTEN = "output-not-written"
DIVERGENCE = "divergence"
LAUNCH = "launch"
TENSORMAP = "tensormap"
BAD_VALUE = "bad-value"
WRITE_READONLY = "write-readonly"
BEFORE_WAIT = "access-before-wait"


class Unsupported(Exception):
    """The simulator does not know an opcode, modifier, operand form or descriptor bit. Never ignored, never guessed."""


class Stop(Exception):
    """Ends a run after a finding behind which nothing can be trusted; caught by the machine."""


@dataclass(frozen=True)
class Finding:
    """One fault of the simulated program.

    Attributes:
        code: one of this module's constants.
        message: what was found and what was expected.
        kernel: name of the entry.
        cluster, cta: linear numbers; cta counts over the whole grid; -1 where none is meant.
        warp: number within the CTA, or None for the hardware's own agents.
        ptx_line: 1-based line of the PTX text, 0 where none is meant.
        source: "file.py:123" where line information exists.
    """

    code: str
    message: str
    kernel: str = ""
    cluster: int = -1
    cta: int = -1
    warp: int | None = None
    ptx_line: int = 0
    source: str | None = None

    def __str__(self) -> str:
        where = []
        if self.cta >= 0:
            where.append(f"CTA {self.cta}")
        if self.warp is not None:
            where.append(f"warp {self.warp}")
        if self.ptx_line:
            where.append(f"PTX line {self.ptx_line}")
        if self.source:
            where.append(self.source)
        place = f" [{', '.join(where)}]" if where else ""
        return f"{self.code}: {self.message}{place}"


@dataclass
class Report:
    """Outcome of one or more launches.

    Attributes:
        findings: faults, first seen first; the same code at the same PTX line is kept once and counted.
        counters: "instructions", "ctas", "tma_load_bytes", "tma_store_bytes", "mma_flops", "op:<opcode>", ...
        trace: timeline, if asked for.
    """

    findings: list[Finding] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    trace: "Trace | None" = None

    def check(self) -> "Report":
        """Returns self; raises FindingsError if there is a finding."""
        if self.findings:
            raise FindingsError(self)
        return self

    def codes(self) -> set[str]:
        """The distinct codes found."""
        return {finding.code for finding in self.findings}

    def merge(self, others: Iterable["Report"]) -> "Report":
        """Adds other reports to this one; returns self."""
        for other in others:
            self.findings.extend(other.findings)
            for key, value in other.counters.items():
                self.counters[key] = self.counters.get(key, 0) + value
        return self


class FindingsError(AssertionError):
    """A simulated program has faults; `report` holds them."""

    def __init__(self, report: Report) -> None:
        self.report = report
        lines = [str(finding) for finding in report.findings[:20]]
        if len(report.findings) > 20:
            lines.append(f"... and {len(report.findings) - 20} more")
        super().__init__("\n".join([f"{len(report.findings)} finding(s)", *lines]))
