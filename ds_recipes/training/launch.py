"""One launch of a run: the ranks meet, the run folder is theirs alone, and run.json says how it goes."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ds_recipes.checkpoint.run_lock import RunLock, take
from ds_recipes.config.schema import Config
from ds_recipes.engine.create import start_world
from ds_recipes.errors import TrainingError
from ds_recipes.training.launch_facts import facts_of
from ds_recipes.training.run_record import LAUNCH_VARIABLE, RunRecord, mark_failed
from ds_recipes.training.stop import StopRequest
from ds_recipes.training.trackers.group import check_trackers
from ds_recipes.world import channel, restarts
from ds_recipes.world.group import World
from ds_recipes.world.hang.watch import HangWatch
from ds_recipes.world.resolve import Place
from ds_recipes.world.seats import gather_seats, seat_table


@dataclass
class Launch:
    """One launch of a run: its world, its folder, and its record on rank 0."""

    world: World
    folder: Path
    record: RunRecord | None
    started: float  # time.monotonic() at the start of the process
    stop: StopRequest
    attempt: str
    """Name of this launch's hold on the run folder, on every rank; it is in the names of its unfinished checkpoints."""

    lock: RunLock | None  # on rank 0

    def fence(self) -> None:
        """See on rank 0 that this launch may still write into the run folder.

        Raises:
            TrainingError: another one has taken it over.
        """
        if self.lock is not None:
            self.lock.check()

    def say(self, line: str) -> None:
        """Print a line, on rank 0 alone."""
        if self.world.rank == 0:
            print(line, flush=True)

    def nothing_to_do(self, step: int, checkpoint: str) -> None:
        """Say and record that the run's last step was durable before this launch."""
        self.say(f"{self.folder}: the run is complete, {checkpoint} is its last step; nothing to do")
        if self.record is not None:
            self.record.continues_from(step)
            self.record.finish("complete", f"step {step} was reached before this launch")


@contextmanager
def open_launch(config: Config, place: Place, started: float) -> Iterator[Launch]:
    """Let the ranks meet and record the launch in run.json; a launch that fails is recorded as failed, with the reason."""
    check_trackers(config)
    assert config.checkpoint.save_checkpoint_path is not None
    folder = Path(config.checkpoint.save_checkpoint_path)
    stop = StopRequest(folder, place.rank == 0, restarts.launch_start(started), config.checkpoint.stop_after)
    note = _unmet(folder, config, place)
    world = start_world(place, config, wish=stop.reason, note=note, facts=facts_of(config))
    stop.hear(world.heard_stop)
    name = world.broadcast(os.environ.get(LAUNCH_VARIABLE) or uuid.uuid4().hex[:12])
    if config.hang.hang_monitor:
        again = f"-{world.meeting}" if world.meeting else ""
        world.hang = HangWatch(world, config.hang, folder / "hang" / f"{name}{again}")
    hosts = list(dict.fromkeys(world.gather(os.uname().nodename)))
    world.note_failure(_nobody)  # run.json is another job's until the lock is held
    lock = world.check("run lock", lambda: _take_lock(folder) if world.rank == 0 else None)
    if lock is not None:
        lock.when_lost = _end_all
        world.note_failure(lambda reason, status: lock.release())
    record = world.check(
        "run folder", lambda: None if lock is None else RunRecord(folder, config, world.size, hosts, lock.holds, name)
    )
    if record is not None and lock is not None:
        world.note_failure(_note_and_release(record, lock))
    if world.hang is not None:
        world.hang.ending.note_lost = partial(mark_failed, folder, name)
    stop.leave_if_asked(world, "the start")
    world.heed(stop.reason)
    attempt = world.broadcast("" if lock is None else lock.attempt)
    launch = Launch(world, folder, record, started, stop, attempt, lock)
    for line in seat_table(gather_seats(world, place)):
        launch.say(line)
    yield launch
    if lock is not None:  # after a failure `_note_and_release` does it
        lock.release()


def _take_lock(folder: Path) -> RunLock:
    return take(folder, os.environ.get(LAUNCH_VARIABLE, ""), lambda line: print(line, flush=True))


def _end_all(error: TrainingError) -> None:
    """The lock is lost: what this job still does is for nothing, and would be written into another one's logs."""
    if channel.current is not None:
        channel.current.fail(error)


def _nobody(reason: str, status: int) -> None:
    """Records nothing."""


def _note_and_release(record: RunRecord, lock: RunLock) -> Callable[[str, int], None]:
    """What rank 0 does at the end of a launch that fails. Released last: the next job writes run.json too."""

    def note(reason: str, status: int) -> None:
        try:
            record.fail(reason, status)
        finally:
            lock.release()

    return note


def _unmet(folder: Path, config: Config, place: Place) -> Callable[[str, int], None] | None:
    """What records on rank 0 that the launch ended before the ranks had met."""

    def note(reason: str, status: int) -> None:
        lock = _take_lock(folder)
        RunRecord(folder, config, place.size, [os.uname().nodename]).fail(reason, status)
        lock.release()

    return note if place.rank == 0 else None
