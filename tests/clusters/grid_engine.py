"""A real Grid Engine of two hosts for tests, started and ended without a trace on the machine.

with grid_engine() as cluster:
    job = cluster.submit(script)              # as a user of its own, whose folder is cluster.home
    record = cluster.ended(job)               # qacct's record of its last attempt
"""

import fcntl
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.clusters.grid_engine_inside import HOSTS, PATH, SEPARATE, SGE, USER, USER_ID, child_of
from tests.e2e.launchers import ROOT

PREFIX = "ds-recipes-grid-engine-"
START_SECONDS = 180
MISSING = (
    None
    if os.geteuid() == 0 and all(shutil.which(name) for name in ("sge_qmaster", "sge_execd", "qsub"))
    else "Grid Engine needs root and gridengine-master, gridengine-exec, gridengine-client"
)
"""Why the tests cannot run here; None if they can."""


@dataclass(frozen=True)
class GridEngine:
    """The running cluster: hosts node1 (also the master, from where jobs are submitted) and node2."""

    work: Path
    process_id: int
    """Process 1 of the first host, as this machine numbers it."""

    @property
    def home(self) -> Path:
        """The user's folder. What a test writes there belongs to root until `give`."""
        return self.work / "home"

    def give(self) -> None:
        """Make everything in the user's folder the user's."""
        subprocess.run(["chown", "-R", f"{USER_ID}:{USER_ID}", str(self.home)], check=True)

    def command(self, *words: str, cwd: Path | None = None) -> str:
        """What a command of the user prints on the first host.

        Raises:
            AssertionError: its status is not 0.
        """
        variables = {"HOME": str(self.home), "USER": USER, "LOGNAME": USER, "PATH": PATH, **SGE}
        inside = ["nsenter", "--target", str(self.process_id), "--all"]
        user = ["setpriv", "--reuid", str(USER_ID), "--regid", str(USER_ID), "--clear-groups"]
        there = ["env", "--chdir", str(cwd or self.home)]
        done = subprocess.run(
            [*inside, *user, *there, *words], env=variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (
            f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}\n{self.tails()}"
        )
        return done.stdout

    def submit(self, script: Path, *options: str) -> str:
        """The number of the new job."""
        self.give()
        return self.command("qsub", "-terse", *options, str(script), cwd=script.parent).strip()

    def is_queued(self, job: str) -> bool:
        """True while it waits or runs."""
        return any(line.split()[:1] == [job] for line in self.command("qstat", "-u", "*").splitlines())

    def ended(self, job: str, timeout: float = 240) -> dict[str, str]:
        """Wait until a job has left the queue, and give the accounting record of its last attempt.

        Raises:
            AssertionError: it was not gone in time.
        """
        deadline = time.monotonic() + timeout
        while self.is_queued(job) or not self.accounting(job):
            late = f"job {job} is not done within {timeout} s"
            assert time.monotonic() < deadline, f"{late}\n{self.command('qstat', '-f')}\n{self.tails()}"
            time.sleep(0.3)
        return self.accounting(job)[-1]

    def accounting(self, job: str) -> list[dict[str, str]]:
        """qacct's records of a job, one for every attempt, oldest first; none before the first has ended."""
        try:
            text = self.command("qacct", "-j", job)
        except AssertionError:
            return []
        records = [record for record in text.split("=" * 62) if record.strip()]
        return [
            {words[0]: words[1].strip() for line in record.splitlines() if len(words := line.split(maxsplit=1)) == 2}
            for record in records
        ]

    def processes(self, job: str) -> dict[int, tuple[str, dict[str, str]]]:
        """What runs of a job on both hosts: command line and environment by process id, as this machine numbers them."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone meanwhile
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                env = dict(line.split("=", 1) for line in lines if "=" in line)
                if words and env.get("JOB_ID") == job and env.get("HOME") == str(self.home):
                    found[int(entry.name)] = (words, env)
        return found

    def tails(self) -> str:
        """The ends of the daemons' logs, for messages."""
        return _tails(self.work)


@contextmanager
def grid_engine() -> Iterator[GridEngine]:
    """Start it; at the end, and when this process is killed, all its processes end.

    Raises:
        AssertionError: it did not start; the message holds the ends of the logs.
    """
    _remove_leftovers()
    work = Path(tempfile.mkdtemp(prefix=PREFIX))
    work.chmod(0o755)
    work.joinpath("home").mkdir()
    with _locked(work), (work / "start.log").open("wb") as log:
        readable = [str(path) for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix), work)]
        inside = [sys.executable, "-m", "tests.clusters.grid_engine_inside", str(work), *readable]
        process = subprocess.Popen(
            [*SEPARATE, *inside], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            ready = select.select([process.stdout], [], [], START_SECONDS)[0] and process.stdout.readline()
            assert ready == b"ready\n", f"Grid Engine did not start within {START_SECONDS} s\n{_tails(work)}"
            yield GridEngine(work, child_of(child_of(child_of(process.pid))))
        finally:
            process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()
            process.wait()
            process.stdout.close()
    shutil.rmtree(work)


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers() -> None:
    """Folders of runs that were killed. Their processes are gone, for each ends with the test that started it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)


def _tails(work: Path) -> str:
    logs = [work / "start.log", work / "spool/qmaster/messages"]
    logs += [work / f"spool/execd/{host}/messages" for host in HOSTS]
    return "\n".join(
        f"--- {log.name} of {log.parent.name}\n{log.read_text(errors='replace')[-2000:]}"
        for log in logs
        if log.exists()
    )
