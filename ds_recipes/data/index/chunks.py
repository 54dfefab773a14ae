"""A file read in chunks, by as many threads as there are cores, each with buffers that stay in its core's cache."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ds_recipes.data.index.raw import reading
from ds_recipes.errors import InputError

CHUNK_BYTES = 1 << 22
"""What one thread takes at a time, and what is hashed as one: fingerprints depend on it, so it never changes."""

PART_BYTES = 1 << 20
"""Read and worked on at once."""

MOST_THREADS = 8
CHANGED = "was changed while it was read. Begin again when nothing writes into it."

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def read_parts(path: Path, handle: int, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes from `start` to `stop` of an open file in parts, each in `buffer` until the next one comes.

    They are read, not mapped: a mapped file that another job cuts short would end this process without a message.

    Raises:
        InputError: the file cannot be read, or ends before `stop`.
    """
    while start < stop:
        with reading(path):
            count = os.preadv(handle, [buffer[: stop - start]], start)
        if count == 0:
            raise InputError(f"{path}: {CHANGED}")
        yield buffer[:count]
        start += count


def in_threads(function: Callable[[Argument], Result], arguments: Iterator[Argument]) -> Iterator[Result]:
    """Results in the order of their arguments, computed a few ahead; an error comes in its turn."""
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for argument in arguments:
                waiting.append(pool.submit(function, argument))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
