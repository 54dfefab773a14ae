"""The content of a file, any part of it, safely from several threads at once.

Parts are read, not mapped: a mapped file that another job cuts short ends the process without a message, and the pages of
a map count as the process's memory.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from ds_recipes.data.index.raw import compression_of, open_packed, open_raw, reading
from ds_recipes.errors import InputError

OPEN_FILES = 64
"""Kept open by this process: a folder may hold more files than a process may have open."""

CHANGED = "has changed since it was opened. Begin again when nothing writes into it."

Fetch = Callable[[int, int], bytes]
"""The bytes from `start` to `stop` of the content."""


State = tuple[int, int]
"""Size and time of the last change."""


class Content(Protocol):
    """The bytes of a file, unpacked where it is compressed."""

    random_access: bool

    def opened(self) -> AbstractContextManager[Fetch]:
        """A way to fetch parts; those of a compressed file must be asked for in ascending order.

        Raises:
            InputError: the file is damaged, or is not the one that was opened.
        """
        ...


def open_content(path: Path) -> Content:
    """The content of a file.

    Raises:
        InputError: it cannot be read.
    """
    return CompressedContent(path) if compression_of(path) else PlainContent(path)


class PlainContent:
    """A file as it lies on disk."""

    random_access = True

    def __init__(self, path: Path) -> None:
        self._path, self._state = path, file_state(path)

    @contextmanager
    def opened(self) -> Iterator[Fetch]:
        file = _open(self._path, self._state)
        if _state(os.fstat(file.fileno())) != self._state:
            raise InputError(f"{self._path}: {CHANGED}")
        yield lambda start, stop: _all_of(self._path, lambda done: _pread(file, start + done, stop), stop - start)


class CompressedContent:
    """A gzip or zstd file: every way through it begins at its first byte."""

    random_access = False

    def __init__(self, path: Path) -> None:
        self._path, self._state = path, file_state(path)

    @contextmanager
    def opened(self) -> Iterator[Fetch]:
        if file_state(self._path) != self._state:
            raise InputError(f"{self._path}: {CHANGED}")
        with open_raw(self._path) as stream:

            def fetch(start: int, stop: int) -> bytes:
                with reading(self._path):
                    stream.seek(start)
                return _all_of(self._path, lambda done: stream.read(stop - start - done), stop - start)

            yield fetch


def _all_of(path: Path, read: Callable[[int], bytes], size: int) -> bytes:
    """`size` bytes, in as many reads as it takes; `read` is told how many are there."""
    parts, done = [], 0
    while done < size:
        with reading(path):
            part = read(done)
        if not part:
            raise InputError(f"{path}: ends before its index does, so it {CHANGED}")
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _pread(file: BinaryIO, start: int, stop: int) -> bytes:
    """Moves no position, so threads do not disturb each other."""
    return os.pread(file.fileno(), stop - start, start)


def file_state(path: Path) -> State:
    """What tells that a file is still the one that was opened."""
    with reading(path):
        return _state(path.stat())


def _state(found: os.stat_result) -> State:
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=OPEN_FILES)
def _open(path: Path, state: State) -> BinaryIO:
    """The file, open, for one `state` of it; it is closed when it has fallen out of the cache and nobody reads it any more."""
    return open_packed(path)
