"""One rank's file of a checkpoint: its ranges of every parameter, one tensor a range and kind, in safetensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ds_recipes.checkpoint.files import FileRecord, write_tensors
from ds_recipes.checkpoint.manifest import RANGES
from ds_recipes.engine.base import Engine, Shard
from ds_recipes.fsops.calls import Data
from ds_recipes.ranges import header_bytes, tensor_bytes
from ds_recipes.world.group import World

KINDS = ("fp32", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnRange:
    """Elements [start, start + length) of a parameter, as one rank writes them, with the kinds that it has of it."""

    file: str
    parameter: str
    shape: tuple[int, ...]
    start: int
    length: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """What one rank wrote: its files by name, and the ranges in them."""

    files: Mapping[str, FileRecord]
    ranges: tuple[OwnRange, ...] = ()


class Part(Protocol):
    """What one rank puts into a checkpoint. `num_bytes` is about what it will write; `layout` the manifest's word for it.

    Ranks wait for each other in `write` where it `communicates`.
    """

    layout: str
    communicates: bool

    @property
    def num_bytes(self) -> int: ...

    def write(self, partial: Path) -> Written:
        """Write this rank's files into a folder that exists.

        Raises:
            OSError: with the path.
        """
        ...


class Streamed:
    """This rank's ranges straight out of the engine, which must not train meanwhile. No second copy of the state."""

    layout = RANGES
    communicates = False

    def __init__(self, engine: Engine, ranges: tuple[OwnRange, ...]) -> None:
        self._engine = engine
        self._ranges = ranges

    @property
    def num_bytes(self) -> int:
        return file_bytes(self._ranges)

    def write(self, partial: Path) -> Written:
        return write_ranges(partial, self._ranges, self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Data]]:
        shards = (shard for shard in self._engine.shards() if shard.length)
        for one, shard in zip(self._ranges, shards, strict=True):
            for kind in one.kinds:
                for piece in tensor_bytes(getattr(shard, kind)):
                    yield kind, piece


def own_ranges(shards: Iterable[Shard], world: World, save_optimizer: bool) -> tuple[OwnRange, ...]:
    """The ranges that this rank writes, in the order of its file. A frozen parameter has no moments."""
    wanted: Sequence[str] = KINDS if save_optimizer else KINDS[:1]
    file = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
    return tuple(
        OwnRange(
            file,
            shard.name,
            shard.shape,
            shard.start,
            shard.length,
            tuple(kind for kind in wanted if getattr(shard, kind) is not None),
        )
        for shard in shards
        if shard.length
    )


def values_in(ranges: Iterable[OwnRange]) -> int:
    """Number of float32 values in a rank's file."""
    return sum(one.length * len(one.kinds) for one in ranges)


def file_bytes(ranges: tuple[OwnRange, ...]) -> int:
    """Size of a rank's file."""
    return values_in(ranges) * torch.float32.itemsize + len(head_of(ranges))


def head_of(ranges: Iterable[OwnRange]) -> bytes:
    """The header of a rank's file."""
    layout = {f"{kind}/{one.parameter}": (torch.float32, (one.length,)) for one in ranges for kind in one.kinds}
    return header_bytes(layout, {"format": "pt"})


def write_ranges(partial: Path, ranges: tuple[OwnRange, ...], tensors: Iterable[tuple[str, Data]]) -> Written:
    """Write a rank's file; `tensors` are the bytes of every range and kind in their order, each piece with its kind."""
    if not ranges:  # all parameters have fewer rows than there are ranks
        return Written({})
    file = ranges[0].file
    return Written({file: write_tensors(partial / file, head_of(ranges), tensors)}, ranges)
