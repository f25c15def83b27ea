"""Test aid: save what goes into and comes out of every op of a running engine (NVFP4_DUMP_DIR).

The per-operator proof compares these with ModelOpt's own dequantizer. Runners are wrapped in the ops' registry, so the
model's code path is the one that serves.
"""

import itertools
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4 import env

_counter = itertools.count()


class DumpingRunner:
    """Stands in for a runner: calls it, and saves inputs and output under the runner's name."""

    def __init__(self, runner: Any, folder: Path) -> None:
        self._runner, self._folder = runner, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The runner's answer, saved with its inputs as `<count>.<name>.pt`."""
        out = self._runner(*inputs)
        record = {"name": self._runner.name, "kind": type(self._runner).__name__, "inputs": inputs, "output": out}
        torch.save(record, self._folder / f"{next(_counter):06d}.{self._runner.name}.pt")
        return out


def watch(runner: Any) -> None:
    """Wrap `runner` in the registry if NVFP4_DUMP_DIR is set."""
    folder = env.text(env.DUMP_DIR)
    if folder:
        from cutedsl.ops import registry

        Path(folder).mkdir(parents=True, exist_ok=True)
        registry.replace(runner.runner_id, DumpingRunner(runner, Path(folder)))
