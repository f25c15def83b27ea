"""The NVIDIA classes of the overlay, constructed and loaded in a process that has only vLLM's CPU wheel.

    python nvidia_stubs.py SCENARIO=CHECKPOINT ...

prints one line `RESULT {json}` a scenario; test_nvidia_classes.py judges them. A process of its own, because the stubs
below change vLLM for good. Construction, loading and post-processing are upstream's and the overlay's own code; nothing
is computed on the way except where a scenario says so. What is faked, and why:

1. `current_platform._enum` is CUDA. `is_cuda()` and `is_cpu()` follow from it, and with them every platform choice made
   while a model is built. `device_type` stays "cpu", so that tensors are made where there is memory for them.
2. `current_platform.get_device_capability` is (10, 0), a B200: attention refuses to be built without one.
3. `torch.cuda.Stream` and `Event` are empty objects: models make some for overlap, and the CPU build of torch cannot.
4. `torch.ops._C.silu_and_mul_with_clamp` is declared, not implemented: a constructor looks the CUDA op up.
5. `has_deep_gemm` is true for the sparse indexer, which refuses to be built without it.
6. For FP8 linears the only candidate is the overlay's torch kernel: only the choice is replaced. vLLM would take Marlin
   here, which repacks weights on a GPU; what is under test is that the right bytes reach the right parameter.
7. `NVFP4_PROVIDER` is `reference` or `stock`, by scenario: a B200's own kernels need one.
8. `FusedMoEParallelConfig.make` says "rank 1 of 2" in the expert-parallel scenario: a second rank would be a process.
"""

import hashlib
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS, _POSSIBLE_NVFP4_KERNELS
from vllm.model_executor.layers import sparse_attn_indexer
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import PlatformEnum, current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import set_default_torch_dtype

# vLLM's module -> the checkpoint's modules in it, by rows. Written again here: it is what the overlay's table must say.
SHARDS = {"fused_wqa_wkv": ("wq_a", "wkv"), "fused_wkv_wgate": ("wkv", "wgate"), "gate_up_proj": ("w1", "w3")}
SCALES = ("weight_scale_2", "input_scale")
RUNNER_NAMES = ("nvfp4_runner", "nvfp4_input_runner", "nvfp4_wo_a_runner")
Tensors = dict[str, torch.Tensor]


def engine_config(scenario: str, checkpoint: str) -> VllmConfig:
    """vLLM's own configuration of the checkpoint, made while the platform still is the CPU it really is."""
    extra: dict[str, Any] = {}
    if scenario in ("mtp", "broken"):
        extra["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
    if scenario == "stock":
        # The stock kernels that need no GPU to be selected; vLLM's own switches choose them.
        extra |= {"linear_backend": "emulation", "moe_backend": "emulation"}
    limits = {"max_model_len": 1024, "max_num_seqs": 4, "enforce_eager": True}
    return EngineArgs(model=checkpoint, **limits, **extra).create_engine_config()


def become_nvidia() -> None:
    """Apply stubs 1 to 6, then let vLLM and the overlay choose their classes again."""
    platform = type(current_platform)
    platform._enum = PlatformEnum.CUDA
    platform.get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(10, 0))
    torch.cuda.Stream = torch.cuda.Event = type("Inert", (), {})  # type: ignore[misc]
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("silu_and_mul_with_clamp(Tensor! result, Tensor input, float limit) -> ()")
    become_nvidia.library = library  # type: ignore[attr-defined]  # the declaration lives as long as this object
    sparse_attn_indexer.has_deep_gemm = lambda: True

    from vllm_nvfp4 import fp8_block, registration

    anywhere = {"is_supported": classmethod(lambda cls, compute_capability=None: (True, None))}
    kernel = type("AnywhereFp8BlockKernel", (fp8_block.ReferenceFp8BlockKernel,), anywhere)
    _POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CUDA] = [kernel]
    importlib.reload(importlib.import_module("vllm.models.deepseek_v4"))
    registration.register_all()


@contextmanager
def provider(name: str, **switches: str) -> Iterator[None]:
    """Stub 7, with more switches of the overlay."""
    from vllm_nvfp4 import platform

    platform._choice.cache_clear()
    with patch.dict(os.environ, {"NVFP4_PROVIDER": name, **switches}):
        yield
    platform._choice.cache_clear()


def reference(**switches: str) -> Any:
    """The definition, which a CPU can compute."""
    return provider("reference", **switches)


@contextmanager
def worker(config: VllmConfig) -> Iterator[None]:
    """What vLLM's loaders find around them: the configuration, and the model's type as that of any new tensor."""
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        yield


def create(config: VllmConfig, *, draft: bool = False) -> torch.nn.Module:
    """The model that vLLM's registry finds for this configuration, not yet loaded."""
    # Layers register here by name, and a scenario may build its model more than once.
    if not draft:
        config.compilation_config.static_forward_context.clear()
    model_config = config.speculative_config.draft_model_config if draft else config.model_config
    with worker(config):
        return get_model_loader(config.load_config).create_model(config, model_config)


def feed(config: VllmConfig, model: torch.nn.Module, tensors: Tensors) -> Any:
    """The tensors given, past the files."""
    with worker(config):
        return model.load_weights(iter(tensors.items()))


def process(config: VllmConfig, model: torch.nn.Module) -> None:
    """vLLM's step after the load."""
    with worker(config):
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))


def read(config: VllmConfig) -> Tensors:
    """The checkpoint, by the names in its files."""
    (file,) = Path(config.model_config.model).glob("*.safetensors")
    return load_file(file)


def canonical(tensors: Tensors, config: VllmConfig) -> Tensors:
    """The checkpoint by canonical names; how those are found is test_names.py's business."""
    from vllm_nvfp4 import names

    return {str(names.canonical(n, config.model_config.hf_config.num_hidden_layers)): t for n, t in tensors.items()}


class Expected:
    """What each parameter must hold, from the checkpoint alone; remembers which tensors were asked for."""

    def __init__(self, tensors: Tensors, config: VllmConfig, experts: range | None = None) -> None:
        hf = config.model_config.hf_config
        self.tensors, self.used = canonical(tensors, config), set[str]()
        self.num_layers, self.experts = hf.num_hidden_layers, experts or range(hf.n_routed_experts)

    def take(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        self.used.add(name)
        return tensor

    def joined(self, parent: str, modules: tuple[str, ...], leaf: str) -> torch.Tensor:
        """Rows one after the other; tensor scales as a vector."""
        parts = [self.take(f"{parent}.{module}.{leaf}") for module in modules]
        return torch.cat(parts) if parts[0].ndim else torch.stack(parts)

    def of(self, parameter: str, shape: torch.Size, draft: bool) -> torch.Tensor:
        """The value of a parameter of vLLM's name; KeyError where the checkpoint has none."""
        path = parameter.split(".")
        if draft and path[1] == "layers":  # model.layers.4.mtp_block.X and model.layers.4.X are mtp.0.X
            path = ["mtp", str(int(path[2]) - self.num_layers), *(part for part in path[3:] if part != "mtp_block")]
        elif draft:  # the embedding, which is in no layer
            path = ["mtp", "0", *path[1:]]
        *above, module, leaf = path
        parent = ".".join(above)
        if leaf.startswith(("w13_", "w2_")):
            stem, leaf = leaf.split("_", 1)
            experts = parent.removesuffix(".experts") + ".experts"
            if stem == "w2":
                return torch.stack([self.take(f"{experts}.{e}.w2.{leaf}") for e in self.experts])
            return torch.stack([self.joined(f"{experts}.{e}", ("w1", "w3"), leaf) for e in self.experts])
        if module in SHARDS:
            return self.joined(parent, SHARDS[module], leaf)
        value = self.take(".".join(path))
        if leaf == "attn_sink":  # padded to the heads of the attention kernel, with "no sink"
            return torch.cat([value, value.new_full((shape[0] - value.shape[0],), float("-inf"))])
        return value.reshape(shape) if leaf in SCALES else value

    def compare(self, model: torch.nn.Module, draft: bool, skip: str) -> dict[str, list[str]]:
        """Parameters without a tensor, and those that hold other bytes than theirs (in the parameter's own type).

        skip: ending of the name of modules that are stored in another format than the checkpoint's.
        """
        found: dict[str, list[str]] = {"unfilled": [], "mismatched": [], "unused": [], "foreign": []}
        for name, param in model.named_parameters():
            if skip and name.rpartition(".")[0].endswith(skip):
                continue
            try:
                want = self.of(name, param.shape, draft).to(param.dtype)
            except KeyError:
                found["unfilled"].append(name)
                continue
            if want.shape != param.shape or not torch.equal(raw(want), raw(param)):
                found["mismatched"].append(name)
        own = {name for name in self.tensors if name.startswith("mtp.") == draft}
        found["unused"] = sorted(n for n in own - self.used if not (skip and n.rpartition(".")[0].endswith(skip)))
        found["foreign"] = sorted(self.used - own)
        return found


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, as a view where it is contiguous: NaN equals NaN, and -0 is not 0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def poison(model: torch.nn.Module) -> None:
    """Fill with 0xFF, NaN in each floating format: memory of an earlier load must not pass for this one's work."""
    for name, param in model.named_parameters():
        if not name.endswith("attn_sink"):  # upstream's constructor gives its padding the value that stays
            raw(param).fill_(0xFF)


def row_alpha(layer: torch.nn.Module) -> torch.Tensor:
    """input_scale * weight_scale_2 for each row, each shard with its own numbers."""
    return (layer.input_scale * layer.weight_scale_2).repeat_interleave(torch.tensor(layer.logical_widths))


def bad_runners(model: torch.nn.Module) -> list[str]:
    """Runners that do not compute with their layer's own bytes, or not with each shard's and expert's own scales."""
    wrong = []
    for name, module in model.named_modules():
        runner = vars(module).get("nvfp4_runner")
        if runner is None:
            continue
        if hasattr(runner, "experts"):
            up = module.w13_input_scale * module.w13_weight_scale_2
            down = module.w2_input_scale * module.w2_weight_scale_2
            half, hidden = module.w13_weight.shape[1] // 2, module.w2_weight.shape[1]
            pairs = []
            for e, (w13, w2) in enumerate(runner.experts):
                pairs.append((w13, module.w13_weight[e], up[e].repeat_interleave(half)))
                pairs.append((w2, module.w2_weight[e], down[e].expand(hidden)))
        elif hasattr(runner, "gate_up"):
            layers = ((runner.gate_up, module.gate_up_proj), (runner.down, module.down_proj))
            pairs = [(matrix, layer.weight, row_alpha(layer)) for matrix, layer in layers]
        else:
            pairs = [(runner.matrix, module.weight, row_alpha(module))]
        if not all(m.weight.data_ptr() == w.data_ptr() and torch.equal(m.alpha, a) for m, w, a in pairs):
            wrong.append(name)
    return wrong


def counts(model: torch.nn.Module) -> dict[str, Counter[str]]:
    """How many modules have which quantization method (with which kernel), and which runner."""
    methods, runners = Counter[str](), Counter[str]()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(method, "kernel", None) or getattr(method, "fp8_linear", None)
        if method is not None:
            methods[type(method).__name__ + (f"/{type(kernel).__name__}" if kernel else "")] += 1
        held = (vars(module).get(name) for name in RUNNER_NAMES)
        runners.update(type(runner).__name__ for runner in held if runner is not None)
    return {"methods": methods, "runners": runners}


def loaded(config: VllmConfig, *, draft: bool = False, skip: str = "") -> tuple[Any, dict[str, Any]]:
    """A model built and loaded from its files, with what can be said about each: both models of every scenario."""
    from vllm_nvfp4 import checkpoint

    model, tensors, asked = create(config, draft=draft), read(config), []
    poison(model)
    read_tensors = checkpoint.read_tensors

    def spy(wanted: Any, **kwargs: Any) -> Any:
        pairs = list(wanted)
        asked.extend(name for name, _ in pairs)
        return read_tensors(pairs, **kwargs)

    with worker(config), patch.object(checkpoint, "read_tensors", spy):
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    process(config, model)
    names = canonical(dict.fromkeys(asked, torch.empty(0)), config)
    facts = {
        "classes": [f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__],
        "num_params": len(list(model.parameters())),
        "num_tensors": len(tensors),
        "read_mtp": sum(name.startswith("mtp.") for name in names),
        "read_main": sum(not name.startswith("mtp.") for name in names),
        **Expected(tensors, config).compare(model, draft, skip),
        **counts(model),
        "bad_runners": bad_runners(model),
        "digest": digest(model),
    }
    return model, facts


def digest(model: torch.nn.Module) -> str:
    """Of all parameters but tensor scales: the same for each spelling of one model, whatever the table of names says."""
    found = hashlib.sha256()
    for name, param in sorted(model.named_parameters()):
        if not name.endswith(SCALES):
            found.update(raw(param).numpy().tobytes())
    return found.hexdigest()


def failure(action: Callable[[], Any]) -> str:
    """The error's type and message, or what came instead of one."""
    try:
        return f"no error: {action()!r:.200}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def scenario_main(config: VllmConfig) -> dict[str, Any]:
    """The main model, what upstream derives while loading, and the NVIDIA method of ours that runs without a GPU."""
    with reference():
        model, facts = loaded(config)
    first = model.model.layers[0]
    hidden = config.model_config.hf_config.hidden_size
    folded = first.hc_attn_fn.view(-1, first.hc_mult, hidden).sum(dim=1)
    facts["broadcast_is_derived"] = torch.equal(first.hc_attn_fn_broadcast, folded)
    facts["projections"] = [projections(layer.attn, hidden) for layer in model.model.layers]
    facts["first_cuda_kernel"] = _POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA][0].__name__
    return facts | end_of_load(config, model)


def end_of_load(config: VllmConfig, model: Any) -> dict[str, Any]:
    """What is checked there: that all is served, as it is and with one runner lost; and the key of compiled graphs."""
    from vllm_nvfp4 import served

    from cutedsl.ops import registry

    keys = [config.compute_hash()]
    served.key_compiled_graphs(config)
    keys.append(config.compute_hash())
    served.key_compiled_graphs(config)
    keys.append(config.compute_hash())
    registry.register(lambda x: x, "linear")
    served.key_compiled_graphs(config)
    keys.append(config.compute_hash())
    facts: dict[str, Any] = {"keys": [keys.index(key) for key in keys]}
    facts["all_served"] = served.check(model, config.quant_config) is None
    layer = model.model.layers[1]
    facts["unserved"] = []
    for owner in (layer.attn.wq_b, layer.ffn.shared_experts, layer.ffn.experts.routed_experts):
        runner, owner.nvfp4_runner = owner.nvfp4_runner, None
        facts["unserved"].append(failure(lambda: served.check(model, config.quant_config)))
        owner.nvfp4_runner = runner
    return facts


def scenario_bf16(config: VllmConfig) -> dict[str, Any]:
    """NVFP4_ACTIVATIONS=bf16: every runner is told, wo_a's too."""
    with reference(NVFP4_ACTIVATIONS="bf16", NVFP4_WO_A="1"):
        model, facts = loaded(config, skip=".wo_a")
    held = [vars(m).get(n) for m in model.modules() for n in RUNNER_NAMES]
    facts["activations"] = Counter(f"{type(r).__name__} {r.activations}" for r in held if r is not None)
    return facts


def projections(attn: Any, hidden: int) -> list[Any]:
    """_run_parallel_input_projections in upstream's order: (is it the module's own product, dtype) for each of four."""
    if "NvFp4" not in type(attn.fused_wqa_wkv.quant_method).__name__:
        return []
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    attn.aux_stream_list = None  # one stream, as under graph capture
    modules = [attn.fused_wqa_wkv, attn.compressor and attn.compressor.fused_wkv_wgate]
    modules += [attn.indexer and attn.indexer.compressor.fused_wkv_wgate, attn.indexer and attn.indexer.weights_proj]
    results: list[Any] = []
    for got, module in zip(attn._run_parallel_input_projections(x), modules, strict=True):
        if module is None or got is None:
            results.append([got is module, None])
            continue
        want = module(x)
        want = want[0] if isinstance(want, tuple) else want
        results.append([torch.equal(got.float(), want.float()), str(got.dtype)])
    return results


def scenario_mtp(config: VllmConfig) -> dict[str, Any]:
    """Main model and MTP draft of one checkpoint, as speculative decoding loads them; and FP8's padding in both."""
    from vllm_nvfp4 import served

    with reference():
        main, facts = loaded(config)
        draft, draft_facts = loaded(config, draft=True)
        facts["all_served"] = [failure(lambda m=m: served.check(m, config.quant_config)) for m in (main, draft)]
    facts["registered_draft"] = str(ModelRegistry.models["DeepSeekV4MTPModel"])
    facts["padded_rows"] = [padded_rows(config, model) for model in (main, draft)]
    return {"main": facts, "draft": draft_facts}


def padded_rows(config: VllmConfig, model: Any) -> int:
    """Rows of a 128-row FP8 shared expert's weight as the loader passes it on, at a tensor-parallel size of 3."""
    from vllm_nvfp4.loader import Loader

    def pad_only(self: Loader, weights: Iterator[tuple[str, torch.Tensor]]) -> Any:
        return [self._pad_fp8_shared_expert(name, tensor).shape[0] for name, tensor in weights]

    weight = {"x.shared_experts.gate_up_proj.weight": torch.zeros(128, 256, dtype=torch.float8_e4m3fn)}
    num_ranks = patch("vllm.models.deepseek_v4.nvidia.model.get_tensor_model_parallel_world_size", lambda: 3)
    with patch.object(Loader, "load", pad_only), num_ranks:
        return feed(config, model, weight)[0]


def scenario_wo_a(config: VllmConfig) -> dict[str, Any]:
    """NVFP4_WO_A=1: everything else as before, and wo_a quantized from the checkpoint's own weight."""
    from cutedsl.quantize import quantize_weight

    with reference(NVFP4_WO_A="1"):
        model, facts = loaded(config, skip=".wo_a")
    tensors = canonical(read(config), config)
    facts["wo_a"] = []
    for i, layer in enumerate(model.model.layers):
        want = quantize_weight(tensors[f"model.layers.{i}.attn.wo_a.weight"].to(torch.bfloat16))
        got = layer.attn.wo_a
        same = torch.equal(got.weight, want.weight) and torch.equal(raw(got.weight_scale), raw(want.weight_scale))
        facts["wo_a"].append(same and layer.attn.nvfp4_wo_a_runner.matrix.weight.data_ptr() == got.weight.data_ptr())
    return facts


def scenario_chains(config: VllmConfig) -> dict[str, Any]:
    """The kernels of a B200 and of an H200, found by device, constructed and never launched; both take the weights over."""
    facts = {}
    for backend, capability in (("sm100", DeviceCapability(10, 0)), ("sm90", DeviceCapability(9, 0))):
        get_device_capability = classmethod(lambda cls, device_id=0, found=capability: found)
        with (
            patch.object(type(current_platform), "get_device_capability", get_device_capability),
            provider("auto", NVFP4_WO_A="1"),
        ):
            facts[backend] = chains(config)
    return facts


def chains(config: VllmConfig) -> dict[str, Any]:
    """What is prepared in place and what together, whose buffers are whose, and the warm-up's calls."""
    from vllm_nvfp4 import served

    model = create(config)
    poison(model)
    tensors = read(config)
    feed(config, model, tensors)
    complete = Expected(tensors, config).compare(model, False, "")
    before = {name: raw(param).clone() for name, param in model.named_parameters()}
    process(config, model)
    layers = model.model.layers
    held = [vars(m).get(n) for m in model.modules() for n in RUNNER_NAMES]
    return {
        **complete,
        "runners": Counter(f"{runner.backend} {runner.activations}" for runner in held if runner is not None),
        "inputs": [shared_inputs(layer.attn, before) for layer in layers],
        "shares_query": [layer.attn.nvfp4_shared_query is not None for layer in layers],
        "all_served": failure(lambda: served.check(model, config.quant_config)),
        "shared_expert": [prepared_once(layer.ffn.shared_experts, i, before) for i, layer in enumerate(layers)],
        "workspaces": [workspaces(layer.attn) for layer in layers],
        "warm_up": warm_up(config, model),
    }


def shared_inputs(attn: Any, before: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What became of the projections of a layer's input: those in one runner, and is that of their rows, prepared once."""
    from vllm_nvfp4.attention import input_linears

    from cutedsl.runners.linear import LinearRunner

    linears = [linear for linear in input_linears(attn) if linear is not None]
    runner = attn.nvfp4_input_runner
    facts = {"alone": sum(hasattr(linear, "nvfp4_runner") for linear in linears), "joined": runner is not None}
    if runner is None:
        return facts

    def rows(leaf: str, dtype: torch.dtype) -> torch.Tensor:
        parts = [before[f"{linear.prefix}.{leaf}"].view(sum(linear.logical_widths), -1) for linear in linears]
        return torch.cat(parts).view(dtype)

    scales = [torch.cat([getattr(linear, leaf).data for linear in linears]) for leaf in SCALES]
    widths = [width for linear in linears for width in linear.logical_widths]
    weight, scale = rows("weight", torch.uint8), rows("weight_scale", torch.float8_e4m3fn)
    alike = {"backend": runner.backend, "activations": runner.activations}
    want = LinearRunner("again", weight, scale, *scales, widths, **alike).chain.groups
    (group,) = runner.chain.groups
    (span,) = group.spans
    same = [torch.equal(raw(a), raw(b)) for a, b in zip(span[-1], want[0].spans[0][-1], strict=True)]
    held = {
        getattr(linear, leaf).untyped_storage().data_ptr() for linear in linears for leaf in ("weight", "weight_scale")
    }
    used = {tensor.untyped_storage().data_ptr() for tensor in span[-1][:2]}
    return facts | {"name": runner.name, "prepared_once": all(same) and len(want) == 1, "held_once": held == used}


def prepared_once(mlp: Any, index: int, before: dict[str, torch.Tensor]) -> bool:
    """The shared expert's matrices are those of the checkpoint, prepared by cutedsl once."""
    from cutedsl.runners.shared_expert import SharedExpertRunner

    prefix = f"model.layers.{index}.ffn.shared_experts"

    def copy(module: Any, name: str, leaf: str) -> torch.Tensor:
        like = getattr(module, leaf).data
        return before[f"{prefix}.{name}.{leaf}"].clone().view(like.dtype).view(like.shape)

    leaves = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    up = [copy(mlp.gate_up_proj, "gate_up_proj", leaf) for leaf in leaves]
    down = [copy(mlp.down_proj, "down_proj", leaf) for leaf in leaves]
    used = mlp.nvfp4_runner
    alike = {"swiglu_limit": 10.0, "backend": used.backend, "activations": used.activations}
    want, got = SharedExpertRunner("again", *up, *down, **alike).chain, used.chain
    same = []
    for operand in ("gate_up", "down"):
        a, b = getattr(want, operand), getattr(got, operand)
        same += [torch.equal(raw(a.weight), raw(b.weight)), torch.equal(raw(a.weight_scale), raw(b.weight_scale))]
    return all(same)


def workspaces(attn: Any) -> dict[str, int]:
    """Which linears of one attention layer share buffers, as numbers."""
    linears = {"wqa_wkv": attn.fused_wqa_wkv, "wq_b": attn.wq_b, "wo_b": attn.wo_b}
    if attn.compressor is not None:
        linears["compressor"] = attn.compressor.fused_wkv_wgate
    if attn.indexer is not None:
        linears |= {"weights_proj": attn.indexer.weights_proj, "indexer wq_b": attn.indexer.wq_b}
        linears["indexer compressor"] = attn.indexer.compressor.fused_wkv_wgate
    held = {name: getattr(linear, "nvfp4_runner", attn.nvfp4_input_runner) for name, linear in linears.items()}
    found = {name: runner.chain.workspace for name, runner in held.items()}
    order = list(dict.fromkeys(map(id, found.values())))
    return {name: order.index(id(workspace)) for name, workspace in found.items()}


def warm_up(config: VllmConfig, model: Any) -> dict[str, Any]:
    """The calls of a warm-up, each held to its op's contract; nothing is computed."""
    from vllm_nvfp4 import warmup
    from vllm_nvfp4.status import Status

    from cutedsl import compile as compiler
    from cutedsl import ops
    from cutedsl.runners import linear, moe, shared_expert, wo_a

    calls: dict[str, list[list[int]]] = {}

    def spy(op: Any) -> Callable[..., torch.Tensor]:
        def call(runner: Any, *inputs: torch.Tensor) -> torch.Tensor:
            assert torch.is_inference_mode_enabled()
            assert not compiler.frozen()
            made = [len(inputs[0]), inputs[0].is_contiguous()]
            calls.setdefault(f"{type(runner).__name__} {runner.name}", []).append(made)
            return op._fake(*inputs, runner.runner_id)

        return call

    kinds = (
        (linear.LinearRunner, ops.linear), (moe.MoeRunner, ops.moe),
        (shared_expert.SharedExpertRunner, ops.shared_expert), (wo_a.WoARunner, ops.wo_a),
    )  # fmt: skip
    with ExitStack() as stack:
        for runner, op in kinds:
            stack.enter_context(patch.object(runner, "__call__", spy(op)))
        warmup.run(model, warmup.Limits(tokens=40, gathered=80, top_k=6), Status())
    frozen = compiler.frozen()
    compiler.freeze(False)
    return {"calls": calls, "frozen": frozen}


def scenario_breaks(config: VllmConfig) -> dict[str, Any]:
    """Piecewise graphs wanted after upstream's module was imported, as in the process that makes the configuration."""
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
    from vllm.models.deepseek_v4.attention import DeepseekV4Attention
    from vllm_nvfp4.attention import BREAKS

    class Capture:
        """vLLM's, as far as its decorator knows it, without a graph: remembers what would run outside of one."""

        _capturing = True

        def __init__(self) -> None:
            self.outside: list[Any] = []

        def add_eager(self, call: Any) -> None:
            self.outside.append(call)

    def breaks(use_v2: bool) -> list[list[Any]]:
        """For each layer: how many of its attention's ways in run outside of a graph."""
        with patch.object(type(config), "use_v2_model_runner", use_v2):
            model, found = create(config), []
        for attn in (layer.attn for layer in model.model.layers):
            calls = [getattr(attn, name) for name in BREAKS] + [attn._prepare_and_attn_fn] * (not use_v2)
            capture = Capture()
            with patch.object(BreakableCUDAGraphCapture._tls, "active", capture, create=True):
                for call in calls:
                    failure(call)  # inside of a graph it would run, and miss its arguments
            found.append([len(capture.outside), len(calls)])
        return found

    with reference(VLLM_USE_BREAKABLE_CUDAGRAPH="1"):
        facts: dict[str, Any] = {"v2": breaks(True), "v1": breaks(False)}
    facts["upstream's"] = [hasattr(getattr(DeepseekV4Attention, name), "__wrapped__") for name in BREAKS]
    return facts


def scenario_joined(config: VllmConfig) -> dict[str, Any]:
    """Inputs joined as on a GPU, computed by the reference: what four projections give, beside those of a plain model."""
    from vllm_nvfp4 import platform

    facts = {}
    for activations in ("nvfp4", "bf16"):
        with reference(NVFP4_ACTIVATIONS=activations):
            assert platform.backend() == "reference"
            plain, _ = loaded(config)
            with patch.dict(platform.CAPABILITY_OF, {"reference": (0, 0)}):
                model, tensors = create(config), read(config)
                poison(model)
                feed(config, model, tensors)
                complete = Expected(tensors, config).compare(model, False, "")
                process(config, model)
        pairs = zip(model.model.layers, plain.model.layers, strict=True)
        found = [
            both_projections(layer.attn, want.attn, config.model_config.hf_config.hidden_size) for layer, want in pairs
        ]
        facts[activations] = complete | {"projections": found}
    return facts


def both_projections(attn: Any, plain: Any, hidden: int) -> dict[str, Any]:
    """Is each of four results of the same type, shape and bits as that of the other model?"""
    x = torch.randn(5, hidden, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    attn.aux_stream_list = plain.aux_stream_list = None
    results = [layer._run_parallel_input_projections(x) for layer in (attn, plain)]
    same = [
        got is want if want is None else got.dtype == want.dtype and torch.equal(got, want)
        for got, want in zip(*results, strict=True)
    ]
    return {"same": same, "joined": attn.nvfp4_input_runner is not None}


def scenario_ep(config: VllmConfig) -> dict[str, Any]:
    """Rank 1 of 2 expert-parallel ranks (stub 8), fed as vLLM's own filter of files would."""
    make = FusedMoEParallelConfig.make

    def as_rank(*args: Any, **kwargs: Any) -> FusedMoEParallelConfig:
        return replace(make(*args, **kwargs), use_ep=True, ep_size=2, ep_rank=1)

    num_experts = config.model_config.hf_config.n_routed_experts
    local = range(num_experts // 2, num_experts)
    # Other ranks' weights are not read, other ranks' scales are.
    tensors = {n: t for n, t in read(config).items() if not should_skip_weight(n, set(local))}
    with reference(), patch.object(FusedMoEParallelConfig, "make", staticmethod(as_rank)):
        model = create(config)
        poison(model)
        feed(config, model, tensors)
        lacking = {n: t for n, t in tensors.items() if not n.endswith(f"layers.2.ffn.experts.{local[3]}.w3.weight")}
        missing = failure(lambda: feed(config, model, lacking))
        process(config, model)
    facts: dict[str, Any] = Expected(tensors, config, local).compare(model, False, "")
    del facts["unused"]  # other ranks' scales, on purpose
    facts["num_local"] = [layer.ffn.experts.routed_experts.nvfp4_runner.num_experts for layer in model.model.layers]
    return facts | {"bad_runners": bad_runners(model), "missing": missing}


@provider("stock")
def scenario_stock(config: VllmConfig) -> dict[str, Any]:
    """Asked for vLLM's own kernels: vLLM's emulation serves, as a recorded fallback, where it gives the right answer."""
    from vllm_nvfp4 import platform, selection, served

    selection.clear()
    facts: dict[str, Any] = {"backend": platform.backend(), "reason": platform.unavailable_reason()}
    tensors, model = read(config), create(config)
    poison(model)
    facts["num_loaded"] = len(feed(config, model, tensors))
    facts["derived_by_load"] = model.model.layers[0].hc_attn_fn_broadcast is not None
    facts |= Expected(tensors, config).compare(model, False, "")
    facts["summary"] = [[*key, count] for key, count in sorted(selection.summary().items())]
    facts["num_fallbacks"] = selection.num_fallbacks()
    process(config, model)
    facts |= counts(model)
    facts["all_served"] = failure(lambda: served.check(model, config.quant_config))

    def changed(name: str) -> str:
        model = create(config)
        feed(config, model, {n: t * 2 if n == name else t for n, t in tensors.items()})
        return failure(lambda: process(config, model))

    facts["shard_weight"] = changed("model.layers.1.attn.wkv.weight_scale_2")
    facts["shard_input"] = changed("model.layers.1.ffn.shared_experts.w3.input_scale")
    facts["expert"] = changed("model.layers.1.ffn.experts.7.w3.weight_scale_2")
    with patch.dict(os.environ, {"NVFP4_STRICT": "1"}):
        facts["strict"] = failure(lambda: create(config))
        with reference():  # emulation was asked for by flag, although cutedsl could serve
            facts["strict_by_flag"] = failure(lambda: create(config))
    return facts


def scenario_broken(config: VllmConfig) -> dict[str, Any]:
    """Each case: one thing wrong with the tensors of a checkpoint that is read past the header checks."""
    tensors = read(config)
    layer, expert = "layers.1", "layers.2.ffn.experts.5"

    def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
        return tensors | {name: change(tensors[name])}

    def without(name: str) -> Tensors:
        tensors[name]  # must be there to be missed
        return {n: t for n, t in tensors.items() if n != name}

    extra = torch.zeros(4, 4)
    wide = (lambda t: torch.cat([t, t]), lambda t: torch.cat([t, t], dim=1))
    cases = {
        "extra unknown": tensors | {f"{layer}.attn.mystery.weight": extra},
        "extra module": tensors | {"layers.0.attn.compressor.wkv.weight": extra},
        "extra expert": tensors | {"layers.0.ffn.experts.99.w1.weight": extra},
        "missing plain": without(f"{layer}.attn_norm.weight"),
        "missing head": without("head.weight"),
        "missing shard": without(f"{layer}.attn.wkv.weight"),
        "missing expert weight": without(f"{expert}.w3.weight"),
        "missing expert scale": without(f"{expert}.w2.input_scale"),
        "shape plain": changed(f"{layer}.attn_norm.weight", wide[0]),
        "shape small sink": changed(f"{layer}.attn.attn_sink", lambda t: t[:-1]),
        "shape large sink": changed(f"{layer}.attn.attn_sink", wide[0]),
        "shape linear": changed(f"{layer}.attn.wq_b.weight", wide[1]),
        "shape shard": changed(f"{layer}.attn.wkv.weight", lambda t: t[:-1]),
        "shape scalar": changed(f"{layer}.attn.wq_b.input_scale", lambda t: t.repeat(2)),
        "shape small expert": changed(f"{expert}.w1.weight", lambda t: t[:-1]),
        "shape thin expert": changed(f"{expert}.w2.weight_scale", lambda t: t[:, :-1]),
        "shape large expert": changed(f"{expert}.w1.weight", wide[1]),
        "dtype packed": changed(f"{layer}.attn.wq_b.weight", lambda t: t.to(torch.bfloat16)),
        "dtype scale": changed(f"{expert}.w2.weight_scale", lambda t: t.float()),
        "dtype plain": changed(f"{layer}.attn_norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "nan": changed(f"{expert}.w1.input_scale", lambda t: t * float("nan")),
        "draft missing": without("mtp.0.h_proj.weight"),
        "draft expert": without("mtp.0.ffn.experts.5.w1.weight"),
    }
    with reference():
        model, draft = create(config), create(config, draft=True)
        facts: dict[str, Any] = {}
        for case, given in cases.items():
            target = draft if case.startswith("draft") else model
            facts[case] = failure(lambda target=target, given=given: feed(config, target, given))
        facts["intact"] = [len(feed(config, model, tensors)), len(feed(config, draft, tensors))]
    return facts


RUNS = (
    scenario_main,
    scenario_mtp,
    scenario_wo_a,
    scenario_bf16,
    scenario_chains,
    scenario_breaks,
    scenario_joined,
    scenario_ep,
    scenario_stock,
    scenario_broken,
)
SCENARIOS = {run.__name__.removeprefix("scenario_"): run for run in RUNS}


def main() -> None:
    """`name=folder` for each scenario; what follows the first `-` of a name only tells its results apart."""
    wanted = [argument.split("=", 1) for argument in sys.argv[1:]]
    configs = {name: engine_config(name.partition("-")[0], folder) for name, folder in wanted}
    with set_current_vllm_config(next(iter(configs.values()))), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
    become_nvidia()
    for name, config in configs.items():
        try:
            facts = SCENARIOS[name.partition("-")[0]](config)
        except Exception:
            facts = {"error": traceback.format_exc()}
        print("RESULT " + json.dumps({"scenario": name, "facts": facts}), flush=True)


if __name__ == "__main__":
    main()
