"""scripts/make_tiny_checkpoint.py: names and formats against a real export, values across layouts, and safety."""

import errno
import hashlib
import importlib.util
import json
import math
import os
import re
import struct
import subprocess
import sys
import weakref
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers

from cutedsl.quantize import dequantize

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_tiny_checkpoint.py"
EXPORT = ROOT / "tests" / "data" / "affine-a"  # written by ModelOpt 0.47; its absence is a failure, not a skip
SMALL = {
    "hidden": 64,
    "layers": (4,),
    "experts": 2,
    "topk": 2,
    "heads": 2,
    "q_lora": 32,
    "o_lora": 16,
    "index_heads": 2,
}


def load_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


tiny = load_file(SCRIPT, "make_tiny_checkpoint")


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with file.open("rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    return {name: (t["dtype"], tuple(t["shape"])) for name, t in header.items() if name != "__metadata__"}


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return tensors


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir()}


def raw(t: torch.Tensor) -> bytes:
    return t.reshape(-1).view(torch.uint8).numpy().tobytes()


def dequantized(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return dequantize(*(tensors[f"{module}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2")))


def make_small(out: Path, overwrite: bool = False, **fields: object) -> str:
    return tiny.make_tiny_checkpoint(out, tiny.TinySpec(**(SMALL | fields)), overwrite)


def small_flags(**fields: object) -> list[str]:
    pairs = (SMALL | fields).items()
    values = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in pairs}
    return [word for k, v in values.items() for word in ("--" + k.replace("_", "-"), v)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The four layouts at default sizes, and the line each call returned."""
    base = tmp_path_factory.mktemp("tiny")
    lines = {x: tiny.make_tiny_checkpoint(base / x, tiny.TinySpec(layout=x)) for x in ("L1", "L2", "L3", "bare")}
    return SimpleNamespace(lines=lines, **{x: base / x for x in lines})


# Names, formats, configs


def test_l2_has_the_tensors_of_a_real_export(made: SimpleNamespace) -> None:
    assert read_header(made.L2 / "model.safetensors") == read_header(EXPORT / "model.safetensors")


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json", "generation_config.json"])
def test_l2_has_the_configs_of_a_real_export(made: SimpleNamespace, file: str) -> None:
    assert read_json(made.L2 / file) == read_json(EXPORT / file)


@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale"])
def test_scales_are_shared_as_in_a_real_export(made: SimpleNamespace, leaf: str) -> None:
    def partition(directory: Path) -> set[frozenset[str]]:
        groups = defaultdict(set)
        for name, t in read_tensors(directory).items():
            if name.endswith("." + leaf):
                # Scales of different layers may agree by chance in a calibrated model; sharing ends with the layer.
                groups[(name.split(".")[2], t.item())].add(name)
        return {frozenset(group) for group in groups.values()}

    assert partition(made.L2) == partition(EXPORT)


def test_l1_has_the_names_and_shapes_of_transformers(made: SimpleNamespace) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made.L1))
    expected = {n: tuple(p.shape) for n, p in model.state_dict().items() if ".experts." not in n}
    found = {n: shape for n, (_, shape) in read_header(made.L1 / "model.safetensors").items() if ".experts." not in n}
    scales = {n for n in found if n.endswith(("weight_scale", "weight_scale_2", "input_scale"))}
    packed = {n.removesuffix("_scale") for n in scales if n.endswith(".weight_scale")}
    shapes = {n: (s[0], 2 * s[1]) if n in packed else s for n, s in found.items() if n not in scales}
    assert shapes == expected
    assert len(packed) > 40


def test_l1_experts_and_spelling_of_the_indexer(made: SimpleNamespace, tmp_path: Path) -> None:
    names = set(read_header(made.L1 / "model.safetensors"))
    assert {f"model.layers.3.mlp.experts.31.{w}_proj.input_scale" for w in ("gate", "up", "down")} <= names
    tiny.make_tiny_checkpoint(tmp_path / "x", tiny.TinySpec(layout="L1", indexer_spelling="attn"))
    attn = set(read_header(tmp_path / "x" / "model.safetensors"))
    assert attn == {n.replace(".compressor.indexer.", ".indexer.") for n in names}
    assert "model.layers.1.self_attn.indexer.scorer.weights_proj.weight_scale_2" in attn


def test_bare_has_deepseek_names(made: SimpleNamespace) -> None:
    names = set(read_header(made.bare / "model.safetensors"))
    assert {"embed.weight", "head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"} <= names
    inner = {"layers.0.attn.kv_norm.weight", "layers.1.attn.indexer.compressor.ape", "layers.2.hc_ffn_base"}
    assert inner | {"layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.bias"} <= names
    assert all(n.startswith(("layers.", "embed.", "head.", "norm.", "hc_head_")) for n in names)
    ignored = read_json(made.bare / "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert ignored == ["head", "embed", *(f"layers.{i}.ffn.gate" for i in range(4))]


def test_layouts_hold_the_same_values(made: SimpleNamespace) -> None:
    def values(directory: Path) -> Counter:
        return Counter((t.dtype, tuple(t.shape), raw(t)) for t in read_tensors(directory).values())

    assert values(made.L1) == values(made.L2) == values(made.bare)


def test_l3_formats(made: SimpleNamespace) -> None:
    formats = (
        (r"layers\.\d+\.ffn\.experts\.\d+\.w[123]\.weight", "U8"),
        (r".*\.(wq_a|wkv|wq_b|wo_a|wo_b|shared_experts\.w[123])\.weight", "F8_E4M3"),
        (r".*(embed|head|norm|gate|weights_proj)\.weight", "BF16"),
        (r".*\.(attn_sink|ape|bias)|.*hc_.*_(fn|base|scale)", "F32"),
        (r".*\.tid2eid", "I64"),
    )
    header = read_header(made.L3 / "model.safetensors")
    for name, (dtype, shape) in header.items():
        if re.fullmatch(r".*compressor\.(wkv|wgate)\.weight", name):
            assert dtype == "BF16", name
            continue
        expected = [d for pattern, d in formats if re.fullmatch(pattern, name)]
        if expected:
            assert dtype == expected[0], name
            if dtype == "F8_E4M3":
                blocks = tuple(math.ceil(size / 128) for size in shape)
                assert header[name.removesuffix("weight") + "scale"] == ("F8_E8M0", blocks), name
        else:  # only scales are left
            kinds = {"weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32", "scale": "F8_E8M0"}
            assert dtype == kinds[name.rpartition(".")[2]], name
    assert sum(dtype == "F8_E8M0" for dtype, _ in header.values()) == 4 * (5 + 3) + 2  # and wq_b of two indexers


def test_l3_config_is_deepseek_style(made: SimpleNamespace) -> None:
    config = read_json(made.L3 / "config.json")
    assert (config["compress_ratios"], config["num_hash_layers"]) == ([0, 4, 128, 4], 1)
    assert (config["topk_method"], config["expert_dtype"]) == ("noaux_tc", "fp4")
    assert config["rope_scaling"]["type"] == "yarn"
    assert config["moe_intermediate_size"] == 128
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128], "moe_quant_algo": "NVFP4",
    }  # fmt: skip
    assert not {"layer_types", "mlp_layer_types", "rope_parameters"} & set(config)
    assert not (made.L3 / "hf_quant_config.json").exists()


@pytest.mark.parametrize("layout", ["bare", "L3"])
def test_mtp_layers(tmp_path: Path, layout: str) -> None:
    make_small(tmp_path / "x", layout=layout, mtp=2, q_lora=128)
    header = read_header(tmp_path / "x" / "model.safetensors")
    modules = {re.sub(r"\.(weight|weight_scale|weight_scale_2|input_scale|scale)$", "", n) for n in header}
    attn = {f"attn.{n}" for n in ("wq_a", "wkv", "wq_b", "wo_a", "wo_b", "q_norm", "kv_norm", "attn_sink")}
    experts = {f"ffn.{e}.w{i}" for e in ("experts.0", "experts.1", "shared_experts") for i in (1, 2, 3)}
    hyper = {f"hc_{part}_{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base")}
    own = {"enorm", "hnorm", "norm", "e_proj", "h_proj", "hc_head_fn", "hc_head_base", "attn_norm", "ffn_norm"}
    expected = attn | experts | hyper | own | {"ffn.gate", "ffn.gate.bias"}
    # "scale" is a leaf here and a tensor of its own in a hyper-connection: checked apart.
    modules = {m for m in modules if not re.search(r"hc_\w+_scale$", m)}
    for i in range(2):
        p = f"mtp.{i}."
        assert {m.removeprefix(p) for m in modules if m.startswith(p)} == expected
        assert {p + f"hc_{part}_scale" for part in ("attn", "ffn", "head")} <= set(header)
        assert header[p + "e_proj.weight"] == (("F8_E4M3", (64, 64)) if layout == "L3" else ("U8", (64, 32)))
        assert header[p + "ffn.experts.1.w2.weight"][0] == "U8"
    config = read_json(tmp_path / "x" / "config.json")
    assert config["num_nextn_predict_layers"] == 2
    if layout == "L3":
        assert config["compress_ratios"] == [4, 0, 0]
    else:
        assert "mtp.1.ffn.gate" in config["quantization_config"]["ignore"]


# Values


def test_nvfp4_linears_are_the_drawn_weights(made: SimpleNamespace) -> None:
    tensors = read_tensors(made.bare)
    spec = tiny.TinySpec(layout="bare")
    checked = 0
    for group in tiny.plan(spec):
        for item in group:
            if item.kind(spec) != "NVFP4" or ".experts." in item.name:
                continue
            w, w_q = tiny._draw(item, spec), dequantized(tensors, item.name.removesuffix(".weight"))
            assert w.shape == w_q.shape == item.shape
            assert abs(w.std().item() * w.shape[1] ** 0.5 - 1) < 0.08, item.name
            error = (w_q - w).pow(2).sum(1).sqrt() / w.pow(2).sum(1).sqrt()
            # NVFP4 of normal numbers: 9.5 % RMS; a row of 64 values strays further than the whole matrix.
            assert (w_q - w).norm() / w.norm() < 0.105, item.name
            assert error.max() < 0.2, item.name
            checked += 1
    assert checked == 4 * (4 + 3) + 2 * 6 + 2


def test_input_scales_are_plausible_and_constants_are_set(made: SimpleNamespace) -> None:
    tensors = read_tensors(made.L2)
    amax = torch.stack([t for n, t in tensors.items() if n.endswith("input_scale")]) * 2688
    assert 8 <= amax.min() < amax.max() <= 20
    for name, t in tensors.items():
        if name.endswith(("norm.weight", "hc_attn_scale")):
            assert torch.equal(t, torch.ones_like(t)), name
    # A loader that drops one of these must change the answers.
    for name in ("model.layers.1.ffn.gate.bias", "model.layers.1.attn.compressor.ape", "model.layers.0.attn.attn_sink"):
        assert tensors[name].std() > 0.05


def test_hash_table_gives_distinct_experts(made: SimpleNamespace) -> None:
    table = read_tensors(made.L2)["model.layers.0.ffn.gate.tid2eid"]
    assert table.dtype == torch.int64
    assert (table.min(), table.max()) == (0, 31)
    assert all(len(set(row)) == 6 for row in table.tolist())
    assert len({tuple(row) for row in table.tolist()}) > 16  # rows differ, or routing by token would be no routing


def test_fp8_blocks_are_the_drawn_weights(made: SimpleNamespace, tmp_path: Path) -> None:
    make_small(tmp_path / "l3", layout="L3", hidden=144, q_lora=128)
    make_small(tmp_path / "bare", layout="bare", hidden=144, q_lora=128)
    for l3_dir, bare_dir in ((made.L3, made.bare), (tmp_path / "l3", tmp_path / "bare")):
        l3, bare = read_tensors(l3_dir), read_tensors(bare_dir)
        w, codes = (tensors["layers.0.attn.wo_a.weight"].float() for tensors in (bare, l3))
        s = (
            l3["layers.0.attn.wo_a.scale"]
            .float()
            .repeat_interleave(128, 0)
            .repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
        )
        # Half a step of e4m3: 1/16 of the value, or below its normal range 2^-6 half of 2^-9, in units of the scale.
        assert ((codes * s - w).abs() <= (w.abs() / 16).maximum(s * 2.0**-10)).all()
        assert (
            224 <= codes.abs().amax() <= 448
        )  # the smallest sufficient power of two: the upper half of the range is used
        assert torch.equal(l3["layers.0.ffn.gate.weight"], bare["layers.0.ffn.gate.weight"].bfloat16())
    assert l3["layers.0.attn.wkv.scale"].shape == (4, 2)  # 512 x 144: the ragged 16 columns have blocks of their own


def test_fp8_blocks_of_known_matrices() -> None:
    w = torch.zeros(129, 130)
    w[0, 0], w[128, 0], w[0, 129] = 448.0, -449.0, 1.0
    w[128, 129] = 448.0 * 2.0**-10 * (1 + 2.0**-23)  # an ulp above: log2 of w / 448 rounds to -10
    codes, scale = tiny._fp8_blocks(w)
    assert scale.dtype == torch.float8_e8m0fnu
    assert scale.float()[:, 0].tolist() == [1.0, 2.0]
    assert scale.float()[:, 1].tolist() == [2.0**-8, 2.0**-10]  # 1 / 448 rounded up to a power of two
    assert codes[[0, 128, 0, 128], [0, 0, 129, 129]].tolist() == [448.0, -224.0, 256.0, 448.0]
    assert codes.float().count_nonzero() == 4  # NaN would count


# Determinism and shards


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        make_small(tmp_path / name, seed=seed)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert {file for file in a if a[file] != c[file]} == {"model.safetensors"}
    first, other = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "c")
    drawn = [n for n, t in first.items() if t.numel() > 1 and not n.endswith(("norm.weight", "_scale"))]
    assert len(drawn) > 30
    assert not [n for n in drawn if raw(first[n]) == raw(other[n])]


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    make_small(tmp_path / "one")
    make_small(tmp_path / "three", shards=3)
    one, three = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "three")
    assert {n: raw(t) for n, t in one.items()} == {n: raw(t) for n, t in three.items()}
    index = read_json(tmp_path / "three" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    headers = {file: read_header(tmp_path / "three" / file) for file in files}
    assert {n: file for file, header in headers.items() for n in header} == index["weight_map"]
    assert sorted(f.name for f in (tmp_path / "three").glob("*.safetensors")) == files
    sizes = [f.stat().st_size for f in (tmp_path / "three").glob("*.safetensors")]
    assert max(sizes) < 2 * min(sizes)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_most_shards_is_one_group_each(tmp_path: Path) -> None:
    num_groups = len(tiny.plan(tiny.TinySpec(**SMALL)))
    make_small(tmp_path / "x", shards=num_groups)
    files = list((tmp_path / "x").glob("*.safetensors"))
    assert len(files) == num_groups
    assert min(len(read_header(file)) for file in files) > 0


def test_memory_holds_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = tiny.save_file, []

    def save(tensors: dict[str, torch.Tensor], *args: object, **kwargs: object) -> None:
        assert [ref for ref in seen if ref() is not None] == []
        seen.extend(weakref.ref(t) for t in tensors.values())
        real(tensors, *args, **kwargs)

    monkeypatch.setattr(tiny, "save_file", save)
    make_small(tmp_path / "x", shards=3)
    assert len(seen) == len(read_tensors(tmp_path / "x"))


def test_defaults_take_seconds(made: SimpleNamespace) -> None:
    for layout, line in made.lines.items():
        found = re.fullmatch(r"(\S+): layout (\w+), (\d+) tensors, (\d+) bytes, ([\d.]+) s", line)
        assert found, line
        directory = getattr(made, layout)
        assert (Path(found[1]), found[2]) == (directory, layout)
        assert int(found[3]) == len(read_header(directory / "model.safetensors"))
        assert int(found[4]) == sum(f.stat().st_size for f in directory.iterdir())
        assert float(found[5]) < 5


# Tokenizer


def test_tokenizer_round_trips_bytes_and_special_tokens(made: SimpleNamespace) -> None:
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(made.L2)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ids = tok.convert_tokens_to_ids(alphabet)
    assert len(alphabet) == len(set(ids)) == 256
    assert tok.convert_ids_to_tokens(ids) == alphabet
    # Every byte that UTF-8 has: all first, and all following bytes.
    text = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 0x110000, 4093))))
    assert len(set(text.encode())) == 256 - 13
    encoded = tok.encode(text, add_special_tokens=False)
    assert len(encoded) == len(text.encode())
    assert tok.decode(encoded) == text
    added = (*tiny.SPECIAL_TOKENS, *tiny.VISIBLE_TOKENS)
    encoded = tok.encode("x".join(added), add_special_tokens=False)
    assert len(encoded) == 2 * len(added) - 1
    assert tok.decode(encoded) == "x".join(added)
    assert (tok.bos_token_id, tok.eos_token_id) == (0, 1)
    assert max(tok.get_vocab().values()) == len(tok) - 1 == tiny.MIN_VOCAB - 1
    assert tok.decode(encoded, skip_special_tokens=True).strip("x") == "x".join(tiny.VISIBLE_TOKENS)


def test_tokens_of_vllm_chat_encoding_are_single(made: SimpleNamespace) -> None:
    from transformers import AutoTokenizer

    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    # Loaded by its path: importing vLLM takes seconds, and this file needs nothing of it.
    encoding = load_file(folder / "tokenizers" / "deepseek_v4_encoding.py", "deepseek_v4_encoding")
    tokens = {v for n, v in vars(encoding).items() if n.endswith(("_token", "_SP_TOKEN")) and isinstance(v, str)}
    tokens |= set(encoding.DS_TASK_SP_TOKENS.values())
    assert len(tokens) == 14
    tok = AutoTokenizer.from_pretrained(made.L2)
    assert {t: len(tok.encode(t, add_special_tokens=False)) for t in tokens} == dict.fromkeys(tokens, 1)
    # The parser throws away what all_special_tokens names: the tool call's mark must not be among them.
    assert tok.all_special_tokens == [encoding.bos_token, encoding.eos_token]
    parser = (folder / "parser" / "deepseek_v4.py").read_text(encoding="utf-8")
    for name, token in re.findall(r'^(_DSML|DSML_THINK_START|DSML_THINK_END) = "([^"]+)"$', parser, re.M):
        assert token in tiny.VISIBLE_TOKENS, name


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 250}, r"hidden.*\[250\]; expected multiples of 16"),
        ({"intermediate": 40}, r"intermediate.*\[40\]; expected multiples of 16"),
        ({"q_lora": 8}, r"q_lora.*\[8\]"),
        ({"o_lora": 12}, r"o_lora is \[24\]"),
        ({"o_groups": 3}, "o_groups is 3; expected a divisor of heads, 8"),
        ({"topk": 33}, "topk is 33; expected at most experts, 32"),
        ({"layers": (0, 8)}, r"ratios \[8\]; expected one or more of 0, 4, 128"),
        ({"layers": ()}, "ratios none"),
        ({"vocab": 269}, "vocab is 269; expected at least 270"),
        ({"hash_layers": 5}, "hash_layers is 5 of 4 layers"),
        ({"layout": "L3", "intermediate": 64}, "intermediate is 64.*multiples of 128"),
        ({"layout": "L3", "q_lora": 64}, "q_lora 64.*multiples of 128"),
        ({"layout": "L2", "mtp": 1}, "mtp is 1 in L2; expected bare or L3"),
        ({"layout": "L1", "mtp": 1}, "mtp is 1 in L1"),
        ({"layout": "L4"}, "layout is 'L4'"),
        ({"indexer_spelling": "x"}, "indexer_spelling is 'x'"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
        ({"heads": 0}, "heads is 0; expected at least 1"),
        ({"shards": 0}, "shards is 0"),
        ({"shards": 10000}, "shards is 10000; expected at most"),
    ],
)
def test_bad_sizes_are_refused(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.make_tiny_checkpoint(tmp_path / "x", tiny.TinySpec(**fields))
    assert list(tmp_path.iterdir()) == []


def test_least_vocabulary_is_enough(tmp_path: Path) -> None:
    make_small(tmp_path / "x", vocab=tiny.MIN_VOCAB)
    assert read_header(tmp_path / "x" / "model.safetensors")["head.weight"][1] == (tiny.MIN_VOCAB, 64)


@pytest.mark.parametrize(
    "flags", [["--topk", "33"], ["--layers", "0,x"], ["--layers", "7"], ["--layout", "L9"], ["--no"]]
)
def test_bad_flags_exit_2(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tiny.main([str(tmp_path / "x"), *flags])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_runs_from_anywhere(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    flags = small_flags(layers=(4, 0), q_lora=128, layout="L3", mtp=1, shards=2, hash_layers=2)
    args = [sys.executable, str(SCRIPT), "deep/er/x", *flags]
    done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'deep/er/x'}: layout L3, ")
    assert done.stdout.count("\n") == 1
    assert read_json(tmp_path / "deep/er/x/config.json")["num_hash_layers"] == 2
    assert [f.name for f in (tmp_path / "deep/er").iterdir()] == ["x"]


def cli(out: Path, *flags: str) -> int:
    return tiny.main([str(out), *small_flags(), *flags])


def test_taken_target_is_refused_and_overwrite_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x"
    out.mkdir()
    assert cli(out) == 0  # empty: free to take
    (out / "mine.txt").write_text("keep")
    before = digests(out)
    assert cli(out, "--seed", "1") == 1
    assert f"{out} is not empty; give another path, or --overwrite" in capsys.readouterr().err
    assert digests(out) == before
    assert cli(out, "--seed", "1", "--overwrite") == 0
    assert not (out / "mine.txt").exists()
    assert digests(out)["model.safetensors"] != before["model.safetensors"]
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_overwrite_spares_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("keep")
    (tmp_path / "file").write_text("keep")
    assert cli(tmp_path / "home", "--overwrite") == 1
    assert "has no config.json, so it is no checkpoint" in capsys.readouterr().err
    assert cli(tmp_path / "file", "--overwrite") == 1
    assert "Not a directory" in capsys.readouterr().err
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")) == ["file", "home", "home/thesis.tex"]


def test_full_disk_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(tmp_path / "fits") == 0
    size = sum(f.stat().st_size for f in (tmp_path / "fits").iterdir())
    asked = []
    monkeypatch.setattr(tiny.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=12345))
    assert cli(tmp_path / "new" / "x") == 1
    error = capsys.readouterr().err
    found = re.search(rf"{tmp_path}/new/x needs (\d+) bytes, {tmp_path} has 12345 free", error)
    assert found, error
    assert "Traceback" not in error
    needed, tensors = int(found[1]), sum(t.nbytes for t in read_tensors(tmp_path / "fits").values())
    assert needed >= size
    assert needed == tensors + 512 * len(read_tensors(tmp_path / "fits")) + (16 << 20)
    assert asked == [tmp_path]
    assert [f.name for f in tmp_path.iterdir()] == ["fits"]
    monkeypatch.setattr(tiny.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    assert cli(tmp_path / "new" / "x") == 0


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "os error 28"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    failure: BaseException, status: int, message: str, overwrite: bool,
) -> None:  # fmt: skip
    out, real, calls = tmp_path / "x", tiny.save_file, []
    before = {}
    if overwrite:
        assert cli(out) == 0
        before = digests(out)
        capsys.readouterr()

    def save(tensors: dict[str, torch.Tensor], file: Path, **kwargs: object) -> None:
        calls.append(file)
        if len(calls) == 2:
            file.write_bytes(b"half a shard")
            raise failure
        real(tensors, file, **kwargs)

    monkeypatch.setattr(tiny, "save_file", save)
    assert cli(out, "--shards", "3", "--seed", "1", *["--overwrite"] * overwrite) == status
    assert len(calls) == 2
    out_text, err_text = capsys.readouterr()
    assert out_text == ""
    assert message in err_text
    assert "Traceback" not in err_text
    assert [f.name for f in tmp_path.iterdir()] == (["x"] if overwrite else [])
    assert not overwrite or digests(out) == before


def test_failure_of_the_last_step_restores_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "x", os.replace
    assert cli(out) == 0
    before = digests(out)

    def replace(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(tiny.os, "replace", replace)
    assert cli(out, "--seed", "1", "--overwrite") == 1
    assert digests(out) == before
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_a_directory_filled_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "x", tiny.save_file

    def save(tensors: dict[str, torch.Tensor], file: Path, **kwargs: object) -> None:
        real(tensors, file, **kwargs)
        out.mkdir()
        (out / "theirs").write_text("keep")

    monkeypatch.setattr(tiny, "save_file", save)
    assert cli(out) == 1
    assert [str(f.relative_to(tmp_path)) for f in sorted(tmp_path.rglob("*"))] == ["x", "x/theirs"]


def test_files_are_readable_by_other_users(made: SimpleNamespace) -> None:
    assert made.L2.stat().st_mode & 0o777 == 0o755
    assert (made.L2 / "model.safetensors").stat().st_mode & 0o777 == 0o644
