"""A store that is damaged, half made or killed at any call is made whole again, and what is whole of it is used."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.tokens import make
from tests.ranks.launch import fork_rank, wait_for
from tests.unit.data.tokens.stores import (
    check_against_oracle,
    cut_small,
    documents_on,
    make_corpus,
    make_recipe,
    open_alone,
    store_files,
)

pytestmark = pytest.mark.usefixtures("small_parts")

CALLS = ("fsync", "rename", "mkdir", "rmdir", "unlink")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "ids cut off": lambda store: truncate(store / "parts/00003/ids.npy"),
    "a part is gone": lambda store: shutil.rmtree(store / "parts/00000"),
    "ids are gone": lambda store: (store / "parts/00005/ids.npy").unlink(),
    "a table is cut off": lambda store: truncate(store / "documents/offsets.npy"),
    "the tables are gone": lambda store: shutil.rmtree(store / "documents"),
    "store.json is gone": lambda store: (store / "store.json").unlink(),
    "store.json is nothing": lambda store: (store / "store.json").write_text("{}"),
    "store.json is cut off": lambda store: truncate(store / "store.json"),
    "store.json is gone and a part's table cut off": lambda store: [
        (store / "store.json").unlink(),
        truncate(store / "parts/00002/spans.npy"),
    ],
    "all of it": lambda store: shutil.rmtree(store),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]) -> None:
    expected = make_corpus(tmp_path / "data")
    store = open_alone(tmp_path / "data", make_recipe()).folder
    whole = store_files(store)
    parts = len(list((store / "parts").iterdir()))
    damage(store)
    made: list[int] = []
    write = make.PartMaker._write

    def counted(self: Any, folder: Path, part: Any, go_on: Any) -> Any:
        made.append(part.number)
        return write(self, folder, part, go_on)

    monkeypatch.setattr(make.PartMaker, "_write", counted)
    said: list[str] = []
    for documents in documents_on(2, tmp_path / "data", make_recipe(), said.append):
        check_against_oracle(documents, expected)
    assert store_files(store) == whole
    assert len(made) <= 1 or len(made) == parts
    if len(made) == 1 and "is damaged" not in said[0]:
        assert f"{parts - 1:,} of {parts:,} parts are there already" in " ".join(said)


def build_and_die(data: str, cache: str, call_number: int) -> int:
    """Make a store and be killed before that call that changes the disk takes place; the number of calls otherwise."""
    seen = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call_number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    open_alone(data, make_recipe(cache=Path(cache)))
    return seen


def sweep(data: str, folder: str) -> int:
    """Be killed at every call, each time in a process of its own with a cache of its own. Returns 0 if all were."""
    cut_small(500)
    number = 0
    while True:
        number += 1
        process = os.fork()
        if process == 0:
            os._exit(0 if build_and_die(data, f"{folder}/kill{number}", number) < number else 1)
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):
            return os.WEXITSTATUS(status)


def test_a_kill_at_any_call_leaves_what_the_next_start_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(500, monkeypatch.setattr)
    expected = make_corpus(tmp_path / "data", records=12, files=1)
    whole = store_files(open_alone(tmp_path / "data", make_recipe(cache=tmp_path / "undisturbed")).folder)
    process = fork_rank(sweep, (str(tmp_path / "data"), str(tmp_path)), tmp_path / "output")
    assert wait_for([process], 60)
    assert process.exitcode == 0, (tmp_path / "output").read_text()
    caches = list(tmp_path.glob("kill*"))
    assert len(caches) > 30
    for cache in caches:
        documents = open_alone(tmp_path / "data", make_recipe(cache=cache))
        check_against_oracle(documents, expected)
        assert store_files(documents.folder) == whole, cache
