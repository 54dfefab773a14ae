"""Rows of Arrow tables as records. Parquet files and data sets of `datasets` both come through here."""

from collections.abc import Iterator
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


def records_of(source: str, entry: int, table: "pyarrow.Table") -> Iterator[Record | Bad]:
    """Each row of a table whose first row is `entry` of the source.

    Arrow checks neither its offsets nor its UTF-8 when it reads a file, so each table is validated first.
    """
    rows = _rows(table) if table.nbytes <= BATCH_BYTES else None
    json_columns = {
        name: kind for name, kind in zip(table.column_names, table.schema.types, strict=True) if _has_json(kind)
    }
    for row in range(len(table)):
        number = entry + row
        try:
            value = rows[row] if rows is not None else _row(table.slice(row, 1))
            for name, kind in json_columns.items():
                value[name] = _from_json(kind, value[name], name)
        except NotARecord as problem:
            yield Bad(number, f"{source}:{number + 1}: {problem.found} {problem.advice}")
        else:
            yield Record(source, number + 1, number, value)


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


def _has_json(kind: "pyarrow.DataType") -> bool:
    from pyarrow import JsonType

    return isinstance(kind, JsonType) or any(_has_json(kind.field(i).type) for i in range(kind.num_fields))


def _from_json(kind: "pyarrow.DataType", value: Any, name: str) -> Any:
    """`value` of a column, with the JSON texts in it parsed: so `datasets` keeps objects whose fields differ."""
    from pyarrow import JsonType, types

    if value is None or not _has_json(kind):
        return value
    if isinstance(kind, JsonType):
        return parse_value(value.encode("utf-8"), f"column {quoted(name)}", FIX)
    if types.is_struct(kind):
        return {field.name: _from_json(field.type, value[field.name], name) for field in kind}
    if types.is_map(kind):
        return [(key, _from_json(kind.item_type, item, name)) for key, item in value]
    return [_from_json(kind.value_type, item, name) for item in value]
