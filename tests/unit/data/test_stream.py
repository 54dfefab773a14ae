"""A step trains the same rows for any world, any workers and after any seek; blank rows come only at the end."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.batch import MicroBatch
from ds_recipes.data.corpus import Corpus
from ds_recipes.data.order import BLANK
from ds_recipes.data.skips import Skips
from ds_recipes.data.stream import EvalStream, Stream
from ds_recipes.errors import TrainingError
from tests.unit.data.corpora import corpus_of, make_plan, totals
from tests.unit.data.corpora import rows_of as packed
from tests.unit.data.made import write_jsonl

CONTEXT = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    write_jsonl(path, [{"text": f"dog {i} " * (1 + i % 5)} for i in range(90)])
    return corpus_of(packed(path, context_size=CONTEXT))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three sources of uneven size with weights; the smallest repeats often."""
    folder = tmp_path_factory.mktemp("mixed")
    sources = []
    for name, count in (("a", 60), ("b", 7), ("c", 25)):
        path = write_jsonl(folder / f"{name}.jsonl", [{"text": f"{name} dog {i} " * (1 + i % 4)} for i in range(count)])
        sources.append(packed(path, context_size=CONTEXT))
    return corpus_of(*sources, weights=(0.2, 0.5, 0.3))


Rows = list[tuple[int, list[int], list[int], list[tuple[int, int]]]]


def rows_of(batch: MicroBatch) -> Rows:
    """(position in the run, ids, position ids, targets) for each row of a micro-batch."""
    targets = list(zip(batch.target_index.tolist(), batch.target_ids.tolist(), strict=True))
    return [
        (
            position,
            batch.input_ids[i].tolist(),
            batch.position_ids[i].tolist(),
            [(at - i * CONTEXT, token) for at, token in targets if at // CONTEXT == i],
        )
        for i, position in enumerate(batch.row_ids)
    ]


def run(
    corpus: Corpus, world: int, rows: int, micro: int, steps: int, workers: int = 0, position: int = 0,
    data_hash: str = "", total_rows: int | None = None,
    skips: Skips | None = None,
) -> tuple[list[Rows], list[str]]:  # fmt: skip
    """All ranks' rows of each step, by position, and the hash after each step."""
    plan = make_plan(world, rows, micro, total_rows)
    streams = [Stream(corpus, plan, rank, position, data_hash, workers, skips) for rank in range(world)]
    taken, hashes = [], []
    for _ in range(steps):
        groups = [stream.take() for stream in streams]
        taken.append(sorted(row for group in groups for batch in group for row in rows_of(batch)))
        (data_hash,) = {stream.data_hash for stream in streams}
        hashes.append(data_hash)
    for stream in streams:
        stream.close()
    return taken, hashes


@pytest.mark.parametrize("world, rows, micro", [(1, 12, 1), (2, 3, 2), (3, 2, 2), (3, 1, 4), (4, 3, 1)])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_steps_do_not_depend_on_ranks_or_workers(
    corpus: Corpus, world: int, rows: int, micro: int, workers: int
) -> None:
    plain = run(corpus, 1, 1, 12, steps=9, total_rows=100)
    assert run(corpus, world, rows, micro, steps=9, workers=workers, total_rows=100) == plain


@pytest.mark.parametrize("workers", [0, 2])
def test_continuing_equals_running_through(corpus: Corpus, workers: int) -> None:
    through, hashes = run(corpus, 2, 2, 2, steps=10)
    later, later_hashes = run(corpus, 2, 2, 2, 6, workers=workers, position=4 * 8, data_hash=hashes[3])
    assert (later, later_hashes) == (through[4:], hashes[4:])


def test_epochs_take_each_row_once_then_blank_rows_follow(corpus: Corpus) -> None:
    total = 2 * corpus.num_rows
    stream = Stream(corpus, make_plan(1, 5, 1, total), 0)
    order = [int(stream.step_from(position).rows[0]) for position in range(total + 7)]
    assert sorted(order[: corpus.num_rows]) == list(range(corpus.num_rows))
    assert sorted(order[corpus.num_rows : total]) == list(range(corpus.num_rows))
    assert order[total:] == [BLANK] * 7
    tokens = targets = samples = 0
    while stream.position < total:
        (batch,) = stream.take()
        tokens, targets = tokens + batch.num_tokens, targets + batch.num_target_tokens
        samples += batch.num_samples
    expected = totals(corpus)
    assert (tokens, targets, samples) == tuple(2 * count for count in expected)
    assert stream.position % 5 == 0
    assert stream.epoch == 2.0


def test_without_a_limit_epochs_follow_each_other(corpus: Corpus) -> None:
    stream = Stream(corpus, make_plan(1, 1, 1), 0, position=1_000_000)
    assert stream.step_from(10**9).rows[0] != BLANK
    assert stream.take()[0].num_tokens > 0
    assert stream.epoch == pytest.approx(1_000_001 / corpus.num_rows)


def test_batches_are_int64_and_targets_lie_in_the_flattened_rows(corpus: Corpus) -> None:
    (batch,) = Stream(corpus, make_plan(1, 4, 1), 0).take()
    assert batch.input_ids.shape == batch.position_ids.shape == (4, CONTEXT)
    for tensor in (batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids):
        assert tensor.dtype == torch.int64
    inner = batch.target_index[(batch.target_index + 1) % CONTEXT != 0]
    inner = inner[batch.position_ids.flatten()[inner + 1] != 0]  # the next token of the document lies in the row
    expected = batch.input_ids.flatten()[inner + 1]
    assert torch.equal(batch.target_ids[torch.isin(batch.target_index, inner)], expected)


def test_a_failing_worker_fails_the_step_that_it_worked_for(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    real = corpus.row
    failing = int(Stream(corpus, make_plan(1, 2, 1), 0).step_from(4).rows[1])

    def row(number: int) -> object:
        if number == failing:
            raise OSError("the disk is gone")
        return real(number)

    monkeypatch.setattr(corpus, "row", row)
    stream = Stream(corpus, make_plan(1, 2, 1), 0, num_workers=2)
    stream.take()
    stream.take()
    for _ in range(2):
        with pytest.raises(
            TrainingError, match=r"position 5 cannot be read: OSError: the disk is gone\. It holds .*a\.jsonl:"
        ):
            stream.take()
    assert stream.position == 4
    stream.close()


@pytest.mark.parametrize("world, rows, micro, workers", [(1, 12, 1, 1), (2, 3, 2, 0), (3, 2, 2, 3), (4, 3, 1, 1)])
def test_a_mixture_does_not_depend_on_ranks_or_workers(
    mixed: Corpus, world: int, rows: int, micro: int, workers: int
) -> None:
    plain, hashes = run(mixed, 1, 1, 12, steps=20)
    assert run(mixed, world, rows, micro, steps=20, workers=workers) == (plain, hashes)
    later = run(mixed, world, rows, micro, steps=13, workers=workers, position=7 * 12, data_hash=hashes[6])
    assert later == (plain[7:], hashes[7:])


def test_tokens_are_counted_by_source(mixed: Corpus) -> None:
    (batch,) = Stream(mixed, make_plan(1, 200, 1), 0).take()
    located = mixed.locate(np.arange(200))
    for source in range(3):
        rows = located.row[located.source == source].tolist()
        assert batch.source_tokens[source] == sum(mixed.row(row).num_tokens for row in rows)
    assert sum(batch.source_tokens) == batch.num_tokens


@settings(deadline=None, max_examples=40)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 30)), max_size=4),
    workers=st.sampled_from([0, 2]),
    resumed_at=st.integers(0, 5),
)
def test_skipped_positions_are_left_out_and_nothing_else_changes(
    corpus: Corpus, ranges: list[tuple[int, int]], workers: int, resumed_at: int
) -> None:
    skips = Skips([(start, start + length) for start, length in ranges])
    left = [at for at in range(400) if not any(start <= at < start + length for start, length in ranges)]
    taken, hashes = run(corpus, 2, 2, 2, steps=6, workers=workers, skips=skips)
    assert [row[0] for step in taken for row in step] == left[: 6 * 8]
    position, data_hash = (left[resumed_at * 8 - 1] + 1, hashes[resumed_at - 1]) if resumed_at else (0, "")
    again = run(corpus, 1, 4, 2, 6 - resumed_at, position=position, data_hash=data_hash, skips=skips)
    assert again == (taken[resumed_at:], hashes[resumed_at:])


@pytest.mark.parametrize("world, rows", [(1, 1), (2, 3), (3, 7), (4, 100)])
def test_evaluation_sees_every_row_once_and_ranks_stay_in_step(corpus: Corpus, world: int, rows: int) -> None:
    streams = [EvalStream(corpus, make_plan(world, rows, 1), rank) for rank in range(world)]
    batches: list[list[MicroBatch]] = [list(stream) for stream in streams]
    assert {len(ranks) for ranks in batches} == {len(streams[0])}

    def positions() -> Iterator[int]:
        for ranks in zip(*batches, strict=True):
            for batch in ranks:
                yield from batch.row_ids

    assert list(positions()) == list(range(len(streams[0]) * world * rows))
    counted = [batch for ranks in batches for batch in ranks]
    assert sum(batch.num_target_tokens for batch in counted) == totals(corpus)[1]
    assert sum(batch.num_samples for batch in counted) == totals(corpus)[2]


def test_another_seed_order_of_the_sources_or_weight_has_another_hash(tmp_path: Path) -> None:
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} dog {i}"} for i in range(40)]) for name in ("a", "b")
    ]
    first, second = (packed(path, "text", "off", context_size=CONTEXT) for path in paths)

    def hash_after(corpus: Corpus, steps: int = 3) -> str:
        stream = Stream(corpus, make_plan(1, 4, 1), 0)
        for _ in range(steps):
            stream.take()
        return stream.data_hash

    hashes = [
        hash_after(corpus_of(first, second)),
        hash_after(corpus_of(second, first)),
        hash_after(corpus_of(first, second, seed=6)),
        hash_after(corpus_of(first, second, weights=(0.5, 0.5))),
        hash_after(corpus_of(first, second, weights=(0.9, 0.1))),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_after(corpus_of(first, second)) == hashes[0]
