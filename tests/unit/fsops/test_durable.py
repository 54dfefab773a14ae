"""Files and folders are there whole or not at all, whatever fails on the way."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_recipes.errors import ConfigError
from ds_recipes.fsops import calls, faults
from ds_recipes.fsops.again import again
from ds_recipes.fsops.calls import Call
from ds_recipes.fsops.durable import make_folders, publish, remove_folder, replace_file, write_file


@pytest.fixture(autouse=True)
def nobody_stands_there() -> Iterator[None]:
    yield
    calls.interceptor = None


def arm(text: str) -> None:
    calls.interceptor = faults.Faults(faults.parse(text))


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["create", "write", "fsync", "replace"])
def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path, kind: str) -> None:
    replace_file(tmp_path / "run.json", b"old")
    arm(f"fail:ENOSPC@1 kind={kind}")
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "run.json", b"new")
    assert (tmp_path / "run.json").read_bytes() == b"old"
    calls.interceptor = None
    replace_file(tmp_path / "run.json", b"new")
    assert (tmp_path / "run.json").read_bytes() == b"new"
    assert tree(tmp_path) == {"run.json"}


def test_an_error_of_a_write_names_the_file(tmp_path: Path) -> None:
    arm("fail:EDQUOT@2 kind=write")
    with pytest.raises(OSError) as caught:
        write_file(tmp_path / "weights", [b"1234", b"5678"])
    assert caught.value.errno == errno.EDQUOT and caught.value.filename == str(tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == b"123456", "half of the second write is what a full disk leaves"


@pytest.mark.parametrize("name", ["ESTALE", "EIO"])
def test_what_a_shared_file_system_says_once_is_waited_out(tmp_path: Path, name: str) -> None:
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "file").touch()
    arm(f"fail:{name}@1x2 kind=rename")
    publish(tmp_path / ".part", tmp_path / "final")
    assert tree(tmp_path) == {"final", "final/file"}


def test_a_rename_whose_answer_was_lost_counts_as_done(tmp_path: Path) -> None:
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "file").touch()

    def done_but_not_told(call: Call) -> None:
        if call.kind == "rename" and call.path.exists():
            call.path.rename(str(call.target))
            raise OSError(errno.EIO, "Input/output error")

    calls.interceptor = done_but_not_told
    publish(tmp_path / ".part", tmp_path / "final")
    assert tree(tmp_path) == {"final", "final/file"}


def test_a_folder_that_somebody_removed_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / ".part", tmp_path / "final")


def test_an_error_of_what_is_read_keeps_its_own_name(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"1"
        yield (tmp_path / "source").read_bytes()

    with pytest.raises(FileNotFoundError) as caught:
        write_file(tmp_path / "target", pieces())
    assert caught.value.filename == str(tmp_path / "source")


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = errno.EINVAL

    def refuse(descriptor: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    calls.sync_folder(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError):
        calls.sync_folder(tmp_path)


def test_folders_are_made_with_their_parents_and_may_be_there(tmp_path: Path) -> None:
    seen: list[str] = []
    calls.interceptor = lambda call: seen.append(f"{call.kind} {call.path.name}")
    for _ in range(2):
        make_folders(tmp_path / "a" / "b")
    assert seen == ["mkdir a", f"fsync_folder {tmp_path.name}", "mkdir b", "fsync_folder a"]
    (tmp_path / "file").touch()
    make_folders(tmp_path / "file")
    assert (tmp_path / "file").is_file(), "whoever writes into it hears of it"


def test_a_write_that_takes_less_than_it_is_given_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    assert write_file(tmp_path / "file", [b"0123456789", b"", memoryview(b"abcd")]) == 14
    calls.append(tmp_path / "file", b"and more")
    assert (tmp_path / "file").read_bytes() == b"0123456789abcdand more"


def test_a_signal_can_be_a_fault(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        arm("signal:USR1@2 kind=append")
        for _ in range(3):
            calls.append(tmp_path / "file", b"1")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_other_errors_are_not_repeated() -> None:
    seen = []

    def fail() -> None:
        seen.append(1)
        raise OSError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        again(fail)
    assert len(seen) == 1


def test_an_error_that_stays_is_raised_in_the_end() -> None:
    def fail() -> None:
        raise OSError(errno.ENOENT, "No such file or directory")

    with pytest.raises(FileNotFoundError):
        again(fail, also={errno.ENOENT}, pauses_seconds=(0.0, 0.0))


@pytest.mark.parametrize("fault", ["fail:EIO@1 kind=unlink", "fail:EIO@2 kind=unlink", "fail:EIO@1 kind=rmdir"])
def test_a_deletion_that_fails_half_way_leaves_no_visible_name(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    for name in "ab":
        (folder / name).touch()
    arm(fault)
    with pytest.raises(OSError, match="Input/output"):
        remove_folder(folder)
    assert not folder.exists()
    calls.interceptor = None
    remove_folder(tmp_path / ".iter_0000001.deleted")
    assert not tree(tmp_path)


def test_faults_are_refused_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "kill@1")
    with pytest.raises(ConfigError, match="fail on purpose"):
        faults.arm_from_environment()
    assert calls.interceptor is None
    monkeypatch.setenv(faults.PERMISSION, "1")
    faults.arm_from_environment()
    assert calls.interceptor is not None


@pytest.mark.parametrize("text", ["kil@1", "fail:NOTHING@1", "delay:soon@1", "kill@1 who=me", "kill", "signal:NONE@1"])
def test_a_fault_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=faults.VARIABLE):
        faults.parse(text)


def test_conditions_decide_which_calls_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("RANK", "1")
    arm(f"log:{log}@1 within=saving path=*/b; fail:EIO@1 rank=0; log:{log}@2x1 rank=1 kind=stat")
    write_file(tmp_path / "a", [b"1"])
    write_file(tmp_path / "b", [b"1"])
    for _ in range(3):
        assert calls.size_of(tmp_path / "a") == 1
    lines = [line.split(" ", 2)[:2] for line in log.read_text().splitlines()]
    assert lines == [["1", "create"], ["2", "write"], ["3", "fsync"], ["2", "stat"]]
