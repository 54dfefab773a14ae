"""Parameters that do not train, where every rank has them whole: each rank speaks for an even slice of them."""

from collections.abc import Iterator

import torch
from torch import nn

from ds_recipes.engine.base import Shard
from ds_recipes.ranges import RangeReader
from ds_recipes.world.group import World


class Frozen:
    """The parameters of a model that need no gradient. Rank r of W reads and yields the r-th of W slices of each."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._parameters = {name: p for name, p in model.named_parameters() if not p.requires_grad}

    def shards(self) -> Iterator[Shard]:
        """This rank's slices; no communication."""
        for name, parameter in self._parameters.items():
            start, own = self._own(parameter)
            yield Shard(name, tuple(parameter.shape), start, own.numel(), own.float(), None, None)

    def read(self, reader: RangeReader) -> None:
        """Fill this rank's slices."""
        for name, parameter in self._parameters.items():
            start, own = self._own(parameter)
            reader.read_into("fp32", name, start, own)

    def gather(self) -> None:
        """Fill the rest from the other ranks."""
        for parameter in self._parameters.values():
            _, own = self._own(parameter)
            if self._world.size > 1:
                parameter.data.view(-1).copy_(torch.cat(self._world.gather_tensor(own)))

    def _own(self, parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
        length = -(-parameter.numel() // self._world.size)
        start = min(self._world.rank * length, parameter.numel())
        return start, parameter.data.view(-1)[start : start + length]
