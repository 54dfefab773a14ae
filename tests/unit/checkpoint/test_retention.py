"""What is kept is what the settings say, whatever the order of losses; a deletion that goes wrong harms nothing."""

import contextlib
import errno
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recipes.checkpoint.load import find_newest
from ds_recipes.checkpoint.manifest import MANIFEST
from ds_recipes.checkpoint.retention import Keep, Retention, best_first, delete_checkpoint
from ds_recipes.errors import TrainingError
from ds_recipes.fsops import calls
from ds_recipes.world.group import solo
from tests.unit.checkpoint.flat_engine import publish, publish_into, save, store_of

LOSSES = st.one_of(st.none(), st.sampled_from([1.0, 2.0, 2.5, float("nan"), float("inf")]))
SAVES = st.dictionaries(st.integers(1, 60), LOSSES, max_size=20)
KEEPS = st.builds(
    Keep, st.integers(2, 5), st.one_of(st.none(), st.integers(1, 12)), st.one_of(st.none(), st.integers(1, 4))
)


class Killed(BaseException):
    """Nothing that the code under test may handle."""


@pytest.fixture(autouse=True)
def no_interceptor():
    yield
    calls.interceptor = None


@given(SAVES, KEEPS)
@settings(max_examples=300, deadline=None)
def test_what_is_kept_has_a_reason_and_what_has_one_is_kept(losses: dict[int, float | None], keep: Keep) -> None:
    doomed = keep.to_delete(losses)
    for step in losses:
        newer = sum(other > step for other in losses)
        good = losses[step] is not None and losses[step] < float("inf")
        better = sum(
            other is not None and good and (other < losses[step] or (other == losses[step] and number > step))
            for number, other in losses.items()
        )
        reasons = (
            newer < keep.last,
            keep.every is not None and step % keep.every == 0,
            keep.best is not None and good and better < keep.best,
        )
        assert (step in doomed) != any(reasons), (step, reasons)
    assert doomed == sorted(doomed)
    assert not keep.to_delete({step: loss for step, loss in losses.items() if step not in doomed})


@given(SAVES)
def test_without_a_limit_nothing_goes(losses: dict[int, float | None]) -> None:
    assert Keep(None, 1, 1).to_delete(losses) == []


@given(SAVES, KEEPS)
@settings(max_examples=200, deadline=None)
def test_deciding_after_each_save_never_loses_one_of_the_best_ever(losses: dict[int, float | None], keep: Keep) -> None:
    there: dict[int, float | None] = {}
    for step in sorted(losses):
        there[step] = losses[step]
        for gone in keep.to_delete(there):
            del there[gone]
    assert set(best_first(losses)[: keep.best or 0]) <= there.keys()
    assert set(sorted(losses)[-keep.last :]) <= there.keys()


def test_the_best_are_taken_from_the_files_and_named(tmp_path: Path) -> None:
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 4.0, 5.0), start=1):
        evaluation = None if loss is None else {"eval_loss": loss}
        publish(tmp_path, step, Keep(last=2, every=3, best=1), state={"evaluation": evaluation})
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_000000{step}" for step in (2, 3, 5, 6)]
    assert (tmp_path / "best").read_text() == "iter_0000002\n"
    assert (tmp_path / "latest").read_text() == "iter_0000006\n"


def test_state_that_cannot_be_read_has_no_loss_and_stops_nothing(tmp_path: Path) -> None:
    for step, content in enumerate(("[]", "{", '{"evaluation": {"eval_loss": "low"}}', "{}"), start=1):
        (save(tmp_path, step) / "state.json").write_text(content)
    retention = Retention(tmp_path, Keep(last=2, best=4))
    assert [path.name for path in retention.doomed(tmp_path / "iter_0000004")] == ["iter_0000001", "iter_0000002"]


def test_one_of_a_later_step_neither_counts_nor_goes(tmp_path: Path) -> None:
    """A run went back to step 2 and saves step 3; what lies at 9 is of the way that it left."""
    for step in (1, 2, 9, 3):
        publish(tmp_path, step, Keep(last=2))
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_000000{step}" for step in (2, 3, 9)]


def test_a_job_that_has_lost_the_lock_since_its_publish_deletes_nothing(tmp_path: Path) -> None:
    """Its successor may have begun from what it would delete."""
    for step in (1, 2):
        save(tmp_path, step)
    asked: list[int] = []

    def fence() -> None:
        asked.append(len(list(tmp_path.glob("iter_0000003"))))
        if asked[-1]:
            raise TrainingError("the run lock has been taken")

    with pytest.raises(TrainingError, match="has been taken"):
        publish(tmp_path, 3, Keep(last=2), fence=fence)
    assert asked == [0, 1], "once before the publish, once before the deletion"
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_000000{step}" for step in (1, 2, 3)]


def test_a_step_that_is_reached_again_has_the_loss_of_its_new_checkpoint(tmp_path: Path) -> None:
    store = store_of(tmp_path, Keep(last=2, best=1))

    def publish_with(step: int, loss: float) -> None:
        publish_into(store, step, state={"evaluation": {"eval_loss": loss}})

    publish_with(1, 3.0)
    publish_with(2, 1.0)
    assert (tmp_path / "best").read_text() == "iter_0000002\n"
    (tmp_path / "iter_0000002").rename(tmp_path / "iter_0000002.aside-test")  # the run went back to step 1
    publish_with(2, 9.0)
    publish_with(3, 2.0)
    assert (tmp_path / "best").read_text() == "iter_0000003\n"
    publish_with(4, 8.0)
    assert sorted(path.name for path in tmp_path.glob("iter_???????")) == ["iter_0000003", "iter_0000004"]


def test_the_manifest_goes_first(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    seen: list[calls.Call] = []
    calls.interceptor = seen.append
    delete_checkpoint(path)
    changes = [call for call in seen if call.kind in ("unlink", "rename", "rmdir", "fsync_folder")]
    assert changes[0].kind == "unlink" and changes[0].path == path / MANIFEST
    assert changes[1].kind == "fsync_folder", "durable before anything else goes"
    assert not list(tmp_path.glob("*iter*"))


def test_a_deletion_that_fails_is_told_and_made_up_for(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def fail(call: calls.Call) -> None:
        if call.kind == "unlink" and "rank-" in call.path.name:
            raise OSError(errno.EIO, "Input/output error", str(call.path))

    calls.interceptor = fail
    published = publish(tmp_path, 3, Keep(last=2))
    calls.interceptor = None
    assert published.path.name == "iter_0000003"
    (warning,) = published.warnings
    assert "iter_0000001 could not be deleted" in warning and "Input/output error" in warning
    found = find_newest(tmp_path, solo())
    assert found is not None and found.manifest.step == 3 and not found.skipped
    assert not list(tmp_path.glob("iter_0000001"))
    assert publish(tmp_path, 4, Keep(last=2)).warnings == ()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003", "iter_0000004"]


def test_what_nfs_keeps_of_a_deleted_file_is_told_once_and_goes_when_its_reader_has_gone(tmp_path: Path) -> None:
    """A file that a program of this host has open is renamed instead of deleted, so its folder is not empty (nfs(5))."""
    for step in (1, 2):
        save(tmp_path, step)
    is_open = True

    def keep(call: calls.Call) -> None:
        if call.kind == "unlink" and call.path.name.startswith(".nfs") and is_open:
            raise OSError(errno.EBUSY, "Device or resource busy", str(call.path))
        if call.kind == "unlink" and "rank-" in call.path.name and ".iter_0000001" in str(call.path):
            call.path.with_name(".nfs0000000012").write_bytes(call.path.read_bytes())

    calls.interceptor = keep
    store = store_of(tmp_path, Keep(last=2))
    told = [publish_into(store, step).warnings for step in (3, 4, 5)]
    assert [len(warnings) for warnings in told] == [1, 0, 0]
    assert "iter_0000001 could not be deleted" in told[0][0] and "tried again at each save" in told[0][0]
    assert [path.name for path in tmp_path.glob(".iter*")] == [".iter_0000001.deleted"]
    found = find_newest(tmp_path, solo())
    assert found is not None and found.manifest.step == 5 and not found.skipped
    is_open = False
    assert publish_into(store, 6).warnings == () and not list(tmp_path.glob(".iter*"))
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000005", "iter_0000006"]


@pytest.mark.parametrize(
    ("kind", "number"),
    [("unlink", errno.EROFS), ("unlink", errno.EBUSY), ("rename", errno.EBUSY), ("rmdir", errno.ENOTEMPTY)],
)
def test_a_folder_that_stays_in_the_way_is_told_once_and_harms_no_save(tmp_path: Path, kind: str, number: int) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def fail(call: calls.Call) -> None:
        if call.kind == kind and "iter_0000001" in str(call.path):
            raise OSError(number, "injected", str(call.path))

    calls.interceptor = fail
    store = store_of(tmp_path, Keep(last=2))
    told = [publish_into(store, step).warnings for step in (3, 4)]
    assert [len(warnings) for warnings in told] == [1, 0] and "injected" in told[0][0]
    found = find_newest(tmp_path, solo())
    assert found is not None and found.manifest.step == 4 and not found.skipped
    calls.interceptor = None
    assert publish_into(store, 5).warnings == ()
    assert sorted(path.name for path in tmp_path.iterdir() if "iter" in path.name) == ["iter_0000004", "iter_0000005"]


def test_a_half_deleted_one_does_not_count_and_goes_at_the_next_save(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "iter_0000002" / MANIFEST).unlink()
    publish(tmp_path, 4, Keep(last=3))
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_000000{step}" for step in (1, 3, 4)]


def test_killed_anywhere_in_a_deletion_nothing_looks_whole_and_the_new_one_is(tmp_path: Path) -> None:
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        for step in (1, 2):
            save(folder, step)
        left = number

        def kill(call: calls.Call, folder: Path = folder) -> None:
            nonlocal left
            left -= "iter_0000001" in str(call.path) and call.kind not in ("open", "stat", "list")
            if left == 0:
                raise Killed

        calls.interceptor = kill
        with contextlib.suppress(Killed):
            publish(folder, 3, Keep(last=2))
        calls.interceptor = None
        found = find_newest(folder, solo())
        assert found is not None and found.manifest.step == 3 and not found.skipped
        whole = {path.parent.name for path in folder.glob(f"iter_*/{MANIFEST}")}
        assert {"iter_0000002", "iter_0000003"} <= whole
        if "iter_0000001" in whole:
            assert number == 1, "its manifest must be the first to go"
        if left > 0:  # the deletion has fewer calls
            break
    assert number > 5
