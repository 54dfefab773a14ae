"""A data set as rows of tokens with their targets, checked, ready to train on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.formats import FORMATS
from ds_recipes.data.packing import Packing, pack
from ds_recipes.data.records import content_fingerprint
from ds_recipes.data.show import show_row
from ds_recipes.data.tokenised import Documents, tokenise
from ds_recipes.errors import InputError
from ds_recipes.world.group import World

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


class PackedDataset:
    """Packed rows over tokenised documents; rows are assembled when asked for."""

    def __init__(
        self, documents: Documents, packing: Packing, context_size: int, padding_id: int, method: str, fingerprint: str
    ) -> None:
        self.fingerprint = fingerprint
        self._documents = documents
        self._packing = packing
        self._context_size = context_size
        self._padding_id = padding_id
        self._method = method
        lengths = documents.lengths
        kept = np.zeros(len(documents), np.int64)
        np.maximum.at(kept, packing.document, packing.start + packing.length)
        self.num_rows = len(packing)
        self.num_documents = len(documents)
        self.num_tokens = int(packing.length.sum())
        self.num_truncated = int((kept + 1 < lengths).sum())  # a last token may be a target alone
        first, last = self._target_range(slice(None))
        self._targets = np.maximum(last - first, 0)  # [pieces]
        self.num_target_tokens = int(self._targets.sum())

    @property
    def padding_share(self) -> float:
        """Share of all positions that hold no token, 0 to 1."""
        return 1 - self.num_tokens / (self.num_rows * self._context_size)

    def row(self, index: int) -> Row:
        """Assemble one row."""
        inputs = np.full(self._context_size, self._padding_id, np.int64)
        positions = np.empty(self._context_size, np.int64)
        pieces = self._pieces(index)
        packing, at = self._packing, 0
        target_index, target_ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for piece, first, last in zip(range(pieces.start, pieces.stop), *self._target_range(pieces), strict=True):
            start, length = packing.start[piece], packing.length[piece]
            tokens = self._documents.tokens(packing.document[piece])
            inputs[at : at + length] = tokens[start : start + length]
            positions[at : at + length] = np.arange(length)
            if first < last:
                target_index.append(np.arange(first, last) - start + at)
                target_ids.append(tokens[first + 1 : last + 1].astype(np.int64))
            at += int(length)
        positions[at:] = np.arange(self._context_size - at)
        num_samples = int((packing.start[pieces] == 0).sum())
        return Row(inputs, positions, np.concatenate(target_index), np.concatenate(target_ids), at, num_samples)

    def blank_row(self) -> Row:
        """A row of padding alone: no tokens, no targets."""
        inputs = np.full(self._context_size, self._padding_id, np.int64)
        none = np.zeros(0, np.int64)
        return Row(inputs, np.arange(self._context_size), none, none, 0, 0)

    def provenance(self, index: int) -> str:
        """The files and lines of a row's documents, "file:line, file:line"."""
        documents = list(dict.fromkeys(self._packing.document[self._pieces(index)].tolist()))
        places = ", ".join(self._documents.where(document) for document in documents[:SHOWN_PLACES])
        more = len(documents) - SHOWN_PLACES
        return f"{places} and {more} more" if more > 0 else places

    def describe(self) -> list[str]:
        """What was read and how it was packed, a line each."""
        files = [str(path) for path in self._documents.paths]
        lines = [
            f"{', '.join(files)}: {self.num_documents:,} documents, {int(self._documents.lengths.sum()):,} tokens",
            f"{self.num_rows:,} rows of {self._context_size:,} tokens (packing {self._method}), "
            f"{100 * self.padding_share:.2f} % padding; {self.num_target_tokens:,} target tokens, "
            f"{100 * self.num_target_tokens / self.num_tokens:.1f} % of all",
        ]
        if self.num_truncated:
            lines.append(f"{self.num_truncated:,} documents are longer than a row; their ends were cut off")
        return lines

    def decoded_example(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The first row as text, with documents' borders and targets marked; see `show_row`."""
        pieces = self._pieces(0)
        packing = self._packing
        shown = zip(packing.document[pieces], packing.start[pieces], packing.length[pieces], strict=True)
        return show_row(tokenizer, self._documents, [(int(d), int(s), int(n)) for d, s, n in shown])

    def check_targets(self) -> None:
        """Every document that lost its end must have kept a target.

        Raises:
            InputError: some have not; the first is named.
        """
        counts = np.zeros(len(self._documents), np.int64)
        np.add.at(counts, self._packing.document, self._targets)
        without = np.flatnonzero(counts == 0)
        if len(without) == 0:
            return
        first, more = int(without[0]), len(without) - 1
        also = f" The same holds for {more:,} more records." if more else ""
        raise InputError(
            f"{self._documents.where(first)}: the prompt has {int(self._documents.target_start[first]):,} tokens, so "
            f"no target fits into a row of {self._context_size:,}.{also} Raise --context_size, or shorten or remove "
            "the record."
        )

    def _pieces(self, index: int) -> slice:
        return slice(int(self._packing.row_offsets[index]), int(self._packing.row_offsets[index + 1]))

    def _target_range(self, pieces: slice) -> tuple[Ints, Ints]:
        """Per piece, the document's positions [first, last) whose next token is a target."""
        packing, documents = self._packing, self._documents
        document, start = packing.document[pieces], packing.start[pieces]
        first = np.maximum(start, documents.target_start[document] - 1)
        ends = documents.offsets[document + 1] - documents.offsets[document]
        return first, np.minimum(start + packing.length[pieces], ends - 1)


def build_dataset(
    paths: Sequence[Path],
    dataset_format: str,
    packing: str,
    context_size: int,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
    world: World,
) -> PackedDataset:
    """Read, tokenise (all ranks in parallel), check and pack files. Every rank must call it; all get the same rows.

    Raises:
        InputError: on all ranks, naming file and line: unreadable data, a record without a target, a token id that the
            model has no embedding for; or ranks that see different files.
    """
    fingerprint = world.check("reading data", lambda: content_fingerprint(paths))
    _check_same(world.gather(fingerprint), paths)
    record_format = FORMATS[dataset_format]
    documents = tokenise(paths, record_format, tokenizer, vocabulary_size, world)
    packed = pack(packing, documents.lengths, context_size, record_format.splits_long)
    dataset = PackedDataset(documents, packed, context_size, int(tokenizer.eos_token_id), packing, fingerprint)
    dataset.check_targets()
    return dataset


def _check_same(fingerprints: Sequence[str], paths: Sequence[Path]) -> None:
    different = [str(rank) for rank, other in enumerate(fingerprints) if other != fingerprints[0]]
    if different:
        raise InputError(
            f"{', '.join(map(str, paths))}: not the same content on all hosts: ranks {', '.join(different)} read other "
            "bytes than rank 0. Copy the files again, or put them on a shared disk."
        )
