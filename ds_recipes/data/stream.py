"""The rows of a run as micro-batches, step by step, and those of an evaluation."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from ds_recipes.config.plan import Plan
from ds_recipes.data.batch import MicroBatch
from ds_recipes.data.dataset import PackedDataset, Row
from ds_recipes.data.order import BLANK, next_hash, row_at


class Stream:
    """This rank's micro-batches. The only state is `position`, the rows that all ranks have taken since the run began.

    Row `(micro * world_size + rank) * rows_per_rank + i` of a step is row `i` of a rank's micro-batch `micro`, so a
    step trains the same rows on any number of ranks. Positions from `plan.total_rows` on are blank rows. With
    `num_workers`, threads assemble that many steps ahead.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        plan: Plan,
        seed: int,
        rank: int,
        position: int = 0,
        data_hash: str = "",
        num_workers: int = 0,
    ) -> None:
        self.position = position
        self.data_hash = data_hash
        self._dataset = dataset
        self._plan = plan
        self._seed = seed
        self._rank = rank
        self._workers = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._ahead: deque[Future[list[MicroBatch]]] = deque()
        self._num_ahead = num_workers

    @property
    def epoch(self) -> float:
        """Passes over the data that are complete, with a fraction."""
        limit = self._plan.total_rows
        return (self.position if limit is None else min(self.position, limit)) / self._dataset.num_rows

    def take(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step."""
        group = self._assemble(self.position) if self._workers is None else self._from_workers(self._workers)
        self.data_hash = next_hash(self.data_hash, self._step_rows(self.position))
        self.position += self._plan.global_rows
        return group

    def row_at(self, position: int) -> int | None:
        """The data set's row at a position of the run's order; None for a blank row."""
        if self._plan.total_rows is not None and position >= self._plan.total_rows:
            return None
        return row_at(position, self._dataset.num_rows, self._seed)

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)

    def _step_rows(self, position: int) -> list[int]:
        rows = (self.row_at(at) for at in range(position, position + self._plan.global_rows))
        return [BLANK if row is None else row for row in rows]

    def _from_workers(self, workers: ThreadPoolExecutor) -> list[MicroBatch]:
        while len(self._ahead) <= self._num_ahead:
            start = self.position + len(self._ahead) * self._plan.global_rows
            self._ahead.append(workers.submit(self._assemble, start))
        group = self._ahead[0].result()
        self._ahead.popleft()
        return group

    def _assemble(self, step_start: int) -> list[MicroBatch]:
        return [self._micro_batch(step_start, micro) for micro in range(self._plan.micro_steps)]

    def _micro_batch(self, step_start: int, micro: int) -> MicroBatch:
        first = step_start + _first_row(self._plan, micro, self._rank)
        positions = range(first, first + self._plan.rows_per_rank)
        indices = [self.row_at(position) for position in positions]
        return _to_batch(self._dataset, indices, positions)


class EvalStream:
    """All rows of a data set in their order, once: the same number of micro-batches on every rank, filled up with
    blank rows.
    """

    def __init__(self, dataset: PackedDataset, plan: Plan, rank: int) -> None:
        self._dataset = dataset
        self._plan = plan
        self._rank = rank

    def __len__(self) -> int:
        return -(-self._dataset.num_rows // (self._plan.rows_per_rank * self._plan.world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro in range(len(self)):
            first = _first_row(self._plan, micro, self._rank)
            positions = range(first, first + self._plan.rows_per_rank)
            indices = [position if position < self._dataset.num_rows else None for position in positions]
            yield _to_batch(self._dataset, indices, positions)


def _first_row(plan: Plan, micro: int, rank: int) -> int:
    return (micro * plan.world_size + rank) * plan.rows_per_rank


def _to_batch(dataset: PackedDataset, indices: Sequence[int | None], positions: Sequence[int]) -> MicroBatch:
    rows: list[Row] = [dataset.blank_row() if index is None else dataset.row(index) for index in indices]
    context = len(rows[0].input_ids)
    return MicroBatch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),  # [rows, context]
        position_ids=torch.from_numpy(np.stack([row.position_ids for row in rows])),  # [rows, context]
        target_index=torch.from_numpy(np.concatenate([row.target_index + i * context for i, row in enumerate(rows)])),
        target_ids=torch.from_numpy(np.concatenate([row.target_ids for row in rows])),
        num_tokens=sum(row.num_tokens for row in rows),
        num_samples=sum(row.num_samples for row in rows),
        row_ids=tuple(positions),
    )
