"""Every tensor under its canonical name, what is wrong with its presence, type and shape, and what will compute it where.

The rules are inventory's: what the doctor calls an error is what the loader refuses. `KERNELS` is the one table to edit when
a kernel arrives.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_nvfp4 import names
from vllm_nvfp4.checkpoint import Tensor
from vllm_nvfp4.doctor.findings import ERROR, Finding, Severity, grouped, make
from vllm_nvfp4.doctor.source import Source
from vllm_nvfp4.inventory import Format, Kind, Survey, survey

ARCHS = ("cpu", "sm90", "sm100")
VLLM = "vLLM"
OURS = ("cutedsl reference", "cutedsl sm90", "cutedsl sm100")
FP8 = "vLLM FP8 block"
# (what it is, format) -> the kernel on each of ARCHS; None: nothing there can compute it.
KERNELS: dict[tuple[str, Format], tuple[str | None, str | None, str | None]] = {
    ("experts", Format.NVFP4): OURS,
    ("experts", Format.FP8_BLOCK): (None, None, None),
    ("experts", Format.HIGH): ("vLLM unquantized (fallback)",) * 3,
    ("linear", Format.NVFP4): OURS,
    ("linear", Format.FP8_BLOCK): (FP8, FP8, FP8),
    ("linear", Format.HIGH): (VLLM, VLLM, VLLM),
    ("wo_a", Format.NVFP4): OURS,
    ("wo_a", Format.FP8_BLOCK): (FP8, FP8, FP8),
    ("wo_a", Format.HIGH): (VLLM, VLLM, VLLM),
}
# vLLM 0.32 has no MTP draft for CPUs.
NO_DRAFT = "not used"
MAX_NAME = 512  # longer names are no names: damaged headers

# Classes of the coverage table, in its order: the first pattern that matches the canonical name, MTP layers apart.
CLASSES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (label, re.compile(pattern))
    for label, pattern in (
        ("routed experts", r".*\.ffn\.experts\..*"),
        ("shared experts", r".*\.ffn\.shared_experts\..*"),
        ("q_a", r".*\.attn\.wq_a\..*"),
        ("q_b", r".*\.attn\.wq_b\..*"),
        ("kv", r".*\.attn\.wkv\..*"),
        ("o_a", r".*\.attn\.wo_a\..*"),
        ("o_b", r".*\.attn\.wo_b\..*"),
        ("norms", r".*norm\.weight"),
        ("compressor", r".*\.attn\.compressor\..*"),
        ("indexer compressor", r".*\.indexer\.compressor\..*"),
        ("indexer q_b", r".*\.indexer\.wq_b\..*"),
        ("indexer weights_proj", r".*\.indexer\.weights_proj\..*"),
        ("router", r".*\.ffn\.gate\..*"),
        ("hyper-connections", r".*hc_[a-z_]+"),
        ("attention sinks", r".*\.attn_sink"),
        ("embedding", r"model\.embed_tokens\..*"),
        ("head", r"lm_head\..*"),
    )
)
MTP, OTHER = "mtp", "other"
_ORDER = [label for label, _ in CLASSES] + [MTP, OTHER]
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32", torch.int32: "INT32"}
_DTYPE_NAMES |= {torch.int64: "INT64"}
_CODES = {
    Kind.MISSING: "TENSOR_MISSING",
    Kind.UNEXPECTED: "TENSOR_UNEXPECTED",
    Kind.DTYPE: "TENSOR_DTYPE",
    Kind.SHAPE: "TENSOR_SHAPE",
    Kind.STRAY_SCALE: "SCALE_STRAY",
    Kind.MIXED: "FORMATS_MIXED",
}


@dataclass
class Row:
    """One line of the coverage table; modules are linears, tensors all that belong to them."""

    cls: str
    format: str
    kernels: tuple[str | None, ...]
    modules: int = 0
    tensors: int = 0
    bytes: int = 0


@dataclass
class Coverage:
    """layout and the rule that decided; by_canonical: canonical -> checkpoint name; survey: None without a configuration."""

    layout: str = "unknown"
    evidence: str = ""
    by_canonical: dict[str, str] = field(default_factory=dict)
    survey: Survey | None = None
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def formats(self) -> dict[str, Format]:
        """Canonical module -> Format, routed experts as one a layer; of what could be told."""
        return self.survey.formats if self.survey else {}


def examine(source: Source, config: Any, arch: str | None = None) -> Coverage:
    """Names, completeness, formats and kernels of a checkpoint.

    Args:
        config: vLLM's fields, or None: then only names and layout can be told.
        arch: what the user means to serve on, whose missing kernels are errors; one of ARCHS, or another for which there
            are no kernels; None: not said.
    """
    found = Coverage()
    try:
        layout, found.evidence = names.detect_layout(source.tensors)
        found.layout = str(layout)
    except names.UnknownLayoutError as error:
        # The shards that are left may hold no layer at all.
        may_be_lost = (source.is_partial or source.lost) and not any("layers." in name for name in source.tensors)
        if not may_be_lost:
            found.findings.append(make("LAYOUT_UNKNOWN", source.path, str(error)))
            return found
    _name_all(source, config, found)
    if config is not None:
        try:
            found.survey = survey(source.tensors, found.by_canonical, config)
        except ValueError as error:
            found.findings.append(make("CONFIG_FIELD", "config.json", str(error)))
        else:
            found.findings += _problem_findings(source, found.survey, config)
    found.rows = _rows(source.tensors, found)
    found.findings += _kernel_findings(found, arch)
    return found


def _name_all(source: Source, config: Any, found: Coverage) -> None:
    """Canonical names of all tensors."""
    num_layers = config.num_hidden_layers if config is not None else None
    unknown, unused = [], []
    for name in source.tensors:
        try:
            if len(name) > MAX_NAME:
                raise names.UnknownNameError(f"a name of {len(name)} characters")
            canonical = names.canonical(name, num_layers)
        except names.UnknownNameError:
            if config is not None:  # without a layer count, MTP layers cannot be told
                unknown.append((name, "no rule covers this name"))
            continue
        if canonical is None:
            unused.append((name, str(names.dropped_reason(name))))
        elif canonical in found.by_canonical:
            value = f"means the same as {found.by_canonical[canonical]}"
            found.findings.append(make("TENSOR_DUPLICATE", name, value))
        else:
            found.by_canonical[canonical] = name
    found.findings += grouped("NAME_UNKNOWN", unknown)
    found.findings += grouped("TENSOR_UNUSED", unused)


def _problem_findings(source: Source, surveyed: Survey, config: Any) -> list[Finding]:
    """Inventory's problems as findings; what only follows from a lost file is left out."""
    lost = {_canonical(name, config) for name in source.lost}
    hits: dict[str, list[tuple[str, str]]] = {}
    for problem in surveyed.problems:
        for name in problem.names:
            code, value = _CODES[problem.kind], problem.found
            if problem.kind is Kind.MISSING:
                canonical = _canonical(name, config)
                if source.is_partial or canonical in lost:
                    continue
                expert = names.parse_expert(canonical)
                if expert is not None and expert.leaf == "input_scale":
                    code = "EXPERT_UNCALIBRATED"
            hits.setdefault(code, []).append((name, value))
    return [finding for code, pairs in hits.items() for finding in grouped(code, pairs)]


def _canonical(name: str, config: Any) -> str:
    try:
        return names.canonical(name, config.num_hidden_layers) or name
    except names.UnknownNameError:
        return name


def class_of(canonical: str) -> str:
    """The coverage table's class of a canonical name."""
    if canonical.startswith("mtp."):
        return MTP
    # Nearly all of a checkpoint are experts.
    if ".ffn.experts." in canonical:
        return CLASSES[0][0]
    return next((label for label, pattern in CLASSES if pattern.fullmatch(canonical)), OTHER)


def role_of(canonical_module: str) -> str:
    """The first half of a key of KERNELS."""
    if ".ffn.experts" in canonical_module:
        return "experts"
    return "wo_a" if canonical_module.endswith(".wo_a") else "linear"


def _rows(tensors: Mapping[str, Tensor], found: Coverage) -> list[Row]:
    """The coverage table."""
    rows: dict[tuple[str, str, tuple[str | None, ...]], Row] = {}
    of_module: dict[str, Row] = {}
    for canonical, name in found.by_canonical.items():
        module, _, leaf = canonical.rpartition(".")
        expert = names.parse_expert(canonical)
        form = found.formats.get(f"{expert.layer}.ffn.experts" if expert else module)
        row = of_module.get(module) if form else None
        if row is None:
            weight = tensors[found.by_canonical.get(f"{module}.weight", name) if form else name]
            key = (class_of(canonical), _shown_format(form, weight.dtype), _kernels(canonical, module, form))
            row = rows.setdefault(key, Row(*key))
            if form:
                of_module[module] = row
        row.modules += form is not None and leaf == "weight"
        row.tensors += 1
        row.bytes += tensors[name].num_bytes
    return sorted(rows.values(), key=lambda row: (_ORDER.index(row.cls), row.format))


def _shown_format(form: Format | None, dtype: torch.dtype) -> str:
    """Quantized formats by name, anything else by how it is stored."""
    if form is Format.NVFP4:
        return "NVFP4"
    if form is Format.FP8_BLOCK:
        return "FP8 block"
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _kernels(canonical: str, module: str, form: Format | None) -> tuple[str | None, ...]:
    """What computes it on each of ARCHS."""
    kernels = KERNELS[role_of(module), form] if form else (VLLM,) * len(ARCHS)
    return (NO_DRAFT, *kernels[1:]) if canonical.startswith("mtp.") else kernels


def _kernel_findings(found: Coverage, arch: str | None) -> list[Finding]:
    """Formats that some hardware has no kernel for; an error where nothing has one, or where the user means to serve."""
    hits: dict[tuple[str, Severity | None], list[tuple[str, str]]] = {}
    for module, form in found.formats.items():
        kernels = dict(zip(ARCHS, KERNELS[role_of(module), form], strict=True))
        absent = [name for name in ARCHS if kernels[name] is None]
        if form is Format.NVFP4 and arch is not None and arch not in ARCHS:
            absent.append(arch)
        if absent:
            fatal = len(absent) == len(ARCHS) or arch in absent
            value = f"{form}: no kernel on {', '.join(absent)}"
            hits.setdefault((value, ERROR if fatal else None), []).append((module, value))
    return [f for (_, severity), pairs in hits.items() for f in grouped("NO_KERNEL", pairs, severity)]
