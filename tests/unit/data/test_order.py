"""The order of rows is a pure function, each epoch a permutation."""

import numpy as np
import pytest

from ds_recipes.data.order import next_hash, row_at


@pytest.mark.parametrize("rows", [1, 2, 97])
def test_each_epoch_is_a_permutation_of_its_own(rows: int) -> None:
    epochs = [[row_at(epoch * rows + i, rows, seed=3) for i in range(rows)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert rows < 97 or (epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(rows)))


def test_order_follows_the_seed_and_nothing_else() -> None:
    positions = np.random.default_rng(0).permutation(300).tolist()
    forward = {position: row_at(position, 100, seed=1) for position in range(300)}
    assert {position: row_at(position, 100, seed=1) for position in positions} == forward
    assert [row_at(i, 100, seed=2) for i in range(300)] != list(forward.values())


def test_order_never_changes_between_versions() -> None:
    """A checkpoint continues under a later version of numpy or of this project: these numbers must stay."""
    assert [row_at(position, 10, seed=42) for position in range(10)] == [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
    assert next_hash("", [3, 1, 2]) == "4b458b3bca206fde"


def test_hash_depends_on_every_row_its_order_and_the_past() -> None:
    hashes = [next_hash("", [1, 2]), next_hash("", [2, 1]), next_hash("", [1]), next_hash(next_hash("", [1]), [2])]
    assert len(set(hashes)) == 4
    assert all(len(value) == 16 for value in hashes)
