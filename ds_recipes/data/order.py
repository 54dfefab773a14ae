"""Which row comes when: a pure function of seed, epoch and position, whatever the number of ranks or workers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash

BLANK = -1
"""Stands for a blank row in the rolling hash."""


def row_at(position: int, rows_per_epoch: int, seed: int) -> int:
    """The data set's row at `position` of the run's order; each epoch is a permutation of its own."""
    epoch, index = divmod(position, rows_per_epoch)
    return int(_permutation(epoch, rows_per_epoch, seed)[index])


def next_hash(previous_hex: str, row_ids: Sequence[int]) -> str:
    """The rolling hash after a step that trains `row_ids` (of all ranks, in order): 16 hex digits, xxh3-64 chained."""
    content = np.array(row_ids, "<i8").tobytes()
    return str(xxhash.xxh3_64(previous_hex.encode() + b":" + content).hexdigest())


@lru_cache(maxsize=4)
def _permutation(epoch: int, rows: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Sorting raw Philox numbers: their stream is fixed for all numpy versions, that of `Generator` is not (NEP 19)."""
    keys = np.random.Philox(key=[seed, epoch]).random_raw(rows)
    return np.argsort(keys, kind="stable")
