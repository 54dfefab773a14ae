"""A worker process: gets a task and part numbers through a socket, makes the parts, and says how far each is and
what came of it.

    python -m ds_recipes.data.tokens.worker FILE_DESCRIPTOR PARENT

It is started by `workers.py`. It ends when its parent does, however that dies.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from ds_recipes.data.tokens.answers import Advanced, Answer, Failed, Made, Wrong
from ds_recipes.data.tokens.make import PartMaker, Task
from ds_recipes.errors import DsRecipesError, InputError

WATCH_SECONDS = 0.5
TELL_SECONDS = 0.5
"""It says at most so often how far a part is."""

SENT_TO_ALL = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Terminals and batch systems send these to every process of a job; the rank decides what they mean."""


def main(argv: Sequence[str]) -> int:
    """Serve until the parent closes the socket. Returns the exit status."""
    descriptor, parent = map(int, argv)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    for number in SENT_TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # also where the rank was started with it ignored
    with Connection(descriptor) as connection:
        task: Task = connection.recv()
        maker: PartMaker | None = None
        while True:
            try:
                part: int = connection.recv()
            except EOFError:
                return 0
            try:
                maker = maker or PartMaker(task)
                answer: Answer = Made(part, maker.make(part, Teller(connection, part)))
            except InputError as error:
                answer = Wrong(part, str(error))
            except DsRecipesError as error:
                answer = Failed(part, str(error), for_user=True)
            except Exception:
                answer = Failed(part, traceback.format_exc(), for_user=False)
            connection.send(answer)


class Teller:
    """Tells the parent now and then how far a part is. Asked whether to go on, it says yes: the parent ends this process if not."""

    def __init__(self, connection: Connection, part: int) -> None:
        self._connection, self._part = connection, part
        self._last = time.monotonic()

    def __call__(self, source_bytes: int) -> bool:
        now = time.monotonic()
        if now - self._last >= TELL_SECONDS:
            self._last = now
            with contextlib.suppress(OSError):  # the parent has died, and this process is about to
                self._connection.send(Advanced(self._part, source_bytes))
        return True


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
