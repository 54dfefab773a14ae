"""Where ZeRO keeps what it shards: checked against this world and this model, and completed for them."""

from collections.abc import Mapping
from typing import Any

from deepspeed.utils import groups
from torch import nn

from ds_recipes.engine.zero3.nvme_folders import nvme_sections, prepare_nvme, remove_own_folders
from ds_recipes.errors import ConfigError
from ds_recipes.world.group import World

QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
QUANTISED_MULTIPLE = 8  # elements of a shard that DeepSpeed's kernel takes at a time
PERSISTENCE_THRESHOLD = 100_000  # DeepSpeed's default


def prepare_placement(ds_json: dict[str, Any], model: nn.Module, world: World) -> dict[str, Any]:
    """The JSON with what depends on this machine and this model filled in. Call it on a skeleton, on every rank.

    Raises:
        ConfigError: a placement that cannot work with this number of ranks, this device or this model.
    """
    problem = placement_problem(ds_json, model, world.size, world.device.type)
    if problem:
        raise ConfigError([problem])
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of the process: an engine before this one may have set it
    return prepare_nvme(ds_json, model, world)


def clear_placement(ds_json: Mapping[str, Any]) -> None:
    """Give back what an engine with this JSON, as `prepare_placement` returned it, has taken of the machine."""
    remove_own_folders(ds_json.get("zero_optimization", {}))


def placement_problem(ds_json: Mapping[str, Any], model: nn.Module, ranks: int, device: str) -> str | None:
    """The first thing that cannot work, or None."""
    zero = ds_json.get("zero_optimization", {})
    group = int(zero.get("zero_hpz_partition_size", 1))
    if group > 1 and ranks % min(group, ranks):
        return (
            f"zero_optimization.zero_hpz_partition_size: {ranks} ranks cannot be divided into groups of {group}. "
            "Write the number of GPUs of a host, and start as many ranks on each."
        )
    if group > 1 and any(name == "offload_param" for name, _ in nvme_sections(zero)):
        return (
            "zero_optimization.zero_hpz_partition_size keeps a second copy of the parameters in memory, which DeepSpeed "
            "cannot do while they are on NVMe: leave one of them out."
        )
    return quantised_problem(ds_json, model, ranks, device)


def quantised_problem(ds_json: Mapping[str, Any], model: nn.Module, ranks: int, device: str) -> str | None:
    """Why ZeRO++'s quantised communication cannot work here, or None. Its kernels are for CUDA and read float16."""
    zero = ds_json.get("zero_optimization", {})
    wanted = [name for name in QUANTISED if zero.get(name)]
    if not wanted:
        return None
    if device != "cuda":
        return (
            f"zero_optimization.{wanted[0]}: DeepSpeed quantises on a GPU only, and this run is on CPUs; leave it out."
        )
    if "zero_quantized_nontrainable_weights" in wanted and not all(p.requires_grad for p in model.parameters()):
        return (
            "zero_optimization.zero_quantized_nontrainable_weights: DeepSpeed 0.19.8 writes values that are not quantised "
            "into the quantised shards of frozen parameters, so they would be lost; leave it out."
        )
    if "zero_quantized_gradients" in wanted and ds_json.get("communication_data_type") != "fp16":
        return (
            "zero_optimization.zero_quantized_gradients: DeepSpeed's kernel takes the bits of whatever gradient it gets "
            'for float16; write "communication_data_type": "fp16", or leave it out.'
        )
    if "zero_quantized_weights" in wanted:
        return _uneven_shard(zero, model, ranks)
    return None


def _uneven_shard(zero: Mapping[str, Any], model: nn.Module, ranks: int) -> str | None:
    threshold = int(zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD))
    for name, parameter in model.named_parameters():
        shard = -(-parameter.numel() // ranks)
        if parameter.numel() > threshold and shard % QUANTISED_MULTIPLE:
            return (
                f"zero_optimization.zero_quantized_weights: a rank's shard of {name} has {shard:,} elements, and DeepSpeed's "
                f"kernel needs a multiple of {QUANTISED_MULTIPLE}; start another number of ranks, or leave it out."
            )
    return None
