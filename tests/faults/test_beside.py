"""What lies beside the checkpoints can be gone on from after every state too: the lock, the run's record, the caches."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_recipes.checkpoint import run_lock
from ds_recipes.checkpoint.load import find_newest, remove_partials, set_aside
from ds_recipes.data.published import publishing
from ds_recipes.fsops.durable import replace_file, write_file
from ds_recipes.world.group import solo
from tests.faults.disk import Crash, Disk, Scratch, crashes, read_tree, write_tree
from tests.faults.recording import recording
from tests.faults.test_replay import CUTS, SEED
from tests.unit.checkpoint.flat_engine import save


def states(folder: Path, scenario: Callable[[Callable[[int], None]], None]) -> list[Crash]:
    """The states of a scenario, which calls what it is given when something is promised."""
    disk = Disk(folder)
    with recording() as events:
        scenario(events.append)
    return list(crashes(disk, events, SEED, CUTS))


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    order = ["running", "stopped", "complete"]

    def record(promise: Callable[[int], None]) -> None:
        for number, state in enumerate(order[1:], 1):
            replace_file(tmp_path / "run.json", json.dumps({"state": state}).encode())
            promise(number)

    (tmp_path / "run.json").write_text(json.dumps({"state": order[0]}))
    for crash in states(tmp_path, record):
        state = json.loads(crash.tree["run.json"] or b"")["state"]
        assert order.index(state) >= (crash.saved or 0), crash


@pytest.mark.parametrize("was_held", [False, True])
def test_the_lock_can_be_taken_after_each_state_and_then_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_held: bool
) -> None:
    """After a power cut the host has another boot id, and no process of the boot before is waited for."""
    folder, boots = tmp_path / "run", iter(range(100_000))
    folder.mkdir()
    monkeypatch.setattr(run_lock, "_here", lambda: f"boot {next(boots)}")
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.0)
    if was_held:
        run_lock.take(folder, "before", lambda line: None).release()

    def take(promise: Callable[[int], None]) -> None:
        held = run_lock.take(folder, "launch", lambda line: None)
        promise(number_of(folder))
        held.release()

    for number, crash in enumerate(states(folder, take)):
        left = write_tree(crash.tree, tmp_path / f"state{number}")
        held = run_lock.take(left, "next", lambda line: None)
        held.check()
        assert number_of(left) > (crash.saved or 0), crash
        held.release()
        assert not [path for path in (left / run_lock.LOCK).iterdir() if path.name.startswith(".")], crash
        shutil.rmtree(left)


def number_of(folder: Path) -> int:
    return max(int(path.name) for path in (folder / run_lock.LOCK).iterdir() if path.name.isdecimal())


def test_a_derived_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def publish(promise: Callable[[int], None]) -> None:
        with publishing(tmp_path / "tokens") as part:
            write_file(part / "ids.npy", [b"12345"])
        promise(1)

    for crash in states(tmp_path, publish):
        there = {name: data for name, data in crash.tree.items() if name.startswith("tokens")}
        assert there == ({"tokens": None, "tokens/ids.npy": b"12345"} if there or crash.saved else {}), crash


def test_setting_checkpoints_aside_or_removing_unfinished_ones_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = {step: read_tree(save(folder, step)) for step in (1, 2, 3)}
    (folder / ".iter_0000004.partial-other").mkdir()
    (folder / ".iter_0000004.partial-other" / "manifest.json").write_bytes(b"{}")

    def go_back(promise: Callable[[int], None]) -> None:
        remove_partials(folder, solo())
        promise(3)
        assert len(set_aside(folder, 1, "attempt", solo())) == 2
        promise(1)

    scratch = Scratch(tmp_path / "scratch")
    for crash in states(folder, go_back):
        left = scratch.show(crash.tree)
        found = find_newest(left, solo())
        assert found is not None and not found.skipped, crash
        assert found.manifest.step == (crash.saved or 3) or crash.saved == 3, crash
        there = [path for path in left.iterdir() if path.name.startswith("iter_")]
        assert sorted(str(read_tree(path)) for path in there) == sorted(map(str, whole.values())), crash


def test_a_run_folder_that_was_just_made_is_not_lost_with_its_first_checkpoint(tmp_path: Path) -> None:
    def begin(promise: Callable[[int], None]) -> None:
        save(tmp_path / "runs" / "first", 1)
        promise(1)

    scratch = Scratch(tmp_path.with_name(f"{tmp_path.name}-scratch"))
    for crash in states(tmp_path, begin):
        found = find_newest(scratch.show(crash.tree) / "runs" / "first", solo())
        assert (found is not None) >= (crash.saved is not None), crash
