"""At the end of a load: is everything that the checkpoint has in NVFP4 served by what was chosen for it?

Registering is not selecting, and selecting is not serving: a hook that vLLM no longer calls leaves a module behind
without a word. And the runners' ids, which are constants in compiled graphs, are made part of vLLM's key for those.
"""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase

from cutedsl.ops import registry
from vllm_nvfp4 import platform, selection
from vllm_nvfp4.inventory import Format

logger = logging.getLogger("vllm.nvfp4")

CACHE_KEY = "nvfp4"  # in additional_config


def check(model: torch.nn.Module, quant_config: Any) -> None:
    """Every module in NVFP4 has a runner, or is a recorded fallback (which strict mode refused when it was recorded).

    Says in one line of the log how many of each there are.

    Raises: RuntimeError - one has neither.
    """
    served: set[int] = set()
    for module in model.modules():
        if vars(module).get("nvfp4_runner") is not None:
            served |= {id(module), *map(id, module.children())}  # a shared expert's runner serves both its linears
        if vars(module).get("nvfp4_input_runner") is not None:
            served.update(map(id, module.nvfp4_shared_input.linears))
        if vars(module).get("nvfp4_wo_a_runner") is not None:
            served.add(id(module.wo_a))
    recorded = {choice.module for choice in selection.choices() if choice.fallback}
    left = [(p, m) for p, m in _nvfp4_modules(model, quant_config) if id(m) not in served and p not in recorded]
    if left:
        prefix, module = left[0]
        raise RuntimeError(
            f"{len(left)} modules that the checkpoint has in NVFP4 have no runner, and no fallback was recorded for them; "
            f"the first is {prefix}, with {type(module.quant_method).__name__}. vLLM's order of calls changed "
            "(python -m vllm_nvfp4.seams lists what)"
        )
    fallbacks, kinds = selection.num_fallbacks(), platform.backend() or "stock kernels"
    mode = f" with {platform.activations()} activations" if platform.backend() else ""
    logger.info(
        "NVFP4 served: %d modules, by %s%s; %d by vLLM's own kernels", len(selection.choices()), kinds, mode, fallbacks
    )


def _nvfp4_modules(model: torch.nn.Module, quant_config: Any) -> Iterator[tuple[str, Any]]:
    """(vLLM's name, module) of linears and experts that are NVFP4 in the checkpoint, or became it at load."""
    for module in model.modules():
        if not isinstance(module, LinearBase | RoutedExperts):
            continue
        prefix = module.prefix if isinstance(module, LinearBase) else module.layer_name
        prefix = prefix.removesuffix(".routed_experts")
        formats = {quant_config.inventory.formats.get(name) for name in quant_config.checkpoint_modules(prefix)}
        if Format.NVFP4 in formats or "NvFp4" in type(module.quant_method).__name__:
            yield prefix, module


def key_compiled_graphs(vllm_config: Any) -> None:
    """Put every runner's id and name into vLLM's key for compiled graphs (`additional_config` is hashed into it).

    Without it a graph from another process, in which ids went to other layers, would call those.
    """
    rows = repr([tuple(row) for row in registry.describe()])
    vllm_config.additional_config[CACHE_KEY] = {"runners": hashlib.sha256(rows.encode()).hexdigest()}
