"""Lines are found wherever the borders of buffers and chunks fall, in plain and in compressed files, at any length."""

import os
import random
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_recipes.data.index.cache import open_index
from ds_recipes.data.index.fingerprint import TreeHash, hash_file
from ds_recipes.data.index.newlines import Scratch, line_bounds, scan_file, scan_stream
from ds_recipes.data.index.raw import open_raw, shape_of
from ds_recipes.errors import InputError
from tests.unit.data.index.made import BOM, PACKERS, contents, entries_of, lines_of, open_beside, write

MB = 1_000_000


def bounds_of(path: Path, chunk_bytes: int, part_bytes: int, in_threads: bool) -> list[int]:
    body, size = shape_of(path).body, path.stat().st_size
    if in_threads:
        pieces = line_bounds(body, scan_file(path, None, None, chunk_bytes, part_bytes), lambda: size)
        return np.concatenate(list(pieces)).tolist()
    with open_raw(path) as stream:
        return np.concatenate(list(line_bounds(body, scan_stream(stream, part_bytes), stream.tell))).tolist()


@settings(deadline=None, max_examples=150)
@given(contents(), st.integers(1, 40), st.integers(1, 20), st.booleans())
@example(BOM + b"{", 1, 1, True)
@example(b"{\n", 2, 2, True)
@example(b"{" * 8 + b"\n" + b"{" * 7 + b"\n", 17, 17, False)
def test_lines_are_found_wherever_the_borders_fall(
    content: bytes, chunk_bytes: int, part_bytes: int, in_threads: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name) / "a.jsonl", content)
        bounds = bounds_of(path, chunk_bytes, part_bytes, in_threads)
    lines = lines_of(content)
    assert bounds == [lines[0][0], *(end for _, end, _ in lines)]


@settings(deadline=None, max_examples=25)
@given(contents(), st.sampled_from(list(PACKERS)))
def test_the_index_is_that_of_the_unpacked_lines(content: bytes, packer: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        plain = open_beside(write(Path(name) / "a.jsonl", content))
        path = write(Path(name) / "b.jsonl.packed", PACKERS[packer](content))
        packed = open_beside(path)
        assert packed.fingerprint == hash_file(path)
    assert entries_of(plain) == entries_of(packed) == lines_of(content)
    assert plain.lines is None and not plain.is_array and not plain.notes
    assert plain.fingerprint != packed.fingerprint


@pytest.mark.parametrize("mean_line", [1, 3, 30, 199, 201, 3000])
def test_newlines_are_found_at_any_density(mean_line: int) -> None:
    choose = np.random.default_rng(mean_line)
    scratch = Scratch(10_007)
    for count in (10_007, 10_007, 1, 8, 9999, 10_000):
        scratch.bytes[:] = ord("\n")  # of the part before; they must not be seen
        scratch.bytes[:count] = np.where(choose.random(count) * mean_line < 1, ord("\n"), ord("a"))
        assert scratch.newlines(count).tolist() == np.flatnonzero(scratch.bytes[:count] == ord("\n")).tolist()


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.integers(1, 50), st.lists(st.integers(1, 60), min_size=1))
def test_fingerprint_does_not_depend_on_how_it_is_computed(content: bytes, chunk_bytes: int, steps: list[int]) -> None:
    tree, at = TreeHash(chunk_bytes), 0
    for step in steps:
        tree.update(memoryview(content)[at : at + step])
        at += step
    tree.update(memoryview(content)[at:])
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name) / "a", content)
        scanned = TreeHash(chunk_bytes)
        list(scan_file(path, scanned, None, chunk_bytes, part_bytes=7))
        assert tree.hexdigest() == scanned.hexdigest() == hash_file(path, None, chunk_bytes)


def test_fingerprint_tells_contents_apart(tmp_path: Path) -> None:
    blocks = [bytes([i]) * 8 for i in range(3)]
    contents = [b"", b"\0", b"\0" * 8, b"\0" * 16, blocks[0] + blocks[1], blocks[1] + blocks[0], *blocks[1:]]
    prints = {hash_file(write(tmp_path / "a", content), None, chunk_bytes=8) for content in contents}
    assert len(prints) == len(contents)


def test_a_line_of_100_mb_is_indexed_in_bounded_memory_and_opened_again_at_no_cost(tmp_path: Path) -> None:
    line = b'{"text": "' + b"a" * (100 * MB) + b'"}\n'
    path = write(tmp_path / "a.jsonl", b"{}\n" + line + b"{}\n" * 3)
    tracemalloc.start()
    try:
        index = open_beside(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    start = len(line) + 3
    assert entries_of(index) == [(0, 3, 1), (3, start, 2)] + [
        (start + 3 * i, start + 3 * i + 3, i + 3) for i in range(3)
    ]
    assert peak < 40 * MB
    before = bytes_read()
    assert entries_of(open_beside(path)) == entries_of(index)
    assert bytes_read() - before < MB


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_progress_runs_from_the_first_byte_to_the_last(tmp_path: Path) -> None:
    choose = random.Random(0)
    content = b"".join(choose.randbytes(1000) + b"\n" for _ in range(9000))
    for name, packed in (("a.jsonl", b"{" + content), ("b.jsonl.gz", PACKERS["gzip"](b"{" + content))):
        path = write(tmp_path / name, packed)
        calls: list[tuple[int, int]] = []
        open_index(path, tmp_path, lambda *numbers, calls=calls: calls.append(numbers))
        done = [number for number, _ in calls]
        assert done == sorted(done) and done[-1] == len(packed) and len(set(done)) > 2
        assert {total for _, total in calls} == {len(packed)}


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"{}\n" * 100_000)
    pieces = scan_file(path, None, None, chunk_bytes=1000, part_bytes=300)
    next(pieces)
    os.truncate(path, 5000)
    with pytest.raises(InputError, match=r"a\.jsonl: was changed while it was read\. Begin again"):
        list(pieces)
    path = write(tmp_path / "b.jsonl", b"{}\n" * 100_000)
    with pytest.raises(InputError, match=r"b\.jsonl: was changed while it was read\. Begin again"):
        hash_file(path, lambda done, total: os.truncate(path, 5000), chunk_bytes=1000)
