"""Held-out documents are never trained on, the split is by content, and packings are kept."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.dataset import PackedDataset
from ds_recipes.data.rows import Side, is_held_out
from ds_recipes.errors import InputError
from tests.unit.data.corpora import open_one, rows_of
from tests.unit.data.made import write_jsonl

TEXTS = [f"dog {number % 150} fox" for number in range(200)]  # a quarter stands there twice


def contents(dataset: PackedDataset) -> list[bytes]:
    """Each document that is in a row, as its token ids."""
    used = {piece.document for row in range(dataset.num_rows) for piece in dataset.pieces(row)}
    return sorted(dataset.documents.tokens(document).tobytes() for document in used)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_the_sides_of_a_split_share_no_content_and_lose_none(tmp_path: Path, fraction: float) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    train, held_out = (contents(rows_of(path, side=Side(fraction, held_out=side))) for side in (False, True))
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == contents(rows_of(path))
    assert 0 < len(held_out) < 200


def test_the_split_does_not_depend_on_where_a_document_stands(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in reversed(TEXTS)])
    side = Side(0.3, held_out=True)
    assert contents(rows_of(first, side=side)) == contents(rows_of(second, side=side))


@settings(deadline=None, max_examples=30)
@given(fraction=st.floats(0.001, 0.999))
def test_a_share_is_met_and_grows_with_the_fraction(fraction: float) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64, endpoint=False)
    share = is_held_out(hashes, fraction).mean()
    assert abs(share - fraction) < 0.02
    assert not (is_held_out(hashes, fraction * 0.5) & ~is_held_out(hashes, fraction)).any()


def test_what_is_in_a_validation_file_is_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    validation = open_one(write_jsonl(tmp_path / "v.jsonl", [{"text": TEXTS[3]}, {"text": "another fox"}]))
    side = Side(excluded=np.unique(validation.hashes), excluded_by=validation.fingerprint)
    left = rows_of(path, side=side)
    assert left.facts.held_out == 2
    assert len(contents(left)) == 198
    assert not set(contents(left)) & {validation.tokens(0).tobytes()}


def test_a_packing_is_made_once_and_follows_what_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    first = rows_of(path)
    others = [
        rows_of(path, context_size=48),
        rows_of(path, packing="off"),
        rows_of(path, packing="concat"),
        rows_of(path, side=Side(0.3)),
    ]
    assert len({dataset.num_rows for dataset in (first, *others)}) == 5
    monkeypatch.setattr("ds_recipes.data.rows._make", None)
    again = rows_of(path)
    assert again.facts == first.facts
    assert all(again.pieces(row) == first.pieces(row) for row in range(first.num_rows))


def test_of_a_document_that_is_cut_the_token_behind_the_row_is_still_a_target(tmp_path: Path) -> None:
    """The last position of a row predicts it, so a prompt that fills the row leaves one target."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "dog fox dog fox dog ", "completion": "cat"}])
    documents = open_one(path, "completion")
    border = int(documents.spans_of(0)[0, 0])
    rows = rows_of(path, "completion", context_size=border, long_documents="truncate")
    assert rows.num_rows == 1 and rows.row(0).target_ids.tolist() == [int(documents.tokens(0)[border])]
    assert rows.facts.target_tokens == 1 and rows.facts.without_target == 0
    with pytest.raises(InputError, match=f"the prompt has {border} tokens, so no target fits"):
        rows_of(path, "completion", context_size=border - 1, long_documents="truncate")


def test_a_document_is_too_long_if_more_than_its_last_token_does_not_fit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "dog fox dog fox dog"}])
    length = len(open_one(path).tokens(0))
    assert rows_of(path, context_size=length - 1, long_documents="error").num_rows == 1
    with pytest.raises(InputError, match=f"the document has {length} tokens"):
        rows_of(path, context_size=length - 2, long_documents="error")
