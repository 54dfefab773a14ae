"""Parquet files: rows of any nesting, row groups read in part, and files that are damaged, named with what is wrong."""

import datetime
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ds_recipes.data.sources import arrow_rows, tables
from ds_recipes.data.sources.record import Bad, Record
from ds_recipes.errors import InputError
from tests.unit.data.sources.kinds import bad_messages, everything, opened


def write(path: Path, columns: dict[str, Any] | pyarrow.Table, **options: Any) -> Path:
    parquet.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), path, **options)
    return path


def test_values_are_plain_python(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "日本"}, {"role": "assistant", "content": ""}], [], None]
    columns = {
        "messages": turns,
        "n": [1, None, 3],
        "raw": [b"a", b"\xff", None],
        "day": [datetime.date(2024, 2, 29)] * 3,
        "pairs": pyarrow.array([[("k", 1)], [], None], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
    }
    source = opened(write(tmp_path / "data.parquet", columns))
    assert [found.value for found in everything(source) if isinstance(found, Record)] == [
        {name: value[i] if name != "pairs" else [{"k": 1}, {}, None][i] for name, value in columns.items()}
        for i in range(3)
    ]  # fmt: skip


def test_columns_of_json_are_parsed(tmp_path: Path) -> None:
    """So `datasets` keeps values whose fields differ from row to row, alone and in lists."""
    texts = pyarrow.array(['{"a": 1}', None, "[2]", "{a}"])
    column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), texts)
    lists = pyarrow.ListArray.from_arrays([0, 2, 3, 3, 3], pyarrow.ExtensionArray.from_storage(pyarrow.json_(), texts))
    source = opened(write(tmp_path / "data.parquet", pyarrow.table({"one": column, "many": lists})))
    found = everything(source)
    assert [one.value for one in found[:3] if isinstance(one, Record)] == [
        {"one": {"a": 1}, "many": [{"a": 1}, None]},
        {"one": None, "many": [[2]]},
        {"one": [2], "many": []},
    ]
    assert bad_messages(source) == [
        f"{source.name}:4: not JSON (Expecting property name enclosed in double quotes at character 2: '{{a}}'). "
        "Fix or remove the row."
    ]


@pytest.mark.parametrize("group_bytes", [1, tables.GROUP_BYTES])
@pytest.mark.parametrize("batch_rows", [3, 1024])
def test_any_slice_over_row_groups_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int, batch_rows: int
) -> None:
    monkeypatch.setattr(tables, "GROUP_BYTES", group_bytes)
    monkeypatch.setattr(arrow_rows, "BATCH_ROWS", batch_rows)
    source = opened(write(tmp_path / "data.parquet", {"n": list(range(100))}, row_group_size=17))
    assert source.random_access == (group_bytes > 1)
    draw = random.Random(0)
    for _ in range(60):
        start, stop = sorted(draw.choices(range(101), k=2))
        found = [(one.entry, one.value, one.line) for one in source.read(start, stop) if isinstance(one, Record)]
        assert found == [(i, {"n": i}, i + 1) for i in range(start, stop)]


def test_cuts_prefer_the_borders_of_row_groups(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "data.parquet", {"n": list(range(100))}, row_group_size=17))
    assert source.cuts(2) == [0, 51, 100]
    assert source.cuts(100) == list(range(101))


def test_a_value_that_cannot_be_read_is_bad_alone(tmp_path: Path) -> None:
    not_utf8 = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])),
                              pyarrow.py_buffer(b"a\xffb")]
    )  # fmt: skip
    far = pyarrow.array([0, 0, 2**60], pyarrow.timestamp("us"))
    source = opened(write(tmp_path / "data.parquet", {"text": not_utf8, "far": far}))
    found = everything(source)
    assert [isinstance(one, Bad) for one in found] == [False, True, True]
    assert bad_messages(source)[0].startswith(f"{source.name}:2: column 'text' cannot be read (")
    assert bad_messages(source)[1].startswith(f"{source.name}:3: column 'far' cannot be read (")


def test_a_row_that_is_too_long_is_bad_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_rows, "MAX_RECORD_BYTES", 5_000_000)
    monkeypatch.setattr(arrow_rows, "BATCH_BYTES", 5_000_000)
    source = opened(write(tmp_path / "data.parquet", {"text": ["a", "b" * 6_000_000, "c"]}))
    assert [getattr(one, "value", None) for one in everything(source)] == [{"text": "a"}, None, {"text": "c"}]
    assert bad_messages(source) == [
        f"{source.name}:2: a row of 6 MB; at most 5 MB are read. Split or remove it.",
    ]


def test_a_group_that_is_much_larger_than_it_says_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that repeat are stored once, so little can become very much."""
    monkeypatch.setattr(tables, "KEPT_BYTES", 1_000_000)
    path = write(tmp_path / "data.parquet", {"text": ["a" * 10_000] * 1000})
    assert path.stat().st_size < 100_000
    source = opened(path)
    tables._decoded.cache_clear()
    assert [len(one.value["text"]) for one in source.read(500, 502) if isinstance(one, Record)] == [10_000] * 2
    assert tables._decoded.cache_info().currsize == 1


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", {"n": list(range(1000)), "text": ["abc"] * 1000}, row_group_size=100)
    whole = path.read_bytes()
    for content in (b"PAR1", whole[:-20], whole[: len(whole) // 2], b"{}" * 100):
        with pytest.raises(InputError, match=r"data\.parquet: is not a whole Parquet file \("):
            opened(path, content)
    with pytest.raises(InputError, match=r"data\.parquet: row group 0 \(rows 1 to 100\) cannot be read \("):
        everything(opened(path, whole[:4] + b"\xff" * 200 + whole[204:]))
    with pytest.raises(InputError, match=r"data\.parquet: holds no records\."):
        opened(write(tmp_path / "data.parquet", {"n": pyarrow.array([], pyarrow.int8())}))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    with pytest.raises(InputError, match=r"has several columns named 'a'\. Rename them\."):
        opened(write(tmp_path / "data.parquet", twice))


def test_a_parquet_file_may_be_called_anything(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(write(tmp_path / "data.parquet", {"n": [1]}).read_bytes())
    assert [one.value for one in everything(opened(tmp_path / "data")) if isinstance(one, Record)] == [{"n": 1}]
