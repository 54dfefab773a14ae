"""The ancestor's text indexes are verified, used, and what they leave out is told; ours hold every line."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.index import text_index
from ds_recipes.data.index.cache import open_whole_index
from ds_recipes.data.index.text_index import text_index_name, text_index_of, write_text_index
from ds_recipes.errors import InputError
from tests.unit.data.index.made import (
    BOM,
    PACKERS,
    contents,
    entries_of,
    lines_of,
    make_cache,
    open_beside,
    was_read,
    write,
)

TEN = b"".join(b'{"number": %d}\n' % i for i in range(10, 19)) + b'{"number": 19}'
OMITS = ".index_cache/train.idx leaves out {} of train.jsonl, the first is line {}; delete it to use them all"
UNUSED = ".index_cache/train.idx was not used: {}; delete it"


def ancestors_index(content: bytes) -> list[int]:
    """What the ancestor writes: the offset behind each newline but the last; it knows of no BOM."""
    position, offsets = 0, []
    for line in content.split(b"\n")[:-1]:
        offsets.append(position)
        position += len(line) + 1
    return offsets


def write_offsets(path: Path, offsets: list[Any]) -> Path:
    return write(make_cache(path) / text_index_name(path), "".join(f"{offset}\n" for offset in offsets).encode())


@settings(deadline=None, max_examples=20)
@given(contents())
def test_ours_holds_every_line_and_is_read_back(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name) / "train.jsonl", content)
        target = make_cache(path) / "train.idx"
        write_text_index(open_beside(path), target)
        assert [int(word) for word in target.read_text().splitlines()] == [start for start, _, _ in lines_of(content)]
        assert text_index_of(path) == target
        index = open_beside(path)
        assert entries_of(index) == lines_of(content) and index.lines is None and not index.notes


@settings(deadline=None, max_examples=20)
@given(contents())
def test_the_ancestors_is_used_and_a_last_line_that_it_leaves_out_is_told(content: bytes) -> None:
    offsets, lines = ancestors_index(content), lines_of(content)
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name) / "train.jsonl", content)
        write_offsets(path, offsets)
        index = open_beside(path)
    if not offsets:
        assert index.notes == (UNUSED.format("it lists no line"),) and entries_of(index) == lines
        return
    assert entries_of(index) == lines[: len(offsets)]
    assert index.notes == (() if len(lines) == len(offsets) else (OMITS.format("1 line", f"{len(lines):,}"),))


@settings(deadline=None, max_examples=60)
@given(contents(), st.data())
def test_any_choice_of_lines_keeps_their_numbers(content: bytes, data: st.DataObject) -> None:
    lines = lines_of(content)
    chosen = sorted(data.draw(st.sets(st.sampled_from(lines), min_size=1)))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_index, "BLOCK_BYTES", data.draw(st.integers(1, 30)))
        path = write(Path(name) / "train.jsonl", content)
        write_offsets(path, [start for start, _, _ in chosen])
        for _ in range(2):  # made, and kept
            index = open_beside(path)
            assert entries_of(index) == chosen
        assert entries_of(open_whole_index(path, make_cache(path))) == lines
    missing = [line for _, _, line in lines if line not in {number for _, _, number in chosen}]
    words = f"{len(missing)} line" + "s" * (len(missing) > 1)
    assert index.notes == ((OMITS.format(words, missing[0]),) if missing else ())


UNUSABLE = [
    ([], "it lists no line"),
    ([0, 14], "its line 2, 14, is not the start of a line"),
    ([0, 15, 15], "its line 3, 15, is not above the one before it"),
    ([15, 0], "its line 2, 0, is not above the one before it"),
    ([0, len(TEN)], f"its line 2, {len(TEN)}, is not the start of a line"),
    ([0, 10**17], f"its line 2, {10**17}, is not the start of a line"),
    ([0, 10**30], "its line 2 is no byte offset"),
    ([-15], "its line 1 is no byte offset"),
    (["0 15"], "its line 1 is no byte offset"),
    (["0", "", "15"], "its line 2 is no byte offset"),
    (["{}"], "its line 1 is no byte offset"),
    (["0" * 10_000_000], "its line 1 is no byte offset"),
    (["../../secret"], "its line 1 is no byte offset"),
]  # fmt: skip


@pytest.mark.parametrize("block_bytes", [1, 1 << 22])
@pytest.mark.parametrize(("offsets", "problem"), UNUSABLE)
def test_one_that_is_wrong_is_not_used_and_the_note_says_why(
    tmp_path: Path, offsets: list[Any], problem: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_index, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path / "train.jsonl", TEN)
    write_offsets(path, offsets)
    for _ in range(2):
        index = open_beside(path)
        assert index.notes == (UNUSED.format(problem),)
        assert entries_of(index) == lines_of(TEN) and index.lines is None


def test_one_that_is_older_than_the_data_is_not_used(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", TEN)
    target = write_offsets(path, ancestors_index(TEN))
    time_ns = path.stat().st_mtime_ns
    os.utime(target, ns=(time_ns, time_ns - 1))
    index = open_beside(path)
    assert index.notes == (".index_cache/train.idx is older than train.jsonl and was not used; delete it",)
    assert len(index.starts) == 10
    os.utime(target, ns=(time_ns, time_ns))
    assert len(open_beside(path).starts) == 9


def test_one_that_comes_changes_or_goes_is_noticed_without_reading_the_data_again(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", TEN)
    assert was_read(path)
    steps: list[tuple[Callable[[], Any], int]] = [
        (lambda: write_offsets(path, [0, 15]), 2),
        (lambda: write_offsets(path, [0, 15, 30]), 3),
        (lambda: (make_cache(path) / "train.idx").unlink(), 10),
        (lambda: write_offsets(path, [0]), 1),
    ]
    for change, expected in steps:
        change()
        assert not was_read(path)
        assert len(open_beside(path).starts) == expected


@pytest.mark.parametrize("damage", ["starts.npy", "lines.npy", "meta.json"])
def test_a_damaged_choice_is_made_again(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "train.jsonl", TEN)
    write_offsets(path, [15, 30])
    open_beside(path)
    (folder,) = make_cache(path).glob("*-chosen-*")
    os.truncate(folder / damage, 100)
    assert entries_of(open_beside(path)) == [(15, 30, 2), (30, 45, 3)]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl.gz", "train.txt"])
def test_only_files_that_the_ancestor_reads_have_one(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, TEN)
    write_offsets(path, [0])
    write(make_cache(path) / "train.idx", b"0\n")
    assert len(open_beside(path).starts) == 10


@pytest.mark.parametrize("content", [b'[{"a": 1},\n{"a": 2}]', PACKERS["gzip"](TEN)], ids=["array", "gzip"])
def test_arrays_and_compressed_files_have_none(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "train.jsonl", content)
    write_offsets(path, [0])
    index = open_beside(path)
    assert len(index.starts) in (2, 10) and not index.notes
    with pytest.raises(InputError, match=r"only plain JSON Lines have a text index"):
        write_text_index(index, tmp_path / "a.idx")
    assert not (tmp_path / "a.idx").exists()


def test_one_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.jsonl", TEN)
    target, index = write(tmp_path / "out" / "train.idx", b"old"), open_beside(path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"train\.idx: cannot be written \(No space left on device\)"):
        write_text_index(index, target)
    assert [found.read_bytes() for found in target.parent.iterdir()] == [b"old"]


def test_a_byte_order_mark_belongs_to_the_first_line_of_the_ancestor(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", BOM + b"{}\n{}\n")
    write_offsets(path, [0, 6])
    index = open_beside(path)
    assert entries_of(index) == [(3, 6, 1), (6, 9, 2)] and not index.notes
