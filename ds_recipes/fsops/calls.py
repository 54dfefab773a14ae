"""The only calls through which files that must survive a fault are changed and read back.

Each call passes one point, where a test can stand: to kill the process, to tear a write, to fail, to wait, or to write a
log (`faults.py`). In a run nobody stands there, and a call costs one comparison more than the system call itself.
Nothing here imports torch.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Data = bytes | memoryview

WRITE_BYTES = 256 << 10
"""Bytes a system call. For larger ones Linux takes large pages into its cache, which on a virtual machine whose host takes free
memory back cost up to four times as long (`benchmarks/export.py`); smaller ones gain nothing."""


@dataclass(frozen=True)
class Call:
    """One call that is about to be made.

    `kind` is create, write, append, fsync, rename, replace, mkdir, unlink, rmdir, fsync_folder (the calls that change the
    disk) or open, stat, list (those that read). `target` is the new name of a rename, `data` what a write
    writes, `descriptor` where.
    """

    kind: str
    path: Path
    target: Path | None = None
    data: Data | None = None
    descriptor: int | None = None


interceptor: Callable[[Call], None] | None = None
"""Whoever stands at the point; called before each call, and free to raise, wait, or end the process."""


def create(path: Path) -> int:
    """Make a new file and return its descriptor, open for writing.

    Raises:
        FileExistsError: there is one.
    """
    _point(Call("create", path))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write(descriptor: int, path: Path, data: Data) -> None:
    """Write all of `data` at the end of an open file."""
    _point(Call("write", path, data=data, descriptor=descriptor))
    _write_all(descriptor, data)


def append(path: Path, data: Data) -> None:
    """Write a line or a few at the end of a file, which is made if there is none, without waiting for the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        _point(Call("append", path, data=data, descriptor=descriptor))
        _write_all(descriptor, data)
    finally:
        os.close(descriptor)


def sync_file(descriptor: int, path: Path) -> None:
    """Make the content of an open file durable. A failure is final: the kernel may have dropped what it could not write."""
    _point(Call("fsync", path, descriptor=descriptor))
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Where the file system cannot be asked for that (EINVAL), they already are, or
    nothing can be done (PostgreSQL goes on as well).
    """
    _point(Call("fsync_folder", path))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder a name that no file and no folder with something in it has."""
    _point(Call("rename", source, target))
    source.rename(target)


def replace(source: Path, target: Path) -> None:
    """Put a file in another's place, in one step."""
    _point(Call("replace", source, target))
    source.replace(target)


def make_folder(path: Path) -> None:
    """Make a folder whose parent exists.

    Raises:
        FileExistsError: there is one.
    """
    _point(Call("mkdir", path))
    path.mkdir()


def remove_file(path: Path) -> None:
    _point(Call("unlink", path))
    path.unlink()


def remove_empty_folder(path: Path) -> None:
    _point(Call("rmdir", path))
    path.rmdir()


def open_to_read(path: Path) -> int:
    """The descriptor of a file, open for reading."""
    _point(Call("open", path))
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def size_of(path: Path) -> int:
    """Bytes of a file."""
    _point(Call("stat", path))
    return path.stat().st_size


def names_in(path: Path) -> list[str]:
    """The names in a folder, sorted."""
    _point(Call("list", path))
    return sorted(entry.name for entry in path.iterdir())


def _write_all(descriptor: int, data: Data) -> None:
    """A write may take less than it is given: 2 GiB at most, and what still fits when the disk is filling up."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest[:WRITE_BYTES]) :]


def _point(call: Call) -> None:
    standing = interceptor
    if standing is not None:
        standing(call)
