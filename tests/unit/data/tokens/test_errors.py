"""What is wrong with the data is said by all ranks in the same words, whichever of them met it, and soon."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.errors import DsRecipesError, InputError
from tests.unit.data.made import make_tokenizer, write_jsonl
from tests.unit.data.tokens.stores import documents_on, make_recipe, open_on

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.mark.parametrize("size, workers", [(1, 0), (2, 0), (4, 0), (1, 2), (2, 1)])
def test_all_ranks_report_the_first_wrong_record(tmp_path: Path, size: int, workers: int) -> None:
    records: list[Any] = [{"text": f"a dog {i} and more"} for i in range(200)]
    records[117], records[118], records[190] = {"txt": "a"}, [1], {"text": ""}
    path = write_jsonl(tmp_path / "a.jsonl", records)
    errors = open_on(size, path, make_recipe(workers=workers))
    assert [type(error) for error in errors] == [InputError] * size
    assert {str(error) for error in errors} == {
        f"{path}:118: the record has no field 'text' (it has 'txt'). Add it, or set --dataset to the "
        "format that the file has."
    }


@pytest.mark.parametrize("wrong", [{"text": ""}, 7, {"text": 5}])
def test_the_first_one_of_a_batch_counts_whoever_finds_it(tmp_path: Path, wrong: Any) -> None:
    """A record without tokens is found when its batch is encoded, after a later line that is no record was read."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, wrong, {"text": "b"}, 8, {"text": ""}])
    (error,) = open_on(1, path, make_recipe())
    assert str(error).startswith(f"{path}:2: ")


def test_what_the_encoder_finds_comes_before_a_later_line_that_is_no_record(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "the dog"}, 8, {"text": ""}])
    largest = max(make_tokenizer()("the dog").input_ids)
    (error,) = open_on(1, path, make_recipe(vocabulary_size=largest))
    assert str(error).startswith(f"{path}:2: ")
    (error,) = open_on(1, path, make_recipe(vocabulary_size=3, skip_bad=True))
    assert f"the first: {path}:1: " in str(error)


@pytest.mark.parametrize("size, workers", [(2, 0), (1, 2)])
def test_the_first_wrong_record_counts_though_a_later_one_is_found_sooner(
    tmp_path: Path, size: int, workers: int
) -> None:
    function = tmp_path / "own.py"
    function.write_text(
        "import time\n\ndef read(record):\n    time.sleep(record['seconds'])\n    return record['text']\n"
    )
    records: list[Any] = [{"text": "a dog", "seconds": 0, "more": "x" * 90} for _ in range(40)]
    records[2] |= {"seconds": 1.5, "text": 7}
    records[7] |= {"text": 8}
    path = write_jsonl(tmp_path / "a.jsonl", records)
    for error in open_on(size, path, make_recipe(format=FormatSettings(f"{function}:read"), workers=workers)):
        assert isinstance(error, InputError)
        assert str(error).startswith(f"{path}:3: ")


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "the dog"}])
    largest = max(make_tokenizer()("the dog").input_ids)
    (error,) = open_on(1, path, make_recipe(vocabulary_size=largest))
    assert isinstance(error, InputError)
    assert str(error).startswith(f"{path}:2: the tokenizer makes token ")
    assert f"(id {largest})" in str(error)


def test_nothing_is_kept_that_a_wrong_record_would_be_missed_by(tmp_path: Path) -> None:
    """After an error, fixing the record is enough: finished parts are of another key, since the file is another one."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"txt": "b"}])
    for _ in range(2):
        (error,) = open_on(1, path, make_recipe())
        assert str(error).startswith(f"{path}:2: ")
    write_jsonl(path, [{"text": "a"}, {"text": "b"}])
    (documents,) = documents_on(1, path, make_recipe())
    assert len(documents) == 2


def test_ranks_that_read_different_files_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_recipes.data.tokens import opening

    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in "ab"]
    cache = tmp_path / "cache"
    cache.mkdir()
    names = iter([paths[0], paths[0], paths[1]])
    monkeypatch.setattr(opening, "find_files", lambda text: [next(names)])
    errors = open_on(3, "data.jsonl", make_recipe(cache=cache))
    assert len({str(error) for error in errors}) == 1
    assert "not the same content on all hosts: rank" in str(errors[0])
    assert "read other bytes than rank 0" in str(errors[0])


def test_ranks_with_different_tokenizers_are_told_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    errors = open_on(3, path, lambda rank: make_recipe(tokenizer=make_tokenizer(adds_bos=rank != 2)))
    assert {str(error) for error in errors} == {
        f"{path}: not the same tokens on all hosts: rank 2 came with another tokenizer, format or text index than rank 0. "
        "Copy their files again, or put them on a shared disk."
    }


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/a.jsonl", "none*.jsonl", "."])
def test_files_that_are_not_there(tmp_path: Path, name: str) -> None:
    errors = open_on(2, tmp_path / name, make_recipe())
    assert [type(error) for error in errors] == [InputError] * 2
    assert {str(error).startswith(f"{tmp_path / name}: ") for error in errors} == {True}
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_cannot_be_made(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    errors = open_on(2, path, make_recipe(format=FormatSettings(f"{tmp_path}/own.py:missing")))
    assert [type(error) for error in errors] == [InputError] * 2


def test_compressed_files_cannot_be_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    for error in open_on(2, path, make_recipe(streaming=True)):
        assert isinstance(error, InputError)
        assert str(error).startswith(f"{path}: is compressed as a whole")


@pytest.mark.parametrize(
    "workers, fault, message",
    [(0, "raise MemoryError", ""), (2, "os.abort()", "a tokenising worker was killed (signal 6: Aborted)")],
)
def test_a_fault_on_one_rank_ends_all(tmp_path: Path, workers: int, fault: str, message: str) -> None:
    function = tmp_path / "own.py"
    function.write_text(f"import os\n\ndef read(record):\n    {fault}\n")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a dog {i}"} for i in range(100)])
    errors = open_on(2, path, make_recipe(format=FormatSettings(f"{function}:read"), workers=workers))
    assert all(isinstance(error, Exception) and message in str(error) for error in errors), errors


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    from ds_recipes.data.tokens.make import PartWriter

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PartWriter, "add", full)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    for error in open_on(2, path, make_recipe()):
        assert type(error) is DsRecipesError
        assert "tokens cannot be written (No space left on device)" in str(error)
