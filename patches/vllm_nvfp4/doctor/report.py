"""A Report for people (rich, any width, no colour where there is no terminal) and for programs (schema.json)."""

import json
from itertools import groupby
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from vllm_nvfp4.doctor.coverage import ARCHS
from vllm_nvfp4.doctor.examine import SHOWN, Report
from vllm_nvfp4.doctor.findings import Finding, Severity
from vllm_nvfp4.doctor.scale_checks import AMAX_OF_SCALE

SCHEMA_VERSION = 1
SCHEMA_PATH = Path(__file__).with_name("schema.json")
STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "cyan"}
VERDICT_STYLES = {0: "bold green", 1: "bold red", 2: "bold yellow"}
MAX_SHOWN = 40


def as_dict(report: Report) -> dict[str, Any]:
    """The report as schema.json describes it."""
    scales = report.scales
    return {
        "schema_version": SCHEMA_VERSION,
        "path": report.path,
        "kind": report.kind,
        "exit_code": report.exit_code,
        "verdict": report.verdict,
        "layout": {"name": report.coverage.layout, "evidence": report.coverage.evidence},
        "architecture": {n: getattr(report.config, n, None) for n in SHOWN} if report.config is not None else None,
        "totals": {
            "files": report.num_files,
            "tensors": report.num_tensors,
            "bytes": report.num_bytes,
            "parameters": report.num_parameters,
        },
        "read": {
            "seconds": round(report.seconds, 3),
            "deep": report.deep is not None,
            "scale_bytes": scales.bytes_read,
            "block_scale_bytes": scales.block_bytes,
            "block_scale_bytes_read": scales.block_bytes_read,
            "weight_bytes": report.deep["bytes_read"] if report.deep else 0,
        },
        "coverage": [
            {
                "class": row.cls,
                "format": row.format,
                "modules": row.modules,
                "tensors": row.tensors,
                "bytes": row.bytes,
                "kernels": dict(zip(ARCHS, row.kernels, strict=True)),
            }
            for row in report.coverage.rows
        ],
        "findings": [_finding_dict(finding) for finding in report.findings],
        "scales": scale_rows(report),
        "code_shares": report.deep["code_shares"] if report.deep else None,
        "plan": report.plan.as_dict() if report.plan is not None else None,
    }


def _finding_dict(finding: Finding) -> dict[str, Any]:
    return {
        "severity": str(finding.severity),
        "code": finding.code,
        "tensor": finding.tensor,
        "count": finding.count,
        "examples": list(finding.examples),
        "value": finding.value,
        "why": finding.why,
        "action": finding.action,
    }


def scale_rows(report: Report) -> list[dict[str, Any]]:
    """For each class, layer and leaf, the largest values that its global scales imply."""
    groups: dict[tuple[str, int, str], list[float]] = {}
    for scale in report.scales.globals:
        number = int(scale.layer.rstrip(".").rpartition(".")[2]) if scale.layer else 0
        if scale.layer.startswith("mtp"):
            number += report.config.num_hidden_layers if report.config is not None else 0
        cls = scale.cls.split(".*.", 1)[-1].rpartition(".")[0].replace("ffn.experts.*", "ffn.experts")
        groups.setdefault((cls, number, scale.leaf), []).append(scale.value * AMAX_OF_SCALE)
    return [
        {
            "class": cls,
            "layer": layer,
            "leaf": leaf,
            "count": len(values),
            "amax_min": min(values),
            "amax_median": median(values),
            "amax_max": max(values),
        }
        for (cls, layer, leaf), values in sorted(groups.items())
    ]


def to_json(report: Report) -> str:
    """The report as JSON text."""
    return json.dumps(as_dict(report), indent=2, allow_nan=False)


def render(report: Report, console: Console) -> None:
    """The report for people."""
    head = Text(f"{report.path}: ")
    head.append(report.verdict, style=VERDICT_STYLES[report.exit_code])
    counts = [(severity, sum(f.severity is severity for f in report.findings)) for severity in Severity]
    head.append(f" ({', '.join(f'{number} {severity}' for severity, number in counts)})")
    console.print(head)
    for line in _facts(report):
        console.print(Text(line))
    if report.coverage.rows:
        console.print(_coverage(report))
    for _, alike in groupby(report.findings[:MAX_SHOWN], key=lambda f: (f.severity, f.code)):
        _print_findings(list(alike), console)
    if len(report.findings) > MAX_SHOWN:
        console.print(Text(f"... and {len(report.findings) - MAX_SHOWN} more findings: --json has them all"))
    if report.plan is not None:
        report.plan.render(console)


def _facts(report: Report) -> list[str]:
    """Layout, architecture, sizes and what was read, a line each."""
    lines = []
    if report.kind != "config":
        lines.append(
            f"layout: {report.coverage.layout}"
            + (f", from {report.coverage.evidence}" * bool(report.coverage.evidence))
        )
    c = report.config
    if c is not None:
        lines.append(
            f"architecture: {c.num_hidden_layers} layers, hidden {c.hidden_size}, {c.num_attention_heads} heads of "
            f"{c.head_dim}, {c.n_routed_experts} experts top-{c.num_experts_per_tok} of {c.moe_intermediate_size}, "
            f"{report.num_parameters / 1e9:,.{0 if report.num_parameters >= 1e10 else 3}f} billion parameters"
        )
    if report.kind != "config":
        lines.append(f"size: {amount(report.num_bytes)} in {report.num_tensors} tensors, {report.num_files} files")
        lines.append(_reading(report))
    return lines


def _reading(report: Report) -> str:
    """What was read of the file, so that nobody takes a sample for a proof."""
    scales, text = report.scales, f"read in {report.seconds:.1f} s: headers"
    if scales.bytes_read:
        text += ", all global scales"
    if scales.block_bytes:
        share = scales.block_bytes_read / scales.block_bytes
        text += f", {amount(scales.block_bytes_read)} of {amount(scales.block_bytes)} of NVFP4 block scales"
        text += "" if share == 1 else f" ({share:.1%}: both ends of each tensor; --deep reads all)"
    return text + (
        f", {amount(report.deep['bytes_read'])} of weights" if report.deep else "; no weights (--deep reads them)"
    )


def amount(num_bytes: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _coverage(report: Report) -> Group:
    """The coverage table; kernels are numbered, so that it fits a narrow terminal."""
    kernels = list(dict.fromkeys(kernel or "none" for row in report.coverage.rows for kernel in row.kernels))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("class", overflow="fold")
    table.add_column("format", overflow="fold")
    for name in ("modules", "tensors", "bytes", "CPU", *ARCHS[1:]):
        table.add_column(name, justify="right", overflow="fold")
    for row in report.coverage.rows:
        cells = [row.cls, row.format, str(row.modules or ""), str(row.tensors), amount(row.bytes)]
        cells += [str(1 + kernels.index(kernel or "none")) for kernel in row.kernels]
        table.add_row(*(Text(cell) for cell in cells))
    legend = Text("kernels: " + ", ".join(f"{i} {kernel}" for i, kernel in enumerate(kernels, 1)))
    return Group(Text(), table, legend, Text())


def _print_findings(findings: list[Finding], console: Console) -> None:
    """Findings of one code: its name, what was found where, and once why it matters and what to do."""
    first = findings[0]
    console.print(Text(f"{first.severity.upper()} {first.code}", style=STYLES[first.severity]))
    lines = []
    for finding in findings:
        number = f" ({finding.count} tensors)" if finding.count > 1 else ""
        lines.append(f"{finding.tensor}{number}: {finding.value}")
        if finding.examples:
            lines.append(f"  first {', '.join(finding.examples)}")
    for line in (*lines, f"why: {first.why}", f"do: {first.action}"):
        indent = " " * (2 + len(line) - len(line.lstrip()))
        width = max(console.width - 1, 20)
        wrapped = wrap(line.strip(), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        console.print(Text("\n".join(wrapped)))
