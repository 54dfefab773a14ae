"""What the loop asks of saving: begin a checkpoint, hear how it ended, know which is the newest."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_recipes.checkpoint.contents import Contents, capture
from ds_recipes.checkpoint.manifest import RANGES
from ds_recipes.checkpoint.native.write import NativePart
from ds_recipes.checkpoint.retention import EVALUATION, Keep
from ds_recipes.checkpoint.saver import Saver
from ds_recipes.checkpoint.store import Store, checkpoint_name
from ds_recipes.config.checkpoint_settings import CheckpointConfig
from ds_recipes.config.hang_settings import SAVE
from ds_recipes.engine.base import Engine
from ds_recipes.errors import SaveError
from ds_recipes.training.state import TrainingState
from ds_recipes.training.trackers.group import Trackers
from ds_recipes.world.group import World
from ds_recipes.world.hang.activity import here

PROBE_TOKENS = 16
"""Length of the fixed row whose logits a checkpoint records, for the check of an exported model."""


@dataclass(frozen=True)
class ModelRecord:
    """What every checkpoint of a run says of its model: small files by name (rank 0's are written), tied names, ids."""

    files: Mapping[str, bytes]
    tied: Mapping[str, str]
    vocabulary_size: int


@dataclass
class _Begun:
    """A save that has not been reported yet."""

    step: int
    must_succeed: bool
    started: float  # time.monotonic()
    stall_seconds: float = 0.0


class Saving:
    """The checkpoints of a run, for its loop. What it reports comes from the thread that calls it."""

    def __init__(
        self,
        settings: CheckpointConfig,
        folder: Path,
        world: World,
        engine: Engine,
        trackers: Trackers,
        model: ModelRecord,
        record: Callable[[], Mapping[str, Any]],
        attempt: str,
        fence: Callable[[], None],
        last_saved: Path | None,
    ) -> None:
        """Every rank must make one.

        `record` gives further entries of state.json, and is asked at each save. `attempt` and `fence` as `Store` has them.
        `last_saved` is the checkpoint that the run continues, if it lies in its own folder.
        """
        self.last_saved = last_saved
        self._settings = settings
        self._world = world
        self._engine = engine
        self._trackers = trackers
        self._model = model
        self._record = record
        side = world.companion()
        keep = Keep(settings.keep_last, settings.keep_every, settings.keep_best)
        foreign = None if settings.checkpoint_format == RANGES else NativePart
        store = Store(folder, side, attempt, keep, fence)
        self._saver = Saver(store, side, settings.save_optimizer, self._note, foreign)
        self._begun: _Begun | None = None
        self._longest_save_seconds = 0.0

    def prepare(self) -> None:
        """Let the memory for saves beside training be taken, in a thread. Every rank must call it; once is enough."""
        if self._settings.async_save and self._settings.save_model:
            self._saver.prepare(self._engine)

    def save(self, state: TrainingState, evaluation: Mapping[str, float] | None, must_succeed: bool) -> None:
        """Begin a checkpoint of `state`, unless there is one or saving is off. Every rank must call it.

        One that must succeed is complete when this returns; others are written while training goes on, where
        `async_save` and the host's memory allow it. `evaluation` is the validation after this very step, if there was one.

        Raises:
            SaveError: the save before, or this one, could not be written, and must be.
        """
        begun = _Begun(state.step, must_succeed, time.monotonic())
        self.wait()
        name = checkpoint_name(state.step)
        if not self._settings.save_model or (self.last_saved is not None and self.last_saved.name == name):
            return
        self._world.doing("saving", SAVE, state.step)
        contents = self._capture(state, evaluation)
        self._saver.begin(contents, self._engine, self._settings.async_save and not must_succeed)
        begun.stall_seconds = time.monotonic() - begun.started
        self._begun = begun
        if must_succeed:
            self.wait()

    def poll(self) -> None:
        """Report a save that has ended. Cheap, for every step; not collective.

        Raises:
            SaveError: it failed, and `on_save_error` is stop.
        """
        if not self._saver.is_busy:
            self.wait()

    def wait(self) -> None:
        """Report the save under way, once it has ended. Not collective.

        Raises:
            SaveError: it failed, and had to succeed or `on_save_error` is stop.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        if self._saver.is_busy:
            self._world.doing("waiting for the save", SAVE, begun.step)
        try:
            with here().waiting("the thread that writes the checkpoint"):
                saved = self._saver.outcome()
        except SaveError as error:
            if begun.must_succeed or self._settings.on_save_error == "stop":
                raise
            message = f"{error}\nTraining goes on (on_save_error continue); the next save tries again."
            self._trackers.event("save_failed", step=begun.step, message=message)
            return
        assert saved is not None
        self._longest_save_seconds = max(self._longest_save_seconds, begun.stall_seconds + saved.write_seconds)
        self.last_saved = saved.published.path
        self._trackers.event(
            "saved",
            step=begun.step,
            path=str(saved.published.path),
            stall_seconds=round(begun.stall_seconds, 3),
            write_seconds=round(saved.write_seconds, 3),
        )
        for warning in saved.published.warnings:
            self._trackers.event("warning", step=begun.step, message=warning)

    def went_back(self, checkpoint: Path) -> None:
        """The run continues from `checkpoint`: later ones are no longer its own. No save may be under way."""
        assert self._begun is None
        self.last_saved = checkpoint

    def reserve_seconds(self) -> float:
        """Time that a last save may take: half more than the longest so far, and twice if one is being written."""
        under_way = time.monotonic() - self._begun.started if self._begun is not None else 0.0
        longest = max(self._longest_save_seconds, under_way)
        return 1.5 * longest * (1 if self._begun is None else 2)

    def last_saved_line(self) -> str:
        """For messages of what ends a run."""
        return f"The newest checkpoint is {self.last_saved}." if self.last_saved else "No checkpoint was saved yet."

    def _capture(self, state: TrainingState, evaluation: Mapping[str, float] | None) -> Contents:
        generator = torch.Generator().manual_seed(0)
        probe_ids = torch.randint(0, self._model.vocabulary_size, (1, PROBE_TOKENS), generator=generator)
        probe_logits = self._engine.logits(probe_ids)
        content = {
            **state.to_json(),
            **self._record(),
            "scaler": self._engine.scaler_state(),
            EVALUATION: None if evaluation is None else dict(evaluation),
        }
        return capture(
            self._engine, state.step, content, self._model.files, (probe_ids, probe_logits), self._model.tied
        )

    def _note(self, line: str) -> None:
        self._trackers.event("note", message=line)
