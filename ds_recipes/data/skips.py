"""Positions of a run's order that are left out, such as data on which a run went wrong."""

from collections.abc import Sequence

import numpy as np

from ds_recipes.data.order import Ints


class Skips:
    """Half-open ranges [start, stop) of positions to skip. `ranges` has them merged, ascending and not touching."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.ranges = _merged(ranges)
        starts = np.array([start for start, _ in self.ranges], np.int64)
        self._skipped = np.cumsum([0, *(stop - start for start, stop in self.ranges)])  # [ranges + 1]
        self._kept = starts - self._skipped[:-1]  # positions kept before each range

    def num_skipped(self, stop: int) -> int:
        """Skipped positions below `stop`."""
        return sum(min(end, stop) - min(start, stop) for start, end in self.ranges)

    def next_positions(self, position: int, count: int, limit: int | None) -> tuple[Ints, int]:
        """The next `count` positions from `position` on that are kept and below `limit`, and the position to go on from.

        There are fewer where the limit comes first.
        """
        first = position - self.num_skipped(position)  # a kept position's number among all that are kept
        last = first + count
        if limit is not None:
            last = min(last, max(limit - self.num_skipped(limit), first))
        number = np.arange(first, last)
        positions = number + self._skipped[np.searchsorted(self._kept, number, side="right")]
        if last < first + count:
            return positions, max(position, limit or 0)
        return positions, int(positions[-1]) + 1 if count else position


def _merged(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
