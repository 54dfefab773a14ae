"""Long work beside short talk: each rank works in a thread while its main thread keeps in touch with the others.

A collective that waits for the slowest rank would time out after half an hour, and nobody would hear of an error, or of a
wish to stop, before. Here no rank is in a collective for longer than it takes the others to come to it.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ds_recipes.world.group import World
from ds_recipes.world.hang.activity import here

LONGEST_PAUSE_SECONDS = 1.0

LAST_SECONDS = 2.0
"""How long work that has been told to give up may take to clear away what it has half done."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Word(Generic[R]):
    """What a rank tells the others: whether its work has ended, and how it goes."""

    ended: bool
    failed: bool
    report: R


def work_together(
    world: World,
    name: str,
    work: Callable[[], T],
    report: Callable[[], R],
    hear: Callable[[list[Word[R]]], None],
    give_up: Callable[[], None],
) -> T:
    """Run `work` on every rank until it has ended on all, and return this rank's result. Every rank must call it.

    About once a second `hear` gets every rank's `report`, by rank; the last time after all have ended. `give_up` must make
    `work` return soon; it is called if this rank is to leave.

    Raises:
        DsRecipesError: see `World.check`.
        StoppedEarly: on all ranks, as soon as one is asked to stop.
    """
    world.doing(name)
    outcome: list[T | _Raised] = []
    thread = threading.Thread(target=lambda: outcome.append(_attempt(work)), name=name, daemon=True)
    thread.start()
    pause = 0.005
    try:
        with here().beside(thread):  # what the thread does is progress, this talk is not
            while True:
                ended = not thread.is_alive()
                words = world.gather(Word(ended, ended and isinstance(outcome[0], _Raised), report()))
                world.leave_together(world.wish_to_stop())
                hear(words)
                if all(word.ended for word in words):
                    break
                thread.join(pause)
                pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
    except BaseException:
        give_up()
        thread.join(LAST_SECONDS)
        raise
    return world.check(name, lambda: _result(outcome[0]))


def nothing(*_: object) -> None:
    """No report, nothing to hear, or no way to give up: what is left half done is hidden."""


@dataclass(frozen=True)
class _Raised:
    error: BaseException


def _attempt(work: Callable[[], T]) -> T | _Raised:
    try:
        return work()
    except BaseException as error:
        return _Raised(error)


def _result(outcome: T | _Raised) -> T:
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome
