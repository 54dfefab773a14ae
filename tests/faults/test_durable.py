"""What a piece of the file layer promises when it returns holds after a power cut, with nothing after it to help."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ds_recipes.fsops.durable import make_folders, publish, remove_folder, replace_file, write_file
from tests.faults.disk import Disk, Tree, crashes
from tests.faults.recording import recording


def states(folder: Path, action: Callable[[], object]) -> Iterator[tuple[bool, str, Tree]]:
    """(whether the call had returned, what happened, what is there) for each state that a kill or a power cut may leave."""
    disk = Disk(folder)
    with recording() as events:
        action()
    events.append(1)
    for crash in crashes(disk, events, seed=6, cuts=25):
        yield crash.saved is not None, str(crash), crash.tree


def test_a_replaced_file_is_the_old_or_the_new_and_the_new_once_it_is_told(tmp_path: Path) -> None:
    replace_file(tmp_path / "latest", b"old bytes")
    for is_told, text, tree in states(tmp_path, lambda: replace_file(tmp_path / "latest", b"new")):
        assert tree.get("latest") in ((b"new",) if is_told else (b"new", b"old bytes")), text


def test_a_published_folder_is_whole_and_there_once_it_is_told(tmp_path: Path) -> None:
    (tmp_path / ".part").mkdir()

    def write_and_publish() -> None:
        write_file(tmp_path / ".part" / "weights", [b"1234", b"5678"])
        publish(tmp_path / ".part", tmp_path / "final")

    for is_told, text, tree in states(tmp_path, write_and_publish):
        assert "final" in tree or not is_told, text
        assert "final" not in tree or tree.get("final/weights") == b"12345678", text


def test_a_folder_that_is_made_is_there_once_it_is_told(tmp_path: Path) -> None:
    for is_told, text, tree in states(tmp_path, lambda: make_folders(tmp_path / "a" / "b" / "c")):
        assert "a/b/c" in tree or not is_told, text


@pytest.mark.parametrize("names", [("weights",), ("manifest", "state", "weights")])
def test_a_deleted_folder_is_whole_or_out_of_sight(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "iter_1").mkdir()
    for name in names:
        write_file(tmp_path / "iter_1" / name, [b"1234"])
    for is_told, text, tree in states(tmp_path, lambda: remove_folder(tmp_path / "iter_1")):
        in_sight = {name for name in tree if name.startswith("iter_1/")}
        assert "iter_1" not in tree or in_sight == {f"iter_1/{name}" for name in names}, text
        assert "iter_1" not in tree or not is_told, text
