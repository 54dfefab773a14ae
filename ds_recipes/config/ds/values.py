"""Values of a DeepSpeed JSON by kind.

Kinds: "bool"; "count" (a whole number, 5e8 too); "number"; "share" (0 to 1); "text"; "path"; "names" (a text or a list of
texts); "betas" (a pair); "object"; "any".
"""

import re
from collections.abc import Callable
from typing import Any

from ds_recipes.config.values import expand_path

TRUE_WORDS = ("true", "t", "yes", "y", "on", "1")  # pydantic's
FALSE_WORDS = ("false", "f", "no", "n", "off", "0")


def read_value(
    value: Any, kind: str, choices: tuple[str, ...] = (), least: float | None = 0, is_lax: bool = False
) -> Any:
    """The value in its own type. `is_lax`: as pydantic reads it, "5" for 5 and "true" for true.

    Raises:
        ValueError: what it should have been, to complete "must be ".
    """
    if kind == "text":
        if isinstance(value, str) and (not choices or value in choices):
            return value
        raise ValueError(", ".join(f'"{choice}"' for choice in choices) or "a text")
    if kind == "path":
        return _path(value)
    if kind in ("count", "number"):
        return _number(value, kind, least, is_lax)
    if kind == "share":
        share = _number(value, "number", 0, is_lax)
        if share <= 1:
            return share
        raise ValueError("a number from 0 to 1")
    return OTHERS[kind](value, is_lax)


def _path(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    try:
        return expand_path(value)
    except ValueError:
        raise ValueError("a path whose home folder and variables are there") from None


def _number(value: Any, kind: str, least: float | None, is_lax: bool) -> float:
    number = _from_text(value, kind) if is_lax and isinstance(value, str) else value
    is_count = kind == "count"
    if is_number(number) and (least is None or number >= least) and (not is_count or number == int(number)):
        return int(number) if is_count else number
    words = "a whole number" if is_count else "a number"
    is_below = least is not None and (is_count or is_number(number))
    raise ValueError(f"{words} of at least {least}" if is_below else words)


def _from_text(text: str, kind: str) -> Any:
    if re.fullmatch(r"\s*[+-]?\d+\s*", text, re.ASCII):
        return int(text)
    if kind == "number" and re.fullmatch(r"\s*[+-]?[\d.]+([eE][+-]?\d+)?\s*", text, re.ASCII):
        return float(text)
    return text


def is_number(value: Any) -> bool:
    """True for a finite number that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _bool(value: Any, is_lax: bool) -> bool:
    if isinstance(value, bool):
        return value
    if is_lax and str(value).lower() in TRUE_WORDS + FALSE_WORDS:
        return str(value).lower() in TRUE_WORDS
    raise ValueError("true or false")


def _names(value: Any, _: bool) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    raise ValueError("a list of names")


def _betas(value: Any, _: bool) -> list[float]:
    if isinstance(value, list) and len(value) == 2 and all(map(is_number, value)):
        return value
    raise ValueError("two numbers")


def _object(value: Any, _: bool) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError("an object")


OTHERS: dict[str, Callable[[Any, bool], Any]] = {
    "bool": _bool,
    "names": _names,
    "betas": _betas,
    "object": _object,
    "any": lambda value, _: value,
}
