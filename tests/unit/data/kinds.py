"""Small tokenizers in the manner of public families, trained on a few lines: how they mark spaces is what differs."""

import json
from collections.abc import Callable
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LINES = [
    "The sum of 1 and 1 is two.", "The quick brown fox jumps over the lazy dog.", "https://www.example.com/index.html",
    "It is happy, and unhappy is another word.", "Question: which animal is this?\nAnswer: the fox.", "日本語 の 文章 です。",
    "User: no\nAssistant: yes, it is here", "two happy dogs and a fox, 12 + 34 = 46",
] * 4  # fmt: skip
SPECIALS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARK = "▁"


def _bpe(vocab_size: int = 700) -> Tokenizer:
    """A BPE over marked words that can write every byte, as in Llama 2, Mistral, Phi-3 and Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(MARK, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS + BYTES, show_progress=False)
    tokenizer.train_from_iterator([MARK + line.replace(" ", MARK) for line in LINES], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fallback = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)])
    return tokenizer


def llama2() -> Tokenizer:
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    return tokenizer


def llama2_with_normalized_specials() -> Tokenizer:
    """Special tokens are looked for behind the normalizer, as in Llama 2's first files."""
    backend = json.loads(llama2().to_str())
    for token in backend["added_tokens"]:
        token["normalized"] = token["content"] in SPECIALS
    return Tokenizer.from_str(json.dumps(backend))


def phi3() -> Tokenizer:
    """Llama 2's with added tokens that take white space behind them."""
    tokenizer = llama2()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", rstrip=True, normalized=False) for name in ("end", "user")])
    return tokenizer


def _metaspace(scheme: str) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = _bpe()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, scheme, split=False)
        return tokenizer

    return make


def gemma() -> Tokenizer:
    """Puts nothing before a text."""
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.Replace(" ", MARK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _byte_level(prefix: bool, split: str | None = None) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
        steps = [level] if split is None else [pre_tokenizers.Split(Regex(split), "isolated"), level]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(LINES, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return tokenizer

    return make


def _unigram(words: bool, normalizer: normalizers.Normalizer | None = None) -> Callable[[], Tokenizer]:
    """`words`: white space is dropped first, as in the first files of T5, XLM-R and ALBERT."""

    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.Unigram())
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        space = pre_tokenizers.Metaspace(MARK, "always")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space]) if words else space
        tokenizer.decoder = decoders.Metaspace(MARK, "always")
        trainer = trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=SPECIALS,
            unk_token="<unk>",
            show_progress=False,
            initial_alphabet=list("unhappy1+=:/.,? 日本語"),
        )
        tokenizer.train_from_iterator(LINES, trainer)
        return tokenizer

    return make


def word_piece() -> Tokenizer:
    """BERT's: a text begins a word, whatever stands before it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    )
    return tokenizer


def gpt1() -> Tokenizer:
    """The first GPT's: a mark at the end of each word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


T5_NORMALIZER = normalizers.Sequence(
    [
        normalizers.Replace(Regex(r"\s"), " "),
        normalizers.NFKC(),
        normalizers.Strip(left=False, right=True),
        normalizers.Replace(Regex(" {2,}"), MARK),
    ]
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PREFIXED: dict[str, Callable[[], Tokenizer]] = {
    "llama 2": llama2,
    "llama 2, normalized specials": llama2_with_normalized_specials,
    "phi 3": phi3,
    "llama 2, not legacy": _metaspace("first"),
    "metaspace always": _metaspace("always"),
    "byte level with add_prefix_space": _byte_level(True),
}
"""They put a space before a text, and can write every text."""

UNPREFIXED: dict[str, Callable[[], Tokenizer]] = {
    "gemma": gemma,
    "gpt 2": _byte_level(False),
    "llama 3": _byte_level(False, LLAMA3_SPLIT),
    "metaspace never": _metaspace("never"),
}
"""They put nothing before a text, and can write every text."""

LOSSY: dict[str, Callable[[], Tokenizer]] = {
    "xlm-r": _unigram(True, normalizers.NFKC()),
    "t5": _unigram(False, T5_NORMALIZER),
    "unigram": _unigram(False, None),
}
"""They put a space before a text, and write some white space as other white space or not at all."""

BY_WORDS: dict[str, Callable[[], Tokenizer]] = {"wordpiece": word_piece, "gpt 1": gpt1}
"""A text begins a word, which no later text can continue."""


@lru_cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of this name, wrapped as transformers does."""
    made = (PREFIXED | UNPREFIXED | LOSSY | BY_WORDS)[kind]()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
