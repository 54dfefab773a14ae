"""A host that goes without closing its connections (no power, its link is down): the others leave within the limit and name it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.clusters.hosts import INTERFACE, Host, needs_two_hosts
from tests.clusters.launching import on_two_hosts
from tests.clusters.test_launcher_kills import SLOW, START_SECONDS
from tests.e2e.launchers import ROOT
from tests.ranks.training import until_step

pytestmark = needs_two_hosts
LIMIT_SECONDS = 8
LAUNCHER_SECONDS = 120.0
TRAIN = str(ROOT / "train.py")
TOOL = [sys.executable, str(ROOT / "tools" / "launch.py"), "--"]


def ranks_on(host: Host) -> dict[int, str]:
    """What train.py itself runs in: the words before it are Python's."""
    found = {}
    for pid, text in host.processes().items():
        words = text.split()
        if TRAIN in words and all("python" in Path(word).name or word == "-u" for word in words[: words.index(TRAIN)]):
            found[pid] = text
    return found


@pytest.mark.parametrize(
    ("launcher", "waits"),
    [
        ("deepspeed", False),
        *(pytest.param(name, True, marks=SLOW) for name in ("deepspeed", "mpirun", "torchrun")),
    ],
)
def test_all_ranks_leave_within_the_limit_and_the_host_is_named(
    launcher: str, waits: bool, hosts: tuple[Host, Host], nano: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ["--config", str(nano), "--save_checkpoint_path", str(run), "--max_steps", "100000", "--lr_warmup", "0"]
    limits = ["--hang_limits", f"step={LIMIT_SECONDS}s"]
    before = [] if launcher == "torchrun" else TOOL
    launched = on_two_hosts(launcher, hosts, tmp_path / "launch", Path(TRAIN), *flags, *limits, before=before)
    try:
        until_step(run, 3, START_SECONDS)
        subprocess.run(["ip", "-n", hosts[1].namespace, "link", "set", INTERFACE, "down"], check=True)
        gone_at = time.monotonic()
        while left := {host.name: found for host in hosts if (found := ranks_on(host))}:
            assert time.monotonic() < gone_at + LIMIT_SECONDS + 30, f"left: {left}\n{launched.output()}"
            time.sleep(0.1)
        print(f"{launcher}: all ranks left {time.monotonic() - gone_at:.1f} s after the link")
        if waits:
            assert launched.launchers[0].wait(LAUNCHER_SECONDS) not in (0, None), launched.output()
            print(f"its launcher {time.monotonic() - gone_at:.1f} s after the link")
    finally:
        launched.kill()
        subprocess.run(["ip", "-n", hosts[1].namespace, "link", "set", INTERFACE, "up"], check=True)
    text = launched.output()
    named = re.findall(r"Rank [23] on beta hangs in phase step", text)
    assert len(named) == 1 and "its host or the way to it is gone" in text, text
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "failed" and record["reason"].startswith(named[0])
