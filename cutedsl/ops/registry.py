"""Process-wide table from integer ids to runners, and the contract checks that all ops share.

The hard part is torch.compile(fullgraph): a custom op takes tensors and integers only, so a layer's weights hide behind
an id. Ids start at 1 (an uninitialised 0 is never valid), grow, and are never reused, so that a stale id is an error
and not another layer. An id is a constant inside a compiled graph: artifacts cached on disk are valid only for a
process that constructs its runners in the same order.
"""

import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

KINDS = ("linear", "shared_expert", "moe", "wo_a")


class RunnerInfo(NamedTuple):
    """A row of `describe`."""

    runner_id: int
    kind: str
    name: str
    backend: str


class _Entry(NamedTuple):
    kind: str
    runner: Callable[..., torch.Tensor]


_entries: dict[int, _Entry] = {}
_next_id = itertools.count(1)
_lock = threading.Lock()


def register(runner: Callable[..., torch.Tensor], kind: str) -> int:
    """Adds a runner and returns its id. The table keeps the runner, and so its weights, alive until `clear`.

    Raises:
        ValueError: kind is not in KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f"registry: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    with _lock:
        runner_id = next(_next_id)
        _entries[runner_id] = _Entry(kind, runner)
    return runner_id


def get(runner_id: int, kind: str) -> Any:
    """Returns the runner of that id.

    Raises:
        LookupError: no runner has the id.
        TypeError: the runner is of another kind.
    """
    # int() also turns a symbolic integer into the constant it stands for.
    entry = _entries.get(int(runner_id))
    if entry is None:
        raise LookupError(
            f"nvfp4::{kind}: no runner has id {runner_id} ({len(_entries)} registered); was the layer's runner made in "
            "this process, and the registry not cleared since?"
        )
    if entry.kind != kind:
        name = getattr(entry.runner, "name", "unnamed")
        raise TypeError(f"nvfp4::{kind}: runner {runner_id} ({name}) is of kind {entry.kind!r}; pass it to that op")
    return entry.runner


def replace(runner_id: int, runner: Callable[..., torch.Tensor]) -> None:
    """Puts another runner in an id's place, for wrappers that watch one: the ops then call the wrapper.

    Raises:
        LookupError: no runner has the id.
    """
    with _lock:
        if runner_id not in _entries:
            raise LookupError(f"registry: no runner has id {runner_id}, so none can be replaced; register it instead")
        _entries[runner_id] = _entries[runner_id]._replace(runner=runner)


def clear() -> None:
    """Forgets all runners, for tests and for the end of an engine; their ids stay used."""
    with _lock:
        _entries.clear()


def describe() -> list[RunnerInfo]:
    """Returns one row per runner, by id."""
    return [
        RunnerInfo(runner_id, entry.kind, getattr(entry.runner, "name", ""), getattr(entry.runner, "backend", ""))
        for runner_id, entry in sorted(_entries.items())
    ]


def check_tensor(
    op: str,
    label: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """Checks one tensor argument.

    Args:
        op: for the message, with the runner's name.
        label: the argument's name.
        tensor: to check.
        dtypes: those allowed.
        shape: expected sizes; None where any size will do.
        device: expected.

    Raises:
        TypeError: another type.
        ValueError: another shape or device, or a last dimension that is not contiguous (rows may be strided, so that a
            slice of a wider tensor need not be copied).
    """
    if tensor.dtype not in dtypes:
        raise TypeError(f"{op}: {label} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}; cast it")
    if tensor.ndim != len(shape) or any(
        size is not None and found != size for found, size in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {label} has shape {tuple(tensor.shape)}, expected ({wanted})")
    if tensor.device != device:
        raise ValueError(f"{op}: {label} is on {tensor.device}, expected {device}, where the weights are")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{op}: {label} has strides {tensor.stride()}, expected 1 in the last; call .contiguous()")
