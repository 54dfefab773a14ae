"""A mixture keeps every window at its shares and takes each source's rows once an epoch, however far into a run."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.mixture import PERIOD, Mixture, ShareTooSmall, share_out, spread_evenly

FAR = 2**60
small_rows = st.lists(st.integers(1, 60), min_size=1, max_size=7)
claims = st.lists(st.tuples(st.floats(0.01, 50), st.floats(1, 4096)), min_size=1, max_size=7)
starts = st.integers(0, 3 * PERIOD) | st.integers(0, FAR)


def exact_shares(weights: list[float], tokens_per_row: list[float]) -> list[Fraction]:
    by_rows = [Fraction(weight) / Fraction(tokens) for weight, tokens in zip(weights, tokens_per_row, strict=True)]
    return [share / sum(by_rows) for share in by_rows]


def weighted(rows: list[int], seed: int = 5) -> Mixture:
    return Mixture(rows, [100.0 + 7 * s for s in range(len(rows))], [1.0 + s for s in range(len(rows))], seed)


def walk(mixture: Mixture, stop: int) -> list[tuple[int, int, int]]:
    """(source, row, epoch) of the first positions, asked for one by one."""
    found = [mixture.locate(np.array([position])) for position in range(stop)]
    return [(int(at.source[0]), int(at.row[0]), int(at.epoch[0])) for at in found]


@settings(deadline=None, max_examples=40)
@given(claims=claims, start=starts, data=st.data())
def test_every_window_is_within_one_row_of_the_shares(claims: list[tuple[float, float]], start: int, data) -> None:
    weights, tokens = [weight for weight, _ in claims], [tokens for _, tokens in claims]
    shares = exact_shares(weights, tokens)
    if min(shares) * PERIOD < 1:
        return
    rows = data.draw(st.lists(st.integers(1, 10**7), min_size=len(claims), max_size=len(claims)))
    found = Mixture(rows, tokens, weights, seed=1).locate(start + np.arange(PERIOD)).source
    counts = np.bincount(found, minlength=len(claims)).tolist()
    assert all(abs(count - share * PERIOD) < 1 for count, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize("num_sources", [1, 2, 7])
def test_windows_that_slide_keep_their_counts(num_sources: int) -> None:
    mixture = weighted([50] * num_sources)
    source = mixture.locate(np.arange(3 * PERIOD)).source
    for number in range(num_sources):
        before = np.append(0, np.cumsum(source == number))
        assert set(np.unique(before[PERIOD:] - before[:-PERIOD])) == {mixture.quotas[number]}


@settings(deadline=None, max_examples=30)
@given(quotas=st.lists(st.integers(1, 400), min_size=1, max_size=9))
def test_every_prefix_is_near_its_shares(quotas: list[int]) -> None:
    pattern, period = spread_evenly(quotas), sum(quotas)
    for source, quota in enumerate(quotas):
        taken = np.cumsum(pattern == source)
        assert taken[-1] == quota
        late = np.abs(taken * period - np.arange(1, period + 1) * quota).max()
        assert late <= period * (1 - 1 / max(2 * len(quotas) - 2, 2)) + 1e-9


@settings(deadline=None, max_examples=60)
@given(claims=claims)
def test_quotas_are_shares_rounded_by_the_largest_remainder(claims: list[tuple[float, float]]) -> None:
    weights, tokens = [weight for weight, _ in claims], [tokens for _, tokens in claims]
    shares = [share * PERIOD for share in exact_shares(weights, tokens)]
    try:
        quotas = share_out(tokens, weights)
    except ShareTooSmall as error:
        assert shares[error.source] < 1
        assert error.share == pytest.approx(float(shares[error.source] / PERIOD))
        return
    assert sum(quotas) == PERIOD and min(quotas) > 0
    raised = [share - int(share) for quota, share in zip(quotas, shares, strict=True) if quota > share]
    lowered = [share - int(share) for quota, share in zip(quotas, shares, strict=True) if quota < share]
    assert all(abs(quota - share) < 1 for quota, share in zip(quotas, shares, strict=True))
    assert not raised or not lowered or min(raised) >= max(lowered)


def test_a_tie_is_decided_the_same_way_each_time() -> None:
    assert share_out([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == (3334, 3333, 3333)
    assert spread_evenly([1, 1, 1]).tolist() == [0, 1, 2]


def test_a_source_that_would_never_come_is_refused() -> None:
    with pytest.raises(ShareTooSmall, match="source 1 has a share of 1e-05 of the rows: none of 10,000") as caught:
        Mixture([5, 5], [100.0, 100.0], [0.99999, 0.00001], seed=0)
    assert caught.value.source == 1
    with pytest.raises(ShareTooSmall):  # as many tokens, in rows a hundred thousand times longer
        Mixture([5, 5], [1e5, 1.0], [1.0, 1.0], seed=0)


def test_weights_are_shares_of_tokens() -> None:
    rows, tokens_per_row, weights = [300, 200, 100], [2000.0, 500.0, 1250.0], [0.5, 0.3, 0.2]
    source = Mixture(rows, tokens_per_row, weights, seed=0).locate(np.arange(PERIOD)).source
    tokens = np.bincount(source) * tokens_per_row
    assert np.abs(tokens / tokens.sum() - weights).max() < 1e-4


@settings(deadline=None, max_examples=25)
@given(rows=small_rows, seed=st.integers(0, 2**32 - 1))
def test_each_source_gives_all_its_rows_once_in_each_epoch(rows: list[int], seed: int) -> None:
    located = weighted(rows, seed).locate(np.arange(1500))
    base = 0
    for source, count in enumerate(rows):
        mine = located.source == source
        row, epoch = located.row[mine], located.epoch[mine]
        assert epoch.tolist() == [i // count for i in range(len(row))]
        for number in range(len(row) // count):
            assert sorted(row[epoch == number].tolist()) == list(range(base, base + count))
        assert len(set(row[epoch == epoch[-1]].tolist())) == (epoch == epoch[-1]).sum()
        base += count


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.integers(0, 30), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_a_pool_gives_all_rows_once_in_each_epoch(rows: list[int], seed: int) -> None:
    total = sum(rows)
    if total == 0:
        return
    mixture = Mixture(rows, None, None, seed)
    located = mixture.locate(np.arange(3 * total))
    owner = np.repeat(np.arange(len(rows)), rows)
    assert located.epoch.tolist() == [position // total for position in range(3 * total)]
    assert located.source.tolist() == owner[located.row].tolist()
    for epoch in range(3):
        assert sorted(located.row[epoch * total : (epoch + 1) * total].tolist()) == list(range(total))
    assert mixture.rows_per_epoch == total
    assert mixture.taken(total) is None
    assert mixture.epochs_at(total + 1) == [1 + 1 / total] * len(rows)


def test_a_repeat_is_a_new_shuffle_and_sources_differ() -> None:
    for mixture in (Mixture([40], None, None, 3), weighted([40, 40])):
        located = mixture.locate(np.arange(400))
        orders = [located.row[(located.source == 0) & (located.epoch == epoch)].tolist() for epoch in range(3)]
        assert len({tuple(order) for order in orders}) == 3
    twin = Mixture([40, 40], [1.0, 1.0], [1.0, 1.0], 3).locate(np.arange(80))
    assert twin.row[twin.source == 0].tolist() != (twin.row[twin.source == 1] - 40).tolist()


@settings(deadline=None, max_examples=25)
@given(rows=small_rows, positions=st.lists(starts, min_size=1, max_size=30), pooled=st.booleans())
def test_many_positions_are_as_one_by_one_in_any_order(rows: list[int], positions: list[int], pooled: bool) -> None:
    mixture = Mixture(rows, None, None, 5) if pooled else weighted(rows)
    together = mixture.locate(np.array(positions))
    for i, position in enumerate(positions):
        alone = mixture.locate(np.array([position]))
        assert (alone.source[0], alone.row[0], alone.epoch[0]) == (
            together.source[i],
            together.row[i],
            together.epoch[i],
        )
    assert together.source.dtype == together.row.dtype == together.epoch.dtype == np.int64


@settings(deadline=None, max_examples=25)
@given(rows=small_rows, start=st.integers(0, FAR), pooled=st.booleans())
def test_far_into_a_run_epochs_are_still_whole(rows: list[int], start: int, pooled: bool) -> None:
    mixture = Mixture(rows, None, None, 5) if pooled else weighted(rows)
    located = mixture.locate(start + np.arange(PERIOD))
    groups = [np.ones(PERIOD, bool)] if pooled else [located.source == source for source in range(len(rows))]
    counts = [sum(rows)] if pooled else rows
    for mine, count, end in zip(groups, counts, np.cumsum(counts).tolist(), strict=True):
        row, epoch = located.row[mine], located.epoch[mine]
        whole = (epoch > epoch.min()) & (epoch < epoch.max())
        codes = np.unique((epoch[whole] - epoch.min()) * count + row[whole] - (end - count))
        assert len(codes) == whole.sum() == max(epoch.max() - epoch.min() - 1, 0) * count


@settings(deadline=None, max_examples=40)
@given(rows=small_rows, position=starts)
def test_taken_goes_up_by_the_source_that_comes(rows: list[int], position: int) -> None:
    mixture = weighted(rows)
    at = mixture.locate(np.array([position]))
    before, after = mixture.taken(position), mixture.taken(position + 1)
    step = [b - a for a, b in zip(before, after, strict=True)]
    assert step == [int(source == at.source[0]) for source in range(len(rows))]
    assert sum(before) == position
    assert at.epoch[0] == before[at.source[0]] // rows[at.source[0]]
    assert mixture.epochs_at(position) == [taken / count for taken, count in zip(before, rows, strict=True)]
    in_period = mixture.locate(np.arange(position % PERIOD)).source
    assert [
        taken - position // PERIOD * quota for taken, quota in zip(before, mixture.quotas, strict=True)
    ] == np.bincount(in_period, minlength=len(rows)).tolist()


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.integers(1, 12), min_size=1, max_size=4), pooled=st.booleans(), data=st.data())
def test_repeats_are_named_where_they_begin(rows: list[int], pooled: bool, data) -> None:
    mixture = Mixture(rows, None, None, 5) if pooled else weighted(rows)
    start = data.draw(st.integers(0, 80))
    stop = data.draw(st.integers(start, 80))
    begun: dict[int, int] = {}
    latest: dict[int, int] = {}
    for position, (source, _, epoch) in enumerate(walk(mixture, stop)):
        for owner in range(len(rows)) if pooled else [source]:
            if epoch > latest.get(owner, 0):
                latest[owner] = epoch
                if position >= start:
                    begun[owner] = epoch
    assert mixture.repeats_between(start, stop) == sorted(begun.items())


def test_order_never_changes_between_versions() -> None:
    """A checkpoint continues under a later version of this project: these numbers must stay."""
    mixture = Mixture([5, 4], [2.0, 1.0], [0.5, 0.5], seed=42)
    first = [(1, 8, 0), (0, 1, 0), (1, 7, 0), (1, 6, 0), (0, 4, 0), (1, 5, 0), (1, 7, 1), (0, 0, 0)]
    assert walk(mixture, 8) == first
    assert Mixture([5, 4], None, None, seed=42).locate(np.arange(9)).row.tolist() == [2, 8, 7, 6, 5, 1, 3, 4, 0]
    assert mixture.locate(np.array([FAR])).row.tolist() == [8]
