"""How much room checkpoints take is known before, and a disk that is too small is refused before anything is tried."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.checkpoint import space, store
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.space import Plan, Size, check_space, kept_at_once
from ds_recipes.errors import CheckpointError, SaveError
from tests.unit.checkpoint.flat_engine import FlatEngine, save

PLANS = st.builds(Plan, st.integers(0, 30), st.integers(0, 60), st.integers(0, 20))
KEEPS = st.builds(
    Keep,
    st.one_of(st.none(), st.integers(2, 4)),
    st.one_of(st.none(), st.integers(1, 10)),
    st.one_of(st.none(), st.integers(1, 3)),
)


def steps_of(plan: Plan) -> list[int]:
    """The steps after which a run saves, told plainly."""
    ahead = range(plan.step + 1, plan.total_steps + 1)
    return [step for step in ahead if (plan.interval and step % plan.interval == 0) or step == plan.total_steps]


@given(PLANS, st.integers(1, 9))
def test_saves_are_counted(plan: Plan, of: int) -> None:
    assert plan.num_saves == len(steps_of(plan))
    assert plan.num_multiples(of) == sum(step % of == 0 for step in steps_of(plan))


@given(PLANS, KEEPS, st.lists(st.integers(1, 30), unique=True, max_size=5), st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_no_run_ever_keeps_more_at_once(plan: Plan, keep: Keep, older: list[int], seed: int) -> None:
    chosen = random.Random(seed)
    there = {step: chosen.random() for step in older if step <= plan.step}
    existing = list(there)
    most = 0
    for step in steps_of(plan):
        there[step] = chosen.random()
        most = max(most, len(there))
        for gone in keep.to_delete(there):
            del there[gone]
    predicted = kept_at_once(keep, plan, existing)
    assert most <= predicted <= len(existing) + plan.num_saves
    if keep.last is None and plan.num_saves:
        assert most == predicted


@pytest.mark.parametrize("with_moments", [True, False])
@pytest.mark.parametrize("layers", [1, 40])
def test_the_prediction_is_an_upper_bound_and_close(tmp_path: Path, layers: int, with_moments: bool) -> None:
    tensors = {f"layers.{number}.weight": torch.zeros(300, 100) for number in range(layers)}
    path = save(tmp_path, 1, FlatEngine(tensors, with_moments))
    real = sum(file.stat().st_size for file in path.iterdir())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    predicted = Size(shapes, 3 if with_moments else 1, ranks=1, small_bytes=300).num_bytes
    assert real <= predicted <= 1.02 * real + 100_000


def test_what_fits_is_said_what_may_not_is_a_warning_and_what_cannot_is_refused(tmp_path: Path, monkeypatch) -> None:
    size, keep, plan = Size({"w": (1000, 1000)}, 3, 2, 0), Keep(last=2), Plan(0, 100, 10)
    one = size.num_bytes
    for free, expected in ((4 * one, "a checkpoint takes 0.01 GB; 3 at a time need"), (2 * one, "warning: ")):
        monkeypatch.setattr(space, "free_bytes", lambda path, free=free: free)
        (line,) = check_space(tmp_path, size, keep, plan, existing=[])
        assert line.startswith(expected) and str(tmp_path) in line
    (line,) = check_space(tmp_path, size, keep, plan, existing=[90, 100])
    assert line.startswith("a checkpoint takes"), "two of the three are there already"
    monkeypatch.setattr(space, "free_bytes", lambda path: one - 1)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: not even one more checkpoint fits"):
        check_space(tmp_path, size, keep, plan, existing=[])
    assert check_space(tmp_path, size, keep, Plan(100, 100, 10), existing=[90, 100]) == [], "nothing is left to save"


def test_before_each_save_the_disk_is_looked_at(tmp_path: Path, monkeypatch) -> None:
    old = save(tmp_path, 1)
    for module in (store, space):
        monkeypatch.setattr(module, "free_bytes", lambda path: 19_000)
    with pytest.raises(
        SaveError, match=r"iter_0000002.*not enough room.*19,000 bytes are free there, it takes about 60,"
    ):
        save(tmp_path, 2, FlatEngine({"w": torch.zeros(5000)}))
    assert {path.name for path in tmp_path.iterdir()} == {old.name, "latest"}


def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_its_parent(tmp_path: Path) -> None:
    assert space.free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
