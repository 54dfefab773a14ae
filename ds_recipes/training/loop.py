"""The one training loop. Tasks differ in data and mask only."""

from collections.abc import Sequence

import torch

from ds_recipes.config.engine_settings import engine_settings
from ds_recipes.data.batch import MicroBatch
from ds_recipes.engine.base import StepResult
from ds_recipes.errors import TrainingError
from ds_recipes.training.evaluate import evaluate, perplexity
from ds_recipes.training.run import Run
from ds_recipes.training.schedule import lr_at
from ds_recipes.training.state import StepTotals, TrainingState

SKIPPED_STEPS_LIMIT = 10
"""Steps in a row with a non-finite gradient after which a run ends: nothing is learned any more."""

STOPPED_EARLY = 75
"""Exit status of a run that stopped on request with a verified checkpoint (EX_TEMPFAIL: queue it again)."""


def train(run: Run) -> int:
    """Train to the plan's last step, or until someone asks to stop; return the exit status."""
    try:
        return _train(run)
    except BaseException as error:
        run.trackers.finish("failed", str(error) or type(error).__name__)
        raise


def _train(run: Run) -> int:
    state, stop_reason = run.state, None
    while state.step < run.total_steps and stop_reason is None:
        run.meter.start_step()
        begin = state.position
        group = run.stream.take()
        run.meter.data_ready()
        totals, stop_reason = agree(run, group, state)
        losses = [run.engine.backward(batch, scale=1 / totals.target_tokens) for batch in group]
        lr = lr_at(state.schedule_step, run.plan)
        result = run.engine.update(lr)
        state = state.after(totals, result, run.stream.position, run.stream.data_hash)
        run.meter.end_step(totals.tokens)
        last = state.step == run.total_steps or stop_reason is not None
        report_skipped(run, state, result)
        run.report_repeats(begin, state)
        if state.step % run.config.logging.log_interval == 0 or last:
            log_step(run, state, losses, totals, result, lr)
        if run.evaluates_after(state.step):
            run.trackers.evaluation(state.step, evaluate(run.engine, run.validation_stream(), run.world))
        if run.saves_after(state.step) or last:
            run.save(state)
    return finish(run, state, stop_reason)


def agree(run: Run, group: Sequence[MicroBatch], state: TrainingState) -> tuple[StepTotals, str | None]:
    """Sum this step's counts over all ranks, and agree on whether it is the last. One all-reduce.

    Raises:
        TrainingError: the step has no target token at all.
    """
    run.world.doing(f"step {state.step + 1}")
    wish = run.stop.reason(reserve_seconds=run.reserve_seconds())
    sums = run.world.sum(
        [
            sum(batch.num_target_tokens for batch in group),
            sum(batch.num_tokens for batch in group),
            sum(batch.num_samples for batch in group),
            int(wish is not None),
            *(sum(tokens) for tokens in zip(*(batch.source_tokens for batch in group), strict=True)),
        ]
    )
    target_tokens, tokens, samples, wishes, *source_tokens = (int(value) for value in sums)
    if target_tokens == 0:
        raise TrainingError(
            f"step {state.step + 1} has no target token in any of its rows (positions {state.position} to "
            f"{run.stream.position - 1}): {run.provenance(state.position)}. Raise the global batch size or remove such records."
        )
    reasons = run.world.gather(wish) if wishes else []
    totals = StepTotals(target_tokens, tokens, samples, tuple(source_tokens))
    return totals, next((reason for reason in reasons if reason), None)


def report_skipped(run: Run, state: TrainingState, result: StepResult) -> None:
    """Say that a step was skipped; end the run when too many follow each other. The verdict is the same on all ranks.

    Raises:
        TrainingError: `SKIPPED_STEPS_LIMIT` steps in a row were skipped, or more while the loss scale could still fall.
    """
    if result.applied:
        return
    if result.overflowed:
        run.trackers.event("overflow", step=state.step, loss_scale=result.loss_scale, in_a_row=state.skipped_in_a_row)
    else:
        run.trackers.event(
            "skipped_step", step=state.step, grad_norm=str(result.grad_norm), in_a_row=state.skipped_in_a_row
        )
    if state.skipped_in_a_row >= SKIPPED_STEPS_LIMIT and not scale_may_fall(run, result):
        scale = f" at a loss scale of {result.loss_scale:g}" if result.loss_scale is not None else ""
        raise TrainingError(
            f"{state.skipped_in_a_row} steps in a row had a gradient that is not finite{scale} (the last is step "
            f"{state.step}). The weights are those of step {state.step - state.skipped_in_a_row}. "
            f"{run.last_saved_line()} Lower the learning rate, or look at the data from there on."
        )


def scale_may_fall(run: Run, result: StepResult) -> bool:
    """True while dynamic loss scaling, which halves the scale, has not come to its least."""
    scaling = engine_settings(run.config).loss_scaling
    if scaling is None or scaling.static is not None or result.loss_scale is None:
        return False
    return result.loss_scale > scaling.least


def log_step(
    run: Run, state: TrainingState, losses: Sequence[torch.Tensor], totals: StepTotals, result: StepResult, lr: float
) -> None:
    """Write one line of metrics; every rank takes part in summing the loss."""
    (loss_sum,) = run.world.sum([float(torch.stack([loss.double() for loss in losses]).sum())])
    loss = loss_sum / totals.target_tokens
    metrics = {
        "step": state.step,
        "loss": loss,
        "perplexity": perplexity(loss),
        "lr": lr,
        "grad_norm": result.grad_norm,
        **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
        "tokens": state.tokens,
        "target_tokens": state.target_tokens,
        "samples": state.samples,
        **run.meter.read(),
        **run.engine.measured(),
        "epoch": run.stream.epoch,
        **run.source_metrics(state),
        "data_hash": state.data_hash,
    }
    run.trackers.log(state.step, metrics | run.state_norms(state.step))


def finish(run: Run, state: TrainingState, stop_reason: str | None) -> int:
    """Record how the run ended, after its last checkpoint is published."""
    if stop_reason is None:
        run.trackers.finish("complete", f"step {state.step} of {run.total_steps}")
        return 0
    run.stop.honoured()
    run.trackers.finish("stopped", f"{stop_reason} at step {state.step}")
    return STOPPED_EARLY
