"""Where the lines of a file begin and end, found at about the speed of memory.

numpy compares a part of the file with the newline and lists where they are equal, while the part is in a core's cache.
Both, and reading, let other threads run. The same pass over a part hashes it, so a file is read once.
"""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import xxhash

from ds_recipes.data.index.chunks import CHUNK_BYTES, PART_BYTES, Progress, in_threads, read_parts
from ds_recipes.data.index.fingerprint import TreeHash
from ds_recipes.data.index.raw import open_packed

Ints = np.ndarray[Any, np.dtype[np.int64]]
NEWLINE = ord("\n")
WORD = 8
LONG_LINE = 200  # bytes in the mean; of shorter ones most words hold a newline, or nearly so


class Scratch:
    """The buffers of one thread."""

    def __init__(self, part_bytes: int) -> None:
        self.bytes = np.empty(part_bytes, np.uint8)
        self._is_newline = np.zeros(-(-part_bytes // WORD) * WORD, np.bool_)
        self._long_lines = True

    def newlines(self, count: int) -> Ints:
        """Where newlines are among the first `count` bytes of the buffer."""
        flags = self._is_newline[: -(-count // WORD) * WORD]
        flags[count:] = False
        np.equal(self.bytes[:count], NEWLINE, out=flags[:count])
        found = _in_words(flags) if self._long_lines else np.flatnonzero(flags)
        self._long_lines = len(found) * LONG_LINE < count
        return found


def _in_words(flags: np.ndarray[Any, np.dtype[np.bool_]]) -> Ints:
    """Where flags are set: first the words that hold one, then the bytes in those. Half the time if few are."""
    words = np.flatnonzero(flags.view(np.uint64) != 0)  # [words with a flag]
    found = np.flatnonzero(flags.reshape(-1, WORD)[words])  # into those words, laid end to end
    return words[found // WORD] * WORD + found % WORD


def scan_file(
    path: Path,
    tree: TreeHash | None = None,
    progress: Progress | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    part_bytes: int = PART_BYTES,
) -> Iterator[Ints]:
    """Positions behind the newlines of a plain file, chunk by chunk, found in threads; the bytes go into `tree`.

    Raises:
        InputError: it cannot be read, or is cut short meanwhile.
    """
    scratches: SimpleQueue[Scratch] = SimpleQueue()
    with open_packed(path) as file:
        size, handle = os.fstat(file.fileno()).st_size, file.fileno()

        def scan(start: int) -> tuple[Ints, bytes, int]:
            try:
                scratch = scratches.get_nowait()
            except Empty:
                scratch = Scratch(part_bytes)
            hasher = xxhash.xxh3_128()
            found, position, stop = [], start, min(start + chunk_bytes, size)
            for part in read_parts(path, handle, start, stop, scratch.bytes.data):
                if tree is not None:
                    hasher.update(part)
                found.append(scratch.newlines(len(part)) + (position + 1))
                position += len(part)
            scratches.put(scratch)
            return np.concatenate(found), hasher.digest(), stop - start

        done = 0
        for behind, digest, count in in_threads(scan, iter(range(0, size, chunk_bytes))):
            if tree is not None:
                tree.add_chunk(digest, count)
            yield behind
            done += count
            if progress is not None:
                progress(done, size)


def scan_stream(stream: io.BufferedReader, part_bytes: int = PART_BYTES) -> Iterator[Ints]:
    """Positions behind the newlines of a stream, part by part."""
    scratch, position = Scratch(part_bytes), 0
    while count := stream.readinto(scratch.bytes.data):
        yield scratch.newlines(count) + (position + 1)
        position += count


def line_bounds(body: int, behind_newlines: Iterator[Ints], content_bytes: Callable[[], int]) -> Iterator[Ints]:
    """Where each line begins, and where the last one ends: [lines + 1], piece by piece.

    The first line begins at `body`. A last line without a newline is a line. `content_bytes` is
    asked at the end.
    """
    last = body
    yield np.array([body])
    for piece in behind_newlines:
        if len(piece):
            yield piece
            last = int(piece[-1])
    if last != content_bytes():
        yield np.array([content_bytes()])
