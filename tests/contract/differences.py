"""The largest differences that the contract tests found, printed at the end of a session."""

LARGEST: dict[tuple[str, str], float] = {}
"""(what was compared, of whom): the largest difference seen."""


def note(what: str, whose: str, value: float) -> float:
    """Remember a difference if it is the largest of its kind; returns it."""
    LARGEST[what, whose] = max(value, LARGEST.get((what, whose), 0.0))
    return value


def table() -> list[str]:
    """One line a kind of difference, the engines side by side."""
    kinds = list(dict.fromkeys(what for what, _ in LARGEST))
    width = max(map(len, kinds), default=0)
    return [
        f"{kind:<{width}}  "
        + "  ".join(f"{whose} {LARGEST[kind, whose]:.1e}" for what, whose in LARGEST if what == kind)
        for kind in kinds
    ]
