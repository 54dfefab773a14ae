"""Records of JSONL files and JSON arrays, each with the file and line that it came from."""

import json
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ds_recipes.errors import InputError

BOM = b"\xef\xbb\xbf"
NOT_TEXT = {
    b"\x1f\x8b": "is compressed with gzip. Unpack it with gunzip.",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd. Unpack it with unzstd.",
    b"PK\x03\x04": "is a zip archive. Unpack it.",
    b"PAR1": "is a Parquet file. Write its records as JSONL.",
    b"\xff\xfe": "is UTF-16. Convert it to UTF-8.",
    b"\xfe\xff": "is UTF-16. Convert it to UTF-8.",
}
SEARCH_BYTES = 1 << 26
SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Record:
    """One JSON object and where it begins (lines from 1)."""

    path: Path
    line: int
    value: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


class RecordFile:
    """One opened file, divided into entries that can be read in any slice.

    An entry is a line of a JSONL file (a blank one holds no record) or an element of a JSON array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        for magic, problem in NOT_TEXT.items():
            if self._bytes[: len(magic)] == magic:
                raise InputError(f"{path}: {problem}")
        body = len(BOM) if self._bytes[: len(BOM)] == BOM else 0
        first = re.compile(rb"\S").search(self._bytes, body)
        if first is None:
            raise InputError(f"{path}: holds no records, only blank lines. Name a file with one JSON object a line.")
        self._elements = _read_array(path, self._bytes) if first.group() == b"[" else None
        self._starts = _line_starts(self._bytes, body)  # [lines + 1]

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._elements is None else len(self._elements)

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """The records of entries `start` to `stop`, in order.

        Raises:
            InputError: an entry is not a JSON object in UTF-8; the message names its line.
        """
        if self._elements is not None:
            for line, value in self._elements[start:stop]:
                yield Record(self.path, line, _object(value, f"{self.path}:{line}"))
            return
        for entry in range(start, stop):
            line_bytes = self._bytes[self._starts[entry] : self._starts[entry + 1]].strip()
            if line_bytes:
                yield Record(self.path, entry + 1, self._parse(entry, line_bytes))

    def _parse(self, entry: int, line_bytes: bytes) -> dict[str, Any]:
        where = f"{self.path}:{entry + 1}"
        try:
            line = line_bytes.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: not UTF-8 (byte 0x{line_bytes[error.start]:02x} at byte {error.start + 1} of the line). "
                f"{self._fine_before(entry)}Convert the file to UTF-8, or remove the line."
            ) from error
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: not JSON ({_what(error, line)}). {self._fine_before(entry)}Fix or remove the line."
            ) from error
        return _object(value, where)

    def _fine_before(self, entry: int) -> str:
        """Said of a line only: whoever reads slices in parallel reports the first error of all."""
        lines = (self._bytes[self._starts[i] : self._starts[i + 1]] for i in range(entry))
        count = sum(not line.isspace() for line in lines)
        if count == 0:
            return ""
        return f"{count:,} records before it are fine. " if count > 1 else "The record before it is fine. "


def open_records(paths: Sequence[Path]) -> list[RecordFile]:
    """Open all files, in order; no record of a JSONL file is parsed yet.

    Raises:
        InputError: a file is missing, unreadable, empty or without records, or an array is not JSON.
    """
    return [RecordFile(path) for path in paths]


def read_records(paths: Sequence[Path]) -> Iterator[Record]:
    """All records of all files, in order.

    Raises:
        InputError: see `open_records` and `RecordFile.read`.
    """
    for file in open_records(paths):
        yield from file.read(0, len(file))


def content_fingerprint(paths: Sequence[Path]) -> str:
    """xxh3-128 over the files' bytes and sizes, in order; their names do not count.

    Raises:
        InputError: a file is missing, unreadable or empty.
    """
    digest = xxhash.xxh3_128()
    for path in paths:
        content = _map(path)
        digest.update(len(content).to_bytes(8, "little"))
        for start in range(0, len(content), SEARCH_BYTES):
            digest.update(content[start : start + SEARCH_BYTES])
    return str(digest.hexdigest())


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise InputError(f"{path}: is empty. Name a file with one JSON object a line, or a JSON array.")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (looked in {Path.cwd()}). Check the path.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder. Name the JSONL or JSON files in it.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the file and its permissions.") from error


def _line_starts(content: mmap.mmap, body: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each line begins, and where the last one ends: [lines + 1]. numpy finds them at memory speed."""
    ends = [
        np.flatnonzero(np.frombuffer(content[start : start + SEARCH_BYTES], np.uint8) == ord("\n")) + start + 1
        for start in range(0, len(content), SEARCH_BYTES)
    ]
    starts = np.concatenate([[body], *ends, [len(content)]])
    return starts[:-1] if starts[-2] == len(content) else starts


def _read_array(path: Path, content: mmap.mmap) -> list[tuple[int, Any]]:
    """The elements of a JSON array, each with its line."""
    try:
        text = content[:].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error
    elements: list[tuple[int, Any]] = []
    try:
        elements.extend(_scan_array(text))
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        what = error.msg if isinstance(error, json.JSONDecodeError) else _what(error, text)
        raise InputError(f"{path}:{line}: not JSON ({what}). Fix the array there.") from error
    if not elements:
        raise InputError(f"{path}: holds no records, only an empty array. Name a file with records.")
    return elements


def _scan_array(text: str) -> Iterator[tuple[int, Any]]:
    """Decode element by element: `json.loads` would not tell where each one began."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def skip(position: int) -> int:
        match = space.match(text, position)
        assert match is not None
        return match.end()

    position, line, counted = skip(text.index("[") + 1), 1, 0
    closed = text[position : position + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        value, position = decoder.raw_decode(text, position)
        yield line, value
        position = skip(position)
        closed = text[position : position + 1] == "]"
        if not closed:
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']' after an element", text, position)
            position = skip(position + 1)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("more text after the array's end", text, position + 1)


def _object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kind = {list: "an array", str: "a string", type(None): "null", bool: "true or false"}.get(type(value), "a number")
    raise InputError(f'{where}: not a JSON object but {kind}. A record looks like {{"text": "..."}}; fix or remove it.')


def _what(error: Exception, line: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if error.pos >= len(line) or error.msg.startswith("Unterminated string"):
        shown = line if len(line) <= SHOWN_CHARACTERS else f"...{line[-SHOWN_CHARACTERS:]}"
        return f"line ends after {len(line):,} character{'s' * (len(line) != 1)}: {shown!r}"
    shown = line[max(0, error.pos - SHOWN_CHARACTERS // 2) : error.pos + SHOWN_CHARACTERS // 2]
    return f"{error.msg} at character {error.pos + 1:,}: {shown!r}"
