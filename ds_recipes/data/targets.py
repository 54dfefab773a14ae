"""Counting target tokens: over stretches of many documents at once, and listing them within one stretch."""

from typing import Any

import numpy as np

from ds_recipes.data.tokens.documents import Documents

Ints = np.ndarray[Any, np.dtype[np.int64]]


class TargetCounts:
    """How many target tokens lie before any token of all documents, by binary search; one pass over the spans."""

    def __init__(self, documents: Documents) -> None:
        counts = np.diff(documents.span_offsets)  # [documents]
        base = np.repeat(np.asarray(documents.offsets[:-1]), counts)  # [spans]
        self._offsets = documents.offsets
        self._starts = base + documents.spans[:, 0]  # [spans], counted over all documents
        self._stops = base + documents.spans[:, 1]  # [spans]
        self._before = np.append(0, np.cumsum(self._stops - self._starts))  # [spans + 1]

    def between(self, document: Ints, first: Ints, stop: Ints) -> Ints:
        """Target tokens among tokens [first, stop) of each document: [documents asked for]."""
        offsets = np.asarray(self._offsets[document])
        counts: Ints = np.maximum(self._until(offsets + stop) - self._until(offsets + first), 0)
        return counts

    def _until(self, position: Ints) -> Ints:
        """Target tokens before each position, counted over all documents."""
        if len(self._stops) == 0:
            return np.zeros_like(position)
        begun = np.searchsorted(self._starts, position, side="left")  # spans that begin before it
        last_stop = self._stops[np.maximum(begun - 1, 0)]
        beyond = np.where(begun > 0, np.maximum(last_stop - position, 0), 0)
        total: Ints = self._before[begun] - beyond
        return total


def targets_within(spans: Ints, first: int, stop: int) -> Ints:
    """The positions of a document's target tokens in [first, stop), ascending. `spans`: [spans, 2]."""
    inside = spans[(spans[:, 1] > first) & (spans[:, 0] < stop)]
    if len(inside) == 1:
        return np.arange(max(int(inside[0, 0]), first), min(int(inside[0, 1]), stop))
    return np.concatenate(
        [np.zeros(0, np.int64), *(np.arange(max(a, first), min(b, stop)) for a, b in inside.tolist())]
    )
