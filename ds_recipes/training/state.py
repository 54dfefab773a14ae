"""The one state of a run besides the engine's: counters and the position in the data."""

import math
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any

from ds_recipes.engine.base import StepResult


@dataclass(frozen=True)
class StepTotals:
    """What one optimizer step trained on, summed over all ranks and micro-steps."""

    target_tokens: int
    tokens: int  # not padding
    samples: int  # documents
    source_tokens: tuple[int, ...] = ()  # not padding, by source of the data


@dataclass(frozen=True)
class StepOutcome:
    """How one optimizer step went, the same on all ranks."""

    totals: StepTotals
    result: StepResult
    loss: float  # nats a target token, mean over the whole step
    lr: float
    start: int  # position in the run's order of its first row
    stop: int  # and where those of the next step do
    data_hash: str

    @property
    def loss_is_finite(self) -> bool:
        return math.isfinite(self.loss)

    @property
    def overflowed(self) -> bool:
        """True where only the gradient was not finite, whose loss scale may just have been too large."""
        return self.result.overflowed and self.loss_is_finite

    @property
    def positions(self) -> str:
        """The step's rows as `skip_samples` takes them."""
        return positions_text(self.start, self.stop)


def positions_text(start: int, stop: int) -> str:
    """Positions [start, stop) as the setting `skip_samples` takes them, both ends included."""
    return f"{start}-{stop - 1}"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands after `step` optimizer steps. Counts are cumulative and global."""

    step: int = 0
    tokens: int = 0  # not padding
    target_tokens: int = 0
    samples: int = 0  # documents
    position: int = 0  # rows taken from the run's order, blank rows at its end included
    data_hash: str = ""  # rolling hash of the rows and of the data they are of
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    overflow_steps: int = 0  # of the skipped steps those that loss scaling caused
    nonfinite_losses: int = 0  # of the skipped steps those whose loss was not finite
    loss_spikes: int = 0
    source_tokens: tuple[int, ...] = ()  # not padding, by source of the data

    @property
    def schedule_step(self) -> int:
        """Steps that count for the learning rate: an overflow step is a search for the loss scale, not training."""
        return self.step - self.overflow_steps

    def after(self, outcome: StepOutcome, is_spike: bool) -> "TrainingState":
        """The state one step later; a skipped step counts, since its data are spent."""
        totals, applied = outcome.totals, outcome.result.applied
        return TrainingState(
            step=self.step + 1,
            tokens=self.tokens + totals.tokens,
            target_tokens=self.target_tokens + totals.target_tokens,
            samples=self.samples + totals.samples,
            position=outcome.stop,
            data_hash=outcome.data_hash,
            skipped_steps=self.skipped_steps + (not applied),
            skipped_in_a_row=0 if applied else self.skipped_in_a_row + 1,
            overflow_steps=self.overflow_steps + outcome.overflowed,
            nonfinite_losses=self.nonfinite_losses + (not outcome.loss_is_finite),
            loss_spikes=self.loss_spikes + is_spike,
            source_tokens=tuple(map(sum, zip_longest(self.source_tokens, totals.source_tokens, fillvalue=0))),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "TrainingState":
        """Read what `to_json` wrote; an older checkpoint lacks the counts that came later."""
        later: dict[str, Any] = {"source_tokens": (), "overflow_steps": 0, "nonfinite_losses": 0, "loss_spikes": 0}
        values = {field.name: (later | saved)[field.name] for field in fields(cls)}
        return cls(**values | {"source_tokens": tuple(values["source_tokens"])})
