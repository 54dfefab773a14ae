"""A rank is killed while the model is loaded, as the kernel does to one that needs too much memory: all leave, and say which."""

import json
import re
import time
from pathlib import Path

import pytest

from tests.clusters.launching import on_one_host
from tests.clusters.test_launcher_kills import GONE_SECONDS, START_SECONDS
from tests.e2e.launchers import ROOT
from tests.ranks.signalled import acted_at, when

SIGNALLED = ROOT / "tests" / "ranks" / "signalled.py"
LOADING = "ds_recipes.training.hurried:Hurried.read_into"
READS_SLOWLY = {"slow": "ds_recipes.models.sources:FolderWeights.read_into", "seconds": 60, "slow_ranks": [0]}
LOST = re.compile(
    r"Lost contact with rank 1( on \S+: the process has ended)?\. Was it killed\? Out of memory is the usual cause"
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("meanwhile", ["reading", "waiting"])
def test_all_leave_and_the_lost_rank_is_named(nano: Path, tmp_path: Path, launcher: str, meanwhile: str) -> None:
    """Rank 1 is lost while rank 0 reads a file, which no other rank's end interrupts, or waits in a collective."""
    run = tmp_path / "run"
    run.mkdir()
    slow = READS_SLOWLY if meanwhile == "reading" else {}
    env = when(LOADING, "SIGKILL", 1, call=2, folder=str(run), **slow)
    flags = ["--config", str(nano), "--save_checkpoint_path", str(run)]
    launched = on_one_host(launcher, tmp_path / "launch", SIGNALLED, *flags, env=env)
    deadline = time.monotonic() + START_SECONDS
    try:
        while not list(run.glob("acted-*")):
            assert time.monotonic() < deadline and launched.processes(), launched.output()
            time.sleep(0.05)
        launched.seconds_until_gone(GONE_SECONDS)
        seconds = time.monotonic() - acted_at(run)
    finally:
        launched.kill()
    output = launched.output()
    print(f"{launcher}, {meanwhile}: all gone after {seconds:.1f} s, status {launched.statuses()}\n{output[-3000:]}")
    assert seconds < GONE_SECONDS
    assert launched.statuses()[0] not in (0, 75), output
    assert json.loads((run / "run.json").read_text())["state"] == "failed"
    assert len(LOST.findall(output)) == 1, output
