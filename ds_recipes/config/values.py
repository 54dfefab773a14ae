"""Text to typed value and back, by the field's own type and limits.

Flags and YAML scalars both come through `parse`, so that `lr: 1e-4` is a number and `no` is false wherever it stands.
"""

import json
import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, get_args

from ds_recipes.config.setting import Limits

COMMAND_LINE = "command line"  # the origin of a flag's value
TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
NONE_WORDS = ("", "none", "null", "~")
LARGEST_INT = 2**63 - 1
WEIGHT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?:")
"""What may stand before a path of `train_data` or `validation_data`."""

VARIABLE = re.compile(r"\$(?:(?P<bare>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})")
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


def is_optional(item: Field[Any]) -> bool:
    """True if None is a value of this setting."""
    return type(None) in get_args(item.type)


def base_type(item: Field[Any]) -> type:
    """bool, int, float, str, or tuple for a list of strings."""
    if item.type == tuple[str, ...]:
        return tuple
    kind = next((arg for arg in get_args(item.type) if arg is not type(None)), item.type)
    assert isinstance(kind, type)
    return kind


def parse(item: Field[Any], text: str) -> Any:
    """Turn one text into a value of the setting `item`; for a list setting, into one of its elements.

    Raises:
        ValueError: the text is no such value; the message completes "NAME " (such as "must be above 0, not -1").
    """
    if is_optional(item) and text.strip().lower() in NONE_WORDS:
        return None
    if not text.strip():
        raise ValueError("is empty")
    kind = base_type(item)
    if kind is bool:
        return _parse_bool(text)
    if item.metadata["unit"] == "duration":
        return check_limits(item, parse_duration(text))
    if kind is int:
        return check_limits(item, _parse_int(text))
    if kind is float:
        return check_limits(item, _parse_float(text))
    return check_limits(item, expand_path(text) if item.metadata["is_path"] else text)


def expand_path(text: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` replaced as a shell does, after a weight such as `0.7:` too.

    A shell leaves them alone in quotes and after `--name=`, and a run file has no shell. A path that exists as it stands is kept.

    Raises:
        ValueError: a variable is not set, or a user has no home folder; the message completes "NAME ".
    """
    weight = WEIGHT.match(text)
    start = weight.end() if weight else 0
    if (text[start : start + 1] != "~" and not VARIABLE.search(text)) or Path(text).exists():
        return text
    path = VARIABLE.sub(lambda found: _variable(found["bare"] or found["braced"], text), text[start:])
    try:
        return text[:start] + (str(Path(path).expanduser()) if path.startswith("~") else path)
    except RuntimeError:
        raise ValueError(f"is {text}, and there is no home folder for {path.partition('/')[0]}") from None


def _variable(name: str, text: str) -> str:
    if name not in os.environ:
        raise ValueError(f"is {text}, and the environment has no variable {name}. Set it, or write the path out")
    return os.environ[name]


def path_argument(text: str) -> Path:
    """The path that a tool's option names, for argparse's `type`.

    Raises:
        ArgumentTypeError: as `expand_path`.
    """
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def check_limits(item: Field[Any], value: Any) -> Any:
    """Return the value if it keeps the setting's limits.

    Raises:
        ValueError: it does not; the message completes "NAME ".
    """
    limits: Limits = item.metadata["limits"]
    if limits.choices and value not in limits.choices:
        raise ValueError(f"must be {one_of(limits.choices)}, not {value!r}")
    broken = []
    if limits.least is not None and value < limits.least:
        broken.append(f"at least {limits.least:g}")
    if limits.above is not None and value <= limits.above:
        broken.append(f"above {limits.above:g}")
    if limits.below is not None and value >= limits.below:
        broken.append(f"below {limits.below:g}")
    if broken:
        raise ValueError(f"must be {' and '.join(broken)}, not {value}")
    return value


def to_text(item: Field[Any], value: Any) -> str:
    """The text that `parse` reads as `value`; for messages and printed files. A list is its elements with spaces."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return " ".join(value)
    if item.metadata["unit"] == "duration":
        return _duration_text(value)
    return str(value)


def describe(item: Field[Any], value: Any, origin: str) -> str:
    """'--lr is 0.1 (command line)' or 'lr is 0.1 (run.yaml:3)', for messages."""
    dashes = "--" if origin == COMMAND_LINE else ""
    return f"{dashes}{item.name} is {to_text(item, value)} ({origin})"


def one_of(choices: tuple[str, ...]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def _parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(f"must be true or false, not {text!r}")
    return word in TRUE_WORDS


def _parse_int(text: str) -> int:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        raise ValueError(f"must be a whole number, not {text!r}") from None
    if not number.is_finite() or abs(number) > LARGEST_INT or number != number.to_integral_value():
        raise ValueError(f"must be a whole number, not {text!r}")
    return int(number)


def _parse_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"must be a number, not {text!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, not {text!r}")
    return number


def parse_duration(text: str) -> int:
    """Seconds in a duration such as 11h40m, 90m or 45s.

    Raises:
        ValueError: it is none; the message completes "NAME ".
    """
    match = DURATION.fullmatch(text.strip())
    if match is None or not match.group():
        raise ValueError(f"must be a duration such as 11h40m, 90m or 45s, not {text!r}")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def _duration_text(total_seconds: int) -> str:
    hours, rest = divmod(total_seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return "".join(f"{number}{unit}" for number, unit in ((hours, "h"), (minutes, "m"), (seconds, "s")) if number)


def dotted_entries(
    tree: Mapping[str, Any], above: str = "", counts: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, str]]:
    """The entries of a tree by name, those of sections with dotted names after `above`; values as JSON.

    Entries and sections whose own name does not count are left out.
    """
    for name, value in tree.items():
        if not counts(name):
            continue
        if isinstance(value, Mapping):
            yield from dotted_entries(value, f"{above}{name}.", counts)
        else:
            yield f"{above}{name}", json.dumps(value, default=str)
