"""What a source of records gives: records with their place, and entries that are none, each with its message."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Record:
    """One record and where it stands: `line` counts lines or rows from 1, `entry` the source's entries from 0."""

    source: str
    line: int
    entry: int
    value: dict[str, Any]
    padding: frozenset[str] = frozenset()
    """Fields of structs that were left out of `value`: null in this row of a table and set in others, `tools.description`."""

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Bad:
    """An entry that is no record. `message` is whole: it begins with file and line and says what to do."""

    entry: int
    message: str


class Source(Protocol):
    """One opened file (or hub split), divided into entries that can be read in any slice.

    An entry is a line, an element of an array or a row of a table. A blank line is an entry without a record.
    """

    name: str
    """As messages name it: the file's path, or hub:owner/name:split."""

    fingerprint: str
    """Of the content alone: 32 hex digits."""

    random_access: bool
    """True if any single entry can be read at once, whatever comes before it."""

    def __len__(self) -> int: ...

    def line(self, entry: int) -> int:
        """The line, or row, where an entry begins, from 1."""
        ...

    def cuts(self, pieces: int) -> list[int]:
        """Entries that cut the source into at most so many slices of about equal work: [0, ..., len(self)]."""
        ...

    def read(self, start: int, stop: int) -> Iterator[Record | Bad]:
        """The records of entries `start` to `stop`, in order, in bounded memory."""
        ...


def even_cuts(entries: int, pieces: int) -> list[int]:
    """Cut `entries` into at most `pieces` slices of equal number."""
    pieces = max(1, min(pieces, entries))
    return [entries * piece // pieces for piece in range(pieces + 1)]


def is_inside(path: Path, folder: Path) -> bool:
    """True if `path`, with its links followed, lies in `folder`."""
    return path.resolve().is_relative_to(folder.resolve())
