"""What a DeepSpeed JSON says reaches the run, and what the run says reaches DeepSpeed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.ds.effective import DEFAULT_TREE, effective_ds_config
from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config, values_of
from tests.unit.config.settings import STAGE_3, load, write_json

ROOT = Path(__file__).resolve().parents[3]

SAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bf16": {"enabled": True}}, {"precision": "bf16"}),
    ({"bf16": {"enabled": False}}, {"precision": "fp32"}),
    ({"bf16": {"enabled": "auto"}}, {}),
    ({"bfloat16": {"enabled": False}}, {"precision": "fp32"}),
    ({"bf16": {}}, {"precision": "fp32"}),
    ({"fp16": {"enabled": True}}, {"precision": "fp16"}),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, {"precision": "fp16"}),
    ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, {"precision": "fp32"}),
    ({"fp16": {"enabled": False}, "bf16": {"enabled": "auto"}}, {"precision": "bf16"}),
    ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, {}),
    ({"torch_autocast": {"enabled": True}}, {"precision": "fp32"}),
    ({"torch_autocast": {"enabled": False}}, {}),
    ({"data_types": {"param_dtype": "float16"}}, {"precision": "fp16"}),
    ({"tensorboard": {"enabled": True}}, {"tensorboard": True}),
    ({"tensorboard": {"enabled": False, "job_name": "j"}}, {}),
    ({"wandb": {"enabled": True, "project": "p", "team": "t"}}, {"wandb_project": "p", "wandb_entity": "t"}),
    ({"wandb": {"enabled": True}}, {"wandb_project": "deepspeed"}),
    ({"wandb": {"enabled": False, "project": "p"}}, {}),
    ({"gradient_clipping": 0.5}, {"max_grad_norm": 0.5}),
    ({"gradient_clipping": None}, {}),
    ({"train_micro_batch_size_per_gpu": 4}, {"batch_size_training": 4}),
    ({"train_batch_size": 64.0}, {"global_batch_size": 64}),
    ({"gradient_accumulation_steps": 8}, {"gradient_accumulation_steps": 8}),
    ({"activation_checkpointing": {"profile": False}}, {"activation_checkpointing": True}),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": "auto"}}},
        {"lr": 1.0, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-6},
    ),
    ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": True, "torch_adam": True}}}, {}),
    (
        {"optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}}},
        {"optimizer_type": "sgd", "sgd_momentum": 0.9},
    ),
]


def with_json(folder: Path, tree: dict[str, Any], flags: str = "") -> Config:
    write_json(folder, tree)
    return load(f"--ds_config {folder}/zero3.json {flags}")


@pytest.mark.parametrize(("says", "changes"), SAYS)
def test_what_the_json_says_becomes_the_runs(says: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    config = with_json(tmp_path, STAGE_3 | says)
    path = f"{tmp_path}/zero3.json"
    assert values_of(config) == values_of(load()) | {"ds_config": path} | changes
    assert all(config.origins[name] == path for name in changes)


@pytest.mark.parametrize("value", [5e-4, "auto"])
def test_the_same_value_in_both_places_and_auto_are_fine(value: float | str, tmp_path: Path) -> None:
    tree = STAGE_3 | {"optimizer": {"type": "AdamW", "params": {"lr": value}}}
    assert with_json(tmp_path, tree, "--lr 5e-4").optimizer.lr == 5e-4


def test_auto_is_filled_from_the_run() -> None:
    config = load("--batch_size_training 2 --global_batch_size 24 --max_grad_norm 0.25 --precision fp32")
    effective = effective_ds_config(config, make_plan(config, 4))
    assert effective == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.25,
        "bf16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": DEFAULT_TREE["zero_optimization"],
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def test_the_users_own_tuning_is_passed_through_and_the_rest_is_not(tmp_path: Path) -> None:
    tree = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 5e8,
            "stage3_prefetch_bucket_size": "auto",
            "sub_group_size": 1e9,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 4},
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "communication_data_type": "bf16",
        "wall_clock_breakdown": True,
        "steps_per_print": 1,
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {}},
        "activation_checkpointing": {},
    }
    config = with_json(tmp_path, tree)
    assert engine_settings(config).sharding.optimizer_on == "cpu"
    assert effective_ds_config(config, make_plan(config, 1)) == {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 500_000_000,
            "sub_group_size": 1_000_000_000,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 4},
        },
        "communication_data_type": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    assert [note.split(" ", 2)[1] for note in config.ds.notes] == [
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "steps_per_print",
    ]


def test_what_the_json_leaves_out_does_not_switch_on_what_the_run_has_switched_off(tmp_path: Path) -> None:
    config = with_json(tmp_path, STAGE_3 | {"wandb": {"enabled": True}}, "--wandb_project none")
    assert config.logging.wandb_project is None


def test_the_built_in_json_is_the_example_file() -> None:
    assert json.loads((ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8")) == DEFAULT_TREE


def test_the_offload_example_differs_only_in_offload() -> None:
    tree = json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text(encoding="utf-8"))
    expected = copy.deepcopy(DEFAULT_TREE)
    expected["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    assert tree == expected


def test_every_example_json_loads_without_a_note() -> None:
    paths = sorted((ROOT / "ds_configs").rglob("*.json"))
    assert len(paths) >= 6
    for path in paths:
        config = load(f"--ds_config {path}")
        assert config.ds is not None and config.ds.notes == config.ds.warnings == ()
        assert effective_ds_config(config, make_plan(config, 2))["train_batch_size"] == 2


def test_loading_does_not_change_the_json_and_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = with_json(tmp_path, STAGE_3)
    assert config.ds is not None
    effective_ds_config(config, make_plan(config, 2))["zero_optimization"]["stage"] = 1
    assert config.ds.tree == STAGE_3
    with pytest.raises(AttributeError):
        config.run.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.origins["lr"] = "nowhere"  # type: ignore[index]


EFFECTIVE: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"zero_optimization": {"stage": 1}}, "", {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}),
    (
        {
            "zero_optimization": {
                "stage": 2,
                "cpu_offload": True,
                "stage3_max_live_parameters": 1,
                "overlap_comm": "true",
            }
        },
        "",
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}}},
    ),
    (
        {"zero_optimization": {"stage": 3, "prefetch_bucket_size": "5", "zero_hpz_partition_size": 2}},
        "--engine fsdp",
        {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 5, "zero_hpz_partition_size": 2}},
    ),
    (
        STAGE_3 | {"fp16": {"enabled": "auto", "loss_scale": "auto", "initial_scale_power": 12}},
        "--precision fp16",
        {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 12}},
    ),
    (
        STAGE_3 | {"torch_autocast": {"enabled": True}},
        "",
        {
            "bf16": {"enabled": False},
            "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "communication_data_type": "fp32",
        },
    ),
    (
        STAGE_3
        | {"torch_autocast": {"enabled": True, "dtype": "bf16", "lower_precision_safe_modules": ["torch.nn.Linear"]}},
        "",
        {
            "torch_autocast": {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": ["torch.nn.Linear"],
            }
        },
    ),
    (
        STAGE_3 | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        "",
        {
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
            "data_types": {"grad_accum_dtype": "bf16"},
            "communication_data_type": "fp32",
        },
    ),
    (
        STAGE_3
        | {"aio": {"block_size": 1}, "data_types": {"grad_accum_dtype": "half"}, "communication_data_type": "FP16"},
        "",
        {"aio": {"block_size": 1}, "data_types": {"grad_accum_dtype": "fp16"}, "communication_data_type": "fp16"},
    ),
    (
        STAGE_3 | {"wandb": {"enabled": True}, "tensorboard": {"enabled": True}, "timers": {}},
        "",
        {"wandb": None, "tensorboard": None},
    ),
]


@pytest.mark.parametrize(("tree", "flags", "expected"), EFFECTIVE, ids=str)
def test_what_deepspeed_gets(tree: dict[str, Any], flags: str, expected: dict[str, Any], tmp_path: Path) -> None:
    config = with_json(tmp_path, tree, flags)
    effective = effective_ds_config(config, make_plan(config, 2))
    assert {key: effective.get(key) for key in expected} == expected
    filled = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [effective[key] for key in filled] == [2, 1, 1, 1.0]
    assert '"auto"' not in json.dumps(effective)


SETTINGS_READ: list[tuple[dict[str, Any], str, str]] = [
    ({}, "", "parameters bfloat16, master float32, moments float32, gradient accumulation float32, reduction float32"),
    (
        {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"},
        "",
        "parameters bfloat16, master float32, moments float32, gradient accumulation bfloat16, reduction bfloat16",
    ),
    (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        "--engine fsdp",
        "parameters bfloat16, master bfloat16, moments bfloat16, gradient accumulation bfloat16, reduction float32",
    ),
    (
        {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}},
        "",
        "parameters float32, master float32, moments float32, gradient accumulation float32, reduction bfloat16, "
        "autocast bfloat16",
    ),
]


@pytest.mark.parametrize(("tree", "flags", "expected"), SETTINGS_READ, ids=str)
def test_the_precision_that_both_engines_read(tree: dict[str, Any], flags: str, expected: str, tmp_path: Path) -> None:
    assert str(engine_settings(with_json(tmp_path, STAGE_3 | tree, flags)).precision) == expected


def test_a_key_that_has_no_effect_at_this_stage_reaches_no_engine(tmp_path: Path) -> None:
    zero = {"stage": 2, "zero_hpz_partition_size": 4, "offload_param": {"device": "cpu"}}
    sharding = engine_settings(with_json(tmp_path, {"zero_optimization": zero})).sharding
    assert (sharding.stage, sharding.group_size, sharding.parameters_on) == (2, None, "device")


def test_what_fsdp_lacks_is_one_line(tmp_path: Path) -> None:
    config = with_json(tmp_path, DEFAULT_TREE, "--engine fsdp")
    assert config.ds is not None and config.ds.notes == () and len(config.ds.warnings) == 1
    assert config.ds.warnings[0].endswith(
        "no result depends on them: zero_optimization.contiguous_gradients, zero_optimization.overlap_comm, "
        "zero_optimization.reduce_bucket_size, zero_optimization.stage3_prefetch_bucket_size, "
        "zero_optimization.stage3_param_persistence_threshold"
    )
