"""The `alpaca` format: an instruction, perhaps an input, and the output that is learned; the prompt can be one's own."""

import json
import string as python_string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_recipes.data.formats.fields import kind, learned, string
from ds_recipes.data.formats.identity import fingerprint_of
from ds_recipes.data.formats.remarks import unread
from ds_recipes.data.formats.sample import Parts
from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError

# tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT: to the letter, the missing space after "Response:" included.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
LEARNED = "output"


@dataclass(frozen=True)
class Prompt:
    """A prompt cut at its placeholders: each piece is a text and the field that stands behind it, None behind the last."""

    pieces: tuple[tuple[str, str | None], ...]

    def fill(self, value_of: Callable[[str], str]) -> str:
        return "".join(text + (value_of(field) if field is not None else "") for text, field in self.pieces)


class AlpacaFormat:
    """{"instruction": ..., "input": ..., "output": ...}; `input` may be missing, null or empty.

    `template` is a JSON or YAML file with `prompt_input` and `prompt_no_input`, as alpaca-lora has them.
    """

    name = "alpaca"
    splits_long = False
    joins_parts = True

    def __init__(self, template: Path | None) -> None:
        with_input, without_input = _read_template(template) if template else (WITH_INPUT, WITHOUT_INPUT)
        place = f"{template}: 'prompt_input'", f"{template}: 'prompt_no_input'"
        self._with_input = _parse(with_input, place[0])
        self._without_input = _parse(without_input, place[1])
        pieces = (*self._with_input.pieces, *self._without_input.pieces)
        self._read = {"input", LEARNED, *(field for _, field in pieces if field is not None)}
        self.fingerprint = fingerprint_of(self.name, with_input, without_input)

    def read(self, record: Record) -> Parts:
        context = "" if record.value.get("input") is None else string(record, "input")
        prompt = self._with_input if context else self._without_input
        text = prompt.fill(lambda field: context if field == "input" else string(record, field))
        return Parts(((text, False), (learned(record, LEARNED), True)), unread(record.value, self._read))


def _read_template(path: Path) -> tuple[str, str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: the prompt template cannot be read ({reason}). Check --prompt_template.") from error
    value = _load(path, content)
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: the prompt template is {kind(value)}, not an object with 'prompt_input' and 'prompt_no_input'."
        )
    prompts = value.get("prompt_input"), value.get("prompt_no_input")
    for name, prompt in zip(("prompt_input", "prompt_no_input"), prompts, strict=True):
        if not isinstance(prompt, str):
            found = kind(prompt) if name in value else "missing"
            raise InputError(f"{path}: '{name}' is {found}; it must be the text of a prompt with {{placeholders}}.")
    return str(prompts[0]), str(prompts[1])


def _load(path: Path, content: str) -> Any:
    import yaml  # JSON needs no start-up time for it

    try:
        return json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        language = "JSON" if path.suffix == ".json" else "YAML"
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: the prompt template is not {language} ({first_line}). Fix the file.") from error


def _parse(prompt: str, place: str) -> Prompt:
    try:
        parsed = list(python_string.Formatter().parse(prompt))
    except ValueError as error:
        raise InputError(
            f"{place} has a brace alone ({error}). Write {{{{ or }}}} for a brace that is text."
        ) from error
    for _, field, form, conversion in parsed:
        if field is None:
            continue
        if not field or field.isdecimal() or any(mark in field for mark in ".[]{}") or form or conversion:
            written = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise InputError(
                f"{place} has the placeholder {{{written}}}. Only the plain name of a field is allowed, such as "
                "{instruction}; write {{ and }} for braces that are text."
            )
        if field == LEARNED:
            raise InputError(
                f"{place} has the placeholder {{output}}, but the output is what the model learns to write."
            )
    return Prompt(tuple((text, field) for text, field, _, _ in parsed))
