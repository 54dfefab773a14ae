"""The rows of a run as micro-batches, step by step, and those of an evaluation."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ds_recipes.config.plan import Plan
from ds_recipes.data.batch import MicroBatch
from ds_recipes.data.corpus import Corpus
from ds_recipes.data.dataset import Row
from ds_recipes.data.mapped import check_mapped
from ds_recipes.data.order import BLANK, next_hash
from ds_recipes.data.skips import Skips
from ds_recipes.errors import TrainingError

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step, of all ranks: their positions in the run's order, and which rows lie there."""

    positions: Ints  # [global rows]
    rows: Ints  # [global rows]; BLANK where a position holds no row
    next_position: int


class Stream:
    """This rank's micro-batches. The only state is `position`, where the run's order goes on after the steps taken.

    A step takes the next positions that `skips` does not leave out. Row `(micro * world_size + rank) * rows_per_rank + i`
    of a step is row `i` of a rank's micro-batch `micro`, so a step trains the same rows on any number of ranks. Positions
    from `plan.total_rows` on are blank rows. With `num_workers`, threads assemble that many steps ahead.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: Plan,
        rank: int,
        position: int = 0,
        data_hash: str = "",
        num_workers: int = 0,
        skips: Skips | None = None,
    ) -> None:
        self.position = position
        self.data_hash = data_hash
        self.skips = skips if skips is not None else Skips(())
        self._corpus = corpus
        self._fingerprint = corpus.fingerprint
        self._plan = plan
        self._rank = rank
        self._workers = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._ahead: deque[tuple[Step, Future[list[MicroBatch]]]] = deque()
        self._num_ahead = num_workers

    @property
    def epoch(self) -> float:
        """Passes over the data that are complete, with a fraction."""
        limit = self._plan.total_rows
        return (self.position if limit is None else min(self.position, limit)) / self._corpus.num_rows

    def take(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step.

        Raises:
            TrainingError: a row cannot be assembled; it names the row's files and lines.
        """
        if self._workers is None:
            step = self.step_from(self.position)
            group = self._assemble(step)
        else:
            step, group = self._from_workers(self._workers)
        self.data_hash = next_hash(self.data_hash, self._fingerprint, step.rows.tolist())
        self.position = step.next_position
        return group

    def step_from(self, position: int) -> Step:
        """Which rows a step trains that begins at `position`. Costs the same at any position."""
        positions, next_position = self.skips.next_positions(position, self._plan.global_rows)
        limit = self._plan.total_rows
        is_blank = np.zeros(len(positions), bool) if limit is None else positions >= limit
        rows = np.where(is_blank, BLANK, self._corpus.locate(positions).row)
        return Step(positions, rows, next_position)

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)

    def _from_workers(self, workers: ThreadPoolExecutor) -> tuple[Step, list[MicroBatch]]:
        while len(self._ahead) <= self._num_ahead:
            step = self.step_from(self._ahead[-1][0].next_position if self._ahead else self.position)
            self._ahead.append((step, workers.submit(self._assemble, step)))
        step, future = self._ahead[0]
        group = future.result()
        self._ahead.popleft()
        return step, group

    def _assemble(self, step: Step) -> list[MicroBatch]:
        return [self._micro_batch(step, micro) for micro in range(self._plan.micro_steps)]

    def _micro_batch(self, step: Step, micro: int) -> MicroBatch:
        first = _first_row(self._plan, micro, self._rank)
        mine = slice(first, first + self._plan.rows_per_rank)
        return _to_batch(self._corpus, step.rows[mine].tolist(), step.positions[mine].tolist())


class EvalStream:
    """All rows of a corpus in their order, once: the same number of micro-batches on every rank, filled up with blank
    rows.
    """

    def __init__(self, corpus: Corpus, plan: Plan, rank: int) -> None:
        self._corpus = corpus
        self._plan = plan
        self._rank = rank

    def __len__(self) -> int:
        return -(-self._corpus.num_rows // (self._plan.rows_per_rank * self._plan.world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro in range(len(self)):
            first = _first_row(self._plan, micro, self._rank)
            positions = range(first, first + self._plan.rows_per_rank)
            rows = [position if position < self._corpus.num_rows else BLANK for position in positions]
            yield _to_batch(self._corpus, rows, positions)


def _first_row(plan: Plan, micro: int, rank: int) -> int:
    return (micro * plan.world_size + rank) * plan.rows_per_rank


def _to_batch(corpus: Corpus, numbers: Sequence[int], positions: Sequence[int]) -> MicroBatch:
    rows = [_row(corpus, number, position) for number, position in zip(numbers, positions, strict=True)]
    context = len(rows[0].input_ids)
    source_tokens = [0] * len(corpus.sources)
    for number, row in zip(numbers, rows, strict=True):
        if number != BLANK:
            source_tokens[corpus.source_of(number)] += row.num_tokens
    return MicroBatch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),  # [rows, context]
        position_ids=torch.from_numpy(np.stack([row.position_ids for row in rows])),  # [rows, context]
        target_index=torch.from_numpy(np.concatenate([row.target_index + i * context for i, row in enumerate(rows)])),
        target_ids=torch.from_numpy(np.concatenate([row.target_ids for row in rows])),
        num_tokens=sum(row.num_tokens for row in rows),
        num_samples=sum(row.num_samples for row in rows),
        row_ids=tuple(positions),
        source_tokens=tuple(source_tokens),
    )


def _row(corpus: Corpus, number: int, position: int) -> Row:
    if number == BLANK:
        return corpus.blank_row()
    check_mapped()  # whose message names the file: where the row is from stands in such files too
    try:
        return corpus.row(number)
    except Exception as error:  # whatever a disk, a codec or a user's function raises: say which records it was
        raise TrainingError(
            f"the row at position {position:,} cannot be read: {type(error).__name__}: {error}. "
            f"It holds {corpus.provenance(number)}."
        ) from error
