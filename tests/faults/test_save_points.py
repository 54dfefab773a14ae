"""A process that is killed, or whose call fails, at any call of a save leaves the old checkpoint or the new one, whole."""

import signal
from pathlib import Path

import pytest

from ds_recipes.errors import SaveError
from ds_recipes.fsops import calls, faults
from tests.faults.flat_saves import KEEP_LAST, check_after, count_calls, save_with
from tests.unit.checkpoint.flat_engine import save

EVERY = 2
"""Each so many-th call is taken in the tests of every day."""


def run_point(folder: Path, fault: str, ranks: int = 1) -> int:
    """Save step 3 over 1 and 2 with the fault, in processes of their own; check, and return the step that was found."""
    for step in (1, 2):
        save(folder, step)
    said = save_with(fault, folder, 3, ranks)
    if fault.startswith(("kill", "tear")):
        assert said is not None and f"status {-signal.SIGKILL}" in said, f"{fault} had no effect"
    return check_after(fault, folder, 2, 3, 4)


def sweep(folder: Path, action: str, numbers: range, ranks: int = 1, rank: int = 0) -> list[int]:
    return [
        run_point(folder / f"{rank}-{number}", f"{action}@{number} rank={rank} within=saving", ranks)
        for number in numbers
    ]


def calls_of(folder: Path, ranks: int) -> list[int]:
    for step in (1, 2):
        save(folder / "counting", step)
    return count_calls(folder / "counting", 3, ranks)


@pytest.mark.parametrize("first, action", enumerate(["kill", "tear"], 1))
def test_one_rank_killed_at_some_points(tmp_path: Path, first: int, action: str) -> None:
    found = sweep(tmp_path, action, range(first, calls_of(tmp_path, 1)[0] + 1, EVERY))
    assert found == sorted(found), "once published, a checkpoint stays"
    assert set(found) == {2, 3}


@pytest.mark.parametrize("rank, action, first", [(0, "kill", 3), (0, "tear", 5), (1, "kill", 1), (1, "tear", 2)])
def test_two_ranks_at_some_points(tmp_path: Path, rank: int, action: str, first: int) -> None:
    number = calls_of(tmp_path, 2)[rank]
    found = sweep(tmp_path, action, range(first, number + 1, 3 * EVERY), ranks=2, rank=rank)
    assert found == sorted(found)


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO", "EACCES"])
def test_a_call_that_fails_at_any_point(tmp_path: Path, error: str) -> None:
    """Before the new one has its name, the save fails with the path and the room; behind it, it may go on with a warning."""
    number, found = 1, []
    while True:
        folder = tmp_path / str(number)
        for step in (1, 2):
            save(folder, step)
        armed = faults.parse(f"fail:{error}@{number} within=saving")
        calls.interceptor = faults.Faults(armed)
        try:
            save(folder, 3, keep_last=KEEP_LAST)
        except SaveError as failed:
            assert str(folder) in str(failed) and "bytes are free" in str(failed)
        else:
            folder.with_name(f"{number}.said").write_text("3")
        finally:
            calls.interceptor = None
        found.append(check_after(f"fail:{error}@{number}", folder, 2, 3, 4))
        if armed[0].seen < number:
            break
        number += 1
    assert number > 30
    assert found == sorted(found) and set(found) == {2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "tear", "fail:ENOSPC", "fail:EIO", "fail:ESTALE", "delay:0.1"])
@pytest.mark.parametrize("ranks, rank", [(1, 0), (2, 0), (2, 1)])
def test_every_point(tmp_path: Path, action: str, ranks: int, rank: int) -> None:
    found = sweep(tmp_path, action, range(1, calls_of(tmp_path, ranks)[rank] + 1), ranks, rank)
    assert found == sorted(found)
    changes_nothing_later = rank > 0 and not action.startswith(
        "delay"
    )  # rank 0 publishes after all others have written
    assert found[-1] == (2 if changes_nothing_later else 3)
