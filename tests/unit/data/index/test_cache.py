"""What is kept is used only if it is whole and of this very file; jobs that start at once or are killed do no harm."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from ds_recipes.data.array_files import INT64, ArrayFile, facts_of_array
from ds_recipes.data.index import kept
from ds_recipes.data.index.cache import file_fingerprint, index_folder, open_index, open_whole_index
from ds_recipes.data.index.kept import ARRAY_ENDS_BYTES, FileState
from ds_recipes.errors import InputError
from ds_recipes.fsops import calls
from tests.unit.data.index.made import Entries, entries_of, lines_of, make_cache, open_beside, was_read, write

CONTENT = b"".join(b'{"number": %d}\n' % i for i in range(30_000))
ARRAY = b'[{"a": 1},\n {"a": 2}, 3]'
DAY = 86_400


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def index_in(path: Path) -> Path:
    return index_folder(path, make_cache(path))


def test_an_unchanged_file_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CONTENT)
    assert was_read(path)
    assert not was_read(path)
    (tmp_path / "b").mkdir()
    assert not was_read(tmp_path / "b" / ".." / "a.jsonl")
    assert folders(tmp_path / ".index_cache") == [index_in(path)]
    assert entries_of(open_whole_index(path, make_cache(path))) == lines_of(CONTENT)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"{}\n")


def change_head(path: Path) -> None:
    change_in_place(path, 3)


def change_tail(path: Path) -> None:
    change_in_place(path, -3)


def change_in_place(path: Path, at: int) -> None:
    """Another byte; the same size and time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(path: Path) -> None:
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [append, change_head, change_tail, touch])
def test_a_changed_file_is_read_again_and_what_was_kept_is_deleted(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path, other = write(tmp_path / "a.jsonl", CONTENT), write(tmp_path / "a.jsonl2", CONTENT)
    before = open_beside(path).fingerprint
    open_beside(other)
    file_fingerprint(path, make_cache(path))
    change(path)
    after = open_beside(path)
    assert entries_of(after) == lines_of(path.read_bytes())
    assert (after.fingerprint == before) == (change is touch)
    assert file_fingerprint(path, make_cache(path)) == after.fingerprint
    assert len(folders(tmp_path / ".index_cache")) == 3
    assert not was_read(path) and not was_read(other)


def test_stale_folders_that_cannot_be_deleted_stop_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", CONTENT)
    open_beside(path)
    append(path)

    def held(folder: Path, ignore_errors: bool = False, **_: Any) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", held)
    assert len(open_beside(path).starts) == 30_001


def refit_meta(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change meta.json and make its digest fit."""
    content = json.loads((folder / "meta.json").read_text())["content"]
    change(content)
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    (folder / "meta.json").write_text(json.dumps({"content": content, "digest": digest}))


def write_numbers(path: Path, numbers: np.ndarray[Any, np.dtype[Any]]) -> dict[str, Any]:
    """Write an array as the cache does, and return what meta.json says of it."""
    with ArrayFile(path, INT64) as file:
        file.append(numbers)
    return facts_of_array(path, file.rows, ARRAY_ENDS_BYTES)


def refit_bounds(folder: Path, bounds: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Replace the array and make the digests fit."""
    (folder / "bounds.npy").unlink()
    facts = write_numbers(folder / "bounds.npy", bounds)
    refit_meta(folder, lambda content: content["arrays"].update(bounds=facts))


def leave_folder(content: dict[str, Any]) -> None:
    content["arrays"]["../bounds"] = content["arrays"]["bounds"]


def bounds_in(folder: Path) -> np.ndarray[Any, np.dtype[Any]]:
    return np.load(folder / "bounds.npy")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "no array": lambda folder: (folder / "bounds.npy").unlink(),
    "no files": lambda folder: [path.unlink() for path in folder.iterdir()],
    "empty meta": lambda folder: (folder / "meta.json").write_bytes(b""),
    "cut meta": lambda folder: os.truncate(folder / "meta.json", 100),
    "bad meta": lambda folder: (folder / "meta.json").write_bytes(b"[1]"),
    "deep meta": lambda folder: (folder / "meta.json").write_bytes(b"[" * 99_999),
    "binary meta": lambda folder: (folder / "meta.json").write_bytes(b"\xff\x00"),
    "flipped meta": lambda folder: flip(folder / "meta.json", (folder / "meta.json").read_bytes().index(b"fingerpr") + 20),
    "cut array": lambda folder: os.truncate(folder / "bounds.npy", (folder / "bounds.npy").stat().st_size - 8),
    "cut header": lambda folder: os.truncate(folder / "bounds.npy", 20),
    "empty array": lambda folder: os.truncate(folder / "bounds.npy", 0),
    "flipped array": lambda folder: flip(folder / "bounds.npy", 50_001),
    "pickle": lambda folder: np.save(folder / "bounds.npy", np.array([{}, 1], object), allow_pickle=True),
    "zip": lambda folder: np.savez((folder / "bounds.npy").open("wb"), np.zeros(9)),
    "version": lambda folder: refit_meta(folder, lambda content: content.update(version=0)),
    "count": lambda folder: refit_meta(folder, lambda content: content["arrays"]["bounds"].update(length=9)),
    "other file": lambda folder: refit_meta(folder, lambda content: content["identity"]["file"].update(path="/b")),
    "other size": lambda folder: refit_meta(folder, lambda content: content["identity"]["file"].update(size=1)),
    "no fingerprint": lambda folder: refit_meta(folder, lambda content: content["facts"].update(fingerprint="../a")),
    "number for text": lambda folder: refit_meta(folder, lambda content: content["facts"].update(fingerprint=5)),
    "no arrays": lambda folder: refit_meta(folder, lambda content: content["arrays"].clear()),
    "beyond the file": lambda folder: refit_bounds(folder, bounds_in(folder) + len(CONTENT)),
    "end beyond the file": lambda folder: refit_bounds(folder, np.append(bounds_in(folder), len(CONTENT) + 1)),
    "not the end": lambda folder: refit_bounds(folder, bounds_in(folder)[:-1]),
    "not the beginning": lambda folder: refit_bounds(folder, bounds_in(folder)[1:]),
    "descending": lambda folder: refit_bounds(folder, bounds_in(folder)[[0, *range(30_000 - 1, 0, -1), 30_000]]),
    "one bound": lambda folder: refit_bounds(folder, bounds_in(folder)[:1]),
    "no bound": lambda folder: refit_bounds(folder, bounds_in(folder)[:0]),
    "a path for a name": lambda folder: refit_meta(folder, leave_folder),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"x")),
    "a dead link": lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again_never_believed(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.jsonl", CONTENT)
    fingerprint = open_beside(path).fingerprint
    shutil.copy(index_in(path) / "bounds.npy", tmp_path / ".index_cache")
    DAMAGES[damage](index_in(path))
    assert was_read(path) and not was_read(path)
    index = open_beside(path)
    assert entries_of(index) == lines_of(CONTENT) and index.fingerprint == fingerprint


def shorten(array: str, **facts: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        numbers = np.load(folder / f"{array}.npy")
        (folder / f"{array}.npy").unlink()
        written = write_numbers(folder / f"{array}.npy", numbers[:-1])
        refit_meta(folder, lambda content: (content["arrays"].update({array: written}), content["facts"].update(facts)))

    return damage


@pytest.mark.parametrize(
    "damage", [shorten("starts"), shorten("ends"), shorten("lines"), shorten("ends", is_array=False)]
)
def test_a_damaged_entry_of_an_array_is_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = write(tmp_path / "a.json", ARRAY)
    assert entries_of(open_beside(path)) == [(1, 9, 1), (12, 20, 2), (22, 23, 2)]
    damage(index_in(path))
    assert was_read(path) and not was_read(path)
    assert entries_of(open_beside(path)) == [(1, 9, 1), (12, 20, 2), (22, 23, 2)]


def test_an_entry_of_another_file_is_not_used(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.jsonl", CONTENT), write(tmp_path / "b.jsonl", b"{}\n" * 15)
    open_beside(path)
    open_beside(other)
    shutil.rmtree(index_in(path))
    index_in(other).rename(index_in(path))
    assert entries_of(open_beside(path)) == lines_of(CONTENT)


@pytest.mark.parametrize("name", ["日本語" * 28, "a" * 255, "[b] *?", os.fsdecode(b"\xff\xfe"), " ", "a\nb"])
def test_any_name_of_a_file_works(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, CONTENT)
    assert was_read(path) and not was_read(path)
    append(path)
    assert was_read(path) and len(folders(tmp_path / ".index_cache")) == 1


@pytest.mark.parametrize("content", [CONTENT, ARRAY])
@pytest.mark.parametrize("read", [open_index, file_fingerprint])
@pytest.mark.parametrize("change", [append, change_head, change_tail, touch, os.unlink])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, change: Callable[[Path], None], read: Callable[..., Any], content: bytes
) -> None:
    path = write(tmp_path / "a.jsonl", content)
    pending = [change]
    with pytest.raises(InputError, match=r"a\.jsonl: (was changed while it was read|no such file)"):
        read(path, tmp_path, lambda done, total: pending.pop()(path) if pending else None)
    assert folders(tmp_path) == ([] if change is os.unlink else [path])


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path, blocked = write(tmp_path / "a.jsonl", CONTENT), write(tmp_path / "file", b"")
    with pytest.raises(InputError, match=r"file/cache: cannot be written \(Not a directory\)"):
        open_index(path, blocked / "cache")


def opened(path: Path, start_at: float) -> tuple[str, int]:
    time.sleep(max(0.0, start_at - time.time()))
    index = open_beside(path)
    return index.fingerprint, len(index.starts)


def test_jobs_that_start_at_once_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CONTENT)
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        for round_ in range(3):
            start_at = time.time() + (1.0 if round_ == 0 else 0.1)
            found = set(pool.map(opened, [path] * 3, [start_at] * 3))
            assert found == {(open_beside(path).fingerprint, 30_000 + round_)}
            assert folders(tmp_path / ".index_cache") == [index_in(path)]
            append(path)
    assert len(list((tmp_path / ".index_cache").iterdir())) == 1


def open_and_die(path: str, syncs: int) -> None:
    """Be killed when so many files and folders are about to be made durable."""
    seen = 0

    def kill(call: calls.Call) -> None:
        nonlocal seen
        seen += call.kind.startswith("fsync")
        if seen == syncs:
            os.kill(os.getpid(), signal.SIGKILL)

    calls.interceptor = kill
    open_beside(Path(path))


@pytest.mark.parametrize("syncs", [1, 2, 3, 4, 5])
def test_a_kill_leaves_nothing_that_is_read(tmp_path: Path, syncs: int) -> None:
    path = write(tmp_path / "a.jsonl", CONTENT)
    program = f"from {__name__} import open_and_die; open_and_die({str(path)!r}, {syncs})"
    ended = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[4], timeout=60)
    assert ended.returncode == -signal.SIGKILL
    was_published = syncs == 5  # the last sync is that of the parent, behind the rename
    assert bool(folders(tmp_path / ".index_cache")) == was_published
    assert was_read(path) != was_published
    assert entries_of(open_beside(path)) == lines_of(CONTENT)


def test_parts_of_killed_jobs_are_deleted_when_they_are_old(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CONTENT)
    cache = make_cache(path)
    old, young = (cache / f".{index_in(path).name}.{number}.part" for number in range(2))
    for part in (old, young):
        write(part / "bounds.npy", b"x")
    for thing in (old / "bounds.npy", old):
        os.utime(thing, (time.time() - 2 * DAY,) * 2)
    assert was_read(path)
    assert not old.exists() and young.exists()


def test_large_arrays_are_mapped_and_small_ones_hold_no_file_open(tmp_path: Path) -> None:
    def maps(path: Path) -> bool:
        array: Any = open_beside(path).starts
        while array is not None and not isinstance(array, np.memmap):
            array = array.base
        return array is not None

    assert maps(write(tmp_path / "a.jsonl", CONTENT + CONTENT))
    assert not maps(write(tmp_path / "b.jsonl", b"{}\n" * 100))


def test_large_arrays_are_verified_at_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "ARRAY_ENDS_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", CONTENT)
    for at in (200, -200):
        open_beside(path)
        flip(index_in(path) / "bounds.npy", at)
        assert was_read(path) and not was_read(path)


def test_a_state_is_of_the_file_that_a_link_means(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CONTENT)
    (tmp_path / "link").symlink_to(path)
    assert FileState.of(tmp_path / "link") == FileState.of(path)


def test_lines_of_the_oracle_are_what_one_would_say() -> None:
    expected: Entries = [(3, 6, 1), (6, 7, 2), (7, 8, 3)]
    assert lines_of(b"\xef\xbb\xbf{}\n\n{") == expected
