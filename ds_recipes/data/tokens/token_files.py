"""Megatron's token files as a source of documents: nothing is tokenised, but lengths, hashes and ids are taken down."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash

from ds_recipes.data.encode import Encoded
from ds_recipes.data.sources.megatron import MegatronFile
from ds_recipes.data.sources.record import Bad
from ds_recipes.errors import InputError

BATCH_DOCUMENTS = 1000

Ints = np.ndarray[Any, np.dtype[np.int64]]


class TokenFile(MegatronFile):
    """A pair of token files, divided like a `Source`: entry and line count documents, from 0 and from 1."""

    random_access = True

    def line(self, entry: int) -> int:
        """The document's number, from 1."""
        return entry + 1

    def cuts(self, pieces: int) -> list[int]:
        """Slices of about as many tokens each."""
        ends = np.cumsum(self.lengths)  # [documents]
        targets = np.linspace(0, int(ends[-1]), max(1, pieces), endpoint=False)[1:]
        return sorted({0, *np.searchsorted(ends, targets).tolist(), len(self)})

    def read(self, start: int, stop: int, vocabulary_size: int) -> Iterator[tuple[Encoded, list[Bad]]]:
        """Documents `start` to `stop` in batches, each learned from its second token on; ids are not copied."""
        for low in range(start, stop, BATCH_DOCUMENTS):
            yield self._batch(low, min(low + BATCH_DOCUMENTS, stop), vocabulary_size)

    def _batch(self, start: int, stop: int, vocabulary_size: int) -> tuple[Encoded, list[Bad]]:
        entries, hashes, bad = [], [], []
        for entry in range(start, stop):
            try:
                ids = self._checked(entry, vocabulary_size)
            except InputError as error:
                bad.append(Bad(entry, str(error)))
            else:
                entries.append(entry)
                hashes.append(xxhash.xxh3_64_intdigest(ids.astype("<u4").tobytes()))  # as of records of ids
        lengths = self.lengths[entries]  # [documents]
        spans = np.stack([np.ones_like(lengths), lengths], axis=1).astype(np.int32)  # [documents, 2]
        encoded = Encoded(
            ids=np.zeros(0, np.uint32),
            lengths=lengths,
            entries=np.array(entries, np.int64),
            spans=spans,
            span_counts=np.ones_like(lengths),
            hashes=np.array(hashes, np.uint64),
            bad=(),
        )
        return encoded, bad

    def _checked(self, entry: int, vocabulary_size: int) -> np.ndarray[Any, Any]:
        where = f"{self.name}:{self.line(entry)}"
        ids = self.tokens(entry)
        if len(ids) < 2:
            raise InputError(
                f"{where}: the document has {len(ids)} token{'s' * (len(ids) != 1)}, so it has no target token. Leave it "
                "out when you write the file."
            )
        if int(ids.max()) >= vocabulary_size:
            raise InputError(
                f"{where}: holds the token id {int(ids.max()):,}, but the model has embeddings for ids below "
                f"{vocabulary_size:,}. Write the file with the model's own tokenizer, or enlarge the model's embedding."
            )
        return ids
