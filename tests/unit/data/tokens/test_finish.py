"""The end of a build when another job comes to the same end: neither takes away what the other has just published."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.data.tokens.files import describe
from ds_recipes.data.tokens.finish import finish, missing_parts
from ds_recipes.data.tokens.parts import plan_parts
from ds_recipes.data.tokens.summary import read_summary
from tests.unit.data.tokens.stores import make_corpus, make_recipe, open_alone, store_files


def after_the_first_look(patch: pytest.MonkeyPatch, at: Path, then: Callable[[], None]) -> None:
    """Once this process has looked whether `at` or a file in it is there, `then` happens, before it acts on the answer."""
    waiting = [then]

    def slowed(look: Callable[..., Any]) -> Callable[..., Any]:
        def looked(path: Path, *args: Any, **kwargs: Any) -> Any:
            try:
                return look(path, *args, **kwargs)
            finally:
                if waiting and path in (at, *(at / name for name in ("offsets.npy", "part.json"))):
                    waiting.pop()()

        return looked

    for name in ("exists", "stat", "read_text"):
        patch.setattr(Path, name, slowed(getattr(Path, name)))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("gone", ["documents", "parts/00000"])
def test_what_another_job_publishes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    make_corpus(tmp_path / "data", records=4, files=1)
    store = open_alone(tmp_path / "data", make_recipe(cache=tmp_path / "cache")).folder
    parts = plan_parts([describe(path, tmp_path) for path in (tmp_path / "data").glob("*.jsonl")])
    whole = store_files(store)
    shutil.copytree(store, tmp_path / "copy")
    (store / "store.json").unlink()
    shutil.rmtree(store / gone)
    published: list[int] = []

    def another_job() -> None:
        shutil.copytree(tmp_path / "copy" / gone, store / gone)
        published.append((store / gone).stat().st_mtime_ns)
        finish(store, parts)

    after_the_first_look(monkeypatch, store / gone, another_job)
    missing_parts(store, parts)
    if gone == "documents":
        finish(store, parts)
    assert [(store / gone).stat().st_mtime_ns] == published
    assert read_summary(store) is not None
    assert store_files(store) == whole
