"""Bytes of many small tensors out of few large files, fast: neighbours are read together, files on several threads.

The hard part is the number: a 1 TB checkpoint has 140 000 global scales of 4 bytes. Writers put them side by side, so ranges
that lie close together become one read. Each range is reduced on the thread that read it, so that memory stays bounded
whatever the size of the files.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from vllm_nvfp4.checkpoint import Tensor

MAX_GAP = 32 * 1024  # reading this much for nothing is cheaper than another request
MAX_SPAN = 4 << 20
MAX_SPANS_PER_TASK = 256
NUM_THREADS = 8
PAIRS_FROM = 1 << 20  # bytes; below, the larger table costs more than it saves

T = TypeVar("T")
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Counts = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Range:
    """num_bytes of `file` from `start`, which belong to `name`."""

    name: str
    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Reduced(Generic[T]):
    """What became of one range: its result, or why it could not be read."""

    range: Range
    result: T | None
    error: str = ""


def whole(name: str, tensor: Tensor) -> Iterator[Range]:
    """All bytes of a tensor, in ranges of at most MAX_SPAN."""
    for begin in range(0, tensor.num_bytes, MAX_SPAN):
        yield Range(name, tensor.file, tensor.start + begin, min(MAX_SPAN, tensor.num_bytes - begin))


def ends(name: str, tensor: Tensor, num_bytes: int) -> Iterator[Range]:
    """The first and the last `num_bytes` of a tensor; all of it where that is no more."""
    if tensor.num_bytes <= 2 * num_bytes:
        yield from whole(name, tensor)
        return
    yield Range(name, tensor.file, tensor.start, num_bytes)
    yield Range(name, tensor.file, tensor.start + tensor.num_bytes - num_bytes, num_bytes)


def histogram(raw: Bytes) -> Counts:
    """How often each of the 256 byte values occurs; large ranges are counted by pairs of bytes, which is twice as fast."""
    if raw.size < PAIRS_FROM or raw.size % 2:
        return np.bincount(raw, minlength=256)
    pairs = np.bincount(raw.view("<u2"), minlength=1 << 16).reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1)


def reduce_all(ranges: Iterable[Range], reduce: Callable[[Bytes], T]) -> Iterator[Reduced[T]]:
    """reduce(bytes) for every range, in file order; a range that cannot be read has an error instead.

    Args: reduce: gets a view that is valid during the call only.
    """
    tasks = list(_tasks(sorted(ranges, key=lambda r: (str(r.file), r.start))))
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for results in pool.map(lambda task: _run(task, reduce), tasks):
            yield from results


def _tasks(ordered: list[Range]) -> Iterator[list[list[Range]]]:
    """Spans of neighbouring ranges, dealt into tasks of one file each."""
    task: list[list[Range]] = []
    task_bytes, end = 0, 0
    for item in ordered:
        span = task[-1] if task else None
        same_file = span is not None and span[0].file == item.file
        if span is not None and same_file and item.start - end <= MAX_GAP:
            grown = max(end, item.start + item.num_bytes) - span[0].start
            if grown <= MAX_SPAN:
                span.append(item)
                end = max(end, item.start + item.num_bytes)
                continue
        if task and (not same_file or len(task) >= MAX_SPANS_PER_TASK or task_bytes + item.num_bytes > MAX_SPAN):
            yield task
            task, task_bytes = [], 0
        task.append([item])
        task_bytes += item.num_bytes
        end = item.start + item.num_bytes
    if task:
        yield task


def _run(task: list[list[Range]], reduce: Callable[[Bytes], T]) -> list[Reduced[T]]:
    """One task: a read for each span, a result for each range."""
    path = task[0][0].file
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return [Reduced(item, None, str(error)) for span in task for item in span]
    found: list[Reduced[T]] = []
    try:
        for span in task:
            start, end = span[0].start, max(item.start + item.num_bytes for item in span)
            try:
                content = _pread(descriptor, end - start, start)
            except OSError as error:
                found += [Reduced(item, None, str(error)) for item in span]
                continue
            raw = np.frombuffer(content, dtype=np.uint8)
            for item in span:
                begin = item.start - start
                part = raw[begin : begin + item.num_bytes]
                short = len(part) < item.num_bytes
                found.append(Reduced(item, None, f"{path} ends early") if short else Reduced(item, reduce(part)))
    finally:
        os.close(descriptor)
    return found


def _pread(descriptor: int, num_bytes: int, start: int) -> bytes:
    """pread that does not stop short of the end of the file."""
    content = os.pread(descriptor, num_bytes, start)
    while len(content) < num_bytes:
        more = os.pread(descriptor, num_bytes - len(content), start + len(content))
        if not more:
            break
        content += more
    return content
