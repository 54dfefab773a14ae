"""What makes a rank wish to stop: signals, the deadline, the file STOP; each in a process of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
from ds_recipes.training import stop

stop.REPEAT_SECONDS = 0.5
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else None
request = stop.StopRequest(Path(sys.argv[1]), True, time.monotonic(), seconds)
print("ready", flush=True)
while request.reason(reserve_seconds=0.2) is None:
    time.sleep(0.01)
print(request.reason(0.2), flush=True)
sys.stdin.readline()
request.honoured()
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_is_a_wish_and_its_echo_is_the_same_wish(tmp_path: Path, name: str) -> None:
    process = start(tmp_path)
    process.send_signal(signal.Signals[name])
    assert line(process) == f"signal {name}"
    process.send_signal(signal.SIGTERM)
    process.communicate("go on\n", timeout=10)
    assert process.returncode == 0


def test_a_later_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    process = start(tmp_path)
    process.send_signal(signal.SIGUSR1)
    assert line(process) == "signal SIGUSR1"
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


def test_the_deadline_keeps_time_for_a_step_and_a_save(tmp_path: Path) -> None:
    started = time.monotonic()
    process = start(tmp_path, "1.5")
    assert line(process) == "stop_after 1.5 s"
    assert 1.0 < time.monotonic() - started < 5.0
    process.communicate("\n", timeout=10)


def test_the_file_is_heeded_and_removed_and_an_older_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    process = start(tmp_path)
    assert not (tmp_path / "STOP").exists()
    time.sleep(0.1)
    assert process.poll() is None
    (tmp_path / "STOP").touch()
    assert line(process) == "the file STOP"
    assert (tmp_path / "STOP").exists(), "it stays until the checkpoint is published"
    process.communicate("\n", timeout=10)
    assert not list(tmp_path.iterdir())
