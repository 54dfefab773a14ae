"""Going back to the last good checkpoint before a divergence, and on without the data on which the run diverged.

Nothing of it is written down but the names of the checkpoints that are set aside: a run that is killed here, or before its
next checkpoint, starts again from the same checkpoint, diverges at the same step, and goes back in the same way.
"""

from ds_recipes.checkpoint.load import Found, find_newest, open_reader, set_aside
from ds_recipes.config.hang_settings import LOAD
from ds_recipes.config.plan import make_plan
from ds_recipes.data.skips import Skips
from ds_recipes.data.stream import Stream
from ds_recipes.errors import CheckpointError, TrainingError
from ds_recipes.training.checksums import CHECKSUM_STEP
from ds_recipes.training.guard import Rewind, SpikeRow
from ds_recipes.training.hurried import Counted
from ds_recipes.training.leaving_out import how_to_leave_out
from ds_recipes.training.resume import load_start
from ds_recipes.training.run import Run
from ds_recipes.training.state import TrainingState, positions_text


def rewind(run: Run, row: SpikeRow, state: TrainingState) -> TrainingState | None:
    """Take the run back to its newest checkpoint before the spikes of `row`; None if there is none, and nothing changed.

    Newer checkpoints are renamed, not deleted. Every rank must call it.

    Raises:
        TrainingError: the run has gone back as often as it may, or all checkpoints before the spikes are damaged.
    """
    run.world.doing(f"going back from step {state.step}", LOAD, state.step)
    run.saving.wait()
    found = _newest_before(run, row)
    if found is None:
        message = f"there is no checkpoint before step {row.first_step}; the run goes on with the weights as they are"
        run.trackers.event("rewind_impossible", step=state.step, message=message)
        return None
    set_aside(run.folder, found.manifest.step, run.attempt, run.world)
    recoveries = run.config.guards.spike_recoveries
    if len(run.guard.rewinds) >= recoveries:
        raise TrainingError(
            f"the loss diverged in steps {row.first_step} to {state.step}, and the run has gone back as often "
            f"as it may (spike_recoveries {recoveries}). The newest checkpoint is {found.path}; later ones were set aside. "
            f"{how_to_leave_out(run, row.start, row.stop, int(found.state['position']))} Or lower the learning rate."
        )
    return _go_back(run, found, Rewind(state.step, found.manifest.step, row.start, row.stop))


def _newest_before(run: Run, row: SpikeRow) -> Found | None:
    try:
        found = find_newest(run.folder, run.world, run.config.checkpoint.verify, before=row.first_step)
    except CheckpointError as error:
        raise TrainingError(
            f"the loss diverged from step {row.first_step} on, and the run cannot go back: {error}"
        ) from error
    for line in found.skipped if found is not None else ():
        run.trackers.event("warning", step=row.first_step, message=line)
    return found


def _go_back(run: Run, found: Found, done: Rewind) -> TrainingState:
    """Put every part of the run where a start from `found` puts it, with the rows of `done` left out as well."""
    skips = Skips([*run.stream.skips.ranges, (done.start, done.stop)])
    run.plan = make_plan(run.config, run.world.size, run.corpus.num_rows, skips.ranges)
    reader = Counted(open_reader(found.path, found.manifest))
    state = load_start(run.config, run.engine, reader, found, run.world)
    run.checksums.passed_step = found.state.get(CHECKSUM_STEP)
    run.guard.go_back(found.state.get("guard"), done)
    run.stream.close()
    run.stream = Stream(
        run.corpus,
        run.plan,
        run.world.rank,
        position=state.position,
        data_hash=state.data_hash,
        num_workers=run.config.data.num_workers_dataloader,
        skips=skips,
    )
    run.state = state
    run.saving.went_back(found.path)
    run.trackers.rewind(state.step, run.total_steps)
    run.trackers.event(
        "rewind",
        step=state.step,
        from_step=done.from_step,
        checkpoint=found.path.name,
        positions=positions_text(done.start, done.stop),
        number=len(run.guard.rewinds),
        of=run.config.guards.spike_recoveries,
    )
    return state
