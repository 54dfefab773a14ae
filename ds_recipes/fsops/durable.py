"""Files and folders that are there whole or not at all: written, replaced, published and removed.

A file counts as written only after fsync, a name only after the fsync of its folder.
"""

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from ds_recipes.fsops import calls
from ds_recipes.fsops.again import again
from ds_recipes.fsops.calls import Data

DELETED = ".deleted"
"""How the hidden name ends that a folder has while it is deleted."""


def write_file(path: Path, pieces: Iterable[Data]) -> int:
    """Write a new file durably; returns its size in bytes.

    Raises:
        OSError: with the path, for a full disk among others.
    """
    size = 0
    try:
        descriptor = calls.create(path)
        try:
            for piece in pieces:
                calls.write(descriptor, path, piece)
                size += len(piece)
            calls.sync_file(descriptor, path)
        finally:
            os.close(descriptor)
    except OSError as error:  # one of a file that the pieces are read from has its own name
        error.filename = error.filename or str(path)
        raise
    return size


def replace_file(path: Path, data: Data) -> None:
    """Put `data` in the place of a file, so that a reader or a kill finds the old bytes or the new ones."""
    part = path.with_name(f".{path.name}.part")
    with contextlib.suppress(FileNotFoundError):
        calls.remove_file(part)
    write_file(part, [data])
    calls.replace(part, path)
    calls.sync_folder(path.parent)


def make_folders(path: Path) -> None:
    """Make a folder that may be there, and its parents, so that what becomes durable in it is not lost with its name."""
    if path.is_dir():
        return
    make_folders(path.parent)
    with contextlib.suppress(FileExistsError):
        calls.make_folder(path)
    calls.sync_folder(path.parent)


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name, in one step that a kill cannot split.

    Raises:
        OSError: `final` exists and is not empty, or `partial` is gone: somebody else removed it.
    """
    calls.sync_folder(partial)
    renamed = False

    def rename() -> None:
        """A rename that NFS reports as failed may have been done: the server's answer was lost."""
        nonlocal renamed
        try:
            calls.rename(partial, final)
        except FileNotFoundError:
            if not renamed or not final.is_dir():
                raise
        except OSError as error:
            renamed = error.errno in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)
            raise

    again(rename)
    calls.sync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder: first its name becomes a hidden one, so that a kill half way leaves nothing that looks whole."""
    doomed = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}{DELETED}")
    if doomed != folder:
        remove_tree(doomed)
        calls.rename(folder, doomed)
        calls.sync_folder(folder.parent)
    remove_tree(doomed)


def remove_tree(folder: Path) -> None:
    """Delete a folder with all that is in it; one that does not exist, or goes meanwhile, is no error."""
    try:
        names = calls.names_in(folder)
    except FileNotFoundError:
        return
    for name in names:
        path = folder / name
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            else:
                calls.remove_file(path)
    with contextlib.suppress(FileNotFoundError):
        calls.remove_empty_folder(folder)
