"""TensorBoard files in RUN/tensorboard. The only file that imports tensorboard, and only when a run asks for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_recipes.training.trackers.base import Tracker, panel_values


class TensorBoardTracker(Tracker):
    """Writes every number as a scalar under its panel's name."""

    def __init__(self, run_folder: Path, resume_step: int) -> None:
        """Hide an earlier launch's steps after `resume_step`. Runs in the tracker's thread.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder = run_folder / "tensorboard"
        self._open(resume_step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a step's numbers."""
        for name, value in panel_values(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write an evaluation's numbers."""
        self.log(step, metrics)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Events stay in the run folder."""

    def rewind(self, step: int, total_steps: int) -> None:
        """Hide the steps after `step`."""
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
