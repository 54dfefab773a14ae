"""Records are read from every shape of file that holds them, and anything else is refused with its place."""

from pathlib import Path

import pytest

from ds_recipes.data.records import content_fingerprint, open_records, read_records
from ds_recipes.errors import InputError

GOOD = [
    (b'{"a": 1}\n{"a": 2}\n', [1, 2]),
    (b'{"a": 1}\n{"a": 2}', [1, 2]),
    (b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \t\n{"a": 2}\r\n\r\n', [1, 4]),
    (b'\n\n {"a": 1}\n', [3]),
    (b'[{"a": 1}, {"a": 2}]', [1, 1]),
    (b'\xef\xbb\xbf\n[\n  {"a":\n 1},\r\n  {"a": 2}\n]\n', [3, 5]),
]
FIX = "Fix or remove the line."
FINE = "1,841 records before it are fine. "
ONE_FINE = "The record before it is fine. "
SHAPE = 'A record looks like {{"text": "..."}}; fix or remove it.'
BAD = [
    (b"", "{path}: is empty. Name a file with one JSON object a line, or a JSON array."),
    (b" \n\r\n", "{path}: holds no records, only blank lines. Name a file with one JSON object a line."),
    (b"[ ]", "{path}: holds no records, only an empty array. Name a file with records."),
    (b'{"a": 1}\n\n{"t', "{path}:3: not JSON (line ends after 3 characters: '{{\"t'). " + ONE_FINE + FIX),
    (b'{"a" 1}', "{path}:1: not JSON (Expecting ':' delimiter at character 6: '{{\"a\" 1}}'). " + FIX),
    (b'{"a": 1}\n' * 1841 + b"{", "{path}:1842: not JSON (line ends after 1 character: '{{'). " + FINE + FIX),
    (b'{"a":' * 99999, "{path}:1: not JSON (nested too deeply). " + FIX),
    (b'{"a": 1}\nnull\n', "{path}:2: not a JSON object but null. " + SHAPE),
    (b'{"a": 1}\n[1]\n', "{path}:2: not a JSON object but an array. " + SHAPE),
    (b'[{"a": 1},\n 5]', "{path}:2: not a JSON object but a number. " + SHAPE),
    (b'[{"a": 1},\n {"a": }]', "{path}:2: not JSON (Expecting value). Fix the array there."),
    (b'[{"a": 1}\n {"a": 2}]', "{path}:2: not JSON (expected ',' or ']' after an element). Fix the array there."),
    (b'[{"a": 1}]\n{"a": 2}', "{path}:1: not JSON (more text after the array's end). Fix the array there."),
    (b'{"a": 1}\n{"a": "\xff"}', "{path}:2: not UTF-8 (byte 0xff at byte 8 of the line). The record before it is fine. "
     "Convert the file to UTF-8, or remove the line."),
    (b'[{"a": 1},\n{"a": "\xff"}]', "{path}:2: not UTF-8 (invalid start byte). Convert the file to UTF-8."),
    (b"\x1f\x8b\x08", "{path}: is compressed with gzip. Unpack it with gunzip."),
    (b"\xff\xfe{\x00", "{path}: is UTF-16. Convert it to UTF-8."),
]  # fmt: skip


@pytest.mark.parametrize(("content", "lines"), GOOD)
def test_reads_records_with_their_lines(tmp_path: Path, content: bytes, lines: list[int]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    records = list(read_records([path]))
    assert [(record.value, record.line) for record in records] == [({"a": i + 1}, line) for i, line in enumerate(lines)]
    assert records[0].where == f"{path}:{lines[0]}"


@pytest.mark.parametrize(("content", "message"), BAD)
def test_refuses_with_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_records([path]))
    assert str(caught.value) == message.format(path=path)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: no such file \(looked in .*\)\. Check the path\."):
        open_records([tmp_path / "none.jsonl"])
    with pytest.raises(InputError, match=r"is a folder\. Name the JSONL or JSON files in it\."):
        open_records([tmp_path])


@pytest.mark.parametrize("content", [content for content, _ in GOOD])
def test_any_slices_join_to_the_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    (file,) = open_records([path])
    whole = list(file.read(0, len(file)))
    for cut in range(len(file) + 1):
        assert list(file.read(0, cut)) + list(file.read(cut, len(file))) == whole


def test_fingerprint_follows_content_and_order_only(tmp_path: Path) -> None:
    first, second, copy = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    first.write_bytes(b'{"a": 1}\n')
    second.write_bytes(b'{"a": 2}\n')
    copy.write_bytes(first.read_bytes())
    assert content_fingerprint([first, second]) == content_fingerprint([copy, second])
    assert content_fingerprint([first, second]) != content_fingerprint([second, first])
    assert content_fingerprint([first]) != content_fingerprint([second])
