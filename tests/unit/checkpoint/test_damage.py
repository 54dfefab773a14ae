"""No damage to a checkpoint goes unseen: it is found before any weight is read, and the one before is taken."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_recipes import ranges
from ds_recipes.checkpoint.load import Found, find_newest
from ds_recipes.engine.base import Shard
from ds_recipes.errors import CheckpointError
from ds_recipes.world.group import World, solo
from tests.ranks.launch import run_ranks
from tests.unit.checkpoint.flat_engine import FlatEngine, save, some_tensors

STRIDE = 1000
FILES = (
    "rank-00000-of-00002.safetensors",
    "rank-00001-of-00002.safetensors",
    "state.json",
    "probe.safetensors",
    "config.json",
    "manifest.json",
)


class HalfEngine(FlatEngine):
    """Each of two ranks holds one half of every tensor."""

    def __init__(self, step: int, rank: int) -> None:
        super().__init__({"large": torch.arange(6001.0) * step, **some_tensors(step)})
        self.rank = rank

    def shards(self) -> Iterator[Shard]:
        for shard in super().shards():
            middle = (shard.length + 1) // 2
            start, end = (0, middle) if self.rank == 0 else (middle, shard.length)
            assert shard.exp_avg is not None and shard.exp_avg_sq is not None
            pieces = (tensor[start:end] for tensor in (shard.fp32, shard.exp_avg, shard.exp_avg_sq))
            yield Shard(shard.name, shard.shape, start, end - start, *pieces)


def save_two(world: World, folder: str) -> None:
    for step in (1, 2):
        save(Path(folder), step, HalfEngine(step, world.rank), world)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of two ranks, after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("sound")
    run_ranks(save_two, 2, str(folder), with_deepspeed=False)
    assert {path.name for path in (folder / "iter_0000002").iterdir()} == set(FILES)
    return folder


@pytest.fixture
def run(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, in which nobody may look at a tensor."""

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read before the checkpoint was verified")

    monkeypatch.setattr(ranges.SafetensorsFile, "__init__", refuse)
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def found_in(run: Path) -> Found:
    found = find_newest(run, solo())
    assert found is not None
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_bit_flipped_in_every_thousandth_byte(run: Path, name: str) -> None:
    file = run / "iter_0000002" / name
    whole = file.read_bytes()
    places = sorted({*range(0, len(whole), STRIDE), len(whole) - 1})
    for number, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << number % 8
        file.write_bytes(damaged)
        found = found_in(run)
        assert found.manifest.step == 1 and len(found.skipped) == 1, f"byte {place}"
        assert str(file.parent) in found.skipped[0] and name in found.skipped[0]
    file.write_bytes(whole)
    assert found_in(run).manifest.step == 2


def test_the_warning_gives_both_hashes(run: Path) -> None:
    file = run / "iter_0000002" / FILES[1]
    expected, data = found_in(run).manifest.files[FILES[1]].xxh3_128, bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (line,) = found_in(run).skipped
    actual = next(word for word in line.replace(",", " ").split() if len(word) == 32 and word != expected)
    assert expected in line and FILES[1] in line and int(actual, 16)


@pytest.mark.parametrize("how", ["cut by one byte", "cut in half", "empty", "missing", "longer", "a folder", "a link"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_what_was_written(run: Path, name: str, how: str) -> None:
    file = run / "iter_0000002" / name
    size = file.stat().st_size
    if how == "longer":
        file.write_bytes(file.read_bytes() + b"\n")
    elif how in ("missing", "a folder", "a link"):
        kept = run / "kept"
        file.rename(kept)
        if how == "a folder":
            file.mkdir()
        if how == "a link":
            file.symlink_to(kept)
    else:
        os.truncate(file, {"cut by one byte": size - 1, "cut in half": size // 2, "empty": 0}[how])
    found = found_in(run)
    if name == "manifest.json" and how in ("longer", "cut by one byte"):  # a line end: its content is what was written
        assert found.manifest.step == 2
        return
    assert found.manifest.step == 1
    assert name in found.skipped[0]


def test_files_swapped_between_ranks(run: Path) -> None:
    one, other = (run / "iter_0000002" / name for name in FILES[:2])
    one.rename(run / "kept")
    other.rename(one)
    (run / "kept").rename(other)
    found = found_in(run)
    assert found.manifest.step == 1 and FILES[0] in found.skipped[0]


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("probe.safetensors", "config.json")])
def test_a_file_of_another_step(run: Path, name: str) -> None:
    """The probe and the config are the same at both."""
    shutil.copy(run / "iter_0000001" / name, run / "iter_0000002" / name)
    found = found_in(run)
    assert found.manifest.step == 1 and name in found.skipped[0]


def test_a_whole_checkpoint_under_another_steps_name(run: Path) -> None:
    shutil.copytree(run / "iter_0000001", run / "iter_0000003")
    found = found_in(run)
    assert found.manifest.step == 2 and "is that of step 1" in found.skipped[0]


def test_a_further_ranks_file_is_of_another_save(run: Path) -> None:
    shutil.copy(run / "iter_0000002" / FILES[0], run / "iter_0000002" / "rank-00002-of-00003.safetensors")
    found = found_in(run)
    assert found.manifest.step == 1 and "rank-00002-of-00003.safetensors" in found.skipped[0]
    (run / "iter_0000002" / "rank-00002-of-00003.safetensors").unlink()
    (run / "iter_0000002" / "notes.txt").write_text("mine")
    assert found_in(run).manifest.step == 2


def test_all_damaged_is_never_a_fresh_start(run: Path) -> None:
    for step in (1, 2):
        (run / f"iter_000000{step}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints can be used(.|\n)*manifest\.json"):
        find_newest(run, solo())


def verify_on(world: World, folder: str) -> tuple[int, tuple[str, ...]]:
    found = find_newest(Path(folder), world)
    assert found is not None
    return found.manifest.step, found.skipped


def test_what_one_rank_finds_all_ranks_know(sound: Path, tmp_path: Path) -> None:
    """The second rank's share holds the damaged file; both take the older one."""
    shutil.copytree(sound, tmp_path / "run")
    names = list(find_newest(sound, solo()).manifest.files)  # type: ignore[union-attr]
    file = tmp_path / "run" / "iter_0000002" / names[1]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    seen = run_ranks(verify_on, 2, str(tmp_path / "run"), with_deepspeed=False)
    assert seen[0] == seen[1] and seen[0][0] == 1 and names[1] in seen[0][1][0]
