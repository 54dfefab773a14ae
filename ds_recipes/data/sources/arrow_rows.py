"""Rows of Arrow tables as records. Parquet files and data sets of `datasets` both come through here."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ds_recipes.data.index.raw import MAX_RECORD_BYTES
from ds_recipes.data.sources.json_text import parse_value
from ds_recipes.data.sources.messages import NotARecord, first_line, megabytes, quoted
from ds_recipes.data.sources.record import Bad, Record

if TYPE_CHECKING:
    import pyarrow

BATCH_BYTES = 1 << 25
"""Turned into Python objects at once, which take several times as much."""

BATCH_ROWS = 1024
FIX = "Fix or remove the row."

_Read = Callable[[Any, set[str]], Any]
"""From a value that is not null to JSON's; adds the fields that it leaves out to the set."""


def records_of(source: str, entry: int, table: "pyarrow.Table") -> Iterator[Record | Bad]:
    """Each row of a table whose first row is `entry` of the source.

    Arrow checks neither its offsets nor its UTF-8 when it reads a file, so each table is validated first. Columns are fields of
    a record whatever they hold; within them a row is as JSON Lines would have it, see `_reader`.
    """
    rows = _rows(table) if table.nbytes <= BATCH_BYTES else None
    readers = {
        name: read
        for name, kind in zip(table.column_names, table.schema.types, strict=True)
        if (read := _reader(kind, name)) is not None
    }
    for row in range(len(table)):
        number, padding = entry + row, set[str]()
        try:
            value = rows[row] if rows is not None else _row(table.slice(row, 1))
            for name, read in readers.items():
                if value[name] is not None:
                    value[name] = read(value[name], padding)
        except NotARecord as problem:
            yield Bad(number, f"{source}:{number + 1}: {problem.found} {problem.advice}")
        else:
            yield Record(source, number + 1, number, value, frozenset(padding))


def batch_rows(num_rows: int, num_bytes: int) -> int:
    """How many rows of a table of this size are read at once."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(num_bytes, 1)))


def _rows(table: "pyarrow.Table") -> list[dict[str, Any]] | None:
    """All rows at once, which is fast; None if a value of any of them cannot be read."""
    from pyarrow import ArrowException

    try:
        table.validate(full=True)
        rows: list[dict[str, Any]] = table.to_pylist()
    except (ArrowException, ValueError, OverflowError):
        return None
    return rows


def _row(row: "pyarrow.Table") -> dict[str, Any]:
    from pyarrow import ArrowException

    if row.nbytes > MAX_RECORD_BYTES:
        found = f"a row of {megabytes(row.nbytes)}; at most {megabytes(MAX_RECORD_BYTES)} are read."
        raise NotARecord(found, "Split or remove it.")
    value = {}
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            column.validate(full=True)
            value[name] = column.to_pylist()[0]
        except (ArrowException, ValueError, OverflowError) as error:
            raise NotARecord(f"column {quoted(name)} cannot be read ({first_line(error)}).", FIX) from error
    return value


def _reader(kind: "pyarrow.DataType", place: str) -> _Read | None:
    """How to turn Python values of an Arrow type into those that JSON Lines would give; None if they are so already.

    JSON texts are parsed, as `datasets` keeps objects whose fields differ. A struct has the fields of all rows, null where
    a row has none: those are left out. A field whose type is null has no value in any row, so somebody wrote its nulls: they
    stay, unless the struct lacks other fields in this row, which makes it likely that it lacks this one too.
    """
    from pyarrow import BaseExtensionType, JsonType, types

    if isinstance(kind, JsonType):
        return lambda value, _: parse_value(value.encode("utf-8"), f"column {quoted(place)}", FIX)
    if isinstance(kind, BaseExtensionType):
        return _reader(kind.storage_type, place)
    if types.is_dictionary(kind):
        return _reader(kind.value_type, place)
    if types.is_struct(kind):
        return _reader_of_structs(kind, place)
    if types.is_map(kind):
        return _reader_of_maps(kind, place)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_list_view(kind):
        return _reader_of_lists(kind, place)
    return None


def _reader_of_lists(kind: "pyarrow.ListType", place: str) -> _Read | None:
    read = _reader(kind.value_type, place)
    if read is None:
        return None
    return lambda items, padding: [item if item is None else read(item, padding) for item in items]


def _reader_of_structs(kind: "pyarrow.StructType", place: str) -> _Read:
    from pyarrow import types

    typed = [field.name for field in kind if not types.is_null(field.type)]
    places = {field.name: f"{place}.{field.name}" for field in kind}
    readers = {field.name: reader for field in kind if (reader := _reader(field.type, places[field.name]))}

    def read(struct: dict[str, Any], padding: set[str]) -> dict[str, Any]:
        missing: set[str] = set()
        if any(struct[name] is None for name in typed):
            missing = {name for name, value in struct.items() if value is None}
            padding.update(map(places.__getitem__, missing))
        return {
            name: readers[name](value, padding) if name in readers and value is not None else value
            for name, value in struct.items()
            if name not in missing
        }

    return read


def _reader_of_maps(kind: "pyarrow.MapType", place: str) -> _Read:
    """A map with texts as keys is JSON's object; it has the keys of its own row alone."""
    from pyarrow import types

    read_item = _reader(kind.item_type, place)

    def read(pairs: list[tuple[Any, Any]], padding: set[str]) -> list[tuple[Any, Any]]:
        return [(key, item if item is None or read_item is None else read_item(item, padding)) for key, item in pairs]

    if any(is_text(kind.key_type) for is_text in (types.is_string, types.is_large_string, types.is_string_view)):
        return lambda pairs, padding: dict(read(pairs, padding))
    return read
