"""vLLM's model loader `nvfp4`: reads only what this rank needs, one tensor at a time, and says how far it is.

vLLM's default loader maps whole files, so a process appears to hold the checkpoint beside the weights; ours reads each
tensor into its own buffer, which is gone when the parameter has it (measured: tests/cpu/test_memory.py).
"""

import ctypes
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.distributed import get_world_group
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.models.utils import is_pp_missing_parameter

from vllm_nvfp4 import (
    checkpoint,
    deepgemm_set,
    kernel_sets,
    metrics,
    names,
    platform,
    selection,
    served,
    tilelang_set,
    warmup,
    warmup_worker,
)
from vllm_nvfp4.loader import Progress
from vllm_nvfp4.quantization import Nvfp4Config
from vllm_nvfp4.status import CONSTRUCTING, LOADED, PREPARING, Status

LOAD_FORMAT = "nvfp4"
# Formats of the command line that mean "safetensors files, read the usual way"; only these are replaced.
REPLACED_FORMATS = ("auto", "hf", "safetensors")


def release_free_heap() -> None:
    """Give what the C heap holds free back to the system; without glibc there is nothing to do.

    Measured on a 518 MB checkpoint: 26 MB of copies that loading had freed stayed with the process.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def layer_key(canonical: str) -> str:
    """The layer a tensor counts under: "model.layers.3", "mtp.0", or "other"."""
    parts = canonical.split(".")
    if canonical.startswith("model.layers."):
        return ".".join(parts[:3])
    return ".".join(parts[:2]) if canonical.startswith("mtp.") else "other"


@contextmanager
def counted_layers(model: torch.nn.Module, status: Status) -> Iterator[None]:
    """Inside, vLLM's walk over quantization methods is reported to `status`, a layer when its last module is through."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading")
    }
    layer_of = {id(module): layer_key(name) for name, module in modules.items()}
    left = Counter(layer_of.values())
    total = len(left)
    wrapped = {id(module.quant_method): module.quant_method for module in modules.values()}.values()

    def counting(process: Callable[..., None]) -> Callable[..., None]:
        def count(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            process(layer, *args, **kwargs)
            left[layer_of.pop(id(layer), "")] -= 1
            status.update(PREPARING, total - sum(n > 0 for n in left.values()), total, "layers")

        return count

    status.update(PREPARING, 0, total, "layers")
    for method in wrapped:
        method.process_weights_after_loading = counting(method.process_weights_after_loading)
    try:
        yield
    finally:
        for method in wrapped:
            del method.process_weights_after_loading
    status.update(PREPARING, total, total, "layers")


@register_model_loader(LOAD_FORMAT)
class Nvfp4ModelLoader(DefaultModelLoader):
    """DefaultModelLoader with our own reading of safetensors files."""

    def __init__(self, load_config: Any) -> None:
        # The parent only knows its own formats; files and downloads are those of `safetensors`.
        super().__init__(replace(load_config, load_format="safetensors"))
        self.model: Any = None
        self.counter_before_loading_weights: float = 0.0
        self.status = Status()
        # None outside load_model: behind a reload of weights vLLM's walk is not ours to count.
        self.preparation: ExitStack | None = None

    def load_model(self, vllm_config: Any, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        """Construct, load, process, check and warm up, with a phase in the heartbeat for each."""
        self.status = Status(rank=get_world_group().rank)
        self.status.update(CONSTRUCTING)
        if platform.backend() in platform.CAPABILITY_OF:
            kernel_sets.use()
            tilelang_set.use()
            deepgemm_set.use()
        with ExitStack() as self.preparation:
            model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        self.preparation = None
        release_free_heap()
        self.status.update(LOADED, 1, 1, "model")
        selection.log_summary()
        if isinstance(vllm_config.quant_config, Nvfp4Config):
            served.check(model, vllm_config.quant_config)
            served.key_compiled_graphs(vllm_config)
            warmup.run(model, warmup.Limits.of(vllm_config), self.status)
        metrics.publish(get_world_group().rank)
        warmup_worker.follow(vllm_config, self.status)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Load and remember the model, which knows which tensors this rank needs."""
        self.model = model
        super().load_weights(model, model_config)
        release_free_heap()
        if self.preparation is None:
            self.status.update(LOADED, 1, 1, "model")
        else:
            self.preparation.enter_context(counted_layers(model, self.status))

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """(name, tensor) for what this rank needs, in file order."""
        if self.counter_before_loading_weights == 0.0:  # the parent's own iterator would have set it
            self.counter_before_loading_weights = time.perf_counter()
        folder, *_ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        tensors = {n: t for n, t in checkpoint.read_folder(Path(folder)).items() if self._needs(n)}
        layers = {n: layer_key(names.canonical(n, self.model.config.num_hidden_layers) or "other") for n in tensors}
        progress = Progress(
            {n: t.num_bytes for n, t in tensors.items()},
            layers,
            self.status,
            show=get_world_group().rank == 0,
            use_bar=bool(self.load_config.use_tqdm_on_load) and sys.stderr.isatty(),
        )
        for name, tensor in progress.wrap(checkpoint.read_tensors(tensors.items(), reuse_buffer=True)):
            yield source.prefix + name, tensor
            del tensor

    def _needs(self, name: str) -> bool:
        """False for experts, layers and MTP tensors that live on other ranks or in the other model: never read."""
        if should_skip_weight(name, self.local_expert_ids):
            return False
        canonical = names.canonical(name, self.model.config.num_hidden_layers)
        if canonical is None or not hasattr(self.model, "nvfp4_target_name"):
            return canonical is not None
        target = self.model.nvfp4_target_name(canonical)
        return target is not None and not is_pp_missing_parameter(target, self.model)
