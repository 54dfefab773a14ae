"""What a DeepSpeed JSON says reaches the run, and what the run says reaches DeepSpeed."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.ds_config import DEFAULT_TREE, effective_ds_config
from ds_recipes.config.ds_keys import TOP, ZERO
from ds_recipes.config.plan import make_plan
from ds_recipes.config.schema import Config, values_of
from tests.unit.config.settings import STAGE_3, load, write_json

ROOT = Path(__file__).resolve().parents[3]

SAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bf16": {"enabled": True}}, {"precision": "bf16"}),
    ({"bf16": {"enabled": False}}, {"precision": "fp32"}),
    ({"bf16": {"enabled": "auto"}}, {}),
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
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100, "warmup_type": "linear"}}},
        {"lr_decay_style": "constant", "lr_warmup": 100.0},
    ),
    (
        {
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {
                    "warmup_min_lr": 0,
                    "warmup_max_lr": 2e-4,
                    "warmup_num_steps": 10,
                    "total_num_steps": 1e3,
                    "warmup_type": "linear",
                },
            }
        },
        {"lr_decay_style": "linear", "lr": 2e-4, "lr_warmup": 10.0, "lr_decay": 1000.0, "lr_min": 0.0},
    ),
    (
        {
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {"total_num_steps": "auto", "warmup_type": "linear", "cos_min_ratio": "auto"},
            }
        },
        {"lr_decay_style": "cosine"},
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
    assert config.ds is not None and config.ds.offloads_optimizer
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
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        },
        "communication_data_type": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    assert [note.split(" ", 2)[1] for note in config.ds.notes] == [
        "zero_optimization.offload_optimizer.buffer_count",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "steps_per_print",
    ]


def test_the_built_in_json_is_the_example_file() -> None:
    assert json.loads((ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8")) == DEFAULT_TREE


def test_the_offload_example_differs_only_in_offload() -> None:
    tree = json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text(encoding="utf-8"))
    expected = copy.deepcopy(DEFAULT_TREE)
    expected["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    assert tree == expected


def test_every_example_json_loads_without_a_note() -> None:
    paths = sorted((ROOT / "ds_configs").rglob("*.json"))
    assert len(paths) >= 2
    for path in paths:
        config = load(f"--ds_config {path}")
        assert config.ds is not None and config.ds.notes == ()
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


def test_the_table_knows_every_key_of_the_installed_deepspeed() -> None:
    code = (
        "import json, logging; logging.disable()\n"
        "from deepspeed.runtime import config as c\n"
        "from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as Z\n"
        "from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as O\n"
        "from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as P\n"
        "from deepspeed.runtime.precision_config import DeepSpeedBF16Config as B\n"
        "zero = [name for key, field in Z.model_fields.items() for name in (key, field.alias) if name]\n"
        "gone = [*c._REMOVED_TOP_LEVEL_CONFIG_KEYS], [*c._REMOVED_ZERO_CONFIG_KEYS]\n"
        "print(json.dumps([zero, [*O.model_fields], [*P.model_fields], [*B.model_fields], *gone]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    zero, offload_optimizer, offload_param, bf16, removed, removed_zero = json.loads(done.stdout.splitlines()[-1])
    assert {*zero, *removed_zero} <= set(ZERO)
    assert set(removed) <= set(TOP)
    for keys, rule in (
        (offload_optimizer, ZERO["offload_optimizer"]),
        (offload_param, ZERO["offload_param"]),
        (bf16, TOP["bf16"]),
    ):
        assert set(keys) <= set(getattr(rule, "keys", {}))
