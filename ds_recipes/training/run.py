"""One run's parts, put together for the loop, and what the loop asks of them."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ds_recipes.config.plan import Plan
from ds_recipes.config.schema import Config
from ds_recipes.data.corpus import Corpus
from ds_recipes.data.stream import EvalStream, Stream
from ds_recipes.engine.base import Engine
from ds_recipes.training.checksums import CHECKSUM_STEP, Checksums
from ds_recipes.training.guard import Guard
from ds_recipes.training.meter import StepMeter
from ds_recipes.training.norms import state_norms
from ds_recipes.training.saving import Saving
from ds_recipes.training.state import TrainingState
from ds_recipes.training.stop import StopRequest
from ds_recipes.training.trackers.group import Trackers
from ds_recipes.world.group import World

NUMBER = re.compile(r"\.\d+(?=\.|$)")
"""Of a layer or an expert in a parameter's name."""

SHOWN_KINDS = 6


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
    guard: Guard
    state: TrainingState
    folder: Path
    identity: dict[str, Any]
    notes: Mapping[str, Any]  # further entries of state.json, for later launches
    attempt: str  # this launch's own name for what it makes in the run folder
    saving: Saving = field(init=False)  # which asks for `record`
    checksums: Checksums = field(init=False)  # which asks for `saves_after`
    longest_evaluation_seconds: float = 0.0
    owes_evaluation: bool = False  # the one after the step that the run continues from was abandoned

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

    def prepare_saving(self, step: int) -> None:
        """After the first step, when training has taken the memory that it needs: see to that for saves beside training."""
        interval = self.config.checkpoint.save_interval_iteration
        if step == self.state.step + 1 and interval > 0 and -(-step // interval) * interval < self.total_steps:
            self.saving.prepare()

    def validation_stream(self) -> EvalStream:
        assert self.validation is not None
        return EvalStream(self.validation, self.plan, self.world.rank)

    def state_norms(self, step: int) -> dict[str, float]:
        """Norms of weights and moments, at the steps that ask for them; every rank takes part."""
        interval = self.config.logging.state_norms_interval
        return state_norms(self.engine, self.world) if interval > 0 and step % interval == 0 else {}

    def reserve_seconds(self, step: int | None = None) -> float:
        """Time kept before the deadline: a save; before `step` that step too, and the evaluation that follows it."""
        seconds = self.saving.reserve_seconds()
        if step is not None:
            seconds += self.meter.longest_step_seconds
            seconds += self.longest_evaluation_seconds if self.evaluates_after(step) else 0.0
        return seconds

    def record(self) -> dict[str, Any]:
        """What a checkpoint's state.json says of the run besides its counters."""
        return {
            "identity": self.identity,
            "seed": self.config.run.seed,
            "data_files": self.corpus.files,
            "skip_samples": self.stream.skips.ranges,
            "guard": self.guard.to_json(),
            CHECKSUM_STEP: self.checksums.passed_step,
            **self.notes,
        }

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

    def report_slow_ranks(self, step: int) -> None:
        """Say which ranks the others wait for, each of them once."""
        for slow in self.world.hang.slow_ranks() if self.world.hang is not None else ():
            where = {"rank": slow.rank, "host": slow.host, "slow_in": slow.part}
            self.trackers.event("straggler", step=step, message=slow.message, **where)

    def report_unused(self, step: int, unused: Collection[str]) -> None:
        """After the first step of a launch, name the trained parameters that it gave no gradient."""
        if step != self.state.step + 1 or not unused:
            return
        kinds = Counter(NUMBER.sub(".*", name) for name in sorted(unused))
        shown = ", ".join(
            f"{kind} ({count})" if count > 1 else kind for kind, count in list(kinds.items())[:SHOWN_KINDS]
        )
        more = f" and {len(kinds) - SHOWN_KINDS} more kinds" if len(kinds) > SHOWN_KINDS else ""
        message = (
            f"{len(unused)} trained parameters got no gradient in this step and stay as they are until they get one: "
            f"{shown}{more}"
        )
        self.trackers.event("unused_parameters", step=step, message=message)

    def report_repeats(self, start: int, state: TrainingState) -> None:
        """Say which sources begin again for the first time at a position between `start` and the state's."""
        names, limit = self.corpus.names, self.plan.total_rows
        for source, epoch in self.corpus.repeats_between(start, min(state.position, limit or state.position)):
            if epoch == 1:  # each epoch that follows is in the metrics
                message = f"{names[source]} has been seen once in full; it repeats with a new shuffle each time"
                self.trackers.event("source_repeats", step=state.step, source=names[source], message=message)
