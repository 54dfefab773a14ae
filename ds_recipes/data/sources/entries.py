"""A source whose entries are ranges of bytes in one file: lines, elements of an array, rows of a CSV file."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ds_recipes.data.index.raw import MAX_RECORD_BYTES
from ds_recipes.data.sources.content import Content, Fetch
from ds_recipes.data.sources.messages import NotARecord, megabytes
from ds_recipes.data.sources.record import Bad, Record

Ints = np.ndarray[Any, np.dtype[np.int64]]

BLOCK_BYTES = 1 << 22
"""Read at once, unless one entry is longer."""

BLOCK_ENTRIES = 1 << 14
COMPRESSED_CUTS = 32
"""Each slice of a compressed file begins with decompressing all that comes before it."""

COUNTED_BYTES = 1 << 22
"""How far into a file a bad entry may lie for its message to say that the records before it are fine."""


@dataclass(frozen=True)
class Layout:
    """Where each entry lies, in bytes of the decompressed content; `lines` None: entry i is line i + 1."""

    starts: Ints  # [entries]
    ends: Ints  # [entries]
    lines: Ints | None  # [entries]


Parse = Callable[[int, bytes], dict[str, Any] | None]
"""The record in the bytes of an entry; None if it is blank. Raises NotARecord."""


class ByteEntries:
    """A `Source` over the bytes of one file; several threads may read it at once. `notes`: what a user should be told."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        content: Content,
        layout: Layout,
        parse: Parse,
        if_too_long: str = "Split or remove it.",
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name, self.fingerprint, self.random_access = name, fingerprint, content.random_access
        self.notes = notes
        self._content, self._layout, self._parse, self._if_too_long = content, layout, parse, if_too_long

    def __len__(self) -> int:
        return len(self._layout.starts)

    def content_bytes(self, start: int, stop: int) -> int:
        """Unpacked bytes from the entry `start` to the entry `stop`, or to the end of the last."""
        end = self._layout.starts[stop] if stop < len(self) else self._layout.ends[-1]
        return int(end - self._layout.starts[start]) if start < stop else 0

    def line(self, entry: int) -> int:
        return entry + 1 if self._layout.lines is None else int(self._layout.lines[entry])

    def cuts(self, pieces: int) -> list[int]:
        """Slices of about as many bytes each."""
        if not self.random_access:
            pieces = min(pieces, COMPRESSED_CUTS)
        starts = self._layout.starts
        targets = np.linspace(int(starts[0]), int(self._layout.ends[-1]), max(1, pieces), endpoint=False)
        return sorted({0, *np.searchsorted(starts, targets[1:]).tolist(), len(self)})

    def read(self, start: int, stop: int) -> Iterator[Record | Bad]:
        with self._content.opened() as fetch:
            for entry, raw in self._raw(fetch, start, stop):
                try:
                    value = self._value(entry, raw)
                except NotARecord as problem:
                    yield self._bad(entry, problem)
                else:
                    if value is not None:
                        yield Record(self.name, self.line(entry), entry, value)

    def _raw(self, fetch: Fetch, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
        """The entries' bytes, read in blocks; None for an entry that is too long to be read."""
        for low in range(start, stop, BLOCK_ENTRIES):
            high = min(low + BLOCK_ENTRIES, stop)
            starts, ends = self._layout.starts[low:high].tolist(), self._layout.ends[low:high].tolist()
            first = 0
            while first < len(starts):
                origin = starts[first]
                if ends[first] - origin > MAX_RECORD_BYTES:
                    yield low + first, None
                    first += 1
                    continue
                last = max(first + 1, bisect_right(ends, origin + BLOCK_BYTES, first))
                block = fetch(origin, ends[last - 1])
                for i in range(first, last):
                    yield low + i, block[starts[i] - origin : ends[i] - origin]
                first = last

    def _value(self, entry: int, raw: bytes | None) -> dict[str, Any] | None:
        if raw is None:
            size = int(self._layout.ends[entry] - self._layout.starts[entry])
            found = f"a record of {megabytes(size)}; at most {megabytes(MAX_RECORD_BYTES)} are read."
            raise NotARecord(found, self._if_too_long)
        return self._parse(entry, raw)

    def _bad(self, entry: int, problem: NotARecord) -> Bad:
        where = f"{self.name}:{self.line(entry) + problem.line}"
        fine = self._fine_before(entry) if problem.counts else ""
        return Bad(entry, f"{where}: {problem.found} {fine}{problem.advice}")

    def _fine_before(self, entry: int) -> str:
        """The same in whatever slices the file is read, and no slower than reading a slice."""
        if not self.random_access or self._layout.starts[entry] > COUNTED_BYTES:
            return ""
        first_bad, count = self._first_bad
        if entry != first_bad or count == 0:
            return ""
        return f"{count:,} records before it are fine. " if count > 1 else "The record before it is fine. "

    @cached_property
    def _first_bad(self) -> tuple[int, int]:
        """The first bad entry, and the number of records before it."""
        count = 0
        with self._content.opened() as fetch:
            for entry, raw in self._raw(fetch, 0, len(self)):
                try:
                    count += self._value(entry, raw) is not None
                except NotARecord:
                    return entry, count
        raise AssertionError("asked only where an entry is bad")
