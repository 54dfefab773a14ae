"""A row of training data as a person reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.tokens.documents import Documents

SHOWN_PIECES = 3
SHOWN_TOKENS = 200
CONTEXT_TOKENS = 8


class Stretch(Protocol):
    """A stretch of one document."""

    @property
    def document(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True)
class Run:
    """Tokens in a row that are all learned, or all only read."""

    is_learned: bool
    num_tokens: int
    text: str


def show_row(tokenizer: PreTrainedTokenizerBase, documents: Documents, pieces: Sequence[Stretch]) -> str:
    """The first pieces of a row, decoded; ⟦targets⟧ are what the model learns to write."""
    lines = [line for piece in pieces[:SHOWN_PIECES] for line in _show_piece(tokenizer, documents, piece)]
    if len(pieces) > SHOWN_PIECES:
        lines.append(f"--- and {len(pieces) - SHOWN_PIECES} more documents in this row")
    return "\n".join(lines)


def runs_of(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, piece: Stretch, most_tokens: int | None = None
) -> list[Run]:
    """A piece as runs, in order. Of a run with more than `most_tokens` the middle is left out of the text.

    The piece is decoded as a whole, then cut: together the texts are what the tokenizer makes of all its tokens.
    """
    stop = piece.start + piece.length
    before = max(piece.start - CONTEXT_TOKENS, 0)  # decoders take a space away where a text begins
    tokens = documents.tokens(piece.document)[before:stop].tolist()
    learned = np.zeros(piece.length, bool)
    for first, end in documents.spans_of(piece.document).tolist():
        learned[max(first - piece.start, 0) : max(end - piece.start, 0)] = True
    cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), piece.length]
    shown = [_shown(start, end, most_tokens) for start, end in pairwise(cuts)]
    whole = _decode(tokenizer, tokens)
    at = {cut: _place(tokenizer, whole, tokens[: piece.start - before + cut]) for cut in {*chain(*chain(*shown))}}
    runs = []
    for (start, end), spans in zip(pairwise(cuts), shown, strict=True):
        gaps = [f" [... {right - left:,} tokens ...] " for (_, left), (right, _) in pairwise(spans)]
        texts = [whole[at[first] : at[last]] for first, last in spans]
        text = "".join(chain(*zip_longest(texts, gaps, fillvalue="")))
        runs.append(Run(bool(learned[start]), end - start, text))
    return runs


def _shown(start: int, stop: int, most_tokens: int | None) -> list[tuple[int, int]]:
    """What is shown of a run: all of it, or its beginning and its end."""
    if most_tokens is None or stop - start <= most_tokens:
        return [(start, stop)]
    return [(start, start + most_tokens // 2), (stop - most_tokens // 2, stop)]


def _place(tokenizer: PreTrainedTokenizerBase, whole: str, tokens: list[int]) -> int:
    """Where in the whole text its first tokens end; a character of several tokens goes with the last of them."""
    text = _decode(tokenizer, tokens)
    while not whole.startswith(text):
        text = text[:-1]
    return len(text)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _show_piece(tokenizer: PreTrainedTokenizerBase, documents: Documents, piece: Stretch) -> list[str]:
    runs = runs_of(tokenizer, documents, piece, SHOWN_TOKENS)
    whole = piece.length == documents.offsets[piece.document + 1] - documents.offsets[piece.document]
    part = "" if whole else f", tokens {piece.start:,} to {piece.start + piece.length - 1:,}"
    num_targets = sum(run.num_tokens for run in runs if run.is_learned)
    header = f"--- {documents.where(piece.document)}{part} ({num_targets:,} of {piece.length:,} tokens are targets)"
    return [header, "".join(f"⟦{run.text}⟧" if run.is_learned else run.text for run in runs)]
