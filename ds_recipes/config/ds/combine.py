"""What must hold between keys of a DeepSpeed JSON, and between them and the run's settings."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ds_recipes.config.ds.findings import Findings
from ds_recipes.config.ds.keys_precision import DTYPE_OF, PRECISION
from ds_recipes.config.ds.keys_zero import NVME

ZERO = "zero_optimization"
OFFLOAD = ("offload_optimizer", "offload_param")
BF16_MASTER, BF16_STATES = "bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"
CPU_ADAM = "needs DeepSpeed's own CPU Adam, and torch's AdamW steps here"


def check_combinations(tree: Mapping[str, Any], engine: str, stage: int, found: Findings) -> None:
    """Check `tree`, which holds the keys with an effect and their values in their own types."""
    zero = section(tree, ZERO)
    found.problems += [*_offload(zero), *_fp16(section(tree, "fp16")), *_reduction(tree, zero)]
    found.problems += _low_precision_problems(tree, zero)
    found.unsupported += [*_low_precision_limits(tree, zero, engine, stage), *_autocast(tree)]
    found.problems += _contiguous(section(tree, "activation_checkpointing"))
    if engine == "fsdp":
        _fsdp(tree, zero, found)
    elif section(tree, "torch_autocast").get("enabled") and tree.get("communication_data_type"):
        found.notes.append("communication_data_type has no effect: with torch_autocast DeepSpeed chooses it by module")


def check_run(tree: Mapping[str, Any], precision: str) -> Iterator[str]:
    """What only shows once the run's precision is known, one line each that begins with the key's path."""
    bf16, fp16, autocast = (section(tree, name) for name in ("bf16", "fp16", "torch_autocast"))
    if precision == "fp16" and fp16.get("enabled") is not True:  # "auto", which has become true
        yield from _fp16({**fp16, "enabled": True})
    if bf16.get("bf16_master_weights_and_grads") and precision != "bf16":
        yield f"{BF16_MASTER} is true, but the run's precision is {precision}: set precision to bf16, or leave it out"
    if autocast.get("enabled") and precision != "fp32":
        yield (
            f"torch_autocast.enabled is true, but the run's precision is {precision}: it is for parameters in float32. "
            "Set precision to fp32, or leave torch_autocast out"
        )


def section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section that may be absent or null."""
    value = tree.get(name)
    return value if isinstance(value, Mapping) else {}


def _offload(zero: Mapping[str, Any]) -> Iterator[str]:
    for name in OFFLOAD:
        if section(zero, name).get("device") == "nvme" and not section(zero, name).get("nvme_path"):
            yield f'{ZERO}.{name}.nvme_path is missing: "device": "nvme" needs a folder on a fast local disk'


def _fp16(fp16: Mapping[str, Any]) -> Iterator[str]:
    if fp16.get("enabled") is True and fp16.get("loss_scale", 0) == 0:
        for name in ("loss_scale_window", "min_loss_scale"):
            if fp16.get(name) == 0:
                yield f"fp16.{name} must be above 0 while the loss scale is dynamic (loss_scale 0)"


def _contiguous(checkpointing: Mapping[str, Any]) -> Iterator[str]:
    if checkpointing.get("contiguous_memory_optimization") and not checkpointing.get("number_checkpoints"):
        yield "activation_checkpointing.contiguous_memory_optimization needs number_checkpoints: write how many there are"


def _reduction(tree: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed asserts when it makes its optimizer."""
    if zero.get("zero_quantized_gradients") and zero.get("reduce_scatter") is False:
        yield f"{ZERO}.zero_quantized_gradients needs reduce_scatter: leave reduce_scatter out"
    if zero.get("zero_quantized_weights") and section(tree, "torch_autocast").get("enabled"):
        yield f"{ZERO}.zero_quantized_weights does not go with torch_autocast: DeepSpeed refuses both, leave one out"


def _low_precision_problems(tree: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[str]:
    bf16 = section(tree, "bf16")
    if bf16.get("bf16_optimizer_states") and not bf16.get("bf16_master_weights_and_grads"):
        yield f"{BF16_STATES} needs bf16_master_weights_and_grads: write both"
    offloads = section(zero, "offload_optimizer").get("device", "none") != "none"
    if bf16.get("bf16_master_weights_and_grads") and not bf16.get("bf16_optimizer_states") and not offloads:
        yield f"{BF16_MASTER} needs bf16_optimizer_states too, unless the optimizer is offloaded: write both"
    enabled = [name for name in ("bf16", "fp16") if section(tree, name).get("enabled") is True]
    dtype = DTYPE_OF.get(str(section(tree, "data_types").get("param_dtype")))
    if enabled and dtype and PRECISION[dtype] != enabled[0]:
        yield f"data_types.param_dtype is another type than {enabled[0]}, which is enabled: DeepSpeed refuses that, leave it out"


def _low_precision_limits(tree: Mapping[str, Any], zero: Mapping[str, Any], engine: str, stage: int) -> Iterator[str]:
    bf16 = section(tree, "bf16")
    if not bf16.get("bf16_master_weights_and_grads"):
        return
    offloads = section(zero, "offload_optimizer").get("device", "none") != "none"
    if bf16.get("enabled") is False:
        yield f"{BF16_MASTER} is true while bf16.enabled is false: set it to true, or leave {BF16_MASTER} out"
    elif offloads and not bf16.get("bf16_optimizer_states"):
        yield f"{BF16_MASTER} without bf16_optimizer_states {CPU_ADAM}: leave it out"
    elif offloads and engine == "deepspeed":
        yield f"{BF16_STATES} with offload_optimizer {CPU_ADAM}: leave one out, or use --engine fsdp"
    if stage == 1 and DTYPE_OF.get(str(section(tree, "data_types").get("grad_accum_dtype"))) == "float32":
        yield f'{BF16_MASTER} does not go with grad_accum_dtype "fp32" at stage 1: write "bf16" or leave it out'


def _autocast(tree: Mapping[str, Any]) -> Iterator[str]:
    autocast = section(tree, "torch_autocast")
    if not autocast.get("enabled"):
        return
    if DTYPE_OF.get(str(autocast.get("dtype"))) == "float16":
        yield (
            f'torch_autocast.dtype is {json.dumps(autocast["dtype"])}: autocast is there in bfloat16 only. Write "bfloat16", '
            "or use the fp16 section, which scales the loss"
        )
    for name in ("bf16", "fp16"):
        if section(tree, name).get("enabled") is True:
            yield f"torch_autocast.enabled is true, and {name}.enabled too: autocast is for float32 parameters, leave one out"


def _fsdp(tree: Mapping[str, Any], zero: Mapping[str, Any], found: Findings) -> None:
    offload = [name for name in OFFLOAD if section(zero, name).get("device") == "cpu"]
    for name in OFFLOAD:
        if section(zero, name).get("device") == "nvme":
            found.unsupported.append(f'{ZERO}.{name}.device is "nvme": {NVME}')
    if len(offload) == 1:
        found.notes.append(
            f"{ZERO}.{offload[0]} is for both on FSDP2: parameters and the optimizer's state go to the CPU together"
        )
    if zero.get("zero_hpz_partition_size", 1) > 1:
        found.notes.append(
            f"{ZERO}.zero_hpz_partition_size is HSDP on FSDP2: the optimizer's state is sharded within a group too, which takes "
            "more memory than hpZ"
        )
    accumulation = section(tree, "data_types").get("grad_accum_dtype")
    master = "bfloat16" if section(tree, "bf16").get("bf16_master_weights_and_grads") else "float32"
    if accumulation is not None and DTYPE_OF[accumulation] != master:
        found.unsupported.append(
            f"data_types.grad_accum_dtype is {json.dumps(accumulation)}: FSDP2 adds gradients up in the master weights' dtype. "
            f'Write "{PRECISION[master]}", or use --engine deepspeed'
        )
