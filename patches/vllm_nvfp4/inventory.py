"""Which format each module of a checkpoint has, decided from its tensors; and every reason why it cannot be served.

`ignore` lists are not consulted: ModelOpt 0.47 leaves wo_a in high precision without listing it, and lists names that
no tensor has. A module is NVFP4 if and only if it has a `weight_scale_2`. One survey finds every problem: a load refuses
with the first, the doctor reports them all.
"""

import enum
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_nvfp4 import architecture, names
from vllm_nvfp4.checkpoint import CheckpointError, Tensor

MAX_LISTED = 5


class Format(enum.StrEnum):
    """How a linear's weight is stored."""

    NVFP4 = "NVFP4"
    FP8_BLOCK = "FP8 block 128x128"
    HIGH = "high precision"


# Leaves and dtypes of each quantized format; the shape of a leaf follows from the weight's (n, k).
NVFP4_LEAVES = {
    "weight": torch.uint8,
    "weight_scale": torch.float8_e4m3fn,
    "weight_scale_2": torch.float32,
    "input_scale": torch.float32,
}
FP8_LEAVES = {"weight": (torch.float8_e4m3fn,), "weight_scale_inv": (torch.float8_e8m0fnu, torch.float32)}
HIGH_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)


class Kind(enum.StrEnum):
    """What is wrong with a tensor, or with a set of them."""

    MISSING = "missing"
    UNEXPECTED = "unexpected"
    DTYPE = "wrong dtype"
    SHAPE = "wrong shape"
    STRAY_SCALE = "scale of another format"
    MIXED = "mixed formats"


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse a checkpoint: the tensors or modules concerned, what was found, and the whole message."""

    kind: Kind
    names: tuple[str, ...]
    found: str
    message: str


@dataclass(frozen=True)
class Survey:
    """formats as in Inventory, of the modules that have one; num_mtp_layers; problems in the order of the checks."""

    formats: dict[str, Format]
    num_mtp_layers: int
    problems: list[Problem]


@dataclass(frozen=True)
class Inventory:
    """layout and the evidence for it; formats: canonical module -> Format, routed experts as one `...ffn.experts`."""

    layout: names.Layout
    evidence: str
    formats: dict[str, Format] = field(default_factory=dict)
    num_mtp_layers: int = 0

    def format_of(self, modules: tuple[str, ...]) -> Format:
        """The one format of the modules that vLLM fuses into one.

        Raises: CheckpointError - they differ, or one is not in the checkpoint.
        """
        unknown = [m for m in modules if m not in self.formats]
        if unknown:
            raise CheckpointError(
                f"the model asks for {unknown[0]}, which the checkpoint ({self.layout}) does not have"
            )
        formats = {m: self.formats[m] for m in modules}
        if len(set(formats.values())) > 1:
            listed = ", ".join(f"{m} is {f}" for m, f in formats.items())
            raise CheckpointError(
                f"mixed quantization inside one fused module: {listed}. vLLM computes them as one matrix; "
                "export them in the same format"
            )
        return next(iter(formats.values()))


def canonical_names(tensors: Mapping[str, Tensor], num_hidden_layers: int) -> dict[str, str]:
    """canonical name -> the checkpoint's name, for every tensor that is not dropped on purpose.

    Raises: CheckpointError - two tensors with one meaning; names.UnknownNameError - a name that no rule covers.
    """
    found: dict[str, str] = {}
    for name in tensors:
        canonical = names.canonical(name, num_hidden_layers)
        if canonical is None:
            continue
        if canonical in found:
            raise CheckpointError(f"{found[canonical]} and {name} are both {canonical}; remove one from the checkpoint")
        found[canonical] = name
    return found


def take_inventory(tensors: Mapping[str, Tensor], config: Any) -> Inventory:
    """Layout and formats of a checkpoint, after checking that it is complete and its shapes fit the configuration.

    Args:
        tensors: checkpoint name -> header entry, from checkpoint.read_folder or read_hub.
        config: DeepSeek-V4 configuration, with vLLM's field names (compress_ratios, num_hash_layers).
    Raises: CheckpointError - missing or unexpected tensors, wrong shape or dtype, a quantized weight without its scale,
        or mixed quantization inside a fused module; names.UnknownLayoutError, names.UnknownNameError.
    """
    layout, evidence = names.detect_layout(tensors)
    found = survey(tensors, canonical_names(tensors, config.num_hidden_layers), config)
    if found.problems:
        raise CheckpointError(found.problems[0].message)
    return Inventory(layout, evidence, found.formats, found.num_mtp_layers)


def survey(tensors: Mapping[str, Tensor], by_canonical: Mapping[str, str], config: Any) -> Survey:
    """Every module's format, and everything that is wrong; raises nothing for a bad checkpoint.

    Args:
        tensors: checkpoint name -> header entry. by_canonical: canonical name -> checkpoint name.
        config: as for take_inventory.
    Raises: ValueError - the configuration lacks a field.
    """
    num_mtp, problems = _num_mtp_layers(by_canonical, config.num_hidden_layers)
    wanted = architecture.expected(config, num_mtp)
    stray = {name for problem in problems for name in problem.names}
    plain, modules, unexpected = _split({c: n for c, n in by_canonical.items() if n not in stray}, wanted)
    problems += unexpected
    problems += _plain_problems(tensors, plain, wanted)
    of_linear: dict[str, Format] = {}
    for module, (n, k) in wanted.linears.items():
        leaves = {leaf: (name, tensors[name]) for leaf, name in modules.get(module, {}).items()}
        found, wrong = _linear_format(module, leaves, n, k)
        problems += wrong
        if found is not None:
            of_linear[module] = found
    formats, mixed = _of_whole_layers(of_linear)
    return Survey(formats, num_mtp, problems + mixed + list(_fused_problems(formats)))


def _of_whole_layers(of_linear: Mapping[str, Format]) -> tuple[dict[str, Format], list[Problem]]:
    """Formats with all routed experts of a layer as one; the experts that differ from most of their layer."""
    keys = {}
    for module in of_linear:
        expert = names.parse_expert(f"{module}.weight")
        keys[module] = f"{expert.layer}.ffn.experts" if expert else module
    votes: dict[str, Counter[Format]] = {}
    for module, found in of_linear.items():
        votes.setdefault(keys[module], Counter())[found] += 1
    formats = {key: counter.most_common(1)[0][0] for key, counter in votes.items()}
    problems = [
        Problem(
            Kind.MIXED, (module,), f"{found}; other experts of its layer {formats[keys[module]]}",
            f"mixed quantization inside one fused module: {module} is {found}, other experts of {keys[module]} are "
            f"{formats[keys[module]]}; export all experts of a layer in the same format",
        )
        for module, found in of_linear.items()
        if found != formats[keys[module]]
    ]  # fmt: skip
    return formats, problems


def _fused_problems(formats: Mapping[str, Format]) -> Iterator[Problem]:
    """Modules that vLLM computes as one matrix, but that have different formats."""
    inventory = Inventory(names.Layout.L2, "", dict(formats))
    for module in formats:
        fused = names.fused(f"{module}.weight")
        if fused is None or fused[1] != 0:  # each fused module once, at its first shard
            continue
        shards = names.module_of(fused[0].removesuffix(".weight"))
        if any(shard not in formats for shard in shards):
            continue  # its weight is missing, which has been said
        try:
            inventory.format_of(shards)
        except CheckpointError as error:
            listed = ", ".join(f"{shard} is {formats[shard]}" for shard in shards)
            yield Problem(Kind.MIXED, shards, listed, str(error))


def _num_mtp_layers(by_canonical: Mapping[str, str], num_hidden_layers: int) -> tuple[int, list[Problem]]:
    """How many MTP layers there are, which must be the first ones: a stray number must not size the tables."""
    layers: dict[int, list[str]] = {}
    for canonical, name in by_canonical.items():
        if canonical.startswith("mtp."):
            layers.setdefault(int(canonical.split(".")[1]), []).append(name)
    stray = sorted(set(layers) - set(range(len(layers))))
    if not stray:
        return len(layers), []
    message = (
        f"{layers[stray[0]][0]} belongs to MTP layer {stray[0]}, but the checkpoint has {len(layers)} MTP layers; "
        f"is num_hidden_layers ({num_hidden_layers}) right, and is every shard there?"
    )
    strays = tuple(name for layer in stray for name in layers[layer])
    present = next(i for i in range(len(layers)) if i not in layers)
    return present, [Problem(Kind.UNEXPECTED, strays, f"MTP layer {stray[0]}", message)]


def _split(
    by_canonical: Mapping[str, str], wanted: architecture.Expected
) -> tuple[dict[str, str], dict[str, dict[str, str]], list[Problem]]:
    """Tensors that stand alone, linears' leaves by module, and what is neither."""
    plain: dict[str, str] = {}
    modules: dict[str, dict[str, str]] = {}
    unexpected = []
    for canonical, name in by_canonical.items():
        module, leaf = names.split_leaf(canonical)
        if canonical in wanted.tensors:
            plain[canonical] = name
        elif module in wanted.linears:
            modules.setdefault(module, {})[leaf] = name
        else:
            unexpected.append(name)
    if not unexpected:
        return plain, modules, []
    message = (
        f"{len(unexpected)} tensors do not belong to the model that config.json describes: {_listed(unexpected)}; "
        "check num_hidden_layers, n_routed_experts and compress_ratios"
    )
    return plain, modules, [Problem(Kind.UNEXPECTED, tuple(unexpected), "not in the model", message)]


def _plain_problems(
    tensors: Mapping[str, Tensor], plain: Mapping[str, str], wanted: architecture.Expected
) -> list[Problem]:
    """Presence, type and shape of everything that is no linear."""
    problems = []
    missing = sorted(set(wanted.tensors) - set(plain) - wanted.optional)
    if missing:
        message = f"{len(missing)} tensors are missing: {_listed(missing)}; export or download them again"
        problems.append(Problem(Kind.MISSING, tuple(missing), "missing", message))
    for canonical, name in plain.items():
        # A loader would convert any type to the parameter's: FP8 without its scale would pass for numbers.
        dtypes = INDEX_DTYPES if canonical.endswith(".tid2eid") else HIGH_DTYPES
        problems += _tensor_problems(name, tensors[name], dtypes, wanted.tensors[canonical])
    return problems


def _linear_format(
    module: str, leaves: Mapping[str, tuple[str, Tensor]], n: int, k: int
) -> tuple[Format | None, list[Problem]]:
    """The format of one linear (None without a weight), with every leaf's presence, dtype and shape checked."""
    if "weight" not in leaves:
        again = f"{module}.weight is missing; export or download the checkpoint again"
        return None, [Problem(Kind.MISSING, (f"{module}.weight",), "missing", again)]
    name, weight = leaves["weight"]
    shapes: dict[str, tuple[int, ...]]
    allowed: dict[str, tuple[torch.dtype, ...]]
    if "weight_scale_2" in leaves or "weight_scale" in leaves or weight.dtype == torch.uint8:
        found = Format.NVFP4
        allowed = {leaf: (dtype,) for leaf, dtype in NVFP4_LEAVES.items()}
        shapes = {"weight": (n, k // 2), "weight_scale": (n, k // architecture.BLOCK_SIZE)}
        shapes |= {"weight_scale_2": (), "input_scale": ()}
        why = (
            f"but {name} is {weight.dtype} as NVFP4 packs it; a missing scale cannot be guessed: export the checkpoint "
            "again"
        )
    elif "weight_scale_inv" in leaves or weight.dtype == torch.float8_e4m3fn:
        found, allowed = Format.FP8_BLOCK, FP8_LEAVES
        shapes = {"weight": (n, k), "weight_scale_inv": (-(-n // 128), -(-k // 128))}
        why = f"but {name} is FP8; export the checkpoint again"
    else:
        found, allowed, shapes, why = Format.HIGH, {"weight": HIGH_DTYPES}, {"weight": (n, k)}, ""
    problems: list[Problem] = []
    # The checkpoint's own spelling of the leaf that is not there, from that of the weight.
    stem = name.removesuffix("weight") if found is Format.NVFP4 else f"{module}."
    for leaf, dtypes in allowed.items():
        if leaf in leaves:
            problems += _tensor_problems(*leaves[leaf], dtypes, shapes[leaf])
        else:
            absent = f"{stem}{leaf}"
            problems.append(Problem(Kind.MISSING, (absent,), "missing", f"{absent} is missing, {why}"))
    for leaf in sorted(set(leaves) - set(allowed)):
        stray, tensor = leaves[leaf]
        message = f"{tensor.file}: {stray} has no meaning for {name}, which is {found}; export the checkpoint again"
        problems.append(Problem(Kind.STRAY_SCALE, (stray,), f"beside {found}", message))
    return found, problems


def _tensor_problems(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> Iterator[Problem]:
    """Wrong type, wrong shape."""
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes)
        message = f"{tensor.file}: {name} is {tensor.dtype}, expected {expected}; export it again"
        yield Problem(Kind.DTYPE, (name,), f"{tensor.dtype}, expected {expected}", message)
    # A scalar may be stored as () or (1,): exporters differ, the meaning does not.
    if tensor.shape != shape and not (shape == () and tensor.shape == (1,)):
        message = (
            f"{tensor.file}: {name} has shape {tensor.shape}, expected {shape} from config.json; "
            "the file and the configuration are not of one model"
        )
        yield Problem(Kind.SHAPE, (name,), f"{tensor.shape}, expected {shape}", message)


def _listed(items: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more
