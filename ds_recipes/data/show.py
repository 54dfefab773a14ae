"""A row of training data as a person reads it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.tokens.documents import Documents

SHOWN_PIECES = 3
SHOWN_TOKENS = 200


class Stretch(Protocol):
    """A stretch of one document."""

    @property
    def document(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...


def show_row(tokenizer: PreTrainedTokenizerBase, documents: Documents, pieces: Sequence[Stretch]) -> str:
    """The first pieces of a row, decoded; ⟦targets⟧ are what the model learns to write."""
    lines = [line for piece in pieces[:SHOWN_PIECES] for line in _show_piece(tokenizer, documents, piece)]
    if len(pieces) > SHOWN_PIECES:
        lines.append(f"--- and {len(pieces) - SHOWN_PIECES} more documents in this row")
    return "\n".join(lines)


def runs_of(documents: Documents, piece: Stretch) -> list[tuple[bool, list[int]]]:
    """A piece as runs of token ids that are learned (True) or only read, in order."""
    stop = piece.start + piece.length
    tokens = documents.tokens(piece.document)[piece.start : stop]
    learned = np.zeros(piece.length, bool)
    for first, end in documents.spans_of(piece.document).tolist():
        learned[max(first - piece.start, 0) : max(end - piece.start, 0)] = True
    borders = np.flatnonzero(np.diff(learned)) + 1
    cuts = [0, *borders.tolist(), piece.length]
    return [(bool(learned[a]), tokens[a:b].tolist()) for a, b in pairwise(cuts)]


def _show_piece(tokenizer: PreTrainedTokenizerBase, documents: Documents, piece: Stretch) -> list[str]:
    runs = runs_of(documents, piece)
    whole = piece.length == documents.offsets[piece.document + 1] - documents.offsets[piece.document]
    part = "" if whole else f", tokens {piece.start:,} to {piece.start + piece.length - 1:,}"
    num_targets = sum(len(ids) for learned, ids in runs if learned)
    header = f"--- {documents.where(piece.document)}{part} ({num_targets:,} of {piece.length:,} tokens are targets)"
    text = "".join(f"⟦{_shorten(tokenizer, ids)}⟧" if learned else _shorten(tokenizer, ids) for learned, ids in runs)
    return [header, text]


def _shorten(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part, clean_up_tokenization_spaces=False))

    half = SHOWN_TOKENS // 2
    if len(tokens) <= 2 * half:
        return decode(tokens)
    return f"{decode(tokens[:half])} [... {len(tokens) - 2 * half:,} tokens ...] {decode(tokens[-half:])}"
