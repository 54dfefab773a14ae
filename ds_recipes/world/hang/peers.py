"""The processes of all ranks: what can be said of one on this host from outside, and its end if it cannot end itself."""

import contextlib
import os
import signal
import socket
from dataclasses import dataclass

from ds_recipes.world.ancestors import ENDED, Process, read_process

STATES = {
    "T": "its process is stopped (by SIGSTOP, or the job is suspended)",
    "t": "its process is held by a debugger",
    "D": "its process waits in the kernel, for a disk or a network file system",
    "R": "its process runs, but lets no thread of Python's other than one get its turn",
    "S": "its process sleeps, and lets no thread of Python's other than one get its turn",
    "Z": "its process has ended",
}
"""By the letter in /proc/PID/stat; source: proc(5)."""


@dataclass(frozen=True)
class Peer:
    """A rank's process. `started` is in clock ticks since its host's boot, so that no later process is taken for it."""

    host: str
    pid: int
    started: int

    @property
    def is_here(self) -> bool:
        """True if it runs on this host, and is still that process."""
        return self._process() is not None

    @property
    def has_ended(self) -> bool:
        """True if it no longer runs. Only of use for one that was seen here before."""
        process = read_process(self.pid)
        return process is None or process.started != self.started or process.state in ENDED

    def state(self) -> str | None:
        """In words, or None where it cannot be seen from here."""
        process = self._process()
        return None if process is None else STATES.get(process.state)

    def kill(self) -> None:
        """End it with SIGKILL, which a stopped process too obeys. Nothing happens unless it runs here."""
        if self.is_here:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)

    def _process(self) -> Process | None:
        """None where it does not run on this host, or no longer."""
        process = read_process(self.pid) if self.host == socket.gethostname() else None
        return process if process is not None and process.started == self.started else None


def this_process() -> Peer:
    """The one that asks."""
    process = read_process(os.getpid())
    return Peer(socket.gethostname(), os.getpid(), process.started if process is not None else 0)
