"""All trackers of a run behind one object, which does nothing on ranks other than 0."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config, values_of
from ds_recipes.errors import ConfigError
from ds_recipes.training.run_record import RunRecord
from ds_recipes.training.trackers.background import BackgroundTracker
from ds_recipes.training.trackers.base import Tracker
from ds_recipes.training.trackers.console import Console
from ds_recipes.training.trackers.metrics_file import MetricsFiles
from ds_recipes.training.trackers.tensorboard_tracker import TensorBoardTracker
from ds_recipes.training.trackers.wandb_tracker import WandbTracker, wandb_mode
from ds_recipes.world.group import World


class Trackers:
    """Passes everything on to each tracker, and the end of the run to its record."""

    def __init__(self, trackers: Sequence[Tracker], record: RunRecord | None, first_step: int) -> None:
        self._trackers = list(trackers)
        self._record = record
        self._step = first_step

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A training step's metrics (`METRIC_NAMES`), with norms of the optimizer's state where they were computed."""
        self.reached(step)
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def reached(self, step: int) -> None:
        """A step is done; not every one is logged."""
        self._step = step
        if self._record is not None:
            self._record.reached(step)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """An evaluation's results after `step`: names that start with eval_."""
        for tracker in self._trackers:
            tracker.evaluation(step, metrics)

    def event(self, kind: str, **fields: Any) -> None:
        """Something happened; a field `message` is what the screen shows, instead of all fields."""
        for tracker in self._trackers:
            tracker.event(kind, fields)

    def rewind(self, step: int, total_steps: int) -> None:
        """The run goes on from `step`, and `total_steps` may have changed: what was logged of later steps is dropped."""
        self.reached(step)
        for tracker in self._trackers:
            tracker.rewind(step, total_steps)

    def finish(self, state: str, reason: str) -> None:
        """The launch is over: `state` is complete, stopped or failed. Writes run.json, then closes the trackers.

        That it failed, and why, is for the end of all ranks to write: this one's error may follow from another's.
        """
        self.event(state, step=self._step, message=reason)
        if self._record is not None and state != "failed":
            self._record.finish(state, reason)
        self.close()

    def close(self) -> None:
        """Let every tracker write what is left; bounded in time."""
        for tracker in reversed(self._trackers):
            tracker.close()
        self._trackers = []


def check_trackers(config: Config) -> None:
    """Find out early that a package which the settings ask for is missing.

    Raises:
        ConfigError: wandb or tensorboard is asked for and not installed.
    """
    problems = []
    if wandb_mode(config.logging, os.environ, Path.home()) and find_spec("wandb") is None:
        problems.append("wandb_project or wandb_mode asks for wandb: pip install wandb, or set --wandb_mode disabled.")
    if config.logging.tensorboard and find_spec("tensorboard") is None:
        problems.append(
            "tensorboard is set, but the package is missing: pip install tensorboard, or leave the flag out."
        )
    if problems:
        raise ConfigError(problems)


def start_trackers(
    config: Config, run_folder: Path, plan: Plan, world: World, resume_step: int, record: RunRecord | None
) -> Trackers:
    """Start the trackers that the settings ask for, on rank 0; elsewhere an object that does nothing.

    `resume_step` is the step that the run continues from: what is logged of later steps is removed.

    Raises:
        TrainingError: the run folder cannot be written.
    """
    if world.rank != 0 or record is None:
        return Trackers([], None, resume_step)
    assert plan.total_steps is not None
    console = Console(plan.total_steps, resume_step, sys.stdout)
    files = MetricsFiles(run_folder, record.launch, resume_step)
    trackers: list[Tracker] = [files, console]

    def note(line: str) -> None:
        """A tracker's own trouble. It is recorded, and may arrive from another thread."""
        files.event("tracker", {"message": line})
        print(line, file=sys.stderr, flush=True)

    for name, start in _outside(config, run_folder, plan, resume_step).items():
        trackers.append(BackgroundTracker(name, start, note))
    return Trackers(trackers, record, resume_step)


def _outside(config: Config, run_folder: Path, plan: Plan, resume_step: int) -> dict[str, Callable[[], Tracker]]:
    """Trackers that write elsewhere than into the run folder's own files, by name."""
    starts: dict[str, Callable[[], Tracker]] = {}
    mode = wandb_mode(config.logging, os.environ, Path.home())
    if mode is not None:
        settings = values_of(config) | {"plan": asdict(plan)}
        starts["wandb"] = lambda: WandbTracker(config.logging, mode, run_folder, settings)
    if config.logging.tensorboard:
        starts["tensorboard"] = lambda: TensorBoardTracker(run_folder, resume_step)
    return starts
