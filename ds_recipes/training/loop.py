"""The one training loop. Tasks differ in data and mask only."""

import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from ds_recipes.config.hang_settings import EVALUATE, STEP
from ds_recipes.data.batch import MicroBatch
from ds_recipes.errors import STOPPED_EARLY, TrainingError
from ds_recipes.training.bad_steps import answer_bad_step
from ds_recipes.training.evaluate import Evaluation, evaluate, perplexity
from ds_recipes.training.run import Run
from ds_recipes.training.schedule import lr_at
from ds_recipes.training.state import StepOutcome, StepTotals, TrainingState
from ds_recipes.training.step_loss import StepLoss


def train(run: Run) -> int:
    """Train to the plan's last step, or until someone asks to stop; return the exit status."""
    try:
        return _train(run)
    except BaseException as error:
        run.trackers.finish("failed", str(error) or type(error).__name__)
        raise


def _train(run: Run) -> int:
    state, stop_reason = run.state, None
    evaluation: Mapping[str, float] | None = None
    if run.owes_evaluation:
        stop_reason = validate(run, state).stop_reason
    while state.step < run.total_steps and stop_reason is None:
        run.saving.poll()
        run.world.doing(f"step {state.step + 1}", STEP, state.step + 1)
        run.meter.start_step()
        begin = state.position
        group = run.stream.take()
        run.meter.data_ready()
        totals, stop_reason = agree(run, group, state)
        if stop_reason is not None:
            break
        evaluation = None
        run.checksums.begin_step(state.step + 1, group[0])
        losses = [run.world.progressed(run.engine.backward(batch, scale=1 / totals.target_tokens)) for batch in group]
        outcome = update(run, losses, totals, state)
        run.meter.end_step(totals.tokens)
        verdict = run.guard.judge(state, outcome)
        stepped = state.after(outcome, is_spike=verdict.spike is not None)
        state = answer_bad_step(run, outcome, verdict, stepped)
        if state is not stepped:  # the run went back
            continue
        run.trackers.reached(state.step)
        run.prepare_saving(state.step)
        run.report_unused(state.step, outcome.result.unused)
        run.report_repeats(begin, state)
        run.report_slow_ranks(state.step)
        if state.step % run.config.logging.log_interval == 0 or state.step == run.total_steps:
            log_step(run, state, outcome)
        if run.evaluates_after(state.step):
            evaluated = validate(run, state)
            evaluation, stop_reason = evaluated.metrics, evaluated.stop_reason
        if run.saves_after(state.step) and state.step < run.total_steps:
            run.saving.save(state, evaluation, must_succeed=False)
    return finish(run, state, stop_reason, evaluation)


def agree(run: Run, group: Sequence[MicroBatch], state: TrainingState) -> tuple[StepTotals, str | None]:
    """Sum this step's counts over all ranks, and agree on whether to stop before it. One all-reduce.

    Raises:
        TrainingError: the step has no target token at all.
    """
    wish = run.stop.reason(reserve_seconds=run.reserve_seconds(state.step + 1))
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


def update(run: Run, losses: Sequence[torch.Tensor], totals: StepTotals, state: TrainingState) -> StepOutcome:
    """Let the engine take the step, and sum its loss over all ranks. One wait for the device, one all-reduce."""
    loss = StepLoss(losses)
    (first,), _ = run.stream.skips.next_positions(state.position, 1)
    lr = lr_at(state.schedule_step, run.plan)
    run.checksums.before_update(state.step + 1, lr, run.stream.data_hash)
    result = run.engine.update(lr)
    return StepOutcome(
        totals=totals,
        result=result,
        loss=loss.mean(run.world, totals.target_tokens),
        lr=lr,
        start=int(first),
        stop=run.stream.position,
        data_hash=run.stream.data_hash,
    )


def log_step(run: Run, state: TrainingState, outcome: StepOutcome) -> None:
    """Write one line of metrics; every rank takes part in the norms of the state."""
    result = outcome.result
    metrics = {
        "step": state.step,
        "loss": outcome.loss,
        "perplexity": perplexity(outcome.loss),
        "lr": outcome.lr,
        "grad_norm": result.grad_norm,
        **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
        "skipped_steps": state.skipped_steps,
        "loss_spikes": state.loss_spikes,
        "rewinds": len(run.guard.rewinds),
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


def validate(run: Run, state: TrainingState) -> Evaluation:
    """Evaluate, and log what came of it; it is abandoned when the run is to stop."""
    run.world.doing(f"the evaluation after step {state.step}", EVALUATE, state.step)
    started = time.monotonic()
    wish = partial(run.stop.reason, run.reserve_seconds())
    evaluation = evaluate(run.engine, run.validation_stream(), run.world, wish)
    if evaluation.metrics is None:
        message = f"the evaluation after step {state.step} is abandoned: {evaluation.stop_reason}"
        run.trackers.event("evaluation_abandoned", step=state.step, message=message)
    else:
        run.trackers.evaluation(state.step, evaluation.metrics)
        run.longest_evaluation_seconds = max(run.longest_evaluation_seconds, time.monotonic() - started)
    return evaluation


def finish(run: Run, state: TrainingState, stop_reason: str | None, evaluation: Mapping[str, float] | None) -> int:
    """Publish the last checkpoint, then record how the launch ended. Complete means that the last step is durable."""
    has_trained = state.step != run.state.step
    if has_trained:
        run.checksums.before_save(state.step, state.data_hash)
        run.saving.save(state, evaluation, must_succeed=True)
    if stop_reason is not None:
        run.stop.honoured()
    if state.step == run.total_steps:
        run.trackers.finish("complete", f"step {state.step} of {run.total_steps}")
        return 0
    where = f"at step {state.step}" if has_trained else f"after loading, before step {state.step + 1}"
    run.trackers.finish("stopped", f"{stop_reason} {where}")
    return STOPPED_EARLY
