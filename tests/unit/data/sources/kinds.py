"""The same records in files of every kind, for tests that hold whatever the kind."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ds_recipes.data.sources.open import open_source
from ds_recipes.data.sources.record import Bad, Record, Source

Row = dict[str, str]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        '"',
        '""',
        'a"b',
        '"a',
        ",",
        ',"',
        "\n",
        "\r\n",
        '"\n"',
        "日本語",
        "[",
        "]}",
        "\\",
        '\\"',
        "\u2028",
        "\x00",
        "\x0b",
    ]
)
rows = st.fixed_dictionaries({"text": texts, "second": texts})
"""A record that every kind can hold."""


def lines_of(values: Sequence[Row]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def array_of(values: Sequence[Row]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1).encode()


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.compress(data)


def write_csv(path: Path, values: Sequence[Row]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "second"])
    writer.writeheader()
    writer.writerows(values)
    path.write_bytes(text.getvalue().encode())


def write_parquet(path: Path, values: Sequence[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(values)), path, row_group_size=3)


def save_dataset(path: Path, values: Sequence[Row]) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(list(values)).save_to_disk(path, num_shards=min(2, len(values)))


KINDS: dict[str, Callable[[Path, Sequence[Row]], Any]] = {
    "data.jsonl": lambda path, values: path.write_bytes(lines_of(values)),
    "data.jsonl.gz": lambda path, values: path.write_bytes(gzip.compress(lines_of(values), mtime=0)),
    "data.jsonl.zst": lambda path, values: path.write_bytes(zstd(lines_of(values))),
    "data.json": lambda path, values: path.write_bytes(array_of(values)),
    "data.json.gz": lambda path, values: path.write_bytes(gzip.compress(array_of(values), mtime=0)),
    "data.csv": write_csv,
    "data.parquet": write_parquet,
    "saved": save_dataset,
}
"""A file's name, and what writes records into it."""


def opened(path: Path, content: bytes | None = None) -> Source:
    """Write the content if there is one, and open the file."""
    if content is not None:
        path.write_bytes(content)
    cache = path.parent / "cache"
    cache.mkdir(exist_ok=True)
    return open_source(path, cache)


def everything(source: Source) -> list[Record | Bad]:
    return list(source.read(0, len(source)))


def bad_messages(source: Source) -> list[str]:
    return [found.message for found in everything(source) if isinstance(found, Bad)]
