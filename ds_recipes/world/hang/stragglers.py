"""Which rank is slow, and in what. Ranks go in step, so the slow one is the one that waits least for the others.

Each rank counts twenty times a second whether its main thread waits in a collective or works, and in which part
(`frames.py`). In the same span the others of a straggler wait for it, so the shares can be compared as they are.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ds_recipes.world.hang.frames import WAIT

WINDOW_SAMPLES = 200
"""Samples of each rank in a window, so a share is known to some percent: ten seconds at twenty a second."""

WINDOWS = 3
"""So many windows in a row must name the same rank."""

LEAST_EXCESS, LEAST_RATIO = 0.25, 1.5
"""A straggler works so much more of the time than the median of the others: by this share, and by this factor."""


@dataclass(frozen=True)
class Straggler:
    """A slow rank: the shares of the time that it and the others (their median) work, and the part that differs most."""

    rank: int
    part: str
    share: float
    others_share: float


class StragglerWatch:
    """Sees counts that only grow, and names each straggler once."""

    def __init__(self) -> None:
        self._base: list[Counter[str]] = []
        self._suspect: int | None = None
        self._in_a_row = 0
        self._named: set[int] = set()

    def look(self, counts: Sequence[Mapping[str, int]]) -> Straggler | None:
        """Take every rank's samples so far, by part."""
        now = [Counter(one) for one in counts]
        if len(self._base) != len(now):
            self._base = now
        spans = [after - before for after, before in zip(now, self._base, strict=True)]
        if len(spans) < 2 or min(span.total() for span in spans) < WINDOW_SAMPLES:
            return None
        self._base = now
        found = slowest(spans)
        rank = None if found is None else found.rank
        self._in_a_row = self._in_a_row + 1 if rank is not None and rank == self._suspect else int(rank is not None)
        self._suspect = rank
        if found is None or self._in_a_row < WINDOWS or found.rank in self._named:
            return None
        self._named.add(found.rank)
        return found


def slowest(spans: Sequence[Mapping[str, int]]) -> Straggler | None:
    """The rank that stands clearly above the others in what it works, if there is one."""
    works = [1 - _share(span, WAIT) for span in spans]
    rank = max(range(len(spans)), key=works.__getitem__)
    others = [other for other in range(len(spans)) if other != rank]
    usual = median(works[other] for other in others)
    if works[rank] < usual + LEAST_EXCESS or works[rank] < LEAST_RATIO * usual:
        return None
    parts = {part for span in spans for part in span} - {WAIT}
    excess = {part: _share(spans[rank], part) - median(_share(spans[one], part) for one in others) for part in parts}
    return Straggler(rank, max(sorted(excess), key=excess.__getitem__), works[rank], usual)


def _share(span: Mapping[str, int], part: str) -> float:
    return span.get(part, 0) / max(sum(span.values()), 1)
