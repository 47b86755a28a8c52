"""The keys of a DeepSpeed 0.19 configuration, and those that this package does not support.

DeepSpeed silently ignores unknown keys at the top level and in several sections, so the names are listed here; a test
compares the lists with DeepSpeed's source.
"""

from __future__ import annotations

from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_LEVEL = _names("""
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
    optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """)

_ZERO_3 = _names("""
    gather_16bit_weights_on_model_save max_live_parameters max_reuse_distance model_persistence_threshold
    module_granularity_threshold param_persistence_threshold prefetch_bucket_size use_all_reduce_for_fetch_params
    allgather_sequential
    """)

# Keys by section; sections are dotted paths.
SECTIONS: dict[str, frozenset[str]] = {
    "": TOP_LEVEL,
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "optimizer.params": frozenset({"lr", "betas", "eps", "weight_decay"}),
    "scheduler": frozenset({"type", "params"}),
    "bf16": _names("""
        enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states
        """),
    "fp16": _names("""
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """),
    "zero_optimization": _names("""
        stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
        cpu_offload_use_pin_memory cpu_offload stage3_gather_fp16_weights_on_model_save ignore_unused_parameters
        legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
        zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
        pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
        save_muon_momentum_buffer_in_memory leaf_module
        """)
    | _ZERO_3
    | {f"stage3_{name}" for name in _ZERO_3},
    "zero_optimization.offload_optimizer": _names("""
        device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload
        cpuadam_cores_perc
        """),
    "zero_optimization.offload_param": frozenset(
        {"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}
    ),
    "activation_checkpointing": _names("""
        partition_activations number_checkpoints contiguous_memory_optimization synchronize_checkpoint_boundary profile
        cpu_checkpointing
        """),
    "expert_parallel": _names("""
        enabled autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan preset_model
        moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm route_norm route_scale
        score_apply combine_impl row_weighting_impl gate_up_impl comm_backend comm_num_sm comm_qp_margin
        comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func top_k load_balance_coeff
        routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts
        shared_experts_pattern shared_experts_gate_pattern expert_activation
        """),
    "tensorboard": frozenset({"enabled", "output_path", "job_name"}),
}

_WARMUP = {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "last_batch_iteration"}
SCHEDULERS: dict[str, frozenset[str]] = {
    "WarmupLR": frozenset(_WARMUP),
    "WarmupDecayLR": frozenset(_WARMUP | {"total_num_steps"}),
    "WarmupCosineLR": _names("""
        total_num_steps warmup_min_ratio warmup_num_steps cos_min_ratio warmup_type last_batch_iteration
        """),
    "LRRangeTest": _names("""
        lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase
        last_batch_iteration
        """),
    "OneCycle": _names("""
        cycle_min_lr cycle_max_lr decay_lr_rate cycle_first_step_size cycle_second_step_size cycle_first_stair_count
        cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom decay_mom_rate
        last_batch_iteration
        """),
}

# DeepSpeed refuses these with any value, but only after every process has started.
REMOVED = _names("""
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients
    """)

_MODEL_OWNS = "the recipe defines the experts; set only enabled and autoep_size here. Remove the key"
_NO_OTHER_PARALLELISM = "only data and expert parallelism are available. Remove the key"
_OWN_METRICS = "metrics are written to TensorBoard and metrics.jsonl. Remove the section, or set enabled to false"
_OWN_RECOMPUTATION = (
    "PyTorch recomputes whole layers. Remove the key; an empty activation_checkpointing section turns recomputation on"
)

# Refused unless disabled by false, null, a size of 0 or 1, or enabled = false in the section.
UNSUPPORTED: dict[str, str] = {
    "fp16": "float16 needs loss scaling, which the objective does not have. Use the bf16 section",
    "bfloat16": "this is the old name of the section. Call it bf16",
    "torch_autocast": "the bf16 section sets the precision. Remove the section",
    "pipeline": _NO_OTHER_PARALLELISM,
    "tensor_parallel": _NO_OTHER_PARALLELISM,
    "sequence_parallel_size": _NO_OTHER_PARALLELISM,
    "data_parallel_size": "it is the number of ranks. Remove the key",
    "use_data_before_expert_parallelism": "expert parallel groups are always consecutive ranks. Remove the key",
    "hybrid_engine": "generation does not use the training engine. Remove the section",
    "data_efficiency": "the data section of the recipe defines the data order. Remove the section",
    "dataloader_drop_last": "batches have a fixed shape and the data stream has no end. Remove the key",
    "autotuning": "DeepSpeed's autotuner starts its own scripts. Use --dry-run to compare settings",
    "weight_quantization": "it is for inference only. Remove the section",
    "compile": "DeepCompile does not support expert parallelism. Remove the section",
    "wandb": _OWN_METRICS,
    "csv_monitor": _OWN_METRICS,
    "comet": _OWN_METRICS,
    "optimizer.legacy_fusion": "it belongs to the LAMB optimizer. Remove the key",
    "activation_checkpointing.partition_activations": _OWN_RECOMPUTATION,
    "activation_checkpointing.number_checkpoints": _OWN_RECOMPUTATION,
    "activation_checkpointing.contiguous_memory_optimization": _OWN_RECOMPUTATION,
    "activation_checkpointing.synchronize_checkpoint_boundary": _OWN_RECOMPUTATION,
    "activation_checkpointing.profile": _OWN_RECOMPUTATION,
    "activation_checkpointing.cpu_checkpointing": _OWN_RECOMPUTATION,
    "zero_optimization.zenflow": "its optimizer does not support expert parameters. Remove the key",
    "zero_optimization.zero_hpz_partition_size": "not available for ZeRO-3 with experts. Remove the key",
    "zero_optimization.zero_quantized_gradients": "not available with experts. Remove the key",
    "zero_optimization.zero_quantized_weights": "not tested with experts. Remove the key",
    "zero_optimization.zero_quantized_nontrainable_weights": "not tested with experts. Remove the key",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.elastic_checkpoint": "convert to a universal checkpoint instead. Remove the key",
    **{f"expert_parallel.{key}": _MODEL_OWNS for key in SECTIONS["expert_parallel"] - {"enabled", "autoep_size"}},
    "expert_parallel.top_k": "set moe.top_k in the recipe",
    "expert_parallel.load_balance_coeff": "set moe.balance_weight in the recipe",
    "expert_parallel.expert_tensor_parallel_size": _NO_OTHER_PARALLELISM,
}

# The only supported value, with the reason.
FIXED: dict[str, tuple[Any, str]] = {
    "gradient_allreduce_op": ("mean", "the objective is scaled for averaged gradients"),
    "managed_gradient_accumulation": (True, "the objective is scaled for the engine's own accumulation"),
    "zero_optimization.contiguous_gradients": (True, "expert gradients need it"),
    "zero_optimization.reduce_scatter": (True, "expert gradients need it"),
    "zero_optimization.compute_grad_norm": (True, "the gradient norm is logged"),
}
