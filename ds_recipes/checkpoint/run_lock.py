"""The run lock: one job at a time writes into a run folder, and a job that has been superseded publishes nothing.

The folder `run.lock` holds one folder an attempt, `0000007/` with `attempt.json`, which says who it is; the highest number
is the one that may write. An attempt begins by giving a hidden folder of its own the next number. A folder with something in
it cannot be renamed over, so of several jobs exactly one can, and a kill at any instant leaves the lock either not taken or
taken by a process that is gone, never in between. The highest folder is never removed, not even at the end: a job that was
stopped for hours and goes on finds a higher number, whatever has happened meanwhile.

In it also lies `beat`: a counter that its owner overwrites every few seconds, or the word `released`. A holder on this host is
asked for by its process; one on another host is believed to be gone when its beat has stood still for a while by the clock
of the one who waits. No two clocks are compared.

What makes it safe (fencing) is the order, not the time. A new attempt takes the lock, removes unfinished saves of others,
then looks for the newest checkpoint. An old one writes its hidden folder, asks `check`, then renames. If it asked before
the lock was taken, its folder is published before the removal, and found, or is gone, and the rename fails.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ds_recipes.checkpoint.files import read_bytes
from ds_recipes.errors import CheckpointError, TrainingError
from ds_recipes.fsops import calls
from ds_recipes.fsops.again import again
from ds_recipes.fsops.durable import make_folders, publish, remove_tree, write_file
from ds_recipes.world.ancestors import ENDED, read_process

LOCK = "run.lock"
ATTEMPT = "attempt.json"
BEAT = "beat"
BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
"""A beat that stands still for so long is that of a job which is gone: six beats."""

WATCH_SECONDS = 0.5
RELEASED = b"released".ljust(20)
ATTEMPT_FOLDER = re.compile(r"\d{7,}")
JOBS = {
    "SLURM_JOB_ID": "SLURM",
    "PBS_JOBID": "PBS",
    "LSB_JOBID": "LSF",
    "FLUX_JOB_ID": "Flux",
    "JOB_ID": "SGE",
}
"""Where schedulers say which job this is."""


@dataclass(frozen=True)
class Attempt:
    """Who holds the lock, as `attempt.json` tells it."""

    run: str
    attempt: str
    launch: str
    host: str
    here: str  # this host's boot and the processes that it shows
    pid: int
    started: str  # the process's start, in ticks of the kernel
    job: str
    since: str  # for people

    def __str__(self) -> str:
        job = f" ({self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class RunLock:
    """The lock, held. Made by `take`."""

    def __init__(self, folder: Path, number: int, own: Attempt) -> None:
        self.attempt = f"{own.run}-{own.attempt}"
        """Name of this attempt, good for file names."""
        self._folder, self._number, self._own = folder, number, own
        self._released = threading.Event()
        self._beats = 0
        self.when_lost: Callable[[TrainingError], None] | None = None
        """Called by another thread once the lock has been lost; free to end the process."""

        self._heart = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """See that this attempt may still write.

        Raises:
            TrainingError: another one has taken the lock, or the lock is gone.
        """
        try:
            newest = again(lambda: _newest(self._folder))
            now = _read(self._folder, newest) if newest else None
        except OSError as error:
            raise TrainingError(
                f"{error.filename or self._folder}: the run lock cannot be read: {error.strerror}"
            ) from error
        if newest == self._number and now == self._own and not self._released.is_set():
            return
        what = (
            f"has been taken by {now}"
            if newest != self._number and now is not None
            else "is no longer held by this job"
        )
        raise TrainingError(
            f"{self._folder}: the run lock {what}. This job ({self._own}) writes nothing any more; what it had saved before is "
            "there. A lock changes hands when its holder does not show itself for a while (stopped, cut off from its disk)."
        )

    def holds(self) -> bool:
        """True while this attempt may write."""
        try:
            self.check()
        except TrainingError:
            return False
        return True

    def release(self) -> None:
        """Let the next job have it at once. Whatever happens, this raises nothing, and may be called twice."""
        self._released.set()
        self._heart.join(timeout=1)
        with contextlib.suppress(OSError):
            self._write_beat(RELEASED)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            self._beats += 1
            try:
                self._write_beat(b"%020d" % self._beats)
            except FileNotFoundError:
                if self._tell_if_lost():
                    return
            except OSError:  # a disk that is away for a while
                continue

    def _tell_if_lost(self) -> bool:
        try:
            self.check()
        except TrainingError as error:
            if self.when_lost is not None and not self._released.is_set():
                self.when_lost(error)
            return True
        return False

    def _write_beat(self, data: bytes) -> None:
        """Overwrite in place, never make: a file that is gone was removed by another attempt.

        Not through `fsops`: it need not survive anything, and what a test counts must not depend on time.
        """
        descriptor = os.open(self._folder / f"{self._number:07d}" / BEAT, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, data, 0)
        finally:
            os.close(descriptor)  # which also sends it to an NFS server


def take(folder: Path, launch: str, say: Callable[[str], None]) -> RunLock:
    """Take the lock of the run folder, which is made if it is not there. For rank 0 alone.

    A lock whose holder is gone is taken over with a line; a holder on another host is watched for up to `STALE_SECONDS`.

    Raises:
        CheckpointError: another job holds it, or the lock cannot be read or written.
    """
    lock = folder / LOCK
    try:
        make_folders(lock)
        return _take(lock, launch, say)
    except OSError as error:
        hint = (
            f"{lock} has to be a folder; move it away"
            if lock.is_file()
            else "Check the folder's permissions and its disk"
        )
        raise CheckpointError(
            f"{error.filename or lock}: the run lock cannot be taken: {error.strerror}. {hint}."
        ) from error


def _take(lock: Path, launch: str, say: Callable[[str], None]) -> RunLock:
    while True:
        newest = again(lambda: _newest(lock))
        before = _read(lock, newest) if newest else None
        if newest and not _is_free(lock, newest, before, say):
            continue
        own = _describe_self(before.run if before is not None else secrets.token_hex(4), launch)
        if not _make(lock, newest + 1, own) or again(lambda: _newest(lock)) != newest + 1:
            continue  # another job was faster, or many were while this one stood still: look again
        held = RunLock(lock, newest + 1, own)
        _remove_before(lock, newest + 1)
        return held


def _make(lock: Path, number: int, own: Attempt) -> bool:
    """Make the attempt's folder; False if there is one with that number."""
    hidden, final = lock / f".{number:07d}.{own.attempt}", lock / f"{number:07d}"
    try:
        calls.make_folder(hidden)
        write_file(hidden / BEAT, [b"started".ljust(len(RELEASED))])
        write_file(hidden / ATTEMPT, [(json.dumps(asdict(own), indent=2) + "\n").encode()])
        publish(hidden, final)
    except OSError as error:
        if _read(lock, number) == own:  # it failed after the rename
            return True
        remove_tree(hidden)
        if not final.is_dir() and error.errno != errno.ENOENT:  # the faster one also removes what others had begun
            raise
        return False
    return True


def _is_free(lock: Path, number: int, holder: Attempt | None, say: Callable[[str], None]) -> bool:
    """True if that attempt has ended; False if something has changed and must be looked at again.

    Raises:
        CheckpointError: it is alive.
    """
    beat = _read_beat(lock, number)
    if beat == RELEASED:
        return True
    if holder is not None and holder.here == _here():
        if _start_of(holder.pid) != holder.started:
            say(f"the run lock is taken over: {holder}, is gone")
            return True
        raise CheckpointError(_refusal(lock, str(holder)))
    who = str(holder) if holder is not None else f"a job that {number:07d}/{ATTEMPT} does not name"
    say(f"{lock}: held by {who}; waiting up to {STALE_SECONDS:.0f} s to see whether it is alive")
    if not _stands_still(lock, number, beat):
        if again(lambda: _newest(lock)) == number and _read_beat(lock, number) != RELEASED:
            raise CheckpointError(_refusal(lock, str(_read(lock, number) or who)))
        return False
    say(f"the run lock is taken over: {who}, has not shown itself for {STALE_SECONDS:.0f} s")
    return True


def _stands_still(lock: Path, number: int, beat: bytes) -> bool:
    """Watch a beat for `STALE_SECONDS`; False as soon as something changes.

    Only time in which the file could be read counts: while a file server hangs nobody's beat is seen.
    """
    still = 0.0
    while still < STALE_SECONDS:
        began = time.monotonic()
        time.sleep(WATCH_SECONDS)
        if again(lambda: _newest(lock)) != number or _read_beat(lock, number) != beat:
            return False
        still += min(time.monotonic() - began, 2 * WATCH_SECONDS)
    return True


def _refusal(lock: Path, who: str) -> str:
    return (
        f"{lock.parent}: another job is running in this run folder: {who}. Two jobs cannot write into one folder. Wait for its "
        "end, or end it; or choose another --save_checkpoint_path."
    )


def _remove_before(lock: Path, number: int) -> None:
    """Delete the files of earlier attempts. Each of them is superseded for ever by this one."""
    for name in calls.names_in(lock):
        digits = name.lstrip(".").split(".")[0]
        if digits.isdecimal() and int(digits) < number + name.startswith("."):
            with contextlib.suppress(OSError):
                remove_tree(lock / name)


def _newest(lock: Path) -> int:
    """The highest number; 0 where there is none. A listing: a single name that is new may be unseen for long on NFS."""
    return max((int(name) for name in calls.names_in(lock) if ATTEMPT_FOLDER.fullmatch(name)), default=0)


def _read(lock: Path, number: int) -> Attempt | None:
    """Who that attempt is; None if its file does not tell."""
    try:
        content: dict[str, Any] = json.loads(read_bytes(lock / f"{number:07d}" / ATTEMPT))
        return Attempt(**content)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def _read_beat(lock: Path, number: int) -> bytes:
    """The beat's content; empty where there is none."""
    try:
        return read_bytes(lock / f"{number:07d}" / BEAT)
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _describe_self(run: str, launch: str) -> Attempt:
    job = next((f"{name} job {os.environ[key]}" for key, name in JOBS.items() if os.environ.get(key)), "")
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    pid = os.getpid()
    return Attempt(
        run, secrets.token_hex(4), launch, os.uname().nodename, _here(), pid, _start_of(pid) or "unknown", job, since
    )


def _here() -> str:
    """What makes a process id mean something: this boot of this host, and the name space that the ids belong to.

    Where the kernel does not tell, it is like no other place.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown {secrets.token_hex(8)}"


def _start_of(pid: int) -> str | None:
    """The start of a process, in ticks since the host's own; None if there is no such process, or only its remains."""
    process = read_process(pid)
    return None if process is None or process.state in ENDED else str(process.started)
