"""CSV files: where each row lies is found once and kept, so that any row can be read at once."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_recipes.data.index.cache import Progress, file_fingerprint
from ds_recipes.data.index.kept import Entry, EntryWriter, FileState, Place
from ds_recipes.data.index.raw import MAX_RECORD_BYTES, open_raw, reading, shape_of
from ds_recipes.data.sources.content import PlainContent
from ds_recipes.data.sources.csv_layout import ends_in_quotes, find_rows
from ds_recipes.data.sources.entries import ByteEntries, Layout
from ds_recipes.data.sources.messages import NotARecord, first_line, named, not_utf8
from ds_recipes.data.sources.record import Bad
from ds_recipes.errors import InputError, NoRecordsError

BLOCK_BYTES = 1 << 22
FIX = "Fix or remove the row."
IF_TOO_LONG = "Perhaps a double quote that opens a cell is never closed; fix or remove the row."


def open_csv(path: Path, cache: Path, progress: Progress | None = None) -> ByteEntries:
    """Open a CSV file in UTF-8; its first row names the fields, and no other row is parsed yet.

    Raises:
        InputError: it is compressed or no text, holds no rows, or its first row cannot name fields.
    """
    shape = shape_of(path)
    if shape.compression is not None:
        raise InputError(f"{path}: is a CSV file compressed with {shape.compression}. Unpack it.")
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    content = PlainContent(path)
    fingerprint = file_fingerprint(path, cache, progress)
    rows = _find_rows(path, shape.body, cache, progress)
    header, fields = _header(path, content, rows)
    assert rows.lines is not None
    layout = Layout(rows.starts[header + 1 :], rows.ends[header + 1 :], rows.lines[header + 1 :])
    if len(layout.starts) == 0:
        raise NoRecordsError(f"{path}: holds no records, only a header. Name a file with rows.")
    parse = RowParser(fields, last_entry=len(layout.starts) - 1)
    return ByteEntries(str(path), fingerprint, content, layout, parse, IF_TOO_LONG)


class RowParser:
    """Reads one row as the fields that the header names."""

    def __init__(self, fields: list[str], last_entry: int) -> None:
        self._fields, self._last_entry = fields, last_entry

    def __call__(self, entry: int, raw: bytes) -> dict[str, Any] | None:
        cells = _cells(raw)
        if not cells:
            return None
        if entry == self._last_entry and ends_in_quotes(raw):
            raise NotARecord("a double quote that opens a cell in this row is never closed.", FIX, counts=True)
        if len(cells) != len(self._fields):
            found = f"has {len(cells):,} of the {len(self._fields):,} cells that the header names."
            if len(cells) > len(self._fields):
                found = f"has {len(cells):,} cells, but the header names only {len(self._fields):,}."
            raise NotARecord(found, FIX, counts=True)
        return dict(zip(self._fields, cells, strict=True))


def _cells(raw: bytes) -> list[str]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, "row") from error
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise NotARecord(f"not CSV ({first_line(error)}).", FIX, counts=True) from error
    if len(rows) > 1:
        raise NotARecord(
            "a carriage return stands outside of quotes.", "Write line ends as \\n or \\r\\n.", counts=True
        )
    return rows[0]


def _header(path: Path, content: PlainContent, rows: Layout) -> tuple[int, list[str]]:
    """The first row that is not blank, and the fields that it names."""
    whole = ByteEntries(str(path), "", content, rows, _header_cells, IF_TOO_LONG)
    first = next(whole.read(0, len(whole)), None)
    assert first is not None, "there is a line that is not blank"
    if isinstance(first, Bad):
        raise InputError(first.message)
    fields = first.value["fields"]
    twice = [name for name, count in Counter(fields).items() if count > 1]
    if twice:
        raise InputError(f"{first.where}: the header names {named(twice)} more than once. Rename the fields.")
    return first.entry, fields


def _header_cells(entry: int, raw: bytes) -> dict[str, Any] | None:
    cells = _cells(raw)
    return {"fields": cells} if cells else None


def _find_rows(path: Path, first_byte: int, cache: Path, progress: Progress | None) -> Layout:
    """All rows, the header too; kept in the cache."""
    state = FileState.of(path)

    def is_good(entry: Entry) -> bool:
        bounds, lines = entry.arrays["bounds"], entry.arrays["lines"]
        return len(bounds) == len(lines) > 1 and int(bounds[0]) == first_byte and int(bounds[-1]) == state.size

    def make(writer: EntryWriter) -> None:
        arrays = writer.array("bounds"), writer.array("lines")
        for piece in find_rows(_blocks(path, first_byte, progress), first_byte):
            for array, values in zip(arrays, piece, strict=True):
                array.append(values)

    entry = Place(cache, "csv-rows", state).opened(is_good, make)
    bounds, lines = entry.arrays["bounds"], entry.arrays["lines"]  # [rows + 1]
    return Layout(bounds[:-1], bounds[1:], lines[:-1])


def _blocks(path: Path, first_byte: int, progress: Progress | None) -> Iterator[bytes]:
    with open_raw(path) as stream:
        stream.seek(first_byte)
        done, size = first_byte, path.stat().st_size
        while True:
            with reading(path):
                block = stream.read(BLOCK_BYTES)
            if not block:
                return
            yield block
            done += len(block)
            if progress is not None:
                progress(done, size)
