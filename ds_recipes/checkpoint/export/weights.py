"""The safetensors files of an export, written while the parameters are read."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ds_recipes.checkpoint.export.ahead import RING, ahead
from ds_recipes.checkpoint.export.pieces import Piece, taken_apart
from ds_recipes.errors import CheckpointError
from ds_recipes.fsops.calls import Data
from ds_recipes.fsops.durable import write_file
from ds_recipes.ranges import COPY_BYTES, RangeReader, header_bytes, raw_bytes, tensor_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"


class WeightFiles:
    """Writes pieces in a dtype, or in their own. Memory is bounded by a few buffers of `COPY_BYTES`, by the saved buffers, and
    by the largest parameter that transformers must have whole to take it apart.
    """

    def __init__(self, reader: RangeReader, dtype: str, skeleton: PreTrainedModel | None = None) -> None:
        self._reader = reader
        self._dtype = DTYPES[dtype]
        self._skeleton = skeleton
        self._ring = itertools.cycle([torch.empty(COPY_BYTES, dtype=torch.uint8) for _ in range(RING)])
        self._buffers = reader.buffers

    def write_model(self, folder: Path, pieces: Sequence[Piece], max_shard_bytes: int) -> list[str]:
        """Write the shards, and their index if there are several; returns the files' names."""
        shards = _shards(pieces, self._num_bytes, max_shard_bytes)
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        names = ["model.safetensors"] if len(shards) == 1 else names
        for name, shard in zip(names, shards, strict=True):
            self.write(folder / name, shard)
        if len(shards) > 1:
            total = sum(map(self._num_bytes, pieces))
            where = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
            write_file(folder / INDEX, [index.encode()])
        return names

    def write(self, path: Path, pieces: Sequence[Piece]) -> None:
        """Write one file of these tensors."""
        layout = {piece.name: (self._dtype_of(piece), piece.shape) for piece in pieces}
        head = header_bytes(layout, {"format": "pt"})
        with closing(ahead(self._content(pieces))) as content:
            size = write_file(path, itertools.chain([head], content))
        due = len(head) + sum(map(self._num_bytes, pieces))
        if size != due:
            raise CheckpointError(f"{path.name}: {size:,} bytes were written where its header says {due:,}")

    def _dtype_of(self, piece: Piece) -> torch.dtype:
        return piece.dtype or self._dtype

    def _num_bytes(self, piece: Piece) -> int:
        return piece.numel * self._dtype_of(piece).itemsize

    def _content(self, pieces: Sequence[Piece]) -> Iterator[Data]:
        for source, group in itertools.groupby(pieces, key=lambda piece: piece.source):
            parts = list(group)
            dtype = self._dtype_of(parts[0])
            if source in self._buffers or any(piece.runs is None for piece in parts):
                yield from self._made(source, dtype, parts)
            else:
                for run in (run for piece in parts for run in piece.runs or ()):
                    yield from self._read(source, dtype, *run)

    def _read(self, source: str, dtype: torch.dtype, start: int, length: int) -> Iterator[memoryview]:
        """The elements [start, start + length) of a parameter, in buffers that are used again later."""
        step = COPY_BYTES // dtype.itemsize
        for first in range(0, length, step):
            buffer = next(self._ring).view(dtype)[: length - first]
            self._reader.read_into("fp32", source, start + first, buffer)
            yield raw_bytes(buffer)

    def _made(self, source: str, dtype: torch.dtype, pieces: Sequence[Piece]) -> Iterator[memoryview]:
        """Tensors that transformers makes out of one whole parameter or saved buffer."""
        assert self._skeleton is not None
        if source in self._buffers:
            whole = self._buffers[source].to(dtype)
        else:
            shape = self._reader.shape(source)
            flat = torch.empty(prod(shape), dtype=dtype)
            self._reader.read_into("fp32", source, 0, flat)
            whole = flat.reshape(shape)
        made = taken_apart(self._skeleton, {source: whole})
        for piece in pieces:
            yield from tensor_bytes(made[piece.name])


def _shards(pieces: Sequence[Piece], bytes_of: Callable[[Piece], int], max_bytes: int) -> list[list[Piece]]:
    """Split in order; the tensors of one parameter stay together, so that it is read once."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for _, pieces_of_one in itertools.groupby(pieces, key=lambda piece: piece.source):
        group = list(pieces_of_one)
        size = sum(map(bytes_of, group))
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    return shards
