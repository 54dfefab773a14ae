"""Arrays in .npy files: written piece by piece in bounded memory, read as memory maps, and told from damaged ones."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from ds_recipes.config.parsing import PARSING
from ds_recipes.data.mapped import watch

INT64 = np.dtype("<i8")

Array = np.ndarray[Any, np.dtype[Any]]


class ArrayFile:
    """A .npy file that grows by rows. Its header is written again, in the same place, when it is closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row: tuple[int, ...] = ()) -> None:
        """`row` is the shape of one row."""
        self.rows = 0
        self._dtype = dtype
        self._row = row
        self._file = path.open("wb")
        self._write_header()

    def append(self, rows: Array) -> None:
        """Add rows; they are cast to the file's type."""
        block = np.ascontiguousarray(rows, self._dtype)
        assert block.shape[1:] == self._row
        self._file.write(block.data)
        self.rows += len(block)

    def close(self) -> None:
        """Say in the header how many rows there are. Nothing is done to a closed file."""
        if self._file.closed:
            return
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        self._file.write(_header(self._dtype, (self.rows, *self._row)))

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()


def array_bytes(dtype: np.dtype[Any], row: tuple[int, ...], rows: int) -> int:
    """The size of a .npy file of so many rows."""
    return len(_header(dtype, (rows, *row))) + rows * math.prod(row) * dtype.itemsize


def map_array(path: Path) -> Array:
    """The array of a .npy file, read from disk where it is looked at."""
    with PARSING:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    watch(mapped.base, path)
    plain: Array = mapped.view(np.ndarray)  # over the map: quicker to slice
    return plain


def facts_of_array(path: Path, rows: int, ends_bytes: int) -> dict[str, Any]:
    """What tells later that an array of numbers is as it was written; see `open_numbers`."""
    return {"length": rows, "digest": _digest_of_ends(path, ends_bytes)}


def open_numbers(path: Path, facts: Mapping[str, Any], ends_bytes: int, read_up_to: int = 0) -> Array:
    """An int64 array with one dimension that is as long as it was when it was written, with the same ends.

    A file of at most `read_up_to` bytes is read, a larger one is mapped.

    Raises:
        ValueError: it is not.
    """
    size = path.stat().st_size
    if size != array_bytes(INT64, (), facts["length"]) or _digest_of_ends(path, ends_bytes) != facts["digest"]:
        raise ValueError(f"{path} is not what was written")
    is_mapped = size > read_up_to
    with PARSING:
        array = np.load(path, mmap_mode="r" if is_mapped else None, allow_pickle=False)
    if is_mapped:
        watch(array.base, path)
    if array.dtype != np.int64 or array.shape != (facts["length"],):
        raise ValueError(f"{path} is not an array of so many numbers")
    return np.asarray(array)


def hash_ends(file: Any, size: int, ends_bytes: int) -> str:
    """xxh3-128 over the size and the first and last `ends_bytes` of an open file."""
    hasher = xxhash.xxh3_128(size.to_bytes(8, "little"))
    for start in (0, max(ends_bytes, size - ends_bytes)):
        file.seek(start)
        hasher.update(file.read(ends_bytes))
    return str(hasher.hexdigest())


def digest_of_json(content: Any) -> str:
    """xxh3-128 of what JSON can say, whatever the order of its keys."""
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def _digest_of_ends(path: Path, ends_bytes: int) -> str:
    with path.open("rb") as file:
        return hash_ends(file, path.stat().st_size, ends_bytes)


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """numpy pads it so that its length is the same for any number of rows."""
    header = io.BytesIO()
    content = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, content)
    return header.getvalue()
