"""The one state of a run besides the engine's: counters and the position in the data."""

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
class TrainingState:
    """Where a run stands after `step` optimizer steps. Counts are cumulative and global."""

    step: int = 0
    tokens: int = 0  # not padding
    target_tokens: int = 0
    samples: int = 0  # documents
    position: int = 0  # rows taken from the run's order, blank rows at its end included
    data_hash: str = ""  # rolling hash of the row ids
    skipped_steps: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    overflow_steps: int = 0  # of the skipped steps those that loss scaling caused
    source_tokens: tuple[int, ...] = ()  # not padding, by source of the data

    @property
    def schedule_step(self) -> int:
        """Steps that count for the learning rate: an overflow step is a search for the loss scale, not training."""
        return self.step - self.overflow_steps

    def after(self, totals: StepTotals, result: StepResult, position: int, data_hash: str) -> "TrainingState":
        """The state one step later; a skipped step counts, since its data are spent."""
        return TrainingState(
            step=self.step + 1,
            tokens=self.tokens + totals.tokens,
            target_tokens=self.target_tokens + totals.target_tokens,
            samples=self.samples + totals.samples,
            position=position,
            data_hash=data_hash,
            skipped_steps=self.skipped_steps + (not result.applied),
            skipped_in_a_row=0 if result.applied else self.skipped_in_a_row + 1,
            overflow_steps=self.overflow_steps + result.overflowed,
            source_tokens=tuple(map(sum, zip_longest(self.source_tokens, totals.source_tokens, fillvalue=0))),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "TrainingState":
        """Read what `to_json` wrote; an older checkpoint knows nothing of sources and of overflow steps."""
        later: dict[str, Any] = {"source_tokens": (), "overflow_steps": 0}
        values = {field.name: (later | saved)[field.name] for field in fields(cls)}
        return cls(**values | {"source_tokens": tuple(values["source_tokens"])})
