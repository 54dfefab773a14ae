"""Trained parameters that a step gives no gradient: a step leaves their weights, moments and step counts alone.

So does torch.optim where a gradient is None. With many ranks it is decided anew in each step by all of them: a parameter is
used if any micro-step of any rank gives it a gradient, be it of zeros. Libraries fill in zeros for their collectives, and
an optimizer would decay the weights with them and let the moments fade.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ds_recipes.ranges import RangeReader
from ds_recipes.world.group import World


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of one step's gradients: names of trained parameters."""

    unused: frozenset[str]  # by every rank
    partly: tuple[str, ...]  # used by some ranks and not by others


class Usage:
    """Which trained parameters this rank's micro-steps have given a gradient, and how many steps each has missed.

    `missed` has the parameters whose own step count, Adam's for the bias correction, is behind the optimizer's, and by how
    much. It is equal on all ranks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """`names` are the trained parameters', in an order that is the same on all ranks."""
        self.missed: dict[str, int] = {}
        self._names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._used = bytearray(len(self._names))

    def mark(self, name: str) -> None:
        """A backward pass has given this parameter a gradient."""
        self._used[self._numbers[name]] = 1

    def agree(self, world: World) -> Agreed:
        """Hear what the other ranks used since the last time, and begin anew. Collective: one all-reduce on the host."""
        ranks = world.sum(list(self._used))
        self._used = bytearray(len(self._names))
        unused = frozenset(name for name, count in zip(self._names, ranks, strict=True) if not count)
        partly = tuple(name for name, count in zip(self._names, ranks, strict=True) if 0 < count < world.size)
        return Agreed(unused, partly)

    def stepped(self, unused: Collection[str]) -> None:
        """The optimizer has taken a step, without these."""
        for name in unused:
            self.missed[name] = self.missed.get(name, 0) + 1

    def load(self, reader: RangeReader) -> None:
        """Go on with the step counts of a checkpoint."""
        self.missed = {name: steps for name, steps in reader.missed_steps.items() if name in self._numbers and steps}
