"""Every record of docs/formats.md becomes the text and the mask that the page shows."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.encode import Encoder
from ds_recipes.data.formats.choose import make_format
from ds_recipes.data.formats.sample import FormatSettings
from ds_recipes.data.sources.record import Record
from tests.house.tree import ROOT
from tests.unit.data.formats.families import make_chat_tokenizer

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(?P<language>\w+)(?: (?P<file>\S+))?\n(?P<content>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """A record of the page with the flags before it and the text behind it."""

    flags: str
    record: str
    text: str


def shown() -> tuple[list[Shown], dict[str, str]]:
    """The records of the page, and the files that it names."""
    found: list[Shown] = []
    files: dict[str, str] = {}
    flags, records = "", ""
    for block in BLOCK.finditer(PAGE):
        language, file, content = block["language"], block["file"], block["content"]
        if file:
            files[file] = content
        elif language == "sh":
            flags = content.strip()
        elif language == "json":
            records = content
        else:
            assert language == "text", block.group()
            found += [Shown(flags, record, content.removesuffix("\n")) for record in records.splitlines()]
    return found, files


RECORDS, FILES = shown()


def settings_of(flags: str, folder: Path) -> FormatSettings:
    values: dict[str, Any] = {}
    for flag in flags.removeprefix("--").split(" --"):
        name, *words = flag.split()
        values[name] = tuple(words) if name == "text_fields" else words[0]
    for name in ("dataset", "prompt_template", "chat_template"):
        if str(values.get(name)).partition(":")[0] in FILES:
            values[name] = f"{folder}/{values[name]}"
    return FormatSettings(**values)


@pytest.mark.parametrize("example", RECORDS, ids=lambda example: example.flags + example.record[:30])
def test_record_becomes_the_text_and_the_mask_that_are_shown(example: Shown, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    tokenizer = make_chat_tokenizer(("<s>", "</s>", "<|im_start|>", "<|im_end|>"), "</s>", None, adds_bos=True)
    chosen = make_format(settings_of(example.flags, tmp_path), tokenizer)
    record = Record("a.jsonl", 1, 0, json.loads(example.record))
    sample = chosen.read(record)
    assert sample is not None
    encoded = Encoder.of(tokenizer, len(tokenizer)).encode([record], [sample])
    ids, text, end = encoded.ids.tolist(), "", 0
    write = (lambda ids: " ".join(map(str, ids))) if chosen.name == "tokens" else tokenizer.decode
    for start, stop in encoded.spans.tolist():
        space = " " if chosen.name == "tokens" and start else ""
        text += f"{write(ids[end:start])}{space}⟦{write(ids[start:stop])}⟧"
        end = stop
    assert text + write(ids[end:]) == example.text


def test_the_page_shows_every_format_and_the_whole_example() -> None:
    assert len(RECORDS) >= 14
    datasets = {example.flags.split()[1] for example in RECORDS}
    assert datasets == {"text", "alpaca", "completion", "tokens", "chat", "own_format.py:read_record"}
    assert FILES["own_format.py"] == (ROOT / "examples" / "own_format.py").read_text(encoding="utf-8")
