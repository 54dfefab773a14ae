"""Token ids, spans and hashes of a batch equal what the tokenizer makes of each document alone."""

import pickle
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ds_recipes.data.encode import Encoded, Encoder
from ds_recipes.data.formats.sample import Parts, Rendered, Sample, Tokens
from ds_recipes.data.sources.record import Record
from tests.unit.data.made import make_tokenizer

WORDS = ["the", " quick", " fox", "日本", "🙂", "é", " ", "\n", "</s>", "<s>", "Response:", "{}", "\x00", "́"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
PARTS = st.lists(st.tuples(TEXTS, st.booleans()), max_size=4).map(lambda parts: Parts(tuple(parts)))
TOKENS = st.lists(st.tuples(st.integers(0, 310), st.booleans()), max_size=8).map(
    lambda pairs: Tokens([token for token, _ in pairs], [learned for _, learned in pairs])
)


@st.composite
def rendered(draw: st.DrawFn) -> Rendered:
    text = draw(TEXTS)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    targets = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    return Rendered(text, targets, draw(st.booleans()))


SAMPLES = st.lists(st.one_of(PARTS, TOKENS, rendered()), max_size=6)


def records(samples: Sequence[Sample]) -> list[Record]:
    return [Record("a.jsonl", 10 + number, 100 + number, {}) for number in range(len(samples))]


def encode(samples: Sequence[Sample], vocabulary_size: int = 300, adds_bos: bool = True) -> Encoded:
    return Encoder.of(make_tokenizer(adds_bos), vocabulary_size).encode(records(samples), samples)


def documents(encoded: Encoded) -> dict[int, tuple[list[int], list[list[int]], int]]:
    """By entry: ids, spans, hash."""
    found, token, span = {}, 0, 0
    for entry, length, count, digest in zip(
        encoded.entries, encoded.lengths, encoded.span_counts, encoded.hashes, strict=True
    ):
        spans = encoded.spans[span : span + count].tolist()
        found[int(entry)] = encoded.ids[token : token + length].tolist(), spans, int(digest)
        token, span = token + int(length), span + int(count)
    assert (token, span) == (len(encoded.ids), len(encoded.spans))
    return found


def plainly(
    sample: Sample, tokenizer: PreTrainedTokenizerFast, begin: list[int], later: PreTrainedTokenizerFast | None = None
) -> tuple[list[int], list[bool]] | None:
    """Ids and whether each is learned, one token at a time; None if nothing is. `later` reads what goes on within a text."""
    ids: list[int] = []
    mask: list[bool] = []

    def add(tokens: Sequence[int], learned: Any) -> None:
        ids.extend(tokens)
        mask.extend(learned if isinstance(learned, list) else [learned] * len(tokens))

    if isinstance(sample, Tokens):
        add(sample.ids, list(sample.target_mask))
    elif isinstance(sample, Parts):
        add(begin, False)
        for text, learned in sample.parts:
            add(tokenizer(text, add_special_tokens=False).input_ids, learned)
        add([tokenizer.eos_token_id], bool(sample.parts) and sample.parts[-1][1] and any(mask))
    else:
        starts = [start for start, _ in sample.targets]
        joint = tokenizer(sample.text, add_special_tokens=False, return_offsets_mapping=True)
        is_torn = any(begin < start < end for start in starts for begin, end in joint.offset_mapping)
        cuts = [0, *(starts if is_torn else []), len(sample.text)]
        for cut, end in pairwise(cuts):
            goes_on = later is not None and cut > 0 and ids[-1] != tokenizer.eos_token_id
            read = later if later is not None and goes_on else tokenizer
            piece = read(sample.text[cut:end], add_special_tokens=False, return_offsets_mapping=True)
            if goes_on and "</s>" in sample.text[cut:end]:  # behind a special token the tokenizer reads as ever
                at = sample.text.index("</s>", cut)
                rest = tokenizer(sample.text[at:end], add_special_tokens=False, return_offsets_mapping=True)
                piece = read(sample.text[cut:at], add_special_tokens=False, return_offsets_mapping=True)
                piece["input_ids"] += rest["input_ids"]
                piece["offset_mapping"] += [(at - cut + a, at - cut + b) for a, b in rest["offset_mapping"]]
            offsets = [(cut + a, cut + b) for a, b in piece.offset_mapping]
            add(piece.input_ids, [any(s <= a and b <= e for s, e in sample.targets) for a, b in offsets])
        if any(mask) and not sample.ends_itself:
            add([tokenizer.eos_token_id], True)
    return (ids, mask) if any(mask[1:]) else None


@settings(deadline=None, max_examples=300)
@given(SAMPLES, st.booleans())
def test_a_batch_is_what_each_document_is_alone(samples: list[Sample], adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos)
    encoded = encode(samples, 300, adds_bos)
    found = documents(encoded)
    assert [*found] == sorted(found)
    bad = {each.entry: each.message for each in encoded.bad}
    for number, sample in enumerate(samples):
        entry = 100 + number
        expected = plainly(sample, tokenizer, [tokenizer.bos_token_id] if adds_bos else [])
        if isinstance(sample, Tokens) and max(sample.ids, default=0) >= 300:
            assert "embeddings for ids below 300." in bad.pop(entry)
        elif expected is None:
            assert "target" in bad.pop(entry)
        else:
            ids, spans, _ = found.pop(entry)
            mask = [False] * len(ids)
            for start, stop in spans:
                mask[start:stop] = [True] * (stop - start)
            assert (ids, mask) == (expected[0], [False, *expected[1][1:]])
            edges = [edge for span in spans for edge in span]
            assert edges == sorted(set(edges))  # ascending, not touching, none empty
            assert edges[0] >= 1
    assert not found
    assert not bad


@pytest.mark.parametrize("vocabulary_size", [300, 1 << 16, (1 << 16) + 1])
def test_arrays_have_the_types_that_are_stored(vocabulary_size: int) -> None:
    for samples in ([], [Parts((("the fox", True),)), Tokens([5, 6], [False, True])]):
        encoded = encode(samples, vocabulary_size)
        assert encoded.ids.dtype == (np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)
        assert [array.dtype for array in (encoded.lengths, encoded.entries, encoded.span_counts)] == [np.int64] * 3
        assert (encoded.spans.dtype, encoded.hashes.dtype) == (np.int32, np.uint64)
        assert encoded.spans.shape == (len(samples), 2)
        assert encoded.entries.tolist() == [100, 101][: len(samples)]


def test_hashes_are_of_the_content() -> None:
    same = [Parts((("the", False), (" fox", True))), Parts((("the", True), (" fox", True)))]
    other = [Parts((("the fox", True),)), Parts((("the f", False), ("ox", True)))]
    hashes = [hash for _, _, hash in documents(encode([*same, *other])).values()]
    assert hashes[0] == hashes[1] == xxhash.xxh3_64_intdigest(b"the\x00 fox")
    assert len(set(hashes)) == 3
    ((_, _, hash),) = documents(encode([Tokens([1, 299], [True, True])])).values()
    assert hash == xxhash.xxh3_64_intdigest(b"\x01\0\0\0\x2b\x01\0\0")
    ((_, _, hash),) = documents(encode([Rendered("the fox", ((3, 7),), True)])).values()
    assert hash == hashes[2]


def test_text_that_spells_a_special_token_becomes_it() -> None:
    """As the tokenizer itself reads text: records are not searched for such words."""
    ((ids, spans, _),) = documents(encode([Parts((("q", False), ("Fritz </s> 日本語", True)))])).values()
    tokenizer = make_tokenizer()
    prompt, output = (tokenizer(text, add_special_tokens=False).input_ids for text in ("q", "Fritz </s> 日本語"))
    assert ids == [0, *prompt, *output, 1]
    assert ids.count(1) == 2
    assert spans == [[1 + len(prompt), len(ids)]]


def messages(encoded: Encoded) -> list[str]:
    return [each.message for each in encoded.bad]


def test_a_token_beyond_the_embedding_is_named() -> None:
    largest = max(make_tokenizer()("the dog").input_ids)
    token = make_tokenizer().convert_ids_to_tokens(largest)
    encoded = encode([Parts((("a", True),)), Parts((("the dog", True),)), Parts((("a", True),))], largest)
    assert encoded.entries.tolist() == [100, 102]
    assert messages(encoded) == [
        f"a.jsonl:11: the tokenizer makes token {token!r} (id {largest}), but the model has embeddings for ids below "
        f"{largest}. Set --tokenizer_name to the model's own tokenizer, or enlarge the model's embedding."
    ]


@pytest.mark.parametrize("token", [300, 1 << 31, 1 << 32, 1 << 70])
def test_a_token_that_nobody_knows_is_named(token: int) -> None:
    encoded = encode([Tokens([1, token], [True, True])], 300)
    assert messages(encoded) == [
        f"a.jsonl:10: it has the token id {token:,}, which the tokenizer does not know, and the model has embeddings for "
        "ids below 300. Fix or remove the record."
    ]


def test_records_without_a_target_are_named_and_left_out() -> None:
    samples = [
        Parts((("the fox", False), ("", True))),
        Parts((("the fox", False),)),
        Rendered("the fox", (), True),
        Rendered("the fox", ((3, 3),), False),
        Tokens([5, 6], [True, False]),
        Tokens([], []),
        Parts((("half \ud83d a pair", True),)),
        Rendered("\udc00", ((0, 1),), True),
        Parts((("fox", True),)),
    ]
    encoded = encode(samples)
    assert encoded.entries.tolist() == [108]
    assert [each.entry for each in encoded.bad] == list(range(100, 108))
    text = "its text makes no tokens, so it has no target. Fill it in or remove it."
    turns = "its assistant turns make no tokens, so it has no target. Fill them in or remove it."
    mask = "none of its tokens is a target; the first never is, as nothing comes before it. Fix its mask or remove it."
    half = "its text has half a UTF-16 pair at character {}, which is no text. Fix or remove the record."
    wanted = [text, text, turns, turns, mask, mask, half.format(6), half.format(1)]
    assert messages(encoded) == [f"a.jsonl:{10 + i}: {message}" for i, message in enumerate(wanted)]


def test_the_first_token_is_no_target_where_the_tokenizer_adds_no_bos() -> None:
    samples = [Parts((("a dog", True),)), Parts((("a", True),)), Rendered("a", ((0, 1),), True)]
    tokenizer = make_tokenizer(adds_bos=False)
    encoded = encode(samples, adds_bos=False)
    found = documents(encoded)
    assert found[100][:2] == ([*tokenizer("a dog").input_ids, 1], [[1, len(tokenizer("a dog").input_ids) + 1]])
    assert found[101][1] == [[1, 2]]
    assert len(encoded.bad) == 1


def test_an_encoder_travels_and_forgets_padding_and_truncation() -> None:
    tokenizer = make_tokenizer()
    samples = [Parts((("the quick fox", True),)), Rendered("the fox", ((3, 7),), False), Parts((("a", True),))]
    plain = documents(encode(samples))
    tokenizer(["a dog", "a"], padding=True, truncation=True, max_length=2)
    encoder = pickle.loads(pickle.dumps(Encoder.of(tokenizer, 300)))
    assert documents(encoder.encode(records(samples), samples)) == plain


def sentencepiece_like(puts_prefix: bool = True) -> PreTrainedTokenizerFast:
    """A BPE over words with a mark for the space before them, which it also puts before a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the▁quick▁fox", "▁yes▁no", "[INST]▁yes"] * 3, trainer)
    tokenizer.decoder = decoders.Replace("▁", " ")
    if not puts_prefix:
        tokenizer.normalizer = spaces
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def space_dropping() -> PreTrainedTokenizerFast:
    """A word tokenizer that drops white space, so that some characters are in no token."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "fox": 3, "yes": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize(
    "tokenizer, later",
    [(sentencepiece_like(), sentencepiece_like(puts_prefix=False)), (space_dropping(), None)],
    ids=["sentencepiece", "space dropping"],
)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_spans_hold_for_tokenizers_of_other_kinds(
    tokenizer: PreTrainedTokenizerFast, later: PreTrainedTokenizerFast | None, data: st.DataObject
) -> None:
    text = data.draw(st.lists(st.sampled_from(["the", " ", "fox", "yes", "\n", "  ", "</s>"]), max_size=8).map("".join))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
    sample = Rendered(text, tuple(zip(cuts[::2], cuts[1::2], strict=False)), data.draw(st.booleans()))
    encoded = Encoder.of(tokenizer, 100).encode(records([sample]), [sample])
    expected = plainly(sample, tokenizer, [], later)
    assert (expected is None) == bool(encoded.bad)
    if expected is not None:
        ids, spans, _ = documents(encoded)[100]
        mask = [any(start <= i < stop for start, stop in spans) for i in range(len(ids))]
        assert (ids, mask) == (expected[0], [False, *expected[1][1:]])
