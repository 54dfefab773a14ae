"""The permutation is one, whatever its size; its numbers look random and never change."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.data.order import GOLDEN, ROUNDS, Ints, next_hash, order_key, permute

KEYS = 30_000


def whole(count: int, key_parts: tuple[int, int, int] = (3, 0, 0)) -> Ints:
    return permute(np.arange(count), count, order_key(*key_parts))


def mixed(word: int) -> int:
    """SplitMix64's finaliser in plain numbers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def swap_or_not(number: int, count: int, key: int) -> int:
    """`permute` for one number, in numbers that never wrap around."""
    for round_key in range(1, ROUNDS + 1):
        word = mixed((key + round_key * GOLDEN) % 2**64)
        partner = (word % count - number) % count
        if mixed((word + max(number, partner) * GOLDEN) % 2**64) >> 63:
            number = partner
    return number


def chi_square(counts: Ints, degrees_of_freedom: int, scale: float = 1.0) -> float:
    """How many standard deviations the counts are from being equally likely (Wilson and Hilferty, 1931)."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum()) * scale
    spread = 2 / (9 * degrees_of_freedom)
    return ((statistic / degrees_of_freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def many_permutations(count: int) -> Ints:
    """[KEYS, count]: one seed's epochs, and those of other streams."""
    keys = order_key(5, np.arange(KEYS) % 3, np.arange(KEYS) // 3)
    index = np.tile(np.arange(count), KEYS)
    return permute(index, count, np.repeat(keys, count)).reshape(KEYS, count)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(whole(count, (seed, 1, epoch)).tolist()) == list(range(count))


@pytest.mark.parametrize("bits", [20, 31, 32, 33, 53, 61])
def test_large_counts_stay_in_range_and_never_meet(bits: int) -> None:
    for count in (2**bits - 1, 2**bits, 2**bits + 1):
        index = np.concatenate([np.arange(3000), count // 2 + np.arange(3000), count - 1 - np.arange(3000)])
        image = permute(index, count, order_key(0, 0, 0))
        assert image.min() >= 0 and image.max() < count
        assert len(np.unique(image)) == len(index)


@settings(deadline=None, max_examples=40)
@given(
    asked=st.lists(
        st.tuples(st.integers(1, 2**62), st.floats(0, 1), st.integers(0, 5), st.integers(0, 2**50)), min_size=1
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_many_at_once_are_as_one_by_one_in_plain_numbers(asked: list[tuple[int, float, int, int]], seed: int) -> None:
    counts = np.array([count for count, _, _, _ in asked])
    index = np.array([min(int(count * part), count - 1) for count, part, _, _ in asked])
    streams, epochs = (np.array([row[column] for row in asked]) for column in (2, 3))
    keys = order_key(seed, streams, epochs)
    assert keys.tolist() == [order_key(seed, stream, epoch)[0] for _, _, stream, epoch in asked]
    alone = [swap_or_not(*each) for each in zip(index.tolist(), counts.tolist(), keys.tolist(), strict=True)]
    assert permute(index, counts, keys).tolist() == alone
    assert [
        permute(np.array([i]), n, keys[j : j + 1])[0] for j, (i, n) in enumerate(zip(index, counts, strict=True))
    ] == alone


@pytest.mark.parametrize("count", range(2, 13))
def test_few_rows_come_in_every_order_equally_often(count: int) -> None:
    images = many_permutations(count)
    places = np.stack([np.bincount(images[:, i], minlength=count) for i in range(count)])  # [index, image]
    assert abs(chi_square(places, (count - 1) ** 2, scale=(count - 1) / count)) < 4
    shown = count if count <= 7 else 3  # rows whose order among themselves is looked at
    base = count ** np.arange(shown)
    orders = [int(np.dot(order, base)) for order in permutations(range(count), shown)]
    counts = np.bincount(images[:, :shown] @ base, minlength=max(orders) + 1)[orders]
    assert counts.sum() == KEYS and abs(chi_square(counts, len(orders) - 1)) < 4


@pytest.mark.parametrize("count", [3, 10, 1000])
def test_epochs_are_independent_of_each_other(count: int) -> None:
    keys = order_key(9, 0, np.arange(KEYS))
    first = permute(np.zeros(KEYS, np.int64), count, keys) * 3 // count
    pairs = np.bincount(first[:-1] * 3 + first[1:], minlength=9)
    shares = np.bincount(first, minlength=3) / KEYS
    expected = KEYS * np.outer(shares, shares).ravel()
    assert ((pairs - expected) ** 2 / expected).sum() < 40


def test_neighbours_of_a_large_set_do_not_stay_together() -> None:
    count, buckets = 300_000, 32
    image = whole(count)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) * math.sqrt(count) < 4
    assert int((np.abs(np.diff(image)) == 1).sum()) < 15  # two are expected
    assert np.unique(np.diff(image), return_counts=True)[1].max() < 15
    bucket = image * buckets // count
    pairs = np.bincount(bucket[:-1] * buckets + bucket[1:], minlength=buckets**2)
    assert abs(chi_square(pairs, buckets**2 - 1)) < 5
    origin = np.arange(count) * buckets // count
    assert chi_square(np.bincount(origin * buckets + bucket, minlength=buckets**2), (buckets - 1) ** 2) < 5


def test_seed_stream_and_epoch_all_count() -> None:
    parts = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (2**32 - 1, 0, 0), (0, 2, 0), (0, 0, 2)]
    assert len({tuple(whole(50, part).tolist()) for part in parts}) == len(parts)


def test_order_never_changes_between_versions() -> None:
    """A checkpoint continues under a later version of numpy or of this project: these numbers must stay."""
    assert whole(10, (42, 0, 0)).tolist() == [4, 6, 2, 0, 9, 7, 5, 3, 8, 1]
    assert whole(10, (42, 1, 7)).tolist() == [2, 8, 7, 5, 6, 0, 3, 4, 1, 9]
    far = permute(np.array([0, 1, 10**9]), 2**61 + 5, order_key(2**32 - 1, 3, 10**12))
    assert far.tolist() == [1522277681902118809, 976492008457482518, 19613069078795437]
    assert order_key(42, 0, 0).tolist() == [16480970476410205892]
    assert next_hash("", "data", [3, 1, 2]) == "e84e01320cf8ca3f"


def test_hash_depends_on_the_data_every_row_its_order_and_the_past() -> None:
    one = next_hash("", "data", [1])
    hashes = [
        one,
        next_hash("", "data", [1, 2]),
        next_hash("", "data", [2, 1]),
        next_hash("", "other data", [1, 2]),
        next_hash(one, "data", [1, 2]),
        next_hash(next_hash("", "data", [2]), "data", [1, 2]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert all(len(value) == 16 for value in hashes)
