"""Every mistake is refused with the one line that helps: what, where, and what to write instead."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.config.settings import STAGE_3, problems_of, write_json

FLAGS = {
    "--lr abc": "--lr must be a number, not 'abc' (command line)",
    "--lr nan": "--lr must be a finite number, not 'nan' (command line)",
    "--lr=": "--lr is empty (command line)",
    "--lr": "--lr needs a value (command line)",
    "--lr 1 2": "--lr takes one value, not 2 (1, 2) (command line)",
    "--lr -1": "--lr must be at least 0, not -1.0 (command line)",
    "--lr 1e-4 --lr 2e-4": "--lr is given twice, as 0.0001 and as 0.0002 (command line). Leave one of them out.",
    "--max_steps 1.5": "--max_steps must be a whole number, not '1.5' (command line)",
    "--max_steps 1e99": "--max_steps must be a whole number, not '1e99' (command line)",
    "--batch_size_training 0": "--batch_size_training must be at least 1, not 0 (command line)",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps must be at least 1, not 0 (command line)",
    "--adam_beta2 1": "--adam_beta2 must be below 1, not 1.0 (command line)",
    "--adam_eps 0": "--adam_eps must be above 0, not 0.0 (command line)",
    "--save_model maybe": "--save_model must be true or false, not 'maybe' (command line)",
    "--packing tight": "--packing must be documents, concat or off, not 'tight' (command line)",
    "--stop_after 11": "--stop_after must be a duration such as 11h40m, 90m or 45s, not '11' (command line)",
    "--stop_after 0s": "--stop_after must be above 0, not 0 (command line)",
    "--peft_method qlora": "--peft_method must be None, not 'qlora' (command line)",
    "--allow_change lr": (
        "--allow_change must be data, tokenizer, dataset, mixture, validation_split, packing, truncation, context_size, seed, "
        "global_batch_size, precision, optimizer, model or schedule, not 'lr' (command line)"
    ),
    "--validation_data": "--validation_data needs a value (command line)",
    "--learning_rate 1": "unknown flag --learning_rate (command line): here it is --lr",
    "--num_epoch 1": "unknown flag --num_epoch (command line): did you mean --num_epochs?",
    "--batch-size-trainin 1": "unknown flag --batch-size-trainin (command line): did you mean --batch_size_training?",
    "--batch-size-training 0": "--batch-size-training must be at least 1, not 0 (command line)",
    "--no_save_model": "unknown flag --no_save_model (command line): to turn it off write --save_model false",
    "-lr 1": "unexpected argument '-lr' (command line): flags begin with two dashes, --lr",
    "--pure_bf16 --precision fp32": (
        "--pure_bf16 makes precision bf16, but --precision makes it fp32 (both command line). Leave one of them out."
    ),
    "--pure_bf16 perhaps": "--pure_bf16 must be true or false, not 'perhaps' (command line)",
    "--config": "--config needs one path, of a run file (command line)",
    "--config missing.yaml": "--config missing.yaml: there is no such file",
    "--ds_config missing.json": "missing.json: there is no such file",
    "--local_rank x": "--local_rank must be a whole number, not 'x' (command line)",
    "--model_config c.json --tokenizer_name t": (
        "--model_name is m (command line), but --model_config is c.json (command line). Leave one of them out."
    ),
    "--use_fast_kernels --attn_implementation eager": (
        "--use_fast_kernels is true (command line) picks the attention kernel, but --attn_implementation is eager "
        "(command line). Leave one of them out."
    ),
    "--keep_every 100": (
        "--keep_every is 100 (command line) has no effect: keep_last is not set, so all are kept. Set --keep_last too."
    ),
    "--hang_limits step": (
        "--hang_limits is step (command line): it takes phase=duration with a phase of start, load, tokenise, step, evaluate, "
        "save, not 'step'."
    ),
    "--hang_limits step=1m save=0s": (
        "--hang_limits is step=1m save=0s (command line): it needs a duration above 0 for save, such as save=10m."
    ),
    "--hang_factor 1": "--hang_factor must be above 1, not 1.0 (command line)",
    "--hang_monitor false --hang_limits step=1m": (
        "--hang_limits is step=1m (command line) has no effect: --hang_monitor is false (command line). Leave one of them out."
    ),
    "--keep_last 1": "--keep_last must be at least 2, not 1 (command line)",
    "--keep_last 2 --keep_best 1": (
        "--keep_best is 1 (command line) needs a validation loss: name data with --validation_data, or leave it out."
    ),
    "--spike_window 5": (
        "--spike_window is 5 (command line): so few losses do not say what is normal. Set at least 8, or 0 to turn the watch off."
    ),
    "--spike_recovery rewind --spike_window 0": (
        "--spike_recovery is rewind (command line), but --spike_window is 0 (command line): no spike is ever seen. Set "
        "spike_window, or leave it out."
    ),
    "--spike_recovery rewind --save_optimizer false": (
        "--spike_recovery is rewind (command line), but --save_optimizer is false (command line): there would be nothing to go "
        "back to. Leave one of them out."
    ),
    "--spike_recovery rewind --save_interval_iteration 0": (
        "--spike_recovery is rewind (command line), but --save_interval_iteration is 0 (command line): there is no checkpoint to "
        "go back to before the end. Set an interval."
    ),
    "--spike_recovery rewind --save_interval_iteration 1 --keep_last 3": (
        "--spike_recovery is rewind (command line), but --keep_last is 3 (command line): in a row of 4 spikes (spike_patience) up "
        "to 3 checkpoints are saved, and the last good one would be deleted. Keep at least 4, or save less often."
    ),
    "--run_validation": (
        "--run_validation is true (command line), but validation_data is not set: name its files with --validation_data, or "
        "hold out a fraction of the training data with --validation_split"
    ),
    "--lr 1e-5 --lr_min 1e-4": (
        "--lr_min is 0.0001 (command line), above lr: --lr is 1e-05 (command line). The learning rate falls from lr to lr_min."
    ),
    "--lr_warmup 2.5": (
        "--lr_warmup is 2.5 (command line): above 1 it counts steps, so it must be whole; up to 1 it is a fraction of the run."
    ),
    "--lr_warmup 1 --lr_decay_style constant": (
        "--lr_warmup is 1.0 (command line): 1 is a fraction, the whole run, so the learning rate would never reach lr. Set a "
        "fraction such as 0.05, or 2 steps or more."
    ),
    "--lr_warmup 0.9 --lr_decay 0.8": (
        "--lr_warmup is 0.9 (command line), but the decay ends at 0.8 (lr_decay). Both are counted from the start of the "
        "run: set lr_decay above lr_warmup."
    ),
    "--lr_warmup 0.5 --lr_decay 0.6 --lr_decay_style wsd": (
        "lr_warmup 0.5 and lr_decay 0.6 are fractions of the run and sum to more than 1. Set one to less."
    ),
    "--sgd_momentum 0.9": (
        "--sgd_momentum is 0.9 (command line) has no effect: optimizer_type is adamw (default). Leave one of them out."
    ),
    "--save_model false": (
        "--save_model is false (command line), but save_optimizer is true (default): the optimizer's state is of no use "
        "without the weights. Set save_optimizer to false too."
    ),
    "--checkpoint_format deepspeed --engine fsdp": (
        "--checkpoint_format is deepspeed (command line), but --engine is fsdp (command line): only DeepSpeed writes its own "
        "files. Leave one of them out."
    ),
    "--checkpoint_format deepspeed --save_optimizer false": (
        "--save_optimizer is false (command line), but --checkpoint_format is deepspeed (command line): DeepSpeed keeps the "
        "float32 weights with the optimizer's state, and other programs cannot read the ones without the other. Leave one of "
        "them out."
    ),
    "--wandb_name x": (
        "--wandb_name is x (command line) has no effect: wandb_project is not set. Name it with --wandb_project."
    ),
}

RUN_FILES = {
    "lr: fast": "run.yaml:1: lr must be a number, not 'fast'",
    "\nlr: 1e-4\nlr: 1": "run.yaml:3: lr stands here a second time; the first is in line 2",
    "optimizer:\n  lr: 1": "run.yaml:1: optimizer holds a mapping; settings stand at the top level, without groups",
    "model_nam: x": "run.yaml:1: unknown key model_nam: did you mean model_name?",
    "# settings\n\npure_bf16: true": "run.yaml:3: unknown key pure_bf16: write precision: bf16",
    "deepspeed: x.json": "run.yaml:1: unknown key deepspeed: write ds_config: PATH",
    "local_rank: 0": "run.yaml:1: unknown key local_rank: it is a flag of launchers only",
    "lr: [1]": "run.yaml:1: lr takes one value, not 1 (1)",
    "train_data: [[a]]": "run.yaml:1: train_data holds a list of something else than single values",
    "validation_data: [a, '']": "run.yaml:1: validation_data is empty",
    "batch_size_training: true": "run.yaml:1: batch_size_training must be a whole number, not 'true'",
    "batch_size_training:": "run.yaml:1: batch_size_training is empty",
    "a: [b\nc: d": "run.yaml:2: not YAML: expected ',' or ']', but got ':'",
    "- lr": "run.yaml:1: a run file holds lines of 'name: value'",
    "lr: 1\n---\nlr: 2": "run.yaml:2: not YAML: but found another document",
    "\tlr: 1": "run.yaml:1: not YAML: found character '\\t' that cannot start any token",
}

# What else a JSON may say is in test_ds_check.py; here it is put together with the rest of the settings.
JSON_TREES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"gradient_clipping": -1}, ('gradient_clipping must be a number of at least 0 or "auto", not -1',)),
    ({"train_batch_size": 0}, ("train_batch_size must be at least 1, not 0",)),
    (
        {"gradient_cliping": 1.0, "optimizer": {"type": "Lion"}},
        (
            "gradient_cliping is unknown: did you mean gradient_clipping?",
            'optimizer.type is "Lion": this program has AdamW, Adam and SGD',
        ),
    ),
    (
        {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
        (
            'torch_autocast.dtype is "fp16": autocast is there in bfloat16 only. Write "bfloat16", or use the fp16 section, which '
            "scales the loss",
        ),
    ),
    (
        {
            "bf16": {"enabled": False},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}},
        },
        (
            "optimizer.params.lr is 0.0001, but scheduler.params.warmup_max_lr is 0.001 in the same file. Make them equal.",
        ),
    ),
]
JSON_CONFLICTS: list[tuple[dict[str, Any], str]] = [
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
        'optimizer.params.lr is 0.1, but --lr is 0.01 (command line). Set one of them, or write "auto" in the JSON.',
    ),
    (
        {"optimizer": {"type": "SGD"}},
        'optimizer.type is "SGD", but --optimizer_type is adamw (command line). Leave one of them out.',
    ),
    (
        {"train_micro_batch_size_per_gpu": 4},
        (
            "train_micro_batch_size_per_gpu is 4, but --batch_size_training is 8 (command line). Set one of them, or write "
            '"auto" in the JSON.'
        ),
    ),
    (
        {"bf16": {"enabled": False}},
        'bf16.enabled is false, but --precision is bf16 (command line). Set one of them, or write "auto" in the JSON.',
    ),
    (
        {"fp16": {"enabled": True}, "bf16": {"enabled": False}},
        'fp16.enabled is true, but --precision is bf16 (command line). Set one of them, or write "auto" in the JSON.',
    ),
    (
        {"torch_autocast": {"enabled": True}},
        'torch_autocast.enabled is true, but --precision is bf16 (command line). Set one of them, or write "auto" in the JSON.',
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}},
        'scheduler.params.warmup_max_lr is 0.1, but --lr is 0.01 (command line). Set one of them, or write "auto" in the JSON.',
    ),
    (
        {"activation_checkpointing": {}},
        "activation_checkpointing is there, but --activation_checkpointing is false (command line). Leave one of them out.",
    ),
]
BESIDE_JSON = (
    "--ds_config zero3.json --lr 1e-2 --optimizer_type adamw --batch_size_training 8 --precision bf16 "
    "--activation_checkpointing false"
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("flags", FLAGS)
def test_a_bad_flag_is_one_line(flags: str) -> None:
    assert problems_of(flags) == (FLAGS[flags],)


@pytest.mark.parametrize("text", RUN_FILES)
def test_a_bad_run_file_is_one_line_with_its_line_number(text: str) -> None:
    Path("run.yaml").write_text(text, encoding="utf-8")
    assert problems_of("--config run.yaml") == (RUN_FILES[text],)


@pytest.mark.parametrize(("tree", "problems"), JSON_TREES, ids=str)
def test_a_bad_json_is_one_line_a_key(tree: dict[str, Any], problems: tuple[str, ...]) -> None:
    write_json(Path(), STAGE_3 | tree)
    assert problems_of("--ds_config zero3.json") == tuple(f"zero3.json: {problem}" for problem in problems)


def test_what_a_json_asks_of_the_precision_is_held_against_the_runs() -> None:
    masters = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    write_json(Path(), STAGE_3 | {"bf16": {"enabled": "auto", **masters}})
    assert problems_of("--ds_config zero3.json --precision bf16") == ()
    assert problems_of("--ds_config zero3.json --precision fp32") == (
        "zero3.json: bf16.bf16_master_weights_and_grads is true, but the run's precision is fp32: set precision to bf16, or leave "
        "it out",
    )


@pytest.mark.parametrize(("tree", "problem"), JSON_CONFLICTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_json_that_contradicts_a_flag_names_both(tree: dict[str, Any], problem: str) -> None:
    write_json(Path(), STAGE_3 | tree)
    assert problems_of(BESIDE_JSON) == (f"zero3.json: {problem}",)


def test_sections_on_auto_leave_the_precision_to_the_run_within_what_they_exclude() -> None:
    write_json(Path(), STAGE_3 | {"bf16": {"enabled": False}, "fp16": {"enabled": "auto", "loss_scale_window": 0}})
    assert problems_of("--ds_config zero3.json") == ()
    assert problems_of("--ds_config zero3.json --precision fp16") == (
        "zero3.json: fp16.loss_scale_window must be above 0 while the loss scale is dynamic (loss_scale 0)",
    )
    assert problems_of("--ds_config zero3.json --precision bf16") == (
        'zero3.json: bf16.enabled is false, but --precision is bf16 (command line). Set one of them, or write "auto" in the JSON.',
    )


def test_what_is_missing_is_named() -> None:
    assert problems_of(needed=()) == (
        (
            "model_name is not set: name a folder or a hub id with --model_name, or a config JSON with --model_config to start "
            "from random weights"
        ),
        "train_data is not set: name one or more files, globs or folders with --train_data",
        "save_checkpoint_path is not set: name the run folder with --save_checkpoint_path",
    )


def test_a_model_config_needs_a_tokenizer() -> None:
    assert problems_of(needed=("--model_config", "c.json", "--train_data", "d", "--save_checkpoint_path", "run")) == (
        "tokenizer_name is not set: a model_config brings no tokenizer, so name one with --tokenizer_name",
    )


@pytest.mark.parametrize(
    ("name", "file"), [("alpaca_dataset", "alpaca_data.json"), ("wikipedia_dataset", "wikipedia.jsonl")]
)
def test_the_ancestors_data_set_without_a_path_says_where_it_goes_now(name: str, file: str) -> None:
    assert problems_of(f"--dataset {name}", ("--model_name", "m", "--save_checkpoint_path", "run")) == (
        (
            f"dataset is {name} (command line), but train_data is not set: the path is no longer kept in the source, so give it "
            f"as --train_data path/to/{file}"
        ),
    )


def test_all_problems_are_reported_at_once_whatever_their_source() -> None:
    Path("run.yaml").write_text("lr: fast\nmodel_nam: x\n", encoding="utf-8")
    write_json(Path(), {"zero_optimization": {"stage": 5}})
    assert problems_of("--config run.yaml --ds_config zero3.json --seed x stray --packing tight") == (
        "--seed takes one value, not 2 (x, stray) (command line)",
        "--packing must be documents, concat or off, not 'tight' (command line)",
        "run.yaml:1: lr must be a number, not 'fast'",
        "run.yaml:2: unknown key model_nam: did you mean model_name?",
        "zero3.json: zero_optimization.stage is 5: there are the stages 0, 1, 2 and 3",
    )


def test_a_run_file_that_cannot_be_read_is_not_followed_by_what_it_would_have_held() -> None:
    assert problems_of("--config missing.yaml", ()) == ("--config missing.yaml: there is no such file",)


def test_a_misspelt_name_is_not_followed_by_a_complaint_that_it_is_missing() -> None:
    assert problems_of("--model_nam m", ("--train_data", "d", "--save_checkpoint_path", "r")) == (
        "unknown flag --model_nam (command line): did you mean --model_name?",
    )
