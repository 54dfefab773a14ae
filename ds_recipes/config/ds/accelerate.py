"""Accelerate's own configuration file, which people hand over as a DeepSpeed JSON: what it is, and the JSON that it means."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

MARKS = frozenset(
    (
        *(
            "compute_environment",
            "distributed_type",
            "deepspeed_config",
            "fsdp_config",
            "mixed_precision",
            "num_processes",
        ),
        *("num_machines", "machine_rank", "main_training_function", "downcast_bf16", "rdzv_backend", "same_network"),
    )
)
"""Keys of `accelerate config`'s file (accelerate/commands/config/config_args.py). DeepSpeed has none of them."""

FSDP_STAGES = {
    "FULL_SHARD": 3,
    "HYBRID_SHARD": 3,
    "SHARD_GRAD_OP": 2,
    "HYBRID_SHARD_ZERO2": 2,
    "1": 3,
    "2": 2,
    "4": 3,
    "5": 2,
}
"""Sharding strategies by name and by torch's numbers."""


def accelerate_refusal(text: str) -> str | None:
    """What is wrong with a file that Accelerate's launcher reads, completing "PATH: "; None for any other file."""
    try:
        tree = yaml.safe_load(text)  # reads JSON too
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(tree, Mapping) or len(MARKS & tree.keys()) < 2:
        return None
    deepspeed, fsdp = _section(tree, "deepspeed_config"), _section(tree, "fsdp_config")
    what = "is a configuration of Accelerate's launcher, not a DeepSpeed JSON"
    if deepspeed.get("deepspeed_config_file"):
        return f"{what}. It names one: hand over {deepspeed['deepspeed_config_file']}"
    if not deepspeed and not fsdp:
        return (
            f"{what}, and it has no deepspeed_config. Leave --ds_config out for ZeRO-3, or hand over a DeepSpeed JSON"
        )
    meant = _from_deepspeed(deepspeed) if deepspeed else _from_fsdp(fsdp)
    if tree.get("mixed_precision") in ("bf16", "fp16"):
        meant[tree["mixed_precision"]] = {"enabled": True}
    engine = "" if deepspeed else ", with --engine fsdp"
    return f"{what}. What it says as one{engine}: {json.dumps(meant)}"


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}


def _from_deepspeed(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `deepspeed_config` in DeepSpeed's names (accelerate/utils/dataclasses.py, DeepSpeedPlugin)."""
    zero: dict[str, Any] = {"stage": section.get("zero_stage", 2)}
    for name in ("optimizer", "param"):
        device = section.get(f"offload_{name}_device")
        if device not in (None, "none"):
            path = section.get(f"offload_{name}_nvme_path")
            zero[f"offload_{name}"] = {"device": device, **({"nvme_path": path} if path else {})}
    meant: dict[str, Any] = {"zero_optimization": zero}
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        if section.get(name) not in (None, "none"):
            meant[name] = section[name]
    return meant


def _from_fsdp(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `fsdp_config`: FSDP1's strategies, or FSDP2's resharding."""
    reshard = section.get("fsdp_reshard_after_forward")
    strategy = reshard if isinstance(reshard, str) else section.get("fsdp_sharding_strategy", "FULL_SHARD")
    stage = (3 if reshard else 2) if isinstance(reshard, bool) else FSDP_STAGES.get(str(strategy).upper(), 3)
    zero: dict[str, Any] = {"stage": stage}
    if section.get("fsdp_offload_params") is True:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return {"zero_optimization": zero}
