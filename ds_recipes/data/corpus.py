"""All sources of a run as one order of rows: which row of which source comes when, and what it holds."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.dataset import PackedDataset, Row
from ds_recipes.data.mixture import PERIOD, Located, Mixture, ShareTooSmall
from ds_recipes.errors import InputError

Ints = np.ndarray[Any, np.dtype[np.int64]]


class Corpus:
    """Packed rows of one or several sources. A row's number counts through the sources in their order."""

    def __init__(
        self, sources: Sequence[PackedDataset], weights: Sequence[float] | None, seed: int, purpose: str = "training"
    ) -> None:
        """`weights` are shares of the tokens; None: every row comes once an epoch.

        Raises:
            InputError: a source that has a weight, or all of them together, have no row; or a weight is too small to
                give its source one.
        """
        empty = [source for source in sources if source.num_rows == 0]
        if empty and (weights is not None or len(empty) == len(sources)):
            facts = empty[0].facts
            raise InputError(
                f"{empty[0].name}: no document is left for {purpose} ({facts.held_out:,} on the other side of the split or "
                f"equal to a validation document, {facts.dropped:,} too long, {facts.without_target:,} without a target, of "
                f"{len(empty[0].documents):,}). Name more data, or change what leaves them out."
            )
        self.sources = tuple(sources)
        self.weights = None if weights is None else tuple(weights)
        self._first_row = np.append(0, np.cumsum([source.num_rows for source in sources]))  # [sources + 1]
        tokens_per_row = [source.facts.tokens / source.num_rows for source in sources] if weights is not None else None
        try:
            self._mixture = Mixture([source.num_rows for source in sources], tokens_per_row, weights, seed)
        except ShareTooSmall as error:
            raise InputError(
                f"{self.names[error.source]}: its weight makes a share of {error.share:.2g} of the rows, none of every "
                f"{PERIOD:,}. Give it a larger weight, or leave it out."
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names, in order."""
        return tuple(source.name for source in self.sources)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch: as many as all sources have together."""
        return int(self._first_row[-1])

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the documents that are used: the files' contents in their order, and what was left out."""
        left_out = [(source.documents.num_bad, source.left_out_by) for source in self.sources]
        content = [[content for _, content in self.files], left_out]
        return str(xxhash.xxh3_128(json.dumps(content).encode()).hexdigest())

    @property
    def files(self) -> list[tuple[str, str]]:
        """Name and content fingerprint of every file."""
        return [file for source in self.sources for file in source.documents.files]

    def locate(self, positions: Ints) -> Located:
        """The source, row and epoch at each position of the run's order."""
        return self._mixture.locate(positions)

    def epochs_at(self, position: int) -> list[float]:
        """Passes over each source that are complete after `position` rows, with a fraction."""
        return self._mixture.epochs_at(position)

    def repeats_between(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, epoch) for each source that begins again at a position in [start, stop)."""
        return self._mixture.repeats_between(start, stop)

    def source_of(self, row: int) -> int:
        """Which source a row belongs to."""
        return int(np.searchsorted(self._first_row, row, side="right")) - 1

    def find(self, row: int) -> tuple[PackedDataset, int]:
        """The source that a row belongs to, and the row's number within it."""
        source = self.source_of(row)
        return self.sources[source], row - int(self._first_row[source])

    def row(self, number: int) -> Row:
        """Assemble a row."""
        source, index = self.find(number)
        return source.row(index)

    def blank_row(self) -> Row:
        """A row of padding alone."""
        return self.sources[0].blank_row()

    def provenance(self, number: int) -> str:
        """The files and lines of a row's documents."""
        source, index = self.find(number)
        return source.provenance(index)

    def describe(self) -> list[str]:
        """What was read and how it was packed, a line each; with weights, what they come to."""
        lines = [line for source in self.sources for line in source.describe()]
        quotas = self._mixture.quotas
        if self.weights is not None and quotas is not None:
            lines += [
                f"{name}: weight {weight:g}, {100 * weight / sum(self.weights):.2f} % of the tokens, {quota:,} of every "
                f"{sum(quotas):,} rows"
                for name, weight, quota in zip(self.names, self.weights, quotas, strict=True)
            ]
        return lines

    def show(self, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """A row as text, with documents' borders and targets marked."""
        source, index = self.find(number)
        return source.show(index, tokenizer)
