"""A derived folder is there whole or not at all, whoever else makes it, and what a kill leaves goes away."""

import os
import time
from pathlib import Path

import pytest

from ds_recipes.data.published import ABANDONED_SECONDS, cache_beside, publishing, replacing
from ds_recipes.errors import InputError


def test_it_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    with publishing(tmp_path / "made") as part:
        (part / "a").write_text("1")
        (part / "deep").mkdir()
        (part / "deep" / "b").write_text("2")
        assert not (tmp_path / "made").exists()
    assert sorted(path.name for path in (tmp_path / "made").rglob("*")) == ["a", "b", "deep"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), publishing(tmp_path / "made") as part:
        (part / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_jobs_wins(tmp_path: Path) -> None:
    with publishing(tmp_path / "made") as part:
        with publishing(tmp_path / "made") as other:
            (other / "a").write_text("theirs")
        (part / "a").write_text("mine")
    assert (tmp_path / "made" / "a").read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_job_left_goes_after_a_day_and_what_another_job_writes_stays(tmp_path: Path) -> None:
    old, young, foreign = (tmp_path / name for name in (".made.1.part", ".made.2.part", ".other.1.part"))
    for folder in (old, young, foreign):
        folder.mkdir()
    long_ago = time.time() - ABANDONED_SECONDS - 60
    for folder in (old, foreign):
        os.utime(folder, (long_ago, long_ago))
    with publishing(tmp_path / "made"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.2.part", ".other.1.part", "made"]


def test_the_cache_is_beside_the_data_or_where_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "a.jsonl"
    assert cache_beside(file, None) == tmp_path / "data" / ".index_cache"
    assert cache_beside(file, tmp_path / "asked") == tmp_path / "asked"
    assert cache_beside(tmp_path / "data", None) == tmp_path / "data" / ".index_cache"
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / ".index_cache").touch()  # a file where the folder is due: no permission is needed to fail, also for root
    assert cache_beside(blocked / "a.jsonl", None, tmp_path / "run") == tmp_path / "run"
    with pytest.raises(InputError, match=r"cannot be written .* Name a folder that can be, with --data_cache\."):
        cache_beside(blocked / "a.jsonl", None)


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    target = tmp_path / "store.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert target.read_text() == "old"
    with replacing(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_text() == "old"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]
