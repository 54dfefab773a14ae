"""Where the rows of a CSV file lie, as Python's `csv` module divides it, found in blocks and without parsing a cell.

A row ends at a line end outside of quotes. A quote opens a quoted cell only where the cell begins; inside of one, two
quotes stand for one. Anywhere else a quote is a character like others.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]

OUTSIDE = re.compile(rb'\n"?|,"')
"""Outside of quotes: the end of a row, and a quote that opens a cell."""

INSIDE = re.compile(rb'""|"')
"""In a quoted cell: an escaped quote, and the one that closes the cell."""


class RowFinder:
    """Takes a content's blocks in order. `in_quotes` at the end: a quote was never closed."""

    def __init__(self, first_byte: int) -> None:
        self.in_quotes = False
        self.line = 0  # line ends before the position that is reached
        self._base = first_byte - 1
        self._rest = b"\n"  # as if a row had ended before the first one

    def take(self, block: bytes, at_end: bool) -> tuple[Ints, Ints]:
        """(start, line) of the rows that begin in the block. What the next block may continue is left for it."""
        buffer = self._rest + block
        if not self.in_quotes and b'"' not in buffer:
            done, starts, lines = self._without_quotes(buffer, at_end)
        else:
            done, starts, lines = self._with_quotes(buffer, at_end)
        starts += self._base + 1
        self._base += done
        self._rest = buffer[done:]
        return starts, lines

    def _without_quotes(self, buffer: bytes, at_end: bool) -> tuple[int, Ints, Ints]:
        done = len(buffer) if at_end or buffer[-1:] not in (b"\n", b",") else len(buffer) - 1
        found = np.flatnonzero(np.frombuffer(buffer, np.uint8, done) == ord("\n"))
        lines = np.arange(len(found)) + self.line + 1
        self.line += len(found)
        return done, found, lines

    def _with_quotes(self, buffer: bytes, at_end: bool) -> tuple[int, Ints, Ints]:
        starts, lines, position = [], [], 0
        while match := (INSIDE if self.in_quotes else OUTSIDE).search(buffer, position):
            if match.end() == len(buffer) and not at_end:
                break
            token = match.group()
            if self.in_quotes:
                self.line += buffer.count(b"\n", position, match.start())
                self.in_quotes = token == b'""'
            else:
                if token.startswith(b"\n"):
                    self.line += 1
                    starts.append(match.start())
                    lines.append(self.line)
                self.in_quotes = token.endswith(b'"')
            position = match.end()
        if match:
            done = match.start()
        else:
            done = len(buffer) - (not at_end and not self.in_quotes and buffer.endswith(b","))
        if self.in_quotes:
            self.line += buffer.count(b"\n", position, done)
        return done, np.array(starts, np.int64), np.array(lines, np.int64)


def find_rows(blocks: Iterable[bytes], first_byte: int) -> Iterator[tuple[Ints, Ints]]:
    """Pieces of (start, line) of each row, and at last of the end of the last row; `first_byte` is that of the first block."""
    finder, end, latest = RowFinder(first_byte), first_byte, first_byte
    for block in chain(blocks, [b""]):
        starts, lines = finder.take(block, at_end=not block)
        end += len(block)
        latest = int(starts[-1]) if len(starts) else latest
        yield starts, lines
    if latest < end:
        yield np.array([end]), np.array([finder.line + 1])


def ends_in_quotes(row: bytes) -> bool:
    """True if a quote that opens a cell of the row is never closed."""
    finder = RowFinder(0)
    finder.take(row, at_end=True)
    return finder.in_quotes
