"""The JSON that DeepSpeed gets: the user's own, with "auto" filled from the run."""

import copy
from typing import Any

from ds_recipes.config.ds.check import check_tree
from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config

# What a run without a JSON uses. ds_configs/zero3.json says the same; a test holds the two together.
DEFAULT_TREE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
    },
}

OURS = ("optimizer", "scheduler", "fp16", "bf16", "torch_autocast", "tensorboard")  # filled, or not DeepSpeed's here
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NEVER_PRINT = 10**9  # steps between DeepSpeed's own progress lines; the loop has its own


def effective_ds_config(config: Config, plan: Plan) -> dict[str, Any]:
    """What `deepspeed.initialize` is given, and what the run folder keeps, whichever engine runs.

    The optimizer and the schedule are not in it: the engine makes the one, the loop owns the other. The user's other keys
    are passed through; "auto" on a key without a setting of the run leaves DeepSpeed its own default. DeepSpeed would sum
    gradients over micro-steps and ranks in bfloat16; here that is said, and float32 unless the JSON asks for less.
    """
    tree = copy.deepcopy(dict(check_tree(DEFAULT_TREE).tree if config.ds is None else config.ds.tree))
    settings = engine_settings(config)
    precision = config.run.precision
    filled = {name: tree.get(name, {}) | {"enabled": precision == name} for name in ("bf16", "fp16")}
    if precision != "fp16":
        del filled["fp16"]
    if settings.precision.autocast:
        filled["torch_autocast"] = {"lower_precision_safe_modules": []} | tree["torch_autocast"]
        filled["torch_autocast"]["dtype"] = settings.precision.autocast
    passed = {name: value for name, value in tree.items() if name not in OURS and value != {}}
    return (
        passed
        | filled
        | {
            "train_batch_size": plan.global_rows,
            "train_micro_batch_size_per_gpu": plan.rows_per_rank,
            "gradient_accumulation_steps": plan.micro_steps,
            "gradient_clipping": config.optimizer.max_grad_norm,
            "communication_data_type": str(tree.get("communication_data_type", "fp32")).lower(),
            "data_types": {"grad_accum_dtype": SHORT[settings.precision.gradient_accumulation]},
            "zero_optimization": {"stage": settings.sharding.stage} | tree.get("zero_optimization", {}),
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": NEVER_PRINT,
        }
    )
