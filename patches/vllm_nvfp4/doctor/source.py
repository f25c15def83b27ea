"""Where a checkpoint comes from - a folder, the Hub, or a config.json alone - and everything its headers and index say.

The hard part is to go on: the loader stops at the first bad file, a doctor reads all the others. What a lost file held must
then not be reported once more as thousands of missing tensors, so the source remembers which tensors are lost, or that it
cannot know.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_nvfp4 import checkpoint
from vllm_nvfp4.checkpoint import CheckpointError, Tensor
from vllm_nvfp4.doctor.findings import Finding, make

SMALL_FILES = (
    "config.json",
    "hf_quant_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(.*)-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors")


@dataclass
class Source:
    """What was opened.

    kind: folder, hub, config (nothing but config.json). folder: where the small files lie. config: config.json's fields.
    tensors: name -> header entry. lost: tensors known to be in files that cannot be read; is_partial: there may be more.
    """

    path: str
    kind: str
    folder: Path | None = None
    config: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    num_files: int = 0
    lost: set[str] = field(default_factory=set)
    is_partial: bool = False
    findings: list[Finding] = field(default_factory=list)

    def read_json(self, name: str) -> Any:
        """The file's content; None where there is no such file.

        Raises: ValueError - it cannot be read, in words.
        """
        path = self.folder / name if self.folder else None
        if path is None or not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot be read ({error})") from error


def open_source(path: str, revision: str | None = None, *, plan_only: bool = False) -> Source:
    """Open a folder, a config.json or a Hub id; what is wrong with it is in the findings, nothing is raised."""
    there = Path(path).expanduser()
    if there.is_file():
        source = Source(path, "config", folder=there.parent)
        _read_config(source, there.name)
    elif there.is_dir():
        source = Source(path, "config" if plan_only else "folder", folder=there)
        _read_config(source)
        if not plan_only:
            _read_folder(source, there)
    elif _HUB_ID.fullmatch(path):
        source = _open_hub(path, revision, plan_only)
    else:
        source = Source(path, "config")
        source.findings.append(make("NOT_FOUND", path, "no such file or folder, and no Hub id (owner/name)"))
    return source


def _read_config(source: Source, name: str = "config.json") -> None:
    try:
        found = source.read_json(name)
    except ValueError as error:
        source.findings.append(make("CONFIG_UNREADABLE", name, str(error)))
        return
    if isinstance(found, dict):
        source.config = found
    else:
        value = "not there" if found is None else f"a JSON {type(found).__name__}, expected an object"
        source.findings.append(make("CONFIG_UNREADABLE", name, value))


def _read_folder(source: Source, folder: Path) -> None:
    """Every header of the folder, and what the index says about them."""
    present = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    try:
        index = checkpoint.weight_map(folder)
    except CheckpointError as error:
        source.findings.append(make("INDEX_UNREADABLE", checkpoint.INDEX_NAME, str(error)))
        index = None
    except OSError as error:
        source.findings.append(make("INDEX_UNREADABLE", checkpoint.INDEX_NAME, str(error)))
        index = None
    if not present and index is None:
        source.findings.append(make("NO_WEIGHTS", source.path, "no *.safetensors file"))
        source.is_partial = True
        return
    wanted = sorted(set(index.values())) if index is not None else list(present)
    for name in wanted:
        if name in present:
            _read_file(source, present[name], index)
        else:
            _lose(source, "FILE_MISSING", name, "not in the folder", index)
    if index is None:
        _missing_shards(source, list(present))
    else:
        for name in sorted(set(present) - set(wanted)):
            source.findings.append(make("FILE_UNUSED", name, f"not named by {checkpoint.INDEX_NAME}"))
        _compare_index(source, index)


def _read_file(source: Source, path: Path, index: dict[str, str] | None) -> None:
    source.num_files += 1
    try:
        tensors = checkpoint.read_header(path)
    except (CheckpointError, OSError) as error:
        _lose(source, "FILE_UNREADABLE", path.name, str(error), index)
        return
    for name, tensor in tensors.items():
        if name in source.tensors:
            value = f"in both {source.tensors[name].file.name} and {path.name}"
            source.findings.append(make("TENSOR_DUPLICATE", name, value))
        else:
            source.tensors[name] = tensor


def _lose(source: Source, code: str, file: str, value: str, index: dict[str, str] | None) -> None:
    """A file that cannot be read, and what the index knows to be in it."""
    source.findings.append(make(code, file, value))
    if index is None:
        source.is_partial = True
    else:
        source.lost |= {name for name, where in index.items() if where == file}


def _missing_shards(source: Source, names: list[str]) -> None:
    """Without an index, files called x-00001-of-00007.safetensors still tell how many there should be."""
    shards: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (stem, total), there in shards.items():
        missing = sorted(set(range(1, min(int(total), 100_000) + 1)) - there)
        if missing:
            first = f"{stem}-{missing[0]:0{len(total)}}-of-{total}.safetensors"
            value = f"{len(there)} of {int(total)} shards are there, and no index says what the others hold"
            _lose(source, "FILE_MISSING", first, value, None)


def _compare_index(source: Source, index: dict[str, str]) -> None:
    """Tensors that the index promises, omits, or looks for in another file."""
    absent = [name for name in index if name not in source.tensors and name not in source.lost]
    if absent:
        listed = ", ".join(absent[:3])
        source.findings.append(
            make("INDEX_STALE", absent[0], f"{len(absent)} tensors that no shard has, first {listed}")
        )
        source.lost.update(absent)
    twice = {
        f.tensor for f in source.findings if f.code == "TENSOR_DUPLICATE"
    }  # one of the two is where the index says
    wrong = [n for n, tensor in source.tensors.items() if index.get(n) != tensor.file.name and n not in twice]
    if wrong:
        first = wrong[0]
        value = (
            f"{len(wrong)} tensors; this one is in {source.tensors[first].file.name}, the index says {index.get(first)}"
        )
        source.findings.append(make("INDEX_DISAGREES", first, value))


def _open_hub(repo_id: str, revision: str | None, plan_only: bool) -> Source:
    """A repository on the Hub: the cached snapshot if its weights are there, else headers by range requests.

    Not verified against the Hub itself: exercised with a stand-in only.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        if any(cached.glob("*.safetensors")):
            return open_source(str(cached), plan_only=plan_only)
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass  # nothing is cached
    source = Source(repo_id, "config" if plan_only else "hub")
    try:
        for name in SMALL_FILES[: 1 if plan_only else None]:
            try:
                source.folder = Path(hf_hub_download(repo_id, name, revision=revision)).parent
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
        _read_config(source)
        if not plan_only:
            source.tensors = checkpoint.read_hub(repo_id, revision)
            source.num_files = len({tensor.file for tensor in source.tensors.values()})
            source.findings.append(make("HUB_SCALES_NOT_READ", repo_id, "headers only"))
    except CheckpointError as error:
        source.findings.append(make("FILE_UNREADABLE", repo_id, str(error)))
        source.is_partial = True
    except (
        Exception
    ) as error:  # huggingface_hub raises its own, httpx's and safetensors' errors: all end in "not found"
        source.findings.append(make("NOT_FOUND", repo_id, f"no such folder, and the Hub says: {error}"))
        source.is_partial = True
    return source
