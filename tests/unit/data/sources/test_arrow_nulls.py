"""Tables give every struct the fields of all rows. What a row lacks is left out again, as JSON Lines have it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest
from pyarrow import parquet

from ds_recipes.data.sources.record import Record
from tests.unit.data.sources.kinds import everything, opened

Rows = list[dict[str, Any]]


def write_arrow(path: Path, rows: Rows) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_datasets(path: Path, rows: Rows) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset(pyarrow.Table.from_pylist(rows)).to_parquet(path)


def save(path: Path, rows: Rows) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset(pyarrow.Table.from_pylist(rows)).map(lambda row: row, batch_size=2).save_to_disk(path)


def save_json(path: Path, rows: Rows) -> None:
    """As the hub's JSON files are read: `datasets` keeps objects whose fields differ as JSON."""
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.disable_progress_bars()
    datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(path) + ".cache").save_to_disk(
        path
    )


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "arrow.parquet": write_arrow,
    "datasets.parquet": write_datasets,
    "pandas.parquet": lambda path, rows: pandas.DataFrame(rows).to_parquet(path),
    "saved": save,
    "saved_json": save_json,
}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def tool(name: str, **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


NUMBER, TEXT = {"type": "number"}, {"type": "string"}
PLAN = {"steps": [{"do": "x"}, {"wait": 3}, None], "at": {"day": 1, "hour": {"zone": "UTC"}}}
CALLS: Rows = [
    {"messages": [call("weather", {"city": "Paris"}), call("mul", {"a": 2, "b": 3})], "tools": [tool("mul", a=NUMBER)]},
    {
        "messages": [call("now", {}), {"role": "tool", "content": "12:00", "name": "now"}],
        "tools": [tool("now"), tool("a", a=NUMBER | {"enum": [1]})],
    },
    {"messages": [call("plan", PLAN)], "tools": []},
    {
        "messages": [call("plan", {"steps": [], "at": {"day": 2}})],
        "tools": [tool("now", at=TEXT | {"format": {"kind": "hour"}})],
    },
]


def values(path: Path) -> Rows:
    return [found.value for found in everything(opened(path)) if isinstance(found, Record)]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_what_the_same_rows_are_as_json_lines(tmp_path: Path, name: str) -> None:
    """Calls of other functions, structs in structs, lists of structs with other fields, schemas, messages."""
    WRITERS[name](tmp_path / name, CALLS)
    assert values(tmp_path / name) == CALLS


def test_what_was_left_out_is_named(tmp_path: Path) -> None:
    write_arrow(tmp_path / "data.parquet", CALLS)
    of_calls, _, of_plan, _ = (found.padding for found in everything(opened(tmp_path / "data.parquet")))  # type: ignore[union-attr]
    assert "messages.tool_calls.function.arguments.city" in of_calls
    assert "tools.function.parameters.properties.a.enum" in of_calls
    assert "messages.tool_calls.function.arguments.steps.wait" in of_plan
    assert not [field for field in of_plan if field.startswith("tools")], "there is none"


def test_columns_stay_whatever_they_hold(tmp_path: Path) -> None:
    rows: Rows = [{"text": "a", "meta": None, "n": None}, {"text": None, "meta": {"lang": "en"}, "n": None}]
    write_arrow(tmp_path / "data.parquet", rows)
    assert values(tmp_path / "data.parquet") == rows


NULLS_THAT_ARE_MEANT: dict[str, Rows] = {
    "no row has a value": [{"s": {"unit": None, "city": "Paris"}}, {"s": {"unit": None, "city": "Rome"}}],
    "a default of one schema": [{"s": {"unit": {"default": None, "type": "string"}}}, {"s": {"city": {"type": "string"}}}],
    "elements": [{"s": {"values": [1, None, 3], "more": ["a", None]}}, {"s": {"values": [], "more": [None]}}],
    "texts of JSON": [{"s": {"arguments": '{"unit": null}'}}, {"s": {"arguments": '{"city": null, "a": [null]}'}}],
    "a struct of nulls": [{"s": {"x": None}}, {"s": {"x": None}}],
}  # fmt: skip


@pytest.mark.parametrize("name", NULLS_THAT_ARE_MEANT)
@pytest.mark.parametrize("writer", ["arrow.parquet", "saved"])
def test_nulls_that_are_meant_stay(tmp_path: Path, name: str, writer: str) -> None:
    WRITERS[writer](tmp_path / writer, NULLS_THAT_ARE_MEANT[name])
    assert values(tmp_path / writer) == NULLS_THAT_ARE_MEANT[name]


def test_a_null_that_may_be_another_rows_is_left_out_and_told(tmp_path: Path) -> None:
    """`unit` is null in the first row and no field of the second: a table keeps the two alike."""
    write_arrow(tmp_path / "data.parquet", [{"s": {"city": "Paris", "unit": None}}, {"s": {"a": 1}}])
    first, second = everything(opened(tmp_path / "data.parquet"))
    assert isinstance(first, Record) and isinstance(second, Record)
    assert (first.value, first.padding) == ({"s": {"city": "Paris"}}, {"s.unit", "s.a"})
    assert (second.value, second.padding) == ({"s": {"a": 1}}, {"s.city", "s.unit"})


@pytest.mark.parametrize("large", [False, True])
def test_maps_with_texts_as_keys_are_objects(tmp_path: Path, large: bool) -> None:
    text = pyarrow.large_string() if large else pyarrow.string()
    item = pyarrow.struct([("a", pyarrow.int8()), ("b", pyarrow.int8())])
    pairs = [[("x", {"a": 1}), ("y", None)], [], None]
    columns = {
        "map": pyarrow.array(pairs, pyarrow.map_(text, item)),
        "numbers": pyarrow.array([[(1, {"b": 2})], [], None], pyarrow.map_(pyarrow.int8(), item)),
        "lists": pyarrow.array([[[("k", "v")], None], [], None], pyarrow.large_list(pyarrow.map_(text, text))),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    assert values(tmp_path / "data.parquet") == [
        {"map": {"x": {"a": 1}, "y": None}, "numbers": [(1, {"b": 2})], "lists": [{"k": "v"}, None]},
        {"map": {}, "numbers": [], "lists": []},
        {"map": None, "numbers": None, "lists": None},
    ]


def test_structs_that_repeat_are_read_too(tmp_path: Path) -> None:
    """Encoded as a dictionary, as pandas' categories are, and in lists of a fixed size."""
    kind = pyarrow.struct([("a", pyarrow.int8()), ("b", pyarrow.int8())])
    structs = pyarrow.array([{"a": 1}, {"b": 2}], kind)
    column = pyarrow.FixedSizeListArray.from_arrays(structs, 2)
    parquet.write_table(pyarrow.table({"s": column}), tmp_path / "data.parquet")
    assert values(tmp_path / "data.parquet") == [{"s": [{"a": 1}, {"b": 2}]}]
