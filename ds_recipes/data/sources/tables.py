"""Parquet files: row groups are decoded a batch at a time, and small ones are kept for reads at random."""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ds_recipes.data.index.cache import Progress, file_fingerprint
from ds_recipes.data.sources.arrow_rows import batch_rows, records_of
from ds_recipes.data.sources.content import CHANGED, file_state
from ds_recipes.data.sources.messages import first_line, named
from ds_recipes.data.sources.record import Bad, Record, even_cuts
from ds_recipes.errors import InputError, NoRecordsError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

MAGIC = b"PAR1"
GROUP_BYTES = 1 << 25
"""A row group up to this size is decoded as a whole when a part of it is asked for."""

KEPT_GROUPS = 4
KEPT_BYTES = 1 << 27
"""A group that turns out larger (values that repeat are stored once) is not kept."""

READ_BYTES = 1 << 20


class ParquetFile:
    """A `Source` over the rows of a Parquet file; several threads may read it at once."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, cache: Path, progress: Progress | None = None) -> None:
        """Read the footer.

        Raises:
            InputError: it is not a Parquet file, was cut short, holds no rows, or has two columns of one name.
        """
        self._path, self._state, self.name = path, file_state(path), str(path)
        self._metadata, names = self._read_footer()
        groups = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        self._group_bytes = [group.total_byte_size for group in groups]
        rows = [group.num_rows for group in groups]
        if min(rows, default=0) < 0 or sum(rows) == 0:
            raise NoRecordsError(f"{path}: holds no records. Name a file with rows.")
        self._first_rows = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])  # [row groups + 1]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise InputError(f"{path}: has several columns named {named(twice)}. Rename them.")
        self.random_access = max(self._group_bytes) <= GROUP_BYTES
        self.fingerprint = file_fingerprint(path, cache, progress)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def line(self, entry: int) -> int:
        return entry + 1

    def cuts(self, pieces: int) -> list[int]:
        """Even slices, moved to the border of a row group where one is near: a row group is decoded from its beginning."""
        cuts = even_cuts(len(self), pieces)
        reach = len(self) // (2 * (len(cuts) - 1))
        nearest = [int(self._first_rows[np.abs(self._first_rows - cut).argmin()]) for cut in cuts]
        return sorted({near if abs(near - cut) <= reach else cut for near, cut in zip(nearest, cuts, strict=True)})

    def read(self, start: int, stop: int) -> Iterator[Record | Bad]:
        group = int(np.searchsorted(self._first_rows, start, side="right")) - 1
        while start < stop:
            first, last = int(self._first_rows[group]), int(self._first_rows[group + 1])
            for entry, table in self._tables(group, start - first, min(stop, last) - first):
                yield from records_of(self.name, first + entry, table)
            start, group = max(start, min(stop, last)), group + 1

    def _tables(self, group: int, start: int, stop: int) -> Iterator[tuple[int, "pyarrow.Table"]]:
        """The rows `start` to `stop` of a row group in batches, each with its first row."""
        rows = int(self._first_rows[group + 1] - self._first_rows[group])
        num_bytes = self._group_bytes[group]
        step = batch_rows(rows, num_bytes)
        if num_bytes <= GROUP_BYTES and stop - start < rows:
            table = _decoded(self, group, step)
            if table is not None:
                yield from ((low, table.slice(low, min(step, stop - low))) for low in range(start, stop, step))
                return
        low = 0
        for table in self._batches(group, step):
            inside = table.slice(max(0, start - low), min(stop, low + len(table)) - max(start, low))
            if low < stop and low + len(table) > start:
                yield max(start, low), inside
            low += len(table)
            if low >= stop:
                return

    def _batches(self, group: int, step: int) -> Iterator["pyarrow.Table"]:
        """A row group's rows in batches; it must hold as many as the footer says."""
        import pyarrow

        rows, seen = int(self._first_rows[group + 1] - self._first_rows[group]), 0
        try:
            with self._opened() as file:
                for batch in file.iter_batches(batch_size=step, row_groups=[group], use_threads=False):
                    seen += len(batch)
                    yield pyarrow.Table.from_batches([batch])
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(group, first_line(error)) from error
        if seen != rows:
            raise self._damaged(group, f"{seen:,} rows for {rows:,}")

    def _damaged(self, group: int, problem: str) -> InputError:
        first, last = int(self._first_rows[group]) + 1, int(self._first_rows[group + 1])
        return InputError(
            f"{self._path}: row group {group} (rows {first:,} to {last:,}) cannot be read ({problem}). "
            "Get or write the file again."
        )

    def _read_footer(self) -> tuple["pyarrow.parquet.FileMetaData", list[str]]:
        """The footer, and the names of the columns."""
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self._path) as file:
                return file.metadata, list(file.schema_arrow.names)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(
                f"{self._path}: is not a whole Parquet file ({first_line(error)}). Get or write the file again."
            ) from error

    def _opened(self) -> "pyarrow.parquet.ParquetFile":
        """A reader of its own for each caller: one is not safe to share between threads."""
        from pyarrow import parquet

        if file_state(self._path) != self._state:
            raise InputError(f"{self._path}: {CHANGED}")
        return parquet.ParquetFile(self._path, metadata=self._metadata, buffer_size=READ_BYTES, pre_buffer=False)


@lru_cache(maxsize=KEPT_GROUPS)
def _decoded(file: ParquetFile, group: int, step: int) -> "pyarrow.Table | None":
    """A whole row group, kept for the next read; None if it is much larger than its footer says."""
    import pyarrow

    batches, num_bytes = [], 0
    for batch in file._batches(group, step):
        batches.append(batch)
        num_bytes += batch.nbytes
        if num_bytes > KEPT_BYTES:
            return None
    return pyarrow.concat_tables(batches).combine_chunks()
