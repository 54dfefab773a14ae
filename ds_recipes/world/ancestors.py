"""The processes above this one on its host, as /proc tells of them: which launcher started it, and whether it is still there.

Linux only, as all of this package; source: proc(5). No torch here.
"""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

ENDED = "ZX"
"""States of a process that has ended, and is still to be reaped."""


@dataclass(frozen=True)
class Process:
    """A process, and no other that comes to bear its number later: `started` is in the kernel's clock ticks since boot."""

    pid: int
    parent: int
    started: int
    command: tuple[str, ...]
    state: str = field(compare=False)
    """The letter of proc(5), as it was when it was read: `T` stopped, `D` in the kernel, `Z` ended and still to be reaped."""

    def is_running(self) -> bool:
        """False once it has ended; one that has ended and is still to be reaped (a zombie) does not run.

        True also where nothing can be read just now (no file handle is free, for one).
        """
        try:
            stat = _stat(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        except OSError:
            return True
        return stat.started == self.started and stat.state not in ENDED

    @property
    def name(self) -> str:
        """Its program, or for an interpreter the script that it runs."""
        words = [Path(word).name for word in self.command if not word.startswith("-")]
        if words and words[0].startswith(("python", "bash", "sh")) and len(words) > 1:
            return words[1]
        return words[0].split()[0].rstrip(":") if words and words[0] else str(self.pid)


@dataclass(frozen=True)
class _Stat:
    parent: int
    state: str
    started: int


def read_process(pid: int) -> Process | None:
    """The process with this number, None if there is none or it cannot be read."""
    try:
        stat = _stat(pid)
    except OSError:
        return None
    command = b""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    words = [word.decode(errors="replace") for word in command.split(b"\0")]
    return Process(pid, stat.parent, stat.started, tuple(words[:-1] if words[-1] == "" else words), stat.state)


def ancestors(of: Process | None = None) -> list[Process]:
    """The parent of this process, or of another one, its parent, and so on up to the last one below process 1."""
    found: list[Process] = []
    pid = os.getppid() if of is None else of.parent
    while pid > 1 and (process := read_process(pid)) is not None:
        found.append(process)
        pid = process.parent
    return found


def _stat(pid: int) -> _Stat:
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()  # the program's name before it may hold spaces and parentheses
    return _Stat(parent=int(fields[1]), state=fields[0], started=int(fields[19]))
