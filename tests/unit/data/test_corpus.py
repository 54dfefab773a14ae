"""Several sources are one order of rows; weights are shares of the tokens; each row keeps its place."""

from pathlib import Path

import numpy as np
import pytest

from ds_recipes.data.corpus import Corpus
from ds_recipes.data.dataset import PackedDataset
from ds_recipes.data.rows import Side
from ds_recipes.errors import InputError
from tests.unit.data.corpora import corpus_of, rows_of
from tests.unit.data.made import make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[PackedDataset]:
    folder = tmp_path_factory.mktemp("sources")
    counts = {"a": 50, "b": 9, "c": 23}
    paths = [
        write_jsonl(folder / f"{name}.jsonl", [{"text": f"{name} fox {i} " * (1 + i % 6)} for i in range(count)])
        for name, count in counts.items()
    ]
    return [rows_of(path, context_size=16, packing="off" if path.stem == "b" else "documents") for path in paths]


def test_without_weights_each_epoch_holds_every_row_of_every_source_once(sources: list[PackedDataset]) -> None:
    corpus = corpus_of(*sources)
    assert corpus.num_rows == sum(source.num_rows for source in sources)
    for epoch in range(2):
        located = corpus.locate(np.arange(corpus.num_rows) + epoch * corpus.num_rows)
        assert sorted(located.row.tolist()) == list(range(corpus.num_rows))
        assert [corpus.source_of(row) for row in located.row.tolist()] == located.source.tolist()


def test_weights_are_shares_of_the_tokens(sources: list[PackedDataset]) -> None:
    """Source b is not packed, so its rows hold few tokens: it needs more rows for its share."""
    corpus = corpus_of(*sources, weights=(1, 2, 1))
    located = corpus.locate(np.arange(20_000))
    tokens = np.zeros(3)
    for source in range(3):
        rows, counts = np.unique(located.row[located.source == source], return_counts=True)
        tokens[source] = sum(corpus.row(row).num_tokens * count for row, count in zip(rows, counts, strict=True))
    assert tokens / tokens.sum() == pytest.approx([0.25, 0.5, 0.25], abs=2e-3)
    assert (located.source == 1).mean() > 0.5


def test_a_row_is_its_sources_row(sources: list[PackedDataset]) -> None:
    corpus = corpus_of(*sources, weights=(1, 1, 1))
    first = sources[0].num_rows + sources[1].num_rows
    assert corpus.row(first + 2).input_ids.tolist() == sources[2].row(2).input_ids.tolist()
    assert corpus.provenance(first + 2) == sources[2].provenance(2)
    assert "c.jsonl:" in corpus.show(first + 2, make_tokenizer())


def test_the_seed_and_the_source_decide_the_order(sources: list[PackedDataset]) -> None:
    orders = [corpus_of(sources[0], seed=seed).locate(np.arange(20)).row.tolist() for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]


def test_a_source_that_repeats_is_noticed_once_an_epoch(sources: list[PackedDataset]) -> None:
    corpus = corpus_of(*sources, weights=(1, 2, 1))
    seen = [repeat for start in range(0, 600, 7) for repeat in corpus.repeats_between(start, start + 7)]
    assert len(seen) == len(set(seen))
    for source, epoch in seen:
        assert corpus.epochs_at(600)[source] >= epoch
    located = corpus.locate(np.arange(602))
    latest = {source: int(located.epoch[located.source == source].max()) for source in range(3)}
    assert set(seen) == {(source, epoch) for source in latest for epoch in range(1, latest[source] + 1)}


def test_fingerprints_follow_content_and_what_is_left_out(tmp_path: Path, sources: list[PackedDataset]) -> None:
    records = [{"text": f"dog {i}"} for i in range(30)]
    first = write_jsonl(tmp_path / "a.jsonl", records)
    moved = write_jsonl(tmp_path / "moved.jsonl", records)
    other = write_jsonl(tmp_path / "other.jsonl", records[1:])
    prints = [corpus_of(rows_of(path)).fingerprint for path in (first, moved, other)]
    assert prints[0] == prints[1] != prints[2]
    assert corpus_of(rows_of(first, side=Side(0.4))).fingerprint != prints[0]
    assert corpus_of(*sources[:2]).fingerprint != corpus_of(*reversed(sources[:2])).fingerprint


def test_nothing_to_train_on_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "dog " * 30}] * 3)
    with pytest.raises(InputError, match=r"no document is left for training \(0 .* 3 too long, .* of 3\)"):
        corpus_of(rows_of(path, context_size=8, long_documents="drop"))


def test_a_weight_that_gives_no_row_is_refused(sources: list[PackedDataset]) -> None:
    with pytest.raises(InputError, match="weight"):
        Corpus(sources, (1.0, 1.0, 1e-9), 1)
