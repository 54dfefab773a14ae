"""Open the index of a file: read what is kept of it, or make it once.

    index = open_index(Path("train.jsonl"), cache_beside(Path("train.jsonl"), None))
    first = content[index.starts[0] : index.ends[0]]

The first time reads the whole file once, at about the speed of memory; later it costs the same for any size.
"""

from dataclasses import replace
from pathlib import Path

from ds_recipes.data.index.chunks import CHANGED, Progress
from ds_recipes.data.index.entries import FINGERPRINT, Index, holds_index, index_from, write_entries
from ds_recipes.data.index.fingerprint import hash_file
from ds_recipes.data.index.kept import Entry, EntryWriter, FileState, Place
from ds_recipes.data.index.raw import compression_of
from ds_recipes.data.index.text_index import Choice, text_index_of
from ds_recipes.errors import InputError

LINES, BYTES, CHOSEN = "lines", "bytes", "chosen"
"""Kinds of entries in the cache: an index, a fingerprint alone, and what an ancestor's text index says."""

__all__ = ["Index", "Progress", "file_fingerprint", "index_folder", "open_index", "open_whole_index"]


def open_index(path: Path, cache: Path, progress: Progress | None = None) -> Index:
    """The index of a file, kept in the folder `cache`. Entries are counted from 0, lines from 1.

    An ancestor's text index beside a JSONL file decides which lines are entries; a note says what it leaves out.

    Raises:
        InputError: the file is missing, unreadable, empty, blank, no text, cut off, no array though it begins like one,
            or changed meanwhile; or the cache cannot be written.
    """
    state = FileState.of(path)
    index = _whole(path, state, cache, progress)
    text_index = text_index_of(path)
    if text_index is None or index.is_array or compression_of(path):
        return index
    return _chosen(index, text_index, state, cache)


def open_whole_index(path: Path, cache: Path, progress: Progress | None = None) -> Index:
    """The same with all lines as entries, whatever an ancestor's text index lists.

    Raises:
        InputError: see `open_index`.
    """
    return _whole(path, FileState.of(path), cache, progress)


def index_folder(path: Path, cache: Path) -> Path:
    """The folder in `cache` where the index of a file lies, or will lie.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    return Place(cache, LINES, FileState.of(path)).folder


def file_fingerprint(path: Path, cache: Path, progress: Progress | None = None) -> str:
    """The fingerprint of a file's bytes, 32 hex digits, kept in the folder `cache`. An index of the file has the same.

    Raises:
        InputError: the file is missing, unreadable, or changed meanwhile; or the cache cannot be written.
    """
    state = FileState.of(path)

    def make(writer: EntryWriter) -> None:
        writer.facts["fingerprint"] = hash_file(path, progress)
        _check_unchanged(path, state)

    def is_good(entry: Entry) -> bool:
        return FINGERPRINT.fullmatch(entry.facts["fingerprint"]) is not None

    return str(Place(cache, BYTES, state).opened(is_good, make).facts["fingerprint"])


def _whole(path: Path, state: FileState, cache: Path, progress: Progress | None) -> Index:
    def make(writer: EntryWriter) -> None:
        try:
            write_entries(path, state.size, writer, progress)
        except InputError:
            _check_unchanged(path, state)  # a file that is being written may look like a bad one
            raise
        _check_unchanged(path, state)

    return index_from(path, Place(cache, LINES, state).opened(holds_index, make))


def _chosen(index: Index, text_index: Path, state: FileState, cache: Path) -> Index:
    """The index of the lines that a text index lists, or the whole index and a note that says why."""
    try:
        own_state = FileState.of(text_index)
    except InputError as problem:
        return replace(index, notes=(str(problem),))
    choice = Choice(index, text_index, is_older=own_state.mtime_ns < state.mtime_ns)

    def make(writer: EntryWriter) -> None:
        choice.write(writer)
        _check_unchanged(text_index, own_state)

    return choice.applied(Place(cache, CHOSEN, state, (own_state,)).opened(choice.is_held_by, make))


def _check_unchanged(path: Path, state: FileState) -> None:
    if FileState.of(path) != state:
        raise InputError(f"{path}: {CHANGED}")
