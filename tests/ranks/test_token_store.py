"""The token store on real ranks: the same files as one rank makes, and rank processes that are killed or start at once."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ds_recipes.config.data_paths import parse_data_path
from ds_recipes.data.tokens.store import open_documents
from ds_recipes.errors import InputError
from ds_recipes.world.group import World
from tests.ranks.launch import RanksFailed, fork_rank, run_ranks, wait_for
from tests.unit.data.made import write_jsonl
from tests.unit.data.tokens.stores import (
    check_against_oracle,
    cut_small,
    make_corpus,
    make_recipe,
    only_store,
    open_alone,
    store_files,
)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(set_value=monkeypatch.setattr)


def open_here(world: World, path: str, caches: list[str], workers: int, streaming: bool) -> dict[str, Any]:
    """What a rank sees of the documents, or the error that it gets; its cache is the one of its number."""
    cut_small()
    cache = Path(caches[world.rank % len(caches)])
    recipe = make_recipe(cache=cache, workers=workers, streaming=streaming)
    said: list[str] = []
    try:
        documents = open_documents(parse_data_path(path), recipe, world, said.append)
    except InputError as error:
        return {"error": str(error), "notes": getattr(error, "__notes__", [])}
    return {
        "tokens": [documents.tokens(i).tolist() for i in range(len(documents))],
        "where": [documents.where(i) for i in range(len(documents))],
        "fingerprint": documents.fingerprint,
        "folder": str(documents.folder),
        "said": said,
    }


@pytest.mark.parametrize("ranks, workers, caches, streaming", [(3, 0, 1, False), (4, 0, 2, False), (2, 2, 1, True)])
def test_ranks_make_the_store_of_one(tmp_path: Path, ranks: int, workers: int, caches: int, streaming: bool) -> None:
    expected = make_corpus(tmp_path / "data")
    alone = open_alone(tmp_path / "data", make_recipe(cache=tmp_path / "alone", streaming=streaming))
    check_against_oracle(alone, expected)
    folders = [str(tmp_path / f"cache{number}") for number in range(caches)]
    for first in (True, False):
        reports = run_ranks(open_here, ranks, str(tmp_path / "data"), folders, workers, streaming, with_deepspeed=False)
        for rank, report in enumerate(reports):
            assert report["tokens"] == [alone.tokens(i).tolist() for i in range(len(alone))]
            assert report["where"] == [alone.where(i) for i in range(len(alone))]
            assert report["fingerprint"] == alone.fingerprint
            assert Path(report["folder"]).parent == Path(folders[rank % caches])
            assert bool(report["said"]) == (rank == 0)
        assert ("taken from" in reports[0]["said"][-1]) != first
    for folder in folders:
        assert store_files(only_store(Path(folder))) == store_files(alone.folder)


@pytest.mark.parametrize("ranks, caches", [(2, 1), (3, 2)])
def test_all_ranks_report_the_first_wrong_record(tmp_path: Path, ranks: int, caches: int) -> None:
    records: list[Any] = [{"text": f"a dog {i} and more"} for i in range(200)]
    records[117], records[118], records[190] = {"txt": "a"}, [1], {"text": ""}
    path = write_jsonl(tmp_path / "a.jsonl", records)
    folders = [str(tmp_path / f"cache{number}") for number in range(caches)]
    reports = run_ranks(open_here, ranks, str(path), folders, 0, False, with_deepspeed=False)
    with pytest.raises(InputError) as caught:
        open_alone(path, make_recipe(cache=tmp_path / "alone"))
    assert [report["error"] for report in reports] == [str(caught.value)] * ranks
    assert all(report["notes"] for report in reports)  # said once, as of all ranks


def open_and_lose_rank_1(world: World, path: str, cache: str, after_parts: int) -> None:
    """Rank 1 is killed when so many parts have been published."""
    cut_small()
    if world.rank == 1:
        rename = os.rename

        def counted(source: Any, target: Any) -> None:
            rename(source, target)
            if len(list(Path(cache).glob("tokens-*/parts/[0-9]*"))) >= after_parts:
                os.kill(os.getpid(), signal.SIGKILL)

        os.rename = counted
    open_documents(parse_data_path(path), make_recipe(cache=Path(cache)), world, lambda line: None)


def test_a_killed_rank_ends_the_others_and_what_is_done_stays(tmp_path: Path) -> None:
    expected = make_corpus(tmp_path / "data")
    with pytest.raises(RanksFailed) as caught:
        run_ranks(open_and_lose_rank_1, 2, str(tmp_path / "data"), str(tmp_path / "cache"), 5, with_deepspeed=False)
    assert f"rank 1: status -{int(signal.SIGKILL)}" in str(caught.value)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("tokens-*/parts/[0-9]*")}
    assert len(kept) >= 5
    documents = open_alone(tmp_path / "data", make_recipe(cache=tmp_path / "cache"))
    check_against_oracle(documents, expected)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    undisturbed = open_alone(tmp_path / "data", make_recipe(cache=tmp_path / "other"))
    assert store_files(documents.folder) == store_files(undisturbed.folder)


def open_as_a_job(path: str, cache: str, seed: int) -> int:
    cut_small()
    recipe = dataclasses.replace(make_recipe(cache=Path(cache)), workers=seed % 2)
    documents = open_alone(path, recipe)
    return 0 if len(documents) == 80 else 1


def test_jobs_that_start_at_once_share_one_store(tmp_path: Path) -> None:
    expected = make_corpus(tmp_path / "data")
    for attempt in range(3):
        cache = tmp_path / f"cache{attempt}"
        jobs = [
            fork_rank(open_as_a_job, (str(tmp_path / "data"), str(cache), number), tmp_path / f"output{number}")
            for number in range(4)
        ]
        assert wait_for(jobs, 60, grace=60)
        assert [job.exitcode for job in jobs] == [0] * 4, [path.read_text() for path in tmp_path.glob("output*")]
        documents = open_alone(tmp_path / "data", make_recipe(cache=cache))
        check_against_oracle(documents, expected)
        undisturbed = open_alone(tmp_path / "data", make_recipe(cache=tmp_path / "other"))
        assert store_files(documents.folder) == store_files(undisturbed.folder)
