"""One source as rows of tokens with their targets, ready to train on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.formats.remarks import lines as remark_lines
from ds_recipes.data.packing import Packing
from ds_recipes.data.show import show_row
from ds_recipes.data.targets import targets_within
from ds_recipes.data.tokens.documents import Documents

Ints = np.ndarray[Any, np.dtype[np.int64]]

SHOWN_PLACES = 20


@dataclass(frozen=True)
class Row:
    """One row; all arrays are int64.

    Position ids restart at each piece, and at the padding behind the last one. The hidden state at `target_index[i]`
    must predict `target_ids[i]`: the document's next token, even where that lies in another row.
    """

    input_ids: Ints  # [context]
    position_ids: Ints  # [context]
    target_index: Ints  # [targets], into the row
    target_ids: Ints  # [targets]
    num_tokens: int  # not padding
    num_samples: int  # documents that begin here


@dataclass(frozen=True)
class Piece:
    """A stretch of one document in a row: its tokens [start, start + length)."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class PackingFacts:
    """What packing found: counted once, kept beside the packing."""

    tokens: int  # in rows, not padding
    target_tokens: int
    documents: int  # used
    truncated: int  # lost their end
    dropped: int  # longer than a row
    without_target: int  # left out, because their prompt alone fills a row
    held_out: int  # on the other side of the split, or equal to a validation document


class PackedDataset:
    """Packed rows over tokenised documents; rows are assembled when asked for, by any number of threads."""

    def __init__(
        self,
        documents: Documents,
        packing: Packing,
        facts: PackingFacts,
        context_size: int,
        padding_id: int,
        method: str,
        left_out_by: str = "",
    ) -> None:
        """`left_out_by` tells what other documents of the source are not in these rows, for the data's fingerprint."""
        self.documents = documents
        self.packing = packing
        self.facts = facts
        self.context_size = context_size
        self.left_out_by = left_out_by
        self._padding_id = padding_id
        self._method = method

    @property
    def name(self) -> str:
        """What metrics and messages call this source."""
        return self.documents.name

    @property
    def num_rows(self) -> int:
        return len(self.packing)

    @property
    def padding_share(self) -> float:
        """Share of all positions that hold no token, 0 to 1."""
        return 1 - self.facts.tokens / max(self.num_rows * self.context_size, 1)

    def pieces(self, index: int) -> list[Piece]:
        """What lies in a row, from left to right."""
        packing = self.packing
        of_row = slice(int(packing.row_offsets[index]), int(packing.row_offsets[index + 1]))
        columns = (packing.document[of_row], packing.start[of_row], packing.length[of_row])
        return [Piece(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]

    def row(self, index: int) -> Row:
        """Assemble one row."""
        inputs = np.full(self.context_size, self._padding_id, np.int64)
        positions = np.empty(self.context_size, np.int64)
        target_index, target_ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        at, num_samples = 0, 0
        for piece in self.pieces(index):
            tokens = self.documents.tokens(piece.document)
            end = piece.start + piece.length
            inputs[at : at + piece.length] = tokens[piece.start : end]
            positions[at : at + piece.length] = np.arange(piece.length)
            spans = self.documents.spans_of(piece.document)
            # A target is predicted by the token before it, so the one behind the piece counts and its first does not.
            targets = targets_within(spans, piece.start + 1, min(end + 1, len(tokens)))
            target_index.append(targets - 1 - piece.start + at)
            target_ids.append(tokens[targets].astype(np.int64))
            at += piece.length
            num_samples += piece.start == 0
        positions[at:] = np.arange(self.context_size - at)
        return Row(inputs, positions, np.concatenate(target_index), np.concatenate(target_ids), at, num_samples)

    def blank_row(self) -> Row:
        """A row of padding alone: no tokens, no targets."""
        inputs = np.full(self.context_size, self._padding_id, np.int64)
        none = np.zeros(0, np.int64)
        return Row(inputs, np.arange(self.context_size), none, none, 0, 0)

    def provenance(self, index: int) -> str:
        """The files and lines of a row's documents, "file:line, file:line"."""
        numbers = list(dict.fromkeys(piece.document for piece in self.pieces(index)))
        places = ", ".join(self.documents.where(number) for number in numbers[:SHOWN_PLACES])
        more = len(numbers) - SHOWN_PLACES
        return f"{places} and {more} more" if more > 0 else places

    def describe(self) -> list[str]:
        """What was read and how it was packed, a line each."""
        facts = self.facts
        share = 100 * facts.target_tokens / max(facts.tokens, 1)
        lines = [
            f"{self.name}: {len(self.documents):,} documents, {int(self.documents.offsets[-1]):,} tokens",
            f"{self.num_rows:,} rows of {self.context_size:,} tokens (packing {self._method}), "
            f"{100 * self.padding_share:.2f} % padding; {facts.target_tokens:,} target tokens, {share:.1f} % of all",
        ]
        for count, what in (
            (facts.truncated, "are longer than a row; their ends were cut off"),
            (facts.dropped, "are longer than a row and were left out"),
            (facts.without_target, "were left out: their prompt alone fills a row"),
            (facts.held_out, "were held out of these rows"),
            (self.documents.num_left_out, "were left out by the format's function"),
        ):
            if count:
                lines.append(f"{count:,} documents {what}")
        if self.documents.num_bad:
            lines.append(f"{self.documents.num_bad:,} records cannot be used and were skipped:")
            lines += [f"  {message}" for message in self.documents.first_bad]
        return [*lines, *remark_lines(self.documents.remarks), *self.documents.notes]

    def show(self, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """A row as text, with documents' borders and targets marked; see `show_row`."""
        return show_row(tokenizer, self.documents, self.pieces(index))
