"""How long a phase may go without progress: a factor of the longest time seen, or what the settings say."""

from collections.abc import Mapping

from ds_recipes.config.hang_settings import DEFAULT_SECONDS, LEAST_SECONDS


class Limits:
    """The limits of one process. `given` are fixed ones, in seconds by phase; the others are learned."""

    def __init__(self, given: Mapping[str, float], factor: float) -> None:
        self._given = dict(given)
        self._factor = factor
        self._longest: dict[str, float] = {}

    def learn(self, phase: str, seconds: float) -> None:
        """So long it took in `phase` until there was progress."""
        if seconds > self._longest.get(phase, 0.0):
            self._longest[phase] = seconds

    def seconds(self, phase: str, is_first: bool = False) -> float:
        """The limit of a phase. With `is_first` what was learned does not count: it begins anew, with what that may take."""
        if phase in self._given:
            return self._given[phase]
        longest = self._longest.get(phase)
        if longest is None or is_first:
            return DEFAULT_SECONDS
        return min(max(self._factor * longest, LEAST_SECONDS[phase]), DEFAULT_SECONDS)

    @property
    def shortest_seconds(self) -> float:
        """The shortest limit that any phase can have."""
        return min(self._given.get(phase, least) for phase, least in LEAST_SECONDS.items())
