"""Formats without a chat template give the exact texts and refuse records that have nothing to learn."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_recipes.data.formats.choose import make_format, needs_tokenizer
from ds_recipes.data.formats.sample import FormatSettings, Parts, Tokens
from tests.unit.data.formats.reading import fingerprint, read, refusal, refused_format, write

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd {{one}}.\n\n### Response:"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd {{one}}.\n\n"
    "### Input:\n41 {x}\n\n### Response:"
)
ALPACA = {"instruction": "Add {{one}}.", "output": "42"}


@pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input(context: dict[str, Any]) -> None:
    assert read(ALPACA | context, "alpaca") == Parts(((PROMPT, False), ("42", True)))


def test_alpaca_with_input_takes_braces_as_text() -> None:
    assert read(ALPACA | {"input": "41 {x}"}, "alpaca") == Parts(((PROMPT_WITH_INPUT, False), ("42", True)))


def test_text_is_all_learned() -> None:
    assert read({"text": " a\n", "meta": 3}, "text") == Parts(((" a\n", True),))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"title": "T", "body": "b\n"}, "T\n\nb\n"),
        ({"title": "", "body": "b"}, "b"),
        ({"title": None, "body": "b"}, "b"),
    ],
)
def test_several_fields_are_joined_with_a_blank_line(value: dict[str, Any], text: str) -> None:
    assert read(value, "text", text_fields=("title", "body")) == Parts(((text, True),))


def test_completion_may_have_an_empty_prompt() -> None:
    assert read({"prompt": "", "completion": "c"}, "completion") == Parts((("", False), ("c", True)))
    assert read({"prompt": "p ", "completion": " c"}, "completion") == Parts((("p ", False), (" c", True)))


@pytest.mark.parametrize(
    ("dataset", "value", "message"),
    [
        ("text", {"content": "a", "id": 1}, "the record has no field 'text' (it has 'content', 'id'). Add it, or set "
         "--dataset to the format that the file has."),
        ("text", {}, "the record has no field 'text' (it has no field at all). Add it, or set --dataset to the format "
         "that the file has."),
        ("text", {"text": 3}, "'text' is a number, not a string. Fix or remove the record."),
        ("text", {"text": None}, "'text' is null, not a string. Fix or remove the record."),
        ("text", {"text": b"a"}, "'text' is a Python object of the type bytes, not a string. Fix or remove the record."),
        ("text", {"text": ""}, "'text' is empty, so the record has no target token. Fill it in or remove the record."),
        ("text", {"text": "a\ud83d"}, "'text' has half a UTF-16 pair at character 2, which is no text. Fix or remove "
         "the record."),
        ("alpaca", {"output": "a"}, "the record has no field 'instruction' (it has 'output'). Add it, or set --dataset "
         "to the format that the file has."),
        ("alpaca", ALPACA | {"input": []}, "'input' is an array, not a string. Fix or remove the record."),
        ("alpaca", ALPACA | {"output": ""}, "'output' is empty, so the record has no target token. Fill it in or "
         "remove the record."),
        ("completion", {"prompt": "a", "completion": ""}, "'completion' is empty, so the record has no target token. "
         "Fill it in or remove the record."),
        ("completion", {"completion": "a"}, "the record has no field 'prompt' (it has 'completion'). Add it, or set "
         "--dataset to the format that the file has."),
        ("tokens", {"ids": [1]}, "the record has no field 'input_ids' (it has 'ids'). Add it, or set --dataset to the "
         "format that the file has."),
        ("tokens", {"input_ids": []}, "'input_ids' is empty, so the record has no target token. Remove the record."),
        ("tokens", {"input_ids": "1 2"}, "'input_ids' is a string, not an array of whole numbers. Fix or remove the "
         "record."),
        ("tokens", {"input_ids": [1, True]}, "'input_ids' has true or false at position 1 that is no whole number. Fix "
         "or remove the record."),
        ("tokens", {"input_ids": [1, 2.0]}, "'input_ids' has a number at position 1 that is no whole number. Fix or "
         "remove the record."),
        ("tokens", {"input_ids": [1, -1]}, "'input_ids' has -1 at position 1, which is no token id. Padding belongs "
         "into no record; remove it."),
        ("tokens", {"input_ids": [1, 2], "attention_mask": [1, 0]}, "'attention_mask' has zeros: the record is padded. "
         "Remove the padding; rows are padded, or packed, later."),
        ("tokens", {"input_ids": [1, 2], "labels": [2, -100]}, "'labels' has 2 at position 0, where 'input_ids' has 1. "
         "Labels must not be shifted: each equals its token, or is -100 where the token is not learned."),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 values for 2 token ids. Each token needs one; "
         "fix or remove the record."),
        ("tokens", {"input_ids": [1, 2], "target_mask": [0, 2]}, "'target_mask' holds other values than 0 and 1. Fix or "
         "remove the record."),
        ("tokens", {"input_ids": [1], "completion_mask": [1], "assistant_masks": [1]}, "the record has both "
         "'completion_mask' and 'assistant_masks'. Keep one of them."),
        ("tokens", {"input_ids": [1, 2], "loss_mask": [0, 0.5]}, "'loss_mask' has a number at position 1 that is no "
         "whole number. Fix or remove the record."),
        ("tokens", {"input_ids": [1], "target_mask": [1], "labels": [1]}, "the record has both 'labels' and "
         "'target_mask'. Keep one of them."),
    ],
)  # fmt: skip
def test_refuses_with_file_and_line(dataset: str, value: dict[str, Any], message: str) -> None:
    assert refusal(value, dataset) == message


def test_refuses_several_fields_that_are_all_empty() -> None:
    assert refusal({"title": "", "body": None}, "text", text_fields=("title", "body")) == (
        "'title' and 'body' are all empty, so the record has no target token. Fill one in or remove the record."
    )
    assert "no field 'body'" in refusal({"title": "a"}, "text", text_fields=("title", "body"))


def test_a_record_of_a_million_fields_is_refused_in_few_words() -> None:
    message = refusal({f"field {i}" * 20: 0 for i in range(1_000_000)}, "text")
    assert " and 999,990 more)" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("more", "mask"),
    [
        ({}, [True, True, True]),
        ({"labels": [-100, 6, 0]}, [False, True, True]),
        ({"target_mask": [0, 1, 0]}, [False, True, False]),
        ({"completion_mask": [0, 1, 0]}, [False, True, False]),
        ({"assistant_masks": [0, 1, 1], "labels": None}, [False, True, True]),
        ({"loss_mask": [False, True, False], "target_mask": None}, [False, True, False]),
        ({"target_mask": [False, True, 1], "attention_mask": [1, 1, 1], "labels": None}, [False, True, True]),
    ],
)
def test_tokens_are_taken_as_they_are(more: dict[str, Any], mask: list[bool]) -> None:
    assert read({"input_ids": [5, 6, 0]} | more, "tokens") == Tokens([5, 6, 0], mask)


TEMPLATE = {
    "description": "as alpaca-lora has them",
    "prompt_input": "{{ {instruction} }} [{input}] {topic of it}\n",
    "prompt_no_input": "{instruction}?",
    "response_split": "### Response:",
}


@pytest.mark.parametrize("name", ["t.json", "t.yaml"])
def test_a_prompt_template_of_ones_own(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, json.dumps(TEMPLATE))  # JSON is YAML too
    value = {"instruction": "a {input}", "input": "i", "topic of it": "t", "output": "o"}
    assert read(value, "alpaca", prompt_template=path) == Parts((("{ a {input} } [i] t\n", False), ("o", True)))
    assert read(value | {"input": ""}, "alpaca", prompt_template=path) == Parts((("a {input}?", False), ("o", True)))
    assert "no field 'topic of it'" in refusal(
        {"instruction": "a", "input": "i", "output": "o"}, "alpaca", prompt_template=path
    )


@given(st.lists(st.tuples(st.text(st.sampled_from("ab{}\n!:.[]")), st.sampled_from(["instruction", "input", "x y"]))))
def test_prompts_are_what_str_format_makes_of_them(pieces: list[tuple[str, str]]) -> None:
    from ds_recipes.data.formats.alpaca import _parse

    values = {"instruction": "{input}", "input": "", "x y": "{{"}
    prompt = "".join(text.replace("{", "{{").replace("}", "}}") + "{" + field + "}" for text, field in pieces)
    assert _parse(prompt, "a").fill(values.__getitem__) == string.Formatter().vformat(prompt, (), values)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{instruction.__class__}", "has the placeholder {instruction.__class__}. Only the plain name of a field is "),
        ("{instruction[0]}", "has the placeholder {instruction[0]}. Only the plain name of a field is "),
        ("{instruction!r}", "has the placeholder {instruction!r}. Only the plain name of a field is allowed, such as "),
        ("{instruction:>{input}}", "has the placeholder {instruction:>{input}}. Only the plain name of a field is "),
        (
            "{}",
            "has the placeholder {}. Only the plain name of a field is allowed, such as {instruction}; write {{ and }} ",
        ),
        ("{0}", "has the placeholder {0}. Only the plain name of a field is allowed, such as {instruction}; write {{ "),
        ("{output}", "has the placeholder {output}, but the output is what the model learns to write."),
        (
            "{instruction",
            "has a brace alone (expected '}' before end of string). Write {{ or }} for a brace that is text.",
        ),
        ("}", "has a brace alone (Single '}' encountered in format string). Write {{ or }} for a brace that is text."),
    ],
)
def test_a_prompt_template_takes_plain_placeholders_only(tmp_path: Path, prompt: str, message: str) -> None:
    path = write(tmp_path / "t.json", json.dumps(TEMPLATE | {"prompt_no_input": prompt}))
    assert refused_format("alpaca", prompt_template=path).startswith(f"{path}: 'prompt_no_input' {message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", "{", "the prompt template is not JSON (Expecting property name enclosed in double quotes"),
        ("t.json", "[" * 100_000, "the prompt template is not JSON (maximum recursion depth exceeded"),
        ("t.yaml", "a: [", "the prompt template is not YAML (while parsing a flow node)"),
        ("t.json", "[]", "the prompt template is an array, not an object with 'prompt_input' and 'prompt_no_input'."),
        ("t.json", '{"prompt_input": ""}', "'prompt_no_input' is missing; it must be the text of a prompt with "),
        ("t.json", '{"prompt_input": 1}', "'prompt_input' is a number; it must be the text of a prompt with "),
    ],
)
def test_refuses_a_prompt_template_that_is_none(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write(tmp_path / name, content)
    assert refused_format("alpaca", prompt_template=path).startswith(f"{path}: {message}")


def test_refuses_a_prompt_template_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b"\xff")
    for name, reason in (("t.json", "it is not UTF-8"), ("none.json", "No such file or directory")):
        assert refused_format("alpaca", prompt_template=str(tmp_path / name)) == (
            f"{tmp_path / name}: the prompt template cannot be read ({reason}). Check --prompt_template."
        )


def test_fingerprints_tell_formats_apart(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", json.dumps(TEMPLATE))
    other = write(tmp_path / "b.json", json.dumps(TEMPLATE | {"prompt_no_input": "{instruction}"}))
    same = write(tmp_path / "c.json", json.dumps(TEMPLATE))
    fingerprints = [
        fingerprint("text"),
        fingerprint("text", text_fields=("a", "b")),
        fingerprint("text", text_fields=("ab",)),
        fingerprint("alpaca"),
        fingerprint("alpaca", prompt_template=first),
        fingerprint("alpaca", prompt_template=other),
        fingerprint("completion"),
        fingerprint("tokens"),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprint("alpaca", prompt_template=first) == fingerprint("alpaca", prompt_template=same)


def test_only_chat_and_own_functions_need_a_tokenizer() -> None:
    names = ["text", "alpaca", "completion", "tokens", "chat", "a/b.py:f"]
    assert [needs_tokenizer(FormatSettings(name)) for name in names] == [False] * 4 + [True] * 2


def test_long_texts_and_tokens_go_on_in_the_next_row() -> None:
    names = ["text", "tokens", "alpaca", "completion"]
    assert [make_format(FormatSettings(name), None).splits_long for name in names] == [True, True, False, False]


def test_refuses_an_unknown_format() -> None:
    assert refused_format("txt") == (
        "dataset 'txt' is no format. It must be one of text, alpaca, chat, completion, tokens, or path/to/file.py:function."
    )
