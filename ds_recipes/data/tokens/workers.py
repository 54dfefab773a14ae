"""Worker processes that make parts for a rank.

They are programs of their own, not forks: a fork of a process with threads can hang, and `multiprocessing` would run the
user's main program again in each.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType

from ds_recipes.data.tokens.answers import Advanced, Answer
from ds_recipes.data.tokens.make import Task
from ds_recipes.errors import DsRecipesError

POLL_SECONDS = 0.2
LEAVE_SECONDS = 5.0

ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""A worker is one core's work: several threads in each would fight over the cores."""


class Workers:
    """Some processes with the same task. They are gone when the block ends, and when this process dies."""

    def __init__(self, task: Task, number: int) -> None:
        self._task = task
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        self._told: set[Connection] = set()  # those that have the task
        try:
            for _ in range(number):
                self._start()
        except BaseException:
            self.kill()
            raise

    def make(
        self,
        parts: Sequence[int],
        goes_on: Callable[[int], bool],
        advance: Callable[[int, int], None] = lambda part, source_bytes: None,
    ) -> Iterator[Answer]:
        """Have the parts made in their order; answers come as they are done.

        Before a part is begun, and while it is made, `goes_on` is asked about it. A part that is no longer wanted, and
        those behind it, get no answer. `advance` is told a part and how many of its source bytes are tokenised.

        Raises:
            DsRecipesError: a worker died.
        """
        waiting = list(reversed(parts))
        busy: dict[Connection, int] = {}
        idle = list(self._processes)
        while True:
            while idle and waiting and goes_on(waiting[-1]):
                connection = idle.pop()
                busy[connection] = waiting.pop()
                self._give(connection, busy[connection])
            if not any(goes_on(part) for part in busy.values()):
                return
            for ready in wait(list(busy), POLL_SECONDS):
                assert isinstance(ready, Connection)
                answer = self._receive(ready)
                if isinstance(answer, Advanced):
                    advance(answer.part, answer.source_bytes)
                    continue
                yield answer
                del busy[ready]
                idle.append(ready)

    def kill(self) -> None:
        """End all, whatever they are doing: no part is harmed by it."""
        for connection, process in self._processes.items():
            process.kill()
            connection.close()
        for process in self._processes.values():
            process.wait()
        self._processes = {}

    def _start(self) -> None:
        mine, theirs = socket.socketpair()
        with theirs:
            program = [
                sys.executable,
                "-P",
                "-m",
                "ds_recipes.data.tokens.worker",
                str(theirs.fileno()),
                str(os.getpid()),
            ]
            path = os.pathsep.join(entry for entry in sys.path if entry)
            process = subprocess.Popen(
                program,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | ONE_THREAD | {"PYTHONPATH": path},
            )
        self._processes[Connection(mine.detach())] = process

    def _give(self, connection: Connection, part: int) -> None:
        try:
            if connection not in self._told:
                self._told.add(connection)
                connection.send(self._task)
            connection.send(part)
        except OSError:
            raise self._death(connection) from None

    def _receive(self, connection: Connection) -> Answer | Advanced:
        try:
            answer: Answer | Advanced = connection.recv()
        except (EOFError, OSError):
            raise self._death(connection) from None
        return answer

    def _death(self, connection: Connection) -> DsRecipesError:
        """What a worker died of. One that only lost its socket is of no use either, and is killed."""
        process, name = self._processes[connection], self._task.folder
        try:
            status = process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status < 0:
            return DsRecipesError(
                f"{name}: a tokenising worker was killed (signal {-status}: {signal.strsignal(-status)}). Out of memory is "
                "the usual cause: see the host's kernel log (dmesg). Set a smaller --num_workers_tokenise. What is done "
                "stays, and is used again."
            )
        return DsRecipesError(f"{name}: a tokenising worker ended with status {status}; its own words stand above.")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
