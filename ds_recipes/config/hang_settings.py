"""Settings of the hang monitor: how long each phase of a run may go without any sign of progress."""

from collections.abc import Sequence
from dataclasses import dataclass

from ds_recipes.config.setting import setting
from ds_recipes.config.values import parse_duration

START, LOAD, TOKENISE, STEP, EVALUATE, SAVE = PHASES = ("start", "load", "tokenise", "step", "evaluate", "save")
"""What a run does, as far as its limits go."""

DEFAULT_SECONDS = 1800.0
"""A phase's limit before anything of it was seen, and the most that is ever learned."""

LEAST_SECONDS = {START: 300.0, LOAD: 300.0, TOKENISE: 300.0, STEP: 120.0, EVALUATE: 120.0, SAVE: 300.0}
"""A learned limit is never shorter: a disk or a network may rest for a while without being broken."""

SPEAKS_FIRST_SECONDS = 120.0
"""Collectives time out so much later than the longest limit: the monitor can say more than they can."""


@dataclass(frozen=True)
class HangConfig:
    """The hang monitor: a run that no longer comes further is ended, and the rank that holds it up is named."""

    hang_monitor: bool = setting(
        True, "Watch for ranks that no longer come further; end the run, name them, and keep every rank's stacks."
    )
    hang_factor: float = setting(
        10.0,
        "A phase's limit is so many times the longest time in it without progress so far, but at least 2 minutes (step, "
        "evaluate) or 5 minutes, and at most 30 minutes, which is also the limit before anything was seen.",
        above=1,
    )
    hang_limits: tuple[str, ...] = setting(
        (),
        "Fixed limits of phases instead, such as step=10m save=1h. Phases: start, load, tokenise, step, evaluate, save. A "
        "limit counts the time without any progress: a file read, a batch evaluated, a micro-step done begins it anew.",
    )


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """Seconds by phase out of words such as `step=10m`.

    Raises:
        ValueError: a word is no phase with a duration, or a phase comes twice; the message completes "hang_limits ".
    """
    limits: dict[str, float] = {}
    for word in words:
        phase, equals, text = word.partition("=")
        if not equals or phase not in PHASES:
            raise ValueError(f"takes phase=duration with a phase of {', '.join(PHASES)}, not {word!r}")
        if phase in limits:
            raise ValueError(f"gives {phase} twice")
        seconds = parse_duration(text)
        if seconds <= 0:
            raise ValueError(f"needs a duration above 0 for {phase}, such as {phase}=10m")
        limits[phase] = float(seconds)
    return limits


def collective_seconds(config: HangConfig) -> float:
    """How long a collective may wait for a rank before it fails by itself: longer than the monitor waits."""
    return max(DEFAULT_SECONDS, *parse_limits(config.hang_limits).values(), 0.0) + SPEAKS_FIRST_SECONDS
