"""Rows hold what a slow plain oracle says: the next token of the same document, and nothing else, is the target."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.dataset import PackedDataset
from ds_recipes.data.rows import Side
from ds_recipes.errors import InputError
from tests.unit.data.corpora import rows_of as build
from tests.unit.data.made import make_tokenizer, write_jsonl

ALPACA = [
    {"instruction": "Name a fox.", "input": "", "output": "Fritz </s> 日本語"},
    {"instruction": "Add.", "input": "40 and 2", "output": "42"},
    {"instruction": "Write.", "output": "\n\nthe quick brown fox\n"},
]
PACKINGS = ["documents", "concat", "off"]


def targets_of(dataset: PackedDataset) -> list[list[int]]:
    """For each piece that has targets, the ids that are to be predicted, found from the rows alone."""
    found = []
    for index in range(dataset.num_rows):
        row = dataset.row(index)
        piece = np.cumsum(row.position_ids == 0)[row.target_index]
        found += [row.target_ids[piece == number].tolist() for number in np.unique(piece)]
    return found


@pytest.mark.parametrize("packing", PACKINGS)
@settings(deadline=None, max_examples=25)
@given(words=st.lists(st.integers(1, 40), min_size=1, max_size=12), context=st.integers(2, 32))
def test_rows_equal_a_plain_oracle(tmp_path_factory: Any, packing: str, words: list[int], context: int) -> None:
    texts = [" ".join(f"dog{number}" for number in range(count)) for count in words]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", [{"text": text} for text in texts])
    dataset = build(path, packing=packing, context_size=context)
    documents = [[*make_tokenizer()(text).input_ids, 1] for text in texts]
    next_tokens = sorted((tuple(tokens[:i]), token) for tokens in documents for i, token in enumerate(tokens) if i)
    seen = []
    for index in range(dataset.num_rows):
        row = dataset.row(index)
        assert row.input_ids.shape == row.position_ids.shape == (context,)
        restarts = np.flatnonzero(row.position_ids == 0)
        assert restarts[0] == 0
        assert (np.diff(row.position_ids)[np.setdiff1d(np.arange(context - 1), restarts - 1)] == 1).all()
        assert (row.target_index < row.num_tokens).all()
        for at, target in zip(row.target_index.tolist(), row.target_ids.tolist(), strict=True):
            begin = at - int(row.position_ids[at])
            seen.append((tuple(row.input_ids[begin : at + 1].tolist()), target))
    assert len(seen) == len(next_tokens) == dataset.facts.target_tokens
    # A piece sees the end of what came before it in its document, or all of it.
    assert sorted(target for _, target in seen) == sorted(target for _, target in next_tokens)
    assert all(any(full[-len(part) :] == part and t == target for full, t in next_tokens) for part, target in seen[:30])


@pytest.mark.parametrize("packing", PACKINGS)
def test_alpaca_targets_decode_to_output_and_eos(tmp_path: Path, packing: str) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    dataset = build(write_jsonl(tmp_path / "a.jsonl", ALPACA), "alpaca", packing, context_size=512)
    decoded = sorted("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in targets_of(dataset))
    expected = [[*tokenizer(record["output"], add_special_tokens=False).input_ids, 1] for record in ALPACA]
    if packing != "concat":  # which may cut a record at a row's end
        assert decoded == sorted("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in expected)
    assert dataset.facts.target_tokens == sum(len(ids) for ids in expected)


def test_the_prompt_is_tokenised_as_at_inference(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [ALPACA[1]])
    row = build(path, "alpaca", context_size=512).row(0)
    text = make_tokenizer().decode(row.input_ids[: row.target_index[0] + 1], skip_special_tokens=True)
    assert text.endswith("### Response:")
    assert row.input_ids[: row.target_index[0] + 1].tolist() == make_tokenizer()(text).input_ids


def test_counts_add_up(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a dog " * count} for count in (1, 3, 30)])
    dataset = build(path, context_size=32)
    rows = [dataset.row(index) for index in range(dataset.num_rows)]
    assert dataset.facts.documents == sum(row.num_samples for row in rows) == 3
    assert dataset.facts.tokens == sum(row.num_tokens for row in rows)
    assert dataset.facts.target_tokens == sum(len(row.target_ids) for row in rows)
    assert dataset.padding_share == pytest.approx(1 - dataset.facts.tokens / (32 * dataset.num_rows))
    assert dataset.facts.truncated == 0


@pytest.mark.parametrize(
    "packing, long_documents", [("concat", "split"), *product(("documents", "off"), ("split", "truncate", "drop"))]
)
def test_the_share_of_targets_that_is_told_is_that_of_the_rows(
    tmp_path: Path, packing: str, long_documents: str
) -> None:
    """Counted from the rows alone, where documents are cut between rows, cut off, left out or held out."""
    records = [{"instruction": f"Go {n}.", "output": "fox " * (7 * n * n % 90)} for n in range(1, 40)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    dataset = build(path, "alpaca", packing, 160, long_documents, Side(fraction=0.2), skip_bad=True)
    rows = [dataset.row(index) for index in range(dataset.num_rows)]
    tokens, targets = sum(row.num_tokens for row in rows), sum(len(row.target_ids) for row in rows)
    assert 0.1 < targets / tokens < 0.9 and dataset.facts.held_out
    told = f"; {targets:,} target tokens, {100 * targets / tokens:.1f} % of all"
    assert sum(line.endswith(told) for line in dataset.describe()) == 1, dataset.describe()


def test_a_blank_row_has_nothing_to_learn(tmp_path: Path) -> None:
    row = build(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), context_size=8).blank_row()
    assert row.position_ids.tolist() == list(range(8))
    assert (len(row.target_ids), row.num_tokens, row.num_samples) == (0, 0, 0)


def test_truncated_documents_are_counted_and_keep_their_prompt(tmp_path: Path) -> None:
    records = [{"instruction": "Go.", "output": "fox " * 400}, {"instruction": "Go.", "output": "fox"}]
    dataset = build(write_jsonl(tmp_path / "a.jsonl", records), "alpaca", context_size=160)
    assert dataset.facts.truncated == 1
    assert "1 documents are longer than a row; their ends were cut off" in dataset.describe()


def test_a_prompt_that_leaves_no_target_is_refused(tmp_path: Path) -> None:
    records = [{"instruction": "Go.", "output": "a"}] + [{"instruction": "dog " * 300, "output": "a"}] * 2
    path = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(InputError) as caught:
        build(path, "alpaca", context_size=160)
    assert str(caught.value).startswith(f"{path}:2: the prompt has ")
    assert "so no target fits into a row of 160. The same holds for 1 more records. Raise --context_size" in str(
        caught.value
    )
    dataset = build(path, "alpaca", context_size=160, skip_bad=True)
    assert (dataset.facts.documents, dataset.facts.without_target) == (1, 2)
    assert "2 documents were left out: their prompt alone fills a row" in dataset.describe()


def test_long_documents_are_split_cut_dropped_or_refused(tmp_path: Path) -> None:
    texts = ["a", "dog " * 40, "fox"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    lengths = [len(make_tokenizer()(text).input_ids) + 1 for text in texts]
    assert lengths[1] > 33
    whole = build(path, context_size=32, long_documents="split")
    assert whole.facts.target_tokens == sum(lengths) - 3
    cut = build(path, context_size=32, long_documents="truncate")
    assert (cut.facts.target_tokens, cut.facts.truncated) == (lengths[0] + lengths[2] - 2 + 32, 1)
    dropped = build(path, context_size=32, long_documents="drop")
    assert (dropped.facts.dropped, dropped.facts.documents, dropped.facts.target_tokens) == (
        1,
        2,
        lengths[0] + lengths[2] - 2,
    )
    with pytest.raises(InputError, match=rf"a\.jsonl:2: the document has {lengths[1]} tokens, more than a row of 32\."):
        build(path, context_size=32, long_documents="error")
    assert build(path, context_size=lengths[1] - 1, long_documents="error").facts.documents == 3


def test_provenance_and_example_name_files_and_lines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ALPACA)
    dataset = build(path, "alpaca", context_size=1024)
    assert dataset.provenance(0) == f"{path}:1, {path}:2, {path}:3"
    example = dataset.show(0, make_tokenizer())
    assert f"--- {path}:2 (" in example
    assert "### Response:⟦42</s>⟧" in example
