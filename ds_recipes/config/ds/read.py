"""Read a DeepSpeed JSON as DeepSpeed does: JSON, or Hjson (comments, commas before a bracket), no key twice."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ds_recipes.config.ds.accelerate import MARKS, accelerate_refusal

HJSON_NOTE = "has comments or loose commas: DeepSpeed reads it (as Hjson), other tools may not"


def read_json(path: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Read a JSON object, strictly first and as Hjson if that fails. Second: notes for the user.

    Hjson reads `3x` as a text: types have to be checked by what uses the values.

    Raises:
        ValueError: with a message that names the file and, where known, the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path}:1: not JSON: the file is empty")
    refusal = accelerate_refusal(text) if any(mark in text for mark in MARKS) else None
    if refusal:
        raise ValueError(f"{path}: {refusal}")
    try:
        tree, notes = _parse(text)
    except _NotJsonError as error:
        raise ValueError(f"{path}{error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(tree, dict):
        return tree, notes
    raise ValueError(f"{path}: must hold an object, {{...}}")


class _NotJsonError(Exception):
    """Neither JSON nor Hjson; the message begins with the line."""


def _parse(text: str) -> tuple[Any, tuple[str, ...]]:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant), ()
    except json.JSONDecodeError as error:
        strict = error
    import hjson  # only for files that need it

    try:
        return hjson.loads(text, object_pairs_hook=_object), (HJSON_NOTE,)
    except hjson.HjsonDecodeError as error:
        where = error if _is_legal_in_hjson(text, strict) else strict
        raise _NotJsonError(f":{where.lineno}: not JSON: {where.msg} (column {where.colno})") from None
    except (IndexError, OverflowError):  # of its parser, on an unfinished text and on a number such as 1e999
        raise _NotJsonError(f":{strict.lineno}: not JSON: {strict.msg} (column {strict.colno})") from None


def _is_legal_in_hjson(text: str, error: json.JSONDecodeError) -> bool:
    """True if the strict parser stumbled over what Hjson allows, so that the mistake stands elsewhere."""
    rest = text[error.pos :].lstrip()
    return re.match(r"//|/\*|#", rest) is not None or re.match(r",?\s*[}\]]", rest) is not None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands twice in one object")
    return tree


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number that can be used")
