"""Opening stores of small corpora that are cut into many parts, on ranks that are threads, and a slow oracle for them."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_recipes.config.data_paths import parse_data_path
from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.data.tokens import parts, peers, share
from ds_recipes.data.tokens.documents import Documents
from ds_recipes.data.tokens.store import Recipe, open_documents
from tests.unit.data.made import make_tokenizer, on_ranks, write_jsonl

TEXTS = ["a dog {i}", "the quick brown fox {i} 日本語", "{i}", "letters and 日本 {i} over the lazy dog " * 6]


def cut_small(part_bytes: int = 400, set_value: Callable[[object, str, int], None] = setattr) -> None:
    """Parts of this process's stores are small from now on, workers make them where there are any, and no rank waits long."""
    for name in ("LEAST_BYTES", "MOST_BYTES"):
        set_value(parts, name, part_bytes)
    set_value(share, "SMALL_BYTES", 0)
    set_value(peers, "LOOK_SECONDS", 0.5)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(set_value=monkeypatch.setattr)


def make_recipe(**changes: Any) -> Recipe:
    recipe = Recipe(FormatSettings("text"), make_tokenizer(), 300, False, False, 0, None, None)
    return dataclasses.replace(recipe, **changes)


def make_corpus(folder: Path, records: int = 40, files: int = 2) -> list[Any]:
    """Files of records with blank lines between them; returns (file, line, text) of each record."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = []
    for number in range(files):
        path = folder / f"part{number}.jsonl"
        texts = [TEXTS[i % len(TEXTS)].format(i=i + 1000 * number) for i in range(records)]
        lines = path.with_suffix(".tmp")
        write_jsonl(lines, [{"text": text} for text in texts])
        path.write_bytes(b"\n" + lines.read_bytes().replace(b'"}\n', b'"}\n \n'))
        lines.unlink()
        expected += [(path, 2 + 2 * i, text) for i, text in enumerate(texts)]
    return expected


def open_on(
    size: int, path: Path | str, recipe: Recipe | Callable[[int], Recipe], say: Callable[[str], None] = lambda _: None
) -> list[Any]:
    """What each of `size` ranks gets or raises; `recipe` may depend on the rank."""

    def run(world: Any) -> Any:
        own = recipe if isinstance(recipe, Recipe) else recipe(world.rank)
        return open_documents(parse_data_path(str(path)), own, world, say)

    return on_ranks(size, run)


def documents_on(
    size: int, path: Path | str, recipe: Recipe | Callable[[int], Recipe], say: Callable[[str], None] = lambda _: None
) -> list[Documents]:
    """The documents that each of `size` ranks gets; an error of any is raised."""
    outcomes = open_on(size, path, recipe, say)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, Documents), "a rank did not end in time"
    return outcomes


def open_alone(path: Path | str, recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> Documents:
    (documents,) = documents_on(1, path, recipe, say)
    return documents


def token_ids(text: str) -> list[int]:
    """What the encoder must make of a text, one call of the tokenizer at a time."""
    tokenizer = make_tokenizer()
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def check_against_oracle(documents: Documents, expected: Sequence[tuple[Path, int, str]]) -> None:
    """Every document of a corpus of texts, in order."""
    ids = [token_ids(text) for _, _, text in expected]
    assert len(documents) == len(expected)
    assert [documents.tokens(i).tolist() for i in range(len(documents))] == ids
    assert [documents.spans_of(i).tolist() for i in range(len(documents))] == [[[1, len(one)]] for one in ids]
    assert [documents.where(i) for i in range(len(documents))] == [f"{path}:{line}" for path, line, _ in expected]
    assert documents.lengths.tolist() == [len(one) for one in ids]
    same_hash = documents.hashes[:, None] == documents.hashes[None, :]
    texts = np.array([text for _, _, text in expected], dtype=object)
    assert np.array_equal(same_hash, texts[:, None] == texts[None, :])


def store_files(folder: Path) -> dict[str, str]:
    """Every file and folder of a store, with a hash of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def only_store(cache: Path) -> Path:
    (folder,) = cache.glob("tokens-*")
    return folder
