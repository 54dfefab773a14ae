"""What can end a run before its last step: a signal, the deadline of `stop_after`, the file STOP in the run folder.

Each rank notices on its own, and hears of the others' wishes within a second (`world/channel.py`), so that long work of
one rank breaks off. They leave only where they have agreed to: at a `World.check` while they start, and between two steps
or in an evaluation later. Nothing here imports torch before a run has.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ds_recipes.world.signals import first_signal

if TYPE_CHECKING:
    from ds_recipes.world.group import World


class StopRequest:
    """This rank's wish to stop, with its reason.

    The STOP file is looked for by rank 0 alone; one older than this launch is removed at the start.
    """

    def __init__(
        self,
        run_folder: Path,
        is_rank_zero: bool,
        started: float,
        stop_after_seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`started` is a value of `clock`: the deadline counts from the launch, not from the first step."""
        self._file = run_folder / "STOP"
        self._looks_for_file = is_rank_zero
        self._saw_file = False
        self._clock = clock
        self._started = started
        self._stop_after_seconds = stop_after_seconds
        self._deadline = math.inf if stop_after_seconds is None else started + stop_after_seconds
        self._asked_by_peer: Callable[[], str | None] = _nobody
        if is_rank_zero:
            self._remove_old_file()

    def hear(self, asked_by_peer: Callable[[], str | None]) -> None:
        """From now on another rank's wish, which `asked_by_peer` tells, is this rank's too."""
        self._asked_by_peer = asked_by_peer

    def reason(self, reserve_seconds: float = 0.0) -> str | None:
        """Why this rank wants to stop now, or None. `reserve_seconds` is kept before the deadline, for a step and a save."""
        name = first_signal()
        if name is not None:
            return f"signal {name}"
        if self._clock() + reserve_seconds >= self._deadline:
            return f"stop_after {self._stop_after_seconds:g} s"
        if self._sees_file():
            return "the file STOP"
        return self._asked_by_peer()

    def leave_if_asked(self, world: "World", phase: str) -> None:
        """Before the first step: agree on whether to leave. Every rank must call it.

        Raises:
            StoppedEarly: on all ranks, if one was asked to stop.
        """
        world.doing(phase)
        world.leave_together(self.reason())

    def honoured(self) -> None:
        """Remove a STOP file that has been acted on, after the checkpoint is published."""
        if self._looks_for_file:
            self._file.unlink(missing_ok=True)

    def _sees_file(self) -> bool:
        """Once seen it counts, even if somebody removes it: another rank may have broken off its work already."""
        self._saw_file = self._saw_file or (self._looks_for_file and self._file.exists())
        return self._saw_file

    def _remove_old_file(self) -> None:
        """Remove a file that is older than this launch by the clock of the disk that it lies on: clocks differ."""
        try:
            written = self._file.stat().st_mtime
        except OSError:
            return
        probe = self._file.with_name(f".STOP.{os.getpid()}")
        probe.touch()
        age_seconds = probe.stat().st_mtime - written
        probe.unlink()
        if age_seconds >= self._clock() - self._started:
            self._file.unlink(missing_ok=True)


def _nobody() -> None:
    return None
