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

    def next_positions(self, position: int, count: int) -> tuple[Ints, int]:
        """The next `count` positions from `position` on that are kept, ascending, and the position to go on from."""
        first = position - self.num_skipped(position)  # a kept position's number among all that are kept
        number = np.arange(first, first + count)
        positions = number + self._skipped[np.searchsorted(self._kept, number, side="right")]
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
