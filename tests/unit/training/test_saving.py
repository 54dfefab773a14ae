"""The loop hears of every save: of a good one after the publish and not before, of a bad one as the settings say."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.config.checkpoint_settings import CheckpointConfig
from ds_recipes.errors import SaveError
from ds_recipes.fsops import calls
from ds_recipes.training.saving import ModelRecord, Saving
from ds_recipes.training.state import TrainingState
from ds_recipes.world.group import solo
from tests.unit.checkpoint.flat_engine import FlatEngine, some_tensors

Event = tuple[str, dict[str, Any]]


class Told:
    """Trackers that remember."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, kind: str, **fields: Any) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.events.append((kind, fields))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


class Engine(FlatEngine):
    """One that can be asked for a probe and its loss scaling."""

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((*input_ids.shape, 5))

    def scaler_state(self) -> dict[str, float]:
        return {}


@pytest.fixture
def told() -> Iterator[Told]:
    yield Told()
    calls.interceptor = None


def saving_of(folder: Path, told: Told, **settings: Any) -> Saving:
    return Saving(
        CheckpointConfig(**settings),
        folder,
        solo(),
        Engine(some_tensors()),
        told,
        ModelRecord({}, {}, 5),
        record=lambda: {"identity": {}},
        attempt="test-1",
        fence=lambda: None,
        last_saved=None,
    )


def fail_once(kind: str, pattern: str) -> None:
    def fail(call: calls.Call) -> None:
        if call.kind == kind and pattern in str(call.path):
            calls.interceptor = None
            raise OSError(errno.ENOSPC, "No space left on device", str(call.path))

    calls.interceptor = fail


def test_saved_is_told_after_the_publish_by_the_thread_that_asks(tmp_path: Path, told: Told) -> None:
    at_rename, go_on = threading.Event(), threading.Event()

    def hold(call: calls.Call) -> None:
        if call.kind == "rename":
            at_rename.set()
            assert go_on.wait(10)

    saving = saving_of(tmp_path, told)
    calls.interceptor = hold
    saving.save(TrainingState(step=3), None, must_succeed=False)
    assert at_rename.wait(10)
    for _ in range(5):
        saving.poll()
    assert told.events == [] and saving.last_saved is None
    assert saving.reserve_seconds() > 0, "one is under way: nobody knows yet how long it takes"
    go_on.set()
    saving.wait()
    ((kind, fields),) = told.events
    assert kind == "saved" and fields["step"] == 3 and fields["path"] == str(saving.last_saved)
    assert fields["stall_seconds"] >= 0 and fields["write_seconds"] > 0
    assert (tmp_path / "iter_0000003" / "manifest.json").exists()
    saving.wait()
    assert len(told.events) == 1


def test_a_second_save_waits_for_the_first(tmp_path: Path, told: Told) -> None:
    saving = saving_of(tmp_path, told)
    for step in (1, 2, 3):
        saving.save(TrainingState(step=step), {"eval_loss": 1.0 / step}, must_succeed=step == 3)
        assert [fields["step"] for _, fields in told.events][: step - 1] == list(range(1, step))
    assert told.kinds == ["saved"] * 3 and saving.last_saved == tmp_path / "iter_0000003"
    assert not list(tmp_path.glob(".iter*"))


def test_one_that_is_there_is_not_saved_again(tmp_path: Path, told: Told) -> None:
    saving = saving_of(tmp_path, told)
    saving.save(TrainingState(step=1), None, must_succeed=False)
    saving.save(TrainingState(step=1), None, must_succeed=True)
    assert told.kinds == ["saved"]
    (tmp_path / "iter_0000001").rename(tmp_path / "iter_0000001.aside-test-1")
    saving.went_back(tmp_path / "iter_0000000")
    saving.save(TrainingState(step=1), None, must_succeed=True)
    assert told.kinds == ["saved"] * 2


def test_with_saving_off_nothing_is_written(tmp_path: Path, told: Told) -> None:
    saving = saving_of(tmp_path, told, save_model=False, save_optimizer=False)
    saving.save(TrainingState(step=1), None, must_succeed=True)
    assert not list(tmp_path.iterdir()) and not told.events


@pytest.mark.parametrize("in_background", [True, False])
def test_stop_raises_at_the_next_step(tmp_path: Path, told: Told, in_background: bool) -> None:
    saving = saving_of(tmp_path, told, async_save=in_background)
    fail_once("write", "rank-")
    saving.save(TrainingState(step=1), None, must_succeed=False)
    with pytest.raises(SaveError, match="No space left on device"):
        while True:
            saving.poll()
            if not in_background:
                pytest.fail("a save that has ended is reported at once")
    assert not told.events


def test_continue_tells_it_and_tries_again_but_the_last_save_has_to_succeed(tmp_path: Path, told: Told) -> None:
    saving = saving_of(tmp_path, told, on_save_error="continue")
    fail_once("write", "rank-")
    saving.save(TrainingState(step=1), None, must_succeed=False)
    saving.wait()
    ((kind, fields),) = told.events
    assert kind == "save_failed" and fields["step"] == 1
    assert "No space left on device" in fields["message"] and "Training goes on" in fields["message"]
    assert saving.last_saved is None and not list(tmp_path.glob("*iter*"))
    saving.save(TrainingState(step=2), None, must_succeed=False)
    saving.wait()
    assert told.kinds == ["save_failed", "saved"]
    fail_once("write", "rank-")
    with pytest.raises(SaveError):
        saving.save(TrainingState(step=3), None, must_succeed=True)
    assert saving.last_saved == tmp_path / "iter_0000002"


def test_what_did_not_work_around_a_save_is_a_warning(tmp_path: Path, told: Told) -> None:
    saving = saving_of(tmp_path, told, keep_last=2)
    for step in (1, 2):
        saving.save(TrainingState(step=step), None, must_succeed=True)
    fail_once("unlink", "iter_0000001")
    saving.save(TrainingState(step=3), None, must_succeed=True)
    assert told.kinds == ["saved", "saved", "saved", "warning"]
    assert "iter_0000001 could not be deleted" in told.events[-1][1]["message"]


def test_the_evaluation_is_in_the_state(tmp_path: Path, told: Told) -> None:
    import json

    saving = saving_of(tmp_path, told)
    saving.save(TrainingState(step=1), {"eval_loss": 2.5}, must_succeed=True)
    saving.save(TrainingState(step=2), None, must_succeed=True)
    states = [json.loads((tmp_path / f"iter_000000{step}" / "state.json").read_text()) for step in (1, 2)]
    assert [state["evaluation"] for state in states] == [{"eval_loss": 2.5}, None]
    assert states[0]["step"] == 1 and states[0]["identity"] == {} and len(states[0]["rng"]) == 1
