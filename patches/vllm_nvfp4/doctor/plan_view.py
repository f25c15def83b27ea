"""A plan as rich text for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_nvfp4.doctor.plan import Fit, Plan, gib


def view(plan: Plan) -> Group:
    """The verdict, memory of one GPU by class, KV cache, and the recommendation."""
    parts: list[RenderableType] = [_verdict(plan), _memory(plan, plan.fit), _kv(plan.fit), _recommendation(plan)]
    parts += [Text(f"hint: {hint}") for hint in plan.hints]
    if plan.assumptions:
        parts.append(Text("assumed: " + "; ".join(plan.assumptions), style="dim"))
    return Group(*parts)


def _verdict(plan: Plan) -> Text:
    fit = plan.fit
    text = Text(f"{fit.label} on {fit.num_gpus} x {plan.gpu.name.upper()}: ", style="bold")
    text.append("fits" if fit.fits else "does not fit", style="green" if fit.fits else "red")
    for problem in fit.problems:
        text.append(f"\n  {problem}")
    return text


def _memory(plan: Plan, fit: Fit) -> Table:
    """Bytes of one GPU, and what they are of the whole."""
    table = Table(title=f"Memory of one GPU ({gib(plan.gpu.total_bytes)} usable, budget {gib(fit.budget_bytes)})")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    table.add_column("how known")
    for name, size in fit.weights.items():
        if size:
            table.add_row(name.replace("_", " "), f"{size / 2**30:.2f}", "weights")
    for item in fit.workspaces:
        how = "exact" if item.exact else "estimate"
        table.add_row(item.name, f"{item.bytes / 2**30:.2f}", how + (", beside the budget" if item.after_kv else ""))
    table.add_section()
    table.add_row("left for KV cache", f"{fit.kv.available_bytes / 2**30:.2f}", "the rest")
    return table


def _kv(fit: Fit) -> Table:
    kv = fit.kv
    table = Table(title=f"KV cache at {kv.context} tokens a request, one rank", show_header=False)
    rows = [
        ("blocks", f"{kv.num_blocks} of {kv.block_bytes} B"),
        ("a token of a long context", f"{kv.bytes_per_token:.0f} B"),
        ("a decoding request", gib(kv.request_bytes)),
        ("one request, to start at all", gib(kv.startup_bytes)),
        ("requests at once", f"{kv.concurrent_requests} a rank, {fit.concurrent_requests} in all"),
        ("vLLM's log will say", f"{kv.reported_tokens} tokens, concurrency {kv.reported_concurrency:.2f}x"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _recommendation(plan: Plan) -> Text:
    best = plan.recommended
    if best is None:
        closest = min(plan.candidates, key=lambda fit: fit.shortfall_bytes, default=None)
        why = f": closest is {closest.label}: {'; '.join(closest.problems)}" if closest else ""
        return Text(f"no layout on up to {plan.options.max_gpus} GPUs fits{why}", style="red")
    flags = f" ({best.flags})" if best.flags else ""
    text = Text(f"recommended: {best.label} on {best.num_gpus} x {plan.gpu.name.upper()}{flags}, ", style="bold")
    return text.append(f"{best.concurrent_requests} requests of {best.kv.context} tokens at once")
