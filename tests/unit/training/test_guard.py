"""The guard's verdicts over whole runs of scripted losses, and over runs that were cut anywhere and went on from JSON."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.config.engine_settings import LossScaling
from ds_recipes.config.guard_settings import GuardConfig
from ds_recipes.engine.base import StepResult
from ds_recipes.training.guard import Guard, Rewind, SpikeRow, Verdict
from ds_recipes.training.state import StepOutcome, StepTotals, TrainingState

ROWS = 10  # of a step
SETTINGS = GuardConfig(max_skipped_steps=3, spike_window=8, spike_patience=3)
SCALING = LossScaling(None, 16, 1000, 1, False, least=1.0)
GOOD, SPIKE, SKIPPED, NAN = 2.0, 9.0, "skipped", "nan"
Script = list[float | str]


def outcome(state: TrainingState, step: float | str, scale: float | None = None) -> StepOutcome:
    applied = not isinstance(step, str)
    return StepOutcome(
        totals=StepTotals(100, 120, 5),
        result=StepResult(1.0 if applied else math.inf, applied, scale),
        loss=float(step) if applied else {SKIPPED: 2.0, NAN: math.nan}[str(step)],
        lr=1e-3,
        start=state.position,
        stop=state.position + ROWS,
        data_hash="",
    )


def drive(
    guard: Guard, script: Script, state: TrainingState | None = None, scale: float | None = None
) -> tuple[list[Verdict], TrainingState]:
    """Judge step after step; return the verdicts and the state in which the run ends."""
    state, verdicts = state or TrainingState(), []
    for step in script:
        result = outcome(state, step, scale)
        verdicts.append(guard.judge(state, result))
        state = state.after(result, verdicts[-1].spike is not None)
    return verdicts, state


def through_json(guard: Guard, state: TrainingState, config: GuardConfig = SETTINGS) -> tuple[Guard, TrainingState]:
    saved = json.loads(json.dumps(state.to_json() | {"guard": guard.to_json()}, allow_nan=False))
    return Guard(config, None, saved["guard"]), TrainingState.from_json(saved)


steps = st.one_of(st.floats(1.9, 2.1), st.just(SPIKE), st.sampled_from([SKIPPED, NAN]))


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=60), st.integers(0, 60))
def test_a_run_that_is_cut_anywhere_judges_as_one_that_is_not(script: Script, cut: int) -> None:
    whole = Guard(SETTINGS, None)
    verdicts, end = drive(whole, script)
    first, middle = drive(guard := Guard(SETTINGS, None), script[:cut])
    resumed, state = through_json(guard, middle)
    second, resumed_end = drive(resumed, script[cut:], state)
    assert first + second == verdicts
    assert resumed_end == end and resumed.to_json() == whole.to_json()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.floats(1.9, 2.1), st.just(SPIKE)), max_size=40), st.data())
def test_skipped_steps_change_no_verdict_on_the_others(script: Script, data: st.DataObject) -> None:
    """Their losses are neither normal nor spikes, and a row of spikes goes on across them."""
    places = data.draw(st.sets(st.integers(0, len(script)), max_size=20))
    mixed: Script = []
    for number, step in enumerate([*script, GOOD]):
        mixed += [SKIPPED, NAN][: 1 + number % 2] if number in places else []
        mixed.append(step)
    plain = [(verdict.spike, verdict.divergence is not None) for verdict in drive(Guard(SETTINGS, None), script)[0]]
    judged, _ = drive(Guard(SETTINGS, None), mixed)
    kept = [verdict for verdict, step in zip(judged, mixed, strict=True) if not isinstance(step, str)][:-1]
    assert [(verdict.spike, verdict.divergence is not None) for verdict in kept] == plain


def test_counts() -> None:
    script: Script = [GOOD] * 8 + [SPIKE, SKIPPED, NAN, GOOD, NAN]
    _, state = drive(Guard(SETTINGS, None), script)
    assert (state.step, state.loss_spikes, state.skipped_steps) == (13, 1, 3)
    assert (state.nonfinite_losses, state.skipped_in_a_row, state.overflow_steps) == (2, 1, 0)
    assert state.position == 13 * ROWS


def test_skipped_steps_in_a_row_lead_back_to_the_state_that_has_the_weights() -> None:
    guard = Guard(SETTINGS, None)
    before, good = drive(guard, [GOOD, SKIPPED, GOOD])
    verdicts, state = drive(guard, [SKIPPED, NAN], good)
    assert not any(verdict.too_many_skipped for verdict in before + verdicts)
    guard, state = through_json(guard, state)
    (last,), state = drive(guard, [SKIPPED], state)
    assert last.too_many_skipped and guard.last_good == good and good.step == 3
    drive(guard, [GOOD], state)
    assert guard.last_good is None


def test_a_loss_scale_that_may_fall_is_waited_for_but_not_where_the_loss_itself_is_not_finite() -> None:
    for step, scale, ends in ((SKIPPED, 2.0, False), (SKIPPED, 1.0, True), (NAN, 2.0, True)):
        verdicts, state = drive(Guard(SETTINGS, SCALING), [GOOD] + [step] * 5, scale=scale)
        assert [verdict.too_many_skipped for verdict in verdicts] == [False] * 3 + [ends] * 3
        assert state.overflow_steps == (5 if step == SKIPPED else 0)
    fixed = Guard(SETTINGS, replace(SCALING, static=128.0))
    assert drive(fixed, [SKIPPED] * 3, scale=128.0)[0][-1].too_many_skipped


def test_a_divergence_names_the_steps_and_the_rows_of_its_spikes() -> None:
    script: Script = [GOOD] * 8 + [SPIKE, SPIKE, GOOD, SPIKE, SKIPPED, SPIKE, SPIKE, SPIKE]
    verdicts, _ = drive(Guard(SETTINGS, None), script)
    rows = [verdict.divergence for verdict in verdicts]
    assert rows[:14] == [None] * 14
    assert rows[14] == SpikeRow(first_step=12, start=11 * ROWS, stop=15 * ROWS, count=3)


def test_after_a_divergence_that_is_accepted_the_new_level_becomes_normal() -> None:
    guard = Guard(SETTINGS, None)
    _, state = drive(guard, [GOOD] * 8 + [SPIKE] * 3)
    guard.accept()
    verdicts, state = drive(guard, [SPIKE] * 20, state)
    assert verdicts == [Verdict()] * 20
    assert drive(guard, [30.0], state)[0][0].spike is not None


def test_going_back_restores_the_window_and_keeps_the_rewinds() -> None:
    guard = Guard(SETTINGS, None)
    _, state = drive(guard, [GOOD] * 8)
    saved = json.loads(json.dumps(guard.to_json()))
    drive(guard, [2.05] * 8 + [SPIKE] * 3, state)
    first, second = Rewind(19, 8, 160, 190), Rewind(21, 8, 180, 210)
    guard.go_back(saved, first)
    assert guard.to_json() == saved | {"rewinds": [vars(first)]}
    guard.go_back(saved, second)
    assert guard.rewinds == (first, second)
    assert through_json(guard, state)[0].rewinds == (first, second)


def test_a_checkpoint_of_an_older_version_has_no_guard() -> None:
    assert Guard(SETTINGS, None, None).to_json() == Guard(SETTINGS, None, {}).to_json()
    old = {
        key: value
        for key, value in TrainingState(step=7).to_json().items()
        if key not in ("loss_spikes", "nonfinite_losses")
    }
    assert TrainingState.from_json(old) == TrainingState(step=7)


@pytest.mark.parametrize("window", [8, 16])
def test_another_window_at_the_next_start_keeps_the_newest_losses(window: int) -> None:
    guard = Guard(SETTINGS, None)
    _, state = drive(guard, [float(loss) for loss in range(20, 0, -1)])
    changed, _ = through_json(guard, state, replace(SETTINGS, spike_window=window))
    assert changed.to_json()["losses"] == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
