"""Added tokens are never split, come back from a folder, and every id that a run uses has a row."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ds_recipes.data.tokenizer import add_tokens, check_special_ids, load_tokenizer, rows_for, tokenizer_fingerprint
from ds_recipes.errors import InputError
from tests.unit.data.made import make_tokenizer

TOKENS = ("<|user|>", "<think>", "東京都", " spaced ", "the")


def fresh() -> PreTrainedTokenizerBase:
    return copy.deepcopy(make_tokenizer(adds_bos=False))


@settings(deadline=None, max_examples=30)
@given(st.permutations(TOKENS), st.text("the <|user> 東京", max_size=12), st.text("abc 都", max_size=12))
def test_they_are_one_id_each_in_the_order_given_wherever_they_stand(
    tokens: list[str], before: str, after: str
) -> None:
    tokenizer = fresh()
    size, the = len(tokenizer), tokenizer.get_vocab()["the"]
    assert add_tokens(tokenizer, tokens) == len(tokens) - 1, "'the' was there before"
    expected = iter(range(size, size + len(tokens)))
    ids = {token: the if token == "the" else next(expected) for token in tokens}
    assert tokenizer.get_vocab()["the"] == the
    for token in tokens:
        assert ids[token] in tokenizer(before + token + after).input_ids
        assert tokenizer(token).input_ids == [ids[token]]
    assert add_tokens(tokenizer, tokens) == 0 and len(tokenizer) == size + len(tokens) - 1


def test_plain_ones_are_shown_and_special_ones_are_not_also_once_saved(tmp_path: Path) -> None:
    tokenizer = fresh()
    size = len(tokenizer)
    assert add_tokens(tokenizer, ["<|end|>", "<call>"], ["<think>", "the"]) == 3
    assert [tokenizer.get_vocab()[token] for token in ("<|end|>", "<call>", "<think>")] == [size, size + 1, size + 2]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path), False)):
        ids = one("<think>the fox<call> dog<|end|>").input_ids
        assert {size, size + 1, size + 2} <= {*ids}
        assert one.decode(ids, skip_special_tokens=True) == "<think>the fox dog"
        assert tokenizer_fingerprint(one) == tokenizer_fingerprint(tokenizer)
    other = fresh()
    add_tokens(other, ["<|end|>", "<call>", "<think>", "the"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer), "what they are is part of the identity"


@pytest.mark.parametrize("saved_before", [False, True])
def test_one_that_was_special_becomes_plain(tmp_path: Path, saved_before: bool) -> None:
    tokenizer = fresh()
    add_tokens(tokenizer, ["<think>"])
    if saved_before:
        tokenizer.save_pretrained(tmp_path / "before")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "before")
    assert add_tokens(tokenizer, [], ["<think>"]) == 0
    tokenizer.save_pretrained(tmp_path / "after")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "after")
    assert loaded.decode(loaded("<think>a").input_ids, skip_special_tokens=True) == "<think>a"


def test_a_saved_tokenizer_has_them_and_text_without_them_keeps_its_tokens(tmp_path: Path) -> None:
    tokenizer, plain = fresh(), fresh()
    add_tokens(tokenizer, TOKENS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>the quick <think> brown 東京都"
    assert loaded(text).input_ids == tokenizer(text).input_ids != plain(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded("a quick brown fox").input_ids == plain("a quick brown fox").input_ids
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(plain)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (["<x>", ""], "token 2 of 2 is empty"),
        (["<x>", "<y>", "<x>"], "'<x>' stands there twice"),
        (["<\udc80>"], "is not valid Unicode"),
    ],
)
def test_bad_lists_are_refused_and_change_nothing(tokens: list[str], message: str) -> None:
    tokenizer = fresh()
    with pytest.raises(InputError, match=message):
        add_tokens(tokenizer, tokens)
    assert tokenizer.get_vocab() == fresh().get_vocab()


def test_a_plain_one_is_none_of_the_tokenizers_own_and_in_one_list() -> None:
    with pytest.raises(
        InputError, match=r"--added_plain_tokens: '</s>' is the tokenizer's (eos|pad)_token, which is special"
    ):
        add_tokens(fresh(), [], ["</s>"])
    with pytest.raises(InputError, match="--added_plain_tokens: '<x>' stands there twice"):
        add_tokens(fresh(), ["<x>"], ["<x>"])


def with_gaps(eos: str) -> PreTrainedTokenizerBase:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 2, "c": 5}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos)


def test_a_vocabulary_that_leaves_ids_out_needs_a_row_for_its_largest_id() -> None:
    tokenizer = with_gaps(eos="c")
    assert (len(tokenizer), rows_for(tokenizer)) == (3, 6)
    assert add_tokens(tokenizer, ["<x>"]) == 1
    assert rows_for(tokenizer) == 7


def test_two_tokens_of_one_id_are_refused() -> None:
    with pytest.raises(InputError, match="'<z>' would get id 5, which another token has"):
        add_tokens(with_gaps(eos="a"), ["<x>", "<y>", "<z>"])


@pytest.mark.parametrize("kind", ["bos", "eos", "pad"])
def test_special_tokens_without_a_row_are_refused_by_name(kind: str) -> None:
    tokenizer = fresh()
    add_tokens(tokenizer, ["<last>"])
    rows = rows_for(tokenizer)
    check_special_ids(tokenizer, rows - 1)
    setattr(tokenizer, f"{kind}_token", "<last>")
    check_special_ids(tokenizer, rows)
    with pytest.raises(
        InputError, match=rf"its {kind.upper()} token <last> has id {rows - 1}, but .* ids below {rows - 1}\."
    ):
        check_special_ids(tokenizer, rows - 1)
