"""Positions to leave out: the checkpoint's stay, those of the settings count where they still lie ahead, in part too."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ds_recipes.checkpoint.load import Found
from ds_recipes.config.load import load_config
from ds_recipes.config.plan import make_plan
from ds_recipes.training.resume import skips_of

FLAGS = ["--model_name", "m", "--train_data", "d.jsonl", "--dataset", "text", "--save_checkpoint_path", "run"]


def config_with(*skips: str, **more: Any) -> Any:
    flags = [word for name, value in more.items() for word in (f"--{name}", str(value))]
    return load_config([*FLAGS, *flags, *(["--skip_samples", *skips] if skips else [])])


def found_at(position: int, *saved: tuple[int, int]) -> Found:
    return cast(Found, SimpleNamespace(state={"position": position, "skip_samples": [list(one) for one in saved]}))


@pytest.mark.parametrize(
    ("position", "asked", "ranges", "late"),
    [
        (0, "5-9", ((5, 10),), 0),
        (100, "5-9", (), 1),
        (100, "90-109", ((100, 110),), 1),  # its first half has been trained on
        (100, "100-109", ((100, 110),), 0),
        (100, "99-99", (), 1),
        (100, "90-100", ((100, 101),), 1),
    ],
)
def test_what_lies_ahead_counts(position: int, asked: str, ranges: tuple[tuple[int, int], ...], late: int) -> None:
    skips, lines = skips_of(config_with(asked), found_at(position) if position else None)
    assert skips.ranges == ranges and len(lines) == late
    assert all(f"--skip_samples {asked}" in line for line in lines)


def test_what_the_checkpoint_remembers_stays_and_is_not_late() -> None:
    skips, lines = skips_of(config_with("20-29", "200-209"), found_at(100, (20, 30), (40, 50)))
    assert skips.ranges == ((20, 30), (40, 50), (200, 210)) and not lines
    skips, lines = skips_of(config_with(), found_at(100, (20, 30)))
    assert skips.ranges == ((20, 30),) and not lines


@pytest.mark.parametrize(
    ("skipped", "steps"),
    [((), 10), (((0, 8),), 9), (((76, 84),), 10), (((70, 90),), 9), (((90, 98),), 10), (((0, 80),), 1)],
)
def test_rows_that_are_left_out_shorten_the_run_and_those_past_its_end_do_not(
    skipped: tuple[tuple[int, int], ...], steps: int, tmp_path: Path
) -> None:
    """80 rows in steps of 8."""
    config = config_with(batch_size_training=8, num_epochs=1)
    assert make_plan(config, 1, 80, skipped).total_steps == steps
