"""A rewind goes to the newest checkpoint before the first spike: one that was saved at that very step has seen it."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from ds_recipes.training.guard import SpikeRow
from ds_recipes.training.rewind import _newest_before
from ds_recipes.training.run import Run
from ds_recipes.world.group import solo
from tests.unit.checkpoint.flat_engine import save


@pytest.mark.parametrize(("first_spike", "goes_to"), [(5, 4), (6, 4), (8, 6), (7, 6), (2, None), (3, 2), (99, 6)])
def test_the_newest_before_the_first_spike(tmp_path: Path, first_spike: int, goes_to: int | None) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    run = SimpleNamespace(
        folder=tmp_path,
        world=solo(),
        config=SimpleNamespace(checkpoint=SimpleNamespace(verify="full")),
        trackers=SimpleNamespace(event=lambda *_, **__: None),
    )
    found = _newest_before(cast(Run, run), SpikeRow(first_spike, 0, 12, 3))
    assert (None if found is None else found.manifest.step) == goes_to
