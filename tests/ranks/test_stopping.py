"""A run that is asked to stop, in each of its phases: all ranks leave together with status 75, and nothing is lost."""

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.nano import make_nano
from tests.ranks.signalled import acted_at, signalled, when
from tests.ranks.training import Ended, metrics, train, train_py

STEPS = 20
MICRO_STEPS = 6  # of two ranks
FLAGS = (
    "--save_interval_iteration",
    "5",
    "--eval_interval",
    "10",
    "--max_steps",
    str(STEPS),
    "--num_workers_tokenise",
    "0",
)
BROKEN_OFF_SECONDS = 5.0
"""Work is broken off, and the ranks are gone, in less time than this; all of it would take much longer."""

ENGINE = "ds_recipes.engine.zero3.step:ZeroEngine"
ASKED = {
    # launch by launch of one run: what happens where, on which ranks
    "tokenising": ("ds_recipes.data.tokens.make:PartMaker.make", "STOP", (1,), 3),
    "loading": ("ds_recipes.training.hurried:Hurried.read_into", "SIGTERM", (1,), 2),
    "accumulating": (f"{ENGINE}.backward", "SIGINT", (0,), 2 * MICRO_STEPS + 3),
    "evaluating": ("ds_recipes.training.loop:evaluate", "SIGUSR1", (1,), 1),
    "saving": ("ds_recipes.training.saving:Saving.save", "SIGUSR2", (0, 1), 1),
    "at the end": ("ds_recipes.training.saving:Saving.save", "SIGTERM", (1,), 1),
}
SLOW = {
    "tokenising": {"slow": "ds_recipes.data.encode:Encoder.encode", "seconds": 0.5, "small_parts": 1500},
    "loading": {"slow": "ds_recipes.models.sources:FolderWeights.read_into", "seconds": 0.5, "small_parts": 1500},
}


@dataclass(frozen=True)
class Launched:
    """How a launch ended, how long that took after the request, and what the run folder holds then."""

    ended: Ended
    seconds_to_leave: float
    record: dict[str, Any]
    checkpoints: list[int]

    @property
    def launch(self) -> dict[str, Any]:
        last: dict[str, Any] = self.record["launches"][-1]
        return last


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def folder(nano: Path) -> Path:
    return nano.parent / "stopped"


@pytest.fixture(scope="module")
def launches(nano: Path, folder: Path) -> dict[str, Launched]:
    """One run of two ranks that is asked to stop in each of its launches."""
    folder.mkdir()
    return {phase: launch(nano, folder, phase) for phase in ASKED}


def launch(nano: Path, folder: Path, phase: str) -> Launched:
    place, act, ranks, call = ASKED[phase]
    for left in folder.glob("acted-*"):
        left.unlink()
    env = when(place, act, *ranks, call=call, folder=str(folder), **SLOW.get(phase, {}))
    ended = start(nano, folder, env=env, program=signalled)
    return Launched(
        ended,
        time.monotonic() - acted_at(folder),
        json.loads((folder / "run.json").read_text()),
        sorted(int(path.parent.name.removeprefix("iter_")) for path in folder.glob("iter_*/manifest.json")),
    )


def start(nano: Path, folder: Path, *flags: str, **how: Any) -> Ended:
    argv = ("--config", str(nano), "--save_checkpoint_path", str(folder), *FLAGS, *flags)
    return train(2, *argv, outputs=nano.parent / f"outputs-{folder.name}", **how)


def hashes(folder: Path) -> dict[str, str]:
    files = json.loads((folder / f"iter_{STEPS:07d}" / "manifest.json").read_text())["files"]
    return {name: entry["xxh3_128"] for name, entry in files.items() if name.startswith("rank-")}


@pytest.mark.parametrize("phase", ["tokenising", "loading"])
def test_before_the_first_step_all_break_off_and_nothing_is_trained(launches: dict[str, Launched], phase: str) -> None:
    launched = launches[phase]
    assert launched.ended.statuses == (75, 75), launched.ended.text
    reason = {"tokenising": "the file STOP", "loading": "signal SIGTERM"}[phase]
    line = f"Stopped before the first step: {reason}, during {phase}"
    assert launched.ended.text.count(line) == 1, launched.ended.text
    assert "Traceback" not in launched.ended.text
    assert launched.record["state"] == "stopped" and launched.record["reason"].startswith(line)
    assert launched.launch["first_step"] == launched.launch["last_step"] == 0
    assert launched.checkpoints == []
    assert launched.seconds_to_leave < BROKEN_OFF_SECONDS


def test_what_was_tokenised_stays(launches: dict[str, Launched], nano: Path, folder: Path) -> None:
    assert "parts are there already" in launches["loading"].ended.text
    assert not list(nano.parent.rglob(".*.part"))
    assert not (folder / "STOP").exists()


@pytest.mark.parametrize(("phase", "step"), [("accumulating", 3), ("evaluating", 10), ("saving", 15)])
def test_later_they_agree_on_a_step_and_save_it(launches: dict[str, Launched], phase: str, step: int) -> None:
    launched = launches[phase]
    assert launched.ended.statuses == (75, 75), launched.ended.text
    assert launched.record["state"] == "stopped"
    assert launched.record["reason"] == f"signal {ASKED[phase][1]} at step {step}"
    assert launched.launch["first_step"] < launched.launch["last_step"] == step == launched.checkpoints[-1]


def test_a_run_that_is_stopped_at_its_end_is_complete(launches: dict[str, Launched]) -> None:
    launched = launches["at the end"]
    assert launched.ended.statuses == (0, 0), launched.ended.text
    assert launched.record["state"] == "complete" and launched.checkpoints[-1] == STEPS


def test_after_all_that_it_is_the_run_that_was_never_stopped(
    launches: dict[str, Launched], nano: Path, folder: Path
) -> None:
    whole = nano.parent / "whole"
    assert start(nano, whole).statuses == (0, 0)
    assert hashes(folder) == hashes(whole)
    for key, exact in {"loss": ("loss", "lr", "grad_norm", "tokens", "data_hash"), "eval_loss": ("eval_loss",)}.items():
        mine, theirs = metrics(folder, key), metrics(whole, key)
        assert sorted(mine) == sorted(theirs)
        assert [[line[name] for name in exact] for _, line in sorted(mine.items())] == [
            [line[name] for name in exact] for _, line in sorted(theirs.items())
        ]


@pytest.mark.slow
def test_a_deadline_that_passes_while_it_starts_trains_nothing(nano: Path) -> None:
    folder = nano.parent / "late"
    ended = start(nano, folder, "--stop_after", "1s")
    assert ended.statuses == (75, 75), ended.text
    assert ended.text.count("Stopped before the first step: stop_after 1 s") == 1
    assert json.loads((folder / "run.json").read_text())["state"] == "stopped"
    assert not list(folder.glob("iter_*"))


def lonely(argv: Sequence[str]) -> int:
    """Rank 0 is asked to stop while it waits for rank 1, which never comes."""
    if os.environ["RANK"] == "1":
        time.sleep(6)
        return 0
    from ds_recipes.world import rendezvous

    rendezvous.LAST_WAIT_SECONDS = 0.5
    if "--stop_after" not in argv:
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return train_py(argv)


@pytest.mark.parametrize(
    "flags", [("--stop_after", "1s"), pytest.param((), marks=pytest.mark.slow)], ids=["deadline", "signal"]
)
def test_before_the_ranks_have_met_one_leaves_without_the_others(
    nano: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    folder = tmp_path / "lonely"
    ended = start(nano, folder, *flags, program=lonely)
    assert ended.statuses == (75, 0), ended.text
    reason = "stop_after 1 s" if flags else "signal SIGTERM"
    line = f"Stopped before the first step: {reason}, during the wait for the other ranks."
    assert ended.text.count(line) == 1, ended.text
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "stopped" and record["reason"].startswith(line)
    assert record["launches"][0]["first_step"] == record["launches"][0]["last_step"] == 0


def impatient(argv: Sequence[str]) -> int:
    """Rank 1 gets a second signal while it is stuck."""
    from ds_recipes.world import signals
    from ds_recipes.world.failure import run_guarded

    signals.REPEAT_SECONDS = 0.3
    return run_guarded(impatient_main, argv)


def impatient_main(argv: Sequence[str]) -> int:
    from ds_recipes.world.group import start as start_world
    from ds_recipes.world.resolve import resolve
    from ds_recipes.world.signals import listen

    listen()
    world = start_world(resolve(os.environ), timeout_seconds=60, with_deepspeed=False)
    if world.rank == 1:
        for pause, number in ((0.0, signal.SIGTERM), (0.6, signal.SIGUSR1)):
            threading.Timer(pause, os.kill, (os.getpid(), number)).start()
        time.sleep(60)
    world.sum([world.rank])
    return 0


def test_a_second_signal_ends_a_rank_at_once_and_the_others_follow(tmp_path: Path) -> None:
    ended = train(2, outputs=tmp_path, program=impatient, timeout=60)
    assert ended.statuses == (1, 128 + signal.SIGUSR1), ended.text
    assert ended.text.count("Lost contact with rank 1.") == 1, ended.text


@pytest.mark.parametrize("act", ["limit", "SIGKILL"])
def test_a_rank_that_runs_out_of_memory_while_it_loads_takes_all_with_it(nano: Path, act: str) -> None:
    """The kernel kills a rank without a word; the other is reading a file then, which nobody interrupts."""
    folder = nano.parent / f"memory-{act}"
    folder.mkdir()
    slow = {"slow": "ds_recipes.models.sources:FolderWeights.read_into", "seconds": 60, "slow_ranks": [0]}
    env = when("ds_recipes.training.start:load_start", act, 1, folder=str(folder), **(slow if act == "SIGKILL" else {}))
    ended = start(nano, folder, env=env, program=signalled)
    assert time.monotonic() - acted_at(folder) < 15
    assert 0 not in ended.statuses and 75 not in ended.statuses, ended.text
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "failed"
    if act == "SIGKILL":
        assert ended.statuses[1] == -signal.SIGKILL
        assert ended.text.count("Lost contact with rank 1 on ") == 1, ended.text
        assert "the process has ended. Was it killed? Out of memory is the usual cause" in ended.text, ended.text
    else:
        assert "rank 1 of 2" in ended.text.lower() or "rank 1 failed" in ended.text.lower(), ended.text
        assert "emory" in ended.text, ended.text


SWEEP = {
    "reading": "ds_recipes.training.start:read_inputs",
    "tokenising": ASKED["tokenising"][0],
    "packing": "ds_recipes.data.rows:pack",
    "verifying": "ds_recipes.training.start:find_start",
    "building": "ds_recipes.training.start:create_engine",
    "loading": ASKED["loading"][0],
    "checking": "ds_recipes.training.start:check_model",
    "assembling": "ds_recipes.training.start:start_trackers",
    "taking": "ds_recipes.data.stream:Stream.take",
    "updating": f"{ENGINE}.update",
    "evaluating": "ds_recipes.training.loop:evaluate",
    "saving": "ds_recipes.training.saving:Saving.save",
    "publishing": "ds_recipes.checkpoint.store:publish",
}
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("phase", SWEEP)
def test_any_signal_to_any_rank_in_any_phase(nano: Path, tmp_path: Path, phase: str, ranks: tuple[int, ...]) -> None:
    act = SIGNALS[(list(SWEEP).index(phase) + sum(ranks)) % len(SIGNALS)]
    folder = tmp_path / "run"
    folder.mkdir()
    env = when(SWEEP[phase], act, *ranks, folder=str(folder))
    flags = ("--data_cache", str(tmp_path / "cache"))
    ended = start(nano, folder, *flags, env=env, program=signalled)
    assert not list(folder.glob(".iter_*"))
    record = json.loads((folder / "run.json").read_text())
    if not list(folder.glob("acted-*")):
        assert phase in ("tokenising", "packing", "publishing") and ranks == (1,), "rank 0 did that for all"
        assert ended.statuses == (0, 0), ended.text
        return
    assert ended.statuses == (75, 75), ended.text
    assert record["state"] == "stopped" and f"signal {act}" in record["reason"]
    steps = record["launches"][-1]["first_step"], record["launches"][-1]["last_step"]
    newest = max(
        (int(path.parent.name.removeprefix("iter_")) for path in folder.glob("iter_*/manifest.json")), default=0
    )
    assert steps == (0, newest), "every step that was taken is in the checkpoint"
    assert start(nano, folder, *flags).statuses == (0, 0)
