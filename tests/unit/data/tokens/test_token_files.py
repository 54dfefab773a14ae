"""Megatron's token files: nothing is copied, and documents, targets and errors are those of records of the same ids."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.errors import InputError
from tests.unit.data.made import write_jsonl
from tests.unit.data.tokens.stores import documents_on, make_recipe, open_alone, open_on

pytestmark = pytest.mark.usefixtures("small_parts")


def write_megatron(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    """Write a pair of files with one sequence a document, ids as uint16."""
    lengths = np.array([len(document) for document in documents], "<i4")
    pointers = 2 * np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype("<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(documents), len(documents) + 1)
    index = np.arange(len(documents) + 1, dtype="<i8")
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + index.tobytes())
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(document, "<u2").tobytes() for document in documents))
    return prefix.with_suffix(".bin")


def some_documents(number: int = 60) -> list[list[int]]:
    generator = np.random.default_rng(number)
    return [generator.integers(0, 300, generator.integers(2, 40)).tolist() for _ in range(number)]


@pytest.mark.parametrize("size, workers", [(1, 0), (3, 0), (2, 1)])
@pytest.mark.parametrize("name", ["a.bin", "a.idx", "a", "a.*", "."])
def test_documents_are_those_of_records_of_ids(tmp_path: Path, size: int, workers: int, name: str) -> None:
    expected = some_documents()
    (tmp_path / "data").mkdir()
    path = write_megatron(tmp_path / "data" / "a", expected)
    records = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": document} for document in expected])
    of_records = open_alone(records, make_recipe(format=FormatSettings("tokens")))
    for documents in documents_on(size, tmp_path / "data" / name, make_recipe(workers=workers)):
        assert not list(documents.folder.rglob("ids.npy"))
        assert [documents.tokens(i).tolist() for i in range(len(documents))] == expected
        assert [documents.spans_of(i).tolist() for i in range(len(documents))] == [[[1, len(one)]] for one in expected]
        assert documents.where(4) == f"{path}:5"
        assert np.array_equal(documents.hashes, of_records.hashes)
        assert np.array_equal(documents.offsets, of_records.offsets)
        assert [name for name, _ in documents.files] == [str(path)]
    assert len(list((documents.folder / "parts").iterdir())) > 3


def test_wrong_documents(tmp_path: Path) -> None:
    expected = some_documents()
    expected[33], expected[40] = [5, 300], [7]
    path = write_megatron(tmp_path / "a", expected)
    for error in open_on(2, path, make_recipe()):
        assert isinstance(error, InputError)
        assert str(error).startswith(
            f"{path}:34: holds the token id 300, but the model has embeddings for ids below 300."
        )
    documents = open_alone(path, make_recipe(skip_bad=True))
    assert documents.num_bad == 2
    assert documents.first_bad[1].startswith(f"{path}:41: the document has 1 token, so it has no target token.")
    kept = [document for number, document in enumerate(expected) if number not in (33, 40)]
    assert [documents.tokens(i).tolist() for i in range(len(documents))] == kept
    assert documents.where(33) == f"{path}:35"


def test_records_and_tokens_are_not_mixed(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", some_documents())
    write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}])
    for error in open_on(2, tmp_path, make_recipe()):
        assert isinstance(error, InputError)
        assert "means files of tokens" in str(error)
