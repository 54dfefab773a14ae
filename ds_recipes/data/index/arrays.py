"""Where the elements of a JSON array begin and end, found in a window of the file that is as large as it must be.

The window's bytes are read as latin-1, in which a character is a byte: JSON's own signs are ASCII, so a decoder finds the
same borders as in UTF-8, and its positions are offsets in the file. That they are UTF-8 is checked beside it.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ds_recipes.data.index.raw import MAX_RECORD_BYTES
from ds_recipes.errors import InputError, NoRecordsError

WINDOW_BYTES = 1 << 22
NEAR_THE_END = 16
"""Characters. What ends, or is wrong, so near the window's end may only be cut off by it: no literal, escape or exponent is
longer. A cut string is told by its message."""

SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


class Element(NamedTuple):
    """Offsets of an element's first byte and of the one behind its last, and the line where it begins, from 1."""

    start: int
    end: int
    line: int


def scan_array(stream: BinaryIO, path: Path, body: int, window_bytes: int = WINDOW_BYTES) -> Iterator[Element]:
    """The elements of the array in `stream`, which begins at offset `body`; `path` is what messages call the file.

    Raises:
        InputError: it is not UTF-8, not an array, empty, or an element is longer than MAX_RECORD_BYTES.
    """
    stream.read(body)
    window = _Window(stream, path, body, window_bytes)
    window.skip_space()
    window.at += 1  # the opening bracket, which whoever calls this has seen
    window.skip_space()
    if window.char() == "]":
        raise NoRecordsError(f"{path}: holds no records, only an empty array. Name a file with records.")
    while True:
        start, line = window.start + window.at, window.line()
        window.skip_value()
        yield Element(start, window.start + window.at, line)
        window.skip_space()
        if window.char() == "]":
            break
        if window.char() != ",":
            raise window.not_json("expected ',' or ']' after an element", window.at)
        window.at += 1
        window.skip_space()
    window.at += 1
    line = window.line()
    window.skip_space()
    if window.char():
        raise InputError(f"{path}:{line}: not JSON (more text after the array's end). Fix the array there.")


class _Window:
    """The part of the content that is being read. `at` is the position in it; what lies before `at` may be dropped."""

    def __init__(self, stream: BinaryIO, path: Path, start: int, window_bytes: int) -> None:
        self._stream, self._path, self._window_bytes = stream, path, window_bytes
        self._text, self._complete = "", False
        self._line, self._counted = 1, 0  # the line of _text[_counted]
        self._read_lines = 1  # line of the first byte that has not been read
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self.start, self.at = start, 0

    def char(self) -> str:
        """The character at `at`, which a skip has brought into the window; "" at the end of the content."""
        return self._text[self.at : self.at + 1]

    def line(self) -> int:
        """The line of `at`."""
        self._line += self._text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def skip_space(self) -> None:
        """Move to the next character that is no space, or to the end of the content."""
        while True:
            match = SPACE.match(self._text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self._text) or not self._grow():
                return

    def skip_value(self) -> None:
        """Move behind the JSON value at `at`."""
        while True:
            try:
                end = DECODER.raw_decode(self._text, self.at)[1]
            except json.JSONDecodeError as error:
                cut = error.pos + NEAR_THE_END > len(self._text) or error.msg.startswith("Unterminated string")
                if not cut or not self._grow():
                    raise self.not_json(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.not_json("nested too deeply", self.at) from error
            except ValueError as error:  # a number with too many digits
                raise self.not_json(str(error), self.at) from error
            else:
                if end + NEAR_THE_END < len(self._text) or not self._grow():  # "1" may go on as "1e+5"
                    self.at = end
                    return

    def not_json(self, what: str, position: int) -> InputError:
        line = self.line() + self._text.count("\n", self.at, position)
        return InputError(f"{self._path}:{line}: not JSON ({what}). Fix the array there.")

    def _grow(self) -> bool:
        """Drop what lies before `at` and read as much again as is left; False if there is no more."""
        if self._complete:
            return False
        line = self.line()
        kept = self._text[self.at :]
        if len(kept) > MAX_RECORD_BYTES:
            raise InputError(
                f"{self._path}:{line}: an element of the array is longer than {MAX_RECORD_BYTES >> 20} MiB. Split it."
            )
        raw = self._stream.read(max(self._window_bytes, len(kept)))
        self._complete = not raw
        self._check_utf8(raw)
        if raw:
            self.start += self.at
            self._text, self.at, self._counted = kept + raw.decode("latin-1"), 0, 0
        return not self._complete

    def _check_utf8(self, raw: bytes) -> None:
        held_back = len(self._utf8.getstate()[0])  # bytes of a character that began in the part before
        try:
            self._utf8.decode(raw, final=self._complete)
        except UnicodeDecodeError as error:
            line = self._read_lines + raw.count(b"\n", 0, max(0, error.start - held_back))
            message = f"{self._path}:{line}: not UTF-8 ({error.reason}). Convert the file to UTF-8."
            raise InputError(message) from error
        self._read_lines += raw.count(b"\n")
