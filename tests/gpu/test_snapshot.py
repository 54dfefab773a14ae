"""A copy of a state on the GPU: pinned memory, bit for bit, and the same memory for every save."""

from pathlib import Path

import pytest
import torch

from ds_recipes.checkpoint.rank_file import KINDS, Streamed, own_ranges
from ds_recipes.checkpoint.snapshot import CHUNK_VALUES, Snapshot
from ds_recipes.world.group import solo
from tests.unit.checkpoint.flat_engine import FlatEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use"),
]


def test_a_snapshot_of_a_gpu_is_the_state_of_its_moment(tmp_path: Path) -> None:
    """The tensors lie across the borders of the pinned pieces, and are changed right after the copy."""
    tensors = {name: torch.rand(numel, device="cuda") for name, numel in (("a", CHUNK_VALUES // 2 + 7), ("b", 1001))}
    engine = FlatEngine(tensors)
    ranges = own_ranges(engine.shards(), solo(), save_optimizer=True)
    copy = Snapshot(ranges, pinned=True)
    places = [piece.data_ptr() for piece in copy._chunks]
    assert all(piece.is_pinned() for piece in copy._chunks) and len(places) > 1
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        expected = Streamed(engine, ranges).write(folder).files
        copy.take(engine)
        for tensor in tensors.values():
            tensor.add_(1)
        (folder / "copy").mkdir()
        assert copy.write(folder / "copy").files == expected
        assert set(next(iter(expected.values())).parts) == set(KINDS)
    assert [piece.data_ptr() for piece in copy._chunks] == places
