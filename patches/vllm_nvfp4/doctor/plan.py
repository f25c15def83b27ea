"""Will a model fit, with which context and how many requests, and on how many GPUs: from a configuration alone, or with the
formats that a checkpoint really has.

    budget = total_bytes * gpu_memory_utilization
    available for KV = budget - weights - workspaces        (of the fullest pipeline stage)
    fits = vLLM starts (available >= one request whose prompt is being read) and the asked requests fit at once

Weights and KV cache follow vLLM 0.32's own arithmetic, to the byte where tests/cpu/test_doctor_plan.py can watch an engine;
workspaces are partly estimates (workspaces.py) and say which.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_nvfp4.doctor import gpus, kv_cache
from vllm_nvfp4.doctor.gpus import Gpu
from vllm_nvfp4.doctor.kv_cache import KvPlan
from vllm_nvfp4.doctor.layout import Layout, candidates
from vllm_nvfp4.doctor.weights import Table
from vllm_nvfp4.doctor.workspaces import Load, Workspace, workspaces
from vllm_nvfp4.inventory import Format

if TYPE_CHECKING:
    from rich.console import Console, Group

DEFAULT_CONTEXT = 131072
# A batch small enough that what vLLM reserves for it no longer matters, for the hint.
SMALL_BATCH = 4096
# Read here beyond what architecture.expected reads.
FIELDS = ("max_position_embeddings", "sliding_window", "compress_ratios", "index_topk", "qk_rope_head_dim", "head_dim")


@dataclass(frozen=True)
class PlanOptions:
    """What is asked.

    gpu: a key of gpus.GPUS. tp, dp, pp: sizes as vLLM's flags. ep: True, or the size, which can only be tp * dp.
    context: tokens of a request, None for the model's maximum up to 131072. max_num_seqs: requests of that length at once,
    over all data-parallel ranks. gpu_memory_utilization: as vLLM's flag. max_num_batched_tokens: None for vLLM's default on
    this GPU. async_scheduling: vLLM's default. mtp: speculative decoding with the checkpoint's MTP layers.
    assume: formats where no checkpoint says them: "config" or "nvfp4" (weights.assumed_formats). wo_a_nvfp4: NVFP4_WO_A=1.
    kv_cache_bytes: fixed size of the cache instead of what is left, as --kv-cache-memory-bytes. max_gpus: recommend no more.
    """

    gpu: str = "b200"
    tp: int = 1
    ep: bool | int = False
    dp: int = 1
    pp: int = 1
    context: int | None = None
    max_num_seqs: int = 16
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int | None = None
    async_scheduling: bool = True
    mtp: bool = False
    assume: str = "config"
    wo_a_nvfp4: bool = False
    kv_cache_bytes: int | None = None
    max_gpus: int = 64

    @property
    def layout(self) -> Layout:
        """The parallel layout asked for.

        Raises: ValueError - `ep` is a size other than 1 and tp * dp.
        """
        if not isinstance(self.ep, bool) and self.ep not in (0, 1, self.tp * self.dp):
            raise ValueError(
                f"--ep {self.ep}: vLLM spreads experts over all tp * dp = {self.tp * self.dp} ranks; pass that or 1"
            )
        return Layout(tp=self.tp, dp=self.dp, pp=self.pp, ep=self.ep is True or (self.ep > 1 and self.tp * self.dp > 1))


@dataclass(frozen=True)
class Fit:
    """One layout on one GPU kind; bytes are of one GPU, of the fullest pipeline stage.

    problems: empty if it fits; shortfall_bytes: how much the worst of them lacks.
    """

    layout: Layout
    label: str
    flags: str
    num_gpus: int
    weights: dict[str, int]
    workspaces: tuple[Workspace, ...]
    kv: KvPlan
    budget_bytes: int
    concurrent_requests: int
    problems: tuple[str, ...]
    shortfall_bytes: int

    @property
    def weights_bytes(self) -> int:
        """All classes."""
        return sum(self.weights.values())

    @property
    def workspace_bytes(self) -> int:
        """What counts against the budget."""
        return sum(w.bytes for w in self.workspaces if not w.after_kv)

    @property
    def after_kv_bytes(self) -> int:
        """What must fit beside the budget."""
        return sum(w.bytes for w in self.workspaces if w.after_kv)

    @property
    def fits(self) -> bool:
        """No problems."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON; names are stable."""
        sums = {n: getattr(self, n) for n in ("weights_bytes", "workspace_bytes", "after_kv_bytes", "fits")}
        kv = {n: getattr(self.kv, n) for n in ("request_bytes", "startup_bytes", "tokens")}
        return {**asdict(self), **sums, "kv": {**asdict(self.kv), **kv}}


@dataclass(frozen=True)
class Plan:
    """fit: the layout asked for. recommended: the best layout on the fewest GPUs, None if none up to max_gpus fits.

    candidates: all layouts that were tried, in order. hints: settings that would give more. assumptions: what was not known.
    """

    gpu: Gpu
    options: PlanOptions
    model_bytes: int
    fit: Fit
    recommended: Fit | None
    candidates: tuple[Fit, ...]
    hints: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the layout asked for fits."""
        return self.fit.fits

    def as_dict(self) -> dict[str, Any]:
        """For JSON; names are stable. Candidates without their details."""
        short = ("label", "flags", "num_gpus", "concurrent_requests", "problems", "shortfall_bytes", "fits")
        return {
            "gpu": asdict(self.gpu),
            "options": asdict(self.options),
            "model_bytes": self.model_bytes,
            "fit": self.fit.as_dict(),
            "recommended": self.recommended.as_dict() if self.recommended else None,
            "candidates": [{n: getattr(c, n) for n in short} for c in self.candidates],
            "hints": list(self.hints),
            "assumptions": list(self.assumptions),
        }

    def render(self, console: "Console | None" = None) -> "Group":
        """The plan as rich text, printed if a console is given."""
        from vllm_nvfp4.doctor.plan_view import view

        group = view(self)
        if console is not None:
            console.print(group)
        return group


def plan(config: Any, formats: Mapping[str, Format] | None, options: PlanOptions | None = None) -> Plan:
    """The plan of a model for the options' GPU and layout, with a recommendation.

    Args:
        config: DeepSeek-V4 configuration with vLLM's field names as attributes (vllm_nvfp4.config.DeepseekV4Config).
        formats: inventory.Inventory.formats of a checkpoint, or None to assume them from the configuration.
    Raises: ValueError - an option or the configuration makes no sense; the message names it.
    """
    options = options or PlanOptions()
    gpu = gpus.find(options.gpu)
    missing = [name for name in FIELDS if not hasattr(config, name)]
    if missing:
        raise ValueError(f"config.json does not describe a DeepSeek-V4 model: it has no {', '.join(missing)}")
    options = _resolved(config, gpu, options)
    layout = options.layout
    layout.check(config)
    num_mtp = _num_mtp(config, formats) if options.mtp else 0
    table = Table(config, formats, num_mtp, options.assume, options.wo_a_nvfp4)
    made = kv_cache.groups(kv_cache.caches(config, num_mtp))
    tried = _try_layouts(config, gpu, options, table, made)
    fitting = [fit for fit in tried if fit.fits]
    assumptions = [table.assumption] if table.assumption else []
    assumptions += [
        f"{w.name}: {w.formula}" for w in workspaces(config, layout, _load(options, layout), made) if not w.exact
    ]
    fit = _evaluate(config, gpu, options, layout, table, made)
    smaller = _evaluate(config, gpu, replace(options, max_num_batched_tokens=SMALL_BATCH), layout, table, made)
    return Plan(
        gpu=gpu,
        options=options,
        model_bytes=table.total_bytes,
        fit=fit,
        recommended=max(fitting, key=lambda fit: fit.concurrent_requests, default=None),
        candidates=tuple(tried),
        hints=tuple(_hints(fit, smaller)),
        assumptions=tuple(assumptions),
    )


def _hints(fit: Fit, smaller: Fit) -> list[str]:
    """What a smaller batch would give, where that is worth saying."""
    if smaller.concurrent_requests <= fit.concurrent_requests * 1.1:
        return []
    return [
        f"--max-num-batched-tokens {SMALL_BATCH} fits {smaller.concurrent_requests} requests at once instead of "
        f"{fit.concurrent_requests}: vLLM keeps {gib(fit.kv.startup_bytes)} of KV cache free for a prompt being read, "
        f"then {gib(smaller.kv.startup_bytes)}"
    ]


def _resolved(config: Any, gpu: Gpu, options: PlanOptions) -> PlanOptions:
    """The options with defaults filled in, checked."""
    longest = int(config.max_position_embeddings)
    context = min(longest, DEFAULT_CONTEXT) if options.context is None else options.context
    if not 1 <= context <= longest:
        raise ValueError(f"--context {context}: the model has 1 to {longest} positions (max_position_embeddings)")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise ValueError(f"--gpu-memory-utilization {options.gpu_memory_utilization}: expected more than 0, at most 1")
    batched = options.max_num_batched_tokens
    batched = gpu.default_batched_tokens if batched is None else batched
    for name, value in (("max_num_seqs", options.max_num_seqs), ("max_num_batched_tokens", batched)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if options.assume not in ("config", "nvfp4"):
        raise ValueError(f"assume is {options.assume!r}; expected 'config' or 'nvfp4'")
    return replace(options, context=context, max_num_batched_tokens=batched)


def _num_mtp(config: Any, formats: Mapping[str, Format] | None) -> int:
    """MTP layers of the checkpoint, or those that the configuration declares."""
    if formats is not None:
        return len({name.split(".")[1] for name in formats if name.startswith("mtp.")})
    return int(getattr(config, "num_nextn_predict_layers", 0) or 0)


def _load(options: PlanOptions, layout: Layout) -> Load:
    """A rank's share of what was asked."""
    assert options.context is not None  # _resolved has set it
    assert options.max_num_batched_tokens is not None  # likewise
    return Load(options.context, options.max_num_batched_tokens, math.ceil(options.max_num_seqs / layout.dp))


def _try_layouts(config: Any, gpu: Gpu, options: PlanOptions, table: Table, made: list[kv_cache.Group]) -> list[Fit]:
    """Every layout on 1, 2, 4, ... GPUs, up to the first number on which one fits."""
    tried: list[Fit] = []
    num_gpus = 1
    while num_gpus <= options.max_gpus and not any(fit.fits for fit in tried):
        layouts = candidates(config, num_gpus, gpu.nvlink_domain)
        tried += [_evaluate(config, gpu, options, layout, table, made) for layout in layouts]
        num_gpus *= 2
    return tried


def _evaluate(
    config: Any, gpu: Gpu, options: PlanOptions, layout: Layout, table: Table, made: list[kv_cache.Group]
) -> Fit:
    """One layout: the stage with the fewest KV blocks decides, as vLLM gives all ranks the smallest number."""
    load = _load(options, layout)
    items = tuple(workspaces(config, layout, load, made))
    budget = int(gpu.total_bytes * options.gpu_memory_utilization)
    beside = sum(w.bytes for w in items if not w.after_kv)
    batches = layout.pp + (1 if options.async_scheduling else 0)
    found: list[tuple[int, int, dict[str, int], KvPlan]] = []
    ranges = layout.stages(config.num_hidden_layers)
    for i, weights in enumerate(table.stages(layout)):
        # MTP layers are numbered behind the last one.
        layers = range(ranges[i].start, ranges[i].stop + (1000 if i == layout.pp - 1 else 0))
        left = budget - sum(weights.values()) - beside
        available = left if options.kv_cache_bytes is None else options.kv_cache_bytes
        kv = kv_cache.plan_kv(made, available, load.context, load.batched_tokens, batches, layers)
        found.append((kv.num_blocks, left, weights, kv))
    _, left, weights, kv = min(found, key=lambda stage: stage[:2])
    problems, shortfall = _problems(gpu, options, items, left, kv, load)
    return Fit(
        layout=layout,
        label=layout.label,
        flags=layout.flags,
        num_gpus=layout.num_gpus,
        weights=weights,
        workspaces=items,
        kv=kv,
        budget_bytes=budget,
        concurrent_requests=kv.concurrent_requests * layout.dp,
        problems=tuple(problems),
        shortfall_bytes=shortfall,
    )


def _problems(
    gpu: Gpu, options: PlanOptions, items: tuple[Workspace, ...], left: int, kv: KvPlan, load: Load
) -> tuple[list[str], int]:
    """Why a layout does not fit, and the bytes that the worst reason lacks on each GPU."""
    reasons: list[tuple[int, str]] = []
    fixed_need = 0 if options.kv_cache_bytes is None else options.kv_cache_bytes
    if left < fixed_need:
        reasons.append((fixed_need - left, "weights and workspaces do not leave room for a KV cache"))
    elif kv.available_bytes < kv.startup_bytes:
        text = (
            f"vLLM would not start: it reserves {gib(kv.startup_bytes)} of KV cache for one request of {load.context} "
            f"tokens with {load.batched_tokens} batched tokens; lower --max-num-batched-tokens or --max-model-len"
        )
        reasons.append((kv.startup_bytes - kv.available_bytes, text))
    elif kv.concurrent_requests < load.max_num_seqs:
        text = (
            f"{kv.concurrent_requests} of {load.max_num_seqs} requests of {load.context} tokens fit at once on a rank"
        )
        reasons.append((kv.bytes_for(load.max_num_seqs) - kv.available_bytes, text))
    late, free = sum(w.bytes for w in items if w.after_kv), int(gpu.total_bytes * (1 - options.gpu_memory_utilization))
    if late > free:
        text = f"{gib(late)} of tables are made after the KV cache, and --gpu-memory-utilization leaves {gib(free)}"
        reasons.append((late - free, text))
    texts = [f"{text} ({gib(lack)} a GPU missing)" for lack, text in reasons]
    return texts, max((lack for lack, _ in reasons), default=0)


def gib(num_bytes: int) -> str:
    """Bytes in words."""
    return f"{num_bytes / gpus.GIB:.1f} GiB"
