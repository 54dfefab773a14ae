"""An export that is killed, or fails, at any point publishes nothing half and leaves its checkpoint as it was."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from ds_recipes.checkpoint.export.wanted import Wanted
from ds_recipes.checkpoint.export.whole import export
from ds_recipes.errors import CheckpointError
from ds_recipes.fsops import calls, faults
from tests.faults.disk import Disk, Scratch, Tree, crashes, read_tree
from tests.faults.flat_saves import armed
from tests.faults.recording import recording
from tests.faults.test_replay import CUTS, SEED
from tests.ranks.launch import fork_rank, wait_for
from tests.unit.checkpoint.export_material import checkpoint_of
from tests.unit.models.tiny import tiny_model

WANTED = Wanted(load_check=False, max_shard_bytes=20_000)
EVERY = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tiny_model("llama"), tmp_path_factory.mktemp("run"), {})


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "whole"
    assert len(export(checkpoint, folder, WANTED).files) > 1
    return folder


def export_with_faults(checkpoint: str, out: str) -> int:
    os.environ["RANK"] = "0"
    faults.arm_from_environment()
    export(Path(checkpoint), Path(out), WANTED)
    return 0


def run_export(checkpoint: Path, out: Path, text: str) -> int | None:
    process = fork_rank(export_with_faults, (str(checkpoint), str(out)), out.with_name(f"{out.name}.txt"), armed(text))
    assert wait_for([process], 60)
    return process.exitcode


@pytest.mark.parametrize("first, action", enumerate(["kill", "tear"], 1))
def test_killed_at_some_points(tmp_path: Path, checkpoint: Path, whole: Path, first: int, action: str) -> None:
    source, wanted = read_tree(checkpoint), read_tree(whole)
    assert run_export(checkpoint, tmp_path / "counting", f"log:{tmp_path / 'log'}@1 within=saving") == 0
    numbers = range(first, len((tmp_path / "log").read_text().splitlines()) + 1, EVERY)
    assert len(numbers) > 5
    for number in numbers:
        out = tmp_path / str(number) / "model"
        out.parent.mkdir()
        assert run_export(checkpoint, out, f"{action}@{number} within=saving") == -signal.SIGKILL
        assert not out.exists() or read_tree(out) == wanted, f"{action}@{number}"
        shutil.rmtree(out, ignore_errors=True)
        export(checkpoint, out, WANTED)
        assert read_tree(out) == wanted and read_tree(checkpoint) == source


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_call_that_fails_at_any_point(tmp_path: Path, checkpoint: Path, whole: Path, error: str) -> None:
    source, wanted, number = read_tree(checkpoint), read_tree(whole), 0
    place = tmp_path / "out"
    place.mkdir()
    while True:
        number += 1
        armed_one = faults.parse(f"fail:{error}@{number} within=saving")
        calls.interceptor = faults.Faults(armed_one)
        try:
            export(checkpoint, place / "model", WANTED)
        except CheckpointError as failed:
            assert str(place) in str(failed)
        finally:
            calls.interceptor = None
        there = {path.name for path in place.iterdir()}
        assert there <= {"model"}
        assert not there or read_tree(place / "model") == wanted, f"fail:{error}@{number}"
        shutil.rmtree(place / "model", ignore_errors=True)
        if armed_one[0].seen < number:
            break
    assert number > 30 and read_tree(checkpoint) == source


def test_no_state_of_the_disk_shows_half_a_model(tmp_path: Path, checkpoint: Path, whole: Path) -> None:
    wanted: Tree = {"model": None} | {f"model/{name}": data for name, data in read_tree(whole).items()}
    place, num_states = tmp_path / "out", 0
    place.mkdir()
    disk = Disk(place)
    with recording() as events:
        export(checkpoint, place / "model", WANTED)
        events.append(1)
    for crash in crashes(disk, events, SEED, CUTS):
        there = {name: data for name, data in crash.tree.items() if not name.startswith(".")}
        assert there in ([wanted] if crash.saved else [{}, wanted]), crash
        num_states += 1
    assert num_states > 80
    left = Scratch(tmp_path / "left").show({".model.partial-0/a": b"", ".model.partial-0": None})
    os.utime(left / ".model.partial-0" / "a", (0, 0))
    os.utime(left / ".model.partial-0", (0, 0))
    export(checkpoint, left / "model", WANTED)
    assert [path.name for path in left.iterdir()] == ["model"], "what a dead export left is removed by the next"
