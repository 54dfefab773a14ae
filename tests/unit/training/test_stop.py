"""What makes a rank wish to stop: signals, each in a process of its own; the deadline; the file STOP."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ds_recipes.ranges import NONE_MISSED
from ds_recipes.training.hurried import Hurried
from ds_recipes.training.stop import StopRequest

PROGRAM = """
import sys, time
from pathlib import Path
from ds_recipes.training.stop import StopRequest
from ds_recipes.world import signals

signals.REPEAT_SECONDS = 0.5
signals.listen()
assert "torch" not in sys.modules, "signals are heard before torch is imported, which takes seconds"
request = StopRequest(Path(sys.argv[1]), True, time.monotonic(), None)
print("ready", flush=True)
while request.reason() is None:
    time.sleep(0.01)
print(request.reason(), flush=True)
sys.stdin.readline()
request.honoured()
"""

BUSY = """
import ctypes, os, time
from ds_recipes.world import signals

signals.REPEAT_SECONDS = 0.5
signals.listen()
print("ready", flush=True)
libc = ctypes.CDLL(None)
until = time.monotonic() + 30
while time.monotonic() < until:
    libc.sleep(30)  # not the interpreter's sleep: no handler of Python's runs in the main thread
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_signal_is_a_wish_and_its_echo_is_the_same_wish(tmp_path: Path) -> None:
    names = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]
    for name, process in [(name, start(PROGRAM, str(tmp_path))) for name in names]:
        process.send_signal(signal.Signals[name])
        assert line(process) == f"signal {name}"
        process.send_signal(signal.SIGTERM)
        process.communicate("go on\n", timeout=10)
        assert process.returncode == 0


def test_a_later_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    process = start(PROGRAM, str(tmp_path))
    process.send_signal(signal.SIGUSR1)
    assert line(process) == "signal SIGUSR1"
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


def test_signals_are_heard_while_the_main_thread_is_in_a_library(tmp_path: Path) -> None:
    process = start(BUSY)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 128 + signal.SIGINT


class Clock:
    """A monotonic clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_deadline_counts_from_the_launch_and_keeps_time_for_a_step_and_a_save(tmp_path: Path) -> None:
    clock = Clock()
    request = StopRequest(tmp_path, True, clock.now - 10, 60, clock)
    assert request.reason(reserve_seconds=49.9) is None
    assert request.reason(reserve_seconds=50) == "stop_after 60 s"
    clock.now += 50
    assert request.reason() == "stop_after 60 s"


def test_a_deadline_that_has_passed_at_the_start_is_a_wish_at_once(tmp_path: Path) -> None:
    assert StopRequest(tmp_path, False, 1000.0, 5, lambda: 1005.0).reason() == "stop_after 5 s"


@pytest.mark.parametrize("wall_clock", [0.0, 4e9])
def test_a_wall_clock_that_jumps_moves_no_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wall_clock: float
) -> None:
    request = StopRequest(tmp_path, True, time.monotonic(), 3600)
    monkeypatch.setattr(time, "time", lambda: wall_clock)
    assert request.reason(reserve_seconds=3500) is None
    assert request.reason(reserve_seconds=3600) == "stop_after 3600 s"


def test_an_older_file_is_removed_and_a_newer_one_is_heeded(tmp_path: Path) -> None:
    file = tmp_path / "STOP"
    file.touch()
    started = time.monotonic() - 5
    for age_seconds, stays in ((60, False), (1, True)):
        file.touch()
        os.utime(file, (time.time() - age_seconds,) * 2)
        request = StopRequest(tmp_path, True, started, None)
        assert file.exists() == stays
        assert request.reason() == ("the file STOP" if stays else None)
    assert list(tmp_path.iterdir()) == [file], "it stays until the checkpoint is published"
    request.honoured()
    assert not list(tmp_path.iterdir())


def test_only_rank_zero_looks_for_the_file_and_the_others_hear_of_it(tmp_path: Path) -> None:
    zero, one = (StopRequest(tmp_path, is_zero, time.monotonic(), None) for is_zero in (True, False))
    (tmp_path / "STOP").touch()
    assert zero.reason() == "the file STOP"
    assert one.reason() is None
    one.hear(zero.reason)
    assert one.reason() == "the file STOP"
    one.honoured()
    assert (tmp_path / "STOP").exists()


def test_a_file_that_was_seen_counts_even_when_it_is_taken_back(tmp_path: Path) -> None:
    request = StopRequest(tmp_path, True, time.monotonic(), None)
    (tmp_path / "STOP").touch()
    assert request.reason() == "the file STOP"
    (tmp_path / "STOP").unlink()
    assert request.reason() == "the file STOP", "another rank may have acted on it"


class Ones:
    """A range reader of ones that counts how often it is read."""

    optimizer_step = 7
    missed_steps = NONE_MISSED
    names = ("a", "b")
    reads = 0

    def shape(self, name: str) -> tuple[int, ...]:
        return (4,)

    def has(self, kind: str) -> bool:
        return kind == "fp32"

    def read_into(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        self.reads += 1
        out.fill_(1)


def test_a_hurried_reader_reads_nothing_more_once_somebody_asks() -> None:
    reader, asked = Ones(), [None, "signal SIGTERM"]
    hurried = Hurried(reader, lambda: asked.pop(0))
    first, second = torch.full((4,), 5.0), torch.full((4,), 5.0)
    hurried.read_into("fp32", "a", 0, first)
    hurried.read_into("fp32", "b", 0, second)
    assert first.tolist() == [1.0] * 4 and second.tolist() == [0.0] * 4
    assert reader.reads == 1
    assert (hurried.names, hurried.shape("a"), hurried.has("exp_avg"), hurried.optimizer_step) == (
        reader.names,
        (4,),
        False,
        7,
    )
