"""One launch of a run: the ranks meet, the run folder exists, and run.json says how it goes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ds_recipes.config.schema import Config
from ds_recipes.engine.create import start_world
from ds_recipes.training.run_record import RunRecord
from ds_recipes.training.trackers.group import check_trackers
from ds_recipes.world.group import World
from ds_recipes.world.resolve import Place


@dataclass
class Launch:
    """One launch of a run: its world, its folder, and its record on rank 0."""

    world: World
    folder: Path
    record: RunRecord | None
    started: float  # time.monotonic() at the start of the process

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
    world = start_world(place, config)
    assert config.checkpoint.save_checkpoint_path is not None
    folder = Path(config.checkpoint.save_checkpoint_path)
    hosts = list(dict.fromkeys(world.gather(os.uname().nodename)))
    record = world.check(
        "run folder", lambda: RunRecord(folder, config, world.size, hosts) if world.rank == 0 else None
    )
    if record is not None:
        world.note_failure(record.fail)
    yield Launch(world, folder, record, started)
