"""JSON Lines and JSON arrays, plain, gzip or zstd: the index says where each entry lies, and one entry is parsed at a time."""

from pathlib import Path
from typing import Any

from ds_recipes.data.index.cache import Progress, open_index
from ds_recipes.data.sources.content import open_content
from ds_recipes.data.sources.entries import ByteEntries, Layout
from ds_recipes.data.sources.json_text import parse_object


def open_json(path: Path, cache: Path, progress: Progress | None = None) -> ByteEntries:
    """Open a file of JSON records; no record is parsed yet.

    Raises:
        InputError: it is no text, holds no records, or is an array that is not JSON.
    """
    content = open_content(path)
    index = open_index(path, cache, progress)
    layout = Layout(index.starts, index.ends, index.lines)
    parse = _element if index.is_array else _line
    return ByteEntries(str(path), index.fingerprint, content, layout, parse, notes=index.notes)


def _line(entry: int, raw: bytes) -> dict[str, Any] | None:
    text = raw.strip()
    return parse_object(text, "line", "Fix or remove the line.") if text else None


def _element(entry: int, raw: bytes) -> dict[str, Any] | None:
    return parse_object(raw, "element", "Fix the array there.")
