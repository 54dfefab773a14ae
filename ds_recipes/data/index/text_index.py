"""The text index of the ancestor, Kotoba-Recipes: .index_cache/NAME.idx beside NAME.jsonl, a byte offset a line.

Its maker leaves out a last line without a newline and does not say so. Such a file is used if every offset is verified to
be the start of a line; what it leaves out is told.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ds_recipes.data.index.entries import Index, are_ranges
from ds_recipes.data.index.kept import Entry, EntryWriter, Ints
from ds_recipes.data.index.raw import BOM, compression_of, reading
from ds_recipes.data.published import CACHE_NAME, replacing
from ds_recipes.errors import InputError

DATA_SUFFIX, SUFFIX = ".jsonl", ".idx"
BLOCK_BYTES = 1 << 22
MOST_DIGITS = 18  # fit into 64 bits
NUMBERS_AT_ONCE = 1 << 18


def text_index_of(path: Path) -> Path | None:
    """The text index beside a JSONL file, if there is one."""
    found = path.parent / CACHE_NAME / text_index_name(path)
    return found if path.name.endswith(DATA_SUFFIX) and found.is_file() else None


def text_index_name(path: Path) -> str:
    """What the ancestor calls the text index of a file."""
    return path.name.removesuffix(DATA_SUFFIX) + SUFFIX


def write_text_index(index: Index, target: Path) -> None:
    """Write the starts of all entries of an index as the ancestor reads them; `target` appears whole, or not at all.

    Raises:
        InputError: the index is not of plain JSON Lines, which is all that the ancestor reads; or `target` cannot be
            written.
    """
    if index.is_array or compression_of(index.path):
        raise InputError(f"{index.path}: only plain JSON Lines have a text index. Leave out --text.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            for first in range(0, len(index.starts), NUMBERS_AT_ONCE):
                block = index.starts[first : first + NUMBERS_AT_ONCE].tolist()
                file.write("".join(f"{start}\n" for start in block).encode())
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}). Name another folder.") from error


class Choice:
    """The lines of a file that its text index lists, kept in an entry of the cache."""

    def __init__(self, index: Index, text_index: Path, is_older: bool) -> None:
        self._index, self._text_index, self._is_older = index, text_index, is_older
        self._name = f"{CACHE_NAME}/{text_index.name}"

    def write(self, writer: EntryWriter) -> None:
        """Verify the text index; write the entries that it lists, unless it lists all or is of no use."""
        writer.facts |= {"takes_all": True, "notes": []}
        if self._is_older:
            writer.facts["notes"] = [f"{self._name} is older than {self._index.path.name} and was not used; delete it"]
            return
        try:
            note = self._omissions()
        except _Unusable as problem:
            writer.facts["notes"] = [f"{self._name} was not used: {problem}; delete it"]
            return
        if note is None:
            return
        writer.facts |= {"takes_all": False, "notes": [note]}
        starts, ends, lines = (writer.array(name) for name in ("starts", "ends", "lines"))
        for entries in self._listed():
            starts.append(self._index.starts[entries])
            ends.append(self._index.ends[entries])
            lines.append(entries + 1)

    def is_held_by(self, entry: Entry) -> bool:
        """Is what an entry holds such a choice of this file?"""
        facts, arrays = entry.facts, entry.arrays
        if not all(isinstance(note, str) for note in facts["notes"]):
            return False
        if facts["takes_all"]:
            return True
        return are_ranges(arrays["starts"], arrays["ends"], arrays["lines"], int(self._index.ends[-1]))

    def applied(self, entry: Entry) -> Index:
        """The index of the chosen lines alone."""
        index = replace(self._index, notes=tuple(entry.facts["notes"]))
        if entry.facts["takes_all"]:
            return index
        arrays = entry.arrays
        return replace(index, starts=arrays["starts"], ends=arrays["ends"], lines=arrays["lines"])

    def _omissions(self) -> str | None:
        """Read it all; say what it leaves out.

        Raises:
            _Unusable: it is no text index of this file.
        """
        count, first_missing = 0, -1
        for entries in self._listed():
            away = np.flatnonzero(entries != np.arange(count, count + len(entries)))
            if first_missing < 0 and len(away):
                first_missing = count + int(away[0])
            count += len(entries)
        if count == 0:
            raise _Unusable("it lists no line")
        missing = len(self._index.starts) - count
        if missing == 0:
            return None
        line = (count if first_missing < 0 else first_missing) + 1
        lines = f"{missing:,} line{'s' * (missing > 1)}"
        first = f"the first is line {line:,}"
        return f"{self._name} leaves out {lines} of {self._index.path.name}, {first}; delete it to use them all"

    def _listed(self) -> Iterator[Ints]:
        """The entries whose starts are listed, block by block.

        Raises:
            _Unusable: an offset is no number, not the start of a line, or not above the one before it.
        """
        starts, before, number = self._index.starts, -1, 0
        for offsets in _offsets(self._text_index):
            if number == 0 and offsets[0] == 0 and starts[0] == len(BOM):
                offsets[0] = starts[0]  # the ancestor does not know of a byte order mark
            entries = np.searchsorted(starts, offsets)
            strays = starts[np.minimum(entries, len(starts) - 1)] != offsets
            wrong = strays | (np.diff(offsets, prepend=before) <= 0)
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                what = "not the start of a line" if strays[at] else "not above the one before it"
                raise _Unusable(f"its line {number + at + 1:,}, {offsets[at]}, is {what}")
            yield entries
            before, number = int(offsets[-1]), number + len(offsets)


class _Unusable(Exception):
    """What is wrong with a text index, as it completes "it was not used: "."""


def _offsets(text_index: Path) -> Iterator[Ints]:
    """The numbers in the file, block by block, each block with one at least."""
    number = 0
    with reading(text_index), text_index.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            words = (block + file.readline(MOST_DIGITS + 2)).splitlines()
            for at, word in enumerate(words):
                if not word.isdigit() or len(word) > MOST_DIGITS:
                    raise _Unusable(f"its line {number + at + 1:,} is no byte offset")
            yield np.array(list(map(int, words)), np.int64)
            number += len(words)
