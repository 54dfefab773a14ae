"""The folder that stands for a PBS server: its settings, and a file a job. Every program opens it by PBS_CELL."""

import fcntl
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FIRST_JOB = 123456
SERVER = "pbs1"
UNKNOWN_JOB, JOB_FINISHED, BAD_STATE, UNKNOWN_SIGNAL = 15001, 15139, 15016, 15013


@dataclass
class Job:
    """A job as the server knows it. `state` is Q, R, E or F."""

    number: int
    name: str
    owner: str
    queue: str
    project: str
    state: str
    walltime_seconds: int
    chunks: list[dict[str, int]]
    variables: dict[str, str]
    output_asked: str
    """What qstat shows: the file or folder of -o, or the file that it is by default."""
    output: str
    error: str | None
    """None if it is joined with the output."""
    umask: str
    working_folder: str
    select: str
    comment: str = ""
    hosts: list[str] = field(default_factory=list)
    session: int | None = None
    runner: int | None = None
    exit_status: int | None = None
    deleted: bool = False
    """PBS's TERMJOB: it has been sent SIGTERM to end, and has kill_delay left."""

    @property
    def id(self) -> str:
        return f"{self.number}.{SERVER}"


class Cell:
    """The folder, and what is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "settings.json").read_text(encoding="utf-8"))

    @classmethod
    def of_environment(cls) -> "Cell":
        return cls(Path(os.environ["PBS_CELL"]))

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def script(self, number: int) -> Path:
        """The copy that runs, as PBS's own under mom_priv/jobs."""
        return self.folder / "mom_priv" / "jobs" / f"{number}.{SERVER}.SC"

    @contextmanager
    def locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def new_number(self) -> int:
        """To be called with the lock held."""
        return max([FIRST_JOB - 1, *(job.number for job in self.jobs())]) + 1

    def jobs(self) -> list[Job]:
        return sorted(
            (self.job(int(file.stem)) for file in self.folder.glob("jobs/*.json")), key=lambda job: job.number
        )

    def job(self, number: int) -> Job:
        return Job(**json.loads((self.folder / "jobs" / f"{number}.json").read_text(encoding="utf-8")))

    def find(self, identifier: str) -> Job | None:
        """By `123456`, `123456.pbs1`; None if there is no such job."""
        number, _, server = identifier.partition(".")
        if server not in ("", SERVER) or not number.isdigit():
            return None
        with suppress(FileNotFoundError):
            return self.job(int(number))
        return None

    def write(self, job: Job) -> None:
        file = self.folder / "jobs" / f"{job.number}.json"
        part = file.with_suffix(f".part{os.getpid()}")
        part.write_text(json.dumps(asdict(job)), encoding="utf-8")
        part.replace(file)

    def change(self, number: int, **values: Any) -> Job:
        """Set some of a job's fields; nobody else's change is lost."""
        with self.locked():
            job = self.job(number)
            for name, value in values.items():
                setattr(job, name, value)
            self.write(job)
            return job


def processes_of(session: int) -> list[int]:
    """The processes of a session that run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def signal_session(session: int, number: int) -> None:
    """Send a signal to every process of the session: to the shell's own group at one instant, then to the others."""
    others = []
    for pid in processes_of(session):
        with suppress(ProcessLookupError):
            if os.getpgid(pid) != session:
                others.append(pid)
    with suppress(ProcessLookupError):
        os.killpg(session, number)
    for pid in others:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def signal_number(name: str) -> int | None:
    """By `SIGUSR1`, `USR1` or `10`; None if it is none of PBS's."""
    if name.isdigit():
        return int(name)
    with suppress(KeyError):
        return int(signal.Signals[name if name.startswith("SIG") else f"SIG{name}"])
    return None
