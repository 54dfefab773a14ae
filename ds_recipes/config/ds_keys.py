"""The keys of a DeepSpeed JSON: which are honoured, which change nothing, and which are refused and why.

Names and defaults follow DeepSpeed 0.19.8 (runtime/config.py, runtime/zero/config.py and the documentation at
https://www.deepspeed.ai/docs/config-json/); a test holds the table against the installed version's own fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Honoured:
    """Bound to a setting of the run, or passed to DeepSpeed where `setting` is empty.

    "auto" is the setting's value, or DeepSpeed's own default where there is no setting.
    """

    kind: str  # "bool", "count" (a whole number, 5e8 too), "steps" (2 or more), "number", "betas" (a pair) or "text"
    setting: str = ""
    choices: tuple[str, ...] = ()
    hint: str = ""  # follows the message about a wrong value


@dataclass(frozen=True)
class Only:
    """Accepted with these values (the first is DeepSpeed's default), since they ask for nothing; others are refused."""

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class NoEffect:
    """Accepted with any value, and noted: it changes nothing here."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """Refused with any value."""

    reason: str


@dataclass(frozen=True)
class SwitchedOff:
    """A section that may stand there while its "enabled" is false."""

    reason: str


@dataclass(frozen=True)
class Section:
    """An object with keys of its own."""

    keys: Mapping[str, "Rule"]


Rule = Honoured | Only | NoEffect | Refused | SwitchedOff | Section

OTHER_STAGE = NoEffect("is for ZeRO stages 1 and 2")
NVME_ONLY = NoEffect("is for NVMe offload")
OWN_CHECKPOINTS = NoEffect(
    "is for DeepSpeed's own checkpoints; this program writes Hugging Face files with tools/convert_to_hf.py"
)
OWN_LOGGING = "this program logs by itself: use wandb_project or tensorboard"
MICS = Refused(
    "was removed from DeepSpeed 0.19. What it did is hpZ in DeepSpeed (zero_hpz_partition_size) and HSDP in PyTorch; "
    "neither is there yet: leave it out"
)
QUANTISED = Only((False, "auto"), "quantised ZeRO++ communication is not there yet: leave it out")
OFFLOAD_OPTIMIZER: dict[str, Rule] = {
    "device": Honoured("text", choices=("none", "cpu"), hint=": NVMe offload is not there yet"),
    "pin_memory": Honoured("bool"),
    "ratio": Only((1.0, "auto"), "partial offload is not there yet: leave it out"),
    "super_offload": Only((False,), "SuperOffload is not there yet: leave it out"),
    "cpuadam_cores_perc": NoEffect("is for SuperOffload"),
    "buffer_count": NVME_ONLY,
    "nvme_path": NVME_ONLY,
    "pipeline_read": NVME_ONLY,
    "pipeline_write": NVME_ONLY,
    "fast_init": NVME_ONLY,
}

OFFLOAD_PARAM: dict[str, Rule] = {
    "device": Only(("none",), "parameter offload is not there yet: leave offload_param out, or use offload_optimizer"),
    "pin_memory": NoEffect("is for parameter offload"),
    "nvme_path": NVME_ONLY,
    "buffer_count": NVME_ONLY,
    "buffer_size": NVME_ONLY,
    "max_in_cpu": NVME_ONLY,
}

ZERO: dict[str, Rule] = {
    "stage": Only((3, "auto"), "only ZeRO stage 3 is there yet: write 3"),
    "contiguous_gradients": Honoured("bool"),
    "overlap_comm": Honoured("bool"),
    "reduce_scatter": Honoured("bool"),
    "reduce_bucket_size": Honoured("count"),
    "sub_group_size": Honoured("count"),
    "stage3_prefetch_bucket_size": Honoured("count"),
    "stage3_param_persistence_threshold": Honoured("count"),
    "stage3_model_persistence_threshold": Honoured("count"),
    "stage3_max_live_parameters": Honoured("count"),
    "stage3_max_reuse_distance": Honoured("count"),
    "stage3_module_granularity_threshold": Honoured("count"),
    "stage3_use_all_reduce_for_fetch_params": Honoured("bool"),
    "stage3_allgather_sequential": Honoured("bool"),
    "memory_efficient_linear": Honoured("bool"),
    "log_trace_cache_warnings": Honoured("bool"),
    "enable_sanity_checks": Honoured("bool"),
    "offload_optimizer": Section(OFFLOAD_OPTIMIZER),
    "offload_param": Section(OFFLOAD_PARAM),
    "stage3_gather_16bit_weights_on_model_save": OWN_CHECKPOINTS,
    "stage3_gather_fp16_weights_on_model_save": OWN_CHECKPOINTS,
    "gather_16bit_weights_on_model_save": OWN_CHECKPOINTS,
    "load_from_fp32_weights": OWN_CHECKPOINTS,
    "elastic_checkpoint": OWN_CHECKPOINTS,
    "pipeline_loading_checkpoint": OWN_CHECKPOINTS,
    "allgather_partitions": OTHER_STAGE,
    "allgather_bucket_size": OTHER_STAGE,
    "use_multi_rank_bucket_allreduce": OTHER_STAGE,
    "ignore_unused_parameters": OTHER_STAGE,
    "legacy_stage1": OTHER_STAGE,
    "round_robin_gradients": OTHER_STAGE,
    "parameter_alignment": OTHER_STAGE,
    "compute_grad_norm": Only((True,), "the gradient norm is always logged: leave it out"),
    "override_module_apply": Only((True,), "ZeRO-3 needs it: leave it out"),
    "cpu_offload": Refused('is the old name: write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": Refused(
        "is the old name of offload_param, and parameter offload is not there yet: leave it out"
    ),
    "cpu_offload_use_pin_memory": Refused('is the old name: write "pin_memory" in "offload_optimizer"'),
    "zero_hpz_partition_size": Only((1, "auto"), "hpZ is not there yet: leave it out"),
    "zero_quantized_weights": QUANTISED,
    "zero_quantized_nontrainable_weights": QUANTISED,
    "zero_quantized_gradients": QUANTISED,
    "zenflow": Refused("is not there yet: leave it out"),
    "leaf_module": Refused("is not there yet: leave it out"),
    "save_muon_momentum_buffer_in_memory": Only((False,), "Muon is not there yet: leave it out"),
    "mics_shard_size": MICS,
    "mics_hierarchical_params_gather": MICS,
    "zeropp_loco_param": Refused("was removed from DeepSpeed 0.19, and ZeRO++ is not there yet: leave it out"),
}
SHORT_NAMES = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)
ZERO.update({name: Refused(f"is the short name: write stage3_{name}") for name in SHORT_NAMES})

BF16: dict[str, Rule] = {
    "enabled": Honoured("bool", "precision"),
    "immediate_grad_update": NoEffect("is for stages below 3"),
    "check_grad_overflow": Only((True,), "a step whose gradient is not finite is always skipped: leave it out"),
    "bf16_master_weights_and_grads": Only((False,), "master weights are always float32: leave it out"),
    "bf16_optimizer_states": Only((False,), "the optimizer's state is always float32: leave it out"),
}

ACTIVATION_CHECKPOINTING: dict[str, Rule] = {
    "partition_activations": Only((False,), "it is not there yet: leave it out"),
    "cpu_checkpointing": Only((False,), "it is not there yet: leave it out"),
    "contiguous_memory_optimization": Only((False,), "it is not there yet: leave it out"),
    "number_checkpoints": Only((), "it is not there yet: leave it out, and every block is a checkpoint"),
    "synchronize_checkpoint_boundary": Only((False,), "it is not there yet: leave it out"),
    "profile": Only((False,), "it is not there yet: leave it out"),
}

ADAM_PARAMS: dict[str, Rule] = {
    "lr": Honoured("number", "lr"),
    "betas": Honoured("betas"),
    "eps": Honoured("number", "adam_eps"),
    "weight_decay": Honoured("number", "weight_decay"),
    "adam_w_mode": Only((True,), "only decoupled weight decay (AdamW) is there: leave it out"),
    "bias_correction": Only((True,), "Adam without bias correction is not there: leave it out"),
    "amsgrad": Only((False,), "AMSGrad is not there: leave it out"),
    "torch_adam": NoEffect("is always so: the optimizer is torch's own AdamW"),
    "max_grad_norm": Refused(
        "is not an optimizer's parameter for DeepSpeed either: write gradient_clipping at the top"
    ),
}

SGD_PARAMS: dict[str, Rule] = {
    "lr": Honoured("number", "lr"),
    "momentum": Honoured("number", "sgd_momentum"),
    "weight_decay": Honoured("number", "weight_decay"),
    "dampening": Only((0,), "it is not there: leave it out"),
    "nesterov": Only((False,), "it is not there: leave it out"),
}

# The shapes are DeepSpeed's; the steps are counted as the loop counts them, so no update is spent at a rate of 0.
WARMUP_PARAMS: dict[str, Rule] = {
    "warmup_num_steps": Honoured("steps", "lr_warmup"),
    "warmup_type": Only(("linear",), 'the loop warms up linearly: write "linear"'),
}
WARMUP_LR_PARAMS: dict[str, Rule] = {
    **WARMUP_PARAMS,
    "warmup_min_lr": Only((0, "auto"), "the loop warms up from 0: write 0"),
    "warmup_max_lr": Honoured("number", "lr"),
}
SCHEDULERS: dict[str, tuple[str, dict[str, Rule]]] = {
    "WarmupLR": ("constant", WARMUP_LR_PARAMS),
    "WarmupDecayLR": ("linear", {**WARMUP_LR_PARAMS, "total_num_steps": Honoured("steps", "lr_decay")}),
    "WarmupCosineLR": (
        "cosine",
        {
            **WARMUP_PARAMS,
            "warmup_min_ratio": Only((0, "auto"), "the loop warms up from 0: write 0"),
            "total_num_steps": Honoured("steps", "lr_decay"),
            "cos_min_ratio": Only(("auto",), 'the run says it in absolute terms: set lr_min, and write "auto"'),
        },
    ),
}

# The sections "optimizer" and "scheduler" depend on their type.
OPTIMIZERS: dict[str, tuple[str, dict[str, Rule]]] = {
    "adamw": ("adamw", ADAM_PARAMS),
    "adam": ("adamw", ADAM_PARAMS),
    "sgd": ("sgd", SGD_PARAMS),
}

TOP: dict[str, Rule] = {
    "train_batch_size": Honoured("count", "global_batch_size"),
    "train_micro_batch_size_per_gpu": Honoured("count", "batch_size_training"),
    "gradient_accumulation_steps": Honoured("count", "gradient_accumulation_steps"),
    "gradient_clipping": Honoured("number", "max_grad_norm"),
    "bf16": Section(BF16),
    "bfloat16": Refused('is the old name: write "bf16"'),
    "zero_optimization": Section(ZERO),
    "activation_checkpointing": Section(ACTIVATION_CHECKPOINTING),
    "communication_data_type": Honoured("text", choices=("fp32", "bf16")),
    "wall_clock_breakdown": Honoured("bool"),
    "memory_breakdown": Honoured("bool"),
    "dump_state": Honoured("bool"),
    "steps_per_print": NoEffect("is DeepSpeed's own progress line; use log_interval"),
    "dataloader_drop_last": NoEffect("is for DeepSpeed's data loader; no row is dropped here"),
    "zero_allow_untested_optimizer": NoEffect("is always true"),
    "zero_force_ds_cpu_optimizer": Only(
        (False,), "offload steps torch's AdamW on the CPU, which needs no compiler: leave it out"
    ),
    "aio": NVME_ONLY,
    "checkpoint": OWN_CHECKPOINTS,
    "data_types": Section(
        {
            "grad_accum_dtype": Honoured("text", choices=("fp32", "bf16")),
            "param_dtype": Refused("is not there: set the run's precision"),
            "buffer_dtype": Refused("is not there: buffers keep their own types"),
            "keep_in_fp32_modules": Refused("is not there: set the run's precision"),
        }
    ),
    "fp16": SwitchedOff("fp16 is not there yet: use bf16, or fp32 (neither) where bfloat16 is missing"),
    "amp": SwitchedOff("apex is not supported: use bf16"),
    "torch_autocast": SwitchedOff("use the run's precision"),
    "flops_profiler": SwitchedOff("it is not there yet: the log has mfu"),
    "comms_logger": SwitchedOff("it is not there yet: leave it out"),
    "tensorboard": SwitchedOff(OWN_LOGGING),
    "wandb": SwitchedOff(OWN_LOGGING),
    "csv_monitor": SwitchedOff(OWN_LOGGING),
    "comet": SwitchedOff(OWN_LOGGING),
    "autotuning": SwitchedOff("it is not there: leave it out"),
    "elasticity": SwitchedOff("it is not there: a run continues on any number of ranks anyway"),
    "data_efficiency": SwitchedOff("it is not there: leave it out"),
    "curriculum_learning": SwitchedOff("it is not there: leave it out"),
    "progressive_layer_drop": SwitchedOff("it is not there: leave it out"),
    "eigenvalue": SwitchedOff("it is not there: leave it out"),
    "hybrid_engine": SwitchedOff("it is not there: leave it out"),
    "nebula": SwitchedOff("it is not there: leave it out"),
    "prescale_gradients": Only((False,), "gradients are divided by the step's target tokens: leave it out"),
    "gradient_predivide_factor": Only((1.0,), "gradients are divided by the step's target tokens: leave it out"),
    "gradient_allreduce_op": Only(("mean",), "ZeRO-3 has only mean: leave it out"),
    "sparse_gradients": Only((False,), "ZeRO has none: leave it out"),
    "disable_allgather": Only((False,), "it is not there: leave it out"),
    "managed_gradient_accumulation": Only((True,), "the engine counts micro-steps itself: leave it out"),
    "graph_harvesting": Only((False,), "it is not there: leave it out"),
    "disable_python_gc": Only((False,), "it is not there: leave it out"),
    "quantize_training": Refused("is not there: leave it out"),
    "compression_training": Refused("is not there: leave it out"),
    "sparse_attention": Refused("is not there: leave it out"),
    "pipeline": Refused("parallelism is not there: ZeRO-3 shards the model over all ranks; leave it out"),
    "tensor_parallel": Refused("is not there: ZeRO-3 shards the model over all ranks; leave it out"),
    "expert_parallel": Refused("is not there: ZeRO-3 shards the model over all ranks; leave it out"),
    "sequence_parallel_size": Only((1,), "sequence parallelism is not there: leave it out"),
    "seq_parallel_communication_data_type": Refused("is for sequence parallelism, which is not there: leave it out"),
    "use_data_before_expert_parallelism": Refused("is for expert parallelism, which is not there: leave it out"),
    "weight_quantization": Refused("is not there: leave it out"),
    "datastates_ckpt": Refused("is not there: checkpoints are written beside training anyway; leave it out"),
    "compile": Refused("is not there yet: leave it out"),
    "timers": Refused("is not there yet: leave it out; wall_clock_breakdown is"),
    "vocabulary_size": Refused("is not there: leave it out"),
    "log_level": Refused("is not there: leave it out"),
    "model_info": Refused("is for autotuning, which is not there: leave it out"),
    "mics_shard_size": MICS,
}
