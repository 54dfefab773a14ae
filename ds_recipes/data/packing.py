"""Laying documents into rows of a fixed length."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

PACKING_VERSION = 1
"""Goes up whenever the same documents would be laid out in another way: a run goes on only in the rows that it began with."""

WINDOW_ROWS = 64
LEAST_WINDOW_PIECES = 1000
USUAL_WINDOW_PIECES = 4000
MOST_WINDOW_PIECES = 1 << 16
WINDOW_WORK = 1 << 25
"""Best fit looks at a window of pieces together: at least so many rows' worth and so many pieces, enough to choose from,
but few enough that a row's documents lie near each other on the disk. The work grows with pieces x row length, so windows
of very long rows get fewer pieces.
"""

FULL_ENOUGH = 1 << 12
"""A row is full when less than this part of it is left: the last few tokens of a very long row are not worth the search."""

Ints = np.ndarray[Any, np.dtype[np.int64]]
Buckets = dict[int, list[int]]


@dataclass(frozen=True)
class Packing:
    """Rows of pieces: row `r` is the pieces `row_offsets[r]` to `row_offsets[r + 1]`, side by side.

    A piece is `length` tokens of a document from its token `start` on. Pieces do not see each other, not even two of
    the same document: the last position of one predicts the first token of the next, whichever row that lies in.
    """

    row_offsets: Ints  # int64 [rows + 1]
    document: Ints  # int64 [pieces]
    start: Ints  # int64 [pieces]
    length: Ints  # int64 [pieces]
    num_dropped: int  # documents left out for being longer than a row

    def __len__(self) -> int:
        return len(self.row_offsets) - 1


def pack(
    method: str,
    lengths: Ints,
    context_size: int,
    long_documents: str,
    selected: Ints | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Packing:
    """Lay documents of `lengths` tokens into rows of `context_size` by the method `documents`, `concat` or `off`.

    A document longer than a row goes on in other rows (`long_documents` is `split`), loses its end (`truncate`) or is
    left out (`drop`); `concat` always splits. `selected` are the numbers of the documents to use, ascending; None: all.
    `pause` is called several times a second, and may raise.
    """
    assert method in ("documents", "concat", "off") and long_documents in ("split", "truncate", "drop")
    assert method != "concat" or long_documents == "split"
    numbers = np.arange(len(lengths)) if selected is None else selected
    used = lengths if selected is None else lengths[selected]  # [documents used]
    if method == "concat":
        return _cut_stream(numbers, used, context_size)
    num_dropped = 0
    if long_documents == "drop":
        fits = used - 1 <= context_size  # a last token may be a target alone
        num_dropped = len(used) - int(fits.sum())
        numbers, used = numbers[fits], used[fits]
    document, start, length = _pieces(numbers, used, context_size, long_documents == "split")
    if method == "off":
        return Packing(np.arange(len(length) + 1), document, start, length, num_dropped)
    order, row_offsets = _best_fit(length, context_size, pause)
    return Packing(row_offsets, document[order], start[order], length[order], num_dropped)


def _pieces(numbers: Ints, lengths: Ints, context_size: int, splits_long: bool) -> tuple[Ints, Ints, Ints]:
    """Documents as pieces of at most a row. A last token alone is no piece: it predicts nothing, and is already a
    target of the piece before it.
    """
    if not splits_long:
        return numbers, np.zeros_like(numbers), np.minimum(lengths, context_size)
    counts = np.maximum(-(-(lengths - 1) // context_size), 1)  # [documents]
    first = np.cumsum(counts) - counts
    start = (np.arange(int(counts.sum())) - np.repeat(first, counts)) * context_size  # [pieces]
    return np.repeat(numbers, counts), start, np.minimum(np.repeat(lengths, counts) - start, context_size)


def _cut_stream(numbers: Ints, lengths: Ints, context_size: int) -> Packing:
    """One stream of all documents, cut at their ends and at every row's end."""
    ends = np.cumsum(lengths)
    total = int(lengths.sum())
    row_ends = np.arange(context_size, total + context_size, context_size)  # [rows]
    cuts = np.concatenate([ends, np.minimum(row_ends, total)])
    cuts.sort(kind="stable")  # merges what is sorted already
    cuts = cuts[np.diff(cuts, prepend=0) > 0]  # [pieces], where they end
    begins = np.append(0, cuts)[:-1]
    document = np.searchsorted(ends, begins, side="right")
    row_offsets = np.searchsorted(begins, np.append(0, row_ends))
    start = begins - (ends - lengths)[document]
    return Packing(row_offsets, numbers[document], start, cuts - begins, num_dropped=0)


def _best_fit(length: Ints, context_size: int, pause: Callable[[], None]) -> tuple[Ints, Ints]:
    """Pack window by window: the order of the pieces, int64 [pieces], and row offsets into it, int64 [rows + 1].

    The last row of a window is taken apart and packed again with the next window: a window's end costs nothing.
    """
    order = np.empty_like(length)
    row_ends: list[Ints] = [np.zeros(1, np.int64)]
    carried: list[int] = []
    for begin, stop in _windows(length, context_size):
        pause()
        rows = _pack_window([*carried, *range(begin, stop)], length, context_size)
        carried = rows.pop() if stop < len(length) else []
        done = int(row_ends[-1][-1])
        if rows:
            row_ends.append(done + np.cumsum([len(row) for row in rows]))
            order[done : row_ends[-1][-1]] = np.concatenate(rows)
    return order, np.concatenate(row_ends)


def _windows(length: Ints, context_size: int) -> Iterator[tuple[int, int]]:
    pieces = min(max(WINDOW_WORK // context_size, LEAST_WINDOW_PIECES), USUAL_WINDOW_PIECES)
    begin = 0
    while begin < len(length):
        tokens = np.cumsum(length[begin : begin + MOST_WINDOW_PIECES])
        stop = begin + max(int(np.searchsorted(tokens, WINDOW_ROWS * context_size)) + 1, pieces)
        stop = min(stop, begin + len(tokens))
        yield begin, stop
        begin = stop


def _pack_window(window: list[int], length: Ints, context_size: int) -> list[list[int]]:
    """Row after row: the longest piece left, then the pieces that fill what it leaves best (minimum bin slack: Gupta
    and Ho, 1999), long ones first so that the short ones, which fit anywhere, last.
    """
    buckets: Buckets = {}  # by size; the piece that comes first is the last of its bucket
    window.reverse()
    for piece, size in zip(window, length[window].tolist(), strict=True):
        buckets.setdefault(size, []).append(piece)
    sizes = sorted(buckets)
    rows = []
    while sizes:
        longest = sizes[-1]
        row = [buckets[longest].pop()]
        taken = _fill(context_size - longest, context_size // FULL_ENOUGH, sizes, buckets)
        for size, count in taken:
            row += buckets[size][-count:]
            del buckets[size][-count:]
        for size in {longest, *(size for size, _ in taken)}:
            if not buckets[size]:
                del sizes[bisect_left(sizes, size)]
        rows.append(sorted(row))
    return rows


def _fill(room: int, spare: int, sizes: list[int], buckets: Buckets) -> list[tuple[int, int]]:
    """The pieces whose tokens come nearest to `room` without exceeding it, or leave at most `spare`: (size, how many),
    a size perhaps repeatedly.

    Subset sums as bits: bit `s` of `sums[i]` says that some of the first `i` batches have `s` tokens together.
    """
    mask, enough = (1 << (room + 1)) - 1, max(room - spare, 0)
    reached, sums = 1, []
    batches: list[tuple[int, int]] = []
    for at in reversed(range(bisect_right(sizes, room))):
        if reached >> enough:
            break
        size = sizes[at]
        for count in _batches(min(len(buckets[size]), room // size)):
            sums.append(reached)
            batches.append((size, count))
            reached = (reached | reached << count * size) & mask
    total = reached.bit_length() - 1
    chosen = []
    for before, (size, count) in zip(reversed(sums), reversed(batches), strict=True):
        if not before >> total & 1:
            chosen.append((size, count))
            total -= size * count
    return chosen


@lru_cache(maxsize=1 << 16)
def _batches(number: int) -> tuple[int, ...]:
    """Few batches of which some make up any number of pieces up to `number`: 1, 2, 4, ..., and the rest."""
    powers = [1 << i for i in range((number + 1).bit_length() - 1)]
    rest = number - sum(powers)
    return (*powers, rest) if rest else tuple(powers)
