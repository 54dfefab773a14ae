"""Write down every call of the file layer, with its data, while real code runs."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ds_recipes.fsops import calls
from ds_recipes.fsops.calls import Call
from tests.faults.disk import Event


@contextmanager
def recording(fault: Callable[[Call], None] | None = None) -> Iterator[list[Event]]:
    """The events so far; a test appends the step of a checkpoint when it is reported as saved.

    A call that `fault` lets fail is left out, but for the half of a write that it makes.
    """
    events: list[Event] = []

    def note(call: Call) -> None:
        data = None if call.data is None else bytes(call.data)
        if fault is not None:
            try:
                fault(call)
            except OSError:
                if data is not None:
                    events.append(dataclasses.replace(call, data=data[: len(data) // 2], descriptor=None))
                raise
        events.append(dataclasses.replace(call, data=data, descriptor=None))

    calls.interceptor = note
    try:
        yield events
    finally:
        calls.interceptor = None


def without(events: Sequence[Event], kind: str, name: str = "") -> list[Event]:
    """What a program would have done that leaves out one kind of call, on paths with this in their name."""
    return [event for event in events if isinstance(event, int) or event.kind != kind or name not in event.path.name]
