"""A row is shown as the tokenizer decodes all of it: the texts of its runs together are the whole text."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.encode import Encoder
from ds_recipes.data.formats.sample import Parts
from ds_recipes.data.show import Run, runs_of, show_row
from ds_recipes.data.sources.record import Record
from tests.unit.data.kinds import BY_WORDS, PREFIXED, UNPREFIXED, tokenizer_of

TEXTS = st.lists(
    st.sampled_from(["the", " fox", "1+1=", "2", "\n", " ", "🙂", "日本", "un", "happy"]), min_size=1, max_size=5
).map("".join)


@dataclass(frozen=True)
class Piece:
    document: int
    start: int
    length: int


def documents_of(ids: list[int], spans: list[list[int]]) -> Any:
    """One document, as a store gives it."""
    return SimpleNamespace(
        tokens=lambda _: np.array(ids), spans_of=lambda _: np.array(spans), offsets=[0, len(ids)], where=lambda _: "a:1"
    )


@pytest.mark.parametrize("kind", [*PREFIXED, *UNPREFIXED])
@settings(deadline=None, max_examples=20)
@given(prompt=TEXTS, answer=TEXTS)
def test_an_answer_is_shown_as_the_data_have_it(kind: str, prompt: str, answer: str) -> None:
    tokenizer = tokenizer_of(kind)
    sample = Parts(((prompt, False), (answer, True)))
    encoded = Encoder.of(tokenizer, 10**6).encode([Record("a", 1, 0, {})], [sample])
    ids = encoded.ids.tolist()
    read, learned = runs_of(tokenizer, documents_of(ids, encoded.spans.tolist()), Piece(0, 0, len(ids)))
    end = " </s>" if "normalized" in kind else "</s>"  # tokenizers writes the token as the normalizer makes it
    assert learned == Run(True, encoded.spans[0][1] - encoded.spans[0][0], answer + end)
    assert read.text + learned.text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", [*PREFIXED, *UNPREFIXED, *BY_WORDS])
@settings(deadline=None, max_examples=10)
@given(text=st.lists(TEXTS, min_size=4, max_size=8).map("".join), data=st.data())
def test_pieces_of_a_document_are_shown_as_they_stand_in_it(kind: str, text: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    cut = data.draw(st.integers(1, max(len(ids) - 1, 1)))
    pieces = [Piece(0, 0, cut), Piece(0, cut, len(ids) - cut)][: len(ids)]
    shown = [run.text for piece in pieces for run in runs_of(tokenizer, documents_of(ids, [[0, len(ids)]]), piece)]
    assert "".join(shown).replace("�", "") == tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace("�", "")


def test_the_middle_of_a_long_run_is_left_out() -> None:
    tokenizer = tokenizer_of("llama 2")
    ids = tokenizer("the fox " * 300, add_special_tokens=False).input_ids
    text = show_row(tokenizer, documents_of(ids, [[2, len(ids)]]), [Piece(0, 0, len(ids))])
    whole = tokenizer.decode(ids)
    begin, end = tokenizer.decode(ids[:102]), tokenizer.decode(ids[: len(ids) - 100])
    read = tokenizer.decode(ids[:2])
    assert text.splitlines()[0] == f"--- a:1 ({len(ids) - 2} of {len(ids)} tokens are targets)"
    assert text.splitlines()[1] == (
        f"{read}⟦{begin.removeprefix(read)} [... {len(ids) - 202} tokens ...] {whole.removeprefix(end)}⟧"
    )
