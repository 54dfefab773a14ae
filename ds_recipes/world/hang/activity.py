"""What a process is doing and whether it comes further, told in passing by the code that does it.

A process has one activity, and one more while a thread of its own writes a checkpoint beside training. Code deep below
calls `progress()` and need not know which one it belongs to: the thread tells.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ds_recipes.config.hang_settings import EVALUATE, SAVE, START, STEP, HangConfig
from ds_recipes.world.hang.frames import Where
from ds_recipes.world.hang.limits import Limits

LONGEST_TICK_SECONDS = 2.0
"""More than this between two ticks means that this process itself was stopped: that time is nobody's fault."""

FIRST_STEPS = 2
"""So many steps after a load make what later ones use (compiled kernels, DeepSpeed's order of parameters)."""


class Clock:
    """Seconds that this process has really run. They pass only while the monitor's thread ticks."""

    def __init__(self) -> None:
        self.now = 0.0

    def tick(self, seconds: float) -> None:
        """So much time has passed since the last tick."""
        self.now += min(seconds, LONGEST_TICK_SECONDS)


class Activity:
    """One line of work. All methods are cheap, and for the thread that does the work."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.phase = START
        self.doing = "the start"
        self.step = 0
        self.count = 0  # signs of progress so far
        self.collectives = 0
        self.collective = ""  # the last one
        self.waits_for: str | None = None
        """What it waits for, where that is known: it is then not the one that holds the run up."""
        self.when_changed: Callable[[], None] | None = None
        """Called when another phase begins."""
        self._worker: threading.Thread | None = None
        self._is_trusted = False
        self._limits = limits
        self._clock = clock
        self._last = self._since = clock.now
        self._steps_left = FIRST_STEPS

    def enter(self, doing: str, phase: str | None = None, step: int | None = None) -> None:
        """From now on it is `doing` this; without a `phase` it stays in the one that it is in."""
        self.progress()
        self.doing, self._since = doing, self._clock.now
        if step is not None:
            self.step = step
        if phase == STEP:
            self._steps_left = max(self._steps_left - 1, -1)
        elif phase is not None and phase not in (EVALUATE, SAVE):
            self._steps_left = FIRST_STEPS
        if phase is not None and phase != self.phase:
            self.phase = phase
            if self.when_changed is not None:
                self.when_changed()

    def progress(self) -> None:
        """It has come further."""
        now = self._clock.now
        self._limits.learn(self.phase, now - self._last)
        self._last = now
        self.count += 1

    @contextmanager
    def in_collective(self, name: str) -> Iterator[None]:
        """Around a collective of all ranks. That it has ended is progress, but not for a thread that works beside it."""
        self.collectives += 1
        self.collective = name
        if self._worker is not None:
            yield
            return
        with self.waiting(f"the other ranks, in {name}"):
            yield
        self.progress()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around a wait for something else that is watched itself."""
        before, self.waits_for = self.waits_for, what
        try:
            yield
        finally:
            self.waits_for = before

    @contextmanager
    def beside(self, worker: threading.Thread) -> Iterator[None]:
        """Around the talk with other ranks while `worker` works for this activity: only what it does is progress."""
        self._worker = worker
        try:
            yield
        finally:
            self._worker = None
            self.progress()

    @contextmanager
    def trusted(self) -> Iterator[None]:
        """Around work of a library that gives up by itself and does not tell how far it is: a download."""
        self._is_trusted = True
        try:
            yield
        finally:
            self._is_trusted = False
            self._last = self._clock.now

    @property
    def idle_seconds(self) -> float:
        """Since it last came further."""
        return 0.0 if self._is_trusted else self._clock.now - self._last

    @property
    def limit_seconds(self) -> float:
        """How long that may be."""
        return self._limits.seconds(self.phase, is_first=self.phase == STEP and self.is_new)

    @property
    def is_new(self) -> bool:
        """True in the first steps after a load."""
        return self._steps_left >= 0

    def _awaited(self, where: Where | None) -> str | None:
        worker = self._worker
        if worker is not None:  # the main thread is always in a collective then, and that says nothing
            return None if worker.is_alive() else "the other ranks' work"
        if self.waits_for is None and where is not None and where.waits:
            return f"the other ranks, in {where.detail}"
        return self.waits_for

    def to_json(self, where: Where | None = None) -> dict[str, Any]:
        """What the other ranks may know of it. `where` is where its thread is, if that is known."""
        return {
            "phase": self.phase,
            "doing": self.doing,
            "step": self.step,
            "count": self.count,
            "in_phase_seconds": round(self._clock.now - self._since, 2),
            "idle_seconds": round(self.idle_seconds, 2),
            "limit_seconds": self.limit_seconds,
            "waits_for": self._awaited(where),
            "collectives": self.collectives,
            "collective": self.collective,
        }


def _unwatched() -> Activity:
    return Activity(Limits({}, HangConfig().hang_factor), Clock())


_main = _unwatched()
_of_thread: dict[int, Activity] = {}


def here() -> Activity:
    """The activity that this thread works for."""
    return _of_thread.get(threading.get_ident(), _main)


def progress() -> None:
    """This thread's work has come further."""
    here().progress()


def begin(activity: Activity) -> None:
    """Make this the process's activity."""
    global _main
    _main = activity


def end() -> None:
    """Nobody watches any longer."""
    begin(_unwatched())


@contextmanager
def of_its_own(doing: str, phase: str, step: int) -> Iterator[None]:
    """Around work that this thread does beside the process's own. In the main thread it is that one's, and nothing happens."""
    if threading.current_thread() is threading.main_thread():
        yield
        return
    activity = Activity(_main._limits, _main._clock)
    activity.enter(doing, phase, step)
    _of_thread[threading.get_ident()] = activity
    try:
        yield
    finally:
        del _of_thread[threading.get_ident()]


def all_activities() -> list[Activity]:
    """The process's own first."""
    return [_main, *list(_of_thread.values())]
