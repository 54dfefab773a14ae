"""Whole runs that meet a fault and are started again end as the run that met none, to the bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.fsops import faults
from tests.faults.cases import CASES
from tests.faults.nano_runs import BEGIN, STOPPED, LoggedCall, References, check_faulted, check_whole
from tests.faults.rounds import draw, run
from tests.ranks.training import Ended

EVERY_DAY = 10
SEED = int(os.environ.get("SEED", "13"))
"""Of the first of them; another number in the environment gives ten others. A round that fails is added to `CASES`."""


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize("name", CASES)
def test_a_case(name: str, references: References, tmp_path: Path) -> None:
    statuses = run(CASES[name], references, tmp_path / "run")
    assert set(statuses) != {0}, "nothing happened: the test shows nothing"
    is_killed = CASES[name].signal == "KILL" or any(word in CASES[name].faults for word in ("kill@", "tear@"))
    assert (-signal.SIGKILL in statuses) == is_killed, statuses


@pytest.mark.parametrize("seed", range(SEED, SEED + EVERY_DAY))
def test_a_round_of_a_seed(seed: int, references: References, tmp_path: Path) -> None:
    planned = draw(seed, references)
    print(f"SEED={seed}: {planned}")
    run(planned, references, tmp_path / "run")


class SomeCalls:
    """Stands for the runs that a round is drawn from."""

    def get(self, engine: str, ranks: int) -> "SomeCalls":
        return self

    @property
    def calls(self) -> list[list[LoggedCall]]:
        kinds = ("create", "write", "fsync", "mkdir", "rename", "unlink", "fsync_folder", "open", "stat")
        return [[LoggedCall(kind, f"/run/{name}") for kind in kinds for name in ("iter_0000002", "run.json")]] * 2

    first_calls = later_calls = calls


def test_a_seed_always_means_the_same_round_and_seeds_differ() -> None:
    references: Any = SomeCalls()
    rounds = [draw(seed, references) for seed in range(300)]
    assert rounds == [draw(seed, references) for seed in range(300)]
    assert len(set(rounds)) > 250
    assert {drawn.engine for drawn in rounds} == {"fsdp", "deepspeed"}
    assert all(drawn.faults or drawn.signal for drawn in rounds)
    for drawn in rounds:
        faults.parse(drawn.faults)


def test_a_run_that_ends_otherwise_is_found(references: References, tmp_path: Path) -> None:
    reference, folder = references.get("fsdp", 2), tmp_path / "other"
    reference.put_checkpoints(folder, BEGIN)
    assert reference.launch(folder, "--lr", "2e-3", "--allow_change", "schedule").statuses == (0, 0)
    with pytest.raises(AssertionError):
        check_whole(reference, folder, BEGIN)


def test_what_must_hold_after_a_fault_is_really_asked_for(references: References, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    references.get("fsdp", 2).put_checkpoints(folder, BEGIN)
    failed, complete, stopped = (Ended((status, status), ("", "")) for status in (1, 0, STOPPED))
    check_faulted(folder, failed, before=BEGIN)
    with pytest.raises(AssertionError, match="step 6 is lost"):
        check_faulted(folder, failed, before=6)
    with pytest.raises(AssertionError, match="but 4 is the newest"):
        check_faulted(folder, complete, before=BEGIN)
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    with pytest.raises(AssertionError, match="stopped after step 5"):
        check_faulted(folder, stopped, before=BEGIN)
    (folder / "events.jsonl").write_text('{"kind": "saved", "step": 6}\n')
    with pytest.raises(AssertionError, match="step 6 was reported as saved"):
        check_faulted(folder, failed, before=BEGIN)
