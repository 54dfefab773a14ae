"""The keys of zero_optimization and of the aio section.

Stages are those at which DeepSpeed 0.19.8 reads a key (runtime/engine.py, runtime/zero/stage_1_and_2.py, stage3.py).
"""

from ds_recipes.config.ds.rules import LOW, SAME, SHARDED, NoEffect, Only, Removed, Rule, Section, Value

NVME = "FSDP2 cannot offload to NVMe: offload to the CPU, or use --engine deepspeed"
QUANTISED = Value(
    "bool", stages=SHARDED, fsdp="FSDP2 has no quantised communication: leave it out, or use --engine deepspeed"
)
OWN_CHECKPOINTS = NoEffect(
    "it is for DeepSpeed's own checkpoints; this program writes Hugging Face files with tools/convert_to_hf.py"
)
MICS = Removed(
    "was removed from DeepSpeed 0.19 (https://github.com/deepspeedai/DeepSpeed/issues/8489). What it did is hpZ in DeepSpeed "
    "and HSDP in FSDP2: write zero_optimization.zero_hpz_partition_size, which both engines read"
)
TUNING = Value("bool")
BUCKET = Value("count")
PARAMETERS = Value("count", stages=SHARDED)

OFFLOAD_OPTIMIZER: dict[str, Rule] = {
    "device": Value("text", choices=("none", "cpu", "nvme"), fsdp=SAME),
    "pin_memory": Value("bool", fsdp=SAME),
    "nvme_path": Value("path", nullable=True),
    "buffer_count": Value("count", stages=SHARDED),
    "pipeline_read": Value("bool", stages=SHARDED),
    "pipeline_write": Value("bool", stages=SHARDED),
    "fast_init": Value("bool", stages=SHARDED),
    "ratio": Only(
        "share",
        (1,),
        "partial offload needs DeepSpeed's own CPU Adam, and torch's AdamW steps here: leave it out",
        stages=SHARDED,
    ),
    "super_offload": Only("bool", (False,), "it replaces the optimizer, and torch's AdamW steps here: leave it out"),
    "cpuadam_cores_perc": NoEffect("it is for super_offload", "share"),
}

OFFLOAD_PARAM: dict[str, Rule] = {
    "device": Value("text", choices=("none", "cpu", "nvme"), fsdp=SAME),
    "pin_memory": Value("bool", fsdp=SAME),
    "nvme_path": Value("path", nullable=True),
    "buffer_count": Value("count"),
    "buffer_size": Value("count"),
    "max_in_cpu": Value("count"),
}

LEAF_MODULE: dict[str, Rule] = {name: Value("names") for name in ("classes", "names", "name_suffixes")}

ZERO: dict[str, Rule] = {
    "stage": Value("count", fsdp=SAME),
    "contiguous_gradients": TUNING,
    "overlap_comm": Value("bool", nullable=True),
    "reduce_scatter": TUNING,
    "reduce_bucket_size": Value("count", least=1),
    "offload_optimizer": Section(OFFLOAD_OPTIMIZER, is_model=True, nullable=True),
    # stages 1 and 2
    "allgather_partitions": Value("bool", stages=LOW),
    "allgather_bucket_size": Value("count", stages=LOW),
    "use_multi_rank_bucket_allreduce": Value("bool", stages=LOW),
    "ignore_unused_parameters": Value("bool", stages=(2,)),
    "round_robin_gradients": Value("bool", stages=LOW),
    "parameter_alignment": Value("bool", stages=LOW),
    "compute_grad_norm": Only("bool", (True,), "the gradient norm is always logged: leave it out", stages=LOW),
    "legacy_stage1": NoEffect("it asks for what DeepSpeed no longer has", "bool"),
    # stage 3
    "offload_param": Section(OFFLOAD_PARAM, is_model=True, stages=SHARDED, nullable=True),
    "sub_group_size": PARAMETERS,
    "stage3_prefetch_bucket_size": PARAMETERS,
    "stage3_param_persistence_threshold": PARAMETERS,
    "stage3_model_persistence_threshold": PARAMETERS,
    "stage3_max_live_parameters": PARAMETERS,
    "stage3_max_reuse_distance": PARAMETERS,
    "stage3_module_granularity_threshold": Value("count", least=None, stages=SHARDED),
    "stage3_use_all_reduce_for_fetch_params": Value("bool", stages=SHARDED),
    "stage3_allgather_sequential": Value("bool", stages=SHARDED),
    "memory_efficient_linear": Value("bool", stages=SHARDED),
    "log_trace_cache_warnings": Value("bool", stages=SHARDED),
    "enable_sanity_checks": Value("bool", stages=SHARDED),
    "override_module_apply": Only("bool", (True,), "ZeRO-3 needs it: leave it out", stages=SHARDED),
    "leaf_module": Section(LEAF_MODULE, is_model=True, stages=SHARDED, nullable=True),
    "zero_hpz_partition_size": Value("count", stages=SHARDED, fsdp=SAME),
    "zero_quantized_weights": QUANTISED,
    "zero_quantized_nontrainable_weights": QUANTISED,
    "zero_quantized_gradients": QUANTISED,
    # no stage, here
    "stage3_gather_16bit_weights_on_model_save": NoEffect(OWN_CHECKPOINTS.reason, "bool"),
    "load_from_fp32_weights": NoEffect("it is for DeepSpeed's own checkpoints", "bool"),
    "elastic_checkpoint": NoEffect("it is for DeepSpeed's own checkpoints", "bool"),
    "pipeline_loading_checkpoint": NoEffect("it is for DeepSpeed's own checkpoints", "bool"),
    "cpu_offload_use_pin_memory": NoEffect(
        'it is an old name that DeepSpeed ignores: write "pin_memory" in "offload_optimizer"', "bool", nullable=True
    ),
    "save_muon_momentum_buffer_in_memory": NoEffect("it is for the Muon optimizer", "bool"),
    "zenflow": Only("object", (), "ZenFlow is not there: leave it out", nullable=True),
    "mics_shard_size": MICS,
    "mics_hierarchical_params_gather": MICS,
    "zeropp_loco_param": Removed(
        "was removed from DeepSpeed 0.19 (https://github.com/deepspeedai/DeepSpeed/issues/8489): leave it out"
    ),
}

AIO: dict[str, Rule] = {
    "block_size": Value("count"),
    "queue_depth": Value("count"),
    "intra_op_parallelism": Value("count", least=1),
    "single_submit": Value("bool"),
    "overlap_events": Value("bool"),
    "use_gds": Value("bool"),
    "thread_count": NoEffect("it is an old name that DeepSpeed ignores: write intra_op_parallelism", "count"),
}

# Old name: today's name. DeepSpeed refuses a JSON that has both.
SHORT_NAMES = {
    name: f"stage3_{name}"
    for name in (
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "module_granularity_threshold",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
        "gather_16bit_weights_on_model_save",
    )
} | {"stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save"}
OLD_OFFLOAD = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
