"""Parts of a text join to it: nothing is read or learned that the data do not say, whatever the tokenizer puts before a text."""

import pickle
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_recipes.data.encode import Encoder
from ds_recipes.data.formats.sample import Parts, Rendered, Sample
from ds_recipes.data.sources.record import Record
from tests.unit.data.kinds import BY_WORDS, LOSSY, PREFIXED, UNPREFIXED, tokenizer_of

PIECES = [
    "the",
    " fox",
    "http:",
    "//",
    "1+1=",
    "2",
    "\n",
    "\n\n",
    " ",
    "  ",
    "é",
    "🙂",
    "日本",
    "語",
    "un",
    "happy",
    ".",
    "x",
]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
LOSSLESS = [*PREFIXED, *UNPREFIXED]
Document = tuple[list[int], list[tuple[int, int]]]


@lru_cache
def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """As a worker process has it."""
    encoder: Encoder = pickle.loads(pickle.dumps(Encoder.of(tokenizer, 10**6)))
    return encoder


def encode(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> Document:
    """Ids and learned spans."""
    encoded = encoder_of(tokenizer).encode([Record("a.jsonl", 1, 0, {})], [sample])
    assert not encoded.bad, encoded.bad[0].message
    return encoded.ids.tolist(), [(a, b) for a, b in encoded.spans.tolist()]


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def alone(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """What the tokenizer makes of a text, with BOS if it adds it."""
    return list(tokenizer(text).input_ids)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(deadline=None, max_examples=40)
@given(prompt=TEXTS, answer=TEXTS)
def test_the_prompt_is_what_inference_gives_and_the_answer_goes_on_from_it(kind: str, prompt: str, answer: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids, spans = encode(tokenizer, Parts(((prompt, False), (answer, True))))
    given = alone(tokenizer, prompt)
    assert ids[: len(given)] == given
    assert spans == [(len(given), len(ids))] and ids[-1] == tokenizer.eos_token_id
    whole = decode(tokenizer, ids[:-1])
    assert whole == decode(tokenizer, alone(tokenizer, prompt + answer))
    if not prompt.startswith(" "):  # of which the tokenizers themselves lose one
        assert whole.removeprefix("<s>").removeprefix(" ") == prompt + answer


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(deadline=None, max_examples=30)
@given(texts=st.lists(TEXTS, min_size=2, max_size=4), is_first_empty=st.booleans())
def test_any_number_of_parts_join_and_the_first_with_a_text_begins_it(
    kind: str, texts: list[str], is_first_empty: bool
) -> None:
    tokenizer = tokenizer_of(kind)
    parts = [("", False)] * is_first_empty + [(text, number % 2 == 1) for number, text in enumerate(texts)]
    ids, spans = encode(tokenizer, Parts((*parts, ("", False))))
    assert decode(tokenizer, ids[:-1]) == decode(tokenizer, alone(tokenizer, "".join(texts)))
    learned = [text for text, is_learned in parts if is_learned]
    for (start, stop), text in zip(spans, learned, strict=True):
        before, behind = decode(tokenizer, ids[:start]), decode(tokenizer, ids[:stop])
        assert behind.removeprefix(before) == text


@pytest.mark.parametrize("kind", UNPREFIXED)
@settings(deadline=None, max_examples=20)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_tokenizers_that_put_nothing_before_a_text_read_each_part_alone(kind: str, texts: list[str]) -> None:
    tokenizer = tokenizer_of(kind)
    ids, _ = encode(tokenizer, Parts(tuple((text, True) for text in texts)))
    parts = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    assert ids == [*alone(tokenizer, "")[:1], *parts, tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize(
    "prompt, answer",
    [
        ("1+1=", "2"),
        ("un", "happy"),
        ("the fox", " is here"),
        ("the fox ", "is here"),
        ("yes:", "a fox, it is"),
        ("日本", "語"),
    ],
)
def test_tokenizers_that_change_white_space_join_as_they_read_the_text(kind: str, prompt: str, answer: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids, spans = encode(tokenizer, Parts(((prompt, False), (answer, True))))
    whole = decode(tokenizer, alone(tokenizer, prompt + answer))
    assert decode(tokenizer, ids[:-1]) == whole
    assert spans == [(len(alone(tokenizer, prompt)), len(ids))]


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize(
    "first, later", [("the</s>fox", "2"), ("1+1=", "2</s>no"), ("x", "</s>y</s> z"), ("the</s>", "fox")]
)
def test_behind_a_special_token_within_a_part_the_tokenizer_reads_as_ever(kind: str, first: str, later: str) -> None:
    """Such a token is text like any other, and what stands behind it is what it is in the text as one."""
    tokenizer = tokenizer_of(kind)
    ids, _ = encode(tokenizer, Parts(((first, False), (later, True))))
    given = alone(tokenizer, first)
    assert ids[: len(given)] == given
    if "</s>" in later:
        assert decode(tokenizer, ids[:-1]) == decode(tokenizer, alone(tokenizer, first + later))
    else:
        assert decode(tokenizer, ids[len(given) : -1]) == later


@pytest.mark.parametrize("kind", PREFIXED)
def test_turns_that_a_token_would_tear_go_on_where_they_are_cut(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    before, answer, between, last = "User: no\nlink=http:", "//www.example.com</s>", "\nUser: un", "happy</s>"
    text = before + answer + between + last
    at = len(before) + len(answer) + len(between)
    targets = ((len(before), len(before) + len(answer)), (at, at + len(last)))
    ids, spans = encode(tokenizer, Rendered(text, targets, True))
    whole = [token for token in alone(tokenizer, text) if token != tokenizer.bos_token_id]
    assert decode(tokenizer, ids) == decode(tokenizer, whole)
    for (start, stop), target in zip(spans, (answer, last), strict=True):
        assert decode(tokenizer, ids[:stop]).removeprefix(decode(tokenizer, ids[:start])).strip() == target
    begin = [token for token in alone(tokenizer, before) if token != tokenizer.bos_token_id]
    assert ids[: spans[0][0]] == begin


def test_a_torn_text_that_begins_with_a_target_begins_as_a_text_does() -> None:
    tokenizer = tokenizer_of("llama 2")
    ids, _ = encode(tokenizer, Rendered("unhappy", ((0, 2), (2, 7)), False))
    assert decode(tokenizer, ids) == "unhappy</s>"
    assert ids[: len(alone(tokenizer, "un")) - 1] == alone(tokenizer, "un")[1:]


@pytest.mark.parametrize("kind", BY_WORDS)
def test_a_word_that_a_tokenizer_cannot_continue_is_refused(kind: str) -> None:
    encoder = Encoder.of(tokenizer_of(kind), 10**6)
    samples = [Parts(((prompt, False), (answer, True))) for prompt, answer in
               [("the fox", " is here"), ("it is un", "happy"), ("is it", "\nyes"), ("user:", "yes")]]  # fmt: skip
    encoded = encoder.encode([Record("a.jsonl", 1 + n, n, {}) for n in range(4)], samples)
    assert encoded.entries.tolist() == [0, 2, 3]
    assert [bad.message for bad in encoded.bad] == [
        "a.jsonl:2: its answer goes on in the middle of a word of its prompt, and the tokenizer begins a new word with each "
        "text, so the model would learn a space that is not there. End the prompt with white space or punctuation, or remove "
        "the record."
    ]


def test_a_vocabulary_of_few_words_is_probed_with_its_own() -> None:
    words = {"<unk>": 0, "</s>": 1, "▁red": 2, "red": 3, "▁fox": 4, "fox": 5, "▁den": 6, "den": 7}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always")]
    )
    backend.decoder = decoders.Metaspace("▁", "always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    ids, _ = encode(tokenizer, Parts((("red", False), ("den fox", True))))
    assert ids == [2, 7, 4, 1]
