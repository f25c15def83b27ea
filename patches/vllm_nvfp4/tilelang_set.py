"""TileLang's kernels built ahead of time (`tilelang_build`): put where TileLang looks, and what it still compiled counted.

The hard part is that TileLang must be able to write: where a kernel is not in its cache, it compiles and stores it, and a
folder that it cannot write ends the engine. So the set stays read-only in the image, and each of its kernels is a link in
TileLang's own folder, TILELANG_CACHE_DIR. Whatever is there and no link was compiled here, at this start or, where the
folder outlives a pod, at an earlier one.
"""

import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any

from vllm_nvfp4 import env, tilelang_build

logger = logging.getLogger("vllm.nvfp4")

# TileLang's own layout: version, platform, kernels, hash.
_ENTRIES = "*/*/kernels/*"


def cache_folder() -> Path:
    """Where TileLang of this process looks, by its own rule."""
    return Path(os.environ.get("TILELANG_CACHE_DIR", Path("~/.tilelang/cache").expanduser()))


@cache
def use() -> int:
    """Link the set of NVFP4_TILELANG_DIR into TileLang's cache, once in a process; returns how many kernels it has.

    Raises: RuntimeError - there is no such folder, or TileLang's cannot be written.
    """
    asked = env.text(env.TILELANG_DIR)
    if not asked:
        return 0
    folder = Path(asked)
    if not folder.is_dir():
        raise RuntimeError(
            f"{env.TILELANG_DIR.name}={asked} is no folder; build a set there, or unset it to compile at start"
        )
    try:
        count = link(folder, cache_folder())
    except OSError as error:
        raise RuntimeError(
            f"TileLang's cache cannot be written ({error}); set TILELANG_CACHE_DIR to a folder that can"
        ) from error
    logger.info("TileLang: %d kernels built ahead of time in %s", count, folder)
    return count


def link(folder: Path, target: Path) -> int:
    """Make each kernel of `folder` a link in the cache `target`; several ranks may do so at once. Returns how many."""
    for old in target.glob(_ENTRIES):
        # Of an image before this one: TileLang could neither load it nor replace it.
        if old.is_symlink() and not old.exists():
            old.unlink(missing_ok=True)
    entries = sorted(folder.resolve().glob(_ENTRIES))
    for entry in entries:
        place = target / entry.relative_to(folder.resolve())
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.symlink_to(entry)
        except FileExistsError:
            continue  # another rank's, or compiled here before
    return len(entries)


def report() -> None:
    """Behind vLLM's warm-up: a warning where TileLang had to compile on this machine although a set is in use."""
    compiled = sum(not path.is_symlink() for path in cache_folder().glob(_ENTRIES))
    if compiled and env.text(env.TILELANG_DIR):
        logger.warning("TileLang: %d kernels that the set lacks were compiled here, in %s", compiled, cache_folder())


def check(folder: Path) -> list[str]:
    """Whether TileLang finds every kernel that `folder` was built for: a line for each that it would compile.

    Needs neither a GPU nor a compiler; nothing is compiled.
    """
    try:
        record = json.loads((folder / tilelang_build.RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{folder} is no set: {error}"]
    if reason := record.get("left_out"):
        print(f"tilelang_set: there is none, every start compiles: {reason}", flush=True)
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
