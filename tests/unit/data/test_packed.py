"""A packing on disk is the one that was made, made once, and made again when it is not whole."""

import json
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from ds_recipes.data import packed as packed_module
from ds_recipes.data.packed import Packed, open_packing
from ds_recipes.data.packing import pack
from ds_recipes.errors import InputError

KEY = {"packing": "documents", "context_size": 32, "side": {"fraction": None}}


class Maker:
    """Counts how often it is asked for a packing; its rows depend on `lengths`."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int64)
        self.calls = 0

    def __call__(self) -> Packed:
        self.calls += 1
        return pack("documents", self.lengths, 32, "drop"), {"tokens": int(self.lengths.sum()), "truncated": 2**40}


def content(packed: Packed) -> tuple[object, ...]:
    packing, facts = packed
    arrays = (packing.row_offsets, packing.document, packing.start, packing.length)
    return (*(array.tolist() for array in arrays), packing.num_dropped, facts)


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("lengths", [[3, 30, 50, 7, 9], [], [50], [1] * 5000])
def test_what_was_made_comes_back_and_is_made_once(tmp_path: Path, lengths: list[int]) -> None:
    maker = Maker(lengths)
    first, second = open_packing(tmp_path, KEY, maker), open_packing(tmp_path, KEY, maker)
    assert content(first) == content(second) == content(Maker(lengths)())
    assert maker.calls == 1
    assert all(array.dtype == np.int64 for array in (second[0].row_offsets, second[0].document, second[0].length))
    with pytest.raises(ValueError, match="read-only"):
        second[0].row_offsets[:1] = 7


def test_another_key_or_version_is_another_packing(tmp_path: Path, monkeypatch) -> None:
    one, other = Maker([5, 6]), Maker([7])
    open_packing(tmp_path, KEY, one)
    assert content(open_packing(tmp_path, KEY | {"context_size": 33}, other)) == content(other())
    assert other.calls == 2
    monkeypatch.setattr(packed_module, "PACKING_VERSION", 99)
    open_packing(tmp_path, KEY, one)
    assert one.calls == 2
    assert len(folders(tmp_path)) == 3
    assert all(name.startswith("packing-") for name in folders(tmp_path))
    reordered = dict(reversed(KEY.items()))
    open_packing(tmp_path, reordered, one)
    assert one.calls == 2


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_facts(path: Path) -> None:
    meta = json.loads(path.read_text())
    meta["content"]["facts"]["tokens"] += 1
    path.write_text(json.dumps(meta))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["packing.json", "row_offsets.npy", "document.npy", "start.npy", "length.npy"])
@pytest.mark.parametrize("damage", [Path.unlink, shorten, flip_last_byte, replace_by_folder])
def test_a_damaged_packing_is_made_again(tmp_path: Path, name: str, damage) -> None:
    maker = Maker([3, 30, 50, 7, 9])
    good = content(open_packing(tmp_path, KEY, maker))
    (only,) = tmp_path.iterdir()
    damage(only / name)
    assert content(open_packing(tmp_path, KEY, maker)) == good
    assert content(open_packing(tmp_path, KEY, maker)) == good
    assert maker.calls == 2
    assert folders(tmp_path) == [only.name]


@pytest.mark.parametrize("text", ["", "[]", "null", '{"content": 3, "digest": ""}', "[" * 100_000, "\x00"])
def test_a_description_that_makes_no_sense_is_written_again(tmp_path: Path, text: str) -> None:
    maker = Maker([3, 30])
    open_packing(tmp_path, KEY, maker)
    (only,) = tmp_path.iterdir()
    (only / "packing.json").write_text(text)
    assert content(open_packing(tmp_path, KEY, maker)) == content(maker())
    change_facts(only / "packing.json")
    assert open_packing(tmp_path, KEY, maker)[1]["tokens"] == 33


def test_many_jobs_at_once_get_the_same_and_leave_nothing_behind(tmp_path: Path) -> None:
    makers = [Maker(list(range(1, 40))) for _ in range(8)]
    results: list[tuple[object, ...]] = []
    barrier = threading.Barrier(len(makers))

    def job(maker: Maker) -> None:
        barrier.wait(10)
        results.append(content(open_packing(tmp_path, KEY, maker)))

    threads = [threading.Thread(target=job, args=(maker,)) for maker in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [content(makers[0]())] * len(makers)
    assert len(folders(tmp_path)) == 1


def test_a_packing_in_use_outlives_its_folder(tmp_path: Path) -> None:
    maker = Maker(list(range(1, 33)) * 50)
    used = open_packing(tmp_path, KEY, maker)
    used = open_packing(tmp_path, KEY, maker)
    shutil.rmtree(tmp_path / folders(tmp_path)[0])
    assert content(used) == content(maker())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"file: the packed rows cannot be written there \(Not a directory\).*--data_cache"
    ):
        open_packing(tmp_path / "file", KEY, Maker([5]))


def test_a_disk_that_is_full_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    maker = Maker([1] * 100_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written there \(File too large\)"):
            open_packing(tmp_path, KEY, maker)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folders(tmp_path) == []
    assert content(open_packing(tmp_path, KEY, maker)) == content(maker())


def test_an_error_of_the_maker_passes_and_nothing_is_left(tmp_path: Path) -> None:
    def fails() -> Packed:
        raise InputError("data.jsonl:3: too long")

    with pytest.raises(InputError, match="too long"):
        open_packing(tmp_path, KEY, fails)
    assert folders(tmp_path) == []
