"""The keys of a DeepSpeed JSON: which are honoured, which change nothing, and which are refused and why.

Names and defaults follow DeepSpeed 0.19.8 (runtime/config.py and the documentation at
https://www.deepspeed.ai/docs/config-json/); a test holds the table against the installed version's own fields.
"""

from ds_recipes.config.ds.keys_precision import ACTIVATION_CHECKPOINTING, AUTOCAST, BF16, DATA_TYPES, FP16
from ds_recipes.config.ds.keys_zero import AIO, MICS, OWN_CHECKPOINTS, ZERO
from ds_recipes.config.ds.rules import SAME, NoEffect, Only, Removed, Rule, Section, Switch, Value

GONE = "was removed from DeepSpeed 0.19, which refuses a JSON that still has it, even switched off"
ISSUE = "https://github.com/deepspeedai/DeepSpeed/issues/8489"
REMOVED = {
    name: Removed(f"{GONE} ({ISSUE}): {advice}")
    for name, advice in {
        "amp": "use bf16, fp16 or torch_autocast",
        "nebula": "leave it out; this program writes its checkpoints beside training",
        "compression_training": "leave it out",
        "quantize_training": "leave it out",
        "sparse_gradients": "leave it out",
        "eigenvalue": "leave it out",
        "sparse_attention": "leave it out; packed documents do not see each other anyway",
        "elasticity": "leave it out; a run continues on any number of ranks anyway",
        "graph_harvesting": "leave it out",
        "curriculum_learning": "leave it out",
        "progressive_layer_drop": "leave it out",
    }.items()
}

NOT_FOR_THIS = "it is for models that this program does not train"
AVERAGE = "the gradient is that of the mean over the step's target tokens, whatever is divided on the way"
PARALLEL = "the model is sharded over all ranks, and there is no other parallelism: leave it out"
OWN_TEXT = "this program logs the same by itself"

BATCH: dict[str, Rule] = {
    "train_batch_size": Value("count", "global_batch_size", fsdp=SAME),
    "train_micro_batch_size_per_gpu": Value("count", "batch_size_training", fsdp=SAME),
    "gradient_accumulation_steps": Value("count", "gradient_accumulation_steps", fsdp=SAME),
    "gradient_clipping": Value("number", "max_grad_norm", fsdp=SAME),
    "managed_gradient_accumulation": NoEffect("the engine is told by itself which micro-step is the last", "bool"),
    "prescale_gradients": NoEffect(AVERAGE, "bool"),
    "gradient_predivide_factor": NoEffect(AVERAGE, "number"),
    "gradient_allreduce_op": Only(
        "text", ("mean", "MEAN", "Mean"), "the loss is a mean over the step's target tokens: leave it out"
    ),
    "dataloader_drop_last": NoEffect("it is for DeepSpeed's data loader; no row is dropped here", "bool"),
    "vocabulary_size": NoEffect("it only makes DeepSpeed print a hint", "count"),
}

PRINTING: dict[str, Rule] = {
    "wall_clock_breakdown": Value("bool"),
    "memory_breakdown": Value("bool"),
    "dump_state": Value("bool"),
    "disable_python_gc": Value("bool"),
    "steps_per_print": NoEffect("it is DeepSpeed's own progress line; use log_interval"),
    "log_level": NoEffect("it is DeepSpeed's own, which prints warnings only here", "text"),
    "timers": NoEffect("it is for wall_clock_breakdown, which is read as it stands"),
    "flops_profiler": Switch(
        ("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
        "the log has mfu and the tokens per second of every step",
        is_noted=True,
    ),
    "comms_logger": Switch(
        ("enabled", "prof_all", "prof_ops", "verbose", "debug"),
        "its summary is printed by nobody here; use torch's profiler",
        is_noted=True,
        is_model=True,
    ),
    "csv_monitor": Switch(
        ("enabled", "output_path", "job_name"),
        "the run folder's metrics.jsonl has these numbers",
        is_noted=True,
        is_model=True,
    ),
    "comet": Switch(
        (
            "enabled", "samples_log_interval", "project", "workspace", "api_key", "experiment_name", "experiment_key",
            "online", "mode",
        ),
        "Comet is not there: use wandb_project or tensorboard",
        is_model=True,
    ),
    "tensorboard": Section(
        {
            "enabled": Value("bool", "tensorboard", fsdp=SAME),
            "output_path": NoEffect("the files go into the run folder", "text"),
            "job_name": NoEffect("the files go into the run folder", "text"),
        },
        is_model=True,
    ),
    "wandb": Section(
        {
            "enabled": Value("bool", fsdp=SAME),
            "project": Value("text", fsdp=SAME),
            "team": Value("text", fsdp=SAME, nullable=True),
            "group": NoEffect("runs are not grouped here", "text", nullable=True),
        },
        is_model=True,
    ),
}  # fmt: skip

PROGRAMS: dict[str, Rule] = {
    "autotuning": Switch((), "it starts and ends runs of its own: leave it out"),
    "data_efficiency": Switch((), "it chooses the data, as this program's own settings do: leave it out"),
    "hybrid_engine": Switch(
        (
            "enabled", "max_out_tokens", "inference_tp_size", "release_inference_cache", "pin_parameters",
            "tp_gather_partition_size", "enable_cuda_graph",
        ),
        "it is for generation in the middle of training: leave it out",
        is_model=True,
    ),
    "expert_parallel": Switch((), PARALLEL),
    "compile": NoEffect("it is for DeepSpeed's compiler, which this program does not call"),
    "pipeline": NoEffect(NOT_FOR_THIS),
    "tensor_parallel": Only("any", ({}, {"autotp_size": 1}, {"autotp_size": 0}), PARALLEL),
    "sequence_parallel_size": Only("count", (1,), PARALLEL),
    "seq_parallel_communication_data_type": NoEffect("it is for sequence parallelism"),
    "use_data_before_expert_parallelism": NoEffect("it is for expert parallelism"),
    "weight_quantization": NoEffect("it is for inference"),
    "model_info": NoEffect("it is for autotuning"),
    "disable_allgather": NoEffect("DeepSpeed reads it nowhere"),
    "checkpoint": OWN_CHECKPOINTS,
    "datastates_ckpt": OWN_CHECKPOINTS,
}  # fmt: skip

TOP: dict[str, Rule] = {
    **BATCH,
    "zero_optimization": Section(ZERO, is_model=True),
    "bf16": Section(BF16, is_model=True),
    "fp16": Section(FP16, is_model=True),
    "torch_autocast": Section(AUTOCAST),
    "data_types": Section(DATA_TYPES),
    "communication_data_type": Value("text", choices=("fp32", "bf16", "fp16", "FP32", "BF16", "FP16"), fsdp=SAME),
    "activation_checkpointing": Section(ACTIVATION_CHECKPOINTING),
    "aio": Section(AIO),
    "zero_allow_untested_optimizer": NoEffect("it is always true", "bool"),
    "zero_force_ds_cpu_optimizer": NoEffect("offload steps torch's AdamW on the CPU, which needs no compiler", "bool"),
    **PRINTING,
    **PROGRAMS,
    **REMOVED,
    "mics_shard_size": MICS,
}
