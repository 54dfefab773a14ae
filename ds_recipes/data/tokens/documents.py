"""All documents of one data path, as tokens: lengths and targets in memory maps, ids from wherever they are kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_recipes.data.array_files import map_array
from ds_recipes.data.formats.remarks import Counts
from ds_recipes.data.tokens.files import OpenFiles
from ds_recipes.data.tokens.ids import Ids

Ints = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Table:
    """What is kept of every document, in their order; memory maps, so opening costs the same for any number."""

    offsets: Ints  # int64 [documents + 1], where its tokens begin
    span_offsets: Ints  # int64 [documents + 1]
    spans: Ints  # int32 [spans, 2], positions in the own document
    hashes: Ints  # uint64 [documents]
    entries: Ints  # int64 [documents], in the file
    slices: Ints  # int64 [slices, 2]: first document, number of the file

    @classmethod
    def open(cls, folder: Path) -> "Table":
        """Map the arrays of a store's folder `documents/`."""
        return cls(*(map_array(folder / f"{name}.npy") for name in cls.__dataclass_fields__))

    def place(self, document: int) -> tuple[int, int]:
        """The file's number and the entry that a document came from."""
        at = int(np.searchsorted(self.slices[:, 0], document, side="right")) - 1
        return int(self.slices[at, 1]), int(self.entries[document])


@dataclass(frozen=True)
class Origin:
    """Where documents come from, and what could not be used of it."""

    name: str  # the data path as written
    fingerprint: str  # of content, tokenizer and format
    num_bad: int
    first_bad: tuple[str, ...]  # the first ten messages
    num_left_out: int
    notes: tuple[str, ...]
    remarks: Counts


class Documents:
    """Documents laid end to end. Token `i` of a document is a target if one of its spans [start, stop) holds `i`.

    Any number of threads may read it. `folder` is the store's; packings are kept in it.
    """

    def __init__(self, folder: Path, origin: Origin, opened: OpenFiles, table: Table, ids: Ids) -> None:
        self.folder = folder
        self.name = origin.name
        self.fingerprint = origin.fingerprint
        self.num_bad, self.first_bad = origin.num_bad, origin.first_bad
        self.num_left_out = origin.num_left_out
        self.notes, self.remarks = origin.notes, origin.remarks
        self.files = tuple((file.name, file.fingerprint) for file in opened.files)
        self.offsets = table.offsets
        self.span_offsets = table.span_offsets
        self.spans = table.spans
        self.hashes = table.hashes
        self._table = table
        self._opened = opened
        self._ids = ids

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def lengths(self) -> Ints:
        """Tokens of each document, made anew at each call: int64 [documents]."""
        return np.diff(self.offsets)

    def tokens(self, document: int) -> Ints:
        """A document's token ids: [its tokens]."""
        return self._ids.tokens(document)

    def spans_of(self, document: int) -> Ints:
        """The learned stretches of a document: int32 [spans, 2]."""
        return self.spans[int(self.span_offsets[document]) : int(self.span_offsets[document + 1])]

    def where(self, document: int) -> str:
        """The file and line that a document came from."""
        file, entry = self._table.place(document)
        return f"{self._opened.files[file].name}:{self._opened.entries(file).line(entry)}"
