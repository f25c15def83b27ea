"""The NVFP4 operators of one layer of a checkpoint: each with its tensors, random inputs, its runner and the exact answer.

The exact answer is FP32 matrix products of dequantized weights, and, for W4A4, of activations rounded to NVFP4 and
dequantized: no operand of it is prepared the way a runner prepares its own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cutedsl.formats import NVFP4
from cutedsl.quantize import dequantize, quantize_activation, quantize_weight
from cutedsl.reference.swiglu import swiglu
from cutedsl.reference.wo_a import inverse_rope
from cutedsl.runners.linear import LinearRunner
from cutedsl.runners.moe import MoeRunner
from cutedsl.runners.shared_expert import SharedExpertRunner
from cutedsl.runners.wo_a import WoARunner
from vllm_nvfp4 import env, names
from vllm_nvfp4.checkpoint import CheckpointError, Tensor, read_folder, read_tensors
from vllm_nvfp4.doctor import metadata
from vllm_nvfp4.doctor.source import Source
from vllm_nvfp4.inventory import NVFP4_LEAVES, Format, canonical_names, take_inventory

# Of activations, random and normal: the calibrated largest magnitude is so many standard deviations.
SIGMAS = 6.0
MAX_POSITION = 4096
# Tokens whose answers are compared: every token of a batch would dequantize every expert of a large layer.
TOKENS_COMPARED = {"moe": 8}
DEFAULT_TOKENS_COMPARED = 64


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was read and found complete.

    config: with vLLM's names. tensors: name -> header entry. by_canonical: canonical name -> name. formats: as Inventory's.
    """

    config: Any
    tensors: dict[str, Tensor]
    by_canonical: dict[str, str]
    formats: dict[str, Format]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Reads config.json and all headers.

        Raises: CheckpointError - no folder, no configuration of a DeepSeek-V4 model, or what a load would refuse.
            ValueError - names of an unknown layout.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; give the folder with config.json and *.safetensors")
        config = _config(path)
        tensors = read_folder(path)
        inventory = take_inventory(tensors, config)
        return cls(config, tensors, canonical_names(tensors, config.num_hidden_layers), inventory.formats)

    def read(self, modules: Iterable[str], device: torch.device) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yields (module, leaf, tensor on the device) of NVFP4 modules, in the order of the file."""
        wanted = {self.by_canonical[f"{module}.{leaf}"]: (module, leaf) for module in modules for leaf in NVFP4_LEAVES}
        for name, tensor in read_tensors((name, self.tensors[name]) for name in wanted):
            yield *wanted[name], tensor.to(device)


def _config(path: Path) -> Any:
    source = Source(str(path), "folder", folder=path)
    try:
        found = source.read_json("config.json")
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}; download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path / 'config.json'}: not there, or no JSON object; download it")
    config, findings = metadata.read_config(found)
    if config is None:
        listed = "; ".join(f"{finding.tensor}: {finding.value}" for finding in findings)
        raise CheckpointError(f"{path / 'config.json'} does not describe a DeepSeek-V4 model: {listed}")
    return config


class Stack(NamedTuple):
    """Shards one above another, or experts in a stack: what runners call weight, weight_scale and so on."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor
    input_scale: torch.Tensor

    def named(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """As keyword arguments of a runner, clones: runners may change what they are given."""
        return {f"{prefix}{leaf}": tensor.clone() for leaf, tensor in self._asdict().items()}

    def dense(self) -> torch.Tensor:
        """(N, K) fp32 of shards with equal numbers of rows, or of one."""
        num_parts = len(self.weight_scale_2)
        parts = zip(self.weight.chunk(num_parts), self.weight_scale.chunk(num_parts), self.weight_scale_2, strict=True)
        return torch.cat([dequantize(weight, scale, scale_2) for weight, scale, scale_2 in parts])


@dataclass
class Case:
    """One operator: `run(runner, inputs)` is to be `exact(inputs, ...)`.

    module: for the report. kind: of runner. shape: in words.
    """

    module: str
    kind: str
    shape: str
    device: torch.device

    def runner(self, backend: str, activations: str) -> Any:
        """A runner with tensors of its own."""
        raise NotImplementedError

    def inputs(self, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Random inputs, by the calibrated scales."""
        raise NotImplementedError

    def exact(self, inputs: tuple[torch.Tensor, ...], rounded: bool) -> torch.Tensor:
        """(tokens, N) fp32; rounded: activations are rounded to NVFP4 first."""
        raise NotImplementedError

    def compared(self, tokens: int) -> torch.Tensor:
        """Tokens of a batch whose answers are compared: the first, the last, and some between."""
        most = TOKENS_COMPARED.get(self.kind, DEFAULT_TOKENS_COMPARED)
        return torch.linspace(0, tokens - 1, min(tokens, most)).long().to(self.device)

    def of_tokens(self, inputs: tuple[torch.Tensor, ...], rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs of some tokens."""
        return tuple(tensor[rows] for tensor in inputs)

    def _normal(self, input_scale: torch.Tensor, *shape: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(shape, generator=generator).to(self.device)
        return (x * (input_scale.max() * NVFP4.tensor_scale_divisor / SIGMAS)).bfloat16()


def _activation(x: torch.Tensor, scale: torch.Tensor, rounded: bool) -> torch.Tensor:
    return dequantize(*quantize_activation(x, scale), scale) if rounded else x.float()


@dataclass
class LinearCase(Case):
    """A linear, or shards that vLLM fuses into one."""

    stack: Stack
    sizes: list[int] = field(default_factory=list)

    def runner(self, backend: str, activations: str) -> LinearRunner:
        """See Case."""
        tensors = self.stack.named()
        return LinearRunner(self.module, **tensors, shard_sizes=self.sizes, backend=backend, activations=activations)

    def inputs(self, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """See Case."""
        return (self._normal(self.stack.input_scale, tokens, self.stack.weight.shape[1] * 2, generator=generator),)

    def exact(self, inputs: tuple[torch.Tensor, ...], rounded: bool) -> torch.Tensor:
        """See Case."""
        parts, stack = [], self.stack
        rows = zip(stack.weight.split(self.sizes), stack.weight_scale.split(self.sizes), strict=True)
        for i, (weight, scale) in enumerate(rows):
            x = _activation(inputs[0], stack.input_scale[i], rounded)
            parts.append(x @ dequantize(weight, scale, stack.weight_scale_2[i]).t())
        return torch.cat(parts, dim=1)


@dataclass
class SharedExpertCase(Case):
    """gate_up, SwiGLU and down."""

    gate_up: Stack
    down: Stack
    limit: float

    def runner(self, backend: str, activations: str) -> SharedExpertRunner:
        """See Case."""
        arguments: dict[str, Any] = self.gate_up.named("gate_up_") | self.down.named("down_")
        arguments |= {"swiglu_limit": self.limit, "backend": backend, "activations": activations}
        return SharedExpertRunner(self.module, **arguments)

    def inputs(self, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """See Case."""
        return (self._normal(self.gate_up.input_scale, tokens, self.gate_up.weight.shape[1] * 2, generator=generator),)

    def exact(self, inputs: tuple[torch.Tensor, ...], rounded: bool) -> torch.Tensor:
        """See Case."""
        return _expert(inputs[0], self.gate_up, self.down, self.limit, rounded)


def _expert(x: torch.Tensor, gate_up: Stack, down: Stack, limit: float, rounded: bool) -> torch.Tensor:
    halves = gate_up.dense().chunk(2)
    sums = [_activation(x, gate_up.input_scale[i], rounded) @ half.t() for i, half in enumerate(halves)]
    h = swiglu(torch.cat(sums, dim=1), limit)
    return _activation(h, down.input_scale[0], rounded) @ down.dense().t()


@dataclass
class MoeCase(Case):
    """Routed experts; w13 has (experts, 2) tensor scales, w2 (experts,)."""

    w13: Stack
    w2: Stack
    limit: float
    top_k: int

    def runner(self, backend: str, activations: str) -> MoeRunner:
        """See Case."""
        arguments: dict[str, Any] = self.w13.named("w13_") | self.w2.named("w2_")
        arguments |= {"swiglu_limit": self.limit, "backend": backend, "activations": activations}
        return MoeRunner(self.module, **arguments)

    def inputs(self, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """x, weights and distinct experts of each token."""
        scale = self.w13.input_scale.median()
        x = self._normal(scale, tokens, self.w13.weight.shape[2] * 2, generator=generator)
        weights = torch.rand(tokens, self.top_k, generator=generator).to(self.device)
        ids = torch.rand(tokens, len(self.w13.weight), generator=generator).topk(self.top_k).indices
        return x, weights, ids.to(self.device, torch.int32)

    def exact(self, inputs: tuple[torch.Tensor, ...], rounded: bool) -> torch.Tensor:
        """See Case."""
        x, weights, ids = inputs
        out = torch.zeros(x.shape, device=self.device)
        for e in ids.unique().tolist():
            token, choice = (ids == e).nonzero(as_tuple=True)
            down = Stack(
                *(tensor[e : e + 1].flatten(0, -2) if tensor.ndim > 1 else tensor[e : e + 1] for tensor in self.w2)
            )
            y = _expert(x[token], Stack(*(tensor[e] for tensor in self.w13)), down, self.limit, rounded)
            out.index_add_(0, token, y * weights[token, choice, None])
        return out


@dataclass
class WoACase(Case):
    """The grouped output projection, inverse RoPE included."""

    stack: Stack
    num_groups: int
    head_dim: int
    rope_dim: int

    def runner(self, backend: str, activations: str) -> WoARunner:
        """See Case."""
        sizes = {"num_groups": self.num_groups, "head_dim": self.head_dim, "rope_dim": self.rope_dim}
        return WoARunner(self.module, **self.stack.named(), **sizes, backend=backend, activations=activations)

    def inputs(self, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Attention output, positions, and a table of cosines and sines."""
        heads = self.num_groups * self.stack.weight.shape[1] * 2 // self.head_dim
        o = self._normal(self.stack.input_scale, tokens, heads, self.head_dim, generator=generator)
        positions = torch.randint(0, MAX_POSITION, (tokens,), generator=generator)
        frequency = 10000.0 ** -torch.linspace(0, 1, self.rope_dim // 2 + 1)[:-1]
        angles = torch.arange(MAX_POSITION).unsqueeze(1) * frequency
        return o, positions.to(self.device), torch.cat((angles.cos(), angles.sin()), dim=1).to(self.device)

    def of_tokens(self, inputs: tuple[torch.Tensor, ...], rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Case; the table is of positions."""
        return inputs[0][rows], inputs[1][rows], inputs[2]

    def exact(self, inputs: tuple[torch.Tensor, ...], rounded: bool) -> torch.Tensor:
        """See Case."""
        o, positions, table = inputs
        restored = inverse_rope(o, positions, table, self.rope_dim).flatten(1)
        x = _activation(restored, self.stack.input_scale[0], rounded).chunk(self.num_groups, dim=1)
        w = self.stack.dense().chunk(self.num_groups)
        return torch.cat([x_group @ w_group.t() for x_group, w_group in zip(x, w, strict=True)], dim=1)


# ---- from a checkpoint ----------------------------------------------------------------------------------------------


def modules_of(checkpoint: Checkpoint, layer: int) -> tuple[list[tuple[str, ...]], dict[str, Format]]:
    """NVFP4 modules of a layer, those that are computed as one together; and the modules of other formats."""
    prefix = f"model.layers.{layer}."
    groups: dict[str, tuple[str, ...]] = {}
    others: dict[str, Format] = {}
    for module, found in checkpoint.formats.items():
        if not module.startswith(prefix):
            continue
        if found is not Format.NVFP4 and not (found is Format.HIGH and module.endswith(".wo_a") and env.flag(env.WO_A)):
            others[module] = found
            continue
        if ".shared_experts." in module:
            shared = f"{prefix}ffn.shared_experts"
            groups[shared] = tuple(f"{shared}.{leaf}" for leaf in ("w1", "w3", "down_proj"))
            continue
        fused = names.fused(f"{module}.weight")
        name = module if fused is None else fused[0].removesuffix(".weight")
        groups[name] = names.module_of(name)
    return list(groups.values()), others


def make_case(checkpoint: Checkpoint, modules: tuple[str, ...], device: torch.device) -> Case:
    """The operator of modules that are computed as one, its tensors read.

    Raises: CheckpointError - a file ends early.
    """
    config, first = checkpoint.config, modules[0]
    if first.endswith(".ffn.experts"):
        return _moe_case(checkpoint, first, device)
    if first.endswith(".wo_a"):
        return _wo_a_case(checkpoint, first, device)
    tensors: dict[str, dict[str, torch.Tensor]] = {module: {} for module in modules}
    for module, leaf, tensor in checkpoint.read(modules, device):
        tensors[module][leaf] = tensor
    name = (
        first if len(modules) == 1 else f"{first.rpartition('.')[0]}.{'+'.join(m.rpartition('.')[2] for m in modules)}"
    )
    if ".shared_experts." in first:
        gate_up, down = _stack([tensors[module] for module in modules[:2]]), _stack([tensors[modules[2]]])
        return SharedExpertCase(
            name, "shared_expert", _shape(gate_up, down), device, gate_up, down, config.swiglu_limit
        )
    stack = _stack([tensors[module] for module in modules])
    sizes_of_shards = [len(tensors[module]["weight"]) for module in modules]
    return LinearCase(name, "linear", _shape(stack), device, stack, sizes_of_shards)


def _wo_a_case(checkpoint: Checkpoint, module: str, device: torch.device) -> WoACase:
    """wo_a as stored, or, as NVFP4_WO_A=1 serves it, quantized here; its inputs are then as large as they can become."""
    config = checkpoint.config
    if checkpoint.formats[module] is Format.NVFP4:
        stack = _stack([{leaf: tensor for _, leaf, tensor in checkpoint.read([module], device)}])
    else:
        name = checkpoint.by_canonical[f"{module}.weight"]
        ((_, weight),) = read_tensors([(name, checkpoint.tensors[name])])
        # Rows of attention output are averages of rows whose RMS is about 1.
        bound = torch.tensor(config.head_dim**0.5 / NVFP4.tensor_scale_divisor, device=device)
        stack = _stack([dict(zip(NVFP4_LEAVES, (*quantize_weight(weight.to(device)), bound), strict=True))])
    sizes = config.o_groups, config.head_dim, config.qk_rope_head_dim
    return WoACase(module, "wo_a", f"{config.o_groups} groups, {_shape(stack)}", device, stack, *sizes)


def _moe_case(checkpoint: Checkpoint, module: str, device: torch.device) -> MoeCase:
    """All experts of a layer; each tensor goes to its place as it is read, so that a layer is held once."""
    config = checkpoint.config
    e, hidden, inter = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size

    def empty(n: int, k: int, *scales: int) -> Stack:
        weight = torch.empty(e, n, k // 2, dtype=torch.uint8, device=device)
        scale = torch.empty(e, n, k // 16, dtype=torch.float8_e4m3fn, device=device)
        return Stack(weight, scale, *(torch.empty(e, *scales, device=device) for _ in range(2)))

    w13, w2 = empty(2 * inter, hidden, 2), empty(hidden, inter)
    wanted = [f"{module}.{i}.{projection}" for i in range(e) for projection in ("w1", "w2", "w3")]
    for name, leaf, tensor in checkpoint.read(wanted, device):
        expert = names.parse_expert(f"{name}.{leaf}")
        assert expert is not None  # its name was made above
        target = getattr(w2 if expert.projection == "w2" else w13, leaf)[expert.expert]
        if expert.projection != "w2":
            target = target.chunk(2)[expert.projection == "w3"]
        # A scalar may be stored as () or (1,).
        target.copy_(tensor.reshape(target.shape))
    shape = f"{e} experts, top {config.num_experts_per_tok}, {hidden} x {inter}"
    return MoeCase(module, "moe", shape, device, w13, w2, config.swiglu_limit, config.num_experts_per_tok)


def _stack(parts: list[dict[str, torch.Tensor]]) -> Stack:
    scale = torch.cat([part["weight_scale"].view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    scalars = [torch.stack([part[leaf].reshape(()) for part in parts]) for leaf in ("weight_scale_2", "input_scale")]
    return Stack(torch.cat([part["weight"] for part in parts]), scale, scalars[0], scalars[1])


def _shape(*stacks: Stack) -> str:
    return ", ".join(f"{stack.weight.shape[-2]} x {stack.weight.shape[-1] * 2}" for stack in stacks)
