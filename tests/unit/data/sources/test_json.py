"""JSON Lines and JSON arrays: every shape of file gives its records, and what is none is named with its place."""

import gzip
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.sources import entries, json_text
from ds_recipes.data.sources.record import Bad, Record
from ds_recipes.errors import InputError
from tests.unit.data.sources.kinds import bad_messages, everything, opened, zstd

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
REFUSED = [
    (b"", "{path}: is empty. Name a file with one JSON object a line, or a JSON array."),
    (b" \n\r\n", "{path}: holds no records, only blank lines. Name a file with one JSON object a line."),
    (b"[ ]", "{path}: holds no records, only an empty array. Name a file with records."),
    (b'[{"a": 1},\n {"a": }]', "{path}:2: not JSON (Expecting value). Fix the array there."),
    (b'[{"a": 1}\n {"a": 2}]', "{path}:2: not JSON (expected ',' or ']' after an element). Fix the array there."),
    (b'[{"a": 1}]\n{"a": 2}', "{path}:1: not JSON (more text after the array's end). Fix the array there."),
    (b'[{"a": 1},\n{"a": "\xff"}]', "{path}:2: not UTF-8 (invalid start byte). Convert the file to UTF-8."),
    (b"\xff\xfe{\x00", "{path}: is UTF-16. Convert it to UTF-8."),
]  # fmt: skip
"""Files that cannot be read at all."""

BAD = [
    (b'{"a": 1}\n\n{"t', "{path}:3: not JSON (line ends after 3 characters: '{{\"t'). " + ONE_FINE + FIX),
    (b'{"a" 1}', "{path}:1: not JSON (Expecting ':' delimiter at character 6: '{{\"a\" 1}}'). " + FIX),
    (b'{"a": 1}\n' * 1841 + b"{", "{path}:1842: not JSON (line ends after 1 character: '{{'). " + FINE + FIX),
    (b'{"a":' * 99999, "{path}:1: not JSON (nested too deeply). " + FIX),
    (b'{"a": 1}\nnull\n', "{path}:2: not a JSON object but null. " + SHAPE),
    (b'{"a": 1}\n[1]\n', "{path}:2: not a JSON object but an array. " + SHAPE),
    (b'[{"a": 1},\n 5]', "{path}:2: not a JSON object but a number. " + SHAPE),
    (b'{"a": 1}\n{"a": "\xff"}', "{path}:2: not UTF-8 (byte 0xff at byte 8 of the line). The record before it is fine. "
     "Convert the file to UTF-8, or remove the line."),
    (b'{"a": "\xed\xa0\x80"}', "{path}:1: not UTF-8 (byte 0xed at byte 8 of the line). "
     "Convert the file to UTF-8, or remove the line."),
    (b'{"a": ' + b"9" * 5000 + b"}", "{path}:1: not JSON (a number of thousands of digits). " + FIX),
    (b'{"a": "\x00"}', "{path}:1: not JSON (Invalid control character at character 8: '{{\"a\": \"\\x00\"}}'). " + FIX),
    (b'\x00\x00{"a": 1}', "{path}:1: not JSON (Expecting value at character 1: '\\x00\\x00{{\"a\": 1}}'). " + FIX),
]  # fmt: skip
"""Files with one bad entry."""


@pytest.mark.parametrize(("content", "lines"), GOOD)
def test_reads_records_with_their_lines(tmp_path: Path, content: bytes, lines: list[int]) -> None:
    path = tmp_path / "data.jsonl"
    records = everything(opened(path, content))
    assert records == [
        Record(str(path), line, record.entry, {"a": i + 1})
        for i, (line, record) in enumerate(zip(lines, records, strict=True))
    ]
    assert isinstance(records[0], Record) and records[0].where == f"{path}:{lines[0]}"


@pytest.mark.parametrize("name", ["data.jsonl", "data.gz", "data.zst"])
@pytest.mark.parametrize(("content", "lines"), GOOD)
def test_any_slices_join_to_the_whole(tmp_path: Path, name: str, content: bytes, lines: list[int]) -> None:
    pack = {"data.jsonl": bytes, "data.gz": gzip.compress, "data.zst": zstd}[name]
    source = opened(tmp_path / name, pack(content))
    whole = everything(source)
    assert [getattr(record, "line", record) for record in whole] == lines
    for cut in range(len(source) + 1):
        assert [*source.read(0, cut), *source.read(cut, len(source))] == whole


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_refuses_a_file_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    with pytest.raises(InputError) as caught:
        opened(path, content)
    assert str(caught.value) == message.format(path=path)


@pytest.mark.parametrize(("content", "message"), BAD)
def test_names_a_bad_entry_with_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    assert bad_messages(opened(path, content)) == [message.format(path=path)]


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: no such file \(looked in .*\)\. Check the path\."):
        opened(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"is a folder\. Name the JSONL or JSON files in it\."):
        opened(tmp_path)


lines = st.sampled_from(
    [b'{"a": 1}', b"", b" \t", b"null", b'{"a"', b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"a": 1}\r', b"\x00", b'"']
)


def expected(line: bytes) -> dict[str, Any] | str | None:
    """What a line is: a record, "bad", or None. The slow plain way."""
    if not line.strip():
        return None
    try:
        value = json.loads(line.decode("utf-8"))
    except ValueError:
        return "bad"
    return value if isinstance(value, dict) else "bad"


@settings(deadline=None, max_examples=60)
@given(
    content=st.lists(lines, min_size=1, max_size=30).filter(lambda found: any(line.strip() for line in found)),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    block_bytes=st.sampled_from([1, 7, 40, 1 << 22]),
    newline_at_end=st.booleans(),
)
def test_every_line_is_a_record_or_bad_or_blank_in_its_place(
    content: list[bytes], cuts: list[int], block_bytes: int, newline_at_end: bool
) -> None:
    kinds = [(line, kind) for line, kind in enumerate(map(expected, content), 1) if kind is not None]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "BLOCK_BYTES", block_bytes)
        patch.setattr(entries, "BLOCK_ENTRIES", max(1, block_bytes // 4))
        path = Path(folder) / "data"
        source = opened(path, b"\n".join(content) + b"\n" * newline_at_end)
        found = everything(source)
        edges = sorted({0, len(source), *(cut for cut in cuts if cut < len(source))})
        joined = [one for edge in pairwise(edges) for one in source.read(*edge)]
    assert joined == found
    assert len(found) == len(kinds)
    for one, (line, kind) in zip(found, kinds, strict=True):
        if isinstance(one, Bad):
            assert kind == "bad" and one.entry == line - 1 and one.message.startswith(f"{path}:{line}: ")
        else:
            assert (one.value, one.line, one.entry) == (kind, line, line - 1)


def test_only_the_first_bad_entry_says_what_is_fine_and_only_near_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"a": 1}\n\n{"a": 1}\n{\n{"a": 1}\n{\n'
    source = opened(tmp_path / "data", content)
    alone = [found for entry in range(len(source)) for found in source.read(entry, entry + 1)]
    assert alone == everything(source)
    assert ["fine" in message for message in bad_messages(source)] == [True, False]
    assert "2 records before it are fine." in bad_messages(source)[0]
    monkeypatch.setattr(entries, "COUNTED_BYTES", 10)
    assert not any("fine" in message for message in bad_messages(source))
    assert not any("fine" in message for message in bad_messages(opened(tmp_path / "data.gz", gzip.compress(content))))


@pytest.mark.parametrize("name", ["data.gz", "data.zst"])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, name: str) -> None:
    content = b"".join(b'{"a": "%d"}\n' % (i * 7919) for i in range(2000))
    packed = {"data.gz": gzip.compress, "data.zst": zstd}[name](content)
    for damaged in (packed[: len(packed) // 2], packed[:-6]):
        with pytest.raises(InputError, match=name):
            everything(opened(tmp_path / name, damaged))


@settings(deadline=None, max_examples=80)
@given(st.recursive(st.text('[]{}"\\ab', max_size=8) | st.none(), lambda inner: st.lists(inner) | st.dictionaries(
    st.text('[]{}"\\', max_size=4), inner), max_leaves=30))  # fmt: skip
def test_depth_counts_brackets_outside_of_strings(value: Any) -> None:
    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert json_text._depth(json.dumps(value).encode()) == depth(value)


@pytest.mark.parametrize(("levels", "passes"), [(256, True), (257, False), (10_000, False)])
def test_the_same_depth_is_refused_everywhere(tmp_path: Path, levels: int, passes: bool) -> None:
    """However deep the caller is already."""
    text = '{"a":' + "[" * (levels - 1) + "]" * (levels - 1) + "}"
    source = opened(tmp_path / "data", text.encode())

    def deeper(calls: int) -> None:
        if calls:
            return deeper(calls - 1)
        return None if bool(bad_messages(source)) == (not passes) else pytest.fail(f"{levels} levels")

    deeper(0)
    deeper(300)
