"""The model of a disk finds what is wrong with each wrong way to publish, and nothing wrong with the right one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ds_recipes.fsops import calls
from ds_recipes.fsops.durable import publish, remove_folder, replace_file, write_file
from tests.faults.disk import Crash, Disk, Event, Tree, crashes
from tests.faults.recording import recording, without

DATA = b"0123456789" * 5
Protocol = Callable[[Path, list[Event]], None]


def right(folder: Path, events: list[Event]) -> None:
    in_one_rename(folder, events)
    remove_folder(folder / "iter_1")


def in_one_rename(folder: Path, events: list[Event]) -> None:
    calls.make_folder(folder / ".part")
    write_file(folder / ".part" / "data", [DATA])
    publish(folder / ".part", folder / "iter_2")
    replace_file(folder / "latest", b"iter_2")
    events.append(2)


def in_place(folder: Path, events: list[Event]) -> None:
    calls.make_folder(folder / "iter_2")
    write_file(folder / "iter_2" / "data", [DATA])
    calls.sync_folder(folder / "iter_2")
    calls.sync_folder(folder)
    events.append(2)


def pointer_first(folder: Path, events: list[Event]) -> None:
    calls.make_folder(folder / ".part")
    write_file(folder / ".part" / "data", [DATA])
    replace_file(folder / "latest", b"iter_2")
    publish(folder / ".part", folder / "iter_2")
    events.append(2)


def old_one_first(folder: Path, events: list[Event]) -> None:
    remove_folder(folder / "iter_1")
    in_one_rename(folder, events)


def reported_early(folder: Path, events: list[Event]) -> None:
    calls.make_folder(folder / ".part")
    write_file(folder / ".part" / "data", [DATA])
    events.append(2)
    publish(folder / ".part", folder / "iter_2")


def deleted_under_its_name(folder: Path, events: list[Event]) -> None:
    calls.remove_file(folder / "iter_1" / "data")
    calls.remove_empty_folder(folder / "iter_1")


def pointer_written_over(folder: Path, events: list[Event]) -> None:
    calls.remove_file(folder / "latest")
    write_file(folder / "latest", [b"iter_2"])


def violations(folder: Path, protocol: Protocol, left_out: tuple[str, ...] = ()) -> list[Crash]:
    """The states after which something is wrong, from a folder with iter_1 in it that `latest` names."""
    folder.mkdir()
    (folder / "iter_1").mkdir()
    (folder / "iter_1" / "data").write_bytes(DATA)
    (folder / "latest").write_bytes(b"iter_1")
    disk = Disk(folder)
    with recording() as events:
        protocol(folder, events)
    kept = without(events, *left_out) if left_out else events
    return [crash for crash in crashes(disk, kept, seed=1, cuts=20) if not is_good(crash)]


def is_good(crash: Crash) -> bool:
    whole = {step for step in (1, 2) if crash.tree.get(f"iter_{step}/data") == DATA}
    torn = {step for step in (1, 2) if f"iter_{step}" in crash.tree} - whole
    pointed = {b"iter_1": 1, b"iter_2": 2}.get(crash.tree.get("latest") or b"")
    is_new_or_old = pointed is not None and (pointed in whole or max(whole, default=0) > pointed)
    return bool(whole) and not torn and is_new_or_old and (crash.saved is None or crash.saved in whole)


def test_the_right_way_has_no_bad_state(tmp_path: Path) -> None:
    assert not violations(tmp_path / "run", right)


@pytest.mark.parametrize(
    "left_out",
    [("fsync", "data"), ("fsync_folder", ".part"), ("fsync_folder", "run"), ("fsync", "latest"), ("write", "latest")],
    ids=" ".join,
)
def test_each_call_of_the_right_way_is_needed(tmp_path: Path, left_out: tuple[str, str]) -> None:
    assert violations(tmp_path / "run", right, left_out)


@pytest.mark.parametrize(
    "protocol",
    [in_place, pointer_first, old_one_first, reported_early, deleted_under_its_name, pointer_written_over],
    ids=lambda protocol: protocol.__name__,
)
def test_a_wrong_way_is_found(tmp_path: Path, protocol: Protocol) -> None:
    found = violations(tmp_path / "run", protocol)
    assert found
    assert all(str(crash) for crash in found)


def test_a_kill_loses_nothing_and_a_power_cut_everything_that_was_not_made_durable(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with recording() as events:
        calls.make_folder(tmp_path / "a")
        calls.sync_folder(tmp_path)
        calls.append(tmp_path / "a" / "file", b"1")
        calls.rename(tmp_path / "a", tmp_path / "b")
    states: list[Tree] = [crash.tree for crash in crashes(disk, events, seed=0, cuts=0)]
    assert states[0] == {}
    wanted: list[Tree] = [
        {"a": None},
        {"a": None, "a/file": b"1"},
        {"b": None, "b/file": b"1"},
        {"b": None, "b/file": b""},
    ]
    assert all(state in states for state in wanted)
    assert not any("a" in state and "b" in state for state in states), "a rename is one change"
