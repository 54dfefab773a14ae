"""Reading one record in the tests of formats."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ds_recipes.data.formats.choose import make_format
from ds_recipes.data.formats.sample import FormatSettings, Sample
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError


def record(value: dict[str, Any]) -> Record:
    return Record("data/train.jsonl", 7, 6, value)


def read(
    value: dict[str, Any], dataset: str, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
) -> Sample | None:
    return make_format(FormatSettings(dataset, **settings), tokenizer).read(record(value))


def refusal(
    value: dict[str, Any], dataset: str, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
) -> str:
    """What is said of a record that is refused, without its place, which must be there."""
    with pytest.raises(InputError) as caught:
        read(value, dataset, tokenizer, **settings)
    message = str(caught.value)
    assert message.startswith("data/train.jsonl:7: ")
    return message.removeprefix("data/train.jsonl:7: ")


def refused_format(dataset: str, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any) -> str:
    """What is said when the format itself cannot be made."""
    with pytest.raises(InputError) as caught:
        make_format(FormatSettings(dataset, **settings), tokenizer)
    return str(caught.value)


def fingerprint(dataset: str, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any) -> str:
    found = make_format(FormatSettings(dataset, **settings), tokenizer).fingerprint
    assert len(found) == 32
    assert int(found, 16) >= 0
    return found


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)
