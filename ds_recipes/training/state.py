"""The one state of a run besides the engine's: counters and the position in the data."""

from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any


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
    source_tokens: tuple[int, ...] = ()  # not padding, by source of the data

    def after(self, totals: StepTotals, applied: bool, position: int, data_hash: str) -> "TrainingState":
        """The state one step later; a skipped step counts, since its data are spent."""
        return TrainingState(
            step=self.step + 1,
            tokens=self.tokens + totals.tokens,
            target_tokens=self.target_tokens + totals.target_tokens,
            samples=self.samples + totals.samples,
            position=position,
            data_hash=data_hash,
            skipped_steps=self.skipped_steps + (not applied),
            skipped_in_a_row=0 if applied else self.skipped_in_a_row + 1,
            source_tokens=tuple(map(sum, zip_longest(self.source_tokens, totals.source_tokens, fillvalue=0))),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "TrainingState":
        """Read what `to_json` wrote; a checkpoint from before sources were counted has no `source_tokens`."""
        values = {field.name: saved[field.name] for field in fields(cls) if field.name != "source_tokens"}
        return cls(**values, source_tokens=tuple(saved.get("source_tokens", ())))
