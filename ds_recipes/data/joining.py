"""The parts of a text, tokenised so that they join: later parts get no dummy prefix.

Llama 2's tokenizer, those made by SentencePiece and byte-level ones with `add_prefix_space` put a space before every text
they are given, and read `2` as `▁2`. That is right where a text begins. Behind `1+1=` it would be a space that is not in the
data, and the model would learn to write it. How a tokenizer does this is read from its normalizer and pre-tokenizer; what
comes of it is checked: probes in two parts must decode as the tokenizer decodes them in one.
"""

import dataclasses
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ds_recipes.data import long_text
from ds_recipes.data.long_text import Note, Texts, TokenIds

Backend = dict[str, Any]
"""A `Tokenizer` as JSON."""

Ints = np.ndarray[Any, np.dtype[Any]]

Located = tuple[TokenIds, Ints]
"""Token ids, and the characters [start, stop) of each: int64 [tokens, 2]."""

ALIKE_TOKENS = 64
"""So many of the tokens that two readings of a long text share are decoded with those that differ."""

NO_PREFIX: dict[str, Backend] = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
"""Pre-tokenizers that can put a space before a text, without it. The normalizer `Prepend` does nothing else."""

BYTE = re.compile("<0x[0-9A-F]{2}>")

PROBES = (
    ("1+1=", "2, so it is"), ("The fox", " ran off"), ("http:", "//www.example.com"), ("a line\n", "The answer\nis here"),
    ("un", "happy one"), ("日本", "語 です"), ("x ", "y z"), ("x", "  y"), ("é", "🙂"), ("### Response:", "Yes."),
    ("a", "\n\nb"), ("7", "8 9"),
)  # fmt: skip


@dataclass(frozen=True)
class Joining:
    """How a tokenizer reads the parts of a text. Picklable."""

    tokenizer: Tokenizer
    bare: Tokenizer | None  # without the dummy prefix; None: it puts none, or its texts join as they are
    by_words: bool
    """It drops white space and marks where a word begins: only a word that goes on from the part before has no mark."""

    prefixed: frozenset[int]  # added tokens behind which it puts the prefix again
    unknown: int | None  # the token of what its vocabulary lacks
    is_exact: bool = False
    """Parts decode as the text that they are parts of, wherever it is cut."""

    @classmethod
    def of(cls, backend: Backend) -> "Joining":
        """The way that joins most probes exactly."""
        tokenizer, unknown = Tokenizer.from_str(json.dumps(backend)), _unknown(backend)
        ways = [cls(tokenizer, None, False, frozenset(), unknown)]
        without = _without_prefix(backend)
        if without is not None:
            bare, prefixed = Tokenizer.from_str(json.dumps(without)), _prefixed(backend)
            ways[:0] = [cls(tokenizer, bare, by_words, prefixed, unknown) for by_words in (False, True)]
        passed = [way._probe() for way in ways]
        best = max(range(len(ways)), key=lambda i: sum(passed[i]))  # the first of those with the most
        return dataclasses.replace(ways[best], is_exact=all(passed[best]))

    @cached_property
    def whole(self) -> Texts:
        """Reads texts of any length as the tokenizer does."""
        return Texts(self.tokenizer)

    @cached_property
    def _later(self) -> Texts:
        """Reads them without the dummy prefix."""
        return Texts(self.bare or self.tokenizer)

    def encode_texts(
        self, texts: Sequence[Sequence[str]], note: Note = lambda characters: None
    ) -> Iterator[list[TokenIds]]:
        """Token ids of each text's parts, [parts][tokens]."""
        later = [_later_parts(parts) if self.bare is not None else {} for parts in texts]
        begins = [
            part
            for parts, goes_on in zip(texts, later, strict=True)
            for i, part in enumerate(parts)
            if i not in goes_on
        ]
        whole = self.whole.encode(begins, with_offsets=False, note=note)
        behind = self._encode_later([each for goes_on in later for each in goes_on.values()], note)
        for parts, goes_on in zip(texts, later, strict=True):
            yield [next(behind) if i in goes_on else next(whole).ids for i in range(len(parts))]

    def _encode_later(self, parts: Sequence[tuple[str, str]], note: Note) -> Iterator[TokenIds]:
        """Token ids of parts, each given with the text before it."""
        if self.bare is None or self.by_words:
            yield from (self.encode_later(*each)[0] for each in parts)
            return
        encodings = self._later.encode([part for _, part in parts], with_offsets=False, note=note)
        for each, encoding in zip(parts, encodings, strict=True):
            ids = encoding.ids
            yield ids if self.prefixed.isdisjoint(ids) else self.encode_later(*each)[0]

    def encode_later(self, before: str, text: str, last_before: int | None = None) -> Located:
        """A part and what stands before it. `last_before`: the last token before it, for a part that is read as in one text."""
        if self.bare is None or not before or last_before in self.prefixed:
            return _locate(self.whole, text)
        first = text
        if self.by_words:
            is_new_word = before[-1:].isspace() or text[:1].isspace()
            first = "" if is_new_word or not text else text.split(maxsplit=1)[0]
        ids, offsets = _locate(self._later, first)
        again = next((i for i, token in enumerate(ids) if token in self.prefixed), None)
        if again is not None:  # from there on the tokenizer itself knows best
            first = text[: int(offsets[again, 0])]
            ids, offsets = ids[:again], offsets[:again]
        if len(first) == len(text):
            return ids, offsets
        more, places = _locate(self.whole, text[len(first) :])
        return array("I", [*ids, *more]), np.concatenate([offsets, places + len(first)])

    def is_joined(self, ids: TokenIds | Ints, text: str) -> bool:
        """True if these tokens of a text's parts decode as the text does; what the vocabulary lacks is not looked at."""
        (encoding,) = self.whole.encode([text], with_offsets=False)
        parts, together = np.asarray(ids, np.uint32), np.asarray(encoding.ids, np.uint32)  # [tokens]
        if self.unknown is not None and (together == self.unknown).any():
            return True
        if len(text) > long_text.LONG_CHARACTERS:
            parts, together = _around_differences(parts, together)
        return self._decode(parts) == self._decode(together)

    def _decode(self, ids: Ints) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _probe(self) -> list[bool]:
        """Whether a probe joins exactly, for each that the vocabulary can write."""
        found = []
        for first, later in PROBES + _words_of(self.tokenizer):
            if self.unknown not in self.tokenizer.encode(first + later, add_special_tokens=False).ids:
                ((begin, end),) = self.encode_texts([(first, later)])
                found.append(self.is_joined([*begin, *end], first + later))
        return found


def _later_parts(parts: Sequence[str]) -> dict[int, tuple[str, str]]:
    """The parts behind the first one that has a text, each with what stands before it."""
    later, before = {}, ""
    for number, part in enumerate(parts):
        if before and part:
            later[number] = before, part
        before = part or before
    return later


def _locate(texts: Texts, text: str) -> Located:
    (encoding,) = texts.encode([text], with_offsets=True)
    return encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)


def _around_differences(one: Ints, other: Ints) -> tuple[Ints, Ints]:
    """Two lists of tokens without most of what their beginnings and ends have in common."""
    both = min(len(one), len(other))
    differ = np.flatnonzero(one[:both] != other[:both])
    begin = max(0, (int(differ[0]) if len(differ) else both) - ALIKE_TOKENS)
    one, other = one[begin:], other[begin:]
    both = min(len(one), len(other))
    differ = np.flatnonzero(one[::-1][:both] != other[::-1][:both])
    same = max(0, (int(differ[0]) if len(differ) else both) - ALIKE_TOKENS)
    return one[: len(one) - same], other[: len(other) - same]


def _words_of(tokenizer: Tokenizer) -> tuple[tuple[str, str], ...]:
    """Probes of words that a small vocabulary has too."""
    tokens = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    words = dict.fromkeys(word for token, _ in tokens if (word := token.strip("▁Ġ")).isalpha())
    a, b, c = [*list(words)[-3:], "a", "b", "c"][:3]
    return (a, f"{b} {c}"), (f"{a} ", b), (a, f" {b}")


def _unknown(backend: Backend) -> int | None:
    """The token of a text that the vocabulary cannot write."""
    model = backend["model"]
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    name = model.get("unk_token")
    added = {token["content"]: token["id"] for token in backend["added_tokens"]}
    found: int | None = added.get(name, model["vocab"].get(name) if isinstance(model["vocab"], dict) else None)
    return found


def _without_prefix(backend: Backend) -> Backend | None:
    """The same tokenizer without a dummy prefix; None if it has none."""
    normalizer, pre_tokenizer = _steps(backend["normalizer"]), _steps(backend["pre_tokenizer"])
    if not any(map(_puts_prefix, [*normalizer, *pre_tokenizer])):
        return None
    normalizer = [
        step for one in normalizer for step in ([one] if one["type"] != "Prepend" else _unprepended(one, backend))
    ]
    pre_tokenizer = [step | NO_PREFIX.get(step["type"], {}) for step in pre_tokenizer]
    return backend | {
        "normalizer": {"type": "Sequence", "normalizers": normalizer} if normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizer} if pre_tokenizer else None,
    }


def _unprepended(step: Backend, backend: Backend) -> list[Backend]:
    """A `Prepend` that leaves texts alone. Added tokens that are looked for in normalised text are normalised by it too."""
    names = [re.escape(token["content"]) for token in backend["added_tokens"] if token["normalized"]]
    alone = {"Regex": rf"\A(?=(?:{'|'.join(names)})\z)"}
    return [{"type": "Replace", "pattern": alone, "content": step["prepend"]}] if names else []


def _puts_prefix(step: Backend) -> bool:
    kind = step["type"]
    return kind == "Prepend" or any(step.get(name) != value for name, value in NO_PREFIX.get(kind, {}).items())


def _prefixed(backend: Backend) -> frozenset[int]:
    """Added tokens behind which the prefix comes again.

    A normalizer sees what lies between added tokens; those apart that are looked for in normalised text. Tokens of bytes and the
    unknown one are what the model falls back to: no text spells them.
    """
    unknown = _unknown(backend)
    steps = [step for step in _steps(backend["normalizer"]) + _steps(backend["pre_tokenizer"]) if _puts_prefix(step)]
    if all(step.get("prepend_scheme") == "first" for step in steps):
        return frozenset()
    by_normalizer = all(step["type"] == "Prepend" for step in steps)
    return frozenset(
        one["id"]
        for one in backend["added_tokens"]
        if not (by_normalizer and one["normalized"]) and one["id"] != unknown and not BYTE.fullmatch(one["content"])
    )


def _steps(part: Backend | None) -> list[Backend]:
    """A normalizer or pre-tokenizer as its steps in order."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part.get("normalizers") or part.get("pretokenizers") or () for step in _steps(inner)]
