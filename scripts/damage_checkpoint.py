"""Make a corpus of damaged copies of a healthy DeepSeek-V4 checkpoint, one defect each, to test what examines checkpoints.

    python scripts/damage_checkpoint.py SOURCE OUT_DIR [--only NAME ...]

SOURCE must be all-NVFP4, with config.json in transformers' spelling (what ModelOpt exports), four layers or more, and small:
it is held in memory. OUT_DIR/corpus.json lists for each copy the finding that `nvfp4 doctor` must report, the tensor, file or
field it must name, its exit code, and the flags to run it with.

The hard part is one defect, and only one: where a tensor goes, the index must forget it too. Files that a defect does not
touch are hard links to one copy. One file, though long: a corpus is read as a list.
"""

import argparse
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# A checkout need not be installed to be run.
sys.path.append(str(Path(__file__).resolve().parents[1] / "patches"))
from vllm_nvfp4 import checkpoint, names
from vllm_nvfp4.checkpoint import INDEX_NAME

NUM_SHARDS = 3


@dataclass(frozen=True)
class Expected:
    """What an examination of one copy must end with."""

    name: str
    code: str
    tensor: str
    exit_code: int
    flags: tuple[str, ...]


class Copy:
    """A copy to be damaged, with tensors addressed by canonical names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self.read_json("config.json")
        self.tensors = checkpoint.read_folder(folder)
        num_layers = self.config["num_hidden_layers"]
        self.names = {names.canonical(name, num_layers): name for name in self.tensors}

    def read_json(self, file: str) -> Any:
        """A JSON file's content."""
        return json.loads((self.folder / file).read_text(encoding="utf-8"))

    def write(self, file: str, content: bytes | str | dict[str, Any]) -> str:
        """Replace a file, never through the hard link; returns its name."""
        path = self.folder / file
        path.unlink(missing_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def configure(self, **fields: Any) -> None:
        """Change fields of config.json; None removes one."""
        self.config |= fields
        self.write("config.json", {k: v for k, v in self.config.items() if v is not None})

    def read(self, canonical: str) -> torch.Tensor:
        """A tensor of the copy."""
        name = self.names[canonical]
        return load_file(self.tensors[name].file)[name]

    def put(self, changed: dict[str, torch.Tensor | None], like: str | None = None) -> str:
        """Replace tensors, by checkpoint name, in the shard of the first (or of `like`); None removes one; index follows."""
        first = next(iter(changed))
        for path in {self.tensors[n].file if n in self.tensors else self.tensors[like or ""].file for n in changed}:
            held = load_file(path)
            for name, value in changed.items():
                if self.tensors.get(name, self.tensors.get(like or "")).file != path:  # type: ignore[union-attr]
                    continue
                held.pop(name, None)
                if value is not None:
                    held[name] = value.contiguous()
            path.unlink()
            save_file(held, path)
        index = self.read_json(INDEX_NAME)
        files = {n: p.name for p in self.folder.glob("*.safetensors") for n in checkpoint.read_header(p)}
        self.write(INDEX_NAME, index | {"weight_map": files})
        return first

    def edit(self, canonical: str, change: "Change") -> str:
        """Replace one tensor by change(tensor)."""
        name = self.names[canonical]
        return self.put({name: change(self.read(canonical))})

    def shard(self, canonical: str = "model.norm.weight") -> Path:
        """The file that holds a tensor."""
        return self.tensors[self.names[canonical]].file

    @property
    def last_layer(self) -> str:
        """The last layer, which is not hash-routed."""
        return f"model.layers.{self.config['num_hidden_layers'] - 1}"


Apply = Callable[[Copy], str]
Change = Callable[[torch.Tensor], torch.Tensor | None]
DAMAGES: dict[str, tuple[str, int, tuple[str, ...], Apply]] = {}


def damage(code: str, exit_code: int = 1, *flags: str) -> Callable[[Apply], Apply]:
    """Register a defect under its function's name; the function returns the tensor, file or field that must be named."""

    def register(apply: Apply) -> Apply:
        DAMAGES[apply.__name__] = (code, exit_code, flags, apply)
        return apply

    return register


# Files: what a shard's bytes become, files that hold something else, files that are gone.


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """A change of a shard's header, its data left as it is."""

    def rewrite(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        return struct.pack("<Q", len(raw)) + raw + content[8 + length :]

    return rewrite


def _overlap(header: dict[str, Any]) -> None:
    entry = next(e for n, e in header.items() if n != "__metadata__" and e["data_offsets"][0] >= 4)
    entry["data_offsets"] = [offset - 4 for offset in entry["data_offsets"]]


def _stretch(header: dict[str, Any]) -> None:
    entry = next(e for n, e in header.items() if n != "__metadata__" and e["shape"])
    entry["shape"][0] += 1


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "truncated_shard": lambda content: content[:-1000],
    "empty_shard": lambda content: b"",
    "header_longer_than_the_file": lambda content: struct.pack("<Q", 1 << 62) + content[8:],
    "header_not_utf8": lambda content: content[:12] + b"\xff" + content[13:],
    "header_with_overlapping_offsets": _header(_overlap),
    "header_with_a_lying_shape": _header(_stretch),
}
CONTENTS = {
    "index_not_json": ("INDEX_UNREADABLE", INDEX_NAME, "<html>503 Service Unavailable</html>"),
    "config_not_json": ("CONFIG_UNREADABLE", "config.json", '{"model_type": "deepseek_v4",'),
    "tokenizer_not_json": ("TOKENIZER_UNREADABLE", "tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
}
GONE = {
    "config_missing": ("CONFIG_UNREADABLE", 1, "config.json"),
    "tokenizer_missing": ("TOKENIZER_MISSING", 1, "tokenizer.json"),
    "tokenizer_config_missing": ("TOKENIZER_CONFIG_MISSING", 2, "tokenizer_config.json"),
}


def _rewriting(change: Callable[[bytes], bytes]) -> Apply:
    return lambda c: c.write(c.shard().name, change(c.shard().read_bytes()))


def _removing(file: str) -> Apply:
    def remove(c: Copy) -> str:
        (c.folder / file).unlink()
        return file

    return remove


def _writing(file: str, content: str) -> Apply:
    return lambda c: c.write(file, content)


DAMAGES |= {name: ("FILE_UNREADABLE", 1, (), _rewriting(change)) for name, change in BYTES.items()}
DAMAGES |= {name: (code, 1, (), _writing(file, text)) for name, (code, file, text) in CONTENTS.items()}
DAMAGES |= {name: (code, exit_code, (), _removing(file)) for name, (code, exit_code, file) in GONE.items()}


@damage("FILE_MISSING")
def missing_shard(c: Copy) -> str:
    """A shard that the index names is not there."""
    c.shard().unlink()
    return c.shard().name


@damage("FILE_MISSING")
def missing_shard_without_index(c: Copy) -> str:
    """Only the file names say that one is missing."""
    (c.folder / INDEX_NAME).unlink()
    return missing_shard(c)


@damage("NO_WEIGHTS")
def no_weights(c: Copy) -> str:
    """Only the small files were downloaded."""
    for path in [*c.folder.glob("*.safetensors"), c.folder / INDEX_NAME]:
        path.unlink()
    return str(c.folder)


@damage("INDEX_STALE")
def index_of_another_revision(c: Copy) -> str:
    """It names a tensor that no shard has."""
    index = c.read_json(INDEX_NAME)
    index["weight_map"]["model.layers.0.attn.old.weight"] = c.shard().name
    c.write(INDEX_NAME, index)
    return "model.layers.0.attn.old.weight"


@damage("INDEX_DISAGREES", 2)
def index_with_a_wrong_file(c: Copy) -> str:
    """It looks for a tensor in another shard than the one that has it."""
    index, name = c.read_json(INDEX_NAME), c.names["model.norm.weight"]
    index["weight_map"][name] = next(f for f in sorted(set(index["weight_map"].values())) if f != c.shard().name)
    c.write(INDEX_NAME, index)
    return name


@damage("FILE_UNUSED", 2)
def leftover_shard(c: Copy) -> str:
    """A file of another download."""
    return c.write("model-00001-of-00009.safetensors", c.shard().read_bytes())


@damage("TENSOR_DUPLICATE")
def tensor_in_two_files(c: Copy) -> str:
    """One name, two values."""
    name = c.names["model.norm.weight"]
    other = next(p for p in sorted(c.folder.glob("*.safetensors")) if p != c.shard())
    held = load_file(other) | {name: c.read("model.norm.weight") + 1}
    other.unlink()
    save_file(held, other)
    return name


# config.json.


@damage("CONFIG_FIELD")
def config_without_a_size(c: Copy) -> str:
    """A field that every shape depends on is gone."""
    c.configure(q_lora_rank=None)
    return "q_lora_rank"


@damage("CONFIG_FIELD")
def config_with_a_huge_layer_count(c: Copy) -> str:
    """A number that must not be believed."""
    c.configure(num_hidden_layers=10**9, layer_types=None, mlp_layer_types=None, compress_ratios=None)
    return "num_hidden_layers"


@damage("CONFIG_CONTRADICTION")
def config_contradiction(c: Copy) -> str:
    """num_hash_layers against mlp_layer_types."""
    c.configure(num_hash_layers=c.config["mlp_layer_types"].count("hash_moe") + 1)
    return "config.json"


@damage("CONFIG_NOT_DEEPSEEK_V4")
def config_of_another_architecture(c: Copy) -> str:
    """DeepSeek-V3's name."""
    c.configure(architectures=["DeepseekV3ForCausalLM"])
    return "architectures"


@damage("QUANTIZATION_NOT_DECLARED")
def quantization_not_declared(c: Copy) -> str:
    """Neither file says NVFP4."""
    c.configure(quantization_config=None)
    (c.folder / "hf_quant_config.json").unlink(missing_ok=True)
    return "hf_quant_config.json"


@damage("TENSOR_SHAPE")
def config_of_another_size(c: Copy) -> str:
    """Experts twice as wide."""
    c.configure(moe_intermediate_size=2 * c.config["moe_intermediate_size"])
    return "ffn.experts.*.w1.weight"


@damage("TENSOR_MISSING")
def config_with_one_layer_more(c: Copy) -> str:
    """The weights of the last layer are missing."""
    more = {n: [*c.config[n], c.config[n][-1]] for n in ("layer_types", "mlp_layer_types")}
    c.configure(num_hidden_layers=c.config["num_hidden_layers"] + 1, **more)
    return f"model.layers.{c.config['num_hidden_layers'] - 1}.attn.wq_a.weight"


# Tensors.


@damage("TENSOR_MISSING")
def missing_expert(c: Copy) -> str:
    """All of one expert."""
    stem = f"{c.last_layer}.ffn.experts.1."
    c.put({name: None for canonical, name in c.names.items() if canonical and canonical.startswith(stem)})
    return f"{stem}w1.weight"


@damage("TENSOR_UNEXPECTED")
def one_expert_too_many(c: Copy) -> str:
    """A tensor that the configuration has no place for."""
    like = c.names[f"{c.last_layer}.ffn.experts.0.w1.weight"]
    name = like.replace(".experts.0.", f".experts.{c.config['n_routed_experts']}.")
    return c.put({name: c.read(f"{c.last_layer}.ffn.experts.0.w1.weight")}, like)


@damage("NAME_UNKNOWN")
def unknown_name(c: Copy) -> str:
    """A tensor of nobody's."""
    return c.put({"model.layers.0.attn.wq_c.weight": torch.zeros(4)}, c.names["model.norm.weight"])


@damage("TENSOR_DUPLICATE")
def two_names_for_one_tensor(c: Copy) -> str:
    """lm_head and head at once."""
    name = c.names["lm_head.weight"]
    other = "lm_head.weight" if name != "lm_head.weight" else "head.weight"
    c.put({other: c.read("lm_head.weight")}, name)
    return "head.weight"


@damage("LAYOUT_UNKNOWN")
def names_of_two_layouts(c: Copy) -> str:
    """Two exports in one folder."""
    old, new = "model.layers.0.input_layernorm.weight", "model.layers.0.attn_norm.weight"
    name = c.names[new]
    c.put({name: None, old if name == new else new: c.read(new)}, name)
    return str(c.folder)


@damage("SCALE_STRAY")
def stray_scale(c: Copy) -> str:
    """A scale beside a weight that has none."""
    like = c.names[f"{c.last_layer}.attn.wo_a.weight"]
    return c.put({like.removesuffix("weight") + "input_scale": torch.tensor(0.01)}, like)


def _to_high_precision(c: Copy, module: str, n: int, k: int) -> None:
    leaves = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    stored = {leaf: c.names[f"{module}.{leaf}"] for leaf in leaves}
    c.put({stored["weight"]: torch.full((n, k), 0.01), **{stored[leaf]: None for leaf in leaves[1:]}})


@damage("FORMATS_MIXED")
def fused_module_in_two_formats(c: Copy) -> str:
    """wq_a in NVFP4, wkv in high precision."""
    module = f"{c.last_layer}.attn.wkv"
    _to_high_precision(c, module, c.config["head_dim"], c.config["hidden_size"])
    return module


@damage("FORMATS_MIXED")
def one_expert_in_high_precision(c: Copy) -> str:
    """A mixture within a layer's experts."""
    module = f"{c.last_layer}.ffn.experts.1.w2"
    _to_high_precision(c, module, c.config["hidden_size"], c.config["moe_intermediate_size"])
    return module


# Scales.


@damage("INPUT_SCALE_AMPLIFIES")
def inverted_input_scales_everywhere(c: Copy) -> str:
    """The same in every linear: no like is left to compare with."""
    inverted = {c.names[n]: 1 / c.read(n) for n in c.names if n and n.endswith(".input_scale") and ".experts." not in n}
    experts = [n for n in c.names if n and n.endswith(".input_scale") and ".experts." in n]
    held = {path: load_file(path) for path in {c.tensors[c.names[n]].file for n in experts}}
    inverted |= {c.names[n]: 1 / held[c.tensors[c.names[n]].file][c.names[n]] for n in experts}
    c.put(dict(inverted))
    return "attn.wq_b.input_scale"


@damage("SHARD_SCALES_DIFFER", 1, "--gpu", "b200")
def shards_with_different_scales(c: Copy) -> str:
    """w1 and w3 of an expert: exact on a CPU, refused by the kernels of a B200, which quantize their input once."""
    c.edit(f"{c.last_layer}.ffn.experts.1.w3.input_scale", lambda t: t * 1.5)
    return c.names[f"{c.last_layer}.ffn.experts.1.w1.input_scale"]


# What the files say.


@damage("IGNORE_CONTRADICTS", 2)
def ignore_list_names_a_quantized_module(c: Copy) -> str:
    """It says that wq_b was left alone."""
    module = c.names[f"{c.last_layer}.attn.wq_b.weight"].removesuffix(".weight")
    quantization = c.config["quantization_config"]
    c.configure(quantization_config=quantization | {"ignore": [*quantization["ignore"], module]})
    return module


@damage("MTP_MISSING", 2)
def promised_mtp_layer(c: Copy) -> str:
    """What transformers leaves of a model with MTP layers."""
    c.configure(num_nextn_predict_layers=1)
    return "num_nextn_predict_layers"


@damage("TOKENIZER_VOCABULARY", 2)
def tokenizer_of_another_model(c: Copy) -> str:
    """More tokens than the embedding has rows."""
    tokenizer = c.read_json("tokenizer.json")
    tokenizer["model"]["vocab"]["another"] = c.config["vocab_size"]
    return c.write("tokenizer.json", tokenizer)


# One tensor changed in its values, type or shape, or removed: (code, exit code, flags, canonical name, change).


def _set(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.full_like(t, value)


def _fill(value: int, share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first `share` of the bytes replaced, one at least."""

    def fill(t: torch.Tensor) -> torch.Tensor:
        raw = t.view(torch.uint8).flatten().clone()
        raw[: max(1, int(share * raw.numel()))] = value
        return raw.view(t.dtype).reshape(t.shape)

    return fill


ATTN, EXPERT, NONE, DEEP = "{last}.attn.", "{last}.ffn.experts.1.", (), ("--deep",)
NAN, INF = float("nan"), float("inf")
EDITS: dict[str, tuple[str, int, tuple[str, ...], str, Change]] = {
    "missing_norm": ("TENSOR_MISSING", 1, NONE, ATTN + "q_norm.weight", lambda t: None),
    "missing_scale": ("TENSOR_MISSING", 1, NONE, ATTN + "wq_b.weight_scale_2", lambda t: None),
    # Calibration never gave a value, and the exporter left it out; or wrote zero, a placeholder, a floor.
    "expert_without_input_scale": ("EXPERT_UNCALIBRATED", 1, NONE, EXPERT + "w2.input_scale", lambda t: None),
    "expert_with_zero_input_scale": ("EXPERT_UNCALIBRATED", 1, NONE, EXPERT + "w1.input_scale", _set(0.0)),
    "expert_with_placeholder_input_scale": ("EXPERT_UNCALIBRATED", 1, NONE, EXPERT + "w1.input_scale", _set(1.0)),
    "expert_with_tiny_input_scale": ("EXPERT_UNCALIBRATED", 2, NONE, EXPERT + "w2.input_scale", lambda t: t / 5000),
    "scale_in_half_precision": ("TENSOR_DTYPE", 1, NONE, ATTN + "wo_b.input_scale", torch.Tensor.half),
    "norm_of_another_size": ("TENSOR_SHAPE", 1, NONE, "model.norm.weight", lambda t: torch.cat([t, t[:1]])),
    "nan_input_scale": ("SCALE_NAN", 1, NONE, ATTN + "wq_b.input_scale", _set(NAN)),
    "infinite_weight_scale": ("SCALE_INFINITE", 1, NONE, EXPERT + "w2.weight_scale_2", _set(INF)),
    "negative_input_scale": ("SCALE_NEGATIVE", 1, NONE, ATTN + "wo_b.input_scale", torch.neg),
    "zero_weight_scale": ("SCALE_ZERO", 1, NONE, ATTN + "wo_b.weight_scale_2", _set(0.0)),
    # 2688 / amax in place of amax / 2688; and amax divided by 2688 twice.
    "inverted_input_scale": ("INPUT_SCALE_AMPLIFIES", 1, NONE, ATTN + "wq_b.input_scale", lambda t: 1 / t),
    "inverted_weight_scale": ("WEIGHT_SCALE_AMPLIFIES", 1, NONE, ATTN + "wo_b.weight_scale_2", lambda t: 1 / t),
    "input_scale_far_from_its_class": ("INPUT_SCALE_OUTLIER", 2, NONE, ATTN + "wq_b.input_scale", lambda t: t / 2688),
    "weight_scale_far_from_its_class": ("WEIGHT_SCALE_OUTLIER", 2, NONE, EXPERT + "w2.weight_scale_2", lambda t: t / 2688),
    "nan_block_scale": ("BLOCK_SCALE_NAN", 1, NONE, ATTN + "wq_b.weight_scale", _fill(0x7F, 0)),
    "negative_block_scale": ("BLOCK_SCALE_NEGATIVE", 1, NONE, EXPERT + "w1.weight_scale", _fill(0xB8, 0)),
    "saturated_block_scales": ("BLOCK_SCALE_SATURATED", 2, NONE, EXPERT + "w1.weight_scale", _fill(0x7E, 0.34)),
    "zero_block_scales": ("BLOCK_SCALE_ZERO", 2, NONE, ATTN + "wkv.weight_scale", _fill(0, 0.34)),
    # Only --deep sees these.
    "weight_never_filled": ("WEIGHT_ZERO", 2, DEEP, EXPERT + "w1.weight", torch.zeros_like),
    "clipped_weight": ("WEIGHT_SATURATED", 2, DEEP, ATTN + "wq_b.weight", _fill(0xF7, 0.5)),
    "nan_in_a_norm": ("WEIGHT_NOT_FINITE", 1, DEEP, "{last}.ffn_norm.weight", lambda t: torch.cat([t[:1] * NAN, t[1:]])),
    "hash_table_beyond_the_experts": ("ROUTER_TABLE", 1, DEEP, "model.layers.0.ffn.gate.tid2eid", _set(1 << 30)),
}  # fmt: skip


def _editing(canonical: str, change: Change) -> Apply:
    return lambda c: c.edit(canonical.format(last=c.last_layer), change)


DAMAGES |= {
    n: (code, status, flags, _editing(name, change)) for n, (code, status, flags, name, change) in EDITS.items()
}


def prepare(source: Path, folder: Path) -> None:
    """A healthy copy of `source` in several shards with an index, for the copies to link to."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX_NAME:
            shutil.copy(path, folder / path.name)
    files = checkpoint.weight_files(source)
    held = {name: tensor for path in files for name, tensor in load_file(path).items()}
    ordered = sorted(held)
    weight_map: dict[str, str] = {}
    for i in range(NUM_SHARDS):
        file = f"model-{i + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        part = ordered[i * len(ordered) // NUM_SHARDS : (i + 1) * len(ordered) // NUM_SHARDS]
        save_file({name: held[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.num_bytes for t in checkpoint.read_folder(folder).values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")


def make_copy(healthy: Path, out: Path, name: str) -> Expected:
    """A copy of `healthy`, made by `prepare`, at `out` with the defect `name`; returns what must be found."""
    code, exit_code, flags, apply = DAMAGES[name]
    out.mkdir(parents=True)
    for path in healthy.iterdir():
        os.link(path, out / path.name)
    return Expected(name, code, apply(Copy(out)), exit_code, flags)


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0 made, 1 could not be made."""
    parser = argparse.ArgumentParser(description="Make damaged copies of a checkpoint, one defect each.")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a small healthy checkpoint folder")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a folder that does not exist yet")
    parser.add_argument("--only", nargs="+", choices=sorted(DAMAGES), metavar="NAME", help="these defects")
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"{parser.prog}: error: {args.out} exists; give a folder that does not", file=sys.stderr)
        return 1
    try:
        prepare(args.source, args.out / "healthy")
        made = [make_copy(args.out / "healthy", args.out / name, name) for name in args.only or DAMAGES]
    except (OSError, KeyError, ValueError) as error:
        print(f"{parser.prog}: error: {args.source} cannot be used: {error!r}", file=sys.stderr)
        return 1
    (args.out / "corpus.json").write_text(json.dumps([asdict(e) for e in made], indent=2), encoding="utf-8")
    print(f"{args.out}: {len(made)} damaged copies, listed in corpus.json; healthy/ is the undamaged one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
