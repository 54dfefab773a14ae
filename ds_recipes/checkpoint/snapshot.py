"""A copy of this rank's ranges in host memory, which is written while training changes the originals.

The memory is taken once and used by every save: it is exactly as large as the state, however often that is saved.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from ds_recipes.checkpoint.manifest import RANGES
from ds_recipes.checkpoint.rank_file import OwnRange, Written, file_bytes, values_in, write_ranges
from ds_recipes.engine.base import Engine
from ds_recipes.fsops.calls import Data
from ds_recipes.ranges import raw_bytes

CHUNK_VALUES = 16 << 20
"""Float32 values in a piece of the memory (64 MiB): torch rounds pinned memory up to a power of two, each piece by itself."""


class Snapshot:
    """This rank's ranges as they were at the last `take`."""

    layout = RANGES
    communicates = False

    def __init__(self, ranges: tuple[OwnRange, ...], pinned: bool) -> None:
        """Take the memory for these ranges, still empty. `pinned` lets a GPU copy into it without a detour."""
        self._ranges = ranges
        self._pinned = pinned
        total = values_in(ranges)
        self._chunks = [
            torch.empty(min(CHUNK_VALUES, total - first), dtype=torch.float32, pin_memory=pinned)
            for first in range(0, total, CHUNK_VALUES)
        ]
        for chunk in self._chunks:
            chunk.zero_()  # takes the pages now, not at the first save

    @property
    def num_bytes(self) -> int:
        return file_bytes(self._ranges)

    @torch.no_grad()
    def take(self, engine: Engine) -> None:
        """Copy the state as it is now. No communication; returns when the copy is complete."""
        position = 0
        shards = (shard for shard in engine.shards() if shard.length)
        for one, shard in zip(self._ranges, shards, strict=True):
            assert (one.parameter, one.start, one.length) == (shard.name, shard.start, shard.length)
            for kind in one.kinds:
                source: torch.Tensor = getattr(shard, kind)
                for first, piece in self._pieces(position, one.length):
                    piece.copy_(source[first : first + piece.numel()], non_blocking=self._pinned)
                position += one.length
        if self._pinned:
            torch.cuda.synchronize()

    def write(self, partial: Path) -> Written:
        return write_ranges(partial, self._ranges, self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Data]]:
        position = 0
        for one in self._ranges:
            for kind in one.kinds:
                for _, piece in self._pieces(position, one.length):
                    yield kind, raw_bytes(piece)
                position += one.length

    def _pieces(self, position: int, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The memory of values [position, position + length), each piece with its first value's number among them."""
        done = 0
        while done < length:
            number, offset = divmod(position + done, CHUNK_VALUES)
            chunk = self._chunks[number]
            count = min(length - done, chunk.numel() - offset)
            yield done, chunk[offset : offset + count]
            done += count
