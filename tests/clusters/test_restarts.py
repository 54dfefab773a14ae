"""torchrun --max-restarts: a killed rank is started again in place, and the run ends as one that nobody disturbed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.world.channel import wait_until
from tests.clusters.hosts import Host, needs_two_hosts
from tests.clusters.launching import Launched, on_one_host, on_two_hosts
from tests.clusters.test_launcher_kills import GONE_SECONDS, START_SECONDS
from tests.e2e.launchers import ROOT
from tests.ranks.training import metrics, train, until_step

STEPS = 24
SAVED_EVERY = 5
RESTARTS = ("--max-restarts", "3")
EXACT = ("loss", "grad_norm", "lr", "tokens", "data_hash")


def flags(nano: Path, run: Path) -> list[str]:
    settings = {"max_steps": STEPS, "save_interval_iteration": SAVED_EVERY}
    given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["--config", str(nano), "--save_checkpoint_path", str(run), *given]


def history(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in EXACT) for _, line in sorted(metrics(run).items())]


def weights(run: Path) -> dict[str, str]:
    """The hashes of what the ranks saved after the last step."""
    files = json.loads((run / f"iter_{STEPS:07d}" / "manifest.json").read_text())["files"]
    return {name: entry["xxh3_128"] for name, entry in files.items() if name.startswith("rank-")}


def launches(run: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((run / "run.json").read_text())["launches"]
    return entries


def last_save(step: int) -> int:
    return step // SAVED_EVERY * SAVED_EVERY


def kill_and_wait(launched: Launched, run: Path, victims: dict[int, int]) -> None:
    """Kill ranks, each once a step is logged and the save before it published, and wait for the end of the launch."""
    try:
        for step, rank in victims.items():
            until_step(run, step, START_SECONDS)
            assert wait_until((run / f"iter_{last_save(step):07d}").exists, START_SECONDS), launched.output()
            os.kill(launched.find_rank(rank), signal.SIGKILL)
        launched.seconds_until_gone(START_SECONDS)
    finally:
        launched.kill()


def undisturbed(nano: Path, ranks: int) -> Path:
    run = nano.parent / f"undisturbed-{ranks}"
    if not run.exists():
        ended = train(ranks, *flags(nano, run), outputs=nano.parent / f"outputs-{ranks}", timeout=START_SECONDS)
        assert set(ended.statuses) == {0}, ended.text
    return run


@pytest.mark.parametrize(
    "victims",
    [{7: 0}, pytest.param({11: 1}, marks=pytest.mark.slow), pytest.param({6: 0, 11: 1, 16: 0}, marks=pytest.mark.slow)],
    ids=["rank 0", "rank 1", "three times"],
)
def test_a_killed_rank_is_started_again_and_nothing_else_changes(
    nano: Path, tmp_path: Path, victims: dict[int, int]
) -> None:
    run = tmp_path / "run"
    launched = on_one_host("torchrun", tmp_path / "launch", ROOT / "train.py", *flags(nano, run), options=RESTARTS)
    kill_and_wait(launched, run, victims)
    assert launched.statuses() == [0], launched.output()
    entries = launches(run)
    assert [entry["state"] for entry in entries] == ["failed"] * len(victims) + ["complete"]
    for step, entry in zip(victims, entries[1:], strict=True):
        assert last_save(step) <= entry["first_step"] and entry["first_step"] % SAVED_EVERY == 0
    assert launched.output().count("the run lock is taken over:") == list(victims.values()).count(0)
    assert "waiting up to" not in launched.output()
    whole = undisturbed(nano, 2)
    assert history(run) == history(whole) and len(history(run)) == STEPS
    assert weights(run) == weights(whole)


def test_what_a_further_try_cannot_mend_is_tried_once(nano: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wrong = [*flags(nano, run), "--train_dataa", "x"]
    launched = on_one_host("torchrun", tmp_path / "launch", ROOT / "train.py", *wrong, options=RESTARTS)
    try:
        launched.seconds_until_gone(START_SECONDS)
    finally:
        launched.kill()
    output = launched.output()
    assert launched.statuses() == [1] and output.count("unknown flag --train_dataa") == 1, output
    assert output.count("is ended, so that it does not start the ranks again: status 2") == 1, output


@pytest.mark.slow
def test_the_last_try_ends_as_torchrun_without_restarts_does(nano: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--max-restarts", "1")
    launched = on_one_host("torchrun", tmp_path / "launch", ROOT / "train.py", *flags(nano, run), options=options)
    kill_and_wait(launched, run, {6: 1, 12: 1})
    assert launched.statuses() == [1], launched.output()
    assert [entry["state"] for entry in launches(run)] == ["failed", "failed"]
    assert launches(run)[1]["first_step"] >= SAVED_EVERY


@pytest.mark.slow
@needs_two_hosts
@pytest.mark.parametrize("victim", [0, 3])
def test_two_hosts_restart_together(nano: Path, tmp_path: Path, hosts: tuple[Host, Host], victim: int) -> None:
    """Their agents need not agree on how often they have done so."""
    run = tmp_path / "run"
    launched = on_two_hosts(
        "torchrun", hosts, tmp_path / "launch", ROOT / "train.py", *flags(nano, run), options=("--max-restarts", "1")
    )
    kill_and_wait(launched, run, {7: victim})
    assert launched.statuses() == [0, 0], launched.output()
    assert [entry["state"] for entry in launches(run)] == ["failed", "complete"], launches(run)
    assert history(run) == history(undisturbed(nano, 4))


@pytest.mark.slow
@needs_two_hosts
def test_two_hosts_stop_together(nano: Path, tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    run = tmp_path / "run"
    for_ever = [*flags(nano, run)[:-4], "--max_steps", "100000", "--lr_warmup", "0"]
    launched = on_two_hosts("torchrun", hosts, tmp_path / "launch", ROOT / "train.py", *for_ever, options=RESTARTS)
    try:
        until_step(run, 3, START_SECONDS)
        (run / "STOP").touch()
        launched.seconds_until_gone(2 * GONE_SECONDS)
    finally:
        launched.kill()
    assert launched.statuses() == [1, 1], launched.output()
    assert [entry["state"] for entry in launches(run)] == ["stopped"]
