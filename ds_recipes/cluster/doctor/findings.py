"""What a check says: one finding a fact, good or bad, with its cause and what to do about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

FINE, WARNING, ERROR = "fine", "warning", "error"
LEVELS = (FINE, WARNING, ERROR)
"""In the order of a report: the worst stands last, where a reader's eye is when the program has ended."""


@dataclass(frozen=True)
class Finding:
    """One fact about the machines or the job.

    `name` is the same wherever the same thing is found, for programs. `ranks` and `hosts` say who found it; both are empty
    for a fact about the job as a whole. `data` holds the numbers behind the text, by names with units.
    """

    name: str
    level: str
    text: str
    cause: str = ""
    advice: str = ""
    ranks: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def found_by(self, rank: int, host: str) -> "Finding":
        """The same, with the one who found it."""
        return replace(self, ranks=(rank,), hosts=(host,))

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return {
            "name": self.name,
            "level": self.level,
            "text": self.text,
            "cause": self.cause,
            "advice": self.advice,
            "ranks": list(self.ranks),
            "hosts": list(self.hosts),
            "data": dict(self.data),
        }


def from_json(value: Mapping[str, Any]) -> Finding:
    """A finding that `to_json` wrote."""
    return Finding(**{**value, "ranks": tuple(value["ranks"]), "hosts": tuple(value["hosts"])})


def fine(name: str, text: str, **data: Any) -> Finding:
    """Nothing is to be done."""
    return Finding(name, FINE, text, data=data)


def warning(name: str, text: str, cause: str, advice: str, **data: Any) -> Finding:
    """A run can start, but is slow, at risk, or not what was meant."""
    return Finding(name, WARNING, text, cause, advice, data=data)


def error(name: str, text: str, cause: str, advice: str, **data: Any) -> Finding:
    """A run would not start, or would fail."""
    return Finding(name, ERROR, text, cause, advice, data=data)


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """One finding out of those of several ranks that say the same word for word."""
    together: dict[tuple[str, str, str, str], Finding] = {}
    for finding in findings:
        key = (finding.level, finding.name, finding.text, finding.cause)
        known = together.get(key)
        if known is None:
            together[key] = finding
            continue
        hosts = tuple(dict.fromkeys([*known.hosts, *finding.hosts]))
        together[key] = replace(known, ranks=tuple(sorted({*known.ranks, *finding.ranks})), hosts=hosts)
    return list(together.values())


def worst_last(findings: Sequence[Finding]) -> list[Finding]:
    """Fine ones, warnings, errors; within a level the order of the checks."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def has_errors(findings: Iterable[Finding]) -> bool:
    """True if a run would not start, or would fail."""
    return any(finding.level == ERROR for finding in findings)
