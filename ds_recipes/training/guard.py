"""Which steps are bad, in a row and at all. It decides; what follows is done in `bad_steps` and `rewind`.

It sees numbers that all ranks have alike, so all ranks come to the same verdict. All that it remembers is in the
checkpoint: a run that is killed and started again decides as one that was not.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ds_recipes.config.engine_settings import LossScaling
from ds_recipes.config.guard_settings import GuardConfig
from ds_recipes.training.spikes import Spike, SpikeWatch
from ds_recipes.training.state import StepOutcome, TrainingState


@dataclass(frozen=True)
class SpikeRow:
    """Spikes in a row. Skipped steps between them are neither spikes nor an end of the row."""

    first_step: int
    start: int  # position in the run's order where the first one's rows begin
    stop: int  # where the rows of the step after the last one begin
    count: int


@dataclass(frozen=True)
class Rewind:
    """A recovery: after `from_step` the run went back to `to_step`, and leaves out positions [start, stop)."""

    from_step: int
    to_step: int
    start: int
    stop: int


@dataclass(frozen=True)
class Verdict:
    """What a step was. `divergence` is set at the step that makes a row of spikes one."""

    spike: Spike | None = None
    divergence: SpikeRow | None = None
    too_many_skipped: bool = False


class Guard:
    """Judges each step; remembers the row of bad steps that a run is in, and the rewinds that were done."""

    def __init__(
        self, settings: GuardConfig, loss_scaling: LossScaling | None, saved: Mapping[str, Any] | None = None
    ) -> None:
        """`saved` is what `to_json` gave; a checkpoint of an older version has none."""
        self._settings = settings
        self._loss_scaling = loss_scaling
        self.rewinds: tuple[Rewind, ...] = ()
        self._read({} if saved is None else saved)
        self.rewinds = tuple(Rewind(**rewind) for rewind in (saved or {}).get("rewinds", ()))

    def _read(self, saved: Mapping[str, Any]) -> None:
        settings, row, last_good = self._settings, saved.get("row"), saved.get("last_good")
        self._watch = SpikeWatch(settings.spike_window, settings.spike_sigma, saved.get("losses", ()))
        self.row = None if row is None else SpikeRow(**row)
        self.last_good = None if last_good is None else TrainingState.from_json(last_good)

    def judge(self, state: TrainingState, outcome: StepOutcome) -> Verdict:
        """Say what the step that leads on from `state` was.

        `last_good` is then the state whose weights the engine holds, while steps are skipped; else None.
        """
        if not outcome.result.applied:
            self.last_good = self.last_good or state
            skipped = state.skipped_in_a_row + 1
            return Verdict(too_many_skipped=skipped >= self._settings.max_skipped_steps and not self._waits(outcome))
        self.last_good = None
        spike = self._watch.judge(outcome.loss) if outcome.loss_is_finite else None
        if spike is None:
            self.row = None
            return Verdict()
        if self.row is None:
            self.row = SpikeRow(state.step + 1, outcome.start, outcome.stop, 1)
        else:
            self.row = SpikeRow(self.row.first_step, self.row.start, outcome.stop, self.row.count + 1)
        return Verdict(spike, self.row if self.row.count >= self._settings.spike_patience else None)

    def _waits(self, outcome: StepOutcome) -> bool:
        """True while dynamic loss scaling, which halves the scale, has not come to its least."""
        scaling, scale = self._loss_scaling, outcome.result.loss_scale
        if scaling is None or scaling.static is not None or scale is None or not outcome.overflowed:
            return False
        return scale > scaling.least

    def accept(self) -> None:
        """The run goes on after a divergence: what is ordinary is learned anew from the losses that follow."""
        self._watch.forget()
        self.row = None

    def go_back(self, saved: Mapping[str, Any] | None, rewind: Rewind) -> None:
        """Be as it was at the checkpoint that the run goes back to, but remember all rewinds."""
        self._read({} if saved is None else saved)
        self.rewinds = (*self.rewinds, rewind)

    def to_json(self) -> dict[str, Any]:
        """All that it remembers."""
        return {
            "losses": self._watch.losses,
            "row": None if self.row is None else asdict(self.row),
            "last_good": None if self.last_good is None else self.last_good.to_json(),
            "rewinds": [asdict(rewind) for rewind in self.rewinds],
        }
