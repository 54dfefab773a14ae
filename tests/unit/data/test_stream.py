"""A step trains the same rows for any world, any workers and after any seek; blank rows come only at the end."""

from collections.abc import Iterator

import pytest
import torch

from ds_recipes.data.batch import MicroBatch
from ds_recipes.data.dataset import PackedDataset
from ds_recipes.data.stream import EvalStream, Stream
from tests.unit.data.made import build, make_plan, write_jsonl

CONTEXT = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    return build(write_jsonl(path, [{"text": f"dog {i} " * (1 + i % 5)} for i in range(90)]), context_size=CONTEXT)


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
    dataset: PackedDataset, world: int, rows: int, micro: int, steps: int, workers: int = 0, position: int = 0,
    data_hash: str = "", total_rows: int | None = None,
) -> tuple[list[Rows], list[str]]:  # fmt: skip
    """All ranks' rows of each step, by position, and the hash after each step."""
    plan = make_plan(world, rows, micro, total_rows)
    streams = [Stream(dataset, plan, 5, rank, position, data_hash, workers) for rank in range(world)]
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
    dataset: PackedDataset, world: int, rows: int, micro: int, workers: int
) -> None:
    plain = run(dataset, 1, 1, 12, steps=9, total_rows=100)
    assert run(dataset, world, rows, micro, steps=9, workers=workers, total_rows=100) == plain


@pytest.mark.parametrize("workers", [0, 2])
def test_continuing_equals_running_through(dataset: PackedDataset, workers: int) -> None:
    through, hashes = run(dataset, 2, 2, 2, steps=10)
    later, later_hashes = run(dataset, 2, 2, 2, 6, workers=workers, position=4 * 8, data_hash=hashes[3])
    assert (later, later_hashes) == (through[4:], hashes[4:])


def test_epochs_take_each_row_once_then_blank_rows_follow(dataset: PackedDataset) -> None:
    total = 2 * dataset.num_rows
    stream = Stream(dataset, make_plan(1, 5, 1, total), 5, 0)
    order = [stream.row_at(position) for position in range(total + 7)]
    assert sorted(order[: dataset.num_rows]) == list(range(dataset.num_rows))  # type: ignore[type-var]
    assert sorted(order[dataset.num_rows : total]) == list(range(dataset.num_rows))  # type: ignore[type-var]
    assert order[total:] == [None] * 7
    tokens = targets = samples = 0
    while stream.position < total:
        (batch,) = stream.take()
        tokens, targets = tokens + batch.num_tokens, targets + batch.num_target_tokens
        samples += batch.num_samples
    expected = (dataset.num_tokens, dataset.num_target_tokens, dataset.num_documents)
    assert (tokens, targets, samples) == tuple(2 * count for count in expected)
    assert stream.position % 5 == 0
    assert stream.epoch == 2.0


def test_without_a_limit_epochs_follow_each_other(dataset: PackedDataset) -> None:
    stream = Stream(dataset, make_plan(1, 1, 1), 5, 0, position=1_000_000)
    assert stream.row_at(10**9) is not None
    assert stream.take()[0].num_tokens > 0
    assert stream.epoch == pytest.approx(1_000_001 / dataset.num_rows)


def test_batches_are_int64_and_targets_lie_in_the_flattened_rows(dataset: PackedDataset) -> None:
    (batch,) = Stream(dataset, make_plan(1, 4, 1), 5, 0).take()
    assert batch.input_ids.shape == batch.position_ids.shape == (4, CONTEXT)
    for tensor in (batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids):
        assert tensor.dtype == torch.int64
    inner = batch.target_index[(batch.target_index + 1) % CONTEXT != 0]
    inner = inner[batch.position_ids.flatten()[inner + 1] != 0]  # the next token of the document lies in the row
    expected = batch.input_ids.flatten()[inner + 1]
    assert torch.equal(batch.target_ids[torch.isin(batch.target_index, inner)], expected)


def test_a_failing_worker_fails_the_step_that_it_worked_for(
    dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dataset.row
    failing = Stream(dataset, make_plan(1, 2, 1), 5, 0).row_at(5)

    def row(index: int) -> object:
        if index == failing:
            raise OSError("the disk is gone")
        return real(index)

    monkeypatch.setattr(dataset, "row", row)
    stream = Stream(dataset, make_plan(1, 2, 1), 5, 0, num_workers=2)
    stream.take()
    stream.take()
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            stream.take()
    assert stream.position == 4
    stream.close()


@pytest.mark.parametrize("world, rows", [(1, 1), (2, 3), (3, 7), (4, 100)])
def test_evaluation_sees_every_row_once_and_ranks_stay_in_step(dataset: PackedDataset, world: int, rows: int) -> None:
    streams = [EvalStream(dataset, make_plan(world, rows, 1), rank) for rank in range(world)]
    batches: list[list[MicroBatch]] = [list(stream) for stream in streams]
    assert {len(ranks) for ranks in batches} == {len(streams[0])}

    def positions() -> Iterator[int]:
        for ranks in zip(*batches, strict=True):
            for batch in ranks:
                yield from batch.row_ids

    assert list(positions()) == list(range(len(streams[0]) * world * rows))
    counted = [batch for ranks in batches for batch in ranks]
    assert sum(batch.num_target_tokens for batch in counted) == dataset.num_target_tokens
    assert sum(batch.num_samples for batch in counted) == dataset.num_documents
