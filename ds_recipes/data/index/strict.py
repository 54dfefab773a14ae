"""Check a whole file: is every byte of it UTF-8, and is every entry a JSON object? Names the lines with faults.

UTF-8 is validated by Arrow, which is faster than Python's decoder and lets other threads run. Where a chunk of the file is
not valid, its lines are looked at one by one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ds_recipes.data.index.chunks import CHUNK_BYTES, Progress, in_threads
from ds_recipes.data.index.entries import Index
from ds_recipes.data.index.raw import MAX_RECORD_BYTES, open_raw, reading

NUM_SHOWN = 10
MOST_OF_A_CHARACTER = 3  # bytes of a UTF-8 character behind its first
NEWLINE = b"\n"
ESCAPE = b"\\u"  # only such can be half of a surrogate pair in text that is UTF-8
ENTRIES_AT_ONCE = 1 << 14


class Fault(NamedTuple):
    """What is wrong with a line, counted from 1."""

    line: int
    what: str


@dataclass(frozen=True)
class StrictReport:
    """How many faults a file has, and the first ten, in the order of their lines."""

    num_faults: int
    first: tuple[Fault, ...]


@dataclass
class _Found:
    """Counts faults and keeps the first ones."""

    num_faults: int = 0
    first: list[Fault] = field(default_factory=list)

    def add(self, line: int, what: str) -> None:
        self.num_faults += 1
        if len(self.first) < NUM_SHOWN:
            self.first.append(Fault(line, what))


def check_lines(
    index: Index, with_json: bool = False, progress: Progress | None = None, chunk_bytes: int = CHUNK_BYTES
) -> StrictReport:
    """Check that a file is UTF-8 without NUL bytes and, if asked for, that each of its entries is a JSON object.

    A line that is no text is one fault, and is not looked at as JSON. Memory is bounded: an entry longer than
    MAX_RECORD_BYTES is a fault. `progress` runs from 0 to the end for each of the two checks.

    Raises:
        InputError: the file cannot be read.
    """
    kinds = [_check_text(index, progress, chunk_bytes)]
    if with_json:
        kinds.append(_check_json(index, progress))
    first = sorted(fault for kind in kinds for fault in kind.first)[:NUM_SHOWN]
    return StrictReport(sum(kind.num_faults for kind in kinds), tuple(first))


def _check_text(index: Index, progress: Progress | None, chunk_bytes: int) -> _Found:
    found, line, last_bad, done, total = _Found(), 1, 0, 0, _content_bytes(index)
    for num_bytes, newlines, faults in in_threads(_check_chunk, _whole_characters(index, chunk_bytes)):
        for lines_into, what in faults:
            if line + lines_into > last_bad:  # a line may lie in several chunks
                last_bad = line + lines_into
                found.add(last_bad, what)
        line += newlines
        done += num_bytes
        if progress is not None:
            progress(min(done, total), total)
    return found


def _whole_characters(index: Index, chunk_bytes: int) -> Iterator[bytes]:
    """The content in chunks that are not cut within a character, if it is UTF-8."""
    assert chunk_bytes > MOST_OF_A_CHARACTER
    with open_raw(index.path) as stream, reading(index.path):
        chunk = stream.read(chunk_bytes)
        while chunk:
            following = stream.read(chunk_bytes)
            cut = _continuation_bytes(following)
            yield chunk + following[:cut]
            chunk = following[cut:]


def _continuation_bytes(data: bytes) -> int:
    """How many bytes at the beginning may belong to a character that began before."""
    head = data[:MOST_OF_A_CHARACTER]
    return next((i for i, byte in enumerate(head) if byte & 0xC0 != 0x80), len(head))


def _check_chunk(chunk: bytes) -> tuple[int, int, list[tuple[int, str]]]:
    """The chunk's length and its newlines, and faults: how many lines into the chunk, and what."""
    newlines = int(np.count_nonzero(np.frombuffer(chunk, np.uint8) == NEWLINE[0]))
    if is_utf8(chunk) and b"\0" not in chunk:
        return len(chunk), newlines, []
    faults = ((into, _text_fault(line)) for into, line in enumerate(chunk.split(NEWLINE)))
    return len(chunk), newlines, [(into, what) for into, what in faults if what]


def is_utf8(data: bytes) -> bool:
    """True if all of it is strict UTF-8: no surrogates, no overlong forms."""
    import pyarrow

    bounds = np.array([0, len(data)], np.int64)
    text = pyarrow.LargeStringArray.from_buffers(1, pyarrow.py_buffer(bounds), pyarrow.py_buffer(data))
    try:
        text.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def _text_fault(line: bytes) -> str | None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{line[error.start]:02x}: {error.reason})"
    return "holds a NUL byte" if b"\0" in line else None


def _check_json(index: Index, progress: Progress | None) -> _Found:
    found, total = _Found(), _content_bytes(index)
    with open_raw(index.path) as stream, reading(index.path):
        for entry, start, end in _ranges(index):
            line = entry + 1 if index.lines is None else int(index.lines[entry])
            if end - start > MAX_RECORD_BYTES:
                found.add(line, f"is {(end - start) >> 20:,} MiB long; at most {MAX_RECORD_BYTES >> 20} are read")
                continue
            if stream.tell() != start:
                stream.seek(start)
            what = _json_fault(stream.read(end - start))
            if what is not None:
                found.add(line, what)
            if progress is not None and entry % ENTRIES_AT_ONCE == 0:
                progress(end, total)
    if progress is not None:
        progress(total, total)
    return found


def _ranges(index: Index) -> Iterator[tuple[int, int, int]]:
    """(entry, start, end) of every entry."""
    for first in range(0, len(index.starts), ENTRIES_AT_ONCE):
        block = slice(first, first + ENTRIES_AT_ONCE)
        yield from zip(
            range(first, len(index.starts)), index.starts[block].tolist(), index.ends[block].tolist(), strict=False
        )


def _json_fault(raw: bytes) -> str | None:
    try:
        text = raw.strip().decode("utf-8")
    except UnicodeDecodeError:
        return None  # the other check has found it
    if not text or "\0" in text:
        return None
    try:
        value = json.loads(text)
        if ESCAPE in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1:,})"
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start]).strip("'")
        return f"holds half of a surrogate pair ({half}), which is no character"
    except RecursionError:
        return "not JSON (nested too deeply)"
    except ValueError as error:  # a number with too many digits
        return f"not JSON ({error})"
    return None if isinstance(value, dict) else "not a JSON object"


def _content_bytes(index: Index) -> int:
    return int(index.ends[-1])
