"""Which checkpoint is found, what is left alone, and what another job's unfinished save can still do."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_recipes.checkpoint import load
from ds_recipes.checkpoint.contents import capture
from ds_recipes.checkpoint.load import check_same_model, find_newest, open_reader, remove_partials, set_aside
from ds_recipes.checkpoint.rank_file import Streamed, own_ranges
from ds_recipes.checkpoint.retention import Keep
from ds_recipes.checkpoint.run_lock import RunLock, take
from ds_recipes.checkpoint.store import Store
from ds_recipes.errors import CheckpointError, SaveError, TrainingError
from ds_recipes.fsops import again, calls
from ds_recipes.fsops.calls import Call
from ds_recipes.fsops.durable import publish
from ds_recipes.world.group import solo
from tests.unit.checkpoint.flat_engine import PROBE, FlatEngine, save, some_tensors


@pytest.fixture(autouse=True)
def nobody_stays_at_the_point() -> Iterator[None]:
    yield
    calls.interceptor = None


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "iter_" in path.name)


def found_step(folder: Path, **how: object) -> int | None:
    found = find_newest(folder, solo(), **how)  # type: ignore[arg-type]
    return None if found is None else found.manifest.step


def test_before_asks_for_an_earlier_one(tmp_path: Path) -> None:
    for step in (3, 5, 8):
        save(tmp_path, step)
    assert [found_step(tmp_path, before=before) for before in (9, 8, 5, 4, 3)] == [8, 5, 3, 3, None]


def test_what_is_set_aside_is_visible_and_never_found(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    aside = set_aside(tmp_path, 1, "run-a", solo())
    assert [path.name for path in aside] == ["iter_0000003.aside-run-a", "iter_0000002.aside-run-a"]
    assert found_step(tmp_path) == 1 and set_aside(tmp_path, 1, "run-a", solo()) == []
    save(tmp_path, 2)
    assert [path.name for path in set_aside(tmp_path, 1, "run-a", solo())] == ["iter_0000002.aside-run-a-2"]
    remove_partials(tmp_path, solo())
    assert len(steps_in(tmp_path)) == 4
    assert found_step(tmp_path / "iter_0000003.aside-run-a") == 3, "it can be named"


@pytest.mark.parametrize("name", ["iter_0000002.aside-run-a", "iter_12", "iter_0000002.old"])
def test_leftovers_alone_are_no_reason_to_start_from_nothing(tmp_path: Path, name: str) -> None:
    save(tmp_path, 2).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"but {name}, and a run never starts again from nothing"):
        find_newest(tmp_path, solo())


@pytest.mark.parametrize("content", ["", "iter_0000001\n", "iter_0000009\n", "../../elsewhere\n", "\0"])
def test_the_pointer_is_not_asked(tmp_path: Path, content: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "latest").write_text(content)
    assert found_step(tmp_path) == 2
    for step in (1, 2):
        (tmp_path / f"iter_000000{step}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of its 2"):
        find_newest(tmp_path, solo())


def test_a_checkpoint_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    elsewhere = save(tmp_path / "elsewhere", 2)
    (tmp_path / "run" / "iter_0000002").symlink_to(elsewhere)
    found = find_newest(tmp_path / "run", solo())
    assert found is not None and found.manifest.step == 1
    assert str(elsewhere) in found.skipped[0]


def test_sizes_alone_are_enough_for_large_files_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        path = save(tmp_path, step, FlatEngine({"w": torch.ones(20000)}))
    large, small = path / "rank-00000-of-00001.safetensors", path / "state.json"
    monkeypatch.setattr(load, "SMALL_BYTES", 2 * small.stat().st_size)
    large.write_bytes(large.read_bytes()[:-1] + b"!")
    assert found_step(tmp_path, verify="sizes") == 2 and found_step(tmp_path, verify="full") == 1
    os.truncate(large, large.stat().st_size - 1)
    assert found_step(tmp_path, verify="sizes") == 1
    os.truncate(tmp_path / "iter_0000001" / "rank-00000-of-00001.safetensors", 3)
    with pytest.raises(CheckpointError):
        find_newest(tmp_path, solo(), verify="sizes")


def test_a_small_file_is_hashed_either_way(tmp_path: Path) -> None:
    save(tmp_path, 1)
    state = save(tmp_path, 2) / "state.json"
    state.write_bytes(state.read_bytes().replace(b"2", b"1"))
    assert found_step(tmp_path, verify="sizes") == 1


@pytest.mark.parametrize("error", [116, 5])  # ESTALE, EIO
def test_reads_that_fail_once_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    monkeypatch.setattr(again, "PAUSES_SECONDS", (0.0,))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = save(tmp_path, 1)
    failed: set[tuple[str, Path]] = set()

    def fail_once(call: Call) -> None:
        if call.kind in ("open", "stat", "list") and (call.kind, call.path) not in failed:
            failed.add((call.kind, call.path))
            raise OSError(error, os.strerror(error), str(call.path))

    calls.interceptor = fail_once
    found = find_newest(tmp_path, solo())
    assert found is not None and found.skipped == ()
    assert {("open", path / "manifest.json"), ("list", path)} <= failed


def test_an_old_jobs_save_cannot_be_published_once_the_next_has_begun(tmp_path: Path) -> None:
    """Whatever the old job does last before it stands still, it publishes before the next job looks, or never."""
    seen: list[Call] = []
    save(tmp_path / "count", 1)
    calls.interceptor = seen.append
    save(tmp_path / "count", 2)
    calls.interceptor = None
    changing = [call for call in seen if call.kind not in ("open", "stat", "list")]
    assert len(changing) > 20
    found = []
    for number in range(1, len(changing) + 1):
        folder = tmp_path / str(number)
        save(folder, 1)
        found.append(standing_still_at(number, folder))
    assert set(found) == {1, 2} and found == sorted(found), "either both know of it or neither does"


def save_as(job: RunLock, folder: Path, step: int, seed: int = 2, fence: Callable[[], None] | None = None) -> None:
    """What a job that holds the lock does at a save."""
    engine: Any = FlatEngine(some_tensors(seed))
    store = Store(folder, solo(), job.attempt, Keep(None), fence or job.check)
    contents = capture(engine, step, {"step": step, "identity": {}}, {"config.json": b"{}"}, PROBE, {})
    store.publish(contents, Streamed(engine, own_ranges(engine.shards(), solo(), save_optimizer=True)))


def standing_still_at(number: int, folder: Path) -> int:
    """Save step 2, and at one call let the next job take the lock, look, and save that step itself if it has to.

    Returns what it finds; that must stay so, and what it saves must be there afterwards.
    """
    old, left = take(folder, "old", print), number
    seen: list[int | None] = []
    saved: list[bytes] = []

    def next_job(call: Call) -> None:
        nonlocal left
        if call.kind in ("open", "stat", "list") or left == 0:
            return
        left -= 1
        if left == 0:
            calls.interceptor = None
            old._released.set()
            old._write_beat(b"released".ljust(20))
            new = take(folder, "new", print)
            remove_partials(folder, solo())
            seen.append(found_step(folder))
            if seen == [1]:
                save_as(new, folder, 2, seed=3)
                saved.append((folder / "iter_0000002" / "manifest.json").read_bytes())

    calls.interceptor = next_job
    try:
        save_as(old, folder, 2)
    except (SaveError, TrainingError, OSError):
        assert seen == [1], "what was found is gone"
    calls.interceptor = None
    assert found_step(folder) == 2
    if saved:
        now = (folder / "iter_0000002" / "manifest.json").read_bytes()
        assert now == saved[0], f"call {number}: published behind the next job's back"
    return int(seen[0] or 0)


def test_right_after_its_last_check_an_old_job_replaces_nothing(tmp_path: Path) -> None:
    """Between the check and the next call the next job publishes the same step."""
    save(tmp_path, 1)
    old = take(tmp_path, "old", print)

    def next_job_after_the_check() -> None:
        old.check()
        old.release()
        new = take(tmp_path, "new", print)
        remove_partials(tmp_path, solo())
        save_as(new, tmp_path, 2, seed=3)

    with pytest.raises(SaveError):
        save_as(old, tmp_path, 2, fence=next_job_after_the_check)
    assert steps_in(tmp_path) == ["iter_0000001", "iter_0000002"] and found_step(tmp_path) == 2


def test_an_unfinished_save_is_renamed_before_it_is_deleted(tmp_path: Path) -> None:
    partial = tmp_path / ".iter_0000002.partial-run-a"
    partial.mkdir()
    (partial / "manifest.json").write_text("{}")
    seen: list[str] = []

    def publish_at_the_deletion(call: Call) -> None:
        if call.kind == "unlink":
            seen.append(call.kind)
            with pytest.raises(FileNotFoundError):
                partial.rename(tmp_path / "iter_0000002")

    calls.interceptor = publish_at_the_deletion
    remove_partials(tmp_path, solo())
    calls.interceptor = None
    assert seen and steps_in(tmp_path) == []
    with pytest.raises(OSError):
        publish(partial, tmp_path / "iter_0000002")


def test_what_a_checkpoint_holds_is_read_through_one_door(tmp_path: Path) -> None:
    save(tmp_path, 4)
    found = find_newest(tmp_path, solo())
    assert found is not None
    reader = open_reader(found.path, found.manifest)
    out = torch.empty(7)
    reader.read_into("fp32", "norm.weight", 0, out)
    assert out.isfinite().all() and reader.optimizer_step == 7


def test_buffers_come_back_in_their_own_dtypes_and_are_verified(tmp_path: Path) -> None:
    buffers = {
        "gate.bias": torch.tensor([0.1, -2.0]),
        "scale": torch.tensor(3.0, dtype=torch.bfloat16),
        "table": torch.arange(6).reshape(2, 3),
        "is_on": torch.tensor([True, False]),
    }
    path = save(tmp_path, 1, FlatEngine(some_tensors(), buffers=buffers))
    found = find_newest(tmp_path, solo())
    assert found is not None and found.manifest.buffers == {name: tuple(one.shape) for name, one in buffers.items()}
    read = open_reader(path, found.manifest).buffers
    assert all(read[name].dtype == one.dtype and torch.equal(read[name], one) for name, one in buffers.items())
    raw = bytearray((path / "buffers.safetensors").read_bytes())
    raw[-1] ^= 1
    (path / "buffers.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"buffers\.safetensors is damaged"):
        find_newest(tmp_path, solo())


def test_only_a_checkpoint_with_buffers_asks_for_a_newer_reader(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain", 1, FlatEngine(some_tensors()))
    with_buffers = save(tmp_path / "more", 1, FlatEngine(some_tensors(), buffers={"bias": torch.ones(2)}))
    versions = [json.loads((path / "manifest.json").read_text())["version"] for path in (plain, with_buffers)]
    assert versions == [1, 2] and not (plain / "buffers.safetensors").exists()


def test_another_models_buffers_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1, FlatEngine(some_tensors(), buffers={"bias": torch.ones(2)}))
    found = find_newest(tmp_path, solo())
    assert found is not None
    shapes = {name: tuple(one.shape) for name, one in some_tensors().items()}
    for others, message in (({}, r"bias: \[2\] in the checkpoint, absent"), ({"bias": (3,)}, r"\[3\] in the model")):
        with pytest.raises(CheckpointError, match=message):
            check_same_model(found.manifest, {**shapes, **others}, "there")
