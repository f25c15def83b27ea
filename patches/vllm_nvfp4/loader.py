"""Checkpoint tensors into a model's parameters: any layout, both platforms, failing closed.

vLLM's own loader scans a list of three entries an expert for each expert tensor, and lets a tensor that nothing asks for,
or a parameter that nothing fills, pass. Here each name is parsed once, each parameter's shards are counted, and what is
wrong is reported with the checkpoint's own tensor name.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from vllm_nvfp4 import names
from vllm_nvfp4.checkpoint import CheckpointError
from vllm_nvfp4.scales import bad_block_scale, bad_global_scale

logger = init_logger("vllm.nvfp4.loader")

SHARD_OF_PROJECTION = {"w1": "w1", "w2": "w2", "w3": "w3"}
# One byte of these is a code. torch would convert it to another type's nearest number without a word.
CODE_DTYPES = frozenset({torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu})
# The one conversion that keeps the meaning: powers of two, widened.
WIDENED = (torch.float8_e8m0fnu, torch.float32)
GLOBAL_SCALES = ("weight_scale_2", "input_scale")
VALUES_PER_ELEMENT = {"weight": 2, "weight_scale": 16}  # of an NVFP4 row, in one element of the stored tensor


class Loader:
    """Routes tensors of one checkpoint into one model (the main model, or an MTP draft).

    `pad_fp8` is upstream's (quant_config, name, tensor) -> tensor for the shared experts of a model that was built with
    FP8 in whole blocks a rank; None where nothing was padded.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: Any,
        quant_config: Any,
        *,
        is_mtp: bool = False,
        pad_fp8: Callable[[Any, str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.model, self.config, self.quant_config, self.is_mtp = model, config, quant_config, is_mtp
        self.pad_fp8 = pad_fp8
        self.params = dict(model.named_parameters())
        self.loaded: dict[str, int] = {}
        self.experts = self._index_experts()
        self.num_ignored = 0

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load everything; returns the parameters that were filled.

        Raises: CheckpointError - see `_route`, and `_check_complete` for what is still missing at the end.
        """
        for name, tensor in weights:
            canonical = names.canonical(name, self.config.num_hidden_layers)
            if canonical is None:
                self.num_ignored += 1
                continue
            target = target_name(canonical, self.config.num_hidden_layers, self.is_mtp)
            if target is None or is_pp_missing_parameter(target, self.model):
                continue
            check_scale_tensor(name, canonical, tensor)
            self._route(name, canonical, target, tensor)
            del tensor
        self._check_complete()
        if self.num_ignored:
            logger.info("%d checkpoint tensors have no use in serving and were left out", self.num_ignored)
        return set(self.loaded)

    def _route(self, name: str, canonical: str, target: str, tensor: torch.Tensor) -> None:
        """One tensor into its parameter.

        Raises: CheckpointError - no parameter takes it, or its shape or dtype does not fit; the message has the
            checkpoint's name for it.
        """
        expert = names.parse_expert(canonical)
        if expert is not None:
            # The draft calls the layer something else (`...mtp_block`); number, projection and leaf are the same.
            layer = target.partition(".ffn.experts.")[0]
            self._load_expert(name, expert._replace(layer=layer), tensor)
            return
        fused = names.fused(target)
        param_name, shard = fused if fused is not None else (target, None)
        param = self.params.get(param_name)
        if param is None:
            raise CheckpointError(
                f"{name} has no place in the model (looked for {param_name}); the model has no such module"
            )
        if ".shared_experts." in target:
            tensor = self._pad_fp8_shared_expert(param_name, tensor)
        if target.endswith(".attn_sink"):
            tensor = self._own_heads(name, tensor, param)
            param = param.data[: tensor.shape[0]]
        loader = getattr(param, "weight_loader", default_weight_loader)
        self._copy(name, param, tensor, loader, () if shard is None else (shard,))
        self._count(param_name)

    def _load_expert(self, name: str, expert: names.ExpertName, tensor: torch.Tensor) -> None:
        """One expert's tensor into every local slot that holds the expert (EPLB may have several, EP none)."""
        slots = self.experts.get((expert.layer, expert.expert, expert.projection), ())
        if not slots:
            raise CheckpointError(
                f"{name}: the model has no expert {expert.expert} in {expert.layer}; config.json's n_routed_experts is "
                f"{self.config.n_routed_experts}"
            )
        for stem, slot in slots:
            param_name = f"{stem}{expert.leaf}"
            param = self.params.get(param_name)
            if param is None:
                raise CheckpointError(f"{name} has no place in the model (looked for {param_name})")
            self._check_expert_shape(name, expert, param, tensor)
            shard = SHARD_OF_PROJECTION[expert.projection]
            kwargs = {"shard_id": shard, "expert_id": slot, "return_success": True}
            if self._copy(name, param, tensor, param.weight_loader, (param_name,), kwargs):
                self._count(param_name)

    def _check_expert_shape(self, name: str, expert: names.ExpertName, param: Any, tensor: torch.Tensor) -> None:
        """vLLM's expert loader takes a tensor that is too small as one to be padded, and leaves the rest as it was."""
        n, k = self.config.moe_intermediate_size, self.config.hidden_size
        if expert.projection == "w2":
            n, k = k, n
        if param.dtype in CODE_DTYPES:
            k //= VALUES_PER_ELEMENT.get(expert.leaf, 1)
        fits = tensor.numel() == 1 if expert.leaf in GLOBAL_SCALES else tensor.shape == (n, k)
        if not fits:
            wanted = "one number" if expert.leaf in GLOBAL_SCALES else f"{(n, k)}"
            raise _misfit(name, tensor, param, f"config.json gives {wanted}")

    @staticmethod
    def _copy(name: str, param: Any, tensor: torch.Tensor, loader: Any, args: tuple, kwargs: dict | None = None) -> Any:
        """Call vLLM's weight loader; its bare assertions become errors that name the tensor."""
        pair = (tensor.dtype, param.dtype)
        if pair[0] != pair[1] and pair != WIDENED and CODE_DTYPES & set(pair):
            raise _misfit(name, tensor, param, "a conversion would change what the bytes mean")
        try:
            return loader(param, tensor, *args, **(kwargs or {}))
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise _misfit(name, tensor, param, str(error) or type(error).__name__) from error

    def _own_heads(self, name: str, tensor: torch.Tensor, param: Any) -> torch.Tensor:
        """This rank's attention heads; the parameter is padded, so that too many would fit as well."""
        num_heads = self.config.num_attention_heads
        if tensor.shape != (num_heads,):
            raise _misfit(name, tensor, param, f"config.json gives {num_heads} heads")
        num_local = num_heads // get_tensor_model_parallel_world_size()
        return tensor.narrow(0, num_local * get_tensor_model_parallel_rank(), num_local)

    def _pad_fp8_shared_expert(self, param_name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Upstream's NVIDIA models give every rank whole FP8 blocks; theirs to fill up, called where they did so."""
        if self.pad_fp8 is None or getattr(self.quant_config, "weight_block_size", None) is None:
            return tensor
        if param_name.endswith(".weight") and tensor.dtype != torch.float8_e4m3fn:
            return tensor
        return self.pad_fp8(self.quant_config, param_name, tensor)

    def _count(self, param_name: str) -> None:
        self.loaded[param_name] = self.loaded.get(param_name, 0) + 1

    def _index_experts(self) -> dict[tuple[str, int, str], list[tuple[str, int]]]:
        """(layer, expert, projection) -> [(parameter stem, slot)], from the parameters that exist and vLLM's mapping."""
        mapping = (
            self.model.get_expert_mapping() if hasattr(self.model, "get_expert_mapping") else self._draft_mapping()
        )
        index: dict[tuple[str, int, str], list[tuple[str, int]]] = {}
        layers = {name.partition(".ffn.experts.")[0] for name in self.params if ".ffn.experts." in name}
        for stem, weight_name, slot, projection in mapping:
            _, expert, _ = weight_name.strip(".").split(".", 2)
            for layer in layers:
                key = (layer, int(expert), projection)
                index.setdefault(key, []).append((f"{layer}.ffn.{stem}", slot))
        return index

    def _draft_mapping(self) -> list[tuple[str, str, int, str]]:
        """vLLM's expert mapping for a model that does not offer one (the MTP draft)."""
        from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping

        return fused_moe_make_expert_params_mapping(
            self.model,
            ckpt_gate_proj_name="w1",
            ckpt_down_proj_name="w2",
            ckpt_up_proj_name="w3",
            num_experts=self.config.n_routed_experts,
        )

    def _check_complete(self) -> None:
        """Refuse to go on with a parameter that nothing filled, or a fused one with a shard or an expert missing.

        Raises: CheckpointError - lists the first parameters concerned.
        """
        may_stay = self._may_stay()
        missing = [name for name in self.params if name not in self.loaded and name not in may_stay]
        partial = [
            f"{name} ({count} of {self._num_tensors(name)} tensors)"
            for name, count in self.loaded.items()
            if count < self._num_tensors(name)
        ]
        if missing or partial:
            listed = ", ".join((missing + partial)[:5])
            raise CheckpointError(
                f"{len(missing)} parameters were not in the checkpoint and {len(partial)} only in part: {listed}; "
                "export or download the checkpoint again"
            )

    def _num_tensors(self, param_name: str) -> int:
        """How many tensors of the checkpoint make up a parameter: shards, or one a projection of every local expert.

        An expert's packed weight has no value that could mean "never loaded", so only counting finds the gap.
        """
        module, leaf = names.split_leaf(param_name)
        if ".ffn.experts." in param_name:
            return self.params[param_name].shape[0] * (2 if leaf.startswith("w13_") else 1)
        return len(names.module_of(module))

    def _may_stay(self) -> set[str]:
        """Parameters that a checkpoint need not have: tied heads, and a draft's copies of the main model's tables."""
        stay = set()
        if getattr(self.config, "tie_word_embeddings", False):
            stay.add("lm_head.weight")
        if self.is_mtp:
            stay |= {n for n in self.params if n.endswith(("embed_tokens.weight", "shared_head.head.weight"))}
        return stay


def _misfit(name: str, tensor: torch.Tensor, param: Any, why: str) -> CheckpointError:
    """The error for a tensor that its parameter cannot take."""
    return CheckpointError(
        f"{name}: {tensor.dtype} {tuple(tensor.shape)} does not fit the parameter of {param.dtype} "
        f"{tuple(param.shape)} on this rank ({why}); the checkpoint and config.json are not of one model"
    )


# Parameters of an MTP layer that sit beside, not inside, its decoder block.
MTP_OWN = frozenset({"enorm", "hnorm", "e_proj", "h_proj", "shared_head"})


def target_name(canonical: str, num_hidden_layers: int, is_mtp: bool) -> str | None:
    """The name under which a model knows a canonical tensor; None if it belongs to the other model (main or MTP draft)."""
    if not canonical.startswith("mtp."):
        return None if is_mtp else canonical
    if not is_mtp:
        return None
    _, index, rest = canonical.split(".", 2)
    if rest == "embed_tokens.weight":
        return "model.embed_tokens.weight"
    own = rest.split(".")[0] in MTP_OWN or rest.startswith("hc_head_")
    return f"model.layers.{num_hidden_layers + int(index)}.{'' if own else 'mtp_block.'}{rest}"


def check_scale_tensor(name: str, canonical: str, tensor: torch.Tensor) -> None:
    """Refuse an unusable scale as it comes off the disk, by the checkpoint's own name.

    Raises: CheckpointError - NaN, infinite, zero or negative, or more than one number where one is meant.
    """
    leaf = canonical.rpartition(".")[2]
    problem = None
    if leaf in GLOBAL_SCALES:
        problem = f"of shape {tuple(tensor.shape)}" if tensor.numel() != 1 else bad_global_scale(float(tensor))
    elif leaf == "weight_scale" and tensor.dtype == torch.float8_e4m3fn:
        problem = bad_block_scale(tensor)
    if problem:
        shown = f" ({float(tensor)})" if tensor.numel() == 1 else ""
        raise CheckpointError(
            f"{name} is {problem}{shown}; expected a positive finite scale. Serving it would give garbage without a word: "
            "calibrate and export the checkpoint again (an expert that calibration never reached has no usable input_scale)"
        )


class Progress:
    """How far a load is: a bar on a terminal, else one line a layer; and the heartbeat file."""

    def __init__(
        self, sizes: dict[str, int], layer_of: dict[str, str], status: Any, *, show: bool, use_bar: bool
    ) -> None:
        from tqdm import tqdm

        self.sizes, self.layer_of, self.status, self.show = sizes, layer_of, status, show
        self.total, self.done, self.started = sum(sizes.values()), 0, time.monotonic()
        self.left: dict[str, int] = {}
        for name in sizes:
            self.left[layer_of[name]] = self.left.get(layer_of[name], 0) + 1
        self.num_layers, self.layers_done = len(self.left), 0
        self.use_bar = use_bar and show
        self.bar = tqdm(
            total=self.total, unit="B", unit_scale=True, desc="Loading NVFP4 weights", disable=not self.use_bar
        )

    def wrap(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """Pass tensors through; a tensor counts as done when the next one is asked for."""
        self.status.update("loading", 0, self.total)
        for name, tensor in weights:
            yield name, tensor
            del tensor
            self._advance(name)
        self.bar.close()

    def _advance(self, name: str) -> None:
        self.done += self.sizes[name]
        self.bar.update(self.sizes[name])
        self.status.update("loading", self.done, self.total)
        layer = self.layer_of[name]
        self.left[layer] -= 1
        if self.left[layer]:
            return
        self.layers_done += 1
        if self.use_bar:
            self.bar.set_postfix_str(f"{self.layers_done}/{self.num_layers} layers")
        elif self.show:
            logger.info(
                "Loaded %s (%d of %d), %.1f of %.1f MB, %.1f s",
                layer, self.layers_done, self.num_layers, self.done / 1e6, self.total / 1e6,
                time.monotonic() - self.started,
            )  # fmt: skip
