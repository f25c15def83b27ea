"""One examination: open, name, read scales, read what the files say about themselves, plan; all of it into one Report."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_nvfp4 import architecture
from vllm_nvfp4.doctor import coverage as coverage_checks
from vllm_nvfp4.doctor import deep, metadata, scale_checks, source
from vllm_nvfp4.doctor.findings import Finding, exit_code, make, sorted_by_severity
from vllm_nvfp4.doctor.gpus import GPUS
from vllm_nvfp4.doctor.plan import Fit, Plan, PlanOptions, plan

# What of the configuration is shown as the architecture.
SHOWN = (
    "model_type", "num_hidden_layers", "num_hash_layers", "hidden_size", "num_attention_heads", "head_dim", "q_lora_rank",
    "o_groups", "o_lora_rank", "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size",
    "index_n_heads", "index_head_dim", "index_topk", "hc_mult", "vocab_size", "max_position_embeddings",
    "num_nextn_predict_layers", "compress_ratios",
)  # fmt: skip
VERDICTS = {0: "will serve", 1: "will not serve", 2: "will serve, with warnings"}
# Kernels' name for the compute capability of what --gpu can name; sm_100a's machine code does not run on a 10.3.
ARCH_OF_GPU = {
    "h100": "sm90", "h200": "sm90", "b200": "sm100", "gb200": "sm100", "b300": "sm103", "gb300": "sm103",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """plan_only: from config.json alone. deep: read the weights. asked: whether the user chose a GPU or a layout."""

    plan_only: bool = False
    deep: bool = False
    revision: str | None = None
    plan: PlanOptions = field(default_factory=PlanOptions)
    asked: bool = False

    @property
    def arch(self) -> str | None:
        """The kernels' name for the GPU that the user chose."""
        return ARCH_OF_GPU[self.plan.gpu] if self.asked and self.plan.gpu in GPUS else None


@dataclass
class Report:
    """Everything that was found; see schema.json for the meaning of its JSON form."""

    path: str
    kind: str
    findings: list[Finding] = field(default_factory=list)
    coverage: coverage_checks.Coverage = field(default_factory=coverage_checks.Coverage)
    config: Any = None
    num_files: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    num_parameters: int = 0
    scales: scale_checks.ScaleReport = field(default_factory=scale_checks.ScaleReport)
    deep: dict[str, Any] | None = None
    plan: Plan | None = None
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 serve, 1 will not serve, 2 will serve with warnings."""
        return exit_code(self.findings)

    @property
    def verdict(self) -> str:
        """The exit code in words."""
        return VERDICTS[self.exit_code]


def examine(path: str, options: Options) -> Report:
    """Examine a checkpoint folder, a config.json or a Hub id; whatever is wrong becomes a finding."""
    begin = time.perf_counter()
    with _no_gc():
        opened = source.open_source(path, options.revision, plan_only=options.plan_only)
        report = Report(path, opened.kind, findings=list(opened.findings))
        if opened.config is not None:
            report.config, wrong = metadata.read_config(opened.config)
            report.findings += wrong
        if opened.kind != "config":
            _examine_weights(opened, options, report)
        if report.config is not None:
            _count_parameters(report)
            _plan(options, report)
    report.findings = sorted_by_severity(report.findings)
    report.seconds = time.perf_counter() - begin
    return report


@contextmanager
def _no_gc() -> Iterator[None]:
    """Without the collector, which would walk the entries of 300 000 tensors again and again: a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _examine_weights(opened: source.Source, options: Options, report: Report) -> None:
    """Everything but the plan."""
    report.num_files, report.num_tensors = opened.num_files, len(opened.tensors)
    report.num_bytes = sum(tensor.num_bytes for tensor in opened.tensors.values())
    if opened.config is not None:
        report.findings += metadata.check_quantization(opened)
    report.findings += metadata.check_tokenizer(opened, report.config)
    if not opened.tensors:
        return
    found = coverage_checks.examine(opened, report.config, options.arch)
    report.coverage = found
    report.findings += found.findings
    if found.survey is not None:
        report.findings += metadata.check_ignore(opened, found.by_canonical, found.formats)
        if not opened.is_partial and not opened.lost:
            report.findings += metadata.check_mtp(report.config, found.survey.num_mtp_layers)
    if opened.kind == "hub":
        return
    report.scales = scale_checks.check(opened.tensors, found.by_canonical, deep=options.deep, arch=options.arch)
    report.findings += report.scales.findings
    if options.deep:
        num_experts = report.config.n_routed_experts if report.config else 1 << 30
        wrong, report.deep = deep.check(opened.tensors, found.by_canonical, found.formats, num_experts)
        report.findings += wrong


def _count_parameters(report: Report) -> None:
    """Numbers of the model that the configuration describes, MTP layers that are there included."""
    num_mtp = report.coverage.survey.num_mtp_layers if report.coverage.survey else 0
    wanted = architecture.expected(report.config, num_mtp)
    report.num_parameters = sum(n * k for n, k in wanted.linears.values())
    for shape in wanted.tensors.values():
        size = 1
        for extent in shape:
            size *= extent
        report.num_parameters += size


def _plan(options: Options, report: Report) -> None:
    """The plan, with the checkpoint's own formats where it is whole; what was asked for and does not fit is a finding."""
    surveyed = report.coverage.survey
    formats = surveyed.formats if surveyed is not None and not surveyed.problems else None
    try:
        report.plan = plan(report.config, formats, options.plan)
    except ValueError as error:
        report.findings.append(make("PLAN_OPTIONS", "plan", str(error)))
        return
    fit = report.plan.fit
    if options.asked and not fit.fits:
        code = "PLAN_FEWER_REQUESTS" if _starts(report.plan, fit) else "PLAN_DOES_NOT_FIT"
        report.findings.append(
            make(code, f"{fit.label} on {fit.num_gpus} x {report.plan.gpu.name}", "; ".join(fit.problems))
        )
    if report.plan.recommended is None:
        value = f"no layout on up to {report.plan.options.max_gpus} {report.plan.gpu.name}"
        report.findings.append(make("PLAN_NO_LAYOUT", "plan", value))


def _starts(made: Plan, fit: Fit) -> bool:
    """Whether vLLM would come up at all, with however few requests."""
    outside = int(made.gpu.total_bytes * (1 - made.options.gpu_memory_utilization))
    return fit.kv.available_bytes >= fit.kv.startup_bytes and fit.after_kv_bytes <= outside
