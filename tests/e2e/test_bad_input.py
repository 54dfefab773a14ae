"""Whatever is wrong with the input, `train.py` ends with status 2 and one message: where, what, and what to do."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.bad_input import (
    Case,
    assert_refused,
    checkpoints_in,
    damage,
    run_on_ranks,
    run_train,
    trap_for_torch,
    write_material,
)

BATCH_4 = '{"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 4}'
BATCH_8 = '{"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 8}'

SETTINGS = {
    "missing data file": Case("--train_data trian.jsonl", ("--train_data trian.jsonl", "did you mean train.jsonl?")),
    "missing data folder": Case("--train_data data/a.jsonl", ("--train_data data/a.jsonl", "data does not exist")),
    "empty data file": Case(
        "--train_data empty.jsonl",
        ("--train_data empty.jsonl", "is empty", "name one with a JSON object a line"),
        files={"empty.jsonl": ""},
    ),
    "unknown flag": Case("--num_epoch 1", ("--num_epoch ", "did you mean --num_epochs?")),
    "unknown key": Case(
        "--config run.yaml",
        ("run.yaml:2: unknown key learning_rte", "--help"),
        files={"run.yaml": "lr: 1e-4\nlearning_rte: 1\n"},
    ),
    "wrong type": Case("--batch_size_training many", ("--batch_size_training must be a whole number, not 'many'",)),
    "wrong type in the run file": Case(
        "--config run.yaml", ("run.yaml:1: lr must be a number, not 'fast'",), files={"run.yaml": "lr: fast\n"}
    ),
}


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_material(folder)
    return folder


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return trap_for_torch(tmp_path_factory.mktemp("trap"))


def write_files(case: Case, folder: Path) -> None:
    for name, text in case.files.items():
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings_are_refused_before_torch_is_imported(
    name: str, material: Path, without_torch: dict[str, str]
) -> None:
    case = SETTINGS[name]
    write_files(case, material)
    assert_refused(run_train(material, case.arguments(), without_torch | case.env), case.says)


def test_right_settings_get_as_far_as_torch(material: Path, without_torch: dict[str, str]) -> None:
    """So each case above is refused for its own mistake, and the trap works."""
    ended = run_train(material, Case("", ()).arguments(), without_torch)
    assert ended.statuses == [1]
    assert "RuntimeError: numpy was imported" in ended.output


DATA = {
    "not JSON": Case(
        "--train_data bad.jsonl",
        ("bad.jsonl:2: not JSON", "Fix or remove the line."),
        ranks=2,
        files={"bad.jsonl": '{"text": "a"}\n{"t\n{"text": "b"}\n'},
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_wrong_inputs_are_refused(name: str, material: Path) -> None:
    case = DATA[name]
    write_files(case, material)
    assert_refused(run_on_ranks(material, case.arguments(), case.ranks), case.says)


@pytest.fixture(scope="session")
def trained(material: Path) -> Path:
    """The material with two runs: `runs/done` of one step, and `runs/damaged`, its copy with damaged checkpoints."""
    ended = run_on_ranks(material, Case("--save_checkpoint_path runs/done", ()).arguments())
    assert ended.statuses == [0], ended.output
    shutil.copytree(material / "runs/done", material / "runs/damaged")
    damage(material / "runs/damaged")
    return material


CHECKPOINTS = {
    "resume none": Case(
        "--save_checkpoint_path runs/done --resume none",
        ("runs/done: holds checkpoints", "--resume none", "Choose a new --save_checkpoint_path"),
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_cannot_be_continued_are_refused(name: str, trained: Path) -> None:
    case = CHECKPOINTS[name]
    before = checkpoints_in(trained)
    assert_refused(run_on_ranks(trained, case.arguments(), case.ranks), case.says)
    assert checkpoints_in(trained) == before
