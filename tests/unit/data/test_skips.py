"""Positions to skip, against a loop over all positions."""

from itertools import count as count_up
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.skips import Skips

ranges_of_positions = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 15)), max_size=8).map(
    lambda pairs: [(start, start + length) for start, length in pairs]
)


def is_skipped(position: int, ranges: list[tuple[int, int]]) -> bool:
    return any(start <= position < stop for start, stop in ranges)


@settings(deadline=None, max_examples=300)
@given(ranges=ranges_of_positions, position=st.integers(0, 90), count=st.integers(0, 40))
def test_next_positions_are_those_of_a_loop(ranges: list[tuple[int, int]], position: int, count: int) -> None:
    expected = list(islice((p for p in count_up(position) if not is_skipped(p, ranges)), count))
    positions, go_on = Skips(ranges).next_positions(position, count)
    assert positions.tolist() == expected
    assert go_on == (expected[-1] + 1 if expected else position)


@settings(deadline=None, max_examples=100)
@given(ranges=ranges_of_positions, stop=st.integers(0, 90))
def test_skipped_positions_are_counted(ranges: list[tuple[int, int]], stop: int) -> None:
    assert Skips(ranges).num_skipped(stop) == sum(is_skipped(position, ranges) for position in range(stop))


@settings(deadline=None, max_examples=100)
@given(ranges=ranges_of_positions, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_steps_of_any_size_go_over_the_same_positions(ranges: list[tuple[int, int]], sizes: list[int]) -> None:
    skips, at, taken = Skips(ranges), 0, []
    for size in sizes:
        positions, at = skips.next_positions(at, size)
        taken += positions.tolist()
    assert taken == skips.next_positions(0, sum(sizes))[0].tolist()


def test_ranges_are_merged_and_may_be_far_and_long() -> None:
    assert Skips([(5, 9), (1, 3), (3, 4), (7, 12), (20, 20)]).ranges == ((1, 4), (5, 12))
    far = Skips([(10, 2**60), (2**60 + 2, 2**60 + 3)])
    positions, go_on = far.next_positions(8, 5)
    assert positions.tolist() == [8, 9, 2**60, 2**60 + 1, 2**60 + 3]
    assert go_on == 2**60 + 4
    assert far.num_skipped(2**61) == 2**60 - 9
