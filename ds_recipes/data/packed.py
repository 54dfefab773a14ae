"""Packings kept beside the tokens that they lay out: made once, then opened at the same cost whatever their size.

    packing-5b1e0c9d8a7f6e54.../
        packing.json        what it was made from, the facts counted, and the length and digest of every array
        document.npy ...    the arrays of a `Packing`, opened as memory maps

The name is a hash of everything that decides what is in it. A folder that is not whole is made again.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from ds_recipes.data.array_files import INT64, ArrayFile, digest_of_json, facts_of_array, open_numbers
from ds_recipes.data.packing import PACKING_VERSION, Packing
from ds_recipes.data.published import publishing
from ds_recipes.errors import InputError

META = "packing.json"
ARRAYS = ("row_offsets", "document", "start", "length")
DIGEST_BYTES = 1 << 20
"""Of an array's head and of its tail: what is verified at each opening. Arrays up to twice that are verified whole."""

Packed = tuple[Packing, dict[str, int]]


def open_packing(folder: Path, key_parts: Mapping[str, Any], make: Callable[[], Packed]) -> Packed:
    """The packing of the documents in the store `folder`, with facts about it; `make` gives both if they are not kept yet.

    `key_parts` is everything besides the store that decides the result, as JSON takes it. Several jobs may call this at
    once: each gets the same, and some may have made it in vain.

    Raises:
        InputError: `folder` cannot be written.
    """
    identity = json.dumps([PACKING_VERSION, key_parts], sort_keys=True)
    target = folder / f"packing-{xxhash.xxh3_128_hexdigest(identity.encode())}"
    kept = _read(target)
    if kept is not None:
        return kept
    made = make()
    try:
        with publishing(target) as part:
            _write(part, key_parts, *made)
            if target.exists() and _read(target) is None:
                shutil.rmtree(target, ignore_errors=True)  # damaged: it would keep its name
    except OSError as error:
        raise InputError(
            f"{folder}: the packed rows cannot be written there ({error.strerror or error}). Make room, or name another "
            "folder with --data_cache."
        ) from error
    return _read(target) or made


def _write(folder: Path, key_parts: Mapping[str, Any], packing: Packing, facts: Mapping[str, int]) -> None:
    arrays = {}
    for name in ARRAYS:
        path = folder / f"{name}.npy"
        with ArrayFile(path, INT64) as file:
            file.append(getattr(packing, name))
        arrays[name] = facts_of_array(path, file.rows, DIGEST_BYTES)
    content = {"made_from": key_parts, "num_dropped": packing.num_dropped, "facts": facts, "arrays": arrays}
    text = json.dumps({"content": content, "digest": digest_of_json(content)}, indent=1)
    (folder / META).write_text(text, encoding="utf-8")


def _read(folder: Path) -> Packed | None:
    """What is kept in a folder; None if it is not there or not whole."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        content = meta["content"]
        if meta["digest"] != digest_of_json(content):
            return None
        arrays = {name: open_numbers(folder / f"{name}.npy", content["arrays"][name], DIGEST_BYTES) for name in ARRAYS}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return Packing(**arrays, num_dropped=content["num_dropped"]), content["facts"]
