"""What counts as a spike depends on the losses before it, not on their unit, and not on the outliers among them."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.training.spikes import FEWEST_LOSSES, LEAST_NATS, Spike, SpikeWatch

WINDOW, SIGMA = 32, 6.0


def spikes(losses: Sequence[float], window: int = WINDOW, sigma: float = SIGMA) -> list[int]:
    """Which of the losses are spikes, by their number."""
    watch = SpikeWatch(window, sigma)
    return [number for number, loss in enumerate(losses) if watch.judge(loss) is not None]


def noisy(count: int, seed: int = 0, level: float = 3.0, noise: float = 0.05) -> list[float]:
    chosen = random.Random(seed)
    return [chosen.gauss(level, noise) for _ in range(count)]


losses_of_a_run = st.lists(st.floats(0.5, 20), min_size=1, max_size=80)


@settings(max_examples=200, deadline=None)
@given(losses_of_a_run, st.integers(0, 10))
def test_the_unit_of_the_loss_does_not_matter(losses: list[float], doublings: int) -> None:
    """Powers of two scale floats exactly. Below the least deviation in nats it would matter, see there."""
    assert spikes(losses) == spikes([loss * 2.0**doublings for loss in losses])


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 50), st.integers(1, 200), st.floats(-1e-9, 1e-9))
def test_a_flat_loss_never_spikes(level: float, count: int, tremor: float) -> None:
    assert spikes([level + tremor * (number % 3) for number in range(count)]) == []


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_outliers_in_the_window_hide_no_spike(seed: int, data: st.DataObject) -> None:
    """Fewer than half of the losses that are known, as those of a start before anything is judged, may be anything."""
    known = noisy(FEWEST_LOSSES, seed)
    wild = data.draw(st.lists(st.floats(0, 1e6), max_size=FEWEST_LOSSES // 2 - 1))
    places = data.draw(st.permutations(range(FEWEST_LOSSES)))
    for place, value in zip(places, wild, strict=False):
        known[place] = value
    assert spikes([*known, 100.0]) == [FEWEST_LOSSES]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.floats(1.5, 100))
def test_spikes_do_not_excuse_each_other(seed: int, factor: float) -> None:
    """They stay out of the window: the hundredth is one as the first is."""
    good = noisy(WINDOW, seed, noise=0.01)
    assert spikes([*good, *[3.0 * factor] * 100]) == list(range(WINDOW, WINDOW + 100))


@settings(max_examples=100, deadline=None)
@given(losses_of_a_run, st.floats(0.5, 20))
def test_a_loss_below_the_median_is_no_spike(losses: list[float], least: float) -> None:
    watch = SpikeWatch(WINDOW, SIGMA, losses)
    assert watch.judge(min(*losses, least)) is None


@settings(max_examples=50, deadline=None)
@given(losses_of_a_run, st.integers(0, 80))
def test_a_window_that_is_saved_and_restored_judges_alike(losses: list[float], cut: int) -> None:
    before = SpikeWatch(WINDOW, SIGMA)
    for loss in losses[:cut]:
        before.judge(loss)
    after = SpikeWatch(WINDOW, SIGMA, before.losses)
    assert [before.judge(loss) for loss in losses[cut:]] == [after.judge(loss) for loss in losses[cut:]]


def test_nothing_is_judged_before_enough_is_known() -> None:
    assert spikes([3.0] * (FEWEST_LOSSES - 1) + [1000.0]) == []
    assert spikes([3.0] * FEWEST_LOSSES + [1000.0]) == [FEWEST_LOSSES]
    assert spikes([3.0] * 8 + [1000.0], window=8) == [8]
    assert spikes([3.0] * 200 + [1000.0], window=0) == []


def test_noise_as_real_runs_have_it_is_seldom_a_spike() -> None:
    assert len(spikes(noisy(5000))) <= 5
    falling = [8.0 * 0.995**step + 2 + noise for step, noise in enumerate(noisy(1000, level=0.0))]
    assert spikes(falling) == []


def test_a_spike_says_what_was_normal() -> None:
    watch = SpikeWatch(WINDOW, SIGMA, [1.0, 2.0, 3.0, 4.0, 5.0] * 4)
    assert watch.judge(11.9) == Spike(11.9, 3.0, pytest.approx(1.4826))
    assert watch.judge(11.8) is None


def test_the_least_deviation_is_a_share_of_the_loss_or_a_thousandth_of_a_nat() -> None:
    flat, near_zero = [2.0] * WINDOW, [1e-5] * WINDOW
    assert spikes([*flat, 2.059]) == [] and spikes([*flat, 2.061]) == [WINDOW]
    assert spikes([*near_zero, 5 * LEAST_NATS]) == [] and spikes([*near_zero, 7 * LEAST_NATS]) == [WINDOW]


def test_what_is_forgotten_is_learned_anew() -> None:
    watch = SpikeWatch(WINDOW, SIGMA, [3.0] * WINDOW)
    assert watch.judge(9.0) is not None
    watch.forget()
    assert [watch.judge(9.0) for _ in range(WINDOW)] == [None] * WINDOW
    assert watch.judge(3.0) is None and watch.judge(12.0) is not None
