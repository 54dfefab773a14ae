"""Trackers that raise, hang or are slow: the run's calls return at once and the user hears of it once."""

import time
from collections.abc import Callable, Mapping
from threading import Event
from typing import Any

import pytest

from ds_recipes.training.trackers.background import BackgroundTracker
from ds_recipes.training.trackers.base import Tracker


class Recorder(Tracker):
    """Keeps its calls; fails or waits where it is told to."""

    def __init__(self, on_log: Callable[[], None] = lambda: None, on_close: Callable[[], None] = lambda: None) -> None:
        self.calls: list[Any] = []
        self._on_log, self._on_close = on_log, on_close

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._on_log()
        self.calls.append((step, dict(metrics)))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.log(step, metrics)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self.calls.append(kind)

    def rewind(self, step: int, total_steps: int) -> None:
        self.calls.append(("rewind", step, total_steps))

    def close(self) -> None:
        self._on_close()
        self.calls.append("closed")


LOGGED = [(step, {"loss": 1.0}) for step in range(20)]


def fail() -> None:
    raise RuntimeError("no route to host\nand a long traceback")


def leave() -> None:
    raise SystemExit(3)


def drive(tracker: BackgroundTracker, steps: int = 5) -> float:
    """Log some steps and close; return how long all of it took, in seconds."""
    started = time.monotonic()
    for step in range(steps):
        tracker.log(step, {"loss": 1.0})
        time.sleep(0.001)
    tracker.close()
    return time.monotonic() - started


def test_every_call_arrives_in_order_before_close_returns() -> None:
    notes: list[str] = []
    inner = Recorder(on_log=lambda: time.sleep(0.001))
    tracker = BackgroundTracker("t", lambda: inner, notes.append)
    tracker.evaluation(0, {"eval_loss": 2.0})
    tracker.event("saved", {})
    tracker.rewind(0, 20)
    drive(tracker, 20)
    assert inner.calls == [(0, {"eval_loss": 2.0}), "saved", ("rewind", 0, 20), *LOGGED, "closed"]
    assert notes == []


@pytest.mark.parametrize("broken", [fail, leave])
@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_a_failure_is_noted_once_and_never_raised(broken: Callable[[], None], where: str) -> None:
    notes: list[str] = []

    def start() -> Tracker:
        if where == "start":
            broken()
        return Recorder(**({f"on_{where}": broken} if where != "start" else {}))

    assert drive(BackgroundTracker("wandb", start, notes.append)) < 2
    assert len(notes) == 1
    assert notes[0].startswith("wandb failed; the run goes on without it (")
    assert "\n" not in notes[0]


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_a_hang_holds_neither_the_steps_nor_the_end(where: str) -> None:
    notes: list[str] = []
    release = Event()

    def hang() -> None:
        release.wait(30)

    def start() -> Tracker:
        if where == "start":
            hang()
        return Recorder(**({f"on_{where}": hang} if where != "start" else {}))

    seconds = drive(BackgroundTracker("wandb", start, notes.append, waiting_calls=3, close_seconds=0.3))
    release.set()
    assert seconds < 2
    assert notes[-1] == "wandb did not finish within 0.3 s; the run ends without it"
    assert [note for note in notes if "keep up" in note] == ([] if where == "close" else notes[:1])
