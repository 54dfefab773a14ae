"""Folders of derived files (indexes, tokens, packings): where they lie, and how they come to be there whole.

A derived folder is named by what it was made from, so it never changes: it is there and right, or it is not there. Two
jobs that make the same one at once both succeed, and a kill at any moment leaves at most a hidden part that nobody reads.
"""

import contextlib
import errno
import glob
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ds_recipes.errors import InputError
from ds_recipes.fsops import calls
from ds_recipes.fsops.durable import make_folders, publish, remove_tree

CACHE_NAME = ".index_cache"
TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
ABANDONED_SECONDS = 86_400
"""A part in which nothing was written for so long belongs to a job that was killed."""


def cache_beside(data: Path, asked: Path | None, fallback: Path | None = None) -> Path:
    """The folder for files derived from `data`: `asked`, else .index_cache beside it, else `fallback`; it is made.

    Raises:
        InputError: none of them can be written.
    """
    beside = (data if data.is_dir() else data.parent) / CACHE_NAME
    candidates = [asked] if asked is not None else [beside, *([fallback] if fallback is not None else [])]
    problems = []
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            problems.append(f"{folder} cannot be written ({error.strerror})")
        else:
            return folder
    raise InputError(f"{data}: {'; '.join(problems)}. Name a folder that can be, with --data_cache.")


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Give a hidden folder to write into; after the block its files are durable and it appears as `target`, whole.

    If another job has published `target` meanwhile, that one stays. After an error nothing is left; what a kill left is
    removed a day later.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        if is_abandoned(left):
            _remove(left)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part")
    make_folders(part)
    try:
        yield part
        for path in sorted(part.rglob("*")):
            sync(path)
        try:
            publish(part, target)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
    finally:
        _remove(part)


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Give a hidden file to write into; after the block it is durable and takes `target`'s place. An error leaves nothing."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            calls.sync_file(file.fileno(), part)
        calls.replace(part, target)
        calls.sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def is_abandoned(part: Path) -> bool:
    """True for a folder in which nothing has been written for a day."""
    try:
        newest = max(path.stat().st_mtime for path in (part, *part.iterdir()))
    except OSError:  # somebody else removes it
        return False
    return time.time() - newest > ABANDONED_SECONDS


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    if path.is_dir():
        calls.sync_folder(path)
        return
    descriptor = calls.open_to_read(path)
    try:
        calls.sync_file(descriptor, path)
    finally:
        os.close(descriptor)


def _remove(part: Path) -> None:
    """What cannot be removed is in nobody's way: it is hidden, and is tried again a day later."""
    with contextlib.suppress(OSError):
        remove_tree(part)
