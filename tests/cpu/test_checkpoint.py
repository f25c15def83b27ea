"""safetensors headers that lie, files that are cut short, indexes that are stale: every one named, none believed."""

import copy
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from vllm_nvfp4 import checkpoint
from vllm_nvfp4.checkpoint import INDEX_NAME, CheckpointError, Tensor, read_folder, read_header, read_tensors

VALID: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "U8", "shape": [2, 8], "data_offsets": [0, 16]},
    "a.weight_scale_2": {"dtype": "F32", "shape": [], "data_offsets": [16, 20]},
    "b.weight": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [20, 44]},
    "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [44, 44]},
}
DATA = bytes(range(44))


def file_bytes(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    """A safetensors file, with a header length of choice."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(path: Path, header: Any, data: bytes = DATA, length: int | None = None) -> Path:
    path.write_bytes(file_bytes(header, data, length))
    return path


def refused(read: Callable[[], Any], *words: str) -> str:
    """The message of the CheckpointError that `read` raises, which must hold all words."""
    with pytest.raises(CheckpointError) as error:
        read()
    message = str(error.value)
    assert [word for word in words if word not in message] == [], message
    return message


def with_entry(**changes: Any) -> dict[str, Any]:
    """VALID with fields of b.weight changed; None removes a field."""
    header = copy.deepcopy(VALID)
    header["b.weight"].update(changes)
    header["b.weight"] = {key: value for key, value in header["b.weight"].items() if value is not None}
    return header


def test_a_header_as_it_should_be(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", VALID)
    start = 8 + len(json.dumps(VALID))
    assert read_header(path) == {
        "a.weight": Tensor(path, start, 16, torch.uint8, (2, 8)),
        "a.weight_scale_2": Tensor(path, start + 16, 4, torch.float32, ()),
        "b.weight": Tensor(path, start + 20, 24, torch.bfloat16, (3, 4)),
        "empty": Tensor(path, start + 44, 0, torch.float32, (0, 4)),
    }


def test_every_type_comes_back_bit_for_bit_as_the_safetensors_library_wrote_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, dtype in checkpoint.DTYPES.items():
        raw = torch.randint(0, 256, (3, 4 * dtype.itemsize), generator=generator, dtype=torch.uint8)
        tensors[name] = (raw & 1 if dtype is torch.bool else raw).view(dtype)
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 5), "deep": torch.arange(24).reshape(2, 3, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    header = read_folder(tmp_path)
    assert {n: (t.dtype, t.shape) for n, t in header.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    found = dict(read_tensors(header.items()))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def test_the_real_export_reads_as_the_safetensors_library_reads_it(affine: Path) -> None:
    from safetensors import safe_open

    header = read_folder(affine)
    assert len(header) == 1776
    wanted = ["model.layers.1.attn.wq_b.weight", "model.layers.1.attn.wq_b.weight_scale", "model.norm.weight"]
    with safe_open(affine / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(header)
        for name, tensor in read_tensors((n, header[n]) for n in wanted):
            assert tensor.view(torch.uint8).equal(file.get_tensor(name).view(torch.uint8)), name


@pytest.mark.parametrize("num_bytes", [0, 1, 7])
def test_a_file_shorter_than_the_length_field(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\1" * num_bytes)
    refused(lambda: read_header(path), str(path), f"{num_bytes} bytes, too short", "download the file again")


@pytest.mark.parametrize("kept", [8, 9, 100])
def test_a_file_cut_inside_its_header(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(VALID)[:kept])
    length = len(json.dumps(VALID))
    refused(lambda: read_header(path), str(path), f"claims {length} bytes", f"the file has {kept}", "download the file")


def test_a_file_cut_inside_its_data(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", VALID, DATA[:-1])
    size = path.stat().st_size
    refused(
        lambda: read_header(path), str(path), "b.weight ends at byte", f"{size + 1}", f"has {size}: truncated", "again"
    )


def test_a_length_that_lies_is_not_allocated(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for exponent in (10, 20, 26, 27, 31, 32, 40, 62, 63):
            path = write(tmp_path / "x.safetensors", VALID, length=1 << exponent)
            refused(lambda path=path: read_header(path), str(path), f"claims {1 << exponent} bytes", "truncated")
        path = write(tmp_path / "x.safetensors", VALID, length=2**64 - 1)
        refused(lambda: read_header(path), "claims 18446744073709551615 bytes")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_length_beyond_the_formats_limit_is_refused_whatever_the_files_size(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", length=checkpoint.MAX_HEADER_BYTES + 1)
    os.truncate(path, 1 << 30)  # sparse: takes no disk
    refused(lambda: read_header(path), str(path), f"claims {checkpoint.MAX_HEADER_BYTES + 1} bytes", "not safetensors")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"\xff\xfe{}", "not valid JSON|can't decode byte 0xff|download the file again"),
        (b"", "not valid JSON|Expecting value"),
        (b"{'a': 1}", "not valid JSON|double quotes"),
        (b'{"a": 1', "not valid JSON"),
        (b"[]", "is a JSON list, expected an object|download the file again"),
        (b'"text"', "is a JSON str, expected an object"),
        (b"null", "is a JSON NoneType, expected an object"),
        (b"[" * 100_000, "not valid JSON|recursion"),
        (b'{"a":' * 100_000, "not valid JSON|recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON|4300 digits"),
        (b'{"a": {}, "a": {}}', "not valid JSON|'a' is in it twice|download the file again"),
        (b'{"a": {"dtype": "U8", "dtype": "F32"}}', "not valid JSON|'dtype' is in it twice"),
    ],
    ids=[
        "bytes",
        "empty",
        "quotes",
        "open",
        "list",
        "text",
        "null",
        "lists",
        "objects",
        "digits",
        "twice",
        "field-twice",
    ],
)
def test_a_header_that_is_no_json_object(tmp_path: Path, header: bytes, words: str) -> None:
    path = write(tmp_path / "x.safetensors", header)
    refused(lambda: read_header(path), str(path), *words.split("|"))


def nested(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": None}, "header entry of b.weight is malformed|KeyError('dtype')|download the file again"),
        ({"shape": None}, "header entry of b.weight is malformed|KeyError('shape')"),
        ({"data_offsets": None}, "header entry of b.weight is malformed|KeyError('data_offsets')"),
        ({"data_offsets": [20]}, "header entry of b.weight is malformed|not enough values"),
        ({"data_offsets": [20, 44, 44]}, "header entry of b.weight is malformed|too many values"),
        ({"data_offsets": 20}, "header entry of b.weight is malformed|cannot unpack"),
        ({"dtype": "F4"}, "b.weight has dtype 'F4'|one of ['BF16', 'BOOL', 'F16',|export it in one of these types"),
        ({"dtype": ["BF16"]}, "b.weight has dtype ['BF16']|one of ['BF16',"),
        ({"dtype": {}}, "b.weight has dtype {}"),
        ({"shape": [3, -4]}, "b.weight has dtype 'BF16', shape [3, -4]|expected non-negative integers"),
        ({"shape": [3, 4.0]}, "shape [3, 4.0]|expected non-negative integers"),
        ({"shape": [3, True]}, "shape [3, True]|expected non-negative integers"),
        ({"shape": [3, float("nan")]}, "shape [3, nan]|expected non-negative integers"),
        ({"shape": "34"}, "shape '34'|expected non-negative integers"),
        ({"shape": ""}, "shape ''|expected non-negative integers"),
        ({"shape": {}}, "shape {}|expected non-negative integers"),
        ({"shape": 12}, "shape 12|expected non-negative integers"),
        ({"shape": [2**63]}, f"shape [{2**63}]|expected non-negative integers"),
        ({"shape": [10**4000]}, "expected non-negative integers"),
        (
            {"shape": [2**62] * 400},
            "b.weight is BF16 [4611686018427387904, |its offsets span 24: the header is damaged",
        ),
        ({"shape": nested(50)}, "shape [[[[[[[...]]]]]]]|expected non-negative integers"),
        ({"data_offsets": [-4, 20]}, "b.weight has dtype 'BF16', shape [3, 4], offsets [-4, 20]|non-negative"),
        ({"data_offsets": ["20", "44"]}, "offsets ['20', '44']|non-negative"),
        ({"data_offsets": {"20": 0, "44": 0}}, "offsets ['20', '44']|non-negative"),
        ({"data_offsets": [44, 20]}, "b.weight is BF16 [3, 4], which takes 24 bytes|offsets span -24|damaged"),
        ({"data_offsets": [20, 43]}, "b.weight is BF16 [3, 4], which takes 24 bytes|offsets span 23|download"),
        ({"shape": [3, 5]}, "b.weight is BF16 [3, 5], which takes 30 bytes|offsets span 24"),
        ({"dtype": "F32"}, "b.weight is F32 [3, 4], which takes 48 bytes|offsets span 24"),
        ({"data_offsets": [21, 45]}, "b.weight ends at byte|truncated|download the file again"),
        ({"data_offsets": [1 << 40, (1 << 40) + 24]}, "b.weight ends at byte|truncated"),
        ({"data_offsets": [2**63 - 25, 2**63 - 1]}, "b.weight ends at byte|truncated"),
        (
            {"data_offsets": [18, 42]},
            "b.weight overlaps a.weight_scale_2: the header is damaged|download the file again",
        ),
        ({"data_offsets": [19, 43]}, "b.weight overlaps a.weight_scale_2"),
        ({"data_offsets": [0, 24]}, "b.weight overlaps a.weight"),
        ({"shape": [8], "data_offsets": [0, 16]}, "overlaps"),
    ],
)
def test_an_entry_that_lies(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "x.safetensors", with_entry(**changes))
    message = refused(lambda: read_header(path), str(path), *words.split("|"))
    assert len(message) < 1000 + len(str(path)), "a message that nobody reads to the end"


@pytest.mark.parametrize("entry", [None, 7, "text", [], ["dtype", "shape"], [nested(60)]])
def test_an_entry_that_is_no_object(tmp_path: Path, entry: Any) -> None:
    path = write(tmp_path / "x.safetensors", VALID | {"b.weight": entry})
    refused(lambda: read_header(path), str(path), "header entry of b.weight is malformed", "download the file again")


def test_nesting_that_the_parser_just_accepts_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for depth in range(880, 1000, 5):  # around the interpreter's limit: parsing may pass where printing would not
        write(path, b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
        refused(lambda: read_header(path), str(path))
        write(path, b'{"a": {"dtype": "U8", "data_offsets": [0, 1], "shape":' + b"[" * depth + b"]" * depth + b"}}")
        refused(lambda: read_header(path), str(path))


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(lambda: read_folder(tmp_path), str(tmp_path), "no *.safetensors file", "expected model.safetensors")


def shards(folder: Path, weight_map: Any) -> None:
    """Two shards, a in the first and b in the second, and an index."""
    write(folder / "one.safetensors", {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"aaaa")
    write(folder / "two.safetensors", {"b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"bbbb")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_only_the_files_of_the_index_are_read(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    write(tmp_path / "consolidated.safetensors", b"not a header")
    assert {name: tensor.file.name for name, tensor in read_folder(tmp_path).items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_without_an_index_every_file_is_read(tmp_path: Path) -> None:
    shards(tmp_path, {})
    (tmp_path / INDEX_NAME).unlink()
    assert set(read_folder(tmp_path)) == {"a", "b"}


def test_a_shard_is_missing(tmp_path: Path) -> None:
    names = ["one.safetensors", *(f"{i}.safetensors" for i in range(5))]
    shards(tmp_path, {f"t{i}": name for i, name in enumerate(names)})
    message = refused(lambda: read_folder(tmp_path), str(tmp_path), "5 of 6 shards", INDEX_NAME, "download them")
    assert "0.safetensors, 1.safetensors, 2.safetensors, ..." in message
    shards(tmp_path, {"a": "one.safetensors", "c": "three.safetensors"})
    assert "missing: three.safetensors; download" in refused(lambda: read_folder(tmp_path), "1 of 2 shards")


def test_the_index_names_a_tensor_that_no_shard_has(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "d": "two.safetensors", "c": "one.safetensors"})
    refused(lambda: read_folder(tmp_path), INDEX_NAME, "names 2 tensors that no shard has, first c", "one revision")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read|Expecting value|download it again"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read|KeyError('weight_map')"),
        ("[" * 100_000, "cannot be read|RecursionError"),
        ('{"weight_map": []}', "weight_map is [], expected an object"),
        ('{"weight_map": {}}', "weight_map is {}, expected an object"),
        ('{"weight_map": {"a": 1}}', "weight_map is {'a': 1}, expected an object of tensor and file names"),
        ('{"weight_map": {"a": ["one.safetensors"]}}', "weight_map is {'a': ['one.safetensors']}|download it again"),
    ],
    ids=["nothing", "open", "list", "no-map", "nested", "map-list", "map-empty", "map-number", "map-lists"],
)
def test_an_index_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    shards(tmp_path, {})
    (tmp_path / INDEX_NAME).write_text(text)
    refused(lambda: read_folder(tmp_path), str(tmp_path / INDEX_NAME), *words.split("|"))


def test_an_index_of_other_bytes(tmp_path: Path) -> None:
    shards(tmp_path, {})
    (tmp_path / INDEX_NAME).write_bytes(b"\xff\xff")
    refused(lambda: read_folder(tmp_path), INDEX_NAME, "cannot be read", "UnicodeDecodeError")


@pytest.mark.parametrize("indexed", [True, False])
def test_the_same_tensor_in_two_files(tmp_path: Path, indexed: bool) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    write(
        tmp_path / "two.safetensors", VALID | {"a": {"dtype": "U8", "shape": [], "data_offsets": [44, 45]}}, DATA + b"a"
    )
    if not indexed:
        (tmp_path / INDEX_NAME).unlink()
    first, second = str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")
    refused(lambda: read_folder(tmp_path), f"a is in both {first} and {second}", "remove one of the files")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    os.truncate(tmp_path / "two.safetensors", 30)
    refused(lambda: read_folder(tmp_path), str(tmp_path / "two.safetensors"), "truncated")


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    header = read_folder(tmp_path)
    found = [(name, bytes(tensor.tolist())) for name, tensor in read_tensors(reversed(header.items()))]
    assert found == [("a", b"aaaa"), ("b", b"bbbb")]
    path = write(tmp_path / "x.safetensors", VALID)
    order = [name for name, _ in read_tensors(sorted(read_header(path).items(), reverse=True))]
    assert order == ["a.weight", "a.weight_scale_2", "b.weight", "empty"]


def test_each_tensor_owns_its_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", VALID)
    for name, tensor in read_tensors(read_header(path).items()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        tensor.zero_()
    assert path.read_bytes() == file_bytes(VALID), "writing to a tensor must not reach the file"


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", VALID)
    header = read_header(path)
    os.truncate(path, path.stat().st_size - 10)
    refused(
        lambda: list(read_tensors(header.items())),
        str(path),
        "ends inside b.weight, after 14 of 24 bytes: truncated",
        "download the file again",
    )


def test_files_are_closed_when_the_reader_stops_early_or_fails(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    header = read_folder(tmp_path)
    before = os.listdir("/proc/self/fd")
    reader = read_tensors(header.items())
    next(reader)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    reader.close()  # type: ignore[attr-defined]
    assert os.listdir("/proc/self/fd") == before
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"two\.safetensors"):
        list(read_tensors(header.items()))
    assert os.listdir("/proc/self/fd") == before


def hub_metadata(files: dict[str, dict[str, Any]]) -> SafetensorsRepoMetadata:
    """What huggingface_hub answers for a repository whose files have these headers."""
    metadata = {
        name: SafetensorsFileMetadata(
            metadata={},
            tensors={
                tensor: TensorInfo(dtype=e["dtype"], shape=e["shape"], data_offsets=tuple(e["data_offsets"]))
                for tensor, e in header.items()
                if tensor != "__metadata__"
            },
        )
        for name, header in files.items()
    }
    return SafetensorsRepoMetadata(metadata=None, sharded=len(files) > 1, weight_map={}, files_metadata=metadata)


def test_headers_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"one.safetensors": VALID, "two.safetensors": {"c": VALID["b.weight"]}}
    asked: list[tuple[str, str | None]] = []

    def stand_in(repo_id: str, *, revision: str | None = None) -> SafetensorsRepoMetadata:
        asked.append((repo_id, revision))
        return hub_metadata(files)

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", stand_in)
    found = checkpoint.read_hub("someone/model", "main")
    assert asked == [("someone/model", "main")]
    assert found["a.weight_scale_2"] == Tensor(Path("one.safetensors"), -1, 4, torch.float32, ())
    assert found["c"] == Tensor(Path("two.safetensors"), -1, 24, torch.bfloat16, (3, 4))
    assert set(found) == {"a.weight", "a.weight_scale_2", "b.weight", "empty", "c"}
    files["two.safetensors"] = {"b.weight": VALID["b.weight"]}
    refused(
        lambda: checkpoint.read_hub("someone/model", None), "someone/model: b.weight is in both one.safetensors and two"
    )
    files["two.safetensors"] = {"c": VALID["b.weight"] | {"dtype": "F4"}}
    refused(lambda: checkpoint.read_hub("someone/model", None), "c in two.safetensors has dtype F4", "one of ['BF16'")


# Fuzzing: a header is either refused with CheckpointError, or all that it says is true.


def check_any(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    tensors, message = {}, str(path)
    tracemalloc.start()
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        message = str(error)
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert str(path) in message
    # What JSON gives is larger than its text, by a bounded factor: two bytes ("[]") become a list.
    assert peak_bytes < (1 << 18) + 100 * len(content)
    last = 8
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.num_bytes)):
        assert last <= tensor.start or not tensor.num_bytes
        assert tensor.start + tensor.num_bytes <= len(content)
        last = max(last, tensor.start + tensor.num_bytes)
        if tensor.num_bytes:
            assert torch.Size(tensor.shape).numel() * tensor.dtype.itemsize == tensor.num_bytes


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


FUZZ = settings(derandomize=True, deadline=None, database=None, max_examples=250)
NUMBERS = st.integers() | st.sampled_from([-1, 0, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**40])
SCALARS = (
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=5) | st.sampled_from([*checkpoint.DTYPES])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*checkpoint.DTYPES]) | JSON,
        "shape": st.lists(st.integers(0, 8), max_size=3) | st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | st.lists(NUMBERS, max_size=3) | JSON,
    }
)


@FUZZ
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes(fuzz_path: Path, content: bytes) -> None:
    check_any(fuzz_path, content)
    check_any(fuzz_path, struct.pack("<Q", len(content)) + content)


@FUZZ
@given(header=st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=4), data=st.binary(max_size=64))
def test_arbitrary_headers(fuzz_path: Path, header: dict[str, Any], data: bytes) -> None:
    check_any(fuzz_path, file_bytes(header, data))


@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.binary(max_size=6)), min_size=1, max_size=4))
def test_bytes_of_a_valid_file_changed(fuzz_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    content = file_bytes(VALID)
    for position, removed, inserted in edits:
        position %= len(content) + 1
        content = content[:position] + inserted + content[position + removed :]
    check_any(fuzz_path, content)


@FUZZ
@given(data=st.data())
def test_values_of_a_valid_header_changed(fuzz_path: Path, data: st.DataObject) -> None:
    header = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        field = data.draw(st.sampled_from(["", "dtype", "shape", "data_offsets"]))
        if field and isinstance(header[name], dict):
            header[name][field] = data.draw(ENTRY)[field]
        else:
            header[name] = data.draw(JSON)
    check_any(fuzz_path, file_bytes(header))


def test_the_fuzz_would_see_a_header_that_is_believed(fuzz_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_any(fuzz_path, file_bytes(VALID))
    assert len(read_header(fuzz_path)) == 4
    monkeypatch.setattr(checkpoint, "_check_overlap", lambda path, tensors: None)
    with pytest.raises(AssertionError):
        check_any(fuzz_path, file_bytes(with_entry(data_offsets=[0, 24])))
