"""Streaming keeps no ids, and gives the very ids that a store would give."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.errors import DsRecipesError, InputError
from tests.unit.data.made import write_jsonl
from tests.unit.data.tokens.stores import check_against_oracle, documents_on, make_corpus, make_recipe, open_alone

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.mark.parametrize("size, workers", [(1, 0), (3, 0), (2, 1)])
def test_the_same_documents_without_ids_on_disk(tmp_path: Path, size: int, workers: int) -> None:
    expected = make_corpus(tmp_path / "data")
    stored = open_alone(tmp_path / "data", make_recipe())
    for documents in documents_on(size, tmp_path / "data", make_recipe(streaming=True, workers=workers)):
        assert not list(documents.folder.rglob("ids.npy"))
        check_against_oracle(documents, expected)
        for name in ("offsets", "hashes", "spans", "span_offsets"):
            assert np.array_equal(getattr(documents, name), getattr(stored, name))
        assert [documents.tokens(i).tobytes() for i in range(len(documents))] == [
            stored.tokens(i).tobytes() for i in range(len(stored))
        ]
        assert documents.tokens(0).dtype == stored.tokens(0).dtype


ALPACA = [{"instruction": f"write {i}", "input": "a dog" * (i % 2), "output": f"a fox {i}"} for i in range(30)]


def test_targets_of_other_formats_are_the_same_too(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ALPACA)
    recipes = [make_recipe(format=FormatSettings("alpaca"), streaming=streaming) for streaming in (False, True)]
    stored, streamed = (open_alone(path, recipe) for recipe in recipes)
    for i in range(len(ALPACA)):
        assert np.array_equal(stored.tokens(i), streamed.tokens(i))
        assert np.array_equal(stored.spans_of(i), streamed.spans_of(i))
        assert stored.spans_of(i)[0, 0] > 5


def test_many_threads_get_the_same(tmp_path: Path) -> None:
    make_corpus(tmp_path / "data")
    documents = open_alone(tmp_path / "data", make_recipe(streaming=True))
    stored = open_alone(tmp_path / "data", make_recipe())
    wrong: list[Any] = []

    def read(seed: int) -> None:
        for document in np.random.default_rng(seed).integers(0, len(stored), 200).tolist():
            if not np.array_equal(documents.tokens(document), stored.tokens(document)):
                wrong.append(document)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("text", ["a dog 8", "a dog 7 and more", ""])
def test_a_record_that_changed_meanwhile_is_an_error(tmp_path: Path, text: str) -> None:
    """A function's file, unlike the data, is read once: here the function itself looks elsewhere."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "7").write_text("a dog 7")
    function = tmp_path / "own.py"
    function.write_text(
        "from pathlib import Path\n\n"
        f"def read(record):\n    return Path({str(texts)!r}, str(record['number'])).read_text()\n"
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"number": 7}])
    recipe = make_recipe(format=FormatSettings(f"{function}:read"), streaming=True)
    documents = open_alone(path, recipe)
    assert len(documents.tokens(0)) > 3
    documents = open_alone(path, recipe)
    (texts / "7").write_text(text)
    with pytest.raises(DsRecipesError) as caught:
        documents.tokens(0)
    assert str(caught.value).startswith(f"{path}:1: changed while the run was using it")


def test_a_file_that_changed_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a dog {i}"} for i in range(9)])
    documents = open_alone(path, make_recipe(streaming=True))
    write_jsonl(path, [{"text": f"a cat {i}"} for i in range(9)])
    with pytest.raises(DsRecipesError, match=rf"{path}.*changed"):
        documents.tokens(0)


def test_a_place_in_a_file_that_changed_meanwhile_is_not_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a dog {i}"} for i in range(9)])
    documents = open_alone(path, make_recipe())
    write_jsonl(path, [{"text": f"a cat {i}"} for i in range(9)])
    with pytest.raises(InputError, match=rf"{path}: changed while the run was using it"):
        documents.where(0)
