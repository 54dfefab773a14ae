"""What the tests of the index share: contents of every kind, and a slow plain way to find the same entries."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard
from hypothesis import strategies as st

from ds_recipes.data.index.cache import Index, open_index

BOM = b"\xef\xbb\xbf"
Entries = list[tuple[int, int, int]]
"""(start, end, line) of every entry."""

LINES = st.sampled_from(
    [b"", b"  ", b"\t", b'{"a": 1}', '{"text": "日本語🎌"}'.encode(), b"[1]", b"x", b"\r", b"\x00\xff"]
)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Lines of every kind and length, with either ending, with or without a BOM and a last newline; not blank."""
    words = draw(st.lists(st.tuples(LINES | st.binary(max_size=30), st.sampled_from([b"\n", b"\r\n"])), max_size=30))
    content = b"".join(line + ending for line, ending in words)
    first = draw(st.sampled_from([b"", BOM])) + draw(st.sampled_from([b"", b"\n", b" \r\n"])) + b"{"
    content = first + content
    return content.removesuffix(b"\n") if draw(st.booleans()) else content


def lines_of(content: bytes) -> Entries:
    """The lines of a content, found by splitting it."""
    start = len(BOM) if content.startswith(BOM) else 0
    lines = content[start:].split(b"\n")
    entries = []
    for number, line in enumerate(lines, 1):
        end = start + len(line) + (number < len(lines))
        if end > start:
            entries.append((start, end, number))
        start = end
    return entries


def entries_of(index: Index) -> Entries:
    lines = range(1, len(index.starts) + 1) if index.lines is None else index.lines.tolist()
    return list(zip(index.starts.tolist(), index.ends.tolist(), lines, strict=True))


def write(path: Path, content: bytes | list[Any]) -> Path:
    """Write bytes, or records as JSONL."""
    if isinstance(content, list):
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_cache(path: Path) -> Path:
    """The folder .index_cache beside a file."""
    cache = path.parent / ".index_cache"
    cache.mkdir(exist_ok=True)
    return cache


def open_beside(path: Path) -> Index:
    return open_index(path, make_cache(path))


def was_read(path: Path) -> bool:
    """Open the index; True if the file had to be read for it."""
    calls = []
    open_index(path, make_cache(path), lambda done, total: calls.append(done))
    return bool(calls)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "gzip members": lambda content: b"".join(gzip.compress(part) for part in halves(content)) + gzip.compress(b""),
    "gzip padded": lambda content: gzip.compress(content) + bytes(16),
    "zstd": zstandard.compress,
    "zstd frames": lambda content: b"".join(zstandard.compress(part) for part in halves(content)),
    "zstd skippable": lambda content: SKIPPABLE + zstandard.compress(content) + SKIPPABLE,
}
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


def halves(content: bytes) -> tuple[bytes, bytes]:
    return content[: len(content) // 2], content[len(content) // 2 :]
