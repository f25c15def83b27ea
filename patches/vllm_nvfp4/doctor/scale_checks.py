"""The values of scales: bad numbers, scales that would amplify, experts that calibration never saw, saturated blocks.

A global scale implies a largest value: amax = 2688 * scale (6 * 448, the largest code times the largest block scale). That is
what makes a stored number checkable. A weight, or a normalised or clamped activation, does not reach 2688, so a scale of 1 or
more is no scale at all: it is the inverse, which is always above 1, or a placeholder that nothing replaced.

What is milder is compared with its like: an expert with its layer, any other matrix with its class over the layers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch

from vllm_nvfp4 import names
from vllm_nvfp4.checkpoint import Tensor
from vllm_nvfp4.doctor import ranges
from vllm_nvfp4.doctor.findings import ERROR, WARNING, Finding, Severity, grouped, make, pattern_of
from vllm_nvfp4.scales import bad_global_scale

AMAX_OF_SCALE = 6.0 * 448.0
# A scale that is off by f shifts block scales by f in E4M3, whose normal numbers span 2^15. Activations rarely need more than
# half of that, so 2^8 is where a scale that is too large begins to hurt; one that is too small has long clipped by then.
WITHIN_LAYER, ACROSS_LAYERS, MIN_GROUP = 256.0, 1024.0, 4
# The share of blocks at 448 (or 0) that is no accident: a healthy matrix has only those there that hold its largest value.
MAX_SHARE, MIN_BLOCKS = 0.1, 64
# Block scales are a ninth of the weights: above this many bytes only the ends of each tensor are read, unless --deep.
WHOLE_BYTES, END_BYTES = 1 << 30, 2048
INPUT, WEIGHT = "input_scale", "weight_scale_2"
_LAYER = re.compile(r"(?:model\.layers|mtp)\.([0-9]+)\.")


@dataclass
class Global:
    """A global scale: its place in the model, the checkpoint's name for it, its value."""

    canonical: str
    name: str
    leaf: str
    layer: str
    cls: str
    is_expert: bool
    value: float


@dataclass
class ScaleReport:
    """Findings; the good global scales; how much was read."""

    findings: list[Finding] = field(default_factory=list)
    globals: list[Global] = field(default_factory=list)
    bytes_read: int = 0
    block_bytes: int = 0
    block_bytes_read: int = 0


def check(
    tensors: Mapping[str, Tensor],
    by_canonical: Mapping[str, str],
    *,
    deep: bool,
    arch: str | None,
) -> ScaleReport:
    """Read and check every scale of a checkpoint on a disk.

    Args:
        by_canonical: canonical -> checkpoint name.
        deep: read all block scales, however many. arch: as coverage.examine.
    """
    report = ScaleReport()
    _check_globals(tensors, by_canonical, report)
    report.findings += _compare(report.globals)
    report.findings += _shards(report.globals, arch)
    _check_blocks(tensors, by_canonical, report, deep)
    _check_fp8(tensors, by_canonical, report)
    return report


def _check_globals(tensors: Mapping[str, Tensor], by_canonical: Mapping[str, str], report: ScaleReport) -> None:
    """Read all global scales; refuse the numbers that the loader refuses, and those of 1 and more."""
    places: dict[str, Global] = {}
    wanted: list[ranges.Range] = []
    for canonical, name in by_canonical.items():
        leaf = canonical.rpartition(".")[2]
        tensor = tensors[name]
        if leaf in (INPUT, WEIGHT) and tensor.dtype == torch.float32 and tensor.num_bytes == 4:
            places[name] = _place(canonical, name, leaf)
            wanted += ranges.whole(name, tensor)
    hits: dict[tuple[str, Severity | None], list[tuple[str, str]]] = {}
    amplified = []
    for done in ranges.reduce_all(wanted, lambda raw: float(raw.view("<f4")[0])):
        if done.result is None:
            _unreadable(report, done)
            continue
        report.bytes_read += done.range.num_bytes
        scale = places[done.range.name]
        scale.value = done.result
        problem = bad_global_scale(scale.value)
        if problem is None and scale.value < 1:
            report.globals.append(scale)
        elif problem is None:
            amplified.append(scale)
        else:
            kind = {"NaN": "SCALE_NAN", "inf": "SCALE_INFINITE", "zer": "SCALE_ZERO", "neg": "SCALE_NEGATIVE"}[
                problem[:3]
            ]
            code = "EXPERT_UNCALIBRATED" if kind == "SCALE_ZERO" and scale.is_expert and scale.leaf == INPUT else kind
            hits.setdefault((code, None), []).append((scale.name, f"{scale.value}"))
    medians = _medians(report.globals)
    for scale in amplified:
        hits.setdefault(_amplifies(scale), []).append((scale.name, _amplification(scale, medians)))
    for (code, severity), pairs in hits.items():
        report.findings += grouped(code, pairs, severity)


def _amplifies(scale: Global) -> tuple[str, Severity | None]:
    """The code for a scale of 1 or more; exactly 1 on an expert's input is a placeholder."""
    if scale.leaf == WEIGHT:
        return "WEIGHT_SCALE_AMPLIFIES", None
    return ("EXPERT_UNCALIBRATED" if scale.is_expert and scale.value == 1.0 else "INPUT_SCALE_AMPLIFIES"), None


def _amplification(scale: Global, medians: Mapping[tuple[str, ...], float]) -> str:
    """The value, the largest number it implies, and the factor against what can be right."""
    text = f"{scale.value:.6g} implies values up to {scale.value * AMAX_OF_SCALE:.4g}"
    inverse = 1 / scale.value
    usual = medians.get((scale.cls, scale.leaf))
    if usual is not None:
        text += f"; the median of its class implies {usual * AMAX_OF_SCALE:.4g}: a factor of {scale.value / usual:.4g}"
    if scale.value > 1:
        text += (
            f"; read as an inverse it implies {inverse * AMAX_OF_SCALE:.4g}, a factor of {scale.value / inverse:.4g}"
        )
    return text


def _place(canonical: str, name: str, leaf: str) -> Global:
    layer = _LAYER.match(canonical)
    is_expert = ".ffn.experts." in canonical
    return Global(canonical, name, leaf, layer[0] if layer else "", pattern_of(canonical), is_expert, float("nan"))


def _medians(scales: list[Global]) -> dict[tuple[str, ...], float]:
    """Median by (class, leaf), and by (class, leaf, layer) for experts; of groups that are large enough to have one."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for scale in scales:
        groups.setdefault((scale.cls, scale.leaf), []).append(scale.value)
        if scale.is_expert:
            groups.setdefault((scale.cls, scale.leaf, scale.layer), []).append(scale.value)
    return {key: median(values) for key, values in groups.items() if len(values) >= MIN_GROUP}


def _compare(scales: list[Global]) -> list[Finding]:
    """Scales far from their like."""
    medians = _medians(scales)
    hits: dict[tuple[str, Severity | None], list[tuple[str, str]]] = {}
    for scale in scales:
        limits = [(medians.get((scale.cls, scale.leaf)), ACROSS_LAYERS, "class")]
        if scale.is_expert:
            limits.insert(0, (medians.get((scale.cls, scale.leaf, scale.layer)), WITHIN_LAYER, "layer"))
        for usual, limit, where in limits:
            if usual is None or usual / limit <= scale.value <= usual * limit:
                continue
            value = (
                f"{scale.value:.6g} implies values up to {scale.value * AMAX_OF_SCALE:.4g}; the median of its {where} "
                f"implies {usual * AMAX_OF_SCALE:.4g}: a factor of {scale.value / usual:.4g}"
            )
            key: tuple[str, Severity | None] = ("WEIGHT_SCALE_OUTLIER", None)
            if scale.leaf == INPUT:
                never_seen = scale.is_expert and scale.value < usual
                key = ("EXPERT_UNCALIBRATED", WARNING) if never_seen else ("INPUT_SCALE_OUTLIER", None)
            hits.setdefault(key, []).append((scale.name, value))
            break
    return [f for (code, severity), pairs in hits.items() for f in grouped(code, pairs, severity)]


def _shards(scales: list[Global], arch: str | None) -> list[Finding]:
    """Fused modules whose shards have different global scales: exact here, but for what sm100 quantizes once."""
    by_name = {scale.canonical: scale for scale in scales}
    hits: dict[Severity | None, list[tuple[float, str, str]]] = {}
    for scale in scales:
        other = by_name.get(_second_shard(scale.canonical) or "")
        if other is None or other.value == scale.value:
            continue
        is_swiglu = scale.is_expert or ".shared_experts." in scale.canonical
        fatal = arch == "sm100" and is_swiglu and scale.leaf == INPUT
        ratio = max(scale.value, other.value) / min(scale.value, other.value)
        value = f"{scale.value:.6g} and {other.value:.6g} in {other.name}: a ratio of {ratio:.6g}"
        hits.setdefault(ERROR if fatal else None, []).append((ratio, scale.name, value))
    found = []
    for severity, members in hits.items():
        members.sort(key=lambda member: -member[0])  # the largest ratio is the one to show
        found += grouped("SHARD_SCALES_DIFFER", [(name, value) for _, name, value in members], severity)
    return found


def _second_shard(canonical: str) -> str | None:
    """The name beside a first shard's in a fused module: wkv for wq_a, wgate for wkv, w3 for w1."""
    module, leaf = names.split_leaf(canonical)
    expert = names.parse_expert(canonical)
    if expert is not None:
        return f"{module.removesuffix('w1')}w3.{leaf}" if expert.projection == "w1" else None
    fused = names.fused(canonical)
    if fused is None or fused[1] != 0:
        return None
    return f"{names.module_of(names.split_leaf(fused[0])[0])[1]}.{leaf}"


def _check_blocks(
    tensors: Mapping[str, Tensor], by_canonical: Mapping[str, str], report: ScaleReport, deep: bool
) -> None:
    """NVFP4 block scales: NaN and negative ones, and shares of 448 and of 0."""
    found = [
        n for c, n in by_canonical.items() if c.endswith(".weight_scale") and tensors[n].dtype == torch.float8_e4m3fn
    ]
    report.block_bytes = sum(tensors[name].num_bytes for name in found)
    is_whole = deep or report.block_bytes <= WHOLE_BYTES
    wanted = [
        r for n in found for r in (ranges.whole(n, tensors[n]) if is_whole else ranges.ends(n, tensors[n], END_BYTES))
    ]
    counts: dict[str, ranges.Counts] = {}
    for done in ranges.reduce_all(wanted, ranges.histogram):
        if done.result is None:
            _unreadable(report, done)
            continue
        report.block_bytes_read += done.range.num_bytes
        name = done.range.name
        counts[name] = counts[name] + done.result if name in counts else done.result
    report.bytes_read += report.block_bytes_read
    hits: dict[str, list[tuple[str, str]]] = {}
    for name, histogram in counts.items():
        for code, value in _block_problems(histogram):
            hits.setdefault(code, []).append((name, value))
    for code, pairs in hits.items():
        report.findings += grouped(code, pairs)


def _block_problems(histogram: ranges.Counts) -> Iterator[tuple[str, str]]:
    """(code, value) for the counts of E4M3 bytes: 0x7E is 448, 0x7F and 0xFF are NaN, 0x80 is a zero."""
    total = int(histogram.sum())
    num_nan, num_negative = int(histogram[0x7F] + histogram[0xFF]), int(histogram[0x81:0xFF].sum())
    if num_nan:
        yield "BLOCK_SCALE_NAN", f"{num_nan} of {total} block scales read are NaN"
    if num_negative:
        yield "BLOCK_SCALE_NEGATIVE", f"{num_negative} of {total} block scales read are negative"
    if total < MIN_BLOCKS:
        return
    for code, count, what in (
        ("BLOCK_SCALE_SATURATED", int(histogram[0x7E]), "448"),
        ("BLOCK_SCALE_ZERO", int(histogram[0] + histogram[0x80]), "0"),
    ):
        if count > MAX_SHARE * total:
            yield code, f"{count / total:.1%} of {total} block scales read are {what}"


def _check_fp8(tensors: Mapping[str, Tensor], by_canonical: Mapping[str, str], report: ScaleReport) -> None:
    """FP8 block scales: NaN, infinite or negative ones."""
    found = [n for c, n in by_canonical.items() if c.endswith(".weight_scale_inv")]
    found = [n for n in found if tensors[n].dtype in (torch.float8_e8m0fnu, torch.float32)]
    wanted = [r for name in found for r in ranges.whole(name, tensors[name])]
    is_e8m0 = {name: tensors[name].dtype == torch.float8_e8m0fnu for name in found}
    counts: dict[str, int] = {}
    for done in ranges.reduce_all(wanted, lambda raw: raw.copy()):
        if done.result is None:
            _unreadable(report, done)
            continue
        report.bytes_read += done.range.num_bytes
        if is_e8m0[done.range.name]:
            bad = int((done.result == 0xFF).sum())
        else:
            values = done.result.view("<f4")
            bad = int((~(np.isfinite(values) & (values >= 0))).sum())
        counts[done.range.name] = counts.get(done.range.name, 0) + bad
    hits = [(name, f"{bad} block scales are NaN, infinite or negative") for name, bad in counts.items() if bad]
    report.findings += grouped("FP8_SCALE_BAD", hits)


def _unreadable(report: ScaleReport, done: ranges.Reduced) -> None:
    """A file that cannot be read any more, once."""
    file = done.range.file.name
    if not any(f.code == "FILE_UNREADABLE" and f.tensor == file for f in report.findings):
        report.findings.append(make("FILE_UNREADABLE", file, f"{done.error} (at {done.range.name})"))
