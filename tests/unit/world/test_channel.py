"""Names of ranks, and the status that an error ends a process with."""

import pytest

from ds_recipes.errors import CheckpointError, ConfigError, DsRecipesError, PeerFailure, StoppedEarly
from ds_recipes.world.channel import describe, exit_status, name_ranks


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([1, 4, 5, 6, 7], "ranks 1, 4-7"), ([0, 2, 4], "ranks 0, 2, 4")],
)
def test_ranks_in_a_row_are_named_together(ranks: list[int], text: str) -> None:
    assert name_ranks(ranks) == text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError(["wrong"]), 2),
        (CheckpointError("damaged"), 2),
        (DsRecipesError("lost"), 1),
        (PeerFailure("another"), 1),
        (StoppedEarly("signal TERM", "loading"), 75),
        (KeyboardInterrupt(), 130),
        (SystemExit(3), 3),
        (SystemExit("text"), 1),
        (ValueError("a mistake"), 1),
    ],
)
def test_each_error_has_its_status(error: BaseException, status: int) -> None:
    assert exit_status(error) == status


def test_a_users_error_is_shown_without_a_traceback_and_another_with_it() -> None:
    error = CheckpointError("it is damaged")
    error.add_note("(in load)")
    assert describe(error) == "it is damaged\n(in load)"
    assert "ValueError: a mistake" in describe(ValueError("a mistake"))
