"""Where a run begins, and where it begins when the same command is started again."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash

from ds_recipes.checkpoint.rng import derive_rng
from ds_recipes.errors import CheckpointError
from ds_recipes.training.resume import Now, Start, announce_start, find_start, leave_behind, load_start
from ds_recipes.training.state import TrainingState
from ds_recipes.world.group import solo
from tests.unit.checkpoint.flat_engine import FlatEngine, save, some_tensors


def settings(resume: str = "auto", other: Path | None = None, allow: tuple[str, ...] = ()) -> Any:
    """The part of a Config that a start looks at."""
    checkpoint = SimpleNamespace(
        resume=resume, verify="full", load_checkpoint_path=None if other is None else str(other), allow_change=allow
    )
    optimizer = SimpleNamespace(optimizer_type="adamw", sgd_momentum=0.0, weight_decay=0.1)
    return SimpleNamespace(checkpoint=checkpoint, optimizer=optimizer, run=SimpleNamespace(seed=42))


class Job:
    """Launches of one command, each of which trains some steps and saves."""

    def __init__(self, folder: Path, resume: str = "auto", other: Path | None = None) -> None:
        self.folder, self.config, self.said = folder, settings(resume, other), [""]

    def launch(self, steps: int) -> int:
        """The step that it began from."""
        self.said.clear()
        start = find_start(self.config, self.folder, solo())
        if start.line is not None:
            self.said.append(start.line)
        leave_behind(start, self.folder, f"run-{len(list(self.folder.glob('*')))}", solo(), self.said.append)
        begun = 0 if start.found is None else start.found.manifest.step
        if steps:
            state = {"step": begun + steps, "identity": {}, "origin": start.origin}
            save(self.folder, begun + steps, state=state)
        return begun


def names(folder: Path) -> list[str]:
    return sorted(path.name.split(".")[0][-2:] + ("!" if "." in path.name else "") for path in folder.glob("iter_*"))


def damage(folder: Path, step: int) -> None:
    (folder / f"iter_{step:07d}" / "state.json").write_text("{")


def flip_a_bit(checkpoint: Path) -> tuple[str, str]:
    """Of a rank's file; returns the hash that it had and the one that it has."""
    (path,) = checkpoint.glob("rank-00000*")
    data = bytearray(path.read_bytes())
    before = xxhash.xxh3_128_hexdigest(data)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return before, xxhash.xxh3_128_hexdigest(data)


def test_auto_continues_and_begins(tmp_path: Path) -> None:
    job = Job(tmp_path)
    assert [job.launch(10) for _ in range(3)] == [0, 10, 20]


def test_words_that_refuse(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="refuses to start from nothing"):
        Job(tmp_path, "require").launch(1)
    Job(tmp_path).launch(10)
    assert Job(tmp_path, "require").launch(0) == 10
    with pytest.raises(CheckpointError, match="--resume none refuses to continue"):
        Job(tmp_path, "none").launch(1)
    damage(tmp_path, 10)
    for word in ("auto", "require", "none"):
        with pytest.raises(CheckpointError, match="its only checkpoint cannot be used"):
            Job(tmp_path, word).launch(1)


def test_none_begins_in_a_folder_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert Job(tmp_path / "empty", "none").launch(10) == 0
    save(tmp_path / "other", 30)
    assert Job(tmp_path / "new", "none", tmp_path / "other").launch(10) == 30, (
        "of the other run, the run folder has none"
    )


@pytest.mark.parametrize("resume", ["auto", "require"])
def test_require_refuses_the_one_before_a_damaged_one_and_auto_takes_it(tmp_path: Path, resume: str) -> None:
    job = Job(tmp_path, resume)
    for step in (10, 20):
        save(tmp_path, step)
    hashes = flip_a_bit(tmp_path / "iter_0000020")
    if resume == "auto":
        assert job.launch(10) == 10
        assert names(tmp_path) == ["10", "20", "20!"] and "damaged checkpoints are kept" in job.said[-1]
        return
    with pytest.raises(CheckpointError, match="--resume require refuses to continue an older one") as refused:
        job.launch(10)
    text = str(refused.value)
    assert "rank-00000" in text and all(value in text for value in hashes)
    assert "leave --resume out to go on from iter_0000010 (step 10)" in text
    assert names(tmp_path) == ["10", "20"]


def test_require_refuses_the_older_one_of_another_run_too(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path / "other", step)
    damage(tmp_path / "other", 20)
    with pytest.raises(CheckpointError, match="--resume require refuses to continue an older one"):
        Job(tmp_path / "own", "require", tmp_path / "other").launch(0)


def test_back_to_a_checkpoint_of_its_own_once_and_then_on(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    job = Job(tmp_path, str(tmp_path / "iter_0000010"))
    assert job.launch(0) == 10 and names(tmp_path) == ["10", "20!", "30!"]
    assert job.launch(5) == 10, "killed before its first checkpoint, it goes back again"
    assert job.launch(5) == 15 and "began there already" in job.said[0]
    assert job.launch(5) == 20
    assert Job(tmp_path).launch(0) == 25, "without the flag as well"
    again = Job(tmp_path, str(tmp_path / "iter_0000015"))
    assert again.launch(5) == 15 and again.launch(5) == 20, "another place is another order"
    assert names(tmp_path) == ["10", "15", "20", "20!", "20!", "25", "25!", "30!"]


def test_killed_while_it_sets_checkpoints_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "iter_0000030").rename(tmp_path / "iter_0000030.aside-x")
    assert Job(tmp_path, str(tmp_path / "iter_0000010")).launch(0) == 10
    assert names(tmp_path) == ["10", "20!", "30!"]


def test_a_run_folder_that_was_moved_still_knows(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path / "here", step)
    Job(tmp_path / "here", str(tmp_path / "here" / "iter_0000010")).launch(5)
    (tmp_path / "here").rename(tmp_path / "there")
    assert Job(tmp_path / "there", str(tmp_path / "there" / "iter_0000010")).launch(5) == 15


@pytest.mark.parametrize("which", ["other", "other/iter_0000100", "other/iter_0000050", "linked"])
def test_begun_elsewhere_it_goes_on_from_its_own(tmp_path: Path, which: str) -> None:
    for step in (50, 100):
        save(tmp_path / "other", step)
    (tmp_path / "linked").symlink_to(tmp_path / "other" / "iter_0000100")
    job = Job(tmp_path / "run", str(tmp_path / which))
    first = 50 if "50" in which else 100
    assert job.launch(0) == first and job.launch(5) == first
    save(tmp_path / "other", 150)
    assert job.launch(5) == first + 5 and "began there already" in job.said[0]
    assert names(tmp_path / "other") == ["00", "50", "50"], "another run's folder is only read"


def test_what_was_begun_otherwise_is_not_mixed_with_it(tmp_path: Path) -> None:
    save(tmp_path / "other", 100)
    save(tmp_path / "run", 10)
    with pytest.raises(CheckpointError, match=r"holds checkpoints that were not begun from --resume .*other"):
        Job(tmp_path / "run", str(tmp_path / "other")).launch(1)
    assert names(tmp_path / "run") == ["10"]


def test_a_damaged_place_is_named_and_nothing_else_is_taken(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path / "run", step)
    damage(tmp_path / "run", 10)
    with pytest.raises(CheckpointError, match=r"iter_0000010: its only checkpoint cannot be used(.|\n)*state\.json"):
        Job(tmp_path / "run", str(tmp_path / "run" / "iter_0000010")).launch(1)
    assert names(tmp_path / "run") == ["10", "20"], "nothing was renamed"


def test_one_that_was_set_aside_can_be_taken_up_again(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    Job(tmp_path, str(tmp_path / "iter_0000010")).launch(5)
    (aside,) = tmp_path.glob("iter_0000020.aside-*")
    assert Job(tmp_path, str(aside)).launch(5) == 20


def test_another_run_gives_the_first_weights_and_its_damage_is_left_alone(tmp_path: Path) -> None:
    for step in (50, 100):
        save(tmp_path / "other", step)
    damage(tmp_path / "other", 100)
    job = Job(tmp_path / "run", other=tmp_path / "other")
    assert [job.launch(5) for _ in range(2)] == [50, 55]
    assert names(tmp_path / "other") == ["00", "50"]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Job(tmp_path / "new", other=tmp_path / "nothing").launch(1)


def begun(folder: Path) -> Start:
    return find_start(settings(), folder, solo())


def now(identity: dict[str, str], environment: dict[str, str] | None = None) -> Any:
    shapes = {name: tuple(tensor.shape) for name, tensor in some_tensors().items()}
    spared = {name for name, shape in shapes.items() if len(shape) < 2}
    return Now(set(shapes), spared, identity, environment or {}, (), SimpleNamespace())  # type: ignore[arg-type]


def test_what_the_user_is_told_at_a_start(tmp_path: Path) -> None:
    state = {"step": 5, "identity": {"seed": "1"}, "environment": {"ranks": "2", "torch": "2.9"}}
    save(tmp_path, 5, FlatEngine(some_tensors(), frozen=["scale", "norm.weight"]), state=state)
    save(tmp_path, 6)
    damage(tmp_path, 6)
    said: list[str] = []
    current = now({"seed": "2", "model": "x"}, {"ranks": "3", "torch": "2.9"})
    with pytest.raises(CheckpointError, match="seed: the checkpoint has 1, this run has 2"):
        announce_start(settings(), begun(tmp_path), current, solo(), said.append)
    said.clear()
    announce_start(settings(allow=("seed",)), begun(tmp_path), current, solo(), said.append)
    assert [line.split(":")[0] for line in said] == ["warning", "allowed", "note", "changed since iter_0000005", "note"]
    assert "iter_0000006 is not used" in said[0] and "does not record model" in said[2]
    assert said[3].endswith("ranks 2 -> 3")
    assert "2 parameters were frozen in iter_0000005 and train now; their moments start at zero" in said[4]


@pytest.mark.parametrize(
    "recorded, spared, told",
    [
        (None, {"norm.weight", "scale"}, []),  # by an earlier version, which went by the number of dimensions
        (
            None,
            {"norm.weight", "scale", "embed.weight"},
            ["1 parameters that decayed in iter_0000005 do not decay now"],
        ),
        (
            ["norm.weight", "scale"],
            {"scale"},
            ["1 parameters that did not decay in iter_0000005 decay now: norm.weight"],
        ),
        (["layer.weight"], {"embed.weight"}, ["1 parameters that decayed", "1 parameters that did not decay"]),
    ],
)
def test_a_change_of_what_decays_is_told(tmp_path: Path, recorded, spared, told) -> None:
    state = {"step": 5, "identity": {}} | ({} if recorded is None else {"no_weight_decay": recorded})
    save(tmp_path, 5, FlatEngine(some_tensors()), state=state)
    said: list[str] = []
    announce_start(settings(), begun(tmp_path), replace(now({}), spared=spared), solo(), said.append)
    assert len(said) == len(told)
    assert all(line.startswith(f"note: {wanted}") for line, wanted in zip(said, told, strict=True))


@pytest.mark.parametrize("saved_ranks", [0, 2])
def test_without_a_state_of_its_own_a_rank_seeds_its_generators(tmp_path: Path, saved_ranks: int) -> None:
    """An emergency checkpoint keeps none; one of two ranks has one too many."""

    class Filled:
        def load_shards(self, reader: object) -> None: ...

        def load_scaler_state(self, state: object) -> None: ...

    save(tmp_path, 7)
    found = begun(tmp_path).found
    assert found is not None
    generators = found.state["rng"] * saved_ranks
    state = json.loads(json.dumps(found.state)) | TrainingState(step=7).to_json() | {"rng": generators}
    object.__setattr__(found, "state", state)
    engine, reader = Filled(), object()
    drawn = []
    for _ in range(2):
        load_start(settings(), engine, reader, found, solo())  # type: ignore[arg-type]
        drawn.append(float(torch.rand(())))
    derive_rng(42, 7, 0)
    assert drawn == [float(torch.rand(()))] * 2
