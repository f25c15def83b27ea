"""What the overlay changes in DeepSeek-V4's attention, for CPU and NVIDIA: five methods and two submodules.

Upstream builds the compressor's projections and the indexer's weights_proj without a quantization method, and its NVIDIA
path multiplies by `.weight` directly. The submodules are replaced after construction; the methods live in a mixin that is
put in front of whatever attention class the platform chose.
"""

from typing import Any

import torch
from vllm import envs
from vllm.compilation.breakable_cudagraph import eager_break_during_capture, is_breakable_cudagraph_enabled
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, UnquantizedLinearMethod
from vllm.utils.multi_stream_utils import execute_in_parallel

from cutedsl.ops.wo_a import wo_a as wo_a_op
from cutedsl.runners.linear import LinearRunner
from cutedsl.runners.wo_a import WoARunner
from cutedsl.runners.workspace import workspace
from vllm_nvfp4 import dump, platform, shared_input
from vllm_nvfp4.checkpoint import CheckpointError
from vllm_nvfp4.mixin import Upstream, in_front_of
from vllm_nvfp4.wo_a import ModelOptNvFp4WoAMethod, input_scale_bound


class Nvfp4AttentionMixin(Upstream):
    """Methods in front of an upstream attention class."""

    nvfp4_wo_a_runner: WoARunner | None = None
    nvfp4_shared_input: shared_input.SharedInput | None = None
    nvfp4_input_runner: LinearRunner | None = None
    nvfp4_shared_query: shared_input.SharedQuery | None = None

    def _o_proj(self, o: Any, positions: torch.Tensor) -> torch.Tensor:
        """Inverse RoPE, wo_a and wo_b; upstream's own unless wo_a is in NVFP4."""
        runner = self.nvfp4_wo_a_runner
        if runner is None:
            return super()._o_proj(o, positions)
        return self.wo_b(wo_a_op(o, positions, self.rotary_emb.cos_sin_cache, runner.runner_id))

    def _alloc_attn_out(self, num_tokens: int, hidden_states: torch.Tensor) -> Any:
        """A plain BF16 buffer where our wo_a reads it: some NVIDIA layers would fuse an FP8 cast in here."""
        if self.nvfp4_wo_a_runner is None:
            return super()._alloc_attn_out(num_tokens, hidden_states)
        return hidden_states.new_empty((num_tokens, self.padded_heads, self.head_dim))

    def _split_qkv_and_norm(self, qr_kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Upstream's; the query latent already quantized where wq_b and the indexer's wq_b take it alike."""
        qr, qr_scale, kv = super()._split_qkv_and_norm(qr_kv)
        if self.nvfp4_shared_query is not None:
            qr, qr_scale = self.nvfp4_shared_query(qr)
        return qr, qr_scale, kv

    def _wq_b_proj(self, qr: torch.Tensor, qr_scale: torch.Tensor | None = None) -> torch.Tensor:
        """wq_b, of what `_split_qkv_and_norm` gave."""
        return super()._wq_b_proj(qr) if qr_scale is None else shared_input.multiply(self.wq_b, qr, qr_scale)

    def _run_parallel_input_projections(self, hidden_states: torch.Tensor) -> tuple[Any, Any, Any, Any]:
        """The four projections of the layer's input, through their modules instead of `.weight`; joined ones in one GEMM.

        kv scores are computed in BF16 and widened: NVFP4 kernels emit the activation's dtype.
        """
        streams = self.aux_stream_list[:3] if self.aux_stream_list is not None else None
        projections: list[Any] = [lambda: self._fused_wqa_wkv_gemm(hidden_states), None, None, None]
        if self.compressor is not None:
            projections[1] = lambda: kv_score(self.compressor, hidden_states)
        if self.indexer is not None:
            projections[2] = lambda: self.indexer.weights_proj(hidden_states)[0]
            projections[3] = lambda: kv_score(self.indexer.compressor, hidden_states)
        joined = self.nvfp4_shared_input if self.nvfp4_input_runner is not None else None
        if joined is not None:
            first, *others = joined.places
            projections[first] = lambda: joined(hidden_states)
            for place in others:
                projections[place] = None
        default, aux = execute_in_parallel(
            projections[0],
            projections[1:],
            self.ln_events[0],
            self.ln_events[1:4],
            streams,
            enable=hidden_states.shape[0] <= envs.VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD,
        )
        results = [default, *aux]
        if joined is not None:
            for place, columns in zip(joined.places, results[joined.places[0]], strict=True):
                results[place] = columns.float() if place in KV_SCORES else columns
        qr_kv, main, weights, index = results
        return qr_kv, main, index, weights


class Nvfp4IndexerMixin(Upstream):
    """One method in front of an upstream indexer class."""

    def _wq_b_proj(self, qr: torch.Tensor, qr_scale: torch.Tensor | None = None) -> torch.Tensor:
        """As the attention's."""
        return super()._wq_b_proj(qr) if qr_scale is None else shared_input.multiply(self.wq_b, qr, qr_scale)


# Upstream's methods that must run outside of piecewise CUDA graphs.
BREAKS = ("_sparse_indexer_and_attn", "_prepare_and_attn_eager")
# Of the four projections, in the order of upstream's streams: those that upstream computes in fp32.
KV_SCORES = (1, 3)


def input_linears(attn: Any) -> list[Any]:
    """The linears of the four projections of the layer's input, in the order of upstream's streams; None for none."""
    compressor, indexer = attn.compressor, attn.indexer
    return [
        attn.fused_wqa_wkv,
        compressor and compressor.fused_wkv_wgate,
        indexer and indexer.weights_proj,
        indexer and indexer.compressor.fused_wkv_wgate,
    ]


def kv_score(compressor: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """compressor.fused_wkv_wgate(hidden_states) in fp32; upstream's direct product where the weight is not quantized."""
    projection = compressor.fused_wkv_wgate
    if isinstance(projection.quant_method, UnquantizedLinearMethod):
        return torch.mm(hidden_states, projection.weight.T, out_dtype=torch.float32)
    return projection(hidden_states).float()


def adapt(attn: Any, quant_config: Any) -> None:
    """Give an upstream attention layer NVFP4 projections and our methods; called once, before weights are loaded."""
    attn.__class__ = in_front_of(Nvfp4AttentionMixin, type(attn))
    if is_breakable_cudagraph_enabled():
        _restore_breaks(attn)
    if attn.compressor is not None:
        _replace_fused(attn.compressor, quant_config)
    if attn.indexer is not None:
        _replace_fused(attn.indexer.compressor, quant_config)
        _replace_weights_proj(attn.indexer, quant_config)
        attn.indexer.__class__ = in_front_of(Nvfp4IndexerMixin, type(attn.indexer))
    attn.nvfp4_shared_input = shared_input.join(f"{attn.prefix}.input_projections", input_linears(attn))
    if isinstance(attn.wo_a.quant_method, ModelOptNvFp4WoAMethod):
        # The CPU class wraps this method on the instance to pack a BF16 copy, which NVFP4 does not have.
        attn.wo_a.quant_method.__dict__.pop("process_weights_after_loading", None)


def _restore_breaks(attn: Any) -> None:
    """Let attention run outside of piecewise CUDA graphs also where upstream's module was imported too early for that.

    vLLM's decorator asks for the environment variable while that module is imported, and vLLM sets the variable later, when
    it has read the model's config: too late in the process that reads it, where `LLM` may run the engine, and in a fork of
    it. A graph then holds attention with the metadata of its capture, and gives wrong answers or an illegal address.
    """
    cls = type(attn)  # ours, not upstream's
    for name in BREAKS:
        method = getattr(cls, name)
        if not hasattr(method, "__wrapped__"):
            setattr(cls, name, eager_break_during_capture(method))
    # The constructor has bound the method as it was.
    attn._prepare_and_attn_fn = getattr(attn, attn._prepare_and_attn_fn.__name__)


def _replace_fused(compressor: Any, quant_config: Any) -> None:
    """The compressor's wkv + wgate, built again with a quantization method where the checkpoint has it quantized."""
    prefix, old = f"{compressor.prefix}.fused_wkv_wgate", compressor.fused_wkv_wgate
    compressor.fused_wkv_wgate = MergedColumnParallelLinear(
        old.input_size,
        list(old.output_sizes),
        bias=False,
        return_bias=False,
        quant_config=quant_config,
        disable_tp=True,
        prefix=prefix,
    )


def _replace_weights_proj(indexer: Any, quant_config: Any) -> None:
    """The indexer's head weights, likewise."""
    old = indexer.weights_proj
    indexer.weights_proj = ReplicatedLinear(
        old.input_size, old.output_size, bias=False, quant_config=quant_config, prefix=f"{indexer.prefix}.weights_proj"
    )


def _separate_workspaces(attn: Any) -> None:
    """Give linears that upstream runs on auxiliary streams, beside those of the main one, buffers of their own.

    Streams as in `_run_parallel_input_projections`; the indexer's wq_b runs beside wq_b on one of the same.
    """
    beside: list[tuple[int, Any]] = [
        (stream, getattr(linear, "nvfp4_runner", None)) for stream, linear in enumerate(input_linears(attn)[1:])
    ]
    if attn.indexer is not None:
        beside.append((1, getattr(attn.indexer.wq_b, "nvfp4_runner", None)))
    if attn.nvfp4_input_runner is not None and attn.nvfp4_shared_input.places[0] > 0:
        beside.append((attn.nvfp4_shared_input.places[0] - 1, attn.nvfp4_input_runner))
    for stream, runner in beside:
        if hasattr(runner, "chain"):  # the reference has no buffers
            runner.chain.workspace = workspace(f"linear, auxiliary stream {stream}", runner.device)


def finish(attn: Any) -> None:
    """After the load: build the runners of joined linears and of wo_a, separate what runs side by side, and make sure that
    RoPE's table is still fp32.

    Raises: CheckpointError - a norm weight is not finite, so wo_a's activation bound is not; RuntimeError - the table was
        rounded (positions beyond a few hundred would be wrong).
    """
    table = attn.rotary_emb.cos_sin_cache
    if table.dtype != torch.float32:
        raise RuntimeError(f"{attn.prefix}: RoPE's cos/sin table is {table.dtype}, expected float32; vLLM changed it")
    if attn.nvfp4_shared_input is not None:
        attn.nvfp4_input_runner = attn.nvfp4_shared_input.finish()
    if attn.indexer is not None:
        query = attn.wq_b, attn.indexer.wq_b
        attn.nvfp4_shared_query = shared_input.share_query(*query, attn.max_num_batched_tokens)
    _separate_workspaces(attn)
    method = attn.wo_a.quant_method
    if not isinstance(method, ModelOptNvFp4WoAMethod):
        return
    layer = attn.wo_a
    if layer.input_scale is None:
        norms = [attn.kv_norm.weight] + ([attn.compressor.norm.weight] if attn.compressor is not None else [])
        bound = input_scale_bound(norms, attn.head_dim)
        if not 0 < bound < float("inf"):
            raise CheckpointError(f"{attn.prefix}: kv_norm or compressor.norm gives wo_a the activation scale {bound}")
        layer.input_scale = torch.nn.Parameter(
            torch.tensor([bound], dtype=torch.float32, device=layer.weight.device), requires_grad=False
        )
    backend = platform.backend()
    assert backend is not None  # ModelOptNvFp4WoAMethod refused to be built without one
    attn.nvfp4_wo_a_runner = WoARunner(
        f"{attn.prefix}.wo_a",
        layer.weight.data,
        layer.weight_scale.data,
        layer.weight_scale_2.data.reshape(()),
        layer.input_scale.data.reshape(()),
        num_groups=attn.n_local_groups,
        head_dim=attn.head_dim,
        rope_dim=attn.rope_head_dim,
        backend=backend,
        activations=platform.activations(),
    )
    dump.watch(attn.nvfp4_wo_a_runner)
