"""What can end a run before its last step: a signal, the deadline of `stop_after`, the file STOP in the run folder.

Each rank notices on its own; the loop sums the verdicts at the start of every step, so all ranks finish that step, save
and leave together.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType

REPEAT_SECONDS = 3.0
"""A second signal so soon is the same wish: at Ctrl-C a terminal signals the ranks, and their launcher does so too."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """This rank's wish to stop, with its reason.

    A second signal, later than `REPEAT_SECONDS`, ends the process at once. The STOP file is looked for by rank 0 alone; one
    older than this launch is removed at the start.
    """

    def __init__(self, run_folder: Path, is_rank_zero: bool, started: float, stop_after_seconds: float | None) -> None:
        """`started` is a `time.monotonic()` value: the deadline counts from the launch, not from the first step."""
        self._file = run_folder / "STOP"
        self._looks_for_file = is_rank_zero
        self._deadline = None if stop_after_seconds is None else started + stop_after_seconds
        self._stop_after_seconds = stop_after_seconds
        self._signal: int | None = None
        self._signalled = 0.0  # time.monotonic() of the first signal
        if is_rank_zero:
            self._file.unlink(missing_ok=True)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._signalled = number, time.monotonic()
        elif time.monotonic() - self._signalled > REPEAT_SECONDS:
            os._exit(128 + number)

    def reason(self, reserve_seconds: float) -> str | None:
        """Why this rank wants to stop now, or None. `reserve_seconds` is kept before the deadline, for a step and a save."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        if self._deadline is not None and time.monotonic() + reserve_seconds >= self._deadline:
            return f"stop_after {self._stop_after_seconds:g} s"
        if self._looks_for_file and self._file.exists():
            return "the file STOP"
        return None

    def honoured(self) -> None:
        """Remove a STOP file that has been acted on, after the checkpoint is published."""
        if self._looks_for_file:
            self._file.unlink(missing_ok=True)
