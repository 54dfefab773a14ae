"""What `step.py` asks of a rank's part of the model and the optimizer, whichever the stage.

Stage 3 is `local_state.py`, stages 1 and 2 are `low_stages.py`.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from ds_recipes.engine.base import Shard
from ds_recipes.engine.replicas import Replica
from ds_recipes.engine.zero3.unused import Part
from ds_recipes.ranges import RangeReader


class State(Protocol):
    """One rank's ranges: every parameter once, frozen ones too, in an order that is the same on all ranks.

    A parameter's ranges of all ranks, laid end to end in the order of the ranks, are the whole parameter.
    """

    def shards(self) -> Iterator[Shard]:
        """The ranges, as views where their dtype is float32. No communication."""
        ...

    def replicated(self) -> list[Replica]:
        """What other ranks hold too, between a step's last backward and its update. No communication."""
        ...

    def load(self, reader: RangeReader) -> None:
        """Fill every range from `reader`, then what the next forward reads. Every rank must call it."""
        ...

    def parts(self) -> dict[torch.Tensor, list[Part]]:
        """Which parameters lie in each flat tensor that the optimizer steps, in the order in which they lie there."""
        ...
