"""The tokens of a text of any length, in memory that does not grow with it: those that the tokenizer gives the whole text.

`tokenizers` keeps over a hundred bytes of memory for a byte of text, so a long text is read in windows that overlap. Where two
windows meet, both have real text on either side, so a normalizer, a dummy prefix or an added token sees there what it sees in the
whole text. They are joined at a token's start where

- both windows have the same tokens at the same characters for hundreds of characters before and behind it, and
- no token of the whole text can lie across it: the pre-tokenizer ends a piece there, or no token of the vocabulary has these
  two characters side by side.

A pre-tokenizer reads from left to right and remembers nothing at the end of a piece, and BPE, Unigram and WordPiece look at
one piece alone. So what lies on one side of such a place does not depend on the other side; only an added token may take all
white space beside it, so no place is within such. Where there is no such place, as
in a million times the same letter, the window grows until there is one, at worst to the whole text.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE, Unigram

LONG_CHARACTERS = 1 << 17
"""A longer text is read in windows of so many characters; a shorter one as a whole."""

OVERLAP_CHARACTERS = 1 << 11
"""Two windows share so many. In the inner half of them they must agree, and they are joined near its middle."""

BYTE_TOKEN = "<0x"  # byte_fallback writes a character that is not in the vocabulary as such tokens

Ints = np.ndarray[Any, np.dtype[Any]]
TokenIds = Sequence[int] | array  # type: ignore[type-arg]

Note = Callable[[int], None]
"""Called with the characters that have been read since the last call, from window to window of a long text and after the short ones
together: all characters once. What it raises ends the reading."""


class LongEncoding:
    """What is used of `tokenizers.Encoding`, for a text that was read in windows."""

    def __init__(self) -> None:
        self.ids = array("I")  # [tokens]
        self._starts, self._stops = array("q"), array("q")  # [tokens], characters

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, encoding: Encoding, first: int, stop: int, begin: int, with_offsets: bool) -> None:
        """Add tokens `first` to `stop` of a window that begins at the character `begin`."""
        self.ids.extend(encoding.ids[first:stop])
        if with_offsets:
            offsets = np.array(encoding.offsets[first:stop], np.int64).reshape(-1, 2) + begin  # [tokens, 2]
            self._starts.frombytes(offsets[:, 0].tobytes())
            self._stops.frombytes(offsets[:, 1].tobytes())

    @property
    def offsets(self) -> Ints:
        """The characters [start, stop) of every token: int64 [tokens, 2]."""
        return np.stack([np.frombuffer(self._starts, np.int64), np.frombuffer(self._stops, np.int64)], axis=1)

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """The characters [start, stop) of a token."""
        return self._starts[token], self._stops[token]

    def token_at(self, character: int) -> int:
        """The first token that lies across or behind a character; their number if there is none."""
        return int(np.searchsorted(np.frombuffer(self._stops, np.int64), character, side="right"))


class _Token(NamedTuple):
    """A token near the end of a window. Two of the same text are equal if they are the same at the same characters."""

    start: int
    stop: int
    id: int


class _Window:
    """The tokens of the characters [begin, end) of a text."""

    def __init__(self, tokenizer: Tokenizer, text: str, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        # `encode_batch` lets other threads run meanwhile, which `encode` does not.
        (self.encoding,) = tokenizer.encode_batch([text[begin:end]], add_special_tokens=False)

    def between(self, low: int, high: int) -> tuple[int, list[_Token]]:
        """The tokens that lie in the characters [low, high), and the first one's number."""
        encoding, token = self.encoding, None
        for character in range(low, high):
            token = encoding.char_to_token(character - self.begin)
            if token is not None:  # white space that the tokenizer drops is in no token
                break
        if token is None:
            return 0, []
        found: list[_Token] = []
        ids = self._ids
        for number in range(token, len(ids)):
            characters = encoding.token_to_chars(number)
            assert characters is not None
            start, stop = self.begin + characters[0], self.begin + characters[1]
            if stop > high:
                break
            if start < low:
                token = number + 1
            else:
                found.append(_Token(start, stop, ids[number]))
        return token, found

    @cached_property
    def _ids(self) -> list[int]:
        return list(self.encoding.ids)

    def is_end_of_piece(self, token: int) -> bool:
        """True if the pre-tokenizer, or an added token, ends a piece before the token."""
        return bool(self.encoding.token_to_word(token - 1) != self.encoding.token_to_word(token))


class Texts:
    """Reads texts of any length with one tokenizer, to which no special tokens are added."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(
        self, texts: Sequence[str], with_offsets: bool, note: Note = lambda characters: None
    ) -> Iterator[Encoding | LongEncoding]:
        """The tokens of each text, those of the short ones made at once. Without `with_offsets` the ids are all there is."""
        short = [text for text in texts if len(text) <= LONG_CHARACTERS]
        encode_batch = self._tokenizer.encode_batch if with_offsets else self._tokenizer.encode_batch_fast
        encodings = iter(encode_batch(short, add_special_tokens=False))
        if short:
            note(sum(map(len, short)))
        for text in texts:
            if len(text) <= LONG_CHARACTERS:
                yield next(encodings)
            else:
                yield self._encode_long(text, with_offsets, note)

    def _encode_long(self, text: str, with_offsets: bool, note: Note) -> LongEncoding:
        result = LongEncoding()
        window, first = _Window(self._tokenizer, text, 0, LONG_CHARACTERS), 0
        while window.end < len(text):
            begin = window.end - OVERLAP_CHARACTERS
            following = _Window(self._tokenizer, text, begin, min(begin + LONG_CHARACTERS, len(text)))
            seam = self._seam(text, window, following)
            if seam is None:
                note(0)
                end = min(2 * window.end - window.begin, len(text))
                window = _Window(self._tokenizer, text, window.begin, end)
                continue
            note(following.begin - window.begin)
            result.add(window.encoding, first, seam[0], window.begin, with_offsets)
            window, first = following, seam[1]
        result.add(window.encoding, first, len(window.encoding), window.begin, with_offsets)
        note(len(text) - window.begin)
        return result

    def _seam(self, text: str, window: _Window, following: _Window) -> tuple[int, int] | None:
        """The number in either window of a token before which they can be joined, the one nearest to the middle."""
        shared = window.end - following.begin
        low, high = following.begin + shared // 4, window.end - shared // 4
        first, tokens = window.between(low, high)
        other, same = following.between(low, high)
        if tokens != same:
            return None
        middle, reach = (low + high) // 2, (high - low) // 4
        inner = [at for at in range(1, len(tokens)) if abs(tokens[at].start - middle) <= reach]
        for at in sorted(inner, key=lambda at: abs(tokens[at].start - middle)):
            before, behind = tokens[at - 1], tokens[at]
            is_between = before.start < before.stop <= behind.start < behind.stop
            # An added token may take all white space beside it, however far it reaches.
            is_between &= not text[behind.start - 1 : behind.start + 1].isspace()
            ends_piece = window.is_end_of_piece(first + at) and following.is_end_of_piece(other + at)
            if is_between and (ends_piece or self._never_joins(before.id, behind.id)):
                return first + at, other + at
        return None

    def _never_joins(self, before: int, behind: int) -> bool:
        """True if no token can hold the last character of one token and the first of another behind it."""
        if self._unclear is None or before in self._unclear or behind in self._unclear:
            return False
        left, right = self._tokenizer.id_to_token(before), self._tokenizer.id_to_token(behind)
        assert left and right
        return left[-1] + right[0] not in self._neighbours

    @cached_property
    def _unclear(self) -> set[int] | None:
        """Tokens whose text is not what they stand for in the model; None if that may be so of any."""
        model, unknown = self._tokenizer.model, None
        if isinstance(model, BPE):
            if model.continuing_subword_prefix or model.end_of_word_suffix or model.dropout:
                return None
            unknown = model.token_to_id(model.unk_token) if model.unk_token else None
        elif isinstance(model, Unigram):
            unknown = json.loads(self._tokenizer.to_str())["model"]["unk_id"]
        else:
            return None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        unclear = {number for token, number in vocabulary.items() if token.startswith(BYTE_TOKEN) or not token}
        return unclear | set(self._tokenizer.get_added_tokens_decoder()) | ({unknown} if unknown is not None else set())

    @cached_property
    def _neighbours(self) -> set[str]:
        """All pairs of characters that stand side by side in a token."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        return {one + other for token in vocabulary for one, other in pairwise(token)}
