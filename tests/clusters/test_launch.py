"""tools/launch.py before a launcher: its status is the run's, whatever is killed, and nothing is left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ds_recipes.errors import STOPPED_EARLY
from tests.clusters.launching import Launched, on_one_host
from tests.clusters.test_launcher_kills import GONE_SECONDS, LAUNCH_PY, SLOW, START_SECONDS
from tests.e2e.launchers import ROOT, environment
from tests.ranks.training import until_step

TOOL = ROOT / "tools" / "launch.py"


def start(launcher: str, nano: Path, run: Path, steps: int = 100_000, options: Sequence[str] = ()) -> Launched:
    flags = ["--config", str(nano), "--save_checkpoint_path", str(run), "--max_steps", str(steps), "--lr_warmup", "0"]
    before = [sys.executable, str(TOOL), "--"]
    folder = run.with_name(f"{run.name}-launch")
    return on_one_host(launcher, folder, ROOT / "train.py", *flags, before=before, options=options)


def child(launched: Launched) -> int:
    """The launcher itself, which the tool has started."""
    pid = launched.launchers[0].pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


VICTIMS = {
    "the launcher": child,
    "launch.py": lambda launched: launched.find(LAUNCH_PY),
    "rank 0": lambda launched: launched.find_rank(0),
    "rank 1": lambda launched: launched.find_rank(1),
}
KILLS = [
    ("deepspeed", "launch.py"),  # deepspeed ends with 0
    *(
        pytest.param(launcher, victim, marks=SLOW)
        for launcher in ("deepspeed", "mpirun", "torchrun")
        for victim in ("the launcher", "rank 0", "rank 1")
    ),
]


def last_line(launched: Launched) -> str:
    return launched.output().splitlines()[-1]


@pytest.mark.parametrize(("launcher", "victim"), KILLS)
def test_a_kill_is_a_failure_and_leaves_no_process(nano: Path, tmp_path: Path, launcher: str, victim: str) -> None:
    run = tmp_path / "run"
    launched = start(launcher, nano, run)
    try:
        until_step(run, 3, START_SECONDS)
        os.kill(VICTIMS[victim](launched), signal.SIGKILL)
        launched.seconds_until_gone(2 * GONE_SECONDS)
    finally:
        launched.kill()
    (status,) = launched.statuses()
    assert status is not None and status > 0 and status != STOPPED_EARLY, launched.output()
    assert last_line(launched).startswith("launch ") and "the launcher ended with status" in last_line(launched)
    state = "running" if victim == "rank 0" else "failed"  # rank 0 is who would note it
    assert json.loads((run / "run.json").read_text())["state"] == state


@SLOW  # of every day: SLURM's script, tests/ranks/test_stopping.py
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "mpirun"])
def test_a_signal_saves_and_is_75_and_the_next_launch_completes(nano: Path, tmp_path: Path, launcher: str) -> None:
    run = tmp_path / "run"
    launched = start(launcher, nano, run, options=("--max-restarts", "3") if launcher == "torchrun" else ())
    try:
        until_step(run, 3, START_SECONDS)
        launched.launchers[0].send_signal(signal.SIGTERM)
        launched.seconds_until_gone(2 * GONE_SECONDS)
    finally:
        launched.kill()
    assert launched.statuses() == [STOPPED_EARLY], launched.output()
    assert "stopped after step" in last_line(launched) and not (run / "STOP").exists()
    assert [entry["state"] for entry in json.loads((run / "run.json").read_text())["launches"]] == ["stopped"]
    (step,) = [json.loads(path.read_text())["step"] for path in run.glob("iter_*/manifest.json")]
    launched = start(launcher, nano, tmp_path / "short", steps=2)
    launched.seconds_until_gone(START_SECONDS)
    assert launched.statuses() == [0], launched.output()
    assert "complete: step 2 of 2" in last_line(launched) and step >= 3


def test_what_is_wrong_is_told_before_anything_is_started(nano: Path, tmp_path: Path) -> None:
    for words, said in (
        (["deepspeed", "other.py"], "starts no train.py"),
        (["deepspeed", "train.py", "--config", str(nano), "--max_stepz", "3"], "max_stepz"),
        (
            ["no_launcher", "train.py", "--config", str(nano), "--save_checkpoint_path", str(tmp_path)],
            "cannot be started",
        ),
        (["deepspeed", "train.py", "--help"], "only prints something"),
    ):
        command = [sys.executable, str(TOOL), "--", *words]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60)
        assert ended.returncode == 2 and said in ended.stderr, ended.stderr
        assert "Traceback" not in ended.stderr
