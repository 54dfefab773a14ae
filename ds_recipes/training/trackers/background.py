"""Keeps a tracker that talks to the outside away from the run: it may fail, hang or be slow, and training goes on."""

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ds_recipes.training.trackers.base import Tracker

WAITING_CALLS = 10_000
"""Calls kept for a tracker that is slow to start or to send: hours of steps, a few megabytes."""

CLOSE_SECONDS = 40.0
"""How long the end of a run waits for a tracker."""


class BackgroundTracker(Tracker):
    """Starts and calls another tracker in a thread of its own. No call blocks and none raises.

    The first failure is noted and ends that tracker for the run; a full queue is noted once and its calls are lost.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Tracker],
        note: Callable[[str], None],
        waiting_calls: int = WAITING_CALLS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        """`start` runs in the thread; `note` takes a line for the user, from either thread."""
        self._name = name
        self._start = start
        self._note = note
        self._close_seconds = close_seconds
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(waiting_calls)
        self._failed = False
        self._lost_calls = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            tracker = self._start()
            while (call := self._calls.get()) is not None:
                call(tracker)
            tracker.close()
        except BaseException as error:  # whatever a foreign package does must end here
            self._failed = True
            reason = str(error).strip().splitlines()
            self._note(
                f"{self._name} failed; the run goes on without it ({type(error).__name__}: {' '.join(reason[:1])})"
            )

    def _put(self, call: Callable[[Tracker], None] | None) -> None:
        if self._failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._lost_calls += 1
            if self._lost_calls == 1:
                self._note(
                    f"{self._name} does not keep up ({self._calls.maxsize} calls wait); some steps will miss there"
                )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand over a step's metrics."""
        self._put(lambda tracker: tracker.log(step, metrics))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand over an evaluation's results."""
        self._put(lambda tracker: tracker.evaluation(step, metrics))

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Hand over an event."""
        self._put(lambda tracker: tracker.event(kind, fields))

    def rewind(self, step: int, total_steps: int) -> None:
        """Hand over that the run went back."""
        self._put(lambda tracker: tracker.rewind(step, total_steps))

    def close(self) -> None:
        """Let the tracker finish, for `close_seconds` at most."""
        self._put(None)
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._note(f"{self._name} did not finish within {self._close_seconds:g} s; the run ends without it")
