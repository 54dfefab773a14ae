"""How long a phase may go without progress: the arithmetic, by a clock that the test sets."""

import threading

import pytest

from ds_recipes.config.hang_settings import (
    DEFAULT_SECONDS,
    EVALUATE,
    LEAST_SECONDS,
    LOAD,
    PHASES,
    SAVE,
    STEP,
    HangConfig,
    collective_seconds,
    parse_limits,
)
from ds_recipes.world.hang import activity as module
from ds_recipes.world.hang.activity import FIRST_STEPS, LONGEST_TICK_SECONDS, Activity, Clock, here, of_its_own
from ds_recipes.world.hang.frames import WAIT, Where
from ds_recipes.world.hang.limits import Limits

FACTOR = 10.0


class Rank:
    """An activity with a clock that the test moves."""

    def __init__(self, **given: float) -> None:
        self.clock = Clock()
        self.activity = Activity(Limits(given, FACTOR), self.clock)

    def work(self, seconds: float) -> None:
        """So much time passes in the process."""
        self.clock.now += seconds

    def steps(self, number: int, seconds: float, micro_steps: int = 1) -> None:
        """Take so many steps of so long each; the last one is under way when this returns."""
        for _ in range(number):
            self.activity.enter("a step", STEP, self.activity.step + 1)
            for _ in range(micro_steps):
                self.work(seconds / micro_steps)
                self.activity.progress()


@pytest.mark.parametrize("phase", PHASES)
def test_before_anything_was_seen_a_limit_is_generous(phase: str) -> None:
    assert Limits({}, FACTOR).seconds(phase) == DEFAULT_SECONDS


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (0.001, LEAST_SECONDS[STEP]),
        (11.9, LEAST_SECONDS[STEP]),
        (13, 130),
        (179, 1790),
        (181, DEFAULT_SECONDS),
        (1e6, DEFAULT_SECONDS),
    ],
)
def test_a_limit_is_a_factor_of_the_longest_between_two_bounds(longest: float, expected: float) -> None:
    limits = Limits({}, FACTOR)
    limits.learn(STEP, longest)
    limits.learn(STEP, longest / 2)  # a faster one later shortens nothing
    assert limits.seconds(STEP) == expected


def test_a_given_limit_is_neither_learned_nor_bounded() -> None:
    limits = Limits({STEP: 5.0, SAVE: 9999.0}, FACTOR)
    limits.learn(STEP, 100)
    assert (limits.seconds(STEP), limits.seconds(STEP, is_first=True), limits.seconds(SAVE)) == (5, 5, 9999)
    assert limits.shortest_seconds == 5


def test_the_first_steps_after_a_load_have_the_long_limit() -> None:
    rank = Rank()
    rank.steps(FIRST_STEPS, 20)
    assert rank.activity.limit_seconds == DEFAULT_SECONDS
    rank.steps(1, 1)
    assert rank.activity.limit_seconds == 200, "of what the first ones took too"
    rank.activity.enter("going back", LOAD)
    rank.steps(1, 1)
    assert rank.activity.limit_seconds == DEFAULT_SECONDS


def test_an_evaluation_or_a_save_between_steps_changes_nothing_of_theirs() -> None:
    rank = Rank()
    rank.steps(FIRST_STEPS + 1, 20)
    rank.activity.enter("the evaluation", EVALUATE)
    rank.work(100)
    rank.activity.enter("saving", SAVE)
    rank.work(170)
    rank.steps(1, 1)
    assert rank.activity.limit_seconds == 200
    rank.activity.enter("the evaluation", EVALUATE)
    assert rank.activity.limit_seconds == 1000
    rank.activity.enter("saving", SAVE)
    assert rank.activity.limit_seconds == 1700


def test_progress_within_a_step_is_what_counts() -> None:
    rank = Rank()
    rank.steps(FIRST_STEPS + 1, 100, micro_steps=5)
    assert rank.activity.limit_seconds == 200
    rank.work(199)
    assert rank.activity.idle_seconds == 199
    rank.activity.progress()
    assert rank.activity.idle_seconds == 0


def test_a_long_phase_that_goes_on_is_never_idle() -> None:
    rank = Rank(load=5.0)
    rank.activity.enter("loading", LOAD)
    for _ in range(1000):
        rank.work(4)
        assert rank.activity.idle_seconds < rank.activity.limit_seconds
        rank.activity.progress()


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    clock = Clock()
    clock.tick(0.05)
    clock.tick(3600)
    assert clock.now == pytest.approx(0.05 + LONGEST_TICK_SECONDS)


def test_a_collective_is_progress_when_it_ends_and_a_wait_meanwhile() -> None:
    rank = Rank()
    rank.work(3)
    with rank.activity.in_collective("gather"):
        assert rank.activity.waits_for == "the other ranks, in gather"
        assert rank.activity.idle_seconds == 3
    assert (rank.activity.waits_for, rank.activity.idle_seconds, rank.activity.collectives) == (None, 0, 1)


def test_talk_beside_a_working_thread_is_no_progress() -> None:
    rank = Rank()
    done = threading.Event()
    worker = threading.Thread(target=done.wait)
    worker.start()
    in_collective = Where(WAIT, "all_gather")
    with rank.activity.beside(worker):
        rank.work(3)
        with rank.activity.in_collective("gather"):
            assert rank.activity.to_json(in_collective)["waits_for"] is None
        assert rank.activity.idle_seconds == 3
        rank.activity.progress()  # of the thread
        assert rank.activity.idle_seconds == 0
        done.set()
        worker.join()
        assert rank.activity.to_json(in_collective)["waits_for"] == "the other ranks' work"
    assert rank.activity.to_json()["waits_for"] is None
    assert rank.activity.to_json(in_collective)["waits_for"] == "the other ranks, in all_gather"


def test_a_download_is_trusted_to_end_by_itself() -> None:
    rank = Rank()
    with rank.activity.trusted():
        rank.work(9999)
        assert rank.activity.idle_seconds == 0
    rank.work(2)
    assert rank.activity.idle_seconds == 2


def test_a_writer_in_the_main_thread_is_the_activity_of_the_process() -> None:
    rank = Rank()
    module.begin(rank.activity)
    try:
        with of_its_own("the checkpoint", SAVE, 7):
            assert here() is rank.activity
        assert module.all_activities() == [rank.activity]
    finally:
        module.end()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["step"], "takes phase=duration with a phase of start, load, .*, not 'step'"),
        (["steps=10m"], "not 'steps=10m'"),
        (["step=ten"], "must be a duration such as"),
        (["step=0s"], "needs a duration above 0 for step"),
        (["step=1m", "step=2m"], "gives step twice"),
    ],
)
def test_what_is_no_limit_is_refused(words: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_limits(words)


def test_collectives_give_up_later_than_the_monitor() -> None:
    assert parse_limits(["step=10m", "save=1h"]) == {STEP: 600, SAVE: 3600}
    for config in (HangConfig(), HangConfig(hang_limits=("step=5s",)), HangConfig(hang_limits=("save=2h",))):
        longest = max(Limits(parse_limits(config.hang_limits), 10).seconds(phase) for phase in PHASES)
        assert collective_seconds(config) > longest
