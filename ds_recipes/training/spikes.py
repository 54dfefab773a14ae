"""Which losses are spikes: far above the median of the latest good ones, by a deviation that outliers do not stretch."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_LOSSES = 16
"""Nothing is judged before so many losses are known, or as many as the window holds."""

MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""

LEAST_SHARE = 0.005
"""The deviation counts as at least this share of the median: where losses hardly vary, any change would be a spike."""

LEAST_NATS = 0.001
"""And as at least this: near a loss of zero, of a model that knows its data by heart, a share says nothing."""


@dataclass(frozen=True)
class Spike:
    """A loss that is out of the ordinary, and what was ordinary: median and robust standard deviation of the window."""

    loss: float
    median: float
    sigma: float


class SpikeWatch:
    """Judges each loss by the window of those before it. A spike does not enter the window, so it excuses no other."""

    def __init__(self, window: int, limit_sigma: float, losses: Sequence[float] = ()) -> None:
        """`window` losses are kept (0: nothing is judged); `losses` are those known already, oldest first."""
        self._limit_sigma = limit_sigma
        self._fewest = min(FEWEST_LOSSES, window)
        self._losses = deque(losses, maxlen=window)

    @property
    def losses(self) -> list[float]:
        """The window, oldest first."""
        return list(self._losses)

    def judge(self, loss: float) -> Spike | None:
        """The spike that a finite loss is; any other enters the window."""
        if self._losses and len(self._losses) >= self._fewest:
            median, sigma = robust_spread(self._losses)
            if loss > median + self._limit_sigma * sigma:
                return Spike(loss, median, sigma)
        self._losses.append(loss)
        return None

    def forget(self) -> None:
        """Learn anew what is ordinary."""
        self._losses.clear()


def robust_spread(losses: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Median and standard deviation of losses of which fewer than half may be anything."""
    values = np.array(losses)
    median = float(np.median(values))
    deviation = MAD_TO_SIGMA * float(np.median(np.abs(values - median)))
    return median, max(deviation, LEAST_SHARE * abs(median), LEAST_NATS)
