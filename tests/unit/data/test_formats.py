"""Formats give the exact prompts and refuse records that have nothing to learn."""

from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.formats import FORMATS
from ds_recipes.data.records import Record
from ds_recipes.errors import InputError

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


def record(value: dict[str, Any]) -> Record:
    return Record(Path("data/train.jsonl"), 7, value)


@pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input(context: dict[str, Any]) -> None:
    sample = FORMATS["alpaca"].read(record(ALPACA | context))
    assert (sample.prompt, sample.response) == (PROMPT, "42")


def test_alpaca_with_input_takes_braces_as_text() -> None:
    sample = FORMATS["alpaca"].read(record(ALPACA | {"input": "41 {x}"}))
    assert (sample.prompt, sample.response) == (PROMPT_WITH_INPUT, "42")


def test_text_is_all_response() -> None:
    sample = FORMATS["text"].read(record({"text": " a\n", "meta": 3}))
    assert (sample.prompt, sample.response) == ("", " a\n")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text", {"content": "a", "id": 1}, "the record has no field 'text' (it has 'content', 'id'). Add it, or set "
         "--dataset to the format that the file has."),
        ("text", {}, "the record has no field 'text' (it has no field at all). Add it, or set --dataset to the format "
         "that the file has."),
        ("text", {"text": 3}, "'text' is a number, not a string. Fix or remove the record."),
        ("text", {"text": None}, "'text' is null, not a string. Fix or remove the record."),
        ("text", {"text": ""}, "'text' is empty, so the record has no target token. Fill it in or remove the record."),
        ("text", {"text": "a\ud83d"}, "'text' has half a UTF-16 pair at character 2, which is no text. Fix or remove "
         "the record."),
        ("alpaca", {"output": "a"}, "the record has no field 'instruction' (it has 'output'). Add it, or set --dataset "
         "to the format that the file has."),
        ("alpaca", ALPACA | {"input": []}, "'input' is an array, not a string. Fix or remove the record."),
        ("alpaca", ALPACA | {"output": ""}, "'output' is empty, so the record has no target token. Fill it in or "
         "remove the record."),
    ],
)  # fmt: skip
def test_refuses_with_file_and_line(name: str, value: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        FORMATS[name].read(record(value))
    assert str(caught.value) == f"data/train.jsonl:7: {message}"
