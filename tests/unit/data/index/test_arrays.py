"""Elements of JSON arrays are found wherever the window's borders fall, and what is no array is refused at its line."""

import io
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.index import arrays
from ds_recipes.data.index.arrays import scan_array
from ds_recipes.errors import InputError
from tests.unit.data.index.made import BOM, PACKERS, Entries, entries_of, open_beside, write

PATH = Path("data.json")
SPACES = st.text(" \t\r\n", max_size=5)
TEXTS = st.text(max_size=8) | st.sampled_from(['"', "\\", '\\"', "[,]", "{}", "],[", "日本", "🎌", "\n", "\x7f"])
NUMBERS = st.integers() | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
MB = 1_000_000


@st.composite
def arrays_of_json(draw: st.DrawFn) -> tuple[bytes, Entries, list[Any]]:
    """The bytes of an array, its elements' (start, end, line), and their values."""
    written = draw(st.sampled_from([b"", BOM])) + draw(SPACES).encode() + b"["
    values, entries = draw(st.lists(VALUES, min_size=1, max_size=6)), Entries()
    for number, value in enumerate(values):
        written += draw(SPACES).encode()
        indent, is_ascii = draw(st.sampled_from([None, 0, 2])), draw(st.booleans())
        element = json.dumps(value, indent=indent, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
        entries.append((len(written), len(written) + len(element), written.count(b"\n") + 1))
        written += element + draw(SPACES).encode() + (b"," if number < len(values) - 1 else b"]")
    return written + draw(SPACES).encode(), entries, values


def scanned(content: bytes, window_bytes: int) -> Entries:
    body = len(BOM) if content.startswith(BOM) else 0
    return [tuple(element) for element in scan_array(io.BytesIO(content), PATH, body, window_bytes)]


@settings(deadline=None, max_examples=250)
@given(arrays_of_json(), st.integers(1, 60))
def test_elements_are_found_wherever_the_borders_fall(made: tuple[bytes, Entries, list[Any]], window: int) -> None:
    content, entries, _ = made
    assert scanned(content, window) == entries
    assert repr([json.loads(content[start:end]) for start, end, _ in entries]) == repr(
        json.loads(content.decode("utf-8-sig"))
    )


@settings(deadline=None, max_examples=20)
@given(arrays_of_json(), st.sampled_from([None, *PACKERS]))
def test_the_index_of_a_compressed_array_is_that_of_the_plain_one(
    made: tuple[bytes, Entries, list[Any]], packer: str | None
) -> None:
    content, entries, _ = made
    with tempfile.TemporaryDirectory() as name:
        index = open_beside(write(Path(name) / "a.json", PACKERS[packer](content) if packer else content))
    assert index.is_array and entries_of(index) == entries


BAD = [
    (b"[ ]", "{path}: holds no records, only an empty array. Name a file with records."),
    (b"[", "{path}:1: not JSON (Expecting value). Fix the array there."),
    (b'[{"a": 1},\n {"a": }]', "{path}:2: not JSON (Expecting value). Fix the array there."),
    (b'[{"a": 1}\n {"a": 2}]', "{path}:2: not JSON (expected ',' or ']' after an element). Fix the array there."),
    (b'[{"a": 1},\n\n 12 13]', "{path}:3: not JSON (expected ',' or ']' after an element). Fix the array there."),
    (b'[{"a": 1}', "{path}:1: not JSON (expected ',' or ']' after an element). Fix the array there."),
    (b'[{"a": 1},\n', "{path}:2: not JSON (Expecting value). Fix the array there."),
    (b'[{"a": 1},\n]', "{path}:2: not JSON (Expecting value). Fix the array there."),
    (b'[{"a": 1},\n"b', "{path}:2: not JSON (Unterminated string starting at). Fix the array there."),
    (b'[\n"a\nb"]', "{path}:2: not JSON (Invalid control character at). Fix the array there."),
    (b'["a",\n"\\u12g4"]', "{path}:2: not JSON (Invalid \\uXXXX escape). Fix the array there."),
    (b'["a",\n tru]', "{path}:2: not JSON (Expecting value). Fix the array there."),
    (b'[{"a": 1}]\n{"a": 2}', "{path}:1: not JSON (more text after the array's end). Fix the array there."),
    (b'[{"a": 1},\n{"a": "\xff"}]', "{path}:2: not UTF-8 (invalid start byte). Convert the file to UTF-8."),
    (b'[{"a": 1}]\n\n\xe3\x81', "{path}:3: not UTF-8 (unexpected end of data). Convert the file to UTF-8."),
    (b"[1,\n" + b"[" * 99999, "{path}:2: not JSON (nested too deeply). Fix the array there."),
    (b"[1,\n" + b'{"a":' * 10_000, "{path}:2: not JSON (nested too deeply). Fix the array there."),
]  # fmt: skip


@pytest.mark.parametrize("window", [1, 7, 1 << 22])
@pytest.mark.parametrize(("content", "message"), BAD)
def test_what_is_no_array_is_refused_at_its_line(content: bytes, message: str, window: int) -> None:
    with pytest.raises(InputError) as caught:
        scanned(content, window)
    said = str(caught.value)
    if b"\xff" in content or content.endswith(b"\xe3\x81"):  # which fault is seen first depends on the window
        assert said == message.format(path=PATH) or "more text after the array's end" in said
    else:
        assert said == message.format(path=PATH)


@pytest.mark.parametrize("window", range(1, 12))
def test_a_byte_that_is_not_utf8_is_found_at_its_line_wherever_the_borders_fall(window: int) -> None:
    with pytest.raises(InputError, match=r"data\.json:2: not UTF-8 \(invalid start byte\)"):
        scanned('[\n"あ'.encode() + b'\xff\n"]', window)


@settings(deadline=None, max_examples=150)
@given(arrays_of_json(), st.integers(1, 60), st.data())
def test_a_changed_byte_is_refused_or_leaves_json(
    made: tuple[bytes, Entries, list[Any]], window: int, data: st.DataObject
) -> None:
    content = bytearray(made[0])
    content[data.draw(st.integers(made[0].index(b"[") + 1, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        expected = json.loads(content.decode("utf-8-sig"))
    except ValueError:
        expected = []
    try:
        found = [json.loads(content[start:end]) for start, end, _ in scanned(bytes(content), window)]
    except InputError:
        found = []
    assert repr(found) == repr(expected)


def test_numbers_that_are_too_long_are_refused() -> None:
    with pytest.raises(InputError, match=r"data\.json:2: not JSON \(Exceeds the limit"):
        scanned(b"[1,\n" + b"9" * 10_000 + b"]", 100)


def test_an_element_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_RECORD_BYTES", 3 << 20)
    content = b'[{"a": 1},\n"' + b"a" * (20 * MB) + b'"]'
    with pytest.raises(InputError, match=r"data\.json:2: an element of the array is longer than 3 MiB\. Split it\."):
        scanned(content, 1 << 16)


def test_an_array_is_scanned_in_bounded_memory() -> None:
    content = b"[" + b",\n".join(b'{"text": "' + bytes([97 + i % 26]) * 1000 + b'"}' for i in range(40_000)) + b"]"
    tracemalloc.start()
    try:
        count = sum(1 for _ in scan_array(io.BytesIO(content), PATH, 0, 1 << 16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000 and peak < 1 * MB
