"""Runs one job as PBS's MoM does, once its hosts are free: start_exec.c, mom_start.c and mom_main.c of OpenPBS.

The script is not run by itself: a login shell that leads the job's session reads the script's path from its standard
input, and runs it as a child. So whatever signal is sent to the job reaches that shell as well, and ends it unless the
user's profile says otherwise; when it has ended, all that is left of the session is killed. Only after a SIGTERM of PBS's
own (qdel, walltime) is what is left given kill_delay to end by itself.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ds_recipes.world.ancestors import read_process
from tests.clusters.pbs_bin.cell import Cell, Job, processes_of, signal_session

POLL_SECONDS = 0.05
KILLED_AT_WALLTIME = -29
"""JOB_EXEC_KILL_WALLTIME of job.h."""


class Mom:
    """One job's run."""

    def __init__(self, cell: Cell, number: int) -> None:
        self.cell, self.number = cell, number

    def run(self) -> None:
        """Wait for hosts, run the job, and record how it ended."""
        while not self._has_hosts():
            if self.cell.job(self.number).state == "F" or self._is_abandoned():
                return
            time.sleep(POLL_SECONDS)
        job = self.cell.job(self.number)
        shell, output, error = self._start(job)
        status = self._wait(shell, job, error)
        self.cell.change(self.number, state="E")
        self._deliver(job, output, error)
        self.cell.change(self.number, state="F", exit_status=status, runner=None)

    def _has_hosts(self) -> bool:
        with self.cell.locked():
            job = self.cell.job(self.number)
            if job.state != "Q" or job.comment:
                return False
            taken = {host for other in self.cell.jobs() if other.state in "RE" for host in other.hosts}
            free = [host for host in self.cell.settings["hosts"] if host not in taken]
            if len(free) < len(job.chunks):
                return False
            job.hosts, job.state, job.runner = free[: len(job.chunks)], "R", os.getpid()
            self.cell.write(job)
            return True

    def _is_abandoned(self) -> bool:
        """True if the test that owns the cell is gone."""
        owner = read_process(self.cell.settings["owner"])
        return owner is None or owner.started != self.cell.settings["owner_started"]

    def _start(self, job: Job) -> "tuple[subprocess.Popen[bytes], Path, Path]":
        spool = self.cell.folder / "spool"
        direct = job.output.startswith("direct:")
        output = Path(job.output.removeprefix("direct:")) if direct else spool / f"{job.id}.OU"
        error = output
        if job.error is not None:
            error = Path(job.error.removeprefix("direct:")) if direct else spool / f"{job.id}.ER"
        with output.open("ab") as out, error.open("ab") as err:
            shell = subprocess.Popen(
                ["-bash"],
                executable="/bin/bash",
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                cwd=self.cell.home,
                env=self._environment(job),
                start_new_session=True,
                umask=int(job.umask, 8) & 0o777,
            )
        assert shell.stdin is not None
        self.cell.change(self.number, session=shell.pid)
        with contextlib.suppress(BrokenPipeError):
            shell.stdin.write(f"{self.cell.script(self.number)}\n".encode())
            shell.stdin.close()
        return shell, output, error

    def _environment(self, job: Job) -> dict[str, str]:
        """The submitter's PBS_O_ and -v variables, then MoM's own over them; nothing else of this process."""
        aux = self.cell.folder / "aux"
        nodefile = aux / job.id
        lines = [
            host for host, chunk in zip(job.hosts, job.chunks, strict=True) for _ in range(chunk.get("mpiprocs", 1))
        ]
        nodefile.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        scratch = self.cell.folder / "tmp" / f"pbs.{job.id}"
        scratch.mkdir(parents=True)
        cores = job.chunks[0].get("ncpus", 1)
        threads = str(job.chunks[0].get("ompthreads", cores))
        own = {
            "HOME": str(self.cell.home),
            "LOGNAME": job.owner,
            "USER": job.owner,
            "SHELL": "/bin/bash",
            "PBS_JOBNAME": job.name,
            "PBS_JOBID": job.id,
            "PBS_QUEUE": job.queue,
            "PBS_JOBCOOKIE": secrets.token_hex(16).upper(),
            "PBS_NODENUM": "0",
            "PBS_TASKNUM": "1",
            "PBS_MOMPORT": "15003",
            "OMP_NUM_THREADS": threads,
            "NCPUS": threads,
            "PBS_NODEFILE": str(nodefile),
            "TMPDIR": str(scratch),
            "PBS_LOCALDIR": str(scratch),
            "PBS_JOBDIR": str(self.cell.home),
            "PBS_ENVIRONMENT": "PBS_BATCH",
            "ENVIRONMENT": "BATCH",
        }
        return {"PATH": "/usr/bin:/bin", **job.variables, **own}

    def _wait(self, shell: "subprocess.Popen[bytes]", job: Job, error: Path) -> int:
        """The job's Exit_status: the script's, 256 + a signal that ended the shell, or PBS's own negative one."""
        begun, kill_at, over = time.monotonic(), None, False
        while True:
            has_ended = shell.poll() is not None  # asked first: qdel notes that it deletes before it signals
            now, job = time.monotonic(), self.cell.job(self.number)
            if kill_at is None and job.deleted:
                kill_at = now + self.cell.settings["kill_delay_seconds"]
            if has_ended and (kill_at is None or not processes_of(shell.pid)):
                break
            if kill_at is None and now > begun + job.walltime_seconds:
                over, kill_at = True, now + self.cell.settings["kill_delay_seconds"]
                with error.open("a", encoding="utf-8") as file:
                    used = int(now - begun)
                    file.write(f"=>> PBS: job killed: walltime {used} exceeded limit {job.walltime_seconds}\n")
                signal_session(shell.pid, signal.SIGTERM)
            if (kill_at is not None and now > kill_at) or self._is_abandoned():
                signal_session(shell.pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        signal_session(shell.pid, signal.SIGKILL)
        if over:
            return KILLED_AT_WALLTIME
        return shell.returncode if shell.returncode >= 0 else 256 - shell.returncode

    def _deliver(self, job: Job, output: Path, error: Path) -> None:
        """Move what was spooled to where the submitter wants it, and remove the job's own files."""
        for spooled, wanted in ((output, job.output), (error, job.error)):
            if wanted is not None and not wanted.startswith("direct:"):
                shutil.move(spooled, wanted)
        shutil.rmtree(self.cell.folder / "tmp" / f"pbs.{job.id}", ignore_errors=True)
        (self.cell.folder / "aux" / job.id).unlink(missing_ok=True)
        self.cell.script(self.number).unlink(missing_ok=True)


if __name__ == "__main__":
    Mom(Cell.of_environment(), int(sys.argv[1])).run()
