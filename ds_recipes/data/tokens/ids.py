"""Where a document's token ids come from: the store's own files, Megatron's token files, or the records themselves."""

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ds_recipes.data.array_files import array_bytes
from ds_recipes.data.encode import Encoded, Encoder
from ds_recipes.data.formats.sample import Format
from ds_recipes.data.mapped import map_file
from ds_recipes.data.sources.record import Record
from ds_recipes.data.tokens.files import OpenFiles
from ds_recipes.data.tokens.parts import part_folder
from ds_recipes.data.tokens.recent import Recent
from ds_recipes.errors import DsRecipesError, InputError

Ints = np.ndarray[Any, np.dtype[Any]]

Place = Callable[[int], tuple[int, int]]
"""The file's number and the entry that a document came from."""

MOST_MAPS = 128
RECENT_DOCUMENTS = 64


class Ids(Protocol):
    """A way to the ids of each document. Any number of threads may use it."""

    def tokens(self, document: int) -> Ints:
        """The ids of a document: [its tokens]."""
        ...


class StoredIds:
    """Ids in the parts of a store, as memory maps; at most some parts are open at once."""

    def __init__(
        self,
        store: Path,
        parts: Sequence[tuple[int, int]],
        offsets: Ints,
        dtype: np.dtype[Any],
        most_maps: int = MOST_MAPS,
    ) -> None:
        """`parts`: documents and tokens of each; `offsets`: where each document begins in all of them."""
        self._store = store
        self._first_document = [0, *accumulate(documents for documents, _ in parts)]
        self._first_token = [0, *accumulate(tokens for _, tokens in parts)]
        self._offsets = offsets
        self._dtype = dtype
        self._header_bytes = array_bytes(dtype, (), 0)
        self._maps: Recent[Ints] = Recent(most_maps, self._map)

    def tokens(self, document: int) -> Ints:
        part = bisect_right(self._first_document, document) - 1  # of parts without documents, the last is passed over
        ids = self._maps.get(part)
        first = self._first_token[part]
        return ids[int(self._offsets[document]) - first : int(self._offsets[document + 1]) - first]

    def _map(self, part: int) -> Ints:
        path = part_folder(self._store, part) / "ids.npy"
        try:
            mapped = map_file(path)
        except (OSError, ValueError) as error:
            raise DsRecipesError(
                f"{path}: cannot be read ({error}). It was there when the run began; start again, and what is missing is "
                "made again."
            ) from error
        return np.frombuffer(mapped, self._dtype, offset=self._header_bytes)


class MegatronIds:
    """Ids in Megatron's token files, read as they are."""

    def __init__(self, files: OpenFiles, place: Place, dtype: np.dtype[Any]) -> None:
        self._files = files
        self._place = place
        self._dtype = dtype

    def tokens(self, document: int) -> Ints:
        file, entry = self._place(document)
        return self._files.token_file(file).tokens(entry).astype(self._dtype, copy=False)


class StreamedIds:
    """Ids that are made when asked for, from the record, and found equal to those that were counted."""

    def __init__(
        self, files: OpenFiles, place: Place, record_format: Format, encoder: Encoder, offsets: Ints, hashes: Ints
    ) -> None:
        self._files = files
        self._place = place
        self._format = record_format
        self._encoder = encoder
        self._offsets = offsets
        self._hashes = hashes
        self._reading = threading.Lock()  # a user's function may know nothing of threads
        self._recent: Recent[Ints] = Recent(RECENT_DOCUMENTS, self._make)

    def tokens(self, document: int) -> Ints:
        return self._recent.get(document)

    def _make(self, document: int) -> Ints:
        file, entry = self._place(document)
        source = self._files.source(file)
        length = int(self._offsets[document + 1] - self._offsets[document])
        for record in source.read(entry, entry + 1):
            made = self._encode(record) if isinstance(record, Record) else None
            if made is not None and len(made.ids) == length and made.hashes[0] == self._hashes[document]:
                return made.ids
        raise DsRecipesError(
            f"{source.name}:{source.line(entry)}: changed while the run was using it: the record no longer makes the "
            f"{length:,} tokens that were counted. Start again, and leave the data and the format alone while a run reads them."
        )

    def _encode(self, record: Record) -> Encoded | None:
        """The record's one document, if it still makes one."""
        try:
            with self._reading:
                sample = self._format.read(record)
        except InputError:
            return None
        encoded = self._encoder.encode([record], [sample]) if sample is not None else None
        return encoded if encoded is not None and len(encoded.lengths) == 1 else None
