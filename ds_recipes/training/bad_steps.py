"""What follows a bad step: it is told; too many skipped ones end the run, a divergence takes it back if that is asked for."""

import re
from pathlib import Path
from typing import NoReturn

from ds_recipes.errors import SaveError, TrainingError
from ds_recipes.training.guard import Verdict
from ds_recipes.training.leaving_out import how_to_leave_out
from ds_recipes.training.rewind import rewind
from ds_recipes.training.run import Run
from ds_recipes.training.state import StepOutcome, TrainingState, positions_text


def answer_bad_step(run: Run, outcome: StepOutcome, verdict: Verdict, state: TrainingState) -> TrainingState:
    """Tell of a bad step, and do what it asks for; return the state to go on from. Every rank must call it.

    `state` is the one after the step. Another one is returned by a rewind.

    Raises:
        TrainingError: too many steps in a row were skipped, or the run diverged once more than it may recover.
    """
    if not outcome.result.applied:
        _tell_skipped(run, outcome, state)
    if verdict.too_many_skipped:
        _give_up(run, outcome, state)
    if verdict.spike is not None:
        spike = verdict.spike
        run.trackers.event(
            "loss_spike",
            step=state.step,
            loss=spike.loss,
            median=spike.median,
            sigma=spike.sigma,
            positions=outcome.positions,
        )
    if verdict.divergence is None:
        return state
    row = verdict.divergence
    run.trackers.event(
        "divergence", step=state.step, first_step=row.first_step, positions=positions_text(row.start, row.stop)
    )
    rewound = rewind(run, row, state) if run.config.guards.spike_recovery == "rewind" else None
    if rewound is None:
        run.guard.accept()
    return rewound or state


def _tell_skipped(run: Run, outcome: StepOutcome, state: TrainingState) -> None:
    if outcome.overflowed:
        run.trackers.event(
            "overflow", step=state.step, loss_scale=outcome.result.loss_scale, in_a_row=state.skipped_in_a_row
        )
        return
    run.trackers.event(
        "skipped_step",
        step=state.step,
        loss=str(outcome.loss),
        grad_norm=str(outcome.result.grad_norm),
        positions=outcome.positions,
        in_a_row=state.skipped_in_a_row,
    )


def _give_up(run: Run, outcome: StepOutcome, state: TrainingState) -> NoReturn:
    """End the run, with a checkpoint of the state that the weights belong to."""
    good = run.guard.last_good
    assert good is not None
    trouble = _save_last_good(run, good)
    (first,) = map(int, run.stream.skips.next_positions(good.position, 1)[0])
    scale = outcome.result.loss_scale
    at_scale = f" at a loss scale of {scale:g}" if scale is not None else ""
    raise TrainingError(
        f"{state.skipped_in_a_row} steps in a row had a loss or a gradient that is not finite{at_scale} (the last is step "
        f"{state.step}). The weights are those of step {good.step}. {trouble}{run.saving.last_saved_line()} "
        f"{how_to_leave_out(run, first, outcome.stop, good.position)} Or lower the learning rate."
    )


def _save_last_good(run: Run, good: TrainingState) -> str:
    """Save a state whose weights the engine still holds, unless a checkpoint has them; return what went wrong with that.

    A checkpoint that was saved between the skipped steps has them too. The weights of step 0 are where any run begins.
    """
    try:
        run.saving.wait()
        if good.step > _step_of(run.saving.last_saved):
            run.checksums.before_save(good.step, good.data_hash)
            run.saving.save(good, None, must_succeed=True)
    except SaveError as error:
        return f"They could not be saved: {error} "
    return ""


def _step_of(checkpoint: Path | None) -> int:
    """A checkpoint's step by its name; 0 without one, or where it is named in another way."""
    named = re.match(r"iter_(\d+)", checkpoint.name) if checkpoint is not None else None
    return int(named[1]) if named else 0
