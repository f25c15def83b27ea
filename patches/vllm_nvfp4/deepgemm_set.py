"""DeepGEMM's kernels built ahead of time (`deepgemm_build`): put where DeepGEMM looks (`linked_set`), and checked."""

import os
from functools import cache
from pathlib import Path

from vllm_nvfp4 import deepgemm_build, env
from vllm_nvfp4.linked_set import LinkedSet


def cache_folder() -> Path:
    """Where DeepGEMM of this process looks first and writes: its own variable, or what vLLM sets where there is none."""
    from vllm import envs

    # DeepGEMM takes a list, and writes into the first.
    return Path((os.environ.get("DG_JIT_CACHE_DIR") or os.path.join(envs.VLLM_CACHE_ROOT, "deep_gemm")).split(":")[0])


_SET = LinkedSet("DeepGEMM", env.DEEPGEMM_DIR, cache_folder, "DG_JIT_CACHE_DIR", f"{deepgemm_build.ENTRIES}/*")
report = _SET.report


@cache
def use() -> int:
    """Link the set of NVFP4_DEEPGEMM_DIR into DeepGEMM's cache, once in a process; returns how many kernels it has.

    DeepGEMM looks into its cache when a kernel is called first, so that this may come behind its import.

    Raises: RuntimeError - there is no such folder, or DeepGEMM's cannot be written.
    """
    return _SET.use()


def check(folder: Path) -> list[str]:
    """Whether DeepGEMM finds every kernel that `folder` was built for: a line for each that it would compile.

    Needs no GPU, and nothing is compiled; but nvcc must say its version, for DeepGEMM asks for it at each start.
    """
    try:
        record = _SET.record(folder)
    except ValueError as error:
        return [str(error)]
    if record is None:
        return []
    models = [deepgemm_build.Sizes(**sizes) for sizes in record["models"].values()]
    try:
        version = deepgemm_build.nvcc_version()
        asked = list(deepgemm_build.entries(models, record["archs"]))
    except (OSError, RuntimeError, ValueError) as error:
        return [f"{folder} cannot be used, as DeepGEMM would not find its own names: {error}"]
    if version != record["nvcc"]:
        return [f"{folder} was built by {record['nvcc']!r}, expected {version!r}; build it again"]
    return [f"{arch}: {name} is not in the set, or not whole" for name, arch, _ in asked if not _is_whole(folder, name)]


def _is_whole(folder: Path, name: str) -> bool:
    entry = folder / deepgemm_build.ENTRIES / name
    cubin = entry / "kernel.cubin"
    return (entry / deepgemm_build.COMMITTED).is_file() and cubin.is_file() and cubin.stat().st_size > 0
