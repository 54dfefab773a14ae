"""Which ranks see the same cache folder: they share the work, and what one of them writes all can read."""

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.world.channel import wait_until
from ds_recipes.world.group import World

LOOK_SECONDS = 3.0
"""How long a rank looks for the others' marks: a shared file system may show them late."""


@dataclass(frozen=True)
class Peers:
    """The ranks that share this rank's folder, ascending, and this rank's place among them."""

    ranks: tuple[int, ...]
    index: int

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_leader(self) -> bool:
        """True on one rank of each group."""
        return self.index == 0


def find_peers(world: World, cache: Path) -> Peers:
    """Every rank leaves a mark in its folder; those who see each other's are peers. Every rank must call it."""
    if world.size == 1:
        return Peers((0,), 0)
    meeting = cache / f".meeting-{world.broadcast(uuid.uuid4().hex)}"
    world.check("the cache folder", lambda: _leave_mark(meeting, world.rank))
    lowest_seen = world.gather(_lowest_mark(meeting, world.rank, world.size))
    groups = _connected(lowest_seen)
    ranks = tuple(rank for rank, group in enumerate(groups) if group == groups[world.rank])
    peers = Peers(ranks, ranks.index(world.rank))
    if peers.is_leader:
        shutil.rmtree(meeting, ignore_errors=True)
    return peers


def _leave_mark(meeting: Path, rank: int) -> None:
    meeting.mkdir(exist_ok=True)
    (meeting / str(rank)).touch()


def _lowest_mark(meeting: Path, rank: int, size: int) -> int:
    """The lowest rank whose mark is seen, when all are or the time is over."""
    wait_until(lambda: len(_marks(meeting)) == size, LOOK_SECONDS)
    return min(_marks(meeting), default=rank)


def _marks(meeting: Path) -> list[int]:
    try:
        return [int(path.name) for path in meeting.iterdir()]
    except OSError:  # not seen yet
        return []


def _connected(lowest_seen: list[int]) -> list[int]:
    """A group's lowest rank for each rank. Who sees another shares its folder, even if only one of the two sees it yet."""
    groups = list(range(len(lowest_seen)))
    for rank, seen in enumerate(lowest_seen):
        joined, other = groups[rank], groups[seen]
        groups = [min(joined, other) if group in (joined, other) else group for group in groups]
    return groups
