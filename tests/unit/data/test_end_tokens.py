"""The tokens that data teach a model to end its answers with, found in what is learned: by template, and by format."""

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.end_tokens import learned_ends
from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.data.tokenizer import add_tokens, use_eos
from ds_recipes.errors import InputError
from tests.unit.data.corpora import corpus_of, rows_of
from tests.unit.data.made import make_tokenizer, write_jsonl

TURNS = {
    "chatml": ("<|im_start|>", "\n", "<|im_end|>"),
    "llama 3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "\n", "<end_of_turn>"),
    "glm": ("<|role|>", "\n", "<|endoftext|>"),
}
TEMPLATE = (
    "{{% for m in messages %}}{{{{ '{0}' + m.role + '{1}' + m.content + '{2}' + '\\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '{0}assistant{1}' }}}}{{% endif %}}"
)
THINK = "<think>", "</think>"


def tokenizer_with(*tokens: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(make_tokenizer())
    add_tokens(tokenizer, [token for token in tokens if token.startswith("<")])
    return tokenizer


def conversation(*answers: str) -> dict[str, Any]:
    messages = [
        message
        for number, answer in enumerate(answers)
        for message in ({"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": answer})
    ]
    return {"messages": messages}


def ends_of(
    tmp_path: Path, records: list[Any], tokenizer: PreTrainedTokenizerBase, form: FormatSettings
) -> list[str | list[str]]:
    path = write_jsonl(tmp_path / "data.jsonl", records)
    settings = {"format": form, "tokenizer": tokenizer, "vocabulary_size": len(tokenizer)}
    rows = rows_of(path, form.dataset, context_size=256, long_documents="truncate", **settings)
    return [tokenizer.convert_ids_to_tokens(token) for token in learned_ends(corpus_of(rows), tokenizer)]


@pytest.mark.parametrize("family", TURNS)
def test_the_end_of_a_turn_is_found_whatever_the_template_calls_it(family: str, tmp_path: Path) -> None:
    """And the tokens within an answer are not, though one answer ends with what another goes on after."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE.format(*(mark.replace("\n", "\\n") for mark in TURNS[family])))
    tokenizer = tokenizer_with(*TURNS[family], *THINK)
    records = [
        conversation("<think>well</think>the fox", "the dog"),
        conversation("a fox", "jumps <think>over</think>"),
    ]
    assert ends_of(tmp_path, records * 3, tokenizer, FormatSettings("chat", chat_template=str(template))) == [
        TURNS[family][2]
    ]


def test_a_second_way_to_end_counts_and_a_cut_text_does_not(tmp_path: Path) -> None:
    """Tokens as another program made them: most answers end a turn, some call a tool, one was cut at a special token."""
    tokenizer = tokenizer_with("<|eot|>", "<|eom|>", "<|call|>")
    eot, eom, call = tokenizer.convert_tokens_to_ids(["<|eot|>", "<|eom|>", "<|call|>"])
    prompt = [10, 11]
    answers = [[20, 21, eot]] * 180 + [[call, 22, eom]] * 20 + [[20, call]] + [[20, 23]] * 9
    records = [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for answer in answers]
    assert ends_of(tmp_path, records, tokenizer, FormatSettings("tokens")) == ["<|eot|>", "<|eom|>"]


@pytest.mark.parametrize(
    "form, record",
    [
        ("text", {"text": "the fox<|im_end|> jumps"}),
        ("completion", {"prompt": "say", "completion": "<think>well</think>"}),
        ("alpaca", {"instruction": "say", "output": "the fox"}),
    ],
)
def test_without_a_template_a_text_ends_with_eos(form: str, record: dict[str, str], tmp_path: Path) -> None:
    tokenizer = tokenizer_with("<|im_end|>", *THINK)
    assert ends_of(tmp_path, [record] * 3, tokenizer, FormatSettings(form)) == ["</s>"]
    use_eos(tokenizer, "<|im_end|>")
    assert ends_of(tmp_path, [record] * 3, tokenizer, FormatSettings(form)) == ["<|im_end|>"]


def test_an_eos_token_that_the_vocabulary_lacks_is_refused() -> None:
    with pytest.raises(InputError, match=r"--eos_token <\|end\|>: .* has no such token"):
        use_eos(tokenizer_with(), "<|end|>")
