"""TileLang's kernels of DeepSeek-V4 (hyper-connections) compiled ahead of time, where there is no GPU.

    python -m vllm_nvfp4.tilelang_build --out DIR [--model NAME_OR_CONFIG,...] [--arch ARCH,...] [--jobs N] [--require]

vLLM compiles them when a server starts, one behind the other: one for each way to split the reduction, some 45 a model. The
Dockerfile copies and runs this file alone, so that a change to the rest of our code does not compile them again.

The hard part is that TileLang must find them on the GPU. The name of a kernel in its cache is a hash of the kernel's TIR, of
the target as text, of pass options and of TileLang's version. Three of these vLLM and TileLang read from the GPU: the
target, the number of SMs (which splits there are) and whether kernels may overlap (PDL, part of the TIR). Here they are said
instead, in processes of their own: TILELANG_DEFAULT_TARGET, `torch.cuda.get_device_properties` and a stand-in for vLLM's
platform. What vLLM would ask for is asked of vLLM's own kernels, with the arguments of its model's constructor. A kernel
that is missed, or whose name differs, costs the time to compile it at start and nothing else; `tilelang_set` counts those.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

SizesT = TypeVar("SizesT")

RECORD = "built.json"
# Steps with more tokens than every SM has a tile of 64 for are not split, however many they are.
MAX_TOKENS = 64 * 256
# What DeepseekV4DecoderLayer sets itself: no field of config.json.
POST_ALPHA = 2.0
# arch -> SMs of the GPUs that we deploy on: H100 and H200 (SXM), B200.
NUM_SMS = {"sm_90a": 132, "sm_100a": 148}


@dataclass(frozen=True)
class Sizes:
    """What the kernels depend on, in the spelling of config.json."""

    hidden_size: int
    hc_mult: int
    rms_norm_eps: float
    hc_eps: float
    hc_sinkhorn_iters: int


# Source: config.json of the published models, see tests/data/configs/README.md.
MODELS = {
    "deepseek-v4-pro": Sizes(7168, 4, 1e-6, 1e-6, 20),
    "deepseek-v4-flash": Sizes(4096, 4, 1e-6, 1e-6, 20),
}


def find_sizes(name: str, published: Mapping[str, SizesT]) -> SizesT:
    """Those of a published model, or of a config.json in the same dataclass.

    Raises: ValueError - it is neither.
    """
    if name in published:
        return published[name]
    sizes: Any = type(next(iter(published.values())))
    try:
        config = json.loads(Path(name).read_text(encoding="utf-8"))
        return sizes(**{field.name: config[field.name] for field in dataclasses.fields(sizes)})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model: {name!r} is neither one of {', '.join(published)} nor a config.json of DeepSeek-V4: {error!r}"
        ) from error


# ---- in a process that stands for a GPU ------------------------------------------------------------------------------


def pool(arch: str, cache: Path, jobs: int) -> ProcessPoolExecutor:
    """Processes in which vLLM and TileLang believe in a GPU of this architecture, and TileLang's cache is `cache`."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _pretend, (arch, str(cache)))


def _pretend(arch: str, cache: str) -> None:
    os.environ["TILELANG_CACHE_DIR"] = cache
    # The text of this target is that of the one which TileLang finds on a GPU: kind and arch, the rest by default.
    os.environ["TILELANG_DEFAULT_TARGET"] = json.dumps({"kind": "cuda", "arch": arch})
    # TileLang logs two lines a kernel.
    os.environ["TILELANG_PRINT_ON_COMPILATION"] = "0"
    import torch
    from vllm import platforms
    from vllm.platforms.interface import Platform, PlatformEnum

    class Gpu(Platform):
        _enum = PlatformEnum.CUDA
        device_name = device_type = "cuda"

        @classmethod
        def is_arch_support_pdl(cls) -> bool:
            return True  # Hopper and later

    platforms._current_platform = Gpu()
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=NUM_SMS[arch])


def work(models: Iterable[Sizes]) -> list[tuple[str, dict[str, Any]]]:
    """(name of vLLM's kernel object, fields of its compile key) of everything that vLLM warms up for these models."""
    from vllm.model_executor.kernels.mhc import tilelang_kernels as kernels

    limits = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_TOKENS))
    found: dict[tuple[str, Any], None] = {}
    for model in models:
        sizes = {"hidden_size": model.hidden_size, "hc_mult": model.hc_mult}
        asked = {
            "_MHC_PRE_BIG_FUSE_TILELANG_KERNEL": kernels._MHC_PRE_BIG_FUSE_TILELANG_KERNEL.get_warmup_keys(
                limits,
                **sizes,
                use_norm_weight=True,
                include_pre_gemm_splits=True,  # DeepGEMM's, which are there on all of NUM_SMS
                include_broadcast_splits=True,  # of the first layer
                rms_eps=model.rms_norm_eps,
                hc_pre_eps=model.hc_eps,
                hc_sinkhorn_eps=model.hc_eps,
                hc_post_mult_value=POST_ALPHA,
                sinkhorn_repeat=model.hc_sinkhorn_iters,
                norm_eps=model.rms_norm_eps,
            ),
            "_MHC_POST_TILELANG_KERNEL": kernels._MHC_POST_TILELANG_KERNEL.get_warmup_keys(**sizes),
            "_MHC_FUSED_TILELANG_KERNEL": kernels._MHC_FUSED_TILELANG_KERNEL.get_warmup_keys(limits, **sizes),
            "_HC_HEAD_FUSED_TILELANG_KERNEL": kernels._HC_HEAD_FUSED_TILELANG_KERNEL.get_warmup_keys(
                **sizes, rms_eps=model.rms_norm_eps, hc_eps=model.hc_eps
            ),
        }
        found |= {(name, key): None for name, keys in asked.items() for key in keys}
    return [(name, dataclasses.asdict(key)) for name, key in found]


def compile_key(name: str, fields: Mapping[str, Any]) -> None:
    """Compile one of `work`, or load it from TileLang's cache, as vLLM's warm-up does."""
    from vllm.model_executor.kernels.mhc import tilelang_kernels as kernels

    kernel = getattr(kernels, name)
    kernel.compile(kernel.CompileKey(**fields))


# ---- the build -------------------------------------------------------------------------------------------------------


def missing_tool() -> str:
    """What keeps TileLang from compiling here, or nothing."""
    if importlib.util.find_spec("tilelang") is None:
        return "tilelang is not installed"
    from tilelang.contrib import nvcc

    try:
        compiler = nvcc.get_nvcc_compiler()
    except RuntimeError as error:
        return f"no nvcc: {error}"
    return "" if os.path.exists(compiler) else f"no nvcc: {compiler} is not there"


def build(models: Mapping[str, Sizes], archs: Iterable[str], out: Path, jobs: int) -> int:
    """Compile every kernel of these models into `out`, in the layout of TileLang's cache; returns how many there are.

    Args:
        models: name -> sizes.
        archs: of NUM_SMS.
        out: new, or empty but for the record.
        jobs: processes.

    Raises: RuntimeError - one of them does not compile, or did not come to lie in the cache.
    """
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            with pool(arch, Path(folder), jobs) as processes:
                asked = processes.submit(work, list(models.values())).result()
                started = {processes.submit(compile_key, *each): each for each in asked}
                for done in as_completed(started):
                    if error := done.exception():
                        processes.shutdown(cancel_futures=True)
                        raise RuntimeError(f"{arch}: {started[done]} does not compile: {error}") from error
            total += len(asked)
            print(f"tilelang_build: {arch}: {len(asked)} kernels", flush=True)
        entries = sorted(Path(folder).glob("*/*/kernels/*"))
        if len(entries) != total:
            raise RuntimeError(
                f"TileLang's cache has {len(entries)} kernels in VERSION/PLATFORM/kernels, expected {total}; look at the "
                "errors above, and at how this TileLang names its cache"
            )
        for entry in entries:
            kept = out / entry.relative_to(folder)
            shutil.copytree(entry, kept)
            for source in kept.glob("*.cu"):
                # TileLang asks that they are there and reads them for people only; they are a third of the bytes.
                source.write_bytes(b"")
    about = {
        "tilelang": importlib.metadata.version("tilelang"),
        "models": {name: dataclasses.asdict(sizes) for name, sizes in models.items()},
        "archs": list(archs),
        "kernels": total,
    }
    (out / RECORD).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return total


def main(argv: list[str] | None = None) -> int:
    """See `command`."""
    return command("tilelang_build", "TileLang", str(__doc__), MODELS, missing_tool, build, argv)


def command(
    tool: str,
    library: str,
    about: str,
    published: Mapping[str, SizesT],
    missing: Callable[[], str],
    build_set: Callable[[Mapping[str, SizesT], Sequence[str], Path, int], int],
    argv: list[str] | None,
) -> int:
    """The command line of a build of this kind: of one library's kernels, for models and architectures.

    Args:
        tool, library: whose name is in front of lines, and whose kernels they are.
        about: of --help.
        published: name -> sizes.
        missing: what keeps the library from compiling here, or nothing.
        build_set: as `build`; RuntimeError, ValueError and OSError are failures of the build.
        argv: None: the process's own.

    Returns: 0: built, or left out and why is printed and recorded; 1: not built; 64: wrong usage.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty")
    names = ",".join(published)
    parser.add_argument("--model", default=names, help=f"default {names}; or a config.json")
    parser.add_argument("--arch", default=",".join(NUM_SMS), help=f"default {','.join(NUM_SMS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default one a core")
    parser.add_argument("--require", action="store_true", help=f"fail where there is no {library} or no nvcc")
    args = parser.parse_args(argv)
    archs = args.arch.split(",")
    try:
        if unknown := set(archs) - set(NUM_SMS):
            raise ValueError(f"--arch: {', '.join(sorted(unknown))}, expected some of {', '.join(NUM_SMS)}")
        if args.out.is_dir() and any(args.out.iterdir()):
            raise ValueError(f"--out: {args.out} is not empty; name a new folder")
        models = {name: find_sizes(name, published) for name in args.model.split(",")}
    except ValueError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 64
    args.out.mkdir(parents=True, exist_ok=True)
    if reason := missing():
        print(f"{tool}: left out, every start will compile: {reason}", file=sys.stderr, flush=True)
        (args.out / RECORD).write_text(json.dumps({"left_out": reason}) + "\n", encoding="utf-8")
        return int(args.require)
    start = time.perf_counter()
    try:
        total = build_set(models, archs, args.out, args.jobs)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{total} {library} kernels, {size / 2**20:.1f} MiB, in {time.perf_counter() - start:.0f} s: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
