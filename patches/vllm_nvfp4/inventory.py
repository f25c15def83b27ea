"""Which format each module of a checkpoint has, decided from its tensors; and every reason why it cannot be served.

`ignore` lists are not consulted: ModelOpt 0.47 leaves wo_a in high precision without listing it, and lists names that
no tensor has. A module is NVFP4 if and only if it has a `weight_scale_2`.
"""

import enum
from collections.abc import Mapping
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
    by_canonical = canonical_names(tensors, config.num_hidden_layers)
    num_mtp = _num_mtp_layers(by_canonical, config.num_hidden_layers)
    wanted = architecture.expected(config, num_mtp)
    plain, modules = _split(by_canonical, wanted)
    _check_plain(tensors, plain, wanted)
    formats: dict[str, Format] = {}
    for module, (n, k) in wanted.linears.items():
        leaves = {leaf: (name, tensors[name]) for leaf, name in modules.get(module, {}).items()}
        found = _linear_format(module, leaves, n, k)
        expert = names.parse_expert(f"{module}.weight")
        key = f"{expert.layer}.ffn.experts" if expert else module
        if formats.setdefault(key, found) != found:
            raise CheckpointError(
                f"mixed quantization inside one fused module: {module} is {found}, other experts of {key} are "
                f"{formats[key]}; export all experts of a layer in the same format"
            )
    inventory = Inventory(layout, evidence, formats, num_mtp)
    for module in formats:
        fused = names.fused(f"{module}.weight")
        if fused:
            inventory.format_of(names.module_of(fused[0].removesuffix(".weight")))
    return inventory


def _num_mtp_layers(by_canonical: Mapping[str, str], num_hidden_layers: int) -> int:
    """How many MTP layers there are, which must be the first ones: a stray number must not size the tables."""
    found = {int(name.split(".")[1]): by_canonical[name] for name in by_canonical if name.startswith("mtp.")}
    stray = sorted(set(found) - set(range(len(found))))
    if stray:
        raise CheckpointError(
            f"{found[stray[0]]} belongs to MTP layer {stray[0]}, but the checkpoint has {len(found)} MTP layers; "
            f"is num_hidden_layers ({num_hidden_layers}) right, and is every shard there?"
        )
    return len(found)


def _split(
    by_canonical: Mapping[str, str], wanted: architecture.Expected
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Tensors that stand alone, and linears' leaves by module; refuses what is neither."""
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
    if unexpected:
        raise CheckpointError(
            f"{len(unexpected)} tensors do not belong to the model that config.json describes: {_listed(unexpected)}; "
            "check num_hidden_layers, n_routed_experts and compress_ratios"
        )
    return plain, modules


def _check_plain(tensors: Mapping[str, Tensor], plain: Mapping[str, str], wanted: architecture.Expected) -> None:
    """Presence, type and shape of everything that is no linear."""
    missing = sorted(set(wanted.tensors) - set(plain) - wanted.optional)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing: {_listed(missing)}; export or download them again")
    for canonical, name in plain.items():
        # A loader would convert any type to the parameter's: FP8 without its scale would pass for numbers.
        _check_dtype(name, tensors[name], INDEX_DTYPES if canonical.endswith(".tid2eid") else HIGH_DTYPES)
        _check_shape(name, tensors[name], wanted.tensors[canonical])


def _linear_format(module: str, leaves: Mapping[str, tuple[str, Tensor]], n: int, k: int) -> Format:
    """The format of one linear, with every leaf's presence, dtype and shape checked."""
    if "weight" not in leaves:
        raise CheckpointError(f"{module}.weight is missing; export or download the checkpoint again")
    name, weight = leaves["weight"]
    if "weight_scale_2" in leaves or "weight_scale" in leaves or weight.dtype == torch.uint8:
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (n, k // 2),
            "weight_scale": (n, k // architecture.BLOCK_SIZE),
            "weight_scale_2": (),
            "input_scale": (),
        }
        for leaf, dtype in NVFP4_LEAVES.items():
            if leaf not in leaves:
                raise CheckpointError(
                    f"{name.removesuffix('weight')}{leaf} is missing, but {name} is {weight.dtype} as NVFP4 packs it; "
                    "a missing scale cannot be guessed: export the checkpoint again"
                )
            _check_dtype(*leaves[leaf], (dtype,))
            _check_shape(*leaves[leaf], shapes[leaf])
        _refuse_leaves(leaves, set(NVFP4_LEAVES), Format.NVFP4)
        return Format.NVFP4
    if "weight_scale_inv" in leaves or weight.dtype == torch.float8_e4m3fn:
        shapes = {"weight": (n, k), "weight_scale_inv": (-(-n // 128), -(-k // 128))}
        for leaf, dtypes in FP8_LEAVES.items():
            if leaf not in leaves:
                raise CheckpointError(f"{module}.{leaf} is missing, but {name} is FP8; export the checkpoint again")
            _check_dtype(*leaves[leaf], dtypes)
            _check_shape(*leaves[leaf], shapes[leaf])
        _refuse_leaves(leaves, set(FP8_LEAVES), Format.FP8_BLOCK)
        return Format.FP8_BLOCK
    _check_dtype(name, weight, HIGH_DTYPES)
    _check_shape(name, weight, (n, k))
    _refuse_leaves(leaves, {"weight"}, Format.HIGH)
    return Format.HIGH


def _refuse_leaves(leaves: Mapping[str, tuple[str, Tensor]], known: set[str], found: Format) -> None:
    """A scale that the weight's format does not have: two formats are mixed in one linear."""
    for leaf in sorted(set(leaves) - known):
        name, tensor = leaves[leaf]
        raise CheckpointError(
            f"{tensor.file}: {name} has no meaning for {leaves['weight'][0]}, which is {found}; "
            "export the checkpoint again"
        )


def _check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes)
        raise CheckpointError(f"{tensor.file}: {name} is {tensor.dtype}, expected {expected}; export it again")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    # A scalar may be stored as () or (1,): exporters differ, the meaning does not.
    if tensor.shape != shape and not (shape == () and tensor.shape == (1,)):
        raise CheckpointError(
            f"{tensor.file}: {name} has shape {tensor.shape}, expected {shape} from config.json; "
            "the file and the configuration are not of one model"
        )


def _listed(items: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more
