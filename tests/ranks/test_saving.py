"""Saving on real ranks: one rank's full disk is every rank's error, training goes on meanwhile, nobody leaves too early."""

import errno
import fnmatch
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.checkpoint.load import find_newest
from ds_recipes.checkpoint.manifest import read_manifest
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.errors import SaveError, TrainingError
from ds_recipes.fsops import calls
from ds_recipes.world.group import World, solo
from tests.nano import make_nano
from tests.ranks.launch import run_ranks
from tests.ranks.training import Ended, train, train_py, until_step
from tests.unit.checkpoint.flat_engine import FlatEngine, publish, some_tensors

ON_ONE_RANK = (
    (1, "create", "*rank-00001*", errno.ENOSPC),
    (1, "write", "*rank-00001*", errno.ENOSPC),
    (1, "fsync", "*rank-00001*", errno.EDQUOT),
    (0, "mkdir", "*partial*", errno.EACCES),
    (0, "write", "*state.json", errno.ENOSPC),
    (0, "fsync", "*manifest.json", errno.EIO),
    (0, "fsync_folder", "*partial*", errno.EIO),
    (0, "rename", "*partial*", errno.EDQUOT),
)
"""(rank, kind of call, its path, error): where a save can fail on one rank alone."""

DISK_BYTES = 4 << 20
BIG = {"w": torch.zeros(50_000)}


class OneRank(FlatEngine):
    """Each rank writes parameters of its own."""

    def __init__(self, tensors: dict[str, torch.Tensor], rank: int) -> None:
        super().__init__({f"{name}.{rank}": tensor for name, tensor in tensors.items()})


def attempt(world: World, folder: Path, step: int, fence: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Save; how it ended, and what is in the folder afterwards."""
    started, text, kind = time.monotonic(), "", ""
    try:
        publish(folder, step, Keep(), OneRank(some_tensors(step), world.rank), world, fence=fence)
    except TrainingError as error:
        text, kind = str(error), type(error).__name__
    seconds = time.monotonic() - started
    calls.interceptor = None
    world.barrier("the end of a save")
    return {"text": text, "kind": kind, "seconds": seconds, "names": sorted(path.name for path in folder.iterdir())}


def fail_on_one_rank(world: World, folder: str, disk: str, is_mounted: bool) -> dict[str, Any]:
    """Every fault of the list in turn, a launch that was superseded, and a disk that fills up while it is written to."""
    here = Path(folder)
    attempt(world, here, 1)
    seen = []
    for number, (rank, kind, pattern, code) in enumerate(ON_ONE_RANK, start=2):
        if world.rank == rank:
            calls.interceptor = partial(_fail, kind, pattern, code)
        seen.append(attempt(world, here, number))
    superseded = attempt(world, here, 20, partial(_superseded, world.rank))
    afterwards = attempt(world, here, 21)
    full = fill_the_disk(world, Path(disk), is_mounted)
    return {"seen": seen, "superseded": superseded, "afterwards": afterwards, "full": full}


def _fail(kind: str, pattern: str, code: int, call: calls.Call) -> None:
    if call.kind == kind and fnmatch.fnmatch(str(call.path), pattern):
        raise OSError(code, os.strerror(code), str(call.path))


def _superseded(rank: int) -> None:
    assert rank == 0, "only rank 0 holds the lock"
    raise TrainingError("another job has the folder")


def fill_the_disk(world: World, disk: Path, is_mounted: bool) -> list[dict[str, Any]]:
    """A neighbour takes what is left of a small disk as soon as rank 1 writes; where none may be mounted, a limit does it."""
    outcomes = [attempt(world, disk, 1)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1 and is_mounted:
        calls.interceptor = partial(_fill, disk)
    elif world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    outcomes.append(attempt(world, disk, 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if world.rank == 1:
        (disk / "neighbour").unlink(missing_ok=True)
    world.barrier("room")
    outcomes.append(attempt(world, disk, 3))
    return outcomes


def _fill(disk: Path, call: calls.Call) -> None:
    if call.kind == "write" and "rank-00001" in call.path.name and not (disk / "neighbour").exists():
        with pytest.raises(OSError, match="No space left"), (disk / "neighbour").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of a few MB at `folder`; False where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    is_mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_one_ranks_failure_is_every_ranks_error_and_the_old_ones_are_whole(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with small_disk(tmp_path / "disk") as is_mounted:
        ranks = run_ranks(
            fail_on_one_rank, 2, str(tmp_path / "run"), str(tmp_path / "disk"), is_mounted, with_deepspeed=False
        )
        found = find_newest(tmp_path / "disk", solo())
        assert found is not None and found.manifest.step == 3 and not found.skipped
    zero, one = ranks
    for (rank, kind, _, code), mine, other in zip(ON_ONE_RANK, zero["seen"], one["seen"], strict=True):
        assert mine["text"] == other["text"] and mine["kind"] == other["kind"] == "SaveError", (rank, kind)
        assert os.strerror(code) in mine["text"] and str(tmp_path / "run") in mine["text"]
        assert "bytes are free there, it takes about" in mine["text"]
        assert max(mine["seconds"], other["seconds"]) < 5
        assert mine["names"] == ["iter_0000001", "latest"], f"{kind} on rank {rank} left something behind"
    assert zero["superseded"]["text"] == one["superseded"]["text"] == "another job has the folder (rank 0)"
    assert zero["superseded"]["kind"] == "TrainingError", "which on_save_error continue does not survive"
    assert zero["superseded"]["names"] == ["iter_0000001", "latest"]
    assert zero["afterwards"]["names"] == ["iter_0000001", "iter_0000021", "latest"]
    _, full, later = zero["full"]
    assert full["text"] == one["full"][1]["text"]
    assert ("No space left on device" if is_mounted else "File too large") in full["text"] and "rank-00001" in full[
        "text"
    ]
    assert {"iter_0000001", "latest"} <= set(full["names"]) <= {"iter_0000001", "latest", "neighbour"}
    assert later["text"] == "" and "iter_0000003" in later["names"]


def launch(
    folder: Path, *settings: str, faults: str = "", meanwhile: Any = None, program: Any = None
) -> tuple[Ended, Path]:
    run = folder / "run"
    env = {"FAULT_TEST": "1", "DS_RECIPES_FAULTS": faults} if faults else {}
    flags = ["--config", str(make_nano(folder / "nano")), "--save_checkpoint_path", str(run), *settings]
    ended = train(2, *flags, outputs=folder, env=env, meanwhile=meanwhile, program=program)
    return ended, run


def whole(run: Path) -> list[str]:
    """The checkpoints of a run, each of which must verify; and see that no hidden folder is left."""
    paths = sorted(run.glob("iter_*"))
    for path in paths:
        found = find_newest(path, solo())
        assert found is not None
    assert not list(run.glob(".iter_*"))
    return [path.name for path in paths]


def rank_files(run: Path, step: int) -> dict[str, str]:
    records = read_manifest(run / f"iter_{step:07d}").files
    return {name: record.xxh3_128 for name, record in records.items() if name.startswith("rank-")}


def test_training_goes_on_beside_a_slow_writer_and_ends_where_it_would_have(tmp_path: Path) -> None:
    slow = "delay:0.3@1x4 kind=write path=*iter_0000005.partial*/rank-*"
    settings = ("--save_interval_iteration", "5")
    beside, run = launch(tmp_path / "beside", *settings, faults=slow)
    waiting, other = launch(tmp_path / "waiting", *settings, "--async_save", "false")
    assert beside.statuses == waiting.statuses == (0, 0), beside.text + waiting.text
    assert beside.text.index("step  8/20") < beside.text.index("saved: step 5")
    assert waiting.text.index("saved: step 5") < waiting.text.index("step  6/20")
    for step in (5, 10, 15, 20):
        assert rank_files(run, step) == rank_files(other, step), f"step {step}"
    assert whole(run) == whole(other) == [f"iter_{step:07d}" for step in (5, 10, 15, 20)]
    assert "a checkpoint takes" in beside.text and "are free at" in beside.text


def test_a_signal_during_a_save_waits_for_it(tmp_path: Path) -> None:
    def signal_one_rank(processes: Sequence[Any]) -> None:
        until_step(tmp_path / "run", 6)
        assert list((tmp_path / "run").glob(".iter_0000005.partial-*")), "the save was to last longer"
        os.kill(processes[1].pid, signal.SIGTERM)

    slow = "delay:1@1x4 kind=write path=*iter_0000005.partial*/rank-*"
    ended, run = launch(tmp_path, "--save_interval_iteration", "5", faults=slow, meanwhile=signal_one_rank)
    assert ended.statuses == (75, 75), ended.text
    first, last = whole(run)
    step = int(last.removeprefix("iter_"))
    assert first == "iter_0000005" and f"SIGTERM at step {step}\n" in ended.text
    assert ended.text.index("saved: step 5") < ended.text.index("stopped: ")


def dying_writer(argv: Sequence[str]) -> int:
    """train.py whose writer leaves on rank 1 in the second save, as a library that calls sys.exit would make it."""
    from ds_recipes.checkpoint.store import Store

    publish_well = Store.publish

    def publish(self: Store, contents: Any, part: Any) -> Any:
        if contents.step == 10 and os.environ["RANK"] == "1":
            raise SystemExit(0)
        return publish_well(self, contents, part)

    Store.publish = publish  # type: ignore[method-assign]
    return train_py(argv)


def test_a_writer_that_dies_ends_the_run_with_the_old_checkpoint_whole(tmp_path: Path) -> None:
    ended, run = launch(tmp_path, "--save_interval_iteration", "5", program=dying_writer)
    assert ended.statuses == (1, 1), ended.text
    assert "The thread that writes checkpoints ended before it was done (SystemExit(0))" in ended.text
    found = find_newest(run, solo())
    assert found is not None and found.manifest.step == 5 and not found.skipped


def test_continue_survives_a_full_disk_and_retention_a_deletion_that_fails(tmp_path: Path) -> None:
    faults = (
        "fail:ENOSPC@1 rank=1 kind=write path=*iter_0000010.partial*; "
        "fail:EIO@1 rank=0 kind=unlink path=*.iter_0000005.deleted/rank-*"
    )
    settings = ("--save_interval_iteration", "5", "--on_save_error", "continue", "--keep_last", "2")
    ended, run = launch(tmp_path, *settings, "--keep_best", "1", "--eval_interval", "5", faults=faults)
    assert ended.statuses == (0, 0), ended.text
    assert "save failed" in ended.text and "No space left on device" in ended.text
    assert "iter_0000005 could not be deleted" in ended.text
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000015", "iter_0000020"]
    assert [path.name for path in run.glob(".iter_*")] == [".iter_0000005.deleted"]
    assert (run / "best").read_text() == "iter_0000020\n"
    assert find_newest(run, solo()) is not None


def test_the_classes_of_errors() -> None:
    """A full disk may be survived; a job that was superseded may not."""
    assert issubclass(SaveError, TrainingError) and SaveError.exit_status == 1
