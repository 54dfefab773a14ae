"""A rank that is stopped, in each phase: the run ends by itself, names it and its phase, and nothing is left of it."""

import json
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.nano import make_nano
from tests.ranks.signalled import acted_at, signalled, when
from tests.ranks.training import Ended, metrics, train, train_py

LIMIT_SECONDS = 5
FLAGS = {"save_interval_iteration": 4, "eval_interval": 3, "max_steps": 8, "num_workers_tokenise": 0}
ENGINE = "ds_recipes.engine.zero3.step:ZeroEngine"
MICRO_STEPS = 6  # of two ranks

PLACES: dict[str, tuple[str, int]] = {
    # phase: where the rank stops itself, at which call
    "start": ("ds_recipes.training.start:read_inputs", 1),
    "tokenise": ("ds_recipes.data.tokens.make:PartMaker.make", 2),
    "load": ("ds_recipes.training.hurried:Hurried.read_into", 3),
    "step": (f"{ENGINE}.backward", 2 * MICRO_STEPS + 3),
    "evaluate": ("ds_recipes.training.loop:evaluate", 1),
    "save": ("ds_recipes.checkpoint.files:write_tensors", 1),
}


@dataclass(frozen=True)
class Hung:
    """How a launch ended of which one rank was stopped, so long after that, and what the run folder says."""

    ended: Ended
    seconds: float
    record: dict[str, Any]
    reports: dict[str, str]  # what ranks have written, by file
    summary: dict[str, Any]


def run(nano: Path, folder: Path, flags: dict[str, Any], **how: Any) -> Ended:
    """Train on two ranks with `FLAGS`, some of them changed."""
    chosen = {"config": nano, "save_checkpoint_path": folder, **FLAGS, **flags}
    argv = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    return train(2, *argv, outputs=folder.parent / f"outputs-{folder.name}", **how)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano(tmp_path_factory.mktemp("nano"))


def stop_in(phase: str, rank: int, nano: Path, folder: Path) -> Hung:
    """Have a rank stop itself in this phase, and wait until all are gone."""
    folder.mkdir(parents=True)
    place, call = PLACES[phase]
    env = when(place, "SIGSTOP", rank, call=call, folder=str(folder), small_parts=1500)
    flags: dict[str, Any] = {"hang_limits": f"{phase}={LIMIT_SECONDS}s"}
    if phase == "tokenise":
        flags["data_cache"] = folder / "cache"
    ended = run(nano, folder, flags, env=env, program=signalled, grace=30)
    seconds = time.monotonic() - acted_at(folder)
    (reports,) = (folder / "hang").iterdir()
    return Hung(
        ended,
        seconds,
        json.loads((folder / "run.json").read_text()),
        {path.name: path.read_text() for path in reports.glob("rank-*.txt")},
        json.loads((reports / "hang.json").read_text()),
    )


def check(hung: Hung, phase: str, rank: int) -> None:
    other = 1 - rank
    text = hung.ended.text
    assert hung.ended.statuses[rank] == -9, text
    assert hung.ended.statuses[other] == 1, text
    assert hung.seconds < LIMIT_SECONDS + 30
    line = f"Rank {rank} on {os.uname().nodename} hangs in phase {phase}"
    assert text.count(line) == 1, text
    assert "its process is stopped" in text
    assert text.count("Traceback") == 0, text
    assert hung.record["state"] == "failed" and hung.record["reason"].startswith(line)
    assert hung.record["launches"][-1]["ended"] is not None
    assert list(hung.reports) == [f"rank-{other:05d}.txt"]
    stacks = hung.reports[f"rank-{other:05d}.txt"]
    assert line in stacks and "most recent call first" in stacks and "train.py" in stacks
    assert hung.summary["silent"] == [rank] and hung.summary["culprits"][0]["phase"] == phase
    assert [one["rank"] for one in hung.summary["ranks"]] == [0, 1]


EVERY_DAY = (("start", 1), ("tokenise", 0), ("load", 1), ("step", 1), ("evaluate", 0), ("save", 0))
ALL = [(phase, rank) for phase in PLACES for rank in (0, 1) if (phase, rank) not in EVERY_DAY]
AT_ONCE = 3
"""So many launches side by side: for most of their time they wait."""


@pytest.fixture(scope="module")
def of_every_day(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Future[Hung]]:
    assert run(nano, tmp_path_factory.mktemp("first") / "run", {"max_steps": 1}).statuses == (0, 0)  # tokens are made
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {
            (phase, rank): pool.submit(stop_in, phase, rank, nano, tmp_path_factory.mktemp(phase) / "run")
            for phase, rank in EVERY_DAY
        }


@pytest.mark.parametrize(("phase", "rank"), EVERY_DAY)
def test_of_every_phase_one_rank_every_day(
    of_every_day: dict[tuple[str, int], Future[Hung]], phase: str, rank: int
) -> None:
    check(of_every_day[phase, rank].result(), phase, rank)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank"), ALL)
def test_a_rank_that_is_stopped_is_named_and_all_leave(nano: Path, tmp_path: Path, phase: str, rank: int) -> None:
    check(stop_in(phase, rank, nano, tmp_path / "run"), phase, rank)


def slowed(argv: Sequence[str]) -> int:
    """Rank 1 takes three times as long for each micro-batch; windows are short, so that few steps are enough."""
    from ds_recipes.engine.zero3 import step
    from ds_recipes.world.hang import stragglers

    stragglers.WINDOW_SAMPLES, stragglers.WINDOWS = 30, 2
    if os.environ["RANK"] == "1":
        weighted = step.weighted  # called in each backward

        def slowly(*args: Any) -> Any:
            time.sleep(SLEEP_SECONDS)
            return weighted(*args)

        step.weighted = slowly  # type: ignore[attr-defined]
    return train_py(argv)


SLEEP_SECONDS = 0.1
"""Added to each micro-batch, which takes a third of that or less on an idle machine."""


def test_a_slow_rank_is_no_hang_and_is_named_once(nano: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 14, "hang_limits": f"step={LIMIT_SECONDS}s"}
    ended = run(nano, tmp_path / "run", flags, program=slowed)
    assert ended.statuses == (0, 0), ended.text
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line["kind"] == "straggler"]
    assert (event["rank"], event["host"], event["slow_in"]) == (1, os.uname().nodename, "forward and backward")
    assert ended.text.count("straggler: rank 1 on") == 1
    assert not (tmp_path / "run" / "hang").exists()


def stuck_writer(argv: Sequence[str]) -> int:
    """The thread of rank 1 that writes a checkpoint beside training does not come back."""
    from ds_recipes.checkpoint import rank_file

    if os.environ["RANK"] == "1":
        rank_file.write_tensors = lambda *_: time.sleep(600)  # type: ignore[attr-defined]
    return train_py(argv)


@pytest.mark.slow
def test_a_writer_that_hangs_beside_training_is_named(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = {"max_steps": 100_000, "lr_warmup": 0, "hang_limits": f"save={LIMIT_SECONDS}s"}
    ended = run(nano, folder, flags, program=stuck_writer, grace=30)
    assert ended.statuses == (1, 1), ended.text
    line = f"Rank 1 on {os.uname().nodename} hangs in phase save (write checkpoint)"
    assert ended.text.count(line) == 1, ended.text
    assert json.loads((folder / "run.json").read_text())["reason"].startswith(line)
    (reports,) = (folder / "hang").iterdir()
    assert {path.name for path in reports.iterdir()} == {"rank-00000.txt", "rank-00001.txt", "hang.json"}
    assert "stuck_writer" in (reports / "rank-00001.txt").read_text()
    assert metrics(folder)


@pytest.mark.slow
def test_a_rank_that_waits_for_one_that_loads_slowly_does_not_hang(nano: Path, tmp_path: Path) -> None:
    place = "ds_recipes.models.sources:FolderWeights.read_into"
    env = when(place, "SIGSTOP", folder=str(tmp_path), slow=place, seconds=0.8, slow_ranks=[1])
    flags = {"max_steps": 2, "hang_limits": f"load={LIMIT_SECONDS}s"}
    ended = run(nano, tmp_path / "run", flags, env=env, program=signalled)
    assert ended.statuses == (0, 0), ended.text


def unmet(argv: Sequence[str]) -> int:
    """Rank 0 stops itself when it has begun to listen, before rank 1 has come."""
    from ds_recipes.world import rendezvous

    if os.environ["RANK"] == "0":
        rendezvous.greet = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[assignment]
    return train_py(argv)


@pytest.mark.slow
def test_a_rank_zero_that_is_stopped_before_all_have_met_is_not_waited_for(nano: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    ended = run(nano, tmp_path / "run", {"start_timeout_seconds": 3}, program=unmet, timeout=60, grace=1)
    assert time.monotonic() - started < 55
    assert ended.statuses == (-9, 1), ended.text
    assert ended.text.count("but nobody answers there") == 1, ended.text


LONG_SECONDS = 60  # a survivor that is busy for so long, in no collective, notices nothing by itself
MOMENTS: dict[str, tuple[str, int]] = PLACES | {
    "first backward": (f"{ENGINE}.backward", 1),
    "update": (f"{ENGINE}.update", 1),
    "agreement": ("ds_recipes.world.group:World.sum", 3),
}


@pytest.mark.parametrize(
    ("moment", "victim", "busy"),
    [
        ("update", 1, True),
        pytest.param("update", 0, True, marks=pytest.mark.slow),
        *(pytest.param(moment, rank, False, marks=pytest.mark.slow) for moment in MOMENTS for rank in (0, 1)),
    ],
    ids=lambda value: str(value),
)
def test_a_rank_that_is_killed_is_missed_by_one_that_its_launcher_asks_to_stop(
    nano: Path, tmp_path: Path, moment: str, victim: int, busy: bool
) -> None:
    """torchrun sends SIGTERM to the others when one rank is gone: that must not be taken for a wish to finish the step."""
    folder = tmp_path / "run"
    folder.mkdir()
    place, call = MOMENTS[moment]
    slow = {"slow": f"{ENGINE}.update", "seconds": LONG_SECONDS, "slow_ranks": [1 - victim]} if busy else {}
    env = when(place, "SIGKILL", victim, call=call, folder=str(folder), small_parts=1500, **slow)
    flags: dict[str, Any] = {"data_cache": tmp_path / "cache"} if moment == "tokenise" else {}
    gone: list[float] = []

    def as_torchrun(processes: list[Any]) -> None:
        processes[victim].join(90)
        os.kill(processes[1 - victim].pid, signal.SIGTERM)
        processes[1 - victim].join(40)
        gone.append(time.monotonic() - acted_at(folder))

    ended = run(nano, folder, flags, env=env, program=signalled, grace=5, meanwhile=as_torchrun)
    assert ended.statuses[victim] == -9, ended.text
    assert ended.statuses[1 - victim] not in (0, 75, None), ended.text
    assert gone[0] < 15, ended.text
