"""`--plot`: memory of one GPU stacked by class, and what the global scales imply, layer by layer; without a display."""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vllm_nvfp4.doctor.examine import Report
from vllm_nvfp4.doctor.plan import Fit, Plan
from vllm_nvfp4.doctor.report import scale_rows

TITLES = {
    "input_scale": "activations: amax that input_scale implies",
    "weight_scale_2": "weights: amax that weight_scale_2 implies",
}


def draw(report: Report, path: Path) -> None:
    """Write the picture.

    Raises: OSError - the file cannot be written; ValueError - its ending names no picture format.
    """
    figure = Figure(figsize=(11, 13), layout="constrained")
    FigureCanvasAgg(figure)
    memory, inputs, weights = figure.subplots(3, 1)
    figure.suptitle(f"{Path(report.path).name or report.path}: {report.verdict}")
    _memory(memory, report.plan)
    rows = scale_rows(report)
    for axes, leaf in ((inputs, "input_scale"), (weights, "weight_scale_2")):
        _scales(axes, [row for row in rows if row["leaf"] == leaf], TITLES[leaf])
    figure.savefig(path, dpi=100)


def _memory(axes: Axes, plan: Plan | None) -> None:
    """A bar for the layout asked for, and one for the recommended one."""
    axes.set_title("memory of one GPU, GiB")
    if plan is None:
        axes.text(0.5, 0.5, "no plan: config.json is not usable", ha="center")
        return
    fits = [("asked", plan.fit)] + ([("recommended", plan.recommended)] if plan.recommended else [])
    labels = [f"{name}: {fit.label} on {fit.num_gpus} x {plan.gpu.name}" for name, fit in fits]
    bottoms = [0.0] * len(fits)
    for part in dict.fromkeys(name for _, fit in fits for name in _parts(fit)):
        sizes = [_parts(fit).get(part, 0) / 2**30 for _, fit in fits]
        axes.barh(labels, sizes, left=bottoms, label=part)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    axes.axvline(plan.gpu.total_bytes / 2**30, color="black", linestyle="--", label="the GPU")
    axes.axvline(plan.fit.budget_bytes / 2**30, color="grey", linestyle=":", label="vLLM's budget")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _parts(fit: Fit) -> dict[str, int]:
    """Bytes by what they are for: weights by class, workspaces, KV cache."""
    parts = {name.replace("_", " "): size for name, size in fit.weights.items() if size}
    parts["workspaces"] = fit.workspace_bytes
    parts["KV cache"] = max(fit.kv.available_bytes, 0)
    parts["tables made after it"] = fit.after_kv_bytes
    return parts


def _scales(axes: Axes, rows: list[dict], title: str) -> None:
    """Median of each class by layer, and the range over its experts."""
    axes.set_title(title)
    axes.set_xlabel("layer (MTP layers last)")
    if not rows:
        axes.text(0.5, 0.5, "no NVFP4 scales were read", ha="center")
        return
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for cls in dict.fromkeys(row["class"] for row in rows):
        of_class = [row for row in rows if row["class"] == cls]
        layers = [row["layer"] for row in of_class]
        (line,) = axes.plot(layers, [row["amax_median"] for row in of_class], marker=".", label=cls)
        if any(row["count"] > 1 for row in of_class):
            low, high = ([row[key] for row in of_class] for key in ("amax_min", "amax_max"))
            axes.fill_between(layers, low, high, alpha=0.2, color=line.get_color())
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
