"""The keys of precision: bf16, fp16, torch_autocast, data_types, activation_checkpointing.

Names and defaults follow DeepSpeed 0.19.8 (runtime/precision_config.py, runtime/torch_autocast.py).
"""

from ds_recipes.config.ds.rules import SAME, NoEffect, Only, Rule, Value

DTYPES = {
    "float32": ("fp32", "float32", "float", "torch.float32"),
    "bfloat16": ("bf16", "bfloat16", "torch.bfloat16"),
    "float16": ("fp16", "float16", "half", "torch.float16"),
}
DTYPE_OF = {name: dtype for dtype, names in DTYPES.items() for name in names}
"""torch's name of a dtype by the names that a JSON may give it."""

PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The run's precision by torch's name of its dtype."""

NAMES = tuple(name for names in DTYPES.values() for name in names)
LOW_PRECISION = DTYPES["bfloat16"] + DTYPES["float16"]

BF16: dict[str, Rule] = {
    "enabled": Value("bool", fsdp=SAME),
    "immediate_grad_update": NoEffect(
        "it is for DeepSpeed's optimizer of ZeRO stage 1, whose result is the same", "bool"
    ),
    "check_grad_overflow": NoEffect("a step whose gradient is not finite is always left out", "bool"),
    "bf16_master_weights_and_grads": Value("bool", fsdp=SAME),
    "bf16_optimizer_states": Value("bool", fsdp=SAME),
}

FP16: dict[str, Rule] = {
    "enabled": Value("bool", fsdp=SAME),
    "auto_cast": NoEffect("it casts inputs, and token ids are whole numbers", "bool"),
    "loss_scale": Value("number", fsdp=SAME),
    "initial_scale_power": Value("count", least=None, fsdp=SAME),
    "loss_scale_window": Value("count", fsdp=SAME),
    "hysteresis": Value("count", fsdp=SAME),
    "consecutive_hysteresis": Value("bool", fsdp=SAME),
    "min_loss_scale": Value("count", fsdp=SAME),
    "fp16_master_weights_and_grads": Only(
        "bool",
        (False,),
        "float16 master weights need DeepSpeed's own CPU Adam, and torch's AdamW steps here: leave it out",
    ),
}

AUTOCAST: dict[str, Rule] = {
    "enabled": Value("bool", fsdp=SAME),
    "dtype": Value("text", choices=LOW_PRECISION, fsdp=SAME),
    "lower_precision_safe_modules": Value(
        "names", fsdp="FSDP2 reduces all gradients in one dtype: set communication_data_type and leave it out"
    ),
}

DATA_TYPES: dict[str, Rule] = {
    "grad_accum_dtype": Value("text", choices=NAMES, fsdp=SAME),
    "param_dtype": Value("text", choices=NAMES, fsdp=SAME),
    "buffer_dtype": Only("text", (), "buffers keep their own types: leave it out"),
    "keep_in_fp32_modules": NoEffect("it names buffers, and all buffers keep their own types", "names"),
}

ACTIVATION_CHECKPOINTING: dict[str, Rule] = {
    "partition_activations": NoEffect(
        "it divides activations among the ranks of a model-parallel group, and there is none", "bool"
    ),
    "cpu_checkpointing": Value("bool", fsdp=SAME),
    "contiguous_memory_optimization": Value("bool", fsdp=SAME),
    "number_checkpoints": Value("count", least=1, fsdp=SAME),
    "synchronize_checkpoint_boundary": Value("bool", fsdp=SAME),
    "profile": Value("bool", fsdp=SAME),
}
