"""The files of one data path: opened, fingerprinted, and opened again where a record is needed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ds_recipes.config.data_paths import HubData
from ds_recipes.data.index.cache import Progress
from ds_recipes.data.sources.entries import ByteEntries
from ds_recipes.data.sources.megatron import is_megatron
from ds_recipes.data.sources.open import open_source
from ds_recipes.data.sources.record import Source
from ds_recipes.data.tokens.recent import Recent
from ds_recipes.data.tokens.token_files import TokenFile
from ds_recipes.errors import InputError

MOST_OPEN = 16


@dataclass(frozen=True)
class DataFile:
    """One file (or folder, or hub split) and what was found in it. Its line index is kept in `cache`."""

    place: Path | HubData
    cache: Path
    name: str
    fingerprint: str
    num_entries: int
    holds_tokens: bool
    has_byte_ranges: bool  # its entries are such, so what is read of it is known in bytes
    random_access: bool
    notes: tuple[str, ...]


class Entries(Protocol):
    """What files of records and of tokens have in common; see `Source`."""

    name: str
    fingerprint: str
    random_access: bool

    def __len__(self) -> int: ...
    def line(self, entry: int) -> int: ...
    def cuts(self, pieces: int) -> list[int]: ...


class OpenFiles:
    """Opens files when they are asked for and keeps the latest open. Any number of threads may use it."""

    def __init__(self, files: tuple[DataFile, ...], most_open: int = MOST_OPEN) -> None:
        self.files = files
        self._recent: Recent[Entries] = Recent(most_open, self._open)

    def entries(self, number: int) -> Entries:
        """A file of either kind.

        Raises:
            InputError: it can no longer be read, or its content is not what it was.
        """
        return self._recent.get(number)

    def source(self, number: int) -> Source:
        """A file of records. Raises: see `entries`."""
        source = self.entries(number)
        assert not isinstance(source, TokenFile)
        return source  # type: ignore[return-value]

    def token_file(self, number: int) -> TokenFile:
        """A file of tokens. Raises: see `entries`."""
        file = self.entries(number)
        assert isinstance(file, TokenFile)
        return file

    def _open(self, number: int) -> Entries:
        file = self.files[number]
        found = open_entries(file.place, file.cache)
        if found.fingerprint != file.fingerprint:
            raise InputError(
                f"{file.name}: changed while the run was using it (fingerprint {found.fingerprint}, {file.fingerprint} "
                "before). Start again, and leave the data alone while a run reads them."
            )
        return found


def open_entries(place: Path | HubData, cache: Path, progress: Progress | None = None) -> Entries:
    """Open a file of either kind.

    Raises:
        InputError: it is missing, unreadable or of an unknown kind; NoRecordsError: it holds no record.
    """
    if isinstance(place, Path) and is_megatron(place):
        return TokenFile(place, cache, progress)
    return open_source(place, cache, progress)


def describe(place: Path | HubData, cache: Path, progress: Progress | None = None) -> DataFile:
    """Open a file to see what it is. Raises: see `open_entries`."""
    found = open_entries(place, cache, progress)
    return DataFile(
        place=place,
        cache=cache,
        name=found.name,
        fingerprint=found.fingerprint,
        num_entries=len(found),
        holds_tokens=isinstance(found, TokenFile),
        has_byte_ranges=isinstance(found, ByteEntries),
        random_access=found.random_access,
        notes=tuple(getattr(found, "notes", ())),
    )
