"""Names of other trainers lead to the setting of the same meaning, or to none; dashes are taken for underscores."""

import dataclasses
import re
from pathlib import Path

import pytest

from ds_recipes.config import other_trainers, seed_flags
from ds_recipes.config.later import LATER_NAMES
from ds_recipes.config.load import load_config
from ds_recipes.config.schema import SETTINGS, Config
from ds_recipes.errors import ConfigError

NEEDED = ["--model_name", "m", "--train_data", "t", "--save_checkpoint_path", "r"]

MEANT = {
    "--output_dir x": "save_checkpoint_path",
    "--micro-batch-size 1": "batch_size_training",
    "--seq-length 4096": "context_size",
    "--train-iters 100": "max_steps",
    "--save-interval 10": "save_interval_iteration",
    "--min-lr 1e-5": "lr_min",
    "--val_data_path v": "validation_data",
    "--use_fp16": "precision",
    "--per-device-train-batch-size 2": "batch_size_training",
    "--cutoff_len 2048": "context_size",
    "--logging_steps 1": "log_interval",
    "--clip-grad 1.0": "max_grad_norm",
    "--lr-warmup-iters 10": "lr_warmup",
    "--tokenizer-model t": "tokenizer_name",
    "--save_total_limit 2": "keep_last",
    "--gradient_checkpointing": "activation_checkpointing",
    "--val_set_size 0.1": "validation_split",
    "--save_only_model": "save_optimizer",
    "--exit-duration-in-mins 700": "stop_after",
}
"""Flags of the HF Trainer, LLaMA-Factory, axolotl and Megatron-LM: the setting that the message has to name."""

TRAINER = {
    "output_dir": "save_checkpoint_path",
    "per_device_train_batch_size": "batch_size_training",
    "num_train_epochs": "num_epochs",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_decay_style",
    "warmup_steps": "lr_warmup",
    "warmup_ratio": "lr_warmup",
    "optim": "optimizer_type",
    "adam_epsilon": "adam_eps",
    "gradient_checkpointing": "activation_checkpointing",
    "full_determinism": "deterministic",
    "logging_steps": "log_interval",
    "logging_strategy": "log_interval",
    "eval_steps": "eval_interval",
    "save_steps": "save_interval_iteration",
    "save_total_limit": "keep_last",
    "run_name": "wandb_name",
    "project": "wandb_project",
    "do_eval": "run_validation",
    "data_seed": "seed",
    "dataloader_num_workers": "num_workers_dataloader",
    "resume_from_checkpoint": "resume",
}
"""Fields of transformers' TrainingArguments with a setting of the same meaning here."""


def problems_of(*flags: str) -> list[str]:
    try:
        load_config([*NEEDED, *flags], env={})
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("flags", MEANT)
def test_the_message_names_what_is_meant(flags: str) -> None:
    (problem,) = problems_of(*flags.split())
    assert problem.startswith(f"unknown flag {flags.split()[0]} (command line): ")
    named = set(re.findall(r"--(\w+)", problem.partition(": ")[2]))
    assert named == {MEANT[flags]}


def test_the_tables_name_settings_and_hide_none() -> None:
    assert set(other_trainers.SAME_MEANING) <= set(SETTINGS)
    others = [*other_trainers.NAMES, *other_trainers.HINTS, *LATER_NAMES]
    assert len(others) == len(set(others))
    assert not set(others) & {*SETTINGS, *seed_flags.OTHER_NAMES}
    for text in other_trainers.HINTS.values():
        flags = set(re.findall(r"--(\w+)", text)) - {"repo"}  # of tools/upload_to_hub.py
        assert flags <= set(SETTINGS), text


def test_no_field_of_transformers_trainer_is_taken_for_another_setting() -> None:
    from transformers import TrainingArguments

    for field in dataclasses.fields(TrainingArguments):
        if field.name in SETTINGS or field.name in seed_flags.OTHER_NAMES:
            continue
        (problem,) = problems_of(f"--{field.name}=1")
        hint = problem.partition("(command line): ")[2]
        guess = re.fullmatch(r"(?:did you mean|here it is) --(\w+)\??", hint)
        if field.name in other_trainers.HINTS:
            assert hint == other_trainers.HINTS[field.name]
        else:
            assert (guess and guess[1]) == TRAINER.get(field.name), problem


@pytest.mark.parametrize(
    ("flags", "read"),
    [
        ("--lr-min 1e-6", lambda config: config.optimizer.lr_min == 1e-6),
        ("--batch-size-training=3", lambda config: config.run.batch_size_training == 3),
        ("--run-validation false", lambda config: not config.evaluation.run_validation),
        ("--enable-fsdp", lambda config: config.run.engine == "fsdp"),
        ("--save-checkpoint-path a-b", lambda config: config.checkpoint.save_checkpoint_path == "a-b"),
        ("--local-rank 0", lambda config: True),
    ],
)
def test_dashes_are_underscores_in_names_and_stay_in_values(flags: str, read) -> None:
    config = load_config(
        ["--model-name", "m", "--train-data", "t", "--save-checkpoint-path", "a-b", *flags.split()], env={}
    )
    assert isinstance(config, Config) and read(config)


def test_dashes_in_a_run_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model-name: m-1\ntrain-data: t\nsave-checkpoint-path: r\nlr-min: 1e-5\n")
    config = load_config(["--config", str(file)], env={})
    assert (config.model.model_name, config.optimizer.lr_min) == ("m-1", 1e-5)
    file.write_text("lr-min: 1e-5\nlr_min: 1e-6\nseq-length: 5\n")
    problems = list(problems_of("--config", str(file)))
    assert problems == [
        f"{file}:2: lr_min stands here a second time; the first is in line 1",
        f"{file}:3: unknown key seq-length: here it is context_size",
    ]


def test_two_spellings_of_one_flag_must_agree() -> None:
    assert problems_of("--lr_min", "1e-5", "--lr-min", "1e-5") == []
    (problem,) = problems_of("--lr_min", "1e-5", "--lr-min", "1e-6")
    assert "--lr_min" in problem and "--lr-min" in problem
