"""`kill -9` of a launcher, of a part of it, or of a rank: the status says so, and nothing is left within 15 seconds."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.world.ancestors import ancestors, read_process
from tests.clusters.hosts import Host, needs_two_hosts
from tests.clusters.launching import Launched, on_one_host, on_two_hosts
from tests.e2e.launchers import ROOT
from tests.ranks.training import until_step

GONE_SECONDS = 15.0
START_SECONDS = 240.0
SLOW = pytest.mark.slow
LAUNCH_PY = "deepspeed.launcher.launch"


def session_on_beta(launched: Launched) -> int:
    """The sshd that serves the runner's connection to the second host."""
    process = read_process(launched.find(LAUNCH_PY, "--node_rank=1"))
    return next(parent.pid for parent in ancestors(process) if parent.command[0].startswith("sshd:"))


def parent_of_rank(launched: Launched, rank: int) -> int:
    process = read_process(launched.find_rank(rank))
    assert process is not None
    return process.parent


VICTIMS: dict[str, Callable[[Launched], int]] = {
    "the launcher": lambda launched: launched.launchers[0].pid,
    "launch.py": lambda launched: launched.find(LAUNCH_PY),
    "pdsh": lambda launched: launched.find("pdsh"),
    "beta's launch.py": lambda launched: launched.find(LAUNCH_PY, "--node_rank=1"),
    "beta's ssh session": session_on_beta,
    "beta's prted": lambda launched: parent_of_rank(launched, 3),  # there is another one above it
    "beta's torchrun": lambda launched: launched.launchers[1].pid,
    "rank 0": lambda launched: launched.find_rank(0),
    "rank 1": lambda launched: launched.find_rank(1),
    "rank 3": lambda launched: launched.find_rank(3),
}


def flags(nano: Path, run: Path) -> list[str]:
    """A run that goes on until somebody ends it."""
    return ["--config", str(nano), "--save_checkpoint_path", str(run), "--max_steps", "100000", "--lr_warmup", "0"]


def kill(launched: Launched, run: Path, victim: str) -> tuple[list[int | None], dict[str, Any], str]:
    """Kill the victim at the third step and wait until nothing is left; the launchers' statuses, run.json, the output."""
    try:
        until_step(run, 3, START_SECONDS)
        pid = VICTIMS[victim](launched)
        os.kill(pid, signal.SIGKILL)
        seconds = launched.seconds_until_gone(GONE_SECONDS)
    finally:
        launched.kill()
    print(f"{victim} killed: all gone after {seconds:.1f} s, status {launched.statuses()}")
    record = json.loads((run / "run.json").read_text())
    assert record["state"] != "complete", record
    if record["reason"] and "is gone" in record["reason"]:
        tellers = len(launched.launchers)  # once a host where the store through which ranks agree was torchrun's own
        assert launched.output().count("is gone, so the ranks leave") <= tellers, launched.output()
    return launched.statuses(), record, f"(process {pid} on "


ON_ONE_HOST = [
    # launcher, victim, the launcher's status
    ("deepspeed", "the launcher", -9),
    pytest.param("torchrun", "the launcher", -9, marks=SLOW),
    pytest.param("mpirun", "the launcher", -9, marks=SLOW),  # of every day: its rank 1
    pytest.param("deepspeed", "rank 0", 247, marks=SLOW),  # of every day: rank 1, in a job script
    ("mpirun", "rank 1", 137),
    pytest.param("deepspeed", "launch.py", 0, marks=SLOW),
    pytest.param("deepspeed", "rank 1", 247, marks=SLOW),
    pytest.param("torchrun", "rank 0", 1, marks=SLOW),
    pytest.param("torchrun", "rank 1", 1, marks=SLOW),
    pytest.param("mpirun", "rank 0", 137, marks=SLOW),
]


@pytest.mark.parametrize(("launcher", "victim", "status"), ON_ONE_HOST)
def test_a_kill_on_one_host_ends_all(nano: Path, tmp_path: Path, launcher: str, victim: str, status: int) -> None:
    run = tmp_path / "run"
    launched = on_one_host(launcher, tmp_path / "launch", ROOT / "train.py", *flags(nano, run))
    statuses, record, who = kill(launched, run, victim)
    assert statuses == [status], launched.output()
    if victim in ("the launcher", "launch.py"):
        assert record["state"] == "failed" and who in record["reason"], record


ON_TWO_HOSTS = [
    # launcher, victim, the launchers' statuses (torchrun: one on each host); test_two_hosts.py has some for every day
    pytest.param("deepspeed", "the launcher", [-9], marks=SLOW),
    pytest.param("deepspeed", "pdsh", [0], marks=SLOW),  # its own launcher hands on positive numbers only
    pytest.param("deepspeed", "beta's launch.py", [255], marks=SLOW),
    pytest.param("deepspeed", "beta's ssh session", [255], marks=SLOW),
    pytest.param("deepspeed", "rank 0", [247], marks=SLOW),
    pytest.param("deepspeed", "rank 3", [247], marks=SLOW),
    pytest.param("mpirun", "the launcher", [-9], marks=SLOW),
    pytest.param("mpirun", "beta's prted", [0], marks=SLOW),  # Open MPI 5.0: "PRTE has lost communication", and 0
    pytest.param("mpirun", "rank 0", [1], marks=SLOW),
    pytest.param("mpirun", "rank 3", [137], marks=SLOW),
    pytest.param("torchrun", "the launcher", [-9, 1], marks=SLOW),
    pytest.param("torchrun", "beta's torchrun", [1, -9], marks=SLOW),
    pytest.param("torchrun", "rank 0", [1, 1], marks=SLOW),
    pytest.param("torchrun", "rank 3", [1, 1], marks=SLOW),
]


@needs_two_hosts
@pytest.mark.parametrize(("launcher", "victim", "statuses"), ON_TWO_HOSTS)
def test_a_kill_on_two_hosts_ends_all(
    nano: Path, tmp_path: Path, hosts: tuple[Host, Host], launcher: str, victim: str, statuses: list[int]
) -> None:
    run = tmp_path / "run"
    launched = on_two_hosts(launcher, hosts, tmp_path / "launch", ROOT / "train.py", *flags(nano, run))
    ended, record, who = kill(launched, run, victim)
    assert ended == statuses, launched.output()
    if victim in ("the launcher", "pdsh", "beta's launch.py", "beta's ssh session"):
        assert record["state"] == "failed" and who in record["reason"], record
