"""The JSON that DeepSpeed gets: the user's own, with "auto" filled from the run."""

import copy
from collections.abc import Mapping
from typing import Any

from ds_recipes.config.ds_keys import TOP, Honoured, Rule, Section
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

# DeepSpeed would sum gradients over micro-steps and ranks in bfloat16; the JSON may still ask for that.
EXACT_GRADIENTS: dict[str, Any] = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}

NEVER_PRINT = 10**9  # steps between DeepSpeed's own progress lines; the loop has its own


def effective_ds_config(config: Config, plan: Plan) -> dict[str, Any]:
    """What `deepspeed.initialize` is given, and what the run folder keeps.

    The optimizer and the schedule are not in it: the engine makes the one, the loop owns the other. The user's other keys
    are passed through; "auto" on a key without a setting of the run leaves DeepSpeed its own default.
    """
    tree = DEFAULT_TREE if config.ds is None else config.ds.tree
    passed = _passed_through(tree, TOP)
    return (
        copy.deepcopy(EXACT_GRADIENTS)
        | passed
        | {
            "train_batch_size": plan.global_rows,
            "train_micro_batch_size_per_gpu": plan.rows_per_rank,
            "gradient_accumulation_steps": plan.micro_steps,
            "gradient_clipping": config.optimizer.max_grad_norm,
            "bf16": {"enabled": config.run.precision == "bf16"},
            "zero_optimization": {"stage": 3} | passed.get("zero_optimization", {}),
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": NEVER_PRINT,
        }
    )


def _passed_through(tree: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """The keys that are DeepSpeed's own business and have a value."""
    passed: dict[str, Any] = {}
    for key, value in tree.items():
        match rules.get(key):
            case Honoured(kind, setting) if not setting and value not in (None, "auto"):
                passed[key] = int(value) if kind == "count" else value
            case Section(keys) if value is not None:
                inner = _passed_through(value, keys)
                if inner:
                    passed[key] = inner
    return passed
