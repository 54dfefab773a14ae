"""A row of training data as a person reads it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ds_recipes.data.tokenised import Documents

SHOWN_PIECES = 3
SHOWN_TOKENS = 200


def show_row(tokenizer: PreTrainedTokenizerBase, documents: Documents, pieces: Sequence[tuple[int, int, int]]) -> str:
    """The first pieces (document, start, length) of a row, decoded; ⟦targets⟧ are what the model learns to write."""
    lines = [line for piece in pieces[:SHOWN_PIECES] for line in _show_piece(tokenizer, documents, *piece)]
    if len(pieces) > SHOWN_PIECES:
        lines.append(f"--- and {len(pieces) - SHOWN_PIECES} more documents in this row")
    return "\n".join(lines)


def _show_piece(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, document: int, start: int, length: int
) -> list[str]:
    tokens = documents.tokens(document)[start : start + length].tolist()
    border = min(max(int(documents.target_start[document]) - start, 0), length)
    prompt, targets = tokens[:border], tokens[border:]
    part = f", tokens {start:,} to {start + length - 1:,}" if len(tokens) < documents.lengths[document] else ""
    header = f"--- {documents.where(document)}{part} ({len(targets):,} of {length:,} tokens are targets)"
    return [header, f"{_shorten(tokenizer, prompt)}⟦{_shorten(tokenizer, targets)}⟧"]


def _shorten(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part, clean_up_tokenization_spaces=False))

    half = SHOWN_TOKENS // 2
    if len(tokens) <= 2 * half:
        return decode(tokens)
    return f"{decode(tokens[:half])} [... {len(tokens) - 2 * half:,} tokens ...] {decode(tokens[-half:])}"
