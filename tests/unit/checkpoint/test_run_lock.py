"""Of several jobs in one run folder one holds the lock; whoever has lost it finds out before it publishes anything."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_recipes.checkpoint import run_lock
from ds_recipes.checkpoint.run_lock import LOCK, Attempt, RunLock, take
from ds_recipes.errors import CheckpointError, TrainingError
from ds_recipes.fsops import calls
from ds_recipes.fsops.calls import Call


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 0.05)
    yield
    calls.interceptor = None


@pytest.fixture
def said() -> list[str]:
    return []


def elsewhere(monkeypatch: pytest.MonkeyPatch, place: str = "another host") -> None:
    """From now on this process is on a host that has nothing to do with the one before."""
    monkeypatch.setattr(run_lock, "_here", lambda: place)


def gone_process() -> tuple[int, str]:
    """The id and start of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = run_lock._start_of(process.pid)
    process.communicate(b"\n")
    assert started is not None
    return process.pid, started


def forge(folder: Path, **changed: object) -> None:
    """Change what the newest attempt says of itself."""
    (path,) = (folder / LOCK).glob("*/attempt.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / LOCK).iterdir())


def test_a_second_job_is_refused_and_told_who_is_there(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    held = take(tmp_path, "one", said.append)
    with pytest.raises(CheckpointError) as refused:
        take(tmp_path, "two", said.append)
    for text in (str(tmp_path), str(os.getpid()), os.uname().nodename, "SLURM job 4711", "since 20"):
        assert text in str(refused.value)
    held.check()
    assert said == []


def test_a_released_lock_is_free_and_the_run_keeps_its_id(tmp_path: Path, said: list[str]) -> None:
    first = take(tmp_path, "one", said.append)
    first.release()
    first.release()
    second = take(tmp_path, "two", said.append)
    assert first.attempt != second.attempt and first.attempt.split("-")[0] == second.attempt.split("-")[0]
    second.check()
    with pytest.raises(TrainingError, match="has been taken by process"):
        first.check()
    assert names(tmp_path) == ["0000002"] and said == []


def test_after_its_release_nobody_may_write(tmp_path: Path, said: list[str]) -> None:
    lock = take(tmp_path, "one", said.append)
    lock.release()
    with pytest.raises(TrainingError, match="no longer held"):
        lock.check()


@pytest.mark.parametrize("how", ["gone", "other process with its id"])
def test_a_process_that_is_gone_is_superseded_at_once(tmp_path: Path, said: list[str], how: str) -> None:
    old = take(tmp_path, "one", said.append)
    pid, started = gone_process()
    forge(tmp_path, **({"pid": pid, "started": started} if how == "gone" else {"started": "1"}))
    new = take(tmp_path, "two", said.append)
    new.check()
    assert len(said) == 1 and "taken over" in said[0] and "is gone" in said[0]
    with pytest.raises(TrainingError, match="has been taken by"):
        old.check()


@pytest.mark.parametrize("since", ["1999-01-01 00:00:00 UTC", "2999-01-01 00:00:00 UTC"])
def test_on_another_host_only_the_beat_counts_whatever_the_clocks_say(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, since: str
) -> None:
    elsewhere(monkeypatch, "host A")
    old = take(tmp_path, "one", said.append)
    forge(tmp_path, since=since)
    os.utime(tmp_path / LOCK / "0000001" / "beat", (1, 1))
    elsewhere(monkeypatch, "host B")
    with pytest.raises(CheckpointError, match="another job is running"):
        take(tmp_path, "two", said.append)
    assert "waiting up to" in said[0]
    old._released.set()  # its beat stops, as that of a process that was stopped
    old._heart.join()
    new = take(tmp_path, "two", said.append)
    assert "has not shown itself" in said[-1]
    new.check()
    old._released.clear()  # and goes on
    with pytest.raises(TrainingError, match="has been taken by"):
        old.check()
    with pytest.raises(FileNotFoundError):
        old._write_beat(b"1")
    new.check()


def contend(folder: Path, number: int) -> tuple[list[RunLock], list[str]]:
    """So many jobs want it at once: those that have it, and what the others were told."""
    won: list[RunLock] = []
    refused: list[str] = []
    together = threading.Barrier(number)

    def job() -> None:
        together.wait()
        try:
            won.append(take(folder, "x", lambda line: None))
        except CheckpointError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=job) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won, refused


def test_of_many_that_find_it_free_exactly_one_takes_it(tmp_path: Path) -> None:
    for _ in range(5):
        won, refused = contend(tmp_path, 8)
        assert len(won) == 1 and len(refused) == 7, refused
        won[0].check()
        won[0].release()


def count_calls(folder: Path) -> int:
    seen: list[Call] = []
    calls.interceptor = seen.append
    take(folder, "x", lambda line: None).release()
    calls.interceptor = None
    return len(seen)


class Killed(BaseException):
    """Where a process ended: nothing of it runs any more, no clean-up either."""


def test_a_taker_killed_at_any_call_leaves_a_lock_that_can_be_taken(tmp_path: Path, said: list[str]) -> None:
    """Dead at every point in turn; the one who comes next is the only holder."""
    number_of_calls = count_calls(tmp_path / "count")
    assert number_of_calls > 8
    pid, started = gone_process()
    own = run_lock._describe_self
    for number in range(1, number_of_calls + 1):
        folder = tmp_path / f"kill{number}"
        old = take(folder, "old", said.append)
        forge(folder, pid=pid, started=started)
        left = number

        def kill(call: Call) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        run_lock._describe_self = lambda run, launch: Attempt(
            **vars(own(run, launch)) | {"pid": pid, "started": started}
        )
        calls.interceptor = kill
        try:
            take(folder, "killed", said.append)
        except Killed:
            pass
        finally:
            calls.interceptor = None
            run_lock._describe_self = own
        new = take(folder, "new", said.append)
        new.check()
        with pytest.raises(TrainingError):
            old.check()
        new.release()


def test_one_that_stood_still_while_others_came_and_went_does_not_hold_it(tmp_path: Path, said: list[str]) -> None:
    """Between its look and its rename the number it wants is taken, given back and removed."""
    take(tmp_path, "one", said.append).release()
    inside: list[RunLock] = []

    def others_meanwhile(call: Call) -> None:
        if call.kind == "rename" and not inside:
            calls.interceptor = None
            take(tmp_path, "two", said.append).release()
            inside.append(take(tmp_path, "three", said.append))

    calls.interceptor = others_meanwhile
    with pytest.raises(CheckpointError, match="another job is running"):
        take(tmp_path, "slow", said.append)
    inside[0].check()


def test_what_cannot_be_read_is_watched_and_then_taken_over(tmp_path: Path, said: list[str]) -> None:
    for number, content in enumerate((b"", b"{", b"[1]", b'{"run": 3}', b"\xff\xfe")):
        folder = tmp_path / str(number) / LOCK / "0000004"
        folder.mkdir(parents=True)
        (folder / "attempt.json").write_bytes(content)
        lock = take(folder.parents[1], "one", said.append)
        lock.check()
        assert names(folder.parents[1]) == ["0000005"]
        assert "has not shown itself" in said[-1]


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / LOCK).write_text("")
    with pytest.raises(CheckpointError, match=r"run\.lock has to be a folder; move it away"):
        take(tmp_path, "one", said.append)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"the run lock cannot be taken: Not a directory"):
        take(tmp_path / "file" / "run", "one", said.append)

    def full(call: Call) -> None:
        if call.kind == "write":
            raise OSError(28, "No space left on device")

    calls.interceptor = full
    with pytest.raises(CheckpointError, match="No space left on device"):
        take(tmp_path / "full", "one", said.append)
    calls.interceptor = None
    take(tmp_path / "full", "two", said.append).check()


def test_a_lock_removed_by_hand_stops_its_holder_and_not_the_next(tmp_path: Path, said: list[str]) -> None:
    from shutil import rmtree

    old = take(tmp_path, "one", said.append)
    rmtree(tmp_path / LOCK)
    with pytest.raises(TrainingError, match="cannot be read"):
        old.check()
    new = take(tmp_path, "two", said.append)
    new.check()
    with pytest.raises(TrainingError, match="no longer held"):
        old.check()


def test_what_nfs_says_once_is_not_believed(tmp_path: Path, said: list[str]) -> None:
    """A rename that is done and reported as failed; a listing that fails once."""
    failed: list[str] = []

    def fail_once(call: Call) -> None:
        if call.kind in ("list", "open") and call.kind not in failed:
            failed.append(call.kind)
            raise OSError(116, "Stale file handle", str(call.path))
        if call.kind == "rename" and "rename" not in failed:
            failed.append("rename")
            assert call.target is not None
            call.path.rename(call.target)
            raise OSError(5, "Input/output error", str(call.path))

    calls.interceptor = fail_once
    lock = take(tmp_path, "one", said.append)
    lock.check()
    assert sorted(failed) == ["list", "open", "rename"]


def test_time_in_which_the_file_server_was_silent_is_not_the_holders(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Its beat comes as soon as the server answers again: both were cut off."""
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 0.05)
    (tmp_path / "0000001").mkdir()
    beats = [b"1", b"1", b"2"]

    def read_beat(lock: Path, number: int) -> bytes:
        if len(beats) == 3:
            time.sleep(5 * run_lock.STALE_SECONDS)
        return beats.pop(0)

    monkeypatch.setattr(run_lock, "_read_beat", read_beat)
    assert not run_lock._stands_still(tmp_path, 1, b"1") and not beats
