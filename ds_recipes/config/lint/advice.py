"""Combinations of keys that are known to fail or to disappoint, each with the address of an issue or a document."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ds_recipes.config.ds.combine import section
from ds_recipes.config.ds.table_check import Finding

ZERO = "zero_optimization"
DEEPSPEED = "https://github.com/deepspeedai/DeepSpeed"
CONFIG_PAGE = "https://www.deepspeed.ai/docs/config-json/"

ZERO_PART = "#zero-optimizations-for-fp16-training"

ADDRESSES = {
    "optimizer.params.max_grad_norm": f"{CONFIG_PAGE}#gradient-clipping",
    "optimizer.type": f"{CONFIG_PAGE}#optimizer-parameters",
    "scheduler.type": f"{CONFIG_PAGE}#scheduler-parameters",
    "bf16.enabled": f"{CONFIG_PAGE}#bfloat16-training-options",
    "fp16.loss_scale_window": f"{CONFIG_PAGE}#fp16-training-options",
    "fp16.min_loss_scale": f"{CONFIG_PAGE}#fp16-training-options",
    f"{ZERO}.offload_param": f"{CONFIG_PAGE}#parameter-offloading",
    f"{ZERO}.offload_optimizer.nvme_path": f"{CONFIG_PAGE}#optimizer-offloading",
    f"{ZERO}.offload_param.nvme_path": f"{CONFIG_PAGE}#parameter-offloading",
    f"{ZERO}.round_robin_gradients": f"{DEEPSPEED}/pull/1256",
    f"{ZERO}.zero_quantized_gradients": f"{DEEPSPEED}/pull/3821",
    "activation_checkpointing.contiguous_memory_optimization": f"{DEEPSPEED}/issues/598",
}
"""Where to read more about a key, for messages that have no address of their own."""

ONE_BIT = ("onebitadam", "onebitlamb", "zerooneadam")
LARGE_BUCKET = 5e8  # elements
LARGE_POWER = 24  # 2 ** 24 is above what most losses times gradients bear in float16


def world_problems(tree: Mapping[str, Any], stage: int, world: int | None) -> Iterator[Finding]:
    """What DeepSpeed refuses at this number of ranks only."""
    size = section(tree, ZERO).get("zero_hpz_partition_size")
    if (
        world
        and stage == 3
        and isinstance(size, int)
        and not isinstance(size, bool)
        and 1 < size < world
        and world % size
    ):
        near = [each for each in range(2, world) if world % each == 0]
        words = f"Write {' or '.join(map(str, near))}" if near else "Leave it out"
        yield Finding(f"{ZERO}.zero_hpz_partition_size", f"is {size}, which does not divide {world} ranks. {words}")


def warnings(tree: Mapping[str, Any], stage: int) -> Iterator[Finding]:
    """Accepted, and known to end badly in other programs or to do something else than it looks like."""
    zero = section(tree, ZERO)
    yield from _reduction(tree, zero, stage)
    yield from _quantised(tree, zero, stage)
    yield from _texts(tree)
    if stage >= 2 and isinstance(tree.get("pipeline"), Mapping):
        yield Finding("pipeline", f"does not go with stage {stage}: pipelines need stage 1 ({DEEPSPEED}/issues/1629)")
    checkpointing = section(tree, "activation_checkpointing")
    if (
        checkpointing.get("contiguous_memory_optimization") is True
        and checkpointing.get("partition_activations") is not True
    ):
        yield Finding(
            "activation_checkpointing.contiguous_memory_optimization",
            f"stops DeepSpeed's own checkpointing unless partition_activations is on too ({DEEPSPEED}/issues/598)",
        )
    if zero.get("elastic_checkpoint") is True and stage == 3:
        yield Finding(
            f"{ZERO}.elastic_checkpoint",
            f"makes DeepSpeed fail when it saves at stage 3; leave it out ({CONFIG_PAGE}{ZERO_PART})",
        )


def notes(tree: Mapping[str, Any], stage: int) -> Iterator[Finding]:
    """What is good to know."""
    zero, fp16 = section(tree, ZERO), section(tree, "fp16")
    power = fp16.get("initial_scale_power")
    if fp16.get("enabled") in (True, "auto") and isinstance(power, int) and power >= LARGE_POWER:
        yield Finding(
            "fp16.initial_scale_power",
            f"is {power}: about {power - 16} more steps are skipped at the start than with the default, 16 "
            f"({CONFIG_PAGE}#fp16-training-options)",
        )
    params = section(section(tree, "scheduler"), "params")
    if str(section(tree, "scheduler").get("type")).startswith("Warmup") and "warmup_type" not in params:
        yield Finding(
            "scheduler.params", f'has no warmup_type, and the default is "log", not "linear" ({DEEPSPEED}/issues/1298)'
        )
    buckets = [
        name for name in ("reduce_bucket_size", "allgather_bucket_size") if _number(zero.get(name)) >= LARGE_BUCKET
    ]
    if stage in (1, 2) and zero.get("overlap_comm") is True and buckets:
        gib = sum(_number(zero.get(name)) for name in buckets) * 2 * 4.5 / 2**30
        yield Finding(
            f"{ZERO}.{buckets[0]}",
            f"takes about {gib:.1f} GiB of buffers with overlap_comm, 4.5 times two bytes an element "
            "(https://huggingface.co/docs/transformers/deepspeed). 5e7 is enough for most",
        )
    yield from _elsewhere(tree, zero, stage)
    if (
        "nvme" in (section(zero, name).get("device") for name in ("offload_optimizer", "offload_param"))
        and "aio" not in tree
    ):
        yield Finding(
            ZERO,
            "swaps to NVMe, and aio is missing: its defaults are slow on most disks; ds_nvme_tune finds better ones "
            f"({CONFIG_PAGE}#asynchronous-io)",
        )


def _reduction(tree: Mapping[str, Any], zero: Mapping[str, Any], stage: int) -> Iterator[Finding]:
    scatters = zero.get("reduce_scatter") is not False
    if stage >= 2 and scatters:
        for key, is_set in (
            ("prescale_gradients", tree.get("prescale_gradients") is True),
            ("gradient_predivide_factor", tree.get("gradient_predivide_factor") not in (None, "auto", 1, 1.0)),
        ):
            if is_set:
                yield Finding(
                    key, f"stops DeepSpeed at stage {stage} with reduce_scatter; leave it out ({DEEPSPEED}/pull/4964)"
                )
    if stage == 1 and zero.get("legacy_stage1") is True:
        yield Finding(
            f"{ZERO}.legacy_stage1", f"stops DeepSpeed: that stage 1 is gone; leave it out ({CONFIG_PAGE}{ZERO_PART})"
        )
    overlaps = zero.get("overlap_comm") is True or (stage == 3 and zero.get("overlap_comm") in (None, "auto"))
    if tree.get("managed_gradient_accumulation") is False and overlaps and stage != 2:
        text = f"is false, which stops DeepSpeed at stage {stage} with overlap_comm; leave it out"
        yield Finding("managed_gradient_accumulation", f"{text} ({CONFIG_PAGE}#batch-size-related-parameters)")
    if str(tree.get("communication_data_type")).lower() == "fp16" and section(tree, "bf16").get("enabled") is True:
        yield Finding(
            "communication_data_type",
            f'is "fp16" with bf16: gradients above 65,504 overflow on the way; write "fp32" or leave it out ({CONFIG_PAGE}'
            "#communication-options)",
        )


def _quantised(tree: Mapping[str, Any], zero: Mapping[str, Any], stage: int) -> Iterator[Finding]:
    if (
        stage == 3
        and zero.get("zero_quantized_weights") is True
        and section(tree, "bf16").get("enabled") in (True, "auto")
    ):
        yield Finding(
            f"{ZERO}.zero_quantized_weights", f"is known to crash with bf16 ({DEEPSPEED}/issues/4852); fp16 works"
        )


def removed_optimizers(tree: Mapping[str, Any]) -> Iterator[Finding]:
    """Optimizers that DeepSpeed had once: it stops when it looks for them in torch.optim."""
    kind = section(tree, "optimizer").get("type")
    if str(kind).lower() in ONE_BIT:
        text = f"is {json.dumps(kind)}: the 1-bit optimizers were removed from DeepSpeed, and never went with ZeRO. Write AdamW"
        yield Finding("optimizer.type", f"{text} ({DEEPSPEED}/issues/5046)")


def _elsewhere(tree: Mapping[str, Any], zero: Mapping[str, Any], stage: int) -> Iterator[Finding]:
    """What works here and is known to fail in other programs."""
    offloads = section(zero, "offload_optimizer").get("device") in ("cpu", "nvme")
    if offloads and "optimizer" not in tree and tree.get("zero_force_ds_cpu_optimizer") is not False:
        yield Finding(
            f"{ZERO}.offload_optimizer",
            "makes DeepSpeed refuse a program's own optimizer unless zero_force_ds_cpu_optimizer is false; this program sets it "
            f"({DEEPSPEED}/issues/7524)",
        )
    size = zero.get("zero_hpz_partition_size")
    if stage == 3 and isinstance(size, int) and size > 1:
        yield Finding(
            f"{ZERO}.zero_hpz_partition_size",
            "gives a wrong first loss after loading unless its second copy of the weights is refreshed; this program does that "
            f"({DEEPSPEED}/issues/7606)",
        )


def _texts(tree: Mapping[str, Any]) -> Iterator[Finding]:
    for name in ("fp16", "bf16"):
        switch = section(tree, name).get("enabled")
        if isinstance(switch, str) and switch != "auto":
            yield Finding(
                f"{name}.enabled",
                f"is the text {json.dumps(switch)}: DeepSpeed reads it as a bool, other programs take any text for true "
                "(https://github.com/hiyouga/LlamaFactory/issues/3493). Write true or false",
            )


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
