"""Documents of samples: token ids, the ranges of them that are learned, and a hash of the content.

The hot path of tokenising a corpus. Python sees documents, never single tokens: the tokenizer gets all texts of a batch in
one call, and arrays are made from whole lists.
"""

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from tokenizers import Encoding, Tokenizer

from ds_recipes.data.formats.remarks import TWICE, Remark
from ds_recipes.data.formats.sample import Parts, Rendered, Sample, Tokens
from ds_recipes.data.joining import Joining
from ds_recipes.data.long_text import LongEncoding, Note, TokenIds
from ds_recipes.data.sources.record import Bad, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = np.ndarray[Any, np.dtype[Any]]
Span = tuple[int, int]
_Document = tuple[Ints, list[Span]]
"""Token ids, uint32 [tokens], and the spans that are learned."""

BETWEEN_PARTS = "\x00"
LARGEST_ID = (1 << 32) - 1
HASHED_CHARACTERS = 1 << 20
"""Written as UTF-8 at once, so that a long text is not there twice."""

NO_TARGET: dict[type, str] = {
    Parts: "its text makes no tokens, so it has no target. Fill it in or remove it.",
    Rendered: "its assistant turns make no tokens, so it has no target. Fill them in or remove it.",
    Tokens: "none of its tokens is a target; the first never is, as nothing comes before it. Fix its mask or remove it.",
}

TORN_WORD = (
    "its answer goes on in the middle of a word of its prompt, and the tokenizer begins a new word with each text, so the model "
    "would learn a space that is not there. End the prompt with white space or punctuation, or remove the record."
)


@dataclass(frozen=True)
class Encoded:
    """Documents of the records that are fine, laid end to end in the records' order, and the records that are not."""

    ids: Ints  # uint16 or uint32 [tokens]
    lengths: Ints  # int64 [documents]
    entries: Ints  # int64 [documents], Record.entry
    spans: Ints  # int32 [spans, 2], learned tokens [start, stop) by position in their own document
    span_counts: Ints  # int64 [documents]
    hashes: Ints  # uint64 [documents], equal for equal content
    bad: tuple[Bad, ...]
    remarks: Mapping[Remark, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as the data floor uses it; picklable, without transformers.

    Text is data: what a record writes as `</s>` becomes the token of that name, as the tokenizer reads any text.
    """

    joining: Joining  # the tokenizer, and how it reads later parts of a text
    begin: tuple[int, ...]  # what the tokenizer puts before a text: nothing, BOS, or other special tokens
    bos: int | None  # the BOS token, which a template may write
    end: int  # the EOS token
    vocabulary_size: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", vocabulary_size: int) -> "Encoder":
        """The encoder of a fast tokenizer with an EOS token, for a model with so many embeddings."""
        from ds_recipes.data.tokenizer import tokens_before  # imports transformers, which a worker process does without

        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are left over from calls. The post-processor adds special tokens, which is done here,
        # and a byte-level one also takes spaces out of the tokens' offsets, which would hide where a token begins.
        backend |= {"truncation": None, "padding": None, "post_processor": None}
        return cls(
            Joining.of(backend),
            tokens_before(tokenizer),
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            vocabulary_size,
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """It adds no special tokens."""
        return self.joining.tokenizer

    def encode(
        self, records: Sequence[Record], samples: Sequence[Sample], note: Note = lambda characters: None
    ) -> Encoded:
        """Tokenise a batch of records; one without a target token, or with a token that the model lacks, is bad.

        `note` is called while texts are read; see `long_text.Note`.
        """
        hashes: dict[int, int] = {}
        bad: dict[int, str] = {}
        for number, sample in enumerate(samples):
            try:
                hashes[number] = self._hash(sample)
            except UnicodeEncodeError as error:
                bad[number] = (
                    f"its text has half a UTF-16 pair at character {error.start + 1}, which is no text. "
                    "Fix or remove the record."
                )
            except OverflowError:
                assert isinstance(sample, Tokens)
                bad[number] = self._beyond(max(sample.ids))
        documents = {}
        for number, (ids, spans) in self._tokenise({number: samples[number] for number in hashes}, note):
            if spans and spans[0][0] == 0:  # nothing comes before the first token, so nothing could predict it
                spans[:1] = [(1, spans[0][1])] if spans[0][1] > 1 else []
            largest = ids.max(initial=0)
            made_of = samples[number]
            if largest >= self.vocabulary_size:
                bad[number] = self._beyond(int(largest))
            elif not spans:
                bad[number] = NO_TARGET[type(made_of)]
            elif isinstance(made_of, Parts) and not self._joins(made_of, ids):
                bad[number] = TORN_WORD
            else:
                documents[number] = ids, spans
        return self._laid_out(
            {number: documents[number] for number in sorted(documents)},
            records,
            hashes,
            tuple(Bad(records[n].entry, f"{records[n].where}: {bad[n]}") for n in sorted(bad)),
            [ids for number, (ids, _) in documents.items() if not isinstance(samples[number], Tokens)],
        )

    def _hash(self, sample: Sample) -> int:
        """xxh3-64 of the texts in UTF-8, or of the ids as little-endian uint32."""
        if isinstance(sample, Tokens):
            return int(xxhash.xxh3_64_intdigest(_as_array(sample.ids).astype("<u4").tobytes()))
        digest, characters = xxhash.xxh3_64(), 0
        for text in [sample.text] if isinstance(sample, Rendered) else _between_parts(sample):
            for start in range(0, len(text), HASHED_CHARACTERS):
                piece = text[start : start + HASHED_CHARACTERS]
                try:
                    digest.update(piece.encode())
                except UnicodeEncodeError as error:
                    error.start += characters
                    raise
                characters += len(piece)
        return int(digest.intdigest())

    def _tokenise(self, samples: dict[int, Sample], note: Note) -> Iterator[tuple[int, _Document]]:
        """Token ids and learned spans of each sample, by its number; those of one kind at once."""
        parts = {number: sample for number, sample in samples.items() if isinstance(sample, Parts)}
        rendered = {number: sample for number, sample in samples.items() if isinstance(sample, Rendered)}
        encoded = self.joining.encode_texts([[text for text, _ in sample.parts] for sample in parts.values()], note)
        for number, part_ids in zip(parts, encoded, strict=True):
            yield number, self._of_parts(parts[number], part_ids)
        yield from zip(rendered, self._of_rendered(list(rendered.values()), note), strict=True)
        for number, sample in samples.items():
            if isinstance(sample, Tokens):
                edges = np.flatnonzero(np.diff(np.array(sample.target_mask, np.int8), prepend=0, append=0))
                yield number, (_as_array(sample.ids), [(int(a), int(b)) for a, b in edges.reshape(-1, 2)])

    def _of_parts(self, sample: Parts, part_ids: Sequence[TokenIds]) -> _Document:
        """BOS where the tokenizer adds it, the parts, and EOS, which is learned if the last part is."""
        ids, spans, is_learned = array("I", self.begin), list[Span](), False
        for (_, is_learned), more in zip(sample.parts, part_ids, strict=True):
            start = len(ids)
            ids.extend(more)
            if is_learned:
                _add(spans, start, len(ids))
        ids.append(self.end)
        if spans and is_learned:
            _add(spans, len(ids) - 1, len(ids))
        return _as_array(ids), spans

    def _of_rendered(self, samples: Sequence[Rendered], note: Note) -> Iterator[_Document]:
        """The text as one; but if a token lies across the start of a target, cut there, as it is at inference."""
        joint = list(self.joining.whole.encode([sample.text for sample in samples], with_offsets=True, note=note))
        whole_spans = [_spans_of(encoding, sample) for encoding, sample in zip(joint, samples, strict=True)]
        for sample, encoding, spans in zip(samples, joint, whole_spans, strict=True):
            ids, spans = (array("I", encoding.ids), spans) if spans is not None else self._of_torn(sample)
            if spans and not sample.ends_itself:
                ids.append(self.end)
                _add(spans, len(ids) - 1, len(ids))
            yield _as_array(ids), spans

    def _of_torn(self, sample: Rendered) -> tuple["array[int]", list[Span]]:
        """The tokens of the text before the first target and of the texts from each target's start to the next."""
        starts, length = [start for start, _ in sample.targets], len(sample.text)
        (prompt,) = self.joining.whole.encode([sample.text[: starts[0]]], with_offsets=False)
        ids = array("I", prompt.ids)
        spans = list[Span]()
        for (start, stop), end in zip(sample.targets, [*starts[1:], length], strict=True):
            last = ids[-1] if ids else None
            before = sample.text[max(0, start - 1) : start]
            more, offsets = self.joining.encode_later(before, sample.text[start:end], last)
            _add(spans, len(ids), len(ids) + int(np.searchsorted(offsets[:, 1], stop - start, side="right")))
            ids.extend(more)
        return ids, spans

    def _joins(self, sample: Parts, ids: Ints) -> bool:
        """False for a word that is cut in two where the tokenizer begins a new one with each text."""
        if self.joining.is_exact or len(sample.parts) == 1:
            return True
        text = "".join(text for text, _ in sample.parts)
        return self.joining.is_joined(ids[len(self.begin) : -1], text)

    def _laid_out(
        self,
        documents: dict[int, _Document],
        records: Sequence[Record],
        hashes: dict[int, int],
        bad: tuple[Bad, ...],
        texts: Sequence[Ints],
    ) -> Encoded:
        """`texts`: the ids of the documents that were made from text."""
        dtype = np.uint16 if self.vocabulary_size <= 1 << 16 else np.uint32
        ids = [ids for ids, _ in documents.values()]
        spans = [span for _, spans in documents.values() for span in spans]
        return Encoded(
            ids=np.concatenate([np.zeros(0, dtype), *ids], dtype=dtype, casting="unsafe"),  # [tokens]
            lengths=np.array([len(each) for each in ids], np.int64),  # [documents]
            entries=np.array([records[number].entry for number in documents], np.int64),  # [documents]
            spans=np.array(spans, np.int32).reshape(-1, 2),  # [spans, 2]
            span_counts=np.array([len(spans) for _, spans in documents.values()], np.int64),  # [documents]
            hashes=np.array([hashes[number] for number in documents], np.uint64),  # [documents]
            bad=bad,
            remarks=self._twice(texts),
        )

    def _twice(self, texts: Sequence[Ints]) -> dict[Remark, int]:
        """In how many texts BOS or EOS stands twice in a row."""
        if not texts:
            return {}
        ids = np.concatenate(texts)  # [tokens]
        ends = np.cumsum([len(text) for text in texts])  # [texts]
        found = {}
        for token in (self.end,) if self.bos in (None, self.end) else (self.bos, self.end):
            assert token is not None
            is_token = ids == token
            at = np.flatnonzero(is_token[:-1] & is_token[1:])
            number = np.searchsorted(ends, at, side="right")
            count = len(np.unique(number[number == np.searchsorted(ends, at + 1, side="right")]))
            if count:
                found[TWICE, str(self.tokenizer.id_to_token(token))] = count
        return found

    def _beyond(self, token: int) -> str:
        name = self.tokenizer.id_to_token(token) if token <= LARGEST_ID else None
        return (
            f"the tokenizer makes token {name!r} (id {token:,}), but the model has embeddings for ids below "
            f"{self.vocabulary_size:,}. Set --tokenizer_name to the model's own tokenizer, or enlarge the model's embedding."
            if name is not None
            else f"it has the token id {token:,}, which the tokenizer does not know, and the model has embeddings for ids "
            f"below {self.vocabulary_size:,}. Fix or remove the record."
        )


def _as_array(ids: "Sequence[int] | array[int]") -> Ints:
    """The ids as uint32 [tokens]; numpy alone would ask each number of a list for its type."""
    return np.frombuffer(ids if isinstance(ids, array) else array("I", ids), np.uint32)


def _between_parts(sample: Parts) -> list[str]:
    """The texts of a sample with `BETWEEN_PARTS` between them, so that no two lists of texts run together."""
    texts = [piece for text, _ in sample.parts for piece in (BETWEEN_PARTS, text)]
    return texts[1:]


def _add(spans: list[Span], start: int, stop: int) -> None:
    """Add a span behind the others; one that touches the last makes it longer, an empty one is none."""
    if start == stop:
        return
    if spans and spans[-1][1] == start:
        start = spans.pop()[0]
    spans.append((start, stop))


def _spans_of(encoding: Encoding | LongEncoding, sample: Rendered) -> list[Span] | None:
    """The tokens that lie within targets; None if one lies across the start of a target."""
    spans: list[Span] = []
    length = len(sample.text)
    for start, stop in sample.targets:
        first = _token_at(encoding, start, length)
        if first < len(encoding) and _begin_of(encoding, first) < start:
            return None
        _add(spans, first, _token_at(encoding, stop, length))
    return spans


def _token_at(encoding: Encoding | LongEncoding, character: int, length: int) -> int:
    """The first token that lies across or behind a character of a text of so many; their number if there is none.

    The tokenizer itself searches: a list of all offsets would cost more than all else that is done here.
    """
    if character == length:
        return len(encoding)
    if isinstance(encoding, LongEncoding):
        return encoding.token_at(character)
    token = encoding.char_to_token(character)
    if token is None:  # white space that the tokenizer drops is in no token
        return bisect_right([stop for _, stop in encoding.offsets], character)
    return token


def _begin_of(encoding: Encoding | LongEncoding, token: int) -> int:
    """The character at which a token begins."""
    characters = encoding.token_to_chars(token)
    assert characters is not None
    return int(characters[0])
