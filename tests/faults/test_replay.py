"""Every state that a kill or a power cut can leave of a save, of its clean-up and of what lies beside it can be gone on from.

The real code runs once and its calls are written down; then `disk.py` makes the states, hundreds a second, and the real
`find_newest` looks at each. In the environment, SEED draws other power
cuts and CUTS more of them after each call.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from ds_recipes.checkpoint.load import checkpoints, find_newest, set_aside
from ds_recipes.checkpoint.manifest import MANIFEST
from ds_recipes.errors import CheckpointError, TrainingError
from ds_recipes.fsops import faults
from ds_recipes.world.group import solo
from tests.faults.disk import Crash, Disk, Event, Scratch, Tree, crashes, read_tree
from tests.faults.recording import recording, without
from tests.unit.checkpoint.flat_engine import save

SEED = int(os.environ.get("SEED", "6"))
CUTS = int(os.environ.get("CUTS", "25"))
Scenario = Callable[[Path, list[Event]], None]


class Recorded:
    """A scenario's calls, from what state, and what each checkpoint held when it was reported as saved."""

    def __init__(self, folder: Path, before: Sequence[int], damaged: int | None, scenario: Scenario, fault: str = ""):
        self.folder = folder
        self.before = max((step for step in before if step != damaged), default=None)
        self.damaged = damaged
        self.contents: dict[int, Tree] = {}
        folder.mkdir()
        for step in before:
            self._note(save(folder, step))
        if damaged is not None:
            path = folder / f"iter_{damaged:07d}" / "state.json"
            path.write_bytes(b"[" + path.read_bytes())
        self.num_states = 0
        self.disk = Disk(folder)
        armed = faults.Faults(faults.parse(fault)) if fault else None
        with recording(armed) as self.events:
            scenario(folder, self.events)
        for path in checkpoints(folder):
            self._note(path)

    def _note(self, path: Path) -> None:
        self.contents.setdefault(int(path.name.removeprefix("iter_")), read_tree(path))

    def bad_states(self, events: Sequence[Event] | None = None, cuts: int = CUTS) -> Iterator[str]:
        scratch = Scratch(self.folder.with_name(f"scratch{len(events or ())}"))
        for crash in crashes(self.disk, events or self.events, SEED, cuts):
            self.num_states += 1
            problem = self.problem(crash, scratch.show(crash.tree))
            if problem:
                yield f"SEED={SEED}: {problem}\n{crash}"

    def problem(self, crash: Crash, folder: Path) -> str | None:
        """What is wrong with a state: the newest is lost, torn, or something torn is in sight."""
        due = max((step for step in (self.before, crash.saved) if step is not None), default=None)
        try:
            found = find_newest(folder, solo())
        except CheckpointError as error:
            return f"nothing can be used: {error}"
        if found is None:
            return None if due is None else f"step {due} is lost"
        if due is not None and found.manifest.step < due:
            return f"step {due} is lost, step {found.manifest.step} is the newest"
        if found.path != checkpoints(folder)[len(found.skipped)]:
            return f"{found.path} is not the newest: {found.skipped}"
        for path in checkpoints(folder):
            step = int(path.name.removeprefix("iter_"))
            is_half_deleted = step < found.manifest.step and not (path / MANIFEST).exists()
            is_known = is_half_deleted or (step == self.damaged and path != found.path)
            if not is_known and read_tree(path) != self.contents.get(step):
                return f"{path.name} is in sight, and is not what was saved"
        latest = crash.tree.get("latest")
        return f"latest holds {latest!r}" if latest is not None and latest not in self.names() else None

    def names(self) -> set[bytes]:
        return {f"iter_{step:07d}\n".encode() for step in self.contents}


def save_steps(*steps: int, keep_last: int | None = None) -> Scenario:
    def scenario(folder: Path, events: list[Event]) -> None:
        for step in steps:
            save(folder, step, keep_last=keep_last)
            events.append(step)

    return scenario


def fail_to_save(folder: Path, events: list[Event]) -> None:
    with pytest.raises(TrainingError):
        save(folder, 3)
    save(folder, 4)
    events.append(4)


def save_in_its_place(folder: Path, events: list[Event]) -> None:
    """As a run that goes on from step 1 does: the damaged one of step 2 is set aside first."""
    set_aside(folder, 1, "attempt", solo())
    save(folder, 2)
    events.append(2)


SCENARIOS: Mapping[str, tuple[tuple[int, ...], int | None, Scenario, str]] = {
    "the first": ((), None, save_steps(1), ""),
    "the next": ((1,), None, save_steps(2), ""),
    "the next ones, the old ones deleted": ((1, 2), None, save_steps(3, 4, keep_last=2), ""),
    "in the place of a damaged one": ((1, 2), 2, save_in_its_place, ""),
    "disk full once while writing": ((1, 2), None, fail_to_save, "fail:ENOSPC@2 kind=write"),
    "disk full once at the manifest": ((1, 2), None, fail_to_save, "fail:ENOSPC@1 kind=write path=*manifest*"),
    "no rename": ((1, 2), None, fail_to_save, "fail:EACCES@1 kind=rename"),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_state_loses_the_newest(tmp_path: Path, name: str) -> None:
    recorded = Recorded(tmp_path / "run", *SCENARIOS[name])
    assert not list(recorded.bad_states())
    assert recorded.num_states > 80


@pytest.mark.parametrize(
    "left_out",
    [
        ("fsync", "manifest"),
        ("fsync", "rank-"),
        ("fsync", "state"),
        ("fsync_folder", "partial"),
        ("fsync_folder", "run"),
    ],
    ids=" ".join,
)
def test_each_call_of_a_save_is_needed(tmp_path: Path, left_out: tuple[str, str]) -> None:
    recorded = Recorded(tmp_path / "run", (1,), None, save_steps(2))
    assert next(recorded.bad_states(without(recorded.events, *left_out)), None) is not None


def test_deletion_needs_its_manifest_or_its_name_gone_first(tmp_path: Path) -> None:
    """Without both fsyncs, behind either, a checkpoint with files missing may come back in sight."""
    recorded = Recorded(tmp_path / "run", (1, 2), None, save_steps(3, keep_last=2))
    calls = [event for event in recorded.events if not isinstance(event, int)]
    last_rename = max(number for number, call in enumerate(calls) if call.kind == "rename")
    assert calls[last_rename].path.name == "iter_0000001" and calls[last_rename + 1].kind == "fsync_folder"
    without_one = without(calls, "fsync_folder", "iter_0000001")
    assert not list(recorded.bad_states(without_one))
    without_both = without([*calls[: last_rename + 1], *calls[last_rename + 2 :]], "fsync_folder", "iter_0000001")
    assert any("is in sight" in line for line in recorded.bad_states(without_both))
