"""Files that are mapped into memory, and whether they are still as long as when that was done.

Beyond the end of a file that somebody has cut, a map has no bytes: looking there kills the process by SIGBUS, without a word.
So every map is known here, and whoever reads rows asks first. A file that is replaced or removed goes on being read as it was.
"""

import mmap
import threading
import weakref
from pathlib import Path

from ds_recipes.errors import DsRecipesError

_PATHS: weakref.WeakKeyDictionary[mmap.mmap, Path] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def watch(mapped: object, path: Path) -> None:
    """Remember a map of the whole file at `path` for as long as it is in use."""
    assert isinstance(mapped, mmap.mmap)
    with _LOCK:
        _PATHS[mapped] = path


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, read from disk where they are looked at.

    Raises:
        OSError, ValueError: it cannot be mapped.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    watch(mapped, path)
    return mapped


def check_mapped() -> None:
    """Half a microsecond a file.

    Raises:
        DsRecipesError: a mapped file has become shorter, or is not to be had any more.
    """
    with _LOCK:
        maps = list(_PATHS.items())
    for mapped, path in maps:
        try:
            size = mapped.size()  # of the file that was mapped, whatever lies at its path now
        except OSError as error:
            raise DsRecipesError(
                f"{path}: is gone while the run was using it ({error.strerror or error}). {_AGAIN}"
            ) from error
        if size < len(mapped):
            raise DsRecipesError(
                f"{path}: has become shorter while the run was using it: {len(mapped):,} bytes when it was opened, {size:,} now. "
                f"{_AGAIN}"
            )


_AGAIN = (
    "Leave data and cache alone while a run uses them, and start again: what is damaged in the cache is made again."
)
