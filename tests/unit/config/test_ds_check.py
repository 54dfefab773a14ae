"""What a check says of a DeepSpeed JSON for either engine: problems, what is unsupported, notes."""

import copy
from itertools import chain
from typing import Any

import pytest

from tests.unit.config.ds_trees import NOTHING, ZERO, offload, said, zero

BOTH_SAY: list[tuple[dict[str, Any], dict[str, list[str]]]] = [
    (
        {},
        {
            "unsupported": [
                (
                    "zero_optimization.stage is missing, which is stage 0: this program shards with the stages 1, 2 and 3. "
                    'Write "zero_optimization": {"stage": 3}'
                )
            ]
        },
    ),
    (zero(4), {"problems": ["zero_optimization.stage is 4: there are the stages 0, 1, 2 and 3"]}),
    (zero(3, overlap_com=True), {"problems": ["zero_optimization.overlap_com is unknown: did you mean overlap_comm?"]}),
    (zero() | {"gradient_cliping": 1}, {"problems": ["gradient_cliping is unknown: did you mean gradient_clipping?"]}),
    (
        zero() | {"activation_checkpointing": {"profile": "true"}},
        {"problems": ['activation_checkpointing.profile must be true or false or "auto", not "true"']},
    ),
    (zero() | {"qqq": 1}, {"problems": ["qqq is unknown: DeepSpeed has no such key there; leave it out"]}),
    (
        zero(3, reduce_scatter=None),
        {"problems": ["zero_optimization.reduce_scatter is null, which DeepSpeed refuses: leave it out"]},
    ),
    (zero() | {"gradient_clipping": "1"}, {"problems": ['gradient_clipping must be a number or "auto", not "1"']}),
    (
        zero() | {"train_batch_size": 1.5},
        {"problems": ['train_batch_size must be a whole number of at least 0 or "auto", not 1.5']},
    ),
    (
        offload(device="gpu"),
        {"problems": ['zero_optimization.offload_optimizer.device must be "none", "cpu", "nvme" or "auto", not "gpu"']},
    ),
    (
        zero(3, mics_shard_size=8),
        {
            "problems": [
                (
                    "zero_optimization.mics_shard_size was removed from DeepSpeed 0.19 "
                    "(https://github.com/deepspeedai/DeepSpeed/issues/8489). What it did is hpZ in DeepSpeed and HSDP in FSDP2: "
                    "write zero_optimization.zero_hpz_partition_size, which both engines read"
                )
            ]
        },
    ),
    (
        zero(2, offload_param={"device": "cpu"}),
        {"notes": ["zero_optimization.offload_param has no effect at stage 2: it is for stage 3"]},
    ),
    (zero(2, offload_param={"device": "none"}), {}),
    (
        zero(1, zero_hpz_partition_size=4),
        {"notes": ["zero_optimization.zero_hpz_partition_size has no effect at stage 1: it is for stage 3"]},
    ),
    (
        zero(3, allgather_bucket_size=5e8),
        {"notes": ["zero_optimization.allgather_bucket_size has no effect at stage 3: it is for stages 1 and 2"]},
    ),
    (
        zero() | {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        {"problems": ["bf16.enabled is true, and fp16.enabled too: DeepSpeed refuses both, set one to false"]},
    ),
    (
        zero() | {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
        {"problems": ["bf16.bf16_optimizer_states needs bf16_master_weights_and_grads: write both"]},
    ),
    (
        zero() | {"fp16": {"enabled": True, "loss_scale_window": 0}},
        {"problems": ["fp16.loss_scale_window must be above 0 while the loss scale is dynamic (loss_scale 0)"]},
    ),
    (
        zero() | {"fp16": {"enabled": False, "loss_scale_window": 0}},
        {},
    ),
    (
        zero() | {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {
            "unsupported": [
                "torch_autocast.enabled is true, and bf16.enabled too: autocast is for float32 parameters, leave one out"
            ]
        },
    ),
    (
        zero() | {"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp32"}},
        {
            "problems": [
                "data_types.param_dtype is another type than bf16, which is enabled: DeepSpeed refuses that, leave it out"
            ]
        },
    ),
    (
        zero() | {"activation_checkpointing": {"contiguous_memory_optimization": True}},
        {
            "problems": [
                "activation_checkpointing.contiguous_memory_optimization needs number_checkpoints: write how many there are"
            ]
        },
    ),
    (
        zero() | {"activation_checkpointing": {"partition_activations": True}},
        {
            "notes": [
                (
                    "activation_checkpointing.partition_activations has no effect: it divides activations among the ranks of a "
                    "model-parallel group, and there is none"
                )
            ]
        },
    ),
    (
        zero() | {"optimizer": {"type": "Lion"}},
        {"unsupported": ['optimizer.type is "Lion": this program has AdamW, Adam and SGD']},
    ),
    (
        zero() | {"optimizer": {"type": "OneBitAdam"}},
        {
            "problems": [
                'optimizer.type is "OneBitAdam": DeepSpeed has no such optimizer; this program has AdamW, Adam and SGD'
            ]
        },
    ),
    (zero() | {"optimizer": 3}, {"problems": ["optimizer must be an object, not 3"]}),
    (
        zero() | {"optimizer": {"params": {"lr": 1}}},
        {
            "problems": [
                'optimizer.type is missing: DeepSpeed ignores the section then. Write "AdamW", or leave the section out'
            ]
        },
    ),
    (
        zero() | {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        {
            "unsupported": [
                "optimizer.params.adam_w_mode is false: only decoupled weight decay (AdamW) is there: leave it out"
            ]
        },
    ),
    (
        zero() | {"optimizer": {"type": "AdamW", "params": {"adam_w_mode": True, "betas": [0.9]}}},
        {
            "problems": ['optimizer.params.betas must be two numbers or "auto", not [0.9]'],
            "notes": ["optimizer.params.adam_w_mode has no effect: the type AdamW is decoupled in any case"],
        },
    ),
    (
        zero() | {"optimizer": {"type": "adamw", "params": {"max_grad_norm": 1}}},
        {
            "problems": [
                (
                    "optimizer.params.max_grad_norm is refused by DeepSpeed as an optimizer's parameter: write gradient_clipping "
                    "at the top"
                )
            ]
        },
    ),
    (
        zero() | {"scheduler": {"type": "OneCycle", "params": {}}},
        {
            "unsupported": [
                (
                    'scheduler.type is "OneCycle": this program has WarmupLR, WarmupDecayLR or WarmupCosineLR. Leave the section '
                    "out and set lr_decay_style, lr_warmup, lr_decay and lr_min"
                )
            ]
        },
    ),
    (
        zero() | {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 0, "warmup_max_lr": 1}}},
        {
            "problems": [
                'scheduler.params.total_num_steps is missing: DeepSpeed needs it. Write "auto" for the run\'s length',
                'scheduler.params.warmup_num_steps must be a whole number of at least 1 or "auto", not 0',
            ]
        },
    ),
    (
        zero() | {"comet": {"enabled": True}},
        {"unsupported": ["comet is switched on: Comet is not there: use wandb_project or tensorboard"]},
    ),
    (
        zero() | {"csv_monitor": {"enabled": True, "output": "x"}},
        {
            "problems": ["csv_monitor.output is unknown: did you mean output_path?"],
            "notes": ["csv_monitor has no effect: the run folder's metrics.jsonl has these numbers"],
        },
    ),
    (
        zero() | {"pipeline": {"stages": 2}},
        {"notes": ["pipeline has no effect: it is for models that this program does not train"]},
    ),
    (
        zero(3, cpu_offload=True),
        {
            "notes": [
                'zero_optimization.cpu_offload is the old name: it is read as "offload_optimizer": {"device": "cpu"}'
            ]
        },
    ),
    (
        zero(3, cpu_offload=False, offload_optimizer={"device": "cpu"}),
        {
            "problems": [
                (
                    "zero_optimization.cpu_offload is the old name of offload_optimizer, which is there too: DeepSpeed refuses "
                    "both, leave it out"
                )
            ]
        },
    ),
    ({ZERO: True}, {"notes": ['zero_optimization is true, which is "stage": 1']}),
    (
        zero() | {"amp": {"enabled": False}},
        {
            "problems": [
                (
                    "amp was removed from DeepSpeed 0.19, which refuses a JSON that still has it, even switched off "
                    "(https://github.com/deepspeedai/DeepSpeed/issues/8489): use bf16, fp16 or torch_autocast"
                )
            ]
        },
    ),
]


@pytest.mark.parametrize(("tree", "expected"), BOTH_SAY, ids=str)
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_what_is_said_for_both_engines(engine: str, tree: dict[str, Any], expected: dict[str, list[str]]) -> None:
    before = copy.deepcopy(tree)
    found = said(tree, engine)
    if engine == "fsdp":  # what FSDP2 lacks beside it has tests of its own
        found = {**found, "lacking": [], "notes": [note for note in found["notes"] if "FSDP2" not in note]}
    assert found == NOTHING | expected
    assert tree == before


@pytest.mark.parametrize("tree", [tree for tree, _ in BOTH_SAY], ids=str)
def test_every_line_begins_with_a_path_of_the_json(tree: dict[str, Any]) -> None:
    for engine in ("deepspeed", "fsdp"):
        for line in chain(*said(tree, engine).values()):
            assert line.split(" ")[0].split(".")[0] in tree or "is missing" in line, line
