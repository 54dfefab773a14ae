"""Folders of derived files (indexes, tokens, packings): where they lie, and how they come to be there whole.

A derived folder is named by what it was made from, so it never changes: it is there and right, or it is not there. Two
jobs that make the same one at once both succeed, and a kill at any moment leaves at most a hidden part that nobody reads.
"""

import errno
import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ds_recipes.errors import InputError

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
            shutil.rmtree(left, ignore_errors=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part")
    part.mkdir(parents=True)
    try:
        yield part
        for path in sorted(part.rglob("*")):
            sync(path)
        sync(part)
        try:
            part.rename(target)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Give a hidden file to write into; after the block it is durable and takes `target`'s place. An error leaves nothing."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.rename(target)
        sync(target.parent)
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
    """Make a file or a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
