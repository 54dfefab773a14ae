"""A disk that is really full, or a limit on the size of files: the error names path and room, what was saved stays."""

import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_recipes.checkpoint.load import find_newest
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.errors import SaveError
from ds_recipes.fsops import calls
from ds_recipes.world.group import solo
from tests.faults.flat_saves import armed
from tests.nano import make_nano
from tests.ranks.launch import fork_rank, wait_for
from tests.ranks.training import train
from tests.unit.checkpoint.flat_engine import FlatEngine, publish, save, some_tensors

DISK_BYTES = 400_000
INODES = 40
NO_MOUNT = "a small file system cannot be mounted here"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted_disk(tmp_path / "disk", f"size={DISK_BYTES}")


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    yield from mounted_disk(tmp_path / "disk", f"size={DISK_BYTES},nr_inodes={INODES}")


def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip(NO_MOUNT)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def engine_of(num_bytes: int) -> FlatEngine:
    """With moments the file is three times as large."""
    return FlatEngine({"weight": torch.arange(num_bytes // 4).float()}, with_moments=False)


def test_a_full_disk_is_named_with_its_room_and_loses_nothing(small_disk: Path) -> None:
    run = small_disk / "run"
    save(run, 1, engine_of(100_000))
    save(run, 2, engine_of(100_000))
    with pytest.raises(SaveError, match=r"No space left|not enough room") as caught:
        save(run, 3, engine_of(250_000))
    assert str(run) in str(caught.value) and "bytes are free" in str(caught.value)
    found = find_newest(run, solo())
    assert found is not None and found.manifest.step == 2 and not found.skipped
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    save(run, 3, engine_of(50_000))
    assert find_newest(run, solo()).manifest.step == 3  # type: ignore[union-attr]


def test_a_disk_without_inodes_says_so_deletes_what_it_may_and_loses_nothing(few_inodes: Path) -> None:
    run = few_inodes / "run"
    save(run, 1, engine_of(4_000))
    save(run, 2, engine_of(4_000))
    others = few_inodes / "others"
    others.mkdir()

    def fill(leaving: int) -> None:
        while os.statvfs(few_inodes).f_favail > leaving:
            (others / str(time.monotonic_ns())).touch()

    fill(leaving=2)
    with pytest.raises(SaveError, match="no inode: it can hold no further file"):
        save(run, 3, engine_of(4_000))
    found = find_newest(run, solo())
    assert found is not None and found.manifest.step == 2 and not found.skipped
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    for name in list(others.iterdir())[:6]:
        name.unlink()
    used = os.statvfs(few_inodes).f_favail

    def take_the_last(call: calls.Call) -> None:
        """Others take what is left right before the older checkpoint is to go."""
        if call.kind == "rename" and call.path.name.startswith(".iter_0000003"):
            fill(leaving=0)

    calls.interceptor = take_the_last
    try:
        published = publish(run, 3, Keep(last=2), engine_of(4_000))
    finally:
        calls.interceptor = None
    assert used >= 6 and any("name could not be noted" in warning for warning in published.warnings)
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert find_newest(run, solo()).manifest.step == 3  # type: ignore[union-attr]


def test_a_disk_that_fills_up_meanwhile_says_so_too(small_disk: Path) -> None:
    """The room was there when the save began: another program took it."""
    run = small_disk / "run"
    save(run, 1, engine_of(100_000))

    class Crowded(FlatEngine):
        def shards(self):  # type: ignore[no-untyped-def]
            for number, shard in enumerate(super().shards()):
                if number == 1 and any(small_disk.glob("run/.*partial*/rank*")):
                    free = os.statvfs(small_disk)
                    (small_disk / "other").write_bytes(bytes(free.f_bavail * free.f_frsize))
                yield shard

    with pytest.raises(SaveError, match="No space left") as caught:
        save(run, 2, Crowded({name: torch.ones(20_000) for name in "ab"}, with_moments=False))
    assert ".partial" in str(caught.value) and "rank-00000" in str(caught.value)
    assert find_newest(run, solo()).manifest.step == 1  # type: ignore[union-attr]
    assert sorted(path.name for path in run.iterdir()) == ["iter_0000001", "latest"]


def save_with_limit(folder: str, most_bytes: int) -> int:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        save(Path(folder), 2, FlatEngine(some_tensors(2)))
    except SaveError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        Path(f"{folder}.said").write_text(str(error))
        return 7
    return 0


@pytest.mark.parametrize("most_bytes", [10, 700, 1500])
def test_a_limit_on_the_size_of_files_is_an_error_like_a_full_disk(tmp_path: Path, most_bytes: int) -> None:
    run = tmp_path / "run"
    save(run, 1)
    process = fork_rank(save_with_limit, (str(run), most_bytes), tmp_path / "output")
    assert wait_for([process], 60)
    assert process.exitcode == 7, (tmp_path / "output").read_text()
    said = Path(f"{run}.said").read_text()
    assert "File too large" in said and str(run) in said
    found = find_newest(run, solo())
    assert found is not None and found.manifest.step == 1 and not found.skipped
    assert sorted(path.name for path in run.iterdir()) == ["iter_0000001", "latest"]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_quota_that_is_reached_in_training_stops_it_or_not_as_asked(tmp_path: Path, policy: str) -> None:
    nano, run = make_nano(tmp_path / "nano"), tmp_path / "run"
    flags = ("--max_steps", "6", "--save_interval_iteration", "2", "--engine", "fsdp", "--on_save_error", policy)
    full = armed("fail:EDQUOT@1 rank=1 kind=write path=*iter_0000004*")
    argv = ("--config", str(nano), "--save_checkpoint_path", str(run), *flags)
    ended = train(2, *argv, outputs=tmp_path / "outputs", env=full)
    there = sorted(path.name for path in run.iterdir() if "iter_" in path.name)
    assert "Disk quota exceeded" in ended.text and "bytes are free" in ended.text and "iter_0000004" in ended.text
    if policy == "stop":
        assert 0 not in ended.statuses
        assert there == ["iter_0000002"]
    else:
        assert ended.statuses == (0, 0), ended.text
        assert there == ["iter_0000002", "iter_0000006"]
