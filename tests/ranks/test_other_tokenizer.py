"""A run that is continued with another tokenizer is refused with both fingerprints; the same one elsewhere is not another."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.nano import make_nano
from tests.ranks.training import Ended, train


def add_a_token(content: dict[str, Any]) -> None:
    entry = {
        "content": "<more>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    content["added_tokens"].append(entry | {"id": len(content["model"]["vocab"])})


def lower_everything(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def swap_two_words(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def forget_a_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop()


CHANGES = {change.__name__: change for change in (add_a_token, lower_everything, swap_two_words, forget_a_merge)}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run file, and the folder of a run of one step."""
    nano = make_nano(tmp_path_factory.mktemp("nano"))
    run = tmp_path_factory.mktemp("run") / "run"
    ended = go_on(nano, run, nano.parent / "model", 1)
    assert ended.statuses == (0,), ended.text
    return nano, run


def go_on(nano: Path, run: Path, tokenizer: Path, steps: int) -> Ended:
    flags = ("--config", str(nano), "--save_checkpoint_path", str(run), "--tokenizer_name", str(tokenizer))
    more = ("--max_steps", str(steps), "--lr_decay_style", "constant", "--lr_warmup", "0", "--run_validation", "false")
    return train(1, *flags, *more, outputs=run.with_name(f"{run.name}-outputs"))


def changed(folder: Path, into: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, into)
    path = into / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return into


@pytest.mark.parametrize("name", CHANGES)
def test_another_tokenizer_is_refused_with_both_fingerprints(
    begun: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    nano, first = begun
    run = tmp_path / "run"
    shutil.copytree(first, run)
    other = changed(nano.parent / "model", tmp_path / "tokenizer", CHANGES[name])
    ended = go_on(nano, run, other, 2)
    assert ended.statuses == (2,), ended.text
    found = re.search(r"tokenizer: the checkpoint has ([0-9a-f]{32}), this run has ([0-9a-f]{32})", ended.text)
    assert found is not None and found[1] != found[2], ended.text
    assert not (run / "iter_0000002").exists()


def test_the_same_one_in_another_folder_goes_on(begun: tuple[Path, Path], tmp_path: Path) -> None:
    nano, first = begun
    run = tmp_path / "run"
    shutil.copytree(first, run)
    ended = go_on(nano, run, changed(nano.parent / "model", tmp_path / "tokenizer", lambda content: None), 2)
    assert ended.statuses == (0,) and (run / "iter_0000002").is_dir(), ended.text
