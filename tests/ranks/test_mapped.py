"""Somebody cuts a file of the cache while a run reads it: an error that names it on all ranks, and nothing is lost."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.nano import make_nano
from tests.ranks.training import Ended, metrics, train, until_step

STEPS = 40
FLAGS = ("--engine", "fsdp", "--max_steps", str(STEPS), "--save_interval_iteration", "5", "--eval_interval", "1000")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def whole(nano: Path) -> Path:
    assert launch(nano, nano.parent / "whole").statuses == (0, 0)
    return nano.parent / "whole"


def launch(nano: Path, folder: Path, **how: Any) -> Ended:
    argv = ("--config", str(nano), "--save_checkpoint_path", str(folder), *FLAGS)
    return train(2, *argv, outputs=folder.with_name(f"{folder.name}-outputs"), **how)


def in_the_cache(nano: Path, name: str) -> Path:
    """The largest of the files of this name that belong to the training data."""
    (cache,) = nano.parent.glob(".index_cache")
    return max(cache.glob(f"**/{name}"), key=lambda path: path.stat().st_size)


def losses(folder: Path) -> list[tuple[float, str]]:
    return [(line["loss"], line["data_hash"]) for _, line in sorted(metrics(folder).items())]


@pytest.mark.parametrize(
    "name", ["ids.npy", pytest.param("documents/offsets.npy", marks=pytest.mark.slow), "packing-*/start.npy"]
)
def test_a_cut_file_ends_all_ranks_with_its_name_and_is_made_again(
    nano: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    folder, path = tmp_path / "run", in_the_cache(nano, name)

    def cut(processes: list[Any]) -> None:
        until_step(folder, 7)
        os.truncate(path, 100)

    ended = launch(nano, folder, meanwhile=cut)
    assert set(ended.statuses) == {1}, ended.text
    assert ended.text.count(f"{path}: has become shorter while the run was using it") == 1, ended.text
    assert "Traceback" not in ended.text
    assert (folder / "iter_0000005").is_dir() and not (folder / f"iter_{STEPS:07d}").exists()
    ended = launch(nano, folder)
    assert ended.statuses == (0, 0) and "continuing from" in ended.text, ended.text
    assert losses(folder) == losses(whole)


def test_files_that_are_replaced_or_removed_change_nothing_of_a_run(nano: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def disturb(processes: list[Any]) -> None:
        until_step(folder, 3)
        ids = in_the_cache(nano, "ids.npy")
        ids.with_name("other").write_bytes(b"other bytes" * 100)
        ids.with_name("other").replace(ids)
        in_the_cache(nano, "packing-*/start.npy").unlink()

    assert launch(nano, folder, meanwhile=disturb).statuses == (0, 0)
    assert losses(folder) == losses(whole)
