"""What a file of a checkpoint must be: written with a hash on the way, and compared with it when it is read back.

The hash is XXH3-128: it finds every accident (a flipped bit, a torn write, a swapped file) at the speed of memory. It is no
defence against a forger; nothing that is read can run code either way.
"""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ds_recipes.errors import UnreadableError
from ds_recipes.fsops import calls, durable
from ds_recipes.fsops.again import again
from ds_recipes.fsops.calls import Data
from ds_recipes.world.hang.activity import progress

READ_BYTES = 8 << 20


MADE_OTHERWISE = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
"""Errors that tell of what lies on the disk, and not of a disk that does not answer."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and its XXH3-128 in hexadecimal.

    `parts` holds for each kind of tensor in a rank's file the hash of its header and of that kind's bytes, in file order, so
    that who reads the weights alone can verify them alone.
    """

    size: int
    xxh3_128: str
    parts: Mapping[str, str] = field(default_factory=dict)


def hash_bytes(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def write_file(path: Path, pieces: Iterable[Data]) -> FileRecord:
    """Write a new file durably and return its record, hashed on the way.

    Raises:
        OSError: with the path, for a full disk among others.
    """
    hasher = xxhash.xxh3_128()

    def hashed() -> Iterator[Data]:
        for piece in pieces:
            hasher.update(piece)
            yield piece
            progress()

    size = durable.write_file(path, hashed())
    return FileRecord(size, hasher.hexdigest())


def write_tensors(path: Path, head: bytes, tensors: Iterable[tuple[str, Data]]) -> FileRecord:
    """Write a new file of tensors durably: its header, then each tensor's bytes in pieces, which come with their kind.

    Raises:
        OSError: with the path, for a full disk among others.
    """
    whole = xxhash.xxh3_128(head)
    parts: dict[str, xxhash.xxh3_128] = {}

    def pieces() -> Iterator[Data]:
        yield head
        for kind, piece in tensors:
            if kind not in parts:
                parts[kind] = xxhash.xxh3_128(head)
            whole.update(piece)
            parts[kind].update(piece)
            yield piece
            progress()

    size = durable.write_file(path, pieces())
    return FileRecord(size, whole.hexdigest(), {kind: hasher.hexdigest() for kind, hasher in parts.items()})


def read_record(path: Path) -> FileRecord:
    """The record of a file as it lies on the disk."""
    hasher, size = xxhash.xxh3_128(), 0
    with os.fdopen(calls.open_to_read(path), "rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            hasher.update(piece)
            size += len(piece)
            progress()
    return FileRecord(size, hasher.hexdigest())


def drop_from_cache(path: Path) -> None:
    """Let the kernel forget a durable file's content, so that the next read asks the disk. Where it cannot, nothing happens."""
    with contextlib.suppress(OSError), os.fdopen(calls.open_to_read(path), "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(path: Path) -> bytes:
    """A small file's content."""
    with os.fdopen(again(lambda: calls.open_to_read(path)), "rb") as file:
        return file.read()


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """What to say of a file that the disk does not give."""
    return UnreadableError(
        f"{path}: cannot be read: {error.strerror}. Reads were tried again for some seconds. That does not mean that it is "
        f"damaged, so no older checkpoint is taken. Start the same command again once the disk answers; to go on from the one "
        "before, move that checkpoint's folder away."
    )


def why_damaged(path: Path, expected: FileRecord, sizes_only: bool = False) -> str | None:
    """What is wrong with a file, in one line; None if it is whole. Sizes are compared before anything is read.

    Raises:
        UnreadableError: the disk does not give it, also when it is asked again for some seconds.
    """
    try:
        size = again(lambda: calls.size_of(path))
        if size != expected.size:
            return f"{path.name} has {size:,} bytes where {expected.size:,} were written"
        if sizes_only:
            return None
        found = again(lambda: read_record(path)).xxh3_128
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        if error.errno not in MADE_OTHERWISE:
            raise unreadable(path, error) from error
        return f"{path.name} cannot be read ({error.strerror})"
    if found != expected.xxh3_128:
        return f"{path.name} is damaged (its hash is {found}, {expected.xxh3_128} was written)"
    return None
