"""The layer that every byte of a checkpoint goes through: write with a hash, read back, publish, remove.

A file counts as written only after fsync, a name only after the fsync of its folder. The hash is XXH3-128: it finds
every accident (a flipped bit, a torn write, a swapped file) at the speed of memory. It is no defence against a forger;
nothing that is read can run code either way.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

READ_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and its XXH3-128 in hexadecimal."""

    size: int
    xxh3_128: str


def hash_bytes(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file durably and return its record, hashed on the way.

    Raises:
        OSError: with the path, for a full disk among others.
    """
    hasher, size = xxhash.xxh3_128(), 0
    try:
        with path.open("xb", buffering=0) as file:
            for piece in pieces:
                hasher.update(piece)
                size += len(piece)
                _write_all(file.fileno(), piece)
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise
    return FileRecord(size, hasher.hexdigest())


def _write_all(descriptor: int, piece: bytes | memoryview) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of a file, so that a reader or a kill finds the old bytes or the new ones."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    write_file(part, [data])
    part.replace(path)
    sync_folder(path.parent)


def read_record(path: Path) -> FileRecord:
    """The record of a file as it lies on the disk."""
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            hasher.update(piece)
            size += len(piece)
    return FileRecord(size, hasher.hexdigest())


def why_damaged(path: Path, expected: FileRecord) -> str | None:
    """What is wrong with a file, in one line; None if it is whole. Sizes are compared before anything is read."""
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path.name} has {size:,} bytes where {expected.size:,} were written"
        found = read_record(path).xxh3_128
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    if found != expected.xxh3_128:
        return f"{path.name} is damaged (its hash is {found}, {expected.xxh3_128} was written)"
    return None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name, in one step that a kill cannot split.

    Raises:
        OSError: `final` exists and is not empty.
    """
    sync_folder(partial)
    partial.rename(final)
    sync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder: first its name becomes a hidden one, so that a kill half way leaves nothing that looks whole."""
    doomed = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.deleted")
    if doomed != folder:
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        sync_folder(folder.parent)
    shutil.rmtree(doomed)
