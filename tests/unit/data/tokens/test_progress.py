"""What is said while a store is made."""

import pytest

from ds_recipes.data.tokens import progress
from ds_recipes.data.tokens.progress import Ticker, duration, progress_line, short


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (12_345_678, "12.3 M"),
        (999_700_000, "1,000 M"),
        (1.5e9, "1.5 G"),
        (2e12, "2 T"),
    ],
)
def test_numbers(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (89, "89 s"), (120, "2 min"), (5400, "1 h 30 min"), (36_000, "10 h 0 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_of_progress() -> None:
    line = progress_line("data/train.jsonl", 34, 120, 30, 12_300_000, 10.0)
    assert line == "tokenising data/train.jsonl: 34 of 120 parts, 12.3 M tokens, 1.23 M tokens/s, 29 s left"
    assert progress_line("a", 3, 7, 0, 0, 10.0) == "tokenising a: 3 of 7 parts, 0 tokens"
    assert progress_line("a", 3, 7, 1, 9, 0.0) == "tokenising a: 3 of 7 parts, 9 tokens", (
        "a clock that has not moved yet"
    )


def test_lines_come_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    ticker = Ticker(said.append)
    for second in range(36):
        now[0] = 100.0 + second
        ticker.tick(f"after {ticker.seconds:.0f}")
    assert said == ["after 10", "after 20", "after 30"]
    silent = Ticker(None)
    now[0] += 20
    silent.tick("nobody listens")
