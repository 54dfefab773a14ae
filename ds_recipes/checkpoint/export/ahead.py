"""Read the next pieces while the last one is written."""

import queue
import threading
from collections.abc import Generator, Iterator

from ds_recipes.fsops.calls import Data

DEPTH = 2
RING = DEPTH + 2
"""Buffers that the pieces may share in turns: one is filled, `DEPTH` wait, one is written."""


def ahead(pieces: Iterator[Data]) -> Generator[Data, None, None]:
    """The same pieces in the same order, made in a thread of their own; an error there is raised here.

    Close it (or use it up) to end the thread.
    """
    made: queue.Queue[Data | BaseException | None] = queue.Queue(DEPTH)
    stopped = threading.Event()

    def make() -> None:
        try:
            for piece in pieces:
                made.put(piece)
                if stopped.is_set():
                    return
            made.put(None)
        except BaseException as error:
            made.put(error)

    thread = threading.Thread(target=make, name="read ahead", daemon=True)
    thread.start()
    try:
        while (piece := made.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stopped.set()
        while thread.is_alive():
            _drain(made)
            thread.join(0.01)


def _drain(made: "queue.Queue[Data | BaseException | None]") -> None:
    try:
        while True:
            made.get_nowait()
    except queue.Empty:
        return
