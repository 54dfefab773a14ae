"""What was found out about a file, kept in a folder that is named by the file and its state.

    .index_cache/train.jsonl-3f9c2a01-lines-5b1e0c9d8a7f6e54/
        meta.json           the file and its state, the facts found, and the length and digest of every array
        bounds.npy ...      int64 arrays, opened as memory maps

A state is size, time of change, and a hash of head and tail. If any of them changes, the name changes, and what was kept
of the old state is deleted. (Bytes that change between head and tail, while size and time stay, are not seen.) Opening
costs the same whatever the file's size. An entry that is not whole in every respect is made again, never believed.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from ds_recipes.data.array_files import INT64, ArrayFile, digest_of_json, facts_of_array, hash_ends, open_numbers
from ds_recipes.data.index.raw import open_packed, reading
from ds_recipes.data.published import is_abandoned, publishing
from ds_recipes.errors import InputError

VERSION = 1
META = "meta.json"
ENDS_BYTES = 1 << 16
"""Hashed at the head and at the tail of a data file: as much as one read brings."""

ARRAY_ENDS_BYTES = 1 << 24
"""The same of an array: those up to 32 MiB are verified whole."""

SMALL_ARRAY_BYTES = 1 << 18
"""Read rather than mapped: a map keeps a file open, and a folder may hold thousands of small files."""

ATTEMPTS = 3
"""Another job may delete an entry, as that of an older state, between our publishing it and opening it."""

MOST_META_BYTES = 1 << 20
MOST_NAME_BYTES = 120

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class FileState:
    """What tells, at the cost of one look, that a file is still what it was."""

    path: str  # absolute, links followed
    size: int  # bytes
    mtime_ns: int
    ends: str  # hash of head and tail

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """Look at a file.

        Raises:
            InputError: it is missing or cannot be read.
        """
        with open_packed(path) as file, reading(path):
            found = os.fstat(file.fileno())
            ends = hash_ends(file, found.st_size, ENDS_BYTES)
        return cls(str(path.resolve()), found.st_size, found.st_mtime_ns, ends)


@dataclass(frozen=True)
class Entry:
    """An opened entry: its facts, and its arrays by name."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, Ints]


@dataclass(frozen=True)
class Place:
    """Where the findings of one kind about a file in one state lie. `more`: other files that decide what is found."""

    cache: Path
    kind: str
    state: FileState
    more: tuple[FileState, ...] = ()

    @property
    def folder(self) -> Path:
        key = xxhash.xxh3_64_hexdigest(json.dumps(self._identity(), sort_keys=True).encode())
        return self.cache / f"{self._family()}{key}"

    def opened(self, is_good: Callable[[Entry], bool], make: Callable[["EntryWriter"], None]) -> Entry:
        """What is kept here. It is made first if it is not there, or not whole.

        Raises:
            InputError: the cache cannot be written, or not read back; or what `make` raises.
        """
        for _ in range(ATTEMPTS):
            entry = self.read(is_good)
            if entry is not None:
                return entry
            with self.writing(is_good) as writer:
                make(writer)
        raise InputError(
            f"{self.folder}: what was written there cannot be read back. Name another folder for the cache."
        )

    def read(self, is_good: Callable[[Entry], bool]) -> Entry | None:
        """What is kept here; None if nothing is, or if it is damaged, or not `is_good`."""
        try:
            entry = self._read()
            return entry if entry is not None and is_good(entry) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RecursionError):
            return None

    @contextmanager
    def writing(self, is_good: Callable[[Entry], bool]) -> Iterator["EntryWriter"]:
        """Publish what the block writes, whole, unless another job has published the same; delete that of other states.

        Raises:
            InputError: the cache cannot be written.
        """
        try:
            with publishing(self.folder) as part, EntryWriter(part) as writer:
                yield writer
                writer.finish(self._identity())
                if self.read(is_good) is None:
                    delete(self.folder)  # damaged, or not there
        except OSError as error:
            raise InputError(f"{self.cache}: cannot be written ({error.strerror}). Name another folder.") from error
        self._delete_stale()

    def _read(self) -> Entry | None:
        with (self.folder / META).open("rb") as file:
            meta = json.loads(file.read(MOST_META_BYTES))
        content, digest = meta["content"], meta["digest"]
        if (
            digest != digest_of_json(content)
            or content["version"] != VERSION
            or content["identity"] != self._identity()
        ):
            return None
        if not all(name.isidentifier() for name in content["arrays"]):
            return None  # a path that leaves the folder
        arrays = {
            name: open_numbers(self.folder / f"{name}.npy", facts, ARRAY_ENDS_BYTES, SMALL_ARRAY_BYTES)
            for name, facts in content["arrays"].items()
        }
        return Entry(content["facts"], arrays)

    def _identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "file": asdict(self.state), "more": [asdict(state) for state in self.more]}

    def _family(self) -> str:
        """What the names of all states of this file begin with."""
        path = Path(self.state.path)
        name = os.fsencode(path.name)[:MOST_NAME_BYTES].decode(errors="ignore")
        return f"{name}-{xxhash.xxh3_64_hexdigest(os.fsencode(path))[:8]}-{self.kind}-"

    def _delete_stale(self) -> None:
        mine, family = self.folder.name, self._family()
        for found in _names(self.cache):
            is_other_state = found.startswith(family) and found != mine
            if is_other_state or (found.startswith(f".{family}") and is_abandoned(self.cache / found)):
                delete(self.cache / found)


class EntryWriter:
    """Writes the arrays and facts of an entry. Arrays grow on the disk, so they need not fit into memory."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = {}
        self._folder = folder
        self._arrays: dict[str, ArrayFile] = {}

    def array(self, name: str) -> ArrayFile:
        """A new int64 array that grows."""
        self._arrays[name] = ArrayFile(self._folder / f"{name}.npy", INT64)
        return self._arrays[name]

    def finish(self, identity: Mapping[str, Any]) -> None:
        """Write meta.json, after which nothing may be added."""
        arrays = {}
        for name, array in self._arrays.items():
            array.close()
            arrays[name] = facts_of_array(self._folder / f"{name}.npy", array.rows, ARRAY_ENDS_BYTES)
        content = {"version": VERSION, "identity": identity, "facts": self.facts, "arrays": arrays}
        text = json.dumps({"content": content, "digest": digest_of_json(content)}, indent=1)
        (self._folder / META).write_text(text, encoding="utf-8")

    def __enter__(self) -> "EntryWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for array in self._arrays.values():
            array.__exit__(kind, error, traceback)


def delete(folder: Path) -> None:
    """Delete what may be there, or may be deleted by another job meanwhile, or may be held by one."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)


def _names(folder: Path) -> Iterable[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []
