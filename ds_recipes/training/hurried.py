"""What reading the weights means to others: it is progress, and it breaks off when somebody wants to stop."""

from collections.abc import Callable

import torch

from ds_recipes.ranges import RangeReader, ReaderOver
from ds_recipes.world.hang.activity import progress


class Counted(ReaderOver):
    """A range reader each of whose reads counts as progress of the rank."""

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        self._reader.read_into(kind, name, start, out)
        progress()


class Hurried(Counted):
    """A range reader that reads no more once somebody wants to stop: what is not read is zeros.

    Every rank so comes to the next agreement soon, through the same collectives. It must be one that makes them leave.
    """

    def __init__(self, reader: RangeReader, asked: Callable[[], str | None]) -> None:
        super().__init__(reader)
        self._asked = asked

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        if self._asked() is None:
            super().read_into(kind, name, start, out)
        else:
            out.zero_()
