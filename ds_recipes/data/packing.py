"""Laying documents into rows of a fixed length."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 1000
"""Pieces that best fit looks at together: enough for under 1 % padding, few enough that neighbours stay near."""

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Packing:
    """Rows of pieces: row `r` is the pieces `row_offsets[r]` to `row_offsets[r + 1]`, side by side.

    A piece is `length` tokens of a document from its token `start` on. Pieces do not see each other, not even two of
    the same document: the last position of one predicts the first token of the next, whichever row that lies in.
    """

    row_offsets: Ints  # [rows + 1]
    document: Ints  # [pieces]
    start: Ints  # [pieces]
    length: Ints  # [pieces]

    def __len__(self) -> int:
        return len(self.row_offsets) - 1


def pack(method: str, lengths: Ints, context_size: int, splits_long: bool) -> Packing:
    """Lay documents of `lengths` tokens into rows of `context_size` by the method `documents`, `concat` or `off`.

    A document longer than a row is split (`splits_long`) or loses its end; `concat` always splits.
    """
    if method == "concat":
        return _cut_stream(lengths, context_size)
    document, start, length = _pieces(lengths, context_size, splits_long)
    if method == "off":
        return Packing(np.arange(len(length) + 1), document, start, length)
    rows = _best_fit(length, context_size)
    order = np.concatenate([np.array(row, np.int64) for row in rows])
    row_offsets = np.append(0, np.cumsum([len(row) for row in rows]))
    return Packing(row_offsets, document[order], start[order], length[order])


def _pieces(lengths: Ints, context_size: int, splits_long: bool) -> tuple[Ints, Ints, Ints]:
    """Documents as pieces of at most a row. A last token alone is no piece: it predicts nothing, and is already a
    target of the piece before it.
    """
    counts = np.maximum(-(-(lengths - 1) // context_size), 1) if splits_long else np.ones_like(lengths)
    document = np.repeat(np.arange(len(lengths)), counts)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * context_size
    return document, start, np.minimum(lengths[document] - start, context_size)


def _cut_stream(lengths: Ints, context_size: int) -> Packing:
    """One stream of all documents, cut at their ends and at every row's end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    row_ends = np.arange(context_size, total + context_size, context_size)
    cuts = np.unique(np.concatenate([ends, np.minimum(row_ends, total)]))  # where pieces end
    begins = np.append(0, cuts[:-1])
    document = np.searchsorted(ends, begins, side="right")
    row_offsets = np.searchsorted(begins, np.append(0, row_ends))
    return Packing(row_offsets, document, begins - (ends - lengths)[document], cuts - begins)


def _best_fit(length: Ints, context_size: int) -> list[list[int]]:
    """Rows of pieces: in each window the longest piece first, each into the fullest row that still has room.

    The emptiest row of a window is taken apart and packed again with the next window: a window's end costs nothing.
    """
    rows: list[list[int]] = []
    carried: list[int] = []
    for begin in range(0, len(length), WINDOW):
        window = carried + list(range(begin, min(begin + WINDOW, len(length))))
        packed, emptiest = _pack_window(window, length, context_size)
        carried = packed.pop(emptiest) if begin + WINDOW < len(length) else []
        rows.extend(sorted(row) for row in packed)
    return rows


def _pack_window(window: list[int], length: Ints, context_size: int) -> tuple[list[list[int]], int]:
    """The rows of one window and the index of the emptiest."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for piece in sorted(window, key=lambda index: -int(length[index])):
        tokens = int(length[piece])
        at = bisect_left(rooms, (tokens, 0))
        if at < len(rooms):
            room, row = rooms.pop(at)
            rows[row].append(piece)
        else:
            room, row = context_size, len(rows)
            rows.append([piece])
        insort(rooms, (room - tokens, row))
    return rows, rooms[-1][1]
