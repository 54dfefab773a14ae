"""A text that is read in windows has the tokens, at the characters, that the tokenizer gives the whole text."""

import json
import random
import tracemalloc
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ds_recipes.data import long_text
from ds_recipes.data.encode import Encoder
from ds_recipes.data.formats.sample import Parts, Rendered
from ds_recipes.data.long_text import LongEncoding, Texts
from ds_recipes.data.sources.record import Record

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = [
    "the", "quick", "brown", "fox", "don't", "stop", "1234567", "x=1;", "if(a[0]){b+=2}", "naïve",
    "café", "é", "日本語の文章です。", "これは", "ペン", "ﬁ", "①", "🙂", "👩\u200d👩\u200d👧", "\t\t", "\n", "\n\n",
    "", "", "", "aaaaaaaaaaaa", "<mask>", "<think>", "</s>", "thinking", "mask",
    "http://example.com/?q=1&r=2", "ĞŒ", "\u200b", "\r\n",
]  # fmt: skip


def make_text(seed: int, words: int = 4000) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(WORDS) + generator.choice(["", " ", " ", " ", "  ", "\n"]) for _ in range(words))


def trained(
    model: models.Model,
    trainer: trainers.Trainer,
    normalizer: normalizers.Normalizer | None = None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([make_text(seed, 800) for seed in (100, 101)], trainer)
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False)])
    tokenizer.add_tokens(
        [
            AddedToken("<mask>", lstrip=True, normalized=False),
            AddedToken("<think>", rstrip=True),
            AddedToken("mask", single_word=True),
        ]
    )
    return tokenizer


def bpe(**options: object) -> tuple[models.Model, trainers.Trainer]:
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False, max_token_length=8)
    return models.BPE(unk_token="<unk>", **options), trainer


def byte_level(regex: str | None = None, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    before = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return trained(models.BPE(), trainer, normalizer, pre_tokenizers.Sequence([*before, level]))


def sentencepiece(pre_tokenizer: pre_tokenizers.PreTokenizer | None, prepends: bool) -> Tokenizer:
    """As Llama 2 and Gemma write theirs: spaces become ▁ first, and no piece ends before the text does."""
    whole = trained(*bpe(), None, pre_tokenizers.Metaspace(prepend_scheme="never"))
    content = json.loads(whole.to_str())
    model = content["model"] | {"byte_fallback": True, "fuse_unk": True}
    first = len(model["vocab"])
    model["vocab"] |= {f"<0x{byte:02X}>": first + byte for byte in range(256)}
    shifted = [token | {"id": token["id"] + 256} for token in content["added_tokens"] if token["content"] != "<unk>"]
    content |= {"model": model, "added_tokens": shifted}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepends else spaces
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    else:
        content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
        tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def unigram(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False, max_piece_length=8
    )
    return trained(models.Unigram(), trainer, normalizers.NFKC(), pre_tokenizer)


def wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"], show_progress=False)
    normalizer = normalizers.BertNormalizer(lowercase=True)
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, normalizer, pre_tokenizers.BertPreTokenizer())


def numbered() -> Tokenizer:
    """Pieces of a fixed length from the text's beginning: the borders depend on all that comes before."""
    return trained(*bpe(), None, pre_tokenizers.FixedLength(length=7))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(LLAMA3),
    "qwen2": lambda: byte_level(LLAMA3.replace("{1,3}", ""), normalizers.NFC()),
    "llama2": lambda: sentencepiece(None, prepends=True),
    "gemma": lambda: sentencepiece(pre_tokenizers.Split(" ", "merged_with_previous"), prepends=False),
    "metaspace first": lambda: trained(*bpe(), None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace always": lambda: trained(*bpe(), normalizers.NFC(), pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace whole": lambda: sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), False),
    "unigram": lambda: unigram(pre_tokenizers.Metaspace()),
    "unigram whole": lambda: unigram(pre_tokenizers.Metaspace(split=False)),
    "stripped": lambda: byte_level(LLAMA3, normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()])),
    "wordpiece": wordpiece,
    "fixed length": numbered,
}
"""Normalizers, dummy prefixes and pre-tokenizers as models of these names have them, and some that nobody has."""


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def small_windows(patch: pytest.MonkeyPatch, characters: int, overlap: int) -> None:
    patch.setattr(long_text, "LONG_CHARACTERS", characters)
    patch.setattr(long_text, "OVERLAP_CHARACTERS", overlap)


def read_long(tokenizer: Tokenizer, text: str) -> LongEncoding:
    (found,) = Texts(tokenizer).encode([text], with_offsets=True)
    assert isinstance(found, LongEncoding)
    return found


@pytest.mark.parametrize(("characters", "overlap"), [(700, 128), (3000, 400)])
def test_windows_give_the_tokens_of_the_whole(
    tokenizer: Tokenizer, characters: int, overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_windows(monkeypatch, characters, overlap)
    for seed in range(6):
        text = make_text(seed)
        whole, found = tokenizer.encode(text, add_special_tokens=False), read_long(tokenizer, text)
        assert list(found.ids) == whole.ids
        assert [found.token_to_chars(token) for token in range(len(found))] == whole.offsets


@pytest.mark.parametrize(
    "text",
    [
        "a" * 5001,  # pairs from the left: where they begin decides everything
        "ab" * 3000 + "b",
        " " * 4001 + "x",
        "1" * 4000,
        "\n" * 3999 + "a",
        "日本" * 2000 + "語",
        "e" + "\u0301" * 3000 + "x",  # one character with three thousand accents
        "word " * 100 + " " * 3000 + "<mask>" + " word" * 200,  # the added token takes all spaces before it
        "<think>" + " " * 3000 + "a",
        "\u200b" * 3000,
    ],
    ids=["a", "ab", "spaces", "digits", "lines", "kanji", "accents", "lstrip", "rstrip", "nothing"],
)
def test_a_text_without_a_safe_place_is_read_as_a_whole(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_windows(monkeypatch, 700, 128)
    assert list(read_long(tokenizer, text).ids) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "gemma", "unigram"])
def test_ordinary_text_is_not_read_as_a_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch, 700, 256)
    lengths = []
    made = long_text._Window.__init__

    def measured(self: object, tokenizer: Tokenizer, text: str, begin: int, end: int) -> None:
        lengths.append(end - begin)
        made(self, tokenizer, text, begin, end)  # type: ignore[arg-type]

    monkeypatch.setattr(long_text._Window, "__init__", measured)
    read_long(KINDS[kind](), "Some words, and 日本語の文章 of 2024. " * 500)
    assert max(lengths) <= 1400


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("kind", ["llama3", "llama2", "metaspace first", "metaspace always", "unigram", "wordpiece"])
def test_documents_of_long_texts_are_what_they_are_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets, hashes and parts without a dummy prefix too."""
    encoder = Encoder.of(wrapped(KINDS[kind]()), 2000)
    text = make_text(7, 2000)
    targets = tuple((start, start + 333) for start in range(50, len(text) - 400, 1111))
    samples = [
        Rendered(text, targets, ends_itself=False),
        Rendered("the fox", ((4, 7),), ends_itself=False),
        Parts(((text, False), (make_text(8, 2000), True))),
        Parts((("the", False), (" " + make_text(9, 1000), True), ("\n", False), (text, True))),
    ]
    records = [Record("a.jsonl", number, number, {}) for number in range(len(samples))]
    whole = encoder.encode(records, samples)
    small_windows(monkeypatch, 700, 128)
    steps: list[int] = []
    found = encoder.encode(records, samples, steps.append)
    assert found.bad == whole.bad
    assert len(found.lengths) > 0
    for name in ("ids", "lengths", "spans", "span_counts", "hashes"):
        assert getattr(found, name).tolist() == getattr(whole, name).tolist(), name
    assert len(steps) > 20


def test_half_a_pair_far_inside_a_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_recipes.data.encode.HASHED_CHARACTERS", 100)
    encoder = Encoder.of(wrapped(byte_level()), 2000)
    sample = Parts((("x" * 250, False), ("y" * 120 + "\ud800", True)))
    (bad,) = encoder.encode([Record("a.jsonl", 1, 0, {})], [sample]).bad
    assert "half a UTF-16 pair at character 372" in bad.message


def test_what_python_keeps_of_a_long_text_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.of(wrapped(byte_level()), 2000)
    text = "the quick brown fox " * 100_000
    sample, record = Parts(((text, True),)), Record("a.jsonl", 1, 0, {})
    tracemalloc.start()
    try:
        encoded = encoder.encode([record], [sample])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(encoded.ids) > 400_000
    assert peak < 12 * len(encoded.ids) + 16_000_000


@pytest.mark.parametrize("characters", [3000, 1 << 20], ids=["windows", "whole"])
def test_all_characters_are_noted_once(characters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch without a place to join makes the window grow."""
    small_windows(monkeypatch, characters, 500)
    texts = ["short", "the quick fox " * 2000, "", "a dog " * 900 + "x" * 20_000 + " a dog" * 900, "short too"]
    noted: list[int] = []
    list(Texts(KINDS[next(iter(KINDS))]()).encode(texts, with_offsets=False, note=noted.append))
    assert sum(noted) == sum(map(len, texts))
    assert min(noted) >= 0
