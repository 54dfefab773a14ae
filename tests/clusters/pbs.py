"""A PBS for a test: a cell of the stand-in in tests/clusters/pbs_bin, with its programs and a user's home folder.

    with pbs_cell(tmp_path) as pbs:
        job = pbs.submit(script, folder)          # what a user's `qsub script` prints
        ended = pbs.until_finished(job)           # its Exit_status and its output file

The user's profile puts the cell's qsub, qstat, qdel and qsig on the PATH, and defines `module` as a function that notes what
it was called with. What a real PBS does that this one cannot show stands in tests/clusters/pbs_bin/__init__.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.world.ancestors import read_process
from tests.clusters.pbs_bin.cell import Cell, Job, processes_of
from tests.e2e.launchers import BIN, ROOT, environment

GROUP = "gaa50000"
PROGRAMS = ("qsub", "qstat", "qdel", "qsig")

PROFILE = """\
export PATH="{programs}:{python}:$PATH"
export PBS_CELL="{cell}" PYTHONPATH="{root}"
{variables}
module() {{ echo "module $*" >>"$HOME/modules"; }}
export -f module
"""
FOR_RANKS = ("HF_HUB_OFFLINE", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Finished:
    """A job that has ended: its Exit_status, and all that it has printed."""

    job: Job
    output: str

    @property
    def status(self) -> int | None:
        return self.job.exit_status


class Pbs:
    """A running cell."""

    def __init__(self, cell: Cell, programs: Path) -> None:
        self.cell, self.programs = cell, programs

    @property
    def home(self) -> Path:
        return self.cell.home

    def run(self, *words: str, cwd: Path | None = None, text: str | None = None) -> "subprocess.CompletedProcess[str]":
        """A user's command on the login host: qsub, qstat, qdel or qsig, with `text` as its standard input."""
        return subprocess.run(
            [str(self.programs / words[0]), *words[1:]],
            cwd=cwd or self.home,
            env=login_environment(self.home, self.programs),
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def submit(self, script: Path, folder: Path, *options: str) -> str:
        """The identifier that qsub prints, called in `folder`."""
        done = self.run("qsub", *options, str(script), cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def jobs(self) -> list[Job]:
        return self.cell.jobs()

    def job(self, identifier: str) -> Job:
        job = self.cell.find(identifier)
        assert job is not None, identifier
        return job

    def until(self, identifier: str, states: str, timeout: float = 300) -> Job:
        """Wait until the job is in one of these states."""
        deadline = time.monotonic() + timeout
        while (job := self.job(identifier)).state not in states:
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{identifier} is still {job.state} after {timeout} s:\n{self.output(job)}\n{self.log()}"
                )
            time.sleep(0.05)
        return job

    def until_finished(self, identifier: str, timeout: float = 300) -> Finished:
        job = self.until(identifier, "F", timeout)
        return Finished(job, self.output(job))

    def output(self, job: Job) -> str:
        """What the job has printed so far, its own errors too."""
        files = [Path(name.removeprefix("direct:")) for name in (job.output, job.error) if name is not None]
        spooled = [self.cell.folder / "spool" / f"{job.id}.{suffix}" for suffix in ("OU", "ER")]
        return "".join(file.read_text(errors="replace") for file in (*files, *spooled) if file.is_file())

    def log(self) -> str:
        """What went wrong in the stand-in itself."""
        file = self.cell.folder / "mom_logs"
        return file.read_text(errors="replace") if file.exists() else ""

    def end(self) -> None:
        """Leave no process of any job."""
        for job in self.jobs():
            self.cell.change(job.number, state="F")  # one that is queued never starts
        for pid in [pid for job in self.jobs() for pid in ([job.runner] if job.runner else [])]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for job in self.jobs():
            for pid in processes_of(job.session) if job.session else []:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def login_environment(home: Path, programs: Path) -> dict[str, str]:
    """What a user's shell on the login host has."""
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    own = {"HOME": str(home), "PATH": path, "PBS_CELL": str(programs.parent), "PYTHONPATH": str(ROOT)}
    return {"LANG": "C.UTF-8", "SHELL": "/bin/bash", "LOGNAME": "user", **own}


@contextmanager
def pbs_cell(
    folder: Path,
    hosts: Sequence[str] = (),
    kill_delay_seconds: float = 10,
    variables: Mapping[str, str] | None = None,
    profile: str = "",
) -> Iterator[Pbs]:
    """A cell under `folder`; its hosts are this one, by any name, if none are named: two, so that jobs can overlap.

    `variables` are exported by the user's profile, `profile` is added to it as it stands.
    """
    cell, programs = folder / "pbs", folder / "pbs" / "bin"
    for name in ("bin", "home", "jobs", "mom_priv/jobs", "spool", "aux", "tmp"):
        (cell / name).mkdir(parents=True)
    owner = read_process(os.getpid())
    assert owner is not None
    here = socket.gethostname().partition(".")[0]
    settings = {
        "hosts": list(hosts) or [here],
        "groups": [GROUP],
        "kill_delay_seconds": kill_delay_seconds,
        "owner": owner.pid,
        "owner_started": owner.started,
    }
    (cell / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    for name in PROGRAMS:
        module = "qsub" if name == "qsub" else f"control {name}"
        file = programs / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.clusters.pbs_bin.{module} "$@"\n', encoding="utf-8")
        file.chmod(0o755)
    ranks = environment(variables)
    wanted = {name: ranks[name] for name in FOR_RANKS if name in ranks} | dict(variables or {})
    exports = "\n".join(f"export {name}='{value}'" for name, value in wanted.items())
    text = PROFILE.format(programs=programs, python=BIN, cell=cell, root=ROOT, variables=exports)
    (cell / "home" / ".bash_profile").write_text(text + profile, encoding="utf-8")
    pbs = Pbs(Cell(cell), programs)
    try:
        yield pbs
    finally:
        pbs.end()
