"""A set of kernels built ahead of time, put where a library looks for them, and what it still compiled counted.

The hard part is that the library must be able to write: where a kernel is not in its cache, it compiles and stores it, and
a folder that it cannot write ends the engine. So the set stays read-only in the image, and each of its kernels is a link in
the library's own folder. Whatever is there and no link was compiled here, at this start or, where the folder outlives a
pod, at an earlier one.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nvfp4 import env
from vllm_nvfp4.tilelang_build import RECORD

logger = logging.getLogger("vllm.nvfp4")


@dataclass(frozen=True)
class LinkedSet:
    """One library's set.

    library: its name in lines. variable: names the set. cache_folder: where the library of this process looks.
    cache_variable: what moves that. entries: pattern of a kernel's folder in the cache and in the set.
    """

    library: str
    variable: env.Variable
    cache_folder: Callable[[], Path]
    cache_variable: str
    entries: str

    def use(self) -> int:
        """Link the set that is asked for into the library's cache; returns how many kernels it has.

        Raises: RuntimeError - there is no such folder, or the library's cannot be written.
        """
        asked = env.text(self.variable)
        if not asked:
            return 0
        folder = Path(asked)
        if not folder.is_dir():
            raise RuntimeError(
                f"{self.variable.name}={asked} is no folder; build a set there, or unset it to compile at start"
            )
        try:
            count = self.link(folder, self.cache_folder())
        except OSError as error:
            raise RuntimeError(
                f"{self.library}'s cache cannot be written ({error}); set {self.cache_variable} to a folder that can"
            ) from error
        logger.info("%s: %d kernels built ahead of time in %s", self.library, count, folder)
        return count

    def link(self, folder: Path, target: Path) -> int:
        """Make each kernel of `folder` a link in the cache `target`; several ranks may do so at once. Returns how many."""
        for old in target.glob(self.entries):
            # Of an image before this one: the library could neither load it nor replace it.
            if old.is_symlink() and not old.exists():
                old.unlink(missing_ok=True)
        entries = sorted(folder.resolve().glob(self.entries))
        for entry in entries:
            place = target / entry.relative_to(folder.resolve())
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.symlink_to(entry)
            except FileExistsError:
                continue  # another rank's, or compiled here before
        return len(entries)

    def record(self, folder: Path) -> dict[str, Any] | None:
        """What the build of `folder` says of it; None where the build left the set out, and why is printed.

        Raises: ValueError - `folder` is no set.
        """
        try:
            record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is no set: {error}") from error
        if reason := record.get("left_out"):
            print(f"{self.library.lower()}_set: there is none, every start compiles: {reason}", flush=True)
            return None
        return record

    def report(self) -> None:
        """Behind vLLM's warm-up: a warning where the library had to compile on this machine although a set is in use."""
        folder = self.cache_folder()
        compiled = sum(not path.is_symlink() for path in folder.glob(self.entries))
        if compiled and env.text(self.variable):
            logger.warning(
                "%s: %d kernels that the set lacks were compiled here, in %s", self.library, compiled, folder
            )
