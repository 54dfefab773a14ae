"""What `--resume` may say: three words, or a path that is looked at before anything heavy is loaded."""

from pathlib import Path

import pytest

from ds_recipes.config.check import check_inputs
from ds_recipes.config.load import load_config
from ds_recipes.errors import ConfigError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with another run, one of its checkpoints renamed, a folder without any, and a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("other/iter_0000100", "kept", "empty", "auto/iter_0000001"):
        Path(name).mkdir(parents=True)
    for name in ("other/iter_0000100", "kept"):
        Path(name, "manifest.json").write_text("{}")
    Path("a_file").write_text("")
    Path("data.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def problems(resume: str, *more: str) -> list[str]:
    needed = ("--model_name", "owner/name", "--train_data", "data.jsonl", "--save_checkpoint_path", "run")
    return check_inputs(load_config([*needed, "--resume", resume, *more]))


@pytest.mark.parametrize("text", ["auto", "require", "none", "other", "other/iter_0000100", "kept", "./auto", "run"])
def test_words_and_places_that_can_be_begun_from(here: Path, text: str) -> None:
    assert problems(text) == []


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "othre",
            "--resume othre (command line): is not one of auto, require, none, and there is no such folder; did you",
        ),
        ("Auto", "is not one of auto, require, none, and there is no such folder"),
        ("a_file", "is a file; name a checkpoint's folder, or a run folder"),
        ("empty", "holds no checkpoint (no manifest.json, no iter_* folder)"),
    ],
)
def test_a_place_that_cannot_be_begun_from_is_one_line(here: Path, text: str, says: str) -> None:
    (line,) = problems(text)
    assert says in line


def test_a_run_with_checkpoints_of_its_own_may_have_lost_the_place_that_it_began_from(here: Path) -> None:
    Path("run/iter_0000200").mkdir(parents=True)
    assert problems("gone/iter_0000100") == []


def test_two_places_to_begin_from_are_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"--resume is kept .* but --load_checkpoint_path is other"):
        problems("kept", "--load_checkpoint_path", "other")
    assert problems("kept", "--load_checkpoint_path", "run") == []
    assert problems("auto", "--load_checkpoint_path", "other") == []
