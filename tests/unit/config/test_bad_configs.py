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
        "global_batch_size, precision or "
        "optimizer, not 'lr' (command line)"
    ),
    "--validation_data": "--validation_data needs a value (command line)",
    "--learning_rate 1": "unknown flag --learning_rate (command line): see --help for all settings",
    "--num_epoch 1": "unknown flag --num_epoch (command line): did you mean --num_epochs?",
    "--batch-size-training 1": "unknown flag --batch-size-training (command line): did you mean --batch_size_training?",
    "--no_save_model": "unknown flag --no_save_model (command line): to turn it off write --save_model false",
    "-lr 1": "unexpected argument '-lr' (command line): flags begin with two dashes, --lr",
    "--engine fsdp": (
        "--engine fsdp (command line): the FSDP engine is not there yet; use --engine deepspeed, whose ZeRO-3 shards the "
        "same things"
    ),
    "--enable_fsdp": (
        "--enable_fsdp (command line): the FSDP engine is not there yet; use --engine deepspeed, whose ZeRO-3 shards the "
        "same things"
    ),
    "--peft_method lora": (
        "--peft_method lora (command line): LoRA is not there yet; leave it out, and the whole model is trained"
    ),
    "--lora_r 8": "--lora_r 8 (command line): LoRA is not there yet; leave it out, and the whole model is trained",
    "--precision fp16": "--precision fp16 (command line): fp16 is not there yet; use bf16, or fp32 where bfloat16 is missing",
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
    "engine: fsdp": (
        "run.yaml:1: engine fsdp: the FSDP engine is not there yet; use --engine deepspeed, whose ZeRO-3 shards the same things"
    ),
    "a: [b\nc: d": "run.yaml:2: not YAML: expected ',' or ']', but got ':'",
    "- lr": "run.yaml:1: a run file holds lines of 'name: value'",
    "lr: 1\n---\nlr: 2": "run.yaml:2: not YAML: but found another document",
    "\tlr: 1": "run.yaml:1: not YAML: found character '\\t' that cannot start any token",
}

ZERO = "zero_optimization"
JSON_TREES: list[tuple[dict[str, Any], str]] = [
    ({ZERO: {"stage": 2}}, "zero_optimization.stage is 2: only ZeRO stage 3 is there yet: write 3"),
    ({}, 'zero_optimization.stage is missing: write "zero_optimization": {"stage": 3}'),
    ({ZERO: True}, "zero_optimization must be an object, not true"),
    (
        {ZERO: {"stage": 3, "overlap_com": True}},
        "unknown key zero_optimization.overlap_com: did you mean overlap_comm?",
    ),
    ({"gradient_cliping": 1.0}, "unknown key gradient_cliping: did you mean gradient_clipping?"),
    ({"qqq": 1}, "unknown key qqq: DeepSpeed has no such key there; leave it out"),
    ({"gradient_clipping": "1"}, 'gradient_clipping must be a number or "auto", not "1"'),
    ({"gradient_clipping": -1}, "gradient_clipping must be at least 0, not -1.0"),
    ({"train_batch_size": 1.5}, 'train_batch_size must be a whole number of at least 0 or "auto", not 1.5'),
    ({"train_batch_size": 0}, "train_batch_size must be at least 1, not 0"),
    (
        {ZERO: {"stage": 3, "mics_shard_size": 8}},
        (
            "zero_optimization.mics_shard_size was removed from DeepSpeed 0.19. What it did is hpZ in DeepSpeed "
            "(zero_hpz_partition_size) and HSDP in PyTorch; neither is there yet: leave it out"
        ),
    ),
    (
        {ZERO: {"stage": 3, "zero_hpz_partition_size": 8}},
        "zero_optimization.zero_hpz_partition_size is 8: hpZ is not there yet: leave it out",
    ),
    (
        {ZERO: {"stage": 3, "zero_quantized_weights": True}},
        "zero_optimization.zero_quantized_weights is true: quantised ZeRO++ communication is not there yet: leave it out",
    ),
    (
        {ZERO: {"stage": 3, "offload_param": {"device": "cpu"}}},
        (
            'zero_optimization.offload_param.device is "cpu": parameter offload is not there yet: leave offload_param out, or use '
            "offload_optimizer"
        ),
    ),
    (
        {ZERO: {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        'zero_optimization.offload_optimizer.device must be "none", "cpu" or "auto", not "nvme": NVMe offload is not there yet',
    ),
    (
        {ZERO: {"stage": 3, "cpu_offload": True}},
        'zero_optimization.cpu_offload is the old name: write "offload_optimizer": {"device": "cpu"}',
    ),
    (
        {"fp16": {"enabled": True}},
        "fp16 is switched on: fp16 is not there yet: use bf16, or fp32 (neither) where bfloat16 is missing",
    ),
    ({"bf16": {}}, 'bf16.enabled is missing: write true, false or "auto"'),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        "activation_checkpointing.cpu_checkpointing is true: it is not there yet: leave it out",
    ),
    (
        {"activation_checkpointing": {"number_checkpoints": 4}},
        "activation_checkpointing.number_checkpoints is 4: it is not there yet: leave it out, and every block is a checkpoint",
    ),
    ({"optimizer": {"type": "Lion"}}, 'optimizer has the type "Lion": only AdamW, Adam and SGD are there'),
    ({"optimizer": 3}, "optimizer has the type null: only AdamW, Adam and SGD are there"),
    (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        "optimizer.params.adam_w_mode is false: only decoupled weight decay (AdamW) is there: leave it out",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}},
        'optimizer.params.betas must be two numbers or "auto", not [0.9]',
    ),
    (
        {"scheduler": {"type": "OneCycle"}},
        (
            'scheduler has the type "OneCycle": only WarmupLR, WarmupDecayLR or WarmupCosineLR are there. Leave the section out '
            "and set lr_decay_style, lr_warmup, lr_decay and lr_min"
        ),
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {}}},
        (
            'scheduler.params.warmup_type is missing, and DeepSpeed\'s default is "log": the loop warms up linearly, so write '
            '"linear"'
        ),
    ),
    ({"compression_training": {}}, "compression_training is not there: leave it out"),
    (
        {"pipeline": {"stages": 2}},
        "pipeline parallelism is not there: ZeRO-3 shards the model over all ranks; leave it out",
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
        {"activation_checkpointing": {}},
        "activation_checkpointing is there, but --activation_checkpointing is false (command line). Leave one of them out.",
    ),
]
BESIDE_JSON = (
    "--ds_config zero3.json --lr 1e-2 --optimizer_type adamw --batch_size_training 8 --precision bf16 "
    "--activation_checkpointing false"
)

JSON_TEXTS = {
    "": "zero3.json:1: not JSON: the file is empty",
    "[]": "zero3.json: must hold an object, {...}",
    '{\n // stage\n "a": 1}': "zero3.json:2: not JSON: JSON has no comments; remove this one",
    '{"a": 1,\n}': "zero3.json:2: not JSON: a comma stands before the closing bracket; remove it",
    '{"a": 1 "b": 2}': "zero3.json:1: not JSON: Expecting ',' delimiter (column 9)",
    '{"a": NaN}': "zero3.json: NaN is not a number that can be used",
    '{"bf16": {}, "bf16": {}}': "zero3.json: bf16 stands twice in one object",
}


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


@pytest.mark.parametrize(("tree", "problem"), JSON_TREES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_json_is_one_line_with_its_key(tree: dict[str, Any], problem: str) -> None:
    write_json(Path(), tree if problem.startswith("zero_optimization") else STAGE_3 | tree)
    assert problems_of("--ds_config zero3.json") == (f"zero3.json: {problem}",)


@pytest.mark.parametrize(("tree", "problem"), JSON_CONFLICTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_json_that_contradicts_a_flag_names_both(tree: dict[str, Any], problem: str) -> None:
    write_json(Path(), STAGE_3 | tree)
    assert problems_of(BESIDE_JSON) == (f"zero3.json: {problem}",)


@pytest.mark.parametrize("text", JSON_TEXTS)
def test_text_that_is_no_json_is_one_line(text: str) -> None:
    Path("zero3.json").write_text(text, encoding="utf-8")
    assert problems_of("--ds_config zero3.json") == (JSON_TEXTS[text],)


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
    write_json(Path(), {"zero_optimization": {"stage": 1}})
    assert problems_of("--config run.yaml --ds_config zero3.json --seed x stray --packing tight") == (
        "--seed takes one value, not 2 (x, stray) (command line)",
        "--packing must be documents, concat or off, not 'tight' (command line)",
        "run.yaml:1: lr must be a number, not 'fast'",
        "run.yaml:2: unknown key model_nam: did you mean model_name?",
        "zero3.json: zero_optimization.stage is 1: only ZeRO stage 3 is there yet: write 3",
    )


def test_a_run_file_that_cannot_be_read_is_not_followed_by_what_it_would_have_held() -> None:
    assert problems_of("--config missing.yaml", ()) == ("--config missing.yaml: there is no such file",)


def test_a_misspelt_name_is_not_followed_by_a_complaint_that_it_is_missing() -> None:
    assert problems_of("--model_nam m", ("--train_data", "d", "--save_checkpoint_path", "r")) == (
        "unknown flag --model_nam (command line): did you mean --model_name?",
    )
