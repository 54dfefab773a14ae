"""The trainer names no engine: whatever it asks of one stands in the interface."""

import re
from pathlib import Path

from tests.house.tree import ROOT, python_files

ENGINE_WORDS = re.compile(r"deepspeed|fsdp|fully_shard|\bZeRO-\d|zero_[a-z]|zero[123]|hsdp|hpz", re.IGNORECASE)

ALLOWED = {
    ("run_record.py", "deepspeed"): "its version is recorded, as that of any package which decides about the result",
    ("schedule.py", "deepspeed"): "the source of a formula",
}
"""(file, word): why it may stand there."""

COMPARISON = "ds_recipes/training/compare/"
"""Runs one engine beside the other, and names each by the run's own setting."""


FORMATS = ("ds_recipes/checkpoint/native/", "ds_recipes/checkpoint/export/")
"""They read and write the files of other programs, and say whose they are."""


def engine_words(folder: str) -> list[tuple[Path, str]]:
    return [
        (file, word.lower())
        for file in python_files(folder)
        for word in ENGINE_WORDS.findall((ROOT / file).read_text(encoding="utf-8"))
    ]


def test_the_trainer_names_no_engine() -> None:
    found = {
        (str(file), word)
        for file, word in engine_words("ds_recipes/training")
        if (file.name, word) not in ALLOWED and not str(file).startswith(COMPARISON)
    }
    assert not found


def test_the_checkpoints_and_the_entry_name_none() -> None:
    words = ENGINE_WORDS.findall((ROOT / "train.py").read_text(encoding="utf-8").split('"""', 2)[2])
    assert not words
    assert not [one for one in engine_words("ds_recipes/checkpoint") if not str(one[0]).startswith(FORMATS)]


def test_what_is_allowed_is_there_and_the_test_can_see() -> None:
    seen = {(file.name, word) for file, word in engine_words("ds_recipes/training")}
    assert {key for key in ALLOWED if key in seen} == set(ALLOWED)
    assert engine_words("ds_recipes/engine")
