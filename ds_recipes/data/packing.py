"""Laying documents into rows of a fixed length."""

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
    """Rows of pieces, window by window.

    The last row of a window is taken apart and packed again with the next window: a window's end costs nothing.
    """
    rows: list[list[int]] = []
    carried: list[int] = []
    for begin in range(0, len(length), WINDOW):
        window = carried + list(range(begin, min(begin + WINDOW, len(length))))
        packed = _pack_window(window, length, context_size)
        carried = packed.pop() if begin + WINDOW < len(length) else []
        rows.extend(sorted(row) for row in packed)
    return rows


def _pack_window(window: list[int], length: Ints, context_size: int) -> list[list[int]]:
    """Row after row: the longest piece left, then the pieces that fill what it leaves best (minimum bin slack: Gupta
    and Ho, 1999), long ones first so that the short ones, which fit anywhere, last.
    """
    rows = []
    left = sorted(window, key=lambda piece: -int(length[piece]))
    tokens = length[left].tolist()
    while left:
        chosen = [0, *(1 + index for index in _fill(context_size - tokens[0], tokens[1:]))]
        rows.append([left[index] for index in chosen])
        for index in reversed(chosen):
            del left[index], tokens[index]
    return rows


def _fill(room: int, tokens: list[int]) -> list[int]:
    """The indices, ascending, of pieces whose tokens come nearest to `room` without exceeding it.

    Subset sums as bits: bit `s` of `sums[i]` says that some of the first `i` pieces have `s` tokens together.
    """
    mask = (1 << (room + 1)) - 1
    sums = [1]
    for number in tokens:
        if sums[-1] >> room:
            break  # full to the last token
        sums.append((sums[-1] | sums[-1] << number) & mask)
    total = sums[-1].bit_length() - 1
    chosen = []
    for index in reversed(range(len(sums) - 1)):
        if not sums[index] >> total & 1:
            chosen.append(index)
            total -= tokens[index]
    return chosen[::-1]
