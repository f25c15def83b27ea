"""TileLang's kernels built ahead of time (`tilelang_build`): put where TileLang looks (`linked_set`), and checked."""

import importlib.metadata
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any

from vllm_nvfp4 import env, tilelang_build
from vllm_nvfp4.linked_set import LinkedSet


def cache_folder() -> Path:
    """Where TileLang of this process looks, by its own rule."""
    return Path(os.environ.get("TILELANG_CACHE_DIR", Path("~/.tilelang/cache").expanduser()))


# TileLang's own layout: version, platform, kernels, hash.
_SET = LinkedSet("TileLang", env.TILELANG_DIR, cache_folder, "TILELANG_CACHE_DIR", "*/*/kernels/*")
link, report = _SET.link, _SET.report


@cache
def use() -> int:
    """Link the set of NVFP4_TILELANG_DIR into TileLang's cache, once in a process; returns how many kernels it has.

    Raises: RuntimeError - there is no such folder, or TileLang's cannot be written.
    """
    return _SET.use()


def check(folder: Path) -> list[str]:
    """Whether TileLang finds every kernel that `folder` was built for: a line for each that it would compile.

    Needs neither a GPU nor a compiler; nothing is compiled.
    """
    try:
        record = _SET.record(folder)
    except ValueError as error:
        return [str(error)]
    if record is None:
        return []
    version = importlib.metadata.version("tilelang")
    if version != record["tilelang"]:
        return [f"{folder} was built by TileLang {record['tilelang']}, expected {version}"]
    models = [tilelang_build.Sizes(**sizes) for sizes in record["models"].values()]
    found = []
    with tempfile.TemporaryDirectory() as cached:
        link(folder, Path(cached))
        for arch in record["archs"]:
            with tilelang_build.pool(arch, Path(cached), 1) as process:
                asked = process.submit(tilelang_build.work, models).result()
                try:
                    found += [f"{arch}: {line}" for line in process.submit(_not_loaded, asked).result()]
                except BrokenProcessPool:
                    found.append(
                        f"{arch}: a kernel ends the process that loads it; {folder} is damaged, build it again"
                    )
    return found


def _not_loaded(asked: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """In a process of `tilelang_build.pool`: those of `asked` that TileLang does not load."""
    from tilelang.cache import kernel_cache

    class OnlyLoads:
        from_database = staticmethod(kernel_cache.JITKernel.from_database)

        def __init__(self, *args: Any, **options: Any) -> None:
            raise LookupError("it is not in the set, or does not load")

    kernel_cache.JITKernel = OnlyLoads
    found = []
    for name, fields in asked:
        try:
            tilelang_build.compile_key(name, fields)
        except LookupError as error:
            found.append(f"{name} {dict(fields)}: {error}")
    return found
