"""What an index is, and what is written into the cache when one is made."""

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ds_recipes.data.index.arrays import scan_array
from ds_recipes.data.index.chunks import Progress
from ds_recipes.data.index.fingerprint import HashedFile, TreeHash
from ds_recipes.data.index.kept import Entry, EntryWriter, Ints
from ds_recipes.data.index.newlines import line_bounds, scan_file, scan_stream
from ds_recipes.data.index.raw import BOM, Shape, shape_of, unpacked

ELEMENTS_AT_ONCE = 1 << 16
SPOTS = 64
FINGERPRINT = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Index:
    """Where every entry of a JSONL file (a line) or a JSON array (an element) lies. A blank line is an entry."""

    path: Path
    is_array: bool  # a JSON array; else JSON Lines
    fingerprint: str  # of the file's bytes (as they lie on disk), 32 hex digits
    starts: Ints  # int64 [entries], first byte of each entry, in the decompressed content; may be a memory map
    ends: Ints  # int64 [entries], behind its last byte (a line's newline included)
    lines: Ints | None  # int64 [entries], from 1; None: entry i is line i + 1
    notes: tuple[str, ...]  # what a user should be told


def write_entries(path: Path, size: int, writer: EntryWriter, progress: Progress | None) -> None:
    """Find the entries of a file of `size` bytes: in threads if it is plain JSONL, else from beginning to end.

    Raises:
        InputError: see `open_index`.
    """
    shape = shape_of(path)
    if shape.is_array or shape.compression:
        fingerprint, content_bytes = _read_through(path, shape, writer, progress)
    else:
        tree, content_bytes, bounds = TreeHash(), size, writer.array("bounds")
        for piece in line_bounds(shape.body, scan_file(path, tree, progress), lambda: size):
            bounds.append(piece)
        fingerprint = tree.hexdigest()
    writer.facts |= {"is_array": shape.is_array, "compression": shape.compression, "content_bytes": content_bytes}
    writer.facts["fingerprint"] = fingerprint


def index_from(path: Path, entry: Entry) -> Index:
    """The index that an entry holds."""
    facts, arrays = entry.facts, entry.arrays
    if facts["is_array"]:
        starts, ends, lines = arrays["starts"], arrays["ends"], arrays["lines"]
        return Index(path, True, facts["fingerprint"], starts, ends, lines, ())
    return Index(path, False, facts["fingerprint"], arrays["bounds"][:-1], arrays["bounds"][1:], None, ())


def holds_index(entry: Entry) -> bool:
    """Do the facts and arrays of an entry agree with each other, as far as one look tells?"""
    facts, arrays = entry.facts, entry.arrays
    if not FINGERPRINT.fullmatch(facts["fingerprint"]):
        return False
    if facts["is_array"]:
        return are_ranges(arrays["starts"], arrays["ends"], arrays["lines"], facts["content_bytes"])
    bounds = arrays["bounds"]
    whole = bounds[0] in (0, len(BOM)) and bounds[-1] == facts["content_bytes"]
    return len(bounds) > 1 and bool(whole) and _ascend(bounds, 1)


def are_ranges(starts: Ints, ends: Ints, lines: Ints, content_bytes: int) -> bool:
    """Are these as many ranges as lines, in order, within the content? Looks at the ends and some places between."""
    if not 0 < len(starts) == len(ends) == len(lines):
        return False
    inside = starts[0] >= 0 and lines[0] >= 1 and ends[-1] <= content_bytes
    spots = np.linspace(0, len(starts) - 1, SPOTS, dtype=np.int64)
    return bool(inside and (starts[spots] < ends[spots]).all()) and _ascend(starts, 1) and _ascend(lines, 0)


def _ascend(numbers: Ints, least: int) -> bool:
    spots = np.linspace(0, max(0, len(numbers) - 2), SPOTS, dtype=np.int64)
    following = np.minimum(spots + 1, len(numbers) - 1)
    steps = numbers[following] - numbers[spots]
    return bool((steps[following > spots] >= least).all() and numbers[0] <= numbers[-1])


def _read_through(path: Path, shape: Shape, writer: EntryWriter, progress: Progress | None) -> tuple[str, int]:
    """The fingerprint of the file, and the bytes of its content."""
    with HashedFile(path, progress) as packed:
        stream = unpacked(path, packed, shape.compression)
        if shape.is_array:
            _write_elements(writer, stream, path, shape.body)
        else:
            bounds = writer.array("bounds")
            for piece in line_bounds(shape.body, scan_stream(stream), stream.tell):
                bounds.append(piece)
        content_bytes = stream.tell()
        return packed.fingerprint(), content_bytes


def _write_elements(writer: EntryWriter, stream: BinaryIO, path: Path, body: int) -> None:
    arrays = [writer.array(name) for name in ("starts", "ends", "lines")]
    elements = scan_array(stream, path, body)
    while block := list(islice(elements, ELEMENTS_AT_ONCE)):
        for array, column in zip(arrays, np.array(block, np.int64).T, strict=True):  # columns of [elements, 3]
            array.append(column)
