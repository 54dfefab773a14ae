"""Two jobs in one run folder: the second is refused, and one that was superseded publishes nothing when it goes on."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from ds_recipes.checkpoint.run_lock import take
from tests.nano import make_nano
from tests.ranks.launch import wait_for
from tests.ranks.training import start_training, train, train_py

STEPS = 6
AT_THE_RENAME = "@1 kind=rename path=*.iter_0000003.partial*"
STANDS_STILL = f"signal:STOP{AT_THE_RENAME}; delay:0.5{AT_THE_RENAME}"
"""The process is stopped right before its checkpoint of step 3 would get its name: the last check has been passed."""


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


def arguments(nano: Path, folder: Path) -> list[str]:
    flags = ["--max_steps", str(STEPS), "--save_interval_iteration", "1", "--eval_interval", "0"]
    return ["--config", str(nano), "--save_checkpoint_path", str(folder), *flags]


def on_host_a(argv: Sequence[str]) -> int:
    """train.py in a place of which the test's own processes know nothing."""
    from ds_recipes.checkpoint import run_lock

    run_lock._here = lambda: "host A"
    run_lock.BEAT_SECONDS = 0.2
    return train_py(argv)


def impatient(argv: Sequence[str]) -> int:
    """train.py that believes after two seconds that a job without a beat is gone."""
    from ds_recipes.checkpoint import run_lock

    run_lock.STALE_SECONDS = 2.0
    return train_py(argv)


def published(folder: Path) -> dict[str, str]:
    """Every file of every checkpoint with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("iter_*/*"))
    }


def until_stopped(pid: int, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "it never stood still"
        time.sleep(0.05)


def test_a_second_job_is_refused_and_touches_nothing(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lock = take(folder, "the first job", print)
    (folder / "run.json").write_text('{"state": "running", "launches": []}')
    ended = train(1, *arguments(nano, folder), outputs=tmp_path)
    assert ended.statuses == (2,), ended.text
    for text in (str(folder), "another job is running", f"process {os.getpid()} on {os.uname().nodename}", "since 20"):
        assert text in ended.text
    assert (folder / "run.json").read_text() == '{"state": "running", "launches": []}'
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "run.lock"]
    lock.check()
    lock.release()


@pytest.mark.slow
def test_a_job_that_stood_still_while_another_took_over_publishes_nothing(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    faults = {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": STANDS_STILL}
    (old,) = start_training(1, arguments(nano, folder), tmp_path / "old", faults, on_host_a)
    try:
        supersede(nano, folder, old)
    finally:
        old.kill()  # one that still stands still would keep the whole test run from ending
        old.join()


def supersede(nano: Path, folder: Path, old: ForkServerProcess) -> None:
    """Let another job take the folder over from one that stands still, and that one go on."""
    assert old.pid is not None
    until_stopped(old.pid)
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    ended = train(1, *arguments(nano, folder), outputs=folder.parent / "new", program=impatient)
    assert ended.statuses == (0,), ended.text
    assert "the run lock is taken over" in ended.text and "has not shown itself for 2 s" in ended.text
    assert f"continuing from {folder}/iter_0000002" in ended.text
    record, files = (folder / "run.json").read_text(), published(folder)
    assert len({name.split("/")[0] for name in files}) == STEPS
    os.kill(old.pid, signal.SIGCONT)
    assert wait_for([old], 60) and old.exitcode not in (0, 75), "the superseded job claims to have ended well"
    text = (folder.parent / "old" / "rank0.txt").read_text()
    assert "has been taken by" in text or "could not be written" in text, text
    assert published(folder) == files
    assert not list(folder.glob(".iter_*"))
    assert (folder / "run.json").read_text() == record and json.loads(record)["state"] == "complete"
