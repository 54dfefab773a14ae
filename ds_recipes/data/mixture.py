"""The rows of several sources as one order: which row of which source comes at which position of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush

import numpy as np

from ds_recipes.data.order import Ints, order_key, permute

PERIOD = 10_000
"""Rows after which the pattern of weighted sources repeats."""

POOL = 0
"""The stream number of all sources as one pool. Source `s` of a weighted mixture is stream `s + 1`."""


class ShareTooSmall(ValueError):
    """A source's share of the rows is too small to be kept in each period; `source` is its number, `share` is 0 to 1."""

    def __init__(self, source: int, share: float) -> None:
        self.source = source
        self.share = share
        super().__init__(f"source {source} has a share of {share:.3g} of the rows: none of {PERIOD:,} rows in a row")


@dataclass(frozen=True)
class Located:
    """What comes at some positions; the arrays are int64 of the positions' shape."""

    source: Ints
    row: Ints  # over all sources: row i of source s is number (rows of the sources before s) + i
    epoch: Ints  # passes over the source that are complete; of a pool, passes over all sources


class Mixture:
    """An endless order of the rows of all sources, a pure function of `rows`, weights and seed, in O(1) a position.

    Without weights all rows are one pool: an epoch is a permutation of all. With weights each source has a permutation
    of its own for each of its epochs, and a fixed pattern of `PERIOD` rows says which source is next. Weights are shares
    of tokens, so a source's share of the rows is its weight / `tokens_per_row`, up to a factor that all share. It is
    rounded to whole rows of a period (largest remainder). So any window of `PERIOD` rows is within one row of the exact
    shares; within a period the sources are spread evenly.

    Raises:
        ShareTooSmall: a source would get no row in a period.
    """

    def __init__(
        self, rows: Sequence[int], tokens_per_row: Sequence[float] | None, weights: Sequence[float] | None, seed: int
    ) -> None:
        assert min(rows) >= 0 and sum(rows) > 0
        self.rows_per_epoch = sum(rows)
        self.quotas: tuple[int, ...] | None = None
        self._rows = np.array(rows, np.int64)  # [sources]
        self._ends = np.cumsum(self._rows)  # [sources]
        self._seed = seed
        if weights is None:
            return
        assert tokens_per_row is not None and min(rows) > 0
        self.quotas = share_out(tokens_per_row, weights)
        self._quotas = np.array(self.quotas, np.int64)  # [sources]
        self._pattern = spread_evenly(self.quotas)  # [PERIOD]
        self._before = np.empty(PERIOD, np.int64)  # rows of the same source before this one in the period
        for source, quota in enumerate(self.quotas):
            self._before[self._pattern == source] = np.arange(quota)

    def locate(self, positions: Ints) -> Located:
        """The source, row and epoch at each position, any of 0 to 2**60."""
        if self.quotas is None:
            epoch, index = np.divmod(positions, self.rows_per_epoch)
            row = permute(index, self.rows_per_epoch, order_key(self._seed, POOL, epoch))
            return Located(np.searchsorted(self._ends, row, side="right").astype(np.int64), row, epoch)
        period, offset = np.divmod(positions, PERIOD)
        source = self._pattern[offset]
        epoch, index = np.divmod(period * self._quotas[source] + self._before[offset], self._rows[source])
        row = permute(index, self._rows[source], order_key(self._seed, source + 1, epoch))
        return Located(source, self._ends[source] - self._rows[source] + row, epoch)

    def taken(self, position: int) -> list[int] | None:
        """Rows of each source among the first `position`; None for a pool, where only counting them all could say."""
        if self.quotas is None:
            return None
        period, offset = divmod(position, PERIOD)
        in_period = np.bincount(self._pattern[:offset], minlength=len(self.quotas)).tolist()
        return [period * quota + part for quota, part in zip(self.quotas, in_period, strict=True)]

    def epochs_at(self, position: int) -> list[float]:
        """Passes over each source after `position` rows, with a fraction; of a pool, those over all, for each source."""
        taken = self.taken(position)
        if taken is None:
            return [position / self.rows_per_epoch] * len(self._rows)
        return [number / rows for number, rows in zip(taken, self._rows.tolist(), strict=True)]

    def repeats_between(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The sources that begin again at a position in [start, stop), each with its number of complete passes then.

        A source that begins more than once is named once, with the last number. All sources of a pool begin together.
        """
        first, last = self.taken(start), self.taken(stop)
        totals = self._rows.tolist()
        if first is None or last is None:
            first, last, totals = [start], [stop], [self.rows_per_epoch]
        spans = [(-(-a // total), -(-b // total)) for a, b, total in zip(first, last, totals, strict=True)]
        again = [stop_epoch - 1 if stop_epoch - 1 >= max(epoch, 1) else None for epoch, stop_epoch in spans]
        if self.quotas is None:
            again *= len(self._rows)
        return [(source, epoch) for source, epoch in enumerate(again) if epoch is not None]


def share_out(tokens_per_row: Sequence[float], weights: Sequence[float]) -> tuple[int, ...]:
    """Each source's rows of a period; the first source gets a remainder that several have an equal claim to.

    Raises:
        ShareTooSmall: one would get none.
    """
    assert min(weights) > 0 and min(tokens_per_row) > 0
    claims = [Fraction(weight) / Fraction(tokens) for weight, tokens in zip(weights, tokens_per_row, strict=True)]
    exact = [PERIOD * claim / sum(claims) for claim in claims]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: quotas[source] - exact[source])
    for source in by_remainder[: PERIOD - sum(quotas)]:
        quotas[source] += 1
    if 0 in quotas:
        source = quotas.index(0)
        raise ShareTooSmall(source, float(exact[source] / PERIOD))
    return tuple(quotas)


def spread_evenly(quotas: Sequence[int]) -> Ints:
    """An order of sum(`quotas`) turns, source `s` with `quotas[s]`, each prefix less than one turn from every share.

    Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): of the sources whose claim on
    the next turn is at least 1 / (2 sources - 2), the one that would be late first. All numbers are exact.

    Returns:
        int64 [sum(quotas)], the source of each turn.
    """
    period, slack = sum(quotas), max(2 * len(quotas) - 2, 1)
    turns = []  # (first place that it may take, from 1; how soon it must come; source)
    for source, quota in enumerate(quotas):
        for number in range(quota):
            release = -(-period * (number * slack + 1) // (quota * slack))
            urgency = (((number + 1) * slack - 1) << 64) // quota  # bits enough to keep unequal quotients apart
            turns.append((release, urgency, source))
    turns.sort(reverse=True)
    claims: list[tuple[int, int]] = []
    order = np.empty(period, np.int64)
    for place in range(period):
        while turns and turns[-1][0] <= place + 1:
            heappush(claims, turns.pop()[1:])
        order[place] = heappop(claims)[1]
    return order
