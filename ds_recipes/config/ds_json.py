"""Read a DeepSpeed JSON strictly: what Python's own parser forgives would be a silent mistake in a run."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


def read_json(path: str) -> Mapping[str, Any]:
    """Read a JSON object: no comments, no second key of the same name, no NaN.

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
    try:
        tree = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {_explain(text, error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(tree, dict):
        return tree
    raise ValueError(f"{path}: must hold an object, {{...}}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands twice in one object")
    return tree


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number that can be used")


def _explain(text: str, error: json.JSONDecodeError) -> str:
    """The parser's message, or the likely slip where it shows."""
    if not text.strip():
        return "the file is empty"
    if re.match(r"//|/\*|#", text[error.pos :].lstrip()):
        return "JSON has no comments; remove this one"
    if re.match(r",?\s*[}\]]", text[error.pos :]) and text[: error.pos + 1].rstrip("}] \t\r\n").endswith(","):
        return "a comma stands before the closing bracket; remove it"
    return f"{error.msg} (column {error.colno})"
