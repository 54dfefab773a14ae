"""Rank 0 is stopped under each real launcher, which may serve the store itself: the job ends, non-zero, and says why."""

import json
import os
import signal
import time
import uuid
from pathlib import Path

import pytest

from ds_recipes.world.ancestors import Process, read_process
from ds_recipes.world.channel import wait_until
from tests.e2e.launchers import LAUNCHERS, ROOT, begin, command
from tests.nano import make_nano
from tests.ranks.training import until_step

LIMIT_SECONDS = 5
LEAVE_SECONDS = 30


def rank_process(launch: str, rank: int) -> Process:
    """The process of a rank, by what stands in its environment: the launcher's number, and the launch's id."""
    for folder in Path("/proc").iterdir():
        try:
            env = dict(word.split("=", 1) for word in (folder / "environ").read_text().split("\0") if "=" in word)
        except (OSError, UnicodeDecodeError):
            continue
        number = env.get("OMPI_COMM_WORLD_RANK", env.get("RANK"))
        if env.get("DS_RECIPES_LAUNCH") == launch and number == str(rank):
            process = read_process(int(folder.name))
            if process is not None and process.name == "train.py":
                return process
    raise AssertionError(f"rank {rank} of {launch} does not run")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_stopped_rank_zero_ends_the_job(tmp_path: Path, launcher: str) -> None:
    nano, folder, launch = make_nano(tmp_path / "nano"), tmp_path / "run", uuid.uuid4().hex[:12]
    argv = ["--config", str(nano), "--save_checkpoint_path", str(folder), "--max_steps", "100000", "--lr_warmup", "0"]
    words = command(launcher, 2, ROOT / "train.py", *argv, "--hang_limits", f"step={LIMIT_SECONDS}s")
    job = begin(words, env={"DS_RECIPES_LAUNCH": launch})
    try:
        until_step(folder, 3, timeout=180)
        ranks = [rank_process(launch, rank) for rank in range(2)]
        os.kill(ranks[0].pid, signal.SIGSTOP)
        started = time.monotonic()
        output, _ = job.communicate(timeout=LIMIT_SECONDS + LEAVE_SECONDS + 30)
        seconds = time.monotonic() - started
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    line = f"Rank 0 on {os.uname().nodename} hangs in phase step"
    assert output.count(line) == 1, output
    assert seconds < LIMIT_SECONDS + LEAVE_SECONDS, output
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "failed" and record["reason"].startswith(line)
    assert wait_until(lambda: not any(rank.is_running() for rank in ranks), 5)
    assert (folder / "hang" / launch / "rank-00001.txt").exists()
