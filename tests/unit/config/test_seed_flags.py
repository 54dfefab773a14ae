"""Every flag of the ancestor's job script, with its meaning; and the flags that launchers add."""

from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.schema import values_of
from tests.unit.config.settings import STAGE_3, load, problems_of, write_json

MEANINGS: dict[str, dict[str, Any]] = {
    "--low_cpu_fsdp": {},
    "--peft_method None": {"peft_method": None},
    "--mixed_precision": {"precision": "bf16"},
    "--mixed_precision False": {"precision": "fp32"},
    "--mixed_precision --pure_bf16": {"precision": "bf16"},
    "--mixed_precision False --pure_bf16": {"precision": "bf16"},
    "--pure_bf16": {"precision": "bf16"},
    "--pure_bf16 False --precision fp32": {"precision": "fp32"},
    "--num_epochs 2": {"num_epochs": 2},
    "--tokenizer_name t": {"tokenizer_name": "t"},
    "--batch_size_training 4": {"batch_size_training": 4},
    "--gradient_accumulation_steps 8": {"gradient_accumulation_steps": 8},
    "--lr 1e-4": {"lr": 1e-4},
    "--lr_min 1e-5": {"lr_min": 1e-5},
    "--lr_decay 0.80": {"lr_decay": 0.8},
    "--lr_warmup 0.05": {"lr_warmup": 0.05},
    "--lr_decay_style cosine": {"lr_decay_style": "cosine"},
    "--weight_decay 0.1": {"weight_decay": 0.1},
    "--fsdp_activation_checkpointing": {"activation_checkpointing": True},
    "--fsdp_activation_checkpointing False": {"activation_checkpointing": False},
    "--seed 42": {"seed": 42},
    "--dataset alpaca_dataset": {"dataset": "alpaca"},
    "--dataset wikipedia_dataset": {"dataset": "text"},
    "--num_workers_dataloader 2": {"num_workers_dataloader": 2},
    "--save_model": {"save_model": True},
    "--save_optimizer": {"save_optimizer": True},
    "--save_interval_iteration 500": {"save_interval_iteration": 500},
    "--load_checkpoint_path other": {"load_checkpoint_path": "other"},
    "--use_mpi": {"use_mpi": True},
    "--use_fast_kernels": {"use_fast_kernels": True},
    "--run_validation --validation_data v.jsonl": {"run_validation": True, "validation_data": ("v.jsonl",)},
    "--wandb_project p --wandb_entity e --wandb_name n": {
        "wandb_project": "p",
        "wandb_entity": "e",
        "wandb_name": "n",
    },
    "--deepspeed": {"engine": "deepspeed"},
    "--enable_fsdp False": {"engine": "deepspeed"},
}


@pytest.mark.parametrize("flags", MEANINGS)
def test_a_flag_of_the_ancestor_changes_what_it_names_and_nothing_else(flags: str) -> None:
    assert values_of(load(flags)) == values_of(load()) | MEANINGS[flags]


@pytest.mark.parametrize("flag", ["--deepspeed", "--deepspeed_config", "--ds_config"])
def test_three_flags_name_the_json(flag: str, tmp_path: Path) -> None:
    write_json(tmp_path, STAGE_3)
    path = str(tmp_path / "zero3.json")
    config = load(f"{flag} {path}")
    assert config.run.ds_config == path
    assert config.ds is not None and config.ds.tree == STAGE_3


def test_the_deepspeed_launchers_own_flags_together(tmp_path: Path) -> None:
    write_json(tmp_path, STAGE_3)
    path = tmp_path / "zero3.json"
    assert load(f"--local_rank=0 --deepspeed --deepspeed_config {path}").run.ds_config == str(path)


def test_two_json_files_are_a_conflict(tmp_path: Path) -> None:
    write_json(tmp_path, STAGE_3)
    assert problems_of(f"--ds_config {tmp_path}/zero3.json --deepspeed_config other.json") == (
        (
            f"--ds_config makes ds_config {tmp_path}/zero3.json, but --deepspeed_config makes it other.json (both command line). "
            "Leave one of them out."
        ),
    )


def test_the_ancestors_job_script_needs_one_change_only() -> None:
    script = (
        "--enable_fsdp --low_cpu_fsdp --peft_method None --mixed_precision --pure_bf16 --num_epochs 2 --model_name m "
        "--tokenizer_name m --batch_size_training 4 --gradient_accumulation_steps 8 --lr 1e-4 --lr_min 1e-5 --lr_decay 0.80 "
        "--lr_warmup 0.05 --lr_decay_style cosine --weight_decay 0.1 --fsdp_activation_checkpointing --seed 42 "
        "--dataset alpaca_dataset --num_workers_dataloader 0 --save_model --save_optimizer --save_interval_iteration 500 "
        "--save_checkpoint_path out --load_checkpoint_path out --use_mpi --use_fast_kernels --wandb_entity e "
        "--wandb_project p --wandb_name n"
    )
    problems = problems_of(script, ())
    assert [problem.split(" (")[0] for problem in problems] == ["dataset is alpaca_dataset"]
    assert problems_of(script + " --train_data a.json", ()) == ()


def test_the_ancestors_engine_flag_is_todays_and_two_engines_are_a_conflict() -> None:
    assert load("--enable_fsdp").run.engine == load("--enable_fsdp true --engine fsdp").run.engine == "fsdp"
    assert load("--enable_fsdp false").run.engine == "deepspeed"
    for flags, first, second in (
        ("--enable_fsdp --engine deepspeed", "--enable_fsdp makes engine fsdp", "--engine makes it deepspeed"),
        ("--deepspeed --enable_fsdp", "--deepspeed makes engine deepspeed", "--enable_fsdp makes it fsdp"),
    ):
        assert problems_of(flags) == (f"{first}, but {second} (both command line). Leave one of them out.",)
