"""One run's parts, put together for the loop: what the loop asks of them, and saving."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ds_recipes.checkpoint.store import save_checkpoint
from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.data.corpus import Corpus
from ds_recipes.data.stream import EvalStream, Stream
from ds_recipes.engine.base import Engine
from ds_recipes.training.meter import StepMeter
from ds_recipes.training.norms import state_norms
from ds_recipes.training.state import TrainingState
from ds_recipes.training.stop import StopRequest
from ds_recipes.training.trackers.group import Trackers
from ds_recipes.world.group import World

PROBE_TOKENS = 16
"""Length of the fixed row whose logits a checkpoint records, for the check of an exported model."""


@dataclass
class Run:
    """Everything a loop needs, made by `training/start.py`. `state` is where the run begins."""

    config: Config
    plan: Plan
    world: World
    engine: Engine
    corpus: Corpus
    validation: Corpus | None
    stream: Stream
    trackers: Trackers
    meter: StepMeter
    stop: StopRequest
    state: TrainingState
    folder: Path
    identity: dict[str, str]
    model_files: dict[str, bytes]  # on rank 0
    tied: dict[str, str]
    vocabulary_size: int
    last_saved: Path | None = None
    longest_save_seconds: float = 0.0

    @property
    def total_steps(self) -> int:
        assert self.plan.total_steps is not None
        return self.plan.total_steps

    def evaluates_after(self, step: int) -> bool:
        """True after every `eval_interval` steps and after the last one, where there is validation data."""
        interval = self.config.evaluation.eval_interval
        return self.validation is not None and (step == self.total_steps or (interval > 0 and step % interval == 0))

    def saves_after(self, step: int) -> bool:
        """True after every `save_interval_iteration` steps."""
        interval = self.config.checkpoint.save_interval_iteration
        return interval > 0 and step % interval == 0

    def validation_stream(self) -> EvalStream:
        assert self.validation is not None
        return EvalStream(self.validation, self.plan, self.world.rank)

    def state_norms(self, step: int) -> dict[str, float]:
        """Norms of weights and moments, at the steps that ask for them; every rank takes part."""
        interval = self.config.logging.state_norms_interval
        return state_norms(self.engine, self.world) if interval > 0 and step % interval == 0 else {}

    def reserve_seconds(self) -> float:
        """Time kept before the deadline: a step and a save, each as long as the longest so far."""
        return self.meter.longest_step_seconds + 1.5 * self.longest_save_seconds

    def provenance(self, position: int) -> str:
        """The file and line of the documents in the row at `position` of the run's order."""
        if self.plan.total_rows is not None and position >= self.plan.total_rows:
            return "a blank row"
        return self.corpus.provenance(int(self.corpus.locate(np.array([position])).row[0]))

    def source_metrics(self, state: TrainingState) -> dict[str, float]:
        """Passes over each source and its tokens so far, where there are several sources."""
        names = self.corpus.names
        if len(names) == 1:
            return {}
        epochs = dict(zip(names, self.corpus.epochs_at(state.position), strict=True))
        return {f"epoch/{name}": epochs[name] for name in names} | {
            f"tokens/{name}": tokens for name, tokens in zip(names, state.source_tokens, strict=True)
        }

    def report_repeats(self, start: int, state: TrainingState) -> None:
        """Say which sources begin again in a new order at a position between `start` and the state's."""
        names, limit = self.corpus.names, self.plan.total_rows
        for source, epoch in self.corpus.repeats_between(start, min(state.position, limit or state.position)):
            times = "once" if epoch == 1 else f"{epoch} times"
            message = f"{names[source]} has been seen {times} in full; it repeats with a new shuffle"
            self.trackers.event("source_repeats", step=state.step, source=names[source], epoch=epoch, message=message)

    def last_saved_line(self) -> str:
        return f"The newest checkpoint is {self.last_saved}." if self.last_saved else "No checkpoint was saved yet."

    def save(self, state: TrainingState) -> None:
        """Publish a checkpoint of `state`, unless there is one or saving is off. Every rank must call it."""
        if not self.config.checkpoint.save_model or (
            self.last_saved and self.last_saved.name == f"iter_{state.step:07d}"
        ):
            return
        started = time.monotonic()
        generator = torch.Generator().manual_seed(0)
        probe_ids = torch.randint(0, self.vocabulary_size, (1, PROBE_TOKENS), generator=generator)
        probe_logits = self.engine.logits(probe_ids).cpu()
        self.last_saved = save_checkpoint(
            self.folder,
            state.step,
            self.engine,
            state={
                **state.to_json(),
                "identity": self.identity,
                "scaler": self.engine.scaler_state(),
                "seed": self.config.run.seed,
                "data_files": self.corpus.files,
                "skip_samples": self.stream.skips.ranges,
            },
            files=self.model_files,
            probe=(probe_ids, probe_logits),
            tied=self.tied,
            world=self.world,
            save_optimizer=self.config.checkpoint.save_optimizer,
            keep_last=self.config.checkpoint.keep_last,
        )
        seconds = time.monotonic() - started
        self.longest_save_seconds = max(self.longest_save_seconds, seconds)
        self.trackers.event("saved", step=state.step, path=str(self.last_saved), seconds=round(seconds, 3))
