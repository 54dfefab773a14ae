"""Fields of a record that must be there and be text, and what is said of those that are not."""

from collections.abc import Mapping
from typing import Any

from ds_recipes.data.sources.record import Record
from ds_recipes.errors import InputError

SHOWN_FIELDS = 10
SHOWN_CHARACTERS = 40
KINDS: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    tuple: "an array",
    dict: "an object",
}


def string(record: Record, field: str) -> str:
    """A field that must be a string; it may be empty.

    Raises:
        InputError: it is missing, not a string, or no text.
    """
    value = record.value
    if field not in value:
        raise InputError(
            f"{record.where}: the record has no field '{field}' ({has(value)}). Add it, or set --dataset to the format "
            "that the file has."
        )
    return check_string(value[field], f"'{field}'", record.where)


def learned(record: Record, field: str) -> str:
    """A field that must be a string with something to learn.

    Raises:
        InputError: see `string`, or it is empty.
    """
    value = string(record, field)
    if not value:
        raise InputError(
            f"{record.where}: '{field}' is empty, so the record has no target token. Fill it in or remove the record."
        )
    return value


def check_string(value: object, name: str, where: str) -> str:
    """The value, if it is a string that is text; `name` begins a sentence about it.

    Raises:
        InputError: it is not a string, or holds half of a UTF-16 pair, which JSON allows and UTF-8 does not.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is {kind(value)}, not a string. Fix or remove the record.")
    if not is_text(value):
        half = next(i for i, character in enumerate(value, 1) if "\ud800" <= character <= "\udfff")
        raise InputError(
            f"{where}: {name} has half a UTF-16 pair at character {half:,}, which is no text. Fix or remove the record."
        )
    return value


def is_text(value: str) -> bool:
    """False if a string holds half of a UTF-16 pair."""
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def has(value: Mapping[Any, Any]) -> str:
    """The fields of an object as a clause: it has 'a', 'b'."""
    names = [f"'{str(name)[:SHOWN_CHARACTERS]}'" for name, _ in zip(value, range(SHOWN_FIELDS), strict=False)]
    more = f" and {len(value) - len(names):,} more" if len(value) > len(names) else ""
    return f"it has {', '.join(names)}{more}" if names else "it has no field at all"


def kind(value: object) -> str:
    """What JSON, or Python where JSON has no word for it, calls a value."""
    return KINDS.get(type(value)) or f"a Python object of the type {type(value).__name__}"
