"""Loss scaling of fp16: a factor on the loss that keeps small gradients above fp16's smallest number.

The rules are DeepSpeed's (runtime/fp16/loss_scaler.py of 0.19), so that both engines go the same way and continue each
other's runs.
"""

from ds_recipes.config.engine_settings import LossScaling
from ds_recipes.errors import TrainingError

FACTOR = 2.0


class LossScaler:
    """The scale of the next step, changed after each step by whether its gradient overflowed.

    Dynamic: an overflow first spends one of `hysteresis`, then halves the scale each time, down to `least`. The scale is
    doubled by the step that follows `window`, 2 * `window`, ... steps in a row without overflow, which refills the
    hysteresis; with `consecutive_hysteresis` every step without overflow refills it.
    """

    def __init__(self, settings: LossScaling) -> None:
        self._settings = settings
        self.is_dynamic = settings.static is None
        self.scale = 2.0**settings.initial_power if settings.static is None else settings.static
        self._good_steps = 0
        self._hysteresis_left = settings.hysteresis

    def update(self, overflow: bool) -> None:
        """Note how the step that was taken with `scale` went.

        Raises:
            TrainingError: an overflow at the least scale.
        """
        if not self.is_dynamic:
            return
        if overflow:
            self._overflow()
            return
        settings = self._settings
        if settings.consecutive_hysteresis:
            self._hysteresis_left = settings.hysteresis
        if self._good_steps > 0 and self._good_steps % settings.window == 0:
            self._hysteresis_left = settings.hysteresis
            self.scale *= FACTOR
        self._good_steps += 1

    def _overflow(self) -> None:
        self._good_steps = 0
        if self._settings.hysteresis != 1 and self._hysteresis_left != 1:
            self._hysteresis_left -= 1
            return
        if self.scale == self._settings.least:
            raise TrainingError(
                f"the gradient overflowed with the loss scale at its least, {self.scale:g} (fp16.min_loss_scale). Lower the "
                "learning rate, look at the data from there on, or train in bf16."
            )
        self.scale = max(self.scale / FACTOR, self._settings.least)

    def state(self) -> dict[str, float]:
        """Where it stands, for a checkpoint; empty where the scale is fixed."""
        if not self.is_dynamic:
            return {}
        return {
            "scale": self.scale,
            "good_steps": float(self._good_steps),
            "hysteresis_left": float(self._hysteresis_left),
        }

    def load(self, state: dict[str, float]) -> None:
        """Go on where `state` was taken; a fixed scale stays what it is."""
        if self.is_dynamic:
            self.scale = state["scale"]
            self._good_steps = int(state["good_steps"])
            self._hysteresis_left = int(state["hysteresis_left"])
