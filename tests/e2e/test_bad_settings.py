"""Settings that cannot be right end with status 2 and one message, before torch is imported: in a tenth of a second."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.bad_input import (
    ROOT,
    Case,
    assert_refused,
    launcher_variables,
    run_train,
    trap_for_torch,
)

TIMEOUT_SECONDS = 20.0

FOUR_RANKS = launcher_variables(0, 4, 29500)
STAGE_3 = '"zero_optimization": {"stage": 3}'
JSON = "--ds_config ds.json"
YAML = "--config run.yaml"


def with_json(flags: str, content: str, *says: str) -> Case:
    return Case(f"{JSON} {flags}", says, files={"ds.json": f"{{{STAGE_3}, {content}}}"})


def with_yaml(flags: str, content: str, *says: str, without: tuple[str, ...] = ()) -> Case:
    return Case(f"{YAML} {flags}", says, files={"run.yaml": content}, without=without)


FILES = {
    "missing data file": Case("--train_data trian.jsonl", ("--train_data trian.jsonl", "did you mean train.jsonl?")),
    "missing data file, nothing like it": Case(
        "--train_data qq", ("--train_data qq ", "no such file", "check the path")
    ),
    "missing folder of the data": Case(
        "--train_data data/a.jsonl", ("--train_data data/a.jsonl", "data does not exist", "check the path")
    ),
    "missing data file of a run file": with_yaml(
        "",
        "seed: 1\ntrain_data: [train.jsonl, qq]\n",
        "run.yaml:2: train_data qq: ",
        "check the path",
        without=("--train_data",),
    ),
    "empty data file": Case(
        "--train_data empty.jsonl",
        ("--train_data empty.jsonl", "is empty", "name one with a JSON object a line"),
        files={"empty.jsonl": ""},
    ),
    "a folder without data": Case(
        "--train_data nothing_here",
        ("--train_data nothing_here ", "is a folder without data files"),
        files={"nothing_here/notes.md": ""},
    ),
    "a pattern that matches nothing": Case("--train_data t*.csv", ("--train_data t*.csv ", "no file matches")),
    "a function that is not there": Case(
        "--dataset own.py:read", ("--dataset own.py:read ", "read"), files={"own.py": "def other(record): pass\n"}
    ),
    "a template that is not there": Case(
        "--dataset chat --chat_template chat.jinja", ("--chat_template chat.jinja ", "there is no such file")
    ),
    "unknown model folder": Case("--model_name ./modle", ("--model_name ./modle", "did you mean model?")),
    "unknown model folder, nothing like it": Case("--model_name ./qq", ("--model_name ./qq", "check the path")),
    "a model folder without config.json": Case(
        "--model_name ./ds_configs", ("--model_name ./ds_configs", "no config.json")
    ),
    "unknown model config": Case(
        "--model_config model/confg.json --tokenizer_name ./model",
        ("--model_config model/confg.json", "did you mean model/config.json?"),
        without=("--model_name",),
    ),
    "unknown tokenizer folder": Case("--tokenizer_name ./modle", ("--tokenizer_name ./modle", "did you mean model?")),
    "a folder without a tokenizer": Case(
        "--tokenizer_name ./ds_configs",
        ("--tokenizer_name ./ds_configs", "no tokenizer in this folder", "tokenizer.json"),
    ),
    "context longer than the model's positions": Case(
        "--context_size 128", ("context_size is 128 (command line)", "64 positions", "Set context_size to 64 at most.")
    ),
    "run folder below a file": Case(
        "--save_checkpoint_path train.jsonl/run", ("--save_checkpoint_path train.jsonl/run", "is a file; name a folder")
    ),
    "unknown load path": Case(
        "--load_checkpoint_path rnus", ("--load_checkpoint_path rnus", "no such folder", "check the path")
    ),
}

NAMES_AND_TYPES = {
    "unknown flag": Case("--num_epoch 1", ("unknown flag --num_epoch ", "did you mean --num_epochs?")),
    "unknown flag, nothing like it": Case("--qqq 1", ("unknown flag --qqq ", "see --help for all settings")),
    "unknown key": with_yaml(
        "", "lr: 1e-4\nlr_wamup: 1\n", "run.yaml:2: unknown key lr_wamup", "did you mean lr_warmup?"
    ),
    "wrong type": Case("--batch_size_training many", ("--batch_size_training must be a whole number, not 'many'",)),
    "wrong type in a run file": with_yaml("", "lr: fast\n", "run.yaml:1: lr must be a number, not 'fast'"),
    "wrong type in the JSON": with_json(
        "", '"gradient_clipping": "1"', 'ds.json: gradient_clipping must be a number or "auto", not "1"'
    ),
    "accumulation below 1": Case(
        "--gradient_accumulation_steps 0", ("--gradient_accumulation_steps must be at least 1, not 0",)
    ),
    "accumulation below 1 in the JSON": with_json(
        "", '"gradient_accumulation_steps": 0', "ds.json: gradient_accumulation_steps must be at least 1, not 0"
    ),
    "the ancestor's data set without its path": Case(
        "--dataset alpaca_dataset",
        ("dataset is alpaca_dataset", "no longer kept in the source", "--train_data path/to/alpaca_data.json"),
        without=("--train_data",),
    ),
    "an engine that is not there": Case("--engine fsdp2", ("--engine must be deepspeed or fsdp, not 'fsdp2'",)),
    "what FSDP2 cannot do": with_json(
        "--enable_fsdp",
        '"data_types": {"grad_accum_dtype": "bf16"}',
        'ds.json: data_types.grad_accum_dtype is "bf16": FSDP2 adds gradients up in the master weights\' dtype',
        "or use --engine deepspeed",
    ),
    "a key that DeepSpeed would ignore": with_json(
        "", '"gradient_cliping": 1.0', "ds.json: gradient_cliping is unknown: did you mean gradient_clipping?"
    ),
    "LoRA": Case("--peft_method lora", ("--peft_method lora", "not there yet; leave it out")),
    "LoRA in a run file": with_yaml(
        "", "peft_method: lora\n", "run.yaml:1: peft_method lora", "not there yet; leave it out"
    ),
}

CONFLICTS = {
    "model_name, --model_config": with_yaml(
        "--model_config model/config.json --tokenizer_name ./model",
        "model_name: ./model\n",
        "model_name is ./model (run.yaml:1), but --model_config is model/config.json (command line)",
        "Leave one of them out.",
        without=("--model_name",),
    ),
    "use_fast_kernels, --attn_implementation": with_yaml(
        "--attn_implementation eager",
        "use_fast_kernels: true\n",
        "use_fast_kernels is true (run.yaml:1)",
        "--attn_implementation is eager (command line)",
        "Leave one of them out.",
    ),
    "gradient_accumulation_steps and global_batch_size in a run file": with_yaml(
        "--batch_size_training 1",
        "gradient_accumulation_steps: 3\nglobal_batch_size: 4\n",
        "global_batch_size is 4 (run.yaml:2), but gradient_accumulation_steps is 3 (run.yaml:1)",
        "set gradient_accumulation_steps to 4",
    ),
    "optimizer_type, --adam_beta1": with_yaml(
        "--adam_beta1 0.8",
        "optimizer_type: sgd\n",
        "--adam_beta1 is 0.8 (command line) has no effect: optimizer_type is sgd (run.yaml:1)",
        "Leave one of them out.",
    ),
    "lr, --lr_min": with_yaml(
        "--lr_min 1e-4", "lr: 1e-5\n", "--lr_min is 0.0001 (command line), above lr: lr is 1e-05 (run.yaml:1)"
    ),
    "save_optimizer, --save_model": with_yaml(
        "--save_model false",
        "save_optimizer: true\n",
        "--save_model is false (command line), but save_optimizer is true (run.yaml:1)",
        "Set save_optimizer to false too.",
    ),
    "two flags": Case(
        "--pure_bf16 --precision fp32", ("--pure_bf16 makes precision bf16", "--precision makes it fp32", "Leave one")
    ),
    "JSON, --batch_size_training": with_json(
        "--batch_size_training 8",
        '"train_micro_batch_size_per_gpu": 4',
        "ds.json: train_micro_batch_size_per_gpu is 4, but --batch_size_training is 8 (command line)",
        'Set one of them, or write "auto" in the JSON.',
    ),
    "JSON, --precision": with_json(
        "",
        '"bf16": {"enabled": true}',
        "ds.json: bf16.enabled is true, but --precision is fp32 (command line)",
        '"auto"',
    ),
    "JSON, --lr": with_json(
        "--lr 1e-2",
        '"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}',
        "ds.json: optimizer.params.lr is 0.1, but --lr is 0.01 (command line)",
        '"auto"',
    ),
    "JSON, run file": Case(
        f"{JSON} {YAML}",
        ("ds.json: gradient_clipping is 2.0, but max_grad_norm is 0.5 (run.yaml:1)", '"auto"'),
        files={"ds.json": f'{{{STAGE_3}, "gradient_clipping": 2.0}}', "run.yaml": "max_grad_norm: 0.5\n"},
    ),
}

BATCHES_AND_RANKS = {
    "batch sizes that do not divide": Case(
        "--batch_size_training 4 --global_batch_size 6",
        ("--global_batch_size is 6 (command line)", "no whole number", "Set global_batch_size to 4 or 8", "to 3 or 6."),
    ),
    "batch sizes that do not divide by the ranks": Case(
        "--batch_size_training 1 --global_batch_size 6",
        ("--global_batch_size is 6 (command line)", "1 x 4 ranks", "Set global_batch_size to 4 or 8."),
        env=FOUR_RANKS,
    ),
    "accumulation would be below 1": Case(
        "--batch_size_training 8 --global_batch_size 4",
        ("--global_batch_size is 4 (command line)", "accumulation would be below 1", "batch_size_training to 4."),
    ),
    "batch sizes of the JSON that do not divide": with_json(
        "",
        '"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4',
        "global_batch_size is 10 (ds.json)",
        "no whole number",
        "Set global_batch_size to 8 or 12",
    ),
    "warm-up longer than the run": Case(
        "--lr_warmup 10", ("--lr_warmup is 10", "the run has 1", "Set fewer steps, or a fraction")
    ),
    "a world of one instead of two": Case(
        "--expected_world_size 2", ("--expected_world_size is 2, but the world has 1", "Check the hostfile")
    ),
    "a world of four instead of eight": Case(
        "--expected_world_size 8",
        ("--expected_world_size is 8, but the world has 4", "Check the hostfile"),
        env=FOUR_RANKS,
    ),
    "half of a launcher's variables": Case("", ("RANK=0", "WORLD_SIZE"), env={"RANK": "0"}),
    "no MPI": Case("--use_mpi", ("--use_mpi asks for ranks from MPI", "Start with mpirun or mpiexec, or leave")),
}

CASES = FILES | NAMES_AND_TYPES | CONFLICTS | BATCHES_AND_RANKS


@pytest.fixture(scope="module")
def material(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings") / "material"
    shutil.copytree(inputs, folder)
    return folder


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return trap_for_torch(tmp_path_factory.mktemp("trap"))


def test_no_case_hides_another() -> None:
    assert len(CASES) == sum(map(len, (FILES, NAMES_AND_TYPES, CONFLICTS, BATCHES_AND_RANKS)))


@pytest.mark.parametrize("name", CASES)
def test_refused_before_torch_is_imported(name: str, material: Path, without_torch: dict[str, str]) -> None:
    case = CASES[name]
    case.write_files(material)
    ended = run_train(material, case.arguments(), without_torch | case.env, TIMEOUT_SECONDS)
    print(f"{ended.seconds:.2f} s\n{ended.output}")
    assert_refused(ended, case.says)
    assert not (material / "runs").exists()


def test_right_settings_get_as_far_as_torch(material: Path, without_torch: dict[str, str]) -> None:
    """So each case is refused for its own mistake, and the trap works."""
    ended = run_train(material, Case("", ()).arguments(), without_torch, TIMEOUT_SECONDS)
    assert ended.statuses == [1]
    assert "was imported" in ended.output


def test_all_mistakes_are_shown_at_once(material: Path, without_torch: dict[str, str]) -> None:
    case = Case("--config gone.yaml --ds_config gone.json --lr fast --num_epoch 1 --engine fsdp2", ())
    ended = run_train(material, case.arguments(), without_torch, TIMEOUT_SECONDS)
    assert_refused(ended, ("gone.yaml", "gone.json", "--lr must be a number", "--num_epoch ", "--engine must be"))


@pytest.mark.parametrize("flags", ["--help", "-h", "--config gone.yaml --help", "--print_config"])
def test_help_and_the_settings_are_printed_without_torch(
    flags: str, material: Path, without_torch: dict[str, str]
) -> None:
    ended = run_train(material, Case(flags, ()).arguments(), without_torch, TIMEOUT_SECONDS)
    print(f"{ended.seconds:.2f} s")
    assert ended.statuses == [0]
    assert "train_data" in ended.output
    assert not (material / "runs").exists()


def test_of_two_ranks_only_the_first_speaks(material: Path, without_torch: dict[str, str]) -> None:
    """Before the ranks have met: the launcher ends the second rank as soon as the first has failed."""
    command = [sys.executable, str(ROOT / "train.py"), *Case("--lr fast", ()).arguments()]
    ranks = [
        subprocess.Popen(
            command,
            cwd=material,
            env=without_torch | launcher_variables(rank, 2, 29500),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        first, _ = ranks[0].communicate(timeout=TIMEOUT_SECONDS)
        assert ranks[1].poll() is None
    finally:
        ranks[1].terminate()
        second, _ = ranks[1].communicate(timeout=TIMEOUT_SECONDS)
    assert (ranks[0].returncode, first, second) == (2, "--lr must be a number, not 'fast' (command line)\n", "")
