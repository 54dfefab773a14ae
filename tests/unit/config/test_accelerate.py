"""Accelerate's own configuration files, handed over as a DeepSpeed JSON, are named, with the JSON that they mean."""

import json
from pathlib import Path

import pytest
import yaml

from ds_recipes.config.ds.accelerate import accelerate_refusal
from ds_recipes.config.ds.check import check_tree
from ds_recipes.config.ds.read import read_json
from ds_recipes.config.lint.report import ERROR, lint_file

COMMON = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "bf16", "num_machines": 1, "num_processes": 8}


def deepspeed(**section) -> dict:
    return {**COMMON, "distributed_type": "DEEPSPEED", "deepspeed_config": section}


def fsdp(**section) -> dict:
    return {**COMMON, "distributed_type": "FSDP", "fsdp_config": section}


def zero(stage: int, **more) -> dict:
    return {"zero_optimization": {"stage": stage, **more}, "bf16": {"enabled": True}}


CPU = {"device": "cpu"}
MEANT = [
    (deepspeed(zero_stage=3, zero3_init_flag=True, gradient_clipping=1.0), zero(3) | {"gradient_clipping": 1.0}),
    (
        deepspeed(zero_stage=2, offload_optimizer_device="cpu", offload_param_device="none"),
        zero(2, offload_optimizer=CPU),
    ),
    (
        deepspeed(
            zero_stage=3, offload_param_device="nvme", offload_param_nvme_path="/local", gradient_accumulation_steps=4
        ),
        zero(3, offload_param={"device": "nvme", "nvme_path": "/local"}) | {"gradient_accumulation_steps": 4},
    ),
    (deepspeed(offload_optimizer_device="none"), zero(2)),
    (
        fsdp(fsdp_sharding_strategy="FULL_SHARD", fsdp_offload_params=True),
        zero(3, offload_optimizer=CPU, offload_param=CPU),
    ),
    (fsdp(fsdp_sharding_strategy="SHARD_GRAD_OP"), zero(2)),
    (fsdp(fsdp_sharding_strategy=1), zero(3)),
    (fsdp(fsdp_version=2, fsdp_reshard_after_forward=False), zero(2)),
]


@pytest.mark.parametrize("write", [yaml.safe_dump, json.dumps], ids=["yaml", "json"])
@pytest.mark.parametrize(("tree", "meant"), MEANT)
def test_one_line_with_a_json_that_is_right(tree: dict, meant: dict, write, tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(write(tree))
    with pytest.raises(
        ValueError, match="is a configuration of Accelerate's launcher, not a DeepSpeed JSON"
    ) as refused:
        read_json(str(path))
    message = str(refused.value)
    assert "\n" not in message and ("--engine fsdp" in message) == ("fsdp_config" in tree)
    shown = json.loads(message[message.index("{") :])
    assert shown == meant
    if "nvme" not in message:
        found = check_tree(shown, "fsdp" if "fsdp_config" in tree else "deepspeed")
        assert not found.problems and not found.unsupported
    (line,) = lint_file(str(path)).of(ERROR)
    assert "is a configuration of Accelerate's launcher" in line.text


def test_the_json_that_it_names_is_to_be_handed_over() -> None:
    text = yaml.safe_dump(deepspeed(deepspeed_config_file="ds/zero3.json", zero3_init_flag=True))
    assert str(accelerate_refusal(text)).endswith("It names one: hand over ds/zero3.json")


def test_one_without_deepspeed() -> None:
    text = yaml.safe_dump({**COMMON, "distributed_type": "MULTI_GPU"})
    assert "has no deepspeed_config" in str(accelerate_refusal(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "a: b: c",
        '{"bf16": {"enabled": true}}',
        '{"zero_optimization": {"stage": 3}, "mixed_precision": "bf16"}',
        "num_processes: 8",
    ],
)
def test_other_files_are_not_taken_for_one(text: str) -> None:
    assert accelerate_refusal(text) is None
