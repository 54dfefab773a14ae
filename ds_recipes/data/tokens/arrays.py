"""Arrays in .npy files: written piece by piece in bounded memory, and read as memory maps."""

import io
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ds_recipes.config.parsing import PARSING

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
        """Say in the header how many rows there are."""
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
        mapped: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)  # a plain array over the map: quicker to slice


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """numpy pads it so that its length is the same for any number of rows."""
    header = io.BytesIO()
    content = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, content)
    return header.getvalue()
