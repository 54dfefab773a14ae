"""The counters of a run: what each step adds, and that an older checkpoint's are read."""

import dataclasses

import pytest

from ds_recipes.engine.base import StepResult
from ds_recipes.training.state import StepOutcome, StepTotals, TrainingState


def outcome(applied: bool = True, loss: float = 2.0, scale: float | None = None, number: int = 1) -> StepOutcome:
    return StepOutcome(
        totals=StepTotals(10 * number, 100 * number, number, (70, 30)),
        result=StepResult(1.0, applied, scale),
        loss=loss,
        lr=1e-3,
        start=12 * number,
        stop=12 * number + 12,
        data_hash=f"hash {number}",
    )


def test_each_step_adds_what_it_trained_on() -> None:
    state = TrainingState().after(outcome(number=1), is_spike=False).after(outcome(number=2), is_spike=True)
    assert (state.step, state.tokens, state.target_tokens, state.samples) == (2, 300, 30, 3)
    assert (state.position, state.data_hash, state.loss_spikes) == (36, "hash 2", 1)
    assert state.source_tokens == (140, 60)
    assert outcome(number=2).positions == "24-35"


def test_a_source_that_comes_later_is_counted_and_one_that_goes_stays() -> None:
    assert TrainingState(source_tokens=(5,)).after(outcome(), is_spike=False).source_tokens == (75, 30)
    assert TrainingState(source_tokens=(1, 2, 3)).after(outcome(), is_spike=False).source_tokens == (71, 32, 3)


def test_skipped_steps_are_counted_by_their_cause() -> None:
    nan, inf = float("nan"), float("inf")
    state = TrainingState()
    for applied, loss, scale in ((False, 2.0, 8.0), (False, nan, 8.0), (False, inf, None)):
        state = state.after(outcome(applied, loss, scale), is_spike=False)
    assert (state.skipped_steps, state.skipped_in_a_row, state.overflow_steps, state.nonfinite_losses) == (3, 3, 1, 2)
    assert state.schedule_step == state.step - 1
    state = state.after(outcome(), is_spike=False)
    assert (state.skipped_steps, state.skipped_in_a_row, state.schedule_step) == (3, 0, 3)


def test_what_is_written_is_read_and_an_older_checkpoint_lacks_what_came_later() -> None:
    state = TrainingState().after(outcome(False, float("nan")), is_spike=True)
    assert TrainingState.from_json(state.to_json()) == state
    later = {"source_tokens", "overflow_steps", "nonfinite_losses", "loss_spikes"}
    older = {name: value for name, value in state.to_json().items() if name not in later}
    read = TrainingState.from_json(older)
    assert read == dataclasses.replace(state, source_tokens=(), overflow_steps=0, nonfinite_losses=0, loss_spikes=0)
    with pytest.raises(KeyError):
        TrainingState.from_json({name: value for name, value in older.items() if name != "position"})
