"""Which kernels a deployment of DeepSeek-V4 can call: a closed set, from a model's sizes alone.

The hard part is that "can" covers everything nobody knows when kernels are built: how many tokens a step will have, whether
experts are cut or dealt out, the type of the router's ids, how a tensor is aligned. What depends on the number of tokens is
a configuration, never a size in the code, and each kernel's `choose_config` has a handful of those. So the set is found by
asking `choose_config` for every shape of the model and enough numbers of tokens; tests/cpu/test_deployment.py asks for
every number up to MAX_TOKENS and beyond, and holds the set to the same few.

A kernel joins by one line in FAMILIES. Its module has `compiled(config)`, as all have, and its configurations come from
`variants(deployment)` in the module itself, or from a function here.
"""

import importlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Of one step, as vLLM 0.32 allows by default on the largest GPUs; more tokens choose what this many choose.
MAX_TOKENS = 16384
_BLOCK = 128


@dataclass(frozen=True)
class Model:
    """Sizes of a DeepSeek-V4 model, before any parallel split.

    Attributes:
        name: for messages.
        hidden_size, q_lora_rank, head_dim, rope_dim, num_heads, o_groups, o_lora_rank: of attention.
        index_head_dim, index_num_heads: of the indexer, in layers whose ratio is 4.
        intermediate_size: of an expert.
        num_experts, num_shared_experts, top_k: of the mixture of experts.
        ratios: compression of each layer's attention, 0 for none.
        num_mtp_layers: behind the last layer.
    """

    name: str
    hidden_size: int
    q_lora_rank: int
    head_dim: int
    rope_dim: int
    num_heads: int
    o_groups: int
    o_lora_rank: int
    index_head_dim: int
    index_num_heads: int
    intermediate_size: int
    num_experts: int
    num_shared_experts: int
    top_k: int
    ratios: tuple[int, ...]
    num_mtp_layers: int


# Fields of config.json, in the spelling of its publisher.
_FIELDS = {
    "hidden_size": "hidden_size",
    "q_lora_rank": "q_lora_rank",
    "head_dim": "head_dim",
    "rope_dim": "qk_rope_head_dim",
    "num_heads": "num_attention_heads",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "index_head_dim": "index_head_dim",
    "index_num_heads": "index_n_heads",
    "intermediate_size": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
}

# Source: config.json of the published models, see tests/data/configs/README.md.
MODELS = {
    "deepseek-v4-pro": Model(
        name="deepseek-v4-pro",
        hidden_size=7168,
        q_lora_rank=1536,
        head_dim=512,
        rope_dim=64,
        num_heads=128,
        o_groups=16,
        o_lora_rank=1024,
        index_head_dim=128,
        index_num_heads=64,
        intermediate_size=3072,
        num_experts=384,
        num_shared_experts=1,
        top_k=6,
        ratios=(128, *(128, 4) * 30),
        num_mtp_layers=1,
    ),
    "deepseek-v4-flash": Model(
        name="deepseek-v4-flash",
        hidden_size=4096,
        q_lora_rank=1024,
        head_dim=512,
        rope_dim=64,
        num_heads=64,
        o_groups=8,
        o_lora_rank=1024,
        index_head_dim=128,
        index_num_heads=64,
        intermediate_size=2048,
        num_experts=256,
        num_shared_experts=1,
        top_k=6,
        ratios=(0, 0, 4, *(128, 4) * 20),
        num_mtp_layers=1,
    ),
}


def model_from_config(config: Mapping[str, Any], name: str) -> Model:
    """The model that a config.json describes.

    Args:
        config: its content; `compress_ratios`, or transformers' `layer_types` with `compress_rates`.
        name: for messages.

    Raises:
        ValueError: a field is missing or no positive integer; the message names it.
    """
    sizes = {}
    for ours, theirs in _FIELDS.items():
        value = config.get(theirs)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name}: {theirs} is {value!r}, expected a positive integer; is it a DeepSeek-V4 configuration?"
            )
        sizes[ours] = value
    num_layers = config.get("num_hidden_layers")
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"{name}: num_hidden_layers is {num_layers!r}, expected a positive integer")
    ratios = config.get("compress_ratios")
    if ratios is None:
        rates = config.get("compress_rates") or {}
        ratios = [rates.get(kind, 0) for kind in config.get("layer_types") or ()]
    if len(ratios) < num_layers:
        raise ValueError(
            f"{name}: compress_ratios (or layer_types) has {len(ratios)} entries, expected one for each of {num_layers} "
            "layers"
        )
    num_mtp = int(config.get("num_nextn_predict_layers") or 0)
    return Model(name=name, **sizes, ratios=tuple(ratios[:num_layers]), num_mtp_layers=num_mtp)


def find_model(name: str) -> Model:
    """A published model by its name, or the model of a config.json, or of a folder with one.

    Raises:
        ValueError: it is neither, or the file describes no DeepSeek-V4 model.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        return model_from_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"model {name!r} is neither one of {', '.join(MODELS)} nor a readable config.json: {error}"
        ) from error


# ---- shapes on one rank ---------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """A linear on one rank: its name, n, k, and how many layers have it."""

    name: str
    n: int
    k: int
    layers: int


class Experts(NamedTuple):
    """Two grouped GEMMs of experts on one rank.

    Attributes:
        name: for tables.
        num_experts: on the rank.
        share: of all experts that is on the rank.
        top_k: experts that a token chooses among all.
        intermediate: columns of h on the rank.
        layers: that have them.
    """

    name: str
    num_experts: int
    share: float
    top_k: int
    intermediate: int
    layers: int

    @property
    def total(self) -> int:
        """Experts of all ranks."""
        return round(self.num_experts / self.share)


@dataclass(frozen=True)
class Rank:
    """One rank's part of a model.

    Attributes:
        model: the whole.
        tp: ranks that attention, the shared expert and, without ep, every expert are cut over.
        ep: experts are dealt out over the tp ranks, whole.
    """

    model: Model
    tp: int = 1
    ep: bool = False

    def check(self) -> "Rank":
        """Returns itself.

        Raises:
            ValueError: something cannot be cut by tp.
        """
        if self.tp < 1:
            raise ValueError(f"tp is {self.tp}, expected at least 1")
        model = self.model
        of_expert = ("num_experts", 1) if self.ep else ("intermediate_size", 16)
        for name, multiple in (("num_heads", 1), ("o_groups", 1), of_expert):
            if getattr(model, name) % (self.tp * multiple):
                raise ValueError(
                    f"{model.name}: {name} is {getattr(model, name)}, no multiple of {self.tp * multiple}; "
                    f"take another tp than {self.tp}"
                )
        return self

    @property
    def num_layers(self) -> int:
        """All, with those for speculation."""
        return len(self.model.ratios) + self.model.num_mtp_layers

    def linears(self) -> list[Linear]:
        """Every linear that is served in NVFP4; those that share the layer's input are one, as the overlay joins them."""
        m, tp, all_layers = self.model, self.tp, self.num_layers
        found = []
        for ratio, parts in self.input_linears().items():
            name = f"layer's input, ratio {ratio}" if ratio > 1 else parts[0].name
            if parts[0].layers:
                found.append(Linear(name, sum(part.n for part in parts), m.hidden_size, parts[0].layers))
        found += [
            Linear("wq_b", m.num_heads * m.head_dim // tp, m.q_lora_rank, all_layers),
            Linear("wo_b", m.hidden_size, m.o_groups * m.o_lora_rank // tp, all_layers),
        ]
        if 4 in m.ratios:
            n = m.index_num_heads * m.index_head_dim
            found.append(Linear("indexer wq_b", n, m.q_lora_rank, m.ratios.count(4)))
        if m.num_mtp_layers:
            found.append(Linear("e_proj, h_proj", m.hidden_size, m.hidden_size, 2 * m.num_mtp_layers))
        return found

    def input_linears(self) -> dict[int, list[Linear]]:
        """By ratio, 1 without a compressor: those that read the layer's input, each served alone if input scales differ."""
        m = self.model
        counts = {ratio: m.ratios.count(ratio) for ratio in sorted({ratio for ratio in m.ratios if ratio > 1})}
        found = {}
        for ratio, layers in {1: self.num_layers - sum(counts.values()), **counts}.items():
            rows = {"wq_a + wkv": m.q_lora_rank + m.head_dim}
            # Windows of ratio 4 overlap: keys and gates are twice as wide.
            width = 2 if ratio == 4 else 1
            if ratio > 1:
                rows["compressor"] = 2 * width * m.head_dim
            if ratio == 4:
                rows |= {"weights_proj": m.index_num_heads, "indexer compressor": 2 * width * m.index_head_dim}
            found[ratio] = [Linear(name, n, m.hidden_size, layers) for name, n in rows.items()]
        return found

    def experts(self) -> list[Experts]:
        """Routed experts, and the shared one, which all tokens go to: one expert of its own sizes."""
        m, layers = self.model, self.num_layers
        shared = m.intermediate_size * m.num_shared_experts // self.tp
        if self.ep:
            routed = Experts("experts", m.num_experts // self.tp, 1 / self.tp, m.top_k, m.intermediate_size, layers)
        else:
            routed = Experts("experts", m.num_experts, 1.0, m.top_k, m.intermediate_size // self.tp, layers)
        return [routed, Experts("shared expert", 1, 1.0, 1, shared, layers)]

    @property
    def num_groups(self) -> int:
        """Groups of wo_a."""
        return self.model.o_groups // self.tp

    @property
    def wo_a(self) -> tuple[int, int]:
        """Sizes n, k of a group of wo_a."""
        model = self.model
        return model.o_lora_rank, model.num_heads * model.head_dim // model.o_groups


@dataclass(frozen=True)
class Deployment:
    """What kernels are asked for.

    Attributes:
        ranks: every layout that must be served.
        arch: sm_100a or sm_90a.
        max_tokens: of one step.
    """

    ranks: tuple[Rank, ...]
    arch: str = "sm_100a"
    max_tokens: int = MAX_TOKENS

    def batches(self) -> list[int]:
        """Numbers of tokens to ask `choose_config` for: all small ones, then both sides of every tile's edge."""
        edges = (tokens + i for tokens in range(0, self.max_tokens, _BLOCK) for i in (0, 1))
        return sorted({*range(1, min(1024, self.max_tokens) + 1), *edges, self.max_tokens} - {0})


def deployment(model: Model, tp: Iterable[int], arch: str = "sm_100a", max_tokens: int = MAX_TOKENS) -> Deployment:
    """Each size of tensor parallelism with experts cut, and dealt out, where the model can be cut so.

    Raises:
        ValueError: a size cannot serve the model either way.
    """
    ranks = []
    for size in sorted(set(tp)):
        ways: list[Rank] = []
        refused: list[ValueError] = []
        for ep in (False, True) if size > 1 else (False,):
            try:
                ways.append(Rank(model, size, ep).check())
            except ValueError as error:
                refused.append(error)
        if not ways:
            raise refused[0]
        ranks += ways
    return Deployment(tuple(ranks), arch, max_tokens)


# ---- kernels --------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """One kernel to compile: its class, its configuration, and the module's function that compiles it."""

    kernel: type
    config: Any
    compiled: Callable[..., Callable[..., None]]


class Family(NamedTuple):
    """A kernel module of cutedsl.kernels with the class that it compiles.

    Attributes:
        module: its name there.
        kernel: the class.
        configs: gives the configurations of a deployment, where the module itself has no `variants`.
    """

    module: str
    kernel: str
    configs: Callable[[Any, Deployment], Iterable[Hashable]] | None = None

    def load(self) -> Any:
        """The module; this imports the compiler."""
        return importlib.import_module(f"cutedsl.kernels.{self.module}")

    def variants(self, asked: Deployment) -> list[Variant]:
        """This family's part of the closed set, without repetitions, in order; empty on another architecture."""
        module = self.load()
        if asked.arch not in module.ARCHS:
            return []
        configs = module.variants(asked) if self.configs is None else self.configs(module, asked)
        kernel = getattr(module, self.kernel)
        return [Variant(kernel, config, module.compiled) for config in dict.fromkeys(configs)]


def variants(asked: Deployment) -> list[Variant]:
    """The closed set: every kernel that the deployment can call.

    Raises:
        ValueError: there is no kernel for the architecture.
    """
    found = [variant for family in FAMILIES for variant in family.variants(asked)]
    if not found:
        raise ValueError(f"no kernel in cutedsl.kernels is for {asked.arch}; expected sm_100a or sm_90a")
    return found


def group_tokens(experts: Experts, tokens: int) -> int:
    """Tokens of a large group as the runners guess them."""
    from cutedsl.runners.workspace import guess_tokens

    return guess_tokens(tokens, experts.top_k, experts.total)


def _linear_shapes(rank: Rank) -> set[tuple[int, int]]:
    """n, k of each linear; of those with the layer's input both joined and alone."""
    alone = [linear for parts in rank.input_linears().values() for linear in parts]
    return {(linear.n, linear.k) for linear in [*rank.linears(), *alone]}


def _linear(module: Any, asked: Deployment) -> Iterator[Hashable]:
    shapes = {(n, k) for rank in asked.ranks for n, k in _linear_shapes(rank)}
    shapes |= {(rank.model.hidden_size, experts.intermediate) for rank in asked.ranks for experts in rank.experts()[1:]}
    for n, k in sorted(shapes):
        for m in asked.batches():
            yield module.choose_config(module.Shape(m, n, k), asked.arch)


def _grouped(module: Any, asked: Deployment) -> Iterator[Hashable]:
    for n, k, num_experts, top_k, epilogue in sorted(_grouped_shapes(module, asked)):
        for tokens in asked.batches():
            rows = padded_rows(tokens, top_k, num_experts)
            yield module.choose_config(module.Shape(rows, n, k, num_experts), epilogue, asked.arch)


def _grouped_swap(module: Any, asked: Deployment) -> Iterator[Hashable]:
    # The number of tokens decides alone, and it is a guess: every width is possible.
    for n, k, _, _, epilogue in sorted(_grouped_shapes(module, asked)):
        for tokens in module.TILES_N:
            yield module.choose_config(module.Shape(tokens, n, k), epilogue, asked.arch)


def _grouped_hopper(module: Any, asked: Deployment) -> Iterator[Hashable]:
    # Which is fastest depends on sizes as on tokens; a set that has all of them serves every model.
    for epilogue in module.EPILOGUES:
        yield from module.all_configs(epilogue, asked.arch)


def _grouped_shapes(module: Any, asked: Deployment) -> set[tuple[int, int, int, int, str]]:
    """Returns n, k, experts, top_k and epilogue of every grouped GEMM; a top_k of 0 is wo_a: all tokens to all groups."""
    shapes = set()
    for rank in asked.ranks:
        hidden = rank.model.hidden_size
        for experts in rank.experts():
            columns = experts.intermediate
            shapes.add((2 * columns, hidden, experts.num_experts, experts.top_k, module.SWIGLU_NVFP4))
            shapes.add((hidden, columns, experts.num_experts, experts.top_k, module.BF16))
        shapes.add((*rank.wo_a, rank.num_groups, 0, module.BF16))
    return shapes


def padded_rows(tokens: int, top_k: int, num_experts: int) -> int:
    """Rows of a grouped GEMM's A: choices padded by expert, or, with a top_k of 0, all tokens in every group."""
    from cutedsl.layout import max_padded_rows

    if top_k:
        return max_padded_rows(tokens * top_k, num_experts)
    return num_experts * (-(-tokens // _BLOCK) * _BLOCK)


def _quantize(module: Any, asked: Deployment) -> Iterator[Hashable]:
    # Whether a row may be loaded in 16 bytes depends on the tensor's address.
    for by_slot in (False, True):
        for load_bytes in (module.WIDE_LOAD, module.NARROW_LOAD):
            yield module.Config(by_slot, load_bytes, asked.arch).validate()


def _inverse_rope(module: Any, asked: Deployment) -> Iterator[Hashable]:
    for model in {rank.model for rank in asked.ranks}:
        for load_bytes in (module.WIDE_LOAD, module.NARROW_LOAD):
            yield module.Config(model.head_dim, model.rope_dim, load_bytes, asked.arch).validate()


def _round(module: Any, asked: Deployment) -> Iterator[Hashable]:
    # Activations are quantized or not; those that are not are copied where they are gathered, or lie badly.
    for output in (module.BF16, module.COPY):
        for by_slot in (False, True):
            for load_bytes in (module.WIDE_LOAD, module.NARROW_LOAD):
                yield module.Config(output, by_slot, load_bytes, asked.arch).validate()


def _inverse_rope_round(module: Any, asked: Deployment) -> Iterator[Hashable]:
    for model in {rank.model for rank in asked.ranks}:
        for output in module.OUTPUTS:
            for load_bytes in (module.WIDE_LOAD, module.NARROW_LOAD):
                yield module.Config(output, model.head_dim, model.rope_dim, load_bytes, asked.arch).validate()


def _route(module: Any, asked: Deployment) -> Iterator[Hashable]:
    for top_k in sorted({rank.model.top_k for rank in asked.ranks}):
        for id_bits in (32, 64):
            for mapped in sorted({False, *(rank.ep for rank in asked.ranks)}):
                for tokens in asked.batches():
                    yield module.choose_config(tokens, top_k, id_bits, mapped, asked.arch)


def _finalize(module: Any, asked: Deployment) -> Iterator[Hashable]:
    for top_k in sorted({rank.model.top_k for rank in asked.ranks}):
        for y_fp32 in (False, True):
            for shared in (False, True):
                yield module.choose_config(top_k, y_fp32, shared, asked.arch)


FAMILIES = (
    Family("linear_sm100", "LinearSm100", _linear),
    Family("grouped_gemm_sm100", "GroupedGemmSm100", _grouped),
    Family("grouped_gemm_swap_sm100", "GroupedGemmSwapSm100", _grouped_swap),
    Family("quantize_sm100", "QuantizeSm100", _quantize),
    Family("inverse_rope_quantize_sm100", "InverseRopeQuantizeSm100", _inverse_rope),
    Family("route_sm100", "RouteSm100", _route),
    Family("finalize_sm100", "FinalizeSm100", _finalize),
    Family("grouped_gemm_sm90", "GroupedGemmSm90", _grouped_hopper),
    Family("quantize_sm90", "QuantizeSm90", _round),
    Family("inverse_rope_quantize_sm90", "InverseRopeQuantizeSm90", _inverse_rope_round),
    Family("route_sm90", "RouteSm90", _route),
    Family("finalize_sm90", "FinalizeSm90", _finalize),
)
