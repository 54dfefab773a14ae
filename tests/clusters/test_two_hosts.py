"""Four ranks on two hosts train exactly as four on one, under each launcher that reaches other hosts; then one is killed."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.hosts import Host, needs_two_hosts
from tests.clusters.launching import Launched, on_two_hosts
from tests.e2e.launchers import ROOT
from tests.e2e.test_launchers import EXACT
from tests.ranks.training import metrics, train, until_step

pytestmark = needs_two_hosts
STEPS = 6
START_SECONDS = 240.0
LEAVE_SECONDS = 15.0


def flags(nano: Path, folder: Path, steps: int) -> list[str]:
    """The first steps are the same whatever their number: the learning rate does not depend on it."""
    constant = ["--lr_warmup", "0", "--lr_decay_style", "constant", "--max_steps", str(steps)]
    zero3 = ["--ds_config", str(ROOT / "ds_configs" / "zero3.json")]
    return ["--config", str(nano), *zero3, *constant, "--save_checkpoint_path", str(folder)]


def exact_lines(folder: Path) -> list[list[Any]]:
    """What each of the first steps logged."""
    return [[line[key] for key in EXACT] for step, line in sorted(metrics(folder).items()) if step <= STEPS]


@pytest.fixture(scope="module")
def one_host(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What four ranks on one host log."""
    folder = tmp_path_factory.mktemp("one_host")
    ended = train(4, *flags(nano, folder / "run", STEPS), outputs=folder / "outputs")
    assert ended.statuses == (0, 0, 0, 0), ended.text
    return exact_lines(folder / "run")


def test_deepspeed_ends_with_the_losses_of_one_host(
    hosts: tuple[Host, Host], nano: Path, one_host: list[list[Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launched = on_two_hosts("deepspeed", hosts, tmp_path / "launch", ROOT / "train.py", *flags(nano, run, STEPS))
    try:
        assert launched.launchers[0].wait(START_SECONDS) == 0, launched.output()
        launched.seconds_until_gone(LEAVE_SECONDS)
    finally:
        launched.kill()
    assert len(one_host) == STEPS and exact_lines(run) == one_host
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "complete" and record["launches"][0]["hosts"] == ["alpha", "beta"]


@pytest.mark.slow  # of every day: deepspeed over two hosts; on one mpirun (test_launcher_kills.py) and torchrun (test_restarts.py)
@pytest.mark.parametrize(
    ("launcher", "find_victim", "statuses"),
    [
        ("mpirun", lambda launched: launched.launchers[0].pid, [-9]),
        ("torchrun", lambda launched: launched.find_rank(3), [1, 1]),
    ],
)
def test_the_losses_of_one_host_then_a_kill_ends_all(
    launcher: str,
    find_victim: Callable[[Launched], int],
    statuses: list[int],
    hosts: tuple[Host, Host],
    nano: Path,
    one_host: list[list[Any]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    launched = on_two_hosts(launcher, hosts, tmp_path / "launch", ROOT / "train.py", *flags(nano, run, 100000))
    try:
        until_step(run, STEPS, START_SECONDS)
        os.kill(find_victim(launched), signal.SIGKILL)
        launched.seconds_until_gone(LEAVE_SECONDS)
    finally:
        launched.kill()
    assert launched.statuses() == statuses, launched.output()
    assert len(one_host) == STEPS and exact_lines(run) == one_host
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "failed" and record["launches"][0]["hosts"] == ["alpha", "beta"]
