"""One JSON object in bytes, or what is wrong with them."""

import json
from typing import Any

import numpy as np

from ds_recipes.data.sources.messages import NotARecord, not_utf8, quoted

MAX_DEPTH = 256
"""Levels of arrays and objects. Python's own limit depends on who calls, so the same line could pass in one process only."""

DEPTH_BYTES = 1 << 20
"""Looked at at once: what numpy makes of them takes several times as much."""

CONTEXT_CHARACTERS = 20
END_CHARACTERS = 40
SHAPE = 'A record looks like {"text": "..."}; fix or remove it.'


def parse_object(raw: bytes, unit: str, fix: str) -> dict[str, Any]:
    """The object that an entry holds. `unit` is what the entry is ("line"), `fix` what to do where it is not JSON.

    Raises:
        NotARecord: it is not UTF-8, not JSON, nested too deeply or not an object.
    """
    value = parse_value(raw, unit, fix)
    if not isinstance(value, dict):
        raise NotARecord(f"not a JSON object but {_kind(value)}.", SHAPE)
    return value


def parse_value(raw: bytes, unit: str, fix: str) -> Any:
    """Any JSON value; see `parse_object`."""
    counts = unit == "line"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, unit, counts) from error
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(raw) > MAX_DEPTH:
        raise NotARecord("not JSON (nested too deeply).", fix, counts=counts)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise NotARecord(f"not JSON ({_what(error, text, unit)}).", fix, error.lineno - 1, counts) from error
    except RecursionError as error:
        raise NotARecord("not JSON (nested too deeply).", fix, counts=counts) from error
    except ValueError as error:  # Python's limit, against numbers that take hours to read
        raise NotARecord("not JSON (a number of thousands of digits).", fix, counts=counts) from error


def _depth(raw: bytes) -> int:
    """How deep the brackets outside of strings are nested. Right for JSON; for anything else any number will do."""
    deepest = level = start = 0
    in_string = False
    while start < len(raw):
        stop = start + DEPTH_BYTES
        while raw[stop - 1 : stop] == b"\\":  # an escape stays whole
            stop += 1
        unescaped = raw[start:stop].replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        characters = np.frombuffer(unescaped, np.uint8)  # [bytes of the piece]
        opens = (characters == ord("[")) | (characters == ord("{"))
        closes = (characters == ord("]")) | (characters == ord("}"))
        inside = np.logical_xor.accumulate(characters == ord('"')) ^ in_string
        brackets = np.flatnonzero((opens | closes) & ~inside)
        levels = level + np.cumsum(np.where(opens[brackets], 1, -1), dtype=np.int64)  # [brackets]
        deepest = max(deepest, int(levels.max(initial=0)))
        level, in_string, start = int(levels[-1]) if len(levels) else level, bool(inside[-1]), stop
    return deepest


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", type(None): "null", bool: "true or false"}.get(type(value), "a number")


def _what(error: json.JSONDecodeError, text: str, unit: str) -> str:
    if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
        shown = quoted(text, keep_end=True, most=END_CHARACTERS)
        return f"{unit} ends after {len(text):,} character{'s' * (len(text) != 1)}: {shown}"
    shown = text[max(0, error.pos - CONTEXT_CHARACTERS) : error.pos + CONTEXT_CHARACTERS]
    return f"{error.msg.removesuffix(' at')} at character {error.colno:,}: {quoted(shown)}"
