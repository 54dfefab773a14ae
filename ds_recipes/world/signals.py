"""Signals that ask this process to stop: heard from the first moment on, whatever the main thread is doing.

Python runs its own handlers in the main thread, and only once that is back from C: a rank that waits in a collective, or
packs rows in numpy, would not hear of a signal for as long. So the system's handler writes each signal's number into a
pipe, and a thread reads them there. Nothing here imports torch.
"""

import os
import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

REPEAT_SECONDS = 3.0
"""A second signal so soon is the same wish: at Ctrl-C a terminal signals the ranks, and their launcher does so too."""


class Hearing:
    """What this process has heard. A second signal, later than `REPEAT_SECONDS`, ends it at once with 128 + its number."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._heard = 0.0  # time.monotonic() of the first
        read, write = os.pipe()
        os.set_blocking(write, False)
        for number in SIGNALS:
            signal.signal(number, self._in_main_thread)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()

    def _listen(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                if number in SIGNALS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        if self.first is None:
            self.first, self._heard = number, time.monotonic()
        elif time.monotonic() - self._heard > REPEAT_SECONDS:
            os._exit(128 + number)

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        """Late, perhaps by minutes, so it is no second signal; and the only word if a library has taken the pipe's place."""
        if self.first is None:
            self._hear(signal.Signals(number))


_hearing: Hearing | None = None


def listen() -> None:
    """Begin to hear signals, which would end the process otherwise. In the main thread; a second call changes nothing."""
    global _hearing
    if _hearing is None:
        _hearing = Hearing()


def first_signal() -> str | None:
    """The name of the first signal that this process got, such as SIGTERM."""
    return _hearing.first.name if _hearing is not None and _hearing.first is not None else None
