"""Limits for probes, derived from a checkpoint's bytes and the speed of the disk it lies on.

    stall_s             = 60; a count rests while a tensor is read, so 3 * largest tensor / disk speed must not be above
    silent_s            = 2 * all bytes / disk speed + 900, at least 1800: a load without a count, and the warm-up behind it
    progress_deadline_s = silent_s + 2 * all bytes / disk speed: the longest start that probes accept, for the Deployment

The others are rounded up to whole minutes. The manifests in k8s/ follow by these formulas from the numbers in their
annotations, and a test holds them to it.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

STALL_S = 60  # a hung load must be gone within two minutes, and a kubelet needs the other one
MIN_SILENT_S, WARM_UP_S = 1800, 900
SAMPLE_BYTES, SAMPLE_S, BLOCK_BYTES = 4 << 30, 5.0, 16 << 20


@dataclass(frozen=True)
class Plan:
    """stall_s and silent_s for `nvfp4 probe live`; progress_deadline_s for Deployment.spec.progressDeadlineSeconds."""

    stall_s: int
    silent_s: int
    progress_deadline_s: int


def plan(checkpoint_bytes: int, largest_tensor_bytes: int, disk_bytes_per_s: float) -> Plan:
    """The limits for a checkpoint on a disk; formulas above.

    Raises: ValueError - sizes or speed not positive, or a disk so slow that one tensor looks like a hang.
    """
    if not 0 < largest_tensor_bytes <= checkpoint_bytes or disk_bytes_per_s <= 0:
        raise ValueError(
            f"checkpoint of {checkpoint_bytes} bytes, largest tensor {largest_tensor_bytes}, disk {disk_bytes_per_s:g} "
            "bytes/s: expected 0 < largest tensor <= checkpoint and a positive speed"
        )
    load_s = checkpoint_bytes / disk_bytes_per_s
    if 3 * largest_tensor_bytes / disk_bytes_per_s > STALL_S:
        raise ValueError(
            f"at {disk_bytes_per_s / 1e6:.0f} MB/s one tensor takes so long that a hang could not be told from it within "
            f"{STALL_S} s; expected at least {3 * largest_tensor_bytes / STALL_S / 1e6:.0f} MB/s: use a faster disk"
        )
    silent_s = _minutes(max(2 * load_s + WARM_UP_S, MIN_SILENT_S))
    return Plan(STALL_S, silent_s, _minutes(silent_s + 2 * load_s))


def _minutes(seconds: float) -> int:
    return 60 * math.ceil(seconds / 60)


def disk_speed(file: Path) -> float:
    """Bytes per second of one reader, past the page cache as far as the system lets go of it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        num_bytes, started = 0, time.monotonic()
        while num_bytes < SAMPLE_BYTES and time.monotonic() - started < SAMPLE_S:
            block = len(os.pread(descriptor, BLOCK_BYTES, num_bytes))
            if not block:
                break
            num_bytes += block
        return num_bytes / (time.monotonic() - started)
    finally:
        os.close(descriptor)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nvfp4 probe plan`."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, on the disk that will serve it")
    parser.add_argument("--disk-bytes-per-s", type=float, help="default: measured by reading the largest file for 5 s")


def run(options: argparse.Namespace) -> int:
    """`nvfp4 probe plan CHECKPOINT`: the facts and what follows from them, as JSON."""
    # Imported here: reading headers takes torch, and the other probes must start in a moment.
    from vllm_nvfp4 import checkpoint

    try:
        tensors = checkpoint.read_folder(options.checkpoint).values()
        speed = options.disk_bytes_per_s
        if speed is None:
            speed = disk_speed(max({t.file for t in tensors}, key=lambda file: file.stat().st_size))
        facts = {
            "checkpoint_bytes": sum(t.num_bytes for t in tensors),
            "largest_tensor_bytes": max(t.num_bytes for t in tensors),
            "disk_bytes_per_s": round(speed),
        }
        print(json.dumps({**facts, **asdict(plan(**facts))}))
    except (OSError, ValueError) as error:
        print(f"nvfp4 probe plan: {error}", file=sys.stderr)
        return 1
    return 0
