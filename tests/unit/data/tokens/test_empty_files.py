"""A file without a record is left out where a folder or a pattern stands for it, and told; one that is named is refused."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from ds_recipes.errors import InputError, NoRecordsError
from tests.unit.data.made import write_jsonl
from tests.unit.data.tokens.stores import documents_on, make_recipe, open_alone, open_on


def empty_table(path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)


def empty_pair(path: Path) -> None:
    path.touch()
    path.with_suffix(".idx").write_bytes(struct.pack("<9sQBQQq", b"MMIDIDX\x00\x00", 1, 8, 0, 1, 0))


def empty_saved(path: Path) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": []}).save_to_disk(path)


EMPTY: dict[str, Callable[[Path], Any]] = {
    "b.jsonl": lambda path: path.touch(),
    "blank.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf \r\n\n"),
    "b.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"")),
    "torn.jsonl.gz": lambda path: path.touch(),
    "list.json": lambda path: path.write_text(" [ ] "),
    "b.csv": lambda path: path.write_text("text,more\n"),
    "none.csv": lambda path: path.touch(),
    "b.parquet": empty_table,
    "none.parquet": lambda path: path.touch(),
    "b.bin": empty_pair,
    "saved": empty_saved,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name in ("a", "c"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", [{"text": f"a dog {name}"}])
    return tmp_path / "data"


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_part_is_left_out_and_told(folder: Path, name: str) -> None:
    whole = open_alone(folder, make_recipe())
    EMPTY[name](folder / name)
    for path in (folder, folder / "*"):
        if name == "b.bin" and path != folder:
            (folder / "b.idx").rename(folder.parent / "b.idx")  # no data file by its name, but a pattern finds it
        documents = open_alone(path, make_recipe())
        assert [documents.where(i) for i in range(len(documents))] == [f"{folder}/a.jsonl:1", f"{folder}/c.jsonl:1"]
        assert documents.notes == (f"1 of 3 files hold no record and were left out: {folder / name}",)
        assert documents.fingerprint == whole.fingerprint, "a resumed run may meet it"


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file_that_is_named_is_refused(folder: Path, name: str) -> None:
    EMPTY[name](folder / name)
    names = [name, "b.idx", "b"] if name == "b.bin" else [name]
    for one in names:
        (error,) = open_on(1, folder / one, make_recipe())
        assert isinstance(error, NoRecordsError)
        assert str(folder) in str(error)


def test_all_ranks_leave_out_the_same(folder: Path) -> None:
    for name in ("b.jsonl", "list.json", "none.parquet"):
        EMPTY[name](folder / name)
    for documents in documents_on(3, folder, make_recipe()):
        (note,) = documents.notes
        assert note.startswith("3 of 5 files hold no record and were left out: ")
        assert len(documents) == 2


def test_a_folder_of_empty_files_is_refused_on_all_ranks(tmp_path: Path) -> None:
    for name in ("b.jsonl", "list.json"):
        EMPTY[name](tmp_path / name)
    errors = open_on(2, tmp_path, make_recipe())
    assert {str(error) for error in errors} == {
        f"{tmp_path}: none of its 2 files holds a record; the first is {tmp_path}/b.jsonl. Name other files."
    }
    assert all(isinstance(error, InputError) for error in errors)


def test_a_damaged_part_is_still_refused(folder: Path) -> None:
    (folder / "b.parquet").write_bytes(b"PAR1")
    (error,) = open_on(1, folder, make_recipe())
    assert isinstance(error, InputError) and "is not a whole Parquet file" in str(error)
