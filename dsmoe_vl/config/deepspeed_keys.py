"""The keys of a DeepSpeed 0.19 configuration, and those that this package does not support.

DeepSpeed silently ignores unknown keys at the top level and in several sections, so the names are listed here; a test
compares the lists with DeepSpeed's source.
"""

from __future__ import annotations

from typing import Any, Literal, cast

Kind = Literal["flag", "integer", "number", "string", "strings", "list", "section", "any"]


def _keys(**of_kind: str) -> dict[str, Kind]:
    """Names of keys by the kind of their values."""
    return {name: cast(Kind, kind) for kind, names in of_kind.items() for name in names.split()}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_LEVEL = _keys(
    section="""
        activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger compile csv_monitor
        data_efficiency data_types datastates_ckpt expert_parallel flops_profiler fp16 hybrid_engine optimizer pipeline
        scheduler tensor_parallel tensorboard timers torch_autocast wandb weight_quantization zero_optimization
        """,
    integer="""
        data_parallel_size gradient_accumulation_steps sequence_parallel_size steps_per_print train_batch_size
        train_micro_batch_size_per_gpu vocabulary_size
        """,
    number="gradient_clipping gradient_predivide_factor",
    flag="""
        dataloader_drop_last disable_allgather disable_python_gc dump_state managed_gradient_accumulation
        memory_breakdown prescale_gradients use_data_before_expert_parallelism wall_clock_breakdown
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
        """,
    string="communication_data_type gradient_allreduce_op log_level seq_parallel_communication_data_type",
)

_ZERO_3 = _keys(
    integer="""
        max_live_parameters max_reuse_distance model_persistence_threshold module_granularity_threshold
        param_persistence_threshold prefetch_bucket_size
        """,
    flag="gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params allgather_sequential",
)

# Keys by section, with the kind of their values; sections are dotted paths. Other sections are not looked into.
SECTIONS: dict[str, dict[str, Kind]] = {
    "": TOP_LEVEL,
    "optimizer": _keys(string="type", section="params", flag="legacy_fusion"),
    # DeepSpeed reads torch_adam, adam_w_mode and fp32_optimizer_states for the optimizers that it builds itself.
    "optimizer.params": _keys(
        number="lr eps weight_decay", list="betas", flag="torch_adam adam_w_mode fp32_optimizer_states"
    ),
    "scheduler": _keys(string="type", section="params"),
    "bf16": _keys(
        flag="enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "fp16": _keys(
        flag="enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
        number="loss_scale",
        integer="initial_scale_power loss_scale_window hysteresis min_loss_scale",
    ),
    "zero_optimization": {
        **_keys(
            integer="stage reduce_bucket_size allgather_bucket_size sub_group_size zero_hpz_partition_size",
            flag="""
                contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm
                compute_grad_norm load_from_fp32_weights elastic_checkpoint cpu_offload_param cpu_offload_use_pin_memory
                cpu_offload stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1
                round_robin_gradients parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights
                zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
                log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory
                """,
            section="offload_param offload_optimizer zenflow leaf_module",
        ),
        **_ZERO_3,
        **{f"stage3_{name}": kind for name, kind in _ZERO_3.items()},
    },
    "zero_optimization.offload_optimizer": _keys(
        string="device nvme_path",
        integer="buffer_count",
        flag="pin_memory pipeline_read pipeline_write fast_init super_offload",
        number="ratio cpuadam_cores_perc",
    ),
    "zero_optimization.offload_param": _keys(
        string="device nvme_path", integer="buffer_count buffer_size max_in_cpu", flag="pin_memory"
    ),
    "zero_optimization.leaf_module": _keys(strings="classes names name_suffixes"),
    "activation_checkpointing": _keys(
        flag="""
            partition_activations contiguous_memory_optimization synchronize_checkpoint_boundary profile
            cpu_checkpointing
            """,
        integer="number_checkpoints",
    ),
    "expert_parallel": _keys(
        flag="""
            enabled validate_folding_routing async_split_plan use_grouped_mm disable_triton_grouped_mm route_norm
            has_shared_experts
            """,
        integer="""
            autoep_size expert_tensor_parallel_size comm_num_sm comm_qp_margin comm_max_tokens_per_rank
            num_expert_groups num_limited_groups top_k
            """,
        any="""
            preset_model moe_layer_pattern expert_pattern router_pattern route_scale score_apply combine_impl
            row_weighting_impl gate_up_impl comm_backend score_func load_balance_coeff routed_scaling_factor expert_w1
            expert_w2 expert_w3 num_experts_attr top_k_attr shared_experts_pattern shared_experts_gate_pattern
            expert_activation
            """,
    ),
    "tensorboard": _keys(flag="enabled", string="output_path job_name"),
    "wandb": _keys(flag="enabled", string="group team project"),
    "csv_monitor": _keys(flag="enabled", string="output_path job_name"),
    "comet": _keys(
        flag="enabled online",
        integer="samples_log_interval",
        string="project workspace api_key experiment_name experiment_key mode",
    ),
    "flops_profiler": _keys(
        flag="enabled detailed",
        number="recompute_fwd_factor",
        integer="profile_step module_depth top_modules",
        string="output_file",
    ),
    "comms_logger": _keys(flag="enabled prof_all verbose debug", list="prof_ops"),
    "timers": _keys(section="throughput"),
    "timers.throughput": _keys(flag="enabled synchronized"),
    "data_types": _keys(string="grad_accum_dtype"),
    "checkpoint": _keys(
        string="tag_validation",
        flag="load_universal use_node_local_storage checkpoint_serialization",
        section="parallel_write writer",
    ),
    "checkpoint.parallel_write": _keys(flag="pipeline_stage"),
    "checkpoint.writer": _keys(
        string="type",
        integer="io_buffer_size",
        flag="io_buffer_double show_statistics decoupled",
        any="data_parallel",
    ),
    "aio": _keys(integer="block_size queue_depth intra_op_parallelism", flag="single_submit overlap_events use_gds"),
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

# What a scheduler does not work without, and nobody fills in.
NEEDED: dict[str, tuple[str, ...]] = {"OneCycle": ("cycle_min_lr", "cycle_max_lr")}

# DeepSpeed refuses these with any value, but only after every process has started.
REMOVED = _names("""
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients
    """)

_MODEL_OWNS = "the recipe defines the experts; set only enabled and autoep_size here. Remove the key"
_NO_OTHER_PARALLELISM = "only data and expert parallelism are available. Remove the key"
_OWN_RECOMPUTATION = (
    "PyTorch recomputes. Remove the key; an empty activation_checkpointing section, or run.recompute, turns it on"
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
    "comet.api_key": "plan.json would show it. Set COMET_API_KEY in the environment, and remove the key",
    "optimizer.params.torch_adam": "AdamW is PyTorch's, under offload DeepSpeed's for CPUs. Remove the key",
    "optimizer.params.fp32_optimizer_states": "optimizer states are fp32. Remove the key",
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
    **{
        f"expert_parallel.{key}": _MODEL_OWNS for key in SECTIONS["expert_parallel"].keys() - {"enabled", "autoep_size"}
    },
    "expert_parallel.top_k": "set moe.top_k in the recipe",
    "expert_parallel.load_balance_coeff": "set moe.balance_weight in the recipe",
    "expert_parallel.expert_tensor_parallel_size": _NO_OTHER_PARALLELISM,
}

# The only supported value, with the reason.
FIXED: dict[str, tuple[Any, str]] = {
    "gradient_allreduce_op": ("mean", "the objective is scaled for averaged gradients"),
    "managed_gradient_accumulation": (True, "the objective is scaled for the engine's own accumulation"),
    "bf16.check_grad_overflow": (True, "a step whose gradient is not finite is skipped"),
    "optimizer.params.adam_w_mode": (True, "weight decay is decoupled from the gradient, as in AdamW"),
    "zero_optimization.contiguous_gradients": (True, "expert gradients need it"),
    "zero_optimization.reduce_scatter": (True, "expert gradients need it"),
    "zero_optimization.compute_grad_norm": (True, "the gradient norm is logged"),
}

# What the "auto" of a Hugging Face configuration would mean here.
AUTO: dict[str, str] = {
    "train_batch_size": "Remove the key: it follows from the others",
    "train_micro_batch_size_per_gpu": "Write the packs of one rank, such as 4",
    "gradient_accumulation_steps": "Write the number of micro-steps, such as 1",
    "gradient_clipping": "Write the largest norm of the gradient, such as 1.0",
    "steps_per_print": "Remove the key: the recipe's run.log_every says when to log",
    "bf16.enabled": "Write true, or false for fp32",
    "fp16.enabled": "Remove the section: float16 is not supported",
    "optimizer.params.lr": "Write the peak learning rate, such as 3e-4",
    "optimizer.params.betas": "Write [0.9, 0.95]",
    "optimizer.params.eps": "Write 1e-8",
    "optimizer.params.weight_decay": "Write a number, such as 0.1",
    "scheduler.params.total_num_steps": "Remove the key: it is filled in from run.steps",
    "scheduler.params.warmup_num_steps": "Write a number of steps, such as 2000",
    "scheduler.params.warmup_min_lr": "Write 0",
    "scheduler.params.warmup_max_lr": "Remove the key: it is filled in from optimizer.params.lr",
    "zero_optimization.stage": "Write 0, 1, 2 or 3",
    **{
        f"zero_optimization.{key}": "Remove the key: DeepSpeed's default is used"
        for key, kind in SECTIONS["zero_optimization"].items()
        if kind in ("flag", "integer") and key != "stage"
    },
}
