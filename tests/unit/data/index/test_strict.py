"""Faults are counted as Python's own decoder and parser see them, wherever the borders of chunks fall."""

import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_recipes.data.index import strict
from ds_recipes.data.index.cache import open_index
from ds_recipes.data.index.strict import Fault, StrictReport, check_lines, is_utf8
from tests.unit.data.index.made import BOM, PACKERS, contents, lines_of, open_beside, write

MB = 1_000_000
PIECES = [
    *(bytes([byte]) for byte in b"a\n\x00\x80\xbf\xc0\xc1\xe3\xed\xf0\xf4\xf5\xff"),
    *("é日🎌\ud800\udfff".encode("utf-8", "surrogatepass")[at : at + 3] for at in range(12)),
    b"\xf4\x90\x80\x80",  # above U+10FFFF
    b"\xe0\x80\xaf",  # overlong
]


def text_faults(content: bytes) -> list[int]:
    """Lines that are not UTF-8 or hold a NUL byte."""
    return [number for number, line in enumerate(content.split(b"\n"), 1) if not is_text(line)]


def is_text(line: bytes) -> bool:
    try:
        return "\0" not in line.decode("utf-8")
    except UnicodeDecodeError:
        return False


def json_faults(content: bytes) -> list[int]:
    found = []
    for start, end, number in lines_of(content):
        line = content[start:end].strip()
        if line and is_text(line):
            try:
                is_fine = isinstance(json.loads(line), dict)
            except ValueError:
                is_fine = False
            found += [] if is_fine else [number]
    return found


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join))
def test_utf8_is_what_python_says_it_is(data: bytes) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        assert not is_utf8(data)
    else:
        assert is_utf8(data)


@settings(deadline=None, max_examples=60)
@given(contents(), st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join), st.integers(4, 40), st.booleans())
@example(b"{", "日".encode() * 9 + b"\n" + "🎌".encode() * 9, 4, False)
@example(b"{", b"\xe3" + b"\x81" * 40, 5, False)
def test_faults_are_those_of_the_lines_one_by_one(content: bytes, more: bytes, chunk_bytes: int, packed: bool) -> None:
    content += more
    with tempfile.TemporaryDirectory() as name:
        index = open_beside(write(Path(name) / "a.jsonl", PACKERS["zstd"](content) if packed else content))
        text, both = check_lines(index, False, None, chunk_bytes), check_lines(index, True, None, chunk_bytes)
    expected = text_faults(content)
    assert ([fault.line for fault in text.first], text.num_faults) == (expected[:10], len(expected))
    expected = sorted(expected + json_faults(content))
    assert ([fault.line for fault in both.first], both.num_faults) == (expected[:10], len(expected))


LINES = [
    (b'{"a": 1}', None),
    (b"  ", None),
    (b'{"a": 1}\r', None),
    (b'{"a": "\\ud83c\\udf8c"}', None),
    (b'{"a": "\\\\ud83c"}', None),
    (b'{"t', "not JSON (Unterminated string starting at character 2)"),
    (b"null", "not a JSON object"),
    (b'{"a": "\\ud83c"}', r"holds half of a surrogate pair (\ud83c), which is no character"),
    (b'{"\\uDC00": 1}', r"holds half of a surrogate pair (\udc00), which is no character"),
    (b'{"a": "\xff"}', "not UTF-8 (byte 0xff: invalid start byte)"),
    (b'{"a": "\xed\xa0\x80"}', "not UTF-8 (byte 0xed: invalid continuation byte)"),
    (b'{"a": "\x00"}', "holds a NUL byte"),
    (b'{"a":' * 10_000, "not JSON (nested too deeply)"),
    (b'{"a": %s}' % (b"9" * 5000), "not JSON (Exceeds the limit (4300 digits)"),
]  # fmt: skip


@pytest.mark.parametrize("first", [b"", BOM + b"{}\n"])
@pytest.mark.parametrize(("line", "what"), LINES)
def test_each_fault_is_said(tmp_path: Path, line: bytes, what: str | None, first: bytes) -> None:
    report = check_lines(open_beside(write(tmp_path / "a.jsonl", first + line + b'\n{"b": 2}')), with_json=True)
    if what is None:
        assert report == StrictReport(0, ())
    else:
        assert report.num_faults == 1 and report.first[0].line == 1 + bool(first)
        assert report.first[0].what.startswith(what)


def test_ten_of_many_faults_are_named(tmp_path: Path) -> None:
    content = b"".join([b"{}\n", b"\xff\n", b"1\n"][i % 3] for i in range(90))
    report = check_lines(open_beside(write(tmp_path / "a.jsonl", content)), with_json=True)
    assert report.num_faults == 60
    assert [fault.line for fault in report.first] == [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]


def test_elements_of_arrays_are_checked_at_their_lines(tmp_path: Path) -> None:
    index = open_beside(write(tmp_path / "a.json", b'[{"a": 1},\n\n5, {"a":\n"\\ud800"}]'))
    first = (
        Fault(3, r"holds half of a surrogate pair (\ud800), which is no character"),
        Fault(3, "not a JSON object"),
    )
    report = check_lines(index, with_json=True)
    assert set(report.first) == set(first) and report.num_faults == 2


def test_a_line_beyond_the_limit_is_a_fault_and_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "MAX_RECORD_BYTES", 30 * MB)
    index = open_beside(write(tmp_path / "a.jsonl", b'{}\n"' + b"a" * (60 * MB) + b'"\n1\n'))
    tracemalloc.start()
    try:
        report = check_lines(index, True, None, 1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.first == (Fault(2, "is 57 MiB long; at most 28 are read"), Fault(3, "not a JSON object"))
    assert peak < 30 * MB


def test_progress_runs_to_the_end_of_each_check(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"{}\n" * 100_000)
    calls: list[tuple[int, int]] = []
    check_lines(open_index(path, tmp_path), True, lambda *numbers: calls.append(numbers), 1 << 16)
    assert calls.count((300_000, 300_000)) == 2
    assert all(0 < done <= total == 300_000 for done, total in calls)
