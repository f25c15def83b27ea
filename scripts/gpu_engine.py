"""One engine on a GPU, measured from the start of its process: `python scripts/gpu_engine.py --model DIR --out FILE.json`.

vLLM in this process with its default compilation and CUDA graphs, NVFP4_STRICT=1, contexts of 4096. Then, in this order:

    before      8 requests of mixed lengths, one after the other; nothing was served before
    mixed       200 requests of drawn lengths, up to 16 at a time
    after       the 8 again, one after the other
    together    the 8 again, at once

Reported are the phases of the start, p50 and p99 of the time to the first token and of the time per output token in each of
these, kernels that were compiled or loaded meanwhile (none should be), how far answers of `together` and `after` are from
those of `before` (and these from an earlier run's, `--against`: of vLLM's own kernels, say, or without graphs), memory
against `nvfp4 doctor`'s plan, and what serves which module. Prefix caching is off: it would answer `after` and `together`
from memory. Times are the client's: from add_request to the end of the step that gave the token.

FILE.json is written again after each part. A part that fails is in it with its message, and the others go on; the exit code
is 1 then, or if one of the checks in `checks` is false.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("before", "mixed", "after", "together")
# Prompts of the 8, as shares of --max-prompt: from one token to the longest.
SHARES = (0.0, 0.005, 0.03, 0.09, 0.2, 0.4, 0.7, 1.0)
MIXED_OUTPUT_TOKENS = (8, 32)
FIRST_TOKEN_ID = 16
POLL_S = 0.02
# Requests side by side are summed in other orders, and of random weights the best tokens are near each other: another token
# is no error if its log-probability was so near the best one's.
NEAR_TIE, NUM_LOGPROBS = 0.5, 5
# By vLLM's names of parameters, first match; the plan's classes, found without the plan's own table.
CLASSES = (
    ("routed_experts", r"\.experts\."),
    ("shared_experts", r"\.shared_experts\."),
    ("embeddings_head", r"embed_tokens|lm_head"),
    ("compressor_indexer", r"\.(compressor|indexer)\."),
    ("wo_a", r"\.wo_a\."),
    ("attention", r"\.(fused_wqa_wkv|wq_b|wo_b)\."),
    ("router_norms_hc", r"norm\.weight|\.gate\.|attn_sink|hc_"),
)
PLAN_TOLERANCE = 0.05
# Rows that must be as planned, and the plan's workspaces that torch's allocator does not see.
CHECKED = ("weights", "torch's peak while serving", "device used")
OUTSIDE_TORCH = ("CUDA context", "NCCL and all-to-all")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Start one engine, serve, and measure.")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--requests", type=int, default=200, help="mixed requests")
    parser.add_argument("--at-once", type=int, default=16, help="mixed requests at a time")
    parser.add_argument("--output-tokens", type=int, default=24, help="of each of the 8")
    parser.add_argument("--max-prompt", type=int, default=1500, help="tokens of the longest prompt")
    parser.add_argument("--mixed-seconds", type=float, default=40.0, help="no mixed request begins after this long")
    parser.add_argument("--max-model-len", type=int, default=4096, help="as vLLM's flag")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="as vLLM's flag")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5, help="as vLLM's flag")
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=int,
        help="as vLLM's flag: on a GPU with other work; memory is not compared then",
    )
    parser.add_argument(
        "--cudagraph-mode", default="FULL_AND_PIECEWISE", help="vLLM's compilation_config.cudagraph_mode"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths")
    parser.add_argument("--against", type=Path, help="FILE.json of an earlier run of the same requests")
    parser.add_argument(
        "--cpu-rehearsal", action="store_true", help="run this script's logic on a CPU; memory is not compared"
    )
    return parser.parse_args(argv)


# ---- requests -------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A prompt and what became of it; times are time.perf_counter()'s."""

    prompt: list[int]
    max_tokens: int
    logprobs: bool
    added_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    # Of each token the best tokens' log-probabilities, itself first.
    best: list[dict[int, float]] = field(default_factory=list)

    @property
    def chosen(self) -> list[float]:
        """Log-probabilities of the tokens, if they were asked for."""
        return [best[token] for best, token in zip(self.best, self.tokens, strict=True)] if self.logprobs else []

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return (self.first_s - self.added_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token behind the first; None if there is only one."""
        return (self.last_s - self.first_s) * 1e3 / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


def eight(vocab: int, max_prompt: int, seed: int, output_tokens: int = 24) -> list[Request]:
    """The requests of before, after and together."""
    draw = random.Random(seed)
    lengths = [max(1, round(share * max_prompt)) for share in SHARES]
    return [Request(draw.choices(range(FIRST_TOKEN_ID, vocab), k=n), output_tokens, True) for n in lengths]


def mixed(vocab: int, max_prompt: int, number: int, seed: int) -> list[Request]:
    """Requests of drawn lengths."""
    draw = random.Random(seed + 1)
    return [
        Request(
            draw.choices(range(FIRST_TOKEN_ID, vocab), k=draw.randint(1, max_prompt)),
            draw.randint(*MIXED_OUTPUT_TOKENS),
            False,
        )
        for _ in range(number)
    ]


def serve(engine: Any, requests: list[Request], at_once: int, label: str, limit_s: float = math.inf) -> list[Request]:
    """Ask `at_once` requests at a time until all are answered, or until `limit_s` those that had begun; returns these."""
    from vllm import SamplingParams

    begun, running = 0, dict[str, Request]()
    deadline = time.perf_counter() + limit_s
    while running or (begun < len(requests) and time.perf_counter() < deadline):
        while len(running) < at_once and begun < len(requests) and time.perf_counter() < deadline:
            request, name = requests[begun], f"{label}-{begun}"
            # Logits of random weights may name tokens that the tokenizer does not have.
            params = SamplingParams(
                temperature=0, max_tokens=request.max_tokens, ignore_eos=True, detokenize=False,
                logprobs=NUM_LOGPROBS if request.logprobs else None,
            )  # fmt: skip
            request.added_s = time.perf_counter()
            engine.add_request(name, {"prompt_token_ids": request.prompt}, params)
            running[name] = request
            begun += 1
        for output in engine.step():
            _note(running[output.request_id], output.outputs[0], time.perf_counter())
            if output.finished:
                del running[output.request_id]
    wrong = [i for i, r in enumerate(requests[:begun]) if len(r.tokens) != r.max_tokens]
    if wrong:
        raise RuntimeError(f"{label}: requests {wrong} did not get the number of tokens that they asked for")
    return requests[:begun]


def _note(request: Request, answer: Any, now: float) -> None:
    """What a step has added to a request: answers are cumulative."""
    if len(answer.token_ids) > len(request.tokens):
        request.first_s = request.first_s or now
        request.last_s = now
    request.tokens = list(answer.token_ids)
    if request.logprobs:
        request.best = [{token: found.logprob for token, found in row.items()} for row in answer.logprobs]


def percentile(values: list[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of all do not exceed; None of none."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


def times(requests: list[Request], seconds: float) -> dict[str, Any]:
    """Latencies of a phase in milliseconds, and tokens."""
    ttft = [r.ttft_ms for r in requests]
    tpot = [r.tpot_ms for r in requests if r.tpot_ms is not None]
    columns = {f"{n}_p{p}": percentile(v, p) for n, v in (("ttft_ms", ttft), ("tpot_ms", tpot)) for p in (50, 99)}
    return {
        "requests": len(requests), "seconds": seconds, **columns,
        "prompt_tokens": sum(len(r.prompt) for r in requests), "output_tokens": sum(len(r.tokens) for r in requests),
        "each": [{"prompt": len(r.prompt), "output": len(r.tokens), "ttft_ms": r.ttft_ms, "tpot_ms": r.tpot_ms}
                 for r in requests],
    }  # fmt: skip


def compare(one: list[Request], other: list[Request]) -> dict[str, Any]:
    """Answers of the same prompts: differences, where the first is, and how far log-probabilities are up to there.

    `gap` is how much less likely than its own the other's first different token was, by either's numbers; infinite if it was
    not among the best. Behind a request's first difference its context differs, so that nothing there can be compared.
    """
    rows: list[dict[str, Any]] = []
    for a, b in zip(one, other, strict=True):
        pairs = list(zip(a.tokens, b.tokens, strict=True))
        first = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        distances = [abs(x - y) for x, y in zip(a.chosen[:first], b.chosen[:first], strict=True)]
        gap = 0.0
        if first is not None:
            x, y = pairs[first]
            gap = max(
                a.best[first][x] - a.best[first].get(y, -math.inf), b.best[first][y] - b.best[first].get(x, -math.inf)
            )
        if not all(map(math.isfinite, a.chosen + b.chosen)):  # max() would lose a NaN
            distances = [math.inf]
        rows.append({
            "prompt": len(a.prompt), "differences": sum(x != y for x, y in pairs), "first": first,
            "logprob": max(distances, default=0.0), "gap": gap,
        })  # fmt: skip
    return {
        "requests": len(rows), "tokens": sum(len(r.tokens) for r in one),
        "different_requests": sum(row["first"] is not None for row in rows),
        "different_tokens": sum(row["differences"] for row in rows),
        "first_difference": min((row["first"] for row in rows if row["first"] is not None), default=None),
        "largest_logprob_distance": max(row["logprob"] for row in rows),
        "largest_gap": max(row["gap"] for row in rows), "each": rows,
    }  # fmt: skip


def answers_of(path: Path, requests: list[Request]) -> list[Request]:
    """The answers that an earlier run has written for these requests; ValueError if it had others."""
    found = json.loads(path.read_text())["answers"]
    if [row["prompt"] for row in found] != [request.prompt for request in requests]:
        raise ValueError(f"{path} has answers to other requests; run it with the same --seed, --max-prompt and model")
    return [
        Request(
            row["prompt"], len(row["tokens"]), True, tokens=row["tokens"], best=[dict(best) for best in row["best"]]
        )
        for row in found
    ]


# ---- the start ------------------------------------------------------------------------------------------------------


def process_started_s() -> float:
    """When this process began, on time.monotonic()'s clock: before Python could look at it."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


class Phases(threading.Thread):
    """Reads the status file while the engine starts; phases shorter than POLL_S may be missed."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self.path, self.begun, self.stopping = path, dict[float, str](), threading.Event()

    def run(self) -> None:
        """Until `seconds` is called."""
        from vllm_nvfp4 import status

        while not self.stopping.wait(POLL_S):
            for state in status.read_all(self.path):
                self.begun.setdefault(state.phase_started_monotonic_s, state.phase)

    def seconds(self, started_s: float, ready_s: float) -> list[dict[str, Any]]:
        """[{phase, at_s since the process began, seconds}], and the end of watching."""
        self.stopping.set()
        self.join()
        begun = [(started_s, "python and imports"), *sorted(self.begun.items()), (ready_s, "ready")]
        begun = [entry for entry in begun if entry[0] >= started_s]  # the file may be an earlier engine's
        return [
            {"phase": phase, "at_s": at - started_s, "seconds": until - at}
            for (at, phase), (until, _) in itertools.pairwise(begun)
        ]


class Loaded:
    """What the load of weights left behind: taken when parameters are complete and nothing is packed yet."""

    def __init__(self) -> None:
        self.weights: dict[str, int] = {}

    def watch(self) -> None:
        """Have the overlay's loader tell."""
        from vllm_nvfp4.model_loader import Nvfp4ModelLoader

        load = Nvfp4ModelLoader.load_weights

        def watched(loader: Any, model: Any, model_config: Any) -> None:
            load(loader, model, model_config)
            self.weights = weights_of(model)

        setattr(Nvfp4ModelLoader, "load_weights", watched)  # noqa: B010 - mypy refuses the assignment


def weights_of(model: Any) -> dict[str, int]:
    """Bytes of storage by class; a storage that two parameters share counts once."""
    sizes, seen = {name: 0 for name, _ in CLASSES}, set()
    for name, parameter in model.named_parameters():
        storage = parameter.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes[next((cls for cls, pattern in CLASSES if re.search(pattern, name)), f"unknown: {name}")] += (
                storage.nbytes()
            )
    return sizes


class Compilations:
    """Counts kernels that come while serving: ours by cutedsl's counters, DeepGEMM's by what it leaves in its cache, as it
    compiles with nvcc and tells nobody, all others by vLLM's monitor.
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()

    def watch(self) -> None:
        """Have vLLM's monitor tell here too; it looks its handler up at each event."""
        from vllm.utils import jit_monitor

        handle = jit_monitor._handle_jit_event

        def counted(*, backend: str, event: str, fn_name: str, detail: str | None = None) -> None:
            self.events[f"{backend} {event}: {fn_name}"] += 1
            handle(backend=backend, event=event, fn_name=fn_name, detail=detail)

        jit_monitor._handle_jit_event = counted

    def now(self) -> dict[str, int]:
        """Everything so far."""
        from cutedsl import compile as compiler

        ours = compiler.counters()
        cache = os.environ.get("DG_JIT_CACHE_DIR")  # set by vLLM when it imports DeepGEMM
        deep_gemm = sum(1 for _ in Path(cache).rglob("kernel.*")) if cache else 0
        counts = {"ours_compiled": ours.compilations, "ours_loaded": ours.loaded}
        return counts | {"deep_gemm": deep_gemm, "others": self.events.total()}


# ---- the parts ------------------------------------------------------------------------------------------------------


class Run:
    """One engine and what was found of it; every method is a part that may fail without the others."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.found: dict[str, Any] = {"command": sys.argv, "failed": {}, "phases": {}, "checks": {}}
        self.compilations, self.loaded = Compilations(), Loaded()
        self.answers: dict[str, list[Request]] = {}
        self.engine: Any = None

    def part(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Do a part, record its time or its failure, write the file; None if it failed."""
        begun = time.perf_counter()
        try:
            return call(*arguments)
        except Exception as error:
            traceback.print_exc()
            self.found["failed"][name] = f"{type(error).__name__}: {error}"
            return None
        finally:
            self.found.setdefault("part_seconds", {})[name] = time.perf_counter() - begun
            self.args.out.write_text(json.dumps(self.found, indent=1) + "\n")

    def machine(self) -> None:
        """GPU, driver, versions, commit."""
        import torch
        import vllm

        self.found |= {"commit": os.environ.get("COMMIT", "unknown"), "model": str(self.args.model)}
        self.found |= {
            "date": time.strftime("%FT%TZ", time.gmtime()),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        }
        self.found["env"] = {n: v for n, v in sorted(os.environ.items()) if n.startswith(("NVFP4_", "VLLM_"))}
        self.found["cpus"] = len(os.sched_getaffinity(0))
        if torch.cuda.is_available():
            from vllm.third_party import pynvml

            self.found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
            pynvml.nvmlInit()
            self.found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())

    def start(self) -> None:
        """The engine, and the seconds until it is ready by phase."""
        started = process_started_s()
        phases = Phases(os.environ["NVFP4_STATUS_FILE"])
        phases.start()
        from vllm import LLM

        self.loaded.watch()
        self.compilations.watch()
        arguments: dict[str, Any] = {"distributed_executor_backend": "uni"}
        if not self.args.cpu_rehearsal:
            arguments["gpu_memory_utilization"] = self.args.gpu_memory_utilization
            arguments["kv_cache_memory_bytes"] = self.args.kv_cache_memory_bytes
            arguments["compilation_config"] = {"cudagraph_mode": self.args.cudagraph_mode}
        llm = LLM(
            model=str(self.args.model), max_model_len=self.args.max_model_len, max_num_seqs=self.args.max_num_seqs,
            enable_prefix_caching=False, disable_log_stats=False, seed=self.args.seed, **arguments,
        )  # fmt: skip
        ready = time.monotonic()
        self.engine = llm.llm_engine
        config = self.engine.vllm_config
        self.found["start"] = {
            "ready_s": ready - started, "phases": phases.seconds(started, ready),
            "compilation_s": config.compilation_config.compilation_time,
        }  # fmt: skip
        self.found["engine"] = {
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "compilation_mode": str(config.compilation_config.mode), "enforce_eager": config.model_config.enforce_eager,
            "capture_sizes": config.compilation_config.cudagraph_capture_sizes,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": config.scheduler_config.async_scheduling,
        }  # fmt: skip
        self.found["compiled_in_start"] = self.compilations.now()

    def selection(self) -> None:
        """What serves the modules."""
        from vllm_nvfp4 import platform, selection

        rows = sorted(selection.summary().items())
        self.found["selection"] = [{"kind": k, "served_by": by, "fallback": f, "modules": n} for (k, by, f), n in rows]
        self.found["activations"] = platform.activations()
        self.found["checks"]["no fallbacks"] = bool(rows) and not any(fallback for (_, _, fallback), _ in rows)

    def phase(self, name: str, requests: list[Request], at_once: int, limit_s: float = math.inf) -> None:
        """Serve requests and take their times."""
        before, begun = self.compilations.now(), time.perf_counter()
        try:
            self.answers[name] = serve(self.engine, requests, at_once, name, limit_s)
        finally:
            if self.engine.has_unfinished_requests():  # of a phase that failed: the next must not wait for them
                self.engine.abort_request([f"{name}-{i}" for i in range(len(requests))])
        found = times(self.answers[name], time.perf_counter() - begun)
        after = self.compilations.now()
        found["compiled"] = {kind: after[kind] - before[kind] for kind in after}
        self.found["phases"][name] = found | {"asked": len(requests)}

    def monitor(self) -> None:
        """Whether all was served and nothing was compiled or loaded meanwhile, and whether vLLM's monitor was watching."""
        from vllm.utils import jit_monitor

        total, phases = Counter[str](), self.found["phases"].values()
        for phase in phases:
            total.update(phase["compiled"])
        answered = len(phases) == len(PHASES) and all(phase["requests"] == phase["asked"] for phase in phases)
        self.found["checks"]["every request answered"] = answered
        self.found["compiled"] = dict(total) | {
            "monitor_active": jit_monitor.is_active(),
            "events": dict(self.compilations.events),
        }
        self.found["checks"]["nothing compiled while serving"] = not total.total()
        if not self.args.cpu_rehearsal:  # vLLM watches on GPUs only
            self.found["checks"]["vLLM's JIT monitor is on"] = jit_monitor.is_active()

    def compare(self, name: str, one: str, other: str) -> None:
        """Answers of two phases."""
        self.found[name] = compare(self.answers[one], self.answers[other])
        if name == "alone_together":
            far = max(self.found[name]["largest_gap"], self.found[name]["largest_logprob_distance"])
            self.found["checks"]["alone equals together, but for near ties"] = far < NEAR_TIE
            self.found["checks"]["log-probabilities are finite"] = math.isfinite(
                self.found[name]["largest_logprob_distance"]
            )

    def against(self) -> None:
        """Answers of `before`, written for others, and compared with those of an earlier run."""
        before = self.answers["before"]
        self.found["answers"] = [
            {"prompt": r.prompt, "tokens": r.tokens, "best": [list(best.items()) for best in r.best]} for r in before
        ]
        if self.args.against:
            self.found["against"] = compare(answers_of(self.args.against, before), before)

    def memory(self) -> None:
        """Weights, KV cache and the rest in bytes, measured and planned."""
        from vllm_nvfp4.doctor.examine import Options, examine

        found = self.found["memory"] = {"weights": self.loaded.weights}
        report = examine(str(self.args.model), Options(plan=self._plan_options(), asked=True))
        found["doctor"] = {"verdict": report.verdict, "findings": sorted({f.code for f in report.findings})}
        if report.plan is None:
            raise RuntimeError(f"the doctor made no plan: {found['doctor']}")
        fit, weights = report.plan.fit, self.loaded.weights
        found["workspaces"] = {w.name: w.bytes for w in fit.workspaces}
        rows = [(f"weights: {cls}", weights.get(cls, 0), size) for cls, size in fit.weights.items()]
        rows += [(f"weights: {cls}", size, 0) for cls, size in weights.items() if cls not in fit.weights]
        rows.append(("weights", sum(weights.values()), fit.weights_bytes))
        if not self.args.cpu_rehearsal:
            rows += self._device_rows(fit, report.plan.gpu.total_bytes)
        found["against_plan"] = [
            {"what": n, "measured": m, "planned": p, "percent_off": (m / p - 1) * 100 if p else None}
            for n, m, p in rows
            if m or p
        ]
        for row in found["against_plan"]:
            if row["what"] in CHECKED:
                good = abs(row["measured"] - row["planned"]) <= PLAN_TOLERANCE * row["planned"]
                self.found["checks"][f"{row['what']} as planned"] = good

    def _plan_options(self) -> Any:
        """The doctor's options that mean what this engine was started with; for a rehearsal an H200's."""
        import torch
        from vllm_nvfp4.doctor.gpus import GPUS
        from vllm_nvfp4.doctor.plan import PlanOptions

        name = "h200" if self.args.cpu_rehearsal else torch.cuda.get_device_name()
        gpu = next((known for known in GPUS if known in name.lower().split()), None)
        if gpu is None:
            raise RuntimeError(f"the plan does not know {name}; expected one of {', '.join(GPUS)}")
        scheduler = self.engine.vllm_config.scheduler_config
        return PlanOptions(
            gpu=gpu, context=self.args.max_model_len, max_num_seqs=self.args.max_num_seqs,
            gpu_memory_utilization=self.args.gpu_memory_utilization, async_scheduling=bool(scheduler.async_scheduling),
            max_num_batched_tokens=scheduler.max_num_batched_tokens, wo_a_nvfp4=os.environ.get("NVFP4_WO_A") == "1",
        )  # fmt: skip

    def _device_rows(self, fit: Any, device_bytes: int) -> list[tuple[str, int, int]]:
        """(what, measured, planned) of the device: vLLM fills its budget with KV cache, so the rows beside it say more."""
        import torch

        free, total = torch.cuda.mem_get_info()
        peak, loaded = torch.cuda.max_memory_allocated(), self._runner().model_memory_usage
        caches = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._runner().kv_caches}
        kv, planned_kv = sum(caches.values()), fit.kv.num_blocks * fit.kv.block_bytes
        beside, weights = fit.workspace_bytes + fit.after_kv_bytes, sum(self.loaded.weights.values())
        outside = sum(w.bytes for w in fit.workspaces if w.name in OUTSIDE_TORCH)
        planned = fit.weights_bytes + planned_kv + beside
        self.found["memory"] |= {"torch_reserved_peak": torch.cuda.max_memory_reserved()}
        return [
            ("after load, by vLLM", loaded, fit.weights_bytes),
            ("KV cache", kv, planned_kv),
            ("beside weights and KV cache", total - free - kv - weights, beside),
            ("torch's peak while serving", peak, planned - outside),
            ("device used", total - free, planned),
            ("device total", total, device_bytes),
        ]

    def _runner(self) -> Any:
        return self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def all(self) -> None:
        """Every part, in order."""
        self.part("start", self.start)
        self.part("machine", self.machine)
        if self.engine is None:
            return
        self.part("selection", self.selection)
        args, vocab = self.args, self.engine.model_config.get_vocab_size()
        for name, at_once in zip(PHASES, (1, args.at_once, 1, len(SHARES)), strict=True):
            requests = eight(vocab, args.max_prompt, args.seed, args.output_tokens)
            if name == "mixed":
                requests = mixed(vocab, args.max_prompt, args.requests, args.seed)
            self.part(name, self.phase, name, requests, at_once, args.mixed_seconds if name == "mixed" else math.inf)
        self.part("monitor", self.monitor)
        self.part("alone_together", self.compare, "alone_together", "before", "together")
        self.part("before_after", self.compare, "before_after", "before", "after")
        self.part("against", self.against)
        if not args.kv_cache_memory_bytes:
            self.part("memory", self.memory)
        self.found["total_s"] = time.monotonic() - process_started_s()
        self.part("table", lambda: print("\n".join(table(self.found))))


def table(found: dict[str, Any]) -> list[str]:
    """What was found, for people."""
    head = [f"{found.get(n, '?')}" for n in ("gpu", "driver", "vllm", "commit", "model", "activations")]
    lines = ["", " | ".join(head)]
    if start := found.get("start"):
        lines.append(
            f"ready after {start['ready_s']:.1f} s: "
            + ", ".join(f"{p['phase']} {p['seconds']:.1f}" for p in start["phases"])
        )
        lines.append(", ".join(f"{name} {value}" for name, value in found["engine"].items() if name != "capture_sizes"))
    columns = ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99")
    lines.append(f"{'phase':10}{'requests':>9}{'s':>7}" + "".join(f"{c:>13}" for c in columns) + f"{'compiled':>10}")
    for name, phase in found["phases"].items():
        values = "".join(f"{'-' if phase[c] is None else f'{phase[c]:.2f}':>13}" for c in columns)
        asked = f"{phase['requests']}/{phase['asked']}"
        lines.append(f"{name:10}{asked:>9}{phase['seconds']:7.1f}{values}{sum(phase['compiled'].values()):10}")
    for name in ("alone_together", "before_after", "against"):
        if c := found.get(name):
            where = f"in {c['different_requests']} of {c['requests']} requests, first at {c['first_difference']}"
            near = f"log-probabilities within {c['largest_logprob_distance']:.4f}, gap {c['largest_gap']:.4f}"
            lines.append(f"{name}: {c['different_tokens']} of {c['tokens']} tokens differ {where}; {near}")
    for row in found.get("memory", {}).get("against_plan", []):
        off = "-" if row["percent_off"] is None else f"{row['percent_off']:+.1f} %"
        lines.append(
            f"{row['what']:40}{row['measured'] / 1e9:10.3f} GB, planned {row['planned'] / 1e9:10.3f} GB {off:>10}"
        )
    lines += [f"{row['modules']:4} {row['kind']} by {row['served_by']}" for row in found.get("selection", [])]
    lines += [f"{'ok' if good else 'NOT OK':6} {name}" for name, good in found["checks"].items()]
    lines += [f"FAILED {name}: {message[:400]}" for name, message in found["failed"].items()]
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run everything: 0 all parts done and all checks true, 1 otherwise."""
    args = options(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("NVFP4_STRICT", "1")
    if args.cpu_rehearsal:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("NVFP4_STATUS_FILE", str(Path(folder) / "status"))
        run = Run(args)
        run.all()
    args.out.write_text(json.dumps(run.found, indent=1) + "\n")
    return 0 if not run.found["failed"] and all(run.found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
