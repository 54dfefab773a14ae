"""What a record means: which text is the prompt and which text the model learns to write."""

from collections.abc import Callable
from dataclasses import dataclass

from ds_recipes.data.records import Record
from ds_recipes.errors import InputError

# tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT: to the letter, the missing space after "Response:" included.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Sample:
    """A record as text: `response` and the end of text are targets, `prompt` is not.

    The two are tokenised apart, so training sees exactly the tokens that a prompt has at inference; tokenised together,
    a token could span the border, and the model would learn an answer to a prompt that it is never given.
    """

    prompt: str
    response: str


@dataclass(frozen=True)
class Format:
    """How records of a data set become samples. `splits_long`: a sample longer than a row goes on in the next ones;
    otherwise its end is cut off, because a response apart from its prompt teaches nothing.
    """

    name: str
    read: Callable[[Record], Sample]
    splits_long: bool


def read_text(record: Record) -> Sample:
    """{"text": ...}: all of it is learned.

    Raises:
        InputError: `text` is missing, not a string, or empty.
    """
    return Sample("", _learned(record, "text"))


def read_alpaca(record: Record) -> Sample:
    """{"instruction": ..., "input": ..., "output": ...}; `input` may be missing, null or empty.

    Raises:
        InputError: a field is missing or not a string, or there is nothing to learn because `output` is empty.
    """
    instruction = _string(record, "instruction")
    context = "" if record.value.get("input") is None else _string(record, "input")
    template = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
    return Sample(template.format(instruction=instruction, input=context), _learned(record, "output"))


FORMATS = {
    "text": Format("text", read_text, splits_long=True),
    "alpaca": Format("alpaca", read_alpaca, splits_long=False),
}
"""The values of `--dataset`."""


def _learned(record: Record, field: str) -> str:
    value = _string(record, field)
    if not value:
        raise InputError(
            f"{record.where}: '{field}' is empty, so the record has no target token. Fill it in or remove the record."
        )
    return value


def _string(record: Record, field: str) -> str:
    if field not in record.value:
        has = ", ".join(f"'{name}'" for name in record.value) or "no field at all"
        raise InputError(
            f"{record.where}: the record has no field '{field}' (it has {has}). Add it, or set --dataset to the format "
            "that the file has."
        )
    value = record.value[field]
    if not isinstance(value, str):
        raise InputError(f"{record.where}: '{field}' is {_kind(value)}, not a string. Fix or remove the record.")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{record.where}: '{field}' has half a UTF-16 pair at character {error.start + 1}, which is no text. "
                "Fix or remove the record."
            ) from error
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names[type(value)]
