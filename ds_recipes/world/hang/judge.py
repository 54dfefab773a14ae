"""From what each rank says of itself, and from who says nothing, to who holds the run up. Pure: no clock, no store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from ds_recipes.world.channel import name_ranks

LEAST_SILENCE_BEATS = 3
"""A rank may miss so many beats before its silence says anything."""


@dataclass(frozen=True)
class Seen:
    """What is known of a rank: its activities as it told them last (`Activity.to_json`), and for how long it is silent."""

    rank: int
    activities: Sequence[dict[str, Any]]
    silent_seconds: float


@dataclass(frozen=True)
class Culprit:
    """A rank that holds the run up: in which phase, since when, how long it might have, and how that shows."""

    rank: int
    host: str
    phase: str
    doing: str
    step: int
    seconds: float
    limit_seconds: float
    how: str


@dataclass(frozen=True)
class Verdict:
    """A hang. `silent` are the ranks that do not answer; without `culprits` all ranks wait for each other."""

    culprits: tuple[Culprit, ...]
    silent: tuple[int, ...]
    text: str

    def to_json(self) -> dict[str, Any]:
        """For the other ranks and for hang.json."""
        return {
            "text": self.text,
            "silent": list(self.silent),
            "culprits": [dict(vars(culprit)) for culprit in self.culprits],
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """The contrary of `to_json`."""
        return cls(tuple(Culprit(**one) for one in saved["culprits"]), tuple(saved["silent"]), saved["text"])


def judge(
    seen: Sequence[Seen],
    hosts: Sequence[str],
    beat_seconds: float,
    state_of: Callable[[int], str | None] = lambda rank: None,
) -> Verdict | None:
    """None while some rank comes further, or may still be about to.

    `state_of` gives a process's state in words, where it runs on this host.
    """
    culprits = [found for one in seen if (found := _blame(one, hosts, beat_seconds, state_of)) is not None]
    silent = tuple(one.rank for one in seen if _is_silent(one, beat_seconds))
    if culprits:
        return Verdict(tuple(culprits), silent, _blaming(culprits, len(seen)))
    quiet = [one for one in seen if one.silent_seconds > LEAST_SILENCE_BEATS * beat_seconds]
    others = [one for one in seen if one not in quiet]
    activities = [activity for one in others for activity in one.activities]
    if not activities or any(one["idle_seconds"] <= one["limit_seconds"] for one in activities):
        return None
    if not quiet:
        return Verdict((), (), _in_a_circle(seen, hosts))
    # What it said last may be of the phase before: those who wait for it know better where it is.
    known = others[0].activities[0]
    culprits = [_culprit(one, known, hosts, one.silent_seconds, _silence(one.rank, state_of)) for one in quiet]
    return Verdict(tuple(culprits), tuple(one.rank for one in quiet), _blaming(culprits, len(seen)))


def _is_silent(one: Seen, beat_seconds: float) -> bool:
    limit_seconds: float = _strictest(one)["limit_seconds"]
    return one.silent_seconds > max(limit_seconds, LEAST_SILENCE_BEATS * beat_seconds)


def _strictest(one: Seen) -> dict[str, Any]:
    """Of a process that does not answer no activity comes further."""
    return min(one.activities, key=lambda activity: float(activity["limit_seconds"]))


def _blame(
    one: Seen, hosts: Sequence[str], beat_seconds: float, state_of: Callable[[int], str | None]
) -> Culprit | None:
    if _is_silent(one, beat_seconds):
        return _culprit(one, _strictest(one), hosts, one.silent_seconds, _silence(one.rank, state_of))
    for activity in one.activities:
        if activity["waits_for"] is None and activity["idle_seconds"] > activity["limit_seconds"]:
            how = "has not come further, and waits for no other rank"
            return _culprit(one, activity, hosts, activity["idle_seconds"], how)
    return None


def _silence(rank: int, state_of: Callable[[int], str | None]) -> str:
    return f"does not answer: {state_of(rank) or 'it is stopped, or its host or the way to it is gone'}"


def _culprit(one: Seen, activity: dict[str, Any], hosts: Sequence[str], seconds: float, how: str) -> Culprit:
    what = {name: activity[name] for name in ("phase", "doing", "step", "limit_seconds")}
    return Culprit(one.rank, hosts[one.rank], seconds=round(seconds, 1), how=how, **what)


def _blaming(culprits: Sequence[Culprit], size: int) -> str:
    first = culprits[0]
    line = (
        f"Rank {first.rank} on {first.host} hangs in phase {first.phase} ({first.doing}): for {first.seconds:.0f} s it "
        f"{first.how}. The limit is {first.limit_seconds:.0f} s."
    )
    others = [one.rank for one in culprits[1:]]
    if len(culprits) == size > 1:
        return f"No rank comes further, and none waits for another one. {line}"
    return f"{line} So do {name_ranks(others)}." if others else line


def _in_a_circle(seen: Sequence[Seen], hosts: Sequence[str]) -> str:
    mains = {one.rank: one.activities[0] for one in seen}
    idle, limit = (max(main[name] for main in mains.values()) for name in ("idle_seconds", "limit_seconds"))
    line = f"No rank comes further: for {idle:.0f} s all wait for each other. The limit is {limit:.0f} s."
    behind = min(mains, key=lambda rank: (mains[rank]["step"], mains[rank]["collectives"]))
    mine, usual = mains[behind], median(main["collectives"] for main in mains.values())
    if (mine["step"], mine["collectives"]) == max((main["step"], main["collectives"]) for main in mains.values()):
        return f"{line} They have come equally far (phase {mine['phase']}, {mine['doing']}): look at the network and the devices."
    return (
        f"{line} Rank {behind} on {hosts[behind]} has come least far: phase {mine['phase']}, {mine['doing']}, "
        f"{mine['collectives']} collectives, where {usual:g} are usual; the last is {mine['collective'] or 'none'}."
    )
