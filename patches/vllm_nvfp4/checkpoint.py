"""What a checkpoint holds, read from its safetensors headers alone: names, dtypes, shapes, and where the bytes lie.

Nothing here trusts `config.json`, `ignore` lists or the index: the tensors are the truth. A header that lies (sizes
past the end of the file, overlapping ranges, not JSON) is an error that names the file.
"""

import json
import os
import reprlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
MAX_SIZE = 2**63 - 1  # no size, offset or number of elements may be larger
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message names file and tensor, what was found, and what to do."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's header entry.

    file: where it lies; start: byte offset in that file; num_bytes: its length; dtype and shape as declared.
    """

    file: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Tensor]:
    """name -> Tensor for every tensor of one safetensors file.

    Raises: CheckpointError - truncated, malformed, or with offsets that do not fit the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors header; download the file again")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: its header claims {length} bytes, but the file has {size}: truncated, or not safetensors; "
                "download the file again"
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a key twice, an endless number
        raise CheckpointError(f"{path}: its header is not valid JSON ({error}); download the file again") from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{path}: its header is a JSON {type(entries).__name__}, expected an object; download the file again"
        )
    entries.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    _check_overlap(path, tensors)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which the format allows no key twice; Python's parser would keep the last one."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is in it twice")
        found[key] = value
    return found


def _entry(path: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> Tensor:
    """One header entry, checked against the file's size and its own dtype and shape."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: header entry of {name} is malformed ({error!r}): {reprlib.repr(entry)}; download the file again"
        ) from error
    sizes = [*shape, begin, end] if isinstance(shape, list) else [None]
    integers = all(type(v) is int and 0 <= v <= MAX_SIZE for v in sizes)
    if not integers or not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {reprlib.repr(dtype)}, shape {reprlib.repr(shape)}, offsets "
            f"{reprlib.repr([begin, end])}; expected non-negative integers and one of {sorted(DTYPES)}; "
            "download the file again, or export it in one of these types"
        )
    torch_dtype, num_elements = DTYPES[dtype], 1
    for extent in shape:
        # Bounded: a product of thousands of sizes would take minutes, and not even print.
        num_elements = min(num_elements * extent, MAX_SIZE)
    num_bytes = num_elements * torch_dtype.itemsize
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{path}: {name} is {dtype} {reprlib.repr(shape)}, which takes {num_bytes} bytes, "
            f"but its offsets span {end - begin}: the header is damaged; download the file again"
        )
    if data_start + end > file_bytes:
        raise CheckpointError(
            f"{path}: {name} ends at byte {data_start + end}, but the file has {file_bytes}: truncated; "
            "download the file again"
        )
    return Tensor(path, data_start + begin, end - begin, torch_dtype, tuple(shape))


def _check_overlap(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse two tensors that share bytes."""
    last_name, last_end = "", 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.num_bytes and tensor.start < last_end:
            raise CheckpointError(
                f"{path}: {name} overlaps {last_name}: the header is damaged; download the file again"
            )
        if tensor.num_bytes:
            last_name, last_end = name, tensor.start + tensor.num_bytes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those of its index, else all, in order.

    Raises: CheckpointError - none there, a shard that the index names is missing, or an unreadable index.
    """
    indexed = weight_map(folder)
    if indexed is not None:
        names = sorted(set(indexed.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(names)} shards that {INDEX_NAME} names are missing: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; download them"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: no *.safetensors file; expected model.safetensors, or shards with {INDEX_NAME}"
        )
    return files


def weight_map(folder: Path) -> dict[str, str] | None:
    """tensor -> file name, as the folder's index has it; None where there is no index.

    Raises: CheckpointError - an unreadable index.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        return None
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: cannot be read ({error!r}); download it again") from error
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(
            f"{index}: weight_map is {reprlib.repr(found)}, expected an object of tensor and file names; "
            "download it again"
        )
    return found


def read_folder(folder: Path) -> dict[str, Tensor]:
    """name -> Tensor for a whole checkpoint folder.

    Raises: CheckpointError - as weight_files and read_header; a tensor in two files; a tensor that the index names but
    no file has.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in both {tensors[name].file} and {path}; remove one of the files")
            tensors[name] = tensor
    absent = sorted(set(weight_map(folder) or ()) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{folder / INDEX_NAME}: names {len(absent)} tensors that no shard has, first {absent[0]}; "
            "download index and shards again, from one revision"
        )
    return tensors


def read_hub(repo_id: str, revision: str | None) -> dict[str, Tensor]:
    """name -> Tensor for a model on the Hub, by range requests; nothing is downloaded but headers.

    Not verified against the Hub itself: exercised with a stand-in only. File positions are not known (start is -1).

    Raises: CheckpointError - a tensor in two files, or of an unknown dtype; what huggingface_hub raises.
    """
    from huggingface_hub import get_safetensors_metadata

    metadata = get_safetensors_metadata(repo_id, revision=revision)
    tensors: dict[str, Tensor] = {}
    for file_name, file in metadata.files_metadata.items():
        for name, info in file.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{repo_id}: {name} is in both {tensors[name].file} and {file_name}")
            if info.dtype not in DTYPES:
                raise CheckpointError(
                    f"{repo_id}: {name} in {file_name} has dtype {info.dtype}, expected one of {sorted(DTYPES)}"
                )
            begin, end = info.data_offsets
            tensors[name] = Tensor(Path(file_name), -1, end - begin, DTYPES[info.dtype], tuple(info.shape))
    return tensors


def read_tensors(
    tensors: Iterable[tuple[str, Tensor]], *, reuse_buffer: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, torch tensor) one at a time, in file order.

    Read with pread rather than mapped: mapped pages count as the process's memory until the kernel takes them back,
    which is how a loader comes to hold a checkpoint twice.

    Args:
        tensors: name -> header entry, of any files.
        reuse_buffer: False - each tensor owns its bytes. True - a tensor is valid only until the next one is asked for:
            all are read into one buffer, as large as the largest, so that the heap is not torn by millions of sizes.
    Raises: CheckpointError - the file ends early.
    """
    ordered = sorted(tensors, key=lambda item: (str(item[1].file), item[1].start))
    largest = max((tensor.num_bytes for _, tensor in ordered), default=0)
    shared = torch.empty(largest if reuse_buffer else 0, dtype=torch.uint8, device="cpu")
    for path, of_one_file in groupby(ordered, key=lambda item: item[1].file):
        with open(path, "rb", buffering=0) as file:
            for name, tensor in of_one_file:
                buffer = (
                    shared[: tensor.num_bytes]
                    if reuse_buffer
                    else torch.empty(tensor.num_bytes, dtype=torch.uint8, device="cpu")
                )
                yield name, _read_one(file.fileno(), name, tensor, buffer)


def _read_one(descriptor: int, name: str, tensor: Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, read into `buffer` and viewed as its dtype and shape."""
    view, done = memoryview(buffer.numpy()), 0
    while done < tensor.num_bytes:
        count = os.preadv(descriptor, [view[done : done + (1 << 30)]], tensor.start + done)
        if count == 0:
            raise CheckpointError(
                f"{tensor.file}: ends inside {name}, after {done} of {tensor.num_bytes} bytes: truncated; "
                "download the file again"
            )
        done += count
    return buffer.view(tensor.dtype).reshape(tensor.shape)
