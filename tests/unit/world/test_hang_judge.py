"""From what ranks say of themselves to a verdict: who holds the run up, who is slow, and when nobody is to blame."""

from collections import Counter
from typing import Any

import pytest

from ds_recipes.world.hang.frames import WAIT
from ds_recipes.world.hang.judge import Seen, Verdict, judge
from ds_recipes.world.hang.stragglers import WINDOW_SAMPLES, WINDOWS, StragglerWatch, slowest

HOSTS = ["left", "left", "right", "right"]
BEAT_SECONDS = 0.5


def told(idle: float = 0.0, waits: bool = False, **more: Any) -> dict[str, Any]:
    """What a rank with a limit of 5 s says of one activity."""
    usual = {
        "phase": "step",
        "doing": "step 7",
        "step": 7,
        "limit_seconds": 5.0,
        "idle_seconds": idle,
        "waits_for": "the other ranks, in gather" if waits else None,
        "collectives": 20,
        "collective": "gather",
    }
    return usual | more


def verdict(*ranks: Any, silent: dict[int, float] | None = None) -> Verdict | None:
    """Of ranks with one activity each, or a list of them."""
    seen = [
        Seen(rank, activities if isinstance(activities, list) else [activities], (silent or {}).get(rank, 0.2))
        for rank, activities in enumerate(ranks)
    ]
    return judge(seen, HOSTS, BEAT_SECONDS)


WAITING = told(6, waits=True)


def test_waiting_for_a_rank_that_comes_further_is_no_hang() -> None:
    assert verdict(WAITING, told(4.9), WAITING, WAITING) is None
    assert verdict(told(4.9), told(4.9), told(0), told(4.9)) is None


def test_the_rank_that_waits_for_nobody_is_named() -> None:
    found = verdict(WAITING, WAITING, told(6), WAITING)
    assert found is not None and found.silent == ()
    assert found.text.startswith("Rank 2 on right hangs in phase step (step 7): for 6 s it has not come further")
    assert [culprit.rank for culprit in found.culprits] == [2]
    assert Verdict.from_json(found.to_json()) == found


def test_a_rank_that_does_not_answer_is_named_whatever_it_said_last() -> None:
    found = verdict(WAITING, told(0.1, waits=True), silent={1: 5.1})
    assert found is not None and found.silent == (1,)
    assert "Rank 1 on left hangs" in found.text and "does not answer" in found.text
    assert verdict(told(4.9, waits=True), told(0.1), silent={1: 4.9}) is None


def test_silence_of_a_few_beats_says_nothing_however_short_the_limit() -> None:
    assert verdict(told(0.1), told(0.1, limit_seconds=1.0), silent={1: 1.4}) is None
    assert verdict(told(0.1), told(0.1, limit_seconds=1.0), silent={1: 1.6}) is not None


def test_a_rank_that_fell_silent_as_a_phase_began_is_missed_by_those_who_wait_in_it() -> None:
    before = told(0.1, phase="load", doing="loading", limit_seconds=1800.0)
    assert verdict(told(4.9, waits=True), before, silent={1: 5}) is None
    found = verdict(WAITING, before, silent={1: 6})
    assert found is not None and found.silent == (1,)
    assert found.text.startswith("Rank 1 on left hangs in phase step (step 7): for 6 s it does not answer")
    assert found.culprits[0].limit_seconds == 5


def test_a_writer_beside_training_is_judged_by_its_own_limit() -> None:
    training = told(0.1, limit_seconds=1800.0)
    writer = told(6, phase="save", doing="the checkpoint beside training")
    found = verdict([training], [training, writer])
    assert found is not None and "Rank 1 on left hangs in phase save" in found.text
    assert verdict([training], [training, told(6, waits=True)]) is None
    stopped = verdict([training], [training, told(0.1, phase="save")], silent={1: 6})
    assert stopped is not None and stopped.culprits[0].phase == "save"


def test_ranks_that_all_wait_are_a_hang_and_the_one_behind_is_named() -> None:
    found = verdict(WAITING, told(6, waits=True, collectives=19, collective="all_reduce"), WAITING, WAITING)
    assert found is not None and not found.culprits
    assert "No rank comes further" in found.text and "Rank 1 on left has come least far" in found.text
    even = verdict(WAITING, WAITING)
    assert even is not None and "equally far" in even.text


def test_several_are_named_and_so_is_a_run_in_which_nobody_waits() -> None:
    some = verdict(told(6), WAITING, told(6), told(6))
    assert some is not None and some.text.endswith("So do ranks 2-3.")
    every = verdict(told(6), told(6))
    assert every is not None and every.text.startswith("No rank comes further, and none waits for another one.")
    alone = verdict(told(6))
    assert alone is not None and alone.text.startswith("Rank 0 on left hangs")


def spans(works: float, *others: float, part: str = "forward and backward") -> list[Counter[str]]:
    """A window of each rank, that works so large a share of the time."""
    size = WINDOW_SAMPLES
    return [Counter({part: round(share * size), WAIT: size - round(share * size)}) for share in (works, *others)]


@pytest.mark.parametrize(("works", "others"), [(1.0, 0.9), (0.6, 0.4), (0.3, 0.1), (0.99, 0.7)])
def test_ranks_that_differ_a_little_are_no_stragglers(works: float, others: float) -> None:
    assert slowest(spans(works, others, others)) is None


def test_a_straggler_is_named_once_with_what_it_is_slow_in() -> None:
    watch, total = StragglerWatch(), [Counter[str]() for _ in range(3)]
    named = []
    for _ in range(4 * WINDOWS):
        total = [one + more for one, more in zip(total, spans(0.3, 0.95, 0.3), strict=True)]
        named.append(watch.look(total))
    (found,) = [one for one in named if one is not None]
    assert named.index(found) == WINDOWS, "the first look is where the first window begins"
    assert (found.rank, found.part) == (1, "forward and backward")
    assert (found.share, found.others_share) == (pytest.approx(0.95), pytest.approx(0.3))


def test_slow_in_turns_is_not_slow() -> None:
    watch, total = StragglerWatch(), [Counter[str]() for _ in range(2)]
    for turn in range(12):
        window = spans(0.9, 0.3)
        total = [one + more for one, more in zip(total, window if turn % 2 else window[::-1], strict=True)]
        assert watch.look(total) is None


def test_the_part_is_the_one_that_the_others_lack() -> None:
    size = WINDOW_SAMPLES
    common = {"forward and backward": 0.3 * size}
    slow = Counter(
        {"forward and backward": round(0.3 * size), "loading data": round(0.6 * size), WAIT: round(0.1 * size)}
    )
    usual = Counter({"forward and backward": round(common["forward and backward"]), WAIT: round(0.7 * size)})
    found = slowest([usual, slow])
    assert found is not None and (found.rank, found.part) == (1, "loading data")
