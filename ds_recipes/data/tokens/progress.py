"""Lines about a build, every ten seconds, for whoever waits for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

EVERY_SECONDS = 10.0


class Ticker:
    """Says something at most every ten seconds. The first time is due after ten."""

    def __init__(self, say: Callable[[str], None] | None) -> None:
        """Without `say` it stays silent."""
        self._say = say
        self.started = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self.started

    def tick(self, text: str) -> None:
        """Say `text` if it is time."""
        if self._say is not None and time.monotonic() - self._last >= EVERY_SECONDS:
            self._last = time.monotonic()
            self._say(text)


@dataclass(frozen=True)
class Amount:
    """How much a build has to tokenise, and how much of it was there before."""

    source_bytes: int
    there_bytes: int
    text: str  # as the user knows it: bytes, or rows where they have no sizes


def progress_line(name: str, amount: Amount, made_bytes: int, tokens: int, seconds: float) -> str:
    """The share that is done, and how it goes: `made_bytes` in `seconds`, with so many tokens in the parts that are whole."""
    done, total = amount.there_bytes + made_bytes, max(amount.source_bytes, 1)
    line = f"tokenising {name}: {1000 * done // total / 10:.1f} % of {amount.text}"
    if tokens:
        line += f", {short(tokens)} tokens"
    if made_bytes and seconds > 0:
        if tokens:
            line += f", {short(tokens / seconds)} tokens/s"
        line += f", {duration((total - done) * seconds / made_bytes)} left"
    return line


def bytes_text(number: int) -> str:
    """12.3 MB, 789 B."""
    text = short(number)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def short(number: float) -> str:
    """12.3 M, 4.56 G, 789: three digits and a unit."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}" if number < 999.5 * unit else f"{number / unit:,.0f}{name}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """42 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
