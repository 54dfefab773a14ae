"""CSV files are divided as Python's csv module divides them, and any row can be read without those before it."""

import csv
import gzip
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.sources.csv_layout import find_rows
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError
from tests.unit.data.sources.kinds import bad_messages, everything, opened

FIX = "Fix or remove the row."

pieces = st.lists(st.sampled_from(["a", '"', '""', ",", "\n", "\r\n", ' "', ',"', '\n"', "日"]), max_size=30)
"""Pieces of text that are joined into files, most of which nobody would write."""


def divided(text: str) -> tuple[list[int], list[int]]:
    """(where each row begins and the last one ends, the line of each row), told by the csv module: the slow plain way."""
    lines = io.StringIO(text, newline="").readlines()
    reader = csv.reader(lines)
    starts, rows = [0], [1]
    for _ in reader:
        starts.append(len("".join(lines[: reader.line_num]).encode()))
        rows.append(reader.line_num + 1)
    return starts, rows[:-1]


@settings(deadline=None, max_examples=400)
@given(pieces, st.sampled_from([1, 2, 3, 7, 1 << 22]))
def test_rows_are_those_of_the_csv_module(text_pieces: list[str], block_bytes: int) -> None:
    text = "".join(text_pieces)
    if not text:
        return
    data = text.encode()
    found = list(find_rows((data[at : at + block_bytes] for at in range(0, len(data), block_bytes)), 0))
    starts, lines = ([int(value) for piece in found for value in piece[part]] for part in (0, 1))
    assert (starts, lines[:-1]) == divided(text)


@settings(deadline=None, max_examples=40)
@given(pieces)
def test_every_row_is_what_dictreader_reads_or_is_bad(text_pieces: list[str]) -> None:
    text = "one,two\n" + "".join(text_pieces) + "\na,b\n"
    rows = [
        row for row in csv.DictReader(io.StringIO(text, newline="")) if None not in row and None not in row.values()
    ]
    with tempfile.TemporaryDirectory() as folder:
        source = opened(Path(folder) / "data.csv", text.encode())
        found = everything(source)
        alone = [one for entry in range(len(source)) for one in source.read(entry, entry + 1)]
    assert alone == found
    values = [one.value for one in found if isinstance(one, Record)]
    unclosed = sum("never closed" in one.message for one in found if not isinstance(one, Record))
    assert values == rows[: len(rows) - unclosed] or (unclosed and values == rows)


def test_names_lines_across_quoted_newlines(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    found = everything(opened(path, b'\xef\xbb\xbfa,b\r\n"x\r\ny",1\r\n\r\n"""q""",2\r\n'))
    assert found == [
        Record(str(path), 2, 0, {"a": "x\r\ny", "b": "1"}),
        Record(str(path), 5, 2, {"a": '"q"', "b": "2"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n3\n", "{path}:3: has 1 of the 2 cells that the header names. The record before it is fine. " + FIX),
        (b"a,b\n1,2,3\n", "{path}:2: has 3 cells, but the header names only 2. " + FIX),
        (b'a,b\n1,"2\n3,4\n', "{path}:2: a double quote that opens a cell in this row is never closed. " + FIX),
        (b'a,b\n"1\n\xff",2\n', "{path}:3: not UTF-8 (byte 0xff at byte 4 of the row). "
         "Convert the file to UTF-8, or remove the row."),
        (b"a,b\n1\r2,3\n", "{path}:2: a carriage return stands outside of quotes. Write line ends as \\n or \\r\\n."),
    ],
)  # fmt: skip
def test_names_a_bad_row_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.csv"
    assert bad_messages(opened(path, content)) == [message.format(path=path)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{path}: is empty."),
        (b"a,b\n", "{path}: holds no records, only a header. Name a file with rows."),
        (b"\na,b,a\n1,2,3\n", "{path}:2: the header names 'a' more than once. Rename the fields."),
        (b"a,b\r1,2\r", "{path}:1: a carriage return stands outside of quotes. Write line ends as \\n or \\r\\n."),
        (b"a,\xff\n1,2\n", "{path}:1: not UTF-8 (byte 0xff at byte 3 of the row)."),
        (gzip.compress(b"a,b\n1,2\n", mtime=0), "{path}: is a CSV file compressed with gzip. Unpack it."),
        (b"\xff\xfea\x00", "{path}: is UTF-16. Convert it to UTF-8."),
    ],
)
def test_refuses_a_file_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.csv"
    with pytest.raises(InputError) as caught:
        opened(path, content)
    assert str(caught.value).startswith(message.format(path=path))


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    header = ",".join(f"field {i}" for i in range(1000))
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "data.csv", f"{header},{header}\n1\n".encode())
    assert "'field 7' and 992 more more than once" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_rows_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.csv"
    first = opened(path, b"a,b\n1,2\n3,4\n")
    monkeypatch.setattr("ds_recipes.data.sources.csv_rows.find_rows", None)
    again = opened(path)
    assert everything(again) == everything(first)
    assert again.fingerprint == first.fingerprint
